//! What is remembered and told of slots: behind a clock that was wrong, of slots that another node
//! made, of jobs that are gone, and of snapshots without a result.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use tidelog::backup::{BackupEntry, Outcome};

use super::rig::*;
use super::{alarm_states, scheduled, unmade};
use crate::support::wait_for;

const YEAR: Duration = Duration::from_secs(365 * 86_400);

#[test]
fn a_clock_that_was_a_year_ahead_keeps_no_slot_from_its_backup() {
    let (pair, clock, slot) = scheduled(json!({"placement": "primary-only", "deadline": "5m"}));
    clock.set_wall(slot.after(YEAR));
    let ahead = pair.a.await_any(&["backup-done"]);
    assert_eq!(ahead.details["slot"], slot.after(YEAR).to_string());
    // By command too.
    clock.set_wall(slot.after(YEAR + Duration::from_secs(30)));
    pair.run(&pair.a);
    pair.a.await_any(&["backup-done"]);
    clock.set_wall(slot);
    let done = pair.a.await_any(&["backup-done", "backup-failed", "backup-skipped"]);
    assert_eq!((done.code.as_str(), &done.details["slot"]), ("backup-done", &json!(slot)));
    let day = Duration::from_secs(86_400);
    clock.advance(day);
    let done = pair.a.await_any(&["backup-done", "backup-failed", "backup-skipped"]);
    let next = json!(slot.after(day));
    assert_eq!((done.code.as_str(), &done.details["slot"]), ("backup-done", &next));
}

#[test]
fn a_peer_whose_clock_is_ahead_starts_nothing_here() {
    let (pair, _clock, slot) = scheduled(json!({"placement": "primary-only"}));
    let key = ("a".to_owned(), "backup.start".to_owned());
    let handler = pair.link.handlers.lock().unwrap()[&key].clone();
    let group = pair.a.group();
    let job = group.control().jobs[0].id;
    let start = |slot| {
        let call = json!({ "group": group.id(), "job": job, "slot": slot });
        pair.runtime.block_on(handler(name("b"), call))
    };
    let refused = start(slot.after(YEAR)).unwrap_err();
    assert!(refused.contains("set the clocks of both nodes"), "{refused}");
    start(slot).unwrap();
    assert_eq!(pair.a.await_any(&["backup-done"]).details["slot"], json!(slot));
}

#[test]
fn a_slot_that_another_node_made_is_not_missed_by_the_one_that_was_away() {
    let (mut pair, clock, slot) = scheduled(json!({"placement": "primary-only", "deadline": "5m"}));
    pair.b.scheduler.shutdown();
    clock.advance(Duration::from_secs(60));
    pair.a.await_event("backup-done");
    let day = Duration::from_secs(86_400);
    clock.advance(Duration::from_secs(3600));
    let inside = pair.runtime.enter();
    pair.b.scheduler = (pair.b.new_scheduler)();
    drop(inside);
    clock.set_wall(slot.after(day));
    let next = wait_for("the next slot", || {
        let event = pair.b.events.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_ne!(event.code, "backup-missed", "{event:?}");
        (event.details["slot"] == json!(slot.after(day))).then_some(event)
    });
    assert!(["backup-skipped", "backup-delegated"].contains(&next.code.as_str()), "{next:?}");
    let listed = pair.list(&pair.b);
    assert!(listed.iter().all(|entry| entry.outcome != Outcome::Missed), "{listed:?}");
}

#[test]
fn the_alarm_of_a_slot_ends_with_its_job() {
    let (pair, _) = unmade();
    for node in [&pair.a, &pair.b] {
        wait_for("the alarm", || (!alarm_states(node).is_empty()).then_some(()));
    }
    pair.a.scheduler.remove_job("g", "nightly").unwrap();
    pair.link.ship();
    for node in [&pair.a, &pair.b] {
        wait_for("the alarm to end", || alarm_states(node).is_empty().then_some(()));
    }
}

#[test]
fn a_snapshot_without_a_result_is_running_only_while_its_run_may_be() {
    let settings = json!({"placement": "primary-only", "deadline": "5m", "run_limit": "10m"});
    let (pair, clock) = Pair::by_clock(settings);
    pair.run(&pair.a);
    pair.a.await_event("backup-done");
    let only = |dir: PathBuf| std::fs::read_dir(dir).unwrap().next().unwrap().unwrap().path();
    let slot = only(only(pair.dir.path().join("repository/tidelog/slots")));
    let listed = || -> BackupEntry {
        wait_for("the backup to be listed", || {
            let mut list = pair.list(&pair.a).into_iter();
            list.find(|entry| entry.id.is_some() || entry.unreachable.is_some())
        })
    };
    assert_eq!(listed().outcome, Outcome::Done);
    // A result that cannot be read is not one that is not there.
    let result = slot.join("result");
    let aside = pair.dir.path().join("aside");
    std::fs::rename(&result, &aside).unwrap();
    std::fs::create_dir(&result).unwrap();
    let unread = listed();
    assert!(unread.outcome == Outcome::Done && unread.unreachable.is_some(), "{unread:?}");
    std::fs::remove_dir(&result).unwrap();
    assert_eq!(listed().outcome, Outcome::Running);
    clock.advance(Duration::from_secs(5 * 60 + 10 * 60 + 600 + 1));
    let over = listed();
    assert_eq!((over.outcome, codes(&over.reasons).last()), (Outcome::Failed, Some(&"no-result")));
    std::fs::rename(&aside, &result).unwrap();
    assert_eq!(listed().outcome, Outcome::Done);
}
