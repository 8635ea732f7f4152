//! That a group's disk failed, written down where that disk is not needed: a dead one takes no word
//! of its own failure. Once it is mounted again what was only in the cache is gone, although the
//! machine has gone on running, and the next start has to know.

use std::path::PathBuf;

use super::{GroupContext, files};
use crate::units::GroupId;

impl GroupContext {
    fn latch(&self, group: GroupId) -> Option<PathBuf> {
        // Two nodes of one machine may hold the same group.
        let name = format!("failed-{}-{group}", self.node.id);
        self.failures.as_ref().map(|dir| dir.join(name))
    }

    /// Writes down that the disk under a group has failed, and why.
    pub(super) fn latch_failure(&self, group: GroupId, reason: &str) {
        let Some(path) = self.latch(group) else { return };
        if let Err(cause) = files::store(&*self.env.disk, &path, reason.as_bytes()) {
            tracing::warn!("{}: the failure could not be written down: {cause}", path.display());
        }
    }

    /// Whether that was written down since the machine was started, and no start has dealt with it.
    pub(super) fn has_failed(&self, group: GroupId) -> bool {
        self.latch(group).is_some_and(|path| matches!(self.env.disk.exists(&path), Ok(true)))
    }

    /// The start has dealt with it, and what it found is durable.
    pub(super) fn forget_failure(&self, group: GroupId) {
        let Some(path) = self.latch(group).filter(|_| self.has_failed(group)) else { return };
        if let Err(cause) = self.env.disk.remove(&path) {
            tracing::warn!("{}: could not be removed: {cause}", path.display());
        }
    }
}
