//! Folds that are interrupted.

use std::collections::BTreeMap;

use super::super::meta::MetaFile;
use super::*;
use crate::io::{Fault, OpenMode};

const FULL: u64 = 2 << 20;
/// In the middle of a chunk and of a region.
const SHRUNK: u64 = (1 << 20) + 8192;

/// A group whose volume was written and folded, and then made smaller.
fn shrunk(bench: &Bench) -> (Arc<Group>, Volume, Vec<u8>) {
    let group = bench.create();
    let volume = group.create_volume(name("v"), FULL).unwrap();
    set_policy(&group, 0, 64 << 20);
    let data: Vec<u8> = (0..FULL as u32).map(|index| (index / 512) as u8 | 1).collect();
    write(&group, volume.number, 0, &data);
    bench.pass(5);
    group.sync_now().unwrap();
    assert_eq!(group.fold_now().unwrap(), group.positions().head);
    group.resize_volume(&name("v"), SHRUNK).unwrap();
    write(&group, volume.number, 512, &[9; 512]);
    let mut expected = data;
    expected[512..1024].fill(9);
    expected[SHRUNK as usize..].fill(0);
    bench.pass(5);
    group.sync_now().unwrap();
    (group, volume, expected)
}

/// Grows the volume again, folds that, and reads all of it.
fn grow_and_read(bench: &Bench, group: &Group, volume: &Volume, expected: &[u8], what: &str) {
    group.resize_volume(&name("v"), FULL).unwrap();
    bench.pass(5);
    group.sync_now().unwrap();
    let folded = group.fold_now().unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(folded, group.positions().head, "{what}");
    let got = try_read(group, volume.number, 0, FULL as usize);
    assert!(got.unwrap_or_else(|error| panic!("{what}: {error}")) == expected, "{what}");
    for base in group.bases.read().unwrap().values() {
        base.check(0, FULL).unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

#[test]
fn a_crash_at_any_boundary_of_a_fold_that_shrinks_leaves_nothing_behind_the_end() {
    let bench = Bench::new("a", 1);
    let (group, volume, expected) = shrunk(&bench);
    bench.disk.record();
    group.fold_now().unwrap();
    let stopped = bench.disk.take_recorded();
    assert!(stopped.len() > 10, "{} boundaries", stopped.len());
    for (boundary, disk) in stopped.into_iter().enumerate() {
        for seed in 0..6 {
            let what = format!("boundary {boundary}, seed {seed}");
            let disk = Arc::new(disk.crash(seed + 100 * boundary as u64));
            let after = Bench { disk, ..bench.after_crash(0) };
            let (group, _) = after.open();
            grow_and_read(&after, &group, &volume, &expected, &what);
        }
    }
}

#[test]
fn an_error_at_any_operation_of_a_fold_that_shrinks_is_made_good_by_the_next() {
    for operation in 0.. {
        let bench = Bench::new("a", 2);
        let (group, volume, expected) = shrunk(&bench);
        bench.disk.inject(Fault::Error { operation: bench.disk.operations() + operation });
        let result = group.fold_now();
        if result.is_ok() {
            assert!(operation > 10, "{operation} operations");
            break;
        }
        let what = format!("operation {operation}: {}", result.unwrap_err());
        if group.data_state().0 == DataState::Failed {
            assert!(group.fold_now().is_err(), "{what}: a failed group folds nothing");
            drop(group);
            let (group, _) = bench.open();
            grow_and_read(&bench, &group, &volume, &expected, &what);
        } else {
            grow_and_read(&bench, &group, &volume, &expected, &what);
        }
    }
}

#[test]
fn a_group_whose_fold_cannot_be_finished_opens_and_finishes_it_later() {
    let bench = Bench::new("a", 3);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    set_policy(&group, 0, 64 << 20);
    write(&group, volume.number, 0, &[1; 65536]);
    write(&group, volume.number, 512, &[2; 512]);
    let below = group.positions().head;
    write(&group, volume.number, 8192, &[3; 512]);
    bench.pass(5);
    group.sync_now().unwrap();
    bench.disk.inject(Fault::NoSpace { bytes: 4096 });
    let failed = group.fold_now();
    assert!(matches!(failed, Err(GroupError::NoSpace { .. })), "{failed:?}");
    let expected = read(&*group, volume.number, 0, 1 << 20);
    group.close().unwrap();
    drop(group);
    let (group, _) = bench.open();
    assert!(bench.event_codes().contains(&"fold-failed".to_owned()));
    assert!(read(&*group, volume.number, 0, 1 << 20) == expected, "the log still has it all");
    let refused = group.open_image(&Point::Lsn(below), None, "test", None).map(|_| ());
    assert!(matches!(refused, Err(GroupError::NotCovered { .. })), "{refused:?}");
    write(&group, volume.number, 1024, &[4; 512]);
    bench.disk.clear_faults();
    bench.pass(5);
    group.sync_now().unwrap();
    assert_eq!(group.fold_now().unwrap(), group.positions().head);
    let mut now = expected;
    now[1024..1536].fill(4);
    assert!(read(&*group, volume.number, 0, 1 << 20) == now);
}

/// Fills the log to the last byte of the segment that its head is in.
fn fill_segment(group: &Group, volume: &Volume) -> Lsn {
    let trim = Op::Trim { offset: 0, length: 512 };
    let bytes = |op| {
        let before = group.positions().head;
        one(group, volume.number, op).unwrap();
        group.positions().head.bytes_since(before)
    };
    let (of_write, of_trim) = (bytes(Op::Write { offset: 0, data: &[1; 512] }), bytes(trim));
    let segment = group.segment_bytes();
    let room = segment - group.positions().head.segment_offset(segment);
    let writes =
        (0..room / of_write).find(|count| (room - count * of_write).is_multiple_of(of_trim));
    let writes = writes.expect("a number that leaves room for whole trims");
    for round in 0..writes {
        write(group, volume.number, 512, &[round as u8 | 1; 512]);
    }
    for _ in 0..(room - writes * of_write) / of_trim {
        one(group, volume.number, trim).unwrap();
    }
    assert_eq!(group.positions().head.segment_offset(segment), 0);
    group.positions().head
}

#[test]
fn a_log_that_ends_where_its_segment_does_and_is_folded_to_there_begins_no_later() {
    for prepared in [false, true] {
        let bench = Bench::new("a", 5);
        let group = bench.create();
        let volume = group.create_volume(name("v"), 1 << 20).unwrap();
        set_policy(&group, 0, 64 << 20);
        fill_segment(&group, &volume);
        let head = fill_segment(&group, &volume);
        if prepared {
            group.prepare_round(head);
        }
        bench.pass(5);
        group.sync_now().unwrap();
        assert_eq!(group.fold_now().unwrap(), head);
        let begins = group.log_start();
        assert!(begins > Lsn::ZERO && begins <= head, "{begins}, {head}");
        group.prepare_round(head);
        assert!(group.log_start() <= head, "{}, {head}", group.log_start());
        // Who has all of it is sent what comes, and nothing else.
        group.read_log(head, &mut []).unwrap();
        write(&group, volume.number, 1024, &[9; 512]);
        group.read_log(head, &mut [0; 512]).unwrap();
        let expected = read(&*group, volume.number, 0, 1 << 20);
        drop(group);
        let (group, _) = bench.open();
        assert!(expected == read(&*group, volume.number, 0, 1 << 20));
        group.read_log(head, &mut [0; 512]).unwrap();
    }
}

#[test]
fn recovery_on_a_full_disk_gives_back_spare_segments() {
    let bench = Bench::new("a", 4);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    set_policy(&group, 0, 64 << 20);
    for round in 0..40 {
        write(&group, volume.number, 0, &[round; 16384]);
    }
    bench.pass(5);
    group.sync_now().unwrap();
    group.fold_now().unwrap();
    let spares = |disk: &MemoryDisk| {
        let names = disk.list(&dir().join("log")).unwrap();
        names.iter().filter(|name| name.ends_with(".spare")).count()
    };
    assert!(spares(&bench.disk) > 0);
    write(&group, volume.number, 0, &[77; 16384]);
    drop(group);
    let space = bench.disk.space(&dir()).unwrap();
    bench.disk.set_total_bytes(space.total_bytes - space.free_bytes);
    let (group, recovery) = bench.open();
    assert!(recovery.cut.is_some(), "it was not closed in order");
    assert_eq!(spares(&bench.disk), 0);
    assert_eq!(read(&*group, volume.number, 0, 16384), [77; 16384]);
}

#[test]
fn a_request_longer_than_what_is_folded_at_a_time_does_not_keep_the_log_full() {
    let limit = 4 * SEGMENT;
    for length in [90_000, 200_000, 260_000, 900_000] {
        let bench = Bench::new("a", 6);
        let group = bench.create();
        let volume = group.create_volume(name("v"), 1 << 20).unwrap();
        set_policy(&group, 3600, limit);
        let used = || {
            let positions = group.positions();
            positions.head.bytes_since(positions.horizon)
        };
        let fold = || {
            group.sync_now().unwrap();
            group.fold(false).unwrap();
        };
        let mut largest = 0;
        for round in 0..60 {
            let data = vec![round; if round == 20 { length } else { 8192 }];
            // What a writer waits for.
            for _ in 0..3 {
                if used() >= limit {
                    fold();
                }
            }
            assert!(used() < limit, "{length} bytes, round {round}: {} are used", used());
            write(&group, volume.number, 0, &data);
            largest = largest.max(used());
        }
        assert!(largest >= limit);
    }
}

#[test]
fn a_crash_in_a_fold_that_passes_the_end_of_a_volume_leaves_none_of_its_files() {
    let bench = Bench::new("a", 7);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    set_policy(&group, 0, 64 << 20);
    let fold = |bench: &Bench, group: &Group| {
        bench.pass(5);
        group.sync_now().unwrap();
        assert_eq!(group.fold_now().unwrap(), group.positions().head);
    };
    write(&group, volume.number, 0, &[1; 4096]);
    fold(&bench, &group);
    group.remove_volume(&name("v")).unwrap();
    bench.disk.record();
    fold(&bench, &group);
    for (boundary, disk) in bench.disk.take_recorded().into_iter().enumerate() {
        for seed in 0..6 {
            let disk = Arc::new(disk.crash(seed + 100 * boundary as u64));
            let after = Bench { disk, ..bench.after_crash(0) };
            let (group, _) = after.open();
            fold(&after, &group);
            let left = after.disk.list(&dir().join("base")).unwrap();
            assert_eq!(left, ["control"], "boundary {boundary}, seed {seed}");
        }
    }
}

/// A volume that was made smaller in the log, and larger again behind a fold, had its old bytes in
/// an incremental: the base had never been larger, or there was none, and nothing knew of it.
#[test]
fn what_was_cut_off_above_the_base_and_has_grown_again_counts_as_changed() {
    for has_base in [true, false] {
        let bench = Bench::new("a", 31);
        let group = bench.create();
        set_policy(&group, 0, 64 << 20);
        let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
        if has_base {
            write(&group, volume, 0, &[1; 4096]);
        }
        let fold = || {
            bench.pass(5);
            group.sync_now().unwrap();
            assert_eq!(group.fold_now().unwrap(), group.positions().head);
        };
        fold();
        group.resize_volume(&name("v"), 4 << 20).unwrap();
        write(&group, volume, 3 << 20, &[2; 4096]);
        let since = group.positions().request_end;
        group.resize_volume(&name("v"), 1 << 20).unwrap();
        fold();
        group.resize_volume(&name("v"), 4 << 20).unwrap();
        let image = group.open_image(&Point::Now, None, "test", None).unwrap();
        assert_eq!(read(&*image, volume, 3 << 20, 4096), [0; 4096]);
        let changed = image.changed_since(volume, since).unwrap();
        let covers = |(at, length): &(u64, u64)| *at <= 3 << 20 && 3 << 20 < at + length;
        assert!(changed.iter().any(covers), "with a base: {has_base}: {changed:?}");
    }
}

/// So that the sums of some chunks are in pages of their own.
const SPREAD: u64 = 16 << 20;

/// A group with a base that has data in one chunk, and a log with parts of blocks in this chunk and
/// in others; what it shows.
fn with_parts(bench: &Bench) -> (Arc<Group>, Volume, Vec<u8>) {
    let group = bench.create();
    let volume = group.create_volume(name("v"), SPREAD).unwrap();
    set_policy(&group, 0, 64 << 20);
    write(&group, volume.number, 0, &[1; 65536]);
    bench.pass(5);
    group.sync_now().unwrap();
    group.fold_now().unwrap();
    for chunk in [0, 1, 4, 8, 12] {
        for block in [3, 5, 200] {
            write(&group, volume.number, (chunk << 20) + (block << 12) + 512, &[2; 1024]);
        }
    }
    write(&group, volume.number, 32768, &[3; 65536]);
    bench.pass(5);
    group.sync_now().unwrap();
    let expected = read(&*group, volume.number, 0, SPREAD as usize);
    (group, volume, expected)
}

/// The simulation's seed 1001424 of an earlier state: a fold's last step was in the cache alone
/// when the process was killed, the next one recycled the log below it, and then the power failed.
#[test]
fn a_kill_at_any_boundary_of_a_fold_and_then_a_power_loss_take_nothing() {
    let bench = Bench::new("a", 7);
    let (group, volume, _) = with_parts(&bench);
    bench.disk.record();
    group.fold_now().unwrap();
    let stopped = bench.disk.take_recorded();
    assert!(stopped.len() > 10, "{} boundaries", stopped.len());
    for (boundary, disk) in stopped.into_iter().enumerate() {
        let killed = Bench { disk: Arc::new(disk), ..bench.after_crash(0) };
        let (group, _) = killed.open();
        // What it folded is used again.
        write(&group, volume.number, SPREAD - 65536, &[4; 65536]);
        write(&group, volume.number, SPREAD - 65536, &[5; 65536]);
        group.sync_now().unwrap();
        let expected = read(&*group, volume.number, 0, SPREAD as usize);
        drop(group);
        for seed in 0..8 {
            let what = format!("boundary {boundary}, seed {seed}");
            let after = killed.after_crash(seed);
            let (group, _) = after.open();
            assert_ne!(group.data_state().0, DataState::Failed, "{what}");
            assert!(read(&*group, volume.number, 0, SPREAD as usize) == expected, "{what}");
        }
    }
}

/// What the files of the base hold, by name.
fn base_files(disk: &MemoryDisk) -> BTreeMap<String, Vec<u8>> {
    let base = dir().join("base");
    let names = disk.list(&base).unwrap().into_iter();
    names
        .map(|name| {
            let file = disk.open(&base.join(&name), OpenMode::Read).unwrap();
            let mut bytes = vec![0; file.len().unwrap() as usize];
            file.read_at(&mut bytes, 0).unwrap();
            (name, bytes)
        })
        .collect()
}

#[test]
fn no_byte_of_the_base_changes_before_the_target_is_durable() {
    for prepare in [with_parts, shrunk] {
        let bench = Bench::new("a", 11);
        let (group, ..) = prepare(&bench);
        let before = base_files(&bench.disk);
        bench.disk.record();
        let folded = group.fold_now().unwrap();
        let (mut untouched, mut touched) = (0, 0);
        for (boundary, disk) in bench.disk.take_recorded().into_iter().enumerate() {
            if base_files(&disk) == before {
                untouched += 1;
                continue;
            }
            touched += 1;
            // What is durable is there whatever a loss of power takes.
            for seed in 0..16 {
                let what = format!("boundary {boundary}, seed {seed}");
                let meta = MetaFile::open(&disk.crash(seed), &dir().join("meta"));
                let target = meta.unwrap().expect("a slot is whole").meta.fold_target;
                assert!(target >= folded, "{what}: {folded} is folded, {target} the target");
            }
        }
        assert!(untouched > 0 && touched > 3, "{untouched} {touched}");
    }
}

#[test]
fn a_disk_that_is_full_in_mid_fold_leaves_every_block_readable() {
    for pages in 0.. {
        let bench = Bench::new("a", 8);
        let (group, volume, expected) = with_parts(&bench);
        bench.disk.inject(Fault::NoSpace { bytes: pages << 12 });
        let folded = group.fold_now();
        let shown = try_read(&*group, volume.number, 0, SPREAD as usize);
        let shown = shown.unwrap_or_else(|error| panic!("{pages} pages: {error}"));
        assert!(shown == expected, "{pages} pages");
        if folded.is_ok() {
            assert!(pages > 5, "{pages} pages");
            return;
        }
        assert!(matches!(folded, Err(GroupError::NoSpace { .. })), "{pages} pages: {folded:?}");
        bench.disk.clear_faults();
        assert_eq!(group.fold_now().unwrap(), group.positions().head, "{pages} pages");
        assert!(read(&*group, volume.number, 0, SPREAD as usize) == expected, "{pages} pages");
    }
}

#[test]
fn a_copy_damaged_below_a_fold_that_stopped_half_way_is_no_moment_until_an_image_comes() {
    let (a, b) = (Bench::new("a", 8), Bench::new("b", 9));
    let primary = a.create();
    set_policy(&primary, 0, 64 << 20);
    let volume = primary.create_volume(name("v"), 1 << 20).unwrap().number;
    let copy = b.create_copy();
    let follow = |copy: &Group| {
        let from = copy.positions().head;
        let mut bytes = vec![0; primary.positions().head.bytes_since(from) as usize];
        primary.read_log(from, &mut bytes).unwrap();
        copy.append_received(from, &bytes)?;
        copy.note_committed(primary.positions().durable);
        copy.sync_now().unwrap();
        Ok::<(), ReceiveError>(())
    };
    write(&primary, volume, 0, &[1; 64 << 10]);
    primary.sync_now().unwrap();
    follow(&copy).unwrap();
    b.pass(5);
    let horizon = copy.fold_now().unwrap();
    let place = write(&primary, volume, 64 << 10, &[2; 512]);
    for block in 0..32 {
        write(&primary, volume, block * 8192, &[3; 4096]);
    }
    primary.sync_now().unwrap();
    follow(&copy).unwrap();
    b.pass(5);
    b.disk.record();
    let target = copy.fold_now().unwrap();
    assert!(target > place && place > horizon);
    let stopped = b.disk.take_recorded();
    let segment = crate::log::segment::segment_name(place.segment_number(SEGMENT));
    let path = dir().join("log").join(segment);
    let (mut mixed, mut whole) = (0, 0);
    for (boundary, disk) in stopped.into_iter().enumerate() {
        let what = format!("boundary {boundary}");
        let disk = Arc::new(disk.crash(boundary as u64));
        let after = Bench { disk, ..b.after_crash(0) };
        let begun = {
            let meta = MetaFile::open(&*after.disk, &dir().join("meta"));
            meta.unwrap().unwrap().meta.fold_target >= target
        };
        if !after.disk.exists(&path).unwrap() {
            // The fold is done, and the segment is a spare.
            continue;
        }
        after.disk.damage(&path, place.segment_offset(SEGMENT) + 10, 1, 0xff);
        let (copy, recovery) = after.open();
        if copy.positions().horizon >= target {
            continue;
        }
        assert!(recovery.as_copy && copy.positions().head == place, "{what}");
        if !begun {
            whole += 1;
            assert_eq!(copy.data_state().0, DataState::Consistent, "{what}");
            follow(&copy).unwrap();
            assert!(read(&*copy, volume, 0, 1 << 20) == read(&*primary, volume, 0, 1 << 20));
            continue;
        }
        mixed += 1;
        assert_eq!(copy.data_state().0, DataState::None, "{what}");
        let refused = copy.promote("test").unwrap_err().to_string();
        assert!(refused.contains("nothing here is a moment of the group"), "{what}: {refused}");
        assert!(try_read(&*copy, volume, 0, 512).is_err(), "{what}");
        assert!(copy.extents(volume, 0, 4096, 9).is_err(), "{what}");
        assert!(copy.open_image(&Point::Now, None, "test", None).is_err(), "{what}");
        assert!(follow(&copy).is_err(), "{what}");
        assert!(copy.needs_image().is_some() && copy.needs_whole_image(), "{what}");
        // It stays so.
        copy.close().unwrap();
        drop(copy);
        let (copy, _) = after.open();
        assert!(copy.promote("test").is_err() && copy.needs_whole_image(), "{what}");
        let change = primary.ship(&name("b"), Some(place), place, None).unwrap();
        assert!(copy.begin_image(&change.offer()).is_err(), "{what}: a change of what?");
        let shipment = primary.ship(&name("b"), None, place, None).unwrap();
        copy.begin_image(&shipment.offer()).unwrap();
        while let Some(part) = shipment.next().unwrap() {
            copy.stage(part).unwrap();
            assert_eq!(copy.data_state().0, DataState::ReceivingImage, "{what}");
        }
        copy.switch_to_image().unwrap();
        primary.end_shipment(&name("b"));
        assert!(copy.needs_image().is_none(), "{what}");
        follow(&copy).unwrap();
        assert!(read(&*copy, volume, 0, 1 << 20) == read(&*primary, volume, 0, 1 << 20));
        after.pass(5);
        copy.fold_now().unwrap();
        copy.promote("test").unwrap();
        assert!(read(&*copy, volume, 0, 1 << 20) == read(&*primary, volume, 0, 1 << 20));
    }
    assert!(mixed > 3 && whole > 0, "{mixed} {whole}");
}
