//! Decides up to where to fold, and in which steps; touches nothing.

use super::VolumeNumber;
use crate::extent_map::{Piece, Source};
use crate::units::{BLOCK_BYTES, Lsn};

/// What the target is decided on.
#[derive(Clone, Copy, Debug)]
pub(super) struct FoldFacts {
    /// Up to where the base is complete.
    pub horizon: Lsn,
    /// After the last record.
    pub head: Lsn,
    /// Up to where the log is durable here.
    pub durable: Lsn,
    /// Up to where the primary is durable: what it could lose is not folded anywhere.
    pub committed: Lsn,
    /// The lowest position that an image needs.
    pub lowest_hold: Option<Lsn>,
    /// The first record that had to be understood and was not.
    pub barrier: Option<Lsn>,
    /// The end of what is older than the window.
    pub window_end: Lsn,
    /// Bytes that the log may take.
    pub log_limit_bytes: u64,
    /// Fold whatever may be folded, however little.
    pub forced: bool,
}

/// Where to fold to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FoldGoal {
    /// Up to here at most, to be rounded down to the end of a request.
    pub target: Lsn,
    /// The limit is reached and holds are in the way: they are broken.
    pub break_holds: bool,
    /// Space is short: should the target lie inside the very first request, all of it is folded
    /// where it ends by here. Else a long request would keep the log full for ever.
    pub first_request_to: Option<Lsn>,
}

/// Up to where to fold, if at all. The window gives way to the limit from 80 % on; nothing is
/// folded that is not durable and committed; holds give way only where the log is full. Little is
/// folded only when forced, since blocks that are written again and again are then folded once.
pub(super) fn fold_goal(facts: &FoldFacts) -> Option<FoldGoal> {
    let eighth = facts.log_limit_bytes / 8;
    let used = facts.head.bytes_since(facts.horizon);
    let soft = facts.log_limit_bytes / 10 * 8;
    let pressed = used >= soft;
    let full = used >= facts.log_limit_bytes;
    let for_space = if pressed {
        Lsn(facts.head.0 - soft.saturating_sub(eighth).min(facts.head.0))
    } else {
        Lsn::ZERO
    };
    let wanted = facts.window_end.max(for_space);
    let cap = facts.durable.min(facts.committed).min(facts.barrier.unwrap_or(Lsn::MAX));
    let held = facts.lowest_hold.unwrap_or(Lsn::MAX);
    let target = wanted.min(cap).min(held);
    let enough = if facts.forced { 1 } else { eighth.max(1) };
    let goal =
        FoldGoal { target, break_holds: false, first_request_to: pressed.then_some(cap.min(held)) };
    if target.bytes_since(facts.horizon) >= enough {
        return Some(goal);
    }
    let without_holds = wanted.min(cap);
    if full && held < wanted && without_holds.bytes_since(facts.horizon) >= enough {
        return Some(FoldGoal {
            target: without_holds,
            break_holds: true,
            first_request_to: Some(cap),
        });
    }
    (pressed && target > facts.horizon).then_some(goal)
}

/// A step of a fold over one volume. Offsets and lengths are multiples of 4096 except inside parts.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum FoldStep {
    /// These blocks read as zeros.
    Zero {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Position of the newest record in it.
        born: Lsn,
    },
    /// This block is one piece of the log.
    Copy {
        /// First byte.
        offset: u64,
        /// The piece.
        piece: Piece,
    },
    /// This block is put together from the base and these parts.
    Mend {
        /// First byte of the block.
        offset: u64,
        /// What is newer than the base, in order.
        parts: Vec<Piece>,
    },
}

/// The steps for one volume, in block order, from what its map holds; nothing at or behind
/// `size_bytes`.
pub(super) fn fold_steps(pieces: impl Iterator<Item = Piece>, size_bytes: u64) -> Vec<FoldStep> {
    let mut steps: Vec<FoldStep> = Vec::new();
    for piece in pieces {
        let mut piece = piece;
        if piece.offset >= size_bytes {
            break;
        }
        piece.length = piece.length.min(size_bytes - piece.offset);
        while piece.length > 0 {
            let (offset, length) = (piece.offset, piece.length);
            let in_block = offset % BLOCK_BYTES;
            let whole = match piece.source {
                Source::Base => {
                    break;
                }
                Source::Zero { .. } if in_block == 0 => length / BLOCK_BYTES * BLOCK_BYTES,
                Source::Log { piece_bytes, skip: 0, .. }
                    if in_block == 0
                        && length == BLOCK_BYTES
                        && u64::from(piece_bytes) == length =>
                {
                    length
                }
                _ => 0,
            };
            if whole > 0 {
                steps.push(match piece.source {
                    Source::Zero { since, .. } => {
                        FoldStep::Zero { offset, length: whole, born: since }
                    }
                    _ => FoldStep::Copy { offset, piece },
                });
                piece.offset += whole;
                piece.length -= whole;
                continue;
            }
            let count = (BLOCK_BYTES - in_block).min(length);
            let mut part = piece;
            part.length = count;
            match steps.last_mut() {
                Some(FoldStep::Mend { offset: block, parts }) if *block == offset - in_block => {
                    parts.push(part);
                }
                _ => steps.push(FoldStep::Mend { offset: offset - in_block, parts: vec![part] }),
            }
            piece.offset += count;
            piece.length -= count;
            if let Source::Log { skip, .. } = &mut piece.source {
                *skip += count as u32;
            }
        }
    }
    steps
}

/// The position that a piece was written at.
pub(super) fn written_at(source: &Source) -> Lsn {
    match *source {
        Source::Base => Lsn::ZERO,
        Source::Zero { since, .. } => since,
        Source::Log { piece, .. } => piece,
    }
}

/// Volumes whose base goes when the horizon moves.
pub(super) fn obsolete<'a>(
    in_base: impl Iterator<Item = &'a VolumeNumber>,
    kept: impl Fn(&VolumeNumber) -> bool,
) -> Vec<VolumeNumber> {
    in_base.filter(|number| !kept(number)).copied().collect()
}
