//! The log: an ordered record of writes, kept in segment files.

pub mod control;
pub mod record;
