//! Whose turn it is: promote, demote, and closing in order.

use std::sync::atomic::Ordering;

use serde_json::{Map, json};

use super::engine::Group;
use super::receive::Pending;
use super::{EpochRecord, GroupError, NodeIdentity, Role};
use crate::events::Severity;
use crate::log::control::{COUNTER_MAX, Control, MemberRecord, Mode, OnLoss};
use crate::units::{Chain, EpochId, Lsn};

/// What came of [`Group::take_over`].
#[derive(Debug)]
pub enum TookOver {
    /// This node reigns.
    Reigns(EpochRecord),
    /// It does not, and no record of a reign was written.
    Refused(GroupError),
}

impl Group {
    /// Begins a new epoch with this node as its author; durable on return. The present epoch where
    /// this node reigns already.
    ///
    /// # Errors
    ///
    /// Where there is no image yet, the group failed, or the log has a record that must be
    /// understood and is not.
    pub fn promote(&self, reason: &str) -> Result<EpochRecord, GroupError> {
        let _turn = self.turn.lock().expect("no holder panics");
        if self.role() == Role::Primary {
            // An operator has decided: nobody is asked any more.
            self.serve_in_turn()?;
            self.become_member();
            let last = self.control().epochs.last().cloned();
            return Ok(last.expect("a primary began an epoch"));
        }
        let counter = self.prepare_reign()?;
        self.begin_reign(reason, counter, None)
    }

    /// Begins a reign at exactly this end of the log, which its primary hands over.
    ///
    /// # Errors
    ///
    /// What leaves open whether this node reigns: it did already, or its disk failed while the
    /// record of the reign was written.
    pub fn take_over(&self, head: Lsn, chain: Chain) -> Result<TookOver, GroupError> {
        let _turn = self.turn.lock().expect("no holder panics");
        if self.role() == Role::Primary {
            return Err(self.refused("is primary here already"));
        }
        let counter = match self.prepare_reign() {
            Ok(counter) => counter,
            Err(error) => return Ok(TookOver::Refused(error)),
        };
        let error = match self.begin_reign(EpochRecord::SWITCHOVER, counter, Some((head, chain))) {
            Ok(epoch) => return Ok(TookOver::Reigns(epoch)),
            Err(error) => error,
        };
        // A failed write may have left the whole record in the log.
        let core = self.lock();
        let untouched = core.role == Role::Secondary && core.failed.is_none();
        if untouched { Ok(TookOver::Refused(error)) } else { Err(error) }
    }

    /// Whether this node may begin a reign, and the lowest number of it. What came from the other
    /// primary is durable on return, before anything of our own.
    fn prepare_reign(&self) -> Result<u64, GroupError> {
        let counter = {
            let core = self.lock();
            self.failed_error(&core)?;
            let last = core.view.epochs.last();
            if core.closed {
                return Err(self.refused("is closed"));
            }
            let Some(last) = last else {
                return Err(self.refused("has no image yet; wait until its primary has sent one"));
            };
            if let Some(lsn) = core.content.barrier {
                return Err(self.refused(format!(
                    "the record at {lsn} must be understood, and this version does not; upgrade the node"
                )));
            }
            if let Some(target) = core.content.base_ahead {
                return Err(self.base_is_ahead(target));
            }
            last.counter.saturating_add(1)
        };
        let durable = self.sync_now()?;
        self.update_meta(|meta| meta.durable = meta.durable.max(durable))?;
        Ok(counter)
    }

    fn begin_reign(
        &self,
        reason: &str,
        counter: u64,
        at: Option<(Lsn, Chain)>,
    ) -> Result<EpochRecord, GroupError> {
        // Who opened a volume under an earlier reign, and was idle since, may know another history.
        if reason != EpochRecord::SWITCHOVER_REFUSED {
            self.disconnect_clients();
        }
        let epoch = self.begin_epoch_at(self.new_epoch(reason, counter), at)?;
        self.become_member();
        self.notify();
        Ok(epoch)
    }

    /// Begins a reign of this node: the record is the first of the new epoch, and durable on
    /// return.
    pub(super) fn begin_epoch(&self, epoch: EpochRecord) -> Result<EpochRecord, GroupError> {
        self.begin_epoch_at(epoch, None)
    }

    /// The same at exactly this end of the log, where one is given.
    fn begin_epoch_at(
        &self,
        mut epoch: EpochRecord,
        at: Option<(Lsn, Chain)>,
    ) -> Result<EpochRecord, GroupError> {
        // Hosts are served as soon as the record is in the log: no crash behind that may leave a
        // node that does not know whose it is.
        self.update_meta(|meta| {
            if !meta.reigns {
                meta.reign = epoch.id;
            }
        })?;
        let appended = self.append_reign(&mut epoch, at);
        self.report();
        self.notify();
        let end = appended.inspect_err(|_| self.forget_reign())?;
        self.sync_now()?;
        // What a log that is damaged before the record cannot tell.
        self.write_meta(|meta| {
            (meta.reigns, meta.retired, meta.reign_due) = (true, false, false);
            meta.durable = meta.durable.max(end);
        })
        .map_err(|cause| self.fail("write meta", &cause))?;
        Ok(epoch)
    }

    /// The record of a reign; where it ends.
    fn append_reign(
        &self,
        epoch: &mut EpochRecord,
        at: Option<(Lsn, Chain)>,
    ) -> Result<Lsn, GroupError> {
        let mut core = self.lock();
        let (head, chain) = (core.writer.head(), core.writer.chain());
        if let Some(at) = at.filter(|at| *at != (head, chain)) {
            return Err(self.refused(format!("ends at LSN {head}, not as asked at {}", at.0)));
        }
        // A group that is being closed is marked as ending where it ends now.
        if core.closed {
            return Err(self.refused("is closed"));
        }
        // One more than the last, also where that came between the decision and now.
        let last = core.view.epochs.last().map_or(0, |last| last.counter);
        epoch.counter = epoch.counter.max(last.saturating_add(1));
        if epoch.counter > COUNTER_MAX {
            return Err(self.refused("has used all numbers of reigns; make another group"));
        }
        // A pad before it belongs to the reign already: here the histories part.
        epoch.first_lsn = core.writer.head();
        let control = Control::Epoch(epoch.clone());
        let end = self.append_body(&mut core, &control, Some(epoch.id), &mut Vec::new());
        if let Ok(end) = end {
            assert!(end > epoch.first_lsn, "epoch {} ends at {end}", epoch.first_lsn);
            core.role = Role::Primary;
            (core.retired, core.needs_image) = (None, None);
            core.pending = Pending::default();
            let now = core.clock.last();
            core.required.begin_anew(now);
        }
        end
    }

    /// A reign was noted, and its record was refused: no later loss of power has taken it away.
    fn forget_reign(&self) {
        if self.lock().failed.is_some() {
            return;
        }
        // An error is told, and the group has failed with it.
        let _ = self.update_meta(|meta| {
            if !meta.reigns {
                meta.reign = EpochId(0);
            }
        });
    }

    /// Who reigns holds the group: the record that replication to this node was stopped ends here.
    /// It would else count as stopped once more when it steps down. A failure is told: it reigns.
    pub(super) fn become_member(&self) {
        let NodeIdentity { id, name } = &self.context.node;
        let own = MemberRecord {
            node: *id,
            name: name.clone(),
            mode: Mode::default(),
            on_loss: OnLoss::default(),
            rpo_target: None,
            removed: false,
            other: Map::new(),
        };
        let mut freed = Vec::new();
        let appended = {
            let mut core = self.lock();
            let members = &core.view.members;
            let known = members.is_empty() || members.iter().any(|member| member.node == *id);
            // Who halts the writers is about to demote, and waits for the turn that is held here.
            if known || core.halted.is_some() || core.closed {
                return;
            }
            let may = self.failed_error(&core);
            may.and_then(|()| self.append_body(&mut core, &Control::Member(own), None, &mut freed))
        };
        drop(freed);
        self.report();
        self.notify();
        if let Err(error) = appended.and_then(|_| self.sync_now()) {
            let text = format!(
                "this node reigns, but its record as a member could not be written: {error}; \
                 `tidelog replicate {} --to PEER` writes it once there is room",
                self.name()
            );
            self.emit(Severity::Warning, "member-not-written", text, json!(null));
        }
    }

    /// Has writers wait, until [`Group::resume_writers`], so that the end of the log stays where it
    /// is. Reads and syncs go on.
    ///
    /// # Errors
    ///
    /// Where this node does not serve as primary, or writers wait already.
    pub fn halt_writers(&self, why: &str) -> Result<(), GroupError> {
        let mut core = self.lock();
        self.failed_error(&core)?;
        if core.role != Role::Primary {
            return Err(GroupError::NotPrimary { group: self.name().clone() });
        }
        if core.asking.is_some() {
            return Err(self.refused("has just started, and serves nobody yet; try again"));
        }
        if let Some(halted) = &core.halted {
            return Err(self.refused(format!("has its writers halted already: {halted}")));
        }
        core.halted = Some(why.to_owned());
        Ok(())
    }

    /// Writers go on.
    pub fn resume_writers(&self) {
        self.lock().halted = None;
        self.space.notify_all();
        self.notify();
    }

    /// Stops taking writes; durable on return.
    ///
    /// # Errors
    ///
    /// What the disk says; the group then takes no writes either.
    pub fn demote(&self) -> Result<(), GroupError> {
        let _turn = self.turn.lock().expect("no holder panics");
        {
            let mut core = self.lock();
            let ended = !self.meta.lock().expect("no holder panics").meta.reigns;
            // A demote that failed half-way is taken up again: it counts only when it is written.
            if core.role == Role::Secondary && ended {
                return Ok(());
            }
            core.role = Role::Secondary;
            core.asking = None;
        }
        self.notify();
        let durable = self.sync_now()?;
        {
            let mut core = self.lock();
            core.committed = core.committed.max(durable);
        }
        self.fail_held();
        self.update_meta(|meta| {
            (meta.reigns, meta.reign) = (false, EpochId(0));
            meta.split_from = None;
            meta.durable = meta.durable.max(durable);
        })?;
        self.space.notify_all();
        self.notify();
        Ok(())
    }

    /// Closes in order: stops the threads, syncs, and marks the log as clean. Later appends fail.
    ///
    /// # Errors
    ///
    /// What the disk says; the next start then recovers.
    pub fn close(&self) -> Result<(), GroupError> {
        {
            let mut core = self.lock();
            if core.closed {
                return Ok(());
            }
            core.closed = true;
        }
        self.space.notify_all();
        {
            let _held = self.waiters.lock().expect("no holder panics");
            self.workers.ask_to_stop();
            self.waiters_changed.notify_all();
        }
        self.workers.join();
        let synced = self.sync_now();
        self.fail_waiters();
        // Images hold the group; the file beside it remembers them.
        self.forget_images();
        let durable = synced?;
        self.note_clock();
        assert_eq!(durable.0, self.durable.load(Ordering::Acquire), "closed at the head");
        self.update_meta(|meta| {
            meta.durable = durable;
            meta.clean = true;
        })
    }

    /// Lets go of its images, which hold it: for who plays a process that is killed, and has others
    /// to play.
    #[doc(hidden)]
    pub fn forget_images(&self) {
        let images = std::mem::take(&mut self.lock().images);
        drop(images);
    }

    /// Reads raw log bytes `[from, from + buffer.len())` below the head, from the page cache and
    /// without the group's mutex held.
    ///
    /// # Errors
    ///
    /// Where the range is not below the head, or was folded.
    pub fn read_log(&self, from: Lsn, buffer: &mut [u8]) -> Result<(), GroupError> {
        let (head, end) = (self.lock().writer.head(), from.0.checked_add(buffer.len() as u64));
        let not_covered = || self.not_in_log(from, head);
        if end.is_none_or(|end| end > head.0) || from < self.log_start() {
            return Err(not_covered());
        }
        self.segments.read(from, buffer).map_err(|cause| match cause.kind() {
            std::io::ErrorKind::NotFound => not_covered(),
            _ => self.io("read log", &cause),
        })
    }

    /// The lowest LSN that [`Group::read_log`] can serve: the start of a record.
    #[must_use]
    pub fn log_start(&self) -> Lsn {
        let first = self.segments.numbers().first().copied().unwrap_or_default();
        let begin = self.log_begin.load(Ordering::Acquire);
        Lsn((first * self.segment_bytes()).max(begin))
    }
}
