//! The record: the format of the log, which is also the wire and the history.
//!
//! All integers are little-endian. A record starts on a multiple of 8 bytes, never spans two
//! segments, and is laid out as header, CRC list, payload, zeros up to a multiple of 8:
//!
//! | offset | size | field | meaning |
//! | ---: | ---: | --- | --- |
//! | 0 | 4 | `magic` | `TLR1` |
//! | 4 | 1 | `kind` | [`Kind`] |
//! | 5 | 1 | `version` | of the kind; 1 |
//! | 6 | 2 | `flags` | [`flags`] |
//! | 8 | 4 | `header_bytes` | header and CRC list, rounded up to 8 |
//! | 12 | 4 | `payload_bytes` | without the padding; at most 1 MiB; a pad has none |
//! | 16 | 4 | `volume` | the volume's number; 0 for flush marks, pads and control records |
//! | 20 | 4 | `control_kind` | of a control record, see [`crate::log::control`]; else 0 |
//! | 24 | 8 | `offset` | first byte in the volume; 0 where `volume` is 0 |
//! | 32 | 8 | `length` | bytes of the volume that it covers; of a pad, its whole size in the log |
//! | 40 | 8 | `lsn` | its own position |
//! | 48 | 8 | `epoch` | the random id of its epoch |
//! | 56 | 8 | `time` | log time, nanoseconds since 1970 |
//! | 64 | 8 | `durable` | the author's durable LSN when it was written |
//! | 72 | 8 | `requests` | requests in the log that end at or before the end of this record |
//! | 80 | 8 | `chain` | `checksum` of the record before; of the first, [`genesis`] |
//! | 88 | 8 | `checksum` | xxh3-64 of header and CRC list, with this field zero |
//! | 96 | 4 × n | CRC list | CRC-32 of each piece of payload in an aligned 4 KiB of the volume |
//!
//! `requests` makes the lag in operations a subtraction. The author's `durable` tells damage from a
//! torn tail: what a later record calls durable cannot have been torn.

use std::mem::offset_of;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::units::{BLOCK_BYTES, Chain, EpochId, GroupId, LogTime, Lsn, VolumeNumber};

/// Opens every record.
pub const MAGIC: [u8; 4] = *b"TLR1";
/// Bytes of the fixed header.
pub const HEADER_BYTES: usize = 96;
/// Bytes of payload that one record may carry.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// Every record starts on a multiple of this.
pub const ALIGNMENT: u64 = 8;
/// Bytes of header and CRC list at most: 1 MiB of payload touches 257 blocks.
pub const HEADER_AND_CRCS_BYTES_MAX: usize = (HEADER_BYTES + 257 * 4).next_multiple_of(8);
/// Bytes of a whole record at most (a pad can be longer).
pub const RECORD_BYTES_MAX: usize = HEADER_AND_CRCS_BYTES_MAX + PAYLOAD_BYTES_MAX;

/// What a record is. The numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Bytes of a volume.
    Write = 1,
    /// A range of a volume that reads as zeros.
    Zero = 2,
    /// A range of a volume that its host no longer needs; reads as zeros.
    Trim = 3,
    /// A host's flush that covers new bytes.
    FlushMark = 4,
    /// Fills a segment up to its end.
    Pad = 5,
    /// What the nodes of a group agree on: JSON of the kind in `control_kind`.
    Control = 6,
}

impl Kind {
    /// The kind of a stored number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Kind> {
        [Kind::Write, Kind::Zero, Kind::Trim, Kind::FlushMark, Kind::Pad, Kind::Control]
            .into_iter()
            .find(|kind| *kind as u8 == number)
    }
}

/// The bits of a record's `flags`.
pub mod flags {
    /// The request that this record belongs to ends here.
    pub const LAST_OF_REQUEST: u16 = 1 << 0;
    /// The host asked for this request to be durable when answered.
    pub const FUA: u16 = 1 << 1;
    /// A node that does not know the kind stores and forwards it, and shows no image past it.
    pub const MUST_UNDERSTAND: u16 = 1 << 2;
    /// A node that does not know the kind stores, forwards and folds it along.
    pub const MAY_SKIP: u16 = 1 << 3;
    /// The zeros of this record stay allocated (`NBD_CMD_FLAG_NO_HOLE`).
    pub const NO_HOLE: u16 = 1 << 4;
}

/// The bytes of a header on disk and wire.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    kind: u8,
    version: u8,
    flags: U16,
    header_bytes: U32,
    payload_bytes: U32,
    volume: U32,
    control_kind: U32,
    offset: U64,
    length: U64,
    lsn: U64,
    epoch: U64,
    time: U64,
    durable: U64,
    requests: U64,
    chain: U64,
    checksum: U64,
}

// The table above, tied to the code.
const _: () = {
    assert!(size_of::<RawHeader>() == HEADER_BYTES);
    assert!(offset_of!(RawHeader, kind) == 4);
    assert!(offset_of!(RawHeader, flags) == 6);
    assert!(offset_of!(RawHeader, header_bytes) == 8);
    assert!(offset_of!(RawHeader, payload_bytes) == 12);
    assert!(offset_of!(RawHeader, volume) == 16);
    assert!(offset_of!(RawHeader, control_kind) == 20);
    assert!(offset_of!(RawHeader, offset) == 24);
    assert!(offset_of!(RawHeader, length) == 32);
    assert!(offset_of!(RawHeader, lsn) == 40);
    assert!(offset_of!(RawHeader, epoch) == 48);
    assert!(offset_of!(RawHeader, time) == 56);
    assert!(offset_of!(RawHeader, durable) == 64);
    assert!(offset_of!(RawHeader, requests) == 72);
    assert!(offset_of!(RawHeader, chain) == 80);
    assert!(offset_of!(RawHeader, checksum) == CHECKSUM_OFFSET);
};

const CHECKSUM_OFFSET: usize = 88;

/// A header, decoded. `kind` is the stored number, since a record of a later version is kept too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The stored number of the kind, see [`Header::known_kind`].
    pub kind: u8,
    /// Version of the kind.
    pub version: u8,
    /// See [`flags`].
    pub flags: u16,
    /// Bytes of payload, without padding.
    pub payload_bytes: u32,
    /// The volume, or 0.
    pub volume: VolumeNumber,
    /// Number of the control record's kind, or 0.
    pub control_kind: u32,
    /// First byte in the volume.
    pub offset: u64,
    /// Bytes of the volume that it covers; of a pad, its whole size in the log.
    pub length: u64,
    /// Its own position.
    pub lsn: Lsn,
    /// Its epoch.
    pub epoch: EpochId,
    /// Log time.
    pub time: LogTime,
    /// The author's durable LSN when it was written.
    pub durable: Lsn,
    /// Requests in the log that end at or before the end of this record.
    pub requests: u64,
    /// Checksum of the record before.
    pub chain: Chain,
    /// Checksum of this header and its CRC list; set by [`Header::encode`].
    pub checksum: Chain,
    /// CRC-32 of each piece of the payload, see [`pieces`].
    pub crcs: Vec<u32>,
}

impl Header {
    /// The kind, where this version knows it.
    #[must_use]
    pub fn known_kind(&self) -> Option<Kind> {
        if self.version == 1 { Kind::from_number(self.kind) } else { None }
    }

    /// Bytes of header and CRC list.
    #[must_use]
    pub fn header_bytes(&self) -> u64 {
        header_bytes(self.crcs.len()) as u64
    }

    /// Bytes that the whole record takes in the log.
    #[must_use]
    pub fn record_bytes(&self) -> u64 {
        if self.kind == Kind::Pad as u8 {
            self.length
        } else {
            self.header_bytes() + self.body_bytes()
        }
    }

    /// Position after the record.
    #[must_use]
    pub fn end(&self) -> Lsn {
        self.lsn.advance(self.record_bytes())
    }

    /// Position of the payload's first byte.
    #[must_use]
    pub fn payload_lsn(&self) -> Lsn {
        self.lsn.advance(self.header_bytes())
    }

    /// Whether a request ends with this record.
    #[must_use]
    pub fn is_last_of_request(&self) -> bool {
        self.flags & flags::LAST_OF_REQUEST != 0
    }

    /// Appends header and CRC list to `out` and sets `checksum`.
    ///
    /// # Panics
    ///
    /// Where the CRC list does not fit the payload: a bug of the caller.
    pub fn encode(&mut self, out: &mut Vec<u8>) {
        assert_eq!(
            self.crcs.len(),
            piece_count(self.offset, u64::from(self.payload_bytes)),
            "a CRC for each piece of {} bytes at {}",
            self.payload_bytes,
            self.offset
        );
        let start = out.len();
        let header_bytes = header_bytes(self.crcs.len());
        let raw = RawHeader {
            magic: MAGIC,
            kind: self.kind,
            version: self.version,
            flags: self.flags.into(),
            header_bytes: (header_bytes as u32).into(),
            payload_bytes: self.payload_bytes.into(),
            volume: self.volume.0.into(),
            control_kind: self.control_kind.into(),
            offset: self.offset.into(),
            length: self.length.into(),
            lsn: self.lsn.0.into(),
            epoch: self.epoch.0.into(),
            time: self.time.0.into(),
            durable: self.durable.0.into(),
            requests: self.requests.into(),
            chain: self.chain.0.into(),
            checksum: 0.into(),
        };
        out.extend_from_slice(raw.as_bytes());
        for crc in &self.crcs {
            out.extend_from_slice(&crc.to_le_bytes());
        }
        out.resize(start + header_bytes, 0);
        let checksum = xxh3_64(&out[start..]);
        out[start + CHECKSUM_OFFSET..start + CHECKSUM_OFFSET + 8]
            .copy_from_slice(&checksum.to_le_bytes());
        self.checksum = Chain(checksum);
    }

    /// Decodes the header and CRC list at the start of `bytes`, which may hold more behind them.
    /// Checks magic, sizes, alignment and checksum; whether the record stands where it says, and
    /// follows the one before, is [`Header::follows`].
    ///
    /// # Errors
    ///
    /// [`RecordError::Short`] says how many bytes are needed; anything else ends the chain here.
    pub fn decode(bytes: &[u8]) -> Result<Header, RecordError> {
        let Ok((raw, _)) = RawHeader::ref_from_prefix(bytes) else {
            return Err(RecordError::Short { needed: HEADER_BYTES });
        };
        if raw.magic != MAGIC {
            return Err(RecordError::Magic);
        }
        let header_size = raw.header_bytes.get() as usize;
        let payload_size = u64::from(raw.payload_bytes.get());
        if payload_size > PAYLOAD_BYTES_MAX as u64 {
            return Err(RecordError::Field("payload_bytes"));
        }
        let crc_count = piece_count(raw.offset.get(), payload_size);
        if header_size != header_bytes(crc_count) {
            return Err(RecordError::Field("header_bytes"));
        }
        if bytes.len() < header_size {
            return Err(RecordError::Short { needed: header_size });
        }
        let mut hasher = Xxh3::new();
        hasher.update(&bytes[..CHECKSUM_OFFSET]);
        hasher.update(&[0; 8]);
        hasher.update(&bytes[CHECKSUM_OFFSET + 8..header_size]);
        if hasher.digest() != raw.checksum.get() {
            return Err(RecordError::Checksum);
        }
        let lsn = raw.lsn.get();
        let pad = raw.kind == Kind::Pad as u8;
        let fits = |bytes: u64| bytes <= Lsn::MAX.0 && lsn <= Lsn::MAX.0 - bytes;
        if !lsn.is_multiple_of(ALIGNMENT) || !fits(RECORD_BYTES_MAX as u64) {
            return Err(RecordError::Field("lsn"));
        }
        if raw.offset.get().checked_add(raw.length.get()).is_none_or(|end| end > Lsn::MAX.0) {
            return Err(RecordError::Field("length"));
        }
        let pad_is_whole = raw.length.get() >= HEADER_BYTES as u64
            && raw.length.get().is_multiple_of(ALIGNMENT)
            && fits(raw.length.get());
        if pad && (payload_size != 0 || !pad_is_whole) {
            return Err(RecordError::Field("length"));
        }
        if raw.kind == Kind::Write as u8 && raw.length.get() != payload_size {
            return Err(RecordError::Field("length"));
        }
        Ok(Header {
            kind: raw.kind,
            version: raw.version,
            flags: raw.flags.get(),
            payload_bytes: raw.payload_bytes.get(),
            volume: VolumeNumber(raw.volume.get()),
            control_kind: raw.control_kind.get(),
            offset: raw.offset.get(),
            length: raw.length.get(),
            lsn: Lsn(lsn),
            epoch: EpochId(raw.epoch.get()),
            time: LogTime(raw.time.get()),
            durable: Lsn(raw.durable.get()),
            requests: raw.requests.get(),
            chain: Chain(raw.chain.get()),
            checksum: Chain(raw.checksum.get()),
            crcs: bytes[HEADER_BYTES..HEADER_BYTES + crc_count * 4]
                .as_chunks::<4>()
                .0
                .iter()
                .map(|crc| u32::from_le_bytes(*crc))
                .collect(),
        })
    }

    /// Whether this record stands at `lsn` and continues `chain`. In a recycled segment valid
    /// records of an earlier cut can stand behind a torn tail; only the chain tells them apart.
    #[must_use]
    pub fn follows(&self, lsn: Lsn, chain: Chain) -> bool {
        self.lsn == lsn && self.chain == chain
    }

    /// Bytes behind header and CRC list: the payload, and zeros up to a multiple of 8.
    #[must_use]
    pub fn body_bytes(&self) -> u64 {
        u64::from(self.payload_bytes).next_multiple_of(ALIGNMENT)
    }

    /// Checks all that stands behind the CRC list of a record that is no pad: the payload by its
    /// CRCs, the padding by being zeros. `body` is exactly [`Header::body_bytes`] long.
    #[must_use]
    pub fn body_is_whole(&self, body: &[u8]) -> bool {
        body.len() as u64 == self.body_bytes()
            && self.payload_is_whole(&body[..self.payload_bytes as usize])
            && body[self.payload_bytes as usize..].iter().all(|byte| *byte == 0)
    }

    /// Checks the payload against the CRC list. `payload` is exactly `payload_bytes` long.
    #[must_use]
    pub fn payload_is_whole(&self, payload: &[u8]) -> bool {
        payload.len() == self.payload_bytes as usize
            && pieces(self.offset, payload).zip(&self.crcs).all(|(piece, crc)| crc32(piece) == *crc)
    }
}

/// The chain before the first record of a group's log.
#[must_use]
pub fn genesis(group: GroupId) -> Chain {
    Chain(xxh3_64(&group.0))
}

/// CRC-32 (IEEE 802.3) of a piece of payload.
#[must_use]
pub fn crc32(piece: &[u8]) -> u32 {
    crc32fast::hash(piece)
}

/// CRC-32 of two pieces, one behind the other, from those of each and the bytes of the second.
#[must_use]
pub fn crc32_joined(first: u32, second: u32, second_bytes: u64) -> u32 {
    let mut joined = crc32fast::Hasher::new_with_initial(first);
    joined.combine(&crc32fast::Hasher::new_with_initial_len(second, second_bytes));
    joined.finalize()
}

/// CRCs of the payload of a record at `offset`.
#[must_use]
pub fn payload_crcs(offset: u64, payload: &[u8]) -> Vec<u32> {
    pieces(offset, payload).map(crc32).collect()
}

/// The pieces of a payload at `offset` of its volume: the parts that lie in one aligned 4 KiB.
pub fn pieces(offset: u64, payload: &[u8]) -> impl Iterator<Item = &[u8]> {
    let head =
        ((BLOCK_BYTES - offset % BLOCK_BYTES) as usize % BLOCK_BYTES as usize).min(payload.len());
    let (first, rest) = payload.split_at(head);
    std::iter::once(first)
        .filter(|piece| !piece.is_empty())
        .chain(rest.chunks(BLOCK_BYTES as usize))
}

/// How many aligned blocks `[offset, offset + bytes)` touches.
#[must_use]
pub fn piece_count(offset: u64, bytes: u64) -> usize {
    if bytes == 0 {
        return 0;
    }
    ((offset % BLOCK_BYTES + bytes).div_ceil(BLOCK_BYTES)) as usize
}

/// Bytes of a header with `crc_count` CRCs.
#[must_use]
pub const fn header_bytes(crc_count: usize) -> usize {
    (HEADER_BYTES + crc_count * 4).next_multiple_of(ALIGNMENT as usize)
}

/// Why bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// More bytes are needed to tell.
    #[error("record: cut short: at least {needed} bytes are needed")]
    Short {
        /// Bytes from the record's start that are needed for the next step.
        needed: usize,
    },
    /// Nothing was written here, or something else.
    #[error("record: no magic")]
    Magic,
    /// A field has a value that no writer gives it.
    #[error("record: `{0}` has an impossible value")]
    Field(&'static str),
    /// The header or its CRC list is damaged.
    #[error("record: header checksum differs")]
    Checksum,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden() -> Vec<u8> {
        hex::decode(concat!(
            // magic
            "544c5231",
            // kind: write
            "01",
            // version
            "01",
            // flags: last of request, FUA
            "0300",
            // header_bytes
            "68000000",
            // payload_bytes
            "10000000",
            // volume
            "07000000",
            // control_kind
            "00000000",
            // offset
            "f80f000000000000",
            // length
            "1000000000000000",
            // lsn
            "0807060504030201",
            // epoch
            "1817161514131211",
            // time
            "6f5e4d3c2b7a9818",
            // durable
            "0000060504030201",
            // requests
            "2a00000000000000",
            // chain
            "2827262524232221",
            // checksum: xxh3-64 with this field zero
            "4029a5ddc7a4fcc1",
            // CRC of the piece up to byte 4096
            "4ae508b2",
            // CRC of the piece behind it
            "cdb0315f",
        ))
        .unwrap()
    }

    #[test]
    fn the_bytes_of_a_record_are_these() {
        let mut header = Header {
            kind: Kind::Write as u8,
            version: 1,
            flags: flags::LAST_OF_REQUEST | flags::FUA,
            payload_bytes: 16,
            volume: VolumeNumber(7),
            control_kind: 0,
            offset: 4088,
            length: 16,
            lsn: Lsn(0x0102_0304_0506_0708),
            epoch: EpochId(0x1112_1314_1516_1718),
            time: LogTime(0x1898_7a2b_3c4d_5e6f),
            durable: Lsn(0x0102_0304_0506_0000),
            requests: 42,
            chain: Chain(0x2122_2324_2526_2728),
            checksum: Chain(0),
            crcs: payload_crcs(4088, b"tidelog golden!!"),
        };
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        assert_eq!(hex::encode(&bytes), hex::encode(golden()));
        assert_eq!(Header::decode(&bytes).unwrap(), header);
        assert!(header.payload_is_whole(b"tidelog golden!!"));
        assert!(!header.payload_is_whole(b"tidelog golden!?"));
    }

    #[test]
    fn every_changed_bit_and_every_cut_is_noticed() {
        let whole = golden();
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bytes).is_err(), "bit {bit}");
        }
        for length in 0..whole.len() {
            let cut = Header::decode(&whole[..length]);
            assert!(matches!(cut, Err(RecordError::Short { .. })), "{length} bytes: {cut:?}");
        }
    }
}
