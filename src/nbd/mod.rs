//! Where hosts come in: an NBD server over groups and images, and a small client.
//!
//! [`listen`] opens a Unix or TCP listener and serves each client on a thread of its own:
//! `connection` agrees with it on an export (`handshake`, a pure function over `wire`), then a
//! `session` carries out its requests in batches by wake-up. What is served comes through two
//! traits, [`Exports`] and [`Device`]; `groups` puts a node's groups and images behind them, `ram`
//! a device in memory. `docs/nbd.md` lists which parts of the protocol are supported.

mod address;
mod client;
mod command;
mod connection;
mod export;
#[doc(hidden)]
pub mod fuzz;
mod groups;
mod handshake;
mod identity;
mod input;
mod keepers;
mod listener;
mod negotiate;
mod numbers;
mod ram;
mod reply;
mod sender;
mod server;
mod session;
mod socket;
pub mod wire;

pub use address::{AddressError, NbdAddress};
pub use client::{Client, ClientError};
pub use export::{Device, ExportInfo, Exports, Refusal};
pub use groups::GroupExports;
pub use identity::Identity;
pub use keepers::KeeperId;
pub use listener::{ListenError, NbdListen, NbdServer, listen};
pub use negotiate::{Negotiated, describe, negotiate};
pub use ram::{RamDevice, RamExports};
pub use server::{Counter, NbdCounters, NbdLimits};
pub use socket::{Socket, Stream, end_when_silent};
pub use wire::Errno;
