//! A planned change of roles, step by step, as the service does it: writers are halted, the peer
//! has everything durably, this node is demoted, the peer is asked to begin its reign.

use std::time::Duration;

use tidelog::group::Role;
use tidelog::replication::ReplicationState;
use tidelog::replication::simulation::{TakeOverAnswer, take_over};
use tidelog::units::{Chain, Lsn};

use super::event::Event;
use super::oracle::Place;
use super::world::World;

/// Hosts wait this long at most.
const HALT_MAX: u64 = 10_000_000_000;

/// A switchover under way.
#[derive(Clone, Debug)]
pub struct Switch {
    node: usize,
    life: u64,
    peer: usize,
    group: usize,
    head: Lsn,
    chain: Chain,
    /// What the peer must show once it reigns.
    must: Vec<Place>,
    step: Step,
}

#[derive(Clone, Debug)]
enum Step {
    /// The peer's acknowledgements are looked at.
    Look { begun: u64 },
    /// The peer is asked.
    Ask { peer_life: u64 },
    /// The peer has answered whether it took over.
    Answer { took_over: bool },
}

impl World {
    /// Begins a switchover to a peer.
    pub fn switch_over(&mut self, node: usize, peer: usize, group: usize) {
        let refused = |world: &mut World, why: String| {
            world.coverage.add("switchovers refused", 1);
            world.say(format_args!("switchover of group {group}: {why}"));
        };
        let Some(found) = self.nodes[node].group(group).cloned() else { return };
        if self.acked(node, peer, group).is_none() {
            return refused(self, "the peer does not stream".to_owned());
        }
        if let Err(error) = found.halt_writers("switchover") {
            return refused(self, error.to_string());
        }
        if let Err(error) = found.sync_now() {
            found.resume_writers();
            return refused(self, error.to_string());
        }
        let at = found.positions();
        self.say(format_args!("switchover of group {group} begins at {}", at.head));
        let copy = &self.nodes[node].copies[&group];
        let switch = Switch {
            node,
            life: self.nodes[node].life,
            peer,
            group,
            head: at.head,
            chain: at.chain,
            must: copy.sure.clone(),
            step: Step::Look { begun: self.now() },
        };
        self.schedule(Duration::from_millis(2), Event::Switch(switch));
    }

    /// Up to where the peer has the group durably, if it streams.
    fn acked(&self, node: usize, peer: usize, group: usize) -> Option<Lsn> {
        let core = &self.nodes[node].links.get(&peer)?.core;
        let channel = core.channel(self.groups[group].id)?;
        let streams =
            matches!(channel.state().0, ReplicationState::Streaming | ReplicationState::CatchingUp);
        (streams && core.conn().is_some()).then(|| channel.acked().durable)
    }

    fn linked(&self, node: usize, peer: usize) -> bool {
        let up = self.nodes[node].links.get(&peer).is_some_and(|link| link.core.conn().is_some());
        up && !self.weather(node, peer).partitioned
    }

    pub fn go_on_with_switch(&mut self, mut switch: Switch) {
        let Switch { node, life, peer, group, head, chain, ref must, ref step } = switch;
        let must = must.clone();
        let alive = |world: &World, node: usize, life: u64| {
            world.nodes[node].up && world.nodes[node].life == life
        };
        match *step {
            Step::Look { begun } => {
                if !alive(self, node, life) {
                    return;
                }
                let Some(found) = self.nodes[node].group(group).cloned() else { return };
                match self.acked(node, peer, group) {
                    Some(acked) if acked >= head => {}
                    Some(_) if self.now() < begun + HALT_MAX => {
                        return self.schedule(Duration::from_millis(2), Event::Switch(switch));
                    }
                    _ => {
                        found.resume_writers();
                        self.coverage.add("switchovers refused", 1);
                        return self.say(format_args!("switchover: the peer lacks something"));
                    }
                }
                let demoted = found.demote();
                found.resume_writers();
                self.nodes[node].copies.get_mut(&group).expect("it runs").line = None;
                if demoted.is_err() {
                    return;
                }
                self.say(format_args!("switchover: {} is demoted", self.nodes[node].name));
                if !self.linked(node, peer) {
                    switch.step = Step::Answer { took_over: false };
                } else {
                    switch.step = Step::Ask { peer_life: self.nodes[peer].life };
                }
                let after = self.chance.up_to(Duration::from_millis(5));
                self.schedule(after, Event::Switch(switch));
            }
            Step::Ask { peer_life } => {
                if !alive(self, peer, peer_life) || !self.linked(peer, node) {
                    self.coverage.add("switchovers unanswered", 1);
                    return;
                }
                let (me, asker) = (self.nodes[peer].id, self.nodes[node].id);
                let Some(found) = self.nodes[peer].group(group).cloned() else { return };
                let took_over = match take_over(&*found, me, asker, head, chain) {
                    Ok(TakeOverAnswer::Primary) => true,
                    Ok(TakeOverAnswer::Refused(why)) => {
                        self.say(format_args!("{} refuses: {why}", self.nodes[peer].name));
                        false
                    }
                    Err(_) => return self.coverage.add("switchovers unanswered", 1),
                };
                if took_over && self.nodes[peer].disk.has_power() {
                    self.coverage.add("switchovers", 1);
                    self.say(format_args!("{} took over group {group}", self.nodes[peer].name));
                    self.verify(peer, group, &must);
                    self.note_sure(peer, group);
                }
                if !self.linked(peer, node) || self.chance.one_in(20) {
                    return self.coverage.add("switchovers unanswered", 1);
                }
                switch.step = Step::Answer { took_over };
                let after = self.chance.up_to(Duration::from_millis(5));
                self.schedule(after, Event::Switch(switch));
            }
            Step::Answer { took_over } => {
                if took_over || !alive(self, node, life) {
                    return;
                }
                let Some(found) = self.nodes[node].group(group).cloned() else { return };
                if found.role() == Role::Secondary {
                    let _ = found.promote("switchover-refused");
                    self.coverage.add("switchovers taken back", 1);
                }
            }
        }
    }
}
