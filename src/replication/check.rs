//! Reads the log of each group again, a little at a time, and looks again at what is damaged.
//!
//! Bytes are checked when they arrive and when they are read; this finds what rots in between,
//! before a backup or a promote has to. Damage found is a fact until the same part was read whole,
//! or is no longer there. What looked damaged to a reader is looked at first.

use std::sync::Arc;
use std::time::Duration;

use crate::group::{DamagedPart, Group, GroupError};
use crate::units::Lsn;

use super::service::{Shared, locked};

/// Time between two steps.
const STEP_EVERY: Duration = Duration::from_secs(10);
/// Bytes of a group's log that a step reads.
const STEP_BYTES: u64 = 16 << 20;
/// Damaged parts that a step looks at again.
const AGAIN: usize = 8;

/// Checks until the service ends.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut shutdown = shared.shutdown_signal();
    loop {
        for group in shared.groups.groups() {
            let Some(group) = shared.groups.engine(group.id()) else { continue };
            let shared = Arc::clone(&shared);
            // Fails only while the runtime ends.
            let _ = tokio::task::spawn_blocking(move || step(&shared, &group)).await;
        }
        tokio::select! {
            () = tokio::time::sleep(STEP_EVERY) => {}
            _ = shutdown.wait_for(|ending| *ending) => return,
        }
    }
}

/// What was read so far of a group's log.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Pass {
    /// Up to here this pass has come.
    checked_to: Lsn,
    /// Cuts of the log's end when it came there.
    cuts: u64,
    /// When the last step ended, monotonic; before the first one when the group was seen.
    stepped: Duration,
    /// The damaged part that was looked at last.
    looked_at: Option<DamagedPart>,
}

/// A log, as far as a check needs it.
struct Log<'a> {
    /// Where it begins: the start of a segment.
    start: Lsn,
    /// Up to which it is checked.
    end: Lsn,
    /// How often its end was cut, before and now: positions of before may lie within a record.
    cuts: u64,
    cuts_now: &'a dyn Fn() -> u64,
    segment_bytes: u64,
    check: &'a dyn Fn(Lsn, Lsn) -> Result<u64, GroupError>,
}

impl Log<'_> {
    fn segment_end(&self, segment: u64) -> Lsn {
        Lsn((segment + 1) * self.segment_bytes)
    }
}

impl Pass {
    pub(super) fn checked_to(&self) -> Lsn {
        self.checked_to
    }

    /// Of a group that is seen for the first time.
    pub(super) fn begin(now: Duration) -> Pass {
        Pass { stepped: now, ..Pass::default() }
    }

    /// How long ago it last came on.
    pub(super) fn age(&self, now: Duration) -> Duration {
        now.saturating_sub(self.stepped)
    }

    /// Reads the next part of the log; the segments that look damaged.
    fn step(&mut self, log: &Log<'_>) -> Vec<u64> {
        let mut next = self.clone();
        if next.cuts != log.cuts {
            next.checked_to = Lsn::ZERO;
            next.cuts = log.cuts;
        }
        let damaged = next.go_on(log);
        // Cut while it was read: what was found is of no log.
        if (log.cuts_now)() != log.cuts {
            return Vec::new();
        }
        *self = next;
        damaged
    }

    /// After the log's end it begins anew.
    fn go_on(&mut self, log: &Log<'_>) -> Vec<u64> {
        if self.checked_to < log.start || self.checked_to >= log.end {
            self.checked_to = log.start;
        }
        let mut damaged = Vec::new();
        let until = Lsn(log.end.0.min(self.checked_to.0.saturating_add(STEP_BYTES)));
        while self.checked_to < until {
            let from = self.checked_to;
            let segment = from.segment_number(log.segment_bytes);
            let segment_end = log.segment_end(segment);
            match (log.check)(from, until.min(segment_end)) {
                Ok(bytes) => self.checked_to = from.advance(bytes),
                // Folded from under it: begin anew.
                Err(GroupError::NotCovered { .. }) => {
                    self.checked_to = Lsn::ZERO;
                    break;
                }
                Err(_) => {
                    damaged.push(segment);
                    // A segment begins with a record.
                    self.checked_to = segment_end;
                }
            }
        }
        damaged
    }

    /// Which of the damaged parts are looked at next: in turn.
    fn again(&mut self, damaged: &[DamagedPart]) -> Vec<DamagedPart> {
        let behind = |part: &&DamagedPart| self.looked_at.is_none_or(|last| **part > last);
        let mut parts: Vec<DamagedPart> = damaged.iter().filter(behind).copied().collect();
        parts.sort_unstable();
        if parts.is_empty() {
            parts = damaged.to_vec();
            parts.sort_unstable();
        }
        parts.truncate(AGAIN);
        self.looked_at = parts.last().copied();
        parts
    }
}

fn step(shared: &Shared, group: &Group) {
    let positions = group.positions();
    let log = Log {
        start: group.log_start(),
        end: positions.durable.min(positions.request_end),
        cuts: positions.cuts,
        cuts_now: &|| group.positions().cuts,
        segment_bytes: group.segment_bytes(),
        check: &|from, to| group.check_log(from, to),
    };
    let id = group.id();
    let mut pass = locked(&shared.checks).get(&id).cloned().unwrap_or_default();
    for part in group.take_suspects() {
        shared.look(group, &part, "read");
    }
    let known: Vec<DamagedPart> =
        shared.ledger(id).parts().iter().map(|known| known.part).collect();
    for part in pass.again(&known) {
        shared.look(group, &part, "check");
    }
    for segment in pass.step(&log) {
        let part = DamagedPart::Log { segment };
        if !known.contains(&part) {
            shared.look(group, &part, "check");
        }
    }
    pass.stepped = shared.now();
    locked(&shared.checks).insert(id, pass);
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeSet;

    use super::*;

    const SEGMENT: u64 = 8 << 20;

    /// A log of ten segments, some damaged, of which a fold may take the first.
    #[derive(Default)]
    struct TestLog {
        damaged: RefCell<BTreeSet<u64>>,
        folded: Cell<u64>,
        /// The next check is overtaken by a fold of one segment more.
        fold_within: Cell<bool>,
        /// The next check is overtaken by a cut, and fails by it.
        cut_within: Cell<bool>,
        cuts: Cell<u64>,
    }

    impl TestLog {
        fn step(&self, pass: &mut Pass) -> Vec<u64> {
            let cuts = self.cuts.get();
            let check = |from: Lsn, to: Lsn| {
                if self.cut_within.take() {
                    self.cuts.set(self.cuts.get() + 1);
                    let group = "g".parse().unwrap();
                    return Err(GroupError::Damaged { group, what: "half a record".to_owned() });
                }
                if self.fold_within.take() {
                    self.folded.set(self.folded.get() + 1);
                }
                let segment = from.segment_number(SEGMENT);
                assert!(to.0 <= (segment + 1) * SEGMENT, "one segment at a time");
                let group = "g".parse().unwrap();
                if segment < self.folded.get() {
                    let point = from.to_string();
                    return Err(GroupError::NotCovered { group, point, from, to });
                }
                if self.damaged.borrow().contains(&segment) {
                    let what = format!("segment {segment}");
                    return Err(GroupError::Damaged { group, what });
                }
                Ok(to.bytes_since(from))
            };
            pass.step(&Log {
                start: Lsn(self.folded.get() * SEGMENT),
                end: Lsn(10 * SEGMENT),
                cuts,
                cuts_now: &|| self.cuts.get(),
                segment_bytes: SEGMENT,
                check: &check,
            })
        }

        fn damage(&self, segment: u64) {
            self.damaged.borrow_mut().insert(segment);
        }
    }

    #[test]
    fn every_damaged_segment_is_come_to_though_folds_overtake_the_check() {
        let (log, mut pass) = (TestLog::default(), Pass::default());
        log.damage(8);
        log.damage(9);
        let found: Vec<u64> = (0..6).flat_map(|_| log.step(&mut pass)).collect();
        assert_eq!(found, [8, 9]);
        log.fold_within.set(true);
        assert!(log.step(&mut pass).is_empty(), "a segment that left is not damaged");
        let again: Vec<u64> = (0..6).flat_map(|_| log.step(&mut pass)).collect();
        assert_eq!(again, [8, 9], "and it begins anew");
    }

    #[test]
    fn a_cut_ends_the_pass_and_is_no_damage() {
        let (log, mut pass) = (TestLog::default(), Pass::default());
        log.step(&mut pass);
        let before = pass.checked_to;
        assert!(before > Lsn::ZERO);
        log.cut_within.set(true);
        assert!(log.step(&mut pass).is_empty(), "what a cut left half is no damage");
        assert_eq!(pass.checked_to, before);
        // Of the log that is there now, no position of the old one is believed.
        log.damage(0);
        assert_eq!(log.step(&mut pass), [0]);
    }

    #[test]
    fn damaged_parts_are_looked_at_in_turn() {
        let mut pass = Pass::default();
        let parts: Vec<_> = (0..10).map(|segment| DamagedPart::Log { segment }).collect();
        assert_eq!(pass.again(&parts), parts[..AGAIN]);
        assert_eq!(pass.again(&parts), parts[AGAIN..]);
        assert_eq!(pass.again(&parts), parts[..AGAIN]);
        assert!(pass.again(&[]).is_empty());
    }

    #[test]
    fn the_age_of_a_check_is_counted_from_when_its_group_was_seen_until_there_is_one() {
        let mut pass = Pass::begin(Duration::from_secs(20));
        let age = |pass: &Pass| pass.age(Duration::from_secs(50));
        assert_eq!(age(&pass), Duration::from_secs(30));
        pass.stepped = Duration::from_secs(45);
        assert_eq!(age(&pass), Duration::from_secs(5));
    }
}
