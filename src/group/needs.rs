//! What the log is kept for besides its window: where each peer stands, as far as it is known.
//!
//! With `on_peer_behind=release` the log is kept for a peer that follows, until space is short:
//! then it goes on, and the peer is brought up by an image. With `block` it is kept for every peer,
//! whatever comes of it, and writers wait at the limit.

use std::collections::BTreeMap;

use super::engine::{Core, Group};
use super::{ControlView, Role};
use crate::log::control::OnPeerBehind;
use crate::units::{Lsn, Name, NodeId};

/// Where the peers stand.
#[derive(Debug, Default)]
pub(super) struct Needs {
    /// From where each needs the log, and whether it follows, or takes an image.
    peers: BTreeMap<NodeId, (Lsn, bool)>,
}

/// From where on the log is kept for a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeptFor {
    /// The peer that needs most.
    pub peer: Name,
    /// From here on.
    pub from: Lsn,
    /// Whatever comes of it.
    pub blocks: bool,
}

impl Needs {
    /// What the log is kept for; under `block` a peer that has not said yet where it stands needs
    /// all of it, from the horizon on.
    fn kept_for(&self, control: &ControlView, me: NodeId, horizon: Lsn) -> Option<KeptFor> {
        let blocks = control.policy.on_peer_behind == OnPeerBehind::Block;
        let others = control.members.iter().filter(|member| member.node != me);
        let needs = others.filter_map(|member| {
            let known = self.peers.get(&member.node).copied();
            let from = match known {
                Some((from, follows)) => (follows || blocks).then_some(from),
                None => blocks.then_some(horizon),
            };
            Some(KeptFor { peer: member.name.clone(), from: from?, blocks })
        });
        needs.min_by_key(|kept| kept.from)
    }
}

impl Group {
    /// A peer needs the log from here on; it follows, or has followed until now.
    pub fn note_peer_needs(&self, peer: NodeId, from: Lsn, follows: bool) {
        let waits = {
            let mut core = self.lock();
            core.needs.peers.insert(peer, (from, follows));
            core.room.fold_waits()
        };
        // A fold that waits would begin anew with each report, for nothing.
        if !waits {
            self.workers.wake_folder();
        }
    }

    /// What the log is kept for besides its window.
    pub(super) fn kept_for(&self, core: &Core) -> Option<KeptFor> {
        let horizon = core.timeline.horizon().lsn;
        let primary = core.role == Role::Primary;
        primary.then(|| core.needs.kept_for(&core.view, self.context.node.id, horizon))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::control::MemberRecord;

    fn member(node: u8) -> MemberRecord {
        serde_json::from_value(serde_json::json!({
            "node": NodeId([node; 16]), "name": format!("n{node}"), "mode": "async",
        }))
        .unwrap()
    }

    #[test]
    fn the_log_is_kept_for_those_who_follow_or_for_all_where_it_blocks() {
        let members = [1, 2, 3, 4].map(member).to_vec();
        let mut control = ControlView { members, ..ControlView::default() };
        let me = NodeId([1; 16]);
        let mut needs = Needs::default();
        needs.peers.insert(NodeId([2; 16]), (Lsn(900), true));
        needs.peers.insert(NodeId([3; 16]), (Lsn(500), false));
        // A node that is no member any more needs nothing.
        needs.peers.insert(NodeId([9; 16]), (Lsn(8), true));
        let kept = |needs: &Needs, control: &ControlView| {
            let kept = needs.kept_for(control, me, Lsn(100));
            kept.map(|kept| (kept.peer.to_string(), kept.from, kept.blocks))
        };
        assert_eq!(kept(&needs, &control), Some(("n2".to_owned(), Lsn(900), false)));
        control.policy.on_peer_behind = OnPeerBehind::Block;
        assert_eq!(kept(&needs, &control), Some(("n4".to_owned(), Lsn(100), true)), "unknown");
        needs.peers.insert(NodeId([4; 16]), (Lsn(950), true));
        assert_eq!(kept(&needs, &control), Some(("n3".to_owned(), Lsn(500), true)));
        control.members.clear();
        assert_eq!(kept(&needs, &control), None);
    }
}
