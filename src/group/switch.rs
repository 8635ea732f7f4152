//! A copy that takes an image from its primary: beside what is there, and then in its place by one
//! write of the metadata.
//!
//! A crash before that write leaves the old image, one after it the new one: the start finishes
//! what the write has decided. The old log leaves with the old image; what of it is not part of the
//! primary's history is kept as a branch before.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;

use serde_json::json;
use xxhash_rust::xxh3::Xxh3;

use super::branch::{Branch, Keeping, keep_segments};
use super::content::{Content, check_place};
use super::engine::{Core, Group, checkpoint};
use super::fold_damage::Awaited;
use super::merging::Merging;
use super::outlast::Outlasting;
use super::receive::Pending;
use super::returning::authored_behind;
use super::staging::{ImageOffer, ImagePart, ImageProgress, STAGING, Staged, Staging, State};
use super::timeline::Timeline;
use super::{GroupError, Role};
use crate::base::ControlState;
use crate::events::Severity;
use crate::log::writer::Writer;
use crate::units::{ByteSize, Lsn, Position};

/// Why images of the time before the switch can no longer be read.
const REPLACED: &str = "this copy was brought up by an image of its primary, which replaced it";

impl Group {
    /// What is staged of an image that may be gone on with: what belongs to the end of the log that
    /// is here.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn staged(&self) -> Result<Option<Staged>, GroupError> {
        let mut staging = self.staging.lock().expect("no holder panics");
        let here = {
            let core = self.lock();
            (core.writer.head(), core.writer.chain())
        };
        let Some(known) = staging.as_ref() else { return Ok(None) };
        if (known.state.old_head, known.state.old_chain) != here {
            *staging = None;
            drop(staging);
            self.drop_staging()?;
            return Ok(None);
        }
        if !known.state.complete {
            self.on_staged(&mut staging, Staging::checkpoint)
                .map_err(|cause| self.io("make what is staged durable", &cause))?;
        }
        Ok(staging.as_ref().map(Staging::staged))
    }

    /// Does something with what is staged, where anything is. A part that is refused changes
    /// nothing, and may come again as it should be. After an error of the disk not all that the
    /// memory takes for staged is there: what a start would find is, and without that the image
    /// begins anew.
    fn on_staged(
        &self,
        staging: &mut Option<Staging>,
        act: impl FnOnce(&mut Staging) -> io::Result<()>,
    ) -> io::Result<()> {
        let done = staging.as_mut().map_or(Ok(()), act);
        if let Err(cause) = &done
            && cause.kind() != io::ErrorKind::InvalidData
        {
            let found = Staging::open(self.context.env.disk.clone(), &self.dir);
            *staging = found.ok().map(Staging::behind_a_gap);
            self.note_receiving(staging.as_ref());
        }
        done
    }

    /// An image will come: makes ready to stage it.
    ///
    /// # Errors
    ///
    /// Where this is no copy, the image does not fit what is here, what would be cut off was
    /// written here, or what the disk says.
    pub fn begin_image(&self, offer: &ImageOffer) -> Result<(), GroupError> {
        {
            // What is shown of the image before this one may still be in its place.
            let _no_fold = self.fold_lock.lock().expect("no holder panics");
            self.finish_merge()?;
        }
        for place in [offer.position.lsn, offer.common] {
            check_place(place).map_err(|what| self.refused(format!("is sent an image: {what}")))?;
        }
        let mut staging = self.staging.lock().expect("no holder panics");
        let (head, chain, epoch) = {
            let core = self.lock();
            self.check_takes_image(&core, offer.position, offer.common)?;
            (core.writer.head(), core.writer.chain(), core.epoch)
        };
        if offer.since.is_some_and(|since| since != head || offer.common != head) {
            return Err(self.refused(format!("ends at LSN {head}, not where the image goes on")));
        }
        let partial = offer.since.is_some();
        if partial && self.needs_whole_image() {
            return Err(self.refused("holds no image that one could be a change of"));
        }
        self.lock().pending = Pending::default();
        let io = |cause| self.io("stage an image", &cause);
        let goes_on = staging.as_ref().is_some_and(|known| {
            (known.state.old_head, known.state.old_chain, known.state.partial)
                == (head, chain, partial)
        });
        match offer.resumed {
            true if goes_on => {
                self.on_staged(&mut staging, |known| known.resume(offer)).map_err(io)?;
            }
            true => {
                return Err(self.refused("has nothing staged that the image could go on from"));
            }
            false => {
                *staging = None;
                let state = State {
                    image: offer.position,
                    partial,
                    old_head: head,
                    old_epoch: epoch,
                    old_chain: chain,
                    common: offer.common,
                    reached: Vec::new(),
                    ranges_bytes: 0,
                    ranges_sum: Xxh3::new().digest(),
                    progress: ImageProgress::told(offer.done_bytes, offer.total_bytes),
                    complete: false,
                    branch: None,
                };
                let disk = self.context.env.disk.clone();
                *staging = Some(Staging::create(disk, &self.dir, state).map_err(io)?);
            }
        }
        self.note_receiving(staging.as_ref());
        drop(staging);
        self.notify();
        Ok(())
    }

    /// Stages a part of the image; how far it is.
    ///
    /// # Errors
    ///
    /// Where the part is wrong, or what the disk says.
    pub fn stage(&self, part: ImagePart) -> Result<ImageProgress, GroupError> {
        let mut staging = self.staging.lock().expect("no holder panics");
        let Some(known) = staging.as_ref() else {
            return Err(self.refused("expects no image"));
        };
        {
            let core = self.lock();
            self.check_takes_image(&core, known.state.image, known.state.common)?;
            if core.writer.head() != known.state.old_head {
                return Err(self.refused("has gone on from where the image began"));
            }
        }
        self.on_staged(&mut staging, |known| known.put(part))
            .map_err(|cause| self.io("stage an image", &cause))?;
        self.note_receiving(staging.as_ref());
        Ok(staging.as_ref().expect("looked at").state.progress)
    }

    fn note_receiving(&self, staging: Option<&Staging>) {
        let mut core = self.lock();
        core.receiving = staging.map(|staging| staging.state.progress);
    }

    /// Forgets what is staged: the log reaches this copy, or it is primary.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn drop_staging(&self) -> Result<(), GroupError> {
        let mut staging = self.staging.lock().expect("no holder panics");
        // What was switched to is needed until it is in the base; and what a failed group has
        // staged, the next start may find switched to.
        if self.merging().is_some() || self.lock().failed.is_some() {
            return Ok(());
        }
        *staging = None;
        self.note_receiving(None);
        Staging::remove(&*self.context.env.disk, &self.dir)
            .map_err(|cause| self.io("remove staging", &cause))
    }

    fn check_takes_image(
        &self,
        core: &Core,
        image: Position,
        common: Lsn,
    ) -> Result<(), GroupError> {
        self.failed_error(core)?;
        let (name, head) = (self.name(), core.writer.head());
        if core.closed {
            return Err(self.refused("is closed"));
        }
        if core.role == Role::Primary {
            return Err(self.refused("is primary here, and takes no image"));
        }
        if common == head && image.lsn < head {
            return Err(self.refused(format!("ends at LSN {head}, behind the image")));
        }
        if let Some(barrier) = core.content.barrier {
            return Err(self.refused(format!(
                "the record at {barrier} must be understood, and this version does not; upgrade \
                 the node"
            )));
        }
        if authored_behind(&core.view.epochs, self.context.node.id, common, head) {
            return Err(self.refused(format!(
                "{} behind LSN {common} were written by {node} and are not in its peer's history, \
                 whose log no longer reaches there: on {node} save what is needed with `tidelog \
                 image open {name} --at now`, then `tidelog group delete {name}` and replicate anew",
                ByteSize(head.bytes_since(common)),
                node = self.context.node.name
            )));
        }
        Ok(())
    }

    /// Shows the image that was staged to its end, in the place of what was here. Durable on
    /// return: the log goes on at the image. What was staged becomes part of the base later.
    ///
    /// # Errors
    ///
    /// Where it is not complete, or no longer fits; what the disk says. An error after the
    /// decision fails the group, and the next start finishes it.
    pub fn switch_to_image(&self) -> Result<Position, GroupError> {
        let _turn = self.turn.lock().expect("no holder panics");
        let _no_fold = self.fold_lock.lock().expect("no holder panics");
        let mut staging = self.staging.lock().expect("no holder panics");
        // An image that came before is in the base first.
        self.finish_merge()?;
        let Some(state) = staging.as_ref().map(|known| known.state.clone()) else {
            return Err(self.refused("has no image to switch to"));
        };
        if !state.complete {
            return Err(self.refused("has no image to switch to: not all of it has come"));
        }
        let mut outlasting = Outlasting::nothing(state.image.lsn);
        if state.partial {
            self.fold_all()?;
            let known = staging.as_ref().expect("looked at");
            if let Some(control) = &known.control {
                outlasting = self.keep_what_image_replaces(known, control)?;
            }
        }
        self.keep_what_parts(staging.as_mut().expect("looked at"))?;
        let _no_sync = self.sync_lock.lock().expect("no holder panics");
        let known = staging.take().expect("looked at");
        let mut core = self.lock();
        self.check_takes_image(&core, state.image, state.common)?;
        if (core.writer.head(), core.writer.chain()) != (state.old_head, state.old_chain) {
            return Err(self.refused("has gone on from where the image began"));
        }
        let Some(merging) = Merging::of(known) else {
            return Err(self.refused("has no image to switch to: its control state is missing"));
        };
        let lost: Vec<_> = {
            let moments = core.moments.values();
            moments.filter(|moment| !outlasting.has(moment.lsn())).cloned().collect()
        };
        let switched = self.switch_locked(&mut core, merging, &mut outlasting);
        drop(core);
        // Also where it did not: the group may have failed with it.
        self.report();
        switched?;
        let text = format!(
            "an image of the primary took the place of this copy: it is at LSN {} now, was at {}",
            state.image.lsn, state.old_head
        );
        let details = json!({ "position": state.image, "from_lsn": state.old_head });
        self.emit(Severity::Info, "image-received", text, details);
        drop((_no_sync, staging));
        for moment in lost {
            self.let_go(&moment, REPLACED);
        }
        drop((_no_fold, _turn));
        self.try_keep_images();
        self.workers.wake_folder();
        self.space.notify_all();
        self.notify();
        Ok(state.image)
    }

    /// The one step, and what follows from it in memory.
    fn switch_locked(
        &self,
        core: &mut Core,
        merging: Merging,
        outlasting: &mut Outlasting,
    ) -> Result<(), GroupError> {
        let state = merging.control.clone();
        let at = state.position.lsn;
        let partial = merging.is_partial();
        let forgets = merging.forgets_births(&core.content);
        self.update_meta_locked(core, |meta| {
            (meta.merging, meta.old_log) = (true, true);
            (meta.fold_target, meta.horizon, meta.durable, meta.log_begin) = (at, at, at, at);
            if forgets {
                meta.births_from = at;
            }
        })?;
        for image in core.images.values().filter(|image| !outlasting.has(image.leaves_log_at())) {
            image.break_hold(REPLACED);
        }
        for moment in core.moments.values().filter(|moment| !outlasting.has(moment.lsn())) {
            moment.give_up(REPLACED.to_owned());
        }
        outlasting.take_effect();
        let opened = self.begin_log_anew(&merging);
        let writer = match opened {
            Ok(writer) => writer,
            Err(cause) => return Err(self.fail_locked(core, "go on at an image", &cause)),
        };
        if !partial {
            *self.bases.write().expect("no holder panics") = merging.volumes.clone();
        }
        *self.merging.write().expect("no holder panics") = Some(std::sync::Arc::new(merging));
        self.log_begin.store(at.0, Ordering::Release);
        core.writer = writer;
        core.content = Content::at_horizon(&state);
        core.timeline = Timeline::new(checkpoint(&state), self.segment_bytes());
        core.clock.follow(state.position.time, self.context.env.clock.monotonic());
        core.epoch = state.position.epoch;
        core.unflushed = true;
        core.cuts += 1;
        // The files of the base stay as they are until what is staged is in it.
        let bases = if partial { core.horizon.bases.clone() } else { Default::default() };
        core.horizon = std::sync::Arc::new(ControlState { bases, ..state });
        core.fold_target = at;
        core.unfinished_fold = None;
        core.may_be_torn = false;
        core.pending = Pending::default();
        core.awaited = Awaited::default();
        core.committed = at;
        core.receiving = None;
        core.needs_image = None;
        core.refresh_view();
        self.set_durable(core, at);
        Ok(())
    }

    /// The old segments go, and the first one of the new log is there.
    fn begin_log_anew(&self, merging: &Merging) -> io::Result<Writer> {
        for number in self.segments.numbers().into_iter().rev() {
            self.segments.take_out(number, None)?;
        }
        // The image may lie before what they hold.
        self.segments.drop_idle()?;
        self.context.env.disk.sync_dir(self.segments.dir())?;
        self.write_meta(|meta| meta.old_log = false)?;
        let control = &merging.control;
        let at = control.position.lsn;
        self.segments.ensure(at.segment_number(self.segment_bytes()))?;
        Writer::open(self.segments.clone(), at, control.chain, control.requests)
    }

    /// Keeps the end of the log that is not part of the primary's history, once.
    fn keep_what_parts(&self, staging: &mut Staging) -> Result<(), GroupError> {
        let state = &staging.state;
        if state.common >= state.old_head || state.branch.is_some() {
            return Ok(());
        }
        let common = state.common;
        let (end, epoch) = {
            let core = self.lock();
            let before = core.view.epochs.iter().rfind(|reign| reign.first_lsn < common);
            (core.timeline.end().position(), before.map(|reign| reign.id))
        };
        let branch = Branch {
            name: String::new(),
            from: Position { lsn: common, epoch: epoch.unwrap_or(end.epoch), ..end },
            to: end,
            bytes: end.lsn.bytes_since(common),
            authored: false,
            cut: self.context.env.clock.wall(),
            reason: "its primary's history goes on without it".to_owned(),
        };
        let mut keeping = Keeping::new(&self.dir, branch);
        let kept = keep_segments(&self.segments, common, &mut keeping)
            .map_err(|cause| self.io("keep what leaves the history", &cause))?;
        if let Some(branch) = kept {
            staging.state.branch = Some(branch.name.clone());
            staging.store_state().map_err(|cause| self.io("note a branch", &cause))?;
            self.tell_of_branch(&branch);
        }
        Ok(())
    }

    /// Of what changed before this the base knows nothing.
    pub(super) fn births_from(&self) -> Lsn {
        self.meta.lock().expect("no holder panics").meta.births_from
    }

    /// At the start: what an earlier run had staged.
    pub(super) fn take_up_staging(&self) {
        let disk = &self.context.env.disk;
        if matches!(disk.exists(&self.dir.join(STAGING)), Ok(false)) {
            return;
        }
        match Staging::open(disk.clone(), &self.dir) {
            Ok(staging) => {
                self.note_receiving(Some(&staging));
                *self.staging.lock().expect("no holder panics") = Some(staging);
            }
            Err(cause) => {
                tracing::warn!("{}: what was staged is dropped: {cause}", self.dir.display());
                if let Err(error) = self.drop_staging() {
                    tracing::warn!("{error}");
                }
            }
        }
    }
}

/// Removes what is staged of an image that was switched to, once it is in the base.
pub(super) fn remove_merged(disk: &dyn crate::io::Disk, group_dir: &Path) {
    if let Err(cause) = Staging::remove(disk, group_dir) {
        tracing::warn!("{}: staging: {cause}", group_dir.display());
    }
}
