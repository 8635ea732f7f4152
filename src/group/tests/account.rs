//! What was done behind a position, and who is connected.

use super::*;
use crate::log::control::{BookmarkRecord, Consistency};

#[test]
fn an_account_has_what_is_behind_its_position_alone() {
    let bench = Bench::new("a", 1);
    let group = bench.create();
    let one = group.create_volume(name("one"), 1 << 20).unwrap().number;
    let two = group.create_volume(name("two"), 1 << 20).unwrap().number;
    write(&group, one, 0, &[1; 4096]);
    group.create_bookmark(name("before"), Consistency::Crash).unwrap();
    let at = group.positions().head;
    let nothing = group.account(at).unwrap();
    assert_eq!((nothing.from, nothing.bytes, nothing.first, nothing.last), (at, 0, None, None));
    bench.pass(60);
    write(&group, two, 0, &[2; 8192]);
    write(&group, two, 0, &[3; 8192]);
    bench.pass(60);
    super::one(&group, two, Op::Trim { offset: 0, length: 4096 }).unwrap();
    group.create_bookmark(name("kept"), Consistency::Crash).unwrap();
    let gone = group.create_bookmark(name("gone"), Consistency::Crash).unwrap();
    group.append_control(Control::Bookmark(BookmarkRecord { removed: true, ..gone })).unwrap();
    group.sync_now().unwrap();
    let account = group.account(at).unwrap();
    let head = group.positions().head;
    assert_eq!((account.from, account.to, account.bytes), (at, head, head.bytes_since(at)));
    let volume =
        VolumeAccount { name: "two".to_owned(), written_bytes: 16_384, cleared_bytes: 4096 };
    assert_eq!(account.volumes, [volume]);
    assert_eq!(account.bookmarks, [name("kept")]);
    let (first, last) = account.first.zip(account.last).unwrap();
    assert_eq!(last.since(first), Duration::from_secs(60));
}

#[test]
fn an_account_says_where_the_base_begins_that_it_cannot_tell_apart() {
    let bench = Bench::new("a", 1);
    let group = bench.create();
    set_policy(&group, 0, 1 << 20);
    let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
    let at = group.positions().head;
    for _ in 0..20 {
        write(&group, volume, 0, &[1; 16_384]);
    }
    group.sync_now().unwrap();
    group.fold_now().unwrap();
    let horizon = group.positions().horizon;
    assert!(horizon > at, "{horizon}");
    assert_eq!(group.account(at).unwrap().from, horizon);
}

#[test]
fn a_volume_that_was_removed_since_is_named_as_far_as_it_is_known() {
    let bench = Bench::new("a", 1);
    let group = bench.create();
    let old = group.create_volume(name("old"), 1 << 20).unwrap().number;
    let at = group.positions().head;
    let new = group.create_volume(name("new"), 1 << 20).unwrap().number;
    for volume in [old, new] {
        write(&group, volume, 0, &[1; 4096]);
    }
    group.remove_volume(&name("old")).unwrap();
    group.remove_volume(&name("new")).unwrap();
    let account = group.account(at).unwrap();
    let names: Vec<&str> = account.volumes.iter().map(|volume| &volume.name[..]).collect();
    assert_eq!(names, ["new", "old"], "its removal is a record that names it");
}

#[test]
fn who_reads_an_image_is_shown_and_in_nobodys_way() {
    let bench = Bench::new("a", 1);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
    let reader = group.image_client(volume, &name("i"), "10.0.0.2:1");
    assert_eq!(group.clients(), []);
    let writer = group.client_until(volume, "10.0.0.1:2", Box::new(|| {})).unwrap();
    assert_eq!(group.clients(), [(volume, 1)]);
    let host = |address: &str, image: Option<Name>| Host {
        address: address.to_owned(),
        since: bench.clock.wall(),
        read_only: image.is_some(),
        image,
    };
    let expected = [host("10.0.0.2:1", Some(name("i"))), host("10.0.0.1:2", None)];
    assert_eq!(group.hosts(), expected.map(|host| (volume, host)));
    drop(writer);
    // Nobody waits for who reads an image.
    group.disconnect_clients();
    drop(reader);
    assert_eq!(group.hosts(), []);
}

#[test]
fn an_account_of_more_bytes_than_can_be_counted_says_the_highest_number() {
    let bench = Bench::new("a", 1);
    let group = bench.create();
    let at = group.positions().head;
    let volume = group.create_volume(name("v"), 1 << 60).unwrap().number;
    for _ in 0..16 {
        super::one(&group, volume, Op::Trim { offset: 0, length: 1 << 60 }).unwrap();
    }
    group.sync_now().unwrap();
    let written = group.account(at).unwrap().volumes;
    let volume = VolumeAccount { name: "v".to_owned(), written_bytes: 0, cleared_bytes: u64::MAX };
    assert_eq!(written, [volume]);
}
