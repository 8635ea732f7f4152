//! Power loss and `kill -9` at every boundary of a disk operation, on a disk that drops, reorders
//! and tears what was not synced: afterwards the group shows one prefix of its writes with
//! everything that was flushed in it, at the head and in its images, goes on, and restarts clean.
//!
//! Short programs are tried exhaustively, as CrashMonkey and ACE do: every program of up to four
//! steps, stopped at every boundary inside its last step (those of earlier steps belong to a
//! shorter program). Long ones are sampled, with several crashes each, some of them during
//! recovery.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tidelog::events::Events;
use tidelog::group::{
    DataState, Group, GroupContext, GroupError, LocalLimits, NewGroup, NodeIdentity, Op, Point,
    Read, Request, View,
};
use tidelog::io::{Clock, Disk, Entropy, Env, Fault, ManualClock, MemoryDisk, SeededEntropy};
use tidelog::log::control::{Control, PolicyRecord};
use tidelog::units::{GroupId, LogTime, Lsn, NodeId, Span, VolumeNumber};

const DIR: &str = "/data/groups/g";
const SEGMENT: u64 = 64 << 10;
const VOLUME_BYTES: usize = 64 << 10;

/// One step of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
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
type Contents = [Vec<u8>; 2];

/// What the model knows of one request: where it ended, and what the volumes were then.
#[derive(Clone)]
struct Moment {
    end: Lsn,
    contents: Contents,
}

/// A node with one group, and what the group has been told.
struct Bench {
    disk: MemoryDisk,
    clock: Arc<ManualClock>,
    entropy: Arc<SeededEntropy>,
    events: Events,
    group: Option<Arc<Group>>,
    /// Each state that was answered, the first one being what was there before.
    moments: Vec<Moment>,
    /// The index of the last moment that was flushed.
    flushed: usize,
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

fn contents(view: &dyn View) -> Result<Contents, GroupError> {
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
    fn new() -> Bench {
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

    fn context(&self) -> GroupContext {
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
    fn on(&self, disk: MemoryDisk) -> Bench {
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

    fn group(&self) -> &Arc<Group> {
        self.group.as_ref().expect("it is open")
    }

    fn now(&self) -> &Contents {
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

    fn step(&mut self, step: Step) -> Result<(), GroupError> {
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

    fn open(&mut self) -> tidelog::group::Recovery {
        let (group, recovery) =
            Group::open(self.context(), Path::new(DIR)).expect("a group opens after any crash");
        self.group = Some(group);
        recovery
    }

    /// Opens the group after a crash and checks all that must hold; `least` is the index of the
    /// first moment that it may show. What is shown is the first moment of what follows.
    fn recover(&mut self, least: usize) -> Result<(), String> {
        self.open();
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
        let positions = group.positions();
        group.check_log(group.log_start(), positions.head).map_err(|error| error.to_string())?;
        let first = Moment { end: positions.head, contents: found };
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
    fn goes_on(&mut self) -> Result<(), String> {
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

/// What a run of crash tests covered; zeros are failures.
#[derive(Default, Debug)]
struct Covered {
    programs: u64,
    boundaries: u64,
    recoveries: u64,
    /// Recoveries that lost something that was answered but not flushed.
    lost_something: u64,
    /// Recoveries that found the state of after the step that the power went off in.
    kept_all: u64,
}

/// Runs the program and stops it at every boundary of its last step.
fn every_boundary(program: &[Step], seeds: u64, covered: &mut Covered) {
    let mut bench = Bench::new();
    let (last, before) = program.split_last().expect("a program has a step");
    for step in before {
        bench.step(*step).expect("the disk is well");
    }
    let (answered, flushed) = (bench.moments.len() - 1, bench.flushed);
    bench.disk.record();
    bench.step(*last).expect("the disk is well");
    let disks = bench.disk.take_recorded();
    let boundaries = disks.len();
    covered.programs += 1;
    covered.boundaries += boundaries as u64;
    for (boundary, stopped) in disks.into_iter().enumerate() {
        let finished = boundary + 1 == boundaries;
        let answered = if finished { bench.moments.len() - 1 } else { answered };
        let flushed = if finished { bench.flushed } else { flushed };
        let here = format!("{program:?}, boundary {boundary} of {boundaries}");
        // The daemon dies, the kernel does not: everything answered is there.
        let mut after = bench.on(stopped.snapshot());
        let result = after.recover(answered).and_then(|()| after.goes_on());
        assert_eq!(result, Ok(()), "{here}, kill -9");
        for seed in 0..seeds {
            // Another seed at each place, so that few of them see much.
            let seed = seed + covered.recoveries * 7;
            let mut after = bench.on(stopped.crash(seed));
            let result = after.recover(flushed);
            let shown = &after.moments[0].contents;
            covered.lost_something += u64::from(*shown != bench.moments[answered].contents);
            covered.kept_all += u64::from(shown == bench.now());
            covered.recoveries += 1;
            let result = result.and_then(|()| after.goes_on());
            assert_eq!(result, Ok(()), "{here}, power loss with seed {seed}");
        }
    }
}

fn every_program(alphabet: &[Step], length: usize, seeds: u64) -> Covered {
    let mut covered = Covered::default();
    for length in 1..=length {
        for number in 0..alphabet.len().pow(length as u32) {
            let mut rest = number;
            let program: Vec<Step> = (0..length)
                .map(|_| {
                    let step = alphabet[rest % alphabet.len()];
                    rest /= alphabet.len();
                    step
                })
                .collect();
            every_boundary(&program, seeds, &mut covered);
        }
    }
    covered
}

#[test]
fn every_short_program_survives_a_crash_at_every_boundary() {
    let covered = every_program(&[Block, Sector, Large, Trim, Flush, Fold], 3, 3);
    assert_eq!(covered.programs, 6 + 36 + 216);
    assert!(covered.lost_something > 100 && covered.kept_all > 100, "{covered:?}");
}

#[test]
fn four_steps_around_a_fold_survive_a_crash_at_every_boundary() {
    let covered = every_program(&[Sector, Large, Flush, Fold], 4, 1);
    assert_eq!(covered.programs, 4 + 16 + 64 + 256);
    assert!(covered.lost_something > 50 && covered.kept_all > 50, "{covered:?}");
}

#[test]
fn going_back_around_a_fold_survives_a_crash_at_every_boundary() {
    let covered = every_program(&[Sector, Large, Fold, Back], 4, 1);
    assert_eq!(covered.programs, 4 + 16 + 64 + 256);
    assert!(covered.lost_something > 50 && covered.kept_all > 50, "{covered:?}");
}

/// A long program, with several crashes, each of which may be followed by others before the group
/// is open again.
fn long_program(seed: u64, counts: &mut BTreeMap<&'static str, u64>) -> Result<(), String> {
    let random = SeededEntropy::new(seed);
    let below = |bound: u64| random.next_u64() % bound;
    let mut bench = Bench::new();
    for _ in 0..4 {
        let mut boundary = None;
        for _ in 0..4 + below(24) {
            let step = match below(16) {
                0 => Fold,
                1 | 2 => Flush,
                3 => Restart,
                4 => Large,
                5 => Block,
                6 => Back,
                _ => Any(below(u64::MAX)),
            };
            let (answered, flushed) = (bench.moments.len() - 1, bench.flushed);
            let record = below(12) == 0;
            if record {
                bench.disk.record();
            }
            bench.step(step).map_err(|error| format!("{step:?}: {error}"))?;
            if record {
                let mut disks = bench.disk.take_recorded();
                let stopped = disks.swap_remove(below(disks.len() as u64) as usize);
                boundary = Some((stopped, answered, flushed));
                break;
            }
        }
        let ended = (bench.disk.snapshot(), bench.moments.len() - 1, bench.flushed);
        let (mut stopped, answered, flushed) = boundary.unwrap_or(ended);
        let mut least = answered;
        if below(4) > 0 {
            least = flushed;
            stopped = stopped.crash(below(u64::MAX));
            *counts.entry("power losses").or_default() += 1;
        } else {
            *counts.entry("kills").or_default() += 1;
        }
        while below(3) == 0 {
            // And once more, during the recovery.
            let half = bench.on(stopped.snapshot());
            half.disk.record();
            drop(Group::open(half.context(), Path::new(DIR)).map_err(|error| error.to_string())?);
            let mut disks = half.disk.take_recorded();
            let boundary = below(disks.len() as u64) as usize;
            stopped = disks.swap_remove(boundary).crash(below(u64::MAX));
            // Recovery loses nothing, but what the first crash left unsynced may go in the second.
            least = least.min(flushed);
            *counts.entry("crashes in recovery").or_default() += 1;
        }
        let mut after = bench.on(stopped);
        let answered = bench.now().clone();
        after.recover(least)?;
        let kept = if *after.now() == answered { "kept all" } else { "lost something" };
        *counts.entry(kept).or_default() += 1;
        bench = after;
    }
    bench.goes_on()
}

#[test]
fn long_programs_survive_crashes_also_during_recovery() {
    let mut counts = BTreeMap::new();
    for seed in 0..150 {
        if let Err(what) = long_program(seed, &mut counts) {
            panic!("seed {seed}: {what}");
        }
    }
    for what in ["power losses", "kills", "crashes in recovery", "kept all", "lost something"] {
        assert!(counts.get(what).is_some_and(|count| *count > 20), "{what}: {counts:?}");
    }
}

#[test]
fn after_any_failed_sync_nothing_that_was_durable_is_lost_and_the_group_says_failed() {
    let program = [Block, Sector, Flush, Large, Block, Flush, Sector, Large, Fold, Block, Flush];
    let mut failures = 0;
    for place in 0.. {
        let mut bench = Bench::new();
        let begun = bench.disk.operations();
        bench.disk.inject(Fault::FailedSync { operation: begun + place });
        let stopped = program.iter().find_map(|step| {
            let issued = bench.moments.len();
            bench.step(*step).err().map(|error| (*step, issued, error))
        });
        let Some((step, _, error)) = stopped else { break };
        failures += 1;
        let (state, ..) = bench.group().data_state();
        if matches!(step, Flush) {
            assert_eq!(state, DataState::Failed, "{step:?}, place {place}: {error}");
            let refused = bench.step(Block).expect_err("a failed group takes no writes");
            assert!(matches!(refused, GroupError::Failed { .. }), "{refused}");
            assert!(contents(&**bench.group()).is_ok(), "reads go on");
        }
        for seed in 0..20 {
            let mut after = bench.on(bench.disk.crash(seed));
            let result = after.recover(bench.flushed).and_then(|()| after.goes_on());
            assert_eq!(result, Ok(()), "sync that failed at {place} in {step:?}, seed {seed}");
        }
    }
    assert!(failures > 10, "{failures} failures");
}

#[test]
fn a_full_disk_refuses_writes_and_loses_none() {
    let mut refusals = 0;
    for room in 0..12 {
        let mut bench = Bench::new();
        bench.disk.inject(Fault::NoSpace { bytes: room * 16_384 });
        for step in [Large, Block, Large, Flush, Large, Sector, Flush] {
            let moments = bench.moments.len();
            if bench.step(step).is_err() {
                refusals += 1;
                bench.moments.truncate(moments);
            }
        }
        let mut after = bench.on(bench.disk.snapshot());
        after.disk.clear_faults();
        let result = after.recover(bench.moments.len() - 1).and_then(|()| after.goes_on());
        assert_eq!(result, Ok(()), "with room for {room} × 16 KiB");
    }
    assert!(refusals > 10, "{refusals} refusals");
}
