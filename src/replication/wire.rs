//! The peer wire: the frozen hello, the frame header, and the control messages.
//!
//! Everything runs inside TLS 1.3. All integers are little-endian. After the TLS handshake the
//! dialler sends its hello and the other side answers with its own; then frames flow both ways.
//!
//! **Hello**, 64 bytes. Its layout never changes: it is what every version of the future can read.
//!
//! | offset | size | field | meaning |
//! | ---: | ---: | --- | --- |
//! | 0 | 8 | `magic` | `TLPEER\r\n` |
//! | 8 | 2 | `version_min` | lowest wire version that the sender speaks |
//! | 10 | 2 | `version_max` | highest |
//! | 12 | 1 | `purpose` | [`Purpose`]: what the dialler wants; the answer repeats it |
//! | 13 | 1 | `verdict` | [`Verdict`]: 0 in the dialler's hello |
//! | 14 | 2 | | zero |
//! | 16 | 16 | `node` | the sender's node id |
//! | 32 | 8 | `incarnation` | random, new at each start of the sender |
//! | 40 | 16 | `wanted` | the node that the dialler means to reach, zero if it cannot know |
//! | 56 | 8 | `features` | bits that both must have to be used; none yet |
//!
//! Both use the highest version that lies in both ranges.
//!
//! **Frame header**, 48 bytes, version 1. At most [`PAYLOAD_BYTES_MAX`] bytes of payload follow, so
//! that a heartbeat never waits behind more than that.
//!
//! | offset | size | field | meaning |
//! | ---: | ---: | --- | --- |
//! | 0 | 1 | `kind` | [`FrameKind`] |
//! | 1 | 1 | `codec` | 0: payload as it is |
//! | 2 | 2 | | zero |
//! | 4 | 4 | `payload_bytes` | bytes behind the header |
//! | 8 | 4 | `raw_bytes` | bytes after decoding; equal to `payload_bytes` with codec 0 |
//! | 12 | 4 | | zero |
//! | 16 | 16 | `group` | of a log or image frame: the group; else zero |
//! | 32 | 8 | `stream` | of a log or image frame: the number in the `Follow`; else zero |
//! | 40 | 8 | `position` | of a log frame: LSN of its start; of an image frame: its number |
//!
//! A **log** frame carries bytes of the log, cut anywhere. An **image** frame carries one part of
//! an image (`wire/part.rs`); those of a stream are numbered from 0. A **control** frame carries
//! one [`Message`], encoded by bincode with fixed-width integers. The order of the variants and of
//! their fields is the format of version 1 and is frozen; a change is a new version beside it.
//!
//! Versions, newest first:
//! - 1: the first.

use std::mem::offset_of;

use bincode::{Decode, Encode};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::units::{GroupId, Incarnation, Lsn, NodeId};

/// Opens every hello.
pub const MAGIC: [u8; 8] = *b"TLPEER\r\n";
/// Bytes of a hello.
pub const HELLO_BYTES: usize = 64;
/// Bytes of a frame header.
pub const FRAME_HEADER_BYTES: usize = 48;
/// Bytes that a frame carries at most.
pub const PAYLOAD_BYTES_MAX: usize = 256 * 1024;
/// The wire versions that this program speaks.
pub const VERSIONS: std::ops::RangeInclusive<u16> = 1..=1;

/// What the dialler wants. The numbers are on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Purpose {
    /// To be the link of two nodes that know each other's keys.
    Link = 1,
    /// To become known by a one-time token.
    Pair = 2,
}

/// How the side that was dialled judges the dialler. The numbers are on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Verdict {
    /// Go on.
    Welcome = 0,
    /// The key is not the one of a paired node.
    UnknownKey = 1,
    /// The dialler wants another node than this one.
    OtherNode = 2,
    /// No wire version in common.
    NoCommonVersion = 3,
    /// Both are the same node: a clone, or an address that leads back.
    SameNode = 4,
    /// The node behind the key is another than the one that was paired.
    OtherIdentity = 5,
}

impl Verdict {
    /// What the dialler's operator should read.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Verdict::Welcome => "welcome",
            Verdict::UnknownKey => {
                "it does not know this node's key; pair again with `tidelog peer invite` there and \
                 `tidelog peer join` here"
            }
            Verdict::OtherNode => {
                "another node answers at its address; check `advertise` in its configuration"
            }
            Verdict::NoCommonVersion => {
                "the two programs have no wire version in common; upgrade the older one"
            }
            Verdict::SameNode => {
                "it is this node: `tidelog peer join` is for the one that gave no token; or one of \
                 the two is a copy of the other"
            }
            Verdict::OtherIdentity => {
                "this node's identity is another than the one that was paired; pair again"
            }
        }
    }
}

/// Bytes that are not what this wire says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("peer wire: {0}")]
pub struct WireError(pub String);

fn wrong(what: impl Into<String>) -> WireError {
    WireError(what.into())
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHello {
    magic: [u8; 8],
    version_min: U16,
    version_max: U16,
    purpose: u8,
    verdict: u8,
    zero: [u8; 2],
    node: [u8; 16],
    incarnation: U64,
    wanted: [u8; 16],
    features: U64,
}

const _: () = {
    assert!(size_of::<RawHello>() == HELLO_BYTES);
    assert!(offset_of!(RawHello, version_min) == 8);
    assert!(offset_of!(RawHello, version_max) == 10);
    assert!(offset_of!(RawHello, purpose) == 12);
    assert!(offset_of!(RawHello, verdict) == 13);
    assert!(offset_of!(RawHello, node) == 16);
    assert!(offset_of!(RawHello, incarnation) == 32);
    assert!(offset_of!(RawHello, wanted) == 40);
    assert!(offset_of!(RawHello, features) == 56);
};

/// The first bytes of each side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Lowest wire version that the sender speaks.
    pub version_min: u16,
    /// Highest.
    pub version_max: u16,
    /// What the dialler wants.
    pub purpose: Purpose,
    /// The judgement on the dialler.
    pub verdict: Verdict,
    /// The sender.
    pub node: NodeId,
    /// Its process, so to speak.
    pub incarnation: Incarnation,
    /// Whom the dialler means to reach.
    pub wanted: Option<NodeId>,
    /// Optional parts of the protocol.
    pub features: u64,
}

impl Hello {
    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let raw = RawHello {
            magic: MAGIC,
            version_min: self.version_min.into(),
            version_max: self.version_max.into(),
            purpose: self.purpose as u8,
            verdict: self.verdict as u8,
            zero: [0; 2],
            node: self.node.0,
            incarnation: self.incarnation.0.into(),
            wanted: self.wanted.unwrap_or_default().0,
            features: self.features.into(),
        };
        let mut bytes = [0; HELLO_BYTES];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// Reads a hello of any version of the wire.
    ///
    /// # Errors
    ///
    /// Where the magic is missing, or a number has no meaning here.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Hello, WireError> {
        let raw = RawHello::ref_from_bytes(bytes).map_err(|_| wrong("hello: wrong size"))?;
        if raw.magic != MAGIC {
            return Err(wrong("hello: no magic: not a Tidelog peer"));
        }
        let purpose = match raw.purpose {
            1 => Purpose::Link,
            2 => Purpose::Pair,
            other => return Err(wrong(format!("hello: purpose {other} is unknown"))),
        };
        let verdict = [
            Verdict::Welcome,
            Verdict::UnknownKey,
            Verdict::OtherNode,
            Verdict::NoCommonVersion,
            Verdict::SameNode,
            Verdict::OtherIdentity,
        ]
        .into_iter()
        .find(|verdict| *verdict as u8 == raw.verdict)
        .ok_or_else(|| wrong(format!("hello: verdict {} is unknown", raw.verdict)))?;
        let wanted = NodeId(raw.wanted);
        Ok(Hello {
            version_min: raw.version_min.get(),
            version_max: raw.version_max.get(),
            purpose,
            verdict,
            node: NodeId(raw.node),
            incarnation: Incarnation(raw.incarnation.get()),
            wanted: (wanted != NodeId::default()).then_some(wanted),
            features: raw.features.get(),
        })
    }

    /// The wire version that two sides use, if they have one in common.
    #[must_use]
    pub fn common_version(&self, other: &Hello) -> Option<u16> {
        let version = self.version_max.min(other.version_max);
        (version >= self.version_min && version >= other.version_min).then_some(version)
    }
}

/// What a frame carries. The numbers are on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// One [`Message`].
    Control = 1,
    /// Bytes of a group's log.
    Log = 2,
    /// A part of an image of a group.
    Image = 3,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFrameHeader {
    kind: u8,
    codec: u8,
    zero: [u8; 2],
    payload_bytes: U32,
    raw_bytes: U32,
    zero_too: [u8; 4],
    group: [u8; 16],
    stream: U64,
    position: U64,
}

const _: () = {
    assert!(size_of::<RawFrameHeader>() == FRAME_HEADER_BYTES);
    assert!(offset_of!(RawFrameHeader, payload_bytes) == 4);
    assert!(offset_of!(RawFrameHeader, raw_bytes) == 8);
    assert!(offset_of!(RawFrameHeader, group) == 16);
    assert!(offset_of!(RawFrameHeader, stream) == 32);
    assert!(offset_of!(RawFrameHeader, position) == 40);
};

/// What stands before the bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What it carries.
    pub kind: FrameKind,
    /// Bytes behind the header.
    pub payload_bytes: u32,
    /// The group of a log frame.
    pub group: GroupId,
    /// The stream of a log frame.
    pub stream: u64,
    /// LSN of a log frame's first byte.
    pub position: Lsn,
}

impl FrameHeader {
    /// The header of a control frame.
    #[must_use]
    pub fn control(payload_bytes: usize) -> FrameHeader {
        FrameHeader {
            kind: FrameKind::Control,
            payload_bytes: checked_payload(payload_bytes),
            group: GroupId::default(),
            stream: 0,
            position: Lsn::ZERO,
        }
    }

    /// The header of a log frame.
    #[must_use]
    pub fn log(group: GroupId, stream: u64, position: Lsn, payload_bytes: usize) -> FrameHeader {
        let payload_bytes = checked_payload(payload_bytes);
        FrameHeader { kind: FrameKind::Log, payload_bytes, group, stream, position }
    }

    /// The header of an image frame, the `number`th of its stream.
    #[must_use]
    pub fn image(group: GroupId, stream: u64, number: u64, payload_bytes: usize) -> FrameHeader {
        let payload_bytes = checked_payload(payload_bytes);
        FrameHeader { kind: FrameKind::Image, payload_bytes, group, stream, position: Lsn(number) }
    }

    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; FRAME_HEADER_BYTES] {
        let raw = RawFrameHeader {
            kind: self.kind as u8,
            codec: 0,
            zero: [0; 2],
            payload_bytes: self.payload_bytes.into(),
            raw_bytes: self.payload_bytes.into(),
            zero_too: [0; 4],
            group: self.group.0,
            stream: self.stream.into(),
            position: self.position.0.into(),
        };
        let mut bytes = [0; FRAME_HEADER_BYTES];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    ///
    /// Where a field has a value that no sender gives it.
    pub fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<FrameHeader, WireError> {
        let raw = RawFrameHeader::ref_from_bytes(bytes).map_err(|_| wrong("frame: wrong size"))?;
        let kind = match raw.kind {
            1 => FrameKind::Control,
            2 => FrameKind::Log,
            3 => FrameKind::Image,
            other => return Err(wrong(format!("frame: kind {other} is unknown"))),
        };
        if raw.codec != 0 {
            return Err(wrong(format!("frame: codec {} was not agreed on", raw.codec)));
        }
        let payload_bytes = raw.payload_bytes.get();
        if payload_bytes as usize > PAYLOAD_BYTES_MAX || payload_bytes == 0 {
            return Err(wrong(format!(
                "frame: {payload_bytes} bytes of payload, expected 1 to {PAYLOAD_BYTES_MAX}"
            )));
        }
        if raw.raw_bytes.get() != payload_bytes {
            return Err(wrong("frame: raw_bytes differs from payload_bytes without a codec"));
        }
        let position = raw.position.get();
        if position > Lsn::MAX.0 - PAYLOAD_BYTES_MAX as u64 {
            return Err(wrong(format!("frame: position {position} is above 2^63")));
        }
        Ok(FrameHeader {
            kind,
            payload_bytes,
            group: GroupId(raw.group),
            stream: raw.stream.get(),
            position: Lsn(position),
        })
    }
}

fn checked_payload(payload_bytes: usize) -> u32 {
    assert!(
        (1..=PAYLOAD_BYTES_MAX).contains(&payload_bytes),
        "a frame of {payload_bytes} bytes is never made"
    );
    payload_bytes as u32
}

/// One reign in a history.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct WireEpoch {
    /// The epoch's random id.
    pub id: u64,
    /// Counts the reigns.
    pub counter: u64,
    /// Where it begins.
    pub first_lsn: u64,
    /// The node that reigned.
    pub author: [u8; 16],
}

/// What a node's log of a group is.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct WireHistory {
    /// Every reign, oldest first.
    pub epochs: Vec<WireEpoch>,
    /// After the last whole record.
    pub head: u64,
    /// Checksum of the last record's header.
    pub chain: u64,
}

/// A position that outlives its epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct WirePosition {
    /// The epoch's random id.
    pub epoch: u64,
    /// The byte position.
    pub lsn: u64,
    /// Log time there.
    pub time: u64,
}

/// What a secondary needs instead of the log that follows its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub enum NeedsImage {
    /// Nothing: it takes the log.
    #[default]
    No,
    /// What changed since its head: it cannot go back as the log does.
    Since,
    /// All of an image: what it holds is none.
    Whole,
}

/// Up to a place, what is staged of an image is as of a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct WireReached {
    /// The place's volume.
    pub volume: u32,
    /// The place in it.
    pub offset: u64,
    /// As of here.
    pub at: WirePosition,
}

/// What a secondary has of an image that was not sent to the end.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct WireStaged {
    /// The image that came last.
    pub image: WirePosition,
    /// The end of the log that it goes on from; none where it is all of an image.
    pub since: Option<u64>,
    /// What is staged, by place.
    pub reached: Vec<WireReached>,
    /// Bytes that are staged.
    pub done_bytes: u64,
}

/// What ended a stream, or kept it from beginning. The numbers are on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum StopCode {
    /// The group is not replicated to the one who asked.
    NotMember,
    /// The one who was asked is not the primary.
    NotPrimary,
    /// Paused by command.
    Paused,
    /// The log no longer reaches back to where the secondary stands.
    LogGone,
    /// The secondary holds more than the primary.
    Ahead,
    /// The histories differ before the end of both.
    Diverged,
    /// The secondary could not append.
    Append,
    /// The primary could not read its log.
    Read,
    /// The primary's log passed the secondary again and again; it is served after a while.
    CannotKeepUp,
}

/// A control message of wire version 1. The order of the variants is the format.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum Message {
    /// The first message of a link, both ways.
    Welcome {
        /// The sender's configured name.
        name: String,
        /// Where it can be dialled; empty where it cannot.
        address: String,
        /// Its program version, for people.
        program: String,
    },
    /// Says that the sender lives.
    Heartbeat {
        /// The sender's monotonic clock, nanoseconds.
        sent: u64,
        /// `sent` of the last heartbeat that it got, 0 for none.
        echo: u64,
        /// Nanoseconds between that heartbeat's arrival and this one.
        held: u64,
        /// The sender's wall clock, nanoseconds since 1970.
        wall: u64,
    },
    /// What the sender holds of a group that both are members of.
    Announce {
        /// The group.
        group: [u8; 16],
        /// Whether the sender is its primary.
        primary: bool,
        /// A primary that has served nobody since its start.
        recovering: bool,
        /// Replication was paused by command at the sender.
        paused: bool,
        /// The sender no longer replicates it to the receiver.
        stopped: bool,
        /// Random, new at each start of the sender's group.
        incarnation: u64,
        /// Its log.
        history: WireHistory,
    },
    /// A secondary asks its primary for the log from its head.
    Follow {
        /// The group.
        group: [u8; 16],
        /// The number that this stream will carry; grows with each ask.
        stream: u64,
        /// The secondary's log.
        history: WireHistory,
        /// The secondary's durable LSN.
        durable: u64,
        /// Requests up to its head.
        requests: u64,
        /// What it has of an image, if one was coming.
        staged: Option<WireStaged>,
        /// It cannot take the log from there on.
        needs_image: NeedsImage,
    },
    /// The primary grants it.
    Stream {
        /// The group.
        group: [u8; 16],
        /// The number asked with.
        stream: u64,
        /// The position of the first byte that will come.
        from: u64,
    },
    /// A stream ends, or does not begin.
    Stop {
        /// The group.
        group: [u8; 16],
        /// The number asked with.
        stream: u64,
        /// Why, for programs.
        code: StopCode,
        /// Why, and what to do: for people.
        reason: String,
    },
    /// What the secondary has.
    Ack {
        /// The group.
        group: [u8; 16],
        /// The stream.
        stream: u64,
        /// Bytes received and appended, whole records or not.
        received: u64,
        /// After the last whole record.
        head: u64,
        /// Chain at `head`.
        chain: u64,
        /// Up to which it survives power loss.
        durable: u64,
        /// Requests up to `head`.
        requests: u64,
    },
    /// How far the primary is.
    Progress {
        /// The group.
        group: [u8; 16],
        /// The stream; 0 to a copy that does not follow, which takes nothing but the head of it.
        stream: u64,
        /// After its last record.
        head: u64,
        /// Chain at `head`.
        chain: u64,
        /// Up to which it is durable there: the secondary's `committed`.
        durable: u64,
        /// Requests up to `head`.
        requests: u64,
        /// How old the oldest byte is that the secondary has not acknowledged, nanoseconds; all
        /// ones where the primary cannot tell.
        lag: u64,
        /// `sent` of the secondary's last heartbeat, 0 for none: with `held` it tells the secondary
        /// by its own clock how old this message is at most.
        echo: u64,
        /// Nanoseconds between that heartbeat's arrival and this message.
        held: u64,
    },
    /// To a primary that has served nobody since its start: a newer reign begins where the two
    /// histories part, which is the end that was compared; it may follow from there.
    MayFollow {
        /// The group.
        group: [u8; 16],
        /// The end of what both logs have alike.
        head: u64,
        /// The chain there; none where the sender's log no longer reaches it, and the reigns alone
        /// tell.
        chain: Option<u64>,
    },
    /// A part of a call's or an answer's body, which goes on.
    Part {
        /// The call.
        id: u64,
        /// Whether it belongs to the answer.
        answer: bool,
        /// The bytes.
        body: Vec<u8>,
    },
    /// A call, with the last part of its body (JSON).
    Call {
        /// Chosen by the caller.
        id: u64,
        /// What is called.
        method: String,
        /// The last part.
        body: Vec<u8>,
    },
    /// An answer, with the last part of its body (JSON, or a line of text where it failed).
    Answer {
        /// The call.
        id: u64,
        /// Whether it went well.
        ok: bool,
        /// The last part.
        body: Vec<u8>,
    },
    /// The joiner shows that it has the token.
    Pair {
        /// Its name.
        name: String,
        /// Where it can be dialled; empty where it cannot.
        address: String,
        /// HMAC-SHA256 by the secret over the TLS session's exporter.
        proof: [u8; 32],
    },
    /// The inviter answers in kind.
    Paired {
        /// Its name.
        name: String,
        /// Where it can be dialled.
        address: String,
        /// HMAC-SHA256 by the secret over the TLS session's exporter.
        proof: [u8; 32],
    },
    /// The inviter declines; the connection ends.
    PairRefused {
        /// Why, and what to do.
        reason: String,
    },
    /// The primary's log does not reach back to the secondary: an image comes instead, in image
    /// frames of this stream.
    Image {
        /// The group.
        group: [u8; 16],
        /// The number asked with.
        stream: u64,
        /// Where the image is.
        position: WirePosition,
        /// It is what changed since here, the secondary's head; none where it is all of it.
        since: Option<u64>,
        /// What is staged there counts.
        resumed: bool,
        /// Bytes to come, with those that are staged there.
        total_bytes: u64,
        /// Bytes that are staged there.
        done_bytes: u64,
        /// Behind this the secondary's log is not part of the primary's history.
        common: u64,
    },
    /// How much of an image is staged.
    ImageAck {
        /// The group.
        group: [u8; 16],
        /// The stream.
        stream: u64,
        /// Image frames that were staged.
        frames: u64,
        /// Bytes that are staged, those of earlier streams included.
        done_bytes: u64,
    },
    /// A call was not begun.
    Declined {
        /// The call.
        id: u64,
        /// Why.
        reason: String,
    },
}

fn configuration() -> impl bincode::config::Config {
    bincode::config::standard()
        .with_little_endian()
        .with_fixed_int_encoding()
        .with_limit::<PAYLOAD_BYTES_MAX>()
}

impl Message {
    /// The bytes of the message, without a frame around them.
    ///
    /// # Errors
    ///
    /// Where it does not fit a frame.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let bytes = bincode::encode_to_vec(self, configuration())
            .map_err(|error| wrong(format!("message cannot be encoded: {error}")))?;
        if bytes.len() > PAYLOAD_BYTES_MAX {
            return Err(wrong(format!("message of {} bytes does not fit a frame", bytes.len())));
        }
        Ok(bytes)
    }

    /// The bytes of the message as a frame.
    ///
    /// # Errors
    ///
    /// Where it does not fit.
    pub fn to_frame(&self) -> Result<Vec<u8>, WireError> {
        let payload = self.encode()?;
        let mut frame = Vec::with_capacity(FRAME_HEADER_BYTES + payload.len());
        frame.extend_from_slice(&FrameHeader::control(payload.len()).encode());
        frame.extend_from_slice(&payload);
        Ok(frame)
    }

    /// Reads a message that fills `bytes`.
    ///
    /// # Errors
    ///
    /// Where the bytes are no message of version 1, or there are more of them.
    pub fn decode(bytes: &[u8]) -> Result<Message, WireError> {
        if bytes.len() > PAYLOAD_BYTES_MAX {
            return Err(wrong(format!("message of {} bytes is too long", bytes.len())));
        }
        let (message, used) = bincode::decode_from_slice(bytes, configuration())
            .map_err(|error| wrong(format!("message: {error}")))?;
        if used != bytes.len() {
            return Err(wrong(format!("message: {} bytes behind its end", bytes.len() - used)));
        }
        Ok(message)
    }
}

/// What a fuzzer feeds: any bytes, read as hello, frame header and message. What can be read is
/// written again and must be the same bytes.
///
/// # Panics
///
/// Where it is not: that is what the fuzzer looks for.
pub fn fuzz(bytes: &[u8]) {
    if let Some((hello_bytes, rest)) = bytes.split_first_chunk::<HELLO_BYTES>()
        && let Ok(hello) = Hello::decode(hello_bytes)
    {
        assert_eq!(Hello::decode(&hello.encode()).as_ref(), Ok(&hello));
        fuzz_frames(rest);
    }
    fuzz_frames(bytes);
}

fn fuzz_frames(mut bytes: &[u8]) {
    while let Some((header_bytes, rest)) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>() {
        let Ok(header) = FrameHeader::decode(header_bytes) else { return };
        assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
        let Some((payload, rest)) = rest.split_at_checked(header.payload_bytes as usize) else {
            return;
        };
        if header.kind == FrameKind::Control
            && let Ok(message) = Message::decode(payload)
        {
            assert_eq!(message.encode().as_deref(), Ok(payload));
        }
        if header.kind == FrameKind::Image
            && let Ok(part) = part::decode_part(&bytes::Bytes::copy_from_slice(payload))
        {
            let mut again = bytes::BytesMut::new();
            part::encode_part(&part, &mut again);
            assert_eq!(again, payload);
        }
        bytes = rest;
    }
}

pub mod part;
#[cfg(test)]
mod tests;
