//! Disks that are full or fail under living appliances: the right error to the host, nothing
//! answered lost, status that says so, and a way back. Needs a C compiler, and root for the first.

use std::path::Path;

use nix::errno::Errno as Code;
use serde_json::Value;
use tidelog::nbd::{ClientError, Errno};

use crate::support::faulty::{Call, Faults, SmallDisk};
use crate::support::load::{Load, client, contents, hold};
use crate::support::long_log::{
    LARGE_BYTES, OUTRUN_BYTES, make_group, read_large, write_until_refused,
};
use crate::support::{Appliance, Setup, wait_for};

/// What an examination prints whose exit status says that it left out something.
fn not_all(node: &Appliance, arguments: &[&str]) -> String {
    let output = node.command(arguments);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {told}");
    assert!(told.contains("not all was "), "{arguments:?}: {told}");
    String::from_utf8(output.stdout).unwrap()
}

/// One small write with its flush.
fn write_one(node: &Appliance) -> Result<(), Errno> {
    let mut client = client(node, "large");
    let wrote = client.write(0, &[7; 4096]).and_then(|()| client.flush());
    wrote.map_err(|error| match error {
        ClientError::Request { errno, .. } => errno,
        error => panic!("{error}"),
    })
}

fn wait_for_status(node: &Appliance, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    wait_for(what, || {
        let status = node.status("g");
        holds(&status).then_some(status)
    })
}

/// Everything that was answered is in the live volumes.
fn check(node: &Appliance, load: &Load, what: &str) {
    let answered_by = load.history.lock().unwrap().now();
    let held = contents(node, "");
    hold(what, load.history.lock().unwrap().faults_of_live(&held, answered_by));
}

fn faulty(dir: &Path, node: &'static str, faults: &Faults) -> Appliance {
    let setup = Setup { environment: faults.environment(), ..Setup::new(node) };
    Appliance::start(&dir.join(node), setup)
}

#[test]
fn a_full_disk_refuses_writes_and_takes_them_again_when_it_has_room_also_after_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SmallDisk::new(dir.path(), 700);
    let mut a = Appliance::start(
        &dir.path().join("a"),
        Setup {
            data_dir: Some(disk.root.join("data")),
            more: "[limits]\ndisk_reserve = \"1M\"\n".to_owned(),
            ..Setup::new("a")
        },
    );
    make_group(&a);
    let load = Load::start(a.nbd_socket());
    load.wait_for_more(500);
    disk.fill();
    let refused = wait_for("a write to be refused", || write_until_refused(&a, 64 << 20).err());
    assert_eq!(refused, Errno::Enospc);
    let status = wait_for_status(&a, "status to say so", |status| {
        status["log"]["full_reason"].as_str().is_some_and(|reason| reason.starts_with("log-full"))
    });
    assert_eq!(status["data_state"], "consistent", "{status}");
    assert!(status["log"]["full_since"].is_string(), "{status}");
    wait_for("an event to say so", || (!a.events("log-full").is_empty()).then_some(()));
    check(&a, &load, "while the disk is full");
    // What fits a gap that is left says nothing of the next write.
    let _ = a.command(&["bookmark", "g", "small"]);
    let status = a.status("g");
    assert!(status["log"]["full_reason"].is_string(), "{status}");
    assert!(a.events("log-has-room").is_empty());
    assert!(status["log"]["disk_free_bytes"].as_u64() < Some(1 << 20), "{status}");

    // Torn ends of the log cannot be cut without room, so the group may have to wait for it.
    a.kill();
    a.restart();
    let status = a.json(&["status"]);
    let waiting = status["unopened_groups"].as_array().map_or(0, Vec::len);
    assert_eq!(status["groups"].as_array().unwrap().len() + waiting, 1, "{status}");
    if waiting == 1 {
        let reason = &status["unopened_groups"][0]["reason"];
        assert!(reason.as_str().unwrap().contains("no space"), "{status}");
    }

    disk.free();
    load.wait_for_more(500);
    wait_for_status(&a, "status to be good again", |status| status["log"]["full_reason"].is_null());
    let history = load.stop();
    hold("at the end", history.faults(&contents(&a, ""), Some(history.now())));
    a.kill();
    a.restart();
    hold("and after a restart", history.faults(&contents(&a, ""), Some(history.now())));
}

#[test]
fn a_log_that_cannot_be_synced_fails_the_group_and_the_next_start_heals_it() {
    let dir = tempfile::tempdir().unwrap();
    let faults = Faults::new(dir.path());
    let mut a = faulty(dir.path(), "a", &faults);
    let b = Appliance::start(&dir.path().join("b"), Setup::new("b"));
    a.pair_with(&b);
    make_group(&a);
    a.run(&["replicate", "g", "--to", "b"]);
    wait_for_status(&a, "b to stream", |status| {
        status["peers"][0]["replication_state"] == "streaming"
    });
    let load = Load::start(a.nbd_socket());
    load.wait_for_more(500);
    faults.set(&[(Call::Sync, Code::EIO, ".seg")]);
    // The verdict is on the copy: it may be one more moment good.
    let status = wait_for_status(&a, "the group to fail", |status| {
        status["data_state"] == "failed" && status["backup_capable"]["verdict"] == "no"
    });
    assert!(status["data_state_reason"].as_str().unwrap().contains("sync"), "{status}");
    assert!(status["data_state_since"].is_string(), "{status}");
    assert_eq!(write_one(&a), Err(Errno::Eio));
    wait_for("an event to say so", || (a.events("data-failed").len() == 1).then_some(()));
    check(&a, &load, "reads go on");
    wait_for("b to know of its primary", || {
        let status = b.json(&["status"]);
        let codes = status["attention"].as_array()?.iter().map(|one| one["code"].clone());
        codes.into_iter().any(|code| code == "primary-failed").then_some(())
    });
    assert!(b.events("copy-failed").is_empty(), "it is none");
    let told = a.events("data-failed").pop().unwrap();
    let groups = dir.path().join("a").display().to_string();
    assert!(told.contains(&groups) && told.contains("hosts' writes get errors"), "{told}");
    // What may not be on the disk is not read, and that is said.
    let scrub = not_all(&a, &["scrub", "g", "--wait"]);
    assert!(scrub.contains("at the end of the log were not durable, and not read"), "{scrub}");
    assert!(a.events("scrub-done").pop().unwrap().contains("not durable here, and not read"));
    for node in [&a, &b] {
        let verify = not_all(node, &["verify", "g"]);
        assert!(verify.contains("equal") && verify.contains("on a: the data failed"), "{verify}");
    }
    let head = status["log"]["head_lsn"].as_u64().unwrap();
    wait_for_status(&b, "b to have the bytes that were not durable", |status| {
        status["log"]["durable_lsn"].as_u64().unwrap() >= head
    });
    // The disk is well, and yet: what the cache shows is not to be believed before a start.
    faults.none();
    assert_eq!(write_one(&a), Err(Errno::Eio));
    a.kill();
    a.restart();
    load.wait_for_more(500);
    wait_for_status(&a, "both to be well", |status| {
        status["data_state"] == "consistent"
            && status["peers"][0]["replication_state"] == "streaming"
    });
    let history = load.stop();
    hold("at the end", history.faults(&contents(&a, ""), Some(history.now())));
}

/// Folding meets `fault`; the hosts' writes then end with ENOSPC at the log's limit, and go on when
/// the disk is well.
fn folding_meets(call: Call, code: Code, part: &str) {
    let dir = tempfile::tempdir().unwrap();
    let faults = Faults::new(dir.path());
    let mut a = faulty(dir.path(), "a", &faults);
    make_group(&a);
    let load = Load::start(a.nbd_socket());
    load.wait_for_more(300);
    faults.set(&[(call, code, part)]);
    assert_eq!(write_until_refused(&a, OUTRUN_BYTES), Err(Errno::Enospc));
    let status = a.status("g");
    let reason = status["log"]["fold_reason"].as_str().unwrap_or_else(|| panic!("{status}"));
    assert!(reason.contains("base"), "{reason}");
    assert!(status["log"]["fold_since"].is_string(), "{status}");
    let full = status["log"]["full_reason"].as_str().unwrap_or_else(|| panic!("{status}"));
    assert!(full.contains("folding fails"), "{full}");
    assert!(!a.events("fold-failed").is_empty());
    check(&a, &load, "while nothing can be folded");
    a.run(&["image", "open", "g", "--at", "now", "--name", "then"]);
    let then = contents(&a, "@then");
    hold("an image of then", load.history.lock().unwrap().faults(&then, None));
    a.kill();
    a.restart();
    check(&a, &load, "after a restart");
    faults.none();
    wait_for_status(&a, "folds to go on", |status| status["log"]["fold_reason"].is_null());
    write_until_refused(&a, OUTRUN_BYTES).unwrap();
    load.wait_for_more(300);
    let status = a.status("g");
    assert!(status["log"]["horizon_lsn"].as_u64().unwrap() > 0, "{status}");
    assert_eq!(contents(&a, "@then"), then, "the image is what it was");
    let history = load.stop();
    hold("at the end", history.faults(&contents(&a, ""), Some(history.now())));
}

#[test]
fn a_base_that_is_full_stops_folding_and_then_hosts_and_loses_nothing() {
    folding_meets(Call::Write, Code::ENOSPC, "/base/");
}

#[test]
fn a_base_that_cannot_be_synced_stops_folding_and_loses_nothing() {
    folding_meets(Call::Sync, Code::EIO, ".img");
}

#[test]
fn a_sidecar_that_cannot_be_written_stops_folding_and_loses_nothing() {
    folding_meets(Call::Write, Code::EIO, ".sum");
}

fn streams(status: &Value) -> bool {
    status["peers"][0]["replication_state"] == "streaming"
}

/// A primary, and a copy that follows it on a disk that can be made to fail.
fn with_faulty_copy(dir: &Path, faults: &Faults) -> (Appliance, Appliance) {
    let a = Appliance::start(&dir.join("a"), Setup::new("a"));
    let b = faulty(dir, "b", faults);
    a.pair_with(&b);
    make_group(&a);
    a.run(&["replicate", "g", "--to", "b"]);
    wait_for_status(&a, "b to stream", streams);
    (a, b)
}

/// The secondary's log meets a fault; both say so, the primary's hosts go on, and the copy catches
/// up by itself or after a restart.
fn secondary_meets(faults_now: &[(Call, Code, &str)], restart: bool) {
    let dir = tempfile::tempdir().unwrap();
    let faults = Faults::new(dir.path());
    let (a, mut b) = with_faulty_copy(dir.path(), &faults);
    let load = Load::start(a.nbd_socket());
    load.wait_for_more(300);
    faults.set(faults_now);
    for node in [&a, &b] {
        let status = wait_for_status(node, "both to say so", |status| {
            let peer = &status["peers"][0];
            !streams(status) && peer["replication_state_reason"].is_string()
        });
        assert!(status["peers"][0]["replication_state_since"].is_string(), "{status}");
    }
    let status = wait_for_status(&b, "the copy to be unfit", |status| {
        status["backup_capable"]["verdict"] == "no"
    });
    assert_eq!(status["data_state"] == "failed", restart, "{status}");
    if !restart {
        let full = status["log"]["full_reason"].as_str().unwrap_or_else(|| panic!("{status}"));
        let groups = dir.path().join("b").display().to_string();
        assert!(full.contains("this copy stands still") && full.contains(&groups), "{full}");
    }
    wait_for_status(&a, "a to say what the data on b is worth", |status| {
        (status["peers"][0]["data_state"] == "failed") == restart
            && status["peers"][0]["data_state_reason"].is_string() == restart
    });
    let refused = a.command(&["switchover", "g"]);
    assert!(!refused.status.success(), "hosts could not write there");
    if restart {
        let told = wait_for("a to tell", || a.events("copy-failed").pop());
        assert!(told.contains("on b failed"), "{told}");
        let told = b.events("data-failed").pop().unwrap();
        assert!(told.contains("this copy takes no more of the log"), "{told}");
        wait_for_status(&a, "a to say whose disk it is", |status| {
            status["backup_capable"]["reasons"].to_string().contains("the data on b failed")
        });
    }
    load.wait_for_more(300);
    b.run(&["image", "open", "g", "--at", "now", "--name", "then"]);
    let then = contents(&b, "@then");
    hold("an image on b", load.history.lock().unwrap().faults(&then, None));
    faults.none();
    if restart {
        b.kill();
        b.restart();
    }
    wait_for_status(&a, "b to stream again", streams);
    if restart {
        wait_for("a to say so", || a.events("copy-recovered").pop());
    }
    let history = load.stop();
    let head = a.status("g")["log"]["head_lsn"].as_u64().unwrap();
    wait_for_status(&b, "b to have all", |status| {
        status["log"]["durable_lsn"].as_u64().unwrap() >= head
    });
    b.run(&["image", "open", "g", "--at", "now", "--name", "end"]);
    hold("at the end", history.faults(&contents(&b, "@end"), Some(history.now())));
    for node in [&a, &b].into_iter().take(if restart { 1 } else { 2 }) {
        wait_for("the all-clear", || node.events("replication-resumed").pop());
    }
    assert_eq!(contents(&b, "@end"), contents(&a, ""));
    if !restart {
        wait_for("a to tell of the room on b", || a.events("copy-has-room").pop());
        let told = ["copy-full", "copy-has-room"].map(|code| a.events(code).len());
        assert_eq!(told, [1, 1], "once each, whatever was tried");
    }
}

#[test]
fn a_full_disk_of_the_secondary_is_told_on_both_nodes_and_it_catches_up_by_itself() {
    secondary_meets(&[(Call::Write, Code::ENOSPC, ".seg")], false);
}

#[test]
fn a_failing_disk_of_the_secondary_is_told_on_both_nodes_and_a_restart_heals_it() {
    secondary_meets(&[(Call::Sync, Code::EIO, ".seg")], true);
}

/// The command that status names for it was refused: the peer was connected, and could not note
/// that it was asked.
#[test]
fn on_loss_continue_lets_hosts_go_on_while_the_disk_of_the_peer_they_wait_for_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let faults = Faults::new(dir.path());
    let (a, _b) = with_faulty_copy(dir.path(), &faults);
    a.run(&["replicate", "g", "--to", "b", "--mode", "sync", "--on-loss", "block"]);
    wait_for_status(&a, "b to stream", streams);
    write_one(&a).unwrap();
    let full = [
        (Call::Write, Code::ENOSPC, ".seg"),
        (Call::Write, Code::ENOSPC, "peers.new"),
        (Call::Create, Code::ENOSPC, "peers.new"),
    ];
    faults.set(&full);
    std::thread::scope(|scope| {
        let host = scope.spawn(|| write_one(&a));
        wait_for_status(&a, "hosts to wait", |status| {
            status["role_reason"].as_str().is_some_and(|why| why.contains("--on-loss continue"))
        });
        let done = a.run(&["replicate", "g", "--to", "b", "--on-loss", "continue"]);
        assert!(done.contains("that holds from now on") && done.contains("peers"), "{done}");
        assert_eq!(host.join().unwrap(), Ok(()));
    });
    faults.none();
    wait_for_status(&a, "b to stream again", streams);
}

/// What is staged of an image meets a fault; both nodes say so with `reason`, the old image stays,
/// and the new one comes when the disk is well.
fn image_meets(faults_then: &[(Call, Code, &str)], reason: &str) {
    let dir = tempfile::tempdir().unwrap();
    let faults = Faults::new(dir.path());
    let (a, mut b) = with_faulty_copy(dir.path(), &faults);
    let load = Load::start(a.nbd_socket());
    load.wait_for_more(300);
    b.stop();
    a.run(&["group", "set", "g", "window=1s"]);
    let head = a.status("g")["log"]["head_lsn"].as_u64().unwrap();
    write_until_refused(&a, OUTRUN_BYTES).unwrap();
    wait_for_status(&a, "the log to leave b behind", |status| {
        status["log"]["horizon_lsn"].as_u64().unwrap() > head
    });
    faults.set(faults_then);
    b.restart();
    for node in [&a, &b] {
        wait_for_status(node, "both to say why no image comes", |status| {
            let told = status["peers"][0]["replication_state_reason"].as_str();
            told.is_some_and(|told| told.to_lowercase().contains(reason))
        });
    }
    let status = b.status("g");
    assert_eq!(status["data_state"], "consistent", "the old image stays: {status}");
    assert_eq!(status["backup_capable"]["verdict"], "no", "{status}");
    b.run(&["image", "open", "g", "--at", "now", "--name", "old"]);
    let old = contents(&b, "@old");
    hold("the old image", load.history.lock().unwrap().faults(&old, None));
    faults.none();
    wait_for_status(&a, "b to stream again", streams);
    let history = load.stop();
    let head = a.status("g")["log"]["head_lsn"].as_u64().unwrap();
    wait_for_status(&b, "b to have all", |status| {
        status["log"]["durable_lsn"].as_u64().unwrap() >= head
    });
    b.run(&["image", "open", "g", "--at", "now", "--name", "end"]);
    hold("at the end", history.faults(&contents(&b, "@end"), Some(history.now())));
}

#[test]
fn an_image_that_finds_no_room_is_told_on_both_nodes_and_goes_on_when_there_is_some() {
    let full = [(Call::Write, Code::ENOSPC, "/staging/"), (Call::Create, Code::ENOSPC, "/staging")];
    image_meets(&full, "space");
}

#[test]
fn an_image_that_meets_a_failing_disk_is_told_on_both_nodes_and_goes_on() {
    image_meets(&[(Call::Sync, Code::EIO, "/staging/")], "input/output error");
}

#[test]
fn a_full_repository_fails_the_run_with_its_reason_and_the_next_run_makes_the_backup() {
    let dir = tempfile::tempdir().unwrap();
    let faults = Faults::new(dir.path());
    let (node_dir, store) = (dir.path().join("a"), dir.path().join("store"));
    let more = format!(
        "[[repository]]\nname = \"main\"\nurl = \"{}\"\npassword_file = \"{}/password\"\n",
        store.display(),
        node_dir.display()
    );
    let setup = Setup { more, environment: faults.environment(), ..Setup::new("a") };
    let a = Appliance::start(&node_dir, setup);
    make_group(&a);
    write_until_refused(&a, 32 << 20).unwrap();
    a.run(&["repository", "init", "main"]);
    a.run(&["job", "set", "g", "nightly", "--repository", "main"]);
    faults.set(&[
        (Call::Write, Code::ENOSPC, "/store/"),
        (Call::Create, Code::ENOSPC, "/store/data"),
    ]);
    a.command(&["backup", "run", "g/nightly"]);
    let failed = wait_for("the run to fail", || a.events("backup-failed").pop());
    assert!(failed.to_lowercase().contains("space"), "{failed}");
    let listed = a.json(&["backup", "list", "g/nightly"]);
    let backups = listed["backups"].as_array().unwrap();
    assert!(
        backups.iter().all(|backup| backup["id"].is_null()),
        "nothing can be restored: {listed}"
    );
    assert_eq!(a.status("g")["data_state"], "consistent");
    faults.none();
    a.run(&["backup", "run", "g/nightly"]);
    let id = wait_for("the next run to make it", || {
        let listed = a.json(&["backup", "list", "g/nightly"]);
        let backups = listed["backups"].as_array().unwrap();
        backups.iter().find_map(|backup| Some(backup["id"].as_str()?.to_owned()))
    });
    a.run(&["backup", "verify", &id]);
    let restored = dir.path().join("restored");
    a.run(&["backup", "restore", &id, "--volume", "large", "--to", restored.to_str().unwrap()]);
    assert!(std::fs::read(restored).unwrap() == read_large(&a, "large"));
}

/// What old moments keep is given up, the costliest first, before space is short for hosts. The
/// reserve is more than the log may still grow by.
#[test]
fn the_disk_reserve_ends_the_image_that_costs_most_and_hosts_go_on() {
    const RESERVE_MEBIBYTES: u64 = 300;
    // An eighth of the log's limit may wait for the next fold.
    const MOST_BYTES: u64 = LARGE_BYTES / 10 * 7;
    let dir = tempfile::tempdir().unwrap();
    let disk = SmallDisk::new(dir.path(), 1200);
    let a = Appliance::start(
        &dir.path().join("a"),
        Setup {
            data_dir: Some(disk.root.join("data")),
            more: format!("[limits]\ndisk_reserve = \"{RESERVE_MEBIBYTES}M\"\n"),
            ..Setup::new("a")
        },
    );
    make_group(&a);
    a.run(&["group", "set", "g", "window=0s"]);
    write_until_refused(&a, LARGE_BYTES).unwrap();
    wait_for_status(&a, "most of it to be in the base", |status| {
        status["log"]["horizon_lsn"].as_u64() >= Some(MOST_BYTES)
    });
    a.run(&["image", "open", "g", "--at", "now", "--name", "costly"]);
    write_until_refused(&a, LARGE_BYTES).unwrap();
    wait_for("what the image shows to be kept", || {
        let timeline = a.json(&["timeline", "g"]);
        let hold = timeline["holds"].as_array()?.iter().find(|hold| hold["image"] == "costly")?;
        (hold["disk_bytes"].as_u64()? >= MOST_BYTES).then_some(())
    });
    a.run(&["image", "open", "g", "--at", "now", "--name", "cheap"]);
    let cheap = contents(&a, "@cheap");
    let load = Load::start(a.nbd_socket());
    load.wait_for_more(100);
    assert_eq!(a.events("image-lost"), Vec::<String>::new());
    // Less is free than is to stay free, by less than the costly one takes.
    disk.leave(RESERVE_MEBIBYTES - 20);
    let lost = wait_for("the reserve to be made whole", || a.events("image-lost").pop());
    assert!(lost.contains("image costly") && lost.contains("short of space"), "{lost}");
    wait_for_status(&a, "it to be free again", |status| {
        status["log"]["disk_free_bytes"].as_u64() >= Some(RESERVE_MEBIBYTES << 20)
    });
    load.wait_for_more(500);
    assert_eq!(a.events("image-lost").len(), 1, "one was enough");
    assert_eq!(contents(&a, "@cheap"), cheap);
    assert!(a.status("g")["log"]["full_reason"].is_null());
    let history = load.stop();
    hold("at the end", history.faults(&contents(&a, ""), Some(history.now())));
}
