//! Answers that come later: one sync for all that wait, completed by position, and the peers that
//! must hold the bytes too.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use super::engine::{Core, Group};
use super::required::Floors;
use super::{Done, GroupError, RequiredPeer, Role};
use crate::units::{Lsn, NodeId};

/// How often an append that waits looks whether its client is there.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What somebody waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// Durable here.
    Sync,
    /// Held by the peers that a write waits for.
    Held,
    /// Durable here, and held by the peers that a flush waits for.
    Flush,
}

/// Somebody who waits for a position.
struct Waiter {
    lsn: Lsn,
    wish: Wish,
    done: Done,
}

impl Waiter {
    /// Whether a sync up to `durable` is all that was missing here.
    fn is_durable(&self, durable: Lsn) -> bool {
        self.wish == Wish::Held || self.lsn <= durable
    }

    fn is_held(&self, floors: &Floors) -> bool {
        self.wish == Wish::Sync || floors.allow(self.lsn, self.wish == Wish::Flush)
    }
}

/// Who waits for what.
#[derive(Default)]
pub(super) struct Waiting {
    /// For the next sync here.
    here: Vec<Waiter>,
    /// For peers; durable here already where that matters.
    peers: Vec<Waiter>,
}

impl Waiting {
    /// Whether nobody waits for a sync.
    pub(super) fn is_idle(&self) -> bool {
        self.here.is_empty()
    }
}

impl Group {
    /// Calls `done` when everything up to `lsn` is durable here, and held by the peers that a flush
    /// waits for: at once, or from another thread.
    pub fn when_durable(&self, lsn: Lsn, done: Done) {
        self.wait_for(Waiter { lsn, wish: Wish::Flush, done });
    }

    /// Waits for what [`Group::when_durable`] tells, for as long as `goes_on` is no error.
    ///
    /// # Errors
    ///
    /// That of `goes_on`, or where it cannot be promised any more: the group failed, is closed, or
    /// has another primary.
    pub(super) fn wait_durable(
        &self,
        lsn: Lsn,
        goes_on: &dyn Fn() -> Result<(), GroupError>,
    ) -> Result<(), GroupError> {
        let (told, answer) = mpsc::channel();
        self.when_durable(lsn, Box::new(move |result| drop(told.send(result))));
        loop {
            match answer.recv_timeout(LOOK_EVERY) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) => goes_on()?,
                Err(RecvTimeoutError::Disconnected) => return Err(self.refused("is closed")),
            }
        }
    }

    /// Has everything up to `lsn` made durable here soon.
    pub(super) fn hurry_sync(&self, lsn: Lsn) {
        self.wait_for(Waiter { lsn, wish: Wish::Sync, done: Box::new(|_| {}) });
    }

    /// Whether a write that ends at `lsn` may be answered: all peers that it waits for hold it.
    #[must_use]
    pub fn is_held(&self, lsn: Lsn) -> bool {
        self.floors.allow(lsn, false)
    }

    /// Calls `done` when [`Group::is_held`] is true of `lsn`: at once, or from another thread.
    pub fn when_held(&self, lsn: Lsn, done: Done) {
        self.wait_for(Waiter { lsn, wish: Wish::Held, done });
    }

    fn wait_for(&self, waiter: Waiter) {
        let failed = self.lock().failed.is_some();
        let mut waiters = self.waiters.lock().expect("no holder panics");
        let here = waiter.is_durable(Lsn(self.durable.load(Ordering::Acquire)));
        if here && waiter.is_held(&self.floors) {
            drop(waiters);
            return (waiter.done)(Ok(()));
        }
        if failed {
            drop(waiters);
            let result = self.failed_error(&self.lock());
            return (waiter.done)(result);
        }
        if here {
            waiters.peers.push(waiter);
        } else {
            waiters.here.push(waiter);
        }
        drop(waiters);
        self.waiters_changed.notify_one();
        // What came between the look and the push has already emptied the list.
        let (failed, primary) = {
            let core = self.lock();
            (core.failed.is_some(), core.role == Role::Primary)
        };
        if failed {
            self.fail_waiters();
        } else if !primary {
            self.fail_held();
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
        let Waiting { here, peers } = &mut *waiters;
        peers.extend(here.extract_if(.., |waiter| waiter.is_durable(durable)));
        let done: Vec<Waiter> =
            peers.extract_if(.., |waiter| waiter.is_held(&self.floors)).collect();
        drop(waiters);
        for waiter in done {
            (waiter.done)(Ok(()));
        }
    }

    /// A peer holds so much, as it said to this node.
    pub fn note_peer_holds(&self, peer: NodeId, received: Lsn, durable: Lsn) {
        {
            let mut core = self.lock();
            let head = core.writer.head();
            let report = core.required.holds(peer, received, durable, head);
            core.unreported.extend(report);
        }
        self.space.notify_all();
        self.complete_waiters(Lsn(self.durable.load(Ordering::Acquire)));
        self.report();
    }

    /// A peer is lost, or its disk stands still; it holds no more than that, whatever it had said.
    pub fn note_peer_lost(&self, peer: NodeId, reason: &str, received: Lsn, durable: Lsn) {
        {
            let mut core = self.lock();
            let now = self.context.env.clock.wall();
            let report = core.required.lost(peer, reason, (received, durable), now);
            core.unreported.extend(report);
        }
        self.space.notify_all();
        self.complete_waiters(Lsn(self.durable.load(Ordering::Acquire)));
        self.report();
    }

    /// What answers wait for besides the local log, by peer.
    #[must_use]
    pub fn required_peers(&self) -> Vec<(NodeId, RequiredPeer)> {
        let core = self.lock();
        core.required.peers().iter().map(|(node, peer)| (*node, peer.clone())).collect()
    }

    /// This node is primary no more: what its peers were to hold is answered by nobody, and what
    /// was cut off is not answered as what came to stand there instead.
    pub(super) fn fail_held(&self) {
        let mut waiters = self.waiters.lock().expect("no holder panics");
        let Waiting { here, peers } = &mut *waiters;
        let hosts = |waiter: &mut Waiter| waiter.wish != Wish::Sync;
        let failed: Vec<Waiter> = peers.drain(..).chain(here.extract_if(.., hosts)).collect();
        drop(waiters);
        for waiter in failed {
            (waiter.done)(Err(GroupError::NotPrimary { group: self.name().clone() }));
        }
    }

    pub(super) fn fail_waiters(&self) {
        let error = match self.failed_error(&self.lock()) {
            Err(error) => error,
            Ok(()) => self.refused("is closed"),
        };
        // Not held over the calls: who is told may wait for something else at once.
        let failed = std::mem::take(&mut *self.waiters.lock().expect("no holder panics"));
        for waiter in failed.here.into_iter().chain(failed.peers) {
            (waiter.done)(Err(error.clone()));
        }
    }

    /// The lock for an append of the primary's hosts: waits while the log is full, or while a peer
    /// that answers wait for lacks too much of it. `ended` ends the wait; it is asked without the
    /// lock, and only where there is something to wait for.
    pub(super) fn lock_for_append(
        &self,
        ended: &dyn Fn() -> bool,
    ) -> Result<std::sync::MutexGuard<'_, Core>, GroupError> {
        loop {
            let (core, waited) = self.lock_when_it_serves()?;
            if waited {
                drop(core);
                if ended() {
                    return Err(self.refused("the client has gone"));
                }
                continue;
            }
            if !self.must_wait(&core) {
                return Ok(core);
            }
            if let Some(reason) = self.log_is_full(&core).then(|| core.room.refusal()).flatten() {
                return Err(GroupError::NoSpace {
                    group: self.name().clone(),
                    reason: format!("the log is full, and folding fails: {reason}"),
                });
            }
            self.workers.wake_folder();
            let waited = self.space.wait_timeout(core, LOOK_EVERY);
            drop(waited.expect("a panic under the lock ends the process"));
            if ended() {
                return Err(self.refused("the client has gone"));
            }
        }
    }

    /// Waits until an append of a host would not wait, or `at_most` so long; whether it would not.
    /// One that would be refused does not. Another may take the room meanwhile.
    pub fn has_room_within(&self, at_most: Duration) -> bool {
        let core = self.lock();
        let waits = |core: &Core| {
            let serves = core.role == Role::Primary && !core.closed && core.failed.is_none();
            let refused = self.log_is_full(core) && core.room.refusal().is_some();
            serves && !refused && self.must_wait(core)
        };
        if !waits(&core) {
            return true;
        }
        self.workers.wake_folder();
        let waited = self.space.wait_timeout(core, at_most);
        !waits(&waited.expect("a panic under the lock ends the process").0)
    }

    /// Whether an append of hosts waits: for room in the log, or for a peer that lacks too much.
    fn must_wait(&self, core: &Core) -> bool {
        let behind = !core.required.lets_append(core.writer.head());
        self.workers.running() && (behind || self.log_is_full(core))
    }

    pub(super) fn log_is_full(&self, core: &Core) -> bool {
        self.log_bytes(core) >= self.log_limit(core)
    }

    /// The lock for an append of the primary; checks that this group takes writes. A full log is no
    /// hindrance: what makes room for the hosts is a control record too.
    pub(super) fn lock_for_control(&self) -> Result<std::sync::MutexGuard<'_, Core>, GroupError> {
        self.lock_when_it_serves().map(|(core, _)| core)
    }

    /// The same, and whether that took a wait.
    fn lock_when_it_serves(&self) -> Result<(std::sync::MutexGuard<'_, Core>, bool), GroupError> {
        let mut core = self.lock();
        let mut waited = false;
        loop {
            self.failed_error(&core)?;
            if core.closed {
                return Err(self.refused("is closed"));
            }
            if core.role != Role::Primary {
                return Err(GroupError::NotPrimary { group: self.name().clone() });
            }
            if core.asking.is_some() {
                core = self.wait_for_answer(core, None)?;
                waited = true;
                continue;
            }
            if core.halted.is_none() {
                return Ok((core, waited));
            }
            waited = true;
            core = self.space.wait(core).expect("a panic under the lock ends the process");
        }
    }
}
