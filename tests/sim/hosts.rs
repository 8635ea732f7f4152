//! Hosts: they write stamped sectors to whoever serves, several requests at a time, flush now and
//! then, and note what was sent and answered.

use std::time::Duration;

use tidelog::group::{ClientGuard, GroupError, Op, Request as Asked};

use super::event::Event;
use super::node::{contents, volume};
use super::oracle::{Request, SECTOR, SECTORS, VOLUMES, What, stamp};
use super::world::World;

/// Requests of a host that may wait for their answers.
const OUTSTANDING: usize = 6;

/// What status says where hosts wait for a peer.
pub const MUST_HOLD: &str = "must hold what they write";

/// A host of one group.
pub struct Host {
    pub group: usize,
    /// The node that it uses, and in which life.
    target: Option<(usize, u64)>,
    waiting: Vec<u64>,
    guard: Option<ClientGuard>,
    /// It changes its node without need once in so many turns.
    fickle: u64,
    pub stopped: bool,
}

impl Host {
    /// A host that uses nobody yet.
    pub fn new(group: usize, fickle: u64) -> Host {
        let (target, waiting, guard) = (None, Vec::new(), None);
        Host { group, target, waiting, guard, fickle, stopped: false }
    }

    /// Its connection to a node ends.
    pub fn leave(&mut self, node: usize) {
        if self.target.is_some_and(|(target, _)| target == node) {
            self.target = None;
            self.waiting.clear();
            self.guard = None;
        }
    }
}

impl World {
    /// A host that begins to act.
    pub fn add_host(&mut self, host: Host) {
        self.hosts.push(host);
        let host = self.hosts.len() - 1;
        self.schedule(Duration::from_millis(5), Event::Host { host });
    }

    pub fn host_acts(&mut self, host: usize) {
        let pause = Duration::from_millis(self.chance.of(&self.host_pauses));
        let pause = self.chance.up_to(pause);
        self.schedule(pause, Event::Host { host });
        if self.hosts[host].stopped {
            return;
        }
        self.choose_target(host);
        let Some((node, life)) = self.hosts[host].target else { return };
        let free = OUTSTANDING.saturating_sub(self.hosts[host].waiting.len());
        let count = (1 + self.chance.below(3) as usize).min(free);
        if count == 0 {
            return;
        }
        let batch: Vec<u64> = (0..count).map(|_| self.make_request(host)).collect();
        self.hosts[host].waiting.extend(&batch);
        let after = self.chance.up_to(Duration::from_micros(400));
        self.schedule(after, Event::Request { node, life, host, batch, tries: 0 });
    }

    fn choose_target(&mut self, host: usize) {
        let group = self.hosts[host].group;
        let usable = |world: &World, node: usize| {
            world.nodes[node].is_primary(group)
                && world.nodes[node].group(group).is_some_and(|it| it.held_back().is_none())
        };
        if let Some((node, life)) = self.hosts[host].target {
            let gone = self.nodes[node].life != life || !usable(self, node);
            if gone || self.chance.one_in(self.hosts[host].fickle) {
                self.hosts[host].leave(node);
            }
        }
        if self.hosts[host].target.is_none() {
            let members = self.groups[group].members.clone();
            let candidates: Vec<usize> =
                members.into_iter().filter(|node| usable(self, *node)).collect();
            if !candidates.is_empty() {
                let node = self.chance.of(&candidates);
                self.hosts[host].target = Some((node, self.nodes[node].life));
            }
        }
    }

    fn make_request(&mut self, host: usize) -> u64 {
        let what = match self.chance.below(12) {
            0 => What::Flush,
            1 => What::Zero,
            2 => What::Trim,
            _ => What::Write,
        };
        let longest = self.chance.of(&[1, 8, 8, 16, 48]);
        let align = self.chance.of(&[1, 8]);
        let sector = (self.chance.below(SECTORS as u64) as usize) / align * align;
        let count = (1 + self.chance.below(longest) as usize).min(SECTORS - sector);
        let count = if what == What::Flush { 0 } else { count };
        let volume = self.chance.below(VOLUMES as u64) as usize;
        let fua = what == What::Write && self.chance.one_in(10);
        let group = self.hosts[host].group;
        let sent = self.now();
        let request = Request { volume, sector, count, fua, sent, ..Request::new(what) };
        self.groups[group].oracle.send(request)
    }

    pub fn request_arrives(&mut self, node: usize, host: usize, batch: Vec<u64>, tries: u32) {
        let group = self.hosts[host].group;
        let life = self.nodes[node].life;
        if self.hosts[host].target != Some((node, life)) {
            return;
        }
        let Some(found) = self.nodes[node].group(group).cloned() else { return };
        let waits = found.waits_because().is_some() && found.held_back().is_none();
        // A peer that must hold what is written is waited for without a limit.
        let blocked = found.waits_because().is_some_and(|why| why.contains(MUST_HOLD));
        self.coverage.add("hosts blocked by a peer", u64::from(blocked));
        let insists = found.is_asking() && !found.awaits_answer() && !blocked;
        if (waits && !insists) || found.log_full().is_some() {
            if found.log_full().is_some() {
                self.coverage.add("writers wait for the folder", 1);
                self.fold(node, group, false);
            }
            // As a session that is held: the host waits.
            let again = Event::Request { node, life, host, batch, tries: tries + 1 };
            return self.schedule(Duration::from_millis(50), again);
        }
        if !self.nodes[node].is_primary(group) || found.held_back().is_some() {
            return self.hosts[host].leave(node);
        }
        let Some(line) = self.line_here(node, group) else { return };
        let results = self.append(node, group, &batch);
        self.say(format_args!(
            "{} appends {batch:?} to line {line} of group {group}: {}",
            self.nodes[node].name,
            if results.iter().all(Result::is_ok) { "well" } else { "with errors" }
        ));
        let mut done = Vec::new();
        let mut side = None;
        for (id, result) in batch.into_iter().zip(results) {
            let request = self.groups[group].oracle.request(id);
            let writes = request.what != What::Flush;
            let waits = request.fua || !writes;
            let power = self.nodes[node].disk.has_power();
            match result {
                Ok(lsn) => {
                    let oracle = &mut self.groups[group].oracle;
                    oracle.append(line, id);
                    let end = oracle.end_of(line);
                    let epoch = found.positions().epoch;
                    let now = self.now();
                    // A flush may be answered by a record of long ago.
                    if writes {
                        self.groups[group].appended.push((epoch, lsn, now));
                    }
                    let copy = self.nodes[node].copies.get_mut(&group).expect("it was there");
                    copy.sure = vec![end];
                    let answered = copy.answered.clone();
                    let told = (host as u64) << 48 | id;
                    let answer = Box::new(move |result: Result<(), GroupError>| {
                        let mut answered = answered.lock().expect("no holder panics");
                        answered.push((told, result.is_ok()));
                    });
                    if waits {
                        copy.group.when_durable(lsn, answer);
                        if !std::mem::replace(&mut copy.syncing, true) {
                            let after = self.chance.up_to(Duration::from_millis(2));
                            self.schedule(after, Event::Sync { node, group, life });
                        }
                    } else if copy.group.is_held(lsn) {
                        self.check_promise(node, group, id);
                        done.push((id, true));
                    } else {
                        self.coverage.add("writes wait for a peer", 1);
                        copy.group.when_held(lsn, answer);
                    }
                }
                Err(error) => {
                    // It may be in the log all the same, until something else is there.
                    let oracle = &mut self.groups[group].oracle;
                    let side = *side.get_or_insert_with(|| oracle.fork(node, line));
                    oracle.append(side, id);
                    let space = matches!(error, GroupError::NoSpace { .. });
                    self.coverage.add("writes refused for space", u64::from(space));
                    self.coverage.add("writes failed", u64::from(power && !space));
                    done.push((id, false));
                }
            }
        }
        if self.hosts[host].guard.is_none() && found.check_serving().is_ok() {
            self.hosts[host].guard = Some(found.client(volume(0)).expect("nothing restores"));
        }
        self.answer_later(host, node, done);
    }

    /// The line that a primary's next request goes to. A new reign, or a new life, begins one at
    /// what is here now; none where that cannot be read.
    pub fn line_here(&mut self, node: usize, group: usize) -> Option<usize> {
        let copy = &self.nodes[node].copies[&group];
        if copy.line.is_some() {
            return copy.line;
        }
        let (must, found) = (copy.sure.clone(), copy.group.clone());
        let places = self.verify(node, group, &must);
        if places.is_empty() {
            return None;
        }
        let bytes = contents(&*found).expect("it was read just now");
        let oracle = &mut self.groups[group].oracle;
        let held = oracle.read(&bytes).expect("it was read just now");
        let line = oracle.begin(node, places, held);
        self.nodes[node].copies.get_mut(&group).expect("it was there").line = Some(line);
        Some(line)
    }

    fn answer_later(&mut self, host: usize, node: usize, batch: Vec<(u64, bool)>) {
        if batch.is_empty() || !self.nodes[node].disk.has_power() {
            return;
        }
        let life = self.nodes[node].life;
        let after = self.chance.up_to(Duration::from_micros(400));
        self.schedule(after, Event::Answer { host, node, life, batch });
    }

    /// What was answered by the thread that syncs, or for what a peer holds.
    pub fn flushes_done(&mut self, node: usize, group: usize) {
        let Some(copy) = self.nodes[node].copies.get(&group) else { return };
        let answered = std::mem::take(&mut *copy.answered.lock().expect("no holder panics"));
        for (told, well) in answered {
            let (host, id) = ((told >> 48) as usize, told & 0xffff_ffff_ffff);
            if well {
                self.check_promise(node, group, id);
            }
            self.answer_later(host, node, vec![(id, well)]);
        }
    }

    fn append(
        &mut self,
        node: usize,
        group: usize,
        batch: &[u64],
    ) -> Vec<Result<tidelog::units::Lsn, GroupError>> {
        let oracle = &self.groups[group].oracle;
        let data: Vec<Vec<u8>> = batch
            .iter()
            .map(|id| {
                let request = oracle.request(*id);
                let sectors = if request.what == What::Write { request.count } else { 0 };
                let mut data = vec![0; sectors * SECTOR];
                for (index, sector) in data.chunks_exact_mut(SECTOR).enumerate() {
                    stamp(sector, *id, request.volume, request.sector + index);
                }
                data
            })
            .collect();
        let asked: Vec<Asked<'_>> = batch
            .iter()
            .zip(&data)
            .map(|(id, data)| {
                let request = oracle.request(*id);
                let offset = (request.sector * SECTOR) as u64;
                let length = (request.count * SECTOR) as u64;
                let op = match request.what {
                    What::Write => Op::Write { offset, data },
                    What::Zero => Op::Zero { offset, length, no_hole: false },
                    What::Trim => Op::Trim { offset, length },
                    What::Flush => Op::Flush,
                    What::Rewind => unreachable!("no host asks for it"),
                };
                Asked { volume: volume(request.volume), op, fua: request.fua }
            })
            .collect();
        self.coverage.add("requests", batch.len() as u64);
        self.nodes[node].copies[&group].group.append(&asked)
    }

    pub fn answer_arrives(&mut self, host: usize, from: (usize, u64), batch: &[(u64, bool)]) {
        let group = self.hosts[host].group;
        // An answer on a connection that has ended reaches nobody; now and then it was faster.
        if self.hosts[host].target != Some(from) && self.chance.one_in(2) {
            return;
        }
        for (id, well) in batch {
            self.hosts[host].waiting.retain(|waiting| waiting != id);
            if *well {
                self.groups[group].oracle.answer(*id);
                self.coverage.add("answers", 1);
            }
        }
    }
}
