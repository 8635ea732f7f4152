//! The kernel's nbd devices: commands by netlink, what it tells by itself, and what `/sys` shows.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};

use super::netlink::{self, Answer, Device, command};

/// Bytes of a datagram from the kernel at most.
const DATAGRAM_BYTES: usize = 64 << 10;

/// Why the kernel did not do it.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The module is not loaded.
    #[error("the kernel has no nbd; `modprobe nbd` loads it")]
    NoModule,
    /// The caller may not.
    #[error("the kernel does not permit it; run this as root")]
    NotPermitted,
    /// Something uses the device.
    #[error("it is in use; `tidelog attach --status` shows what is attached")]
    Busy,
    /// The device is not attached.
    #[error("it is not attached; `tidelog attach --status` shows what is")]
    NotAttached,
    /// Anything else.
    #[error("the kernel refused: {0}")]
    Other(io::Error),
}

impl From<Errno> for KernelError {
    fn from(errno: Errno) -> KernelError {
        match errno {
            Errno::EPERM | Errno::EACCES => KernelError::NotPermitted,
            Errno::EBUSY => KernelError::Busy,
            other => KernelError::Other(other.into()),
        }
    }
}

/// The way to the kernel.
pub struct Kernel {
    commands: OwnedFd,
    /// Where it tells of dead links.
    news: OwnedFd,
    family: u16,
    sequence: u32,
}

impl Kernel {
    /// Finds the family, and hears of dead links from now on.
    ///
    /// # Errors
    ///
    /// Where the module is not loaded.
    pub fn open() -> Result<Kernel, KernelError> {
        let mut kernel =
            Kernel { commands: open_socket()?, news: open_socket()?, family: 0, sequence: 0 };
        kernel.sequence += 1;
        let ask = netlink::get_family(kernel.sequence);
        let told = kernel.call(&ask, |command_family, attributes| {
            (command_family == netlink::CONTROL_FAMILY).then(|| netlink::family(attributes))?
        });
        let (family, group) = match told {
            Ok(Some(numbers)) => numbers,
            Ok(None) | Err(Errno::ENOENT) => return Err(KernelError::NoModule),
            Err(errno) => return Err(errno.into()),
        };
        kernel.family = family;
        join(kernel.news.as_fd(), group)?;
        Ok(kernel)
    }

    /// Sends a request and reads up to its end; what `read` found in the messages before.
    fn call<T>(
        &self,
        request: &[u8],
        read: impl Fn(u16, &[u8]) -> Option<T>,
    ) -> nix::Result<Option<T>> {
        let fd = self.commands.as_raw_fd();
        send(fd, request, MsgFlags::empty())?;
        let mut buffer = vec![0; DATAGRAM_BYTES];
        let mut found = None;
        loop {
            let length = match recv(fd, &mut buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            for answer in netlink::answers(&buffer[..length]) {
                match answer {
                    Answer::Done { sequence, errno } if sequence == self.sequence => {
                        return if errno == 0 { Ok(found) } else { Err(Errno::from_raw(errno)) };
                    }
                    Answer::Message { family, sequence, attributes, .. }
                        if sequence == self.sequence =>
                    {
                        found = found.or(read(family, attributes));
                    }
                    _ => {}
                }
            }
        }
    }

    fn command(&mut self, command: u8, device: &Device) -> nix::Result<()> {
        self.sequence += 1;
        let request = netlink::request(self.family, command, self.sequence, device);
        self.call(&request, |_, _| None::<()>).map(|_| ())
    }

    /// Makes a device of a socket.
    pub fn connect(&mut self, device: &Device) -> Result<(), KernelError> {
        Ok(self.command(command::CONNECT, device)?)
    }

    /// Changes a device. A socket is taken where the one before is dead, and ignored otherwise.
    pub fn reconfigure(&mut self, device: &Device) -> Result<(), KernelError> {
        self.command(command::RECONFIGURE, device).map_err(not_attached)
    }

    /// Ends a device. Requests that wait fail.
    pub fn disconnect(&mut self, index: u32) -> Result<(), KernelError> {
        let device = Device { index, ..Device::default() };
        self.command(command::DISCONNECT, &device).map_err(not_attached)
    }

    /// Whether a device is connected.
    pub fn is_connected(&mut self, index: u32) -> Result<bool, KernelError> {
        self.sequence += 1;
        let device = Device { index, ..Device::default() };
        let ask = netlink::request(self.family, command::STATUS, self.sequence, &device);
        match self.call(&ask, |_, attributes| netlink::connected(attributes)) {
            Ok(connected) => Ok(connected.unwrap_or(false)),
            // A device that was never made.
            Err(Errno::EINVAL | Errno::ENODEV) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Becomes readable when the kernel tells something.
    pub fn news_fd(&self) -> BorrowedFd<'_> {
        self.news.as_fd()
    }

    /// Whether the kernel told meanwhile that a device's link is dead; also where it told more
    /// than could be kept.
    pub fn link_died(&self, index: u32) -> bool {
        let mut buffer = vec![0; DATAGRAM_BYTES];
        let mut died = false;
        loop {
            match recv(self.news.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => {
                    died |= netlink::answers(&buffer[..length]).any(|answer| match answer {
                        Answer::Message { command: command::LINK_DEAD, attributes, .. } => {
                            netlink::index(attributes) == Some(index)
                        }
                        _ => false,
                    });
                }
                Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => died = true,
                Err(_) => return died,
            }
        }
    }
}

fn not_attached(errno: Errno) -> KernelError {
    match errno {
        Errno::EINVAL | Errno::ENODEV => KernelError::NotAttached,
        other => other.into(),
    }
}

fn open_socket() -> nix::Result<OwnedFd> {
    let (kind, flags) = (SockType::Raw, SockFlag::SOCK_CLOEXEC);
    let fd = socket(AddressFamily::Netlink, kind, flags, SockProtocol::NetlinkGeneric)?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    Ok(fd)
}

/// Joins a multicast group of a netlink socket.
fn join(fd: BorrowedFd<'_>, group: u32) -> nix::Result<()> {
    // SAFETY: the option's value is the `u32` that is passed, with its size.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_NETLINK,
            libc::NETLINK_ADD_MEMBERSHIP,
            std::ptr::from_ref(&group).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    Errno::result(result).map(|_| ())
}

/// Ends a TCP connection at once, with whatever of it is not sent yet, whoever else holds the
/// socket: what was asked for on it must not arrive after the same requests on the next one.
pub fn abort(fd: BorrowedFd<'_>) {
    // SAFETY: an address of the family "none" is shorter than any other, and zeroed.
    unsafe {
        let mut nowhere: libc::sockaddr = std::mem::zeroed();
        nowhere.sa_family = libc::AF_UNSPEC as libc::sa_family_t;
        libc::connect(
            fd.as_raw_fd(),
            std::ptr::from_ref(&nowhere),
            size_of::<libc::sockaddr>() as libc::socklen_t,
        );
    }
    // A Unix socket knows no such thing.
    let _ = nix::sys::socket::shutdown(fd.as_raw_fd(), nix::sys::socket::Shutdown::Both);
}

/// Whether a connection's end, if it has one, began on this side: the kernel gave it up. `false`
/// where the other side closed it or TCP did, and where that cannot be told.
pub fn was_given_up(fd: BorrowedFd<'_>) -> bool {
    /// `TCP_ESTABLISHED`, `TCP_FIN_WAIT1`, `TCP_FIN_WAIT2`, `TCP_CLOSING`: nothing came from there.
    const NOT_CLOSED_THERE: [u8; 4] = [1, 4, 5, 11];
    let mut state = 0u8;
    let mut length = size_of::<u8>() as libc::socklen_t;
    // SAFETY: the option's value is as long as the `u8` that is passed, its state comes first.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            std::ptr::from_mut(&mut state).cast(),
            std::ptr::from_mut(&mut length),
        )
    };
    result == 0 && NOT_CLOSED_THERE.contains(&state)
}

/// The N of a device that was named as `/dev/nbdN`, or by a link to it.
pub fn index_of(device: &Path) -> Result<u32, String> {
    let real = std::fs::canonicalize(device).unwrap_or_else(|_| device.to_owned());
    let name = real.strip_prefix("/dev/").ok().and_then(Path::to_str).unwrap_or_default();
    name.strip_prefix("nbd")
        .filter(|digits| !digits.starts_with('0') || digits.len() == 1)
        .and_then(|digits| digits.parse().ok())
        .ok_or_else(|| {
            format!("device `{}`: is no nbd device; name one as /dev/nbd0", device.display())
        })
}

/// The device's name.
pub fn device_path(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{index}"))
}

/// What `/sys` says of a device.
fn sys(index: u32, what: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/sys/block/nbd{index}/{what}")).ok()?;
    Some(text.trim().to_owned())
}

/// Bytes of a device.
pub fn size_bytes(index: u32) -> Option<u64> {
    sys(index, "size")?.parse::<u64>().ok()?.checked_mul(512)
}

/// What whoever attached a device called it.
pub fn backend(index: u32) -> Option<String> {
    sys(index, "backend").filter(|text| !text.is_empty())
}

/// The devices that are attached, by anyone.
pub fn attached() -> Vec<u32> {
    let entries = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let mut all: Vec<u32> = entries
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("nbd")?.parse().ok())
        .filter(|index| sys(*index, "pid").is_some())
        .collect();
    all.sort_unstable();
    all
}

/// Whether something holds a device for itself: a mounted file system, swap, a volume manager.
pub fn is_held(index: u32) -> io::Result<bool> {
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_EXCL | libc::O_NONBLOCK)
        .open(device_path(index));
    match opened {
        Ok(_) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(true),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_the_kernel_names_them() {
        assert_eq!(index_of(Path::new("/dev/nbd0")), Ok(0));
        assert_eq!(index_of(Path::new("/dev/nbd15")), Ok(15));
        for bad in ["/dev/sda", "nbd0", "/dev/nbd", "/dev/nbd0p1", "/dev/nbd01", "/tmp/nbd0", ""] {
            let said = index_of(Path::new(bad)).unwrap_err();
            assert!(said.contains("/dev/nbd0"), "{bad}: {said}");
        }
    }

    #[test]
    fn who_ended_a_connection_first_is_told_by_its_state() {
        use std::io::Read;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let connected = || {
            let host = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (host, listener.accept().unwrap().0)
        };
        let end = |stream: &std::net::TcpStream| stream.shutdown(std::net::Shutdown::Both);
        // As the kernel does to a socket that does not answer.
        let (host, mut server) = connected();
        end(&host).unwrap();
        assert_eq!(server.read(&mut [0]).unwrap(), 0);
        assert!(was_given_up(host.as_fd()));
        // And to one that ended.
        let (mut host, server) = connected();
        drop(server);
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
        assert!(!was_given_up(host.as_fd()));
        end(&host).unwrap();
        assert!(!was_given_up(host.as_fd()));
        let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(!was_given_up(unix.as_fd()), "nothing is known");
    }

    #[test]
    fn an_aborted_connection_ends_for_everyone_and_sends_nothing_more() {
        use std::io::{Read, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut held = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut other = held.try_clone().unwrap();
        let (mut server, _) = listener.accept().unwrap();
        // More than both sides' buffers hold: the rest waits to be sent.
        held.set_nonblocking(true).unwrap();
        let mut sent = 0;
        while let Ok(count) = held.write(&[7; 65536]) {
            sent += count;
        }
        abort(held.as_fd());
        assert!(other.write(&[1]).is_err(), "who shares the socket is cut off too");
        assert_eq!(other.read(&mut [0]).unwrap_or(0), 0);
        let mut received = Vec::new();
        let end = server.read_to_end(&mut received);
        assert!(end.is_err() && received.len() < sent, "{end:?}: {} of {sent}", received.len());
    }
}
