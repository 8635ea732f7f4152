//! Control records: what the nodes of a group agree on, as JSON in the log.
//!
//! One struct per kind, with the numbers of the kinds below. A kind's body is stored and shipped as
//! the bytes that its author wrote and never encoded again; fields that this version does not know
//! are kept in `other` when a command changes a record it read.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::record::{ALIGNMENT, flags, header_bytes, piece_count};
use crate::units::{ByteSize, EpochId, GroupId, LogTime, Lsn, Name, NodeId, Span, VolumeNumber};

/// The kinds of control records. The numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ControlKind {
    /// The first record of every log.
    Group = 1,
    /// A new reign.
    Epoch = 2,
    /// A volume, its size, or that it is gone.
    Volume = 3,
    /// A node that holds the group, and how it is replicated to.
    Member = 4,
    /// Window, limits and what happens when they are reached.
    Policy = 5,
    /// A backup job.
    Job = 6,
    /// A named position.
    Bookmark = 7,
    /// The wall clock jumped.
    Clock = 8,
    /// The volumes are again what they were at an earlier position.
    Rewind = 9,
}

impl ControlKind {
    /// The kind of a stored number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<ControlKind> {
        use ControlKind::*;
        [Group, Epoch, Volume, Member, Policy, Job, Bookmark, Clock, Rewind]
            .into_iter()
            .find(|kind| *kind as u32 == number)
    }
}

/// A control record's body, one variant per kind.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "each variant is its struct")]
pub enum Control {
    Group(GroupRecord),
    Epoch(EpochRecord),
    Volume(VolumeRecord),
    Member(MemberRecord),
    Policy(PolicyRecord),
    Job(JobRecord),
    Bookmark(BookmarkRecord),
    Clock(ClockRecord),
    Rewind(RewindRecord),
}

macro_rules! each_kind {
    ($value:expr, $body:ident => $result:expr) => {
        match $value {
            Control::Group($body) => $result,
            Control::Epoch($body) => $result,
            Control::Volume($body) => $result,
            Control::Member($body) => $result,
            Control::Policy($body) => $result,
            Control::Job($body) => $result,
            Control::Bookmark($body) => $result,
            Control::Clock($body) => $result,
            Control::Rewind($body) => $result,
        }
    };
}

impl Control {
    /// The number that the record header carries.
    #[must_use]
    pub fn kind(&self) -> ControlKind {
        match self {
            Control::Group(_) => ControlKind::Group,
            Control::Epoch(_) => ControlKind::Epoch,
            Control::Volume(_) => ControlKind::Volume,
            Control::Member(_) => ControlKind::Member,
            Control::Policy(_) => ControlKind::Policy,
            Control::Job(_) => ControlKind::Job,
            Control::Bookmark(_) => ControlKind::Bookmark,
            Control::Clock(_) => ControlKind::Clock,
            Control::Rewind(_) => ControlKind::Rewind,
        }
    }

    /// The record's flags: what shapes images must be understood, the rest may be skipped.
    #[must_use]
    pub fn flags(&self) -> u16 {
        match self {
            Control::Group(_) | Control::Epoch(_) | Control::Volume(_) | Control::Rewind(_) => {
                flags::MUST_UNDERSTAND
            }
            _ => flags::MAY_SKIP,
        }
    }

    /// The body's bytes.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        each_kind!(self, body => serde_json::to_vec(body).expect("plain data becomes JSON"))
    }

    /// Reads a body. `Ok(None)` for a kind that this version does not know.
    ///
    /// # Errors
    ///
    /// Where a known kind's body is not what its struct says.
    pub fn from_json(kind: u32, body: &[u8]) -> Result<Option<Control>, serde_json::Error> {
        use ControlKind::*;
        let Some(kind) = ControlKind::from_number(kind) else { return Ok(None) };
        Ok(Some(match kind {
            Group => Control::Group(serde_json::from_slice(body)?),
            Epoch => Control::Epoch(serde_json::from_slice(body)?),
            Volume => Control::Volume(serde_json::from_slice(body)?),
            Member => Control::Member(serde_json::from_slice(body)?),
            Policy => Control::Policy(serde_json::from_slice(body)?),
            Job => Control::Job(serde_json::from_slice(body)?),
            Bookmark => Control::Bookmark(serde_json::from_slice(body)?),
            Clock => Control::Clock(serde_json::from_slice(body)?),
            Rewind => Control::Rewind(serde_json::from_slice(body)?),
        }))
    }
}

/// The first record of every log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupRecord {
    /// The group's identity, the same on every node.
    pub id: GroupId,
    /// Its name.
    pub name: Name,
    /// Bytes of a segment, a power of two.
    pub segment_bytes: u64,
    /// What a node must understand to hold the group; rises by command.
    pub format_level: u32,
    /// Fields of later versions.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// The highest number of a reign; a group that has used it up takes no other.
pub const COUNTER_MAX: u64 = 1 << 62;

/// One reign of one primary. Its header's epoch id is the new one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Counts the reigns of the group, from 1 to [`COUNTER_MAX`].
    pub counter: u64,
    /// Random.
    pub id: EpochId,
    /// The node that reigns.
    pub author: NodeId,
    /// Its name, for people.
    pub author_name: Name,
    /// Where the reign begins: this record's own position.
    pub first_lsn: Lsn,
    /// Why: `created`, `promote`, `recovery`, or one of those that [`EpochRecord::is_planned`]
    /// knows.
    pub reason: String,
    /// Fields of later versions.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl EpochRecord {
    /// The reason of a reign that was handed over.
    pub const SWITCHOVER: &str = "switchover";
    /// The reason of a reign that goes on where its node was not relieved.
    pub const SWITCHOVER_REFUSED: &str = "switchover-refused";

    /// The position behind this record.
    #[must_use]
    pub fn end(&self) -> Lsn {
        let body = Control::Epoch(self.clone()).to_json().len() as u64;
        let header = header_bytes(piece_count(0, body)) as u64;
        self.first_lsn.advance(header + body.next_multiple_of(ALIGNMENT))
    }

    /// Whether all that the reign before had answered is in this one: it began exactly at its end.
    #[must_use]
    pub fn is_planned(&self) -> bool {
        [EpochRecord::SWITCHOVER, EpochRecord::SWITCHOVER_REFUSED].contains(&self.reason.as_str())
    }
}

/// A volume of the group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Its number in records; never reused.
    pub number: VolumeNumber,
    /// Its name.
    pub name: Name,
    /// Bytes, a multiple of 4096.
    pub size_bytes: u64,
    /// Where a restore last began to replace what it holds; none where none ever did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore_lsn: Option<Lsn>,
    /// That restore has not come to its end: what the volume holds is of no one moment.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub restoring: bool,
    /// The volume is gone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub removed: bool,
    /// Fields of later versions.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// When a write is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// When it is in the local log.
    #[default]
    Async,
    /// When the peer holds it in memory too.
    Receive,
    /// As `Receive`; and a flush is answered when it is durable on the peer too.
    Sync,
}

/// What hosts do without a peer that an answer waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnLoss {
    /// They go on, and the state says degraded.
    #[default]
    Continue,
    /// They wait.
    Block,
}

impl OnLoss {
    fn is_default(&self) -> bool {
        *self == OnLoss::default()
    }
}

/// A node that holds the group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// The node.
    pub node: NodeId,
    /// Its name.
    pub name: Name,
    /// When a write is answered.
    #[serde(default)]
    pub mode: Mode,
    /// What hosts do without it, where the mode has them wait for it.
    #[serde(default, skip_serializing_if = "OnLoss::is_default")]
    pub on_loss: OnLoss,
    /// The age of the copy that its owner wants at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rpo_target: Option<Span>,
    /// The node no longer holds the group.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub removed: bool,
    /// Fields of later versions.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// What the log does at its byte limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFull {
    /// The window gets shorter.
    #[default]
    Fold,
    /// Writers get the speed of folding.
    Block,
}

/// What the log does about a peer that lacks what is to be folded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnPeerBehind {
    /// It goes on, and the peer is brought up by an image.
    #[default]
    Release,
    /// It waits for the peer, and so do writers at the limit.
    Block,
}

/// How much history the group keeps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyRecord {
    /// How far back one wants to go.
    pub window: Span,
    /// Bytes of log at most.
    pub log_limit: ByteSize,
    /// What happens there.
    #[serde(default)]
    pub on_full: OnFull,
    /// What happens about a peer that is behind.
    #[serde(default)]
    pub on_peer_behind: OnPeerBehind,
    /// Fields of later versions.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Default for PolicyRecord {
    fn default() -> PolicyRecord {
        PolicyRecord {
            window: Span::from_secs(24 * 3600),
            log_limit: ByteSize(10 << 30),
            on_full: OnFull::Fold,
            on_peer_behind: OnPeerBehind::Release,
            other: Map::new(),
        }
    }
}

/// A backup job. What the fields mean to the decision is told in [`crate::backup`]; here they are
/// only kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    /// Its name.
    pub name: Name,
    /// A random id, kept for the job's life: what slots are named by.
    pub id: EpochId,
    /// The repository's name in each node's configuration.
    pub repository: String,
    /// A cron pattern of five fields, or none: by command only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    /// The time zone of the schedule; UTC where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// From when on its slots count: the moment of the latest `job set` that made the job, or
    /// changed its schedule, zone or repository.
    pub since: LogTime,
    /// All else, each with a default in [`crate::backup`]: placement, limits, conditions, keep.
    #[serde(default)]
    pub settings: Map<String, Value>,
    /// The job is gone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub removed: bool,
    /// Fields of later versions.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// What a bookmark's moment is good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// As after a power cut.
    #[default]
    Crash,
    /// The file system was frozen.
    Filesystem,
    /// The application said so.
    Application,
}

/// A named position.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BookmarkRecord {
    /// Its name.
    pub name: Name,
    /// The image that it names: all that ends at or before this.
    pub lsn: Lsn,
    /// Log time at that position.
    pub time: LogTime,
    /// What the moment is good for.
    #[serde(default)]
    pub consistency: Consistency,
    /// Each node keeps the moment readable when its log no longer covers it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pinned: bool,
    /// The bookmark is gone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub removed: bool,
    /// Fields of later versions.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// The wall clock jumped by more than log time follows; windows and retention do not count it. Log
/// time takes the jump with this record only where nothing else said how much time had passed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClockRecord {
    /// Log time before the jump.
    pub before: LogTime,
    /// What the wall clock shows.
    pub wall: LogTime,
    /// Fields of later versions.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// From here on the volumes, their sizes and their data are what they were at an earlier position:
/// the map becomes the map there. Jobs, policy, members, bookmarks and epochs stay as they are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RewindRecord {
    /// The image that comes back: the end of a request before this record.
    pub to: Lsn,
    /// Log time at that position.
    pub time: LogTime,
    /// Numbers of volumes up to this were used before this record: those of volumes that come and
    /// go with a rewind are not used again either.
    pub highest_volume: VolumeNumber,
    /// Fields of later versions.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bodies as they are in logs, with each field; a version that writes them otherwise, or loses
    /// the fields of a later one, is another format.
    #[test]
    fn the_bodies_of_control_records_are_frozen() {
        let frozen = [
            (
                1,
                r#"{"id":"07070707070707070707070707070707","name":"g","segment_bytes":8388608,"format_level":1,"later":1}"#,
            ),
            (
                2,
                r#"{"counter":2,"id":"0000000000000005","author":"09090909090909090909090909090909","author_name":"a","first_lsn":4096,"reason":"promote","later":1}"#,
            ),
            (
                3,
                r#"{"number":1,"name":"v","size_bytes":4096,"restore_lsn":8192,"restoring":true,"removed":true,"later":1}"#,
            ),
            (
                4,
                r#"{"node":"09090909090909090909090909090909","name":"b","mode":"sync","on_loss":"block","rpo_target":"30s","removed":true,"later":1}"#,
            ),
            (
                5,
                r#"{"window":"1day","log_limit":10737418240,"on_full":"block","on_peer_behind":"block","later":1}"#,
            ),
            (
                6,
                r#"{"name":"j","id":"0000000000000005","repository":"main","schedule":"0 2 * * *","zone":"UTC","since":"2026-11-24T02:00:00Z","settings":{"placement":"any"},"removed":true,"later":1}"#,
            ),
            (
                7,
                r#"{"name":"m","lsn":4096,"time":"2026-11-24T02:00:00Z","consistency":"application","removed":true,"later":1}"#,
            ),
            (8, r#"{"before":"2026-11-24T02:00:00Z","wall":"2026-11-25T02:00:00Z","later":1}"#),
            (9, r#"{"to":4096,"time":"2026-11-24T02:00:00Z","highest_volume":3,"later":1}"#),
        ];
        for (kind, body) in frozen {
            let control = Control::from_json(kind, body.as_bytes()).expect(body).expect("known");
            assert_eq!(control.kind() as u32, kind);
            assert_eq!(String::from_utf8(control.to_json()).unwrap(), body);
        }
        assert_eq!(Control::from_json(10, b"{}").unwrap(), None, "a later kind is no error");
    }

    #[test]
    fn a_body_of_the_first_version_is_read_with_its_defaults() {
        let least = [
            (3, r#"{"number":1,"name":"v","size_bytes":4096}"#),
            (4, r#"{"node":"09090909090909090909090909090909","name":"b"}"#),
            (5, r#"{"window":"1d","log_limit":"10G"}"#),
        ];
        for (kind, body) in least {
            assert!(Control::from_json(kind, body.as_bytes()).expect(body).is_some());
        }
    }
}
