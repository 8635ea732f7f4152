//! Copy on fold: what a fold is about to change for older moments that somebody needs is kept, and
//! durable, before its target is.

use std::io;
use std::sync::Arc;

use serde_json::json;

use super::content::{Content, VolumeContent};
use super::engine::{Group, checkpoint};
use super::fold_plan::{Change, changes, either, written_at};
use super::moment::{MOMENTS, Moment, chunks_of};
use super::outlast::Outlasting;
use super::read::Lookup;
use super::replay::replay_through;
use super::timeline::Checkpoint;
use super::{Allocation, GroupError, Read};
use crate::base::{ControlState, Kept, Mark, Overlay};
use crate::events::Severity;
use crate::extent_map::Source;
use crate::io::is_full;
use crate::log::record::crc32;
use crate::units::{BLOCK_BYTES, CHUNK_BYTES, Lsn, VolumeNumber};

/// Blocks that are read and kept at a time.
const BATCH_BLOCKS: u64 = 256;
/// Blocks of which it is asked at a time whether they are zeros.
const LOOK_BLOCKS: u64 = 16 << 10;

/// A content that a fold reads: nothing is kept of it but what is left out.
struct Past<'a>(&'a Content);

impl Lookup for Past<'_> {
    fn with_content(&self, look: &mut dyn FnMut(&Content)) {
        look(self.0);
    }
}

/// Why something could not be kept.
pub(super) enum KeepError {
    /// The overlay's disk says so.
    Overlay(io::Error),
    /// The moment's own contents cannot be told.
    Group(GroupError),
}

impl From<io::Error> for KeepError {
    fn from(cause: io::Error) -> KeepError {
        KeepError::Overlay(cause)
    }
}

impl Group {
    /// Keeps, for each of the moments, what a fold from the horizon to `target` changes; the
    /// content at the target. Where a moment's overlay cannot be written, the moment is given up;
    /// where space is short, that of the image that costs most.
    ///
    /// # Errors
    ///
    /// Where the log cannot be followed; where there is no space, and nothing may be given up.
    pub(super) fn keep_moments(
        &self,
        horizon: &ControlState,
        target: Lsn,
        moments: &[Arc<Moment>],
    ) -> Result<(Content, Outlasting), GroupError> {
        // An attempt that failed may have begun the files of one that no fold has passed: what it
        // was is in the log all the same.
        let passed = |moment: &Moment| moment.lsn() <= horizon.position.lsn;
        let states: Vec<_> =
            moments.iter().map(|moment| moment.state().filter(|_| passed(moment))).collect();
        let ahead = moments.iter().zip(&states).filter(|(_, state)| state.is_none());
        let stops: Vec<Lsn> = ahead.map(|(moment, _)| moment.lsn()).collect();
        let rewinds = self.lock().content.rewinds.clone();
        let replayed = replay_through(&self.segments, horizon, &rewinds, &stops, target);
        let (stopped, now, _) = replayed.map_err(|cause| {
            let what = format!("log up to {target}: {cause}");
            GroupError::Damaged { group: self.name().clone(), what }
        })?;
        let mut stopped = stopped.into_iter();
        let mut outlasting = Outlasting::nothing(target);
        for (moment, state) in moments.iter().zip(states) {
            let (at, past) = match state {
                Some(state) => (checkpoint(&state), Content::at_horizon(&state)),
                None => stopped.next().expect("one per stop"),
            };
            // Where the two part; all that is behind the horizon is common to both.
            let fork = rewinds.fork(moment.lsn(), target);
            loop {
                match self.keep_moment(moment, at, &past, (fork, target), &now) {
                    Ok(None) => break,
                    Ok(Some((kept, before))) => break outlasting.add(moment, kept, before),
                    Err(KeepError::Group(error)) => return Err(error),
                    Err(KeepError::Overlay(cause)) => {
                        self.could_not_keep(moment, &cause)?;
                        if moment.broken().is_some() {
                            break;
                        }
                    }
                }
            }
        }
        Ok((now, outlasting))
    }

    /// Makes room for another try, or gives the moment up.
    ///
    /// # Errors
    ///
    /// Where that is not for it to decide.
    pub(super) fn could_not_keep(
        &self,
        moment: &Moment,
        cause: &io::Error,
    ) -> Result<(), GroupError> {
        if !is_full(cause) {
            if self.only_a_command_ends(moment)? {
                if let Some(overlay) = moment.overlay()
                    && let Err(cause) = overlay.roll_back()
                {
                    tracing::warn!("group {}: kept blocks: {cause}", self.name());
                }
                let name = self.name();
                let what = format!(
                    "keep what a branch needs of older blocks (`tidelog timeline {name}` shows \
                     each, `tidelog branch remove` gives one up)"
                );
                return Err(self.io(&what, cause));
            }
            self.let_go(moment, &format!("what a fold changes could not be kept: {cause}"));
            return Ok(());
        }
        // What was written for it so far is written again.
        if let Some(overlay) = moment.overlay() {
            overlay.roll_back().map_err(|cause| self.io("kept blocks", &cause))?;
        }
        if self.segments.drop_spares().unwrap_or(false) || self.make_room() {
            return Ok(());
        }
        let name = self.name();
        Err(GroupError::NoSpace {
            group: name.clone(),
            reason: format!(
                "what branches need of older blocks cannot be kept: {cause}; `tidelog timeline \
                 {name}` shows what each costs, `tidelog branch remove` gives one up"
            ),
        })
    }

    fn keep_moment(
        &self,
        moment: &Moment,
        at: Checkpoint,
        past: &Content,
        (fork, target): (Lsn, Lsn),
        now: &Content,
    ) -> Result<Option<(Vec<Kept>, Mark)>, KeepError> {
        if moment.broken().is_some() || moment.complete_to() >= target {
            return Ok(None);
        }
        let overlay = self.overlay_of(moment, at, past)?;
        let before = overlay.mark();
        let mut kept = Vec::new();
        let mut damaged = 0;
        for (number, known) in &past.volumes {
            let size_bytes = known.volume.size_bytes;
            let (changes, log) = match now.volumes.get(number) {
                // What the fold brings, and what the moment has that the target lacks.
                Some(now) => {
                    let brings = changes(now.map.pieces(), fork, size_bytes);
                    (either(brings, changes(known.map.pieces(), fork, size_bytes)), now)
                }
                // The volume is gone, and its base stays as it is: what is still in the log goes,
                // and what only that knows.
                None => {
                    if known.restored > Lsn::ZERO {
                        // Of all of it, that it was away; the state at the moment does not say so.
                        let from = moment.lsn();
                        self.update_meta(|meta| meta.births_from = meta.births_from.max(from))
                            .map_err(KeepError::Group)?;
                    }
                    let touched = changes(known.touched.pieces(), Lsn::ZERO, size_bytes);
                    self.keep_births(moment, known, &touched, |_| false, &mut kept);
                    (changes(known.map.pieces(), Lsn::ZERO, size_bytes), known)
                }
            };
            self.keep_births(moment, known, &changes, |chunk| only_zeros(log, chunk), &mut kept);
            for change in changes {
                damaged += self.keep_blocks(moment, &overlay, past, *number, change, &mut kept)?;
            }
        }
        overlay.commit(target, &kept)?;
        if damaged > 0 {
            let lsn = moment.lsn();
            let text = format!("{damaged} blocks of lsn:{lsn} are damaged, and so kept as damaged");
            self.emit(Severity::Error, "moment-damaged", text, json!({ "lsn": lsn }));
        }
        Ok(Some((kept, before)))
    }

    /// The moment's files, made where this is the first fold that passes it.
    pub(super) fn overlay_of(
        &self,
        moment: &Moment,
        at: Checkpoint,
        past: &Content,
    ) -> io::Result<Arc<Overlay>> {
        if let Some(overlay) = moment.overlay() {
            return Ok(overlay);
        }
        let (disk, dir) = (&*self.context.env.disk, moment.dir());
        disk.create_dir(dir)?;
        let overlay = Overlay::create(disk, dir, moment.lsn())?;
        let state = ControlState {
            position: at.position(),
            chain: at.chain,
            requests: at.requests,
            entries: past.table.folded(moment.lsn()),
            bases: Default::default(),
        };
        // This syncs the directory too.
        state.store(disk, dir)?;
        disk.sync_dir(&self.dir.join(MOMENTS))?;
        disk.sync_dir(&self.dir)?;
        moment.begin(state, overlay);
        Ok(moment.overlay().expect("it has begun"))
    }

    /// Keeps when the chunks of these changes had changed last before the moment: their base will
    /// only know of the fold. Of what is zeros before and after there is nothing to know.
    pub(super) fn keep_births(
        &self,
        moment: &Moment,
        known: &VolumeContent,
        changes: &[Change],
        zeros_now: impl Fn(u64) -> bool,
        kept: &mut Vec<Kept>,
    ) {
        let volume = known.volume.number;
        let already = moment.births(volume);
        let base = self.base_of(volume);
        let mut seen = 0;
        for change in changes {
            let blocks = change.to - change.from;
            let chunks = chunks_of(change.from * BLOCK_BYTES, blocks * BLOCK_BYTES);
            let (from, to) = (chunks.start.max(seen), chunks.end.max(seen));
            seen = to;
            let births = match &base {
                Some(base) => base.births(from, to),
                None => vec![Some(Lsn::ZERO); (to - from) as usize],
            };
            for (chunk, birth) in (from..to).zip(births) {
                let birth = birth.unwrap_or(Lsn(Lsn::MAX.0 - 1)).max(newest(known, chunk));
                let unborn = birth == Lsn::ZERO && zeros_now(chunk);
                if !unborn && !already.contains_key(&chunk) {
                    kept.push(Kept::Birth { volume, chunk, birth });
                }
            }
        }
    }

    /// Keeps the blocks of a change that are not kept yet, as they are in `past`; how many of them
    /// are damaged. Such a one gets a checksum that never holds, so that who reads it is told.
    pub(super) fn keep_blocks(
        &self,
        moment: &Moment,
        overlay: &Overlay,
        past: &Content,
        volume: VolumeNumber,
        change: Change,
        kept: &mut Vec<Kept>,
    ) -> Result<u64, KeepError> {
        let mut damaged = 0;
        let mut from = change.from;
        while from < change.to {
            let to = change.to.min(from + LOOK_BLOCKS);
            let mut pieces = Vec::new();
            let (offset, bytes) = (from * BLOCK_BYTES, (to - from) * BLOCK_BYTES);
            moment.look_up(volume, offset, bytes, usize::MAX, &mut pieces);
            for piece in pieces.iter().filter(|piece| piece.source == Source::Base) {
                let (first, count) = (piece.offset / BLOCK_BYTES, piece.length / BLOCK_BYTES);
                let runs = self.data_runs(past, volume, first, first + count);
                let mut at = first;
                for (begin, end) in runs.map_err(KeepError::Group)? {
                    push_zeros(kept, volume, at, begin);
                    let mut block = begin;
                    while block < end {
                        let behind = end.min(block + BATCH_BLOCKS);
                        damaged += self.keep_run(overlay, past, volume, block, behind, kept)?;
                        block = behind;
                    }
                    at = end;
                }
                push_zeros(kept, volume, at, first + count);
            }
            from = to;
        }
        Ok(damaged)
    }

    /// The runs of blocks in `[from, to)` that are not zeros throughout.
    fn data_runs(
        &self,
        past: &Content,
        volume: VolumeNumber,
        from: u64,
        to: u64,
    ) -> Result<Vec<(u64, u64)>, GroupError> {
        let (offset, bytes) = (from * BLOCK_BYTES, (to - from) * BLOCK_BYTES);
        let extents = self.extents_through(&Past(past), volume, offset, bytes, usize::MAX)?;
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for extent in extents.iter().filter(|extent| extent.allocation == Allocation::Data) {
            let begin = extent.offset / BLOCK_BYTES;
            let end = (extent.offset + extent.length).div_ceil(BLOCK_BYTES);
            match runs.last_mut() {
                Some(last) if begin <= last.1 => last.1 = end,
                _ => runs.push((begin, end)),
            }
        }
        Ok(runs)
    }

    fn keep_run(
        &self,
        overlay: &Overlay,
        past: &Content,
        volume: VolumeNumber,
        from: u64,
        to: u64,
        kept: &mut Vec<Kept>,
    ) -> io::Result<u64> {
        let mut data = vec![0; ((to - from) * BLOCK_BYTES) as usize];
        let read = |from: u64, buffer: &mut [u8]| {
            let offset = from * BLOCK_BYTES;
            let mut reads = [Read { volume, offset, buffer, result: Ok(()) }];
            self.read_through(&Past(past), &mut reads);
            reads[0].result.is_ok()
        };
        let whole = read(from, &mut data);
        let mut good = vec![whole; (to - from) as usize];
        if !whole {
            let blocks = data.chunks_exact_mut(BLOCK_BYTES as usize);
            for ((block, buffer), good) in (from..to).zip(blocks).zip(&mut good) {
                *good = read(block, buffer);
                if !*good {
                    buffer.fill(0);
                }
            }
        }
        let first = overlay.write(&data)?;
        let blocks = data.chunks_exact(BLOCK_BYTES as usize);
        for (index, (bytes, good)) in blocks.zip(&good).enumerate() {
            let (block, slot) = (from + index as u64, first + index as u64);
            let crc = if *good { crc32(bytes) } else { !crc32(bytes) };
            kept.push(Kept::Block { volume, block, slot, crc });
        }
        Ok(good.iter().filter(|good| !**good).count() as u64)
    }
}

fn push_zeros(kept: &mut Vec<Kept>, volume: VolumeNumber, from: u64, to: u64) {
    if from < to {
        kept.push(Kept::Zeros { volume, block: from, blocks: to - from });
    }
}

/// The position of the newest record that has changed a chunk, as far as maps know.
fn newest(known: &VolumeContent, chunk: u64) -> Lsn {
    let mut pieces = Vec::new();
    for map in [&known.map, &known.touched] {
        map.lookup(chunk * CHUNK_BYTES, CHUNK_BYTES, &mut pieces);
    }
    let newest = pieces.iter().map(|piece| written_at(&piece.source)).max().unwrap_or_default();
    newest.max(known.restored)
}

/// Whether a map has nothing in a chunk but zeros.
fn only_zeros(known: &VolumeContent, chunk: u64) -> bool {
    let mut pieces = Vec::new();
    known.map.lookup(chunk * CHUNK_BYTES, CHUNK_BYTES, &mut pieces);
    pieces.iter().all(|piece| !matches!(piece.source, Source::Log { .. }))
}
