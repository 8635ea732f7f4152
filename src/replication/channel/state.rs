//! What a channel knows, as plain data: the state of replication, both announcements, the streams.

use std::time::Duration;

use super::*;
use crate::replication::epoch::History;
use crate::units::{Chain, Incarnation, Lsn};

/// What replication of a group with a peer is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicationState {
    /// Nothing to do, or nobody to do it with.
    Idle,
    /// The secondary has, or had a moment ago, all there is.
    Streaming,
    /// The secondary gets what it missed.
    CatchingUp,
    /// The primary sends an image, since its log does not reach back to the secondary.
    ResyncSource,
    /// The secondary takes an image.
    ResyncTarget,
    /// Stopped by command, for now.
    Paused,
    /// It cannot go on by itself.
    Blocked,
    /// Both were primary, and each has what the other lacks.
    SplitBrain,
}

impl ReplicationState {
    /// As status shows it.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            ReplicationState::Idle => "idle",
            ReplicationState::Streaming => "streaming",
            ReplicationState::CatchingUp => "catching-up",
            ReplicationState::ResyncSource => "resync-source",
            ReplicationState::ResyncTarget => "resync-target",
            ReplicationState::Paused => "paused",
            ReplicationState::Blocked => "blocked",
            ReplicationState::SplitBrain => "split-brain",
        }
    }
}

/// What the peer announced.
#[derive(Clone, Debug)]
pub struct Remote {
    /// It is the primary.
    pub primary: bool,
    /// It has served nobody since its start.
    pub recovering: bool,
    /// Paused at its side.
    pub paused: bool,
    /// Its log when it announced.
    pub history: History,
}

/// This node sends.
#[derive(Clone, Debug)]
pub(super) struct Sender {
    pub(super) stream: u64,
    /// Up to here frames were cut.
    pub(super) cursor: Lsn,
    /// Up to here the peer has them, in its memory at least.
    pub(super) received: Lsn,
    pub(super) queued: u32,
}

/// What a peer acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Acked {
    /// In its log: where that ends.
    pub received: Lsn,
    /// Up to which it survives power loss there.
    pub durable: Lsn,
    /// Requests up to its head.
    pub requests: u64,
}

/// The first stream that a channel asks for. Those of different lives of a node have different
/// numbers: what waits for one of a life before is taken for none of this one. Never 0.
pub(super) fn first_stream(life: Incarnation) -> u64 {
    (life.0 << 32) | 1
}

/// This node receives.
#[derive(Clone, Debug)]
pub(super) struct Follower {
    pub(super) stream: u64,
    /// The head that was asked with, until the stream is granted.
    pub(super) asked: Option<Lsn>,
    /// The peer has granted it.
    pub(super) runs: bool,
    /// Where the next byte from the peer belongs.
    pub(super) expected: Lsn,
    /// Up to here everything was appended.
    pub(super) appended: Lsn,
    /// Where the frames end that came and are not appended all.
    pub(super) frames: VecDeque<Lsn>,
}

/// What a primary told about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// After its last record.
    pub head: Lsn,
    /// Durable there.
    pub durable: Lsn,
    /// Requests up to its head.
    pub requests: u64,
    /// The age of the oldest byte that this node had not acknowledged, where it knew.
    pub lag: Option<Duration>,
    /// It told so at this moment of this node's monotonic clock, or later: what the peer last had
    /// heard from here, plus how long it had held that.
    pub at: Duration,
}

/// A chain that was asked for: what for, and of which ask of the peer.
#[derive(Clone, Debug)]
pub(super) enum Lookup {
    Follow {
        stream: u64,
        history: History,
        acked: Acked,
    },
    /// What the peer is to cut back to; it asked with this stream, or comes back as primary. Where
    /// its whole log should be a prefix, the chain at its end.
    Part {
        stream: Option<u64>,
        at: Lsn,
        expected: Option<Chain>,
    },
}

impl Lookup {
    /// The ask of the peer that it is for.
    pub(super) fn stream(&self) -> Option<u64> {
        match self {
            Lookup::Follow { stream, .. } => Some(*stream),
            Lookup::Part { stream, .. } => *stream,
        }
    }
}

/// Where the peer says that the histories part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parted {
    /// The last position that both share.
    pub at: Lsn,
    /// The peer's chain there, where its log still reaches it.
    pub chain: Option<Chain>,
}

impl Channel {
    /// What replication does from now on, and why: people are told when it stops, and when it goes
    /// on.
    pub(super) fn set_state(
        &mut self,
        context: &mut Context<'_>,
        state: ReplicationState,
        reason: impl Into<String>,
    ) {
        let reason = reason.into();
        if self.state != state {
            self.since = context.now;
            let bad = match state {
                ReplicationState::SplitBrain => Some((Severity::Error, "split-brain")),
                ReplicationState::Blocked if self.told_of_trouble() => None,
                ReplicationState::Blocked => Some((Severity::Error, "replication-blocked")),
                _ => None,
            };
            let good = state == ReplicationState::Streaming;
            if good && std::mem::take(&mut self.told_stopped) {
                context.outputs.push(Output::Event {
                    severity: Severity::Info,
                    code: "replication-resumed",
                    group: Some(self.local.name.clone()),
                    text: format!(
                        "group {}: replication with {} streams again",
                        self.local.name, context.peer_name
                    ),
                });
            }
            if let Some((severity, code)) = bad {
                self.told_stopped = true;
                context.outputs.push(Output::Event {
                    severity,
                    code,
                    group: Some(self.local.name.clone()),
                    text: format!(
                        "group {}: replication with {} stopped: {reason}",
                        self.local.name, context.peer_name
                    ),
                });
            }
        }
        self.state = state;
        self.reason = reason;
    }
}
