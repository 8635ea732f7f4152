//! Whose turn it is: promote, demote, and closing in order.

use std::sync::atomic::Ordering;

use serde_json::{Map, json};

use super::engine::Group;
use super::{EpochRecord, GroupError, NodeIdentity, Role};
use crate::events::Severity;
use crate::log::control::{Control, MemberRecord, Mode, OnLoss};
use crate::units::Lsn;

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
        let counter = {
            let mut core = self.lock();
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
            let counter = last.counter.saturating_add(1);
            core.pending = super::receive::Pending::default();
            counter
        };
        // What came from the other primary is durable here before anything of our own.
        let durable = self.sync_now()?;
        self.update_meta(|meta| meta.durable = meta.durable.max(durable))?;
        let epoch = self.begin_epoch(self.new_epoch(reason, counter))?;
        {
            let mut core = self.lock();
            (core.retired, core.needs_image) = (None, None);
        }
        self.become_member();
        self.notify();
        Ok(epoch)
    }

    /// Who reigns holds the group: the record that replication to this node was stopped ends here.
    /// It would else count as stopped once more when it steps down. A failure is told: it reigns.
    fn become_member(&self) {
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
            let author = core.view.epochs.last().map(|epoch| epoch.author);
            let ended = author != Some(self.context.node.id)
                || self.meta.lock().expect("no holder panics").meta.demoted;
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
            (meta.demoted, meta.reigns) = (true, false);
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
