//! The image at the horizon: per volume a sparse file with its sidecar, and the group's control
//! state there; and what is kept of older positions ([`Overlay`]).
//!
//! [`BaseVolume`] is read by anybody and written by the folder alone, in block order. A crash in
//! the middle of a fold leaves blocks, sums and slots of which each sector is old or new; the fold
//! is then done again, which rewrites all of them. Blocks that the fold does not touch read right
//! throughout: their bytes and sums are the same before and after. `exam.rs` tells what rotted of a
//! chunk, and what of it two of block, sum and slot, or a peer's bytes, make right again; `lost.rs`
//! brings back a file that the disk lost, as damage.

mod control;
mod exam;
mod lost;
mod overlay;
mod sidecar;
#[cfg(test)]
mod tests;
mod volume;

pub use control::{ControlEntry, ControlState, ControlStateError};
pub use exam::{Exam, Remedy};
pub use lost::Lost;
pub use overlay::{Kept, Mark, Overlay};
#[cfg(test)]
pub use sidecar::sum_offset;
pub use volume::{BaseError, BaseRead, BaseVolume, read_batch};
