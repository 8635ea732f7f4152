//! Which of two histories continues the other: a pure comparison of epoch lists and heads.
//!
//! The epochs and heads decide what is *possible*; that the bytes are the same is known only when
//! the chain at the lower head was compared too, which the side with the higher head does.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::log::control::{COUNTER_MAX, EpochRecord};
use crate::units::{Chain, EpochId, Lsn, NodeId};

use super::wire::{WireEpoch, WireHistory};

/// One reign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reign {
    /// Its random id.
    pub id: EpochId,
    /// Its number among the group's reigns.
    pub counter: u64,
    /// Where it begins.
    pub first_lsn: Lsn,
    /// Who reigned.
    pub author: NodeId,
}

/// A log, as far as a comparison needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Every reign, oldest first.
    pub reigns: Arc<Vec<Reign>>,
    /// After the last whole record.
    pub head: Lsn,
    /// Checksum of the last record.
    pub chain: Chain,
}

/// How two histories stand to each other, seen from `mine`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Relation {
    /// Equal epochs and equal heads. The chains must be equal too.
    Same,
    /// Theirs ends inside mine: I can send from their head, once the chain there is equal.
    TheirsIsPrefix,
    /// Mine ends inside theirs.
    MineIsPrefix,
    /// They part before the end of both.
    Diverged {
        /// Up to here they may be the same.
        common: Lsn,
        /// Bytes after it that only I have.
        mine_bytes: u64,
        /// Bytes after it that only the other has.
        theirs_bytes: u64,
    },
}

impl History {
    /// From the control records' list.
    #[must_use]
    pub fn new(epochs: &[EpochRecord], head: Lsn, chain: Chain) -> History {
        let reigns = epochs
            .iter()
            .map(|epoch| Reign {
                id: epoch.id,
                counter: epoch.counter,
                first_lsn: epoch.first_lsn,
                author: epoch.author,
            })
            .collect::<Vec<_>>();
        History { reigns: Arc::new(reigns), head, chain }
    }

    /// As it was when its log ended at `head`; what the chain was there is not known.
    #[must_use]
    pub fn until(&self, head: Lsn) -> History {
        let reigns = self.reigns.iter().filter(|reign| reign.first_lsn < head).copied();
        History { reigns: Arc::new(reigns.collect()), head, chain: Chain(0) }
    }

    /// For the wire.
    #[must_use]
    pub fn to_wire(&self) -> WireHistory {
        WireHistory {
            epochs: self
                .reigns
                .iter()
                .map(|reign| WireEpoch {
                    id: reign.id.0,
                    counter: reign.counter,
                    first_lsn: reign.first_lsn.0,
                    author: reign.author.0,
                })
                .collect(),
            head: self.head.0,
            chain: self.chain.0,
        }
    }

    /// From the wire. `None` where it is impossible: positions above 2^63, reigns out of order,
    /// behind the head or without a number that a reign may have.
    #[must_use]
    pub fn from_wire(wire: &WireHistory) -> Option<History> {
        if wire.head > Lsn::MAX.0 {
            return None;
        }
        let mut reigns: Vec<Reign> = Vec::with_capacity(wire.epochs.len());
        for epoch in &wire.epochs {
            let after_previous = reigns.last().is_none_or(|last| {
                epoch.first_lsn > last.first_lsn.0 && epoch.counter > last.counter
            });
            if !after_previous || epoch.first_lsn >= wire.head || epoch.counter > COUNTER_MAX {
                return None;
            }
            reigns.push(Reign {
                id: EpochId(epoch.id),
                counter: epoch.counter,
                first_lsn: Lsn(epoch.first_lsn),
                author: NodeId(epoch.author),
            });
        }
        Some(History { reigns: Arc::new(reigns), head: Lsn(wire.head), chain: Chain(wire.chain) })
    }

    /// The newest reign.
    #[must_use]
    pub fn last(&self) -> Option<&Reign> {
        self.reigns.last()
    }

    /// Its number; none where nobody has reigned.
    #[must_use]
    pub fn counter(&self) -> Option<u64> {
        self.last().map(|reign| reign.counter)
    }
}

/// Compares two histories by epochs and heads.
#[must_use]
pub fn compare(mine: &History, theirs: &History) -> Relation {
    let agreed = mine
        .reigns
        .iter()
        .zip(theirs.reigns.iter())
        .take_while(|(a, b)| a.id == b.id && a.first_lsn == b.first_lsn)
        .count();
    // The position at which each side's first reign that the other lacks begins: up to there its
    // records belong to reigns that both know.
    let my_next = mine.reigns.get(agreed).map_or(mine.head, |reign| reign.first_lsn);
    let their_next = theirs.reigns.get(agreed).map_or(theirs.head, |reign| reign.first_lsn);
    let common = my_next.min(their_next);
    if mine.head == common && theirs.head == common {
        Relation::Same
    } else if theirs.head == common {
        Relation::TheirsIsPrefix
    } else if mine.head == common {
        Relation::MineIsPrefix
    } else {
        Relation::Diverged {
            common,
            mine_bytes: mine.head.bytes_since(common),
            theirs_bytes: theirs.head.bytes_since(common),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(reigns: &[(u64, u64)], head: u64) -> History {
        let reigns = reigns
            .iter()
            .enumerate()
            .map(|(index, (id, first_lsn))| Reign {
                id: EpochId(*id),
                counter: index as u64 + 1,
                first_lsn: Lsn(*first_lsn),
                author: NodeId::default(),
            })
            .collect::<Vec<_>>();
        History { reigns: Arc::new(reigns), head: Lsn(head), chain: Chain(0) }
    }

    #[test]
    fn a_lower_head_in_the_same_reign_is_a_prefix() {
        let long = history(&[(1, 96)], 1000);
        let short = history(&[(1, 96)], 600);
        assert_eq!(compare(&long, &short), Relation::TheirsIsPrefix);
        assert_eq!(compare(&short, &long), Relation::MineIsPrefix);
        assert_eq!(compare(&long, &long), Relation::Same);
    }

    #[test]
    fn an_empty_log_is_a_prefix_of_every_log() {
        let full = history(&[(1, 96)], 1000);
        assert_eq!(compare(&full, &History::default()), Relation::TheirsIsPrefix);
        assert_eq!(compare(&History::default(), &full), Relation::MineIsPrefix);
    }

    #[test]
    fn a_new_reign_continues_those_who_stopped_before_it() {
        let promoted = history(&[(1, 96), (2, 800)], 1200);
        for (head, expected) in [
            (600, Relation::TheirsIsPrefix),
            (800, Relation::TheirsIsPrefix),
            (808, Relation::Diverged { common: Lsn(800), mine_bytes: 400, theirs_bytes: 8 }),
        ] {
            assert_eq!(compare(&promoted, &history(&[(1, 96)], head)), expected, "head {head}");
        }
    }

    #[test]
    fn two_reigns_from_one_point_are_diverged_there() {
        let a = history(&[(1, 96), (2, 800)], 1200);
        let b = history(&[(1, 96), (3, 900)], 1000);
        assert_eq!(
            compare(&a, &b),
            Relation::Diverged { common: Lsn(800), mine_bytes: 400, theirs_bytes: 200 }
        );
    }

    #[test]
    fn another_groups_history_has_nothing_in_common() {
        let a = history(&[(1, 96)], 1200);
        let b = history(&[(9, 96)], 1000);
        let Relation::Diverged { common, .. } = compare(&a, &b) else { panic!("not diverged") };
        assert_eq!(common, Lsn(96));
    }

    #[test]
    fn impossible_histories_from_the_wire_are_refused() {
        let good = history(&[(1, 96), (2, 800)], 1200).to_wire();
        assert!(History::from_wire(&good).is_some());
        let mut behind_head = good.clone();
        behind_head.head = 800;
        assert_eq!(History::from_wire(&behind_head), None);
        let mut backwards = good.clone();
        backwards.epochs.swap(0, 1);
        assert_eq!(History::from_wire(&backwards), None);
        let mut uncounted = good.clone();
        uncounted.epochs[1].counter = COUNTER_MAX + 1;
        assert_eq!(History::from_wire(&uncounted), None);
        let mut far = good;
        far.head = u64::MAX;
        assert_eq!(History::from_wire(&far), None);
    }
}
