//! Folds over payloads that have rotted in the log.

use std::path::{Path, PathBuf};

use super::returning::join;
use super::*;
use crate::io::Fault;
use crate::log::segment::segment_name;

pub(super) const BYTES: u64 = 1 << 20;
/// Blocks that have rotted: written whole, and in part.
const ROTTED: [u64; 3] = [3, 10, 11];

/// A group with what is to be folded, and some of it rotted; what the volume would hold, and an
/// image of the moment where the base is.
fn rotted(bench: &Bench) -> (Arc<Group>, Volume, Vec<u8>, Arc<Image>) {
    let group = bench.create();
    let volume = group.create_volume(name("v"), BYTES).unwrap();
    set_policy(&group, 0, 64 << 20);
    let mut expected = vec![0; BYTES as usize];
    let mut put = |offset: u64, data: &[u8]| {
        expected[offset as usize..][..data.len()].copy_from_slice(data);
        write(&group, volume.number, offset, data)
    };
    put(8 * 4096, &[1; 8 * 4096]);
    bench.pass(5);
    group.sync_now().unwrap();
    group.fold_now().unwrap();
    let before = group.open_image(&Point::Now, None, "test", None).unwrap();
    for block in 0..6 {
        put(block * 4096, &[2 + block as u8; 4096]);
    }
    let mut ends = vec![put(3 * 4096, &[0x33; 4096])];
    ends.push(put(10 * 4096 + 512, &[0x44; 512]));
    // What is left of it is not all that its checksum is of.
    ends.push(put(11 * 4096, &[0x55; 1024]));
    put(11 * 4096 + 512, &[0x66; 1024]);
    put(12 * 4096 + 1024, &[0x77; 512]);
    group.sync_now().unwrap();
    // It tells what was durable before it.
    put(20 * 4096, &[8; 4096]);
    bench.pass(5);
    group.sync_now().unwrap();
    for end in ends {
        let at = Lsn(end.0 - 100);
        let file = dir().join("log").join(segment_name(at.segment_number(SEGMENT)));
        bench.disk.damage(&file, at.segment_offset(SEGMENT), 1, 0x10);
    }
    (group, volume, expected, before)
}

/// All blocks are as they should be; those that have rotted are errors, and no other data.
pub(super) fn check(view: &dyn View, volume: &Volume, expected: &[u8], rotted: &[u64], what: &str) {
    for block in 0..BYTES / 4096 {
        let got = try_read(view, volume.number, block * 4096, 4096);
        if rotted.contains(&block) {
            assert!(matches!(got, Err(GroupError::Damaged { .. })), "{what}: block {block}");
        } else {
            let got = got.unwrap_or_else(|error| panic!("{what}: block {block}: {error}"));
            assert!(got == expected[block as usize * 4096..][..4096], "{what}: block {block}");
        }
    }
}

/// Hosts write until they need the room of what is folded.
pub(super) fn press(bench: &Bench, group: &Arc<Group>, volume: &Volume, expected: &mut [u8]) {
    set_policy(group, 0, 4 * SEGMENT);
    for round in 0..5 {
        let offset = (64 + round * 15) * 4096;
        write(group, volume.number, offset, &[3; 60_000]);
        expected[offset as usize..][..60_000].fill(3);
    }
    bench.pass(5);
    group.sync_now().unwrap();
}

pub(super) fn fold(bench: &Bench, group: &Group, what: &str) {
    bench.pass(5);
    group.sync_now().unwrap();
    let folded = group.fold_now().unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(folded, group.positions().head, "{what}");
}

#[test]
fn a_fold_goes_on_over_what_has_rotted_in_the_log_and_the_block_stays_an_error() {
    let bench = Bench::new("a", 1);
    let (group, volume, mut expected, before) = rotted(&bench);
    fold(&bench, &group, "first");
    check(&*group, &volume, &expected, &ROTTED, "live");
    let now = group.open_image(&Point::Now, None, "test", None).unwrap();
    check(&*now, &volume, &expected, &ROTTED, "image");
    let mut old = vec![0; BYTES as usize];
    old[8 * 4096..16 * 4096].fill(1);
    check(&*before, &volume, &old, &[], "image of before");
    let [said] = &bench.said("log-damaged")[..] else { panic!("it is told once") };
    assert!(said.contains("3 blocks") && said.contains("volume v at 12288"), "{said}");
    let chunk = DamagedPart::Base { volume: volume.number, chunk: 0 };
    assert!(group.take_suspects().contains(&chunk));
    group.close().unwrap();
    drop((before, now, group));
    // It is so after a restart, and further folds are not held up.
    let (group, _) = bench.open();
    check(&*group, &volume, &expected, &ROTTED, "after a restart");
    let put = |expected: &mut Vec<u8>, offset: u64, data: &[u8]| {
        expected[offset as usize..][..data.len()].copy_from_slice(data);
        write(&group, volume.number, offset, data);
    };
    put(&mut expected, 40 * 4096, &[9; 4096]);
    fold(&bench, &group, "second");
    check(&*group, &volume, &expected, &ROTTED, "after another fold");
    // Who writes all of a block makes it whole.
    for block in ROTTED {
        put(&mut expected, block * 4096, &[0xaa; 4096]);
    }
    check(&*group, &volume, &expected, &[], "written anew");
    fold(&bench, &group, "third");
    check(&*group, &volume, &expected, &[], "written anew and folded");
    for base in group.bases.read().unwrap().values() {
        base.check(0, BYTES).unwrap();
    }
}

#[test]
fn a_fold_goes_on_over_a_damaged_block_of_the_base_of_which_the_log_has_a_part() {
    let bench = Bench::new("a", 4);
    let (group, volume, mut expected, _) = rotted(&bench);
    fold(&bench, &group, "first");
    let put = |group: &Group, expected: &mut Vec<u8>, offset: u64, data: &[u8]| {
        expected[offset as usize..][..data.len()].copy_from_slice(data);
        write(group, volume.number, offset, data);
        bench.pass(5);
        group.sync_now().unwrap();
    };
    // One that has the checksum of what is lost, one that has none, and one that rots now.
    let base = dir().join("base").join(format!("{}.img", volume.number));
    bench.disk.damage(&base, 9 * 4096 + 100, 1, 1);
    for block in [3, 9, 11] {
        put(&group, &mut expected, block * 4096 + 512, &[0x99; 512]);
    }
    let rotted = [3, 9, 10, 11];
    press(&bench, &group, &volume, &mut expected);
    bench.disk.record();
    fold(&bench, &group, "second");
    for (boundary, disk) in bench.disk.take_recorded().into_iter().enumerate() {
        let what = format!("boundary {boundary}");
        let after = Bench { disk: Arc::new(disk.crash(boundary as u64)), ..bench.after_crash(0) };
        let (group, _) = after.open();
        fold(&after, &group, &what);
        check(&*group, &volume, &expected, &rotted, &what);
    }
    check(&*group, &volume, &expected, &rotted, "live");
    for block in rotted {
        put(&group, &mut expected, block * 4096, &[0xaa; 4096]);
    }
    fold(&bench, &group, "third");
    check(&*group, &volume, &expected, &[], "written anew and folded");
}

/// A group whose base has a block that has rotted, of which the log has a part.
pub(super) fn rotted_base(bench: &Bench) -> (Arc<Group>, Volume, Vec<u8>, PathBuf) {
    let group = bench.create();
    let volume = group.create_volume(name("v"), BYTES).unwrap();
    set_policy(&group, 0, 64 << 20);
    let mut expected = vec![0; BYTES as usize];
    expected[9 * 4096..10 * 4096].fill(1);
    write(&group, volume.number, 9 * 4096, &[1; 4096]);
    fold(bench, &group, "first");
    let base = dir().join("base").join(format!("{}.img", volume.number));
    // A moment above the base.
    write(&group, volume.number, 20 * 4096, &[4; 4096]);
    expected[20 * 4096..21 * 4096].fill(4);
    write(&group, volume.number, 9 * 4096 + 512, &[2; 512]);
    expected[9 * 4096 + 512..][..512].fill(2);
    bench.pass(5);
    group.sync_now().unwrap();
    (group, volume, expected, base)
}

#[test]
fn a_fold_waits_for_a_repair_of_the_base_while_writers_have_room_and_what_it_leaves_has_changed() {
    let bench = Bench::new("a", 5);
    let (group, volume, mut expected, base) = rotted_base(&bench);
    join(&group, 7);
    group.sync_now().unwrap();
    let before = Lsn(group.positions().horizon.0 + 4096);
    bench.disk.damage(&base, 9 * 4096 + 100, 1, 1);
    assert!(matches!(group.fold_now(), Err(GroupError::Waits { .. })));
    assert!(!group.take_suspects().is_empty(), "a peer is asked");
    // Elsewhere, since a chunk has one birth.
    let other = group.create_volume(name("w"), BYTES).unwrap();
    press(&bench, &group, &other, &mut vec![0; BYTES as usize]);
    fold(&bench, &group, "pressed");
    check(&*group, &volume, &expected, &[9], "left");
    // A backup that has the block of before must not go on with it.
    let now = group.open_image(&Point::Now, None, "test", None).unwrap();
    let changed = now.changed_since(volume.number, before).unwrap();
    let holds = |(from, length): &(u64, u64)| (*from..from + length).contains(&(9 * 4096));
    assert!(changed.iter().any(holds), "{changed:?}");
    write(&group, volume.number, 9 * 4096, &[3; 4096]);
    expected[9 * 4096..10 * 4096].fill(3);
    fold(&bench, &group, "written anew");
    check(&*group, &volume, &expected, &[], "written anew");
}

#[test]
fn a_fold_waits_for_a_peer_that_may_have_what_has_rotted_until_writers_need_the_room() {
    let bench = Bench::new("a", 7);
    let (group, volume, mut expected, _) = rotted(&bench);
    join(&group, 7);
    set_policy(&group, 0, 4 * SEGMENT);
    bench.pass(5);
    group.sync_now().unwrap();
    let (horizon, mut told) = (group.positions().horizon, None);
    for round in 0..3 {
        group.fold_round(&mut told);
        assert_eq!(group.positions().horizon, horizon, "round {round}");
        let asked = group.take_suspects();
        assert!(asked.contains(&DamagedPart::Log { segment: 0 }), "round {round}: {asked:?}");
    }
    // It has not begun: the base is what it was.
    assert!(!group.base_is_in_work());
    assert_eq!(bench.said("fold-failed").len(), 1, "it is told once");
    let why = group.fold_failure().expect("status says so").reason;
    assert!(why.contains("payload checksum differs") && why.contains("repaired"), "{why}");
    press(&bench, &group, &volume, &mut expected);
    // Before the next round writers of a full log wait: they get room without a repair.
    if let Some(full) = group.log_full() {
        assert!(!full.reason.contains("refused"), "{}", full.reason);
    }
    group.fold_round(&mut told);
    assert!(group.positions().horizon > horizon && group.fold_failure().is_none());
    check(&*group, &volume, &expected, &ROTTED, "pressed");
}

#[test]
fn a_fold_waits_no_more_for_what_no_peer_has() {
    let bench = Bench::new("a", 8);
    let (group, volume, expected, _) = rotted(&bench);
    join(&group, 7);
    bench.pass(5);
    group.sync_now().unwrap();
    assert!(matches!(group.fold_now(), Err(GroupError::Waits { .. })));
    for part in group.take_suspects() {
        let DamagedPart::Log { segment } = part else { panic!("{part}") };
        group.note_nobody_has(segment);
    }
    fold(&bench, &group, "nobody has it");
    check(&*group, &volume, &expected, &ROTTED, "left");
    let chunk = DamagedPart::Base { volume: volume.number, chunk: 0 };
    assert!(group.take_suspects().contains(&chunk), "a peer may have the block in its base");
}

#[test]
fn a_fold_makes_a_checksum_of_the_base_right_that_has_rotted_and_keeps_the_block() {
    let bench = Bench::new("a", 6);
    let (group, volume, expected, base) = rotted_base(&bench);
    let sums = base.with_extension("sum");
    bench.disk.damage(&sums, crate::base::sum_offset(9), 1, 1);
    assert!(try_read(&*group, volume.number, 9 * 4096, 4096).is_err());
    fold(&bench, &group, "second");
    check(&*group, &volume, &expected, &[], "folded");
}

#[test]
fn a_crash_at_any_boundary_of_a_fold_over_rot_never_gives_it_a_good_checksum() {
    let bench = Bench::new("a", 2);
    let (group, volume, expected, _) = rotted(&bench);
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
            fold(&after, &group, &what);
            check(&*group, &volume, &expected, &ROTTED, &what);
        }
    }
}

#[test]
fn what_the_disk_cannot_read_of_the_log_is_given_up_only_where_writers_need_the_room() {
    let bench = Bench::new("a", 3);
    let group = bench.create();
    let volume = group.create_volume(name("v"), BYTES).unwrap();
    set_policy(&group, 0, 64 << 20);
    let mut expected = vec![0; BYTES as usize];
    let end = write(&group, volume.number, 0, &[1; 4096]);
    // Nothing behind it is written to its page.
    write(&group, volume.number, 4096, &[1; 4096]);
    expected[..8192].fill(1);
    bench.pass(5);
    group.sync_now().unwrap();
    let path = dir().join("log").join(segment_name(0));
    bench.disk.inject(Fault::Unreadable { path, offset: end.0 - 512, length: 512 });
    assert!(matches!(group.fold_now(), Err(GroupError::Waits { .. })));
    press(&bench, &group, &volume, &mut expected);
    assert!(group.log_full().is_some());
    assert!(matches!(group.fold_now(), Err(GroupError::Waits { .. })), "for some seconds");
    bench.pass(5);
    // What had begun is finished first, then the rest.
    group.fold_now().unwrap();
    check(&*group, &volume, &expected, &[0], "folded");
    bench.disk.clear_faults();
    check(&*group, &volume, &expected, &[0], "read again");
}

/// A group whose next fold has blocks of all kinds, what the volume is to hold, and its base.
fn of_all_kinds(bench: &Bench) -> (Arc<Group>, Volume, Vec<u8>) {
    let (group, volume, mut expected, _) = rotted_base(bench);
    let mut put = |offset: u64, data: &[u8]| {
        write(&group, volume.number, offset, data);
        expected[offset as usize..][..data.len()].copy_from_slice(data);
    };
    put(30 * 4096, &[5; 3 * 4096]);
    // A part of what its checksum is of, and a block in parts of which nothing is in the base.
    put(40 * 4096, &[6; 1024]);
    put(40 * 4096 + 512, &[7; 1024]);
    put(50 * 4096, &[8; 4096]);
    let zero = Op::Zero { offset: 50 * 4096 + 1024, length: 5 * 4096, no_hole: false };
    one(&group, volume.number, zero).unwrap();
    expected[50 * 4096 + 1024..][..5 * 4096].fill(0);
    bench.pass(5);
    group.sync_now().unwrap();
    (group, volume, expected)
}

/// All of it is there, and its checksums hold.
fn all_whole(group: &Group, volume: &Volume, expected: &[u8], what: &str) {
    check(group, volume, expected, &[], what);
    for base in group.bases.read().unwrap().values() {
        base.check(0, BYTES).unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

#[test]
fn a_read_that_fails_once_at_any_moment_of_a_fold_loses_nothing() {
    let mut failed = [0; 4];
    for (kind, (full, interrupted)) in
        [(false, false), (true, false), (true, true), (false, true)].into_iter().enumerate()
    {
        for read in 0.. {
            let bench = Bench::new("a", 14);
            let (group, volume, mut expected) = of_all_kinds(&bench);
            if full {
                press(&bench, &group, &volume, &mut expected);
                assert!(group.log_full().is_some());
            }
            if interrupted {
                let operation = bench.disk.operations() + 12;
                bench.disk.inject(Fault::Error { operation });
                group.fold_now().unwrap_err();
                assert!(group.lock().unfinished_fold.is_some());
                // Long ago, as for who measures from then.
                bench.pass(60);
            }
            let read = bench.disk.reads() + read;
            bench.disk.inject(Fault::UnreadOnce { read });
            let folded = if read.is_multiple_of(2) {
                group.fold_now().map(|_| ())
            } else {
                group.fold_all()
            };
            let what = format!("full {full}, interrupted {interrupted}, read {read}: {folded:?}");
            failed[kind] += usize::from(folded.is_err());
            let done = bench.disk.reads() <= read;
            fold(&bench, &group, &what);
            all_whole(&group, &volume, &expected, &what);
            if done {
                break;
            }
        }
    }
    assert!(failed.iter().all(|failed| *failed > 4), "{failed:?}");
}

#[test]
fn what_cannot_be_read_in_one_attempt_only_is_not_given_up_in_the_next_for_another_place() {
    let bench = Bench::new("a", 15);
    let (group, volume, mut expected) = of_all_kinds(&bench);
    press(&bench, &group, &volume, &mut expected);
    let base = dir().join("base").join(format!("{}.img", volume.number));
    for round in 0..6 {
        // Now the sums, now the block.
        let (path, offset) = match round % 2 {
            0 => (base.clone(), 9 * 4096),
            _ => (base.with_extension("sum"), crate::base::sum_offset(0)),
        };
        bench.disk.clear_faults();
        bench.disk.inject(Fault::Unreadable { path, offset, length: 512 });
        bench.pass(20);
        let waits = group.fold_now();
        assert!(matches!(waits, Err(GroupError::Waits { .. })), "round {round}: {waits:?}");
    }
    bench.disk.clear_faults();
    fold(&bench, &group, "readable");
    all_whole(&group, &volume, &expected, "readable");
}

#[test]
fn what_a_fold_without_space_has_torn_is_no_rot_to_its_next_round() {
    let mut again = 0;
    for operation in 0.. {
        let bench = Bench::new("a", 16);
        let (group, volume, expected, _) = rotted_base(&bench);
        // It is given up where space is short.
        let image = group.open_image(&Point::Now, None, "test", None).unwrap();
        write(&group, volume.number, 60 * 4096, &[1; 4096]);
        let mut expected = expected;
        expected[60 * 4096..61 * 4096].fill(1);
        bench.pass(5);
        group.sync_now().unwrap();
        let operation = bench.disk.operations() + operation;
        bench.disk.inject(Fault::Full { operation });
        let folded = group.fold_now();
        if group.data_state().0 == DataState::Failed {
            continue;
        }
        again += usize::from(folded.is_ok() && image.broken().is_some());
        let what = format!("operation {operation}: {folded:?}");
        let done = bench.disk.operations() <= operation;
        fold(&bench, &group, &what);
        all_whole(&group, &volume, &expected, &what);
        if done {
            break;
        }
    }
    assert!(again > 4, "{again}");
}

/// Blocks of the base cannot be read from here on: 9, of which the log has a part.
pub(super) fn unread(bench: &Bench, base: &Path) {
    let (path, offset) = (base.to_owned(), 9 * 4096 + 2048);
    bench.disk.inject(Fault::Unreadable { path, offset, length: 512 });
}

#[test]
fn what_the_disk_cannot_read_of_the_base_is_damage_and_is_given_up_where_writers_need_the_room() {
    for peer in [false, true] {
        let bench = Bench::new("a", 9);
        let (group, volume, mut expected, base) = rotted_base(&bench);
        if peer {
            join(&group, 7);
            group.sync_now().unwrap();
        }
        unread(&bench, &base);
        let read = try_read(&*group, volume.number, 9 * 4096, 4096);
        assert!(matches!(read, Err(GroupError::Damaged { .. })), "{read:?}");
        let chunk = DamagedPart::Base { volume: volume.number, chunk: 0 };
        assert!(group.take_suspects().contains(&chunk), "who reads has a peer asked");
        let waits = group.fold_now();
        assert!(matches!(waits, Err(GroupError::Waits { .. })), "{waits:?}");
        assert!(group.take_suspects().contains(&chunk), "so has a fold");
        let other = group.create_volume(name("w"), BYTES).unwrap();
        press(&bench, &group, &other, &mut vec![0; BYTES as usize]);
        fold(&bench, &group, "pressed");
        check(&*group, &volume, &expected, &[9], "left");
        let [said] = &bench.said("log-damaged")[..] else { panic!("it is told once") };
        assert!(said.contains("volume v at 36864"), "{said}");
        // The write has given the sector another place.
        bench.disk.clear_faults();
        check(&*group, &volume, &expected, &[9], "readable");
        write(&group, volume.number, 9 * 4096 + 3072, &[7; 512]);
        fold(&bench, &group, "another part");
        check(&*group, &volume, &expected, &[9], "another part");
        write(&group, volume.number, 9 * 4096, &[3; 4096]);
        expected[9 * 4096..10 * 4096].fill(3);
        fold(&bench, &group, "written anew");
        check(&*group, &volume, &expected, &[], "written anew");
    }
}

#[test]
fn a_base_that_cannot_be_read_again_at_once_is_left_to_the_next_fold() {
    let bench = Bench::new("a", 10);
    let (group, volume, expected, base) = rotted_base(&bench);
    unread(&bench, &base);
    assert!(matches!(group.fold_now(), Err(GroupError::Waits { .. })));
    bench.disk.clear_faults();
    fold(&bench, &group, "readable");
    check(&*group, &volume, &expected, &[], "nothing is lost");
    // Who replaces it gives it up without a wait.
    write(&group, volume.number, 9 * 4096 + 512, &[8; 512]);
    unread(&bench, &base);
    group.fold_all().unwrap();
    check(&*group, &volume, &expected, &[9], "given up");
}

#[test]
fn a_disk_that_takes_no_write_either_has_failed() {
    let mut failed = 0;
    for operation in 0..60 {
        let bench = Bench::new("a", 11);
        let (group, volume, expected, base) = rotted_base(&bench);
        unread(&bench, &base);
        let operation = bench.disk.operations() + operation;
        bench.disk.inject(Fault::FailedSync { operation });
        let _ = group.fold_all();
        failed += usize::from(group.data_state().0 == DataState::Failed);
        bench.disk.clear_faults();
        drop(group);
        let (group, _) = bench.open();
        fold(&bench, &group, "after it");
        let found = try_read(&*group, volume.number, 9 * 4096, 4096);
        let whole = found.is_ok_and(|found| found == expected[9 * 4096..][..4096]);
        check(&*group, &volume, &expected, if whole { &[] } else { &[9] }, "after it");
    }
    assert!(failed > 2, "{failed}");
}

#[test]
fn rot_at_any_moment_of_a_fold_never_gets_a_good_checksum_by_another_attempt() {
    let mut rotted = 0;
    for operation in 0.. {
        let bench = Bench::new("a", 12);
        let (group, volume, expected, base) = rotted_base(&bench);
        let (path, offset) = (base, 9 * 4096 + 100);
        let operation = bench.disk.operations() + operation;
        bench.disk.inject(Fault::Rot { operation, path, offset });
        let folded = group.fold_now();
        let done = bench.disk.operations() <= operation;
        let what = format!("operation {operation}: {folded:?}");
        fold(&bench, &group, &what);
        match try_read(&*group, volume.number, 9 * 4096, 4096) {
            Ok(found) => assert!(found == expected[9 * 4096..][..4096], "{what}: rot is blessed"),
            Err(_) => rotted += 1,
        }
        assert!(folded.is_ok(), "{what}");
        if done {
            break;
        }
    }
    assert!(rotted > 4, "{rotted}");
}

#[test]
fn a_sector_of_sums_that_cannot_be_read_holds_no_fold_up_for_good_and_the_blocks_prove_it() {
    let bench = Bench::new("a", 13);
    let (group, volume, expected, base) = rotted_base(&bench);
    let (path, offset) = (base.with_extension("sum"), crate::base::sum_offset(0));
    bench.disk.inject(Fault::Unreadable { path, offset, length: 512 });
    assert!(matches!(group.fold_now(), Err(GroupError::Waits { .. })));
    let chunk = DamagedPart::Base { volume: volume.number, chunk: 0 };
    assert!(group.take_suspects().contains(&chunk));
    let other = group.create_volume(name("w"), BYTES).unwrap();
    press(&bench, &group, &other, &mut vec![0; BYTES as usize]);
    fold(&bench, &group, "pressed");
    check(&*group, &volume, &expected, &[], "nothing is lost");
    for base in group.bases.read().unwrap().values() {
        base.check(0, BYTES).unwrap();
    }
}
