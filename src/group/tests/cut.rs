//! A cut that the disk stops half-way.

use super::*;
use crate::io::{Fault, OpenMode};
use crate::log::segment::segment_name;

/// A log of three segments that was torn in the first of them, all of it on the disk; where.
fn torn(seed: u64) -> (Bench, Lsn) {
    let bench = Bench::new("a", seed);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
    group.sync_now().unwrap();
    let at = group.positions().head;
    for turn in 0..3 {
        // Four records of one request.
        write(&group, volume, turn << 16, &[1 + turn as u8; 60_000]);
    }
    drop(group);
    let log = dir().join("log");
    for number in 0..3 {
        bench
            .disk
            .open(&log.join(segment_name(number)), OpenMode::ReadWrite)
            .unwrap()
            .sync()
            .unwrap();
    }
    bench.disk.sync_dir(&log).unwrap();
    bench.disk.damage(&log.join(segment_name(0)), at.0 + 8, 1, 0xff);
    (bench, at)
}

/// All that was cut off at a position is in one branch.
fn check_branch(bench: &Bench, group: &Group, at: Lsn, what: &str) {
    let branches = group.branches().unwrap();
    let names: Vec<&str> = branches.iter().map(|branch| &*branch.name).collect();
    assert_eq!(names, [format!("cut-{at}")], "{what}");
    assert!(branches[0].to.lsn > Lsn(2 * SEGMENT), "{what}: {:?}", branches[0]);
    let all = dir().join("branches");
    assert_eq!(bench.disk.list(&all).unwrap(), names, "{what}: nothing else is left");
    let found = bench.disk.list(&all.join(names[0])).unwrap();
    let expected = [0, 1, 2].map(segment_name);
    assert!(expected.iter().all(|name| found.contains(name)), "{what}: {found:?}");
    assert_eq!(group.positions().durable, group.positions().head, "{what}");
}

#[test]
fn a_cut_that_finds_no_room_takes_none_and_ends_as_one_branch() {
    let mut refused = 0;
    for pages in 0..40 {
        let (bench, at) = torn(3);
        let mut left = Vec::new();
        for attempt in 0..5 {
            let what = format!("{pages} pages, attempt {attempt}");
            bench.disk.inject(Fault::NoSpace { bytes: pages * 4096 });
            let opened = Group::open(bench.context(), &dir());
            bench.disk.clear_faults();
            let Err(error) = opened else { break };
            assert!(matches!(error, GroupError::NoSpace { .. }), "{what}: {error}");
            refused += 1;
            left.push(bench.disk.space(&dir()).unwrap().free_bytes);
        }
        if let Some(first) = left.first() {
            // An attempt may come further than the one before, by one copy at most.
            assert!(left.iter().all(|left| left + SEGMENT >= *first), "{pages} pages: {left:?}");
            let (group, _) = bench.open();
            check_branch(&bench, &group, at, &format!("{pages} pages"));
        }
    }
    assert!(refused > 20, "{refused}");
}

#[test]
fn a_crash_at_any_boundary_of_a_cut_ends_as_one_branch() {
    let (bench, at) = torn(4);
    bench.disk.record();
    drop(bench.open());
    let stopped = bench.disk.take_recorded();
    assert!(stopped.len() > 20, "{} boundaries", stopped.len());
    for (boundary, disk) in stopped.into_iter().enumerate() {
        for seed in 0..4 {
            let disk = Arc::new(disk.crash(seed + 100 * boundary as u64));
            let after = Bench { disk, ..bench.after_crash(0) };
            let (group, _) = after.open();
            check_branch(&after, &group, at, &format!("boundary {boundary}, seed {seed}"));
        }
    }
}
