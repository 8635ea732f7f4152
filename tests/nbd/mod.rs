//! The NBD server over raw sockets: what is agreed, what is refused, and that nobody suffers from
//! what another client does.

mod groups;
mod handshake;
mod harm;
mod rig;
mod transmission;
