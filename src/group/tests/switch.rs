//! What a switch to an image must not leave behind, whatever the disk says to it.

use super::resync::{Pair, all, follow, same, send, staged};
use super::*;
use crate::io::Fault;

/// The copy has followed a volume into its base that the primary after a forced promote never
/// had, and takes all of an image of that one.
fn forked() -> (Pair, Lsn) {
    let pair = Pair::new(1);
    let volume = pair.primary.create_volume(name("v"), 1 << 20).unwrap().number;
    write(&pair.primary, volume, 0, &[1; 4096]);
    pair.follow();
    pair.primary.sync_now().unwrap();
    let common = pair.primary.positions().head;
    let before = pair.here.after_crash(9);
    let gone = pair.primary.create_volume(name("w"), 1 << 20).unwrap().number;
    write(&pair.primary, gone, 0, &[2; 1 << 20]);
    pair.follow();
    pair.copy.fold_all().unwrap();
    assert!(pair.there.disk.exists(&dir().join(format!("base/{gone}.img"))).unwrap());
    drop(pair.primary);
    let (primary, _) = before.open();
    primary.promote("test").unwrap();
    primary.begin_epoch(primary.new_epoch("test", 9)).unwrap();
    let pair = Pair { here: before, primary, ..pair };
    for offset in 0..64 {
        write(&pair.primary, volume, offset * 4096, &[4; 4096]);
    }
    pair.fold();
    assert!(pair.primary.log_start() > common);
    assert!(send(&pair.primary, &pair.copy, None, common, usize::MAX));
    (pair, common)
}

/// The primary makes a volume of the number that the other history had used, and the copy starts
/// again before that is folded.
fn check_number_used_again(mut pair: Pair, what: &str) {
    pair.primary.end_shipment(&name("b"));
    let again = pair.primary.create_volume(name("x"), 1 << 20).unwrap().number;
    write(&pair.primary, again, 8192, &[5; 512]);
    pair.follow();
    same(&pair.primary, &pair.copy, what);
    pair.copy.close().unwrap();
    pair.copy = pair.there.open().0;
    let mut expected = vec![0; 1 << 20];
    expected[8192..8704].fill(5);
    let found = read(&*pair.copy, again, 0, 1 << 20);
    assert!(found == expected, "{what}: bytes of another volume");
    pair.there.pass(5);
    pair.copy.fold_now().unwrap();
    assert!(read(&*pair.copy, again, 0, 1 << 20) == expected, "{what}: in the base");
    same(&pair.primary, &pair.copy, what);
}

#[test]
fn a_number_that_another_history_used_shows_nothing_of_its_volume() {
    let (pair, _) = forked();
    pair.copy.switch_to_image().unwrap();
    pair.there.pass(5);
    pair.copy.fold_now().unwrap();
    check_number_used_again(pair, "in the base while it runs");
    // The start finishes what a crash has left of the switch.
    let (mut pair, _) = forked();
    pair.copy.switch_to_image().unwrap();
    pair.restart_copy(3);
    check_number_used_again(pair, "in the base by the start");
}

#[test]
fn a_failed_sync_anywhere_in_the_switch_leaves_the_old_image_or_the_new_one() {
    let mut stopped = [0, 0];
    // The second one is of the write that is to latch the first.
    for count in 1..=2 {
        for operation in 0.. {
            let (pair, common) = forked();
            let (old, new) = (all(&pair.copy), all(&pair.primary));
            let disk = &pair.there.disk;
            for _ in 0..count {
                disk.inject(Fault::FailedSync { operation: disk.operations() + operation });
            }
            let switched = pair.copy.switch_to_image();
            disk.clear_faults();
            let Err(error) = switched else { break };
            let what = format!("{count} from operation {operation}: {error}");
            // The peer ships it anew a second later, and may drop what is staged.
            pair.primary.end_shipment(&name("b"));
            let again = pair.primary.ship(&name("b"), None, common, None);
            let _ = again.and_then(|shipment| pair.copy.begin_image(&shipment.offer()));
            let _ = pair.copy.drop_staging();
            drop(pair.copy);
            for after in [pair.there.after_crash(operation), pair.there] {
                let (copy, _) = after.open();
                let found = all(&copy);
                if found == new {
                    stopped[1] += 1;
                } else {
                    assert!(found == old, "{what}: neither the old image nor the new one");
                    stopped[0] += 1;
                    pair.primary.end_shipment(&name("b"));
                    assert!(send(&pair.primary, &copy, None, common, usize::MAX));
                    copy.switch_to_image().unwrap();
                }
                pair.primary.end_shipment(&name("b"));
                follow(&pair.primary, &copy);
                same(&pair.primary, &copy, &what);
            }
        }
    }
    assert!(stopped.iter().all(|count| *count > 0), "{stopped:?}");
}

/// The simulation's seed 700016315 of an earlier state: the decision was in the cache alone when
/// the process was killed, the next one had moved what was staged, and then the power failed.
#[test]
fn a_kill_in_a_switch_and_a_power_loss_in_the_next_start_leave_the_old_image_or_the_new_one() {
    for partial in [true, false] {
        let (pair, [old, new]) = staged(5, partial);
        pair.there.disk.record();
        pair.copy.switch_to_image().unwrap();
        let mut shown = [0, 0];
        for (boundary, disk) in pair.there.disk.take_recorded().into_iter().enumerate() {
            let killed = Bench { disk: Arc::new(disk), ..pair.there.after_crash(0) };
            killed.disk.record();
            drop(killed.open());
            // Where only a part is sent, much is folded first.
            let step = if partial { 16 } else { 1 };
            let stopped = killed.disk.take_recorded().into_iter().enumerate();
            for (second, disk) in stopped.step_by(step) {
                let what = format!("partial {partial}, boundary {boundary}, then {second}");
                let disk = Arc::new(disk.crash((boundary * 100 + second) as u64));
                let after = Bench { disk, ..pair.there.after_crash(0) };
                let (copy, _) = after.open();
                let found = all(&copy);
                if found == new {
                    shown[1] += 1;
                } else {
                    assert!(found == old, "{what}: neither the old image nor the new one");
                    shown[0] += 1;
                    let since = copy.positions().head;
                    let since = (since > Lsn::ZERO).then_some(since);
                    let common = since.unwrap_or_default();
                    assert!(send(&pair.primary, &copy, since, common, usize::MAX), "{what}");
                    copy.switch_to_image().unwrap();
                }
                pair.primary.end_shipment(&name("b"));
                follow(&pair.primary, &copy);
                same(&pair.primary, &copy, &what);
            }
        }
        assert!(shown.iter().all(|count| *count > 0), "{shown:?}");
    }
}

#[test]
fn an_error_anywhere_in_a_promote_never_ends_in_a_primary_that_the_next_start_demotes() {
    let faults: [fn(u64) -> Fault; 2] =
        [|operation| Fault::FailedSync { operation }, |operation| Fault::Error { operation }];
    let mut stopped = 0;
    for fault in faults {
        for operation in 0.. {
            let bench = Bench::new("a", 5);
            let group = bench.create();
            let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
            group.demote().unwrap();
            bench.disk.inject(fault(bench.disk.operations() + operation));
            let promoted = group.promote("test");
            bench.disk.clear_faults();
            if promoted.is_ok() {
                break;
            }
            stopped += 1;
            if group.promote("test").is_ok() {
                write(&group, volume, 0, &[1; 512]);
                group.sync_now().unwrap();
                group.mark_durable();
                drop(group);
                let (group, _) = bench.open();
                assert_eq!(group.role(), Role::Primary, "operation {operation}");
                assert_eq!(read(&*group, volume, 0, 512), [1; 512]);
                continue;
            }
            drop(group);
            let (group, _) = bench.open();
            group.promote("test").unwrap();
            drop(group);
            assert_eq!(bench.open().0.role(), Role::Primary, "operation {operation}");
        }
    }
    assert!(stopped > 4, "{stopped}");
}

/// Found by reading: such a copy showed its own old bytes where the primary has zeros, and then did
/// not know that they had changed.
#[test]
fn what_an_image_cuts_off_is_zeros_also_where_the_volume_grows_before_it_is_in_the_base() {
    let pair = Pair::new(11);
    let (here, end) = (&pair.primary, 3 << 20);
    let volume = here.create_volume(name("v"), end).unwrap().number;
    write(here, volume, 0, &[1; 4096]);
    write(here, volume, 2 << 20, &[2; 20_000]);
    pair.follow();
    let before = pair.copy.positions().request_end;
    here.resize_volume(&name("v"), 1 << 20).unwrap();
    pair.fold();
    assert!(send(here, &pair.copy, Some(before), before, usize::MAX));
    here.resize_volume(&name("v"), end).unwrap();
    pair.copy.switch_to_image().unwrap();
    here.end_shipment(&name("b"));
    pair.follow();
    for what in ["staged", "in the base"] {
        assert_eq!(pair.copy.merging().is_some(), what == "staged");
        same(here, &pair.copy, what);
        let extents = pair.copy.extents(volume, 1 << 20, 2 << 20, 100).unwrap();
        let is_hole = |extent: &Extent| extent.allocation == Allocation::Hole;
        assert!(extents.iter().all(is_hole), "{what}: {extents:?}");
        let image = pair.copy.open_image(&Point::Now, None, "test", None).unwrap();
        let changed = image.changed_since(volume, before).unwrap();
        let is_old = |(at, length): &(u64, u64)| *at <= 2 << 20 && at + length >= end;
        assert!(changed.iter().any(is_old), "{what}: {changed:?}");
        pair.copy.close_this_image(&image).unwrap();
        pair.there.pass(5);
        pair.copy.fold_now().unwrap();
    }
}

#[test]
fn what_grew_and_was_cut_off_before_an_image_counts_as_changed_where_it_grows_again() {
    let pair = Pair::new(13);
    let (here, copy) = (&pair.primary, &pair.copy);
    let volume = here.create_volume(name("v"), 1 << 20).unwrap().number;
    write(here, volume, 0, &[1; 4096]);
    pair.follow();
    let before = copy.positions().request_end;
    here.resize_volume(&name("v"), 4 << 20).unwrap();
    write(here, volume, 2 << 20, &[2; 4096]);
    let between = here.positions().request_end;
    here.resize_volume(&name("v"), 1 << 20).unwrap();
    pair.fold();
    assert!(send(here, copy, Some(before), before, usize::MAX));
    copy.switch_to_image().unwrap();
    here.end_shipment(&name("b"));
    here.resize_volume(&name("v"), 4 << 20).unwrap();
    pair.follow();
    for what in ["staged", "in the base"] {
        assert_eq!(copy.merging().is_some(), what == "staged");
        same(here, copy, what);
        let image = copy.open_image(&Point::Now, None, "test", None).unwrap();
        let changed = image.changed_since(volume, between).unwrap();
        let is_old = |(at, length): &(u64, u64)| *at <= 2 << 20 && at + length > 2 << 20;
        assert!(changed.iter().any(is_old), "{what}: {changed:?}");
        copy.close_this_image(&image).unwrap();
        pair.there.pass(5);
        copy.fold_now().unwrap();
    }
}
