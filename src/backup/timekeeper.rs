//! The scheduler's clockwork: which slots are due, which went by, and which never got a backup.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::active::OpenedBy;
use super::branches::{Filled, Reigns, present_reign};
use super::gather::{ObserveAnswer, ObserveCall, others};
use super::job::JobSettings;
use super::overdue::{Found, LOOK_AGAIN, Watch, newest_over};
use super::run::PeerPhase;
use super::runner::missed_entry;
use super::scheduler::{Inner, RunKey, SlotAlarm};
use super::slot::Schedule;
use crate::events::Severity;
use crate::group::{DataState, Group};
use crate::log::control::JobRecord;
use crate::units::{LogTime, Name};

impl Inner {
    pub(super) fn keep_time(self: &Arc<Self>) {
        loop {
            if self.is_stopping() {
                return;
            }
            // A sample, so that the load over the last seconds is known when it is asked for.
            let _ = self.meter.measure(self.context.env.clock.monotonic());
            self.give_up_stuck();
            let (mut scheduled, mut jobs) = (BTreeMap::new(), BTreeSet::new());
            let mut known = BTreeSet::new();
            // Replication to a retired copy was stopped: it hears of no change of a job, and has no
            // part in the group's backups.
            let groups = self.registry.groups().into_iter();
            for group in groups.filter(|group| group.data_state().0 != DataState::Retired) {
                for job in group.control().jobs.iter().filter(|job| !job.removed) {
                    self.keep_job(&group, job);
                    self.look_at_failure(&group, job);
                    known.insert((group.name().clone(), job.name.clone()));
                    if job.schedule.is_some() {
                        jobs.insert(job.id);
                        scheduled.insert((group.name().clone(), job.name.clone()), job.since);
                    }
                }
            }
            // Of a job that is gone, or is another since, nobody misses a slot.
            let mut state = self.lock();
            state.watches.retain(|job, _| jobs.contains(job));
            state.failures.retain(|name, _| known.contains(name));
            state.alarms.retain(|name, alarm| {
                let since = scheduled.get(name);
                since.is_some_and(|since| alarm.slot > *since) && !self.is_ahead(alarm.slot)
            });
            drop(state);
            self.wait(Duration::from_secs(1));
        }
    }

    fn keep_job(self: &Arc<Self>, group: &Arc<Group>, job: &JobRecord) {
        let Some(pattern) = &job.schedule else { return };
        let parsed = Schedule::parse(pattern, job.zone.as_deref())
            .and_then(|schedule| Ok((schedule, JobSettings::parse(&job.settings)?)));
        let (schedule, settings) = match parsed {
            Ok(parsed) => parsed,
            Err(error) => {
                if self.lock().complained.insert((job.id, job.since)) {
                    let (name, text) = (group.name(), error.to_string());
                    self.emit(Severity::Error, "job-invalid", name, &job.name, None, &text);
                }
                return;
            }
        };
        let now = self.context.env.clock.wall();
        let mut handled = self.history.handled(job.id);
        let back = handled.and_then(|at| schedule.taken_back(at, now, self.config.allowance.0));
        if let Some(back) = back {
            self.history.take_back_handled(job.id, back);
            handled = Some(back);
        }
        let due = schedule.due(job.since, handled, now, settings.deadline.0);
        self.miss(group, job, due.missed);
        if let Some(slot) = due.open
            && let Err(error) =
                self.open(group, job.clone(), settings.clone(), slot, OpenedBy::Schedule)
        {
            tracing::error!("job {}/{}: {error}", group.name(), job.name);
        }
        self.look_for_overdue(group, job, &schedule, &settings, now);
    }

    /// Slots that went by unseen here: told where no other node has made them either.
    fn miss(self: &Arc<Self>, group: &Arc<Group>, job: &JobRecord, slots: Vec<LogTime>) {
        let is_open = |slot| {
            let key = RunKey { group: group.id(), job: job.id, slot };
            self.lock().active.contains_key(&key)
        };
        let mut slots: Vec<LogTime> = slots.into_iter().filter(|slot| !is_open(*slot)).collect();
        if let Some(newest) = slots.last() {
            self.set_handled(&RunKey { group: group.id(), job: job.id, slot: *newest });
        }
        // Behind one that is still open they are owed on, and were looked for.
        let mut state = self.lock();
        state.missed.retain(|(id, slot)| *id != job.id || slots.contains(slot));
        slots.retain(|slot| state.missed.insert((job.id, *slot)));
        drop(state);
        if slots.is_empty() {
            return;
        }
        let (inner, group, job) = (Arc::clone(self), Arc::clone(group), job.clone());
        let look = move || {
            for slot in slots {
                let run = inner.history.run(group.name(), &job.name, slot);
                let is_made = || {
                    let found = inner.look_for_result(&group, &job, slot);
                    matches!(found, Found::Made | Found::MadePerhaps)
                };
                if run.is_none() && !is_made() {
                    inner.tell_missed(&group, &job, slot);
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("backup-missed".to_owned()).spawn(look)
        {
            tracing::error!("no thread to look for slots that went by: {error}");
        }
    }

    fn tell_missed(&self, group: &Group, job: &JobRecord, slot: LogTime) {
        let (node, now) = (self.context.node.name.clone(), self.context.env.clock.wall());
        let entry = missed_entry(group.name(), &job.name, slot, node, group.role(), now);
        self.history.add(entry);
        let text = "the slot was missed: its deadline was over before this node saw it, and no \
                    backup of it is known";
        self.emit(Severity::Warning, "backup-missed", group.name(), &job.name, Some(slot), text);
    }

    /// Looks for the newest slot whose time is over, where it is time to.
    fn look_for_overdue(
        self: &Arc<Self>,
        group: &Arc<Group>,
        job: &JobRecord,
        schedule: &Schedule,
        settings: &JobSettings,
        now: LogTime,
    ) {
        let allowance = self.config.allowance;
        let Some(slot) = newest_over(schedule, settings, allowance, job.since, now) else { return };
        let monotonic = self.context.env.clock.monotonic();
        let reign = present_reign(group);
        let unsettled = self.lock().watches.get(&job.id).and_then(Watch::unsettled);
        let known = unsettled.map(|slot| (slot, Reigns::of(group, slot)));
        let mut state = self.lock();
        let watch = state.watches.entry(job.id).or_default();
        if let Some((slot, reigns)) = known {
            watch.settle(slot, &reigns);
        }
        watch.take_back(now.after(allowance.0));
        if !watch.is_due(slot, reign, monotonic, LOOK_AGAIN) {
            return;
        }
        drop(state);
        let (inner, group, id) = (Arc::clone(self), Arc::clone(group), job.id);
        let job = job.clone();
        let look = move || {
            let found = inner.look_for_result(&group, &job, slot);
            inner.raise(&group, &job, slot, found);
        };
        if let Err(error) =
            std::thread::Builder::new().name("backup-overdue".to_owned()).spawn(look)
        {
            tracing::error!("no thread to look for an overdue slot: {error}");
            let found = Found::Unknown(error.to_string());
            self.lock().watches.entry(id).or_default().found(slot, &found);
        }
    }

    /// Whether the backup of a slot is there, as far as any node of the group can see.
    pub(super) fn look_for_result(
        &self,
        group: &Arc<Group>,
        job: &JobRecord,
        slot: LogTime,
    ) -> Found {
        let ask = |peer: Name| {
            let call = ObserveCall { group: group.id(), job: job.id, slot: Some(slot) };
            let call =
                self.peers.call(&peer, "backup.observe", json!(call), Duration::from_secs(5));
            let answer = self.runtime.block_on(call).ok()?;
            let answer: ObserveAnswer = serde_json::from_value(answer).ok()?;
            answer
                .made(group, slot)
                .or((answer.phase == PeerPhase::Done).then_some(Filled::Perhaps))
        };
        Found::from(self.is_made(group, job, slot), || {
            others(&group.control(), self.context.node.id).into_iter().find_map(ask)
        })
    }

    /// Raises an alarm, or ends it.
    fn raise(&self, group: &Group, job: &JobRecord, slot: LogTime, found: Found) {
        let name = (group.name().clone(), job.name.clone());
        let mut state = self.lock();
        if !state.watches.entry(job.id).or_default().found(slot, &found) {
            return;
        }
        let (raised, text) = match found {
            Found::Made | Found::MadePerhaps => {
                state.alarms.remove(&name);
                return;
            }
            Found::NotMade => {
                ("overdue", "the slot is overdue: no node has made its backup".to_owned())
            }
            Found::Unknown(error) => {
                ("unknown", format!("nobody can say whether the slot has its backup: {error}"))
            }
        };
        let alarm = SlotAlarm {
            group: name.0.clone(),
            job: name.1.clone(),
            slot,
            state: raised.to_owned(),
            text: text.clone(),
        };
        let same = |before: SlotAlarm| (before.slot, before.state == raised) == (slot, true);
        let told = state.alarms.insert(name, alarm).is_some_and(same);
        drop(state);
        if !told {
            let code = format!("backup-{raised}");
            self.emit(Severity::Error, &code, group.name(), &job.name, Some(slot), &text);
        }
    }
}
