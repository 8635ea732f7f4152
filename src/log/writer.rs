//! Appends records at the head of the log, in whole pages.
//!
//! The page at the head is kept in memory: every write begins with what that page holds already and
//! ends with zeros up to the next page, so that the kernel never has to read a page to change a
//! part of it, and what stood behind the head in a recycled segment is gone up to there.

use std::io::{self, IoSlice};
use std::sync::Arc;

use crate::io::{is_full, read_around};
use crate::log::record::{ALIGNMENT, HEADER_BYTES, Header, Kind, flags};
use crate::log::segment::{Segments, fits};
use crate::units::{BLOCK_BYTES, Chain, EpochId, LogTime, Lsn, VolumeNumber};

const PAGE: usize = BLOCK_BYTES as usize;
static ZEROS: [u8; PAGE] = [0; PAGE];

/// A record before it has its place.
pub struct Draft<'a> {
    /// What it is.
    pub kind: Kind,
    /// See [`flags`].
    pub flags: u16,
    /// The volume, or 0.
    pub volume: VolumeNumber,
    /// Number of the control record's kind, or 0.
    pub control_kind: u32,
    /// First byte in the volume.
    pub offset: u64,
    /// Bytes of the volume that it covers.
    pub length: u64,
    /// Its bytes.
    pub payload: &'a [u8],
    /// A CRC per piece of the payload.
    pub crcs: Vec<u32>,
}

/// What all records of one append carry.
#[derive(Clone, Copy, Debug)]
pub struct Stamp {
    /// The epoch.
    pub epoch: EpochId,
    /// Log time.
    pub time: LogTime,
    /// Durable here, as known now.
    pub durable: Lsn,
}

/// The head of a log.
pub struct Writer {
    segments: Arc<Segments>,
    head: Lsn,
    chain: Chain,
    requests: u64,
    /// What the page at the head holds, up to the head.
    tail: Vec<u8>,
}

/// One part of the bytes to be written.
#[derive(Clone, Copy)]
enum Part<'a> {
    Bytes(&'a [u8]),
    Zeros(usize),
}

/// What goes into one segment.
struct Run<'a> {
    number: u64,
    /// Where in the segment, a multiple of the page.
    offset: u64,
    parts: Vec<Part<'a>>,
    bytes: usize,
}

impl Writer {
    /// A writer at `head`, whose page is read back from the log.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn open(
        segments: Arc<Segments>,
        head: Lsn,
        chain: Chain,
        requests: u64,
    ) -> io::Result<Writer> {
        let mut tail = vec![0; (head.0 % BLOCK_BYTES) as usize];
        segments.read(Lsn(head.0 - tail.len() as u64), &mut tail)?;
        Ok(Writer { segments, head, chain, requests, tail })
    }

    /// The same where that page cannot be read: what stands there is zeros, and damage, which is
    /// to be told.
    ///
    /// # Errors
    ///
    /// Where there is no such segment.
    pub fn open_around(
        segments: Arc<Segments>,
        head: Lsn,
        chain: Chain,
        requests: u64,
    ) -> io::Result<Writer> {
        let mut tail = vec![0; (head.0 % BLOCK_BYTES) as usize];
        let at = Lsn(head.0 - tail.len() as u64);
        let number = at.segment_number(segments.segment_bytes());
        let segment = segments.get(number).ok_or(io::ErrorKind::NotFound)?;
        let offset = at.segment_offset(segments.segment_bytes());
        let _ = read_around(&*segment.file, &mut tail, offset);
        Ok(Writer { segments, head, chain, requests, tail })
    }

    /// Reads the page at the head again, after something before the head was repaired in it.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn read_tail(&mut self) -> io::Result<()> {
        let mut tail = vec![0; self.tail.len()];
        self.segments.read(Lsn(self.head.0 - tail.len() as u64), &mut tail)?;
        self.tail = tail;
        Ok(())
    }

    /// After the last record.
    #[must_use]
    pub fn head(&self) -> Lsn {
        self.head
    }

    /// Checksum of the last record.
    #[must_use]
    pub fn chain(&self) -> Chain {
        self.chain
    }

    /// Requests up to the head.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// Places and writes records, with pads where a segment ends; the headers of all of them, in
    /// order, pads included. On an error nothing is appended.
    ///
    /// # Errors
    ///
    /// What the disk says. Where it is full, nothing is behind the head; else any part may be.
    pub fn append(&mut self, drafts: Vec<Draft<'_>>, stamp: Stamp) -> io::Result<Vec<Header>> {
        let segment_bytes = self.segments.segment_bytes();
        let (mut at, mut chain, mut requests) = (self.head, self.chain, self.requests);
        let mut headers: Vec<Header> = Vec::with_capacity(drafts.len() + 1);
        let mut payloads: Vec<&[u8]> = Vec::with_capacity(drafts.len() + 1);
        let mut encoded = Vec::with_capacity(drafts.len() * (HEADER_BYTES + 16));
        let mut encoded_ends = Vec::with_capacity(drafts.len() + 1);
        for draft in drafts {
            let mut header = Header {
                kind: draft.kind as u8,
                version: 1,
                flags: draft.flags,
                payload_bytes: draft.payload.len() as u32,
                volume: draft.volume,
                control_kind: draft.control_kind,
                offset: draft.offset,
                length: draft.length,
                lsn: at,
                epoch: stamp.epoch,
                time: stamp.time,
                durable: stamp.durable,
                requests,
                chain,
                checksum: Chain(0),
                crcs: draft.crcs,
            };
            let room = segment_bytes - at.segment_offset(segment_bytes);
            if !fits(header.record_bytes(), room) {
                let mut pad = pad(at, room, stamp, requests, chain);
                pad.encode(&mut encoded);
                encoded_ends.push(encoded.len());
                (at, chain) = (pad.end(), pad.checksum);
                headers.push(pad);
                payloads.push(&[]);
                assert!(fits(header.record_bytes(), segment_bytes), "a record fits a segment");
            }
            requests += u64::from(header.flags & flags::LAST_OF_REQUEST != 0);
            (header.lsn, header.chain, header.requests) = (at, chain, requests);
            header.encode(&mut encoded);
            encoded_ends.push(encoded.len());
            (at, chain) = (header.end(), header.checksum);
            headers.push(header);
            payloads.push(draft.payload);
        }
        let mut parts = Vec::with_capacity(headers.len() * 3);
        let mut start = 0;
        for ((header, payload), end) in headers.iter().zip(payloads).zip(encoded_ends) {
            let head = &encoded[start..end];
            start = end;
            parts.push((header.lsn, Part::Bytes(head)));
            let behind = header.lsn.advance(head.len() as u64);
            if !payload.is_empty() {
                parts.push((behind, Part::Bytes(payload)));
            }
            let zeros = header.record_bytes() as usize - head.len() - payload.len();
            if zeros > 0 {
                parts.push((behind.advance(payload.len() as u64), Part::Zeros(zeros)));
            }
        }
        let tail = self.write(&parts, at)?;
        (self.head, self.chain, self.requests, self.tail) = (at, chain, requests, tail);
        Ok(headers)
    }

    /// Writes records that came ready-made from a peer: `bytes` starts at the head and ends with a
    /// record whose checksum is `chain` and whose count is `requests`.
    ///
    /// # Errors
    ///
    /// What the disk says; nothing is appended then.
    pub fn append_encoded(&mut self, bytes: &[u8], chain: Chain, requests: u64) -> io::Result<()> {
        let segment_bytes = self.segments.segment_bytes();
        let mut parts = Vec::new();
        let (mut at, mut rest) = (self.head, bytes);
        while !rest.is_empty() {
            let room = segment_bytes - at.segment_offset(segment_bytes);
            let (part, behind) = rest.split_at((room as usize).min(rest.len()));
            parts.push((at, Part::Bytes(part)));
            at = at.advance(part.len() as u64);
            rest = behind;
        }
        let tail = self.write(&parts, at)?;
        (self.head, self.chain, self.requests, self.tail) = (at, chain, requests, tail);
        Ok(())
    }

    /// Writes parts that stand one behind the other from the head to `end`; the new tail.
    fn write(&self, parts: &[(Lsn, Part<'_>)], end: Lsn) -> io::Result<Vec<u8>> {
        let segment_bytes = self.segments.segment_bytes();
        let mut runs: Vec<Run<'_>> = Vec::with_capacity(2);
        for (at, part) in parts {
            let number = at.segment_number(segment_bytes);
            if runs.last().is_none_or(|run| run.number != number) {
                let mut run = Run {
                    number,
                    offset: at.segment_offset(segment_bytes),
                    parts: Vec::with_capacity(parts.len() + 2),
                    bytes: 0,
                };
                if run.offset > 0 {
                    assert!(runs.is_empty(), "a later segment starts at its beginning");
                    run.offset -= self.tail.len() as u64;
                    run.push(Part::Bytes(&self.tail));
                }
                runs.push(run);
            }
            runs.last_mut().expect("pushed above").push(*part);
        }
        let mut tail = Vec::new();
        let run_count = runs.len();
        for index in 0..run_count {
            let run = &mut runs[index];
            let over = run.bytes % PAGE;
            if index + 1 == run_count {
                assert_eq!(over as u64, end.0 % BLOCK_BYTES, "the last run ends at the new head");
                tail = run.last_bytes(over);
            } else {
                assert_eq!(over, 0, "a segment is left at its end");
            }
            if over > 0 {
                run.push(Part::Zeros(PAGE - over));
            }
            let segment = self.segments.ensure(run.number);
            let written =
                segment.and_then(|segment| segment.file.write_at(&run.slices(), run.offset));
            if let Err(cause) = written {
                if is_full(&cause) {
                    self.take_back(&runs[..=index])?;
                }
                return Err(cause);
            }
        }
        Ok(tail)
    }

    /// The disk was full in the middle of a write. Whole records of it may be there, which a start
    /// would take for something that was lost: they are overwritten. Where there is no room for
    /// that either, nothing was written.
    fn take_back(&self, runs: &[Run<'_>]) -> io::Result<()> {
        for (index, run) in runs.iter().enumerate() {
            let Some(segment) = self.segments.get(run.number) else { continue };
            let kept: &[u8] = if index == 0 { &self.tail } else { &[] };
            let parts = vec![Part::Bytes(kept), Part::Zeros(run.bytes - kept.len())];
            let before = Run { parts, ..*run };
            match segment.file.write_at(&before.slices(), run.offset) {
                Err(cause) if !is_full(&cause) => return Err(cause),
                _ => {}
            }
        }
        Ok(())
    }
}

impl<'a> Run<'a> {
    fn push(&mut self, part: Part<'a>) {
        self.bytes += part.len();
        self.parts.push(part);
    }

    fn slices(&self) -> Vec<IoSlice<'_>> {
        let mut slices = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            match *part {
                Part::Bytes(bytes) => slices.push(IoSlice::new(bytes)),
                Part::Zeros(mut count) => {
                    while count > 0 {
                        let some = count.min(PAGE);
                        slices.push(IoSlice::new(&ZEROS[..some]));
                        count -= some;
                    }
                }
            }
        }
        slices
    }

    /// A copy of the last `count` bytes.
    fn last_bytes(&self, count: usize) -> Vec<u8> {
        let mut tail = vec![0; count];
        let mut missing = count;
        for part in self.parts.iter().rev() {
            if missing == 0 {
                break;
            }
            let some = part.len().min(missing);
            if let Part::Bytes(bytes) = part {
                tail[missing - some..missing].copy_from_slice(&bytes[bytes.len() - some..]);
            }
            missing -= some;
        }
        assert_eq!(missing, 0, "a run holds its last page");
        tail
    }
}

impl Part<'_> {
    fn len(&self) -> usize {
        match self {
            Part::Bytes(bytes) => bytes.len(),
            Part::Zeros(count) => *count,
        }
    }
}

/// The record that fills a segment of which `room` bytes are left.
fn pad(lsn: Lsn, room: u64, stamp: Stamp, requests: u64, chain: Chain) -> Header {
    assert!(room >= HEADER_BYTES as u64 && room.is_multiple_of(ALIGNMENT), "{room} bytes are left");
    Header {
        kind: Kind::Pad as u8,
        version: 1,
        flags: 0,
        payload_bytes: 0,
        volume: VolumeNumber(0),
        control_kind: 0,
        offset: 0,
        length: room,
        lsn,
        epoch: stamp.epoch,
        time: stamp.time,
        durable: stamp.durable,
        requests,
        chain,
        checksum: Chain(0),
        crcs: Vec::new(),
    }
}
