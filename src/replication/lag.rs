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

/// When the log had reached where.
#[derive(Debug, Default)]
pub struct Marks {
    marks: VecDeque<Mark>,
    acknowledged: Lsn,
}

impl Marks {
    /// Starts anew: everything up to `lsn` counts as acknowledged, or as appended now.
    pub fn restart(&mut self, acknowledged: Lsn) {
        self.marks.clear();
        self.acknowledged = acknowledged;
    }

    /// The log reaches to `head` now.
    pub fn appended(&mut self, now: Duration, head: Lsn) {
        let reached = self.marks.back().map_or(self.acknowledged, |mark| mark.lsn);
        if head <= reached {
            return;
        }
        if self.marks.len() == MARKS_MAX {
            self.merge();
        }
        self.marks.push_back(Mark { lsn: head, time: now });
    }

    /// The peer has everything up to `lsn`.
    pub fn acknowledged(&mut self, lsn: Lsn) {
        self.acknowledged = self.acknowledged.max(lsn);
        while self.marks.front().is_some_and(|mark| mark.lsn <= lsn) {
            self.marks.pop_front();
        }
    }

    /// The age of the oldest byte that the peer does not have; zero where it has all.
    #[must_use]
    pub fn lag(&self, now: Duration) -> Duration {
        self.marks.front().map_or(Duration::ZERO, |mark| now.saturating_sub(mark.time))
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
        assert_eq!(marks.lag(seconds(25)), seconds(15));
        marks.acknowledged(Lsn(100));
        assert_eq!(marks.lag(seconds(25)), seconds(5));
        marks.acknowledged(Lsn(150));
        assert_eq!(marks.lag(seconds(25)), seconds(5), "a part of it is not all of it");
        marks.acknowledged(Lsn(200));
        assert_eq!(marks.lag(seconds(99)), Duration::ZERO, "an idle log does not age");
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
            marks.acknowledged(Lsn(acknowledged * 8));
            // The oldest byte that is missing was appended at second `acknowledged`.
            assert!(marks.lag(seconds(count)) >= seconds(count - acknowledged));
        }
    }
}
