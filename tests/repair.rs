//! What rots on disk is found, named, and made right from the peer that has it, with real
//! processes: scrub, and what follows from what it finds.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::load::{Load, VOLUME_BLOCKS, VOLUMES, contents, hold};
use crate::support::oracle::{BLOCK_BYTES, stamp};
use crate::support::{Appliance, Setup, wait_for};

/// More than an eighth of the log's limit: that much is folded at a time.
const FOLDED_BYTES: u64 = 40 << 20;
const LARGE_BYTES: u64 = 48 << 20;

/// A node with a group whose log is folded soon.
fn node(dir: &Path) -> Appliance {
    let a = Appliance::start(&dir.join("a"), Setup::new("a"));
    a.run(&["group", "create", "g"]);
    a.run(&["group", "set", "g", "window=1s", "log_limit=256M"]);
    for volume in VOLUMES {
        let size = (VOLUME_BLOCKS * BLOCK_BYTES as u64).to_string();
        a.run(&["volume", "create", &format!("g/{volume}"), "--size", &size]);
    }
    a.run(&["volume", "create", "g/large", "--size", &LARGE_BYTES.to_string()]);
    a
}

fn client(node: &Appliance, volume: &str) -> tidelog::nbd::Client {
    let address = tidelog::nbd::NbdAddress::Unix(node.nbd_socket());
    tidelog::nbd::Client::connect(&address, &format!("g/{volume}")).unwrap()
}

/// Writes until the first blocks are in the base, and some more that stay in the log.
fn fill(a: &Appliance) {
    let mut large = client(a, "large");
    let mut bytes = vec![0; 1 << 20];
    for part in 0..FOLDED_BYTES >> 20 {
        for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&((part << 32) + index as u64).to_le_bytes());
        }
        large.write(part << 20, &bytes).unwrap();
    }
    large.flush().unwrap();
    wait_for("the log to be folded", || {
        let horizon = a.status("g")["log"]["horizon_lsn"].as_u64()?;
        (horizon >= FOLDED_BYTES - (1 << 20)).then_some(())
    });
    for (index, volume) in VOLUMES.iter().enumerate() {
        let mut client = client(a, volume);
        for block in 0..64 {
            let bytes = stamp(1 + block, index, block);
            client.write(block * BLOCK_BYTES as u64, &bytes).unwrap();
        }
        client.flush().unwrap();
    }
}

/// The files of the only group with this ending, in order.
fn files(node: &Appliance, below: &str, ending: &str) -> Vec<PathBuf> {
    let groups = node.dir.join("data/groups");
    let group = std::fs::read_dir(groups).unwrap().next().unwrap().unwrap().path();
    let names = std::fs::read_dir(group.join(below)).unwrap();
    let mut found: Vec<PathBuf> = names.map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.extension().is_some_and(|it| it == ending));
    found.sort();
    found
}

/// The base's file of the volume `large`.
fn base_of_large(node: &Appliance, ending: &str) -> PathBuf {
    let found = files(node, "base", ending);
    found.into_iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap()
}

/// Turns a bit of a file.
fn turn(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// Turns a bit of the last record of the log that carries a block: its payload's.
fn turn_in_log(node: &Appliance) {
    let head = node.status("g")["log"]["head_lsn"].as_u64().unwrap();
    let segment = head / (64 << 20);
    let files = files(node, "log", "seg");
    let path = files.iter().find(|path| path.ends_with(format!("{segment:012}.seg"))).unwrap();
    // Behind the last block stands a flush mark.
    turn(path, head % (64 << 20) - 1000);
}

fn scrub(node: &Appliance) -> (bool, Value) {
    let output = node.command(&["--json", "scrub", "g", "--wait"]);
    let told = serde_json::from_slice(&output.stdout).unwrap_or_else(|cause| {
        panic!("{cause}: {}", String::from_utf8_lossy(&output.stderr));
    });
    (output.status.success(), told)
}

fn has_event(node: &Appliance, code: &str) -> bool {
    let events = node.json(&["events"]);
    let events = events["events"].as_array().cloned().unwrap_or_default();
    events.iter().any(|event| event["code"] == code)
}

#[test]
fn a_scrub_beside_hosts_and_folds_finds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let a = node(dir.path());
    let load = Load::start(a.nbd_socket());
    let horizon = || a.status("g")["log"]["horizon_lsn"].as_u64().unwrap();
    let mut scrubs = 0;
    let first = horizon();
    wait_for("folds beside scrubs", || {
        let (whole, told) = scrub(&a);
        assert!(whole, "{told}\n{}", a.log_tail());
        scrubs += 1;
        (scrubs >= 3 && horizon() > first + (64 << 20)).then_some(())
    });
    let history = load.stop();
    hold("what is there", history.faults(&contents(&a, ""), Some(history.now())));
    assert_eq!(a.errors(), Vec::<String>::new());
}

#[test]
fn what_rotted_is_named_with_its_place_and_speaks_against_a_backup() {
    let dir = tempfile::tempdir().unwrap();
    let a = node(dir.path());
    fill(&a);
    let (whole, told) = scrub(&a);
    assert!(whole, "{told}");
    assert_eq!(told["scrub"]["state"], "done");
    assert!(told["scrub"]["read_bytes"].as_u64().unwrap() >= FOLDED_BYTES, "{told}");

    turn_in_log(&a);
    turn(&base_of_large(&a, "img"), (5 << 20) + 4096 + 7);
    let (whole, told) = scrub(&a);
    assert!(!whole, "{told}");
    let damage = told["damage"].as_array().unwrap();
    let parts: Vec<&str> = damage.iter().map(|part| part["part"].as_str().unwrap()).collect();
    assert_eq!(parts, ["log", "base"], "{told}");
    assert!(damage[0]["what"].as_str().unwrap().contains("payload checksum differs: 4096 bytes"));
    let place = format!("the first at {}", (5 << 20) + 4096);
    assert!(damage[1]["what"].as_str().unwrap().contains(&place), "{told}");
    let status = a.status("g");
    assert_eq!(status["damage"], told["damage"]);
    let verdict = status["backup_capable"].to_string();
    assert!(verdict.contains("log-damaged") && verdict.contains("base-damaged"), "{verdict}");
    assert!(has_event(&a, "log-damaged") && has_event(&a, "base-damaged"));
    let text = a.run(&["status", "g"]);
    assert!(text.contains("scrub   done") && text.contains("damaged "), "{text}");

    turn_in_log(&a);
    turn(&base_of_large(&a, "img"), (5 << 20) + 4096 + 7);
    let (whole, told) = scrub(&a);
    assert!(whole, "{told}");
    assert!(has_event(&a, "log-mended") && has_event(&a, "base-mended"));
}

#[test]
fn a_scrub_keeps_its_pace_and_stops_when_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let a = node(dir.path());
    fill(&a);
    a.run(&["scrub", "g", "--rate", "4K"]);
    let again = a.command(&["scrub", "g"]);
    let refused = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(!again.status.success() && refused.contains("--stop"), "{refused}");
    let scrub = a.status("g")["scrub"].clone();
    assert_eq!(scrub["state"], "running", "{scrub}");
    // One step, which is followed by minutes of rest.
    assert!(scrub["read_bytes"].as_u64().unwrap() <= 2 << 20, "{scrub}");
    a.run(&["scrub", "g", "--stop"]);
    let stopped = wait_for("the scrub to stop", || {
        let scrub = a.status("g")["scrub"].clone();
        (scrub["state"] == "stopped").then_some(scrub)
    });
    assert!(stopped["state_reason"].as_str().unwrap().contains("by command"), "{stopped}");
    assert!(!a.command(&["scrub", "g", "--stop"]).status.success(), "none runs");
    a.run(&["scrub", "g", "--wait"]);
}

/// A node as before, and its copy on another, which has the same in its base.
fn pair(dir: &Path) -> (Appliance, Appliance) {
    let a = node(dir);
    let b = Appliance::start(&dir.join("b"), Setup::new("b"));
    a.pair_with(&b);
    a.run(&["replicate", "g", "--to", "b"]);
    fill(&a);
    wait_for("both to have the same, and to have folded", || {
        let logs = [&a, &b].map(|node| node.status("g")["log"].clone());
        let folded = logs.iter().all(|log| log["horizon_lsn"].as_u64() > Some(FOLDED_BYTES / 2));
        let whole = logs.iter().all(|log| log["durable_lsn"] == logs[0]["head_lsn"]);
        (folded && whole).then_some(())
    });
    (a, b)
}

/// A scrub that finds so many parts damaged and has all of them repaired.
fn scrub_repairs(node: &Appliance, parts: u64) {
    let (whole, told) = scrub(node);
    assert!(whole, "{told}\n{}", node.log_tail());
    assert_eq!(told["scrub"]["damaged"], parts, "{told}");
    assert_eq!(told["scrub"]["repaired"], parts, "{told}");
    assert_eq!(told["damage"], serde_json::json!([]), "{told}");
    assert!(has_event(node, "repaired"));
    let (whole, told) = scrub(node);
    assert!(whole && told["scrub"]["damaged"] == 0, "{told}");
}

/// The files' bytes that a repair on the other side must not change.
fn digest(node: &Appliance) -> Vec<u8> {
    let mut all = std::fs::read(base_of_large(node, "img")).unwrap();
    all.extend(std::fs::read(base_of_large(node, "sum")).unwrap());
    all
}

#[test]
fn a_scrub_repairs_either_node_from_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path());
    for (damaged, other) in [(&b, &a), (&a, &b)] {
        let (before, right) = (digest(other), digest(damaged));
        turn_in_log(damaged);
        turn(&base_of_large(damaged, "img"), (5 << 20) + 4096 + 7);
        // A sum of the chunk behind, and a block of it.
        turn(&base_of_large(damaged, "sum"), 8192 + 6 * 1024 + 40);
        turn(&base_of_large(damaged, "img"), (6 << 20) + 8192);
        scrub_repairs(damaged, 3);
        assert!(digest(damaged) == right, "{}: as it was", damaged.node);
        assert!(digest(other) == before, "{}: never the other way round", other.node);
    }
    b.run(&["image", "open", "g", "--at", "now", "--name", "equal"]);
    assert_eq!(contents(&b, "@equal"), contents(&a, ""));
}

#[test]
fn what_is_damaged_on_both_nodes_stays_as_it_is_and_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path());
    for node in [&a, &b] {
        turn(&base_of_large(node, "img"), (5 << 20) + 4096 + 7);
    }
    let before = [digest(&a), digest(&b)];
    for node in [&a, &b] {
        let (whole, told) = scrub(node);
        assert!(!whole, "{told}");
        let why = told["damage"][0]["repair"].as_str().unwrap();
        assert!(why.contains("has not what is missing"), "{told}");
    }
    for node in [&a, &b] {
        wait_for("the copy's damage to count", || {
            let verdict = node.status("g")["backup_capable"].to_string();
            verdict.contains("base-damaged").then_some(())
        });
    }
    assert!([digest(&a), digest(&b)] == before, "nothing was overwritten");
}

#[test]
fn a_read_that_meets_damage_fails_and_is_right_once_the_peer_has_been_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (a, _b) = pair(dir.path());
    let mut host = client(&a, "large");
    let (mut right, mut again) = (vec![0; 4096], vec![0; 4096]);
    host.read((5 << 20) + 4096, &mut right).unwrap();
    turn(&base_of_large(&a, "img"), (5 << 20) + 4096 + 7);
    assert!(host.read((5 << 20) + 4096, &mut again).is_err());
    wait_for("the block to be repaired", || host.read((5 << 20) + 4096, &mut again).ok());
    assert!(again == right);
    assert!(has_event(&a, "base-damaged") && has_event(&a, "repaired"));
}

#[test]
fn a_primary_whose_log_is_damaged_in_the_middle_takes_it_from_its_copy() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, _b) = pair(dir.path());
    let held = contents(&a, "");
    let horizon = a.status("g")["log"]["horizon_lsn"].as_u64().unwrap() as usize;
    a.stop();
    // The header of a record that is not folded, and behind which others stand.
    let log = files(&a, "log", "seg");
    let bytes = std::fs::read(&log[0]).unwrap();
    let magic = |at: &usize| bytes[*at..].starts_with(b"TLR1");
    let at = (horizon + 4096..bytes.len() - 8).step_by(8).find(magic).unwrap();
    turn(&log[0], at as u64 + 50);
    a.restart();
    let status = a.status("g");
    assert_eq!(status["data_state"], "failed", "{status}");
    wait_for("the log to be repaired", || has_event(&a, "repaired").then_some(()));
    a.stop();
    a.restart();
    wait_for("the group to serve", || {
        let status = a.status("g");
        (status["data_state"] == "consistent" && status.get("role_reason").is_none()).then_some(())
    });
    assert_eq!(contents(&a, ""), held);
}
