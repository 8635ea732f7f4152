//! The control socket of a running node: commands, errors with codes, audit, events, metrics.

use std::fs::Permissions;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::libc;
use serde_json::Value;

use super::support::load::{client, wait_until_level};
use super::support::{Appliance, Setup, free_address, wait_for};

/// One HTTP request on the control socket; status, content type and body.
pub fn request(
    appliance: &Appliance,
    method: &str,
    path: &str,
    body: &str,
) -> (u16, String, String) {
    let mut socket = UnixStream::connect(appliance.control_socket()).unwrap();
    let length = body.len();
    write!(
        socket,
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let kind = head
        .lines()
        .find_map(|line| line.strip_prefix("content-type: "))
        .unwrap_or_default()
        .to_owned();
    (status, kind, body.to_owned())
}

/// Runs a command that must fail with status 1 and one line; the line.
fn failure(appliance: &Appliance, arguments: &[&str]) -> String {
    let output = appliance.command(arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
    said
}

#[test]
fn groups_and_volumes_are_made_shown_changed_and_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let node = Appliance::start(dir.path(), Setup::new("a"));
    assert!(node.run(&["status"]).contains("no groups"));
    node.run(&["group", "create", "g"]);
    node.run(&["volume", "create", "g/v", "--size", "64M"]);
    node.run(&["volume", "create", "g/w", "--size", "4096"]);
    let status = node.json(&["status", "g"]);
    let group = &status["groups"][0];
    assert_eq!(status["node"], "a");
    assert_eq!(group["role"], "primary");
    assert_eq!(group["data_state"], "consistent");
    assert_eq!(group["volumes"][0]["size_bytes"], 64 << 20);
    assert_eq!(group["volumes"][0]["block_size_bytes"], 4096);
    assert!(group["log"]["durable_lsn"].as_u64().unwrap() > 0);
    assert!(group["protection_window"]["from"].is_string());
    assert_eq!(group["peers"], serde_json::json!([]));

    node.run(&["volume", "resize", "g/v", "--size", "128M"]);
    assert_eq!(node.json(&["volume", "show", "g/v"])["size_bytes"], 128 << 20);
    let set = node.json(&["group", "set", "g", "window=2h", "log_limit=1G"]);
    assert_eq!(set["policy"]["window"], "2h");
    assert_eq!(set["policy"]["log_limit"], 1 << 30);
    node.run(&["volume", "delete", "g/w"]);
    let volumes = node.json(&["volume", "list"]);
    assert_eq!(volumes["volumes"].as_array().unwrap().len(), 1);
    assert!(node.run(&["volume", "list", "g"]).contains("128 MiB"));

    node.run(&["group", "delete", "g"]);
    assert_eq!(node.json(&["group", "list"])["groups"], serde_json::json!([]));
}

#[test]
fn what_was_made_is_there_after_a_restart_and_after_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Appliance::start(dir.path(), Setup::new("a"));
    node.run(&["group", "create", "g"]);
    node.run(&["volume", "create", "g/v", "--size", "64M"]);
    node.run(&["bookmark", "g", "before", "--consistency", "filesystem"]);
    let before = node.json(&["timeline", "g"]);
    node.stop();
    node.restart();
    let bookmarks = node.json(&["bookmark", "list", "g"]);
    assert_eq!(bookmarks["bookmarks"], before["bookmarks"]);
    assert_eq!(bookmarks["bookmarks"][0]["consistency"], "filesystem");
    node.kill();
    node.restart();
    assert_eq!(node.json(&["bookmark", "list", "g"])["bookmarks"], before["bookmarks"]);
    assert_eq!(node.json(&["volume", "show", "g/v"])["size_bytes"], 64 << 20);
}

#[test]
fn images_are_opened_listed_and_closed_at_every_kind_of_point() {
    let dir = tempfile::tempdir().unwrap();
    let node = Appliance::start(dir.path(), Setup::new("a"));
    node.run(&["group", "create", "g"]);
    node.run(&["volume", "create", "g/v", "--size", "64M"]);
    let bookmark = node.json(&["bookmark", "g", "b1"]);
    let lsn = format!("lsn:{}", bookmark["position"]["lsn"]);
    for (name, point) in [("i1", "now"), ("i2", "b1"), ("i3", &lsn)] {
        let image = node.json(&["image", "open", "g", "--at", point, "--name", name]);
        assert_eq!(image["exports"][0], format!("g/v@{name}"));
        assert!(image["position"]["epoch"].is_string() && image["position"]["time"].is_string());
    }
    assert_eq!(node.json(&["image", "list", "g"])["images"].as_array().unwrap().len(), 3);
    node.run(&["bookmark", "g", "kept", "--pin"]);
    let timeline = node.json(&["timeline", "g"]);
    let holds = timeline["holds"].as_array().unwrap();
    assert_eq!(holds.len(), 4, "three images and a pin");
    assert!(holds.iter().all(|hold| hold["disk_bytes"] == 0), "no fold has passed any: {holds:?}");
    assert_eq!(holds[3]["bookmark"], "kept");
    let listed = node.json(&["bookmark", "list", "g"])["bookmarks"].clone();
    assert_eq!((&listed[0]["pinned"], &listed[1]["pinned"]), (&false.into(), &true.into()));
    let both = failure(&node, &["image", "open", "g", "--branch", "nope"]);
    assert!(both.contains("tidelog branch list g"), "{both}");
    for name in ["g@i1", "g@i2", "g@i3"] {
        node.run(&["image", "close", name]);
    }
    assert_eq!(node.json(&["image", "list"])["images"], serde_json::json!([]));
    let said = failure(&node, &["image", "open", "g", "--at", "no-such-bookmark"]);
    assert!(said.contains("no-such-bookmark"), "{said}");
}

/// Blocks that are written, each time the same.
const WRITTEN_BYTES: usize = 40 * 4096;
const VOLUME_BYTES: u64 = 4 << 20;

/// A group with a volume `v`, and its copy on b.
fn replicated(dir: &Path) -> (Appliance, Appliance) {
    let a = Appliance::start(&dir.join("a"), Setup::new("a"));
    let b = Appliance::start(&dir.join("b"), Setup::new("b"));
    a.pair_with(&b);
    a.run(&["group", "create", "g"]);
    a.run(&["volume", "create", "g/v", "--size", &VOLUME_BYTES.to_string()]);
    a.run(&["replicate", "g", "--to", "b"]);
    wait_until_level(&a, &b);
    (a, b)
}

fn write(node: &Appliance, byte: u8, times: usize) {
    let mut host = client(node, "v");
    let bytes = vec![byte; WRITTEN_BYTES];
    (0..times).for_each(|_| host.write(0, &bytes).unwrap());
    host.flush().unwrap();
    host.disconnect().unwrap();
    wait_for("the client to be gone", || {
        (node.status("g")["volumes"][0]["clients"] == 0).then_some(())
    });
}

#[test]
fn the_timeline_shows_what_each_image_pin_and_branch_costs() {
    let dir = tempfile::tempdir().unwrap();
    let (mut a, mut b) = replicated(dir.path());
    write(&a, 1, 1);
    a.run(&["image", "open", "g", "--at", "now", "--name", "i"]);
    write(&a, 2, 1);
    a.run(&["bookmark", "g", "kept", "--pin"]);
    write(&a, 3, 1);
    wait_until_level(&a, &b);
    // What b never had becomes a branch.
    b.stop();
    write(&a, 4, 1);
    let end = a.status("g")["log"]["head_lsn"].as_u64();
    a.kill();
    b.restart();
    b.run(&["promote", "g", "--force"]);
    b.run(&["group", "set", "g", "window=1s", "log_limit=256M"]);
    a.restart();
    wait_until_level(&b, &a);
    // More than an eighth of the least limit of a log: that much is folded at a time.
    write(&b, 5, (40 << 20) / WRITTEN_BYTES);
    wait_for("a to fold past all of them", || {
        (a.status("g")["log"]["horizon_lsn"].as_u64() > end).then_some(())
    });
    let holds = a.json(&["timeline", "g"])["holds"].clone();
    let written = WRITTEN_BYTES as u64;
    // Of a branch, what it begins with and its own log.
    for (key, least) in [("image", written), ("bookmark", written), ("branch", 2 * written)] {
        let hold = holds.as_array().unwrap().iter().find(|hold| hold[key].is_string());
        let bytes = hold.and_then(|hold| hold["disk_bytes"].as_u64()).unwrap_or_default();
        assert!((least..VOLUME_BYTES).contains(&bytes), "{key}: {holds}");
    }
}

#[test]
fn a_deleted_volume_is_shown_at_its_older_moments_on_both_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = replicated(dir.path());
    write(&a, 7, 1);
    a.run(&["bookmark", "g", "old"]);
    let mut host = client(&a, "v");
    // Who is answered is counted.
    host.read(0, &mut [0; WRITTEN_BYTES]).unwrap();
    let said = failure(&a, &["volume", "delete", "g/v"]);
    assert!(said.contains("volume g/v: 1 clients are connected; disconnect them first"), "{said}");
    host.disconnect().unwrap();
    wait_for("the volume to be deleted", || {
        a.command(&["volume", "delete", "g/v"]).status.success().then_some(())
    });
    // Another of its name is another volume.
    a.run(&["volume", "create", "g/v", "--size", "1M"]);
    write(&a, 8, 1);
    wait_until_level(&a, &b);
    b.stop();
    b.restart();
    for node in [&a, &b] {
        for (point, size, byte) in [("old", VOLUME_BYTES, 7), ("now", 1 << 20, 8)] {
            node.run(&["image", "open", "g", "--at", point, "--name", &format!("at-{point}")]);
            let mut export = client(node, &format!("v@at-{point}"));
            assert_eq!(export.size_bytes(), size, "{point}");
            let mut bytes = vec![0; WRITTEN_BYTES];
            export.read(0, &mut bytes).unwrap();
            assert!(bytes.iter().all(|found| *found == byte), "{point}");
        }
    }
}

#[test]
fn a_replicated_group_is_deleted_only_after_a_stop_and_the_other_node_keeps_its_history() {
    let dir = tempfile::tempdir().unwrap();
    let (a, mut b) = replicated(dir.path());
    write(&a, 1, 1);
    a.run(&["bookmark", "g", "old"]);
    write(&a, 2, 1);
    wait_until_level(&a, &b);
    for (node, peer, place) in [(&a, "b", "here"), (&b, "a", "on the primary")] {
        let said = failure(node, &["group", "delete", "g"]);
        let told = format!(
            "group g: is replicated with {peer}; `tidelog replicate g --stop --to b` {place} first"
        );
        assert!(said.contains(&told), "{said}");
    }
    a.run(&["replicate", "g", "--stop", "--to", "b"]);
    wait_for("the copy to be retired", || b.has_event("copy-retired").then_some(()));
    a.run(&["group", "delete", "g"]);
    assert_eq!(a.json(&["group", "list"])["groups"], serde_json::json!([]));
    b.stop();
    b.restart();
    for (point, byte) in [("old", 1), ("now", 2)] {
        b.run(&["image", "open", "g", "--at", point, "--name", &format!("at-{point}")]);
        let mut bytes = vec![0; WRITTEN_BYTES];
        client(&b, &format!("v@at-{point}")).read(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|found| *found == byte), "{point}");
    }
}

#[test]
fn who_was_primary_last_is_not_deleted_while_nobody_else_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = replicated(dir.path());
    wait_until_level(&a, &b);
    a.run(&["pause", "g"]);
    write(&a, 1, 1);
    a.run(&["demote", "g"]);
    let said = failure(&a, &["group", "delete", "g"]);
    assert!(
        said.contains("group g: this node was its primary last, and may have what b"),
        "{said}"
    );
    let check = a.command(&["status", "--check"]);
    let told = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(check.status.code() == Some(1) && told.contains("promote g"), "{told}");
    // As it says: what only this node had is then on the other too.
    a.run(&["promote", "g"]);
    a.run(&["resume", "g"]);
    wait_until_level(&a, &b);
    a.run(&["replicate", "g", "--stop", "--to", "b"]);
    wait_for("the copy to be retired", || b.has_event("copy-retired").then_some(()));
    a.run(&["group", "delete", "g"]);
    b.run(&["image", "open", "g", "--at", "now", "--name", "i"]);
    let mut bytes = vec![0; WRITTEN_BYTES];
    client(&b, "v@i").read(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|found| *found == 1));
}

#[test]
fn errors_name_object_cause_and_next_command() {
    let dir = tempfile::tempdir().unwrap();
    let node = Appliance::start(dir.path(), Setup::new("a"));
    node.run(&["group", "create", "g"]);
    for (arguments, object, next) in [
        (&["volume", "show", "g/nope"][..], "volume g/nope", "tidelog volume list g"),
        (&["volume", "resize", "g/nope", "--size", "1G"], "volume g/nope", "tidelog volume list"),
        (&["status", "nope"], "group nope", "tidelog group list"),
        (&["group", "create", "g"], "group g", "exists"),
        (&["volume", "create", "g/v", "--size", "5000"], "volume v", "8192"),
        (&["group", "set", "g", "windows=1h"], "`windows`", "the nearest is `window`"),
        (&["replicate", "g", "--to", "nobody"], "peer nobody", "tidelog peer list"),
        (&["image", "close", "g@nope"], "nope", "not exist"),
        (&["bookmark", "remove", "g", "nope"], "bookmark nope", "tidelog bookmark list g"),
    ] {
        let said = failure(&node, arguments);
        assert!(said.contains(object) && said.contains(next), "{arguments:?}: {said}");
    }
    let (status, kind, body) = request(&node, "GET", "/v1/groups/nope", "");
    let problem: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, kind.as_str()), (404, "application/problem+json"));
    assert_eq!(problem["code"], "no-such-group");
    let (status, _, body) = request(&node, "POST", "/v1/groups", "{\"nam\":\"x\"}");
    assert_eq!(status, 400, "{body}");
    assert!(body.contains("unknown key `nam`; the nearest is `name`"), "{body}");
    let (status, _, _) = request(&node, "POST", "/v1/groups", "not json");
    assert_eq!(status, 400);
    assert_eq!(request(&node, "PUT", "/v1/groups", "").0, 405);
}

#[test]
fn changes_leave_audit_events_with_the_uid_and_followers_see_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Appliance::start(dir.path(), Setup::new("a"));
    let mut follower = Command::new(env!("CARGO_BIN_EXE_tidelog"))
        .arg("--socket")
        .arg(node.control_socket())
        .args(["--json", "events", "--follow"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    node.run(&["group", "create", "g"]);
    let seen: Value = lines
        .by_ref()
        .map(|line| serde_json::from_str(&line.unwrap()).unwrap())
        .find(|event: &Value| event["code"] == "audit")
        .unwrap();
    assert_eq!(seen["details"]["uid"], nix::unistd::getuid().as_raw());
    assert!(seen["text"].as_str().unwrap().starts_with("group create g: by"), "{seen}");
    node.stop();
    assert!(follower.wait().unwrap().success(), "the stream ends with the node");
    node.restart();
    let events = node.json(&["events"]);
    let kept = events["events"].as_array().unwrap();
    assert!(kept.contains(&seen), "events survive a restart");
    assert_eq!(kept.iter().filter(|event| event["code"] == "started").count(), 2);
    assert_eq!(kept.iter().filter(|event| event["code"] == "stopped").count(), 1);
    let last = kept.last().unwrap()["sequence"].to_string();
    assert_eq!(node.json(&["events", "--since", &last])["events"], serde_json::json!([]));
}

#[test]
fn metrics_and_the_description_of_routes_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let node = Appliance::start(dir.path(), Setup::new("a"));
    node.run(&["group", "create", "g"]);
    node.run(&["volume", "create", "g/v", "--size", "64M"]);
    let (status, _, text) = request(&node, "GET", "/metrics", "");
    assert_eq!(status, 200);
    assert!(
        text.contains("tidelog_volume_size_bytes{group=\"g\",volume=\"v\"} 67108864"),
        "{text}"
    );
    assert!(text.contains("tidelog_group_primary{group=\"g\"} 1"), "{text}");
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        assert!(line.starts_with("tidelog_"), "{line}");
    }
    let (status, _, body) = request(&node, "GET", "/v1/openapi.json", "");
    let document: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(status, 200);
    assert!(document["paths"]["/v1/groups/{group}/volumes"]["post"].is_object());
}

#[test]
fn two_nodes_share_neither_a_data_directory_nor_a_port() {
    let dir = tempfile::tempdir().unwrap();
    let node = Appliance::start(&dir.path().join("a"), Setup::new("a"));
    let serve = |text: String| {
        let path = dir.path().join("other.toml");
        std::fs::write(&path, text).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_tidelog"))
            .args(["serve", "--config", path.to_str().unwrap()])
            .env_clear()
            .env("RUST_LOG", "off")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let shown = dir.path().display().to_string();
    let socket = format!("[control]\nsocket = \"{shown}/c.sock\"\n");
    let said = serve(format!("node = \"x\"\ndata_dir = \"{shown}/a/data\"\n{socket}"));
    assert!(said.contains("another node runs on it"), "{said}");
    let peer = &node.peer_address;
    let said = serve(format!(
        "node = \"x\"\ndata_dir = \"{shown}/x\"\n{socket}[peer]\nlisten = \"{peer}\"\n"
    ));
    assert!(said.contains(peer.as_str()) && said.contains("in use"), "{said}");
    assert!(said.contains("listen"), "{said}");
    let said = serve(format!(
        "node = \"x\"\ndata_dir = \"{shown}/y\"\n[control]\nsocket = \"{}\"\n",
        node.control_socket().display()
    ));
    assert!(said.contains("another node answers on it"), "{said}");
    assert_eq!(node.json(&["status"])["node"], "a", "the first node goes on");
}

#[test]
fn hangup_reloads_who_may_use_the_socket_and_says_what_waits() {
    let dir = tempfile::tempdir().unwrap();
    let node = Appliance::start(dir.path(), Setup::new("a"));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(node.pid()).unwrap());
    let path = dir.path().join("tidelog.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let reloaded = |count: usize| {
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
        wait_for("the reload", || {
            let events = node.json(&["events"]);
            let events = events["events"].as_array().unwrap().clone();
            let mut found: Vec<Value> =
                events.into_iter().filter(|event| event["code"] == "reloaded").collect();
            (found.len() == count).then(|| found.pop().unwrap())
        })
    };
    let socket = node.control_socket();
    let mode = |mode| std::fs::Permissions::from_mode(mode);
    let is = || std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777;
    assert_eq!(is(), 0o600);
    std::fs::set_permissions(socket.parent().unwrap(), mode(0o711)).unwrap();
    std::fs::write(&path, text.replace("[control]\n", "[control]\nallow = [\"daemon\"]\n"))
        .unwrap();
    assert_eq!(reloaded(1)["severity"], "info");
    assert_eq!(is(), 0o666, "who is allowed now can open it");
    std::fs::write(&path, format!("{text}\n[limits]\nconnections = 3\n")).unwrap();
    let event = reloaded(2);
    assert_eq!(event["severity"], "warning");
    assert!(event["text"].as_str().unwrap().contains("restart"), "{event}");
    assert_eq!(is(), 0o600);
}

#[test]
fn commands_that_append_work_on_a_secondary_too() {
    let dir = tempfile::tempdir().unwrap();
    let a = Appliance::start(&dir.path().join("a"), Setup::new("a"));
    let b = Appliance::start(&dir.path().join("b"), Setup::new("b"));
    a.pair_with(&b);
    a.run(&["group", "create", "g"]);
    a.run(&["volume", "create", "g/v", "--size", "64M"]);
    a.run(&["replicate", "g", "--to", "b", "--rpo", "5s"]);
    wait_for("b to stream", || {
        let peer = &a.status("g")["peers"][0];
        (peer["replication_state"] == "streaming").then_some(())
    });
    b.run(&["bookmark", "g", "from-b"]);
    let here = a.json(&["bookmark", "list", "g"]);
    assert_eq!(here["bookmarks"][0]["name"], "from-b");
    wait_for("b to have the bookmark", || {
        (b.json(&["bookmark", "list", "g"])["bookmarks"] == here["bookmarks"]).then_some(())
    });
    let audits = a.json(&["events"]);
    let from_b = audits["events"]
        .as_array()
        .unwrap()
        .iter()
        .any(|event| event["code"] == "audit" && event["details"]["node"] == "b");
    assert!(from_b, "the primary knows who asked, and where");
    let said = failure(&b, &["bookmark", "g", "from-b"]);
    assert!(said.contains("exists"), "{said}");
    assert_eq!(a.status("g")["peers"][0]["rpo_target_seconds"], 5.0);
    assert_eq!(b.status("g")["role"], "secondary");
    assert_eq!(b.status("g")["peers"][0]["name"], "a");
}

/// Connections of a user to a socket, on which nothing is said.
fn silent(socket: &Path, uid: u32, count: usize) -> Vec<UnixStream> {
    std::thread::scope(|scope| {
        let opening = scope.spawn(move || {
            let same = -1 as libc::c_long;
            // SAFETY: the call takes numbers alone. It changes this thread, where the C library's
            // function would change the process.
            let failed =
                unsafe { libc::syscall(libc::SYS_setresuid, same, libc::c_long::from(uid), same) };
            assert_eq!(failed, 0, "this test acts as other users: it needs root");
            (0..count).map(|_| UnixStream::connect(socket).unwrap()).collect()
        });
        opening.join().unwrap()
    })
}

/// Whether the other side has closed a connection on which it never says anything.
fn is_closed(read: std::io::Result<usize>) -> bool {
    match read {
        Ok(count) => count == 0,
        Err(error) => error.kind() != ErrorKind::WouldBlock,
    }
}

#[test]
fn idle_connections_take_their_own_users_places_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Appliance::start(dir.path(), Setup::new("a"));
    let (allowed, stranger) = (54_321, 54_322);
    node.stop();
    let path = dir.path().join("tidelog.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let allow = format!("[control]\nallow = [\"{allowed}\"]\n");
    std::fs::write(&path, text.replace("[control]\n", &allow)).unwrap();
    node.restart();
    let socket = node.control_socket();
    for on_the_way in [dir.path(), socket.parent().unwrap()] {
        std::fs::set_permissions(on_the_way, Permissions::from_mode(0o711)).unwrap();
    }
    let open = |uid: u32| {
        let idle = silent(&socket, uid, 100);
        idle.iter().for_each(|connection| connection.set_nonblocking(true).unwrap());
        idle
    };
    let closed = |idle: &[UnixStream]| {
        idle.iter().filter(|connection| is_closed((&**connection).read(&mut [0]))).count()
    };
    let idle = open(allowed);
    wait_for("an allowed user's to be closed but 16", || (closed(&idle) >= 84).then_some(()));
    let strange = open(stranger);
    wait_for("a stranger's to be closed but 2", || (closed(&strange) >= 98).then_some(()));
    assert_eq!(node.json(&["status"])["node"], "a", "it answers all the while");
    assert!(closed(&idle) < 100, "who came first keeps his places");
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", node.pid())).unwrap().count();
    assert!(descriptors < 100, "{descriptors} are open");

    let ask = |uid: u32| {
        let mut connection = silent(&socket, uid, 1).pop().unwrap();
        let mut answer = String::new();
        // Where there is no place the connection is closed before all of it was said.
        write!(connection, "GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n").ok()?;
        connection.read_to_string(&mut answer).ok()?;
        Some(answer.split(' ').nth(1)?.to_owned())
    };
    drop(idle);
    assert_eq!(wait_for("a place of the user", || ask(allowed)), "200");
    assert_eq!(wait_for("a place for a stranger, whose connections end", || ask(stranger)), "403");
    assert!(closed(&strange) >= 99, "a stranger's idle connection does not last");
}

#[test]
fn idle_connections_to_the_metrics_listener_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let address = free_address();
    let more = format!("[metrics]\nlisten = \"{address}\"");
    let node = Appliance::start(dir.path(), Setup { more, ..Setup::new("a") });
    let connect = || TcpStream::connect(&address).unwrap();
    let idle: Vec<TcpStream> = (0..100).map(|_| connect()).collect();
    idle.iter().for_each(|connection| connection.set_nonblocking(true).unwrap());
    wait_for("all but 8 to be closed", || {
        let closed = idle.iter().filter(|connection| is_closed((&**connection).read(&mut [0])));
        (closed.count() >= 92).then_some(())
    });
    assert_eq!(node.json(&["status"])["node"], "a");
    drop(idle);
    let answer = wait_for("a place", || {
        let mut answer = String::new();
        let mut connection = connect();
        write!(connection, "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").ok()?;
        connection.read_to_string(&mut answer).ok()?;
        (!answer.is_empty()).then_some(answer)
    });
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("tidelog_"), "{answer}");
}
