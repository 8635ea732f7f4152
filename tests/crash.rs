//! Power loss and `kill -9` at every boundary of a disk operation, on a disk that drops, reorders
//! and tears what was not synced: afterwards the group shows one prefix of its writes with
//! everything that was flushed in it, at the head and in its images, goes on, and restarts clean.
//!
//! Short programs are tried exhaustively, as CrashMonkey and ACE do: every program of up to three
//! steps, and of four around a fold, a way back or a restart, stopped at every boundary inside its
//! last step (those of earlier steps belong to a shorter program). Long ones are sampled, with
//! several crashes each, some of them during recovery. And a disk that is an older state of itself,
//! as a whole or in part.

mod bench;

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::path::{Path, PathBuf};

use tidelog::group::{DataState, Group, GroupError};
use tidelog::io::{Disk, Entropy, Fault, MemoryDisk, OpenMode, SeededEntropy};

use bench::Step::*;
use bench::{Bench, DIR, Step, contents};

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

#[test]
fn four_steps_around_a_restart_survive_a_crash_at_every_boundary() {
    let covered = every_program(&[Block, Large, Trim, Restart], 4, 1);
    assert_eq!(covered.programs, 4 + 16 + 64 + 256);
    assert!(covered.lost_something > 50 && covered.kept_all > 50, "{covered:?}");
}

/// Whichever of the segments' bytes came to the disk first.
#[test]
fn three_segments_that_were_filled_without_a_flush_survive_a_crash_at_every_boundary() {
    let mut covered = Covered::default();
    for length in 5..8 {
        let mut program = vec![Large; length];
        program.push(Sector);
        every_boundary(&program, 60, &mut covered);
    }
    assert!(covered.lost_something > 50 && covered.kept_all > 5, "{covered:?}");
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

/// The seeds of long programs: so many, or `TIDELOG_SEEDS` of them in `scripts/soak`.
fn seeds(short: u64) -> u64 {
    match std::env::var("TIDELOG_SEEDS") {
        Ok(text) => text.parse().expect("TIDELOG_SEEDS is a number"),
        Err(_) => short,
    }
}

#[test]
fn long_programs_survive_crashes_also_during_recovery() {
    let mut counts = BTreeMap::new();
    for seed in 0..seeds(150) {
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

/// Puts a file, or a directory of files, of one disk in its place on another.
fn put(name: &str, from: &MemoryDisk, to: &MemoryDisk) {
    let path = Path::new(DIR).join(name);
    let files = |disk: &MemoryDisk| -> Vec<PathBuf> {
        match disk.list(&path) {
            Ok(names) => names.iter().map(|name| path.join(name)).collect(),
            Err(_) => vec![path.clone()],
        }
    };
    for gone in files(to) {
        to.remove(&gone).unwrap();
    }
    for path in files(from) {
        let file = from.open(&path, OpenMode::Read).unwrap();
        let mut bytes = vec![0; file.len().unwrap() as usize];
        file.read_at(&mut bytes, 0).unwrap();
        let file = to.open(&path, OpenMode::CreateNew).unwrap();
        file.write_at(&[IoSlice::new(&bytes)], 0).unwrap();
    }
}

/// Opens a disk whose parts are of two times. It shows one moment as a whole and goes on: the last
/// one that it may be. Or it says that it is damaged, and shows nothing that never was.
fn shown_of_mixed(mut after: Bench) -> Result<Option<usize>, String> {
    let group = match Group::open(after.context(), Path::new(DIR)) {
        Ok((group, _)) => group,
        Err(GroupError::Damaged { .. }) => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    after.group = Some(group.clone());
    let (state, ..) = group.data_state();
    let said = after.events.since(0).iter().any(|event| event.code == "log-damaged");
    let is_told = said || state != DataState::Consistent;
    let found = match contents(&*group) {
        Err(_) if is_told => return Ok(None),
        found => found.map_err(|error| error.to_string())?,
    };
    let shown = after.moments.iter().rposition(|moment| moment.contents == found);
    if shown.is_none() || is_told {
        let never_was = || format!("{state:?}, and what is shown is no moment of the past");
        return shown.map(|_| None).ok_or_else(never_was);
    }
    after.check(0)?;
    after.goes_on()?;
    Ok(shown)
}

/// As a snapshot of a virtual machine that somebody goes back to, or a file system of which that
/// was done to a part.
#[test]
fn a_disk_rolled_back_to_an_older_state_shows_a_moment_and_goes_on() {
    let befores: [&[Step]; 3] =
        [&[Large, Sector, Flush], &[Large, Fold, Sector, Flush], &[Block, Sector, Fold]];
    let afters: [&[Step]; 5] = [
        &[Block, Flush],
        &[Block, Large, Flush, Restart, Sector, Flush],
        &[Fold, Sector, Flush],
        &[Block, Large, Flush, Large, Fold, Block, Flush],
        // So much that segments are used again.
        &[Large, Large, Fold, Large, Large, Fold, Large, Sector, Flush],
    ];
    let (mut shown, mut told) = (0, 0);
    for program in 0..befores.len() * afters.len() * 2 {
        let closed = program % 2 == 1;
        let before = befores[program / 2 % befores.len()];
        let behind = afters[program / 2 / befores.len()];
        let mut bench = Bench::new();
        for step in before {
            bench.step(*step).unwrap();
        }
        if closed {
            bench.group().close().unwrap();
            bench.group = None;
        }
        let (old, older) = (bench.disk.snapshot(), bench.now().clone());
        if closed {
            bench.open();
        }
        // What the metadata says of the log.
        let mut marked = 0;
        for step in behind {
            bench.step(*step).unwrap();
            if [Fold, Restart].contains(step) {
                marked = bench.flushed;
            }
        }
        let here = format!("{before:?}, closed: {closed}, then {behind:?}");
        let states = (0..4).map(|seed| old.crash(seed)).chain([old.snapshot()]);
        for (state, disk) in states.enumerate() {
            let mut after = bench.on(disk);
            assert_eq!(after.recover(0), Ok(()), "{here}, state {state}");
            assert!(*after.now() == older, "{here}, state {state}: another moment");
            assert_eq!(after.goes_on(), Ok(()), "{here}, state {state}");
        }
        let parts = ["meta", "log", "base"];
        for mixture in 1..(1 << parts.len()) - 1 {
            let disk = bench.disk.snapshot();
            let of_before: Vec<&str> = (0..parts.len())
                .filter(|bit| mixture >> bit & 1 == 1)
                .map(|bit| parts[bit])
                .collect();
            for part in &of_before {
                put(part, &old, &disk);
            }
            let here = format!("{here}, {of_before:?} of before");
            match shown_of_mixed(bench.on(disk)).unwrap_or_else(|why| panic!("{here}: {why}")) {
                None => told += 1,
                Some(at) => {
                    let is_lost = at < marked && !of_before.contains(&"meta");
                    assert!(!is_lost, "{here}: moment {at} without a word, {marked} was durable");
                    shown += 1;
                }
            }
        }
    }
    assert!(shown > 20 && told > 20, "{shown} shown, {told} told");
}
