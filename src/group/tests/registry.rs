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

/// A group `g` with these bytes at the start of its volume `v`, closed; its id.
fn a_closed_group(bench: &Bench, byte: u8) -> GroupId {
    let registry = registry(bench);
    let group = registry.create(name("g"), Some(SEGMENT)).unwrap();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    write(&group, volume.number, 0, &[byte; 4096]);
    registry.close();
    group.id()
}

fn first_bytes(registry: &Registry) -> Vec<u8> {
    let group = registry.by_name("g").unwrap();
    read(&*group, group.volumes()[0].number, 0, 4096)
}

#[test]
fn a_group_that_is_not_open_keeps_its_name() {
    let bench = Bench::new("a", 4);
    let id = a_closed_group(&bench, 1);
    // A start whose first write fails.
    let meta = groups_dir().join(id.to_string()).join("meta");
    bench.disk.inject(Fault::Error { operation: bench.disk.operations() + 1 });
    let registry = registry(&bench);
    bench.disk.clear_faults();
    assert!(registry.groups().is_empty(), "it could be opened");
    let [not_opened] = &registry.unopened()[..] else { panic!() };
    assert_eq!((not_opened.id.clone(), not_opened.name.clone()), (id.to_string(), Some(name("g"))));
    // Neither an operator nor a peer makes another of that name.
    let made = |registry: &Registry| registry.create(name("g"), Some(SEGMENT)).map(|_| ());
    let refused = made(&registry).unwrap_err().to_string();
    assert!(refused.contains("could not be opened") && refused.contains("remove"), "{refused}");
    let other = GroupId([9; 16]);
    assert!(registry.create_copy(other, name("g"), SEGMENT).is_err());
    assert!(!bench.disk.exists(&groups_dir().join(other.to_string())).unwrap());
    registry.create(name("h"), Some(SEGMENT)).unwrap();
    registry.close();
    // Where the name could not be read either, it is asked for again.
    bench.disk.inject(Fault::Unreadable { path: meta, offset: 0, length: 8192 });
    let registry = self::registry(&bench);
    assert_eq!(registry.unopened()[0].name, None);
    bench.disk.clear_faults();
    made(&registry).unwrap_err();
    registry.close();
    let registry = self::registry(&bench);
    assert_eq!(first_bytes(&registry), [1; 4096]);
    registry.close();
}

#[test]
fn of_two_groups_of_one_name_the_one_that_is_open_stays() {
    let bench = Bench::new("a", 5);
    let old = a_closed_group(&bench, 1);
    let meta = groups_dir().join(old.to_string()).join("meta");
    // Its name cannot be read while another of that name is made.
    bench.disk.inject(Fault::Unreadable { path: meta, offset: 0, length: 8192 });
    let registry = registry(&bench);
    assert_eq!(registry.unopened()[0].name, None);
    let new = registry.create(name("g"), Some(SEGMENT)).unwrap();
    let volume = new.create_volume(name("v"), 1 << 20).unwrap();
    write(&new, volume.number, 0, &[2; 4096]);
    registry.close();
    bench.disk.clear_faults();
    // The next start has both, and says so of the one that it leaves as it is.
    let registry = self::registry(&bench);
    let [open] = &registry.groups()[..] else { panic!("both are open") };
    let [not_opened] = &registry.unopened()[..] else { panic!() };
    assert_ne!(open.id().to_string(), not_opened.id);
    assert!(not_opened.reason.contains("group delete g"), "{}", not_opened.reason);
    let (kept, other) = if open.id() == old { (1, 2) } else { (2, 1) };
    registry.open_rest();
    assert_eq!(first_bytes(&registry), [kept; 4096], "hosts are on the one that was open");
    // What was said is what helps.
    registry.delete(&name("g")).unwrap();
    registry.open_rest();
    assert!(registry.unopened().is_empty());
    assert_eq!(first_bytes(&registry), [other; 4096]);
    registry.close();
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
