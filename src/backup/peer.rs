//! All that this room needs of the other nodes: calls, and how a copy follows. Replication answers
//! it in production, a test by hand.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::facts::Reason;
use crate::group::Group;
use crate::io::Clock;
use crate::replication::{BoxFuture, Replication};
use crate::units::{Lsn, Name};

/// What answers a call of a peer.
pub type PeerHandler = Arc<dyn Fn(Name, Value) -> BoxFuture<Result<Value, String>> + Send + Sync>;

/// How a copy follows, as this node sees it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReplicationView {
    /// How long the link to the peer has been down; `None` while it is up.
    pub link_lost: Option<Duration>,
    /// Age of the copy; `None` where nothing tells.
    pub lag: Option<Duration>,
    /// What speaks against the copy, lag and link apart.
    pub reasons: Vec<Reason>,
}

/// The door to the other nodes.
pub trait PeerCalls: Send + Sync {
    /// Calls a method of a peer.
    fn call(
        &self,
        peer: &Name,
        method: &str,
        body: Value,
        timeout: Duration,
    ) -> BoxFuture<Result<Value, String>>;
    /// Answers a method from now on.
    fn on_call(&self, method: &str, handler: PeerHandler);
    /// How the copy of a group follows that this node and `peer` hold together; without a peer, how
    /// the data here is.
    fn view(&self, group: &Group, peer: Option<&Name>) -> ReplicationView;
    /// Whether a backup at `lsn` holds the same whichever node of the group made it, as far as
    /// comparisons of the copies have told, linked or not.
    fn is_same_at(&self, group: &Group, lsn: Lsn) -> bool;
}

/// Replication as the door, with the clock that its times are by.
pub struct ReplicationPeers {
    replication: Arc<Replication>,
    clock: Arc<dyn Clock>,
}

impl ReplicationPeers {
    /// The door through a running service.
    #[must_use]
    pub fn new(replication: Arc<Replication>, clock: Arc<dyn Clock>) -> ReplicationPeers {
        ReplicationPeers { replication, clock }
    }
}

/// Reasons of health that are facts of their own here.
const LINK_AND_LAG: [&str; 4] = ["link-down", "lag", "lag-unknown", "no-peer"];

/// How old a copy is, in seconds, as health judges it: by what it has received and by what of that
/// survives there, whichever is older. An image is made of the latter.
fn copy_age(received: f64, durable: f64) -> f64 {
    received.max(durable)
}

impl PeerCalls for ReplicationPeers {
    fn call(
        &self,
        peer: &Name,
        method: &str,
        body: Value,
        timeout: Duration,
    ) -> BoxFuture<Result<Value, String>> {
        let replication = Arc::clone(&self.replication);
        let (peer, method) = (peer.clone(), method.to_owned());
        Box::pin(async move {
            let answer = replication.call(peer.as_str(), &method, body, timeout).await;
            answer.map_err(|error| error.to_string())
        })
    }

    fn on_call(&self, method: &str, handler: PeerHandler) {
        self.replication.on_call(method, Arc::new(move |peer, body| handler(peer.name, body)));
    }

    fn view(&self, group: &Group, peer: Option<&Name>) -> ReplicationView {
        // The limit on lag is the job's, and applied by the decision.
        let capable = self.replication.backup_capable_of(group, Some(Duration::MAX), peer);
        let unknown_lag = capable.reasons.iter().any(|reason| reason.code == "lag-unknown");
        let reasons = capable
            .reasons
            .into_iter()
            .filter(|reason| !LINK_AND_LAG.contains(&reason.code.as_str()))
            .map(|reason| Reason::new(&reason.code, reason.text))
            .collect();
        let Some(peer) = peer else {
            return ReplicationView { link_lost: None, lag: None, reasons };
        };
        let all = self.replication.status(group);
        let Some(status) = all.iter().find(|status| status.name == peer.as_str()) else {
            // Not among this node's peers: as far away as a link that never was.
            let link_lost = Some(self.clock.monotonic());
            return ReplicationView { link_lost, lag: None, reasons };
        };
        let link_lost = (status.link_state != "connected").then(|| {
            let wall = self.clock.wall();
            status.link_state_since.map_or(self.clock.monotonic(), |since| wall.since(since))
        });
        let age = copy_age(status.lag.seconds, status.rpo_actual_seconds);
        let lag = Duration::try_from_secs_f64(age).ok().filter(|_| !unknown_lag);
        ReplicationView { link_lost, lag, reasons }
    }

    fn is_same_at(&self, group: &Group, lsn: Lsn) -> bool {
        self.replication.is_same_at(group, lsn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_whose_disk_stands_still_is_as_old_as_what_is_durable_there() {
        assert_eq!(copy_age(0.2, 300.0), 300.0);
        assert_eq!(copy_age(5.0, 0.0), 5.0);
    }
}
