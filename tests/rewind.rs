//! A group that goes back to an earlier moment, with real processes: images before, inside and
//! behind what is left behind, on both nodes; clients; a copy that has folded too far.

use serde_json::Value;

use crate::support::load::{
    Load, VOLUMES, client, contents, create_volumes, hold, wait_until_level,
};
use crate::support::oracle::{BLOCK_BYTES, stamp};
use crate::support::{Appliance, Setup, wait_for};

fn pair(dir: &std::path::Path, limits_of_b: &str, mode: &str) -> (Appliance, Appliance) {
    let a = Appliance::start(&dir.join("a"), Setup::new("a"));
    let more = limits_of_b.to_owned();
    let b = Appliance::start(&dir.join("b"), Setup { more, ..Setup::new("b") });
    a.pair_with(&b);
    a.run(&["group", "create", "g"]);
    create_volumes(&a);
    a.run(&["replicate", "g", "--to", "b", "--mode", mode]);
    (a, b)
}

/// Stamps blocks of all volumes; different numbers are different bytes.
fn write_stamps(a: &Appliance, number: u64, blocks: std::ops::Range<u64>) {
    for (index, volume) in VOLUMES.iter().enumerate() {
        let mut client = client(a, volume);
        for block in blocks.clone() {
            let bytes = stamp(number * 1000 + block, index, block);
            client.write(block * BLOCK_BYTES as u64, &bytes).unwrap();
        }
        client.flush().unwrap();
    }
    wait_for("clients to be gone", || {
        let volumes = a.status("g")["volumes"].clone();
        let mut volumes = volumes.as_array().unwrap().iter();
        volumes.all(|volume| volume["clients"] == 0).then_some(())
    });
}

fn left_behind(rewound: &Value) -> String {
    format!("lsn:{}", rewound["from"]["lsn"])
}

#[test]
fn images_before_inside_and_behind_a_rewind_are_the_same_on_both_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = pair(dir.path(), "", "async");
    write_stamps(&a, 1, 0..64);
    a.run(&["bookmark", "g", "before"]);
    let before = contents(&a, "");
    write_stamps(&a, 2, 32..96);
    a.run(&["bookmark", "g", "inside"]);
    let inside = contents(&a, "");
    write_stamps(&a, 3, 0..48);
    let last = contents(&a, "");
    a.run(&["volume", "create", "g/new", "--size", "1M"]);
    wait_until_level(&a, &b);
    // A host that is there is not overtaken, unless that is asked for. Given on the secondary.
    let mut host = client(&a, VOLUMES[0]);
    let refused = b.command(&["rewind", "g", "--to", "before"]);
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && told.contains("1 clients are connected"), "{told}");
    assert!(told.contains("--force"), "{told}");
    let rewound = b.json(&["rewind", "g", "--to", "before", "--force"]);
    assert!(host.read(0, &mut [0; 512]).is_err(), "it was cut off");
    wait_until_level(&a, &b);
    let points = ["before", "inside", &left_behind(&rewound), "now"];
    let check = |nodes: [&Appliance; 2], what: &str| {
        for node in nodes {
            for (point, expected) in points.iter().zip([&before, &inside, &last, &before]) {
                node.run(&["image", "open", "g", "--at", point, "--name", "look"]);
                assert_eq!(&contents(node, "@look"), expected, "{what}: {point} on {}", node.node);
                node.run(&["image", "close", "g@look"]);
            }
            let timeline = node.json(&["timeline", "g"]);
            assert_eq!(timeline["rewinds"].as_array().map(Vec::len), Some(1), "{timeline}");
            assert_eq!(timeline["rewinds"][0]["to"]["lsn"], rewound["to"]["lsn"]);
            assert!(node.run(&["timeline", "g"]).contains("REWIND FROM"));
            assert!(node.has_event("rewound"), "{what}: {}", node.node);
        }
    };
    check([&a, &b], "live");
    assert_eq!(contents(&a, ""), before);
    let volumes = a.json(&["volume", "list"]).to_string();
    assert!(!volumes.contains("new"), "{volumes}");
    for node in [&mut a, &mut b] {
        node.kill();
        node.restart();
    }
    wait_until_level(&a, &b);
    check([&a, &b], "after kill -9");
    // Undone on the other node, after it has taken over.
    a.run(&["switchover", "g"]);
    wait_until_level(&b, &a);
    assert_eq!(contents(&b, ""), before);
    b.run(&["rewind", "g", "--to", &left_behind(&rewound)]);
    assert_eq!(contents(&b, ""), last);
    let volumes = b.json(&["volume", "list"]).to_string();
    assert!(volumes.contains("new"), "{volumes}");
    wait_until_level(&b, &a);
    a.run(&["image", "open", "g", "--at", "now", "--name", "end"]);
    assert_eq!(contents(&a, "@end"), last);
    for node in [&a, &b] {
        assert_eq!(node.errors(), Vec::<String>::new(), "node {}", node.node);
    }
}

/// Thousands of these number stamps, as no request of a load's hosts is numbered.
const STAMPS: u64 = 1000;

#[test]
fn hosts_whose_answers_wait_for_the_copy_go_on_behind_a_rewind_and_both_nodes_have_it_all() {
    for mode in ["receive", "sync"] {
        let dir = tempfile::tempdir().unwrap();
        let (mut a, b) = pair(dir.path(), "", mode);
        wait_for("answers to wait for b", || {
            let peer = a.status("g")["peers"][0].clone();
            let streaming = peer["replication_state"] == "streaming";
            (streaming && peer["degraded_reason"].is_null()).then_some(())
        });
        let mut points = Vec::new();
        for (number, name) in [(1, "before"), (2, "inside"), (3, "last")] {
            write_stamps(&a, number * STAMPS, number * 16..number * 32 + 32);
            a.run(&["bookmark", "g", name]);
            points.push((name.to_owned(), contents(&a, "")));
        }
        let before = points[0].1.clone();
        let mut host = client(&a, VOLUMES[0]);
        let rewound = a.json(&["rewind", "g", "--to", "before", "--force"]);
        assert!(host.read(0, &mut [0; 512]).is_err(), "{mode}: it was cut off");
        points.push((left_behind(&rewound), points[2].1.clone()));
        let load = Load::start(a.nbd_socket());
        load.wait_for_more(200);
        let peer = a.status("g")["peers"][0].clone();
        assert_eq!((&peer["mode"], &peer["degraded"]), (&mode.into(), &false.into()), "{peer}");
        let check = |nodes: &[&Appliance], when: &str| {
            for node in nodes {
                for (point, expected) in &points {
                    node.run(&["image", "open", "g", "--at", point, "--name", "look"]);
                    let shown = contents(node, "@look");
                    assert_eq!(&shown, expected, "{mode}, {when}: {point} on {}", node.node);
                    node.run(&["image", "close", "g@look"]);
                }
                assert!(node.has_event("rewound"), "{mode}: {}", node.node);
            }
        };
        check(&[&a, &b], "under load");
        load.wait_for_more(200);
        // The primary is gone in the middle of it: what it answered is on the copy, on top of what
        // it went back to.
        a.kill();
        let history = load.stop();
        b.run(&["promote", "g", "--force"]);
        let held = contents(&b, "");
        let of_hosts = held.iter().map(|(place, id)| {
            let stamped = *id >= STAMPS * 1000;
            assert!(!stamped || before[place] == *id, "{mode}: {place:?} holds {id}");
            (*place, if stamped { 0 } else { *id })
        });
        hold(mode, history.faults(&of_hosts.collect(), Some(history.now())));
        check(&[&b], "after the promote");
        a.restart();
        wait_until_level(&b, &a);
        a.run(&["image", "open", "g", "--at", "now", "--name", "end"]);
        assert_eq!(contents(&a, "@end"), held, "{mode}: the other node");
        check(&[&a], "back as the copy");
        a.run(&["image", "close", "g@end"]);
    }
}

#[test]
fn a_copy_that_has_folded_past_the_moment_keeps_its_image_until_another_comes() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = pair(dir.path(), "[limits]\nwindow = \"1s\"\nlog_limit = \"256M\"", "async");
    a.run(&["volume", "create", "g/large", "--size", "64M"]);
    write_stamps(&a, 1, 0..64);
    let before = contents(&a, "");
    a.run(&["bookmark", "g", "before"]);
    let moment = a.status("g")["log"]["head_lsn"].as_u64().unwrap();
    write_stamps(&a, 2, 0..64);
    {
        let mut large = client(&a, "large");
        for part in 0..64 {
            large.write(part << 20, &vec![part as u8 | 1; 1 << 20]).unwrap();
        }
        large.flush().unwrap();
    }
    wait_until_level(&a, &b);
    wait_for("b to fold", || {
        let horizon = b.status("g")["log"]["horizon_lsn"].as_u64()?;
        (horizon > moment).then_some(())
    });
    let last = contents(&a, "");
    b.run(&["pause", "g"]);
    let rewound = a.json(&["rewind", "g", "--to", "before", "--force"]);
    b.run(&["resume", "g"]);
    wait_for("b to be told", || b.has_event("rewind-needs-image").then_some(()));
    wait_for("an image to come", || b.has_event("image-received").then_some(()));
    wait_until_level(&a, &b);
    b.run(&["image", "open", "g", "--at", "now", "--name", "back"]);
    assert_eq!(contents(&b, "@back"), before);
    assert_eq!(contents(&a, ""), before);
    a.run(&["image", "open", "g", "--at", &left_behind(&rewound), "--name", "last"]);
    assert_eq!(contents(&a, "@last"), last);
    // It goes on by the log, and takes over.
    write_stamps(&a, 4, 10..20);
    wait_until_level(&a, &b);
    let end = contents(&a, "");
    b.kill();
    b.restart();
    wait_until_level(&a, &b);
    a.run(&["switchover", "g"]);
    assert_eq!(contents(&b, ""), end);
}

#[test]
fn an_incremental_over_a_rewind_restores_what_the_image_shows() {
    const BYTES: usize = 32 << 20;
    let dir = tempfile::tempdir().unwrap();
    let shown = dir.path().display();
    let more = format!(
        "[[repository]]\nname = \"main\"\nurl = \"{shown}/repository\"\n\
         password_file = \"{shown}/a/password\""
    );
    let a = Appliance::start(&dir.path().join("a"), Setup { more, ..Setup::new("a") });
    a.run(&["group", "create", "g"]);
    a.run(&["volume", "create", "g/v", "--size", &BYTES.to_string()]);
    a.run(&["repository", "init", "main"]);
    a.run(&["job", "set", "g", "j", "--repository", "main"]);
    // Bytes of a number, 1 MiB each, at some of the 32 places.
    let write = |number: u8, places: &[u64]| {
        let mut host = client(&a, "v");
        for place in places {
            host.write(place << 20, &vec![number; 1 << 20]).unwrap();
        }
        host.flush().unwrap();
        host.disconnect().unwrap();
    };
    let mut made = 0;
    let mut backup = |what: &str| {
        a.run(&["backup", "run", "g/j"]);
        made += 1;
        let newest = wait_for("the backup to be made", || {
            let listed = a.json(&["backup", "list", "g/j"]);
            let listed = listed["backups"].as_array().unwrap();
            let mut done: Vec<_> = listed.iter().filter(|one| one["id"].is_string()).collect();
            done.sort_by_key(|one| one["lsn"].as_u64());
            (done.len() == made).then(|| done[made - 1].clone())
        });
        let id = newest["id"].as_str().unwrap();
        let to = dir.path().join(format!("restored-{made}"));
        a.run(&["backup", "restore", id, "--to", to.to_str().unwrap()]);
        let mut live = vec![0; BYTES];
        client(&a, "v").read(0, &mut live).unwrap();
        let restored = std::fs::read(&to).unwrap();
        let wrong = restored.iter().zip(&live).position(|(one, other)| one != other);
        assert_eq!((wrong, restored.len()), (None, BYTES), "{what}");
        newest["bytes_read"].as_u64().unwrap()
    };
    write(1, &[0, 8, 16, 24]);
    a.run(&["bookmark", "g", "before"]);
    backup("in full");
    write(2, &[0, 9]);
    let read = backup("an incremental");
    assert!(read < BYTES as u64 / 2, "{read} bytes were read");
    write(3, &[16]);
    a.run(&["rewind", "g", "--to", "before", "--force"]);
    let read = backup("over the rewind, with its parent in what was left behind");
    assert!(read < BYTES as u64, "{read} bytes were read: both spans are enough");
    write(4, &[24]);
    backup("behind it");
    let timeline = a.json(&["timeline", "g"]);
    let back = format!("lsn:{}", timeline["rewinds"][0]["at"]["lsn"]);
    a.run(&["rewind", "g", "--to", &back, "--force"]);
    backup("over its undoing");
    assert_eq!(a.errors(), Vec::<String>::new());
}
