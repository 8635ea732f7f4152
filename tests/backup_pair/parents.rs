//! What a backup may take over unread from one before it.

use std::sync::atomic::Ordering;

use serde_json::json;
use tidelog::backup::Reason;

use super::rig::*;

/// What is read where nothing is taken over: the bytes that were written.
const ALL: u64 = 3 << 20;

/// Runs the job; who made the backup, its id, and how much was read for it.
fn run(pair: &Pair, by: &str) -> (String, u64) {
    let node = if by == "a" { &pair.a } else { &pair.b };
    let started = pair.run(&pair.a);
    node.await_any(&["backup-done"]);
    if by == "b" {
        // A run by command is skipped while another one still waits for its result.
        pair.a.await_any(&["backup-delegated"]);
    }
    let entry = pair.entry(&pair.a, &started, by);
    (entry.id.expect("it is made"), entry.bytes_read)
}

/// The newest snapshot was taken for the parent whatever was known of it: what it held wrongly was
/// never read again.
#[test]
fn a_backup_that_does_not_count_is_nobodys_parent() {
    let pair = Pair::new(json!({"placement": "primary-only"}));
    let (first, read) = run(&pair, "a");
    assert_eq!(read, ALL);
    let (second, read) = run(&pair, "a");
    assert_eq!(read, 0, "nothing has changed");
    let marks = pair.dir.path().join("repository/tidelog/marks");
    std::fs::create_dir_all(&marks).unwrap();
    for id in [first, second] {
        std::fs::write(marks.join(id), "{\"branch\":\"the disk failed\"}").unwrap();
    }
    assert_eq!(run(&pair, "a").1, ALL);
    assert_eq!(run(&pair, "a").1, 0);
}

/// The other node's bytes are in what this one took over from it, too.
#[test]
fn while_the_copies_are_known_to_differ_nothing_is_taken_over() {
    let pair = Pair::new(json!({}));
    assert_eq!(run(&pair, "b").1, ALL);
    let reason = |code: &str| vec![Reason { code: code.to_owned(), text: code.to_owned() }];
    *pair.link.reasons.lock().unwrap() = reason("data-failed");
    assert_eq!(run(&pair, "a").1, 0);
    *pair.link.reasons.lock().unwrap() = reason("copies-differ");
    assert_eq!(run(&pair, "a").1, ALL);
    *pair.link.reasons.lock().unwrap() = reason("data-failed");
    assert_eq!(run(&pair, "a").1, 0);
}

/// The verdict on a copy tells of a difference only while the copy is linked, and no longer than
/// the difference lasts; the backups of that copy stay in the repository.
#[test]
fn a_backup_of_when_the_copies_differed_is_no_parent() {
    let pair = Pair::new(json!({}));
    assert_eq!(run(&pair, "b").1, ALL);
    pair.link.differed_until.store(u64::MAX, Ordering::SeqCst);
    assert_eq!(run(&pair, "b").1, ALL);
    pair.link.differed_until.store(0, Ordering::SeqCst);
    assert_eq!(run(&pair, "b").1, 0);
}
