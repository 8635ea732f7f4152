//! Slots: the due times of a job, as pure functions of its schedule and the time.
//!
//! A schedule is read in the job's zone, a slot is an instant in UTC. A local time that occurs
//! twice gives one slot, its first; one that does not occur gives the instant at which the gap
//! ends, where several of them are one slot.

use std::time::Duration;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone};

use super::job::JobError;
use crate::units::LogTime;

/// Longer than any zone was ever set forward or back, a skipped day included.
const SHIFT_MAX: Duration = Duration::from_secs(26 * 3600);
/// The unit of schedules.
const MINUTE: Duration = Duration::from_secs(60);
/// A slot is opened for this long at least: whoever looks for what is due does so each second, and
/// a job may want no waiting at all.
const OPEN_FOR: Duration = Duration::from_secs(10);
/// Slots that went by unseen and are told one by one.
const MISSED_MAX: usize = 32;

/// When a job is due.
#[derive(Clone, Debug)]
pub struct Schedule {
    cron: Cron,
    zone: TimeZone,
}

/// What a job owes at a moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// The slot to decide, if one is open.
    pub open: Option<LogTime>,
    /// Slots that went by, oldest first, the newest few of them.
    pub missed: Vec<LogTime>,
    /// The next slot to come.
    pub next: Option<LogTime>,
}

impl Schedule {
    /// Reads a pattern of five fields, and a zone's name; UTC where none is given.
    ///
    /// # Errors
    ///
    /// Names what cannot be read.
    pub fn parse(pattern: &str, zone: Option<&str>) -> Result<Schedule, JobError> {
        let cron = CronParser::builder()
            .seconds(Seconds::Disallowed)
            .year(Year::Disallowed)
            .build()
            .parse(pattern)
            .map_err(|error| JobError(format!("schedule: got `{pattern}`: {error}")))?;
        let zone = match zone {
            None => TimeZone::UTC,
            Some(name) => TimeZone::get(name).map_err(|_| {
                JobError(format!("zone: got `{name}`, expected a name such as Europe/Berlin"))
            })?,
        };
        Ok(Schedule { cron, zone })
    }

    /// The newest slot at or before `now`.
    #[must_use]
    pub fn newest(&self, now: LogTime) -> Option<LogTime> {
        let mut civil = self.civil(now.after(self.shift_around(now)));
        let mut inclusive = true;
        loop {
            civil = self.cron.find_previous_occurrence(&civil, inclusive).ok()?;
            inclusive = false;
            let slot = self.instant(civil)?;
            if slot <= now {
                return Some(slot);
            }
        }
    }

    /// The first slot after `after`.
    #[must_use]
    pub fn next(&self, after: LogTime) -> Option<LogTime> {
        let mut civil = self.civil(after.before(self.shift_around(after)));
        let mut inclusive = true;
        loop {
            civil = self.cron.find_next_occurrence(&civil, inclusive).ok()?;
            inclusive = false;
            let slot = self.instant(civil)?;
            if slot > after {
                return Some(slot);
            }
        }
    }

    /// What is owed at `now` by a job that exists since `since`, whose slots up to `handled` were
    /// dealt with.
    #[must_use]
    pub fn due(
        &self,
        since: LogTime,
        handled: Option<LogTime>,
        now: LogTime,
        deadline: Duration,
    ) -> Due {
        let from = handled.map_or(since, |handled| handled.max(since));
        let mut due = Due { next: self.next(now.max(from)), ..Due::default() };
        let open_for = deadline.max(OPEN_FOR);
        let mut newest = self.newest(now);
        while let Some(slot) = newest.filter(|slot| *slot > from) {
            if due.missed.len() == MISSED_MAX {
                break;
            }
            if due.open.is_none() && due.missed.is_empty() && now <= slot.after(open_for) {
                due.open = Some(slot);
            } else {
                due.missed.push(slot);
            }
            newest = self.newest(LogTime(slot.0 - 1));
        }
        due.missed.reverse();
        due
    }

    /// Up to where slots count as dealt with at `now`, where what is remembered lies further ahead
    /// than clocks may differ by: a clock was wrong, and would keep the job from what is due until
    /// then. The newest slot is looked at again: if it was made, that is known by the slot.
    #[must_use]
    pub fn taken_back(
        &self,
        handled: LogTime,
        now: LogTime,
        allowance: Duration,
    ) -> Option<LogTime> {
        let before = |slot: LogTime| self.newest(LogTime(slot.0 - 1)).unwrap_or(LogTime(0));
        (handled > now.after(allowance)).then(|| self.newest(now).map_or(now, before))
    }

    /// By how much local times near `time` may be out of the order of their instants. Where the
    /// zone is not set forward or back thereabouts, they are in order, to the minute.
    fn shift_around(&self, time: LogTime) -> Duration {
        let last = self.zone.preceding(time.after(2 * SHIFT_MAX).timestamp()).next();
        let begin = time.before(2 * SHIFT_MAX).timestamp();
        if last.is_some_and(|last| last.timestamp() >= begin) { SHIFT_MAX } else { MINUTE }
    }

    fn civil(&self, time: LogTime) -> DateTime {
        self.zone.to_datetime(time.timestamp())
    }

    fn instant(&self, civil: DateTime) -> Option<LogTime> {
        let ambiguous = self.zone.to_ambiguous_timestamp(civil);
        let timestamp: Timestamp = match ambiguous.offset() {
            AmbiguousOffset::Unambiguous { .. } | AmbiguousOffset::Fold { .. } => {
                ambiguous.earlier().ok()?
            }
            AmbiguousOffset::Gap { .. } => {
                // The two readings of a skipped time lie around the transition.
                let before = ambiguous.earlier().ok()?;
                self.zone.following(before).next().map(|transition| transition.timestamp())?
            }
        };
        Some(LogTime::from_timestamp(timestamp))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> LogTime {
        text.parse().expect("a time")
    }

    fn slots(pattern: &str, zone: &str, from: &str, count: usize) -> Vec<String> {
        let schedule = Schedule::parse(pattern, Some(zone)).expect("valid");
        let mut at = time(from);
        (0..count)
            .map(|_| {
                at = schedule.next(at).expect("there is a next one");
                assert_eq!(schedule.newest(at), Some(at));
                assert_eq!(schedule.newest(LogTime(at.0 + 1)), Some(at));
                at.to_string()
            })
            .collect()
    }

    /// Every slot from one time to another, by a look at each local minute of the span.
    fn every(schedule: &Schedule, from: LogTime, to: LogTime) -> Vec<LogTime> {
        let (mut civil, end) =
            (schedule.civil(from.before(SHIFT_MAX)), schedule.civil(to.after(SHIFT_MAX)));
        let mut slots = Vec::new();
        while civil < end {
            civil = schedule.cron.find_next_occurrence(&civil, false).expect("there is one");
            slots.extend(schedule.instant(civil).filter(|slot| (from..to).contains(slot)));
        }
        slots.sort_unstable();
        slots.dedup();
        slots
    }

    #[test]
    fn slots_around_daylight_saving_time_are_those_of_a_look_at_every_local_minute() {
        for (zone, from, to) in [
            ("Europe/Berlin", "2026-03-26T12:00:00Z", "2026-04-01T12:00:00Z"),
            ("Europe/Berlin", "2026-10-22T12:00:00Z", "2026-10-28T12:00:00Z"),
            ("Pacific/Apia", "2011-12-27T12:00:00Z", "2012-01-02T12:00:00Z"),
            ("Australia/Lord_Howe", "2026-04-02T12:00:00Z", "2026-04-08T12:00:00Z"),
        ] {
            for pattern in ["*/17 * * * *", "30 2 * * *", "0 */5 * * *"] {
                let schedule = Schedule::parse(pattern, Some(zone)).expect("valid");
                let (from, to) = (time(from), time(to));
                let wanted = every(&schedule, from, to);
                assert!(wanted.len() >= 5, "{zone}, {pattern}: {wanted:?}");
                let (first, last) = (wanted[0], wanted[wanted.len() - 1]);
                for at in (first.0..last.0).step_by(7 * MINUTE.as_nanos() as usize).map(LogTime) {
                    let behind = wanted.partition_point(|slot| *slot <= at);
                    assert_eq!(schedule.next(at), Some(wanted[behind]), "{zone}, {pattern}: {at}");
                    let newest = wanted[behind - 1];
                    assert_eq!(schedule.newest(at), Some(newest), "{zone}, {pattern}: {at}");
                }
            }
        }
    }

    #[test]
    fn a_skipped_local_time_runs_at_the_end_of_the_gap() {
        // Berlin, 2026-03-29: 02:00 becomes 03:00 at 01:00 UTC.
        let nightly = slots("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00:00Z", 2);
        assert_eq!(nightly, ["2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"]);
        let hourly = slots("0 * * * *", "Europe/Berlin", "2026-03-28T23:30:00Z", 3);
        assert_eq!(
            hourly[..2],
            ["2026-03-29T00:00:00Z", "2026-03-29T01:00:00Z"],
            "once, not twice"
        );
        assert_eq!(hourly[2], "2026-03-29T02:00:00Z");
    }

    #[test]
    fn a_repeated_local_time_gives_one_slot() {
        // Berlin, 2026-10-25: 03:00 becomes 02:00 at 01:00 UTC.
        let nightly = slots("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", 2);
        assert_eq!(nightly, ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]);
        let hourly = slots("0 * * * *", "Europe/Berlin", "2026-10-24T23:30:00Z", 2);
        assert_eq!(hourly, ["2026-10-25T00:00:00Z", "2026-10-25T02:00:00Z"]);
    }

    #[test]
    fn a_day_that_a_zone_left_out_runs_at_its_end() {
        // Samoa went from 2011-12-29 straight to 2011-12-31.
        let daily = slots("0 12 * * *", "Pacific/Apia", "2011-12-29T00:00:00Z", 3);
        assert_eq!(daily, ["2011-12-29T22:00:00Z", "2011-12-30T10:00:00Z", "2011-12-30T22:00:00Z"]);
    }

    #[test]
    fn the_newest_missed_slot_is_decided_and_older_ones_are_missed() {
        let schedule = Schedule::parse("0 2 * * *", None).expect("valid");
        let hour = Duration::from_secs(3600);
        let since = time("2026-11-01T00:00:00Z");
        let handled = Some(time("2026-11-20T02:00:00Z"));
        let due = schedule.due(since, handled, time("2026-11-23T02:30:00Z"), hour);
        assert_eq!(due.open, Some(time("2026-11-23T02:00:00Z")));
        assert_eq!(due.missed, [time("2026-11-21T02:00:00Z"), time("2026-11-22T02:00:00Z")]);
        assert_eq!(due.next, Some(time("2026-11-24T02:00:00Z")));
        let late = schedule.due(since, handled, time("2026-11-23T03:00:01Z"), hour);
        assert_eq!((late.open, late.missed.len()), (None, 3));
        let none = schedule.due(since, handled, time("2026-11-20T12:00:00Z"), hour);
        assert_eq!((none.open, none.missed.len()), (None, 0));
        // A clock set back owes nothing, and a new job nothing of before its time.
        let back = schedule.due(since, handled, time("2026-11-19T02:30:00Z"), hour);
        assert_eq!((back.open, back.missed.len()), (None, 0));
        assert_eq!(back.next, Some(time("2026-11-21T02:00:00Z")));
        // One that was wrong by more than clocks may differ by is forgotten.
        let (now, allowance) = (time("2026-11-19T02:30:00Z"), Duration::from_secs(600));
        let before = time("2026-11-18T02:00:00Z");
        assert_eq!(schedule.taken_back(time("2027-11-19T00:00:00Z"), now, allowance), Some(before));
        assert_eq!(schedule.taken_back(now.after(allowance), now, allowance), None);
        let due = schedule.due(since, Some(before), now, hour);
        assert_eq!((due.open, due.missed.len()), (Some(time("2026-11-19T02:00:00Z")), 0));
        let new = time("2026-11-23T02:10:00Z");
        let due = schedule.due(new, None, time("2026-11-23T02:30:00Z"), hour);
        assert_eq!((due.open, due.missed.len()), (None, 0));
    }

    #[test]
    fn a_slot_is_opened_a_few_seconds_after_its_time_whatever_the_deadline() {
        let schedule = Schedule::parse("0 2 * * *", None).expect("valid");
        let (since, slot) = (time("2026-11-22T12:00:00Z"), time("2026-11-23T02:00:00Z"));
        for deadline in [Duration::ZERO, Duration::from_secs(1)] {
            let late = |seconds| slot.after(Duration::from_secs(seconds));
            let due = |seconds| schedule.due(since, None, late(seconds), deadline);
            assert_eq!((due(2).open, due(2).missed), (Some(slot), Vec::new()));
            assert_eq!((due(11).open, due(11).missed), (None, vec![slot]));
            let handled = schedule.due(since, Some(slot), late(2), deadline);
            assert_eq!((handled.open, handled.missed.len()), (None, 0));
        }
    }

    #[test]
    fn the_missed_slots_of_a_long_outage_are_bounded() {
        let schedule = Schedule::parse("* * * * *", None).expect("valid");
        let since = time("2020-01-01T00:00:00Z");
        let due = schedule.due(since, None, time("2026-01-01T00:00:30Z"), Duration::from_secs(60));
        assert_eq!(due.missed.len(), MISSED_MAX);
        assert_eq!(due.open, Some(time("2026-01-01T00:00:00Z")));
    }

    #[test]
    fn what_is_no_schedule_is_named() {
        for (pattern, zone, word) in [
            ("every day", None, "every day"),
            ("0 0 2 * * *", None, "0 0 2 * * *"),
            ("61 2 * * *", None, "61 2 * * *"),
            ("0 2 * * *", Some("Europe/Atlantis"), "Europe/Atlantis"),
        ] {
            let error = Schedule::parse(pattern, zone).expect_err(pattern).to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
