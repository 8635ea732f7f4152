//! What is agreed before the first request: options in, replies out, one at a time, without any
//! I/O.
//!
//! A client may send any option in any order, known or not; each is answered and the stream stays
//! in step, because its length is known before its meaning. What would cost memory or time without
//! bound is cut off by the limits below.

use std::sync::Arc;

use zerocopy::IntoBytes;
use zerocopy::big_endian::{U16, U32, U64};

use super::export::{Device, ExportInfo, Exports, Refusal};
use super::keepers::KeeperId;
use super::wire::{
    self, EXPORT_NAME_PADDING_BYTES, ExportNameReply, InfoBlockSize, InfoExport, STRING_BYTES_MAX,
    allocation, handshake_flag, info, option, option_reply, put_option_reply,
};

/// Options that a client may send before it is taken for a flood.
pub const OPTIONS_MAX: u32 = 256;
/// Bytes of data of an option that are looked at; more are read past and refused.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Queries of a metadata context option at most.
const QUERIES_MAX: u32 = 128;

/// What both sides agreed on.
pub struct Agreed {
    /// The export.
    pub device: Arc<dyn Device>,
    /// What it was when it was chosen.
    pub info: ExportInfo,
    /// READ is answered in chunks.
    pub structured_replies: bool,
    /// BLOCK_STATUS tells `base:allocation`.
    pub allocation: bool,
    /// What the host calls itself, where it did.
    pub keeper: Option<KeeperId>,
}

/// How the handshake goes on after an option.
pub enum Step {
    /// With the next option.
    Continue,
    /// The replies are sent and the connection ends, for this reason.
    Close(&'static str),
    /// The replies are sent and requests follow.
    Transmit(Agreed),
}

/// A handshake under way.
pub struct Handshake<'a> {
    exports: &'a dyn Exports,
    no_zeroes: bool,
    structured_replies: bool,
    /// The export for which `base:allocation` was selected.
    allocation_of: Option<Vec<u8>>,
    keeper: Option<KeeperId>,
    options: u32,
}

impl<'a> Handshake<'a> {
    /// A handshake that follows the greeting; `client_flags` as the client sent them.
    pub fn new(exports: &'a dyn Exports, client_flags: u32) -> Result<Handshake<'a>, &'static str> {
        let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        if client_flags & !known != 0 {
            return Err("the client set a handshake flag that was not offered");
        }
        let no_zeroes = client_flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        Ok(Handshake {
            exports,
            no_zeroes,
            structured_replies: false,
            allocation_of: None,
            keeper: None,
            options: 0,
        })
    }

    /// Answers one option. `data` is `None` where there was more than [`OPTION_BYTES_MAX`].
    pub fn on_option(&mut self, option: u32, data: Option<&[u8]>, out: &mut Vec<u8>) -> Step {
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return Step::Close("too many options");
        }
        let Some(data) = data else {
            if option == option::EXPORT_NAME {
                return Step::Close("an export name is longer than 4096 bytes");
            }
            put_option_reply(out, option, option_reply::ERR_TOO_BIG, &[b"more than 64 KiB"]);
            return Step::Continue;
        };
        match option {
            option::EXPORT_NAME => return self.on_export_name(data, out),
            option::ABORT => {
                put_option_reply(out, option, option_reply::ACK, &[]);
                return Step::Close("the client ended the handshake");
            }
            option::LIST => self.on_list(data, out),
            option::INFO | option::GO => {
                if let Some(agreed) = self.on_info(option, data, out) {
                    return Step::Transmit(agreed);
                }
            }
            option::STRUCTURED_REPLY => {
                if data.is_empty() {
                    self.structured_replies = true;
                    put_option_reply(out, option, option_reply::ACK, &[]);
                } else {
                    refuse(out, option, option_reply::ERR_INVALID, "this option has no data");
                }
            }
            option::KEEPER => match data.try_into() {
                Ok(keeper) => {
                    self.keeper = Some(keeper);
                    put_option_reply(out, option, option_reply::ACK, &[]);
                }
                Err(_) => {
                    refuse(out, option, option_reply::ERR_INVALID, "a keeper has 16 bytes");
                }
            },
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.on_meta_context(option, data, out);
            }
            _ => refuse(out, option, option_reply::ERR_UNSUP, "this option is not supported"),
        }
        Step::Continue
    }

    /// EXPORT_NAME cannot tell an error: the connection ends instead.
    fn on_export_name(&mut self, data: &[u8], out: &mut Vec<u8>) -> Step {
        let Ok(name) = name_of(data) else {
            return Step::Close("an export name is not UTF-8 or too long");
        };
        let Ok(device) = self.exports.open(name) else {
            return Step::Close("the client chose an export that is not served");
        };
        let agreed = self.agree(device, data);
        let reply = ExportNameReply {
            size_bytes: U64::new(agreed.info.size_bytes),
            flags: U16::new(agreed.info.flags(self.structured_replies)),
        };
        out.extend_from_slice(reply.as_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; EXPORT_NAME_PADDING_BYTES]);
        }
        Step::Transmit(agreed)
    }

    fn on_list(&self, data: &[u8], out: &mut Vec<u8>) {
        if !data.is_empty() {
            return refuse(out, option::LIST, option_reply::ERR_INVALID, "LIST has no data");
        }
        for export in self.exports.list() {
            let name = wire::cut(&export.name, STRING_BYTES_MAX).as_bytes();
            let length = U32::new(u32::try_from(name.len()).expect("at most 4096"));
            let description = wire::cut(&export.description, STRING_BYTES_MAX).as_bytes();
            put_option_reply(
                out,
                option::LIST,
                option_reply::SERVER,
                &[length.as_bytes(), name, description],
            );
        }
        put_option_reply(out, option::LIST, option_reply::ACK, &[]);
    }

    /// INFO and GO; what was agreed where it was GO and it succeeded.
    fn on_info(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Option<Agreed> {
        let Some((name, wanted)) = parse_info(data) else {
            refuse(out, option, option_reply::ERR_INVALID, "the option's lengths do not agree");
            return None;
        };
        let device = match self.open(name) {
            Ok(device) => device,
            Err((reply, text)) => {
                refuse(out, option, reply, &text);
                return None;
            }
        };
        let agreed = self.agree(device, name);
        let export = InfoExport {
            kind: U16::new(info::EXPORT),
            size_bytes: U64::new(agreed.info.size_bytes),
            flags: U16::new(agreed.info.flags(self.structured_replies)),
        };
        put_option_reply(out, option, option_reply::INFO, &[export.as_bytes()]);
        for kind in [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE] {
            if !wanted.contains(&kind) {
                continue;
            }
            let number = U16::new(kind);
            let sizes = InfoBlockSize {
                kind: number,
                minimum: U32::new(wire::BLOCK_BYTES_MIN),
                preferred: U32::new(wire::BLOCK_BYTES_PREFERRED),
                payload_max: U32::new(wire::PAYLOAD_BYTES_MAX),
            };
            let parts: &[&[u8]] = match kind {
                info::NAME => &[number.as_bytes(), agreed.info.name.as_bytes()],
                info::DESCRIPTION => &[number.as_bytes(), agreed.info.description.as_bytes()],
                _ => &[sizes.as_bytes()],
            };
            put_option_reply(out, option, option_reply::INFO, parts);
        }
        put_option_reply(out, option, option_reply::ACK, &[]);
        (option == option::GO).then_some(agreed)
    }

    fn on_meta_context(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) {
        let setting = option == option::SET_META_CONTEXT;
        if setting {
            // Even a failed attempt forgets the earlier selection.
            self.allocation_of = None;
        }
        if !self.structured_replies {
            let text = "structured replies must be agreed on first";
            return refuse(out, option, option_reply::ERR_INVALID, text);
        }
        let Some((name, queries)) = parse_meta_context(data) else {
            let text = "the option's lengths do not agree";
            return refuse(out, option, option_reply::ERR_INVALID, text);
        };
        let Some(queries) = queries else {
            let text = "more than 128 queries";
            return refuse(out, option, option_reply::ERR_TOO_BIG, text);
        };
        if let Err((reply, text)) = self.open(name) {
            return refuse(out, option, reply, &text);
        }
        let named = queries.contains(&allocation::NAME.as_bytes());
        // An empty list asks for everything, `base:` for everything of that kind; neither selects.
        let listed = queries.is_empty() || queries.contains(&b"base:".as_slice());
        if named || (!setting && listed) {
            let number = U32::new(if setting { allocation::CONTEXT } else { 0 });
            put_option_reply(
                out,
                option,
                option_reply::META_CONTEXT,
                &[number.as_bytes(), allocation::NAME.as_bytes()],
            );
        }
        if setting && named {
            self.allocation_of = Some(name.to_vec());
        }
        put_option_reply(out, option, option_reply::ACK, &[]);
    }

    fn open(&self, name: &[u8]) -> Result<Arc<dyn Device>, (u32, String)> {
        let name = name_of(name)?;
        self.exports.open(name).map_err(|refusal| match refusal {
            Refusal::Unknown(text) => (option_reply::ERR_UNKNOWN, text),
            Refusal::Policy(text) => (option_reply::ERR_POLICY, text),
            Refusal::Shutdown => {
                (option_reply::ERR_SHUTDOWN, "this node is shutting down".to_owned())
            }
        })
    }

    fn agree(&self, device: Arc<dyn Device>, name: &[u8]) -> Agreed {
        Agreed {
            info: device.info(),
            device,
            structured_replies: self.structured_replies,
            keeper: self.keeper,
            allocation: self.structured_replies && self.allocation_of.as_deref() == Some(name),
        }
    }
}

/// Answers an option with an error and a text for people.
fn refuse(out: &mut Vec<u8>, option: u32, reply: u32, text: &str) {
    put_option_reply(out, option, reply, &[wire::cut(text, STRING_BYTES_MAX).as_bytes()]);
}

fn name_of(data: &[u8]) -> Result<&str, (u32, String)> {
    if data.len() > STRING_BYTES_MAX {
        return Err((option_reply::ERR_TOO_BIG, "a name is longer than 4096 bytes".to_owned()));
    }
    std::str::from_utf8(data)
        .map_err(|_| (option_reply::ERR_INVALID, "a name is not UTF-8".to_owned()))
}

/// Takes `count` bytes off the front.
fn take<'d>(data: &mut &'d [u8], count: usize) -> Option<&'d [u8]> {
    let (head, tail) = data.split_at_checked(count)?;
    *data = tail;
    Some(head)
}

fn take_u16(data: &mut &[u8]) -> Option<u16> {
    take(data, 2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
}

fn take_u32(data: &mut &[u8]) -> Option<u32> {
    take(data, 4).map(|bytes| u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// A string behind its 32-bit length.
fn take_string<'d>(data: &mut &'d [u8]) -> Option<&'d [u8]> {
    let length = take_u32(data)?;
    take(data, usize::try_from(length).ok()?)
}

/// Name and wanted information of INFO and GO.
fn parse_info(mut data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let name = take_string(&mut data)?;
    let count = take_u16(&mut data)?;
    if data.len() != usize::from(count) * 2 {
        return None;
    }
    let wanted = std::iter::from_fn(|| take_u16(&mut data)).collect();
    Some((name, wanted))
}

/// The queries of a metadata context option, where there are not too many.
type Queries<'a> = Option<Vec<&'a [u8]>>;

/// Name and queries of a metadata context option; the queries are `None` where there are too many.
fn parse_meta_context(mut data: &[u8]) -> Option<(&[u8], Queries<'_>)> {
    let name = take_string(&mut data)?;
    let count = take_u32(&mut data)?;
    if count > QUERIES_MAX {
        return Some((name, None));
    }
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(take_string(&mut data)?);
    }
    data.is_empty().then_some((name, Some(queries)))
}
