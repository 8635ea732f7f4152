//! The protocol of one peer as a pure state machine: inputs one at a time, with the time given, and
//! outputs for the shell to carry out.
//!
//! The core decides which connection is the link, when to dial, when the peer is lost, and (in
//! [`super::channel`], one per group) who follows whom, what is sent, what the operator is told.
//! It knows no sockets, files or threads: under tokio and under a simulator it is the same code.
//!
//! **One link.** Both nodes dial. Of two connections the one that the lower node id dialled stays,
//! unless the other side has restarted since (its incarnation differs): then the older one is dead.
//! A connection on which nothing was heard for `lost_after` is dropped. Redialling backs off from
//! 0.1 s to 5 s, spread by a hash of node and attempt, so that no two nodes keep meeting.

mod lives;
mod signals;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64;

use crate::events::Severity;
use crate::log::control::Mode;
use crate::units::{EpochId, GroupId, Incarnation, LogTime, Lsn, Name, NodeId, Span};

use super::channel::{Channel, Context, Remote};
use super::epoch::{History, Reign};
use super::status::PeerStatus;
use super::wire::Message;

use self::lives::{Caller, Lives};
pub use self::signals::{Appended, Input, Output};

/// First wait before dialling again.
const DIAL_FIRST: Duration = Duration::from_millis(100);
/// Announcements that are kept of groups that are not known yet, at most.
const EARLY_MAX: usize = 1024;
/// Longest wait before dialling again.
const DIAL_LONGEST: Duration = Duration::from_secs(5);

/// A connection, numbered by the shell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// What does not change while the core lives.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Time between heartbeats.
    pub heartbeat: Duration,
    /// Silence after which a peer is lost.
    pub lost_after: Duration,
    /// Bytes of a group that may be on their way to the peer.
    pub window_bytes: u64,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            heartbeat: Duration::from_secs(1),
            lost_after: Duration::from_secs(5),
            window_bytes: 16 << 20,
        }
    }
}

/// What the control records say about the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    /// It holds the group.
    Member {
        /// The age of the copy that its owner wants at most.
        rpo_target: Option<Span>,
        /// When a write is answered.
        mode: Mode,
    },
    /// Its log does not say so: a copy that was made here at the peer's request, perhaps one that
    /// it has stopped since; or one of the reign of a peer that was no member before.
    Pending,
    /// It was a member until replication was stopped.
    Stopped,
    /// It has nothing to do with the group, and learns nothing of it.
    Stranger,
}

/// A group as it is on this node now, in view of one peer.
#[derive(Clone, Debug)]
pub struct LocalGroup {
    /// Its identity.
    pub id: GroupId,
    /// Its name.
    pub name: Name,
    /// Whether this node is its primary.
    pub primary: bool,
    /// It is primary, and has served nobody since its start.
    pub recovering: bool,
    /// Random, new at each start of the group.
    pub incarnation: Incarnation,
    /// Its log.
    pub history: History,
    /// Up to which the log survives power loss here.
    pub durable: Lsn,
    /// Requests up to the head.
    pub requests: u64,
    /// The lowest position that can be read.
    pub log_start: Lsn,
    /// How often the log was cut back in this life of the process.
    pub cuts: u64,
    /// A disk error keeps it from appending.
    pub failed: bool,
    /// It is a copy whose replication was stopped.
    pub retired: bool,
    /// What the peer is to it.
    pub membership: Membership,
    /// Another peer, by whose stream it follows now.
    pub follows: Option<Name>,
    /// Its newest reign is this node's own.
    pub authored: bool,
    /// Reigns that their authors have given up; see [`given_up`].
    pub given_up: BTreeSet<EpochId>,
}

/// Of the newest reigns here and at the peers those whose author is heard, is no primary, and does
/// not have them any more: an operator had it yield.
pub fn given_up<'a>(
    own: Option<&'a Reign>,
    peers: impl Iterator<Item = (NodeId, &'a Remote)> + Clone,
) -> BTreeSet<EpochId> {
    let newest = peers.clone().filter_map(|(_, remote)| remote.history.last()).chain(own);
    let by_its_author = |reign: &&Reign| {
        peers.clone().any(|(node, remote)| {
            let lacks = remote.history.reigns.iter().all(|known| known.id != reign.id);
            // One that has nothing at all was made anew.
            let had = !remote.history.reigns.is_empty();
            node == reign.author && !remote.primary && had && lacks
        })
    };
    newest.filter(by_its_author).map(|reign| reign.id).collect()
}

enum Link {
    Down { since: Duration, reason: String, attempts: u32, dial_at: Duration, dialling: bool },
    Up(Up),
}

struct Up {
    conn: ConnId,
    since: Duration,
    dialled: bool,
    incarnation: Incarnation,
    heard: Duration,
    heartbeat_at: Duration,
    /// The peer's last heartbeat: its clock, and when it came.
    last_heartbeat: Option<(u64, Duration)>,
}

impl Up {
    /// The peer's clock in its last heartbeat, and how long ago that came; zeros without one.
    fn echo(&self, now: Duration) -> (u64, u64) {
        self.last_heartbeat
            .map_or((0, 0), |(sent, came)| (sent, nanoseconds(now.saturating_sub(came))))
    }
}

fn context<'a>(
    now: Duration,
    link: &Link,
    peer_name: &'a Name,
    settings: &'a Settings,
    outputs: &'a mut Vec<Output>,
) -> Context<'a> {
    let (conn, echo) = match link {
        Link::Up(up) => (Some(up.conn), up.echo(now)),
        Link::Down { .. } => (None, (0, 0)),
    };
    Context { now, conn, echo, peer_name, settings, outputs }
}

/// The clocks of the two nodes, compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClockOffset {
    /// The peer's wall clock minus this node's, seconds.
    pub seconds: f64,
    /// The way there and back, seconds: twice the error at most.
    pub round_trip_seconds: f64,
}

/// The state of one peer.
pub struct PeerCore {
    me: NodeId,
    peer: NodeId,
    peer_name: Name,
    settings: Settings,
    can_dial: bool,
    link: Link,
    heard: Option<Duration>,
    clock_offset: Option<ClockOffset>,
    /// Connections beside the link, and when to close them.
    surplus: Vec<(ConnId, Duration)>,
    /// Links in a row that did not last.
    short_links: u32,
    lives: Lives,
    channels: BTreeMap<GroupId, Channel>,
    /// What the peer announced on this link of groups that it has nothing to do with yet, as far as
    /// this core knows: the news from here may be on its way.
    early: BTreeMap<GroupId, Message>,
}

impl PeerCore {
    /// A peer that has not been reached yet.
    #[must_use]
    pub fn new(now: Duration, me: NodeId, peer: NodeId, name: Name, settings: Settings) -> Self {
        assert_ne!(me, peer, "a node is not its own peer");
        let link = Link::Down {
            since: now,
            reason: "not reached since this node started".to_owned(),
            attempts: 0,
            dial_at: now,
            dialling: false,
        };
        PeerCore {
            me,
            peer,
            peer_name: name,
            settings,
            can_dial: false,
            link,
            heard: None,
            clock_offset: None,
            surplus: Vec::new(),
            short_links: 0,
            lives: Lives::default(),
            channels: BTreeMap::new(),
            early: BTreeMap::new(),
        }
    }

    /// The connection that is the link.
    #[must_use]
    pub fn conn(&self) -> Option<ConnId> {
        match &self.link {
            Link::Up(up) => Some(up.conn),
            Link::Down { .. } => None,
        }
    }

    /// When something was last heard of the peer, monotonic.
    #[must_use]
    pub fn heard(&self) -> Option<Duration> {
        self.heard
    }

    /// How far the peer's wall clock is off.
    #[must_use]
    pub fn clock_offset(&self) -> Option<ClockOffset> {
        self.clock_offset
    }

    /// Since when the link is down, and why.
    #[must_use]
    pub fn link_down(&self) -> Option<(Duration, &str)> {
        match &self.link {
            Link::Down { since, reason, .. } => Some((*since, reason)),
            Link::Up(_) => None,
        }
    }

    /// Whether there is an address to dial.
    #[must_use]
    pub fn can_dial(&self) -> bool {
        self.can_dial
    }

    /// The channel of a group.
    #[must_use]
    pub fn channel(&self, group: GroupId) -> Option<&Channel> {
        self.channels.get(&group)
    }

    /// The groups that it has a channel for.
    pub fn groups(&self) -> impl Iterator<Item = GroupId> + '_ {
        self.channels.keys().copied()
    }

    /// What status shows of a group with this peer.
    #[must_use]
    pub fn status(&self, now: Duration, group: GroupId) -> Option<PeerStatus> {
        self.channels.get(&group).and_then(|channel| PeerStatus::of(self, channel, now))
    }

    /// The peer.
    #[must_use]
    pub fn peer(&self) -> NodeId {
        self.peer
    }

    /// The peer's name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.peer_name
    }

    /// When `Tick` is due next.
    #[must_use]
    pub fn next_wake(&self) -> Option<Duration> {
        let link = match &self.link {
            Link::Down { dial_at, dialling: false, .. } if self.can_dial => Some(*dial_at),
            Link::Down { .. } => None,
            Link::Up(up) => {
                let lost_after = self.settings.lost_after;
                let channels = self.channels.values();
                let channels = channels.filter_map(|channel| channel.next_wake(lost_after)).min();
                let own = up.heartbeat_at.min(up.heard + self.settings.lost_after);
                Some(channels.map_or(own, |wake| wake.min(own)))
            }
        };
        self.surplus.iter().map(|(_, close_at)| *close_at).chain(link).min()
    }

    /// Takes one input.
    pub fn handle(&mut self, now: Duration, input: Input, outputs: &mut Vec<Output>) {
        match input {
            Input::Tick => self.on_tick(now, outputs),
            Input::CanDial(can_dial) => {
                self.can_dial = can_dial;
                self.on_tick(now, outputs);
            }
            Input::DialFailed { reason } => self.on_dial_failed(now, reason),
            Input::ConnUp { conn, dialled, incarnation } => {
                self.on_conn_up(now, conn, dialled, incarnation, outputs);
            }
            Input::ConnDown { conn, reason } => {
                self.surplus.retain(|(surplus, _)| *surplus != conn);
                if self.conn() == Some(conn) {
                    self.link_down_now(now, reason, outputs);
                }
            }
            Input::Message { conn, message, wall } => {
                self.on_message(now, conn, message, wall, outputs);
            }
            Input::Heard { conn } => {
                self.heard_on(now, conn);
            }
            Input::Log { conn, group, stream, position, bytes } => {
                if self.heard_on(now, conn) {
                    self.with_channel(now, group, outputs, |channel, context| {
                        channel.on_log(context, stream, position, bytes)
                    });
                }
            }
            Input::Group(local) => {
                let channel =
                    self.channels.entry(local.id).or_insert_with(|| Channel::new(now, &local));
                let mut context =
                    context(now, &self.link, &self.peer_name, &self.settings, outputs);
                let id = local.id;
                channel.on_local(&mut context, *local);
                channel.after_input(&mut context);
                if channel.visible()
                    && let Some(message) = self.early.remove(&id)
                {
                    self.with_channel(now, id, outputs, |channel, context| {
                        channel.on_message(context, message)
                    });
                }
            }
            Input::GroupGone(group) => {
                self.channels.remove(&group);
            }
            Input::Recall { group, heard, newest } => {
                if let Some(channel) = self.channels.get_mut(&group) {
                    channel.recall(self.peer, newest, heard);
                }
            }
            Input::Pause { group, paused } => {
                self.with_channel(now, group, outputs, |channel, context| {
                    channel.on_pause(context, paused);
                    Ok(())
                });
            }
            Input::Prepared { group, stream, history, durable, requests, staged, needs_image } => {
                self.with_channel(now, group, outputs, |channel, context| {
                    channel.note_needs_image(needs_image);
                    channel.on_prepared(context, stream, &history, durable, requests, staged);
                    Ok(())
                });
            }
            Input::Shipped { group, stream, offer } => {
                self.with_channel(now, group, outputs, |channel, context| {
                    channel.on_shipped(context, stream, offer);
                    Ok(())
                });
            }
            Input::PartSent { group, stream, last } => {
                self.with_channel(now, group, outputs, |channel, context| {
                    channel.on_part_sent(context, stream, last);
                    Ok(())
                });
            }
            Input::PartFailed { group, stream, reason } => {
                self.with_channel(now, group, outputs, |channel, context| {
                    channel.on_part_failed(context, stream, &reason);
                    Ok(())
                });
            }
            Input::Part { conn, group, stream, number, bytes } => {
                if self.heard_on(now, conn) {
                    self.with_channel(now, group, outputs, |channel, context| {
                        channel.on_part(context, stream, number, bytes)
                    });
                }
            }
            Input::Staged { group, stream, progress, switched } => {
                self.with_channel(now, group, outputs, |channel, context| {
                    channel.on_staged(context, stream, progress, switched);
                    Ok(())
                });
            }
            Input::StageFailed { group, stream, reason, refused } => {
                self.with_channel(now, group, outputs, |channel, context| {
                    channel.on_stage_failed(context, stream, &reason, refused);
                    Ok(())
                });
            }
            Input::ChainFound { group, ticket, chain } => {
                self.with_channel(now, group, outputs, |channel, context| {
                    channel.on_chain_found(context, ticket, chain);
                    Ok(())
                });
            }
            Input::Appended(appended) => {
                self.with_channel(now, appended.group, outputs, |channel, context| {
                    channel.on_appended(context, &appended);
                    Ok(())
                });
            }
            Input::AppendFailed { group, stream, reason } => {
                self.with_channel(now, group, outputs, |channel, context| {
                    channel.on_append_failed(context, stream, reason);
                    Ok(())
                });
            }
            Input::Sent { group, stream } => {
                self.with_channel(now, group, outputs, |channel, context| {
                    channel.on_sent(context, stream);
                    Ok(())
                });
            }
            Input::ReadFailed { group, stream, reason } => {
                self.with_channel(now, group, outputs, |channel, context| {
                    channel.on_read_failed(context, stream, reason);
                    Ok(())
                });
            }
            Input::Yielded { group } => {
                self.with_channel(now, group, outputs, |channel, context| {
                    channel.on_yielded(context);
                    Ok(())
                });
            }
            Input::YieldRefused { group, reason } => {
                self.with_channel(now, group, outputs, |channel, context| {
                    channel.on_yield_refused(context, reason);
                    Ok(())
                });
            }
        }
    }

    /// Runs one channel's handler; an error of the protocol ends the connection.
    fn with_channel(
        &mut self,
        now: Duration,
        group: GroupId,
        outputs: &mut Vec<Output>,
        handler: impl FnOnce(&mut Channel, &mut Context<'_>) -> Result<(), String>,
    ) {
        let conn = self.conn();
        // A group that is not here, or is none of the peer's business: the same silence.
        let Some(channel) = self.channels.get_mut(&group) else { return };
        let mut context = context(now, &self.link, &self.peer_name, &self.settings, outputs);
        let handled = handler(channel, &mut context);
        channel.after_input(&mut context);
        if let Err(what) = handled
            && let Some(conn) = conn
        {
            self.protocol_error(now, conn, what, outputs);
        }
    }

    fn protocol_error(
        &mut self,
        now: Duration,
        conn: ConnId,
        what: String,
        outputs: &mut Vec<Output>,
    ) {
        let reason = format!("peer {}: broke the protocol: {what}", self.peer_name);
        outputs.push(Output::Close { conn, reason: reason.clone() });
        self.link_down_now(now, reason, outputs);
    }

    fn on_tick(&mut self, now: Duration, outputs: &mut Vec<Output>) {
        self.surplus.retain(|(conn, close_at)| {
            let due = now >= *close_at;
            if due {
                let reason = "there is a link already".to_owned();
                outputs.push(Output::Close { conn: *conn, reason });
            }
            !due
        });
        match &mut self.link {
            Link::Down { dial_at, dialling, .. } => {
                if self.can_dial && !*dialling && now >= *dial_at {
                    *dialling = true;
                    outputs.push(Output::Dial);
                }
            }
            Link::Up(up) if now >= up.heard + self.settings.lost_after => {
                let reason = format!(
                    "nothing heard for {}",
                    Span(Duration::from_millis((now - up.heard).as_millis() as u64))
                );
                let conn = up.conn;
                outputs.push(Output::Close { conn, reason: reason.clone() });
                self.link_down_now(now, reason, outputs);
            }
            Link::Up(up) if now >= up.heartbeat_at => {
                up.heartbeat_at = now + self.settings.heartbeat;
                let (echo, held) = up.echo(now);
                outputs.push(Output::Send {
                    conn: up.conn,
                    // The shell sets `wall` when it sends: the core knows no wall clock.
                    message: Message::Heartbeat { sent: nanoseconds(now), echo, held, wall: 0 },
                });
                for channel in self.channels.values_mut() {
                    let mut context =
                        context(now, &self.link, &self.peer_name, &self.settings, outputs);
                    channel.on_heartbeat(&mut context);
                }
            }
            Link::Up(_) => {}
        }
        if let Link::Up(_) = &self.link {
            for channel in self.channels.values_mut() {
                let mut context =
                    context(now, &self.link, &self.peer_name, &self.settings, outputs);
                channel.on_tick(&mut context);
                channel.after_input(&mut context);
            }
        }
    }

    fn on_dial_failed(&mut self, now: Duration, why: String) {
        let seed = self.seed();
        if let Link::Down { reason, attempts, dial_at, dialling, .. } = &mut self.link {
            *reason = why;
            *dialling = false;
            *attempts = attempts.saturating_add(1);
            *dial_at = now + back_off(&seed, *attempts);
        }
    }

    fn seed(&self) -> [u8; 32] {
        let mut seed = [0; 32];
        seed[..16].copy_from_slice(&self.me.0);
        seed[16..].copy_from_slice(&self.peer.0);
        seed
    }

    fn on_conn_up(
        &mut self,
        now: Duration,
        conn: ConnId,
        dialled: bool,
        incarnation: Incarnation,
        outputs: &mut Vec<Output>,
    ) {
        if let Caller::OneOfTwo { until, news } = self.lives.hello(now, incarnation) {
            self.turn_away(now, conn, (until, news), outputs);
            return;
        }
        if let Link::Up(up) = &self.link {
            let restarted = up.incarnation != incarnation;
            let same_dialler = up.dialled == dialled;
            let preferred = dialled == (self.me < self.peer);
            if !(restarted || same_dialler || preferred) {
                // The other side may still take it for the link, until it has seen the better one.
                self.surplus.push((conn, now + self.settings.heartbeat));
                return;
            }
            // So may it with the one that is replaced.
            self.surplus.push((up.conn, now + self.settings.heartbeat));
            for channel in self.channels.values_mut() {
                let mut context =
                    context(now, &self.link, &self.peer_name, &self.settings, outputs);
                channel.on_link_down(&mut context, "replaced by a newer connection");
            }
        } else {
            outputs.push(Output::Event {
                severity: Severity::Info,
                code: "link-up",
                group: None,
                text: format!("peer {}: connected", self.peer_name),
            });
        }
        self.heard = Some(now);
        self.early.clear();
        self.link = Link::Up(Up {
            conn,
            since: now,
            dialled,
            incarnation,
            heard: now,
            heartbeat_at: now,
            last_heartbeat: None,
        });
        for channel in self.channels.values_mut() {
            let mut context = context(now, &self.link, &self.peer_name, &self.settings, outputs);
            channel.on_link_up(&mut context);
        }
        // The first heartbeat goes out before anything is asked for: it bounds the age of answers.
        self.on_tick(now, outputs);
    }

    /// Two have the peer's identity: what one takes the other has not, so neither is let in.
    fn turn_away(
        &mut self,
        now: Duration,
        conn: ConnId,
        (until, news): (Duration, bool),
        outputs: &mut Vec<Output>,
    ) {
        let peer = &self.peer_name;
        let why = format!(
            "two appliances that run have the identity of {peer}: one is a copy of the other's \
             disk; stop it, and half a minute later the other is let in again"
        );
        if news {
            outputs.push(Output::Event {
                severity: Severity::Error,
                code: "peer-cloned",
                group: None,
                text: format!("peer {peer}: {why}"),
            });
        }
        outputs.push(Output::Close { conn, reason: why.clone() });
        if let Link::Up(up) = &self.link {
            outputs.push(Output::Close { conn: up.conn, reason: why.clone() });
            self.link_down_now(now, why.clone(), outputs);
        }
        if let Link::Down { reason, dial_at, dialling, .. } = &mut self.link {
            (*reason, *dial_at, *dialling) = (why, until, false);
        }
    }

    fn link_down_now(&mut self, now: Duration, reason: String, outputs: &mut Vec<Output>) {
        outputs.push(Output::Event {
            severity: Severity::Warning,
            code: "link-lost",
            group: None,
            text: format!("peer {}: link lost: {reason}; it is dialled again", self.peer_name),
        });
        for channel in self.channels.values_mut() {
            let mut context = context(now, &self.link, &self.peer_name, &self.settings, outputs);
            channel.on_link_down(&mut context, &reason);
        }
        // At once where the link had lasted: most losses are restarts.
        let lasted = match &self.link {
            Link::Up(up) => now - up.since >= self.settings.lost_after,
            Link::Down { .. } => false,
        };
        self.short_links = if lasted { 0 } else { self.short_links.saturating_add(1) };
        let wait = match self.short_links {
            0 => Duration::ZERO,
            attempts => back_off(&self.seed(), attempts),
        };
        let dial_at = now + wait;
        self.link = Link::Down { since: now, reason, attempts: 0, dial_at, dialling: false };
        self.on_tick(now, outputs);
    }

    /// Notes life on the link; false where the connection is not the link.
    fn heard_on(&mut self, now: Duration, conn: ConnId) -> bool {
        match &mut self.link {
            Link::Up(up) if up.conn == conn => {
                up.heard = now;
                self.heard = Some(now);
                true
            }
            _ => false,
        }
    }

    fn on_message(
        &mut self,
        now: Duration,
        conn: ConnId,
        message: Message,
        wall: LogTime,
        outputs: &mut Vec<Output>,
    ) {
        if !self.heard_on(now, conn) {
            return;
        }
        if let Message::Heartbeat { sent, echo, held, wall: theirs } = message {
            self.on_heartbeat(now, sent, echo, held, LogTime(theirs), wall);
            return;
        }
        let Some(group) = super::channel::group_of(&message) else { return };
        let known = self.channels.get(&group).is_some_and(Channel::visible);
        if !known && matches!(message, Message::Announce { .. }) && self.early.len() < EARLY_MAX {
            self.early.insert(group, message.clone());
        }
        self.with_channel(now, group, outputs, |channel, context| {
            channel.on_message(context, message)
        });
    }

    fn on_heartbeat(
        &mut self,
        now: Duration,
        sent: u64,
        echo: u64,
        held: u64,
        theirs: LogTime,
        ours: LogTime,
    ) {
        let Link::Up(up) = &mut self.link else { return };
        up.last_heartbeat = Some((sent, now));
        if echo != 0 && theirs.0 != 0 {
            let round_trip = nanoseconds(now).saturating_sub(echo).saturating_sub(held);
            let offset = theirs.0 as f64 + round_trip as f64 / 2.0 - ours.0 as f64;
            self.clock_offset = Some(ClockOffset {
                seconds: offset / 1e9,
                round_trip_seconds: round_trip as f64 / 1e9,
            });
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The wait after `count` failures in a row, from 1 on.
pub(super) fn doubling(first: Duration, longest: Duration, count: u32) -> Duration {
    first.saturating_mul(1 << count.saturating_sub(1).min(10)).min(longest)
}

/// Half to all of a wait that doubles, by a hash of who waits and how often.
fn back_off(seed: &[u8], attempts: u32) -> Duration {
    let longest = doubling(DIAL_FIRST, DIAL_LONGEST, attempts);
    let hash = xxh3_64(&[seed, &attempts.to_le_bytes()].concat());
    longest.mul_f64(0.5 + 0.5 * (hash % 1024) as f64 / 1024.0)
}
