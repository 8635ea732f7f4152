//! Where clients come in: Unix and TCP listeners, who is let in, and how a server goes down.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::address::NbdAddress;
use super::connection::serve;
use super::export::Exports;
use super::server::{NbdCounters, NbdLimits, Shared};
use super::socket::{Socket, Stream, end_when_silent};
use crate::config::Network;
use crate::io::SystemClock;

/// How long a TCP client may be silent. While it counts as there, a volume cannot be taken back to
/// an old moment, say; but a host that is only held up, as a virtual machine while it is saved, and
/// that nobody connects anew, loses its disk with its connection.
const SILENCE: Duration = Duration::from_secs(90);

/// Where to listen, and for whom.
#[derive(Clone, Debug)]
pub struct NbdListen {
    /// The address.
    pub address: NbdAddress,
    /// TCP clients that are let in; empty lets all in.
    pub allow: Vec<Network>,
    /// Permissions of a Unix socket.
    pub mode: u32,
}

impl NbdListen {
    /// Listens on an address for everyone who can reach it; a Unix socket for owner and group.
    #[must_use]
    pub fn new(address: NbdAddress) -> NbdListen {
        NbdListen { address, allow: Vec::new(), mode: 0o660 }
    }

    fn lets_in(&self, from: Option<IpAddr>) -> bool {
        let Some(from) = from else { return true };
        self.allow.is_empty() || self.allow.iter().any(|block| block.contains(from))
    }
}

/// Why a server does not listen.
#[derive(Debug, thiserror::Error)]
#[error("nbd listener {address}: {what}: {cause}")]
pub struct ListenError {
    address: String,
    what: &'static str,
    #[source]
    cause: io::Error,
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn accept(&self) -> io::Result<(Stream, Option<IpAddr>)> {
        match self {
            Listener::Unix(listener) => {
                listener.accept().map(|(stream, _)| (Stream::Unix(stream), None))
            }
            Listener::Tcp(listener) => {
                let (stream, from) = listener.accept()?;
                stream.set_nodelay(true)?;
                end_when_silent(&stream, SILENCE)?;
                Ok((Stream::Tcp(stream), Some(from.ip().to_canonical())))
            }
        }
    }

    /// Ends the thread that waits in `accept`.
    fn wake(&self) {
        let fd = match self {
            Listener::Unix(listener) => listener.as_fd(),
            Listener::Tcp(listener) => listener.as_fd(),
        };
        let _ = nix::sys::socket::shutdown(fd.as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }
}

struct Live {
    next: u64,
    sockets: HashMap<u64, Arc<dyn Socket>>,
}

struct Inner {
    listen: NbdListen,
    listener: Listener,
    address: NbdAddress,
    exports: Arc<dyn Exports>,
    shared: Shared,
    clock: SystemClock,
    live: Mutex<Live>,
    left: Condvar,
}

/// A server that listens. Dropping it without [`NbdServer::shutdown`] cuts its clients off.
pub struct NbdServer {
    inner: Arc<Inner>,
    acceptor: Option<std::thread::JoinHandle<()>>,
}

/// Listens, and serves whoever comes, each on a thread of its own.
///
/// # Errors
///
/// Where the address is in use, may not be used, or a name does not resolve.
pub fn listen(
    listen: NbdListen,
    exports: Arc<dyn Exports>,
    limits: NbdLimits,
    counters: Arc<NbdCounters>,
) -> Result<NbdServer, ListenError> {
    let failed = |what, cause| ListenError { address: listen.address.to_string(), what, cause };
    let (listener, address) = match &listen.address {
        NbdAddress::Unix(path) => {
            let listener = bind_unix(path, listen.mode)
                .map_err(|cause| failed("could not be opened", cause))?;
            (Listener::Unix(listener), listen.address.clone())
        }
        NbdAddress::Tcp(host) => {
            let bound = TcpListener::bind(host.as_str())
                .and_then(|listener| listener.local_addr().map(|at| (listener, at)));
            let (listener, at) = bound.map_err(|cause| failed("could not be opened", cause))?;
            (Listener::Tcp(listener), NbdAddress::Tcp(at.to_string()))
        }
    };
    let inner = Arc::new(Inner {
        listener,
        address,
        exports,
        shared: Shared::new(limits, counters),
        clock: SystemClock::new(),
        live: Mutex::new(Live { next: 0, sockets: HashMap::new() }),
        left: Condvar::new(),
        listen: listen.clone(),
    });
    let for_thread = Arc::clone(&inner);
    let acceptor = std::thread::Builder::new()
        .name("nbd-accept".to_owned())
        .spawn(move || for_thread.accept_all())
        .map_err(|cause| failed("no thread for it", cause))?;
    Ok(NbdServer { inner, acceptor: Some(acceptor) })
}

impl NbdServer {
    /// Where clients connect; with the port that was given where none was asked for.
    #[must_use]
    pub fn local_addr(&self) -> &NbdAddress {
        &self.inner.address
    }

    /// Lets nobody in any more, answers what was received, and closes all connections; those that
    /// are not done within the drain timeout are cut off. Blocks.
    pub fn shutdown(mut self) {
        self.end(true);
    }

    fn end(&mut self, drain: bool) {
        let Some(acceptor) = self.acceptor.take() else { return };
        self.inner.shared.stop();
        self.inner.listener.wake();
        if acceptor.join().is_err() {
            tracing::error!("nbd: the accepting thread panicked");
        }
        if let NbdAddress::Unix(path) = &self.inner.address {
            let _ = std::fs::remove_file(path);
        }
        let mut live = self.inner.live.lock().expect("no holder panics");
        for socket in live.sockets.values() {
            socket.shutdown(if drain { Shutdown::Read } else { Shutdown::Both });
        }
        if drain {
            let timeout = self.inner.shared.limits.drain_timeout;
            let wait = |live: &mut Live| !live.sockets.is_empty();
            live = self.inner.left.wait_timeout_while(live, timeout, wait).expect("no panic").0;
        }
        for socket in live.sockets.values() {
            socket.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.end(false);
    }
}

impl Inner {
    fn accept_all(self: Arc<Inner>) {
        loop {
            let accepted = self.listener.accept();
            if self.shared.is_stopping() {
                return;
            }
            match accepted {
                Ok((stream, from)) => self.admit(stream, from),
                // The client was gone before it was let in.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    // Out of descriptors, most likely: give those who hold them time to end.
                    tracing::warn!(%error, address = %self.address, "nbd: accept failed");
                    let live = self.live.lock().expect("no holder panics");
                    let pause = Duration::from_millis(100);
                    drop(self.left.wait_timeout(live, pause).expect("no panic"));
                }
            }
        }
    }

    fn admit(self: &Arc<Inner>, stream: Stream, from: Option<IpAddr>) {
        if !self.listen.lets_in(from) {
            self.shared.counters.refused_total.add(1);
            tracing::warn!(?from, address = %self.address, "nbd: client is not in the allow list");
            return;
        }
        let socket: Arc<dyn Socket> = Arc::new(stream);
        let mut live = self.live.lock().expect("no holder panics");
        if !self.shared.counters.connections.add_below(self.shared.limits.connections as u64) {
            self.shared.counters.refused_total.add(1);
            tracing::warn!(address = %self.address, "nbd: too many clients");
            return;
        }
        let number = live.next;
        live.next += 1;
        live.sockets.insert(number, Arc::clone(&socket));
        drop(live);
        self.shared.counters.connections_total.add(1);
        let inner = Arc::clone(self);
        let spawned = std::thread::Builder::new().name(format!("nbd-{number}")).spawn(move || {
            serve(&socket, &*inner.exports, &inner.shared, &inner.clock);
            inner.leave(number);
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "nbd: no thread for a client");
            self.leave(number);
        }
    }

    fn leave(&self, number: u64) {
        self.shared.counters.connections.subtract(1);
        self.live.lock().expect("no holder panics").sockets.remove(&number);
        self.left.notify_all();
    }
}

/// Opens a Unix socket under its name, which a dead server may have left behind. Nobody can connect
/// before the permissions are right.
fn bind_unix(path: &Path, mode: u32) -> io::Result<UnixListener> {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
    };
    if let Ok(there) = std::fs::symlink_metadata(path) {
        if !there.file_type().is_socket() {
            let cause = "something that is no socket has this name";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, cause));
        }
        match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path)?;
            }
            _ => return Err(io::Error::new(io::ErrorKind::AddrInUse, "a server listens there")),
        }
    }
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    listen(&fd, Backlog::new(128)?)?;
    Ok(UnixListener::from(fd))
}

/// Connects to an address as a client.
pub(super) fn connect(address: &NbdAddress) -> io::Result<Stream> {
    match address {
        NbdAddress::Unix(path) => UnixStream::connect(path).map(Stream::Unix),
        NbdAddress::Tcp(host) => {
            let stream = TcpStream::connect(host.as_str())?;
            stream.set_nodelay(true)?;
            Ok(Stream::Tcp(stream))
        }
    }
}

/// Connects to an address, waiting for each of its hosts no longer than `patience`.
pub(super) fn connect_within(address: &NbdAddress, patience: Duration) -> io::Result<Stream> {
    let NbdAddress::Tcp(host) = address else { return connect(address) };
    let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for at in host.to_socket_addrs()? {
        match TcpStream::connect_timeout(&at, patience) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(Stream::Tcp(stream));
            }
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use nix::sys::socket::{getsockopt, setsockopt, sockopt};
    use zerocopy::IntoBytes;

    use super::*;
    use crate::nbd::fuzz::opening;
    use crate::nbd::wire::{self, command};
    use crate::nbd::{RamDevice, RamExports};

    fn tcp() -> (Listener, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Listener::Tcp(listener), client)
    }

    /// By the system's own times it was two hours, and until then the group was in use.
    #[test]
    fn a_tcp_client_whose_host_died_is_noticed_within_a_minute_or_two() {
        let (listener, _client) = tcp();
        let (stream, _) = listener.accept().unwrap();
        let idle = getsockopt(&stream, sockopt::TcpKeepIdle).unwrap();
        let interval = getsockopt(&stream, sockopt::TcpKeepInterval).unwrap();
        assert!(getsockopt(&stream, sockopt::KeepAlive).unwrap());
        assert!(idle + 2 * interval <= 120, "it is probed after {idle} s, then every {interval} s");
        let silent = getsockopt(&stream, sockopt::TcpUserTimeout).unwrap();
        assert!((30_000..=120_000).contains(&silent), "{silent} ms");
    }

    /// Serves a client that asks for a flush which is not answered, and goes.
    fn hold_to_its_end(server: Stream, mut client: impl Write) {
        let device = Arc::new(RamDevice::new("g/v", 64 << 10, false));
        device.hold_flushes();
        let exports = RamExports(vec![Arc::clone(&device)]);
        let shared = Shared::new(NbdLimits::default(), Arc::default());
        let socket: Arc<dyn Socket> = Arc::new(server);
        let clock = SystemClock::new();
        let (ended, end) = std::sync::mpsc::channel();
        let in_time = std::thread::scope(|scope| {
            scope.spawn(|| {
                serve(&socket, &exports, &shared, &clock);
                ended.send(()).unwrap();
            });
            client.write_all(&opening()).unwrap();
            client.write_all(wire::request(command::FLUSH, 0, 1, 0, 0).as_bytes()).unwrap();
            while shared.counters.requests.value() == 0 {
                std::thread::yield_now();
            }
            drop(client);
            let in_time = end.recv_timeout(Duration::from_secs(10)).is_ok();
            if !in_time {
                // So that the test ends.
                device.complete_flushes(&Ok(()));
            }
            in_time
        });
        assert!(in_time, "the connection outlives its client");
        assert_eq!(Arc::strong_count(&socket), 1, "its descriptor is free");
        assert_eq!(device.complete_flushes(&Ok(())), 1);
    }

    #[test]
    fn a_connection_ends_with_its_client_though_answers_are_owed_to_it() {
        let (server, client) = UnixStream::pair().unwrap();
        hold_to_its_end(Stream::Unix(server), client);
        // A host that was reset, or a process that died with bytes unread.
        let (listener, client) = tcp();
        let (server, _) = listener.accept().unwrap();
        let now = nix::libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(&client, sockopt::Linger, &now).unwrap();
        hold_to_its_end(server, client);
    }
}
