//! One group with one peer: who follows whom, what is sent, what is known. Part of the pure core.
//!
//! Each side announces what it holds when the link comes up and whenever its role changes. A
//! secondary that hears of a primary forgets its unfinished tail and asks to follow from its head;
//! the primary compares histories, then the chain at that head, and grants the stream or says why
//! not. Every ask has a number, which its stream carries, so that what is late from an earlier one
//! is recognised and dropped.
//!
//! Nothing here cuts or overwrites a log. Where histories part, the log no longer reaches, or the
//! secondary is ahead, both sides stop with a state, a reason and the next command. One role is
//! changed by itself: a primary that has just recovered, and appended nothing since, follows a peer
//! that has checked that its whole log is a prefix of the peer's newer reign.

use std::time::Duration;

use bytes::Bytes;

use crate::events::Severity;
use crate::units::{ByteSize, Chain, GroupId, Lsn, Name};

use super::core::{Appended, ConnId, LocalGroup, Membership, Output, Settings};
use super::epoch::{History, Relation, compare};
use super::lag::Marks;
use super::wire::{Message, PAYLOAD_BYTES_MAX, StopCode};

/// Log frames of a stream that wait in the shell at most; the next is cut when one was sent, so that
/// what was appended meanwhile goes along.
const FRAMES_QUEUED_MAX: u32 = 2;

/// What replication of a group with a peer is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicationState {
    /// Nothing to do, or nobody to do it with.
    Idle,
    /// The secondary has, or had a moment ago, all there is.
    Streaming,
    /// The secondary gets what it missed.
    CatchingUp,
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
            ReplicationState::Paused => "paused",
            ReplicationState::Blocked => "blocked",
            ReplicationState::SplitBrain => "split-brain",
        }
    }
}

/// What a handler needs besides its channel.
pub(super) struct Context<'a> {
    pub(super) now: Duration,
    pub(super) conn: Option<ConnId>,
    /// The peer's clock in its last heartbeat, and nanoseconds since it came; zeros without one.
    pub(super) echo: (u64, u64),
    pub(super) peer_name: &'a Name,
    pub(super) settings: &'a Settings,
    pub(super) outputs: &'a mut Vec<Output>,
}

impl Context<'_> {
    fn send(&mut self, message: Message) {
        if let Some(conn) = self.conn {
            self.outputs.push(Output::Send { conn, message });
        }
    }
}

/// What the peer announced.
#[derive(Clone, Debug)]
pub struct Remote {
    /// It is the primary.
    pub primary: bool,
    /// A primary that has just recovered, and has appended nothing since.
    pub recovering: bool,
    /// Paused at its side.
    pub paused: bool,
    /// Its log when it announced.
    pub history: History,
}

/// This node sends.
#[derive(Clone, Debug)]
struct Sender {
    stream: u64,
    /// Up to here frames were cut.
    cursor: Lsn,
    queued: u32,
}

/// What a peer acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Acked {
    /// Bytes received and appended.
    pub received: Lsn,
    /// Up to which it survives power loss there.
    pub durable: Lsn,
    /// Requests up to its head.
    pub requests: u64,
}

/// This node receives.
#[derive(Clone, Debug)]
struct Follower {
    stream: u64,
    /// The head that was asked with, until the stream is granted.
    asked: Option<Lsn>,
    /// Where the next byte from the peer belongs.
    expected: Lsn,
    /// Up to here everything was appended.
    appended: Lsn,
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
enum Lookup {
    Follow { stream: u64, history: History, acked: Acked },
    MayFollow { history: History },
}

/// One group with one peer.
#[derive(Debug)]
pub struct Channel {
    local: LocalGroup,
    first_head: Lsn,
    /// Both sides have met in roles that fit: this node is not just recovering any more.
    met: bool,
    paused: bool,
    remote: Option<Remote>,
    state: ReplicationState,
    reason: String,
    since: Duration,
    sender: Option<Sender>,
    acked: Acked,
    received_marks: Marks,
    durable_marks: Marks,
    /// Bytes below were appended before this node could tell when.
    timed_from: Lsn,
    follower: Option<Follower>,
    told: Option<Told>,
    /// Position up to which this node's bytes were compared with the peer's by their chain.
    compared: Option<Lsn>,
    /// Where a comparison failed.
    mismatch: Option<Lsn>,
    next_stream: u64,
    next_ticket: u64,
    lookup: Option<(u64, Lookup)>,
    rpo_alarm: bool,
    /// The peer is no member any more; the stream goes on to here, so that it learns of that.
    ending: Option<Lsn>,
}

/// The group that a message is about.
pub(super) fn group_of(message: &Message) -> Option<GroupId> {
    match message {
        Message::Announce { group, .. }
        | Message::Follow { group, .. }
        | Message::Stream { group, .. }
        | Message::Stop { group, .. }
        | Message::Ack { group, .. }
        | Message::Progress { group, .. }
        | Message::MayFollow { group, .. } => Some(GroupId(*group)),
        _ => None,
    }
}

impl Channel {
    pub(super) fn new(now: Duration, local: &LocalGroup) -> Channel {
        let mut local = local.clone();
        let first_head = local.history.head;
        // So that the first `on_local` sees a change.
        local.membership = Membership::Stranger;
        Channel {
            local,
            first_head,
            met: false,
            paused: false,
            remote: None,
            state: ReplicationState::Idle,
            reason: "not connected yet".to_owned(),
            since: now,
            sender: None,
            acked: Acked::default(),
            received_marks: Marks::default(),
            durable_marks: Marks::default(),
            timed_from: first_head,
            follower: None,
            told: None,
            compared: None,
            mismatch: None,
            next_stream: 1,
            next_ticket: 1,
            lookup: None,
            rpo_alarm: false,
            ending: None,
        }
    }

    /// The group as it is here.
    #[must_use]
    pub fn local(&self) -> &LocalGroup {
        &self.local
    }

    /// What the peer announced on this link.
    #[must_use]
    pub fn remote(&self) -> Option<&Remote> {
        self.remote.as_ref()
    }

    /// State, reason, and since when (monotonic).
    #[must_use]
    pub fn state(&self) -> (ReplicationState, &str, Duration) {
        (self.state, &self.reason, self.since)
    }

    /// What the peer acknowledged, in this life of the process.
    #[must_use]
    pub fn acked(&self) -> Acked {
        self.acked
    }

    /// What the primary told, in this life of the process.
    #[must_use]
    pub fn told(&self) -> Option<Told> {
        self.told
    }

    /// The age of the oldest byte that the peer has not received, and has not made durable. Unknown
    /// while it lacks bytes that were here before this node was primary, or was started.
    #[must_use]
    pub fn lags(&self, now: Duration) -> (Option<Duration>, Option<Duration>) {
        let timed = |lsn: Lsn, marks: &Marks| (lsn >= self.timed_from).then(|| marks.lag(now));
        (
            timed(self.acked.received, &self.received_marks),
            timed(self.acked.durable, &self.durable_marks),
        )
    }

    /// The same, at least.
    #[must_use]
    pub fn lags_at_least(&self, now: Duration) -> (Duration, Duration) {
        (self.received_marks.lag(now), self.durable_marks.lag(now))
    }

    /// Up to where the chains of both were compared and equal, and where they were not.
    #[must_use]
    pub fn comparison(&self) -> (Option<Lsn>, Option<Lsn>) {
        (self.compared, self.mismatch)
    }

    /// Whether the peer may learn of the group.
    fn visible(&self) -> bool {
        !matches!(self.local.membership, Membership::Stranger)
    }

    /// Whether the group is to be replicated with the peer.
    fn active(&self) -> bool {
        matches!(self.local.membership, Membership::Member { .. } | Membership::Pending)
    }

    fn recovering(&self) -> bool {
        self.local.primary
            && self.local.recovered
            && !self.met
            && self.local.history.head == self.first_head
    }

    fn set_state(
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
                ReplicationState::Blocked => Some((Severity::Error, "replication-blocked")),
                _ => None,
            };
            if let Some((severity, code)) = bad {
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

    // ---- what happens here ----

    pub(super) fn on_local(&mut self, context: &mut Context<'_>, local: LocalGroup) {
        let was_recovering = self.recovering();
        let was_active = self.active();
        let was_visible = self.visible();
        let before = std::mem::replace(&mut self.local, local);
        self.note_ending(was_active);
        let reign = |history: &History| history.last().map(|reign| reign.id);
        // A secondary's newest reign changes with the bytes that it follows by: no change of role.
        let role_changed = before.primary != self.local.primary
            || self.local.primary && reign(&before.history) != reign(&self.local.history)
            || was_recovering != self.recovering();
        let membership_changed = was_active != self.active() || was_visible != self.visible();
        let retired = !self.active();
        if self.visible() && !self.local.primary && self.local.retired != retired {
            context.outputs.push(Output::Retire { group: self.local.id, retired });
        }
        if self.local.primary {
            let head = self.local.history.head;
            if !before.primary {
                self.timed_from = head;
            }
            self.received_marks.appended(context.now, head);
            self.durable_marks.appended(context.now, head);
        } else {
            self.received_marks.restart(Lsn::ZERO);
            self.durable_marks.restart(Lsn::ZERO);
        }
        if membership_changed && !self.visible() {
            self.drop_streams();
            self.remote = None;
            self.set_state(context, ReplicationState::Idle, "not replicated with this peer");
            return;
        }
        if role_changed || membership_changed {
            if role_changed {
                self.drop_streams();
            }
            self.announce(context);
            self.evaluate(context);
            self.pump(context);
        } else if self.sender.is_some() {
            self.pump(context);
            if before.durable != self.local.durable {
                self.send_progress(context);
            }
        } else if self.follower.is_some() && before.durable != self.local.durable {
            self.send_ack(context);
        }
        self.check_rpo(context);
    }

    /// Keeps a stream to a node that was a member going until it has the record that says so.
    fn note_ending(&mut self, was_active: bool) {
        if self.local.membership != Membership::Stranger || self.sender.is_none() {
            self.ending = None;
            return;
        }
        if was_active {
            self.ending = Some(self.local.history.head);
        }
        if self.ending.is_some() {
            self.local.membership = Membership::Stopped;
        }
    }

    pub(super) fn on_pause(&mut self, context: &mut Context<'_>, paused: bool) {
        if self.paused == paused {
            return;
        }
        self.paused = paused;
        if paused && let Some(sender) = self.sender.take() {
            context.send(Message::Stop {
                group: self.local.id.0,
                stream: sender.stream,
                code: StopCode::Paused,
                reason: format!(
                    "paused on the primary; `tidelog resume {}` goes on",
                    self.local.name
                ),
            });
        }
        self.announce(context);
        self.evaluate(context);
    }

    pub(super) fn on_link_up(&mut self, context: &mut Context<'_>) {
        self.drop_streams();
        self.remote = None;
        if self.visible() {
            if !self.needs_a_hand() {
                let reason = "connected; the peer has not said yet what it holds";
                self.set_state(context, ReplicationState::Idle, reason);
            }
            self.announce(context);
        }
    }

    /// What must be mended by an operator stays on show until it is known to be mended.
    fn needs_a_hand(&self) -> bool {
        matches!(self.state, ReplicationState::Blocked | ReplicationState::SplitBrain)
    }

    pub(super) fn on_link_down(&mut self, now: Duration, reason: &str) {
        self.drop_streams();
        self.remote = None;
        if !self.needs_a_hand() {
            if self.state != ReplicationState::Idle {
                self.since = now;
            }
            self.state = ReplicationState::Idle;
            self.reason = format!("link is down: {reason}");
        }
    }

    pub(super) fn on_heartbeat(&mut self, context: &mut Context<'_>) {
        if self.sender.is_some() {
            self.send_progress(context);
        }
        self.check_rpo(context);
    }

    fn drop_streams(&mut self) {
        self.sender = None;
        self.follower = None;
        self.lookup = None;
        self.ending = None;
    }

    fn announce(&mut self, context: &mut Context<'_>) {
        if !self.visible() {
            return;
        }
        context.send(Message::Announce {
            group: self.local.id.0,
            primary: self.local.primary,
            recovering: self.recovering(),
            paused: self.paused,
            stopped: !self.active(),
            incarnation: self.local.incarnation.0,
            history: self.local.history.to_wire(),
        });
    }

    // ---- who follows whom ----

    fn evaluate(&mut self, context: &mut Context<'_>) {
        let name = self.local.name.clone();
        let peer = context.peer_name.clone();
        if !self.active() {
            // A stream that runs carries the record that ends it.
            if self.sender.is_none() {
                self.set_state(context, ReplicationState::Idle, "replication was stopped");
            }
            return;
        }
        if self.paused {
            self.drop_streams();
            let reason = format!("paused by command; `tidelog resume {name}` goes on");
            self.set_state(context, ReplicationState::Paused, reason);
            return;
        }
        let Some(remote) = self.remote.clone() else { return };
        if remote.paused {
            self.drop_streams();
            let reason =
                format!("paused by command on {peer}; `tidelog resume {name}` there goes on");
            self.set_state(context, ReplicationState::Paused, reason);
            return;
        }
        match (self.local.primary, remote.primary) {
            (false, true) => {
                self.met = true;
                self.ask(context);
            }
            (true, false) => {
                self.met = true;
                if self.sender.is_none() && self.lookup.is_none() && !self.needs_a_hand() {
                    self.set_state(
                        context,
                        ReplicationState::Idle,
                        format!("{peer} has not asked for the log yet"),
                    );
                }
            }
            (false, false) => {
                self.met = true;
                self.set_state(
                    context,
                    ReplicationState::Idle,
                    format!("no primary: run `tidelog promote {name}` on one of the two"),
                );
            }
            (true, true) => self.two_primaries(context, &remote),
        }
    }

    /// Both claim to be primary. The one that has just recovered may follow, if its whole log is a
    /// prefix of the other's; anything else is for an operator.
    fn two_primaries(&mut self, context: &mut Context<'_>, remote: &Remote) {
        let newer_is_here = self.local.history.last().map(|reign| reign.counter)
            > remote.history.last().map(|reign| reign.counter);
        match compare(&self.local.history, &remote.history) {
            Relation::TheirsIsPrefix if remote.recovering && newer_is_here => {
                let lookup = Lookup::MayFollow { history: remote.history.clone() };
                self.look_up(context, remote.history.head, lookup);
                self.set_state(
                    context,
                    ReplicationState::Idle,
                    format!(
                        "{} has come back as primary; it is about to follow",
                        context.peer_name
                    ),
                );
            }
            Relation::MineIsPrefix if self.recovering() => {
                self.set_state(
                    context,
                    ReplicationState::Idle,
                    format!(
                        "{} became primary while this node was away; its check of this log is awaited",
                        context.peer_name
                    ),
                );
            }
            relation => self.split_brain(context, &relation),
        }
    }

    fn split_brain(&mut self, context: &mut Context<'_>, relation: &Relation) {
        self.drop_streams();
        let name = &self.local.name;
        let peer = context.peer_name;
        let what = match relation {
            Relation::Diverged { common, mine_bytes, theirs_bytes } => format!(
                "since LSN {common} this node wrote {} and {peer} wrote {}",
                ByteSize(*mine_bytes),
                ByteSize(*theirs_bytes)
            ),
            Relation::Same => "with equal logs".to_owned(),
            Relation::TheirsIsPrefix => format!("this node has all that {peer} has, and more"),
            Relation::MineIsPrefix => format!("{peer} has all that this node has, and more"),
        };
        let text = format!(
            "both nodes are primary: {what}; stop the hosts of the one that is to yield, then \
             `tidelog demote {name}` there"
        );
        self.set_state(context, ReplicationState::SplitBrain, text);
    }

    fn ask(&mut self, context: &mut Context<'_>) {
        if self.local.failed {
            self.set_state(
                context,
                ReplicationState::Blocked,
                "this node's disk failed; restart it once the disk is well",
            );
            return;
        }
        let stream = self.next_stream;
        self.next_stream += 1;
        self.follower =
            Some(Follower { stream, asked: None, expected: Lsn::ZERO, appended: Lsn::ZERO });
        context.outputs.push(Output::Prepare { group: self.local.id, stream });
        if !self.needs_a_hand() {
            let reason = format!("{} is asked for the log", context.peer_name);
            self.set_state(context, ReplicationState::Idle, reason);
        }
    }

    fn look_up(&mut self, context: &mut Context<'_>, lsn: Lsn, lookup: Lookup) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.lookup = Some((ticket, lookup));
        context.outputs.push(Output::LookupChain { group: self.local.id, lsn, ticket });
    }

    // ---- what the peer says ----

    pub(super) fn on_message(
        &mut self,
        context: &mut Context<'_>,
        message: Message,
    ) -> Result<(), String> {
        if !self.visible() {
            // As if the group were not here.
            return Ok(());
        }
        match message {
            Message::Announce { primary, recovering, paused, stopped, history, .. } => {
                let history = History::from_wire(&history)
                    .ok_or_else(|| format!("group {}: impossible history", self.local.name))?;
                if stopped {
                    // A stream that runs brings the record that ends it.
                    if self.follower.is_none() && self.sender.is_none() {
                        self.remote = None;
                        let reason = format!("replication was stopped on {}", context.peer_name);
                        self.set_state(context, ReplicationState::Idle, reason);
                    }
                    return Ok(());
                }
                self.remote = Some(Remote { primary, recovering, paused, history });
                self.evaluate(context);
                Ok(())
            }
            Message::Follow { stream, history, durable, requests, .. } => {
                let history = History::from_wire(&history)
                    .ok_or_else(|| format!("group {}: impossible history", self.local.name))?;
                if durable > history.head.0 {
                    return Err(format!("group {}: durable above head", self.local.name));
                }
                self.on_follow(context, stream, history, Lsn(durable), requests);
                Ok(())
            }
            Message::Stream { stream, from, .. } => self.on_stream(context, stream, Lsn(from)),
            Message::Stop { stream, code, reason, .. } => {
                self.on_stop(context, stream, code, reason);
                Ok(())
            }
            Message::Ack { stream, received, head, chain, durable, requests, .. } => {
                if head > received || durable > head {
                    return Err(format!("group {}: ack out of order", self.local.name));
                }
                let acked = Acked { received: Lsn(received), durable: Lsn(durable), requests };
                self.on_ack(context, stream, acked, Lsn(head), Chain(chain))
            }
            Message::Progress {
                stream, head, chain, durable, requests, lag, echo, held, ..
            } => {
                if durable > head || head > Lsn::MAX.0 {
                    return Err(format!("group {}: progress out of order", self.local.name));
                }
                // Without a heartbeat of this node behind it, its age has no bound yet.
                let said_after = Duration::from_nanos(echo.saturating_add(held));
                let at = if echo == 0 { Duration::ZERO } else { said_after.min(context.now) };
                let told = Told {
                    head: Lsn(head),
                    durable: Lsn(durable),
                    requests,
                    lag: (lag != u64::MAX).then(|| Duration::from_nanos(lag)),
                    at,
                };
                self.on_progress(context, stream, told, Chain(chain));
                Ok(())
            }
            Message::MayFollow { head, chain, .. } => {
                self.on_may_follow(context, Lsn(head), Chain(chain));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn stop(
        &mut self,
        context: &mut Context<'_>,
        group: [u8; 16],
        stream: u64,
        code: StopCode,
        reason: &str,
    ) {
        context.send(Message::Stop { group, stream, code, reason: reason.to_owned() });
    }

    // ---- primary ----

    fn on_follow(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        theirs: History,
        durable: Lsn,
        requests: u64,
    ) {
        self.sender = None;
        self.lookup = None;
        self.met = true;
        self.remote.get_or_insert_with(|| Remote {
            primary: false,
            recovering: false,
            paused: false,
            history: theirs.clone(),
        });
        let group = self.local.id.0;
        let name = self.local.name.clone();
        if !self.active() {
            let reason = format!("replication of {name} to this node was stopped");
            self.stop(context, group, stream, StopCode::NotMember, &reason);
            return;
        }
        if !self.local.primary {
            let reason = format!("neither node is primary; run `tidelog promote {name}` on one");
            self.stop(context, group, stream, StopCode::NotPrimary, &reason);
            return;
        }
        if self.paused {
            let reason = format!("paused on the primary; `tidelog resume {name}` there goes on");
            self.stop(context, group, stream, StopCode::Paused, &reason);
            return;
        }
        if theirs.head < self.acked.durable {
            context.outputs.push(Output::Event {
                severity: Severity::Error,
                code: "peer-rolled-back",
                group: Some(name.clone()),
                text: format!(
                    "group {name}: {} had LSN {} durable and now ends at {}: its disk was rolled \
                     back, or lied; it is sent again from there",
                    context.peer_name, self.acked.durable, theirs.head
                ),
            });
        }
        let acked = Acked { received: theirs.head, durable, requests };
        match compare(&self.local.history, &theirs) {
            Relation::Same | Relation::TheirsIsPrefix => {
                if theirs.head < self.local.log_start {
                    self.refuse_log_gone(context, stream, theirs.head);
                } else if theirs.head == Lsn::ZERO {
                    self.grant(context, stream, acked);
                } else {
                    let head = theirs.head;
                    self.look_up(context, head, Lookup::Follow { stream, history: theirs, acked });
                }
            }
            Relation::MineIsPrefix => {
                let reason = format!(
                    "the secondary holds {} that the primary lost; nothing was changed: run \
                     `tidelog promote {name}` on the secondary and `tidelog demote {name}` on the \
                     other to keep them",
                    ByteSize(theirs.head.bytes_since(self.local.history.head))
                );
                self.refuse(context, stream, StopCode::Ahead, reason);
            }
            Relation::Diverged { common, mine_bytes, theirs_bytes } => {
                self.refuse_diverged(context, stream, common, mine_bytes, theirs_bytes);
            }
        }
    }

    fn refuse_log_gone(&mut self, context: &mut Context<'_>, stream: u64, head: Lsn) {
        let name = self.local.name.clone();
        let reason = format!(
            "the secondary ends at LSN {head}, and the primary's log begins at {}: the part between \
             was folded; nothing was changed: `tidelog replicate {name} --stop`, then replicate it \
             under a fresh copy",
            self.local.log_start
        );
        self.refuse(context, stream, StopCode::LogGone, reason);
    }

    fn refuse_diverged(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        common: Lsn,
        mine_bytes: u64,
        theirs_bytes: u64,
    ) {
        let name = self.local.name.clone();
        let reason = format!(
            "histories part at LSN {common}: the primary has {} after it, the secondary {} that \
             the primary lacks; nothing was changed: save what is needed from the secondary with \
             `tidelog image open {name} --at now` there, then delete that copy and replicate anew",
            ByteSize(mine_bytes),
            ByteSize(theirs_bytes)
        );
        self.refuse(context, stream, StopCode::Diverged, reason);
    }

    fn refuse(&mut self, context: &mut Context<'_>, stream: u64, code: StopCode, reason: String) {
        self.stop(context, self.local.id.0, stream, code, &reason);
        self.set_state(context, ReplicationState::Blocked, reason);
    }

    fn grant(&mut self, context: &mut Context<'_>, stream: u64, acked: Acked) {
        self.sender = Some(Sender { stream, cursor: acked.received, queued: 0 });
        self.acked = acked;
        self.mismatch = None;
        let head = self.local.history.head;
        self.received_marks.acknowledged(acked.received);
        self.received_marks.appended(context.now, head);
        self.durable_marks.acknowledged(acked.durable);
        self.durable_marks.appended(context.now, head);
        context.send(Message::Stream { group: self.local.id.0, stream, from: acked.received.0 });
        self.set_state(
            context,
            ReplicationState::CatchingUp,
            format!("{} to go", ByteSize(head.bytes_since(acked.received))),
        );
        self.send_progress(context);
        self.pump(context);
        self.note_caught_up(context);
    }

    pub(super) fn on_chain_found(
        &mut self,
        context: &mut Context<'_>,
        ticket: u64,
        chain: Option<Chain>,
    ) {
        if self.lookup.as_ref().is_none_or(|(waiting, _)| *waiting != ticket) {
            return;
        }
        let Some((_, lookup)) = self.lookup.take() else { return };
        match lookup {
            Lookup::Follow { stream, history, acked } => match chain {
                Some(chain) if chain == history.chain => {
                    self.compared = Some(history.head);
                    self.grant(context, stream, acked);
                }
                Some(_) => {
                    let mine = self.local.history.head.bytes_since(history.head);
                    self.refuse_diverged(context, stream, history.head, mine, 0);
                }
                None if history.head < self.local.log_start => {
                    self.refuse_log_gone(context, stream, history.head);
                }
                // No record of this log ends there.
                None => {
                    let mine = self.local.history.head.bytes_since(history.head);
                    self.refuse_diverged(context, stream, history.head, mine, 0);
                }
            },
            Lookup::MayFollow { history } => {
                if chain == Some(history.chain) {
                    context.send(Message::MayFollow {
                        group: self.local.id.0,
                        head: history.head.0,
                        chain: history.chain.0,
                    });
                } else {
                    let relation = Relation::Diverged {
                        common: Lsn::ZERO,
                        mine_bytes: self.local.history.head.0,
                        theirs_bytes: history.head.0,
                    };
                    self.split_brain(context, &relation);
                }
            }
        }
    }

    fn pump(&mut self, context: &mut Context<'_>) {
        let Some(conn) = context.conn else { return };
        let Some(sender) = &mut self.sender else { return };
        let limit = self.acked.received.advance(context.settings.window_bytes);
        let head = self.local.history.head.min(limit).min(self.ending.unwrap_or(Lsn::MAX));
        while sender.queued < FRAMES_QUEUED_MAX && sender.cursor < head {
            let bytes = head.bytes_since(sender.cursor).min(PAYLOAD_BYTES_MAX as u64);
            let to = sender.cursor.advance(bytes);
            context.outputs.push(Output::SendLog {
                conn,
                group: self.local.id,
                stream: sender.stream,
                from: sender.cursor,
                to,
            });
            sender.cursor = to;
            sender.queued += 1;
        }
    }

    pub(super) fn on_sent(&mut self, context: &mut Context<'_>, stream: u64) {
        if let Some(sender) = &mut self.sender
            && sender.stream == stream
        {
            sender.queued = sender.queued.saturating_sub(1);
            self.pump(context);
        }
    }

    pub(super) fn on_read_failed(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        reason: String,
    ) {
        if self.sender.as_ref().is_some_and(|sender| sender.stream == stream) {
            self.sender = None;
            let text = format!("the primary could not read its log: {reason}");
            self.refuse(context, stream, StopCode::Read, text);
        }
    }

    fn send_progress(&mut self, context: &mut Context<'_>) {
        let Some(sender) = &self.sender else { return };
        let lag = self.lags(context.now).0.unwrap_or(Duration::MAX);
        context.send(Message::Progress {
            group: self.local.id.0,
            stream: sender.stream,
            head: self.local.history.head.0,
            chain: self.local.history.chain.0,
            durable: self.local.durable.0.min(self.local.history.head.0),
            requests: self.local.requests,
            lag: u64::try_from(lag.as_nanos()).unwrap_or(u64::MAX),
            echo: context.echo.0,
            held: context.echo.1,
        });
    }

    fn on_ack(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        acked: Acked,
        head: Lsn,
        chain: Chain,
    ) -> Result<(), String> {
        let Some(sender) = &self.sender else { return Ok(()) };
        if sender.stream != stream {
            return Ok(());
        }
        if acked.received > sender.cursor || acked.received < self.acked.received {
            return Err(format!(
                "group {}: acknowledges LSN {}, sent from {} to {}",
                self.local.name, acked.received, self.acked.received, sender.cursor
            ));
        }
        self.acked = acked;
        self.received_marks.acknowledged(acked.received);
        self.durable_marks.acknowledged(acked.durable);
        if head == self.local.history.head {
            if chain == self.local.history.chain {
                self.compared = Some(head);
            } else {
                self.on_mismatch(context, head);
            }
        }
        self.pump(context);
        self.note_caught_up(context);
        self.check_rpo(context);
        if self.ending.is_some_and(|end| acked.received >= end) {
            self.drop_streams();
            self.remote = None;
            self.local.membership = Membership::Stranger;
            self.set_state(context, ReplicationState::Idle, "not replicated with this peer");
        }
        Ok(())
    }

    fn note_caught_up(&mut self, context: &mut Context<'_>) {
        let behind = self.local.history.head.bytes_since(self.acked.received);
        let window = context.settings.window_bytes;
        if self.state == ReplicationState::CatchingUp && behind == 0 {
            self.set_state(context, ReplicationState::Streaming, "");
        } else if self.state == ReplicationState::Streaming && behind > window * 4 {
            self.set_state(
                context,
                ReplicationState::CatchingUp,
                "the log grows faster than it is taken",
            );
        }
        if self.state == ReplicationState::CatchingUp {
            self.reason = format!("{} to go", ByteSize(behind));
        }
    }

    fn check_rpo(&mut self, context: &mut Context<'_>) {
        let Membership::Member { rpo_target: Some(target) } = self.local.membership else {
            self.rpo_alarm = false;
            return;
        };
        if !self.local.primary {
            return;
        }
        let actual = self.durable_marks.lag(context.now);
        let exceeded = actual > target.0;
        if exceeded && !self.rpo_alarm {
            context.outputs.push(Output::Event {
                severity: Severity::Warning,
                code: "rpo-exceeded",
                group: Some(self.local.name.clone()),
                text: format!(
                    "group {}: the copy on {} is {:.1} s old, target {target}",
                    self.local.name,
                    context.peer_name,
                    actual.as_secs_f64()
                ),
            });
        }
        self.rpo_alarm = exceeded;
    }

    fn on_mismatch(&mut self, context: &mut Context<'_>, lsn: Lsn) {
        self.mismatch = Some(lsn);
        self.drop_streams();
        let reason = format!(
            "the two logs differ before LSN {lsn} though their histories agree: one of them is \
             damaged; run `tidelog scrub {}` on both",
            self.local.name
        );
        self.set_state(context, ReplicationState::Blocked, reason);
    }

    // ---- secondary ----

    pub(super) fn on_prepared(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        history: &History,
        durable: Lsn,
        requests: u64,
    ) {
        let Some(follower) = &mut self.follower else { return };
        if follower.stream != stream {
            return;
        }
        follower.asked = Some(history.head);
        context.send(Message::Follow {
            group: self.local.id.0,
            stream,
            history: history.to_wire(),
            durable: durable.0,
            requests,
        });
    }

    fn on_stream(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        from: Lsn,
    ) -> Result<(), String> {
        let Some(follower) = &mut self.follower else { return Ok(()) };
        if follower.stream != stream {
            return Ok(());
        }
        if follower.asked != Some(from) {
            return Err(format!(
                "group {}: was asked for LSN {:?}, and sends from {from}",
                self.local.name, follower.asked
            ));
        }
        follower.asked = None;
        follower.expected = from;
        follower.appended = from;
        self.mismatch = None;
        self.compared = Some(from);
        self.set_state(context, ReplicationState::CatchingUp, "the stream begins");
        Ok(())
    }

    pub(super) fn on_log(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        position: Lsn,
        bytes: Bytes,
    ) -> Result<(), String> {
        let Some(follower) = &mut self.follower else { return Ok(()) };
        if follower.stream != stream || follower.asked.is_some() {
            return Ok(());
        }
        if position != follower.expected {
            return Err(format!(
                "group {}: bytes at LSN {position}, expected at {}",
                self.local.name, follower.expected
            ));
        }
        let end = position.advance(bytes.len() as u64);
        let waiting = end.bytes_since(follower.appended);
        if waiting > context.settings.window_bytes + PAYLOAD_BYTES_MAX as u64 {
            return Err(format!("group {}: more bytes than the window", self.local.name));
        }
        follower.expected = end;
        context.outputs.push(Output::Append { group: self.local.id, stream, position, bytes });
        Ok(())
    }

    pub(super) fn on_appended(&mut self, context: &mut Context<'_>, appended: &Appended) {
        let Some(follower) = &mut self.follower else { return };
        if follower.stream != appended.stream {
            return;
        }
        follower.appended = follower.appended.max(appended.received);
        // What the group itself told meanwhile may be newer.
        if appended.head >= self.local.history.head {
            self.local.history.head = appended.head;
            self.local.history.chain = appended.chain;
            self.local.requests = appended.requests;
        }
        self.local.durable = self.local.durable.max(appended.durable);
        self.send_ack(context);
        self.note_committed(context);
        self.note_following(context);
    }

    pub(super) fn on_append_failed(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        reason: String,
    ) {
        if self.follower.as_ref().is_none_or(|follower| follower.stream != stream) {
            return;
        }
        self.follower = None;
        let text = format!("the secondary could not append: {reason}");
        self.refuse(context, stream, StopCode::Append, text);
    }

    fn send_ack(&mut self, context: &mut Context<'_>) {
        let Some(follower) = &self.follower else { return };
        if follower.asked.is_some() || follower.appended < self.local.history.head {
            return;
        }
        context.send(Message::Ack {
            group: self.local.id.0,
            stream: follower.stream,
            received: follower.appended.0,
            head: self.local.history.head.0,
            chain: self.local.history.chain.0,
            durable: self.local.durable.0.min(self.local.history.head.0),
            requests: self.local.requests,
        });
    }

    fn note_committed(&mut self, context: &mut Context<'_>) {
        if let Some(told) = self.told {
            let lsn = told.durable.min(self.local.history.head);
            context.outputs.push(Output::Committed { group: self.local.id, lsn });
        }
    }

    fn on_progress(&mut self, context: &mut Context<'_>, stream: u64, told: Told, chain: Chain) {
        let Some(follower) = &self.follower else { return };
        if follower.stream != stream || follower.asked.is_some() {
            return;
        }
        self.told = Some(told);
        if told.head == self.local.history.head && follower.appended == told.head {
            if chain == self.local.history.chain {
                self.compared = Some(told.head);
            } else {
                self.on_mismatch(context, told.head);
                return;
            }
        }
        self.note_committed(context);
        self.note_following(context);
    }

    fn note_following(&mut self, context: &mut Context<'_>) {
        let Some(told) = self.told else { return };
        let behind = told.head.bytes_since(self.local.history.head);
        if self.state == ReplicationState::CatchingUp {
            if behind == 0 {
                self.set_state(context, ReplicationState::Streaming, "");
            } else {
                self.reason = format!("{} to go", ByteSize(behind));
            }
        } else if self.state == ReplicationState::Streaming
            && behind > context.settings.window_bytes * 4
        {
            let reason = "the primary's log grows faster than it comes";
            self.set_state(context, ReplicationState::CatchingUp, reason);
        }
    }

    fn on_stop(&mut self, context: &mut Context<'_>, stream: u64, code: StopCode, reason: String) {
        let sending = self.sender.as_ref().is_some_and(|sender| sender.stream == stream);
        let following = self.follower.as_ref().is_some_and(|follower| follower.stream == stream);
        if !sending && !following {
            return;
        }
        self.drop_streams();
        let state = match code {
            StopCode::Paused => ReplicationState::Paused,
            StopCode::NotMember | StopCode::NotPrimary => ReplicationState::Idle,
            StopCode::LogGone
            | StopCode::Ahead
            | StopCode::Diverged
            | StopCode::Append
            | StopCode::Read => ReplicationState::Blocked,
        };
        self.set_state(context, state, reason);
    }

    // ---- a primary that came back ----

    fn on_may_follow(&mut self, context: &mut Context<'_>, head: Lsn, chain: Chain) {
        let unchanged = self.local.history.head == head && self.local.history.chain == chain;
        let peer_is_primary = self.remote.as_ref().is_some_and(|remote| remote.primary);
        if self.recovering() && unchanged && peer_is_primary {
            context.outputs.push(Output::Event {
                severity: Severity::Warning,
                code: "returned-as-secondary",
                group: Some(self.local.name.clone()),
                text: format!(
                    "group {}: {} became primary while this node was away, and has all of this \
                     log: this node follows it",
                    self.local.name, context.peer_name
                ),
            });
            context.outputs.push(Output::Demote { group: self.local.id });
        } else if self.local.primary
            && let Some(remote) = self.remote.clone()
        {
            let relation = compare(&self.local.history, &remote.history);
            self.split_brain(context, &relation);
        }
    }

    pub(super) fn on_demote_failed(&mut self, context: &mut Context<'_>, reason: String) {
        let text = format!("this node could not become secondary: {reason}");
        self.set_state(context, ReplicationState::Blocked, text);
    }
}
