//! Handlers of groups: status, create, show, set, delete, promote, demote.

use serde_json::{Map, Value, json};

use crate::backup::SlotAlarm;
use crate::events::Severity;
use crate::group::{DataState, Group, GroupError, NotOpened, Role};
use crate::log::control::{Control, OnFull, OnPeerBehind, PolicyRecord};
use crate::replication::Parting;
use crate::units::{ByteSize, LogTime, Name, Span};

use super::api::{
    Done, EpochInfo, GroupInfo, GroupStatus, Groups, LogStatus, MemberInfo, PeerStatus, PolicyInfo,
    ProtectionWindow, Status, UncleanStart, UnopenedGroup, VOLUME_BLOCK_BYTES, VolumeStatus,
};
use super::attention::attention;
use super::context::Context;
use super::problem::Problem;
use super::route::{Answer, Call};
use super::volumes::{clients, hosts};

/// An answer as JSON.
pub(super) fn answer<T: serde::Serialize>(value: T) -> Answer {
    serde_json::to_value(value).map_err(|error| Problem::new(500, "bug", error.to_string()))
}

/// An answer that is only "done".
pub(super) fn done(what: impl Into<String>) -> Answer {
    answer(Done { done: what.into() })
}

pub(super) fn status(context: &Context, call: &Call) -> Answer {
    let only = call.query("group");
    let mut unopened = context.registry.unopened();
    unopened.retain(|group| {
        only.is_none_or(|only| group.name.as_ref().is_some_and(|name| name.as_str() == only))
    });
    let groups = match context.groups(only) {
        Err(_) if !unopened.is_empty() => Vec::new(),
        groups => groups?,
    };
    let wanted = |group: &Name| groups.iter().any(|known| known.name() == group);
    let of_these = |mut alarms: Vec<SlotAlarm>| {
        alarms.retain(|alarm| wanted(&alarm.group));
        alarms
    };
    let mut status = Status {
        node: context.node.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        groups: groups.iter().map(|group| group_status(context, group)).collect(),
        unopened_groups: unopened
            .into_iter()
            .map(|NotOpened { id, name, reason, since }| UnopenedGroup { id, name, reason, since })
            .collect(),
        backup_alarms: of_these(context.scheduler.alarms()),
        backup_failures: of_these(context.scheduler.failures()),
        attention: Vec::new(),
    };
    status.attention = attention(&status, context.env.clock.wall());
    answer(status)
}

/// What recovery said of a group at this start of the node.
fn unclean_start(context: &Context, group: &Name) -> Option<UncleanStart> {
    let found = context.registry.recovery(group)?;
    let ((from_lsn, to_lsn), (from, to)) = found.cut.zip(found.cut_time)?;
    Some(UncleanStart { from_lsn, to_lsn, from, to })
}

fn group_status(context: &Context, group: &Group) -> GroupStatus {
    let positions = group.positions();
    let control = group.control();
    let (data_state, reason, since) = group.data_state();
    let good = data_state == DataState::Consistent;
    let (full, unfolded, disk) = (group.log_full(), group.fold_failure(), group.disk_room());
    GroupStatus {
        name: group.name().clone(),
        role: group.role(),
        role_reason: group.waits_because(),
        epoch: positions.epoch,
        data_state,
        data_state_reason: if good { None } else { reason },
        data_state_since: if good { None } else { Some(since) },
        unclean_start: unclean_start(context, group.name()),
        volumes: control
            .volumes
            .iter()
            .map(|volume| VolumeStatus {
                name: volume.name.clone(),
                size_bytes: volume.size_bytes,
                block_size_bytes: VOLUME_BLOCK_BYTES,
                clients: clients(group, volume),
                hosts: hosts(group, volume),
                restoring: volume.restoring,
            })
            .collect(),
        log: LogStatus {
            head_lsn: positions.head,
            durable_lsn: positions.durable,
            committed_lsn: positions.committed,
            horizon_lsn: positions.horizon,
            used_bytes: positions.head.bytes_since(positions.horizon),
            allocated_bytes: positions.log_used_bytes,
            limit_bytes: positions.log_limit_bytes,
            limit_reason: group.log_limit_reason(),
            full_reason: full.as_ref().map(|full| full.reason.clone()),
            full_since: full.map(|full| full.since),
            disk_free_bytes: disk.map(|disk| disk.free_bytes),
            disk_reserve_bytes: disk.map(|disk| disk.reserve_bytes),
            fold_reason: unfolded.as_ref().map(|unfolded| unfolded.reason.clone()),
            fold_since: unfolded.map(|unfolded| unfolded.since),
        },
        protection_window: window(positions.horizon_time, positions.time),
        peers: context.replication.status(group),
        backup_capable: context.replication.backup_capable(group, None),
        branches: group.known_branches(),
        damage: context.replication.damage(group),
        scrub: context.replication.scrub_status(group),
        verify: context.replication.verify_status(group),
        differences: context.replication.differences(group),
    }
}

fn window(from: LogTime, to: LogTime) -> ProtectionWindow {
    ProtectionWindow { from, to, seconds: to.since(from).as_secs_f64() }
}

pub(super) fn list(context: &Context, _call: &Call) -> Answer {
    let groups = context.groups(None)?;
    answer(Groups { groups: groups.iter().map(|group| group_info(group)).collect() })
}

pub(super) fn show(context: &Context, call: &Call) -> Answer {
    answer(group_info(&*context.group(call.path("group"))?))
}

fn group_info(group: &Group) -> GroupInfo {
    let control = group.control();
    GroupInfo {
        name: group.name().clone(),
        id: group.id(),
        role: group.role(),
        data_state: group.data_state().0,
        segment_bytes: group.segment_bytes(),
        volumes: control.volumes.iter().map(|volume| volume.name.clone()).collect(),
        policy: PolicyInfo {
            window: control.policy.window,
            log_limit: control.policy.log_limit,
            on_full: control.policy.on_full,
            on_peer_behind: control.policy.on_peer_behind,
        },
        members: control
            .members
            .iter()
            .map(|member| MemberInfo {
                node: member.node,
                name: member.name.clone(),
                mode: member.mode,
                on_loss: member.on_loss,
                rpo_target_seconds: member.rpo_target.map(|target| target.0.as_secs_f64()),
            })
            .collect(),
        epochs: epochs(group),
    }
}

pub(super) fn epochs(group: &Group) -> Vec<EpochInfo> {
    let info = |epoch: &crate::log::control::EpochRecord| EpochInfo {
        counter: epoch.counter,
        epoch: epoch.id,
        lsn: epoch.first_lsn,
        author: epoch.author_name.clone(),
        reason: epoch.reason.clone(),
    };
    group.control().epochs.iter().map(info).collect()
}

pub(super) fn create(context: &Context, call: &Call) -> Answer {
    let name: Name = call.required("name")?;
    let group = context.registry.create(name, None)?;
    answer(group_info(&group))
}

/// The keys of `group set`.
const POLICY_KEYS: [&str; 4] = ["window", "log_limit", "on_full", "on_peer_behind"];

pub(super) fn set(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    if call.body.is_empty() {
        return Err(Problem::invalid(format!(
            "group {}: nothing to set; keys are {}",
            group.name(),
            POLICY_KEYS.join(", ")
        )));
    }
    let policy = changed_policy(&group.control().policy, &call.body)?;
    group.append_control(Control::Policy(policy))?;
    answer(group_info(&group))
}

fn changed_policy(
    present: &PolicyRecord,
    changes: &Map<String, Value>,
) -> Result<PolicyRecord, Problem> {
    let mut policy = present.clone();
    for (key, value) in changes {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let wrong = |error: String| Problem::invalid(format!("{key}: {error}"));
        match key.as_str() {
            "window" => {
                policy.window = text.parse::<Span>().map_err(|e| wrong(e.to_string()))?;
            }
            "log_limit" => {
                policy.log_limit = text.parse::<ByteSize>().map_err(|e| wrong(e.to_string()))?;
            }
            "on_full" => {
                policy.on_full = match text.as_str() {
                    "fold" => OnFull::Fold,
                    "block" => OnFull::Block,
                    _ => return Err(wrong(format!("`{text}`: expected fold or block"))),
                };
            }
            "on_peer_behind" => {
                policy.on_peer_behind = match text.as_str() {
                    "release" => OnPeerBehind::Release,
                    "block" => OnPeerBehind::Block,
                    _ => return Err(wrong(format!("`{text}`: expected release or block"))),
                };
            }
            _ => {
                let hint = crate::config::nearest(key, &POLICY_KEYS)
                    .map_or_else(|| POLICY_KEYS.join(", "), str::to_owned);
                return Err(Problem::invalid(format!("unknown key `{key}`; try {hint}")));
            }
        }
    }
    Ok(policy)
}

pub(super) fn delete(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let name = group.name().clone();
    let clients: usize = group.clients().iter().map(|(_, count)| count).sum();
    if clients > 0 {
        return Err(Problem::refused(format!(
            "group {name}: {clients} clients are connected; disconnect them first, `tidelog \
             status {name}` shows which volumes they use"
        )));
    }
    // With a damaged log it can write no record that replication ends, and serves nobody.
    let reigns = group.role() == Role::Primary && !group.log_is_broken();
    if let Some(peer) = context.replication.status(&group).iter().find(|peer| {
        let follows = matches!(&*peer.replication_state, "streaming" | "catching-up");
        reigns || peer.link_state == "connected" && follows
    }) && group.data_state().0 != DataState::Retired
    {
        let (node, copy) = match reigns {
            true => ("here", peer.name.as_str()),
            false => ("on the primary", context.node.name.as_str()),
        };
        return Err(Problem::refused(format!(
            "group {name}: is replicated with {peer}; `tidelog replicate {name} --stop --to {copy}` \
             {node} first",
            peer = peer.name
        )));
    }
    if let Some(peer) = only_here(context, &group) {
        return Err(Problem::refused(format!(
            "group {name}: this node was its primary last, and may have what {peer} has not: \
             `tidelog promote {name}` on the node that is to go on, then `tidelog replicate {name} \
             --stop` there"
        )));
    }
    let id = group.id();
    drop(group);
    context.registry.delete(&name)?;
    if let Err(error) = context.replication.forget_group(id) {
        tracing::warn!("group {name}: that it is gone: {error}");
    }
    done(format!("group {name}: deleted on node {}", context.node.name))
}

/// A member that may lack what this node wrote: it reigned last, as far as is known, and nobody
/// reigns who was heard.
fn only_here(context: &Context, group: &Group) -> Option<String> {
    let control = group.control();
    let authored = control.epochs.last().is_some_and(|last| last.author == context.node.id);
    // Without an image no promote goes on with it.
    let state = group.data_state().0;
    let shows = !matches!(state, DataState::None | DataState::ReceivingImage | DataState::Retired);
    let kept = shows && !group.log_is_broken();
    let peers = context.replication.status(group);
    let reigns = |peer: &PeerStatus| peer.link_state == "connected" && peer.role == "primary";
    if !authored || !kept || group.role() == Role::Primary || peers.iter().any(reigns) {
        return None;
    }
    let others = control.members.iter().filter(|member| member.node != context.node.id);
    others.map(|member| member.name.to_string()).next()
}

pub(super) fn promote(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let force: bool = call.field("force")?.unwrap_or(false);
    let waits = group.is_asking().then(|| group.waits_because()).flatten();
    if group.role() == Role::Primary && (waits.is_none() || !force) {
        group.wait_to_serve()?;
        return done(format!("group {}: is the primary here already", group.name()));
    }
    let refusal = waits.or_else(|| context.replication.promote_refusal(group.id()));
    if !force && let Some(refusal) = refusal {
        return Err(Problem::new(409, "promote-refused", refusal));
    }
    let unheard = context.replication.unheard(group.id());
    let end = group.positions().request_end;
    let unclean = unclean_start(context, group.name());
    group.promote("promote")?;
    let mut text = format!("group {}: the new reign begins at LSN {end}", group.name());
    let unheard = unheard.map_or_else(String::new, |unheard| format!("; {unheard}"));
    let (severity, code) = match refusal {
        Some(refusal) => {
            text = format!("{text}, and leaves out what it lacks: {refusal}");
            (Severity::Warning, "promoted-by-force")
        }
        None => {
            text.push_str(&unheard);
            (Severity::Info, "promoted")
        }
    };
    let name = Some(group.name().as_str());
    context.events.emit(severity, code, name, text, json!({ "from_lsn": end }));
    let lost = unclean.map_or_else(String::new, |span| {
        format!(
            "; this node had an unclean start, and nobody has brought what it may have lost between \
             LSN {} and {}: check what depends on it",
            span.from_lsn, span.to_lsn
        )
    });
    done(format!("group {}: is the primary here now{unheard}{lost}", group.name()))
}

pub(super) fn demote(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    // Demoted, it may follow at once.
    let parting = context.replication.apart(group.id());
    let told = demoted(&group)?;
    let Some(parting) = parting else { return done(told) };
    let paused = context.replication.paused(group.id(), &parting.peer);
    done(told + &after_parting(group.name(), &parting, paused.as_deref()))
}

/// What becomes of a node that is demoted in a split brain; `paused` is why replication with the
/// peer is, where it is.
fn after_parting(group: &Name, parting: &Parting, paused: Option<&str>) -> String {
    let Parting { peer, at, local_bytes, .. } = parting;
    match (ByteSize(*local_bytes), paused) {
        (ByteSize(0), None) => format!("; {peer} has all that this node has, which follows it"),
        (ByteSize(0), Some(why)) => format!(
            "; {peer} has all that this node has, which follows it once replication goes on: it is \
             {why}"
        ),
        (own, _) => format!(
            "; its history and that of {peer} part at LSN {at}, and {own} behind that are here \
             alone, so it does not follow {peer} yet: `tidelog resolve {group} --preview` shows \
             what each has, `tidelog resolve {group} --discard-local` here keeps its own as a \
             branch, and has it follow"
        ),
    }
}

fn demoted(group: &Group) -> Result<String, GroupError> {
    let was = group.role();
    // Also where it is one already: a demote that failed half-way is taken up again.
    group.demote()?;
    let since = if was == Role::Secondary { "already" } else { "now" };
    Ok(format!("group {}: is a secondary here {since}", group.name()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::events::Events;
    use crate::group::{GroupContext, LocalLimits, NewGroup, NodeIdentity};
    use crate::io::{Disk, Env, Fault, ManualClock, MemoryDisk, SeededEntropy};
    use crate::units::{GroupId, Lsn, NodeId};

    #[test]
    fn a_demote_that_was_not_written_down_is_not_called_done() {
        let disk = Arc::new(MemoryDisk::new());
        disk.create_dir(Path::new("/groups")).unwrap();
        let context = GroupContext {
            env: Env {
                disk: disk.clone(),
                clock: Arc::new(ManualClock::new(LogTime(1_700_000_000_000_000_000))),
                entropy: Arc::new(SeededEntropy::new(1)),
            },
            node: NodeIdentity { id: NodeId([1; 16]), name: "a".parse().unwrap() },
            limits: LocalLimits::default(),
            failures: None,
            events: Events::in_memory(),
        };
        let (dir, id) = (Path::new("/groups/g"), GroupId([7; 16]));
        let new = NewGroup { id, name: "g".parse().unwrap(), segment_bytes: 64 << 10 };
        let group = Group::create(context.clone(), dir, new).unwrap();
        group.sync_now().unwrap();
        disk.inject(Fault::Error { operation: disk.operations() });
        demoted(&group).unwrap_err();
        assert_eq!(group.role(), Role::Secondary, "it takes no writes either");
        // What the disk refused is not tried again before a restart, which knows nothing of it.
        assert!(demoted(&group).unwrap_err().to_string().contains("write meta"));
        drop(group);
        let (group, _) = Group::open(context.clone(), dir).unwrap();
        assert_eq!(group.role(), Role::Primary);
        assert!(demoted(&group).unwrap().contains("is a secondary here"));
        assert!(demoted(&group).unwrap().contains("already"));
        drop(group);
        assert_eq!(Group::open(context, dir).unwrap().0.role(), Role::Secondary);
    }

    #[test]
    fn who_is_demoted_is_not_said_to_follow_a_peer_while_replication_is_paused() {
        let (peer, at) = ("b".parse().unwrap(), Lsn(96));
        let parting = Parting { peer, at, local_bytes: 0, peer_bytes: Some(1) };
        let name = "g".parse().unwrap();
        assert!(after_parting(&name, &parting, None).ends_with("which follows it"));
        let paused = after_parting(&name, &parting, Some("paused by command; `tidelog resume g`"));
        assert!(paused.contains("once replication goes on: it is paused by command"), "{paused}");
    }

    #[test]
    fn policy_changes_keep_what_they_do_not_name() {
        let changes = json!({ "window": "2h", "log_limit": "1G" });
        let changed =
            changed_policy(&PolicyRecord::default(), changes.as_object().unwrap()).unwrap();
        assert_eq!(changed.window, Span::from_secs(7200));
        assert_eq!(changed.log_limit, ByteSize(1 << 30));
        assert_eq!(changed.on_full, OnFull::Fold);
        for (key, value) in
            [("windw", "2h"), ("window", "2"), ("on_full", "stop"), ("on_peer_behind", "wait")]
        {
            let changes = json!({ key: value });
            let problem = changed_policy(&PolicyRecord::default(), changes.as_object().unwrap())
                .expect_err(key);
            assert!(problem.detail.contains(key), "{problem}");
        }
    }
}
