//! What an answer to a host waits for besides the local log: peers that must hold the bytes too.
//!
//! In mode `receive` a write is answered when every required peer holds it in memory; in `sync` a
//! flush also waits until it is durable there. A peer whose `on_loss` is `continue` is required
//! only while it keeps up: from the moment that it has all but a little, until it is lost. One
//! whose `on_loss` is `block` is required always, and hosts wait while it is away.
//!
//! The floors are what all of them have. They are read without the group's mutex.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

use super::engine::Report;
use crate::events::Severity;
use crate::log::control::{MemberRecord, Mode, OnLoss};
use crate::units::{LogTime, Lsn, Name, NodeId};

/// A peer that lacks no more than this is required again: writers wait for so much at once.
const CLOSE_BYTES: u64 = 1 << 20;

/// Bytes that a required peer may lack while hosts' writes are still appended: a client that gives
/// up and writes the same anew makes the log no longer than that.
const AHEAD_BYTES: u64 = 16 << 20;

/// Up to where all required peers have the log; everything where none is required.
#[derive(Debug)]
pub(super) struct Floors {
    received: AtomicU64,
    durable: AtomicU64,
}

impl Floors {
    /// Whether what waits for `lsn` may be answered as far as peers go.
    pub(super) fn allow(&self, lsn: Lsn, durable: bool) -> bool {
        let received = self.received.load(Ordering::Acquire);
        lsn.0 <= received && (!durable || lsn.0 <= self.durable.load(Ordering::Acquire))
    }
}

/// What is known of a peer that answers may wait for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequiredPeer {
    /// Its name.
    pub name: Name,
    /// When a write is answered.
    pub mode: Mode,
    /// What hosts do without it.
    pub on_loss: OnLoss,
    /// What it holds in memory.
    pub received: Lsn,
    /// What it has durably.
    pub durable: Lsn,
    /// Why answers do not wait for it, or wait in vain; and since when.
    pub away: Option<(String, LogTime)>,
}

/// The peers that answers wait for.
pub(super) struct Required {
    me: NodeId,
    peers: BTreeMap<NodeId, RequiredPeer>,
    floors: Arc<Floors>,
}

impl Required {
    pub(super) fn new(me: NodeId) -> Required {
        let all = || AtomicU64::new(u64::MAX);
        let floors = Arc::new(Floors { received: all(), durable: all() });
        Required { me, peers: BTreeMap::new(), floors }
    }

    pub(super) fn floors(&self) -> Arc<Floors> {
        self.floors.clone()
    }

    pub(super) fn peers(&self) -> &BTreeMap<NodeId, RequiredPeer> {
        &self.peers
    }

    /// Whether hosts wait while one of these is away.
    pub(super) fn blocks(&self, away: &BTreeSet<NodeId>) -> bool {
        self.peers.iter().any(|(node, peer)| peer.on_loss == OnLoss::Block && away.contains(node))
    }

    /// Why hosts wait in vain, where they do.
    pub(super) fn blocked_by(&self) -> Option<(&RequiredPeer, &str)> {
        let mut away = self.peers.values().filter(|peer| peer.on_loss == OnLoss::Block);
        away.find_map(|peer| Some((peer, peer.away.as_ref()?.0.as_str())))
    }

    /// Whether a host's write is appended to a log that ends at `head`, or waits before that.
    pub(super) fn lets_append(&self, head: Lsn) -> bool {
        let received = Lsn(self.floors.received.load(Ordering::Acquire));
        head <= received || head.bytes_since(received) < AHEAD_BYTES
    }

    /// Takes over what the records say about members.
    pub(super) fn set_members(&mut self, members: &[MemberRecord], now: LogTime) {
        let wanted = |member: &&MemberRecord| member.mode != Mode::Async && member.node != self.me;
        let peers = members.iter().filter(wanted).map(|member| {
            let known = self.peers.get(&member.node);
            let new = || Some(("it has not caught up yet".to_owned(), now));
            let peer = RequiredPeer {
                name: member.name.clone(),
                mode: member.mode,
                on_loss: member.on_loss,
                received: known.map_or(Lsn::ZERO, |known| known.received),
                durable: known.map_or(Lsn::ZERO, |known| known.durable),
                away: known.map_or_else(new, |known| known.away.clone()),
            };
            (member.node, peer)
        });
        self.peers = peers.collect();
        self.set_floors();
    }

    /// A reign of this node begins: what peers acknowledged before is of another history.
    pub(super) fn begin_anew(&mut self, now: LogTime) {
        for peer in self.peers.values_mut() {
            (peer.received, peer.durable) = (Lsn::ZERO, Lsn::ZERO);
            peer.away.get_or_insert_with(|| ("it has not caught up yet".to_owned(), now));
        }
        self.set_floors();
    }

    /// A peer acknowledged so much of a log that ends at `head`.
    pub(super) fn holds(
        &mut self,
        node: NodeId,
        received: Lsn,
        durable: Lsn,
        head: Lsn,
    ) -> Option<Report> {
        let peer = self.peers.get_mut(&node)?;
        (peer.received, peer.durable) = (received, durable);
        let back = peer.away.is_some() && head.bytes_since(received) <= CLOSE_BYTES;
        let report = back.then(|| Report {
            severity: Severity::Info,
            code: "peer-required",
            text: format!("answers wait for {} from now on: it has caught up", peer.name),
            details: json!({ "peer": peer.name }),
        });
        if back {
            peer.away = None;
        }
        self.set_floors();
        report
    }

    /// A peer is lost, or stands still; of what it had acknowledged it has `at_most` that, received
    /// and durable.
    pub(super) fn lost(
        &mut self,
        node: NodeId,
        reason: &str,
        at_most: (Lsn, Lsn),
        now: LogTime,
    ) -> Option<Report> {
        let peer = self.peers.get_mut(&node)?;
        (peer.received, peer.durable) = (peer.received.min(at_most.0), peer.durable.min(at_most.1));
        let was_away = peer.away.is_some();
        let since = peer.away.as_ref().map_or(now, |(_, since)| *since);
        peer.away = Some((reason.to_owned(), since));
        let report = (!was_away).then(|| {
            let name = &peer.name;
            let (severity, code, text) = match peer.on_loss {
                OnLoss::Continue => (
                    Severity::Warning,
                    "degraded",
                    format!("answers do not wait for {name} any more: {reason}"),
                ),
                OnLoss::Block => (
                    Severity::Error,
                    "hosts-wait",
                    format!("hosts wait for {name}, which must hold what they write: {reason}"),
                ),
            };
            Report { severity, code, text, details: json!({ "peer": name }) }
        });
        self.set_floors();
        report
    }

    fn set_floors(&self) {
        let required = |peer: &&RequiredPeer| peer.away.is_none() || peer.on_loss == OnLoss::Block;
        let in_sync = |peer: &&RequiredPeer| peer.mode == Mode::Sync;
        let all = || self.peers.values().filter(required);
        let received = all().map(|peer| peer.received.0).min();
        let durable = all().filter(in_sync).map(|peer| peer.durable.0).min();
        self.floors.received.store(received.unwrap_or(u64::MAX), Ordering::Release);
        self.floors.durable.store(durable.unwrap_or(u64::MAX), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::*;

    const PEER: NodeId = NodeId([2; 16]);
    const ALL: (Lsn, Lsn) = (Lsn::MAX, Lsn::MAX);

    fn required(mode: Mode, on_loss: OnLoss) -> Required {
        let mut required = Required::new(NodeId([1; 16]));
        let member = |node, name: &str| MemberRecord {
            node,
            name: name.parse().unwrap(),
            mode,
            on_loss,
            rpo_target: None,
            removed: false,
            other: Map::new(),
        };
        let members = [member(NodeId([1; 16]), "a"), member(PEER, "b")];
        required.set_members(&members, LogTime(5));
        required
    }

    #[test]
    fn hosts_append_only_so_much_more_than_a_required_peer_has() {
        let mut required = required(Mode::Receive, OnLoss::Block);
        let has = Lsn(1 << 30);
        required.holds(PEER, has, has, has);
        assert!(required.lets_append(has.advance(AHEAD_BYTES - 1)));
        assert!(!required.lets_append(has.advance(AHEAD_BYTES)));
        let _ = required.lost(PEER, "it is away", ALL, LogTime(6));
        assert!(!required.lets_append(has.advance(AHEAD_BYTES)));
        // One that nobody waits for holds up nothing.
        let mut required = self::required(Mode::Receive, OnLoss::Continue);
        required.holds(PEER, has, has, has);
        assert!(!required.lets_append(has.advance(AHEAD_BYTES)));
        let _ = required.lost(PEER, "it is away", ALL, LogTime(6));
        assert!(required.lets_append(Lsn::MAX));
    }

    #[test]
    fn an_asynchronous_peer_holds_up_nobody() {
        let mut required = required(Mode::Async, OnLoss::Block);
        assert!(required.floors().allow(Lsn::MAX, true));
        assert!(required.lost(PEER, "gone", ALL, LogTime(6)).is_none());
        assert!(!required.blocks(&BTreeSet::from([PEER])));
    }

    #[test]
    fn a_peer_is_required_from_when_it_has_caught_up_until_it_is_lost() {
        let mut required = required(Mode::Receive, OnLoss::Continue);
        let floors = required.floors();
        assert!(floors.allow(Lsn::MAX, true), "it has nothing yet");
        let head = Lsn(CLOSE_BYTES * 4);
        assert!(required.holds(PEER, Lsn(4096), Lsn(0), head).is_none());
        assert!(floors.allow(head, true), "it is far behind");
        let near = Lsn(CLOSE_BYTES * 3);
        assert_eq!(required.holds(PEER, near, Lsn(0), head).unwrap().code, "peer-required");
        assert!(!floors.allow(head, false));
        assert!(floors.allow(near, true), "received is enough in this mode");
        assert_eq!(required.lost(PEER, "gone", ALL, LogTime(6)).unwrap().code, "degraded");
        assert!(floors.allow(head, true));
        assert!(required.lost(PEER, "gone again", ALL, LogTime(7)).is_none(), "it is known");
        assert_eq!(required.peers()[&PEER].away, Some(("gone again".to_owned(), LogTime(6))));
    }

    #[test]
    fn in_sync_mode_a_flush_waits_until_it_is_durable_there() {
        let mut required = required(Mode::Sync, OnLoss::Continue);
        required.holds(PEER, Lsn(8192), Lsn(4096), Lsn(8192));
        let floors = required.floors();
        assert!(floors.allow(Lsn(8192), false));
        assert!(!floors.allow(Lsn(8192), true));
        assert!(floors.allow(Lsn(4096), true));
        required.holds(PEER, Lsn(8192), Lsn(8192), Lsn(8192));
        assert!(floors.allow(Lsn(8192), true));
    }

    #[test]
    fn hosts_wait_for_a_lost_peer_where_that_was_asked_for() {
        let mut required = required(Mode::Sync, OnLoss::Block);
        let floors = required.floors();
        assert!(required.blocks(&BTreeSet::from([PEER])));
        assert!(!required.blocks(&BTreeSet::new()), "it has answered");
        assert!(!floors.allow(Lsn(1), false), "nobody has said yet what it holds");
        required.holds(PEER, Lsn(8192), Lsn(8192), Lsn(8192));
        assert!(required.blocked_by().is_none());
        assert_eq!(required.lost(PEER, "gone", ALL, LogTime(6)).unwrap().code, "hosts-wait");
        assert!(floors.allow(Lsn(8192), true));
        assert!(!floors.allow(Lsn(8193), false));
        assert_eq!(required.blocked_by().unwrap().1, "gone");
        // It is back without what it had acknowledged, and does not follow yet.
        assert!(required.lost(PEER, "parted", (Lsn(4096), Lsn(4096)), LogTime(7)).is_none());
        assert!(floors.allow(Lsn(4096), true) && !floors.allow(Lsn(4097), false));
    }

    #[test]
    fn what_was_acknowledged_before_a_reign_answers_nobody_in_it() {
        for (on_loss, waits) in [(OnLoss::Block, true), (OnLoss::Continue, false)] {
            let mut required = required(Mode::Sync, on_loss);
            let floors = required.floors();
            required.holds(PEER, Lsn(8192), Lsn(8192), Lsn(8192));
            required.begin_anew(LogTime(6));
            assert_eq!(!floors.allow(Lsn(4096), false), waits, "{on_loss:?}");
            assert!(required.peers()[&PEER].away.is_some(), "not before it has caught up");
            required.holds(PEER, Lsn(4096), Lsn(4096), Lsn(4096));
            assert!(floors.allow(Lsn(4096), true) && !floors.allow(Lsn(4097), false));
        }
    }

    #[test]
    fn a_changed_mode_counts_at_once() {
        let mut required = required(Mode::Sync, OnLoss::Block);
        required.holds(PEER, Lsn(4096), Lsn(0), Lsn(4096));
        assert!(!required.floors().allow(Lsn(4096), true));
        required.set_members(&[], LogTime(6));
        assert!(required.floors().allow(Lsn::MAX, true));
    }
}
