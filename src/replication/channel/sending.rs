//! The primary's side of a stream: whether it is granted, what is sent, what the acks tell.

use super::*;
use crate::replication::epoch::compare;
use crate::replication::wire::PAYLOAD_BYTES_MAX;

impl Channel {
    pub(super) fn on_follow(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        theirs: History,
        durable: Lsn,
        requests: u64,
    ) {
        self.sender = None;
        self.shipping = None;
        self.lookup = None;
        self.offered = None;
        self.remote.get_or_insert_with(|| Remote {
            primary: false,
            recovering: false,
            paused: false,
            history: theirs.clone(),
        });
        let group = self.local.id.0;
        let name = self.local.name.clone();
        if !self.active() {
            let reason = format!("replication of {name} to this node was stopped");
            self.stop(context, group, stream, StopCode::NotMember, &reason);
            return;
        }
        if !self.local.primary && !self.gives_back(&theirs) {
            let reason = format!("neither node is primary; run `tidelog promote {name}` on one");
            self.stop(context, group, stream, StopCode::NotPrimary, &reason);
            return;
        }
        if self.paused {
            let reason = format!("paused on the primary; `tidelog resume {name}` there goes on");
            self.stop(context, group, stream, StopCode::Paused, &reason);
            return;
        }
        let acked = Acked { received: theirs.head, durable, requests };
        // Whatever becomes of the stream: it has no more than this.
        self.note_at_most(context, acked);
        match compare(&self.local.history, &theirs) {
            Relation::Same | Relation::TheirsIsPrefix => {
                if theirs.head < self.local.log_start {
                    self.log_gone(context, stream, theirs.head);
                } else if theirs.head == Lsn::ZERO {
                    self.grant(context, stream, acked);
                } else {
                    let head = theirs.head;
                    self.look_up(context, head, Lookup::Follow { stream, history: theirs, acked });
                }
            }
            Relation::MineIsPrefix => {
                let reason = format!(
                    "the secondary holds {} that the primary lost; nothing was changed: run \
                     `tidelog promote {name}` on the secondary and `tidelog demote {name}` on the \
                     other to keep them",
                    ByteSize(theirs.head.bytes_since(self.local.history.head))
                );
                self.refuse(context, stream, StopCode::Ahead, reason);
            }
            Relation::Diverged { common, mine_bytes, theirs_bytes } => {
                if common == Lsn::ZERO || !self.local.primary {
                    self.refuse_diverged(context, stream, common, mine_bytes, theirs_bytes);
                    return;
                }
                if common < self.local.log_start {
                    // It keeps what it has more, and is then a copy that the log left behind; one
                    // without an image has nothing to go on from.
                    if self.needs_image_there == NeedsImage::Whole {
                        self.ship(context, stream, None, common);
                        return;
                    }
                    self.offered = Some(stream);
                    context.send(Message::MayFollow {
                        group: self.local.id.0,
                        head: common.0,
                        chain: None,
                    });
                    return;
                }
                let stream = Some(stream);
                self.look_up(context, common, Lookup::Part { stream, at: common, expected: None });
            }
        }
    }

    /// Ends the stream, or the image, that is sent, and says why.
    pub(super) fn stop_sending(&mut self, context: &mut Context<'_>, code: StopCode, reason: &str) {
        let sends = self.sender.take().map(|sender| sender.stream);
        let ships = self.shipping.take().map(|shipping| shipping.stream());
        if let Some(stream) = sends.or(ships) {
            self.stop(context, self.local.id.0, stream, code, reason);
        }
    }

    /// A primary keeps a stream to a node that was a member going until it has the record of that.
    pub(super) fn note_ending(&mut self, was_active: bool) {
        let stranger = self.local.membership == Membership::Stranger;
        if !stranger || self.sender.is_none() || !self.local.primary {
            self.ending = None;
            return;
        }
        if was_active {
            self.ending = Some(self.local.history.head);
        }
        if self.ending.is_some() {
            self.local.membership = Membership::Stopped;
        }
    }

    /// A node that was a member may have been away when that ended, and lack the record that says
    /// so. Whoever names reigns and a head that lie in this log held it: it learns that alone. A
    /// node that is no primary, or asks first whether it still is one, keeps the word until it is.
    pub(super) fn tell_stopped(&mut self, context: &mut Context<'_>, theirs: History) {
        if !self.local.primary || self.local.recovering {
            self.untold = Some(theirs);
            return;
        }
        // One that has all of it has the record too, and may not go by it alone.
        let relation = compare(&self.local.history, &theirs);
        let held = !theirs.reigns.is_empty()
            && matches!(relation, Relation::Same | Relation::TheirsIsPrefix);
        if held {
            self.say(context, true, &theirs);
        }
    }

    /// Who begins to reign tells what could be told by nobody before.
    pub(super) fn tell_untold(&mut self, context: &mut Context<'_>) {
        let theirs = self.untold.take();
        if !self.visible()
            && let Some(theirs) = theirs
        {
            self.tell_stopped(context, theirs);
        }
    }

    /// The peer's log is part of this history, and ends before this log begins.
    fn log_gone(&mut self, context: &mut Context<'_>, stream: u64, head: Lsn) {
        if self.local.primary {
            self.ship_behind(context, stream, head);
            return;
        }
        let reason = format!(
            "the peer ends at LSN {head}, and the log here begins at {}: the part between was folded",
            self.local.log_start
        );
        self.refuse(context, stream, StopCode::LogGone, reason);
    }

    pub(super) fn refuse_diverged(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        common: Lsn,
        mine_bytes: u64,
        theirs_bytes: u64,
    ) {
        let name = self.local.name.clone();
        let reason = format!(
            "histories part at LSN {common}: the primary has {} after it, the secondary {} that \
             the primary lacks; nothing was changed: save what is needed from the secondary with \
             `tidelog image open {name} --at now` there, then delete that copy and replicate anew",
            ByteSize(mine_bytes),
            ByteSize(theirs_bytes)
        );
        self.refuse(context, stream, StopCode::Diverged, reason);
    }

    pub(super) fn refuse(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        code: StopCode,
        reason: String,
    ) {
        self.stop(context, self.local.id.0, stream, code, &reason);
        self.note_stop(context.now, code);
        self.set_state(context, ReplicationState::Blocked, reason);
    }

    /// Whether the peer is a primary that has come back with less of this very history, and asks
    /// for what it lost.
    fn gives_back(&self, theirs: &History) -> bool {
        self.remote.as_ref().is_some_and(|remote| remote.primary && remote.recovering)
            && matches!(
                compare(&self.local.history, theirs),
                Relation::TheirsIsPrefix | Relation::Same
            )
    }

    pub(super) fn grant(&mut self, context: &mut Context<'_>, stream: u64, acked: Acked) {
        self.parted = None;
        self.end_shipment(context);
        context.outputs.push(Output::SplitBrain { group: self.local.id, there_is: false });
        self.sender =
            Some(Sender { stream, cursor: acked.received, received: acked.received, queued: 0 });
        self.mismatch = None;
        self.note_acked(context.now, acked);
        let head = self.local.history.head;
        self.received_marks.appended(context.now, head);
        self.durable_marks.appended(context.now, head);
        context.send(Message::Stream { group: self.local.id.0, stream, from: acked.received.0 });
        let to_go = ByteSize(head.bytes_since(acked.received));
        self.stream_begins(context, format!("{to_go} to go"));
        self.send_progress(context);
        self.pump(context);
        self.note_caught_up(context);
    }

    pub(in crate::replication) fn on_chain_found(
        &mut self,
        context: &mut Context<'_>,
        ticket: u64,
        chain: Option<Chain>,
    ) {
        if self.lookup.as_ref().is_none_or(|(waiting, _)| *waiting != ticket) {
            return;
        }
        let Some((_, lookup)) = self.lookup.take() else { return };
        match lookup {
            Lookup::Follow { stream, history, acked } => match chain {
                Some(chain) if chain == history.chain => {
                    self.compared = Some(history.head);
                    if self.needs_image_there != NeedsImage::No && self.local.primary {
                        self.ship_behind(context, stream, history.head);
                    } else {
                        self.grant(context, stream, acked);
                    }
                }
                Some(_) => {
                    let mine = self.local.history.head.bytes_since(history.head);
                    self.refuse_diverged(context, stream, history.head, mine, 0);
                }
                None if history.head < self.local.log_start => {
                    self.log_gone(context, stream, history.head);
                }
                // No record of this log ends there.
                None => {
                    let mine = self.local.history.head.bytes_since(history.head);
                    self.refuse_diverged(context, stream, history.head, mine, 0);
                }
            },
            Lookup::Part { stream, at, expected } => match (chain, stream) {
                (Some(chain), _) if expected.is_none_or(|expected| expected == chain) => {
                    self.offered = stream;
                    context.send(Message::MayFollow {
                        group: self.local.id.0,
                        head: at.0,
                        chain: Some(chain.0),
                    });
                }
                (_, Some(stream)) => {
                    let mine = self.local.history.head.bytes_since(at);
                    self.refuse_diverged(context, stream, at, mine, 0);
                }
                (_, None) => {
                    if let Some(remote) = self.remote.clone() {
                        self.cannot_part(context, &remote, at);
                    }
                }
            },
        }
    }

    /// The peer says where its log ends: it has no more than that, whatever it had acknowledged.
    pub(super) fn note_at_most(&mut self, context: &mut Context<'_>, theirs: Acked) {
        let known = self.acked;
        if theirs.received < known.durable {
            let name = &self.local.name;
            context.outputs.push(Output::Event {
                severity: Severity::Error,
                code: "peer-rolled-back",
                group: Some(name.clone()),
                text: format!(
                    "group {name}: {} had LSN {} durable and now ends at {}: its disk was rolled \
                     back, or lied; it is sent again from there",
                    context.peer_name, known.durable, theirs.received
                ),
            });
        }
        let at_most = Acked {
            received: known.received.min(theirs.received),
            durable: known.durable.min(theirs.durable),
            requests: known.requests.min(theirs.requests),
        };
        self.note_acked(context.now, at_most);
    }

    fn note_acked(&mut self, now: Duration, acked: Acked) {
        self.acked = acked;
        self.received_marks.acknowledged(now, acked.received);
        self.durable_marks.acknowledged(now, acked.durable);
    }

    pub(super) fn pump(&mut self, context: &mut Context<'_>) {
        let Some(conn) = context.conn else { return };
        let Some(sender) = &mut self.sender else { return };
        let limit = sender.received.advance(context.settings.window_bytes);
        let head = self.local.history.head.min(limit).min(self.ending.unwrap_or(Lsn::MAX));
        while sender.queued < FRAMES_QUEUED_MAX && sender.cursor < head {
            let bytes = head.bytes_since(sender.cursor).min(PAYLOAD_BYTES_MAX as u64);
            let to = sender.cursor.advance(bytes);
            context.outputs.push(Output::SendLog {
                conn,
                group: self.local.id,
                stream: sender.stream,
                from: sender.cursor,
                to,
            });
            sender.cursor = to;
            sender.queued += 1;
        }
    }

    pub(in crate::replication) fn on_sent(&mut self, context: &mut Context<'_>, stream: u64) {
        if let Some(sender) = &mut self.sender
            && sender.stream == stream
        {
            sender.queued = sender.queued.saturating_sub(1);
            self.pump(context);
        }
    }

    pub(in crate::replication) fn on_read_failed(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        reason: String,
    ) {
        if self.sender.as_ref().is_some_and(|sender| sender.stream == stream) {
            self.sender = None;
            let text = format!("the primary could not read its log: {reason}; it is tried again");
            self.refuse(context, stream, StopCode::Read, text);
        }
    }

    /// To a copy that follows, by its stream; to one that does not, only how far this primary is.
    pub(super) fn send_progress(&mut self, context: &mut Context<'_>) {
        let stream = match &self.sender {
            Some(sender) => sender.stream,
            None if self.tells_of_its_head() => NO_STREAM,
            None => return,
        };
        let lag = self.lags(context.now).0.unwrap_or(Duration::MAX);
        context.send(Message::Progress {
            group: self.local.id.0,
            stream,
            head: self.local.history.head.0,
            chain: self.local.history.chain.0,
            durable: self.local.durable.0.min(self.local.history.head.0),
            requests: self.local.requests,
            lag: u64::try_from(lag.as_nanos()).unwrap_or(u64::MAX),
            echo: context.echo.0,
            held: context.echo.1,
        });
    }

    pub(super) fn on_ack(
        &mut self,
        context: &mut Context<'_>,
        stream: u64,
        acked: Acked,
        head: Lsn,
        chain: Chain,
    ) -> Result<(), String> {
        let Some(sender) = &mut self.sender else { return Ok(()) };
        if sender.stream != stream {
            return Ok(());
        }
        if acked.received > sender.cursor || acked.received < sender.received {
            return Err(format!(
                "group {}: acknowledges LSN {}, sent from {} to {}",
                self.local.name, acked.received, sender.received, sender.cursor
            ));
        }
        sender.received = acked.received;
        // What is behind its head is the beginning of a request, and in no log there yet.
        self.note_acked(context.now, Acked { received: head, ..acked });
        if head == self.local.history.head {
            if chain == self.local.history.chain {
                self.compared = Some(head);
            } else {
                self.on_mismatch(context, head);
            }
        }
        self.pump(context);
        self.note_caught_up(context);
        self.check_rpo(context);
        if self.ending.is_some_and(|end| head >= end) {
            // It is free to follow another one.
            let reason = "replication was stopped";
            self.stop(context, self.local.id.0, stream, StopCode::NotMember, reason);
            self.drop_streams();
            self.remote = None;
            self.local.membership = Membership::Stranger;
            self.set_state(context, ReplicationState::Idle, "not replicated with this peer");
        }
        Ok(())
    }

    pub(super) fn note_caught_up(&mut self, context: &mut Context<'_>) {
        let behind = self.local.history.head.bytes_since(self.acked.received);
        let window = context.settings.window_bytes;
        self.note_going(context, behind);
        if behind == 0 {
            self.keeps_up();
        }
        if self.state == ReplicationState::CatchingUp && behind == 0 {
            self.set_state(context, ReplicationState::Streaming, "");
        } else if self.state == ReplicationState::Streaming && behind > window * 4 {
            self.set_state(
                context,
                ReplicationState::CatchingUp,
                "the log grows faster than it is taken",
            );
        }
        if self.state == ReplicationState::CatchingUp {
            self.reason = format!("{} to go", ByteSize(behind));
        }
    }

    pub(super) fn check_rpo(&mut self, context: &mut Context<'_>) {
        let Membership::Member { rpo_target: Some(target), .. } = self.local.membership else {
            self.rpo_alarm = false;
            return;
        };
        if !self.local.primary {
            return;
        }
        let actual = self.durable_marks.lag_at_least(context.now);
        let exceeded = actual > target.0;
        if exceeded && !self.rpo_alarm {
            context.outputs.push(Output::Event {
                severity: Severity::Warning,
                code: "rpo-exceeded",
                group: Some(self.local.name.clone()),
                text: format!(
                    "group {}: the copy on {} is {:.1} s old, target {target}",
                    self.local.name,
                    context.peer_name,
                    actual.as_secs_f64()
                ),
            });
        }
        self.rpo_alarm = exceeded;
    }

    pub(super) fn on_mismatch(&mut self, context: &mut Context<'_>, lsn: Lsn) {
        self.mismatch = Some(lsn);
        self.drop_streams();
        let reason = format!(
            "the two logs differ before LSN {lsn} though their histories agree: one of them is \
             damaged; `tidelog events` on the damaged one names the record"
        );
        self.set_state(context, ReplicationState::Blocked, reason);
    }
}
