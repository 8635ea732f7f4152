//! Where in time a point is: in the log, or at a moment that is kept.

use super::engine::{Core, Group, checkpoint};
use super::holds::usable;
use super::timeline::{Checkpoint, follow};
use super::{GroupError, Point};
use crate::log::reader::ScanEnd;
use crate::units::{LogTime, Lsn, Name, Position};

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
            if let Some(found) = self.kept_point(&core, point, wanted)? {
                return Ok(found);
            }
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
        let floor = core.fold_target.max(core.timeline.horizon().lsn);
        match found {
            Ok(found) if found.lsn >= floor || usable(&core, found.lsn).is_some() => {
                self.check_barrier(&core, found.lsn)?;
                if found.lsn > Lsn::ZERO {
                    return Ok(found);
                }
                // Where nothing is yet, every point is before the first record.
                if core.timeline.end().lsn == Lsn::ZERO {
                    return Err(self.no_image_yet());
                }
                Err(self.not_covered(&core, "a moment before the first record"))
            }
            Err(ScanEnd::Io(cause)) if core.timeline.horizon().lsn <= from.lsn => {
                Err(self.io("read log", &cause))
            }
            _ => {
                let text = match point {
                    Point::Lsn(lsn) => format!("lsn:{lsn}"),
                    Point::Time(time) => time.to_string(),
                    Point::Bookmark(name) => name.to_string(),
                    Point::Now => "now".to_owned(),
                };
                Err(self.not_covered(&core, &text))
            }
        }
    }

    pub(super) fn no_image_yet(&self) -> GroupError {
        self.refused("has no image yet; wait until its primary sent one")
    }

    /// A point that the log no longer covers, and that is kept: none but the very position is.
    fn kept_point(
        &self,
        core: &Core,
        point: &Point,
        wanted: Lsn,
    ) -> Result<Option<Checkpoint>, GroupError> {
        let exact = matches!(point, Point::Lsn(_) | Point::Bookmark(_));
        if !exact || wanted >= core.timeline.horizon().lsn {
            return Ok(None);
        }
        let Some(moment) = core.moments.get(&wanted) else { return Ok(None) };
        if let Some(reason) = moment.broken() {
            return Err(self.not_kept(wanted, &reason));
        }
        Ok(moment.state().map(|state| checkpoint(&state)))
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
    pub(super) fn check_barrier(&self, core: &Core, lsn: Lsn) -> Result<(), GroupError> {
        match core.content.barrier {
            Some(barrier) if lsn > barrier => Err(self.refused(format!(
                "the record at {barrier} must be understood, and this version does not, so that \
                 no image goes past it; upgrade the node, or open one at lsn:{barrier}"
            ))),
            _ => Ok(()),
        }
    }

    pub(super) fn not_kept(&self, lsn: Lsn, reason: &str) -> GroupError {
        self.refused(format!("lsn:{lsn} is not kept on this node: {reason}"))
    }

    /// A position that the log, whose head is `to`, does not reach.
    pub(super) fn not_in_log(&self, at: Lsn, to: Lsn) -> GroupError {
        GroupError::NotCovered {
            group: self.name().clone(),
            point: format!("lsn:{at}"),
            from: self.log_start(),
            to,
        }
    }

    pub(super) fn not_covered(&self, core: &Core, point: &str) -> GroupError {
        GroupError::NotCovered {
            group: self.name().clone(),
            point: point.to_owned(),
            from: core.fold_target.max(core.timeline.horizon().lsn),
            to: core.timeline.end().lsn,
        }
    }
}
