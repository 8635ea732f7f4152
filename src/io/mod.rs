//! The one door to the world outside the process: disk, clock and randomness, each behind a narrow
//! trait, so that a seeded simulation can stand in for all of them.
//!
//! `files` is the real disk (with `ring` for batched reads where io_uring is allowed); `memory` is
//! a disk that loses, reorders and tears what was not synced.

mod clock;
mod disk;
mod entropy;
mod files;
mod memory;
mod ring;

use std::sync::Arc;

pub use clock::{Clock, ManualClock, SystemClock};
pub use disk::{BatchRead, Disk, DiskFile, OpenMode, Space, Unread, is_full, read_around};
#[cfg(test)]
pub(crate) use entropy::seeds;
pub use entropy::{Entropy, KernelEntropy, SeededEntropy};
pub use files::FileDisk;
pub use memory::{Fault, MemoryDisk};
pub use ring::{UringState, read_uring_state};

/// All that comes in from outside, handed down to every room that needs it.
#[derive(Clone)]
pub struct Env {
    /// Where files live.
    pub disk: Arc<dyn Disk>,
    /// What time it is.
    pub clock: Arc<dyn Clock>,
    /// Where random numbers come from.
    pub entropy: Arc<dyn Entropy>,
}

impl Env {
    /// The real disk, clock and randomness.
    #[must_use]
    pub fn real() -> Env {
        Env {
            disk: Arc::new(FileDisk::new()),
            clock: Arc::new(SystemClock::new()),
            entropy: Arc::new(KernelEntropy),
        }
    }
}
