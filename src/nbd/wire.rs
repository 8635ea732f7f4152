//! The NBD protocol's bytes: fixed layouts and their codec, and nothing that decides.
//!
//! All integers are big-endian. Every fixed part is a struct whose size and offsets are asserted
//! below, against this table (offset, bytes, field):
//!
//! | struct, sent by | layout |
//! | --- | --- |
//! | [`Greeting`], server | 0 8 `NBDMAGIC`; 8 8 `IHAVEOPT`; 16 2 handshake flags |
//! | client flags | 0 4 flags |
//! | [`OptionHeader`], client | 0 8 `IHAVEOPT`; 8 4 option; 12 4 length of data |
//! | [`OptionReplyHeader`], server | 0 8 magic; 8 4 option; 12 4 type; 16 4 length of data |
//! | [`ExportNameReply`], server | 0 8 size; 8 2 export flags; 124 zeros, if not agreed away |
//! | [`InfoExport`], server | 0 2 type 0; 2 8 size; 10 2 export flags |
//! | [`InfoBlockSize`], server | 0 2 type 3; 2 4 minimum; 6 4 preferred; 10 4 maximum payload |
//! | [`RequestHeader`], client | 0 4 magic; 4 2 flags; 6 2 command; 8 8 cookie; 16 8 offset; |
//! | | 24 4 length; a WRITE's payload |
//! | [`SimpleReply`], server | 0 4 magic; 4 4 error; 8 8 cookie; a successful READ's data |
//! | [`ChunkHeader`], server | 0 4 magic; 4 2 flags; 6 2 type; 8 8 cookie; 16 4 length; payload |
//! | [`ErrorPayload`], server | 0 4 error; 4 2 length of the text that follows |
//! | [`HolePayload`], server | 0 8 offset; 8 4 length |
//! | [`StatusDescriptor`], server | 0 4 length; 4 4 status flags |

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use super::numbers::{
    BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, CHUNK_MAGIC, EXPORT_NAME_PADDING_BYTES, Errno,
    GREETING_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, PAYLOAD_BYTES_MAX, REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC, STRING_BYTES_MAX, allocation, chunk, command, command_flag, export_flag,
    handshake_flag, info, option, option_reply,
};

/// Declares a fixed layout: bytes in, bytes out, no padding.
macro_rules! layout {
    ($(#[$doc:meta])* $name:ident, $bytes:literal {
        $($(#[$field_doc:meta])* $field:ident: $type:ty = $offset:literal),+ $(,)?
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
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
}
