//! What happens to the copy while its backup is being made.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tidelog::group::Role;

use super::rig::*;

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
