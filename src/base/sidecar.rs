//! The format of a volume's sidecar, `VOLUME.sum`.
//!
//! All integers are little-endian. The file is a header page and then one region per 256 MiB of the
//! volume, each a page of slots (one per chunk of 1 MiB) and the sums of its blocks (one per 4
//! KiB):
//!
//! | offset | size | field | meaning |
//! | ---: | ---: | --- | --- |
//! | 0 | 4 | `magic` | `TLS1` |
//! | 4 | 4 | `version` | 1 |
//! | 8 | 4 | `volume` | the volume's number |
//! | 12 | 4 | `checksum` | CRC-32 of the twelve bytes before |
//! | 16 | 4080 | | zeros |
//! | 4096 + *r* × 266240 | 4096 | | region *r*: 256 slots of 16 bytes |
//! | … + 4096 | 262144 | | region *r*: 65536 sums of 4 bytes |
//!
//! A sum is the CRC-32 of the block, exclusive or that of a block of zeros: a hole in the volume
//! has a hole in its sidecar. A slot:
//!
//! | offset | size | field | meaning |
//! | ---: | ---: | --- | --- |
//! | 0 | 8 | `birth` | LSN of the last record folded in; top bit: not zeros, but their sum |
//! | 8 | 4 | `sums_checksum` | CRC-32 of the chunk's 1024 bytes of sums |
//! | 12 | 4 | `checksum` | CRC-32 of the twelve bytes before and of the chunk's number as 8 bytes |
//!
//! A slot of zeros is that of a chunk that nothing was ever folded into, not even zeros.

use crate::units::{BLOCK_BYTES, CHUNK_BYTES, Lsn, VolumeNumber};

/// Bytes of the header page.
pub const HEADER_BYTES: u64 = 4096;
/// Blocks, and so sums, of a chunk.
pub const BLOCKS_PER_CHUNK: usize = (CHUNK_BYTES / BLOCK_BYTES) as usize;
/// Bytes of a chunk's sums.
pub const SUMS_BYTES: usize = BLOCKS_PER_CHUNK * 4;
/// Chunks of a region.
pub const CHUNKS_PER_REGION: u64 = 256;
/// Bytes of a slot.
pub const SLOT_BYTES: usize = 16;
/// Bytes of a region's slots.
pub const SLOTS_BYTES: u64 = CHUNKS_PER_REGION * SLOT_BYTES as u64;
/// Bytes of a region.
pub const REGION_BYTES: u64 = SLOTS_BYTES + CHUNKS_PER_REGION * SUMS_BYTES as u64;
/// CRC-32 of 4096 zeros.
pub const ZERO_BLOCK_CRC: u32 = 0xc71c_0011;
/// CRC-32 of the sums of a chunk of zeros, which are 1024 zeros.
pub const ZERO_SUMS_CRC: u32 = 0xefb5_af2e;

/// What stands for a sum that the disk lost: of a block of zeros it is no sum either, and says that
/// a fold left it damaged.
pub const LOST_SUM: [u8; 4] = [0xff; 4];
/// What stands for a slot of sums that are lost: its checksum is wrong.
pub const LOST_SLOT: [u8; SLOT_BYTES] = [0xff; SLOT_BYTES];

const MAGIC: [u8; 4] = *b"TLS1";
const VERSION: u32 = 1;
const COLLISION: u64 = 1 << 63;

const _: () = assert!(SLOTS_BYTES == 4096, "the slots of a region are one page");
const _: () = assert!(REGION_BYTES == 266_240, "the table above says so");

/// Where a chunk's slot lies in the file.
pub fn slot_offset(chunk: u64) -> u64 {
    HEADER_BYTES
        + chunk / CHUNKS_PER_REGION * REGION_BYTES
        + chunk % CHUNKS_PER_REGION * SLOT_BYTES as u64
}

/// Where a block's sum lies in the file. The sums of one region are contiguous.
pub fn sum_offset(block: u64) -> u64 {
    let chunk = block / BLOCKS_PER_CHUNK as u64;
    let in_region = block % (CHUNKS_PER_REGION * BLOCKS_PER_CHUNK as u64);
    HEADER_BYTES + chunk / CHUNKS_PER_REGION * REGION_BYTES + SLOTS_BYTES + in_region * 4
}

/// Bytes of the sidecar of a volume.
pub fn file_bytes(size_bytes: u64) -> u64 {
    let regions = size_bytes.div_ceil(CHUNK_BYTES * CHUNKS_PER_REGION);
    HEADER_BYTES + regions * REGION_BYTES
}

/// The first bytes of the file.
pub fn encode_header(volume: VolumeNumber) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..8].copy_from_slice(&VERSION.to_le_bytes());
    bytes[8..12].copy_from_slice(&volume.0.to_le_bytes());
    let checksum = crc32fast::hash(&bytes[..12]);
    bytes[12..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// Whether the header is whole; one that is not is rot, and is written anew: all of it follows from
/// the volume's number. An error where it is whole and another one's.
pub fn is_header_whole(bytes: &[u8; 16], volume: VolumeNumber) -> Result<bool, String> {
    if crc32fast::hash(&bytes[..12]).to_le_bytes() != bytes[12..] {
        return Ok(false);
    }
    if bytes[..4] != MAGIC {
        return Err(format!("magic: got {:?}, expected {MAGIC:?}", &bytes[..4]));
    }
    if bytes[4..8] != VERSION.to_le_bytes() {
        return Err(format!("version: got {:?}, expected {VERSION}", &bytes[4..8]));
    }
    if bytes[8..12] != volume.0.to_le_bytes() {
        return Err(format!("volume: got {:?}, expected {volume}", &bytes[8..12]));
    }
    Ok(true)
}

/// What the sidecar says of a chunk as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// LSN of the last record folded into the chunk; zero where none was.
    pub birth: Lsn,
    /// A block of the chunk has the sum of zeros but is not zeros, so that a sum of zero does not
    /// say "hole" in it.
    pub collision: bool,
    /// CRC-32 of the chunk's sums; zero where nothing was folded.
    pub sums_checksum: u32,
}

/// A slot whose checksum is wrong: torn, or damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadSlot;

impl Slot {
    /// The slot's bytes.
    pub fn encode(&self, chunk: u64) -> [u8; SLOT_BYTES] {
        if *self == Slot::default() {
            return [0; SLOT_BYTES];
        }
        let mut bytes = [0; SLOT_BYTES];
        let birth = self.birth.0 | if self.collision { COLLISION } else { 0 };
        bytes[..8].copy_from_slice(&birth.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.sums_checksum.to_le_bytes());
        let checksum = slot_checksum(&bytes, chunk);
        bytes[12..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads a slot.
    pub fn decode(bytes: &[u8; SLOT_BYTES], chunk: u64) -> Result<Slot, BadSlot> {
        if *bytes == [0; SLOT_BYTES] {
            return Ok(Slot::default());
        }
        if slot_checksum(bytes, chunk).to_le_bytes() != bytes[12..] {
            return Err(BadSlot);
        }
        let birth = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
        Ok(Slot {
            birth: Lsn(birth & !COLLISION),
            collision: birth & COLLISION != 0,
            sums_checksum: u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes")),
        })
    }

    /// Whether anything was ever folded into the chunk.
    pub fn is_written(&self) -> bool {
        *self != Slot::default()
    }

    /// Whether all of the chunk is zeros, as far as the slot tells.
    pub fn is_zeros(&self) -> bool {
        !self.is_written() || (!self.collision && self.sums_checksum == ZERO_SUMS_CRC)
    }

    /// Whether these are the sums that the slot was written with.
    pub fn covers(&self, sums: &[u8]) -> bool {
        if self.is_written() {
            crc32fast::hash(sums) == self.sums_checksum
        } else {
            sums.iter().all(|byte| *byte == 0)
        }
    }
}

fn slot_checksum(bytes: &[u8; SLOT_BYTES], chunk: u64) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..12]);
    hasher.update(&chunk.to_le_bytes());
    hasher.finalize()
}

/// The sum that is stored for a block with this CRC; never [`LOST_SUM`].
pub fn stored_sum(crc: u32) -> u32 {
    match crc ^ ZERO_BLOCK_CRC {
        u32::MAX => u32::MAX - 1,
        sum => sum,
    }
}

/// The CRC of a block with this sum; of a block that is well it may differ in the last bit.
pub fn crc_of(sum: u32) -> u32 {
    sum ^ ZERO_BLOCK_CRC
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_block_has_the_sum_of_a_lost_one() {
        assert_ne!(stored_sum(!ZERO_BLOCK_CRC).to_le_bytes(), LOST_SUM);
        assert_eq!(stored_sum(ZERO_BLOCK_CRC), 0);
    }

    #[test]
    fn the_header_is_these_bytes() {
        let bytes = encode_header(VolumeNumber(7));
        let golden = [
            0x54, 0x4c, 0x53, 0x31, // magic: TLS1
            0x01, 0x00, 0x00, 0x00, // version: 1
            0x07, 0x00, 0x00, 0x00, // volume: 7
            0xc9, 0xfd, 0xee, 0xa2, // checksum
        ];
        assert_eq!(bytes, golden);
        assert_eq!(is_header_whole(&bytes, VolumeNumber(7)), Ok(true));
        assert!(is_header_whole(&bytes, VolumeNumber(8)).unwrap_err().contains("volume"));
        for byte in 0..16 {
            let mut wrong = bytes;
            wrong[byte] ^= 0x10;
            assert_eq!(is_header_whole(&wrong, VolumeNumber(7)), Ok(false), "byte {byte}");
        }
    }

    #[test]
    fn a_slot_is_these_bytes() {
        let slot = Slot { birth: Lsn(0x1234_5678), collision: true, sums_checksum: 0xaabb_ccdd };
        let golden = [
            0x78, 0x56, 0x34, 0x12, 0x00, 0x00, 0x00, 0x80, // birth, top bit: collision
            0xdd, 0xcc, 0xbb, 0xaa, // sums_checksum
            0x11, 0x5b, 0x82, 0xe3, // checksum, with chunk 300
        ];
        assert_eq!(slot.encode(300), golden);
        assert_eq!(Slot::decode(&golden, 300), Ok(slot));
        assert_eq!(Slot::decode(&golden, 301), Err(BadSlot), "another chunk's slot");
        for byte in 0..16 {
            let mut wrong = golden;
            wrong[byte] ^= 0x01;
            assert_eq!(Slot::decode(&wrong, 300), Err(BadSlot), "byte {byte}");
        }
        assert_eq!(Slot::decode(&[0; 16], 5), Ok(Slot::default()), "never written");
    }

    #[test]
    fn slots_and_sums_lie_where_the_table_says() {
        assert_eq!(ZERO_BLOCK_CRC, crc32fast::hash(&[0; 4096]));
        assert_eq!(slot_offset(0), 4096);
        assert_eq!(slot_offset(255), 4096 + 255 * 16);
        assert_eq!(slot_offset(256), 4096 + 266_240);
        assert_eq!(sum_offset(0), 8192);
        assert_eq!(sum_offset(65_535), 8192 + 65_535 * 4);
        assert_eq!(sum_offset(65_536), 8192 + 266_240);
        assert_eq!(file_bytes(0), 4096);
        assert_eq!(file_bytes(1), 4096 + 266_240);
        assert_eq!(file_bytes((256 << 20) + 4096), 4096 + 2 * 266_240);
    }
}
