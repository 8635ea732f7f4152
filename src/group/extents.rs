//! What ranges hold, in the words of block status.

use super::engine::Group;
use super::ranges::Cover;
use super::read::{Lookup, is_kept_now};
use super::{Allocation, Extent, GroupError};
use crate::extent_map::Source;
use crate::units::{BLOCK_BYTES, VolumeNumber};

/// Pieces that one look at the map yields at most where a range may be of any length.
const PIECES_PER_LOOK: usize = 1024;

impl Group {
    /// What a range holds, in the words of block status.
    pub(super) fn extents_through(
        &self,
        lookup: &dyn Lookup,
        volume: VolumeNumber,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Result<Vec<Extent>, GroupError> {
        let end = offset.saturating_add(length);
        let mut at = offset;
        let mut extents: Vec<Extent> = Vec::new();
        // In steps, so that a writer never waits for more than a step's look at the map.
        'look: loop {
            let mut found = Ok(Vec::new());
            lookup.with_content(&mut |content| {
                let (moment, range) = (lookup.moment(), (at, end - at));
                let moment = moment.as_deref();
                found = self.look_up_some(content, moment, volume, range, PIECES_PER_LOOK);
            });
            for piece in found? {
                let more = match piece.source {
                    Source::Log { .. } => {
                        let (offset, length) = (piece.offset, piece.length);
                        let allocation = Allocation::Data;
                        add_extent(&mut extents, limit, Extent { offset, length, allocation })
                    }
                    Source::Zero { hole, .. } => {
                        let allocation = if hole { Allocation::Hole } else { Allocation::Zero };
                        let (offset, length) = (piece.offset, piece.length);
                        add_extent(&mut extents, limit, Extent { offset, length, allocation })
                    }
                    Source::Base => {
                        let found = self.base_extents(volume, piece.offset, piece.length, limit)?;
                        if is_kept_now(lookup.moment().as_deref(), volume, &[piece]) {
                            continue 'look;
                        }
                        found.into_iter().all(|extent| add_extent(&mut extents, limit, extent))
                    }
                };
                if !more {
                    return Ok(extents);
                }
                at = piece.offset + piece.length;
            }
            if at >= end {
                return Ok(extents);
            }
        }
    }

    fn base_extents(
        &self,
        volume: VolumeNumber,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Result<Vec<Extent>, GroupError> {
        let hole = |offset, length| Extent { offset, length, allocation: Allocation::Hole };
        if let Some(merging) = self.partial_merge() {
            let mut extents = Vec::new();
            for (offset, length, cover) in merging.parts(volume, offset, length) {
                let allocation =
                    if cover == Cover::Zeros { Allocation::Hole } else { Allocation::Data };
                if !add_extent(&mut extents, limit, Extent { offset, length, allocation }) {
                    break;
                }
            }
            return Ok(extents);
        }
        let Some(base) = self.base_of(volume) else { return Ok(vec![hole(offset, length)]) };
        let inside = base.size_bytes().saturating_sub(offset).min(length);
        let mut extents = Vec::new();
        let mut end = offset;
        if inside > 0 {
            // The base knows blocks: what it says of those at the edges is cut.
            let blocks = offset / BLOCK_BYTES * BLOCK_BYTES;
            let blocks_bytes = (offset + inside).next_multiple_of(BLOCK_BYTES) - blocks;
            for (from, run_bytes, is_data) in base.allocation(blocks, blocks_bytes, limit) {
                let allocation = if is_data { Allocation::Data } else { Allocation::Hole };
                let begin = from.max(offset);
                end = (from + run_bytes).min(offset + inside);
                extents.push(Extent { offset: begin, length: end - begin, allocation });
            }
        }
        if end == offset + inside && inside < length {
            extents.push(hole(end, length - inside));
        }
        Ok(extents)
    }
}

/// Adds what follows; `false` where it does not follow, or there are enough.
fn add_extent(extents: &mut Vec<Extent>, limit: usize, extent: Extent) -> bool {
    let full = extents.len() >= limit;
    match extents.last_mut() {
        // The base answered in part: the answer ends there.
        Some(last) if last.offset + last.length != extent.offset => return false,
        Some(last) if last.allocation == extent.allocation => last.length += extent.length,
        _ if full => return false,
        _ => extents.push(extent),
    }
    true
}
