//! A disk in memory that loses, reorders and tears what was not synced, and fails on demand.
//!
//! What it may do, and why a correct user survives it:
//!
//! - **Power loss** ([`MemoryDisk::crash`]). Of what was written to a file and not synced, each
//!   512-byte sector has, independently, the content that it had at the last sync or after any one
//!   write since; never anything else inside a sector. The length is one that the file had since.
//!   Of the names made, changed or removed in a directory that was not synced, any subset is kept.
//!   What was synced is all there.
//! - **A failed sync**. Of what it covered any part may be on the disk, and the cache goes on
//!   showing all of it; later syncs succeed and do not bring it. Who latches the failure survives.
//! - **Power off after N operations**: the Nth changing operation and all behind it fail and do
//!   nothing, so that a test can stop a program at every boundary and then crash.
//! - **An I/O error** of one operation or read, or reads of a part of a file until it is written.
//!   **No space** after a number of bytes: a write stops in the middle. **Rot**, at an operation.
//!
//! Everything follows from seeds; nothing here asks a clock.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

pub use self::fault::Fault;
use self::random::Random;
use super::disk::{Disk, DiskFile, OpenMode, Space};

mod fault;
mod random;

const SECTOR: u64 = 512;
const PAGE: u64 = 4096;

type Page = [u8; PAGE as usize];

/// The disk. Clones are handles to the same disk; [`MemoryDisk::crash`] and
/// [`MemoryDisk::snapshot`] make another one.
#[derive(Clone)]
pub struct MemoryDisk {
    state: Arc<Mutex<State>>,
}

/// What a file holds: pages that were written, shared between copies; the rest are holes.
#[derive(Clone, Default)]
struct Content {
    bytes: u64,
    pages: BTreeMap<u64, Arc<Page>>,
}

/// A change of a file that is not synced yet.
#[derive(Clone)]
enum Change {
    /// Whole sectors, as the cache showed them after the write.
    Sectors { offset: u64, data: Arc<[u8]> },
    /// A new length. What a cut takes away was noted as sectors of zeros before.
    Length(u64),
}

#[derive(Clone, Default)]
struct Inode {
    cache: Content,
    durable: Content,
    pending: Vec<Change>,
    handles: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Dir,
    File(u64),
}

/// A change of names that is not synced yet: applied as a whole or not at all.
#[derive(Clone, Debug)]
enum NameChange {
    Link {
        path: PathBuf,
        node: Node,
    },
    Unlink {
        path: PathBuf,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
        node: Node,
    },
    /// What lies below moves with the directory's own name.
    RenameDir {
        from: PathBuf,
        to: PathBuf,
    },
}

impl NameChange {
    fn touches(&self, dir: &Path) -> bool {
        match self {
            NameChange::Link { path, .. } | NameChange::Unlink { path } => {
                path.parent() == Some(dir)
            }
            NameChange::Rename { from, to, .. } | NameChange::RenameDir { from, to } => {
                from.parent() == Some(dir) || to.parent() == Some(dir)
            }
        }
    }

    /// Whether it changes nothing outside of a directory.
    fn is_below(&self, dir: &Path) -> bool {
        match self {
            NameChange::Link { path, .. } | NameChange::Unlink { path } => path.starts_with(dir),
            NameChange::Rename { from, to, .. } | NameChange::RenameDir { from, to } => {
                from.starts_with(dir) && to.starts_with(dir)
            }
        }
    }

    fn apply(&self, names: &mut BTreeMap<PathBuf, Node>) {
        match self {
            NameChange::Link { path, node } => {
                names.insert(path.clone(), *node);
            }
            NameChange::Unlink { path } => {
                names.remove(path);
            }
            NameChange::Rename { from, to, node } => {
                names.remove(from);
                names.insert(to.clone(), *node);
            }
            NameChange::RenameDir { from, to } => {
                let moved: Vec<PathBuf> =
                    names.keys().filter(|name| name.starts_with(from)).cloned().collect();
                for name in moved {
                    let node = names.remove(&name).expect("it was found");
                    // Joined part by part, since joining nothing leaves a slash at the end.
                    let below = name.strip_prefix(from).expect("it starts with it");
                    names.insert(to.components().chain(below.components()).collect(), node);
                }
            }
        }
    }
}

#[derive(Clone, Default)]
struct State {
    names: BTreeMap<PathBuf, Node>,
    durable_names: BTreeMap<PathBuf, Node>,
    name_changes: Vec<NameChange>,
    inodes: BTreeMap<u64, Inode>,
    next_inode: u64,
    operations: u64,
    reads: u64,
    syncs: u64,
    faults: Vec<Fault>,
    off: bool,
    total_bytes: u64,
    /// The disk before each operation since the recording began.
    recorded: Option<Vec<State>>,
    /// Chooses what a failed sync or a failed write leaves behind.
    random: Random,
}

fn eio(what: &str) -> io::Error {
    io::Error::other(format!("input/output error: {what}"))
}

impl Content {
    fn read(&self, buffer: &mut [u8], offset: u64) {
        let mut done = 0;
        while done < buffer.len() {
            let position = offset + done as u64;
            let within = (position % PAGE) as usize;
            let step = (PAGE as usize - within).min(buffer.len() - done);
            let target = &mut buffer[done..done + step];
            match self.pages.get(&(position / PAGE)) {
                Some(page) => target.copy_from_slice(&page[within..within + step]),
                None => target.fill(0),
            }
            done += step;
        }
    }

    /// Writes without a look at the length.
    fn write(&mut self, data: &[u8], offset: u64) {
        let mut done = 0;
        while done < data.len() {
            let position = offset + done as u64;
            let within = (position % PAGE) as usize;
            let step = (PAGE as usize - within).min(data.len() - done);
            let page = self.pages.entry(position / PAGE).or_insert_with(|| Arc::new([0; 4096]));
            Arc::make_mut(page)[within..within + step].copy_from_slice(&data[done..done + step]);
            done += step;
        }
    }

    fn set_len(&mut self, bytes: u64) {
        if bytes < self.bytes {
            self.pages.split_off(&bytes.div_ceil(PAGE));
            if let Some(page) = self.pages.get_mut(&(bytes / PAGE)) {
                Arc::make_mut(page)[(bytes % PAGE) as usize..].fill(0);
            }
        }
        self.bytes = bytes;
    }

    /// How many of the bytes can be written before a page is needed for which there is no room.
    fn room(&self, offset: u64, bytes: u64, new_pages: u64) -> u64 {
        let pages = offset / PAGE..(offset + bytes).div_ceil(PAGE);
        let mut missing = pages.filter(|page| !self.pages.contains_key(page));
        let first = missing.nth(new_pages as usize);
        first.map_or(bytes, |page| (page * PAGE).saturating_sub(offset))
    }

    fn new_pages(&self, offset: u64, bytes: u64) -> u64 {
        let range = offset / PAGE..(offset + bytes).div_ceil(PAGE);
        let present = self.pages.range(range.clone()).count() as u64;
        range.end.saturating_sub(range.start) - present
    }
}

impl Inode {
    /// Remembers that the sectors of a range were changed, as the cache shows them now.
    fn note_sectors(&mut self, offset: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let start = offset / SECTOR * SECTOR;
        let end = (offset + bytes).div_ceil(SECTOR) * SECTOR;
        let mut data = vec![0; (end - start) as usize];
        self.cache.read(&mut data, start);
        self.pending.push(Change::Sectors { offset: start, data: data.into() });
    }

    fn write(&mut self, data: &[u8], offset: u64) {
        if data.is_empty() {
            return;
        }
        self.cache.write(data, offset);
        let end = offset + data.len() as u64;
        self.note_sectors(offset, data.len() as u64);
        if end > self.cache.bytes {
            self.cache.bytes = end;
            self.pending.push(Change::Length(end));
        }
    }

    fn sync(&mut self) {
        for change in self.pending.drain(..) {
            match change {
                Change::Sectors { offset, data } => self.durable.write(&data, offset),
                Change::Length(bytes) => self.durable.set_len(bytes),
            }
        }
        // Where the cache shows the same, both share their pages, or the hole.
        let Inode { cache, durable, .. } = self;
        durable.pages.retain(|number, page| match cache.pages.get(number) {
            Some(cached) => {
                if !Arc::ptr_eq(cached, page) && cached == page {
                    *page = Arc::clone(cached);
                }
                true
            }
            None => page.iter().any(|byte| *byte != 0),
        });
    }

    /// Zeros in a range; whole pages become holes. That what is a hole in the cache alone is one
    /// on the disk with the next sync holds also behind a failed one, where the same bytes would
    /// have to be written again: a file system keeps holes in its journal, not in pages that a
    /// failed sync calls clean.
    fn punch(&mut self, offset: u64, bytes: u64) {
        let end = offset.saturating_add(bytes).min(self.cache.bytes);
        if offset >= end {
            return;
        }
        let holes = offset.div_ceil(PAGE)..end / PAGE;
        let touched = offset / PAGE..end.div_ceil(PAGE);
        let cached = self.cache.pages.range(touched.clone()).map(|(number, _)| *number);
        let durable = self.durable.pages.range(touched).map(|(number, _)| *number);
        let present: BTreeSet<u64> = cached.chain(durable).collect();
        for page in present {
            if holes.contains(&page) || !self.cache.pages.contains_key(&page) {
                self.cache.pages.remove(&page);
                self.note_sectors(page * PAGE, PAGE);
            } else {
                let from = offset.max(page * PAGE);
                let bytes = end.min((page + 1) * PAGE) - from;
                self.cache.write(&[0; PAGE as usize][..bytes as usize], from);
                self.note_sectors(from, bytes);
            }
        }
    }

    fn set_len(&mut self, bytes: u64) {
        if bytes < self.cache.bytes {
            self.punch(bytes, self.cache.bytes - bytes);
        }
        self.cache.set_len(bytes);
        self.pending.push(Change::Length(bytes));
    }

    fn damage(&mut self, offset: u64, length: u64, mask: u8) {
        let mut bytes = vec![0; length as usize];
        for content in [&mut self.cache, &mut self.durable] {
            content.read(&mut bytes, offset);
            bytes.iter_mut().for_each(|byte| *byte ^= mask);
            content.write(&bytes, offset);
        }
    }

    /// What a power loss leaves of the file. `keep` says how daring the loss is.
    fn crash(&self, random: &mut Random, keep: Keep) -> Content {
        let mut versions: BTreeMap<u64, Vec<[u8; SECTOR as usize]>> = BTreeMap::new();
        let mut lengths = vec![self.durable.bytes];
        for change in &self.pending {
            match change {
                Change::Sectors { offset, data } => {
                    for (index, sector) in data.chunks_exact(SECTOR as usize).enumerate() {
                        let number = offset / SECTOR + index as u64;
                        let sector = sector.try_into().expect("a chunk is a sector");
                        versions.entry(number).or_default().push(sector);
                    }
                }
                Change::Length(bytes) => lengths.push(*bytes),
            }
        }
        let mut content = self.durable.clone();
        let bytes = match keep {
            Keep::Nothing => self.durable.bytes,
            Keep::All => *lengths.last().expect("the durable length is first"),
            Keep::Some { .. } => lengths[random.below(lengths.len() as u64) as usize],
        };
        content.bytes = content.bytes.max(bytes);
        for (number, versions) in versions {
            let chosen = match keep {
                Keep::Nothing => None,
                Keep::All => versions.last(),
                Keep::Some { of_256 } => {
                    if random.below(256) < of_256 {
                        Some(&versions[random.below(versions.len() as u64) as usize])
                    } else {
                        None
                    }
                }
            };
            if let Some(sector) = chosen {
                content.write(sector, number * SECTOR);
            }
        }
        content.bytes = content.bytes.max(bytes);
        content.set_len(bytes);
        content
    }
}

/// How much of the unsynced a crash keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keep {
    Nothing,
    All,
    Some { of_256: u64 },
}

impl Keep {
    fn draw(random: &mut Random) -> Keep {
        match random.below(8) {
            0 => Keep::Nothing,
            1 => Keep::All,
            2 => Keep::Some { of_256: 16 },
            3 => Keep::Some { of_256: 240 },
            _ => Keep::Some { of_256: 128 },
        }
    }
}

impl State {
    /// Counts an operation and says whether a fault hits it.
    fn begin(&mut self, what: &str) -> io::Result<()> {
        let operation = self.operations;
        if self.off {
            return Err(eio("power is off"));
        }
        if let Some(mut recorded) = self.recorded.take() {
            recorded.push(self.clone());
            self.recorded = Some(recorded);
        }
        self.operations += 1;
        self.rot(operation);
        let mut hit = None;
        for fault in &self.faults {
            match fault {
                Fault::PowerOff { operation: at } if operation >= *at => {
                    self.off = true;
                    return Err(eio("power is off"));
                }
                Fault::Error { operation: at } if operation == *at => hit = Some(eio(what)),
                Fault::Full { operation: at } if operation == *at => {
                    hit = Some(io::ErrorKind::StorageFull.into());
                }
                _ => {}
            }
        }
        hit.map_or(Ok(()), Err)
    }

    fn is_named(&self, path: &Path, inode: u64) -> bool {
        self.names.get(path) == Some(&Node::File(inode))
    }

    /// Turns the bits that are due.
    fn rot(&mut self, now: u64) {
        let State { faults, names, inodes, .. } = self;
        faults.retain(|fault| {
            let Fault::Rot { operation, path, offset } = fault else { return true };
            if *operation != now {
                return true;
            }
            if let Some(Node::File(number)) = names.get(path) {
                inodes.get_mut(number).expect("a name leads to a file").damage(*offset, 1, 1);
            }
            false
        });
    }

    fn node(&self, path: &Path) -> io::Result<Node> {
        if self.off {
            return Err(eio("power is off"));
        }
        self.names.get(path).copied().ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("{}: no such file", path.display()))
        })
    }

    fn change_names(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.name_changes.push(change);
    }

    fn has_dir(&self, path: &Path) -> bool {
        path.parent().is_none() || self.names.get(path) == Some(&Node::Dir)
    }

    /// Forgets files that no name, durable or not, and no handle leads to.
    fn collect(&mut self) {
        let mut used = BTreeSet::new();
        for node in self.names.values().chain(self.durable_names.values()) {
            if let Node::File(inode) = node {
                used.insert(*inode);
            }
        }
        for change in &self.name_changes {
            if let NameChange::Link { node: Node::File(inode), .. }
            | NameChange::Rename { node: Node::File(inode), .. } = change
            {
                used.insert(*inode);
            }
        }
        self.inodes.retain(|number, inode| inode.handles > 0 || used.contains(number));
    }

    fn allocated_bytes(&self) -> u64 {
        self.inodes.values().map(|inode| inode.cache.pages.len() as u64 * PAGE).sum()
    }

    /// How many of `wanted` new bytes may be allocated.
    fn grant(&mut self, wanted: u64) -> u64 {
        let mut granted = wanted;
        for fault in &mut self.faults {
            if let Fault::NoSpace { bytes } = fault {
                granted = granted.min(*bytes);
                *bytes -= granted;
            }
        }
        granted
    }
}

impl MemoryDisk {
    /// An empty disk.
    #[must_use]
    pub fn new() -> MemoryDisk {
        MemoryDisk::of(State { total_bytes: 1 << 40, ..State::default() })
    }

    fn of(state: State) -> MemoryDisk {
        MemoryDisk { state: Arc::new(Mutex::new(state)) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    /// Sets a fault. Faults add up.
    pub fn inject(&self, fault: Fault) {
        self.lock().faults.push(fault);
    }

    /// Takes all faults away; power comes back on without a loss.
    pub fn clear_faults(&self) {
        let mut state = self.lock();
        state.faults.clear();
        state.off = false;
    }

    /// Whether [`Fault::PowerOff`] has not struck yet.
    #[must_use]
    pub fn has_power(&self) -> bool {
        !self.lock().off
    }

    /// How many operations that change something or sync were begun.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// How many reads of files were begun.
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.lock().reads
    }

    /// How many syncs of files succeeded.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.lock().syncs
    }

    /// Says how large the disk is; writes beyond fail with ENOSPC.
    pub fn set_total_bytes(&self, bytes: u64) {
        self.lock().total_bytes = bytes;
    }

    /// Begins to keep the disk as it is before each operation, for
    /// [`MemoryDisk::take_recorded`].
    pub fn record(&self) {
        self.lock().recorded = Some(Vec::new());
    }

    /// Ends the recording: the disk before each operation since, each on its own, and as it is now.
    /// A test stops a program at every boundary with one run of it.
    #[must_use]
    pub fn take_recorded(&self) -> Vec<MemoryDisk> {
        let recorded = self.lock().recorded.take().unwrap_or_default();
        let mut disks: Vec<MemoryDisk> =
            recorded.into_iter().map(|state| MemoryDisk::of(state).snapshot()).collect();
        disks.push(self.snapshot());
        disks
    }

    /// The same disk as it is now, cache and all, on its own from here on.
    #[must_use]
    pub fn snapshot(&self) -> MemoryDisk {
        let mut state = self.lock().clone();
        state.recorded = None;
        for inode in state.inodes.values_mut() {
            inode.handles = 0;
        }
        state.collect();
        MemoryDisk::of(state)
    }

    /// What a power loss now would leave, as another disk without faults. The same seed leaves the
    /// same.
    #[must_use]
    pub fn crash(&self, seed: u64) -> MemoryDisk {
        let state = self.lock();
        let mut random = Random(seed);
        let keep = Keep::draw(&mut random);
        let mut names = state.durable_names.clone();
        let keep_names = Keep::draw(&mut random);
        for change in &state.name_changes {
            let kept = match keep_names {
                Keep::Nothing => false,
                Keep::All => true,
                Keep::Some { of_256 } => random.below(256) < of_256,
            };
            if kept {
                change.apply(&mut names);
            }
        }
        // A name whose directory was lost is lost with it.
        let all = names.clone();
        names.retain(|path, _| {
            path.ancestors()
                .skip(1)
                .filter(|above| above.parent().is_some() && !above.as_os_str().is_empty())
                .all(|above| all.get(above) == Some(&Node::Dir))
        });
        let mut inodes = BTreeMap::new();
        for (number, inode) in &state.inodes {
            let content = inode.crash(&mut random, keep);
            let survivor = Inode { cache: content.clone(), durable: content, ..Inode::default() };
            inodes.insert(*number, survivor);
        }
        let mut after = State {
            durable_names: names.clone(),
            names,
            inodes,
            next_inode: state.next_inode,
            total_bytes: state.total_bytes,
            random: Random(seed),
            ..State::default()
        };
        after.collect();
        MemoryDisk::of(after)
    }

    /// Changes bytes behind everybody's back, in the cache and on the disk, as a decaying medium
    /// would: each is combined with `mask` by exclusive or.
    ///
    /// # Panics
    ///
    /// Where the file does not exist: the test is wrong.
    pub fn damage(&self, path: &Path, offset: u64, length: u64, mask: u8) {
        let mut state = self.lock();
        let Some(Node::File(number)) = state.names.get(path).copied() else {
            panic!("{}: no such file to damage", path.display())
        };
        let inode = state.inodes.get_mut(&number).expect("a name leads to a file");
        inode.damage(offset, length, mask);
    }
}

impl Default for MemoryDisk {
    fn default() -> MemoryDisk {
        MemoryDisk::new()
    }
}

impl Disk for MemoryDisk {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.lock();
        let number = match (state.node(path), mode) {
            (Ok(Node::Dir), _) => return Err(io::ErrorKind::IsADirectory.into()),
            (Ok(Node::File(_)), OpenMode::CreateNew) => {
                return Err(io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    format!("{}: exists", path.display()),
                ));
            }
            (Ok(Node::File(number)), _) => number,
            (Err(error), OpenMode::Read | OpenMode::ReadWrite) => return Err(error),
            (Err(_), OpenMode::Create | OpenMode::CreateNew) => {
                let dir = path.parent().unwrap_or(Path::new(""));
                if !dir.as_os_str().is_empty() && !state.has_dir(dir) {
                    return Err(io::Error::new(
                        io::ErrorKind::NotFound,
                        format!("{}: no such directory", dir.display()),
                    ));
                }
                state.begin("create")?;
                let number = state.next_inode;
                state.next_inode += 1;
                state.inodes.insert(number, Inode::default());
                let path = path.to_owned();
                state.change_names(NameChange::Link { path, node: Node::File(number) });
                number
            }
        };
        state.inodes.get_mut(&number).expect("a name leads to a file").handles += 1;
        Ok(Arc::new(MemoryFile {
            state: Arc::clone(&self.state),
            number,
            writable: mode != OpenMode::Read,
        }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        let mut missing = Vec::new();
        for above in path.ancestors() {
            if above.as_os_str().is_empty() || state.has_dir(above) {
                break;
            }
            if state.names.contains_key(above) {
                return Err(io::ErrorKind::NotADirectory.into());
            }
            missing.push(above.to_owned());
        }
        for path in missing.into_iter().rev() {
            state.begin("create a directory")?;
            state.change_names(NameChange::Link { path, node: Node::Dir });
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.lock();
        let node = state.node(from)?;
        if node == Node::Dir {
            return self.rename_dir(&mut state, from, to);
        }
        state.begin("rename")?;
        if from != to {
            let (from, to) = (from.to_owned(), to.to_owned());
            state.change_names(NameChange::Rename { from, to, node });
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if state.node(path)? == Node::Dir {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        state.begin("remove")?;
        state.change_names(NameChange::Unlink { path: path.to_owned() });
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if state.node(path)? != Node::Dir {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        let below: Vec<PathBuf> =
            state.names.keys().filter(|name| name.starts_with(path)).cloned().collect();
        for path in below.into_iter().rev() {
            state.begin("remove")?;
            state.change_names(NameChange::Unlink { path });
        }
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let state = self.lock();
        if state.off {
            return Err(eio("power is off"));
        }
        if !state.has_dir(path) {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("{}: no such directory", path.display()),
            ));
        }
        let names = state.names.keys().filter(|name| name.parent() == Some(path));
        Ok(names
            .filter_map(|name| name.file_name())
            .map(|name| name.to_string_lossy().into_owned())
            .collect())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let state = self.lock();
        Ok(path.parent().is_none() || state.names.contains_key(path))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if !state.has_dir(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.begin("sync a directory")?;
        let State { names, name_changes, durable_names, .. } = &mut *state;
        let mut gone = Vec::new();
        name_changes.retain(|change| {
            let synced = change.touches(path);
            if synced {
                change.apply(durable_names);
            }
            if let (true, NameChange::Unlink { path }) = (synced, change) {
                gone.push(path.clone());
            }
            !synced
        });
        // What a directory held goes with it for good.
        for gone in gone.iter().filter(|gone| !names.contains_key(*gone)) {
            durable_names.retain(|name, _| !name.starts_with(gone));
            name_changes.retain(|change| !change.is_below(gone));
        }
        state.collect();
        Ok(())
    }

    fn allocated(&self, path: &Path) -> u64 {
        let state = self.lock();
        match state.names.get(path) {
            Some(Node::File(number)) => {
                state.inodes.get(number).map_or(0, |inode| inode.cache.pages.len() as u64 * PAGE)
            }
            _ => 0,
        }
    }

    fn space(&self, _path: &Path) -> io::Result<Space> {
        let state = self.lock();
        let used = state.allocated_bytes();
        let mut free_bytes = state.total_bytes.saturating_sub(used);
        for fault in &state.faults {
            if let Fault::NoSpace { bytes } = fault {
                free_bytes = free_bytes.min(*bytes);
            }
        }
        Ok(Space { total_bytes: state.total_bytes, free_bytes })
    }
}

impl MemoryDisk {
    /// A directory takes all that is below it along, in one step.
    fn rename_dir(&self, state: &mut State, from: &Path, to: &Path) -> io::Result<()> {
        if state.names.keys().any(|name| name.starts_with(to) && name != to) {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        state.begin("rename")?;
        state.change_names(NameChange::RenameDir { from: from.to_owned(), to: to.to_owned() });
        Ok(())
    }
}

/// An open file.
struct MemoryFile {
    state: Arc<Mutex<State>>,
    number: u64,
    writable: bool,
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        if let Ok(mut state) = self.state.lock()
            && let Some(inode) = state.inodes.get_mut(&self.number)
        {
            inode.handles = inode.handles.saturating_sub(1);
        }
    }
}

impl MemoryFile {
    fn change<T>(
        &self,
        what: &str,
        apply: impl FnOnce(&mut State, u64) -> io::Result<T>,
    ) -> io::Result<T> {
        if !self.writable {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "opened for reading"));
        }
        let mut state = self.state.lock().expect("no holder panics");
        state.begin(what)?;
        apply(&mut state, self.number)
    }
}

fn inode(state: &mut State, number: u64) -> &mut Inode {
    state.inodes.get_mut(&number).expect("an open file is kept")
}

impl DiskFile for MemoryFile {
    fn len(&self) -> io::Result<u64> {
        let mut state = self.state.lock().expect("no holder panics");
        if state.off {
            return Err(eio("power is off"));
        }
        Ok(inode(&mut state, self.number).cache.bytes)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.change("set the length", |state, number| {
            inode(state, number).set_len(bytes);
            Ok(())
        })
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut state = self.state.lock().expect("no holder panics");
        if state.off {
            return Err(eio("power is off"));
        }
        let end = offset + buffer.len() as u64;
        let read = state.reads;
        state.reads += 1;
        let unreadable = state.faults.iter().any(|fault| match fault {
            Fault::Unreadable { path, offset: from, length } => {
                state.is_named(path, self.number) && *from < end && offset < from + length
            }
            Fault::UnreadOnce { read: at } => read == *at,
            _ => false,
        });
        if unreadable {
            return Err(eio("unreadable"));
        }
        let content = &inode(&mut state, self.number).cache;
        if end > content.bytes {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        content.read(buffer, offset);
        Ok(())
    }

    fn is_hole(&self, offset: u64, bytes: u64) -> bool {
        let pages = offset / PAGE..(offset + bytes).div_ceil(PAGE);
        let mut state = self.state.lock().expect("no holder panics");
        inode(&mut state, self.number).cache.pages.range(pages).next().is_none()
    }

    fn write_at(&self, slices: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let mut data = Vec::with_capacity(slices.iter().map(|slice| slice.len()).sum());
        slices.iter().for_each(|slice| data.extend_from_slice(slice));
        if !self.writable {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "opened for reading"));
        }
        let mut state = self.state.lock().expect("no holder panics");
        let mut keep = data.len();
        let mut outcome = Ok(());
        if let Err(error) = state.begin("write") {
            // A failed write may have happened in part; without power nothing happens any more.
            let whole = data.len() as u64 / SECTOR;
            keep = if state.off { 0 } else { (state.random.below(whole + 1) * SECTOR) as usize };
            outcome = Err(error);
        }
        let new_pages = inode(&mut state, self.number).cache.new_pages(offset, keep as u64);
        let wanted = new_pages * PAGE;
        // Over a page that exists there is always room, and counting takes a while.
        let room = match wanted {
            0 => 0,
            _ => state.total_bytes.saturating_sub(state.allocated_bytes()),
        };
        let granted = state.grant(wanted.min(room)) / PAGE * PAGE;
        if granted < wanted {
            let content = &inode(&mut state, self.number).cache;
            keep = content.room(offset, keep as u64, granted / PAGE) as usize;
            outcome = Err(io::ErrorKind::StorageFull.into());
        }
        inode(&mut state, self.number).write(&data[..keep], offset);
        let end = offset + keep as u64;
        let mut faults = std::mem::take(&mut state.faults);
        faults.retain(|fault| {
            !matches!(fault, Fault::Unreadable { path, offset: from, length }
                if state.is_named(path, self.number) && offset <= *from && from + length <= end)
        });
        state.faults = faults;
        outcome
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.state.lock().expect("no holder panics");
        let operation = state.operations;
        let begun = state.begin("sync");
        let lying = state.faults.iter().position(
            |fault| matches!(fault, Fault::FailedSync { operation: at } if operation >= *at),
        );
        if state.off {
            return begun;
        }
        if let Some(index) = lying {
            state.faults.remove(index);
        }
        if lying.is_some() || begun.is_err() {
            let mut random = Random(state.random.next());
            let keep = Keep::draw(&mut random);
            let inode = inode(&mut state, self.number);
            inode.durable = inode.crash(&mut random, keep);
            inode.pending.clear();
            return Err(eio("sync"));
        }
        state.syncs += 1;
        inode(&mut state, self.number).sync();
        Ok(())
    }

    fn start_writeback(&self, _offset: u64, _bytes: u64) {}

    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.change("punch a hole", |state, number| {
            inode(state, number).punch(offset, bytes);
            Ok(())
        })
    }

    fn drop_cache(&self, _offset: u64, _bytes: u64) {}
}

#[cfg(test)]
mod tests;
