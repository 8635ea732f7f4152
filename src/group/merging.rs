//! What was staged becomes part of the base, once an image was switched to: in the background, and
//! again from the beginning after a crash or an error, since doing it twice is doing it once.
//!
//! Until it is done, reads look at what is staged before they look at the base.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, RwLock};

use super::GroupError;
use super::content::{Content, VolumeContent};
use super::engine::{Group, placed};
use super::files;
use super::fold_damage::Rotted;
use super::lost::{LostBase, bring_back_bases, sizes_of};
use super::meta::Meta;
use super::moment::MOMENTS;
use super::ranges::{Cover, Place, Ranges};
use super::staging::{STAGING, Staging, born_in};
use crate::base::{BaseVolume, ControlState, ControlStateError, edge_chunks};
use crate::io::Disk;
use crate::log::record::crc32;
use crate::units::{BLOCK_BYTES, CHUNK_BYTES, Lsn, VolumeNumber};

/// Where blocks had rotted that a merge found damaged.
pub(super) const RECEIVED: &str = "the image that was received, before they came into the base";
/// Bytes that are copied at a time.
const COPY_BYTES: u64 = 1 << 20;

/// What is staged of the image that the group shows.
pub(super) struct Merging {
    /// The control state at the image.
    pub control: ControlState,
    /// What is not staged is in the base; else all of it is staged.
    partial: bool,
    ranges: Ranges,
    /// Bytes of each volume at the image: what the base has behind that is cut off by the merge.
    sizes: BTreeMap<VolumeNumber, u64>,
    /// Whether a rewind, or a record of a volume that the image has, is behind what was here.
    reshaped: bool,
    /// The files of what is staged.
    pub volumes: BTreeMap<VolumeNumber, Arc<BaseVolume>>,
}

impl Merging {
    /// `None` where not all of an image is staged.
    pub(super) fn of(staging: Staging) -> Option<Merging> {
        let Staging { state, control, mut ranges, volumes, .. } = staging;
        if !state.complete {
            return None;
        }
        let control = control?;
        // An image before it may have had volumes that are gone: what older moments need of them
        // is in the base.
        let content = Content::at_horizon(&control);
        ranges.retain(|number| content.volumes.contains_key(&number));
        let known = content.volumes.iter();
        let sizes = known.map(|(number, known)| (*number, known.volume.size_bytes)).collect();
        let volumes_since = content.volumes.keys().map(|one| content.table.volume_is_since(*one));
        let last = volumes_since.chain(content.table.last_rewind()).max();
        let reshaped = last >= Some(state.common.min(state.old_head));
        Some(Merging { control, partial: state.partial, ranges, sizes, reshaped, volumes })
    }

    /// Whether what is not staged is in the base.
    pub(super) fn is_partial(&self) -> bool {
        self.partial
    }

    /// Where the bytes of a range of a volume are: runs of (offset, length, cover), without gaps.
    /// Behind the volume's end at the image they are zeros, also where the base still has bytes.
    pub(super) fn parts(
        &self,
        volume: VolumeNumber,
        offset: u64,
        length: u64,
    ) -> Vec<(u64, u64, Cover)> {
        let end = offset + length;
        let inside = self.sizes.get(&volume).map_or(end, |size| (*size).clamp(offset, end));
        let mut parts = Vec::new();
        if inside > offset {
            parts = self.ranges.parts(Place { volume, offset }, inside - offset);
        }
        if end > inside {
            parts.push((inside, end - inside, Cover::Zeros));
        }
        parts
    }

    /// Whether with the image goes the memory of when what it does not send has changed: it takes
    /// the place of everything; or a rewind since then took back what was written behind what is
    /// here, so that it is not sent, and is not what it was in between; or a volume had another
    /// size here or in between, and nothing tells of what was cut off.
    pub(super) fn forgets_births(&self, here: &Content) -> bool {
        !self.partial || self.reshaped || self.cuts_off(here)
    }

    /// Whether the image has a volume smaller than it is here.
    fn cuts_off(&self, here: &Content) -> bool {
        let larger = |known: &VolumeContent, size: &u64| known.volume.size_bytes > *size;
        here.volumes
            .iter()
            .any(|(number, known)| self.sizes.get(number).is_some_and(|size| larger(known, size)))
    }

    /// Ranges of a volume that are staged, as (offset, length).
    pub(super) fn staged(&self, volume: VolumeNumber) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.ranges.of(volume).map(|range| (range.at.offset, range.length))
    }

    /// Brings the base to the image; durable on return, with its control state, which lists what
    /// the one `below` it lists too. Blocks that have rotted are damage there.
    fn merge(
        &self,
        disk: &Arc<dyn Disk>,
        group_dir: &Path,
        bases: &RwLock<BTreeMap<VolumeNumber, Arc<BaseVolume>>>,
        gate: &RwLock<()>,
        below: &BTreeMap<VolumeNumber, u64>,
        rotted: &mut Rotted,
    ) -> io::Result<ControlState> {
        let base_dir = group_dir.join("base");
        let content = Content::at_horizon(&self.control);
        for (number, known) in &content.volumes {
            if self.partial {
                self.copy(disk, &base_dir, known, bases, gate, rotted)?;
            } else {
                let staging_dir = group_dir.join(STAGING);
                let moved = BaseVolume::take_over(disk, &staging_dir, &base_dir, *number)?;
                bases.write().expect("no holder panics").insert(*number, Arc::new(moved));
            }
        }
        let sizes = sizes_of(&bases.read().expect("no holder panics"), &content, below);
        let state = ControlState { bases: sizes, ..self.control.clone() };
        state.store(&**disk, &base_dir)?;
        let moments = group_dir.join(MOMENTS);
        if disk.exists(&moments)? {
            if self.partial {
                // They may need the bases of volumes that are gone: those go when nobody does.
                return Ok(state);
            }
            // What was kept for older moments has lost what it lay above.
            files::discard(&**disk, &moments)?;
        }
        // All that is there, since the other history may have had volumes of which nothing tells.
        let gone = BaseVolume::numbers(&**disk, &base_dir)?.into_iter();
        for number in gone.filter(|number| !content.volumes.contains_key(number)) {
            bases.write().expect("no holder panics").remove(&number);
            BaseVolume::remove_files(&**disk, &base_dir, number)?;
        }
        Ok(state)
    }

    /// Writes what is staged of a volume to its base.
    fn copy(
        &self,
        disk: &Arc<dyn Disk>,
        base_dir: &Path,
        volume: &VolumeContent,
        bases: &RwLock<BTreeMap<VolumeNumber, Arc<BaseVolume>>>,
        gate: &RwLock<()>,
        rotted: &mut Rotted,
    ) -> io::Result<()> {
        let (number, size_bytes) = (volume.volume.number, volume.volume.size_bytes);
        let known = bases.read().expect("no holder panics").get(&number).cloned();
        let opened = known
            .map_or_else(|| BaseVolume::open(disk.clone(), base_dir, number).map(Arc::new), Ok);
        let base = match opened {
            Ok(base) => base,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                Arc::new(BaseVolume::create(disk.clone(), base_dir, number, size_bytes)?)
            }
            Err(cause) => return Err(cause),
        };
        bases.write().expect("no holder panics").insert(number, base.clone());
        let born = born_in(self.control.position.lsn);
        give_up_unread_sums(&base, edge_chunks(0, size_bytes).last(), born)?;
        {
            let _gate = gate.write().expect("no holder panics");
            base.resize(size_bytes)?;
        }
        for range in self.ranges.of(number) {
            let end = (range.at.offset + range.length).min(size_bytes);
            let mut at = range.at.offset;
            if range.zeros && at < end {
                give_up_unread_sums(&base, edge_chunks(at, end - at), born)?;
                let _gate = gate.write().expect("no holder panics");
                base.zero_blocks(at, end - at, born)?;
                continue;
            }
            while at < end {
                let mut data = vec![0; (end - at).min(COPY_BYTES) as usize];
                let staged = self.volumes.get(&number).ok_or(io::ErrorKind::NotFound)?;
                let damaged = staged.salvage(at, &mut data);
                let mut crcs: Vec<u32> = data.chunks(BLOCK_BYTES as usize).map(crc32).collect();
                for block in &damaged {
                    rotted.push(volume, block.offset);
                    let crc = &mut crcs[((block.offset - at) / BLOCK_BYTES) as usize];
                    *crc = block.crc.unwrap_or(!*crc);
                }
                let chunks = at / CHUNK_BYTES..(at + data.len() as u64).div_ceil(CHUNK_BYTES);
                give_up_unread_sums(&base, chunks, born)?;
                let _gate = gate.write().expect("no holder panics");
                base.write_blocks(at, &data, &crcs, born)?;
                for block in damaged.iter().filter(|block| block.crc.is_none()) {
                    base.lose_sum(block.offset, born)?;
                }
                at += data.len() as u64;
            }
        }
        base.sync()
    }
}

/// Writes anew what cannot be read of the sums of chunks that are about to change, and has their
/// slots prove them again: no start may depend on them.
fn give_up_unread_sums(
    base: &BaseVolume,
    chunks: impl IntoIterator<Item = u64>,
    born: Lsn,
) -> io::Result<()> {
    for chunk in chunks {
        for lost in base.give_up_unread_sums(chunk)? {
            base.mend_alone(lost, born);
        }
    }
    Ok(())
}

/// At the start, before anything else is looked at: goes on from a switch that was written down.
/// What was lost of the base that the image lies above, and what of the image had rotted.
pub(super) fn finish_at_start(
    disk: &Arc<dyn Disk>,
    group_dir: &Path,
    meta: &Meta,
    tell: &dyn Fn(&LostBase),
) -> Result<(Vec<LostBase>, Rotted), GroupError> {
    let io = |cause: io::Error| {
        let what = placed("go on from the image that was received", group_dir, &cause);
        GroupError::io(&meta.name, what, &cause)
    };
    let mut lost = Vec::new();
    let mut rotted = Rotted::new(true);
    if meta.old_log {
        drop_old_log(&**disk, &group_dir.join("log")).map_err(io)?;
    }
    if meta.merging {
        let staging = Staging::open(disk.clone(), group_dir);
        let merging = match staging.map(Merging::of) {
            Ok(Some(merging)) => merging,
            Ok(None) => return Err(not_whole(meta, group_dir, "it is not complete")),
            Err(cause) if is_damage(&cause) => return Err(not_whole(meta, group_dir, cause)),
            Err(cause) => return Err(io(cause)),
        };
        let base_dir = group_dir.join("base");
        let mut listed = BTreeMap::new();
        if merging.partial {
            match ControlState::load(&**disk, &base_dir) {
                Ok(below) => {
                    let found = bring_back_bases(&**disk, &base_dir, &below, &[], false, tell);
                    lost = found.map_err(io)?;
                    listed = below.bases;
                }
                Err(ControlStateError::Io(cause)) if cause.kind() == io::ErrorKind::NotFound => {}
                Err(cause) => return Err(io(io::Error::other(cause))),
            }
        }
        let (bases, gate) = (RwLock::default(), RwLock::default());
        merging.merge(disk, group_dir, &bases, &gate, &listed, &mut rotted).map_err(io)?;
    }
    Ok((lost, rotted))
}

/// Whether a file is there, and not as it was written; or it is gone.
fn is_damage(cause: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, NotFound, UnexpectedEof};
    matches!(cause.kind(), InvalidData | NotFound | UnexpectedEof)
}

/// What is staged is not what was switched to, and the base may be half of it already.
fn not_whole(meta: &Meta, group_dir: &Path, cause: impl fmt::Display) -> GroupError {
    let (name, dir) = (&meta.name, group_dir.display());
    let what = format!(
        "the image that this copy was switched to cannot be brought into its base: {cause}; nothing \
         here is a moment of the group: stop this node, remove {dir}, start it, and on the primary \
         `tidelog replicate {name} --to NODE`"
    );
    GroupError::Damaged { group: name.clone(), what }
}

/// Removes every segment and what belongs to one, spares too: the image may lie before what they
/// hold.
fn drop_old_log(disk: &dyn Disk, log_dir: &Path) -> io::Result<()> {
    if !disk.exists(log_dir)? {
        return Ok(());
    }
    for name in disk.list(log_dir)? {
        disk.remove(&log_dir.join(name))?;
    }
    disk.sync_dir(log_dir)
}

impl Group {
    /// What is staged of the image that is shown, until it is in the base.
    pub(super) fn merging(&self) -> Option<Arc<Merging>> {
        self.merging.read().expect("no holder panics").clone()
    }

    /// Brings what is staged into the base, where an image was switched to; for who holds the lock
    /// of the folder.
    pub(super) fn finish_merge(&self) -> Result<(), GroupError> {
        let Some(merging) = self.merging() else { return Ok(()) };
        let disk = &self.context.env.disk;
        let mut rotted = Rotted::new(true);
        let below = self.lock().horizon.clone();
        let state = merging
            .merge(disk, &self.dir, &self.bases, &self.base_gate, &below.bases, &mut rotted)
            .map_err(|cause| self.io("bring the received image into the base", &cause))?;
        self.lock().horizon = Arc::new(state);
        self.update_meta(|meta| meta.merging = false)?;
        *self.merging.write().expect("no holder panics") = None;
        self.tell_rotted(&rotted, RECEIVED);
        Staging::remove(&**disk, &self.dir).map_err(|cause| self.io("remove staging", &cause))
    }
}
