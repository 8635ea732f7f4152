//! The blocks of one chunk: an entry per block that the log holds, 12 bytes each.
//!
//! `present` says which blocks have an entry; entries lie in the order of blocks, so that an
//! entry's index is the number of present blocks before it. An entry is a word and a CRC:
//!
//! | word, top bit | word, rest | CRC | meaning |
//! | --- | --- | --- | --- |
//! | 0 | log position | CRC-32 of the block | written whole, bytes in the log |
//! | 1 | log position | 0 | zeros, space kept |
//! | 1 | log position | 1 | zeros, a hole |
//! | 1 | index in `partials` | 2 | an entry per sector |
//!
//! A block without an entry is what `background` says: zeros of a mark that covered the whole chunk
//! before, or the base.

use std::ops::ControlFlow;

use crate::units::{BLOCK_BYTES, CHUNK_BYTES, Lsn, SECTOR_BYTES};

use super::{Mark, Piece, Source};

pub const SECTORS_PER_CHUNK: usize = (CHUNK_BYTES / SECTOR_BYTES) as usize;
const BLOCKS: usize = (CHUNK_BYTES / BLOCK_BYTES) as usize;
const SECTORS: usize = (BLOCK_BYTES / SECTOR_BYTES) as usize;

const TOP: u64 = 1 << 63;
const TAG_ZERO: u32 = 0;
const TAG_HOLE: u32 = 1;
const TAG_PARTIAL: u32 = 2;

/// One block's sectors: 104 bytes.
#[derive(Clone)]
struct Partial {
    positions: [u64; SECTORS],
    crcs: [u32; SECTORS],
    shapes: [u8; SECTORS],
}

const _: () = assert!(size_of::<Partial>() == 104);

/// What one sector is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sector {
    Base,
    Zero(Mark),
    /// In a piece of the log that covers `count` sectors of the block from sector `first`.
    Log {
        position: u64,
        crc: u32,
        first: u8,
        count: u8,
    },
}

impl Partial {
    fn uniform(sector: Sector) -> Partial {
        let mut partial =
            Partial { positions: [0; SECTORS], crcs: [0; SECTORS], shapes: [0; SECTORS] };
        for index in 0..SECTORS {
            partial.set(index, sector);
        }
        partial
    }

    fn set(&mut self, index: usize, sector: Sector) {
        let (position, crc, shape) = match sector {
            Sector::Base => (0, 0, 0),
            Sector::Zero(mark) => (mark.0, 0, 2 << 6),
            Sector::Log { position, crc, first, count } => {
                (position, crc, 1 << 6 | first << 3 | (count - 1))
            }
        };
        self.positions[index] = position;
        self.crcs[index] = crc;
        self.shapes[index] = shape;
    }

    fn sector(&self, index: usize) -> Sector {
        let shape = self.shapes[index];
        match shape >> 6 {
            0 => Sector::Base,
            1 => Sector::Log {
                position: self.positions[index],
                crc: self.crcs[index],
                first: shape >> 3 & 7,
                count: (shape & 7) + 1,
            },
            _ => Sector::Zero(Mark(self.positions[index])),
        }
    }
}

impl Sector {
    fn position(self) -> Option<u64> {
        match self {
            Sector::Base => None,
            Sector::Zero(mark) => Some(mark.since()),
            Sector::Log { position, .. } => Some(position),
        }
    }

    /// The source of this sector, the `index`th of its block.
    fn source(self, index: usize) -> Source {
        match self {
            Sector::Base => Source::Base,
            Sector::Zero(mark) => mark.source(),
            Sector::Log { position, crc, first, count } => Source::Log {
                piece: Lsn(position),
                piece_bytes: u32::from(count) * SECTOR_BYTES as u32,
                skip: (index as u32 - u32::from(first)) * SECTOR_BYTES as u32,
                crc,
            },
        }
    }
}

#[derive(Clone)]
pub struct Chunk {
    present: [u64; BLOCKS / 64],
    background: Option<Mark>,
    /// No position in here is lower; may itself be lower than all.
    oldest: u64,
    /// No position in here is higher; may itself be higher than all.
    newest: u64,
    words: Vec<u64>,
    crcs: Vec<u32>,
    partials: Vec<Partial>,
}

impl Chunk {
    /// A chunk where everything is zeros of a mark, or in the base.
    pub fn new(background: Option<Mark>) -> Chunk {
        let since = background.map(Mark::since);
        Chunk {
            present: [0; BLOCKS / 64],
            background,
            oldest: since.unwrap_or(u64::MAX),
            newest: since.unwrap_or(0),
            words: Vec::new(),
            crcs: Vec::new(),
            partials: Vec::new(),
        }
    }

    /// No position in the chunk is lower than this.
    pub fn oldest(&self) -> u64 {
        self.oldest
    }

    /// No position in the chunk is higher than this.
    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// Whether everything is in the base.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty() && self.background.is_none()
    }

    pub fn memory_bytes(&self) -> u64 {
        // The two counters of the shared node, and what the vectors have room for.
        let vectors = self.words.capacity() * size_of::<u64>()
            + self.crcs.capacity() * size_of::<u32>()
            + self.partials.capacity() * size_of::<Partial>();
        (16 + size_of::<Chunk>() + vectors) as u64
    }

    pub fn extents(&self) -> u64 {
        self.words.len() as u64 + u64::from(self.background.is_some())
    }

    /// The sectors `[first, first + count)` were written, their bytes are at `position`; a CRC per
    /// block that they touch.
    pub fn write(&mut self, first: usize, count: usize, position: u64, crcs: &[u32]) {
        self.note_position(position);
        self.note_position(position + (count as u64 - 1) * SECTOR_BYTES);
        let end = first + count;
        let (whole_from, whole_to) = (first.div_ceil(SECTORS), end / SECTORS);
        if whole_from < whole_to {
            let skipped = whole_from * SECTORS - first;
            let crcs = &crcs[usize::from(skipped > 0)..];
            self.make_room(whole_from, whole_to);
            let start = self.rank(whole_from);
            for (index, block) in (whole_from..whole_to).enumerate() {
                let within = (skipped + index * SECTORS) as u64 * SECTOR_BYTES;
                self.words[start + index] = position + within;
                self.crcs[start + index] = crcs[index];
                debug_assert!(self.has(block));
            }
        }
        let mut sector = first;
        for (index, block) in (first / SECTORS..end.div_ceil(SECTORS)).enumerate() {
            let (from, to) = (sector, end.min((block + 1) * SECTORS));
            if to - from < SECTORS {
                let piece = Sector::Log {
                    position: position + (from - first) as u64 * SECTOR_BYTES,
                    crc: crcs[index],
                    first: (from % SECTORS) as u8,
                    count: (to - from) as u8,
                };
                self.set_sectors(block, from % SECTORS, to - from, piece);
            }
            sector = to;
        }
    }

    /// The sectors `[first, first + count)` are zeros by a mark.
    pub fn zero(&mut self, first: usize, count: usize, mark: Mark) {
        self.note_position(mark.since());
        let end = first + count;
        let (whole_from, whole_to) = (first.div_ceil(SECTORS), end / SECTORS);
        if whole_from < whole_to {
            self.make_room(whole_from, whole_to);
            let (from, to) = (self.rank(whole_from), self.rank(whole_to));
            self.words[from..to].fill(TOP | mark.since());
            self.crcs[from..to].fill(zero_tag(mark));
        }
        let mut sector = first;
        while sector < end {
            let block = sector / SECTORS;
            let to = end.min((block + 1) * SECTORS);
            if to - sector < SECTORS {
                self.set_sectors(block, sector % SECTORS, to - sector, Sector::Zero(mark));
            }
            sector = to;
        }
    }

    /// Forgets the blocks from `first` on.
    pub fn cut(&mut self, first: usize) {
        if let Some(mark) = self.background {
            // Nothing says "base" under a background, so what stays gets entries of its own.
            for block in 0..first {
                if !self.has(block) {
                    self.make_room(block, block + 1);
                    let index = self.rank(block);
                    self.words[index] = TOP | mark.since();
                    self.crcs[index] = zero_tag(mark);
                }
            }
            self.background = None;
        }
        self.keep_entries(|block, word, crc, partials| {
            let keep = block < first;
            if !keep && word & TOP != 0 && crc == TAG_PARTIAL {
                partials[(word & !TOP) as usize] = None;
            }
            keep
        });
    }

    /// Forgets what lies before `target`.
    pub fn forget_below(&mut self, target: u64) {
        if self.background.is_some_and(|mark| mark.since() < target) {
            self.background = None;
        }
        let background = self.background;
        let mut oldest = background.map_or(u64::MAX, Mark::since);
        self.keep_entries(|block, word, crc, partials| {
            let position = if word & TOP != 0 && crc == TAG_PARTIAL {
                let slot = &mut partials[(word & !TOP) as usize];
                let partial = slot.as_mut().expect("an entry has its partial");
                let mut kept = u64::MAX;
                for index in 0..SECTORS {
                    match partial.sector(index).position() {
                        Some(position) if position >= target => kept = kept.min(position),
                        _ => partial.set(index, Sector::Base),
                    }
                }
                if kept == u64::MAX {
                    *slot = None;
                }
                kept
            } else {
                word & !TOP
            };
            let keep = position >= target && position != u64::MAX;
            if keep {
                oldest = oldest.min(position);
            } else {
                // Positions grow, so what lies over a mark is younger than it.
                assert!(background.is_none(), "block {block} is older than the zeros below it");
            }
            keep
        });
        self.oldest = oldest;
    }

    /// Shows the pieces of `[from, to)`, bytes of the volume, in this chunk, which begins at
    /// `start`; neighbours of one source may come as several pieces.
    pub fn visit(
        &self,
        start: u64,
        from: u64,
        to: u64,
        show: &mut impl FnMut(Piece) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let background = self.background.map_or(Source::Base, Mark::source);
        let mut block = ((from - start) / BLOCK_BYTES) as usize;
        let mut index = self.rank(block);
        let mut position = from;
        while position < to {
            if !self.has(block) {
                let next = self.next_present(block);
                let end = to.min(start + next as u64 * BLOCK_BYTES);
                show(Piece { offset: position, length: end - position, source: background })?;
                (block, position) = (next, end);
                continue;
            }
            let block_start = start + block as u64 * BLOCK_BYTES;
            let end = to.min(block_start + BLOCK_BYTES);
            let (word, crc) = (self.words[index], self.crcs[index]);
            if word & TOP == 0 {
                let source = Source::Log {
                    piece: Lsn(word),
                    piece_bytes: BLOCK_BYTES as u32,
                    skip: (position - block_start) as u32,
                    crc,
                };
                show(Piece { offset: position, length: end - position, source })?;
            } else if crc == TAG_PARTIAL {
                let partial = &self.partials[(word & !TOP) as usize];
                while position < end {
                    let sector = ((position - block_start) / SECTOR_BYTES) as usize;
                    let source = partial.sector(sector).source(sector);
                    let piece = Piece { offset: position, length: SECTOR_BYTES, source };
                    show(piece)?;
                    position += SECTOR_BYTES;
                }
            } else {
                let mark = zero_mark(word, crc);
                show(Piece { offset: position, length: end - position, source: mark.source() })?;
            }
            position = end;
            block += 1;
            index += 1;
        }
        ControlFlow::Continue(())
    }

    fn note_position(&mut self, position: u64) {
        self.oldest = self.oldest.min(position);
        self.newest = self.newest.max(position);
    }

    fn has(&self, block: usize) -> bool {
        self.present[block / 64] >> (block % 64) & 1 == 1
    }

    /// Present blocks before `block`, which may be one past the last.
    fn rank(&self, block: usize) -> usize {
        let whole: u32 = self.present[..block / 64].iter().map(|bits| bits.count_ones()).sum();
        let part = match block % 64 {
            0 => 0,
            within => (self.present[block / 64] & ((1 << within) - 1)).count_ones(),
        };
        (whole + part) as usize
    }

    /// The first present block behind `block`, or one past the last.
    fn next_present(&self, block: usize) -> usize {
        let mut at = block + 1;
        while at < BLOCKS {
            let bits = self.present[at / 64] >> (at % 64);
            if bits != 0 {
                return at + bits.trailing_zeros() as usize;
            }
            at = (at / 64 + 1) * 64;
        }
        BLOCKS
    }

    /// Makes entries of the blocks `[from, to)`, to be filled; partials among them are freed.
    fn make_room(&mut self, from: usize, to: usize) {
        let (start, end) = (self.rank(from), self.rank(to));
        if !self.partials.is_empty() {
            for index in start..end {
                if self.words[index] & TOP != 0 && self.crcs[index] == TAG_PARTIAL {
                    self.free_partial((self.words[index] & !TOP) as usize);
                    // No longer looked for, should another of them be moved.
                    self.crcs[index] = TAG_ZERO;
                }
            }
        }
        let missing = (to - from) - (end - start);
        if missing > 0 {
            let wanted = self.words.len() + missing;
            if wanted > self.words.capacity() {
                // An eighth more than needed, and no more than there are blocks.
                let room = (wanted + wanted / 8).next_multiple_of(4).min(BLOCKS) - self.words.len();
                self.words.reserve_exact(room);
                self.crcs.reserve_exact(room);
            }
            self.words.splice(start..start, std::iter::repeat_n(TOP, missing));
            self.crcs.splice(start..start, std::iter::repeat_n(TAG_ZERO, missing));
            for block in from..to {
                self.present[block / 64] |= 1 << (block % 64);
            }
        }
    }

    /// Takes a partial out; the last one moves into its place.
    fn free_partial(&mut self, freed: usize) {
        self.partials.swap_remove(freed);
        let moved = self.partials.len();
        if moved != freed {
            let entry = (0..self.words.len()).find(|index| {
                self.words[*index] == TOP | moved as u64 && self.crcs[*index] == TAG_PARTIAL
            });
            self.words[entry.expect("a partial has its entry")] = TOP | freed as u64;
        }
        if self.partials.is_empty() {
            self.partials = Vec::new();
        }
    }

    /// Sets sectors of a block, not all of them.
    fn set_sectors(&mut self, block: usize, first: usize, count: usize, sector: Sector) {
        let index = self.partial_of(block);
        let slot = (self.words[index] & !TOP) as usize;
        let partial = &mut self.partials[slot];
        for position in first..first + count {
            partial.set(position, sector);
        }
        if let Sector::Zero(mark) = sector
            && (0..SECTORS).all(|position| partial.sector(position) == sector)
        {
            self.crcs[index] = zero_tag(mark);
            self.words[index] = TOP | mark.since();
            self.free_partial(slot);
        }
    }

    /// The index of the block's entry, which is a partial from now on.
    fn partial_of(&mut self, block: usize) -> usize {
        let index = self.rank(block);
        let before = if !self.has(block) {
            self.make_room(block, block + 1);
            self.background.map_or(Sector::Base, Sector::Zero)
        } else if self.words[index] & TOP == 0 {
            let (position, crc) = (self.words[index], self.crcs[index]);
            Sector::Log { position, crc, first: 0, count: SECTORS as u8 }
        } else if self.crcs[index] == TAG_PARTIAL {
            return index;
        } else {
            Sector::Zero(zero_mark(self.words[index], self.crcs[index]))
        };
        if self.partials.len() == self.partials.capacity() {
            // A sixteenth more: a block in sectors may take 128 bytes in all.
            self.partials.reserve_exact(1 + self.partials.len() / 16);
        }
        self.words[index] = TOP | self.partials.len() as u64;
        self.crcs[index] = TAG_PARTIAL;
        self.partials.push(Partial::uniform(before));
        index
    }

    /// Keeps the entries for which `keep(block, word, crc, partials)` says so. It empties the slot
    /// of a partial that goes.
    fn keep_entries(
        &mut self,
        mut keep: impl FnMut(usize, u64, u32, &mut [Option<Partial>]) -> bool,
    ) {
        let mut partials: Vec<Option<Partial>> =
            std::mem::take(&mut self.partials).into_iter().map(Some).collect();
        let mut kept_words = Vec::with_capacity(self.words.len());
        let mut kept_crcs = Vec::with_capacity(self.words.len());
        let mut index = 0;
        for block in 0..BLOCKS {
            if !self.has(block) {
                continue;
            }
            let (word, crc) = (self.words[index], self.crcs[index]);
            index += 1;
            if keep(block, word, crc, &mut partials) {
                let is_partial = word & TOP != 0 && crc == TAG_PARTIAL;
                let word = match is_partial.then(|| partials[(word & !TOP) as usize].take()) {
                    Some(partial) => {
                        self.partials.push(partial.expect("a kept entry has its partial"));
                        TOP | (self.partials.len() - 1) as u64
                    }
                    None => word,
                };
                kept_words.push(word);
                kept_crcs.push(crc);
            } else {
                self.present[block / 64] &= !(1 << (block % 64));
            }
        }
        kept_words.shrink_to_fit();
        kept_crcs.shrink_to_fit();
        self.partials.shrink_to_fit();
        self.words = kept_words;
        self.crcs = kept_crcs;
    }
}

fn zero_tag(mark: Mark) -> u32 {
    if mark.hole() { TAG_HOLE } else { TAG_ZERO }
}

fn zero_mark(word: u64, tag: u32) -> Mark {
    Mark::new(Lsn(word & !TOP), tag == TAG_HOLE)
}
