//! A slot on this node, from the first look to its end: the thread around the state machine of
//! `run`, and the making of a backup under its claim.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;

use super::branches::Reigns;
use super::catalog::{BackupEntry, MANIFEST_VERSION, Manifest, ManifestVolume, Outcome};
use super::claim::{Claim, SlotResult, SlotStore};
use super::decision::{Decision, Verdict, worse_at_end};
use super::facts::Reason;
use super::job::{self, JobSettings};
use super::reach::Reach;
use super::repository::{BackupPlan, Repository};
use super::run::{Next, Observation, PeerPhase, SlotRun};
use super::scheduler::{Inner, RunKey};
use super::source::{Progress, Stop, chosen_volumes};
use crate::events::Severity;
use crate::group::{Group, Image, Point, Role, View, Volume};
use crate::log::control::JobRecord;
use crate::units::{EpochId, LogTime, Lsn, Name};

/// How long a secondary waits at most for what the primary held when the slot came.
const CATCH_UP_MAX: Duration = Duration::from_secs(30);
/// How long a linked secondary waits for the primary's word on a slot before it judges alone.
const PUBLISHED_WAIT: Duration = Duration::from_secs(2);

/// What a run is about.
pub(super) struct Task {
    pub group: Arc<Group>,
    pub job: JobRecord,
    pub settings: JobSettings,
    pub key: RunKey,
    /// The schedule opened it: what does not run now is looked at again until the deadline.
    pub scheduled: bool,
    /// Another run of the job was going when this one began.
    pub running_on: Option<Name>,
}

/// How the making of a backup ended.
enum Making {
    Done(Box<SlotResult>),
    Superseded(Box<SlotResult>),
    /// Another's claim came first.
    Lost,
    Failed(String),
}

impl Inner {
    /// Goes through a slot; returns when it is over for this node.
    pub(super) fn drive(self: &Arc<Self>, mut task: Task) {
        let clock = Arc::clone(&self.context.env.clock);
        let started = clock.monotonic();
        let slot = task.key.slot;
        let deadline_in = slot.after(task.settings.deadline.0).since(clock.wall());
        let this = self.context.node.name.clone();
        let mut run = SlotRun::new(this, task.settings.clone(), started + deadline_in);
        if task.scheduled {
            run = run.patient();
        }
        let repository = self.repository(&task.job.repository);
        let mut store = repository
            .as_ref()
            .ok()
            .map(|repository| SlotStore::new(repository.objects(), task.key.job, slot));
        self.await_published(&task);
        loop {
            if self.is_stopping() {
                return;
            }
            if task.group.awaits_answer() {
                // A primary that has just started may lack what its peer has, or be none any more.
                self.wait(self.config.tick);
                continue;
            }
            let (mut facts, peer) = self.gather(&task.group, &task.job, Some(slot));
            if !task.scheduled && peer == Some(PeerPhase::Unknown) {
                // It was away when the command came, or has started anew since.
                let other = &facts.node(job::other(facts.role)).name;
                if let Err(error) = self.tell_start(other, &task.key) {
                    tracing::debug!("peer {other}: backup.start: {error}");
                }
            }
            if facts.role == Role::Primary {
                self.publish(&task, &facts);
            } else if facts.replication.link_lost.is_none()
                && let Some(published) = self.published(&task.key)
            {
                facts = published.seen_by(facts.role);
            }
            if task.scheduled {
                task.running_on = self.running_other(&task.key);
            }
            facts.running_on.clone_from(&task.running_on);
            let now = clock.monotonic();
            let view = match (&mut store, &repository) {
                (Some(store), _) => {
                    let view = store.look(now, || Reigns::of(&task.group, slot));
                    view.map_err(|error| error.to_string())
                }
                (None, Err(error)) => Err(error.to_string()),
                (None, Ok(_)) => Err("not configured here".to_owned()),
            };
            let role = facts.role;
            let number = view.as_ref().map_or(0, |view| view.number);
            let seen = view.as_ref().ok().and_then(|view| view.result.clone());
            if let Some(next) = self.next_due(&task.key) {
                run.next_is_due(next);
            }
            let next = run.step(Observation { now, facts, view, peer });
            match next {
                Next::Run(decision) => {
                    if let Err(busy) = self.set_running(&task.key, &decision) {
                        task.running_on = Some(busy);
                        continue;
                    }
                    let (Some(store), Ok(repository)) = (&mut store, &repository) else {
                        run.failed_here("the repository is not configured here");
                        continue;
                    };
                    let made = self.make(&task, store, repository, number + 1, role, &decision);
                    if !self.is_active(&task.key) && !matches!(made, Making::Done(_)) {
                        // It was given up as stuck, and its end told.
                        return;
                    }
                    match made {
                        Making::Done(result) => {
                            self.finish_done(&task, &result, decision);
                            return;
                        }
                        Making::Superseded(result) => {
                            let text = format!("{} finished the slot first", result.node);
                            let mut decision = decision;
                            decision.run_on = Some(result.node.clone());
                            decision.reasons.insert(0, Reason::new("already-done", text));
                            let outcome = Outcome::Superseded;
                            self.finish(&task, outcome, role, started, Some(&*result), decision);
                            return;
                        }
                        Making::Lost => {}
                        Making::Failed(why) => {
                            self.event(
                                Severity::Warning,
                                "backup-run-failed",
                                &task,
                                &format!("the run failed: {why}"),
                            );
                            run.failed_here(why);
                        }
                    }
                    self.set_waiting(&task.key, None, None);
                }
                Next::Wait(decision) => {
                    self.set_waiting(&task.key, Some(decision), run.at_work());
                    self.wait(self.config.tick);
                }
                Next::End(outcome, decision) => {
                    self.finish(&task, outcome, role, started, seen.as_ref(), decision);
                    return;
                }
            }
        }
    }

    /// A linked secondary gives the primary a moment to tell by which facts it judges.
    fn await_published(&self, task: &Task) {
        let clock = &self.context.env.clock;
        let until = clock.monotonic() + PUBLISHED_WAIT;
        loop {
            let nodes = self.nodes(&task.group);
            let linked = self.peers.view(&task.group, nodes.other.as_ref()).link_lost.is_none();
            let expected = nodes.role == Role::Secondary && nodes.replicated && linked;
            let now = clock.monotonic();
            if !expected || now >= until || self.published(&task.key).is_some() {
                return;
            }
            self.wait(until - now);
        }
    }

    /// Makes the backup under the claim of a number.
    fn make(
        self: &Arc<Self>,
        task: &Task,
        store: &mut SlotStore,
        repository: &Arc<Reach>,
        number: u32,
        role: Role,
        decision: &Decision,
    ) -> Making {
        let failed =
            |what: &str, error: &dyn std::fmt::Display| Making::Failed(format!("{what}: {error}"));
        let run = EpochId(self.context.env.entropy.next_u64());
        let node = self.context.node.name.clone();
        let claim = Claim { node, run, term: self.config.claim_term };
        match store.claim(number, &claim) {
            Ok(true) => {}
            Ok(false) => return Making::Lost,
            Err(error) => return failed("claim", &error),
        }
        self.event(
            Severity::Info,
            "backup-started",
            task,
            &format!("the backup starts here ({})", decision_words(decision)),
        );
        let (stop, progress) = self.begin(&task.key);
        let renewing = Arc::new(AtomicBool::new(true));
        let renewer = self.renew(task, store.clone(), number, &stop, &renewing);
        let writer = repository.repository();
        let made = self.snapshot(task, writer, role, decision, run, &stop, &progress);
        renewing.store(false, Ordering::Release);
        self.changed.notify_all();
        if let Some(renewer) = renewer
            && renewer.join().is_err()
        {
            tracing::error!("the thread that renews a claim panicked");
        }
        let reigns = || Reigns::of(&task.group, task.key.slot);
        let outcome = match made {
            Err(why) => Making::Failed(why),
            Ok(result) => match store.finish(&result, reigns) {
                Ok(None) => Making::Done(Box::new(result)),
                Ok(Some(other)) => superseded(writer, &result, other),
                Err(error) => match store.result(reigns) {
                    Ok(Some(found)) if found.run == run => Making::Done(Box::new(result)),
                    Ok(Some(other)) => superseded(writer, &result, other),
                    Ok(None) if error.kind() != ErrorKind::TimedOut => {
                        forget(writer, &result.id);
                        failed("result", &error)
                    }
                    // It may still appear, and must then name a snapshot.
                    _ => failed("result", &error),
                },
            },
        };
        if let Making::Failed(why) = &outcome
            && let Err(error) = store.end(number, why)
        {
            tracing::warn!("claim {number}: its end could not be told: {error}");
        }
        outcome
    }

    /// Raises the claim's counter, and ends the run at its limit or when another has finished.
    fn renew(
        self: &Arc<Self>,
        task: &Task,
        store: SlotStore,
        number: u32,
        stop: &Stop,
        renewing: &Arc<AtomicBool>,
    ) -> Option<std::thread::JoinHandle<()>> {
        let inner = Arc::clone(self);
        let (group, slot) = (Arc::clone(&task.group), task.key.slot);
        let (stop, renewing) = (stop.clone(), Arc::clone(renewing));
        let limit = task.settings.run_limit;
        let work = move || {
            let clock = Arc::clone(&inner.context.env.clock);
            let started = clock.monotonic();
            let (mut due, mut counter) = (started, 0);
            while renewing.load(Ordering::Acquire) {
                let now = clock.monotonic();
                if now.saturating_sub(started) >= limit.0 {
                    let why = format!("the run is over its limit of {limit}");
                    stop.stop(why.clone());
                    // The other node need not wait until this one's claim stands still.
                    if let Err(error) = store.end(number, &why) {
                        tracing::warn!("claim {number}: its end could not be told: {error}");
                    }
                    return;
                }
                if inner.is_stopping() {
                    stop.stop("the node is shutting down");
                }
                if now >= due {
                    counter += 1;
                    let renewed = store.renew(number, counter).inspect_err(|error| {
                        tracing::warn!("claim {number} could not be renewed: {error}");
                    });
                    // Observers of an outage count from its end.
                    due = now + inner.config.claim_renew.0 / if renewed.is_ok() { 1 } else { 5 };
                    if let Ok(Some(result)) = store.result(|| Reigns::of(&group, slot)) {
                        stop.stop(format!("{} finished the slot first", result.node));
                    }
                }
                inner.wait(inner.config.claim_renew.0.min(Duration::from_secs(1)));
            }
        };
        let thread = std::thread::Builder::new().name("backup-claim".to_owned()).spawn(work);
        thread.inspect_err(|error| tracing::error!("no thread to renew a claim: {error}")).ok()
    }

    /// Opens the image, writes the snapshot, and looks again whether it may count.
    #[expect(clippy::too_many_arguments, reason = "what a snapshot is made from")]
    fn snapshot(
        &self,
        task: &Task,
        repository: &Repository,
        role: Role,
        decision: &Decision,
        run: EpochId,
        stop: &Stop,
        progress: &Progress,
    ) -> Result<SlotResult, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let image = self.image(task, role, stop)?;
        let result =
            self.snapshot_of(task, repository, role, decision, run, stop, progress, &image);
        if let Err(error) = task.group.close_this_image(&image) {
            tracing::warn!("image {}: {}", image.name(), text(&error));
        }
        result
    }

    /// An image at the newest position that is committed, and not before what the primary held when
    /// the slot came.
    fn image(&self, task: &Task, role: Role, stop: &Stop) -> Result<Arc<Image>, String> {
        let group = &task.group;
        if role == Role::Primary {
            group.sync_now().map_err(|error| error.to_string())?;
        }
        let clock = &self.context.env.clock;
        let until = clock.monotonic() + task.settings.max_lag.0.min(CATCH_UP_MAX);
        let wanted = self.published_lsn(&task.key).unwrap_or(Lsn::ZERO);
        while role == Role::Secondary
            && group.positions().committed < wanted
            && clock.monotonic() < until
            && stop.reason().is_none()
        {
            self.wait(Duration::from_millis(50));
        }
        let committed = group.positions().committed;
        group
            .open_image(
                &Point::Lsn(committed),
                None,
                &format!("backup {}/{}", group.name(), task.job.name),
                Some(task.settings.run_limit.0),
            )
            .map_err(|error| error.to_string())
    }

    #[expect(clippy::too_many_arguments, reason = "what a snapshot is made from")]
    fn snapshot_of(
        &self,
        task: &Task,
        repository: &Repository,
        role: Role,
        decision: &Decision,
        run: EpochId,
        stop: &Stop,
        progress: &Progress,
        image: &Arc<Image>,
    ) -> Result<SlotResult, String> {
        let position = image.position();
        let volumes = chosen_volumes(image.volumes(), &task.settings.volumes)?;
        let volumes: Vec<ManifestVolume> = volumes
            .into_iter()
            .map(|Volume { number, name, size_bytes, .. }| ManifestVolume {
                number,
                name,
                size_bytes,
            })
            .collect();
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            group: task.group.name().clone(),
            group_id: task.group.id(),
            job: task.job.name.clone(),
            job_id: task.key.job,
            slot: task.key.slot,
            epoch: position.epoch,
            lsn: position.lsn,
            time: position.time,
            node: self.context.node.name.clone(),
            role,
            volumes,
            stale: decision.stale,
            reasons: decision.reasons.clone(),
        };
        let parent = self.parent(&task.group, repository, image);
        let view: Arc<dyn View> = Arc::clone(image) as Arc<dyn View>;
        let plan = BackupPlan {
            view,
            manifest: manifest.clone(),
            parent,
            stop: stop.clone(),
            progress: progress.clone(),
        };
        let made = repository.backup(plan).map_err(|error| error.to_string())?;
        let reigns = Reigns::of(&task.group, task.key.slot);
        let of_branch = if task.group.is_in_history(position) {
            reigns.why_not(position.epoch, position.lsn, manifest.stale)
        } else {
            Some("the image is no longer in the group's history".to_owned())
        };
        let (facts, _) = self.gather(&task.group, &task.job, Some(task.key.slot));
        let problems = &facts.node(facts.role).problems;
        if let Some(why) = why_it_does_not_count(image.broken(), of_branch, problems) {
            self.mark_as_none(repository, &made.id, &why);
            return Err(format!("backup {} does not count: {why}", made.id));
        }
        Ok(SlotResult {
            node: manifest.node,
            role,
            run,
            id: made.id,
            epoch: position.epoch,
            lsn: position.lsn,
            time: position.time,
            ended: self.context.env.clock.wall(),
            bytes_read: made.stats.bytes_read,
            bytes_added: made.stats.bytes_added,
            duration_seconds: made.stats.duration_seconds,
            checksums: made.checksums,
            stale: manifest.stale,
            reasons_at_end: worse_at_end(&facts, role, &task.settings),
        })
    }

    fn mark_as_none(&self, repository: &Repository, id: &str, why: &str) {
        let body = serde_json::to_vec(&json!({ "branch": why })).expect("plain data becomes JSON");
        if let Err(error) = repository.objects().replace(&format!("marks/{id}"), &body) {
            tracing::error!("backup {id} could not be marked: {error}");
        }
    }

    fn finish_done(&self, task: &Task, result: &SlotResult, decision: Decision) {
        let mut text = format!(
            "backup {} is done: LSN {}, {} bytes read, {} bytes added",
            &result.id[..8.min(result.id.len())],
            result.lsn,
            result.bytes_read,
            result.bytes_added
        );
        let worse: Vec<&str> =
            result.reasons_at_end.iter().map(|reason| reason.text.as_str()).collect();
        if !worse.is_empty() {
            text.push_str(&format!("; at its end: {}", worse.join("; ")));
        }
        self.end(task, PeerPhase::Done, Some(result), decision);
        self.event(Severity::Info, "backup-done", task, &text);
    }

    fn finish(
        &self,
        task: &Task,
        outcome: Outcome,
        role: Role,
        started: Duration,
        seen: Option<&SlotResult>,
        decision: Decision,
    ) {
        let clock = &self.context.env.clock;
        let words = decision_words(&decision);
        let (group, job) = (task.group.name(), &task.job.name);
        let node = self.context.node.name.clone();
        let mut entry = missed_entry(group, job, task.key.slot, node, role, clock.wall());
        entry.duration_seconds = clock.monotonic().saturating_sub(started).as_secs_f64();
        entry.outcome = outcome;
        entry.reasons.clone_from(&decision.reasons);
        entry.run_on.clone_from(&decision.run_on);
        self.history.add(entry);
        self.end(task, PeerPhase::Ended { outcome, why: words.clone() }, seen, decision);
        let (severity, code) = match outcome {
            Outcome::Failed => (Severity::Error, "backup-failed"),
            Outcome::Delegated => (Severity::Info, "backup-delegated"),
            Outcome::Superseded => (Severity::Warning, "backup-superseded"),
            _ => (Severity::Info, "backup-skipped"),
        };
        let text = format!("the run here ended as {}: {words}", outcome_word(outcome));
        self.event(severity, code, task, &text);
    }

    fn event(&self, severity: Severity, code: &str, task: &Task, text: &str) {
        self.emit(severity, code, task.group.name(), &task.job.name, Some(task.key.slot), text);
    }
}

fn superseded(writer: &Repository, result: &SlotResult, other: SlotResult) -> Making {
    forget(writer, &result.id);
    Making::Superseded(Box::new(other))
}

/// Takes back a snapshot that fills no slot.
fn forget(writer: &Repository, id: &str) {
    if let Err(error) = writer.forget(id) {
        tracing::warn!("snapshot {id}, which fills no slot, stays: {error}");
    }
}

/// What, at the end of a run, speaks against counting its snapshot as the slot's backup.
fn why_it_does_not_count(
    broken: Option<String>,
    of_branch: Option<String>,
    problems: &[Reason],
) -> Option<String> {
    if let Some(why) = broken {
        return Some(format!("the image was lost meanwhile: {why}"));
    }
    of_branch.or_else(|| {
        problems.first().map(|problem| format!("at the end of the run: {}", problem.text))
    })
}

/// The reasons on one line.
pub(super) fn decision_words(decision: &Decision) -> String {
    let reasons: Vec<_> = decision.reasons.iter().map(|reason| reason.text.as_str()).collect();
    match (&decision.decision, &decision.run_on) {
        (Verdict::Delegate, Some(node)) => format!("stood down for {node}: {}", reasons.join("; ")),
        _ => reasons.join("; "),
    }
}

/// The word for an outcome.
pub(super) fn outcome_word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Done => "done",
        Outcome::Delegated => "delegated",
        Outcome::Skipped => "skipped",
        Outcome::Superseded => "superseded",
        Outcome::Failed => "failed",
        Outcome::Missed => "missed",
        Outcome::Running => "running",
    }
}

/// An entry for a slot that went by.
pub(super) fn missed_entry(
    group: &Name,
    job: &Name,
    slot: LogTime,
    node: Name,
    role: Role,
    now: LogTime,
) -> BackupEntry {
    BackupEntry {
        id: None,
        group: group.clone(),
        job: job.clone(),
        slot,
        node,
        role,
        epoch: None,
        lsn: None,
        time: now,
        volumes: Vec::new(),
        bytes: 0,
        bytes_read: 0,
        bytes_added: 0,
        duration_seconds: 0.0,
        outcome: Outcome::Missed,
        reasons: vec![Reason::new(
            "missed",
            "the slot's deadline was over before this node saw it",
        )],
        run_on: None,
        branch: None,
        unreachable: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_left_the_history_or_was_lost_does_not_count() {
        let problem = [Reason::new("data-failed", "b: the disk failed")];
        assert_eq!(why_it_does_not_count(None, None, &[]), None);
        let text = |text: &str| Some(text.to_owned());
        for (broken, of_branch, problems, word) in [
            (None, text("not in the history"), &problem[..], "not in the history"),
            (text("the log is full"), None, &[], "the log is full"),
            (None, None, &problem, "the disk failed"),
        ] {
            let why = why_it_does_not_count(broken, of_branch, problems).expect(word);
            assert!(why.contains(word), "{why}");
        }
    }
}
