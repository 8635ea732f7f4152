//! Backup: facts become a decision, a decision becomes a run, a run leaves a snapshot and a result.
//!
//! Every node that holds a group evaluates [`decide`] for each slot by itself. `facts` are what the
//! decision may know, `job` is what the operator asked for, `placement_page` prints the whole table
//! of the decision as `docs/placement.md`.

mod decision;
mod facts;
mod job;
mod placement_page;

pub use decision::{Decision, Explanation, REASON_CODES, Verdict, decide, explain};
pub use facts::{AssumeError, Facts, GivenUp, NodeFacts, Reason, ReplicationFacts};
pub use job::{Comparison, Condition, JobError, JobSettings, Placement};
pub use placement_page::placement_page;
