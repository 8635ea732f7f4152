//! Feeds the cores of all peers, one input at a time, and carries out what they say.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc;

use crate::events::Severity;
use crate::units::{GroupId, NodeId};

use super::bounds::Room;
use super::core::{Input, Output, PeerCore};
use super::link::{self, Bulk};
use super::service::{Queued, Shared, locked};
use super::wire::Message;
use super::worker::{Job, Worker};

impl Shared {
    /// Does what a core says. What it has a group's thread do keeps the room of the message that it
    /// comes from; bytes of a log have a bound of their own there, the window.
    fn perform(self: &Arc<Self>, peer: NodeId, output: Output, room: Option<Room>) {
        let output = match Job::of(peer, output) {
            Ok((group, job)) => {
                let room = room.filter(|_| !matches!(job, Job::Append { .. }));
                return self.add_job(peer, group, job, room);
            }
            Err(output) => output,
        };
        match output {
            Output::Dial => {
                tokio::spawn(link::dial(Arc::clone(self), peer));
            }
            Output::Close { conn, reason } => {
                if let Some(conn) = self.conn(conn) {
                    conn.close(reason);
                }
            }
            Output::Send { conn, mut message } => {
                if let Message::Heartbeat { wall, .. } = &mut message {
                    *wall = self.wall().0;
                }
                if let Some(conn) = self.conn(conn) {
                    conn.send(&message);
                }
            }
            Output::SendLog { conn, group, stream, from, to } => {
                if let Some(conn) = self.conn(conn) {
                    conn.send_bulk(group, stream, Bulk::Log { from, to });
                }
            }
            Output::SendPart { conn, group, stream, peer, number } => {
                if let Some(conn) = self.conn(conn) {
                    conn.send_bulk(group, stream, Bulk::Part { peer, number });
                }
            }
            Output::FollowChanged { group } => {
                self.group_changed(group);
            }
            Output::Event { severity, code, group, text } => {
                let group = group.as_ref().map(|name| name.as_str());
                self.context.events.emit(severity, code, group, text, Value::Null);
            }
            touching => unreachable!("{touching:?} touches a log"),
        }
    }

    fn add_job(self: &Arc<Self>, peer: NodeId, group: GroupId, job: Job, room: Option<Room>) {
        let mut workers = locked(&self.workers);
        if let std::collections::hash_map::Entry::Vacant(vacant) = workers.entry(group) {
            let Some(replica) = self.groups.by_id(group) else { return };
            let inputs = self.inputs.clone();
            let report = move |peer, input| {
                let _ = inputs.send(Queued { peer, input, room: None });
            };
            match Worker::start(replica, report) {
                Ok(worker) => {
                    vacant.insert(worker);
                }
                Err(error) => {
                    let text = format!("peer {peer}: no thread for its group: {error}");
                    let code = "replication-thread";
                    self.context.events.emit(Severity::Error, code, None, text, Value::Null);
                    return;
                }
            }
        }
        if workers.get(&group).is_some_and(|worker| !worker.add(job, room)) {
            workers.remove(&group);
        }
    }
}

/// Feeds the cores until the service ends.
pub(super) async fn drive(shared: Arc<Shared>, mut queue: mpsc::UnboundedReceiver<Queued>) {
    let mut shutdown = shared.shutdown_signal();
    let mut outputs: Vec<(NodeId, Output)> = Vec::new();
    let mut rooms: Vec<(usize, Room)> = Vec::new();
    loop {
        let now = shared.now();
        let next = locked(&shared.cores).values().filter_map(PeerCore::next_wake).min();
        let wait = next.map_or(Duration::from_secs(3600), |next| next.saturating_sub(now));
        let received = tokio::select! {
            received = queue.recv() => received,
            () = shared.wake.notified() => None,
            () = tokio::time::sleep(wait) => None,
            _ = shutdown.wait_for(|ending| *ending) => break,
        };
        {
            let now = shared.now();
            let mut cores = locked(&shared.cores);
            let mut received = received;
            // A bounded batch, so that timers are looked at in between.
            for _ in 0..256 {
                let Some(Queued { peer, input, room }) =
                    received.take().or_else(|| queue.try_recv().ok())
                else {
                    break;
                };
                if let Some(core) = cores.get_mut(&peer) {
                    let mut of_core = Vec::new();
                    core.handle(now, input, &mut of_core);
                    outputs.extend(of_core.into_iter().map(|output| (peer, output)));
                    rooms.extend(room.map(|room| (outputs.len(), room)));
                }
            }
            for (peer, core) in cores.iter_mut() {
                if core.next_wake().is_some_and(|wake| wake <= now) {
                    let mut of_core = Vec::new();
                    core.handle(now, Input::Tick, &mut of_core);
                    outputs.extend(of_core.into_iter().map(|output| (*peer, output)));
                }
            }
        }
        shared.look_at_groups(&mut outputs);
        // Each room belongs to the outputs before its number, from the one before it on.
        let mut rooms = rooms.drain(..).peekable();
        for (number, (peer, output)) in outputs.drain(..).enumerate() {
            while rooms.next_if(|(end, _)| *end <= number).is_some() {}
            let room = rooms.peek().map(|(_, room)| Arc::clone(room));
            shared.perform(peer, output, room);
        }
    }
    for conn in locked(&shared.conns).values() {
        conn.close("this node shuts down".to_owned());
    }
    locked(&shared.workers).clear();
}
