//! Which backup the next one continues: what has not changed since is taken over from it unread, so
//! nothing may speak against it.

use super::catalog::Manifest;
use super::claim::SlotStore;
use super::repository::{Parent, Repository};
use super::scheduler::Inner;
use crate::group::{Group, Image, View};

impl Inner {
    /// The newest backup of the group whose image lies in the history and that counts, whichever
    /// node made it; none while the copies are known to differ, or of before that ended: what this
    /// node made may have been taken over from what another one had.
    pub(super) fn parent(
        &self,
        group: &Group,
        repository: &Repository,
        image: &Image,
    ) -> Option<Parent> {
        if self.differs(group) {
            return None;
        }
        let listed = repository.list().inspect_err(|error| tracing::warn!("{error}")).ok()?;
        let position = image.position();
        let (entry, manifest) = listed.into_iter().rev().find(|(entry, manifest)| {
            manifest.group_id == group.id()
                && manifest.lsn <= position.lsn
                && self.peers.is_same_at(group, manifest.lsn)
                && group.is_in_history(manifest.position())
                && entry.id.as_ref().is_some_and(|id| self.is_sound(repository, id, manifest))
        })?;
        let mut changed = Vec::new();
        for volume in image.volumes() {
            match image.changed_since(volume.number, manifest.lsn) {
                Ok(extents) => changed.push((volume, extents)),
                Err(error) => tracing::info!("volume {}: read in full: {error}", volume.name),
            }
        }
        Some(Parent { id: entry.id?, manifest, changed })
    }

    /// Whether a snapshot filled its slot, and nothing spoke against it then or since.
    fn is_sound(&self, repository: &Repository, id: &str, manifest: &Manifest) -> bool {
        let objects = repository.objects();
        if self.mark(objects.as_ref(), id).is_some() {
            return false;
        }
        let store = SlotStore::new(objects, manifest.job_id, manifest.slot);
        let results = store.results().unwrap_or_default();
        results.iter().any(|result| result.id == id && result.reasons_at_end.is_empty())
    }
}
