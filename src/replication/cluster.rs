//! Two cores under one seed: simulated time, links that delay, drop, duplicate and are cut at any
//! byte, nodes that restart, and logs of a simple kind that check every byte they take.
//!
//! What must hold at every moment is in [`World::check`]; what must come about once everything is
//! well again, in the tests.

mod copies;
mod heard;
mod images;
mod required;
mod returns;
mod stops;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::io::{Entropy, SeededEntropy, seeds};
use crate::log::control::Mode;
use crate::units::{Chain, EpochId, GroupId, Incarnation, LogTime, Lsn, Name, NodeId};

use super::channel::ReplicationState;
use super::core::{Appended, ConnId, Input, LocalGroup, Membership, Output, PeerCore, Settings};
use super::epoch::{History, Reign};
use super::status::secondary_lag;
use super::wire::{FRAME_HEADER_BYTES, FrameHeader, FrameKind, Message, NeedsImage};

const GROUP: GroupId = GroupId([7; 16]);
const RECORD_BYTES: usize = 64;
const HEARTBEAT: Duration = Duration::from_secs(1);

/// A log of records of 64 bytes: kind, epoch, counter, author, position, chain before, checksum.
#[derive(Clone, Default)]
struct TestLog {
    bytes: Vec<u8>,
    tail: Vec<u8>,
    reigns: Vec<Reign>,
    durable: usize,
    start: u64,
    /// When each record was appended by its author; kept beside, for the truth about lag.
    times: Vec<Duration>,
}

impl TestLog {
    fn head(&self) -> Lsn {
        Lsn(self.bytes.len() as u64)
    }

    fn chain_at(&self, end: usize) -> Option<Chain> {
        if end == 0 || !end.is_multiple_of(RECORD_BYTES) || end > self.bytes.len() {
            return None;
        }
        Some(Chain(u64::from_le_bytes(self.bytes[end - 8..end].try_into().unwrap())))
    }

    fn chain(&self) -> Chain {
        self.chain_at(self.bytes.len()).unwrap_or_default()
    }

    /// A new reign has its id, its author, and the number that it is to be above.
    fn append(&mut self, now: Duration, new_reign: Option<(EpochId, NodeId, u64)>) {
        let first_lsn = self.head();
        if let Some((id, author, above)) = new_reign {
            let counter = self.reigns.last().map_or(0, |reign| reign.counter).max(above) + 1;
            self.reigns.push(Reign { id, counter, first_lsn, author });
        }
        let reign = *self.reigns.last().unwrap();
        let mut record = Vec::with_capacity(RECORD_BYTES);
        record.extend_from_slice(&u64::from(new_reign.is_some()).to_le_bytes());
        record.extend_from_slice(&reign.id.0.to_le_bytes());
        record.extend_from_slice(&reign.counter.to_le_bytes());
        record.extend_from_slice(&reign.author.0);
        record.extend_from_slice(&first_lsn.0.to_le_bytes());
        record.extend_from_slice(&self.chain().0.to_le_bytes());
        let checksum = xxh3_64(&record);
        record.extend_from_slice(&checksum.to_le_bytes());
        self.bytes.extend_from_slice(&record);
        self.times.push(now);
    }

    fn receive(&mut self, at: Lsn, bytes: &[u8]) -> Result<(), String> {
        if at.0 != (self.bytes.len() + self.tail.len()) as u64 {
            return Err(format!("bytes for {at} do not continue the log"));
        }
        self.tail.extend_from_slice(bytes);
        while self.tail.len() >= RECORD_BYTES {
            let record: Vec<u8> = self.tail.drain(..RECORD_BYTES).collect();
            let field = |at: usize| u64::from_le_bytes(record[at..at + 8].try_into().unwrap());
            let whole = xxh3_64(&record[..RECORD_BYTES - 8]) == field(56)
                && field(40) == self.head().0
                && field(48) == self.chain().0;
            if !whole {
                return Err(format!("the record at {} does not continue the chain", self.head()));
            }
            if field(0) == 1 {
                self.reigns.push(Reign {
                    id: EpochId(field(8)),
                    counter: field(16),
                    first_lsn: self.head(),
                    author: NodeId(record[24..40].try_into().unwrap()),
                });
            }
            self.bytes.extend_from_slice(&record);
        }
        Ok(())
    }

    fn cut(&mut self, at: usize) -> Vec<u8> {
        self.tail.clear();
        self.times.truncate(at / RECORD_BYTES);
        self.reigns.retain(|reign| reign.first_lsn.0 < at as u64);
        self.durable = self.durable.min(at);
        self.bytes.split_off(at)
    }

    fn history(&self) -> History {
        History { reigns: Arc::new(self.reigns.clone()), head: self.head(), chain: self.chain() }
    }
}

struct Node {
    name: Name,
    core: PeerCore,
    log: TestLog,
    primary: bool,
    recovering: bool,
    /// By a reign of the peer.
    held_back: Option<u64>,
    split_brain: bool,
    /// Something was lost: a new reign begins before anything is appended.
    reign_due: bool,
    /// What cuts took off, each with where.
    branches: Vec<(usize, Vec<u8>)>,
    cuts: u64,
    /// Times that it asked for the log.
    asks: u64,
    /// An image that is kept for the peer, and one that comes from it.
    shipment: Option<images::Shipment>,
    staging: Option<images::Staging>,
    /// Images that took the place of what was here.
    switches: u32,
    /// What its log lacks besides the log; all of an image ends that.
    needs: NeedsImage,
    lost_power: bool,
    incarnation: u64,
    up: bool,
    /// Another node whose log it follows.
    follows: Option<Name>,
    /// Reigns that their authors have given up.
    given_up: BTreeSet<EpochId>,
    membership: Membership,
    retired: bool,
    /// Its disk takes nothing, and gives nothing.
    broken_disk: bool,
    /// Its disk does not answer.
    hung_disk: bool,
    /// What comes ends no request, so that it waits in memory.
    unfinished: bool,
    /// What a peer that answers wait for holds, while it does.
    peer_holds: Option<(Lsn, Lsn)>,
    /// Why it was lost last.
    peer_lost: Option<String>,
    /// Jobs that failed by it.
    disk_errors: u32,
    events: Vec<&'static str>,
    /// What the events said.
    said: Vec<String>,
}

impl Node {
    /// As the engine does it.
    fn yield_to(
        &mut self,
        at: Lsn,
        chain: Option<Chain>,
        authored_too: bool,
    ) -> Result<(), String> {
        let (me, head) = (node_id(usize::from(self.name.as_str() == "b")), self.log.head());
        if self.primary && !self.recovering && !authored_too {
            return Err("it serves".to_owned());
        }
        let here = self.log.chain_at(at.0 as usize);
        if here.is_none() || chain.is_some_and(|chain| here != Some(chain)) {
            return Err("the log differs before that already".to_owned());
        }
        let ends = self.log.reigns.iter().skip(1).map(|reign| reign.first_lsn).chain([head]);
        let authored =
            self.log.reigns.iter().zip(ends).any(|(reign, end)| reign.author == me && end > at);
        if authored && !self.recovering && !authored_too {
            return Err("it was written here; `tidelog resolve g --preview` shows it".to_owned());
        }
        (self.primary, self.recovering, self.reign_due) = (false, false, false);
        self.split_brain = false;
        let branch = self.log.cut(at.0 as usize);
        self.cuts += 1;
        if !branch.is_empty() {
            self.branches.push((at.0 as usize, branch));
        }
        Ok(())
    }

    fn local(&self) -> LocalGroup {
        LocalGroup {
            id: GROUP,
            name: "g".parse().unwrap(),
            primary: self.primary,
            recovering: self.recovering,
            incarnation: Incarnation(self.incarnation),
            history: self.log.history(),
            durable: Lsn(self.log.durable as u64),
            requests: self.log.bytes.len() as u64 / RECORD_BYTES as u64,
            log_start: Lsn(self.log.start),
            cuts: self.cuts,
            failed: false,
            retired: self.retired,
            membership: self.membership,
            follows: self.follows.clone(),
            authored: false,
            given_up: self.given_up.clone(),
        }
    }
}

/// One direction of a connection.
#[derive(Default)]
struct Pipe {
    received: Vec<u8>,
    /// Bytes after which the connection is cut; `None` never.
    cut_after: Option<usize>,
    sent: usize,
    last_arrival: Duration,
}

struct Connection {
    dialled_by: usize,
    pipes: [Pipe; 2],
    /// Bytes were lost: nothing passes any more, and nobody is told.
    dead: bool,
    /// Per side: whether it still believes in it.
    open: [bool; 2],
    /// Per side: whether it knows of it; what arrives before waits.
    up: [bool; 2],
}

enum Event {
    Feed(usize, u64, Input),
    /// The group is looked at anew.
    Look(usize, u64),
    Arrive {
        conn: ConnId,
        to: usize,
        bytes: Vec<u8>,
    },
    ConnUp {
        conn: ConnId,
        side: usize,
        life: u64,
    },
    Wake(usize),
    Sync(usize),
}

/// What happens to the network.
#[derive(Clone, Copy, Default)]
struct Weather {
    delay_most: Duration,
    /// A message in this many cuts its connection; 0 never.
    cut_one_in: u64,
    partitioned: bool,
}

struct World {
    now: Duration,
    nodes: Vec<Node>,
    queue: BinaryHeap<Reverse<(Duration, u64)>>,
    events: BTreeMap<u64, Event>,
    sequence: u64,
    entropy: SeededEntropy,
    connections: BTreeMap<ConnId, Connection>,
    weather: Weather,
    lives: [u64; 2],
    /// When each is woken next, if at all.
    wakes: [Duration; 2],
    /// Something was done behind the nodes' backs of which they cannot know yet.
    tampered: bool,
    /// For the byte-cut test: the next connection is cut after this many bytes towards a side.
    cut_next: Option<(usize, usize)>,
    conversation: [usize; 2],
}

fn node_id(side: usize) -> NodeId {
    NodeId([side as u8 + 1; 16])
}

impl World {
    fn new(seed: u64) -> World {
        let nodes = (0..2)
            .map(|side| Node {
                name: ["a", "b"][side].parse().unwrap(),
                core: new_core(Duration::ZERO, side),
                log: TestLog::default(),
                primary: side == 0,
                recovering: false,
                held_back: None,
                split_brain: false,
                reign_due: false,
                branches: Vec::new(),
                cuts: 0,
                asks: 0,
                shipment: None,
                staging: None,
                switches: 0,
                needs: NeedsImage::No,
                lost_power: false,
                incarnation: side as u64 + 1,
                up: true,
                follows: None,
                given_up: BTreeSet::new(),
                membership: Membership::Member { rpo_target: None, mode: Mode::Async },
                retired: false,
                broken_disk: false,
                hung_disk: false,
                unfinished: false,
                peer_holds: None,
                peer_lost: None,
                disk_errors: 0,
                events: Vec::new(),
                said: Vec::new(),
            })
            .collect();
        let mut world = World {
            now: Duration::from_secs(100),
            nodes,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            sequence: 0,
            entropy: SeededEntropy::new(seed),
            connections: BTreeMap::new(),
            weather: Weather { delay_most: Duration::from_millis(5), ..Weather::default() },
            lives: [0; 2],
            wakes: [Duration::MAX; 2],
            tampered: false,
            cut_next: None,
            conversation: [0; 2],
        };
        let first = EpochId(world.entropy.next_u64());
        let now = world.now;
        world.nodes[0].log.append(now, Some((first, node_id(0), 0)));
        for side in 0..2 {
            world.start(side);
        }
        world
    }

    fn random(&self, below: u64) -> u64 {
        self.entropy.next_u64() % below
    }

    fn start(&mut self, side: usize) {
        self.look(side);
        self.feed(side, Input::CanDial(true));
        self.schedule(Duration::from_secs(1), Event::Sync(side));
    }

    fn schedule(&mut self, after: Duration, event: Event) {
        self.sequence += 1;
        self.queue.push(Reverse((self.now + after, self.sequence)));
        self.events.insert(self.sequence, event);
    }

    fn delay(&self) -> Duration {
        let most = self.weather.delay_most.as_micros() as u64 + 1;
        Duration::from_micros(self.random(most))
    }

    /// Runs everything that happens within `span`.
    fn run(&mut self, span: Duration) {
        let end = self.now + span;
        while let Some(Reverse((time, sequence))) = self.queue.peek().copied() {
            if time > end {
                break;
            }
            self.queue.pop();
            self.now = self.now.max(time);
            let event = self.events.remove(&sequence).unwrap();
            self.happen(event);
            if !self.tampered {
                self.check();
            }
        }
        self.now = end;
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Feed(side, life, input) => {
                if self.lives[side] == life {
                    self.feed(side, input);
                }
            }
            Event::Look(side, life) => {
                if self.lives[side] == life {
                    self.look(side);
                }
            }
            Event::Wake(side) => {
                if self.wakes[side] <= self.now {
                    self.wakes[side] = Duration::MAX;
                }
                if self.nodes[side].up {
                    self.feed(side, Input::Tick);
                }
            }
            Event::Sync(side) => {
                if self.nodes[side].up {
                    self.nodes[side].log.durable = self.nodes[side].log.bytes.len();
                    self.look(side);
                    self.schedule(Duration::from_secs(1), Event::Sync(side));
                }
            }
            Event::ConnUp { conn, side, life } => {
                let other = self.nodes[1 - side].incarnation;
                let Some(connection) = self.connections.get_mut(&conn) else { return };
                if self.lives[side] != life || !self.nodes[side].up || !connection.open[side] {
                    return;
                }
                connection.up[side] = true;
                let input = Input::ConnUp {
                    conn,
                    dialled: connection.dialled_by == side,
                    incarnation: Incarnation(other),
                };
                self.feed(side, input);
                self.arrive(conn, side, &[]);
            }
            Event::Arrive { conn, to, bytes } => self.arrive(conn, to, &bytes),
        }
    }

    fn feed(&mut self, side: usize, input: Input) {
        if !self.nodes[side].up {
            return;
        }
        let mut outputs = Vec::new();
        let now = self.now;
        self.nodes[side].core.handle(now, input, &mut outputs);
        for output in outputs {
            self.perform(side, output);
        }
        if let Some(wake) = self.nodes[side].core.next_wake()
            && wake < self.wakes[side]
        {
            self.wakes[side] = wake;
            self.schedule(wake.saturating_sub(self.now), Event::Wake(side));
        }
    }

    /// The group of a node tells what it is now.
    fn look(&mut self, side: usize) {
        let local = self.nodes[side].local();
        self.feed(side, Input::Group(Box::new(local)));
    }

    fn later(&mut self, side: usize, input: Input) {
        // Always the same, so that results come in the order of the jobs.
        let delay = Duration::from_micros(20);
        self.schedule(delay, Event::Feed(side, self.lives[side], input));
    }

    fn perform(&mut self, side: usize, output: Output) {
        match output {
            Output::Dial => self.dial(side),
            Output::Close { conn, .. } => self.close(conn, side),
            Output::Send { conn, message } => {
                let bytes = message.to_frame().unwrap();
                self.transmit(conn, side, bytes);
            }
            Output::SendLog { group, stream, .. } if self.nodes[side].broken_disk => {
                self.nodes[side].disk_errors += 1;
                let reason = "input/output error".to_owned();
                self.later(side, Input::ReadFailed { group, stream, reason });
            }
            Output::Append { group, stream, .. } if self.nodes[side].broken_disk => {
                self.nodes[side].disk_errors += 1;
                let reason = "no space left on device".to_owned();
                self.later(side, Input::AppendFailed { group, stream, reason });
            }
            Output::SendLog { conn, group, stream, from, to } => {
                if from.0 < self.nodes[side].log.start {
                    let reason = "it was folded".to_owned();
                    return self.later(side, Input::ReadFailed { group, stream, reason });
                }
                let range = from.0 as usize..to.0 as usize;
                let payload = self.nodes[side].log.bytes[range].to_vec();
                let mut bytes =
                    FrameHeader::log(group, stream, from, payload.len()).encode().to_vec();
                bytes.extend_from_slice(&payload);
                self.transmit(conn, side, bytes);
                self.later(side, Input::Sent { group, stream });
            }
            Output::PeerNeeds { from, .. } => {
                assert!(from <= self.nodes[side].log.head(), "nobody needs what is not there");
            }
            Output::Ship { .. }
            | Output::SendPart { .. }
            | Output::EndShipment { .. }
            | Output::BeginImage { .. }
            | Output::Stage { .. }
            | Output::DropStaging { .. } => self.perform_image(side, output),
            Output::Prepare { group, stream } => {
                self.nodes[side].asks += 1;
                let (staged, needs) = (self.nodes[side].staged(), self.nodes[side].needs);
                let log = &mut self.nodes[side].log;
                log.tail.clear();
                let input = Input::Prepared {
                    group,
                    stream,
                    history: log.history(),
                    durable: Lsn(log.durable as u64),
                    requests: log.head().0 / RECORD_BYTES as u64,
                    staged,
                    needs_image: needs,
                };
                self.later(side, input);
            }
            Output::LookupChain { group, lsn, ticket } => {
                let log = &self.nodes[side].log;
                let there = lsn.0 >= log.start;
                let chain = log.chain_at(lsn.0 as usize).filter(|_| there);
                self.later(side, Input::ChainFound { group, ticket, chain });
            }
            Output::Append { .. } if self.nodes[side].hung_disk => {}
            Output::Append { group, stream, position, bytes } if self.nodes[side].unfinished => {
                let log = &self.nodes[side].log;
                let appended = Appended {
                    group,
                    stream,
                    received: position.advance(bytes.len() as u64),
                    head: log.head(),
                    chain: log.history().chain,
                    durable: Lsn(log.durable as u64),
                    requests: log.head().0 / RECORD_BYTES as u64,
                };
                self.later(side, Input::Appended(appended));
            }
            Output::Append { group, stream, position, bytes } => {
                let node = &self.nodes[side];
                assert!(!node.primary || node.recovering, "a primary that serves takes no bytes");
                let log = &mut self.nodes[side].log;
                let input = match log.receive(position, &bytes) {
                    Ok(()) => Input::Appended(Appended {
                        group,
                        stream,
                        received: Lsn((log.bytes.len() + log.tail.len()) as u64),
                        head: log.head(),
                        chain: log.chain(),
                        durable: Lsn(log.durable as u64),
                        requests: log.head().0 / RECORD_BYTES as u64,
                    }),
                    Err(reason) => Input::AppendFailed { group, stream, reason },
                };
                self.later(side, input);
            }
            Output::Committed { lsn, .. } => {
                assert!(lsn <= self.nodes[side].log.head());
            }
            Output::Serve { .. } => self.serve(side),
            Output::HoldBack { counter, .. } => self.nodes[side].held_back = Some(counter),
            Output::SplitBrain { there_is, .. } => self.nodes[side].split_brain = there_is,
            Output::Yield { group, at, chain } => {
                let input = match self.nodes[side].yield_to(at, chain, false) {
                    Ok(()) => Input::Yielded { group },
                    Err(reason) => Input::YieldRefused { group, reason },
                };
                let local = self.nodes[side].local();
                // Two threads tell of it, so in either order.
                let told = [Input::Group(Box::new(local)), input];
                let [first, second] = if self.random(2) == 0 { told } else { swapped(told) };
                self.later(side, first);
                self.later(side, second);
            }
            Output::FollowChanged { .. } => {
                self.schedule(Duration::from_micros(20), Event::Look(side, self.lives[side]));
            }
            Output::PeerHolds { received, durable, .. } => {
                self.nodes[side].peer_holds = Some((received, durable));
            }
            Output::PeerLost { reason, .. } => {
                self.nodes[side].peer_holds = None;
                self.nodes[side].peer_lost = Some(reason);
            }
            Output::Retire { retired, .. } => self.nodes[side].retired = retired,
            Output::Event { code, text, .. } => {
                self.nodes[side].events.push(code);
                self.nodes[side].said.push(text);
            }
        }
    }

    fn dial(&mut self, side: usize) {
        if self.weather.partitioned || !self.nodes[1 - side].up {
            let input = Input::DialFailed { reason: "no route".to_owned() };
            self.later(side, input);
            return;
        }
        self.sequence += 1;
        let conn = ConnId(self.sequence);
        let mut connection = Connection {
            dialled_by: side,
            pipes: Default::default(),
            dead: false,
            open: [true; 2],
            up: [false; 2],
        };
        if let Some((towards, bytes)) = self.cut_next.take() {
            connection.pipes[towards].cut_after = Some(bytes);
        }
        self.connections.insert(conn, connection);
        for side in 0..2 {
            let delay = self.delay();
            self.schedule(delay, Event::ConnUp { conn, side, life: self.lives[side] });
        }
    }

    fn close(&mut self, conn: ConnId, side: usize) {
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        connection.open[side] = false;
        self.tell_down(conn, 1 - side);
    }

    fn tell_down(&mut self, conn: ConnId, side: usize) {
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        if std::mem::take(&mut connection.open[side]) && !self.weather.partitioned {
            let delay = self.delay();
            let reason = "closed".to_owned();
            let input = Input::ConnDown { conn, reason };
            self.schedule(delay, Event::Feed(side, self.lives[side], input));
        }
    }

    fn cut(&mut self, conn: ConnId) {
        self.tell_down(conn, 0);
        self.tell_down(conn, 1);
    }

    fn transmit(&mut self, conn: ConnId, from: usize, mut bytes: Vec<u8>) {
        let to = 1 - from;
        self.conversation[to] += bytes.len();
        let unlucky = self.weather.cut_one_in > 0 && self.random(self.weather.cut_one_in) == 0;
        let delay = self.delay();
        let now = self.now;
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        if !connection.open[from] || connection.dead {
            return;
        }
        let pipe = &mut connection.pipes[to];
        let mut cut = unlucky;
        if let Some(limit) = pipe.cut_after
            && pipe.sent + bytes.len() > limit
        {
            bytes.truncate(limit.saturating_sub(pipe.sent));
            cut = true;
        }
        pipe.sent += bytes.len();
        let arrival = pipe.last_arrival.max(now + delay);
        pipe.last_arrival = arrival;
        if unlucky {
            let keep = self.entropy.next_u64() as usize % (bytes.len() + 1);
            bytes.truncate(keep);
        }
        self.schedule(arrival - now, Event::Arrive { conn, to, bytes });
        if cut {
            self.cut(conn);
        }
    }

    fn arrive(&mut self, conn: ConnId, to: usize, bytes: &[u8]) {
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        connection.dead |= self.weather.partitioned;
        if !connection.open[to] || connection.dead {
            return;
        }
        connection.pipes[to].received.extend_from_slice(bytes);
        if !connection.up[to] {
            return;
        }
        let mut inputs = Vec::new();
        let received = &mut connection.pipes[to].received;
        while let Some((header, rest)) = received.split_first_chunk::<FRAME_HEADER_BYTES>() {
            let header = FrameHeader::decode(header).expect("an honest peer");
            let bytes = header.payload_bytes as usize;
            let Some(payload) = rest.get(..bytes) else { break };
            inputs.push(match header.kind {
                FrameKind::Control => Input::Message {
                    conn,
                    message: Message::decode(payload).expect("an honest peer"),
                    wall: LogTime(0),
                },
                FrameKind::Image => Input::Part {
                    conn,
                    group: header.group,
                    stream: header.stream,
                    number: header.position.0,
                    bytes: Bytes::copy_from_slice(payload),
                },
                FrameKind::Log => Input::Log {
                    conn,
                    group: header.group,
                    stream: header.stream,
                    position: header.position,
                    bytes: Bytes::copy_from_slice(payload),
                },
            });
            received.drain(..FRAME_HEADER_BYTES + bytes);
        }
        for input in inputs {
            self.feed(to, input);
        }
    }

    fn write(&mut self, side: usize) {
        let node = &self.nodes[side];
        if node.up && node.primary && !node.recovering {
            let now = self.now;
            self.nodes[side].log.append(now, None);
            self.look(side);
        }
    }

    fn promote(&mut self, side: usize) {
        if self.nodes[side].up && self.nodes[side].primary {
            return self.serve(side);
        }
        if self.nodes[side].up && !self.nodes[side].primary && self.nodes[side].log.head().0 > 0 {
            let id = EpochId(self.entropy.next_u64());
            let now = self.now;
            let node = &mut self.nodes[side];
            node.primary = true;
            node.log.tail.clear();
            node.log.append(now, Some((id, node_id(side), 0)));
            self.look(side);
        }
    }

    /// The peer has answered, or a host has waited long enough.
    fn serve(&mut self, side: usize) {
        let (id, now) = (EpochId(self.entropy.next_u64()), self.now);
        let node = &mut self.nodes[side];
        if node.up && node.primary && std::mem::take(&mut node.recovering) {
            node.log.tail.clear();
            let above = node.held_back.take();
            if std::mem::take(&mut node.reign_due) || above.is_some() {
                node.log.append(now, Some((id, node_id(side), above.unwrap_or_default())));
            }
            self.look(side);
        }
    }

    /// The secondary has what its primary wrote, and something that it lacks.
    fn get_ahead(&mut self) {
        self.write(0);
        self.nodes[1].log = self.nodes[0].log.clone();
        let now = self.now;
        self.nodes[1].log.append(now, None);
    }

    /// An operator has a side yield.
    fn resolve(&mut self, side: usize) {
        let parted = self.nodes[side].core.channel(GROUP).unwrap().parted();
        let parted = parted.expect("told by the peer");
        self.nodes[side].yield_to(parted.at, parted.chain, true).unwrap();
        self.look(side);
        self.feed(side, Input::Yielded { group: GROUP });
    }

    /// What happens once hosts have waited long enough.
    fn hosts_insist(&mut self, side: usize) {
        if self.nodes[side].held_back.is_none() {
            self.serve(side);
        }
    }

    /// Power fails: what was not synced is gone, and some of what was appended last stays.
    fn lose_power(&mut self, side: usize) {
        let kept = {
            let log = &self.nodes[side].log;
            let more = (log.bytes.len() - log.durable) / RECORD_BYTES;
            log.durable + self.random(more as u64 + 1) as usize * RECORD_BYTES
        };
        self.stop(side);
        let node = &mut self.nodes[side];
        node.log.cut(kept);
        node.log.durable = kept;
        node.lost_power = true;
        node.reign_due = node.primary;
    }

    fn demote(&mut self, side: usize) {
        if self.nodes[side].up {
            self.nodes[side].recovering = false;
            self.nodes[side].split_brain = false;
            self.nodes[side].primary = false;
            self.look(side);
        }
    }

    /// `kill -9`: the process is gone, the page cache is not.
    fn stop(&mut self, side: usize) {
        self.nodes[side].up = false;
        self.lives[side] += 1;
        let conns: Vec<ConnId> = self.connections.keys().copied().collect();
        for conn in conns {
            self.connections.get_mut(&conn).unwrap().open[side] = false;
            self.tell_down(conn, 1 - side);
        }
    }

    fn restart(&mut self, side: usize) {
        let now = self.now;
        let node = &mut self.nodes[side];
        node.up = true;
        node.incarnation += 2;
        node.core = new_core(now, side);
        (node.recovering, node.held_back) = (node.primary && !node.split_brain, None);
        node.log.tail.clear();
        self.start(side);
    }

    fn state(&self, side: usize) -> (ReplicationState, String) {
        let (state, reason, _) = self.nodes[side].core.channel(GROUP).unwrap().state();
        (state, reason.to_owned())
    }

    /// What holds at every moment.
    fn check(&self) {
        for side in 0..2 {
            let node = &self.nodes[side];
            let other = &self.nodes[1 - side];
            if !node.up {
                continue;
            }
            let channel = node.core.channel(GROUP).unwrap();
            if node.primary && !other.primary {
                let acked = channel.acked();
                let there = (other.log.bytes.len() + other.log.tail.len()) as u64;
                let kept = other.log.bytes.len() as u64;
                // A restart forgets an unfinished record, which was received and is sent again. Of
                // a power failure it hears only when the other is back.
                assert!(
                    other.lost_power || acked.received.0 <= there.max(kept + RECORD_BYTES as u64),
                    "{} believes in {} of {there} bytes",
                    node.name,
                    acked.received
                );
            }
            if other.primary && !node.primary && other.log.bytes.starts_with(&node.log.bytes) {
                // Never better than the truth: the age of the oldest byte that is missing here.
                let missing = other.log.times.get(node.log.bytes.len() / RECORD_BYTES);
                let truth = missing.map_or(Duration::ZERO, |time| self.now.saturating_sub(*time));
                if let Some(lag) = secondary_lag(channel, self.now)
                    && other.log.times.len() * RECORD_BYTES == other.log.bytes.len()
                {
                    assert!(lag >= truth, "shows {lag:?}, in truth {truth:?}");
                }
            }
            if node.primary && node.log.bytes.starts_with(&other.log.bytes) && !other.primary {
                let missing = node.log.times.get(other.log.bytes.len() / RECORD_BYTES);
                let truth = missing.map_or(Duration::ZERO, |time| self.now.saturating_sub(*time));
                let (lag, durable_lag) = channel.lags(self.now);
                if let Some(lag) = lag
                    && !(other.lost_power && channel.acked().received > other.log.head())
                    && node.log.times.len() * RECORD_BYTES == node.log.bytes.len()
                {
                    assert!(lag >= truth, "shows {lag:?}, in truth {truth:?}");
                    assert!(durable_lag.is_none_or(|durable_lag| durable_lag >= lag));
                }
            }
        }
    }

    fn assert_streaming(&self) {
        for side in 0..2 {
            let states = [self.state(0), self.state(1)];
            assert_eq!(states[side].0, ReplicationState::Streaming, "{states:?}");
        }
        assert!(
            self.nodes[0].log.bytes == self.nodes[1].log.bytes,
            "heads {} and {}",
            self.nodes[0].log.head(),
            self.nodes[1].log.head()
        );
    }
}

fn swapped<T>([first, second]: [T; 2]) -> [T; 2] {
    [second, first]
}

fn new_core(now: Duration, side: usize) -> PeerCore {
    let settings = Settings { heartbeat: HEARTBEAT, window_bytes: 4096, ..Settings::default() };
    let name = ["b", "a"][side].parse().unwrap();
    PeerCore::new(now, node_id(side), node_id(1 - side), name, settings)
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}
