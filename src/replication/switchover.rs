//! A planned change of roles: the primary hands a group over to its peer, and nothing is lost.
//!
//! Hosts' writes wait until the peer has everything durably; then this node stops being primary,
//! and only after that the peer begins its reign, at exactly this end of the log. Whatever fails
//! before leaves all as it was.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::events::Severity;
use crate::group::{Role, TookOver};
use crate::log::control::EpochRecord;
use crate::units::{Chain, GroupId, Lsn, Name, NodeId};

use super::channel::ReplicationState;
use super::commands::run_blocking;
use super::core::Membership;
use super::replica::{Replica, membership_of};
use super::rpc::PeerContext;
use super::service::{Replication, ReplicationError, Shared};

pub(super) const METHOD: &str = "replication.take-over";
/// The peer syncs its log and begins a reign.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(30);
/// Hosts wait this long at most for the peer to have everything.
const HALT_MAX: Duration = Duration::from_secs(10);
/// Between two looks at what the peer has.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// What the peer is asked to begin its reign at.
#[derive(Serialize, Deserialize)]
struct TakeOver {
    group: GroupId,
    head: Lsn,
    chain: Chain,
}

/// What it did. An error in its place says nothing of what it did.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TakeOverAnswer {
    /// It reigns.
    Primary,
    /// It touched nothing.
    Refused(String),
}

/// Hosts' writes wait while this lives.
struct Halt(Arc<dyn Replica>);

impl Drop for Halt {
    fn drop(&mut self) {
        self.0.resume_writers();
    }
}

impl Replication {
    /// Makes a peer the primary of a group, and this node a secondary; the peer's name. Where the
    /// group has one peer only, it need not be named.
    ///
    /// # Errors
    ///
    /// Where this node is not the primary, the peer does not stream, or does not have everything
    /// within 10 s: then nothing has changed. Where the peer does not say whether it took over,
    /// this node has stopped being primary, and the error says what to look at.
    pub async fn switchover(
        &self,
        group_name: &str,
        to: Option<&Name>,
    ) -> Result<Name, ReplicationError> {
        let shared = &self.shared;
        let group = shared.groups.by_name(group_name)?;
        if group.role() != Role::Primary {
            return Err(ReplicationError::Refused(format!(
                "group {group_name}: is not the primary here; `tidelog status {group_name}` shows \
                 who is"
            )));
        }
        let (peer, _) = shared.streaming_peer(&*group, to)?;
        shared.check_copy_can_serve(group_name, group.id(), &peer)?;
        let why = format!("switchover to {peer}: writes wait until it has everything");
        group.halt_writers(&why)?;
        let halt = Halt(Arc::clone(&group));
        let syncing = Arc::clone(&group);
        run_blocking(move || syncing.sync_now().map(|_| ()).map_err(Into::into)).await?;
        let end = group.positions();
        let begun = shared.now();
        while shared.streaming_peer(&*group, Some(&peer))?.1 < end.head {
            if shared.now().saturating_sub(begun) > HALT_MAX {
                return Err(ReplicationError::Refused(format!(
                    "group {group_name}: writes waited for {} s, and {peer} still did not have \
                     everything durably; nothing was changed; `tidelog status {group_name}` shows \
                     how far it is",
                    HALT_MAX.as_secs()
                )));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let demoting = Arc::clone(&group);
        run_blocking(move || demoting.demote().map_err(Into::into)).await?;
        drop(halt);
        let take_over = TakeOver { group: group.id(), head: end.head, chain: end.chain };
        self.hand_over(&group, &peer, &take_over).await?;
        let text = format!("group {group_name}: {peer} is its primary, from LSN {} on", end.head);
        let name = Some(group_name);
        shared.context.events.emit(Severity::Info, "switched-over", name, text, Value::Null);
        Ok(peer)
    }

    /// Has the peer begin its reign; where it says that it did not, this node begins one again.
    async fn hand_over(
        &self,
        group: &Arc<dyn Replica>,
        peer: &Name,
        take_over: &TakeOver,
    ) -> Result<(), ReplicationError> {
        let name = group.name();
        let body = serde_json::to_value(take_over).expect("plain data becomes JSON");
        let answer = self.call(peer.as_str(), METHOD, body, TAKE_OVER_TIMEOUT).await;
        let why = match answer.map(serde_json::from_value::<TakeOverAnswer>) {
            Ok(Ok(TakeOverAnswer::Primary)) => return Ok(()),
            Ok(Ok(TakeOverAnswer::Refused(why))) => why,
            Err(ReplicationError::NotConnected { reason, .. }) => reason,
            Err(ReplicationError::Declined { what, .. }) => what,
            // Nothing was sent.
            Err(error @ ReplicationError::NoPeer(_)) => error.to_string(),
            Ok(Err(error)) => return Err(unknown(name, peer, &error.to_string())),
            Err(error) => return Err(unknown(name, peer, &error.to_string())),
        };
        let promoting = Arc::clone(group);
        let promoted = run_blocking(move || {
            promoting.promote(EpochRecord::SWITCHOVER_REFUSED).map(|_| ()).map_err(Into::into)
        });
        if let Err(error) = promoted.await {
            return Err(ReplicationError::Refused(format!(
                "group {name}: {peer} did not take over: {why}; this node could not go on as \
                 primary: {error}; `tidelog status {name}` on both shows whether one reigns; else \
                 `tidelog promote {name}` on one of them"
            )));
        }
        Err(ReplicationError::Refused(format!(
            "group {name}: {peer} did not take over: {why}; this node goes on as primary"
        )))
    }
}

/// Nobody may go on by itself: the peer may reign already.
fn unknown(group: &Name, peer: &Name, why: &str) -> ReplicationError {
    ReplicationError::Refused(format!(
        "group {group}: it is not known whether {peer} took over ({why}), and this node is no longer \
         primary; `tidelog status {group}` on {peer} shows it; if it did not, `tidelog promote \
         {group}` on one of the two"
    ))
}

impl Shared {
    /// Hosts must be able to write where they are sent.
    fn check_copy_can_serve(
        &self,
        name: &str,
        group: GroupId,
        peer: &Name,
    ) -> Result<(), ReplicationError> {
        let node = self.peer_named(peer.as_str())?.node;
        let Some((report, _)) = self.copy_report(node, group, self.now()) else { return Ok(()) };
        match report.failure().or(report.full_now) {
            None => Ok(()),
            Some(why) => Err(ReplicationError::Refused(format!(
                "group {name}: hosts could not write on {peer}: {why}; nothing was changed"
            ))),
        }
    }

    /// The one peer of a group, or the one of that name, which streams, and up to where it has
    /// everything durably.
    fn streaming_peer(
        &self,
        group: &dyn Replica,
        wanted: Option<&Name>,
    ) -> Result<(Name, Lsn), ReplicationError> {
        let name = group.name();
        let refused = |what: String| {
            Err(ReplicationError::Refused(format!("group {name}: {what}; nothing was changed")))
        };
        let cores = self.cores.lock().expect("no holder panics");
        let members = cores.values().filter_map(|core| {
            let channel = core.channel(group.id())?;
            let member = matches!(channel.local().membership, Membership::Member { .. });
            member.then_some((core, channel))
        });
        let members = members.collect::<Vec<_>>();
        if wanted.is_none() && members.len() > 1 {
            let names: Vec<&str> = members.iter().map(|(core, _)| core.name().as_str()).collect();
            return refused(format!(
                "is replicated to {}; `tidelog switchover {name} --to {}` names one",
                names.join(" and "),
                names[0]
            ));
        }
        let mut members = members.iter();
        let Some((core, channel)) =
            members.find(|(core, _)| wanted.is_none_or(|wanted| wanted == core.name()))
        else {
            if let Some(wanted) = wanted {
                return refused(format!(
                    "is not replicated to {wanted}; `tidelog status {name}` shows its peers"
                ));
            }
            return refused(format!(
                "is not replicated, so there is nobody to switch over to; `tidelog replicate {name} \
                 --to PEER` first"
            ));
        };
        let peer = core.name();
        match channel.state() {
            (ReplicationState::Streaming | ReplicationState::CatchingUp, _, _)
                if core.conn().is_some() =>
            {
                Ok((peer.clone(), channel.acked().durable))
            }
            (state, reason, _) => refused(format!(
                "replication to {peer} is {}: {reason}; `tidelog status {name}` shows more",
                state.text()
            )),
        }
    }

    /// Begins a reign here, where this node has exactly what the peer that asks has.
    pub(super) fn take_over(&self, peer: &PeerContext, body: &Value) -> Result<Value, String> {
        let answer = match serde_json::from_value::<TakeOver>(body.clone()) {
            Ok(asked) => self.take_over_as_asked(peer, &asked)?,
            Err(error) => {
                TakeOverAnswer::Refused(format!("a request that is not understood: {error}"))
            }
        };
        Ok(serde_json::to_value(answer).expect("plain data becomes JSON"))
    }

    fn take_over_as_asked(
        &self,
        peer: &PeerContext,
        asked: &TakeOver,
    ) -> Result<TakeOverAnswer, String> {
        let TakeOver { group, head, chain } = *asked;
        let Some(group) = self.groups.by_id(group) else {
            return Ok(TakeOverAnswer::Refused("it has no such group".to_owned()));
        };
        let answer = take_over(&*group, self.me(), peer.node, head, chain)?;
        if matches!(answer, TakeOverAnswer::Primary) {
            let (name, from) = (group.name(), &peer.name);
            let text = format!(
                "group {name}: the new reign begins at LSN {head}: {from} has handed it over"
            );
            let details = json!({ "from_lsn": head, "from": from });
            let name = Some(name.as_str());
            self.context.events.emit(Severity::Info, "promoted", name, text, details);
        }
        Ok(answer)
    }
}

/// Begins a reign on this node, `me`, where it has exactly what the peer that asks has, and may
/// follow it as primary.
///
/// # Errors
///
/// What leaves open who reigns: this node did already, or its disk failed while the record of
/// the reign was written.
pub fn take_over(
    group: &dyn Replica,
    me: NodeId,
    peer: NodeId,
    head: Lsn,
    chain: Chain,
) -> Result<TakeOverAnswer, String> {
    let member = membership_of(&group.control(), me, peer, false, false);
    if !matches!(member, Membership::Member { .. }) {
        let why = "it knows the asker as no member of the group";
        return Ok(TakeOverAnswer::Refused(why.to_owned()));
    }
    match group.take_over(head, chain) {
        Ok(TookOver::Reigns(_)) => Ok(TakeOverAnswer::Primary),
        Ok(TookOver::Refused(why)) => Ok(TakeOverAnswer::Refused(why.to_string())),
        Err(error) => Err(error.to_string()),
    }
}
