//! A connection's socket as a session needs it, over Unix sockets and TCP alike.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{self, PeerCredentials};
use nix::sys::socket::{MsgFlags, getsockopt, recv, send, setsockopt};

use crate::io::Clock;

/// A stream of bytes in both directions, used by several threads at once: one receives, one sends.
pub trait Socket: Send + Sync {
    /// Receives at least one byte; 0 at the end of the stream.
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Sends at least one byte, waiting for room.
    fn send(&self, bytes: &[u8]) -> io::Result<usize>;
    /// Sends what there is room for, without waiting; 0 where there is none.
    fn send_now(&self, bytes: &[u8]) -> io::Result<usize>;
    /// Ends one or both directions, waking who waits in them.
    fn shutdown(&self, how: Shutdown);
    /// Whether nothing that is sent can be received any more: the other side is gone, and has not
    /// only ended its half.
    fn is_gone(&self) -> bool {
        false
    }
    /// Where it comes from, for people.
    fn address(&self) -> String {
        "unknown".to_owned()
    }
    /// Bounds every later wait for bytes; `None` waits for ever.
    fn set_receive_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;
    /// Bounds every later wait for room; `None` waits for ever.
    fn set_send_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;
}

/// Lets TCP end a connection whose other side has said nothing for so long, whether it was asked by
/// a probe or owes the receipt of what was sent.
///
/// # Errors
///
/// What the system says.
pub fn end_when_silent(socket: &impl AsFd, time: Duration) -> io::Result<()> {
    let third = u32::try_from(time.as_secs() / 3).unwrap_or(u32::MAX).max(1);
    let whole = u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &third)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &third)?;
    setsockopt(socket, sockopt::TcpUserTimeout, &whole)?;
    Ok(())
}

/// Sends all bytes, waiting for room.
pub(super) fn send_all(socket: &dyn Socket, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let sent = socket.send(bytes)?;
        if sent == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[sent..];
    }
    Ok(())
}

/// Bytes that are sent in one call before a deadline. Each of the pieces that the kernel makes of a
/// longer one may wait as long as the whole, on a Unix socket.
const PIECE_BYTES: usize = 16 << 10;

/// A socket that gives up at a deadline, so that a client who sends a byte now and then, or never
/// reads what he asked for, does not hold a connection, or what others need too, for ever.
pub(super) struct Deadline<'a> {
    socket: &'a dyn Socket,
    clock: &'a dyn Clock,
    at: Duration,
}

impl<'a> Deadline<'a> {
    /// Gives up when `time` has passed from now on.
    pub(super) fn within(
        time: Duration,
        socket: &'a dyn Socket,
        clock: &'a dyn Clock,
    ) -> Deadline<'a> {
        Deadline { socket, clock, at: clock.monotonic().saturating_add(time) }
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.at.saturating_sub(self.clock.monotonic());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }
}

/// What the kernel calls a wait that took too long, as what it is.
fn in_time(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    }
}

impl Socket for Deadline<'_> {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_receive_timeout(Some(self.left()?))?;
        self.socket.receive(buffer).map_err(in_time)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_send_timeout(Some(self.left()?))?;
        self.socket.send(&bytes[..bytes.len().min(PIECE_BYTES)]).map_err(in_time)
    }

    fn send_now(&self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.send_now(bytes)
    }

    fn shutdown(&self, how: Shutdown) {
        self.socket.shutdown(how);
    }

    fn set_receive_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_receive_timeout(timeout)
    }

    fn set_send_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_send_timeout(timeout)
    }
}

/// A connected socket of the system.
#[derive(Debug)]
pub enum Stream {
    /// A Unix socket.
    Unix(UnixStream),
    /// A TCP socket.
    Tcp(TcpStream),
}

impl Stream {
    fn retry(mut call: impl FnMut() -> nix::Result<usize>) -> io::Result<usize> {
        loop {
            match call() {
                Err(Errno::EINTR) => {}
                other => return other.map_err(io::Error::from),
            }
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Socket for Stream {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let fd = self.as_fd().as_raw_fd();
        Stream::retry(|| recv(fd, buffer, MsgFlags::empty()))
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let fd = self.as_fd().as_raw_fd();
        Stream::retry(|| send(fd, bytes, MsgFlags::MSG_NOSIGNAL))
    }

    fn send_now(&self, bytes: &[u8]) -> io::Result<usize> {
        let fd = self.as_fd().as_raw_fd();
        match Stream::retry(|| send(fd, bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            other => other,
        }
    }

    fn shutdown(&self, how: Shutdown) {
        // An error means that the other side was faster.
        let _ = match self {
            Stream::Unix(stream) => stream.shutdown(how),
            Stream::Tcp(stream) => stream.shutdown(how),
        };
    }

    fn is_gone(&self) -> bool {
        // What is polled for without being asked: POLLHUP, POLLERR. A half that was closed is only
        // POLLRDHUP. TCP tells that half from a whole once it probes a client that has gone.
        let mut polled = [PollFd::new(self.as_fd(), PollFlags::empty())];
        matches!(poll(&mut polled, PollTimeout::ZERO), Ok(found) if found > 0)
    }

    fn address(&self) -> String {
        let found = match self {
            Stream::Tcp(stream) => stream.peer_addr().map(|address| address.to_string()),
            // Whoever connected: it has no address of its own.
            Stream::Unix(stream) => getsockopt(stream, PeerCredentials)
                .map(|by| format!("process {} of user {}", by.pid(), by.uid()))
                .map_err(io::Error::from),
        };
        found.unwrap_or_else(|_| "unknown".to_owned())
    }

    fn set_receive_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Stream::Unix(stream) => stream.set_read_timeout(timeout),
            Stream::Tcp(stream) => stream.set_read_timeout(timeout),
        }
    }

    fn set_send_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Stream::Unix(stream) => stream.set_write_timeout(timeout),
            Stream::Tcp(stream) => stream.set_write_timeout(timeout),
        }
    }
}
