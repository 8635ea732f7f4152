//! Whose turn it is: what a reign writes of its own, and what must not wait for what.

use super::*;
use crate::io::Fault;

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
