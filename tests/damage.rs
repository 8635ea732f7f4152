//! Damage to any file of a group: its log cut after any byte, and a bit turned over anywhere in
//! log, index, base, sidecar, control state and metadata.
//!
//! Whatever was damaged, the group shows one prefix of its writes with all that was durable in it,
//! or says what is wrong: an error in place of the bytes, a group that failed, a group that does
//! not open. It never shows bytes that were not written there.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::support::wait_for;
use tidelog::events::Events;
use tidelog::group::{
    DataState, Group, GroupContext, LocalLimits, NewGroup, NodeIdentity, Op, Point, Read, Request,
    View,
};
use tidelog::io::{Clock, Disk, Entropy, Env, ManualClock, MemoryDisk, OpenMode, SeededEntropy};
use tidelog::log::control::{Consistency, Control, PolicyRecord};
use tidelog::units::{GroupId, LogTime, Lsn, NodeId, Span, VolumeNumber};

const DIR: &str = "/data/groups/g";
const SEGMENT: u64 = 64 << 10;
const VOLUME_BYTES: u64 = 128 << 10;
const SECTOR: u64 = 512;
const VOLUME: VolumeNumber = VolumeNumber(1);

/// What the volume held behind a request.
struct Moment {
    end: Lsn,
    contents: Vec<u8>,
}

/// A disk as a killed process left it, and what its group had been told.
struct Left {
    disk: MemoryDisk,
    moments: Vec<Moment>,
    /// The index of the last moment that was durable, and marked as such.
    durable: usize,
    /// The index of the moment that an open image shows.
    imaged: usize,
    /// Where the record of a bookmark ends.
    named: Lsn,
    log_start: Lsn,
}

fn context(disk: &MemoryDisk, events: &Events) -> GroupContext {
    let clock: Arc<dyn Clock> = Arc::new(ManualClock::new(LogTime(1_700_000_000_000_000_000)));
    let entropy: Arc<dyn Entropy> = Arc::new(SeededEntropy::new(1));
    GroupContext {
        env: Env { disk: Arc::new(disk.clone()), clock, entropy },
        node: NodeIdentity { id: NodeId([3; 16]), name: "n".parse().unwrap() },
        limits: LocalLimits::default(),
        failures: None,
        events: events.clone(),
    }
}

impl Left {
    /// A base with its sidecar, three segments with an index, an open image, and a tail that
    /// nothing calls durable, with records of several kinds.
    fn make() -> Left {
        let disk = MemoryDisk::new();
        disk.create_dir(Path::new(DIR)).unwrap();
        let new =
            NewGroup { id: GroupId([7; 16]), name: "g".parse().unwrap(), segment_bytes: SEGMENT };
        let clock = Arc::new(ManualClock::new(LogTime(1_700_000_000_000_000_000)));
        let mut with = context(&disk, &Events::in_memory());
        with.env.clock = clock.clone();
        let group = Group::create(with, Path::new(DIR), new).unwrap();
        group.create_volume("v".parse().unwrap(), VOLUME_BYTES).unwrap();
        let policy = PolicyRecord { window: Span::from_secs(60), ..PolicyRecord::default() };
        group.append_control(Control::Policy(policy)).unwrap();
        let contents = vec![0; VOLUME_BYTES as usize];
        let moments = vec![Moment { end: group.positions().head, contents }];
        let mut left =
            Left { disk, moments, durable: 0, imaged: 0, named: Lsn::MAX, log_start: Lsn::ZERO };
        for version in 0..12 {
            left.write(&group, version * 8192, 9000, version);
            left.write(&group, version * 1024, SECTOR, version + 100);
        }
        group.sync_now().unwrap();
        clock.advance(Duration::from_secs(120));
        left.write(&group, 0, SECTOR, 7);
        assert!(group.fold_now().unwrap() > Lsn::ZERO);
        for version in 20..30 {
            left.write(&group, version * 2048 + 512, 10_000, version);
        }
        left.imaged = left.moments.len() - 1;
        group.open_image(&Point::Now, Some("i".parse().unwrap()), "test", None).unwrap();
        left.write(&group, 16_384, 2048, 77);
        // Its threads write the index of each segment that is full.
        group.start_workers();
        wait_for("an index", || {
            let names = left.disk.list(&Path::new(DIR).join("log")).unwrap();
            names.iter().any(|name| name.ends_with(".idx")).then_some(())
        });
        group.close().unwrap();
        drop(group);
        let (group, _) =
            Group::open(context(&left.disk, &Events::in_memory()), Path::new(DIR)).unwrap();
        left.durable = left.moments.len() - 1;
        for version in 40..43 {
            left.write(&group, version * 512, SECTOR, version);
        }
        // A write for each edge, and zeros between them.
        let before = group.positions().head;
        left.zero(&group, Op::Zero { offset: 24_700, length: 5000, no_hole: true });
        assert!(group.positions().head.bytes_since(before) > 2 * SECTOR, "one record");
        group.create_bookmark("b".parse().unwrap(), Consistency::Crash).unwrap();
        left.named = group.positions().head;
        left.log_start = group.log_start();
        left.zero(&group, Op::Trim { offset: 32_768, length: 8192 });
        let segments = [left.moments[left.durable].end, group.positions().head]
            .map(|lsn| lsn.segment_number(SEGMENT));
        assert_eq!(segments[0], segments[1], "the tail is in one segment");
        left
    }

    fn write(&mut self, group: &Group, offset: u64, length: u64, version: u64) {
        let length = length / SECTOR * SECTOR;
        let data: Vec<u8> = (0..length / 8)
            .flat_map(|place| (0x5a << 56 | version << 32 | place).to_le_bytes())
            .collect();
        let mut contents = self.moments.last().unwrap().contents.clone();
        contents[offset as usize..][..data.len()].copy_from_slice(&data);
        self.request(group, Op::Write { offset, data: &data }, contents);
    }

    fn zero(&mut self, group: &Group, op: Op<'_>) {
        let (Op::Zero { offset, length, .. } | Op::Trim { offset, length }) = op else { panic!() };
        let mut contents = self.moments.last().unwrap().contents.clone();
        contents[offset as usize..][..length as usize].fill(0);
        self.request(group, op, contents);
    }

    fn request(&mut self, group: &Group, op: Op<'_>, contents: Vec<u8>) {
        let request = Request { volume: VOLUME, op, fua: false };
        let end = group.append(&[request]).pop().unwrap().unwrap();
        self.moments.push(Moment { end, contents });
    }

    /// Opens the group on a damaged copy of the disk, and checks what it shows: a moment, or an
    /// error in its place.
    fn check(&self, disk: &MemoryDisk) -> Result<Shown, String> {
        let events = Events::in_memory();
        let group = match Group::open(context(disk, &events), Path::new(DIR)) {
            Ok((group, _)) => group,
            Err(error) => return Ok(Shown::NotOpened(error.to_string())),
        };
        let shown = self.shown(&group);
        group.forget_images();
        shown
    }

    fn shown(&self, group: &Group) -> Result<Shown, String> {
        if let Some(image) = group.image(&"i".parse().unwrap()) {
            let found = sectors(&*image);
            if !agrees(&found, &self.moments[self.imaged].contents) {
                return Err("the image shows what it did not hold".to_owned());
            }
        }
        let found = sectors(group);
        let (state, reason, _) = group.data_state();
        let least = if state == DataState::Failed { 0 } else { self.durable };
        let shown = (least..self.moments.len())
            .rev()
            .find(|at| agrees(&found, &self.moments[*at].contents));
        let Some(shown) = shown else {
            return Err(format!(
                "what is shown is no moment from {least} on; {state:?} {reason:?}"
            ));
        };
        let whole = found.iter().all(Option::is_some);
        let named = group.control().bookmarks.iter().any(|known| known.name.as_str() == "b");
        Ok(match (state, whole) {
            (DataState::Failed, _) => Shown::Failed(reason.unwrap_or_default()),
            (_, false) => Shown::Errors,
            (_, true) => Shown::Moment { shown, named },
        })
    }
}

#[derive(Debug)]
enum Shown {
    /// The index of the moment, and whether the bookmark is there.
    Moment {
        shown: usize,
        named: bool,
    },
    Errors,
    Failed(String),
    NotOpened(String),
}

/// Each sector that can be read.
fn sectors(view: &dyn View) -> Vec<Option<Vec<u8>>> {
    (0..VOLUME_BYTES / SECTOR)
        .map(|sector| {
            let mut buffer = vec![0xee; SECTOR as usize];
            let offset = sector * SECTOR;
            let read = Read { volume: VOLUME, offset, buffer: &mut buffer, result: Ok(()) };
            let mut reads = [read];
            view.read(&mut reads);
            let [read] = reads;
            let result = read.result.clone();
            result.is_ok().then_some(buffer)
        })
        .collect()
}

fn agrees(found: &[Option<Vec<u8>>], contents: &[u8]) -> bool {
    found
        .iter()
        .zip(contents.chunks(SECTOR as usize))
        .all(|(found, held)| found.as_ref().is_none_or(|found| found == held))
}

fn files(disk: &MemoryDisk, dir: &Path, found: &mut Vec<PathBuf>) {
    for name in disk.list(dir).unwrap() {
        let path = dir.join(name);
        if disk.list(&path).is_ok() {
            files(disk, &path, found);
        } else {
            found.push(path);
        }
    }
}

/// Every so many bytes are met; each where `TIDELOG_EVERY_BYTE` is set, as in `scripts/soak`.
fn step(every: usize) -> usize {
    if std::env::var_os("TIDELOG_EVERY_BYTE").is_some() { 1 } else { every }
}

#[test]
fn a_log_cut_after_any_byte_is_a_prefix_or_damage_that_is_told() {
    let left = Left::make();
    let head = left.moments.last().unwrap().end;
    let last = head.segment_number(SEGMENT);
    let durable = left.moments[left.durable].end;
    let (mut moments, mut failed, mut errors) = (BTreeMap::new(), 0, 0);
    let (mut earlier, mut noticed) = (BTreeSet::new(), 0);
    // Each byte of what was not durable, and some of what was, from the begin of each segment on.
    let begun = left.log_start.segment_number(SEGMENT)..=last;
    let every = begun
        .flat_map(|number| (0..SEGMENT).step_by(step(307)).map(move |cut| number * SEGMENT + cut));
    let cuts = every.take_while(|at| *at < durable.0).chain(durable.0..head.0);
    for at in cuts.map(Lsn) {
        let (number, cut) = (at.segment_number(SEGMENT), at.segment_offset(SEGMENT));
        let path = Path::new(DIR).join("log").join(format!("{number:012}.seg"));
        if number < last {
            earlier.insert(number);
        }
        for short in [false, true] {
            let disk = left.disk.snapshot();
            let file = disk.open(&path, OpenMode::ReadWrite).unwrap();
            if short {
                file.set_len(cut).unwrap();
            } else {
                let other = vec![0xa5; (SEGMENT - cut) as usize];
                file.write_at(&[IoSlice::new(&other)], cut).unwrap();
            }
            match left.check(&disk).unwrap_or_else(|why| panic!("cut at {at}: {why}")) {
                // What is folded, or was written over since, is not missed.
                Shown::Moment { shown, named } if number < last => {
                    assert_eq!(shown, left.moments.len() - 1, "cut at {at}: all the rest is there");
                    assert!(named, "cut at {at}: the bookmark");
                }
                Shown::Moment { shown, named } => {
                    assert!(at >= durable, "cut at {at}: durable up to {durable}, and no word");
                    assert!(left.moments[shown].end <= at, "cut at {at}: moment {shown}");
                    let next = left.moments.get(shown + 1);
                    assert!(next.is_none_or(|next| next.end > at), "cut at {at}: too little");
                    // Behind its text are up to seven zeros, which a file that is cut has, too.
                    if at >= left.named || at.advance(8) <= left.named {
                        assert_eq!(named, left.named <= at, "cut at {at}: the bookmark");
                    }
                    *moments.entry(shown).or_insert(0) += 1;
                }
                Shown::Failed(reason) => {
                    assert!(at < durable, "cut at {at}: only from {durable} on may be lost");
                    assert!(reason.contains("although it was durable"), "cut at {at}: {reason}");
                    failed += 1;
                    noticed += usize::from(number < last);
                }
                Shown::Errors => {
                    assert!(at < durable, "cut at {at}: nothing of it is shown");
                    errors += 1;
                    noticed += usize::from(number < last);
                }
                other => panic!("cut at {at}: {other:?}"),
            }
        }
    }
    assert_eq!(moments.len(), left.moments.len() - 1 - left.durable, "each end was met");
    assert!(failed > 0 && errors > 0, "{failed} failed, {errors} with errors");
    assert!(earlier.len() > 1 && noticed > 0, "{noticed} cuts noticed in segments {earlier:?}");
}

#[test]
fn a_bit_that_turns_anywhere_is_noticed_or_harms_nothing() {
    let left = Left::make();
    let mut paths = Vec::new();
    files(&left.disk, Path::new(DIR), &mut paths);
    let mut seen: BTreeMap<String, [usize; 4]> = BTreeMap::new();
    for path in paths {
        let kind = path.extension().unwrap_or(path.file_name().unwrap()).to_string_lossy();
        let file = left.disk.open(&path, OpenMode::Read).unwrap();
        let bytes = file.len().unwrap();
        let mut held = vec![0; bytes as usize];
        file.read_at(&mut held, 0).unwrap();
        // Every byte of what is small, and three hundred of each that is not; of a sidecar, which
        // is holes for the most part, besides each that holds something.
        let step = step((bytes / 300).max(1) as usize | 1) as u64;
        let is_met = |offset: &u64| {
            offset.is_multiple_of(step) || kind == "sum" && held[*offset as usize] != 0
        };
        for offset in (0..bytes).filter(is_met) {
            let disk = left.disk.snapshot();
            disk.damage(&path, offset, 1, 1 << (offset % 8));
            let shown = left.check(&disk);
            let shown = shown.unwrap_or_else(|why| panic!("{path:?}, byte {offset}: {why}"));
            let place = match shown {
                Shown::Moment { .. } => 0,
                Shown::Errors => 1,
                Shown::Failed(reason) => {
                    assert!(!reason.is_empty(), "{path:?}, byte {offset}");
                    2
                }
                Shown::NotOpened(why) => {
                    assert!(why.contains("group"), "{path:?}, byte {offset}: {why}");
                    3
                }
            };
            seen.entry(kind.to_string()).or_default()[place] += 1;
        }
    }
    println!("by kind of file: nothing shown, errors for a block, failed, not opened: {seen:?}");
    let noticed = |kind: &str| seen[kind][1..].iter().sum::<usize>();
    assert!(seen["idx"][0] > 0, "an index is a cache, and was met: {seen:?}");
    assert!(seen["meta"][0] > 0, "of two slots one is whole, and both were met: {seen:?}");
    for kind in ["seg", "img", "sum", "control"] {
        assert!(noticed(kind) > 0, "{kind}: {seen:?}");
    }
}
