//! The server over a real group: any alignment against a model, images, roles and names.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use zerocopy::IntoBytes;

use tidelog::events::Events;
use tidelog::group::{
    Allocation, Group, GroupContext, LocalLimits, NodeIdentity, Point, Registry, RestoreClaim,
};
use tidelog::io::{Entropy, Env, SeededEntropy};
use tidelog::log::control::{Control, MemberRecord, Mode, OnFull, OnLoss, PolicyRecord};
use tidelog::nbd::wire::{self, Errno};
use tidelog::nbd::{
    Client, ClientError, Device, ExportInfo, Exports, GroupExports, Identity, NbdAddress,
    NbdCounters, NbdLimits, NbdListen, NbdServer, Refusal, listen, negotiate,
};
use tidelog::units::{ByteSize, Name, NodeId};

const SIZE: u64 = 1 << 20;

/// A server of one group with volume `v`, in a directory of its own.
struct Rig {
    server: NbdServer,
    registry: Arc<Registry>,
    dir: tempfile::TempDir,
}

fn context() -> GroupContext {
    GroupContext {
        env: Env::real(),
        node: NodeIdentity { id: NodeId([1; 16]), name: name("a") },
        limits: LocalLimits::default(),
        failures: None,
        events: Events::in_memory(),
    }
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn serve(registry: &Arc<Registry>, dir: &Path) -> NbdServer {
    serve_with(registry, dir, NbdLimits::default(), Arc::default())
}

fn serve_with(
    registry: &Arc<Registry>,
    dir: &Path,
    limits: NbdLimits,
    counters: Arc<NbdCounters>,
) -> NbdServer {
    let at = NbdListen::new(NbdAddress::Unix(dir.join("s")));
    let exports = Arc::new(GroupExports::new(Arc::clone(registry)));
    listen(at, exports, limits, counters).unwrap()
}

impl Rig {
    fn new() -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(context(), &dir.path().join("groups")).unwrap();
        let group = registry.create(name("g"), Some(4 << 20)).unwrap();
        group.start_workers();
        group.create_volume(name("v"), SIZE).unwrap();
        Rig { server: serve(&registry, dir.path()), registry, dir }
    }

    fn client(&self, export: &str) -> Client {
        Client::connect(self.server.local_addr(), export).unwrap()
    }

    /// Why an export is refused.
    fn refusal(&self, export: &str) -> String {
        match Client::connect(self.server.local_addr(), export) {
            Ok(_) => panic!("`{export}` is served"),
            Err(error) => error.to_string(),
        }
    }
}

#[test]
fn requests_of_any_alignment_equal_a_model() {
    let rig = Rig::new();
    let mut client = rig.client("g/v");
    let mut model = vec![0u8; SIZE as usize];
    let random = SeededEntropy::new(20);
    let mut kinds = [0; 5];
    for round in 0..1500u64 {
        let longest = if random.next_u64().is_multiple_of(8) { 200_000 } else { 6_000 };
        let offset = random.next_u64() % SIZE;
        let length = (1 + random.next_u64() % longest).min(SIZE - offset);
        let range = offset as usize..(offset + length) as usize;
        let kind = (random.next_u64() % 5) as usize;
        kinds[kind] += 1;
        match kind {
            0 | 1 => {
                let mut data = vec![0; length as usize];
                random.fill(&mut data);
                client.write(offset, &data).unwrap();
                model[range].copy_from_slice(&data);
            }
            2 => {
                client.write_zeroes(offset, length as u32).unwrap();
                model[range].fill(0);
            }
            3 => {
                client.trim(offset, length as u32).unwrap();
                model[range].fill(0);
            }
            _ => {
                let mut back = vec![1; length as usize];
                client.read(offset, &mut back).unwrap();
                assert!(back == model[range.clone()], "round {round}: {offset}+{length}");
                let extents = client.extents(offset, length as u32).unwrap();
                let mut at = offset as usize;
                for extent in extents {
                    let end = at + extent.length as usize;
                    if extent.allocation != Allocation::Data {
                        assert!(
                            model[at..end].iter().all(|byte| *byte == 0),
                            "round {round}: {at}..{end} is called {:?}",
                            extent.allocation
                        );
                    }
                    at = end;
                }
                assert_eq!(at, range.end, "round {round}: the status has gaps");
            }
        }
        if round % 400 == 399 {
            client.flush().unwrap();
            rig.registry.by_name("g").unwrap().fold_now().unwrap();
        }
    }
    assert!(kinds.iter().all(|count| *count > 100), "{kinds:?}");
    let mut whole = vec![0; SIZE as usize];
    client.read(0, &mut whole).unwrap();
    assert!(whole == model);
}

#[test]
fn an_image_stays_as_it_was_while_its_volume_goes_on() {
    let rig = Rig::new();
    let group = rig.registry.by_name("g").unwrap();
    let mut live = rig.client("g/v");
    live.write(100, b"before").unwrap();
    group.open_image(&Point::Now, Some(name("i")), "test", None).unwrap();
    live.write(100, b"behind").unwrap();
    let mut image = rig.client("g/v@i");
    assert!(image.is_read_only());
    let mut back = [0; 6];
    image.read(100, &mut back).unwrap();
    assert_eq!(&back, b"before");
    image.flush().unwrap();
    let refusal = image.write(0, b"x").unwrap_err();
    assert!(matches!(refusal, ClientError::Request { errno: Errno::Eperm, .. }), "{refusal}");
    assert_eq!(Client::list(rig.server.local_addr()).unwrap(), ["g/v", "g/v@i"]);
    assert_eq!(group.clients().len(), 1, "an image's client is no client of the volume");
}

#[test]
fn names_that_are_not_served_are_refused_with_a_reason() {
    let rig = Rig::new();
    assert!(rig.refusal("v").contains("GROUP/VOL"));
    assert!(rig.refusal("x/v").contains("group `x` does not exist"));
    assert!(rig.refusal("g/x").contains("volume `x` does not exist"));
    assert!(rig.refusal("g/v@x").contains("image `x` is not open"));
    assert!(rig.refusal("g/v@").contains("is not open"));
    assert_eq!(rig.client("").size_bytes(), SIZE, "the only volume is the default");
    rig.registry.by_name("g").unwrap().create_volume(name("w"), SIZE).unwrap();
    assert!(rig.refusal("").contains("2 volumes"));
}

#[test]
fn a_demoted_group_lets_nobody_in_and_answers_those_inside() {
    let rig = Rig::new();
    let group = rig.registry.by_name("g").unwrap();
    let mut client = rig.client("g/v");
    client.write(0, &[1; 4096]).unwrap();
    assert_eq!(group.clients(), [(group.control().volumes[0].number, 1)]);
    group.open_image(&Point::Now, Some(name("i")), "test", None).unwrap();
    let mut image = rig.client("g/v@i");
    group.demote().unwrap();
    image.read(0, &mut [0; 512]).unwrap();
    assert_eq!(image.extents(0, 4096).unwrap().len(), 1, "an image has no role");
    let refusals = [
        client.write(0, &[2; 4096]).unwrap_err(),
        client.read(0, &mut [0; 512]).unwrap_err(),
        client.extents(0, 4096).unwrap_err(),
    ];
    for refusal in refusals {
        let told = matches!(refusal, ClientError::Request { errno: Errno::Eshutdown, .. });
        assert!(told, "{refusal}");
    }
    let said = rig.refusal("g/v");
    assert!(said.contains("secondary here") && said.contains("image open g --at now"), "{said}");
    assert_eq!(Client::list(rig.server.local_addr()).unwrap(), ["g/v@i"]);
}

/// A kernel takes an error for a failed write of its file system; a lost connection is replaced.
#[test]
fn a_kernel_is_disconnected_by_a_demoted_group_and_not_answered() {
    for command in [wire::command::READ, wire::command::CACHE] {
        let rig = Rig::new();
        let group = rig.registry.by_name("g").unwrap();
        let patience = Duration::from_secs(30);
        let (client, offer) = negotiate(rig.server.local_addr(), "g/v", [1; 16], patience).unwrap();
        let identity = Identity::parse(&offer.description).unwrap();
        assert_eq!(identity.group_id, group.id().to_string());
        let mut socket = UnixStream::from(client.into_socket().unwrap());
        socket.set_read_timeout(Some(patience)).unwrap();
        group.demote().unwrap();
        socket.write_all(wire::request(command, 0, 1, 0, 512).as_bytes()).unwrap();
        let mut said = Vec::new();
        let _ = socket.read_to_end(&mut said);
        assert_eq!(said, b"", "no reply");
    }
}

#[test]
fn a_host_that_connects_anew_ends_its_old_connection_and_no_other() {
    let rig = Rig::new();
    let patience = Duration::from_secs(30);
    let connect = |keeper| {
        let client = negotiate(rig.server.local_addr(), "g/v", keeper, patience).unwrap().0;
        UnixStream::from(client.into_socket().unwrap())
    };
    let (mut old, mut other) = (connect([1; 16]), connect([2; 16]));
    let mut new = connect([1; 16]);
    assert_eq!(old.read(&mut [0]).unwrap(), 0, "the old connection has ended");
    let request = wire::request(wire::command::READ, 0, 1, 0, 512);
    for socket in [&mut other, &mut new] {
        socket.write_all(request.as_bytes()).unwrap();
        let mut reply = [0; 16 + 512];
        socket.read_exact(&mut reply).unwrap();
    }
}

/// Eight such hosts of one group held all memory for large payloads, and those of others waited.
#[test]
fn hosts_of_a_full_log_hold_no_memory_that_hosts_of_another_group_need() {
    const LARGEST: u32 = wire::PAYLOAD_BYTES_MAX;
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::open(context(), &dir.path().join("groups")).unwrap();
    for group in ["g", "h"] {
        let group = registry.create(name(group), Some(1 << 20)).unwrap();
        group.start_workers();
        group.create_volume(name("v"), u64::from(LARGEST)).unwrap();
    }
    let group = registry.by_name("g").unwrap();
    let policy = PolicyRecord {
        log_limit: ByteSize(4 << 20),
        on_full: OnFull::Block,
        ..PolicyRecord::default()
    };
    group.append_control(Control::Policy(policy)).unwrap();
    // Room for one payload of the largest at a time.
    let limits = NbdLimits { payload_bytes: 0, ..NbdLimits::default() };
    let server = serve_with(&registry, dir.path(), limits, Arc::default());
    let at = server.local_addr().clone();
    Client::connect(&at, "g/v").unwrap().write(0, &vec![1; LARGEST as usize]).unwrap();
    let mut blocked = Client::connect(&at, "g/v").unwrap();
    let writer = std::thread::spawn(move || blocked.write(0, &vec![2; LARGEST as usize]));
    crate::support::pause(Duration::from_millis(500));
    let mut other = Client::connect(&at, "h/v").unwrap();
    let other = std::thread::spawn(move || other.write(0, &[3; 1 << 20]));
    for _ in (0..1000).take_while(|_| !other.is_finished()) {
        crate::support::pause(Duration::from_millis(10));
    }
    let (waits, written) = (!writer.is_finished(), other.is_finished());
    // Both come to an end.
    registry.close();
    assert!(writer.join().unwrap().is_err());
    let _ = other.join().unwrap();
    server.shutdown();
    assert!(waits, "its log is full");
    assert!(written, "it waited for the other group's log");
}

/// Each attempt of a program that writes with a timeout left a connection that waited for room.
#[test]
fn a_connection_that_waits_for_room_in_the_log_ends_with_its_client_or_for_a_new_one() {
    let rig = Rig::new();
    let group = rig.registry.by_name("g").unwrap();
    let policy = PolicyRecord {
        log_limit: ByteSize(4 << 20),
        on_full: OnFull::Block,
        ..PolicyRecord::default()
    };
    group.append_control(Control::Policy(policy)).unwrap();
    let patience = Duration::from_secs(30);
    let connect = |id| {
        let client = negotiate(rig.server.local_addr(), "g/v", [id; 16], patience).unwrap().0;
        UnixStream::from(client.into_socket().unwrap())
    };
    // Small writes, and one that does not fit into what is received at once.
    for length in [64 << 10, 3 << 20] {
        let write = |id| {
            let mut host = connect(id);
            host.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
            let request = wire::request(wire::command::WRITE, 0, 1, 0, length);
            let whole = [request.as_bytes(), &vec![1; length as usize]].concat();
            while host.write_all(&whole).is_ok() {}
            host
        };
        let mut old = write(1);
        let _new = connect(1);
        let mut rest = Vec::new();
        let _ = old.read_to_end(&mut rest);
        drop(write(2));
        crate::support::wait_for("the connection to end", || {
            (group.clients().iter().map(|(_, count)| count).sum::<usize>() <= 1).then_some(())
        });
    }
    rig.registry.close();
}

/// A peer that is away, and that hosts wait for.
fn join_required_peer(group: &Group) {
    let peer = MemberRecord {
        node: NodeId([9; 16]),
        name: name("b"),
        mode: Mode::Sync,
        on_loss: OnLoss::Block,
        rpo_target: None,
        removed: false,
        other: serde_json::Map::new(),
    };
    group.append_control(Control::Member(peer)).unwrap();
}

/// A kernel's connection was given up by its keeper after a time without an answer. The server
/// waited to answer on it, as long as the peer was away, before it took the next one: reads that
/// need no peer failed with it.
#[test]
fn connections_end_whose_answers_wait_for_a_peer_where_a_new_one_comes_or_a_rewind() {
    let rig = Rig::new();
    let group = rig.registry.by_name("g").unwrap();
    join_required_peer(&group);
    let before = group.positions().request_end;
    let patience = Duration::from_secs(30);
    let connect = || {
        let client = negotiate(rig.server.local_addr(), "g/v", [1; 16], patience).unwrap().0;
        UnixStream::from(client.into_socket().unwrap())
    };
    let write = |host: &mut UnixStream, block: u8| {
        let head = group.positions().head;
        let at = u64::from(block) * 512;
        let request = wire::request(wire::command::WRITE, 0, 1, at, 512);
        host.write_all(&[request.as_bytes(), &[block; 512]].concat()).unwrap();
        crate::support::wait_for("the write to be appended", || {
            (group.positions().head > head).then_some(())
        });
        assert!(!group.is_held(group.positions().request_end), "it waits for the peer");
    };
    let mut old = connect();
    write(&mut old, 1);
    let mut new = connect();
    assert_eq!(old.read(&mut [0]).unwrap(), 0, "no answer, and the end");
    let request = wire::request(wire::command::READ, 0, 2, 512, 512);
    new.write_all(request.as_bytes()).unwrap();
    let mut reply = [0; 16 + 512];
    new.read_exact(&mut reply).unwrap();
    assert_eq!(reply[16..], [1; 512], "what was received is carried out");
    write(&mut new, 2);
    group.rewind(&Point::Lsn(before), true).unwrap();
    assert_eq!(new.read(&mut [0]).unwrap(), 0, "no answer, and the end");
}

/// Each of an `attach`'s attempts, one every 20 s, left a connection in its handshake, until the
/// listener let nobody in, to other groups neither.
#[test]
fn a_handshake_waits_for_an_absent_peer_for_a_while_is_told_why_and_leaves_nothing_behind() {
    let rig = Rig::new();
    join_required_peer(&rig.registry.by_name("g").unwrap());
    rig.registry.create(name("h"), Some(4 << 20)).unwrap().start_workers();
    rig.registry.by_name("h").unwrap().create_volume(name("v"), SIZE).unwrap();
    rig.server.shutdown();
    rig.registry.close();
    let registry = Registry::open(context(), &rig.dir.path().join("groups")).unwrap();
    let counters = Arc::new(NbdCounters::default());
    let limits = NbdLimits { connections: 1, ..NbdLimits::default() };
    let server = serve_with(&registry, rig.dir.path(), limits, Arc::clone(&counters));
    let at = server.local_addr();
    let refused = negotiate(at, "g/v", [1; 16], Duration::from_secs(1)).err().unwrap().to_string();
    let told =
        refused.contains("export `g/v`") && refused.contains("that must hold what they write");
    assert!(told, "{refused}");
    crate::support::wait_for("the connection to end", || {
        (counters.connections.value() == 0).then_some(())
    });
    Client::connect(at, "h/v").unwrap().flush().unwrap();
    server.shutdown();
    registry.close();
}

/// Exports of which one is claimed for a restore right after a handshake has opened it.
struct ClaimedBehind {
    registry: Arc<Registry>,
    inner: GroupExports,
    claim: Mutex<Option<RestoreClaim>>,
}

impl Exports for ClaimedBehind {
    fn list(&self) -> Vec<ExportInfo> {
        self.inner.list()
    }

    fn open(&self, export: &str) -> Result<Arc<dyn Device>, Refusal> {
        // A handshake may ask more than once; what counts is the last time.
        let mut claim = self.claim.lock().unwrap();
        claim.take();
        let device = self.inner.open(export)?;
        let group = self.registry.by_name("g").unwrap();
        *claim = Some(group.claim_for_restore(device.volume()).unwrap());
        Ok(device)
    }
}

#[test]
fn a_host_that_a_restore_overtakes_in_its_handshake_is_disconnected_and_changes_nothing() {
    let rig = Rig::new();
    let at = NbdListen::new(NbdAddress::Unix(rig.dir.path().join("claimed")));
    let exports = Arc::new(ClaimedBehind {
        registry: Arc::clone(&rig.registry),
        inner: GroupExports::new(Arc::clone(&rig.registry)),
        claim: Mutex::new(None),
    });
    let server = listen(at, exports.clone(), NbdLimits::default(), Arc::default()).unwrap();
    let group = rig.registry.by_name("g").unwrap();
    let head = group.positions().head;
    let mut late = Client::connect(server.local_addr(), "g/v").unwrap();
    let ended = late.write(0, &[7; 4096]).and_then(|()| late.flush()).unwrap_err();
    assert!(matches!(ended, ClientError::Io { .. }), "{ended}");
    assert_eq!(group.positions().head, head, "it was written all the same");
    let refused = rig.refusal("g/v");
    assert!(refused.contains("a restore writes into it"), "{refused}");
    exports.claim.lock().unwrap().take();
    rig.client("g/v").flush().unwrap();
}

#[test]
fn what_was_flushed_is_there_after_a_restart() {
    let rig = Rig::new();
    let mut client = rig.client("g/v");
    client.write(4096, &[7; 8192]).unwrap();
    client.write_fua(512, &[8; 512]).unwrap();
    client.flush().unwrap();
    client.disconnect().unwrap();
    let Rig { server, registry, dir } = rig;
    server.shutdown();
    registry.close();
    drop(registry);
    let registry = Registry::open(context(), &dir.path().join("groups")).unwrap();
    registry.by_name("g").unwrap().start_workers();
    let server = serve(&registry, dir.path());
    let mut client = Client::connect(server.local_addr(), "g/v").unwrap();
    let mut back = [0; 12288];
    client.read(0, &mut back).unwrap();
    assert_eq!(back[512..1024], [8; 512]);
    assert_eq!(back[4096..], [7; 8192]);
}
