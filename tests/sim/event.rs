//! What will happen in the world, and when that is held up: by a disk that answers nothing for a
//! while.

use std::time::Duration;

use tidelog::replication::simulation::{ConnId, Input, Job};

use super::switchover::Switch;
use super::world::World;

/// Something that will happen.
pub enum Event {
    Feed {
        node: usize,
        peer: usize,
        life: u64,
        input: Input,
    },
    Arrive {
        conn: ConnId,
        side: usize,
        bytes: Vec<u8>,
    },
    ConnUp {
        conn: ConnId,
        side: usize,
        life: u64,
    },
    /// A node's end of a connection has written what it was at.
    Write {
        conn: ConnId,
        node: usize,
    },
    Wake {
        node: usize,
        peer: usize,
        life: u64,
    },
    /// A peer was asked for a copy: the records that make it one follow.
    Members {
        node: usize,
        peer: usize,
        group: usize,
        life: u64,
    },
    Look {
        node: usize,
        group: usize,
        life: u64,
    },
    Work {
        node: usize,
        group: usize,
        life: u64,
    },
    /// The thread that syncs has somebody waiting.
    Sync {
        node: usize,
        group: usize,
        life: u64,
    },
    /// Its round of every second.
    Mark {
        node: usize,
        group: usize,
        life: u64,
    },
    Fold {
        node: usize,
        group: usize,
        life: u64,
    },
    Prepare {
        node: usize,
        group: usize,
        life: u64,
    },
    Host {
        host: usize,
    },
    Request {
        node: usize,
        life: u64,
        host: usize,
        batch: Vec<u64>,
        tries: u32,
    },
    Answer {
        host: usize,
        node: usize,
        life: u64,
        batch: Vec<(u64, bool)>,
    },
    Switch(Switch),
    /// A second of a node's scheduler.
    Backup {
        node: usize,
    },
}

impl Event {
    /// The node whose disk it needs.
    fn disk(&self) -> Option<usize> {
        match self {
            Event::Write { node, .. }
            | Event::Members { node, .. }
            | Event::Work { node, .. }
            | Event::Sync { node, .. }
            | Event::Mark { node, .. }
            | Event::Fold { node, .. }
            | Event::Prepare { node, .. }
            | Event::Request { node, .. } => Some(*node),
            _ => None,
        }
    }
}

impl World {
    /// Has the disk of a node answer nothing for a while, and its links live on.
    pub fn hang_disk(&mut self, node: usize, span: Duration) {
        self.coverage.add("disks hung", 1);
        self.say(format_args!("{}'s disk hangs for {span:?}", self.nodes[node].name));
        self.nodes[node].hung_until = self.now() + span.as_nanos() as u64;
    }

    /// Puts off what a hung disk holds up; what happens now is given back.
    pub fn unless_hung(&mut self, event: Event) -> Option<Event> {
        let until = event.disk().map_or(0, |node| self.nodes[node].hung_until);
        if until <= self.now() {
            return Some(event);
        }
        let left = Duration::from_nanos(until - self.now());
        self.schedule(left, event);
        None
    }
}

/// A job as the trace shows it.
pub fn short(job: &Job) -> String {
    match job {
        Job::Append { position, bytes, .. } => format!("append {} at {position}", bytes.len()),
        Job::HoldBack { counter, .. } => format!("hold back for reign {counter}"),
        other => {
            let mut text = format!("{other:?}");
            text.truncate(120);
            text
        }
    }
}
