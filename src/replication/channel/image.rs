//! A peer that the log no longer reaches is brought up by an image: what the primary sends, what
//! the secondary stages, and what both say of it.
//!
//! The image is of one position of the primary, and of what changed since the end of the
//! secondary's log, which stays as it is until all of it has come. Then the secondary asks for the
//! log from there. A peer that the log has passed again each time is told that it cannot keep up,
//! and waits longer each time.

use super::*;
use crate::group::{ImageOffer, ImageProgress, Reached, Staged};
use crate::replication::core::doubling;
use crate::replication::wire::{PAYLOAD_BYTES_MAX, WirePosition, WireReached, WireStaged};
use crate::units::{EpochId, LogTime, Position, VolumeNumber};

/// Images in a row after which a peer that needs another cannot keep up.
const IMAGES_IN_A_ROW: u32 = 2;
/// First wait of such a peer.
const WAIT_FIRST: Duration = Duration::from_secs(10);
/// Longest wait.
const WAIT_LONGEST: Duration = Duration::from_secs(600);
/// Bytes after which the group is told that a peer needs less of the log.
const TOLD_EVERY_BYTES: u64 = 1 << 20;
/// Image frames of a stream on their way at least.
const FRAMES_MIN: u64 = 2;

/// This node sends an image.
#[derive(Clone, Debug)]
pub(super) struct Shipping {
    stream: u64,
    /// None until it is open.
    offer: Option<ImageOffer>,
    /// Frames that were asked for, and those of them that were sent.
    asked: u64,
    sent: u64,
    /// Frames that are staged there.
    staged: u64,
    ended: bool,
    progress: ImageProgress,
}

impl Shipping {
    pub(super) fn stream(&self) -> u64 {
        self.stream
    }
}

/// This node takes an image.
#[derive(Clone, Debug)]
pub(super) struct Receiving {
    stream: u64,
    /// Frames that came, and those of them that are staged.
    came: u64,
    staged: u64,
    position: Position,
    progress: ImageProgress,
}

/// What a primary remembers of the images that it sent.
#[derive(Clone, Debug, Default)]
pub(super) struct Sent {
    /// Where the last one was, of which all was sent.
    at: Option<Lsn>,
    /// Images after each of which the log had passed the peer again.
    in_a_row: u32,
    /// Before this, no other one is begun.
    not_before: Option<Duration>,
}

fn frames_max(context: &Context<'_>) -> u64 {
    (context.settings.window_bytes / PAYLOAD_BYTES_MAX as u64).max(FRAMES_MIN)
}

impl Channel {
    /// Progress of an image, where one is on its way.
    #[must_use]
    pub fn resync(&self) -> Option<(Lsn, ImageProgress)> {
        let sends = self.shipping.as_ref().and_then(|shipping| {
            shipping.offer.map(|offer| (offer.position.lsn, shipping.progress))
        });
        let takes = self.receiving.as_ref();
        sends.or_else(|| takes.map(|receiving| (receiving.position.lsn, receiving.progress)))
    }

    /// The peer's log is part of this history up to its `head`, and it needs an image.
    pub(super) fn ship_behind(&mut self, context: &mut Context<'_>, stream: u64, head: Lsn) {
        let whole = head == Lsn::ZERO || self.needs_image_there == NeedsImage::Whole;
        self.ship(context, stream, (!whole).then_some(head), head);
    }

    /// The log begins behind the peer, whose log is part of this history up to `common`.
    pub(super) fn ship(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        since: Option<Lsn>,
        common: Lsn,
    ) {
        let name = &self.local.name;
        if self.sent.at.is_some() && self.sent.at == since {
            self.sent.at = None;
            self.sent.in_a_row += 1;
            let more = self.sent.in_a_row.saturating_sub(IMAGES_IN_A_ROW);
            if more > 0 {
                let wait = doubling(WAIT_FIRST, WAIT_LONGEST, more);
                self.sent.not_before = Some(context.now + wait);
                let text = format!(
                    "group {name}: {} cannot keep up: the log passed it again after each of {} \
                     images; it keeps its last image, and is sent another later: raise `log_limit` \
                     or `window`, or look at the link",
                    context.peer_name, self.sent.in_a_row
                );
                let group = Some(name.clone());
                let (severity, code) = (Severity::Error, "cannot-keep-up");
                context.outputs.push(Output::Event { severity, code, group, text });
            }
        }
        if self.sent.not_before.is_some_and(|not_before| context.now < not_before) {
            let reason = format!(
                "cannot-keep-up: the primary's log passed LSN {common} again after each of {} \
                 images; the last image stays, another one comes later: raise `log_limit` or \
                 `window` of {name}, or look at the link",
                self.sent.in_a_row
            );
            self.refuse(context, stream, StopCode::CannotKeepUp, reason);
            return;
        }
        self.may_be_kept = true;
        self.shipping = Some(Shipping {
            stream,
            offer: None,
            asked: 0,
            sent: 0,
            staged: 0,
            ended: false,
            progress: ImageProgress::default(),
        });
        let (peer, begins) = (context.peer_name, self.local.log_start);
        let why = if common < begins {
            format!("ends at LSN {common}, and the log here begins at {begins}")
        } else if self.needs_image_there == NeedsImage::Whole {
            "holds no moment of the group, since its log is damaged".to_owned()
        } else {
            format!("cannot follow the log behind LSN {common}, where the group went back")
        };
        let reason = format!("{peer} {why}: it is brought up by an image, which is being opened");
        self.set_state(context, ReplicationState::ResyncSource, reason);
        context.outputs.push(Output::Ship {
            group: self.local.id,
            stream,
            peer: context.peer_name.clone(),
            since,
            common,
            staged: self.staged_there.clone(),
        });
    }

    /// Whether an image is on its way in this stream.
    pub(super) fn ships(&self, stream: u64) -> bool {
        self.shipping.as_ref().is_some_and(|shipping| shipping.stream == stream)
    }

    pub(in crate::replication) fn on_shipped(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        offer: Result<ImageOffer, String>,
    ) {
        if !self.ships(stream) {
            return;
        }
        let offer = match offer {
            Ok(offer) => offer,
            Err(reason) => {
                self.shipping = None;
                let text = format!("the primary could not open an image: {reason}; it tries again");
                self.refuse(context, stream, StopCode::Read, text);
                return;
            }
        };
        let Some(shipping) = &mut self.shipping else { return };
        let (done_bytes, total_bytes) = (offer.done_bytes, offer.total_bytes);
        shipping.offer = Some(offer);
        shipping.progress = ImageProgress { done_bytes, total_bytes };
        context.send(Message::Image {
            group: self.local.id.0,
            stream,
            position: wire_position(&offer.position),
            since: offer.since.map(|since| since.0),
            resumed: offer.resumed,
            total_bytes,
            done_bytes,
            common: offer.common.0,
        });
        context.outputs.push(Output::Event {
            severity: Severity::Info,
            code: "resync-begins",
            group: Some(self.local.name.clone()),
            text: format!(
                "group {}: {} is sent the image at LSN {}: {} to go",
                self.local.name,
                context.peer_name,
                offer.position.lsn,
                ByteSize(total_bytes.saturating_sub(done_bytes))
            ),
        });
        self.tell_shipping();
        self.pump_image(context);
    }

    fn tell_shipping(&mut self) {
        if let Some(Shipping { offer: Some(offer), progress, .. }) = &self.shipping
            && self.state == ReplicationState::ResyncSource
        {
            self.reason = format!(
                "the image at LSN {} is sent: {} of {}",
                offer.position.lsn,
                ByteSize(progress.done_bytes),
                ByteSize(progress.total_bytes)
            );
        }
    }

    fn pump_image(&mut self, context: &mut Context<'_>) {
        let limit = frames_max(context);
        let Some(conn) = context.conn else { return };
        let Some(shipping) = &mut self.shipping else { return };
        while !shipping.ended
            && shipping.offer.is_some()
            && shipping.asked - shipping.sent < u64::from(FRAMES_QUEUED_MAX)
            && shipping.asked < shipping.staged + limit
        {
            context.outputs.push(Output::SendPart {
                conn,
                group: self.local.id,
                stream: shipping.stream,
                peer: context.peer_name.clone(),
                number: shipping.asked,
            });
            shipping.asked += 1;
        }
    }

    pub(in crate::replication) fn on_part_sent(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        last: bool,
    ) {
        if let Some(shipping) = &mut self.shipping
            && shipping.stream == stream
        {
            shipping.sent += 1;
            shipping.ended |= last;
            if last {
                self.sent.at = shipping.offer.map(|offer| offer.position.lsn);
            }
            self.pump_image(context);
        }
    }

    pub(in crate::replication) fn on_part_failed(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        reason: &str,
    ) {
        // Behind the end there is no part, though one was asked for.
        if self.shipping.as_ref().is_some_and(|known| known.stream == stream && !known.ended) {
            self.shipping = None;
            let text = format!("the primary could not read the image: {reason}; it tries again");
            self.refuse(context, stream, StopCode::Read, text);
        }
    }

    pub(super) fn on_image_ack(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        frames: u64,
        done_bytes: u64,
    ) -> Result<(), String> {
        let Some(shipping) = &mut self.shipping else { return Ok(()) };
        if shipping.stream != stream {
            return Ok(());
        }
        if frames > shipping.asked {
            let name = &self.local.name;
            return Err(format!("group {name}: has staged {frames} parts of {}", shipping.asked));
        }
        shipping.staged = shipping.staged.max(frames);
        let progress = &mut shipping.progress;
        progress.done_bytes = progress.done_bytes.max(done_bytes);
        progress.total_bytes = progress.total_bytes.max(progress.done_bytes);
        self.tell_shipping();
        self.pump_image(context);
        Ok(())
    }

    /// The peer follows the log, or is no member any more: no image is kept for it.
    pub(super) fn end_shipment(&mut self, context: &mut Context<'_>) {
        self.shipping = None;
        if std::mem::take(&mut self.may_be_kept) && self.local.primary {
            let (group, peer) = (self.local.id, context.peer_name.clone());
            context.outputs.push(Output::EndShipment { group, peer });
        }
    }

    /// Tells the group from where the peer needs the log: at once where that changes, after a while
    /// where it only goes on.
    pub(super) fn tell_needs(&mut self, context: &mut Context<'_>) {
        if !self.local.primary || !matches!(self.local.membership, Membership::Member { .. }) {
            self.told_needs = None;
            return;
        }
        let takes = self.shipping.as_ref().and_then(|shipping| shipping.offer);
        let follows = takes.is_some() || self.sender.is_some();
        let from = match (takes, self.told_needs) {
            (Some(offer), _) => offer.position.lsn,
            (None, Some((from, _))) if !follows => from,
            (None, None) if !follows => return,
            (None, _) => self.acked.durable,
        };
        let news = self.told_needs.is_none_or(|(told, followed)| {
            followed != follows || from < told || from.bytes_since(told) >= TOLD_EVERY_BYTES
        });
        if news {
            self.told_needs = Some((from, follows));
            context.outputs.push(Output::PeerNeeds { group: self.local.id, from, follows });
        }
    }

    /// The peer has all there is: what comes later begins anew.
    pub(super) fn keeps_up(&mut self) {
        self.sent = Sent::default();
    }

    pub(super) fn on_image(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        offer: ImageOffer,
    ) -> Result<(), String> {
        let Some(follower) = &self.follower else { return Ok(()) };
        if follower.stream != stream || self.receiving.is_some() {
            return Ok(());
        }
        let name = &self.local.name;
        if follower.asked.is_none() || self.local.primary {
            return Err(format!("group {name}: an image that nobody asked for"));
        }
        if offer.common < self.local.history.head && self.holds_a_later_reign() {
            self.parted = Some(Parted { at: offer.common, chain: None });
            self.hold_a_later_reign(context);
            return Ok(());
        }
        if offer.done_bytes > offer.total_bytes {
            let ImageOffer { done_bytes, total_bytes, .. } = offer;
            return Err(format!("group {name}: an image with {done_bytes} bytes of {total_bytes}"));
        }
        let progress =
            ImageProgress { done_bytes: offer.done_bytes, total_bytes: offer.total_bytes };
        let position = offer.position;
        self.receiving = Some(Receiving { stream, came: 0, staged: 0, position, progress });
        context.outputs.push(Output::BeginImage { group: self.local.id, stream, offer });
        self.tell_receiving(context);
        Ok(())
    }

    fn tell_receiving(&mut self, context: &mut Context<'_>) {
        let Some(receiving) = &self.receiving else { return };
        let reason = format!(
            "the image at LSN {} comes: {} of {}; until it is whole the copy stays as it was",
            receiving.position.lsn,
            ByteSize(receiving.progress.done_bytes),
            ByteSize(receiving.progress.total_bytes)
        );
        self.set_state(context, ReplicationState::ResyncTarget, reason);
    }

    pub(in crate::replication) fn on_part(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        number: u64,
        bytes: Bytes,
    ) -> Result<(), String> {
        let limit = frames_max(context);
        let Some(receiving) = &mut self.receiving else { return Ok(()) };
        if receiving.stream != stream {
            return Ok(());
        }
        let name = &self.local.name;
        if number != receiving.came {
            return Err(format!("group {name}: part {number}, expected {}", receiving.came));
        }
        if number >= receiving.staged + limit {
            return Err(format!("group {name}: more parts than the window"));
        }
        receiving.came += 1;
        context.outputs.push(Output::Stage { group: self.local.id, stream, bytes });
        Ok(())
    }

    pub(in crate::replication) fn on_staged(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        progress: ImageProgress,
        switched: bool,
    ) {
        let Some(receiving) = &mut self.receiving else { return };
        if receiving.stream != stream {
            return;
        }
        receiving.staged += 1;
        receiving.progress = progress;
        let (frames, done_bytes) = (receiving.staged, progress.done_bytes);
        context.send(Message::ImageAck { group: self.local.id.0, stream, frames, done_bytes });
        if switched {
            self.drop_streams();
            self.ask(context);
        } else {
            self.tell_receiving(context);
        }
    }

    pub(in crate::replication) fn on_stage_failed(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        reason: &str,
        refused: bool,
    ) {
        if self.receiving.as_ref().is_none_or(|receiving| receiving.stream != stream) {
            return;
        }
        self.end_following();
        let (code, text) = if refused {
            (StopCode::Diverged, format!("the image was not taken: {reason}"))
        } else {
            (StopCode::Append, format!("the image was not taken: {reason}; it is tried again"))
        };
        self.refuse(context, stream, code, text);
    }
}

fn wire_position(position: &Position) -> WirePosition {
    WirePosition { epoch: position.epoch.0, lsn: position.lsn.0, time: position.time.0 }
}

/// `None` where it is impossible.
pub(super) fn position_of(wire: &WirePosition) -> Option<Position> {
    let position =
        Position { epoch: EpochId(wire.epoch), lsn: Lsn(wire.lsn), time: LogTime(wire.time) };
    (wire.lsn <= Lsn::MAX.0).then_some(position)
}

/// For the wire.
pub(super) fn staged_to_wire(staged: &Staged) -> WireStaged {
    WireStaged {
        image: wire_position(&staged.image),
        since: staged.since.map(|since| since.0),
        reached: staged
            .reached
            .iter()
            .map(|reached| WireReached {
                volume: reached.to.volume.0,
                offset: reached.to.offset,
                at: wire_position(&reached.at),
            })
            .collect(),
        done_bytes: staged.done_bytes,
    }
}

/// From the wire. `None` where it is impossible: positions above 2^63, places out of order.
pub(super) fn staged_from_wire(wire: &WireStaged) -> Option<Staged> {
    let mut reached: Vec<Reached> = Vec::new();
    for entry in &wire.reached {
        let to = crate::group::Place { volume: VolumeNumber(entry.volume), offset: entry.offset };
        if reached.last().is_some_and(|last| last.to >= to) {
            return None;
        }
        reached.push(Reached { to, at: position_of(&entry.at)? });
    }
    Some(Staged {
        image: position_of(&wire.image)?,
        since: wire.since.map(Lsn),
        reached,
        done_bytes: wire.done_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::super::heard::tests::{copy, history};
    use super::*;

    const STREAM: u64 = 5;

    /// A copy that has asked.
    fn asking() -> Channel {
        let mut channel = copy(history(&[(1, 0)], 1000));
        let (head, runs) = (Lsn(1000), false);
        let (asked, expected, appended) = (Some(head), head, head);
        let (stream, frames) = (STREAM, VecDeque::new());
        let follower = Follower { stream, asked, runs, expected, appended, frames };
        channel.follower = Some(follower);
        channel
    }

    fn told(
        channel: &mut Channel,
        input: impl FnOnce(&mut Channel, &mut Context<'_>) -> Result<(), String>,
    ) -> (Result<(), String>, Vec<Output>) {
        let (settings, peer_name) = (Settings::default(), "a".parse().unwrap());
        let (mut outputs, peer_name) = (Vec::new(), &peer_name);
        let (now, conn, echo) = (Duration::from_secs(100), None, (0, 0));
        let settings = &settings;
        let outputs_now = &mut outputs;
        let mut context = Context { now, conn, echo, peer_name, settings, outputs: outputs_now };
        (input(channel, &mut context), outputs)
    }

    fn image(done_bytes: u64, total_bytes: u64) -> Message {
        Message::Image {
            group: [7; 16],
            stream: STREAM,
            position: WirePosition { epoch: 1, lsn: 4000, time: 0 },
            since: None,
            resumed: false,
            total_bytes,
            done_bytes,
            common: 1000,
        }
    }

    #[test]
    fn a_peer_has_no_more_parts_wait_here_than_the_window_holds() {
        let mut channel = asking();
        told(&mut channel, |channel, context| channel.on_message(context, image(0, 1 << 40)))
            .0
            .unwrap();
        let bytes = Bytes::from(vec![0; PAYLOAD_BYTES_MAX]);
        let send = |channel: &mut Channel, from: u64| {
            let mut queued = 0;
            for number in from.. {
                let (taken, outputs) = told(channel, |channel, context| {
                    channel.on_part(context, STREAM, number, bytes.clone())
                });
                let Err(what) = taken else {
                    assert!(matches!(&outputs[..], [Output::Stage { .. }]), "{outputs:?}");
                    queued += bytes.len() as u64;
                    assert!(queued <= 1 << 30, "without end");
                    continue;
                };
                assert!(what.contains("more parts than the window"), "{what}");
                assert!(outputs.is_empty(), "{outputs:?}");
                return (queued, number);
            }
            unreachable!("it returns")
        };
        let window = Settings::default().window_bytes;
        let (queued, next) = send(&mut channel, 0);
        assert_eq!(queued, window);
        told(&mut channel, |channel, context| {
            channel.on_staged(context, STREAM, ImageProgress::default(), false);
            Ok(())
        })
        .0
        .unwrap();
        assert_eq!(send(&mut channel, next).0, PAYLOAD_BYTES_MAX as u64, "as much as was staged");
    }

    #[test]
    fn an_image_of_which_more_is_here_than_there_is_breaks_the_protocol() {
        for (done, total) in [(u64::MAX, 0), (u64::MAX, u64::MAX - 1), (1, 0)] {
            let mut channel = asking();
            let (taken, outputs) = told(&mut channel, |channel, context| {
                channel.on_message(context, image(done, total))
            });
            assert!(taken.is_err_and(|what| what.contains(&done.to_string())), "{done}");
            assert!(outputs.is_empty() && channel.receiving.is_none(), "{outputs:?}");
        }
    }
}
