//! Slots that come due while a run of the job is going.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use serde_json::{Value, json};
use tidelog::backup::{JobChange, Outcome};
use tidelog::io::ManualClock;
use tidelog::units::LogTime;

use super::rig::*;
use crate::support::{PATIENCE, wait_for};

/// A pair whose job has two slots a minute apart, the first of which is being made when the second
/// comes; its run goes on when the sender is dropped, and then cannot write its result.
fn overlapping(settings: Value) -> (Pair, Arc<ManualClock>, [LogTime; 2], Sender<()>) {
    let (pair, clock) = Pair::by_clock(settings);
    let change = JobChange { schedule: Some("1,2 2 * * *".to_owned()), ..JobChange::default() };
    pair.a.scheduler.set_job("g", name("nightly"), change).unwrap();
    pair.link.ship();
    let slots = [time("2026-11-24T02:01:00Z"), time("2026-11-24T02:02:00Z")];
    let (started, begun) = channel();
    let (go_on, held) = channel::<()>();
    let jobs = pair.dir.path().join("repository/tidelog/slots");
    pair.a.at_start(move || {
        started.send(()).unwrap();
        let _ = held.recv_timeout(PATIENCE);
        let in_dir = |dir: &Path| {
            let mut found: Vec<_> = std::fs::read_dir(dir).unwrap().map(|it| it.unwrap()).collect();
            found.sort_by_key(|it| it.file_name());
            found.remove(0).path()
        };
        let slot = in_dir(&in_dir(&jobs));
        std::fs::rename(&slot, slot.with_extension("away")).unwrap();
        std::os::unix::fs::symlink("nowhere", &slot).unwrap();
    });
    clock.advance(Duration::from_secs(60));
    begun.recv_timeout(PATIENCE).unwrap();
    clock.advance(Duration::from_secs(60));
    wait_for("the second slot to be open", || {
        let explain = pair.runtime.block_on(pair.a.scheduler.explain("g", "nightly", &[]));
        (explain.unwrap().slot == Some(slots[1])).then_some(())
    });
    (pair, clock, slots, go_on)
}

/// The slot was skipped as "already running", and stayed dead when what ran made nothing.
#[test]
fn a_slot_that_came_while_a_run_was_going_that_makes_nothing_is_made_after_it() {
    let (pair, _clock, slots, go_on) = overlapping(json!({"placement": "primary-only"}));
    drop(go_on);
    let done = pair.a.await_any(&["backup-done"]);
    assert_eq!(done.details["slot"], slots[1].to_string());
}

/// What came after an open slot was noted as dealt with, and the open one with it: a restart told
/// nobody of it.
#[test]
fn a_restart_forgets_no_slot_that_was_open_when_a_later_one_was_dealt_with() {
    let settings = json!({"placement": "primary-only", "deadline": "30s"});
    let (mut pair, clock, slots, go_on) = overlapping(settings);
    clock.advance(Duration::from_secs(31));
    // While the first run stands in its event, no other one is told.
    wait_for("the second slot to be skipped", || {
        let mut list = pair.list(&pair.a).into_iter();
        list.find(|entry| (entry.slot, entry.outcome) == (slots[1], Outcome::Skipped))
    });
    pair.a.scheduler.shutdown();
    drop(go_on);
    let inside = pair.runtime.enter();
    pair.a.scheduler = (pair.a.new_scheduler)();
    drop(inside);
    let missed = pair.a.await_any(&["backup-missed"]);
    assert_eq!(missed.details["slot"], slots[0].to_string());
}
