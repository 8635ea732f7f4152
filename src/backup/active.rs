//! The slots that are open on this node: a thread for each, what it is about, and since when.
//!
//! Slots of a job that come while an older one only waits end its waiting. While one is really
//! being made, the newest waits for its end, but never for longer than its run limit; a run by
//! command is skipped.

use std::sync::Arc;
use std::time::Duration;

use super::branches::Reigns;
use super::catalog::{BackupEntry, Outcome};
use super::claim::SlotResult;
use super::decision::Decision;
use super::error::BackupError;
use super::facts::Reason;
use super::job::JobSettings;
use super::run::PeerPhase;
use super::runner::{Task, missed_entry};
use super::scheduler::{Inner, RunKey};
use super::source::{Progress, Stop};
use crate::events::Severity;
use crate::group::{Group, Role};
use crate::log::control::JobRecord;
use crate::units::{LogTime, Name, Span};

/// What opened a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OpenedBy {
    /// The schedule.
    Schedule,
    /// A person, here or on the peer.
    Command,
}

/// A slot that is open here.
pub(super) struct Active {
    /// Group and job.
    pub(super) name: (Name, Name),
    pub(super) phase: PeerPhase,
    /// What was decided last.
    pub(super) decision: Option<Decision>,
    /// Who is making the backup, as far as this node knows, and since when it knows.
    at_work: Option<(Name, Duration)>,
    /// The job's next slot, once it is due.
    pub(super) next_due: Option<LogTime>,
    pub(super) stop: Stop,
    pub(super) progress: Progress,
    started: Duration,
    run_limit: Span,
    opened_by: OpenedBy,
}

impl Active {
    /// The node that is making the backup, unless it is over its limit.
    fn busy(&self, now: Duration) -> Option<&Name> {
        let (node, since) = self.at_work.as_ref()?;
        (now.saturating_sub(*since) < self.run_limit.0).then_some(node)
    }

    /// Whether its outcome is still open.
    fn is_open(&self) -> bool {
        matches!(self.phase, PeerPhase::Deciding | PeerPhase::Running)
    }
}

impl Inner {
    /// Opens a slot on a thread of its own; nothing where it is open or over.
    pub(super) fn open(
        self: &Arc<Self>,
        group: &Arc<Group>,
        job: JobRecord,
        settings: JobSettings,
        slot: LogTime,
        opened_by: OpenedBy,
    ) -> Result<(), BackupError> {
        let key = RunKey { group: group.id(), job: job.id, slot };
        if self.history.run(group.name(), &job.name, slot).is_some() {
            return Ok(());
        }
        let running_on = {
            let mut state = self.lock();
            if state.active.contains_key(&key) || state.decided.contains_key(&key) {
                return Ok(());
            }
            let now = self.context.env.clock.monotonic();
            let mut others: Vec<&mut Active> = state
                .active
                .iter_mut()
                .filter(|(other, active)| other.is_of(&key) && active.is_open())
                .map(|(_, active)| active)
                .collect();
            let mut running = others.iter().find_map(|active| active.busy(now).cloned());
            match opened_by {
                // A second run by command adds nothing to one that only waits.
                OpenedBy::Command if running.is_none() => {
                    running = others.first().map(|active| {
                        let named = active.decision.as_ref().and_then(|it| it.run_on.clone());
                        named.unwrap_or_else(|| self.context.node.name.clone())
                    });
                }
                OpenedBy::Command => {}
                OpenedBy::Schedule => {
                    for active in others.iter_mut().filter(|active| active.busy(now).is_none()) {
                        active.next_due.get_or_insert(slot);
                    }
                }
            }
            state.active.insert(
                key,
                Active {
                    name: (group.name().clone(), job.name.clone()),
                    phase: PeerPhase::Deciding,
                    decision: None,
                    at_work: None,
                    next_due: None,
                    stop: Stop::new(),
                    progress: Progress::new(),
                    started: now,
                    run_limit: settings.run_limit,
                    opened_by,
                },
            );
            running
        };
        if group.role() == Role::Primary {
            // What hosts were answered before the slot belongs into its backup.
            match group.sync_now() {
                Ok(lsn) => drop(self.lock().slot_lsn.insert(key, lsn)),
                Err(error) => tracing::warn!("group {}: {error}", group.name()),
            }
        }
        let inner = Arc::clone(self);
        let scheduled = opened_by == OpenedBy::Schedule;
        let group = Arc::clone(group);
        let task = Task { group, job, settings, key, scheduled, running_on };
        let work = move || {
            let repository = task.job.repository.clone();
            inner.drive(task);
            inner.forget(&key);
            if !inner.is_stopping() {
                inner.note_backups(&repository);
            }
        };
        let spawned = std::thread::Builder::new().name("backup-run".to_owned()).spawn(work);
        spawned.map(drop).map_err(|error| {
            self.forget(&key);
            BackupError::Internal(error.to_string())
        })
    }

    /// Whether a slot is further ahead than clocks may differ by.
    pub(super) fn is_ahead(&self, slot: LogTime) -> bool {
        slot > self.context.env.clock.wall().after(self.config.allowance.0)
    }

    fn forget(&self, key: &RunKey) {
        let mut state = self.lock();
        state.active.remove(key);
        state.published.remove(key);
        state.slot_lsn.remove(key);
        drop(state);
        self.changed.notify_all();
    }

    /// The slot is decided upon or waits; `at_work` is the other node that is making its backup.
    pub(super) fn set_waiting(
        &self,
        key: &RunKey,
        decision: Option<Decision>,
        at_work: Option<&Name>,
    ) {
        let now = self.context.env.clock.monotonic();
        let mut state = self.lock();
        let Some(active) = state.active.get_mut(key) else { return };
        let known = active.at_work.take().filter(|(node, _)| Some(node) == at_work);
        active.at_work = known.or_else(|| Some((at_work?.clone(), now)));
        let changed = active.phase != PeerPhase::Deciding || active.decision.is_none();
        active.phase = PeerPhase::Deciding;
        if decision.is_some() {
            active.decision = decision;
        }
        drop(state);
        if changed {
            self.changed.notify_all();
        }
    }

    /// The slot's backup is made here from now on; refused with this node's name while it makes
    /// another one of the job.
    pub(super) fn set_running(&self, key: &RunKey, decision: &Decision) -> Result<(), Name> {
        let now = self.context.env.clock.monotonic();
        let this = &self.context.node.name;
        let mut state = self.lock();
        let mut others = state.active.iter().filter(|(other, _)| *other != key && other.is_of(key));
        if others.any(|(_, active)| active.is_open() && active.busy(now) == Some(this)) {
            return Err(this.clone());
        }
        if let Some(active) = state.active.get_mut(key) {
            active.phase = PeerPhase::Running;
            active.decision = Some(decision.clone());
            active.at_work = Some((this.clone(), now));
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// The node that makes a backup of another slot of the job, as far as this one knows.
    pub(super) fn running_other(&self, key: &RunKey) -> Option<Name> {
        let now = self.context.env.clock.monotonic();
        let state = self.lock();
        let mut others = state.active.iter().filter(|(other, _)| *other != key && other.is_of(key));
        others.find_map(|(_, other)| other.is_open().then(|| other.busy(now).cloned())?)
    }

    /// A slot was dealt with; those that are open are not, whatever came after them.
    pub(super) fn set_handled(&self, key: &RunKey) {
        let state = self.lock();
        let open = state.active.iter().filter(|(other, active)| {
            *other != key
                && other.is_of(key)
                && active.is_open()
                && active.opened_by == OpenedBy::Schedule
        });
        let oldest = open.map(|(other, _)| other.slot).min();
        drop(state);
        let up_to = oldest.map_or(key.slot, |open| key.slot.min(LogTime(open.0 - 1)));
        self.history.set_handled(key.job, up_to);
    }

    /// The job's next slot, once it is due.
    pub(super) fn next_due(&self, key: &RunKey) -> Option<LogTime> {
        self.lock().active.get(key)?.next_due
    }

    /// Whether a slot is open here: one that was given up as stuck no longer is.
    pub(super) fn is_active(&self, key: &RunKey) -> bool {
        self.lock().active.contains_key(key)
    }

    /// Gives up the runs that are over their limit and did not end for a claim's term more: what
    /// they hang in may never answer. Their threads find the slot gone when it does.
    pub(super) fn give_up_stuck(&self) {
        let clock = &self.context.env.clock;
        let now = clock.monotonic();
        let term = self.config.claim_term.0;
        let is_stuck = |active: &Active| {
            let since = active.at_work.as_ref().map_or(now, |(_, since)| *since);
            active.phase == PeerPhase::Running
                && now.saturating_sub(since) >= active.run_limit.0 + term
        };
        let mut state = self.lock();
        let stuck: Vec<(RunKey, Active)> =
            state.active.extract_if(|_, active| is_stuck(active)).collect();
        for (key, active) in &stuck {
            state.slot_lsn.remove(key);
            state.published.remove(key);
            if let Some(decision) = &active.decision {
                state.remember_decided(*key, decision.clone());
            }
        }
        drop(state);
        for (key, active) in stuck {
            let (group, job) = &active.name;
            let text = format!(
                "the run is over its limit of {} and does not end: the repository or the disk \
                 under the data does not answer",
                active.run_limit
            );
            active.stop.stop(text.clone());
            if active.opened_by == OpenedBy::Schedule {
                self.set_handled(&key);
            }
            let role = self.registry.by_id(key.group).map_or(Role::Secondary, |g| g.role());
            let node = self.context.node.name.clone();
            let mut entry = missed_entry(group, job, key.slot, node, role, clock.wall());
            entry.outcome = Outcome::Failed;
            entry.duration_seconds = now.saturating_sub(active.started).as_secs_f64();
            entry.reasons = vec![Reason::new("run-limit", text.clone())];
            self.history.add(entry);
            let text = format!("the run here ended as failed: {text}");
            self.emit(Severity::Error, "backup-failed", group, job, Some(key.slot), &text);
        }
        self.changed.notify_all();
    }

    pub(super) fn begin(&self, key: &RunKey) -> (Stop, Progress) {
        let mut state = self.lock();
        let stopping = state.stopping;
        let (stop, progress) = (Stop::new(), Progress::new());
        if stopping {
            stop.stop("the node is shutting down");
        }
        if let Some(active) = state.active.get_mut(key) {
            active.stop = stop.clone();
            active.progress = progress.clone();
        }
        (stop, progress)
    }

    /// A run is over: what it was stays known for those who ask, and what it made, or saw made,
    /// ends alarms.
    pub(super) fn end(
        &self,
        task: &Task,
        phase: PeerPhase,
        result: Option<&SlotResult>,
        decision: Decision,
    ) {
        let opened_by = self.lock().active.get(&task.key).map(|active| active.opened_by);
        let reigns = Reigns::of(&task.group, task.key.slot);
        // A run by command is none of the schedule's slots.
        if opened_by == Some(OpenedBy::Schedule) {
            self.set_handled(&task.key);
        }
        let mut state = self.lock();
        let first = state
            .active
            .get(&task.key)
            .and_then(|active| active.decision.clone())
            .unwrap_or(decision);
        state.remember_decided(task.key, first);
        let proved =
            matches!(phase, PeerPhase::Done | PeerPhase::Ended { outcome: Outcome::Delegated, .. });
        // What a clock that is ahead calls its slot makes up for nothing that is to come.
        if proved && !self.is_ahead(task.key.slot) {
            let watch = state.watches.entry(task.key.job).or_default();
            // It makes up for what is older, and for nothing newer.
            if watch.made(task.key.slot, result, &reigns) {
                let name = (task.group.name().clone(), task.job.name.clone());
                if state.alarms.get(&name).is_some_and(|alarm| alarm.slot <= task.key.slot) {
                    state.alarms.remove(&name);
                }
            }
        }
        if let Some(active) = state.active.get_mut(&task.key) {
            active.phase = phase;
        }
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn active_entries(&self) -> Vec<BackupEntry> {
        let clock = &self.context.env.clock;
        let state = self.lock();
        let ongoing = state.active.iter().filter(|(_, active)| active.is_open());
        ongoing
            .map(|(key, active)| {
                let role = self.registry.by_id(key.group).map_or(Role::Secondary, |g| g.role());
                let node = self.context.node.name.clone();
                let (group, job) = &active.name;
                let mut entry = missed_entry(group, job, key.slot, node, role, clock.wall());
                entry.outcome = Outcome::Running;
                entry.duration_seconds =
                    clock.monotonic().saturating_sub(active.started).as_secs_f64();
                let decision = active.decision.clone();
                entry.run_on = decision.as_ref().and_then(|decision| decision.run_on.clone());
                entry.reasons = decision.map(|decision| decision.reasons).unwrap_or_default();
                entry
            })
            .collect()
    }
}
