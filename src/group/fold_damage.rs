//! What a fold does with what has rotted under it: where a peer may have the bytes it waits for the
//! repair, while writers have room; then it goes on, since nothing else would bring it past.
//!
//! It waits before it has begun, so that the base stays what it was. What rots in the log later, or
//! what nobody has, goes into the base as damaged blocks. Such a block has a checksum that does not
//! hold: who reads it is told, and sees no other data. A whole block keeps the one that its record
//! has, and where all that is known of its parts joins to one, it gets that: a peer's block is
//! proved by it. A host that writes all of the block anew makes it whole.
//!
//! A damaged block of the base of which the log has a part, and that is waited for no more, stays
//! as it is, with a checksum that never holds: what a peer has of before lacks that part.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::json;

use super::GroupError;
use super::content::VolumeContent;
use super::engine::Group;
use super::fold_plan::written_at;
use super::read::Fetch;
use super::scrub::DamagedPart;
use crate::base::{BaseError, BaseVolume, is_sum_lost};
use crate::events::Severity;
use crate::extent_map::{Piece, Source};
use crate::log::reader::ScanEnd;
use crate::log::record::{crc32, crc32_joined};
use crate::units::{BLOCK_BYTES, CHUNK_BYTES, Lsn, Name, VolumeNumber};

/// What the disk cannot read for so long is lost, where writers need the room. An error that
/// passes, as where a path to the disk fails over, has passed by then.
const UNREAD_FOR: Duration = Duration::from_secs(10);

/// Something that the disk cannot read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Unread {
    /// A piece of the log.
    Piece(Lsn),
    /// A block of the base, by its first byte.
    Block(VolumeNumber, u64),
    /// Sums or slot of a chunk of the base.
    Sums(VolumeNumber, u64),
}

/// What folds know of the damage that they meet.
#[derive(Debug, Default)]
pub(super) struct Awaited {
    /// The record that is waited for: while it is damaged, nothing else is read again for a fold.
    record: Option<Lsn>,
    /// Up to here all of it was read whole: that is not done again while the base is waited for.
    whole_to: Lsn,
    /// Segments with damage that no peer can make good.
    nobody_has: BTreeSet<u64>,
    /// What could not be read in the present attempt, and since when in all of them (monotonic).
    unread: BTreeMap<Unread, Duration>,
    /// The same of the attempt before.
    unread_before: BTreeMap<Unread, Duration>,
}

impl Awaited {
    /// A fold is tried, perhaps again.
    pub(super) fn begin_attempt(&mut self) {
        self.unread_before = std::mem::take(&mut self.unread);
    }

    /// What could not be read has no meaning any more.
    pub(super) fn end_attempts(&mut self) {
        (self.unread, self.unread_before) = Default::default();
    }

    /// Notes what cannot be read now; for how long it could not be.
    fn unread_for(&mut self, what: Unread, now: Duration) -> Duration {
        let since = self.unread.get(&what).or(self.unread_before.get(&what)).copied();
        now.saturating_sub(*self.unread.entry(what).or_insert(since.unwrap_or(now)))
    }
}

/// The blocks that a fold leaves damaged: of which volume, and where.
pub(super) struct Rotted {
    blocks: Vec<(VolumeNumber, Name, u64)>,
    /// What the disk cannot read is not waited for.
    pub(super) gives_up: bool,
}

impl Rotted {
    pub(super) fn new(gives_up: bool) -> Rotted {
        Rotted { blocks: Vec::new(), gives_up }
    }

    pub(super) fn push(&mut self, known: &VolumeContent, offset: u64) {
        self.blocks.push((known.volume.number, known.volume.name.clone(), offset));
    }
}

/// The first thing that an attempt waits for. It goes on with all others, so that they are waited
/// for at the same time; the next attempt does all of it again.
#[derive(Default)]
pub(super) struct Waits(Option<GroupError>);

impl Waits {
    /// What came of a step, `None` where it waits.
    ///
    /// # Errors
    ///
    /// Any that is no wait.
    pub(super) fn pass<T>(&mut self, done: Result<T, GroupError>) -> Result<Option<T>, GroupError> {
        match done {
            Err(error @ GroupError::Waits { .. }) => {
                self.0.get_or_insert(error);
                Ok(None)
            }
            done => done.map(Some),
        }
    }

    pub(super) fn any(&self) -> bool {
        self.0.is_some()
    }

    /// All steps were tried.
    ///
    /// # Errors
    ///
    /// The first wait.
    pub(super) fn end(self) -> Result<(), GroupError> {
        self.0.map_or(Ok(()), Err)
    }
}

/// Whether a block was left damaged by a fold: its checksum has no bit in common with that of its
/// bytes, but perhaps the last one.
pub(super) fn is_left_damaged(cause: &BaseError) -> bool {
    matches!(cause, BaseError::Damaged { got, expected, .. } if *expected ^ !*got <= 1)
}

fn is_unread(cause: &BaseError) -> bool {
    matches!(cause, BaseError::Unread { .. })
}

impl Group {
    /// Fetches whole blocks from `offset` on; those that are damaged are zeros.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub(super) fn fetch_blocks(
        &self,
        known: &VolumeContent,
        offset: u64,
        pieces: Vec<Piece>,
        data: &mut [u8],
        rotted: &mut Rotted,
    ) -> Result<(), GroupError> {
        let volume = known.volume.number;
        let all = vec![Fetch { volume, pieces: pieces.clone(), buffer: &mut *data }];
        if self.fetch_checked(all).is_ok() {
            return Ok(());
        }
        let blocks = data.chunks_exact_mut(BLOCK_BYTES as usize);
        let mut waits = Waits::default();
        for ((index, buffer), piece) in blocks.enumerate().zip(pieces) {
            let fetched = self.fetch_or_zeros(volume, piece, buffer, rotted);
            if waits.pass(fetched)? == Some(false) {
                rotted.push(known, offset + index as u64 * BLOCK_BYTES);
            }
        }
        waits.end()
    }

    /// Fetches the parts of the block at `offset` that the log has into it; the block's checksum,
    /// which does not hold where one of them is damaged.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub(super) fn fetch_parts(
        &self,
        known: &VolumeContent,
        offset: u64,
        parts: Vec<Piece>,
        block: &mut [u8],
        rotted: &mut Rotted,
    ) -> Result<u32, GroupError> {
        // The checksum so far, as it would be of whole parts; up to where.
        let (mut sum, mut at) = (Some(crc32(&[])), 0);
        let (mut whole, mut waits) = (true, Waits::default());
        for part in parts {
            let (begin, bytes) = ((part.offset - offset) as usize, part.length as usize);
            sum = sum.map(|sum| joined(sum, &block[at..begin]));
            at = begin + bytes;
            let buffer = &mut block[begin..at];
            let fetched = self.fetch_or_zeros(known.volume.number, part, buffer, rotted);
            if waits.pass(fetched)?.unwrap_or(true) {
                sum = sum.map(|sum| joined(sum, buffer));
                continue;
            }
            whole = false;
            sum = match part.source {
                Source::Log { piece_bytes, crc, .. } if u64::from(piece_bytes) == part.length => {
                    sum.map(|sum| crc32_joined(sum, crc, part.length))
                }
                _ => None,
            };
        }
        waits.end()?;
        sum = sum.map(|sum| joined(sum, &block[at..]));
        if !whole {
            rotted.push(known, offset);
        }
        let never = !crc32(block);
        Ok(sum.unwrap_or(never))
    }

    /// A block of the base is damaged, of which a fold would keep a part: whether its checksum is
    /// that of the block with what the log has of it. Then that part is right. So it is where an
    /// earlier attempt wrote the block over what had rotted in the log.
    ///
    /// # Errors
    ///
    /// While what the log has of it is waited for; what the disk says.
    pub(super) fn is_proved(
        &self,
        known: &VolumeContent,
        base: &BaseVolume,
        offset: u64,
        parts: &[Piece],
        cause: &BaseError,
        gives_up: bool,
    ) -> Result<bool, GroupError> {
        let BaseError::Damaged { expected, .. } = cause else { return Ok(false) };
        let mut block = vec![0; BLOCK_BYTES as usize];
        if is_sum_lost(cause) || base.read_unchecked(offset, &mut block).is_err() {
            return Ok(false);
        }
        let mut rotted = Rotted::new(gives_up);
        let crc = self.fetch_parts(known, offset, parts.to_vec(), &mut block, &mut rotted)?;
        Ok(crc == *expected)
    }

    /// A block of the base is damaged, of which a fold would keep a part. Where what is here does
    /// not make it right, it stays as it is, and gets its checksum that never holds before the fold
    /// begins: one that is taken up again would else take it for a block that it had written in
    /// part, and call it good. What the disk cannot read may be there at the next attempt, and is
    /// waited for as [`Group::is_lost`] tells; then it is zeros, with such a checksum.
    ///
    /// # Errors
    ///
    /// The damage, while it is waited for; what the disk says.
    pub(super) fn leave_damaged(
        &self,
        base: &BaseVolume,
        offset: u64,
        cause: &BaseError,
        gives_up: bool,
    ) -> Result<(), GroupError> {
        if is_left_damaged(cause) {
            return Ok(());
        }
        let unread = is_unread(cause);
        if !unread {
            // The block may be whole, and its checksum not.
            self.mend_chunk(base, offset / CHUNK_BYTES, &BTreeMap::new())?;
        }
        if base.read(offset, &mut [0; BLOCK_BYTES as usize]).is_ok() {
            return Ok(());
        }
        let waits = match unread {
            true => !self.is_lost(Unread::Block(base.number(), offset), gives_up),
            // Once a fold has begun, no peer's block is taken.
            false => self.lock().unfinished_fold.is_none() && self.waits_for_peers() && !gives_up,
        };
        if waits {
            return Err(self.waits(cause.to_string()));
        }
        let born = self.lock().timeline.horizon().lsn;
        self.give_up_block(base, offset, born)
    }

    /// Looks whether what a fold will change of a chunk's sidecar can be read. What cannot is
    /// waited for as a block is, and then lost, but for what the blocks prove.
    ///
    /// # Errors
    ///
    /// While it is waited for; what the disk says.
    pub(super) fn check_sums(
        &self,
        base: &BaseVolume,
        chunk: u64,
        gives_up: bool,
    ) -> Result<(), GroupError> {
        let Err(cause) = base.look_at_sums(chunk) else { return Ok(()) };
        self.suspect(DamagedPart::Base { volume: base.number(), chunk });
        let (volume, at) = (base.number(), chunk * CHUNK_BYTES);
        if !self.is_lost(Unread::Sums(volume, chunk), gives_up) {
            return Err(self.waits(format!("sums of volume {volume} at {at}: {cause}")));
        }
        let lost = base.give_up_unread_sums(chunk);
        for chunk in lost.map_err(|cause| self.io("write sums of a base", &cause))? {
            self.mend_chunk(base, chunk, &BTreeMap::new())?;
        }
        Ok(())
    }

    /// The fold has begun, and a block of the base is damaged of which it would keep a part:
    /// whether it stays as it is. What was whole before it began has rotted since: a later attempt
    /// would take it for a block that this one had written in part, and call it good.
    ///
    /// # Errors
    ///
    /// While what cannot be read is waited for; what the disk says.
    pub(super) fn stays_damaged(
        &self,
        base: &BaseVolume,
        offset: u64,
        cause: &BaseError,
        born: Lsn,
        rotted: &Rotted,
    ) -> Result<bool, GroupError> {
        if is_left_damaged(cause) {
            return Ok(true);
        }
        if is_unread(cause) {
            self.suspect_block(cause);
            if base.read(offset, &mut [0; BLOCK_BYTES as usize]).is_ok() {
                return Ok(false);
            }
            if !self.is_lost(Unread::Block(base.number(), offset), rotted.gives_up) {
                return Err(self.waits(cause.to_string()));
            }
            return self.give_up_block(base, offset, born).map(|()| true);
        }
        // A crash in the middle of an earlier attempt at this very block may have left any of its
        // sectors new, the rest old, and a checksum of neither. What the log lacks is the same in
        // both. Nothing else excuses a wrong checksum: no attempt that waited, since all that it
        // wrote is whole. Nor a sum that was lost, since then nothing tells what the block is.
        if self.lock().may_be_torn && !is_sum_lost(cause) {
            return Ok(false);
        }
        self.suspect_block(cause);
        self.give_up_block(base, offset, born).map(|()| true)
    }

    /// Gives a block of the base a checksum that never holds, durably, and zeros where it cannot be
    /// read.
    fn give_up_block(&self, base: &BaseVolume, offset: u64, born: Lsn) -> Result<(), GroupError> {
        let write = |cause| self.io("write base", &cause);
        let sync = |cause| self.fail("sync of a base", &cause);
        let _gate = self.base_gate.write().expect("no holder panics");
        let is_read = base.give_up(offset, born).map_err(write)?;
        base.sync().map_err(sync)?;
        if is_read {
            return Ok(());
        }
        base.blank(offset).map_err(write)?;
        base.sync().map_err(sync)
    }

    /// Whether a fold waits for what is damaged: a peer may have it, and writers have room.
    fn waits_for_peers(&self) -> bool {
        let core = self.lock();
        let me = self.context.node.id;
        core.view.members.iter().any(|member| member.node != me) && !self.is_pressed(&core)
    }

    fn waits(&self, what: String) -> GroupError {
        GroupError::Waits { group: self.name().clone(), what }
    }

    /// Whether what the disk cannot read is waited for no longer: writers have no room left, and
    /// every attempt has failed there for a while. Or an image takes its place.
    fn is_lost(&self, what: Unread, gives_up: bool) -> bool {
        let now = self.context.env.clock.monotonic();
        let mut core = self.lock();
        let is_over = core.awaited.unread_for(what, now) >= UNREAD_FOR;
        gives_up || (is_over && self.log_is_full(&core))
    }

    /// Reads `[from, to)` of the log before a fold to there begins, where it would wait for a peer,
    /// and has a peer asked for all that is damaged.
    ///
    /// # Errors
    ///
    /// The first damage that a peer may have.
    pub(super) fn wait_for_records(&self, from: Lsn, to: Lsn) -> Result<(), GroupError> {
        if !self.waits_for_peers() {
            return Ok(());
        }
        let segment_bytes = self.segment_bytes();
        let awaited = self.lock().awaited.record.filter(|at| (from..to).contains(at));
        let mut first = awaited
            .filter(|at| self.chain_at(*at).is_some())
            .and_then(|at| self.awaited_in(at, at.advance(1)));
        let whole_to = self.lock().awaited.whole_to.min(to);
        if first.is_none() {
            let mut at = from.max(whole_to);
            while at < to {
                let end = Lsn((at.segment_number(segment_bytes) + 1) * segment_bytes).min(to);
                let found = self.awaited_in(at, end);
                first = first.or(found);
                at = end;
            }
        }
        {
            let awaited = &mut self.lock().awaited;
            awaited.record = first.as_ref().map(|(at, _)| *at);
            awaited.whole_to = if first.is_none() { to } else { from };
        }
        first.map_or(Ok(()), |(_, what)| Err(self.waits(what)))
    }

    /// The first damage in a part of a segment that a peer may have, with its place.
    fn awaited_in(&self, from: Lsn, to: Lsn) -> Option<(Lsn, String)> {
        let segment = from.segment_number(self.segment_bytes());
        if self.lock().awaited.nobody_has.contains(&segment) {
            return None;
        }
        let found = match self.chain_at(from) {
            Some(chain) => self.follow_whole(from, chain, to).err(),
            None => Some((from, ScanEnd::Chain)),
        };
        let (at, cause) = found?;
        self.suspect(DamagedPart::Log { segment });
        Some((at, self.describe(at, &cause)))
    }

    /// All peers were asked for what is damaged in a segment of the log, and none has it: folds
    /// wait for it no more.
    pub fn note_nobody_has(&self, segment: u64) {
        {
            let mut core = self.lock();
            let folded = core.timeline.horizon().lsn.segment_number(self.segment_bytes());
            let lost = &mut core.awaited.nobody_has;
            lost.retain(|segment| *segment >= folded);
            lost.insert(segment);
        }
        self.workers.wake_folder();
    }

    /// Something of a segment was repaired: what else is damaged of it, a peer may have.
    pub(super) fn note_repaired(&self, segment: u64) {
        self.lock().awaited.nobody_has.remove(&segment);
        self.workers.wake_folder();
    }

    /// Whether a piece is whole; one that is damaged is zeros. What the disk cannot read may be
    /// there at the next attempt: its segment is used again after this fold.
    fn fetch_or_zeros(
        &self,
        volume: VolumeNumber,
        piece: Piece,
        buffer: &mut [u8],
        rotted: &Rotted,
    ) -> Result<bool, GroupError> {
        let mut fetch = || {
            let fetch = Fetch { volume, pieces: vec![piece], buffer: &mut *buffer };
            self.fetch_checked(vec![fetch])
        };
        let fetched = fetch().or_else(|error| match error {
            GroupError::Io { .. } => fetch(),
            other => Err(other),
        });
        match fetched {
            Ok(()) => return Ok(true),
            Err(GroupError::Damaged { .. }) => {}
            Err(GroupError::Io { what, cause, .. }) => {
                if !self.is_lost(Unread::Piece(written_at(&piece.source)), rotted.gives_up) {
                    return Err(self.waits(format!("{what}: {cause}")));
                }
            }
            Err(other) => return Err(other),
        }
        buffer.fill(0);
        Ok(false)
    }

    /// Tells which blocks are damaged in the base now, and where they were before; has a peer
    /// asked for them.
    pub(super) fn tell_rotted(&self, rotted: &Rotted, place: &str) {
        let Some((_, volume, offset)) = rotted.blocks.first() else { return };
        let blocks = rotted.blocks.len();
        let text = format!(
            "{blocks} blocks were damaged in {place}, the first of volume {volume} at {offset}: \
             reading them is an error until a host has written all of them anew, or a peer has \
             given what it can"
        );
        let details = json!({ "volume": volume, "offset": offset, "blocks": blocks });
        self.emit(Severity::Error, "log-damaged", text, details);
        for (volume, _, offset) in &rotted.blocks {
            self.suspect(DamagedPart::Base { volume: *volume, chunk: offset / CHUNK_BYTES });
        }
    }
}

/// The checksum of what has `sum` with `bytes` behind it.
fn joined(sum: u32, bytes: &[u8]) -> u32 {
    crc32_joined(sum, crc32(bytes), bytes.len() as u64)
}
