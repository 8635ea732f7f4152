//! What status shows of a peer: plain data in the shape that scripts rely on.
//!
//! Every state that is not the good one has a reason and a time beside it.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::group::{DataState, RequiredPeer, Role};
use crate::log::control::{Mode, OnLoss};
use crate::units::{LogTime, Lsn};

use super::channel::{Acked, Channel, Moment, ReplicationState};
use super::copy::CopyReport;
use super::core::{Membership, PeerCore};
use super::resolve::{Parting, known_parting};

/// How far a copy is behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lag {
    /// Bytes of log that it has not received; none where that is not known.
    pub bytes: Option<u64>,
    /// Requests that it has not received; none where that is not known.
    pub operations: Option<u64>,
    /// The age of the oldest byte that it has not received.
    pub seconds: f64,
}

/// What the figures of a lag are worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LagState {
    /// They are what both nodes say.
    #[default]
    Exact,
    /// The primary is not heard: it had so much more when it was last, and may have gone on.
    AtLeast,
    /// Nobody has told this node how far the other is.
    Unknown,
}

/// One entry of `peers` in status. On a secondary it is the primary, and lag is this node's own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// The peer's name.
    pub name: String,
    /// When a write is answered.
    pub mode: Mode,
    /// Whether answers should wait for the peer by `mode`, and do not because it is away.
    #[serde(default)]
    pub degraded: bool,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub degraded_reason: Option<String>,
    /// Since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub degraded_since: Option<LogTime>,
    /// `primary` or `secondary`, as the peer announced itself on this link, else by the last reign.
    pub role: String,
    /// What the peer says its data is worth; none where it has not told lately.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_state: Option<DataState>,
    /// Why it is not good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_state_reason: Option<String>,
    /// Why its log is full, where the peer says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_full_reason: Option<String>,
    /// `standalone`, `connecting` or `connected`.
    pub link_state: String,
    /// Why it is not connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_state_reason: Option<String>,
    /// Since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_state_since: Option<LogTime>,
    /// `idle`, `streaming`, `catching-up`, `paused`, `blocked` or `split-brain`.
    pub replication_state: String,
    /// Why it is not streaming.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replication_state_reason: Option<String>,
    /// Since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replication_state_since: Option<LogTime>,
    /// Where the histories of a split brain part, as far as that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parting: Option<Parting>,
    /// What the secondary of the two has received.
    pub received_lsn: Lsn,
    /// What of it survives power loss there.
    pub durable_lsn: Lsn,
    /// How far the secondary of the two is behind.
    pub lag: Lag,
    /// What that is worth.
    #[serde(default)]
    pub lag_state: LagState,
    /// Why it is not exact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_state_reason: Option<String>,
    /// When the primary was last heard as far as that, before a restart too; none where it is exact
    /// or never was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_state_since: Option<LogTime>,
    /// The age of the copy that its owner wants at most, if one was set.
    pub rpo_target_seconds: Option<f64>,
    /// The age of the oldest byte that is not durable on the secondary.
    pub rpo_actual_seconds: f64,
    /// Progress of a resync, where one is going on.
    pub resync: Option<Value>,
    /// Bytes of log that are not durable on the secondary; none where that is not known.
    pub behind_bytes: Option<u64>,
    /// Peers always speak TLS 1.3.
    pub tls: bool,
    /// Seconds since anything was heard of the peer; none where nothing was since its start.
    pub heard_seconds: Option<f64>,
    /// The peer's wall clock minus this node's.
    pub clock_offset_seconds: Option<f64>,
}

impl PeerStatus {
    /// The entry of a channel; none where the group has nothing to do with the peer. Times in it
    /// are monotonic nanoseconds until [`PeerStatus::with_wall`] has made them wall-clock times.
    pub(super) fn of(core: &PeerCore, channel: &Channel, now: Duration) -> Option<PeerStatus> {
        let local = channel.local();
        if local.membership == Membership::Stranger {
            return None;
        }
        let (rpo_target, mode) = match local.membership {
            Membership::Member { rpo_target, mode } => (rpo_target, mode),
            _ => (None, Mode::Async),
        };
        let (state, _, since) = channel.state();
        let (link_state, link_reason) = match core.link_down() {
            None => ("connected", None),
            Some((since, reason)) if core.can_dial() => ("connecting", Some((reason, since))),
            Some((since, _)) => {
                ("standalone", Some(("there is no address to dial; the peer has to", since)))
            }
        };
        let streaming = state == ReplicationState::Streaming;
        let view =
            if local.primary { primary_view(channel, now) } else { secondary_view(channel, now) };
        let (lag_state, lag_reason) = lag_state(core, channel);
        let peer_is_primary = match (channel.remote(), local.history.reigns.last()) {
            (Some(remote), _) => remote.primary,
            // Of several peers that are not heard only one can be it.
            (None, Some(reign)) => !local.primary && reign.author == core.peer(),
            (None, None) => !local.primary,
        };
        let parting = (state == ReplicationState::SplitBrain)
            .then(|| known_parting(core.name(), channel))
            .flatten();
        let reason = why(channel);
        Some(PeerStatus {
            name: core.name().to_string(),
            mode,
            degraded: false,
            degraded_reason: None,
            degraded_since: None,
            role: if peer_is_primary { "primary" } else { "secondary" }.to_owned(),
            data_state: None,
            data_state_reason: None,
            log_full_reason: None,
            link_state: link_state.to_owned(),
            link_state_reason: link_reason.map(|(reason, _)| reason.to_owned()),
            link_state_since: link_reason.map(|(_, since)| monotonic(since)),
            replication_state: state.text().to_owned(),
            replication_state_reason: (!streaming).then_some(reason),
            replication_state_since: (!streaming).then(|| monotonic(since)),
            parting,
            received_lsn: view.received,
            durable_lsn: view.durable,
            lag: view.lag,
            lag_state,
            lag_state_reason: lag_reason,
            lag_state_since: None,
            rpo_target_seconds: rpo_target.map(|target| target.0.as_secs_f64()),
            rpo_actual_seconds: view.rpo_actual.as_secs_f64(),
            resync: channel.resync().map(|(lsn, progress)| {
                json!({
                    "lsn": lsn,
                    "done_bytes": progress.done_bytes,
                    "total_bytes": progress.total_bytes,
                })
            }),
            behind_bytes: view.behind_bytes,
            tls: true,
            heard_seconds: core.heard().map(|heard| now.saturating_sub(heard).as_secs_f64()),
            clock_offset_seconds: core.clock_offset().map(|offset| offset.seconds),
        })
    }

    /// Adds what the peer told of its copy, or as the primary.
    #[must_use]
    pub(super) fn with_copy(mut self, report: Option<CopyReport>) -> PeerStatus {
        let primary = self.role == "primary";
        if let Some(report) = report.filter(|it| (it.role == Role::Primary) == primary) {
            self.data_state = Some(report.data_state);
            let good = report.data_state == DataState::Consistent;
            self.data_state_reason = report.data_reason.filter(|_| !good);
            self.log_full_reason = report.log_full;
        }
        self
    }

    /// Adds what the primary's answers to hosts wait for.
    #[must_use]
    pub(super) fn with_required(mut self, required: Option<&RequiredPeer>) -> PeerStatus {
        if let Some(peer) = required
            && let Some((reason, since)) = &peer.away
            && self.role == "secondary"
        {
            self.degraded = peer.on_loss == OnLoss::Continue;
            self.degraded_reason = Some(reason.clone());
            self.degraded_since = Some(*since);
        }
        self
    }

    /// Adds when the primary was last heard, where what a copy lacks is not exact.
    #[must_use]
    pub(super) fn with_heard(
        mut self,
        channel: Option<&Channel>,
        now: Duration,
        wall: LogTime,
    ) -> PeerStatus {
        let gap = channel.and_then(Channel::gap);
        if self.lag_state == LagState::AtLeast
            && let Some(at) = gap.and_then(|gap| gap.at)
        {
            let since = at.wall(now, wall);
            self.lag_state_since = Some(since);
            if matches!(at, Moment::Before(_)) {
                let age = wall.since(since).as_secs_f64();
                (self.lag.seconds, self.rpo_actual_seconds) = (age, age);
            }
        }
        self
    }

    /// Turns monotonic times into wall-clock times.
    #[must_use]
    pub(super) fn with_wall(mut self, now: Duration, wall: LogTime) -> PeerStatus {
        let convert = |time: LogTime| {
            let age = now.saturating_sub(Duration::from_nanos(time.0));
            LogTime(wall.0.saturating_sub(u64::try_from(age.as_nanos()).unwrap_or(u64::MAX)))
        };
        self.link_state_since = self.link_state_since.map(convert);
        self.replication_state_since = self.replication_state_since.map(convert);
        self
    }
}

/// Why replication with a peer is as it is. The figures that a split brain was found with are those
/// of that moment, so they are left out: `parting` has those of now.
pub(super) fn why(channel: &Channel) -> String {
    let (state, reason, _) = channel.state();
    if state != ReplicationState::SplitBrain {
        return reason.to_owned();
    }
    let group = &channel.local().name;
    format!(
        "both nodes are primary; stop the hosts of the one that is to yield, then `tidelog resolve \
         {group} --preview` and `tidelog resolve {group} --discard-local` there"
    )
}

fn monotonic(time: Duration) -> LogTime {
    LogTime(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

struct View {
    received: Lsn,
    durable: Lsn,
    lag: Lag,
    rpo_actual: Duration,
    behind_bytes: Option<u64>,
}

fn primary_view(channel: &Channel, now: Duration) -> View {
    let local = channel.local();
    let acked = channel.acked();
    let (received_lag, durable_lag) = channel.lags_at_least(now);
    let known = knows_its_copy(channel);
    View {
        received: acked.received,
        durable: acked.durable,
        lag: Lag {
            bytes: known.then(|| local.history.head.bytes_since(acked.received)),
            operations: known.then(|| local.requests.saturating_sub(acked.requests)),
            seconds: received_lag.as_secs_f64(),
        },
        rpo_actual: durable_lag,
        behind_bytes: known.then(|| local.history.head.bytes_since(acked.durable)),
    }
}

/// Whether this primary knows what its copy has: it has asked for the log in this life of the
/// process, or says that it has nothing.
fn knows_its_copy(channel: &Channel) -> bool {
    let empty = channel.remote().is_some_and(|remote| remote.history.head == Lsn::ZERO);
    channel.acked() != Acked::default() || empty
}

/// A secondary knows only what it was told, so its age grows while nothing is heard.
fn secondary_view(channel: &Channel, now: Duration) -> View {
    let local = channel.local();
    // Nothing told yet: at least as old as this node's process, and health says that it is unknown.
    let age = secondary_lag(channel, now).unwrap_or(now);
    let gap = channel.gap();
    View {
        received: local.history.head,
        durable: local.durable,
        lag: Lag {
            bytes: gap.map(|gap| gap.bytes),
            operations: gap.and_then(|gap| gap.requests),
            seconds: age.as_secs_f64(),
        },
        rpo_actual: age,
        behind_bytes: gap.map(|gap| gap.undurable_bytes),
    }
}

/// What the figures of a lag are worth, and why where they are not exact.
fn lag_state(core: &PeerCore, channel: &Channel) -> (LagState, Option<String>) {
    let peer = core.name();
    if channel.local().primary {
        if knows_its_copy(channel) {
            return (LagState::Exact, None);
        }
        let reason = match core.heard() {
            None => format!("{peer} has not been heard since this node started"),
            Some(_) => format!("{peer} has not asked this node for the log yet"),
        };
        return (LagState::Unknown, Some(reason));
    }
    if channel.gap().is_some() {
        return match channel.remote() {
            Some(_) => (LagState::Exact, None),
            None => {
                let reason = if channel.was_stopped() {
                    "replication was stopped".to_owned()
                } else {
                    format!("{peer} is not heard, and may have gone on since")
                };
                (LagState::AtLeast, Some(reason))
            }
        };
    }
    let reason = if channel.heard().is_some() {
        format!("what {peer} has is not the continuation of what is here")
    } else if core.heard().is_none() {
        format!("{peer} has not been heard since this node started")
    } else {
        format!("{peer} has not said what it has since this node started")
    };
    (LagState::Unknown, Some(reason))
}

/// The age of a secondary's copy at worst: what the primary told, plus the time since. Unknown
/// before it told anything.
pub(super) fn secondary_lag(channel: &Channel, now: Duration) -> Option<Duration> {
    channel.told().and_then(|told| told.lag.map(|lag| lag + now.saturating_sub(told.at)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::replication::core::{Input, LocalGroup, Settings};
    use crate::replication::epoch::{History, Reign};
    use crate::units::{Chain, EpochId, GroupId, Incarnation, NodeId};

    const GROUP: GroupId = GroupId([1; 16]);
    const NODES: [NodeId; 3] = [NodeId([1; 16]), NodeId([2; 16]), NodeId([3; 16])];

    /// What one of three nodes shows of another that it has not heard since its start, where the
    /// reigns were those of `authors`.
    fn role_unheard(me: usize, peer: usize, authors: &[usize]) -> String {
        let reigns = authors.iter().zip(1..).map(|(author, counter)| Reign {
            id: EpochId(counter),
            counter,
            first_lsn: Lsn(counter * 64),
            author: NODES[*author],
        });
        let history =
            History { reigns: reigns.collect::<Vec<_>>().into(), head: Lsn(4096), chain: Chain(0) };
        let name = format!("node{peer}").parse().unwrap();
        let settings = Settings::default();
        let mut core = PeerCore::new(Duration::ZERO, NODES[me], NODES[peer], name, settings);
        let local = LocalGroup {
            id: GROUP,
            name: "g".parse().unwrap(),
            primary: false,
            recovering: false,
            incarnation: Incarnation(1),
            history,
            durable: Lsn(4096),
            requests: 1,
            log_start: Lsn::ZERO,
            cuts: 0,
            failed: false,
            retired: false,
            membership: Membership::Member { rpo_target: None, mode: Mode::Async },
            follows: None,
            authored: authors.last() == Some(&me),
            given_up: BTreeSet::new(),
        };
        core.handle(Duration::ZERO, Input::Group(Box::new(local)), &mut Vec::new());
        core.status(Duration::ZERO, GROUP).unwrap().role
    }

    #[test]
    fn of_the_nodes_that_a_copy_does_not_hear_the_author_of_the_last_reign_is_the_primary() {
        assert_eq!(role_unheard(2, 0, &[0]), "primary");
        assert_eq!(role_unheard(2, 1, &[0]), "secondary", "it is a copy, and dead");
        assert_eq!(role_unheard(2, 0, &[0, 1]), "secondary", "it was the primary before");
        assert_eq!(role_unheard(2, 1, &[0, 1]), "primary");
        // Demoted, and nobody was heard to reign since.
        assert_eq!([0, 1].map(|peer| role_unheard(2, peer, &[0, 2])), ["secondary"; 2]);
        // A copy without a history knows nothing of reigns: it is the one that it waits for.
        assert_eq!(role_unheard(2, 0, &[]), "primary");
    }
}
