//! One thing at a time.

use super::*;
use crate::log::control::Consistency;

#[test]
fn what_was_written_is_read_and_survives_an_orderly_restart() {
    let bench = Bench::new("a", 1);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    write(&group, volume.number, 4096, &[1; 4096]);
    write(&group, volume.number, 8192 + 512, &[2; 512]);
    write(&group, volume.number, 100, b"hello");
    let check = |group: &Group| {
        let all = read(group, volume.number, 0, 16384);
        assert_eq!(&all[100..105], b"hello");
        assert_eq!(all[..100], [0; 100]);
        assert_eq!(all[4096..8192], [1; 4096]);
        assert_eq!(all[8192..8704], [0; 512]);
        assert_eq!(all[8704..9216], [2; 512]);
    };
    check(&group);
    let head = group.positions().head;
    group.close().unwrap();
    let (again, recovery) = bench.open();
    assert_eq!(recovery.cut, None);
    assert_eq!(again.positions().head, head, "an orderly restart appends nothing");
    assert_eq!(again.role(), Role::Primary);
    check(&again);
}

#[test]
fn a_request_of_many_records_crosses_segments_and_reads_back_whole() {
    let bench = Bench::new("a", 2);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 8 << 20).unwrap();
    let data: Vec<u8> = (0..3 << 20).map(|index: u32| (index / 7) as u8).collect();
    let before = group.positions().requests;
    write(&group, volume.number, 1024, &data);
    assert_eq!(group.positions().requests, before + 1);
    assert_eq!(read(&*group, volume.number, 1024, data.len()), data);
    assert!(group.positions().head.0 > 3 << 20);
    group.check_log(Lsn::ZERO, group.positions().head).unwrap();
}

#[test]
fn a_flush_is_marked_only_where_it_covers_new_bytes() {
    let bench = Bench::new("a", 3);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    let written = write(&group, volume.number, 0, &[1; 512]);
    let flushed = one(&group, volume.number, Op::Flush).unwrap();
    assert!(flushed > written);
    assert_eq!(one(&group, volume.number, Op::Flush).unwrap(), flushed);
}

#[test]
fn a_wait_ends_with_the_sync_that_began_after_its_target() {
    let bench = Bench::new("a", 4);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    let end = write(&group, volume.number, 0, &[1; 512]);
    let (sender, receiver) = std::sync::mpsc::channel();
    group.when_durable(end, Box::new(move |result| sender.send(result).unwrap()));
    assert!(receiver.try_recv().is_err(), "nothing was synced yet");
    group.sync_now().unwrap();
    assert_eq!(receiver.try_recv().unwrap(), Ok(()));
}

#[test]
fn images_show_their_moment_and_bookmarks_and_times_find_it() {
    let bench = Bench::new("a", 5);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    write(&group, volume.number, 0, &[1; 4096]);
    bench.pass(10);
    let bookmark = group.create_bookmark(name("before"), Consistency::Crash).unwrap();
    let time = group.positions().time;
    bench.pass(10);
    write(&group, volume.number, 0, &[2; 4096]);
    group.create_volume(name("late"), 1 << 20).unwrap();
    let points = [
        (Point::Bookmark(name("before")), 1, 1),
        (Point::Time(time), 1, 1),
        (Point::Lsn(bookmark.lsn), 1, 1),
        (Point::Now, 2, 2),
    ];
    for (point, value, volumes) in points {
        let image = group.open_image(&point, None, "test", None).unwrap();
        assert_eq!(read(&*image, volume.number, 0, 4096), [value; 4096], "{point:?}");
        assert_eq!(image.volumes().len(), volumes, "{point:?}");
        group.close_image(image.name()).unwrap();
    }
    let first = group.positions().horizon_time;
    assert!(first > LogTime(0) && first < time, "the window begins with the first record");
    let earlier = group.resolve_point(&Point::Time(first.before(Duration::from_secs(1))));
    assert!(matches!(earlier, Err(GroupError::NotCovered { .. })), "{earlier:?}");
    let beyond = group.resolve_point(&Point::Lsn(Lsn(1 << 40)));
    assert!(matches!(beyond, Err(GroupError::NotCovered { .. })), "{beyond:?}");
}

#[test]
fn folding_moves_the_horizon_and_changes_nothing_that_is_read() {
    let bench = Bench::new("a", 6);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    set_policy(&group, 0, 10 << 20);
    write(&group, volume.number, 0, &[1; 8192]);
    write(&group, volume.number, 4096 + 512, &[2; 512]);
    one(&group, volume.number, Op::Trim { offset: 0, length: 512 }).unwrap();
    for round in 0..40 {
        write(&group, volume.number, 65536, &[round; 8192]);
    }
    bench.pass(5);
    group.sync_now().unwrap();
    let before = read(&*group, volume.number, 0, 1 << 20);
    let horizon = group.fold_now().unwrap();
    assert_eq!(horizon, group.positions().head);
    assert!(group.log_start() > Lsn::ZERO, "segments were recycled");
    // Who checks the log and is overtaken by the fold is told so, and does not report damage.
    let overtaken = group.check_log(Lsn::ZERO, horizon);
    assert!(matches!(overtaken, Err(GroupError::NotCovered { .. })), "{overtaken:?}");
    assert!(before == read(&*group, volume.number, 0, 1 << 20));
    write(&group, volume.number, 512, &[9; 512]);
    group.close().unwrap();
    let (again, _) = bench.open();
    let mut expected = before;
    expected[512..1024].fill(9);
    assert!(expected == read(&*again, volume.number, 0, 1 << 20));
    assert_eq!(again.control().policy.window, Span::from_secs(0));
    assert_eq!(again.control().epochs.len(), 1);
}

#[test]
fn the_log_limit_folds_before_the_window() {
    let bench = Bench::new("a", 8);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    let limit = 8 * SEGMENT;
    set_policy(&group, 3600, limit);
    for round in 0..200u32 {
        write(&group, volume.number, 8192, &[round as u8; 4096]);
        if round % 10 == 0 {
            group.sync_now().unwrap();
            group.fold_now().unwrap();
        }
    }
    let positions = group.positions();
    assert!(positions.head.bytes_since(positions.horizon) < limit, "{positions:?}");
}

#[test]
fn the_secondary_has_the_same_bytes_whatever_the_cuts() {
    let (a, b) = (Bench::new("a", 9), Bench::new("b", 10));
    let group = a.create();
    let volume = group.create_volume(name("v"), 4 << 20).unwrap();
    let data: Vec<u8> = (0..200_000u32).map(|index| index as u8).collect();
    write(&group, volume.number, 0, &data[..199_680]);
    one(&group, volume.number, Op::Zero { offset: 512, length: 5000, no_hole: true }).unwrap();
    let copy = b.create_copy();
    assert_eq!(copy.data_state().0, DataState::None);
    let head = group.positions().head;
    let mut at = Lsn::ZERO;
    let mut step = 1;
    while at < head {
        let mut bytes = vec![0; step.min(head.bytes_since(at)) as usize];
        group.read_log(at, &mut bytes).unwrap();
        copy.append_received(at, &bytes).unwrap();
        at = copy.received_end();
        step = step * 3 % 10_007 + 1;
    }
    let (ours, theirs) = (group.positions(), copy.positions());
    assert_eq!((ours.head, ours.chain, ours.epoch), (theirs.head, theirs.chain, theirs.epoch));
    assert_eq!((ours.requests, ours.time), (theirs.requests, theirs.time));
    let (mut left, mut right) = (vec![0; head.0 as usize], vec![0; head.0 as usize]);
    group.read_log(Lsn::ZERO, &mut left).unwrap();
    copy.read_log(Lsn::ZERO, &mut right).unwrap();
    assert!(left == right, "identical record bytes at identical addresses");
    assert_eq!(read(&*copy, volume.number, 0, 8192), read(&*group, volume.number, 0, 8192));
    assert_eq!(copy.role(), Role::Secondary);
    copy.sync_now().unwrap();
    let epoch = copy.promote("promote").unwrap();
    assert_eq!(epoch.end(), copy.positions().head, "its record is the last");
    assert_eq!((epoch.counter, epoch.first_lsn), (2, head));
    assert_eq!(copy.promote("promote").unwrap(), epoch, "promote is idempotent");
    write(&copy, volume.number, 0, &[5; 512]);
    group.demote().unwrap();
    let refused = one(&group, volume.number, Op::Write { offset: 0, data: &[5; 512] });
    assert!(matches!(refused, Err(GroupError::NotPrimary { .. })));
    drop(group);
    assert_eq!(a.open().0.role(), Role::Secondary, "a demotion survives a restart");
}
