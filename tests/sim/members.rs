//! An operator stops the replication of a group to a node, and takes it up again.
//!
//! A copy whose replication was stopped is retired: it can be read, also at its older moments, it
//! stays where it is, and it is not backed up. Taken up again it comes to order like any other, by
//! the log or by an image. And a copy is deleted, and made anew.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tidelog::group::{DataState, Group, GroupError, Point, Role};
use tidelog::log::control::{Mode, OnLoss};
use tidelog::replication::ReplicateOptions;
use tidelog::replication::simulation::{may_follow, put_member};
use tidelog::units::{Lsn, NodeId};

use super::event::Event;
use super::hosts::MUST_HOLD;
use super::node::{Death, contents, group_dir};
use super::world::World;

/// A peer answers within this that is asked for its copy.
const ASKED_FOR: Duration = Duration::from_millis(30);
/// How soon a record is tried again that waits for a switchover.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Moments of a retired copy that are opened.
const MOMENTS: usize = 4;

/// Whether a group's records have a node as a member.
pub fn has_member(group: &Group, node: NodeId) -> bool {
    group.control().members.iter().any(|member| member.node == node)
}

impl World {
    /// Stops the replication to a member, or takes up again what was stopped.
    pub fn change_members(&mut self, node: usize, group: usize) {
        if !self.nodes[node].serves(group) || self.has_writers_halted(node, group) {
            return;
        }
        let members = self.groups[group].members.clone();
        if let Some(peer) = self.groups[group].stopped {
            if peer != node {
                self.replicate_again(node, group, peer);
            }
            return;
        }
        // With two primaries there is something else to do first.
        let primaries = members.iter().filter(|node| self.nodes[**node].is_primary(group));
        let peer = self.chance.of(&members);
        if peer != node && primaries.count() == 1 {
            self.stop_replication(node, group, peer);
        }
    }

    /// Whether a switchover is under way, whose end a command that writes a record waits for.
    fn has_writers_halted(&self, node: usize, group: usize) -> bool {
        let why = self.nodes[node].group(group).and_then(|found| found.waits_because());
        why.is_some_and(|why| !why.contains(MUST_HOLD))
    }

    /// Has a copy deleted and made anew, where another node has everything: of the node's own
    /// earlier reigns the log that comes tells too.
    pub fn make_anew(&mut self, node: usize, group: usize) {
        let members = self.groups[group].members.clone();
        let well = members.iter().all(|member| self.nodes[*member].up && !self.has_failed(*member));
        if !well || self.nodes[node].is_primary(group) || !self.is_in_order(group) {
            return;
        }
        let primary = members.iter().find(|member| self.nodes[**member].is_primary(group));
        let found = self.nodes[*primary.expect("it is in order")].group(group).expect("it runs");
        let (at, reigns) = (found.positions(), found.control().epochs.clone());
        let copy = self.nodes[node].group(group).expect("it runs");
        if at.durable < at.head || copy.branches().map_or(true, |branches| !branches.is_empty()) {
            return;
        }
        let has_reigned = reigns.iter().any(|reign| reign.author == self.nodes[node].id);
        self.coverage.add("copies made anew", 1);
        self.coverage.add("copies made anew where their node had reigned", has_reigned.into());
        self.die(node, Death::Kill);
        self.say(format_args!("{} loses its copy of group {group}", self.nodes[node].name));
        let new = self.new_group(group);
        let this = &mut self.nodes[node];
        this.delete(group);
        let made = Group::create_copy(this.context(), &group_dir(group), new);
        made.expect("a whole disk").close().expect("a whole disk");
        let peers = members.iter().filter(|peer| **peer != node);
        this.invited.extend(peers.map(|peer| (*peer, group)));
        self.start(node);
    }

    fn stop_replication(&mut self, node: usize, group: usize, peer: usize) {
        let found = self.nodes[node].group(group).expect("it serves").clone();
        let (id, name) = (self.nodes[peer].id, self.nodes[peer].name.clone());
        if !has_member(&found, id) {
            return;
        }
        // Where it failed the record may be in the log all the same.
        self.groups[group].stopped = Some(peer);
        let stopped = put_member(&*found, id, name, ReplicateOptions::default(), true);
        self.coverage.add("replications stopped", u64::from(stopped.is_ok()));
        let (a, b) = (&self.nodes[node].name, &self.nodes[peer].name);
        self.say(format_args!("{a} stops replicating group {group} to {b}: {stopped:?}"));
    }

    /// A node is asked for its copy of a group, which is to be replicated to it again; whether it
    /// takes that up.
    pub fn replicate_again(&mut self, node: usize, group: usize, peer: usize) -> bool {
        if !self.hears(node, peer) || self.nodes[node].inviting.contains(&(peer, group)) {
            return false;
        }
        let there = self.nodes[peer].group(group).expect("it runs").clone();
        // The peer takes a copy up for nobody who has nothing to do with it.
        let me = self.nodes[node].id;
        let invited = self.nodes[peer].invited.contains(&(node, group));
        if !invited && !may_follow(&there.control(), there.role(), self.nodes[peer].id, me) {
            self.coverage.add("replications refused", 1);
            self.groups[group].refused = true;
            return false;
        }
        self.nodes[node].inviting.insert((peer, group));
        self.nodes[peer].invited.insert((node, group));
        let dirty = &self.nodes[peer].copies[&group].dirty;
        dirty.store(true, Ordering::Relaxed);
        let (a, b) = (&self.nodes[node].name, &self.nodes[peer].name);
        self.say(format_args!("{a} asks {b} for its copy of group {group} again"));
        // What the peer says by then may have come.
        let (after, life) = (self.chance.up_to(ASKED_FOR), self.nodes[node].life);
        self.schedule(after, Event::Members { node, peer, group, life });
        true
    }

    /// The peer has been asked for its copy, and becomes a member.
    pub fn put_members(&mut self, node: usize, peer: usize, group: usize) {
        if self.nodes[node].serves(group) && self.has_writers_halted(node, group) {
            let life = self.nodes[node].life;
            self.coverage.add("records tried while writers are halted", 1);
            let again = Event::Members { node, peer, group, life };
            return self.schedule(LOOK_AGAIN, again);
        }
        self.nodes[node].inviting.remove(&(peer, group));
        if !self.nodes[node].serves(group) {
            return;
        }
        let copy = &self.nodes[node].copies[&group];
        copy.dirty.store(true, Ordering::Relaxed);
        let found = copy.group.clone();
        let options = ReplicateOptions {
            mode: Some(self.chance.of(&[Mode::Async, Mode::Async, Mode::Receive, Mode::Sync])),
            on_loss: Some(self.chance.of(&[OnLoss::Continue, OnLoss::Continue, OnLoss::Block])),
            rpo_target: None,
        };
        let mut put = Ok(());
        for member in [node, peer] {
            let (id, name) = (self.nodes[member].id, self.nodes[member].name.clone());
            put = put.and_then(|()| put_member(&*found, id, name, options.clone(), false));
            // What is durable by the first record was answered before there is the second.
            self.flushes_done(node, group);
        }
        let (a, b) = (&self.nodes[node].name, &self.nodes[peer].name);
        self.say(format_args!("{a} replicates group {group} to {b} again: {put:?}"));
        let is_back = put.is_ok() || has_member(&found, self.nodes[peer].id);
        let stopped = &mut self.groups[group].stopped;
        if stopped.is_none_or(|stopped| stopped == peer) {
            *stopped = (!is_back).then_some(peer);
        }
        if put.is_err() {
            return;
        }
        self.coverage.add("replications taken up again", 1);
        if let Some(there) = self.nodes[peer].group(group) {
            let retired = there.data_state().0 == DataState::Retired;
            let folded = found.positions().horizon > there.positions().head;
            self.coverage.add("retired copies taken up again", u64::from(retired));
            self.coverage.add("copies taken up again behind the horizon", u64::from(folded));
        }
    }

    /// Of a group that comes to no order the copies whose replication was stopped are taken up
    /// again; whether there was one.
    pub fn take_up_again(&mut self, node: usize, group: usize) -> bool {
        let found = self.nodes[node].group(group).expect("it serves").clone();
        for peer in self.groups[group].members.clone() {
            let id = self.nodes[peer].id;
            let there = self.nodes[peer].group(group).expect("it runs");
            // Once: one whose history has parted does not hear of it before it is resolved.
            let told = !there.control().members.is_empty()
                && !has_member(there, id)
                && !self.nodes[peer].invited.contains(&(node, group));
            let stopped = !has_member(&found, id) || told;
            if peer != node && stopped && self.replicate_again(node, group, peer) {
                return true;
            }
        }
        false
    }

    /// Whether all members of a group are in the records of a node.
    pub fn has_all_members(&self, node: usize, group: usize) -> bool {
        let found = self.nodes[node].group(group).expect("it runs");
        self.groups[group].members.iter().all(|member| has_member(found, self.nodes[*member].id))
    }

    /// A copy that is retired stays where it is, until it is taken up again or promoted. Taken up
    /// again it stays retired until the log or an image has brought it back.
    pub fn check_stays(&mut self, node: usize, group: usize) {
        // Another primary, who does not know of that, may have it as a member.
        let id = self.nodes[node].id;
        let wanted = |other: &usize| {
            let found = self.nodes[*other].group(group);
            self.nodes[*other].is_primary(group) && found.is_some_and(|found| has_member(found, id))
        };
        let stopped = self.groups[group].stopped == Some(node)
            && !self.groups[group].members.iter().any(wanted);
        let copy = self.nodes[node].copies.get_mut(&group).expect("it runs");
        if !stopped || copy.group.data_state().0 != DataState::Retired {
            copy.retired_at = None;
            return;
        }
        let head = copy.group.positions().head;
        let at = *copy.retired_at.get_or_insert(head);
        let name = &self.nodes[node].name;
        assert_eq!(at, head, "{name}: group {group}: the copy is retired, and does not stay");
    }

    /// A group is in order: no copy counts as one whose replication was stopped.
    pub fn check_nobody_is_retired(&self, group: usize) {
        for node in self.groups[group].members.iter().copied() {
            let state = self.nodes[node].group(group).expect("it runs").data_state();
            let name = &self.nodes[node].name;
            assert_ne!(state.0, DataState::Retired, "{name}: group {group}: {state:?}");
        }
    }

    /// All is well: a copy whose replication was stopped has learnt of it and is retired, and all
    /// that it has can be read.
    pub fn check_stopped(&mut self, group: usize) {
        let Some(peer) = self.groups[group].stopped else { return };
        let members = self.groups[group].members.clone();
        let primaries: Vec<usize> =
            members.iter().copied().filter(|node| self.nodes[*node].is_primary(group)).collect();
        let [primary] = primaries[..] else { return };
        let found = self.nodes[primary].group(group).expect("it runs").clone();
        let copy = self.nodes[peer].group(group).expect("it runs").clone();
        let serves = self.nodes[primary].serves(group);
        if primary == peer || has_member(&found, self.nodes[peer].id) || !serves {
            return;
        }
        // Its log ends where the primary is no member of the group: it listens to no stranger.
        if !has_member(&copy, self.nodes[primary].id) {
            return;
        }
        let at = copy.positions();
        let state = copy.data_state().0;
        let name = self.nodes[peer].name.clone();
        // What parted from the primary's history is another trouble.
        let reigns = |group: &Group| {
            let epochs = &group.control().epochs;
            epochs.iter().map(|epoch| (epoch.id, epoch.first_lsn)).collect::<Vec<_>>()
        };
        let (there, here) = (reigns(&found), reigns(&copy));
        let parted = !there.starts_with(&here)
            || there.get(here.len()).is_some_and(|(_, begins)| *begins < at.head)
            || found.chain_at(at.head) != Some(at.chain) && at.head >= found.log_start();
        if parted || at.head == Lsn::ZERO || copy.role() == Role::Primary {
            return;
        }
        assert_eq!(
            state,
            DataState::Retired,
            "{name}: group {group}: its replication was stopped, and the copy is not retired"
        );
        self.coverage.add("retired copies checked", 1);
        self.note_sure(peer, group);
        // Before its volumes were made there is nothing to see.
        let from = self.groups[group].made_at.max(at.horizon).max(copy.log_start());
        if from > at.head {
            return;
        }
        for moment in 0..MOMENTS {
            let lsn = match moment {
                0 => from,
                1 => at.head,
                _ => Lsn(from.0 + self.chance.below(at.head.bytes_since(from) + 1)),
            };
            let image = match copy.open_image(&Point::Lsn(lsn), None, "retired", None) {
                Ok(image) => image,
                // A fold to there has begun.
                Err(GroupError::NotCovered { from, .. }) if lsn < from => continue,
                Err(error) => panic!("{name}: group {group}: {lsn} of a retired copy: {error}"),
            };
            let bytes = contents(&*image).expect("an image that was opened just now");
            let oracle = &self.groups[group].oracle;
            let held = oracle.read(&bytes).unwrap_or_else(|why| panic!("{name}: {why}"));
            oracle.places(&held).unwrap_or_else(|why| panic!("{name}: {why}"));
            copy.close_this_image(&image).expect("it is open");
        }
    }
}
