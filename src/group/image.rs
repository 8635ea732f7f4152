//! Images: a group as it was at one position, or a branch of it.
//!
//! An image is a content of its own. Folds take what they fold out of its maps too, since the base
//! then has the same blocks; what a fold beyond its position changes there is kept in its moment
//! (`moment.rs`). The image of a branch is the content where the branch leaves the history, with
//! the branch's own records on top, which are read from its directory.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use super::branch::BranchLog;
use super::content::Content;
use super::engine::{Core, Group};
use super::holds::usable;
use super::moment::Moment;
use super::read::Lookup;
use super::reopen::KeptImage;
use super::replay::replay_remembering;
use super::rewound::Rewinds;
use super::{Cost, Extent, GroupError, Point, Read, View, Volume};
use crate::base::{ControlEntry, ControlState};
use crate::log::reader::ScanEnd;
use crate::log::segment::Segments;
use crate::units::{CHUNK_BYTES, Chain, LogTime, Lsn, Name, Position, VolumeNumber};

/// A read-only view of a group at one LSN.
pub struct Image {
    group: Arc<Group>,
    name: Name,
    owner: String,
    position: Position,
    opened: LogTime,
    expires: Option<LogTime>,
    content: RwLock<Content>,
    volumes: Vec<Volume>,
    broken: Mutex<Option<String>>,
    /// What folds have kept for it, from the first that passes it on.
    moment: RwLock<Option<Arc<Moment>>>,
    branch: Option<BranchLog>,
    /// Up to where it is made of the group's own log.
    leaves_log_at: Lsn,
}

impl Image {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The group that it shows.
    #[must_use]
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// Where and when it is.
    #[must_use]
    pub fn position(&self) -> Position {
        self.position
    }

    /// Who opened it.
    #[must_use]
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// When it was opened, wall-clock time.
    #[must_use]
    pub fn opened(&self) -> LogTime {
        self.opened
    }

    /// When it is closed by itself, wall-clock time.
    #[must_use]
    pub fn expires(&self) -> Option<LogTime> {
        self.expires
    }

    /// The branch that it shows, where it shows one.
    #[must_use]
    pub fn branch(&self) -> Option<&str> {
        self.branch.as_ref().map(|branch| branch.name.as_str())
    }

    /// Why it can no longer be read, where it cannot.
    #[must_use]
    pub fn broken(&self) -> Option<String> {
        let own = self.broken.lock().expect("no holder panics").clone();
        own.or_else(|| self.moment().and_then(|moment| moment.broken()))
    }

    /// Up to where it is made of the group's own log: its position, or where its branch begins, or
    /// where that has gone back to.
    pub(super) fn leaves_log_at(&self) -> Lsn {
        self.leaves_log_at
    }

    /// What folds keep for it is in this moment from now on.
    pub(super) fn keep_by(&self, moment: &Arc<Moment>) {
        *self.moment.write().expect("no holder panics") = Some(moment.clone());
    }

    /// How it is written down for the next start.
    pub(super) fn kept(&self) -> KeptImage {
        KeptImage {
            name: self.name.clone(),
            owner: self.owner.clone(),
            position: self.position,
            opened: self.opened,
            expires: self.expires,
            branch: self.branch().map(str::to_owned),
        }
    }

    pub(super) fn break_hold(&self, reason: &str) {
        *self.broken.lock().expect("no holder panics") = Some(reason.to_owned());
    }

    pub(super) fn forget_below(&self, target: Lsn) {
        // A branch's own records are in no base.
        let target = target.min(self.leaves_log_at());
        let mut content = self.content.write().expect("no holder panics");
        let freed: Vec<_> =
            content.volumes.values_mut().map(|known| known.forget_below(target)).collect();
        drop(content);
        drop(freed);
    }

    /// What it takes: its maps, shared ones included, and what folds have kept for it, which it may
    /// share with others at its position.
    #[must_use]
    pub fn cost(&self) -> Cost {
        let maps: Vec<_> = {
            let content = self.content.read().expect("no holder panics");
            let known = content.volumes.values();
            known.flat_map(|known| [known.map.clone(), known.touched.clone()]).collect()
        };
        let kept = self.moment().map_or_else(Cost::default, |moment| moment.cost());
        let maps: u64 = maps.iter().map(|map| map.memory_bytes()).sum();
        Cost { memory_bytes: kept.memory_bytes + maps, ..kept }
    }

    /// Ranges (offset, length) that may differ between this image and the one at `since`, an
    /// earlier position: what the map has newer, and chunks of the base born later; and, where this
    /// image has not all that was there, what the rewinds in between have changed. The base knows
    /// of a chunk that a fold beyond this image has changed only when it did so last; when it had
    /// changed before the image is kept with the blocks.
    ///
    /// # Errors
    ///
    /// Where the volume is not in the image, or its hold was broken.
    pub fn changed_since(
        &self,
        volume: VolumeNumber,
        since: Lsn,
    ) -> Result<Vec<(u64, u64)>, GroupError> {
        let mut ranges = Vec::new();
        let size_bytes = {
            let content = self.content.read().expect("no holder panics");
            let known = content.volumes.get(&volume).ok_or_else(|| self.group.no_volume(volume))?;
            ranges.extend(known.map.changed_since(since));
            if !content.rewinds.is_on_path(since, self.position.lsn) {
                ranges.extend(known.touched.changed_since(since));
                if known.restored >= since {
                    ranges.push((0, known.volume.size_bytes));
                }
            }
            known.volume.size_bytes
        };
        // Asked before the base, which has it once it is no longer staged.
        if let Some(merging) = self.group.merging() {
            ranges.extend(merging.staged(volume));
        }
        // The base may be folded further meanwhile: up to this image, and then it has what the map
        // had; or beyond it, and then what it said before is kept before it says something else.
        let base = self.group.base_of(volume);
        let born = base.map(|base| base.born_since(since)).unwrap_or_default();
        let kept = self.moment().map(|moment| moment.births(volume)).unwrap_or_default();
        for (chunk, birth) in &kept {
            if *birth >= since {
                ranges.push((chunk * CHUNK_BYTES, CHUNK_BYTES));
            }
        }
        for (offset, length) in born {
            // Chunks whose birth is kept split the run.
            let end = offset + length;
            let mut at = offset;
            for chunk in kept.range(offset / CHUNK_BYTES..end.div_ceil(CHUNK_BYTES)).map(|b| b.0) {
                ranges.push((at, (chunk * CHUNK_BYTES).saturating_sub(at)));
                at = (chunk + 1) * CHUNK_BYTES;
            }
            ranges.push((at, end.saturating_sub(at)));
        }
        if since < self.group.births_from() {
            ranges.push((0, size_bytes));
        }
        self.check_hold()?;
        Ok(merge(ranges, size_bytes))
    }

    /// Whether everything that the image at an earlier position has is in this one, below what came
    /// later.
    pub(super) fn has_all_of(&self, position: Lsn) -> bool {
        let content = self.content.read().expect("no holder panics");
        content.rewinds.is_on_path(position, self.position.lsn)
    }

    /// Since where a volume is as large as it is.
    pub(super) fn volume_is_since(&self, number: VolumeNumber) -> Lsn {
        self.content.read().expect("no holder panics").table.volume_is_since(number)
    }

    /// The control records that count at the image, as a base has them there.
    pub(super) fn control_entries(&self) -> Vec<ControlEntry> {
        let content = self.content.read().expect("no holder panics");
        content.table.folded(self.position.lsn)
    }

    fn check_hold(&self) -> Result<(), GroupError> {
        match self.broken() {
            Some(reason) => Err(self
                .group
                .refused(format!("image {}: can no longer be read: {reason}", self.name))),
            None => Ok(()),
        }
    }
}

/// Sorts ranges, joins those that touch, and cuts them at the volume's end.
pub(super) fn merge(mut ranges: Vec<(u64, u64)>, size_bytes: u64) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
    for (offset, length) in ranges {
        let end = (offset + length).min(size_bytes);
        if offset >= end {
            continue;
        }
        match merged.last_mut() {
            Some(last) if offset <= last.0 + last.1 => last.1 = last.1.max(end - last.0),
            _ => merged.push((offset, end - offset)),
        }
    }
    merged
}

impl Lookup for Image {
    fn with_content(&self, look: &mut dyn FnMut(&Content)) {
        look(&self.content.read().expect("no holder panics"));
    }

    fn moment(&self) -> Option<Arc<Moment>> {
        self.moment.read().expect("no holder panics").clone()
    }

    fn branch(&self) -> Option<(Lsn, &Segments)> {
        self.branch.as_ref().map(|branch| (branch.from, &branch.segments))
    }
}

impl View for Image {
    fn volumes(&self) -> Vec<Volume> {
        self.volumes.clone()
    }

    fn read(&self, reads: &mut [Read<'_>]) {
        self.group.read_through(self, reads);
        // What was read of what is kept no more is not given away: a fold may have overtaken it.
        if let Err(error) = self.check_hold() {
            for read in reads {
                read.result = Err(error.clone());
            }
        }
    }

    fn extents(
        &self,
        volume: VolumeNumber,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Result<Vec<Extent>, GroupError> {
        let extents = self.group.extents_through(self, volume, offset, length, limit)?;
        self.check_hold()?;
        Ok(extents)
    }
}

impl Group {
    /// Opens an image; it and its hold last until [`Group::close_image`] or `expires_after`.
    ///
    /// # Errors
    ///
    /// Where the point is not covered, the name is taken or there is no image yet.
    pub fn open_image(
        &self,
        point: &Point,
        name: Option<Name>,
        owner: &str,
        expires_after: Option<Duration>,
    ) -> Result<Arc<Image>, GroupError> {
        let (position, live) = match point {
            Point::Now => self.now().map(|(position, live)| (position, Some(live)))?,
            _ => (self.resolve(point)?.position(), None),
        };
        self.open_kept(position, (None, live), name, owner, expires_after)
    }

    /// Opens an image of a branch: the group as it was when the branch was cut off.
    ///
    /// # Errors
    ///
    /// Where there is no such branch, or its records cannot be read; where the moment that it
    /// begins at is not kept here; where the name is taken.
    pub fn open_branch_image(
        &self,
        branch: &str,
        name: Option<Name>,
        owner: &str,
    ) -> Result<Arc<Image>, GroupError> {
        let branch = self.branch(branch)?;
        self.open_kept(branch.to, (Some(branch.name), None), name, owner, None)
    }

    /// The last end of a request, and the content there: whatever is appended behind it, nothing
    /// has to be replayed.
    fn now(&self) -> Result<(Position, Content), GroupError> {
        let core = self.lock();
        let end = core.timeline.end();
        if end.lsn == Lsn::ZERO {
            return Err(self.no_image_yet());
        }
        self.check_barrier(&core, end.lsn)?;
        Ok((end.position(), core.content.clone()))
    }

    fn open_kept(
        &self,
        position: Position,
        (branch, live): (Option<String>, Option<Content>),
        name: Option<Name>,
        owner: &str,
        expires_after: Option<Duration>,
    ) -> Result<Arc<Image>, GroupError> {
        let opened = self.context.env.clock.wall();
        let kept = KeptImage {
            name: name.unwrap_or_else(|| self.free_image_name()),
            owner: owner.to_owned(),
            position,
            opened,
            expires: expires_after.map(|after| opened.after(after)),
            branch,
        };
        let image = self.build_image(kept, live)?;
        if let Err(error) = self.keep_images() {
            // What the next start would not know of is no hold that anybody may rely on.
            self.lock().images.remove(image.name());
            image.break_hold(&error.to_string());
            return Err(error);
        }
        self.notify();
        Ok(image)
    }

    fn free_image_name(&self) -> Name {
        let core = self.lock();
        (1..)
            .map(|number| format!("image-{number}").parse::<Name>().expect("a name"))
            .find(|name| !core.images.contains_key(name))
            .expect("numbers do not end")
    }

    /// Makes an image of `live`, which is the content at its position, or of what the log says.
    pub(super) fn build_image(
        &self,
        kept: KeptImage,
        mut live: Option<Content>,
    ) -> Result<Arc<Image>, GroupError> {
        let branch = kept.branch.as_ref().map(|name| self.branch(name)).transpose()?;
        let lsn = branch.as_ref().map_or(kept.position.lsn, |branch| branch.from.lsn);
        let group = self.me.upgrade().expect("it is being used");
        // What a branch's own records go back to.
        let mut wanted = BTreeSet::new();
        loop {
            let (live, state, mut rewinds, cuts) = {
                let core = self.lock();
                self.check_barrier(&core, lsn)?;
                self.check_covered(&core, lsn).map_err(|error| {
                    // Of a moment that the history here does not have nothing could be kept.
                    let left = branch.as_ref().filter(|branch| !core.is_in_history(branch.from));
                    left.map_or(error, |branch| self.cut_again(branch))
                })?;
                let at_end = lsn == core.timeline.end().lsn && branch.is_none();
                let horizon = core.horizon.clone();
                // Behind the horizon nothing but the moment itself is there.
                let state = if lsn < horizon.position.lsn {
                    usable(&core, lsn).and_then(|moment| moment.state())
                } else {
                    Some(horizon)
                };
                let state = state.ok_or_else(|| self.not_covered(&core, &format!("lsn:{lsn}")))?;
                let rewinds = core.content.rewinds.clone();
                let live = live.take().or_else(|| at_end.then(|| core.content.clone()));
                (live, state, rewinds, core.cuts)
            };
            if let Some(branch) = &branch {
                self.check_continues(branch)?;
            }
            rewinds.cut(lsn);
            let content = match live {
                Some(content) => Ok((content, Chain::default())),
                None => replay_for(&self.segments, &state, &rewinds, &wanted, lsn),
            };
            let (mut content, chain) = match content {
                Ok(content) => content,
                // The fold has overtaken the replay: from its new horizon again.
                Err(_) if self.lock().timeline.horizon().lsn > state.position.lsn => continue,
                Err(cause) => {
                    let what = format!("log up to {lsn}: {cause}");
                    return Err(GroupError::Damaged { group: self.name().clone(), what });
                }
            };
            let (mut position, mut leaves_log_at) = (kept.position, lsn);
            let branch = match &branch {
                Some(branch) => {
                    let (log, end) = self.follow_branch(branch, chain, &mut content)?;
                    let missing = content.missing();
                    if !missing.is_subset(&wanted) {
                        wanted.extend(missing);
                        continue;
                    }
                    self.check_branch(&branch.name, &content)?;
                    content.forget_remembered();
                    (position, leaves_log_at) = (end, content.rewinds.fork(lsn, end.lsn));
                    Some(log)
                }
                None => None,
            };
            let mut core = self.lock();
            if core.closed {
                return Err(self.refused("is closed"));
            }
            if core.cuts != cuts {
                continue;
            }
            if branch.is_none() && !core.is_in_history(kept.position) {
                // Another history may have grown over the place since the point was resolved.
                let text = format!("LSN {lsn} left the history while the image was opened");
                return Err(self.refused(text));
            }
            self.check_covered(&core, leaves_log_at).map_err(|error| {
                // A fold has begun, and has passed what the branch goes back to for whoever asks.
                let goes_back = branch.as_ref().filter(|_| leaves_log_at < lsn);
                goes_back.map_or(error, |branch| self.goes_behind(&branch.name))
            })?;
            let horizon = core.timeline.horizon().lsn;
            let mut freed = Vec::new();
            for known in content.volumes.values_mut() {
                freed.push(known.forget_below(horizon.min(leaves_log_at)));
            }
            let image = Arc::new(Image {
                group: group.clone(),
                name: kept.name.clone(),
                owner: kept.owner,
                position,
                opened: kept.opened,
                expires: kept.expires,
                volumes: content.volumes.values().map(|known| known.volume.clone()).collect(),
                content: RwLock::new(content),
                broken: Mutex::default(),
                moment: RwLock::new(core.moments.get(&leaves_log_at).cloned()),
                branch,
                leaves_log_at,
            });
            match core.images.entry(kept.name) {
                std::collections::btree_map::Entry::Occupied(taken) => {
                    let (what, name) = ("image", taken.key().to_string());
                    return Err(GroupError::Exists { group: self.name().clone(), what, name });
                }
                std::collections::btree_map::Entry::Vacant(free) => free.insert(image.clone()),
            };
            drop(core);
            return Ok(image);
        }
    }

    /// Whether a position is in the log, or kept.
    fn check_covered(&self, core: &Core, lsn: Lsn) -> Result<(), GroupError> {
        let floor = core.fold_target.max(core.timeline.horizon().lsn);
        if lsn <= core.timeline.end().lsn && (lsn >= floor || usable(core, lsn).is_some()) {
            return Ok(());
        }
        let moment = core.moments.get(&lsn);
        match moment.and_then(|moment| moment.broken()) {
            Some(reason) => Err(self.not_kept(lsn, &reason)),
            None => Err(self.not_covered(core, &format!("lsn:{lsn}"))),
        }
    }

    /// An open image.
    #[must_use]
    pub fn image(&self, name: &Name) -> Option<Arc<Image>> {
        self.lock().images.get(name).cloned()
    }

    /// All open images, by name.
    #[must_use]
    pub fn images(&self) -> Vec<Arc<Image>> {
        self.lock().images.values().cloned().collect()
    }

    /// Closes an image and ends its hold.
    ///
    /// # Errors
    ///
    /// Where there is none of that name.
    pub fn close_image(&self, name: &Name) -> Result<(), GroupError> {
        self.close_image_if(name, |_| true)
    }

    /// Closes this very image: another that has got its name since stays open.
    ///
    /// # Errors
    ///
    /// Where it is closed already; what the disk says.
    pub fn close_this_image(&self, image: &Arc<Image>) -> Result<(), GroupError> {
        self.close_image_if(&image.name, |open| Arc::ptr_eq(open, image))
    }

    fn close_image_if(
        &self,
        name: &Name,
        meant: impl Fn(&Arc<Image>) -> bool,
    ) -> Result<(), GroupError> {
        let closed = {
            let mut core = self.lock();
            let there = core.images.get(name).is_some_and(meant);
            let closed = if there { core.images.remove(name) } else { None };
            // Who still reads it is told: from now on a fold may pass its moment.
            if let Some(closed) = &closed {
                closed.break_hold("the image was closed");
            }
            closed
        };
        if closed.is_none() {
            let (what, name) = ("image", name.to_string());
            return Err(GroupError::NotFound { group: self.name().clone(), what, name });
        }
        drop(closed);
        let kept = self.keep_images();
        self.sweep_soon();
        self.notify();
        kept
    }
}

/// The content at `end`, with what records further on will go back to, and the chain there.
fn replay_for(
    segments: &Segments,
    horizon: &ControlState,
    rewinds: &Rewinds,
    wanted: &BTreeSet<Lsn>,
    end: Lsn,
) -> Result<(Content, Chain), ScanEnd> {
    let positions = rewinds.targets().chain(wanted.iter().copied());
    replay_remembering(segments, horizon, positions, &[], end)
        .map(|(_, content, behind)| (content, behind.chain))
}
