//! Who makes the backup of two nodes, what the other says, and that a slot never gets two.

mod branches;
mod clocks;
mod faults;
mod overlap;
mod parents;
mod partitions;
mod rig;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use serde_json::{Value, json};
use tidelog::backup::{JobChange, Outcome, PeerHandler, Progress, RestoreTarget, Verdict};
use tidelog::events::Severity;
use tidelog::group::Role;
use tidelog::io::{Env, ManualClock};
use tidelog::log::control::{Control, MemberRecord, Mode};
use tidelog::units::{LogTime, Span};

use crate::support::{PATIENCE, wait_for};
use rig::*;

#[test]
fn the_secondary_backs_up_and_the_primary_stands_down_until_the_link_is_cut() {
    let pair = Pair::new(json!({"grace": "1s"}));
    pair.write(5 << 20, &noise(4096, 2));
    let first = pair.run(&pair.a);
    assert_eq!(first.decision.decision, Verdict::Delegate);
    assert_eq!(first.decision.run_on, Some(name("b")));
    assert_eq!(first.told, [name("b")]);
    pair.b.await_event("backup-done");
    pair.a.await_event("backup-delegated");
    let made = pair.entry(&pair.b, &first, "b");
    assert_eq!((made.outcome, made.role), (Outcome::Done, Role::Secondary));
    assert_eq!(codes(&made.reasons), ["secondary-fit"]);
    let stood_down = pair.entry(&pair.a, &first, "a");
    assert_eq!((stood_down.outcome, stood_down.id.clone()), (Outcome::Delegated, None));
    assert_eq!(stood_down.run_on, Some(name("b")));
    let first_id = made.id.unwrap();
    assert!(pair.restored(&first_id) == pair.live(), "what was answered before the slot is in it");

    // The link is cut for longer than the grace: the primary goes on with the secondary's chain.
    pair.link.set_lost(Duration::from_secs(5));
    pair.write(0, &noise(4096, 3));
    let second = pair.run(&pair.a);
    assert_eq!(second.decision.decision, Verdict::Run);
    assert_eq!(
        codes(&second.decision.reasons)[..2],
        ["primary-takes-over", "secondary-unreachable"]
    );
    assert!(second.told.is_empty(), "b cannot be told");
    pair.a.await_event("backup-done");
    let made = pair.entry(&pair.a, &second, "a");
    assert_eq!((made.outcome, made.role), (Outcome::Done, Role::Primary));
    assert!(made.bytes_read <= 4 << 20, "one file changed, {} bytes were read", made.bytes_read);
    let second_id = made.id.unwrap();
    assert!(pair.restored(&second_id) == pair.live());
    assert!(pair.restored(&first_id[..12]) != pair.live(), "the first is what it was");
    let verified = pair.b.scheduler.verify(&second_id, Progress::new());
    assert_eq!(pair.runtime.block_on(verified).unwrap().bytes, VOLUME_BYTES as u64);
}

#[test]
fn a_run_by_command_is_told_to_every_node_that_holds_the_group() {
    let pair = Pair::new(json!({"placement": "primary-only"}));
    let third: PeerHandler = Arc::new(|_, _| Box::pin(async { Ok(json!({})) }));
    let key = ("c".to_owned(), "backup.start".to_owned());
    pair.link.handlers.lock().unwrap().insert(key, third);
    let mut member = pair.a.group().control().members[0].clone();
    (member.node, member.name) = (node_id("c"), name("c"));
    pair.a.group().append_control(Control::Member(member)).unwrap();
    pair.link.ship();
    assert_eq!(pair.run(&pair.a).told, [name("b"), name("c")]);
    pair.a.await_event("backup-done");
    assert_eq!(pair.run(&pair.b).told, [name("a"), name("c")]);
}

#[test]
fn a_secondary_that_was_away_when_a_command_came_is_told_when_it_is_back() {
    let pair = Pair::new(json!({"grace": "1h"}));
    // What a knows of b is fit.
    pair.runtime.block_on(pair.a.scheduler.explain("g", "nightly", &[])).unwrap();
    pair.link.set_lost(Duration::from_secs(1));
    let run = pair.run(&pair.a);
    assert_eq!((run.decision.decision, run.told.len()), (Verdict::Wait, 0));
    assert_eq!(run.not_told, ["b: the link is down"]);
    pair.link.set_lost(Duration::ZERO);
    pair.b.await_event("backup-done");
    pair.a.await_event("backup-delegated");
    assert_eq!(pair.entry(&pair.b, &run, "b").outcome, Outcome::Done);
}

#[test]
fn a_secondary_only_job_fails_aloud_where_the_link_is_cut() {
    let pair = Pair::new(json!({"placement": "secondary-only", "grace": "1s"}));
    pair.link.set_lost(Duration::from_secs(5));
    let run = pair.run(&pair.a);
    assert_eq!(run.decision.decision, Verdict::Fail);
    let event = pair.a.await_event("backup-failed");
    assert_eq!(event.severity, Severity::Error);
    assert!(event.text.contains("unreachable"), "{}", event.text);
    let entry = pair.entry(&pair.a, &run, "a");
    assert_eq!((entry.outcome, entry.id), (Outcome::Failed, None));
    assert!(codes(&entry.reasons).contains(&"secondary-unreachable"));
    assert!(codes(&entry.reasons).contains(&"not-permitted"));
}

#[test]
fn both_nodes_wait_for_a_secondary_that_is_behind_and_a_second_run_is_skipped() {
    let pair = Pair::new(json!({"max_lag": "10s"}));
    pair.link.set_lag(Duration::from_secs(60));
    let first = pair.run(&pair.a);
    assert_eq!(first.decision.decision, Verdict::Wait);
    assert_eq!(codes(&first.decision.reasons), ["lag-above-limit"]);
    let second = pair.run(&pair.b);
    assert_eq!(second.decision.decision, Verdict::Skip);
    assert_eq!(codes(&second.decision.reasons), ["already-running"]);
    pair.a.await_event("backup-skipped");
    pair.b.await_event("backup-skipped");
    pair.link.set_lag(Duration::ZERO);
    pair.b.await_event("backup-done");
    let entry = pair.entry(&pair.b, &first, "b");
    assert_eq!(entry.outcome, Outcome::Done);
    let backups = pair.list(&pair.b).into_iter().filter(|entry| entry.id.is_some()).count();
    assert_eq!(backups, 1);
}

#[test]
fn the_explanation_is_the_same_on_both_nodes_and_assumptions_turn_it() {
    let pair = Pair::new(json!({}));
    let explain = |node: &Node, assume: &[(&str, &str)]| {
        let assume: Vec<_> =
            assume.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        pair.runtime.block_on(node.scheduler.explain("g", "nightly", &assume)).unwrap()
    };
    let (a, b) = (explain(&pair.a, &[]), explain(&pair.b, &[]));
    assert_eq!(a.decision.decision, Verdict::Delegate, "{a:?}");
    assert_eq!(b.decision.decision, Verdict::Run, "{b:?}");
    assert_eq!(a.decision.run_on, b.decision.run_on);
    assert_eq!((a.node, b.node), (name("a"), name("b")));
    assert!(b.inputs["secondary.memory_free_bytes"]["value"].as_u64().unwrap() > 0);
    for (assume, on_a, on_b) in [
        (("secondary.available", "false"), Verdict::Run, Verdict::Delegate),
        (("secondary.repository", "false"), Verdict::Run, Verdict::Delegate),
        (("replication.lag_seconds", "300"), Verdict::Wait, Verdict::Wait),
        (("placement", "primary-only"), Verdict::Run, Verdict::Skip),
    ] {
        assert_eq!(explain(&pair.a, &[assume]).decision.decision, on_a, "{assume:?}");
        assert_eq!(explain(&pair.b, &[assume]).decision.decision, on_b, "{assume:?}");
    }
    assert!(pair.list(&pair.a).is_empty(), "nothing was run");
}

#[test]
fn a_secondary_that_never_claims_loses_the_slot_within_the_grace() {
    let pair = Pair::new(json!({"grace": "1s"}));
    // b answers as if it were fit, and never begins.
    let mute: PeerHandler = Arc::new(|_, _| Box::pin(async { Ok(json!({})) }));
    for method in ["backup.start", "backup.publish"] {
        let key = ("b".to_owned(), method.to_owned());
        pair.link.handlers.lock().unwrap().insert(key, mute.clone());
    }
    let run = pair.run(&pair.a);
    assert_eq!(run.decision.decision, Verdict::Delegate);
    pair.a.await_event("backup-done");
    let entry = pair.entry(&pair.a, &run, "a");
    assert_eq!((entry.outcome, entry.role), (Outcome::Done, Role::Primary));
    assert!(codes(&entry.reasons).contains(&"gave-up"), "{:?}", entry.reasons);
}

#[test]
fn a_backup_is_restored_into_a_volume_unless_hosts_use_it() {
    let pair = Pair::new(json!({"placement": "primary-only"}));
    let before = pair.live();
    let run = pair.run(&pair.a);
    pair.a.await_event("backup-done");
    let id = pair.entry(&pair.a, &run, "a").id.unwrap();
    pair.write(1 << 20, &noise(2 << 20, 9));
    assert!(pair.live() != before);
    let target = RestoreTarget::Volume { group: name("g"), volume: name("v") };
    let restore = |node: &Node| {
        let restore = node.scheduler.restore(&id, None, target.clone(), Progress::new());
        pair.runtime.block_on(restore)
    };
    let group = pair.a.group();
    let client = group.client(group.control().volumes[0].number).unwrap();
    let refused = restore(&pair.a).unwrap_err().to_string();
    assert!(refused.contains("connected"), "{refused}");
    drop(client);
    let refused = restore(&pair.b).unwrap_err().to_string();
    assert!(refused.contains("primary"), "{refused}");
    // The group tells its listeners of all that the restore appends.
    let restored = || group.control().volumes[0].restore_lsn;
    let (begin, volume) = (group.positions().head, group.control().volumes[0].number);
    let alone = Arc::new(AtomicUsize::new(0));
    let (watched, count) = (Arc::downgrade(&group), alone.clone());
    group.subscribe(Box::new(move || {
        let Some(group) = watched.upgrade() else { return false };
        count.fetch_add(usize::from(group.check_unclaimed(volume).is_err()), Ordering::Relaxed);
        true
    }));
    assert_eq!(restored(), None);
    restore(&pair.a).unwrap();
    assert!(pair.live() == before);
    assert!(alone.load(Ordering::Relaxed) > 0, "nobody else was served the volume meanwhile");
    assert_eq!(restored(), Some(begin), "and the volume says so");
    drop(group.client(volume).unwrap());
}

#[test]
fn a_restore_in_sync_mode_is_done_when_a_flush_would_be() {
    let pair = Pair::new(json!({"placement": "primary-only"}));
    let run = pair.run(&pair.a);
    pair.a.await_event("backup-done");
    let id = pair.entry(&pair.a, &run, "a").id.unwrap();
    let (group, b) = (pair.a.group(), node_id("b"));
    let member = MemberRecord { mode: Mode::Sync, ..group.control().members[0].clone() };
    group.append_control(Control::Member(member)).unwrap();
    for lost in [false, true] {
        let head = group.positions().head;
        group.note_peer_holds(b, head, head);
        let target = RestoreTarget::Volume { group: name("g"), volume: name("v") };
        let (scheduler, id) = (Arc::clone(&pair.a.scheduler), id.clone());
        let (done, answer) = channel();
        pair.runtime.spawn(async move {
            done.send(scheduler.restore(&id, None, target, Progress::new()).await)
        });
        wait_for("all of the restore to be durable here", || {
            let (volume, at) = (&group.control().volumes[0], group.positions());
            let ended = volume.restore_lsn >= Some(head) && !volume.restoring;
            (ended && at.durable == at.head).then_some(())
        });
        let end = group.positions().head;
        group.note_peer_holds(b, end, head);
        let early = answer.recv_timeout(Duration::from_millis(300));
        assert!(early.is_err(), "done, and the peer has it in memory only: {early:?}");
        if lost {
            group.note_peer_lost(b, "its link is down", end, head);
        } else {
            group.note_peer_holds(b, end, end);
        }
        answer.recv_timeout(PATIENCE).unwrap().unwrap();
    }
}

#[test]
fn a_volume_whose_restore_has_not_ended_is_in_no_backup() {
    let pair = Pair::new(json!({"placement": "primary-only"}));
    let group = pair.a.group();
    let claim = group.claim_for_restore(group.control().volumes[0].number).unwrap();
    group.begin_restore(&claim).unwrap();
    drop(claim);
    pair.run(&pair.a);
    let failed = pair.a.await_any(&["backup-run-failed", "backup-failed", "backup-done"]);
    assert_ne!(failed.code, "backup-done");
    assert!(
        failed.text.contains("a restore into it, or the reading of its base, has not come"),
        "{failed:?}"
    );
}

#[test]
fn a_schedule_makes_its_slot_once_on_one_node() {
    let pair = Pair::new(json!({}));
    let change = JobChange { schedule: Some("* * * * *".to_owned()), ..JobChange::default() };
    // The slot of the minute that is going on began before the job: put the record's time back.
    let record = pair.a.scheduler.set_job("g", name("nightly"), change).unwrap();
    let earlier = tidelog::log::control::JobRecord {
        since: record.since.before(Duration::from_secs(90)),
        settings: {
            let mut settings = record.settings.clone();
            settings.insert("deadline".to_owned(), json!(Span::from_secs(59)));
            settings
        },
        ..record
    };
    pair.a.group().append_control(Control::Job(earlier)).unwrap();
    pair.link.ship();
    let done = pair.b.await_event("backup-done");
    let delegated = pair.a.events.recv_timeout(PATIENCE);
    assert!(delegated.is_ok());
    let slot: tidelog::units::LogTime = done.details["slot"].as_str().unwrap().parse().unwrap();
    assert_eq!(slot.0 % 60_000_000_000, 0, "a whole minute: {slot}");
    let list = pair.list(&pair.b);
    let of_slot: Vec<_> = list.iter().filter(|entry| entry.slot == slot).collect();
    assert_eq!(of_slot.iter().filter(|entry| entry.id.is_some()).count(), 1, "{of_slot:?}");
}

/// A job of every minute whose secondary stayed behind waited an hour for each slot: the slots that
/// came meanwhile were skipped as "already running", and had no backup at all.
#[test]
fn a_slot_that_waits_is_decided_when_the_next_is_due_and_both_get_their_backup() {
    let (pair, clock) = Pair::by_clock(json!({"max_lag": "10s"}));
    pair.link.set_lag(Duration::from_secs(60));
    let change = JobChange { schedule: Some("* * * * *".to_owned()), ..JobChange::default() };
    pair.a.scheduler.set_job("g", name("nightly"), change).unwrap();
    pair.link.ship();
    let slots: [LogTime; 2] = [time("2026-11-24T02:01:00Z"), time("2026-11-24T02:02:00Z")];
    clock.advance(Duration::from_secs(60));
    for node in [&pair.a, &pair.b] {
        pair.await_open(node, slots[0]);
    }
    clock.advance(Duration::from_secs(60));
    let first = pair.a.await_event("backup-done");
    assert_eq!(first.details["slot"], slots[0].to_string(), "the primary takes the first");
    for node in [&pair.a, &pair.b] {
        pair.await_open(node, slots[1]);
    }
    pair.link.set_lag(Duration::ZERO);
    let second = pair.b.await_any(&["backup-done"]);
    assert_eq!(second.details["slot"], slots[1].to_string(), "and the secondary the second");
}

/// A run that hung in its repository counted as going for ever, so that every later slot was
/// skipped.
#[test]
fn a_stuck_run_ends_at_its_limit_and_the_next_slot_runs() {
    let (pair, clock) = Pair::by_clock(json!({"placement": "primary-only", "run_limit": "1h"}));
    let (hung, hanging) = pair.run_that_hangs();
    clock.advance(Duration::from_secs(1800));
    let skipped = pair.run(&pair.a);
    assert_eq!(codes(&skipped.decision.reasons), ["already-running"]);
    pair.a.await_event("backup-skipped");

    clock.advance(Duration::from_secs(1800 + 60));
    let event = pair.a.await_event("backup-failed");
    assert_eq!(event.details["slot"], hung.slot.to_string());
    assert!(event.text.contains("over its limit of 1h"), "{}", event.text);
    hanging.end();
    wait_for("the repository to be back", || {
        let explain = pair.a.scheduler.explain("g", "nightly", &[]);
        let explained = pair.runtime.block_on(explain).unwrap();
        (explained.decision.decision == Verdict::Run).then_some(())
    });
    let next = pair.run(&pair.a);
    assert_eq!(next.decision.decision, Verdict::Run);
    pair.a.await_event("backup-done");
    let entry = pair.entry(&pair.a, &hung, "a");
    assert_eq!((entry.outcome, codes(&entry.reasons)), (Outcome::Failed, vec!["run-limit"]));
}

/// Each question about a repository on a hung file system took a thread of the runtime and kept
/// it, until none was left and the node answered nothing any more.
#[test]
fn a_repository_that_hangs_is_a_fact_and_takes_no_thread_per_question() {
    let (pair, clock) = Pair::by_clock(json!({}));
    let observe = {
        let key = ("b".to_owned(), "backup.observe".to_owned());
        pair.link.handlers.lock().unwrap()[&key].clone()
    };
    let group = pair.a.group();
    let call = json!({ "group": group.id(), "job": group.control().jobs[0].id, "slot": null });
    let ask = |count: usize| -> Vec<Value> {
        let asked: Vec<_> =
            (0..count).map(|_| pair.runtime.spawn(observe(name("a"), call.clone()))).collect();
        let answers = asked.into_iter().map(|answer| {
            let patient = async { tokio::time::timeout(PATIENCE, answer).await };
            pair.runtime.block_on(patient).expect("an answer").unwrap().unwrap()
        });
        answers.map(|answer| answer["facts"].clone()).collect()
    };
    assert_eq!(ask(1)[0]["repository"], true);
    let hanging = Hanging::begin(pair.dir.path().join("repository/config"));
    let slow = ask(1).remove(0);
    assert_eq!(slow["repository"], true, "what it said a moment ago holds a while: {slow}");
    clock.advance(Duration::from_secs(31));
    for facts in ask(2 * BLOCKING_THREADS) {
        assert_eq!(facts["repository"], false, "{facts}");
        let reason = facts["repository_reason"].as_str().unwrap();
        assert!(reason.contains("no answer since 2026-11-24T02:00:00Z"), "{reason}");
    }
    hanging.end();
    wait_for("the repository to be back", || (ask(1)[0]["repository"] == true).then_some(()));
}

/// A shutdown waited for a run that hung in its repository for ever.
#[test]
fn a_shutdown_leaves_behind_what_hangs() {
    let pair = Pair::new(json!({"placement": "primary-only"}));
    let (_, hanging) = pair.run_that_hangs();
    pair.a.scheduler.shutdown();
    hanging.end();
}

/// A list hid the backups of a repository that was away, and one that was never made.
#[test]
fn backups_out_of_reach_are_listed_and_say_so() {
    let pair = Pair::new(json!({"placement": "primary-only"}));
    let run = pair.run(&pair.a);
    pair.a.await_event("backup-done");
    let made = wait_for("the run to be noted", || {
        let seen = std::fs::read_to_string(pair.dir.path().join("a/node/backup-runs")).ok()?;
        let id = pair.entry(&pair.a, &run, "a").id?;
        seen.contains(&id).then_some(id)
    });
    let (repository, away) = (pair.dir.path().join("repository"), pair.dir.path().join("away"));
    std::fs::rename(&repository, &away).unwrap();
    let list = |of: &str| {
        let of = Some(("g".to_owned(), Some(of.to_owned())));
        pair.runtime.block_on(pair.a.scheduler.list(of))
    };
    let listing = list("nightly").unwrap();
    let [entry] = &listing.backups[..] else { panic!("{listing:?}") };
    let unreachable = entry.unreachable.as_ref().expect("it cannot be read");
    assert_eq!((&entry.id, &unreachable.id), (&None, &made));
    assert_eq!((entry.outcome, unreachable.repository.as_str()), (Outcome::Done, "main"));
    assert!(listing.problems[0].contains("repository init main"), "{listing:?}");
    std::fs::rename(&away, &repository).unwrap();
    let listing = list("nightly").unwrap();
    assert_eq!((&listing.backups[0].id, &listing.problems), (&Some(made), &Vec::new()));
    let none = list("weekly").unwrap_err().to_string();
    assert!(none.contains("job g/weekly: does not exist; `tidelog job list g`"), "{none}");
}

/// A run whose result could not be written left its snapshot, which filled no slot.
#[test]
fn a_run_without_a_result_takes_its_snapshot_back() {
    let pair = Pair::new(json!({"placement": "primary-only"}));
    let repository = pair.dir.path().join("repository");
    let jobs = repository.join("tidelog/slots");
    pair.a.at_start(move || {
        let only = |dir: &Path| std::fs::read_dir(dir).unwrap().next().unwrap().unwrap().path();
        let slot = only(&only(&jobs));
        std::fs::rename(&slot, slot.with_extension("away")).unwrap();
        std::os::unix::fs::symlink("nowhere", &slot).unwrap();
    });
    let run = pair.run(&pair.a);
    let event = pair.a.await_any(&["backup-failed", "backup-done"]);
    assert_eq!(event.code, "backup-failed");
    assert!(event.text.contains("result"), "{}", event.text);
    assert_eq!(std::fs::read_dir(repository.join("snapshots")).unwrap().count(), 0);
    assert_eq!(pair.entry(&pair.a, &run, "a").outcome, Outcome::Failed);
}

/// A pair whose job has its first slot in a minute.
pub(crate) fn scheduled(settings: Value) -> (Pair, Arc<ManualClock>, LogTime) {
    let (pair, clock) = Pair::by_clock(settings);
    let change = JobChange { schedule: Some("1 2 * * *".to_owned()), ..JobChange::default() };
    pair.a.scheduler.set_job("g", name("nightly"), change).unwrap();
    pair.link.ship();
    (pair, clock, time("2026-11-24T02:01:00Z"))
}

pub(crate) fn alarm_states(node: &Node) -> Vec<(String, LogTime)> {
    node.scheduler.alarms().into_iter().map(|alarm| (alarm.state, alarm.slot)).collect()
}

/// The slots of the runs that failed on a node and were not made up for, as far as it knows.
pub(crate) fn failures(node: &Node) -> Vec<LogTime> {
    node.scheduler.failures().into_iter().map(|failure| failure.slot).collect()
}

/// A pair in which neither node has made a slot, whose time is over.
pub(crate) fn unmade() -> (Pair, LogTime) {
    let settings = json!({"placement": "secondary-only", "max_lag": "10s", "deadline": "5m",
        "run_limit": "10m"});
    let (pair, clock, slot) = scheduled(settings);
    pair.link.set_lag(Duration::from_secs(60));
    clock.advance(Duration::from_secs(60));
    for node in [&pair.a, &pair.b] {
        pair.await_open(node, slot);
    }
    clock.advance(Duration::from_secs(300));
    for node in [&pair.a, &pair.b] {
        assert_eq!(node.await_any(&["backup-failed"]).details["slot"], slot.to_string());
        assert!(alarm_states(node).is_empty(), "its time is not over");
        wait_for("it to be told", || (failures(node) == [slot]).then_some(()));
    }
    clock.advance(Duration::from_secs(10 * 60 + 600));
    (pair, slot)
}

#[test]
fn a_slot_without_a_backup_is_raised_as_overdue_by_both_nodes() {
    let (pair, slot) = unmade();
    for node in [&pair.a, &pair.b] {
        let event = node.await_any(&["backup-overdue", "backup-unknown"]);
        assert_eq!((event.code.as_str(), event.severity), ("backup-overdue", Severity::Error));
        assert_eq!(event.details["slot"], slot.to_string());
        let states = wait_for("the alarm", || Some(alarm_states(node)).filter(|s| !s.is_empty()));
        assert_eq!(states, [("overdue".to_owned(), slot)]);
    }
}

#[test]
fn where_nobody_can_tell_of_a_slot_it_is_raised_as_unknown() {
    let settings = json!({"placement": "primary-only", "deadline": "5m", "run_limit": "10m"});
    let (pair, clock, slot) = scheduled(settings);
    pair.link.set_lost(Duration::from_secs(600));
    let (repository, away) = (pair.dir.path().join("repository"), pair.dir.path().join("away"));
    std::fs::rename(&repository, &away).unwrap();
    clock.advance(Duration::from_secs(60));
    assert_eq!(pair.a.await_any(&["backup-failed"]).details["slot"], slot.to_string());
    // Its role is not permitted, and it may be promoted before the deadline.
    clock.advance(Duration::from_secs(5 * 60));
    pair.b.await_any(&["backup-skipped"]);
    clock.advance(Duration::from_secs(10 * 60 + 600));
    for node in [&pair.a, &pair.b] {
        let event = node.await_any(&["backup-overdue", "backup-unknown"]);
        assert_eq!((event.code.as_str(), event.severity), ("backup-unknown", Severity::Error));
        let states = wait_for("the alarm", || Some(alarm_states(node)).filter(|s| !s.is_empty()));
        assert_eq!(states, [("unknown".to_owned(), slot)]);
    }
}

#[test]
fn a_restart_in_mid_backup_leaves_the_slot_to_be_made() {
    let (mut pair, clock, slot) = scheduled(json!({"placement": "primary-only"}));
    let config = pair.dir.path().join("repository/config");
    let (sender, hanging) = channel();
    pair.a.at_start(move || sender.send(Hanging::begin(config)).unwrap());
    clock.advance(Duration::from_secs(60));
    let hanging = hanging.recv_timeout(PATIENCE).unwrap();
    pair.a.scheduler.shutdown();
    hanging.end();
    let inside = pair.runtime.enter();
    pair.a.scheduler = (pair.a.new_scheduler)();
    drop(inside);
    // Its claim of the life before counts until it has stood still for its term.
    let done = wait_for("the backup", || {
        // Slowly: the repository's answers are believed for 30 s of this clock.
        clock.advance(Duration::from_secs(5));
        let event = pair.a.events.recv_timeout(Duration::from_secs(1)).ok()?;
        assert_ne!(event.code, "backup-failed", "{event:?}");
        (event.code == "backup-done").then_some(event)
    });
    assert_eq!(done.details["slot"], slot.to_string());
    let made: Vec<_> = pair.list(&pair.a).into_iter().filter(|entry| entry.id.is_some()).collect();
    assert_eq!(made.len(), 1, "{made:?}");
}

/// With the link to the new primary lost, the slot would fall to the one that was left behind.
#[test]
fn a_primary_that_has_just_started_waits_for_its_peers_and_held_back_makes_no_backup() {
    let (mut pair, clock) = Pair::by_clock(json!({"placement": "prefer-primary"}));
    pair.a.scheduler.shutdown();
    pair.a.registry.close();
    pair.link.set_lost(Duration::from_secs(600));
    *pair.link.groups.write().unwrap() = None;
    let inside = pair.runtime.enter();
    let env = Env { clock: clock.clone(), ..Env::real() };
    pair.a = Node::start("a", pair.dir.path(), &pair.link, env);
    drop(inside);
    let group = pair.a.group();
    assert!(group.awaits_answer());
    let scheduler = pair.a.scheduler.clone();
    let run = pair.runtime.spawn(async move { scheduler.run("g", "nightly").await });
    wait_for("the slot to be open", || {
        pair.list(&pair.a).into_iter().find(|entry| entry.outcome == Outcome::Running)
    });
    group.hold_back(2, "is about to follow b");
    let run = pair.runtime.block_on(run).unwrap().unwrap();
    assert_eq!(run.decision.decision, Verdict::Fail);
    let why = run.decision.reasons.iter().find(|reason| reason.code == "held-back");
    assert!(why.is_some_and(|why| why.text.contains("is about to follow b")), "{run:?}");
    // An operator has it serve nevertheless.
    group.promote("promote").unwrap();
    clock.advance(Duration::from_secs(1));
    assert_eq!(pair.run(&pair.a).decision.decision, Verdict::Run);
    // Nobody answers, and nobody waits longer: there is a backup all the same.
    pair.a.await_any(&["backup-done"]);
    pair.a.scheduler.shutdown();
    pair.a.registry.close();
    let inside = pair.runtime.enter();
    let env = Env { clock: clock.clone(), ..Env::real() };
    pair.a = Node::start("a", pair.dir.path(), &pair.link, env);
    drop(inside);
    clock.advance(Duration::from_secs(60));
    assert!(!pair.a.group().awaits_answer() && pair.a.group().is_asking());
    assert_eq!(pair.run(&pair.a).decision.decision, Verdict::Run);
}

#[test]
fn a_backup_that_was_marked_as_a_branch_is_listed_as_failed_and_why() {
    let pair = Pair::new(json!({"placement": "primary-only"}));
    let run = pair.run(&pair.a);
    pair.a.await_event("backup-done");
    let id = pair.entry(&pair.a, &run, "a").id.unwrap();
    let tidelog = pair.dir.path().join("repository/tidelog");
    std::fs::create_dir_all(tidelog.join("marks")).unwrap();
    std::fs::write(tidelog.join("marks").join(&id), "{\"branch\":\"rewound\"}").unwrap();
    std::fs::remove_dir_all(tidelog.join("slots")).unwrap();
    let entry = pair.entry(&pair.a, &run, "a");
    assert_eq!((entry.outcome, entry.branch.as_deref()), (Outcome::Failed, Some("rewound")));
    assert_eq!(entry.id, Some(id), "it can still be restored");
}
