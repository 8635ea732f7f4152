//! The disk as the engine sees it: a tree of files, with a contract per method that says what a
//! crash may take away.
//!
//! A write is *volatile* until a [`DiskFile::sync`] that began after it has ended. A name (create,
//! rename, remove) is volatile until [`Disk::sync_dir`] of its directory. After a failed sync,
//! reads may show bytes that the disk does not hold: the caller latches the failure.

use std::io::{self, IoSlice};
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::Arc;

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file, for reading.
    Read,
    /// An existing file, for reading and writing.
    ReadWrite,
    /// A new file, for reading and writing; an error where the name is taken.
    CreateNew,
    /// A file that is made where it is missing, for reading and writing.
    Create,
}

/// Room on the file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// Bytes of the whole file system.
    pub total_bytes: u64,
    /// Bytes that this process may still use.
    pub free_bytes: u64,
}

/// One read of a batch.
pub struct BatchRead<'a> {
    /// The file to read from.
    pub file: &'a dyn DiskFile,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// Filled completely, or `result` is an error; past the end of the file is `UnexpectedEof`.
    pub buffer: &'a mut [u8],
    /// How it went. `Ok` before the batch runs.
    pub result: io::Result<()>,
}

/// A tree of files.
pub trait Disk: Send + Sync {
    /// Opens a file.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>>;
    /// Makes a directory and those above it; no error where it exists.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Gives a file a new name in the same file system, replacing what has that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Removes a directory with all that is in it.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// The names in a directory, sorted.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;
    /// Whether something has this name. An error is no answer: what is there may not be made anew.
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// The bytes that a file takes on the disk, holes left out; none where it cannot be told.
    fn allocated(&self, path: &Path) -> u64;
    /// Room on the file system that holds `path`.
    fn space(&self, path: &Path) -> io::Result<Space>;
    /// Runs all reads, in any order, and returns when each has its result. A lone read, or a disk
    /// without a ring, reads one after the other.
    fn read_batch(&self, reads: &mut [BatchRead<'_>]) {
        for read in reads {
            read.result = read.file.read_at(read.buffer, read.offset);
        }
    }
}

/// What could not be read of a part of a file.
#[derive(Debug)]
pub struct Unread {
    /// Behind the last byte of it, in the file.
    pub end: u64,
    /// What the disk said first.
    pub cause: io::Error,
}

/// Whether the disk has no room: the file system's, or what a quota leaves of it.
#[must_use]
pub fn is_full(cause: &io::Error) -> bool {
    matches!(cause.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Reads what can be read of `[offset, offset + buffer.len())`; the rest is zeros.
pub fn read_around(file: &dyn DiskFile, buffer: &mut [u8], offset: u64) -> Option<Unread> {
    let cause = file.read_at(buffer, offset).err()?;
    let mut end = None;
    // By pages, and where one fails by sectors.
    parts(buffer, offset, 4096, &mut |page, at| {
        if file.read_at(page, at).is_ok() {
            return;
        }
        parts(page, at, 512, &mut |sector, at| {
            if file.read_at(sector, at).is_err() {
                sector.fill(0);
                end = Some(at + sector.len() as u64);
            }
        });
    });
    end.map(|end| Unread { end, cause })
}

/// Calls `each` with the parts of a buffer that lie between multiples of `bytes` in the file.
fn parts(buffer: &mut [u8], offset: u64, bytes: u64, each: &mut dyn FnMut(&mut [u8], u64)) {
    let (mut rest, mut at) = (buffer, offset);
    while !rest.is_empty() {
        let count = ((bytes - at % bytes) as usize).min(rest.len());
        let (part, behind) = rest.split_at_mut(count);
        each(part, at);
        at += count as u64;
        rest = behind;
    }
}

/// An open file. Offsets and lengths are bytes. All methods may be called from any thread.
pub trait DiskFile: Send + Sync {
    /// The file's length.
    fn len(&self) -> io::Result<u64>;
    /// Whether the file has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Cuts the file, or extends it by a hole.
    fn set_len(&self, bytes: u64) -> io::Result<()>;
    /// Fills `buffer` from `offset`; `UnexpectedEof` where the file ends before.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// The same for who checks what is there: what the cache did not hold before, it does not hold
    /// afterwards, and nothing is read ahead. What it held stays.
    fn read_once(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_at(buffer, offset)
    }
    /// Whether nothing was written to a range inside of the file since it was made or punched, as
    /// far as that is known without a read; `false` where it is not.
    fn is_hole(&self, _offset: u64, _bytes: u64) -> bool {
        false
    }
    /// Writes all slices, one behind the other, from `offset`. On error any part may be written.
    fn write_at(&self, slices: &[IoSlice<'_>], offset: u64) -> io::Result<()>;
    /// Makes what was written before the call durable, and what is needed to read it back.
    fn sync(&self) -> io::Result<()>;
    /// Asks for write-back of a range to begin; promises nothing.
    fn start_writeback(&self, offset: u64, bytes: u64);
    /// Makes a range read as zeros and gives its space back where the file system can.
    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()>;
    /// Says that a range will not be read again soon, so that it need not stay in the cache.
    fn drop_cache(&self, offset: u64, bytes: u64);
    /// The descriptor, for a ring; `None` on a disk that is not real.
    fn raw_fd(&self) -> Option<RawFd> {
        None
    }
}
