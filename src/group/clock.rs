//! Log time: follows the wall clock where that is believable, and never runs backwards.
//!
//! A wall clock that is set a day ahead for a minute must not make a day of history look old. So
//! log time advances by at most the monotonic clock since the last record, and as much again up to
//! a second: a wall clock that is really ahead is caught up with at double speed, one that is
//! behind is waited for at half speed.

use std::time::Duration;

use crate::units::LogTime;

const SLACK: Duration = Duration::from_secs(1);

/// What log time is.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogClock {
    /// Time of the last record.
    last: LogTime,
    /// The monotonic clock at that record; `None` where it was written by another process.
    at: Option<Duration>,
    /// The wall clock is being caught up with, and that was told.
    jumped: bool,
}

/// The wall clock jumped ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Jump {
    /// Log time before.
    pub before: LogTime,
    /// What the wall clock shows.
    pub wall: LogTime,
}

impl LogClock {
    /// The clock behind a record of time `last` of an earlier process: the wall clock is believed
    /// once, since the time between was not measured.
    pub(super) fn after_restart(last: LogTime) -> LogClock {
        LogClock { last, at: None, jumped: false }
    }

    /// Time of the last record.
    pub(super) fn last(&self) -> LogTime {
        self.last
    }

    /// What a record would carry now.
    pub(super) fn peek(&self, wall: LogTime, monotonic: Duration) -> LogTime {
        let Some(at) = self.at else { return self.last.max(wall) };
        let elapsed = monotonic.saturating_sub(at);
        let slow = self.last.after(elapsed / 2);
        let fast = self.last.after(elapsed + elapsed.min(SLACK));
        wall.clamp(slow, fast)
    }

    /// The time for the next record, and whether the wall clock has just jumped ahead.
    pub(super) fn tick(&mut self, wall: LogTime, monotonic: Duration) -> (LogTime, Option<Jump>) {
        let time = self.peek(wall, monotonic);
        let ahead = self.at.is_some() && wall > time.after(SLACK);
        let jump = (ahead && !self.jumped).then_some(Jump { before: self.last, wall });
        self.jumped = ahead;
        (self.last, self.at) = (time, Some(monotonic));
        (time, jump)
    }

    /// A record of another author arrived.
    pub(super) fn follow(&mut self, time: LogTime, monotonic: Duration) {
        (self.last, self.at) = (self.last.max(time), Some(monotonic));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_wall_clock_a_day_ahead_for_a_minute_moves_log_time_by_at_most_two() {
        let start = LogTime(1_000_000_000_000_000_000);
        let mut clock = LogClock::after_restart(LogTime(0));
        assert_eq!(clock.tick(start, Duration::ZERO), (start, None));
        let mut jumps = 0;
        for second in 1..=60 {
            let passed = Duration::from_secs(second);
            let (_, jump) = clock.tick(start.after(24 * HOUR + passed), passed);
            jumps += usize::from(jump.is_some());
        }
        assert_eq!(jumps, 1, "one jump is told once");
        assert!(clock.last() <= start.after(Duration::from_secs(120)), "{}", clock.last());
        // Back again: log time goes on, slowly, until the wall has caught up.
        let (later, _) = clock.tick(start.after(Duration::from_secs(70)), Duration::from_secs(70));
        assert!(later > start.after(Duration::from_secs(120)));
        let (much_later, _) = clock.tick(start.after(HOUR), HOUR);
        assert_eq!(much_later, start.after(HOUR));
    }

    #[test]
    fn many_records_in_a_moment_do_not_add_a_second_each() {
        let start = LogTime(1_000_000_000_000_000_000);
        let mut clock = LogClock::after_restart(start);
        clock.tick(start, Duration::ZERO);
        for _ in 0..100_000 {
            clock.tick(start.after(24 * HOUR), Duration::from_millis(1));
        }
        assert!(clock.last().since(start) <= Duration::from_millis(2), "{}", clock.last());
    }
}
