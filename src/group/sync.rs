//! Durability: one sync for all that wait, completed by position.

use std::sync::atomic::Ordering;

use super::engine::{Core, Group};
use super::{Done, GroupError, Role};
use crate::units::Lsn;

/// Somebody who waits for a position to be durable.
pub(super) struct Waiter {
    lsn: Lsn,
    done: Done,
}

impl Group {
    /// Calls `done` when everything up to `lsn` is durable here: at once, or from the thread that
    /// syncs.
    pub fn when_durable(&self, lsn: Lsn, done: Done) {
        let failed = self.lock().failed.is_some();
        let mut waiters = self.waiters.lock().expect("no holder panics");
        if self.durable.load(Ordering::Acquire) >= lsn.0 {
            drop(waiters);
            return done(Ok(()));
        }
        if failed {
            drop(waiters);
            let result = self.failed_error(&self.lock());
            return done(result);
        }
        waiters.push(Waiter { lsn, done });
        drop(waiters);
        self.waiters_changed.notify_one();
        // A failure that came between the look and the push has already emptied the list.
        if self.lock().failed.is_some() {
            self.fail_waiters();
        }
    }

    /// Makes everything appended so far durable; up to where that is.
    ///
    /// # Errors
    ///
    /// What the disk says. It is latched: nothing is synced again as if nothing had happened.
    pub fn sync_now(&self) -> Result<Lsn, GroupError> {
        let _one_at_a_time = self.sync_lock.lock().expect("no holder panics");
        let (durable, head) = {
            let core = self.lock();
            self.failed_error(&core)?;
            (core.durable, core.writer.head())
        };
        if head > durable {
            // In order, every segment not yet synced.
            let last = (head.0 - 1) / self.segment_bytes();
            for number in durable.segment_number(self.segment_bytes())..=last {
                let synced = match self.segments.get(number) {
                    Some(segment) => segment.file.sync(),
                    None => Err(std::io::ErrorKind::NotFound.into()),
                };
                if let Err(cause) = synced {
                    return Err(self.fail(&format!("sync of segment {number}"), &cause));
                }
            }
            let mut core = self.lock();
            self.set_durable(&mut core, head);
        }
        self.complete_waiters(head);
        if head > durable {
            self.notify();
        }
        Ok(head)
    }

    fn complete_waiters(&self, durable: Lsn) {
        let mut waiters = self.waiters.lock().expect("no holder panics");
        let (done, rest) =
            std::mem::take(&mut *waiters).into_iter().partition(|waiter| waiter.lsn <= durable);
        *waiters = rest;
        drop(waiters);
        for waiter in done {
            (waiter.done)(Ok(()));
        }
    }

    pub(super) fn fail_waiters(&self) {
        let error = match self.failed_error(&self.lock()) {
            Err(error) => error,
            Ok(()) => self.refused("is closed"),
        };
        // Not held over the calls: who is told may wait for something else at once.
        let failed = std::mem::take(&mut *self.waiters.lock().expect("no holder panics"));
        for waiter in failed {
            (waiter.done)(Err(error.clone()));
        }
    }

    /// The lock for an append of the primary: waits while the log is full, and checks that this
    /// group takes writes.
    pub(super) fn lock_for_append(&self) -> Result<std::sync::MutexGuard<'_, Core>, GroupError> {
        let mut core = self.lock();
        loop {
            self.failed_error(&core)?;
            if core.closed {
                return Err(self.refused("is closed"));
            }
            if core.role != Role::Primary {
                return Err(GroupError::NotPrimary { group: self.name().clone() });
            }
            if core.asking.is_some() {
                core = self.wait_for_answer(core)?;
                continue;
            }
            if core.halted.is_some() {
                core = self.space.wait(core).expect("a panic under the lock ends the process");
                continue;
            }
            if !self.workers.running() || self.log_bytes(&core) < self.log_limit(&core) {
                return Ok(core);
            }
            if let Some(reason) = &core.fold_failure {
                return Err(GroupError::NoSpace {
                    group: self.name().clone(),
                    reason: format!("the log is full, and folding fails: {reason}"),
                });
            }
            self.workers.wake_folder();
            core = self.space.wait(core).expect("a panic under the lock ends the process");
        }
    }
}
