//! Feeds the cores of all peers, one input at a time, and carries out what they say.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc;

use crate::events::Severity;
use crate::group::Discard;
use crate::units::{GroupId, NodeId};

use super::bounds::Room;
use super::bulk::Bulk;
use super::channel::Parted;
use super::core::{Input, Output, PeerCore};
use super::link;
use super::service::{Queued, ReplicationError, Shared, locked};
use super::wire::Message;
use super::worker::{Job, Worker};

impl Shared {
    /// Does what a core says. What it has a group's thread do keeps the room of the message that it
    /// comes from. Bytes of a log and parts of an image do not: the core holds a peer to a window
    /// of each. Behind a thread that is busy for long they would take all of the room, and with it
    /// that of the heartbeats, for every group.
    fn perform(self: &Arc<Self>, peer: NodeId, output: Output, room: Option<Room>) {
        let output = match Job::of(peer, output) {
            Ok((group, job)) => {
                let room = room.filter(|_| !matches!(job, Job::Append { .. } | Job::Stage { .. }));
                return self.add_job(peer, group, job, room);
            }
            Err(output) => output,
        };
        match output {
            Output::Dial => {
                tokio::spawn(link::dial(Arc::clone(self), peer));
            }
            Output::Close { conn, reason } => {
                if let Some(conn) = self.conn(conn) {
                    conn.close(reason);
                }
            }
            Output::Send { conn, mut message } => {
                if let Message::Heartbeat { wall, .. } = &mut message {
                    *wall = self.wall().0;
                }
                if let Some(conn) = self.conn(conn) {
                    conn.send(&message);
                }
            }
            Output::SendLog { conn, group, stream, from, to } => {
                if let Some(conn) = self.conn(conn) {
                    conn.send_bulk(group, stream, Bulk::Log { from, to });
                }
            }
            Output::SendPart { conn, group, stream, peer, number } => {
                if let Some(conn) = self.conn(conn) {
                    conn.send_bulk(group, stream, Bulk::Part { peer, number });
                }
            }
            Output::FollowChanged { group } => {
                self.heads_due.notify_one();
                self.group_changed(group);
            }
            // At once, in the order of the peer's words, and before any cut that comes later.
            Output::PeerHolds { group, received, durable } => {
                if let Some(group) = self.groups.by_id(group) {
                    group.note_peer_holds(peer, received, durable);
                }
            }
            Output::PeerLost { group, reason, received, durable } => {
                if let Some(group) = self.groups.by_id(group) {
                    group.note_peer_lost(peer, &reason, received, durable);
                }
            }
            Output::Event { severity, code, group, text } => {
                let group = group.as_ref().map(|name| name.as_str());
                self.context.events.emit(severity, code, group, text, Value::Null);
            }
            touching => unreachable!("{touching:?} touches a log"),
        }
    }

    fn add_job(self: &Arc<Self>, peer: NodeId, group: GroupId, job: Job, room: Option<Room>) {
        let mut workers = locked(&self.workers);
        if let std::collections::hash_map::Entry::Vacant(vacant) = workers.entry(group) {
            let Some(replica) = self.groups.by_id(group) else { return };
            let inputs = self.inputs.clone();
            let (shared, yielding) = (Arc::downgrade(self), Arc::clone(&replica));
            let yield_to = move |peer, at, chain| {
                let gone = || ReplicationError::Refused("this node shuts down".to_owned());
                let shared = shared.upgrade().ok_or_else(gone)?;
                shared.yield_to(&*yielding, peer, Parted { at, chain }, Discard::Received)
            };
            let report = move |peer, input| {
                let _ = inputs.send(Queued { peer, input, room: None });
            };
            match Worker::start(replica, yield_to, report) {
                Ok(worker) => {
                    vacant.insert(worker);
                }
                Err(error) => {
                    let text = format!("peer {peer}: no thread for its group: {error}");
                    let code = "replication-thread";
                    self.context.events.emit(Severity::Error, code, None, text, Value::Null);
                    return;
                }
            }
        }
        if workers.get(&group).is_some_and(|worker| !worker.add(job, room)) {
            workers.remove(&group);
        }
    }
}

/// Feeds the cores until the service ends.
pub(super) async fn drive(shared: Arc<Shared>, mut queue: mpsc::UnboundedReceiver<Queued>) {
    let mut shutdown = shared.shutdown_signal();
    let mut outputs: Vec<(NodeId, Output)> = Vec::new();
    let mut rooms: Vec<(usize, Room)> = Vec::new();
    loop {
        let now = shared.now();
        let next = locked(&shared.cores).values().filter_map(PeerCore::next_wake).min();
        let wait = next.map_or(Duration::from_secs(3600), |next| next.saturating_sub(now));
        let received = tokio::select! {
            received = queue.recv() => received,
            () = shared.wake.notified() => None,
            () = tokio::time::sleep(wait) => None,
            _ = shutdown.wait_for(|ending| *ending) => break,
        };
        {
            let now = shared.now();
            let mut cores = locked(&shared.cores);
            let mut received = received;
            // A bounded batch, so that timers are looked at in between.
            for _ in 0..256 {
                let Some(Queued { peer, input, room }) =
                    received.take().or_else(|| queue.try_recv().ok())
                else {
                    break;
                };
                if let Some(core) = cores.get_mut(&peer) {
                    let mut of_core = Vec::new();
                    core.handle(now, input, &mut of_core);
                    outputs.extend(of_core.into_iter().map(|output| (peer, output)));
                    rooms.extend(room.map(|room| (outputs.len(), room)));
                }
            }
            for (peer, core) in cores.iter_mut() {
                if core.next_wake().is_some_and(|wake| wake <= now) {
                    let mut of_core = Vec::new();
                    core.handle(now, Input::Tick, &mut of_core);
                    outputs.extend(of_core.into_iter().map(|output| (*peer, output)));
                }
            }
        }
        shared.look_at_groups(&mut outputs);
        // Each room belongs to the outputs before its number, from the one before it on.
        let mut rooms = rooms.drain(..).peekable();
        for (number, (peer, output)) in outputs.drain(..).enumerate() {
            while rooms.next_if(|(end, _)| *end <= number).is_some() {}
            let room = rooms.peek().map(|(_, room)| Arc::clone(room));
            shared.perform(peer, output, room);
        }
    }
    for conn in locked(&shared.conns).values() {
        conn.close("this node shuts down".to_owned());
    }
    locked(&shared.workers).clear();
}

#[cfg(test)]
pub(super) mod tests {
    use std::io;
    use std::path::Path;
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
    use std::sync::{Condvar, Mutex};
    use std::task::{Context, Poll, Waker};

    use bytes::Bytes;

    use super::*;
    use crate::events::Events;
    use crate::group::{DataState, Group, GroupContext, LocalLimits, NodeIdentity, Registry};
    use crate::io::{Disk, DiskFile, Env, ManualClock, MemoryDisk, OpenMode, SeededEntropy, Space};
    use crate::log::control::{Control, MemberRecord, Mode, OnLoss};
    use crate::replication::asked::tests::{PEER, is_asked_for, node_with_peer};
    use crate::replication::bounds::{ROOM_BYTES, room_for};
    use crate::replication::core::Settings;
    use crate::replication::service::{Replication, ReplicationConfig};
    use crate::replication::wire::PAYLOAD_BYTES_MAX;
    use crate::units::{LogTime, Lsn, Name};

    /// A disk where, once it is told to, nothing gets a new name before it is let go.
    struct StuckDisk {
        disk: MemoryDisk,
        stuck: Mutex<bool>,
        let_go: Condvar,
        reached: SyncSender<()>,
    }

    impl StuckDisk {
        fn new() -> (Arc<StuckDisk>, Receiver<()>) {
            let (reached, seen) = sync_channel(64);
            let (disk, stuck, let_go) = (MemoryDisk::new(), Mutex::default(), Condvar::new());
            (Arc::new(StuckDisk { disk, stuck, let_go, reached }), seen)
        }

        fn set_stuck(&self, stuck: bool) {
            *self.stuck.lock().unwrap() = stuck;
            self.let_go.notify_all();
        }
    }

    impl Disk for StuckDisk {
        fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
            self.disk.open(path, mode)
        }
        fn create_dir(&self, path: &Path) -> io::Result<()> {
            self.disk.create_dir(path)
        }
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            let mut stuck = self.stuck.lock().unwrap();
            if *stuck {
                let _ = self.reached.try_send(());
            }
            while *stuck {
                stuck = self.let_go.wait(stuck).unwrap();
            }
            drop(stuck);
            self.disk.rename(from, to)
        }
        fn remove(&self, path: &Path) -> io::Result<()> {
            self.disk.remove(path)
        }
        fn remove_dir(&self, path: &Path) -> io::Result<()> {
            self.disk.remove_dir(path)
        }
        fn list(&self, path: &Path) -> io::Result<Vec<String>> {
            self.disk.list(path)
        }
        fn exists(&self, path: &Path) -> io::Result<bool> {
            self.disk.exists(path)
        }
        fn sync_dir(&self, path: &Path) -> io::Result<()> {
            self.disk.sync_dir(path)
        }
        fn allocated(&self, path: &Path) -> u64 {
            self.disk.allocated(path)
        }

        fn space(&self, path: &Path) -> io::Result<Space> {
            self.disk.space(path)
        }
    }

    /// A node without peers, with one group.
    pub(in crate::replication) struct Node {
        pub replication: Arc<Replication>,
        pub registry: Arc<Registry>,
        _dir: tempfile::TempDir,
    }

    impl Node {
        pub(in crate::replication) fn stop(&self) {
            self.replication.shutdown();
            self.registry.close();
        }
    }

    pub(in crate::replication) fn node_on(disk: Arc<dyn Disk>) -> (Node, Arc<Group>) {
        let clock = Arc::new(ManualClock::new(LogTime(1_700_000_000_000_000_000)));
        let context = GroupContext {
            env: Env { disk, clock, entropy: Arc::new(SeededEntropy::new(1)) },
            node: NodeIdentity { id: NodeId([1; 16]), name: "a".parse().unwrap() },
            limits: LocalLimits::default(),
            failures: None,
            events: Events::in_memory(),
        };
        let registry = Registry::open(context.clone(), Path::new("/groups")).unwrap();
        let group = registry.create("g".parse().unwrap(), Some(1 << 20)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let config = ReplicationConfig {
            listen: None,
            advertise: None,
            state_dir: dir.path().to_owned(),
            heartbeat: Duration::from_secs(1),
            lost_after: Duration::from_secs(5),
        };
        let replication = Replication::start(config, context, registry.clone()).unwrap();
        (Node { replication, registry, _dir: dir }, group)
    }

    pub(in crate::replication) fn member(node: NodeId, name: &str, mode: Mode) -> Control {
        Control::Member(MemberRecord {
            node,
            name: name.parse().unwrap(),
            mode,
            on_loss: OnLoss::Block,
            rpo_target: None,
            removed: false,
            other: serde_json::Map::new(),
        })
    }

    #[tokio::test]
    async fn what_a_required_peer_holds_waits_for_no_image_of_another() {
        let (disk, reached) = StuckDisk::new();
        let (node, group) = node_on(disk.clone());
        let (waited_for, behind) = (NodeId([2; 16]), NodeId([3; 16]));
        group.append_control(member(waited_for, "b", Mode::Sync)).unwrap();
        group.append_control(member(behind, "c", Mode::Async)).unwrap();
        let shared = &node.replication.shared;
        let head = group.positions().head;
        let (sender, answered) = sync_channel(1);
        group.sync_now().unwrap();
        group.when_durable(head, Box::new(move |done| sender.send(done).unwrap()));
        let wait = Duration::from_secs(60);
        // The image for the one that is behind does not get ready.
        disk.set_stuck(true);
        let peer: Name = "c".parse().unwrap();
        let (id, common, staged) = (group.id(), Lsn::ZERO, None);
        let ship = Output::Ship { group: id, stream: 1, peer, since: None, common, staged };
        shared.perform(behind, ship, None);
        reached.recv_timeout(wait).unwrap();
        let holds = Output::PeerHolds { group: id, received: head, durable: head };
        shared.perform(waited_for, holds, None);
        answered.recv_timeout(wait).expect("a host waits for the image").unwrap();
        // A loss is told as soon, and in the order of what was heard.
        let lost = Output::PeerLost {
            group: id,
            reason: "gone".to_owned(),
            received: Lsn::ZERO,
            durable: Lsn::ZERO,
        };
        shared.perform(waited_for, lost, None);
        let away = group.required_peers()[0].1.away.clone();
        assert_eq!(away.map(|(reason, _)| reason), Some("gone".to_owned()));
        disk.set_stuck(false);
        node.stop();
    }

    /// A kill before the mark is durable would leave a copy that is neither retired nor asked for,
    /// and a late word would undo an ask that came after it.
    #[tokio::test]
    async fn who_asked_for_a_copy_stays_known_when_it_is_retired() {
        let (node, group) = node_with_peer();
        let (shared, id) = (&node.replication.shared, group.id());
        group.demote().unwrap();
        shared.ask_for(PEER, id).unwrap();
        shared.perform(PEER, Output::Retire { group: id, retired: true }, None);
        for _ in 0..12_000 {
            if group.data_state().0 == DataState::Retired {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(group.data_state().0, DataState::Retired);
        assert!(is_asked_for(&node, &group));
        node.stop();
    }

    #[tokio::test]
    async fn what_waits_for_a_busy_group_leaves_a_peer_room_for_its_heartbeats() {
        let (disk, reached) = StuckDisk::new();
        let (node, group) = node_on(disk.clone());
        let (shared, peer, id) = (&node.replication.shared, NodeId([2; 16]), group.id());
        // The thread of the group is held up.
        disk.set_stuck(true);
        let name: Name = "c".parse().unwrap();
        let (common, staged) = (Lsn::ZERO, None);
        let ship = Output::Ship { group: id, stream: 1, peer: name, since: None, common, staged };
        shared.perform(NodeId([3; 16]), ship, None);
        reached.recv_timeout(Duration::from_secs(60)).unwrap();
        // As much as the core lets in of each.
        let bytes_max = PAYLOAD_BYTES_MAX;
        let bytes = Bytes::from(vec![0; bytes_max]);
        let window = Settings::default().window_bytes as usize;
        let mut context = Context::from_waker(Waker::noop());
        for number in 0..window / bytes_max {
            let (stream, bytes, position) = (2, bytes.clone(), Lsn(number as u64));
            for output in [
                Output::Stage { group: id, stream, bytes: bytes.clone() },
                Output::Append { group: id, stream, position, bytes },
            ] {
                let own = shared.room_of(peer);
                let mut room =
                    std::pin::pin!(tokio::task::unconstrained(room_for(&own, bytes_max)));
                let Poll::Ready(room) = room.as_mut().poll(&mut context) else {
                    panic!("{number}: the link is not read")
                };
                shared.perform(peer, output, room);
            }
        }
        assert_eq!(shared.room_of(peer).available_permits(), ROOM_BYTES);
        // What has no bound of its own keeps its room.
        let room = room_for(&shared.room_of(peer), 1).await;
        shared.perform(peer, Output::DropStaging { group: id }, room);
        assert!(shared.room_of(peer).available_permits() < ROOM_BYTES);
        disk.set_stuck(false);
        node.stop();
    }
}
