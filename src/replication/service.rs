//! The replication service of a node: it owns the peers, their cores and connections, and carries
//! out what the cores decide.
//!
//! One task ([`drive`]) feeds all cores, one input at a time; it does no I/O itself. Messages and
//! frames are queued to the connections' writers, what touches a log to the group's [`Worker`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};

use crate::group::{Group, GroupContext, GroupError, Role};
use crate::units::{GroupId, Incarnation, LogTime, Name, NodeId};

use super::asked::Notes;
use super::bounds::{ROOM_BYTES, Room};
use super::check::{self, Pass};
use super::copy::{self, Reports};
use super::core::{ConnId, Input, Membership, Output, PeerCore, Settings};
use super::damage::{self, Ledgers};
use super::drive;
use super::heads::{self, Heads, Look, Recalled};
use super::link::{self, Conn};
use super::pairing::{Fingerprint, Invites};
use super::peers::{Peer, PeerStore, StoreError};
use super::replica::{Replica, Replicas, local_group, membership_of};
use super::resolve::given_up_of;
use super::rpc::Handler;
use super::tls::Identity;
use super::wire::{Hello, Message, Purpose, VERSIONS, Verdict};
use super::worker::Worker;

/// What the service needs of the node's configuration.
#[derive(Clone, Debug)]
pub struct ReplicationConfig {
    /// Where peers connect; none where only this node dials.
    pub listen: Option<SocketAddr>,
    /// What peers dial, `HOST:PORT`; the listener's own address where none is given and it is no
    /// wildcard.
    pub advertise: Option<String>,
    /// Directory of the key and the list of peers: `data_dir/node`.
    pub state_dir: PathBuf,
    /// Time between heartbeats.
    pub heartbeat: Duration,
    /// Silence after which a peer is lost.
    pub lost_after: Duration,
}

/// What failed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each message says it")]
pub enum ReplicationError {
    #[error("peer {0}: is not known here; `tidelog peer list` shows those that are")]
    NoPeer(String),
    #[error("peer {name}: is not connected: {reason}; `tidelog peer list` shows the link")]
    NotConnected { name: String, reason: String },
    #[error("peer {name}: {what}")]
    Peer { name: String, what: String },
    #[error("peer {name}: {what}")]
    Declined { name: String, what: String },
    #[error("peer {name}: did not answer {method} within {seconds:.1} s")]
    NoAnswer { name: String, method: String, seconds: f64 },
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error("peer listener {address}: {cause}; choose another `listen` under [peer]")]
    Listen { address: SocketAddr, cause: std::io::Error },
}

/// What came of a call.
pub(super) enum Answered {
    /// Its answer.
    Well(Vec<u8>),
    /// It failed, and may have done something.
    Failed(String),
    /// It was not begun.
    Declined(String),
}

/// Calls that wait for their answer, by connection and number.
type PendingCalls = HashMap<(ConnId, u64), oneshot::Sender<Answered>>;

/// What all tasks of the service share.
pub struct Shared {
    pub(super) config: ReplicationConfig,
    pub(super) context: GroupContext,
    pub(super) groups: Arc<dyn Replicas>,
    pub(super) store: Mutex<PeerStore>,
    pub(super) invites: Mutex<Invites>,
    pub(super) cores: Mutex<BTreeMap<NodeId, PeerCore>>,
    pub(super) checks: Mutex<HashMap<GroupId, Pass>>,
    pub(super) ledgers: Mutex<Ledgers>,
    pub(super) heads: Mutex<Heads>,
    /// Of those, what no channel was told yet. Locked after the cores.
    pub(super) recalled: Mutex<Recalled>,
    /// A copy began or ceased to follow.
    pub(super) heads_due: Notify,
    /// Scrubs that run, and what stops each.
    pub(super) scrubs: Mutex<HashMap<GroupId, watch::Sender<bool>>>,
    pub(super) copies: Mutex<Reports>,
    pub(super) notes: Notes,
    /// Peers that are being asked about their copies.
    pub(super) asking: Mutex<HashSet<NodeId>>,
    pub(super) handlers: RwLock<HashMap<String, Handler>>,
    pub(super) pending: Mutex<PendingCalls>,
    pub(super) advertised: Option<String>,
    pub(super) local_addr: Option<SocketAddr>,
    identity: RwLock<Arc<Identity>>,
    /// Held while this node's key changes.
    pub(super) rotating: tokio::sync::Mutex<()>,
    incarnation: Incarnation,
    pub(super) inputs: mpsc::UnboundedSender<Queued>,
    /// What each peer's frames may take until they are handled.
    rooms: Mutex<HashMap<NodeId, Arc<Semaphore>>>,
    dirty: Mutex<HashSet<GroupId>>,
    all_dirty: Mutex<bool>,
    pub(super) wake: Notify,
    pub(super) conns: Mutex<HashMap<ConnId, Arc<Conn>>>,
    pub(super) workers: Mutex<HashMap<GroupId, Worker>>,
    watched: Mutex<HashSet<GroupId>>,
    next_number: AtomicU64,
    shutdown: watch::Sender<bool>,
}

/// An input for a peer's core, with the room that it takes up.
pub(super) struct Queued {
    pub(super) peer: NodeId,
    pub(super) input: Input,
    pub(super) room: Option<Room>,
}

/// The replication service of a node. Dropping it ends its tasks.
pub struct Replication {
    pub(super) shared: Arc<Shared>,
}

impl Drop for Replication {
    fn drop(&mut self) {
        self.shared.shutdown.send_replace(true);
    }
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no holder panics")
}

impl Replication {
    /// Starts the service on the tokio runtime that calls this.
    ///
    /// # Errors
    ///
    /// Where the listener cannot be opened, or key or peers cannot be read.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn start(
        config: ReplicationConfig,
        context: GroupContext,
        groups: Arc<dyn Replicas>,
    ) -> Result<Arc<Replication>, ReplicationError> {
        let store = PeerStore::open(&config.state_dir)?;
        let identity = Identity::from_key(&store.key()?).map_err(ReplicationError::Refused)?;
        let listener = config.listen.map(bind).transpose()?;
        let local_addr = listener.as_ref().and_then(|listener| listener.local_addr().ok());
        let advertised = config.advertise.clone().or_else(|| {
            local_addr.filter(|addr| !addr.ip().is_unspecified()).map(|addr| addr.to_string())
        });
        let (inputs, input_queue) = mpsc::unbounded_channel();
        let (shutdown, _) = watch::channel(false);
        let incarnation = Incarnation(context.env.entropy.next_u64());
        let (heads, recalled) = heads::load(&config.state_dir);
        let shared = Arc::new(Shared {
            store: Mutex::new(store),
            invites: Mutex::new(Invites::default()),
            cores: Mutex::new(BTreeMap::new()),
            checks: Mutex::default(),
            ledgers: Mutex::new(damage::load(&config.state_dir)),
            heads: Mutex::new(heads),
            recalled: Mutex::new(recalled),
            heads_due: Notify::new(),
            scrubs: Mutex::default(),
            copies: Mutex::default(),
            notes: Notes::default(),
            asking: Mutex::default(),
            handlers: RwLock::new(HashMap::new()),
            pending: Mutex::new(HashMap::new()),
            advertised,
            local_addr,
            identity: RwLock::new(Arc::new(identity)),
            rotating: tokio::sync::Mutex::default(),
            incarnation,
            inputs,
            rooms: Mutex::default(),
            dirty: Mutex::new(HashSet::new()),
            all_dirty: Mutex::new(true),
            wake: Notify::new(),
            conns: Mutex::new(HashMap::new()),
            workers: Mutex::new(HashMap::new()),
            watched: Mutex::new(HashSet::new()),
            next_number: AtomicU64::new(1),
            shutdown,
            config,
            context,
            groups,
        });
        let replication = Arc::new(Replication { shared: Arc::clone(&shared) });
        replication.install_handlers();
        let weak = Arc::downgrade(&shared);
        shared.groups.subscribe(Box::new(move || {
            weak.upgrade().is_some_and(|shared| shared.groups_changed())
        }));
        let peers = locked(&shared.store).all().to_vec();
        for peer in &peers {
            shared.add_core(peer);
        }
        tokio::spawn(drive::drive(Arc::clone(&shared), input_queue));
        if let Some(listener) = listener {
            tokio::spawn(link::listen(Arc::clone(&shared), listener));
        }
        tokio::spawn(check::run(Arc::clone(&shared)));
        tokio::spawn(copy::run(Arc::clone(&shared)));
        tokio::spawn(heads::run(Arc::clone(&shared)));
        Ok(replication)
    }

    /// Where the listener listens.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.shared.local_addr
    }

    /// Ends all links and tasks.
    pub fn shutdown(&self) {
        self.shared.keep_heads(Look::Last);
        self.shared.shutdown.send_replace(true);
    }

    /// Ends them from a task that goes on: a disk that does not answer is waited for so long at
    /// most.
    pub async fn stop_within(&self, at_most: Duration) {
        let shared = Arc::clone(&self.shared);
        let kept = tokio::task::spawn_blocking(move || shared.keep_heads(Look::Last));
        if tokio::time::timeout(at_most, kept).await.is_err() {
            tracing::error!(
                "{}: how far primaries were was not written within {} s; a restart knows what was \
                 written before",
                self.shared.config.state_dir.display(),
                at_most.as_secs()
            );
        }
        self.shared.shutdown.send_replace(true);
    }
}

fn bind(address: SocketAddr) -> Result<TcpListener, ReplicationError> {
    let failed = |cause| ReplicationError::Listen { address, cause };
    let listener = std::net::TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    TcpListener::from_std(listener).map_err(failed)
}

impl Shared {
    pub(super) fn me(&self) -> NodeId {
        self.context.node.id
    }

    pub(super) fn now(&self) -> Duration {
        self.context.env.clock.monotonic()
    }

    pub(super) fn wall(&self) -> LogTime {
        self.context.env.clock.wall()
    }

    pub(super) fn identity(&self) -> Arc<Identity> {
        Arc::clone(&self.identity.read().expect("no holder panics"))
    }

    /// Uses another key from now on, and ends what shows the one before: a peer knows that one only
    /// until it has seen the new one.
    pub(super) fn set_identity(&self, identity: Identity) {
        *self.identity.write().expect("no holder panics") = Arc::new(identity);
        for conn in locked(&self.conns).values() {
            conn.close_for_new_key();
        }
    }

    /// A peer that shows the newest key that is known of it has no other any more.
    pub(super) fn settle_key(&self, node: NodeId, key: Fingerprint) {
        let settle = |peer: &mut Peer| {
            if peer.fingerprints.first() == Some(&key) {
                peer.fingerprints.truncate(1);
            }
        };
        if let Err(error) = locked(&self.store).change(node, settle) {
            tracing::error!("{error}");
        }
    }

    pub(super) fn hello(
        &self,
        purpose: Purpose,
        verdict: Verdict,
        wanted: Option<NodeId>,
    ) -> Hello {
        Hello {
            version_min: *VERSIONS.start(),
            version_max: *VERSIONS.end(),
            purpose,
            verdict,
            node: self.me(),
            incarnation: self.incarnation,
            wanted,
            features: 0,
        }
    }

    pub(super) fn welcome(&self) -> Message {
        Message::Welcome {
            name: self.context.node.name.to_string(),
            address: self.advertised.clone().unwrap_or_default(),
            program: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    pub(super) fn peer(&self, node: NodeId) -> Option<Peer> {
        locked(&self.store).by_node(node).cloned()
    }

    pub(super) fn peer_named(&self, name: &str) -> Result<Peer, ReplicationError> {
        let found = locked(&self.store).by_name(name).cloned();
        found.ok_or_else(|| ReplicationError::NoPeer(name.to_owned()))
    }

    pub(super) fn peer_by_fingerprint(&self, fingerprint: &Fingerprint) -> Option<Peer> {
        locked(&self.store).by_fingerprint(fingerprint).cloned()
    }

    pub(super) fn replica(&self, group: GroupId) -> Option<Arc<dyn Replica>> {
        self.groups.by_id(group)
    }

    /// A group as the engine has it, by name.
    pub(super) fn engine(&self, name: &str) -> Result<Arc<Group>, ReplicationError> {
        let id = self.groups.by_name(name)?.id();
        let gone = || ReplicationError::Refused(format!("group {name}: is being deleted"));
        self.groups.engine(id).ok_or_else(gone)
    }

    /// What a group is to a peer, by its records and by what the peer asked for.
    pub(super) fn membership(&self, group: &dyn Replica, peer: NodeId) -> Membership {
        let asked_for = self.peer(peer).is_some_and(|peer| peer.copies.contains(&group.id()));
        let primary = group.role() == Role::Primary;
        membership_of(&group.control(), self.me(), peer, primary, asked_for)
    }

    pub(super) fn shutdown_signal(&self) -> watch::Receiver<bool> {
        self.shutdown.subscribe()
    }

    pub(super) fn next_number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn next_conn(&self) -> ConnId {
        ConnId(self.next_number())
    }

    /// Hands an input to a peer's core.
    pub(super) fn input(&self, peer: NodeId, input: Input) {
        // Fails when the service has ended.
        let _ = self.inputs.send(Queued { peer, input, room: None });
    }

    /// The same for what the peer itself sent, which takes room until it is handled.
    pub(super) fn input_of_peer(&self, peer: NodeId, input: Input, room: Room) {
        let _ = self.inputs.send(Queued { peer, input, room: Some(room) });
    }

    /// What a peer's frames may take, on all its connections.
    pub(super) fn room_of(&self, peer: NodeId) -> Arc<Semaphore> {
        let mut rooms = locked(&self.rooms);
        let room = rooms.entry(peer).or_insert_with(|| Arc::new(Semaphore::new(ROOM_BYTES)));
        Arc::clone(room)
    }

    pub(super) fn add_conn(&self, conn: ConnId, handle: Arc<Conn>) {
        locked(&self.conns).insert(conn, handle);
    }

    pub(super) fn remove_conn(&self, conn: ConnId) {
        if let Some(conn) = locked(&self.conns).remove(&conn) {
            self.forget_copy_reports(conn.peer);
        }
        // Dropping the senders tells those who wait for an answer.
        locked(&self.pending).retain(|(waiting, _), _| *waiting != conn);
    }

    pub(super) fn conn(&self, conn: ConnId) -> Option<Arc<Conn>> {
        locked(&self.conns).get(&conn).cloned()
    }

    /// Adds the core of a peer, or renews what it knows.
    pub(super) fn add_core(&self, peer: &Peer) {
        {
            let mut cores = locked(&self.cores);
            cores.entry(peer.node).or_insert_with(|| {
                let settings = Settings {
                    heartbeat: self.config.heartbeat,
                    lost_after: self.config.lost_after,
                    ..Settings::default()
                };
                PeerCore::new(self.now(), self.me(), peer.node, peer.name.clone(), settings)
            });
        }
        self.input(peer.node, Input::CanDial(peer.address.is_some()));
        self.groups_changed();
    }

    pub(super) fn is_connected(&self, node: NodeId) -> bool {
        locked(&self.cores).get(&node).is_some_and(|core| core.conn().is_some())
    }

    pub(super) fn has_core(&self, node: NodeId) -> bool {
        locked(&self.cores).contains_key(&node)
    }

    pub(super) fn remove_core(&self, node: NodeId) {
        locked(&self.rooms).remove(&node);
        let core = locked(&self.cores).remove(&node);
        let reason = "the peer was removed here".to_owned();
        if let Some(conn) = core.and_then(|core| core.conn()).and_then(|conn| self.conn(conn)) {
            conn.close(reason);
        }
    }

    /// Has all groups looked at again. False when the service has ended.
    pub(super) fn groups_changed(&self) -> bool {
        *locked(&self.all_dirty) = true;
        self.wake.notify_one();
        !*self.shutdown.borrow()
    }

    pub(super) fn group_changed(&self, group: GroupId) -> bool {
        locked(&self.dirty).insert(group);
        self.wake.notify_one();
        !*self.shutdown.borrow()
    }

    /// A peer said who it is: keep its address.
    pub(super) fn on_welcome(&self, node: NodeId, name: &str, address: &str, program: &str) {
        tracing::debug!(name, address, program, "peer says welcome");
        if address.is_empty() {
            return;
        }
        let changed = locked(&self.store)
            .change(node, |peer| peer.address = Some(address.to_owned()))
            .is_ok();
        if changed {
            self.input(node, Input::CanDial(true));
        }
    }

    /// Tells every core what the groups are now, for those that changed.
    pub(super) fn look_at_groups(self: &Arc<Self>, outputs: &mut Vec<(NodeId, Output)>) {
        let all = std::mem::take(&mut *locked(&self.all_dirty));
        let dirty = std::mem::take(&mut *locked(&self.dirty));
        let (now, mut known, mut gone) = (self.now(), Vec::new(), HashSet::new());
        let groups: Vec<Arc<dyn Replica>> = if all {
            let groups = self.groups.groups();
            gone = self.watch(&groups, now);
            groups
        } else {
            dirty.iter().filter_map(|group| self.groups.by_id(*group)).collect()
        };
        if !all && groups.is_empty() {
            return;
        }
        let peers = locked(&self.store).all().to_vec();
        let mut cores = locked(&self.cores);
        // By whose stream each group follows; of several the first.
        let mut followed: Vec<(Name, GroupId)> = Vec::new();
        for core in cores.values() {
            let channels = core.groups().filter_map(|group| Some((group, core.channel(group)?)));
            let of_core = channels.filter(|(_, channel)| channel.follows());
            followed.extend(of_core.map(|(group, _)| (core.name().clone(), group)));
        }
        followed.sort();
        let given_up = given_up_of(&groups, &cores);
        for peer in &peers {
            let Some(core) = cores.get_mut(&peer.node) else { continue };
            let mut of_core = Vec::new();
            for group in &groups {
                let mut local =
                    local_group(&**group, self.me(), peer.node, peer.copies.contains(&group.id()));
                let other = |(name, id): &&(Name, GroupId)| *id == local.id && *name != peer.name;
                local.follows = followed.iter().find(other).map(|(name, _)| name.clone());
                local.given_up = given_up.get(&local.id).cloned().unwrap_or_default();
                let member = matches!(local.membership, Membership::Member { .. });
                // Where it may be about to cut its log, that may soon say otherwise.
                let parted = core.channel(local.id).is_some_and(|it| it.parted().is_some());
                if self.may_unask(&**group, peer, member && !parted, local.cuts) {
                    known.push((peer.node, group.id(), local.cuts));
                }
                core.handle(now, Input::Group(Box::new(local)), &mut of_core);
                let heard = locked(&self.recalled).remove(&(group.id(), peer.node));
                if let Some(heard) = heard {
                    let (group, newest) = (group.id(), group.positions().time);
                    core.handle(now, Input::Recall { group, heard, newest }, &mut of_core);
                }
                if all && peer.paused.contains(&group.id()) {
                    let input = Input::Pause { group: group.id(), paused: true };
                    core.handle(now, input, &mut of_core);
                }
            }
            if all {
                let here: HashSet<GroupId> = groups.iter().map(|group| group.id()).collect();
                for gone in core.groups().filter(|group| !here.contains(group)).collect::<Vec<_>>()
                {
                    core.handle(now, Input::GroupGone(gone), &mut of_core);
                }
            }
            outputs.extend(of_core.into_iter().map(|output| (peer.node, output)));
        }
        drop(cores);
        if !known.is_empty() {
            // Their logs say it themselves now.
            let shared = Arc::clone(self);
            tokio::task::spawn_blocking(move || shared.unask_known(known));
        }
        self.forget_ledgers(&gone);
    }

    /// Hears of what changes in the groups; those that are gone, and those that begin as nothing.
    fn watch(self: &Arc<Self>, groups: &[Arc<dyn Replica>], now: Duration) -> HashSet<GroupId> {
        let mut watched = locked(&self.watched);
        let gone = watched.extract_if(|id| groups.iter().all(|it| it.id() != *id));
        let mut gone: HashSet<GroupId> = gone.collect();
        for group in groups {
            let id = group.id();
            if watched.insert(id) {
                gone.extend((group.positions().head.0 == 0).then_some(id));
                let weak = Arc::downgrade(self);
                group.subscribe(Box::new(move || {
                    weak.upgrade().is_some_and(|shared| shared.group_changed(id))
                }));
            }
        }
        let mut checks = locked(&self.checks);
        for group in &gone {
            locked(&self.workers).remove(group);
            checks.remove(group);
        }
        for group in groups {
            checks.entry(group.id()).or_insert_with(|| Pass::begin(now));
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::MemoryDisk;
    use crate::replication::drive::tests::node_on;

    #[tokio::test]
    async fn a_disk_that_does_not_answer_keeps_no_node_from_closing_its_groups() {
        let (node, group) = node_on(Arc::new(MemoryDisk::new()));
        let shared = Arc::clone(&node.replication.shared);
        // As a write of the file that never ends.
        let (let_go, waits) = std::sync::mpsc::channel::<()>();
        let (reached, hangs) = std::sync::mpsc::channel();
        let hung = Arc::clone(&shared);
        let writing = std::thread::spawn(move || {
            let _held = hung.heads.lock().unwrap();
            reached.send(()).unwrap();
            let _ = waits.recv();
        });
        hangs.recv().unwrap();
        let stopping = node.replication.stop_within(Duration::from_millis(20));
        tokio::time::timeout(Duration::from_secs(60), stopping).await.expect("it waits for it");
        assert!(*shared.shutdown_signal().borrow(), "links end");
        drop(let_go);
        writing.join().unwrap();
        node.stop();
        drop(group);
    }
}
