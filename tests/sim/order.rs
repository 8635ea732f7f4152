//! The end of a history: everything is made well, an operator does what status asks for, and all
//! must come to one primary with equal copies, and nothing that was answered may be gone.

use std::collections::BTreeSet;
use std::time::Duration;

use tidelog::group::{Branch, View};
use tidelog::io::{Disk, OpenMode};
use tidelog::replication::ReplicationState;
use tidelog::units::Lsn;

use super::super::members::has_member;
use super::super::node::{Death, contents, group_dir};
use super::super::oracle::{SECTOR, read_stamp};
use super::super::world::World;
use super::Weather;

/// What a copy that the log no longer reaches is told; it waits for a resync.
const BEYOND: [&str; 3] = ["group delete", "was folded", "delete that copy"];

/// How a group stands.
#[derive(Debug, PartialEq, Eq)]
enum Standing {
    /// One primary, copies that stream and are equal.
    Order,
    /// A copy that the log does not reach any more waits for a resync.
    BeyondTheLog,
    /// Anything else, in words.
    Trouble(String),
}

impl World {
    /// Makes all well, and has it come to order.
    pub fn come_to_order(&mut self) {
        self.say(format_args!("all is made well"));
        let count = self.nodes.len();
        for a in 0..count {
            for b in a + 1..count {
                self.set_weather(a, b, Weather::FINE);
            }
        }
        for node in 0..count {
            self.nodes[node].hung_until = 0;
            self.nodes[node].disk.clear_faults();
            self.nodes[node].death = None;
            if self.nodes[node].up && self.has_failed(node) {
                self.die(node, Death::Kill);
            }
            if !self.nodes[node].up {
                self.start(node);
            }
        }
        if self.nodes.iter().any(|node| !node.paused.is_empty()) {
            // Who reigns is settled although nothing is copied.
            self.run(Duration::from_secs(25));
        }
        self.end_pauses();
        self.settle();
        for group in &mut self.groups {
            group.refused = false;
        }
        self.host_pauses = [2000, 2000, 4000, 4000];
        self.run(Duration::from_secs(25));
        for group in 0..self.groups.len() {
            self.check_stopped(group);
        }
        for round in 0..10 {
            let mut calm = true;
            for group in 0..self.groups.len() {
                if let Standing::Trouble(why) = self.standing(group) {
                    calm = false;
                    self.say(format_args!("group {group} in round {round}: {why}"));
                    self.operate(group);
                    self.settle();
                }
            }
            if calm {
                break;
            }
            self.run(Duration::from_secs(12));
        }
        for host in &mut self.hosts {
            host.stopped = true;
        }
        self.run(Duration::from_secs(3));
        let groups = 0..self.groups.len();
        let calm: Vec<usize> =
            groups.filter(|group| self.standing(*group) == Standing::Order).collect();
        self.check_backups(&calm);
        for group in 0..self.groups.len() {
            match self.standing(group) {
                Standing::Order => {
                    self.coverage.add("groups in order", 1);
                    self.check_nobody_is_retired(group);
                    self.check_equal(group);
                }
                Standing::BeyondTheLog => self.coverage.add("copies beyond the log", 1),
                Standing::Trouble(why) => panic!("group {group} does not come to order: {why}"),
            }
            self.check_nothing_is_gone(group);
            self.check_branches(group);
        }
    }

    /// Whether a group has come to order.
    pub fn is_in_order(&self, group: usize) -> bool {
        self.standing(group) == Standing::Order
    }

    fn state(&self, node: usize, peer: usize, group: usize) -> (ReplicationState, String) {
        let core = &self.nodes[node].links[&peer].core;
        match core.channel(self.groups[group].id) {
            Some(channel) => {
                let (state, reason, _) = channel.state();
                (state, reason.to_owned())
            }
            None => (ReplicationState::Idle, "no channel".to_owned()),
        }
    }

    fn standing(&self, group: usize) -> Standing {
        let members = &self.groups[group].members;
        let primaries: Vec<usize> =
            members.iter().copied().filter(|node| self.nodes[*node].is_primary(group)).collect();
        let mut states = Vec::new();
        for node in members {
            for peer in members.iter().filter(|peer| *peer != node) {
                states.push((*node, *peer, self.state(*node, *peer, group)));
            }
        }
        let blocked_beyond = states.iter().any(|(_, _, (state, reason))| {
            *state == ReplicationState::Blocked && BEYOND.iter().any(|word| reason.contains(word))
        });
        if blocked_beyond || self.groups[group].beyond {
            return Standing::BeyondTheLog;
        }
        let streaming = states.iter().all(|(node, peer, (state, _))| {
            let between_copies = !primaries.contains(node) && !primaries.contains(peer);
            between_copies || *state == ReplicationState::Streaming
        });
        if let [primary] = primaries[..]
            && self.nodes[primary].serves(group)
            && self.has_all_members(primary, group)
            && streaming
        {
            return Standing::Order;
        }
        let roles: Vec<String> = members
            .iter()
            .map(|node| {
                let name = &self.nodes[*node].name;
                match self.nodes[*node].group(group) {
                    None => format!("{name} is down"),
                    Some(found) => format!(
                        "{name} is {:?} at {} ({:?})",
                        found.role(),
                        found.positions().head,
                        found.waits_because()
                    ),
                }
            })
            .collect();
        Standing::Trouble(format!("{roles:?}; {states:?}"))
    }

    /// What an operator does about a group that does not come to order by itself: by the newest of
    /// its copies; where another copy is one of others, and refuses to follow that, by the one that
    /// the most of them know.
    fn operate(&mut self, group: usize) {
        let members = self.groups[group].members.clone();
        for node in &members {
            if !self.nodes[*node].up {
                self.start(*node);
                return;
            }
        }
        let serving: Vec<usize> =
            members.iter().copied().filter(|node| self.nodes[*node].serves(group)).collect();
        if serving.is_empty() {
            // One to which replication was stopped by command is none of them.
            let (stopped, refused) = (self.groups[group].stopped, self.groups[group].refused);
            let candidates = members.iter().copied().filter(|node| stopped != Some(*node));
            let newest = candidates.max_by_key(|node| {
                let found = self.nodes[*node].group(group).expect("it runs");
                let last = found.control().epochs.last().map(|epoch| epoch.counter);
                // A copy follows nobody whom it does not know as a member.
                let id = self.nodes[*node].id;
                let others = members.iter().filter_map(|other| self.nodes[*other].group(group));
                let known = others.filter(|other| has_member(other, id)).count();
                (refused.then_some(known), last, found.positions().head, known)
            });
            let newest = newest.expect("a group has members");
            self.coverage.add("operator promotes", 1);
            return self.begin_reign(newest, group, true);
        }
        // One that knows the other as no member does not see that there are two.
        for primary in &serving {
            if self.take_up_again(*primary, group) {
                return;
            }
        }
        // One of two that serve yields, or a secondary that holds what its primary lacks.
        let first = usize::from(self.chance.one_in(2));
        let mut order = members.clone();
        order.rotate_left(first);
        let secondaries = order.iter().copied().filter(|node| !serving.contains(node));
        let yielding: Vec<usize> = secondaries.chain(serving.iter().copied()).collect();
        for node in yielding {
            if self.resolve(node, group) {
                self.groups[group].beyond = false;
                return;
            }
        }
        // One of two steps down; or the only one, where a copy holds what it lost: then the newest
        // is promoted in the next round.
        if !self.groups[group].beyond {
            let node = serving[first % serving.len()];
            let found = self.nodes[node].group(group).expect("it runs").clone();
            let _ = found.demote();
            let copy = self.nodes[node].copies.get_mut(&group).expect("it runs");
            copy.line = None;
            self.coverage.add("operator demotes", 1);
        }
    }

    /// All copies are the same log and the same image.
    fn check_equal(&mut self, group: usize) {
        let members = self.groups[group].members.clone();
        let logs: Vec<_> = members
            .iter()
            .map(|node| self.nodes[*node].group(group).expect("it runs").clone())
            .collect();
        let at = logs[0].positions();
        let from = logs.iter().map(|log| log.log_start()).max().unwrap_or(Lsn::ZERO);
        let mut first = vec![0; at.head.bytes_since(from.min(at.head)) as usize];
        logs[0].read_log(from.min(at.head), &mut first).expect("its own log");
        for (log, node) in logs.iter().zip(&members).skip(1) {
            let name = &self.nodes[*node].name;
            let there = log.positions();
            assert_eq!((there.head, there.chain), (at.head, at.chain), "{name} is not equal");
            let mut bytes = vec![0; first.len()];
            log.read_log(from.min(at.head), &mut bytes).expect("its own log");
            assert!(bytes == first, "{name} has other bytes in its log");
            log.check_log(log.log_start(), there.head).expect("a whole log");
        }
        let places: Vec<_> = members.iter().map(|node| self.verify(*node, group, &[])).collect();
        assert!(places.windows(2).all(|two| two[0] == two[1]), "images differ: {places:?}");
    }

    /// Every answered write is in the surviving history or in a branch, unless a power failure took
    /// it before anything made it durable.
    fn check_nothing_is_gone(&mut self, group: usize) {
        let members = self.groups[group].members.clone();
        let mut missing: Option<BTreeSet<u64>> = None;
        for node in &members {
            let places = self.verify(*node, group, &[]);
            let lacks: BTreeSet<u64> =
                self.groups[group].oracle.missing(&places).into_iter().collect();
            missing = Some(match missing {
                Some(before) => before.intersection(&lacks).copied().collect(),
                None => lacks,
            });
        }
        let mut missing = missing.unwrap_or_default();
        for node in &members {
            let branches = self.nodes[*node].group(group).expect("it runs").branches();
            self.coverage.add("branches", branches.expect("it can be listed").len() as u64);
            if missing.is_empty() {
                continue;
            }
            let before = missing.len();
            for id in self.kept_in_branches(*node, group) {
                missing.remove(&id);
            }
            self.coverage.add("writes kept in branches", (before - missing.len()) as u64);
        }
        if let Some(id) = missing.first() {
            let request = self.groups[group].oracle.request(*id);
            let by = request.place.map(|place| self.groups[group].oracle.node_of(place.line));
            panic!("group {group}: answered writes are gone: {missing:?}; by {by:?}: {request:?}");
        }
    }

    /// Every branch is shown as one prefix, but for one whose own history was cut again below it,
    /// perhaps with nothing whole up to where it begins, and one that goes back to before the base.
    fn check_branches(&mut self, group: usize) {
        for node in self.groups[group].members.clone() {
            let found = self.nodes[node].group(group).expect("it runs").clone();
            let name = self.nodes[node].name.clone();
            let branches = found.branches().expect("it can be listed");
            for branch in &branches {
                let image = match found.open_branch_image(&branch.name, None, "sim") {
                    Ok(image) => image,
                    Err(error) => {
                        let from = branch.from.lsn;
                        let holds = |other: &Branch| {
                            (other.from.lsn..=other.to.lsn).contains(&from)
                                || other.cut >= branch.cut
                        };
                        let why = if error.to_string().contains("goes back behind the base") {
                            "branches that go back behind the base"
                        } else if from == Lsn::ZERO && found.positions().horizon > from {
                            // A whole image came to the copy that had nothing else.
                            "branches of all of a copy, behind an image"
                        } else if error.to_string().contains("the log was cut again before")
                            || found.positions().head < from
                            || branches.iter().any(|other| other.from.lsn < from && holds(other))
                        {
                            "branches of a history that was cut again"
                        } else {
                            panic!("{name}: group {group}: {branch:?}: {error}");
                        };
                        self.coverage.add(why, 1);
                        continue;
                    }
                };
                let bytes = contents(&*image as &dyn View).expect("a branch that was opened");
                let oracle = &self.groups[group].oracle;
                let held = oracle.read(&bytes).unwrap_or_else(|why| panic!("{name}: {why}"));
                oracle.places(&held).unwrap_or_else(|why| panic!("{name}: {branch:?}: {why}"));
                let _ = found.close_this_image(&image);
                self.coverage.add("branches shown", 1);
            }
        }
    }

    /// The writes whose bytes lie in a branch of a node.
    fn kept_in_branches(&self, node: usize, group: usize) -> BTreeSet<u64> {
        let disk = &self.nodes[node].disk;
        let all = group_dir(group).join("branches");
        let mut kept = BTreeSet::new();
        for branch in disk.list(&all).unwrap_or_default() {
            for name in disk.list(&all.join(&branch)).unwrap_or_default() {
                let path = all.join(&branch).join(&name);
                let Ok(file) = disk.open(&path, OpenMode::Read) else { continue };
                let mut bytes = vec![0; file.len().expect("it is open") as usize];
                file.read_at(&mut bytes, 0).expect("it is open");
                for at in (0..(bytes.len() + 1).saturating_sub(SECTOR)).step_by(4) {
                    if bytes[at..at + 3] == *b"SIM"
                        && let Some((id, _, _)) = read_stamp(&bytes[at..at + SECTOR])
                    {
                        kept.insert(id);
                    }
                }
            }
        }
        kept
    }
}
