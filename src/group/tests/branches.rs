//! Images of branches: the group as it was when a tail was cut off.

use super::*;
use crate::group::reopen::KeptImage;
use crate::io::Fault;
use crate::log::control::Consistency;
use crate::log::segment::segment_name;

const BYTES: u64 = 1 << 20;

fn fold(bench: &Bench, group: &Group) {
    bench.pass(5);
    group.sync_now().unwrap();
    assert_eq!(group.fold_now().unwrap(), group.positions().head);
}

type Volumes = Vec<(Volume, Vec<u8>)>;

fn all(view: &dyn View) -> Volumes {
    let volumes = view.volumes().into_iter();
    volumes
        .map(|volume| {
            let bytes = read(view, volume.number, 0, volume.size_bytes as usize);
            (volume, bytes)
        })
        .collect()
}

/// A group that yielded a tail, promoted again; the branch, what the group was with it, and
/// without.
fn with_branch(bench: &Bench) -> (Arc<Group>, VolumeNumber, Branch, Volumes, Volumes) {
    let group = bench.create();
    let volume = group.create_volume(name("v"), BYTES).unwrap().number;
    set_policy(&group, 0, 64 << 20);
    write(&group, volume, 0, &vec![1; 256 << 10]);
    fold(bench, &group);
    write(&group, volume, 512, &[2; 512]);
    let positions = group.positions();
    let without = all(&*group);
    write(&group, volume, 1024, &[3; 8192]);
    one(&group, volume, Op::Trim { offset: 16384, length: 8192 }).unwrap();
    group.create_volume(name("w"), 8192).unwrap();
    group.resize_volume(&name("v"), BYTES / 2).unwrap();
    write(&group, volume, 200_000, &vec![4; 100_000]);
    let with = all(&*group);
    group.yield_to(positions.head, positions.chain, Discard::Authored).unwrap();
    assert!(all(&*group) == without);
    group.promote("test").unwrap();
    let [branch] = &group.branches().unwrap()[..] else { panic!("one branch") };
    (group, volume, branch.clone(), with, without)
}

/// Else a fold that goes less far finds it complete, and the start after that goes by no section of
/// a fold that has not begun.
#[test]
fn what_is_kept_of_one_branch_for_a_fold_that_finds_no_room_for_another_does_not_count() {
    for pages in 0.. {
        let bench = Bench::new("a", 1);
        let (group, volume, ..) = with_branch(&bench);
        group.sync_now().unwrap();
        let positions = group.positions();
        write(&group, volume, 4096, &[6; 8192]);
        group.yield_to(positions.head, positions.chain, Discard::Authored).unwrap();
        group.promote("test").unwrap();
        write(&group, volume, 0, &vec![5; 256 << 10]);
        bench.pass(5);
        group.sync_now().unwrap();
        bench.disk.inject(Fault::NoSpace { bytes: pages * 4096 });
        let folded = group.fold_now().is_ok();
        bench.disk.clear_faults();
        let begun = group.meta.lock().unwrap().meta.fold_target;
        let complete_to: Vec<Lsn> =
            group.lock().moments.values().map(|moment| moment.complete_to()).collect();
        assert!(complete_to.iter().all(|to| *to <= begun), "{pages}: {complete_to:?}, {begun}");
        if folded {
            assert_eq!(complete_to, [begun; 2]);
            return;
        }
    }
}

#[test]
fn no_error_of_the_disk_in_a_fold_ends_a_branch() {
    for operation in 0.. {
        let bench = Bench::new("a", 1);
        let (group, volume, branch, with, _) = with_branch(&bench);
        write(&group, volume, 0, &vec![5; 256 << 10]);
        bench.pass(5);
        group.sync_now().unwrap();
        bench.disk.inject(Fault::Error { operation: bench.disk.operations() + operation });
        let folded = group.fold_now().is_ok();
        bench.disk.clear_faults();
        assert!(!bench.event_codes().contains(&"branch-lost".to_owned()), "{operation}");
        drop(group);
        let (group, _) = bench.open();
        let image = group.open_branch_image(&branch.name, None, "test");
        let image = image.unwrap_or_else(|error| panic!("operation {operation}: {error}"));
        assert!(all(&*image) == with, "operation {operation}");
        if folded && operation > 60 {
            return;
        }
    }
}

/// Each attempt wrote all of it once more, behind what the one before had written.
#[test]
fn what_a_branch_keeps_is_not_written_once_more_with_each_fold_that_fails() {
    let kept = |operation: Option<u64>| {
        let bench = Bench::new("a", 1);
        let (group, volume, ..) = with_branch(&bench);
        write(&group, volume, 0, &vec![5; 256 << 10]);
        bench.pass(5);
        group.sync_now().unwrap();
        if let Some(operation) = operation {
            bench.disk.inject(Fault::Error { operation: bench.disk.operations() + operation });
        }
        let failed = group.fold_now().is_err();
        bench.disk.clear_faults();
        let folded = !failed || group.fold_now().is_ok();
        let moments = group.lock().moments.clone();
        let overlays = moments.values().filter_map(|moment| moment.overlay());
        (failed, folded, overlays.map(|overlay| overlay.bytes()).sum::<u64>())
    };
    let (_, _, once) = kept(None);
    let mut again = 0;
    for operation in 0..60 {
        let (failed, folded, bytes) = kept(Some(operation));
        if failed && folded {
            assert_eq!(bytes, once, "operation {operation}");
            again += 1;
        }
    }
    assert!(once > 0 && again > 3, "{once} bytes, {again} times");
}

#[test]
fn a_branch_is_shown_as_it_was_after_folds_past_its_cut_and_after_a_restart() {
    let bench = Bench::new("a", 1);
    let (group, volume, branch, with, without) = with_branch(&bench);
    let open = |group: &Group, named: &str| {
        group.open_branch_image(&branch.name, Some(name(named)), "test").unwrap()
    };
    let image = open(&group, "i");
    assert_eq!(image.branch(), Some(&*branch.name));
    assert_eq!(image.position(), branch.to);
    assert!(all(&*image) == with);
    assert!(all(&*group) == without);
    for round in 5..8 {
        write(&group, volume, 0, &[round; 65536]);
        write(&group, volume, 210_000, &[round; 5000]);
        fold(&bench, &group);
        assert!(all(&*image) == with, "round {round}");
        let again = open(&group, "again");
        assert!(all(&*again) == with, "round {round}, opened anew");
        group.close_this_image(&again).unwrap();
    }
    assert!(group.positions().horizon > branch.to.lsn);
    assert!(group.cost_at(branch.from.lsn).unwrap().disk_bytes > 65536);
    group.close().unwrap();
    drop((image, group));
    let (group, _) = bench.open();
    assert!(all(&*group.image(&name("i")).expect("it survives a restart")) == with);
    let refused = group.remove_branch(&branch.name).unwrap_err().to_string();
    assert!(refused.contains("tidelog image close g@i"), "{refused}");
    group.close_image(&name("i")).unwrap();
    group.close().unwrap();
    drop(group);
    let (group, _) = bench.open();
    write(&group, volume, 0, &[9; 65536]);
    fold(&bench, &group);
    assert!(all(&*open(&group, "late")) == with, "the branch itself keeps its moment");
    group.close_image(&name("late")).unwrap();
    group.remove_branch(&branch.name).unwrap();
    assert!(bench.disk.list(&dir().join("moments")).unwrap().is_empty(), "it is freed");
    let gone = group.open_branch_image(&branch.name, None, "test").map(|_| ()).unwrap_err();
    assert!(gone.to_string().contains("tidelog branch list g"), "{gone}");
    for path in ["..", "../branches", ""] {
        assert!(group.open_branch_image(path, None, "test").is_err(), "{path}");
    }
}

#[test]
fn a_full_disk_ends_images_and_pins_but_no_branch_and_says_what_would_help() {
    let bench = Bench::new("a", 2);
    let (group, volume, branch, with, _) = with_branch(&bench);
    group.pin_bookmark(name("pin"), Consistency::Crash).unwrap();
    write(&group, volume, 0, &[5; 32768]);
    fold(&bench, &group);
    write(&group, volume, 0, &vec![6; 400_000]);
    bench.pass(5);
    group.sync_now().unwrap();
    while group.segments.drop_spares().unwrap() {}
    let space = bench.disk.space(&dir()).unwrap();
    bench.disk.set_total_bytes(space.total_bytes - space.free_bytes + 8192);
    let told = group.fold_now().unwrap_err().to_string();
    assert!(told.contains("no space") && told.contains("tidelog branch remove"), "{told}");
    assert!(bench.event_codes().contains(&"pin-lost".to_owned()));
    assert!(!bench.event_codes().contains(&"branch-lost".to_owned()));
    let open = group.open_branch_image(&branch.name, None, "test").unwrap();
    assert!(all(&*open) == with);
    bench.disk.set_total_bytes(1 << 40);
    fold(&bench, &group);
    assert!(all(&*open) == with);
}

#[test]
fn a_branch_of_a_history_that_was_cut_again_below_it_is_refused() {
    let bench = Bench::new("a", 3);
    let group = bench.create();
    let volume = group.create_volume(name("v"), BYTES).unwrap().number;
    write(&group, volume, 0, &[1; 4096]);
    let below = group.positions();
    write(&group, volume, 0, &[2; 4096]);
    let cut = group.positions();
    write(&group, volume, 0, &[3; 4096]);
    group.yield_to(cut.head, cut.chain, Discard::Authored).unwrap();
    let later = group.branches().unwrap()[0].name.clone();
    let open = group.open_branch_image(&later, Some(name("i")), "test").unwrap();
    group.promote("test").unwrap();
    group.yield_to(below.head, below.chain, Discard::Authored).unwrap();
    assert!(open.broken().unwrap().contains("left the history"));
    group.close_image(&name("i")).unwrap();
    group.promote("test").unwrap();
    // Grown over the place where the first branch had left.
    for _ in 0..4 {
        write(&group, volume, 0, &[4; 4096]);
    }
    let refused = group.open_branch_image(&later, None, "test").map(|_| ()).unwrap_err();
    assert!(refused.to_string().contains("was cut again"), "{refused}");
    // The first record of what was torn tells nothing.
    let path = dir().join("branches").join(&later).join(segment_name(0));
    bench.disk.damage(&path, cut.head.0 + 8, 1, 0xff);
    let refused = group.open_branch_image(&later, None, "test").map(|_| ()).unwrap_err();
    assert!(refused.to_string().contains("was cut again"), "{refused}");
}

/// Of the history that had grown over the place it showed what was before, and a part of a request.
#[test]
fn a_point_whose_history_was_cut_before_its_image_is_made_is_refused() {
    let bench = Bench::new("a", 5);
    let group = bench.create();
    let volume = group.create_volume(name("v"), BYTES).unwrap().number;
    write(&group, volume, 0, &[1; 4096]);
    let below = group.positions();
    write(&group, volume, 0, &[2; 20_000]);
    let point = |point: &Point| group.resolve(point).unwrap().position();
    let kept = |position: Position| KeptImage {
        name: name("i"),
        owner: "test".to_owned(),
        position,
        opened: position.time,
        expires: None,
        branch: None,
    };
    let left = point(&Point::Now);
    group.yield_to(below.head, below.chain, Discard::Authored).unwrap();
    group.promote("test").unwrap();
    write(&group, volume, 0, &[3; 60_000]);
    assert!(group.positions().head > left.lsn);
    let refused = group.build_image(kept(left), None).map(|_| ()).unwrap_err().to_string();
    assert!(refused.contains("left the history while the image was opened"), "{refused}");
    assert!(group.images().is_empty());
    for still in [point(&Point::Now), point(&Point::Lsn(below.head))] {
        group.build_image(kept(still), None).unwrap();
        group.close_image(&name("i")).unwrap();
    }
}

#[test]
fn the_branch_of_a_torn_tail_shows_a_prefix() {
    let mut shown = 0;
    for seed in 0..40 {
        let bench = Bench::new("a", 100 + seed);
        bench.clock.set_boot(1);
        let group = bench.create();
        let volume = group.create_volume(name("v"), BYTES).unwrap().number;
        group.sync_now().unwrap();
        for block in 0..40 {
            write(&group, volume, block * 4096, &[block as u8 + 1; 4096]);
        }
        drop(group);
        let after = bench.after_crash(seed);
        after.clock.set_boot(2);
        let (group, _) = after.open();
        for branch in group.branches().unwrap() {
            let open = group.open_branch_image(&branch.name, None, "test").unwrap();
            let bytes = read(&*open, volume, 0, 40 * 4096);
            let blocks = bytes.chunks(4096).enumerate();
            let there = blocks.take_while(|(at, block)| block[..] == [*at as u8 + 1; 4096]).count();
            assert!(bytes[there * 4096..].iter().all(|byte| *byte == 0), "seed {seed}: no prefix");
            assert!(open.position().lsn >= branch.from.lsn && open.position().lsn <= branch.to.lsn);
            shown += 1;
        }
    }
    assert!(shown > 5, "{shown} branches");
}
