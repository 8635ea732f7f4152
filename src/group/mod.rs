//! The engine: one consistency group, its log, its map, its base, and the images of its past.
//!
//! A [`Group`] is passive, synchronous code behind one mutex; `worker` gives it its threads (sync,
//! fold). Who writes calls [`Group::append`]; who replicates reads the log by position with
//! [`Group::read_log`] and appends with [`Group::append_received`]; who shows the past opens an
//! [`Image`].

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::events::Events;
use crate::io::Env;
use crate::log::control::{
    BookmarkRecord, EpochRecord, JobRecord, MemberRecord, PolicyRecord, RewindRecord,
};
use crate::units::{Chain, EpochId, LogTime, Lsn, Name, NodeId, Position, VolumeNumber};

/// Who this node is, as far as its groups need to know.
#[derive(Clone, Debug)]
pub struct NodeIdentity {
    /// The node's random identity.
    pub id: NodeId,
    /// Its configured name.
    pub name: Name,
}

/// Limits that belong to the node and lower a group's own.
#[derive(Clone, Debug, Default)]
pub struct LocalLimits {
    /// Window at most.
    pub window: Option<Duration>,
    /// Bytes of log at most.
    pub log_limit_bytes: Option<u64>,
    /// Bytes of the file system that are left alone; default two segments and 1 %.
    pub disk_reserve_bytes: Option<u64>,
}

/// What every group of a node shares.
#[derive(Clone)]
pub struct GroupContext {
    /// Disk, clock, randomness.
    pub env: Env,
    /// Who this node is.
    pub node: NodeIdentity,
    /// The node's own limits.
    pub limits: LocalLimits,
    /// A directory on another file system, which a boot of the machine clears: where failures of
    /// the groups' disk are written down (`latch.rs`).
    pub failures: Option<PathBuf>,
    /// Where events go.
    pub events: Events,
}

/// Whose turn it is to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The last epoch is its own, and it has not given it up.
    Primary,
    /// It follows.
    Secondary,
}

/// What the data here is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DataState {
    /// No image yet, or none any more: what is damaged here is no moment of the group.
    None,
    /// No image yet, and one is coming.
    ReceivingImage,
    /// A complete, readable, promotable image.
    Consistent,
    /// A disk error: reads go on, writes do not.
    Failed,
    /// Replication was stopped here: readable, never eligible for backup.
    Retired,
}

/// All positions of a group at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Positions {
    /// After the last record appended.
    pub head: Lsn,
    /// After the last record that ends a request: what `now` means.
    pub request_end: Lsn,
    /// Up to which the log survives power loss here.
    pub durable: Lsn,
    /// Up to which the primary has told it is durable there. On the primary: `durable`.
    pub committed: Lsn,
    /// Up to which records are folded into the base.
    pub horizon: Lsn,
    /// Checksum of the last record.
    pub chain: Chain,
    /// Epoch of the last record.
    pub epoch: EpochId,
    /// Log time of the last record.
    pub time: LogTime,
    /// Log time at the horizon.
    pub horizon_time: LogTime,
    /// Requests up to `head`.
    pub requests: u64,
    /// How often the end of the log was cut since the start.
    pub cuts: u64,
    /// Bytes that log and index take on disk, as last looked at; holes of their files not counted.
    pub log_used_bytes: u64,
    /// Bytes that the log may take.
    pub log_limit_bytes: u64,
}

/// A volume as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its number in records.
    pub number: VolumeNumber,
    /// Its name.
    pub name: Name,
    /// Bytes.
    pub size_bytes: u64,
    /// Where a restore last began to replace what it holds; `None` where none ever did.
    pub restore_lsn: Option<Lsn>,
    /// That restore has not come to its end: what the volume holds is of no one moment.
    pub restoring: bool,
}

/// What the control records say at one position.
#[derive(Clone, Debug, Default)]
pub struct ControlView {
    /// Volumes that exist, by number.
    pub volumes: Vec<Volume>,
    /// Nodes that hold the group.
    pub members: Vec<MemberRecord>,
    /// Window and limits.
    pub policy: PolicyRecord,
    /// Backup jobs.
    pub jobs: Vec<JobRecord>,
    /// Bookmarks, by position.
    pub bookmarks: Vec<BookmarkRecord>,
    /// Every reign, oldest first.
    pub epochs: Vec<EpochRecord>,
    /// The rewinds that are known, oldest first: those behind the horizon, and the last before.
    pub rewinds: Vec<RewindView>,
}

/// A rewind, as its record tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RewindView {
    /// Where its record begins: up to here goes what it left behind.
    pub at: Position,
    /// Where it went back to.
    pub to: Lsn,
    /// Log time there.
    pub to_time: LogTime,
}

/// What [`Group::rewind`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewound {
    /// The end of the record.
    pub at: Lsn,
    /// The end of what was left behind: going back there undoes it.
    pub from: Position,
    /// Where it went back to.
    pub to: Position,
}

/// What a host asks for.
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    /// Bytes at an offset.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes.
        data: &'a [u8],
    },
    /// A range that reads as zeros from now on.
    Zero {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Keep the space.
        no_hole: bool,
    },
    /// A range that is no longer needed; reads as zeros.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// A flush: appended only where it covers new bytes.
    Flush,
}

/// One request of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The volume; any number for a flush.
    pub volume: VolumeNumber,
    /// What to do.
    pub op: Op<'a>,
    /// Durable when answered; the caller waits by [`Group::when_durable`].
    pub fua: bool,
}

/// One read of a batch.
pub struct Read<'a> {
    /// The volume.
    pub volume: VolumeNumber,
    /// First byte.
    pub offset: u64,
    /// Filled completely, or `result` is an error.
    pub buffer: &'a mut [u8],
    /// How it went. `Ok(())` before the batch runs.
    pub result: Result<(), GroupError>,
}

/// What a range of a volume holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Bytes.
    Data,
    /// Reads as zeros, space kept.
    Zero,
    /// Reads as zeros, takes no space.
    Hole,
}

/// A run of equal allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// What is there.
    pub allocation: Allocation,
}

/// A group or an image, for those who only read: NBD, backup, verify.
pub trait View: Send + Sync {
    /// The volumes in it.
    fn volumes(&self) -> Vec<Volume>;
    /// Runs a batch of reads; each carries its own result.
    fn read(&self, reads: &mut [Read<'_>]);
    /// What `[offset, offset + length)` holds, in order, without gaps, at most `limit` runs (the
    /// answer then ends early).
    fn extents(
        &self,
        volume: VolumeNumber,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Result<Vec<Extent>, GroupError>;
}

/// Where in time: `now`, a time, `lsn:N` or a bookmark's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Point {
    /// The last request's end.
    Now,
    /// The last request's end at or before a log time.
    Time(LogTime),
    /// The last request's end at or before a position.
    Lsn(Lsn),
    /// A bookmark.
    Bookmark(Name),
}

/// The name of a group's part, in front of what is said of it; nothing for the group itself.
fn part(what: &str, name: &str) -> String {
    if what == "group" { String::new() } else { format!("{what} `{name}` ") }
}

/// What failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each message says it")]
pub enum GroupError {
    #[error(
        "group {group}: volume {volume}: does not exist; `tidelog volume list` shows those that do"
    )]
    NoVolume { group: Name, volume: String },
    #[error("group {group}: {what} `{name}` does not exist")]
    NotFound { group: Name, what: &'static str, name: String },
    #[error("group {group}: {}exists already", part(what, name))]
    Exists { group: Name, what: &'static str, name: String },
    #[error("group {group}: request of {length} bytes at {offset} is outside of the volume")]
    OutOfRange { group: Name, offset: u64, length: u64 },
    #[error(
        "group {group}: is not the primary here, so it takes no writes; `tidelog status` shows who is"
    )]
    NotPrimary { group: Name },
    #[error("group {group}: failed: {reason}; restart the node once the disk is well")]
    Failed { group: Name, reason: String },
    #[error("group {group}: no space: {reason}")]
    NoSpace { group: Name, reason: String },
    #[error("group {group}: {point} is not covered: the log reaches from {from} to {to}")]
    NotCovered { group: Name, point: String, from: Lsn, to: Lsn },
    #[error("group {group}: damaged: {what}")]
    Damaged { group: Name, what: String },
    #[error(
        "group {group}: not folded until this is repaired, or writers need the room: {what}; \
         `tidelog status {group}` says under `damaged` why it was not yet"
    )]
    Waits { group: Name, what: String },
    #[error("group {group}: {what}: {cause}")]
    Io { group: Name, what: String, cause: String },
    #[error("group {group}: {what}")]
    Refused { group: Name, what: String },
}

/// Bytes that a peer sent do not continue this log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("received log at {at}: {what}")]
pub struct ReceiveError {
    /// Where.
    pub at: Lsn,
    /// What is wrong.
    pub what: String,
}

use content::VOLUME_BYTES_MAX;

/// Called once when a wait ends; must not block.
pub type Done = Box<dyn FnOnce(Result<(), GroupError>) + Send>;

mod account;
mod adopt;
mod append;
mod branch;
mod clients;
mod clock;
mod content;
mod engine;
mod extents;
mod files;
mod fold;
mod fold_damage;
mod fold_plan;
mod holds;
mod image;
mod indexing;
mod keep;
mod latch;
mod lost;
mod merging;
mod meta;
mod moment;
mod needs;
mod outlast;
mod point;
mod ranges;
mod read;
mod receive;
mod recover;
mod recovery_decision;
mod registry;
mod reign;
mod reopen;
mod repair;
mod replay;
mod required;
mod returning;
mod rewind;
mod rewound;
mod room;
mod scrub;
mod shipment;
mod staging;
mod switch;
mod sync;
mod timeline;
mod worker;

pub use account::{Account, VolumeAccount};
pub use adopt::{Contents, runs_of_zeros};
pub use append::REQUEST_BYTES_MAX;
pub use branch::Branch;
pub use clients::{ClientGuard, HangUp, Host, RestoreClaim};
pub use engine::{Group, NewGroup};
pub use image::Image;
pub use moment::Cost;
pub use ranges::Place;
pub use recover::Recovery;
pub use registry::{NotOpened, Registry};
pub use reign::TookOver;
pub use repair::{Gap, Mended, Wanted};
pub use required::RequiredPeer;
pub use returning::Discard;
pub use room::{DiskRoom, Shortage};
pub use scrub::{DamagedPart, Found};
pub use shipment::Shipment;
pub use staging::{ImageOffer, ImagePart, ImageProgress, Reached, Staged};

#[cfg(test)]
mod tests;
