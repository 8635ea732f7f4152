//! Which ranges of which volumes are staged: disjoint runs, in order, joined where they touch.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::units::VolumeNumber;

/// A place in an image: its parts come in the order of volumes and offsets.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Place {
    /// The volume.
    pub volume: VolumeNumber,
    /// Byte in it.
    pub offset: u64,
}

/// A run of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    /// Its first byte.
    pub at: Place,
    /// Bytes.
    pub length: u64,
    /// It reads as zeros; else it has bytes of its own.
    pub zeros: bool,
}

/// Bytes of a range in a file: volume, whether zeros, offset, length; little-endian.
pub(super) const RANGE_BYTES: usize = 24;

impl Range {
    fn end(&self) -> u64 {
        self.at.offset + self.length
    }

    pub(super) fn encode(&self) -> [u8; RANGE_BYTES] {
        let mut bytes = [0; RANGE_BYTES];
        bytes[..4].copy_from_slice(&self.at.volume.0.to_le_bytes());
        bytes[4..8].copy_from_slice(&u32::from(self.zeros).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.at.offset.to_le_bytes());
        bytes[16..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// `None` where the bytes are no range.
    pub(super) fn decode(bytes: &[u8; RANGE_BYTES]) -> Option<Range> {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight"));
        let half = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
        let at = Place { volume: VolumeNumber(half(0)), offset: word(8) };
        let range = Range { at, length: word(16), zeros: half(4) == 1 };
        let sane = half(4) <= 1 && range.length > 0;
        (sane && range.at.offset.checked_add(range.length).is_some()).then_some(range)
    }
}

/// What a part of a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cover {
    /// It is staged.
    Data,
    /// It is staged, and reads as zeros.
    Zeros,
    /// It is as it was before.
    Below,
}

/// Disjoint ranges in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Ranges {
    /// By first byte: length, and whether it is zeros.
    runs: BTreeMap<Place, (u64, bool)>,
}

impl Ranges {
    /// Adds a range; where something is there already, it takes its place.
    pub(super) fn insert(&mut self, range: Range) {
        let Range { at, length, zeros } = range;
        let (mut from, mut to) = (at.offset, range.end());
        let before = self.runs.range(..at).next_back().map(|(place, run)| (*place, *run));
        if let Some((place, (run_length, run_zeros))) = before
            && place.volume == at.volume
        {
            let end = place.offset + run_length;
            if end >= from && run_zeros == zeros {
                (from, to) = (place.offset, to.max(end));
            } else if end > from {
                self.runs.insert(place, (from - place.offset, run_zeros));
                if end > to {
                    self.runs.insert(Place { offset: to, ..place }, (end - to, run_zeros));
                }
            }
        }
        let first = Place { offset: from, ..at };
        let behind = Place { offset: to, ..at };
        let covered: Vec<_> =
            self.runs.range(first..=behind).map(|(place, run)| (*place, *run)).collect();
        for (place, (run_length, run_zeros)) in covered {
            let end = place.offset + run_length;
            if run_zeros == zeros {
                self.runs.remove(&place);
                to = to.max(end);
            } else if place.offset < to {
                self.runs.remove(&place);
                if end > to {
                    self.runs.insert(Place { offset: to, ..place }, (end - to, run_zeros));
                }
            }
        }
        debug_assert!(to - from >= length);
        self.runs.insert(first, (to - from, zeros));
    }

    /// Forgets those of other volumes than these.
    pub(super) fn retain(&mut self, is_there: impl Fn(VolumeNumber) -> bool) {
        self.runs.retain(|at, _| is_there(at.volume));
    }

    /// The runs of a volume, in order.
    pub(super) fn of(&self, volume: VolumeNumber) -> impl Iterator<Item = Range> + '_ {
        let from = Place { volume, offset: 0 };
        let to = Place { volume, offset: u64::MAX };
        self.runs.range(from..=to).map(|(at, (length, zeros))| Range {
            at: *at,
            length: *length,
            zeros: *zeros,
        })
    }

    /// What `[offset, offset + length)` of a volume is, in order, without gaps.
    pub(super) fn parts(&self, at: Place, length: u64) -> Vec<(u64, u64, Cover)> {
        let end = at.offset + length;
        let mut parts = Vec::new();
        let mut next = at.offset;
        let before = self.runs.range(..at).next_back();
        let here = self.runs.range(at..Place { offset: end, ..at });
        for (place, (run_length, zeros)) in before.into_iter().chain(here) {
            let (from, to) = (place.offset.max(next), (place.offset + run_length).min(end));
            if place.volume != at.volume || from >= to {
                continue;
            }
            if from > next {
                parts.push((next, from - next, Cover::Below));
            }
            parts.push((from, to - from, if *zeros { Cover::Zeros } else { Cover::Data }));
            next = to;
        }
        if next < end {
            parts.push((next, end - next, Cover::Below));
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{Entropy, SeededEntropy};

    fn place(offset: u64) -> Place {
        Place { volume: VolumeNumber(2), offset }
    }

    #[test]
    fn ranges_say_of_each_byte_what_was_told_of_it_last() {
        let entropy = SeededEntropy::new(7);
        let random = |below: u64| entropy.next_u64() % below;
        for _ in 0..300 {
            let mut model = [Cover::Below; 64];
            let mut ranges = Ranges::default();
            // A neighbour must not show.
            for volume in [1, 3] {
                let at = Place { volume: VolumeNumber(volume), offset: 0 };
                ranges.insert(Range { at, length: 64, zeros: false });
            }
            for _ in 0..random(12) {
                let from = random(63);
                let length = 1 + random(64 - from);
                let zeros = random(2) == 0;
                ranges.insert(Range { at: place(from), length, zeros });
                let cover = if zeros { Cover::Zeros } else { Cover::Data };
                model[from as usize..(from + length) as usize].fill(cover);
            }
            let runs: Vec<Range> = ranges.of(VolumeNumber(2)).collect();
            for pair in runs.windows(2) {
                let touch = pair[0].end() == pair[1].at.offset;
                assert!(pair[0].end() <= pair[1].at.offset, "{runs:?}");
                assert!(!touch || pair[0].zeros != pair[1].zeros, "joined: {runs:?}");
            }
            let from = random(64);
            let length = 1 + random(64 - from);
            let mut next = from;
            for (offset, length, cover) in ranges.parts(place(from), length) {
                assert_eq!(offset, next);
                assert!(length > 0);
                next += length;
                for byte in offset..offset + length {
                    assert_eq!(model[byte as usize], cover, "byte {byte}: {runs:?}");
                }
            }
            assert_eq!(next, from + length);
        }
    }

    #[test]
    fn the_bytes_of_a_range_are_these() {
        let range = Range { at: place(0x1000), length: 0x2000, zeros: true };
        let golden = concat!(
            // volume, zeros
            "0200000001000000",
            // offset
            "0010000000000000",
            // length
            "0020000000000000",
        );
        assert_eq!(hex::encode(range.encode()), golden);
        assert_eq!(Range::decode(&range.encode()), Some(range));
        assert_eq!(Range::decode(&[0; RANGE_BYTES]), None, "no length");
        assert_eq!(Range::decode(&[0xff; RANGE_BYTES]), None);
    }
}
