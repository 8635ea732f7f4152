//! What the nodes of a group tell one another about a slot: that it is open, by which facts the
//! primary judges, how they are and how far.

use std::sync::{Arc, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::active::OpenedBy;
use super::branches::{Filled, Reigns};
use super::catalog::Outcome;
use super::claim::{SlotResult, SlotStore};
use super::facts::Facts;
use super::gather::{ObserveAnswer, ObserveCall};
use super::job::JobSettings;
use super::peer::PeerHandler;
use super::run::PeerPhase;
use super::runner::Task;
use super::scheduler::{Inner, RunKey};
use crate::group::{Group, Role};
use crate::log::control::JobRecord;
use crate::units::{EpochId, GroupId, LogTime, Lsn, Name};

/// The primary's word on a slot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Published {
    facts: Facts,
    /// What the primary held when the slot came.
    lsn: Lsn,
    #[serde(skip)]
    pub(super) at: Duration,
}

impl Published {
    /// The facts as a node of this role judges by them.
    pub(super) fn seen_by(self, role: Role) -> Facts {
        Facts { role, ..self.facts }
    }
}

/// Slots of a job that are not open here yet, or any more, of which the peer's word is kept.
const NOT_OPEN_MAX: usize = 4;

/// Of such slots, those whose facts have to go: the ones that were told first.
fn too_many(mut not_open: Vec<(Duration, RunKey)>) -> Vec<RunKey> {
    not_open.sort_by_key(|(at, _)| *at);
    not_open.truncate(not_open.len().saturating_sub(NOT_OPEN_MAX));
    not_open.into_iter().map(|(_, key)| key).collect()
}

#[derive(Serialize, Deserialize)]
struct PublishCall {
    group: GroupId,
    job: EpochId,
    slot: LogTime,
    published: Published,
}

impl Inner {
    /// Tells a peer that a slot was opened by command; to one that has it open or behind it, it is
    /// nothing new.
    pub(super) fn tell_start(&self, peer: &Name, key: &RunKey) -> Result<(), String> {
        let RunKey { group, job, slot } = *key;
        let body = json!(ObserveCall { group, job, slot: Some(slot) });
        let call = self.peers.call(peer, "backup.start", body, Duration::from_secs(5));
        self.runtime.block_on(call).map(drop)
    }

    pub(super) fn publish(&self, task: &Task, facts: &Facts) {
        if facts.replication.link_lost.is_some() || !facts.replicated {
            return;
        }
        let lsn = self.lock().slot_lsn.get(&task.key).copied().unwrap_or(Lsn::ZERO);
        let published = Published { facts: facts.clone(), lsn, at: Duration::ZERO };
        let RunKey { group, job, slot } = task.key;
        let body = json!(PublishCall { group, job, slot, published });
        let peer = &facts.secondary.name;
        let call = self.peers.call(peer, "backup.publish", body, Duration::from_secs(3));
        if let Err(error) = self.runtime.block_on(call) {
            tracing::debug!("peer {peer}: backup.publish: {error}");
        }
    }

    /// The primary's word on a slot, while it is fresh.
    pub(super) fn published(&self, key: &RunKey) -> Option<Published> {
        let now = self.context.env.clock.monotonic();
        let fresh = (self.config.tick * 3).max(Duration::from_secs(5));
        let state = self.lock();
        let published = state.published.get(key)?;
        (now.saturating_sub(published.at) <= fresh).then(|| published.clone())
    }

    pub(super) fn published_lsn(&self, key: &RunKey) -> Option<Lsn> {
        self.lock().published.get(key).map(|published| published.lsn)
    }

    pub(super) fn answer_peers(self: &Arc<Self>) {
        let answer = |work: fn(&Arc<Inner>, Name, Value) -> Result<Value, String>| {
            let weak: Weak<Inner> = Arc::downgrade(self);
            let handler: PeerHandler = Arc::new(move |peer, body| {
                let weak = weak.clone();
                Box::pin(async move {
                    let inner = weak.upgrade().ok_or("the node is shutting down")?;
                    tokio::task::spawn_blocking(move || work(&inner, peer, body))
                        .await
                        .map_err(|error| error.to_string())?
                })
            });
            handler
        };
        self.peers.on_call("backup.start", answer(Inner::on_start));
        self.peers.on_call("backup.publish", answer(Inner::on_publish));
        self.peers.on_call("backup.observe", answer(Inner::on_observe));
    }

    /// The group and job of a call; a peer may only ask about groups that it holds with this node.
    fn of_peer(
        &self,
        peer: &Name,
        group: GroupId,
        job: EpochId,
    ) -> Result<(Arc<Group>, JobRecord), String> {
        let unknown = || "backup: no such group or job here".to_owned();
        let group = self.registry.by_id(group).ok_or_else(unknown)?;
        let control = group.control();
        let member = control.members.iter().any(|member| !member.removed && member.name == *peer);
        let author = control.epochs.iter().any(|epoch| epoch.author_name == *peer);
        if !member && !author {
            return Err(unknown());
        }
        let job = control.jobs.iter().find(|known| known.id == job && !known.removed);
        let job = job.cloned().ok_or_else(unknown)?;
        Ok((group.clone(), job))
    }

    fn on_start(self: &Arc<Self>, peer: Name, body: Value) -> Result<Value, String> {
        let call: ObserveCall = serde_json::from_value(body).map_err(|error| error.to_string())?;
        let slot = call.slot.ok_or("backup.start: no slot")?;
        let (group, job) = self.of_peer(&peer, call.group, call.job)?;
        if self.is_ahead(slot) {
            let now = self.context.env.clock.wall();
            return Err(format!(
                "backup: got the slot {slot}, and it is {now} here; set the clocks of both nodes"
            ));
        }
        let settings = JobSettings::parse(&job.settings).map_err(|error| error.to_string())?;
        self.open(&group, job, settings, slot, OpenedBy::Command)
            .map_err(|error| error.to_string())?;
        Ok(json!({}))
    }

    fn on_publish(self: &Arc<Self>, peer: Name, body: Value) -> Result<Value, String> {
        let call: PublishCall = serde_json::from_value(body).map_err(|error| error.to_string())?;
        self.of_peer(&peer, call.group, call.job)?;
        let now = self.context.env.clock.monotonic();
        let key = RunKey { group: call.group, job: call.job, slot: call.slot };
        let mut state = self.lock();
        state.published.retain(|known, published| {
            *known == key || now.saturating_sub(published.at) < Duration::from_secs(600)
        });
        let first = state.published.insert(key, Published { at: now, ..call.published }).is_none();
        let of_job = |known: &RunKey| (known.group, known.job) == (key.group, key.job);
        let not_open = state
            .published
            .iter()
            .filter(|(known, _)| of_job(known) && !state.active.contains_key(known));
        for known in too_many(not_open.map(|(known, published)| (published.at, *known)).collect()) {
            state.published.remove(&known);
        }
        drop(state);
        if first {
            self.changed.notify_all();
        }
        Ok(json!({}))
    }

    fn on_observe(self: &Arc<Self>, peer: Name, body: Value) -> Result<Value, String> {
        let call: ObserveCall = serde_json::from_value(body).map_err(|error| error.to_string())?;
        let (group, job) = self.of_peer(&peer, call.group, call.job)?;
        let facts = self.own_facts(&group, &job);
        let phase = call.slot.map_or(PeerPhase::Unknown, |slot| self.phase(&group, &job, slot));
        let results = call.slot.and_then(|slot| self.results(&job, slot).ok());
        let made = call.slot.and_then(|slot| {
            let results = results.as_ref()?;
            Some(Reigns::of(&group, slot).counted(results).is_some())
        });
        Ok(json!(ObserveAnswer { facts, phase, made, results }))
    }

    fn phase(&self, group: &Group, job: &JobRecord, slot: LogTime) -> PeerPhase {
        let key = RunKey { group: group.id(), job: job.id, slot };
        if let Some(active) = self.lock().active.get(&key) {
            return active.phase.clone();
        }
        let run = self.history.run(group.name(), &job.name, slot);
        // One that passed by here may have been made elsewhere.
        if let Some(run) = run
            && (run.outcome != Outcome::Missed || !self.is_done(group, job, slot))
        {
            let why: Vec<_> = run.reasons.iter().map(|reason| reason.text.as_str()).collect();
            return PeerPhase::Ended { outcome: run.outcome, why: why.join("; ") };
        }
        if self.is_done(group, job, slot) { PeerPhase::Done } else { PeerPhase::Unknown }
    }

    fn is_done(&self, group: &Group, job: &JobRecord, slot: LogTime) -> bool {
        self.is_made(group, job, slot).is_ok_and(|made| made != Filled::No)
    }

    /// Whether the repository holds a slot's result that is of this node's history.
    pub(super) fn is_made(
        &self,
        group: &Group,
        job: &JobRecord,
        slot: LogTime,
    ) -> Result<Filled, String> {
        let results = self.results(job, slot)?;
        Ok(Reigns::of(group, slot).made(&results))
    }

    /// The results of a slot in the repository, of all branches.
    fn results(&self, job: &JobRecord, slot: LogTime) -> Result<Vec<SlotResult>, String> {
        let repository = self.repository(&job.repository).map_err(|error| error.to_string())?;
        repository.id().map_err(|error| error.to_string())?;
        let store = SlotStore::new(repository.objects(), job.id, slot);
        store.results().map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_slots_that_are_not_open_the_last_few_are_kept() {
        let key = |slot| RunKey { group: GroupId([7; 16]), job: EpochId(1), slot: LogTime(slot) };
        let mut known: Vec<(Duration, RunKey)> = Vec::new();
        for slot in 0..1000 {
            known.insert(0, (Duration::from_secs(slot), key(slot)));
            let gone = too_many(known.clone());
            known.retain(|(_, key)| !gone.contains(key));
            assert!(known.len() <= NOT_OPEN_MAX);
            assert_eq!(known[0].1, key(slot), "the newest stays");
        }
    }
}
