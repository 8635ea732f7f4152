//! `kill -9` of either appliance under load, twenty times (`TIDELOG_KILLS=N` of them, in
//! `scripts/soak`): no answered write is lost, every image on either is a prefix, and both nodes go
//! on by themselves.

use crate::support::load::{Load, contents, create_volumes, hold};
use crate::support::{Appliance, Setup, wait_for};

const KILLS: usize = 20;

fn kills() -> usize {
    match std::env::var("TIDELOG_KILLS") {
        Ok(text) => text.parse().expect("TIDELOG_KILLS is a number"),
        Err(_) => KILLS,
    }
}

/// Requests between two kills, at least.
const REQUESTS_PER_ROUND: usize = 400;

/// Every write that was answered before now is in the live volumes of the primary.
fn check_primary(a: &Appliance, load: &Load, round: usize) {
    let answered_by = load.history.lock().unwrap().now();
    let held = contents(a, "");
    let faults = load.history.lock().unwrap().faults_of_live(&held, answered_by);
    hold(&format!("round {round}, live on a"), faults);
}

/// An image is a prefix, and has every write that was answered by then.
fn check_image(node: &Appliance, load: &Load, round: usize, answered_by: u64) {
    let name = format!("round-{round}");
    node.run(&["image", "open", "g", "--at", "now", "--name", &name]);
    let held = contents(node, &format!("@{name}"));
    node.run(&["image", "close", &format!("g@{name}")]);
    let faults = load.history.lock().unwrap().faults(&held, Some(answered_by));
    hold(&format!("round {round}, image on {}", node.node), faults);
}

fn wait_until_streaming(a: &Appliance) {
    wait_for("b to stream again", || {
        (a.status("g")["peers"][0]["replication_state"] == "streaming").then_some(())
    });
}

/// Waits until b has durably what a's log holds now.
fn wait_until_b_has(a: &Appliance, b: &Appliance) {
    let head = a.status("g")["log"]["head_lsn"].as_u64().unwrap();
    wait_for("b to have durably what a had", || {
        (b.status("g")["log"]["durable_lsn"].as_u64()? >= head).then_some(())
    });
}

#[test]
fn answered_writes_survive_kill_9_of_either_node_twenty_times() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Appliance::start(&dir.path().join("a"), Setup::new("a"));
    let mut b = Appliance::start(&dir.path().join("b"), Setup::new("b"));
    a.pair_with(&b);
    a.run(&["group", "create", "g"]);
    // Short enough that the log is folded meanwhile, far longer than a node is away.
    a.run(&["group", "set", "g", "window=20s"]);
    create_volumes(&a);
    a.run(&["replicate", "g", "--to", "b"]);
    wait_until_streaming(&a);

    let load = Load::start(a.nbd_socket());
    let kills = kills();
    for round in 0..kills {
        load.wait_for_more(REQUESTS_PER_ROUND);
        let kill_primary = round % 2 == 0;
        let victim = if kill_primary { &mut a } else { &mut b };
        victim.kill();
        victim.restart();
        load.wait_for_more(REQUESTS_PER_ROUND / 4);
        check_primary(&a, &load, round);
        wait_until_streaming(&a);
        let answered_by = load.history.lock().unwrap().now();
        wait_until_b_has(&a, &b);
        for node in [&a, &b] {
            check_image(node, &load, round, answered_by);
        }
    }
    let history = load.stop();
    assert!(history.answered() > kills * REQUESTS_PER_ROUND);
    wait_until_b_has(&a, &b);
    let live = contents(&a, "");
    hold("live on a at the end", history.faults(&live, Some(history.now())));
    b.run(&["image", "open", "g", "--at", "now", "--name", "end"]);
    assert_eq!(contents(&b, "@end"), live, "b holds what a holds");
    println!("{kills} kills, {} requests answered", history.answered());
    for node in [&a, &b] {
        assert_eq!(node.errors(), Vec::<String>::new(), "node {}", node.node);
    }
    assert_eq!(a.status("g")["role"], "primary");
    assert_eq!(b.status("g")["role"], "secondary");
}
