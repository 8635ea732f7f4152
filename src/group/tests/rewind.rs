//! Going back to an earlier moment, and on from there: nothing that was is lost by it.

use super::moments::{all, at_pin, fold, group_with_volume, image};
use super::pins::follow;
use super::resync::{Pair, same, send};
use super::*;
use crate::io::Fault;
use crate::log::control::Consistency;

type Volumes = Vec<(Volume, Vec<u8>)>;

fn contents(view: &dyn View) -> Volumes {
    let volumes = view.volumes().into_iter();
    volumes
        .map(|volume| {
            let bytes = read(view, volume.number, 0, volume.size_bytes as usize);
            (volume, bytes)
        })
        .collect()
}

/// What a group was at a position, as an image shows it.
fn was(group: &Group, lsn: Lsn) -> Volumes {
    let open = group.open_image(&Point::Lsn(lsn), None, "test", None).unwrap();
    let was = contents(&*open);
    group.close_this_image(&open).unwrap();
    was
}

fn end(group: &Group) -> Lsn {
    group.positions().request_end
}

#[test]
fn going_back_brings_back_volumes_sizes_and_data_and_nothing_else() {
    let bench = Bench::new("a", 1);
    let (group, volume) = group_with_volume(&bench);
    let gone = group.create_volume(name("gone"), 1 << 20).unwrap().number;
    write(&group, volume, 0, &[1; 9000]);
    write(&group, gone, 4096, &[2; 5000]);
    let (to, before) = (end(&group), contents(&*group));
    write(&group, volume, 4096, &[3; 100_000]);
    one(&group, volume, Op::Trim { offset: 0, length: 512 }).unwrap();
    group.resize_volume(&name("v"), 1 << 20).unwrap();
    group.remove_volume(&name("gone")).unwrap();
    let new = group.create_volume(name("new"), 1 << 20).unwrap().number;
    write(&group, new, 0, &[4; 512]);
    group.create_bookmark(name("inside"), Consistency::Crash).unwrap();
    set_policy(&group, 7, 64 << 20);
    let after = contents(&*group);
    let (from, epochs) = (end(&group), group.control().epochs.clone());
    let rewound = group.rewind(&Point::Lsn(to), false).unwrap();
    assert_eq!((rewound.from.lsn, rewound.to.lsn, rewound.at), (from, to, end(&group)));
    assert!(group.positions().durable >= rewound.at, "durable before it is answered");
    assert!(contents(&*group) == before);
    assert!(bench.event_codes().contains(&"rewound".to_owned()));
    let control = group.control();
    assert_eq!(control.epochs, epochs);
    assert_eq!(control.policy.window, Span::from_secs(7), "the policy stays as it is now");
    assert_eq!(control.bookmarks.len(), 1, "so do bookmarks");
    assert!(was(&group, control.bookmarks[0].lsn) == after);
    assert_eq!(control.rewinds.len(), 1);
    let again = group.create_volume(name("again"), 4096).unwrap().number;
    assert!(again > new, "a number is never used again");
    write(&group, again, 0, &[5; 4096]);
    let (behind, forward) = (end(&group), contents(&*group));
    // Undone, and that undone again; across a restart each time.
    for (point, expected) in [(from, &after), (behind, &forward), (to, &before)] {
        group.rewind(&Point::Lsn(point), false).unwrap();
        assert!(contents(&*group) == *expected, "{point}");
        let (reopened, recovery) = {
            group.sync_now().unwrap();
            Bench { disk: Arc::new(bench.disk.crash(1)), ..bench.after_crash(1) }.open()
        };
        assert_eq!(recovery.damaged, []);
        assert!(contents(&*reopened) == *expected, "{point}, after a crash");
    }
    for (at, expected) in [(to, &before), (from, &after), (rewound.at, &before)] {
        assert!(was(&group, at) == *expected, "all of it can be read: {at}");
    }
    let nothing = group.rewind(&Point::Now, false).unwrap_err().to_string();
    assert!(nothing.contains("nothing was written since"), "{nothing}");
}

#[test]
fn going_back_is_refused_while_clients_are_connected_and_force_cuts_them_off() {
    let bench = Bench::new("a", 2);
    let (group, volume) = group_with_volume(&bench);
    let to = end(&group);
    write(&group, volume, 0, &[1; 512]);
    let head = group.positions().head;
    let own = group.client(volume).unwrap();
    for force in [false, true] {
        let refused = group.rewind(&Point::Lsn(to), force).unwrap_err().to_string();
        assert!(refused.contains("1 clients are connected"), "{refused}");
        assert!(refused.contains(&format!("tidelog rewind g --to lsn:{to} --force")), "{refused}");
    }
    assert_eq!(group.positions().head, head, "nothing was written");
    drop(own);
    let guard = Arc::new(std::sync::Mutex::new(None));
    let (ring, hung_up) = std::sync::mpsc::channel();
    let connected = group.client_until(volume, "a host", Box::new(move || ring.send(()).unwrap()));
    *guard.lock().unwrap() = Some(connected.unwrap());
    let client = std::thread::spawn(move || {
        hung_up.recv().unwrap();
        drop(guard.lock().unwrap().take());
    });
    group.rewind(&Point::Lsn(to), true).unwrap();
    client.join().unwrap();
    assert_eq!(read(&*group, volume, 0, 512), [0; 512]);
}

#[test]
fn going_back_behind_the_base_is_refused_and_says_what_helps() {
    let bench = Bench::new("a", 3);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &[1; 4096]);
    group.pin_bookmark(name("pin"), Consistency::Crash).unwrap();
    write(&group, volume, 0, &[2; 4096]);
    fold(&bench, &group);
    let refused = group.rewind(&Point::Bookmark(name("pin")), false).unwrap_err().to_string();
    assert!(refused.contains("tidelog image open g --at lsn:"), "{refused}");
    assert_eq!(read(&*group, volume, 0, 4096), [2; 4096]);
    assert_eq!(read(&*at_pin(&group, "pin").unwrap(), volume, 0, 4096), [1; 4096]);
    let copy = Bench::new("b", 4).create_copy();
    follow(&group, &copy);
    let refused = copy.rewind(&Point::Now, false).unwrap_err();
    assert!(matches!(refused, GroupError::NotPrimary { .. }), "{refused}");
}

/// A group that went back over 300,000 bytes, and wrote a little since; where to, and from where.
fn gone_back(bench: &Bench) -> (Arc<Group>, VolumeNumber, Rewound) {
    let (group, volume) = group_with_volume(bench);
    write(&group, volume, 0, &[1; 40_000]);
    write(&group, volume, 2 << 20, &[1; 4096]);
    let to = end(&group);
    for round in 2..5 {
        write(&group, volume, u64::from(round) * 4096, &[round; 100_000]);
        one(&group, volume, Op::Trim { offset: 2 << 20, length: 512 }).unwrap();
    }
    let rewound = group.rewind(&Point::Lsn(to), false).unwrap();
    write(&group, volume, 512, &[9; 512]);
    (group, volume, rewound)
}

#[test]
fn a_base_never_stops_inside_of_what_was_left_behind() {
    for pressed in [false, true] {
        let bench = Bench::new("a", 5);
        let (group, volume, rewound) = gone_back(&bench);
        let now = contents(&*group);
        let inside = rewound.to.lsn.advance(150_000);
        let (open, expected) = {
            let open = group.open_image(&Point::Lsn(inside), Some(name("i")), "test", None);
            let open = open.unwrap();
            let expected = contents(&*open);
            (open, expected)
        };
        assert!(expected != now);
        group.sync_now().unwrap();
        // The window ends inside of it.
        bench.pass(100);
        write(&group, volume, 1 << 20, &[7; 512]);
        let limit = if pressed { 4 * SEGMENT } else { 64 << 20 };
        set_policy(&group, 3600, limit);
        group.sync_now().unwrap();
        let now = contents(&*group);
        let horizon = group.fold_now().unwrap();
        if pressed {
            // In front of it first, then over all of it.
            let horizon =
                if horizon <= rewound.to.lsn { group.fold_now().unwrap() } else { horizon };
            assert!(horizon >= rewound.at, "{horizon} lies inside");
        } else {
            assert_eq!(horizon, Lsn::ZERO, "the window holds it");
        }
        assert!(contents(&*group) == now && contents(&*open) == expected, "pressed {pressed}");
    }
}

#[test]
fn moments_inside_of_what_was_left_behind_outlive_the_fold_over_it() {
    let bench = Bench::new("a", 6);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &[1; 40_000]);
    fold(&bench, &group);
    write(&group, volume, 8192, &[2; 40_000]);
    let to = end(&group);
    let before = contents(&*group);
    write(&group, volume, 0, &[3; 4096]);
    one(&group, volume, Op::Trim { offset: 8192, length: 4096 }).unwrap();
    group.resize_volume(&name("v"), 4 << 20).unwrap();
    write(&group, volume, (4 << 20) - 4096, &[4; 4096]);
    group.create_volume(name("w"), 8192).unwrap();
    group.pin_bookmark(name("pin"), Consistency::Crash).unwrap();
    let (open, inside) = (image(&group, "i"), contents(&*group));
    write(&group, volume, 4096, &[5; 4096]);
    group.rewind(&Point::Lsn(to), false).unwrap();
    assert!(contents(&*group) == before);
    for round in 0..3 {
        write(&group, volume, 1 << 20, &[6 + round; 4096]);
        fold(&bench, &group);
        let pin = at_pin(&group, "pin").unwrap();
        assert!(contents(&*open) == inside && contents(&*pin) == inside, "round {round}");
        group.close_this_image(&pin).unwrap();
    }
    assert!(all(&*group, volume)[..1 << 20] == before[0].1[..1 << 20]);
    let now = contents(&*group);
    group.close().unwrap();
    drop((open, group));
    let (group, _) = bench.open();
    assert!(contents(&*group.image(&name("i")).unwrap()) == inside, "after a restart");
    assert!(contents(&*at_pin(&group, "pin").unwrap()) == inside, "after a restart");
    assert!(contents(&*group) == now);
}

#[test]
fn changed_since_over_a_rewind_is_what_either_side_has_written() {
    let bench = Bench::new("a", 7);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &[1; 4096]);
    let common = end(&group);
    write(&group, volume, 4096, &[2; 4096]);
    let inside = end(&group);
    write(&group, volume, 8192, &[3; 4096]);
    group.rewind(&Point::Lsn(common), false).unwrap();
    write(&group, volume, 12288, &[4; 4096]);
    let open = image(&group, "i");
    let since = |lsn| open.changed_since(volume, lsn).unwrap();
    assert_eq!(since(common), [(12288, 4096)], "the image has all that was there");
    // What was written behind it and left behind too: nobody remembers that it was not.
    assert_eq!(since(inside), [(4096, 12288)]);
    fold(&bench, &group);
    assert_eq!(since(inside), [(0, 1 << 20)], "the base knows chunks");
    group.close_image(&name("i")).unwrap();
    let later = image(&group, "later");
    assert_eq!(later.changed_since(volume, inside).unwrap(), [(0, 1 << 20)]);
    assert_eq!(later.changed_since(volume, later.position().lsn).unwrap(), []);
}

#[test]
fn a_moment_of_a_removed_volume_knows_what_a_rewind_took_back() {
    let bench = Bench::new("a", 8);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &[1; 4096]);
    fold(&bench, &group);
    let common = end(&group);
    write(&group, volume, 0, &[2; 4096]);
    let inside = end(&group);
    group.rewind(&Point::Lsn(common), false).unwrap();
    let open = image(&group, "i");
    group.pin_bookmark(name("pin"), Consistency::Crash).unwrap();
    group.remove_volume(&name("v")).unwrap();
    fold(&bench, &group);
    for (moment, what) in [(open, "an image"), (at_pin(&group, "pin").unwrap(), "a pin")] {
        assert_eq!(read(&*moment, volume, 0, 4096), [1; 4096], "{what}");
        let changed = moment.changed_since(volume, inside).unwrap();
        assert!(changed.first().is_some_and(|first| first.0 == 0), "{what}: {changed:?}");
    }
}

#[test]
fn a_moment_of_a_removed_volume_knows_after_a_restart_that_a_rewind_brought_it_back() {
    let bench = Bench::new("a", 9);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &[1; 4096]);
    fold(&bench, &group);
    let common = end(&group);
    group.remove_volume(&name("v")).unwrap();
    let away = end(&group);
    group.rewind(&Point::Lsn(common), false).unwrap();
    drop(image(&group, "i"));
    group.remove_volume(&name("v")).unwrap();
    fold(&bench, &group);
    group.close().unwrap();
    drop(group);
    let (group, _) = bench.open();
    let open = group.image(&name("i")).unwrap();
    assert_eq!(read(&*open, volume, 0, 4096), [1; 4096]);
    let size_bytes = open.volumes()[0].size_bytes;
    assert_eq!(open.changed_since(volume, away).unwrap(), [(0, size_bytes)]);
}

/// The chunk is as it was on the copy, so that it is not sent; between the two it was not, and a
/// backup of that time would have been taken for what is there now.
#[test]
fn a_copy_that_an_image_brings_over_a_rewind_calls_nothing_unchanged_since_before_it() {
    let pair = Pair::new(12);
    let (here, copy) = (&pair.primary, &pair.copy);
    let volume = here.create_volume(name("v"), 3 << 20).unwrap().number;
    write(here, volume, 0, &[1; 4096]);
    pair.follow();
    let before = end(copy);
    write(here, volume, 2 << 20, &[1; 4096]);
    pair.fold();
    let common = end(here);
    write(here, volume, 0, &[2; 4096]);
    let inside = end(here);
    here.rewind(&Point::Lsn(common), false).unwrap();
    assert!(send(here, copy, Some(before), before, usize::MAX));
    copy.switch_to_image().unwrap();
    here.end_shipment(&name("b"));
    for what in ["staged", "in the base"] {
        assert_eq!(copy.merging().is_some(), what == "staged");
        same(here, copy, what);
        let image = image(copy, "i");
        let changed = image.changed_since(volume, inside).unwrap();
        assert!(changed.first().is_some_and(|first| first.0 == 0), "{what}: {changed:?}");
        copy.close_this_image(&image).unwrap();
        pair.there.pass(5);
        copy.sync_now().unwrap();
        copy.fold_now().unwrap();
    }
}

#[test]
fn a_crash_at_any_boundary_of_a_rewind_leaves_the_moment_before_it_or_the_one_gone_back_to() {
    let bench = Bench::new("a", 8);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &[1; 40_000]);
    fold(&bench, &group);
    write(&group, volume, 512, &[2; 70_000]);
    let (to, old) = (end(&group), contents(&*group));
    write(&group, volume, 4096, &[3; 30_000]);
    group.resize_volume(&name("v"), 1 << 20).unwrap();
    let new = contents(&*group);
    group.sync_now().unwrap();
    bench.disk.record();
    let begun = bench.disk.operations();
    let rewound = group.rewind(&Point::Lsn(to), false).unwrap();
    let answered = (bench.disk.operations() - begun) as usize;
    // And of a fold over it.
    fold(&bench, &group);
    let stopped = bench.disk.take_recorded();
    assert!(answered > 0 && stopped.len() > answered + 5, "{answered} of {}", stopped.len());
    let mut shown = [0, 0];
    for (boundary, disk) in stopped.into_iter().enumerate() {
        for seed in 0..6 {
            let disk = Arc::new(disk.crash(seed + 100 * boundary as u64));
            let (group, _) = Bench { disk, ..bench.after_crash(0) }.open();
            let (found, what) = (contents(&*group), format!("boundary {boundary}, seed {seed}"));
            if group.control().rewinds.is_empty() {
                assert!(found == new, "{what}: not as before it");
                assert!(boundary < answered, "{what}: it was answered, and is gone");
                shown[0] += 1;
            } else {
                assert!(found == old, "{what}: not what it went back to");
                shown[1] += 1;
            }
            if group.positions().horizon <= to {
                assert!(was(&group, to) == old, "{what}");
            } else {
                assert!(group.positions().horizon >= rewound.at, "{what}: the base is inside");
            }
        }
    }
    assert!(shown.iter().all(|count| *count > 5), "{shown:?}");
}

/// The same positions are the same bytes on both nodes: before, inside and behind.
#[test]
fn a_copy_goes_back_when_the_record_comes_however_its_bytes_are_cut() {
    let (a, b) = (Bench::new("a", 9), Bench::new("b", 10));
    let (group, volume, rewound) = gone_back(&a);
    let second = group.rewind(&Point::Lsn(rewound.to.lsn.advance(150_000)), false).unwrap();
    write(&group, volume, 1024, &[8; 512]);
    group.rewind(&Point::Lsn(rewound.from.lsn), false).unwrap();
    write(&group, volume, 2048, &[7; 512]);
    group.sync_now().unwrap();
    let head = group.positions().head;
    let mut bytes = vec![0; head.0 as usize];
    group.read_log(Lsn::ZERO, &mut bytes).unwrap();
    let copy = b.create_copy();
    for part in bytes.chunks(777) {
        copy.append_received(copy.received_end(), part).unwrap();
    }
    copy.note_committed(head);
    copy.sync_now().unwrap();
    assert!(contents(&*copy) == contents(&*group));
    let points = [rewound.to.lsn, rewound.to.lsn.advance(200_000), rewound.from.lsn, rewound.at];
    let check = |copy: &Group, what: &str| {
        for point in points.into_iter().chain([second.from.lsn, second.at, head]) {
            assert!(was(copy, point) == was(&group, point), "{what}: {point}");
        }
    };
    check(&copy, "as it came");
    copy.close().unwrap();
    drop(copy);
    let (copy, _) = b.open();
    check(&copy, "after a restart");
    copy.note_committed(head);
    fold(&b, &copy);
    assert!(contents(&*copy) == contents(&*group), "after a fold over all of it");
}

/// A primary and its copy, whose base is beyond the returned moment.
fn folded_past(a: &Bench, b: &Bench) -> (Arc<Group>, Arc<Group>, VolumeNumber, Lsn) {
    let (group, volume) = group_with_volume(a);
    write(&group, volume, 0, &[1; 4096]);
    let to = end(&group);
    write(&group, volume, 4096, &[2; 4096]);
    let copy = b.create_copy();
    follow(&group, &copy);
    fold(b, &copy);
    (group, copy, volume, to)
}

#[test]
fn a_copy_that_has_folded_too_far_stays_as_it_was_until_an_image_comes() {
    let (a, b) = (Bench::new("a", 11), Bench::new("b", 12));
    let (group, copy, volume, to) = folded_past(&a, &b);
    let old = contents(&*copy);
    let head = copy.positions().head;
    group.rewind(&Point::Lsn(to), false).unwrap();
    write(&group, volume, 8192, &[3; 4096]);
    group.sync_now().unwrap();
    let mut bytes = vec![0; group.positions().head.bytes_since(head) as usize];
    group.read_log(head, &mut bytes).unwrap();
    for attempt in 0..2 {
        let refused = copy.append_received(head, &bytes).unwrap_err().to_string();
        assert!(refused.contains("went back") && refused.contains("an image"), "{refused}");
        assert!(copy.needs_image().is_some(), "attempt {attempt}");
        assert_eq!(copy.positions().head, head, "the record stays out");
        assert!(contents(&*copy) == old, "and the copy is what it was");
    }
    let told = b.event_codes().into_iter().filter(|code| code == "rewind-needs-image").count();
    assert_eq!(told, 1, "told once");
    let shipment = group.ship(&name("b"), Some(head), head, None).unwrap();
    copy.begin_image(&shipment.offer()).unwrap();
    while let Some(part) = shipment.next().unwrap() {
        copy.stage(part).unwrap();
    }
    assert!(contents(&*copy) == old, "until all of it is there");
    copy.switch_to_image().unwrap();
    assert_eq!(copy.needs_image(), None);
    assert!(contents(&*copy) == contents(&*group));
    write(&group, volume, 12288, &[4; 4096]);
    follow(&group, &copy);
    assert!(contents(&*copy) == contents(&*group), "it follows");
    fold(&b, &copy);
    assert!(contents(&*copy) == contents(&*group), "in the base");
}

#[test]
fn a_copy_that_cannot_go_back_ends_with_a_request_also_where_a_pad_stands_before_the_record() {
    let (a, b) = (Bench::new("a", 14), Bench::new("b", 15));
    let (group, copy, volume, to) = folded_past(&a, &b);
    let room = || SEGMENT - end(&group).segment_offset(SEGMENT);
    // Too little for the record, and more than nothing.
    while room() >= 280 {
        if room() > 20_000 {
            write(&group, volume, 8192, &[3; 16384]);
        } else {
            one(&group, volume, Op::Trim { offset: 0, length: 512 }).unwrap();
        }
    }
    let before = end(&group);
    let rewound = group.rewind(&Point::Lsn(to), false).unwrap();
    group.sync_now().unwrap();
    let head = copy.positions().head;
    let mut bytes = vec![0; rewound.at.bytes_since(head) as usize];
    group.read_log(head, &mut bytes).unwrap();
    assert!(copy.append_received(head, &bytes).is_err());
    assert!(before.segment_number(SEGMENT) < rewound.at.segment_number(SEGMENT), "a pad");
    assert_eq!(copy.positions().head, before);
    // From the pad on it is asked again, and refused again.
    let rest = &bytes[before.bytes_since(head) as usize..];
    assert!(copy.append_received(before, rest).is_err());
    assert_eq!(copy.positions().head, before);
    copy.close().unwrap();
    drop(copy);
    let (copy, recovery) = b.open();
    assert_eq!(recovery.cut, None);
    assert_eq!((copy.positions().head, copy.branches().unwrap()), (before, Vec::new()));
}

#[test]
fn a_cut_takes_a_rewind_with_it_and_the_branch_shows_it() {
    let is_refused = |opened: Result<Arc<Image>, GroupError>| {
        let refused = opened.map(|_| ()).unwrap_err().to_string();
        assert!(refused.contains("goes back behind the base"), "{refused}");
    };
    for (to_before, fold_fails) in [(true, false), (true, true), (false, false)] {
        let bench = Bench::new("a", 13);
        let (group, volume) = group_with_volume(&bench);
        write(&group, volume, 0, &[1; 8192]);
        let early = end(&group);
        write(&group, volume, 4096, &[2; 8192]);
        group.sync_now().unwrap();
        let (positions, before) = (group.positions(), contents(&*group));
        write(&group, volume, 0, &[3; 512]);
        let late = end(&group);
        write(&group, volume, 1 << 20, &[4; 512]);
        let to = if to_before { early } else { late };
        group.rewind(&Point::Lsn(to), false).unwrap();
        write(&group, volume, 2 << 20, &[5; 512]);
        let with = contents(&*group);
        group.yield_to(positions.head, positions.chain, Discard::Authored).unwrap();
        assert!(contents(&*group) == before, "the cut undoes it");
        assert!(group.control().rewinds.is_empty());
        group.promote("test").unwrap();
        write(&group, volume, 0, &[6; 16384]);
        let [branch] = &group.branches().unwrap()[..] else { panic!("one branch") };
        let open = group.open_branch_image(&branch.name, Some(name("i")), "test").unwrap();
        assert!(contents(&*open) == with, "to before the branch: {to_before}");
        if fold_fails {
            // It has passed what nobody had open then, though the log still has it.
            group.close_this_image(&open).unwrap();
            bench.pass(5);
            group.sync_now().unwrap();
            bench.disk.inject(Fault::NoSpace { bytes: 0 });
            group.fold_now().unwrap_err();
            bench.disk.clear_faults();
            is_refused(group.open_branch_image(&branch.name, None, "test"));
            continue;
        }
        fold(&bench, &group);
        assert!(contents(&*open) == with, "to before the branch: {to_before}, folded");
        let again = group.open_branch_image(&branch.name, None, "test");
        if to_before {
            is_refused(again);
        } else {
            assert!(contents(&*again.unwrap()) == with);
        }
    }
}
