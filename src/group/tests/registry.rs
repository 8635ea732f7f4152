//! Groups that are made and deleted, and what a crash leaves of that.

use std::path::Path;

use super::*;
use crate::io::Fault;

fn groups_dir() -> PathBuf {
    PathBuf::from("/data/groups")
}

fn registry(bench: &Bench) -> Arc<Registry> {
    Registry::open(bench.context(), &groups_dir()).unwrap()
}

/// A start finds a whole group or none, nothing is left of what is none, and the name can be used.
/// Whether the group was there.
fn finds_all_or_nothing(bench: &Bench, what: &str) -> bool {
    let registry = registry(bench);
    let found = registry.groups();
    let names = bench.disk.list(&groups_dir()).unwrap();
    assert_eq!(names.len(), found.len(), "{what}: {names:?} are left");
    assert!(!bench.event_codes().contains(&"group-not-opened".to_owned()), "{what}");
    let group = match found.first() {
        Some(group) => group.clone(),
        None => registry.create(name("g"), Some(SEGMENT)).unwrap(),
    };
    assert!(!group.control().epochs.is_empty(), "{what}");
    group.create_volume(name("new"), 1 << 20).unwrap_or_else(|error| panic!("{what}: {error}"));
    registry.close();
    !found.is_empty()
}

#[test]
fn a_crash_while_a_group_is_made_leaves_all_of_it_or_nothing() {
    let bench = Bench::new("a", 1);
    bench.disk.remove_dir(&dir()).unwrap();
    bench.disk.sync_dir(&groups_dir()).unwrap();
    bench.disk.record();
    let new = NewGroup { id: GROUP, name: name("g"), segment_bytes: SEGMENT };
    let path = groups_dir().join(GROUP.to_string());
    let group = Group::create(bench.context(), &path, new).unwrap();
    group.close().unwrap();
    drop(group);
    let stopped = bench.disk.take_recorded();
    assert!(stopped.len() > 15, "{} boundaries", stopped.len());
    let (mut there, mut gone) = (0, 0);
    for (boundary, disk) in stopped.into_iter().enumerate() {
        for seed in 0..5 {
            let disk = if seed == 0 { disk.snapshot() } else { disk.crash(seed + boundary as u64) };
            let after = Bench { disk: Arc::new(disk), ..bench.after_crash(0) };
            let found = finds_all_or_nothing(&after, &format!("boundary {boundary}, seed {seed}"));
            (there, gone) = (there + u64::from(found), gone + u64::from(!found));
        }
    }
    assert!(there > 0 && gone > 20, "{there} there, {gone} gone");
}

#[test]
fn a_crash_while_a_group_is_deleted_leaves_all_of_it_or_nothing() {
    let bench = Bench::new("a", 2);
    bench.disk.remove_dir(&dir()).unwrap();
    bench.disk.sync_dir(&groups_dir()).unwrap();
    let before = registry(&bench);
    let group = before.create(name("g"), Some(SEGMENT)).unwrap();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    write(&group, volume.number, 0, &[7; 4096]);
    group.close().unwrap();
    bench.disk.record();
    before.delete(&name("g")).unwrap();
    let stopped = bench.disk.take_recorded();
    assert!(bench.disk.list(&groups_dir()).unwrap().is_empty());
    let (mut there, mut gone) = (0, 0);
    for (boundary, disk) in stopped.into_iter().enumerate() {
        for seed in 0..5 {
            let disk = if seed == 0 { disk.snapshot() } else { disk.crash(seed + boundary as u64) };
            let after = Bench { disk: Arc::new(disk), ..bench.after_crash(0) };
            let found = finds_all_or_nothing(&after, &format!("boundary {boundary}, seed {seed}"));
            (there, gone) = (there + u64::from(found), gone + u64::from(!found));
        }
    }
    assert!(there > 0 && gone > 5, "{there} there, {gone} gone");
}

#[test]
fn a_group_that_could_not_be_made_leaves_nothing() {
    for operation in 0.. {
        let bench = Bench::new("a", 3);
        bench.disk.remove_dir(&dir()).unwrap();
        let registry = registry(&bench);
        bench.disk.inject(Fault::Error { operation: bench.disk.operations() + operation });
        let made = registry.create(name("g"), Some(SEGMENT));
        if made.is_ok() {
            assert!(operation > 15, "{operation} operations");
            registry.close();
            break;
        }
        let left = bench.disk.list(Path::new("/data/groups")).unwrap();
        assert!(left.is_empty(), "operation {operation}: {left:?}");
        registry.create(name("g"), Some(SEGMENT)).unwrap();
        registry.close();
    }
}
