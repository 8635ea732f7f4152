//! The NBD protocol's bytes: constants, fixed layouts and their codec, and nothing that decides.
//!
//! All integers are big-endian. Every fixed part is a struct whose size and offsets are asserted
//! below, against this table (offset, bytes, field):
//!
//! | struct | layout |
//! | --- | --- |
//! | [`Greeting`], server | 0 8 `NBDMAGIC`; 8 8 `IHAVEOPT`; 16 2 handshake flags |
//! | client flags | 0 4 flags |
//! | [`OptionHeader`], client | 0 8 `IHAVEOPT`; 8 4 option; 12 4 length of the data that follow |
//! | [`OptionReplyHeader`], server | 0 8 magic; 8 4 option; 12 4 reply type; 16 4 length of the data that follow |
//! | [`ExportNameReply`], server | 0 8 size; 8 2 transmission flags; then 124 zeros unless agreed otherwise |
//! | [`InfoExport`], server | 0 2 type 0; 2 8 size; 10 2 transmission flags |
//! | [`InfoBlockSize`], server | 0 2 type 3; 2 4 minimum; 6 4 preferred; 10 4 maximum payload |
//! | [`RequestHeader`], client | 0 4 magic; 4 2 flags; 6 2 command; 8 8 cookie; 16 8 offset; 24 4 length; a WRITE's payload follows |
//! | [`SimpleReply`], server | 0 4 magic; 4 4 error; 8 8 cookie; a successful READ's data follow |
//! | [`ChunkHeader`], server | 0 4 magic; 4 2 flags; 6 2 type; 8 8 cookie; 16 4 length of the payload that follows |
//! | [`ErrorPayload`], server | 0 4 error; 4 2 length of the text that follows |
//! | [`HolePayload`], server | 0 8 offset; 8 4 length |
//! | [`StatusDescriptor`], server | 0 4 length; 4 4 status flags |

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First magic of the greeting: `NBDMAGIC`.
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second magic of the greeting and of every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Magic of a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Bytes of zeros behind an [`ExportNameReply`] for a client that did not do without.
pub const EXPORT_NAME_PADDING_BYTES: usize = 124;
/// Bytes of a name or text at most.
pub const STRING_BYTES_MAX: usize = 4096;
/// Bytes of payload of a READ or a WRITE at most; what clients may assume without asking.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Smallest unit that a request may address.
pub const BLOCK_BYTES_MIN: u32 = 1;
/// Smallest unit that is written without reading first.
pub const BLOCK_BYTES_PREFERRED: u32 = 4096;

/// Handshake flags, from the server; the client's flags have the same two bits.
pub mod handshake_flag {
    /// Options may be answered with errors.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The 124 zeros behind an `EXPORT_NAME` reply can be left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Transmission flags: what an export can do.
pub mod export_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The FUA flag is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The DF flag is understood (structured replies only).
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers what all connections were answered.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The FAST_ZERO flag is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Options of the handshake.
pub mod option {
    /// Choose an export and begin; no errors can be told.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Go over to TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Choose an export and begin.
    pub const GO: u32 = 7;
    /// Answer in chunks from now on.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Types of replies to options.
pub mod option_reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export's name.
    pub const SERVER: u32 = 2;
    /// One piece of information about an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// The option is unknown.
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    /// The option is known and forbidden.
    pub const ERR_POLICY: u32 = ERROR_BIT | 2;
    /// The option's data make no sense.
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
    /// The server is on its way down.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT | 7;
    /// The option's data are too large.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT | 9;
}

/// Types of information about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The name as the server would list it.
    pub const NAME: u16 = 1;
    /// A line for people.
    pub const DESCRIPTION: u16 = 2;
    /// Constraints on sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Commands of the transmission phase.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Finish and disconnect; has no reply.
    pub const DISC: u16 = 2;
    /// Make durable what was answered.
    pub const FLUSH: u16 = 3;
    /// A range is no longer needed.
    pub const TRIM: u16 = 4;
    /// A range will be read soon.
    pub const CACHE: u16 = 5;
    /// A range reads as zeros from now on.
    pub const WRITE_ZEROES: u16 = 6;
    /// What does a range hold.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a command.
pub mod command_flag {
    /// Durable when answered.
    pub const FUA: u16 = 1 << 0;
    /// Keep the space (WRITE_ZEROES).
    pub const NO_HOLE: u16 = 1 << 1;
    /// One chunk of content at most (READ).
    pub const DF: u16 = 1 << 2;
    /// One descriptor (BLOCK_STATUS).
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail rather than be slow (WRITE_ZEROES).
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Types of chunks.
pub mod chunk {
    /// Nothing but the end.
    pub const NONE: u16 = 0;
    /// Offset and bytes.
    pub const OFFSET_DATA: u16 = 1;
    /// Offset and length of zeros.
    pub const OFFSET_HOLE: u16 = 2;
    /// A context's number and descriptors.
    pub const BLOCK_STATUS: u16 = 5;
    /// Set in every error.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// An error with its text.
    pub const ERROR: u16 = ERROR_BIT | 1;
    /// An error with its text and offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
    /// Flag of the last chunk of a reply.
    pub const FLAG_DONE: u16 = 1 << 0;
}

/// Status flags of `base:allocation`.
pub mod allocation {
    /// Takes no space.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeros.
    pub const ZERO: u32 = 1 << 1;
    /// The context's name.
    pub const NAME: &str = "base:allocation";
    /// The context's number on every connection of this server.
    pub const CONTEXT: u32 = 1;
}

/// An error as a client is told it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Operation not permitted.
    Eperm = 1,
    /// Input/output error.
    Eio = 5,
    /// Cannot allocate memory.
    Enomem = 12,
    /// Invalid argument.
    Einval = 22,
    /// No space left on the device.
    Enospc = 28,
    /// Value too large.
    Eoverflow = 75,
    /// Not supported.
    Enotsup = 95,
    /// The server is on its way down.
    Eshutdown = 108,
}

impl Errno {
    /// The number on the wire.
    #[must_use]
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// What a number on the wire means; anything unknown counts as invalid, as the protocol asks.
    #[must_use]
    pub const fn from_code(code: u32) -> Errno {
        match code {
            1 => Errno::Eperm,
            5 => Errno::Eio,
            12 => Errno::Enomem,
            28 => Errno::Enospc,
            75 => Errno::Eoverflow,
            95 => Errno::Enotsup,
            108 => Errno::Eshutdown,
            _ => Errno::Einval,
        }
    }
}

/// Declares a fixed layout: bytes in, bytes out, no padding.
macro_rules! layout {
    ($(#[$doc:meta])* $name:ident, $bytes:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty = $offset:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type),+ }

        impl $name {
            /// Bytes on the wire.
            pub const BYTES: usize = $bytes;
        }

        const _: () = {
            assert!(size_of::<$name>() == $bytes);
            assert!(align_of::<$name>() == 1);
            $(assert!(std::mem::offset_of!($name, $field) == $offset);)+
        };
    };
}

layout! {
    /// What the server says first.
    Greeting, 18 {
        /// [`GREETING_MAGIC`].
        magic: U64 = 0,
        /// [`OPTION_MAGIC`].
        option_magic: U64 = 8,
        /// [`handshake_flag`]s.
        flags: U16 = 16,
    }
}

layout! {
    /// Before an option's data.
    OptionHeader, 16 {
        /// [`OPTION_MAGIC`].
        magic: U64 = 0,
        /// An [`option`].
        option: U32 = 8,
        /// Bytes of data that follow.
        length: U32 = 12,
    }
}

layout! {
    /// Before the data of a reply to an option.
    OptionReplyHeader, 20 {
        /// [`OPTION_REPLY_MAGIC`].
        magic: U64 = 0,
        /// The option that is answered.
        option: U32 = 8,
        /// An [`option_reply`].
        reply: U32 = 12,
        /// Bytes of data that follow.
        length: U32 = 16,
    }
}

layout! {
    /// The answer to `EXPORT_NAME`.
    ExportNameReply, 10 {
        /// Bytes of the export.
        size_bytes: U64 = 0,
        /// [`export_flag`]s.
        flags: U16 = 8,
    }
}

layout! {
    /// Information on an export's size and abilities.
    InfoExport, 12 {
        /// [`info::EXPORT`].
        kind: U16 = 0,
        /// Bytes of the export.
        size_bytes: U64 = 2,
        /// [`export_flag`]s.
        flags: U16 = 10,
    }
}

layout! {
    /// Information on an export's size constraints.
    InfoBlockSize, 14 {
        /// [`info::BLOCK_SIZE`].
        kind: U16 = 0,
        /// Bytes that offset and length must be multiples of.
        minimum: U32 = 2,
        /// Bytes that they should be multiples of.
        preferred: U32 = 6,
        /// Bytes of payload at most.
        payload_max: U32 = 10,
    }
}

layout! {
    /// A request.
    RequestHeader, 28 {
        /// [`REQUEST_MAGIC`].
        magic: U32 = 0,
        /// [`command_flag`]s.
        flags: U16 = 4,
        /// A [`command`].
        command: U16 = 6,
        /// The client's mark, returned in the reply.
        cookie: U64 = 8,
        /// First byte.
        offset: U64 = 16,
        /// Bytes.
        length: U32 = 24,
    }
}

layout! {
    /// A reply without structure.
    SimpleReply, 16 {
        /// [`SIMPLE_REPLY_MAGIC`].
        magic: U32 = 0,
        /// Zero, or an [`Errno`].
        error: U32 = 4,
        /// The request's mark.
        cookie: U64 = 8,
    }
}

layout! {
    /// One chunk of a structured reply.
    ChunkHeader, 20 {
        /// [`CHUNK_MAGIC`].
        magic: U32 = 0,
        /// [`chunk::FLAG_DONE`] on the last.
        flags: U16 = 4,
        /// A [`chunk`].
        kind: U16 = 6,
        /// The request's mark.
        cookie: U64 = 8,
        /// Bytes of payload that follow.
        length: U32 = 16,
    }
}

layout! {
    /// Begins an error chunk's payload.
    ErrorPayload, 6 {
        /// An [`Errno`].
        error: U32 = 0,
        /// Bytes of text that follow.
        text_bytes: U16 = 4,
    }
}

layout! {
    /// The payload of a hole chunk.
    HolePayload, 12 {
        /// First byte.
        offset: U64 = 0,
        /// Bytes of zeros.
        length: U32 = 8,
    }
}

layout! {
    /// One run of a block status chunk.
    StatusDescriptor, 8 {
        /// Bytes of the run.
        length: U32 = 0,
        /// [`allocation`] flags.
        flags: U32 = 4,
    }
}

/// Bytes before the data of an [`chunk::OFFSET_DATA`] chunk: its header and the offset.
pub const DATA_CHUNK_PREFIX_BYTES: usize = ChunkHeader::BYTES + 8;

/// The greeting of this server.
#[must_use]
pub fn greeting() -> Greeting {
    Greeting {
        magic: U64::new(GREETING_MAGIC),
        option_magic: U64::new(OPTION_MAGIC),
        flags: U16::new(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES),
    }
}

/// An option with its data, as a client sends it.
pub fn put_option(out: &mut Vec<u8>, option: u32, data: &[u8]) {
    let header = OptionHeader {
        magic: U64::new(OPTION_MAGIC),
        option: U32::new(option),
        length: U32::new(u32::try_from(data.len()).expect("options are small")),
    };
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(data);
}

/// A reply to an option, in parts that are put one behind the other.
pub fn put_option_reply(out: &mut Vec<u8>, option: u32, reply: u32, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let header = OptionReplyHeader {
        magic: U64::new(OPTION_REPLY_MAGIC),
        option: U32::new(option),
        reply: U32::new(reply),
        length: U32::new(u32::try_from(length).expect("option replies are small")),
    };
    out.extend_from_slice(header.as_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// A request without its payload.
#[must_use]
pub fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> RequestHeader {
    RequestHeader {
        magic: U32::new(REQUEST_MAGIC),
        flags: U16::new(flags),
        command: U16::new(command),
        cookie: U64::new(cookie),
        offset: U64::new(offset),
        length: U32::new(length),
    }
}

/// A simple reply; `None` is success.
#[must_use]
pub fn simple_reply(cookie: u64, error: Option<Errno>) -> SimpleReply {
    SimpleReply {
        magic: U32::new(SIMPLE_REPLY_MAGIC),
        error: U32::new(error.map_or(0, Errno::code)),
        cookie: U64::new(cookie),
    }
}

/// A chunk's header; `done` on the last chunk of a reply.
#[must_use]
pub fn chunk_header(cookie: u64, kind: u16, done: bool, payload_bytes: usize) -> ChunkHeader {
    ChunkHeader {
        magic: U32::new(CHUNK_MAGIC),
        flags: U16::new(if done { chunk::FLAG_DONE } else { 0 }),
        kind: U16::new(kind),
        cookie: U64::new(cookie),
        length: U32::new(u32::try_from(payload_bytes).expect("chunks are below 4 GiB")),
    }
}

/// The whole reply of a request that failed, as an error chunk that ends it.
pub fn put_error_chunk(out: &mut Vec<u8>, cookie: u64, error: Errno, text: &str) {
    let text = cut(text, STRING_BYTES_MAX).as_bytes();
    let payload = ErrorPayload {
        error: U32::new(error.code()),
        text_bytes: U16::new(u16::try_from(text.len()).expect("at most 4096")),
    };
    let bytes = ErrorPayload::BYTES + text.len();
    out.extend_from_slice(chunk_header(cookie, chunk::ERROR, true, bytes).as_bytes());
    out.extend_from_slice(payload.as_bytes());
    out.extend_from_slice(text);
}

/// The beginning of a text, at most `bytes` long, cut between characters.
#[must_use]
pub fn cut(text: &str, bytes: usize) -> &str {
    let mut end = text.len().min(bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lays parts out as one string, so that a golden value can be commented field by field.
    fn golden(parts: &[&[u8]]) -> Vec<u8> {
        parts.concat()
    }

    #[test]
    fn the_greeting_has_these_bytes() {
        let expected = golden(&[b"NBDMAGIC", b"IHAVEOPT", &[0, 3]]);
        assert_eq!(greeting().as_bytes(), expected);
    }

    #[test]
    fn an_option_and_its_reply_have_these_bytes() {
        let mut out = Vec::new();
        put_option(&mut out, option::GO, b"abc");
        assert_eq!(out, golden(&[b"IHAVEOPT", &[0, 0, 0, 7], &[0, 0, 0, 3], b"abc"]));
        out.clear();
        put_option_reply(&mut out, option::LIST, option_reply::ERR_POLICY, &[b"n", b"o"]);
        let expected = golden(&[
            &[0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9], // magic
            &[0, 0, 0, 3],                                     // option
            &[0x80, 0, 0, 2],                                  // reply type
            &[0, 0, 0, 2],                                     // length
            b"no",
        ]);
        assert_eq!(out, expected);
    }

    #[test]
    fn a_request_has_these_bytes_and_reads_back() {
        let header = request(command::WRITE_ZEROES, command_flag::FUA, 0x0102_0304, 4096, 512);
        let expected = golden(&[
            &[0x25, 0x60, 0x95, 0x13],    // magic
            &[0, 1],                      // flags
            &[0, 6],                      // command
            &[0, 0, 0, 0, 1, 2, 3, 4],    // cookie
            &[0, 0, 0, 0, 0, 0, 0x10, 0], // offset
            &[0, 0, 2, 0],                // length
        ]);
        assert_eq!(header.as_bytes(), expected);
        assert_eq!(RequestHeader::read_from_bytes(&expected).unwrap(), header);
    }

    #[test]
    fn replies_have_these_bytes() {
        let expected = golden(&[
            &[0x67, 0x44, 0x66, 0x98], // magic
            &[0, 0, 0, 28],            // ENOSPC
            &[0, 0, 0, 0, 0, 0, 0, 9], // cookie
        ]);
        assert_eq!(simple_reply(9, Some(Errno::Enospc)).as_bytes(), expected);

        let expected = golden(&[
            &[0x66, 0x8e, 0x33, 0xef], // magic
            &[0, 1],                   // flags: done
            &[0, 1],                   // type: offset and data
            &[0, 0, 0, 0, 0, 0, 0, 9], // cookie
            &[0, 0, 2, 8],             // length
        ]);
        assert_eq!(chunk_header(9, chunk::OFFSET_DATA, true, 520).as_bytes(), expected);

        let mut out = Vec::new();
        put_error_chunk(&mut out, 9, Errno::Eperm, "no");
        let expected = golden(&[
            &[0x66, 0x8e, 0x33, 0xef], // magic
            &[0, 1],                   // flags: done
            &[0x80, 1],                // type: error
            &[0, 0, 0, 0, 0, 0, 0, 9], // cookie
            &[0, 0, 0, 8],             // length
            &[0, 0, 0, 1],             // EPERM
            &[0, 2],                   // bytes of text
            b"no",
        ]);
        assert_eq!(out, expected);
    }

    #[test]
    fn information_has_these_bytes() {
        let export = InfoExport {
            kind: U16::new(info::EXPORT),
            size_bytes: U64::new(1 << 40),
            flags: U16::new(export_flag::HAS_FLAGS | export_flag::CAN_MULTI_CONN),
        };
        let expected = golden(&[&[0, 0], &[0, 0, 1, 0, 0, 0, 0, 0], &[1, 1]]);
        assert_eq!(export.as_bytes(), expected);
        let sizes = InfoBlockSize {
            kind: U16::new(info::BLOCK_SIZE),
            minimum: U32::new(BLOCK_BYTES_MIN),
            preferred: U32::new(BLOCK_BYTES_PREFERRED),
            payload_max: U32::new(PAYLOAD_BYTES_MAX),
        };
        let expected = golden(&[&[0, 3], &[0, 0, 0, 1], &[0, 0, 0x10, 0], &[2, 0, 0, 0]]);
        assert_eq!(sizes.as_bytes(), expected);
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let mut out = Vec::new();
        put_error_chunk(&mut out, 0, Errno::Eio, &"ä".repeat(3000));
        assert!(std::str::from_utf8(&out[ChunkHeader::BYTES + ErrorPayload::BYTES..]).is_ok());
        assert_eq!(out.len(), ChunkHeader::BYTES + ErrorPayload::BYTES + STRING_BYTES_MAX);
    }

    #[test]
    fn every_error_reads_back() {
        for error in [
            Errno::Eperm,
            Errno::Eio,
            Errno::Enomem,
            Errno::Einval,
            Errno::Enospc,
            Errno::Eoverflow,
            Errno::Enotsup,
            Errno::Eshutdown,
        ] {
            assert_eq!(Errno::from_code(error.code()), error);
        }
        assert_eq!(Errno::from_code(9999), Errno::Einval);
    }
}
