//! Tests of the disk in memory.

use super::*;

fn new_file(disk: &MemoryDisk, name: &str) -> Arc<dyn DiskFile> {
    disk.open(Path::new(name), OpenMode::CreateNew).unwrap()
}

fn bytes_of(disk: &MemoryDisk, name: &str) -> Option<Vec<u8>> {
    let file = disk.open(Path::new(name), OpenMode::Read).ok()?;
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_at(&mut bytes, 0).unwrap();
    Some(bytes)
}

#[test]
fn a_crash_tears_between_sectors_and_never_inside_one() {
    let disk = MemoryDisk::new();
    disk.create_dir(Path::new("/d")).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    let file = new_file(&disk, "/d/f");
    disk.sync_dir(Path::new("/d")).unwrap();
    file.write_at(&[IoSlice::new(&[1; 8192])], 0).unwrap();
    file.sync().unwrap();
    file.write_at(&[IoSlice::new(&[2; 8192])], 0).unwrap();
    file.write_at(&[IoSlice::new(&[3; 4096])], 2048).unwrap();
    let (mut torn, mut nothing, mut all) = (0, 0, 0);
    for seed in 0..200 {
        let bytes = bytes_of(&disk.crash(seed), "/d/f").unwrap();
        assert_eq!(bytes, bytes_of(&disk.crash(seed), "/d/f").unwrap(), "the seed decides");
        let sectors: Vec<u8> = bytes.chunks(512).map(|sector| sector[0]).collect();
        for (sector, first) in bytes.chunks(512).zip(&sectors) {
            assert!(sector.iter().all(|byte| byte == first), "torn inside a sector");
        }
        let after = [vec![2; 4], vec![3; 8], vec![2; 4]].concat();
        if sectors == vec![1; 16] {
            nothing += 1;
        } else if sectors == after {
            all += 1;
        } else {
            torn += 1;
            assert!(sectors.iter().all(|byte| [1, 2, 3].contains(byte)));
        }
    }
    assert!(torn > 50 && nothing > 5 && all > 5, "{torn} {nothing} {all}");
}

/// Of one file, and of two.
#[test]
fn a_later_write_may_survive_without_the_earlier_one() {
    for (later, offset) in [("/f", 4096), ("/g", 0)] {
        let disk = MemoryDisk::new();
        let first = disk.open(Path::new("/f"), OpenMode::Create).unwrap();
        let second = disk.open(Path::new(later), OpenMode::Create).unwrap();
        for file in [&first, &second] {
            file.write_at(&[IoSlice::new(&[1; 8192])], 0).unwrap();
            file.sync().unwrap();
        }
        disk.sync_dir(Path::new("/")).unwrap();
        first.write_at(&[IoSlice::new(&[2; 512])], 0).unwrap();
        second.write_at(&[IoSlice::new(&[2; 512])], offset).unwrap();
        let survives = |disk: &MemoryDisk, name: &str, offset: u64| {
            bytes_of(disk, name).unwrap()[offset as usize] == 2
        };
        let outcomes: BTreeSet<(bool, bool)> = (0..200)
            .map(|seed| disk.crash(seed))
            .map(|after| (survives(&after, "/f", 0), survives(&after, later, offset)))
            .collect();
        assert_eq!(outcomes.len(), 4, "{later}: {outcomes:?}");
    }
}

#[test]
fn what_was_synced_survives_every_crash() {
    let disk = MemoryDisk::new();
    let file = new_file(&disk, "/f");
    disk.sync_dir(Path::new("/")).unwrap();
    file.write_at(&[IoSlice::new(&[9; 1000])], 100).unwrap();
    file.sync().unwrap();
    file.write_at(&[IoSlice::new(&[8; 512])], 4096).unwrap();
    for seed in 0..100 {
        let bytes = bytes_of(&disk.crash(seed), "/f").unwrap();
        assert!(bytes[100..1100].iter().all(|byte| *byte == 9));
        assert!(bytes.len() == 1100 || bytes.len() == 4608, "{}", bytes.len());
    }
}

#[test]
fn a_name_that_was_not_synced_may_be_lost_or_come_back() {
    let disk = MemoryDisk::new();
    let file = new_file(&disk, "/old");
    file.write_at(&[IoSlice::new(b"old")], 0).unwrap();
    file.sync().unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    let file = new_file(&disk, "/new");
    file.write_at(&[IoSlice::new(b"new")], 0).unwrap();
    file.sync().unwrap();
    disk.rename(Path::new("/new"), Path::new("/old")).unwrap();
    let mut seen = BTreeSet::new();
    for seed in 0..200 {
        let after = disk.crash(seed);
        let old = bytes_of(&after, "/old").expect("one of them has the name");
        seen.insert((old, after.exists(Path::new("/new")).unwrap()));
    }
    let seen: Vec<(&[u8], bool)> = seen.iter().map(|(b, e)| (&b[..], *e)).collect();
    assert!(seen.contains(&(b"old", false)), "the new file is lost: {seen:?}");
    assert!(seen.contains(&(b"old", true)), "the rename is lost: {seen:?}");
    assert!(seen.contains(&(b"new", false)), "all is kept: {seen:?}");
    disk.sync_dir(Path::new("/")).unwrap();
    for seed in 0..100 {
        assert_eq!(bytes_of(&disk.crash(seed), "/old").unwrap(), b"new");
    }
}

/// A file `/f` of so many durable ones, of which the next sync fails.
fn failing_next_sync(bytes: usize) -> (MemoryDisk, Arc<dyn DiskFile>) {
    let disk = MemoryDisk::new();
    let file = new_file(&disk, "/f");
    file.write_at(&[IoSlice::new(&vec![1; bytes])], 0).unwrap();
    file.sync().unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    disk.inject(Fault::FailedSync { operation: 0 });
    (disk, file)
}

#[test]
fn after_a_failed_sync_the_cache_lies_and_the_next_sync_does_not_help() {
    let (disk, file) = failing_next_sync(4096);
    file.write_at(&[IoSlice::new(&[2; 4096])], 0).unwrap();
    assert!(file.sync().is_err());
    assert_eq!(bytes_of(&disk, "/f").unwrap(), vec![2; 4096], "the cache shows it");
    file.sync().unwrap();
    let lost = (0..50).any(|seed| bytes_of(&disk.crash(seed), "/f").unwrap() != [2; 4096]);
    assert!(lost, "the disk has all of it in spite of the failure");
}

#[test]
fn a_hole_that_is_made_again_behind_a_failed_sync_is_on_the_disk_with_the_next() {
    for seed in 0..50 {
        let (disk, file) = failing_next_sync(8192);
        file.punch_hole(2048, 6144).unwrap();
        assert!(file.sync().is_err());
        file.punch_hole(2048, 6144).unwrap();
        file.sync().unwrap();
        let held = bytes_of(&disk.crash(seed), "/f").unwrap();
        assert_eq!(held[2048..], [0; 6144], "seed {seed}");
    }
}

#[test]
fn power_off_stops_a_program_at_each_operation() {
    let program = |disk: &MemoryDisk| -> io::Result<()> {
        let file = disk.open(Path::new("/f"), OpenMode::Create)?;
        file.write_at(&[IoSlice::new(&[1; 512])], 0)?;
        file.sync()?;
        disk.sync_dir(Path::new("/"))
    };
    let disk = MemoryDisk::new();
    program(&disk).unwrap();
    assert_eq!(disk.operations(), 4);
    for operation in 0..4 {
        let disk = MemoryDisk::new();
        disk.inject(Fault::PowerOff { operation });
        assert!(program(&disk).is_err());
        assert_eq!(disk.operations(), operation + 1);
    }
}

#[test]
fn a_full_disk_says_so_and_overwriting_still_works() {
    let disk = MemoryDisk::new();
    let file = new_file(&disk, "/f");
    disk.inject(Fault::NoSpace { bytes: 8192 });
    file.write_at(&[IoSlice::new(&[1; 8192])], 0).unwrap();
    let error = file.write_at(&[IoSlice::new(&[2; 4096])], 8192).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    file.write_at(&[IoSlice::new(&[3; 4096])], 4096).unwrap();
    assert_eq!(disk.space(Path::new("/")).unwrap().free_bytes, 0);
}

#[test]
fn a_cut_file_shows_zeros_where_it_grows_again() {
    let disk = MemoryDisk::new();
    let file = new_file(&disk, "/f");
    disk.sync_dir(Path::new("/")).unwrap();
    file.write_at(&[IoSlice::new(&[5; 10_000])], 0).unwrap();
    file.sync().unwrap();
    file.set_len(1000).unwrap();
    file.set_len(10_000).unwrap();
    let expected = [vec![5; 1000], vec![0; 9000]].concat();
    assert_eq!(bytes_of(&disk, "/f").unwrap(), expected);
    file.sync().unwrap();
    assert_eq!(bytes_of(&disk.crash(1), "/f").unwrap(), expected);
}

#[test]
fn a_directory_moves_with_all_that_is_below_or_not_at_all() {
    let disk = MemoryDisk::new();
    let (old, new) = (Path::new("/old"), Path::new("/new"));
    disk.create_dir(old).unwrap();
    for name in ["a", "b", "c"] {
        disk.open(&old.join(name), OpenMode::Create).unwrap();
    }
    disk.sync_dir(old).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    disk.rename(old, new).unwrap();
    let mut seen = [0; 2];
    for seed in 0..40 {
        let after = disk.crash(seed);
        let moved = after.exists(new).unwrap();
        seen[usize::from(moved)] += 1;
        assert_ne!(moved, after.exists(old).unwrap(), "seed {seed}");
        let names = after.list(if moved { new } else { old }).unwrap();
        assert_eq!(names, ["a", "b", "c"], "seed {seed}");
    }
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
    disk.sync_dir(Path::new("/")).unwrap();
    assert_eq!(disk.crash(1).list(new).unwrap(), ["a", "b", "c"]);
}

#[test]
fn a_directory_that_is_gone_for_good_gives_back_its_space() {
    let disk = MemoryDisk::new();
    let used = || (1 << 40) - disk.space(Path::new("/")).unwrap().free_bytes;
    disk.create_dir(Path::new("/d/e")).unwrap();
    for synced in [false, true] {
        let name = if synced { "/d/e/synced" } else { "/d/e/not" };
        new_file(&disk, name).write_at(&[IoSlice::new(&[1; 4096])], 0).unwrap();
        if synced {
            disk.sync_dir(Path::new("/d/e")).unwrap();
        }
    }
    new_file(&disk, "/d/e/late").write_at(&[IoSlice::new(&[1; 4096])], 0).unwrap();
    disk.remove_dir(Path::new("/d/e")).unwrap();
    assert_eq!(used(), 3 * 4096, "a crash may bring the directory back");
    disk.sync_dir(Path::new("/d")).unwrap();
    assert_eq!(used(), 0);
    // One that was made again under its name keeps what it holds now.
    disk.create_dir(Path::new("/d/e")).unwrap();
    disk.sync_dir(Path::new("/d")).unwrap();
    disk.remove_dir(Path::new("/d/e")).unwrap();
    disk.create_dir(Path::new("/d/e")).unwrap();
    new_file(&disk, "/d/e/new").write_at(&[IoSlice::new(&[1; 4096])], 0).unwrap();
    disk.sync_dir(Path::new("/d/e")).unwrap();
    disk.sync_dir(Path::new("/d")).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    for seed in 0..50 {
        assert!(disk.crash(seed).exists(Path::new("/d/e/new")).unwrap());
    }
}
