//! Errors of the control socket: `application/problem+json` with a stable code and the line that
//! the command prints.

use serde::{Deserialize, Serialize};

use crate::group::GroupError;
use crate::units::UnitError;

/// The name of a message in a stream of events that is a problem, and ends it.
pub(super) const PROBLEM_EVENT: &str = "problem";

/// What went wrong, for people and programs (RFC 9457).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{detail}")]
pub struct Problem {
    /// The HTTP status.
    pub status: u16,
    /// A stable word for programs.
    pub code: String,
    /// The line that the command prints: object, what, cause, next command.
    pub detail: String,
}

impl Problem {
    /// A problem of these parts.
    pub fn new(status: u16, code: &str, detail: impl Into<String>) -> Problem {
        Problem { status, code: code.to_owned(), detail: detail.into() }
    }

    /// What was asked makes no sense (400).
    pub fn invalid(detail: impl Into<String>) -> Problem {
        Problem::new(400, "invalid", detail)
    }

    /// What was named is not there (404).
    pub fn not_found(detail: impl Into<String>) -> Problem {
        Problem::new(404, "not-found", detail)
    }

    /// It would work in another state (409).
    pub fn refused(detail: impl Into<String>) -> Problem {
        Problem::new(409, "refused", detail)
    }
}

impl From<UnitError> for Problem {
    fn from(error: UnitError) -> Problem {
        Problem::invalid(error.to_string())
    }
}

impl From<GroupError> for Problem {
    fn from(error: GroupError) -> Problem {
        let (status, code) = match &error {
            GroupError::NoVolume { .. } => (404, "no-such-volume"),
            GroupError::NotFound { .. } => (404, "not-found"),
            GroupError::Exists { .. } => (409, "exists"),
            GroupError::OutOfRange { .. } => (400, "out-of-range"),
            GroupError::NotPrimary { .. } => (409, "not-primary"),
            GroupError::Failed { .. } => (503, "group-failed"),
            GroupError::NoSpace { .. } => (507, "no-space"),
            GroupError::NotCovered { .. } => (409, "not-covered"),
            GroupError::Damaged { .. } | GroupError::Waits { .. } => (500, "damaged"),
            GroupError::Io { .. } => (500, "io"),
            GroupError::Refused { .. } => (409, "refused"),
        };
        Problem::new(status, code, error.to_string())
    }
}
