//! What happens to the copy while its backup is being made.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tidelog::backup::{Outcome, Verdict};
use tidelog::events::Severity;
use tidelog::group::Role;
use tidelog::io::{Env, ManualClock};
use tidelog::log::control::{Control, PolicyRecord};
use tidelog::units::Span;

use super::rig::*;
use super::{alarm_states, failures, scheduled};
use crate::support::wait_for;

/// The ids of all backups of a slot, whichever node lists them.
fn made(pair: &Pair, node: &Node) -> Vec<String> {
    pair.list(node).into_iter().filter_map(|entry| entry.id).collect()
}

#[test]
fn a_lag_gate_that_is_crossed_while_the_backup_runs_lets_it_end_and_is_told() {
    let pair = Pair::new(json!({"max_lag": "30s"}));
    let link = Arc::clone(&pair.link);
    pair.b.at_start(move || link.set_lag(Duration::from_secs(300)));
    let before = pair.live();
    pair.run(&pair.a);
    let done = pair.b.await_event("backup-done");
    assert!(done.text.contains("at its end: the copy on b is 5m old"), "{}", done.text);
    pair.a.await_event("backup-delegated");
    let [id] = &made(&pair, &pair.a)[..] else { panic!("one backup") };
    assert!(pair.restored(id) == before, "the image is that of when it was opened");
    // The next one is judged by what is so now.
    let next = pair.run(&pair.a);
    assert!(next.decision.reasons.iter().any(|reason| reason.code == "lag-above-limit"));
}

#[test]
fn a_secondary_that_is_promoted_in_mid_backup_ends_it_and_each_branch_has_one() {
    let pair = Pair::new(json!({"grace": "1s"}));
    let (link, group) = (Arc::clone(&pair.link), pair.b.group());
    pair.b.at_start(move || {
        link.set_lost(Duration::from_secs(600));
        group.promote("test").unwrap();
    });
    let before = pair.live();
    pair.run(&pair.a);
    let done = pair.b.await_event("backup-done");
    assert!(done.text.contains("b became primary while the backup ran"), "{}", done.text);
    assert_eq!(pair.b.group().role(), Role::Primary);
    // The old primary, cut off, goes on: what is in the new one's reign is no backup of its own.
    let ended = pair.a.await_any(&["backup-delegated", "backup-skipped", "backup-done"]);
    assert_eq!(ended.code, "backup-done", "{ended:?}");
    let ids = made(&pair, &pair.a);
    assert_eq!(ids.len(), 2, "{ids:?}");
    assert!(ids.iter().all(|id| pair.restored(id) == before));
}

/// Its clock stands still, and nothing reaches it.
#[test]
fn a_secondary_that_is_paused_in_mid_backup_loses_the_slot_and_what_it_makes_later_is_nothing() {
    let clocks = ["a", "b"].map(|_| Arc::new(ManualClock::new(time("2026-11-24T02:00:00Z"))));
    let envs = clocks.clone().map(|clock| Env { clock, ..Env::real() });
    let pair = Pair::in_envs(json!({}), envs);
    // It waits for what the primary held when the slot came, with its claim in the repository.
    pair.write(5 << 20, &noise(4096, 2));
    let before = pair.live();
    let groups = pair.link.groups.write().unwrap().take();
    let run = pair.run(&pair.a);
    assert_eq!(run.decision.run_on, Some(name("b")));
    let repository = pair.dir.path().join("repository");
    let only = |dir: &Path| Some(std::fs::read_dir(dir).ok()?.next()?.ok()?.path());
    wait_for("the claim to be renewed", || {
        let slot = only(&only(&repository.join("tidelog/slots"))?)?;
        slot.join("renewed-0001").exists().then_some(())
    });
    wait_for("the primary to take the slot over", || {
        // Slowly: the repository's answers are believed for 30 s of this clock.
        clocks[0].advance(Duration::from_secs(5));
        let event = pair.a.events.recv_timeout(Duration::from_millis(100)).ok()?;
        (event.code == "backup-started").then_some(())
    });
    pair.a.await_event("backup-done");

    *pair.link.groups.write().unwrap() = groups;
    pair.link.ship();
    let late = pair.b.await_event("backup-superseded");
    assert_eq!(late.severity, Severity::Warning);
    assert!(late.text.contains("a finished the slot first"), "{}", late.text);
    let snapshots = std::fs::read_dir(repository.join("snapshots")).unwrap().count();
    assert_eq!(snapshots, 1, "what b has made is taken back");
    let entry = pair.entry(&pair.b, &run, "b");
    assert_eq!((entry.outcome, entry.run_on), (Outcome::Superseded, Some(name("a"))));
    let [id] = &made(&pair, &pair.b)[..] else { panic!("one backup") };
    assert!(pair.restored(id) == before);
}

#[test]
fn a_secondary_that_loses_the_repository_leaves_the_slot_to_the_primary() {
    let pair = Pair::new(json!({}));
    let way = way_to_repository(pair.dir.path(), "b");
    std::fs::remove_file(&way).unwrap();
    let explain = pair.b.scheduler.explain("g", "nightly", &[]);
    let decision = pair.runtime.block_on(explain).unwrap().decision;
    assert_eq!((decision.decision, &decision.run_on), (Verdict::Delegate, &Some(name("a"))));
    assert_eq!(codes(&decision.reasons), ["primary-takes-over", "repository-unreachable"]);
    assert!(decision.reasons[1].text.contains("cannot be opened from b"), "{decision:?}");
    let run = pair.run(&pair.a);
    assert_eq!(run.decision.decision, Verdict::Run);
    assert_eq!(codes(&run.decision.reasons), codes(&decision.reasons));
    pair.a.await_event("backup-done");
    let ended = pair.b.await_any(&["backup-delegated", "backup-skipped", "backup-failed"]);
    assert!(ended.text.contains("a has made the backup of this slot"), "{ended:?}");
    std::os::unix::fs::symlink("repository", way).unwrap();
    let [id] = &made(&pair, &pair.b)[..] else { panic!("one backup") };
    assert!(pair.restored(id) == pair.live());
}

#[test]
fn a_primary_that_loses_the_repository_leaves_the_slot_to_the_secondary() {
    let pair = Pair::new(json!({"placement": "prefer-primary"}));
    let way = way_to_repository(pair.dir.path(), "a");
    std::fs::remove_file(&way).unwrap();
    let explained = wait_for("b to have looked at the repository", || {
        let explain = pair.a.scheduler.explain("g", "nightly", &[]);
        let decision = pair.runtime.block_on(explain).unwrap().decision;
        (decision.decision == Verdict::Delegate).then_some(decision)
    });
    assert_eq!(explained.run_on, Some(name("b")), "{explained:?}");
    let reasons = ["secondary-takes-over", "repository-unreachable"];
    assert_eq!(codes(&explained.reasons), reasons, "{explained:?}");
    assert!(explained.reasons[1].text.contains("cannot be opened from a"), "{explained:?}");
    let run = pair.run(&pair.a);
    assert_eq!(run.decision.decision, Verdict::Delegate, "{run:?}");
    pair.b.await_event("backup-done");
    let ended = pair.a.await_any(&["backup-delegated", "backup-skipped", "backup-failed"]);
    assert_eq!(ended.code, "backup-delegated", "{ended:?}");
    std::os::unix::fs::symlink("repository", way).unwrap();
    let [id] = &made(&pair, &pair.a)[..] else { panic!("one backup") };
    assert!(pair.restored(id) == pair.live());
}

#[test]
fn a_repository_out_of_reach_from_both_nodes_fails_the_run_with_the_reason_of_each() {
    let pair = Pair::new(json!({}));
    for this in ["a", "b"] {
        std::fs::remove_file(way_to_repository(pair.dir.path(), this)).unwrap();
    }
    pair.run(&pair.a);
    let failed = pair.a.await_any(&["backup-delegated", "backup-skipped", "backup-failed"]);
    assert_eq!(failed.code, "backup-failed", "{failed:?}");
    for node in ["a", "b"] {
        assert!(failed.text.contains(&format!("cannot be opened from {node}")), "{failed:?}");
    }
}

/// A disk that is not mounted: status said that nothing needs an operator until the time of the
/// slot was over, and all advice was to make a new repository in its place.
#[test]
fn a_run_that_failed_is_told_until_a_later_backup_and_no_repository_takes_the_place_of_another() {
    let (pair, clock, slot) = scheduled(json!({"placement": "primary-only"}));
    pair.run(&pair.a);
    pair.a.await_event("backup-done");
    assert_eq!(made(&pair, &pair.a).len(), 1, "it was seen");
    let init = |force| {
        let made = pair.runtime.block_on(pair.a.scheduler.repository_init("main", force));
        made.unwrap_err().to_string()
    };
    assert!(init(true).contains("exists already"));
    let (repository, away) = (pair.dir.path().join("repository"), pair.dir.path().join("away"));
    std::fs::rename(&repository, &away).unwrap();
    clock.advance(Duration::from_secs(60));
    let event = pair.a.await_event("backup-failed");
    assert!(event.text.contains("mount the file system that it is on"), "{event:?}");
    wait_for("it to be told", || (failures(&pair.a) == [slot]).then_some(()));
    assert!(alarm_states(&pair.a).is_empty());
    let told = &pair.a.scheduler.failures()[0];
    assert!(told.text.contains("does not exist at"), "{told:?}");
    let refused = init(false);
    assert!(refused.contains("backups were in it (1); mount"), "{refused}");
    std::fs::rename(&away, &repository).unwrap();
    clock.advance(Duration::from_secs(61));
    pair.run(&pair.a);
    pair.a.await_event("backup-done");
    wait_for("it to be made up for", || failures(&pair.a).is_empty().then_some(()));
}

/// Hosts write over all of the image, and folds go past it, between its opening and its first read.
#[test]
fn a_long_backup_is_of_one_moment_while_folds_go_past_its_image() {
    let pair = Pair::new(json!({"placement": "primary-only"}));
    let group = pair.a.group();
    let policy = PolicyRecord { window: Span::default(), ..PolicyRecord::default() };
    group.append_control(Control::Policy(policy)).unwrap();
    let before = pair.live();
    // The copy is left behind: the log is not kept for it.
    *pair.link.groups.write().unwrap() = None;
    let (run, hanging) = pair.run_that_hangs();
    let image = wait_for("its image", || group.images().into_iter().next());
    let opened = image.position().lsn;
    drop(image);
    for turn in 0..3 {
        pair.write(0, &noise(VOLUME_BYTES, 100 + turn));
        let head = group.positions().head;
        wait_for("a fold past it", || {
            group.sync_now().unwrap();
            group.fold_now().unwrap();
            (group.positions().horizon == head).then_some(())
        });
        assert!(opened < head);
    }
    let [image] = &group.images()[..] else { panic!("one image") };
    let kept = image.cost().disk_bytes;
    assert!(kept > 0, "what was overwritten is kept for it");
    hanging.end();
    pair.a.await_event("backup-done");
    let id = pair.entry(&pair.a, &run, "a").id.unwrap();
    assert!(pair.restored(&id) == before, "the image is that of when it was opened");
    assert!(pair.live() != before);
    wait_for("its image to be closed", || group.images().is_empty().then_some(()));
}
