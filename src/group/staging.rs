//! An image that a peer sends, beside the state that is there: its control state, its blocks with
//! their checksums, and how far it has come. Nothing of it is shown before the switch.
//!
//! Blocks go to files like those of a base, in `staging/`; `ranges` says which of them came, and
//! `state` how much of both is durable. What came behind the last checkpoint is asked for again
//! after a restart.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::content::{Content, check_state};
use super::files;
use super::ranges::{Place, RANGE_BYTES, Range, Ranges};
use crate::base::{BaseVolume, ControlState, ControlStateError};
use crate::io::{Disk, OpenMode};
use crate::log::record::crc32;
use crate::units::{BLOCK_BYTES, Chain, EpochId, Lsn, Position, VolumeNumber};

/// The directory, in the group's.
pub(super) const STAGING: &str = "staging";
const STATE: &str = "state";
const RANGES: &str = "ranges";
/// Staged bytes after which what came is made durable.
const CHECKPOINT_BYTES: u64 = 64 << 20;
/// Bytes of control state at most.
const CONTROL_BYTES_MAX: u64 = 256 << 20;
/// Places that are remembered at most: more are joined, at the older of two positions.
const REACHED_MAX: usize = 16;

/// A part of an image, as it comes from a peer.
#[derive(Clone, Debug, PartialEq)]
pub enum ImagePart {
    /// Bytes of the control state, which comes first.
    Control {
        /// Where they belong.
        offset: u64,
        /// Bytes of all of it.
        total: u64,
        /// The bytes.
        bytes: Bytes,
    },
    /// Whole blocks.
    Data {
        /// The first byte.
        at: Place,
        /// CRC-32 of each block.
        crcs: Vec<u32>,
        /// The blocks.
        data: Bytes,
    },
    /// Whole blocks that read as zeros.
    Zeros {
        /// The first byte.
        at: Place,
        /// Bytes.
        length: u64,
    },
    /// That was all.
    End,
}

/// What a node is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageOffer {
    /// Where the image is.
    pub position: Position,
    /// It is what changed since here, the end of the receiver's log; else all of it.
    pub since: Option<Lsn>,
    /// What is staged already counts.
    pub resumed: bool,
    /// Bytes to come, with those that are staged already.
    pub total_bytes: u64,
    /// Bytes that are staged already.
    pub done_bytes: u64,
    /// Behind this the receiver's log is not part of the sender's history.
    pub common: Lsn,
}

/// Up to a place, what is staged is as of a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// Up to here, from the entry before on.
    pub to: Place,
    /// As of here.
    pub at: Position,
}

/// What a node has of an image that was not sent to the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Staged {
    /// The image that came last, which what is staged may be part of.
    pub image: Position,
    /// The end of the log that it goes on from; none where it is all of an image.
    pub since: Option<Lsn>,
    /// Behind the last entry nothing is staged.
    pub reached: Vec<Reached>,
    /// Bytes that are staged.
    pub done_bytes: u64,
}

/// How far an image has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageProgress {
    /// Bytes that have come.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

impl ImageProgress {
    /// What a peer or a disk says of it: no more has come than there is.
    pub(super) fn told(done_bytes: u64, total_bytes: u64) -> ImageProgress {
        ImageProgress { done_bytes: done_bytes.min(total_bytes), total_bytes }
    }
}

/// The file `state`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct State {
    /// The image.
    pub image: Position,
    /// Only what changed since the end of the log here is staged.
    pub partial: bool,
    /// The end of the log here when it began.
    pub old_head: Lsn,
    /// Epoch and chain there.
    pub old_epoch: EpochId,
    pub old_chain: Chain,
    /// Behind this the log here is not part of the sender's history.
    pub common: Lsn,
    pub reached: Vec<Reached>,
    /// Bytes of `ranges` that count.
    pub ranges_bytes: u64,
    /// XXH3 of these.
    pub ranges_sum: u64,
    pub progress: ImageProgress,
    /// All of it has come.
    pub complete: bool,
    /// What leaves the log by the switch is kept in this branch already.
    #[serde(default)]
    pub branch: Option<String>,
}

/// What is staged.
pub(super) struct Staging {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    pub state: State,
    /// The control state, as far as it has come.
    incoming: Vec<u8>,
    /// The control state at the image, once it is whole.
    pub control: Option<ControlState>,
    pub volumes: BTreeMap<VolumeNumber, Arc<BaseVolume>>,
    pub ranges: Ranges,
    /// Of what is in the file.
    ranges_sum: Xxh3,
    /// Not yet in the file.
    unwritten: Vec<Range>,
    unsynced: BTreeSet<VolumeNumber>,
    unsynced_bytes: u64,
    cursor: Place,
    /// A part could not be staged: what comes behind it, and its end, are refused until the image
    /// goes on from what is here.
    gap: bool,
}

fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl Staging {
    /// Begins anew.
    pub(super) fn create(
        disk: Arc<dyn Disk>,
        group_dir: &Path,
        state: State,
    ) -> io::Result<Staging> {
        Staging::remove(&*disk, group_dir)?;
        let dir = group_dir.join(STAGING);
        disk.create_dir(&dir)?;
        let file = disk.open(&dir.join(RANGES), OpenMode::Create)?;
        file.sync()?;
        files::store(&*disk, &dir.join(STATE), &serde_json::to_vec(&state)?)?;
        disk.sync_dir(group_dir)?;
        Ok(Staging::with(disk, dir, state, Ranges::default(), Xxh3::new()))
    }

    /// Nothing has come yet that the last checkpoint lacks.
    fn with(
        disk: Arc<dyn Disk>,
        dir: PathBuf,
        state: State,
        ranges: Ranges,
        ranges_sum: Xxh3,
    ) -> Staging {
        Staging {
            disk,
            dir,
            state,
            incoming: Vec::new(),
            control: None,
            volumes: BTreeMap::new(),
            ranges,
            ranges_sum,
            unwritten: Vec::new(),
            unsynced: BTreeSet::new(),
            unsynced_bytes: 0,
            cursor: Place::default(),
            gap: false,
        }
    }

    /// Opens what an earlier run left, as of its last checkpoint; `NotFound` where there is none,
    /// `InvalidData` where it is not what was written.
    pub(super) fn open(disk: Arc<dyn Disk>, group_dir: &Path) -> io::Result<Staging> {
        let dir = group_dir.join(STAGING);
        let path = dir.join(STATE);
        let mut state: State = serde_json::from_slice(&files::load(&*disk, &path)?)
            .map_err(|cause| wrong(format!("{}: {cause}", path.display())))?;
        let ImageProgress { done_bytes, total_bytes } = state.progress;
        state.progress = ImageProgress::told(done_bytes, total_bytes);
        let mut ranges = Ranges::default();
        let mut sum = Xxh3::new();
        let path = dir.join(RANGES);
        let file = disk.open(&path, OpenMode::ReadWrite)?;
        let bytes = file.len()?;
        if bytes < state.ranges_bytes {
            let (path, all) = (path.display(), state.ranges_bytes);
            return Err(wrong(format!("{path}: has {bytes} bytes of {all}")));
        }
        if bytes > state.ranges_bytes {
            // After a failed sync its length is not what the disk has: it is cut, and grows anew.
            file.set_len(state.ranges_bytes)?;
        }
        let mut at = 0;
        while at < state.ranges_bytes {
            let count = (state.ranges_bytes - at).min((RANGE_BYTES as u64) << 15) as usize;
            let mut bytes = vec![0; count];
            file.read_at(&mut bytes, at)?;
            sum.update(&bytes);
            for entry in bytes.chunks(RANGE_BYTES) {
                let entry = entry.try_into().ok().and_then(Range::decode);
                let no_range = || wrong(format!("{}: no range", path.display()));
                ranges.insert(entry.ok_or_else(no_range)?);
            }
            at += count as u64;
        }
        if sum.digest() != state.ranges_sum {
            let (got, expected) = (sum.digest(), state.ranges_sum);
            let what = format!("checksum: got {got:016x}, expected {expected:016x}");
            return Err(wrong(format!("{}: {what}", path.display())));
        }
        let control = match ControlState::load(&*disk, &dir) {
            Ok(control) => Some(control),
            Err(_) if !state.complete => None,
            Err(ControlStateError::Io(cause)) => return Err(cause),
            Err(error) => return Err(wrong(error.to_string())),
        };
        let mut staging = Staging::with(disk, dir, state, ranges, sum);
        if let Some(control) = control {
            // Of a whole image that is complete the files may have been moved already.
            if staging.state.partial || !staging.state.complete {
                staging.open_volumes(&control)?;
            }
            let is_image = control.position.lsn == staging.state.image.lsn;
            staging.control = is_image.then_some(control);
        }
        if !staging.state.partial && !staging.state.complete {
            staging.forget_unreached()?;
        }
        Ok(staging)
    }

    /// Of a whole image all that is in the files counts: what came behind the last checkpoint goes,
    /// since a later image may have nothing to say there.
    fn forget_unreached(&mut self) -> io::Result<()> {
        let to = self.state.reached.last().map_or(Place::default(), |last| last.to);
        let born = self.born();
        for (number, volume) in self.volumes.range(to.volume..) {
            let from = if *number == to.volume { to.offset } else { 0 };
            if from < volume.size_bytes() {
                volume.zero_blocks(from, volume.size_bytes() - from, born)?;
                self.unsynced.insert(*number);
            }
        }
        Ok(())
    }

    /// Removes what is staged, where anything is.
    pub(super) fn remove(disk: &dyn Disk, group_dir: &Path) -> io::Result<()> {
        let dir = group_dir.join(STAGING);
        let gone = dir.with_extension("deleted");
        for dir in [&dir, &gone] {
            if disk.exists(dir)? {
                files::discard(disk, dir)?;
            }
        }
        Ok(())
    }

    /// What of it may count for the next image.
    pub(super) fn staged(&self) -> Staged {
        Staged {
            image: self.state.image,
            since: self.state.partial.then_some(self.state.old_head),
            reached: self.state.reached.clone(),
            done_bytes: self.state.progress.done_bytes,
        }
    }

    /// Goes on with this or a later image; that is durable before anything of it is staged.
    pub(super) fn resume(&mut self, offer: &ImageOffer) -> io::Result<()> {
        self.state.image = offer.position;
        self.state.common = offer.common;
        self.state.complete = false;
        self.state.progress = ImageProgress::told(offer.done_bytes, offer.total_bytes);
        self.incoming.clear();
        self.control = None;
        self.cursor = Place::default();
        self.gap = false;
        self.store_state()
    }

    /// Refuses what comes until the image goes on from what is here.
    pub(super) fn behind_a_gap(self) -> Staging {
        Staging { gap: true, ..self }
    }

    /// Takes the next part. After `End` all of it is durable, and may be switched to.
    ///
    /// # Errors
    ///
    /// What is wrong with the part (`InvalidData`), or what the disk says.
    pub(super) fn put(&mut self, part: ImagePart) -> io::Result<()> {
        if self.gap {
            return Err(wrong("a part before this one could not be staged"));
        }
        match part {
            ImagePart::Control { offset, total, bytes } => self.put_control(offset, total, &bytes),
            ImagePart::Data { at, crcs, data } => self.put_data(at, &crcs, &data),
            ImagePart::Zeros { at, length } => self.put_zeros(at, length),
            ImagePart::End => {
                if self.control.is_none() {
                    return Err(wrong("an image without its control state"));
                }
                self.cursor =
                    Place { volume: VolumeNumber(u32::MAX), offset: super::VOLUME_BYTES_MAX };
                self.state.complete = true;
                self.state.progress.done_bytes = self.state.progress.total_bytes;
                self.checkpoint()
            }
        }
    }

    fn put_control(&mut self, offset: u64, total: u64, bytes: &[u8]) -> io::Result<()> {
        let have = self.incoming.len() as u64;
        if offset != have || total > CONTROL_BYTES_MAX || have + bytes.len() as u64 > total {
            return Err(wrong(format!("control state: bytes at {offset} of {total}, have {have}")));
        }
        if self.control.is_some() {
            return Err(wrong("control state: comes twice"));
        }
        self.incoming.extend_from_slice(bytes);
        if (self.incoming.len() as u64) < total {
            return Ok(());
        }
        let control = ControlState::decode(&std::mem::take(&mut self.incoming))
            .map_err(|error| wrong(error.to_string()))?;
        let (position, image) = (control.position, self.state.image);
        if (position.epoch, position.lsn) != (image.epoch, image.lsn) {
            return Err(wrong(format!("control state: is of LSN {}", position.lsn)));
        }
        check_state(&control).map_err(|what| wrong(format!("control state: {what}")))?;
        self.open_volumes(&control)?;
        control.store(&*self.disk, &self.dir)?;
        self.control = Some(control);
        Ok(())
    }

    /// Opens or makes the files of all volumes that are in the image, and gives them its sizes.
    fn open_volumes(&mut self, control: &ControlState) -> io::Result<()> {
        let content = Content::at_horizon(control);
        self.volumes.retain(|number, _| content.volumes.contains_key(number));
        for (number, known) in &content.volumes {
            let size_bytes = known.volume.size_bytes;
            if !super::content::is_volume_size(size_bytes) || size_bytes == 0 {
                return Err(wrong(format!("volume {number}: has {size_bytes} bytes")));
            }
            let open = self.volumes.remove(number).map_or_else(
                || BaseVolume::open(self.disk.clone(), &self.dir, *number).map(Arc::new),
                Ok,
            );
            let volume = match open {
                Ok(volume) => {
                    if volume.size_bytes() != size_bytes {
                        volume.resize(size_bytes)?;
                        self.unsynced.insert(*number);
                    }
                    volume
                }
                Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                    let disk = self.disk.clone();
                    Arc::new(BaseVolume::create(disk, &self.dir, *number, size_bytes)?)
                }
                Err(cause) => return Err(cause),
            };
            self.volumes.insert(*number, volume);
        }
        Ok(())
    }

    /// The volume that a part is of, where the part fits it and comes in order.
    fn volume_for(&self, at: Place, length: u64) -> io::Result<Arc<BaseVolume>> {
        let volume = self.volumes.get(&at.volume).filter(|_| self.control.is_some());
        let volume = volume.ok_or_else(|| wrong(format!("no volume {} here", at.volume)))?;
        let end = at.offset.checked_add(length);
        let fits = length > 0
            && at.offset.is_multiple_of(BLOCK_BYTES)
            && length.is_multiple_of(BLOCK_BYTES)
            && end.is_some_and(|end| end <= volume.size_bytes());
        if !fits || at < self.cursor {
            return Err(wrong(format!(
                "volume {}: {length} bytes at {} do not fit, or come late",
                at.volume, at.offset
            )));
        }
        Ok(volume.clone())
    }

    /// What is staged is as good as the last record before the image.
    fn born(&self) -> Lsn {
        born_in(self.state.image.lsn)
    }

    fn put_data(&mut self, at: Place, crcs: &[u32], data: &[u8]) -> io::Result<()> {
        let volume = self.volume_for(at, data.len() as u64)?;
        let blocks = data.chunks_exact(BLOCK_BYTES as usize);
        if blocks.len() != crcs.len() || blocks.zip(crcs).any(|(block, crc)| crc32(block) != *crc) {
            return Err(wrong(format!(
                "volume {}: checksum of a block behind {} differs",
                at.volume, at.offset
            )));
        }
        volume.write_blocks(at.offset, data, crcs, self.born())?;
        self.note(Range { at, length: data.len() as u64, zeros: false })
    }

    fn put_zeros(&mut self, at: Place, length: u64) -> io::Result<()> {
        let volume = self.volume_for(at, length)?;
        volume.zero_blocks(at.offset, length, self.born())?;
        self.note(Range { at, length, zeros: true })
    }

    fn note(&mut self, range: Range) -> io::Result<()> {
        self.unsynced.insert(range.at.volume);
        self.cursor = Place { offset: range.at.offset + range.length, ..range.at };
        if !range.zeros {
            let progress = &mut self.state.progress;
            progress.done_bytes = progress.done_bytes.saturating_add(range.length);
            progress.total_bytes = progress.total_bytes.max(progress.done_bytes);
            self.unsynced_bytes += range.length;
        }
        self.ranges.insert(range);
        match self.unwritten.last_mut() {
            Some(last)
                if last.zeros == range.zeros
                    && last.at.volume == range.at.volume
                    && last.at.offset + last.length == range.at.offset =>
            {
                last.length += range.length;
            }
            _ => self.unwritten.push(range),
        }
        if self.unsynced_bytes >= CHECKPOINT_BYTES || self.unwritten.len() >= 1 << 16 {
            self.checkpoint()?;
        }
        Ok(())
    }

    /// Makes what came durable, and says so.
    pub(super) fn checkpoint(&mut self) -> io::Result<()> {
        for number in std::mem::take(&mut self.unsynced) {
            if let Some(volume) = self.volumes.get(&number) {
                volume.sync()?;
            }
        }
        self.unsynced_bytes = 0;
        let unwritten = std::mem::take(&mut self.unwritten);
        if !unwritten.is_empty() {
            let bytes: Vec<u8> = unwritten.iter().flat_map(Range::encode).collect();
            let file = self.disk.open(&self.dir.join(RANGES), OpenMode::ReadWrite)?;
            file.write_at(&[IoSlice::new(&bytes)], self.state.ranges_bytes)?;
            file.sync()?;
            self.state.ranges_bytes += bytes.len() as u64;
            self.ranges_sum.update(&bytes);
            self.state.ranges_sum = self.ranges_sum.digest();
        }
        let here = Reached { to: self.cursor, at: self.state.image };
        self.state.reached = reached_with(&self.state.reached, here);
        self.store_state()
    }

    pub(super) fn store_state(&self) -> io::Result<()> {
        files::store(&*self.disk, &self.dir.join(STATE), &serde_json::to_vec(&self.state)?)
    }
}

/// The highest position that a record of the image at `lsn` can have.
pub(super) fn born_in(lsn: Lsn) -> Lsn {
    Lsn(lsn.0.saturating_sub(1))
}

/// What is reached, once everything up to `here` is as of one position more.
fn reached_with(before: &[Reached], here: Reached) -> Vec<Reached> {
    let mut reached: Vec<Reached> = before.iter().filter(|old| old.to > here.to).copied().collect();
    match reached.first_mut() {
        Some(first) if first.at == here.at => {}
        _ if here.to > Place::default() => reached.insert(0, here),
        _ => {}
    }
    while reached.len() > REACHED_MAX {
        // The first two become one, at the older position: more is sent again, never less.
        reached.remove(0);
    }
    reached
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::LogTime;

    fn reached(offset: u64, lsn: u64) -> Reached {
        let at = Position { epoch: EpochId(1), lsn: Lsn(lsn), time: LogTime(0) };
        Reached { to: Place { volume: VolumeNumber(1), offset }, at }
    }

    #[test]
    fn what_is_reached_gets_younger_from_the_front() {
        let first = reached_with(&[], reached(100, 50));
        assert_eq!(first, [reached(100, 50)]);
        assert_eq!(reached_with(&first, reached(200, 50)), [reached(200, 50)]);
        let second = reached_with(&first, reached(40, 70));
        assert_eq!(second, [reached(40, 70), reached(100, 50)]);
        assert_eq!(reached_with(&second, reached(100, 70)), [reached(100, 70)]);
        let none = Reached { to: Place::default(), ..reached(0, 90) };
        assert_eq!(reached_with(&second, none), second, "nothing came of it yet");
    }

    #[test]
    fn too_many_places_are_joined_at_the_older_position() {
        let mut all = Vec::new();
        for turn in 0..40 {
            all = reached_with(&all, reached(10_000 - turn, 100 + turn));
        }
        assert_eq!(all.len(), REACHED_MAX);
        // Each place is as of a position that it had at least.
        for entry in &all {
            assert_eq!(entry.at.lsn.0 - 100, 10_000 - entry.to.offset);
        }
    }
}
