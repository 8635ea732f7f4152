//! Where space is short: what of old moments goes first, and what the log waits for.

use super::moments::{all, at_pin, fold, group_with_volume, image, moments_on_disk};
use super::*;
use crate::io::Fault;
use crate::log::control::{Consistency, OnPeerBehind};

#[test]
fn where_space_ends_the_costliest_image_goes_first_and_pins_last() {
    let bench = Bench::new("a", 15);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &vec![1; 1 << 20]);
    fold(&bench, &group);
    let costly = image(&group, "costly");
    write(&group, volume, 0, &vec![2; 256 << 10]);
    fold(&bench, &group);
    let cheap = image(&group, "cheap");
    write(&group, volume, 0, &[3; 4096]);
    group.pin_bookmark(name("pin"), Consistency::Crash).unwrap();
    fold(&bench, &group);
    let before = all(&*cheap, volume);
    write(&group, volume, 0, &vec![4; 512 << 10]);
    bench.pass(5);
    group.sync_now().unwrap();
    // Room for what one of them needs, when the costly one is gone.
    let full = |spare: u64| {
        let space = bench.disk.space(&dir()).unwrap();
        bench.disk.set_total_bytes(space.total_bytes - space.free_bytes + spare);
    };
    while group.segments.drop_spares().unwrap() {}
    full(200 << 10);
    group.fold_now().unwrap();
    let lost: Vec<String> = bench
        .events
        .since(0)
        .into_iter()
        .filter(|event| event.code == "image-lost" || event.code == "pin-lost")
        .map(|event| event.text)
        .collect();
    assert!(lost[0].contains("image costly"), "{lost:?}");
    assert!(costly.broken().unwrap().contains("space"));
    assert!(try_read(&*costly, volume, 0, 4096).is_err());
    if cheap.broken().is_none() {
        assert!(all(&*cheap, volume) == before);
    }
    let order: Vec<bool> = lost.iter().map(|text| text.contains("pinned bookmark")).collect();
    assert!(order.is_sorted(), "a pin goes only when no image is left: {lost:?}");
    assert_eq!(all(&*group, volume)[..4096], [4; 4096]);
}

/// Found by the simulation: the second attempt took the files that the first had begun for those of
/// a moment that a fold had passed, and kept what the base held long before it.
#[test]
fn what_a_fold_without_space_had_begun_to_keep_is_kept_right_by_the_next() {
    let mut tried_again = 0;
    for pages in 0..16 {
        let bench = Bench::new("a", 17);
        let (group, volume) = group_with_volume(&bench);
        write(&group, volume, 0, &[1; 8192]);
        fold(&bench, &group);
        write(&group, volume, 0, &[2; 4096]);
        let open = image(&group, "i");
        let before = all(&*open, volume);
        write(&group, volume, 0, &[3; 4096]);
        bench.pass(5);
        group.sync_now().unwrap();
        bench.disk.inject(Fault::NoSpace { bytes: pages * 4096 });
        let failed = group.fold_now().is_err();
        bench.disk.clear_faults();
        fold(&bench, &group);
        if open.broken().is_none() {
            tried_again += u32::from(failed);
            assert!(all(&*open, volume) == before, "{pages} pages of space");
        }
    }
    assert!(tried_again > 0, "some fold failed and left the image open");
}

#[test]
fn the_reserve_of_the_disk_ends_images_one_at_a_time_and_before_pins() {
    let bench = Bench::new("a", 16);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &vec![1; 1 << 20]);
    group.pin_bookmark(name("pin"), Consistency::Crash).unwrap();
    let first = image(&group, "first");
    write(&group, volume, 0, &vec![2; 64 << 10]);
    let second = image(&group, "second");
    write(&group, volume, 0, &vec![3; 32 << 10]);
    fold(&bench, &group);
    let broken = || (first.broken().is_some(), second.broken().is_some());
    group.keep_reserve(100, 100);
    assert_eq!(broken(), (false, false), "the reserve is whole");
    group.keep_reserve(99, 100);
    assert_eq!(broken(), (true, false), "the one that costs more");
    group.keep_reserve(99, 100);
    assert_eq!(broken(), (true, true));
    assert_eq!(read(&*at_pin(&group, "pin").unwrap(), volume, 0, 4096), [1; 4096]);
    for open in group.images() {
        let _ = group.close_this_image(&open);
    }
    group.keep_reserve(99, 100);
    let refused = at_pin(&group, "pin").map(|_| ()).unwrap_err().to_string();
    assert!(refused.contains("short of space"), "{refused}");
    assert!(bench.event_codes().contains(&"pin-lost".to_owned()));
    assert_eq!(moments_on_disk(&bench.disk), Vec::<String>::new());
    group.close().unwrap();
    drop((first, second, group));
    // The next start says so again, and does not make anything up.
    let (group, _) = bench.open();
    assert!(at_pin(&group, "pin").is_err());
    assert!(group.cost_at(group.control().bookmarks[0].lsn).is_err());
}

#[test]
fn a_log_that_blocks_is_folded_no_further_than_its_peer_has_and_says_so() {
    let bench = Bench::new("a", 8);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 3 << 20).unwrap().number;
    let peer = NodeId([9; 16]);
    let member = serde_json::json!({ "node": peer, "name": "b", "mode": "async" });
    let member = serde_json::from_value(member).unwrap();
    group.append_control(Control::Member(member)).unwrap();
    let set = |on_peer_behind| {
        let policy = PolicyRecord {
            window: Span::from_secs(0),
            log_limit: ByteSize(4 * SEGMENT),
            on_peer_behind,
            ..PolicyRecord::default()
        };
        group.append_control(Control::Policy(policy)).unwrap();
    };
    set(OnPeerBehind::Block);
    let fold = || {
        bench.pass(5);
        group.sync_now().unwrap();
        group.fold_now().unwrap()
    };
    for offset in 0..80 {
        write(&group, volume, offset * 4096, &[1; 4096]);
    }
    assert_eq!(fold(), Lsn::ZERO, "where the peer stands is not known yet");
    let full = group.log_full().unwrap().reason;
    assert!(full.contains("kept for b") && full.contains("on_peer_behind=release"), "{full}");
    assert!(bench.event_codes().contains(&"log-kept-for-peer".to_owned()));
    let has = Lsn(100_000);
    group.note_peer_needs(peer, has, true);
    let folded = fold();
    assert!(folded > Lsn::ZERO && folded <= has, "{folded}");
    group.note_peer_needs(peer, has, false);
    assert_eq!(fold(), folded, "also while it is away");
    // Released, the log is kept for who follows until space is short, and for nobody else.
    set(OnPeerBehind::Release);
    let end = fold();
    assert!(end > has, "{end}");
    write(&group, volume, 0, &[2; 4096]);
    group.note_peer_needs(peer, end, true);
    assert_eq!(fold(), end, "it follows, and there is space");
    group.note_peer_needs(peer, end, false);
    assert!(fold() > end);
}

/// Who had seen room, and lost it to another, waited as long as there was none: for nobody, and
/// then over what its host had written anew.
#[test]
fn an_append_that_waits_ends_with_its_client_and_neither_it_nor_the_rest_is_appended() {
    let bench = Bench::new("a", 9);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
    let peer = NodeId([9; 16]);
    let member = serde_json::json!({ "node": peer, "name": "b", "mode": "receive" });
    group.append_control(Control::Member(serde_json::from_value(member).unwrap())).unwrap();
    let holds_all = {
        let group = Arc::clone(&group);
        move || {
            let head = group.positions().head;
            group.note_peer_holds(peer, head, head);
        }
    };
    holds_all();
    group.start_workers();
    let (writer, (done, all)) = (Arc::clone(&group), std::sync::mpsc::channel());
    let make_room = holds_all.clone();
    std::thread::spawn(move || {
        let data = vec![1; 1 << 20];
        let large = Request { volume, op: Op::Write { offset: 0, data: &data }, fua: false };
        let until_full = std::iter::repeat_with(|| writer.append_until(&[large], &|| true));
        let written = until_full.take(40).take_while(|results| results[0].is_ok()).count();
        let head = writer.positions().head;
        let two = [2; 4096];
        let ops = [
            Op::Write { offset: 0, data: &two },
            Op::Write { offset: 8193, data: &two[..100] },
            Op::Trim { offset: 16384, length: 4096 },
        ];
        let batch = ops.map(|op| Request { volume, op, fua: false });
        // There is room when the client is gone; not under the lock, where this would stand still.
        let results = writer.append_until(&batch, &|| {
            make_room();
            true
        });
        done.send((written, results, writer.positions().head.bytes_since(head))).unwrap();
    });
    let (written, results, appended) = all.recv_timeout(Duration::from_secs(60)).unwrap();
    assert!((1..40).contains(&written), "{written} MiB");
    assert_eq!((results.len(), appended), (3, 0), "{results:?}");
    let gone = |result: &Result<Lsn, GroupError>| {
        result.as_ref().is_err_and(|error| error.to_string().contains("client has gone"))
    };
    assert!(results.iter().all(gone), "{results:?}");
    write(&group, volume, 0, &[3; 4096]);
    assert_eq!(read(&*group, volume, 0, 4096), [3; 4096]);
    assert_eq!(read(&*group, volume, 8192, 12288), [1; 12288]);
    group.close().unwrap();
}

#[test]
fn what_a_full_disk_has_of_an_append_is_taken_back_and_no_start_finds_it() {
    let (mut across, mut inside) = (0, 0);
    for pages in 0..11 {
        for received in [false, true] {
            let what = format!("{pages} pages, received: {received}");
            let (a, b) = (Bench::new("a", 20), Bench::new("b", 21));
            [&a, &b].into_iter().for_each(|bench| bench.clock.set_boot(1));
            let primary = a.create();
            let volume = primary.create_volume(name("v"), 1 << 20).unwrap().number;
            let copy = b.create_copy();
            let (bench, group) = if received { (&b, &copy) } else { (&a, &primary) };
            let take = || {
                let from = copy.positions().head;
                let mut bytes = vec![0; primary.positions().head.bytes_since(from) as usize];
                primary.read_log(from, &mut bytes).unwrap();
                copy.append_received(from, &bytes).map(|_| ())
            };
            // Room for two records of the five.
            while SEGMENT - primary.positions().head.segment_offset(SEGMENT) > 20_000 {
                write(&primary, volume, 0, &[1; 8192]);
            }
            take().unwrap();
            group.sync_now().unwrap();
            let head = group.positions().head;
            let data = [2; 8192];
            let op = Op::Write { offset: 8192, data: &data };
            let batch = [Request { volume, op, fua: false }; 5];
            bench.disk.inject(Fault::NoSpace { bytes: pages * 4096 });
            let results = primary.append(&batch);
            let refused = if received { take().is_err() } else { results[0].is_err() };
            assert!(refused, "{what}: there was room");
            assert_eq!(group.positions().head, head, "{what}");
            let next = group.segments.get(head.segment_number(SEGMENT) + 1).is_some();
            *(if next { &mut across } else { &mut inside }) += 1;
            bench.disk.clear_faults();
            // Over the first of what was refused.
            if !received {
                write(group, volume, 0, &[3; 512]);
            }
            let (head, read_before) = (group.positions().head, read(&**group, volume, 0, 65536));
            drop((primary, copy));
            let (group, recovery) = bench.open();
            assert_eq!(recovery.cut, None, "{what}");
            assert_eq!(group.positions().head, head, "{what}");
            assert_eq!(group.branches().unwrap(), Vec::new(), "{what}");
            assert!(read(&*group, volume, 0, 65536) == read_before, "{what}");
        }
    }
    assert!(across > 4 && inside > 4, "{across} {inside}");
}

#[test]
fn what_a_log_takes_of_the_disk_is_measured_once_a_second_however_fast_it_grows() {
    let bench = Bench::new("a", 22);
    let (group, volume) = group_with_volume(&bench);
    let grown = || {
        write(&group, volume, 0, &vec![1; 1 << 20]);
        group.prepare_round(group.positions().head);
        (group.positions().log_used_bytes, group.segments.allocated_bytes())
    };
    let (first, allocated) = grown();
    assert_eq!(first, allocated, "the first round after a start");
    let (second, allocated) = grown();
    assert!(second == first && allocated >= first + (1 << 20), "{second} of {allocated}");
    bench.pass(1);
    let (third, allocated) = grown();
    assert_eq!(third, allocated);
}

#[test]
fn a_copy_that_found_no_room_says_so_until_a_try_succeeded() {
    let (a, b) = (Bench::new("a", 20), Bench::new("b", 21));
    let (group, volume) = group_with_volume(&a);
    write(&group, volume, 0, &vec![1; 60_000]);
    let copy = b.create_copy();
    let mut bytes = vec![0; group.positions().head.0 as usize];
    group.read_log(Lsn::ZERO, &mut bytes).unwrap();
    let take = || {
        let at = copy.received_end();
        copy.append_received(at, &bytes[at.0 as usize..])
    };
    b.disk.inject(Fault::NoSpace { bytes: 0 });
    take().unwrap_err();
    b.disk.clear_faults();
    // It waits a minute at most between two tries.
    for seconds in [0, 10, 40] {
        b.pass(seconds);
        copy.look_at_disk();
        assert!(copy.log_full().is_some(), "after {seconds} s more");
        assert_eq!(copy.full_now().is_some(), seconds == 0, "it could be promoted");
    }
    take().unwrap();
    assert_eq!(copy.log_full(), None);
    assert_eq!(copy.received_end(), group.positions().head);
    // Where nobody tries, room is enough in the end.
    write(&group, volume, 0, &vec![2; 60_000]);
    bytes.resize(group.positions().head.0 as usize, 0);
    group.read_log(Lsn::ZERO, &mut bytes).unwrap();
    b.disk.inject(Fault::NoSpace { bytes: 0 });
    let at = copy.received_end();
    copy.append_received(at, &bytes[at.0 as usize..]).unwrap_err();
    b.disk.clear_faults();
    b.pass(90);
    copy.look_at_disk();
    assert_eq!(copy.log_full(), None);
}

#[test]
fn a_write_that_waited_while_writers_were_halted_is_not_appended_once_its_client_has_gone() {
    let bench = Bench::new("a", 12);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
    let waited = (0..200).any(|_| {
        group.halt_writers("a test").unwrap();
        let (writer, (started, starts)) = (Arc::clone(&group), std::sync::mpsc::channel());
        let thread = std::thread::spawn(move || {
            let data = [1; 4096];
            let request = Request { volume, op: Op::Write { offset: 0, data: &data }, fua: false };
            started.send(()).unwrap();
            writer.append_until(&[request], &|| true).pop().unwrap()
        });
        starts.recv().unwrap();
        // It waits by now, or another will.
        let _ = starts.recv_timeout(Duration::from_millis(20));
        let head = group.positions().head;
        group.resume_writers();
        let result = thread.join().unwrap();
        let gone = result.is_err_and(|error| error.to_string().contains("client has gone"));
        assert!(!gone || group.positions().head == head);
        gone
    });
    assert!(waited);
}
