//! What operators and other rooms ask of replication: replicate, stop, pause, resume, status, and
//! the verdict.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::events::Severity;
use crate::group::{DataState, Group, Role};
use crate::log::control::{Control, MemberRecord, Mode, OnLoss};
use crate::units::{ByteSize, GroupId, LogTime, Name, NodeId, Span};

use super::asked;
use super::channel::{Gap, ReplicationState};
use super::copy;
use super::core::{Input, Membership, PeerCore};
use super::epoch::{Relation, compare};
use super::health::{self, BackupCapable, CopyFacts, LAG_LIMIT_DEFAULT, judge_copy, judge_local};
use super::repair;
use super::replica::Replica;
use super::resolve;
use super::service::{Replication, ReplicationError, Shared};
use super::status::{PeerStatus, secondary_lag, why};
use super::switchover;
use super::verify;

/// How a group is replicated; what is not given stays as it is.
#[derive(Clone, Debug, Default)]
pub struct ReplicateOptions {
    /// When a write is answered.
    pub mode: Option<Mode>,
    /// What hosts do without a peer that answers wait for.
    pub on_loss: Option<OnLoss>,
    /// The age of the copy that its owner wants at most.
    pub rpo_target: Option<Span>,
}

impl Replication {
    pub(super) fn install_handlers(&self) {
        self.install_pair_handlers();
        self.on_blocking_call(asked::METHOD, Shared::create_copy);
        self.on_blocking_call(copy::METHOD, Shared::report_copies);
        self.on_blocking_call(switchover::METHOD, Shared::take_over);
        self.on_blocking_call(resolve::METHOD, Shared::tell_side);
        self.on_blocking_call(repair::RECORDS, Shared::give_records);
        self.on_blocking_call(repair::BLOCKS, Shared::give_blocks);
        self.on_blocking_call(verify::OPEN, Shared::open_for_verify);
        self.on_blocking_call(verify::HASH, Shared::hash_for_verify);
        self.on_blocking_call(verify::CLOSE, Shared::end_verify);
    }

    /// Makes a copy of a group on a peer and keeps it up to date from now on. Again for the same
    /// peer, it changes the options; that holds also where the peer cannot be asked for its copy
    /// once more, and then the answer says why.
    ///
    /// # Errors
    ///
    /// Where this node is not the group's primary, the peer is not connected, or it has another
    /// group of that name.
    pub async fn replicate(
        &self,
        group_name: &str,
        peer_name: &str,
        options: ReplicateOptions,
    ) -> Result<Option<String>, ReplicationError> {
        let shared = Arc::clone(&self.shared);
        let group = shared.groups.by_name(group_name)?;
        let peer = shared.peer_named(peer_name)?;
        if group.role() != Role::Primary {
            return Err(ReplicationError::Refused(format!(
                "group {group_name}: is not the primary here; run `tidelog replicate` on the node \
                 that is (`tidelog status {group_name}` shows it)"
            )));
        }
        // What hosts do without the peer can be changed while it is away.
        let known = self.is_replicated_to(group_name, peer_name);
        let mut not_asked = None;
        if !known || shared.is_connected(peer.node) {
            match self.ask_for_copy(peer_name, &*group).await {
                // Nor does it take a peer whose disk is full.
                Err(error) if known => not_asked = Some(error.to_string()),
                asked => asked?,
            }
        }
        let work = move || -> Result<(), ReplicationError> {
            let own = shared.context.node.clone();
            // The same holds once the two have changed sides.
            put_member(&*group, own.id, own.name, options.clone(), false)?;
            put_member(&*group, peer.node, peer.name, options, false)?;
            shared.groups_changed();
            Ok(())
        };
        run_blocking(work).await?;
        Ok(not_asked)
    }

    /// Whether a group has a copy on a peer.
    #[must_use]
    pub fn is_replicated_to(&self, group: &str, peer: &str) -> bool {
        let group = self.shared.groups.by_name(group);
        group.is_ok_and(|group| {
            let control = group.control();
            control.members.iter().any(|member| !member.removed && member.name.as_str() == peer)
        })
    }

    /// Stops replicating a group to a peer; the copy there is retired.
    ///
    /// # Errors
    ///
    /// Where this node is not the primary, or the peer holds no copy.
    pub async fn stop(&self, group_name: &str, peer_name: &str) -> Result<(), ReplicationError> {
        let shared = Arc::clone(&self.shared);
        let group = shared.groups.by_name(group_name)?;
        let control = group.control();
        let member = control
            .members
            .iter()
            .find(|member| member.name.as_str() == peer_name && !member.removed)
            .cloned();
        let Some(member) = member else {
            return Err(ReplicationError::Refused(format!(
                "group {group_name}: is not replicated to {peer_name}; `tidelog status \
                 {group_name}` shows its peers"
            )));
        };
        if member.node == shared.context.node.id {
            return Err(ReplicationError::Refused(format!(
                "group {group_name}: {peer_name} is this node; `--to` names the peer whose copy is to \
                 be retired, `tidelog status {group_name}` shows them"
            )));
        }
        let work = move || -> Result<(), ReplicationError> {
            let options = ReplicateOptions::default();
            put_member(&*group, member.node, member.name.clone(), options, true)?;
            let head = group.positions().head;
            shared.change_ledger(group.id(), |ledger| ledger.note_stopped(&member.name, head));
            shared.save_ledgers();
            shared.unask(member.node, group.id())?;
            shared.groups_changed();
            Ok(())
        };
        run_blocking(work).await
    }

    /// Pauses replication of a group, with one peer or with all. Survives a restart.
    ///
    /// # Errors
    ///
    /// Where group or peer is unknown.
    pub fn pause(&self, group: &str, peer: Option<&str>) -> Result<(), ReplicationError> {
        self.set_paused(group, peer, true)
    }

    /// Ends a pause.
    ///
    /// # Errors
    ///
    /// Where group or peer is unknown.
    pub fn resume(&self, group: &str, peer: Option<&str>) -> Result<(), ReplicationError> {
        self.set_paused(group, peer, false)
    }

    fn set_paused(
        &self,
        group: &str,
        peer: Option<&str>,
        paused: bool,
    ) -> Result<(), ReplicationError> {
        let shared = &self.shared;
        let id = shared.groups.by_name(group)?.id();
        let peers = match peer {
            Some(name) => vec![shared.peer_named(name)?],
            None => shared.store.lock().expect("no holder panics").all().to_vec(),
        };
        for peer in peers {
            shared.store.lock().expect("no holder panics").change(peer.node, |peer| {
                if paused {
                    peer.paused.insert(id);
                } else {
                    peer.paused.remove(&id);
                }
            })?;
            shared.input(peer.node, Input::Pause { group: id, paused });
        }
        let (code, what) = if paused { ("paused", "paused") } else { ("resumed", "goes on") };
        let text = format!("group {group}: replication {what} by command");
        shared.context.events.emit(Severity::Info, code, Some(group), text, Value::Null);
        Ok(())
    }

    /// A group is not on this node any more, so no peer's copy of it is wanted here.
    ///
    /// # Errors
    ///
    /// Where that cannot be written.
    pub fn forget_group(&self, group: GroupId) -> Result<(), ReplicationError> {
        let peers = self.shared.store.lock().expect("no holder panics").all().to_vec();
        Ok(peers.iter().try_for_each(|peer| self.shared.unask(peer.node, group))?)
    }

    /// The `peers` of a group in status: its copies, or on a secondary its primary.
    #[must_use]
    pub fn status(&self, group: &Group) -> Vec<PeerStatus> {
        self.status_of(group.id())
    }

    /// The same, by identity.
    #[must_use]
    pub fn status_of(&self, group: GroupId) -> Vec<PeerStatus> {
        let now = self.shared.now();
        let wall = self.shared.wall();
        let required = self.shared.replica(group).map_or_else(Vec::new, |g| g.required_peers());
        let cores = self.shared.cores.lock().expect("no holder panics");
        let status = |(node, core): (&NodeId, &PeerCore)| {
            let status = core.status(now, group)?.with_wall(now, wall);
            let status = status.with_heard(core.channel(group), now, wall);
            let required = required.iter().find(|(required, _)| required == node);
            let told = self.shared.peer_report(*node, group, now).map(|(report, _)| report);
            Some(status.with_required(required.map(|(_, peer)| peer)).with_copy(told))
        };
        cores.iter().filter_map(status).collect()
    }

    /// Whether the copy of a group may be backed up now: on a secondary its own, on a primary the
    /// peer's, and without a peer the data here. `limit` is the lag allowed; none means the group's
    /// `rpo_target`, or else 60 s.
    #[must_use]
    pub fn backup_capable(&self, group: &Group, limit: Option<Duration>) -> BackupCapable {
        self.backup_capable_of(group, limit, None)
    }

    /// The same, for any replica; on a primary of one peer's copy alone, where that is given.
    #[must_use]
    pub fn backup_capable_of(
        &self,
        group: &dyn Replica,
        limit: Option<Duration>,
        peer: Option<&Name>,
    ) -> BackupCapable {
        let shared = &self.shared;
        let now = shared.now();
        let (data_state, data_reason, _) = group.data_state();
        let check = shared.log_check(group.id(), now);
        let facts: Vec<(NodeId, CopyFacts)> = {
            let cores = shared.cores.lock().expect("no holder panics");
            let facts = |(node, core): (&NodeId, &PeerCore)| {
                Some((*node, copy_facts(core, group, now, limit)?))
            };
            let remote = |core: &PeerCore| Some(core.channel(group.id())?.remote()?.primary);
            // Where this node follows one of its peers, the others say nothing of its copy.
            let follows = cores.values().any(|core| remote(core) == Some(true));
            let wanted = |core: &PeerCore| match group.role() {
                Role::Primary => peer.is_none_or(|peer| peer == core.name()),
                Role::Secondary => !follows || remote(core) == Some(true),
            };
            cores.iter().filter(|(_, core)| wanted(core)).filter_map(facts).collect()
        };
        let judged: Vec<BackupCapable> = facts
            .into_iter()
            .map(|(node, mut facts)| {
                if facts.own {
                    facts.data_state = Some(data_state);
                    facts.data_reason = data_reason.clone();
                    facts.log_check = check.clone();
                } else if let Some((told, check)) = shared.copy_report(node, group.id(), now) {
                    facts.data_state = Some(told.data_state);
                    facts.data_reason = told.data_reason;
                    facts.log_check = check;
                    let differs = shared.ledger(group.id()).differs_from(Some(&*facts.peer));
                    facts.log_check.differs = facts.log_check.differs.take().or(differs);
                    facts.mismatch = facts.mismatch.or(told.mismatch);
                }
                judge_copy(&facts)
            })
            .collect();
        let copy = group.role() == Role::Secondary && data_state == DataState::Consistent;
        if judged.is_empty() && copy {
            let reason = health::Reason {
                code: "no-peer".to_owned(),
                text: "this is a copy, and its primary is not among the peers of this node"
                    .to_owned(),
            };
            return BackupCapable { verdict: health::Verdict::No, reasons: vec![reason] };
        }
        // Of several copies one that is fit is enough; if none is, the first tells why.
        let fit = judged.iter().find(|judged| judged.is_yes()).or(judged.first());
        match fit {
            Some(judged) => judged.clone(),
            None => judge_local(data_state, data_reason.as_deref(), &check),
        }
    }

    /// Why `promote` without force must not go on here: the peer is connected as primary, or this
    /// node knows that it is behind. `None` where nothing speaks against it.
    #[must_use]
    pub fn promote_refusal(&self, group: GroupId) -> Option<String> {
        let replica = self.shared.replica(group);
        let (now, wall) = (self.shared.now(), self.shared.wall());
        let cores = self.shared.cores.lock().expect("no holder panics");
        let cannot_serve = replica.and_then(|replica| {
            let (state, reason, _) = replica.data_state();
            let failed = (state == DataState::Failed)
                .then(|| reason.unwrap_or_else(|| "no reason is known".to_owned()));
            let reigning = cores.values().find(|core| reigns(core, group));
            let primary = reigning.map(PeerCore::name);
            refusal_of_own_disk(replica.name(), failed, replica.full_now(), primary)
        });
        cannot_serve.or_else(|| refusal_to_promote(cores.values(), group, now, wall))
    }

    /// What is not known of the peers that do not say now what they have: whoever promotes without
    /// them may leave out what they wrote. `None` where all say it.
    #[must_use]
    pub fn unheard(&self, group: GroupId) -> Option<String> {
        let (now, wall) = (self.shared.now(), self.shared.wall());
        let cores = self.shared.cores.lock().expect("no holder panics");
        let unheard = cores.values().filter_map(|core| unheard_of(core, group, now, wall));
        let unheard: Vec<String> = unheard.collect();
        (!unheard.is_empty()).then(|| unheard.join("; "))
    }
}

/// Why a copy is no use as primary by the state of its own disk, and what helps: a switchover would
/// be refused too.
fn refusal_of_own_disk(
    group: &Name,
    failed: Option<String>,
    full: Option<String>,
    primary: Option<&Name>,
) -> Option<String> {
    let no_harm = |then: &str| match primary {
        Some(primary) => format!(
            "{primary} is connected and serves as its primary, so hosts stay there; {then}, and it \
             takes from {primary} what it lacks; when `tidelog status {group}` says `streaming`, \
             `tidelog switchover {group}` changes sides"
        ),
        None => format!("{then}, then `tidelog promote {group}` again, or promote another copy"),
    };
    if let Some(why) = failed {
        let help = no_harm("restart this node once its disk is well");
        return Some(format!(
            "group {group}: the disk under this copy failed ({why}), so it could take no writes, by \
             `--force` neither; {help}"
        ));
    }
    // Without a primary it may serve reads at least, and its log may be folded yet.
    let (why, _) = full.zip(primary)?;
    let help = no_harm("make room for the log here");
    Some(format!("group {group}: hosts could not write here: {why}; {help}"))
}

/// The peer is connected and reigns over a group of which this node has a copy.
fn reigns(core: &PeerCore, group: GroupId) -> bool {
    let Some(channel) = core.channel(group) else { return false };
    let (local, Some(remote)) = (channel.local(), channel.remote()) else { return false };
    // One that has come back after this node's reign began waits for this node to go on.
    let superseded = remote.history.counter() < local.history.counter();
    core.conn().is_some() && !local.primary && remote.primary && !(remote.recovering && superseded)
}

/// The same, by the cores of all peers.
pub fn refusal_to_promote<'a>(
    cores: impl Iterator<Item = &'a PeerCore>,
    group: GroupId,
    now: Duration,
    wall: LogTime,
) -> Option<String> {
    for core in cores {
        let Some(channel) = core.channel(group) else { continue };
        let local = channel.local();
        if local.primary {
            continue;
        }
        let name = &local.name;
        let peer = core.name();
        if reigns(core, group) {
            let (state, reason, _) = channel.state();
            let first = match state {
                ReplicationState::Streaming | ReplicationState::CatchingUp => format!(
                    "`tidelog switchover {name}` changes sides and loses nothing; if {peer} has \
                     just died, try again in a moment"
                ),
                // A switchover would be refused.
                _ => format!(
                    "this copy does not follow it now: replication is {}: {reason}; when it \
                     follows again, `tidelog switchover {name}` changes sides and loses nothing",
                    state.text()
                ),
            };
            return Some(format!(
                "group {name}: {peer} is connected and is its primary; {first}; `tidelog promote \
                 {name} --force` reigns beside it"
            ));
        }
        if let Some(remote) = channel.remote().filter(|remote| !remote.primary)
            && compare(&local.history, &remote.history) == Relation::MineIsPrefix
        {
            let behind = remote.history.head.bytes_since(local.history.head);
            return Some(format!(
                "group {name}: {peer} has {} that this node lacks; `tidelog promote {name}` there, \
                 or lose them with `tidelog promote {name} --force`",
                ByteSize(behind)
            ));
        }
        if let Some(parted) = channel.parted() {
            let own = local.history.head.bytes_since(parted.at);
            return Some(format!(
                "group {name}: the last {} here are not in the history of {peer}, which goes \
                 on from LSN {}; `tidelog resolve {name} --preview` shows both sides, `tidelog \
                 promote {name} --force` reigns beside it",
                ByteSize(own),
                parted.at
            ));
        }
        let gap = channel.gap().filter(|_| local.membership != Membership::Stranger);
        if let Some(Gap { bytes: behind @ 1.., at: Some(at), .. }) = gap {
            let help = if channel.was_stopped() {
                format!(
                    "replication was stopped; `tidelog replicate {name} --to` with this node's \
                     name, on the primary, takes it up again"
                )
            } else {
                format!("bring {peer} back, which has them")
            };
            return Some(format!(
                "group {name}: this node lacks at least {} that {peer} had when it was last heard, \
                 {}; {help}, or lose them with `tidelog promote {name} --force`",
                ByteSize(behind),
                to_the_second(at.wall(now, wall))
            ));
        }
    }
    None
}

/// What nobody knows of a peer that does not say now what it has.
fn unheard_of(core: &PeerCore, group: GroupId, now: Duration, wall: LogTime) -> Option<String> {
    let channel = core.channel(group)?;
    if channel.remote().is_some() || channel.local().membership == Membership::Stranger {
        return None;
    }
    let peer = core.name();
    match channel.gap().and_then(|gap| gap.at) {
        Some(at) => Some(format!(
            "{peer} was last heard {}: what it has behind LSN {}, if anything, is not here",
            to_the_second(at.wall(now, wall)),
            channel.local().history.head
        )),
        // It has been heard, and has said nothing of the group or has another history.
        None if core.heard().is_some() => None,
        None => Some(format!(
            "it is not known whether {peer} had more: it has not been heard since this node started"
        )),
    }
}

fn to_the_second(time: LogTime) -> LogTime {
    LogTime(time.0 / 1_000_000_000 * 1_000_000_000)
}

pub(super) async fn run_blocking(
    work: impl FnOnce() -> Result<(), ReplicationError> + Send + 'static,
) -> Result<(), ReplicationError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|_| Err(ReplicationError::Refused("this node shuts down".to_owned())))
}

/// Appends a member record, where it says something new.
///
/// # Errors
///
/// Where it could not be appended.
pub fn put_member(
    group: &dyn Replica,
    node: NodeId,
    name: Name,
    options: ReplicateOptions,
    removed: bool,
) -> Result<(), ReplicationError> {
    let control = group.control();
    let known = control.members.iter().find(|member| member.node == node);
    let other = known.map_or_else(Map::new, |member| member.other.clone());
    let member = MemberRecord {
        node,
        name,
        mode: options.mode.or(known.map(|known| known.mode)).unwrap_or_default(),
        on_loss: options.on_loss.or(known.map(|known| known.on_loss)).unwrap_or_default(),
        rpo_target: options.rpo_target.or(known.and_then(|known| known.rpo_target)),
        removed,
        other,
    };
    if known != Some(&member) {
        group.append_control(Control::Member(member))?;
    }
    Ok(())
}

/// What is known of the copy that this node and a peer share.
fn copy_facts(
    core: &PeerCore,
    group: &dyn Replica,
    now: Duration,
    limit: Option<Duration>,
) -> Option<CopyFacts> {
    let channel = core.channel(group.id())?;
    let local = channel.local();
    let Membership::Member { rpo_target, .. } = local.membership else { return None };
    let (replication, ..) = channel.state();
    let (compared, mismatch) = channel.comparison();
    let own = !local.primary;
    let acked = channel.acked();
    let (received, durable, primary_head, lag) = if own {
        let head = local.history.head;
        let lacks = channel.gap().map_or(0, |gap| gap.bytes);
        let primary_head = head.advance(lacks);
        (head, local.durable.min(head), primary_head, secondary_lag(channel, now))
    } else {
        let (received_lag, durable_lag) = channel.lags(now);
        let worse = received_lag.zip(durable_lag).map(|(received, durable)| received.max(durable));
        (acked.received, acked.durable, local.history.head, worse)
    };
    let lag_limit = limit.or(rpo_target.map(|target| target.0)).unwrap_or(LAG_LIMIT_DEFAULT);
    Some(CopyFacts {
        own,
        peer: core.name().to_string(),
        link_down: core.link_down().map(|(since, _)| now.saturating_sub(since)),
        replication,
        replication_reason: why(channel),
        lag,
        lag_limit,
        data_state: None,
        data_reason: None,
        received,
        durable,
        primary_head,
        compared,
        mismatch,
        log_check: health::LogCheck::default(),
    })
}
