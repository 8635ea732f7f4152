//! Builds one node from its configuration and runs it: the only place that knows all the parts.
//!
//! Order matters: the data directory is locked, identity and events are read, groups recover, and
//! only then do listeners open. Draining goes the other way round: listeners close, requests in
//! flight are answered, groups are synced and marked clean.

use std::collections::HashMap;
use std::fmt::Display;
use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock, Weak};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::backup::{BackupConfig, ReplicationPeers, Scheduler};
use crate::config::{Config, ListenAddress, cause};
use crate::control::{
    Context, ControlServer, FileJournal, MetricsServer, answer_peers, start_notifying,
};
use crate::events::{Events, Severity};
use crate::group::{GroupContext, LocalLimits, NodeIdentity, Registry};
use crate::io::{Disk, Env, OpenMode};
use crate::nbd::{GroupExports, NbdCounters, NbdLimits, NbdListen, NbdServer, listen};
use crate::replication::{Replication, ReplicationConfig};
use crate::units::NodeId;

/// A node that stops waits so long for what replication writes last: its groups are closed after.
const REPLICATION_PATIENCE: Duration = Duration::from_secs(5);
/// How often a group that found no room on the disk is opened again.
const REOPEN_EVERY: Duration = Duration::from_secs(5);

/// A node that cannot be built: object, what, cause, next command.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NodeError(String);

impl NodeError {
    fn new(error: impl Display) -> NodeError {
        NodeError(error.to_string())
    }
}

/// A running node.
pub struct Node {
    context: Arc<Context>,
    nbd: Vec<NbdServer>,
    control: ControlServer,
    metrics: Option<MetricsServer>,
    /// Held until the process ends: no second node may use the data directory.
    _lock: Flock<File>,
}

impl Node {
    /// Builds the node and opens its listeners. Must run inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// Where the data directory is in use or cannot be read, or a listener's address is taken. A
    /// group that cannot be opened is left as it is, and told by an event.
    pub async fn start(config: Config) -> Result<Node, NodeError> {
        let (lock, is_new) = lock_data_dir(&config.data_dir)?;
        let data_dir = config.data_dir.clone();
        let started = Node::start_locked(config, lock).await;
        if is_new && started.is_err() {
            // Nobody was served: a start that was refused leaves nothing behind.
            let empty = std::fs::remove_dir(data_dir.join("groups"));
            if empty.is_ok() || matches!(data_dir.join("groups").try_exists(), Ok(false)) {
                let _ = std::fs::remove_dir_all(&data_dir);
            }
        }
        started
    }

    async fn start_locked(config: Config, lock: Flock<File>) -> Result<Node, NodeError> {
        let env = Env::real();
        let node = identity(&env, &config)?;
        let events = open_events(&env, &config.data_dir)?;
        let groups = GroupContext {
            env: env.clone(),
            node: node.clone(),
            limits: LocalLimits {
                window: config.limits.window.map(|span| span.0),
                log_limit_bytes: config.limits.log_limit.map(|size| size.0),
                disk_reserve_bytes: config.limits.disk_reserve.map(|size| size.0),
            },
            failures: config.control.socket.parent().map(Path::to_owned),
            events: events.clone(),
        };
        let dir = config.data_dir.join("groups");
        let for_registry = groups.clone();
        let registry = tokio::task::spawn_blocking(move || Registry::open(for_registry, &dir))
            .await
            .map_err(NodeError::new)?
            .map_err(NodeError::new)?;
        let replication =
            Replication::start(replication_config(&config), groups.clone(), registry.clone())
                .map_err(NodeError::new)?;
        let peers = Arc::new(ReplicationPeers::new(replication.clone(), env.clock.clone()));
        let backup_config = BackupConfig::new(&config.data_dir, &config.repository);
        let scheduler = Scheduler::start(backup_config, groups, registry.clone(), peers)
            .map_err(NodeError::new)?;
        let nbd_counters = Arc::new(NbdCounters::default());
        let nbd = start_nbd(&config, &registry, &nbd_counters)?;
        let metrics_listen = config.metrics.as_ref().map(|metrics| metrics.listen);
        let context = Arc::new(Context {
            env,
            node,
            config: RwLock::new(config),
            events: events.clone(),
            registry,
            replication,
            scheduler,
            tickets: Mutex::new(HashMap::new()),
            nbd_counters,
        });
        answer_peers(&context);
        start_notifying(&context);
        tokio::spawn(keep_opening(Arc::downgrade(&context.registry)));
        let control = ControlServer::start(context.clone()).await.map_err(NodeError::new)?;
        let metrics = match metrics_listen {
            Some(listen) => {
                Some(MetricsServer::start(context.clone(), listen).await.map_err(NodeError::new)?)
            }
            None => None,
        };
        events.emit(
            Severity::Info,
            "started",
            None,
            format!("node {}: started, version {}", context.node.name, env!("CARGO_PKG_VERSION")),
            serde_json::json!({ "version": env!("CARGO_PKG_VERSION"), "id": context.node.id }),
        );
        Ok(Node { context, nbd, control, metrics, _lock: lock })
    }

    /// This node's identity.
    #[must_use]
    pub fn identity(&self) -> &NodeIdentity {
        &self.context.node
    }

    /// Takes over what can change while the node runs: who may use the control socket. Anything
    /// else that changed is reported as waiting for a restart.
    pub fn reload(&self, new: Config) {
        let mut config = self.context.config.write().expect("no holder panics");
        let mut reloaded = config.clone();
        reloaded.control.allow.clone_from(&new.control.allow);
        reloaded.notify.clone_from(&new.notify);
        let (severity, text) = if reloaded == new {
            (Severity::Info, "configuration reloaded".to_owned())
        } else {
            let waiting = "configuration reloaded: control.allow and notify hold now, what else \
                           changed takes a restart";
            (Severity::Warning, waiting.to_owned())
        };
        let shared = !reloaded.control.allow.is_empty();
        *config = reloaded;
        drop(config);
        let (severity, text) = match self.control.share(shared) {
            Ok(()) => (severity, text),
            Err(error) => (Severity::Warning, format!("{text}; {error}")),
        };
        self.context.events.emit(severity, "reloaded", None, text, serde_json::Value::Null);
    }

    /// Closes the listeners, answers what is in flight, syncs the groups and marks them clean.
    pub async fn stop(self) {
        let events = self.context.events.clone();
        let name = self.context.node.name.clone();
        if let Some(metrics) = self.metrics {
            metrics.stop();
        }
        let (nbd, registry) = (self.nbd, self.context.registry.clone());
        let drained = tokio::task::spawn_blocking(move || {
            for server in nbd {
                server.shutdown();
            }
        });
        if let Err(error) = drained.await {
            tracing::error!("closing the NBD listeners: {error}");
        }
        self.control.stop().await;
        let scheduler = self.context.scheduler.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || scheduler.shutdown()).await {
            tracing::error!("ending the runs: {error}");
        }
        self.context.replication.stop_within(REPLICATION_PATIENCE).await;
        let closed = tokio::task::spawn_blocking(move || registry.close()).await;
        if let Err(error) = closed {
            tracing::error!("closing the groups: {error}");
        }
        events.emit(
            Severity::Info,
            "stopped",
            None,
            format!("node {name}: stopped"),
            serde_json::Value::Null,
        );
    }
}

/// Opens the groups that found no room on the disk once there is some, until the node ends.
async fn keep_opening(registry: Weak<Registry>) {
    let mut ticks = tokio::time::interval(REOPEN_EVERY);
    loop {
        ticks.tick().await;
        let Some(registry) = registry.upgrade() else { return };
        if let Err(error) = tokio::task::spawn_blocking(move || registry.open_rest()).await {
            tracing::error!("opening the rest of the groups: {error}");
        }
    }
}

fn replication_config(config: &Config) -> ReplicationConfig {
    // Without [peer] nobody can dial this node, and what it once dialled it still does.
    let peer = config.peer.clone();
    let timing = peer.clone().unwrap_or_default();
    ReplicationConfig {
        listen: peer.as_ref().map(|peer| peer.listen),
        advertise: peer.and_then(|peer| peer.advertise),
        state_dir: config.data_dir.join("node"),
        heartbeat: timing.heartbeat.0,
        lost_after: timing.lost_after.0,
    }
}

fn start_nbd(
    config: &Config,
    registry: &Arc<Registry>,
    counters: &Arc<NbdCounters>,
) -> Result<Vec<NbdServer>, NodeError> {
    let defaults = NbdLimits::default();
    let limits = NbdLimits {
        connections: config.limits.connections.unwrap_or(defaults.connections),
        ..defaults
    };
    let exports = Arc::new(GroupExports::new(registry.clone()));
    let mut servers = Vec::new();
    for nbd in &config.nbd {
        if let ListenAddress::Unix(path) = &nbd.listen {
            make_socket_dir(path)?;
        }
        let mut at = NbdListen::new(nbd.listen.to_string().parse().map_err(NodeError::new)?);
        for network in &nbd.allow {
            at.allow.push(network.to_string().parse().map_err(NodeError::new)?);
        }
        let server = listen(at, exports.clone(), limits.clone(), counters.clone());
        servers.push(server.map_err(|error| {
            NodeError::new(format!("{error}; choose another `listen` under [[nbd]]"))
        })?);
    }
    Ok(servers)
}

/// Makes the directory of a socket where it is missing, for this user alone.
fn make_socket_dir(socket: &Path) -> Result<(), NodeError> {
    let Some(directory) = socket.parent().filter(|directory| !directory.exists()) else {
        return Ok(());
    };
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.map_err(|error| {
        NodeError::new(format!(
            "nbd listener unix:{}: its directory could not be made: {}; choose another `listen` \
             under [[nbd]]",
            socket.display(),
            cause(&error)
        ))
    })
}

/// Makes the data directory where it is missing, and takes it for this process alone; whether it
/// was made.
fn lock_data_dir(data_dir: &Path) -> Result<(Flock<File>, bool), NodeError> {
    let failed = |what: &str, error: &std::io::Error| {
        NodeError::new(format!(
            "data_dir {}: {what}: {}; give a directory that this user may write",
            data_dir.display(),
            cause(error)
        ))
    };
    let node_dir = data_dir.join("node");
    let is_new = !data_dir.try_exists().map_err(|error| failed("could not be read", &error))?;
    make_private_dir(&node_dir, data_dir).map_err(|error| failed("could not be made", &error))?;
    let path = node_dir.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| failed("could not be written", &error))?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        if errno == nix::errno::Errno::EWOULDBLOCK {
            NodeError::new(format!(
                "data_dir {}: another node runs on it; stop that one, or give another data_dir",
                data_dir.display()
            ))
        } else {
            failed("could not be locked", &errno.into())
        }
    })?;
    Ok((lock, is_new))
}

/// Makes a directory in the data directory: both for this user alone, since the contents of volumes
/// lie there, and what leads to them as anybody would. What is there is left as it is.
fn make_private_dir(path: &Path, data_dir: &Path) -> std::io::Result<()> {
    if let Some(parent) = data_dir.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// What `node/identity` holds.
#[derive(Serialize, Deserialize)]
struct StoredIdentity {
    id: NodeId,
}

/// The node's identity, made at its first start and never changed.
fn identity(env: &Env, config: &Config) -> Result<NodeIdentity, NodeError> {
    let path = config.data_dir.join("node/identity");
    let failed = |what: &str, error: &dyn Display| {
        NodeError::new(format!("identity {}: {what}: {error}", path.display()))
    };
    let is_there = env.disk.exists(&path);
    let stored = if is_there.map_err(|error| failed("could not be looked for", &cause(&error)))? {
        let bytes = read_file(env.disk.as_ref(), &path)
            .map_err(|error| failed("could not be read", &cause(&error)))?;
        serde_json::from_slice(&bytes).map_err(|error| {
            failed("is damaged; restore it from a copy of the data directory", &error)
        })?
    } else {
        let stored = StoredIdentity { id: NodeId(env.entropy.next_id()) };
        let bytes = serde_json::to_vec(&stored).map_err(NodeError::new)?;
        write_file(env.disk.as_ref(), &path, &bytes)
            .map_err(|error| failed("could not be written", &cause(&error)))?;
        stored
    };
    Ok(NodeIdentity { id: stored.id, name: config.node.clone() })
}

fn read_file(disk: &dyn Disk, path: &Path) -> std::io::Result<Vec<u8>> {
    let file = disk.open(path, OpenMode::Read)?;
    let mut bytes = vec![0; usize::try_from(file.len()?).unwrap_or(0)];
    file.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// A new file under a temporary name that takes the name once it is durable.
fn write_file(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let new_path: PathBuf = path.with_extension("new");
    let file = disk.open(&new_path, OpenMode::Create)?;
    file.set_len(0)?;
    file.write_at(&[std::io::IoSlice::new(bytes)], 0)?;
    file.sync()?;
    disk.rename(&new_path, path)?;
    path.parent().map_or(Ok(()), |directory| disk.sync_dir(directory))
}

fn open_events(env: &Env, data_dir: &Path) -> Result<Events, NodeError> {
    let path = data_dir.join("events");
    let (journal, kept) = FileJournal::open(env.disk.clone(), &path).map_err(|error| {
        NodeError::new(format!("events {}: could not be opened: {}", path.display(), cause(&error)))
    })?;
    let clock = env.clock.clone();
    Ok(Events::new(Arc::new(move || clock.wall()), kept, Some(Arc::new(journal))))
}
