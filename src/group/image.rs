//! Images: a group as it was at one position, and the holds that keep it readable.
//!
//! An image is a content of its own. Its hold keeps the horizon from passing it; folds up to it go
//! on, and take what they fold out of its maps too, since the base then has the same blocks.

use std::io;
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::content::Content;
use super::engine::{Core, Group, checkpoint};
use super::indexing::visit;
use super::read::Lookup;
use super::timeline::{Checkpoint, follow};
use super::{Extent, GroupError, Point, Read, View, Volume};
use crate::base::ControlState;
use crate::events::Severity;
use crate::log::reader::ScanEnd;
use crate::log::segment::Segments;
use crate::units::{LogTime, Lsn, Name, Position, VolumeNumber};

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
}

/// An image as it survives a restart.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct KeptImage {
    name: Name,
    owner: String,
    position: Position,
    opened: LogTime,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires: Option<LogTime>,
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

    /// Why it can no longer be read, where its hold was broken.
    #[must_use]
    pub fn broken(&self) -> Option<String> {
        self.broken.lock().expect("no holder panics").clone()
    }

    pub(super) fn break_hold(&self, reason: &str) {
        *self.broken.lock().expect("no holder panics") = Some(reason.to_owned());
    }

    pub(super) fn forget_below(&self, target: Lsn) {
        let mut content = self.content.write().expect("no holder panics");
        let freed: Vec<_> =
            content.volumes.values_mut().map(|known| known.map.forget_below(target)).collect();
        drop(content);
        drop(freed);
    }

    /// Bytes of memory that its maps take, shared ones included.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let content = self.content.read().expect("no holder panics");
        content.volumes.values().map(|known| known.map.memory_bytes()).sum()
    }

    /// Ranges (offset, length) that may differ between this image and the one at `since`: what the
    /// map has newer, and chunks of the base born later.
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
            known.volume.size_bytes
        };
        // The base may be folded further meanwhile, up to this image: then it has what the map had.
        if let Some(base) = self.group.base_of(volume) {
            let born = base.born_since(since);
            ranges.extend(born.map_err(|cause| self.group.io("read births", &cause))?);
        }
        self.check_hold()?;
        Ok(merge(ranges, size_bytes))
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
fn merge(mut ranges: Vec<(u64, u64)>, size_bytes: u64) -> Vec<(u64, u64)> {
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
}

impl View for Image {
    fn volumes(&self) -> Vec<Volume> {
        self.volumes.clone()
    }

    fn read(&self, reads: &mut [Read<'_>]) {
        self.group.read_through(self, reads);
        // What was read through a broken hold is not given away: the fold may have overtaken it.
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
    /// Where in time a point is: the end of a request, at or before it.
    ///
    /// # Errors
    ///
    /// Where the log does not cover it.
    pub fn resolve_point(&self, point: &Point) -> Result<Position, GroupError> {
        self.resolve(point).map(|checkpoint| checkpoint.position())
    }

    pub(super) fn resolve(&self, point: &Point) -> Result<Checkpoint, GroupError> {
        let (wanted, until) = match point {
            Point::Lsn(lsn) => (*lsn, LogTime(u64::MAX)),
            Point::Time(time) => (Lsn::MAX, *time),
            Point::Bookmark(name) => (self.bookmark_lsn(name)?, LogTime(u64::MAX)),
            Point::Now => (Lsn::MAX, LogTime(u64::MAX)),
        };
        let (from, end) = {
            let core = self.lock();
            let (horizon, end) = (core.timeline.horizon(), core.timeline.end());
            let from = match point {
                Point::Now => end,
                Point::Time(time) if *time < horizon.time => {
                    return Err(self.not_covered(&core, &time.to_string()));
                }
                Point::Time(time) => core.timeline.before_time(*time),
                Point::Lsn(lsn) if *lsn > end.lsn || *lsn < horizon.lsn => {
                    return Err(self.not_covered(&core, &format!("lsn:{lsn}")));
                }
                Point::Bookmark(name) if wanted < horizon.lsn => {
                    return Err(self.not_covered(&core, name.as_str()));
                }
                Point::Lsn(_) | Point::Bookmark(_) => core.timeline.before_lsn(wanted),
            };
            (from, end)
        };
        let found = follow(&self.segments, from, end.lsn, |header| {
            header.end() <= wanted && header.time <= until
        });
        let core = self.lock();
        match found {
            Ok(found) if found.lsn >= core.fold_target.max(core.timeline.horizon().lsn) => {
                self.check_barrier(&core, found.lsn)?;
                if found.lsn > Lsn::ZERO {
                    return Ok(found);
                }
                // Where nothing is yet, every point is before the first record.
                if core.timeline.end().lsn == Lsn::ZERO {
                    return Err(self.refused("has no image yet; wait until its primary sent one"));
                }
                Err(self.not_covered(&core, "a moment before the first record"))
            }
            Err(ScanEnd::Io(cause)) if core.timeline.horizon().lsn <= from.lsn => {
                Err(self.io("read log", &cause))
            }
            _ => Err(self.not_covered(&core, &format!("{point:?}"))),
        }
    }

    fn bookmark_lsn(&self, name: &Name) -> Result<Lsn, GroupError> {
        let view = self.control();
        let found = view.bookmarks.iter().find(|known| known.name == *name);
        found.map(|bookmark| bookmark.lsn).ok_or_else(|| {
            let (what, name) = ("bookmark", name.to_string());
            GroupError::NotFound { group: self.name().clone(), what, name }
        })
    }

    /// No image goes past a record that had to be understood and was not.
    fn check_barrier(&self, core: &Core, lsn: Lsn) -> Result<(), GroupError> {
        match core.content.barrier {
            Some(barrier) if lsn > barrier => Err(self.refused(format!(
                "the record at {barrier} must be understood, and this version does not, so that \
                 no image goes past it; upgrade the node, or open one at lsn:{barrier}"
            ))),
            _ => Ok(()),
        }
    }

    fn not_covered(&self, core: &Core, point: &str) -> GroupError {
        GroupError::NotCovered {
            group: self.name().clone(),
            point: point.to_owned(),
            from: core.fold_target.max(core.timeline.horizon().lsn),
            to: core.timeline.end().lsn,
        }
    }

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
        let checkpoint = self.resolve(point)?;
        let opened = self.context.env.clock.wall();
        let kept = KeptImage {
            name: name.unwrap_or_else(|| self.free_image_name()),
            owner: owner.to_owned(),
            position: checkpoint.position(),
            opened,
            expires: expires_after.map(|after| opened.after(after)),
        };
        let image = self.build_image(kept)?;
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

    pub(super) fn build_image(&self, kept: KeptImage) -> Result<Arc<Image>, GroupError> {
        let lsn = kept.position.lsn;
        let group = self.me.upgrade().expect("it is being used");
        loop {
            let (live, state) = {
                let core = self.lock();
                self.check_barrier(&core, lsn)?;
                if lsn < core.fold_target.max(core.timeline.horizon().lsn)
                    || lsn > core.timeline.end().lsn
                {
                    return Err(self.not_covered(&core, &format!("lsn:{lsn}")));
                }
                let live = (lsn == core.timeline.end().lsn).then(|| core.content.clone());
                (live, core.horizon.clone())
            };
            let content = match live {
                Some(content) => Ok(content),
                None => replay(&self.segments, &state, lsn),
            };
            let mut core = self.lock();
            let horizon = core.timeline.horizon().lsn;
            let mut content = match content {
                Ok(content) => content,
                // The fold has overtaken the replay: from its new horizon again.
                Err(_) if horizon > state.position.lsn => continue,
                Err(cause) => {
                    let what = format!("log up to {lsn}: {cause}");
                    return Err(GroupError::Damaged { group: self.name().clone(), what });
                }
            };
            if core.closed {
                return Err(self.refused("is closed"));
            }
            if lsn < core.fold_target.max(horizon) {
                return Err(self.not_covered(&core, &format!("lsn:{lsn}")));
            }
            let mut freed = Vec::new();
            for known in content.volumes.values_mut() {
                freed.push(known.map.forget_below(horizon));
            }
            let image = Arc::new(Image {
                group: group.clone(),
                name: kept.name.clone(),
                owner: kept.owner,
                position: kept.position,
                opened: kept.opened,
                expires: kept.expires,
                volumes: content.volumes.values().map(|known| known.volume.clone()).collect(),
                content: RwLock::new(content),
                broken: Mutex::default(),
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
        self.keep_images()?;
        self.notify();
        Ok(())
    }

    /// Closes the images whose time is over.
    pub(super) fn close_expired(&self) {
        let now = self.context.env.clock.wall();
        let over = |image: &Arc<Image>| image.expires.is_some_and(|expires| expires <= now);
        for image in self.images().into_iter().filter(over) {
            if self.close_this_image(&image).is_ok() {
                let text = format!("image {} of {} has expired", image.name, image.owner);
                self.emit(Severity::Info, "image-expired", text, json!({"image": image.name}));
            }
        }
    }

    /// Writes down which images are open, for the next start. A group that was closed has given
    /// them up, and its file stays as it is.
    pub(super) fn keep_images(&self) -> Result<(), GroupError> {
        let _one_at_a_time = self.images_file.lock().expect("no holder panics");
        let images = {
            let core = self.lock();
            if core.closed {
                return Err(self.refused("is closed"));
            }
            core.images.clone()
        };
        let kept: Vec<KeptImage> = images
            .values()
            .filter(|image| image.broken().is_none())
            .map(|image| KeptImage {
                name: image.name.clone(),
                owner: image.owner.clone(),
                position: image.position,
                opened: image.opened,
                expires: image.expires,
            })
            .collect();
        let disk = &self.context.env.disk;
        let path = self.dir.join("images");
        let text = serde_json::to_vec(&kept).expect("plain data becomes JSON");
        super::files::store(&**disk, &path, &text).map_err(|cause| self.io("write images", &cause))
    }

    /// Opens the images that were open when the node stopped.
    pub(super) fn reopen_images(&self) {
        let path = self.dir.join("images");
        let kept: Vec<KeptImage> = match super::files::load(&*self.context.env.disk, &path)
            .and_then(|text| serde_json::from_slice(&text).map_err(io::Error::from))
        {
            Ok(kept) => kept,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return,
            Err(cause) => {
                let text = format!("no image could be opened again: {}: {cause}", path.display());
                return self.emit(Severity::Warning, "image-lost", text, json!(null));
            }
        };
        let mut lost = false;
        for image in kept {
            let name = image.name.clone();
            if let Err(error) = self.reopen_image(image) {
                let text = format!("image {name} could not be opened again: {error}");
                self.emit(Severity::Warning, "image-lost", text, json!({"image": name}));
                lost = true;
            }
        }
        // What was told to be lost stays lost.
        if lost && let Err(error) = self.keep_images() {
            tracing::warn!("{error}");
        }
    }

    fn reopen_image(&self, image: KeptImage) -> Result<(), GroupError> {
        // A cut may have taken its moment away, and other records may have grown over the place.
        let (was, found) = (image.position, self.resolve(&Point::Lsn(image.position.lsn))?);
        if (found.epoch, found.lsn) != (was.epoch, was.lsn) {
            return Err(self.refused(format!("LSN {} of its epoch left the history", was.lsn)));
        }
        self.build_image(image).map(|_| ())
    }
}

/// The content at `end`, a request's end, from the control state at the horizon and the log behind
/// it.
///
/// # Errors
///
/// Why the log could not be followed up to there.
pub(super) fn replay(
    segments: &Segments,
    horizon: &ControlState,
    end: Lsn,
) -> Result<Content, ScanEnd> {
    let mut content = Content::at_horizon(horizon);
    let start = checkpoint(horizon);
    let mut freed = Vec::new();
    visit(segments, (start.lsn, start.chain), end, end, |header, payload| {
        content.apply(header, payload, &mut freed);
        freed.clear();
    })?;
    Ok(content)
}
