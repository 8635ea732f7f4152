//! A log at its limit under living appliances: no stall that status does not name, and hosts that
//! wait for a peer where they were told to.

use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use serde_json::Value;
use tidelog::nbd::{Client, NbdAddress};

use crate::support::load::{Load, client, contents, hold, wait_until_level};
use crate::support::long_log::{LARGE_BYTES, OUTRUN_BYTES, make_group, read_large};
use crate::support::{Appliance, Setup, pause, wait_for};

/// How long hosts may get no answer before status has to say why.
const STALL: Duration = Duration::from_secs(2);

/// Hosts write three times the log's limit as fast as they can; whenever nothing is answered for a
/// while, status says why. `at_a_stall` is done at the first of these.
fn sustained(policy: &[&str], at_a_stall: impl Fn(&Appliance, &Value)) {
    let dir = tempfile::tempdir().unwrap();
    let a = Appliance::start(&dir.path().join("a"), Setup::new("a"));
    make_group(&a);
    a.run(&[&["group", "set", "g"], policy].concat());
    let load = Load::start(a.nbd_socket());
    let writer = {
        let address = NbdAddress::Unix(a.nbd_socket());
        std::thread::spawn(move || {
            let mut client = Client::connect(&address, "g/large").unwrap();
            for part in 0..3 * (OUTRUN_BYTES >> 20) {
                client.write((part << 20) % LARGE_BYTES, &vec![part as u8; 1 << 20]).unwrap();
            }
            client.flush().unwrap();
        })
    };
    let (mut before, mut stalls) = (load.answered(), 0);
    while !writer.is_finished() {
        pause(STALL);
        let (answered, status) = (load.answered(), a.status("g"));
        if answered == before && load.answered() == answered {
            let named = status["log"]["full_reason"].as_str();
            let named = named.is_some_and(|reason| reason.starts_with("log-full"));
            assert!(named, "nothing is answered, and status does not say why: {status}");
            if stalls == 0 {
                at_a_stall(&a, &status);
            }
            stalls += 1;
        }
        let log = &status["log"];
        let held = log["head_lsn"].as_u64().unwrap() - log["horizon_lsn"].as_u64().unwrap();
        let limit = log["limit_bytes"].as_u64().unwrap();
        assert!(held <= limit + (8 << 20), "the log has a limit: {status}");
        before = answered;
    }
    writer.join().unwrap();
    let history = load.stop();
    hold("at the end", history.faults(&contents(&a, ""), Some(history.now())));
    assert!(a.status("g")["log"]["horizon_lsn"].as_u64().unwrap() > 0);
}

#[test]
fn a_log_at_its_limit_never_stalls_hosts_unnamed_where_the_window_gives_way() {
    sustained(&["on_full=fold", "window=1h"], |_, _| {});
}

#[test]
fn a_log_at_its_limit_never_stalls_hosts_unnamed_where_the_window_is_short() {
    sustained(&["on_full=block", "window=1s"], |_, _| {});
}

#[test]
fn a_log_that_blocks_keeps_its_window_until_an_operator_lets_it_go() {
    let told = std::cell::Cell::new(false);
    sustained(&["on_full=block", "window=1h"], |a, status| {
        assert_eq!(status["log"]["horizon_lsn"], 0, "nothing of the window is folded: {status}");
        let reason = status["log"]["full_reason"].as_str().unwrap();
        assert!(reason.contains("group set g on_full=fold"), "{reason}");
        told.set(true);
        a.run(&["group", "set", "g", "on_full=fold"]);
    });
    assert!(told.get(), "hosts were held");
}

/// Writes more than the log holds, aside; what it sends once all is answered.
fn outrun(node: &Appliance, byte: u8) -> Receiver<()> {
    let mut client = client(node, "large");
    let (done, all) = mpsc::channel();
    std::thread::spawn(move || {
        for part in 0..OUTRUN_BYTES >> 20 {
            client.write((part << 20) % LARGE_BYTES, &vec![byte; 1 << 20]).unwrap();
        }
        client.flush().unwrap();
        let _ = done.send(());
    });
    all
}

#[test]
fn hosts_wait_for_a_peer_that_is_behind_where_told_to_until_it_is_back_or_they_are_released() {
    let dir = tempfile::tempdir().unwrap();
    let a = Appliance::start(&dir.path().join("a"), Setup::new("a"));
    let mut b = Appliance::start(&dir.path().join("b"), Setup::new("b"));
    a.pair_with(&b);
    make_group(&a);
    a.run(&["group", "set", "g", "window=0s", "on_peer_behind=block"]);
    a.run(&["replicate", "g", "--to", "b"]);
    for (byte, released) in [(1, false), (2, true)] {
        wait_until_level(&a, &b);
        let common = b.status("g")["log"]["head_lsn"].as_u64();
        b.kill();
        let all = outrun(&a, byte);
        let status = wait_for("hosts to wait", || {
            let status = a.status("g");
            let why = status["log"]["full_reason"].as_str()?;
            why.contains("kept for b").then_some(status.clone())
        });
        let why = status["log"]["full_reason"].as_str().unwrap();
        assert!(why.contains("on_peer_behind=release"), "{why}");
        pause(STALL);
        assert!(all.try_recv().is_err(), "they wait");
        let log = a.status("g")["log"].clone();
        assert!(log["horizon_lsn"].as_u64() <= common, "all that b lacks is in the log: {log}");
        assert!(a.has_event("log-kept-for-peer"));
        if released {
            a.run(&["group", "set", "g", "on_peer_behind=release"]);
        } else {
            b.restart();
        }
        wait_for("all to be answered", || all.try_recv().ok());
        if released {
            assert!(a.status("g")["log"]["horizon_lsn"].as_u64() > common);
            b.restart();
        }
    }
    wait_until_level(&a, &b);
    assert!(b.has_event("image-received"), "the log went past it");
    b.run(&["image", "open", "g", "--at", "now", "--name", "i"]);
    assert!(read_large(&b, "large@i") == read_large(&a, "large"));
}
