//! The configuration of one node.
