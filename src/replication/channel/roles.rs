//! Who follows whom: what two announcements mean together, and the one change of role that happens
//! by itself.

use super::*;
use crate::replication::epoch::compare;

impl Channel {
    pub(super) fn evaluate(&mut self, context: &mut Context<'_>) {
        let name = self.local.name.clone();
        let peer = context.peer_name.clone();
        if !self.active() {
            // A stream that runs carries the record that ends it.
            if self.sender.is_none() {
                self.set_state(context, ReplicationState::Idle, "replication was stopped");
            }
            return;
        }
        if self.paused {
            self.drop_streams();
            let reason = format!("paused by command; `tidelog resume {name}` goes on");
            self.set_state(context, ReplicationState::Paused, reason);
            return;
        }
        let Some(remote) = self.remote.clone() else { return };
        if remote.paused {
            self.drop_streams();
            let reason =
                format!("paused by command on {peer}; `tidelog resume {name}` there goes on");
            self.set_state(context, ReplicationState::Paused, reason);
            return;
        }
        match (self.local.primary, remote.primary) {
            (false, true) => {
                self.met = true;
                self.ask(context);
            }
            (true, false) => {
                self.met = true;
                if self.sender.is_none() && self.lookup.is_none() && !self.needs_a_hand() {
                    self.set_state(
                        context,
                        ReplicationState::Idle,
                        format!("{peer} has not asked for the log yet"),
                    );
                }
            }
            (false, false) => {
                self.met = true;
                self.set_state(
                    context,
                    ReplicationState::Idle,
                    format!("no primary: run `tidelog promote {name}` on one of the two"),
                );
            }
            (true, true) => self.two_primaries(context, &remote),
        }
    }

    /// Both claim to be primary. The one that has just recovered may follow, if its whole log is a
    /// prefix of the other's; anything else is for an operator.
    pub(super) fn two_primaries(&mut self, context: &mut Context<'_>, remote: &Remote) {
        let newer_is_here = self.local.history.last().map(|reign| reign.counter)
            > remote.history.last().map(|reign| reign.counter);
        match compare(&self.local.history, &remote.history) {
            Relation::TheirsIsPrefix if remote.recovering && newer_is_here => {
                let lookup = Lookup::MayFollow { history: remote.history.clone() };
                self.look_up(context, remote.history.head, lookup);
                self.set_state(
                    context,
                    ReplicationState::Idle,
                    format!(
                        "{} has come back as primary; it is about to follow",
                        context.peer_name
                    ),
                );
            }
            Relation::MineIsPrefix if self.recovering() => {
                self.set_state(
                    context,
                    ReplicationState::Idle,
                    format!(
                        "{} became primary while this node was away; it checks this log first",
                        context.peer_name
                    ),
                );
            }
            relation => self.split_brain(context, &relation),
        }
    }

    pub(super) fn split_brain(&mut self, context: &mut Context<'_>, relation: &Relation) {
        self.drop_streams();
        let name = &self.local.name;
        let peer = context.peer_name;
        let what = match relation {
            Relation::Diverged { common, mine_bytes, theirs_bytes } => format!(
                "since LSN {common} this node wrote {} and {peer} wrote {}",
                ByteSize(*mine_bytes),
                ByteSize(*theirs_bytes)
            ),
            Relation::Same => "with equal logs".to_owned(),
            Relation::TheirsIsPrefix => format!("this node has all that {peer} has, and more"),
            Relation::MineIsPrefix => format!("{peer} has all that this node has, and more"),
        };
        let text = format!(
            "both nodes are primary: {what}; stop the hosts of the one that is to yield, then \
             `tidelog demote {name}` there"
        );
        self.set_state(context, ReplicationState::SplitBrain, text);
    }

    pub(super) fn ask(&mut self, context: &mut Context<'_>) {
        if self.local.failed {
            self.set_state(
                context,
                ReplicationState::Blocked,
                "this node's disk failed; restart it once the disk is well",
            );
            return;
        }
        let stream = self.next_stream;
        self.next_stream += 1;
        self.follower =
            Some(Follower { stream, asked: None, expected: Lsn::ZERO, appended: Lsn::ZERO });
        context.outputs.push(Output::Prepare { group: self.local.id, stream });
        if !self.needs_a_hand() {
            let reason = format!("{} is asked for the log", context.peer_name);
            self.set_state(context, ReplicationState::Idle, reason);
        }
    }

    pub(super) fn look_up(&mut self, context: &mut Context<'_>, lsn: Lsn, lookup: Lookup) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.lookup = Some((ticket, lookup));
        context.outputs.push(Output::LookupChain { group: self.local.id, lsn, ticket });
    }

    pub(super) fn on_may_follow(&mut self, context: &mut Context<'_>, head: Lsn, chain: Chain) {
        let unchanged = self.local.history.head == head && self.local.history.chain == chain;
        let peer_is_primary = self.remote.as_ref().is_some_and(|remote| remote.primary);
        if self.recovering() && unchanged && peer_is_primary {
            context.outputs.push(Output::Event {
                severity: Severity::Warning,
                code: "returned-as-secondary",
                group: Some(self.local.name.clone()),
                text: format!(
                    "group {}: {} became primary while this node was away, and has all of this \
                     log: this node follows it",
                    self.local.name, context.peer_name
                ),
            });
            context.outputs.push(Output::Demote { group: self.local.id });
        } else if self.local.primary
            && let Some(remote) = self.remote.clone()
        {
            let relation = compare(&self.local.history, &remote.history);
            self.split_brain(context, &relation);
        }
    }

    pub(in crate::replication) fn on_demote_failed(
        &mut self,
        context: &mut Context<'_>,
        reason: String,
    ) {
        let text = format!("this node could not become secondary: {reason}");
        self.set_state(context, ReplicationState::Blocked, text);
    }
}
