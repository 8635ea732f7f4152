//! The rig: two nodes in one process, with real groups, repositories and schedulers, and a link
//! made by hand that carries log and calls while it is up.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tidelog::backup::{
    BackupConfig, BackupEntry, JobChange, Outcome, PeerCalls, PeerHandler, Progress, Reason,
    ReplicationView, RepositoryConfig, RestoreTarget, RunStarted, Scheduler, Verdict,
};
use tidelog::events::{Event, Events};
use tidelog::group::{
    Group, GroupContext, LocalLimits, NodeIdentity, Op, Read, Registry, Request, View,
};
use tidelog::io::{Env, ManualClock};
use tidelog::log::control::{Control, MemberRecord, Mode, OnLoss};
use tidelog::replication::BoxFuture;
use tidelog::units::{LogTime, Lsn, Name, NodeId};

use crate::support::{PATIENCE, wait_for};

/// Threads of the runtime for calls that block.
pub const BLOCKING_THREADS: usize = 16;
pub const VOLUME_BYTES: usize = 10 << 20;

pub fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// The link between the two nodes: carries log and calls while it is up.
#[derive(Default)]
pub struct Link {
    pub handlers: Mutex<HashMap<(String, String), PeerHandler>>,
    /// Nanoseconds that the link has been down; 0 while it is up.
    pub lost: AtomicU64,
    /// Nanoseconds of lag that both nodes see.
    pub lag: AtomicU64,
    /// What else speaks against the copy.
    pub reasons: Mutex<Vec<Reason>>,
    /// Up to where the copies have differed.
    pub differed_until: AtomicU64,
    pub groups: RwLock<Option<(Arc<Group>, Arc<Group>)>>,
}

impl Link {
    pub fn set_lost(&self, lost: Duration) {
        self.lost.store(lost.as_nanos() as u64, Ordering::SeqCst);
    }

    pub fn set_lag(&self, lag: Duration) {
        self.lag.store(lag.as_nanos() as u64, Ordering::SeqCst);
    }

    pub fn lost(&self) -> Option<Duration> {
        let lost = self.lost.load(Ordering::SeqCst);
        (lost > 0).then(|| Duration::from_nanos(lost))
    }

    /// Ships the log from a to b, byte for byte.
    pub fn ship(&self) {
        let groups = self.groups.read().unwrap();
        let Some((a, b)) = groups.as_ref() else { return };
        let durable = a.sync_now().unwrap();
        loop {
            let (at, head) = (b.received_end(), a.positions().head);
            if at >= head {
                break;
            }
            let mut bytes = vec![0; head.bytes_since(at).min(256 << 10) as usize];
            a.read_log(at, &mut bytes).unwrap();
            b.append_received(at, &bytes).unwrap();
        }
        b.sync_now().unwrap();
        b.note_committed(durable);
    }
}

/// One node's end of the link.
pub struct End {
    pub this: &'static str,
    pub link: Arc<Link>,
}

impl PeerCalls for End {
    fn call(
        &self,
        peer: &Name,
        method: &str,
        body: Value,
        _timeout: Duration,
    ) -> BoxFuture<Result<Value, String>> {
        let link = Arc::clone(&self.link);
        let (this, key) = (name(self.this), (peer.to_string(), method.to_owned()));
        Box::pin(async move {
            if link.lost().is_some() {
                return Err("the link is down".to_owned());
            }
            let shipping = Arc::clone(&link);
            tokio::task::spawn_blocking(move || shipping.ship()).await.unwrap();
            let handler = link.handlers.lock().unwrap().get(&key).cloned();
            handler.ok_or("no such method")?(this, body).await
        })
    }

    fn on_call(&self, method: &str, handler: PeerHandler) {
        let key = (self.this.to_owned(), method.to_owned());
        self.link.handlers.lock().unwrap().insert(key, handler);
    }

    fn view(&self, _group: &Group, _peer: Option<&Name>) -> ReplicationView {
        let lost = self.link.lost();
        let lag = Duration::from_nanos(self.link.lag.load(Ordering::SeqCst));
        let reasons = self.link.reasons.lock().unwrap().clone();
        ReplicationView { link_lost: lost, lag: Some(lost.unwrap_or(lag)), reasons }
    }

    fn is_same_at(&self, _group: &Group, lsn: Lsn) -> bool {
        lsn.0 > self.link.differed_until.load(Ordering::SeqCst)
    }
}

pub struct Node {
    pub registry: Arc<Registry>,
    pub scheduler: Arc<Scheduler>,
    pub events: Receiver<Event>,
    pub at_start: AtStart,
    pub new_scheduler: Box<dyn Fn() -> Arc<Scheduler>>,
}

/// What a test has done in the middle of a run: its claim is there, its image is not yet.
pub type AtStart = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;

impl Node {
    pub fn start(this: &'static str, dir: &Path, link: &Arc<Link>, env: Env) -> Node {
        let data_dir = dir.join(this);
        std::fs::create_dir_all(data_dir.join("node")).unwrap();
        let events = Events::in_memory();
        let (sender, receiver) = channel();
        let at_start = AtStart::default();
        let hook = Arc::clone(&at_start);
        events.follow(move |event| {
            if event.code == "backup-started"
                && let Some(hook) = hook.lock().unwrap().take()
            {
                hook();
            }
            sender.send(event.clone()).is_ok()
        });
        let context = GroupContext {
            env,
            node: NodeIdentity { id: node_id(this), name: name(this) },
            limits: LocalLimits::default(),
            failures: None,
            events,
        };
        let registry = Registry::open(context.clone(), &data_dir.join("groups")).unwrap();
        let mut config = BackupConfig::new(&data_dir, &[]);
        config.tick = Duration::from_millis(50);
        config.shutdown_patience = Duration::from_secs(2);
        config.repositories.push(RepositoryConfig {
            name: "main".to_owned(),
            url: way_to_repository(dir, this).display().to_string(),
            password_file: dir.join("password"),
        });
        let peers = Arc::new(End { this, link: Arc::clone(link) });
        let groups = registry.clone();
        let new_scheduler = Box::new(move || {
            let (config, context) = (config.clone(), context.clone());
            Scheduler::start(config, context, groups.clone(), peers.clone()).unwrap()
        });
        Node { registry, scheduler: new_scheduler(), events: receiver, at_start, new_scheduler }
    }

    pub fn group(&self) -> Arc<Group> {
        self.registry.by_name("g").unwrap()
    }

    /// Does something when the next run here has its claim, before it goes on.
    pub fn at_start(&self, hook: impl FnOnce() + Send + 'static) {
        *self.at_start.lock().unwrap() = Some(Box::new(hook));
    }

    /// Waits for an event of a job; what came before it is dropped.
    pub fn await_any(&self, codes: &[&str]) -> Event {
        wait_for("an event", || {
            let event = self.events.recv_timeout(PATIENCE).unwrap();
            codes.contains(&event.code.as_str()).then_some(event)
        })
    }

    /// The same, where no run may end otherwise before.
    pub fn await_event(&self, code: &str) -> Event {
        loop {
            let event = self.events.recv_timeout(PATIENCE);
            let event = event.unwrap_or_else(|_| panic!("no event {code}"));
            if event.code == code {
                return event;
            }
            let ended = ["backup-failed", "backup-done", "backup-delegated", "backup-skipped"];
            assert!(!ended.contains(&event.code.as_str()), "{code} expected: {event:?}");
        }
    }
}

/// Each node's own way to the one repository: a link, which a test may take away.
pub fn way_to_repository(dir: &Path, this: &str) -> PathBuf {
    dir.join(format!("repository-of-{this}"))
}

pub fn time(text: &str) -> LogTime {
    text.parse().unwrap()
}

pub fn node_id(this: &str) -> NodeId {
    NodeId([this.as_bytes()[0]; 16])
}

pub struct Pair {
    pub runtime: tokio::runtime::Runtime,
    pub link: Arc<Link>,
    pub a: Node,
    pub b: Node,
    pub dir: TempDir,
}

impl Pair {
    /// A primary `a` and its secondary `b`, a volume with data, a repository, and a job.
    pub fn new(settings: Value) -> Pair {
        Pair::in_envs(settings, [Env::real(), Env::real()])
    }

    /// The same by a clock that the test sets, which begins at a whole minute.
    pub fn by_clock(settings: Value) -> (Pair, Arc<ManualClock>) {
        let clock = Arc::new(ManualClock::new("2026-11-24T02:00:00Z".parse().unwrap()));
        let env = Env { clock: clock.clone(), ..Env::real() };
        (Pair::in_envs(settings, [env.clone(), env]), clock)
    }

    pub fn in_envs(settings: Value, [env_of_a, env_of_b]: [Env; 2]) -> Pair {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("repository")).unwrap();
        for this in ["a", "b"] {
            let way = way_to_repository(dir.path(), this);
            std::os::unix::fs::symlink("repository", way).unwrap();
        }
        std::fs::write(dir.path().join("password"), "secret\n").unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(BLOCKING_THREADS)
            .enable_time()
            .build()
            .unwrap();
        let link = Arc::new(Link::default());
        let _inside = runtime.enter();
        let a = Node::start("a", dir.path(), &link, env_of_a);
        let b = Node::start("b", dir.path(), &link, env_of_b);
        let primary = a.registry.create(name("g"), Some(4 << 20)).unwrap();
        primary.create_volume(name("v"), VOLUME_BYTES as u64).unwrap();
        let member = MemberRecord {
            node: node_id("b"),
            name: name("b"),
            mode: Mode::Async,
            on_loss: OnLoss::default(),
            rpo_target: None,
            removed: false,
            other: Map::new(),
        };
        primary.append_control(Control::Member(member)).unwrap();
        let copy = b.registry.create_copy(primary.id(), name("g"), primary.segment_bytes());
        *link.groups.write().unwrap() = Some((primary, copy.unwrap()));
        drop(_inside);
        let pair = Pair { runtime, link, a, b, dir };
        pair.runtime.block_on(pair.a.scheduler.repository_init("main", false)).unwrap();
        pair.set_job("nightly", settings);
        pair.write(0, &noise(3 << 20, 1));
        pair.link.ship();
        pair
    }

    pub fn set_job(&self, job: &str, settings: Value) {
        let mut settings = settings.as_object().unwrap().clone();
        settings.insert("storage_free_min".to_owned(), json!(0.0));
        let repository = Some("main".to_owned());
        let change = JobChange { repository, settings, ..JobChange::default() };
        self.a.scheduler.set_job("g", name(job), change).unwrap();
        self.link.ship();
    }

    pub fn write(&self, offset: u64, data: &[u8]) {
        let group = self.a.group();
        let volume = group.control().volumes[0].number;
        let requests: Vec<Request<'_>> = data
            .chunks(256 << 10)
            .enumerate()
            .map(|(index, data)| Request {
                volume,
                op: Op::Write { offset: offset + ((index as u64) << 18), data },
                fua: false,
            })
            .collect();
        for result in group.append(&requests) {
            result.unwrap();
        }
    }

    pub fn live(&self) -> Vec<u8> {
        let group = self.a.group();
        let mut bytes = vec![0; VOLUME_BYTES];
        let volume = group.control().volumes[0].number;
        let mut reads: Vec<Read<'_>> = bytes
            .chunks_mut(1 << 20)
            .enumerate()
            .map(|(index, buffer)| Read {
                volume,
                offset: (index as u64) << 20,
                buffer,
                result: Ok(()),
            })
            .collect();
        group.read(&mut reads);
        reads.into_iter().for_each(|read| read.result.unwrap());
        bytes
    }

    /// Waits until a slot is open on a node, and decided for the first time.
    pub fn await_open(&self, node: &Node, slot: LogTime) {
        wait_for("the slot to be open", || {
            let mut list = self.list(node).into_iter();
            list.find(|entry| {
                entry.slot == slot
                    && entry.outcome == Outcome::Running
                    && !entry.reasons.is_empty()
                    && entry.reasons[0].code != "missed"
            })
        });
    }

    pub fn run(&self, node: &Node) -> RunStarted {
        self.runtime.block_on(node.scheduler.run("g", "nightly")).unwrap()
    }

    pub fn list(&self, node: &Node) -> Vec<BackupEntry> {
        let of = Some(("g".to_owned(), Some("nightly".to_owned())));
        self.runtime.block_on(node.scheduler.list(of)).unwrap().backups
    }

    /// What stands in a node's list for a slot.
    pub fn entry(&self, node: &Node, run: &RunStarted, of_node: &str) -> BackupEntry {
        let mut found = self
            .list(node)
            .into_iter()
            .filter(|entry| entry.slot == run.slot && entry.node == name(of_node));
        let entry = found.next().expect("the run is listed");
        assert_eq!(found.next(), None);
        entry
    }

    /// Starts a run on the primary whose repository hangs from its claim on.
    pub fn run_that_hangs(&self) -> (RunStarted, Hanging) {
        let config = self.dir.path().join("repository/config");
        let (sender, hanging) = channel();
        self.a.at_start(move || sender.send(Hanging::begin(config)).unwrap());
        let run = self.run(&self.a);
        assert_eq!(run.decision.decision, Verdict::Run);
        (run, hanging.recv_timeout(PATIENCE).unwrap())
    }

    pub fn restored(&self, id: &str) -> Vec<u8> {
        let path = self.dir.path().join(format!("restored-{id}"));
        let target = RestoreTarget::Path(path.clone());
        let restore = self.b.scheduler.restore(id, None, target, Progress::new());
        self.runtime.block_on(restore).unwrap();
        std::fs::read(path).unwrap()
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for node in [&self.a, &self.b] {
            node.scheduler.shutdown();
            node.registry.close();
        }
    }
}

/// A file whose readers hang, as on the file system of a server that went away.
pub struct Hanging {
    pub path: PathBuf,
    pub aside: PathBuf,
    pub pipe: PathBuf,
}

impl Hanging {
    pub fn begin(path: PathBuf) -> Hanging {
        let aside = path.with_extension("aside");
        let aside = aside.parent().unwrap().parent().unwrap().join(aside.file_name().unwrap());
        std::fs::rename(&path, &aside).unwrap();
        let pipe = aside.with_extension("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::hard_link(&pipe, &path).unwrap();
        Hanging { path, aside, pipe }
    }

    /// The next reader gets what was there before; what hangs gets the end of the file.
    pub fn end(self) {
        std::fs::rename(&self.aside, &self.path).unwrap();
        drop(std::fs::OpenOptions::new().write(true).open(&self.pipe).unwrap());
        std::fs::remove_file(&self.pipe).unwrap();
    }
}

pub fn noise(bytes: usize, mut seed: u64) -> Vec<u8> {
    let mut data = vec![0; bytes];
    for part in data.chunks_mut(8) {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        part.copy_from_slice(&(seed ^ (seed >> 33)).to_le_bytes()[..part.len()]);
    }
    data
}

pub fn codes(reasons: &[Reason]) -> Vec<&str> {
    reasons.iter().map(|reason| reason.code.as_str()).collect()
}
