//! The end of a split brain: what each side has, and yielding by command.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::group::{Account, DataState, Discard, Group, Host, View};
use crate::units::{ByteSize, EpochId, GroupId, Lsn, Name, NodeId};

use super::channel::{Channel, Parted, ReplicationState};
use super::core::{Input, PeerCore, given_up};
use super::replica::{Replica, history_of};
use super::rpc::PeerContext;
use super::service::{Replication, ReplicationError, Shared, locked};

pub(super) const METHOD: &str = "replication.side";
/// The peer reads its log from the parting on.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Where this node's history and its peer's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parting {
    /// The peer.
    pub peer: Name,
    /// The last position that both share.
    pub at: Lsn,
    /// Bytes of log behind it that only this node has; they are what yielding keeps as a branch.
    pub local_bytes: u64,
    /// Bytes of log behind it that only the peer has, at least; unknown while it is not connected.
    pub peer_bytes: Option<u64>,
}

/// What there is to know before one side yields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preview {
    /// Where the histories part.
    #[serde(flatten)]
    pub parting: Parting,
    /// The name of the branch that yielding here would keep; none where it would keep nothing.
    pub branch: Option<String>,
    /// Why yielding here would be refused now, where it would.
    pub refused: Option<String>,
    /// This node's side.
    pub local: Side,
    /// The peer's side.
    pub remote: Side,
}

/// One side of a split brain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Side {
    /// The node.
    pub node: Name,
    /// What only it has; none where that is not known.
    pub account: Option<Account>,
    /// Who has its volumes or images of them open.
    pub hosts: Vec<SideHost>,
    /// Why `account` is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unknown: Option<String>,
}

/// A connection to a volume of one side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SideHost {
    /// The volume's name.
    pub volume: String,
    /// Who.
    #[serde(flatten)]
    pub host: Host,
}

impl Side {
    fn of(node: Name, group: &Group, at: Lsn) -> Side {
        let volumes = group.volumes();
        let name = |number| {
            let found = volumes.iter().find(|volume| volume.number == number);
            found.map_or_else(|| format!("volume {number}"), |volume| volume.name.to_string())
        };
        let hosts = group.hosts().into_iter();
        let hosts = hosts.map(|(number, host)| SideHost { volume: name(number), host }).collect();
        match group.account(at) {
            Ok(account) => Side { node, account: Some(account), hosts, unknown: None },
            Err(error) => Side { node, account: None, hosts, unknown: Some(error.to_string()) },
        }
    }

    fn unknown(node: Name, why: String) -> Side {
        Side { node, account: None, hosts: Vec::new(), unknown: Some(why) }
    }
}

impl Replication {
    /// Where a group's histories part, as the peer has told.
    ///
    /// # Errors
    ///
    /// Where the group is unknown, or nothing has parted.
    pub fn parting(&self, group_name: &str) -> Result<Parting, ReplicationError> {
        self.find_parting(group_name).map(|(parting, ..)| parting)
    }

    /// Where a group's histories part, as far as that is known: of a split brain, or of a copy
    /// that has what its primary lacks.
    #[must_use]
    pub fn apart(&self, group: GroupId) -> Option<Parting> {
        let cores = self.shared.cores.lock().expect("no holder panics");
        cores.values().find_map(|core| {
            let channel = core.channel(group)?;
            let split = channel.state().0 == ReplicationState::SplitBrain;
            let parted = split || channel.parted().is_some() && channel.local().follows.is_none();
            parted.then(|| known_parting(core.name(), channel)).flatten()
        })
    }

    /// Why nothing of a group is copied to a peer or from it, where that is by command.
    #[must_use]
    pub fn paused(&self, group: GroupId, peer: &Name) -> Option<String> {
        let cores = self.shared.cores.lock().expect("no holder panics");
        let core = cores.values().find(|core| core.name() == peer)?;
        core.channel(group)?.paused_because(peer)
    }

    fn find_parting(
        &self,
        group_name: &str,
    ) -> Result<(Parting, Parted, Arc<dyn Replica>), ReplicationError> {
        let shared = &self.shared;
        let group = shared.groups.by_name(group_name)?;
        let cores = shared.cores.lock().expect("no holder panics");
        for core in cores.values() {
            let Some(channel) = core.channel(group.id()) else { continue };
            let Some(parted) = channel.parted() else { continue };
            if let Some(other) = &channel.local().follows {
                let peer = core.name();
                return Err(ReplicationError::Refused(format!(
                    "group {group_name}: this node follows {other}, whose history parts from that \
                     of {peer} as its own does: resolve it between those two, by `tidelog resolve \
                     {group_name} --preview` on {peer}"
                )));
            }
            return Ok((parting_at(core.name(), channel, parted.at), parted, group));
        }
        Err(ReplicationError::Refused(format!(
            "group {group_name}: no peer has told of a history that parts from this one; `tidelog \
             status {group_name}` shows the state of replication"
        )))
    }

    /// What each side has, and what yielding here would do. The peer is asked for its side.
    ///
    /// # Errors
    ///
    /// Where the group is unknown, or nothing has parted.
    pub async fn preview(&self, group_name: &str) -> Result<Preview, ReplicationError> {
        let shared = &self.shared;
        let (mut parting, parted, group) = self.find_parting(group_name)?;
        let engine = shared.groups.engine(group.id());
        let engine = engine.ok_or_else(|| {
            ReplicationError::Refused(format!("group {group_name}: is not open; try again"))
        })?;
        let me = shared.context.node.name.clone();
        let own = tokio::task::spawn_blocking(move || {
            let refused = engine.may_discard(parted.at).err().map(|error| error.to_string());
            (Side::of(me, &engine, parted.at), engine.next_branch(parted.at), refused)
        });
        let body = json!(Ask { group: group.id(), at: parted.at });
        let told = self.call(parting.peer.as_str(), METHOD, body, ANSWER_TIMEOUT).await;
        let remote = match told.map(serde_json::from_value::<Side>) {
            Ok(Ok(side)) => Side { node: parting.peer.clone(), ..side },
            Ok(Err(error)) => Side::unknown(parting.peer.clone(), error.to_string()),
            Err(error) => Side::unknown(parting.peer.clone(), error.to_string()),
        };
        let down = |_| ReplicationError::Refused("this node shuts down".to_owned());
        let (local, branch, refused) = own.await.map_err(down)?;
        if let Some(account) = &local.account {
            parting.local_bytes = account.to.bytes_since(parting.at);
        }
        if let Some(account) = &remote.account {
            parting.peer_bytes = Some(account.to.bytes_since(parting.at));
        }
        let branch = if parting.local_bytes > 0 { Some(branch?) } else { None };
        Ok(Preview { parting, branch, refused, local, remote })
    }

    /// Has this node yield: what only it has is kept as a branch, and it follows the peer.
    ///
    /// # Errors
    ///
    /// Where nothing has parted, clients are connected, or the base is further.
    pub async fn resolve(&self, group_name: &str) -> Result<Parting, ReplicationError> {
        let (parting, parted, group) = self.find_parting(group_name)?;
        let shared = Arc::clone(&self.shared);
        let peer = shared.peer_named(parting.peer.as_str())?.node;
        let work = move || {
            shared.yield_to(&*group, peer, parted, Discard::Authored)?;
            shared.input(peer, Input::Yielded { group: group.id() });
            Ok(())
        };
        super::commands::run_blocking(work).await?;
        Ok(parting)
    }
}

/// Of each group the reigns that their authors have given up, as far as the peers are heard.
pub(super) fn given_up_of(
    groups: &[Arc<dyn Replica>],
    cores: &BTreeMap<NodeId, PeerCore>,
) -> BTreeMap<GroupId, BTreeSet<EpochId>> {
    let of = |group: &Arc<dyn Replica>| {
        let id = group.id();
        let heard = cores.iter();
        let heard = heard.filter_map(|(node, core)| Some((*node, core.channel(id)?.remote()?)));
        let own = history_of(&**group, &group.positions());
        (id, given_up(own.last(), heard))
    };
    groups.iter().map(of).collect()
}

/// What a peer is asked for.
#[derive(Serialize, Deserialize)]
struct Ask {
    group: GroupId,
    at: Lsn,
}

impl Shared {
    /// Has this node follow a peer from where their histories part. That is noted before the log is
    /// cut: the record that made the two members may be in what is cut off.
    pub(super) fn yield_to(
        &self,
        group: &dyn Replica,
        peer: NodeId,
        parted: Parted,
        discard: Discard,
    ) -> Result<(), ReplicationError> {
        let _one_at_a_time = locked(&self.notes.cutting);
        let is_new = self.ask_for(peer, group.id())?;
        let yielded = group.yield_to(parted.at, parted.chain, discard);
        // Of a group that failed meanwhile the next start may end the cut.
        if yielded.is_err()
            && is_new
            && group.data_state().0 != DataState::Failed
            && let Err(error) = self.unask(peer, group.id())
        {
            tracing::error!("group {}: that it does not follow a peer: {error}", group.name());
        }
        Ok(yielded?)
    }

    /// Tells a peer of the group what only this node has.
    pub(super) fn tell_side(&self, peer: &PeerContext, body: &Value) -> Result<Value, String> {
        let Ask { group, at } = serde_json::from_value(body.clone())
            .map_err(|error| format!("a request that is not understood: {error}"))?;
        let group = self.shared_with(peer, group)?;
        let side = Side::of(self.context.node.name.clone(), &group, at);
        serde_json::to_value(side).map_err(|error| error.to_string())
    }
}

fn parting_at(peer: &Name, channel: &Channel, at: Lsn) -> Parting {
    Parting {
        peer: peer.clone(),
        at,
        local_bytes: channel.local().history.head.bytes_since(at),
        peer_bytes: channel.remote().map(|remote| remote.history.head.bytes_since(at)),
    }
}

/// Where the two of a split brain part, as far as that is known.
pub(super) fn known_parting(peer: &Name, channel: &Channel) -> Option<Parting> {
    Some(parting_at(peer, channel, channel.parting()?))
}

impl std::fmt::Display for Parting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Parting { peer, at, local_bytes, peer_bytes } = self;
        write!(
            f,
            "histories part at LSN {at}; only here: {}; only on {peer}: ",
            ByteSize(*local_bytes)
        )?;
        match peer_bytes {
            Some(bytes) => write!(f, "{} or more", ByteSize(*bytes)),
            None => write!(f, "unknown while it is not connected"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::control::Mode;
    use crate::replication::asked::tests::{PEER, is_asked_for, node_with_peer};
    use crate::replication::drive::tests::{Node, member};
    use crate::units::Chain;

    /// A node that knows a peer, which is a member of its group, and where the two part.
    fn parted() -> (Node, Arc<Group>, Parted) {
        let (node, group) = node_with_peer();
        let at = group.positions().head;
        group.append_control(member(PEER, "b", Mode::Async)).unwrap();
        (node, group, Parted { at, chain: None })
    }

    #[tokio::test]
    async fn a_log_is_cut_for_no_peer_that_could_not_be_noted() {
        let (node, group, parted) = parted();
        let shared = &node.replication.shared;
        let head = group.positions().head;
        // The list of peers cannot be written.
        let in_the_way = shared.config.state_dir.join("peers.new");
        std::fs::create_dir(&in_the_way).unwrap();
        let refused = shared.yield_to(&*group, PEER, parted, Discard::Authored);
        assert!(refused.unwrap_err().to_string().contains("could not be written"));
        assert_eq!(group.positions().head, head);
        std::fs::remove_dir(&in_the_way).unwrap();
        shared.yield_to(&*group, PEER, parted, Discard::Authored).unwrap();
        assert_eq!(group.positions().head, parted.at);
        assert!(is_asked_for(&node, &group), "it asks to follow although no record says so");
        node.stop();
    }

    #[tokio::test]
    async fn a_yield_that_is_refused_leaves_a_copy_asked_for_only_where_it_was_before() {
        let (node, group, parted) = parted();
        let shared = &node.replication.shared;
        let other = Parted { chain: Some(Chain(1)), ..parted };
        for before in [false, true] {
            if before {
                shared.ask_for(PEER, group.id()).unwrap();
            }
            shared.yield_to(&*group, PEER, other, Discard::Authored).unwrap_err();
            assert_eq!(is_asked_for(&node, &group), before);
        }
        node.stop();
    }
}
