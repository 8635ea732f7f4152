//! A backup that was delegated, and whose node is killed in the middle of it, with real processes.

use serde_json::Value;
use std::path::Path;

use crate::support::load::wait_until_level;
use crate::support::long_log::{LARGE_BYTES, make_group, read_large, write_until_refused};
use crate::support::{Appliance, PATIENCE, Setup, wait_for, wait_up_to};

fn node(dir: &Path, name: &'static str) -> Appliance {
    let more = format!(
        "[[repository]]\nname = \"main\"\nurl = \"{}\"\npassword_file = \"{}\"\n",
        dir.join("store").display(),
        dir.join(name).join("password").display()
    );
    Appliance::start(&dir.join(name), Setup { more, ..Setup::new(name) })
}

fn made(node: &Appliance) -> Vec<Value> {
    let listed = node.json(&["backup", "list", "g/nightly"]);
    let backups = listed["backups"].as_array().unwrap().iter();
    backups.filter(|backup| backup["id"].is_string()).cloned().collect()
}

fn files(dir: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let count = |path: &Path| if path.is_dir() { files(path) } else { 1 };
    entries.map(|entry| count(&entry.unwrap().path())).sum()
}

#[test]
fn a_secondary_that_is_killed_in_mid_backup_loses_the_slot_to_the_primary() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = (node(dir.path(), "a"), node(dir.path(), "b"));
    a.pair_with(&b);
    make_group(&a);
    a.run(&["replicate", "g", "--to", "b"]);
    write_until_refused(&a, LARGE_BYTES).unwrap();
    a.run(&["repository", "init", "main"]);
    a.run(&["job", "set", "g", "nightly", "--repository", "main"]);
    wait_until_level(&a, &b);
    a.command(&["backup", "run", "g/nightly"]);
    let packs = dir.path().join("store/data");
    wait_for("b to have written a part of it", || (files(&packs) > 0).then_some(()));
    b.kill();
    assert_eq!(files(&dir.path().join("store/snapshots")), 0, "it has not come to its end");
    assert!(!a.has_event("backup-started"), "the primary stood down");
    // When the claim has stood still for its term, which is a minute.
    wait_up_to(3 * PATIENCE, "a to make it", || a.has_event("backup-done").then_some(()));
    let [backup] = &made(&a)[..] else { panic!("one backup: {:?}", made(&a)) };
    assert_eq!((&backup["node"], &backup["role"]), (&"a".into(), &"primary".into()), "{backup}");
    assert!(backup["reasons"].to_string().contains("its claim was not renewed"), "{backup}");

    b.restart();
    wait_until_level(&a, &b);
    let [seen] = &made(&b)[..] else { panic!("one backup: {:?}", made(&b)) };
    assert_eq!(seen["id"], backup["id"], "b sees it too, and makes none");
    let id = backup["id"].as_str().unwrap();
    b.run(&["backup", "verify", id]);
    let restored = dir.path().join("restored");
    b.run(&["backup", "restore", id, "--volume", "large", "--to", restored.to_str().unwrap()]);
    assert!(std::fs::read(restored).unwrap() == read_large(&a, "large"));
}
