//! What is left of blocks that are damaged, and blocks that are given up: from then on their sums
//! never hold, so that who reads one is told, and sees no other data.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::ops::Range;

use super::sidecar::{self, BLOCKS_PER_CHUNK, CHUNKS_PER_REGION, LOST_SUM, SUMS_BYTES};
use super::volume::{BaseError, BaseVolume, sum_range};
use crate::units::{BLOCK_BYTES, CHUNK_BYTES, Lsn};

/// Bytes of a block, as a length.
const BLOCK: usize = BLOCK_BYTES as usize;
/// No part of an unreadable page can be written, but all of it.
const PAGE: u64 = 4096;
const SECTOR: usize = 512;
/// Chunks whose sums share a page.
const CHUNKS_PER_PAGE: u64 = PAGE / SUMS_BYTES as u64;

/// The chunks of whose sums and slots something is read where a range becomes zeros
/// ([`BaseVolume::zero_blocks`]) or where the volume gets an end there: the first and the last of
/// each region. Of those between, whole pages are made anew.
pub fn edge_chunks(offset: u64, length: u64) -> impl Iterator<Item = u64> {
    let (from, to) = (offset / CHUNK_BYTES, (offset + length).div_ceil(CHUNK_BYTES));
    (from / CHUNKS_PER_REGION..to.div_ceil(CHUNKS_PER_REGION)).flat_map(move |region| {
        let begin = region * CHUNKS_PER_REGION;
        [from.max(begin), (to - 1).min(begin + CHUNKS_PER_REGION - 1)]
    })
}

/// Whether the sum of a block is lost, rather than another one.
pub fn is_sum_lost(cause: &BaseError) -> bool {
    matches!(cause, BaseError::Damaged { expected, .. }
        if *expected == sidecar::crc_of(u32::from_le_bytes(LOST_SUM)))
}

/// A block that is damaged.
pub struct Salvaged {
    /// Its first byte in the volume.
    pub offset: u64,
    /// What its sum says that its CRC-32 was, so that a peer's block is proved by it; `None` where
    /// the sum is lost, or is that of what is left.
    pub crc: Option<u32>,
}

impl BaseVolume {
    /// Reads whole blocks as far as the disk has them, and tells those that are damaged; what slots
    /// prove is made right before. What cannot be read is zeros.
    pub fn salvage(&self, offset: u64, data: &mut [u8]) -> Vec<Salvaged> {
        let mut damaged = Vec::new();
        if self.read(offset, data).is_ok() {
            return damaged;
        }
        let end = offset + data.len() as u64;
        for chunk in offset / CHUNK_BYTES..end.div_ceil(CHUNK_BYTES) {
            self.mend_alone(chunk, Lsn::ZERO);
        }
        for (index, block) in data.chunks_exact_mut(BLOCK).enumerate() {
            let offset = offset + index as u64 * BLOCK_BYTES;
            if self.read(offset, block).is_ok() {
                continue;
            }
            if self.read_unchecked(offset, block).is_err() {
                block.fill(0);
            }
            let mut sum = LOST_SUM;
            let stored = self.sums.read_at(&mut sum, sidecar::sum_offset(offset / BLOCK_BYTES));
            let known = stored.is_ok() && sum != LOST_SUM;
            let sum = u32::from_le_bytes(sum);
            let proves = known && sum != sidecar::stored_sum(crc32fast::hash(block));
            damaged.push(Salvaged { offset, crc: proves.then(|| sidecar::crc_of(sum)) });
        }
        damaged
    }

    /// Makes right what the slot of a chunk proves without a peer; `born` dates it where its own
    /// birth is lost.
    pub fn mend_alone(&self, chunk: u64, born: Lsn) {
        let none = BTreeMap::new();
        if let Ok(exam) = self.examine(chunk)
            && let Some(remedy) = exam.remedy(&none, born)
            && let Err(cause) = self.mend(&exam, &remedy, &none)
        {
            tracing::warn!("{}: {cause}", exam.what());
        }
    }

    /// Makes the sum of a block a lost one: two of block, sum and a peer's block prove it again.
    /// For the folder; durable with the next [`BaseVolume::sync`].
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn lose_sum(&self, offset: u64, born: Lsn) -> io::Result<()> {
        self.set_sum(offset, u32::from_le_bytes(LOST_SUM), born)
    }

    fn set_sum(&self, offset: u64, sum: u32, born: Lsn) -> io::Result<()> {
        let mut folder = self.folder();
        let open = self.chunk_at(&mut folder, offset / CHUNK_BYTES, born)?;
        open.sums[sum_range(offset / BLOCK_BYTES)].copy_from_slice(&sum.to_le_bytes());
        open.slot.collision |= sum == 0;
        Ok(())
    }

    /// Gives a block a sum that never holds; whether the block could be read. For the folder;
    /// durable with the next [`BaseVolume::sync`], and to be so before the block is
    /// [blanked](BaseVolume::blank).
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn give_up(&self, offset: u64, born: Lsn) -> io::Result<bool> {
        let mut block = [0; BLOCK];
        let is_read = self.read_unchecked(offset, &mut block).is_ok();
        if !is_read {
            block.fill(0);
        }
        // Not by way of `stored_sum`, which has none such for a block of zeros.
        let sum = !sidecar::crc_of(crc32fast::hash(&block));
        self.set_sum(offset, sum, born).map(|()| is_read)
    }

    /// Writes zeros to a block that cannot be read and was given up: most disks then give it
    /// another place. Durable with the next [`BaseVolume::sync`].
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn blank(&self, offset: u64) -> io::Result<()> {
        self.image.write_at(&[IoSlice::new(&[0; BLOCK])], offset)
    }

    /// Whether the sums and the slot of a chunk can be read, for who is about to write to it. A
    /// chunk may lie beyond the end: its part of the sidecar is there before it.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn look_at_sums(&self, chunk: u64) -> io::Result<()> {
        if !self.has_sums(chunk) {
            return Ok(());
        }
        let sums = sidecar::sum_offset(chunk * BLOCKS_PER_CHUNK as u64);
        self.sums.read_at(&mut [0; SUMS_BYTES], sums)?;
        // Who makes zeros of a region reads all of its slots.
        let slots = sidecar::slot_offset(chunk / CHUNKS_PER_REGION * CHUNKS_PER_REGION);
        self.sums.read_at(&mut [0; sidecar::SLOTS_BYTES as usize], slots)
    }

    /// Writes anew what the disk cannot read of the pages that have the sums and the slot of a
    /// chunk, as lost; durable on return. The chunks whose sums some of that is of: their slots
    /// prove them again where all blocks are there.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn give_up_unread_sums(&self, chunk: u64) -> io::Result<Range<u64>> {
        let first = chunk / CHUNKS_PER_PAGE * CHUNKS_PER_PAGE;
        if !self.has_sums(chunk) {
            return Ok(first..first);
        }
        let (blocks, chunks) =
            (self.size_bytes() / BLOCK_BYTES, self.size_bytes().div_ceil(CHUNK_BYTES));
        let sums = sidecar::sum_offset(chunk * BLOCKS_PER_CHUNK as u64);
        let lost = self.write_unread(sums, sidecar::sum_offset(blocks))?;
        self.write_unread(sidecar::slot_offset(chunk), sidecar::slot_offset(chunks))?;
        Ok(if lost { first..chunks.min(first + CHUNKS_PER_PAGE) } else { first..first })
    }

    /// Whether a chunk's region is in the sidecar.
    fn has_sums(&self, chunk: u64) -> bool {
        let regions = self.size_bytes().div_ceil(CHUNKS_PER_REGION * CHUNK_BYTES);
        chunk / CHUNKS_PER_REGION < regions
    }

    /// What lies in the page from `beyond` on is of nothing yet, and so zeros.
    fn write_unread(&self, offset: u64, beyond: u64) -> io::Result<bool> {
        let (at, mut page) = (offset / PAGE * PAGE, [0; PAGE as usize]);
        if self.sums.read_at(&mut page, at).is_ok() {
            return Ok(false);
        }
        self.settle()?;
        for (index, sector) in page.chunks_exact_mut(SECTOR).enumerate() {
            if self.sums.read_at(sector, at + (index * SECTOR) as u64).is_err() {
                sector.fill(LOST_SUM[0]);
            }
        }
        page[beyond.clamp(at, at + PAGE) as usize - at as usize..].fill(0);
        self.sums.write_at(&[IoSlice::new(&page)], at)?;
        self.sums.sync().map(|()| true)
    }
}
