//! What folds kept for one old position, its *moment*: the blocks that they have overwritten in the
//! base since, as they were at that position.
//!
//! `blocks` holds blocks of 4096 bytes, one behind the other, in slots. `index` says what they are.
//! It is a row of sections, one per fold that passed the moment, each written and synced after the
//! slots that it names, and before that fold writes to the base. The last whole section tells up to
//! which target nothing is missing. All integers are little-endian. A section:
//!
//! | offset | size | field | meaning |
//! | ---: | ---: | --- | --- |
//! | 0 | 4 | `magic` | `TLM1` |
//! | 4 | 4 | `version` | 1 |
//! | 8 | 8 | `moment` | the position whose blocks these are |
//! | 16 | 8 | `target` | the fold's: nothing is missing while the base is no further |
//! | 24 | 8 | `entries` | how many follow |
//! | 32 | 8 | `checksum` | xxh3-64 of the 32 bytes before and of the entries |
//! | 40 | 32 × `entries` | | the entries |
//!
//! An entry:
//!
//! | offset | size | field | meaning |
//! | ---: | ---: | --- | --- |
//! | 0 | 4 | `kind` | 1: a block; 2: blocks that were zeros; 3: the birth of a chunk |
//! | 4 | 4 | `volume` | the volume's number |
//! | 8 | 8 | `place` | number of the (first) block of 4 KiB; of a chunk of 1 MiB |
//! | 16 | 8 | `value` | the slot in `blocks`; how many blocks; LSN of the chunk's last record |
//! | 24 | 4 | `crc` | CRC-32 of the block; else 0 |
//! | 28 | 4 | | zero |

use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::{Arc, Mutex};

use xxhash_rust::xxh3::Xxh3Default;

use crate::io::{Disk, DiskFile, OpenMode};
use crate::units::{BLOCK_BYTES, Lsn, VolumeNumber};

const BLOCKS: &str = "blocks";
const INDEX: &str = "index";
const MAGIC: [u8; 4] = *b"TLM1";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 40;
const CHECKSUM_OFFSET: usize = 32;
const ENTRY_BYTES: usize = 32;

const BLOCK: u32 = 1;
const ZEROS: u32 = 2;
const BIRTH: u32 = 3;

/// One thing that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// A block.
    Block {
        /// The volume.
        volume: VolumeNumber,
        /// The number of the block.
        block: u64,
        /// Where it lies in `blocks`, in blocks.
        slot: u64,
        /// CRC-32 of its bytes.
        crc: u32,
    },
    /// Blocks that were zeros.
    Zeros {
        /// The volume.
        volume: VolumeNumber,
        /// The number of the first block.
        block: u64,
        /// How many.
        blocks: u64,
    },
    /// When a chunk had changed last.
    Birth {
        /// The volume.
        volume: VolumeNumber,
        /// The number of the chunk.
        chunk: u64,
        /// LSN of the last record in it; zero where there was none.
        birth: Lsn,
    },
}

impl Kept {
    fn encode(&self) -> [u8; ENTRY_BYTES] {
        let (kind, volume, place, value, crc) = match *self {
            Kept::Block { volume, block, slot, crc } => (BLOCK, volume, block, slot, crc),
            Kept::Zeros { volume, block, blocks } => (ZEROS, volume, block, blocks, 0),
            Kept::Birth { volume, chunk, birth } => (BIRTH, volume, chunk, birth.0, 0),
        };
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&volume.0.to_le_bytes());
        bytes[8..16].copy_from_slice(&place.to_le_bytes());
        bytes[16..24].copy_from_slice(&value.to_le_bytes());
        bytes[24..28].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Kept> {
        let volume = VolumeNumber(u32_at(bytes, 4));
        let (place, value) = (u64_at(bytes, 8), u64_at(bytes, 16));
        // Nothing lies further than the largest volume, and counts cannot overflow then.
        if place > 1 << 48 || value > Lsn::MAX.0 {
            return None;
        }
        Some(match u32_at(bytes, 0) {
            BLOCK if value <= 1 << 48 => {
                Kept::Block { volume, block: place, slot: value, crc: u32_at(bytes, 24) }
            }
            ZEROS if value <= 1 << 48 => Kept::Zeros { volume, block: place, blocks: value },
            BIRTH if place <= 1 << 40 => Kept::Birth { volume, chunk: place, birth: Lsn(value) },
            _ => return None,
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn checksum(header: &[u8], entries: &[u8]) -> u64 {
    let mut hasher = Xxh3Default::new();
    hasher.update(&header[..CHECKSUM_OFFSET]);
    hasher.update(entries);
    hasher.digest()
}

/// The bytes of a section.
fn encode_section(moment: Lsn, target: Lsn, kept: &[Kept]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + kept.len() * ENTRY_BYTES);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&moment.0.to_le_bytes());
    bytes.extend_from_slice(&target.0.to_le_bytes());
    bytes.extend_from_slice(&(kept.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&[0; 8]);
    for entry in kept {
        bytes.extend_from_slice(&entry.encode());
    }
    let sum = checksum(&bytes[..HEADER_BYTES], &bytes[HEADER_BYTES..]);
    bytes[CHECKSUM_OFFSET..HEADER_BYTES].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// The overlay of a moment, open.
pub struct Overlay {
    moment: Lsn,
    blocks: Arc<dyn DiskFile>,
    index: Arc<dyn DiskFile>,
    ends: Mutex<Ends>,
}

/// Where the files of an overlay ended.
#[derive(Clone, Copy)]
pub struct Mark(Ends);

/// Where the files go on.
#[derive(Clone, Copy, Default)]
struct Ends {
    index_bytes: u64,
    /// Slots that a section names.
    slots: u64,
    /// Slots that were written, those not named yet included.
    written: u64,
    /// Bytes may stand behind the last section, which count no more.
    cut_due: bool,
}

/// What an index says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Index {
    /// The target of the last whole section; zero where there is none.
    pub complete_to: Lsn,
    /// All that is kept.
    pub kept: Vec<Kept>,
}

impl Overlay {
    /// Makes the files of an overlay in `dir`, empty; their names are durable when the caller has
    /// synced it.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn create(disk: &dyn Disk, dir: &Path, moment: Lsn) -> io::Result<Overlay> {
        let blocks = disk.open(&dir.join(BLOCKS), OpenMode::Create)?;
        let index = disk.open(&dir.join(INDEX), OpenMode::Create)?;
        blocks.set_len(0)?;
        index.set_len(0)?;
        Ok(Overlay { moment, blocks, index, ends: Mutex::default() })
    }

    /// Opens the overlay in `dir` with what it says of folds to `up_to` at most. Sections of later
    /// folds were never relied on, and the history that they come from may be another by now. What
    /// is not whole counts as missing, which `complete_to` tells.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn open(
        disk: &dyn Disk,
        dir: &Path,
        moment: Lsn,
        up_to: Lsn,
    ) -> io::Result<(Overlay, Index)> {
        let blocks = disk.open(&dir.join(BLOCKS), OpenMode::ReadWrite)?;
        let index = disk.open(&dir.join(INDEX), OpenMode::ReadWrite)?;
        let bytes = index.len()?;
        let mut found = Index::default();
        let mut ends = Ends::default();
        while let Some((target, kept)) = read_section(&*index, ends.index_bytes, bytes, moment)? {
            if target <= found.complete_to || target > up_to {
                break;
            }
            found.complete_to = target;
            for entry in &kept {
                if let Kept::Block { slot, .. } = entry {
                    ends.slots = ends.slots.max(slot + 1);
                }
            }
            ends.index_bytes += (HEADER_BYTES + kept.len() * ENTRY_BYTES) as u64;
            found.kept.extend(kept);
        }
        ends.written = ends.slots;
        ends.cut_due = true;
        Ok((Overlay { moment, blocks, index, ends: Mutex::new(ends) }, found))
    }

    /// The file of blocks: a slot is at its number times 4096.
    #[must_use]
    pub fn blocks(&self) -> &Arc<dyn DiskFile> {
        &self.blocks
    }

    /// Bytes that both files take.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let ends = self.ends.lock().expect("no holder panics");
        ends.index_bytes + ends.written * BLOCK_BYTES
    }

    /// Writes whole blocks to fresh slots; the first of them. They count with [`Overlay::commit`].
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn write(&self, data: &[u8]) -> io::Result<u64> {
        assert!((data.len() as u64).is_multiple_of(BLOCK_BYTES), "{} bytes", data.len());
        let mut ends = self.ends.lock().expect("no holder panics");
        let first = ends.written;
        self.blocks.write_at(&[IoSlice::new(data)], first * BLOCK_BYTES)?;
        ends.written += data.len() as u64 / BLOCK_BYTES;
        Ok(first)
    }

    /// Gives up the slots that were written since the last [`Overlay::commit`].
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn roll_back(&self) -> io::Result<()> {
        let mut ends = self.ends.lock().expect("no holder panics");
        ends.written = ends.slots;
        self.blocks.set_len(ends.slots * BLOCK_BYTES)?;
        self.index.set_len(ends.index_bytes)
    }

    /// Where the files end now.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark(*self.ends.lock().expect("no holder panics"))
    }

    /// Takes back all that was committed since `mark`, where nobody relies on it. What cannot be
    /// cut off at once is before the next [`Overlay::commit`].
    pub fn return_to(&self, mark: Mark) {
        let mut ends = self.ends.lock().expect("no holder panics");
        *ends = Ends { written: mark.0.slots, cut_due: true, ..mark.0 };
        // Their failure costs space until then.
        let _ = self.blocks.set_len(ends.slots * BLOCK_BYTES);
        let _ = self.index.set_len(ends.index_bytes);
    }

    /// Gives the space back, also where somebody has the files open; for an overlay that nobody
    /// reads any more.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn give_back(&self) -> io::Result<()> {
        self.index.set_len(0)?;
        self.blocks.set_len(0)
    }

    /// Notes what is kept for a fold to `target`; durable on return, but for the files' names.
    ///
    /// # Errors
    ///
    /// What the disk says; nothing may be relied on then, and the files are written no more where
    /// it was a sync.
    pub fn commit(&self, target: Lsn, kept: &[Kept]) -> io::Result<()> {
        let mut ends = self.ends.lock().expect("no holder panics");
        if ends.written > ends.slots {
            self.blocks.sync()?;
        }
        let section = encode_section(self.moment, target, kept);
        if ends.cut_due {
            self.index.set_len(ends.index_bytes)?;
        }
        ends.cut_due = true;
        self.index.write_at(&[IoSlice::new(&section)], ends.index_bytes)?;
        self.index.sync()?;
        ends.index_bytes += section.len() as u64;
        ends.slots = ends.written;
        ends.cut_due = false;
        Ok(())
    }
}

/// Target and entries of the section at `at`; `None` where no whole one stands there.
fn read_section(
    index: &dyn DiskFile,
    at: u64,
    file_bytes: u64,
    moment: Lsn,
) -> io::Result<Option<(Lsn, Vec<Kept>)>> {
    let Some(room) = file_bytes.checked_sub(at + HEADER_BYTES as u64) else { return Ok(None) };
    let mut header = [0; HEADER_BYTES];
    index.read_at(&mut header, at)?;
    let count = u64_at(&header, 24);
    let known = header[..4] == MAGIC && u32_at(&header, 4) == VERSION;
    if !known || u64_at(&header, 8) != moment.0 || count > room / ENTRY_BYTES as u64 {
        return Ok(None);
    }
    let mut bytes = vec![0; count as usize * ENTRY_BYTES];
    index.read_at(&mut bytes, at + HEADER_BYTES as u64)?;
    if checksum(&header, &bytes) != u64_at(&header, CHECKSUM_OFFSET) {
        return Ok(None);
    }
    let kept: Option<Vec<Kept>> = bytes.chunks_exact(ENTRY_BYTES).map(Kept::decode).collect();
    Ok(kept.map(|kept| (Lsn(u64_at(&header, 16)), kept)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::MemoryDisk;

    const VOLUME: VolumeNumber = VolumeNumber(7);

    fn some() -> [Kept; 3] {
        [
            Kept::Block { volume: VOLUME, block: 0x1234, slot: 5, crc: 0xaabb_ccdd },
            Kept::Zeros { volume: VOLUME, block: 0x2000, blocks: 256 },
            Kept::Birth { volume: VOLUME, chunk: 0x12, birth: Lsn(0x0900) },
        ]
    }

    #[test]
    fn a_section_is_these_bytes() {
        let golden = hex::decode(concat!(
            "544c4d31",         // magic: TLM1
            "01000000",         // version: 1
            "0010000000000000", // moment: 4096
            "0030000000000000", // target: 12288
            "0300000000000000", // entries: 3
            "0629031b955ca142", // checksum
            "01000000",         // kind: a block
            "07000000",         // volume: 7
            "3412000000000000", // place: block 0x1234
            "0500000000000000", // value: slot 5
            "ddccbbaa",         // crc
            "00000000",         // zero
            "02000000",         // kind: zeros
            "07000000",         // volume
            "0020000000000000", // place: block 0x2000
            "0001000000000000", // value: 256 blocks
            "00000000",         // crc
            "00000000",         // zero
            "03000000",         // kind: a birth
            "07000000",         // volume
            "1200000000000000", // place: chunk 0x12
            "0009000000000000", // value: LSN 0x900
            "00000000",         // crc
            "00000000",         // zero
        ))
        .unwrap();
        let bytes = encode_section(Lsn(4096), Lsn(12288), &some());
        assert_eq!(hex::encode(&bytes), hex::encode(golden));
    }

    fn disk() -> (MemoryDisk, &'static Path) {
        let disk = MemoryDisk::new();
        disk.create_dir(Path::new("/moment")).unwrap();
        (disk, Path::new("/moment"))
    }

    #[test]
    fn every_changed_byte_and_every_cut_ends_what_is_complete() {
        let (disk, dir) = disk();
        let overlay = Overlay::create(&disk, dir, Lsn(4096)).unwrap();
        overlay.write(&[1; 6 * 4096]).unwrap();
        overlay.commit(Lsn(8192), &some()).unwrap();
        overlay.commit(Lsn(12288), &some()[2..]).unwrap();
        let section = (HEADER_BYTES + 3 * ENTRY_BYTES) as u64;
        let found = |disk: &MemoryDisk, moment: u64, up_to: u64| {
            Overlay::open(disk, dir, Lsn(moment), Lsn(up_to)).unwrap().1
        };
        let whole = found(&disk, 4096, 12288);
        assert_eq!((whole.complete_to, whole.kept.len()), (Lsn(12288), 4));
        let relied_on = found(&disk, 4096, 12287);
        assert_eq!((relied_on.complete_to, relied_on.kept), (Lsn(8192), some().to_vec()));
        assert_eq!(found(&disk, 4104, 12288), Index::default(), "another moment");
        for byte in 0..section + (HEADER_BYTES + ENTRY_BYTES) as u64 {
            let expected = if byte < section { Lsn::ZERO } else { Lsn(8192) };
            let wrong = disk.snapshot();
            wrong.damage(&dir.join(INDEX), byte, 1, 0x04);
            assert_eq!(found(&wrong, 4096, 12288).complete_to, expected, "byte {byte}");
            let short = disk.snapshot();
            short.open(&dir.join(INDEX), OpenMode::ReadWrite).unwrap().set_len(byte).unwrap();
            assert_eq!(found(&short, 4096, 12288).complete_to, expected, "cut at {byte}");
        }
    }

    #[test]
    fn what_was_not_committed_is_written_over() {
        let (disk, dir) = disk();
        let overlay = Overlay::create(&disk, dir, Lsn(4096)).unwrap();
        assert_eq!(overlay.write(&[1; 4096]).unwrap(), 0);
        let kept = [Kept::Block { volume: VOLUME, block: 0, slot: 0, crc: 1 }];
        overlay.commit(Lsn(8192), &kept).unwrap();
        assert_eq!(overlay.write(&[2; 8192]).unwrap(), 1);
        let (again, _) = Overlay::open(&disk, dir, Lsn(4096), Lsn(8192)).unwrap();
        assert_eq!(again.write(&[3; 4096]).unwrap(), 1);
        overlay.roll_back().unwrap();
        assert_eq!(overlay.write(&[3; 4096]).unwrap(), 1);
        assert_eq!(overlay.bytes(), 2 * 4096 + (HEADER_BYTES + ENTRY_BYTES) as u64);
    }
}
