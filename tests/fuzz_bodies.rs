//! What the fuzzers feed, one function per target: each takes any bytes and panics where they do
//! harm. `fuzz/` wraps them for cargo-fuzz; the test below replays the checked-in corpora on
//! stable.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tidelog::config::Config;
use tidelog::log::control::Control;
use tidelog::log::record::{Header, RecordError};
use tidelog::nbd::{
    Client, NbdAddress, NbdListen, NbdServer, RamDevice, RamExports, Socket, listen,
};
use tidelog::units::{ByteSize, LogTime, Name, Span};

/// A target: its name (and that of its corpus), its body.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("nbd_server", nbd_server),
    ("nbd_client", nbd_client),
    ("peer_wire", peer_wire),
    ("log_record", log_record),
    ("control_record", control_record),
    ("config", config),
    ("units", units),
];

const EXPORT_BYTES: u64 = 1 << 20;

struct Server {
    socket: PathBuf,
    _server: NbdServer,
    _dir: tempfile::TempDir,
}

/// One server for the whole process: what one client sends must not harm the next.
fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nbd.sock");
        let device = Arc::new(RamDevice::new("g/v", EXPORT_BYTES, false));
        let read_only = Arc::new(RamDevice::new("g/v@past", EXPORT_BYTES, true));
        let exports = Arc::new(RamExports(vec![device, read_only]));
        let address = NbdListen::new(NbdAddress::Unix(socket.clone()));
        let server = listen(address, exports, Default::default(), Default::default()).unwrap();
        Server { socket, _server: server, _dir: dir }
    })
}

/// A whole conversation of a client, handshake and transmission; then another client is served.
pub fn nbd_server(bytes: &[u8]) {
    let server = server();
    let mut stream = UnixStream::connect(&server.socket).unwrap();
    let mut receiving = stream.try_clone().unwrap();
    // Replies are read meanwhile, or a server that waits for room would stop both.
    let reader = std::thread::spawn(move || {
        let mut replies = Vec::new();
        let _ = receiving.read_to_end(&mut replies);
    });
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    reader.join().unwrap();
    let address = NbdAddress::Unix(server.socket.clone());
    let mut client = Client::connect(&address, "g/v").unwrap();
    client.set_timeout(Some(Duration::from_secs(30))).unwrap();
    let block = [bytes.len() as u8; 512];
    client.write(EXPORT_BYTES - 512, &block).unwrap();
    let mut back = [0; 512];
    client.read(EXPORT_BYTES - 512, &mut back).unwrap();
    assert_eq!(back, block);
    client.disconnect().unwrap();
}

/// A socket on which only given bytes arrive.
struct Script(Mutex<VecDeque<u8>>);

impl Socket for Script {
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.lock().unwrap().read(buffer)
    }
    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }
    fn send_now(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }
    fn shutdown(&self, _how: Shutdown) {}
    fn set_receive_timeout(&self, _timeout: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

/// Whatever a server says to our client.
pub fn nbd_client(bytes: &[u8]) {
    let script = Script(Mutex::new(bytes.iter().copied().collect()));
    let Ok(mut client) = Client::over(script, "script", "g/v") else { return };
    let mut buffer = [0; 1024];
    let _ = client.read(0, &mut buffer);
    let _ = client.extents(0, 1 << 20);
    let _ = client.write(0, &buffer);
    let _ = client.flush();
}

/// What a peer sends, before anything of it is believed.
pub fn peer_wire(bytes: &[u8]) {
    tidelog::replication::wire::fuzz(bytes);
}

/// Bytes where a record should be: as they are, and with their checksum mended, which a fuzzer does
/// not find by itself. What is accepted is written again and must be the same header.
pub fn log_record(bytes: &[u8]) {
    let mut mended = bytes.to_vec();
    if let Some(size) = mended.get(8..12) {
        let size = u32::from_le_bytes(size.try_into().unwrap()) as usize;
        if (96..=mended.len()).contains(&size) {
            mended[88..96].fill(0);
            let checksum = xxhash_rust::xxh3::xxh3_64(&mended[..size]);
            mended[88..96].copy_from_slice(&checksum.to_le_bytes());
        }
    }
    for bytes in [bytes, &mended] {
        match Header::decode(bytes) {
            Ok(header) => {
                assert!(header.header_bytes() <= bytes.len() as u64);
                let _ = (header.record_bytes(), header.end(), header.payload_lsn());
                let (mut again, mut out) = (header.clone(), Vec::new());
                again.encode(&mut out);
                assert_eq!(Header::decode(&out), Ok(header));
            }
            Err(RecordError::Short { needed }) => assert!(needed > bytes.len()),
            Err(_) => {}
        }
    }
}

/// A control record's kind (its first byte) and body. What is accepted is kept when it is written.
pub fn control_record(bytes: &[u8]) {
    let Some((kind, body)) = bytes.split_first() else { return };
    if let Ok(Some(control)) = Control::from_json(u32::from(*kind), body) {
        let again = Control::from_json(u32::from(*kind), &control.to_json());
        assert_eq!(again.unwrap(), Some(control));
    }
}

/// A configuration file.
pub fn config(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Err(error) = Config::parse(Path::new("tidelog.toml"), text)
    {
        assert!(!error.to_string().is_empty());
    }
}

/// Words on the command line. What is accepted reads the same when it is printed.
pub fn units(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(name) = text.parse::<Name>() {
        assert_eq!(name.as_str(), text);
        assert!(!text.contains(['/', '@', ' ', '\n']));
    }
    if let Ok(size) = text.parse::<ByteSize>() {
        let _ = size.to_string();
    }
    if let Ok(span) = text.parse::<Span>() {
        assert_eq!(span.to_string().parse::<Span>(), Ok(span));
    }
    if let Ok(time) = text.parse::<LogTime>() {
        assert_eq!(time.to_string().parse::<LogTime>(), Ok(time));
    }
}
