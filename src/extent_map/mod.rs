//! Block → where its latest data is: in the log (with its checksum), zeros by a mark, or the base.
//!
//! One [`ExtentMap`] per volume. It is a tree of two levels: runs of regions (1 GiB), in each runs
//! of chunks (1 MiB), and in a chunk one entry per 4 KiB block that the log holds. A run is either
//! one such node or *zeros since a position* over any number of regions or chunks, so that a trim
//! of any length is a handful of runs. What no run covers is in the base. A block that was written
//! in part has an entry per sector.
//!
//! Nodes are shared between clones and copied when one of them changes, so that an image is a
//! clone. What an operation takes away is handed back as [`Freed`], to be dropped where nobody
//! waits.
//!
//! Positions grow with every change of one map; a rewind takes another clone.

mod chunk;
mod runs;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;

use crate::units::{BLOCK_BYTES, CHUNK_BYTES, Lsn, SECTOR_BYTES};

use chunk::{Chunk, SECTORS_PER_CHUNK};
use runs::{Cover, Run, Runs};

/// Chunks of a region.
const CHUNKS_PER_REGION: u64 = 1024;
const REGION_BYTES: u64 = CHUNKS_PER_REGION * CHUNK_BYTES;
/// No volume reaches further, in bytes: a region's number fits 32 bits.
const OFFSET_MAX: u64 = REGION_BYTES << 32;

/// A run of bytes of a volume with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First byte in the volume.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Where they are.
    pub source: Source,
}

/// Where bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the base, at the same offset.
    Base,
    /// Nowhere: they read as zeros.
    Zero {
        /// The position of the record that said so.
        since: Lsn,
        /// Whether the space was given back.
        hole: bool,
    },
    /// In the log.
    Log {
        /// The log position of the first byte of the piece that the checksum covers.
        piece: Lsn,
        /// Bytes of that piece, at most 4096: all of it must be read to check it.
        piece_bytes: u32,
        /// The first wanted byte in it.
        skip: u32,
        /// CRC-32 of the piece.
        crc: u32,
    },
}

/// Zeros since a position, in 64 bits: the top bit says that the space was given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark(u64);

impl Mark {
    fn new(since: Lsn, hole: bool) -> Mark {
        assert!(since < Lsn::MAX, "position {since} needs the top bit");
        Mark(since.0 | u64::from(hole) << 63)
    }

    fn since(self) -> u64 {
        self.0 & !(1 << 63)
    }

    fn hole(self) -> bool {
        self.0 >> 63 == 1
    }

    fn source(self) -> Source {
        Source::Zero { since: Lsn(self.since()), hole: self.hole() }
    }
}

/// The chunks of one region.
type Region = Runs<Chunk>;

/// What an operation took out of the map. Dropping it takes time that grows with it: do that
/// outside of any lock.
#[derive(Default)]
#[must_use = "drop it outside of the lock"]
pub struct Freed {
    regions: Vec<Run<Region>>,
    chunks: Vec<Run<Chunk>>,
}

impl Freed {
    /// Takes over what another operation freed.
    pub fn absorb(&mut self, mut other: Freed) {
        self.regions.append(&mut other.regions);
        self.chunks.append(&mut other.chunks);
    }
}

/// The map of one volume. A clone is cheap and independent.
#[derive(Clone, Default)]
pub struct ExtentMap {
    root: Arc<Runs<Region>>,
}

/// One thing that the map knows beyond "in the base".
enum Known<'a> {
    Zero { chunks: u64, mark: Mark },
    Chunk(&'a Chunk),
}

impl ExtentMap {
    /// A map of a volume that is all in the base.
    #[must_use]
    pub fn new() -> ExtentMap {
        ExtentMap::default()
    }

    /// Notes that `[offset, offset + length)` was written, and that its bytes lie at `payload` in
    /// the log. `offset` and `length` are multiples of 512; `crcs` has one CRC-32 per aligned 4 KiB
    /// block that the range touches, over the part of the block that was written.
    ///
    /// # Panics
    ///
    /// Where the arguments are not like that: the caller is wrong.
    pub fn write(&mut self, offset: u64, payload: Lsn, length: u64, crcs: &[u32]) {
        let end = checked_end(offset, length);
        if length == 0 {
            return;
        }
        let blocks = end.div_ceil(BLOCK_BYTES) - offset / BLOCK_BYTES;
        assert_eq!(crcs.len() as u64, blocks, "one CRC per block of [{offset}, {end})");
        assert!(payload.advance(length) <= Lsn::MAX, "position {payload} needs the top bit");
        let mut position = offset;
        let mut crcs = crcs;
        while position < end {
            let step = end.min((position / CHUNK_BYTES + 1) * CHUNK_BYTES) - position;
            let here = (position + step).div_ceil(BLOCK_BYTES) - position / BLOCK_BYTES;
            let (these, rest) = crcs.split_at(here as usize);
            crcs = rest;
            let first_sector = (position % CHUNK_BYTES / SECTOR_BYTES) as usize;
            self.chunk_mut(position / CHUNK_BYTES).write(
                first_sector,
                (step / SECTOR_BYTES) as usize,
                payload.0 + (position - offset),
                these,
            );
            position += step;
        }
    }

    /// Notes that `[offset, offset + length)` reads as zeros since the record at `lsn`; `hole` says
    /// that its space was given back. `offset` and `length` are multiples of 512. Time and memory
    /// are bounded, whatever the length, but for the drop of what is returned.
    pub fn zero(&mut self, offset: u64, length: u64, lsn: Lsn, hole: bool) -> Freed {
        let end = checked_end(offset, length);
        let mark = Mark::new(lsn, hole);
        let mut freed = Freed::default();
        if length == 0 {
            return freed;
        }
        let (whole_from, whole_to) = (offset.div_ceil(CHUNK_BYTES), end / CHUNK_BYTES);
        if whole_from > whole_to {
            self.zero_in_chunk(offset, end, mark);
            return freed;
        }
        if offset < whole_from * CHUNK_BYTES {
            self.zero_in_chunk(offset, whole_from * CHUNK_BYTES, mark);
        }
        if whole_to * CHUNK_BYTES < end {
            self.zero_in_chunk(whole_to * CHUNK_BYTES, end, mark);
        }
        self.each_region(
            whole_from,
            whole_to,
            &mut freed,
            |root, regions, freed| {
                root.clear(regions.0, regions.1, &mut freed.regions);
                root.cover(regions.0, regions.1, mark);
            },
            |region, chunks, freed| {
                region.clear(chunks.0, chunks.1, &mut freed.chunks);
                region.cover(chunks.0, chunks.1, mark);
            },
        );
        freed
    }

    /// Appends the pieces of `[offset, offset + length)` to `out`: in order, without gaps, equal
    /// neighbours as one. `offset` and `length` are multiples of 512.
    pub fn lookup(&self, offset: u64, length: u64, out: &mut Vec<Piece>) {
        self.lookup_some(offset, length, usize::MAX, out);
    }

    /// As [`ExtentMap::lookup`], but stops when `limit` pieces were appended; the offset behind the
    /// last of them.
    pub fn lookup_some(&self, offset: u64, length: u64, limit: usize, out: &mut Vec<Piece>) -> u64 {
        let end = checked_end(offset, length);
        let before = out.len();
        let mut position = offset;
        let mut push = |piece: Piece| {
            if out.len() > before
                && let Some(last) = out.last_mut()
                && let Some(joined) = join(last, &piece)
            {
                *last = joined;
                return ControlFlow::Continue(());
            }
            if out.len() - before == limit {
                return ControlFlow::Break(());
            }
            out.push(piece);
            ControlFlow::Continue(())
        };
        while position < end {
            let (start, step_end, known) = self.known_from(position / CHUNK_BYTES);
            let (start, step_end) = (start.max(position).min(end), step_end.min(end));
            if position < start {
                let piece =
                    Piece { offset: position, length: start - position, source: Source::Base };
                if push(piece).is_break() {
                    break;
                }
                position = start;
            }
            if start == end {
                break;
            }
            let flow = match known {
                None => ControlFlow::Continue(()),
                Some(Known::Zero { mark, .. }) => {
                    push(Piece { offset: start, length: step_end - start, source: mark.source() })
                }
                Some(Known::Chunk(chunk)) => {
                    chunk.visit(start / CHUNK_BYTES * CHUNK_BYTES, start, step_end, &mut push)
                }
            };
            if flow.is_break() {
                break;
            }
            position = step_end.max(position);
        }
        out[before..].last().map_or(offset, |last| last.offset + last.length)
    }

    /// Forgets what lies before `target`: after a fold it is in the base.
    pub fn forget_below(&mut self, target: Lsn) -> Freed {
        let mut freed = Freed::default();
        let mut from = Some(0);
        while let Some(offset) = from {
            let (more, next) = self.forget_some(target, offset, usize::MAX);
            freed.absorb(more);
            from = next;
        }
        freed
    }

    /// Does a part of [`ExtentMap::forget_below`], so that a lock need not be held for all of it:
    /// looks at about `chunks` chunks from `offset` on; where to go on, if there is more.
    pub fn forget_some(&mut self, target: Lsn, offset: u64, chunks: usize) -> (Freed, Option<u64>) {
        let mut freed = Freed::default();
        let mut seen = 0;
        let mut from = u32::try_from(offset / REGION_BYTES).unwrap_or(u32::MAX);
        loop {
            let Some(run) = self.root.from(from) else { return (freed, None) };
            if seen >= chunks {
                return (freed, Some(u64::from(run.start) * REGION_BYTES));
            }
            let (start, behind) = (run.start, run.start + run.count);
            let old = match &run.cover {
                Cover::Zero(mark) => mark.since() < target.0,
                Cover::Fine(region) => {
                    seen += region.len();
                    let stale = region.iter().any(|run| match &run.cover {
                        Cover::Zero(mark) => mark.since() < target.0,
                        Cover::Fine(chunk) => chunk.oldest() < target.0,
                    });
                    if stale {
                        let region =
                            Arc::make_mut(&mut self.root).fine_mut(start, |_| Region::default());
                        forget_in_region(region, target, &mut freed);
                        region.is_empty()
                    } else {
                        false
                    }
                }
            };
            seen += 1;
            if old {
                Arc::make_mut(&mut self.root).clear(start, behind, &mut freed.regions);
            }
            from = behind;
        }
    }

    /// Forgets everything at and beyond `size_bytes`, a multiple of 4096. Where a volume grows
    /// again the caller marks the new part as zeros: the base may still have old bytes there.
    pub fn truncate(&mut self, size_bytes: u64) -> Freed {
        let mut freed = Freed::default();
        let size_bytes = size_bytes.min(OFFSET_MAX);
        assert!(size_bytes.is_multiple_of(BLOCK_BYTES), "a volume of {size_bytes} bytes");
        let within = size_bytes % CHUNK_BYTES;
        if within > 0 && self.knows_chunk(size_bytes / CHUNK_BYTES) {
            let chunk = self.chunk_mut(size_bytes / CHUNK_BYTES);
            chunk.cut((within / BLOCK_BYTES) as usize);
        }
        let (from, to) = (size_bytes.div_ceil(CHUNK_BYTES), OFFSET_MAX / CHUNK_BYTES);
        self.each_region(
            from,
            to,
            &mut freed,
            |root, regions, freed| {
                root.clear(regions.0, regions.1, &mut freed.regions);
            },
            |region, chunks, freed| {
                region.clear(chunks.0, chunks.1, &mut freed.chunks);
            },
        );
        freed
    }

    /// What changed at or after the position `since`: runs of (offset, length) in bytes, in order.
    #[must_use]
    pub fn changed_since(&self, since: Lsn) -> Vec<(u64, u64)> {
        let mut changed: Vec<(u64, u64)> = Vec::new();
        let mut push = |piece: Piece| {
            let position = match piece.source {
                Source::Base => return ControlFlow::<()>::Continue(()),
                Source::Zero { since, .. } => since,
                Source::Log { piece, .. } => piece,
            };
            if position >= since {
                match changed.last_mut() {
                    Some(last) if last.0 + last.1 == piece.offset => last.1 += piece.length,
                    _ => changed.push((piece.offset, piece.length)),
                }
            }
            ControlFlow::Continue(())
        };
        let mut chunk_number = 0;
        loop {
            let (start, end, known) = self.known_from(chunk_number);
            let flow = match known {
                None => break,
                Some(Known::Zero { mark, .. }) => {
                    push(Piece { offset: start, length: end - start, source: mark.source() })
                }
                Some(Known::Chunk(chunk)) if chunk.newest() >= since.0 => {
                    chunk.visit(start, start, end, &mut push)
                }
                Some(Known::Chunk(_)) => ControlFlow::Continue(()),
            };
            debug_assert!(flow.is_continue());
            chunk_number = end / CHUNK_BYTES;
        }
        changed
    }

    /// Everything that is not in the base, in the order of offsets.
    pub fn pieces(&self) -> Pieces<'_> {
        Pieces { map: self, next_chunk: Some(0), ready: VecDeque::new() }
    }

    /// Bytes of memory that the map takes, those that it shares with clones included. Takes time
    /// that grows with the chunks: for a map in use, ask a clone.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let regions = self.root.iter().map(|run| match &run.cover {
            Cover::Zero(_) => 0,
            Cover::Fine(region) => {
                let chunks = region.iter().map(|run| match &run.cover {
                    Cover::Zero(_) => 0,
                    Cover::Fine(chunk) => chunk.memory_bytes(),
                });
                region.memory_bytes() + chunks.sum::<u64>()
            }
        });
        self.root.memory_bytes() + regions.sum::<u64>()
    }

    /// Extents that the map holds: blocks, and runs of zeros. Takes time as
    /// [`ExtentMap::memory_bytes`] does.
    #[must_use]
    pub fn extents(&self) -> u64 {
        let regions = self.root.iter().map(|run| match &run.cover {
            Cover::Zero(_) => 1,
            Cover::Fine(region) => region
                .iter()
                .map(|run| match &run.cover {
                    Cover::Zero(_) => 1,
                    Cover::Fine(chunk) => chunk.extents(),
                })
                .sum(),
        });
        regions.sum()
    }

    /// Whether everything is in the base.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.root.is_empty()
    }

    /// The first thing known at or after a chunk: its range in bytes and what it is. Where nothing
    /// is known any more, a range behind everything.
    fn known_from(&self, chunk_number: u64) -> (u64, u64, Option<Known<'_>>) {
        let none = (u64::MAX, u64::MAX, None);
        let mut region_from = match u32::try_from(chunk_number / CHUNKS_PER_REGION) {
            Ok(number) => number,
            Err(_) => return none,
        };
        let mut chunk_from = (chunk_number % CHUNKS_PER_REGION) as u32;
        loop {
            let Some(run) = self.root.from(region_from) else { return none };
            let first_chunk = u64::from(run.start) * CHUNKS_PER_REGION;
            match &run.cover {
                Cover::Zero(mark) => {
                    let chunks = u64::from(run.count) * CHUNKS_PER_REGION;
                    return span(first_chunk, Known::Zero { chunks, mark: *mark });
                }
                Cover::Fine(region) => {
                    let from = if run.start == region_from { chunk_from } else { 0 };
                    if let Some(below) = region.from(from) {
                        let start = first_chunk + u64::from(below.start);
                        return match &below.cover {
                            Cover::Zero(mark) => {
                                let chunks = u64::from(below.count);
                                span(start, Known::Zero { chunks, mark: *mark })
                            }
                            Cover::Fine(chunk) => span(start, Known::Chunk(chunk)),
                        };
                    }
                    region_from = run.start + 1;
                    chunk_from = 0;
                }
            }
        }
    }

    /// Whether a chunk has anything that is not in the base.
    fn knows_chunk(&self, number: u64) -> bool {
        let (start, end, _) = self.known_from(number);
        (start..end).contains(&(number * CHUNK_BYTES))
    }

    fn chunk_mut(&mut self, number: u64) -> &mut Chunk {
        let region = (number / CHUNKS_PER_REGION) as u32;
        Arc::make_mut(&mut self.root)
            .fine_mut(region, region_of)
            .fine_mut((number % CHUNKS_PER_REGION) as u32, Chunk::new)
    }

    fn zero_in_chunk(&mut self, offset: u64, end: u64, mark: Mark) {
        let first_sector = offset % CHUNK_BYTES / SECTOR_BYTES;
        let sectors = (end - offset) / SECTOR_BYTES;
        debug_assert!(first_sector + sectors <= SECTORS_PER_CHUNK as u64);
        self.chunk_mut(offset / CHUNK_BYTES).zero(first_sector as usize, sectors as usize, mark);
    }

    /// Applies `whole` to the whole regions among the chunks `[from, to)` and `part` to the chunks
    /// of the regions that are covered in part. A region of which nothing is left goes away.
    fn each_region(
        &mut self,
        from: u64,
        to: u64,
        freed: &mut Freed,
        whole: impl Fn(&mut Runs<Region>, (u32, u32), &mut Freed),
        part: impl Fn(&mut Region, (u32, u32), &mut Freed),
    ) {
        if from >= to {
            return;
        }
        let root = Arc::make_mut(&mut self.root);
        let mut in_part = |region: u64, from: u64, to: u64, freed: &mut Freed| {
            let number = region as u32;
            let base = region * CHUNKS_PER_REGION;
            let node = root.fine_mut(number, region_of);
            part(node, ((from - base) as u32, (to - base) as u32), freed);
            if node.is_empty() {
                root.clear(number, number + 1, &mut freed.regions);
            }
        };
        let (first, last) = (from.div_ceil(CHUNKS_PER_REGION), to / CHUNKS_PER_REGION);
        if first > last {
            in_part(last, from, to, freed);
            return;
        }
        if from < first * CHUNKS_PER_REGION {
            in_part(first - 1, from, first * CHUNKS_PER_REGION, freed);
        }
        if last * CHUNKS_PER_REGION < to {
            in_part(last, last * CHUNKS_PER_REGION, to, freed);
        }
        if first < last {
            // Numbers reach 2^32 here, one more than fits: the last region is never used.
            let last = u32::try_from(last).unwrap_or(u32::MAX);
            whole(root, (first as u32, last), freed);
        }
    }
}

/// A region where nothing is known, or all is zeros.
fn region_of(mark: Option<Mark>) -> Region {
    let mut region = Region::default();
    if let Some(mark) = mark {
        region.cover(0, CHUNKS_PER_REGION as u32, mark);
    }
    region
}

fn forget_in_region(region: &mut Region, target: Lsn, freed: &mut Freed) {
    region.retain(&mut freed.chunks, |cover| match cover {
        Cover::Zero(mark) => mark.since() >= target.0,
        Cover::Fine(chunk) if chunk.oldest() >= target.0 => true,
        Cover::Fine(chunk) if chunk.newest() < target.0 => false,
        Cover::Fine(chunk) => {
            let chunk = Arc::make_mut(chunk);
            chunk.forget_below(target.0);
            !chunk.is_empty()
        }
    });
}

fn span(first_chunk: u64, known: Known<'_>) -> (u64, u64, Option<Known<'_>>) {
    let chunks = match &known {
        Known::Zero { chunks, .. } => *chunks,
        Known::Chunk(_) => 1,
    };
    (first_chunk * CHUNK_BYTES, (first_chunk + chunks) * CHUNK_BYTES, Some(known))
}

fn checked_end(offset: u64, length: u64) -> u64 {
    assert!(offset.is_multiple_of(SECTOR_BYTES), "offset {offset} is not a multiple of 512");
    assert!(length.is_multiple_of(SECTOR_BYTES), "length {length} is not a multiple of 512");
    let end = offset.checked_add(length).expect("an offset does not overflow");
    assert!(end < OFFSET_MAX, "offset {end} is beyond every volume");
    end
}

/// The two neighbours as one piece, where their source goes on.
fn join(first: &Piece, second: &Piece) -> Option<Piece> {
    debug_assert_eq!(first.offset + first.length, second.offset);
    let same = match (first.source, second.source) {
        (Source::Log { piece, skip, .. }, Source::Log { piece: other, skip: further, .. }) => {
            piece == other && u64::from(skip) + first.length == u64::from(further)
        }
        (one, other) => one == other,
    };
    same.then(|| Piece { length: first.length + second.length, ..*first })
}

/// What is not in the base: see [`ExtentMap::pieces`].
pub struct Pieces<'a> {
    map: &'a ExtentMap,
    next_chunk: Option<u64>,
    ready: VecDeque<Piece>,
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        while self.ready.is_empty() {
            let (start, end, known) = self.map.known_from(self.next_chunk?);
            self.next_chunk = known.is_some().then_some(end / CHUNK_BYTES);
            match known {
                None => {}
                Some(Known::Zero { mark, .. }) => self.ready.push_back(Piece {
                    offset: start,
                    length: end - start,
                    source: mark.source(),
                }),
                Some(Known::Chunk(chunk)) => {
                    let ready = &mut self.ready;
                    let flow = chunk.visit(start, start, end, &mut |piece| {
                        if piece.source != Source::Base {
                            let joined = ready.back().and_then(|last| {
                                let adjacent = last.offset + last.length == piece.offset;
                                if adjacent { join(last, &piece) } else { None }
                            });
                            match (joined, ready.back_mut()) {
                                (Some(joined), Some(last)) => *last = joined,
                                _ => ready.push_back(piece),
                            }
                        }
                        ControlFlow::Continue(())
                    });
                    debug_assert!(flow.is_continue());
                }
            }
        }
        self.ready.pop_front()
    }
}
