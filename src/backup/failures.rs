//! Jobs whose newest run failed here, for as long as no backup is known that makes up for it: what
//! an operator has to know long before the time of the slot is over. The counterpart of `overdue`.

use std::sync::Arc;
use std::time::Duration;

use super::catalog::{BackupEntry, Outcome};
use super::overdue::{Found, LOOK_AGAIN};
use super::scheduler::{Inner, SlotAlarm};
use crate::group::Group;
use crate::log::control::JobRecord;

/// A run that failed here.
pub(super) struct Failure {
    alarm: SlotAlarm,
    looked: Option<Duration>,
    looking: bool,
    /// Whether another node has made its backup nevertheless, once that was looked for.
    made: Option<bool>,
}

impl Failure {
    fn of(run: BackupEntry) -> Failure {
        let reasons: Vec<String> = run.reasons.into_iter().map(|reason| reason.text).collect();
        let text = format!("the run here failed, and no backup is known: {}", reasons.join("; "));
        let (group, job, slot) = (run.group, run.job, run.slot);
        let alarm = SlotAlarm { group, job, slot, state: "failed".to_owned(), text };
        Failure { alarm, looked: None, looking: false, made: None }
    }

    /// What an operator is told.
    pub(super) fn told(&self) -> Option<&SlotAlarm> {
        (self.made == Some(false)).then_some(&self.alarm)
    }
}

impl Inner {
    /// Looks how a job's newest run ended here, and where it failed, from time to time, whether
    /// another node has made its backup after all.
    pub(super) fn look_at_failure(self: &Arc<Self>, group: &Arc<Group>, job: &JobRecord) {
        let name = (group.name().clone(), job.name.clone());
        let run = self.failed_run(group, job);
        let now = self.context.env.clock.monotonic();
        let mut state = self.lock();
        let Some(run) = run else {
            state.failures.remove(&name);
            return;
        };
        let slot = run.slot;
        if state.failures.get(&name).is_none_or(|known| known.alarm.slot != slot) {
            state.failures.insert(name.clone(), Failure::of(run));
        }
        let failure = state.failures.get_mut(&name).expect("it is there");
        let waits = failure.looked.is_some_and(|looked| now < looked + LOOK_AGAIN);
        // One look at a time: a repository may hang.
        if failure.looking || waits || failure.made == Some(true) {
            return;
        }
        (failure.looking, failure.looked) = (true, Some(now));
        drop(state);
        let (inner, group, job, of) =
            (Arc::clone(self), Arc::clone(group), job.clone(), name.clone());
        let look = move || {
            let found = inner.look_for_result(&group, &job, slot);
            let mut state = inner.lock();
            let known = state.failures.get_mut(&name);
            if let Some(failure) = known.filter(|known| known.alarm.slot == slot) {
                failure.looking = false;
                failure.made = Some(matches!(found, Found::Made | Found::MadePerhaps));
            }
        };
        if let Err(error) =
            std::thread::Builder::new().name("backup-failures".to_owned()).spawn(look)
        {
            tracing::error!("no thread to look for what a run did not make: {error}");
            if let Some(failure) = self.lock().failures.get_mut(&of) {
                (failure.looking, failure.made) = (false, Some(false));
            }
        }
    }

    /// The newest run of a job here, if it failed, and no later backup is known.
    fn failed_run(&self, group: &Group, job: &JobRecord) -> Option<BackupEntry> {
        let (of, name) = (group.name(), &job.name);
        let run = self.history.newest(of, name)?;
        let counts = run.slot > job.since && !self.is_ahead(run.slot);
        if run.outcome != Outcome::Failed || !counts {
            return None;
        }
        let later = self.history.has_seen(&job.repository, of, name, run.slot);
        let watch_knows =
            || self.lock().watches.get(&job.id).is_some_and(|watch| watch.is_made_up_for(run.slot));
        (!later && !watch_knows()).then_some(run)
    }
}
