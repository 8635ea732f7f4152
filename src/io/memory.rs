//! A disk in memory.
#![allow(missing_docs)]
pub struct MemoryDisk {}
pub struct Fault {}
