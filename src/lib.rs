//! Tidelog: continuous data protection, replication and health-gated backup of block volumes.
//!
//! The modules below are in the order of the floors: each may use what stands above it in this
//! list, never what stands below. `tests/tidy.rs` holds the same order as data and says which wall
//! was broken. `ARCHITECTURE.md` describes the rooms.

pub mod units;

pub mod events;

pub mod io;

pub mod config;

pub mod log;

pub mod extent_map;

pub mod base;

pub mod group;

pub mod nbd;

pub mod replication;

pub mod agent;

pub mod backup;

pub mod control;

pub mod node;
