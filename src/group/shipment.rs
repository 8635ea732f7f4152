//! An image on its way to a peer: what changed since that peer stood, part by part, in the order of
//! volumes and offsets.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;

use super::engine::Group;
use super::image::{Image, merge};
use super::ranges::Place;
use super::staging::{ImageOffer, ImagePart, Staged};
use super::{Allocation, Extent, GroupError, Point, Read, View};
use crate::base::ControlState;
use crate::events::Severity;
use crate::log::record::crc32;
use crate::units::{BLOCK_BYTES, Lsn, Name, Span, total};

/// Bytes of a part at most, without its checksums.
pub const PART_BYTES_MAX: u64 = 128 << 10;
/// The image is closed at the latest after this time: what is not sent by then is sent by another.
const EXPIRES_AFTER: Duration = Duration::from_secs(24 * 3600);
/// A peer that is away for this long finds its image closed.
const KEPT_FOR: Duration = Duration::from_secs(15 * 60);
/// Bytes of a volume whose allocation is looked at at a time.
const LOOK_BYTES: u64 = 64 << 20;
/// Runs of allocation that one look gives at most.
const RUNS_PER_LOOK: usize = 256;

/// An image that is sent to a peer.
pub struct Shipment {
    image: Arc<Image>,
    offer: ImageOffer,
    /// When a part was asked for last, monotonic.
    used: Mutex<Duration>,
    /// Whose parts these are; none until it is said.
    stream: Mutex<Option<u64>>,
    next: Mutex<Next>,
}

/// What is still to be sent.
#[derive(Debug)]
struct Next {
    /// Parts that were given.
    given: u64,
    control: Bytes,
    control_sent: usize,
    ranges: VecDeque<(Place, u64)>,
    runs: VecDeque<Run>,
    ended: bool,
}

/// Whole blocks of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    at: Place,
    length: u64,
    zeros: bool,
}

impl Shipment {
    /// What the peer is told of it before the first part.
    #[must_use]
    pub fn offer(&self) -> ImageOffer {
        self.offer
    }

    /// From now on its parts are those of this stream alone.
    pub fn begin_stream(&self, stream: u64) {
        *self.stream.lock().expect("no holder panics") = Some(stream);
    }

    /// Whether this part of this stream is the next one. What was asked for in a stream before,
    /// and waited in its connection, would else take a part that this one then lacks.
    fn is_next(&self, stream: u64, number: u64) -> bool {
        *self.stream.lock().expect("no holder panics") == Some(stream)
            && self.next.lock().expect("no holder panics").given == number
    }

    /// The next part; none after the end.
    ///
    /// # Errors
    ///
    /// Where the image cannot be read, or its hold was broken.
    pub fn next(&self) -> Result<Option<ImagePart>, GroupError> {
        let mut next = self.next.lock().expect("no holder panics");
        next.given += 1;
        let next = &mut *next;
        if next.control_sent < next.control.len() {
            let offset = next.control_sent;
            let end = (offset + PART_BYTES_MAX as usize).min(next.control.len());
            next.control_sent = end;
            return Ok(Some(ImagePart::Control {
                offset: offset as u64,
                total: next.control.len() as u64,
                bytes: next.control.slice(offset..end),
            }));
        }
        loop {
            if let Some(run) = next.runs.front_mut() {
                let part = *run;
                if part.zeros {
                    next.runs.pop_front();
                    return Ok(Some(ImagePart::Zeros { at: part.at, length: part.length }));
                }
                let length = part.length.min(PART_BYTES_MAX);
                run.at.offset += length;
                run.length -= length;
                if run.length == 0 {
                    next.runs.pop_front();
                }
                return self.read(part.at, length).map(Some);
            }
            let Some((at, length)) = next.ranges.pop_front() else {
                let ended = std::mem::replace(&mut next.ended, true);
                return Ok((!ended).then_some(ImagePart::End));
            };
            let look = length.min(LOOK_BYTES);
            let extents = self.image.extents(at.volume, at.offset, look, RUNS_PER_LOOK)?;
            let (runs, seen) = runs_of(at, look, &extents);
            next.runs = runs.into();
            if seen < length {
                let rest = Place { offset: at.offset + seen, ..at };
                next.ranges.push_front((rest, length - seen));
            }
        }
    }

    fn read(&self, at: Place, length: u64) -> Result<ImagePart, GroupError> {
        let mut data = vec![0; length as usize];
        let mut reads =
            [Read { volume: at.volume, offset: at.offset, buffer: &mut data, result: Ok(()) }];
        self.image.read(&mut reads);
        let [read] = reads;
        read.result?;
        let crcs = data.chunks(BLOCK_BYTES as usize).map(crc32).collect();
        Ok(ImagePart::Data { at, crcs, data: data.into() })
    }
}

/// Whole blocks that are zeros, and those that are not, of `look` bytes from `at` on; and how many
/// bytes that is, which is less where the extents end early, but never nothing.
fn runs_of(at: Place, look: u64, extents: &[Extent]) -> (Vec<Run>, u64) {
    let mut runs: Vec<Run> = Vec::new();
    let mut push = |from: u64, to: u64, zeros: bool| {
        if from < to {
            let at = Place { offset: from, ..at };
            runs.push(Run { at, length: to - from, zeros });
        }
    };
    let end = at.offset + look;
    let mut data_from = at.offset;
    let mut known_to = at.offset;
    for extent in extents {
        known_to = extent.offset + extent.length;
        if extent.allocation == Allocation::Data {
            continue;
        }
        let from = extent.offset.next_multiple_of(BLOCK_BYTES);
        let to = known_to / BLOCK_BYTES * BLOCK_BYTES;
        if from < to {
            push(data_from, from, false);
            push(from, to, true);
            data_from = to;
        }
    }
    let known_to = known_to / BLOCK_BYTES * BLOCK_BYTES;
    let to = if known_to > at.offset { known_to } else { (at.offset + BLOCK_BYTES).min(end) };
    push(data_from, to, false);
    (runs, to - at.offset)
}

/// Ranges made of whole blocks, sorted and joined.
fn whole_blocks(ranges: Vec<(u64, u64)>, size_bytes: u64) -> Vec<(u64, u64)> {
    let widened = ranges
        .into_iter()
        .map(|(offset, length)| {
            let from = offset / BLOCK_BYTES * BLOCK_BYTES;
            (from, (offset + length).next_multiple_of(BLOCK_BYTES) - from)
        })
        .collect();
    merge(widened, size_bytes)
}

impl Group {
    /// The image that a peer is to be sent, which has everything up to `since` durably where that
    /// is given, and what is staged there. The image that it was sent before is gone on with where
    /// it is still there and the log reaches to it.
    ///
    /// # Errors
    ///
    /// Where no image can be opened, or what the disk says.
    pub fn ship(
        &self,
        peer: &Name,
        since: Option<Lsn>,
        common: Lsn,
        staged: Option<&Staged>,
    ) -> Result<Arc<Shipment>, GroupError> {
        let staged = staged.filter(|staged| {
            let ours = |position| self.is_in_history(position);
            staged.since == since
                && ours(staged.image)
                && staged.reached.iter().all(|reached| ours(reached.at))
        });
        // One that a rewind has left behind would only be followed by another.
        let goes_on = |lsn| {
            let core = self.lock();
            core.content.rewinds.is_on_path(lsn, core.timeline.end().lsn)
        };
        let again = staged
            .filter(|staged| staged.image.lsn >= self.log_start() && goes_on(staged.image.lsn));
        let image = match again.and_then(|staged| self.image_at(peer, staged.image.lsn)) {
            Some(image) => image,
            None => {
                self.end_shipment(peer);
                let owner = owner(peer);
                self.open_image(&Point::Now, None, &owner, Some(EXPIRES_AFTER))?
            }
        };
        // What it shows is durable here: else a loss of power would leave the peer ahead.
        self.sync_now()?;
        let position = image.position();
        // Of an image that a rewind has left behind blocks may be staged that nothing on the way to
        // this one has changed.
        let staged = staged.filter(|staged| image.has_all_of(staged.image.lsn));
        let checkpoint = self.resolve(&Point::Lsn(position.lsn))?;
        let control = ControlState {
            position,
            chain: checkpoint.chain,
            requests: checkpoint.requests,
            entries: image.control_entries(),
            bases: Default::default(),
        };
        let (ranges, changed_bytes) = plan(&image, since, staged)?;
        let done_bytes = staged.map_or(0, |staged| staged.done_bytes);
        let offer = ImageOffer {
            position,
            since,
            resumed: staged.is_some(),
            total_bytes: done_bytes.saturating_add(changed_bytes),
            done_bytes,
            common,
        };
        let next = Next {
            given: 0,
            control: control.encode().into(),
            control_sent: 0,
            ranges: ranges.into(),
            runs: VecDeque::new(),
            ended: false,
        };
        let used = Mutex::new(self.context.env.clock.monotonic());
        let (stream, next) = (Mutex::default(), Mutex::new(next));
        let shipment = Arc::new(Shipment { image, offer, used, stream, next });
        let mut shipments = self.shipments.lock().expect("no holder panics");
        shipments.insert(peer.clone(), shipment.clone());
        Ok(shipment)
    }

    /// Part `number`, the next one, of the image that a peer is sent in a stream; none behind its
    /// end.
    ///
    /// # Errors
    ///
    /// Where no image is sent to it, another part is next, or the image cannot be read any more.
    pub fn next_part(
        &self,
        peer: &Name,
        stream: u64,
        number: u64,
    ) -> Result<Option<ImagePart>, GroupError> {
        let shipment = self.shipments.lock().expect("no holder panics").get(peer).cloned();
        let shipment = shipment.ok_or_else(|| self.refused(format!("sends no image to {peer}")))?;
        if !shipment.is_next(stream, number) {
            return Err(self.refused(format!("sends {peer} another image by now")));
        }
        *shipment.used.lock().expect("no holder panics") = self.context.env.clock.monotonic();
        shipment.next()
    }

    /// Closes the images that no peer has asked for in a while.
    pub(super) fn end_idle_shipments(&self) {
        let now = self.context.env.clock.monotonic();
        for peer in self.shipments() {
            let used = {
                let shipments = self.shipments.lock().expect("no holder panics");
                let known = shipments.get(&peer);
                // One of before the start counts from then on.
                known.map_or(self.started, |known| *known.used.lock().expect("no holder panics"))
            };
            if now.saturating_sub(used) >= KEPT_FOR {
                self.end_shipment(&peer);
                let text = format!(
                    "the image for {peer} was closed: nobody asked for more of it in {}; what came \
                     there still counts",
                    Span(KEPT_FOR)
                );
                self.emit(Severity::Info, "resync-expired", text, json!({ "peer": peer }));
            }
        }
    }

    /// The image that this peer was sent, where it is at this position.
    fn image_at(&self, peer: &Name, lsn: Lsn) -> Option<Arc<Image>> {
        let owner = owner(peer);
        self.images().into_iter().find(|image| {
            image.owner() == owner && image.position().lsn == lsn && image.broken().is_none()
        })
    }

    /// Closes the image that a peer was sent, where there is one.
    pub fn end_shipment(&self, peer: &Name) {
        self.shipments.lock().expect("no holder panics").remove(peer);
        let owner = owner(peer);
        for image in self.images().into_iter().filter(|image| image.owner() == owner) {
            if let Err(error) = self.close_this_image(&image) {
                tracing::warn!("{error}");
            }
        }
    }

    /// The peers that an image is kept for.
    fn shipments(&self) -> Vec<Name> {
        let images = self.images();
        let peers = images.iter().filter_map(|image| image.owner().strip_prefix(OWNER));
        peers.filter_map(|peer| peer.parse().ok()).collect()
    }
}

const OWNER: &str = "resync:";

fn owner(peer: &Name) -> String {
    format!("{OWNER}{peer}")
}

/// The ranges that a peer needs, in order, and how many bytes of them may be data.
fn plan(
    image: &Image,
    since: Option<Lsn>,
    staged: Option<&Staged>,
) -> Result<(Vec<(Place, u64)>, u64), GroupError> {
    let mut ranges = Vec::new();
    let mut bytes = 0;
    for volume in image.volumes() {
        let mut from = Place { volume: volume.number, offset: 0 };
        let end = Place { offset: volume.size_bytes, ..from };
        let reached = staged.map_or(&[][..], |staged| &staged.reached);
        // What is staged of a volume is as of its size there: what it has grown by since was in no
        // part, and may have been cut off before that.
        let is_since = image.volume_is_since(volume.number);
        let staged_as_of = |at: Lsn| if is_since >= at { since } else { Some(at) };
        let parts = reached.iter().map(|reached| (reached.to, staged_as_of(reached.at.lsn)));
        for (to, as_of) in parts.chain([(end, since)]) {
            let to = to.min(end);
            if from >= to {
                continue;
            }
            let begin = std::mem::replace(&mut from, to);
            if as_of == Some(image.position().lsn) {
                continue;
            }
            let within = |ranges: Vec<(u64, u64)>| -> Vec<(u64, u64)> {
                let clipped = ranges.into_iter().filter_map(|(offset, length)| {
                    let from = offset.max(begin.offset);
                    let to = (offset + length).min(to.offset);
                    (from < to).then(|| (from, to - from))
                });
                whole_blocks(clipped.collect(), volume.size_bytes)
            };
            let changed = image.changed_since(volume.number, as_of.unwrap_or_default())?;
            let wanted = within(changed);
            bytes = total(wanted.iter().map(|(_, length)| *length).chain([bytes]));
            let place = |(offset, length)| (Place { volume: volume.number, offset }, length);
            ranges.extend(wanted.into_iter().map(place));
        }
    }
    Ok((ranges, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::VolumeNumber;

    fn extent(offset: u64, length: u64, allocation: Allocation) -> Extent {
        Extent { offset, length, allocation }
    }

    #[test]
    fn a_block_is_zeros_only_where_all_of_it_is() {
        let at = Place { volume: VolumeNumber(1), offset: 4096 };
        let extents = [
            extent(4096, 512, Allocation::Data),
            extent(4608, 3 * 4096, Allocation::Hole),
            extent(4608 + 3 * 4096, 4096 - 512, Allocation::Data),
            extent(5 * 4096, 4096, Allocation::Zero),
        ];
        let (runs, seen) = runs_of(at, 64 << 10, &extents);
        let run = |blocks: u64, count: u64, zeros| Run {
            at: Place { offset: blocks * 4096, ..at },
            length: count * 4096,
            zeros,
        };
        assert_eq!(runs, [run(1, 1, false), run(2, 2, true), run(4, 1, false), run(5, 1, true)]);
        assert_eq!(seen, 5 * 4096);
        // An answer that ends within a block goes on all the same.
        let (runs, seen) = runs_of(at, 64 << 10, &extents[..1]);
        assert_eq!((runs, seen), (vec![run(1, 1, false)], 4096));
    }
}
