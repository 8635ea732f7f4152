//! Random programs against a plain model in memory: every image and every live read equals the
//! model at that position, through folds, restarts and crashes.

use std::collections::BTreeMap;

use super::*;
use crate::io::seeds;
use crate::log::control::{BookmarkRecord, Consistency};

const BYTES: usize = 256 << 10;

/// Numbers that follow from a seed.
pub(super) struct Dice(SeededEntropy);

impl Dice {
    pub(super) fn new(seed: u64) -> Dice {
        Dice(SeededEntropy::new(seed))
    }

    pub(super) fn below(&self, bound: u64) -> u64 {
        self.0.next_u64() % bound
    }
}

type Volumes = BTreeMap<VolumeNumber, Vec<u8>>;

/// What the group must hold at each end of a request.
struct Model {
    now: Volumes,
    /// Position after a request, and the volumes there.
    past: Vec<(Lsn, Volumes)>,
    rewinds: u64,
    /// Looks at what changed since a position that a rewind had left behind.
    over_rewinds: u64,
}

impl Model {
    fn note(&mut self, lsn: Lsn) {
        if self.past.last().is_none_or(|last| last.0 < lsn) {
            self.past.push((lsn, self.now.clone()));
        } else if let Some(last) = self.past.last_mut() {
            last.1 = self.now.clone();
        }
    }

    /// The volumes at a position, which is the end of a request or behind one.
    fn at(&self, lsn: Lsn) -> &Volumes {
        let count = self.past.partition_point(|(known, _)| *known <= lsn);
        &self.past[count - 1].1
    }
}

fn check(view: &dyn View, expected: &Volumes, what: &str) {
    let mut numbers: Vec<VolumeNumber> = view.volumes().iter().map(|v| v.number).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, expected.keys().copied().collect::<Vec<_>>(), "{what}: volumes");
    for (volume, bytes) in expected {
        let got = read(view, *volume, 0, bytes.len());
        if got != *bytes {
            let first = got.iter().zip(bytes).position(|(left, right)| left != right).unwrap();
            panic!(
                "{what}: volume {volume} differs at byte {first}: got {}, expected {}",
                got[first], bytes[first]
            );
        }
        let extents = view.extents(*volume, 0, bytes.len() as u64, usize::MAX).unwrap();
        let mut end = 0;
        for extent in extents {
            assert_eq!(extent.offset, end, "{what}: extents have no gaps");
            end += extent.length;
            let range = extent.offset as usize..end as usize;
            let zeros = bytes[range].iter().all(|byte| *byte == 0);
            assert!(extent.allocation == Allocation::Data || zeros, "{what}: {extent:?} has data");
        }
        assert_eq!(end, bytes.len() as u64, "{what}: extents cover the volume");
    }
}

/// A range inside a volume, in one of the alignments that matter.
fn range(dice: &Dice, volume_bytes: usize, longest: u64) -> (u64, u64) {
    let align = [1, 512, 512, 4096][dice.below(4) as usize];
    let offset = dice.below(volume_bytes as u64 - 1) / align * align;
    let length = (1 + dice.below(longest)).next_multiple_of(align);
    (offset, length.min(volume_bytes as u64 - offset))
}

fn make_volume(group: &Group, model: &mut Model, number: u64) {
    let made = group.create_volume(name(&format!("v{number}")), BYTES as u64).unwrap();
    let used = model.past.iter().any(|(_, volumes)| volumes.contains_key(&made.number));
    assert!(!used, "volume {} was there before", made.number);
    model.now.insert(made.number, vec![0; BYTES]);
    model.note(group.positions().head);
}

fn step(dice: &Dice, bench: &Bench, group: &mut Arc<Group>, model: &mut Model, number: u64) {
    let volumes: Vec<VolumeNumber> = model.now.keys().copied().collect();
    if volumes.is_empty() {
        // A rewind went back to before there was any.
        return make_volume(group, model, number);
    }
    let volume = volumes[dice.below(volumes.len() as u64) as usize];
    match dice.below(100) {
        0..50 => {
            // A batch, so that requests of one append meet each other.
            let mut plans = Vec::new();
            for index in 0..1 + dice.below(4) {
                let longest = if dice.below(8) == 0 { 90_000 } else { 9000 };
                let (offset, length) = range(dice, model.now[&volume].len(), longest);
                let data = vec![(number * 4 + index) as u8 | 1; length as usize];
                plans.push((offset, length, data, dice.below(6)));
            }
            let requests: Vec<Request<'_>> = plans
                .iter()
                .map(|(offset, length, data, kind)| {
                    let (offset, length) = (*offset, *length);
                    let op = match kind {
                        0 => Op::Zero { offset, length, no_hole: length % 2 == 0 },
                        1 => Op::Trim { offset, length },
                        _ => Op::Write { offset, data },
                    };
                    Request { volume, op, fua: false }
                })
                .collect();
            let ends = group.append(&requests);
            for ((offset, length, data, kind), end) in plans.iter().zip(ends) {
                let target = &mut model.now.get_mut(&volume).unwrap()[*offset as usize..];
                if *kind < 2 {
                    target[..*length as usize].fill(0);
                } else {
                    target[..data.len()].copy_from_slice(data);
                }
                model.note(end.unwrap());
            }
        }
        50..60 => {
            one(group, volume, Op::Flush).unwrap();
            group.sync_now().unwrap();
        }
        60..65 => {
            let bookmark = name(&format!("b{number}"));
            if dice.below(2) == 0 {
                group.create_bookmark(bookmark, Consistency::Crash).unwrap();
            } else {
                group.pin_bookmark(bookmark, Consistency::Crash).unwrap();
            }
            let pins = pins(group);
            if pins.len() > 4 {
                let gone = BookmarkRecord { removed: true, ..pins[dice.below(5) as usize].clone() };
                group.append_control(Control::Bookmark(gone)).unwrap();
            }
        }
        65..66 => {
            let known = group.volumes().into_iter().find(|known| known.number == volume).unwrap();
            let bytes = (1 + dice.below(2 * BYTES as u64 / 4096)) * 4096;
            group.resize_volume(&known.name, bytes).unwrap();
            model.now.get_mut(&volume).unwrap().resize(bytes as usize, 0);
            model.note(group.positions().head);
        }
        66..68 if volumes.len() < 3 => make_volume(group, model, number),
        68..70 if volumes.len() > 1 => {
            let gone = group.volumes().into_iter().find(|known| known.number == volume).unwrap();
            group.remove_volume(&gone.name).unwrap();
            model.now.remove(&volume);
            model.note(group.positions().head);
        }
        70..78 => {
            group.sync_now().unwrap();
            group.fold_now().unwrap();
            group.write_indices();
        }
        78..81 => {
            let (from, to) = (group.positions().horizon, group.positions().head);
            let point = Point::Lsn(Lsn(from.0 + dice.below(to.bytes_since(from) + 1)));
            let volumes = group.volumes();
            if let Ok(rewound) = group.rewind(&point, false) {
                model.now = model.at(rewound.to.lsn).clone();
                model.note(rewound.at);
                model.rewinds += 1;
            } else {
                assert_eq!(group.volumes(), volumes, "a rewind that is refused changes nothing");
            }
        }
        81..84 => {
            group.close().unwrap();
            *group = bench.open().0;
            model.note(group.positions().head);
        }
        84..88 => bench.pass(dice.below(20)),
        88..92 => {
            let bytes = &model.now[&volume];
            let offset = dice.below(bytes.len() as u64 - 1);
            let length = (1 + dice.below(20_000)).min(bytes.len() as u64 - offset);
            let expected = &bytes[offset as usize..(offset + length) as usize];
            let got = read(&**group, volume, offset, length as usize);
            assert!(got == expected, "{length} bytes at {offset} of volume {volume}");
            let extents = group.extents(volume, offset, length, 3).unwrap();
            assert!((1..=3).contains(&extents.len()) && extents[0].offset == offset);
            let end = extents.last().map_or(0, |last| last.offset + last.length);
            assert!(end <= offset + length, "{extents:?} of {length} at {offset}");
            for extent in extents.iter().filter(|extent| extent.allocation != Allocation::Data) {
                let range = extent.offset as usize..(extent.offset + extent.length) as usize;
                assert!(bytes[range].iter().all(|byte| *byte == 0), "{extent:?} has data");
            }
        }
        _ => {
            let from = group.positions().horizon;
            let to = group.positions().head;
            let point = match dice.below(3) {
                0 => Point::Now,
                _ => Point::Lsn(Lsn(from.0 + dice.below(to.bytes_since(from) + 1))),
            };
            if let Ok(image) = group.open_image(&point, None, "model", None) {
                let lsn = image.position().lsn;
                check(&*image, model.at(lsn), &format!("image at {lsn} for {point:?}"));
                check_changed(dice, &image, model);
                if dice.below(3) == 0 {
                    group.close_image(image.name()).unwrap();
                }
            }
        }
    }
    while group.images().len() > 3 {
        group.close_image(group.images()[0].name()).unwrap();
    }
}

/// What an image calls unchanged since some earlier position is so.
fn check_changed(dice: &Dice, image: &Image, model: &mut Model) {
    let lsn = image.position().lsn;
    let earlier = model.past.partition_point(|(known, _)| *known <= lsn);
    let (since, before) = &model.past[dice.below(earlier as u64) as usize];
    let now = model.at(lsn);
    for (volume, bytes) in before {
        let Some(now) = now.get(volume) else { continue };
        let mut unchanged = vec![true; bytes.len().min(now.len())];
        for (offset, length) in image.changed_since(*volume, *since).unwrap() {
            let end = unchanged.len().min((offset + length) as usize);
            unchanged[end.min(offset as usize)..end].fill(false);
        }
        let wrong = (0..unchanged.len()).find(|at| unchanged[*at] && bytes[*at] != now[*at]);
        assert_eq!(wrong, None, "volume {volume}, image at {lsn}, since {since}");
    }
    let inside = image
        .group()
        .control()
        .rewinds
        .iter()
        .any(|rewind| (rewind.to < *since && *since <= rewind.at.lsn) && rewind.at.lsn < lsn);
    model.over_rewinds += u64::from(inside);
}

fn pins(group: &Group) -> Vec<BookmarkRecord> {
    group.control().bookmarks.iter().filter(|bookmark| bookmark.pinned).cloned().collect()
}

/// Every image and every pin is what the model was at its position; how many of them the log no
/// longer covers.
fn check_moments(group: &Group, model: &Model, what: &str) -> u64 {
    let horizon = group.positions().horizon;
    let mut below = 0;
    for image in group.images() {
        let lsn = image.position().lsn;
        assert_eq!(image.broken(), None, "{what}: image at {lsn}");
        check(&*image, model.at(lsn), &format!("{what}: image at {lsn}"));
        below += u64::from(lsn < horizon);
    }
    for pin in pins(group) {
        let point = Point::Bookmark(pin.name.clone());
        let image = group.open_image(&point, Some(name("pin")), "model", None);
        let image = image.unwrap_or_else(|error| panic!("{what}: pin {}: {error}", pin.name));
        assert_eq!(image.position().lsn, pin.lsn);
        check(&*image, model.at(pin.lsn), &format!("{what}: pin at {}", pin.lsn));
        group.close_this_image(&image).unwrap();
        below += u64::from(pin.lsn < horizon);
    }
    below
}

fn model_of(group: &Group) -> Model {
    let mut model = Model {
        now: Volumes::new(),
        past: vec![(Lsn::ZERO, Volumes::new())],
        rewinds: 0,
        over_rewinds: 0,
    };
    let volume = group.create_volume(name("v"), BYTES as u64).unwrap();
    model.now.insert(volume.number, vec![0; BYTES]);
    model.note(group.positions().head);
    model
}

/// Whether the program folded; how many moments behind the horizon were looked at; the model.
fn run(seed: u64, steps: u64) -> (bool, u64, Model) {
    let dice = Dice::new(seed);
    let bench = Bench::new("a", seed);
    let mut group = bench.create();
    set_policy(&group, 30, 16 * SEGMENT);
    let mut model = model_of(&group);
    let mut below = 0;
    for number in 0..steps {
        step(&dice, &bench, &mut group, &mut model, number);
        if number % 10 == 0 {
            check(&*group, &model.now, &format!("seed {seed}, step {number}: live"));
            below += check_moments(&group, &model, &format!("seed {seed}, step {number}"));
        }
    }
    group.forget_images();
    (group.positions().horizon > Lsn::ZERO, below, model)
}

#[test]
fn random_programs_equal_the_model_live_and_in_every_image() {
    let (mut all_folded, mut all_below, mut rewinds, mut over) = (0, 0, 0, 0);
    let programs = seeds(16);
    // 591: a volume that a rewind had taken away came back empty, and was called unchanged.
    for seed in (1..=programs).chain([591]) {
        let (folded, below, model) = run(seed, 150);
        all_folded += u64::from(folded);
        all_below += below;
        rewinds += model.rewinds;
        over += model.over_rewinds;
    }
    assert!(10 * all_folded >= 9 * programs, "only {all_folded} of {programs} programs folded");
    assert!(all_below > 200, "only {all_below} looks at moments behind the horizon");
    assert!(rewinds > 30, "only {rewinds} rewinds");
    assert!(over > 10, "only {over} looks at what changed over a rewind");
}

/// Invariants 1 and 2: after a crash that loses, reorders and tears what was not synced, the group
/// is the model at one position, and that position is at or behind every sync that was answered.
#[test]
fn after_a_crash_the_group_is_one_prefix_and_has_everything_flushed() {
    let mut lost = 0;
    let mut folded = 0;
    let mut below = 0;
    for seed in 100..100 + seeds(60) {
        let dice = Dice::new(seed);
        let bench = Bench::new("a", seed);
        let mut group = bench.create();
        set_policy(&group, 10, 16 * SEGMENT);
        let mut model = model_of(&group);
        for number in 0..20 + dice.below(60) {
            step(&dice, &bench, &mut group, &mut model, number);
        }
        // The crash may come in the middle of a fold or a sync.
        let cut = bench.disk.operations() + dice.below(60);
        bench.disk.inject(crate::io::Fault::PowerOff { operation: cut });
        let durable = group.positions().durable;
        if dice.below(2) == 0 {
            let _ = group.sync_now();
            let _ = group.fold_now();
        }
        let durable = durable.max(group.positions().durable);
        let head = group.positions().head;
        let images = group.images();
        group.forget_images();
        drop(group);
        let after = bench.after_crash(seed);
        let (group, recovery) = after.open();
        let (end, _) = recovery.cut.unwrap_or((head, head));
        let what = format!("seed {seed}: after a crash at {head}, durable {durable}, cut at {end}");
        assert!(end >= durable, "{what}: flushed writes are gone");
        assert!(end <= head, "{what}: something was made up");
        check(&*group, model.at(end), &what);
        below += check_moments(&group, &model, &what);
        for image in images.iter().filter(|image| image.position().lsn <= end) {
            assert!(group.image(image.name()).is_some(), "{what}: {} is lost", image.name());
        }
        lost += u64::from(end < head);
        folded += u64::from(group.positions().horizon > Lsn::ZERO);
        let epochs = group.control().epochs.clone();
        assert_eq!(epochs.last().unwrap().reason, "recovery", "{what}");
        // And it goes on: a write, an orderly restart, the same.
        let mut expected = model.at(end).clone();
        if let Some((volume, bytes)) = expected.iter_mut().next() {
            write(&group, *volume, 512, &[0xab; 512]);
            bytes[512..1024].fill(0xab);
        }
        group.close().unwrap();
        let (group, recovery) = after.open();
        assert_eq!(recovery.cut, None, "{what}: the second start is clean");
        check(&*group, &expected, &format!("{what}, then restarted"));
        group.forget_images();
    }
    assert!(lost > 5, "only {lost} crashes lost anything: the test does not test");
    assert!(folded > 5, "only {folded} groups had folded");
    assert!(below > 20, "only {below} moments behind the horizon");
}
