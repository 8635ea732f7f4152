//! What can be served: a device behind a name, as sessions see it, and how its errors are told.
//!
//! Sessions speak the group's own types ([`Request`], [`Read`], [`Extent`]), so that nothing is
//! translated on the way of a write; the traits let a test put a device in memory in place of a
//! group.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use super::wire::{Errno, export_flag};
use crate::group::{Done, Extent, GroupError, HangUp, Read, Request};
use crate::units::{Lsn, VolumeNumber};

/// What an export is and can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The name that LIST shows.
    pub name: String,
    /// A line for people.
    pub description: String,
    /// Bytes, when asked.
    pub size_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
}

impl ExportInfo {
    /// The transmission flags of this export.
    #[must_use]
    pub fn flags(&self, structured_replies: bool) -> u16 {
        use export_flag::*;
        // Several connections may share an export because a flush covers the whole log, whoever
        // wrote it, and a read-only image does not change.
        let mut flags = HAS_FLAGS | SEND_FLUSH | SEND_CACHE | CAN_MULTI_CONN;
        flags |= if self.read_only {
            READ_ONLY
        } else {
            SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO
        };
        if structured_replies {
            flags |= SEND_DF;
        }
        flags
    }
}

/// Why an export is not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Nothing has this name. The text says which name and what to try.
    Unknown(String),
    /// It exists, and this node does not serve it now. The text says why and where to go.
    Policy(String),
    /// The node is on its way down.
    Shutdown,
}

/// The exports of a node.
pub trait Exports: Send + Sync {
    /// All that can be opened now, by name.
    fn list(&self) -> Vec<ExportInfo>;
    /// The device behind a name; the empty name is the default export.
    fn open(&self, name: &str) -> Result<Arc<dyn Device>, Refusal>;
}

/// One export. Methods are called from many threads at once.
pub trait Device: Send + Sync {
    /// What it is.
    fn info(&self) -> ExportInfo;
    /// The volume that requests and reads name.
    fn volume(&self) -> VolumeNumber;
    /// Counts a client until the guard is dropped; `hang_up` ends its connection, which comes from
    /// `address`.
    ///
    /// # Errors
    ///
    /// Where it has come to be served to nobody since it was opened.
    fn attach(&self, address: &str, hang_up: HangUp) -> Result<Box<dyn Any + Send>, GroupError>;
    /// Whether requests are still served; if not, why, for a client that is told ESHUTDOWN.
    fn check_serving(&self) -> Result<(), GroupError> {
        Ok(())
    }
    /// As [`crate::group::Group::has_room_within`]. Never called on a read-only export.
    fn has_room_within(&self, _at_most: Duration) -> bool {
        true
    }
    /// As [`crate::group::Group::append_until`]. Never called on a read-only export.
    fn append(
        &self,
        requests: &[Request<'_>],
        ended: &dyn Fn() -> bool,
    ) -> Vec<Result<Lsn, GroupError>>;
    /// As [`crate::group::Group::is_held`]: whether a write that ends at `lsn` may be answered.
    fn is_held(&self, _lsn: Lsn) -> bool {
        true
    }
    /// As [`crate::group::Group::when_held`]. Only called where that is not so.
    fn when_held(&self, _lsn: Lsn, done: Done) {
        done(Ok(()));
    }
    /// As [`crate::group::Group::when_durable`]. Never called on a read-only export.
    fn when_durable(&self, lsn: Lsn, done: Done);
    /// As [`crate::group::View::read`].
    fn read(&self, reads: &mut [Read<'_>]);
    /// As [`crate::group::View::extents`], of this export's volume.
    fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, GroupError>;
}

/// How an error of the engine is told to a client; `writing` where the request would change data.
pub(super) fn errno_of(error: &GroupError, writing: bool) -> Errno {
    match error {
        GroupError::OutOfRange { .. } if writing => Errno::Enospc,
        GroupError::OutOfRange { .. } => Errno::Einval,
        GroupError::NoSpace { .. } => Errno::Enospc,
        GroupError::NotPrimary { .. }
        | GroupError::NoVolume { .. }
        | GroupError::Refused { .. } => Errno::Eshutdown,
        GroupError::NotFound { .. }
        | GroupError::Exists { .. }
        | GroupError::Failed { .. }
        | GroupError::NotCovered { .. }
        | GroupError::Damaged { .. }
        | GroupError::Waits { .. }
        | GroupError::Io { .. } => Errno::Eio,
    }
}
