//! The log as a peer sends it: the same bytes at the same address, checked before they are kept.
//!
//! Bytes come cut anywhere. What does not yet make a whole request waits in memory, so that the log
//! of a secondary always ends with a request, and no image of it can show half of one.

use super::engine::Group;
use super::returning::ASK_FOR;
use super::{ReceiveError, Role};
use crate::io::is_full;
use crate::log::control::{Control, ControlKind, MemberRecord, Mode, RewindRecord};
use crate::log::record::{Header, Kind, RecordError, flags};
use crate::log::segment::fits;
use crate::units::{Chain, Lsn};

/// Bytes that wait for the rest of their request at most: the longest request, with headers and the
/// pads of the smallest segments, which are a quarter of their bytes.
const PENDING_BYTES_MAX: usize = 2 * super::REQUEST_BYTES_MAX;

/// What came and is not yet in the log.
#[derive(Default)]
pub(super) struct Pending {
    /// From the head on.
    bytes: Vec<u8>,
    /// Whole records at the start of `bytes`, with the place of each.
    records: Vec<(usize, Header)>,
    /// Where the next record starts in `bytes`, and the chain and the requests that it must
    /// continue; `None` at the head.
    next: Option<(usize, Chain, u64)>,
}

impl Group {
    /// Where the next received byte belongs: the head plus the unfinished tail.
    #[must_use]
    pub fn received_end(&self) -> Lsn {
        let core = self.lock();
        core.writer.head().advance(core.pending.bytes.len() as u64)
    }

    /// Forgets the unfinished tail, for a new connection.
    pub fn reset_received(&self) {
        let mut core = self.lock();
        core.pending = Pending::default();
        core.content.forget_remembered();
    }

    /// The primary told that it is durable there up to `lsn`.
    pub fn note_committed(&self, lsn: Lsn) {
        let changed = {
            let mut core = self.lock();
            let before = core.committed();
            core.committed = core.committed.max(lsn);
            core.committed() != before
        };
        if changed {
            self.notify();
        }
    }

    /// Appends bytes that continue the log at `at`, which is [`Group::received_end`]; they may cut
    /// records anywhere. Chain, headers, payload checksums and places are checked. The new head.
    ///
    /// # Errors
    ///
    /// What is wrong with the bytes; nothing of the request they belong to is kept, and the
    /// unfinished tail is forgotten. A rewind that cannot be followed here stays out, with all that
    /// comes behind it ([`Group::needs_image`]).
    pub fn append_received(&self, at: Lsn, bytes: &[u8]) -> Result<Lsn, ReceiveError> {
        let (mut at, mut bytes) = (at, bytes);
        loop {
            match self.append_some(at, bytes)? {
                Taken::All(head) => return Ok(head),
                Taken::UpTo { rewind, to } => {
                    let ready = self.get_ready_to_go_back(rewind, to);
                    ready.inspect_err(|_| self.reset_received())?;
                    (at, bytes) = (self.received_end(), &[]);
                }
            }
        }
    }

    /// Appends up to the first rewind that the content is not ready for.
    fn append_some(&self, at: Lsn, bytes: &[u8]) -> Result<Taken, ReceiveError> {
        let mut freed = Vec::new();
        let mut core = self.lock();
        let wrong = |at: Lsn, what: String| ReceiveError { at, what };
        let end = core.writer.head().advance(core.pending.bytes.len() as u64);
        let now = self.context.env.clock.monotonic();
        match (core.role, &mut core.asking) {
            (Role::Secondary, _) => {}
            // What it has lost comes back.
            (Role::Primary, Some(asking)) => asking.until = now + ASK_FOR,
            (Role::Primary, None) => return Err(wrong(at, "this node is primary".to_owned())),
        }
        if core.closed {
            return Err(wrong(at, "the group is closed".to_owned()));
        }
        if let Err(error) = self.failed_error(&core) {
            return Err(wrong(at, error.to_string()));
        }
        if let Some(target) = core.content.base_ahead {
            return Err(wrong(at, self.base_is_ahead(target).to_string()));
        }
        if at != end {
            return Err(wrong(at, format!("got bytes at {at}, expected {end}")));
        }
        // Taken out while it is worked on: an error forgets it.
        let mut pending = std::mem::take(&mut core.pending);
        pending.bytes.extend_from_slice(bytes);
        let head = core.writer.head();
        let behind = (core.writer.chain(), core.writer.requests());
        let parsed = pending.parse(head, behind, self.segment_bytes());
        let complete = pending.complete();
        let mut from = 0;
        let mut first = 0;
        let mut sync_wanted = false;
        let mut stopped = None;
        let mut went_back = Vec::new();
        // Control records shape what later records are checked against: each ends a part.
        while first < complete {
            let control = Kind::Control as u8;
            let count = pending.records[first..complete]
                .iter()
                .take_while(|(_, header)| header.kind != control)
                .count();
            let mut last = (first + count).min(complete - 1);
            let (place, header) = &pending.records[last];
            let payload = payload_of(&pending.bytes, *place, header);
            if let Some(record) = goes_back(header, payload) {
                core.content.check(header, payload).map_err(|what| wrong(header.lsn, what))?;
                if core.is_ready_to_go_back(record.to) {
                    went_back.push((header.lsn, record));
                } else {
                    // It may stay out: so does a pad before it, since a log ends with a request.
                    let pad = Kind::Pad as u8;
                    let before = &pending.records[first..last];
                    let Some(end) = before.iter().rposition(|(_, header)| header.kind != pad)
                    else {
                        stopped = Some(Taken::UpTo { rewind: header.lsn, to: record.to });
                        break;
                    };
                    last = first + end;
                }
            }
            let part = &pending.records[first..=last];
            for (place, header) in part {
                let payload = payload_of(&pending.bytes, *place, header);
                core.content.check(header, payload).map_err(|what| wrong(header.lsn, what))?;
            }
            let (place, header) = &pending.records[last];
            let to = place + header.record_bytes() as usize;
            let appended = core.writer.append_encoded(
                &pending.bytes[from..to],
                header.checksum,
                header.requests,
            );
            if let Err(cause) = appended {
                let error = if is_full(&cause) {
                    self.note_refused(&mut core, &cause);
                    self.io("append", &cause)
                } else {
                    self.fail_locked(&mut core, "append", &cause)
                };
                drop(core);
                self.report();
                return Err(wrong(at, error.to_string()));
            }
            Group::note_taken(&mut core);
            for (place, header) in part {
                sync_wanted |= wants_sync(header);
                core.apply(header, payload_of(&pending.bytes, *place, header), &mut freed);
                core.committed = core.committed.max(header.durable);
            }
            core.clock.follow(header.time, now);
            (from, first) = (to, last + 1);
        }
        pending.drain(first, from);
        if !went_back.is_empty() {
            core.content.forget_remembered();
        }
        // What was whole is kept even where something behind it is not.
        if stopped.is_none() {
            parsed.map_err(|(at, what)| wrong(at, what))?;
        }
        if stopped.is_none() && pending.bytes.len() > PENDING_BYTES_MAX {
            let what = format!("a request of more than {PENDING_BYTES_MAX} bytes");
            return Err(wrong(core.writer.head(), what));
        }
        core.pending = pending;
        self.appended(&mut core, head);
        let new_head = core.writer.head();
        let me = self.context.node.id;
        let in_sync = |member: &&MemberRecord| member.node == me && member.mode == Mode::Sync;
        // The primary's host waits for this.
        let hurry = sync_wanted && core.view.members.iter().any(|member| in_sync(&member));
        drop(core);
        drop(freed);
        for (at, record) in went_back {
            self.tell_went_back(at, &record);
        }
        if hurry {
            self.hurry_sync(new_head);
        }
        if new_head > head {
            self.notify();
        }
        Ok(stopped.unwrap_or(Taken::All(new_head)))
    }
}

/// How much was appended.
enum Taken {
    /// All that makes whole requests: the new head.
    All(Lsn),
    /// What is before a rewind.
    UpTo {
        /// Where its record begins.
        rewind: Lsn,
        /// Where it goes back to.
        to: Lsn,
    },
}

/// What a record says, where it is a rewind.
fn goes_back(header: &Header, payload: &[u8]) -> Option<RewindRecord> {
    if header.kind != Kind::Control as u8 || header.control_kind != ControlKind::Rewind as u32 {
        return None;
    }
    match Control::from_json(header.control_kind, payload) {
        Ok(Some(Control::Rewind(record))) if header.version == 1 => Some(record),
        _ => None,
    }
}

/// Whether a host may wait for this record to be durable.
fn wants_sync(header: &Header) -> bool {
    header.flags & flags::FUA != 0
        || matches!(header.known_kind(), Some(Kind::FlushMark | Kind::Control))
}

fn body_of<'a>(bytes: &'a [u8], place: usize, header: &Header) -> &'a [u8] {
    let start = place + header.header_bytes() as usize;
    &bytes[start..start + header.body_bytes() as usize]
}

fn payload_of<'a>(bytes: &'a [u8], place: usize, header: &Header) -> &'a [u8] {
    &body_of(bytes, place, header)[..header.payload_bytes as usize]
}

impl Pending {
    /// Finds whole records behind those that are known.
    fn parse(
        &mut self,
        head: Lsn,
        (chain, requests): (Chain, u64),
        segment_bytes: u64,
    ) -> Result<(), (Lsn, String)> {
        loop {
            let (place, chain, requests) = self.next.unwrap_or((0, chain, requests));
            let lsn = head.advance(place as u64);
            let header = match Header::decode(&self.bytes[place..]) {
                Ok(header) => header,
                Err(RecordError::Short { .. }) => return Ok(()),
                Err(error) => return Err((lsn, error.to_string())),
            };
            if !header.follows(lsn, chain) {
                return Err((lsn, "the record does not continue this log".to_owned()));
            }
            let expected = requests.checked_add(u64::from(header.is_last_of_request()));
            if Some(header.requests) != expected {
                let what = format!("the record counts {} requests", header.requests);
                return Err((lsn, format!("{what}, there were {requests} before it")));
            }
            let room = segment_bytes - lsn.segment_offset(segment_bytes);
            let record_bytes = header.record_bytes();
            let pad = header.kind == Kind::Pad as u8;
            if (pad && record_bytes != room) || (!pad && !fits(record_bytes, room)) {
                return Err((lsn, "the record does not fit its segment".to_owned()));
            }
            if self.bytes.len() - place < record_bytes as usize {
                return Ok(());
            }
            if !pad && !header.body_is_whole(body_of(&self.bytes, place, &header)) {
                return Err((lsn, "payload checksum differs".to_owned()));
            }
            if header.kind == Kind::Control as u8 && !self.is_request(&header) {
                return Err((lsn, "a control record is a part of a larger request".to_owned()));
            }
            self.next = Some((place + record_bytes as usize, header.checksum, header.requests));
            self.records.push((place, header));
        }
    }

    /// Whether the next record is a request of its own, as each control record is: what it changes
    /// is what the records behind it are checked against, and these must not take it back.
    fn is_request(&self, next: &Header) -> bool {
        let pad = Kind::Pad as u8;
        let before = self.records.iter().rev().find(|(_, header)| header.kind != pad);
        next.is_last_of_request() && before.is_none_or(|(_, header)| header.is_last_of_request())
    }

    /// How many of the records make whole requests.
    fn complete(&self) -> usize {
        let last = |(_, header): &(usize, Header)| header.flags & flags::LAST_OF_REQUEST != 0;
        self.records.iter().rposition(last).map_or(0, |index| index + 1)
    }

    /// Forgets the first `records`, which take `bytes`.
    fn drain(&mut self, records: usize, bytes: usize) {
        self.bytes.drain(..bytes);
        self.records.drain(..records);
        for (place, _) in &mut self.records {
            *place -= bytes;
        }
        if bytes > 0 {
            self.next = match self.next {
                Some((place, chain, requests)) if !self.records.is_empty() => {
                    Some((place - bytes, chain, requests))
                }
                _ => None,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::record::{HEADER_BYTES, header_bytes, piece_count};
    use crate::log::segment::{SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN, payload_bytes_max};

    #[test]
    fn the_longest_request_waits_in_memory_whatever_the_segments() {
        let mut segment_bytes = SEGMENT_BYTES_MIN;
        while segment_bytes <= SEGMENT_BYTES_MAX {
            let part = payload_bytes_max(segment_bytes) as u64;
            let record = header_bytes(piece_count(0, part)) as u64 + part;
            // It may begin right before the end of a segment.
            let begin = segment_bytes - HEADER_BYTES as u64;
            let mut at = begin;
            for _ in 0..super::super::REQUEST_BYTES_MAX as u64 / part + 2 {
                let room = segment_bytes - at % segment_bytes;
                at += if fits(record, room) { record } else { room + record };
            }
            let bytes = at - begin;
            assert!(bytes <= PENDING_BYTES_MAX as u64, "{bytes} with {segment_bytes}");
            segment_bytes *= 2;
        }
    }
}
