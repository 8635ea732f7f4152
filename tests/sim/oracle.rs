//! What the hosts know of one group, and what must therefore hold of every image of it anywhere.
//!
//! Every sector that is written carries its request, its place and a checksum. What one node took
//! from its hosts in one reign is a *line*: requests in the order in which they were appended. A
//! line begins where its node's image was when it took its first request, which is a prefix of an
//! earlier line; so the lines are a tree, as histories are after failovers. An image is right if it
//! is exactly what some line was after some number of its requests.

use std::collections::HashMap;

/// Bytes of a sector, the unit of what hosts write here.
pub const SECTOR: usize = 512;
/// Sectors of one volume.
pub const SECTORS: usize = 64;
/// Volumes of a group.
pub const VOLUMES: usize = 2;

const MAGIC: [u8; 4] = *b"SIM\x01";
const SUM_AT: usize = SECTOR - 4;

/// What each sector of all volumes holds: the request that wrote it, 0 where it reads as zeros.
pub type Held = [u64; VOLUMES * SECTORS];

/// What a host asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Stamped sectors.
    Write,
    /// Zeros.
    Zero,
    /// Given back.
    Trim,
    /// What was answered before is to be durable.
    Flush,
    /// All volumes are what they were at an earlier moment.
    Rewind,
}

/// A request, by its number minus one in [`Oracle::requests`].
#[derive(Clone, Debug)]
pub struct Request {
    /// What it is.
    pub what: What,
    /// Volume, from 0.
    pub volume: usize,
    /// First sector.
    pub sector: usize,
    /// Sectors.
    pub count: usize,
    /// Durable when it is answered.
    pub fua: bool,
    /// Its host had the answer.
    pub answered: bool,
    /// When its host made it, by the world's time.
    pub sent: u64,
    /// Nodes on whose disk an answered flush covers it, a bit each.
    pub flushed: u32,
    /// A power failure or a failed disk may have taken it: no answered flush covered it then.
    pub excused: bool,
    /// Where it is, if it was appended.
    pub place: Option<Place>,
    /// Of a flush: the requests that were answered when it was sent, as the end of each line.
    pub covers: Vec<Place>,
}

/// What a line was after `index` requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The line.
    pub line: usize,
    /// Its requests up to there, those of the lines before it left out.
    pub index: usize,
}

struct Line {
    /// Who took its requests.
    node: usize,
    /// Where it left earlier lines: one place, or several where all show the same.
    parents: Vec<Place>,
    requests: Vec<u64>,
    held: Held,
    print: u64,
    /// So many of its requests are answered, without a gap.
    answered: usize,
}

/// All lines of a group.
pub struct Oracle {
    /// All requests.
    pub requests: Vec<Request>,
    lines: Vec<Line>,
    states: HashMap<u64, Vec<Place>>,
}

impl Request {
    /// One that was not sent yet, of nothing.
    pub fn new(what: What) -> Request {
        Request {
            what,
            volume: 0,
            sector: 0,
            count: 0,
            fua: false,
            answered: false,
            sent: 0,
            flushed: 0,
            excused: false,
            place: None,
            covers: Vec::new(),
        }
    }
}

fn mix(mut value: u64) -> u64 {
    value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The part of a fingerprint that one sector adds; nothing where it reads as zeros.
fn part(sector: usize, id: u64) -> u64 {
    if id == 0 { 0 } else { mix(mix(sector as u64) ^ id) }
}

fn fingerprint(held: &Held) -> u64 {
    held.iter().enumerate().fold(0, |print, (sector, id)| print ^ part(sector, *id))
}

/// The checksum of a stamp. No CRC: with its own CRC behind it all data has the same one, so that
/// those of log and base would tell no stamps apart.
fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(8).map(|part| {
        let mut word = [0; 8];
        word[..part.len()].copy_from_slice(part);
        u64::from_le_bytes(word)
    });
    words.fold(0, |sum, word| (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29))
        as u32
}

/// Writes the sector that a request leaves at a place.
pub fn stamp(sector: &mut [u8], id: u64, volume: usize, number: usize) {
    sector[..4].copy_from_slice(&MAGIC);
    sector[4..6].copy_from_slice(&(volume as u16).to_le_bytes());
    sector[6..8].copy_from_slice(&(number as u16).to_le_bytes());
    sector[8..16].copy_from_slice(&id.to_le_bytes());
    let mut filler = mix(id ^ (number as u64) << 48);
    for bytes in sector[16..SUM_AT].chunks_mut(8) {
        filler ^= filler << 13;
        filler ^= filler >> 7;
        filler ^= filler << 17;
        bytes.copy_from_slice(&filler.to_le_bytes()[..bytes.len()]);
    }
    let sum = sum(&sector[..SUM_AT]);
    sector[SUM_AT..].copy_from_slice(&sum.to_le_bytes());
}

/// The request in a stamp, with volume and sector; `None` where it is no whole stamp.
pub fn read_stamp(sector: &[u8]) -> Option<(u64, usize, usize)> {
    let stored = u32::from_le_bytes(sector[SUM_AT..].try_into().ok()?);
    if sector[..4] != MAGIC || sum(&sector[..SUM_AT]) != stored {
        return None;
    }
    let short = |at: usize| usize::from(u16::from_le_bytes([sector[at], sector[at + 1]]));
    Some((u64::from_le_bytes(sector[8..16].try_into().ok()?), short(4), short(6)))
}

impl Oracle {
    /// Volumes of zeros.
    pub fn new() -> Oracle {
        let root = Line {
            node: usize::MAX,
            parents: Vec::new(),
            requests: Vec::new(),
            held: [0; VOLUMES * SECTORS],
            print: 0,
            answered: 0,
        };
        let states = HashMap::from([(0, vec![Place { line: 0, index: 0 }])]);
        Oracle { requests: Vec::new(), lines: vec![root], states }
    }

    /// A request is about to be sent; its number.
    pub fn send(&mut self, mut request: Request) -> u64 {
        if request.what == What::Flush {
            request.covers = (0..self.lines.len())
                .map(|line| Place { line, index: self.lines[line].answered })
                .filter(|place| place.index > 0)
                .collect();
        }
        self.requests.push(request);
        self.requests.len() as u64
    }

    /// A request.
    pub fn request(&self, id: u64) -> &Request {
        &self.requests[id as usize - 1]
    }

    /// When the last request that a place holds was made; 0 where its line holds none.
    pub fn sent_at(&self, place: Place) -> u64 {
        let last = place.index.checked_sub(1);
        last.map_or(0, |last| self.request(self.lines[place.line].requests[last]).sent)
    }

    fn request_mut(&mut self, id: u64) -> &mut Request {
        &mut self.requests[id as usize - 1]
    }

    /// A node takes its first request: a line begins at what its image is.
    pub fn begin(&mut self, node: usize, parents: Vec<Place>, held: Held) -> usize {
        let print = fingerprint(&held);
        let requests = Vec::new();
        self.lines.push(Line { node, parents, requests, held, print, answered: 0 });
        let line = self.lines.len() - 1;
        self.states.entry(print).or_default().push(Place { line, index: 0 });
        line
    }

    /// A line beside the end of another, for requests that failed and may be in the log or not.
    pub fn fork(&mut self, node: usize, line: usize) -> usize {
        let held = self.lines[line].held;
        self.begin(node, vec![self.end_of(line)], held)
    }

    /// A request was appended to a line, or may have been.
    pub fn append(&mut self, line: usize, id: u64) {
        let Request { what, volume, sector, count, .. } = *self.request(id);
        let at = &mut self.lines[line];
        let first = volume * SECTORS + sector;
        if what != What::Flush {
            let new = if what == What::Write { id } else { 0 };
            for (number, held) in at.held.iter_mut().enumerate().skip(first).take(count) {
                at.print ^= part(number, *held) ^ part(number, new);
                *held = new;
            }
        }
        self.push(line, id);
    }

    /// A rewind was appended to a line, or may have been: from here on it is what it was.
    pub fn go_back(&mut self, line: usize, id: u64, held: Held) {
        (self.lines[line].held, self.lines[line].print) = (held, fingerprint(&held));
        self.push(line, id);
    }

    fn push(&mut self, line: usize, id: u64) {
        let at = &mut self.lines[line];
        at.requests.push(id);
        let place = Place { line, index: at.requests.len() };
        let print = at.print;
        self.states.entry(print).or_default().push(place);
        self.request_mut(id).place = Some(place);
    }

    /// The node that took a line's requests.
    pub fn node_of(&self, line: usize) -> usize {
        self.lines[line].node
    }

    /// The end of a line.
    pub fn end_of(&self, line: usize) -> Place {
        Place { line, index: self.lines[line].requests.len() }
    }

    /// A host has the answer to a request.
    pub fn answer(&mut self, id: u64) {
        self.request_mut(id).answered = true;
        let request = self.request(id);
        let (what, fua, place) = (request.what, request.fua, request.place);
        let Some(place) = place else { return };
        while let Some(next) = {
            let line = &self.lines[place.line];
            line.requests.get(line.answered).copied()
        } && self.request(next).answered
        {
            self.lines[place.line].answered += 1;
        }
        if what == What::Flush {
            for covered in self.request(id).covers.clone() {
                if self.includes(place, covered) {
                    self.note_flushed(self.node_of(place.line), covered);
                }
            }
        }
        if fua {
            self.note_flushed(self.node_of(place.line), place);
        }
    }

    /// All up to a place survives a power failure of `node`.
    fn note_flushed(&mut self, node: usize, mut place: Place) {
        loop {
            for index in (0..place.index).rev() {
                let id = self.lines[place.line].requests[index];
                let nodes = &mut self.request_mut(id).flushed;
                if *nodes & 1 << node != 0 {
                    return;
                }
                *nodes |= 1 << node;
            }
            // Where it is not known which of several lines goes on here, less is demanded.
            match self.lines[place.line].parents[..] {
                [parent] => place = parent,
                _ => return,
            }
        }
    }

    /// Up to where all that a place holds was flushed on a node, as far as that is known: another
    /// that reigned behind it may have flushed more of it, on its own disk.
    pub fn flushed(&self, node: usize, mut place: Place) -> Option<Place> {
        let on_it = |id: &u64| self.request(*id).flushed & 1 << node != 0;
        loop {
            let requests = &self.lines[place.line].requests[..place.index];
            if let Some(index) = requests.iter().rposition(on_it) {
                return Some(Place { line: place.line, index: index + 1 });
            }
            match self.lines[place.line].parents[..] {
                [parent] => place = parent,
                _ => return None,
            }
        }
    }

    /// The power of `node` failed when its cache held what is at `place`: of what it wrote, all
    /// that no flush covered may be gone.
    pub fn excuse(&mut self, node: usize, place: Place) {
        for index in 0..place.index {
            let line = &self.lines[place.line];
            let id = line.requests[index];
            if line.node == node && self.request(id).flushed == 0 {
                self.request_mut(id).excused = true;
            }
        }
        for parent in self.lines[place.line].parents.clone() {
            self.excuse(node, parent);
        }
    }

    /// A place without the flushes at its end: they change nothing, and no log has them.
    fn without_flushes(&self, Place { line, index }: Place) -> Place {
        let changes = |id: &u64| self.request(*id).what != What::Flush;
        let last = self.lines[line].requests[..index].iter().rposition(changes);
        Place { line, index: last.map_or(0, |last| last + 1) }
    }

    /// Whether what a line was at `small` is a beginning of what it was at `large`.
    pub fn includes(&self, large: Place, small: Place) -> bool {
        let small = self.without_flushes(small);
        if large.line == small.line {
            return small.index <= large.index;
        }
        let beginning = &self.lines[small.line].parents;
        // The beginning of a line is where it left another.
        if small.index == 0 && beginning.iter().any(|parent| self.includes(large, *parent)) {
            return true;
        }
        let parents = &self.lines[large.line].parents;
        parents.iter().any(|parent| self.includes(*parent, small))
    }

    /// What the bytes of all volumes hold.
    pub fn read(&self, volumes: &[Vec<u8>; VOLUMES]) -> Result<Held, String> {
        let mut held = [0; VOLUMES * SECTORS];
        for (volume, bytes) in volumes.iter().enumerate() {
            for (sector, found) in bytes.chunks_exact(SECTOR).enumerate() {
                if found[..4] == [0; 4] && found.iter().all(|byte| *byte == 0) {
                    continue;
                }
                held[volume * SECTORS + sector] = match read_stamp(found) {
                    Some((id, v, s)) if (v, s) == (volume, sector) => id,
                    other => {
                        return Err(format!(
                            "volume {volume}, sector {sector}: torn, misplaced or foreign: {other:?}"
                        ));
                    }
                };
            }
        }
        Ok(held)
    }

    /// Every place that an image may be at, oldest first; an error where it is no prefix of
    /// anything.
    pub fn places(&self, held: &Held) -> Result<&[Place], String> {
        if let Some(places) = self.states.get(&fingerprint(held)) {
            return Ok(places);
        }
        let newest = held.iter().max().copied().unwrap_or(0);
        let unknown = newest > self.requests.len() as u64;
        let place = (!unknown && newest > 0).then(|| self.request(newest).place).flatten();
        Err(format!(
            "an image that is no prefix of any line: its newest request is {newest} ({}), which \
             is at {place:?}; it holds {held:?}",
            if unknown { "never sent" } else { "sent" }
        ))
    }

    /// Of the places of an image those that hold one of what it must, or all where it must hold
    /// nothing.
    pub fn holding(&self, places: &[Place], must: &[Place]) -> Vec<Place> {
        let holds =
            |place: &Place| must.is_empty() || must.iter().any(|must| self.includes(*place, *must));
        places.iter().copied().filter(holds).collect()
    }

    /// Answered writes that an image at any of `places` lacks, and that no power failure excuses.
    pub fn missing(&self, places: &[Place]) -> Vec<u64> {
        (1..=self.requests.len() as u64)
            .filter(|id| {
                let request = self.request(*id);
                let lost = request.answered && !request.excused && request.what == What::Write;
                let lacks = |at: Place| !places.iter().any(|place| self.includes(*place, at));
                lost && request.place.is_some_and(lacks)
            })
            .collect()
    }
}

/// Images that are wrong, each in one way: the oracle must see it.
pub fn check_teeth() {
    let mut oracle = Oracle::new();
    let request = |what, sector, count| Request { sector, count, ..Request::new(what) };
    let line = oracle.begin(0, vec![Place { line: 0, index: 0 }], [0; VOLUMES * SECTORS]);
    for (sector, count) in [(0, 1), (1, 1), (0, 2)] {
        let id = oracle.send(request(What::Write, sector, count));
        oracle.append(line, id);
        oracle.answer(id);
    }
    let image = |first: u64, second: u64| {
        let mut held = [0; VOLUMES * SECTORS];
        (held[0], held[1]) = (first, second);
        held
    };
    for (first, second) in [(0, 0), (1, 0), (1, 2), (3, 3)] {
        assert!(oracle.places(&image(first, second)).is_ok(), "{first} {second} is a prefix");
    }
    for (first, second) in [(0, 2), (3, 2), (1, 3), (9, 0)] {
        assert!(oracle.places(&image(first, second)).is_err(), "{first} {second} is none");
    }
    let flush = oracle.send(request(What::Flush, 0, 0));
    oracle.append(line, flush);
    assert_eq!(oracle.flushed(0, oracle.end_of(line)), None, "not answered yet");
    oracle.answer(flush);
    assert_eq!(oracle.flushed(0, oracle.end_of(line)), Some(Place { line, index: 3 }));
    assert_eq!(oracle.flushed(1, oracle.end_of(line)), None, "on the disk of another");
    let other = oracle.begin(1, vec![Place { line, index: 1 }], image(1, 0));
    assert!(oracle.includes(Place { line: other, index: 0 }, Place { line, index: 1 }));
    assert!(!oracle.includes(Place { line: other, index: 0 }, Place { line, index: 2 }));
    assert_eq!(oracle.missing(&[Place { line: other, index: 0 }]), [2, 3]);
    let mut bytes = [vec![0; SECTORS * SECTOR], vec![0; SECTORS * SECTOR]];
    stamp(&mut bytes[0][SECTOR..2 * SECTOR], 2, 0, 1);
    assert_eq!(oracle.read(&bytes).map(|held| held[1]), Ok(2));
    bytes[0][SECTOR + 300] ^= 1;
    assert!(oracle.read(&bytes).is_err(), "a torn sector");
    stamp(&mut bytes[0][SECTOR..2 * SECTOR], 2, 0, 2);
    assert!(oracle.read(&bytes).is_err(), "a misplaced sector");
}
