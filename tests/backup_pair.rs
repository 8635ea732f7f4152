//! Two nodes in one process, with real groups, repositories and schedulers, and a link made by
//! hand: who makes the backup, what the other says, and that a slot never gets two.

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
use tidelog::events::{Event, Events, Severity};
use tidelog::group::{
    Group, GroupContext, LocalLimits, NodeIdentity, Op, Read, Registry, Request, Role, View,
};
use tidelog::io::{Env, ManualClock};
use tidelog::log::control::{Control, MemberRecord, Mode, OnLoss};
use tidelog::replication::BoxFuture;
use tidelog::units::{LogTime, Name, NodeId, Span};

use crate::support::{PATIENCE, wait_for};

/// Threads of the runtime for calls that block.
const BLOCKING_THREADS: usize = 16;
const VOLUME_BYTES: usize = 10 << 20;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

/// The link between the two nodes: carries log and calls while it is up.
#[derive(Default)]
struct Link {
    handlers: Mutex<HashMap<(String, String), PeerHandler>>,
    /// Nanoseconds that the link has been down; 0 while it is up.
    lost: AtomicU64,
    /// Nanoseconds of lag that both nodes see.
    lag: AtomicU64,
    groups: RwLock<Option<(Arc<Group>, Arc<Group>)>>,
}

impl Link {
    fn set_lost(&self, lost: Duration) {
        self.lost.store(lost.as_nanos() as u64, Ordering::SeqCst);
    }

    fn set_lag(&self, lag: Duration) {
        self.lag.store(lag.as_nanos() as u64, Ordering::SeqCst);
    }

    fn lost(&self) -> Option<Duration> {
        let lost = self.lost.load(Ordering::SeqCst);
        (lost > 0).then(|| Duration::from_nanos(lost))
    }

    /// Ships the log from a to b, byte for byte.
    fn ship(&self) {
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
struct End {
    this: &'static str,
    link: Arc<Link>,
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
        ReplicationView { link_lost: lost, lag: Some(lost.unwrap_or(lag)), reasons: Vec::new() }
    }
}

struct Node {
    registry: Arc<Registry>,
    scheduler: Arc<Scheduler>,
    events: Receiver<Event>,
    at_start: AtStart,
    new_scheduler: Box<dyn Fn() -> Arc<Scheduler>>,
}

/// What a test has done in the middle of a run: its claim is there, its image is not yet.
type AtStart = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;

impl Node {
    fn start(this: &'static str, dir: &Path, link: &Arc<Link>, env: Env) -> Node {
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
            events,
        };
        let registry = Registry::open(context.clone(), &data_dir.join("groups")).unwrap();
        let mut config = BackupConfig::new(&data_dir, &[]);
        config.tick = Duration::from_millis(50);
        config.shutdown_patience = Duration::from_secs(2);
        config.repositories.push(RepositoryConfig {
            name: "main".to_owned(),
            url: dir.join("repository").display().to_string(),
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

    fn group(&self) -> Arc<Group> {
        self.registry.by_name("g").unwrap()
    }

    /// Does something when the next run here has its claim, before it goes on.
    fn at_start(&self, hook: impl FnOnce() + Send + 'static) {
        *self.at_start.lock().unwrap() = Some(Box::new(hook));
    }

    /// Waits for an event of a job; what came before it is dropped.
    fn await_any(&self, codes: &[&str]) -> Event {
        wait_for("an event", || {
            let event = self.events.recv_timeout(PATIENCE).unwrap();
            codes.contains(&event.code.as_str()).then_some(event)
        })
    }

    /// The same, where no run may end otherwise before.
    fn await_event(&self, code: &str) -> Event {
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

fn time(text: &str) -> LogTime {
    text.parse().unwrap()
}

fn node_id(this: &str) -> NodeId {
    NodeId([this.as_bytes()[0]; 16])
}

struct Pair {
    runtime: tokio::runtime::Runtime,
    link: Arc<Link>,
    a: Node,
    b: Node,
    dir: TempDir,
}

impl Pair {
    /// A primary `a` and its secondary `b`, a volume with data, a repository, and a job.
    fn new(settings: Value) -> Pair {
        Pair::in_env(settings, &Env::real())
    }

    /// The same by a clock that the test sets, which begins at a whole minute.
    fn by_clock(settings: Value) -> (Pair, Arc<ManualClock>) {
        let clock = Arc::new(ManualClock::new("2026-11-24T02:00:00Z".parse().unwrap()));
        let env = Env { clock: clock.clone(), ..Env::real() };
        (Pair::in_env(settings, &env), clock)
    }

    fn in_env(settings: Value, env: &Env) -> Pair {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("password"), "secret\n").unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(BLOCKING_THREADS)
            .enable_time()
            .build()
            .unwrap();
        let link = Arc::new(Link::default());
        let _inside = runtime.enter();
        let a = Node::start("a", dir.path(), &link, env.clone());
        let b = Node::start("b", dir.path(), &link, env.clone());
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
        pair.runtime.block_on(pair.a.scheduler.repository_init("main")).unwrap();
        pair.set_job("nightly", settings);
        pair.write(0, &noise(3 << 20, 1));
        pair.link.ship();
        pair
    }

    fn set_job(&self, job: &str, settings: Value) {
        let mut settings = settings.as_object().unwrap().clone();
        settings.insert("storage_free_min".to_owned(), json!(0.0));
        let repository = Some("main".to_owned());
        let change = JobChange { repository, settings, ..JobChange::default() };
        self.a.scheduler.set_job("g", name(job), change).unwrap();
        self.link.ship();
    }

    fn write(&self, offset: u64, data: &[u8]) {
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

    fn live(&self) -> Vec<u8> {
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
    fn await_open(&self, node: &Node, slot: LogTime) {
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

    fn run(&self, node: &Node) -> RunStarted {
        self.runtime.block_on(node.scheduler.run("g", "nightly")).unwrap()
    }

    fn list(&self, node: &Node) -> Vec<BackupEntry> {
        let of = Some(("g".to_owned(), Some("nightly".to_owned())));
        self.runtime.block_on(node.scheduler.list(of)).unwrap().backups
    }

    /// What stands in a node's list for a slot.
    fn entry(&self, node: &Node, run: &RunStarted, of_node: &str) -> BackupEntry {
        let mut found = self
            .list(node)
            .into_iter()
            .filter(|entry| entry.slot == run.slot && entry.node == name(of_node));
        let entry = found.next().expect("the run is listed");
        assert_eq!(found.next(), None);
        entry
    }

    /// Starts a run on the primary whose repository hangs from its claim on.
    fn run_that_hangs(&self) -> (RunStarted, Hanging) {
        let config = self.dir.path().join("repository/config");
        let (sender, hanging) = channel();
        self.a.at_start(move || sender.send(Hanging::begin(config)).unwrap());
        let run = self.run(&self.a);
        assert_eq!(run.decision.decision, Verdict::Run);
        (run, hanging.recv_timeout(PATIENCE).unwrap())
    }

    fn restored(&self, id: &str) -> Vec<u8> {
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
struct Hanging {
    path: PathBuf,
    aside: PathBuf,
    pipe: PathBuf,
}

impl Hanging {
    fn begin(path: PathBuf) -> Hanging {
        let aside = path.with_extension("aside");
        let aside = aside.parent().unwrap().parent().unwrap().join(aside.file_name().unwrap());
        std::fs::rename(&path, &aside).unwrap();
        let pipe = aside.with_extension("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::hard_link(&pipe, &path).unwrap();
        Hanging { path, aside, pipe }
    }

    /// The next reader gets what was there before; what hangs gets the end of the file.
    fn end(self) {
        std::fs::rename(&self.aside, &self.path).unwrap();
        drop(std::fs::OpenOptions::new().write(true).open(&self.pipe).unwrap());
        std::fs::remove_file(&self.pipe).unwrap();
    }
}

fn noise(bytes: usize, mut seed: u64) -> Vec<u8> {
    let mut data = vec![0; bytes];
    for part in data.chunks_mut(8) {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        part.copy_from_slice(&(seed ^ (seed >> 33)).to_le_bytes()[..part.len()]);
    }
    data
}

fn codes(reasons: &[Reason]) -> Vec<&str> {
    reasons.iter().map(|reason| reason.code.as_str()).collect()
}

#[test]
fn the_secondary_backs_up_and_the_primary_stands_down_until_the_link_is_cut() {
    let pair = Pair::new(json!({"grace": "1s"}));
    pair.write(5 << 20, &noise(4096, 2));
    let first = pair.run(&pair.a);
    assert_eq!(first.decision.decision, Verdict::Delegate);
    assert_eq!(first.decision.run_on, Some(name("b")));
    assert_eq!(first.told, [name("b")]);
    pair.b.await_event("backup-done");
    pair.a.await_event("backup-delegated");
    let made = pair.entry(&pair.b, &first, "b");
    assert_eq!((made.outcome, made.role), (Outcome::Done, Role::Secondary));
    assert_eq!(codes(&made.reasons), ["secondary-fit"]);
    let stood_down = pair.entry(&pair.a, &first, "a");
    assert_eq!((stood_down.outcome, stood_down.id.clone()), (Outcome::Delegated, None));
    assert_eq!(stood_down.run_on, Some(name("b")));
    let first_id = made.id.unwrap();
    assert!(pair.restored(&first_id) == pair.live(), "what was answered before the slot is in it");

    // The link is cut for longer than the grace: the primary goes on with the secondary's chain.
    pair.link.set_lost(Duration::from_secs(5));
    pair.write(0, &noise(4096, 3));
    let second = pair.run(&pair.a);
    assert_eq!(second.decision.decision, Verdict::Run);
    assert_eq!(
        codes(&second.decision.reasons)[..2],
        ["primary-takes-over", "secondary-unreachable"]
    );
    assert!(second.told.is_empty(), "b cannot be told");
    pair.a.await_event("backup-done");
    let made = pair.entry(&pair.a, &second, "a");
    assert_eq!((made.outcome, made.role), (Outcome::Done, Role::Primary));
    assert!(made.bytes_read <= 4 << 20, "one file changed, {} bytes were read", made.bytes_read);
    let second_id = made.id.unwrap();
    assert!(pair.restored(&second_id) == pair.live());
    assert!(pair.restored(&first_id[..12]) != pair.live(), "the first is what it was");
    let verified = pair.b.scheduler.verify(&second_id, Progress::new());
    assert_eq!(pair.runtime.block_on(verified).unwrap().bytes, VOLUME_BYTES as u64);
}

#[test]
fn a_secondary_only_job_fails_aloud_where_the_link_is_cut() {
    let pair = Pair::new(json!({"placement": "secondary-only", "grace": "1s"}));
    pair.link.set_lost(Duration::from_secs(5));
    let run = pair.run(&pair.a);
    assert_eq!(run.decision.decision, Verdict::Fail);
    let event = pair.a.await_event("backup-failed");
    assert_eq!(event.severity, Severity::Error);
    assert!(event.text.contains("unreachable"), "{}", event.text);
    let entry = pair.entry(&pair.a, &run, "a");
    assert_eq!((entry.outcome, entry.id), (Outcome::Failed, None));
    assert!(codes(&entry.reasons).contains(&"secondary-unreachable"));
    assert!(codes(&entry.reasons).contains(&"not-permitted"));
}

#[test]
fn both_nodes_wait_for_a_secondary_that_is_behind_and_a_second_run_is_skipped() {
    let pair = Pair::new(json!({"max_lag": "10s"}));
    pair.link.set_lag(Duration::from_secs(60));
    let first = pair.run(&pair.a);
    assert_eq!(first.decision.decision, Verdict::Wait);
    assert_eq!(codes(&first.decision.reasons), ["lag-above-limit"]);
    let second = pair.run(&pair.b);
    assert_eq!(second.decision.decision, Verdict::Skip);
    assert_eq!(codes(&second.decision.reasons), ["already-running"]);
    pair.a.await_event("backup-skipped");
    pair.b.await_event("backup-skipped");
    pair.link.set_lag(Duration::ZERO);
    pair.b.await_event("backup-done");
    let entry = pair.entry(&pair.b, &first, "b");
    assert_eq!(entry.outcome, Outcome::Done);
    let backups = pair.list(&pair.b).into_iter().filter(|entry| entry.id.is_some()).count();
    assert_eq!(backups, 1);
}

#[test]
fn the_explanation_is_the_same_on_both_nodes_and_assumptions_turn_it() {
    let pair = Pair::new(json!({}));
    let explain = |node: &Node, assume: &[(&str, &str)]| {
        let assume: Vec<_> =
            assume.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        pair.runtime.block_on(node.scheduler.explain("g", "nightly", &assume)).unwrap()
    };
    let (a, b) = (explain(&pair.a, &[]), explain(&pair.b, &[]));
    assert_eq!(a.decision.decision, Verdict::Delegate, "{a:?}");
    assert_eq!(b.decision.decision, Verdict::Run, "{b:?}");
    assert_eq!(a.decision.run_on, b.decision.run_on);
    assert_eq!((a.node, b.node), (name("a"), name("b")));
    assert!(b.inputs["secondary.memory_free_bytes"]["value"].as_u64().unwrap() > 0);
    for (assume, on_a, on_b) in [
        (("secondary.available", "false"), Verdict::Run, Verdict::Delegate),
        (("secondary.repository", "false"), Verdict::Run, Verdict::Delegate),
        (("replication.lag_seconds", "300"), Verdict::Wait, Verdict::Wait),
        (("placement", "primary-only"), Verdict::Run, Verdict::Skip),
    ] {
        assert_eq!(explain(&pair.a, &[assume]).decision.decision, on_a, "{assume:?}");
        assert_eq!(explain(&pair.b, &[assume]).decision.decision, on_b, "{assume:?}");
    }
    assert!(pair.list(&pair.a).is_empty(), "nothing was run");
}

#[test]
fn a_secondary_that_never_claims_loses_the_slot_within_the_grace() {
    let pair = Pair::new(json!({"grace": "1s"}));
    // b answers as if it were fit, and never begins.
    let mute: PeerHandler = Arc::new(|_, _| Box::pin(async { Ok(json!({})) }));
    for method in ["backup.start", "backup.publish"] {
        let key = ("b".to_owned(), method.to_owned());
        pair.link.handlers.lock().unwrap().insert(key, mute.clone());
    }
    let run = pair.run(&pair.a);
    assert_eq!(run.decision.decision, Verdict::Delegate);
    pair.a.await_event("backup-done");
    let entry = pair.entry(&pair.a, &run, "a");
    assert_eq!((entry.outcome, entry.role), (Outcome::Done, Role::Primary));
    assert!(codes(&entry.reasons).contains(&"gave-up"), "{:?}", entry.reasons);
}

#[test]
fn a_backup_is_restored_into_a_volume_unless_hosts_use_it() {
    let pair = Pair::new(json!({"placement": "primary-only"}));
    let before = pair.live();
    let run = pair.run(&pair.a);
    pair.a.await_event("backup-done");
    let id = pair.entry(&pair.a, &run, "a").id.unwrap();
    pair.write(1 << 20, &noise(2 << 20, 9));
    assert!(pair.live() != before);
    let target = RestoreTarget::Volume { group: name("g"), volume: name("v") };
    let restore = |node: &Node| {
        let restore = node.scheduler.restore(&id, None, target.clone(), Progress::new());
        pair.runtime.block_on(restore)
    };
    let group = pair.a.group();
    let client = group.client(group.control().volumes[0].number);
    let refused = restore(&pair.a).unwrap_err().to_string();
    assert!(refused.contains("connected"), "{refused}");
    drop(client);
    let refused = restore(&pair.b).unwrap_err().to_string();
    assert!(refused.contains("primary"), "{refused}");
    restore(&pair.a).unwrap();
    assert!(pair.live() == before);
}

#[test]
fn a_schedule_makes_its_slot_once_on_one_node() {
    let pair = Pair::new(json!({}));
    let change = JobChange { schedule: Some("* * * * *".to_owned()), ..JobChange::default() };
    // The slot of the minute that is going on began before the job: put the record's time back.
    let record = pair.a.scheduler.set_job("g", name("nightly"), change).unwrap();
    let earlier = tidelog::log::control::JobRecord {
        since: record.since.before(Duration::from_secs(90)),
        settings: {
            let mut settings = record.settings.clone();
            settings.insert("deadline".to_owned(), json!(Span::from_secs(59)));
            settings
        },
        ..record
    };
    pair.a.group().append_control(Control::Job(earlier)).unwrap();
    pair.link.ship();
    let done = pair.b.await_event("backup-done");
    let delegated = pair.a.events.recv_timeout(PATIENCE);
    assert!(delegated.is_ok());
    let slot: tidelog::units::LogTime = done.details["slot"].as_str().unwrap().parse().unwrap();
    assert_eq!(slot.0 % 60_000_000_000, 0, "a whole minute: {slot}");
    let list = pair.list(&pair.b);
    let of_slot: Vec<_> = list.iter().filter(|entry| entry.slot == slot).collect();
    assert_eq!(of_slot.iter().filter(|entry| entry.id.is_some()).count(), 1, "{of_slot:?}");
}

/// A job of every minute whose secondary stayed behind waited an hour for each slot: the slots that
/// came meanwhile were skipped as "already running", and had no backup at all.
#[test]
fn a_slot_that_waits_is_decided_when_the_next_is_due_and_both_get_their_backup() {
    let (pair, clock) = Pair::by_clock(json!({"max_lag": "10s"}));
    pair.link.set_lag(Duration::from_secs(60));
    let change = JobChange { schedule: Some("* * * * *".to_owned()), ..JobChange::default() };
    pair.a.scheduler.set_job("g", name("nightly"), change).unwrap();
    pair.link.ship();
    let slots: [LogTime; 2] = [time("2026-11-24T02:01:00Z"), time("2026-11-24T02:02:00Z")];
    clock.advance(Duration::from_secs(60));
    for node in [&pair.a, &pair.b] {
        pair.await_open(node, slots[0]);
    }
    clock.advance(Duration::from_secs(60));
    let first = pair.a.await_event("backup-done");
    assert_eq!(first.details["slot"], slots[0].to_string(), "the primary takes the first");
    for node in [&pair.a, &pair.b] {
        pair.await_open(node, slots[1]);
    }
    pair.link.set_lag(Duration::ZERO);
    let second = pair.b.await_any(&["backup-done"]);
    assert_eq!(second.details["slot"], slots[1].to_string(), "and the secondary the second");
}

/// A run that hung in its repository counted as going for ever, so that every later slot was
/// skipped.
#[test]
fn a_stuck_run_ends_at_its_limit_and_the_next_slot_runs() {
    let (pair, clock) = Pair::by_clock(json!({"placement": "primary-only", "run_limit": "1h"}));
    let (hung, hanging) = pair.run_that_hangs();
    clock.advance(Duration::from_secs(1800));
    let skipped = pair.run(&pair.a);
    assert_eq!(codes(&skipped.decision.reasons), ["already-running"]);
    pair.a.await_event("backup-skipped");

    clock.advance(Duration::from_secs(1800 + 60));
    let event = pair.a.await_event("backup-failed");
    assert_eq!(event.details["slot"], hung.slot.to_string());
    assert!(event.text.contains("over its limit of 1h"), "{}", event.text);
    hanging.end();
    wait_for("the repository to be back", || {
        let explain = pair.a.scheduler.explain("g", "nightly", &[]);
        let explained = pair.runtime.block_on(explain).unwrap();
        (explained.decision.decision == Verdict::Run).then_some(())
    });
    let next = pair.run(&pair.a);
    assert_eq!(next.decision.decision, Verdict::Run);
    pair.a.await_event("backup-done");
    let entry = pair.entry(&pair.a, &hung, "a");
    assert_eq!((entry.outcome, codes(&entry.reasons)), (Outcome::Failed, vec!["run-limit"]));
}

/// Each question about a repository on a hung file system took a thread of the runtime and kept
/// it, until none was left and the node answered nothing any more.
#[test]
fn a_repository_that_hangs_is_a_fact_and_takes_no_thread_per_question() {
    let (pair, clock) = Pair::by_clock(json!({}));
    let observe = {
        let key = ("b".to_owned(), "backup.observe".to_owned());
        pair.link.handlers.lock().unwrap()[&key].clone()
    };
    let group = pair.a.group();
    let call = json!({ "group": group.id(), "job": group.control().jobs[0].id, "slot": null });
    let ask = |count: usize| -> Vec<Value> {
        let asked: Vec<_> =
            (0..count).map(|_| pair.runtime.spawn(observe(name("a"), call.clone()))).collect();
        let answers = asked.into_iter().map(|answer| {
            let patient = async { tokio::time::timeout(PATIENCE, answer).await };
            pair.runtime.block_on(patient).expect("an answer").unwrap().unwrap()
        });
        answers.map(|answer| answer["facts"].clone()).collect()
    };
    assert_eq!(ask(1)[0]["repository"], true);
    let hanging = Hanging::begin(pair.dir.path().join("repository/config"));
    let slow = ask(1).remove(0);
    assert_eq!(slow["repository"], true, "what it said a moment ago holds a while: {slow}");
    clock.advance(Duration::from_secs(31));
    for facts in ask(2 * BLOCKING_THREADS) {
        assert_eq!(facts["repository"], false, "{facts}");
        let reason = facts["repository_reason"].as_str().unwrap();
        assert!(reason.contains("no answer since 2026-11-24T02:00:00Z"), "{reason}");
    }
    hanging.end();
    wait_for("the repository to be back", || (ask(1)[0]["repository"] == true).then_some(()));
}

/// A shutdown waited for a run that hung in its repository for ever.
#[test]
fn a_shutdown_leaves_behind_what_hangs() {
    let pair = Pair::new(json!({"placement": "primary-only"}));
    let (_, hanging) = pair.run_that_hangs();
    pair.a.scheduler.shutdown();
    hanging.end();
}

/// A list hid the backups of a repository that was away, and one that was never made.
#[test]
fn backups_out_of_reach_are_listed_and_say_so() {
    let pair = Pair::new(json!({"placement": "primary-only"}));
    let run = pair.run(&pair.a);
    pair.a.await_event("backup-done");
    let made = wait_for("the run to be noted", || {
        let seen = std::fs::read_to_string(pair.dir.path().join("a/node/backup-runs")).ok()?;
        let id = pair.entry(&pair.a, &run, "a").id?;
        seen.contains(&id).then_some(id)
    });
    let (repository, away) = (pair.dir.path().join("repository"), pair.dir.path().join("away"));
    std::fs::rename(&repository, &away).unwrap();
    let list = |of: &str| {
        let of = Some(("g".to_owned(), Some(of.to_owned())));
        pair.runtime.block_on(pair.a.scheduler.list(of))
    };
    let listing = list("nightly").unwrap();
    let [entry] = &listing.backups[..] else { panic!("{listing:?}") };
    let unreachable = entry.unreachable.as_ref().expect("it cannot be read");
    assert_eq!((&entry.id, &unreachable.id), (&None, &made));
    assert_eq!((entry.outcome, unreachable.repository.as_str()), (Outcome::Done, "main"));
    assert!(listing.problems[0].contains("repository init main"), "{listing:?}");
    std::fs::rename(&away, &repository).unwrap();
    let listing = list("nightly").unwrap();
    assert_eq!((&listing.backups[0].id, &listing.problems), (&Some(made), &Vec::new()));
    let none = list("weekly").unwrap_err().to_string();
    assert!(none.contains("job g/weekly: does not exist; `tidelog job list g`"), "{none}");
}

/// A run whose result could not be written left its snapshot, which filled no slot.
#[test]
fn a_run_without_a_result_takes_its_snapshot_back() {
    let pair = Pair::new(json!({"placement": "primary-only"}));
    let repository = pair.dir.path().join("repository");
    let jobs = repository.join("tidelog/slots");
    pair.a.at_start(move || {
        let only = |dir: &Path| std::fs::read_dir(dir).unwrap().next().unwrap().unwrap().path();
        let slot = only(&only(&jobs));
        std::fs::rename(&slot, slot.with_extension("away")).unwrap();
        std::os::unix::fs::symlink("nowhere", &slot).unwrap();
    });
    let run = pair.run(&pair.a);
    let event = pair.a.await_any(&["backup-failed", "backup-done"]);
    assert_eq!(event.code, "backup-failed");
    assert!(event.text.contains("result"), "{}", event.text);
    assert_eq!(std::fs::read_dir(repository.join("snapshots")).unwrap().count(), 0);
    assert_eq!(pair.entry(&pair.a, &run, "a").outcome, Outcome::Failed);
}

/// A pair whose job has its first slot in a minute.
fn scheduled(settings: Value) -> (Pair, Arc<ManualClock>, LogTime) {
    let (pair, clock) = Pair::by_clock(settings);
    let change = JobChange { schedule: Some("1 2 * * *".to_owned()), ..JobChange::default() };
    pair.a.scheduler.set_job("g", name("nightly"), change).unwrap();
    pair.link.ship();
    (pair, clock, time("2026-11-24T02:01:00Z"))
}

fn alarm_states(node: &Node) -> Vec<(String, LogTime)> {
    node.scheduler.alarms().into_iter().map(|alarm| (alarm.state, alarm.slot)).collect()
}

#[test]
fn a_slot_without_a_backup_is_raised_as_overdue_by_both_nodes() {
    let settings = json!({"placement": "secondary-only", "max_lag": "10s", "deadline": "5m",
        "run_limit": "10m"});
    let (pair, clock, slot) = scheduled(settings);
    pair.link.set_lag(Duration::from_secs(60));
    clock.advance(Duration::from_secs(60));
    for node in [&pair.a, &pair.b] {
        pair.await_open(node, slot);
    }
    clock.advance(Duration::from_secs(300));
    for node in [&pair.a, &pair.b] {
        assert_eq!(node.await_any(&["backup-failed"]).details["slot"], slot.to_string());
        assert!(alarm_states(node).is_empty(), "its time is not over");
    }
    clock.advance(Duration::from_secs(10 * 60 + 600));
    for node in [&pair.a, &pair.b] {
        let event = node.await_any(&["backup-overdue", "backup-unknown"]);
        assert_eq!((event.code.as_str(), event.severity), ("backup-overdue", Severity::Error));
        assert_eq!(event.details["slot"], slot.to_string());
        let states = wait_for("the alarm", || Some(alarm_states(node)).filter(|s| !s.is_empty()));
        assert_eq!(states, [("overdue".to_owned(), slot)]);
    }
}

#[test]
fn where_nobody_can_tell_of_a_slot_it_is_raised_as_unknown() {
    let settings = json!({"placement": "primary-only", "deadline": "5m", "run_limit": "10m"});
    let (pair, clock, slot) = scheduled(settings);
    pair.link.set_lost(Duration::from_secs(600));
    let (repository, away) = (pair.dir.path().join("repository"), pair.dir.path().join("away"));
    std::fs::rename(&repository, &away).unwrap();
    clock.advance(Duration::from_secs(60));
    assert_eq!(pair.a.await_any(&["backup-failed"]).details["slot"], slot.to_string());
    pair.b.await_any(&["backup-skipped"]);
    clock.advance(Duration::from_secs(5 * 60 + 10 * 60 + 600));
    for node in [&pair.a, &pair.b] {
        let event = node.await_any(&["backup-overdue", "backup-unknown"]);
        assert_eq!((event.code.as_str(), event.severity), ("backup-unknown", Severity::Error));
        let states = wait_for("the alarm", || Some(alarm_states(node)).filter(|s| !s.is_empty()));
        assert_eq!(states, [("unknown".to_owned(), slot)]);
    }
}

#[test]
fn a_restart_in_mid_backup_leaves_the_slot_to_be_made() {
    let (mut pair, clock, slot) = scheduled(json!({"placement": "primary-only"}));
    let config = pair.dir.path().join("repository/config");
    let (sender, hanging) = channel();
    pair.a.at_start(move || sender.send(Hanging::begin(config)).unwrap());
    clock.advance(Duration::from_secs(60));
    let hanging = hanging.recv_timeout(PATIENCE).unwrap();
    pair.a.scheduler.shutdown();
    hanging.end();
    let inside = pair.runtime.enter();
    pair.a.scheduler = (pair.a.new_scheduler)();
    drop(inside);
    // Its claim of the life before counts until it has stood still for its term.
    let done = wait_for("the backup", || {
        // Slowly: the repository's answers are believed for 30 s of this clock.
        clock.advance(Duration::from_secs(5));
        let event = pair.a.events.recv_timeout(Duration::from_secs(1)).ok()?;
        assert_ne!(event.code, "backup-failed", "{event:?}");
        (event.code == "backup-done").then_some(event)
    });
    assert_eq!(done.details["slot"], slot.to_string());
    let made: Vec<_> = pair.list(&pair.a).into_iter().filter(|entry| entry.id.is_some()).collect();
    assert_eq!(made.len(), 1, "{made:?}");
}

/// With the link to the new primary lost, the slot would fall to the one that was left behind.
#[test]
fn a_primary_that_has_just_started_waits_for_its_peers_and_held_back_makes_no_backup() {
    let (mut pair, clock) = Pair::by_clock(json!({"placement": "prefer-primary"}));
    pair.a.scheduler.shutdown();
    pair.a.registry.close();
    pair.link.set_lost(Duration::from_secs(600));
    *pair.link.groups.write().unwrap() = None;
    let inside = pair.runtime.enter();
    let env = Env { clock: clock.clone(), ..Env::real() };
    pair.a = Node::start("a", pair.dir.path(), &pair.link, env);
    drop(inside);
    let group = pair.a.group();
    assert!(group.awaits_answer());
    let scheduler = pair.a.scheduler.clone();
    let run = pair.runtime.spawn(async move { scheduler.run("g", "nightly").await });
    wait_for("the slot to be open", || {
        pair.list(&pair.a).into_iter().find(|entry| entry.outcome == Outcome::Running)
    });
    group.hold_back(2, "is about to follow b");
    let run = pair.runtime.block_on(run).unwrap().unwrap();
    assert_eq!(run.decision.decision, Verdict::Fail);
    let why = run.decision.reasons.iter().find(|reason| reason.code == "held-back");
    assert!(why.is_some_and(|why| why.text.contains("is about to follow b")), "{run:?}");
    // An operator has it serve nevertheless.
    group.promote("promote").unwrap();
    clock.advance(Duration::from_secs(1));
    assert_eq!(pair.run(&pair.a).decision.decision, Verdict::Run);
    // Nobody answers, and nobody waits longer: there is a backup all the same.
    pair.a.await_any(&["backup-done"]);
    pair.a.scheduler.shutdown();
    pair.a.registry.close();
    let inside = pair.runtime.enter();
    let env = Env { clock: clock.clone(), ..Env::real() };
    pair.a = Node::start("a", pair.dir.path(), &pair.link, env);
    drop(inside);
    clock.advance(Duration::from_secs(60));
    assert!(!pair.a.group().awaits_answer() && pair.a.group().is_asking());
    assert_eq!(pair.run(&pair.a).decision.decision, Verdict::Run);
}

#[test]
fn a_backup_that_was_marked_as_a_branch_is_listed_as_failed_and_why() {
    let pair = Pair::new(json!({"placement": "primary-only"}));
    let run = pair.run(&pair.a);
    pair.a.await_event("backup-done");
    let id = pair.entry(&pair.a, &run, "a").id.unwrap();
    let tidelog = pair.dir.path().join("repository/tidelog");
    std::fs::create_dir_all(tidelog.join("marks")).unwrap();
    std::fs::write(tidelog.join("marks").join(&id), "{\"branch\":\"rewound\"}").unwrap();
    std::fs::remove_dir_all(tidelog.join("slots")).unwrap();
    let entry = pair.entry(&pair.a, &run, "a");
    assert_eq!((entry.outcome, entry.branch.as_deref()), (Outcome::Failed, Some("rewound")));
    assert_eq!(entry.id, Some(id), "it can still be restored");
}
