//! Going back: what a rewind record makes of a content, and the command that appends one.
//!
//! Behind the record the volumes are those at an earlier position, with their maps as they were
//! there: a replay that will meet the record remembers them when it comes past (a clone of a map is
//! cheap). For "changed since" the record counts as a write of all that it changes: what was
//! written behind the fork of the two paths, on either (`touched`). A volume that had been removed
//! and is back counts as changed throughout.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::{Map, json};

use super::content::{Content, Entry, VolumeContent};
use super::engine::{Core, Group};
use super::replay::replay;
use super::rewound::Rewind;
use super::timeline::Checkpoint;
use super::{GroupError, Point, ReceiveError, RewindRecord, Rewound, Role};
use crate::events::Severity;
use crate::extent_map::{ExtentMap, Freed};
use crate::log::control::Control;
use crate::log::reader::ScanEnd;
use crate::log::record::Header;
use crate::units::{Lsn, Position, VolumeNumber};

/// Clients that come again at once are cut off so often.
const ATTEMPTS: u32 = 5;

/// What a content keeps for the rewinds that are to come.
#[derive(Clone, Default)]
pub(super) struct Remembered {
    /// Positions that records further on go back to.
    wanted: BTreeSet<Lsn>,
    states: BTreeMap<Lsn, Then>,
    /// Positions that records went back to, and that were not there.
    missing: BTreeSet<Lsn>,
    /// The end of the last request.
    end: Lsn,
}

/// The volumes at one position.
#[derive(Clone)]
pub(super) struct Then {
    volumes: BTreeMap<VolumeNumber, VolumeContent>,
    records: Vec<Arc<Entry>>,
}

impl Remembered {
    /// Of a content that is at this end of a request.
    pub(super) fn at(end: Lsn) -> Remembered {
        Remembered { end, ..Remembered::default() }
    }

    /// A record was applied.
    pub(super) fn pass(&mut self, header: &Header) {
        if header.is_last_of_request() {
            self.end = header.end();
        }
    }
}

impl Content {
    /// Remembers the volumes at these positions when it comes to them.
    pub(super) fn remember_at(&mut self, positions: impl IntoIterator<Item = Lsn>) {
        self.remembered.wanted.extend(positions);
    }

    /// Before the record at `lsn` is applied: positions that are not ends of requests go by.
    pub(super) fn remember_before(&mut self, lsn: Lsn) {
        while self.remembered.wanted.first().is_some_and(|first| *first <= lsn) {
            let position = self.remembered.wanted.pop_first().expect("looked at");
            if position == self.remembered.end {
                let then = self.then();
                self.remembered.states.insert(position, then);
            }
        }
    }

    /// The volumes as they are now.
    fn then(&self) -> Then {
        Then { volumes: self.volumes.clone(), records: self.table.volume_entries() }
    }

    /// The next record goes back to `to`, where the volumes were those of `then`.
    pub(super) fn prepare(&mut self, to: Lsn, then: Content) {
        self.remembered.states.insert(to, then.then());
    }

    /// No rewind is to come.
    pub(super) fn forget_remembered(&mut self) {
        let missing = std::mem::take(&mut self.remembered.missing);
        self.remembered = Remembered { missing, ..Remembered::at(self.remembered.end) };
    }

    /// Positions that records went back to, and that were not remembered.
    pub(super) fn missing(&self) -> &BTreeSet<Lsn> {
        &self.remembered.missing
    }

    /// Applies a rewind record. Where its position is not known, nothing behind the record can be
    /// shown.
    pub(super) fn go_back(
        &mut self,
        header: &Header,
        record: &RewindRecord,
        freed: &mut Vec<Freed>,
    ) {
        let Some(then) = self.remembered.states.get(&record.to).cloned() else {
            self.remembered.missing.insert(record.to);
            self.barrier.get_or_insert(header.lsn);
            return;
        };
        let fork = self.rewinds.fork(header.lsn, record.to);
        let mut before = std::mem::replace(&mut self.volumes, then.volumes);
        for (number, volume) in &mut self.volumes {
            match before.remove(number) {
                Some(before) => volume.take_place_of(before, fork, header.lsn, freed),
                None => (volume.touched, volume.restored) = (ExtentMap::new(), header.lsn),
            }
        }
        freed.extend(before.into_values().map(VolumeContent::free));
        self.table.replace_volumes(then.records);
        self.rewinds.push(Rewind { at: header.lsn, end: header.end(), to: record.to });
    }
}

impl VolumeContent {
    /// Is what the volume is from the record at `lsn` on, where it was `before` until then; up to
    /// `fork` both are the same.
    fn take_place_of(
        &mut self,
        before: VolumeContent,
        fork: Lsn,
        lsn: Lsn,
        freed: &mut Vec<Freed>,
    ) {
        let mut changed = before.map.changed_since(fork);
        changed.extend(self.map.changed_since(fork));
        let sizes = (self.volume.size_bytes, before.volume.size_bytes);
        let (smaller, larger) = (sizes.0.min(sizes.1), sizes.0.max(sizes.1));
        changed.push((smaller, larger - smaller));
        self.restored = before.restored;
        self.touched = before.touched.clone();
        for (offset, length) in changed {
            freed.push(self.touched.zero(offset, length, lsn, true));
        }
        freed.push(before.free());
    }

    fn free(mut self) -> Freed {
        let mut freed = self.map.truncate(0);
        freed.absorb(self.touched.truncate(0));
        freed
    }

    /// Forgets what a base at `target` has.
    pub(super) fn forget_below(&mut self, target: Lsn) -> Freed {
        let mut freed = self.map.forget_below(target);
        freed.absorb(self.touched.forget_below(target));
        freed
    }
}

impl Core {
    /// Whether the next record may go back to `to`: then the base has gone no further, and what the
    /// base has is forgotten of what comes back.
    pub(super) fn is_ready_to_go_back(&mut self, to: Lsn) -> bool {
        let horizon = self.timeline.horizon().lsn;
        if to < self.fold_target.max(horizon) {
            return false;
        }
        let Some(then) = self.content.remembered.states.get_mut(&to) else { return false };
        let volumes = then.volumes.values_mut();
        drop(volumes.map(|known| known.forget_below(horizon)).collect::<Vec<_>>());
        true
    }
}

impl Group {
    /// Makes the volumes, their sizes and their data what they were at a point: a record says so,
    /// and is durable on return. The log stays: what was written since can be read, and going back
    /// to right before the record undoes it. With `force`, clients are disconnected; they find what
    /// has become of their volumes when they come again.
    ///
    /// # Errors
    ///
    /// Where the log does not cover the point; where clients are connected, or do not go; where
    /// this node is not the primary; what the disk says.
    pub fn rewind(&self, point: &Point, force: bool) -> Result<Rewound, GroupError> {
        let point = self.resolve(point)?;
        // Nobody is cut off for what is refused all the same.
        self.check_may_rewind(&self.lock(), &point)?;
        let mut then = Some(self.content_at(point.lsn)?);
        for _ in 0..if force { ATTEMPTS } else { 0 } {
            self.disconnect_clients();
            if self.clients().is_empty() {
                break;
            }
        }
        let mut from = Position::default();
        let appended = self.append_control_with(|core| {
            self.check_may_rewind(core, &point)?;
            self.check_no_clients(point.lsn)?;
            core.content.prepare(point.lsn, then.take().expect("it is asked once"));
            assert!(core.is_ready_to_go_back(point.lsn), "the log reaches there");
            let record = RewindRecord {
                to: point.lsn,
                time: point.time,
                highest_volume: VolumeNumber(core.content.table.highest_volume()),
                other: Map::new(),
            };
            from = core.timeline.end().position();
            Ok(Control::Rewind(record))
        });
        self.lock().content.forget_remembered();
        let rewound = Rewound { at: appended?, from, to: point.position() };
        self.tell_rewound(&rewound);
        Ok(rewound)
    }

    fn check_may_rewind(&self, core: &Core, point: &Checkpoint) -> Result<(), GroupError> {
        self.failed_error(core)?;
        if core.role != Role::Primary {
            return Err(GroupError::NotPrimary { group: self.name().clone() });
        }
        self.check_in_log(core, point.lsn)?;
        if point.lsn == core.timeline.end().lsn {
            let lsn = point.lsn;
            return Err(self.refused(format!("is at lsn:{lsn} already: nothing was written since")));
        }
        Ok(())
    }

    fn check_no_clients(&self, lsn: Lsn) -> Result<(), GroupError> {
        let (name, clients) = (self.name(), self.clients());
        let clients: usize = clients.iter().map(|(_, count)| count).sum();
        if clients == 0 {
            return Ok(());
        }
        Err(self.refused(format!(
            "{clients} clients are connected, and would find other data under what they have read; \
             unmount and disconnect them first (`tidelog status {name}`), or `tidelog rewind \
             {name} --to lsn:{lsn} --force` cuts them off"
        )))
    }

    /// A record can only go back to what the base is not behind.
    fn check_in_log(&self, core: &Core, lsn: Lsn) -> Result<(), GroupError> {
        let floor = core.fold_target.max(core.timeline.horizon().lsn);
        if lsn >= floor {
            return Ok(());
        }
        let name = self.name();
        Err(self.refused(format!(
            "cannot go back to lsn:{lsn}: the log reaches from lsn:{floor}; where that moment is \
             kept, `tidelog image open {name} --at lsn:{lsn}` shows it, and what is needed can be \
             copied from there; else `tidelog backup restore`"
        )))
    }

    /// The content at the end of a request that the log covers.
    pub(super) fn content_at(&self, lsn: Lsn) -> Result<Content, GroupError> {
        loop {
            let (horizon, rewinds) = {
                let core = self.lock();
                self.check_in_log(&core, lsn)?;
                self.check_barrier(&core, lsn)?;
                (core.horizon.clone(), core.content.rewinds.clone())
            };
            match replay(&self.segments, &horizon, &rewinds, lsn) {
                Ok((content, end)) if end.lsn == lsn && content.remembered.end == lsn => {
                    return Ok(content);
                }
                Ok(_) => return Err(self.refused(format!("lsn:{lsn} is not the end of a request"))),
                // A fold has overtaken it.
                Err(_) if self.lock().timeline.horizon().lsn > horizon.position.lsn => {}
                Err(ScanEnd::Io(cause)) => return Err(self.io("read log", &cause)),
                Err(cause) => return Err(self.damaged(format!("log up to {lsn}: {cause}"))),
            }
        }
    }

    /// A copy went back as its primary did.
    pub(super) fn tell_went_back(&self, at: Lsn, record: &RewindRecord) {
        let text = format!(
            "the primary went back to lsn:{}, {}, and so did this copy; what was left behind is in \
             the log up to lsn:{at}",
            record.to, record.time
        );
        let details = json!({ "lsn": at, "to_lsn": record.to, "to": record.time });
        self.emit(Severity::Warning, "rewound", text, details);
    }

    fn tell_rewound(&self, rewound: &Rewound) {
        let Rewound { at, from, to } = rewound;
        let text = format!(
            "went back to lsn:{}, {}: volumes and data are what they were then; what was written \
             since is in the log up to lsn:{}, and `tidelog rewind {} --to lsn:{}` brings it back",
            to.lsn,
            to.time,
            from.lsn,
            self.name(),
            from.lsn
        );
        let details = json!({ "lsn": at, "from": from, "to": to });
        self.emit(Severity::Warning, "rewound", text, details);
    }

    /// The next record that comes from the primary goes back to `to`.
    ///
    /// # Errors
    ///
    /// Where it cannot be followed here.
    pub(super) fn get_ready_to_go_back(&self, at: Lsn, to: Lsn) -> Result<(), ReceiveError> {
        let wrong = |what: String| ReceiveError { at, what };
        let floor = {
            let core = self.lock();
            core.fold_target.max(core.timeline.horizon().lsn)
        };
        if to < floor {
            let reason = format!(
                "the primary went back to lsn:{to}, and the base here is at lsn:{floor} already: \
                 this copy stays as it was before that, and an image takes its place"
            );
            let known = self.lock().needs_image.replace(reason.clone()).is_some();
            if !known {
                let details = json!({ "lsn": at, "to_lsn": to, "base_lsn": floor });
                self.emit(Severity::Warning, "rewind-needs-image", reason.clone(), details);
            }
            return Err(wrong(reason));
        }
        let then = self.content_at(to).map_err(|error| wrong(error.to_string()))?;
        self.lock().content.prepare(to, then);
        Ok(())
    }

    /// Why the log of the primary cannot be followed further here, so that an image has to come.
    #[must_use]
    pub fn needs_image(&self) -> Option<String> {
        let core = self.lock();
        let ahead = || core.content.base_ahead.map(|target| self.base_is_ahead(target).to_string());
        core.needs_image.clone().or_else(ahead)
    }

    /// Whether that has to be all of an image: what is here is none.
    #[must_use]
    pub fn needs_whole_image(&self) -> bool {
        self.lock().content.base_ahead.is_some()
    }
}
