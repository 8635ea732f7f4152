//! Who needs which old moment, what that costs, and what goes first when space is short.
//!
//! Needed are the moments of open images, of pinned bookmarks, and of branches (where each leaves
//! the history). A fold claims those that it is about to pass. All of this but the asking happens
//! under `fold_lock`, so that nothing is removed that a fold is writing.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::json;

use super::branch::Branch;
use super::content::Content;
use super::engine::{Core, Group};
use super::image::Image;
use super::moment::{Cost, MOMENTS, Moment};
use super::{GroupError, files};
use crate::base::BaseVolume;
use crate::events::Severity;
use crate::io::Disk;
use crate::units::{Lsn, Name, VolumeNumber};

/// Why a moment that lost its last owner cannot be opened.
const PASSED: &str = "nobody needed it any more when a fold passed it";

/// Who needs one moment.
#[derive(Default)]
struct Needs {
    images: Vec<Arc<Image>>,
    pins: Vec<Name>,
    branches: Vec<String>,
}

/// What is given up when space is short, in this order; what only an operator gives up is neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Image,
    Pin,
}

impl Needs {
    fn rank(&self) -> Option<Rank> {
        match (self.branches.is_empty(), self.pins.is_empty()) {
            (false, _) => None,
            (true, false) => Some(Rank::Pin),
            (true, true) => Some(Rank::Image),
        }
    }
}

/// Which moment goes: the first rank that there is, and in it the one that takes most.
fn first_to_go(moments: impl Iterator<Item = (Lsn, Rank, u64)>) -> Option<Lsn> {
    let takes_something = moments.filter(|(_, _, bytes)| *bytes > 0);
    let first = takes_something.min_by_key(|(lsn, rank, bytes)| (*rank, u64::MAX - bytes, *lsn));
    first.map(|(lsn, ..)| lsn)
}

impl Group {
    /// What is kept on this node of the moment at a position.
    ///
    /// # Errors
    ///
    /// Why it cannot be read here, where a fold has passed it.
    pub fn cost_at(&self, lsn: Lsn) -> Result<Cost, String> {
        let moment = self.lock().moments.get(&lsn).cloned();
        let Some(moment) = moment else { return Ok(Cost::default()) };
        moment.broken().map_or_else(|| Ok(moment.cost()), Err)
    }

    /// Whether an image can be opened at this very position although the log no longer covers it.
    #[must_use]
    pub fn is_kept(&self, lsn: Lsn) -> bool {
        usable(&self.lock(), lsn).is_some()
    }

    fn needs(&self, core: &Core, branches: &[Branch]) -> BTreeMap<Lsn, Needs> {
        let mut needs: BTreeMap<Lsn, Needs> = BTreeMap::new();
        for image in core.images.values().filter(|image| image.broken().is_none()) {
            needs.entry(image.leaves_log_at()).or_default().images.push(image.clone());
        }
        for bookmark in core.view.bookmarks.iter().filter(|bookmark| bookmark.pinned) {
            needs.entry(bookmark.lsn).or_default().pins.push(bookmark.name.clone());
        }
        for branch in branches {
            needs.entry(branch.from.lsn).or_default().branches.push(branch.name.clone());
        }
        needs
    }

    /// Takes everything below the target away from who might open an image there; the moments that
    /// may be needed below it, in order. Where a fold to it has `begun` before, none is new.
    ///
    /// # Errors
    ///
    /// Where it cannot be told which branches there are.
    pub(super) fn claim(&self, target: Lsn, begun: bool) -> Result<Vec<Arc<Moment>>, GroupError> {
        let branches = self.branches()?;
        let (claimed, unneeded, lost) = {
            let mut core = self.lock();
            core.fold_target = core.fold_target.max(target);
            let covered = if begun { target } else { core.timeline.horizon().lsn };
            let lost = self.note_lost(&mut core, &branches, covered);
            let needs = self.needs(&core, &branches);
            for (lsn, needed) in needs.range(..target) {
                let made = || Arc::new(Moment::new(&self.dir, *lsn));
                let moment = core.moments.entry(*lsn).or_insert_with(made).clone();
                for image in &needed.images {
                    image.keep_by(&moment);
                }
            }
            // Nothing is kept from here on of what nobody needs. Until the images are open again
            // nobody knows what they need.
            let is_needed = |lsn: &Lsn| !core.images_known || needs.contains_key(lsn);
            let below = core.moments.range(..target);
            let (claimed, unneeded): (Vec<_>, Vec<_>) = below
                .filter_map(|(lsn, _)| usable(&core, *lsn))
                .partition(|it| is_needed(&it.lsn()));
            for moment in &unneeded {
                moment.close(PASSED.to_owned());
            }
            (claimed, unneeded, lost)
        };
        // Not under the lock: to give back much takes the disk a while.
        for moment in unneeded {
            moment.give_up(PASSED.to_owned());
        }
        self.tell_lost(lost);
        Ok(claimed)
    }

    /// The moments that are needed up to the horizon, where the log ends, in order: an image is to
    /// take the place of the base.
    ///
    /// # Errors
    ///
    /// Where it cannot be told which branches there are.
    pub(super) fn claim_below_image(&self) -> Result<Vec<Arc<Moment>>, GroupError> {
        let branches = self.branches()?;
        let mut core = self.lock();
        let horizon = core.timeline.horizon().lsn;
        let needs = self.needs(&core, &branches);
        for (lsn, needed) in needs.range(horizon..=horizon) {
            let made = || Arc::new(Moment::new(&self.dir, *lsn));
            let moment = core.moments.entry(*lsn).or_insert_with(made).clone();
            for image in &needed.images {
                image.keep_by(&moment);
            }
        }
        Ok(needs.range(..=horizon).filter_map(|(lsn, _)| usable(&core, *lsn)).collect())
    }

    /// Notes what is needed below `covered` and was never kept here.
    fn note_lost(
        &self,
        core: &mut Core,
        branches: &[Branch],
        covered: Lsn,
    ) -> Vec<(Lsn, Needs, String)> {
        let mut lost = Vec::new();
        for (lsn, needed) in self.needs(core, branches) {
            if lsn < covered && !core.moments.contains_key(&lsn) {
                let reason = format!("this node's base is at lsn:{covered}, and nothing was kept");
                let moment = Moment::lost(&self.dir, lsn, reason.clone());
                core.moments.insert(lsn, Arc::new(moment));
                lost.push((lsn, needed, reason));
            }
        }
        lost
    }

    fn tell_lost(&self, lost: Vec<(Lsn, Needs, String)>) {
        for (lsn, needed, reason) in lost {
            self.tell_gone(lsn, &needed, &reason);
        }
    }

    /// An event for each that needed a moment which is gone.
    fn tell_gone(&self, lsn: Lsn, needed: &Needs, reason: &str) {
        let warn = |code: &str, text: String, details| {
            self.emit(Severity::Warning, code, text, details);
        };
        for image in &needed.images {
            let (name, owner) = (image.name(), image.owner());
            let text =
                format!("image {name} of {owner} at lsn:{lsn} can be read no more: {reason}");
            warn("image-lost", text, json!({ "image": name, "lsn": lsn }));
        }
        for name in &needed.pins {
            let text = format!("pinned bookmark {name} at lsn:{lsn} is not kept here: {reason}");
            warn("pin-lost", text, json!({ "bookmark": name, "lsn": lsn }));
        }
        for name in &needed.branches {
            let text = format!("branch {name} from lsn:{lsn} cannot be opened here: {reason}");
            warn("branch-lost", text, json!({ "branch": name, "lsn": lsn }));
        }
    }

    /// Gives up a moment, with all that needed it. Under `fold_lock`.
    pub(super) fn let_go(&self, moment: &Moment, reason: &str) {
        let branches = self.branches().unwrap_or_default();
        let needed = self.needs(&self.lock(), &branches).remove(&moment.lsn()).unwrap_or_default();
        // From here on nobody gives away what is read of it.
        moment.give_up(reason.to_owned());
        self.discard_moment(moment);
        self.tell_gone(moment.lsn(), &needed, reason);
        self.try_keep_images();
    }

    /// Whether a branch needs a moment.
    ///
    /// # Errors
    ///
    /// Where the branches cannot be listed.
    pub(super) fn only_a_command_ends(&self, moment: &Moment) -> Result<bool, GroupError> {
        let branches = self.branches()?;
        let needs = self.needs(&self.lock(), &branches);
        Ok(needs.get(&moment.lsn()).is_some_and(|needs| needs.rank().is_none()))
    }

    fn discard_moment(&self, moment: &Moment) {
        let disk = &*self.context.env.disk;
        if !matches!(disk.exists(moment.dir()), Ok(false))
            && let Err(cause) = files::discard(disk, moment.dir())
        {
            // The next start tries again: nothing needs it.
            tracing::warn!("{}: {cause}", moment.dir().display());
        }
    }

    /// Gives up one moment where that makes room; whether it did. Under `fold_lock`.
    pub(super) fn make_room(&self) -> bool {
        // What a branch needs is not given up because nobody knows that there is one.
        let Ok(branches) = self.branches() else { return false };
        let candidates: Vec<(Arc<Moment>, Rank)> = {
            let core = self.lock();
            let needs = self.needs(&core, &branches);
            let moments = core.moments.values().filter(|moment| moment.broken().is_none());
            let ranked = moments.filter_map(|moment| {
                let rank = needs.get(&moment.lsn()).map_or(Some(Rank::Image), Needs::rank);
                rank.map(|rank| (moment.clone(), rank))
            });
            ranked.collect()
        };
        let costs = candidates.iter().map(|(moment, rank)| {
            let bytes = moment.overlay().map_or(0, |overlay| overlay.bytes());
            (moment.lsn(), *rank, bytes)
        });
        let Some(lsn) = first_to_go(costs) else { return false };
        let chosen = candidates.iter().find(|(moment, _)| moment.lsn() == lsn);
        self.let_go(&chosen.expect("it is one of them").0, "the disk is short of space");
        true
    }

    /// Keeps the file system's reserve free of overlays: one goes at a time.
    pub(super) fn keep_reserve(&self, free_bytes: u64, reserve_bytes: u64) {
        if free_bytes >= reserve_bytes || self.lock().moments.is_empty() {
            return;
        }
        // A fold that is running has its own way to make room.
        if let Ok(_one_at_a_time) = self.fold_lock.try_lock() {
            self.make_room();
        }
    }

    /// Lets go what nobody needs any more, unless a fold is running, which does it at its end.
    pub(super) fn sweep_soon(&self) {
        if let Ok(_one_at_a_time) = self.fold_lock.try_lock()
            && let Err(error) = self.sweep_moments()
        {
            tracing::warn!("{error}");
        }
    }

    /// Removes the moments that nobody needs any more, and the bases of volumes that are gone at
    /// the horizon and in every moment. Under `fold_lock`.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub(super) fn sweep_moments(&self) -> Result<(), GroupError> {
        let clean = {
            let core = self.lock();
            let bases = self.bases.read().expect("no holder panics");
            let live = |number: &VolumeNumber| core.content.volumes.contains_key(number);
            core.moments.is_empty() && bases.keys().all(live)
        };
        if clean {
            return Ok(());
        }
        let branches = self.branches()?;
        let (gone, unsure) = {
            let mut core = self.lock();
            // Until the images are open again nobody knows what they need.
            if !core.images_known {
                return Ok(());
            }
            let needs = self.needs(&core, &branches);
            let mut gone = Vec::new();
            core.moments.retain(|lsn, moment| {
                let needed = needs.contains_key(lsn);
                if !needed {
                    gone.push(moment.clone());
                }
                needed
            });
            let bases = self.bases.read().expect("no holder panics");
            let removed = bases.keys().filter(|number| !core.content.volumes.contains_key(number));
            (gone, removed.copied().collect::<Vec<_>>())
        };
        for moment in gone {
            self.discard_moment(&moment);
        }
        if unsure.is_empty() {
            return Ok(());
        }
        let (horizon, moments) = {
            let core = self.lock();
            (core.horizon.clone(), core.moments.values().cloned().collect::<Vec<_>>())
        };
        let at_horizon = Content::at_horizon(&horizon);
        for number in unsure {
            let needed = at_horizon.volumes.contains_key(&number)
                || moments.iter().any(|moment| has_volume(moment, number));
            if needed {
                continue;
            }
            let base = self.bases.write().expect("no holder panics").remove(&number);
            if let Some(base) = base {
                base.remove().map_err(|cause| self.io("remove base", &cause))?;
            }
        }
        Ok(())
    }

    /// At the start, once the images are open again.
    pub(super) fn settle_holds(&self) {
        let _one_at_a_time = self.fold_lock.lock().expect("no holder panics");
        let branches = match self.branches() {
            Ok(branches) => branches,
            Err(error) => return tracing::warn!("{error}"),
        };
        let lost = {
            let mut core = self.lock();
            let covered = core.timeline.horizon().lsn.max(core.fold_target);
            let broken = core.moments.values().filter(|moment| moment.broken().is_some());
            let broken: Vec<Arc<Moment>> = broken.cloned().collect();
            let mut lost = self.note_lost(&mut core, &branches, covered);
            let mut needs = self.needs(&core, &branches);
            for moment in broken {
                if let Some(needed) = needs.remove(&moment.lsn()) {
                    lost.push((moment.lsn(), needed, moment.broken().unwrap_or_default()));
                }
            }
            lost
        };
        self.tell_lost(lost);
        if let Err(error) = self.sweep_moments() {
            tracing::warn!("{error}");
        }
    }
}

/// The moment at a position, where it can be read.
pub(super) fn usable(core: &Core, lsn: Lsn) -> Option<Arc<Moment>> {
    core.moments.get(&lsn).filter(|moment| moment.broken().is_none()).cloned()
}

fn has_volume(moment: &Moment, number: VolumeNumber) -> bool {
    moment.state().is_some_and(|state| Content::at_horizon(&state).volumes.contains_key(&number))
}

/// Loads the moments that folds have kept for a base that is at `base` at most. Those that no fold
/// has passed for certain go: the log covers them, and it may have another history there by now.
pub(super) fn load_moments(
    disk: &dyn Disk,
    group_dir: &std::path::Path,
    base: Lsn,
) -> std::io::Result<BTreeMap<Lsn, Arc<Moment>>> {
    let mut moments = BTreeMap::new();
    let all = group_dir.join(MOMENTS);
    for name in files::names_in(disk, &all)? {
        let lsn = name.parse().ok().map(Lsn).filter(|lsn| *lsn < base);
        let Some(lsn) = lsn else {
            files::discard(disk, &all.join(name))?;
            continue;
        };
        let moment = Moment::load(disk, group_dir, lsn, base)
            .unwrap_or_else(|reason| Moment::lost(group_dir, lsn, reason));
        moments.insert(lsn, Arc::new(moment));
    }
    Ok(moments)
}

/// The volumes that moments show, whose bases must stay.
pub(super) fn volumes_of(moments: &BTreeMap<Lsn, Arc<Moment>>) -> Vec<VolumeNumber> {
    let states = moments.values().filter_map(|moment| moment.state());
    states.flat_map(|state| Content::at_horizon(&state).volumes.into_keys()).collect()
}

/// Removes the bases of volumes that were gone at the horizon, and in every moment.
pub(super) fn remove_bases(
    disk: &dyn Disk,
    dir: &std::path::Path,
    at_horizon: &Content,
    needed: &[VolumeNumber],
) {
    let gone = at_horizon.table.removed_volumes().filter(|number| !needed.contains(number));
    for number in gone {
        if let Err(cause) = BaseVolume::remove_files(disk, dir, number) {
            tracing::warn!("{}: files of volume {number}: {cause}", dir.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_costliest_image_goes_before_any_pin_and_never_a_branch() {
        let images =
            [(Lsn(1), Rank::Image, 10), (Lsn(2), Rank::Image, 30), (Lsn(3), Rank::Pin, 90)];
        assert_eq!(first_to_go(images.into_iter()), Some(Lsn(2)));
        let pins = [(Lsn(1), Rank::Pin, 10), (Lsn(2), Rank::Pin, 30), (Lsn(3), Rank::Image, 0)];
        assert_eq!(first_to_go(pins.into_iter()), Some(Lsn(2)));
        assert_eq!(first_to_go(std::iter::empty()), None);
        let shared = Needs {
            pins: vec!["p".parse().unwrap()],
            branches: vec!["cut-1".to_owned()],
            images: Vec::new(),
        };
        assert_eq!(shared.rank(), None);
    }
}
