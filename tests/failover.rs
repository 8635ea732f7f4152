//! A failover and the return of the old primary, with real processes under load.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::control::request;
use crate::support::load::{Load, client, contents, create_volumes, hold, wait_until_level};
use crate::support::oracle::{BLOCK_BYTES, stamp};
use crate::support::{Appliance, Setup, pause, wait_for};

fn codes(node: &Appliance) -> Vec<String> {
    let events = node.json(&["events"]);
    let events = events["events"].as_array().cloned().unwrap_or_default();
    events.iter().filter_map(|event| Some(event["code"].as_str()?.to_owned())).collect()
}

fn wait_until_it_follows(secondary: &Appliance, primary: &Appliance) {
    wait_for("the old primary to follow", || {
        let (here, there) = (secondary.status("g"), primary.status("g"));
        let equal = here["log"]["head_lsn"] == there["log"]["head_lsn"];
        let streaming = here["peers"][0]["replication_state"] == "streaming";
        (here["role"] == "secondary" && streaming && equal).then_some(())
    });
}

/// What the volumes hold on the primary, and in an image on the secondary, is the same.
fn assert_equal(primary: &Appliance, secondary: &Appliance, name: &str) {
    secondary.run(&["image", "open", "g", "--at", "now", "--name", name]);
    assert_eq!(contents(secondary, &format!("@{name}")), contents(primary, ""));
    secondary.run(&["image", "close", &format!("g@{name}")]);
}

#[test]
fn kill_9_of_the_primary_promote_and_its_return_end_in_order_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Appliance::start(&dir.path().join("a"), Setup::new("a"));
    let mut b = Appliance::start(&dir.path().join("b"), Setup::new("b"));
    a.pair_with(&b);
    a.run(&["group", "create", "g"]);
    create_volumes(&a);
    a.run(&["replicate", "g", "--to", "b"]);
    wait_for("b to stream", || {
        (a.status("g")["peers"][0]["replication_state"] == "streaming").then_some(())
    });

    let load = Load::start(a.nbd_socket());
    load.wait_for_more(500);
    let refused = b.command(&["promote", "g"]);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains("is its primary"), "{error}");
    a.kill();
    let history = load.stop();
    // It may know that it is behind by what the last heartbeat told.
    b.run(&["promote", "g", "--force"]);
    hold("b, promoted", history.faults(&contents(&b, ""), None));
    let address = tidelog::nbd::NbdAddress::Unix(b.nbd_socket());
    let mut client = tidelog::nbd::Client::connect(&address, "g/one").unwrap();
    for block in 0..64 {
        client.write(block * BLOCK_BYTES as u64, &stamp(1_000_000 + block, 0, block)).unwrap();
    }
    client.flush().unwrap();

    a.restart();
    wait_until_it_follows(&a, &b);
    assert_equal(&b, &a, "after");
    // The old primary's tail, where it had one, is a branch.
    let branches = a.json(&["timeline", "g"])["branches"].as_array().cloned().unwrap();
    assert!(branches.iter().all(|branch| branch["authored"] == true), "{branches:?}");
    for node in [&a, &b] {
        let codes = codes(node);
        assert!(!codes.iter().any(|code| code == "split-brain"), "{codes:?}");
    }
    assert!(codes(&a).iter().any(|code| code == "yielded"), "{:?}", codes(&a));

    // And back: the new primary dies with a tail that its peer has not got, and yields although
    // nothing is copied.
    a.run(&["pause", "g"]);
    for block in 64..128 {
        client.write(block * BLOCK_BYTES as u64, &stamp(2_000_000 + block, 0, block)).unwrap();
    }
    drop(client);
    b.kill();
    a.run(&["promote", "g", "--force"]);
    b.restart();
    wait_for("b to yield", || {
        let status = b.status("g");
        let state = &status["peers"][0]["replication_state"];
        (status["role"] == "secondary" && state == "paused").then_some(())
    });
    a.run(&["resume", "g"]);
    wait_until_it_follows(&b, &a);
    assert_equal(&a, &b, "back");
    let branches = b.json(&["timeline", "g"])["branches"].as_array().cloned().unwrap();
    assert_eq!(branches.len(), 1, "{branches:?}");
    let name = branches[0]["name"].as_str().unwrap();
    assert!(branches[0]["bytes"].as_u64().unwrap() > 64 * BLOCK_BYTES as u64);
    // It is exported as any image: the tail that left the history, and under it what was common.
    b.run(&["image", "open", "g", "--branch", name, "--name", "tail"]);
    let mut client = tidelog::nbd::Client::connect(&address, "g/one@tail").unwrap();
    for block in [0, 63, 64, 127] {
        let number = if block < 64 { 1_000_000 } else { 2_000_000 } + block;
        let mut found = vec![0; BLOCK_BYTES];
        client.read(block * BLOCK_BYTES as u64, &mut found).unwrap();
        assert_eq!(found, stamp(number, 0, block), "block {block}");
    }
    drop(client);
    let holds = b.json(&["timeline", "g"])["holds"].clone();
    let held = |key: &str, of: &str| {
        holds.as_array().unwrap().iter().any(|hold| hold[key] == of && hold["lost"].is_null())
    };
    assert!(held("image", "tail") && held("branch", name), "{holds}");
    assert!(!b.command(&["branch", "remove", "g", name]).status.success(), "it is shown");
    b.run(&["image", "close", "g@tail"]);
    b.run(&["branch", "remove", "g", name]);
    assert_eq!(b.json(&["branch", "list", "g"])["branches"].as_array().map(Vec::len), Some(0));
    for node in [&a, &b] {
        assert_eq!(node.errors(), Vec::<String>::new(), "node {}", node.node);
    }
}

#[test]
fn a_switchover_under_load_loses_nothing_and_is_refused_where_it_would() {
    let dir = tempfile::tempdir().unwrap();
    let a = Appliance::start(&dir.path().join("a"), Setup::new("a"));
    let b = Appliance::start(&dir.path().join("b"), Setup::new("b"));
    a.pair_with(&b);
    a.run(&["group", "create", "g"]);
    create_volumes(&a);
    let refused = |node: &Appliance, why: &str| {
        let refused = node.command(&["switchover", "g"]);
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && error.contains(why), "{error}");
        assert_eq!(a.status("g")["role"], "primary");
    };
    refused(&a, "is not replicated");
    a.run(&["replicate", "g", "--to", "b"]);
    wait_for("b to stream", || {
        (a.status("g")["peers"][0]["replication_state"] == "streaming").then_some(())
    });
    let load = Load::start(a.nbd_socket());
    load.wait_for_more(200);
    a.run(&["pause", "g"]);
    refused(&a, "paused");
    load.wait_for_more(100);
    a.run(&["resume", "g"]);
    wait_for("b to stream again", || {
        (a.status("g")["peers"][0]["replication_state"] == "streaming").then_some(())
    });

    // Given on the secondary: it goes to the primary.
    b.run(&["switchover", "g"]);
    assert_eq!(b.status("g")["role"], "primary");
    let history = load.stop();
    hold("b", history.faults(&contents(&b, ""), Some(history.now())));
    wait_until_it_follows(&a, &b);

    let load = Load::go_on(b.nbd_socket(), history);
    load.wait_for_more(200);
    b.run(&["switchover", "g"]);
    let history = load.stop();
    assert_eq!(a.status("g")["role"], "primary");
    hold("a", history.faults(&contents(&a, ""), Some(history.now())));
    wait_until_it_follows(&b, &a);
    // Each of the two nodes has given it up once, and taken it over once, and tells so.
    for (node, other) in [(&a, &b), (&b, &a)] {
        let [gave] = &node.events("switched-over")[..] else { panic!("{}", node.node) };
        let [took] = &other.events("promoted")[..] else { panic!("{}", other.node) };
        let (_, from) = gave.rsplit_once("from LSN ").unwrap();
        let from = from.strip_suffix(" on").unwrap();
        let told = format!("begins at LSN {from}: {} has handed it over", node.node);
        assert!(took.contains(&told), "{took}");
    }
    assert_equal(&a, &b, "after");
    for node in [&a, &b] {
        assert_eq!(node.json(&["timeline", "g"])["branches"].as_array().map(Vec::len), Some(0));
        assert_eq!(node.errors(), Vec::<String>::new(), "node {}", node.node);
    }
}

/// The client goes as soon as the old primary is none any more, and before the new one is.
#[test]
fn a_switchover_whose_client_goes_away_is_carried_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let a = Appliance::start(&dir.path().join("a"), Setup::new("a"));
    let b = Appliance::start(&dir.path().join("b"), Setup::new("b"));
    a.pair_with(&b);
    a.run(&["group", "create", "g"]);
    create_volumes(&a);
    a.run(&["replicate", "g", "--to", "b"]);
    for turn in 0..6 {
        let (from, to) = if turn % 2 == 0 { (&a, &b) } else { (&b, &a) };
        wait_for("the peer to stream", || {
            (from.status("g")["peers"][0]["replication_state"] == "streaming").then_some(())
        });
        let mut client = UnixStream::connect(from.control_socket()).unwrap();
        client
            .write_all(
                b"POST /v1/groups/g/switchover HTTP/1.1\r\nhost: x\r\n\
                  content-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
            )
            .unwrap();
        // Without a process for each look: the other half takes milliseconds.
        let mut looks = 0;
        while !request(from, "GET", "/v1/groups/g", "").2.contains("\"role\":\"secondary\"") {
            looks += 1;
            assert!(looks < 100_000, "the primary does not hand over");
        }
        drop(client);
        wait_for("the new primary", || (to.status("g")["role"] == "primary").then_some(()));
        wait_for("the end of the command to be told", || {
            let told = from.json(&["events"])["events"].as_array().unwrap().clone();
            let audits = told.iter().filter(|event| {
                let text = event["text"].as_str().unwrap_or_default();
                event["code"] == "audit" && text.starts_with("switchover") && text.ends_with("done")
            });
            (audits.count() == turn / 2 + 1).then_some(())
        });
    }
}

#[test]
fn a_promote_beside_a_living_primary_is_a_split_brain_until_an_operator_resolves_it() {
    let dir = tempfile::tempdir().unwrap();
    let a = Appliance::start(&dir.path().join("a"), Setup::new("a"));
    let mut b = Appliance::start(&dir.path().join("b"), Setup::new("b"));
    a.pair_with(&b);
    a.run(&["group", "create", "g"]);
    a.run(&["volume", "create", "g/v", "--size", "4M"]);
    a.run(&["replicate", "g", "--to", "b"]);
    wait_for("b to stream", || {
        (a.status("g")["peers"][0]["replication_state"] == "streaming").then_some(())
    });
    let nothing = a.command(&["resolve", "g", "--preview"]);
    let error = String::from_utf8_lossy(&nothing.stderr).into_owned();
    assert!(!nothing.status.success() && error.contains("tidelog status g"), "{error}");
    // By force, beside a primary that lives.
    b.run(&["promote", "g", "--force"]);
    for node in [&a, &b] {
        wait_for("the split brain to be told", || {
            (node.status("g")["peers"][0]["replication_state"] == "split-brain").then_some(())
        });
    }
    let written = |node: &Appliance, byte: u8| {
        let address = tidelog::nbd::NbdAddress::Unix(node.nbd_socket());
        let mut client = tidelog::nbd::Client::connect(&address, "g/v").unwrap();
        client.write(0, &[byte; 4096]).unwrap();
        client.disconnect().unwrap();
    };
    written(&a, 1);
    written(&b, 2);
    // A restart of the one that was promoted changes nothing: the other serves.
    b.stop();
    b.restart();
    let shown = wait_for("the preview", || {
        let preview = a.command(&["resolve", "g", "--preview"]);
        let text = String::from_utf8_lossy(&preview.stdout).into_owned();
        (preview.status.success() && !text.contains("unknown")).then_some(text)
    });
    assert!(shown.contains("only here") && shown.contains("only on b"), "{shown}");
    assert!(!a.command(&["resolve", "g"]).status.success(), "it must be said which side yields");
    let kept = a.run(&["resolve", "g", "--discard-local"]);
    assert!(kept.contains("kept as a branch"), "{kept}");
    wait_until_it_follows(&a, &b);
    let branches = a.json(&["timeline", "g"])["branches"].as_array().cloned().unwrap();
    assert_eq!((branches.len(), &branches[0]["authored"]), (1, &true.into()), "{branches:?}");
    a.run(&["image", "open", "g", "--at", "now", "--name", "i"]);
    let address = tidelog::nbd::NbdAddress::Unix(a.nbd_socket());
    let mut client = tidelog::nbd::Client::connect(&address, "g/v@i").unwrap();
    let mut bytes = [0; 4096];
    client.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [2; 4096]);
}

/// The old primary is started while its copy is promoted, which is done a little later in each
/// round: before it has read its log, while it asks its peer, when it serves. One of the two is
/// primary then, or both say that they are. The roles change with each round.
#[test]
fn an_old_primary_that_comes_back_in_the_middle_of_a_promote_ends_in_order_or_as_a_split_brain() {
    let dir = tempfile::tempdir().unwrap();
    let start = |name: &'static str| Appliance::start(&dir.path().join(name), Setup::new(name));
    let (mut old, mut new) = (start("a"), start("b"));
    old.pair_with(&new);
    old.run(&["group", "create", "g"]);
    create_volumes(&old);
    old.run(&["replicate", "g", "--to", "b"]);
    let mut answered = Vec::new();
    let mut write = |node: &Appliance| {
        let block = answered.len() as u64;
        let bytes = stamp(1 + block, 0, block);
        let mut host = client(node, "one");
        host.write(block * BLOCK_BYTES as u64, &bytes).unwrap();
        host.flush().unwrap();
        answered.push(((0, block), 1 + block));
        answered.clone()
    };
    let mut split_brains = 0;
    for round in 0..10u64 {
        wait_until_level(&old, &new);
        write(&old);
        wait_until_level(&old, &new);
        old.kill();
        std::thread::scope(|scope| {
            let (copy, log) = (&new, old.dir.join("serve.log"));
            let starts =
                move || std::fs::read_to_string(&log).unwrap().matches("unclean-start").count();
            let before = starts();
            scope.spawn(move || {
                if round > 0 {
                    wait_for("its log to be recovered", || (starts() > before).then_some(()));
                    pause(Duration::from_millis((round - 1).pow(2)));
                }
                let done = request(copy, "POST", "/v1/groups/g/promote", "{\"force\":true}");
                assert_eq!(done.0, 200, "{}", done.2);
            });
            old.restart();
        });
        let answered = write(&new);
        let is_split = wait_for("one primary, or a split brain that both tell", || {
            let both = [&old, &new].map(|node| node.status("g"));
            let are = |state: &str| {
                both.iter().all(|status| status["peers"][0]["replication_state"] == state)
            };
            assert_eq!(both[1]["role"], "primary", "{}", both[1]);
            let in_order = both[0]["role"] == "secondary" && are("streaming");
            (in_order || are("split-brain")).then_some(!in_order)
        });
        if is_split {
            split_brains += 1;
            assert!(old.has_event("split-brain") && new.has_event("split-brain"));
            wait_for("the old primary to yield", || {
                old.command(&["resolve", "g", "--discard-local"]).status.success().then_some(())
            });
        }
        wait_until_it_follows(&old, &new);
        let live = contents(&new, "");
        assert!(answered.iter().all(|(place, id)| live[place] == *id), "round {round}: {live:?}");
        assert_equal(&new, &old, "after");
        std::mem::swap(&mut old, &mut new);
    }
    println!("{split_brains} of 10 rounds ended as a split brain");
}
