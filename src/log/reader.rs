//! Follows the chain of records through the segments, and says why it ended.

use std::io;
use std::sync::Arc;

use crate::io::read_around;
use crate::log::record::{HEADER_BYTES, Header, Kind, RecordError};
use crate::log::segment::{Segment, Segments, fits};
use crate::units::{Chain, EpochId, Lsn};

/// Bytes that a scan reads at least at a time.
const WINDOW_BYTES: usize = 128 << 10;

/// Why a scan found no further record.
#[derive(Debug, thiserror::Error)]
pub enum ScanEnd {
    /// The segment does not exist.
    #[error("no segment {0}")]
    NoSegment(u64),
    /// What stands there is no record.
    #[error("{0}")]
    Record(#[from] RecordError),
    /// A record stands there, but not the next one of this chain.
    #[error("record: it does not continue the chain")]
    Chain,
    /// The record would not leave its segment as the rules want it.
    #[error("record: it does not fit its segment")]
    Placement,
    /// The header is whole, the payload, or the zeros behind it, are not.
    #[error("record: payload checksum differs")]
    Payload(Box<Header>),
    /// The disk could not read.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A position in a scan: the next record and what it must continue.
pub struct Scanner<'a> {
    segments: &'a Segments,
    at: Lsn,
    chain: Chain,
    segment: Option<Arc<Segment>>,
    window: Vec<u8>,
    window_at: Lsn,
    /// What is read does not stay in the cache.
    once: bool,
    /// Before it no more is read than what is asked for: something behind cannot be read.
    narrow_to: Lsn,
    /// The record here, where its header could be read and its payload could not.
    unread: Option<Header>,
    /// Where the last record's payload lies in `window`.
    payload: std::ops::Range<usize>,
}

impl<'a> Scanner<'a> {
    /// A scan that expects a record at `at` that continues `chain`.
    #[must_use]
    pub fn new(segments: &'a Segments, at: Lsn, chain: Chain) -> Scanner<'a> {
        Scanner {
            segments,
            at,
            chain,
            segment: None,
            window: Vec::new(),
            window_at: at,
            once: false,
            narrow_to: Lsn::ZERO,
            unread: None,
            payload: 0..0,
        }
    }

    /// The same, of which no trace stays in the cache: for who checks a log.
    #[must_use]
    pub fn once(mut self) -> Scanner<'a> {
        self.once = true;
        self
    }

    /// Where the next record is expected.
    #[must_use]
    pub fn at(&self) -> Lsn {
        self.at
    }

    /// What the next record must continue.
    #[must_use]
    pub fn chain(&self) -> Chain {
        self.chain
    }

    /// The record at which the scan stands, where its header is whole and the disk could not read
    /// its payload.
    #[must_use]
    pub fn unread(&self) -> Option<&Header> {
        self.unread.as_ref()
    }

    /// The payload of the last record, where [`Scanner::next`] was asked for it.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.window[self.payload.clone()]
    }

    /// The next record. The payload of control records is always read and checked, that of others
    /// where `payloads` says so.
    ///
    /// # Errors
    ///
    /// Why the chain ends here; the scan stays where it is.
    pub fn next(&mut self, payloads: bool) -> Result<Header, ScanEnd> {
        self.unread = None;
        let segment_bytes = self.segments.segment_bytes();
        let room = segment_bytes - self.at.segment_offset(segment_bytes);
        self.fill(HEADER_BYTES as u64, room)?;
        let header = match Header::decode(self.bytes()) {
            Err(RecordError::Short { needed }) if needed as u64 <= room => {
                self.fill(needed as u64, room)?;
                Header::decode(self.bytes())?
            }
            other => other?,
        };
        if !header.follows(self.at, self.chain) {
            return Err(ScanEnd::Chain);
        }
        let record_bytes = header.record_bytes();
        let pad = header.kind == Kind::Pad as u8;
        if (pad && record_bytes != room) || (!pad && !fits(record_bytes, room)) {
            return Err(ScanEnd::Placement);
        }
        self.payload = 0..0;
        if header.payload_bytes > 0 && (payloads || header.kind == Kind::Control as u8) {
            let header_bytes = header.header_bytes();
            if let Err(end) = self.fill(record_bytes, room) {
                self.unread = Some(header).filter(|_| matches!(end, ScanEnd::Io(_)));
                return Err(end);
            }
            let start = (self.at.bytes_since(self.window_at) + header_bytes) as usize;
            self.payload = start..start + header.payload_bytes as usize;
            if !header.body_is_whole(&self.window[start..start + header.body_bytes() as usize]) {
                return Err(ScanEnd::Payload(Box::new(header)));
            }
        }
        self.at = header.end();
        self.chain = header.checksum;
        Ok(header)
    }

    /// Goes on elsewhere: behind what an index has told.
    pub fn go_to(&mut self, at: Lsn, chain: Chain) {
        (self.at, self.chain, self.payload) = (at, chain, 0..0);
        self.window.clear();
        self.window_at = at;
    }

    /// Steps over a record whose payload is damaged: its header is whole, so the chain goes on.
    pub fn step_over(&mut self, header: &Header) {
        assert_eq!(header.lsn, self.at, "only the record that the scan stopped at is stepped over");
        self.at = header.end();
        self.chain = header.checksum;
    }

    fn bytes(&self) -> &[u8] {
        &self.window[self.at.bytes_since(self.window_at) as usize..]
    }

    /// Has at least `bytes` from `at` in the window; `room` is what the segment has left.
    fn fill(&mut self, bytes: u64, room: u64) -> Result<(), ScanEnd> {
        if bytes > room {
            return Err(ScanEnd::Placement);
        }
        let have = (self.window_at.0 + self.window.len() as u64).saturating_sub(self.at.0);
        if self.at >= self.window_at && have >= bytes {
            return Ok(());
        }
        let segment_bytes = self.segments.segment_bytes();
        let number = self.at.segment_number(segment_bytes);
        if self.segment.as_ref().is_none_or(|segment| segment.number != number) {
            self.segment = Some(self.segments.get(number).ok_or(ScanEnd::NoSegment(number))?);
        }
        let segment = self.segment.as_ref().expect("set above");
        let offset = self.at.segment_offset(segment_bytes);
        self.window_at = self.at;
        let ahead = bytes.max(WINDOW_BYTES as u64).min(room);
        let wanted = if self.at < self.narrow_to { bytes } else { ahead };
        let mut result = read(segment, &mut self.window, wanted, offset, self.once);
        if result.is_err() && wanted > bytes {
            // Nobody has asked for what is behind.
            self.narrow_to = self.at.advance(wanted);
            result = read(segment, &mut self.window, bytes, offset, self.once);
        }
        Ok(result.inspect_err(|_| self.window.clear())?)
    }
}

fn read(
    segment: &Segment,
    window: &mut Vec<u8>,
    bytes: u64,
    offset: u64,
    once: bool,
) -> io::Result<()> {
    window.resize(bytes as usize, 0);
    if once { segment.file.read_once(window, offset) } else { segment.file.read_at(window, offset) }
}

/// What stands behind the end of a chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Remains {
    /// End of the last whole record that stands at its own position, where there is one.
    pub last_end: Option<Lsn>,
    /// The highest `durable` that such a record tells of this node's disk.
    pub durable: Lsn,
}

/// Looks at every place where a record could start in `[from, end of segment)` for records that
/// stand at their own position: what was written behind a gap. `elsewhere` says of a reign that
/// another node's disk is meant by what its records call durable. Beside it what the disk said of
/// the places that could not be read, if there were any.
///
/// # Errors
///
/// Where the file's length cannot be told.
pub fn remains(
    segments: &Segments,
    number: u64,
    from: Lsn,
    elsewhere: impl Fn(EpochId) -> bool,
) -> io::Result<(Remains, Option<io::Error>)> {
    let segment_bytes = segments.segment_bytes();
    let (mut found, mut unread) = (Remains::default(), None);
    let Some(segment) = segments.get(number) else { return Ok((found, None)) };
    let file_bytes = segment.file.len()?.min(segment_bytes);
    let start = number * segment_bytes;
    let mut offset = from.0.max(start) - start;
    let mut window = Vec::new();
    let overlap = crate::log::record::HEADER_AND_CRCS_BYTES_MAX as u64;
    while offset < file_bytes {
        let count = (file_bytes - offset).min(1 << 20);
        window.resize(count as usize, 0);
        let failed = read_around(&*segment.file, &mut window, offset);
        unread = unread.or(failed.map(|failed| failed.cause));
        let last_window = offset + count == file_bytes;
        let until = if last_window { count } else { count - overlap };
        let mut place = 0;
        while place < until {
            let bytes = &window[place as usize..];
            if bytes.starts_with(&crate::log::record::MAGIC)
                && let Ok(header) = Header::decode(bytes)
                && header.lsn.0 == start + offset + place
            {
                found.last_end = found.last_end.max(Some(header.end()));
                // No writer calls durable what it has not written yet: it is a host's bytes.
                if header.durable <= header.lsn && !elsewhere(header.epoch) {
                    found.durable = found.durable.max(header.durable);
                }
            }
            place += 8;
        }
        if last_window {
            break;
        }
        offset += until;
    }
    Ok((found, unread))
}
