//! Two paired nodes in one process, each reached through a proxy that can be cut.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use tidelog::events::Events;
use tidelog::group::{Group, GroupContext, LocalLimits, NodeIdentity, Op, Registry, Request};
use tidelog::io::{Clock, Entropy, Env, KernelEntropy, SeededEntropy, SystemClock};
use tidelog::replication::{PeerStatus, ReplicateOptions, Replication, ReplicationConfig};
use tidelog::units::{LogTime, Lsn, Name, NodeId, Span};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::wait_for;

pub const SECOND: Duration = Duration::from_secs(1);

/// The system's clock, moved ahead by hand.
pub struct MovedClock {
    pub clock: SystemClock,
    pub ahead_seconds: AtomicU64,
}

impl MovedClock {
    pub fn ahead(&self) -> Duration {
        Duration::from_secs(self.ahead_seconds.load(Ordering::Relaxed))
    }
}

impl Clock for MovedClock {
    fn wall(&self) -> LogTime {
        self.clock.wall().after(self.ahead())
    }
    fn monotonic(&self) -> Duration {
        self.clock.monotonic() + self.ahead()
    }
    fn boot(&self) -> Option<u64> {
        self.clock.boot()
    }
    fn since_boot(&self) -> Option<Duration> {
        self.clock.since_boot().map(|since| since + self.ahead())
    }
}

/// A node without NBD, control socket and backup: groups and replication.
pub struct Node {
    pub dir: PathBuf,
    pub context: GroupContext,
    pub clock: Arc<MovedClock>,
    pub registry: Arc<Registry>,
    pub replication: Arc<Replication>,
}

impl Node {
    pub fn start(dir: &Path, name: &str, advertise: Option<SocketAddr>) -> Node {
        let node_dir = dir.join("node");
        std::fs::create_dir_all(&node_dir).unwrap();
        let identity = node_dir.join("identity");
        let id = match std::fs::read(&identity) {
            Ok(bytes) => NodeId(bytes.try_into().unwrap()),
            Err(_) => {
                let id = KernelEntropy.next_id();
                std::fs::write(&identity, id).unwrap();
                NodeId(id)
            }
        };
        let clock =
            Arc::new(MovedClock { clock: SystemClock::new(), ahead_seconds: AtomicU64::new(0) });
        let context = GroupContext {
            env: Env { clock: Arc::clone(&clock) as Arc<dyn Clock>, ..Env::real() },
            node: NodeIdentity { id, name: name.parse().unwrap() },
            limits: LocalLimits::default(),
            failures: None,
            events: Events::in_memory(),
        };
        let registry = Registry::open(context.clone(), &dir.join("groups")).unwrap();
        let config = ReplicationConfig {
            listen: Some("127.0.0.1:0".parse().unwrap()),
            advertise: advertise.map(|address| address.to_string()),
            state_dir: node_dir,
            heartbeat: Duration::from_millis(200),
            lost_after: Duration::from_secs(5),
        };
        let groups = Arc::clone(&registry);
        let replication = Replication::start(config, context.clone(), groups).unwrap();
        Node { dir: dir.to_owned(), context, clock, registry, replication }
    }

    pub fn name(&self) -> &str {
        self.context.node.name.as_str()
    }

    pub fn address(&self) -> SocketAddr {
        self.replication.local_addr().unwrap()
    }

    /// Ends the node in order; what it wrote stays.
    pub fn stop(self) -> PathBuf {
        self.replication.shutdown();
        self.registry.close();
        self.dir
    }

    pub fn group(&self) -> Arc<Group> {
        self.registry.by_name("g").unwrap()
    }

    pub fn status(&self) -> Option<PeerStatus> {
        let group = self.registry.by_name("g").ok()?;
        self.replication.status(&group).into_iter().next()
    }

    pub fn replication_state(&self) -> String {
        self.status().map(|status| status.replication_state).unwrap_or_default()
    }

    pub fn has_event(&self, code: &str) -> bool {
        self.context.events.since(0).iter().any(|event| event.code == code)
    }
}

/// A way to a node that can be cut.
pub struct Proxy {
    pub address: SocketAddr,
    pub target: Arc<Mutex<Option<SocketAddr>>>,
    pub open: Arc<AtomicBool>,
    pub cut: tokio::sync::watch::Sender<u64>,
    /// Bytes after which the next connections are cut.
    pub cut_after: Arc<AtomicUsize>,
    /// The last such number at which one was cut.
    pub was_cut_after: Arc<AtomicUsize>,
}

impl Proxy {
    pub async fn start() -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let target = Arc::new(Mutex::new(None::<SocketAddr>));
        let open = Arc::new(AtomicBool::new(true));
        let (cut, _) = tokio::sync::watch::channel(0);
        let cut_after = Arc::new(AtomicUsize::new(usize::MAX));
        let was_cut_after = Arc::new(AtomicUsize::new(usize::MAX));
        let proxy = Proxy {
            address,
            target: Arc::clone(&target),
            open: Arc::clone(&open),
            cut: cut.clone(),
            cut_after: Arc::clone(&cut_after),
            was_cut_after: Arc::clone(&was_cut_after),
        };
        tokio::spawn(async move {
            while let Ok((inbound, _)) = listener.accept().await {
                let target = *target.lock().unwrap();
                let Some(target) = target.filter(|_| open.load(Ordering::Relaxed)) else {
                    continue;
                };
                let mut cut = cut.subscribe();
                let limit = cut_after.load(Ordering::Relaxed);
                let was_cut_after = Arc::clone(&was_cut_after);
                tokio::spawn(async move {
                    let Ok(outbound) = TcpStream::connect(target).await else { return };
                    tokio::select! {
                        passed = relay(inbound, outbound, limit) => if passed == limit {
                            was_cut_after.store(limit, Ordering::Relaxed);
                        },
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        proxy
    }

    pub fn lead_to(&self, node: &Node) {
        *self.target.lock().unwrap() = Some(node.address());
    }

    /// Ends all connections.
    pub fn cut(&self) {
        self.cut.send_modify(|count| *count += 1);
    }

    pub fn set_open(&self, open: bool) {
        self.open.store(open, Ordering::Relaxed);
        if !open {
            self.cut();
        }
    }
}

/// Relays both ways until either ends, or `limit` bytes have passed; how many have.
async fn relay(mut a: TcpStream, mut b: TcpStream, limit: usize) -> usize {
    let (mut from_a, mut from_b) = (vec![0; 16384], vec![0; 16384]);
    let mut passed = 0;
    loop {
        let (to, bytes) = tokio::select! {
            read = a.read(&mut from_a) => (&mut b, read.map(|bytes| &from_a[..bytes])),
            read = b.read(&mut from_b) => (&mut a, read.map(|bytes| &from_b[..bytes])),
        };
        let Ok(bytes) = bytes else { return passed };
        let kept = bytes.len().min(limit - passed);
        if bytes.is_empty() || to.write_all(&bytes[..kept]).await.is_err() {
            return passed;
        }
        passed += kept;
        if passed == limit {
            return passed;
        }
    }
}

/// Two paired nodes `a` and `b`, each reached through a proxy.
pub struct Pair {
    _dir: TempDir,
    pub a: Node,
    pub b: Node,
    pub to_a: Proxy,
    pub to_b: Proxy,
}

impl Pair {
    pub async fn start() -> Pair {
        let dir = tempfile::tempdir().unwrap();
        let (to_a, to_b) = (Proxy::start().await, Proxy::start().await);
        let a = Node::start(&dir.path().join("a"), "a", Some(to_a.address));
        let b = Node::start(&dir.path().join("b"), "b", Some(to_b.address));
        to_a.lead_to(&a);
        to_b.lead_to(&b);
        let invite = a.replication.invite().unwrap();
        let peer = b.replication.join(&invite.token, &invite.address).await.unwrap();
        assert_eq!(peer.name.as_str(), "a");
        let pair = Pair { _dir: dir, a, b, to_a, to_b };
        pair.wait_connected();
        pair
    }

    /// The same with a group `g`, primary on `a`, its copy on `b` streaming.
    pub async fn replicating() -> Pair {
        let pair = Pair::start().await;
        let group = pair.a.registry.create(name("g"), Some(1 << 20)).unwrap();
        group.create_volume(name("v"), 64 << 20).unwrap();
        pair.replicate().await;
        pair
    }

    pub async fn replicate(&self) {
        let options =
            ReplicateOptions { rpo_target: Some(Span(5 * SECOND)), ..ReplicateOptions::default() };
        self.a.replication.replicate("g", "b", options).await.unwrap();
        self.wait_equal();
    }

    pub fn nodes(&self) -> [&Node; 2] {
        [&self.a, &self.b]
    }

    pub fn wait_connected(&self) {
        for node in self.nodes() {
            wait_for(&format!("{} to be connected", node.name()), || {
                let peers = node.replication.peers();
                (peers.len() == 1 && peers[0].link_state == "connected").then_some(())
            });
        }
    }

    pub fn close_link(&self) {
        self.to_a.set_open(false);
        self.to_b.set_open(false);
    }

    pub fn open_link(&self) {
        self.to_a.set_open(true);
        self.to_b.set_open(true);
    }

    /// Waits until both stream and end at the same position.
    pub fn wait_equal(&self) {
        wait_for("both nodes to be equal", || {
            let equal = self.a.registry.by_name("g").ok()?.positions().head
                == self.b.registry.by_name("g").ok()?.positions().head;
            let streaming = self.nodes().iter().all(|node| node.replication_state() == "streaming");
            (equal && streaming).then_some(())
        });
        assert_same_bytes(&self.a.group(), &self.b.group());
    }
}

pub fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub fn log_bytes(group: &Group, from: Lsn, to: Lsn) -> Vec<u8> {
    let mut bytes = vec![0; to.bytes_since(from) as usize];
    group.read_log(from, &mut bytes).unwrap();
    bytes
}

/// The records of both logs, byte for byte, at the same addresses.
pub fn assert_same_bytes(a: &Group, b: &Group) {
    let (end_a, end_b) = (a.positions(), b.positions());
    assert_eq!(end_a.head, end_b.head);
    assert_eq!(end_a.chain, end_b.chain);
    let from = a.log_start().max(b.log_start());
    assert!(log_bytes(a, from, end_a.head) == log_bytes(b, from, end_a.head), "equal bytes");
}

/// Appends `count` writes of random places, lengths and contents.
pub fn write(group: &Group, entropy: &SeededEntropy, count: usize) {
    let volume = group.control().volumes[0].number;
    for _ in 0..count {
        let sectors = 1 + entropy.next_u64() % 64;
        let mut data = vec![0; sectors as usize * 512];
        entropy.fill(&mut data);
        let offset = entropy.next_u64() % ((64 << 20) / 512 - sectors) * 512;
        let op = Op::Write { offset, data: &data };
        for result in group.append(&[Request { volume, op, fua: false }]) {
            result.unwrap();
        }
    }
}
