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
    #[error("backup {id}: is in no repository of this node; `tidelog backup list` shows them")]
    NoBackup { id: String },
    #[error("restore of {volume}: {cause}")]
    Restore { volume: String, cause: String },
    #[error("backup: {0}")]
    Internal(String),
}
