//! The backups of each group: a slot every minute, the pure scheduler and its run on each node,
//! and a repository of small objects that a node may lose sight of.
//!
//! The slots, the decision, the way through a slot and the claims are the library's; what its
//! threads do around them is a tick of each node every second here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tidelog::backup::{
    Claim, Facts, JobSettings, MemoryObjects, Next, NodeFacts, Observation, Outcome, PeerPhase,
    Placement, Reason, Reigns, ReplicationFacts, Schedule, SlotResult, SlotRun, SlotStore, Watch,
    counterpart, others,
};
use tidelog::group::{DataState, Group, Image, Point, Role};
use tidelog::replication::ReplicationState;
use tidelog::units::{EpochId, LogTime, Name, Span};

use super::alarms::Basis;
use super::event::Event;
use super::node::contents;
use super::oracle::Held;
use super::reach::Reach;
use super::world::World;

/// Between two slots.
pub const SLOT_EVERY: Duration = Duration::from_secs(60);

const TERM: Span = Span::from_secs(6);

/// A backup that is being made.
struct Making {
    number: u32,
    counter: u64,
    run: EpochId,
    started: Duration,
    renewed: Duration,
    takes: Duration,
    image: Arc<Image>,
    held: Held,
}

/// A slot that is open on a node.
struct Open {
    run: SlotRun,
    store: SlotStore,
    phase: PeerPhase,
    /// The claim that was decided on, and is not made yet.
    claiming: Option<u32>,
    making: Option<Making>,
}

/// What a node knows of backups.
#[derive(Default)]
pub struct Keeper {
    /// Up to where each group's slots were dealt with; kept on disk.
    handled: BTreeMap<usize, LogTime>,
    open: BTreeMap<(usize, LogTime), Open>,
    /// Between these the schedule has nothing new for a group.
    quiet: BTreeMap<usize, (LogTime, LogTime)>,
    /// By group: what it still wants to know of a slot whose time is over.
    pub watches: BTreeMap<usize, Watch>,
    /// By group: a slot without a backup, and how it is raised.
    pub alarms: BTreeMap<usize, (LogTime, &'static str)>,
    /// By group: what must be raised depends on this, and since when it is so.
    pub basis: BTreeMap<usize, (Basis, Duration)>,
}

impl Keeper {
    /// The process ended: what was open is gone.
    pub fn forget(&mut self) {
        let handled = std::mem::take(&mut self.handled);
        *self = Keeper { handled, ..Keeper::default() };
    }

    /// A backup of a slot has been made.
    fn made(&mut self, found: &Group, group: usize, slot: LogTime, result: Option<&SlotResult>) {
        let watch = self.watches.entry(group).or_default();
        if watch.made(slot, result, &Reigns::of(found, slot))
            && self.alarms.get(&group).is_some_and(|(of, _)| *of <= slot)
        {
            self.alarms.remove(&group);
        }
    }
}

/// The backups of the world.
pub struct Backups {
    reaches: Vec<Arc<Reach>>,
    pub schedule: Schedule,
    pub settings: JobSettings,
    pub since: LogTime,
    /// No run takes longer than it may.
    calm: bool,
    /// The backups that were made of a slot: one of each branch at most.
    pub done: BTreeMap<(usize, LogTime), Vec<SlotResult>>,
}

impl Backups {
    /// Whether a node sees the repository.
    pub fn is_in_sight(&self, node: usize) -> bool {
        self.reaches[node].is_in_sight()
    }
}

impl World {
    /// Each group gets a job that is due every minute.
    pub fn begin_backups(&mut self) {
        let objects = Arc::new(MemoryObjects::new());
        let reach = |_| Arc::new(Reach::new(Arc::clone(&objects)));
        let placement = self.chance.of(&[
            Placement::PreferSecondary,
            Placement::PreferSecondary,
            Placement::PreferPrimary,
            Placement::Any,
        ]);
        let settings = JobSettings {
            placement,
            deadline: Span::from_secs(20),
            run_limit: Span::from_secs(15),
            grace: Span::from_secs(5),
            // A copy that is old is backed up late, also beside a primary that is not heard.
            allow_stale: placement == Placement::Any,
            ..JobSettings::default()
        };
        self.backups = Some(Backups {
            reaches: (0..self.nodes.len()).map(reach).collect(),
            schedule: Schedule::parse("* * * * *", None).expect("a schedule"),
            settings,
            since: self.nodes[0].wall(),
            calm: false,
            done: BTreeMap::new(),
        });
        for node in 0..self.nodes.len() {
            self.schedule(Duration::from_millis(900), Event::Backup { node });
        }
    }

    fn node_named(&self, name: &Name) -> usize {
        self.nodes.iter().position(|node| node.name == *name).expect("a node of this world")
    }

    /// The nodes of a group that a node can ask of its slots.
    pub fn asked_by(&self, node: usize, group: usize) -> Vec<usize> {
        let Some(found) = self.nodes[node].group(group) else { return Vec::new() };
        let names = others(&found.control(), self.nodes[node].id);
        names.iter().map(|name| self.node_named(name)).collect()
    }

    /// With whom a node shares the slots of a group.
    fn counterpart(&self, node: usize, group: usize) -> Option<usize> {
        let found = self.nodes[node].group(group)?;
        let against = |name: &Name| {
            let core = &self.nodes[node].links[&self.node_named(name)].core;
            (core.link_down().is_some(), !self.is_healthy(node, self.node_named(name), group))
        };
        let other = counterpart(&found.control(), self.nodes[node].id, found.role(), against);
        other.map(|name| self.node_named(&name))
    }

    fn is_healthy(&self, node: usize, peer: usize, group: usize) -> bool {
        let channel = self.nodes[node].links[&peer].core.channel(self.groups[group].id);
        let state = channel.map(|channel| channel.state().0);
        matches!(state, Some(ReplicationState::Streaming | ReplicationState::CatchingUp))
    }

    /// How many results of a slot are of the history that a node holds, as far as it can tell.
    pub fn counts(
        &self,
        node: usize,
        group: usize,
        slot: LogTime,
        results: &[SlotResult],
    ) -> usize {
        let Some(found) = self.nodes[node].group(group) else { return 0 };
        let reigns = Reigns::of(found, slot);
        results.iter().filter(|result| reigns.counts(result)).count()
    }

    /// The results of a slot in the repository, of all branches, as a node sees it.
    pub fn results(
        &self,
        node: usize,
        group: usize,
        slot: LogTime,
    ) -> Result<Vec<SlotResult>, String> {
        let backups = self.backups.as_ref().ok_or("no backups are made")?;
        let store = SlotStore::new(backups.reaches[node].clone(), Self::job(group), slot);
        store.results().map_err(|error| error.to_string())
    }

    fn job(group: usize) -> EpochId {
        EpochId(group as u64 + 1)
    }

    /// The repository comes into a node's sight, or leaves it.
    pub fn toggle_repository(&mut self, node: usize) {
        let Some(backups) = &self.backups else { return };
        let within = !backups.is_in_sight(node);
        self.set_repository(node, within);
    }

    fn set_repository(&mut self, node: usize, within: bool) {
        let Some(backups) = &self.backups else { return };
        backups.reaches[node].set_in_sight(within);
        self.coverage.add("repository out of reach", u64::from(!within));
        self.say(format_args!("{} has the repository: {within}", self.nodes[node].name));
    }

    /// One second of a node's scheduler.
    pub fn backup_tick(&mut self, node: usize) {
        self.schedule(Duration::from_secs(1), Event::Backup { node });
        if !self.nodes[node].up {
            return;
        }
        for group in self.nodes[node].copies.keys().copied().collect::<Vec<_>>() {
            self.open_slots(node, group);
            self.look_for_overdue(node, group);
            self.check_alarms(node, group);
        }
        let open: Vec<_> = self.nodes[node].keeper.open.keys().copied().collect();
        for (group, slot) in open {
            let Some(mut open) = self.nodes[node].keeper.open.remove(&(group, slot)) else {
                continue;
            };
            if open.making.is_some() {
                self.go_on_making(node, group, slot, &mut open);
            } else if matches!(open.phase, PeerPhase::Deciding) {
                self.go_on_deciding(node, group, slot, &mut open);
            }
            if self.nodes[node].disk.has_power() {
                self.nodes[node].keeper.open.insert((group, slot), open);
            }
        }
    }

    fn open_slots(&mut self, node: usize, group: usize) {
        let Some(backups) = &self.backups else { return };
        let (wall, monotonic) = (self.nodes[node].wall(), self.nodes[node].monotonic());
        let quiet = self.nodes[node].keeper.quiet.get(&group);
        if quiet.is_some_and(|(from, to)| (*from..*to).contains(&wall)) {
            return;
        }
        let handled = self.nodes[node].keeper.handled.get(&group).copied();
        let deadline = backups.settings.deadline.0;
        let due = backups.schedule.due(backups.since, handled, wall, deadline);
        let this = self.nodes[node].name.clone();
        let keeper = &mut self.nodes[node].keeper;
        if let Some(next) = due.next {
            keeper.quiet.insert(group, (wall, next));
        }
        for slot in due.missed {
            if !keeper.open.contains_key(&(group, slot)) {
                keeper.handled.insert(group, slot);
                self.coverage.add("slots missed", 1);
            }
        }
        let Some(slot) = due.open else { return };
        if keeper.open.contains_key(&(group, slot)) {
            return;
        }
        let deadline_at = monotonic + slot.after(deadline).since(wall);
        let run = SlotRun::new(this, backups.settings.clone(), deadline_at).patient();
        let objects = backups.reaches[node].clone();
        let store = SlotStore::new(objects, Self::job(group), slot);
        let phase = PeerPhase::Deciding;
        let open = Open { run, store, phase, claiming: None, making: None };
        // Slots of the job that only wait are decided now.
        for ((other, _), waiting) in &mut keeper.open {
            if *other == group && matches!(waiting.phase, PeerPhase::Deciding) {
                waiting.run.next_is_due(slot);
            }
        }
        keeper.open.insert((group, slot), open);
        self.coverage.add("slots opened", 1);
    }

    fn node_facts(&self, node: usize, group: usize) -> NodeFacts {
        let mut facts = NodeFacts::unknown(self.nodes[node].name.clone());
        facts.cpu_percent = Some(5.0);
        facts.memory_free_bytes = Some(8 << 30);
        (facts.storage_free_bytes, facts.storage_total_bytes) = (Some(50 << 30), Some(100 << 30));
        let backups = self.backups.as_ref().expect("backups are made");
        facts.repository = Some(backups.is_in_sight(node));
        if let Some(found) = self.nodes[node].group(group) {
            let problem = |code: &str, text: String| Reason { code: code.to_owned(), text };
            let (state, why, _) = found.data_state();
            if matches!(state, DataState::Failed | DataState::None) {
                facts.problems.push(problem("data-failed", why.unwrap_or_default()));
            }
            if let Some(why) = found.held_back() {
                facts.problems.push(problem("held-back", why));
            }
        }
        facts
    }

    /// What a node sees of a slot, and what its peer says.
    fn facts(&self, node: usize, group: usize, slot: LogTime) -> (Facts, Option<PeerPhase>) {
        let name = |text: &str| text.parse::<Name>().expect("a name");
        let found = self.nodes[node].group(group).expect("it runs");
        let (role, here) = (found.role(), self.node_facts(node, group));
        let peer = self.counterpart(node, group);
        let (mut there, mut phase) = (here.clone(), None);
        let (mut healthy, mut link_lost) = (true, None);
        if let Some(peer) = peer {
            let now = self.nodes[node].monotonic();
            let lost = self.nodes[node].links[&peer].core.link_down();
            link_lost = lost.map(|(since, _)| Span(now.saturating_sub(since)));
            healthy = self.is_healthy(node, peer, group);
            there = NodeFacts::unknown(self.nodes[peer].name.clone());
            if self.hears(node, peer) {
                there = self.node_facts(peer, group);
                let open = self.nodes[peer].keeper.open.get(&(group, slot));
                phase = Some(open.map_or(PeerPhase::Unknown, |open| open.phase.clone()));
                // What the peer has made may be of another branch.
                let seen = self.results(peer, group, slot);
                if phase == Some(PeerPhase::Done)
                    && seen.is_ok_and(|seen| self.counts(node, group, slot, &seen) == 0)
                {
                    phase = Some(PeerPhase::Unknown);
                }
            }
        }
        let lag = if healthy { Some(Span::from_secs(1)) } else { link_lost };
        let (primary, secondary) = match role {
            Role::Primary => (here, there),
            Role::Secondary => (there, here),
        };
        let facts = Facts {
            group: name("g"),
            job: name("minutely"),
            slot: Some(slot),
            role,
            replicated: peer.is_some(),
            retired: found.data_state().0 == DataState::Retired,
            replication: ReplicationFacts {
                healthy,
                reasons: Vec::new(),
                lag,
                link_lost,
                age: Span::default(),
            },
            primary,
            secondary,
            active: Role::Primary,
            deadline_passed: false,
            next_due: None,
            done_by: None,
            running_on: None,
            given_up: Vec::new(),
            assumed: Default::default(),
        };
        (facts, phase)
    }

    fn go_on_deciding(&mut self, node: usize, group: usize, slot: LogTime, open: &mut Open) {
        let Some(found) = self.nodes[node].group(group).cloned() else { return };
        // The job is in the log, with the members.
        if found.awaits_answer() || found.control().members.is_empty() {
            return;
        }
        if let Some(number) = open.claiming.take() {
            return self.begin_making(node, group, slot, open, number);
        }
        let (facts, peer) = self.facts(node, group, slot);
        let now = self.nodes[node].monotonic();
        let view = open.store.look(now, || Reigns::of(&found, slot));
        let view = view.map_err(|error| error.to_string());
        let number = view.as_ref().map_or(0, |view| view.number);
        let seen = view.as_ref().ok().and_then(|view| view.result.clone());
        match open.run.step(Observation { now, facts, view, peer }) {
            Next::Wait(_) => {}
            Next::End(outcome, _) => {
                let what = match outcome {
                    Outcome::Delegated => "backups delegated",
                    Outcome::Failed => "backups failed",
                    _ => "backups skipped",
                };
                self.coverage.add(what, 1);
                if outcome == Outcome::Delegated {
                    self.nodes[node].keeper.made(&found, group, slot, seen.as_ref());
                    let three = self.groups[group].members.len() > 2;
                    self.coverage.add("backups delegated to one of two", u64::from(three));
                }
                let why = format!("{outcome:?}");
                open.phase = PeerPhase::Ended { outcome, why };
                self.nodes[node].keeper.handled.insert(group, slot);
            }
            Next::Run(_) => {
                let retired = found.data_state().0 == DataState::Retired;
                assert!(!retired, "{}: a retired copy is backed up", self.nodes[node].name);
                // Another node may decide the same meanwhile.
                match self.chance.one_in(2) {
                    true => open.claiming = Some(number + 1),
                    false => self.begin_making(node, group, slot, open, number + 1),
                }
            }
        }
    }

    fn begin_making(
        &mut self,
        node: usize,
        group: usize,
        slot: LogTime,
        open: &mut Open,
        number: u32,
    ) {
        let Some(found) = self.nodes[node].group(group).cloned() else { return };
        let run = EpochId(self.chance.next());
        let node_name = self.nodes[node].name.clone();
        let claim = Claim { node: node_name, run, term: TERM };
        match open.store.claim(number, &claim) {
            Ok(true) => {}
            Ok(false) => return self.coverage.add("claims lost", 1),
            Err(error) => return open.run.failed_here(format!("claim: {error}")),
        }
        self.coverage.add("claims taken over", u64::from(number > 1));
        if found.role() == Role::Primary {
            let _ = found.sync_now();
        }
        let point = Point::Lsn(found.positions().committed);
        let image = found.open_image(&point, None, "backup", None);
        let bytes = image.as_ref().map(|image| contents(&**image));
        let (Ok(image), Ok(Ok(bytes))) = (&image, &bytes) else {
            let _ = open.store.end(number, "no image");
            return open.run.failed_here("no image");
        };
        let oracle = &self.groups[group].oracle;
        let held = oracle.read(bytes).unwrap_or_else(|why| panic!("backup: {why}"));
        oracle.places(&held).unwrap_or_else(|why| panic!("backup: {why}"));
        // Too long for its limit, where not all is to be well.
        let longest = if self.backups.as_ref().is_some_and(|it| it.calm) { 8 } else { 40 };
        let takes = Duration::from_secs(self.chance.of(&[1, 3, 8, longest]));
        self.say(format_args!(
            "{} makes the backup of group {group} for {slot}, claim {number}",
            self.nodes[node].name,
        ));
        let now = self.nodes[node].monotonic();
        open.phase = PeerPhase::Running;
        open.making = Some(Making {
            number,
            counter: 0,
            run,
            started: now,
            renewed: now,
            takes,
            image: Arc::clone(image),
            held,
        });
    }

    fn go_on_making(&mut self, node: usize, group: usize, slot: LogTime, open: &mut Open) {
        let Some(found) = self.nodes[node].group(group).cloned() else { return };
        let Some(mut making) = open.making.take() else { return };
        let now = self.nodes[node].monotonic();
        let limit = self.backups.as_ref().expect("backups are made").settings.run_limit.0;
        let spent = now.saturating_sub(making.started);
        let failure = if spent >= limit {
            Some("the run is over its limit".to_owned())
        } else {
            making.image.broken()
        };
        if let Some(why) = failure {
            self.coverage.add("backup runs failed", 1);
            let _ = open.store.end(making.number, &why);
            let _ = found.close_this_image(&making.image);
            open.run.failed_here(why);
            open.phase = PeerPhase::Deciding;
            return;
        }
        if now.saturating_sub(making.renewed) >= Duration::from_secs(1) {
            making.counter += 1;
            making.renewed = now;
            let _ = open.store.renew(making.number, making.counter);
        }
        if spent < making.takes {
            open.making = Some(making);
            return;
        }
        let at = making.image.position();
        if let Ok(bytes) = contents(&*making.image) {
            let held = self.groups[group].oracle.read(&bytes).expect("an image");
            assert!(held == making.held, "a backup's image changed while it was made");
        }
        let _ = found.close_this_image(&making.image);
        let reigns = Reigns::of(&found, slot);
        if !found.is_in_history(at) || reigns.why_not(at.epoch, at.lsn, false).is_some() {
            self.coverage.add("backups of a branch", 1);
            let _ = open.store.end(making.number, "its image is on a branch");
            open.run.failed_here("its image is on a branch");
            open.phase = PeerPhase::Deciding;
            return;
        }
        let result = SlotResult {
            node: self.nodes[node].name.clone(),
            role: found.role(),
            run: making.run,
            id: format!("{:?}", making.run),
            epoch: at.epoch,
            lsn: at.lsn,
            time: at.time,
            ended: self.nodes[node].wall(),
            bytes_read: 0,
            bytes_added: 0,
            duration_seconds: spent.as_secs_f64(),
            checksums: Vec::new(),
            stale: false,
            reasons_at_end: Vec::new(),
        };
        match open.store.finish(&result, || Reigns::of(&found, slot)) {
            Ok(None) => {
                let backups = self.backups.as_mut().expect("backups are made");
                let done = backups.done.entry((group, slot)).or_default();
                done.push(result.clone());
                let (all, done) = (done.len() as u64, done.clone());
                let count = self.counts(node, group, slot, &done);
                assert_eq!(count, 1, "group {group}: backups of slot {slot} on one branch");
                self.coverage.add("backups of two branches", all - 1);
                self.coverage.add("backups done", 1);
                let three = self.groups[group].members.len() > 2;
                self.coverage.add("backups done of groups of three", u64::from(three));
                self.coverage.add("backups taken over", u64::from(making.number > 1));
                self.say(format_args!("{} has made {slot}", self.nodes[node].name));
                open.phase = PeerPhase::Done;
                self.nodes[node].keeper.made(&found, group, slot, Some(&result));
                self.nodes[node].keeper.handled.insert(group, slot);
            }
            Ok(Some(_)) => {
                self.coverage.add("backups superseded", 1);
                let outcome = Outcome::Superseded;
                open.phase = PeerPhase::Ended { outcome, why: "superseded".to_owned() };
                self.nodes[node].keeper.handled.insert(group, slot);
            }
            Err(error) => {
                let _ = open.store.end(making.number, "result");
                open.run.failed_here(format!("result: {error}"));
                open.phase = PeerPhase::Deciding;
            }
        }
    }

    /// All is well: the next slot that a node has not dealt with gets exactly one backup.
    pub fn check_backups(&mut self, calm: &[usize]) {
        for node in 0..self.nodes.len() {
            self.set_repository(node, true);
        }
        let Some(backups) = &mut self.backups else { return };
        backups.calm = true;
        let Some(backups) = &self.backups else { return };
        let next = |world: &World, group: usize| {
            let first = world.groups[group].members.iter().map(|node| world.nodes[*node].wall());
            backups.schedule.next(first.max()?)
        };
        let wanted: Vec<(usize, LogTime)> = calm
            .iter()
            .filter_map(|group| Some((*group, next(self, *group)?)))
            // With clocks that were set back it may lie before the job was made.
            .filter(|(_, slot)| *slot > backups.since)
            .filter(|(group, slot)| {
                let open = |node: &usize| {
                    let handled = self.nodes[*node].keeper.handled.get(group);
                    handled.is_none_or(|handled| handled < slot)
                };
                // Clocks that were set leave slots that one node has dealt with and another not.
                let walls = self.groups[*group].members.iter().map(|node| self.nodes[*node].wall());
                let walls: Vec<LogTime> = walls.collect();
                self.groups[*group].members.iter().all(open)
                    && walls.iter().all(|wall| *wall == walls[0])
            })
            .collect();
        // The slot comes within a minute, and each node has its chance.
        self.run(Duration::from_secs(60 + 20 + 2 * 15 + 20));
        for (group, slot) in wanted {
            let three = self.groups[group].members.len() > 2;
            let backups = self.backups.as_ref().expect("backups are made");
            let done = backups.done.get(&(group, slot)).cloned().unwrap_or_default();
            assert_eq!(done.len(), 1, "group {group}: slot {slot} is to have one backup: {done:?}");
            self.coverage.add("slots proved", 1);
            self.coverage.add("slots proved of groups of three", u64::from(three));
        }
    }
}
