//! What the handlers work on: the parts of a running node.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, RwLock};

use crate::backup::{Progress, Scheduler};
use crate::config::Config;
use crate::events::Events;
use crate::group::{Group, GroupError, NodeIdentity, Registry};
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
    /// Jobs, runs and repositories.
    pub scheduler: Arc<Scheduler>,
    /// How far restores, verifications and readings of a base are, by the ticket of their caller.
    pub tickets: Mutex<HashMap<String, Progress>>,
    /// What the NBD listeners have done.
    pub nbd_counters: Arc<NbdCounters>,
}

impl Context {
    /// A group of this node.
    ///
    /// # Errors
    ///
    /// `no-such-group` where it has none of this name; where it is not open, the cause.
    pub fn group(&self, name: &str) -> Result<Arc<Group>, Problem> {
        self.registry.by_name(name).map_err(|error| match error {
            GroupError::NotFound { .. } => Problem::new(
                404,
                "no-such-group",
                format!(
                    "group {name}: does not exist on node {}; `tidelog group list` shows those \
                     that do",
                    self.node.name
                ),
            ),
            not_open => not_open.into(),
        })
    }

    /// A progress that others can look up by `ticket` for as long as what is returned with it
    /// lives.
    #[must_use]
    pub fn progress(&self, ticket: Option<String>) -> (Progress, Ticket<'_>) {
        let progress = Progress::new();
        if let Some(ticket) = &ticket {
            let mut tickets = self.tickets.lock().expect("no holder panics");
            tickets.insert(ticket.clone(), progress.clone());
        }
        (progress, Ticket { context: self, ticket })
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

/// Keeps a progress known until it is dropped.
pub struct Ticket<'a> {
    context: &'a Context,
    ticket: Option<String>,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = &self.ticket {
            self.context.tickets.lock().expect("no holder panics").remove(ticket);
        }
    }
}
