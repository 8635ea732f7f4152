//! One chunk of a base against its sidecar: what is damaged of it, what a peer's blocks prove, and
//! the way back.
//!
//! A block, its sum and the slot over the sums vouch for each other. Whatever two of three agree on
//! is right, and a peer's block may be one of the three: its bytes count for nothing by themselves.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};

use crate::units::{BLOCK_BYTES, CHUNK_BYTES, Lsn, VolumeNumber};

use super::sidecar::{self, BLOCKS_PER_CHUNK, SLOT_BYTES, SUMS_BYTES, Slot};
use super::volume::{BaseError, BaseVolume};

/// Bytes of a block, as a length.
const BLOCK: usize = BLOCK_BYTES as usize;

/// A chunk as it is on disk.
pub struct Exam {
    volume: VolumeNumber,
    chunk: u64,
    /// Blocks of it that lie in the volume.
    blocks: usize,
    /// `None` where its checksum is wrong.
    slot: Option<Slot>,
    /// What the sidecar says of each block.
    stored: Vec<u32>,
    /// What each block's bytes have; `None` where they cannot be read.
    own: Vec<Option<u32>>,
    /// Which blocks are zeros: what tells a collision from a hole.
    zeros: Vec<bool>,
    /// Bytes that were read of the image.
    read_bytes: u64,
}

/// What makes a chunk right again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remedy {
    /// The sums as they should be, with their slot, where those on disk are wrong.
    sidecar: Option<(Vec<u32>, Slot)>,
    /// Blocks of the chunk that a peer's take the place of.
    replaced: Vec<usize>,
    /// Blocks that stay damaged.
    left: Vec<usize>,
}

impl BaseVolume {
    /// Reads a chunk and its part of the sidecar; the cache stays as it was. Of what a fold is at
    /// work on it tells nothing.
    ///
    /// # Errors
    ///
    /// Where the sidecar cannot be read.
    pub fn examine(&self, chunk: u64) -> Result<Exam, BaseError> {
        let begin = chunk * CHUNK_BYTES;
        let bytes = self.size_bytes().saturating_sub(begin).min(CHUNK_BYTES);
        let blocks = (bytes / BLOCK_BYTES) as usize;
        let failed = |error: io::Error| self.io("read the sidecar", &error);
        let mut sums = [0; SUMS_BYTES];
        let first = chunk * BLOCKS_PER_CHUNK as u64;
        self.sums.read_once(&mut sums, sidecar::sum_offset(first)).map_err(failed)?;
        let mut slot = [0; SLOT_BYTES];
        self.sums.read_once(&mut slot, sidecar::slot_offset(chunk)).map_err(failed)?;
        let slot = Slot::decode(&slot, chunk).ok();
        let mut exam = Exam {
            volume: self.number(),
            chunk,
            blocks,
            slot,
            stored: sums_of(&sums),
            own: vec![Some(0); blocks],
            zeros: vec![true; blocks],
            read_bytes: 0,
        };
        let empty = slot == Some(Slot::default()) && exam.stored.iter().all(|sum| *sum == 0);
        // What was never written is looked at where there is something.
        if blocks > 0 && !(empty && self.image.is_hole(begin, bytes)) {
            let mut data = vec![0; bytes as usize];
            let whole = self.image.read_once(&mut data, begin).is_ok();
            for (index, block) in data.chunks_exact_mut(BLOCK).enumerate() {
                let at = begin + index as u64 * BLOCK_BYTES;
                let read = whole || self.image.read_once(block, at).is_ok();
                exam.own[index] = read.then(|| sidecar::stored_sum(crc32fast::hash(block)));
                exam.zeros[index] = block.iter().all(|byte| *byte == 0);
            }
            exam.read_bytes = bytes;
        }
        Ok(exam)
    }

    /// Writes what makes a chunk right, with the peer's blocks; durable on return. For who keeps
    /// folds and readers away.
    ///
    /// # Errors
    ///
    /// What the disk says. After a failed sync nothing of the base may be relied on.
    pub fn mend(
        &self,
        exam: &Exam,
        remedy: &Remedy,
        blocks: &BTreeMap<u64, Vec<u8>>,
    ) -> io::Result<()> {
        self.settle()?;
        let first = exam.chunk * BLOCKS_PER_CHUNK as u64;
        for index in &remedy.replaced {
            let block = first + *index as u64;
            let bytes = blocks.get(&block).ok_or(io::ErrorKind::NotFound)?;
            self.image.write_at(&[IoSlice::new(bytes)], block * BLOCK_BYTES)?;
        }
        if let Some((sums, slot)) = &remedy.sidecar {
            let sums: Vec<u8> = sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
            self.sums.write_at(&[IoSlice::new(&sums)], sidecar::sum_offset(first))?;
            let slot = slot.encode(exam.chunk);
            self.sums.write_at(&[IoSlice::new(&slot)], sidecar::slot_offset(exam.chunk))?;
        }
        self.image.sync()?;
        self.sums.sync()
    }

    /// Checks a range's chunks; bytes of those that hold something.
    ///
    /// # Errors
    ///
    /// The first damage.
    #[cfg(test)]
    pub fn check(&self, offset: u64, length: u64) -> Result<u64, BaseError> {
        let end = self.size_bytes().min(offset.saturating_add(length));
        let mut checked = 0;
        for chunk in offset / CHUNK_BYTES..end.div_ceil(CHUNK_BYTES) {
            let exam = self.examine(chunk)?;
            exam.first_fault()?;
            checked += exam.read_bytes;
        }
        Ok(checked)
    }
}

impl Exam {
    /// Bytes that were read of the image.
    #[must_use]
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes
    }

    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.sums_hold() && self.suspects().is_empty()
    }

    /// What is wrong, for people.
    #[must_use]
    pub fn what(&self) -> String {
        let at = self.chunk * CHUNK_BYTES;
        let mut text = format!("base of volume {}: chunk at {at}", self.volume);
        let suspects = self.suspects();
        if let Some(first) = suspects.first() {
            let offset = at + *first as u64 * BLOCK_BYTES;
            let count = suspects.len();
            text += &format!(": {count} blocks differ from their sums, the first at {offset}");
        }
        if !self.sums_hold() {
            text += ": the sidecar's own checksum is wrong";
        }
        text
    }

    /// The blocks of the volume whose bytes and sums differ: those that a peer is asked for.
    #[must_use]
    pub fn wanted(&self) -> Vec<u64> {
        let first = self.chunk * BLOCKS_PER_CHUNK as u64;
        self.suspects().into_iter().map(|index| first + index as u64).collect()
    }

    /// What can be made right with these blocks of a peer, by number in the volume. `born` dates a
    /// chunk whose own birth is lost. `None` where nothing can.
    #[must_use]
    pub fn remedy(&self, blocks: &BTreeMap<u64, Vec<u8>>, born: Lsn) -> Option<Remedy> {
        let first = self.chunk * BLOCKS_PER_CHUNK as u64;
        let peer: BTreeMap<usize, u32> = blocks
            .iter()
            .filter(|(block, bytes)| bytes.len() == BLOCK && **block >= first)
            .map(|(block, bytes)| ((block - first) as usize, crc32fast::hash(bytes)))
            .map(|(index, crc)| (index, sidecar::stored_sum(crc)))
            .collect();
        // A slot of zeros vouches for a chunk that was never written, or is lost itself.
        let empty = self.stored.iter().all(|sum| *sum == 0);
        let slot = self.slot.filter(|slot| slot.is_written() || empty);
        let sums = match &slot {
            Some(slot) => self.proven_sums(slot, &peer)?,
            None => self.agreed_sums(&peer),
        };
        let damaged = self.suspects().into_iter();
        let damaged = damaged.filter(|index| self.own[*index] != Some(sums[*index]));
        let (replaced, left): (Vec<_>, Vec<_>) =
            damaged.partition(|index| peer.get(index) == Some(&sums[*index]));
        let sidecar = match slot {
            Some(slot) => (sums != self.stored).then_some((sums, slot)),
            // While one of them is in doubt, no slot may vouch for all.
            None if !left.is_empty() => None,
            None => {
                let is_zeros = |index: usize| match blocks.get(&(first + index as u64)) {
                    Some(bytes) if replaced.contains(&index) => bytes.iter().all(|byte| *byte == 0),
                    _ => self.zeros[index],
                };
                let collision = (0..self.blocks).any(|index| sums[index] == 0 && !is_zeros(index));
                let slot = Slot { birth: born, collision, sums_checksum: checksum(&sums) };
                Some((sums, slot))
            }
        };
        let remedy = Remedy { sidecar, replaced, left };
        (remedy.sidecar.is_some() || !remedy.replaced.is_empty()).then_some(remedy)
    }

    /// The sums that a whole slot vouches for: as they are stored; else those of the blocks here
    /// where they differ; else those of the peer's. What lies beyond the volume's end has none.
    fn proven_sums(&self, slot: &Slot, peer: &BTreeMap<usize, u32>) -> Option<Vec<u32>> {
        let with = |sum: &dyn Fn(usize) -> Option<u32>| {
            let mut sums = self.stored.clone();
            for index in self.suspects() {
                sums[index] = sum(index).unwrap_or(sums[index]);
            }
            sums
        };
        let own = |index: usize| self.own[index];
        let theirs = |index: usize| peer.get(&index).copied().or(self.own[index]);
        let candidates = [self.stored.clone(), with(&own), with(&theirs)];
        let ended = candidates.clone().map(|sums| self.without_what_is_beyond(sums));
        candidates.into_iter().chain(ended).find(|sums| slot.covers(&bytes_of(sums)))
    }

    fn without_what_is_beyond(&self, mut sums: Vec<u32>) -> Vec<u32> {
        sums[self.blocks..].fill(0);
        sums
    }

    /// Without a slot: where a block and its sum differ, what two of block, sum and peer agree on.
    fn agreed_sums(&self, peer: &BTreeMap<usize, u32>) -> Vec<u32> {
        let mut sums = self.without_what_is_beyond(self.stored.clone());
        for index in self.suspects() {
            if let Some(own) = self.own[index].filter(|own| peer.get(&index) == Some(own)) {
                sums[index] = own;
            }
        }
        sums
    }

    /// Blocks, by their place in the chunk, whose bytes and sums differ.
    fn suspects(&self) -> Vec<usize> {
        let pairs = self.own.iter().zip(&self.stored).enumerate();
        pairs.filter(|(_, (own, stored))| **own != Some(**stored)).map(|(index, _)| index).collect()
    }

    /// Whether the slot vouches for the sums as they are stored.
    fn sums_hold(&self) -> bool {
        self.slot.is_some_and(|slot| slot.covers(&bytes_of(&self.stored)))
    }

    #[cfg(test)]
    fn first_fault(&self) -> Result<(), BaseError> {
        let (volume, offset) = (self.volume, self.chunk * CHUNK_BYTES);
        if !self.sums_hold() {
            return Err(BaseError::Sidecar { volume, offset });
        }
        let Some(index) = self.suspects().first().copied() else { return Ok(()) };
        let offset = offset + index as u64 * BLOCK_BYTES;
        let crc = |sum| sidecar::stored_sum(sum);
        let got = self.own[index].map_or(0, crc);
        Err(BaseError::Damaged { volume, offset, got, expected: crc(self.stored[index]) })
    }
}

impl Remedy {
    /// Blocks of the volume that stay damaged, of a chunk.
    #[must_use]
    pub fn left(&self) -> usize {
        self.left.len()
    }

    /// Blocks that a peer's take the place of.
    #[must_use]
    pub fn replaced(&self) -> usize {
        self.replaced.len()
    }
}

fn sums_of(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|sum| u32::from_le_bytes(*sum)).collect()
}

fn bytes_of(sums: &[u32]) -> Vec<u8> {
    sums.iter().flat_map(|sum| sum.to_le_bytes()).collect()
}

fn checksum(sums: &[u32]) -> u32 {
    crc32fast::hash(&bytes_of(sums))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::io::{Disk, MemoryDisk, OpenMode};

    const NUMBER: VolumeNumber = VolumeNumber(3);
    const BORN: Lsn = Lsn(900);

    fn block(value: u8) -> Vec<u8> {
        vec![value; BLOCK]
    }

    /// A base of two chunks and a part of one; blocks 3 to 6 of the second hold 3 to 6.
    fn base() -> (MemoryDisk, BaseVolume) {
        let disk = MemoryDisk::new();
        disk.create_dir(Path::new("/base")).unwrap();
        let size = 2 * CHUNK_BYTES + 8 * BLOCK_BYTES;
        let shared: Arc<dyn Disk> = Arc::new(disk.clone());
        let base = BaseVolume::create(shared, Path::new("/base"), NUMBER, size).unwrap();
        for value in 3..=6u8 {
            let (data, at) = (block(value), CHUNK_BYTES + u64::from(value) * BLOCK_BYTES);
            base.write_blocks(at, &data, &[crc32fast::hash(&data)], Lsn(500)).unwrap();
        }
        base.sync().unwrap();
        (disk, base)
    }

    fn turn(disk: &MemoryDisk, name: &str, at: u64) {
        let file = disk.open(&Path::new("/base").join(name), OpenMode::ReadWrite).unwrap();
        let mut byte = [0];
        file.read_at(&mut byte, at).unwrap();
        file.write_at(&[IoSlice::new(&[byte[0] ^ 0x40])], at).unwrap();
    }

    fn image_at(value: u64) -> u64 {
        CHUNK_BYTES + value * BLOCK_BYTES + 77
    }

    fn sum_at(value: u64) -> u64 {
        sidecar::sum_offset(BLOCKS_PER_CHUNK as u64 + value)
    }

    fn theirs(values: &[u8]) -> BTreeMap<u64, Vec<u8>> {
        values.iter().map(|v| (BLOCKS_PER_CHUNK as u64 + u64::from(*v), block(*v))).collect()
    }

    /// Applies what these blocks of a peer prove; whether the chunk is whole then and holds what it
    /// held.
    fn mended(base: &BaseVolume, blocks: &BTreeMap<u64, Vec<u8>>) -> bool {
        let exam = base.examine(1).unwrap();
        assert!(!exam.is_whole(), "{}", exam.what());
        let Some(remedy) = exam.remedy(blocks, BORN) else { return false };
        base.mend(&exam, &remedy, blocks).unwrap();
        let whole = base.examine(1).unwrap().is_whole();
        assert_eq!(whole, remedy.left() == 0);
        if whole {
            for value in 3..=6u8 {
                let mut bytes = block(0);
                base.read(CHUNK_BYTES + u64::from(value) * BLOCK_BYTES, &mut bytes).unwrap();
                assert_eq!(bytes, block(value));
            }
        }
        whole
    }

    #[test]
    fn bytes_where_nothing_was_written_are_damage_and_zeros_of_a_peer_take_their_place() {
        let (disk, base) = base();
        assert_eq!(base.examine(0).unwrap().read_bytes(), 0);
        turn(&disk, "3.img", 5 * BLOCK_BYTES + 9);
        assert!(base.read(5 * BLOCK_BYTES, &mut [0; BLOCK]).is_err());
        let exam = base.examine(0).unwrap();
        assert!(!exam.is_whole(), "found");
        assert_eq!(exam.wanted(), [5]);
        // A peer that has something there has no say: the sidecar knows of nothing.
        assert_eq!(exam.remedy(&BTreeMap::from([(5, block(1))]), BORN), None);
        let zeros = BTreeMap::from([(5, block(0))]);
        let remedy = exam.remedy(&zeros, BORN).unwrap();
        assert_eq!((remedy.replaced(), remedy.left()), (1, 0));
        base.mend(&exam, &remedy, &zeros).unwrap();
        base.read(0, &mut [0; CHUNK_BYTES as usize]).unwrap();
        assert!(base.examine(0).unwrap().is_whole());
    }

    #[test]
    fn a_damaged_block_is_taken_from_a_peer_only_if_it_is_what_the_sum_says() {
        let (disk, base) = base();
        turn(&disk, "3.img", image_at(4));
        assert_eq!(base.examine(1).unwrap().wanted(), [BLOCKS_PER_CHUNK as u64 + 4]);
        assert!(!mended(&base, &BTreeMap::new()));
        let wrong = BTreeMap::from([(BLOCKS_PER_CHUNK as u64 + 4, block(9))]);
        assert!(!mended(&base, &wrong), "another content");
        assert!(mended(&base, &theirs(&[4])));
    }

    #[test]
    fn sums_that_the_slot_does_not_vouch_for_are_made_from_the_blocks_without_a_peer() {
        let (disk, base) = base();
        turn(&disk, "3.sum", sum_at(4));
        turn(&disk, "3.sum", sum_at(200));
        assert!(mended(&base, &BTreeMap::new()));
        assert_eq!(base.births(1, 2), [Some(Lsn(500))]);
    }

    #[test]
    fn a_sum_beyond_the_end_of_the_volume_is_none_again() {
        let (disk, base) = base();
        let (data, at) = (block(9), 2 * CHUNK_BYTES + BLOCK_BYTES);
        base.write_blocks(at, &data, &[crc32fast::hash(&data)], Lsn(600)).unwrap();
        base.sync().unwrap();
        let beyond = sidecar::sum_offset(2 * BLOCKS_PER_CHUNK as u64 + 100);
        turn(&disk, "3.sum", beyond);
        let exam = base.examine(2).unwrap();
        assert!(!exam.is_whole() && exam.wanted().is_empty(), "{}", exam.what());
        let remedy = exam.remedy(&BTreeMap::new(), BORN).expect("there is one");
        base.mend(&exam, &remedy, &BTreeMap::new()).unwrap();
        assert!(base.examine(2).unwrap().is_whole());
        let mut bytes = block(0);
        base.read(at, &mut bytes).unwrap();
        assert_eq!(bytes, data);
    }

    #[test]
    fn a_lost_slot_is_made_again_where_all_blocks_and_sums_agree() {
        for lost in [true, false] {
            let (disk, base) = base();
            let at = sidecar::slot_offset(1);
            if lost {
                let file = disk.open(Path::new("/base/3.sum"), OpenMode::ReadWrite).unwrap();
                file.write_at(&[IoSlice::new(&[0; SLOT_BYTES])], at).unwrap();
            } else {
                turn(&disk, "3.sum", at + 2);
            }
            assert!(mended(&base, &BTreeMap::new()), "lost: {lost}");
            assert_eq!(base.births(1, 2), [Some(BORN)], "as late as it can be");
        }
    }

    #[test]
    fn block_and_sum_of_one_place_are_mended_where_the_slot_proves_the_peers() {
        let (disk, base) = base();
        turn(&disk, "3.img", image_at(4));
        turn(&disk, "3.sum", sum_at(4));
        turn(&disk, "3.img", image_at(5));
        assert!(!mended(&base, &theirs(&[5])));
        assert!(mended(&base, &theirs(&[4, 5])));
    }

    #[test]
    fn without_a_slot_two_of_block_sum_and_peer_decide() {
        let (disk, base) = base();
        turn(&disk, "3.sum", sidecar::slot_offset(1));
        turn(&disk, "3.img", image_at(4));
        turn(&disk, "3.sum", sum_at(5));
        assert!(!mended(&base, &BTreeMap::new()));
        assert!(mended(&base, &theirs(&[4, 5])));
    }

    #[test]
    fn where_block_sum_and_slot_are_damaged_nothing_is_written() {
        let (disk, base) = base();
        turn(&disk, "3.sum", sidecar::slot_offset(1));
        turn(&disk, "3.sum", sum_at(4));
        turn(&disk, "3.img", image_at(4));
        let before = disk.operations();
        assert!(!mended(&base, &theirs(&[4])), "nothing here says that the peer is right");
        assert_eq!(disk.operations(), before);
    }
}
