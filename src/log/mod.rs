//! The log: an ordered record of writes, kept in segment files.
//!
//! `record` and `control` are the format, `index` the cache beside a segment; `segment` names the
//! files and recycles them, `writer` appends whole pages at the head, `reader` follows the chain.

pub mod control;
pub mod index;
pub mod reader;
pub mod record;
pub mod segment;
pub mod writer;
