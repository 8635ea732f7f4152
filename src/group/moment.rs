//! Moments: old positions that stay readable when the horizon has passed them.
//!
//! An open image, a pinned bookmark and a branch each need one position; those at the same position
//! share its moment. A fold that passes a moment first keeps what it is about to overwrite in the
//! base (`keep.rs`), in `moments/LSN/`: the control state there, and an [`Overlay`] of blocks. What
//! the overlay lacks is in the base as it was. A moment's contents never change, so that a crash
//! anywhere leaves it right; it goes when nobody needs it any more.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};

use crate::base::{ControlState, Kept, Overlay};
use crate::extent_map::{ExtentMap, Piece, Source};
use crate::io::{Disk, DiskFile};
use crate::units::{BLOCK_BYTES, CHUNK_BYTES, Lsn, SECTOR_BYTES, VolumeNumber};

/// Where the moments of a group are.
pub(super) const MOMENTS: &str = "moments";

/// Addresses from here on are those of slots in a moment's overlay: no log reaches that far.
pub(super) const KEPT: Lsn = Lsn(1 << 62);

/// One old position, with what is kept of it.
pub(super) struct Moment {
    lsn: Lsn,
    dir: PathBuf,
    parts: RwLock<Parts>,
    broken: Mutex<Option<String>>,
}

#[derive(Default)]
struct Parts {
    /// The control records at the position, once a fold has passed it.
    state: Option<Arc<ControlState>>,
    overlay: Option<Arc<Overlay>>,
    /// Nothing is missing as long as the base is no further than this.
    complete_to: Lsn,
    /// Where the blocks are that are kept.
    maps: BTreeMap<VolumeNumber, ExtentMap>,
    /// When chunks had changed last that have changed since.
    births: BTreeMap<VolumeNumber, BTreeMap<u64, Lsn>>,
}

/// What a moment takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of disk.
    pub disk_bytes: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
}

impl Moment {
    /// A moment that no fold has passed yet: nothing is kept of it, on disk neither.
    pub(super) fn new(group_dir: &Path, lsn: Lsn) -> Moment {
        let dir = group_dir.join(MOMENTS).join(lsn.to_string());
        Moment { lsn, dir, parts: RwLock::default(), broken: Mutex::default() }
    }

    /// Loads what is kept for a base that is at `base` at most.
    ///
    /// # Errors
    ///
    /// Why it cannot be relied on.
    pub(super) fn load(
        disk: &dyn Disk,
        group_dir: &Path,
        lsn: Lsn,
        base: Lsn,
    ) -> Result<Moment, String> {
        let moment = Moment::new(group_dir, lsn);
        let state = ControlState::load(disk, &moment.dir).map_err(|error| error.to_string())?;
        if state.position.lsn != lsn {
            let at = state.position.lsn;
            return Err(format!("no request ended there in the log that was folded, but at {at}"));
        }
        let (overlay, index) = Overlay::open(disk, &moment.dir, lsn, base)
            .map_err(|cause| format!("kept blocks: {cause}"))?;
        if index.complete_to < base {
            return Err(format!(
                "kept blocks: the index is damaged behind lsn:{}, and the base is at lsn:{base}",
                index.complete_to
            ));
        }
        moment.begin(state, overlay);
        moment.add(base, &index.kept);
        Ok(moment)
    }

    /// A moment that cannot be read here, and why.
    pub(super) fn lost(group_dir: &Path, lsn: Lsn, reason: String) -> Moment {
        let moment = Moment::new(group_dir, lsn);
        moment.give_up(reason);
        moment
    }

    /// The position.
    pub(super) fn lsn(&self) -> Lsn {
        self.lsn
    }

    /// Where it is kept.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Why it can no longer be read, if so.
    pub(super) fn broken(&self) -> Option<String> {
        self.broken.lock().expect("no holder panics").clone()
    }

    /// From now on it cannot be read.
    pub(super) fn close(&self, reason: String) {
        self.broken.lock().expect("no holder panics").get_or_insert(reason);
    }

    /// From now on it cannot be read; what it had is let go.
    pub(super) fn give_up(&self, reason: String) {
        self.close(reason);
        let parts = std::mem::take(&mut *self.parts.write().expect("no holder panics"));
        if let Some(overlay) = parts.overlay
            && let Err(cause) = overlay.give_back()
        {
            tracing::warn!("{}: {cause}", self.dir.display());
        }
    }

    /// Takes the files that a fold has made for it.
    pub(super) fn begin(&self, state: ControlState, overlay: Overlay) {
        let mut parts = self.parts.write().expect("no holder panics");
        parts.state = Some(Arc::new(state));
        parts.overlay = Some(Arc::new(overlay));
    }

    /// What is kept of it is durable for folds to `complete_to`, and is shown from now on.
    pub(super) fn add(&self, complete_to: Lsn, kept: &[Kept]) {
        let mut parts = self.parts.write().expect("no holder panics");
        parts.complete_to = complete_to;
        let mut kept = kept.iter().peekable();
        while let Some(entry) = kept.next() {
            match *entry {
                Kept::Block { volume, block, slot, crc } => {
                    let mut crcs = vec![crc];
                    while let Some(Kept::Block { volume: v, block: b, slot: s, crc }) = kept.peek()
                        && (*v, *b, *s)
                            == (volume, block + crcs.len() as u64, slot + crcs.len() as u64)
                    {
                        crcs.push(*crc);
                        kept.next();
                    }
                    let bytes = crcs.len() as u64 * BLOCK_BYTES;
                    let address = KEPT.advance(slot * BLOCK_BYTES);
                    let map = parts.maps.entry(volume).or_default();
                    map.write(block * BLOCK_BYTES, address, bytes, &crcs);
                }
                Kept::Zeros { volume, block, blocks } => {
                    let map = parts.maps.entry(volume).or_default();
                    let (offset, bytes) = (block * BLOCK_BYTES, blocks * BLOCK_BYTES);
                    drop(map.zero(offset, bytes, KEPT, true));
                }
                Kept::Birth { volume, chunk, birth } => {
                    parts.births.entry(volume).or_default().insert(chunk, birth);
                }
            }
        }
    }

    /// The control records at the position, once a fold has passed it.
    pub(super) fn state(&self) -> Option<Arc<ControlState>> {
        self.parts.read().expect("no holder panics").state.clone()
    }

    /// Its files, once a fold has passed it.
    pub(super) fn overlay(&self) -> Option<Arc<Overlay>> {
        self.parts.read().expect("no holder panics").overlay.clone()
    }

    /// The file that addresses from [`KEPT`] on are in.
    pub(super) fn blocks(&self) -> Option<Arc<dyn DiskFile>> {
        self.overlay().map(|overlay| overlay.blocks().clone())
    }

    /// Where the blocks are that are kept, by volume.
    pub(super) fn maps(&self) -> BTreeMap<VolumeNumber, ExtentMap> {
        self.parts.read().expect("no holder panics").maps.clone()
    }

    /// Nothing is missing as long as the base is no further than this.
    pub(super) fn complete_to(&self) -> Lsn {
        self.parts.read().expect("no holder panics").complete_to
    }

    /// When chunks of a volume had changed last that have changed since.
    pub(super) fn births(&self, volume: VolumeNumber) -> BTreeMap<u64, Lsn> {
        let parts = self.parts.read().expect("no holder panics");
        parts.births.get(&volume).cloned().unwrap_or_default()
    }

    /// What it takes. The disk's part counts what a fold is writing, too.
    pub(super) fn cost(&self) -> Cost {
        let (overlay, maps, births) = {
            let parts = self.parts.read().expect("no holder panics");
            let births: usize = parts.births.values().map(BTreeMap::len).sum();
            (parts.overlay.clone(), parts.maps.clone(), births)
        };
        let maps: u64 = maps.values().map(ExtentMap::memory_bytes).sum();
        Cost {
            disk_bytes: overlay.map_or(0, |overlay| overlay.bytes()),
            memory_bytes: maps + births as u64 * 24,
        }
    }

    /// Whether anything of a range, of any alignment, is kept.
    pub(super) fn has_any(&self, volume: VolumeNumber, offset: u64, length: u64) -> bool {
        let mut pieces = Vec::new();
        self.look_up(volume, offset, length, 2, &mut pieces);
        pieces.iter().any(|piece| piece.source != Source::Base)
    }

    /// Appends what is kept of a range, rounded to sectors, to `out`: at most `limit` pieces, in
    /// order, without gaps; what is not kept is in the base.
    pub(super) fn look_up(
        &self,
        volume: VolumeNumber,
        offset: u64,
        length: u64,
        limit: usize,
        out: &mut Vec<Piece>,
    ) {
        let begin = offset / SECTOR_BYTES * SECTOR_BYTES;
        let end = (offset + length).next_multiple_of(SECTOR_BYTES);
        let parts = self.parts.read().expect("no holder panics");
        match parts.maps.get(&volume) {
            Some(map) => {
                map.lookup_some(begin, end - begin, limit, out);
            }
            None => {
                out.push(Piece { offset: begin, length: end - begin, source: Source::Base });
            }
        }
    }
}

/// The chunks that a range touches.
pub(super) fn chunks_of(offset: u64, length: u64) -> std::ops::Range<u64> {
    offset / CHUNK_BYTES..(offset + length).div_ceil(CHUNK_BYTES)
}
