//! A group on three nodes: each peer has its own cursor, and failover, return and switchover keep
//! all of them on one history.

use serde_json::Value;

use crate::support::load::{Load, contents, create_volumes, hold};
use crate::support::{Appliance, Setup, wait_for};

fn peer_of(node: &Appliance, peer: &str) -> Value {
    let status = node.status("g");
    let peers = status["peers"].as_array().cloned().unwrap_or_default();
    peers.into_iter().find(|known| known["name"] == peer).unwrap_or_default()
}

fn wait_until_all_follow(primary: &Appliance, others: [&Appliance; 2]) {
    for other in others {
        wait_for(&format!("{} to follow {}", other.node, primary.node), || {
            let status = other.status("g");
            let streams = peer_of(other, primary.node)["replication_state"] == "streaming";
            let equal = status["log"]["head_lsn"] == primary.status("g")["log"]["head_lsn"];
            (status["role"] == "secondary" && streams && equal).then_some(())
        });
    }
}

fn assert_equal(primary: &Appliance, others: [&Appliance; 2], name: &str) {
    let live = contents(primary, "");
    for other in others {
        other.run(&["image", "open", "g", "--at", "now", "--name", name]);
        assert_eq!(contents(other, &format!("@{name}")), live, "{}", other.node);
        other.run(&["image", "close", &format!("g@{name}")]);
    }
}

#[test]
fn a_group_with_two_copies_has_a_cursor_for_each_survives_its_primary_and_takes_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let start = |name: &'static str| Appliance::start(&dir.path().join(name), Setup::new(name));
    let (mut a, b, c) = (start("a"), start("b"), start("c"));
    a.pair_with(&b);
    a.pair_with(&c);
    b.pair_with(&c);
    a.run(&["group", "create", "g"]);
    create_volumes(&a);
    a.run(&["replicate", "g", "--to", "b"]);
    a.run(&["replicate", "g", "--to", "c"]);
    wait_until_all_follow(&a, [&b, &c]);
    wait_for("b to know that c is a copy too", || {
        let peer = peer_of(&b, "c");
        peer["replication_state_reason"].as_str()?.contains("both are copies").then_some(())
    });

    let load = Load::start(a.nbd_socket());
    load.wait_for_more(300);
    // Each has its own cursor: one that is paused holds up nobody.
    a.run(&["pause", "g", "--peer", "c"]);
    load.wait_for_more(300);
    wait_for("b to be ahead of c", || {
        let lags = ["b", "c"].map(|peer| peer_of(&a, peer)["lag"]["bytes"].as_u64());
        (lags[0]? < lags[1]?).then_some(())
    });
    a.run(&["resume", "g", "--peer", "c"]);
    load.wait_for_more(300);
    a.kill();
    let mut history = load.stop();
    b.run(&["promote", "g", "--force"]);
    let held = contents(&b, "");
    hold("b, promoted", history.faults(&held, None));
    history.forgive(&held);
    // What only c had received, if there was any, is kept there as a branch.
    wait_for("c to follow b", || {
        (peer_of(&c, "b")["replication_state"] == "streaming").then_some(())
    });
    a.restart();
    wait_until_all_follow(&b, [&a, &c]);
    assert_equal(&b, [&a, &c], "after");

    let refused = b.command(&["switchover", "g"]);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains("switchover g --to"), "{error}");
    let load = Load::go_on(b.nbd_socket(), history);
    load.wait_for_more(200);
    // Given where neither the old nor the new primary is.
    a.run(&["switchover", "g", "--to", "c"]);
    let history = load.stop();
    assert_eq!(c.status("g")["role"], "primary");
    hold("c, switched to", history.faults(&contents(&c, ""), Some(history.now())));
    wait_until_all_follow(&c, [&a, &b]);
    assert_equal(&c, [&a, &b], "switched");
    for node in [&a, &b, &c] {
        let events = node.json(&["events"]).to_string();
        assert!(!events.contains("\"split-brain\""), "{}: {events}", node.node);
        assert_eq!(node.errors(), Vec::<String>::new(), "node {}", node.node);
    }
}

#[test]
fn a_primary_that_returns_waits_for_the_answer_of_every_peer() {
    let dir = tempfile::tempdir().unwrap();
    let start = |name: &'static str| Appliance::start(&dir.path().join(name), Setup::new(name));
    let (mut a, mut b, c) = (start("a"), start("b"), start("c"));
    a.pair_with(&b);
    a.pair_with(&c);
    b.pair_with(&c);
    a.run(&["group", "create", "g"]);
    a.run(&["volume", "create", "g/v", "--size", "4M"]);
    a.run(&["replicate", "g", "--to", "b"]);
    a.run(&["replicate", "g", "--to", "c"]);
    wait_until_all_follow(&a, [&b, &c]);
    // b is promoted while a is away, and is away itself when a returns and c answers.
    a.kill();
    b.run(&["promote", "g", "--force"]);
    wait_for("c to follow b", || {
        (peer_of(&c, "b")["replication_state"] == "streaming").then_some(())
    });
    b.kill();
    a.restart();
    let reason = wait_for("a to be held back", || {
        let reason = a.status("g")["role_reason"].as_str()?.to_owned();
        reason.contains("holds a reign that went on").then_some(reason)
    });
    assert!(reason.contains("tidelog promote g"), "{reason}");
    b.restart();
    wait_until_all_follow(&b, [&a, &c]);
}
