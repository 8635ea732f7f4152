//! Log time: follows the wall clock where that is believable, and never runs backwards.
//!
//! A wall clock that is set a day ahead for a minute must not make a day of history look old. So
//! log time advances by at most the monotonic clock since the last record, and as much again up to
//! a second: a wall clock that is really ahead is caught up with at double speed, one that is
//! behind is waited for at half speed.
//!
//! Across a restart within one boot of the machine the boot's clock has measured the time between,
//! by what an earlier process noted ([`Noted`]). Across a boot nothing has, nor on a copy, which
//! may have received a record long after it was written: there the wall clock is believed with the
//! first record, a `clock` record before it says how far, and windows do not count that
//! ([`window_start`]).

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Map;

use super::engine::{Group, Report};
use super::files;
use crate::events::Severity;
use crate::io::{Clock, Disk};
use crate::log::control::{ClockRecord, EpochRecord};
use crate::units::{EpochId, LogTime, NodeId};

const SLACK: Duration = Duration::from_secs(1);
const FILE: &str = "clock";

/// What log time is.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogClock {
    /// Time of the last record.
    last: LogTime,
    /// The monotonic clock at that record; at the start, where an earlier process wrote it.
    at: Duration,
    /// What lies between that record and `at`.
    between: Between,
    /// The wall clock is being caught up with, and that was told.
    jumped: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Between {
    /// Nothing.
    Nothing,
    /// A time that was measured: up to here log time may have come.
    Measured(LogTime),
    /// Nobody knows how much.
    Unknown,
}

/// Log time beside the boot's clock, in a file: what the next process measures with.
#[derive(Debug, Serialize, Deserialize)]
struct Noted {
    boot: u64,
    since_boot_nanoseconds: u64,
    time: LogTime,
    /// The newest reign then: the time is that of its history alone.
    epoch: EpochId,
}

/// The wall clock is ahead of what was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Jump {
    /// Log time before.
    pub before: LogTime,
    /// What the wall clock shows.
    pub wall: LogTime,
    /// Log time follows at once: nothing was measured.
    pub believed: bool,
}

impl LogClock {
    /// The clock behind a record of time `last` of an earlier process, of which `up_to` says how
    /// far log time may have come since, where that was measured.
    pub(super) fn after_restart(
        last: LogTime,
        up_to: Option<LogTime>,
        monotonic: Duration,
    ) -> LogClock {
        let between = up_to.map_or(Between::Unknown, |up_to| Between::Measured(up_to.max(last)));
        LogClock { last, at: monotonic, between, jumped: false }
    }

    /// Time of the last record.
    pub(super) fn last(&self) -> LogTime {
        self.last
    }

    /// What time it is for windows: never more than what was measured.
    pub(super) fn peek(&self, wall: LogTime, monotonic: Duration) -> LogTime {
        let elapsed = monotonic.saturating_sub(self.at);
        let slow = self.last.after(elapsed / 2);
        let fast = match self.between {
            Between::Nothing | Between::Unknown => self.last.after(elapsed + elapsed.min(SLACK)),
            // The boot's clock is told in hundredths of a second.
            Between::Measured(up_to) => up_to.after(elapsed + SLACK),
        };
        wall.clamp(slow, fast)
    }

    /// The time for the next record, and whether the wall clock is ahead of what was measured.
    pub(super) fn tick(&mut self, wall: LogTime, monotonic: Duration) -> (LogTime, Option<Jump>) {
        let measured = self.peek(wall, monotonic);
        let ahead = wall > measured.after(SLACK);
        let believed = self.between == Between::Unknown;
        let time = if believed { measured.max(wall) } else { measured };
        // The first record of all has nothing before it.
        let told = ahead && !self.jumped && self.last != LogTime(0);
        let before = if believed { measured } else { self.last };
        let jump = told.then_some(Jump { before, wall, believed });
        self.jumped = ahead && !believed;
        (self.last, self.at, self.between) = (time, monotonic, Between::Nothing);
        (time, jump)
    }

    /// The time for the record that begins an epoch. A jump waits for the next record, since
    /// nothing of an epoch comes before this one.
    pub(super) fn tick_epoch(&mut self, wall: LogTime, monotonic: Duration) -> LogTime {
        if self.last == LogTime(0) {
            return self.tick(wall, monotonic).0;
        }
        (self.last, self.at) = (self.peek(wall, monotonic), monotonic);
        if self.between != Between::Unknown {
            self.between = Between::Nothing;
        }
        self.last
    }

    /// The log ends with an earlier record now. What came behind it had been measured, but for
    /// what the records there say that nobody had.
    pub(super) fn cut(&mut self, time: LogTime, unmeasured: Duration) {
        let up_to = match self.between {
            Between::Nothing => Some(self.last),
            Between::Measured(up_to) => Some(up_to),
            Between::Unknown => None,
        };
        if let Some(up_to) = up_to {
            self.between = Between::Measured(up_to.before(unmeasured).max(time));
        }
        self.last = self.last.min(time);
    }

    /// A record of another author arrived, who knows when after it was written: whoever goes on
    /// after it believes the wall clock.
    pub(super) fn follow(&mut self, time: LogTime, monotonic: Duration) {
        (self.last, self.at) = (self.last.max(time), monotonic);
        self.between = Between::Unknown;
    }
}

/// How far log time may have come, by what an earlier process of the same boot noted: of a history
/// that this node, `me`, wrote from then on. Another node's clock was not measured here, and what
/// this one wrote by a wrong wall clock may have made way for that.
pub(super) fn measured(
    disk: &dyn Disk,
    dir: &Path,
    clock: &dyn Clock,
    me: NodeId,
    reigns: &[EpochRecord],
) -> Option<LogTime> {
    let noted = files::load(disk, &dir.join(FILE)).ok()?;
    let noted: Noted = serde_json::from_slice(&noted).ok()?;
    let then = reigns.iter().position(|reign| reign.id == noted.epoch)?;
    if reigns[then..].iter().any(|reign| reign.author != me) {
        return None;
    }
    let then = Duration::from_nanos(noted.since_boot_nanoseconds);
    let passed = clock.since_boot()?.checked_sub(then)?;
    (clock.boot()? == noted.boot).then(|| noted.time.after(passed))
}

impl Group {
    /// Notes log time beside the boot's clock for the next process; whether it is noted. Without a
    /// record since a boot there is nothing to note yet.
    pub(super) fn note_clock(&self) -> bool {
        let clock = &self.context.env.clock;
        let (Some(boot), Some(since)) = (clock.boot(), clock.since_boot()) else { return true };
        let (time, epoch) = {
            let core = self.lock();
            if core.clock.between == Between::Unknown {
                return false;
            }
            (core.clock.peek(clock.wall(), clock.monotonic()), core.epoch)
        };
        let since_boot_nanoseconds = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        let noted = Noted { boot, since_boot_nanoseconds, time, epoch };
        let text = serde_json::to_vec(&noted).expect("plain data becomes JSON");
        let stored = files::store(&*self.context.env.disk, &self.dir.join(FILE), &text);
        if let Err(cause) = &stored {
            tracing::warn!("group {}: note of the clock: {cause}", self.name());
        }
        stored.is_ok()
    }
}

impl Jump {
    /// What is appended of it.
    pub(super) fn record(&self) -> ClockRecord {
        ClockRecord { before: self.before, wall: self.wall, other: Map::new() }
    }

    /// What is told of it.
    pub(super) fn report(&self) -> Report {
        let (severity, code, text) = if self.believed {
            (
                Severity::Info,
                "clock-unmeasured",
                "the machine was started, or another node wrote the last record, so no clock here \
                 has measured the time since: the wall clock is believed, and windows do not count \
                 that time",
            )
        } else {
            (
                Severity::Warning,
                "clock-jump",
                "the wall clock jumped ahead: log time follows slowly, and windows do not count it",
            )
        };
        let details = serde_json::to_value(self.record()).expect("plain data becomes JSON");
        Report { severity, code, text: text.to_owned(), details }
    }
}

/// Where a window begins that ends at `now`, with what of log time was not measured left out: spans
/// in order, each from and to.
pub(super) fn window_start(
    now: LogTime,
    window: Duration,
    unmeasured: &[(LogTime, LogTime)],
) -> LogTime {
    let (mut end, mut left) = (now, window);
    for (from, to) in unmeasured.iter().rev().filter(|(_, to)| *to <= now) {
        let measured = end.since(*to);
        if measured >= left {
            break;
        }
        left -= measured;
        end = end.min(*from);
    }
    end.before(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_copy_that_received_its_records_late_is_not_behind_once_it_goes_on() {
        let start = LogTime(1_000_000_000_000_000_000);
        let mut clock = LogClock::after_restart(LogTime(0), None, Duration::ZERO);
        clock.follow(start, HOUR);
        let (wall, now) = (start.after(HOUR + SLACK * 3), HOUR + SLACK * 3);
        assert!(clock.tick_epoch(wall, now) < wall, "nothing comes before the record of a reign");
        let (time, jump) = clock.tick(wall, now);
        assert_eq!(time, wall);
        assert!(jump.expect("told").believed);
        // Where they came as they were written nothing is to be told.
        clock.follow(time, now);
        let (time, jump) = clock.tick(wall.after(SLACK), now + SLACK);
        assert_eq!((time, jump), (wall.after(SLACK), None));
    }

    #[test]
    fn a_wall_clock_a_day_ahead_for_a_minute_moves_log_time_by_at_most_two() {
        let start = LogTime(1_000_000_000_000_000_000);
        let mut clock = LogClock::after_restart(LogTime(0), None, Duration::ZERO);
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
        let mut clock = LogClock::after_restart(start, None, Duration::ZERO);
        clock.tick(start, Duration::ZERO);
        for _ in 0..100_000 {
            clock.tick(start.after(24 * HOUR), Duration::from_millis(1));
        }
        assert!(clock.last().since(start) <= Duration::from_millis(2), "{}", clock.last());
    }

    #[test]
    fn what_the_boot_measured_between_two_processes_is_all_that_is_believed() {
        let start = LogTime(1_000_000_000_000_000_000);
        let now = Duration::from_secs(7);
        let restarted = LogClock::after_restart(start, Some(start.after(2 * HOUR)), now);
        let mut honest = restarted;
        let later = start.after(2 * HOUR);
        assert_eq!(honest.tick(later, now), (later, None));
        let mut ahead = restarted;
        assert!(ahead.peek(start.after(24 * HOUR), now) <= later.after(SLACK));
        let (time, jump) = ahead.tick(start.after(24 * HOUR), now);
        assert!(time <= later.after(SLACK), "{time}");
        assert!(jump.is_some_and(|jump| !jump.believed));
    }

    #[test]
    fn what_nobody_measured_is_believed_with_the_first_record_and_told() {
        let start = LogTime(1_000_000_000_000_000_000);
        let now = Duration::from_secs(7);
        let mut clock = LogClock::after_restart(start, None, now);
        let later = now + Duration::from_secs(10);
        let wall = start.after(24 * HOUR);
        let windows = clock.peek(wall, later);
        assert!(windows <= start.after(Duration::from_secs(11)), "not for windows: {windows}");
        let (time, jump) = clock.tick(wall, later);
        assert_eq!(time, wall);
        assert_eq!(jump, Some(Jump { before: windows, wall, believed: true }));
        assert_eq!(clock.tick(wall.after(SLACK), later + SLACK).1, None, "told once");
        // A clock that is behind costs nothing.
        let mut clock = LogClock::after_restart(start, None, now);
        assert_eq!(clock.tick(start.before(HOUR), later).1, None);
    }

    #[test]
    fn windows_leave_out_what_was_not_measured() {
        let at = |hours: u32| LogTime(1_000_000_000_000_000_000).after(hours * HOUR);
        let window = 5 * HOUR;
        assert_eq!(window_start(at(100), window, &[]), at(95));
        assert_eq!(window_start(at(100), window, &[(at(10), at(90))]), at(95), "it lies before");
        assert_eq!(window_start(at(100), window, &[(at(10), at(98))]), at(7));
        assert_eq!(window_start(at(100), window, &[(at(10), at(100))]), at(5));
        let twice = [(at(10), at(50)), (at(52), at(98))];
        assert_eq!(window_start(at(100), window, &twice), at(9));
        assert_eq!(window_start(at(100), window, &[(at(10), at(101))]), at(95), "not yet");
    }
}
