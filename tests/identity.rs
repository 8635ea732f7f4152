//! Nodes that are not who they seem: a copy of a running node's disk, a node made anew under an old
//! name, a disk that was put back. They are recognised, and nothing is mixed or overwritten because
//! of them.

use std::path::Path;
use std::process::Command;

use crate::support::load::{client, contents, create_volumes, wait_until_level};
use crate::support::oracle::{BLOCK_BYTES, stamp};
use crate::support::{Appliance, Setup, wait_for};

fn pair(dir: &Path) -> (Appliance, Appliance) {
    let a = Appliance::start(&dir.join("a"), Setup::new("a"));
    let b = Appliance::start(&dir.join("b"), Setup::new("b"));
    a.pair_with(&b);
    a.run(&["group", "create", "g"]);
    create_volumes(&a);
    a.run(&["replicate", "g", "--to", "b"]);
    write(&a, 1_000_000);
    wait_until_level(&a, &b);
    (a, b)
}

/// Writes every second block of the first volume with numbers from `first` on.
fn write(node: &Appliance, first: u64) {
    let mut host = client(node, "one");
    for block in (0..64).step_by(2) {
        host.write(block * BLOCK_BYTES as u64, &stamp(first + block, 0, block)).unwrap();
    }
    host.flush().unwrap();
}

/// Copies the disk of a node that was stopped.
fn copy_disk(node: &Appliance, dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    let copied = Command::new("cp").arg("-a").arg(node.dir.join("data")).arg(dir).status();
    assert!(copied.unwrap().success());
}

/// A node that runs on a copy of the disk of one that was stopped.
fn clone_of(node: &Appliance, dir: &Path) -> Appliance {
    copy_disk(node, dir);
    Appliance::start(dir, Setup::new(node.node))
}

/// Starts a node again on its disk as that was before `meanwhile`; what that gave.
fn put_back<T>(node: &mut Appliance, meanwhile: impl FnOnce(&Appliance) -> T) -> T {
    let kept = node.dir.join("kept");
    node.stop();
    copy_disk(node, &kept);
    node.restart();
    let given = meanwhile(node);
    node.stop();
    std::fs::remove_dir_all(node.dir.join("data")).unwrap();
    std::fs::rename(kept.join("data"), node.dir.join("data")).unwrap();
    node.restart();
    given
}

/// Writes with numbers from `first` on, and waits until b has that and a knows it; the LSN behind.
fn write_on_both(a: &Appliance, b: &Appliance, first: u64) -> u64 {
    wait_until_level(a, b);
    write(a, first);
    wait_until_level(a, b);
    wait_for("a to know it durable on b", || {
        let status = a.status("g");
        let head = status["log"]["head_lsn"].as_u64();
        head.filter(|_| status["peers"][0]["durable_lsn"] == status["log"]["head_lsn"])
    })
}

fn wait_until_cloned(node: &Appliance, peer: &str) {
    let told = wait_for("the clone to be recognised", || node.events("peer-cloned").pop());
    assert!(told.contains(&format!("peer {peer}: two appliances")), "{told}");
    let link = &node.status("g")["peers"][0];
    assert_ne!(link["link_state"], "connected", "neither is let in");
}

fn shown(node: &Appliance, name: &str) -> std::collections::HashMap<(usize, u64), u64> {
    node.run(&["image", "open", "g", "--at", "now", "--name", name]);
    let held = contents(node, &format!("@{name}"));
    node.run(&["image", "close", &format!("g@{name}")]);
    held
}

#[test]
fn a_clone_of_a_secondary_is_recognised_and_neither_is_let_in_until_one_is_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path());
    b.stop();
    let mut clone = clone_of(&b, &dir.path().join("clone"));
    b.restart();
    wait_until_cloned(&a, "b");
    write(&a, 2_000_000);
    clone.stop();
    wait_until_level(&a, &b);
    assert_eq!(shown(&b, "after"), contents(&a, ""));
    assert_eq!(a.events("peer-cloned").len(), 1, "it is told once");
}

#[test]
fn a_clone_of_a_primary_is_recognised_and_its_writes_are_never_mixed_with_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, b) = pair(dir.path());
    a.stop();
    let clone = clone_of(&a, &dir.path().join("clone"));
    a.restart();
    wait_until_cloned(&b, "a");
    // Both serve, and each has its own hosts.
    for (node, first) in [(&a, 2_000_000), (&clone, 3_000_000)] {
        wait_for("it to serve", || node.status("g")["role_reason"].is_null().then_some(()));
        write(node, first);
    }
    let (held, left, copied) = (shown(&b, "beside"), contents(&a, ""), contents(&clone, ""));
    drop(clone);
    let before = held.values().all(|id| *id < 2_000_000);
    assert!(before || held == left || held == copied, "{held:?}");
    // Its own primary is followed, or both say why not; what the other wrote never comes in.
    let end = wait_for("b to follow a or to refuse it", || {
        let state = b.status("g")["peers"][0]["replication_state"].as_str()?.to_owned();
        ["streaming", "blocked"].contains(&&*state).then_some(state)
    });
    let held = shown(&b, "after");
    if end == "streaming" {
        wait_until_level(&a, &b);
        assert_eq!(shown(&b, "level"), left);
    } else {
        assert_eq!(held, copied);
    }
}

#[test]
fn a_node_made_anew_under_an_old_name_is_no_peer_until_it_is_paired_and_overwrites_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path());
    let before = contents(&a, "");
    b.kill();
    std::fs::remove_dir_all(b.dir.join("data")).unwrap();
    b.restart();
    // It is another node: its key is not the one that was paired.
    let reason = wait_for("a to say who answers", || {
        let reason = a.status("g")["peers"][0]["link_state_reason"].as_str()?.to_owned();
        reason.contains("another key").then_some(reason)
    });
    assert!(reason.contains("tidelog peer remove b"), "{reason}");
    assert_eq!(contents(&a, ""), before);
    let token = b.json(&["peer", "invite"]);
    let (token, address) = (token["token"].as_str().unwrap(), token["address"].as_str().unwrap());
    let refused = a.command(&["peer", "join", token, "--address", address]);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains("tidelog peer remove b"), "{error}");
    a.run(&["replicate", "g", "--to", "b", "--stop"]);
    a.run(&["peer", "remove", "b"]);
    let token = b.json(&["peer", "invite"]);
    let (token, address) = (token["token"].as_str().unwrap(), token["address"].as_str().unwrap());
    a.run(&["peer", "join", token, "--address", address]);
    a.run(&["replicate", "g", "--to", "b"]);
    wait_until_level(&a, &b);
    assert_eq!(shown(&b, "anew"), before);
}

#[test]
fn a_node_whose_disk_was_put_back_is_recognised_and_gets_again_what_it_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path());
    let had = put_back(&mut b, |b| write_on_both(&a, b, 2_000_000));
    let told = wait_for("a to recognise it", || a.events("peer-rolled-back").pop());
    assert!(told.contains(&format!("group g: b had LSN {had} durable and now ends at")), "{told}");
    wait_until_level(&a, &b);
    assert_eq!(shown(&b, "sent-again"), contents(&a, ""));

    put_back(&mut a, |a| write_on_both(a, &b, 3_000_000));
    let told = wait_for("a to take it back", || a.events("takes-back").pop());
    assert!(told.contains("group g: b has") && told.contains("that this node lost"), "{told}");
    wait_until_level(&a, &b);
    let held = contents(&a, "");
    assert!((0..64).step_by(2).all(|block| held[&(0, block)] == 3_000_000 + block), "{held:?}");
    assert_eq!(shown(&b, "taken-back"), held);
    for node in [&a, &b] {
        assert!(!node.has_event("peer-cloned") && !node.has_event("split-brain"));
    }
}
