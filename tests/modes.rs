//! Modes `receive` and `sync` with real processes: what an answer promises, what the loss of the
//! peer does, and that hosts wait only where that was asked for.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use crate::support::faulty::{Call, Faults};
use crate::support::load::{Load, contents, create_volumes, hold};
use crate::support::oracle::BLOCK_BYTES;
use crate::support::{Appliance, Setup, wait_for};
use nix::sys::signal::Signal;
use tidelog::nbd::{Client, NbdAddress};

fn pair(dir: &Path, mode: &[&str]) -> (Appliance, Appliance) {
    pair_by(dir, mode, Vec::new())
}

/// The same, with something added to the environment of the peer.
fn pair_by(
    dir: &Path,
    mode: &[&str],
    environment: Vec<(&'static str, PathBuf)>,
) -> (Appliance, Appliance) {
    let a = Appliance::start(&dir.join("a"), Setup::new("a"));
    let b = Appliance::start(&dir.join("b"), Setup { environment, ..Setup::new("b") });
    a.pair_with(&b);
    a.run(&["group", "create", "g"]);
    create_volumes(&a);
    a.run(&[&["replicate", "g", "--to", "b"], mode].concat());
    wait_until_required(&a);
    (a, b)
}

fn wait_until_required(a: &Appliance) {
    wait_for("answers to wait for b", || {
        let peer = a.status("g")["peers"][0].clone();
        let streaming = peer["replication_state"] == "streaming";
        (streaming && peer["degraded_reason"].is_null()).then_some(())
    });
}

fn connect(node: &Appliance) -> Client {
    Client::connect(&NbdAddress::Unix(node.nbd_socket()), "g/one").unwrap()
}

/// Writes and flushes in a thread of its own; what it sends once that is answered.
fn write_aside(node: &Appliance, byte: u8) -> Receiver<()> {
    let mut client = connect(node);
    let (answered, answer) = mpsc::channel();
    std::thread::spawn(move || {
        client.write(0, &[byte; 4096]).unwrap();
        client.flush().unwrap();
        let _ = answered.send(());
    });
    answer
}

#[test]
fn what_was_answered_in_receive_mode_is_on_the_peer_when_the_primary_is_gone_for_good() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = pair(dir.path(), &["--mode", "receive"]);
    let load = Load::start(a.nbd_socket());
    load.wait_for_more(1000);
    a.kill();
    let history = load.stop();
    b.run(&["promote", "g", "--force"]);
    hold("b, promoted", history.faults(&contents(&b, ""), Some(history.now())));
    assert_eq!(b.json(&["group", "show", "g"])["members"][0]["mode"], "receive");
}

#[test]
fn a_flush_in_sync_mode_is_durable_on_the_peer_when_it_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    let faults = Faults::new(dir.path());
    let (a, b) = pair_by(dir.path(), &["--mode", "sync"], faults.environment());
    // It has all of it in memory long before, and a look at it takes less.
    faults.slow(Call::Sync, Duration::from_millis(500), ".seg");
    let mut client = connect(&a);
    for round in 0..10u8 {
        for block in 0..64 {
            client.write(block * BLOCK_BYTES as u64, &[round; BLOCK_BYTES]).unwrap();
        }
        client.flush().unwrap();
        let head = a.status("g")["log"]["head_lsn"].as_u64().unwrap();
        let durable = b.status("g")["log"]["durable_lsn"].as_u64().unwrap();
        assert!(durable >= head, "round {round}: durable {durable} of {head}");
    }
    let status = a.status("g");
    assert_eq!(
        (&status["peers"][0]["mode"], &status["peers"][0]["degraded"]),
        (&"sync".into(), &false.into())
    );
}

#[test]
fn an_answer_waits_for_a_peer_that_stands_still_until_it_counts_as_lost() {
    for mode in ["receive", "sync"] {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = pair(dir.path(), &["--mode", mode]);
        b.signal(Signal::SIGSTOP);
        let answer = write_aside(&a, 1);
        answer.recv().unwrap();
        let peer = a.status("g")["peers"][0].clone();
        b.signal(Signal::SIGCONT);
        assert_eq!(peer["degraded"], true, "{mode}: answered, and {peer}");
        wait_until_required(&a);
    }
}

/// Its process answers, and the link lives: that its disk takes nothing is all that is wrong.
#[test]
fn a_peer_whose_disk_hangs_while_its_link_lives_counts_as_lost_until_it_answers() {
    let dir = tempfile::tempdir().unwrap();
    let faults = Faults::new(dir.path());
    let (a, b) = pair_by(dir.path(), &["--mode", "sync"], faults.environment());
    faults.slow(Call::Sync, Duration::from_secs(15), ".seg");
    let answer = write_aside(&a, 1);
    answer.recv().unwrap();
    let status = a.status("g");
    let peer = &status["peers"][0];
    assert_eq!((&peer["mode"], &peer["degraded"]), (&"sync".into(), &true.into()), "{peer}");
    let reason = peer["degraded_reason"].as_str().unwrap();
    assert!(reason.contains("nothing became durable there"), "{reason}");
    assert!(a.has_event("degraded"));
    let durable = b.status("g")["log"]["durable_lsn"].as_u64().unwrap();
    let head = status["log"]["head_lsn"].as_u64().unwrap();
    assert!(durable < head, "it has not synced: {durable} of {head}");
    faults.none();
    wait_until_required(&a);
}

#[test]
fn without_a_lost_peer_hosts_go_on_degraded_and_wait_where_they_were_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path(), &["--mode", "sync"]);
    let load = Load::start(a.nbd_socket());
    load.wait_for_more(200);
    b.kill();
    load.wait_for_more(200);
    let peer = a.status("g")["peers"][0].clone();
    assert_eq!(peer["degraded"], true, "{peer}");
    assert!(peer["degraded_reason"].as_str().unwrap().contains("link is down"), "{peer}");
    b.restart();
    wait_until_required(&a);
    load.wait_for_more(200);
    drop(load.stop());

    a.run(&["replicate", "g", "--to", "b", "--on-loss", "block"]);
    assert_eq!(a.json(&["group", "show", "g"])["members"][1]["mode"], "sync", "it stays");
    b.kill();
    wait_for("the loss to be told", || {
        let status = a.status("g");
        status["role_reason"].as_str()?.contains("--on-loss continue").then_some(())
    });
    let answer = write_aside(&a, 1);
    let head = a.status("g")["log"]["head_lsn"].as_u64();
    assert!(answer.try_recv().is_err(), "it waits");
    b.restart();
    wait_for("the answer once the peer is back", || answer.try_recv().ok());
    wait_until_required(&a);
    assert!(b.status("g")["log"]["durable_lsn"].as_u64() >= head);

    b.kill();
    wait_for("the loss to be told", || a.status("g")["role_reason"].as_str().map(|_| ()));
    let answer = write_aside(&a, 2);
    a.run(&["replicate", "g", "--to", "b", "--on-loss", "continue"]);
    wait_for("the answer once hosts may go on", || answer.try_recv().ok());
    assert!(a.status("g")["role_reason"].is_null());
    let codes = a.json(&["events"]).to_string();
    for code in ["degraded", "peer-required", "hosts-wait"] {
        assert!(codes.contains(&format!("\"{code}\"")), "{code}: {codes}");
    }
}

#[test]
fn a_restarted_primary_serves_nobody_before_it_could_ask_where_hosts_are_to_wait() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path(), &["--mode", "receive", "--on-loss", "block"]);
    b.kill();
    a.kill();
    a.restart();
    let reason = a.status("g")["role_reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("must hold what they write"), "{reason}");
    b.restart();
    wait_for("a to serve", || a.status("g")["role_reason"].is_null().then_some(()));
    connect(&a).write(0, &[1; 4096]).unwrap();
}
