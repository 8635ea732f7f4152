//! Backup: facts become a decision, a decision becomes a run, a run leaves a snapshot and a result.
//!
//! Every node that holds a group evaluates [`decide`] for each slot by itself. `facts` are what the
//! decision may know, `job` is what the operator asked for, `placement_page` prints the whole table
//! of the decision as `docs/placement.md`.

mod catalog;
mod claim;
mod commands;
mod decision;
mod facts;
mod gather;
mod history;
mod job;
mod jobs;
mod objects;
mod peer;
mod placement_page;
mod repository;
mod restore;
mod run;
mod runner;
mod scheduler;
mod slot;
mod source;

pub use catalog::{
    BackupEntry, MANIFEST_VERSION, Manifest, ManifestVolume, Outcome, Stats, VolumeChecksum,
};
pub use claim::{Claim, Holder, SlotResult, SlotStore, SlotView};
pub use decision::{Decision, Explanation, REASON_CODES, Verdict, decide, explain};
pub use facts::{AssumeError, Facts, GivenUp, NodeFacts, Reason, ReplicationFacts};
pub use job::{Comparison, Condition, JobError, JobSettings, Placement};
pub use jobs::{JobChange, changed_job};
pub use objects::{FileObjects, MemoryObjects, Objects};
pub use peer::{PeerCalls, PeerHandler, ReplicationPeers, ReplicationView};
pub use placement_page::placement_page;
pub use repository::{BackupPlan, Made, Parent, Repository, RepositoryConfig, RepositoryError};
pub use restore::{FileSink, RestoreSink};
pub use run::{Next, Observation, PeerPhase, SlotRun};
pub use scheduler::{
    BackupConfig, BackupError, RestoreTarget, RunStarted, Scheduler, SlotAlarm, Verified,
};
pub use slot::{Due, Schedule};
pub use source::{Progress, Stop};
