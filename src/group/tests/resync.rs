//! A copy that is brought up by an image: whatever the primary did since, whatever stops it on the
//! way, the copy shows its old image or the new one, and then follows the log.

use super::dated::Past;
use super::*;
use crate::io::{Fault, seeds};
use crate::log::control::Consistency;
use crate::units::{BLOCK_BYTES, CHUNK_BYTES};

const VOLUME: u64 = 3 << 20;

/// A primary with a volume of its own model, and a copy on another node.
pub(super) struct Pair {
    pub here: Bench,
    pub there: Bench,
    pub primary: Arc<Group>,
    pub copy: Arc<Group>,
}

fn b() -> Name {
    name("b")
}

impl Pair {
    pub(super) fn new(seed: u64) -> Pair {
        let (here, there) = (Bench::new("a", seed), Bench::new("b", seed + 1000));
        let primary = here.create();
        set_policy(&primary, 0, 1 << 20);
        let copy = there.create_copy();
        Pair { here, there, primary, copy }
    }

    pub(super) fn follow(&self) -> bool {
        follow(&self.primary, &self.copy)
    }

    pub(super) fn fold(&self) {
        self.here.pass(5);
        self.primary.sync_now().unwrap();
        self.primary.fold_now().unwrap();
    }

    /// The copy lies below the log: it is sent an image, as far as `parts` goes.
    fn send(&self, parts: usize) -> bool {
        let since = self.copy.positions().head;
        send(&self.primary, &self.copy, (since > Lsn::ZERO).then_some(since), since, parts)
    }

    fn resync(&self) {
        assert!(self.send(usize::MAX));
        self.copy.switch_to_image().unwrap();
        self.primary.end_shipment(&b());
    }

    fn check(&self, what: &str) {
        same(&self.primary, &self.copy, what);
    }

    /// The node of the copy loses its power and starts again.
    pub(super) fn restart_copy(&mut self, seed: u64) {
        self.there = self.there.after_crash(seed);
        self.copy = self.there.open().0;
    }
}

/// Whether it came by the log alone: a copy that has folded too far to go back as the primary did
/// is brought up by an image.
pub(super) fn follow(primary: &Group, copy: &Group) -> bool {
    let from = copy.received_end();
    assert!(from >= primary.log_start(), "{from} is not in the log");
    let head = primary.positions().head;
    let mut bytes = vec![0; head.bytes_since(from) as usize];
    primary.read_log(from, &mut bytes).unwrap();
    for part in bytes.chunks(50_000) {
        if let Err(error) = copy.append_received(copy.received_end(), part) {
            assert!(copy.needs_image().is_some(), "{error}");
            let head = copy.positions().head;
            primary.end_shipment(&b());
            assert!(send(primary, copy, Some(head), head, usize::MAX));
            copy.switch_to_image().unwrap();
            primary.end_shipment(&b());
            follow(primary, copy);
            return false;
        }
    }
    copy.note_committed(primary.positions().durable);
    copy.sync_now().unwrap();
    true
}

pub(super) fn send(
    primary: &Group,
    copy: &Group,
    since: Option<Lsn>,
    common: Lsn,
    parts: usize,
) -> bool {
    let staged = copy.staged().unwrap();
    let shipment = primary.ship(&b(), since, common, staged.as_ref()).unwrap();
    let offer = shipment.offer();
    copy.begin_image(&offer).unwrap();
    let mut done = offer.done_bytes;
    for _ in 0..parts {
        let Some(part) = shipment.next().unwrap() else { return true };
        let progress = copy.stage(part).unwrap();
        assert!(progress.done_bytes >= done, "progress never runs backwards");
        assert!(progress.total_bytes >= progress.done_bytes);
        done = progress.done_bytes;
    }
    false
}

pub(super) fn all(group: &Group) -> Vec<(Volume, Vec<u8>)> {
    let volumes = group.volumes().into_iter();
    volumes
        .map(|volume| {
            let bytes = read(group, volume.number, 0, volume.size_bytes as usize);
            (volume, bytes)
        })
        .collect()
}

/// The first place where two groups differ.
fn difference(one: &[(Volume, Vec<u8>)], other: &[(Volume, Vec<u8>)]) -> Option<String> {
    let volumes = |all: &[(Volume, Vec<u8>)]| -> Vec<Volume> {
        all.iter().map(|(volume, _)| volume.clone()).collect()
    };
    if volumes(one) != volumes(other) {
        return Some(format!("{:?} and {:?}", volumes(one), volumes(other)));
    }
    one.iter().zip(other).find_map(|((volume, one), (_, other))| {
        let at = one.iter().zip(other).position(|(one, other)| one != other)?;
        Some(format!("{} at {at}: {} and {}", volume.name, one[at], other[at]))
    })
}

pub(super) fn same(one: &Group, other: &Group, what: &str) {
    assert_eq!(one.positions().chain, other.positions().chain, "{what}");
    assert_eq!(difference(&all(one), &all(other)), None, "{what}");
    let (one, other) = (one.control(), other.control());
    assert_eq!(one.epochs, other.epochs, "{what}");
    assert_eq!(one.members, other.members, "{what}");
}

struct Dice(SeededEntropy);

impl Dice {
    fn below(&self, bound: u64) -> u64 {
        self.0.next_u64() % bound
    }
}

/// Something that a primary does.
fn act(dice: &Dice, primary: &Group, pair: &Bench, number: u64) {
    let volumes = primary.volumes();
    let any = |dice: &Dice| volumes[dice.below(volumes.len() as u64) as usize].clone();
    if volumes.is_empty() {
        primary.create_volume(name(&format!("v{number}")), 1 << 20).unwrap();
        return;
    }
    match dice.below(21) {
        20 => {
            let (from, to) = (primary.positions().horizon, primary.positions().head);
            let lsn = Lsn(from.0 + dice.below(to.bytes_since(from) + 1));
            let _ = primary.rewind(&Point::Lsn(lsn), false);
        }
        0 if volumes.len() < 4 => {
            let size = (1 + dice.below(3)) << 20;
            primary.create_volume(name(&format!("v{number}")), size).unwrap();
        }
        1 if volumes.len() > 1 => primary.remove_volume(&any(dice).name).unwrap(),
        2 => {
            let size = 4096 * (1 + dice.below(700));
            primary.resize_volume(&any(dice).name, size).unwrap();
        }
        3 => {
            primary.create_bookmark(name(&format!("m{number}")), Consistency::Crash).unwrap();
        }
        4 | 5 => {
            pair.pass(5);
            primary.sync_now().unwrap();
            primary.fold_now().unwrap();
        }
        6..=9 => {
            let volume = any(dice);
            let offset = dice.below(volume.size_bytes / 512) * 512;
            let length =
                (512 * (1 + dice.below(1 << dice.below(12)))).min(volume.size_bytes - offset);
            one(primary, volume.number, Op::Trim { offset, length }).unwrap();
        }
        _ => {
            let volume = any(dice);
            let offset = dice.below(volume.size_bytes / 512) * 512;
            let length = (512 * (1 + dice.below(64))).min(volume.size_bytes - offset);
            let data: Vec<u8> = (0..length).map(|at| (number * 7 + at / 512) as u8 | 1).collect();
            write(primary, volume.number, offset, &data);
        }
    }
}

#[test]
fn a_copy_that_the_log_no_longer_reaches_is_the_primary_again_after_an_image() {
    let (mut partial, mut whole, mut resumed, mut rebased, mut crashed) = (0, 0, 0, 0, 0);
    let (mut gone_back, mut rewinds) = (0, 0);
    // 356: a volume that was cut off before what was staged of it, and grew before the next image.
    for seed in (0..seeds(40)).chain([356]) {
        let dice = Dice(SeededEntropy::new(seed));
        let mut pair = Pair::new(seed);
        pair.primary.create_volume(name("v"), VOLUME).unwrap();
        let mut number = 0;
        let past = Past::default();
        let mut acts = |pair: &Pair, count: u64| {
            for _ in 0..count {
                number += 1;
                act(&dice, &pair.primary, &pair.here, number);
                if number % 5 == 0 {
                    past.note(&pair.primary);
                }
            }
        };
        for round in 0..3 {
            let what = format!("seed {seed}, round {round}");
            acts(&pair, dice.below(40));
            let reached = pair.copy.received_end() >= pair.primary.log_start()
                && (pair.copy.received_end() > Lsn::ZERO || dice.below(2) == 0);
            if reached {
                gone_back += u64::from(!pair.follow());
                pair.check(&what);
            }
            acts(&pair, dice.below(60));
            pair.fold();
            let head = pair.copy.positions().head;
            let old = all(&pair.copy);
            if head == Lsn::ZERO {
                whole += 1
            } else {
                partial += 1
            }
            for _ in 0..dice.below(4) {
                if pair.send(dice.below(30) as usize) {
                    break;
                }
                assert!(all(&pair.copy) == old, "{what}: the old image stays");
                // The link was cut: the same image is gone on with.
                resumed += 1;
                if dice.below(3) == 0 {
                    pair.restart_copy(seed + round);
                    assert!(all(&pair.copy) == old, "{what}: the old image stays");
                    crashed += 1;
                }
                // Or a later one.
                if dice.below(2) == 0 {
                    pair.primary.end_shipment(&b());
                    acts(&pair, dice.below(30));
                    rebased += 1;
                }
            }
            if !pair.send(usize::MAX) {
                panic!("{what}: no end");
            }
            assert!(all(&pair.copy) == old, "{what}: before the switch");
            let at = pair.copy.switch_to_image().unwrap().lsn;
            assert_eq!(pair.copy.positions().head, at, "{what}");
            let image = pair.primary.images().into_iter().next().unwrap();
            let check = |copy: &Group, when: &str| {
                for volume in image.volumes() {
                    let bytes = volume.size_bytes as usize;
                    let there = read(copy, volume.number, 0, bytes);
                    let here = read(&*image, volume.number, 0, bytes);
                    assert!(there == here, "{what}: volume {} {when}", volume.number);
                }
                assert_eq!(copy.volumes(), image.volumes(), "{what}: {when}");
            };
            check(&pair.copy, "before it is in the base");
            past.check(&pair.copy, &what);
            if dice.below(3) == 0 {
                pair.restart_copy(seed + 77);
                check(&pair.copy, "after a crash before it is in the base");
            }
            if seed % 3 == 0 {
                // It follows first, and is merged while or after that.
                pair.primary.end_shipment(&b());
                gone_back += u64::from(!pair.follow());
                pair.check(&what);
            }
            pair.there.pass(5);
            pair.copy.fold_now().unwrap();
            past.check(&pair.copy, &what);
            if seed % 3 == 0 {
                pair.check(&what);
                continue;
            }
            check(&pair.copy, "in the base");
            assert!(!pair.there.disk.exists(&dir().join("staging")).unwrap(), "{what}");
            for base in pair.copy.bases.read().unwrap().values() {
                base.check(0, u64::MAX).unwrap_or_else(|error| panic!("{what}: {error}"));
            }
            pair.primary.end_shipment(&b());
            gone_back += u64::from(!pair.follow());
            pair.check(&what);
            past.check(&pair.copy, &what);
            past.check(&pair.primary, &what);
        }
        rewinds += pair.primary.control().rewinds.len();
    }
    assert!(gone_back > 0 && rewinds > 20, "{gone_back} of {rewinds}");
    let covered = [partial, whole, resumed, rebased, crashed];
    assert!(covered.iter().all(|count| *count > 5), "{covered:?}");
}

/// The volumes with their contents, before and after.
pub(super) type Sides = [Vec<(Volume, Vec<u8>)>; 2];

/// A copy that lacks an image, all of it staged; what it shows, and what it is to show.
pub(super) fn staged(seed: u64, partial: bool) -> (Pair, Sides) {
    let (pair, sides, whole) = staged_to(seed, partial, usize::MAX);
    assert!(whole);
    (pair, sides)
}

/// The same with no more than so many parts staged; whether that is all.
fn staged_to(seed: u64, partial: bool, parts: usize) -> (Pair, Sides, bool) {
    let pair = Pair::new(seed);
    let volume = pair.primary.create_volume(name("v"), VOLUME).unwrap().number;
    let gone = pair.primary.create_volume(name("w"), 1 << 20).unwrap().number;
    write(&pair.primary, volume, 0, &[1; 20_000]);
    write(&pair.primary, gone, 0, &[2; 9000]);
    write(&pair.primary, volume, 2 << 20, &[3; 9000]);
    if partial {
        pair.follow();
        pair.copy.open_image(&Point::Now, Some(name("old")), "test", None).unwrap();
    }
    one(&pair.primary, volume, Op::Trim { offset: 2 << 20, length: 8192 }).unwrap();
    write(&pair.primary, volume, 8192, &[4; 40_000]);
    pair.primary.remove_volume(&name("w")).unwrap();
    pair.primary.create_volume(name("x"), 1 << 20).unwrap();
    pair.fold();
    write(&pair.primary, volume, 1 << 20, &[5; 512]);
    pair.primary.sync_now().unwrap();
    let old = all(&pair.copy);
    let new = all(&pair.primary);
    let whole = pair.send(parts);
    (pair, [old, new], whole)
}

/// The image of before shows what it was opened at, whatever took its place.
pub(super) fn check_image(copy: &Group, old: &[(Volume, Vec<u8>)], what: &str) {
    if old.is_empty() {
        return;
    }
    let images = copy.images();
    let image = images.iter().find(|image| *image.name() == name("old"));
    let image = image.unwrap_or_else(|| panic!("{what}: the image of before is gone"));
    for (volume, bytes) in old {
        let found = try_read(&**image, volume.number, 0, bytes.len());
        let found = found.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(found == *bytes, "{what}: volume {} of the image of before", volume.number);
    }
}

#[test]
fn a_crash_at_any_boundary_of_the_switch_shows_the_old_image_or_the_new_one() {
    for partial in [true, false] {
        let (pair, [old, new]) = staged(1, partial);
        pair.there.disk.record();
        pair.copy.switch_to_image().unwrap();
        pair.there.pass(5);
        pair.copy.fold_now().unwrap();
        let stopped = pair.there.disk.take_recorded();
        assert!(stopped.len() > 20, "{} boundaries", stopped.len());
        let mut shown = [0, 0];
        for (boundary, disk) in stopped.into_iter().enumerate() {
            for seed in 0..4 {
                let what = format!("partial {partial}, boundary {boundary}, seed {seed}");
                let disk = Arc::new(disk.crash(seed + 100 * boundary as u64));
                let after = Bench { disk, ..pair.there.after_crash(0) };
                let (copy, _) = after.open();
                let found = all(&copy);
                check_image(&copy, &old, &what);
                if found == new {
                    shown[1] += 1;
                } else {
                    assert!(found == old, "{what}: neither the old image nor the new one");
                    shown[0] += 1;
                    // All of it is still staged, or it is sent again.
                    let since = copy.positions().head;
                    let since = (since > Lsn::ZERO).then_some(since);
                    assert!(send(
                        &pair.primary,
                        &copy,
                        since,
                        since.unwrap_or_default(),
                        usize::MAX
                    ));
                    copy.switch_to_image().unwrap();
                }
                follow(&pair.primary, &copy);
                same(&pair.primary, &copy, &what);
                check_image(&copy, &old, &what);
                after.pass(5);
                copy.fold_now().unwrap();
                check_image(&copy, &old, &what);
                copy.close().unwrap();
                drop(copy);
                let (copy, recovery) = after.open();
                assert_eq!(recovery.cut, None, "{what}");
                same(&pair.primary, &copy, &what);
                check_image(&copy, &old, &what);
            }
        }
        assert!(shown.iter().all(|count| *count > 0), "{shown:?}");
    }
}

#[test]
fn an_error_at_any_operation_of_the_switch_leaves_the_old_image_or_the_new_one() {
    for partial in [true, false] {
        let mut failures = 0;
        for operation in 0.. {
            let (pair, [old, new]) = staged(2, partial);
            let disk = &pair.there.disk;
            disk.inject(Fault::Error { operation: disk.operations() + operation });
            pair.there.pass(5);
            let done = pair
                .copy
                .switch_to_image()
                .map(|_| ())
                .and_then(|()| pair.copy.fold_now().map(|_| ()));
            if done.is_ok() {
                break;
            }
            failures += 1;
            disk.clear_faults();
            let what = format!("partial {partial}, operation {operation}: {}", done.unwrap_err());
            drop(pair.copy);
            let (copy, _) = pair.there.open();
            let found = all(&copy);
            let differs = difference(&found, &new);
            assert!(found == old || differs.is_none(), "{what}: {differs:?}");
            check_image(&copy, &old, &what);
        }
        assert!(failures >= 10, "{failures}");
    }
}

#[test]
fn images_and_pins_of_before_outlast_an_image_that_replaces_what_has_changed() {
    let (pair, [old, new]) = staged(3, true);
    pair.copy.switch_to_image().unwrap();
    check_image(&pair.copy, &old, "before it is in the base");
    pair.there.pass(5);
    pair.copy.fold_now().unwrap();
    assert!(all(&pair.copy) == new);
    check_image(&pair.copy, &old, "in the base");
    let cost = pair.copy.images()[0].cost().disk_bytes;
    assert!((4096..1 << 20).contains(&cost), "what changed is kept, and no more: {cost}");
    // The volume that only the image has goes with it.
    let files = || pair.there.disk.list(&dir().join("base")).unwrap().len();
    let before = files();
    pair.copy.close_image(&name("old")).unwrap();
    pair.copy.fold_now().unwrap();
    assert!(files() < before, "{before}");
}

#[test]
fn images_of_before_an_image_of_everything_are_broken_with_the_reason() {
    let (pair, _) = staged(3, false);
    let volume = VolumeNumber(1);
    pair.copy.switch_to_image().unwrap();
    let image = pair.copy.open_image(&Point::Now, None, "test", None).unwrap();
    write(&pair.primary, volume, 0, &[6; 4096]);
    pair.fold();
    let shown = all(&pair.copy);
    let early = pair.primary.ship(&b(), None, Lsn::ZERO, None).unwrap();
    pair.copy.begin_image(&early.offer()).unwrap();
    pair.primary.end_shipment(&b());
    assert!(all(&pair.copy) == shown, "what is shown was staged where this begins");
    assert!(send(&pair.primary, &pair.copy, None, Lsn::ZERO, usize::MAX));
    pair.copy.switch_to_image().unwrap();
    let error = try_read(&*image, volume, 0, 512).unwrap_err().to_string();
    assert!(error.contains("brought up by an image"), "{error}");
}

#[test]
fn a_copy_in_the_middle_of_an_image_is_readable_and_promotable_after_every_part_of_it() {
    let mut promoted = 0;
    for parts in 0.. {
        let (pair, [old, _], whole) = staged_to(4, true, parts);
        let what = format!("after {parts} parts");
        assert!(all(&pair.copy) == old, "{what}");
        pair.copy.promote("test").unwrap();
        promoted += 1;
        assert!(all(&pair.copy) == old, "{what}");
        assert!(pair.copy.switch_to_image().is_err(), "{what}: a primary takes no image");
        assert!(pair.copy.stage(ImagePart::End).is_err(), "{what}");
        check_image(&pair.copy, &old, &what);
        let volume = pair.copy.control().volumes[0].number;
        write(&pair.copy, volume, 0, &[9; 512]);
        let now = all(&pair.copy);
        assert!(now != old, "{what}: it takes writes");
        pair.copy.close().unwrap();
        assert!(all(&pair.there.open().0) == now, "{what}");
        if whole {
            break;
        }
    }
    assert!(promoted > 5, "{promoted} places in the image");
}

#[test]
fn a_part_that_could_not_be_staged_leaves_no_gap_whatever_comes_behind_it() {
    let seed = 0;
    let mut failed = 0;
    for later in (0..200).step_by(4) {
        let pair = Pair::new(seed);
        let dice = Dice(SeededEntropy::new(seed));
        pair.primary.create_volume(name("v"), VOLUME).unwrap();
        for number in 0..40 {
            act(&dice, &pair.primary, &pair.here, number);
        }
        assert!(pair.follow());
        for number in 40..120 {
            act(&dice, &pair.primary, &pair.here, number);
        }
        pair.fold();
        let head = pair.copy.positions().head;
        let shipment = pair.primary.ship(&b(), Some(head), head, None).unwrap();
        pair.copy.begin_image(&shipment.offer()).unwrap();
        let at = pair.there.disk.operations() + later;
        pair.there.disk.inject(Fault::Error { operation: at });
        // What was on its way comes all the same.
        let (mut errors, mut last) = (0, Ok(()));
        while let Some(part) = shipment.next().unwrap() {
            last = pair.copy.stage(part).map(|_| ());
            errors += usize::from(last.is_err());
        }
        if errors == 0 {
            break;
        }
        failed += 1;
        assert!(last.is_err(), "seed {seed}, {later}: the end is taken behind a gap");
        pair.there.disk.clear_faults();
        // Only what failed behind the end of the image was not needed.
        let whole = pair.copy.switch_to_image().is_ok();
        assert!(!whole || errors == 1, "seed {seed}, {later}");
        pair.primary.end_shipment(&b());
        if !whole {
            pair.resync();
        }
        pair.check(&format!("seed {seed}, {later}"));
    }
    assert!(failed > 3, "seed {seed}: {failed} parts failed");
}

#[test]
fn what_is_staged_survives_the_power() {
    let mut pair = Pair::new(5);
    let volume = pair.primary.create_volume(name("v"), VOLUME).unwrap().number;
    let data: Vec<u8> = (0..VOLUME as u32).map(|at| (at / 512) as u8 | 1).collect();
    write(&pair.primary, volume, 0, &data);
    pair.fold();
    assert!(!pair.send(10));
    // The link is lost: what came is durable when it is asked for.
    let staged = pair.copy.staged().unwrap().unwrap();
    assert!(staged.done_bytes > 0);
    pair.restart_copy(1);
    assert_eq!(pair.copy.data_state().0, DataState::ReceivingImage);
    assert_eq!(pair.copy.staged().unwrap(), Some(staged.clone()));
    let shipment = pair.primary.ship(&b(), None, Lsn::ZERO, Some(&staged)).unwrap();
    assert!(shipment.offer().resumed);
    let mut again = 0;
    while let Some(part) = shipment.next().unwrap() {
        if let ImagePart::Data { data, .. } = part {
            again += data.len() as u64;
        }
    }
    assert_eq!(again, VOLUME - staged.done_bytes, "nothing is sent twice");
    pair.resync();
    pair.check("after all of it");
}

/// Of the base a chunk that changed is sent whole, however little of it did; of what is still in
/// the log the blocks that changed, alone.
#[test]
fn an_image_sends_what_changed_since_the_peer_stood_and_nothing_else() {
    const CHUNKS: u64 = 8;
    let pair = Pair::new(8);
    let size = CHUNKS * CHUNK_BYTES;
    let [volume, same] =
        ["v", "w"].map(|it| pair.primary.create_volume(name(it), size).unwrap().number);
    for volume in [volume, same] {
        write(&pair.primary, volume, 0, &vec![1; size as usize]);
    }
    pair.follow();
    let stood = pair.copy.positions().head;
    for round in 0..80 {
        write(&pair.primary, volume, CHUNK_BYTES + 8192, &[round; 40_960]);
    }
    one(&pair.primary, volume, Op::Trim { offset: 5 * CHUNK_BYTES, length: CHUNK_BYTES }).unwrap();
    pair.fold();
    assert!(pair.primary.log_start() > stood, "the log reaches it no more");
    write(&pair.primary, volume, 7 * CHUNK_BYTES + 512, &[9; 512]);
    let shipment = pair.primary.ship(&b(), Some(stood), stood, None).unwrap();
    let mut sent = Vec::new();
    while let Some(part) = shipment.next().unwrap() {
        let (at, length, zeros) = match part {
            ImagePart::Data { at, data, .. } => (at, data.len() as u64, false),
            ImagePart::Zeros { at, length } => (at, length, true),
            ImagePart::Control { .. } | ImagePart::End => continue,
        };
        assert_eq!(at.volume, volume, "the other has not changed");
        match sent.last_mut() {
            Some((from, bytes, before)) if *from + *bytes == at.offset && *before == zeros => {
                *bytes += length;
            }
            _ => sent.push((at.offset, length, zeros)),
        }
    }
    let changed = [
        (CHUNK_BYTES, CHUNK_BYTES, false),
        (5 * CHUNK_BYTES, CHUNK_BYTES, true),
        (7 * CHUNK_BYTES, BLOCK_BYTES, false),
    ];
    assert_eq!(sent, changed);
    assert_eq!(shipment.offer().total_bytes, 2 * CHUNK_BYTES + BLOCK_BYTES);
    pair.primary.end_shipment(&b());
    pair.resync();
    pair.check("after it");
}

#[test]
fn a_part_that_is_not_what_was_sent_is_refused() {
    let pair = Pair::new(6);
    let volume = pair.primary.create_volume(name("v"), VOLUME).unwrap().number;
    write(&pair.primary, volume, 0, &[7; 8192]);
    pair.fold();
    let shipment = pair.primary.ship(&b(), None, Lsn::ZERO, None).unwrap();
    pair.copy.begin_image(&shipment.offer()).unwrap();
    let mut refused = 0;
    while let Some(part) = shipment.next().unwrap() {
        if let ImagePart::Data { at, crcs, data } = &part {
            let mut bytes = data.to_vec();
            bytes[5000] ^= 1;
            let at_odds = [
                ImagePart::Data { at: *at, crcs: crcs.clone(), data: bytes.into() },
                ImagePart::Data { at: *at, crcs: crcs[1..].to_vec(), data: data.clone() },
                ImagePart::Data {
                    at: Place { offset: VOLUME, ..*at },
                    crcs: crcs.clone(),
                    data: data.clone(),
                },
                ImagePart::Zeros { at: Place { volume: VolumeNumber(9), offset: 0 }, length: 4096 },
                ImagePart::Zeros { at: *at, length: u64::MAX - 4095 },
                ImagePart::Zeros { at: Place { offset: 512, ..*at }, length: 4096 },
            ];
            for part in at_odds {
                pair.copy.stage(part).unwrap_err();
                refused += 1;
            }
        }
        pair.copy.stage(part).unwrap();
    }
    assert!(refused > 0);
    pair.copy.switch_to_image().unwrap();
    pair.check("in the end");
}

#[test]
fn a_received_tail_that_is_in_nobodys_history_is_kept_as_a_branch_by_the_switch() {
    let pair = Pair::new(7);
    let volume = pair.primary.create_volume(name("v"), VOLUME).unwrap().number;
    write(&pair.primary, volume, 0, &[1; 4096]);
    pair.follow();
    pair.primary.sync_now().unwrap();
    // The copy has a write that the primary loses with its power, before it began another reign.
    let common = pair.primary.positions().head;
    let before = pair.here.after_crash(9);
    write(&pair.primary, volume, 0, &[2; 4096]);
    pair.follow();
    drop(pair.primary);
    let (primary, _) = before.open();
    primary.promote("test").unwrap();
    primary.begin_epoch(primary.new_epoch("test", 9)).unwrap();
    write(&primary, volume, 8192, &[3; 4096]);
    before.pass(5);
    primary.sync_now().unwrap();
    let pair = Pair { here: before, primary, ..pair };
    for offset in 0..64 {
        write(&pair.primary, volume, offset * 4096, &[4; 4096]);
    }
    pair.fold();
    assert!(pair.primary.log_start() > common);
    assert!(send(&pair.primary, &pair.copy, None, common, usize::MAX));
    pair.copy.switch_to_image().unwrap();
    let branches = pair.copy.branches().unwrap();
    assert_eq!(branches.len(), 1);
    assert_eq!((branches[0].from.lsn, branches[0].authored), (common, false));
    pair.check("it follows");
    // What it wrote itself is nobody's to discard.
    let own = pair.copy.positions().head;
    pair.copy.promote("test").unwrap();
    pair.copy.demote().unwrap();
    let error = pair
        .primary
        .ship(&b(), None, own, None)
        .and_then(|shipment| pair.copy.begin_image(&shipment.offer()));
    assert!(error.unwrap_err().to_string().contains("were written by b"));
}

#[test]
fn a_tail_that_is_cut_far_behind_the_log_of_the_primary_is_shown_and_so_are_earlier_branches() {
    let pair = Pair::new(7);
    let volume = pair.primary.create_volume(name("v"), VOLUME).unwrap().number;
    write(&pair.primary, volume, 0, &[1; 4096]);
    pair.follow();
    pair.primary.sync_now().unwrap();
    // A branch of before, as of a failover.
    let positions = pair.primary.positions();
    let before = pair.here.after_crash(9);
    write(&pair.primary, volume, 4096, &[2; 4096]);
    pair.follow();
    let first = all(&pair.copy);
    pair.copy.yield_to(positions.head, positions.chain, Discard::Received).unwrap();
    drop(pair.primary);
    let primary = before.open().0;
    primary.serve().unwrap();
    let pair = Pair { here: before, primary, ..pair };
    write(&pair.primary, volume, 8192, &[3; 4096]);
    pair.follow();
    pair.primary.sync_now().unwrap();
    // The copy has a write that the primary loses with its power, before it began another reign.
    let common = pair.primary.positions().head;
    let before = pair.here.after_crash(9);
    write(&pair.primary, volume, 0, &[4; 8192]);
    pair.follow();
    let second = all(&pair.copy);
    drop(pair.primary);
    let primary = before.open().0;
    primary.serve().unwrap();
    primary.begin_epoch(primary.new_epoch("recovery", 9)).unwrap();
    let pair = Pair { here: before, primary, ..pair };
    for offset in 0..64 {
        write(&pair.primary, volume, offset * 4096, &[5; 4096]);
    }
    pair.fold();
    assert!(pair.primary.log_start() > common);
    // The reigns alone tell where they part.
    pair.copy.yield_to(common, None, Discard::Received).unwrap();
    pair.resync();
    pair.check("it follows");
    let branches = pair.copy.branches().unwrap();
    assert_eq!(branches.len(), 2);
    for expected in [first, second] {
        let shown = branches.iter().filter(|branch| {
            let image = pair.copy.open_branch_image(&branch.name, None, "test").unwrap();
            let volumes = image.volumes().into_iter();
            let shown: Vec<_> = volumes
                .map(|volume| {
                    let bytes = read(&*image, volume.number, 0, volume.size_bytes as usize);
                    (volume, bytes)
                })
                .collect();
            pair.copy.close_this_image(&image).unwrap();
            shown == expected
        });
        assert_eq!(shown.count(), 1);
    }
}

#[test]
fn an_image_that_goes_back_leaves_no_file_whose_records_could_stand_in_their_old_place() {
    let pair = Pair::new(8);
    let volume = pair.primary.create_volume(name("v"), VOLUME).unwrap().number;
    write(&pair.primary, volume, 0, &[1; 4096]);
    pair.primary.sync_now().unwrap();
    // The primary's disk is put back to here; with the rest a reign leaves that nobody knows then.
    let before = pair.here.after_crash(9);
    pair.primary.demote().unwrap();
    pair.primary.promote("test").unwrap();
    while pair.primary.positions().head.segment_number(SEGMENT) < 3 {
        write(&pair.primary, volume, 0, &[2; 16 << 10]);
        pair.primary.sync_now().unwrap();
    }
    pair.follow();
    pair.there.pass(5);
    // A reader holds it, and it would be a spare when that is gone.
    let held = pair.copy.segments.get(1).unwrap();
    let horizon = pair.copy.fold_now().unwrap();
    assert_eq!(horizon.segment_number(SEGMENT), 3);
    drop(pair.primary);
    let primary = before.open().0;
    primary.begin_epoch(primary.new_epoch("test", 9)).unwrap();
    write(&primary, volume, 8192, &[3; 4096]);
    let pair = Pair { here: before, primary, ..pair };
    let spares = |disk: &MemoryDisk| {
        let names = disk.list(&dir().join("log")).unwrap();
        names.iter().filter(|name| name.ends_with(".spare")).count()
    };
    assert!(spares(&pair.there.disk) > 0 && held.number == 1);
    assert!(send(&pair.primary, &pair.copy, None, Lsn::ZERO, usize::MAX));
    pair.there.disk.record();
    let at = pair.copy.switch_to_image().unwrap().lsn;
    assert!(at < horizon, "{at}");
    drop(held);
    pair.copy.segments.collect().unwrap();
    assert_eq!(spares(&pair.there.disk), 0);
    for (boundary, disk) in pair.there.disk.take_recorded().into_iter().enumerate() {
        let disk = Arc::new(disk.crash(boundary as u64));
        let after = Bench { disk, ..pair.there.after_crash(0) };
        let (copy, _) = after.open();
        let gone_back = copy.positions().head == at;
        assert!(!gone_back || spares(&after.disk) == 0, "boundary {boundary}");
    }
    // It reigns, and loses an end that was not durable where an old segment might stand.
    pair.copy.promote("test").unwrap();
    while pair.copy.positions().head.segment_number(SEGMENT) < 1 {
        pair.copy.sync_now().unwrap();
        write(&pair.copy, volume, 0, &[4; 16 << 10]);
    }
    for seed in 0..16 {
        let after = pair.there.after_crash(seed);
        let state = after.open().0.data_state();
        assert_eq!(state.0, DataState::Consistent, "seed {seed}: {state:?}");
    }
}

#[test]
fn a_part_that_was_asked_for_in_an_earlier_stream_is_not_taken_from_the_next_ones_image() {
    let (pair, _) = staged(5, true);
    let primary = &pair.primary;
    let begin = |stream| primary.ship(&b(), None, Lsn::ZERO, None).unwrap().begin_stream(stream);
    begin(7);
    let first = primary.next_part(&b(), 7, 0).unwrap().unwrap();
    // Its second part waits in a connection, when the peer asks anew.
    begin(8);
    let error = primary.next_part(&b(), 7, 1).unwrap_err().to_string();
    assert!(error.contains("sends b another image by now"), "{error}");
    assert!(primary.next_part(&b(), 8, 1).is_err(), "one out of turn");
    assert_eq!(primary.next_part(&b(), 8, 0).unwrap().unwrap(), first, "nothing was left out");
}
