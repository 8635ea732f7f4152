//! Disks that fail, tear and lie.

use super::*;
use crate::io::Fault;
use crate::log::segment::segment_name;

#[test]
fn after_a_failed_sync_writes_and_flushes_fail_reads_go_on_and_it_is_latched() {
    let bench = Bench::new("a", 1);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    write(&group, volume.number, 0, &[1; 4096]);
    let lsn = write(&group, volume.number, 4096, &[2; 4096]);
    bench.disk.inject(Fault::FailedSync { operation: bench.disk.operations() });
    assert!(matches!(group.sync_now(), Err(GroupError::Failed { .. })));
    let refused = one(&group, volume.number, Op::Write { offset: 0, data: &[3; 512] });
    assert!(matches!(refused, Err(GroupError::Failed { .. })), "{refused:?}");
    let (sender, receiver) = std::sync::mpsc::channel();
    group.when_durable(lsn, Box::new(move |result| sender.send(result).unwrap()));
    assert!(matches!(receiver.try_recv().unwrap(), Err(GroupError::Failed { .. })));
    bench.disk.clear_faults();
    assert!(group.sync_now().is_err(), "it is never retried as if nothing had happened");
    assert_eq!(read(&*group, volume.number, 4096, 4096), [2; 4096]);
    assert_eq!(group.data_state().0, DataState::Failed);
    let mut bytes = vec![0; 100];
    group.read_log(Lsn::ZERO, &mut bytes).unwrap();
}

#[test]
fn a_full_disk_fails_the_write_and_nothing_else() {
    let bench = Bench::new("a", 2);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    write(&group, volume.number, 0, &[1; 4096]);
    bench.disk.inject(Fault::NoSpace { bytes: 4096 });
    let mut refused = 0;
    for _ in 0..40 {
        let result = one(&group, volume.number, Op::Write { offset: 8192, data: &[2; 8192] });
        match result {
            Ok(_) => {}
            Err(GroupError::NoSpace { .. }) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(refused > 0);
    bench.disk.clear_faults();
    write(&group, volume.number, 0, &[3; 4096]);
    assert_eq!(read(&*group, volume.number, 0, 4096), [3; 4096]);
    group.check_log(Lsn::ZERO, group.positions().head).unwrap();
}

#[test]
fn damage_in_what_was_durable_is_reported_and_never_cut() {
    let bench = Bench::new("a", 3);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    let start = group.positions().head;
    write(&group, volume.number, 0, &[1; 4096]);
    write(&group, volume.number, 4096, &[2; 4096]);
    let head = group.positions().head;
    group.close().unwrap();
    drop(group);
    let path = dir().join("log").join(segment_name(0));
    // A payload: the chain goes on, the block gives an error, the rest is there.
    bench.disk.damage(&path, start.0 + 2000, 1, 0xff);
    let (group, _) = bench.open();
    assert_eq!(group.positions().head, head);
    let damaged = try_read(&*group, volume.number, 0, 512);
    assert!(matches!(damaged, Err(GroupError::Damaged { .. })), "{damaged:?}");
    assert_eq!(read(&*group, volume.number, 4096, 4096), [2; 4096]);
    assert!(group.check_log(Lsn::ZERO, head).is_err());
    group.close().unwrap();
    // A header: the chain ends, before what is known to have been durable.
    bench.disk.damage(&path, start.0 + 10, 1, 0xff);
    let (group, _) = bench.open();
    let (state, reason, _) = group.data_state();
    assert_eq!(state, DataState::Failed, "{reason:?}");
    assert!(reason.unwrap().contains("segment 0"));
    let refused = one(&group, volume.number, Op::Write { offset: 0, data: &[3; 512] });
    assert!(refused.is_err());
    assert!(bench.event_codes().contains(&"log-damaged".to_owned()));
}

#[test]
fn a_record_of_an_earlier_cut_behind_a_rewritten_one_of_equal_size_is_not_believed() {
    let bench = Bench::new("a", 4);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    group.sync_now().unwrap();
    let at = group.positions().head;
    write(&group, volume.number, 0, &[1; 4096]);
    write(&group, volume.number, 4096, &[2; 4096]);
    write(&group, volume.number, 8192, &[3; 4096]);
    drop(group);
    // The first of the three is lost, the two behind it are whole.
    let path = dir().join("log").join(segment_name(0));
    bench.disk.damage(&path, at.0 + 8, 1, 0xff);
    let (group, recovery) = bench.open();
    let (from, to) = recovery.cut.unwrap();
    assert_eq!(from, at);
    assert!(to > at, "the event names what stood behind: {to}");
    let epoch = group.positions().head;
    write(&group, volume.number, 0, &[9; 4096]);
    drop(group);
    let (group, _) = bench.open();
    assert!(group.positions().head > epoch);
    assert_eq!(read(&*group, volume.number, 0, 4096), [9; 4096]);
    assert_eq!(read(&*group, volume.number, 4096, 8192), [0; 8192], "what was cut stays cut");
    let kept = dir().join("branches").join(format!("cut-{at}")).join(segment_name(0));
    assert!(bench.disk.exists(&kept), "whole records that were cut are kept apart");
}

#[test]
fn records_cut_anywhere_are_never_half_shown_on_a_secondary() {
    let (a, b) = (Bench::new("a", 5), Bench::new("b", 6));
    let group = a.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    let copy = b.create_copy();
    let pull = |to: Lsn| {
        let from = copy.received_end();
        let mut bytes = vec![0; to.bytes_since(from) as usize];
        group.read_log(from, &mut bytes).unwrap();
        copy.append_received(from, &bytes).unwrap()
    };
    let before = pull(group.positions().head);
    // Four records of one request.
    write(&group, volume.number, 0, &[7; 60_000]);
    let head = group.positions().head;
    let middle = Lsn(before.0 + head.bytes_since(before) / 2);
    assert_eq!(pull(middle), before, "half of a request is not in the log");
    let image = copy.open_image(&Point::Now, None, "test", None).unwrap();
    assert_eq!(read(&*image, volume.number, 0, 60_000), [0; 60_000]);
    assert_eq!(pull(head), head);
    assert_eq!(read(&*image, volume.number, 0, 60_000), [0; 60_000], "an image does not move");
    assert_eq!(read(&*copy, volume.number, 0, 60_000), [7; 60_000]);
    let wrong = copy.append_received(head, &[0; 96]).unwrap_err();
    assert_eq!(wrong.at, head);
    assert_eq!(copy.received_end(), head, "what was wrong is forgotten");
}

#[test]
fn a_secondary_folds_no_further_than_the_primary_is_durable() {
    let (a, b) = (Bench::new("a", 7), Bench::new("b", 8));
    let group = a.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    set_policy(&group, 0, 10 << 20);
    let durable = group.positions().durable;
    write(&group, volume.number, 0, &[1; 4096]);
    let head = group.positions().head;
    let copy = b.create_copy();
    let mut bytes = vec![0; head.0 as usize];
    group.read_log(Lsn::ZERO, &mut bytes).unwrap();
    copy.append_received(Lsn::ZERO, &bytes).unwrap();
    copy.sync_now().unwrap();
    b.pass(10);
    assert_eq!(copy.positions().committed, durable);
    assert!(copy.fold_now().unwrap() <= durable);
    copy.note_committed(head);
    assert_eq!(copy.fold_now().unwrap(), head);
    assert_eq!(read(&*copy, volume.number, 0, 4096), [1; 4096]);
}
