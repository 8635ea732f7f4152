//! What is tried again by itself, with a wait that grows, while what was wrong stays on show: a
//! stream that ended by an error of a disk, such as one that is full, and a peer that refused where
//! there are several that may be followed.

use super::*;
use crate::replication::core::doubling;

/// First wait before the secondary asks again.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest wait.
const RETRY_LONGEST: Duration = Duration::from_secs(60);

/// Streams that ended by such an error since the secondary last had everything.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trouble {
    count: u32,
    /// What the secondary had at the last one.
    had: Lsn,
    /// Of a secondary that waits: when it asks again.
    retry_at: Option<Duration>,
}

/// Asks that this peer refused since it last granted a stream, where another one refused too.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Refused {
    count: u32,
    /// When it is asked again, unless another one is followed by then.
    asks_again_at: Option<Duration>,
}

/// The wait after `count` failures in a row.
fn wait_after(count: u32) -> Duration {
    doubling(RETRY_FIRST, RETRY_LONGEST, count)
}

impl Channel {
    /// This peer refused, and so did another one meanwhile, or what was followed is not any more:
    /// things may have changed here by now.
    pub(super) fn ask_later(&mut self, now: Duration) {
        if self.local.follows.is_none() && self.refused.asks_again_at.is_none() {
            self.refused.count = self.refused.count.saturating_add(1);
            self.refused.asks_again_at = Some(now + wait_after(self.refused.count));
        }
    }

    /// A primary that takes back what it lost asks as a secondary does.
    fn asks(&self) -> bool {
        !self.local.primary || self.local.recovering
    }

    /// What the one who asks has, as far as this node knows.
    fn follower_has(&self) -> Lsn {
        if self.asks() { self.local.history.head } else { self.acked.received }
    }

    /// A stream ended with this code: a disk error is tried again, anything else is another matter.
    pub(super) fn note_stop(&mut self, now: Duration, code: StopCode) {
        if !matches!(code, StopCode::Append | StopCode::Read | StopCode::CannotKeepUp) {
            self.end_trouble();
            return;
        }
        let count = self.trouble.map_or(1, |trouble| trouble.count.saturating_add(1));
        let retry_at = self.asks().then_some(now + wait_after(count));
        self.trouble = Some(Trouble { count, had: self.follower_has(), retry_at });
    }

    /// Whether people know of it already.
    pub(super) fn told_of_trouble(&self) -> bool {
        self.trouble.is_some_and(|trouble| trouble.count > 1)
    }

    /// A stream begins. It looks well only when bytes go through.
    pub(super) fn stream_begins(&mut self, context: &mut Context<'_>, reason: String) {
        if self.trouble.is_none() || self.state != ReplicationState::Blocked {
            self.set_state(context, ReplicationState::CatchingUp, reason);
        }
    }

    /// The secondary lacks `behind` bytes, and its stream runs.
    pub(super) fn note_going(&mut self, context: &mut Context<'_>, behind: u64) {
        let Some(trouble) = self.trouble else { return };
        let goes = behind == 0 || self.follower_has() > trouble.had;
        if goes && self.state == ReplicationState::Blocked {
            self.set_state(context, ReplicationState::CatchingUp, "the stream goes on");
        }
        if behind == 0 {
            self.trouble = None;
        }
    }

    fn end_trouble(&mut self) {
        if self.trouble.take().is_some() && self.state == ReplicationState::Blocked {
            // What comes now is news.
            self.state = ReplicationState::Idle;
        }
    }

    /// When [`Channel::on_tick`] is due.
    pub(in crate::replication) fn next_wake(&self, lost_after: Duration) -> Option<Duration> {
        let retry = self.trouble.and_then(|trouble| trouble.retry_at);
        let again = self.refused.asks_again_at;
        retry.into_iter().chain(again).chain(self.standing_wake(lost_after)).min()
    }

    pub(in crate::replication) fn on_tick(&mut self, context: &mut Context<'_>) {
        if let Some(trouble) = &mut self.trouble
            && trouble.retry_at.is_some_and(|retry_at| retry_at <= context.now)
        {
            trouble.retry_at = None;
            if self.follower.is_none() {
                self.evaluate(context);
            }
        }
        if self.refused.asks_again_at.is_some_and(|again_at| again_at <= context.now) {
            self.refused.asks_again_at = None;
            if self.follower.is_none() && self.local.follows.is_none() {
                self.evaluate(context);
            }
        }
    }
}
