//! The numbers of the NBD protocol: magics, limits, options, commands, flags and errors, by name.

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
    /// Tidelog's own: the host names itself by 16 bytes, so that its next connection to the same
    /// export ends this one first. Other servers answer that they do not know it.
    pub const KEEPER: u32 = 0x5449_444b;
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

#[cfg(test)]
mod tests {
    use super::*;

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
