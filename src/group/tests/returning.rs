//! Primaries that come back, and tails that are cut.

use std::sync::Mutex;

use super::*;
use crate::io::{Fault, OpenMode};
use crate::log::control::{MemberRecord, Mode, OnLoss};
use crate::units::Chain;

pub(super) fn join(group: &Group, node: u8) {
    join_as(group, node, Mode::default(), OnLoss::default());
}

fn remove(group: &Group, node: u8) {
    let known = group.control().members.iter().find(|it| it.node == NodeId([node; 16])).cloned();
    let member = MemberRecord { removed: true, ..known.unwrap() };
    group.append_control(Control::Member(member)).unwrap();
}

fn join_as(group: &Group, node: u8, mode: Mode, on_loss: OnLoss) {
    let member = MemberRecord {
        node: NodeId([node; 16]),
        name: name("peer"),
        mode,
        on_loss,
        rpo_target: None,
        removed: false,
        other: serde_json::Map::new(),
    };
    group.append_control(Control::Member(member)).unwrap();
}

fn reasons(group: &Group) -> Vec<String> {
    group.control().epochs.iter().map(|epoch| epoch.reason.clone()).collect()
}

fn end_of(group: &Group) -> (Lsn, Chain) {
    let positions = group.positions();
    (positions.head, positions.chain)
}

/// A group of one volume with a tail of three segments behind the returned position, and what the
/// volume was there.
fn with_tail(bench: &Bench) -> (Arc<Group>, Volume, (Lsn, Chain), Vec<u8>) {
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    join(&group, 9);
    for block in 0..40u64 {
        write(&group, volume.number, block * 4096, &[1 + block as u8; 4096]);
    }
    let at = end_of(&group);
    let then = read(&*group, volume.number, 0, 1 << 20);
    for block in 20..80u64 {
        write(&group, volume.number, block * 4096, &[100 + block as u8; 4096]);
    }
    group.create_volume(name("w"), 1 << 20).unwrap();
    (group, volume, at, then)
}

#[test]
fn a_split_brain_is_remembered_until_it_ends_with_the_node_it_began_with() {
    let bench = Bench::new("a", 1);
    let group = bench.create();
    join(&group, 9);
    let (with, other) = (NodeId([9; 16]), NodeId([8; 16]));
    group.note_split_brain(with, true).unwrap();
    // Another copy follows this node.
    group.note_split_brain(other, false).unwrap();
    group.close().unwrap();
    drop(group);
    let (group, _) = bench.open();
    assert_eq!(group.waits_because(), None, "it asks nobody, and yields to nobody by itself");
    group.note_split_brain(with, false).unwrap();
    group.close().unwrap();
    drop(group);
    let (group, _) = bench.open();
    assert!(group.waits_because().is_some(), "it asks its peer first");
    group.serve().unwrap();
    // It is no member any more: nobody could end it with it.
    group.note_split_brain(with, true).unwrap();
    join(&group, 8);
    remove(&group, 9);
    group.close().unwrap();
    drop(group);
    let (group, _) = bench.open();
    assert!(group.waits_because().is_some(), "it asks the peer that it has");
    // And may have one with that.
    group.serve().unwrap();
    group.note_split_brain(other, true).unwrap();
    group.close().unwrap();
    drop(group);
    assert_eq!(bench.open().0.waits_because(), None);
}

#[test]
fn a_kill_loses_nothing_and_begins_no_reign_but_a_power_failure_does() {
    let bench = Bench::new("a", 1);
    bench.clock.set_boot(1);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    write(&group, volume.number, 0, &[7; 4096]);
    let end = end_of(&group);
    drop(group);
    let (group, recovery) = bench.open();
    assert_eq!((recovery.cut, end_of(&group)), (None, end));
    assert_eq!(reasons(&group), ["created"]);
    drop(group);
    let after = bench.after_crash(1);
    after.clock.set_boot(2);
    let (group, recovery) = after.open();
    assert!(recovery.cut.is_some());
    assert_eq!(reasons(&group), ["created", "recovery"]);
    drop(group);
    // The mark of the boot was written: a kill in the new boot is a kill.
    assert_eq!(reasons(&after.open().0), ["created", "recovery"]);
}

#[test]
fn a_primary_with_a_peer_asks_before_anything_is_appended() {
    let bench = Bench::new("a", 2);
    bench.clock.set_boot(1);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    join(&group, 9);
    group.sync_now().unwrap();
    let end = end_of(&group);
    let after = bench.after_crash(3);
    after.clock.set_boot(2);
    let (group, _) = after.open();
    assert!(group.is_asking());
    assert_eq!((group.role(), end_of(&group)), (Role::Primary, end));
    // A restart in the meantime forgets neither.
    drop(group);
    let (group, _) = after.open();
    assert!(group.is_asking());
    assert_eq!(end_of(&group), end);
    group.hold_back(7, "waits for `b`");
    let refused = one(&group, volume.number, Op::Write { offset: 0, data: &[5; 512] });
    assert!(refused.unwrap_err().to_string().contains("waits for `b`"));
    assert!(group.wait_to_serve().is_err());
    assert_eq!(end_of(&group), end);
    // An operator decides; the new reign comes before the first write.
    group.promote("promote").unwrap();
    assert!(!group.is_asking());
    write(&group, volume.number, 0, &[5; 512]);
    assert_eq!(reasons(&group), ["created", "promote"]);
    let epoch = group.control().epochs[1].clone();
    assert_eq!(
        (epoch.first_lsn, epoch.counter),
        (end.0, 8),
        "above the reign that it stands beside"
    );
}

#[test]
fn what_a_peer_gives_back_is_taken_before_the_new_reign() {
    let bench = Bench::new("a", 3);
    bench.clock.set_boot(1);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    join(&group, 9);
    let kept = group.sync_now().unwrap();
    write(&group, volume.number, 0, &[5; 4096]);
    let lost = end_of(&group).0;
    let mut bytes = vec![0; lost.bytes_since(kept) as usize];
    group.read_log(kept, &mut bytes).unwrap();
    drop(group);
    // The page cache is lost, whatever of it the disk would have kept.
    let after = (0..100).map(|seed| bench.after_crash(seed)).find(|after| {
        after.clock.set_boot(2);
        end_of(&after.open().0).0 == kept
    });
    let (group, _) = after.expect("one crash takes the write").open();
    group.append_received(kept, &bytes).unwrap();
    assert!(group.is_asking());
    group.serve().unwrap();
    assert_eq!(reasons(&group), ["created", "recovery"]);
    assert_eq!(group.control().epochs[1].first_lsn, lost);
    assert_eq!(read(&*group, volume.number, 0, 4096), [5; 4096]);
    let refused = group.append_received(group.positions().head, &bytes).unwrap_err();
    assert!(refused.what.contains("this node is primary"), "{refused}");
}

/// Whether some branch holds the bytes that stood in the log from `from` on.
fn is_kept(bench: &Bench, from: Lsn, tail: &[u8]) -> Result<(), String> {
    let branches = dir().join("branches");
    let dirs = bench.disk.list(&branches).unwrap_or_default();
    let mut at = from;
    while at.bytes_since(from) < tail.len() as u64 {
        let (number, offset) = (at.segment_number(SEGMENT), at.segment_offset(SEGMENT));
        let start = at.bytes_since(from) as usize;
        let count = (tail.len() - start).min((SEGMENT - offset) as usize);
        let wanted = &tail[start..start + count];
        let held = |dir: &String| {
            let path = branches.join(dir).join(crate::log::segment::segment_name(number));
            let mut bytes = vec![0; count];
            let file = bench.disk.open(&path, OpenMode::Read);
            file.and_then(|file| file.read_at(&mut bytes, offset)).is_ok() && bytes == wanted
        };
        if !dirs.iter().any(held) {
            return Err(format!("segment {number} from {offset} on is in none of {dirs:?}"));
        }
        at = at.advance(count as u64);
    }
    Ok(())
}

#[test]
fn a_primary_that_yields_keeps_its_tail_as_a_branch_at_every_crash() {
    let bench = Bench::new("a", 4);
    bench.clock.set_boot(1);
    let (group, volume, (at, chain), then) = with_tail(&bench);
    let end = group.positions().head;
    let mut tail = vec![0; end.bytes_since(at) as usize];
    group.read_log(at, &mut tail).unwrap();
    let refused = group.yield_to(at, chain, Discard::Received).unwrap_err().to_string();
    assert!(refused.contains("serves"), "{refused}");
    group.close().unwrap();
    let (group, _) = bench.open();
    let other = group.yield_to(at, Chain(chain.0 ^ 1), Discard::Received).unwrap_err().to_string();
    assert!(other.contains("differs"), "{other}");
    let open_image = group.open_image(&Point::Now, Some(name("late")), "test", None).unwrap();
    bench.disk.record();
    group.yield_to(at, chain, Discard::Received).unwrap();
    assert!(open_image.broken().unwrap().contains("left the history"));
    let stopped = bench.disk.take_recorded();
    assert!(stopped.len() > 10, "{} boundaries", stopped.len());
    let check = |group: &Group, what: &str| {
        assert_eq!(end_of(group), (at, chain), "{what}");
        assert_eq!(group.role(), Role::Secondary, "{what}");
        assert_eq!(group.volumes().len(), 1, "{what}");
        assert!(read(group, volume.number, 0, 1 << 20) == then, "{what}");
    };
    check(&group, "live");
    is_kept(&bench, at, &tail).unwrap();
    let branches = group.branches().unwrap();
    assert_eq!(branches.len(), 1);
    assert_eq!((branches[0].from.lsn, branches[0].to.lsn, branches[0].authored), (at, end, true));
    drop(group);
    let mut finished = 0;
    for (boundary, disk) in stopped.into_iter().enumerate() {
        for seed in 0..3 {
            let what = format!("boundary {boundary}, seed {seed}");
            let disk = Arc::new(disk.crash(seed + 100 * boundary as u64));
            let after = Bench { disk, ..bench.after_crash(0) };
            let (group, _) = after.open();
            // Undone or done: what was begun is finished before anybody sees it.
            if group.role() == Role::Primary {
                assert_eq!(group.positions().head, end, "{what}");
                group.yield_to(at, chain, Discard::Received).unwrap();
            } else {
                finished += 1;
            }
            let branches = group.branches().unwrap();
            assert!(branches.iter().all(|branch| branch.authored), "{what}: {branches:?}");
            check(&group, &what);
            is_kept(&after, at, &tail).unwrap_or_else(|missing| panic!("{what}: {missing}"));
            drop(group);
            check(&after.open().0, &format!("{what}, opened again"));
        }
    }
    assert!(finished > 10, "{finished}");
}

#[test]
fn a_yield_that_fails_is_finished_by_the_next_start() {
    let bench = Bench::new("a", 12);
    let (group, volume, (at, chain), then) = with_tail(&bench);
    let end = group.positions().head;
    let mut tail = vec![0; end.bytes_since(at) as usize];
    group.read_log(at, &mut tail).unwrap();
    group.close().unwrap();
    drop(group);
    let operations = {
        let bench = Bench { disk: Arc::new(bench.disk.snapshot()), ..bench.after_crash(0) };
        let (group, _) = bench.open();
        let before = bench.disk.operations();
        group.yield_to(at, chain, Discard::Received).unwrap();
        bench.disk.operations() - before
    };
    let mut finished = 0;
    for operation in 0..operations {
        let what = format!("operation {operation}");
        let bench = Bench { disk: Arc::new(bench.disk.snapshot()), ..bench.after_crash(0) };
        let (group, _) = bench.open();
        bench.disk.inject(Fault::Error { operation: bench.disk.operations() + operation });
        let failed = group.yield_to(at, chain, Discard::Received).is_err();
        if group.data_state().0 == DataState::Failed {
            let refused = one(&group, volume.number, Op::Write { offset: 0, data: &[9; 512] });
            assert!(refused.is_err(), "{what}");
        } else {
            // It is done, or nothing is.
            assert_eq!(failed, group.role() == Role::Primary, "{what}");
            assert_eq!(failed, end_of(&group) != (at, chain), "{what}");
        }
        drop(group);
        let (group, _) = bench.open();
        if group.role() == Role::Primary {
            assert!(failed, "{what}");
            group.yield_to(at, chain, Discard::Received).unwrap();
        } else {
            finished += 1;
        }
        assert_eq!(end_of(&group), (at, chain), "{what}");
        assert!(read(&*group, volume.number, 0, 1 << 20) == then, "{what}");
        is_kept(&bench, at, &tail).unwrap_or_else(|missing| panic!("{what}: {missing}"));
    }
    assert!(finished > 4, "{finished} of {operations}");
}

#[test]
fn a_cut_log_goes_on_with_other_records_and_no_index_of_the_old_ones_is_believed() {
    let a = Bench::new("a", 5);
    let b = Bench::new("b", 6);
    let (group, volume, (at, chain), _) = with_tail(&a);
    let copy = b.create_copy();
    let mut bytes = vec![0; at.0 as usize];
    group.read_log(Lsn::ZERO, &mut bytes).unwrap();
    copy.append_received(Lsn::ZERO, &bytes).unwrap();
    copy.sync_now().unwrap();
    copy.promote("promote").unwrap();
    for block in 0..100u64 {
        write(&copy, volume.number, block * 4096, &[200 - block as u8; 4096]);
    }
    group.sync_now().unwrap();
    group.write_indices();
    let names = a.disk.list(&dir().join("log")).unwrap();
    assert!(names.iter().filter(|name| name.ends_with(".idx")).count() >= 3, "{names:?}");
    group.demote().unwrap();
    let refused = group.yield_to(at, chain, Discard::Received).unwrap_err().to_string();
    assert!(refused.contains("tidelog resolve g --discard-local"), "{refused}");
    group.yield_to(at, chain, Discard::Authored).unwrap();
    let mut rest = vec![0; copy.positions().head.bytes_since(at) as usize];
    copy.read_log(at, &mut rest).unwrap();
    group.append_received(at, &rest).unwrap();
    group.sync_now().unwrap();
    group.write_indices();
    assert!(group.positions().time >= copy.positions().time);
    let expected = read(&*copy, volume.number, 0, 1 << 20);
    assert!(read(&*group, volume.number, 0, 1 << 20) == expected);
    group.close().unwrap();
    drop(group);
    let (group, _) = a.open();
    assert_eq!(end_of(&group), end_of(&copy));
    assert!(read(&*group, volume.number, 0, 1 << 20) == expected);
    assert_eq!(group.branches().unwrap().len(), 1);
    // A second cut at the same place keeps the first branch.
    group.yield_to(at, chain, Discard::Received).unwrap();
    let branches = group.branches().unwrap();
    let authored: Vec<bool> = branches.iter().map(|branch| branch.authored).collect();
    assert_eq!(authored, [true, false], "the second had only been received");
}

#[test]
fn who_waits_for_the_clients_to_go_is_told_when_the_last_one_went() {
    let bench = Bench::new("a", 7);
    bench.clock.set_boot(1);
    let (group, volume, (at, chain), _) = with_tail(&bench);
    group.sync_now().unwrap();
    let other = group.volumes()[1].number;
    let told = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let telling = told.clone();
    group.subscribe(Box::new(move || {
        telling.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        true
    }));
    let told = || told.load(std::sync::atomic::Ordering::Relaxed);
    let clients = [volume.number, volume.number, other].map(|number| group.client(number).unwrap());
    let refused = group.yield_to(at, chain, Discard::Authored).unwrap_err().to_string();
    assert!(refused.contains("3 clients are connected"), "{refused}");
    let [one, two, three] = clients;
    let before = told();
    drop((one, three));
    assert_eq!(told(), before, "one is left");
    drop(two);
    assert_eq!(told(), before + 1);
    group.yield_to(at, chain, Discard::Authored).unwrap();
}

#[test]
fn a_branch_whose_description_cannot_be_read_is_shown_and_can_be_removed() {
    let bench = Bench::new("a", 8);
    bench.clock.set_boot(1);
    let (group, _, (at, chain), _) = with_tail(&bench);
    group.yield_to(at, chain, Discard::Authored).unwrap();
    let [good] = &group.branches().unwrap()[..] else { panic!("one branch") };
    let about = dir().join("branches").join(&good.name).join("branch.json");
    let other = crate::base::seal("tidelog-file", b"{\"name\": \"cut\"}");
    for (text, what) in [(&other[..], "missing field"), (b"\0\0", "no first line")] {
        let file = bench.disk.open(&about, OpenMode::Create).unwrap();
        file.set_len(text.len() as u64).unwrap();
        file.write_at(&[std::io::IoSlice::new(text)], 0).unwrap();
        let [shown] = &group.branches().unwrap()[..] else { panic!("{what}: not shown") };
        assert_eq!((&shown.name, shown.from.lsn), (&good.name, at));
        let reason = &shown.reason;
        assert!(reason.contains("branch.json cannot be read") && reason.contains(what), "{reason}");
    }
    bench.disk.remove(&about).unwrap();
    assert_eq!(group.branches().unwrap().len(), 1);
    group.remove_branch(&good.name).unwrap();
    assert!(group.branches().unwrap().is_empty());
}

#[test]
fn hosts_that_write_anew_what_waits_for_a_peer_do_not_fill_the_log() {
    let bench = Bench::new("a", 42);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 4 << 20).unwrap().number;
    join_as(&group, 9, Mode::Receive, OnLoss::Block);
    let (at, _) = end_of(&group);
    group.note_peer_holds(NodeId([9; 16]), at, at);
    group.start_workers();
    let (writer, (done, ended)) = (Arc::clone(&group), std::sync::mpsc::channel());
    let thread = std::thread::spawn(move || {
        for _ in 0..40 {
            write(&writer, volume, 0, &vec![1; 1 << 20]);
        }
        done.send(()).unwrap();
    });
    let wait = std::time::Duration::from_millis(300);
    let mut stood = at;
    loop {
        assert!(ended.recv_timeout(wait).is_err(), "40 MiB wait for nobody");
        let (head, _) = end_of(&group);
        if head == std::mem::replace(&mut stood, head) && head > at {
            break;
        }
    }
    assert!(stood.bytes_since(at) < 18 << 20, "{stood}");
    // Each way out lets them go on: what the peer has, and that nobody waits for it any more.
    let some = at.advance(4 << 20);
    group.note_peer_holds(NodeId([9; 16]), some, some);
    assert!(ended.recv_timeout(wait).is_err());
    assert!(end_of(&group).0 > stood);
    group.note_peer_lost(NodeId([9; 16]), "it is away", some, some);
    assert!(ended.recv_timeout(wait).is_err());
    join_as(&group, 9, Mode::Receive, OnLoss::Continue);
    ended.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
    thread.join().unwrap();
    group.close().unwrap();
}

#[test]
fn what_waits_for_a_peer_is_refused_by_a_yield_and_never_answered_as_something_else() {
    let bench = Bench::new("a", 41);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    let peer = NodeId([9; 16]);
    join_as(&group, 9, Mode::Sync, OnLoss::Block);
    group.sync_now().unwrap();
    let (at, chain) = end_of(&group);
    group.note_peer_holds(peer, at, at);
    write(&group, volume.number, 0, &[1; 4096]);
    let (head, _) = end_of(&group);
    let answers = Arc::new(Mutex::new(Vec::new()));
    let answer = |name: &'static str| -> Done {
        let answers = Arc::clone(&answers);
        Box::new(move |result| answers.lock().unwrap().push((name, result.is_ok())))
    };
    group.when_held(head, answer("write"));
    group.when_durable(head, answer("flush"));
    assert_eq!(*answers.lock().unwrap(), []);
    group.yield_to(at, chain, Discard::Authored).unwrap();
    let told = std::mem::take(&mut *answers.lock().unwrap());
    assert_eq!(told, [("write", false), ("flush", false)]);
    // The peer's word for what is in the branch comes late.
    group.note_peer_holds(peer, head, head);
    assert_eq!(*answers.lock().unwrap(), []);
}

#[test]
fn the_durable_mark_never_ends_behind_a_cut_log() {
    let bench = Bench::new("a", 7);
    let (group, _, (at, chain), _) = with_tail(&bench);
    group.close().unwrap();
    let (group, _) = bench.open();
    // The thread that syncs has synced, and comes to write down the mark behind the cut.
    group.sync_now().unwrap();
    group.yield_to(at, chain, Discard::Received).unwrap();
    group.mark_durable();
    assert_eq!(group.meta.lock().unwrap().meta.durable, at);
    drop(group);
    let (group, _) = bench.open();
    assert_eq!(group.data_state().0, DataState::Consistent);
    assert!(!bench.event_codes().contains(&"log-damaged".to_owned()));
}

#[test]
fn a_primary_that_asks_starts_no_fold_that_it_could_not_yield_behind() {
    let bench = Bench::new("a", 8);
    let (group, _, (at, chain), _) = with_tail(&bench);
    set_policy(&group, 0, 64 << 20);
    group.close().unwrap();
    let (group, _) = bench.open();
    assert!(group.is_asking());
    bench.pass(10);
    let horizon = group.positions().horizon;
    assert_eq!(group.fold_now().unwrap(), horizon);
    group.yield_to(at, chain, Discard::Received).unwrap();
}

#[test]
fn a_branch_that_is_given_up_is_there_as_a_whole_or_never_again_at_every_crash() {
    let bench = Bench::new("a", 9);
    let (group, _, (at, chain), _) = with_tail(&bench);
    let end = group.positions().head;
    let mut tail = vec![0; end.bytes_since(at) as usize];
    group.read_log(at, &mut tail).unwrap();
    group.close().unwrap();
    let (group, _) = bench.open();
    group.yield_to(at, chain, Discard::Received).unwrap();
    let name = group.branches().unwrap()[0].name.clone();
    bench.disk.record();
    group.remove_branch(&name).unwrap();
    let stopped = bench.disk.take_recorded();
    assert!(stopped.len() > 4, "{} boundaries", stopped.len());
    assert!(group.branches().unwrap().is_empty());
    let mut found = [0; 2];
    for (boundary, disk) in stopped.into_iter().enumerate() {
        for seed in 0..4 {
            let what = format!("boundary {boundary}, seed {seed}");
            let disk = Arc::new(disk.crash(seed + 100 * boundary as u64));
            let after = Bench { disk, ..bench.after_crash(0) };
            let (group, _) = after.open();
            let branches = group.branches().unwrap();
            found[branches.len()] += 1;
            if branches.is_empty() {
                let left = after.disk.list(&dir().join("branches")).unwrap();
                assert!(left.is_empty(), "{what}: {left:?}");
            } else {
                is_kept(&after, at, &tail).unwrap_or_else(|lost| panic!("{what}: {lost}"));
            }
        }
    }
    assert!(found[0] > 0 && found[1] > 0, "{found:?}");
}

#[test]
fn what_a_full_disk_left_of_a_received_log_is_no_damage_behind_a_reign_that_began_here() {
    for pages in 2..20 {
        let (a, b) = (Bench::new("a", 1), Bench::new("b", 2));
        let group = a.create();
        let volume = group.create_volume(name("v"), 1 << 20).unwrap();
        let copy = b.create_copy();
        super::pins::follow(&group, &copy);
        // Each record calls what is before it durable, on the primary.
        for block in 0..30u64 {
            write(&group, volume.number, block * 4096, &[1 + block as u8; 4096]);
            group.sync_now().unwrap();
        }
        let (from, head) = (copy.received_end(), group.positions().head);
        let mut bytes = vec![0; head.bytes_since(from) as usize];
        group.read_log(from, &mut bytes).unwrap();
        b.disk.inject(Fault::NoSpace { bytes: pages * 4096 });
        let taken = copy.append_received(from, &bytes);
        assert!(taken.is_err(), "{pages} pages: {taken:?}");
        b.disk.clear_faults();
        copy.promote("the primary is dead").unwrap();
        let end = end_of(&copy);
        drop(copy);
        let (copy, recovery) = b.open();
        let (state, why, _) = copy.data_state();
        assert_eq!((state, why), (DataState::Consistent, None), "{pages} pages: {recovery:?}");
        assert_eq!(recovery.damaged, [], "{pages} pages");
        assert!(end_of(&copy).0 >= end.0, "{pages} pages: the reign is gone");
    }
}

#[test]
fn who_waits_for_a_required_peer_goes_on_when_it_has_answered_and_another_has_not() {
    for round in 0..20 {
        let bench = Bench::new("a", 60 + round);
        let group = bench.create();
        join_as(&group, 8, Mode::Async, OnLoss::Continue);
        join_as(&group, 9, Mode::Sync, OnLoss::Block);
        group.sync_now().unwrap();
        drop(group);
        let (group, _) = bench.open();
        let (sender, seen) = std::sync::mpsc::channel();
        let waiting = group.clone();
        std::thread::spawn(move || {
            sender.send(()).unwrap();
            // Nothing here looks again every few seconds.
            waiting.wait_to_serve().unwrap();
            sender.send(()).unwrap();
        });
        seen.recv().unwrap();
        // In some rounds the answer comes before the other waits, in most not.
        (0..round * 500).for_each(|_| std::thread::yield_now());
        group.note_answer(NodeId([9; 16])).unwrap();
        let served = seen.recv_timeout(Duration::from_secs(60));
        served.expect("it waits although the peer that it needs has answered");
        assert!(!group.is_asking());
    }
}
