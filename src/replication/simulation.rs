//! The door for the simulation in `tests/sim`: the cores, and what carries out their outputs on a
//! group's log, so that the simulated world runs the code that the service runs. Nobody else needs
//! it, and nothing in it is promised.

pub use super::asked::{Said, may_follow};
pub use super::bulk::{Bulk, Waiting};
pub use super::channel::{Channel, Parted};
pub use super::commands::{put_member, refusal_to_promote};
pub use super::core::{
    ConnId, Input, LocalGroup, Membership, Output, PeerCore, Settings, given_up,
};
pub use super::repair::{mend_base, mend_log};
pub use super::replica::local_group;
pub use super::switchover::{TakeOverAnswer, take_over};
pub use super::worker::{Job, Taking, perform};
