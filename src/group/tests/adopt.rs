//! A new volume that begins with the contents of a file.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::io::{DiskFile, OpenMode};

const BLOCK: usize = 4096;
const FILE: &str = "/data/disk.img";
/// Two parts and a bit; the file ends inside of a block.
const BYTES: usize = (512 << 10) + 2 * BLOCK + 77;
const SIZE: u64 = 1 << 20;

/// A file on the bench's disk with blocks of bytes, blocks of zeros and a hole, and what it holds.
fn file(bench: &Bench) -> (Arc<dyn DiskFile>, Vec<u8>) {
    let file = bench.disk.open(Path::new(FILE), OpenMode::Create).unwrap();
    let mut bytes = vec![0; BYTES];
    for (index, block) in bytes.chunks_mut(BLOCK).enumerate() {
        if index < 40 && index % 4 != 3 || index > 110 {
            block.fill(index as u8 + 1);
        }
    }
    file.set_len(BYTES as u64).unwrap();
    for at in [0, 100 * BLOCK] {
        let end = BYTES.min(at + 64 * BLOCK);
        file.write_at(&[IoSlice::new(&bytes[at..end])], at as u64).unwrap();
    }
    (file, bytes)
}

fn adopt(
    group: &Arc<Group>,
    file: &dyn DiskFile,
    check: &dyn Fn() -> Result<(), String>,
) -> Result<Volume, GroupError> {
    let contents = Contents { name: FILE, file, bytes: BYTES as u64, done: &|_| {}, check };
    group.adopt_volume(&name("v"), SIZE, &contents)
}

fn holds(group: &Group, bytes: &[u8]) -> bool {
    let volume = group.control().volumes[0].number;
    let found = read(group, volume, 0, SIZE as usize);
    let (first, behind) = found.split_at(bytes.len());
    first == bytes && behind.iter().all(|byte| *byte == 0)
}

#[test]
fn a_volume_that_begins_with_a_file_holds_its_bytes_and_is_served_once_all_are_there() {
    let bench = Bench::new("a", 1);
    let group = bench.create();
    let (file, bytes) = file(&bench);
    let (before, done) = (group.positions().head, Cell::new(0));
    let contents = Contents {
        name: FILE,
        file: &*file,
        bytes: BYTES as u64,
        done: &|bytes| done.set(done.get() + bytes),
        check: &|| {
            let volume = group.volume(&name("v")).expect("it is there");
            assert!(volume.restoring && group.client(volume.number).is_err());
            Ok(())
        },
    };
    let volume = group.adopt_volume(&name("v"), SIZE, &contents).unwrap();
    assert_eq!(done.get(), BYTES as u64);
    assert_eq!(group.volume(&name("v")), Some(volume.clone()));
    assert!(!volume.restoring && holds(&group, &bytes));
    drop(group.client(volume.number).unwrap());
    let (log, data) = (group.positions().head.0 - before.0, bytes.iter().filter(|b| **b != 0));
    assert!(log < data.count() as u64 + 8 * BLOCK as u64, "zeros are not written: {log}");
    // The name is taken now, and what is there stays.
    assert!(matches!(adopt(&group, &*file, &|| Ok(())), Err(GroupError::Exists { .. })));
    assert!(holds(&group, &bytes));
}

/// A file whose end cannot be read.
struct Unreadable(Arc<dyn DiskFile>);

impl DiskFile for Unreadable {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, _bytes: u64) -> io::Result<()> {
        unreachable!("it is read")
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if offset >= 512 << 10 {
            return Err(io::Error::other("a bad sector"));
        }
        self.0.read_at(buffer, offset)
    }
    fn write_at(&self, _slices: &[IoSlice<'_>], _offset: u64) -> io::Result<()> {
        unreachable!("it is read")
    }
    fn sync(&self) -> io::Result<()> {
        unreachable!("it is read")
    }
    fn start_writeback(&self, _offset: u64, _bytes: u64) {}
    fn punch_hole(&self, _offset: u64, _bytes: u64) -> io::Result<()> {
        unreachable!("it is read")
    }
    fn drop_cache(&self, _offset: u64, _bytes: u64) {}
}

#[test]
fn a_volume_whose_contents_could_not_all_be_read_is_removed_again() {
    let bench = Bench::new("a", 2);
    let group = bench.create();
    let (file, bytes) = file(&bench);
    let changed = adopt(&group, &*file, &|| Err("it changed".to_owned())).unwrap_err();
    assert!(changed.to_string().contains("it changed"), "{changed}");
    assert_eq!(group.control().volumes, []);
    let failed = adopt(&group, &Unreadable(file.clone()), &|| Ok(())).unwrap_err().to_string();
    assert!(failed.contains("read of /data/disk.img at 524288: a bad sector"), "{failed}");
    assert_eq!(group.control().volumes, []);
    // Of a node that reigns no more it cannot be removed, and it says so.
    let demote = || group.demote().map(drop).map_err(|error| error.to_string());
    let left = adopt(&group, &*file, &demote).unwrap_err().to_string();
    assert!(left.contains("`tidelog volume delete g/v`"), "{left}");
    assert!(group.volume(&name("v")).unwrap().restoring);
    group.promote("promote").unwrap();
    group.remove_volume(&name("v")).unwrap();
    adopt(&group, &*file, &|| Ok(())).unwrap();
    assert!(holds(&group, &bytes));
}

#[test]
fn a_volume_that_is_deleted_while_its_base_is_read_takes_no_other_of_its_name_along() {
    let bench = Bench::new("a", 4);
    let group = bench.create();
    let (file, _) = file(&bench);
    let delete = || {
        let number = group.volume(&name("v")).expect("it is there").number;
        assert!(group.end_adoption(number) && !group.end_adoption(VolumeNumber(99)));
        group.remove_volume(&name("v")).unwrap();
        group.create_volume(name("v"), SIZE).unwrap();
        Ok(())
    };
    let ended = adopt(&group, &*file, &delete).unwrap_err().to_string();
    assert!(ended.contains("was cut off"), "{ended}");
    let volume = group.volume(&name("v")).expect("the other one");
    assert!(!volume.restoring && volume.number == VolumeNumber(2), "{volume:?}");
    drop(group.client(volume.number).unwrap());
}

#[test]
fn the_reading_of_zeros_ends_too_where_the_volume_is_to_go() {
    let bench = Bench::new("a", 6);
    let group = bench.create();
    let file = bench.disk.open(Path::new(FILE), OpenMode::Create).unwrap();
    file.write_at(&[IoSlice::new(&[0; BYTES])], 0).unwrap();
    let parts = Cell::new(0);
    let done = |_| {
        parts.set(parts.get() + 1);
        group.end_adoption(group.volume(&name("v")).expect("it is there").number);
    };
    let check: &dyn Fn() -> Result<(), String> = &|| unreachable!("it ended before");
    let contents = Contents { name: FILE, file: &*file, bytes: BYTES as u64, done: &done, check };
    let ended = group.adopt_volume(&name("v"), SIZE, &contents).unwrap_err().to_string();
    assert!(ended.contains("was cut off") && parts.get() == 1, "{ended}");
    assert_eq!(group.control().volumes, []);
}

#[test]
fn a_base_that_is_read_over_another_reign_is_never_taken_for_whole() {
    let bench = Bench::new("a", 5);
    let group = bench.create();
    let (file, _) = file(&bench);
    let next = Cell::new(None);
    let another = || {
        group.demote().map_err(|error| error.to_string())?;
        let again = group.clone();
        let (begins, begun) = std::sync::mpsc::channel();
        next.set(Some(std::thread::spawn(move || {
            begins.send(()).unwrap();
            again.promote("promote").unwrap();
        })));
        begun.recv().unwrap();
        Ok(())
    };
    adopt(&group, &*file, &another).unwrap_err();
    next.take().unwrap().join().unwrap();
    assert!(group.role() == Role::Primary);
    assert!(group.volume(&name("v")).is_none_or(|volume| volume.restoring), "it is no whole one");
}

#[test]
fn after_a_crash_while_contents_come_the_volume_is_whole_or_says_that_it_is_not() {
    let bench = Bench::new("a", 3);
    let group = bench.create();
    let (file, bytes) = file(&bench);
    group.sync_now().unwrap();
    bench.disk.record();
    let begun = bench.disk.operations();
    adopt(&group, &*file, &|| Ok(())).unwrap();
    let answered = (bench.disk.operations() - begun) as usize;
    group.sync_now().unwrap();
    let stopped = bench.disk.take_recorded();
    assert!(answered > 5 && stopped.len() > answered, "{answered} of {}", stopped.len());
    let mut shown = [0; 3];
    for (boundary, disk) in stopped.into_iter().enumerate() {
        let disk = Arc::new(disk.crash(boundary as u64));
        let (group, _) = Bench { disk, ..bench.after_crash(0) }.open();
        let what = format!("boundary {boundary}");
        match group.volume(&name("v")) {
            Some(volume) if !volume.restoring => {
                assert!(holds(&group, &bytes), "{what}: served, and not whole");
                shown[2] += 1;
            }
            other => {
                assert!(boundary < answered, "{what}: it was answered");
                shown[usize::from(other.is_some())] += 1;
            }
        }
    }
    assert!(shown.iter().all(|count| *count > 0), "{shown:?}");
}
