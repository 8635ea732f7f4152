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
