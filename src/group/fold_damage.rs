//! What a fold does with payloads that have rotted in the log: it goes on, since nothing would
//! bring it past them, and their blocks go into the base as damaged ones.
//!
//! Such a block has a checksum that does not hold: who reads it is told, and sees no other data. A
//! whole block keeps the one that its record has, and where all that is known of its parts joins to
//! one, it gets that: a peer's block is proved by it. A host that writes all of the block anew
//! makes it whole.
//!
//! A damaged block of the base of which the log has a part is waited for while writers have room.
//! Then it stays as it is, with a checksum that never holds: what a peer has of before lacks that
//! part.

use std::collections::BTreeMap;

use serde_json::json;

use super::GroupError;
use super::content::VolumeContent;
use super::engine::Group;
use super::read::Fetch;
use super::scrub::DamagedPart;
use crate::base::{BaseError, BaseVolume};
use crate::events::Severity;
use crate::extent_map::{Piece, Source};
use crate::log::record::{crc32, crc32_joined};
use crate::units::{BLOCK_BYTES, CHUNK_BYTES, Name, VolumeNumber};

/// The blocks that a fold leaves damaged: of which volume, and where.
pub(super) struct Rotted {
    blocks: Vec<(VolumeNumber, Name, u64)>,
    /// What the disk cannot read is not waited for.
    gives_up: bool,
}

impl Rotted {
    pub(super) fn new(gives_up: bool) -> Rotted {
        Rotted { blocks: Vec::new(), gives_up }
    }

    pub(super) fn push(&mut self, known: &VolumeContent, offset: u64) {
        self.blocks.push((known.volume.number, known.volume.name.clone(), offset));
    }
}

/// Whether a block was left damaged by a fold: its checksum has no bit in common with that of its
/// bytes.
pub(super) fn is_left_damaged(cause: &BaseError) -> bool {
    matches!(cause, BaseError::Damaged { got, expected, .. } if *expected == !*got)
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
        for ((index, buffer), piece) in blocks.enumerate().zip(pieces) {
            if !self.fetch_or_zeros(volume, piece, buffer, rotted)? {
                rotted.push(known, offset + index as u64 * BLOCK_BYTES);
            }
        }
        Ok(())
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
        let mut whole = true;
        for part in parts {
            let (begin, bytes) = ((part.offset - offset) as usize, part.length as usize);
            sum = sum.map(|sum| joined(sum, &block[at..begin]));
            at = begin + bytes;
            let buffer = &mut block[begin..at];
            if self.fetch_or_zeros(known.volume.number, part, buffer, rotted)? {
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
        sum = sum.map(|sum| joined(sum, &block[at..]));
        if !whole {
            rotted.push(known, offset);
        }
        let never = !crc32(block);
        Ok(sum.unwrap_or(never))
    }

    /// A block of the base is damaged, of which a fold would keep a part. Where what is here does
    /// not make it right, it stays as it is, and gets its checksum that never holds before the fold
    /// begins: one that is taken up again would else take it for a block that it had written in
    /// part, and call it good.
    ///
    /// # Errors
    ///
    /// The damage, while writers have room and somebody may repair it; what the disk says.
    pub(super) fn leave_damaged(
        &self,
        base: &BaseVolume,
        offset: u64,
        cause: &BaseError,
    ) -> Result<(), GroupError> {
        if is_left_damaged(cause) {
            return Ok(());
        }
        let error = self.damaged(cause.to_string());
        if !matches!(cause, BaseError::Damaged { .. }) {
            return Err(error);
        }
        // The block may be whole, and its checksum not.
        self.mend_chunk(base, offset / CHUNK_BYTES, &BTreeMap::new())?;
        let mut block = vec![0; BLOCK_BYTES as usize];
        if base.read(offset, &mut block).is_ok() {
            return Ok(());
        }
        let (born, pressed) = {
            let core = self.lock();
            (core.timeline.horizon().lsn, self.is_pressed(&core))
        };
        if !pressed {
            return Err(error);
        }
        let _gate = self.base_gate.write().expect("no holder panics");
        base.read_unchecked(offset, &mut block)
            .and_then(|()| base.write_blocks(offset, &block, &[!crc32(&block)], born))
            .and_then(|()| base.settle())
            .map_err(|cause| self.io("write base", &cause))?;
        base.sync().map_err(|cause| self.fail("sync of a base", &cause))
    }

    /// Whether a piece is whole; one that is damaged is zeros. What the disk cannot read may be
    /// there at the next attempt, and is waited for while writers need no room.
    fn fetch_or_zeros(
        &self,
        volume: VolumeNumber,
        piece: Piece,
        buffer: &mut [u8],
        rotted: &Rotted,
    ) -> Result<bool, GroupError> {
        let fetch = Fetch { volume, pieces: vec![piece], buffer: &mut *buffer };
        match self.fetch_checked(vec![fetch]) {
            Ok(()) => return Ok(true),
            Err(GroupError::Damaged { .. }) => {}
            Err(error) => {
                if !rotted.gives_up && !self.is_pressed(&self.lock()) {
                    return Err(error);
                }
            }
        }
        buffer.fill(0);
        Ok(false)
    }

    /// Tells which blocks are damaged in the base now, and has a peer asked for them.
    pub(super) fn tell_rotted(&self, rotted: Rotted) {
        let Some((_, volume, offset)) = rotted.blocks.first() else { return };
        let blocks = rotted.blocks.len();
        let text = format!(
            "{blocks} blocks were damaged in the log, or in the base below what the log had of \
             them, the first of volume {volume} at {offset}: reading them is an error until a \
             host has written all of them anew, or a peer has given what it can"
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
