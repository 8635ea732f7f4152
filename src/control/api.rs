//! The types that the control socket's server and its clients share: answers as JSON, with the
//! names that scripts rely on.

pub use crate::group::Role;
use crate::log::control::{Consistency, OnFull, OnPeerBehind};
use crate::units::{ByteSize, EpochId, GroupId, LogTime, Lsn, Name, NodeId, Position, Span};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use super::attention::Attention;
pub use crate::backup::{
    BackupEntry, Explanation, Listing as Backups, Manifest, Outcome, Reason, RunStarted, SlotAlarm,
    Verdict as RunVerdict, Verified,
};
pub use crate::group::{Branch, DataState, Host};
pub use crate::replication::{
    BackupCapable, DamageInfo, DifferingExtent, Invite, LagState, Parting, PeerInfo, PeerStatus,
    Preview, ScrubState, ScrubStatus, Side, SideHost, Verdict, VerifyState, VerifyStatus,
};

/// Bytes of the block size that volumes announce.
pub const VOLUME_BLOCK_BYTES: u64 = crate::units::BLOCK_BYTES;

/// `GET /v1/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// This node's name.
    pub node: Name,
    /// The version of its program.
    pub version: String,
    /// Its groups, by name.
    pub groups: Vec<GroupStatus>,
    /// Groups on its disk that could not be opened.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unopened_groups: Vec<UnopenedGroup>,
    /// Slots of jobs that have no backup, or of which nobody can say.
    pub backup_alarms: Vec<SlotAlarm>,
    /// Jobs whose newest run failed on this node, where no backup is known that makes up for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backup_failures: Vec<SlotAlarm>,
    /// What an operator has to do, gravest first: what `status --check` tells.
    pub attention: Vec<Attention>,
}

/// A group that could not be opened; one that found no room on the disk, or its name taken by
/// another that is open, is tried again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UnopenedGroup {
    /// The name of its directory: the group's id.
    pub id: String,
    /// Its name, where that could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// Why.
    pub reason: String,
    /// Since when.
    pub since: LogTime,
}

/// One group as this node sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Its name.
    pub name: Name,
    /// This node's role in it.
    pub role: Role,
    /// Why it is primary and does not serve yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role_reason: Option<String>,
    /// The epoch of the last record.
    pub epoch: EpochId,
    /// What the data here is worth.
    pub data_state: DataState,
    /// Why the data state is not `consistent`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_state_reason: Option<String>,
    /// Since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_state_since: Option<LogTime>,
    /// Where the node was not stopped in order before this start: the span in which answered but
    /// unflushed writes may be missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unclean_start: Option<UncleanStart>,
    /// Its volumes, by number.
    pub volumes: Vec<VolumeStatus>,
    /// Its log.
    pub log: LogStatus,
    /// How far back one can go now.
    pub protection_window: ProtectionWindow,
    /// The copies of it; on a secondary, the primary.
    pub peers: Vec<PeerStatus>,
    /// Whether this copy may be backed up now.
    pub backup_capable: BackupCapable,
    /// Tails that left the history, which this node alone keeps.
    #[serde(default)]
    pub branches: Vec<Branch>,
    /// What is damaged of it on this node's disk.
    #[serde(default)]
    pub damage: Vec<DamageInfo>,
    /// The scrub that runs here, or the last one.
    #[serde(default)]
    pub scrub: Option<ScrubStatus>,
    /// The comparison with a peer that runs here, or the last one.
    #[serde(default)]
    pub verify: Option<VerifyStatus>,
    /// For each peer the last comparison that found a difference, until one finds none.
    #[serde(default)]
    pub differences: Vec<VerifyStatus>,
}

/// `GET /v1/groups/GROUP/scrub`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ScrubAnswer {
    /// The scrub that runs here, or the last one; none where there never was one.
    pub scrub: Option<ScrubStatus>,
    /// What is damaged of the group on this node's disk.
    pub damage: Vec<DamageInfo>,
}

/// The span in which answered but unflushed writes may be missing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UncleanStart {
    /// Everything that ends at or before this is there.
    pub from_lsn: Lsn,
    /// The end of what was seen of the log.
    pub to_lsn: Lsn,
    /// Log time at `from_lsn`.
    pub from: LogTime,
    /// When the node started again.
    pub to: LogTime,
}

/// A volume in its group's status.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: Name,
    /// Bytes.
    pub size_bytes: u64,
    /// Bytes that writes are best a multiple of.
    pub block_size_bytes: u64,
    /// Connections that have it open as it is now.
    pub clients: usize,
    /// Who they are of, and who has an image of it open on this node; oldest first.
    #[serde(default)]
    pub hosts: Vec<Host>,
    /// A restore into it has not come to its end: no host is served it.
    #[serde(default)]
    pub restoring: bool,
}

/// Positions and room of a log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LogStatus {
    /// After the last record appended.
    pub head_lsn: Lsn,
    /// Up to which it survives power loss here.
    pub durable_lsn: Lsn,
    /// Up to which it is durable on the primary.
    pub committed_lsn: Lsn,
    /// Up to which it is folded into the base.
    pub horizon_lsn: Lsn,
    /// Bytes from the horizon to the head: what the limit counts.
    pub used_bytes: u64,
    /// Bytes that its files take on disk, as last looked at: segments that are ready for later use
    /// and indices included, holes not counted.
    #[serde(default)]
    pub allocated_bytes: u64,
    /// Bytes used at most.
    pub limit_bytes: u64,
    /// Why that is not the limit that the group was given, where it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_reason: Option<String>,
    /// Why writers are slowed or refused, where they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_reason: Option<String>,
    /// Since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_since: Option<LogTime>,
    /// Bytes that are free on the file system, as last looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_free_bytes: Option<u64>,
    /// Bytes of them that are to stay free (`disk_reserve`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_reserve_bytes: Option<u64>,
    /// Why the log is not folded, where that fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fold_reason: Option<String>,
    /// Since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fold_since: Option<LogTime>,
}

/// How far back one can go.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProtectionWindow {
    /// Log time at the horizon.
    pub from: LogTime,
    /// Log time at the head.
    pub to: LogTime,
    /// Between them.
    pub seconds: f64,
}

/// `GET /v1/groups`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Groups {
    /// By name.
    pub groups: Vec<GroupInfo>,
}

/// A group and what its nodes agree on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupInfo {
    /// Its name.
    pub name: Name,
    /// Its identity on every node.
    pub id: GroupId,
    /// This node's role in it.
    pub role: Role,
    /// What the data here is worth.
    pub data_state: DataState,
    /// Bytes of a segment of its log.
    pub segment_bytes: u64,
    /// Its volumes' names.
    pub volumes: Vec<Name>,
    /// Window and limits.
    pub policy: PolicyInfo,
    /// The nodes that hold it.
    pub members: Vec<MemberInfo>,
    /// Every reign, oldest first.
    pub epochs: Vec<EpochInfo>,
}

/// Window and limits of a group.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicyInfo {
    /// How far back one wants to go.
    pub window: Span,
    /// Bytes of log at most.
    pub log_limit: ByteSize,
    /// What happens there.
    pub on_full: OnFull,
    /// What happens about a peer that lacks what is to be folded.
    #[serde(default)]
    pub on_peer_behind: OnPeerBehind,
}

/// A node that holds a group.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MemberInfo {
    /// The node.
    pub node: NodeId,
    /// Its name.
    pub name: Name,
    /// When a write is answered.
    pub mode: crate::log::control::Mode,
    /// What hosts do without it, where the mode has them wait for it.
    #[serde(default)]
    pub on_loss: crate::log::control::OnLoss,
    /// The age that its copy may have.
    pub rpo_target_seconds: Option<f64>,
}

/// One reign.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EpochInfo {
    /// Counts the reigns from 1.
    pub counter: u64,
    /// Its identity.
    pub epoch: EpochId,
    /// Where it begins.
    pub lsn: Lsn,
    /// The node that reigns.
    pub author: Name,
    /// Why it began.
    pub reason: String,
}

/// `GET /v1/volumes`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Volumes {
    /// By group and number.
    pub volumes: Vec<VolumeInfo>,
}

/// A volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Its group.
    pub group: Name,
    /// Its name.
    pub name: Name,
    /// Bytes.
    pub size_bytes: u64,
    /// Bytes that writes are best a multiple of.
    pub block_size_bytes: u64,
    /// Connections that have it open as it is now.
    pub clients: usize,
    /// Who they are of, and who has an image of it open on this node; oldest first.
    #[serde(default)]
    pub hosts: Vec<Host>,
    /// A restore into it has not come to its end: no host is served it.
    #[serde(default)]
    pub restoring: bool,
    /// The name of its NBD export.
    pub export: String,
    /// This node's role in its group: only the primary exports it.
    pub role: Role,
}

/// A bookmark.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BookmarkInfo {
    /// Its name.
    pub name: Name,
    /// The image that it names.
    pub position: Position,
    /// What the moment is good for.
    pub consistency: Consistency,
    /// Whether an image of it can be opened on this node: the log covers it, or it is kept.
    pub covered: bool,
    /// It is kept when the log no longer covers it.
    #[serde(default)]
    pub pinned: bool,
    /// Why it is not kept on this node although it is pinned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin_lost: Option<String>,
}

/// `GET /v1/groups/GROUP/bookmarks`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Bookmarks {
    /// By position.
    pub bookmarks: Vec<BookmarkInfo>,
}

/// `GET /v1/groups/GROUP/timeline`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Timeline {
    /// The group.
    pub group: Name,
    /// How far back one can go.
    pub window: TimelineWindow,
    /// Every reign, oldest first.
    pub epochs: Vec<EpochInfo>,
    /// By position.
    pub bookmarks: Vec<BookmarkInfo>,
    /// Where the group went back, oldest first.
    #[serde(default)]
    pub rewinds: Vec<RewindInfo>,
    /// What needs an old moment.
    pub holds: Vec<HoldInfo>,
    /// Tails that are not part of this history.
    #[serde(default)]
    pub branches: Vec<Branch>,
}

/// A rewind: what was between the two was left behind, and can be read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RewindInfo {
    /// Where and when the group went back; the image there is the last one left behind.
    pub at: Position,
    /// To where.
    pub to: Position,
}

/// `POST /v1/groups/GROUP/rewind`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RewindDone {
    /// The group.
    pub group: Name,
    /// Where it is now; data and volumes are those of `to`.
    pub lsn: Lsn,
    /// What was left behind ends here: going back to this undoes it.
    pub from: Position,
    /// Where it went back to.
    pub to: Position,
}

/// The two ends of a window, as positions.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TimelineWindow {
    /// The oldest image.
    pub from: Position,
    /// The newest.
    pub to: Position,
}

/// What needs an old moment: an image, a pinned bookmark or a branch, and what that costs this
/// node. Those at one position share what is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HoldInfo {
    /// Whose it is: who opened the image; `pin`; `branch`.
    pub owner: String,
    /// The image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Name>,
    /// The bookmark.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bookmark: Option<Name>,
    /// The branch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// Where; of a branch, where it leaves the history.
    pub position: Position,
    /// Bytes of blocks that folds have kept for it; of a branch, with its own log.
    #[serde(default)]
    pub disk_bytes: u64,
    /// Bytes of memory: maps, shared ones included.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Why it cannot be read on this node, where it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<String>,
}

/// `GET /v1/groups/GROUP/branches`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Branches {
    /// By where they leave the history.
    pub branches: Vec<Branch>,
}

/// `GET /v1/images`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Images {
    /// By group and name.
    pub images: Vec<ImageInfo>,
}

/// An opened image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Its group.
    pub group: Name,
    /// Its name.
    pub name: Name,
    /// What it shows.
    pub position: Position,
    /// Who opened it.
    pub owner: String,
    /// When.
    pub opened: LogTime,
    /// The branch that it shows, where it shows one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// Why it can no longer be read, where it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<String>,
    /// The names of its NBD exports.
    pub exports: Vec<String>,
}

/// `POST /v1/peers/join`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Joined {
    /// The peer's name.
    pub name: Name,
    /// Its identity.
    pub node: NodeId,
}

/// `GET /v1/peers`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Peers {
    /// By name.
    pub peers: Vec<PeerInfo>,
}

/// `POST /v1/peers/rotate`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Rotated {
    /// Of the new key.
    pub fingerprint: String,
}

/// `GET /v1/jobs`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Jobs {
    /// By group.
    pub jobs: Vec<JobInfo>,
}

/// A backup job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobInfo {
    /// Its group.
    pub group: Name,
    /// Its name.
    pub name: Name,
    /// The repository's name in each node's configuration.
    pub repository: String,
    /// A cron pattern; none where it runs by command only.
    pub schedule: Option<String>,
    /// The zone of the schedule; UTC where there is none.
    pub zone: Option<String>,
    /// From when on its slots count: when it was made, or its schedule, zone or repository changed.
    pub since: LogTime,
    /// What is not at its default.
    pub settings: Map<String, Value>,
}

/// `GET /v1/repositories`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Repositories {
    /// As they are configured.
    pub repositories: Vec<RepositoryInfo>,
}

/// A repository of this node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RepositoryInfo {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub url: String,
    /// Its own identity; none where it cannot be opened.
    pub id: Option<String>,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// `GET /v1/backups/ID`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackupDetails {
    /// The backup.
    #[serde(flatten)]
    pub backup: BackupEntry,
    /// What was stored with it.
    pub manifest: Manifest,
}

/// `POST /v1/backups/verify`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VerifiedBackups {
    /// All were whole, else the call fails.
    pub verified: Vec<Verified>,
}

/// `POST /v1/backups/ID/restore`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Restored {
    /// What was brought back.
    pub volumes: Vec<RestoredVolume>,
}

/// A volume that was brought back.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RestoredVolume {
    /// Its name in the backup.
    pub name: Name,
    /// Bytes.
    pub size_bytes: u64,
}

/// How far something is.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ProgressInfo {
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all; 0 where that is not known yet.
    pub total_bytes: u64,
}

/// An answer that is only "done".
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Done {
    /// What was done, as a line for people.
    pub done: String,
}
