//! What goes into a core, and what comes out of it.

use bytes::Bytes;

use super::{ConnId, LocalGroup};
use crate::events::Severity;
use crate::group::{ImageOffer, ImageProgress, Staged};
use crate::replication::channel::Heard;
use crate::replication::epoch::History;
use crate::replication::wire::{Message, NeedsImage};
use crate::units::{Chain, GroupId, Incarnation, LogTime, Lsn, Name};

/// What has happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// Time has passed; see [`PeerCore::next_wake`].
    Tick,
    /// Whether there is an address to dial.
    CanDial(bool),
    /// A dial came to nothing.
    DialFailed {
        /// Why.
        reason: String,
    },
    /// A connection is ready: TLS, keys and hello are checked.
    ConnUp {
        /// The connection.
        conn: ConnId,
        /// Whether this node dialled it.
        dialled: bool,
        /// The peer's.
        incarnation: Incarnation,
    },
    /// A connection has ended.
    ConnDown {
        /// The connection.
        conn: ConnId,
        /// Why.
        reason: String,
    },
    /// A message came.
    Message {
        /// On this connection.
        conn: ConnId,
        /// The message.
        message: Message,
        /// The wall clock, for the offset between the nodes.
        wall: LogTime,
    },
    /// Something else came, that is none of the core's business.
    Heard {
        /// On this connection.
        conn: ConnId,
    },
    /// Bytes of a log came.
    Log {
        /// On this connection.
        conn: ConnId,
        /// Of this group.
        group: GroupId,
        /// In this stream.
        stream: u64,
        /// From this position.
        position: Lsn,
        /// The bytes.
        bytes: Bytes,
    },
    /// A group is here, or has changed.
    Group(Box<LocalGroup>),
    /// A group is no longer here.
    GroupGone(GroupId),
    /// What was heard of the peer before this life of the process.
    Recall {
        /// The group.
        group: GroupId,
        /// How far it was.
        heard: Heard,
        /// Log time of the newest record here.
        newest: LogTime,
    },
    /// An operator pauses or resumes.
    Pause {
        /// The group.
        group: GroupId,
        /// Paused from now on.
        paused: bool,
    },
    /// Answers [`Output::Prepare`].
    Prepared {
        /// The group.
        group: GroupId,
        /// The stream asked for.
        stream: u64,
        /// Where the log stands, unfinished tail forgotten.
        history: History,
        /// Durable here.
        durable: Lsn,
        /// Requests up to the head.
        requests: u64,
        /// What is staged of an image.
        staged: Option<Staged>,
        /// The log of the primary cannot be followed from there on.
        needs_image: NeedsImage,
    },
    /// Answers [`Output::Ship`].
    Shipped {
        /// The group.
        group: GroupId,
        /// The stream.
        stream: u64,
        /// The image that is open now, or why there is none.
        offer: Result<ImageOffer, String>,
    },
    /// Answers [`Output::SendPart`].
    PartSent {
        /// The group.
        group: GroupId,
        /// The stream.
        stream: u64,
        /// It was the end of the image.
        last: bool,
    },
    /// A part of an image could not be read.
    PartFailed {
        /// The group.
        group: GroupId,
        /// The stream.
        stream: u64,
        /// Why.
        reason: String,
    },
    /// A part of an image came.
    Part {
        /// On this connection.
        conn: ConnId,
        /// Of this group.
        group: GroupId,
        /// In this stream.
        stream: u64,
        /// Its number in the stream.
        number: u64,
        /// The bytes.
        bytes: Bytes,
    },
    /// Answers [`Output::Stage`].
    Staged {
        /// The group.
        group: GroupId,
        /// The stream.
        stream: u64,
        /// How far it is.
        progress: ImageProgress,
        /// It was the end, and the image took the place of what was here.
        switched: bool,
    },
    /// An image, or a part of it, could not be staged.
    StageFailed {
        /// The group.
        group: GroupId,
        /// The stream.
        stream: u64,
        /// Why.
        reason: String,
        /// It will not do better by itself.
        refused: bool,
    },
    /// Answers [`Output::LookupChain`].
    ChainFound {
        /// The group.
        group: GroupId,
        /// The ticket asked with.
        ticket: u64,
        /// The chain, where the log has that position as the end of a record.
        chain: Option<Chain>,
    },
    /// Answers [`Output::Append`].
    Appended(Appended),
    /// Bytes could not be appended.
    AppendFailed {
        /// The group.
        group: GroupId,
        /// The stream.
        stream: u64,
        /// Why.
        reason: String,
    },
    /// Answers [`Output::SendLog`].
    Sent {
        /// The group.
        group: GroupId,
        /// The stream.
        stream: u64,
    },
    /// A range could not be read from the log.
    ReadFailed {
        /// The group.
        group: GroupId,
        /// The stream.
        stream: u64,
        /// Why.
        reason: String,
    },
    /// Answers [`Output::Yield`], or an operator had it yield.
    Yielded {
        /// The group.
        group: GroupId,
    },
    /// Answers [`Output::Yield`] where it does not yield.
    YieldRefused {
        /// The group.
        group: GroupId,
        /// Why.
        reason: String,
    },
}

/// Where a secondary's log stands after an append.
#[derive(Clone, Debug)]
pub struct Appended {
    /// The group.
    pub group: GroupId,
    /// The stream.
    pub stream: u64,
    /// Where the next byte belongs.
    pub received: Lsn,
    /// After the last whole record.
    pub head: Lsn,
    /// Chain there.
    pub chain: Chain,
    /// Durable here.
    pub durable: Lsn,
    /// Requests up to the head.
    pub requests: u64,
}

/// What the shell has to do.
#[derive(Clone, Debug)]
pub enum Output {
    /// Dial the peer; answer with `ConnUp` or `DialFailed`.
    Dial,
    /// Close a connection.
    Close {
        /// The connection.
        conn: ConnId,
        /// Why.
        reason: String,
    },
    /// Send a message, ahead of log frames.
    Send {
        /// On this connection.
        conn: ConnId,
        /// The message.
        message: Message,
    },
    /// Read `[from, to)` of a log and send it as one frame; answer with `Sent` or `ReadFailed`.
    SendLog {
        /// On this connection.
        conn: ConnId,
        /// Of this group.
        group: GroupId,
        /// In this stream.
        stream: u64,
        /// First byte.
        from: Lsn,
        /// After the last byte.
        to: Lsn,
    },
    /// Forget the unfinished tail of a group's log, after all appends before this; answer with
    /// `Prepared`.
    Prepare {
        /// The group.
        group: GroupId,
        /// To be given back.
        stream: u64,
    },
    /// The peer needs the log from here on; it follows, or has followed until now.
    PeerNeeds {
        /// Of this group.
        group: GroupId,
        /// From here on.
        from: Lsn,
        /// It follows, or takes an image.
        follows: bool,
    },
    /// Open the image that the peer is to be sent; answer with `Shipped`.
    Ship {
        /// The group.
        group: GroupId,
        /// The stream.
        stream: u64,
        /// The peer's name.
        peer: Name,
        /// Only what changed since here, where that is given.
        since: Option<Lsn>,
        /// Behind this the peer's log is not part of this history.
        common: Lsn,
        /// What is staged there.
        staged: Option<Staged>,
    },
    /// Read the next part of the image that the peer is sent, and send it as one frame; answer with
    /// `PartSent` or `PartFailed`.
    SendPart {
        /// On this connection.
        conn: ConnId,
        /// Of this group.
        group: GroupId,
        /// In this stream.
        stream: u64,
        /// The peer's name.
        peer: Name,
        /// The part's number in the stream.
        number: u64,
    },
    /// No image is kept for the peer any more.
    EndShipment {
        /// Of this group.
        group: GroupId,
        /// The peer's name.
        peer: Name,
    },
    /// An image will come: make ready to stage it; answer with `StageFailed` where that fails.
    BeginImage {
        /// Of this group.
        group: GroupId,
        /// In this stream.
        stream: u64,
        /// The image.
        offer: ImageOffer,
    },
    /// Stage a part of an image, and switch to it where it is the end; answer with `Staged` or
    /// `StageFailed`.
    Stage {
        /// Of this group.
        group: GroupId,
        /// In this stream.
        stream: u64,
        /// The part.
        bytes: Bytes,
    },
    /// The log reaches this copy: what is staged of an image is not needed.
    DropStaging {
        /// Of this group.
        group: GroupId,
    },
    /// Look up the chain at a position; answer with `ChainFound`.
    LookupChain {
        /// The group.
        group: GroupId,
        /// Where.
        lsn: Lsn,
        /// To be given back.
        ticket: u64,
    },
    /// Whether the group follows by this peer's stream has changed, or which reigns the peer has:
    /// other peers' cores are to know.
    FollowChanged {
        /// The group.
        group: GroupId,
    },
    /// A peer that answers to hosts wait for acknowledged so much.
    PeerHolds {
        /// The group.
        group: GroupId,
        /// In memory there.
        received: Lsn,
        /// Durable there.
        durable: Lsn,
    },
    /// A peer that answers to hosts wait for is lost.
    PeerLost {
        /// The group.
        group: GroupId,
        /// Why.
        reason: String,
        /// What it has in memory at most, whatever it had acknowledged.
        received: Lsn,
        /// What it has durably at most.
        durable: Lsn,
    },
    /// Append bytes to a log; answer with `Appended` or `AppendFailed`.
    Append {
        /// To this group.
        group: GroupId,
        /// To be given back.
        stream: u64,
        /// Where they belong.
        position: Lsn,
        /// The bytes.
        bytes: Bytes,
    },
    /// The primary is durable up to here.
    Committed {
        /// Of this group.
        group: GroupId,
        /// Position.
        lsn: Lsn,
    },
    /// No peer has what this node lacks: serve, as primary.
    Serve {
        /// The group.
        group: GroupId,
    },
    /// A peer was promoted meanwhile: do not serve by yourself.
    HoldBack {
        /// The group.
        group: GroupId,
        /// The peer's reign: whoever serves here nevertheless reigns above it.
        counter: u64,
        /// Why.
        reason: String,
    },
    /// Remember, over a restart, that this node and a peer have both served as primary, or that it
    /// is over: only an operator says which of them yields.
    SplitBrain {
        /// The group.
        group: GroupId,
        /// It began, or ended.
        there_is: bool,
    },
    /// Be a secondary from `at` on, where the peer's chain is `chain`: keep what is behind it as a
    /// branch, if that may be cut without an operator. Answer with `Yielded` or `YieldRefused`.
    Yield {
        /// The group.
        group: GroupId,
        /// Where the histories part.
        at: Lsn,
        /// The chain there, where the peer's log still reaches it.
        chain: Option<Chain>,
    },
    /// Mark a copy as one whose replication was stopped, or as one that is kept up to date again.
    Retire {
        /// The group.
        group: GroupId,
        /// Stopped.
        retired: bool,
    },
    /// Tell people.
    Event {
        /// How much it asks of them.
        severity: Severity,
        /// A stable word.
        code: &'static str,
        /// The group it concerns.
        group: Option<Name>,
        /// One line.
        text: String,
    },
}
