//! What hosts are promised in the modes `receive` and `sync`, and what an operator does to the
//! replication of a group: pauses it, and lets it go on.
//!
//! At the moment of an answer every peer that it had to wait for holds what it covers: in memory,
//! and of a flush in mode `sync` also on its disk, where it survives the loss of this node together
//! with a power failure of the peer. That is tried: the peer's disk as a power failure would leave
//! it is opened on its own, and promoted.

use std::sync::Arc;

use tidelog::events::Events;
use tidelog::group::{Group, GroupContext};
use tidelog::io::{Env, SeededEntropy};
use tidelog::log::control::{Mode, OnLoss};
use tidelog::replication::simulation::{Input, Job};
use tidelog::units::EpochId;

use super::node::{contents, group_dir};
use super::oracle::{Place, What};
use super::world::World;

/// Of answers that a peer must have durably, one in so many is tried on its disk.
const TRIED_ONE_IN: u64 = 4;

impl World {
    /// A request is about to be answered.
    pub fn check_promise(&mut self, node: usize, group: usize, id: u64) {
        let Some(found) = self.nodes[node].group(group).cloned() else { return };
        let required = found.required_peers();
        if required.is_empty() {
            return;
        }
        let epoch = found.positions().epoch;
        let oracle = &self.groups[group].oracle;
        let request = oracle.request(id);
        let Some(place) = request.place else { return };
        let must: Vec<Place> = match request.what {
            What::Flush => {
                let covers = request.covers.iter().copied();
                covers.filter(|covered| oracle.includes(place, *covered)).collect()
            }
            _ => vec![place],
        };
        let durable = request.what == What::Flush || request.fua;
        for (peer, required) in required {
            let peer = self.peer_number(peer);
            if required.away.is_some() && required.on_loss == OnLoss::Continue {
                self.coverage.add("answers while degraded", 1);
            } else {
                // What was only in its memory went with it, and what it cut off for another primary
                // is in a branch; its word of before may have been on its way for long.
                let copy = self.nodes[peer].copies.get(&group);
                let lost_at = self.nodes[peer].died.max(copy.map_or(0, |copy| copy.cut_at));
                for must in &must {
                    if lost_at < self.groups[group].oracle.sent_at(*must) {
                        self.check_peer_has(peer, group, epoch, *must);
                    }
                    if durable && required.mode == Mode::Sync && self.chance.one_in(TRIED_ONE_IN) {
                        self.check_peer_keeps(peer, group, epoch, *must);
                    }
                }
            }
        }
    }

    /// A peer holds a place in its memory.
    fn check_peer_has(&mut self, peer: usize, group: usize, epoch: EpochId, must: Place) {
        let Some(copy) = self.nodes[peer].copies.get(&group) else { return };
        // Whoever follows another primary since has cut off what it acknowledged to this one.
        if copy.group.positions().epoch != epoch {
            return;
        }
        // What it received may wait for its turn.
        if copy.jobs.iter().any(|job| matches!(job, Job::Append { .. })) {
            return self.coverage.add("answers held in a peer's queue", 1);
        }
        self.coverage.add("answers held by a peer", 1);
        self.verify(peer, group, &[must]);
    }

    /// A peer holds a place on its disk.
    fn check_peer_keeps(&mut self, peer: usize, group: usize, epoch: EpochId, must: Place) {
        let up = self.nodes[peer].up;
        let seed = self.chance.next();
        let this = &self.nodes[peer];
        // One that is down has lost already what it could lose.
        let disk = if up { this.disk.crash(seed) } else { this.disk.snapshot() };
        let env = Env {
            disk: Arc::new(disk),
            clock: this.context().env.clock,
            entropy: Arc::new(SeededEntropy::new(seed)),
        };
        let context = GroupContext { env, events: Events::in_memory(), ..this.context() };
        let opened = match Group::open(context, &group_dir(group)) {
            Ok((opened, _)) => opened,
            Err(error) if this.disk_troubled => {
                return self.say(format_args!("{} would not open: {error}", this.name));
            }
            Err(error) => panic!("{}: its copy would not open: {error}", this.name),
        };
        if opened.positions().epoch != epoch {
            return;
        }
        let name = this.name.clone();
        opened.promote("the primary is lost").unwrap_or_else(|error| panic!("{name}: {error}"));
        let bytes = contents(&*opened).unwrap_or_else(|error| panic!("{name}: {error}"));
        let oracle = &self.groups[group].oracle;
        let held = oracle.read(&bytes).unwrap_or_else(|why| panic!("{name}: {why}"));
        let places = oracle.places(&held).unwrap_or_else(|why| panic!("{name}: {why}"));
        assert!(
            !oracle.holding(places, &[must]).is_empty(),
            "{name}: group {group}: a flush was answered that this peer was to have durably, and \
             after a power failure it is at one of {places:?}, not at {must:?}"
        );
        opened.forget_images();
        self.coverage.add("answers durable on a peer", 1);
    }

    /// An operator pauses the replication of a group with a peer, or has it go on.
    pub fn toggle_pause(&mut self, node: usize, peer: usize, group: usize) {
        let paused = !self.nodes[node].paused.contains(&(peer, group));
        self.set_paused(node, peer, group, paused);
    }

    fn set_paused(&mut self, node: usize, peer: usize, group: usize, paused: bool) {
        if paused {
            self.nodes[node].paused.insert((peer, group));
        } else {
            self.nodes[node].paused.remove(&(peer, group));
        }
        self.coverage.add(if paused { "pauses" } else { "pauses ended" }, 1);
        let (a, b) = (&self.nodes[node].name, &self.nodes[peer].name);
        self.say(format_args!("{a} pauses group {group} with {b}: {paused}"));
        let group = self.groups[group].id;
        self.feed(node, peer, Input::Pause { group, paused });
    }

    /// Nothing is paused any more.
    pub fn end_pauses(&mut self) {
        for node in 0..self.nodes.len() {
            for (peer, group) in self.nodes[node].paused.clone() {
                self.set_paused(node, peer, group, false);
            }
        }
    }
}
