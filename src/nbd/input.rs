//! The receiving half of a connection: a buffer of bounded size that requests are parsed out of.

use std::io;

use zerocopy::FromBytes;

use super::socket::Socket;
use super::wire::{REQUEST_MAGIC, RequestHeader, command};

/// Bytes received at once at most.
const RECEIVE_BYTES: usize = 256 << 10;
/// Bytes held at most; a request with more payload than this is received elsewhere.
pub(super) const INPUT_BYTES: usize = 512 << 10;

/// Bytes received and not yet used.
pub(super) struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

/// What lies at the front of the input.
pub(super) enum Front {
    /// A header, and where its payload (of a WRITE) lies.
    Request(RequestHeader, std::ops::Range<usize>),
    /// A header whose payload has not arrived as a whole. It still lies at the front.
    Payload(RequestHeader),
    /// Less than a header.
    Nothing,
    /// Bytes that are no request.
    Garbage,
}

impl Input {
    pub(super) fn new() -> Input {
        Input { bytes: vec![0; INPUT_BYTES].into_boxed_slice(), start: 0, end: 0 }
    }

    /// The bytes received and not yet used.
    pub(super) fn held(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// The bytes in a range that [`Input::front`] named; valid until the next receive.
    pub(super) fn payload(&self, range: std::ops::Range<usize>) -> &[u8] {
        &self.bytes[range]
    }

    /// Drops bytes from the front.
    ///
    /// # Panics
    ///
    /// Where fewer are held.
    pub(super) fn consume(&mut self, count: usize) {
        assert!(count <= self.end - self.start, "{count} bytes are not held");
        self.start += count;
    }

    /// Receives once. 0 at the end of the stream.
    pub(super) fn receive(&mut self, socket: &dyn Socket) -> io::Result<usize> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.bytes.len() - self.end < RECEIVE_BYTES {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let room = (self.bytes.len() - self.end).min(RECEIVE_BYTES);
        assert!(room > 0, "the input is full and was not parsed");
        let count = socket.receive(&mut self.bytes[self.end..self.end + room])?;
        self.end += count;
        Ok(count)
    }

    /// Receives until `count` bytes are held (at most [`INPUT_BYTES`]); `None` where the stream
    /// ends before.
    pub(super) fn hold(&mut self, socket: &dyn Socket, count: usize) -> io::Result<Option<&[u8]>> {
        while self.end - self.start < count {
            if self.receive(socket)? == 0 {
                return Ok(None);
            }
        }
        Ok(Some(&self.bytes[self.start..self.start + count]))
    }

    /// Reads past `count` bytes; `false` where the stream ends before.
    pub(super) fn skip(&mut self, socket: &dyn Socket, mut count: usize) -> io::Result<bool> {
        loop {
            let here = count.min(self.end - self.start);
            self.consume(here);
            count -= here;
            if count == 0 {
                return Ok(true);
            }
            if self.receive(socket)? == 0 {
                return Ok(false);
            }
        }
    }

    /// Moves bytes from the front into `target`, receiving what is missing straight into it;
    /// `false` where the stream ends before.
    pub(super) fn fill(&mut self, socket: &dyn Socket, target: &mut [u8]) -> io::Result<bool> {
        let here = target.len().min(self.end - self.start);
        target[..here].copy_from_slice(&self.bytes[self.start..self.start + here]);
        self.consume(here);
        let mut filled = here;
        while filled < target.len() {
            match socket.receive(&mut target[filled..])? {
                0 => return Ok(false),
                count => filled += count,
            }
        }
        Ok(true)
    }

    /// What lies at the front; a request that is there as a whole is consumed.
    pub(super) fn front(&mut self) -> Front {
        let Ok((header, rest)) = RequestHeader::read_from_prefix(self.held()) else {
            return Front::Nothing;
        };
        if header.magic.get() != REQUEST_MAGIC {
            return Front::Garbage;
        }
        let payload_bytes = match header.command.get() {
            command::WRITE => usize::try_from(header.length.get()).expect("32 bits fit"),
            _ => 0,
        };
        if rest.len() < payload_bytes {
            return Front::Payload(header);
        }
        let payload = self.start + RequestHeader::BYTES;
        self.consume(RequestHeader::BYTES + payload_bytes);
        Front::Request(header, payload..payload + payload_bytes)
    }
}
