//! Old positions that folds have passed: images and pins stay what they were.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::io::Fault;
use crate::log::control::{BookmarkRecord, Consistency};

const BYTES: u64 = 3 << 20;

pub(super) fn group_with_volume(bench: &Bench) -> (Arc<Group>, VolumeNumber) {
    let group = bench.create();
    let volume = group.create_volume(name("v"), BYTES).unwrap().number;
    set_policy(&group, 0, 64 << 20);
    (group, volume)
}

pub(super) fn fold(bench: &Bench, group: &Group) {
    bench.pass(5);
    group.sync_now().unwrap();
    assert_eq!(group.fold_now().unwrap(), group.positions().head);
}

pub(super) fn all(view: &dyn View, volume: VolumeNumber) -> Vec<u8> {
    let size = view.volumes().iter().find(|known| known.number == volume).unwrap().size_bytes;
    read(view, volume, 0, size as usize)
}

pub(super) fn image(group: &Group, named: &str) -> Arc<Image> {
    group.open_image(&Point::Now, Some(name(named)), "test", None).unwrap()
}

pub(super) fn at_pin(group: &Group, named: &str) -> Result<Arc<Image>, GroupError> {
    group.open_image(&Point::Bookmark(name(named)), None, "test", None)
}

pub(super) fn moments_on_disk(disk: &MemoryDisk) -> Vec<String> {
    let all = dir().join("moments");
    if disk.exists(&all).unwrap() { disk.list(&all).unwrap() } else { Vec::new() }
}

#[test]
fn an_image_stays_what_it_was_when_the_horizon_passes_it() {
    let bench = Bench::new("a", 7);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &[1; 8192]);
    fold(&bench, &group);
    write(&group, volume, 4096, &[2; 512]);
    let open = image(&group, "i");
    let before = all(&*open, volume);
    for round in 3..6 {
        write(&group, volume, 0, &[round; 4096]);
        write(&group, volume, 5000, &[round; 100]);
        one(&group, volume, Op::Trim { offset: 8192, length: 1 << 20 }).unwrap();
        fold(&bench, &group);
        assert!(all(&*open, volume) == before, "round {round}");
    }
    let cost = open.cost();
    // Two blocks and their index, whatever was written how often.
    assert!((8192..16384).contains(&cost.disk_bytes), "{cost:?}");
    group.close().unwrap();
    drop((open, group));
    let (again, _) = bench.open();
    let open = again.image(&name("i")).expect("images survive a restart");
    assert!(all(&*open, volume) == before, "after a restart");
    write(&again, volume, 1 << 20, &[9; 4096]);
    fold(&bench, &again);
    assert!(all(&*open, volume) == before, "after a restart and a fold");
    assert_eq!(moments_on_disk(&bench.disk).len(), 1);
    again.close_image(&name("i")).unwrap();
    assert_eq!(moments_on_disk(&bench.disk), Vec::<String>::new(), "it costs nothing any more");
    let closed = try_read(&*open, volume, 0, 4096).unwrap_err().to_string();
    assert!(closed.contains("closed"), "{closed}");
}

#[test]
fn a_pin_outlives_the_window_and_its_removal_frees_it() {
    let bench = Bench::new("a", 8);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &[1; 4096]);
    group.pin_bookmark(name("pin"), Consistency::Application).unwrap();
    group.create_bookmark(name("plain"), Consistency::Crash).unwrap();
    write(&group, volume, 0, &[2; 4096]);
    fold(&bench, &group);
    write(&group, volume, 0, &[3; 4096]);
    fold(&bench, &group);
    group.close().unwrap();
    drop(group);
    let (group, _) = bench.open();
    assert_eq!(read(&*at_pin(&group, "pin").unwrap(), volume, 0, 4096), [1; 4096]);
    let names: Vec<Name> = group.control().bookmarks.iter().map(|b| b.name.clone()).collect();
    assert_eq!(names, [name("pin")], "a fold keeps pinned bookmarks, and no others");
    let pin = group.control().bookmarks[0].clone();
    assert!(group.cost_at(pin.lsn).unwrap().disk_bytes >= 4096);
    for open in group.images() {
        group.close_this_image(&open).unwrap();
    }
    assert_eq!(moments_on_disk(&bench.disk).len(), 1, "the pin needs it");
    let removed = BookmarkRecord { removed: true, ..pin };
    group.append_control(Control::Bookmark(removed)).unwrap();
    fold(&bench, &group);
    assert_eq!(moments_on_disk(&bench.disk), Vec::<String>::new());
}

#[test]
fn the_volumes_of_an_image_outlive_their_removal_and_their_sizes() {
    let bench = Bench::new("a", 9);
    let (group, volume) = group_with_volume(&bench);
    let other = group.create_volume(name("w"), 1 << 20).unwrap().number;
    write(&group, volume, 0, &[1; 4096]);
    write(&group, volume, BYTES - 4096, &[1; 4096]);
    write(&group, other, 4096, &[1; 8192]);
    fold(&bench, &group);
    write(&group, other, 8192, &[2; 8192]);
    let open = image(&group, "i");
    let expected = [all(&*open, volume), all(&*open, other)];
    let check = |group: &Group, what: &str| {
        let open = group.image(&name("i")).expect(what);
        assert!(all(&*open, volume) == expected[0], "{what}: made smaller");
        assert!(all(&*open, other) == expected[1], "{what}: removed");
    };
    group.resize_volume(&name("v"), 8192).unwrap();
    group.remove_volume(&name("w")).unwrap();
    fold(&bench, &group);
    check(&group, "folded");
    group.resize_volume(&name("v"), BYTES).unwrap();
    write(&group, volume, BYTES - 8192, &[4; 8192]);
    fold(&bench, &group);
    check(&group, "folded again");
    group.close().unwrap();
    drop((open, group));
    let (group, _) = bench.open();
    check(&group, "restarted");
    let base = |disk: &MemoryDisk| disk.list(&dir().join("base")).unwrap();
    assert!(base(&bench.disk).contains(&format!("{other}.img")));
    group.close_image(&name("i")).unwrap();
    assert!(!base(&bench.disk).contains(&format!("{other}.img")), "nobody needs it any more");
}

#[test]
fn what_changed_before_an_image_is_told_also_when_a_fold_beyond_it_has_changed_the_same_chunk() {
    let bench = Bench::new("a", 10);
    let (group, volume) = group_with_volume(&bench);
    let chunk = 1 << 20;
    // Three chunks: old, changed before the image, and untouched.
    write(&group, volume, 0, &[1; 4096]);
    write(&group, volume, chunk, &[1; 4096]);
    fold(&bench, &group);
    let since = group.positions().request_end;
    write(&group, volume, chunk + 4096, &[2; 4096]);
    let open = image(&group, "i");
    let told = |what: &str, group: &Group| {
        let open = group.image(&name("i")).unwrap();
        let changed = open.changed_since(volume, since).unwrap();
        let has = |offset: u64| changed.iter().any(|run| (run.0..run.0 + run.1).contains(&offset));
        assert!(has(chunk + 4096), "{what}: {changed:?}");
        assert!(!has(0), "{what}: the first chunk changed only later: {changed:?}");
        assert!(!has(2 * chunk), "{what}: {changed:?}");
    };
    told("before any fold", &group);
    // The fold beyond it touches all of them, and elsewhere in the chunk.
    for offset in [8192, chunk + 8192, 2 * chunk] {
        write(&group, volume, offset, &[3; 4096]);
    }
    fold(&bench, &group);
    told("a fold beyond it", &group);
    write(&group, volume, chunk + 12288, &[4; 4096]);
    one(&group, volume, Op::Trim { offset: 0, length: 3 * chunk }).unwrap();
    fold(&bench, &group);
    told("two folds beyond it", &group);
    group.close().unwrap();
    drop((open, group));
    told("after a restart", &bench.open().0);
}

#[test]
fn a_long_lived_image_never_stalls_a_small_log_and_stays_exact() {
    let bench = Bench::new("a", 11);
    let (group, volume) = group_with_volume(&bench);
    let limit = 4 * SEGMENT;
    set_policy(&group, 3600, limit);
    write(&group, volume, 0, &[1; 65536]);
    let open = image(&group, "i");
    let before = all(&*open, volume);
    let mut most = 0;
    for round in 0..600u64 {
        write(&group, volume, round % 64 * 4096, &[round as u8; 4096]);
        let positions = group.positions();
        let used = positions.head.bytes_since(positions.horizon);
        // What a writer would wait for.
        assert!(used < limit, "round {round}: {used} bytes");
        most = most.max(used);
        if round % 8 == 7 {
            group.sync_now().unwrap();
            group.fold(false).unwrap();
        }
    }
    assert!(most > limit / 2, "the log was never pressed");
    assert!(group.positions().horizon > open.position().lsn);
    assert!(all(&*open, volume) == before);
    let cost = open.cost();
    assert!(cost.disk_bytes < 64 * 4096 + 16384, "changed blocks, not writes: {cost:?}");
}

/// A program whose folds pass an image and a pin; what they show, and the group itself.
struct Passed {
    image: Vec<Vec<u8>>,
    pin: Vec<Vec<u8>>,
    live: Vec<u8>,
}

fn program(bench: &Bench) -> (Arc<Group>, VolumeNumber, VolumeNumber, Passed) {
    let (group, volume) = group_with_volume(bench);
    let other = group.create_volume(name("w"), 1 << 20).unwrap().number;
    let data: Vec<u8> = (0..1u32 << 16).map(|index| (index / 512) as u8 | 1).collect();
    write(&group, volume, 0, &data);
    write(&group, other, 0, &data[..8192]);
    fold(bench, &group);
    write(&group, volume, 512, &[2; 512]);
    write(&group, other, 4096, &[2; 4096]);
    let both = |view: &dyn View| vec![all(view, volume), all(view, other)];
    let image = both(&*image(&group, "i"));
    write(&group, volume, 4096, &[3; 8192]);
    group.pin_bookmark(name("pin"), Consistency::Crash).unwrap();
    let open = at_pin(&group, "pin").unwrap();
    let pin = both(&*open);
    group.close_this_image(&open).unwrap();
    write(&group, volume, 1024, &[4; 6000]);
    one(&group, volume, Op::Zero { offset: 16384, length: 10_000, no_hole: true }).unwrap();
    group.resize_volume(&name("v"), 1 << 20).unwrap();
    group.remove_volume(&name("w")).unwrap();
    bench.pass(5);
    group.sync_now().unwrap();
    let live = all(&*group, volume);
    (group, volume, other, Passed { image, pin, live })
}

fn check_program(group: &Group, volumes: [VolumeNumber; 2], expected: &Passed, what: &str) {
    let open = group.image(&name("i"));
    let open = open.unwrap_or_else(|| panic!("{what}: the image is lost"));
    let pin = at_pin(group, "pin").unwrap_or_else(|error| panic!("{what}: {error}"));
    for (index, volume) in volumes.into_iter().enumerate() {
        assert!(all(&*open, volume) == expected.image[index], "{what}: image, volume {volume}");
        assert!(all(&*pin, volume) == expected.pin[index], "{what}: pin, volume {volume}");
    }
    assert!(all(group, volumes[0]) == expected.live, "{what}: live");
    group.close_this_image(&pin).unwrap();
}

#[test]
fn a_crash_at_any_boundary_of_a_fold_leaves_an_image_and_a_pin_exact() {
    let bench = Bench::new("a", 12);
    let (group, volume, other, mut expected) = program(&bench);
    let mut boundaries = 0;
    for round in 0..2 {
        bench.disk.record();
        fold(&bench, &group);
        for (boundary, disk) in bench.disk.take_recorded().into_iter().enumerate() {
            boundaries += 1;
            for seed in 0..5 {
                let what = format!("fold {round}, boundary {boundary}, seed {seed}");
                let disk = Arc::new(disk.crash(seed + 100 * boundary as u64));
                let after = Bench { disk, ..bench.after_crash(0) };
                let (group, _) = after.open();
                check_program(&group, [volume, other], &expected, &what);
                write(&group, volume, 0, &[7; 8192]);
                fold(&after, &group);
                let mut live = expected.live.clone();
                live[..8192].fill(7);
                let now = Passed { live, image: expected.image.clone(), pin: expected.pin.clone() };
                check_program(&group, [volume, other], &now, &format!("{what}, folded again"));
            }
        }
        // And a fold of a moment that has been passed before.
        write(&group, volume, 32768, &[5; 20_000]);
        expected.live[32768..52768].fill(5);
        bench.pass(5);
        group.sync_now().unwrap();
    }
    assert!(boundaries > 50, "{boundaries} boundaries");
}

#[test]
fn an_error_at_any_operation_of_a_fold_never_makes_an_image_show_anything_else() {
    let mut lost = 0;
    for operation in 0.. {
        let bench = Bench::new("a", 13);
        let (group, volume, other, expected) = program(&bench);
        bench.disk.inject(Fault::Error { operation: bench.disk.operations() + operation });
        let result = group.fold_now();
        let what = format!("operation {operation}: {result:?}");
        let check = |group: &Group| -> u64 {
            let Some(open) = group.image(&name("i")).filter(|open| open.broken().is_none()) else {
                return 1;
            };
            for (index, volume) in [volume, other].into_iter().enumerate() {
                let bytes = expected.image[index].len();
                match try_read(&*open, volume, 0, bytes) {
                    Ok(found) => assert!(found == expected.image[index], "{what}: {volume}"),
                    Err(error) => panic!("{what}: {error}"),
                }
            }
            0
        };
        lost += check(&group);
        let done = result.is_ok() && bench.disk.operations() < operation;
        if group.data_state().0 != DataState::Failed {
            let _ = group.fold_now();
            check(&group);
            assert!(all(&*group, volume) == expected.live, "{what}");
        }
        drop(group);
        bench.disk.clear_faults();
        let (group, _) = bench.open();
        check(&group);
        assert!(all(&*group, volume) == expected.live, "{what}: after a restart");
        fold(&bench, &group);
        check(&group);
        let codes = bench.event_codes();
        if group.image(&name("i")).is_none() {
            assert!(codes.contains(&"image-lost".to_owned()), "{what}: {codes:?}");
        }
        if done || operation > 120 {
            break;
        }
    }
    assert!(lost > 0, "no error was in what is kept");
}

#[test]
fn readers_of_an_image_race_a_folder_and_never_see_anything_newer() {
    let bench = Bench::new("a", 14);
    let (group, volume) = group_with_volume(&bench);
    let blocks = 64;
    write(&group, volume, 0, &vec![1; blocks * 4096]);
    fold(&bench, &group);
    write(&group, volume, 8192, &[2; 512]);
    let open = image(&group, "i");
    let expected = all(&*open, volume);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3)
            .map(|reader| {
                let (open, expected, done) = (&open, &expected, &done);
                scope.spawn(move || {
                    let dice = model::Dice::new(reader);
                    let mut reads = 0;
                    while !done.load(Ordering::Relaxed) {
                        let offset = dice.below(blocks as u64 * 4096 - 1);
                        let bytes = (1 + dice.below(60_000)).min(BYTES - offset) as usize;
                        let found = read(&**open, volume, offset, bytes);
                        let at = offset as usize;
                        assert!(found == expected[at..at + bytes], "{bytes} bytes at {offset}");
                        for extent in open.extents(volume, offset, bytes as u64, 9).unwrap() {
                            let at = extent.offset as usize;
                            let range = at..at + extent.length as usize;
                            let zeros = expected[range].iter().all(|byte| *byte == 0);
                            assert!(extent.allocation == Allocation::Data || zeros, "{extent:?}");
                        }
                        reads += 1;
                    }
                    reads
                })
            })
            .collect();
        let dice = model::Dice::new(99);
        for round in 0..150 {
            for _ in 0..8 {
                let offset = dice.below(blocks as u64) * 4096;
                match dice.below(4) {
                    0 => one(&group, volume, Op::Trim { offset, length: 8192 }).unwrap(),
                    _ => write(&group, volume, offset + 512, &[round as u8; 5000]),
                };
            }
            fold(&bench, &group);
        }
        done.store(true, Ordering::Relaxed);
        let reads: u64 = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
        assert!(reads > 100, "{reads} reads");
    });
    assert!(all(&*open, volume) == expected);
}

#[test]
fn what_is_kept_and_damaged_is_an_error_and_never_other_bytes() {
    let bench = Bench::new("a", 17);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &[1; 16384]);
    let open = image(&group, "i");
    let lsn = open.position().lsn;
    group.pin_bookmark(name("pin"), Consistency::Crash).unwrap();
    write(&group, volume, 0, &[2; 16384]);
    fold(&bench, &group);
    let moment = dir().join("moments").join(lsn.to_string());
    bench.disk.damage(&moment.join("blocks"), 4096, 1, 0x10);
    assert_eq!(read(&*open, volume, 0, 4096), [1; 4096], "the others are whole");
    let error = try_read(&*open, volume, 0, 16384).unwrap_err().to_string();
    assert!(error.contains("kept blocks from slot"), "{error}");
    group.close().unwrap();
    drop((open, group));
    for file in ["index", "control"] {
        let disk = Arc::new(bench.disk.snapshot());
        disk.damage(&moment.join(file), 45, 1, 0x10);
        let after = Bench { disk, ..bench.after_crash(0) };
        let (group, _) = after.open();
        assert!(group.image(&name("i")).is_none(), "{file}");
        let error = at_pin(&group, "pin").map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("not kept on this node"), "{file}: {error}");
        let codes = after.event_codes();
        assert!(codes.contains(&"image-lost".to_owned()), "{file}: {codes:?}");
        assert!(codes.contains(&"pin-lost".to_owned()), "{file}: {codes:?}");
        assert_eq!(read(&*group, volume, 0, 16384), [2; 16384], "{file}");
    }
}

#[test]
fn a_damaged_block_of_the_base_is_kept_as_damaged() {
    let bench = Bench::new("a", 19);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &[1; 16384]);
    fold(&bench, &group);
    let open = image(&group, "i");
    bench.disk.damage(&dir().join("base").join(format!("{volume}.img")), 5000, 1, 0x10);
    write(&group, volume, 0, &[2; 16384]);
    fold(&bench, &group);
    assert_eq!(read(&*group, volume, 0, 16384), [2; 16384], "the fold has mended the base");
    assert_eq!(read(&*open, volume, 8192, 8192), [1; 8192]);
    let error = try_read(&*open, volume, 0, 16384).unwrap_err().to_string();
    assert!(error.contains("kept blocks from slot 0"), "{error}");
    assert!(bench.event_codes().contains(&"moment-damaged".to_owned()));
}

/// A fold had kept what it needs, and not begun; then the log was cut and grew anew.
#[test]
fn what_a_fold_that_never_began_has_kept_counts_for_no_other_history() {
    let bench = Bench::new("a", 18);
    bench.clock.set_boot(1);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &[1; 16384]);
    fold(&bench, &group);
    let open = image(&group, "i");
    write(&group, volume, 0, &[2; 4096]);
    fold(&bench, &group);
    let kept_to = group.positions().request_end;
    write(&group, volume, 65536, &[3; 60_000]);
    bench.pass(5);
    group.sync_now().unwrap();
    bench.disk.record();
    group.fold_now().unwrap();
    drop((open, group));
    let mut elsewhere = 0;
    for (boundary, disk) in bench.disk.take_recorded().into_iter().enumerate() {
        let disk = Arc::new(disk.snapshot());
        let after = Bench { disk, ..bench.after_crash(0) };
        let (group, _) = after.open();
        if group.lock().fold_target > kept_to {
            continue;
        }
        elsewhere += 1;
        let chain = group.chain_at(kept_to).unwrap();
        group.yield_to(kept_to, chain, Discard::Authored).unwrap();
        group.promote("test").unwrap();
        // Not as far as the fold that never was would have gone; then further.
        for round in 4..6 {
            write(&group, volume, 8192, &[round; 8192]);
            fold(&after, &group);
            let found = all(&*group.image(&name("i")).unwrap(), volume);
            assert!(found[..16384] == [1; 16384], "boundary {boundary}, round {round}");
            write(&group, volume, 65536, &[round; 60_000]);
        }
        drop(group);
        let (group, _) = after.open();
        let found = all(&*group.image(&name("i")).unwrap(), volume);
        assert!(found[..16384] == [1; 16384], "boundary {boundary}, after a restart");
    }
    assert!(elsewhere > 2, "{elsewhere} boundaries before the fold began");
}

/// A fold was interrupted in the middle of the base, and what it had kept is gone.
#[test]
fn what_is_missing_when_a_fold_goes_on_is_told_and_not_made_of_its_half() {
    let bench = Bench::new("a", 20);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &[1; 65536]);
    fold(&bench, &group);
    group.pin_bookmark(name("pin"), Consistency::Crash).unwrap();
    let horizon = group.positions().horizon;
    write(&group, volume, 0, &[2; 65536]);
    bench.pass(5);
    group.sync_now().unwrap();
    bench.disk.record();
    group.fold_now().unwrap();
    drop(group);
    let mut interrupted = 0;
    for (boundary, disk) in bench.disk.take_recorded().into_iter().enumerate() {
        let disk = Arc::new(disk.snapshot());
        let moments = dir().join("moments");
        if disk.exists(&moments).unwrap() {
            disk.remove_dir(&moments).unwrap();
        }
        let begun = Bench { disk: Arc::new(disk.snapshot()), ..bench.after_crash(0) };
        let (group, _) = begun.open();
        let finished = group.positions().horizon > horizon;
        match at_pin(&group, "pin") {
            Ok(open) => {
                assert!(!finished, "boundary {boundary}: made of the half");
                assert_eq!(read(&*open, volume, 0, 65536), [1; 65536], "boundary {boundary}");
            }
            Err(error) => {
                assert!(finished, "boundary {boundary}: the log still covers it: {error}");
                assert!(begun.event_codes().contains(&"pin-lost".to_owned()));
                interrupted += 1;
            }
        }
    }
    assert!(interrupted > 3, "{interrupted} boundaries in the base");
}

/// Looks as an image does, and lets something happen behind the first look.
struct Meanwhile<'a> {
    image: &'a Image,
    hook: std::cell::RefCell<Option<Box<dyn FnOnce() + 'a>>>,
}

impl super::super::read::Lookup for Meanwhile<'_> {
    fn with_content(&self, look: &mut dyn FnMut(&super::super::content::Content)) {
        self.image.with_content(look);
        if let Some(hook) = self.hook.borrow_mut().take() {
            hook();
        }
    }

    fn moment(&self) -> Option<Arc<super::super::moment::Moment>> {
        self.image.moment()
    }
}

#[test]
fn what_a_fold_trims_while_it_is_asked_what_an_image_holds_is_still_data() {
    use super::super::read::Lookup;
    let bench = Bench::new("a", 21);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &[1; 65536]);
    fold(&bench, &group);
    let open = image(&group, "i");
    let trim = || {
        one(&group, volume, Op::Trim { offset: 0, length: 65536 }).unwrap();
        fold(&bench, &group);
    };
    let hook: Box<dyn FnOnce() + '_> = Box::new(trim);
    let meanwhile = Meanwhile { image: &open, hook: std::cell::RefCell::new(Some(hook)) };
    let extents = group.extents_through(&meanwhile, volume, 0, 131_072, 100).unwrap();
    assert!(meanwhile.moment().is_some(), "the fold has passed it");
    let data = Extent { offset: 0, length: 65536, allocation: Allocation::Data };
    assert_eq!(extents[0], data, "{extents:?}");
    assert_eq!(extents[1].offset, 65536);
}
