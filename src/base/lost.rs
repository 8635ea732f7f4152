//! Files of a base that a disk lost, or the end of one: they are made again so that what was in
//! them is an error for who reads it, and never zeros.
//!
//! A file of the image is made again as a hole: the sidecar says of each block that it was not. Of
//! a part of a sidecar the sums and slots are made wrong, so that blocks of zeros do not pass for
//! what is lost either; where the image's block is still there, it and a peer's prove the sum.
//! While a fold has not ended, a wrong sum of a block may be its doing, and is passed over: then
//! the sums of a lost part of the image are made such as it leaves alone.

use std::io::{self, IoSlice};
use std::path::Path;

use super::sidecar::{self, BLOCKS_PER_CHUNK, REGION_BYTES};
use super::volume::{BaseVolume, image_path, sums_path};
use crate::io::{Disk, OpenMode};
use crate::units::{BLOCK_BYTES, CHUNK_BYTES, VolumeNumber};

/// A file that is not there, or not to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Its name in the directory.
    pub file: String,
    /// Bytes that are there; `None` where it is missing.
    pub found_bytes: Option<u64>,
    /// Bytes that it had.
    pub expected_bytes: u64,
    /// The first chunk of the volume of which something may be lost.
    pub from_chunk: u64,
}

impl Lost {
    /// What happened to it, for people.
    #[must_use]
    pub fn what(&self) -> String {
        match self.found_bytes {
            None => format!("{} is missing", self.file),
            Some(bytes) => format!("{} ends at {bytes} of {}", self.file, self.expected_bytes),
        }
    }
}

impl BaseVolume {
    /// Makes the files of a volume again that are not there, or not to the end that a base of
    /// `size_bytes` has; which these were. `in_work`: a fold that has not ended may have written to
    /// it. Durable on return; after a crash in the middle it is called again. For who has not
    /// opened the base yet.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn bring_back(
        disk: &dyn Disk,
        dir: &Path,
        number: VolumeNumber,
        size_bytes: u64,
        in_work: bool,
    ) -> io::Result<Vec<Lost>> {
        let mut lost = Vec::new();
        // The sidecar first: an image that is not there yet still tells that something is lost.
        let (sums, bytes) = (sums_path(dir, number), sidecar::file_bytes(size_bytes));
        let found_bytes = length(disk, &sums)?;
        if found_bytes.is_none_or(|found| found < bytes) {
            let from_chunk = first_lost(found_bytes.unwrap_or(0), size_bytes);
            make_sidecar(disk, &sums, number, size_bytes, (found_bytes.unwrap_or(0), from_chunk))?;
            lost.push(Lost { file: name(&sums), found_bytes, expected_bytes: bytes, from_chunk });
        }
        let path = image_path(dir, number);
        let found_bytes = length(disk, &path)?;
        if found_bytes.is_none_or(|found| found < size_bytes) {
            if in_work {
                forget_sums(disk, &sums, found_bytes.unwrap_or(0) / BLOCK_BYTES, size_bytes)?;
            }
            let image = disk.open(&path, OpenMode::Create)?;
            image.set_len(size_bytes)?;
            image.sync()?;
            let from_chunk = found_bytes.unwrap_or(0) / CHUNK_BYTES;
            let file = name(&path);
            lost.push(Lost { file, found_bytes, expected_bytes: size_bytes, from_chunk });
        }
        if !lost.is_empty() {
            disk.sync_dir(dir)?;
        }
        Ok(lost)
    }
}

fn length(disk: &dyn Disk, path: &Path) -> io::Result<Option<u64>> {
    match disk.open(path, OpenMode::Read) {
        Ok(file) => Ok(Some(file.len()?)),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(cause),
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The first chunk of which a sidecar of so many bytes does not have all.
fn first_lost(found_bytes: u64, size_bytes: u64) -> u64 {
    let chunks = size_bytes.div_ceil(CHUNK_BYTES);
    let is_there =
        |chunk: u64| sidecar::sum_offset((chunk + 1) * BLOCKS_PER_CHUNK as u64 - 1) < found_bytes;
    // Regions lie one behind the other, and so do the sums in them.
    let (mut from, mut to) = (0, chunks);
    while from < to {
        let middle = from + (to - from) / 2;
        if is_there(middle) { from = middle + 1 } else { to = middle }
    }
    from
}

/// Writes a sidecar that has what is left of the one at `path`, so many bytes up to a chunk, and of
/// the rest sums and slots that are wrong; it takes the name when it is whole.
fn make_sidecar(
    disk: &dyn Disk,
    path: &Path,
    number: VolumeNumber,
    size_bytes: u64,
    (found_bytes, first_lost): (u64, u64),
) -> io::Result<()> {
    let new_path = path.with_extension("sum.new");
    let new = disk.open(&new_path, OpenMode::Create)?;
    new.set_len(0)?;
    new.set_len(sidecar::file_bytes(size_bytes))?;
    let mut header = vec![0; sidecar::HEADER_BYTES as usize];
    header[..16].copy_from_slice(&sidecar::encode_header(number));
    new.write_at(&[IoSlice::new(&header)], 0)?;
    let old = if found_bytes > 0 { Some(disk.open(path, OpenMode::Read)?) } else { None };
    let chunks = size_bytes.div_ceil(CHUNK_BYTES);
    let blocks = size_bytes / BLOCK_BYTES;
    for first in (0..chunks).step_by(sidecar::CHUNKS_PER_REGION as usize) {
        let at = sidecar::slot_offset(first);
        let mut region = vec![0; REGION_BYTES as usize];
        let there = found_bytes.saturating_sub(at).min(REGION_BYTES);
        if let Some(old) = old.as_ref().filter(|_| there > 0) {
            old.read_at(&mut region[..there as usize], at)?;
        }
        let end = chunks.min(first + sidecar::CHUNKS_PER_REGION);
        for chunk in first.max(first_lost)..end {
            let slot = (sidecar::slot_offset(chunk) - at) as usize;
            region[slot..][..sidecar::SLOT_BYTES].copy_from_slice(&sidecar::LOST_SLOT);
            let from = chunk * BLOCKS_PER_CHUNK as u64;
            let count = (blocks - from).min(BLOCKS_PER_CHUNK as u64) as usize;
            let sums = (sidecar::sum_offset(from) - at) as usize;
            region[sums..][..count * 4].fill(0xff);
        }
        if region.iter().any(|byte| *byte != 0) {
            new.write_at(&[IoSlice::new(&region)], at)?;
        }
    }
    new.sync()?;
    disk.rename(&new_path, path)
}

/// Makes the sums of all blocks from `first` on wrong that were not zeros; durable on return.
fn forget_sums(disk: &dyn Disk, path: &Path, first: u64, size_bytes: u64) -> io::Result<()> {
    let file = disk.open(path, OpenMode::ReadWrite)?;
    let blocks = size_bytes / BLOCK_BYTES;
    let mut sums = [0; sidecar::SUMS_BYTES];
    for chunk in first / BLOCKS_PER_CHUNK as u64..size_bytes.div_ceil(CHUNK_BYTES) {
        let from = chunk * BLOCKS_PER_CHUNK as u64;
        let at = sidecar::sum_offset(from);
        file.read_at(&mut sums, at)?;
        for block in from.max(first)..blocks.min(from + BLOCKS_PER_CHUNK as u64) {
            let sum = &mut sums[(block - from) as usize * 4..][..4];
            if sum != [0; 4] {
                sum.copy_from_slice(&sidecar::LOST_SUM);
            }
        }
        if sums.iter().any(|byte| *byte != 0) {
            file.write_at(&[IoSlice::new(&sums)], at)?;
        }
    }
    file.sync()
}
