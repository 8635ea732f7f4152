//! Files of the base that the disk lost, in whole or in part.

use std::path::Path;

use super::moments::{at_pin, fold, group_with_volume};
use super::repair::Pair;
use super::scrub::{base_file, damaged, layered};
use super::*;
use crate::base::ControlState;
use crate::io::{Fault, OpenMode};
use crate::log::control::{BookmarkRecord, Consistency};

const BLOCKS: u64 = (3 << 20) / 4096;

/// What is lost of a file.
#[derive(Clone, Copy, Debug)]
enum Loss {
    All,
    /// What is behind so many bytes.
    Behind(u64),
}

fn lose(bench: &Bench, file: &Path, loss: Loss) {
    match loss {
        Loss::All => bench.disk.remove(file).unwrap(),
        Loss::Behind(bytes) => {
            let file = bench.disk.open(file, OpenMode::ReadWrite).unwrap();
            assert!(file.len().unwrap() > bytes);
            file.set_len(bytes).unwrap();
            file.sync().unwrap();
        }
    }
    bench.disk.sync_dir(file.parent().unwrap()).unwrap();
}

/// Blocks that cannot be read; the others are as they should be.
fn errors(group: &Group, volume: &Volume, expected: &[u8]) -> usize {
    let mut errors = 0;
    for block in 0..BLOCKS {
        match try_read(group, volume.number, block * 4096, 4096) {
            Ok(got) => assert!(got == expected[block as usize * 4096..][..4096], "block {block}"),
            Err(GroupError::Damaged { .. }) => errors += 1,
            Err(other) => panic!("block {block}: {other}"),
        }
    }
    errors
}

#[test]
fn a_file_of_the_base_that_is_lost_is_an_error_for_who_reads_it_and_never_zeros() {
    let (image, sums) = ("img", "sum");
    let losses: [(&[&str], Loss, bool); 6] = [
        (&[image], Loss::All, true),
        (&[sums], Loss::All, true),
        (&[image, sums], Loss::All, false),
        (&[image], Loss::Behind(20 << 10), true),
        (&[sums], Loss::Behind(8192 + 1024 + 512), true),
        (&[sums], Loss::Behind(17), true),
    ];
    for (files, loss, provable) in losses {
        let mut pair = Pair::new(7);
        let volume = pair.volume.clone();
        let expected = read(&*pair.primary, volume.number, 0, 3 << 20);
        drop(pair.copy);
        for file in files {
            lose(&pair.b, &base_file(&volume, file), loss);
        }
        let b = pair.b.after_crash(3);
        let (copy, _) = b.open();
        assert!(errors(&copy, &volume, &expected) > 0, "{files:?} {loss:?}");
        let said = b.said("base-lost");
        assert!(said.len() == 1 && files.iter().all(|file| said[0].contains(file)), "{said:?}");
        pair.copy = copy;
        // With one of block and sum left, a peer's block is the second that says so.
        assert_eq!(pair.repair_base(), provable, "{files:?} {loss:?}");
        assert_eq!(errors(&pair.copy, &volume, &expected) == 0, provable, "{files:?} {loss:?}");
        // It is told once, and stays an error.
        drop(pair.copy);
        let again = b.after_crash(4);
        let (copy, _) = again.open();
        assert_eq!(again.said("base-lost"), Vec::<String>::new());
        assert_eq!(errors(&copy, &volume, &expected) == 0, provable, "{files:?} {loss:?}");
    }
}

/// A moment shows a volume that is gone since, and the disk loses its base.
#[test]
fn a_base_that_only_an_old_moment_shows_is_not_zeros_where_it_is_lost() {
    let bench = Bench::new("a", 7);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &[1; 8192]);
    fold(&bench, &group);
    group.pin_bookmark(name("pin"), Consistency::Crash).unwrap();
    group.remove_volume(&name("v")).unwrap();
    for _ in 0..2 {
        group.create_volume(name("w"), 1 << 20).unwrap();
        group.remove_volume(&name("w")).unwrap();
        fold(&bench, &group);
    }
    group.close().unwrap();
    drop(group);
    let image = dir().join("base").join(format!("{volume}.img"));
    lose(&bench, &image, Loss::All);
    let (group, _) = bench.open();
    assert_eq!(bench.said("base-lost").len(), 1);
    let at = at_pin(&group, "pin").unwrap();
    assert!(matches!(try_read(&*at, volume, 0, 4096), Err(GroupError::Damaged { .. })));
    assert!(read(&*at, volume, 1 << 20, 4096) == [0; 4096]);
    // Nobody needs it any more: nothing of it is missed.
    group.close_this_image(&at).unwrap();
    let pins = group.control().bookmarks.clone();
    for pin in pins.iter().filter(|pin| pin.pinned) {
        let removed = BookmarkRecord { removed: true, ..pin.clone() };
        group.append_control(Control::Bookmark(removed)).unwrap();
    }
    fold(&bench, &group);
    assert!(!bench.disk.exists(&image).unwrap());
    group.close().unwrap();
    drop((at, group));
    bench.open();
    assert_eq!(bench.said("base-lost").len(), 1);
}

#[test]
fn a_fold_goes_on_over_a_base_that_was_lost_and_what_hosts_write_anew_is_whole() {
    let pair = Pair::new(8);
    let volume = pair.volume.clone();
    drop(pair.copy);
    drop(pair.primary);
    for file in ["img", "sum"] {
        lose(&pair.a, &base_file(&volume, file), Loss::All);
    }
    let a = pair.a.after_crash(3);
    let (group, _) = a.open();
    group.serve().unwrap();
    let data: Vec<u8> = (0..3 << 20).map(|at: u32| (at / 4096) as u8 | 1).collect();
    for offset in (0..3 << 20).step_by(64 << 10) {
        write(&group, volume.number, offset, &data[offset as usize..][..64 << 10]);
    }
    a.pass(5);
    group.sync_now().unwrap();
    group.fold_now().unwrap();
    assert_eq!(errors(&group, &volume, &data), 0);
    drop(group);
    let a = a.after_crash(4);
    let (group, _) = a.open();
    assert_eq!(errors(&group, &volume, &data), 0);
    assert_eq!(a.said("base-lost"), Vec::<String>::new());
}

#[test]
fn what_is_lost_of_an_image_while_a_fold_is_at_work_is_never_made_to_look_whole() {
    for operation in 0.. {
        let bench = Bench::new("a", 10);
        let (group, volume) = layered(&bench);
        // A part of a block of which the rest is in the base alone.
        write(&group, volume.number, 5 * 4096 + 512, &[9; 512]);
        bench.pass(4000);
        group.sync_now().unwrap();
        let expected = read(&*group, volume.number, 0, 3 << 20);
        let begun = bench.disk.operations();
        bench.disk.inject(Fault::PowerOff { operation: begun + operation });
        if group.fold_now().is_ok() {
            assert!(operation > 15, "{operation} boundaries were tried");
            break;
        }
        drop(group);
        for loss in [Loss::All, Loss::Behind(20 << 10)] {
            let crashed = bench.after_crash(operation);
            lose(&crashed, &base_file(&volume, "img"), loss);
            let (group, _) = crashed.open();
            // What had begun is finished.
            errors(&group, &volume, &expected);
            group.serve().unwrap();
            group.fold_now().unwrap();
            assert!(errors(&group, &volume, &expected) > 0, "operation {operation}: {loss:?}");
            drop(group);
            let (group, _) = crashed.open();
            assert!(errors(&group, &volume, &expected) > 0, "operation {operation}: {loss:?}");
        }
    }
}

#[test]
fn a_fold_into_a_chunk_whose_sums_are_lost_leaves_a_peer_the_repair_of_the_others() {
    let bench = Bench::new("a", 11);
    let (group, volume) = layered(&bench);
    drop(group);
    lose(&bench, &base_file(&volume, "sum"), Loss::All);
    let (group, _) = bench.open();
    group.serve().unwrap();
    write(&group, volume.number, 40 * 4096, &[9; 4096]);
    bench.pass(4000);
    group.sync_now().unwrap();
    group.fold_now().unwrap();
    let mut expected = vec![1; 3 << 20];
    expected[64 << 10..192 << 10].fill(2);
    expected[192 << 10..].fill(0);
    expected[40 * 4096..41 * 4096].fill(9);
    assert!(errors(&group, &volume, &expected) > 0);
    for chunk in 0..3 {
        let wanted = group.wanted_blocks(volume.number, chunk).into_iter();
        let wanted = wanted.flat_map(|wanted| wanted.blocks);
        let theirs = |block: u64| expected[block as usize * 4096..][..4096].to_vec();
        let blocks = wanted.map(|block| (block, theirs(block))).collect();
        group.mend_base(volume.number, chunk, &blocks).unwrap();
    }
    assert_eq!(errors(&group, &volume, &expected), 0);
    assert_eq!(damaged(&group), []);
}

#[test]
fn a_base_whose_control_state_is_lost_or_old_is_not_opened() {
    let pair = Pair::new(9);
    drop(pair.copy);
    let control = dir().join("base").join("control");
    let whole = ControlState::load(&*pair.b.disk, &dir().join("base")).unwrap();
    let older = ControlState { position: Default::default(), ..whole };
    lose(&pair.b, &control, Loss::All);
    let refused = |why: &str| {
        let error = Group::open(pair.b.context(), &dir()).err().expect("it is not opened");
        assert!(error.to_string().contains(why), "{error}");
    };
    refused("the disk lost the newer file");
    older.store(&*pair.b.disk, &dir().join("base")).unwrap();
    refused("the disk lost the newer file");
}

/// What the memory knows was read back from the disk, after the base had been written: from then on
/// nothing was folded, and the group did not open any more.
#[test]
fn a_control_state_that_rotted_is_written_anew_by_the_next_fold() {
    let bench = Bench::new("a", 1);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &[1; 8192]);
    fold(&bench, &group);
    let path = dir().join("base/control");
    let file = bench.disk.open(&path, OpenMode::ReadWrite).unwrap();
    file.write_at(&[std::io::IoSlice::new(b"rotten")], 3).unwrap();
    write(&group, volume, 4096, &[2; 4096]);
    fold(&bench, &group);
    drop(group);
    let (group, _) = bench.open();
    assert!(read(&*group, volume, 0, 8192) == [[1; 4096], [2; 4096]].concat());
}
