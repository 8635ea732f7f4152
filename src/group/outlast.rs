//! Moments that outlast an image: what it replaces in the base is kept first for whoever needs an
//! older moment, as before a fold (`keep.rs`).
//!
//! Durable before the switch, or before a fold begins, and shown by it: should it not come to that,
//! what was kept for it counts for nothing. A fold that is tried again may go less far, and a start
//! goes by no section of an index that is of more than what has begun.

use std::sync::Arc;

use super::GroupError;
use super::content::{Content, VolumeContent};
use super::engine::{Group, checkpoint};
use super::fold_plan::Change;
use super::keep::KeepError;
use super::moment::Moment;
use super::staging::Staging;
use crate::base::{ControlState, Kept, Mark};
use crate::units::{BLOCK_BYTES, Lsn};

/// What is kept for one moment, and where its files ended before.
struct Part {
    moment: Arc<Moment>,
    kept: Vec<Kept>,
    before: Mark,
}

/// What was kept for an image that is to take effect, or for a fold that is to begin; given up when
/// dropped before it has.
pub(super) struct Outlasting {
    /// Where the base will be.
    target: Lsn,
    parts: Vec<Part>,
}

impl Outlasting {
    /// Nothing outlasts an image that replaces everything.
    pub(super) fn nothing(target: Lsn) -> Outlasting {
        Outlasting { target, parts: Vec::new() }
    }

    /// A moment whose files ended at `before` does, with what is kept for it.
    pub(super) fn add(&mut self, moment: &Arc<Moment>, kept: Vec<Kept>, before: Mark) {
        self.parts.push(Part { moment: moment.clone(), kept, before });
    }

    /// Whether a moment does.
    pub(super) fn has(&self, lsn: Lsn) -> bool {
        self.parts.iter().any(|part| part.moment.lsn() == lsn)
    }

    /// The image has taken effect, or the fold has begun: the moments lie above it from now on.
    pub(super) fn take_effect(&mut self) {
        for part in self.parts.drain(..) {
            part.moment.add(self.target, &part.kept);
        }
    }
}

impl Drop for Outlasting {
    fn drop(&mut self) {
        for part in self.parts.drain(..) {
            if let Some(overlay) = part.moment.overlay() {
                overlay.return_to(part.before);
            }
        }
    }
}

impl Group {
    /// Keeps, for each moment that somebody needs, what a staged image replaces in the base, which
    /// is at the end of the log. Under `fold_lock`.
    ///
    /// # Errors
    ///
    /// Where there is no space, and nothing may be given up; what else the disk says.
    pub(super) fn keep_what_image_replaces(
        &self,
        staging: &Staging,
        control: &ControlState,
    ) -> Result<Outlasting, GroupError> {
        let mut outlasting = Outlasting::nothing(control.position.lsn);
        let new = Content::at_horizon(control);
        let horizon = self.lock().horizon.clone();
        for moment in self.claim_below_image()? {
            // Of one at the horizon no fold has kept anything yet.
            let passed = moment.state().filter(|_| moment.lsn() < horizon.position.lsn);
            let state = passed.unwrap_or_else(|| horizon.clone());
            loop {
                match self.keep_under_image(&moment, &state, staging, &new) {
                    Ok(part) => outlasting.parts.extend(part),
                    Err(KeepError::Group(error)) => return Err(error),
                    Err(KeepError::Overlay(cause)) => {
                        self.could_not_keep(&moment, &cause)?;
                        if moment.broken().is_none() {
                            continue;
                        }
                    }
                }
                break;
            }
        }
        Ok(outlasting)
    }

    fn keep_under_image(
        &self,
        moment: &Arc<Moment>,
        state: &ControlState,
        staging: &Staging,
        new: &Content,
    ) -> Result<Option<Part>, KeepError> {
        if moment.broken().is_some() {
            return Ok(None);
        }
        let past = Content::at_horizon(state);
        let overlay = self.overlay_of(moment, checkpoint(state), &past)?;
        let before = overlay.mark();
        let mut kept = Vec::new();
        for (number, known) in &past.volumes {
            // The base of a volume that the image lacks stays as long as a moment needs it.
            let Some(now) = new.volumes.get(number) else { continue };
            let changes = replaced(staging, known, now.volume.size_bytes);
            self.keep_births(moment, known, &changes, |_| false, &mut kept);
            for change in changes {
                self.keep_blocks(moment, &overlay, &past, *number, change, &mut kept)?;
            }
        }
        overlay.commit(staging.state.image.lsn, &kept)?;
        Ok(Some(Part { moment: moment.clone(), kept, before }))
    }
}

/// The blocks of a volume that a staged image changes, in order: what is staged, and what is behind
/// the volume's new end.
fn replaced(staging: &Staging, known: &VolumeContent, new_bytes: u64) -> Vec<Change> {
    let old_bytes = known.volume.size_bytes;
    let end = old_bytes.min(new_bytes) / BLOCK_BYTES;
    let mut changes: Vec<Change> = staging
        .ranges
        .of(known.volume.number)
        .map(|range| Change {
            from: range.at.offset / BLOCK_BYTES,
            to: (range.at.offset + range.length).div_ceil(BLOCK_BYTES).min(end),
        })
        .filter(|change| change.from < change.to)
        .collect();
    if end < old_bytes / BLOCK_BYTES {
        changes.push(Change { from: end, to: old_bytes / BLOCK_BYTES });
    }
    changes
}
