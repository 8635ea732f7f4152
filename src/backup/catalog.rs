//! What a backup says of itself: the manifest inside each snapshot, and the entry that lists show.

use serde::{Deserialize, Serialize};

use super::facts::Reason;
use crate::group::Role;
use crate::units::{EpochId, GroupId, LogTime, Lsn, Name, Position, VolumeNumber, total};

/// The version of [`Manifest`] that is written.
pub const MANIFEST_VERSION: u32 = 1;

/// A volume in a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestVolume {
    /// Its number in the group's records.
    pub number: VolumeNumber,
    /// Its name.
    pub name: Name,
    /// Bytes.
    pub size_bytes: u64,
}

/// What goes with a backup's data, as a JSON file in the snapshot and as its description, so that
/// either node can continue the chain and a person with stock restic knows what there is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of this struct.
    pub version: u32,
    /// The group's name.
    pub group: Name,
    /// The group.
    pub group_id: GroupId,
    /// The job's name.
    pub job: Name,
    /// The job.
    pub job_id: EpochId,
    /// The slot that the backup fills.
    pub slot: LogTime,
    /// The epoch of the image.
    pub epoch: EpochId,
    /// The position of the image.
    pub lsn: Lsn,
    /// Log time of the image, given by the primary.
    pub time: LogTime,
    /// The node that made the backup.
    pub node: Name,
    /// Its role then.
    pub role: Role,
    /// The volumes, by number.
    pub volumes: Vec<ManifestVolume>,
    /// The image may be older than the job's limit, by leave of the job.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stale: bool,
    /// Why this node made it.
    pub reasons: Vec<Reason>,
}

impl Manifest {
    /// The position of the image.
    #[must_use]
    pub fn position(&self) -> Position {
        Position { epoch: self.epoch, lsn: self.lsn, time: self.time }
    }

    /// Bytes of all volumes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        total(self.volumes.iter().map(|volume| volume.size_bytes))
    }
}

/// A volume's checksum: SHA-256 over the SHA-256 of each of its chunks in order, hexadecimal. Equal
/// images have equal checksums, whichever node read them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeChecksum {
    /// The volume.
    pub name: Name,
    /// Hexadecimal.
    pub sha256: String,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// A backup exists.
    Done,
    /// The named node made it.
    Delegated,
    /// The slot had its backup, or was not this node's.
    Skipped,
    /// Another run finished first.
    Superseded,
    /// No backup, and why.
    Failed,
    /// The slot went by unseen.
    Missed,
    /// Still going.
    Running,
}

/// A run, and the backup if it made one. Only what is restorable has an `id`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackupEntry {
    /// The snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The group.
    pub group: Name,
    /// The job.
    pub job: Name,
    /// The slot.
    pub slot: LogTime,
    /// The node that made the backup, or whose run this is.
    pub node: Name,
    /// Its role then.
    pub role: Role,
    /// The epoch of the image.
    pub epoch: Option<EpochId>,
    /// The position of the image.
    pub lsn: Option<Lsn>,
    /// Log time of the image; of a run without one, when it ended.
    pub time: LogTime,
    /// The volumes in it.
    pub volumes: Vec<ManifestVolume>,
    /// Bytes of all volumes.
    pub bytes: u64,
    /// Bytes read from the image; the rest was unchanged since the parent.
    pub bytes_read: u64,
    /// Bytes that the repository grew by.
    pub bytes_added: u64,
    /// From start to end.
    pub duration_seconds: f64,
    /// How it ended.
    pub outcome: Outcome,
    /// Why.
    pub reasons: Vec<Reason>,
    /// The node that was delegated to, if one was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_on: Option<Name>,
    /// The backup's image is no longer in the group's history, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// The backup was seen in a repository that cannot be read now; such an entry has no `id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreachable: Option<Unreachable>,
}

/// A backup in a repository that cannot be read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Unreachable {
    /// The snapshot.
    pub id: String,
    /// The repository's name.
    pub repository: String,
    /// Why it cannot be read.
    pub reason: String,
}

impl BackupEntry {
    /// The entry of a snapshot.
    #[must_use]
    pub fn of_snapshot(id: String, manifest: Manifest, stats: Stats) -> BackupEntry {
        BackupEntry {
            id: Some(id),
            bytes: manifest.size_bytes(),
            epoch: Some(manifest.epoch),
            lsn: Some(manifest.lsn),
            time: manifest.time,
            group: manifest.group,
            job: manifest.job,
            slot: manifest.slot,
            node: manifest.node,
            role: manifest.role,
            volumes: manifest.volumes,
            bytes_read: stats.bytes_read,
            bytes_added: stats.bytes_added,
            duration_seconds: stats.duration_seconds,
            outcome: Outcome::Done,
            reasons: manifest.reasons,
            run_on: None,
            branch: None,
            unreachable: None,
        }
    }
}

/// What the description of a snapshot says: the manifest again, so that a list reads no tree, and
/// what was only known when the run had ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Description {
    /// The manifest.
    #[serde(flatten)]
    pub(super) manifest: Manifest,
    /// What the run cost.
    #[serde(default)]
    pub(super) stats: Option<Stats>,
    /// A checksum for each volume.
    #[serde(default)]
    pub(super) checksums: Vec<VolumeChecksum>,
}

/// What a backup cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Bytes read from the image.
    pub bytes_read: u64,
    /// Bytes that the repository grew by.
    pub bytes_added: u64,
    /// From start to end.
    pub duration_seconds: f64,
}
