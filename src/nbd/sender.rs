//! The sending half of a connection: shared by the connection's thread, which may wait for room,
//! and by whoever completes a flush, who may not.
//!
//! One thread at a time owns the way out. Replies that arrive meanwhile queue up and are sent by
//! the owner before it lets go. A late reply that finds the way free but the socket full hands the
//! rest to a thread of its own, so that a client who does not read never holds up the sync thread
//! of a group.

use std::io;
use std::net::Shutdown;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::server::LOOK_EVERY;
use super::socket::{Socket, send_all};
use crate::units::Lsn;

/// Late replies that a connection may wait for at once; at the limit it stops reading. Bounds the
/// memory of a client that flushes and never reads.
pub(super) const LATE_REPLIES_MAX: usize = 1024;

#[derive(Default)]
struct State {
    /// Someone owns the way out.
    owned: bool,
    /// Whole replies that wait for the owner.
    queued: Vec<u8>,
    /// Late replies promised and not yet queued.
    late: usize,
    /// Sending failed, or this side has cut the connection; nothing is sent any more.
    broken: bool,
    /// Threads that wait for a change.
    waiting: usize,
}

/// The sending half.
pub(super) struct Sender {
    socket: Arc<dyn Socket>,
    state: Mutex<State>,
    /// The way is free again, or a late reply was queued.
    changed: Condvar,
}

/// Ownership of the way out. Dropping it sends what has queued up.
pub(super) struct Turn<'a> {
    sender: &'a Sender,
}

impl Sender {
    pub(super) fn new(socket: Arc<dyn Socket>) -> Sender {
        Sender { socket, state: Mutex::new(State::default()), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    /// Takes the way out, waiting until it is free.
    pub(super) fn turn(&self) -> Turn<'_> {
        let mut state = self.lock();
        while state.owned {
            state = self.wait(state);
        }
        state.owned = true;
        Turn { sender: self }
    }

    /// Promises `count` late replies, waiting while there are too many.
    pub(super) fn promise(&self, count: usize) {
        let mut state = self.lock();
        while state.late >= LATE_REPLIES_MAX && !state.broken {
            state = self.wait_for_client(state);
        }
        state.late += count;
    }

    /// Waits until every promised reply was queued and sent, or cannot be sent any more. A client
    /// that closed its half still gets what it was promised.
    pub(super) fn settle(&self) {
        let mut state = self.lock();
        while (state.late > 0 || state.owned) && !state.broken {
            state = self.wait_for_client(state);
        }
    }

    /// Sends `count` promised replies, without waiting for the client.
    pub(super) fn complete(self: &Arc<Self>, count: usize, replies: &[u8]) {
        let mut state = self.lock();
        state.late -= count;
        if !state.broken {
            state.queued.extend_from_slice(replies);
        }
        if state.owned {
            // The owner sends it; whoever waits in `promise` may go on.
            self.wake(state);
            return;
        }
        state.owned = true;
        while let Some(bytes) = self.next_queued(state) {
            match self.socket.send_now(&bytes) {
                Ok(sent) if sent == bytes.len() => {}
                Ok(sent) => return self.finish_elsewhere(bytes, sent),
                Err(error) => self.fail(&error),
            }
            state = self.lock();
        }
    }

    /// Lets a thread that may wait send the rest of `bytes`, and what queues up behind it.
    fn finish_elsewhere(self: &Arc<Self>, bytes: Vec<u8>, sent: usize) {
        let sender = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("nbd-late".to_owned()).spawn(move || {
            if let Err(error) = send_all(&*sender.socket, &bytes[sent..]) {
                sender.fail(&error);
            }
            sender.release();
        });
        if let Err(error) = spawned {
            self.fail(&error);
            self.release();
        }
    }

    /// Sends what has queued up, and lets the way go.
    fn release(&self) {
        let mut state = self.lock();
        while let Some(bytes) = self.next_queued(state) {
            if let Err(error) = send_all(&*self.socket, &bytes) {
                self.fail(&error);
            }
            state = self.lock();
        }
    }

    /// Takes what has queued up; where there is nothing, the way is free.
    fn next_queued(&self, mut state: MutexGuard<'_, State>) -> Option<Vec<u8>> {
        if state.queued.is_empty() || state.broken {
            state.owned = false;
            state.queued.clear();
            self.wake(state);
            return None;
        }
        Some(std::mem::take(&mut state.queued))
    }

    /// Wakes those who wait, if any: an idle notification is a system call.
    fn wake(&self, state: MutexGuard<'_, State>) {
        let waiting = state.waiting > 0;
        drop(state);
        if waiting {
            self.changed.notify_all();
        }
    }

    fn wait<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.waiting += 1;
        state = self.changed.wait(state).expect("no holder panics");
        state.waiting -= 1;
        state
    }

    /// The same as long as there is a client to answer; one that has gone breaks the connection.
    fn wait_for_client<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.waiting += 1;
        state = self.changed.wait_timeout(state, LOOK_EVERY).expect("no holder panics").0;
        state.waiting -= 1;
        state.broken |= self.socket.is_gone();
        state
    }

    /// Whether the connection has ended for the sender.
    pub(super) fn is_broken(&self) -> bool {
        self.lock().broken
    }

    /// Ends the connection: what was promised will not be sent.
    pub(super) fn abandon(&self, why: &'static str) {
        self.fail(&io::Error::other(why));
    }

    fn fail(&self, error: &io::Error) {
        tracing::debug!(%error, "nbd: a reply could not be sent");
        self.cut();
    }

    /// Ends the connection in both directions, from this side: nobody waits any longer to answer
    /// what was promised. Does not block.
    pub(super) fn cut(&self) {
        let mut state = self.lock();
        state.broken = true;
        self.wake(state);
        self.socket.shutdown(Shutdown::Both);
    }
}

/// Requests of a batch that are answered together, later.
#[derive(Default)]
pub(super) struct Late {
    pub(super) cookies: Vec<u64>,
    pub(super) lsn: Lsn,
}

impl Late {
    pub(super) fn add(&mut self, cookie: u64, lsn: Lsn) {
        self.cookies.push(cookie);
        self.lsn = self.lsn.max(lsn);
    }
}

impl Turn<'_> {
    /// Sends bytes, waiting for room.
    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let result = send_all(&*self.sender.socket, bytes);
        if let Err(error) = &result {
            self.sender.fail(error);
        }
        result
    }
}

impl Turn<'_> {
    /// Ends the connection: what was sent cannot be completed.
    pub(super) fn abandon(self) {
        self.sender.fail(&io::Error::other("a reply could not be completed"));
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.sender.release();
    }
}
