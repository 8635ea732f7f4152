//! Whose a slot's result is: of the history that this node holds, or of another branch of it.
//!
//! A primary that was cut off and the one that was promoted meanwhile both see the repository. The
//! backup of one is none of the other's: it does not hold what that one's hosts have written. So a
//! primary takes a result as its own only if it is certain that its image lies in its history; a
//! copy may lag behind its primary, and takes for its own what it cannot tell.

use super::claim::SlotResult;
use crate::group::{Group, Point, Role};
use crate::log::control::EpochRecord;
use crate::units::{EpochId, LogTime, Lsn};

/// The reign that the history which a node holds goes on in.
#[must_use]
pub fn present_reign(group: &Group) -> EpochId {
    group.control().epochs.last().map_or(EpochId(0), |epoch| epoch.id)
}

/// The reign of the last record of before a time, where the log still tells. A reign's own record
/// is none: it is dated by what is known of the time at least, hours early where a node was started
/// since, and an image of before it lacks nothing.
fn reign_at(group: &Group, time: LogTime) -> Option<EpochId> {
    let found = group.resolve_point(&Point::Time(time)).ok()?;
    reign_of(&group.control().epochs, found.epoch, found.lsn)
}

/// The reign of the last record up to `lsn`, which is of `epoch`, that is no reign's own. Told by
/// the reigns alone, so that it stays the same when the log is folded.
fn reign_of(epochs: &[EpochRecord], epoch: EpochId, mut lsn: Lsn) -> Option<EpochId> {
    let mut index = epochs.iter().position(|known| known.id == epoch)?;
    while index > 0 && lsn <= epochs[index].end() {
        lsn = epochs[index].first_lsn;
        index -= 1;
    }
    Some(epochs[index].id)
}

/// Whether a slot has its backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// It has, and nothing that this node may yet hear changes that.
    ForGood,
    /// It has, as far as a copy can tell that lags behind.
    Perhaps,
    /// It has not.
    No,
}

/// What a node knows of its group's reigns, as far as the results of one slot are judged by it.
/// The default knows nothing, and takes every result for its own.
#[derive(Clone, Debug, Default)]
pub struct Reigns {
    /// Each reign and where it begins, oldest first.
    pub reigns: Vec<(EpochId, Lsn)>,
    /// Up to where this node holds the last of them.
    pub head: Lsn,
    /// Nothing lies behind it that this node has not heard of.
    pub whole: bool,
    /// The reign that the slot came in, where the log still tells.
    pub at_slot: Option<EpochId>,
    /// The log goes on behind the slot here: that reign is settled.
    pub is_past: bool,
}

impl Reigns {
    /// What is known of a slot's reigns here and now: asked after the results were read, since the
    /// history grows.
    #[must_use]
    pub fn of(group: &Group, slot: LogTime) -> Reigns {
        let whole = group.role() == Role::Primary && !group.is_asking();
        // Before the slot's reign is looked up: what comes in between settles nothing.
        let positions = group.positions();
        let at_slot = reign_at(group, slot);
        let epochs = &group.control().epochs;
        let reigns = epochs.iter().map(|epoch| (epoch.id, epoch.first_lsn)).collect();
        Reigns { reigns, head: positions.head, whole, at_slot, is_past: positions.time > slot }
    }

    /// The present reign, which names the branch.
    #[must_use]
    pub fn present(&self) -> EpochId {
        self.reigns.last().map_or(EpochId(0), |(epoch, _)| *epoch)
    }

    /// Whether nothing that this node may yet hear, or write where its clock is ahead of its log,
    /// changes which reign the slot came in.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let goes_on = |reign| self.whole && reign == self.present();
        self.is_past || self.at_slot.is_some_and(goes_on)
    }

    /// Why an image of the slot is no backup of it in this node's history, where that is certain.
    #[must_use]
    pub fn why_not(&self, epoch: EpochId, lsn: Lsn, stale: bool) -> Option<String> {
        let place = |epoch| self.reigns.iter().position(|(known, _)| *known == epoch);
        let other = || {
            let present = self.present();
            Some(format!(
                "its image, LSN {lsn} of epoch {epoch}, is of another branch than the history that \
                 goes on here in epoch {present}"
            ))
        };
        let Some(index) = place(epoch) else {
            // A copy that has not come so far may hear of that reign yet.
            let may_come = self.reigns.is_empty() || !self.whole && lsn > self.head;
            return if may_come || lsn == Lsn::ZERO { None } else { other() };
        };
        let begin = if index == 0 { Lsn::ZERO } else { self.reigns[index].1 };
        let end = self.reigns.get(index + 1).map(|(_, next)| *next);
        let ends_before = match end {
            Some(end) => lsn > end,
            None => self.whole && lsn > self.head,
        };
        if lsn <= begin || ends_before {
            return other();
        }
        let at_slot = self.at_slot.and_then(|epoch| Some((epoch, place(epoch)?)));
        match at_slot {
            Some((reign, since)) if index < since && !stale => Some(format!(
                "its image, LSN {lsn} of epoch {epoch}, is from before epoch {reign}, in which its \
                 slot came"
            )),
            _ => None,
        }
    }

    /// Whether a result of the slot is one of this node's history.
    #[must_use]
    pub fn counts(&self, result: &SlotResult) -> bool {
        self.why_not(result.epoch, result.lsn, result.stale).is_none()
    }

    /// Whether one of a slot's results fills it: for good, or as far as a copy can tell that lags.
    #[must_use]
    pub fn made(&self, results: &[SlotResult]) -> Filled {
        let counted = || results.iter().filter(|result| self.counts(result));
        let has_come = |result: &SlotResult| match self.whole {
            true => self.is_settled() || result.epoch == self.present(),
            false => self.is_settled() && result.lsn <= self.head,
        };
        if counted().any(has_come) {
            Filled::ForGood
        } else if counted().next().is_some() {
            Filled::Perhaps
        } else {
            Filled::No
        }
    }

    /// The result among those of a slot that fills it in this node's history.
    #[must_use]
    pub fn counted<'a>(&self, results: &'a [SlotResult]) -> Option<&'a SlotResult> {
        results.iter().find(|result| self.counts(result))
    }

    /// The branch in whose directory the slot goes on, where `first` is the result in the slot's
    /// own: `None` for the slot's own.
    #[must_use]
    pub fn branch(&self, first: Option<&SlotResult>) -> Option<EpochId> {
        first.filter(|first| !self.counts(first)).map(|_| self.present())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::super::claim::tests::result;
    use super::*;
    use crate::units::NodeId;

    const OLD: EpochId = EpochId(1);
    const NEW: EpochId = EpochId(2);
    const UNHEARD: EpochId = EpochId(3);

    /// The second reign began at 100, and its node holds 200.
    fn reigns(whole: bool, at_slot: EpochId) -> Reigns {
        let reigns = vec![(OLD, Lsn::ZERO), (NEW, Lsn(100))];
        Reigns { reigns, head: Lsn(200), whole, at_slot: Some(at_slot), is_past: true }
    }

    fn of(epoch: EpochId, lsn: u64) -> SlotResult {
        SlotResult { epoch, lsn: Lsn(lsn), ..result("a", 1) }
    }

    #[test]
    fn a_reign_s_own_record_is_of_the_reign_before_also_where_the_log_begins_behind_it() {
        let epoch = |id: u64, first_lsn: u64| EpochRecord {
            counter: id,
            id: EpochId(id),
            author: NodeId::default(),
            author_name: "a".parse().unwrap(),
            first_lsn: Lsn(first_lsn),
            reason: "promote".to_owned(),
            other: Map::new(),
        };
        let second = epoch(2, 4096).end();
        // The third came right behind the second, which nobody wrote in.
        let epochs = [epoch(1, 0), epoch(2, 4096), epoch(3, second.0)];
        let third = epochs[2].end();
        for (of, lsn, reign) in [
            (1, epochs[0].end().0, Some(1)),
            (1, 4096, Some(1)),
            (2, second.0, Some(1)),
            (2, second.0 + 8, Some(2)),
            (3, third.0, Some(1)),
            (3, third.0 + 8, Some(3)),
            (4, 9000, None),
        ] {
            let found = reign_of(&epochs, EpochId(of), Lsn(lsn));
            assert_eq!(found, reign.map(EpochId), "{lsn} of {of}");
        }
    }

    #[test]
    fn a_primary_counts_what_is_surely_in_its_history_and_a_copy_all_that_may_be() {
        for (epoch, lsn, on_primary, on_copy) in [
            (NEW, 150, true, true),
            (NEW, 200, true, true),
            // The copy lags behind.
            (NEW, 250, false, true),
            (UNHEARD, 250, false, true),
            // At a place that the copy has come past in another reign.
            (UNHEARD, 150, false, false),
            (OLD, 100, true, true),
            // What the old reign wrote behind the point where the new one parted from it.
            (OLD, 101, false, false),
            (NEW, 100, false, false),
        ] {
            for (whole, counts) in [(true, on_primary), (false, on_copy)] {
                let reigns = reigns(whole, OLD);
                assert_eq!(reigns.counts(&of(epoch, lsn)), counts, "{epoch} {lsn} {whole}");
            }
        }
    }

    #[test]
    fn what_a_copy_counts_and_has_not_come_to_is_not_made_for_good() {
        for (result, made) in [
            (of(NEW, 150), Filled::ForGood),
            (of(NEW, 250), Filled::Perhaps),
            (of(UNHEARD, 250), Filled::Perhaps),
            (of(UNHEARD, 150), Filled::No),
        ] {
            assert_eq!(reigns(false, OLD).made(&[result]), made);
        }
        assert_eq!(reigns(false, OLD).made(&[of(NEW, 250), of(NEW, 150)]), Filled::ForGood);
        assert_eq!(reigns(true, OLD).made(&[]), Filled::No);
        // A reign that the slot came in may come yet.
        for (whole, at_slot, made) in [
            (false, OLD, Filled::Perhaps),
            (false, NEW, Filled::No),
            // The first write of a primary dates its reign.
            (true, OLD, Filled::Perhaps),
        ] {
            let behind = Reigns { is_past: false, ..reigns(whole, at_slot) };
            assert_eq!(behind.made(&[of(OLD, 100)]), made, "{whole} {at_slot}");
        }
        for at_slot in [OLD, NEW] {
            let present = Reigns { is_past: false, ..reigns(true, at_slot) };
            assert_eq!(present.made(&[of(NEW, 150)]), Filled::ForGood, "{at_slot}");
        }
    }

    #[test]
    fn an_image_from_before_the_reign_that_the_slot_came_in_does_not_fill_it() {
        for whole in [true, false] {
            let reigns = reigns(whole, NEW);
            assert!(!reigns.counts(&of(OLD, 100)));
            assert!(reigns.counts(&SlotResult { stale: true, ..of(OLD, 100) }), "by leave");
            assert!(reigns.counts(&of(NEW, 101)));
            let unknown = Reigns { at_slot: None, ..reigns };
            assert!(unknown.counts(&of(OLD, 100)), "the log does not tell any more");
        }
    }

    #[test]
    fn a_foreign_result_sends_the_slot_into_a_directory_of_the_branch() {
        let reigns = reigns(true, NEW);
        assert_eq!(reigns.branch(None), None);
        assert_eq!(reigns.branch(Some(&of(NEW, 150))), None);
        assert_eq!(reigns.branch(Some(&of(OLD, 150))), Some(NEW));
        let nothing = Reigns::default();
        assert_eq!(nothing.branch(Some(&of(OLD, 150))), None);
    }
}
