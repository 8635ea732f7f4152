//! Reads: look up under the lock, fetch outside of it, check every checksum, and look again where
//! the map changed underneath.
//!
//! An address says where bytes are: a position in the log, in a branch's own segments, or, from
//! [`KEPT`] on, a slot of the moment that a view is at. What a view has in the base may be kept for
//! it while it reads there: it looks a second time, and reads again what is kept by then. Since a
//! fold shows what it keeps before it writes to the base, nothing newer gets out.

use std::io;
use std::sync::Arc;

use super::content::Content;
use super::engine::{Core, Group};
use super::merging::Merging;
use super::moment::{KEPT, Moment};
use super::ranges::Cover;
use super::scrub::DamagedPart;
use super::{Extent, GroupError, Read, View, Volume};
use crate::base::{BaseError, BaseRead, BaseVolume, read_batch};
use crate::extent_map::{Piece, Source};
use crate::io::{BatchRead, DiskFile};
use crate::log::record::crc32;
use crate::log::segment::{Segment, Segments};
use crate::units::{BLOCK_BYTES, CHUNK_BYTES, Lsn, SECTOR_BYTES, VolumeNumber};

/// Where maps are looked up: the live group, or an image.
pub(super) trait Lookup {
    /// Runs `look` on the content, under its lock.
    fn with_content(&self, look: &mut dyn FnMut(&Content));

    /// What folds kept for it, where it is at an old position.
    fn moment(&self) -> Option<Arc<Moment>> {
        None
    }

    /// The segments of its own, and the position from which on they count: those of a branch.
    fn branch(&self) -> Option<(Lsn, &Segments)> {
        None
    }
}

/// Why bytes could not be had.
enum Trouble {
    /// The segment has been folded meanwhile.
    Moved,
    /// Bytes and checksum of the log differ.
    Checksum(Lsn),
    /// The base says so; perhaps only because the folder was at work there.
    Base(BaseError),
    /// The disk cannot read; where in the log, if it is there.
    Io(Option<Lsn>, io::Error),
}

/// A read from a segment, or of a kept block.
struct LogRead<'b> {
    file: Arc<dyn DiskFile>,
    /// Not used again while it is read.
    _segment: Option<Arc<Segment>>,
    offset: u64,
    lsn: Lsn,
    /// The index of the read that it belongs to.
    owner: usize,
    target: Target<'b>,
}

/// Where an address lies.
struct At {
    file: Arc<dyn DiskFile>,
    /// The segment, where it is one.
    segment: Option<Arc<Segment>>,
    offset: u64,
}

/// A read from the base.
struct FromBase<'b> {
    base: Arc<BaseVolume>,
    offset: u64,
    owner: usize,
    buffer: &'b mut [u8],
}

enum Target<'b> {
    /// Whole pieces that follow each other, straight to where they belong; length and CRC of each.
    Direct { buffer: &'b mut [u8], pieces: Vec<(usize, u32)> },
    /// One piece of which a part is wanted.
    Part { whole: Vec<u8>, skip: usize, buffer: &'b mut [u8], crc: u32 },
}

impl Target<'_> {
    fn buffer(&mut self) -> &mut [u8] {
        match self {
            Target::Direct { buffer, .. } => buffer,
            Target::Part { whole, .. } => whole,
        }
    }

    /// Checks what was read, and puts a part where it belongs.
    fn finish(self) -> bool {
        match self {
            Target::Direct { buffer, pieces } => {
                let mut rest = &buffer[..];
                pieces.into_iter().all(|(bytes, crc)| {
                    let (piece, behind) = rest.split_at(bytes);
                    rest = behind;
                    crc32(piece) == crc
                })
            }
            Target::Part { whole, skip, buffer, crc } => {
                let good = crc32(&whole) == crc;
                buffer.copy_from_slice(&whole[skip..skip + buffer.len()]);
                good
            }
        }
    }
}

/// One range to fetch, with what the map says about it.
pub(super) struct Fetch<'b> {
    /// The volume.
    pub volume: VolumeNumber,
    /// What the map says, in order, without gaps.
    pub pieces: Vec<Piece>,
    /// As long as the pieces together.
    pub buffer: &'b mut [u8],
}

impl Group {
    /// Looks up and reads until each read has its bytes or a real error.
    pub(super) fn read_through(&self, lookup: &dyn Lookup, reads: &mut [Read<'_>]) {
        let mut open: Vec<usize> = (0..reads.len()).collect();
        let mut before: Vec<Option<Vec<Piece>>> = vec![None; reads.len()];
        let mut gate = None;
        while !open.is_empty() {
            let mut found: Vec<Result<Vec<Piece>, GroupError>> = Vec::with_capacity(open.len());
            lookup.with_content(&mut |content| {
                let moment = lookup.moment();
                for index in &open {
                    let read = &reads[*index];
                    let (offset, bytes) = (read.offset, read.buffer.len() as u64);
                    let moment = moment.as_deref();
                    found.push(self.look_up(content, moment, read.volume, offset, bytes));
                }
            });
            let mut fetches = Vec::with_capacity(open.len());
            let mut fetched = Vec::with_capacity(open.len());
            let mut found = found.into_iter();
            for (index, read) in reads.iter_mut().enumerate() {
                if !open.contains(&index) {
                    continue;
                }
                match found.next().expect("one per open read") {
                    Ok(pieces) => {
                        fetched.push((index, pieces.clone()));
                        fetches.push(Fetch { volume: read.volume, pieces, buffer: read.buffer });
                        read.result = Ok(());
                    }
                    Err(error) => read.result = Err(error),
                }
            }
            let troubles = self.fetch(lookup, fetches);
            open.clear();
            let moment = lookup.moment();
            for ((index, pieces), trouble) in fetched.into_iter().zip(troubles) {
                let Some(trouble) = trouble else {
                    let volume = reads[index].volume;
                    if is_kept_now(moment.as_deref(), volume, &pieces) {
                        open.push(index);
                    }
                    continue;
                };
                // The same place twice, and still wrong: no fold was in the way.
                let settled = before[index].as_ref() == Some(&pieces);
                match trouble {
                    // Maps forget before segments leave: the same place twice is nobody's any more.
                    // It is in a branch where a cut failed half-way.
                    Trouble::Moved if settled && gate.is_some() => {
                        let gone = || self.damaged("log: its segment is gone".to_owned());
                        reads[index].result =
                            Err(self.failed_error(&self.lock()).err().unwrap_or_else(gone));
                    }
                    Trouble::Moved => open.push(index),
                    Trouble::Checksum(lsn) if settled => {
                        self.suspect_record(lookup, lsn);
                        reads[index].result = Err(self.damaged(wrong_checksum(lsn)));
                    }
                    Trouble::Base(cause) if settled && gate.is_some() => {
                        self.suspect_block(&cause);
                        reads[index].result = Err(self.damaged(cause.to_string()));
                    }
                    Trouble::Io(lsn, cause) if settled => {
                        if let Some(lsn) = lsn {
                            self.suspect_record(lookup, lsn);
                        }
                        reads[index].result = Err(self.io("read", &cause));
                    }
                    Trouble::Checksum(_) | Trouble::Base(_) | Trouble::Io(..) => open.push(index),
                }
                before[index] = Some(pieces);
            }
            if !open.is_empty() && gate.is_none() {
                gate = Some(self.base_gate.read().expect("no holder panics"));
            }
        }
    }

    fn look_up(
        &self,
        content: &Content,
        moment: Option<&Moment>,
        volume: VolumeNumber,
        offset: u64,
        length: u64,
    ) -> Result<Vec<Piece>, GroupError> {
        self.look_up_some(content, moment, volume, (offset, length), usize::MAX)
    }

    /// The pieces of a range of any alignment, in order, without gaps; at most `limit`, so that
    /// the answer may end early.
    pub(super) fn look_up_some(
        &self,
        content: &Content,
        moment: Option<&Moment>,
        volume: VolumeNumber,
        (offset, length): (u64, u64),
        limit: usize,
    ) -> Result<Vec<Piece>, GroupError> {
        if let Some(target) = content.base_ahead {
            return Err(self.base_is_ahead(target));
        }
        let known = content.volumes.get(&volume).ok_or_else(|| self.no_volume(volume))?;
        let end = offset.checked_add(length);
        let Some(end) = end.filter(|end| *end <= known.volume.size_bytes) else {
            return Err(GroupError::OutOfRange { group: self.name().clone(), offset, length });
        };
        let mut pieces = Vec::new();
        if length == 0 {
            return Ok(pieces);
        }
        // The map knows sectors: what it says of those at the edges is cut to what was asked for.
        let begin = offset / SECTOR_BYTES * SECTOR_BYTES;
        let sectors_end = end.next_multiple_of(SECTOR_BYTES);
        known.map.lookup_some(begin, sectors_end - begin, limit, &mut pieces);
        if let Some(moment) = moment {
            pieces = with_kept(moment, volume, pieces, limit);
        }
        if let Some(first) = pieces.first_mut() {
            let cut = offset - begin;
            first.offset += cut;
            first.length -= cut;
            if let Source::Log { skip, .. } = &mut first.source {
                *skip += u32::try_from(cut).expect("less than a sector");
            }
        }
        if let Some(last) = pieces.last_mut() {
            last.length = last.length.min(end - last.offset);
        }
        Ok(pieces)
    }

    pub(super) fn damaged(&self, what: String) -> GroupError {
        GroupError::Damaged { group: self.name().clone(), what }
    }

    /// Fetches all ranges in one batch; what went wrong with each, if anything.
    fn fetch(&self, lookup: &dyn Lookup, fetches: Vec<Fetch<'_>>) -> Vec<Option<Trouble>> {
        let mut troubles: Vec<Option<Trouble>> = fetches.iter().map(|_| None).collect();
        let mut log_reads: Vec<LogRead<'_>> = Vec::new();
        let mut base_reads: Vec<FromBase<'_>> = Vec::new();
        for (owner, fetch) in fetches.into_iter().enumerate() {
            let planned = self.plan(lookup, owner, fetch, &mut log_reads, &mut base_reads);
            troubles[owner] = planned.err();
        }
        let mut batch: Vec<BatchRead<'_>> = log_reads
            .iter_mut()
            .map(|read| BatchRead {
                file: &*read.file,
                offset: read.offset,
                buffer: read.target.buffer(),
                result: Ok(()),
            })
            .collect();
        let mut base_batch: Vec<BaseRead<'_>> = base_reads
            .iter_mut()
            .map(|read| BaseRead {
                base: &read.base,
                offset: read.offset,
                buffer: read.buffer,
                result: Ok(()),
            })
            .collect();
        read_batch(&*self.context.env.disk, &mut base_batch, &mut batch);
        let results: Vec<io::Result<()>> = batch.into_iter().map(|read| read.result).collect();
        let base_results: Vec<_> = base_batch.into_iter().map(|read| read.result).collect();
        for (read, result) in log_reads.into_iter().zip(results) {
            if let Err(cause) = result {
                troubles[read.owner] = Some(Trouble::Io(Some(read.lsn), cause));
            } else if !read.target.finish() {
                troubles[read.owner] = Some(Trouble::Checksum(read.lsn));
            }
        }
        for (read, result) in base_reads.into_iter().zip(base_results) {
            if let Err(cause) = result {
                troubles[read.owner] = Some(Trouble::Base(cause));
            }
        }
        troubles
    }

    /// Fills what is zeros, and sorts the rest by where it is; pieces of the log that follow each
    /// other become one read.
    fn plan<'b>(
        &self,
        lookup: &dyn Lookup,
        owner: usize,
        fetch: Fetch<'b>,
        log_reads: &mut Vec<LogRead<'b>>,
        base_reads: &mut Vec<FromBase<'b>>,
    ) -> Result<(), Trouble> {
        let segment_bytes = self.segment_bytes();
        let merging = self.partial_merge();
        let mut rest = fetch.buffer;
        let mut pieces = fetch.pieces.into_iter().peekable();
        while let Some(piece) = pieces.next() {
            match piece.source {
                Source::Zero { .. } => take(&mut rest, piece.length).fill(0),
                Source::Base => {
                    let mut buffer = take(&mut rest, piece.length);
                    let below = [(piece.offset, piece.length, Cover::Below)];
                    let parts = match &merging {
                        Some(merging) => merging.parts(fetch.volume, piece.offset, piece.length),
                        None => below.to_vec(),
                    };
                    for (offset, length, cover) in parts {
                        let buffer = take(&mut buffer, length);
                        let staged = || merging.as_ref()?.volumes.get(&fetch.volume).cloned();
                        let base = match cover {
                            Cover::Zeros => None,
                            Cover::Data => Some(staged().ok_or_else(|| no_file(fetch.volume))?),
                            Cover::Below => self.base_of(fetch.volume),
                        };
                        match base {
                            Some(base) => {
                                base_reads.push(FromBase { base, offset, owner, buffer });
                            }
                            // Nothing was folded into it yet.
                            None => buffer.fill(0),
                        }
                    }
                }
                Source::Log { piece: lsn, piece_bytes, skip, crc } => {
                    let number = lsn.segment_number(segment_bytes);
                    let At { file, segment, offset } =
                        self.at(lookup, lsn).ok_or(Trouble::Moved)?;
                    let target = if skip == 0 && u64::from(piece_bytes) == piece.length {
                        let mut run = vec![(piece.length as usize, crc)];
                        let mut bytes = piece.length;
                        while let Some(next) = pieces.peek()
                            && let Source::Log { piece: next_lsn, piece_bytes, skip: 0, crc } =
                                next.source
                            && u64::from(piece_bytes) == next.length
                            && next_lsn.0 == lsn.0 + bytes
                            && next_lsn.segment_number(segment_bytes) == number
                        {
                            run.push((next.length as usize, crc));
                            bytes += next.length;
                            pieces.next();
                        }
                        Target::Direct { buffer: take(&mut rest, bytes), pieces: run }
                    } else {
                        Target::Part {
                            whole: vec![0; piece_bytes as usize],
                            skip: skip as usize,
                            buffer: take(&mut rest, piece.length),
                            crc,
                        }
                    };
                    let read = LogRead { file, _segment: segment, offset, lsn, owner, target };
                    log_reads.push(read);
                }
            }
        }
        Ok(())
    }

    /// The file that an address is in; `None` where that is gone.
    fn at(&self, lookup: &dyn Lookup, lsn: Lsn) -> Option<At> {
        if lsn >= KEPT {
            let (file, offset) = (lookup.moment()?.blocks()?, lsn.bytes_since(KEPT));
            return Some(At { file, segment: None, offset });
        }
        let own = lookup.branch().filter(|(from, _)| lsn >= *from);
        let segments = own.map_or(&*self.segments, |(_, segments)| segments);
        let segment = segments.get(lsn.segment_number(self.segment_bytes()))?;
        let offset = lsn.segment_offset(self.segment_bytes());
        Some(At { file: segment.file.clone(), segment: Some(segment), offset })
    }

    /// What is staged above the base, as long as it is not part of it.
    pub(super) fn partial_merge(&self) -> Option<Arc<Merging>> {
        self.merging().filter(|merging| merging.is_partial())
    }

    pub(super) fn base_of(&self, volume: VolumeNumber) -> Option<Arc<BaseVolume>> {
        self.bases.read().expect("no holder panics").get(&volume).cloned()
    }

    /// Fetches for the folder, which is alone with the base: no second look.
    pub(super) fn fetch_checked(&self, fetches: Vec<Fetch<'_>>) -> Result<(), GroupError> {
        match self.fetch(self, fetches).into_iter().flatten().next() {
            None => Ok(()),
            Some(Trouble::Moved) => Err(self.damaged("a segment is missing".to_owned())),
            Some(Trouble::Checksum(lsn)) => {
                self.suspect_record(self, lsn);
                Err(self.damaged(wrong_checksum(lsn)))
            }
            Some(Trouble::Base(cause)) => {
                self.suspect_block(&cause);
                Err(self.damaged(cause.to_string()))
            }
            Some(Trouble::Io(lsn, cause)) => {
                if let Some(lsn) = lsn {
                    self.suspect_record(self, lsn);
                }
                Err(self.io("read", &cause))
            }
        }
    }

    /// Has what a reader found damaged in the log, or of what is kept, looked at.
    fn suspect_record(&self, lookup: &dyn Lookup, address: Lsn) {
        if address >= KEPT {
            if let Some(moment) = lookup.moment() {
                self.suspect(DamagedPart::Kept { moment: moment.lsn() });
            }
        } else if lookup.branch().is_none_or(|(from, _)| address < from) {
            let segment = address.segment_number(self.segment_bytes());
            self.suspect(DamagedPart::Log { segment });
        }
    }

    /// The same of the base.
    pub(super) fn suspect_block(&self, cause: &BaseError) {
        let (volume, offset, length) = match *cause {
            BaseError::Damaged { volume, offset, .. } => (volume, offset, BLOCK_BYTES),
            BaseError::Unread { volume, offset, length, .. } => (volume, offset, length),
            _ => return,
        };
        for chunk in offset / CHUNK_BYTES..(offset + length).div_ceil(CHUNK_BYTES) {
            self.suspect(DamagedPart::Base { volume, chunk });
        }
    }

    /// The sectors at the edges of an unaligned request, with where they were found and the horizon
    /// then: a place in the base is the same one only under the same horizon.
    pub(super) fn read_sectors(
        &self,
        volume: VolumeNumber,
        edges: [u64; 2],
        old: &mut [Vec<u8>; 2],
    ) -> Result<(Lsn, Vec<Vec<Piece>>), GroupError> {
        let places = self.places(&self.lock(), volume, edges)?;
        for (offset, buffer) in edges.into_iter().zip(old) {
            let mut reads = [Read { volume, offset, buffer, result: Ok(()) }];
            self.read(&mut reads);
            let [read] = reads;
            read.result?;
        }
        Ok(places)
    }

    /// The horizon, and where the sectors at the edges are.
    pub(super) fn places(
        &self,
        core: &Core,
        volume: VolumeNumber,
        edges: [u64; 2],
    ) -> Result<(Lsn, Vec<Vec<Piece>>), GroupError> {
        let places = edges
            .into_iter()
            .map(|offset| self.look_up(&core.content, None, volume, offset, SECTOR_BYTES))
            .collect::<Result<_, _>>()?;
        Ok((core.timeline.horizon().lsn, places))
    }
}

/// Puts what is kept in the place of what the map has in the base; at most `limit` pieces or one
/// more, so that the answer may end early.
fn with_kept(
    moment: &Moment,
    volume: VolumeNumber,
    pieces: Vec<Piece>,
    limit: usize,
) -> Vec<Piece> {
    let mut all = Vec::with_capacity(pieces.len());
    for piece in pieces {
        if piece.source == Source::Base {
            let before = all.len();
            let room = limit.saturating_sub(before).max(1);
            moment.look_up(volume, piece.offset, piece.length, room, &mut all);
            let end = all.last().map_or(0, |last| last.offset + last.length);
            if end < piece.offset + piece.length {
                return all;
            }
        } else {
            all.push(piece);
        }
        if all.len() >= limit {
            return all;
        }
    }
    all
}

/// Whether something that was looked for in the base is kept by now: what was found there may be
/// newer than it should.
pub(super) fn is_kept_now(moment: Option<&Moment>, volume: VolumeNumber, pieces: &[Piece]) -> bool {
    let in_base = |piece: &&Piece| piece.source == Source::Base;
    moment.is_some_and(|moment| {
        let mut base = pieces.iter().filter(in_base);
        base.any(|piece| moment.has_any(volume, piece.offset, piece.length))
    })
}

fn no_file(volume: VolumeNumber) -> Trouble {
    let what = format!("what is staged of volume {volume} is gone");
    Trouble::Io(None, io::Error::new(io::ErrorKind::NotFound, what))
}

fn wrong_checksum(address: Lsn) -> String {
    if address >= KEPT {
        let slot = address.bytes_since(KEPT) / BLOCK_BYTES;
        return format!("kept blocks from slot {slot} on: checksum differs");
    }
    format!("log at {address}: payload checksum differs")
}

fn take<'b>(rest: &mut &'b mut [u8], bytes: u64) -> &'b mut [u8] {
    let (part, behind) = std::mem::take(rest).split_at_mut(bytes as usize);
    *rest = behind;
    part
}

impl Lookup for Group {
    fn with_content(&self, look: &mut dyn FnMut(&Content)) {
        look(&self.lock().content);
    }
}

impl View for Group {
    fn volumes(&self) -> Vec<Volume> {
        self.lock().view.volumes.clone()
    }

    fn read(&self, reads: &mut [Read<'_>]) {
        self.read_through(self, reads);
    }

    fn extents(
        &self,
        volume: VolumeNumber,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Result<Vec<Extent>, GroupError> {
        self.extents_through(self, volume, offset, length, limit)
    }
}
