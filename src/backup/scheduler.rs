//! The scheduler: which slots are open, a thread for each, what peers ask and tell about them, and
//! which slots never got a backup.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::active::{Active, OpenedBy};
use super::conversation::Published;
use super::decision::{Decision, Explanation, explain};
use super::error::BackupError;
use super::facts::NodeFacts;
use super::failures::Failure;
use super::gather::others;
use super::history::History;
use super::job::JobSettings;
use super::jobs::{JobChange, changed_job};
use super::objects::Objects;
use super::overdue::Watch;
use super::peer::PeerCalls;
use super::reach::Reach;
use super::repository::{Repository, RepositoryConfig, RepositoryError};
use super::run::PeerPhase;
use crate::agent::LoadMeter;
use crate::config;
use crate::events::Severity;
use crate::group::{Group, GroupContext, Registry};
use crate::log::control::{Control, JobRecord};
use crate::units::{EpochId, GroupId, LogTime, Lsn, Name, Span};

/// What the scheduler needs of the node's configuration.
#[derive(Clone, Debug)]
pub struct BackupConfig {
    /// Where backups can go.
    pub repositories: Vec<RepositoryConfig>,
    /// The node's data directory: where its state file lies, and whose free space counts.
    pub data_dir: PathBuf,
    /// How often an open slot is looked at.
    pub tick: Duration,
    /// How often a claim is renewed.
    pub claim_renew: Span,
    /// How long a claim's counter may stand still.
    pub claim_term: Span,
    /// What the nodes' clocks may differ by, before a slot is overdue.
    pub allowance: Span,
    /// How long a shutdown waits for runs and threads to end.
    pub shutdown_patience: Duration,
}

impl BackupConfig {
    /// The defaults, with the repositories of a configuration.
    #[must_use]
    pub fn new(data_dir: &Path, repositories: &[config::RepositoryConfig]) -> BackupConfig {
        BackupConfig {
            repositories: repositories
                .iter()
                .map(|repository| RepositoryConfig {
                    name: repository.name.to_string(),
                    url: repository.url.display().to_string(),
                    password_file: repository.password_file.clone(),
                })
                .collect(),
            data_dir: data_dir.to_path_buf(),
            tick: Duration::from_secs(1),
            claim_renew: Span::from_secs(10),
            claim_term: Span::from_secs(60),
            allowance: Span::from_secs(600),
            shutdown_patience: Duration::from_secs(10),
        }
    }
}

/// A run that was started by command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunStarted {
    /// The group.
    pub group: Name,
    /// The job.
    pub job: Name,
    /// The moment of the command.
    pub slot: LogTime,
    /// This node.
    pub node: Name,
    /// What it decided first.
    #[serde(flatten)]
    pub decision: Decision,
    /// The peers that were told, and those that could not be.
    pub told: Vec<Name>,
    /// Peers that could not be told, with the cause.
    pub not_told: Vec<String>,
}

/// A slot without a backup, or one of which nobody can say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SlotAlarm {
    /// The group.
    pub group: Name,
    /// The job.
    pub job: Name,
    /// The slot.
    pub slot: LogTime,
    /// `overdue` or `unknown`; `failed` of a run.
    pub state: String,
    /// Why.
    pub text: String,
}

/// A slot of a job of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct RunKey {
    pub group: GroupId,
    pub job: EpochId,
    pub slot: LogTime,
}

impl RunKey {
    /// Whether both are slots of one job.
    pub(super) fn is_of(&self, other: &RunKey) -> bool {
        (self.group, self.job) == (other.group, other.job)
    }
}

#[derive(Default)]
pub(super) struct State {
    pub(super) active: HashMap<RunKey, Active>,
    pub(super) published: HashMap<RunKey, Published>,
    /// The position that this node, as primary, held when a slot came.
    pub(super) slot_lsn: HashMap<RunKey, Lsn>,
    pub(super) peer_facts: HashMap<(GroupId, EpochId), (NodeFacts, Duration)>,
    /// First decisions of runs that have ended, for those who wait for them.
    pub(super) decided: HashMap<RunKey, Decision>,
    pub(super) alarms: BTreeMap<(Name, Name), SlotAlarm>,
    pub(super) watches: HashMap<EpochId, Watch>,
    /// By group and job.
    pub(super) failures: BTreeMap<(Name, Name), Failure>,
    /// Slots that went by behind one that is still open, each of which was looked for.
    pub(super) missed: HashSet<(EpochId, LogTime)>,
    pub(super) complained: HashSet<(EpochId, LogTime)>,
    pub(super) stopping: bool,
    /// The thread that opens slots runs.
    keeps_time: bool,
}

impl State {
    /// Keeps a run's first decision for those who wait for it; the memory is bounded.
    pub(super) fn remember_decided(&mut self, key: RunKey, decision: Decision) {
        if self.decided.len() > 256 {
            self.decided.clear();
        }
        self.decided.insert(key, decision);
    }
}

pub(super) struct Inner {
    pub(super) config: BackupConfig,
    pub(super) context: GroupContext,
    pub(super) registry: Arc<Registry>,
    pub(super) peers: Arc<dyn PeerCalls>,
    pub(super) runtime: tokio::runtime::Handle,
    repositories: BTreeMap<String, Arc<Reach>>,
    pub(super) meter: LoadMeter,
    pub(super) history: History,
    state: Mutex<State>,
    pub(super) changed: Condvar,
}

/// The scheduler of a node.
pub struct Scheduler {
    inner: Arc<Inner>,
}

impl Scheduler {
    /// Starts the scheduler. Must run inside a tokio runtime, on which peers are called.
    ///
    /// # Errors
    ///
    /// Where a repository's configuration is wrong, or no thread can be had.
    pub fn start(
        config: BackupConfig,
        context: GroupContext,
        registry: Arc<Registry>,
        peers: Arc<dyn PeerCalls>,
    ) -> Result<Arc<Scheduler>, BackupError> {
        let mut repositories = BTreeMap::new();
        for repository in &config.repositories {
            let writer = context.env.entropy.next_u64();
            let opened = Repository::new(repository.clone(), writer)?;
            let reach = Reach::new(opened, Arc::clone(&context.env.clock))
                .map_err(|error| BackupError::Internal(error.to_string()))?;
            repositories.insert(repository.name.clone(), Arc::new(reach));
        }
        let history = History::open(&config.data_dir.join("node").join("backup-runs"));
        let inner = Arc::new(Inner {
            runtime: tokio::runtime::Handle::current(),
            config,
            context,
            registry,
            peers,
            repositories,
            meter: LoadMeter::new(),
            history,
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
        });
        inner.answer_peers();
        let for_thread = Arc::clone(&inner);
        inner.lock().keeps_time = true;
        std::thread::Builder::new()
            .name("backup-slots".to_owned())
            .spawn(move || {
                for_thread.keep_time();
                for_thread.lock().keeps_time = false;
                for_thread.changed.notify_all();
            })
            .map_err(|error| BackupError::Internal(error.to_string()))?;
        Ok(Arc::new(Scheduler { inner }))
    }

    /// Ends runs and threads; a run that is cut short leaves its slot to the other node. What does
    /// not end in time, because its repository hangs, is left behind and named in the log.
    pub fn shutdown(&self) {
        let inner = &self.inner;
        let mut state = inner.lock();
        state.stopping = true;
        inner.changed.notify_all();
        let busy = |state: &mut State| {
            for active in state.active.values() {
                active.stop.stop("the node is shutting down");
            }
            state.keeps_time || !state.active.is_empty()
        };
        let wait = inner.changed.wait_timeout_while(state, inner.config.shutdown_patience, busy);
        state = wait.expect("no holder panics").0;
        for (key, active) in &state.active {
            let (group, job) = &active.name;
            tracing::warn!("job {group}/{job}: the run of slot {} does not end", key.slot);
        }
        if state.keeps_time {
            tracing::warn!("the thread that opens slots does not end");
        }
    }

    /// Starts a run of a job, here and on the peers that hold the group; returns when this node has
    /// decided.
    ///
    /// # Errors
    ///
    /// Where there is no such group or job, or its settings are wrong.
    pub async fn run(&self, group: &str, job: &str) -> Result<RunStarted, BackupError> {
        let inner = Arc::clone(&self.inner);
        let (group, job) = (group.to_owned(), job.to_owned());
        blocking(move || inner.run_now(&group, &job)).await
    }

    /// The decision for a job as it would be now, without running anything.
    ///
    /// # Errors
    ///
    /// Where there is no such group or job, or an assumption is none.
    pub async fn explain(
        &self,
        group: &str,
        job: &str,
        assume: &[(String, String)],
    ) -> Result<Explanation, BackupError> {
        let inner = Arc::clone(&self.inner);
        let (group, job, assume) = (group.to_owned(), job.to_owned(), assume.to_vec());
        blocking(move || {
            let (group, job, mut settings) = inner.job(&group, &job)?;
            let slot = inner.open_slot(&group, &job);
            let (mut facts, _) = inner.gather(&group, &job, slot);
            if let Some(slot) = slot {
                let now = inner.context.env.clock.wall();
                let key = RunKey { group: group.id(), job: job.id, slot };
                facts.next_due = inner.next_due(&key);
                facts.deadline_passed =
                    facts.next_due.is_some() || now >= slot.after(settings.deadline.0);
            }
            for (key, value) in &assume {
                facts.assume(&mut settings, key, value)?;
            }
            Ok(explain(&facts, &settings))
        })
        .await
    }

    /// The jobs of a group.
    ///
    /// # Errors
    ///
    /// Where there is no such group.
    pub fn jobs(&self, group: &str) -> Result<Vec<JobRecord>, BackupError> {
        let group = self.inner.registry.by_name(group)?;
        Ok(group.control().jobs.iter().filter(|job| !job.removed).cloned().collect())
    }

    /// Makes or changes a job; this node must be the primary. Where nothing changes, nothing is
    /// appended.
    ///
    /// # Errors
    ///
    /// Where the change is wrong or cannot be appended.
    pub fn set_job(
        &self,
        group: &str,
        job: Name,
        change: JobChange,
    ) -> Result<JobRecord, BackupError> {
        let group = self.inner.registry.by_name(group)?;
        let env = &self.inner.context.env;
        let control = group.control();
        let existing = control.jobs.iter().find(|known| known.name == job && !known.removed);
        let id = EpochId(env.entropy.next_u64());
        let record = changed_job(existing, job, change, id, env.clock.wall())?;
        if existing == Some(&record) {
            // What another command appended a moment ago may not be durable yet.
            group.sync_now()?;
        } else {
            group.append_control(Control::Job(record.clone()))?;
        }
        Ok(record)
    }

    /// Removes a job; its backups stay.
    ///
    /// # Errors
    ///
    /// Where there is no such job, or the record cannot be appended.
    pub fn remove_job(&self, group: &str, job: &str) -> Result<(), BackupError> {
        let (group, record) = self.inner.job_record(group, job)?;
        group.append_control(Control::Job(JobRecord { removed: true, ..record }))?;
        Ok(())
    }

    /// Slots that have no backup, or of which nobody can say.
    #[must_use]
    pub fn alarms(&self) -> Vec<SlotAlarm> {
        self.inner.lock().alarms.values().cloned().collect()
    }

    /// Jobs whose newest run failed here, and has not been made up for, as far as is known; the
    /// state of each is `failed`.
    #[must_use]
    pub fn failures(&self) -> Vec<SlotAlarm> {
        self.inner.lock().failures.values().filter_map(Failure::told).cloned().collect()
    }

    /// How far the run of a job is: bytes done and to do.
    #[must_use]
    pub fn progress(&self, group: &str, job: &str) -> Option<(u64, u64)> {
        let state = self.inner.lock();
        let mut active = state.active.values();
        active
            .find(|active| {
                active.name.0.as_str() == group
                    && active.name.1.as_str() == job
                    && active.phase == PeerPhase::Running
            })
            .map(|active| active.progress.bytes())
    }

    pub(super) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.inner.lock().stopping = true;
        self.inner.changed.notify_all();
    }
}

/// Runs blocking work beside the runtime's own threads.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BackupError> + Send + 'static,
) -> Result<T, BackupError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(BackupError::Internal(error.to_string())),
    }
}

impl Inner {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.lock().stopping
    }

    /// Waits until something changed, or a time is over; a moment only while the node shuts down.
    pub(super) fn wait(&self, at_most: Duration) {
        let state = self.lock();
        let at_most = if state.stopping { at_most.min(Duration::from_millis(10)) } else { at_most };
        drop(self.changed.wait_timeout(state, at_most).expect("no holder panics"));
    }

    pub(super) fn repository(&self, name: &str) -> Result<Arc<Reach>, RepositoryError> {
        let known = self.repositories.get(name).cloned();
        known.ok_or_else(|| RepositoryError::Unknown { name: name.to_owned() })
    }

    pub(super) fn repositories(&self) -> impl Iterator<Item = &Arc<Reach>> {
        self.repositories.values()
    }

    fn job_record(&self, group: &str, job: &str) -> Result<(Arc<Group>, JobRecord), BackupError> {
        let group = self.registry.by_name(group)?;
        let control = group.control();
        let record = control.jobs.iter().find(|known| known.name.as_str() == job && !known.removed);
        match record {
            Some(record) => Ok((group.clone(), record.clone())),
            None => Err(BackupError::NoJob { group: group.name().clone(), job: job.to_owned() }),
        }
    }

    fn job(
        &self,
        group: &str,
        job: &str,
    ) -> Result<(Arc<Group>, JobRecord, JobSettings), BackupError> {
        let (group, record) = self.job_record(group, job)?;
        let settings = JobSettings::parse(&record.settings)?;
        Ok((group, record, settings))
    }

    fn open_slot(&self, group: &Group, job: &JobRecord) -> Option<LogTime> {
        let state = self.lock();
        let keys = state.active.keys().filter(|key| key.group == group.id() && key.job == job.id);
        keys.map(|key| key.slot).max()
    }

    fn run_now(self: &Arc<Self>, group: &str, job: &str) -> Result<RunStarted, BackupError> {
        let (group, job, settings) = self.job(group, job)?;
        let slot = self.context.env.clock.wall();
        let key = RunKey { group: group.id(), job: job.id, slot };
        let name = job.name.clone();
        self.open(&group, job, settings, slot, OpenedBy::Command)?;
        let (mut told, mut not_told) = (Vec::new(), Vec::new());
        // Each node decides for itself, as in a slot of the schedule.
        let first = self.nodes(&group).other;
        let mut peers = others(&group.control(), self.context.node.id);
        peers.retain(|peer| first.as_ref() != Some(peer));
        for peer in first.into_iter().chain(peers) {
            match self.tell_start(&peer, &key) {
                Ok(()) => told.push(peer),
                Err(error) => not_told.push(format!("{peer}: {error}")),
            }
        }
        let mut state = self.lock();
        let decision = loop {
            let now = state.active.get(&key).and_then(|active| active.decision.clone());
            if let Some(decision) = now.or_else(|| state.decided.get(&key).cloned()) {
                break decision;
            }
            if state.stopping {
                return Err(BackupError::Internal("the node is shutting down".to_owned()));
            }
            let wait = self.changed.wait_timeout(state, Duration::from_secs(1));
            state = wait.expect("no holder panics").0;
        };
        drop(state);
        let node = self.context.node.name.clone();
        Ok(RunStarted {
            group: group.name().clone(),
            job: name,
            slot,
            node,
            decision,
            told,
            not_told,
        })
    }

    pub(super) fn emit(
        &self,
        severity: Severity,
        code: &str,
        group: &Name,
        job: &Name,
        slot: Option<LogTime>,
        text: &str,
    ) {
        let details = json!({ "job": job, "slot": slot });
        let text = format!("job {group}/{job}: {text}");
        self.context.events.emit(severity, code, Some(group.as_str()), text, details);
    }

    /// What was said about a backup after it was made: its image is on a branch.
    pub(super) fn mark(&self, objects: &dyn Objects, id: &str) -> Option<String> {
        let body = objects.read(&format!("marks/{id}")).ok()??;
        let value: Value = serde_json::from_slice(&body).ok()?;
        value["branch"].as_str().map(str::to_owned)
    }
}
