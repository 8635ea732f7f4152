//! Folding: the oldest part of the log goes into the base, and its segments are used again.
//!
//! The target is durable before the first write to the base, and from that moment no image below it
//! is given out; base and control state are durable before the horizon moves. A crash in between
//! leaves a base of which some blocks are newer than the horizon, every one of them also in the
//! log: nothing shows them but the log's own version, and the next start finishes the fold. So does
//! the next attempt after an error, before anything else is folded.
//!
//! Before the target is durable, what it changes for older moments that somebody needs is kept
//! apart (`keep.rs`): whoever is at one reads that, else the base.

use std::cell::Cell;
use std::sync::Arc;

use serde_json::json;

use super::GroupError;
use super::clock::window_start;
use super::content::VolumeContent;
use super::engine::{Group, checkpoint};
use super::fold_damage::{Rotted, Waits};
use super::fold_plan::{FoldFacts, FoldStep, fold_goal, fold_steps, written_at};
use super::lost::sizes_of;
use super::outlast::Outlasting;
use super::replay::replay;
use super::timeline::{Checkpoint, follow};
use crate::base::{BaseVolume, ControlState, edge_chunks};
use crate::events::Severity;
use crate::extent_map::ExtentMap;
use crate::log::control::OnFull;
use crate::units::{BLOCK_BYTES, CHUNK_BYTES, Lsn};

/// Bytes that are fetched and written at a time.
const BATCH_BYTES: usize = 1 << 20;
/// Chunks of the live map that are gone through under the mutex at a time.
const FORGET_CHUNKS: usize = 256;

impl Group {
    /// Folds up to the target that policy and limits allow; the new horizon.
    ///
    /// # Errors
    ///
    /// What the disk says, or damage in the log or the base; the horizon then stays.
    pub fn fold_now(&self) -> Result<Lsn, GroupError> {
        self.fold(true)
    }

    pub(super) fn fold(&self, forced: bool) -> Result<Lsn, GroupError> {
        let _one_at_a_time = self.fold_lock.lock().expect("no holder panics");
        self.failed_error(&self.lock())?;
        self.close_expired();
        self.finish_merge()?;
        self.sweep_moments()?;
        self.finish_fold(false)?;
        let horizon = {
            let core = self.lock();
            // What no peer has may yet leave the history: from the base nothing can be cut.
            if core.asking.is_some() {
                return Ok(core.timeline.horizon().lsn);
            }
            core.timeline.horizon()
        };
        let facts = self.fold_facts(forced)?;
        let rewinds = self.lock().content.rewinds.clone();
        let Some(goal) = fold_goal(&facts, &rewinds) else { return self.nothing_folded(&facts) };
        let from = self.lock().timeline.before_lsn(goal.target);
        let mut target = self.follow_to(from, |header| header.end() <= goal.target)?;
        if target.lsn <= horizon.lsn
            && let Some(reach) = goal.first_request_to
        {
            let first = Cell::new(true);
            target =
                self.follow_to(horizon, |header| first.replace(false) && header.end() <= reach)?;
        }
        if target.lsn <= horizon.lsn {
            return self.nothing_folded(&facts);
        }
        self.wait_for_records(horizon.lsn, target.lsn)?;
        {
            let mut core = self.lock();
            // A rewind may have come between; from here on none goes back behind the target.
            if core.content.rewinds.left_behind(target.lsn) {
                return Ok(horizon.lsn);
            }
            core.fold_target = core.fold_target.max(target.lsn);
        }
        self.fold_to(target, false)
    }

    /// The horizon stays. Where the log is full, and will be, that is an error: its writers are
    /// told, not held.
    fn nothing_folded(&self, facts: &FoldFacts) -> Result<Lsn, GroupError> {
        let full = facts.head.bytes_since(facts.horizon) >= facts.log_limit_bytes;
        self.tell_kept_for(full);
        match facts.barrier {
            Some(barrier) if full => Err(self.refused(format!(
                "the record at {barrier} must be understood, and this version does not, so that \
                 nothing behind it is folded; upgrade the node"
            ))),
            _ => Ok(facts.horizon),
        }
    }

    /// Tells once for which peer writers of a full log wait.
    fn tell_kept_for(&self, full: bool) {
        let kept = {
            let mut core = self.lock();
            let kept = self.kept_for(&core).filter(|kept| kept.blocks && full);
            if core.told_kept_for == kept {
                return;
            }
            core.told_kept_for.clone_from(&kept);
            kept
        };
        if let Some(kept) = kept {
            let text = format!(
                "the log is full, and writes wait: it is kept for {}, which has what is before LSN \
                 {} (on_peer_behind=block)",
                kept.peer, kept.from
            );
            let details = json!({ "peer": kept.peer, "from_lsn": kept.from });
            self.emit(Severity::Warning, "log-kept-for-peer", text, details);
        }
    }

    fn fold_facts(&self, forced: bool) -> Result<FoldFacts, GroupError> {
        let clock = &self.context.env.clock;
        let (oldest, from) = {
            let core = self.lock();
            let now = core.clock.peek(clock.wall(), clock.monotonic());
            let oldest = window_start(now, self.window(&core), &core.content.table.unmeasured());
            (oldest, core.timeline.before_time(oldest))
        };
        let window_end = self.follow_to(from, |header| header.time <= oldest)?.lsn;
        let core = self.lock();
        let kept = self.kept_for(&core);
        let from = |blocks| {
            let kept = kept.as_ref().filter(|kept| kept.blocks == blocks);
            kept.map_or(Lsn::MAX, |kept| kept.from)
        };
        Ok(FoldFacts {
            horizon: core.timeline.horizon().lsn,
            head: core.writer.head(),
            durable: core.durable,
            // What a peer lacks counts as what could be lost, where the log is to wait for it.
            committed: core.committed().min(from(true)),
            barrier: core.content.barrier,
            // Unless space is short, the log is kept for a peer that follows.
            window_end: window_end.min(from(false)),
            log_limit_bytes: self.log_limit(&core),
            window_is_kept: core.view.policy.on_full == OnFull::Block,
            forced,
        })
    }

    fn follow_to(
        &self,
        from: Checkpoint,
        keep: impl Fn(&crate::log::record::Header) -> bool,
    ) -> Result<Checkpoint, GroupError> {
        let end = self.lock().timeline.end().lsn;
        follow(&self.segments, from, end, keep).map_err(|cause| GroupError::Damaged {
            group: self.name().clone(),
            what: format!("log behind {}: {cause}", from.lsn),
        })
    }

    /// At the start: a fold up to `target` had begun. Its target is as good as the horizon for
    /// everybody, but blocks in it may be torn until it is finished. Where that fails now, the
    /// group opens all the same, and it is tried again with every round of the folder.
    pub(super) fn take_up_fold(&self, target: Lsn) {
        let _one_at_a_time = self.fold_lock.lock().expect("no holder panics");
        {
            let mut core = self.lock();
            core.unfinished_fold = Some(target);
            core.may_be_torn = true;
        }
        if let Err(error) = self.finish_fold(false) {
            let text = format!("a fold that was interrupted could not be finished: {error}");
            self.emit(Severity::Error, "fold-failed", text, json!({ "target": target }));
        }
    }

    /// Finishes what an earlier attempt began, if any did; as of [`Group::fold_to`].
    fn finish_fold(&self, gives_up: bool) -> Result<(), GroupError> {
        let (target, horizon, end) = {
            let core = self.lock();
            let Some(target) = core.unfinished_fold else { return Ok(()) };
            (target, core.timeline.horizon().lsn, core.timeline.end().lsn)
        };
        if target <= horizon {
            let mut core = self.lock();
            core.unfinished_fold = None;
            core.may_be_torn = false;
            return Ok(());
        }
        if target > end {
            return Err(self.base_is_ahead(target));
        }
        let from = self.lock().timeline.before_lsn(target);
        let found = self.follow_to(from, |header| header.end() <= target)?;
        self.fold_to(found, gives_up).map(|_| ())
    }

    /// The log ends before `target`, up to which a fold had begun.
    pub(super) fn base_is_ahead(&self, target: Lsn) -> GroupError {
        self.damaged(format!(
            "the log here ends before LSN {target}, up to which a part of it is in the base \
             already, so that nothing here is a moment of the group: a copy is sent an image by \
             its primary, a primary goes on once its log is repaired"
        ))
    }

    /// Folds all of the log, whatever its policy is, for who holds the lock of the folder: an image
    /// takes the place of what the base will be. What is damaged may be what the image brings.
    pub(super) fn fold_all(&self) -> Result<(), GroupError> {
        self.sync_now()?;
        self.finish_fold(true)?;
        let end = self.lock().timeline.end();
        if end.lsn > self.lock().timeline.horizon().lsn {
            self.fold_to(end, true)?;
        }
        Ok(())
    }

    /// Folds up to the end of a request; whether what the disk cannot read is not waited for.
    fn fold_to(&self, target: Checkpoint, gives_up: bool) -> Result<Lsn, GroupError> {
        let folded = loop {
            match self.write_base(&target, gives_up) {
                Err(GroupError::NoSpace { .. })
                    if self.segments.drop_spares().unwrap_or(false) || self.make_room() => {}
                folded => break folded,
            }
            // What the next round finds torn, this one may have written.
            if self.has_begun(target.lsn) {
                let mut core = self.lock();
                core.unfinished_fold = Some(target.lsn);
                core.may_be_torn = true;
            }
        };
        let begun = self.has_begun(target.lsn);
        {
            let mut core = self.lock();
            core.unfinished_fold = (folded.is_err() && begun).then_some(target.lsn);
            core.may_be_torn = match &folded {
                Ok(()) => false,
                // All that it wrote is whole; what an attempt before has torn may be so still.
                Err(GroupError::Waits { .. }) => core.may_be_torn,
                Err(_) => begun,
            };
        }
        folded?;
        self.lock().awaited.end_attempts();
        self.update_meta(|meta| meta.horizon = target.lsn)?;
        self.sweep_moments()?;
        // The segment that holds the last byte stays where none comes behind it yet: the log begins
        // where its first segment does.
        let behind = target.lsn.segment_number(self.segment_bytes());
        let none_yet = u64::from(self.segments.get(behind).is_none());
        self.segments.retire_below(behind.saturating_sub(none_yet));
        self.segments.collect().map_err(|cause| self.io("recycle segments", &cause))?;
        self.space.notify_all();
        self.notify();
        Ok(target.lsn)
    }

    /// Whether a fold up to there may have written to the base.
    fn has_begun(&self, target: Lsn) -> bool {
        self.meta.lock().expect("no holder panics").meta.fold_target >= target
    }

    /// Makes the base the image at `target`, and moves the horizon there.
    fn write_base(&self, target: &Checkpoint, gives_up: bool) -> Result<(), GroupError> {
        self.lock().awaited.begin_attempt();
        let begun = self.has_begun(target.lsn);
        let moments = self.claim(target.lsn, begun)?;
        let old = self.lock().horizon.clone();
        let (content, mut outlasting) = if begun {
            // What was needed was kept before the base was touched.
            let rewinds = self.lock().content.rewinds.clone();
            let replayed = replay(&self.segments, &old, &rewinds, target.lsn);
            let damaged = |cause| self.damaged(format!("log up to {}: {cause}", target.lsn));
            (replayed.map_err(damaged)?.0, Outlasting::nothing(target.lsn))
        } else {
            self.keep_moments(&old, target.lsn, &moments)?
        };
        // All that cannot be read is waited for at the same time.
        let mut waits = Waits::default();
        for known in content.volumes.values() {
            waits.pass(self.check_base(known, begun, gives_up))?;
        }
        waits.end()?;
        // What is folded was durable: should the log end before it at the next start, it is damage.
        let noted = self.update_meta(|meta| {
            meta.fold_target = meta.fold_target.max(target.lsn);
            meta.durable = meta.durable.max(target.lsn);
        });
        // Where that failed it may be on the disk all the same.
        outlasting.take_effect();
        noted?;
        let mut rotted = Rotted::new(gives_up);
        let mut waits = Waits::default();
        for known in content.volumes.values() {
            waits.pass(self.fold_volume(known, &mut rotted))?;
        }
        waits.end()?;
        let disk = &self.context.env.disk;
        let base_dir = self.dir.join("base");
        let state = ControlState {
            position: target.position(),
            chain: target.chain,
            requests: target.requests,
            entries: content.table.folded(target.lsn),
            bases: sizes_of(&self.bases.read().expect("no holder panics"), &content, &old.bases),
        };
        state.store(&**disk, &base_dir).map_err(|cause| self.io("write control state", &cause))?;
        drop(content);
        self.move_horizon(state);
        self.tell_rotted(&rotted, "the log, or in the base below what the log had of them");
        Ok(())
    }

    /// Looks at the sums of all chunks that a fold will touch, and reads the blocks of the base of
    /// which it will keep a part. Those not where an earlier attempt may have left them torn: a
    /// wrong checksum may be its doing then, and is overwritten.
    fn check_base(
        &self,
        known: &VolumeContent,
        begun: bool,
        gives_up: bool,
    ) -> Result<(), GroupError> {
        let Some(base) = self.base_of(known.volume.number) else { return Ok(()) };
        let size_bytes = known.volume.size_bytes;
        let mut block = vec![0; BLOCK_BYTES as usize];
        let may_be_torn = self.lock().may_be_torn;
        let (mut waits, mut looked_at, mut has_sums) = (Waits::default(), None, true);
        let mut look = |chunk, waits: &mut Waits| {
            if looked_at.replace(chunk) != Some(chunk) {
                has_sums = waits.pass(self.check_sums(&base, chunk, gives_up))?.is_some();
            }
            Ok::<_, GroupError>(has_sums)
        };
        for step in fold_steps(known.map.pieces(), size_bytes) {
            match step {
                FoldStep::Copy { offset, .. } => {
                    look(offset / CHUNK_BYTES, &mut waits)?;
                }
                FoldStep::Zero { offset, length, .. } => {
                    for chunk in edge_chunks(offset, length) {
                        look(chunk, &mut waits)?;
                    }
                }
                FoldStep::Mend { offset, parts } => {
                    if look(offset / CHUNK_BYTES, &mut waits)?
                        && !may_be_torn
                        && parts.iter().map(|part| part.length).sum::<u64>() < BLOCK_BYTES
                        && let Err(cause) = base.read(offset, &mut block)
                    {
                        self.suspect_block(&cause);
                        let proved = self.is_proved(known, &base, offset, &parts, &cause, gives_up);
                        if waits.pass(proved)? == Some(false) {
                            waits.pass(self.leave_damaged(&base, offset, &cause, gives_up))?;
                        }
                    }
                }
            }
        }
        for piece in known.touched.pieces().take_while(|piece| piece.offset < size_bytes) {
            let end = (piece.offset + piece.length).min(size_bytes);
            for chunk in piece.offset / CHUNK_BYTES..end.div_ceil(CHUNK_BYTES) {
                look(chunk, &mut waits)?;
            }
        }
        if let Some(last) = edge_chunks(0, size_bytes).last()
            && (begun || base.size_bytes() != size_bytes)
        {
            look(last, &mut waits)?;
        }
        waits.end()
    }

    /// The base is complete up to here: maps forget what it has.
    fn move_horizon(&self, state: ControlState) {
        let target = state.position.lsn;
        let (numbers, images): (Vec<_>, Vec<_>) = {
            let mut core = self.lock();
            core.timeline.fold(checkpoint(&state));
            core.horizon = Arc::new(state);
            core.content.rewinds.forget_below(target);
            let numbers = core.content.volumes.keys().copied().collect();
            (numbers, core.images.values().cloned().collect())
        };
        // A part at a time, since writers wait meanwhile. Who opens an image in between forgets the
        // rest for itself.
        for number in numbers {
            let touched = {
                let mut core = self.lock();
                let known = core.content.volumes.get_mut(&number);
                known.map(|known| known.touched.forget_below(target))
            };
            drop(touched);
            let mut from = Some(0);
            while let Some(offset) = from {
                let mut core = self.lock();
                let Some(known) = core.content.volumes.get_mut(&number) else { break };
                let (freed, next) = known.map.forget_some(target, offset, FORGET_CHUNKS);
                from = next;
                drop(core);
                drop(freed);
            }
        }
        for image in images {
            image.forget_below(target);
        }
    }

    fn fold_volume(&self, known: &VolumeContent, rotted: &mut Rotted) -> Result<(), GroupError> {
        let volume = &known.volume;
        let steps = fold_steps(known.map.pieces(), volume.size_bytes);
        let beyond = |map: &ExtentMap| {
            map.pieces().last().is_some_and(|last| last.offset + last.length > volume.size_bytes)
        };
        // With what is cut off goes the memory of when it changed; and of a volume that was removed
        // and is back nothing says what is the same as before. Also where there is no base of it.
        let base = self.base_of(volume.number);
        if base.as_ref().is_some_and(|base| base.size_bytes() > volume.size_bytes)
            || beyond(&known.map)
            || beyond(&known.touched)
            || known.restored > Lsn::ZERO
        {
            self.update_meta(|meta| meta.births_from = meta.fold_target)?;
        }
        let base = match base {
            Some(base) => base,
            None if steps.is_empty() && known.touched.is_empty() => return Ok(()),
            None => {
                let base = BaseVolume::create(
                    self.context.env.disk.clone(),
                    &self.dir.join("base"),
                    volume.number,
                    volume.size_bytes,
                )
                .map_err(|cause| self.io(format!("create base of {}", volume.name), &cause))?;
                let base = Arc::new(base);
                self.bases.write().expect("no holder panics").insert(volume.number, base.clone());
                base
            }
        };
        let write = |cause| self.io(format!("write base of {}", volume.name), &cause);
        // An attempt that was interrupted may have changed the size, and not what goes with it.
        let resumed = self.lock().unfinished_fold.is_some();
        if resumed || base.size_bytes() != volume.size_bytes {
            let _gate = self.base_gate.write().expect("no holder panics");
            base.resize(volume.size_bytes).map_err(write)?;
        }
        let (mut batch, mut waits) = (Batch::default(), Waits::default());
        for step in steps {
            match step {
                FoldStep::Copy { offset, piece } => {
                    if batch.end() != Some(offset) || batch.bytes() >= BATCH_BYTES {
                        waits.pass(self.write_batch(known, &base, &mut batch, rotted))?;
                        batch.offset = offset;
                    }
                    batch.born = batch.born.max(written_at(&piece.source));
                    batch.pieces.push(piece);
                }
                FoldStep::Zero { offset, length, born } => {
                    waits.pass(self.write_batch(known, &base, &mut batch, rotted))?;
                    let _gate = self.base_gate.write().expect("no holder panics");
                    base.zero_blocks(offset, length, born).map_err(write)?;
                }
                FoldStep::Mend { offset, parts } => {
                    waits.pass(self.write_batch(known, &base, &mut batch, rotted))?;
                    waits.pass(self.mend(known, &base, offset, parts, rotted))?;
                }
            }
        }
        waits.pass(self.write_batch(known, &base, &mut batch, rotted))?;
        for piece in known.touched.pieces().take_while(|piece| piece.offset < volume.size_bytes) {
            let length = piece.length.min(volume.size_bytes - piece.offset);
            let _gate = self.base_gate.write().expect("no holder panics");
            base.raise_births(piece.offset, length, written_at(&piece.source)).map_err(write)?;
        }
        if waits.any() {
            // The next attempt is to find every block with its sum.
            base.settle().map_err(write)?;
            return waits.end();
        }
        base.sync().map_err(|cause| self.fail(&format!("sync of base of {}", volume.name), &cause))
    }

    /// Whole blocks from the log, one behind the other, with the checksums they came with: those of
    /// one that is damaged there do not hold, and prove it when a peer has it.
    fn write_batch(
        &self,
        known: &VolumeContent,
        base: &BaseVolume,
        batch: &mut Batch,
        rotted: &mut Rotted,
    ) -> Result<(), GroupError> {
        if batch.pieces.is_empty() {
            return Ok(());
        }
        let Batch { offset, pieces, born } = std::mem::take(batch);
        let mut data = vec![0; pieces.len() * BLOCK_BYTES as usize];
        let crcs: Vec<u32> = pieces.iter().filter_map(crc_of).collect();
        self.fetch_blocks(known, offset, pieces, &mut data, rotted)?;
        let _gate = self.base_gate.write().expect("no holder panics");
        base.write_blocks(offset, &data, &crcs, born)
            .map_err(|cause| self.io(format!("write base of {}", known.volume.name), &cause))
    }

    /// A block that the log has in parts.
    fn mend(
        &self,
        known: &VolumeContent,
        base: &Arc<BaseVolume>,
        offset: u64,
        parts: Vec<crate::extent_map::Piece>,
        rotted: &mut Rotted,
    ) -> Result<(), GroupError> {
        let mut block = vec![0; BLOCK_BYTES as usize];
        let covered: u64 = parts.iter().map(|part| part.length).sum();
        let born = parts.iter().map(|part| written_at(&part.source)).max().unwrap_or_default();
        if covered < BLOCK_BYTES
            && let Err(cause) = base.read(offset, &mut block)
        {
            let proved = self.is_proved(known, base, offset, &parts, &cause, rotted.gives_up)?;
            if !proved && self.stays_damaged(base, offset, &cause, born, rotted)? {
                rotted.push(known, offset);
                // It has changed all the same, for whoever asks what has.
                let _gate = self.base_gate.write().expect("no holder panics");
                return base.raise_births(offset, BLOCK_BYTES, born).map_err(|cause| {
                    self.io(format!("write base of {}", known.volume.name), &cause)
                });
            }
            base.read_unchecked(offset, &mut block)
                .map_err(|cause| self.io(format!("read base of {}", known.volume.name), &cause))?;
        }
        let crc = self.fetch_parts(known, offset, parts, &mut block, rotted)?;
        let _gate = self.base_gate.write().expect("no holder panics");
        // The map still says that a part of this block is in the base: whoever reads it there must
        // find block and sum together.
        base.write_blocks(offset, &block, &[crc], born)
            .and_then(|()| base.settle())
            .map_err(|cause| self.io(format!("write base of {}", known.volume.name), &cause))
    }
}

/// Blocks that follow each other and come from the log as they are.
#[derive(Default)]
struct Batch {
    offset: u64,
    pieces: Vec<crate::extent_map::Piece>,
    born: Lsn,
}

impl Batch {
    fn bytes(&self) -> usize {
        self.pieces.len() * BLOCK_BYTES as usize
    }

    fn end(&self) -> Option<u64> {
        (!self.pieces.is_empty()).then(|| self.offset + self.bytes() as u64)
    }
}

fn crc_of(piece: &crate::extent_map::Piece) -> Option<u32> {
    match piece.source {
        crate::extent_map::Source::Log { crc, .. } => Some(crc),
        _ => None,
    }
}
