//! Decides up to where to fold, in which steps, and what that changes; touches nothing.

use super::rewound::Rewinds;
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
    /// The first record that had to be understood and was not.
    pub barrier: Option<Lsn>,
    /// The end of what is older than the window.
    pub window_end: Lsn,
    /// Bytes that the log may take.
    pub log_limit_bytes: u64,
    /// Nothing inside the window is folded, however short space is: writers wait.
    pub window_is_kept: bool,
    /// Fold whatever may be folded, however little.
    pub forced: bool,
}

/// Where to fold to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FoldGoal {
    /// Up to here at most, to be rounded down to the end of a request.
    pub target: Lsn,
    /// Space is short: should the target lie inside the very first request, all of it is folded
    /// where it ends by here. Else a long request would keep the log full for ever.
    pub first_request_to: Option<Lsn>,
}

/// Up to where to fold, if at all. The window gives way to the limit from 80 % on, unless it is to
/// be kept; nothing is folded that is not durable and committed; who needs an old moment is in
/// nobody's way. Little is folded only when forced or where space is short, since blocks that are
/// written again and again are then folded once. What a rewind has left behind is folded
/// as a whole, with the rewind.
pub(super) fn fold_goal(facts: &FoldFacts, rewinds: &Rewinds) -> Option<FoldGoal> {
    let eighth = facts.log_limit_bytes / 8;
    let used = facts.head.bytes_since(facts.horizon);
    let soft = facts.log_limit_bytes / 10 * 8;
    let pressed = used >= soft;
    let for_space = if pressed {
        Lsn(facts.head.0 - soft.saturating_sub(eighth).min(facts.head.0))
    } else {
        Lsn::ZERO
    };
    let wanted = facts.window_end.max(for_space);
    let kept_from = if facts.window_is_kept { facts.window_end } else { Lsn::MAX };
    let barrier = facts.barrier.unwrap_or(Lsn::MAX);
    let cap = facts.durable.min(facts.committed).min(barrier).min(kept_from);
    let wanted = wanted.min(cap);
    let mut target = rewinds.stop_before(wanted);
    if pressed && target <= facts.horizon {
        // It begins at the horizon: all of it at once, as soon as that may be.
        let inside = wanted.max(Lsn(facts.horizon.0 + 1));
        let behind = rewinds.stop_behind(inside);
        if behind > inside && behind <= cap {
            target = behind;
        }
    }
    let enough = if facts.forced { 1 } else { eighth.max(1) };
    let goal = FoldGoal { target, first_request_to: pressed.then_some(cap) };
    let due = target.bytes_since(facts.horizon) >= enough;
    (due || (pressed && target > facts.horizon)).then_some(goal)
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

/// Blocks `[from, to)` of a volume that a fold changes for whoever needs an older moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Change {
    /// Number of the first block.
    pub from: u64,
    /// Number of the block behind the last.
    pub to: u64,
}

/// What of a volume of `size_bytes` was written at or behind `since`, in whole blocks, in order.
pub(super) fn changes(
    pieces: impl Iterator<Item = Piece>,
    since: Lsn,
    size_bytes: u64,
) -> Vec<Change> {
    let changed = pieces
        .take_while(|piece| piece.offset < size_bytes)
        .filter(|piece| piece.source != Source::Base && written_at(&piece.source) >= since)
        .map(|piece| Change {
            from: piece.offset / BLOCK_BYTES,
            to: (piece.offset + piece.length).min(size_bytes).div_ceil(BLOCK_BYTES),
        });
    joined(changed)
}

/// The blocks that are in either of two lists, in order.
pub(super) fn either(mut one: Vec<Change>, other: Vec<Change>) -> Vec<Change> {
    one.extend(other);
    one.sort_unstable();
    joined(one.into_iter())
}

fn joined(changes: impl Iterator<Item = Change>) -> Vec<Change> {
    let mut joined: Vec<Change> = Vec::new();
    for change in changes {
        match joined.last_mut() {
            Some(last) if change.from <= last.to => last.to = last.to.max(change.to),
            _ => joined.push(change),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::super::rewound::Rewind;
    use super::*;

    #[test]
    fn the_window_gives_way_to_the_limit_unless_it_is_to_be_kept() {
        let facts = FoldFacts {
            horizon: Lsn(0),
            head: Lsn(900),
            durable: Lsn(900),
            committed: Lsn(880),
            barrier: None,
            window_end: Lsn(50),
            log_limit_bytes: 1000,
            window_is_kept: false,
            forced: false,
        };
        let target =
            |facts: &FoldFacts| fold_goal(facts, &Rewinds::default()).map(|goal| goal.target);
        let goal = fold_goal(&facts, &Rewinds::default()).unwrap();
        assert_eq!(goal, FoldGoal { target: Lsn(225), first_request_to: Some(Lsn(880)) });
        let kept = FoldFacts { window_is_kept: true, ..facts };
        let goal = fold_goal(&kept, &Rewinds::default()).unwrap();
        assert_eq!(goal, FoldGoal { target: Lsn(50), first_request_to: Some(Lsn(50)) });
        assert_eq!(target(&FoldFacts { window_end: Lsn(0), ..kept }), None, "writers wait");
        // Below 80 %, and less than an eighth.
        assert_eq!(target(&FoldFacts { head: Lsn(799), ..facts }), None);
        assert_eq!(target(&FoldFacts { head: Lsn(799), forced: true, ..facts }), Some(Lsn(50)));
    }

    #[test]
    fn what_a_fold_changes_is_whole_blocks_at_or_behind_the_moment() {
        let log = |offset, length, at| Piece {
            offset,
            length,
            source: Source::Log { piece: Lsn(at), piece_bytes: 4096, skip: 0, crc: 0 },
        };
        let zero = |offset, length, at| Piece {
            offset,
            length,
            source: Source::Zero { since: Lsn(at), hole: true },
        };
        let found = |pieces: &[Piece]| changes(pieces.iter().copied(), Lsn(100), 16 << 12);
        let change = |from, to| Change { from, to };
        assert_eq!(found(&[log(0, 4096, 99), log(4096, 4096, 100)]), [change(1, 2)]);
        assert_eq!(found(&[log(0, 4096, 100), log(4096, 4096, 200)]), [change(0, 2)]);
        assert_eq!(
            found(&[zero(512, 512, 100), zero(8192, 1 << 20, 100)]),
            [change(0, 1), change(2, 16)]
        );
        // A block in two pieces is in one change.
        assert_eq!(found(&[log(0, 512, 100), zero(512, 7680, 100)]), [change(0, 2)]);
        assert_eq!(found(&[zero(0, 512, 100), log(512, 512, 100)]), [change(0, 1)]);
        assert_eq!(found(&[log(16 << 12, 4096, 100)]), []);
        let (one, other) = (vec![change(0, 2), change(8, 9)], vec![change(1, 4), change(9, 10)]);
        assert_eq!(either(one, other), [change(0, 4), change(8, 10)]);
    }

    #[test]
    fn a_fold_stops_in_front_of_what_a_rewind_left_behind_or_takes_all_of_it() {
        let mut rewinds = Rewinds::default();
        rewinds.push(Rewind { at: Lsn(600), end: Lsn(610), to: Lsn(200) });
        let facts = FoldFacts {
            horizon: Lsn(100),
            head: Lsn(700),
            durable: Lsn(700),
            committed: Lsn(700),
            barrier: None,
            window_end: Lsn(400),
            window_is_kept: false,
            log_limit_bytes: 10_000,
            forced: true,
        };
        let goal = |facts: FoldFacts| fold_goal(&facts, &rewinds).map(|goal| goal.target);
        assert_eq!(goal(facts), Some(Lsn(200)), "in front of it");
        assert_eq!(goal(FoldFacts { window_end: Lsn(650), ..facts }), Some(Lsn(650)), "behind it");
        let stuck = FoldFacts { horizon: Lsn(200), ..facts };
        assert_eq!(goal(stuck), None, "the window does not reach over it");
        let pressed = FoldFacts { log_limit_bytes: 500, ..stuck };
        assert_eq!(goal(pressed), Some(Lsn(610)), "space is short: over all of it at once");
        let uncommitted = FoldFacts { committed: Lsn(605), ..pressed };
        assert_eq!(goal(uncommitted), None, "not before it is committed");
        let unpressed = FoldFacts { window_end: Lsn(150), log_limit_bytes: 500, ..facts };
        assert_eq!(goal(unpressed), Some(Lsn(200)), "as much as that gives");
    }
}
