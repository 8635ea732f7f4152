//! One history: a world of a seed, faults and commands in any order, then all is made well, and it
//! must come to order.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use serde_json::Map;
use tidelog::group::{DataState, Group, NewGroup, Point};
use tidelog::io::Fault;
use tidelog::log::control::{
    Control, MemberRecord, Mode, OnFull, OnLoss, OnPeerBehind, PolicyRecord,
};
use tidelog::replication::simulation::refusal_to_promote;
use tidelog::units::{ByteSize, Lsn, Span};

use super::chance::{Chance, SimClock, Trace};
use super::coverage::Coverage;
use super::hosts::Host;
use super::network::Weather;
use super::node::{Death, Node, OpenImage, contents, group_dir};
use super::oracle::{SECTOR, SECTORS};
use super::world::World;

/// Bytes of a segment.
pub const SEGMENT_BYTES: u64 = 64 << 10;

/// What a history says that was made to fail.
pub const MADE_TO_FAIL: &str = "made to fail at step";

/// A history of a seed: what it covered. It is made to fail at the step `fails_at`.
pub fn play(seed: u64, fails_at: Option<u64>, trace: &Rc<RefCell<Trace>>) -> Coverage {
    let mut chance = Chance::new(seed);
    let count = 2 + usize::from(chance.one_in(3));
    let mut world = World::new(chance, Rc::clone(trace));
    world.say(format_args!("seed {seed}: {count} nodes"));
    for index in 0..count {
        let offset = world.chance.up_to(Duration::from_secs(100_000));
        let clock = SimClock::new(world.time.clone(), offset, 100 * (index as u64 + 1));
        let entropy = world.chance.next();
        world.nodes.push(Node::new(index, clock, entropy));
    }
    if count == 3 {
        world.coverage.add("three nodes", 1);
    }
    world.window_bytes = world.chance.of(&[16 << 20, 1 << 20, 64 << 10]);
    world.look_one_in = world.chance.of(&[4, 8, 32]);
    for node in 0..count {
        world.nodes[node].begin_life();
    }
    let together: &[&[usize]] = match count {
        3 if world.chance.one_in(2) => &[&[0, 1, 2]],
        3 => &[&[0, 1], &[1, 2]],
        _ => &[&[0, 1]],
    };
    for members in together {
        world.make_group(members.to_vec());
    }
    for node in 0..count {
        world.connect(node);
        for group in world.nodes[node].copies.keys().copied().collect::<Vec<_>>() {
            world.begin_rounds(node, group);
        }
    }
    for group in 0..world.groups.len() {
        let fickle = world.chance.of(&[0, 10, 50]);
        world.add_host(Host::new(group, 0));
        if world.chance.one_in(2) {
            world.add_host(Host::new(group, fickle));
        }
    }
    world.begin_backups();
    world.settle();
    world.run(Duration::from_secs(2));
    let steps = 20 + world.chance.below(40);
    for step in 0..steps {
        world.act();
        assert!(fails_at != Some(step), "{MADE_TO_FAIL} {step}");
        world.settle();
        let pause = world.chance.of(&[50, 500, 1500, 1500]);
        let pause = world.chance.up_to(Duration::from_millis(pause));
        world.run(pause);
        world.look_around();
    }
    world.come_to_order();
    for group in 0..world.groups.len() {
        if world.is_in_order(group) {
            world.check_damage(group);
        }
    }
    world.coverage.add("histories", 1);
    world.coverage.add("simulated seconds", world.now() / 1_000_000_000);
    for copy in world.nodes.iter().flat_map(|node| node.copies.values()) {
        copy.group.forget_images();
    }
    std::mem::take(&mut world.coverage)
}

impl World {
    /// A group on its first member, with a copy on each other one.
    fn make_group(&mut self, members: Vec<usize>) {
        // With an hour to keep and little room, hosts would wait for that hour.
        let (window, on_full) = self.chance.of(&[
            (3600, OnFull::Fold),
            (3600, OnFull::Fold),
            (3600, OnFull::Fold),
            (5, OnFull::Fold),
            (0, OnFull::Block),
            (30, OnFull::Block),
        ]);
        let log_limit = self.chance.of(&[10 << 30, 10 << 30, 1 << 20, 256 << 10]);
        let group = self.add_group(members.clone());
        let new = self.new_group(group);
        let first = members[0];
        let context = self.nodes[first].context();
        let made = Group::create(context, &group_dir(group), new.clone()).expect("a whole disk");
        for name in ["x", "y"] {
            let bytes = (SECTORS * SECTOR) as u64;
            made.create_volume(name.parse().expect("a name"), bytes).expect("a whole disk");
        }
        self.groups[group].made_at = made.positions().head;
        let is_kept = on_full == OnFull::Block && window > 0;
        self.groups[group].kept_window = is_kept.then(|| Duration::from_secs(window));
        let policy = PolicyRecord {
            window: Span::from_secs(window),
            log_limit: ByteSize(log_limit),
            on_full,
            on_peer_behind: self.chance.of(&[OnPeerBehind::Release, OnPeerBehind::Block]),
            other: Map::new(),
        };
        made.append_control(Control::Policy(policy.clone())).expect("a whole disk");
        let mode = self.chance.of(&[Mode::Async, Mode::Async, Mode::Receive, Mode::Sync]);
        let on_loss = self.chance.of(&[OnLoss::Continue, OnLoss::Continue, OnLoss::Block]);
        self.coverage.add(&format!("groups in mode {mode:?}, {on_loss:?}").to_lowercase(), 1);
        self.say(format_args!("group {group}: {mode:?}, {on_loss:?}, {policy:?}"));
        for member in &members {
            let member = MemberRecord {
                node: self.nodes[*member].id,
                name: self.nodes[*member].name.clone(),
                mode,
                on_loss,
                rpo_target: None,
                removed: false,
                other: Map::new(),
            };
            made.append_control(Control::Member(member)).expect("a whole disk");
        }
        made.sync_now().expect("a whole disk");
        self.nodes[first].adopt(group, made);
        for member in &members[1..] {
            let context = self.nodes[*member].context();
            let copy =
                Group::create_copy(context, &group_dir(group), new.clone()).expect("a whole disk");
            self.nodes[*member].adopt(group, copy);
            let peers = members.iter().filter(|peer| *peer != member);
            self.nodes[*member].invited.extend(peers.map(|peer| (*peer, group)));
        }
    }

    /// What a group, or a copy of it, is made from.
    pub fn new_group(&self, group: usize) -> NewGroup {
        NewGroup {
            id: self.groups[group].id,
            name: ["g", "h"][group].parse().expect("a name"),
            segment_bytes: SEGMENT_BYTES,
        }
    }

    /// One thing that goes wrong, or that an operator does.
    fn act(&mut self) {
        let node = self.chance.below(self.nodes.len() as u64) as usize;
        let group = self.chance.below(self.groups.len() as u64) as usize;
        let members = self.groups[group].members.clone();
        let member = self.chance.of(&members);
        let up = self.nodes[node].up;
        match self.chance.below(34) {
            0 | 1 if up => self.die(node, Death::Kill),
            2 | 3 if up => self.die(node, Death::Power),
            4 | 5 if up => {
                let death = self.chance.of(&[Death::Kill, Death::Power]);
                self.stop_disk(node, death, 40);
            }
            6 => {
                let other = (node + 1) % self.nodes.len();
                let mut weather = self.weather(node, other);
                weather.partitioned = !weather.partitioned;
                self.coverage.add("partitions", u64::from(weather.partitioned));
                self.say(format_args!("link {node} {other}: {weather:?}"));
                self.set_weather(node, other, weather);
            }
            7 | 8 => {
                let other = (node + 1) % self.nodes.len();
                let weather = Weather {
                    delay_most: Duration::from_millis(self.chance.of(&[1, 20, 200])),
                    cut_one_in: self.chance.of(&[0, 0, 30, 200]),
                    partitioned: self.weather(node, other).partitioned,
                    byte_nanoseconds: self.chance.of(&[0, 0, 1000, 20_000]),
                };
                self.say(format_args!("link {node} {other}: {weather:?}"));
                self.set_weather(node, other, weather);
            }
            9..=11 => self.promote(member, group),
            12 => self.demote(member, group),
            13 | 14 => {
                let peer = self.chance.of(&members);
                if self.nodes[member].up && peer != member {
                    self.switch_over(member, peer, group);
                }
            }
            15 => drop(self.resolve(member, group)),
            16 | 17 => self.open_or_close(member, group),
            18 if self.nodes[member].up => self.fold(member, group, true),
            19 => {
                let seconds = self.chance.of(&[-86_400, -5, 2, 60, 86_400]);
                self.coverage.add("clock jumps", 1);
                self.say(format_args!("{}'s clock jumps {seconds} s", self.nodes[node].name));
                self.nodes[node].clock.jump(seconds * 1_000_000_000);
            }
            20 | 21 if up => self.trouble_disk(node),
            22 | 23 => self.toggle_repository(node),
            27 => self.rewind(member, group),
            24 => {
                let peer = self.chance.of(&members);
                if self.nodes[member].up && peer != member {
                    self.toggle_pause(member, peer, group);
                }
            }
            25 | 26 if up => {
                let span = self.chance.of(&[1, 7, 12]);
                self.hang_disk(node, Duration::from_secs(span));
            }
            28 => self.change_members(member, group),
            29 | 30 => self.damage_alive(member, group),
            31 | 32 => self.make_anew(member, group),
            _ => {}
        }
        for node in 0..self.nodes.len() {
            if !self.nodes[node].up && self.chance.one_in(4) {
                if self.chance.one_in(4) {
                    let death = self.chance.of(&[Death::Kill, Death::Power]);
                    self.stop_disk(node, death, 60);
                }
                self.start(node);
                // A start that went well is not followed by the stop that was set for it.
                if self.nodes[node].up && self.nodes[node].death.take().is_some() {
                    self.nodes[node].disk.clear_faults();
                }
            } else if self.nodes[node].up && self.has_failed(node) && self.chance.one_in(3) {
                self.coverage.add("restarts of failed nodes", 1);
                self.die(node, Death::Kill);
            }
        }
    }

    pub fn has_failed(&self, node: usize) -> bool {
        let mut copies = self.nodes[node].copies.values();
        copies.any(|copy| copy.group.data_state().0 == DataState::Failed)
    }

    /// The disk stops at one of the next operations.
    fn stop_disk(&mut self, node: usize, death: Death, within: u64) {
        let operation = self.nodes[node].disk.operations() + self.chance.below(within);
        self.nodes[node].death = Some(death);
        self.nodes[node].disk.inject(Fault::PowerOff { operation });
    }

    fn trouble_disk(&mut self, node: usize) {
        let operation = self.nodes[node].disk.operations() + self.chance.below(60);
        let fault = match self.chance.below(3) {
            0 => Fault::Error { operation },
            1 => Fault::FailedSync { operation },
            _ => Fault::NoSpace { bytes: self.chance.below(64) << 12 },
        };
        self.coverage.add("disk errors set", 1);
        self.say(format_args!("{}'s disk: {fault:?}", self.nodes[node].name));
        self.nodes[node].disk_troubled = true;
        self.nodes[node].disk.inject(fault);
    }

    fn promote(&mut self, node: usize, group: usize) {
        // Nobody promotes a copy to which replication was stopped by command.
        if !self.nodes[node].up || self.groups[group].stopped == Some(node) {
            return;
        }
        let id = self.groups[group].id;
        let cores = self.nodes[node].links.values().map(|link| &link.core);
        let (now, wall) = (self.nodes[node].monotonic(), self.nodes[node].wall());
        let refusal = refusal_to_promote(cores, id, now, wall);
        let force = refusal.is_some();
        if let Some(why) = refusal {
            self.coverage.add("promotes refused", 1);
            self.say(format_args!("{} promotes not: {why}", self.nodes[node].name));
            if !self.chance.one_in(4) {
                return;
            }
        }
        self.begin_reign(node, group, force);
    }

    fn begin_reign(&mut self, node: usize, group: usize, force: bool) {
        let Some(found) = self.nodes[node].group(group).cloned() else { return };
        let was = self.nodes[node].serves(group);
        match found.promote(if force { "forced" } else { "promote" }) {
            Ok(epoch) if !was => {
                self.coverage.add(if force { "forced promotes" } else { "promotes" }, 1);
                let name = &self.nodes[node].name;
                self.say(format_args!("{name} reigns over group {group}: {}", epoch.counter));
            }
            Ok(_) => {}
            Err(error) => {
                self.say(format_args!("{} promotes not: {error}", self.nodes[node].name));
            }
        }
    }

    fn demote(&mut self, node: usize, group: usize) {
        let Some(found) = self.nodes[node].group(group).cloned() else { return };
        if !self.nodes[node].is_primary(group) || !self.chance.one_in(3) {
            return;
        }
        let demoted = found.demote();
        self.nodes[node].copies.get_mut(&group).expect("it runs").line = None;
        self.coverage.add("demotes", u64::from(demoted.is_ok()));
        self.say(format_args!("{} is demoted: {demoted:?}", self.nodes[node].name));
    }

    /// An operator has a node yield, where the peer has told from where.
    fn resolve(&mut self, node: usize, group: usize) -> bool {
        use tidelog::group::Discard;
        use tidelog::replication::simulation::Input;
        let id = self.groups[group].id;
        let parted = self.nodes[node]
            .links
            .iter()
            .find_map(|(peer, link)| Some((*peer, link.core.channel(id)?.parted()?)));
        let Some((peer, parted)) = parted else { return false };
        let Some(found) = self.nodes[node].group(group).cloned() else { return false };
        for host in self.hosts.iter_mut().filter(|host| host.group == group) {
            host.leave(node);
        }
        found.sync_now().ok();
        let is_new = self.nodes[node].invited.insert((peer, group));
        let now = self.now();
        let copy = self.nodes[node].copies.get_mut(&group).expect("it runs");
        copy.begin_cut(now);
        let yielded = found.yield_to(parted.at, parted.chain, Discard::Authored);
        self.say(format_args!("{} resolves: {yielded:?}", self.nodes[node].name));
        if !self.nodes[node].disk.has_power() {
            return false;
        }
        let well = yielded.is_ok();
        if let Err(error) = &yielded {
            if is_new && found.data_state().0 != DataState::Failed {
                self.nodes[node].invited.remove(&(peer, group));
            }
            self.groups[group].beyond |= error.to_string().contains("tidelog group delete");
        }
        let copy = self.nodes[node].copies.get_mut(&group).expect("it runs");
        copy.end_cut();
        // A retired copy stays where it is, but for what an operator does to it.
        copy.retired_at = None;
        self.note_sure(node, group);
        if well {
            self.coverage.add("resolves", 1);
            self.feed_later(node, peer, Input::Yielded { group: id });
        }
        well
    }

    fn open_or_close(&mut self, node: usize, group: usize) {
        let open = self.nodes[node].copies.get(&group).map_or(0, |copy| copy.images.len());
        let Some(found) = self.nodes[node].group(group).cloned() else { return };
        if open > 0 && self.chance.one_in(3) {
            let copy = self.nodes[node].copies.get_mut(&group).expect("it runs");
            let closing = copy.images.remove(0);
            let _ = found.close_image(closing.image.name());
            return;
        }
        if self.nodes[node].copies[&group].half_cut {
            return;
        }
        let at = found.positions();
        let reach = at.head.bytes_since(at.horizon.min(at.head));
        let lsn = Lsn(at.horizon.0 + self.chance.below(reach + 1));
        let point = if self.chance.one_in(3) { Point::Now } else { Point::Lsn(lsn) };
        let Ok(image) = found.open_image(&point, None, "sim", None) else { return };
        if !self.nodes[node].disk.has_power() {
            return;
        }
        let bytes = match contents(&*image) {
            Err(_) if self.nodes[node].copies[&group].fold_failed => return,
            bytes => bytes.expect("an image that was opened just now"),
        };
        let oracle = &self.groups[group].oracle;
        let name = &self.nodes[node].name;
        let held = oracle.read(&bytes).unwrap_or_else(|why| panic!("{name}: {point:?}: {why}"));
        oracle.places(&held).unwrap_or_else(|why| panic!("{name}: {point:?}: {why}"));
        self.coverage.add("images opened", 1);
        self.say(format_args!("{name} opens image {} at {}", image.name(), image.position().lsn));
        let copy = self.nodes[node].copies.get_mut(&group).expect("it runs");
        copy.images.push(OpenImage { image, held });
    }

    /// Every image of every node is one prefix.
    fn look_around(&mut self) {
        for node in 0..self.nodes.len() {
            for group in self.nodes[node].copies.keys().copied().collect::<Vec<_>>() {
                if self.chance.one_in(3) {
                    self.note_sure(node, group);
                    self.check_images(node, group);
                }
            }
        }
    }
}

#[path = "order.rs"]
mod order;
