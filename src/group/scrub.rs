//! Reads again what is on disk, part by part, and says which parts are damaged: segments of the
//! log, chunks of the base with their sidecar, blocks kept for older moments.
//!
//! Nothing that is read here stays in the page cache. A fold that passes underneath makes no
//! damage: what looks damaged in the base is looked at again while nothing is folded, and what was
//! folded or cut meanwhile is gone, not damaged.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::GroupError;
use super::engine::Group;
use super::moment::{KEPT, Moment};
use crate::extent_map::Source;
use crate::log::reader::{ScanEnd, Scanner};
use crate::log::record::crc32;
use crate::units::{BLOCK_BYTES, CHUNK_BYTES, Chain, Lsn, VolumeNumber};

/// Parts that are remembered at most as looking damaged to a reader.
const SUSPECTS_MAX: usize = 256;

/// A part of what a group has on disk, as damage is counted and repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "part", rename_all = "kebab-case")]
pub enum DamagedPart {
    /// A segment of the log.
    Log {
        /// Its number.
        segment: u64,
    },
    /// A chunk of 1 MiB of a volume's base, with its part of the sidecar.
    Base {
        /// The volume's number.
        volume: VolumeNumber,
        /// The chunk's number in it.
        chunk: u64,
    },
    /// The blocks that folds have kept for an older moment.
    Kept {
        /// The moment's position.
        moment: Lsn,
    },
}

/// What a look at a part found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// All of it is as it was written; bytes that were read.
    Whole(u64),
    /// What is wrong.
    Damaged(String),
    /// It is not part of the group any more: folded, cut off, deleted.
    Gone,
    /// It cannot be told now: a fold or the merge of an image has stopped half-way.
    Unknown,
}

impl fmt::Display for DamagedPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DamagedPart::Log { segment } => write!(f, "segment {segment} of the log"),
            DamagedPart::Base { volume, chunk } => {
                write!(f, "chunk at {} of the base of volume {volume}", chunk * CHUNK_BYTES)
            }
            DamagedPart::Kept { moment } => write!(f, "blocks kept for lsn:{moment}"),
        }
    }
}

impl Group {
    /// Checks all headers and checksums of `[from, to)` of the log; bytes read. `from` is the start
    /// of a record.
    ///
    /// # Errors
    ///
    /// Where the damage is.
    pub fn check_log(&self, from: Lsn, to: Lsn) -> Result<u64, GroupError> {
        let head = self.lock().writer.head();
        let to = to.min(head);
        if from >= to {
            return Ok(0);
        }
        let Some(chain) = self.chain_at(from) else {
            // Folded since the caller asked where the log starts: nothing is wrong with it.
            if from < self.log_start() {
                return Err(self.not_in_log(from, head));
            }
            let segment = from.segment_number(self.segment_bytes());
            let what = format!("log at {from}, segment {segment}: no record starts here");
            return Err(self.damaged(what));
        };
        match self.follow_whole(from, chain, to) {
            Ok((end, _)) => Ok(end.bytes_since(from)),
            Err((at, ScanEnd::NoSegment(_))) => Err(self.not_in_log(at, head)),
            Err((at, cause)) => Err(self.damaged(self.describe(at, &cause))),
        }
    }

    /// Follows whole records from one that continues `chain` until `to`; where the last one ends,
    /// and its checksum.
    pub(super) fn follow_whole(
        &self,
        from: Lsn,
        chain: Chain,
        to: Lsn,
    ) -> Result<(Lsn, Chain), (Lsn, ScanEnd)> {
        let mut scanner = Scanner::new(&self.segments, from, chain).once();
        while scanner.at() < to {
            scanner.next(true).map_err(|cause| (scanner.at(), cause))?;
        }
        Ok((scanner.at(), scanner.chain()))
    }

    /// Where in the log something is wrong, and which blocks that concerns where it can be told.
    pub(super) fn describe(&self, at: Lsn, cause: &ScanEnd) -> String {
        let segment = at.segment_number(self.segment_bytes());
        let mut text = format!("log at {at}, segment {segment}: {cause}");
        if let ScanEnd::Payload(header) = cause
            && header.volume != VolumeNumber(0)
        {
            let (volume, offset) = (header.volume, header.offset);
            text += &format!(": {} bytes of volume {volume} at {offset}", header.payload_bytes);
        }
        text
    }

    /// Looks at a part again. What is damaged for good is `Damaged`, also where a fold was at work
    /// on it.
    #[must_use]
    pub fn check_part(&self, part: &DamagedPart) -> Found {
        match *part {
            DamagedPart::Log { segment } => self.check_segment(segment),
            DamagedPart::Base { volume, chunk } => self.check_chunk(volume, chunk),
            DamagedPart::Kept { moment } => self.check_kept(moment),
        }
    }

    fn check_segment(&self, segment: u64) -> Found {
        let positions = self.positions();
        let begin = Lsn(segment.saturating_mul(self.segment_bytes()));
        let end = begin.advance(self.segment_bytes());
        let durable_before = self.lock().durable_before;
        if let Some(mark) = durable_before.filter(|_| end > positions.head) {
            // The log ends before the damage, and goes on behind it.
            return match self.follow_whole(positions.head, positions.chain, mark) {
                Ok((end, _)) => Found::Whole(end.bytes_since(positions.head)),
                Err((at, cause)) => Found::Damaged(self.describe(at, &cause)),
            };
        }
        let to = end.min(positions.durable.min(positions.request_end));
        if end <= self.log_start() || begin >= positions.head {
            return Found::Gone;
        }
        let from = begin.max(self.log_start());
        if from >= to {
            return Found::Unknown;
        }
        let found = self.check_log(from, to);
        // Cut while it was read: what was found is of no log.
        if self.positions().cuts != positions.cuts {
            return Found::Unknown;
        }
        match found {
            Ok(bytes) => Found::Whole(bytes),
            Err(GroupError::NotCovered { .. }) => Found::Gone,
            Err(error) => Found::Damaged(what_of(error)),
        }
    }

    fn check_chunk(&self, volume: VolumeNumber, chunk: u64) -> Found {
        let examine = || -> Option<Result<u64, String>> {
            let base = self.base_of(volume)?;
            if chunk >= base.size_bytes().div_ceil(CHUNK_BYTES) {
                return None;
            }
            Some(match base.examine(chunk) {
                Ok(exam) if exam.is_whole() => Ok(exam.read_bytes()),
                Ok(exam) => Err(exam.what()),
                Err(error) => Err(error.to_string()),
            })
        };
        match examine() {
            None => return Found::Gone,
            Some(Ok(bytes)) => return Found::Whole(bytes),
            Some(Err(_)) => {}
        }
        let _no_fold = self.fold_lock.lock().expect("no holder panics");
        match examine() {
            None => Found::Gone,
            Some(Ok(bytes)) => Found::Whole(bytes),
            // What stopped half-way leaves torn blocks, which it makes right when it goes on.
            Some(Err(_)) if self.base_is_in_work() => Found::Unknown,
            Some(Err(what)) => Found::Damaged(what),
        }
    }

    /// Whether a fold or a merge has begun and not come to its end; for who holds the folder's
    /// lock.
    pub(super) fn base_is_in_work(&self) -> bool {
        self.merging().is_some() || self.lock().unfinished_fold.is_some()
    }

    fn check_kept(&self, lsn: Lsn) -> Found {
        let moment = self.lock().moments.get(&lsn).cloned();
        let Some(moment) = moment.filter(|moment| moment.broken().is_none()) else {
            return Found::Gone;
        };
        let found = check_moment(&moment);
        // Given up meanwhile, with its files.
        if moment.broken().is_some() { Found::Gone } else { found }
    }

    /// The volumes that have something in the base, with their chunks.
    #[must_use]
    pub fn base_chunks(&self) -> Vec<(VolumeNumber, u64)> {
        let bases = self.bases.read().expect("no holder panics");
        let chunks = |bytes: u64| bytes.div_ceil(CHUNK_BYTES);
        bases.iter().map(|(number, base)| (*number, chunks(base.size_bytes()))).collect()
    }

    /// The moments that folds have kept blocks for, with the bytes of them.
    #[must_use]
    pub fn kept_moments(&self) -> Vec<(Lsn, u64)> {
        let moments: Vec<_> = self.lock().moments.values().cloned().collect();
        moments.iter().map(|moment| (moment.lsn(), moment.cost().disk_bytes)).collect()
    }

    /// What looked damaged to readers since this was asked last.
    #[must_use]
    pub fn take_suspects(&self) -> Vec<DamagedPart> {
        let mut suspects = self.suspects.lock().expect("no holder panics");
        std::mem::take(&mut *suspects).into_iter().collect()
    }

    /// A reader found this damaged: whoever checks looks at it first.
    pub(super) fn suspect(&self, part: DamagedPart) {
        let mut suspects = self.suspects.lock().expect("no holder panics");
        if suspects.len() < SUSPECTS_MAX {
            suspects.insert(part);
        }
    }
}

/// An error's text without the group's name.
fn what_of(error: GroupError) -> String {
    match error {
        GroupError::Damaged { what, .. } => what,
        other => other.to_string(),
    }
}

fn check_moment(moment: &Moment) -> Found {
    let Some(blocks) = moment.blocks() else { return Found::Whole(0) };
    let mut bytes = vec![0; BLOCK_BYTES as usize];
    let (mut read, mut damaged) = (0, 0);
    let mut first = None;
    for (volume, map) in moment.maps() {
        for piece in map.pieces() {
            let Source::Log { piece: at, piece_bytes, crc, .. } = piece.source else { continue };
            let bytes = &mut bytes[..piece_bytes as usize];
            let whole = blocks.read_once(bytes, at.bytes_since(KEPT)).is_ok();
            read += u64::from(piece_bytes);
            if !whole || crc32(bytes) != crc {
                damaged += 1;
                first.get_or_insert((volume, piece.offset));
            }
        }
    }
    match first {
        None => Found::Whole(read),
        Some((volume, offset)) => Found::Damaged(format!(
            "blocks kept for lsn:{}: {damaged} differ from their sums, the first is of volume \
             {volume} at {offset}",
            moment.lsn()
        )),
    }
}
