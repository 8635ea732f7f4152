//! One appliance: its disk, its clock, its groups and the cores of its peers; how it starts, dies
//! and loses power.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tidelog::events::Events;
use tidelog::group::{
    DataState, Group, GroupContext, Image, LocalLimits, NodeIdentity, Read, Role, View,
};
use tidelog::io::{Clock, Disk, Entropy, Env, MemoryDisk, SeededEntropy};
use tidelog::replication::simulation::{Input, Job, PeerCore, Said, Settings, Taking};
use tidelog::units::{Chain, LogTime, Lsn, Name, NodeId, VolumeNumber};

use super::backups::Keeper;
use super::chance::SimClock;
use super::event::Event;
use super::oracle::{Held, Place, SECTOR, SECTORS, VOLUMES};
use super::world::World;

/// How a node ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// The process is gone, the page cache is not.
    Kill,
    /// The machine is gone, and what was not synced may be.
    Power,
}

/// A peer as one node sees it.
pub struct Link {
    pub core: PeerCore,
    /// When the next tick is due already.
    pub wake: Option<u64>,
}

/// An image that somebody holds open.
pub struct OpenImage {
    pub image: Arc<Image>,
    pub held: Held,
}

/// A state of a group on a node: where nothing was appended, and nothing on the disk was changed,
/// its image is what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    pub operations: u64,
    pub head: Lsn,
    pub chain: Chain,
}

/// Flushes and FUA writes that the engine has answered: request and whether it went well.
pub type Answered = Arc<Mutex<Vec<(u64, bool)>>>;

/// What a dead node still owes.
#[derive(Clone, Debug, Default)]
struct Promise {
    /// What the page cache held.
    cache: Vec<Place>,
    /// What survives a power failure.
    disk: Vec<Place>,
    /// What the page cache held when the power failed, on a node that took hosts' requests.
    before: Vec<Place>,
    /// What it held when a cut began that did not end.
    cutting: Vec<Place>,
}

/// A group on a node.
pub struct Copy {
    pub group: Arc<Group>,
    pub jobs: VecDeque<Job>,
    /// Whose image its thread stages.
    pub taking: Taking,
    pub working: bool,
    pub dirty: Arc<AtomicBool>,
    pub looking: bool,
    /// By peer: since when the log says that it asked for this copy.
    pub said: BTreeMap<usize, Said>,
    pub syncing: bool,
    /// What it takes from hosts, as primary.
    pub line: Option<usize>,
    /// The last state that is known to be in its cache.
    pub sure: Vec<Place>,
    /// The last state that is known to be on its disk.
    pub durable: Vec<Place>,
    /// A cut of its log failed: what it shows is in part on disk and in part in a branch, and the
    /// next start finishes it.
    pub half_cut: bool,
    /// When a cut of its log began last, by the world's time.
    pub cut_at: u64,
    /// What it held when a cut began that did not end.
    pub cutting: Vec<Place>,
    pub answered: Answered,
    pub images: Vec<OpenImage>,
    /// Where it was when it was retired first, if it is.
    pub retired_at: Option<Lsn>,
    /// What its image showed when it was last read, and when that was.
    pub seen: Option<(Moment, Held)>,
    pub fold_told: Option<String>,
    /// The last fold failed, and not for want of space: blocks may be torn until it is finished.
    pub fold_failed: bool,
    pub clock_noted: bool,
    pub written_back: Lsn,
}

impl Copy {
    /// Its log will be cut: what is cut off is kept, but not here.
    pub fn begin_cut(&mut self, now: u64) {
        self.cut_at = now;
        self.cutting.append(&mut self.sure);
        self.durable.clear();
        self.line = None;
    }

    /// A cut has ended, or failed on the way.
    pub fn end_cut(&mut self) {
        self.half_cut = self.group.data_state().0 == DataState::Failed;
        if !self.half_cut {
            self.cutting.clear();
        }
    }
}

/// One appliance.
pub struct Node {
    pub name: Name,
    pub id: NodeId,
    pub disk: MemoryDisk,
    pub clock: Arc<SimClock>,
    entropy: Arc<SeededEntropy>,
    pub events: Events,
    /// Codes and texts of events that the world has not seen yet.
    pub heard: Arc<Mutex<Vec<(String, String)>>>,
    pub up: bool,
    /// Until then its disk answers nothing, by the world's time.
    pub hung_until: u64,
    /// When it died last, by the world's time.
    pub died: u64,
    pub life: u64,
    pub incarnation: u64,
    pub links: BTreeMap<usize, Link>,
    pub copies: BTreeMap<usize, Copy>,
    /// Peers and groups: the peer had the copy here made, or taken up again.
    pub invited: BTreeSet<(usize, usize)>,
    /// Peers and groups: a command that runs here has asked the peer for its copy.
    pub inviting: BTreeSet<(usize, usize)>,
    /// Peers and groups whose replication is paused here; survives a restart.
    pub paused: BTreeSet<(usize, usize)>,
    /// What it means when the disk stops.
    pub death: Option<Death>,
    /// Faults were set that are no stop of the whole disk.
    pub disk_troubled: bool,
    /// What each group's image must hold after the next start.
    promises: BTreeMap<usize, Promise>,
    pub keeper: Keeper,
}

/// The directory of a group.
pub fn group_dir(group: usize) -> PathBuf {
    PathBuf::from(format!("/data/groups/{group}"))
}

/// The number of a volume.
pub fn volume(index: usize) -> VolumeNumber {
    VolumeNumber(index as u32 + 1)
}

/// The bytes of all volumes; zeros for those that do not exist yet.
pub fn contents(view: &dyn View) -> Result<[Vec<u8>; VOLUMES], String> {
    let known = view.volumes();
    let mut found = [vec![0; SECTORS * SECTOR], vec![0; SECTORS * SECTOR]];
    let mut reads: Vec<Read<'_>> = found
        .iter_mut()
        .enumerate()
        .filter(|(index, _)| known.iter().any(|known| known.number == volume(*index)))
        .map(|(index, buffer)| Read { volume: volume(index), offset: 0, buffer, result: Ok(()) })
        .collect();
    view.read(&mut reads);
    for read in reads {
        read.result.map_err(|error| error.to_string())?;
    }
    Ok(found)
}

fn remove_all(disk: &MemoryDisk, dir: &Path) {
    for name in disk.list(dir).expect("a directory") {
        let path = dir.join(name);
        if disk.remove(&path).is_err() {
            remove_all(disk, &path);
        }
    }
    disk.remove_dir(dir).expect("an empty directory");
}

impl Node {
    /// A node with an empty disk, that is not running.
    pub fn new(index: usize, clock: SimClock, entropy: u64) -> Node {
        let disk = MemoryDisk::new();
        disk.create_dir(Path::new("/data/groups")).expect("an empty disk");
        for made in ["/data", "/"] {
            disk.sync_dir(Path::new(made)).expect("an empty disk");
        }
        Node {
            name: ["a", "b", "c"][index].parse().expect("a name"),
            id: NodeId([index as u8 + 1; 16]),
            disk,
            clock: Arc::new(clock),
            entropy: Arc::new(SeededEntropy::new(entropy)),
            events: Events::in_memory(),
            heard: Arc::default(),
            up: false,
            hung_until: 0,
            died: 0,
            life: 0,
            incarnation: 0,
            links: BTreeMap::new(),
            copies: BTreeMap::new(),
            invited: BTreeSet::new(),
            inviting: BTreeSet::new(),
            paused: BTreeSet::new(),
            death: None,
            disk_troubled: false,
            promises: BTreeMap::new(),
            keeper: Keeper::default(),
        }
    }

    /// What its groups are made with.
    pub fn context(&self) -> GroupContext {
        let clock: Arc<dyn Clock> = self.clock.clone();
        let entropy: Arc<dyn Entropy> = self.entropy.clone();
        GroupContext {
            env: Env { disk: Arc::new(self.disk.clone()), clock, entropy },
            node: NodeIdentity { id: self.id, name: self.name.clone() },
            limits: LocalLimits::default(),
            failures: None,
            events: self.events.clone(),
        }
    }

    pub fn wall(&self) -> LogTime {
        self.clock.wall()
    }

    pub fn monotonic(&self) -> Duration {
        self.clock.monotonic()
    }

    /// A new life begins: new events, a new incarnation.
    pub fn begin_life(&mut self) {
        self.up = true;
        self.incarnation = self.entropy.next_u64();
        self.events = Events::in_memory();
        let heard = Arc::clone(&self.heard);
        heard.lock().expect("no holder panics").clear();
        self.events.follow(move |event| {
            let mut heard = heard.lock().expect("no holder panics");
            heard.push((event.code.clone(), event.text.clone()));
            true
        });
    }

    /// Takes a group into the running node.
    pub fn adopt(&mut self, group: usize, found: Arc<Group>) {
        let dirty = Arc::new(AtomicBool::new(true));
        let ring = Arc::clone(&dirty);
        found.subscribe(Box::new(move || {
            ring.store(true, Ordering::Relaxed);
            true
        }));
        let copy = Copy {
            group: found,
            jobs: VecDeque::new(),
            taking: Taking::default(),
            working: false,
            dirty,
            looking: false,
            said: BTreeMap::new(),
            syncing: false,
            line: None,
            sure: Vec::new(),
            durable: Vec::new(),
            half_cut: false,
            cut_at: 0,
            cutting: Vec::new(),
            answered: Arc::default(),
            images: Vec::new(),
            retired_at: None,
            seen: None,
            fold_told: None,
            fold_failed: false,
            clock_noted: false,
            written_back: Lsn::ZERO,
        };
        self.copies.insert(group, copy);
    }

    /// Deletes a group that is not open, and all that was promised of it.
    pub fn delete(&mut self, group: usize) {
        self.promises.remove(&group);
        let dir = group_dir(group);
        remove_all(&self.disk, &dir);
        self.disk.sync_dir(dir.parent().expect("not the root")).expect("a whole disk");
    }

    /// The group, if the node runs and has it.
    pub fn group(&self, group: usize) -> Option<&Arc<Group>> {
        self.copies.get(&group).map(|copy| &copy.group)
    }

    /// Whether hosts would find it as the one to use.
    pub fn is_primary(&self, group: usize) -> bool {
        self.up && self.group(group).is_some_and(|group| group.role() == Role::Primary)
    }

    /// Whether it serves hosts now.
    pub fn serves(&self, group: usize) -> bool {
        self.up && self.group(group).is_some_and(|group| group.check_serving().is_ok())
    }
}

impl World {
    /// The node's process starts: it recovers its groups, and is checked against what its last life
    /// had promised.
    pub fn start(&mut self, node: usize) {
        assert!(!self.nodes[node].up, "it runs already");
        self.nodes[node].begin_life();
        self.say(format_args!("{} starts", self.nodes[node].name));
        for group in 0..self.groups.len() {
            if !self.groups[group].members.contains(&node) {
                continue;
            }
            let opened = Group::open(self.nodes[node].context(), &group_dir(group));
            if !self.nodes[node].disk.has_power() {
                self.coverage.add("crashes in recovery", 1);
                self.strike(node);
                return;
            }
            match opened {
                Ok((found, recovery)) => {
                    if let Some((end, seen)) = recovery.cut {
                        self.coverage.add("unclean starts", 1);
                        // Records were there behind the end, whole or with a payload that is not
                        // (one without a whole header is not seen), and were cut off: a primary
                        // that stops at damage cuts nothing off.
                        let torn = seen > end && found.data_state().0 != DataState::Failed;
                        self.coverage.add("torn tails", u64::from(torn));
                    }
                    assert!(recovery.damaged.is_empty(), "a crash is no damage: {recovery:?}");
                    self.nodes[node].adopt(group, found);
                }
                Err(error) if self.nodes[node].disk_troubled => {
                    self.say(format_args!("{} cannot open: {error}", self.nodes[node].name));
                    self.die(node, Death::Kill);
                    return;
                }
                Err(error) => panic!("{}: a group opens: {error}", self.nodes[node].name),
            }
            self.check_start(node, group);
        }
        self.connect(node);
        for group in self.nodes[node].copies.keys().copied().collect::<Vec<_>>() {
            self.begin_rounds(node, group);
        }
    }

    /// Peers' cores, and the first looks at the groups.
    pub fn connect(&mut self, node: usize) {
        for peer in (0..self.nodes.len()).filter(|peer| *peer != node) {
            let other = &self.nodes[peer];
            let settings = Settings { window_bytes: self.window_bytes, ..Settings::default() };
            let (name, id) = (other.name.clone(), other.id);
            let this = &mut self.nodes[node];
            let core = PeerCore::new(this.monotonic(), this.id, id, name, settings);
            this.links.insert(peer, Link { core, wake: None });
        }
        // As the service does it: no connection before the cores know the groups.
        for group in self.nodes[node].copies.keys().copied().collect::<Vec<_>>() {
            self.look(node, group);
        }
        for (peer, group) in self.nodes[node].paused.clone() {
            let group = self.groups[group].id;
            self.feed(node, peer, Input::Pause { group, paused: true });
        }
        for peer in self.nodes[node].links.keys().copied().collect::<Vec<_>>() {
            self.feed(node, peer, Input::CanDial(true));
        }
    }

    /// The rounds of a group's threads, from now on.
    pub fn begin_rounds(&mut self, node: usize, group: usize) {
        let life = self.nodes[node].life;
        for (event, most) in [
            (Event::Mark { node, group, life }, 1000),
            (Event::Fold { node, group, life }, 5000),
            (Event::Prepare { node, group, life }, 1000),
        ] {
            let after = self.chance.up_to(Duration::from_millis(most));
            self.schedule(after, event);
        }
    }

    /// What the last life had promised is there, and where something is missing an event says so.
    fn check_start(&mut self, node: usize, group: usize) {
        let Promise { cache, before, .. } =
            self.nodes[node].promises.remove(&group).unwrap_or_default();
        let heard = self.nodes[node].heard.lock().expect("no holder panics");
        let half_folded = heard.iter().any(|(code, _)| code == "fold-failed");
        drop(heard);
        let copy = self.nodes[node].copies.get_mut(&group).expect("it was opened");
        copy.fold_failed = half_folded;
        let places = self.verify(node, group, &cache);
        let copy = self.nodes[node].copies.get_mut(&group).expect("it was opened");
        // What recovery trusts it has made durable.
        (copy.sure, copy.durable) = (places.clone(), places.clone());
        let lacks = !places.is_empty()
            && !before.is_empty()
            && self.groups[group].oracle.holding(&places, &before).is_empty();
        if lacks {
            let heard = self.nodes[node].heard.lock().expect("no holder panics");
            let told = heard.iter().any(|(code, _)| code == "unclean-start");
            drop(heard);
            self.coverage.add("losses told", 1);
            assert!(told, "{}: lost {before:?}, has {places:?}, no event", self.nodes[node].name);
        }
    }

    /// The disk has stopped: the node is dead, as was drawn when the stop was set.
    pub fn strike(&mut self, node: usize) {
        let death = self.nodes[node].death.take().unwrap_or(Death::Kill);
        self.coverage.add("deaths inside an operation", 1);
        self.end_life(node, death);
    }

    /// The node dies between two operations.
    pub fn die(&mut self, node: usize, death: Death) {
        if death == Death::Kill {
            for group in self.nodes[node].copies.keys().copied().collect::<Vec<_>>() {
                self.note_sure(node, group);
            }
        }
        self.end_life(node, death);
    }

    fn end_life(&mut self, node: usize, death: Death) {
        self.say(format_args!("{} dies: {death:?}", self.nodes[node].name));
        self.coverage.add(if death == Death::Kill { "kills" } else { "power losses" }, 1);
        let copies = std::mem::take(&mut self.nodes[node].copies);
        self.nodes[node].inviting.clear();
        for (group, copy) in copies {
            copy.group.forget_images();
            let oracle = &self.groups[group].oracle;
            let flushed = match copy.sure[..] {
                // On a node that takes hosts' requests: elsewhere it is another disk that has them.
                [sure] if copy.line.is_some() => oracle.flushed(node, sure),
                _ => None,
            };
            // What hosts were told is durable counts more than what the disk was seen to take.
            let disk = match flushed {
                Some(flushed) if oracle.holding(&copy.durable, &[flushed]).is_empty() => {
                    vec![flushed]
                }
                _ => copy.durable,
            };
            let before = if copy.line.is_some() { copy.sure.clone() } else { Vec::new() };
            let promise = Promise { cache: copy.sure, disk, before, cutting: copy.cutting };
            self.nodes[node].promises.insert(group, promise);
            for host in self.hosts.iter_mut().filter(|host| host.group == group) {
                host.leave(node);
            }
        }
        for (group, promise) in &mut self.nodes[node].promises {
            if death == Death::Power {
                // Also where a cut was under way, of which nothing is promised.
                for lost in promise.cache.iter().chain(&promise.cutting) {
                    self.groups[*group].oracle.excuse(node, *lost);
                }
                promise.cache = promise.disk.clone();
            } else {
                promise.before.clear();
            }
        }
        self.drop_connections(node, death == Death::Kill);
        let seed = self.chance.next();
        let this = &mut self.nodes[node];
        this.up = false;
        this.died = this.clock.world();
        this.hung_until = 0;
        this.life += 1;
        this.links.clear();
        this.keeper.forget();
        this.death = None;
        match death {
            Death::Kill => this.disk.clear_faults(),
            Death::Power => {
                this.disk = this.disk.crash(seed);
                this.clock.reboot();
            }
        }
    }
}
