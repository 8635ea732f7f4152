//! The index of a segment: the headers of its records without their payloads, so that the map can
//! be rebuilt without reading the data.
//!
//! It is a cache, never proof: written after its segment was synced, believed only below the
//! durable mark, checked header by header along the chain, and rebuilt from the segment at any
//! time. All integers are little-endian. Behind the fixed part stand the headers with their CRC
//! lists as they are in the log, each control record's followed by its payload and zeros up to a
//! multiple of 8.
//!
//! | offset | size | field | meaning |
//! | ---: | ---: | --- | --- |
//! | 0 | 8 | `magic` | `TIDEINDX` |
//! | 8 | 4 | `version` | 1 |
//! | 12 | 4 | `records` | number of records |
//! | 16 | 8 | `first` | LSN of the segment's first byte |
//! | 24 | 8 | `first_chain` | the chain there |
//! | 32 | 8 | `end` | LSN after the last record: the end of the segment |
//! | 40 | 8 | `end_chain` | the chain there |
//! | 48 | 8 | `body_bytes` | bytes of what follows the fixed part |
//! | 56 | 8 | `body_checksum` | xxh3-64 of what follows the fixed part |
//! | 64 | 8 | `checksum` | xxh3-64 of the 64 bytes before |

use std::mem::offset_of;

use xxhash_rust::xxh3::xxh3_64;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::log::record::{ALIGNMENT, HEADER_BYTES, Header, Kind};
use crate::units::{Chain, Lsn};

const MAGIC: [u8; 8] = *b"TIDEINDX";
const VERSION: u32 = 1;
/// Bytes of the fixed part.
pub const INDEX_HEADER_BYTES: usize = 72;
const CHECKSUM_OFFSET: usize = 64;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawIndex {
    magic: [u8; 8],
    version: U32,
    records: U32,
    first: U64,
    first_chain: U64,
    end: U64,
    end_chain: U64,
    body_bytes: U64,
    body_checksum: U64,
    checksum: U64,
}

const _: () = {
    assert!(size_of::<RawIndex>() == INDEX_HEADER_BYTES);
    assert!(offset_of!(RawIndex, records) == 12);
    assert!(offset_of!(RawIndex, first) == 16);
    assert!(offset_of!(RawIndex, first_chain) == 24);
    assert!(offset_of!(RawIndex, end) == 32);
    assert!(offset_of!(RawIndex, end_chain) == 40);
    assert!(offset_of!(RawIndex, body_bytes) == 48);
    assert!(offset_of!(RawIndex, body_checksum) == 56);
    assert!(offset_of!(RawIndex, checksum) == CHECKSUM_OFFSET);
};

/// An index that is being made, record by record.
pub struct IndexBuilder {
    first: Lsn,
    first_chain: Chain,
    end: Lsn,
    end_chain: Chain,
    records: u32,
    body: Vec<u8>,
}

impl IndexBuilder {
    /// An index of the segment that begins at `first`, behind a record of checksum `chain`.
    #[must_use]
    pub fn new(first: Lsn, chain: Chain) -> IndexBuilder {
        IndexBuilder {
            first,
            first_chain: chain,
            end: first,
            end_chain: chain,
            records: 0,
            body: Vec::new(),
        }
    }

    /// Adds the next record.
    pub fn push(&mut self, header: &Header, payload: &[u8]) {
        assert!(header.follows(self.end, self.end_chain), "{} follows {}", header.lsn, self.end);
        header.clone().encode(&mut self.body);
        if header.kind == Kind::Control as u8 {
            self.body.extend_from_slice(payload);
            self.body.resize(self.body.len().next_multiple_of(ALIGNMENT as usize), 0);
        }
        (self.end, self.end_chain) = (header.end(), header.checksum);
        self.records += 1;
    }

    /// The bytes of the file.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        let mut raw = RawIndex {
            magic: MAGIC,
            version: VERSION.into(),
            records: self.records.into(),
            first: self.first.0.into(),
            first_chain: self.first_chain.0.into(),
            end: self.end.0.into(),
            end_chain: self.end_chain.0.into(),
            body_bytes: (self.body.len() as u64).into(),
            body_checksum: xxh3_64(&self.body).into(),
            checksum: 0.into(),
        };
        raw.checksum = xxh3_64(&raw.as_bytes()[..CHECKSUM_OFFSET]).into();
        let mut bytes = raw.as_bytes().to_vec();
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// A whole index, read back.
pub struct Index {
    body: Vec<u8>,
    records: u32,
    /// LSN after the last record.
    pub end: Lsn,
    /// The chain there.
    pub end_chain: Chain,
}

/// What an index says of one record.
pub struct Indexed {
    /// The record's header.
    pub header: Header,
    /// The payload of a control record; else nothing.
    pub payload: Vec<u8>,
}

impl Index {
    /// Reads an index of the segment that begins at `first` behind `chain`; `None` where it is of
    /// something else, damaged, or of another version.
    #[must_use]
    pub fn decode(bytes: &[u8], first: Lsn, chain: Chain) -> Option<Index> {
        let (raw, body) = RawIndex::ref_from_prefix(bytes).ok()?;
        let whole = raw.magic == MAGIC
            && raw.version.get() == VERSION
            && raw.checksum.get() == xxh3_64(&raw.as_bytes()[..CHECKSUM_OFFSET])
            && raw.body_bytes.get() == body.len() as u64
            && raw.body_checksum.get() == xxh3_64(body);
        let fits = raw.first.get() == first.0
            && raw.first_chain.get() == chain.0
            && (first.0..=Lsn::MAX.0).contains(&raw.end.get());
        (whole && fits).then(|| Index {
            body: body.to_vec(),
            records: raw.records.get(),
            end: Lsn(raw.end.get()),
            end_chain: Chain(raw.end_chain.get()),
        })
    }

    /// The records in order; `None` where they are not one chain from `first` to the end.
    #[must_use]
    pub fn records(&self, first: Lsn, chain: Chain) -> Option<Vec<Indexed>> {
        let mut records =
            Vec::with_capacity((self.records as usize).min(self.body.len() / HEADER_BYTES));
        let (mut at, mut chain, mut rest) = (first, chain, &self.body[..]);
        while !rest.is_empty() {
            let header = Header::decode(rest).ok()?;
            if !header.follows(at, chain) {
                return None;
            }
            rest = rest.get(header.header_bytes() as usize..)?;
            let mut payload = Vec::new();
            if header.kind == Kind::Control as u8 {
                let bytes = header.payload_bytes as usize;
                payload = rest.get(..bytes)?.to_vec();
                if !header.payload_is_whole(&payload) {
                    return None;
                }
                rest = rest.get(bytes.next_multiple_of(ALIGNMENT as usize)..)?;
            }
            (at, chain) = (header.end(), header.checksum);
            records.push(Indexed { header, payload });
        }
        let whole = (at, chain, records.len()) == (self.end, self.end_chain, self.records as usize);
        whole.then_some(records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::record::{flags, payload_crcs};
    use crate::units::{EpochId, LogTime, VolumeNumber};

    const FIRST: Lsn = Lsn(131_072);
    const CHAIN: Chain = Chain(77);

    fn golden() -> Vec<u8> {
        hex::decode(concat!(
            // magic
            "54494445494e4458",
            // version
            "01000000",
            // records
            "02000000",
            // first
            "0000020000000000",
            // first_chain
            "4d00000000000000",
            // end
            "0000030000000000",
            // end_chain: checksum of the pad
            "555079b15871a79e",
            // body_bytes
            "d000000000000000",
            // body_checksum
            "f52eb679bb91fe60",
            // checksum
            "94dd9348b8232e2b",
            // header of the control record, with its CRC list
            "544c5231060109006800000007000000000000006300000000000000000000000000000000000000",
            "00000200000000000500000000000000060000000000000000000000000000000300000000000000",
            "4d00000000000000e1cacd674d08079c5c59eb3b00000000",
            // its payload, padded
            "7b2278223a317d00",
            // header of the pad
            "544c52310501000060000000000000000000000000000000000000000000000090ff000000000000",
            "70000200000000000500000000000000060000000000000000000000000000000300000000000000",
            "e1cacd674d08079c555079b15871a79e",
        ))
        .unwrap()
    }

    fn record(kind: Kind, lsn: Lsn, chain: Chain, length: u64, payload: &[u8]) -> Header {
        let control = kind == Kind::Control;
        let mut header = Header {
            kind: kind as u8,
            version: 1,
            flags: if control { flags::LAST_OF_REQUEST | flags::MAY_SKIP } else { 0 },
            payload_bytes: payload.len() as u32,
            volume: VolumeNumber(0),
            control_kind: if control { 99 } else { 0 },
            offset: 0,
            length,
            lsn,
            epoch: EpochId(5),
            time: LogTime(6),
            durable: Lsn(0),
            requests: 3,
            chain,
            checksum: Chain(0),
            crcs: payload_crcs(0, payload),
        };
        header.encode(&mut Vec::new());
        header
    }

    #[test]
    fn the_bytes_of_an_index_are_these_and_read_back() {
        let body = br#"{"x":1}"#;
        let control = record(Kind::Control, FIRST, CHAIN, 0, body);
        let pad =
            record(Kind::Pad, control.end(), control.checksum, 65536 - control.record_bytes(), &[]);
        let mut builder = IndexBuilder::new(FIRST, CHAIN);
        builder.push(&control, body);
        builder.push(&pad, &[]);
        let bytes = builder.finish();
        assert_eq!(hex::encode(&bytes), hex::encode(golden()));
        let index = Index::decode(&bytes, FIRST, CHAIN).unwrap();
        assert_eq!(index.end, FIRST.advance(65536));
        let records = index.records(FIRST, CHAIN).unwrap();
        assert_eq!(records[0].header, control);
        assert_eq!(records[0].payload, body);
        assert_eq!(records[1].header, pad);
        assert!(Index::decode(&bytes, FIRST, Chain(78)).is_none(), "of another history");
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(Index::decode(&changed, FIRST, CHAIN).is_none(), "bit {bit}");
        }
    }
}
