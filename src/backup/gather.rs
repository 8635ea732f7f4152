//! The facts of this node and its peer, asked of those who know them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::branches::{Filled, Reigns};
use super::claim::SlotResult;
use super::facts::{Facts, NodeFacts, Reason, ReplicationFacts};
use super::peer::ReplicationView;
use super::reach::Known;
use super::run::PeerPhase;
use super::scheduler::{Inner, RunKey};
use crate::group::{ControlView, DataState, Group, Role};
use crate::log::control::JobRecord;
use crate::units::{EpochId, GroupId, LogTime, Name, NodeId, Span};

/// How long a peer may take to say how it is.
const PEER_TIMEOUT: Duration = Duration::from_secs(5);

/// Reasons of health that waiting does not mend: the copy is unfit, not behind. A damaged base is
/// none: a peer repairs it, and until then a run that needs what is damaged fails by itself.
const UNFIT: [&str; 8] = [
    "no-image",
    "data-failed",
    "retired",
    "log-damaged",
    "logs-differ",
    "copies-differ",
    "positions",
    "replication-split-brain",
];

/// What `backup.observe` is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ObserveCall {
    pub group: GroupId,
    pub job: EpochId,
    pub slot: Option<LogTime>,
}

/// What it answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ObserveAnswer {
    pub facts: NodeFacts,
    pub phase: PeerPhase,
    /// Whether the repository holds the slot's result, where this node sees the repository. An
    /// older node does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made: Option<bool>,
    /// The slot's results, of all branches, by which the one that asks judges for itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub results: Option<Vec<SlotResult>>,
}

impl ObserveAnswer {
    /// Whether the slot's backup is there, for a node that holds the group: one of the history that
    /// the node has.
    pub fn made(&self, group: &Group, slot: LogTime) -> Option<Filled> {
        let its_word = || self.made.map(|made| if made { Filled::Perhaps } else { Filled::No });
        let results = self.results.as_ref();
        results.map(|results| Reigns::of(group, slot).made(results)).or_else(its_word)
    }
}

/// A group's nodes as this one knows them.
pub(super) struct Nodes {
    pub role: Role,
    pub replicated: bool,
    pub retired: bool,
    /// The node with the other role, if there is one.
    pub other: Option<Name>,
}

/// The nodes that hold a group beside `this` one.
pub fn others(control: &ControlView, this: NodeId) -> Vec<Name> {
    let members = control.members.iter().filter(|member| !member.removed && member.node != this);
    members.map(|member| member.name.clone()).collect()
}

/// The node with which `this` one shares the slots of a group: a copy with its primary, a primary
/// with a copy. `against` tells of a node whether it is not linked, and whether anything else
/// speaks against it: of several copies one of which neither is true, else the first.
pub fn counterpart(
    control: &ControlView,
    this: NodeId,
    role: Role,
    against: impl Fn(&Name) -> (bool, bool),
) -> Option<Name> {
    match (role, control.epochs.last()) {
        (Role::Secondary, Some(epoch)) if epoch.author != this => Some(epoch.author_name.clone()),
        // A primary; or demoted, and nobody was promoted yet.
        _ => {
            let mut names = others(control, this);
            if names.len() > 1 {
                names.sort_by_cached_key(against);
            }
            names.into_iter().next()
        }
    }
}

/// Whether reasons of health say that the bytes of two copies are not the same.
fn differs(reasons: &[Reason]) -> bool {
    reasons.iter().any(|reason| ["copies-differ", "logs-differ"].contains(&reason.code.as_str()))
}

impl Inner {
    /// Whether the copy here is known to differ from another one.
    pub(super) fn differs(&self, group: &Group) -> bool {
        let peers = others(&group.control(), self.context.node.id);
        peers.iter().any(|peer| differs(&self.peers.view(group, Some(peer)).reasons))
    }

    /// Who holds a group beside this node.
    pub(super) fn nodes(&self, group: &Group) -> Nodes {
        let role = group.role();
        let retired = group.data_state().0 == DataState::Retired;
        let other = counterpart(&group.control(), self.context.node.id, role, |name| {
            let view = self.peers.view(group, Some(name));
            (view.link_lost.is_some(), !view.reasons.is_empty())
        });
        Nodes { role, replicated: other.is_some(), retired, other }
    }

    /// The facts of this node for a job.
    pub(super) fn own_facts(&self, group: &Group, job: &JobRecord) -> NodeFacts {
        let load = self.meter.measure(self.context.env.clock.monotonic());
        let mut facts = NodeFacts::unknown(self.context.node.name.clone());
        facts.cpu_percent = load.cpu_percent;
        facts.memory_free_bytes = load.memory_free_bytes;
        if let Ok(space) = self.context.env.disk.space(&self.config.data_dir) {
            facts.storage_free_bytes = Some(space.free_bytes);
            facts.storage_total_bytes = Some(space.total_bytes);
        }
        let known = match self.repository(&job.repository) {
            Ok(repository) => repository.probe(),
            Err(error) => Known { id: Err(error), age: Span::default() },
        };
        facts.repository_age = known.age;
        match known.id {
            Ok(id) => {
                facts.repository = Some(true);
                facts.repository_id = Some(id);
            }
            Err(error) => {
                facts.repository = Some(false);
                facts.repository_reason = Some(error.to_string());
            }
        }
        let (state, reason, _) = group.data_state();
        let none = matches!(state, DataState::None | DataState::ReceivingImage);
        if none || state == DataState::Failed {
            let why = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
            let (code, what) = if none {
                ("no-image", "there is no image yet")
            } else {
                ("data-failed", "the disk under the data failed")
            };
            facts.problems.push(Reason::new(code, format!("{}: {what}{why}", facts.name)));
        }
        if let Some(why) = group.held_back() {
            // What it holds is not the history that goes on.
            let text = format!("{}: group {} {why}", facts.name, group.name());
            facts.problems.push(Reason::new("held-back", text));
        }
        facts
    }

    /// Asks the peer how it is and how far with a slot; its last known facts where it does not
    /// answer.
    pub(super) fn ask_peer(
        &self,
        peer: &Name,
        view: &ReplicationView,
        group: &Group,
        key: &RunKey,
        slot: Option<LogTime>,
    ) -> (NodeFacts, Option<PeerPhase>) {
        let now = self.context.env.clock.monotonic();
        if view.link_lost.is_none() {
            let call = ObserveCall { group: key.group, job: key.job, slot };
            let answer = self.peers.call(peer, "backup.observe", json!(call), PEER_TIMEOUT);
            let answer = self.runtime.block_on(answer).and_then(|answer| {
                serde_json::from_value::<ObserveAnswer>(answer).map_err(|error| error.to_string())
            });
            match answer {
                Ok(answer) => {
                    let of_other_branch =
                        slot.is_some_and(|slot| answer.made(group, slot) == Some(Filled::No));
                    let ObserveAnswer { mut facts, mut phase, .. } = answer;
                    if phase == PeerPhase::Done && of_other_branch {
                        phase = PeerPhase::Unknown;
                    }
                    facts.name = peer.clone();
                    facts.age = Span::default();
                    let known = (facts.clone(), now);
                    self.lock().peer_facts.insert((key.group, key.job), known);
                    return (facts, Some(phase));
                }
                Err(error) => tracing::debug!("peer {peer}: backup.observe: {error}"),
            }
        }
        let known = self.lock().peer_facts.get(&(key.group, key.job)).cloned();
        match known.filter(|(facts, _)| facts.name == *peer) {
            Some((mut facts, at)) => {
                facts.age = Span(now.saturating_sub(at));
                (facts, None)
            }
            None => (NodeFacts::unknown(peer.clone()), None),
        }
    }

    /// All facts for a job, and what the peer says of the slot.
    pub(super) fn gather(
        &self,
        group: &Arc<Group>,
        job: &JobRecord,
        slot: Option<LogTime>,
    ) -> (Facts, Option<PeerPhase>) {
        let key = RunKey { group: group.id(), job: job.id, slot: slot.unwrap_or(LogTime(0)) };
        let nodes = self.nodes(group);
        let view = self.peers.view(group, nodes.other.as_ref());
        let own = self.own_facts(group, job);
        let (other, phase) = match &nodes.other {
            Some(peer) => self.ask_peer(peer, &view, group, &key, slot),
            None => (own.clone(), None),
        };
        let facts = assemble(group.name(), job, slot, &nodes, view, own, other);
        (facts, phase)
    }
}

fn assemble(
    group: &Name,
    job: &JobRecord,
    slot: Option<LogTime>,
    nodes: &Nodes,
    view: ReplicationView,
    own: NodeFacts,
    other: NodeFacts,
) -> Facts {
    let (mut primary, mut secondary) = match nodes.role {
        Role::Primary => (own, other),
        Role::Secondary => (other, own),
    };
    let (unfit, behind): (Vec<_>, Vec<_>) =
        view.reasons.into_iter().partition(|reason| UNFIT.contains(&reason.code.as_str()));
    if nodes.replicated {
        for reason in unfit {
            if secondary.problems.iter().all(|known| known.code != reason.code) {
                secondary.problems.push(reason);
            }
        }
        if let (Some(one), Some(two)) = (&primary.repository_id, &secondary.repository_id)
            && one != two
        {
            let text = format!(
                "repository {} is {} on {} and {} on {}",
                job.repository,
                &one[..8.min(one.len())],
                primary.name,
                &two[..8.min(two.len())],
                secondary.name
            );
            secondary.problems.push(Reason::new("repository-differs", text));
        }
    } else {
        primary.problems.extend(unfit.iter().cloned());
        secondary.problems.extend(unfit);
    }
    Facts {
        group: group.clone(),
        job: job.name.clone(),
        slot,
        role: nodes.role,
        replicated: nodes.replicated,
        retired: nodes.retired,
        replication: ReplicationFacts {
            healthy: behind.is_empty(),
            reasons: behind,
            lag: view.lag.map(Span),
            link_lost: view.link_lost.map(Span),
            age: Span::default(),
        },
        primary,
        secondary,
        // Hosts mount where the primary is; nothing else tells where the application runs.
        active: Role::Primary,
        deadline_passed: false,
        next_due: None,
        done_by: None,
        running_on: None,
        given_up: Vec::new(),
        assumed: BTreeSet::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::decision::{Verdict, decide};
    use super::super::job::{JobSettings, Placement};
    use super::*;

    #[test]
    fn a_copy_that_is_known_to_differ_is_backed_up_at_no_deadline() {
        let name = |text: &str| text.parse::<Name>().expect("a name");
        let node = |text: &str| NodeFacts {
            name: name(text),
            ..Facts::of_fit_pair(Role::Primary).secondary
        };
        let job = JobRecord {
            id: EpochId(1),
            name: name("j"),
            repository: "main".to_owned(),
            schedule: None,
            zone: None,
            since: LogTime(1),
            settings: serde_json::Map::new(),
            removed: false,
            other: serde_json::Map::new(),
        };
        let settings = JobSettings {
            placement: Placement::SecondaryOnly,
            allow_stale: true,
            ..JobSettings::default()
        };
        for (code, verdict) in [("copies-differ", Verdict::Fail), ("paused", Verdict::Run)] {
            let nodes = Nodes {
                role: Role::Secondary,
                replicated: true,
                retired: false,
                other: Some(name("a")),
            };
            let reasons = vec![Reason::new(code, "a word")];
            let lag = Some(Duration::ZERO);
            let view = ReplicationView { link_lost: None, lag, reasons };
            let mut facts = assemble(&name("g"), &job, None, &nodes, view, node("b"), node("a"));
            facts.deadline_passed = true;
            assert_eq!(decide(&facts, &settings).decision, verdict, "{code}");
        }
    }
}
