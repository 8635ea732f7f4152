//! Decides what to do with the end of a log that was not closed in order; touches nothing.

use crate::log::reader::Remains;
use crate::units::Lsn;

/// What a scan found.
#[derive(Clone, Copy, Debug)]
pub(super) struct RecoveryFacts {
    /// Where the chain ends.
    pub chain_end: Lsn,
    /// Where the last whole request before that ends.
    pub request_end: Lsn,
    /// A position that is known to have been durable: from `meta`, or from the records themselves.
    pub mark: Lsn,
    /// What stands behind the end of the chain.
    pub remains: Remains,
    /// The log was closed in order.
    pub clean: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RecoveryDecision {
    /// The log ends as it was closed.
    Keep,
    /// The log ends at `at`, and what is kept of what was not known to be durable is made so.
    /// `whole_records_behind` says that something whole is cut off, which is kept apart.
    Cut {
        /// The end of a request.
        at: Lsn,
        /// Something whole is cut off.
        whole_records_behind: bool,
    },
    /// Something is missing that was durable: damage, which no cut may hide.
    Damage {
        /// The end of the last whole request before it.
        at: Lsn,
        /// Where the damage is.
        damaged_at: Lsn,
        /// How far the log is known to have been durable.
        durable: Lsn,
    },
}

/// A torn tail is cut only where nothing says that it was durable. The durable mark says so, and so
/// does any record that stands behind the break at its own position and calls a position behind the
/// break durable: it was written by the same log, since what is cut off never stays in its place.
pub(super) fn decide(facts: &RecoveryFacts) -> RecoveryDecision {
    let durable = facts.mark.max(facts.remains.durable);
    if durable > facts.chain_end {
        return RecoveryDecision::Damage {
            at: facts.request_end,
            damaged_at: facts.chain_end,
            durable,
        };
    }
    let whole_records_behind =
        facts.chain_end > facts.request_end || facts.remains.last_end.is_some();
    if facts.clean && !whole_records_behind {
        return RecoveryDecision::Keep;
    }
    RecoveryDecision::Cut { at: facts.request_end, whole_records_behind }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: RecoveryFacts = RecoveryFacts {
        chain_end: Lsn(1000),
        request_end: Lsn(1000),
        mark: Lsn(800),
        remains: Remains { last_end: None, durable: Lsn(0) },
        clean: false,
    };

    #[test]
    fn a_log_closed_in_order_is_kept_as_it_is() {
        let facts = RecoveryFacts { clean: true, mark: Lsn(1000), ..FACTS };
        assert_eq!(decide(&facts), RecoveryDecision::Keep);
    }

    #[test]
    fn a_tail_that_nothing_calls_durable_is_cut_at_the_end_of_a_request() {
        let cut = RecoveryDecision::Cut { at: Lsn(1000), whole_records_behind: false };
        assert_eq!(decide(&FACTS), cut);
        let half = RecoveryFacts { request_end: Lsn(900), ..FACTS };
        let cut = RecoveryDecision::Cut { at: Lsn(900), whole_records_behind: true };
        assert_eq!(decide(&half), cut);
        let gap = Remains { last_end: Some(Lsn(2000)), durable: Lsn(800) };
        let cut = RecoveryDecision::Cut { at: Lsn(1000), whole_records_behind: true };
        assert_eq!(decide(&RecoveryFacts { remains: gap, ..FACTS }), cut);
    }

    #[test]
    fn what_the_mark_or_a_later_record_calls_durable_is_damage_and_never_cut() {
        let damage = |durable| RecoveryDecision::Damage {
            at: Lsn(1000),
            damaged_at: Lsn(1000),
            durable: Lsn(durable),
        };
        assert_eq!(decide(&RecoveryFacts { mark: Lsn(1001), ..FACTS }), damage(1001));
        let later = Remains { last_end: Some(Lsn(2000)), durable: Lsn(1500) };
        assert_eq!(decide(&RecoveryFacts { remains: later, ..FACTS }), damage(1500));
        let clean = RecoveryFacts { clean: true, mark: Lsn(1001), ..FACTS };
        assert_eq!(decide(&clean), damage(1001), "closing in order excuses nothing");
    }
}
