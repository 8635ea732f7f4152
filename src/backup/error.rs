//! What commands on backups can fail with.

use super::facts::AssumeError;
use super::job::JobError;
use super::repository::RepositoryError;
use crate::group::GroupError;
use crate::units::Name;

/// What a command on backups can fail with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each message says it")]
pub enum BackupError {
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Job(#[from] JobError),
    #[error(transparent)]
    Assume(#[from] AssumeError),
    #[error("job {group}/{job}: does not exist; `tidelog job list {group}` shows those that do")]
    NoJob { group: Name, job: String },
    #[error(
        "repository {name}: nothing is at {url} now, and when it was read last backups were in it \
         ({backups}); mount the file system that it is on, or `tidelog repository init {name} \
         --force` makes a new one without them"
    )]
    WasThere { name: String, url: String, backups: usize },
    #[error("backup {id}: is in no repository of this node; `tidelog backup list` shows them")]
    NoBackup { id: String },
    #[error("restore of {volume}: {cause}")]
    Restore { volume: String, cause: String },
    #[error("backup: {0}")]
    Internal(String),
}
