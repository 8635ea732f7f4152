//! One connection in the transmission phase: requests in, replies out, in batches by wake-up.
//!
//! A wake-up is one receive of up to 256 KiB. Every complete request in it is parsed; all that
//! change data go to the engine as one append, in the order in which they came; all reads follow
//! as one batch, so that a read sees every write that was answered before it was sent; all replies
//! leave in one send. Flushes and FUA writes are answered later, from the group's sync thread,
//! while this thread goes on receiving.
//!
//! Memory of a connection is bounded: input 512 KiB, output 1 MiB, and one payload above 512 KiB,
//! which has to fit into a budget that all connections of the server share.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::command::{Command, Rules, check};
use super::export::{Device, errno_of};
use super::handshake::Agreed;
use super::input::{Front, INPUT_BYTES, Input};
use super::reply::{
    hangs_up, prefix_bytes, put_empty_read, put_error, put_prefix, put_status, put_success,
};
use super::sender::{Late, Sender, Turn};
use super::server::{LOOK_EVERY, Shared};
use super::socket::{Deadline, Socket};
use super::wire::{self, Errno, RequestHeader, SimpleReply};
use crate::group::{Done, GroupError, Op, Read, Request};
use crate::io::Clock;
use crate::units::{Lsn, VolumeNumber};

/// Bytes read at once at most; larger reads are answered in pieces of this size.
const READ_BYTES_MAX: usize = 1 << 20;
/// Bytes of the output buffer.
const OUTPUT_BYTES: usize = READ_BYTES_MAX + (64 << 10);
/// Descriptors of a block status reply at most.
const STATUS_DESCRIPTORS_MAX: usize = 4096;
/// Small replies are sent once they have grown to this.
const REPLIES_BYTES: usize = 256 << 10;
/// Bytes that one CACHE request reads at most: it is a hint, and must not hold up what follows.
const CACHE_BYTES_MAX: u64 = 8 << 20;

/// What a client is told at shutdown.
const STOPPING: &str = "this node is shutting down";

/// Why a connection ended.
#[derive(Debug)]
pub enum End {
    /// The client said so.
    Disconnected,
    /// The client closed its end.
    Closed,
    /// The client sent what is no request.
    Garbage,
    /// The export is no longer served here, and the client has to go elsewhere.
    NotServed,
    /// The socket failed.
    Io(io::Error),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> End {
        End::Io(error)
    }
}

/// A request that changes data, with its payload in the input.
struct Change {
    cookie: u64,
    command: Command,
    payload: Range<usize>,
}

/// A read.
#[derive(Clone, Copy)]
struct Fetch {
    cookie: u64,
    offset: u64,
    length: usize,
}

/// What follows a batch.
enum Next {
    /// Receive more.
    Receive,
    /// There is more to parse.
    Parse,
    /// A WRITE whose payload has not arrived; it lies at the front of the input.
    Payload(RequestHeader),
    /// The connection ends.
    End(End),
}

/// A connection in the transmission phase.
pub(super) struct Session<'a> {
    socket: Arc<dyn Socket>,
    sender: Arc<Sender>,
    input: Input,
    shared: &'a Shared,
    clock: &'a dyn Clock,
    device: Arc<dyn Device>,
    volume: VolumeNumber,
    rules: Rules,
    /// Requests of this batch.
    changes: Vec<Change>,
    fetches: Vec<Fetch>,
    others: Vec<(u64, Command)>,
    /// Small replies of this batch.
    replies: Vec<u8>,
    output: Box<[u8]>,
    /// The export is no longer served here: a request stays unanswered, and the connection ends.
    not_served: bool,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        socket: Arc<dyn Socket>,
        sender: Arc<Sender>,
        input: Input,
        agreed: Agreed,
        shared: &'a Shared,
        clock: &'a dyn Clock,
    ) -> Session<'a> {
        let rules = Rules {
            size_bytes: agreed.info.size_bytes,
            read_only: agreed.info.read_only,
            structured_replies: agreed.structured_replies,
            allocation: agreed.allocation,
        };
        Session {
            socket,
            sender,
            input,
            shared,
            clock,
            volume: agreed.device.volume(),
            device: agreed.device,
            rules,
            changes: Vec::new(),
            fetches: Vec::new(),
            others: Vec::new(),
            replies: Vec::new(),
            output: vec![0; OUTPUT_BYTES].into_boxed_slice(),
            not_served: false,
        }
    }

    /// Serves until the connection ends. All that was promised is answered before, where the
    /// client can still be reached.
    pub(super) fn run(mut self) -> End {
        let end = loop {
            match self.step() {
                Ok(()) => {}
                Err(end) => break end,
            }
        };
        self.sender.settle();
        end
    }

    fn step(&mut self) -> Result<(), End> {
        let next = self.parse();
        self.carry_out()?;
        if self.not_served {
            return Err(End::NotServed);
        }
        match next {
            Next::Parse => Ok(()),
            Next::Receive => match self.input.receive(&*self.socket)? {
                0 => Err(End::Closed),
                _ => Ok(()),
            },
            Next::Payload(header) => self.on_payload(&header),
            Next::End(end) => Err(end),
        }
    }

    /// Sorts what has arrived into this batch.
    fn parse(&mut self) -> Next {
        let stopping = self.shared.is_stopping();
        loop {
            let (header, payload) = match self.input.front() {
                Front::Request(header, payload) => (header, payload),
                Front::Payload(header) => return Next::Payload(header),
                Front::Nothing => return Next::Receive,
                Front::Garbage => return Next::End(End::Garbage),
            };
            let cookie = header.cookie.get();
            self.shared.counters.requests.add(1);
            match check(&header, &self.rules) {
                Ok(Command::Disconnect) => return Next::End(End::Disconnected),
                Ok(_) if stopping => {
                    self.refuse(&header, Errno::Eshutdown, STOPPING);
                }
                Ok(
                    Command::Write { length: 0, .. }
                    | Command::Zero { length: 0, .. }
                    | Command::Trim { length: 0, .. },
                ) => put_success(&mut self.replies, cookie),
                Ok(Command::Read { length: 0, .. }) => {
                    put_empty_read(&mut self.replies, self.rules.structured_replies, cookie)
                }
                Ok(Command::Read { offset, length }) => {
                    let length = usize::try_from(length).expect("32 bits fit");
                    self.fetches.push(Fetch { cookie, offset, length });
                }
                Ok(command @ (Command::Cache { .. } | Command::Status { .. })) => {
                    self.others.push((cookie, command));
                }
                Ok(command) => self.changes.push(Change { cookie, command, payload }),
                Err((error, text)) => self.refuse(&header, error, text),
            }
            if self.replies.len() > REPLIES_BYTES {
                return Next::Parse;
            }
        }
    }

    /// A WRITE of which only a part has arrived.
    fn on_payload(&mut self, header: &RequestHeader) -> Result<(), End> {
        let payload_bytes = usize::try_from(header.length.get()).expect("32 bits fit");
        if let Err((error, text)) = check(header, &self.rules) {
            // Nothing of it is kept, however large it is, and the stream stays in step.
            self.shared.counters.requests.add(1);
            if !self.input.skip(&*self.socket, RequestHeader::BYTES + payload_bytes)? {
                return Err(End::Closed);
            }
            self.refuse(header, error, text);
            return Ok(());
        }
        if RequestHeader::BYTES + payload_bytes <= INPUT_BYTES {
            return match self.input.receive(&*self.socket)? {
                0 => Err(End::Closed),
                _ => Ok(()),
            };
        }
        // Not with the memory that others need: a full log may keep its writers for long.
        while !self.device.has_room_within(LOOK_EVERY) {
            if self.client_has_gone() {
                return Err(End::Closed);
            }
        }
        let ended = || self.client_has_gone() || self.shared.is_stopping();
        let share = self.shared.take_memory(payload_bytes as u64, &ended);
        let Some(_share) = share else { return Err(End::Closed) };
        self.input.consume(RequestHeader::BYTES);
        let mut payload = vec![0; payload_bytes];
        // Whoever holds a share of the budget has to give it back.
        let time = self.shared.limits.payload_time(payload_bytes as u64);
        let limited = Deadline::within(time, &*self.socket, self.clock);
        if !self.input.fill(&limited, &mut payload)? {
            return Err(End::Closed);
        }
        self.socket.set_receive_timeout(None)?;
        self.shared.counters.requests.add(1);
        if self.shared.is_stopping() {
            self.refuse(header, Errno::Eshutdown, STOPPING);
            return Ok(());
        }
        let offset = header.offset.get();
        let fua = header.flags.get() & wire::command_flag::FUA != 0;
        let request =
            Request { volume: self.volume, op: Op::Write { offset, data: &payload }, fua };
        let results = self.append(&[request])?;
        self.shared.counters.written_bytes.add(payload_bytes as u64);
        let cookie = header.cookie.get();
        self.answer_changes(std::iter::once((cookie, fua)), results);
        if self.not_served { Err(End::NotServed) } else { Ok(()) }
    }

    /// Carries out the batch and sends its replies.
    fn carry_out(&mut self) -> Result<(), End> {
        self.carry_out_changes()?;
        if self.others.is_empty() && self.fetches.is_empty() {
            return self.send_replies();
        }
        // Writes learn it from the append itself.
        if let Err(error) = self.device.check_serving() {
            let text = error.to_string();
            let others = std::mem::take(&mut self.others).into_iter().map(|(cookie, _)| cookie);
            let fetches = std::mem::take(&mut self.fetches).into_iter().map(|fetch| fetch.cookie);
            for cookie in others.chain(fetches) {
                self.shared.counters.errors.add(1);
                self.put_error(cookie, errno_of(&error, false), &text);
            }
            return self.send_replies();
        }
        self.carry_out_others()?;
        self.carry_out_fetches()
    }

    /// Appends, or ends with the client: it is not to be held up by what holds up the group, nor
    /// is what it asked for carried out behind what it asks for on its next connection.
    fn append(&self, requests: &[Request<'_>]) -> Result<Vec<Result<Lsn, GroupError>>, End> {
        let results = self.device.append(requests, &|| self.client_has_gone());
        if results.iter().any(Result::is_err) && self.client_has_gone() {
            return Err(End::Closed);
        }
        Ok(results)
    }

    /// Whether nobody is there to be answered.
    fn client_has_gone(&self) -> bool {
        self.sender.is_broken() || self.socket.is_gone()
    }

    fn carry_out_changes(&mut self) -> Result<(), End> {
        if self.changes.is_empty() {
            return Ok(());
        }
        let changes = std::mem::take(&mut self.changes);
        if self.rules.read_only {
            // Only flushes come this far, and an image is as durable as it was opened.
            for change in &changes {
                put_success(&mut self.replies, change.cookie);
            }
        } else {
            let mut written_bytes = 0;
            let mut requests = Vec::with_capacity(changes.len());
            for change in &changes {
                let (op, fua) = match change.command {
                    Command::Write { offset, length, fua } => {
                        written_bytes += u64::from(length);
                        let data = self.input.payload(change.payload.clone());
                        (Op::Write { offset, data }, fua)
                    }
                    Command::Zero { offset, length, fua, no_hole } => {
                        (Op::Zero { offset, length: u64::from(length), no_hole }, fua)
                    }
                    Command::Trim { offset, length, fua } => {
                        (Op::Trim { offset, length: u64::from(length) }, fua)
                    }
                    _ => (Op::Flush, true),
                };
                requests.push(Request { volume: self.volume, op, fua });
            }
            let results = self.append(&requests)?;
            self.shared.counters.written_bytes.add(written_bytes);
            let waits = requests.iter().map(|request| request.fua).collect::<Vec<_>>();
            let asked = changes.iter().map(|change| change.cookie).zip(waits);
            self.answer_changes(asked, results);
        }
        self.changes = changes;
        self.changes.clear();
        Ok(())
    }

    /// Answers what was appended: (cookie, must be durable) and where it ended.
    fn answer_changes(
        &mut self,
        asked: impl Iterator<Item = (u64, bool)>,
        results: Vec<Result<Lsn, GroupError>>,
    ) {
        let (mut durable_at, mut held_at) = (Late::default(), Late::default());
        for ((cookie, durable), result) in asked.zip(results) {
            match result {
                Ok(lsn) if durable => durable_at.add(cookie, lsn),
                Ok(lsn) if !self.device.is_held(lsn) => held_at.add(cookie, lsn),
                Ok(_) => put_success(&mut self.replies, cookie),
                Err(error) => {
                    self.shared.counters.errors.add(1);
                    let code = errno_of(&error, true);
                    self.put_error(cookie, code, &error.to_string());
                }
            }
        }
        // One wait for all of a batch: they would share a sync in any case.
        let Late { cookies, lsn } = held_at;
        if let Some(done) = self.promise(cookies) {
            self.device.when_held(lsn, done);
        }
        let Late { cookies, lsn } = durable_at;
        if let Some(done) = self.promise(cookies) {
            self.device.when_durable(lsn, done);
        }
    }

    /// Promises to answer later; what does it, where there is anything to answer.
    fn promise(&self, late: Vec<u64>) -> Option<Done> {
        if late.is_empty() {
            return None;
        }
        self.sender.promise(late.len());
        // A connection that has ended owes nothing, and its socket does not wait for that.
        let sender = Arc::downgrade(&self.sender);
        let structured = self.rules.structured_replies;
        Some(Box::new(move |result: Result<(), GroupError>| {
            let Some(sender) = sender.upgrade() else { return };
            if let Err(error) = &result
                && hangs_up(errno_of(error, true), structured)
            {
                sender.abandon("the export is no longer served here");
                return sender.complete(late.len(), &[]);
            }
            let mut replies = Vec::with_capacity(late.len() * SimpleReply::BYTES);
            for &cookie in &late {
                match &result {
                    Ok(()) => put_success(&mut replies, cookie),
                    Err(error) => {
                        let text = error.to_string();
                        put_error(&mut replies, structured, cookie, errno_of(error, true), &text);
                    }
                }
            }
            sender.complete(late.len(), &replies);
        }))
    }

    /// CACHE and BLOCK_STATUS.
    fn carry_out_others(&mut self) -> Result<(), End> {
        for (cookie, command) in std::mem::take(&mut self.others) {
            match command {
                Command::Status { offset, length, one } => {
                    self.answer_status(cookie, offset, length, one);
                }
                Command::Cache { offset, length } => {
                    let result = self.warm(offset, u64::from(length).min(CACHE_BYTES_MAX));
                    match result {
                        Ok(()) => put_success(&mut self.replies, cookie),
                        Err(error) => {
                            let code = errno_of(&error, false);
                            self.put_error(cookie, code, &error.to_string());
                        }
                    }
                }
                other => unreachable!("{other:?} is not among the others"),
            }
            if self.replies.len() > REPLIES_BYTES {
                self.send_replies()?;
            }
        }
        Ok(())
    }

    fn answer_status(&mut self, cookie: u64, offset: u64, length: u32, one: bool) {
        let limit = if one { 1 } else { STATUS_DESCRIPTORS_MAX };
        let extents = match self.device.extents(offset, u64::from(length), limit) {
            Ok(extents) => extents,
            Err(error) => {
                let code = errno_of(&error, false);
                return self.put_error(cookie, code, &error.to_string());
            }
        };
        put_status(&mut self.replies, cookie, length, limit, &extents);
    }

    /// Reads a range so that it is in the cache.
    fn warm(&mut self, offset: u64, length: u64) -> Result<(), GroupError> {
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let count = (end - at).min(READ_BYTES_MAX as u64);
            let buffer = &mut self.output[..usize::try_from(count).expect("1 MiB at most")];
            let mut read = [Read { volume: self.volume, offset: at, buffer, result: Ok(()) }];
            self.device.read(&mut read);
            let [read] = read;
            read.result?;
            at += count;
        }
        Ok(())
    }

    /// Answers all reads of the batch, with the small replies in front.
    fn carry_out_fetches(&mut self) -> Result<(), End> {
        let mut fetches = std::mem::take(&mut self.fetches);
        let mut from = 0;
        while from < fetches.len() {
            let fetch = fetches[from];
            if fetch.length > READ_BYTES_MAX {
                self.send_replies()?;
                self.carry_out_large_fetch(fetch)?;
                from += 1;
                continue;
            }
            let mut used = self.replies.len();
            let fitting = fetches[from..].iter().take_while(|fetch| {
                used += prefix_bytes(self.rules.structured_replies) + fetch.length;
                used <= OUTPUT_BYTES && fetch.length <= READ_BYTES_MAX
            });
            let count = fitting.count();
            if count == 0 {
                // The small replies leave no room.
                self.send_replies()?;
            } else {
                self.carry_out_some(&fetches[from..from + count])?;
            }
            from += count;
        }
        fetches.clear();
        self.fetches = fetches;
        self.send_replies()
    }

    /// Answers reads that fit into the output behind the small replies, in one batch and one send.
    fn carry_out_some(&mut self, fetches: &[Fetch]) -> Result<(), End> {
        let (structured, prefix_bytes) =
            (self.rules.structured_replies, prefix_bytes(self.rules.structured_replies));
        let front = self.replies.len();
        let (replies, mut rest) = self.output.split_at_mut(front);
        replies.copy_from_slice(&self.replies);
        self.replies.clear();
        let mut reads = Vec::with_capacity(fetches.len());
        let mut used = front;
        for fetch in fetches {
            let (prefix, tail) = rest.split_at_mut(prefix_bytes);
            let (buffer, tail) = tail.split_at_mut(fetch.length);
            rest = tail;
            used += prefix_bytes + fetch.length;
            put_prefix(prefix, structured, fetch.cookie, fetch.offset, fetch.length, true);
            let (volume, offset) = (self.volume, fetch.offset);
            reads.push(Read { volume, offset, buffer, result: Ok(()) });
        }
        self.device.read(&mut reads);
        self.shared.counters.read_bytes.add((used - front - prefix_bytes * fetches.len()) as u64);
        if reads.iter().all(|read| read.result.is_ok()) {
            return Ok(self.sender.turn().send(&self.output[..used])?);
        }
        let results: Vec<_> = reads.into_iter().map(|read| read.result).collect();
        let mut at = front;
        let mut rebuilt = self.output[..front].to_vec();
        for (fetch, result) in fetches.iter().zip(results) {
            let end = at + prefix_bytes + fetch.length;
            match result {
                Ok(()) => rebuilt.extend_from_slice(&self.output[at..end]),
                Err(error) => {
                    self.shared.counters.errors.add(1);
                    let code = errno_of(&error, false);
                    put_error(&mut rebuilt, structured, fetch.cookie, code, &error.to_string());
                }
            }
            at = end;
        }
        Ok(self.sender.turn().send(&rebuilt)?)
    }

    /// Answers a read above [`READ_BYTES_MAX`] piece by piece: as chunks, or, where the client did
    /// not agree on those, as one simple reply that cannot be taken back once it has begun.
    fn carry_out_large_fetch(&mut self, fetch: Fetch) -> Result<(), End> {
        let structured = self.rules.structured_replies;
        let prefix_bytes = prefix_bytes(self.rules.structured_replies);
        let sender = Arc::clone(&self.sender);
        let mut turn: Option<Turn<'_>> = None;
        let mut done = 0;
        while done < fetch.length {
            let count = (fetch.length - done).min(READ_BYTES_MAX);
            let offset = fetch.offset + done as u64;
            let buffer = &mut self.output[prefix_bytes..prefix_bytes + count];
            let mut reads = [Read { volume: self.volume, offset, buffer, result: Ok(()) }];
            self.device.read(&mut reads);
            let [read] = reads;
            if let Err(error) = read.result {
                self.shared.counters.errors.add(1);
                if let Some(turn) = turn {
                    turn.abandon();
                    return Err(End::Io(io::Error::other(error)));
                }
                let code = errno_of(&error, false);
                self.put_error(fetch.cookie, code, &error.to_string());
                return Ok(());
            }
            let last = done + count == fetch.length;
            let prefix = &mut self.output[..prefix_bytes];
            put_prefix(prefix, structured, fetch.cookie, offset, count, last);
            let headless = !structured && done > 0;
            let start = if headless { prefix_bytes } else { 0 };
            // A simple reply keeps the way out until its end.
            let held = turn.get_or_insert_with(|| sender.turn());
            held.send(&self.output[start..prefix_bytes + count])?;
            if structured {
                turn = None;
            }
            done += count;
            self.shared.counters.read_bytes.add(count as u64);
        }
        Ok(())
    }

    /// Sends the small replies.
    fn send_replies(&mut self) -> Result<(), End> {
        if !self.replies.is_empty() {
            self.sender.turn().send(&self.replies)?;
            self.replies.clear();
        }
        Ok(())
    }

    fn refuse(&mut self, header: &RequestHeader, error: Errno, text: &str) {
        self.shared.counters.errors.add(1);
        self.put_error(header.cookie.get(), error, text);
    }

    fn put_error(&mut self, cookie: u64, error: Errno, text: &str) {
        if hangs_up(error, self.rules.structured_replies) {
            self.not_served = true;
            return;
        }
        put_error(&mut self.replies, self.rules.structured_replies, cookie, error, text);
    }
}
