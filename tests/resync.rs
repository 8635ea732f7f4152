//! A peer that the log no longer reaches is brought up by an image, with real processes: a first
//! copy of a folded group, a peer that was away too long, `kill -9` of either in the middle.

use serde_json::Value;

use crate::support::load::{VOLUMES, client, contents, create_volumes, wait_until_level};
use crate::support::oracle::{BLOCK_BYTES, stamp};
use crate::support::{Appliance, Setup, wait_for};

/// Bytes that are written so that the log's first segments can be folded.
const OUTRUN_BYTES: u64 = 192 << 20;
/// Bytes of the volume that makes an image large.
const LARGE_BYTES: u64 = 192 << 20;

fn pair(dir: &std::path::Path) -> (Appliance, Appliance) {
    let a = Appliance::start(&dir.join("a"), Setup::new("a"));
    let b = Appliance::start(&dir.join("b"), Setup::new("b"));
    a.pair_with(&b);
    a.run(&["group", "create", "g"]);
    a.run(&["group", "set", "g", "window=1s", "log_limit=256M"]);
    create_volumes(&a);
    a.run(&["volume", "create", "g/large", "--size", &LARGE_BYTES.to_string()]);
    (a, b)
}

/// Stamps some blocks of the small volumes.
fn write_stamps(a: &Appliance, first: u64) {
    for (index, volume) in VOLUMES.iter().enumerate() {
        let mut client = client(a, volume);
        for block in first..first + 64 {
            let bytes = stamp(first * 100 + block, index, block);
            client.write(block * BLOCK_BYTES as u64, &bytes).unwrap();
        }
        client.flush().unwrap();
    }
}

/// Writes until the log has left everything behind that was in it, and was folded.
fn outrun(a: &Appliance, seed: u64) {
    let head = a.status("g")["log"]["head_lsn"].as_u64().unwrap();
    let mut client = client(a, "large");
    let mut random = seed;
    let mut bytes = vec![0; 1 << 20];
    for part in 0..OUTRUN_BYTES >> 20 {
        for word in bytes.chunks_exact_mut(8) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            word.copy_from_slice(&random.to_le_bytes());
        }
        client.write((part << 20) % LARGE_BYTES, &bytes).unwrap();
    }
    client.flush().unwrap();
    wait_for("the log to be folded", || {
        // A segment more than what the peer has.
        let horizon = a.status("g")["log"]["horizon_lsn"].as_u64()?;
        (horizon > head + (64 << 20)).then_some(())
    });
}

fn wait_until_equal(a: &Appliance, b: &Appliance) {
    wait_until_level(a, b);
    b.run(&["image", "open", "g", "--at", "now", "--name", "equal"]);
    assert_eq!(contents(b, "@equal"), contents(a, ""));
    let (mut here, mut there) = (client(a, "large"), client(b, "large@equal"));
    let mut pieces = [vec![0; 1 << 20], vec![0; 1 << 20]];
    for offset in (0..LARGE_BYTES).step_by(1 << 20) {
        here.read(offset, &mut pieces[0]).unwrap();
        there.read(offset, &mut pieces[1]).unwrap();
        assert!(pieces[0] == pieces[1], "large at {offset}");
    }
    drop(there);
    b.run(&["image", "close", "g@equal"]);
}

/// The image that b takes, once something of it has come.
fn wait_until_it_comes(b: &Appliance, more_than: u64) -> Value {
    wait_for("an image to come", || {
        let status = b.status("g");
        let peer = &status["peers"][0];
        let done = peer["resync"]["done_bytes"].as_u64()?;
        assert_eq!(peer["replication_state"], "resync-target", "{status}");
        assert!(done <= peer["resync"]["total_bytes"].as_u64().unwrap());
        (done > more_than).then(|| status.clone())
    })
}

fn no_errors(nodes: [&Appliance; 2]) {
    for node in nodes {
        assert_eq!(node.errors(), Vec::<String>::new(), "node {}", node.node);
    }
}

#[test]
fn the_first_copy_of_a_folded_group_is_an_image_that_kill_9_does_not_stop() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path());
    write_stamps(&a, 0);
    outrun(&a, 1);
    a.run(&["replicate", "g", "--to", "b"]);
    let status = wait_until_it_comes(&b, 8 << 20);
    assert_eq!(status["data_state"], "receiving-image", "{status}");
    assert!(status["data_state_reason"].as_str().unwrap().contains("is coming"), "{status}");
    let verdict = &status["backup_capable"];
    assert!(verdict.to_string().contains("no-image"), "{verdict}");
    let refused = b.command(&["promote", "g", "--force"]);
    assert!(!refused.status.success(), "there is nothing to promote yet");
    b.kill();
    b.restart();
    wait_until_equal(&a, &b);
    assert!(b.has_event("image-received"));
    assert_eq!(b.status("g")["data_state"], "consistent");
    assert_eq!(a.json(&["image", "list", "g"])["images"], serde_json::json!([]), "none is kept");
    no_errors([&a, &b]);
}

#[test]
fn the_first_copy_of_a_group_that_adopted_contents_is_an_image_and_later_ones_come_by_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path());
    // Some of each megabyte, so that there are zeros between, and an end inside of a block.
    let mut bytes = vec![0; (9 << 20) + 777];
    for (index, part) in bytes.chunks_mut(1 << 20).enumerate() {
        part.iter_mut().take(300_000).for_each(|byte| *byte = index as u8 + 1);
    }
    let base = dir.path().join("disk.img");
    std::fs::write(&base, &bytes).unwrap();
    let base = base.to_str().unwrap();
    let refused = |node: &Appliance, arguments: &[&str], says: &str| {
        let output = node.command(&[&["volume", "create", "g/first"], arguments].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(says), "{arguments:?}: {said}");
    };
    refused(&a, &["--size", "9M", "--base", base], "less than the 9437961 bytes");
    refused(&a, &["--base", dir.path().to_str().unwrap()], "neither a file nor a block device");
    refused(&a, &[], "--size");
    a.run(&["volume", "create", "g/first", "--base", base]);
    let shown = a.json(&["volume", "show", "g/first"]);
    assert_eq!(shown["size_bytes"], 9_441_280, "whole blocks: {shown}");
    write_stamps(&a, 0);
    outrun(&a, 1);
    a.run(&["replicate", "g", "--to", "b"]);
    wait_until_it_comes(&b, 0);
    wait_until_equal(&a, &b);
    assert!(b.has_event("image-received"));
    // The other way to give it a file would be one of the primary's machine.
    refused(&b, &["--base", base], "node a is the primary");
    a.run(&["volume", "create", "g/second", "--base", base, "--size", "16M"]);
    wait_until_level(&a, &b);
    b.run(&["image", "open", "g", "--at", "now", "--name", "both"]);
    for export in ["first@both", "second@both"] {
        let mut found = vec![0; bytes.len() + 1000];
        client(&b, export).read(0, &mut found).unwrap();
        assert!(found[..bytes.len()] == bytes[..], "{export}");
        assert!(found[bytes.len()..].iter().all(|byte| *byte == 0), "{export}: behind the end");
    }
    no_errors([&a, &b]);
}

#[test]
fn a_peer_that_was_away_too_long_shows_its_old_image_until_the_new_one_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path());
    write_stamps(&a, 0);
    a.run(&["replicate", "g", "--to", "b"]);
    wait_until_equal(&a, &b);
    let old = contents(&a, "");
    b.stop();
    write_stamps(&a, 32);
    outrun(&a, 2);
    b.restart();
    let status = wait_until_it_comes(&b, 4 << 20);
    assert_eq!(status["data_state"], "consistent", "the old image stays: {status}");
    let reasons = status["backup_capable"]["reasons"].to_string();
    assert!(reasons.contains("replication-resync-target"), "{reasons}");
    b.run(&["image", "open", "g", "--at", "now", "--name", "old"]);
    assert_eq!(contents(&b, "@old"), old);
    let peer = a.status("g")["peers"][0].clone();
    assert_eq!(peer["replication_state"], "resync-source", "{peer}");
    // Whoever dies, it goes on.
    a.kill();
    a.restart();
    b.kill();
    b.restart();
    wait_until_equal(&a, &b);
    let read_old = b.command(&["image", "open", "g", "--at", "lsn:4096"]);
    assert!(!read_old.status.success(), "what was before the image is gone");
    // And again, by the log alone.
    write_stamps(&a, 96);
    wait_until_equal(&a, &b);
    b.stop();
    b.restart();
    wait_until_equal(&a, &b);
    no_errors([&a, &b]);
}

#[test]
fn an_old_primary_that_returns_from_before_the_log_keeps_its_tail_and_takes_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path());
    write_stamps(&a, 0);
    a.run(&["replicate", "g", "--to", "b"]);
    wait_until_equal(&a, &b);
    // Only a has this, and dies.
    b.stop();
    write_stamps(&a, 32);
    let tail = contents(&a, "");
    a.kill();
    b.restart();
    b.run(&["promote", "g", "--force"]);
    write_stamps(&b, 64);
    outrun(&b, 3);
    a.restart();
    wait_until_equal(&b, &a);
    assert_eq!(a.status("g")["role"], "secondary");
    assert!(a.has_event("yielded") && a.has_event("branch-kept") && a.has_event("image-received"));
    let branches = a.json(&["branch", "list", "g"]);
    let branch = branches["branches"][0]["name"].as_str().unwrap_or_else(|| panic!("{branches}"));
    a.run(&["image", "open", "g", "--branch", branch, "--name", "tail"]);
    assert_eq!(contents(&a, "@tail"), tail, "what only a had is in its branch");
    no_errors([&a, &b]);
}
