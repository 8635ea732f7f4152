//! Takes from a peer what rotted here, and gives a peer what it asks for: records of the log by
//! place and chain, blocks of a volume by place and position.
//!
//! A peer's bytes count for nothing by themselves. Records are taken where they continue the chain
//! of what is whole before the gap, and what stands behind the gap here continues theirs; blocks
//! where they are what the base's own sums say. So nothing that is whole is ever changed, and who
//! has damage gives none of it away. Where a primary has stopped and nothing behind its gap says
//! what belongs there, records are taken only of reigns that were its own log's, and only around
//! what is whole here: a peer that was promoted has others at the same places.
//!
//! Both are written in place: what is overwritten is damaged already, each sector of a write that
//! tears is the old one or the right one, and the next look finds what is still wrong.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::engine::Group;
use super::staging::born_in;
use super::{EpochRecord, GroupError, Point, Read, View};
use crate::base::BaseVolume;
use crate::log::control::{Control, ControlKind};
use crate::log::reader::Scanner;
use crate::log::record::{Header, Kind, MAGIC};
use crate::log::segment::fits;
use crate::units::{BLOCK_BYTES, Chain, Lsn, NodeId, VolumeNumber};

/// Bytes of the log that one answer carries at most.
pub const REPAIR_BYTES_MAX: u64 = 4 << 20;
/// Bytes that are looked at together where the disk may fail to read.
const PAGE_BYTES: usize = 4096;
/// Blocks that one answer carries at most: those of a chunk.
pub const REPAIR_BLOCKS_MAX: usize = 256;

/// Blocks of a volume that are the same from one position to another, and are asked for as of any
/// between them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// The first position.
    pub from: Lsn,
    /// The last position.
    pub to: Lsn,
    /// Their numbers in the volume.
    pub blocks: Vec<u64>,
}

/// Where a log is damaged: no whole record stands at `at` that continues `chain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Where the next record belongs.
    pub at: Lsn,
    /// What it must continue.
    pub chain: Chain,
}

/// What became of records that a peer gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mended {
    /// The log is whole from the gap up to here.
    To(Lsn),
    /// What the peer gave ends before the log here is whole again, or does not lead to it.
    Short,
}

/// The places behind whole records that continue `gap`, with the checksum of the last one before
/// each. A pad counts as whole by its header, since nothing tells what stands in it.
fn whole_records(gap: Gap, bytes: &[u8], segment_bytes: u64) -> Vec<Gap> {
    let mut ends = Vec::new();
    let mut next = gap;
    while let Some(rest) = bytes.get(next.at.bytes_since(gap.at) as usize..)
        && let Ok(header) = Header::decode(rest)
        && header.follows(next.at, next.chain)
    {
        let room = segment_bytes - next.at.segment_offset(segment_bytes);
        let (record_bytes, pad) = (header.record_bytes(), header.kind == Kind::Pad as u8);
        let placed = if pad { record_bytes == room } else { fits(record_bytes, room) };
        let from = header.header_bytes() as usize;
        let body = rest.get(from..from + header.body_bytes() as usize);
        let there = pad || rest.len() as u64 >= record_bytes;
        let whole = pad || body.is_some_and(|body| header.body_is_whole(body));
        if !(placed && there && whole) {
            break;
        }
        next = Gap { at: header.end(), chain: header.checksum };
        ends.push(next);
    }
    ends
}

/// The reign that whole records end in, where it is another node's and began among them; none
/// where it was known before, or is this node's own. `bytes` are those records.
fn begun_elsewhere(known: &[EpochRecord], me: NodeId, bytes: &[u8]) -> Option<Reign> {
    let (mut rest, mut reign) = (bytes, None);
    while let Ok(header) = Header::decode(rest) {
        let from = header.header_bytes() as usize;
        let body = rest.get(from..from + header.payload_bytes as usize).unwrap_or_default();
        let is_known = known.iter().any(|epoch| epoch.id == header.epoch);
        if is_known {
            reign = None;
        } else if header.control_kind == ControlKind::Epoch as u32
            && let Ok(Some(Control::Epoch(epoch))) = Control::from_json(header.control_kind, body)
        {
            let author = (epoch.author != me).then(|| epoch.author_name.to_string());
            reign = author.map(|author| Reign { author, since: header.lsn });
        }
        rest = rest.get(header.record_bytes() as usize..).unwrap_or_default();
    }
    reign
}

/// A reign of another node.
struct Reign {
    author: String,
    since: Lsn,
}

/// The first place where a header stands whole at its own position and a peer's bytes for the same
/// place are not the same. Both begin at `at`; what reigns of other nodes have left there does not
/// count.
fn whole_and_other(
    at: Lsn,
    here: &[u8],
    theirs: &[u8],
    counts: impl Fn(&Header) -> bool,
) -> Option<Lsn> {
    (0..here.len()).step_by(8).find_map(|place| {
        let bytes = here[place..].starts_with(&MAGIC).then_some(&here[place..])?;
        let header = Header::decode(bytes).ok()?;
        let count = header.header_bytes() as usize;
        let other = theirs.get(place..place + count) != Some(&bytes[..count]);
        let stands = header.lsn == at.advance(place as u64);
        (stands && other && counts(&header)).then_some(header.lsn)
    })
}

impl Group {
    /// Where the log is damaged in a segment, first of all; none where it is not.
    ///
    /// # Errors
    ///
    /// Where the log cannot be followed to the segment.
    pub fn gap(&self, segment: u64) -> Result<Option<Gap>, GroupError> {
        let begin = Lsn(segment.saturating_mul(self.segment_bytes()));
        let (mut from, end) = {
            let core = self.lock();
            let (from, end) = match core.durable_before {
                Some(mark) => (core.timeline.end(), mark),
                None => {
                    let end = core.durable.min(core.timeline.end().lsn);
                    let end = end.min(begin.advance(self.segment_bytes()));
                    (core.timeline.before_lsn(begin), end)
                }
            };
            (Gap { at: from.lsn, chain: from.chain }, end)
        };
        let start = begin.max(self.log_start());
        if from.at > start && start < self.positions().horizon {
            // What is folded is still there for peers: only its first record tells what that
            // continues.
            let chain = self.chain_at(start).ok_or_else(|| {
                self.damaged(format!(
                    "log at {start}: nothing says what the first record continues"
                ))
            })?;
            from = Gap { at: start, chain };
        }
        let mut scanner = Scanner::new(&self.segments, from.at, from.chain).once();
        while scanner.at() < end {
            // Before the segment payloads are no matter.
            let (at, chain) = (scanner.at(), scanner.chain());
            if scanner.next(at >= begin).is_err() {
                return Ok(Some(Gap { at, chain }));
            }
        }
        Ok(None)
    }

    /// Whole records that continue a gap of a peer's log, as they stand here; `bytes` of them at
    /// most. Nothing where none does.
    ///
    /// # Errors
    ///
    /// Where the log here does not reach to it, or what the disk says.
    pub fn records_for(&self, gap: Gap, bytes: u64) -> Result<Vec<u8>, GroupError> {
        let head = self.positions().head;
        let wanted = bytes.min(REPAIR_BYTES_MAX).min(head.bytes_since(gap.at));
        let mut bytes = vec![0; wanted as usize];
        self.read_log(gap.at, &mut bytes)?;
        let whole = whole_records(gap, &bytes, self.segment_bytes());
        let end = whole.last().map_or(0, |end| end.at.bytes_since(gap.at)) as usize;
        bytes.truncate(end);
        Ok(bytes)
    }

    /// Puts records of a peer in the place of a gap, where they lead from what is whole before it
    /// to what is whole behind it; durable on return.
    ///
    /// # Errors
    ///
    /// Where the log was folded or cut meanwhile, where another node's reign would take the place
    /// of what was durable here, or what the disk says.
    pub fn mend_log(&self, gap: Gap, bytes: &[u8]) -> Result<Mended, GroupError> {
        let segment_bytes = self.segment_bytes();
        // Neither a fold nor a cut takes the segments away.
        let _no_fold = self.fold_lock.lock().expect("no holder panics");
        let touched = {
            let _no_sync = self.sync_lock.lock().expect("no holder panics");
            let mut core = self.lock();
            if gap.at < self.log_start() {
                return Err(self.refused(format!("the record at {} was folded", gap.at)));
            }
            let (head, chain) = (core.writer.head(), core.writer.chain());
            let mark = core.durable_before;
            let joins = |end: &&Gap| match mark {
                _ if end.at == head => end.chain == chain,
                // Nothing stands behind it here that could say otherwise.
                Some(mark) if end.at >= mark => true,
                None if end.at > head => false,
                _ => self.continues(**end),
            };
            let whole = whole_records(gap, bytes, segment_bytes);
            let Some(end) = whole.iter().find(joins) else { return Ok(Mended::Short) };
            let count = end.at.bytes_since(gap.at).min(bytes.len() as u64);
            if let Some(mark) = mark.filter(|mark| end.at >= *mark) {
                let reigns = &core.view.epochs;
                self.check_unjoined(reigns, gap.at, &bytes[..count as usize], mark)?;
            }
            let (mut at, mut rest) = (gap.at, &bytes[..count as usize]);
            let mut touched = Vec::new();
            while !rest.is_empty() {
                let number = at.segment_number(segment_bytes);
                let offset = at.segment_offset(segment_bytes);
                let (part, behind) =
                    rest.split_at(((segment_bytes - offset) as usize).min(rest.len()));
                let segment = self.segments.get(number);
                let segment = segment.ok_or_else(|| self.refused("a segment is gone"))?;
                let slices = [std::io::IoSlice::new(part)];
                segment.file.write_at(&slices, offset).map_err(|e| self.io("repair log", &e))?;
                touched.push(segment);
                at = at.advance(part.len() as u64);
                rest = behind;
            }
            core.writer.read_tail().map_err(|cause| self.io("read the end of the log", &cause))?;
            (end.at, touched)
        };
        let (end, touched) = touched;
        for segment in touched {
            // After a failed sync nothing that was written since the last one is sure.
            segment.file.sync().map_err(|cause| self.fail("sync of a repaired log", &cause))?;
        }
        self.note_repaired(gap.at.segment_number(segment_bytes));
        Ok(Mended::To(end))
    }

    /// Whether the log of this primary was found damaged in the middle when it was opened, so that
    /// it serves no writes until its next start.
    #[must_use]
    pub fn log_is_broken(&self) -> bool {
        self.lock().durable_before.is_some()
    }

    /// Whether records that reach to the mark, and lead to nothing that stands here, may be those
    /// that stood here.
    fn check_unjoined(
        &self,
        reigns: &[EpochRecord],
        at: Lsn,
        bytes: &[u8],
        mark: Lsn,
    ) -> Result<(), GroupError> {
        let (name, me) = (self.name(), self.context.node.id);
        if let Some(Reign { author, since }) = begun_elsewhere(reigns, me, bytes) {
            return Err(self.refused(format!(
                "{author} reigns since LSN {since}, and this node had more durably, up to LSN \
                 {mark}, which that reign would overwrite; nothing was changed. `tidelog image \
                 open {name} --at now` here shows all up to the damage at LSN {at}; to go on with \
                 {author} without the rest, `tidelog group delete {name}` here, then `tidelog \
                 replicate {name} --to {here}` there",
                here = self.context.node.name
            )));
        }
        let mut here = vec![0; bytes.len()];
        for (index, page) in here.chunks_mut(PAGE_BYTES).enumerate() {
            // What cannot be read is not whole.
            if self.segments.read(at.advance((index * PAGE_BYTES) as u64), page).is_err() {
                page.fill(0);
            }
        }
        // A copy that had no room may have left what it received.
        let elsewhere = |header: &Header| {
            reigns.iter().any(|reign| reign.id == header.epoch && reign.author != me)
        };
        match whole_and_other(at, &here, bytes, |header| !elsewhere(header)) {
            None => Ok(()),
            Some(place) => Err(self.refused(format!(
                "its records from LSN {at} on differ from the whole one that stands here at LSN \
                 {place}; nothing was changed; `tidelog image open {name} --at now` shows all up \
                 to the damage"
            ))),
        }
    }

    /// Whether the record that stands here at a place continues a chain.
    fn continues(&self, end: Gap) -> bool {
        Scanner::new(&self.segments, end.at, end.chain).next(false).is_ok()
    }

    /// Blocks of a volume for a peer, as they are in an image of its span. Those that cannot be
    /// read are left out, and where there is no such image here, all.
    ///
    /// # Errors
    ///
    /// What closing the image says.
    pub fn blocks_for(
        &self,
        volume: VolumeNumber,
        wanted: &Wanted,
    ) -> Result<BTreeMap<u64, Vec<u8>>, GroupError> {
        let mut found = BTreeMap::new();
        let at = self.positions().horizon.max(wanted.from);
        let image = (at <= wanted.to).then(|| {
            let image = self.open_image(&Point::Lsn(at), None, "repair", None);
            image.ok()
        });
        let Some(image) = image.flatten() else { return Ok(found) };
        for block in wanted.blocks.iter().take(REPAIR_BLOCKS_MAX) {
            let mut bytes = vec![0; BLOCK_BYTES as usize];
            let offset = block.saturating_mul(BLOCK_BYTES);
            let mut reads = [Read { volume, offset, buffer: &mut bytes, result: Ok(()) }];
            image.read(&mut reads);
            let [read] = reads;
            if read.result.is_ok() {
                found.insert(*block, bytes);
            }
        }
        self.close_this_image(&image)?;
        Ok(found)
    }

    /// The blocks of a damaged chunk that a peer is asked for: as they are where the base is, and
    /// those that did not change since anywhere behind it, as the peer's base may be further. That
    /// they have the right sum proves little where data brings its own checksum.
    #[must_use]
    pub fn wanted_blocks(&self, volume: VolumeNumber, chunk: u64) -> Vec<Wanted> {
        let exam = self.base_of(volume).and_then(|base| base.examine(chunk).ok());
        let blocks = exam.map(|exam| exam.wanted()).unwrap_or_default();
        let core = self.lock();
        let (from, head) = (core.horizon.position.lsn, core.writer.head());
        let changed = match core.content.volumes.get(&volume) {
            Some(known) if core.content.rewinds.is_on_path(from, head) => {
                known.map.changed_since(from)
            }
            // A rewind has left out what is in the base.
            _ => vec![(0, u64::MAX)],
        };
        drop(core);
        let is_changed = |block: &u64| {
            let (begin, end) = (block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES);
            changed.iter().any(|(at, length)| *at < end && begin < at.saturating_add(*length))
        };
        let (changed, unchanged) = blocks.into_iter().partition(is_changed);
        let spans = [(from, changed), (head, unchanged)].into_iter();
        let wanted = spans.map(|(to, blocks)| Wanted { from, to, blocks });
        wanted.filter(|wanted| !wanted.blocks.is_empty()).collect()
    }

    /// Makes a damaged chunk of the base right, with these blocks of a peer as far as the sums here
    /// prove them; durable on return. Whether anything was written.
    ///
    /// # Errors
    ///
    /// Where a fold or a merge has stopped half-way; what the disk says.
    pub fn mend_base(
        &self,
        volume: VolumeNumber,
        chunk: u64,
        blocks: &BTreeMap<u64, Vec<u8>>,
    ) -> Result<bool, GroupError> {
        let _no_fold = self.fold_lock.lock().expect("no holder panics");
        if self.base_is_in_work() {
            return Err(self.refused("a fold is to be finished first"));
        }
        let Some(base) = self.base_of(volume) else { return Ok(false) };
        let mended = self.mend_chunk(&base, chunk, blocks)?;
        if mended {
            self.workers.wake_folder();
        }
        Ok(mended)
    }

    /// The same for who holds the lock of the folder, and may be about to fold.
    pub(super) fn mend_chunk(
        &self,
        base: &BaseVolume,
        chunk: u64,
        blocks: &BTreeMap<u64, Vec<u8>>,
    ) -> Result<bool, GroupError> {
        let born = born_in(self.lock().timeline.horizon().lsn);
        let exam = base.examine(chunk).map_err(|cause| self.damaged(cause.to_string()))?;
        if exam.is_whole() {
            return Ok(false);
        }
        let Some(remedy) = exam.remedy(blocks, born) else { return Ok(false) };
        let _gate = self.base_gate.write().expect("no holder panics");
        base.mend(&exam, &remedy, blocks).map_err(|cause| self.fail("repair of a base", &cause))?;
        Ok(true)
    }
}
