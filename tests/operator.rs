//! What an operator sees where something is wrong, and whether what it recommends works: hosts, the
//! log's size, split brains, branches, `promote` on a copy that cannot serve, `status --check`.

use nix::errno::Errno as Code;
use serde_json::{Value, json};
use tidelog::nbd::{Client, NbdAddress};
use tidelog::units::{ByteSize, LogTime};

use crate::support::faulty::{Call, Faults};
use crate::support::{Appliance, Setup, free_address, wait_for};

const MEBIBYTE: u64 = 1 << 20;

/// A primary `a` with volume `g/v`, and a copy on `b` that streams.
fn pair(a: &Appliance, b: &Appliance) {
    a.pair_with(b);
    a.run(&["group", "create", "g"]);
    a.run(&["volume", "create", "g/v", "--size", "4M"]);
    a.run(&["replicate", "g", "--to", "b"]);
    wait_until(a, "b to stream", |peer| peer["replication_state"] == "streaming");
}

/// Waits until the first peer in a node's status is as wanted; the whole status then.
fn wait_until(node: &Appliance, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    wait_for(what, || {
        let status = node.status("g");
        holds(&status["peers"][0]).then_some(status)
    })
}

fn connect(node: &Appliance, export: &str) -> Client {
    Client::connect(&NbdAddress::Unix(node.nbd_socket()), export).unwrap()
}

fn write(node: &Appliance, byte: u8) {
    let mut client = connect(node, "g/v");
    client.write(0, &[byte; 8192]).unwrap();
    client.disconnect().unwrap();
    wait_for("the connection to be gone", || {
        (node.status("g")["volumes"][0]["clients"] == 0).then_some(())
    });
}

/// `status --check`: its exit status, what it prints, and the line beside it.
fn check(node: &Appliance) -> (Option<i32>, String, String) {
    let output = node.command(&["status", "--check"]);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn refusal(node: &Appliance, arguments: &[&str]) -> String {
    let output = node.command(arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn the_hosts_of_a_volume_are_named_where_it_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let tcp = free_address();
    let more = format!("[[nbd]]\nlisten = \"tcp:{tcp}\"\n");
    let a = Appliance::start(&dir.path().join("a"), Setup { more, ..Setup::new("a") });
    a.run(&["group", "create", "g"]);
    a.run(&["volume", "create", "g/v", "--size", "1M"]);
    a.run(&["image", "open", "g", "--at", "now", "--name", "i"]);
    let hosts = || a.json(&["volume", "show", "g/v"])["hosts"].as_array().cloned().unwrap();
    assert_eq!(hosts(), Vec::<Value>::new());
    let near = connect(&a, "g/v");
    let far = Client::connect(&NbdAddress::Tcp(tcp.clone()), "g/v@i").unwrap();
    let own = format!("process {} of user {}", std::process::id(), nix::unistd::getuid());
    let found = wait_for("both", || Some(hosts()).filter(|hosts| hosts.len() == 2));
    assert_eq!((&found[0]["address"], &found[0]["read_only"]), (&json!(own), &json!(false)));
    assert_eq!((&found[1]["image"], &found[1]["read_only"]), (&json!("i"), &json!(true)));
    let address = found[1]["address"].as_str().unwrap();
    let parsed: std::net::SocketAddr = address.parse().unwrap();
    assert!(parsed.ip().is_loopback() && address != tcp, "{address}");
    let since: jiff::Timestamp = found[0]["since"].as_str().unwrap().parse().unwrap();
    assert!(since <= jiff::Timestamp::now(), "{since}");
    let status = a.status("g");
    assert_eq!(status["volumes"][0]["hosts"], json!(found));
    assert_eq!(status["volumes"][0]["clients"], 1, "whoever reads an image is in nobody's way");
    for command in [&["status"][..], &["volume", "show", "g/v"]] {
        let shown = a.run(command);
        assert!(shown.contains(&format!("{own} since ")), "{shown}");
        assert!(shown.contains(&format!("{address} (@i) since ")), "{shown}");
        assert!(shown.contains("read-only"), "{shown}");
    }
    assert!(a.run(&["volume", "list"]).contains(&own));
    drop((near, far));
    wait_for("both to be gone", || hosts().is_empty().then_some(()));
}

#[test]
fn the_size_of_a_log_is_what_is_used_of_its_limit_and_beside_it_what_it_takes_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let a = Appliance::start(&dir.path().join("a"), Setup::new("a"));
    a.run(&["group", "create", "g"]);
    a.run(&["volume", "create", "g/v", "--size", "4M"]);
    let mut client = connect(&a, "g/v");
    client.write(0, &vec![1; MEBIBYTE as usize]).unwrap();
    let log = a.status("g")["log"].clone();
    let number = |key: &str| log[key].as_u64().unwrap();
    let used = number("head_lsn") - number("horizon_lsn");
    assert_eq!(number("used_bytes"), used);
    assert!((MEBIBYTE..2 * MEBIBYTE).contains(&used), "{log}");
    // A segment is a hole where nothing was written yet.
    let log = wait_for("the disk to be looked at", || {
        let log = a.status("g")["log"].clone();
        (log["allocated_bytes"].as_u64().unwrap() >= used).then_some(log)
    });
    let number = |key: &str| log[key].as_u64().unwrap();
    assert!(number("allocated_bytes") < 64 * MEBIBYTE, "{log}");
    assert_eq!(log["limit_reason"], Value::Null, "{log}");
    let shown = a.run(&["status", "g"]);
    assert!(shown.contains("  log     1 MiB used of 10 GiB ("), "{shown}");
    // It is looked at again from time to time.
    wait_for("both to say the same of the disk", || {
        let allocated = a.status("g")["log"]["allocated_bytes"].as_u64().unwrap();
        let on_disk = format!("({} on disk)", ByteSize(allocated));
        a.run(&["status", "g"]).contains(&on_disk).then_some(())
    });
}

#[test]
fn a_split_brain_shows_what_each_side_has_and_what_yielding_keeps() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Appliance::start(&dir.path().join("a"), Setup::new("a"));
    let mut b = Appliance::start(&dir.path().join("b"), Setup::new("b"));
    pair(&a, &b);
    for node in [&a, &b] {
        let (code, said, beside) = check(node);
        assert_eq!((code, &*beside), (Some(0), ""), "{said}");
        assert!(said.contains(&format!("node {}: nothing needs an operator", node.node)), "{said}");
    }
    b.run(&["promote", "g", "--force"]);
    for node in [&a, &b] {
        wait_until(node, "the split brain", |peer| peer["replication_state"] == "split-brain");
    }
    write(&a, 1);
    write(&b, 2);
    write(&b, 3);
    a.run(&["bookmark", "g", "after"]);
    let preview = wait_for("where they part", || {
        let output = a.command(&["--json", "resolve", "g", "--preview"]);
        let preview = serde_json::from_slice::<Value>(&output.stdout);
        output.status.success().then(|| preview.unwrap())
    });

    // Status says where they part, and not that one is behind the other.
    for (node, other) in [(&a, "b"), (&b, "a")] {
        let status = node.status("g");
        let parting = &status["peers"][0]["parting"];
        assert_eq!((&parting["at"], &parting["peer"]), (&preview["at"], &json!(other)), "{status}");
        let shown = node.run(&["status", "g"]);
        let line = shown.lines().find(|line| line.starts_with("  peer")).unwrap();
        assert!(!shown.contains("so far"), "what was so when it began is no more: {shown}");
        assert!(line.contains("split-brain; histories part at LSN"), "{line}");
        assert!(line.contains(&format!("only on {other}:")) && !line.contains("behind"), "{line}");
        let (code, said, beside) = check(node);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("both nodes are primary") && said.contains("--preview"), "{said}");
        assert_eq!(beside.lines().count(), 1, "{beside}");
        assert!(beside.contains("split-brain"), "{beside}");
        // Plain status answers, and so is done.
        assert!(node.command(&["status"]).status.success());
    }

    let host = connect(&b, "g/v");
    let preview = wait_for("the host on b", || {
        let preview = a.json(&["resolve", "g", "--preview"]);
        (preview["remote"]["hosts"].as_array()?.len() == 1).then_some(preview)
    });
    let (local, remote) = (&preview["local"], &preview["remote"]);
    assert_eq!((&local["node"], &remote["node"]), (&json!("a"), &json!("b")), "{preview}");
    let written = |side: &Value| side["account"]["volumes"][0]["written_bytes"].clone();
    assert_eq!((written(local), written(remote)), (json!(8192), json!(16_384)), "{preview}");
    assert_eq!(local["account"]["bookmarks"], json!(["after"]));
    assert_eq!(remote["account"]["bookmarks"], json!([]));
    for side in [local, remote] {
        let account = &side["account"];
        let time = |key: &str| account[key].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
        assert!(time("first") <= time("last"), "{account}");
        assert_eq!(account["from"], preview["at"]);
    }
    assert_eq!(preview["local_bytes"], local["account"]["bytes"]);
    assert_eq!(preview["peer_bytes"], remote["account"]["bytes"]);
    assert_eq!(remote["hosts"][0]["volume"], "v");
    assert_eq!(preview["refused"], Value::Null);
    let branch = preview["branch"].as_str().unwrap().to_owned();
    let shown = a.run(&["resolve", "g", "--preview"]);
    for part in [
        "only here, on a: ",
        "only on b: ",
        "volume v: 8 KiB written",
        "volume v: 16 KiB written",
        "bookmarks: after",
        "connected to v: process ",
        "no host is connected",
        "the side of b survives",
        &format!("kept there as branch {branch}"),
        &format!("tidelog image open g --branch {branch}"),
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    // On the other node it is the other way round, and its host is in the way.
    let there = b.run(&["resolve", "g", "--preview"]);
    assert!(there.contains("the side of a survives"), "{there}");
    assert!(there.contains("it would be refused: group g: 1 clients are connected"), "{there}");
    drop(host);

    // What the peer has is not known where it cannot be asked.
    b.kill();
    let shown = wait_for("b to be gone", || {
        let shown = a.run(&["resolve", "g", "--preview"]);
        shown.contains("only on b: unknown").then_some(shown)
    });
    assert!(shown.contains("what it is: unknown: peer b: is not connected"), "{shown}");
    b.restart();
    wait_until(&a, "b to be back", |peer| peer["link_state"] == "connected");
    // What was said when it began is said again, as both have written since.
    wait_for("the event of both", || {
        a.events("split-brain").pop()?.contains("this node wrote").then_some(())
    });
    // Neither a demote nor half of a command ends it, and each says what does.
    let half = a.command(&["resolve", "g"]);
    let said = String::from_utf8(half.stderr).unwrap();
    assert!(!half.status.success() && said.contains("--preview|--discard-local"), "{said}");
    let demoted = a.run(&["demote", "g"]);
    assert!(demoted.contains("is a secondary here now; its history and that of b"), "{demoted}");
    assert!(demoted.contains("`tidelog resolve g --preview` shows"), "{demoted}");
    let kept = wait_for("a to yield", || {
        let output = a.command(&["resolve", "g", "--discard-local"]);
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    });
    assert!(kept.contains(&format!("tidelog image open g --branch {branch}")), "{kept}");

    // Only a has the branch, and its status names it.
    let status = wait_until(&a, "a to follow", |peer| peer["replication_state"] == "streaming");
    let found = &status["branches"][0];
    assert_eq!((&found["name"], &found["from"]["lsn"]), (&json!(branch), &preview["at"]));
    assert_eq!(found["bytes"], preview["local_bytes"]);
    let shown = a.run(&["status", "g"]);
    assert!(shown.contains(&format!("  branch  {branch}  ")), "{shown}");
    assert!(shown.contains(&format!("tidelog image open g --branch {branch}")), "{shown}");
    assert!(shown.contains(&format!("tidelog branch remove g {branch}")), "{shown}");
    assert_eq!(b.status("g")["branches"], json!([]));
    let before = a.status("g")["branches"].clone();
    a.kill();
    a.restart();
    assert_eq!(a.status("g")["branches"], before, "they are known from the start on");
    a.run(&["image", "open", "g", "--branch", &branch, "--name", "kept"]);
    let mut bytes = [0; 8192];
    connect(&a, "g/v@kept").read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [1; 8192]);
    a.run(&["image", "close", "g@kept"]);
    a.run(&["branch", "remove", "g", &branch]);
    assert_eq!(a.status("g")["branches"], json!([]));
}

/// A copy on `b` whose disk meets a fault while `a` serves on; the faults, and both.
fn with_faulty_copy(dir: &std::path::Path) -> (Faults, Appliance, Appliance) {
    let faults = Faults::new(dir);
    let a = Appliance::start(&dir.join("a"), Setup::new("a"));
    let setup = Setup { environment: faults.environment(), ..Setup::new("b") };
    let b = Appliance::start(&dir.join("b"), setup);
    pair(&a, &b);
    (faults, a, b)
}

#[test]
fn promote_on_a_copy_whose_disk_failed_recommends_what_works_there() {
    let dir = tempfile::tempdir().unwrap();
    let (faults, a, mut b) = with_faulty_copy(dir.path());
    faults.set(&[(Call::Sync, Code::EIO, ".seg")]);
    write(&a, 1);
    wait_for("the copy to fail", || (b.status("g")["data_state"] == "failed").then_some(()));
    let said = refusal(&b, &["promote", "g"]);
    let at = |part: &str| place(&said, part);
    assert!(
        said.contains("the disk under this copy failed") && said.contains("by `--force` neither")
    );
    assert!(said.contains("hosts stay there"), "{said}");
    assert!(at("restart this node") < at("tidelog switchover"), "what can be done comes first");
    // It says the truth of both.
    refusal(&b, &["promote", "g", "--force"]);
    refusal(&b, &["switchover", "g"]);
    let (code, told, _) = check(&b);
    assert!(code == Some(1) && told.contains("restart the node once it is well"), "{told}");
    let told = wait_for("a to know", || Some(check(&a)).filter(|(code, ..)| *code == Some(1))).1;
    assert!(told.contains("peer b: "), "{told}");
    // And what it recommends works.
    faults.none();
    b.kill();
    b.restart();
    wait_until(&b, "b to stream", |peer| peer["replication_state"] == "streaming");
    b.run(&["switchover", "g"]);
    assert_eq!(b.status("g")["role"], "primary");
}

/// What a copy knows of its primary: bytes that it lacks, and what that is worth.
fn lacks(node: &Appliance) -> (Option<u64>, String) {
    let peer = &node.status("g")["peers"][0];
    (peer["lag"]["bytes"].as_u64(), peer["lag_state"].as_str().unwrap().to_owned())
}

/// Where a part is in what was said.
fn place(said: &str, part: &str) -> usize {
    said.find(part).unwrap_or_else(|| panic!("{part}: {said}"))
}

/// When `a` was last heard, by what `promote` says.
fn last_heard(said: &str) -> jiff::Timestamp {
    let (_, rest) = said.split_once("a was last heard ").unwrap_or_else(|| panic!("{said}"));
    let (time, _) =
        rest.split_once(": what it has behind LSN ").unwrap_or_else(|| panic!("{said}"));
    time.parse().unwrap()
}

/// Times are said to the second.
fn this_second() -> jiff::Timestamp {
    jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).unwrap()
}

fn head(node: &Appliance) -> u64 {
    node.status("g")["log"]["head_lsn"].as_u64().unwrap()
}

#[test]
fn a_copy_that_refused_bytes_knows_after_a_restart_without_its_primary_what_it_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let (faults, mut a, mut b) = with_faulty_copy(dir.path());
    faults.set(&[(Call::Sync, Code::EIO, ".seg")]);
    write(&a, 1);
    wait_for("the copy to fail", || (b.status("g")["data_state"] == "failed").then_some(()));
    // The primary goes on, and the copy that takes nothing any more hears how far.
    for byte in 2..20 {
        write(&a, byte);
    }
    let lacking = wait_for("the copy to know what it lacks", || {
        let (bytes, worth) = lacks(&b);
        assert_eq!(worth, "exact");
        bytes.filter(|bytes| *bytes > 0 && head(&b) + bytes == head(&a))
    });
    let kept = b.dir.join("data/node/primaries");
    wait_for("it to be kept", || {
        let kept: Value = serde_json::from_slice(&std::fs::read(&kept).ok()?).unwrap();
        (kept[0]["head"] == head(&a)).then_some(())
    });
    a.kill();
    let at_least = (Some(lacking), "at-least".to_owned());
    wait_for("the copy to miss its primary", || (lacks(&b) == at_least).then_some(()));
    faults.none();
    b.kill();
    // What is known is kept over the next restart too.
    for _ in 0..2 {
        b.restart();
        let (bytes, worth) = lacks(&b);
        // What the failed disk had not got is lacking now as well.
        assert!(bytes >= Some(lacking) && worth == "at-least", "{bytes:?}, {worth}");
        let shown = b.run(&["status", "g"]);
        assert!(
            shown.contains("at least ") && shown.contains(" when it was last heard"),
            "{shown}"
        );
        let status = b.status("g");
        assert!(status["peers"][0]["lag_state_since"].is_string(), "{status}");
        assert_eq!(status["backup_capable"]["verdict"], "no");
        let said = refusal(&b, &["promote", "g"]);
        assert!(said.contains("lacks at least ") && said.contains(" that a had"), "{said}");
        assert!(place(&said, "bring a back") < place(&said, "promote g --force"), "{said}");
        b.stop();
    }
    // It is forgotten once the copy has it.
    let back = this_second();
    b.restart();
    a.restart();
    wait_until(&b, "b to stream", |peer| peer["replication_state"] == "streaming");
    wait_for("b to have all", || {
        (head(&b) == head(&a) && lacks(&b) == (Some(0), "exact".to_owned())).then_some(())
    });
    a.stop();
    b.stop();
    b.restart();
    let shown = b.run(&["status", "g"]);
    assert!(shown.contains("this copy has all that a had when it was last heard"), "{shown}");
    let said = b.run(&["promote", "g"]);
    let heard = last_heard(&said);
    assert!((back..=jiff::Timestamp::now()).contains(&heard), "{heard}, back {back}");
}

/// While a stream runs nothing is written, and so `three weeks ago` was said of a primary that had
/// been heard until the copy was killed.
#[test]
fn a_copy_that_was_killed_while_it_streamed_dates_its_primary_by_what_came_last() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Appliance::start(&dir.path().join("a"), Setup::new("a"));
    let mut b = Appliance::start(&dir.path().join("b"), Setup::new("b"));
    pair(&a, &b);
    let written = this_second();
    write(&a, 1);
    let head = wait_for("b to have all", || (head(&b) == head(&a)).then(|| head(&b)));
    b.kill();
    a.kill();
    let path = b.dir.join("data/node/primaries");
    let mut kept: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let now: LogTime = serde_json::from_value(kept[0]["at"].clone()).unwrap();
    let weeks_ago = LogTime(now.0 - 21 * 86_400 * 1_000_000_000);
    kept[0]["at"] = serde_json::to_value(weeks_ago).unwrap();
    std::fs::write(&path, kept.to_string()).unwrap();
    b.restart();
    assert_eq!(lacks(&b), (Some(0), "at-least".to_owned()));
    let peer = &b.status("g")["peers"][0];
    let since: jiff::Timestamp = peer["lag_state_since"].as_str().unwrap().parse().unwrap();
    assert!(since >= written, "{peer}");
    for seconds in [&peer["lag"]["seconds"], &peer["rpo_actual_seconds"]] {
        assert!(seconds.as_f64().unwrap() < 86_400.0, "{peer}");
    }
    let said = b.run(&["promote", "g"]);
    assert!(last_heard(&said) >= written, "{said}");
    assert!(said.contains(&format!("behind LSN {head}, if anything, is not here")), "{said}");
}

#[test]
fn a_copy_that_has_heard_no_primary_since_its_start_says_that_it_does_not_know() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Appliance::start(&dir.path().join("a"), Setup::new("a"));
    let mut b = Appliance::start(&dir.path().join("b"), Setup::new("b"));
    pair(&a, &b);
    a.kill();
    b.kill();
    std::fs::remove_file(b.dir.join("data/node/primaries")).unwrap();
    b.restart();
    assert_eq!(lacks(&b), (None, "unknown".to_owned()));
    let shown = b.run(&["status", "g"]);
    let why = "how far behind is not known: a has not been heard since this node started";
    assert!(shown.contains(why), "{shown}");
    let reasons = b.status("g")["backup_capable"]["reasons"].to_string();
    assert!(reasons.contains("lag-unknown"), "{reasons}");
    let unknown = "it is not known whether a had more";
    let said = b.run(&["promote", "g"]);
    assert!(said.contains(unknown), "{said}");
    assert!(b.events("promoted")[0].contains(unknown), "{:?}", b.events("promoted"));
}

#[test]
fn promote_on_a_copy_whose_log_has_no_room_recommends_to_make_some_first() {
    let dir = tempfile::tempdir().unwrap();
    let (faults, a, b) = with_faulty_copy(dir.path());
    faults.set(&[(Call::Write, Code::ENOSPC, ".seg")]);
    write(&a, 1);
    let full = wait_for("the copy to be full", || {
        Some(refusal(&b, &["promote", "g"])).filter(|said| said.contains("make room"))
    });
    assert!(full.contains("hosts could not write here: log-full"), "{full}");
    assert!(full.find("make room") < full.find("tidelog switchover"), "{full}");
    // Once the disk is asked no more, it is the state of replication that is in the way.
    let blocked = wait_for("the copy to be blocked", || {
        Some(refusal(&b, &["promote", "g"])).filter(|said| !said.contains("make room"))
    });
    assert!(blocked.contains("this copy does not follow it now"), "{blocked}");
    faults.none();
    wait_until(&b, "b to stream", |peer| peer["replication_state"] == "streaming");
    let well = refusal(&b, &["promote", "g"]);
    assert!(well.contains("its primary; `tidelog switchover g` changes sides"), "{well}");
    b.run(&["switchover", "g"]);
}

#[test]
fn the_switchover_that_is_recommended_beside_a_full_primary_works() {
    let dir = tempfile::tempdir().unwrap();
    let faults = Faults::new(dir.path());
    let setup = Setup { environment: faults.environment(), ..Setup::new("a") };
    let a = Appliance::start(&dir.path().join("a"), setup);
    let b = Appliance::start(&dir.path().join("b"), Setup::new("b"));
    pair(&a, &b);
    write(&a, 1);
    faults.set(&[(Call::Write, Code::ENOSPC, ".seg"), (Call::Create, Code::ENOSPC, "/log/")]);
    let mut client = connect(&a, "g/v");
    client.write(0, &[2; 4096]).unwrap_err();
    drop(client);
    let (code, told, _) = check(&a);
    assert_eq!(code, Some(1), "{told}");
    assert!(told.contains("group g: log-full: writes are refused"), "{told}");
    // The copy is well, and yet hosts are not: whoever watches it alone learns of that.
    let there = wait_for("b to know", || {
        let (code, told, _) = check(&b);
        (code == Some(1)).then_some(told)
    });
    let log = b.status("g")["log"].clone();
    assert_eq!(log["full_reason"], Value::Null, "{log}");
    assert!(there.contains("peer a: is the primary: log-full: writes are refused"), "{there}");
    let said = refusal(&b, &["promote", "g"]);
    assert!(said.contains("`tidelog switchover g` changes sides"), "{said}");
    b.run(&["switchover", "g"]);
    write(&b, 3);
    assert_eq!(b.status("g")["role"], "primary");
}

#[test]
fn a_health_check_ends_with_1_where_an_operator_must_act_and_says_why_in_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let a = Appliance::start(&dir.path().join("a"), Setup::new("a"));
    let mut b = Appliance::start(&dir.path().join("b"), Setup::new("b"));
    pair(&a, &b);
    assert_eq!(check(&a).0, Some(0));
    let codes = |node: &Appliance| {
        let output = node.command(&["--json", "status", "--check"]);
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        let found = told["attention"].as_array().unwrap().iter();
        let codes = found.map(|one| one["code"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
        assert_eq!(output.status.success(), codes.is_empty(), "{told}");
        codes
    };
    assert_eq!(codes(&a), Vec::<String>::new());
    a.run(&["pause", "g"]);
    wait_for("the pause", || (codes(&a) == ["paused"]).then_some(()));
    let (code, said, beside) = check(&a);
    assert_eq!((code, said.lines().count(), beside.lines().count()), (Some(1), 1, 1), "{said}");
    assert!(said.starts_with("group g: peer b: replication is paused"), "{said}");
    assert!(said.contains("`tidelog resume g`"), "{said}");
    a.run(&["resume", "g"]);
    wait_for("all to be well", || (codes(&a).is_empty()).then_some(()));
    b.stop();
    wait_for("the link to be down", || (codes(&a) == ["link-down"]).then_some(()));
    // Only of the group that is asked for; a node that is not there is no health either.
    a.run(&["group", "create", "other"]);
    assert!(a.command(&["status", "other", "--check"]).status.success());
    assert_eq!(b.command(&["status", "--check"]).status.code(), Some(1));
    assert_eq!(a.command(&["status", "--check", "--watch"]).status.code(), Some(2));
}
