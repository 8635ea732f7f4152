//! The world: simulated time, the order of what happens, and what the nodes do step by step.
//!
//! Each node runs the real cores and the real engine. What threads do in production is an event
//! here: a job of a group's thread, a round of its sync, its folder and its preparer, a look at a
//! group that changed. One event happens at a time, and all chance comes from one seed.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tidelog::group::{DataState, GroupError};
use tidelog::replication::simulation::{
    Bulk, ConnId, Input, Job, Membership, Output, Said, Waiting, given_up, local_group, perform,
};
use tidelog::replication::wire::Message;
use tidelog::units::{Chain, EpochId, GroupId, Lsn, Name};

use super::backups::Backups;
use super::chance::{Chance, Trace};
use super::coverage::Coverage;
use super::event::{Event, short};
use super::hosts::Host;
use super::network::{Connection, Weather};
use super::node::Node;
use super::oracle::Oracle;

/// A group of the world.
pub struct WorldGroup {
    pub id: GroupId,
    pub members: Vec<usize>,
    pub oracle: Oracle,
    /// The chain at each position that was the head of any node: the same position is the same
    /// bytes everywhere.
    pub chains: HashMap<(EpochId, Lsn), Chain>,
    /// The head when its volumes had been made.
    pub made_at: Lsn,
    /// How far back its log is kept whatever that costs.
    pub kept_window: Option<Duration>,
    /// Where each request ends that was appended, and when.
    pub appended: Vec<(EpochId, Lsn, u64)>,
    /// A resolve was refused since the log does not reach back to where histories part.
    pub beyond: bool,
    /// A copy refused to follow another node than those that its log names.
    pub refused: bool,
    /// The member to which replication was stopped.
    pub stopped: Option<usize>,
}

/// Two nodes serve one group.
pub struct BothServe {
    /// The life of each, and its reign.
    pub reigns: [(u64, Option<EpochId>); 2],
    /// Since when, by the world's time.
    pub since: u64,
}

/// What the engine's errors call a full disk.
const FULL: &str = "no space";

/// All of it.
pub struct World {
    pub time: Arc<AtomicU64>,
    pub chance: Chance,
    pub trace: Rc<RefCell<Trace>>,
    pub coverage: Coverage,
    queue: BTreeMap<(u64, u64), Event>,
    number: u64,
    pub nodes: Vec<Node>,
    pub groups: Vec<WorldGroup>,
    pub hosts: Vec<Host>,
    /// By two nodes and a group that they serve beside each other.
    pub both_serve: HashMap<(usize, usize, usize), BothServe>,
    pub connections: BTreeMap<ConnId, Connection>,
    pub weathers: BTreeMap<(usize, usize), Weather>,
    /// Bytes of a group that may be on their way.
    pub window_bytes: u64,
    /// An image is read at one in this many of the moments at which it could be.
    pub look_one_in: u64,
    /// Hosts wait up to one of these between two turns, milliseconds.
    pub host_pauses: [u64; 4],
    pub backups: Option<Backups>,
}

impl World {
    /// An empty world of a seed.
    pub fn new(chance: Chance, trace: Rc<RefCell<Trace>>) -> World {
        World {
            time: Arc::new(AtomicU64::new(100_000_000_000)),
            chance,
            trace,
            coverage: Coverage::default(),
            queue: BTreeMap::new(),
            number: 0,
            nodes: Vec::new(),
            groups: Vec::new(),
            hosts: Vec::new(),
            both_serve: HashMap::new(),
            connections: BTreeMap::new(),
            weathers: BTreeMap::new(),
            window_bytes: 16 << 20,
            look_one_in: 8,
            host_pauses: [20, 200, 800, 2000],
            backups: None,
        }
    }

    /// Adds a group that is nowhere yet.
    pub fn add_group(&mut self, members: Vec<usize>) -> usize {
        let id = GroupId([7 + self.groups.len() as u8; 16]);
        let chains = HashMap::new();
        self.groups.push(WorldGroup {
            id,
            members,
            oracle: Oracle::new(),
            chains,
            made_at: Lsn::ZERO,
            kept_window: None,
            appended: Vec::new(),
            beyond: false,
            refused: false,
            stopped: None,
        });
        self.groups.len() - 1
    }

    /// The world's time in nanoseconds.
    pub fn now(&self) -> u64 {
        self.time.load(Ordering::Relaxed)
    }

    pub fn next_number(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    /// A line of the trace.
    pub fn say(&self, text: std::fmt::Arguments<'_>) {
        self.trace.borrow_mut().add(self.now(), text);
    }

    pub fn schedule(&mut self, after: Duration, event: Event) {
        let number = self.next_number();
        self.queue.insert((self.now() + after.as_nanos() as u64, number), event);
    }

    /// Lets a span pass.
    pub fn run(&mut self, span: Duration) {
        let end = self.now() + span.as_nanos() as u64;
        while let Some(entry) = self.queue.first_entry() {
            let (time, _) = *entry.key();
            if time > end {
                break;
            }
            let event = entry.remove();
            self.time.store(self.now().max(time), Ordering::Relaxed);
            let Some(event) = self.unless_hung(event) else { continue };
            self.coverage.add("events", 1);
            self.happen(event);
            self.settle();
        }
        self.time.store(end, Ordering::Relaxed);
    }

    fn lives(&self, node: usize, life: u64) -> bool {
        self.nodes[node].up && self.nodes[node].life == life
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Feed { node, peer, life, input } => {
                if self.lives(node, life) {
                    self.feed(node, peer, input);
                }
            }
            Event::Arrive { conn, side, bytes } => self.arrive(conn, side, &bytes),
            Event::Write { conn, node } => self.write(conn, node),
            Event::ConnUp { conn, side, life } => self.conn_up(conn, side, life),
            Event::Wake { node, peer, life } if self.lives(node, life) => self.wake(node, peer),
            Event::Members { node, peer, group, life } if self.lives(node, life) => {
                self.put_members(node, peer, group);
            }
            Event::Look { node, group, life } if self.lives(node, life) => self.look(node, group),
            Event::Work { node, group, life } if self.lives(node, life) => self.work(node, group),
            Event::Sync { node, group, life } if self.lives(node, life) => self.sync(node, group),
            Event::Mark { node, group, life } if self.lives(node, life) => {
                self.mark(node, group);
                self.schedule(Duration::from_secs(1), Event::Mark { node, group, life });
            }
            Event::Fold { node, group, life } if self.lives(node, life) => {
                self.fold(node, group, false);
                self.schedule(Duration::from_secs(5), Event::Fold { node, group, life });
            }
            Event::Prepare { node, group, life } if self.lives(node, life) => {
                if let Some(copy) = self.nodes[node].copies.get_mut(&group) {
                    copy.written_back = copy.group.prepare_round(copy.written_back);
                    self.schedule(Duration::from_secs(1), Event::Prepare { node, group, life });
                }
            }
            Event::Host { host } => self.host_acts(host),
            Event::Request { node, life, host, batch, tries } => {
                if self.lives(node, life) {
                    self.request_arrives(node, host, batch, tries);
                }
            }
            Event::Answer { host, node, life, batch } => {
                self.answer_arrives(host, (node, life), &batch);
            }
            Event::Switch(switch) => self.go_on_with_switch(switch),
            Event::Backup { node } => self.backup_tick(node),
            // Of an earlier life.
            Event::Wake { .. }
            | Event::Members { .. }
            | Event::Look { .. }
            | Event::Work { .. }
            | Event::Sync { .. }
            | Event::Mark { .. }
            | Event::Fold { .. }
            | Event::Prepare { .. } => {}
        }
    }

    /// After each step: nodes whose disk has stopped are dead, what was noted is passed on, and
    /// what holds at every moment is checked.
    pub fn settle(&mut self) {
        for node in 0..self.nodes.len() {
            if !self.nodes[node].up {
                continue;
            }
            if !self.nodes[node].disk.has_power() {
                self.strike(node);
                continue;
            }
            let heard = std::mem::take(&mut *self.nodes[node].heard.lock().expect("no panic"));
            for (code, text) in heard {
                // No disk here loses a name that was synced.
                assert_ne!(code, "base-lost", "{}: {text}", self.nodes[node].name);
                self.coverage.event(&code);
                self.say(format_args!("{} tells {code}: {text}", self.nodes[node].name));
            }
            let life = self.nodes[node].life;
            for group in 0..self.groups.len() {
                let Some(copy) = self.nodes[node].copies.get_mut(&group) else { continue };
                let changed = copy.dirty.swap(false, Ordering::Relaxed);
                let look = changed && !copy.looking;
                copy.looking |= changed;
                if look {
                    let after = self.chance.up_to(Duration::from_micros(200));
                    self.schedule(after, Event::Look { node, group, life });
                }
                self.flushes_done(node, group);
                if changed {
                    self.check_positions(node, group);
                }
            }
        }
    }

    pub fn feed(&mut self, node: usize, peer: usize, input: Input) {
        if !self.nodes[node].up {
            return;
        }
        let mut outputs = Vec::new();
        let now = self.nodes[node].monotonic();
        let Some(link) = self.nodes[node].links.get_mut(&peer) else { return };
        link.core.handle(now, input, &mut outputs);
        for output in outputs {
            self.carry_out(node, peer, output);
        }
        self.arm(node, peer);
    }

    /// Results come in the order of what they answer, so this takes always the same time.
    pub fn feed_later(&mut self, node: usize, peer: usize, input: Input) {
        let life = self.nodes[node].life;
        let event = Event::Feed { node, peer, life, input };
        self.schedule(Duration::from_micros(20), event);
    }

    fn arm(&mut self, node: usize, peer: usize) {
        let (world, monotonic) = (self.now(), self.nodes[node].monotonic());
        let life = self.nodes[node].life;
        let Some(link) = self.nodes[node].links.get_mut(&peer) else { return };
        let Some(due) = link.core.next_wake() else { return };
        let after = due.saturating_sub(monotonic);
        let at = world + after.as_nanos() as u64;
        if link.wake.is_none_or(|wake| at < wake) {
            link.wake = Some(at);
            self.schedule(after, Event::Wake { node, peer, life });
        }
    }

    fn wake(&mut self, node: usize, peer: usize) {
        let (world, now) = (self.now(), self.nodes[node].monotonic());
        let Some(link) = self.nodes[node].links.get_mut(&peer) else { return };
        if link.wake.is_some_and(|wake| wake <= world) {
            link.wake = None;
        }
        if link.core.next_wake().is_some_and(|due| due <= now) {
            self.feed(node, peer, Input::Tick);
        } else {
            self.arm(node, peer);
        }
    }

    pub fn group_number(&self, id: GroupId) -> usize {
        self.groups.iter().position(|group| group.id == id).expect("a group of this world")
    }

    pub fn peer_number(&self, id: tidelog::units::NodeId) -> usize {
        self.nodes.iter().position(|node| node.id == id).expect("a node of this world")
    }

    fn carry_out(&mut self, node: usize, peer: usize, output: Output) {
        let output = match Job::of(self.nodes[peer].id, output) {
            Ok((id, job)) => {
                let group = self.group_number(id);
                return self.add_job(node, group, job);
            }
            Err(output) => output,
        };
        match output {
            Output::Dial => self.dial(node, peer),
            Output::Close { conn, .. } => self.close(conn, node),
            Output::Send { conn, mut message } => {
                if let Message::Heartbeat { wall, .. } = &mut message {
                    *wall = self.nodes[node].wall().0;
                }
                let frame = message.to_frame().expect("within the limits");
                self.send_message(conn, node, frame);
            }
            Output::SendLog { conn, group, stream, from, to } => {
                let bulk = Bulk::Log { from, to };
                self.send_bulk(conn, node, Waiting { group, stream, bulk });
            }
            Output::SendPart { conn, group, stream, peer: name, number } => {
                let bulk = Bulk::Part { peer: name, number };
                self.send_bulk(conn, node, Waiting { group, stream, bulk });
            }
            Output::FollowChanged { group } => {
                let group = self.group_number(group);
                if let Some(copy) = self.nodes[node].copies.get(&group) {
                    copy.dirty.store(true, Ordering::Relaxed);
                }
            }
            Output::PeerHolds { group, received, durable } => {
                let group = self.group_number(group);
                if let Some(found) = self.nodes[node].group(group) {
                    found.note_peer_holds(self.nodes[peer].id, received, durable);
                }
            }
            Output::PeerLost { group, reason, received, durable } => {
                let group = self.group_number(group);
                if let Some(found) = self.nodes[node].group(group) {
                    found.note_peer_lost(self.nodes[peer].id, &reason, received, durable);
                }
            }
            Output::Event { code, text, .. } => {
                self.coverage.event(code);
                self.say(format_args!("{} tells {code}: {text}", self.nodes[node].name));
            }
            touching => unreachable!("{touching:?} touches a log"),
        }
    }

    fn add_job(&mut self, node: usize, group: usize, job: Job) {
        let life = self.nodes[node].life;
        let after = self.chance.up_to(Duration::from_micros(500));
        let Some(copy) = self.nodes[node].copies.get_mut(&group) else { return };
        copy.jobs.push_back(job);
        if !std::mem::replace(&mut copy.working, true) {
            self.schedule(after, Event::Work { node, group, life });
        }
    }

    /// The group's thread does its next job.
    fn work(&mut self, node: usize, group: usize) {
        let now = self.now();
        let Some(copy) = self.nodes[node].copies.get_mut(&group) else { return };
        let Some(job) = copy.jobs.pop_front() else {
            copy.working = false;
            return;
        };
        let yields = matches!(job, Job::Yield { .. });
        let appends = matches!(job, Job::Append { .. });
        let stages = matches!(job, Job::Stage { .. });
        if yields {
            copy.begin_cut(now);
        }
        let mut noted = None;
        if let Job::Yield { peer, .. } = job {
            let of = (self.peer_number(peer), group);
            noted = self.nodes[node].invited.insert(of).then_some(of);
        }
        self.say(format_args!("{} does {}", self.nodes[node].name, short(&job)));
        let copy = self.nodes[node].copies.get_mut(&group).expect("it was there");
        let found = Arc::clone(&copy.group);
        let head = found.positions().head;
        let (jobs, taking) = (&mut copy.jobs, &mut copy.taking);
        let told = perform(&*found, taking, job, |peer, stream| match jobs.front() {
            Some(Job::Append { peer: p, stream: s, .. }) if (*p, *s) == (peer, stream) => {
                match jobs.pop_front() {
                    Some(Job::Append { position, bytes, .. }) => Some((position, bytes)),
                    _ => None,
                }
            }
            _ => None,
        });
        let switched = stages && found.positions().head != head;
        if switched {
            // A tail that was only received may have made way for the image.
            (copy.sure, copy.durable) = (Vec::new(), Vec::new());
        }
        if let Some((peer, input)) = told {
            match &input {
                Input::Yielded { .. } => self.coverage.add("yields", 1),
                Input::YieldRefused { reason, .. } => {
                    // The next start of one that failed may end the cut.
                    if let Some(of) = noted
                        && found.data_state().0 != DataState::Failed
                    {
                        self.nodes[node].invited.remove(&of);
                    }
                    self.coverage.add("yields refused", 1);
                    self.say(format_args!("{} yields not: {reason}", self.nodes[node].name));
                }
                Input::AppendFailed { reason, .. } => {
                    self.say(format_args!("{} takes no bytes: {reason}", self.nodes[node].name));
                }
                _ => {}
            }
            let peer = self.peer_number(peer);
            self.feed_later(node, peer, input);
        }
        if !self.nodes[node].disk.has_power() {
            return;
        }
        if yields && let Some(copy) = self.nodes[node].copies.get_mut(&group) {
            copy.end_cut();
        }
        if yields || switched || appends && self.chance.one_in(self.look_one_in) {
            self.note_sure(node, group);
        }
        let life = self.nodes[node].life;
        let after = self.chance.up_to(Duration::from_micros(500));
        self.schedule(after, Event::Work { node, group, life });
    }

    /// Tells every core of the node what a group is now.
    pub fn look(&mut self, node: usize, group: usize) {
        let me = self.nodes[node].id;
        let Some(copy) = self.nodes[node].copies.get_mut(&group) else { return };
        copy.looking = false;
        let found = Arc::clone(&copy.group);
        // By whose stream it follows; of several the first.
        let id = found.id();
        let links = self.nodes[node].links.values().map(|link| &link.core);
        let mut followed: Vec<Name> = links
            .filter(|core| core.channel(id).is_some_and(|channel| channel.follows()))
            .map(|core| core.name().clone())
            .collect();
        followed.sort();
        let heard = self.nodes[node].links.iter().filter_map(|(peer, link)| {
            Some((self.nodes[*peer].id, link.core.channel(id)?.remote()?))
        });
        let own = local_group(&*found, me, me, false).history;
        let given_up = given_up(own.last(), heard);
        for peer in 0..self.nodes.len() {
            if peer == node {
                continue;
            }
            let asked = self.groups[group].members.contains(&peer)
                && self.nodes[node].invited.contains(&(peer, group));
            let mut local = local_group(&*found, me, self.nodes[peer].id, asked);
            let other = followed.iter().find(|name| **name != self.nodes[peer].name);
            local.follows = other.cloned();
            local.given_up.clone_from(&given_up);
            let channel = self.nodes[node].links[&peer].core.channel(id);
            let parted = channel.is_some_and(|channel| channel.parted().is_some());
            let says = matches!(local.membership, Membership::Member { .. });
            // What the log says by itself counts once it is durable.
            let healthy = found.data_state().0 != DataState::Failed;
            let copy = self.nodes[node].copies.get_mut(&group).expect("it is looked at");
            if asked && !parted && says && healthy {
                let at = found.positions();
                let (said, durable) = Said::look(copy.said.get(&peer), found.cuts(), &at);
                copy.said.insert(peer, said);
                if durable {
                    self.nodes[node].invited.remove(&(peer, group));
                }
            } else {
                copy.said.remove(&peer);
            }
            self.feed(node, peer, Input::Group(Box::new(local)));
        }
    }

    pub fn sync(&mut self, node: usize, group: usize) {
        let Some(copy) = self.nodes[node].copies.get_mut(&group) else { return };
        copy.syncing = false;
        let synced = copy.group.sync_now();
        if synced.is_ok() {
            if copy.line.is_some() {
                copy.durable = copy.sure.clone();
            }
        } else if self.nodes[node].disk.has_power() {
            self.coverage.add("failed syncs", 1);
        }
    }

    fn mark(&mut self, node: usize, group: usize) {
        self.sync(node, group);
        self.check_who_serves(node, group);
        let Some(copy) = self.nodes[node].copies.get_mut(&group) else { return };
        if copy.group.data_state().0 == DataState::Failed {
            return;
        }
        copy.clock_noted = copy.group.mark_round(copy.clock_noted);
        let quiet = copy.group.positions();
        if quiet.durable == quiet.head && copy.line.is_none() && self.chance.one_in(4) {
            self.note_sure(node, group);
            let copy = self.nodes[node].copies.get_mut(&group).expect("it was there");
            copy.durable = copy.sure.clone();
        }
    }

    /// A round of the folder, or a fold of all that may be folded.
    pub fn fold(&mut self, node: usize, group: usize, forced: bool) {
        let disk_troubled = self.nodes[node].disk_troubled;
        let Some(copy) = self.nodes[node].copies.get_mut(&group) else { return };
        let before = copy.group.positions().horizon;
        // What ends the fold of a copy that began anew from an image looks at no window.
        let half_folded = copy.fold_failed || disk_troubled;
        if forced {
            let folded = copy.group.fold_now();
            copy.fold_failed |=
                folded.as_ref().is_err_and(|error| !matches!(error, GroupError::NoSpace { .. }));
            copy.fold_failed &= folded.is_err();
        } else {
            copy.group.fold_round(&mut copy.fold_told);
            copy.fold_failed |= copy.fold_told.as_ref().is_some_and(|why| !why.contains(FULL));
            // A group that failed does not try, and tells nothing.
            let tries = copy.group.data_state().0 != DataState::Failed;
            copy.fold_failed &= copy.fold_told.is_some() || !tries;
        }
        if !self.nodes[node].disk.has_power() {
            return;
        }
        let copy = &self.nodes[node].copies[&group];
        let after = copy.group.positions().horizon;
        if after > before {
            self.coverage.add("folds", 1);
            if !copy.images.is_empty() {
                self.coverage.add("folds beside open images", 1);
            }
            if copy.images.iter().any(|open| open.image.position().lsn < after) {
                self.coverage.add("folds under images", 1);
            }
            let name = &self.nodes[node].name;
            self.say(format_args!("{name} folds group {group} from {before} to {after}"));
            if !half_folded {
                self.check_kept_window(node, group);
            }
            self.check_images(node, group);
            self.note_sure(node, group);
        }
    }
}
