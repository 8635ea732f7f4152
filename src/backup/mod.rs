//! Backup: facts become a decision, a decision becomes a run, a run leaves a snapshot and a result.
//!
//! Every node that holds a group evaluates [`decide`] for each slot by itself: a pure function over
//! `facts`, for the `job` that the operator asked for; `placement_page` prints its whole table as
//! `docs/placement.md`. `slot` says when a job is due, `run` is one node's way through one slot,
//! and `claim` settles who makes the backup, in small `objects` of the repository; `branches` says
//! whose a result is where the history has parted.
//!
//! Around that pure core: `scheduler` and `active` (a thread for each open slot), `timekeeper`
//! (due, missed, overdue), `gather` (facts of this node and its peer), `conversation` and `peer`
//! (what nodes tell one another), `runner` (makes a backup under its claim), `parent` (which one it
//! continues), `history` (how runs ended, what repositories held).
//!
//! `repository` writes and reads restic's format, and `reach` asks it within bounded time; `source`
//! shows an image as files, `door` refuses a snapshot that must not count, `restore` is the way
//! back, `catalog` what a backup says of itself, `jobs` and `commands` what operators ask for.

mod active;
mod branches;
mod catalog;
mod claim;
mod commands;
mod conversation;
mod decision;
mod door;
mod error;
mod facts;
mod failures;
mod gather;
mod history;
mod job;
mod jobs;
mod objects;
mod overdue;
mod parent;
mod peer;
mod placement_page;
mod reach;
mod repository;
mod restore;
mod run;
mod runner;
mod scheduler;
mod slot;
mod source;
mod timekeeper;

pub use branches::{Filled, Reigns, present_reign};
pub use catalog::{
    BackupEntry, MANIFEST_VERSION, Manifest, ManifestVolume, Outcome, Stats, Unreachable,
    VolumeChecksum,
};
pub use claim::{Claim, Holder, SlotResult, SlotStore, SlotView};
pub use commands::{Listing, RestoreTarget, Verified};
pub use decision::{Decision, Explanation, REASON_CODES, Verdict, decide, explain};
pub use error::BackupError;
pub use facts::{AssumeError, Facts, GivenUp, NodeFacts, Reason, ReplicationFacts};
pub use gather::{counterpart, others};
pub use job::{Comparison, Condition, JobError, JobSettings, Placement};
pub use jobs::{JobChange, changed_job};
pub use objects::{FileObjects, MemoryObjects, Objects};
pub use overdue::{Found, Watch, newest_over};
pub use peer::{PeerCalls, PeerHandler, ReplicationPeers, ReplicationView};
pub use placement_page::placement_page;
pub use repository::{BackupPlan, Made, Parent, Repository, RepositoryConfig, RepositoryError};
pub use restore::{FileSink, RestoreSink};
pub use run::{Next, Observation, PeerPhase, SlotRun};
pub use scheduler::{BackupConfig, RunStarted, Scheduler, SlotAlarm};
pub use slot::{Due, Schedule};
pub use source::{Progress, Stop};
