//! The secondary's side of a stream: asking, taking bytes, telling what it has.

use super::*;
use crate::log::record::HEADER_BYTES;
use crate::replication::epoch::compare;
use crate::replication::wire::PAYLOAD_BYTES_MAX;

/// What a frame of the log counts for at least, where a copy counts how many may wait. It ends
/// where a record does, but for those that the window or the size of a frame cuts: half of the
/// smallest record is less than those of a true primary have.
const FRAME_BYTES_MIN: u64 = HEADER_BYTES as u64 / 2;

impl Channel {
    /// The log that comes next cannot be followed here, or it can.
    pub(in crate::replication) fn note_needs_image(&mut self, needs_image: NeedsImage) {
        self.needs_image = needs_image;
    }

    pub(in crate::replication) fn on_prepared(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        history: &History,
        durable: Lsn,
        requests: u64,
        staged: Option<Staged>,
    ) {
        let Some(follower) = &mut self.follower else { return };
        if follower.stream != stream {
            return;
        }
        follower.asked = Some(history.head);
        self.has_staged |= staged.is_some();
        context.send(Message::Follow {
            group: self.local.id.0,
            stream,
            history: history.to_wire(),
            durable: durable.0,
            requests,
            staged: staged.as_ref().map(image::staged_to_wire),
            needs_image: self.needs_image,
        });
    }

    pub(super) fn on_stream(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        from: Lsn,
    ) -> Result<(), String> {
        let Some(follower) = &mut self.follower else { return Ok(()) };
        if follower.stream != stream {
            return Ok(());
        }
        if follower.asked != Some(from) {
            return Err(format!(
                "group {}: was asked for LSN {:?}, and sends from {from}",
                self.local.name, follower.asked
            ));
        }
        follower.asked = None;
        follower.runs = true;
        follower.expected = from;
        follower.appended = from;
        follower.frames.clear();
        self.refused = Refused::default();
        // Also where it is not known here yet that a mark is on its way.
        (self.local.retired, self.retires) = (false, false);
        context.outputs.push(Output::Retire { group: self.local.id, retired: false });
        if std::mem::take(&mut self.has_staged) {
            context.outputs.push(Output::DropStaging { group: self.local.id });
        }
        self.mismatch = None;
        self.parted = None;
        self.committed = Lsn::ZERO;
        self.compared = Some(from);
        self.stream_begins(context, "the stream begins".to_owned());
        Ok(())
    }

    pub(in crate::replication) fn on_log(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        position: Lsn,
        bytes: Bytes,
    ) -> Result<(), String> {
        let Some(follower) = &mut self.follower else { return Ok(()) };
        if follower.stream != stream || !follower.runs {
            return Ok(());
        }
        if position != follower.expected {
            return Err(format!(
                "group {}: bytes at LSN {position}, expected at {}",
                self.local.name, follower.expected
            ));
        }
        let end = position.advance(bytes.len() as u64);
        let waiting = end.bytes_since(follower.appended);
        let window = context.settings.window_bytes + PAYLOAD_BYTES_MAX as u64;
        if waiting > window {
            return Err(format!("group {}: more bytes than the window", self.local.name));
        }
        // Each is a job of the group's thread, which takes memory for itself.
        if bytes.is_empty() || follower.frames.len() as u64 >= window / FRAME_BYTES_MIN {
            let name = &self.local.name;
            return Err(format!("group {name}: an empty frame, or more than a window of records"));
        }
        follower.frames.push_back(end);
        follower.expected = end;
        self.hears_bytes(context.now, end);
        context.outputs.push(Output::Append { group: self.local.id, stream, position, bytes });
        Ok(())
    }

    pub(in crate::replication) fn on_appended(
        &mut self,
        context: &mut Context<'_>,
        appended: &Appended,
    ) {
        let Some(follower) = &mut self.follower else { return };
        if follower.stream != appended.stream {
            return;
        }
        follower.appended = follower.appended.max(appended.received);
        let (all, frames) = (follower.appended, &mut follower.frames);
        while frames.front().is_some_and(|end| *end <= all) {
            frames.pop_front();
        }
        // What the group itself told meanwhile may be newer.
        if appended.head >= self.local.history.head {
            self.local.history.head = appended.head;
            self.local.history.chain = appended.chain;
            self.local.requests = appended.requests;
        }
        self.local.durable = self.local.durable.max(appended.durable);
        self.send_ack(context);
        self.note_committed(context);
        self.note_following(context);
        self.note_taken_back(context);
    }

    pub(in crate::replication) fn on_append_failed(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        reason: String,
    ) {
        if self.follower.as_ref().is_none_or(|follower| follower.stream != stream) {
            return;
        }
        self.end_following();
        let text = format!("the secondary could not append: {reason}; it tries again by itself");
        self.refuse(context, stream, StopCode::Append, text);
    }

    pub(super) fn send_ack(&mut self, context: &mut Context<'_>) {
        let Some(follower) = &self.follower else { return };
        if !follower.runs || follower.appended < self.local.history.head {
            return;
        }
        context.send(Message::Ack {
            group: self.local.id.0,
            stream: follower.stream,
            received: follower.appended.0,
            head: self.local.history.head.0,
            chain: self.local.history.chain.0,
            durable: self.local.durable.0.min(self.local.history.head.0),
            requests: self.local.requests,
        });
    }

    pub(super) fn note_committed(&mut self, context: &mut Context<'_>) {
        // What a secondary gives back says nothing about what was committed.
        if let Some(told) = self.told
            && !self.local.primary
        {
            let lsn = told.durable.min(self.local.history.head);
            if lsn <= self.committed {
                return;
            }
            self.committed = lsn;
            context.outputs.push(Output::Committed { group: self.local.id, lsn });
        }
    }

    pub(super) fn on_progress(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        told: Told,
        chain: Chain,
    ) {
        if stream == NO_STREAM {
            self.hears_head(context.now, told.head, Some(told.requests));
            return;
        }
        let Some(follower) = &self.follower else { return };
        if follower.stream != stream || !follower.runs {
            return;
        }
        let appended = follower.appended;
        self.hears_head(context.now, told.head, Some(told.requests));
        self.told = Some(told);
        if told.head == self.local.history.head && appended == told.head {
            if chain == self.local.history.chain {
                self.compared = Some(told.head);
            } else {
                self.on_mismatch(context, told.head);
                return;
            }
        }
        self.note_committed(context);
        self.note_following(context);
    }

    pub(super) fn note_following(&mut self, context: &mut Context<'_>) {
        let Some(told) = self.told else { return };
        let behind = told.head.bytes_since(self.local.history.head);
        self.note_going(context, behind);
        if self.state == ReplicationState::CatchingUp {
            if behind == 0 {
                self.set_state(context, ReplicationState::Streaming, "");
            } else {
                self.reason = format!("{} to go", ByteSize(behind));
            }
        } else if self.state == ReplicationState::Streaming
            && behind > context.settings.window_bytes * 4
        {
            let reason = "the primary's log grows faster than it comes";
            self.set_state(context, ReplicationState::CatchingUp, reason);
        }
    }

    /// The peer does not replicate the group with this node any more. Where it could not send the
    /// record that says so, this copy is retired by its word.
    pub(super) fn on_stopped(
        &mut self,
        context: &mut Context<'_>,
        by_primary: bool,
        theirs: &History,
    ) {
        // A stream that runs brings the record that ends it.
        if self.receives() || self.sender.is_some() {
            return;
        }
        self.drop_streams();
        (self.remote, self.silent) = (None, true);
        // Who follows another one meanwhile says again what it holds once it does not.
        let follows_another = self.local.follows.is_some();
        let is_copy = by_primary && !self.local.primary && !self.local.retired && !follows_another;
        match compare(&self.local.history, theirs) {
            // It judges what this node held before, and is told what that is now.
            Relation::TheirsIsPrefix if is_copy => self.announce(context),
            Relation::Same | Relation::MineIsPrefix if is_copy => {
                self.retire(context);
            }
            _ => {}
        }
        let reason = format!("replication was stopped on {}", context.peer_name);
        self.set_state(context, ReplicationState::Idle, reason);
    }

    fn retire(&mut self, context: &mut Context<'_>) {
        (self.local.retired, self.retires) = (true, true);
        context.outputs.push(Output::Retire { group: self.local.id, retired: true });
    }

    pub(super) fn on_stop(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        code: StopCode,
        reason: String,
    ) {
        let sending = self.sender.as_ref().is_some_and(|sender| sender.stream == stream);
        let sending = sending || self.ships(stream);
        // It may have decided by the answer to an earlier ask.
        let looked_up = self.lookup.as_ref().and_then(|(_, lookup)| lookup.stream());
        let offered = [self.offered, looked_up].contains(&Some(stream));
        let following = self.follower.as_ref().is_some_and(|follower| follower.stream == stream);
        if !sending && !following && !offered {
            return;
        }
        // All that was sent until then is here.
        let ended = following && self.receives() && code == StopCode::NotMember;
        if ended && !self.local.primary && !self.local.retired {
            self.retire(context);
        }
        self.drop_streams();
        if code == StopCode::NotMember {
            (self.remote, self.silent) = (None, true);
        }
        self.note_stop(context.now, code);
        let state = match code {
            StopCode::Paused => ReplicationState::Paused,
            StopCode::NotMember | StopCode::NotPrimary => ReplicationState::Idle,
            StopCode::LogGone
            | StopCode::Ahead
            | StopCode::Diverged
            | StopCode::Append
            | StopCode::Read
            | StopCode::CannotKeepUp => ReplicationState::Blocked,
        };
        self.set_state(context, state, reason);
    }
}

#[cfg(test)]
mod tests {
    use super::super::heard::tests::{copy, history};
    use super::*;
    use crate::replication::core::{ConnId, Settings};

    const STREAM: u64 = 5;

    fn told<T>(
        channel: &mut Channel,
        input: impl FnOnce(&mut Channel, &mut Context<'_>) -> T,
    ) -> (T, usize) {
        let (settings, peer_name) = (Settings::default(), "a".parse().unwrap());
        let (mut outputs, now) = (Vec::new(), Duration::from_secs(100));
        let mut context = Context {
            now,
            conn: None,
            echo: (0, 0),
            peer_name: &peer_name,
            settings: &settings,
            outputs: &mut outputs,
        };
        let result = input(channel, &mut context);
        let jobs = outputs.iter().filter(|output| matches!(output, Output::Append { .. }));
        (result, jobs.count())
    }

    /// Sends frames of so many bytes until one is refused; how many jobs that made.
    fn send(channel: &mut Channel, bytes: usize) -> (usize, String) {
        let bytes = Bytes::from(vec![0; bytes]);
        let mut jobs = 0;
        loop {
            let at = channel.follower.as_ref().unwrap().expected;
            let (taken, made) = told(channel, |channel, context| {
                channel.on_log(context, STREAM, at, bytes.clone())
            });
            jobs += made;
            match taken {
                Err(what) => return (jobs, what),
                Ok(()) => assert!(jobs < 1 << 20, "without end"),
            }
        }
    }

    /// Whether the peer is told again what is held here.
    fn says_again(channel: &mut Channel, local: LocalGroup) -> bool {
        let (settings, peer_name) = (Settings::default(), "a".parse().unwrap());
        let mut outputs = Vec::new();
        let mut context = Context {
            now: Duration::from_secs(101),
            conn: Some(ConnId(1)),
            echo: (0, 0),
            peer_name: &peer_name,
            settings: &settings,
            outputs: &mut outputs,
        };
        channel.on_local(&mut context, local);
        let is_word = |output: &Output| {
            matches!(output, Output::Send { message: Message::Announce { .. }, .. })
        };
        outputs.iter().any(is_word)
    }

    #[test]
    fn a_stop_that_is_told_before_the_mark_of_an_earlier_one_is_off_retires_the_copy_after_all() {
        let mut channel = copy(history(&[(1, 0)], 1000));
        let local = LocalGroup { retired: true, ..channel.local.clone() };
        assert!(!says_again(&mut channel, local));
        // Another primary's stream takes the mark off: that is on its way to the group.
        let theirs = history(&[(1, 0), (2, 1000)], 1200);
        told(&mut channel, |channel, context| channel.on_stopped(context, true, &theirs));
        let local = LocalGroup { retired: false, ..channel.local.clone() };
        assert!(says_again(&mut channel, local.clone()));
        assert!(!says_again(&mut channel, local), "once");
        told(&mut channel, |channel, context| {
            channel.on_stopped(context, true, &theirs);
            let retires = |output: &Output| matches!(output, Output::Retire { retired: true, .. });
            assert!(context.outputs.iter().any(retires));
        });
    }

    #[test]
    fn a_failed_copy_that_is_told_of_its_stop_says_nothing_again_without_end() {
        let mut channel = copy(history(&[(1, 0)], 1000));
        let theirs = history(&[(1, 0), (2, 1000)], 1200);
        // It has no mark then: that it failed is what it tells.
        let local = channel.local.clone();
        for _ in 0..3 {
            told(&mut channel, |channel, context| channel.on_stopped(context, true, &theirs));
            assert!(!says_again(&mut channel, local.clone()));
        }
    }

    #[test]
    fn a_copy_that_yields_what_a_peer_lacks_asks_again_whether_it_was_stopped() {
        let mut channel = copy(history(&[(1, 0), (2, 1000)], 1100));
        let local = channel.local.clone();
        assert!(!says_again(&mut channel, LocalGroup { requests: 4, ..local.clone() }));
        // While it had that, a primary which does not replicate to it any more told it nothing.
        let cut = LocalGroup { cuts: 1, history: history(&[(1, 0)], 1000), ..local };
        assert!(says_again(&mut channel, cut));
    }

    /// Found by the simulation: what a hung disk had taken for long was appended when its primary
    /// had stopped replication, and had told nothing to a copy that had nothing.
    #[test]
    fn a_copy_that_gets_its_first_bytes_late_asks_whether_it_was_stopped() {
        let mut channel = copy(history(&[(1, 0)], 1000));
        channel.local.history = history(&[], 0);
        let local = channel.local.clone();
        assert!(!says_again(&mut channel, LocalGroup { requests: 4, ..local.clone() }));
        let begun = LocalGroup { history: history(&[(1, 0)], 1000), ..local };
        assert!(says_again(&mut channel, begun.clone()));
        assert!(!says_again(
            &mut channel,
            LocalGroup { history: history(&[(1, 0)], 1100), ..begun }
        ));
    }

    #[test]
    fn a_peer_has_no_more_frames_wait_here_than_records_fit_the_window() {
        let follows = || {
            let mut channel = copy(history(&[(1, 0)], 1000));
            let at = Lsn(1000);
            channel.follower = Some(Follower {
                stream: STREAM,
                asked: None,
                runs: true,
                expected: at,
                appended: at,
                frames: VecDeque::new(),
            });
            channel
        };
        let window = Settings::default().window_bytes as usize + PAYLOAD_BYTES_MAX;
        // As a primary sends them at the smallest: only the bytes count.
        let (jobs, what) = send(&mut follows(), HEADER_BYTES);
        assert!(what.contains("more bytes than the window"), "{what}");
        assert_eq!(jobs, window / HEADER_BYTES);
        let mut channel = follows();
        let (jobs, what) = send(&mut channel, 1);
        assert!(what.contains("more than a window of records"), "{what}");
        assert_eq!(jobs, window / HEADER_BYTES * 2);
        // As many as are appended may come.
        let appended = Appended {
            group: channel.local.id,
            stream: STREAM,
            received: Lsn(1000 + 7),
            head: Lsn(1000),
            chain: Chain(0),
            durable: Lsn(1000),
            requests: 0,
        };
        told(&mut channel, |channel, context| channel.on_appended(context, &appended));
        assert_eq!(send(&mut channel, 1).0, 7);
        let (jobs, what) = send(&mut follows(), 0);
        assert!(jobs == 0 && what.contains("an empty frame"), "{what}");
    }
}
