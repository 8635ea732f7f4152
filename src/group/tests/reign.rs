//! Whose turn it is: what a reign writes of its own, and what must not wait for what.

use super::images::append_unknown;
use super::*;
use crate::io::Fault;
use crate::units::Chain;

fn member(bench: &Bench, removed: bool) -> Control {
    let Bench { node, .. } = bench;
    let member = serde_json::json!({ "node": node.id, "name": node.name, "mode": "async",
        "removed": removed });
    Control::Member(serde_json::from_value(member).unwrap())
}

/// A copy on `b` that replication was stopped to, behind so many writes of a sector.
fn stopped_copy(writes: u64) -> (Bench, Arc<Group>) {
    let (a, b) = (Bench::new("a", 30), Bench::new("b", 31));
    let primary = a.create();
    let volume = primary.create_volume(name("v"), 1 << 20).unwrap().number;
    for (bench, removed) in [(&a, false), (&b, false), (&b, true)] {
        primary.append_control(member(bench, removed)).unwrap();
    }
    for _ in 0..writes {
        write(&primary, volume, 0, &[1; 512]);
    }
    let copy = b.create_copy();
    let mut bytes = vec![0; primary.positions().head.0 as usize];
    primary.read_log(Lsn::ZERO, &mut bytes).unwrap();
    copy.append_received(Lsn::ZERO, &bytes).unwrap();
    copy.sync_now().unwrap();
    (b, copy)
}

fn is_member(bench: &Bench, group: &Group) -> bool {
    group.control().members.iter().any(|member| member.node == bench.node.id)
}

#[test]
fn who_reigns_is_promoted_also_where_the_disk_has_no_room_for_its_record_as_a_member() {
    let mut without_record = 0;
    // Each time the page that takes the last record has another rest.
    for writes in 0..64 {
        for pages in 0..2 {
            let what = format!("{writes} writes, {pages} pages");
            let (bench, copy) = stopped_copy(writes);
            bench.disk.inject(Fault::NoSpace { bytes: pages * 4096 });
            let promoted = copy.promote("test");
            assert_eq!(promoted.is_ok(), copy.role() == Role::Primary, "{what}: {promoted:?}");
            let told = bench.said("member-not-written");
            if promoted.is_ok() {
                assert_eq!(told.is_empty(), is_member(&bench, &copy), "{what}: {told:?}");
                without_record += told.len();
            }
            bench.disk.clear_faults();
            let Ok(epoch) = promoted else { continue };
            assert_eq!(copy.promote("test").unwrap(), epoch, "{what}");
            assert!(is_member(&bench, &copy), "{what}: written by the next");
        }
    }
    assert!(without_record > 0);
}

#[test]
fn promote_waits_for_no_switchover_that_halts_the_writers_and_is_about_to_demote() {
    let bench = Bench::new("a", 32);
    let group = bench.create();
    let peer = Bench::new("b", 33);
    group.append_control(member(&peer, false)).unwrap();
    group.halt_writers("switchover to b").unwrap();
    let (sender, promoted) = std::sync::mpsc::channel();
    let promoting = group.clone();
    std::thread::spawn(move || sender.send(promoting.promote("test").map(|_| ())));
    let minute = Duration::from_secs(60);
    promoted.recv_timeout(minute).expect("it waits for writers").unwrap();
    assert!(!is_member(&bench, &group));
    group.demote().unwrap();
    group.resume_writers();
    // The switchover was refused by the peer.
    group.promote("switchover-refused").unwrap();
    assert!(is_member(&bench, &group));
}

#[test]
fn a_primary_is_not_retired_by_what_was_decided_before_it_was_promoted() {
    let (bench, copy) = stopped_copy(1);
    copy.set_retired(true).unwrap();
    copy.promote("test").unwrap();
    // It waited in the queue of the group's thread.
    copy.set_retired(true).unwrap();
    assert_eq!(copy.data_state().0, DataState::Consistent);
    assert_eq!(bench.said("copy-retired").len(), 1);
    drop(copy);
    let (again, _) = bench.open();
    assert_eq!(again.data_state().0, DataState::Consistent);
}

#[test]
fn a_retired_copy_that_lost_its_power_while_it_was_promoted_is_retired_no_more_where_it_reigns() {
    let (mut reigned, mut told_of) = (0, 0);
    for nth in 0..12 {
        let (bench, copy) = stopped_copy(1);
        copy.set_retired(true).unwrap();
        bench.disk.inject(Fault::PowerOff { operation: bench.disk.operations() + nth });
        let promoted = copy.promote("test");
        drop(copy);
        let bench = bench.after_crash(nth);
        let (again, recovery) = bench.open();
        if again.role() == Role::Secondary {
            assert!(promoted.is_err(), "{nth}");
            let told = bench.events.since(0).into_iter().rev();
            let told = told.filter(|event| event.code == "unclean-start");
            let told = told.map(|event| event.text).next().filter(|_| recovery.cut.is_some());
            if !recovery.as_copy
                && let Some(text) = told
            {
                assert!(
                    text.contains("so is the reign") && text.contains("tidelog promote g"),
                    "{text}"
                );
                told_of += 1;
            }
            assert_eq!(again.data_state().0, DataState::Retired, "{nth}");
            continue;
        }
        reigned += u64::from(promoted.is_err());
        assert_eq!(again.data_state().0, DataState::Consistent, "{nth}: it asks whether to serve");
        again.serve().unwrap();
        assert_eq!(again.data_state().0, DataState::Consistent, "{nth}");
        assert!(is_member(&bench, &again), "{nth}: written where it serves");
        again.demote().unwrap();
        assert_eq!(again.data_state().0, DataState::Consistent, "{nth}: when it steps down");
    }
    assert!(reigned > 0, "its reign's record was durable, and it did not know");
    assert!(told_of > 0, "its reign's record was not, and that is told");
}

#[test]
fn a_copy_made_anew_of_a_group_that_its_node_once_reigned_in_is_a_copy_after_any_restart() {
    let (a, b) = (Bench::new("a", 40), Bench::new("b", 41));
    let first = a.create();
    for bench in [&a, &b] {
        first.append_control(member(bench, false)).unwrap();
    }
    let volume = first.create_volume(name("v"), 1 << 20).unwrap().number;
    for _ in 0..10 {
        write(&first, volume, 0, &[1; 4096]);
    }
    let primary = b.create_copy();
    super::pins::follow(&first, &primary);
    primary.promote("test").unwrap();
    for _ in 0..10 {
        write(&primary, volume, 0, &[2; 4096]);
    }
    primary.sync_now().unwrap();
    // Deleted there, and replicated to it anew: the group is another, the node the same.
    let mut bench = Bench { node: a.node.clone(), ..Bench::new("a", 42) };
    let mut copy = bench.create_copy();
    let (mut restarts, head) = (0, primary.positions().head);
    while copy.positions().head < head {
        let at = copy.received_end();
        let mut bytes = vec![0; head.bytes_since(at).min(6000) as usize];
        primary.read_log(at, &mut bytes).unwrap();
        copy.append_received(at, &bytes).unwrap();
        copy.sync_now().unwrap();
        assert!(copy.positions().head > at, "{at}");
        drop(copy);
        restarts += 1;
        bench = bench.after_crash(restarts);
        let (again, recovery) = bench.open();
        assert_eq!((again.role(), again.is_asking()), (Role::Secondary, false), "at {at}");
        assert!(recovery.as_copy && recovery.damaged.is_empty(), "at {at}: {recovery:?}");
        copy = again;
    }
    assert!(restarts > 10, "{restarts}");
    assert_eq!(copy.control().epochs, primary.control().epochs);
    copy.promote("test").unwrap();
    drop(copy);
    assert_eq!(bench.after_crash(0).open().0.role(), Role::Primary, "it reigns again");
}

#[test]
fn a_reign_is_taken_over_at_its_very_place_or_nothing_is_changed() {
    let (_bench, copy) = stopped_copy(3);
    let Positions { head, chain, .. } = copy.positions();
    let refused = |at: (Lsn, Chain), expected: &str| {
        let answer = copy.take_over(at.0, at.1).unwrap();
        let TookOver::Refused(why) = answer else { panic!("{answer:?}") };
        assert!(why.to_string().contains(expected), "{why}");
        assert_eq!((copy.role(), copy.positions().head), (Role::Secondary, head));
        let noted = copy.meta.lock().unwrap().meta.reign;
        assert_eq!(noted, EpochId(0), "a later start says that a reign was lost");
    };
    refused((Lsn(head.0 - 8), chain), "not as asked");
    refused((Lsn(head.0 + 8), chain), "not as asked");
    refused((head, Chain(chain.0 ^ 1)), "not as asked");
    let answer = copy.take_over(head, chain).unwrap();
    let TookOver::Reigns(epoch) = answer else { panic!("{answer:?}") };
    assert_eq!((epoch.first_lsn, copy.role()), (head, Role::Primary));
    // Who reigns already is not told to be refused: the other would begin a reign beside it.
    assert!(copy.take_over(head, chain).is_err());

    let (_bench, copy) = stopped_copy(3);
    append_unknown(&copy);
    let Positions { head, chain, .. } = copy.positions();
    let answer = copy.take_over(head, chain).unwrap();
    assert!(matches!(answer, TookOver::Refused(_)), "{answer:?}");
    assert_eq!((copy.role(), copy.positions().head), (Role::Secondary, head));
}

#[test]
fn a_reign_is_refused_only_where_its_record_is_in_no_log() {
    let faults: [fn(u64) -> Fault; 4] = [
        |operation| Fault::Error { operation },
        |operation| Fault::FailedSync { operation },
        |operation| Fault::PowerOff { operation },
        |pages| Fault::NoSpace { bytes: pages * 4096 },
    ];
    let (mut refused, mut left_open, mut written) = (0, 0, 0);
    for (kind, fault) in faults.iter().enumerate() {
        for (writes, nth) in (0..4).flat_map(|writes| (0..8).map(move |nth| (writes, nth))) {
            let (bench, copy) = stopped_copy(writes);
            let Positions { head, chain, .. } = copy.positions();
            let from = if kind == 3 { 0 } else { bench.disk.operations() };
            bench.disk.inject(fault(from + nth));
            let answer = copy.take_over(head, chain);
            // Where the write of the record itself failed.
            let unpromoted = copy.role() == Role::Secondary;
            drop(copy);
            bench.disk.clear_faults();
            let (again, _) = bench.open();
            let what = format!("fault {kind}, {writes} writes, {nth}: {answer:?}");
            match answer {
                Ok(TookOver::Reigns(epoch)) => {
                    assert_eq!(again.role(), Role::Primary, "{what}");
                    assert_eq!(again.control().epochs.last(), Some(&epoch), "{what}");
                }
                Ok(TookOver::Refused(_)) => {
                    let found = (again.role(), again.positions().head);
                    assert_eq!(found, (Role::Secondary, head), "{what}");
                    refused += 1;
                }
                Err(_) => {
                    left_open += 1;
                    written += u32::from(unpromoted && again.positions().head > head);
                }
            }
        }
    }
    assert!(refused > 0 && left_open > 0 && written > 0, "{refused} {left_open} {written}");
}
