//! A server of devices in memory, and a raw socket with a reader for each kind of message.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tidelog::nbd::fuzz::opening;
use tidelog::nbd::wire::{self, chunk, option, option_reply};
use tidelog::nbd::{
    Client, NbdAddress, NbdCounters, NbdLimits, NbdListen, NbdServer, RamDevice, RamExports, listen,
};
use zerocopy::IntoBytes;

pub const SIZE: u64 = 4 << 20;

/// A server of one writable and one read-only device, in a directory of its own.
pub struct Rig {
    pub server: Option<NbdServer>,
    pub device: Arc<RamDevice>,
    pub counters: Arc<NbdCounters>,
    pub dir: tempfile::TempDir,
}

impl Rig {
    pub fn new() -> Rig {
        Rig::with(NbdLimits::default())
    }

    pub fn with(limits: NbdLimits) -> Rig {
        Rig::of(SIZE, limits)
    }

    /// With a writable device of another size.
    pub fn of(size_bytes: u64, limits: NbdLimits) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let device = Arc::new(RamDevice::new("g/v", size_bytes, false));
        let image = Arc::new(RamDevice::new("g/v@image", SIZE, true));
        let exports = Arc::new(RamExports(vec![Arc::clone(&device), image]));
        let counters = Arc::new(NbdCounters::default());
        let at = NbdListen::new(NbdAddress::Unix(dir.path().join("s")));
        let server = listen(at, exports, limits, Arc::clone(&counters)).unwrap();
        Rig { server: Some(server), device, counters, dir }
    }

    pub fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("s")
    }

    pub fn client(&self, name: &str) -> Client {
        Client::connect(&NbdAddress::Unix(self.socket()), name).unwrap()
    }

    /// A raw connection in the middle of option haggling.
    pub fn raw(&self) -> Raw {
        let mut raw = Raw::connect(&self.socket());
        assert_eq!(raw.take(18), wire::greeting().as_bytes());
        raw.put(&3u32.to_be_bytes());
        raw
    }

    /// A raw connection in the transmission phase, with structured replies and `base:allocation`.
    pub fn session(&self) -> Raw {
        let mut raw = Raw::connect(&self.socket());
        raw.take(18);
        raw.put(&opening());
        assert_eq!(raw.reply(option::STRUCTURED_REPLY).0, option_reply::ACK);
        assert_eq!(raw.reply(option::SET_META_CONTEXT).0, option_reply::META_CONTEXT);
        assert_eq!(raw.reply(option::SET_META_CONTEXT).0, option_reply::ACK);
        assert_eq!(raw.reply(option::GO).0, option_reply::INFO);
        assert_eq!(raw.reply(option::GO).0, option_reply::ACK);
        raw
    }

    pub fn wait_for_clients(&self, count: usize) {
        crate::support::wait_for("clients to come and go", || {
            (self.device.clients() == count).then_some(())
        });
    }
}

/// A socket with a reader for each kind of message.
pub struct Raw(pub UnixStream);

impl Raw {
    pub fn connect(path: &Path) -> Raw {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Raw(stream)
    }

    pub fn put(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    pub fn option(&mut self, option: u32, data: &[u8]) {
        let mut bytes = Vec::new();
        wire::put_option(&mut bytes, option, data);
        self.put(&bytes);
    }

    /// The next reply to `option`: its type and data.
    pub fn reply(&mut self, option: u32) -> (u32, Vec<u8>) {
        assert_eq!(self.take(8), wire::OPTION_REPLY_MAGIC.to_be_bytes());
        assert_eq!(self.u32(), option);
        let reply = self.u32();
        let length = self.u32() as usize;
        (reply, self.take(length))
    }

    pub fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, length: u32) {
        self.put(wire::request(command, flags, cookie, offset, length).as_bytes());
    }

    /// The next simple reply: error and cookie.
    pub fn simple(&mut self) -> (u32, u64) {
        assert_eq!(self.u32(), wire::SIMPLE_REPLY_MAGIC);
        let error = self.u32();
        (error, u64::from_be_bytes(self.take(8).try_into().unwrap()))
    }

    /// The next chunk: flags, type, cookie and payload.
    pub fn chunk(&mut self) -> (u16, u16, u64, Vec<u8>) {
        assert_eq!(self.u32(), wire::CHUNK_MAGIC);
        let head = self.take(16);
        let flags = u16::from_be_bytes([head[0], head[1]]);
        let kind = u16::from_be_bytes([head[2], head[3]]);
        let cookie = u64::from_be_bytes(head[4..12].try_into().unwrap());
        let length = u32::from_be_bytes(head[12..].try_into().unwrap());
        (flags, kind, cookie, self.take(length as usize))
    }

    /// The next chunk, which must be an error that ends its reply: error and cookie.
    pub fn error(&mut self) -> (u32, u64) {
        let (flags, kind, cookie, payload) = self.chunk();
        assert_eq!((flags, kind), (chunk::FLAG_DONE, chunk::ERROR));
        (u32::from_be_bytes(payload[..4].try_into().unwrap()), cookie)
    }

    /// Whether a byte can be received now.
    pub fn has_more(&self) -> bool {
        use nix::sys::socket::{MsgFlags, recv};
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        recv(self.0.as_raw_fd(), &mut [0; 1], flags).is_ok_and(|count| count > 0)
    }

    /// Everything up to the end of the stream.
    pub fn rest(mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.0.read_to_end(&mut bytes).unwrap();
        bytes
    }
}

pub fn info_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
    for kind in wanted {
        data.extend_from_slice(&kind.to_be_bytes());
    }
    data
}

pub fn context_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}
