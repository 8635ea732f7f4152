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
use tidelog::events::Events;
use tidelog::group::{
    Group, GroupContext, LocalLimits, NewGroup, NodeIdentity, Op, Read as Fetch, Request, View,
};
use tidelog::io::{Disk, DiskFile, Env, ManualClock, MemoryDisk, OpenMode, SeededEntropy};
use tidelog::log::control::Control;
use tidelog::log::record::{Header, RecordError};
use tidelog::nbd::{
    Client, NbdAddress, NbdListen, NbdServer, RamDevice, RamExports, Socket, listen,
};
use tidelog::node::Node;
use tidelog::units::{ByteSize, GroupId, LogTime, Name, NodeId, Span, VolumeNumber};

/// A target: its name (and that of its corpus), its body.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("nbd_server", nbd_server),
    ("nbd_client", nbd_client),
    ("peer_wire", peer_wire),
    ("log_record", log_record),
    ("log_recovery", log_recovery),
    ("control_record", control_record),
    ("control_request", control_request),
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

    fn set_send_timeout(&self, _timeout: Option<Duration>) -> io::Result<()> {
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

const GROUP_DIR: &str = "/data/groups/g";
const RECOVERY_VOLUME_BYTES: usize = 32 << 10;

/// A disk as a killed process left it, its files, and what the volume held behind each request.
struct Left {
    disk: MemoryDisk,
    files: Vec<PathBuf>,
    moments: Vec<Vec<u8>>,
}

fn group_context(disk: &MemoryDisk) -> GroupContext {
    let clock = Arc::new(ManualClock::new(LogTime(1_700_000_000_000_000_000)));
    GroupContext {
        env: Env { disk: Arc::new(disk.clone()), clock, entropy: Arc::new(SeededEntropy::new(1)) },
        node: NodeIdentity { id: NodeId([3; 16]), name: "n".parse().unwrap() },
        limits: LocalLimits::default(),
        failures: None,
        events: Events::in_memory(),
    }
}

/// A base, a log of which a part was synced, and metadata; made once.
fn left() -> &'static Left {
    static LEFT: OnceLock<Left> = OnceLock::new();
    LEFT.get_or_init(|| {
        let disk = MemoryDisk::new();
        disk.create_dir(Path::new(GROUP_DIR)).unwrap();
        let new =
            NewGroup { id: GroupId([7; 16]), name: "g".parse().unwrap(), segment_bytes: 64 << 10 };
        let group = Group::create(group_context(&disk), Path::new(GROUP_DIR), new).unwrap();
        group.create_volume("v".parse().unwrap(), RECOVERY_VOLUME_BYTES as u64).unwrap();
        let mut moments = vec![vec![0; RECOVERY_VOLUME_BYTES]];
        for version in 1..=12u8 {
            let (offset, data) = (usize::from(version) * 1536, vec![version; 3072]);
            let op = Op::Write { offset: offset as u64, data: &data };
            let request = Request { volume: VolumeNumber(1), op, fua: version % 5 == 0 };
            group.append(&[request]).pop().unwrap().unwrap();
            let mut contents = moments.last().unwrap().clone();
            contents[offset..offset + data.len()].copy_from_slice(&data);
            moments.push(contents);
            if version == 6 {
                group.sync_now().unwrap();
            }
        }
        let disk = disk.snapshot();
        let mut files = Vec::new();
        list(&disk, Path::new(GROUP_DIR), &mut files);
        Left { disk, files, moments }
    })
}

fn list(disk: &MemoryDisk, dir: &Path, files: &mut Vec<PathBuf>) {
    for name in disk.list(dir).unwrap() {
        let path = dir.join(name);
        if disk.list(&path).is_ok() {
            list(disk, &path, files);
        } else {
            files.push(path);
        }
    }
}

/// Damage to the files of a group, then its start. The bytes are edits: file (1), what (1), offset
/// in steps of 8 (2), length (1), and as many bytes. Even kinds write them there, 1 cuts the file
/// there, 3 removes it, 5 mends the checksum of a record that begins there. It never panics. Where
/// no checksum was mended, the volume shows one moment of its history, or errors in its place.
pub fn log_recovery(mut bytes: &[u8]) {
    let left = left();
    let disk = left.disk.snapshot();
    let mut mended = false;
    while let [file, what, low, high, length, rest @ ..] = bytes {
        let path = &left.files[usize::from(*file) % left.files.len()];
        let offset = u64::from(u16::from_le_bytes([*low, *high])) * 8;
        let data = &rest[..rest.len().min(usize::from(*length))];
        bytes = &rest[data.len()..];
        let Ok(file) = disk.open(path, OpenMode::ReadWrite) else { continue };
        match what % 8 {
            1 => file.set_len(offset.min(file.len().unwrap())).unwrap(),
            3 => disk.remove(path).unwrap(),
            5 => mended |= mend(&*file, offset),
            _ => drop(file.write_at(&[io::IoSlice::new(data)], offset)),
        }
    }
    let Ok((group, _)) = Group::open(group_context(&disk), Path::new(GROUP_DIR)) else { return };
    let mut shown = Vec::new();
    for sector in 0..RECOVERY_VOLUME_BYTES / 512 {
        let mut buffer = vec![0; 512];
        let offset = sector as u64 * 512;
        let mut reads =
            [Fetch { volume: VolumeNumber(1), offset, buffer: &mut buffer, result: Ok(()) }];
        group.read(&mut reads);
        let [read] = reads;
        let is_read = read.result.is_ok();
        shown.push(is_read.then_some(buffer));
    }
    if mended || group.control().volumes.len() != 1 {
        return;
    }
    let agrees = |contents: &Vec<u8>| {
        shown
            .iter()
            .zip(contents.chunks(512))
            .all(|(shown, held)| shown.as_ref().is_none_or(|shown| shown == held))
    };
    let state = group.data_state().0;
    assert!(
        left.moments.iter().any(agrees),
        "what is shown is no moment of the history; {state:?}"
    );
}

/// Gives a record that begins at an offset the checksum of what it holds by now.
fn mend(file: &dyn DiskFile, offset: u64) -> bool {
    let mut head = vec![0; 96];
    if file.read_at(&mut head, offset).is_err() {
        return false;
    }
    let size = u32::from_le_bytes(head[8..12].try_into().unwrap()) as usize;
    if !(96..=4096).contains(&size) {
        return false;
    }
    let mut record = vec![0; size];
    if file.read_at(&mut record, offset).is_err() {
        return false;
    }
    record[88..96].fill(0);
    let checksum = xxhash_rust::xxh3::xxh3_64(&record);
    file.write_at(&[io::IoSlice::new(&checksum.to_le_bytes())], offset + 88).is_ok()
}

struct Asked {
    socket: PathBuf,
    _runtime: tokio::runtime::Runtime,
    _node: Mutex<Node>,
    _dir: tempfile::TempDir,
}

/// One node for the whole process: what one request does must not harm the next.
fn node() -> &'static Asked {
    static ASKED: OnceLock<Asked> = OnceLock::new();
    ASKED.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("run/control.sock");
        let text = format!(
            "node = \"a\"\ndata_dir = \"{0}/data\"\n[control]\nsocket = \"{1}\"\n\
             [[nbd]]\nlisten = \"unix:{0}/run/nbd.sock\"\n",
            dir.path().display(),
            socket.display()
        );
        let config = Config::parse(Path::new("tidelog.toml"), &text).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let node = runtime.block_on(Node::start(config)).unwrap();
        Asked { socket, _runtime: runtime, _node: Mutex::new(node), _dir: dir }
    })
}

fn ask(socket: &Path, request: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

/// A request to the control socket: its first line is method and path, what follows is the body.
/// The answer is never a bug of ours, and the next request is answered.
pub fn control_request(bytes: &[u8]) {
    let line_end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let (line, body) = (&bytes[..line_end], bytes.get(line_end + 1..).unwrap_or(&[]));
    // Followers of events stay for ever, and paths in a body name files of this machine.
    if line.windows(6).any(|part| part == b"events") || body.contains(&b'/') {
        return;
    }
    let control = node();
    let mut request = line.to_vec();
    request.extend_from_slice(
        format!(
            " HTTP/1.1\r\nhost: tidelog\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        )
        .as_bytes(),
    );
    request.extend_from_slice(body);
    let answer = ask(&control.socket, &request);
    let text = String::from_utf8_lossy(&answer);
    assert!(!text.starts_with("HTTP/1.1 500"), "{text}");
    let status = b"GET /v1/status HTTP/1.1\r\nhost: tidelog\r\nconnection: close\r\n\r\n";
    let answer = ask(&control.socket, status);
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
}
