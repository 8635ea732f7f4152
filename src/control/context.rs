//! What the handlers work on: the parts of a running node.

use std::sync::{Arc, RwLock};

use crate::config::Config;
use crate::events::Events;
use crate::group::{Group, NodeIdentity, Registry};
use crate::io::Env;
use crate::nbd::NbdCounters;
use crate::replication::Replication;

use super::problem::Problem;

/// The parts of a running node.
pub struct Context {
    /// Disk, clock, randomness.
    pub env: Env,
    /// Who this node is.
    pub node: NodeIdentity,
    /// The configuration as it was read last.
    pub config: RwLock<Config>,
    /// Where events go.
    pub events: Events,
    /// The groups.
    pub registry: Arc<Registry>,
    /// The links to peers.
    pub replication: Arc<Replication>,
    /// What the NBD listeners have done.
    pub nbd_counters: Arc<NbdCounters>,
}

impl Context {
    /// A group of this node.
    ///
    /// # Errors
    ///
    /// `no-such-group` where it has none of this name.
    pub fn group(&self, name: &str) -> Result<Arc<Group>, Problem> {
        let found = self.registry.groups().into_iter().find(|group| group.name().as_str() == name);
        found.ok_or_else(|| {
            Problem::new(
                404,
                "no-such-group",
                format!(
                    "group {name}: does not exist on node {}; `tidelog group list` shows those \
                     that do",
                    self.node.name
                ),
            )
        })
    }

    /// The group that a query names, or all, by name.
    ///
    /// # Errors
    ///
    /// As [`Context::group`].
    pub fn groups(&self, only: Option<&str>) -> Result<Vec<Arc<Group>>, Problem> {
        let mut groups = match only {
            Some(name) => vec![self.group(name)?],
            None => self.registry.groups(),
        };
        groups.sort_by(|a, b| a.name().cmp(b.name()));
        Ok(groups)
    }
}
