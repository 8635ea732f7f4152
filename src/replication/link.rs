//! The sockets of the peer links: dialling, accepting, TLS, hello, and one reader and one writer
//! for each connection.
//!
//! The writer sends messages before log frames, one frame at a time, so that a heartbeat waits for
//! at most one frame. A log frame is read from the log when its turn comes, not before.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::units::{GroupId, NodeId};

use super::bounds::{Bodies, Calls, Handshakes, Room, room_for};
use super::bulk::{Bulk, Ready, Waiting};
use super::core::{ConnId, Input};
use super::pairing::{EXPORTER_BYTES, EXPORTER_LABEL, Fingerprint};
use super::service::{Answered, Shared};
use super::tls;
use super::wire::{
    FRAME_HEADER_BYTES, FrameHeader, FrameKind, HELLO_BYTES, Hello, Message, Purpose, VERSIONS,
    Verdict,
};

/// A handshake (TCP, TLS, hello) takes at most this long.
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of messages that may wait for a connection before it is given up.
const QUEUED_BYTES_MAX: usize = 32 << 20;
/// Why connections end when this node's key changes.
const NEW_KEY: &str = "this node has a new key";

/// A connection with TLS on it, from either side.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// How the rest of the service reaches a connection.
pub(super) struct Conn {
    pub(super) peer: NodeId,
    /// The key that the peer showed.
    pub(super) key: Fingerprint,
    messages: mpsc::UnboundedSender<Vec<u8>>,
    queued_bytes: Arc<AtomicUsize>,
    bulk: mpsc::UnboundedSender<Waiting>,
    /// Calls of the peer that are served.
    pub(super) calls: Calls,
    close: watch::Sender<Option<String>>,
}

impl Conn {
    /// Queues a message.
    pub(super) fn send(&self, message: &Message) {
        match message.to_frame() {
            Ok(frame) => {
                let queued = self.queued_bytes.fetch_add(frame.len(), Ordering::Relaxed);
                if queued > QUEUED_BYTES_MAX {
                    self.close("the peer takes no messages".to_owned());
                }
                // Fails where the connection has just ended, which the reader tells.
                let _ = self.messages.send(frame);
            }
            Err(error) => self.close(error.to_string()),
        }
    }

    /// Queues a frame of bulk.
    pub(super) fn send_bulk(&self, group: GroupId, stream: u64, bulk: Bulk) {
        let _ = self.bulk.send(Waiting { group, stream, bulk });
    }

    /// Ends the connection, which shows a key that this node has no more.
    pub(super) fn close_for_new_key(&self) {
        self.close(NEW_KEY.to_owned());
    }

    /// Waits for the connection's end.
    pub(super) async fn closed(&self) {
        // Fails where the sender is gone, which is this.
        let _ = self.close.subscribe().wait_for(Option::is_some).await;
    }

    /// Ends the connection.
    pub(super) fn close(&self, reason: String) {
        self.close.send_if_modified(|closed| {
            let first = closed.is_none();
            closed.get_or_insert(reason);
            first
        });
    }
}

/// A connection after TLS.
pub(super) struct Secured {
    pub(super) stream: Box<dyn Stream>,
    /// The key that this node showed.
    pub(super) own: Fingerprint,
    pub(super) fingerprint: Fingerprint,
    pub(super) exported: [u8; EXPORTER_BYTES],
}

/// Dials an address and does TLS.
pub(super) async fn connect(shared: &Shared, address: &str) -> Result<Secured, String> {
    let work = async {
        let tcp = TcpStream::connect(address)
            .await
            .map_err(|error| format!("could not connect to {address}: {error}"))?;
        prepare(&tcp)?;
        let identity = shared.identity();
        let connector = TlsConnector::from(Arc::clone(&identity.client));
        let stream = connector
            .connect(tls::server_name(), tcp)
            .await
            .map_err(|error| format!("TLS with {address}: {error}"))?;
        let (_, session) = stream.get_ref();
        let fingerprint = tls::peer_fingerprint(session.peer_certificates())?;
        let mut exported = [0; EXPORTER_BYTES];
        session
            .export_keying_material(&mut exported, EXPORTER_LABEL, None)
            .map_err(|error| format!("TLS with {address}: {error}"))?;
        let own = identity.fingerprint;
        Ok(Secured { stream: Box::new(stream), own, fingerprint, exported })
    };
    timeout(HANDSHAKE_TIMEOUT, work)
        .await
        .map_err(|_| format!("{address} did not answer within {HANDSHAKE_TIMEOUT:?}"))?
}

fn prepare(tcp: &TcpStream) -> Result<(), String> {
    tcp.set_nodelay(true).map_err(|error| format!("socket: {error}"))
}

/// Sends this node's hello and reads the other's.
pub(super) async fn greet(
    shared: &Shared,
    stream: &mut Box<dyn Stream>,
    purpose: Purpose,
    wanted: Option<NodeId>,
) -> Result<Hello, String> {
    let work = async {
        let hello = shared.hello(purpose, Verdict::Welcome, wanted);
        stream.write_all(&hello.encode()).await?;
        stream.flush().await?;
        let mut bytes = [0; HELLO_BYTES];
        stream.read_exact(&mut bytes).await?;
        Ok::<_, std::io::Error>((hello, bytes))
    };
    let (ours, bytes) = timeout(HANDSHAKE_TIMEOUT, work)
        .await
        .map_err(|_| format!("no hello within {HANDSHAKE_TIMEOUT:?}"))?
        .map_err(|error| format!("hello: {error}"))?;
    let theirs = Hello::decode(&bytes).map_err(|error| error.to_string())?;
    if theirs.verdict != Verdict::Welcome {
        return Err(format!("refused: {}", theirs.verdict.text()));
    }
    if ours.common_version(&theirs).is_none() {
        return Err(Verdict::NoCommonVersion.text().to_owned());
    }
    Ok(theirs)
}

/// Dials a peer; the result reaches the core.
pub(super) async fn dial(shared: Arc<Shared>, peer: NodeId) {
    if let Err(reason) = try_dial(&shared, peer).await {
        shared.input(peer, Input::DialFailed { reason });
    }
}

async fn try_dial(shared: &Arc<Shared>, node: NodeId) -> Result<(), String> {
    let peer = shared.peer(node).ok_or("it is not a peer any more")?;
    let address = peer.address.ok_or("there is no address to dial")?;
    let mut secured = connect(shared, &address).await?;
    if !peer.fingerprints.contains(&secured.fingerprint) {
        return Err(format!(
            "the node at {address} shows another key than the one that was paired; if it was made \
             anew, `tidelog peer remove {}` and pair again",
            peer.name
        ));
    }
    let hello = greet(shared, &mut secured.stream, Purpose::Link, Some(node)).await?;
    if hello.node != node {
        return Err(Verdict::OtherIdentity.text().to_owned());
    }
    run_connection(shared, node, secured, true, &hello);
    Ok(())
}

/// Accepts connections until the service ends.
pub(super) async fn listen(shared: Arc<Shared>, listener: TcpListener) {
    let strangers = Arc::new(Handshakes::default());
    let mut shutdown = shared.shutdown_signal();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = shutdown.wait_for(|ending| *ending) => return,
        };
        let (tcp, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, mostly: give those that run a moment to end.
                tracing::warn!("peer listener: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(handshake) = strangers.begin(from.ip()) else { continue };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let served = timeout(HANDSHAKE_TIMEOUT, serve(&shared, tcp)).await;
            drop(handshake);
            match served {
                Ok(Ok(())) => {}
                Ok(Err(reason)) => tracing::info!("peer connection: {reason}"),
                Err(_) => tracing::info!("peer connection: no handshake in time"),
            }
        });
    }
}

/// Does the handshake of an accepted connection, and starts what it is for.
async fn serve(shared: &Arc<Shared>, tcp: TcpStream) -> Result<(), String> {
    prepare(&tcp)?;
    let identity = shared.identity();
    let acceptor = TlsAcceptor::from(Arc::clone(&identity.server));
    let stream = acceptor.accept(tcp).await.map_err(|error| format!("TLS: {error}"))?;
    let (_, session) = stream.get_ref();
    let fingerprint = tls::peer_fingerprint(session.peer_certificates())?;
    let mut exported = [0; EXPORTER_BYTES];
    session
        .export_keying_material(&mut exported, EXPORTER_LABEL, None)
        .map_err(|error| format!("TLS: {error}"))?;
    let mut stream: Box<dyn Stream> = Box::new(stream);
    let mut bytes = [0; HELLO_BYTES];
    stream.read_exact(&mut bytes).await.map_err(|error| format!("hello: {error}"))?;
    let theirs = Hello::decode(&bytes).map_err(|error| error.to_string())?;
    let (verdict, peer) = judge(shared, &theirs, &fingerprint);
    let ours = shared.hello(theirs.purpose, verdict, None);
    stream.write_all(&ours.encode()).await.map_err(|error| format!("hello: {error}"))?;
    stream.flush().await.map_err(|error| format!("hello: {error}"))?;
    if verdict != Verdict::Welcome {
        // Let the other side read the answer before the socket closes.
        let _ = stream.shutdown().await;
        return Err(format!("node {} ({fingerprint}) refused: {verdict:?}", theirs.node));
    }
    let secured = Secured { stream, own: identity.fingerprint, fingerprint, exported };
    match (theirs.purpose, peer) {
        (Purpose::Pair, _) => shared.serve_pairing(secured, theirs.node).await,
        (Purpose::Link, Some(peer)) => {
            run_connection(shared, peer, secured, false, &theirs);
            Ok(())
        }
        (Purpose::Link, None) => Err("a link without a peer".to_owned()),
    }
}

/// Judges a dialler by its hello and its key.
fn judge(shared: &Shared, theirs: &Hello, fingerprint: &Fingerprint) -> (Verdict, Option<NodeId>) {
    let ours = shared.hello(theirs.purpose, Verdict::Welcome, None);
    if ours.common_version(theirs).is_none() {
        return (Verdict::NoCommonVersion, None);
    }
    if theirs.node == ours.node {
        return (Verdict::SameNode, None);
    }
    if theirs.wanted.is_some_and(|wanted| wanted != ours.node) {
        return (Verdict::OtherNode, None);
    }
    if theirs.purpose == Purpose::Pair {
        return (Verdict::Welcome, None);
    }
    match shared.peer_by_fingerprint(fingerprint) {
        None => (Verdict::UnknownKey, None),
        Some(peer) if peer.node != theirs.node => (Verdict::OtherIdentity, None),
        Some(peer) => (Verdict::Welcome, Some(peer.node)),
    }
}

/// Starts reader and writer of a connection that has passed every check.
fn run_connection(
    shared: &Arc<Shared>,
    peer: NodeId,
    secured: Secured,
    dialled: bool,
    hello: &Hello,
) {
    debug_assert!(VERSIONS.contains(&1));
    let Secured { stream, own, fingerprint: key, .. } = secured;
    // Paired a moment ago, or removed: without a core nobody would end it. It is dialled again.
    if !shared.has_core(peer) {
        return;
    }
    let conn = shared.next_conn();
    let (messages, message_queue) = mpsc::unbounded_channel();
    let (bulk, bulk_queue) = mpsc::unbounded_channel();
    let (close, closed) = watch::channel(None);
    let queued_bytes = Arc::new(AtomicUsize::new(0));
    let handle = Arc::new(Conn {
        peer,
        key,
        messages,
        queued_bytes: Arc::clone(&queued_bytes),
        bulk,
        calls: Calls::default(),
        close,
    });
    handle.send(&shared.welcome());
    shared.add_conn(conn, Arc::clone(&handle));
    if shared.identity().fingerprint != own {
        handle.close_for_new_key();
    }
    shared.settle_key(peer, key);
    shared.input(peer, Input::ConnUp { conn, dialled, incarnation: hello.incarnation });

    let (reading, writing) = tokio::io::split(stream);
    let writer = Writer {
        shared: Arc::clone(shared),
        peer,
        stream: writing,
        messages: message_queue,
        queued_bytes,
        bulk: bulk_queue,
    };
    let reader = Reader {
        shared: Arc::clone(shared),
        conn,
        handle: Arc::clone(&handle),
        stream: reading,
        room: shared.room_of(peer),
        bodies: Bodies::default(),
    };
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let mut closed = closed;
        let mut shutdown = shared.shutdown_signal();
        let reason = tokio::select! {
            reason = reader.run() => reason,
            reason = writer.run() => reason,
            reason = closed.wait_for(Option::is_some) => {
                reason.ok().and_then(|reason| reason.clone()).unwrap_or_default()
            }
            _ = shutdown.wait_for(|ending| *ending) => "this node shuts down".to_owned(),
        };
        handle.close(reason.clone());
        shared.remove_conn(conn);
        shared.input(peer, Input::ConnDown { conn, reason });
    });
}

struct Writer {
    shared: Arc<Shared>,
    peer: NodeId,
    stream: WriteHalf<Box<dyn Stream>>,
    messages: mpsc::UnboundedReceiver<Vec<u8>>,
    queued_bytes: Arc<AtomicUsize>,
    bulk: mpsc::UnboundedReceiver<Waiting>,
}

impl Writer {
    /// Writes until the connection ends; why.
    async fn run(mut self) -> String {
        loop {
            let result = tokio::select! {
                biased;
                message = self.messages.recv() => match message {
                    Some(frame) => self.write_message(&frame).await,
                    None => return "closed".to_owned(),
                },
                waiting = self.bulk.recv() => match waiting {
                    Some(waiting) => self.write_bulk(waiting).await,
                    None => return "closed".to_owned(),
                },
            };
            if let Err(error) = result {
                return format!("could not send: {error}");
            }
        }
    }

    async fn write_message(&mut self, frame: &[u8]) -> std::io::Result<()> {
        self.queued_bytes.fetch_sub(frame.len(), Ordering::Relaxed);
        self.stream.write_all(frame).await?;
        self.flush_if_idle().await
    }

    async fn write_bulk(&mut self, waiting: Waiting) -> std::io::Result<()> {
        let replica = self.shared.replica(waiting.group);
        let read = tokio::task::spawn_blocking(move || waiting.read(replica)).await;
        // Else this node shuts down.
        let Ok(read) = read else { return Ok(()) };
        match read {
            Ok(Ready { frame, sent }) => {
                self.stream.write_all(&frame).await?;
                self.shared.input(self.peer, sent);
                self.flush_if_idle().await
            }
            Err(failed) => {
                self.shared.input(self.peer, failed);
                Ok(())
            }
        }
    }

    /// TLS gathers small writes; they go out when nothing follows at once.
    async fn flush_if_idle(&mut self) -> std::io::Result<()> {
        if self.messages.is_empty() && self.bulk.is_empty() {
            self.stream.flush().await?;
        }
        Ok(())
    }
}

struct Reader {
    shared: Arc<Shared>,
    conn: ConnId,
    handle: Arc<Conn>,
    stream: ReadHalf<Box<dyn Stream>>,
    /// What the peer's frames may take until they are handled.
    room: Arc<Semaphore>,
    bodies: Bodies,
}

impl Reader {
    /// Reads until the connection ends; why.
    async fn run(mut self) -> String {
        loop {
            if let Err(reason) = self.read_frame().await {
                return reason;
            }
        }
    }

    async fn read_frame(&mut self) -> Result<(), String> {
        let mut header = [0; FRAME_HEADER_BYTES];
        let lost = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => "the peer closed the connection".to_owned(),
            _ => format!("could not receive: {error}"),
        };
        self.stream.read_exact(&mut header).await.map_err(lost)?;
        let header = FrameHeader::decode(&header).map_err(|error| error.to_string())?;
        let payload_bytes = header.payload_bytes as usize;
        let room = room_for(&self.room, payload_bytes).await.ok_or("closed")?;
        let mut payload = vec![0; payload_bytes];
        self.stream.read_exact(&mut payload).await.map_err(lost)?;
        let peer = self.handle.peer;
        match header.kind {
            FrameKind::Log => {
                let input = Input::Log {
                    conn: self.conn,
                    group: header.group,
                    stream: header.stream,
                    position: header.position,
                    bytes: Bytes::from(payload),
                };
                self.shared.input_of_peer(peer, input, room);
            }
            FrameKind::Image => {
                let input = Input::Part {
                    conn: self.conn,
                    group: header.group,
                    stream: header.stream,
                    number: header.position.0,
                    bytes: Bytes::from(payload),
                };
                self.shared.input_of_peer(peer, input, room);
            }
            FrameKind::Control => {
                let message = Message::decode(&payload).map_err(|error| error.to_string())?;
                self.on_message(message, room)?;
            }
        }
        Ok(())
    }

    fn on_message(&mut self, message: Message, room: Room) -> Result<(), String> {
        let peer = self.handle.peer;
        match message {
            Message::Part { id, answer, body } => {
                self.bodies.add(id, answer, &body)?;
            }
            Message::Call { id, method, body } => {
                let body = self.bodies.finish(id, false, body);
                self.shared.serve_call(&self.handle, id, method, body);
            }
            Message::Answer { id, ok, body } => {
                let body = self.bodies.finish(id, true, body);
                let failed = |body: Vec<u8>| String::from_utf8_lossy(&body).into_owned();
                let answer = if ok { Answered::Well(body) } else { Answered::Failed(failed(body)) };
                self.shared.answered(self.conn, id, answer);
            }
            Message::Declined { id, reason } => {
                self.shared.answered(self.conn, id, Answered::Declined(reason));
            }
            Message::Welcome { name, address, program } => {
                self.shared.on_welcome(peer, &name, &address, &program);
            }
            message => {
                let wall = self.shared.wall();
                let input = Input::Message { conn: self.conn, message, wall };
                self.shared.input_of_peer(peer, input, room);
                return Ok(());
            }
        }
        self.shared.input_of_peer(peer, Input::Heard { conn: self.conn }, room);
        Ok(())
    }
}

/// Sends one message as a frame, outside of a running connection.
pub(super) async fn write_message(
    stream: &mut Box<dyn Stream>,
    message: &Message,
) -> Result<(), String> {
    let frame = message.to_frame().map_err(|error| error.to_string())?;
    stream.write_all(&frame).await.map_err(|error| format!("could not send: {error}"))?;
    stream.flush().await.map_err(|error| format!("could not send: {error}"))
}

/// Reads one message, outside of a running connection.
pub(super) async fn read_message(stream: &mut Box<dyn Stream>) -> Result<Message, String> {
    let lost = |error: std::io::Error| format!("could not receive: {error}");
    let mut header = [0; FRAME_HEADER_BYTES];
    stream.read_exact(&mut header).await.map_err(lost)?;
    let header = FrameHeader::decode(&header).map_err(|error| error.to_string())?;
    if header.kind != FrameKind::Control {
        return Err("a log frame where a message was expected".to_owned());
    }
    let mut payload = vec![0; header.payload_bytes as usize];
    stream.read_exact(&mut payload).await.map_err(lost)?;
    Message::decode(&payload).map_err(|error| error.to_string())
}
