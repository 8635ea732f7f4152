//! Who follows whom: what two announcements mean together, and the one change of role that happens
//! by itself.

use super::*;
use crate::replication::epoch::compare;

impl Channel {
    pub(super) fn evaluate(&mut self, context: &mut Context<'_>) {
        let name = self.local.name.clone();
        let peer = context.peer_name.clone();
        if !self.active() && !self.is_taken_up_again() {
            // A stream that runs carries the record that ends it.
            if self.sender.is_none() {
                self.set_state(context, ReplicationState::Idle, "replication was stopped");
            }
            return;
        }
        if let Some(reason) = self.paused_because(&peer) {
            return self.settle_paused(context, reason);
        }
        let Some(remote) = self.remote.clone() else { return self.await_word(context) };
        match (self.local.primary, remote.primary) {
            (false, true) => self.primary_is_there(context, &remote),
            (true, false) if self.local.recovering => self.come_back(context, &remote),
            (true, false) => {
                let serves = self.sender.is_some() || self.shipping.is_some();
                if !serves && self.lookup.is_none() && !self.needs_a_hand() {
                    self.set_state(
                        context,
                        ReplicationState::Idle,
                        format!("{peer} has not asked for the log yet"),
                    );
                }
            }
            (false, false) => {
                // Another peer may be followed from now on.
                self.end_following();
                let reason = match &self.local.follows {
                    Some(primary) => format!("both are copies; this one follows {primary}"),
                    None => format!("no primary: run `tidelog promote {name}` on one of the two"),
                };
                self.set_state(context, ReplicationState::Idle, reason);
            }
            (true, true) => self.two_primaries(context, &remote),
        }
    }

    pub(in crate::replication) fn on_pause(&mut self, context: &mut Context<'_>, paused: bool) {
        if self.paused == paused {
            return;
        }
        self.paused = paused;
        if paused {
            let name = &self.local.name;
            let reason = format!("paused on the primary; `tidelog resume {name}` goes on");
            self.stop_sending(context, StopCode::Paused, &reason);
        }
        self.announce(context);
        self.evaluate(context);
    }

    /// Why nothing is copied, where that is by command of either side.
    pub(in crate::replication) fn paused_because(&self, peer: &Name) -> Option<String> {
        let name = &self.local.name;
        if self.paused {
            return Some(format!("paused by command; `tidelog resume {name}` goes on"));
        }
        let there = self.remote.as_ref().is_some_and(|remote| remote.paused);
        there.then(|| format!("paused by command on {peer}; `tidelog resume {name}` there goes on"))
    }

    /// A copy beside another, or beside a primary while replication is paused.
    pub(super) fn is_idle_copy(&self, peer: &Name) -> bool {
        let copy = |remote: &Remote| !remote.primary;
        let beside_a_copy = self.remote.as_ref().is_some_and(copy);
        !self.local.primary && (beside_a_copy || self.paused_because(peer).is_some())
    }

    /// While replication is paused nothing is copied, but who reigns is settled all the same: no
    /// primary that comes back serves beside a newer one, and of two that serve both sides know.
    fn settle_paused(&mut self, context: &mut Context<'_>, reason: String) {
        let primary = self.local.primary;
        match self.remote.clone() {
            None if self.needs_a_hand() => self.drop_streams(),
            Some(remote) if primary && remote.primary => self.two_primaries(context, &remote),
            Some(remote)
                if primary
                    && self.local.recovering
                    && self.reigned_meanwhile(&remote).is_some() =>
            {
                self.drop_streams();
                self.come_back(context, &remote);
            }
            remote => {
                // The other has yielded: else the next start would ask nobody before it serves.
                let yielded = remote.is_some_and(|remote| {
                    let relation = compare(&self.local.history, &remote.history);
                    matches!(relation, Relation::Same | Relation::TheirsIsPrefix)
                });
                if primary && yielded {
                    let (group, there_is) = (self.local.id, false);
                    context.outputs.push(Output::SplitBrain { group, there_is });
                }
                self.drop_streams();
                self.set_state(context, ReplicationState::Paused, reason);
            }
        }
    }

    /// Whether the log here ends between the record that replication to this node was stopped and
    /// the one that took it up again: the peer has more of this very log, and this node as a
    /// member.
    fn is_taken_up_again(&self) -> bool {
        let goes_on = |remote: &Remote| {
            remote.primary
                && compare(&self.local.history, &remote.history) == Relation::MineIsPrefix
        };
        !self.local.primary && !self.receives() && self.remote.as_ref().is_some_and(goes_on)
    }

    /// A peer that is connected has said nothing of the group.
    pub(super) fn await_word(&mut self, context: &mut Context<'_>) {
        if context.conn.is_none() && self.state == ReplicationState::Paused {
            // Of the link itself status tells beside it.
            return self.set_state(context, ReplicationState::Idle, "the link is down");
        }
        if context.conn.is_none() || self.needs_a_hand() {
            return;
        }
        let (name, peer) = (&self.local.name, context.peer_name);
        let mut reason = format!("connected; {peer} has not said yet what it holds");
        if self.silent {
            reason = format!("replication was stopped on {peer}");
        } else if self.local.primary {
            reason += &format!(
                "; if this lasts, {peer} has no copy (`tidelog replicate {name} --to {peer}` makes \
                 one), or it does not know this node as a member: then switch over to a node that \
                 it knows (`tidelog switchover {name} --to NODE`)"
            );
        }
        self.set_state(context, ReplicationState::Idle, reason);
    }

    /// The peer is primary: it is followed, unless it has come back with less and takes that back.
    fn primary_is_there(&mut self, context: &mut Context<'_>, remote: &Remote) {
        let ahead = compare(&self.local.history, &remote.history) == Relation::TheirsIsPrefix;
        if remote.recovering && ahead && self.local.history.head > remote.history.head {
            let lost = self.local.history.head.bytes_since(remote.history.head);
            let peer = context.peer_name;
            let reason = format!("{peer} takes back {} that it lost", ByteSize(lost));
            self.set_state(context, ReplicationState::Idle, reason);
            return;
        }
        if remote.recovering && remote.history.counter() < self.local.history.counter() {
            let (peer, name) = (context.peer_name, &self.local.name);
            let reason = format!(
                "{peer} has come back as primary of an earlier reign: run `tidelog promote {name}` \
                 here, and it follows"
            );
            self.set_state(context, ReplicationState::Idle, reason);
            return;
        }
        self.sender = None;
        self.ask(context);
    }

    /// This primary has just started, and the peer is a secondary: what that has and this node has
    /// lost comes back before anybody is served.
    fn come_back(&mut self, context: &mut Context<'_>, remote: &Remote) {
        if self.follower.is_some() {
            return;
        }
        let peer = context.peer_name.clone();
        let name = self.local.name.clone();
        if let Some(counter) = self.reigned_meanwhile(remote) {
            context.outputs.push(Output::HoldBack {
                group: self.local.id,
                counter,
                reason: format!(
                    "{peer} holds a reign that went on while this node was away, and is not primary; \
                     `tidelog promote {name}` there goes on with what it has, `tidelog promote \
                     {name} --force` here with what is here"
                ),
            });
            let reason = format!(
                "{peer} holds a reign that went on while this node was away, and is not primary: run \
                 `tidelog promote {name}` there, and this node follows"
            );
            self.set_state(context, ReplicationState::Idle, reason);
            return;
        }
        let newest = remote.history.last();
        let given_up = newest.is_some_and(|newest| self.local.given_up.contains(&newest.id));
        let lacks = compare(&self.local.history, &remote.history) == Relation::MineIsPrefix;
        if lacks && !given_up {
            let lost = remote.history.head.bytes_since(self.local.history.head);
            context.outputs.push(Output::Event {
                severity: Severity::Warning,
                code: "takes-back",
                group: Some(self.local.name.clone()),
                text: format!(
                    "group {}: {peer} has {} that this node lost: they are taken back before \
                     anybody is served",
                    self.local.name,
                    ByteSize(lost)
                ),
            });
            self.ask(context);
        } else {
            context.outputs.push(Output::Serve { group: self.local.id });
        }
    }

    /// The peer's newest reign, where it is above this node's and another node's.
    fn reigned_meanwhile(&self, remote: &Remote) -> Option<u64> {
        let (mine, theirs) = (self.local.history.last(), remote.history.last()?);
        let newer = mine.is_none_or(|mine| theirs.counter > mine.counter);
        let foreign = mine.is_none_or(|mine| theirs.author != mine.author);
        let goes_on = !self.local.given_up.contains(&theirs.id);
        (newer && foreign && goes_on).then_some(theirs.counter)
    }

    /// All that the peer had is here again.
    pub(super) fn note_taken_back(&mut self, context: &mut Context<'_>) {
        let there = self.remote.as_ref().map(|remote| remote.history.head);
        if self.local.primary && there.is_some_and(|there| self.local.history.head >= there) {
            self.end_following();
            context.outputs.push(Output::Serve { group: self.local.id });
        }
    }

    /// Both claim to be primary. One that serves nobody yet yields to the newer reign; of two that
    /// serve none does.
    fn two_primaries(&mut self, context: &mut Context<'_>, remote: &Remote) {
        let mine = &self.local.history;
        let mine_is_newer = mine.counter() > remote.history.counter();
        let theirs_is_newer = mine.counter() < remote.history.counter();
        let relation = compare(mine, &remote.history);
        let peer = context.peer_name.clone();
        let name = self.local.name.clone();
        if theirs_is_newer && self.local.recovering && relation != Relation::Same {
            let reason = format!(
                "{peer} became primary while this node was away; this node is about to follow it"
            );
            context.outputs.push(Output::HoldBack {
                group: self.local.id,
                counter: remote.history.counter().unwrap_or_default(),
                reason: format!(
                    "is about to follow {peer}, which became primary while this node was away; \
                     `tidelog status {name}` on both shows what it waits for, `tidelog promote \
                     {name} --force` serves here nevertheless, beside {peer}"
                ),
            });
            self.set_state(context, ReplicationState::Idle, reason);
            return;
        }
        if mine_is_newer && remote.recovering && relation != Relation::Same {
            if self.local.recovering {
                context.outputs.push(Output::Serve { group: self.local.id });
            }
            let reason = format!("{peer} has come back as primary; it is about to follow");
            self.set_state(context, ReplicationState::Idle, reason);
            self.offer_parting(context, remote, &relation);
            return;
        }
        self.split_brain(context);
        self.offer_parting(context, remote, &relation);
    }

    /// Tells the peer where its history leaves this one.
    fn offer_parting(&mut self, context: &mut Context<'_>, remote: &Remote, relation: &Relation) {
        let (at, expected) = match relation {
            Relation::TheirsIsPrefix => (remote.history.head, Some(remote.history.chain)),
            Relation::Diverged { common, .. } => (*common, None),
            Relation::MineIsPrefix => (self.local.history.head, Some(self.local.history.chain)),
            Relation::Same => return,
        };
        if at == Lsn::ZERO {
            self.cannot_part(context, remote, at);
            return;
        }
        if at < self.local.log_start {
            // The reigns tell where it is, as they do of a copy that the log left behind; what the
            // peer then lacks comes as an image.
            context.send(Message::MayFollow { group: self.local.id.0, head: at.0, chain: None });
            return;
        }
        self.look_up(context, at, Lookup::Part { stream: None, at, expected });
    }

    /// The peer could follow from nowhere: it holds something else where its history leaves this.
    pub(super) fn cannot_part(&mut self, context: &mut Context<'_>, remote: &Remote, at: Lsn) {
        if !remote.recovering {
            return;
        }
        let name = &self.local.name;
        let peer = context.peer_name;
        let reason = format!(
            "{peer} has come back as primary with a history that has nothing in common with this \
             one at LSN {at}; nothing was changed: on {peer} save what is needed, `tidelog demote \
             {name}` and `tidelog group delete {name}`, then here `tidelog replicate {name} --to \
             {peer}`"
        );
        self.set_state(context, ReplicationState::Blocked, reason);
    }

    /// Tells of a split brain, and again where it is known by now that a side has what it was said
    /// not to have: the first word may come before the other's, and both go on writing.
    fn split_brain(&mut self, context: &mut Context<'_>) {
        self.drop_streams();
        let name = &self.local.name;
        let peer = context.peer_name;
        let (at, mine, theirs) = self.behind_the_parting();
        let (ours, others) = (ByteSize(mine), ByteSize(theirs));
        let what = match (mine, theirs) {
            (0, 0) => "with equal logs so far".to_owned(),
            (_, 0) => format!("so far this node has all that {peer} has, and {ours} more"),
            (0, _) => format!("so far {peer} has all that this node has, and {others} more"),
            _ => format!("since LSN {at} this node wrote {ours} and {peer} wrote {others}"),
        };
        let reason = format!(
            "both nodes are primary: {what}; stop the hosts of the one that is to yield, then \
             `tidelog resolve {name} --preview` and `tidelog resolve {name} --discard-local` there"
        );
        let have_more = (mine > 0, theirs > 0);
        let known = self.state == ReplicationState::SplitBrain;
        if known && self.told_have_more != have_more {
            context.outputs.push(Output::Event {
                severity: Severity::Error,
                code: "split-brain",
                group: Some(name.clone()),
                text: format!("group {name}: the split brain with {peer} goes on: {reason}"),
            });
        }
        self.told_have_more = have_more;
        self.set_state(context, ReplicationState::SplitBrain, reason);
        if !self.local.recovering {
            context.outputs.push(Output::SplitBrain { group: self.local.id, there_is: true });
        }
    }

    /// Where the two histories part, as far as that is known: the lowest of what the peer told and
    /// what the histories say. None where nothing speaks of it.
    pub(in crate::replication) fn parting(&self) -> Option<Lsn> {
        let mine = &self.local.history;
        let theirs = self.remote.as_ref().map(|remote| &remote.history);
        let by_histories = theirs.and_then(|theirs| match compare(mine, theirs) {
            Relation::Same => None,
            Relation::MineIsPrefix => Some(mine.head),
            Relation::TheirsIsPrefix => Some(theirs.head),
            Relation::Diverged { common, .. } => Some(common),
        });
        by_histories.into_iter().chain(self.parted.map(|parted| parted.at)).min()
    }

    /// That, and the bytes behind it that only this node has, and only the peer.
    fn behind_the_parting(&self) -> (Lsn, u64, u64) {
        let mine = self.local.history.head;
        let theirs = self.remote.as_ref().map_or(mine, |remote| remote.history.head);
        let at = self.parting().unwrap_or(mine);
        (at, mine.bytes_since(at), theirs.bytes_since(at))
    }

    pub(super) fn ask(&mut self, context: &mut Context<'_>) {
        if self.local.failed {
            self.set_state(
                context,
                ReplicationState::Blocked,
                "this node's disk failed; restart it once the disk is well",
            );
            return;
        }
        if let Some(other) = &self.local.follows {
            let (name, peer) = (&self.local.name, context.peer_name);
            let (state, reason) = if self.holds_a_later_reign() {
                let reason = format!(
                    "{peer} is primary of an earlier reign, beside {other}, which this node \
                     follows: two nodes may serve the group; `tidelog resolve {name} --preview` \
                     on {peer} shows what each has"
                );
                (ReplicationState::Blocked, reason)
            } else {
                (ReplicationState::Idle, format!("this node follows {other}"))
            };
            self.set_state(context, state, reason);
            return;
        }
        self.end_following();
        let stream = self.next_stream;
        self.next_stream += 1;
        self.follower = Some(Follower {
            stream,
            asked: None,
            runs: false,
            expected: Lsn::ZERO,
            appended: Lsn::ZERO,
            frames: VecDeque::new(),
        });
        context.outputs.push(Output::Prepare { group: self.local.id, stream });
        if !self.needs_a_hand() {
            let reason = format!("{} is asked for the log", context.peer_name);
            self.set_state(context, ReplicationState::Idle, reason);
        }
    }

    pub(super) fn look_up(&mut self, context: &mut Context<'_>, lsn: Lsn, lookup: Lookup) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.lookup = Some((ticket, lookup));
        context.outputs.push(Output::LookupChain { group: self.local.id, lsn, ticket });
    }

    pub(super) fn on_may_follow(
        &mut self,
        context: &mut Context<'_>,
        at: Lsn,
        chain: Option<Chain>,
    ) {
        self.parted = Some(Parted { at, chain });
        let peer_is_primary = self.remote.as_ref().is_some_and(|remote| remote.primary);
        let theirs = self.remote.as_ref().and_then(|remote| remote.history.counter());
        let reigned_after = self.local.recovering && self.local.history.counter() < theirs;
        if !peer_is_primary || self.local.primary && !reigned_after {
            return;
        }
        if self.holds_a_later_reign() {
            return self.hold_a_later_reign(context);
        }
        context.outputs.push(Output::Yield { group: self.local.id, at, chain });
    }

    /// Whether this copy holds what it received of a reign that is no earlier than the peer's, and
    /// that the peer, which is primary, lacks: another primary has answered by it. It does not
    /// yield by itself then, unless that other one has given it up.
    pub(super) fn holds_a_later_reign(&self) -> bool {
        let Some(remote) = self.remote.as_ref().filter(|remote| remote.primary) else {
            return false;
        };
        let Some(mine) = self.local.history.last() else { return false };
        let theirs = remote.history.last();
        let same = theirs.is_some_and(|theirs| theirs.id == mine.id);
        let earlier = theirs.is_some_and(|theirs| theirs.counter > mine.counter);
        let relation = compare(&self.local.history, &remote.history);
        let lacks = matches!(relation, Relation::Diverged { .. } | Relation::TheirsIsPrefix);
        let given_up = self.local.given_up.contains(&mine.id);
        !self.local.primary && !self.local.authored && !given_up && !same && !earlier && lacks
    }

    /// The copy stays as it is, and both sides say what helps.
    pub(super) fn hold_a_later_reign(&mut self, context: &mut Context<'_>) {
        let (name, peer) = (self.local.name.clone(), context.peer_name);
        if let Some(follower) = self.end_following() {
            let reason = format!(
                "the copy there holds a later reign than the one here, and yields to none by \
                 itself: on that node `tidelog resolve {name} --preview` shows both, `tidelog \
                 resolve {name} --discard-local` has it follow this one"
            );
            self.stop(context, self.local.id.0, follower.stream, StopCode::Diverged, &reason);
        }
        let reason = format!(
            "this copy holds a later reign than that of {peer}, which is primary; nothing was \
             changed: `tidelog resolve {name} --preview` shows what each has; `tidelog resolve \
             {name} --discard-local` here keeps as a branch what {peer} lacks, and follows it"
        );
        self.set_state(context, ReplicationState::Blocked, reason);
    }

    pub(in crate::replication) fn on_yielded(&mut self, context: &mut Context<'_>) {
        self.parted = None;
        context.outputs.push(Output::Event {
            severity: Severity::Warning,
            code: "yielded",
            group: Some(self.local.name.clone()),
            text: format!(
                "group {}: this node follows {}, whose reign goes on",
                self.local.name, context.peer_name
            ),
        });
        self.drop_streams();
        self.state = ReplicationState::Idle;
        // Where the change of role is not known here yet, it is looked at when it is.
        if !self.local.primary {
            self.evaluate(context);
        }
    }

    pub(in crate::replication) fn on_yield_refused(
        &mut self,
        context: &mut Context<'_>,
        reason: String,
    ) {
        if let Some(follower) = self.end_following() {
            self.stop(context, self.local.id.0, follower.stream, StopCode::Diverged, &reason);
        }
        self.set_state(context, ReplicationState::Blocked, reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::MemoryDisk;
    use crate::replication::drive::tests::node_on;
    use crate::replication::replica::local_group;
    use crate::replication::resolve::known_parting;
    use crate::units::NodeId;

    #[tokio::test]
    async fn histories_part_at_the_lowest_of_what_was_told_and_what_they_say() {
        let (node, group) = node_on(std::sync::Arc::new(MemoryDisk::new()));
        let (me, peer) = (NodeId([1; 16]), NodeId([2; 16]));
        let local = local_group(&*group, me, peer, false);
        let mut channel = Channel::new(Duration::ZERO, &local);
        let head = channel.local.history.head;
        assert_eq!(channel.parting(), None);
        let shorter = channel.local.history.until(Lsn(head.0 - 8));
        let (primary, recovering, paused) = (true, false, false);
        channel.remote = Some(Remote { primary, recovering, paused, history: shorter.clone() });
        let told = |at| Some(Parted { at, chain: None });
        for (parted, at) in [
            (None, shorter.head),
            // Told before the peer lost what it had.
            (told(head), shorter.head),
            (told(Lsn(96)), Lsn(96)),
        ] {
            channel.parted = parted;
            assert_eq!(channel.parting(), Some(at), "{parted:?}");
            assert_eq!(channel.behind_the_parting().0, at);
            let shown = known_parting(&"b".parse().unwrap(), &channel).unwrap();
            assert_eq!((shown.at, shown.local_bytes), (at, head.bytes_since(at)));
        }
        node.stop();
    }
}
