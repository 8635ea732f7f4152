//! A node with one group on a disk in memory, what the group was told, and what must hold of what
//! it shows when it is opened again.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tidelog::events::Events;
use tidelog::group::{
    DataState, Group, GroupContext, GroupError, LocalLimits, NewGroup, NodeIdentity, Op, Point,
    Read, Recovery, Request, View,
};
use tidelog::io::{Clock, Disk, Entropy, Env, ManualClock, MemoryDisk, SeededEntropy};
use tidelog::log::control::{Control, PolicyRecord};
use tidelog::units::{GroupId, LogTime, Lsn, NodeId, Span, VolumeNumber};

pub(super) const DIR: &str = "/data/groups/g";
const SEGMENT: u64 = 64 << 10;
const VOLUME_BYTES: usize = 64 << 10;

/// One step of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A block of the first volume, always the same one.
    Block,
    /// A sector of the second volume.
    Sector,
    /// Ten blocks of the first volume: three records, most of a segment.
    Large,
    /// Part of the first volume reads as zeros.
    Trim,
    /// A host's flush.
    Flush,
    /// A fold of all that may be folded.
    Fold,
    /// A request of any place and length, from a seed.
    Any(u64),
    /// The group goes back to an earlier moment, where the log has one.
    Back,
    /// The daemon is stopped in order and started again.
    Restart,
}

use Step::*;

/// Both volumes, as bytes.
pub(super) type Contents = [Vec<u8>; 2];

/// What the model knows of one request: where it ended, and what the volumes were then.
#[derive(Clone)]
pub(super) struct Moment {
    pub end: Lsn,
    pub contents: Contents,
}

/// A node with one group, and what the group has been told.
pub(super) struct Bench {
    pub disk: MemoryDisk,
    clock: Arc<ManualClock>,
    entropy: Arc<SeededEntropy>,
    pub events: Events,
    pub group: Option<Arc<Group>>,
    /// Each state that was answered, the first one being what was there before.
    pub moments: Vec<Moment>,
    /// The index of the last moment that was flushed.
    pub flushed: usize,
    /// Grows with every write, so that no two write the same.
    version: u64,
}

fn volume(index: usize) -> VolumeNumber {
    VolumeNumber(index as u32 + 1)
}

/// Bytes that no other write has.
fn fill(version: u64, bytes: usize) -> Vec<u8> {
    let mut data: Vec<u8> =
        (0..bytes / 8).flat_map(|place| (version << 20 | place as u64).to_le_bytes()).collect();
    data.resize(bytes, version as u8);
    data
}

pub(super) fn contents(view: &dyn View) -> Result<Contents, GroupError> {
    let mut found = [vec![0xee; VOLUME_BYTES], vec![0xee; VOLUME_BYTES]];
    let [first, second] = &mut found;
    let mut reads = [
        Read { volume: volume(0), offset: 0, buffer: first, result: Ok(()) },
        Read { volume: volume(1), offset: 0, buffer: second, result: Ok(()) },
    ];
    view.read(&mut reads);
    let [first, second] = reads;
    first.result.and(second.result)?;
    Ok(found)
}

impl Bench {
    pub(super) fn new() -> Bench {
        let disk = MemoryDisk::new();
        disk.create_dir(Path::new(DIR)).unwrap();
        for made in ["/data/groups", "/data", "/"] {
            disk.sync_dir(Path::new(made)).unwrap();
        }
        let mut bench = Bench {
            disk,
            clock: Arc::new(ManualClock::new(LogTime(1_700_000_000_000_000_000))),
            entropy: Arc::new(SeededEntropy::new(1)),
            events: Events::in_memory(),
            group: None,
            moments: Vec::new(),
            flushed: 0,
            version: 1,
        };
        let new =
            NewGroup { id: GroupId([7; 16]), name: "g".parse().unwrap(), segment_bytes: SEGMENT };
        let group = Group::create(bench.context(), Path::new(DIR), new).unwrap();
        for name in ["a", "b"] {
            group.create_volume(name.parse().unwrap(), VOLUME_BYTES as u64).unwrap();
        }
        let policy = PolicyRecord { window: Span::from_secs(0), ..PolicyRecord::default() };
        group.append_control(Control::Policy(policy)).unwrap();
        let end = group.positions().head;
        let contents = [vec![0; VOLUME_BYTES], vec![0; VOLUME_BYTES]];
        bench.moments.push(Moment { end, contents });
        bench.group = Some(group);
        bench
    }

    pub(super) fn context(&self) -> GroupContext {
        let clock: Arc<dyn Clock> = self.clock.clone();
        let entropy: Arc<dyn Entropy> = self.entropy.clone();
        GroupContext {
            env: Env { disk: Arc::new(self.disk.clone()), clock, entropy },
            node: NodeIdentity { id: NodeId([3; 16]), name: "n".parse().unwrap() },
            limits: LocalLimits::default(),
            failures: None,
            events: self.events.clone(),
        }
    }

    /// The same node on another disk, before its group is opened.
    pub(super) fn on(&self, disk: MemoryDisk) -> Bench {
        Bench {
            disk,
            clock: Arc::new(ManualClock::new(self.clock.wall())),
            entropy: Arc::new(SeededEntropy::new(self.entropy.next_u64())),
            events: Events::in_memory(),
            group: None,
            moments: self.moments.clone(),
            flushed: self.flushed,
            version: self.version + 1000,
        }
    }

    pub(super) fn group(&self) -> &Arc<Group> {
        self.group.as_ref().expect("it is open")
    }

    pub(super) fn now(&self) -> &Contents {
        &self.moments.last().expect("there is a first one").contents
    }

    /// One request, to the group and to the model.
    fn request(&mut self, index: usize, op: Op<'_>) -> Result<(), GroupError> {
        let mut after = self.now().clone();
        match op {
            Op::Write { offset, data } => {
                after[index][offset as usize..][..data.len()].copy_from_slice(data);
            }
            Op::Zero { offset, length, .. } | Op::Trim { offset, length } => {
                after[index][offset as usize..][..length as usize].fill(0);
            }
            Op::Flush => {}
        }
        let request = Request { volume: volume(index), op, fua: false };
        let end = self.group().append(&[request]).pop().expect("one result")?;
        self.moments.push(Moment { end, contents: after });
        Ok(())
    }

    pub(super) fn step(&mut self, step: Step) -> Result<(), GroupError> {
        self.version += 1;
        let version = self.version;
        match step {
            Block => self.request(0, Op::Write { offset: 8192, data: &fill(version, 4096) }),
            Sector => self.request(1, Op::Write { offset: 512, data: &fill(version, 512) }),
            Large => self.request(0, Op::Write { offset: 4096, data: &fill(version, 40_960) }),
            Trim => self.request(0, Op::Trim { offset: 4608, length: 8192 }),
            Flush => {
                self.request(0, Op::Flush)?;
                self.group().sync_now()?;
                self.flushed = self.moments.len() - 1;
                Ok(())
            }
            Fold => {
                self.group().sync_now()?;
                self.flushed = self.moments.len() - 1;
                self.clock.advance(Duration::from_secs(5));
                self.group().fold_now().map(|_| ())
            }
            Any(seed) => {
                let random = SeededEntropy::new(seed);
                let below = |bound: u64| random.next_u64() % bound;
                let index = below(2) as usize;
                let unit = [1, 512, 512, 4096][below(4) as usize];
                let longest = [4, 16, VOLUME_BYTES as u64 / unit][below(3) as usize];
                let offset = below(VOLUME_BYTES as u64 / unit) * unit;
                let length = ((1 + below(longest)) * unit).min(VOLUME_BYTES as u64 - offset);
                match below(5) {
                    0 => self.request(index, Op::Trim { offset, length }),
                    1 => self.request(index, Op::Zero { offset, length, no_hole: true }),
                    _ => {
                        let data = fill(version, length as usize);
                        self.request(index, Op::Write { offset, data: &data })
                    }
                }
            }
            Back => {
                let positions = self.group().positions();
                let covered = positions.horizon..positions.request_end;
                let there = self.moments.iter().filter(|moment| covered.contains(&moment.end));
                let there: Vec<Moment> = there.cloned().collect();
                // The first one, or the one before the last: into what was left behind, too.
                let back =
                    if version.is_multiple_of(2) { 0 } else { there.len().saturating_sub(2) };
                let Some(moment) = there.get(back) else { return Ok(()) };
                let rewound = self.group().rewind(&Point::Lsn(moment.end), false)?;
                assert_eq!(rewound.to.lsn, moment.end);
                let contents = moment.contents.clone();
                self.moments.push(Moment { end: rewound.at, contents });
                self.flushed = self.moments.len() - 1;
                Ok(())
            }
            Restart => {
                self.group().close()?;
                self.flushed = self.moments.len() - 1;
                self.group = None;
                let recovery = self.open();
                assert_eq!(recovery.cut, None, "closed in order");
                Ok(())
            }
        }
    }

    pub(super) fn open(&mut self) -> Recovery {
        let (group, recovery) =
            Group::open(self.context(), Path::new(DIR)).expect("a group opens after any crash");
        self.group = Some(group);
        recovery
    }

    /// Opens the group after a crash and checks all that must hold; `least` is the index of the
    /// first moment that it may show. What is shown is the first moment of what follows.
    pub(super) fn recover(&mut self, least: usize) -> Result<(), String> {
        if let Some((from, _)) = self.open().cut {
            // What a reign's record has grown over is none of them, whatever else shows the same.
            let kept = self.moments.partition_point(|moment| moment.end <= from);
            self.moments.truncate(kept.max(1));
        }
        self.check(least)?;
        let group = self.group();
        let log = group.check_log(group.log_start(), group.positions().head);
        log.map(|_| ()).map_err(|error| error.to_string())
    }

    /// The same of a group that is open, and not of its whole log.
    pub(super) fn check(&mut self, least: usize) -> Result<(), String> {
        let group = self.group().clone();
        let (state, why, _) = group.data_state();
        if state != DataState::Consistent {
            return Err(format!("data state {state:?}: {why:?}"));
        }
        let damaged = self.events.since(0).into_iter().find(|event| event.code == "log-damaged");
        if let Some(event) = damaged {
            return Err(format!("a crash is no damage: {}", event.text));
        }
        let found = contents(&*group).map_err(|error| error.to_string())?;
        let shown =
            (least..self.moments.len()).rev().find(|at| self.moments[*at].contents == found);
        let Some(shown) = shown else {
            let any = self.moments.iter().position(|moment| moment.contents == found);
            return Err(match any {
                Some(at) => format!("moment {at} is shown, but {least} was flushed"),
                None => "what is shown is no moment of the past".to_owned(),
            });
        };
        self.check_images(shown)?;
        let first = Moment { end: group.positions().head, contents: found };
        (self.moments, self.flushed) = (vec![first], 0);
        Ok(())
    }

    /// Each moment that the log still covers, up to the one that is shown, is shown by an image.
    fn check_images(&self, shown: usize) -> Result<(), String> {
        let group = self.group();
        let positions = group.positions();
        for (index, moment) in self.moments[..=shown].iter().enumerate() {
            if moment.end < positions.horizon || moment.end > positions.request_end {
                continue;
            }
            let image = group
                .open_image(&Point::Lsn(moment.end), None, "test", None)
                .map_err(|error| format!("{error}; {positions:?}"))?;
            let found = contents(&*image).map_err(|error| error.to_string())?;
            if found != moment.contents {
                return Err(format!("the image at {} is not moment {index}", moment.end));
            }
            group.close_image(image.name()).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// The group takes writes and restarts clean.
    pub(super) fn goes_on(&mut self) -> Result<(), String> {
        for step in [Sector, Flush, Restart] {
            self.step(step).map_err(|error| format!("{step:?} afterwards: {error}"))?;
        }
        let found = contents(&**self.group()).map_err(|error| error.to_string())?;
        if found != *self.now() {
            return Err("after a clean restart something else is shown".to_owned());
        }
        Ok(())
    }
}
