//! Slots that never got a backup: when a node looks for one, and what it can say. Pure; its shell
//! is `timekeeper`.
//!
//! Every node looks for itself, whatever its own runs ended as: once the time of a slot is over, at
//! the repository, and where that is out of sight here, through the eyes of its peers. As long as
//! the answer is not that the backup is there it looks again, since a repository comes back into
//! sight, and a late run may still bring what was missing.

use std::time::Duration;

use super::branches::{Filled, Reigns};
use super::claim::SlotResult;
use super::job::JobSettings;
use super::slot::Schedule;
use crate::units::{EpochId, LogTime, Span};

/// An alarm that may end is looked into again after this long.
pub const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// What is found out about the result of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// The repository holds it.
    Made,
    /// It holds one that this copy cannot place yet.
    MadePerhaps,
    /// The repository does not hold it.
    NotMade,
    /// The repository is out of sight of everybody who could be asked: why.
    Unknown(String),
}

impl Found {
    /// From what this node sees in the repository, and where it sees nothing, what its peers do.
    pub fn from(here: Result<Filled, String>, there: impl FnOnce() -> Option<Filled>) -> Found {
        let made = here.or_else(|error| there().ok_or(error));
        match made {
            Ok(Filled::ForGood) => Found::Made,
            Ok(Filled::Perhaps) => Found::MadePerhaps,
            Ok(Filled::No) => Found::NotMade,
            Err(error) => Found::Unknown(error),
        }
    }
}

/// The newest slot whose time is over at `now`, of a job that exists since `since`. `allowance` is
/// what the clocks of nodes may differ by.
#[must_use]
pub fn newest_over(
    schedule: &Schedule,
    settings: &JobSettings,
    allowance: Span,
    since: LogTime,
    now: LogTime,
) -> Option<LogTime> {
    schedule.newest(now.before(time_of_slot(settings, allowance))).filter(|slot| *slot > since)
}

/// From when a slot is due until no run may still bring its backup.
#[must_use]
pub fn time_of_slot(settings: &JobSettings, allowance: Span) -> Duration {
    settings.deadline.0 + settings.run_limit.0 + allowance.0
}

/// What a node knows, and still wants to know, of the slots of a job whose time is over.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    /// The newest of them.
    slot: Option<LogTime>,
    looked: Option<Duration>,
    /// The reign in which a look that goes on began.
    looking: Option<EpochId>,
    /// By whose history all of this is known.
    reign: Option<EpochId>,
    /// The newest slot of which this node knows that its backup is there.
    made: Option<LogTime>,
    /// Another whose backup is there as far as a copy knows that has not come past it.
    perhaps: Option<(LogTime, SlotResult)>,
}

impl Watch {
    /// Whether to look for the result of `newest` now, where one looks again after `again`, and at
    /// once in another reign than before: what was made may be of another branch. Whoever looks
    /// tells [`Watch::found`]. `now` is monotonic.
    pub fn is_due(
        &mut self,
        newest: LogTime,
        reign: EpochId,
        now: Duration,
        again: Duration,
    ) -> bool {
        self.enter(reign);
        if self.is_made_up_for(newest) {
            return false;
        }
        if self.slot != Some(newest) {
            (self.slot, self.looked) = (Some(newest), None);
        }
        // One look at a time: a repository may hang.
        if self.looking.is_some() || self.looked.is_some_and(|looked| now < looked + again) {
            return false;
        }
        (self.looking, self.looked) = (Some(reign), Some(now));
        true
    }

    /// The look for a slot has ended. False where another slot or reign counts by now, or a later
    /// backup: then nothing is raised, and nothing ends.
    pub fn found(&mut self, slot: LogTime, found: &Found) -> bool {
        let is_old = self.looking.take() != self.reign;
        if is_old || self.slot != Some(slot) || self.is_made_up_for(slot) {
            return false;
        }
        if *found == Found::Made {
            self.made = self.made.max(Some(slot));
        }
        true
    }

    /// The backup of `slot` has been made, of which this is the result where it could be read.
    /// Whether it counts: it makes up for what is older, for good or until [`Watch::settle`] says
    /// otherwise. The word of a copy is enough for its primary.
    pub fn made(&mut self, slot: LogTime, result: Option<&SlotResult>, reigns: &Reigns) -> bool {
        self.enter(reigns.present());
        let filled = match result {
            Some(result) => reigns.made(std::slice::from_ref(result)),
            None if reigns.whole && reigns.is_settled() => Filled::ForGood,
            None => Filled::No,
        };
        match (filled, result) {
            (Filled::ForGood, _) => self.made = self.made.max(Some(slot)),
            (Filled::Perhaps, Some(result)) => {
                if self.unsettled() < Some(slot) {
                    self.perhaps = Some((slot, result.clone()));
                }
            }
            _ => return false,
        }
        true
    }

    /// The slot of which more may be known by now: tell [`Watch::settle`] its reigns.
    pub fn unsettled(&self) -> Option<LogTime> {
        self.perhaps.as_ref().map(|(slot, _)| *slot)
    }

    /// What is known now of the reigns of a slot: its backup is there for good, or counts no more.
    pub fn settle(&mut self, slot: LogTime, reigns: &Reigns) {
        if let Some((_, result)) = self.perhaps.take_if(|(of, _)| *of == slot) {
            self.made(slot, Some(&result), reigns);
        }
    }

    /// Nothing beyond `limit` makes up for what is to come: a clock that was ahead, and was set
    /// back, has made it.
    pub fn take_back(&mut self, limit: LogTime) {
        self.made = self.made.filter(|made| *made <= limit);
        self.perhaps.take_if(|(slot, _)| *slot > limit);
    }

    fn enter(&mut self, reign: EpochId) {
        if self.reign.replace(reign) != Some(reign) {
            (self.made, self.perhaps, self.looked) = (None, None, None);
        }
    }

    /// Whether the backup of a slot, or of a later one, is known to be there.
    pub fn is_made_up_for(&self, slot: LogTime) -> bool {
        self.made.max(self.unsettled()).is_some_and(|made| made >= slot)
    }
}

#[cfg(test)]
mod tests {
    use super::super::claim::tests::result;
    use super::*;
    use crate::units::Lsn;

    const SLOT: LogTime = LogTime(1_000_000_000);
    const LATER: LogTime = LogTime(2_000_000_000);

    const REIGN: EpochId = EpochId(1);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// The reigns of a copy that has the first 200 bytes of the log, and whether they go on behind
    /// the slot.
    fn reigns(is_past: bool) -> Reigns {
        let reigns = vec![(REIGN, Lsn::ZERO)];
        Reigns { reigns, head: Lsn(200), is_past, ..Reigns::default() }
    }

    fn of(epoch: EpochId, lsn: u64) -> SlotResult {
        SlotResult { epoch, lsn: Lsn(lsn), ..result("a", 1) }
    }

    #[test]
    fn the_repository_counts_and_where_it_is_out_of_sight_the_peers_word() {
        let lost = || Err("unplugged".to_owned());
        assert_eq!(Found::from(Ok(Filled::ForGood), || Some(Filled::No)), Found::Made);
        assert_eq!(Found::from(Ok(Filled::No), || Some(Filled::ForGood)), Found::NotMade);
        assert_eq!(Found::from(lost(), || Some(Filled::ForGood)), Found::Made);
        assert_eq!(Found::from(lost(), || Some(Filled::Perhaps)), Found::MadePerhaps);
        assert_eq!(Found::from(lost(), || Some(Filled::No)), Found::NotMade);
        assert_eq!(Found::from(lost(), || None), Found::Unknown("unplugged".to_owned()));
    }

    #[test]
    fn an_alarm_is_looked_into_again_until_the_backup_is_there() {
        let mut watch = Watch::default();
        let unknown = Found::Unknown("unplugged".to_owned());
        assert!(watch.is_due(SLOT, REIGN, at(5), LOOK_AGAIN));
        assert!(!watch.is_due(SLOT, REIGN, at(500), LOOK_AGAIN), "somebody looks already");
        assert!(watch.found(SLOT, &unknown));
        assert!(!watch.is_due(SLOT, REIGN, at(5) + LOOK_AGAIN - at(1), LOOK_AGAIN));
        assert!(watch.is_due(SLOT, REIGN, at(5) + LOOK_AGAIN, LOOK_AGAIN));
        assert!(watch.found(SLOT, &Found::NotMade));
        assert!(watch.is_due(SLOT, REIGN, at(900), LOOK_AGAIN));
        assert!(watch.found(SLOT, &Found::MadePerhaps));
        assert!(watch.is_due(SLOT, REIGN, at(1000), LOOK_AGAIN), "it may be of another branch");
        assert!(watch.found(SLOT, &Found::Made));
        assert!(!watch.is_due(SLOT, REIGN, at(5000), LOOK_AGAIN), "nothing is left to find out");
    }

    #[test]
    fn a_newer_slot_is_looked_for_at_once_and_an_answer_about_an_older_one_counts_no_more() {
        let mut watch = Watch::default();
        assert!(watch.is_due(SLOT, REIGN, at(5), LOOK_AGAIN));
        assert!(!watch.is_due(LATER, REIGN, at(6), LOOK_AGAIN), "one look at a time");
        assert!(!watch.found(SLOT, &Found::NotMade));
        assert!(watch.is_due(LATER, REIGN, at(6) + LOOK_AGAIN, LOOK_AGAIN));
        assert!(watch.found(LATER, &Found::NotMade));
    }

    #[test]
    fn a_later_backup_ends_the_alarm_of_what_is_older() {
        let mut watch = Watch::default();
        assert!(watch.is_due(SLOT, REIGN, at(5), LOOK_AGAIN));
        assert!(watch.made(LATER, Some(&of(REIGN, 100)), &reigns(true)));
        assert!(watch.made(SLOT, Some(&of(REIGN, 90)), &reigns(true)));
        assert!(!watch.found(SLOT, &Found::NotMade), "nothing is raised");
        assert!(!watch.is_due(SLOT, REIGN, at(5000), LOOK_AGAIN));
        assert!(!watch.is_due(LATER, REIGN, at(5000), LOOK_AGAIN), "this node made it");
        assert!(watch.is_due(LogTime(LATER.0 + 1), REIGN, at(5000), LOOK_AGAIN));
    }

    #[test]
    fn what_a_copy_made_before_its_log_came_past_the_slot_is_judged_again_when_it_has() {
        const NEXT: EpochId = EpochId(2);
        let came_in = |at_slot| Reigns {
            reigns: vec![(REIGN, Lsn::ZERO), (NEXT, Lsn(150))],
            at_slot: Some(at_slot),
            ..reigns(true)
        };
        for (result, settled, counts) in [
            (of(REIGN, 100), came_in(REIGN), true),
            (of(REIGN, 100), came_in(NEXT), false),
            (of(NEXT, 170), came_in(NEXT), true),
            // Of a reign that the copy had not heard of, and has come past.
            (of(EpochId(3), 220), Reigns { head: Lsn(300), ..came_in(NEXT) }, false),
        ] {
            let mut watch = Watch::default();
            let before = Reigns { is_past: false, ..came_in(REIGN) };
            assert!(watch.is_due(SLOT, NEXT, at(5), LOOK_AGAIN));
            assert!(watch.made(LATER, Some(&result), &before));
            // Until then it stands, also for what is older: an idle log may never come past it.
            assert!(!watch.found(SLOT, &Found::NotMade));
            watch.settle(LATER, &before);
            assert_eq!(watch.unsettled(), Some(LATER));
            assert!(!watch.is_due(LATER, NEXT, at(5000), LOOK_AGAIN));
            watch.settle(LATER, &settled);
            assert_eq!(watch.unsettled(), None);
            assert_eq!(watch.is_due(LATER, NEXT, at(5001), LOOK_AGAIN), !counts, "{result:?}");
        }
    }

    #[test]
    fn a_backup_that_only_its_maker_tells_of_counts_on_the_primary() {
        for whole in [true, false] {
            let mut watch = Watch::default();
            let reigns = Reigns { whole, ..reigns(true) };
            assert_eq!(watch.made(SLOT, None, &reigns), whole);
            assert_eq!(watch.is_due(SLOT, REIGN, at(5), LOOK_AGAIN), !whole);
        }
    }

    #[test]
    fn what_a_clock_that_was_ahead_has_made_makes_up_for_nothing_once_it_is_set_back() {
        for is_past in [true, false] {
            let mut watch = Watch::default();
            assert!(watch.made(LATER, Some(&of(REIGN, 100)), &reigns(is_past)));
            watch.take_back(LATER);
            assert!(!watch.is_due(SLOT, REIGN, at(5), LOOK_AGAIN));
            watch.take_back(LogTime(LATER.0 - 1));
            assert!(watch.is_due(SLOT, REIGN, at(6), LOOK_AGAIN));
        }
    }

    #[test]
    fn in_another_reign_what_was_made_before_is_looked_for_again() {
        let mut watch = Watch::default();
        assert!(watch.is_due(SLOT, REIGN, at(5), LOOK_AGAIN));
        assert!(watch.made(LATER, Some(&of(REIGN, 100)), &reigns(true)));
        assert!(!watch.is_due(SLOT, REIGN, at(5000), LOOK_AGAIN));
        let next = EpochId(2);
        assert!(!watch.is_due(SLOT, next, at(5001), LOOK_AGAIN), "the first look goes on");
        assert!(!watch.found(SLOT, &Found::Made), "of the reign before");
        assert!(watch.is_due(SLOT, next, at(5002), LOOK_AGAIN));
        assert!(watch.found(SLOT, &Found::NotMade));
    }

    #[test]
    fn the_time_of_a_slot_is_over_when_no_run_may_still_bring_it() {
        let schedule = Schedule::parse("0 * * * *", None).expect("valid");
        let time = |text: &str| text.parse::<LogTime>().expect("a time");
        let settings = JobSettings {
            deadline: Span::from_secs(600),
            run_limit: Span::from_secs(1200),
            ..JobSettings::default()
        };
        let since = time("2026-11-01T00:30:00Z");
        let over =
            |now: &str| newest_over(&schedule, &settings, Span::from_secs(60), since, time(now));
        assert_eq!(over("2026-11-01T01:30:59Z"), None, "what is before the job is owed by nobody");
        assert_eq!(over("2026-11-01T01:31:00Z"), Some(time("2026-11-01T01:00:00Z")));
        assert_eq!(over("2026-11-01T02:30:59Z"), Some(time("2026-11-01T01:00:00Z")));
    }
}
