//! The links between the nodes: connections that delay, that are cut at any byte, and that a
//! partition leaves open and dead.

use std::time::Duration;

use bytes::Bytes;
use tidelog::replication::simulation::{ConnId, Input};
use tidelog::replication::wire::{FRAME_HEADER_BYTES, FrameHeader, FrameKind, Message};
use tidelog::units::Incarnation;

use super::bulk::Writer;
use super::event::Event;
use super::world::World;

/// Microseconds that a frame of bulk takes at most on the slowest links.
const SLOW_LINK: u64 = 500_000;

/// One direction of a connection.
#[derive(Default)]
struct Pipe {
    received: Vec<u8>,
    last_arrival: u64,
}

/// A connection between two nodes; side 0 dialled it.
pub struct Connection {
    ends: [usize; 2],
    /// Towards each side.
    pipes: [Pipe; 2],
    /// Bytes were lost: nothing passes any more, and nobody is told.
    dead: bool,
    /// Per side: whether it still believes in it.
    open: [bool; 2],
    /// Per side: whether it knows of it; what arrives before waits.
    up: [bool; 2],
    /// Per side: what it sends when it is its turn.
    writers: [Writer; 2],
    /// Each frame of bulk takes up to this long to be written.
    pub slowness: Duration,
}

impl Connection {
    fn side(&self, node: usize) -> usize {
        usize::from(self.ends[0] != node)
    }

    /// The node at the other end.
    pub fn other(&self, node: usize) -> usize {
        self.ends[1 - self.side(node)]
    }

    /// What a node's end writes, while it is open.
    pub fn writer(&mut self, node: usize) -> Option<&mut Writer> {
        let side = self.side(node);
        self.open[side].then_some(&mut self.writers[side])
    }
}

/// What happens on the way between two nodes.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// A message takes this long at most.
    pub delay_most: Duration,
    /// A message in this many cuts its connection at any of its bytes; 0 never.
    pub cut_one_in: u64,
    /// Nothing passes.
    pub partitioned: bool,
    /// Nanoseconds that each byte takes.
    pub byte_nanoseconds: u64,
}

impl Weather {
    /// A short way on which nothing is lost.
    pub const FINE: Weather = Weather {
        delay_most: Duration::from_millis(2),
        cut_one_in: 0,
        partitioned: false,
        byte_nanoseconds: 0,
    };
}

fn pair(a: usize, b: usize) -> (usize, usize) {
    (a.min(b), a.max(b))
}

impl World {
    /// The weather between two nodes.
    pub fn weather(&self, a: usize, b: usize) -> Weather {
        self.weathers.get(&pair(a, b)).copied().unwrap_or(Weather::FINE)
    }

    /// Sets the weather between two nodes.
    pub fn set_weather(&mut self, a: usize, b: usize, weather: Weather) {
        self.weathers.insert(pair(a, b), weather);
    }

    fn delay(&mut self, a: usize, b: usize) -> Duration {
        let most = self.weather(a, b).delay_most;
        self.chance.up_to(most)
    }

    pub fn dial(&mut self, node: usize, peer: usize) {
        if self.weather(node, peer).partitioned || !self.nodes[peer].up {
            let input = Input::DialFailed { reason: "no route".to_owned() };
            self.feed_later(node, peer, input);
            return;
        }
        let conn = ConnId(self.next_number());
        let slowness = self.chance.of(&[20, 200, 5000, SLOW_LINK]);
        self.coverage.add("slow links", u64::from(slowness == SLOW_LINK));
        let connection = Connection {
            ends: [node, peer],
            pipes: Default::default(),
            dead: false,
            open: [true; 2],
            up: [false; 2],
            writers: Default::default(),
            slowness: Duration::from_micros(slowness),
        };
        self.connections.insert(conn, connection);
        for (side, end) in [node, peer].into_iter().enumerate() {
            let delay = self.delay(node, peer);
            let life = self.nodes[end].life;
            self.schedule(delay, Event::ConnUp { conn, side, life });
        }
    }

    pub fn conn_up(&mut self, conn: ConnId, side: usize, life: u64) {
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        let (node, peer) = (connection.ends[side], connection.ends[1 - side]);
        if self.nodes[node].life != life || !self.nodes[node].up || !connection.open[side] {
            return;
        }
        connection.up[side] = true;
        let incarnation = Incarnation(self.nodes[peer].incarnation);
        self.coverage.add("links", 1);
        self.say(format_args!("{} link up to {}", self.nodes[node].name, self.nodes[peer].name));
        self.feed(node, peer, Input::ConnUp { conn, dialled: side == 0, incarnation });
        self.arrive(conn, side, &[]);
    }

    /// A node closes its end.
    pub fn close(&mut self, conn: ConnId, node: usize) {
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        let side = connection.side(node);
        connection.open[side] = false;
        self.tell_down(conn, 1 - side);
        self.forget_closed(conn);
    }

    /// All connections of a node end; the others are told where its machine still runs.
    pub fn drop_connections(&mut self, node: usize, told: bool) {
        let conns: Vec<ConnId> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.ends.contains(&node))
            .map(|(conn, _)| *conn)
            .collect();
        for conn in conns {
            if told {
                self.close(conn, node);
            } else if let Some(connection) = self.connections.get_mut(&conn) {
                let side = connection.side(node);
                connection.open[side] = false;
                connection.dead = true;
                self.forget_closed(conn);
            }
        }
    }

    fn forget_closed(&mut self, conn: ConnId) {
        if self.connections.get(&conn).is_some_and(|connection| connection.open == [false; 2]) {
            self.connections.remove(&conn);
        }
    }

    fn tell_down(&mut self, conn: ConnId, side: usize) {
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        let (node, peer) = (connection.ends[side], connection.ends[1 - side]);
        if self.weather(node, peer).partitioned {
            return;
        }
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        if std::mem::take(&mut connection.open[side]) {
            let delay = self.delay(node, peer);
            let life = self.nodes[node].life;
            let input = Input::ConnDown { conn, reason: "closed".to_owned() };
            self.schedule(delay, Event::Feed { node, peer, life, input });
        }
    }

    /// Sends a frame; how long after now it arrives.
    pub fn transmit(&mut self, conn: ConnId, from: usize, mut bytes: Vec<u8>) -> Duration {
        let now = self.now();
        let Some(connection) = self.connections.get(&conn) else { return Duration::ZERO };
        let (side, to) = (connection.side(from), connection.other(from));
        if !connection.open[side] || connection.dead {
            return Duration::ZERO;
        }
        let weather = self.weather(from, to);
        // Behind a partition nobody could be told, and what is sent later would follow on half of a
        // message.
        let unlucky = self.chance.one_in(weather.cut_one_in) && !weather.partitioned;
        let keep = self.chance.below(bytes.len() as u64 + 1) as usize;
        let delay = self.delay(from, to).as_nanos() as u64;
        if unlucky {
            bytes.truncate(keep);
        }
        let pipe = &mut self.connections.get_mut(&conn).expect("it was there").pipes[1 - side];
        let sending = weather.byte_nanoseconds * bytes.len() as u64;
        let arrival = pipe.last_arrival.max(now + delay) + sending;
        pipe.last_arrival = arrival;
        let after = Duration::from_nanos(arrival - now);
        self.schedule(after, Event::Arrive { conn, side: 1 - side, bytes });
        if unlucky {
            self.coverage.add("cuts", 1);
            self.say(format_args!("{} is cut off in a message", self.nodes[from].name));
            self.tell_down(conn, 0);
            self.tell_down(conn, 1);
        }
        after
    }

    pub fn arrive(&mut self, conn: ConnId, side: usize, bytes: &[u8]) {
        let Some(connection) = self.connections.get(&conn) else { return };
        let (to, from) = (connection.ends[side], connection.ends[1 - side]);
        let partitioned = self.weather(from, to).partitioned;
        let wall = self.nodes[to].wall();
        let connection = self.connections.get_mut(&conn).expect("it was there");
        connection.dead |= partitioned;
        if !connection.open[side] || connection.dead {
            return;
        }
        let received = &mut connection.pipes[side].received;
        received.extend_from_slice(bytes);
        if !connection.up[side] {
            return;
        }
        let mut inputs = Vec::new();
        while let Some((header, rest)) = received.split_first_chunk::<FRAME_HEADER_BYTES>() {
            let header = FrameHeader::decode(header).expect("an honest peer");
            let bytes = header.payload_bytes as usize;
            let Some(payload) = rest.get(..bytes) else { break };
            inputs.push(match header.kind {
                FrameKind::Control => {
                    let message = Message::decode(payload).expect("an honest peer");
                    Input::Message { conn, message, wall }
                }
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
            self.feed(to, from, input);
        }
    }
}
