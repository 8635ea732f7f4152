//! A small NBD client: one connection, one request at a time. The demo, the tests and `attach` use
//! it; it believes nothing that a server says without checking it.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

use super::address::NbdAddress;
use super::listener::connect;
use super::socket::{Socket, Stream, send_all};
use super::wire::{
    self, CHUNK_MAGIC, ChunkHeader, Errno, ErrorPayload, GREETING_MAGIC, Greeting, HolePayload,
    InfoExport, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionReplyHeader, PAYLOAD_BYTES_MAX,
    SIMPLE_REPLY_MAGIC, SimpleReply, StatusDescriptor, allocation, chunk, command, command_flag,
    handshake_flag, info, option, option_reply,
};
use crate::group::{Allocation, Extent};

/// Bytes of a reply to an option that are believed.
const OPTION_REPLY_BYTES_MAX: u32 = 64 << 10;
/// Bytes of a block status chunk that are believed: 2^20 descriptors.
const STATUS_BYTES_MAX: u32 = 4 + (8 << 20);

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection failed.
    #[error("nbd server {address}: {cause}")]
    Io {
        /// The server.
        address: String,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The server refused the export or an option.
    #[error("nbd export `{name}`: refused by the server: {text}")]
    Refused {
        /// The export asked for.
        name: String,
        /// What the server said.
        text: String,
    },
    /// The server answered a request with an error.
    #[error("nbd request: {errno:?}: {text}")]
    Request {
        /// The error.
        errno: Errno,
        /// What the server said, where it said something.
        text: String,
    },
    /// The server broke the protocol.
    #[error("nbd server: broke the protocol: {0}")]
    Protocol(&'static str),
}

/// A connection to an export.
pub struct Client<S = Stream> {
    socket: S,
    address: String,
    size_bytes: u64,
    flags: u16,
    structured_replies: bool,
    allocation: bool,
    cookie: u64,
}

impl Client<Stream> {
    /// Connects to an export. The empty name is the server's default.
    pub fn connect(address: &NbdAddress, name: &str) -> Result<Client, ClientError> {
        let stream = connect(address)
            .map_err(|cause| ClientError::Io { address: address.to_string(), cause })?;
        Client::over(stream, &address.to_string(), name)
    }

    /// The exports of a server, by name.
    pub fn list(address: &NbdAddress) -> Result<Vec<String>, ClientError> {
        let failed = |cause| ClientError::Io { address: address.to_string(), cause };
        let mut client = Client::bare(connect(address).map_err(failed)?, &address.to_string());
        client.greet()?;
        client.send_option(option::LIST, &[])?;
        let mut names = Vec::new();
        loop {
            let (reply, data) = client.option_reply(option::LIST)?;
            match reply {
                option_reply::SERVER => {
                    let (length, rest) = U32::read_from_prefix(&data)
                        .map_err(|_| ClientError::Protocol("a listed name has no length"))?;
                    let name = usize::try_from(length.get()).ok().and_then(|end| rest.get(..end));
                    let name = name.ok_or(ClientError::Protocol("a listed name is cut off"))?;
                    names.push(String::from_utf8_lossy(name).into_owned());
                }
                option_reply::ACK => break,
                _ => return Err(client.refused("", &data)),
            }
        }
        client.send_option(option::ABORT, &[])?;
        Ok(names)
    }

    /// Bounds the wait for each reply; `None` waits for ever.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_receive_timeout(timeout)
    }

    /// The connected socket, for the kernel to go on with.
    pub fn into_socket(self) -> io::Result<OwnedFd> {
        self.socket.as_fd().try_clone_to_owned()
    }
}

impl<S: Socket> Client<S> {
    /// Agrees on an export over a connected socket.
    pub fn over(socket: S, address: &str, name: &str) -> Result<Client<S>, ClientError> {
        let mut client = Client::bare(socket, address);
        client.greet()?;
        client.send_option(option::STRUCTURED_REPLY, &[])?;
        client.structured_replies =
            client.option_reply(option::STRUCTURED_REPLY)?.0 == option_reply::ACK;
        if client.structured_replies {
            client.select_allocation(name)?;
        }
        client.go(name)?;
        Ok(client)
    }

    pub(super) fn bare(socket: S, address: &str) -> Client<S> {
        Client {
            socket,
            address: address.to_owned(),
            size_bytes: 0,
            flags: 0,
            structured_replies: false,
            allocation: false,
            cookie: 0,
        }
    }

    /// Bytes of the export.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The export's [`wire::export_flag`]s.
    pub fn flags(&self) -> u16 {
        self.flags
    }

    /// Whether the export refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.flags & wire::export_flag::READ_ONLY != 0
    }

    /// Fills `buffer` from `offset`.
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), ClientError> {
        let mut at = offset;
        for part in buffer.chunks_mut(PAYLOAD_BYTES_MAX as usize) {
            let length = u32::try_from(part.len()).expect("32 MiB at most");
            let cookie = self.send_request(command::READ, 0, at, length, &[])?;
            let mut filled = 0;
            let mut target = Target { offset: at, buffer: part, filled: &mut filled };
            self.reply(cookie, Some(&mut target), &mut Vec::new())?;
            if filled != u64::from(length) {
                return Err(ClientError::Protocol("a read was not answered in full"));
            }
            at += u64::from(length);
        }
        Ok(())
    }

    /// Writes bytes at `offset`.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        self.write_with(offset, data, 0)
    }

    /// Writes bytes at `offset`; durable on return.
    pub fn write_fua(&mut self, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        self.write_with(offset, data, command_flag::FUA)
    }

    fn write_with(&mut self, offset: u64, data: &[u8], flags: u16) -> Result<(), ClientError> {
        let mut at = offset;
        for part in data.chunks(PAYLOAD_BYTES_MAX as usize) {
            let length = u32::try_from(part.len()).expect("32 MiB at most");
            self.plain_request(command::WRITE, flags, at, length, part)?;
            at += u64::from(length);
        }
        Ok(())
    }

    /// Makes durable what was answered before.
    pub fn flush(&mut self) -> Result<(), ClientError> {
        self.plain_request(command::FLUSH, 0, 0, 0, &[])
    }

    /// Says that a range is no longer needed.
    pub fn trim(&mut self, offset: u64, length: u32) -> Result<(), ClientError> {
        self.plain_request(command::TRIM, 0, offset, length, &[])
    }

    /// Makes a range read as zeros.
    pub fn write_zeroes(&mut self, offset: u64, length: u32) -> Result<(), ClientError> {
        self.plain_request(command::WRITE_ZEROES, 0, offset, length, &[])
    }

    /// What a range holds, from `offset` on; may end before `length`.
    pub fn extents(&mut self, offset: u64, length: u32) -> Result<Vec<Extent>, ClientError> {
        if !self.allocation {
            return Ok(vec![Extent {
                offset,
                length: u64::from(length),
                allocation: Allocation::Data,
            }]);
        }
        let cookie = self.send_request(command::BLOCK_STATUS, 0, offset, length, &[])?;
        let mut extents = Vec::new();
        self.reply(cookie, None, &mut extents)?;
        let mut at = offset;
        for extent in &mut extents {
            extent.offset = at;
            at = at
                .checked_add(extent.length)
                .ok_or(ClientError::Protocol("a block status runs past 2^64"))?;
        }
        Ok(extents)
    }

    /// Ends the session; what was asked for is finished first.
    pub fn disconnect(mut self) -> Result<(), ClientError> {
        self.send_request(command::DISC, 0, 0, 0, &[])?;
        self.socket.shutdown(Shutdown::Write);
        Ok(())
    }

    fn plain_request(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> Result<(), ClientError> {
        let cookie = self.send_request(command, flags, offset, length, payload)?;
        self.reply(cookie, None, &mut Vec::new())
    }

    fn send_request(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> Result<u64, ClientError> {
        self.cookie += 1;
        let mut bytes = Vec::with_capacity(wire::RequestHeader::BYTES + payload.len());
        let header = wire::request(command, flags, self.cookie, offset, length);
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(payload);
        self.send(&bytes)?;
        Ok(self.cookie)
    }

    /// Receives a whole reply: a simple one, or chunks up to the last.
    fn reply(
        &mut self,
        cookie: u64,
        mut target: Option<&mut Target<'_>>,
        extents: &mut Vec<Extent>,
    ) -> Result<(), ClientError> {
        let mut failure = None;
        loop {
            let mut head = [0; SimpleReply::BYTES];
            self.receive(&mut head)?;
            let simple: SimpleReply = zerocopy::transmute!(head);
            if simple.cookie.get() != cookie {
                return Err(ClientError::Protocol("a reply answers no request"));
            }
            match simple.magic.get() {
                SIMPLE_REPLY_MAGIC => {
                    if simple.error.get() != 0 {
                        let errno = Errno::from_code(simple.error.get());
                        return Err(ClientError::Request { errno, text: String::new() });
                    }
                    if let Some(target) = target {
                        self.receive(target.buffer)?;
                        *target.filled = target.buffer.len() as u64;
                    }
                    return Ok(());
                }
                CHUNK_MAGIC if self.structured_replies => {}
                _ => return Err(ClientError::Protocol("a reply has another magic")),
            }
            let mut bytes = [0; ChunkHeader::BYTES];
            bytes[..head.len()].copy_from_slice(&head);
            self.receive(&mut bytes[head.len()..])?;
            let header: ChunkHeader = zerocopy::transmute!(bytes);
            self.chunk(&header, target.as_deref_mut(), extents, &mut failure)?;
            if header.flags.get() & chunk::FLAG_DONE != 0 {
                return failure.map_or(Ok(()), Err);
            }
        }
    }

    /// Receives the payload of one chunk.
    fn chunk(
        &mut self,
        header: &ChunkHeader,
        target: Option<&mut Target<'_>>,
        extents: &mut Vec<Extent>,
        failure: &mut Option<ClientError>,
    ) -> Result<(), ClientError> {
        let length = header.length.get();
        match header.kind.get() {
            chunk::NONE if length == 0 => Ok(()),
            chunk::OFFSET_DATA if length > 8 => {
                let mut offset = [0; 8];
                self.receive(&mut offset)?;
                let part = target
                    .and_then(|target| target.part(u64::from_be_bytes(offset), length - 8))
                    .ok_or(ClientError::Protocol("data were not asked for"))?;
                self.receive(part)
            }
            chunk::OFFSET_HOLE if length == 12 => {
                let mut hole = [0; HolePayload::BYTES];
                self.receive(&mut hole)?;
                let hole: HolePayload = zerocopy::transmute!(hole);
                target
                    .and_then(|target| target.part(hole.offset.get(), hole.length.get()))
                    .ok_or(ClientError::Protocol("a hole was not asked for"))?
                    .fill(0);
                Ok(())
            }
            chunk::BLOCK_STATUS
                if length >= 12 && length % 8 == 4 && length <= STATUS_BYTES_MAX =>
            {
                let mut payload = vec![0; length as usize];
                self.receive(&mut payload)?;
                let descriptors = <[StatusDescriptor]>::ref_from_bytes(&payload[4..])
                    .map_err(|_| ClientError::Protocol("a block status has another length"))?;
                for descriptor in descriptors {
                    let flags = descriptor.flags.get();
                    let allocation = match (flags & allocation::ZERO, flags & allocation::HOLE) {
                        (0, _) => Allocation::Data,
                        (_, 0) => Allocation::Zero,
                        _ => Allocation::Hole,
                    };
                    let length = u64::from(descriptor.length.get());
                    extents.push(Extent { offset: 0, length, allocation });
                }
                Ok(())
            }
            kind if kind & chunk::ERROR_BIT != 0 => {
                if length > OPTION_REPLY_BYTES_MAX {
                    return Err(ClientError::Protocol("an error's text is too long"));
                }
                let mut payload = vec![0; length as usize];
                self.receive(&mut payload)?;
                let (error, text) = ErrorPayload::read_from_prefix(&payload)
                    .map_err(|_| ClientError::Protocol("an error is cut off"))?;
                let text = text
                    .get(..usize::from(error.text_bytes.get()))
                    .ok_or(ClientError::Protocol("an error's text is cut off"))?;
                let errno = Errno::from_code(error.error.get());
                let text = String::from_utf8_lossy(text).into_owned();
                *failure = Some(ClientError::Request { errno, text });
                Ok(())
            }
            _ => Err(ClientError::Protocol("a chunk was not expected")),
        }
    }

    pub(super) fn greet(&mut self) -> Result<(), ClientError> {
        let mut bytes = [0; Greeting::BYTES];
        self.receive(&mut bytes)?;
        let greeting: Greeting = zerocopy::transmute!(bytes);
        if greeting.magic.get() != GREETING_MAGIC || greeting.option_magic.get() != OPTION_MAGIC {
            return Err(ClientError::Protocol("the greeting is not that of a newstyle NBD server"));
        }
        let flags = greeting.flags.get();
        if flags & handshake_flag::FIXED_NEWSTYLE == 0 {
            return Err(ClientError::Protocol("the server does not speak fixed newstyle"));
        }
        let both = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        self.send(&u32::from(flags & both).to_be_bytes())
    }

    fn select_allocation(&mut self, name: &str) -> Result<(), ClientError> {
        let mut data = Vec::new();
        for text in [Some(name), None, Some(allocation::NAME)] {
            match text {
                Some(text) => {
                    let length = u32::try_from(text.len()).expect("names are short");
                    data.extend_from_slice(&length.to_be_bytes());
                    data.extend_from_slice(text.as_bytes());
                }
                None => data.extend_from_slice(&1u32.to_be_bytes()),
            }
        }
        self.send_option(option::SET_META_CONTEXT, &data)?;
        loop {
            match self.option_reply(option::SET_META_CONTEXT)?.0 {
                option_reply::META_CONTEXT => self.allocation = true,
                option_reply::ACK => return Ok(()),
                // GO will say what is wrong with the name.
                _ => {
                    self.allocation = false;
                    return Ok(());
                }
            }
        }
    }

    fn go(&mut self, name: &str) -> Result<(), ClientError> {
        let length = u32::try_from(name.len()).expect("names are short");
        let mut data = length.to_be_bytes().to_vec();
        data.extend_from_slice(name.as_bytes());
        data.extend_from_slice(U16::new(1).as_bytes());
        data.extend_from_slice(U16::new(info::BLOCK_SIZE).as_bytes());
        self.send_option(option::GO, &data)?;
        let mut described = false;
        loop {
            let (reply, data) = self.option_reply(option::GO)?;
            match reply {
                option_reply::INFO => {
                    if let Ok(export) = InfoExport::read_from_bytes(&data)
                        && export.kind.get() == info::EXPORT
                    {
                        self.size_bytes = export.size_bytes.get();
                        self.flags = export.flags.get();
                        described = true;
                    }
                }
                option_reply::ACK if described => return Ok(()),
                option_reply::ACK => {
                    return Err(ClientError::Protocol("the export was not described"));
                }
                _ => return Err(self.refused(name, &data)),
            }
        }
    }

    pub(super) fn refused(&self, name: &str, data: &[u8]) -> ClientError {
        let text = String::from_utf8_lossy(data).into_owned();
        ClientError::Refused { name: name.to_owned(), text }
    }

    pub(super) fn send_option(&mut self, option: u32, data: &[u8]) -> Result<(), ClientError> {
        let mut bytes = Vec::new();
        wire::put_option(&mut bytes, option, data);
        self.send(&bytes)
    }

    pub(super) fn option_reply(&mut self, option: u32) -> Result<(u32, Vec<u8>), ClientError> {
        let mut bytes = [0; OptionReplyHeader::BYTES];
        self.receive(&mut bytes)?;
        let header: OptionReplyHeader = zerocopy::transmute!(bytes);
        if header.magic.get() != OPTION_REPLY_MAGIC || header.option.get() != option {
            return Err(ClientError::Protocol("a reply to an option answers another"));
        }
        if header.length.get() > OPTION_REPLY_BYTES_MAX {
            return Err(ClientError::Protocol("a reply to an option is too long"));
        }
        let mut data = vec![0; header.length.get() as usize];
        self.receive(&mut data)?;
        Ok((header.reply.get(), data))
    }

    fn send(&self, bytes: &[u8]) -> Result<(), ClientError> {
        send_all(&self.socket, bytes).map_err(|cause| self.io(cause))
    }

    fn receive(&self, mut buffer: &mut [u8]) -> Result<(), ClientError> {
        while !buffer.is_empty() {
            match self.socket.receive(buffer).map_err(|cause| self.io(cause))? {
                0 => return Err(self.io(io::ErrorKind::UnexpectedEof.into())),
                count => buffer = &mut buffer[count..],
            }
        }
        Ok(())
    }

    pub(super) fn io(&self, cause: io::Error) -> ClientError {
        ClientError::Io { address: self.address.clone(), cause }
    }
}

/// Where the content of a read belongs.
struct Target<'a> {
    offset: u64,
    buffer: &'a mut [u8],
    filled: &'a mut u64,
}

impl Target<'_> {
    /// The part of the buffer that a chunk fills.
    fn part(&mut self, offset: u64, length: u32) -> Option<&mut [u8]> {
        let start = usize::try_from(offset.checked_sub(self.offset)?).ok()?;
        let end = start.checked_add(length as usize)?;
        let part = self.buffer.get_mut(start..end)?;
        *self.filled += u64::from(length);
        Some(part)
    }
}
