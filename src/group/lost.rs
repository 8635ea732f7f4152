//! The control state at the horizon and the files of the base as a start finds them: what the disk
//! lost of these is noticed before anything is read, and told.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use super::GroupContext;
use super::content::Content;
use super::engine::{Group, beginning};
use super::meta::Meta;
use super::scrub::DamagedPart;
use crate::base::{BaseVolume, ControlState, ControlStateError, Lost};
use crate::events::Severity;
use crate::io::Disk;
use crate::units::{CHUNK_BYTES, Name, VolumeNumber};

/// Chunks of a base that are looked at at once; a scrub finds the others.
const LOOK_AT_CHUNKS: usize = 200;

/// What the disk lost of a volume's base.
pub(super) struct LostBase {
    volume: VolumeNumber,
    size_bytes: u64,
    lost: Vec<Lost>,
}

/// The files of the base at an image, for its control state: of its volumes, and of those that are
/// gone in it what the state `below` it lists, since older moments may show them.
pub(super) fn sizes_of(
    bases: &BTreeMap<VolumeNumber, Arc<BaseVolume>>,
    content: &Content,
    below: &BTreeMap<VolumeNumber, u64>,
) -> BTreeMap<VolumeNumber, u64> {
    let mut sizes = below.clone();
    sizes.retain(|number, _| !content.volumes.contains_key(number));
    let files = content.volumes.keys().filter_map(|number| bases.get_key_value(number));
    sizes.extend(files.map(|(number, base)| (*number, base.size_bytes())));
    sizes
}

/// The control state at the horizon.
///
/// # Errors
///
/// [`ControlStateError::Damaged`] also where it is older than `meta` says, or not there.
pub(super) fn load_horizon(
    disk: &dyn Disk,
    base_dir: &Path,
    meta: &Meta,
) -> Result<ControlState, ControlStateError> {
    let state = match ControlState::load(disk, base_dir) {
        Err(ControlStateError::Io(cause)) if cause.kind() == io::ErrorKind::NotFound => {
            beginning(meta.group)
        }
        // A killed process may have left it in the cache alone, and from here on the log below it
        // goes.
        other => other.and_then(|state| Ok(disk.sync_dir(base_dir).map(|()| state)?))?,
    };
    if state.position.lsn < meta.horizon {
        return Err(ControlStateError::Damaged(format!(
            "{} tells of LSN {}, and what is before LSN {} was folded: the disk lost the newer file",
            base_dir.join("control").display(),
            state.position.lsn,
            meta.horizon
        )));
    }
    Ok(state)
}

/// Brings back, as damage, what is not there of the files that the control state tells of, and
/// tells of it at once; of volumes that are gone at the horizon only of those `in_moments`, since
/// the others may have been removed. While a fold or a merge has not `ended`, a file that is too
/// short may be its doing, and made right by it: of that nothing is told.
///
/// # Errors
///
/// What the disk says.
pub(super) fn bring_back_bases(
    disk: &dyn Disk,
    base_dir: &Path,
    horizon: &ControlState,
    in_moments: &[VolumeNumber],
    ended: bool,
    tell: &dyn Fn(&LostBase),
) -> io::Result<Vec<LostBase>> {
    let mut bases = Vec::new();
    let live = Content::at_horizon(horizon).volumes;
    let needed = |number: &VolumeNumber| live.contains_key(number) || in_moments.contains(number);
    for (&volume, &size_bytes) in horizon.bases.iter().filter(|(number, _)| needed(number)) {
        let mut lost = BaseVolume::bring_back(disk, base_dir, volume, size_bytes, !ended)?;
        lost.retain(|lost| ended || lost.found_bytes.is_none());
        if !lost.is_empty() {
            let base = LostBase { volume, size_bytes, lost };
            tell(&base);
            bases.push(base);
        }
    }
    Ok(bases)
}

/// Tells people what the disk lost of a volume's base.
pub(super) fn tell_lost(context: &GroupContext, name: &Name, base: &LostBase) {
    let whats: Vec<_> = base.lost.iter().map(Lost::what).collect();
    let text = format!(
        "group {name}: the disk lost a part of the base of volume {}: {}; what was in it is an error \
         for who reads it, never zeros: `tidelog scrub {name}` repairs what a peer proves",
        base.volume,
        whats.join(", "),
    );
    let details = json!({ "volume": base.volume, "files": whats });
    context.events.emit(Severity::Error, "base-lost", Some(name.as_str()), text, details);
}

impl Group {
    /// Has what the disk lost of the base looked at.
    pub(super) fn suspect_lost(&self, bases: &[LostBase]) {
        for LostBase { volume, size_bytes, lost } in bases {
            let from = lost.iter().map(|lost| lost.from_chunk).min().unwrap_or_default();
            for chunk in (from..size_bytes.div_ceil(CHUNK_BYTES)).take(LOOK_AT_CHUNKS) {
                self.suspect(DamagedPart::Base { volume: *volume, chunk });
            }
        }
    }
}
