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
    assert!(bench.disk.exists(&kept).unwrap(), "whole records that were cut are kept apart");
}

#[test]
fn an_unclean_start_says_of_a_copy_what_that_means_for_a_copy() {
    let (a, b) = (Bench::new("a", 14), Bench::new("b", 15));
    let group = a.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    group.sync_now().unwrap();
    let at = group.positions().head;
    write(&group, volume.number, 0, &[1; 4096]);
    write(&group, volume.number, 4096, &[2; 4096]);
    let copy = b.create_copy();
    let mut bytes = vec![0; group.positions().head.0 as usize];
    group.read_log(Lsn::ZERO, &mut bytes).unwrap();
    copy.append_received(Lsn::ZERO, &bytes).unwrap();
    drop((group, copy));
    for (bench, is_copy) in [(a, false), (b, true)] {
        bench.disk.damage(&dir().join("log").join(segment_name(0)), at.0 + 8, 1, 0xff);
        assert!(bench.open().1.cut.is_some());
        let [said] = &bench.said("unclean-start")[..] else { panic!() };
        assert_eq!(said.contains("answered but not flushed"), !is_copy, "{said}");
        assert_eq!(said.contains("takes that from its primary again"), is_copy, "{said}");
    }
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

#[test]
fn a_failed_append_of_a_control_record_is_told_at_once() {
    let bench = Bench::new("a", 9);
    let group = bench.create();
    let (sender, receiver) = std::sync::mpsc::channel();
    group.when_durable(Lsn(1 << 40), Box::new(move |result| sender.send(result).unwrap()));
    bench.disk.inject(Fault::Error { operation: bench.disk.operations() });
    let failed = group.create_volume(name("v"), 1 << 20);
    assert!(matches!(failed, Err(GroupError::Failed { .. })), "{failed:?}");
    let [said] = &bench.said("data-failed")[..] else { panic!() };
    let place = format!(" in {}: ", dir().display());
    assert!(said.contains("append") && said.contains(&place), "which disk it is: {said}");
    assert!(said.contains("hosts' writes get errors"), "{said}");
    assert!(receiver.try_recv().unwrap().is_err(), "who waits is told");
}

#[test]
fn a_failed_append_of_an_epoch_is_told_at_once() {
    let (a, b) = (Bench::new("a", 10), Bench::new("b", 11));
    let group = a.create();
    let copy = b.create_copy();
    let mut bytes = vec![0; group.positions().head.0 as usize];
    group.read_log(Lsn::ZERO, &mut bytes).unwrap();
    copy.append_received(Lsn::ZERO, &bytes).unwrap();
    copy.sync_now().unwrap();
    b.disk.inject(Fault::Error { operation: b.disk.operations() });
    let epoch = copy.new_epoch("promote", 2);
    assert!(copy.begin_epoch(epoch).is_err());
    let [said] = &b.said("data-failed")[..] else { panic!() };
    assert!(said.contains("this copy takes no more") && !said.contains("hosts"), "{said}");
    assert_eq!(copy.role(), Role::Secondary);
}

#[test]
fn a_closing_group_begins_no_epoch() {
    let bench = Bench::new("a", 12);
    let group = bench.create();
    group.demote().unwrap();
    let epoch = group.new_epoch("promote", 2);
    group.close().unwrap();
    let head = group.positions().head;
    assert!(group.begin_epoch(epoch).is_err());
    assert_eq!(group.positions().head, head);
    drop(group);
    assert_eq!(bench.open().1.cut, None, "it is as it was closed");
}

#[test]
fn who_is_told_of_a_failure_may_wait_again_at_once() {
    let bench = Bench::new("a", 13);
    let group = bench.create();
    let (sender, receiver) = std::sync::mpsc::channel();
    let again = Arc::downgrade(&group);
    group.when_durable(
        Lsn(1 << 40),
        Box::new(move |_| {
            let group = again.upgrade().unwrap();
            sender.send(group.waiters.try_lock().is_ok()).unwrap();
        }),
    );
    bench.disk.inject(Fault::Error { operation: bench.disk.operations() });
    group.create_volume(name("v"), 1 << 20).unwrap_err();
    assert!(receiver.try_recv().unwrap(), "the list is still held");
}

#[test]
fn a_peer_cannot_make_a_volume_that_nobody_can_count_with() {
    use crate::log::control::{Control, VolumeRecord};
    let records = [(u32::MAX, 4096), (0, 4096), (1, (1 << 60) + 4096), (1, u64::MAX / 4096 * 4096)];
    for (number, size_bytes) in records {
        let (a, b) = (Bench::new("a", 14), Bench::new("b", 15));
        let group = a.create();
        let record = VolumeRecord {
            number: VolumeNumber(number),
            name: name("v"),
            size_bytes,
            restore_lsn: None,
            restoring: false,
            removed: false,
            other: serde_json::Map::new(),
        };
        group.append_control(Control::Volume(record)).unwrap();
        let mut bytes = vec![0; group.positions().head.0 as usize];
        group.read_log(Lsn::ZERO, &mut bytes).unwrap();
        let refused = b.create_copy().append_received(Lsn::ZERO, &bytes).unwrap_err();
        assert!(refused.what.contains("a volume has"), "{refused}");
        assert!(group.volumes().is_empty(), "nor does it count where it was appended");
        group.create_volume(name("w"), 4096).unwrap();
    }
}

#[test]
fn an_index_without_its_segment_is_not_that_of_a_later_one() {
    use crate::io::OpenMode;
    use crate::log::segment::index_name;
    let bench = Bench::new("a", 16);
    let group = bench.create();
    let index = |number| dir().join("log").join(index_name(number));
    bench.disk.open(&index(1), OpenMode::Create).unwrap();
    group.segments.ensure(1).unwrap();
    assert!(!bench.disk.exists(&index(1)).unwrap(), "it was there before its segment");
    group.close().unwrap();
    drop(group);
    bench.disk.open(&index(1), OpenMode::Create).unwrap();
    bench.disk.open(&index(7), OpenMode::Create).unwrap();
    let _group = bench.open();
    assert!(bench.disk.exists(&index(1)).unwrap() && !bench.disk.exists(&index(7)).unwrap());
}

#[test]
fn a_payload_that_looks_like_a_record_proves_nothing_durable() {
    use crate::log::record::{Header, Kind, flags, header_bytes};
    use crate::units::Chain;
    let bench = Bench::new("a", 17);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    group.sync_now().unwrap();
    let at = group.positions().head;
    let mut imitation = Header {
        kind: Kind::FlushMark as u8,
        version: 1,
        flags: flags::LAST_OF_REQUEST,
        payload_bytes: 0,
        volume: VolumeNumber(0),
        control_kind: 0,
        offset: 0,
        length: 0,
        // Where a host that knows its position has it land.
        lsn: at.advance(header_bytes(1) as u64),
        epoch: group.positions().epoch,
        time: group.positions().time,
        durable: Lsn::MAX,
        requests: 0,
        chain: Chain(0),
        checksum: Chain(0),
        crcs: Vec::new(),
    };
    let mut data = Vec::new();
    imitation.encode(&mut data);
    data.resize(4096, 0);
    write(&group, volume.number, 0, &data);
    drop(group);
    // What carries it is lost.
    bench.disk.damage(&dir().join("log").join(segment_name(0)), at.0 + 8, 1, 0xff);
    let (group, recovery) = bench.open();
    assert_eq!(group.data_state().0, DataState::Consistent, "{:?}", group.data_state());
    assert_eq!(recovery.cut, Some((at, imitation.end())), "it is seen there");
}

#[test]
fn a_primary_whose_damage_hides_its_own_reign_stops_and_keeps_its_log() {
    for promoted in [false, true] {
        for closed in [false, true] {
            let what = format!("promoted: {promoted}, closed: {closed}");
            let (a, b) = (Bench::new("a", 18), Bench::new("b", 19));
            let group = a.create();
            let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
            let start = group.positions().head;
            write(&group, volume, 0, &[1; 60_000]);
            let (bench, group, at) = if promoted {
                let copy = b.create_copy();
                let mut bytes = vec![0; group.positions().head.0 as usize];
                group.read_log(Lsn::ZERO, &mut bytes).unwrap();
                copy.append_received(Lsn::ZERO, &bytes).unwrap();
                copy.promote("test").unwrap();
                (&b, copy, start.0)
            } else {
                (&a, group, 0)
            };
            if closed {
                write(&group, volume, 4096, &[2; 60_000]);
                group.close().unwrap();
            }
            let right = read(&*group, volume, 0, 1 << 16);
            let epochs = group.control().epochs.clone();
            drop(group);
            let log = dir().join("log");
            let before = bench.disk.list(&log).unwrap();
            let path = log.join(segment_name(0));
            bench.disk.damage(&path, at + 10, 1, 0xff);
            for start in 0..2 {
                let (group, recovery) = bench.open();
                let state = group.data_state();
                assert_eq!(state.0, DataState::Failed, "{what}, start {start}: {state:?}");
                assert_eq!((group.role(), recovery.as_copy), (Role::Primary, false), "{what}");
                assert_eq!(group.branches().unwrap(), Vec::new(), "{what}");
                assert_eq!(bench.disk.list(&log).unwrap(), before, "{what}");
                assert!(group.promote("test").is_err() && group.demote().is_err(), "{what}");
                let refused = group.yield_to(Lsn(at), None, Discard::Authored);
                assert!(refused.is_err(), "{what}");
            }
            // What was damaged is right again.
            bench.disk.damage(&path, at + 10, 1, 0xff);
            let (group, _) = bench.open();
            assert_eq!(
                (group.role(), group.data_state().0),
                (Role::Primary, DataState::Consistent)
            );
            assert!(read(&*group, volume, 0, 1 << 16) == right, "{what}");
            let now = group.control().epochs.clone();
            assert_eq!(now[..epochs.len()], epochs, "{what}");
            // One that gave up its reign is a copy, which has again what it lost when it follows.
            group.demote().unwrap();
            group.close().unwrap();
            drop(group);
            bench.disk.damage(&path, at + 10, 1, 0xff);
            let (group, recovery) = bench.open();
            assert_eq!((group.role(), recovery.as_copy), (Role::Secondary, true), "{what}");
            assert_eq!(group.positions().head, Lsn(at), "{what}");
        }
    }
}

#[test]
fn a_failure_that_its_own_disk_did_not_take_is_known_at_the_next_start() {
    let bench = Bench::new("a", 30);
    bench.clock.set_boot(1);
    let run = PathBuf::from("/run");
    let context = |bench: &Bench| GroupContext { failures: Some(run.clone()), ..bench.context() };
    bench.disk.create_dir(&run).unwrap();
    let new = NewGroup { id: GROUP, name: name("g"), segment_bytes: SEGMENT };
    let group = Group::create(context(&bench), &dir(), new).unwrap();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    group.sync_now().unwrap();
    write(&group, volume.number, 0, &[1; 4096]);
    let reigns = group.control().epochs.len();
    // What the disk has when it is mounted again: neither the write nor a word of the failure.
    let again = |seed| Bench { disk: Arc::new(bench.disk.crash(seed)), ..bench.after_crash(0) };
    let (with, without) = (again(1), again(1));
    bench.disk.inject(Fault::FailedSync { operation: bench.disk.operations() });
    group.sync_now().unwrap_err();
    let [latch] = &bench.disk.list(&run).unwrap()[..] else { panic!("it is not written down") };
    for after in [&with, &without] {
        let _ = after.disk.create_dir(&run);
    }
    with.disk.open(&run.join(latch), crate::io::OpenMode::Create).unwrap();
    let start = |bench: &Bench| {
        let (group, recovery) = Group::open(context(bench), &dir()).unwrap();
        let found = (recovery.cut.is_some(), group.control().epochs.len() - reigns);
        (group, found)
    };
    assert_eq!(start(&without).1, (false, 0), "a process that was killed has lost nothing");
    let (group, found) = start(&with);
    assert_eq!(found, (true, 1), "what was answered may be missing: a new reign begins");
    assert!(with.event_codes().contains(&"data-recovered".to_owned()));
    drop(group);
    assert!(with.disk.list(&run).unwrap().is_empty());
    let (_, (cut, _)) = start(&with);
    assert!(!cut, "it is told once");
}

/// The cache shows what the disk does not have, and a sync brings none of it: a start that only
/// synced the end of the log would show what the next loss of power takes.
#[test]
fn what_a_start_shows_after_a_failed_sync_and_a_kill_survives_a_power_loss() {
    let bench = Bench::new("a", 31);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
    group.sync_now().unwrap();
    for round in 0..10 {
        write(&group, volume, u64::from(round) * 16_384, &[round + 1; 16_384]);
    }
    let answered = read(&*group, volume, 0, 1 << 20);
    bench.disk.inject(Fault::FailedSync { operation: bench.disk.operations() });
    group.sync_now().unwrap_err();
    drop(group);
    let shown = |bench: &Bench| {
        let (group, _) = bench.open();
        assert_eq!(group.data_state().0, DataState::Consistent, "{:?}", group.data_state());
        read(&*group, volume, 0, 1 << 20)
    };
    let lost = (0..20).filter(|seed| shown(&bench.after_crash(*seed)) != answered).count();
    assert!(lost > 5, "the disk has nearly all of it: only {lost} have lost anything");
    assert!(shown(&bench) == answered, "the cache has all of it");
    for seed in 0..20 {
        assert!(shown(&bench.after_crash(seed)) == answered, "seed {seed}: shown, and gone");
    }
}
