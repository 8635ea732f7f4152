//! Sums and slots of a base that the disk cannot read: no fold and no start hangs on them for good.

use super::fold_damage::press;
use super::resync::{Pair, same};
use super::*;
use crate::io::Fault;

const CHUNK: u64 = 1 << 20;
const VOLUME: u64 = 3 * CHUNK;

/// Places of a sidecar: the slots, and sums of the second chunk and of the third.
fn places() -> [u64; 3] {
    [crate::base::sum_offset(0) - 4096, crate::base::sum_offset(256), crate::base::sum_offset(512)]
}

fn unreadable(bench: &Bench, volume: VolumeNumber, offset: u64) {
    let path = dir().join("base").join(format!("{volume}.sum"));
    bench.disk.inject(Fault::Unreadable { path, offset, length: 512 });
}

/// A volume of which all is in the base.
fn folded(bench: &Bench) -> (Arc<Group>, Volume, Vec<u8>) {
    let group = bench.create();
    let volume = group.create_volume(name("v"), VOLUME).unwrap();
    set_policy(&group, 0, 64 << 20);
    let data: Vec<u8> = (0..VOLUME).map(|at| (at / 4096 % 251) as u8 | 1).collect();
    write(&group, volume.number, 0, &data);
    fold(bench, &group).unwrap();
    (group, volume, data)
}

fn fold(bench: &Bench, group: &Group) -> Result<Lsn, GroupError> {
    bench.pass(5);
    group.sync_now().unwrap();
    group.fold_now()
}

/// Folds, where writers need the room, in a few attempts.
fn fold_pressed(bench: &Bench, group: &Arc<Group>, what: &str) {
    let other = group.create_volume(name("other"), CHUNK).unwrap();
    press(bench, group, &other, &mut vec![0; CHUNK as usize]);
    for _ in 0..5 {
        let _ = fold(bench, group);
    }
    fold(bench, group).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(group.positions().horizon, group.positions().head, "{what}");
}

/// Something of the next fold.
type Act = fn(&Arc<Group>, &Volume, &mut Vec<u8>);

fn trim(group: &Arc<Group>, volume: &Volume, data: &mut [u8], offset: u64, length: u64) {
    one(group, volume.number, Op::Trim { offset, length }).unwrap();
    data[offset as usize..][..length as usize].fill(0);
}

const ACTS: [(&str, Act); 7] = [
    ("whole chunks become zeros", |group, volume, data| {
        trim(group, volume, data, CHUNK, 2 * CHUNK);
    }),
    ("parts of chunks become zeros", |group, volume, data| {
        trim(group, volume, data, CHUNK + 8192, CHUNK);
    }),
    ("parts of blocks become zeros", |group, volume, data| {
        trim(group, volume, data, CHUNK + 512, CHUNK);
    }),
    ("blocks are written", |group, volume, data| {
        for offset in [CHUNK, 2 * CHUNK] {
            write(group, volume.number, offset, &[9; 8192]);
            data[offset as usize..][..8192].fill(9);
        }
    }),
    ("nothing stays of what was written", |group, volume, _| {
        let before = group.positions().head;
        for offset in [CHUNK, 2 * CHUNK] {
            write(group, volume.number, offset, &[9; 8192]);
        }
        group.rewind(&Point::Lsn(before), false).unwrap();
    }),
    ("it shrinks", |group, volume, data| {
        data.truncate(2 * CHUNK as usize + 40_960);
        group.resize_volume(&volume.name, data.len() as u64).unwrap();
    }),
    ("it grows", |group, volume, data| {
        data.resize(3 * CHUNK as usize + 40_960, 0);
        group.resize_volume(&volume.name, data.len() as u64).unwrap();
    }),
];

#[test]
fn sums_that_cannot_be_read_hold_up_no_fold_for_good_whatever_it_does_and_nothing_is_lost() {
    let mut waited = 0;
    for (text, act) in ACTS {
        for place in places() {
            let what = format!("{text}, place {place}");
            let bench = Bench::new("a", 1);
            let (group, volume, mut data) = folded(&bench);
            act(&group, &volume, &mut data);
            unreadable(&bench, volume.number, place);
            match fold(&bench, &group) {
                Ok(_) => {}
                Err(GroupError::Waits { .. }) => {
                    waited += 1;
                    assert!(!group.base_is_in_work(), "{what}: it has not begun");
                }
                Err(error) => panic!("{what}: {error}"),
            }
            fold_pressed(&bench, &group, &what);
            // What it did not touch may be unreadable still.
            bench.disk.clear_faults();
            assert!(read(&*group, volume.number, 0, data.len()) == data, "{what}");
        }
    }
    assert!(waited > 12, "{waited}");
}

#[test]
fn sums_that_a_power_loss_in_a_fold_made_unreadable_hold_it_up_not_for_good() {
    let bench = Bench::new("a", 2);
    let (group, volume, mut data) = folded(&bench);
    let before = data.clone();
    trim(&group, &volume, &mut data, 0, CHUNK);
    trim(&group, &volume, &mut data, 2 * CHUNK + 4096, 8192);
    for offset in [CHUNK + 512, 2 * CHUNK + 512] {
        write(&group, volume.number, offset, &[9; 12_288]);
        data[offset as usize..][..12_288].fill(9);
    }
    bench.pass(5);
    group.sync_now().unwrap();
    bench.disk.record();
    group.fold_now().unwrap();
    let (mut resumed, mut lost) = (0, 0);
    for (boundary, disk) in bench.disk.take_recorded().into_iter().enumerate() {
        for place in places() {
            let what = format!("boundary {boundary}, place {place}");
            let disk = Arc::new(disk.crash(boundary as u64));
            let after = Bench { disk, ..bench.after_crash(0) };
            unreadable(&after, volume.number, place);
            let opened = Group::open(after.context(), &dir());
            let (group, _) = opened.unwrap_or_else(|error| panic!("{what}: {error}"));
            resumed += u32::from(group.base_is_in_work());
            fold_pressed(&after, &group, &what);
            after.disk.clear_faults();
            let mut errors = Vec::new();
            for (at, expected) in data.chunks_exact(4096).enumerate() {
                match try_read(&*group, volume.number, at as u64 * 4096, 4096) {
                    Ok(found) => assert!(found == expected, "{what}: block {at}"),
                    Err(GroupError::Damaged { .. }) => errors.push(at as u64),
                    Err(error) => panic!("{what}: block {at}: {error}"),
                }
            }
            lost += errors.len();
            for block in errors {
                let at = block as usize * 4096;
                write(&group, volume.number, block * 4096, &before[at..at + 4096]);
            }
            fold(&after, &group).unwrap();
            read(&*group, volume.number, 0, data.len());
        }
    }
    assert!(resumed > 10, "{resumed}");
    assert!(lost < 3000, "slots prove what was not at work: {lost}");
}

#[test]
fn a_copy_opens_whatever_cannot_be_read_of_the_sums_below_an_image_that_it_was_switched_to() {
    for place in places() {
        let what = format!("place {place}");
        let mut pair = Pair::new(3);
        let volume = pair.primary.create_volume(name("v"), VOLUME).unwrap();
        write(&pair.primary, volume.number, 0, &vec![1; VOLUME as usize]);
        pair.follow();
        pair.there.pass(5);
        pair.copy.fold_now().unwrap();
        let mut data = vec![1; VOLUME as usize];
        trim(&pair.primary, &volume, &mut data, CHUNK, CHUNK);
        trim(&pair.primary, &volume, &mut data, 2 * CHUNK + 8192, 8192);
        write(&pair.primary, volume.number, 2 * CHUNK, &[5; 4096]);
        pair.primary.resize_volume(&volume.name, VOLUME - 40_960).unwrap();
        pair.fold();
        let head = pair.copy.positions().head;
        let sent = super::resync::send(&pair.primary, &pair.copy, Some(head), head, usize::MAX);
        assert!(sent, "{what}");
        pair.copy.switch_to_image().unwrap();
        assert!(pair.copy.merging().is_some_and(|merging| merging.is_partial()), "{what}");
        pair.primary.end_shipment(&name("b"));
        pair.there = pair.there.after_crash(4);
        unreadable(&pair.there, volume.number, place);
        let opened = Group::open(pair.there.context(), &dir());
        pair.copy = opened.unwrap_or_else(|error| panic!("{what}: {error}")).0;
        same(&pair.primary, &pair.copy, &what);
    }
}

/// Only the slots at the edges of what becomes zeros had been looked at, and all of them are read.
#[test]
fn a_sector_of_slots_in_the_middle_of_what_becomes_zeros_holds_up_no_fold() {
    let bench = Bench::new("a", 1);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 256 * CHUNK).unwrap();
    set_policy(&group, 0, 64 << 20);
    write(&group, volume.number, 100 * CHUNK, &[7; 4096]);
    fold(&bench, &group).unwrap();
    unreadable(&bench, volume.number, places()[0] + 1024);
    one(&group, volume.number, Op::Trim { offset: 0, length: 256 * CHUNK }).unwrap();
    fold_pressed(&bench, &group, "slots in the middle");
    assert_eq!(read(&*group, volume.number, 100 * CHUNK, 4096), [0; 4096]);
}
