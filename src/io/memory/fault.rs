//! What goes wrong with the disk in memory.

use std::path::PathBuf;

#[cfg(doc)]
use super::MemoryDisk;

/// Something that goes wrong, set with [`MemoryDisk::inject`]. Operations are counted as
/// [`MemoryDisk::operations`] tells: those that change something, and syncs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// From this operation number on, nothing works and nothing changes.
    PowerOff {
        /// The first operation that fails.
        operation: u64,
    },
    /// This one operation fails with EIO; a write may have happened in part.
    Error {
        /// The operation that fails.
        operation: u64,
    },
    /// The first sync of a file at or after this operation number fails, and the cache lies from
    /// then on.
    FailedSync {
        /// The first operation that it may be.
        operation: u64,
    },
    /// So many bytes more can be allocated, then ENOSPC.
    NoSpace {
        /// Bytes, in pages of 4096.
        bytes: u64,
    },
    /// Reads that touch this part of this file fail with EIO, until one write covers all of it.
    Unreadable {
        /// The file.
        path: PathBuf,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// This one read fails with EIO, and none after it: reads are counted as
    /// [`MemoryDisk::reads`] tells.
    UnreadOnce {
        /// The read that fails.
        read: u64,
    },
    /// This one operation fails with ENOSPC; a write may have happened in part.
    Full {
        /// The operation that fails.
        operation: u64,
    },
    /// Before this operation a bit of this byte of this file turns.
    Rot {
        /// The operation.
        operation: u64,
        /// The file.
        path: PathBuf,
        /// The byte.
        offset: u64,
    },
}
