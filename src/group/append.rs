//! The way of a write: checksums before the lock, place, header, one vectored write and the map
//! under it.

use std::sync::Arc;

use serde_json::Map;

use super::content::{VOLUME_NUMBER_MAX, is_volume_size, volume_record};
use super::engine::{Core, Group, is_callers, volume_named};
use super::{BookmarkRecord, GroupError, Op, Request, Volume};
use crate::extent_map::Freed;
use crate::io::is_full;
use crate::log::control::{Consistency, Control};
use crate::log::record::{Kind, flags, payload_crcs};
use crate::log::segment::payload_bytes_max;
use crate::log::writer::{Draft, Stamp};
use crate::units::{BLOCK_BYTES, EpochId, Lsn, Name, SECTOR_BYTES, VolumeNumber};

/// Bytes of one request at most.
pub const REQUEST_BYTES_MAX: usize = 64 << 20;

/// Checksums of one request, one list per record that it becomes.
type Checksums = Vec<Vec<u32>>;

impl Group {
    /// Appends a batch in order as one vectored write; per request the end LSN. Each request is
    /// atomic. A refused request does not hold up the others.
    pub fn append(&self, requests: &[Request<'_>]) -> Vec<Result<Lsn, GroupError>> {
        self.append_until(requests, &|| false)
    }

    /// As [`Group::append`], for a client that may go while it waits: once `ended` is true, the
    /// wait ends, and neither what waited nor what follows it is appended. `ended` stays true, and
    /// is asked without a lock.
    pub fn append_until(
        &self,
        requests: &[Request<'_>],
        ended: &dyn Fn() -> bool,
    ) -> Vec<Result<Lsn, GroupError>> {
        let mut results = Vec::with_capacity(requests.len());
        let mut rest = requests;
        while !rest.is_empty() {
            let aligned = rest.iter().take_while(|request| is_aligned(&request.op)).count();
            if aligned > 0 {
                results.extend(self.append_aligned(&rest[..aligned], ended));
                rest = &rest[aligned..];
            } else {
                results.push(self.append_unaligned(&rest[0], ended));
                rest = &rest[1..];
            }
            if let Some(Err(error)) = results.last()
                && ended()
            {
                let error = error.clone();
                results.extend(rest.iter().map(|_| Err(error.clone())));
                break;
            }
        }
        self.report();
        self.notify();
        results
    }

    fn append_aligned(
        &self,
        requests: &[Request<'_>],
        ended: &dyn Fn() -> bool,
    ) -> Vec<Result<Lsn, GroupError>> {
        let part_bytes = payload_bytes_max(self.segment_bytes());
        let mut checksums: Vec<Checksums> = requests
            .iter()
            .map(|request| match request.op {
                Op::Write { offset, data } => parts(offset, data, part_bytes)
                    .map(|(offset, part)| payload_crcs(offset, part))
                    .collect(),
                _ => Vec::new(),
            })
            .collect();
        let mut freed = Vec::new();
        let mut core = match self.lock_for_append(ended) {
            Ok(core) => core,
            Err(error) => return requests.iter().map(|_| Err(error.clone())).collect(),
        };
        let mut drafts: Vec<Draft<'_>> = Vec::with_capacity(requests.len());
        let mut results = Vec::with_capacity(requests.len());
        let mut ends = Vec::with_capacity(requests.len());
        let mut unflushed = core.unflushed;
        for (request, checksums) in requests.iter().zip(&mut checksums) {
            let before = drafts.len();
            results.push(self.check_request(&core, request));
            if results.last().is_some_and(Result::is_ok) {
                match request.op {
                    Op::Flush if !unflushed => {}
                    _ => draft(request, std::mem::take(checksums), part_bytes, &mut drafts),
                }
                unflushed = match request.op {
                    Op::Flush => false,
                    _ => unflushed || drafts.len() > before,
                };
            }
            ends.push(drafts.len());
        }
        let lsns = self.append_drafts(&mut core, drafts, None, &mut freed);
        drop(core);
        drop(freed);
        match lsns {
            Ok((start, lsns)) => {
                let end_of = |end: usize| if end == 0 { start } else { lsns[end - 1] };
                for (result, end) in results.iter_mut().zip(ends) {
                    if result.is_ok() {
                        *result = Ok(end_of(end));
                    }
                }
            }
            Err(error) => {
                for result in results.iter_mut().filter(|result| result.is_ok()) {
                    *result = Err(error.clone());
                }
            }
        }
        results
    }

    /// Writes drafts and applies them; where the log stood, and the end of each.
    pub(super) fn append_drafts(
        &self,
        core: &mut Core,
        drafts: Vec<Draft<'_>>,
        epoch: Option<EpochId>,
        freed: &mut Vec<Freed>,
    ) -> Result<(Lsn, Vec<Lsn>), GroupError> {
        let start = core.writer.head();
        if drafts.is_empty() {
            return Ok((start, Vec::new()));
        }
        let clock = &self.context.env.clock;
        let (wall, monotonic) = (clock.wall(), clock.monotonic());
        let (time, jump) = match epoch {
            None => core.clock.tick(wall, monotonic),
            Some(_) => (core.clock.tick_epoch(wall, monotonic), None),
        };
        let stamp = Stamp { epoch: epoch.unwrap_or(core.epoch), time, durable: core.durable };
        if let Some(jump) = jump {
            let record = Control::Clock(jump.record());
            let body = record.to_json();
            self.write_drafts(core, vec![control_draft(&record, &body)], stamp, freed)?;
            core.unreported.push(jump.report());
        }
        let ends = self.write_drafts(core, drafts, stamp, freed)?;
        self.appended(core, start);
        Ok((start, ends))
    }

    /// Writes drafts with one vectored write and applies them; the end of each.
    fn write_drafts(
        &self,
        core: &mut Core,
        drafts: Vec<Draft<'_>>,
        stamp: Stamp,
        freed: &mut Vec<Freed>,
    ) -> Result<Vec<Lsn>, GroupError> {
        let payloads: Vec<&[u8]> = drafts.iter().map(|draft| draft.payload).collect();
        let headers = match core.writer.append(drafts, stamp) {
            Ok(headers) => headers,
            // A full disk is the writer's to bear; anything else may have harmed the log.
            Err(cause) if is_full(&cause) => {
                self.note_refused(core, &cause);
                return Err(self.io("append", &cause));
            }
            Err(cause) => return Err(self.fail_locked(core, "append", &cause)),
        };
        let mut payloads = payloads.into_iter();
        let mut ends = Vec::with_capacity(headers.len());
        for header in &headers {
            if header.kind == Kind::Pad as u8 {
                core.apply(header, &[], freed);
            } else {
                core.apply(header, payloads.next().unwrap_or_default(), freed);
                ends.push(header.end());
            }
        }
        Ok(ends)
    }

    fn check_request(&self, core: &Core, request: &Request<'_>) -> Result<Lsn, GroupError> {
        let (offset, length) = match request.op {
            Op::Write { offset, data } => (offset, data.len() as u64),
            Op::Zero { offset, length, .. } | Op::Trim { offset, length } => (offset, length),
            Op::Flush => return Ok(Lsn::ZERO),
        };
        let Some(volume) = core.content.volumes.get(&request.volume) else {
            return Err(self.no_volume(request.volume));
        };
        let end = offset.checked_add(length);
        let too_long = matches!(request.op, Op::Write { .. }) && length > REQUEST_BYTES_MAX as u64;
        if too_long || end.is_none_or(|end| end > volume.volume.size_bytes) {
            return Err(GroupError::OutOfRange { group: self.name().clone(), offset, length });
        }
        Ok(Lsn::ZERO)
    }

    /// A request that begins or ends inside a sector: the sectors at its edges are read before the
    /// lock, and again where their place in the map has changed meanwhile.
    fn append_unaligned(
        &self,
        request: &Request<'_>,
        ended: &dyn Fn() -> bool,
    ) -> Result<Lsn, GroupError> {
        let (offset, length, data) = match request.op {
            Op::Write { offset, data } => (offset, data.len() as u64, Some(data)),
            Op::Zero { offset, length, .. } | Op::Trim { offset, length } => (offset, length, None),
            Op::Flush => (0, 0, None),
        };
        self.check_request(&self.lock(), request)?;
        let (begin, end) = (
            offset / SECTOR_BYTES * SECTOR_BYTES,
            (offset + length).next_multiple_of(SECTOR_BYTES),
        );
        let sector = SECTOR_BYTES as usize;
        loop {
            let edges = [begin, end - SECTOR_BYTES];
            let mut old = [vec![0; sector], vec![0; sector]];
            let places = self.read_sectors(request.volume, edges, &mut old)?;
            let change = |at: u64, bytes: &mut [u8]| {
                let from = offset.max(at);
                let to = (offset + length).min(at + bytes.len() as u64);
                let target = &mut bytes[(from - at) as usize..(to - at) as usize];
                match data {
                    Some(data) => {
                        target.copy_from_slice(
                            &data[(from - offset) as usize..(to - offset) as usize],
                        );
                    }
                    None => target.fill(0),
                }
            };
            // A write becomes one longer write; a zero becomes zeros inside and a write per edge.
            let mut writes: Vec<(u64, Vec<u8>)> = Vec::new();
            let mut inside = (0, 0);
            if data.is_some() || end - begin <= 2 * SECTOR_BYTES {
                let mut bytes = vec![0; (end - begin) as usize];
                let last = bytes.len() - sector;
                bytes[last..].copy_from_slice(&old[1]);
                bytes[..sector].copy_from_slice(&old[0]);
                change(begin, &mut bytes);
                writes.push((begin, bytes));
            } else {
                inside = (
                    offset.next_multiple_of(SECTOR_BYTES),
                    (offset + length) / SECTOR_BYTES * SECTOR_BYTES,
                );
                for (at, mut bytes) in edges.into_iter().zip(old) {
                    if at < inside.0 || at >= inside.1 {
                        change(at, &mut bytes);
                        writes.push((at, bytes));
                    }
                }
            }
            let part_bytes = payload_bytes_max(self.segment_bytes());
            let checksums: Vec<Checksums> = writes
                .iter()
                .map(|(at, bytes)| {
                    parts(*at, bytes, part_bytes).map(|(at, part)| payload_crcs(at, part)).collect()
                })
                .collect();
            let mut freed = Vec::new();
            let mut core = self.lock_for_append(ended)?;
            self.check_request(&core, request)?;
            if self.places(&core, request.volume, edges)? != places {
                continue;
            }
            let mut drafts = Vec::new();
            for ((at, bytes), checksums) in writes.iter().zip(checksums) {
                let op = Op::Write { offset: *at, data: bytes };
                draft(&Request { op, ..*request }, checksums, part_bytes, &mut drafts);
            }
            if inside.1 > inside.0 {
                let op = match request.op {
                    Op::Zero { no_hole, .. } => {
                        Op::Zero { offset: inside.0, length: inside.1 - inside.0, no_hole }
                    }
                    _ => Op::Trim { offset: inside.0, length: inside.1 - inside.0 },
                };
                draft(&Request { op, ..*request }, Vec::new(), part_bytes, &mut drafts);
            }
            let count = drafts.len();
            for draft in &mut drafts[..count - 1] {
                draft.flags &= !(flags::LAST_OF_REQUEST | flags::FUA);
            }
            let result = self.append_drafts(&mut core, drafts, None, &mut freed);
            drop(core);
            return result.map(|(_, ends)| ends[count - 1]);
        }
    }

    /// Appends one control record (as primary), and waits until it is durable; its end.
    ///
    /// # Errors
    ///
    /// Where this node is not the primary or failed; for kinds that only the engine writes.
    pub fn append_control(&self, control: Control) -> Result<Lsn, GroupError> {
        if !is_callers(control.kind()) {
            return Err(
                self.refused(format!("{:?} records are not appended by hand", control.kind()))
            );
        }
        self.append_control_with(|_| Ok(control))
    }

    /// Appends the record that `make` decides on under the lock.
    pub(super) fn append_control_with(
        &self,
        make: impl FnOnce(&mut Core) -> Result<Control, GroupError>,
    ) -> Result<Lsn, GroupError> {
        let mut freed = Vec::new();
        let appended = {
            let mut core = self.lock_for_control()?;
            make(&mut core)
                .and_then(|control| self.append_body(&mut core, &control, None, &mut freed))
        };
        drop(freed);
        // Also where it failed: the group may have failed with it.
        self.report();
        self.notify();
        // It may say for whom hosts wait.
        self.space.notify_all();
        let end = appended?;
        self.sync_now()?;
        Ok(end)
    }

    pub(super) fn append_body(
        &self,
        core: &mut Core,
        control: &Control,
        epoch: Option<EpochId>,
        freed: &mut Vec<Freed>,
    ) -> Result<Lsn, GroupError> {
        let body = control.to_json();
        let bytes_max = payload_bytes_max(self.segment_bytes());
        if body.len() > bytes_max {
            let what =
                format!("control record: got {} bytes, expected at most {bytes_max}", body.len());
            return Err(self.refused(what));
        }
        let (_, ends) =
            self.append_drafts(core, vec![control_draft(control, &body)], epoch, freed)?;
        Ok(*ends.last().expect("one record"))
    }

    /// The very first record of the log.
    pub(super) fn append_first(
        &self,
        control: &Control,
        epoch: EpochId,
    ) -> Result<Lsn, GroupError> {
        self.append_body(&mut self.lock(), control, Some(epoch), &mut Vec::new())
    }

    /// Makes a volume, durable on return.
    ///
    /// # Errors
    ///
    /// Where the name is taken or the size is no multiple of 4096.
    pub fn create_volume(&self, name: Name, size_bytes: u64) -> Result<Volume, GroupError> {
        self.make_volume(name, size_bytes, |_| false)
    }

    /// The same; no host is served it where its contents are yet to come, as is asked under the
    /// lock.
    pub(super) fn make_volume(
        &self,
        name: Name,
        size_bytes: u64,
        comes_to_be: impl FnOnce(VolumeNumber) -> bool,
    ) -> Result<Volume, GroupError> {
        self.check_size(&name, size_bytes)?;
        let mut made = None;
        self.append_control_with(|core| {
            if volume_named(core, &name).is_some() {
                let name = name.to_string();
                return Err(GroupError::Exists {
                    group: self.name().clone(),
                    what: "volume",
                    name,
                });
            }
            let number = VolumeNumber(core.content.table.highest_volume().saturating_add(1));
            if number > VOLUME_NUMBER_MAX {
                return Err(self.refused("has used all numbers of volumes; make another group"));
            }
            let (name, restoring) = (name.clone(), comes_to_be(number));
            let restore_lsn = restoring.then(|| core.writer.head());
            let volume = Volume { number, name, size_bytes, restore_lsn, restoring };
            made = Some(volume.clone());
            Ok(volume_record(volume, false))
        })?;
        Ok(made.expect("made under the lock"))
    }

    /// Gives a volume another size, durable on return. What is cut off is gone.
    ///
    /// # Errors
    ///
    /// Where the volume does not exist or the size is no multiple of 4096.
    pub fn resize_volume(&self, name: &Name, size_bytes: u64) -> Result<Volume, GroupError> {
        self.check_size(name, size_bytes)?;
        let mut made = None;
        self.append_control_with(|core| {
            let volume = volume_named(core, name).ok_or_else(|| self.no_volume_named(name))?;
            let volume = Volume { size_bytes, ..volume };
            made = Some(volume.clone());
            Ok(volume_record(volume, false))
        })?;
        Ok(made.expect("made under the lock"))
    }

    /// Removes a volume, durable on return; images of earlier moments keep it.
    ///
    /// # Errors
    ///
    /// Where the volume does not exist.
    pub fn remove_volume(&self, name: &Name) -> Result<(), GroupError> {
        self.append_control_with(|core| {
            let volume = volume_named(core, name).ok_or_else(|| self.no_volume_named(name))?;
            Ok(volume_record(volume, true))
        })?;
        Ok(())
    }

    /// Names the present end of requests, durable on return.
    ///
    /// # Errors
    ///
    /// Where the name is taken.
    pub fn create_bookmark(
        &self,
        name: Name,
        consistency: Consistency,
    ) -> Result<BookmarkRecord, GroupError> {
        self.add_bookmark(name, consistency, false)
    }

    /// The same, and each node keeps the moment readable when its log no longer covers it.
    ///
    /// # Errors
    ///
    /// Where the name is taken.
    pub fn pin_bookmark(
        &self,
        name: Name,
        consistency: Consistency,
    ) -> Result<BookmarkRecord, GroupError> {
        self.add_bookmark(name, consistency, true)
    }

    fn add_bookmark(
        &self,
        name: Name,
        consistency: Consistency,
        pinned: bool,
    ) -> Result<BookmarkRecord, GroupError> {
        let mut made = None;
        self.append_control_with(|core| {
            if core.view.bookmarks.iter().any(|known| known.name == name) {
                let name = name.to_string();
                return Err(GroupError::Exists {
                    group: self.name().clone(),
                    what: "bookmark",
                    name,
                });
            }
            let end = core.timeline.end();
            let record = BookmarkRecord {
                name: name.clone(),
                lsn: end.lsn,
                time: end.time,
                consistency,
                pinned,
                removed: false,
                other: Map::new(),
            };
            made = Some(record.clone());
            Ok(Control::Bookmark(record))
        })?;
        Ok(made.expect("made under the lock"))
    }

    fn check_size(&self, name: &Name, size_bytes: u64) -> Result<(), GroupError> {
        if size_bytes == 0 || !is_volume_size(size_bytes) {
            return Err(self.refused(format!(
                "volume {name}: size: got {size_bytes} bytes, expected a multiple of 4096 up to 1 EiB"
            )));
        }
        Ok(())
    }

    pub(super) fn no_volume(&self, number: VolumeNumber) -> GroupError {
        GroupError::NoVolume { group: self.name().clone(), volume: format!("number {number}") }
    }

    fn no_volume_named(&self, name: &Name) -> GroupError {
        GroupError::NoVolume { group: self.name().clone(), volume: name.to_string() }
    }

    /// Looks up the volume that `Arc`-holders of other rooms name.
    #[must_use]
    pub fn volume(self: &Arc<Self>, name: &Name) -> Option<Volume> {
        volume_named(&self.lock(), name)
    }
}

fn control_draft<'a>(control: &Control, body: &'a [u8]) -> Draft<'a> {
    Draft {
        kind: Kind::Control,
        flags: control.flags() | flags::LAST_OF_REQUEST,
        volume: VolumeNumber(0),
        control_kind: control.kind() as u32,
        offset: 0,
        length: 0,
        payload: body,
        crcs: payload_crcs(0, body),
    }
}

/// The parts of a payload that become records, each but the last ending on a block of the volume.
fn parts(offset: u64, data: &[u8], part_bytes: usize) -> impl Iterator<Item = (u64, &[u8])> {
    let (mut at, mut rest) = (offset, data);
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let until_block = part_bytes - (at % BLOCK_BYTES) as usize;
        let (part, behind) = rest.split_at(until_block.min(rest.len()));
        let start = at;
        at += part.len() as u64;
        rest = behind;
        Some((start, part))
    })
}

/// The records of a request whose edges lie on sectors.
fn draft<'a>(
    request: &Request<'a>,
    checksums: Checksums,
    part_bytes: usize,
    drafts: &mut Vec<Draft<'a>>,
) {
    let fua = if request.fua { flags::FUA } else { 0 };
    let base = Draft {
        kind: Kind::FlushMark,
        flags: flags::LAST_OF_REQUEST | fua,
        volume: request.volume,
        control_kind: 0,
        offset: 0,
        length: 0,
        payload: &[],
        crcs: Vec::new(),
    };
    match request.op {
        Op::Write { offset, data } => {
            let first = drafts.len();
            for ((offset, part), crcs) in parts(offset, data, part_bytes).zip(checksums) {
                drafts.push(Draft {
                    kind: Kind::Write,
                    flags: 0,
                    offset,
                    length: part.len() as u64,
                    payload: part,
                    crcs,
                    ..base
                });
            }
            if let Some(last) = drafts[first..].last_mut() {
                last.flags = base.flags;
            }
        }
        Op::Zero { length: 0, .. } | Op::Trim { length: 0, .. } => {}
        Op::Zero { offset, length, no_hole } => {
            let keep = if no_hole { flags::NO_HOLE } else { 0 };
            let flags = base.flags | keep;
            drafts.push(Draft { kind: Kind::Zero, flags, offset, length, ..base });
        }
        Op::Trim { offset, length } => {
            drafts.push(Draft { kind: Kind::Trim, offset, length, ..base });
        }
        Op::Flush => drafts.push(Draft { volume: VolumeNumber(0), ..base }),
    }
}

fn is_aligned(op: &Op<'_>) -> bool {
    let (offset, length) = match *op {
        Op::Write { offset, data } => (offset, data.len() as u64),
        Op::Zero { offset, length, .. } | Op::Trim { offset, length } => (offset, length),
        Op::Flush => return true,
    };
    length == 0 || (offset.is_multiple_of(SECTOR_BYTES) && length.is_multiple_of(SECTOR_BYTES))
}
