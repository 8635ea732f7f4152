//! One group with one peer: who follows whom, what is sent, what is known. Part of the pure core.
//!
//! Each side announces what it holds when the link comes up and whenever its role changes. A
//! secondary that hears of a primary forgets its unfinished tail and asks to follow from its head;
//! the primary compares histories, then the chain at that head, and grants the stream or says why
//! not. Every ask has a number, which its stream carries, so that what is late from an earlier one
//! is recognised and dropped.
//!
//! A primary that has just recovered serves nobody until its peer has answered, or nobody waits
//! longer. Where the peer holds more of the same history, it takes that back first; where the peer
//! was promoted, it yields: it keeps what the peer lacks as a branch, and follows. A secondary does
//! the same with a tail that it only received. What was written by a node that served is cut by
//! an operator alone: then, and where the log no longer reaches, both sides stop with a state, a
//! reason and the next command.

mod following;
mod heard;
mod image;
mod required;
mod roles;
mod sending;
mod state;
mod trouble;

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;

use crate::events::Severity;
use crate::group::{ImageOffer, Staged};
use crate::units::{ByteSize, Chain, EpochId, GroupId, LogTime, Lsn, Name};

use super::core::{Appended, ConnId, LocalGroup, Membership, Output, Settings};
use super::epoch::{History, Relation};
use super::lag::Marks;
use super::wire::{Message, NeedsImage, StopCode};

use self::heard::NO_STREAM;
pub use self::heard::{Gap, Heard, Moment};
pub use self::state::{Acked, Parted, Remote, ReplicationState, Told};
use self::state::{Follower, Lookup, Sender, first_stream};
use self::trouble::{Refused, Trouble};

/// Log frames of a stream that wait in the shell at most; the next is cut when one was sent, so
/// that what was appended meanwhile goes along.
const FRAMES_QUEUED_MAX: u32 = 2;

/// What a handler needs besides its channel.
pub(super) struct Context<'a> {
    pub(super) now: Duration,
    pub(super) conn: Option<ConnId>,
    /// The peer's clock in its last heartbeat, and nanoseconds since it came; zeros without one.
    pub(super) echo: (u64, u64),
    pub(super) peer_name: &'a Name,
    pub(super) settings: &'a Settings,
    pub(super) outputs: &'a mut Vec<Output>,
}

impl Context<'_> {
    fn send(&mut self, message: Message) {
        if let Some(conn) = self.conn {
            self.outputs.push(Output::Send { conn, message });
        }
    }
}

/// One group with one peer.
#[derive(Debug)]
pub struct Channel {
    local: LocalGroup,
    paused: bool,
    remote: Option<Remote>,
    state: ReplicationState,
    reason: String,
    since: Duration,
    sender: Option<Sender>,
    acked: Acked,
    received_marks: Marks,
    durable_marks: Marks,
    follower: Option<Follower>,
    told: Option<Told>,
    /// The peer's log when it was last heard, in this life of the process or before.
    heard: Option<Heard>,
    /// Up to here the group was told that the primary is durable.
    committed: Lsn,
    /// Position up to which this node's bytes were compared with the peer's by their chain.
    compared: Option<Lsn>,
    /// Where a comparison failed.
    mismatch: Option<Lsn>,
    next_stream: u64,
    next_ticket: u64,
    lookup: Option<(u64, Lookup)>,
    rpo_alarm: bool,
    /// The peer's stream that was told where to cut back to.
    offered: Option<u64>,
    /// Where the peer says that the histories part, until they have met again.
    parted: Option<Parted>,
    /// A disk error ended the last stream; it is tried again.
    trouble: Option<Trouble>,
    /// This peer refused, and another one that was asked did too.
    refused: Refused,
    /// People were told that replication stopped, and not yet that it goes on.
    told_stopped: bool,
    /// What a peer that is no member said that it holds, while this node is no primary that could
    /// tell it of its stop.
    untold: Option<History>,
    /// The peer says that replication with it was stopped, and so nothing more.
    silent: bool,
    /// The group had its mark of a stop when it told last.
    marked: bool,
    /// It has said that it sends this copy nothing any more, and the mark may not be there yet.
    retires: bool,
    /// What people were told of a split brain: whether this node, and the peer, has more.
    told_have_more: (bool, bool),
    /// Whether the shell knows that this peer's stream is followed.
    told_follows: bool,
    /// Whether it knows the peer as primary, and its newest reign.
    told_reigns: Option<(bool, Option<EpochId>)>,
    /// An image is sent to the peer.
    shipping: Option<image::Shipping>,
    /// An image comes from the peer.
    receiving: Option<image::Receiving>,
    /// What the peer has of an image, as it said when it asked.
    staged_there: Option<Staged>,
    /// The peer cannot take the log that follows its own.
    needs_image_there: NeedsImage,
    /// This node cannot.
    needs_image: NeedsImage,
    /// What is staged here may not be needed any more.
    has_staged: bool,
    /// The shell may keep an image for the peer.
    may_be_kept: bool,
    sent: image::Sent,
    /// From where the group was told that the peer needs the log, and whether it follows.
    told_needs: Option<(Lsn, bool)>,
    /// What the group was told of a peer that hosts wait for.
    required: required::Told,
    /// The peer is no member any more; the stream goes on to here, so that it learns of that.
    ending: Option<Lsn>,
}

/// The group that a message is about.
pub(super) fn group_of(message: &Message) -> Option<GroupId> {
    match message {
        Message::Announce { group, .. }
        | Message::Follow { group, .. }
        | Message::Stream { group, .. }
        | Message::Stop { group, .. }
        | Message::Ack { group, .. }
        | Message::Progress { group, .. }
        | Message::MayFollow { group, .. }
        | Message::Image { group, .. }
        | Message::ImageAck { group, .. } => Some(GroupId(*group)),
        _ => None,
    }
}

impl Channel {
    pub(super) fn new(now: Duration, local: &LocalGroup) -> Channel {
        let mut local = local.clone();
        let (head, next_stream) = (local.history.head, first_stream(local.incarnation));
        let mut marks = [Marks::default(), Marks::default()];
        marks.iter_mut().for_each(|marks| marks.restart(head));
        let [received_marks, durable_marks] = marks;
        // So that the first `on_local` sees a change.
        local.membership = Membership::Stranger;
        Channel {
            local,
            paused: false,
            remote: None,
            state: ReplicationState::Idle,
            reason: "not connected yet".to_owned(),
            since: now,
            sender: None,
            acked: Acked::default(),
            received_marks,
            durable_marks,
            follower: None,
            told: None,
            heard: None,
            committed: Lsn::ZERO,
            compared: None,
            mismatch: None,
            next_stream,
            next_ticket: 1,
            lookup: None,
            rpo_alarm: false,
            trouble: None,
            refused: Refused::default(),
            told_stopped: false,
            untold: None,
            silent: false,
            marked: false,
            retires: false,
            told_have_more: (false, false),
            told_follows: false,
            told_reigns: None,
            shipping: None,
            receiving: None,
            staged_there: None,
            needs_image_there: NeedsImage::No,
            needs_image: NeedsImage::No,
            has_staged: false,
            may_be_kept: true,
            sent: image::Sent::default(),
            told_needs: None,
            required: required::Told::default(),
            ending: None,
            offered: None,
            parted: None,
        }
    }

    /// The group as it is here.
    #[must_use]
    pub fn local(&self) -> &LocalGroup {
        &self.local
    }

    /// What the peer announced on this link.
    #[must_use]
    pub fn remote(&self) -> Option<&Remote> {
        self.remote.as_ref()
    }

    /// State, reason, and since when (monotonic).
    #[must_use]
    pub fn state(&self) -> (ReplicationState, &str, Duration) {
        (self.state, &self.reason, self.since)
    }

    /// What the peer acknowledged, in this life of the process.
    #[must_use]
    pub fn acked(&self) -> Acked {
        self.acked
    }

    /// What the primary told, in this life of the process.
    #[must_use]
    pub fn told(&self) -> Option<Told> {
        self.told
    }

    /// Up to where the chains of both were compared and equal, and where they were not.
    #[must_use]
    pub fn comparison(&self) -> (Option<Lsn>, Option<Lsn>) {
        (self.compared, self.mismatch)
    }

    /// Whether the peer may learn of the group.
    pub(super) fn visible(&self) -> bool {
        !matches!(self.local.membership, Membership::Stranger)
    }

    /// Whether the group is to be replicated with the peer.
    fn active(&self) -> bool {
        matches!(self.local.membership, Membership::Member { .. } | Membership::Pending)
    }

    /// Where the peer says that the histories part, as far as that is known.
    #[must_use]
    pub fn parted(&self) -> Option<Parted> {
        self.parted
    }

    pub(super) fn on_local(&mut self, context: &mut Context<'_>, local: LocalGroup) {
        let was_recovering = self.local.recovering;
        let was_active = self.active();
        let was_visible = self.visible();
        let before = std::mem::replace(&mut self.local, local);
        self.note_ending(was_active);
        let reign = |history: &History| history.last().map(|reign| reign.id);
        // A secondary's newest reign changes with the bytes that it follows by: no change of role.
        let role_changed = before.primary != self.local.primary
            || self.local.primary && reign(&before.history) != reign(&self.local.history)
            || was_recovering != self.local.recovering;
        let membership_changed = was_active != self.active() || was_visible != self.visible();
        // While a stream comes, a record behind that of the stop may take the copy up again: only
        // its end decides. A stream that is granted takes the mark back.
        let comes = self.receives() || self.local.follows.is_some();
        let is_copy = self.visible() && !self.local.primary;
        // A mark that was not made, for want of room, is made when there is some; the word of one
        // that the log names is older than that.
        self.retires &= is_copy && !comes && self.local.membership == Membership::Pending;
        let ended = !self.active() || self.retires;
        if is_copy && !comes && ended && !self.local.retired {
            context.outputs.push(Output::Retire { group: self.local.id, retired: true });
        }
        if self.local.primary {
            let head = self.local.history.head;
            if !before.primary {
                self.received_marks.restart(head);
                self.durable_marks.restart(head);
            }
            self.received_marks.appended(context.now, head);
            self.durable_marks.appended(context.now, head);
        }
        self.tell_untold(context);
        if membership_changed && !self.visible() {
            self.stop_sending(context, StopCode::NotMember, "replication was stopped");
            self.drop_streams();
            if before.primary && !self.local.primary {
                // A copy may have asked, and hears nothing more of this node.
                self.say(context, true, &self.local.history);
            }
            if let Some(remote) = self.remote.take().filter(|remote| !remote.primary) {
                // It may have acknowledged more since it told what it holds.
                let theirs = if self.acked.received > remote.history.head {
                    self.local.history.until(self.acked.received)
                } else {
                    remote.history
                };
                self.tell_stopped(context, theirs);
            }
            self.set_state(context, ReplicationState::Idle, "not replicated with this peer");
            return;
        }
        // Of two that are followed at once the one whose name comes first stays.
        let yields_to =
            self.local.follows.as_ref().filter(|other| *other < context.peer_name).cloned();
        if let Some(other) = yields_to
            && let Some(follower) = self.end_following()
        {
            let reason = format!("this node follows {other}");
            let group = self.local.id.0;
            self.stop(context, group, follower.stream, StopCode::NotPrimary, &reason);
        }
        // Another peer's history was taken: what this one sends does not continue the log any more.
        let cut = before.cuts != self.local.cuts;
        if cut {
            // The age that was told was that of what is gone.
            self.told = None;
        }
        if cut
            && self.follower.as_ref().is_some_and(|it| it.appended > self.local.history.head)
            && let Some(follower) = self.end_following()
        {
            let reason = "the log was cut back meanwhile";
            self.stop(context, self.local.id.0, follower.stream, StopCode::NotPrimary, reason);
        }
        let follows_changed = before.follows != self.local.follows;
        let given_up = before.given_up != self.local.given_up;
        // The peer's word that it was stopped came while the mark was still there.
        let unmarked = std::mem::replace(&mut self.marked, self.local.retired) && !self.marked;
        // A peer that stopped it tells no copy that has something else, or nothing yet.
        let begins = before.history.reigns.is_empty() && !self.local.history.reigns.is_empty();
        let untold = (cut || begins) && self.remote.is_none();
        let open = (follows_changed || unmarked) && self.silent || untold;
        if open && self.local.follows.is_none() {
            self.announce(context);
        }
        let asks_nobody = self.follower.is_none() && self.sender.is_none();
        if (follows_changed || cut || given_up) && asks_nobody {
            // Two that refuse would else be asked in turn without end.
            if self.needs_a_hand() && !given_up {
                self.ask_later(context.now);
            } else {
                self.evaluate(context);
            }
        }
        if membership_changed && !self.active() {
            self.end_shipment(context);
        }
        if role_changed || membership_changed {
            if role_changed {
                self.drop_streams();
            }
            self.announce(context);
            self.evaluate(context);
            self.pump(context);
        } else if self.sender.is_some() {
            self.pump(context);
            if before.durable != self.local.durable {
                self.send_progress(context);
            }
        } else if self.follower.is_some() && before.durable != self.local.durable {
            self.send_ack(context);
        }
        self.check_rpo(context);
    }

    pub(super) fn on_link_up(&mut self, context: &mut Context<'_>) {
        self.drop_streams();
        (self.remote, self.untold) = (None, None);
        (self.silent, self.retires) = (false, false);
        if self.visible() {
            if self.state == ReplicationState::Idle {
                self.since = context.now;
            }
            self.await_word(context);
            self.announce(context);
        }
    }

    /// What must be mended by an operator stays on show until it is known to be mended.
    fn needs_a_hand(&self) -> bool {
        matches!(self.state, ReplicationState::Blocked | ReplicationState::SplitBrain)
    }

    pub(super) fn on_link_down(&mut self, context: &mut Context<'_>, reason: &str) {
        self.drop_streams();
        (self.remote, self.untold, self.silent) = (None, None, false);
        if !self.needs_a_hand() {
            if self.state != ReplicationState::Idle {
                self.since = context.now;
            }
            self.state = ReplicationState::Idle;
            self.reason = format!("link is down: {reason}");
        }
        self.after_input(context);
    }

    /// Tells others what has changed; called after every input.
    pub(super) fn after_input(&mut self, context: &mut Context<'_>) {
        let remote = self.remote.as_ref();
        let reigns = remote.map(|remote| (remote.primary, remote.history.last().map(|it| it.id)));
        if self.told_follows != self.follower.is_some() || self.told_reigns != reigns {
            (self.told_follows, self.told_reigns) = (self.follower.is_some(), reigns);
            context.outputs.push(Output::FollowChanged { group: self.local.id });
        }
        self.tell_required(context);
        self.tell_needs(context);
    }

    /// Whether this peer's stream runs.
    fn receives(&self) -> bool {
        self.follower.as_ref().is_some_and(|follower| follower.runs)
    }

    /// Whether this peer's stream is followed, or asked for.
    #[must_use]
    pub fn follows(&self) -> bool {
        self.follower.is_some()
    }

    pub(super) fn on_heartbeat(&mut self, context: &mut Context<'_>) {
        self.send_progress(context);
        // Who decides which side yields, or which of two copies is to be promoted, sees what each
        // has by now; and a primary what a copy has that is sent nothing.
        if self.state == ReplicationState::SplitBrain || self.is_idle_copy(context.peer_name) {
            self.announce(context);
        }
        self.check_rpo(context);
    }

    /// What was asked of the peer, if anything; an image that came goes on in no other stream.
    fn end_following(&mut self) -> Option<Follower> {
        self.receiving = None;
        self.follower.take()
    }

    fn drop_streams(&mut self) {
        self.sender = None;
        self.end_following();
        self.shipping = None;
        self.lookup = None;
        self.offered = None;
        self.ending = None;
    }

    fn announce(&mut self, context: &mut Context<'_>) {
        if self.visible() {
            self.say(context, !self.active(), &self.local.history);
        }
    }

    fn say(&self, context: &mut Context<'_>, stopped: bool, history: &History) {
        context.send(Message::Announce {
            group: self.local.id.0,
            primary: self.local.primary,
            recovering: self.local.recovering,
            paused: self.paused,
            stopped,
            incarnation: self.local.incarnation.0,
            history: history.to_wire(),
        });
    }

    pub(super) fn on_message(
        &mut self,
        context: &mut Context<'_>,
        message: Message,
    ) -> Result<(), String> {
        if !self.visible() {
            if let Message::Announce { primary: false, stopped: false, history, .. }
            | Message::Follow { history, .. } = &message
                && let Some(history) = History::from_wire(history)
            {
                self.tell_stopped(context, history);
            }
            // Else as if the group were not here.
            return Ok(());
        }
        match message {
            Message::Announce { primary, recovering, paused, stopped, history, .. } => {
                let history = History::from_wire(&history)
                    .ok_or_else(|| format!("group {}: impossible history", self.local.name))?;
                if stopped {
                    self.on_stopped(context, primary, &history);
                    return Ok(());
                }
                if self.local.primary && !primary && self.sender.is_none() {
                    // Requests are told when it asks.
                    let Acked { requests, .. } = self.acked;
                    let (received, durable) = (history.head, history.head);
                    self.note_at_most(context, Acked { received, durable, requests });
                }
                self.hears(context.now, &history);
                (self.silent, self.retires) = (false, false);
                self.remote = Some(Remote { primary, recovering, paused, history });
                self.evaluate(context);
                Ok(())
            }
            Message::Follow { stream, history, durable, requests, staged, needs_image, .. } => {
                let history = History::from_wire(&history)
                    .ok_or_else(|| format!("group {}: impossible history", self.local.name))?;
                if durable > history.head.0 {
                    return Err(format!("group {}: durable above head", self.local.name));
                }
                self.staged_there = staged.as_ref().and_then(image::staged_from_wire);
                self.needs_image_there = needs_image;
                self.on_follow(context, stream, history, Lsn(durable), requests);
                Ok(())
            }
            Message::Image {
                stream,
                position,
                since,
                resumed,
                total_bytes,
                done_bytes,
                common,
                ..
            } => {
                let position = image::position_of(&position)
                    .ok_or_else(|| format!("group {}: impossible image", self.local.name))?;
                let offer = ImageOffer {
                    position,
                    since: since.map(Lsn),
                    resumed,
                    total_bytes,
                    done_bytes,
                    common: Lsn(common),
                };
                self.on_image(context, stream, offer)
            }
            Message::ImageAck { stream, frames, done_bytes, .. } => {
                self.on_image_ack(context, stream, frames, done_bytes)
            }
            Message::Stream { stream, from, .. } => self.on_stream(context, stream, Lsn(from)),
            Message::Stop { stream, code, reason, .. } => {
                self.on_stop(context, stream, code, reason);
                Ok(())
            }
            Message::Ack { stream, received, head, chain, durable, requests, .. } => {
                if head > received || durable > head {
                    return Err(format!("group {}: ack out of order", self.local.name));
                }
                let acked = Acked { received: Lsn(received), durable: Lsn(durable), requests };
                self.on_ack(context, stream, acked, Lsn(head), Chain(chain))
            }
            Message::Progress {
                stream, head, chain, durable, requests, lag, echo, held, ..
            } => {
                if durable > head || head > Lsn::MAX.0 {
                    return Err(format!("group {}: progress out of order", self.local.name));
                }
                // Without a heartbeat of this node behind it, its age has no bound yet.
                let said_after = Duration::from_nanos(echo.saturating_add(held));
                let at = if echo == 0 { Duration::ZERO } else { said_after.min(context.now) };
                let told = Told {
                    head: Lsn(head),
                    durable: Lsn(durable),
                    requests,
                    lag: (lag != u64::MAX).then(|| Duration::from_nanos(lag)),
                    at,
                };
                self.on_progress(context, stream, told, Chain(chain));
                Ok(())
            }
            Message::MayFollow { head, chain, .. } => {
                self.on_may_follow(context, Lsn(head), chain.map(Chain));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn stop(
        &mut self,
        context: &mut Context<'_>,
        group: [u8; 16],
        stream: u64,
        code: StopCode,
        reason: &str,
    ) {
        context.send(Message::Stop { group, stream, code, reason: reason.to_owned() });
    }
}
