//! Tells from the hellos of a peer whether two processes have its identity: a disk was copied, and
//! both copies run. A process that was started again has a new incarnation, and the old one never
//! comes back; of two that run both do, in turn.

use std::collections::VecDeque;
use std::time::Duration;

use crate::units::Incarnation;

/// Times that an earlier life must have come back. One that died can have left a hello on its way
/// with each of its connections, and the living one comes back behind each.
const RETURNS: u32 = 4;
/// How long neither is let in: one of the two may be gone by then.
const TURNED_AWAY: Duration = Duration::from_secs(30);
/// Lives that are remembered.
const REMEMBERED: usize = 8;

/// The lives of a peer.
#[derive(Debug, Default)]
pub(super) struct Lives {
    newest: Option<Incarnation>,
    earlier: VecDeque<Incarnation>,
    returns: u32,
    turned_away_until: Option<Duration>,
    told: bool,
}

/// Who says hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caller {
    /// The peer, as far as is known.
    Peer,
    /// One of two that have its identity; nobody is let in before `until`. `news` where people have
    /// not been told yet.
    OneOfTwo { until: Duration, news: bool },
}

impl Lives {
    /// Who says hello with this incarnation.
    pub(super) fn hello(&mut self, now: Duration, incarnation: Incarnation) -> Caller {
        if let Some(until) = self.turned_away_until.filter(|until| now < *until) {
            return Caller::OneOfTwo { until, news: false };
        }
        if self.newest == Some(incarnation) {
            return Caller::Peer;
        }
        let known = self.earlier.len();
        self.earlier.retain(|life| *life != incarnation);
        let is_back = self.earlier.len() < known;
        self.earlier.extend(self.newest.replace(incarnation));
        if self.earlier.len() > REMEMBERED {
            self.earlier.pop_front();
        }
        if !is_back {
            (self.returns, self.told) = (0, false);
            return Caller::Peer;
        }
        self.returns += 1;
        if self.returns < RETURNS {
            return Caller::Peer;
        }
        // The one that is left may be either; another return behind its own, and there are two.
        self.returns = RETURNS - 2;
        let until = now + TURNED_AWAY;
        self.turned_away_until = Some(until);
        Caller::OneOfTwo { until, news: !std::mem::replace(&mut self.told, true) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of the hellos, one a second, are turned away, and how many of them are news.
    fn turned_away(lives: &mut Lives, from: u64, hellos: &[u64]) -> (usize, usize) {
        let callers: Vec<Caller> = hellos
            .iter()
            .zip(from..)
            .map(|(life, second)| lives.hello(Duration::from_secs(second), Incarnation(*life)))
            .collect();
        let away = callers.iter().filter(|caller| **caller != Caller::Peer);
        let news = callers.iter().filter(|it| matches!(it, Caller::OneOfTwo { news: true, .. }));
        (away.count(), news.count())
    }

    #[test]
    fn a_peer_that_restarts_ever_so_often_is_no_clone() {
        let mut lives = Lives::default();
        let restarts: Vec<u64> = (0..1000).flat_map(|life| [life, life, life]).collect();
        assert_eq!(turned_away(&mut lives, 0, &restarts), (0, 0));
        // Both connections of the one that died come late.
        let mut lives = Lives::default();
        assert_eq!(turned_away(&mut lives, 0, &[1, 2, 1, 2, 1, 2, 2, 2]), (3, 1), "four returns");
        let mut lives = Lives::default();
        assert_eq!(turned_away(&mut lives, 0, &[1, 2, 1, 2, 2, 2, 3, 2, 3, 3]), (0, 0));
    }

    #[test]
    fn of_two_with_one_identity_neither_is_let_in_until_one_is_gone() {
        let both: Vec<u64> = (0..300).map(|second| second % 2).collect();
        for left in 0..2 {
            let mut lives = Lives::default();
            let (away, news) = turned_away(&mut lives, 0, &both);
            assert!(away > 230, "{away} of 300 were turned away");
            assert_eq!(news, 1, "people are told once");
            // Whichever is left is let in, and stays.
            assert_eq!(turned_away(&mut lives, 400, &[left; 50]), (0, 0));
        }
    }
}
