//! Folds that wait for what the disk cannot read, and go on.

use super::fold_damage::{BYTES, check, fold, press, rotted_base, unread};
use super::*;
use crate::io::Fault;
use crate::log::segment::segment_name;

/// A part of a write of the log, which ends there, cannot be read.
fn unreadable(bench: &Bench, end: Lsn) {
    let path = dir().join("log").join(segment_name(end.segment_number(SEGMENT)));
    let offset = Lsn(end.0 - 512).segment_offset(SEGMENT);
    bench.disk.inject(Fault::Unreadable { path, offset, length: 512 });
}

/// Folds, which is to wait for ten seconds and no longer, however much cannot be read.
fn fold_after_ten_seconds(bench: &Bench, group: &Group) {
    for round in 0..2 {
        let waits = group.fold_now();
        assert!(matches!(waits, Err(GroupError::Waits { .. })), "round {round}: {waits:?}");
        bench.pass(5);
    }
    group.fold_now().unwrap();
}

#[test]
fn all_that_cannot_be_read_is_waited_for_at_the_same_time_wherever_it_lies() {
    let bench = Bench::new("a", 1);
    let group = bench.create();
    let volumes = ["v", "w"].map(|text| group.create_volume(name(text), BYTES).unwrap());
    set_policy(&group, 0, 64 << 20);
    let mut expected = [vec![0; BYTES as usize], vec![0; BYTES as usize]];
    let mut ends = Vec::new();
    for (volume, expected) in volumes.iter().zip(&mut expected) {
        let mut put = |offset: u64, data: &[u8]| {
            expected[offset as usize..][..data.len()].copy_from_slice(data);
            write(&group, volume.number, offset, data)
        };
        // Far from each other, and two parts of one block.
        let lost: [(u64, &[u8]); 5] = [
            (2 * 4096, &[1; 4096]),
            (4 * 4096, &[2; 4096]),
            (6 * 4096, &[3; 1024]),
            (6 * 4096 + 2048, &[4; 1024]),
            (8 * 4096, &[5; 4096]),
        ];
        for (index, (offset, data)) in lost.into_iter().enumerate() {
            ends.push(put(offset, data));
            put((20 + 2 * index as u64) * 4096, &[6; 4096]);
        }
    }
    bench.pass(5);
    group.sync_now().unwrap();
    ends.into_iter().for_each(|end| unreadable(&bench, end));
    let [v, w] = &volumes;
    press(&bench, &group, v, &mut expected[0]);
    assert!(group.log_full().is_some());
    fold_after_ten_seconds(&bench, &group);
    bench.disk.clear_faults();
    check(&*group, v, &expected[0], &[2, 4, 6, 8], "v");
    check(&*group, w, &expected[1], &[2, 4, 6, 8], "w");
}

#[test]
fn all_of_two_bases_that_cannot_be_read_is_waited_for_at_the_same_time() {
    let bench = Bench::new("a", 2);
    let group = bench.create();
    let volumes = ["v", "w"].map(|text| group.create_volume(name(text), BYTES).unwrap());
    set_policy(&group, 0, 64 << 20);
    let mut expected = [vec![1; BYTES as usize], vec![0; BYTES as usize]];
    for volume in &volumes {
        write(&group, volume.number, 0, &vec![1; BYTES as usize]);
    }
    expected[1].fill(1);
    fold(&bench, &group, "first");
    for (volume, expected) in volumes.iter().zip(&mut expected) {
        write(&group, volume.number, 9 * 4096 + 512, &[2; 512]);
        expected[9 * 4096 + 512..][..512].fill(2);
        unread(&bench, &dir().join("base").join(format!("{}.img", volume.number)));
    }
    press(&bench, &group, &volumes[0], &mut expected[0]);
    fold_after_ten_seconds(&bench, &group);
    for (volume, expected) in volumes.iter().zip(&expected) {
        check(&*group, volume, expected, &[9], "given up");
    }
}

/// The next fold waits for a write of the log, of block 40, and does all else.
fn wait_for(bench: &Bench, group: &Arc<Group>, volume: &Volume, expected: &mut [u8]) {
    let end = write(group, volume.number, 40 * 4096, &[5; 4096]);
    expected[40 * 4096..41 * 4096].fill(5);
    bench.pass(5);
    group.sync_now().unwrap();
    unreadable(bench, end);
}

#[test]
fn what_rots_in_the_base_while_a_fold_waits_never_gets_a_good_checksum_when_it_goes_on() {
    for (attempts, crashes) in [(1, false), (3, false), (1, true)] {
        let bench = Bench::new("a", 3);
        let (mut group, volume, mut expected, base) = rotted_base(&bench);
        wait_for(&bench, &group, &volume, &mut expected);
        for _ in 0..attempts {
            let waits = group.fold_now();
            assert!(matches!(waits, Err(GroupError::Waits { .. })), "{waits:?}");
        }
        assert!(group.base_is_in_work(), "it has begun");
        if crashes {
            bench.disk.clear_faults();
            drop(group);
            group = bench.open().0;
            fold(&bench, &group, "taken up");
            check(&*group, &volume, &expected, &[], "taken up");
            continue;
        }
        bench.disk.damage(&base, 9 * 4096 + 100, 1, 1);
        bench.disk.clear_faults();
        fold(&bench, &group, "readable");
        check(&*group, &volume, &expected, &[9], "it went on");
        assert!(!group.base_is_in_work());
    }
}

#[test]
fn what_rots_of_a_block_that_a_waiting_fold_has_not_written_never_gets_a_good_checksum() {
    let bench = Bench::new("a", 4);
    let (group, volume, mut expected, base) = rotted_base(&bench);
    // The log's part of the block itself is waited for.
    let end = write(&group, volume.number, 9 * 4096 + 2048, &[7; 1024]);
    expected[9 * 4096 + 2048..][..1024].fill(7);
    write(&group, volume.number, 50 * 4096, &[8; 4096]);
    expected[50 * 4096..51 * 4096].fill(8);
    bench.pass(5);
    group.sync_now().unwrap();
    unreadable(&bench, end);
    assert!(matches!(group.fold_now(), Err(GroupError::Waits { .. })));
    assert!(group.base_is_in_work(), "it has begun");
    bench.disk.damage(&base, 9 * 4096 + 100, 1, 1);
    bench.disk.clear_faults();
    fold(&bench, &group, "readable");
    check(&*group, &volume, &expected, &[9], "it went on");
}

#[test]
fn a_block_that_a_waiting_fold_wrote_over_rot_in_the_log_is_whole_once_that_is_repaired() {
    for repaired in [true, false] {
        let bench = Bench::new("a", 5);
        let (group, volume, mut expected, _) = rotted_base(&bench);
        let end = write(&group, volume.number, 9 * 4096 + 2048, &[7; 1024]);
        expected[9 * 4096 + 2048..][..1024].fill(7);
        wait_for(&bench, &group, &volume, &mut expected);
        let file = dir().join("log").join(segment_name(end.segment_number(SEGMENT)));
        let rot = || {
            bench.disk.damage(&file, Lsn(end.0 - 100).segment_offset(SEGMENT), 1, 0x10);
        };
        rot();
        for _ in 0..2 {
            assert!(matches!(group.fold_now(), Err(GroupError::Waits { .. })));
        }
        assert!(group.base_is_in_work(), "it has begun");
        if repaired {
            rot();
        }
        bench.disk.clear_faults();
        fold(&bench, &group, "readable");
        let rotted: &[u64] = if repaired { &[] } else { &[9] };
        check(&*group, &volume, &expected, rotted, "it went on");
        // Its checksum is that of the whole block, by which a peer's would be proved.
        let base = group.base_of(volume.number).unwrap();
        let whole = crate::log::record::crc32(&expected[9 * 4096..10 * 4096]);
        let read = base.read(9 * 4096, &mut [0; 4096]);
        match read {
            Ok(()) => assert!(repaired),
            Err(crate::base::BaseError::Damaged { expected, .. }) => assert_eq!(expected, whole),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_fold_that_waits_does_not_begin_anew_with_each_report_of_a_peer_or_wish_of_a_writer() {
    let bench = Bench::new("a", 6);
    let (group, volume, mut expected, _) = rotted_base(&bench);
    wait_for(&bench, &group, &volume, &mut expected);
    assert!(matches!(group.fold_now(), Err(GroupError::Waits { .. })));
    let before = bench.disk.operations();
    group.fold_round(&mut None);
    let each = bench.disk.operations() - before;
    assert!(each > 0 && group.fold_failure().is_some());
    group.start_workers();
    let before = bench.disk.operations();
    for round in 0..100 {
        group.note_peer_needs(NodeId([9; 16]), group.positions().head, true);
        // As one that waits for a peer.
        if round % 2 == 0 {
            group.note_nobody_has(1 << 40);
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
    let attempts = (bench.disk.operations() - before) / each;
    assert!((1..5).contains(&attempts), "{attempts} in two seconds");
    bench.disk.clear_faults();
    group.close().unwrap();
}
