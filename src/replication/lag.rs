//! How far a peer is behind, in time: a bounded list of when the log had reached where, on this
//! node's monotonic clock.
//!
//! The answer is never better than the truth: where marks had to be merged, the merged one keeps
//! the later position and the earlier time.

use std::collections::VecDeque;
use std::time::Duration;

use crate::units::Lsn;

/// Marks that are kept at most.
pub const MARKS_MAX: usize = 512;

/// Bytes up to `lsn` were in the log; the first of them since the mark before, from `time` on.
#[derive(Clone, Copy, Debug)]
struct Mark {
    lsn: Lsn,
    time: Duration,
}

/// When the log had reached where, and how much of it the peer has.
#[derive(Debug, Default)]
pub struct Marks {
    marks: VecDeque<Mark>,
    acknowledged: Lsn,
    /// Bytes below were appended before this node could tell when.
    timed_from: Lsn,
}

impl Marks {
    /// Starts anew: nobody has anything, and from `head` on it is known when bytes are appended.
    pub fn restart(&mut self, head: Lsn) {
        *self = Marks { timed_from: head, ..Marks::default() };
    }

    /// The log reaches to `head` now.
    pub fn appended(&mut self, now: Duration, head: Lsn) {
        let reached = self.marks.back().map_or(self.acknowledged, |mark| mark.lsn);
        if head <= reached {
            return;
        }
        self.make_room();
        self.marks.push_back(Mark { lsn: head, time: now });
    }

    /// The peer has everything up to `lsn`, which is less than it had where its disk was rolled
    /// back. When those bytes were appended is forgotten: the lag is unknown until it has them
    /// again, and grows meanwhile.
    pub fn acknowledged(&mut self, now: Duration, lsn: Lsn) {
        if lsn < self.acknowledged {
            let time = self.marks.front().map_or(now, |mark| mark.time);
            self.make_room();
            self.marks.push_front(Mark { lsn: self.acknowledged, time });
            self.timed_from = self.timed_from.max(self.acknowledged);
        }
        self.acknowledged = lsn;
        while self.marks.front().is_some_and(|mark| mark.lsn <= lsn) {
            self.marks.pop_front();
        }
    }

    /// The age of the oldest byte that the peer does not have; zero where it has all. Unknown while
    /// it lacks bytes of which nobody knows when they were appended.
    #[must_use]
    pub fn lag(&self, now: Duration) -> Option<Duration> {
        (self.acknowledged >= self.timed_from).then(|| self.lag_at_least(now))
    }

    /// The same, at least.
    #[must_use]
    pub fn lag_at_least(&self, now: Duration) -> Duration {
        self.marks.front().map_or(Duration::ZERO, |mark| now.saturating_sub(mark.time))
    }

    fn make_room(&mut self) {
        if self.marks.len() >= MARKS_MAX {
            self.merge();
        }
    }

    /// Makes every two neighbours one.
    fn merge(&mut self) {
        let mut merged = VecDeque::with_capacity(MARKS_MAX);
        let mut marks = self.marks.iter();
        while let Some(first) = marks.next() {
            let last = marks.next().unwrap_or(first);
            merged.push_back(Mark { lsn: last.lsn, time: first.time });
        }
        self.marks = merged;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn lag_is_the_age_of_the_oldest_byte_without_an_ack() {
        let mut marks = Marks::default();
        marks.appended(seconds(10), Lsn(100));
        marks.appended(seconds(20), Lsn(200));
        assert_eq!(marks.lag(seconds(25)), Some(seconds(15)));
        marks.acknowledged(seconds(25), Lsn(100));
        assert_eq!(marks.lag(seconds(25)), Some(seconds(5)));
        marks.acknowledged(seconds(25), Lsn(150));
        assert_eq!(marks.lag(seconds(25)), Some(seconds(5)), "a part of it is not all of it");
        marks.acknowledged(seconds(25), Lsn(200));
        assert_eq!(marks.lag(seconds(99)), Some(Duration::ZERO), "an idle log does not age");
    }

    #[test]
    fn what_a_peer_had_and_lost_has_no_known_age() {
        let mut marks = Marks::default();
        marks.appended(seconds(10), Lsn(100));
        marks.acknowledged(seconds(11), Lsn(100));
        marks.appended(seconds(20), Lsn(200));
        marks.acknowledged(seconds(30), Lsn(40));
        assert_eq!(marks.lag(seconds(31)), None);
        assert_eq!(marks.lag_at_least(seconds(31)), seconds(11));
        marks.acknowledged(seconds(32), Lsn(99));
        assert_eq!(marks.lag(seconds(32)), None);
        marks.acknowledged(seconds(33), Lsn(100));
        assert_eq!(marks.lag(seconds(33)), Some(seconds(13)), "known again");
    }

    #[test]
    fn bytes_from_before_have_no_known_age() {
        let mut marks = Marks::default();
        marks.restart(Lsn(100));
        marks.appended(seconds(10), Lsn(100));
        assert_eq!(marks.lag(seconds(11)), None);
        marks.acknowledged(seconds(12), Lsn(100));
        assert_eq!(marks.lag(seconds(13)), Some(Duration::ZERO));
    }

    #[test]
    fn merged_marks_are_never_better_than_the_truth() {
        let mut marks = Marks::default();
        let count = MARKS_MAX as u64 * 5;
        for second in 0..count {
            marks.appended(seconds(second), Lsn((second + 1) * 8));
        }
        assert!(marks.marks.len() <= MARKS_MAX);
        for acknowledged in (0..count).step_by(7) {
            marks.acknowledged(seconds(count), Lsn(acknowledged * 8));
            // The oldest byte that is missing was appended at second `acknowledged`.
            assert!(marks.lag_at_least(seconds(count)) >= seconds(count - acknowledged));
        }
    }
}
