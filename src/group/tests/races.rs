//! What another thread does between two steps of this one, without a second thread: a disk lets it
//! happen right before or behind a batch of reads.

use std::io;
use std::path::Path;
use std::sync::Mutex;

use super::*;
use crate::io::{BatchRead, DiskFile, OpenMode, Space};
use crate::log::segment::segment_name;

type Hook = Box<dyn FnOnce() + Send>;

struct HookDisk {
    disk: Arc<MemoryDisk>,
    before_reads: Mutex<Option<Hook>>,
    behind_reads: Mutex<Option<Hook>>,
}

impl HookDisk {
    fn new(disk: Arc<MemoryDisk>) -> Arc<HookDisk> {
        let (before_reads, behind_reads) = Default::default();
        Arc::new(HookDisk { disk, before_reads, behind_reads })
    }

    /// Runs `hook` before the next batch of reads, once.
    fn before_next_reads(&self, hook: impl FnOnce() + Send + 'static) {
        *self.before_reads.lock().unwrap() = Some(Box::new(hook));
    }

    /// Runs `hook` behind the next batch of reads, once.
    fn behind_next_reads(&self, hook: impl FnOnce() + Send + 'static) {
        *self.behind_reads.lock().unwrap() = Some(Box::new(hook));
    }

    fn ran(&self) -> bool {
        self.before_reads.lock().unwrap().is_none() && self.behind_reads.lock().unwrap().is_none()
    }
}

impl Disk for HookDisk {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        self.disk.open(path, mode)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.create_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.remove_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.disk.list(path)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.disk.exists(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.disk.sync_dir(path)
    }

    fn allocated(&self, path: &Path) -> u64 {
        self.disk.allocated(path)
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        self.disk.space(path)
    }

    fn read_batch(&self, reads: &mut [BatchRead<'_>]) {
        let hook = self.before_reads.lock().unwrap().take();
        if let Some(hook) = hook {
            hook();
        }
        self.disk.read_batch(reads);
        let hook = self.behind_reads.lock().unwrap().take();
        if let Some(hook) = hook {
            hook();
        }
    }
}

/// A group on a disk with hooks, with a volume whose first block is in the base.
fn hooked(bench: &Bench) -> (Arc<HookDisk>, Arc<Group>, VolumeNumber) {
    let disk = HookDisk::new(bench.disk.clone());
    let mut context = bench.context();
    context.env.disk = disk.clone();
    let new = NewGroup { id: GROUP, name: name("g"), segment_bytes: SEGMENT };
    let group = Group::create(context, &dir(), new).unwrap();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap().number;
    set_policy(&group, 0, 64 << 20);
    write(&group, volume, 0, &[1; 8192]);
    fold(&bench.clock, &group);
    (disk, group, volume)
}

fn fold(clock: &ManualClock, group: &Group) {
    clock.advance(Duration::from_secs(5));
    group.sync_now().unwrap();
    assert_eq!(group.fold_now().unwrap(), group.positions().head);
}

/// The reader of an image had found the block in the base; then a fold put a newer one there.
#[test]
fn a_block_that_a_fold_overwrites_under_a_reader_is_read_as_it_was() {
    let bench = Bench::new("a", 6);
    let (disk, group, volume) = hooked(&bench);
    // A block that the image has in parts: one in the log, the rest in the base.
    write(&group, volume, 4096, &[2; 512]);
    let image = group.open_image(&Point::Now, None, "test", None).unwrap();
    for offset in [0, 4096, 8192] {
        let (other, clock) = (group.clone(), bench.clock.clone());
        let expected = read(&*image, volume, offset, 4096);
        disk.before_next_reads(move || {
            write(&other, volume, offset, &[3; 4096]);
            fold(&clock, &other);
        });
        let found = read(&*image, volume, offset, 4096);
        assert!(disk.ran());
        assert!(found == expected, "offset {offset}: got {}", found[0]);
        assert_eq!(read(&*group, volume, offset, 4096), [3; 4096]);
    }
}

/// The reader had found the block in a segment; then a fold passed it, and the log went on until
/// every segment that nobody held was in use again and written over.
#[test]
fn a_segment_that_is_used_again_under_a_reader_is_read_as_it_was() {
    for of_image in [true, false] {
        let bench = Bench::new("a", 7);
        let (disk, group, volume) = hooked(&bench);
        let end = write(&group, volume, 8192, &[2; 4096]);
        let log = dir().join("log");
        let path = log.join(segment_name((end.0 - 1) / SEGMENT));
        let fill = move |group: &Group| {
            for round in 0..24 {
                write(group, volume, 65_536, &[round; 16_384]);
            }
        };
        let image = group.open_image(&Point::Now, None, "test", None).unwrap();
        let view: &dyn View = if of_image { &*image } else { &*group };
        let (read_by_now, of_hook) = (Arc::new(Mutex::new(0)), bench.disk.clone());
        let (counted, other, clock) = (read_by_now.clone(), group.clone(), bench.clock.clone());
        let held = path.clone();
        disk.before_next_reads(move || {
            fill(&other);
            fold(&clock, &other);
            let spares = |disk: &MemoryDisk| {
                let names = disk.list(held.parent().unwrap()).unwrap();
                names.iter().filter(|name| name.ends_with(".spare")).count()
            };
            assert!(spares(&of_hook) > 1);
            fill(&other);
            assert_eq!(spares(&of_hook), 0, "each is in use again");
            assert!(of_hook.exists(&held).unwrap(), "but for the one that is held");
            *counted.lock().unwrap() = of_hook.reads();
        });
        let found = read(view, volume, 8192, 4096);
        assert!(disk.ran());
        assert!(found == [2; 4096], "of an image: {of_image}: got {}", found[0]);
        let reads = bench.disk.reads() - *read_by_now.lock().unwrap();
        assert_eq!(reads, 1, "what it had found was still there");
        group.segments.collect().unwrap();
        assert!(!bench.disk.exists(&path).unwrap(), "nobody holds it any more");
    }
}

/// The old sector was read from the base; meanwhile another request changed it, and was folded into
/// the base: the place is the same, the bytes are not.
#[test]
fn part_of_a_sector_keeps_what_was_written_and_folded_beside_it() {
    let bench = Bench::new("a", 5);
    let (disk, group, volume) = hooked(&bench);
    let (other, clock) = (group.clone(), bench.clock.clone());
    disk.behind_next_reads(move || {
        write(&other, volume, 0, &[2; 512]);
        fold(&clock, &other);
    });
    write(&group, volume, 100, &[3; 100]);
    assert!(disk.ran());
    let found = read(&*group, volume, 0, 512);
    assert_eq!(found[100..200], [3; 100]);
    assert_eq!((found[0], found[511]), (2, 2), "an answered write is lost");
}
