//! The image at the horizon: per volume a sparse file with its sidecar, and the group's control
//! state there; and what is kept of older positions ([`Overlay`]).
//!
//! [`BaseVolume`] is read by anybody and written by the folder alone, in block order. A crash in
//! the middle of a fold leaves blocks, sums and slots of which each sector is old or new; the fold
//! is then done again, which rewrites all of them. Blocks that the fold does not touch read right
//! throughout: their bytes and sums are the same before and after. `exam.rs` tells what rotted of
//! a chunk, and what of it two of block, sum and slot, or a peer's bytes, make right again;
//! `lost.rs` brings back a file that the disk lost, as damage; `given_up.rs` leaves a block as
//! damage. `sealed.rs` is a small file that proves itself.

mod control;
mod exam;
mod given_up;
mod lost;
mod overlay;
mod sealed;
mod sidecar;
#[cfg(test)]
mod tests;
mod volume;

pub use control::{ControlEntry, ControlState, ControlStateError};
pub use exam::{Exam, Remedy};
pub use given_up::{Salvaged, edge_chunks, is_sum_lost};
pub use lost::Lost;
pub use overlay::{Kept, Mark, Overlay};
pub use sealed::{seal, unseal};
#[cfg(test)]
pub use sidecar::sum_offset;
pub use volume::{BaseError, BaseRead, BaseVolume, read_batch};
