//! What is remembered and told of slots: behind a clock that was wrong, of slots that another node
//! made, of jobs that are gone, and of snapshots without a result.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use tidelog::backup::{BackupEntry, JobChange, Outcome};

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

/// A `job set` that was repeated at intervals let what was overdue be forgotten.
#[test]
fn an_overdue_slot_stays_overdue_when_its_job_is_set_again() {
    let settings = json!({"placement": "primary-only", "deadline": "5m", "run_limit": "10m"});
    let (mut pair, clock, slot) = scheduled(settings.clone());
    let change = JobChange {
        repository: Some("main".to_owned()),
        schedule: Some("1 2 * * *".to_owned()),
        settings: settings.as_object().unwrap().clone(),
        ..JobChange::default()
    };
    pair.a.scheduler.set_job("g", name("weekly"), change).unwrap();
    pair.link.ship();
    let alarms = |node: &Node| -> Vec<String> {
        let alarms = node.scheduler.alarms().into_iter();
        alarms.filter(|alarm| alarm.slot == slot).map(|alarm| alarm.job.to_string()).collect()
    };
    // Nobody was awake while a run might have brought the backup.
    clock.advance(Duration::from_secs(60 + 5 * 60 + 10 * 60 + 600));
    for node in [&pair.a, &pair.b] {
        wait_for("the alarms", || (alarms(node) == ["nightly", "weekly"]).then_some(()));
    }
    pair.set_job("nightly", json!({"grace": "2s"}));
    let head = pair.a.group().positions().head;
    pair.set_job("nightly", json!({"grace": "2000ms"}));
    assert_eq!(pair.a.group().positions().head, head, "nothing changed, nothing is appended");
    pair.a.scheduler.remove_job("g", "weekly").unwrap();
    pair.link.ship();
    for node in [&pair.a, &pair.b] {
        wait_for("one alarm to end", || (alarms(node).len() < 2).then_some(()));
        assert_eq!(alarms(node), ["nightly"]);
    }
    // One that is started anew finds it overdue too.
    pair.b.scheduler.shutdown();
    let inside = pair.runtime.enter();
    pair.b.scheduler = (pair.b.new_scheduler)();
    drop(inside);
    wait_for("the alarm", || (alarms(&pair.b) == ["nightly"]).then_some(()));
}

#[test]
fn a_slot_that_waits_outlives_a_change_of_its_job_and_a_restart() {
    let (mut pair, clock, slot) = scheduled(json!({"max_lag": "10s"}));
    pair.link.set_lag(Duration::from_secs(60));
    clock.advance(Duration::from_secs(60));
    for node in [&pair.a, &pair.b] {
        pair.await_open(node, slot);
    }
    pair.set_job("nightly", json!({"grace": "2s"}));
    pair.link.ship();
    let inside = pair.runtime.enter();
    for node in [&mut pair.a, &mut pair.b] {
        node.scheduler.shutdown();
        node.scheduler = (node.new_scheduler)();
    }
    drop(inside);
    for node in [&pair.a, &pair.b] {
        pair.await_open(node, slot);
    }
    pair.link.set_lag(Duration::ZERO);
    assert_eq!(pair.b.await_any(&["backup-done"]).details["slot"], json!(slot));
}

#[test]
fn a_retired_copy_keeps_no_time_until_it_is_taken_up_again() {
    let (pair, slot) = unmade();
    for node in [&pair.a, &pair.b] {
        wait_for("the alarm", || (!alarm_states(node).is_empty()).then_some(()));
    }
    pair.b.group().set_retired(true).unwrap();
    wait_for("the alarm to end", || alarm_states(&pair.b).is_empty().then_some(()));
    assert_eq!(alarm_states(&pair.a).len(), 1, "the primary has it still");
    // Taken up again, it looks for the same slot.
    pair.b.group().set_retired(false).unwrap();
    let states = wait_for("the alarm", || Some(alarm_states(&pair.b)).filter(|s| !s.is_empty()));
    assert_eq!(states, [("overdue".to_owned(), slot)]);
}

/// Every run made a whole backup, found that it could not say so, and took it back.
#[test]
fn a_result_that_a_crash_tore_is_named_before_anything_is_made() {
    let settings = json!({"placement": "primary-only", "deadline": "5m", "run_limit": "10m"});
    let (pair, clock, slot) = scheduled(settings);
    let job = pair.a.group().control().jobs[0].id;
    let tidelog = pair.dir.path().join("repository/tidelog");
    let dir = tidelog.join(format!("slots/{job}/2026-11-24T02-01-00.000000000Z"));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("result"), "{\"node\":").unwrap();
    clock.advance(Duration::from_secs(60));
    let failed = pair.a.await_any(&["backup-failed", "backup-done"]);
    assert_eq!((failed.code.as_str(), &failed.details["slot"]), ("backup-failed", &json!(slot)));
    assert!(failed.text.contains("000Z/result in the repository is cut short"), "{failed:?}");
    let snapshots = pair.dir.path().join("repository/snapshots");
    assert_eq!(std::fs::read_dir(snapshots).unwrap().count(), 0);
    clock.advance(Duration::from_secs(5 * 60 + 10 * 60 + 600));
    let alarm = pair.a.await_any(&["backup-unknown", "backup-overdue"]);
    assert!(alarm.code == "backup-unknown" && alarm.text.contains("/result in"), "{alarm:?}");
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
