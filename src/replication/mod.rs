//! The log, byte for byte, to a peer.
