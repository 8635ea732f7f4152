//! An image as a source of files: each volume a directory of 4 MiB files in directories of 1,024,
//! named so that their order is the volume's.
//!
//! A file that did not change since the parent carries its parent's times, and is not read. The
//! times are no times: mtime is the LSN and ctime the epoch of the backup that last read the file,
//! both as nanoseconds since 1970, so that no rewind and no failover makes two different contents
//! look equal.

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustic_core::repofile::{Metadata, Node, NodeType};
use rustic_core::{ReadSource, ReadSourceEntry, RusticResult, jiff::Timestamp};

use crate::group::{self, Allocation, View, Volume};
use crate::units::{EpochId, Lsn, Name, Position, VolumeNumber, total};

/// Bytes of a file.
pub const FILE_BYTES: u64 = 4 << 20;
/// Files of a directory.
pub const DIR_FILES: u64 = 1024;
/// The manifest's name, beside `data`.
pub(super) const MANIFEST_FILE: &str = "tidelog.json";
/// Bytes of one read from the image.
const READ_BYTES: usize = 256 << 10;
/// Extents that are asked for at once.
const EXTENTS: usize = 512;

/// The volumes of an image that a job names; all where it names none.
///
/// # Errors
///
/// Where there is none, or one of them holds no one moment.
pub(super) fn chosen_volumes(all: Vec<Volume>, named: &[Name]) -> Result<Vec<Volume>, String> {
    if let Some(missing) = named.iter().find(|name| all.iter().all(|it| it.name != **name)) {
        return Err(format!("volume {missing}: does not exist in the group"));
    }
    let chosen = |volume: &Volume| named.is_empty() || named.contains(&volume.name);
    let volumes: Vec<Volume> = all.into_iter().filter(chosen).collect();
    if volumes.is_empty() {
        return Err("the group has no volume; `tidelog volume create` makes one".to_owned());
    }
    match volumes.iter().find(|volume| volume.restoring) {
        Some(Volume { name, .. }) => Err(format!(
            "volume {name}: a restore into it, or the reading of its base, has not come to its \
             end, so it holds no one moment; `tidelog status` says what ends it, and a job that \
             names other volumes goes without it"
        )),
        None => Ok(volumes),
    }
}

/// The identity of a file's content: where it was last read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stamp {
    /// The epoch of the backup that read it.
    pub epoch: EpochId,
    /// Its position.
    pub lsn: Lsn,
}

impl Stamp {
    /// The stamp of what is read at `position`.
    #[must_use]
    pub fn of(position: Position) -> Stamp {
        Stamp { epoch: position.epoch, lsn: position.lsn }
    }

    /// As (mtime, ctime).
    fn times(self) -> (Timestamp, Timestamp) {
        let time = |number: u64| {
            Timestamp::from_nanosecond(i128::from(number))
                .expect("64 bits of nanoseconds end in 2554")
        };
        (time(self.lsn.0), time(self.epoch.0))
    }

    /// From the times of a file in a parent.
    #[must_use]
    pub fn from_times(mtime: Option<Timestamp>, ctime: Option<Timestamp>) -> Option<Stamp> {
        let number = |time: Timestamp| u64::try_from(time.as_nanosecond()).ok();
        Some(Stamp { lsn: Lsn(number(mtime?)?), epoch: EpochId(number(ctime?)?) })
    }
}

/// The stamps of a volume's files, in a few bytes each.
#[derive(Default)]
pub struct Stamps {
    index: Vec<u32>,
    table: Vec<Stamp>,
    known: HashMap<Stamp, u32>,
}

impl Stamps {
    /// The same stamp for `files` files.
    #[must_use]
    pub fn all(files: u64, stamp: Stamp) -> Stamps {
        let mut stamps = Stamps::default();
        for _ in 0..files {
            stamps.push(stamp);
        }
        stamps
    }

    /// Adds the next file's stamp.
    pub fn push(&mut self, stamp: Stamp) {
        let number = self.number(stamp);
        self.index.push(number);
    }

    /// Changes a file's stamp; nothing where there is no such file.
    pub fn set(&mut self, file: u64, stamp: Stamp) {
        let number = self.number(stamp);
        if let Some(place) = usize::try_from(file).ok().and_then(|file| self.index.get_mut(file)) {
            *place = number;
        }
    }

    /// The number of files.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.index.len() as u64
    }

    fn stamp(&self, file: u64) -> Option<Stamp> {
        let number = *self.index.get(usize::try_from(file).ok()?)?;
        self.table.get(number as usize).copied()
    }

    fn number(&mut self, stamp: Stamp) -> u32 {
        *self.known.entry(stamp).or_insert_with(|| {
            self.table.push(stamp);
            u32::try_from(self.table.len() - 1).expect("fewer stamps than files")
        })
    }
}

/// The first reason why a run must not leave a snapshot. The library only logs errors of a source
/// and saves the snapshot short; the repository's door asks here first.
#[derive(Clone, Default)]
pub struct Stop {
    reason: Arc<Mutex<Option<String>>>,
}

impl Stop {
    /// Nothing speaks against the snapshot so far.
    #[must_use]
    pub fn new() -> Stop {
        Stop::default()
    }

    /// Ends the run: reads fail from now on, and no snapshot is saved.
    pub fn stop(&self, reason: impl Into<String>) {
        self.reason.lock().expect("no holder panics").get_or_insert_with(|| reason.into());
    }

    /// Why the run must end, if it must.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        self.reason.lock().expect("no holder panics").clone()
    }
}

/// How far a run is; shared with those who show it.
#[derive(Clone, Default)]
pub struct Progress {
    counters: Arc<(AtomicU64, AtomicU64, AtomicU64)>,
}

impl Progress {
    /// Nothing done yet.
    #[must_use]
    pub fn new() -> Progress {
        Progress::default()
    }

    /// Bytes done and bytes to do.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        (self.counters.0.load(Ordering::Relaxed), self.counters.1.load(Ordering::Relaxed))
    }

    /// Bytes read from the image so far.
    #[must_use]
    pub fn bytes_read(&self) -> u64 {
        self.counters.2.load(Ordering::Relaxed)
    }

    pub(crate) fn set_total(&self, bytes: u64) {
        self.counters.1.store(bytes, Ordering::Relaxed);
    }

    pub(crate) fn add_done(&self, bytes: u64) {
        self.counters.0.fetch_add(bytes, Ordering::Relaxed);
    }

    fn add_read(&self, bytes: u64) {
        self.counters.2.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A volume of the source.
struct SourceVolume {
    volume: Volume,
    stamps: Stamps,
}

struct Shared {
    view: Arc<dyn View>,
    volumes: Vec<SourceVolume>,
    root: PathBuf,
    manifest: Vec<u8>,
    stop: Stop,
    progress: Progress,
}

/// The source that the library reads.
pub struct ImageSource {
    shared: Arc<Shared>,
}

impl ImageSource {
    /// The files of `volumes` of `view` below `root`, with the manifest behind them.
    #[must_use]
    pub fn new(
        view: Arc<dyn View>,
        mut volumes: Vec<(Volume, Stamps)>,
        root: PathBuf,
        manifest: Vec<u8>,
        stop: Stop,
        progress: Progress,
    ) -> ImageSource {
        // Entries of a directory are in the order of their names.
        volumes.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        let volumes: Vec<_> = volumes
            .into_iter()
            .map(|(volume, stamps)| {
                assert_eq!(stamps.count(), files(volume.size_bytes), "a stamp for each file");
                SourceVolume { volume, stamps }
            })
            .collect();
        progress.set_total(total(volumes.iter().map(|v| v.volume.size_bytes)));
        ImageSource { shared: Arc::new(Shared { view, volumes, root, manifest, stop, progress }) }
    }

    /// Files that a whole snapshot of this source holds.
    pub(super) fn file_count(&self) -> u64 {
        self.shared.volumes.iter().map(|source| source.stamps.count()).sum::<u64>() + 1
    }
}

/// The number of files of a volume.
#[must_use]
pub fn files(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(FILE_BYTES)
}

/// The path of a file below its volume's directory.
#[must_use]
pub fn file_path(file: u64) -> PathBuf {
    let mut path = PathBuf::from(format!("{:05}", file / DIR_FILES));
    path.push(format!("{:04}", file % DIR_FILES));
    path
}

impl ReadSource for ImageSource {
    type Open = FileReader;
    type Iter = Entries;

    fn size(&self) -> RusticResult<Option<u64>> {
        Ok(Some(total(self.shared.volumes.iter().map(|v| v.volume.size_bytes))))
    }

    fn entries(&self) -> Entries {
        Entries { shared: Arc::clone(&self.shared), volume: 0, file: 0, manifest_done: false }
    }
}

/// Walks the files in order.
pub struct Entries {
    shared: Arc<Shared>,
    volume: usize,
    file: u64,
    manifest_done: bool,
}

impl Iterator for Entries {
    type Item = RusticResult<ReadSourceEntry<FileReader>>;

    fn next(&mut self) -> Option<Self::Item> {
        let shared = &self.shared;
        while let Some(source) = shared.volumes.get(self.volume) {
            if let Some(stamp) = source.stamps.stamp(self.file) {
                let file = self.file;
                self.file += 1;
                let offset = file * FILE_BYTES;
                let length = FILE_BYTES.min(source.volume.size_bytes - offset);
                let mut path = shared.root.join("data");
                path.push(source.volume.name.as_str());
                path.push(file_path(file));
                let (mtime, ctime) = stamp.times();
                let content = Content::Volume {
                    volume: source.volume.number,
                    at: offset,
                    end: offset + length,
                };
                return Some(Ok(entry(shared, path, length, mtime, ctime, content)));
            }
            self.volume += 1;
            self.file = 0;
        }
        if self.manifest_done {
            return None;
        }
        self.manifest_done = true;
        let path = shared.root.join(MANIFEST_FILE);
        let length = shared.manifest.len() as u64;
        // Its times must tell its content apart from the parent's, whose size may be the same.
        let epoch = EpochId(xxhash_rust::xxh3::xxh3_64(&shared.manifest));
        let (mtime, ctime) = Stamp { lsn: Lsn(0), epoch }.times();
        Some(Ok(entry(shared, path, length, mtime, ctime, Content::Manifest { at: 0 })))
    }
}

fn entry(
    shared: &Arc<Shared>,
    path: PathBuf,
    length: u64,
    mtime: Timestamp,
    ctime: Timestamp,
    content: Content,
) -> ReadSourceEntry<FileReader> {
    let meta = Metadata {
        mode: Some(0o644),
        mtime: Some(mtime),
        atime: Some(mtime),
        ctime: Some(ctime),
        size: length,
        links: 1,
        ..Metadata::default()
    };
    let name = path.file_name().unwrap_or_default();
    let node = Node::new_node(name, NodeType::File, meta);
    let reader = FileReader { shared: Arc::clone(shared), content, buffer: Vec::new(), used: 0 };
    ReadSourceEntry { path, node, open: Some(reader) }
}

enum Content {
    Volume { volume: VolumeNumber, at: u64, end: u64 },
    Manifest { at: usize },
}

/// Reads one file of the source.
pub struct FileReader {
    shared: Arc<Shared>,
    content: Content,
    buffer: Vec<u8>,
    used: usize,
}

impl FileReader {
    /// Fills the buffer with the next megabyte.
    fn fill(&mut self) -> io::Result<()> {
        let Content::Volume { volume, at, end } = &mut self.content else { return Ok(()) };
        let length = usize::try_from((*end - *at).min(1 << 20)).expect("at most a megabyte");
        self.buffer.clear();
        self.buffer.resize(length, 0);
        self.used = 0;
        if length == 0 {
            return Ok(());
        }
        if let Some(reason) = self.shared.stop.reason() {
            return Err(io::Error::other(reason));
        }
        let result = read_range(self.shared.view.as_ref(), *volume, *at, &mut self.buffer);
        let result = result.map(|bytes_read| self.shared.progress.add_read(bytes_read));
        if let Err(error) = result {
            let reason = format!("volume {volume} at {at}: {error}");
            self.shared.stop.stop(reason.clone());
            return Err(io::Error::other(reason));
        }
        *at += length as u64;
        Ok(())
    }
}

/// Fills `buffer` from a view, without reading what is known to be zeros; the bytes read.
fn read_range(
    view: &dyn View,
    volume: VolumeNumber,
    offset: u64,
    buffer: &mut [u8],
) -> Result<u64, group::GroupError> {
    let mut reads = Vec::new();
    let mut bytes_read = 0;
    let (mut rest, mut at) = (buffer, offset);
    while !rest.is_empty() {
        let extents = view.extents(volume, at, rest.len() as u64, EXTENTS)?;
        let before = rest.len();
        for extent in extents {
            let end = extent.offset.saturating_add(extent.length);
            let length = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX);
            let (part, after) = rest.split_at_mut(length.min(rest.len()));
            rest = after;
            if extent.allocation != Allocation::Data {
                part.fill(0);
                at += part.len() as u64;
                continue;
            }
            for buffer in part.chunks_mut(READ_BYTES) {
                let length = buffer.len() as u64;
                reads.push(group::Read { volume, offset: at, buffer, result: Ok(()) });
                at += length;
                bytes_read += length;
            }
        }
        assert!(rest.len() < before, "volume {volume}: extents at {at} lead nowhere");
    }
    view.read(&mut reads);
    reads.into_iter().try_for_each(|read| read.result)?;
    Ok(bytes_read)
}

impl Read for FileReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if let Content::Manifest { at } = &mut self.content {
            let rest = &self.shared.manifest[*at..];
            let length = rest.len().min(out.len());
            out[..length].copy_from_slice(&rest[..length]);
            *at += length;
            return Ok(length);
        }
        if self.used == self.buffer.len() {
            self.fill()?;
        }
        let length = (self.buffer.len() - self.used).min(out.len());
        out[..length].copy_from_slice(&self.buffer[self.used..self.used + length]);
        self.used += length;
        Ok(length)
    }
}
