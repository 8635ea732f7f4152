//! Two primaries after a failover that one of them has not heard of: each slot has a backup of each
//! branch, and the one of the other branch is none of this one's.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tidelog::backup::{BackupEntry, Outcome, Reigns};
use tidelog::group::Point;
use tidelog::io::ManualClock;
use tidelog::log::control::{Control, PolicyRecord};
use tidelog::units::{LogTime, Span};

use super::rig::*;
use super::{alarm_states, scheduled};
use crate::support::wait_for;

/// A pair whose secondary was promoted while the primary was cut off and went on writing.
fn parted() -> (Pair, Arc<ManualClock>, LogTime) {
    let settings = json!({"placement": "primary-only", "deadline": "5m", "run_limit": "1m"});
    let (pair, clock, slot) = scheduled(settings);
    pair.link.set_lost(Duration::from_secs(600));
    *pair.link.groups.write().unwrap() = None;
    pair.write(0, &noise(1 << 20, 7));
    pair.a.group().sync_now().unwrap();
    clock.advance(Duration::from_secs(10));
    pair.b.group().promote("test").unwrap();
    (pair, clock, slot)
}

fn of_slot(pair: &Pair, node: &Node, slot: LogTime) -> Vec<BackupEntry> {
    let list = pair.list(node).into_iter();
    list.filter(|entry| entry.slot == slot && entry.id.is_some()).collect()
}

/// A stale primary that saw the repository took the slot: the one that hosts wrote to skipped it as
/// done, nothing was overdue, and the list had it as good.
#[test]
fn a_slot_that_the_other_branch_has_made_is_made_for_this_one_too_and_lists_say_which_is_which() {
    let (pair, clock, slot) = parted();
    clock.advance(Duration::from_secs(50));
    for node in [&pair.a, &pair.b] {
        let done = node.await_event("backup-done");
        assert_eq!(done.details["slot"], slot.to_string());
    }
    for (node, this) in [(&pair.a, "a"), (&pair.b, "b")] {
        let made = wait_for("both backups", || {
            let made = of_slot(&pair, node, slot);
            (made.len() == 2).then_some(made)
        });
        for entry in made {
            assert_eq!(entry.outcome, Outcome::Done, "{entry:?}");
            let why = entry.branch.as_deref();
            assert_eq!(why.is_none(), entry.node == name(this), "{this}: {entry:?}");
            assert!(why.is_none_or(|why| why.contains("another branch")), "{why:?}");
        }
    }
}

#[test]
fn a_slot_that_only_the_other_branch_has_made_is_overdue_here() {
    let (pair, clock, slot) = parted();
    pair.b.scheduler.shutdown();
    clock.advance(Duration::from_secs(50));
    pair.a.await_event("backup-done");
    clock.advance(Duration::from_secs(1200));
    let inside = pair.runtime.enter();
    let later = (pair.b.new_scheduler)();
    drop(inside);
    let alarm = wait_for("the alarm", || later.alarms().into_iter().next());
    assert_eq!((alarm.slot, alarm.state.as_str()), (slot, "overdue"));
    later.shutdown();
    assert_eq!(alarm_states(&pair.a), Vec::new());
}

/// The clock of a copy is sure of no more than what was measured: the record of the reign that it
/// began got an hour of before the slot, and the backup of before did not count any more.
#[test]
fn a_backup_of_before_a_reign_counts_where_only_the_reign_s_own_record_is_dated_before_the_slot() {
    let (pair, clock) = Pair::by_clock(json!({}));
    pair.write(0, &noise(1 << 20, 7));
    let group = pair.a.group();
    let reign = || {
        group.demote().unwrap();
        group.promote("test").unwrap();
    };
    // Who reigns first becomes a member by a record of its own.
    reign();
    let before = group.resolve_point(&Point::Now).unwrap();
    reign();
    let slot = time("2100-01-01T00:00:00Z");
    let why_not = || Reigns::of(&group, slot).why_not(before.epoch, before.lsn, false);
    assert_eq!(why_not(), None);
    pair.write(0, &noise(1 << 20, 8));
    let why = why_not().unwrap_or_default();
    assert!(why.contains("in which its slot came"), "{why}");
    // Also where the log begins there, since all of it is in the base.
    let policy = PolicyRecord { window: Span::default(), ..PolicyRecord::default() };
    group.append_control(Control::Policy(policy)).unwrap();
    clock.advance(Duration::from_secs(5));
    group.sync_now().unwrap();
    group.fold_now().unwrap();
    let positions = group.positions();
    assert_eq!(positions.horizon, positions.head);
    assert_eq!(why_not().unwrap_or_default(), why);
}
