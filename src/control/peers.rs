//! Handlers of peers and replication: invite, join, list, rotate, remove; replicate, stop, pause,
//! resume.

use std::sync::Arc;
use std::time::Duration;

use crate::log::control::{Mode, OnLoss};
use crate::replication::{ReplicateOptions, ReplicationError};
use crate::units::{ByteSize, Name, Span};

use super::api::{Joined, Peers, Rotated};
use super::context::Context;
use super::groups::{answer, done};
use super::problem::Problem;
use super::route::{Answer, AnswerFuture, Call};

/// How long `replicate` waits for the link to a peer that was joined a moment ago.
const LINK_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it looks.
const LINK_POLL: Duration = Duration::from_millis(50);

impl From<ReplicationError> for Problem {
    fn from(error: ReplicationError) -> Problem {
        let (status, code) = match error {
            ReplicationError::Group(error) => return error.into(),
            ReplicationError::NoPeer(_) => (404, "no-such-peer"),
            ReplicationError::NotConnected { .. } => (503, "peer-not-connected"),
            ReplicationError::Peer { .. } | ReplicationError::Declined { .. } => {
                (502, "peer-refused")
            }
            ReplicationError::NoAnswer { .. } => (504, "peer-silent"),
            ReplicationError::Refused(_) => (409, "refused"),
            ReplicationError::Store(_) => (500, "io"),
            ReplicationError::Listen { .. } => (500, "listen"),
        };
        Problem::new(status, code, error.to_string())
    }
}

pub(super) fn invite(context: &Context, _call: &Call) -> Answer {
    answer(context.replication.invite()?)
}

pub(super) fn join(context: Arc<Context>, call: Call) -> AnswerFuture {
    Box::pin(async move {
        let token: String = call.required("token")?;
        let address: String = call.required("address")?;
        let peer = context.replication.join(token.trim(), &address).await?;
        answer(Joined { name: peer.name, node: peer.node })
    })
}

pub(super) fn list(context: &Context, _call: &Call) -> Answer {
    answer(Peers { peers: context.replication.peers() })
}

pub(super) fn rotate(context: Arc<Context>, _call: Call) -> AnswerFuture {
    Box::pin(async move {
        let fingerprint = context.replication.rotate().await?;
        answer(Rotated { fingerprint })
    })
}

pub(super) fn remove(context: &Context, call: &Call) -> Answer {
    let peer = call.path("peer");
    context.replication.remove_peer(peer)?;
    done(format!("peer {peer}: removed; remove this node there too"))
}

pub(super) fn replicate(context: Arc<Context>, call: Call) -> AnswerFuture {
    Box::pin(async move {
        let group = context.group(call.path("group"))?.name().clone();
        let peer: Name = call.required("peer")?;
        let mode: Option<Mode> = call.field("mode")?;
        let on_loss: Option<OnLoss> = call.field("on_loss")?;
        let rpo_target: Option<Span> = call.field("rpo")?;
        if !context.replication.is_replicated_to(group.as_str(), peer.as_str()) {
            wait_for_link(&context, peer.as_str()).await;
        }
        let options = ReplicateOptions { mode, on_loss, rpo_target };
        let not_asked =
            context.replication.replicate(group.as_str(), peer.as_str(), options).await?;
        let but = not_asked.map_or_else(String::new, |why| {
            format!(
                "; that holds from now on, but the peer was not asked for its copy again: {why}"
            )
        });
        done(format!("group {group}: is replicated to {peer}{but}"))
    })
}

/// Gives the link to a known peer a moment to come up.
async fn wait_for_link(context: &Context, peer: &str) {
    let connected = async {
        let mut ticks = tokio::time::interval(LINK_POLL);
        loop {
            ticks.tick().await;
            let peers = context.replication.peers();
            let known = peers.iter().find(|known| known.name.as_str() == peer);
            if known.is_none_or(|known| known.link_state == "connected") {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(LINK_TIMEOUT, connected).await;
}

pub(super) fn stop(context: Arc<Context>, call: Call) -> AnswerFuture {
    Box::pin(async move {
        let group = context.group(call.path("group"))?;
        let peer = match call.query("peer") {
            Some(peer) => peer.to_owned(),
            None => only_peer(&context, &group)?,
        };
        let group = group.name();
        context.replication.stop(group.as_str(), &peer).await?;
        done(format!("group {group}: is no longer replicated to {peer}; the copy there is retired"))
    })
}

pub(super) fn preview(context: Arc<Context>, call: Call) -> AnswerFuture {
    Box::pin(async move {
        let group = context.group(call.path("group"))?.name().clone();
        answer(context.replication.preview(group.as_str()).await?)
    })
}

pub(super) fn switchover(context: Arc<Context>, call: Call) -> AnswerFuture {
    Box::pin(async move {
        let group = context.group(call.path("group"))?.name().clone();
        let to: Option<Name> = call.field("to")?;
        let peer = context.replication.switchover(group.as_str(), to.as_ref()).await?;
        let node = &context.node.name;
        done(format!("group {group}: {peer} is the primary now, and {node} follows it"))
    })
}

pub(super) fn resolve(context: Arc<Context>, call: Call) -> AnswerFuture {
    Box::pin(async move {
        let found = context.group(call.path("group"))?;
        let (id, group) = (found.id(), found.name().clone());
        let discard: bool = call.field("discard_local")?.unwrap_or(false);
        if !discard {
            return Err(Problem::invalid(format!(
                "group {group}: this node yields where `discard_local` says so; `tidelog resolve \
                 {group} --preview` shows what each side has, `tidelog resolve {group} \
                 --discard-local` is for the node that is to yield"
            )));
        }
        let parting = context.replication.resolve(group.as_str()).await?;
        let branches = context.group(group.as_str())?.known_branches().into_iter();
        let kept = branches.filter(|branch| branch.from.lsn == parting.at);
        let kept = kept.max_by_key(|branch| branch.cut).map_or_else(String::new, |branch| {
            format!(", {0}: `tidelog image open {group} --branch {0}` exports it", branch.name)
        });
        let paused = context
            .replication
            .paused(id, &parting.peer)
            .map_or_else(String::new, |why| format!(" once replication goes on: it is {why}"));
        done(format!(
            "group {group}: {} that only this node had are kept as a branch{kept}; it follows {} \
             from LSN {}{paused}",
            ByteSize(parting.local_bytes),
            parting.peer,
            parting.at
        ))
    })
}

fn only_peer(context: &Context, group: &crate::group::Group) -> Result<String, Problem> {
    let control = group.control();
    let mut others = control
        .members
        .iter()
        .filter(|member| !member.removed && member.node != context.node.id)
        .map(|member| member.name.to_string());
    match (others.next(), others.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => Err(Problem::refused(format!("group {}: is not replicated", group.name()))),
        _ => Err(Problem::invalid(format!(
            "group {}: has several peers; name one with --to PEER",
            group.name()
        ))),
    }
}

pub(super) fn pause(context: &Context, call: &Call) -> Answer {
    set_paused(context, call, true)
}

pub(super) fn resume(context: &Context, call: &Call) -> Answer {
    set_paused(context, call, false)
}

fn set_paused(context: &Context, call: &Call, paused: bool) -> Answer {
    let group = context.group(call.path("group"))?;
    let name = group.name().as_str();
    let peer: Option<Name> = call.field("peer")?;
    let peer = peer.as_ref().map(Name::as_str);
    if paused {
        context.replication.pause(name, peer)?;
        done(format!("group {name}: replication is paused; `tidelog resume {name}` ends it"))
    } else {
        context.replication.resume(name, peer)?;
        done(format!("group {name}: replication goes on"))
    }
}
