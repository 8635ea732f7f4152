//! Batched reads.
