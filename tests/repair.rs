//! What rots on disk is found, named, and made right from the peer that has it, with real
//! processes: scrub, and what follows from what it finds; and verify, where both are whole and
//! differ.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tidelog::nbd::Client;

use crate::support::load::{Load, VOLUME_BLOCKS, VOLUMES, client, contents, create_volumes, hold};
use crate::support::oracle::{BLOCK_BYTES, stamp};
use crate::support::{Appliance, Setup, wait_for};

/// A way to a peer that counts the bytes which take it, in both directions.
struct Link {
    address: String,
    target: Arc<Mutex<String>>,
    bytes: Arc<AtomicU64>,
}

impl Link {
    fn open() -> Link {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let link = Link {
            address: listener.local_addr().unwrap().to_string(),
            target: Arc::default(),
            bytes: Arc::default(),
        };
        let (target, bytes) = (link.target.clone(), link.bytes.clone());
        std::thread::spawn(move || {
            for taken in listener.incoming() {
                let Ok(near) = taken else { return };
                let address = target.lock().unwrap().clone();
                let Ok(far) = TcpStream::connect(&address) else { continue };
                let ways = [(near.try_clone(), far.try_clone()), (Ok(far), Ok(near))];
                for (from, to) in ways {
                    let (mut from, mut to) = (from.unwrap(), to.unwrap());
                    let bytes = bytes.clone();
                    std::thread::spawn(move || {
                        let mut buffer = vec![0; 64 << 10];
                        while let Ok(count @ 1..) = from.read(&mut buffer) {
                            bytes.fetch_add(count as u64, Ordering::Relaxed);
                            if to.write_all(&buffer[..count]).is_err() {
                                break;
                            }
                        }
                        let _ = to.shutdown(Shutdown::Both);
                    });
                }
            }
        });
        link
    }
}

/// More than an eighth of the log's limit: that much is folded at a time.
const FILLED_BYTES: u64 = 40 << 20;
/// An eighth, but for the request that its end lies in. What is filled beyond it may stay in the
/// log, where the fold began before all of it was older than the window.
const FOLDED_BYTES: u64 = 31 << 20;
const LARGE_BYTES: u64 = 48 << 20;

/// A node with a group whose log is folded soon.
fn node(dir: &Path) -> Appliance {
    grouped(Appliance::start(&dir.join("a"), Setup::new("a")))
}

fn grouped(a: Appliance) -> Appliance {
    a.run(&["group", "create", "g"]);
    a.run(&["group", "set", "g", "window=1s", "log_limit=256M"]);
    create_volumes(&a);
    a.run(&["volume", "create", "g/large", "--size", &LARGE_BYTES.to_string()]);
    a
}

/// Writes until the first blocks are in the base, and some more that stay in the log.
fn fill(a: &Appliance) {
    let mut large = client(a, "large");
    let mut bytes = vec![0; 1 << 20];
    for part in 0..FILLED_BYTES >> 20 {
        for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&((part << 32) + index as u64).to_le_bytes());
        }
        large.write(part << 20, &bytes).unwrap();
    }
    large.flush().unwrap();
    wait_for("the log to be folded", || {
        let horizon = a.status("g")["log"]["horizon_lsn"].as_u64()?;
        (horizon >= FOLDED_BYTES).then_some(())
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
    assert!(told["scrub"]["read_bytes"].as_u64().unwrap() >= FILLED_BYTES, "{told}");

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
    assert!(a.has_event("log-damaged") && a.has_event("base-damaged"));
    let text = a.run(&["status", "g"]);
    assert!(text.contains("scrub   done") && text.contains("damaged "), "{text}");

    turn_in_log(&a);
    turn(&base_of_large(&a, "img"), (5 << 20) + 4096 + 7);
    let (whole, told) = scrub(&a);
    assert!(whole, "{told}");
    assert!(a.has_event("log-mended") && a.has_event("base-mended"));
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
    for _ in 0..100 {
        let scrub = a.status("g")["scrub"].clone();
        assert_eq!(scrub["state"], "running", "{scrub}");
        // One step, which is followed by minutes of rest.
        assert!(scrub["read_bytes"].as_u64().unwrap() <= 2 << 20, "{scrub}");
    }
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
    pair_by(dir, None)
}

/// The same, with what peers dial instead of each node's own address.
fn pair_by(dir: &Path, links: Option<[&Link; 2]>) -> (Appliance, Appliance) {
    let mut nodes = ["a", "b"].iter().enumerate().map(|(index, name)| {
        let link = links.map(|links| links[index]);
        let advertise = link.map(|link| link.address.clone());
        let node = Appliance::start(&dir.join(name), Setup { advertise, ..Setup::new(name) });
        if let Some(link) = link {
            *link.target.lock().unwrap() = node.peer_address.clone();
        }
        node
    });
    let (a, b) = (grouped(nodes.next().unwrap()), nodes.next().unwrap());
    drop(nodes);
    a.pair_with(&b);
    a.run(&["replicate", "g", "--to", "b"]);
    fill(&a);
    wait_for("both to have the same, and to have folded", || {
        let logs = [&a, &b].map(|node| node.status("g")["log"].clone());
        let folded = logs.iter().all(|log| log["horizon_lsn"].as_u64() >= Some(FOLDED_BYTES));
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
    assert!(node.has_event("repaired"));
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
    // The bytes are there before it is told.
    wait_for("the repair to be told", || a.has_event("repaired").then_some(()));
    assert!(a.has_event("base-damaged"));
}

#[test]
fn a_fold_waits_for_the_peer_that_has_what_rotted_in_a_part_of_a_block() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path());
    let head = || a.status("g")["log"]["head_lsn"].as_u64().unwrap();
    let mut host = client(&a, "large");
    let put = |host: &mut Client, parts: u64| {
        (0..parts).for_each(|part| host.write(part << 20, &[3; 1 << 20]).unwrap());
        host.flush().unwrap();
    };
    // All that follows is in one segment, so that b does not give it back when it folds.
    put(&mut host, 66 - (head() >> 20));
    let horizon = || a.status("g")["log"]["horizon_lsn"].as_u64().unwrap();
    host.write((47 << 20) + 512, &[9; 2048]).unwrap();
    host.flush().unwrap();
    let end = head();
    host.write(46 << 20, &[4; 16384]).unwrap();
    host.flush().unwrap();
    wait_for("b to have it", || (b.status("g")["log"]["durable_lsn"] == head()).then_some(()));
    let mut right = vec![0; 4096];
    host.read(47 << 20, &mut right).unwrap();
    b.stop();
    let log = files(&a, "log", "seg");
    let path = log.iter().find(|path| path.ends_with("000000000001.seg")).unwrap();
    turn(path, end % (64 << 20) - 1000);
    put(&mut host, 40);
    let why = wait_for("the fold to wait", || {
        a.status("g")["log"]["fold_reason"].as_str().map(str::to_owned)
    });
    assert!(why.contains("payload checksum differs: 2048 bytes"), "{why}");
    assert!(horizon() < end, "it was not folded");
    b.restart();
    wait_for("the fold to go on", || (horizon() > end).then_some(()));
    let mut again = vec![0; 4096];
    host.read(47 << 20, &mut again).unwrap();
    assert!(again == right && a.has_event("repaired"));
    assert!(a.status("g")["log"]["fold_reason"].is_null(), "{}", a.status("g")["log"]);
}

#[test]
fn a_primary_whose_log_is_damaged_in_the_middle_takes_it_from_its_copy() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = pair(dir.path());
    // A record of the greatest length, and others behind it.
    let long = vec![7; 1 << 20];
    let mut host = client(&a, "large");
    host.write(0, &long).unwrap();
    host.write(LARGE_BYTES - 4096, &[8; 4096]).unwrap();
    host.flush().unwrap();
    host.disconnect().unwrap();
    let held = contents(&a, "");
    wait_for("b to have it durably", || {
        let logs = [&a, &b].map(|node| node.status("g")["log"].clone());
        (logs[1]["durable_lsn"] == logs[0]["head_lsn"]).then_some(())
    });
    a.stop();
    // Its header, and that of a short one before it.
    let log = files(&a, "log", "seg");
    let bytes = std::fs::read(&log[0]).unwrap();
    let bytes = &bytes[..];
    let header_of = |payload_bytes: u32| {
        let is_it = move |at: &usize| {
            bytes[*at..].starts_with(b"TLR1")
                && bytes[*at + 12..*at + 16] == payload_bytes.to_le_bytes()
        };
        (0..bytes.len() - 16).step_by(8).rev().filter(is_it).map(|at| at as u64)
    };
    let at = header_of(1 << 20).next().unwrap();
    let short = header_of(4096).find(|short| *short < at).unwrap();
    assert!(header_of(4096).next().unwrap() > at, "others stand behind it");
    turn(&log[0], at + 50);
    turn(&log[0], short + 50);
    a.restart();
    let status = a.status("g");
    assert_eq!(status["data_state"], "failed", "{status}");
    wait_for("the log to be repaired", || a.has_event("repaired").then_some(()));
    a.stop();
    a.restart();
    wait_for("the group to serve", || {
        let status = a.status("g");
        (status["data_state"] == "consistent" && status.get("role_reason").is_none()).then_some(())
    });
    assert_eq!(contents(&a, ""), held);
    let mut found = vec![0; 1 << 20];
    client(&a, "large").read(0, &mut found).unwrap();
    assert!(found == long);
}

#[test]
fn a_stopped_primary_takes_nothing_of_a_peer_that_was_promoted_and_is_made_its_copy_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path());
    b.stop();
    let log_end = |node: &Appliance| node.status("g")["log"]["head_lsn"].as_u64().unwrap();
    let write = |node: &Appliance, byte: u8, blocks: u64| {
        let mut host = client(node, "large");
        for block in 0..blocks {
            host.write(block << 16, &[byte; 4096]).unwrap();
        }
        host.flush().unwrap();
        host.disconnect().unwrap();
    };
    let (end, before) = (log_end(&a), contents(&a, ""));
    write(&a, 9, 8);
    let mark = log_end(&a);
    a.stop();
    // The header of the first record that b lacks.
    let log = files(&a, "log", "seg");
    turn(&log[0], end + 50);
    let damaged = std::fs::read(&log[0]).unwrap();
    b.restart();
    b.run(&["promote", "g", "--force"]);
    write(&b, 10, 24);
    assert!(log_end(&b) > mark);
    a.restart();
    let why = wait_for("a to say why it is not repaired", || {
        let why = a.status("g")["damage"][0]["repair"].as_str()?.to_owned();
        (!why.contains("connected")).then_some(why)
    });
    assert!(why.contains(&format!("b: group g: b reigns since LSN {end}")), "{why}");
    assert!(!a.has_event("repaired"), "{}", a.log_tail());
    let now = std::fs::read(&log[0]).unwrap();
    assert!(now[..mark as usize] == damaged[..mark as usize], "what a has is as it was");
    // What an operator can do is in the text: to see what is left here, and to follow the peer.
    a.run(&["image", "open", "g", "--at", "now", "--name", "left"]);
    assert_eq!(contents(&a, "@left"), before);
    a.run(&["group", "delete", "g"]);
    b.run(&["replicate", "g", "--to", "a"]);
    wait_for("a to be a copy of b", || {
        let status = a.status("g");
        let whole = status["log"]["durable_lsn"].as_u64() == Some(log_end(&b));
        (whole && status["role"] == "secondary").then_some(())
    });
    a.run(&["image", "open", "g", "--at", "now", "--name", "equal"]);
    assert_eq!(contents(&a, "@equal"), contents(&b, ""));
}

fn verify(node: &Appliance) -> (bool, Value) {
    let output = node.command(&["--json", "verify", "g"]);
    let told = serde_json::from_slice(&output.stdout).unwrap_or_else(|cause| {
        panic!("{cause}: {}", String::from_utf8_lossy(&output.stderr));
    });
    (output.status.success(), told)
}

#[test]
fn equal_copies_are_told_so_by_hashes_and_no_data_moves() {
    let dir = tempfile::tempdir().unwrap();
    let links = [Link::open(), Link::open()];
    let (a, b) = pair_by(dir.path(), Some([&links[0], &links[1]]));
    let taken = || links.iter().map(|link| link.bytes.load(Ordering::Relaxed)).sum::<u64>();
    assert!(taken() > FILLED_BYTES / 100, "the copy went over them: {} bytes", taken());
    let compared = LARGE_BYTES + 2 * VOLUME_BLOCKS * BLOCK_BYTES as u64;
    for node in [&a, &b] {
        let before = taken();
        let (equal, told) = verify(node);
        assert!(equal, "{told}");
        assert_eq!(told["state"], "equal");
        assert_eq!(told["done_bytes"], compared, "{told}");
        let moved = taken() - before;
        assert!((1000..128 << 10).contains(&moved), "{moved} bytes");
        let images = node.json(&["image", "list", "g"]);
        assert_eq!(images["images"], serde_json::json!([]), "both images are closed");
    }
    for node in [&a, &b] {
        wait_for("the result to be known", || node.has_event("verify-equal").then_some(()));
        assert_eq!(node.status("g")["verify"]["state"], "equal");
    }
}

#[test]
fn a_verify_beside_hosts_that_write_compares_one_moment() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path());
    let load = Load::start(a.nbd_socket());
    for node in [&a, &b, &a] {
        load.wait_for_more(100);
        let before = load.answered();
        let (equal, told) = verify(node);
        assert!(equal && told["state"] == "equal", "{told}");
        assert!(load.answered() > before, "hosts wrote beside it");
    }
    load.stop();
}

/// Turns a bit of a block and makes its sum and its slot agree with that.
fn falsify(node: &Appliance, chunk: u64, block: u64) {
    let image = base_of_large(node, "img");
    turn(&image, (chunk << 20) + block * 4096 + 9);
    let mut bytes = vec![0; 4096];
    File::open(&image).unwrap().read_exact_at(&mut bytes, (chunk << 20) + block * 4096).unwrap();
    let path = base_of_large(node, "sum");
    let sidecar = File::options().read(true).write(true).open(path).unwrap();
    let sum = crc32fast::hash(&bytes) ^ 0xc71c_0011;
    let sums_at = 8192 + chunk * 1024;
    sidecar.write_all_at(&sum.to_le_bytes(), sums_at + block * 4).unwrap();
    let mut sums = vec![0; 1024];
    sidecar.read_exact_at(&mut sums, sums_at).unwrap();
    let mut slot = [0; 12];
    sidecar.read_exact_at(&mut slot, 4096 + chunk * 16).unwrap();
    slot[8..].copy_from_slice(&crc32fast::hash(&sums).to_le_bytes());
    let checksum = crc32fast::hash(&[&slot[..], &chunk.to_le_bytes()[..]].concat());
    sidecar.write_all_at(&slot, 4096 + chunk * 16).unwrap();
    sidecar.write_all_at(&checksum.to_le_bytes(), 4096 + chunk * 16 + 12).unwrap();
}

#[test]
fn a_block_that_is_whole_and_wrong_is_found_exactly_and_neither_copy_is_changed() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path());
    falsify(&b, 5, 1);
    let (whole, told) = scrub(&b);
    assert!(whole, "its sums agree with it: {told}");
    let before = [digest(&a), digest(&b)];
    let (equal, told) = verify(&a);
    assert!(!equal, "{told}");
    assert_eq!(told["state"], "differs", "{told}");
    let place =
        serde_json::json!([{ "volume": "large", "offset": (5 << 20) + 4096, "length": 4096 }]);
    assert_eq!(told["extents"], place);
    assert!([digest(&a), digest(&b)] == before, "nothing is overwritten");
    for node in [&a, &b] {
        wait_for("the difference to speak against a backup", || {
            let verdict = node.status("g")["backup_capable"].to_string();
            verdict.contains("copies-differ").then_some(())
        });
        assert!(node.has_event("verify-differs"));
    }
    // As it was: the next comparison takes it back, on both nodes.
    falsify(&b, 5, 1);
    let (equal, told) = verify(&b);
    assert!(equal, "{told}");
    for node in [&a, &b] {
        wait_for("a fit copy", || {
            (node.status("g")["backup_capable"]["verdict"] == "yes").then_some(())
        });
    }
}

#[test]
fn what_verify_cannot_read_is_said_of_its_node_and_is_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = pair(dir.path());
    turn(&base_of_large(&b, "img"), (5 << 20) + 4096 + 7);
    let (equal, told) = verify(&a);
    assert!(!equal, "{told}");
    assert_eq!(told["extents"][0]["unreadable_on"], "b", "{told}");
    assert_eq!(told["differing_bytes"], 4096, "{told}");
    wait_for("b to repair it", || b.has_event("repaired").then_some(()));
    let (equal, told) = verify(&a);
    assert!(equal, "{told}");
}
