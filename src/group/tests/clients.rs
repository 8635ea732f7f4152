//! A volume that a restore has for itself, and what tells that it was restored.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::log::control::EpochRecord;

#[test]
fn a_volume_that_a_restore_writes_into_is_opened_by_nobody_else() {
    let bench = Bench::new("a", 1);
    let group = bench.create();
    let start = group.positions().head;
    let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
    let other = group.create_volume(name("w"), 1 << 20).unwrap().number;
    let host = group.client_until(volume, "10.0.0.1:2", Box::new(|| {})).unwrap();
    let in_the_way = group.claim_for_restore(volume).err().unwrap().to_string();
    assert!(in_the_way.contains("volume v: 1 clients are connected"), "{in_the_way}");
    drop(host);
    let _elsewhere = group.client(other).unwrap();
    let _reader = group.image_client(volume, &name("i"), "10.0.0.2:1");
    let claim = group.claim_for_restore(volume).unwrap();
    let refused = [
        group.check_unclaimed(volume).err(),
        group.client(volume).err(),
        group.client_until(volume, "10.0.0.1:2", Box::new(|| {})).err(),
        group.claim_for_restore(volume).err(),
    ];
    for refused in refused {
        let text = refused.expect("it is claimed").to_string();
        assert!(text.contains("volume v: a restore writes into it"), "{text}");
        assert!(text.contains("`tidelog status g`"), "{text}");
    }
    // The rest of the group is as before, and an image of it is no matter of the restore.
    group.check_unclaimed(other).unwrap();
    drop(group.client(other).unwrap());
    drop(group.image_client(volume, &name("i"), "10.0.0.2:1"));
    // Who asks for clients before something changes under them meets the restore as one.
    assert_eq!(group.clients(), [(volume, 1), (other, 1)]);
    assert!(group.hosts().iter().any(|(_, host)| host.address == "a restore on this node"));
    let refused = group.rewind(&Point::Lsn(start), false).unwrap_err().to_string();
    assert!(refused.contains("2 clients are connected"), "{refused}");
    drop(claim);
    group.check_unclaimed(volume).unwrap();
    drop(group.client(volume).unwrap());
}

#[test]
fn a_host_of_an_earlier_reign_is_cut_off_before_a_new_one_begins() {
    let bench = Bench::new("a", 5);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
    for (reason, is_cut_off) in [(EpochRecord::SWITCHOVER_REFUSED, false), ("promote", true)] {
        let (told, client) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None)));
        let (tell, hold) = (told.clone(), client.clone());
        let hang_up = Box::new(move || {
            tell.store(true, Ordering::Relaxed);
            // Its session ends, on another thread.
            let guard: Option<ClientGuard> = hold.lock().unwrap().take();
            std::thread::spawn(move || drop(guard));
        });
        *client.lock().unwrap() = Some(group.client_until(volume, "10.0.0.1:2", hang_up).unwrap());
        group.demote().unwrap();
        group.promote(reason).unwrap();
        assert_eq!(told.load(Ordering::Relaxed), is_cut_off, "{reason}");
        assert_eq!(group.clients().is_empty(), is_cut_off, "{reason}");
        client.lock().unwrap().take();
    }
}

#[test]
fn a_volume_says_that_a_restore_began_before_anything_of_it_is_there_and_ever_after() {
    let bench = Bench::new("a", 2);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
    write(&group, volume, 0, &[1; 4096]);
    let begun = |group: &Arc<Group>| {
        let before = group.positions().head;
        let claim = group.claim_for_restore(volume).unwrap();
        group.begin_restore(&claim).unwrap();
        before
    };
    let restored = |group: &Arc<Group>| group.volume(&name("v")).unwrap().restore_lsn;
    assert_eq!(restored(&group), None);
    let first = begun(&group);
    assert_eq!(restored(&group), Some(first));
    let restoring = |group: &Arc<Group>| group.volume(&name("v")).unwrap().restoring;
    assert!(restoring(&group));
    // What the restore writes, and a crash in the middle of it: the mark is there in any case.
    write(&group, volume, 0, &[2; 4096]);
    drop(group);
    let bench = bench.after_crash(3);
    let (group, _) = bench.open();
    assert!(restored(&group) == Some(first) && restoring(&group));
    let second = begun(&group);
    assert!(second > first);
    group.end_restore(&group.claim_for_restore(volume).unwrap()).unwrap();
    group.resize_volume(&name("v"), 2 << 20).unwrap();
    let mut bytes = vec![0; group.positions().head.0 as usize];
    group.read_log(Lsn::ZERO, &mut bytes).unwrap();
    let copy = Bench::new("b", 3).create_copy();
    copy.append_received(Lsn::ZERO, &bytes).unwrap();
    bench.pass(60);
    set_policy(&group, 1, SEGMENT);
    group.sync_now().unwrap();
    let horizon = group.fold_now().unwrap();
    assert!(horizon > second, "{horizon}");
    for group in [&group, &copy] {
        assert!(restored(group) == Some(second) && !restoring(group));
    }
    group.close().unwrap();
    drop(group);
    assert_eq!(restored(&bench.open().0), Some(second));
}
