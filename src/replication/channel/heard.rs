//! What is known of how far the two sides are: on a primary how old the copy is, on a copy how far
//! the peer had come when it was last heard, in this life of the process or an earlier one.

use super::*;
use crate::replication::epoch::compare;
use crate::units::NodeId;

/// The stream of a [`Message::Progress`] that belongs to none: it tells a copy that does not
/// follow how far its primary is. Streams are numbered from 1.
pub(super) const NO_STREAM: u64 = 0;

/// When something was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// In this life of the process, by its monotonic clock.
    Now(Duration),
    /// Before it, by the wall clock.
    Before(LogTime),
}

impl Moment {
    /// By the wall clock, which shows `wall` at `now`.
    #[must_use]
    pub fn wall(self, now: Duration, wall: LogTime) -> LogTime {
        match self {
            Moment::Now(moment) => wall.before(now.saturating_sub(moment)),
            Moment::Before(moment) => moment,
        }
    }
}

/// A peer's log, as far as it was heard of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    /// Its reigns, and how far it went at least. The chain may be that of an earlier head.
    pub history: History,
    /// Requests up to the head at least, where it told.
    pub requests: Option<u64>,
    /// When it had come so far.
    pub at: Moment,
}

/// What this copy lacks of the peer's log, as far as that was heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Bytes of log behind this node's head.
    pub bytes: u64,
    /// Bytes of log that are not durable here.
    pub undurable_bytes: u64,
    /// Requests in them, where the peer told.
    pub requests: Option<u64>,
    /// When the peer had come so far; none where it says so on this link, as another copy.
    pub at: Option<Moment>,
}

impl Channel {
    /// The age of the oldest byte that the peer has not received, and has not made durable. Unknown
    /// while it lacks bytes that were here before this node was primary, or was started.
    #[must_use]
    pub fn lags(&self, now: Duration) -> (Option<Duration>, Option<Duration>) {
        (self.received_marks.lag(now), self.durable_marks.lag(now))
    }

    /// The same, at least.
    #[must_use]
    pub fn lags_at_least(&self, now: Duration) -> (Duration, Duration) {
        (self.received_marks.lag_at_least(now), self.durable_marks.lag_at_least(now))
    }

    /// The peer's log when it was last heard.
    #[must_use]
    pub fn heard(&self) -> Option<&Heard> {
        self.heard.as_ref()
    }

    /// What this copy lacks of the peer's log: exactly where the peer says it on this link
    /// ([`Channel::remote`]), else at least. Unknown where the peer has not said what it has, or
    /// its log is not the continuation of this one any more.
    #[must_use]
    pub fn gap(&self) -> Option<Gap> {
        let beside = self.remote.as_ref().filter(|remote| !remote.primary);
        let (theirs, requests, at) = match (beside, &self.heard) {
            (Some(remote), _) => (&remote.history, None, None),
            (None, Some(heard)) => (&heard.history, heard.requests, Some(heard.at)),
            (None, None) => return None,
        };
        let mine = &self.local.history;
        let bytes = match compare(mine, theirs) {
            Relation::Same | Relation::TheirsIsPrefix => 0,
            Relation::MineIsPrefix => theirs.head.bytes_since(mine.head),
            Relation::Diverged { .. } => return None,
        };
        let undurable_bytes = bytes + mine.head.bytes_since(self.local.durable);
        let requests = requests.map(|theirs| theirs.saturating_sub(self.local.requests));
        let requests = if bytes == 0 { Some(0) } else { requests };
        Some(Gap { bytes, undurable_bytes, requests, at })
    }

    /// Whether replication to this copy was stopped by command, so that its primary sends nothing.
    #[must_use]
    pub fn was_stopped(&self) -> bool {
        self.local.membership == Membership::Stopped || self.local.retired
    }

    /// What was heard before this life of the process; what is heard in it counts more. While a
    /// stream ran well nothing was kept, so where that is all here the newest record, if it is of
    /// the peer's reign, may be the later word of it.
    pub(in crate::replication) fn recall(
        &mut self,
        peer: NodeId,
        newest: LogTime,
        mut heard: Heard,
    ) {
        if self.heard.is_some() {
            return;
        }
        let mine = &self.local.history;
        let all_here =
            matches!(compare(mine, &heard.history), Relation::Same | Relation::TheirsIsPrefix);
        let of_peer = mine.last().is_some_and(|reign| reign.author == peer);
        if let Moment::Before(at) = &mut heard.at
            && all_here
            && of_peer
        {
            *at = newest.max(*at);
        }
        self.heard = Some(heard);
    }

    /// The peer says what its log is.
    pub(super) fn hears(&mut self, now: Duration, history: &History) {
        let at = Moment::Now(now);
        self.heard = Some(Heard { history: history.clone(), requests: None, at });
    }

    /// It says how far it is now, with the reigns that it has announced.
    pub(super) fn hears_head(&mut self, now: Duration, head: Lsn, requests: Option<u64>) {
        let Some(remote) = self.remote.as_ref().filter(|remote| remote.primary) else { return };
        let history = History { head, ..remote.history.clone() };
        self.heard = Some(Heard { history, requests, at: Moment::Now(now) });
    }

    /// It has sent its log up to here.
    pub(super) fn hears_bytes(&mut self, now: Duration, end: Lsn) {
        if let Some(heard) = &mut self.heard
            && heard.history.head < end
        {
            heard.history.head = end;
            heard.at = Moment::Now(now);
        }
    }

    /// Whether this primary has a copy at the other end that no stream tells how far it is behind.
    pub(super) fn tells_of_its_head(&self) -> bool {
        let copy = self.remote.as_ref().is_some_and(|remote| !remote.primary);
        copy && self.local.primary && !self.local.recovering && self.active()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::log::control::Mode;
    use crate::replication::epoch::Reign;
    use crate::units::{EpochId, Incarnation};

    const NOW: Duration = Duration::from_secs(100);

    pub(in super::super) fn history(reigns: &[(u64, u64)], head: u64) -> History {
        let reigns = reigns.iter().zip(1..).map(|((id, first_lsn), counter)| Reign {
            id: EpochId(*id),
            counter,
            first_lsn: Lsn(*first_lsn),
            author: NodeId::default(),
        });
        History { reigns: reigns.collect::<Vec<_>>().into(), head: Lsn(head), chain: Chain(0) }
    }

    pub(in super::super) fn copy(history: History) -> Channel {
        let local = LocalGroup {
            authored: false,
            given_up: BTreeSet::new(),
            id: GroupId([7; 16]),
            name: "g".parse().unwrap(),
            primary: false,
            recovering: false,
            incarnation: Incarnation(1),
            durable: Lsn(history.head.0 - 100),
            history,
            requests: 3,
            log_start: Lsn::ZERO,
            cuts: 0,
            failed: false,
            retired: false,
            membership: Membership::Stranger,
            follows: None,
        };
        let mut channel = Channel::new(NOW, &local);
        channel.local.membership = Membership::Member { rpo_target: None, mode: Mode::Async };
        channel
    }

    /// The newest record here was written by the peer, after what was kept.
    fn recall(channel: &mut Channel, history: History) {
        let heard = Heard { history, requests: Some(5), at: Moment::Before(LogTime(9)) };
        channel.recall(NodeId::default(), LogTime(70), heard);
    }

    #[test]
    fn a_copy_that_has_heard_nothing_does_not_know_what_it_lacks() {
        assert_eq!(copy(history(&[(1, 0)], 1000)).gap(), None);
    }

    #[test]
    fn what_was_heard_in_an_earlier_life_says_what_is_lacking_until_it_is_there() {
        let mut channel = copy(history(&[(1, 0)], 1000));
        recall(&mut channel, history(&[(1, 0)], 1600));
        let at = Some(Moment::Before(LogTime(9)));
        let lacks = Gap { bytes: 600, undurable_bytes: 700, requests: Some(2), at };
        assert_eq!(channel.gap(), Some(lacks));
        channel.local.history.head = Lsn(1600);
        assert_eq!(channel.gap().map(|gap| (gap.bytes, gap.requests)), Some((0, Some(0))));
        channel.local.history.head = Lsn(2000);
        assert_eq!(channel.gap().map(|gap| (gap.bytes, gap.requests)), Some((0, Some(0))));
    }

    #[test]
    fn a_copy_that_streamed_after_what_was_kept_dates_its_primary_by_its_newest_record() {
        let at = |head, author: u8, kept: u64, newest: u64| {
            let mut channel = copy(history(&[(1, 0)], 1000));
            let heard = Heard {
                history: history(&[(1, 0)], head),
                requests: None,
                at: Moment::Before(LogTime(kept)),
            };
            channel.recall(NodeId([author; 16]), LogTime(newest), heard);
            channel.heard().unwrap().at
        };
        assert_eq!(at(400, 0, 9, 70), Moment::Before(LogTime(70)));
        assert_eq!(at(1000, 0, 9, 70), Moment::Before(LogTime(70)));
        assert_eq!(at(400, 0, 90, 70), Moment::Before(LogTime(90)), "it was idle since");
        assert_eq!(at(1600, 0, 9, 70), Moment::Before(LogTime(9)), "it had so much then");
        assert_eq!(at(400, 1, 9, 70), Moment::Before(LogTime(9)), "another node wrote it");
    }

    #[test]
    fn a_reign_of_the_primary_that_the_copy_has_not_received_yet_is_lacking_too() {
        let mut channel = copy(history(&[(1, 0)], 1000));
        recall(&mut channel, history(&[(1, 0), (2, 1000)], 1600));
        assert_eq!(channel.gap().map(|gap| gap.bytes), Some(600));
    }

    #[test]
    fn what_was_heard_of_another_history_says_nothing() {
        // This node went on without the rest; so did another that it follows.
        let mut channel = copy(history(&[(1, 0), (2, 1000)], 1200));
        recall(&mut channel, history(&[(1, 0)], 1600));
        assert_eq!(channel.gap(), None);
    }

    #[test]
    fn what_is_heard_now_counts_more_than_what_was_heard_before() {
        let mut channel = copy(history(&[(1, 0)], 1000));
        channel.hears(NOW, &history(&[(1, 0), (2, 800)], 1100));
        recall(&mut channel, history(&[(1, 0)], 1600));
        assert_eq!(channel.gap(), None, "its log has parted from this one");
        channel.hears(NOW, &history(&[(1, 0)], 1100));
        assert_eq!(channel.gap().map(|gap| gap.bytes), Some(100));
        // Bytes that come and are refused here are heard of too.
        channel.hears_bytes(NOW, Lsn(1300));
        channel.hears_bytes(NOW, Lsn(1200));
        let gap = channel.gap().unwrap();
        assert_eq!((gap.bytes, gap.at), (300, Some(Moment::Now(NOW))));
    }
}
