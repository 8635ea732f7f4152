//! What a peer asks this node to keep a copy of: asking, who is heard, and the note that stands for
//! a group's records until the log here has them.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::events::Severity;
use crate::group::{ControlView, DataState, Positions, Role};
use crate::units::{GroupId, Lsn, Name, NodeId};

use super::peers::{Peer, StoreError};
use super::replica::Replica;
use super::rpc::PeerContext;
use super::service::{Replication, ReplicationError, Shared, locked};

pub(super) const METHOD: &str = "replication.create-copy";
/// The peer makes a group's files.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// The copy that a peer is asked for.
#[derive(Serialize, Deserialize)]
struct Ask {
    group: GroupId,
    name: Name,
    segment_bytes: u64,
}

/// Whether a group that is here already may follow a peer that asks for it: one that its records
/// have as a member, or any where it serves nobody and its records name no other member. That is
/// how a copy is left whose log was cut back to where replication had just been stopped.
#[must_use]
pub fn may_follow(control: &ControlView, role: Role, me: NodeId, peer: NodeId) -> bool {
    let is_member = |node| control.members.iter().any(|member| member.node == node);
    let is_alone = control.members.iter().all(|member| member.node == me);
    is_member(peer) || role == Role::Secondary && is_alone
}

/// Since when a group's log says what the note of who asked stands for. A loss of power before that
/// is durable would leave a copy that knows nobody, and that nobody asks for; so would a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Said {
    cuts: u64,
    head: Lsn,
}

impl Said {
    /// Looks at a group whose log says it, and was cut so many times; whether it says so durably.
    #[must_use]
    pub fn look(before: Option<&Said>, cuts: u64, at: &Positions) -> (Said, bool) {
        let before = before.filter(|said| said.cuts == cuts);
        let said = before.copied().unwrap_or(Said { cuts, head: at.head });
        (said, at.durable >= said.head)
    }
}

/// What is needed to give up the notes of who asked.
#[derive(Default)]
pub(super) struct Notes {
    said: Mutex<HashMap<(NodeId, GroupId), Said>>,
    /// Held while a log is cut to follow a peer: for as long as a fold or a disk takes.
    pub cutting: Mutex<()>,
    /// Held by the one look that gives notes up.
    unasking: Mutex<()>,
}

impl Replication {
    /// Has a peer make a copy of a group, or know that this node wants the one that it has.
    pub(super) async fn ask_for_copy(
        &self,
        peer: &str,
        group: &dyn Replica,
    ) -> Result<(), ReplicationError> {
        let ask = Ask {
            group: group.id(),
            name: group.name().clone(),
            segment_bytes: group.segment_bytes(),
        };
        let body = serde_json::to_value(ask).expect("numbers and names");
        self.call(peer, METHOD, body, ANSWER_TIMEOUT).await?;
        Ok(())
    }
}

impl Shared {
    /// Makes the empty copy that a peer asks for. A name that another group has is refused.
    pub(super) fn create_copy(&self, peer: &PeerContext, body: &Value) -> Result<Value, String> {
        let Ask { group, name, segment_bytes } = serde_json::from_value(body.clone())
            .map_err(|error| format!("a request that is not understood: {error}"))?;
        if !segment_bytes.is_power_of_two() || !(1 << 16..=1 << 30).contains(&segment_bytes) {
            return Err(format!("segments of {segment_bytes} bytes are not possible"));
        }
        let known = self.groups.by_id(group);
        if let Some(known) = &known {
            let asked = self.peer(peer.node).is_some_and(|p| p.copies.contains(&group));
            if !asked && !may_follow(&known.control(), known.role(), self.me(), peer.node) {
                return Err(format!(
                    "group {name} is here already, and {0} is no member of it: `tidelog replicate \
                     {name} --to {0}` on its primary makes it one; or `tidelog group delete \
                     {name}` on this node, if what it has is not needed",
                    peer.name
                ));
            }
        } else if self.groups.by_name(name.as_str()).is_ok() {
            return Err(format!(
                "another group with the name `{name}` is there already; `tidelog group delete \
                 {name}` on one of the two nodes, if it is not needed"
            ));
        }
        // First: a copy that nobody is known to have asked for is refused to who asks again.
        let is_new = self.ask_for(peer.node, group).map_err(|error| {
            format!("{error}; no copy was made: make room there, and try again")
        })?;
        if known.is_none() {
            if let Err(error) = self.groups.create_copy(group, name.clone(), segment_bytes) {
                // Else another call is at it, and may have made it.
                if is_new && let Err(error) = self.unask(peer.node, group) {
                    tracing::error!("group {group}: that peer {} asked: {error}", peer.name);
                }
                return Err(error.to_string());
            }
            let text = format!("group {name}: a copy is made here, as {} asked", peer.name);
            let name = Some(name.as_str());
            self.context.events.emit(Severity::Info, "copy-made", name, text, Value::Null);
        }
        self.groups_changed();
        Ok(Value::Null)
    }

    /// Remembers that a peer's copy of a group is wanted here, until this node's log says so;
    /// whether that is new.
    pub(super) fn ask_for(&self, peer: NodeId, group: GroupId) -> Result<bool, StoreError> {
        let mut is_new = false;
        let change = |peer: &mut Peer| is_new = peer.copies.insert(group);
        self.store.lock().expect("no holder panics").change(peer, change)?;
        Ok(is_new)
    }

    /// Forgets that again.
    pub(super) fn unask(&self, peer: NodeId, group: GroupId) -> Result<(), StoreError> {
        let change = |peer: &mut Peer| {
            peer.copies.remove(&group);
        };
        locked(&self.store).change(peer, change)
    }

    /// Whether it may be forgotten that a peer asked for a group whose log `says` the same, as of a
    /// number of its cuts.
    pub(super) fn may_unask(
        &self,
        group: &dyn Replica,
        peer: &Peer,
        says: bool,
        cuts: u64,
    ) -> bool {
        let key = (peer.node, group.id());
        let mut all = locked(&self.notes.said);
        if !says || !peer.copies.contains(&group.id()) {
            all.remove(&key);
            return false;
        }
        let (said, durable) = Said::look(all.get(&key), cuts, &group.positions());
        all.insert(key, said);
        durable
    }

    /// Forgets who asked for groups whose logs say the same durably, as of a number of their cuts.
    /// Waits for nobody, since a look comes with each append: while another is at it, or a log is
    /// cut, a later look does it.
    pub(super) fn unask_known(&self, known: Vec<(NodeId, GroupId, u64)>) {
        let Ok(_alone) = self.notes.unasking.try_lock() else { return };
        let Ok(_no_cut) = self.notes.cutting.try_lock() else { return };
        for (node, group, cuts) in known {
            // The next start of one that failed may end a cut.
            let is_as_seen = self.groups.by_id(group).is_some_and(|group| {
                group.cuts() == cuts && group.data_state().0 != DataState::Failed
            });
            if is_as_seen && let Err(error) = self.unask(node, group) {
                tracing::error!("{error}");
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::group::Group;
    use crate::io::{Fault, MemoryDisk};
    use crate::log::control::{Control, EpochRecord, Mode};
    use crate::replication::core::Membership;
    use crate::replication::drive::tests::{Node, member, node_on};
    use crate::replication::pairing::Fingerprint;
    use crate::replication::replica::membership_of;
    use crate::units::{EpochId, LogTime, Lsn};

    pub(in crate::replication) const PEER: NodeId = NodeId([2; 16]);

    /// A node that is paired with one that its group does not know.
    pub(in crate::replication) fn node_with_peer() -> (Node, Arc<Group>) {
        node_with_peer_on(Arc::new(MemoryDisk::new()))
    }

    fn node_with_peer_on(disk: Arc<MemoryDisk>) -> (Node, Arc<Group>) {
        let (node, group) = node_on(disk);
        let peer = Peer {
            node: PEER,
            name: "b".parse().unwrap(),
            address: None,
            fingerprints: Vec::new(),
            paired: LogTime(0),
            copies: BTreeSet::new(),
            paused: BTreeSet::new(),
        };
        node.replication.shared.store.lock().unwrap().put(peer).unwrap();
        (node, group)
    }

    pub(in crate::replication) fn is_asked_for(node: &Node, group: &Group) -> bool {
        node.replication.shared.peer(PEER).unwrap().copies.contains(&group.id())
    }

    /// The peer asks for a group.
    fn ask(node: &Node, group: GroupId, name: &str) -> Result<Value, String> {
        let peer =
            PeerContext { node: PEER, name: "b".parse().unwrap(), key: Fingerprint([0; 32]) };
        let ask = json!({ "group": group, "name": name, "segment_bytes": 1 << 20 });
        node.replication.shared.create_copy(&peer, &ask)
    }

    #[tokio::test]
    async fn who_asks_for_a_copy_that_cannot_be_noted_is_told_that_none_was_made() {
        let (node, group) = node_with_peer();
        group.append_control(member(PEER, "b", Mode::Async)).unwrap();
        let shared = &node.replication.shared;
        let other = GroupId([9; 16]);
        let in_the_way = shared.config.state_dir.join("peers.new");
        for (id, name) in [(group.id(), "g"), (other, "h")] {
            std::fs::create_dir(&in_the_way).unwrap();
            let refused = ask(&node, id, name).unwrap_err();
            assert!(refused.contains("peers: could not be written"), "{refused}");
            assert!(refused.contains("no copy was made"), "{refused}");
            assert!(shared.groups.by_id(other).is_none(), "{name}");
            std::fs::remove_dir(&in_the_way).unwrap();
            ask(&node, id, name).unwrap();
        }
        assert!(shared.groups.by_id(other).is_some());
        node.stop();
    }

    #[tokio::test]
    async fn a_copy_that_knows_nobody_follows_who_asks_and_a_primary_does_not() {
        let (node, group) = node_with_peer();
        let refused = ask(&node, group.id(), "g").unwrap_err();
        for way in ["`tidelog replicate g --to b` on its primary", "`tidelog group delete g` on"] {
            assert!(refused.contains(way), "{refused}");
        }
        assert!(!is_asked_for(&node, &group));
        group.demote().unwrap();
        ask(&node, group.id(), "g").unwrap();
        assert!(is_asked_for(&node, &group), "it is left alone, and is taken up");
        node.stop();
    }

    #[tokio::test]
    async fn what_was_asked_for_is_forgotten_only_when_the_log_says_it_durably() {
        let disk = Arc::new(MemoryDisk::new());
        let (node, group) = node_with_peer_on(Arc::clone(&disk));
        let shared = &node.replication.shared;
        let look = |says| {
            let peer = shared.peer(PEER).unwrap();
            let known = shared.may_unask(&*group, &peer, says, group.cuts());
            shared
                .unask_known(known.then(|| (PEER, group.id(), group.cuts())).into_iter().collect());
            is_asked_for(&node, &group)
        };
        shared.ask_for(PEER, group.id()).unwrap();
        assert!(look(false));
        group.append_control(member(PEER, "b", Mode::Async)).unwrap();
        assert!(!look(true), "that record is durable");
        shared.ask_for(PEER, group.id()).unwrap();
        shared.unask_known(vec![(PEER, group.id(), group.cuts() + 1)]);
        assert!(is_asked_for(&node, &group), "its log was cut since");
        let cutting = shared.notes.cutting.lock().unwrap();
        assert!(look(true), "a log is cut, and no look waits for that");
        drop(cutting);
        disk.inject(Fault::PowerOff { operation: disk.operations() });
        group.append_control(member(PEER, "b", Mode::Sync)).unwrap_err();
        assert!(look(true), "it may be gone after a start");
        node.stop();
    }

    #[test]
    fn what_the_log_says_is_durable_up_to_where_it_was_seen_first_and_no_cut_is_behind_it() {
        let at = |head, durable| Positions {
            head: Lsn(head),
            durable: Lsn(durable),
            ..Positions::default()
        };
        let (said, durable) = Said::look(None, 3, &at(900, 500));
        assert!(!durable);
        // More comes all the time, and what was seen is durable nevertheless.
        assert_eq!(Said::look(Some(&said), 3, &at(1000, 899)), (said, false));
        assert_eq!(Said::look(Some(&said), 3, &at(2000, 900)), (said, true));
        let (anew, durable) = Said::look(Some(&said), 4, &at(2000, 900));
        assert!(!durable && anew != said);
        assert!(Said::look(None, 0, &at(900, 900)).1);
    }

    #[tokio::test]
    async fn a_copy_of_others_is_not_taken_by_who_is_no_member() {
        let (node, group) = node_with_peer();
        group.append_control(member(NodeId([3; 16]), "c", Mode::Async)).unwrap();
        group.demote().unwrap();
        ask(&node, group.id(), "g").unwrap_err();
        group.promote("by command").unwrap();
        group.append_control(member(PEER, "b", Mode::Async)).unwrap();
        ask(&node, group.id(), "g").unwrap();
        node.stop();
    }

    #[tokio::test]
    async fn a_membership_that_is_ended_by_command_is_not_asked_for_any_more() {
        let (node, group) = node_with_peer();
        group.append_control(member(PEER, "b", Mode::Async)).unwrap();
        let shared = &node.replication.shared;
        shared.ask_for(PEER, group.id()).unwrap();
        node.replication.stop("g", "b").await.unwrap();
        assert!(!is_asked_for(&node, &group));
        shared.ask_for(PEER, group.id()).unwrap();
        node.replication.forget_group(group.id()).unwrap();
        assert!(!is_asked_for(&node, &group), "the group was deleted");
        node.stop();
    }

    /// The power failed on the copy between the record of a reign and the one that makes its node a
    /// member again: the copy followed nobody, and hosts waited for it without end.
    #[test]
    fn a_copy_follows_a_reign_of_a_former_member_before_it_has_the_record_that_makes_it_one() {
        let own = NodeId([1; 16]);
        let reign = |author| EpochRecord {
            counter: 2,
            id: EpochId(2),
            author,
            author_name: "b".parse().unwrap(),
            first_lsn: Lsn(4096),
            reason: "promote".to_owned(),
            other: serde_json::Map::new(),
        };
        let Control::Member(me) = member(own, "a", Mode::Async) else { panic!("a member") };
        let mut view = ControlView { members: vec![me], ..ControlView::default() };
        view.epochs.push(reign(PEER));
        let of = |view: &_, primary| membership_of(view, own, PEER, primary, false);
        assert_eq!(of(&view, false), Membership::Pending);
        assert_eq!(of(&view, true), Membership::Stranger);
        let removed = ControlView { members: Vec::new(), ..view.clone() };
        assert_eq!(of(&removed, false), Membership::Stranger, "replication to it was stopped");
        view.epochs.push(reign(own));
        assert_eq!(of(&view, false), Membership::Stranger, "that reign is over");
    }
}
