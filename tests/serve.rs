//! The real binary as a service: it starts, answers, stops in order, and refuses what it cannot do
//! with one line that names the object, the cause and the next command.

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use crate::support::{Appliance, Setup, free_address, wait_for};

fn serve(configuration: &str) -> (tempfile::TempDir, Output) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tidelog.toml");
    fs::write(&file, configuration.replace("DIR", &dir.path().display().to_string())).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_tidelog"))
        .args(["serve", "--config"])
        .arg(&file)
        .output()
        .unwrap();
    (dir, output)
}

#[test]
fn a_node_starts_answers_and_stops_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Appliance::start(dir.path(), Setup::new("a"));
    assert_eq!(node.json(&["status"])["node"], "a");
    node.run(&["group", "create", "g"]);
    node.run(&["volume", "create", "g/v", "--size", "64M"]);
    let status = node.status("g");
    assert_eq!(status["role"], "primary");
    assert_eq!(status["volumes"][0]["size_bytes"], 64 << 20);
    node.stop();
    node.restart();
    assert_eq!(node.status("g")["volumes"][0]["name"], "v");
}

/// Made as `mkdir` makes them, any user of the machine could read the volumes.
#[test]
fn what_volumes_hold_is_read_by_no_other_user() {
    for made_before in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        if made_before {
            fs::create_dir(&data).unwrap();
            fs::set_permissions(&data, Permissions::from_mode(0o755)).unwrap();
        }
        let node = Appliance::start(dir.path(), Setup::new("a"));
        node.run(&["group", "create", "g"]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        if !made_before {
            assert_eq!(mode(&data), 0o700);
        }
        assert_eq!((mode(&data.join("groups")), mode(&data.join("node"))), (0o700, 0o700));
    }
}

#[test]
fn a_group_survives_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Appliance::start(dir.path(), Setup::new("a"));
    node.run(&["group", "create", "g"]);
    node.run(&["volume", "create", "g/v", "--size", "64M"]);
    node.kill();
    node.restart();
    assert_eq!(node.status("g")["volumes"][0]["name"], "v");
}

#[test]
fn a_wrong_key_is_named_with_the_nearest_valid_one() {
    let (_dir, output) = serve("node = \"a\"\ndata_dri = \"DIR/data\"\n");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("data_dri") && said.contains("data_dir"), "{said}");
}

#[test]
fn a_port_in_use_is_named() {
    let address = free_address();
    let _taken = TcpListener::bind(&address).unwrap();
    let (dir, output) = serve(&format!(
        "node = \"a\"\ndata_dir = \"DIR/data\"\n[control]\nsocket = \"DIR/run/c.sock\"\n\
         [[nbd]]\nlisten = \"tcp:{address}\"\n"
    ));
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&address), "{said}");
    assert!(!dir.path().join("data").exists(), "a refused start left its directory");
}

#[test]
fn what_does_not_exist_is_named_with_the_next_command() {
    let dir = tempfile::tempdir().unwrap();
    let node = Appliance::start(dir.path(), Setup::new("a"));
    node.run(&["group", "create", "g"]);
    for (command, object) in [
        (&["group", "show", "nowhere"][..], "nowhere"),
        (&["volume", "show", "g/nothing"], "nothing"),
        (&["peer", "join", "wrong-token", "--address", "127.0.0.1:1"], "token"),
        (&["backup", "run", "g/nightly"], "nightly"),
        (&["backup", "list", "g/nightly"], "nightly"),
        (&["repository", "check", "attic"], "attic"),
    ] {
        let output = node.command(command);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{command:?}: {said}");
        assert!(said.contains(object), "{command:?}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{command:?}: {said}");
    }
    assert_eq!(node.command(&["frobnicate"]).status.code(), Some(2));
}

/// It did not exist, for every command and for hosts, and a check of another group failed for it.
#[test]
fn a_group_that_could_not_be_opened_is_told_with_its_cause_and_no_other_is_blamed_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Appliance::start(dir.path(), Setup::new("a"));
    node.run(&["group", "create", "g"]);
    let groups = dir.path().join("data/groups");
    let broken = fs::read_dir(&groups).unwrap().next().unwrap().unwrap().path();
    node.run(&["group", "create", "h"]);
    node.stop();
    fs::remove_dir_all(broken.join("log")).unwrap();
    fs::write(broken.join("log"), "no directory").unwrap();
    node.restart();
    let status = node.json(&["status", "g"]);
    assert_eq!(status["unopened_groups"][0]["name"], "g", "{status}");
    assert_eq!(status["groups"].as_array().unwrap().len(), 0, "{status}");
    let failing = |command: &[&str]| {
        let output = node.command(command);
        assert_eq!(output.status.code(), Some(1), "{command:?}");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        said + &String::from_utf8_lossy(&output.stderr)
    };
    let said = failing(&["status", "g", "--check"]);
    assert!(said.contains("group g") && said.contains("is not open"), "{said}");
    for command in [&["group", "show", "g"][..], &["volume", "create", "g/v", "--size", "1M"]] {
        let said = failing(command);
        assert!(said.contains("group g: is not open: "), "{said}");
        assert!(said.contains("/log") && said.contains("restart the node"), "{said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    }
    let said = failing(&["status", "i"]);
    assert!(said.contains("group i: does not exist on node a"), "{said}");
    let status = node.json(&["status", "h"]);
    assert!(status["unopened_groups"].as_array().is_none_or(Vec::is_empty), "{status}");
    node.run(&["status", "h", "--check"]);
}

/// A run that nobody may or can make ended with 0, and a repository that was never made was not
/// spoken of.
#[test]
fn a_run_that_fails_says_why_and_ends_with_1() {
    let dir = tempfile::tempdir().unwrap();
    let shown = dir.path().display();
    let more = format!(
        "[[repository]]\nname = \"main\"\nurl = \"{shown}/repository\"\n\
         password_file = \"{shown}/password\"\n"
    );
    let node = Appliance::start(dir.path(), Setup { more, ..Setup::new("a") });
    node.run(&["group", "create", "g"]);
    node.run(&["volume", "create", "g/v", "--size", "64M"]);
    node.run(&["job", "set", "g", "nightly", "--repository", "main"]);
    for (command, words) in [
        (&["backup", "list", "g/nightly"][..], &["repository init main"][..]),
        (&["backup", "run", "g/nightly"], &["does not exist", "repository init main", "explain"]),
        (&["--json", "backup", "run", "g/nightly"], &["does not exist"]),
    ] {
        let output = node.command(command);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{command:?}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{command:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{command:?}: {said}");
        }
    }
    let table = node.run(&["backup", "list"]);
    assert!(table.contains("failed") && table.contains("does not exist"), "{table}");
    let needs = |code, word: &str| {
        wait_for("the check of the node", || {
            let output = node.command(&["status", "--check"]);
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            (output.status.code() == Some(code) && said.contains(word)).then_some(())
        });
    };
    needs(1, "backup of job nightly");
    node.run(&["repository", "init", "main"]);
    node.run(&["backup", "run", "g/nightly"]);
    needs(0, "nothing needs an operator");
}

#[test]
fn a_job_for_a_repository_that_nobody_configured_is_refused_unless_forced() {
    let dir = tempfile::tempdir().unwrap();
    let shown = dir.path().display();
    let more = format!(
        "[[repository]]\nname = \"main\"\nurl = \"{shown}/repository\"\n\
         password_file = \"{shown}/password\"\n"
    );
    let node = Appliance::start(dir.path(), Setup { more, ..Setup::new("a") });
    node.run(&["group", "create", "g"]);
    let set = ["job", "set", "g", "nightly", "--repository", "attic"];
    let output = node.command(&set);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("attic is not configured on node a, which has main"), "{said}");
    assert!(node.run(&["job", "list"]).contains("no jobs"));
    node.run(&[&set[..], &["--force"]].concat());
    node.run(&["job", "set", "g", "nightly", "--grace", "5s"]);
    assert!(node.run(&["job", "list"]).contains("attic"));
}

/// A point that is yet to come silently meant now, and one before the first record named no way on.
#[test]
fn points_outside_of_the_log_say_where_it_begins_and_ends() {
    let dir = tempfile::tempdir().unwrap();
    let node = Appliance::start(dir.path(), Setup::new("a"));
    node.run(&["group", "create", "g"]);
    node.run(&["volume", "create", "g/v", "--size", "64M"]);
    let refused = |at: &str| {
        let output = node.command(&["image", "open", "g", "--at", at]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{at}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{at}: {said}");
        said
    };
    let end = node.status("g")["log"]["head_lsn"].to_string();
    let said = refused("2100-01-01T00:00:00Z");
    assert!(said.contains("is yet to come") && said.contains(&format!("lsn:{end}")), "{said}");
    for at in ["lsn:0", "-15m", "2001-01-01T00:00:00Z", "lsn:1"] {
        let said = refused(at);
        let (_, command) = said.split_once("`tidelog ").expect(&said);
        let (command, _) = command.split_once('`').expect(&said);
        let words: Vec<&str> = command.split(' ').collect();
        assert_eq!(words[..2], ["image", "open"], "{at}: {said}");
        node.run(&words);
    }
    let twice = node.command(&["group", "create", "g"]);
    let said = String::from_utf8_lossy(&twice.stderr).into_owned();
    assert_eq!(said.trim_end(), "tidelog: group g: exists already");
}
