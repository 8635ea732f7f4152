//! What waits in a connection for its turn. Pieces of log and parts of images are read when they
//! are sent, which may be after the stream that asked for them has ended, and messages overtake
//! them.

use std::collections::VecDeque;
use std::mem::discriminant;
use std::time::Duration;

use tidelog::replication::simulation::{Bulk, ConnId, Waiting};

use super::event::Event;
use super::world::World;

/// A writer that is so far ahead of what arrives waits until it has arrived.
const AHEAD_MOST: Duration = Duration::from_millis(5);

/// What one end of a connection writes.
#[derive(Default)]
pub struct Writer {
    messages: VecDeque<Vec<u8>>,
    bulk: VecDeque<Waiting>,
    /// It is in the middle of a frame of bulk.
    busy: bool,
}

impl Writer {
    /// Whether a later stream has asked for the same already.
    fn is_stale(&self, next: &Waiting) -> bool {
        self.bulk.iter().any(|other| {
            let same = discriminant(&other.bulk) == discriminant(&next.bulk);
            same && other.group == next.group && other.stream > next.stream
        })
    }
}

impl World {
    /// A node says something on a connection.
    pub fn send_message(&mut self, conn: ConnId, node: usize, frame: Vec<u8>) {
        let connection = self.connections.get_mut(&conn);
        match connection.and_then(|connection| connection.writer(node)) {
            Some(writer) if writer.busy => writer.messages.push_back(frame),
            Some(_) => drop(self.transmit(conn, node, frame)),
            None => {}
        }
    }

    /// A node's connection has something to send when it is its turn.
    pub fn send_bulk(&mut self, conn: ConnId, node: usize, waiting: Waiting) {
        let connection = self.connections.get_mut(&conn);
        let Some(writer) = connection.and_then(|connection| connection.writer(node)) else {
            return;
        };
        writer.bulk.push_back(waiting);
        if !std::mem::replace(&mut writer.busy, true) {
            self.write_later(conn, node, Duration::ZERO);
        }
    }

    fn write_later(&mut self, conn: ConnId, node: usize, after: Duration) {
        let Some(connection) = self.connections.get(&conn) else { return };
        let after = after + self.chance.up_to(connection.slowness);
        self.schedule(after, Event::Write { conn, node });
    }

    /// The end of a connection has written a frame, and goes on: messages first.
    pub fn write(&mut self, conn: ConnId, node: usize) {
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        let peer = connection.other(node);
        let Some(writer) = connection.writer(node) else { return };
        let messages = std::mem::take(&mut writer.messages);
        let next = writer.bulk.pop_front();
        writer.busy = next.is_some();
        let stale = next.as_ref().is_some_and(|next| writer.is_stale(next));
        for frame in messages {
            self.transmit(conn, node, frame);
        }
        let Some(waiting) = next else { return };
        let part = matches!(waiting.bulk, Bulk::Part { .. });
        if stale {
            let what = if part { "parts" } else { "pieces of log" };
            self.coverage.add(&format!("{what} asked for by an ended stream"), 1);
        }
        let of = self.group_number(waiting.group);
        let found = self.nodes[node].group(of).expect("it was asked of it").clone();
        let (told, ahead) = match waiting.read(Some(found)) {
            Ok(ready) => {
                assert!(!(stale && part), "a part that the next image then lacks");
                (ready.sent, self.transmit(conn, node, ready.frame))
            }
            Err(failed) => (failed, Duration::ZERO),
        };
        self.feed_later(node, peer, told);
        self.write_later(conn, node, ahead.saturating_sub(AHEAD_MOST));
    }
}
