//! The log, byte for byte, to a peer.
//!
//! `core` and `channel` are the protocol as a pure state machine, over `epoch` (which of two
//! histories continues the other) and `lag`; `wire` is its format. `service` and `drive` run the
//! cores under tokio with `link` (sockets, TLS, frames), `worker` (a thread for each replicated
//! group) and `rpc` (calls between nodes), within `bounds`. `pairing` and `tls` say who may talk to
//! whom, `pair` does it over the network, `peers` keeps it. `commands` is what operators ask for,
//! with `asked`, `switchover` and `resolve` beside it, `status` what they see, `health` the verdict
//! that backup trusts, with `check`, the re-reading of logs, and `copy`, what a peer says of its
//! copy, behind it; `scrub` reads everything on command, `damage` is what either found, and
//! `repair` takes from a peer what is whole there, and `verify` compares with one. `replica` is
//! all that this room needs of a group.

mod asked;
mod bounds;
mod bulk;
mod channel;
mod check;
#[cfg(test)]
mod cluster;
mod commands;
mod copy;
mod core;
mod damage;
mod drive;
mod epoch;
mod heads;
mod health;
mod lag;
mod link;
mod pair;
mod pairing;
mod peers;
mod repair;
mod replica;
mod resolve;
mod rpc;
mod scrub;
mod service;
#[doc(hidden)]
pub mod simulation;
mod status;
mod switchover;
mod tls;
mod verify;
pub mod wire;
mod worker;

pub use self::channel::ReplicationState;
pub use self::commands::ReplicateOptions;
pub use self::damage::DamageInfo;
pub use self::health::{
    BackupCapable, CopyFacts, LAG_LIMIT_DEFAULT, LogCheck, Reason, Verdict, judge_copy, judge_local,
};
pub use self::pair::{Invite, PeerInfo};
pub use self::pairing::{INVITE_VALID, TRIES};
pub use self::peers::Peer;
pub use self::replica::{Replica, Replicas};
pub use self::resolve::{Parting, Preview, Side, SideHost};
pub use self::rpc::{BoxFuture, Handler, PeerContext};
pub use self::scrub::{ScrubState, ScrubStatus};
pub use self::service::{Replication, ReplicationConfig, ReplicationError};
pub use self::status::{Lag, LagState, PeerStatus};
pub use self::verify::{DifferingExtent, VerifyState, VerifyStatus};
