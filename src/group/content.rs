//! What a group holds at one position: its volumes with their maps, and its control records.
//!
//! The live group, an image, a fold and recovery are the same thing at different positions: a
//! [`Content`] at the horizon with records applied to it in order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Map;
use serde_json::value::RawValue;

use super::moment::KEPT;
use super::rewind::Remembered;
use super::rewound::Rewinds;
use super::{ControlView, RewindView, Volume};
use crate::base::{ControlEntry, ControlState};
use crate::extent_map::{ExtentMap, Freed};
use crate::log::control::{COUNTER_MAX, Control, VolumeRecord};
use crate::log::record::{ALIGNMENT, HEADER_BYTES, Header, Kind, flags};
use crate::units::{
    BLOCK_BYTES, EpochId, LogTime, Lsn, Name, NodeId, Position, SECTOR_BYTES, VolumeNumber,
};

/// The highest number of a volume: there is always one more.
pub(super) const VOLUME_NUMBER_MAX: VolumeNumber = VolumeNumber(u32::MAX - 1);
/// Bytes of a volume at most: what the map and the base count with.
pub(super) const VOLUME_BYTES_MAX: u64 = 1 << 60;

/// The highest place that an image of a peer may be at: as much again is left for the log, below
/// the addresses of what is kept.
pub(super) const PLACE_MAX: Lsn = Lsn(KEPT.0 / 2);

/// Whether a volume may have so many bytes.
pub(super) fn is_volume_size(bytes: u64) -> bool {
    bytes <= VOLUME_BYTES_MAX && bytes.is_multiple_of(BLOCK_BYTES)
}

/// A volume with its map.
#[derive(Clone)]
pub(super) struct VolumeContent {
    /// The volume.
    pub volume: Volume,
    /// Where its blocks are.
    pub map: ExtentMap,
    /// What rewinds have changed in it, as zeros since the record.
    pub touched: ExtentMap,
    /// The last rewind that brought it back after it had been removed.
    pub restored: Lsn,
}

/// A group at one position.
#[derive(Clone, Default)]
pub(super) struct Content {
    /// The volumes that exist.
    pub volumes: BTreeMap<VolumeNumber, VolumeContent>,
    /// The control records that count.
    pub table: ControlTable,
    /// The first record that had to be understood and was not: no image goes past it.
    pub barrier: Option<Lsn>,
    /// The rewinds among the records behind the horizon.
    pub rewinds: Rewinds,
    /// What those go back to, while they are applied.
    pub remembered: Remembered,
    /// A fold up to here had begun, and the log ends before it: the base is no moment, nor is this.
    pub base_ahead: Option<Lsn>,
}

/// A control record that counts.
pub(super) struct Entry {
    /// As it was written.
    pub raw: ControlEntry,
    /// What it says, where this version knows its kind.
    pub control: Option<Control>,
}

/// The control records that count, in log order: of those about one thing, the last.
#[derive(Clone, Default)]
pub(super) struct ControlTable {
    entries: Vec<Arc<Entry>>,
}

/// What a control record is about: a later one about the same thing replaces it.
#[derive(PartialEq)]
enum About<'a> {
    Group,
    Epoch(EpochId),
    Volume(VolumeNumber),
    Member(NodeId),
    Policy,
    Job(&'a Name),
    Bookmark(&'a Name),
}

impl Content {
    /// The content at the horizon.
    pub(super) fn at_horizon(state: &ControlState) -> Content {
        let remembered = Remembered::at(state.position.lsn);
        let mut content = Content { remembered, ..Content::default() };
        for entry in &state.entries {
            let control = read_control(entry.kind, entry.version, entry.body.get().as_bytes());
            // What does not fit was refused when it came in; here it is carried along.
            let fits = check_control(entry.lsn, control.as_ref().ok().and_then(Option::as_ref));
            let control = if fits.is_ok() { control.unwrap_or(None) } else { None };
            let entry = Entry { raw: entry.clone(), control };
            content.apply_entry(entry, &mut Vec::new());
        }
        content
    }

    /// Whether a record can be applied, or why not: bytes of a peer or a disk are not trusted to
    /// have the right shape because their checksum is.
    pub(super) fn check(&self, header: &Header, payload: &[u8]) -> Result<(), String> {
        match kind_of(header) {
            Some(Kind::Write | Kind::Zero | Kind::Trim) => {
                let Some(volume) = self.volumes.get(&header.volume) else {
                    return Err(format!("volume {} does not exist", header.volume));
                };
                let aligned = header.offset.is_multiple_of(SECTOR_BYTES)
                    && header.length.is_multiple_of(SECTOR_BYTES)
                    && header.length > 0;
                let end = header.offset.checked_add(header.length);
                if aligned && end.is_some_and(|end| end <= volume.volume.size_bytes) {
                    Ok(())
                } else {
                    Err(format!(
                        "{} bytes at {} do not fit volume {}",
                        header.length, header.offset, header.volume
                    ))
                }
            }
            Some(Kind::Control) => {
                raw_json(payload)?;
                let control = read_control(header.control_kind, header.version, payload)?;
                check_control(header.lsn, control.as_ref())
            }
            Some(Kind::FlushMark | Kind::Pad) | None => Ok(()),
        }
    }

    /// Applies a record that [`Content::check`] allows; anything else is passed over. `freed` takes
    /// what is dropped outside of locks. Whether the control records changed.
    pub(super) fn apply(
        &mut self,
        header: &Header,
        payload: &[u8],
        freed: &mut Vec<Freed>,
    ) -> bool {
        self.remember_before(header.lsn);
        let changed = self.apply_record(header, payload, freed);
        self.remembered.pass(header);
        changed
    }

    fn apply_record(&mut self, header: &Header, payload: &[u8], freed: &mut Vec<Freed>) -> bool {
        let applies = self.check(header, payload).is_ok();
        match kind_of(header) {
            Some(Kind::Write) if applies => {
                let volume = self.volumes.get_mut(&header.volume).expect("checked");
                let payload_lsn = header.payload_lsn();
                volume.map.write(header.offset, payload_lsn, header.length, &header.crcs);
                false
            }
            Some(Kind::Zero | Kind::Trim) if applies => {
                let volume = self.volumes.get_mut(&header.volume).expect("checked");
                let hole = header.flags & flags::NO_HOLE == 0;
                freed.push(volume.map.zero(header.offset, header.length, header.lsn, hole));
                false
            }
            Some(Kind::Control) if applies => {
                let body = raw_json(payload).expect("checked");
                let control = read_control(header.control_kind, header.version, payload);
                let control = control.expect("checked");
                if let Some(Control::Rewind(record)) = &control {
                    self.go_back(header, record, freed);
                }
                let raw = ControlEntry {
                    kind: header.control_kind,
                    version: header.version,
                    flags: header.flags,
                    lsn: header.lsn,
                    epoch: header.epoch,
                    time: header.time,
                    body,
                };
                self.apply_entry(Entry { raw, control }, freed);
                true
            }
            None if header.flags & flags::MUST_UNDERSTAND != 0 => {
                self.barrier.get_or_insert(header.lsn);
                false
            }
            _ => false,
        }
    }

    fn apply_entry(&mut self, entry: Entry, freed: &mut Vec<Freed>) {
        if let Some(Control::Volume(record)) = &entry.control {
            if record.removed {
                self.volumes.remove(&record.number);
            } else {
                let volume = Volume {
                    number: record.number,
                    name: record.name.clone(),
                    size_bytes: record.size_bytes,
                    restore_lsn: record.restore_lsn,
                    restoring: record.restoring,
                };
                match self.volumes.get_mut(&record.number) {
                    None => {
                        let (map, touched) = (ExtentMap::new(), ExtentMap::new());
                        let known = VolumeContent { volume, map, touched, restored: Lsn::ZERO };
                        self.volumes.insert(record.number, known);
                    }
                    Some(known) => {
                        let lost = known.volume.size_bytes.saturating_sub(volume.size_bytes);
                        if lost > 0 {
                            // What is cut off must not come back when the volume grows again, and
                            // the base below may still hold it.
                            let lsn = entry.raw.lsn;
                            freed.push(known.map.zero(volume.size_bytes, lost, lsn, true));
                        }
                        known.volume = volume;
                    }
                }
            }
        }
        if entry.control.is_none() && entry.raw.flags & flags::MUST_UNDERSTAND != 0 {
            self.barrier.get_or_insert(entry.raw.lsn);
        }
        self.table.apply(entry);
    }
}

impl Entry {
    fn is_volume(&self) -> bool {
        matches!(self.control, Some(Control::Volume(_)))
    }
}

impl ControlTable {
    fn apply(&mut self, entry: Entry) {
        if let Some(about) = entry.control.as_ref().and_then(About::of) {
            let about = Some(about);
            self.entries.retain(|old| old.control.as_ref().and_then(About::of) != about);
        }
        self.entries.push(Arc::new(entry));
    }

    /// Spans of log time that nobody measured, in order: log time took a jump of the wall clock.
    pub(super) fn unmeasured(&self) -> Vec<(LogTime, LogTime)> {
        self.jumps_from(Lsn::ZERO).collect()
    }

    /// How much of log time nobody measured, by the records from a position on.
    pub(super) fn unmeasured_from(&self, from: Lsn) -> Duration {
        self.jumps_from(from).map(|(before, after)| after.since(before)).sum()
    }

    fn jumps_from(&self, from: Lsn) -> impl Iterator<Item = (LogTime, LogTime)> + '_ {
        self.entries.iter().filter_map(move |entry| match &entry.control {
            Some(Control::Clock(record))
                if entry.raw.lsn >= from && entry.raw.time >= record.wall =>
            {
                Some((record.before, entry.raw.time))
            }
            _ => None,
        })
    }

    /// The highest number that a volume ever had.
    pub(super) fn highest_volume(&self) -> u32 {
        let numbers = self.entries.iter().filter_map(|entry| match &entry.control {
            Some(Control::Volume(record)) => Some(record.number.0),
            Some(Control::Rewind(record)) => Some(record.highest_volume.0),
            _ => None,
        });
        numbers.max().unwrap_or(0)
    }

    /// The records of volumes, those of removed ones too.
    pub(super) fn volume_entries(&self) -> Vec<Arc<Entry>> {
        self.entries.iter().filter(|entry| entry.is_volume()).cloned().collect()
    }

    /// Where the last record of a volume is: what it is since.
    pub(super) fn volume_is_since(&self, number: VolumeNumber) -> Lsn {
        let of = |entry: &&Arc<Entry>| match &entry.control {
            Some(Control::Volume(record)) => record.number == number,
            _ => false,
        };
        self.entries.iter().filter(of).map(|entry| entry.raw.lsn).max().unwrap_or_default()
    }

    /// The volumes are those of another table.
    pub(super) fn replace_volumes(&mut self, volumes: Vec<Arc<Entry>>) {
        self.entries.retain(|entry| !entry.is_volume());
        self.entries.extend(volumes);
        self.entries.sort_by_key(|entry| entry.raw.lsn);
    }

    /// Where the last rewind is that is known.
    pub(super) fn last_rewind(&self) -> Option<Lsn> {
        let is_rewind = |entry: &&Arc<Entry>| matches!(entry.control, Some(Control::Rewind(_)));
        self.entries.iter().filter(is_rewind).map(|entry| entry.raw.lsn).max()
    }

    /// The numbers of volumes that were removed.
    pub(super) fn removed_volumes(&self) -> impl Iterator<Item = VolumeNumber> {
        self.entries.iter().filter_map(|entry| match &entry.control {
            Some(Control::Volume(record)) if record.removed => Some(record.number),
            _ => None,
        })
    }

    /// What is carried into the base at `target`: without what is gone, what no longer can be
    /// reached, and what says nothing about the state. A removed volume stays, since its number is
    /// never used again.
    pub(super) fn folded(&self, target: Lsn) -> Vec<ControlEntry> {
        let last_rewind = self.last_rewind();
        let stays = |entry: &&Arc<Entry>| match &entry.control {
            Some(Control::Clock(_)) => false,
            // The last says which numbers were used, and how the volumes came to be what they are.
            Some(Control::Rewind(_)) => Some(entry.raw.lsn) == last_rewind,
            Some(Control::Job(record)) => !record.removed,
            Some(Control::Member(record)) => !record.removed,
            Some(Control::Bookmark(record)) => {
                !record.removed && (record.pinned || record.lsn >= target)
            }
            Some(
                Control::Group(_) | Control::Epoch(_) | Control::Volume(_) | Control::Policy(_),
            )
            | None => true,
        };
        self.entries.iter().filter(stays).map(|entry| entry.raw.clone()).collect()
    }

    /// What the records say, for other rooms.
    pub(super) fn view(&self, volumes: Vec<Volume>) -> ControlView {
        let mut view = ControlView { volumes, ..ControlView::default() };
        for entry in &self.entries {
            match &entry.control {
                Some(Control::Member(record)) if !record.removed => {
                    view.members.push(record.clone());
                }
                Some(Control::Job(record)) if !record.removed => view.jobs.push(record.clone()),
                Some(Control::Bookmark(record)) if !record.removed => {
                    view.bookmarks.push(record.clone());
                }
                Some(Control::Epoch(record)) => view.epochs.push(record.clone()),
                Some(Control::Policy(record)) => view.policy = record.clone(),
                Some(Control::Rewind(record)) => view.rewinds.push(RewindView {
                    at: Position {
                        epoch: entry.raw.epoch,
                        lsn: entry.raw.lsn,
                        time: entry.raw.time,
                    },
                    to: record.to,
                    to_time: record.time,
                }),
                _ => {}
            }
        }
        view.bookmarks.sort_by_key(|bookmark| bookmark.lsn);
        view.epochs.sort_by_key(|epoch| epoch.first_lsn);
        view
    }
}

impl About<'_> {
    /// `None` for what stands for itself: each jump of the clock, each rewind.
    fn of(control: &Control) -> Option<About<'_>> {
        Some(match control {
            Control::Group(_) => About::Group,
            Control::Epoch(record) => About::Epoch(record.id),
            Control::Volume(record) => About::Volume(record.number),
            Control::Member(record) => About::Member(record.node),
            Control::Policy(_) => About::Policy,
            Control::Job(record) => About::Job(&record.name),
            Control::Bookmark(record) => About::Bookmark(&record.name),
            Control::Clock(_) | Control::Rewind(_) => return None,
        })
    }
}

/// What says that a volume is so from now on, or is gone.
pub(super) fn volume_record(volume: Volume, removed: bool) -> Control {
    let Volume { number, name, size_bytes, restore_lsn, restoring } = volume;
    let other = Map::new();
    let record = VolumeRecord { number, name, size_bytes, restore_lsn, restoring, removed, other };
    Control::Volume(record)
}

/// The kind of a record. A control record of a later version is one too: it is carried along.
pub(super) fn kind_of(header: &Header) -> Option<Kind> {
    if header.kind == Kind::Control as u8 { Some(Kind::Control) } else { header.known_kind() }
}

/// Reads a body; `None` for what a later version wrote.
pub(super) fn read_control(kind: u32, version: u8, body: &[u8]) -> Result<Option<Control>, String> {
    if version != 1 {
        return Ok(None);
    }
    Control::from_json(kind, body)
        .map_err(|error| format!("control record of kind {kind}: {error}"))
}

/// Whether what a control record at `lsn` says can be.
fn check_control(lsn: Lsn, control: Option<&Control>) -> Result<(), String> {
    match control {
        Some(Control::Volume(record))
            if record.number.0 == 0 || record.number > VOLUME_NUMBER_MAX =>
        {
            Err(format!("a volume has the number {}", record.number))
        }
        Some(Control::Volume(record)) if !is_volume_size(record.size_bytes) => {
            Err(format!("a volume has {} bytes", record.size_bytes))
        }
        Some(Control::Epoch(record)) if record.counter > COUNTER_MAX => {
            Err(format!("a reign has the number {}", record.counter))
        }
        Some(Control::Epoch(record)) if record.first_lsn > lsn => {
            Err(format!("a reign begins at LSN {}, behind its record", record.first_lsn))
        }
        Some(Control::Rewind(record)) if record.to > lsn => {
            Err(format!("a rewind goes to lsn:{}, which is behind it", record.to))
        }
        Some(Control::Rewind(record)) if record.highest_volume > VOLUME_NUMBER_MAX => {
            Err(format!("a rewind knows a volume {}", record.highest_volume))
        }
        _ => Ok(()),
    }
}

/// Whether a group can be what a peer's control state says.
pub(super) fn check_state(state: &ControlState) -> Result<(), String> {
    let at = state.position.lsn;
    check_place(at)?;
    // Each has a record of its own at least.
    if state.requests > at.0 / HEADER_BYTES as u64 {
        return Err(format!("{} requests up to LSN {at}", state.requests));
    }
    for entry in &state.entries {
        if entry.lsn >= at {
            return Err(format!("a control record at LSN {}, behind LSN {at}", entry.lsn));
        }
        let control = read_control(entry.kind, entry.version, entry.body.get().as_bytes())?;
        check_control(entry.lsn, control.as_ref())?;
    }
    Ok(())
}

/// Whether a record may end at a place that a peer names, with room for a log behind it.
pub(super) fn check_place(lsn: Lsn) -> Result<(), String> {
    if lsn > PLACE_MAX {
        return Err(format!("no log is as long as LSN {lsn}"));
    }
    if !lsn.0.is_multiple_of(ALIGNMENT) {
        return Err(format!("no record ends at LSN {lsn}"));
    }
    Ok(())
}

fn raw_json(payload: &[u8]) -> Result<Box<RawValue>, String> {
    let text = std::str::from_utf8(payload).map_err(|error| format!("control record: {error}"))?;
    RawValue::from_string(text.to_owned()).map_err(|error| format!("control record: {error}"))
}
