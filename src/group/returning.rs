//! A primary that comes back: it asks its peers before it serves, takes back what they have and it
//! has lost, or yields to the one that was promoted meanwhile.
//!
//! From its start until somebody needs it, or a peer has answered, it is primary in name only:
//! nothing is appended and no host is served, so that nothing is lost if it turns out that its
//! reign is over. A node that serves never yields by itself.

use std::collections::BTreeSet;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::json;

use super::branch::{Branch, Keeping, settle};
use super::engine::{Core, Group};
use super::receive::Pending;
use super::replay::replay;
use super::timeline::follow;
use super::{EpochRecord, GroupError, Role};
use crate::events::Severity;
use crate::log::reader::ScanEnd;
use crate::log::writer::Writer;
use crate::units::{ByteSize, Chain, EpochId, Lsn, NodeId};

/// Hosts wait for the peers' answer this long after the start, or after the last bytes that were
/// taken back: a peer that had no route here dials again within it.
pub(super) const ASK_FOR: Duration = Duration::from_secs(15);

/// Why a branch was cut off by who yields.
pub(super) const YIELDED: &str = "a peer's reign goes on without it";
/// The same where an operator has decided so.
const GIVEN_UP: &str = "an operator had this node yield to a peer (`tidelog resolve`)";

/// What a primary that serves nobody yet waits for.
#[derive(Debug)]
pub(super) struct Asking {
    /// Monotonic: then it serves who wants to be served.
    pub until: Duration,
    /// The peers that have not said yet that they have nothing that this node lacks.
    pub unanswered: BTreeSet<NodeId>,
    /// A peer was promoted meanwhile: it does not serve by itself at all.
    pub held_back: Option<HeldBack>,
}

impl Asking {
    /// Why hosts wait, in words.
    fn reason(&self, core: &Core) -> String {
        match &self.held_back {
            Some(held_back) => held_back.reason.clone(),
            None if core.required.blocks(&self.unanswered) => {
                "has just started, and asks its peers what they hold; hosts wait for the answer of \
                 those that must hold what they write"
                    .to_owned()
            }
            None => format!(
                "has just started, and asks its peers what they hold; hosts wait for the answer \
                 for {} s at most",
                ASK_FOR.as_secs()
            ),
        }
    }
}

/// What keeps a primary from serving.
#[derive(Clone, Debug)]
pub(super) struct HeldBack {
    /// The number of the peer's reign.
    counter: u64,
    /// In words.
    reason: String,
}

/// What may be cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// What was only received, or was written before a start after which nobody was served.
    Received,
    /// Also what this node wrote as primary: an operator has decided.
    Authored,
}

impl Group {
    /// Whether this node is primary, and has served nobody since its start.
    #[must_use]
    pub fn is_asking(&self) -> bool {
        self.lock().asking.is_some()
    }

    /// Why writers wait although this node is primary.
    #[must_use]
    pub fn waits_because(&self) -> Option<String> {
        let core = self.lock();
        if core.halted.is_some() {
            return core.halted.clone();
        }
        let Some(asking) = &core.asking else {
            let (peer, why) = core.required.blocked_by()?;
            let (group, name) = (self.name(), &peer.name);
            let away = format!(
                "hosts wait for {name}, which must hold what they write: {why}; `tidelog \
                 replicate {group} --to {name} --on-loss continue` lets them go on without it"
            );
            return (core.role == Role::Primary).then_some(away);
        };
        Some(asking.reason(&core))
    }

    /// Why this primary does not serve by itself any more: a peer was promoted meanwhile.
    #[must_use]
    pub fn held_back(&self) -> Option<String> {
        self.lock().asking.as_ref()?.held_back.as_ref().map(|held_back| held_back.reason.clone())
    }

    /// Whether a peer may still answer in time whether this node is primary.
    #[must_use]
    pub fn awaits_answer(&self) -> bool {
        let now = self.context.env.clock.monotonic();
        let core = self.lock();
        let asking = core.asking.as_ref();
        asking.is_some_and(|asking| asking.held_back.is_none() && now < asking.until)
    }

    /// Whether hosts are served here: what they read is not old by now.
    ///
    /// # Errors
    ///
    /// Where this node is not primary, or asks its peers whether it still is.
    pub fn check_serving(&self) -> Result<(), GroupError> {
        let core = self.lock();
        if core.role != Role::Primary {
            return Err(GroupError::NotPrimary { group: self.name().clone() });
        }
        let Some(asking) = &core.asking else { return Ok(()) };
        let held_back = asking.held_back.as_ref();
        let reason = held_back.map_or("asks its peers first; try again", |it| &it.reason);
        Err(self.refused(reason))
    }

    /// No peer has what this node lacks, or nobody waits any longer: it serves. Where something of
    /// its reign was lost, or another node has reigned since, a new one begins first.
    ///
    /// # Errors
    ///
    /// What the disk says; it then goes on asking.
    pub fn serve(&self) -> Result<(), GroupError> {
        let _turn = self.turn.lock().expect("no holder panics");
        self.serve_in_turn()
    }

    pub(super) fn serve_in_turn(&self) -> Result<(), GroupError> {
        let (above, own) = {
            let mut core = self.lock();
            self.failed_error(&core)?;
            let Some(asking) = &core.asking else { return Ok(()) };
            let above = asking.held_back.as_ref().map(|held_back| held_back.counter);
            let author = core.view.epochs.last().map(|epoch| epoch.author);
            core.pending = Pending::default();
            (above, author == Some(self.context.node.id))
        };
        let due = self.meta.lock().expect("no holder panics").meta.reign_due;
        if due || above.is_some() || !own {
            let reason = if above.is_some() { "promote" } else { "recovery" };
            let counter = above.unwrap_or_default().saturating_add(1);
            self.begin_epoch(self.new_epoch(reason, counter))?;
        }
        self.lock().asking = None;
        self.become_member();
        self.space.notify_all();
        self.notify();
        Ok(())
    }

    /// A peer has nothing that this node lacks: once all have said so, it serves.
    ///
    /// # Errors
    ///
    /// As of [`Group::serve`].
    pub fn note_answer(&self, peer: NodeId) -> Result<(), GroupError> {
        {
            let mut core = self.lock();
            let Some(asking) = &mut core.asking else { return Ok(()) };
            asking.unanswered.remove(&peer);
            if !asking.unanswered.is_empty() {
                drop(core);
                // Who waited for this one alone without a limit waits for the others with one.
                self.space.notify_all();
                return Ok(());
            }
        }
        self.serve()
    }

    /// A peer was promoted meanwhile: this node does not serve by itself any more.
    /// Whoever has it serve nevertheless begins a reign above `counter`, the peer's.
    pub fn hold_back(&self, counter: u64, reason: &str) {
        if let Some(asking) = &mut self.lock().asking {
            asking.held_back = Some(HeldBack { counter, reason: reason.to_owned() });
        }
        self.space.notify_all();
        self.notify();
    }

    /// Remembers, over a restart, whether this node and a peer have both served as primary: such a
    /// node yields to an operator only, so it asks nobody when it starts. That ends with the peer
    /// that it began with, and with no other one that follows this node.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn note_split_brain(&self, peer: NodeId, there_is: bool) -> Result<(), GroupError> {
        let known = self.meta.lock().expect("no holder panics").meta.split_from;
        // One that is no member any more can end it with nobody.
        let members = &self.control().members;
        let known = known.filter(|node| members.iter().any(|member| member.node == *node));
        let split_from = match (there_is, known) {
            (true, None) => Some(peer),
            (false, Some(known)) if known == peer => None,
            _ => return Ok(()),
        };
        self.update_meta(|meta| meta.split_from = split_from)
    }

    /// Waits until this node serves or is not primary.
    ///
    /// # Errors
    ///
    /// Where it is held back, or what the disk says.
    pub fn wait_to_serve(&self) -> Result<(), GroupError> {
        self.wait_for_answer(self.lock(), None).map(|_| ())
    }

    /// As [`Group::wait_to_serve`], and no longer than `patience` for a peer that hosts wait for
    /// without limit. For other peers it waits until none may still answer in time.
    ///
    /// # Errors
    ///
    /// As of [`Group::wait_to_serve`], and where it took too long, with what is waited for.
    pub fn wait_to_serve_within(&self, patience: Duration) -> Result<(), GroupError> {
        self.wait_for_answer(self.lock(), Some(patience)).map(|_| ())
    }

    /// Waits for the answer of the peers, and serves where none comes; with `patience` as of
    /// [`Group::wait_to_serve_within`].
    pub(super) fn wait_for_answer<'a>(
        &'a self,
        mut core: MutexGuard<'a, Core>,
        patience: Option<Duration>,
    ) -> Result<MutexGuard<'a, Core>, GroupError> {
        let start = self.context.env.clock.monotonic();
        loop {
            let Some(asking) = &core.asking else { return Ok(core) };
            if core.closed {
                return Err(self.refused("is closed"));
            }
            if let Some(held_back) = &asking.held_back {
                return Err(self.refused(held_back.reason.clone()));
            }
            let now = self.context.env.clock.monotonic();
            let blocked = core.required.blocks(&asking.unanswered);
            let left = asking.until.saturating_sub(now);
            if !blocked && (left.is_zero() || !self.workers.running()) {
                drop(core);
                self.serve()?;
                core = self.lock();
                continue;
            }
            let patience = patience.map(|it| if blocked { it } else { it.max(ASK_FOR) });
            let patience = patience.map(|it| (start + it).saturating_sub(now));
            if patience.is_some_and(|patience| patience.is_zero()) {
                return Err(self.refused(asking.reason(&core)));
            }
            // Whoever may hold what this node has lost is asked, however long that takes.
            let left = (!blocked).then_some(left);
            core = match left.into_iter().chain(patience).min() {
                Some(wait) => self.space.wait_timeout(core, wait).map(|waited| waited.0).ok(),
                None => self.space.wait(core).ok(),
            }
            .expect("a panic under the lock ends the process");
        }
    }

    /// Goes on as a secondary from `at`, the end of a request where the chain is `chain`, if the
    /// peer still knows it: what is behind it leaves the log and is kept as a branch. Durable on
    /// return. A crash leaves it undone, or the next start finishes it.
    ///
    /// # Errors
    ///
    /// Where this node serves, and `discard` does not say otherwise; where it has clients; where
    /// the tail was written here, and may not be cut; where the chains differ; where the base is
    /// further; what the disk says.
    pub fn yield_to(
        &self,
        at: Lsn,
        chain: impl Into<Option<Chain>>,
        discard: Discard,
    ) -> Result<(), GroupError> {
        let _turn = self.turn.lock().expect("no holder panics");
        // What is cut off is kept, so it is made durable too.
        self.sync_now()?;
        let _no_fold = self.fold_lock.lock().expect("no holder panics");
        let _no_sync = self.sync_lock.lock().expect("no holder panics");
        let mut core = self.lock();
        self.check_yield(&core, at, discard)?;
        let cut =
            follow(&self.segments, core.timeline.before_lsn(at), at, |header| header.end() <= at);
        let cut = cut.map_err(|cause| GroupError::Damaged {
            group: self.name().clone(),
            what: format!("log up to {at}: {cause}"),
        })?;
        if cut.lsn != at || chain.into().is_some_and(|chain| chain != cut.chain) {
            return Err(self.refused(format!(
                "the log differs from the peer's before LSN {at} already; nothing was changed"
            )));
        }
        let head = core.writer.head();
        let authored = authored_behind(&core.view.epochs, self.context.node.id, at, head);
        let committed = if core.role == Role::Primary { at } else { core.committed.min(at) };
        let noted = self.update_meta_locked(&mut core, |meta| {
            (meta.reigns, meta.reign) = (false, EpochId(0));
            meta.reign_due = false;
            meta.split_from = None;
            meta.durable = at;
            meta.yielding = head > at;
        });
        if let Err(error) = noted {
            drop(core);
            self.report();
            return Err(error);
        }
        core.role = Role::Secondary;
        core.asking = None;
        core.pending = Pending::default();
        core.committed = committed;
        let kept = if head > at {
            let end = core.timeline.end().position();
            let branch = Branch {
                name: String::new(),
                from: cut.position(),
                to: end,
                bytes: end.lsn.bytes_since(at),
                authored,
                cut: self.context.env.clock.wall(),
                reason: match discard {
                    Discard::Received => YIELDED,
                    Discard::Authored => GIVEN_UP,
                }
                .to_owned(),
            };
            let mut keeping = Keeping::new(&self.dir, branch);
            let rebuilt = settle(&self.segments, at, at, head, &mut keeping)
                .and_then(|()| Writer::open(self.segments.clone(), at, cut.chain, cut.requests))
                .and_then(|writer| {
                    let rewinds = &core.content.rewinds;
                    let replayed = replay(&self.segments, &core.horizon, rewinds, at);
                    let other = |cause: ScanEnd| std::io::Error::other(cause.to_string());
                    Ok((writer, replayed.map_err(other)?.0))
                })
                .and_then(|rebuilt| {
                    self.write_meta(|meta| meta.yielding = false)?;
                    Ok(rebuilt)
                });
            let (writer, content) = match rebuilt {
                Ok(rebuilt) => rebuilt,
                Err(cause) => return Err(self.give_up_cut(core, &cause)),
            };
            let kept = keeping.kept();
            let name = kept.as_ref().map_or("", |branch| &branch.name);
            core.cut_to(cut, writer, content);
            self.cuts.fetch_add(1, Ordering::AcqRel);
            self.set_durable(&mut core, at);
            for image in core.images.values().filter(|image| image.leaves_log_at() > at) {
                image.break_hold(&format!("its moment left the history; it is in branch {name}"));
            }
            kept
        } else {
            None
        };
        drop(core);
        self.fail_held();
        if let Some(branch) = kept {
            self.tell_of_branch(&branch);
        }
        self.try_keep_images();
        self.space.notify_all();
        self.notify();
        Ok(())
    }

    /// The memory still has the old end: the next start reads anew what is there, and cuts it.
    fn give_up_cut(&self, mut core: MutexGuard<'_, Core>, cause: &std::io::Error) -> GroupError {
        let error = self.fail_locked(&mut core, "cut the log", cause);
        drop(core);
        self.report();
        error
    }

    /// Whether an operator may have this node yield from a position on: what [`Group::yield_to`]
    /// looks at first, but for what is not synced yet.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn may_discard(&self, at: Lsn) -> Result<(), GroupError> {
        let _ = self.sync_now();
        self.check_yield(&self.lock(), at, Discard::Authored)
    }

    fn check_yield(&self, core: &Core, at: Lsn, discard: Discard) -> Result<(), GroupError> {
        self.failed_error(core)?;
        let (name, head) = (self.name(), core.writer.head());
        if core.closed {
            return Err(self.refused("is closed"));
        }
        if core.role == Role::Primary && core.asking.is_none() && discard == Discard::Received {
            return Err(self.refused("is primary here and serves; it yields to nobody by itself"));
        }
        let clients: usize = self.clients().iter().map(|(_, count)| count).sum();
        if core.role == Role::Primary && clients > 0 {
            return Err(self.refused(format!(
                "{clients} clients are connected; disconnect them first (`tidelog status {name}`)"
            )));
        }
        if core.durable < head {
            return Err(self.refused("is being written to; try again"));
        }
        if at > head {
            return Err(self.refused(format!("ends at LSN {head}, before LSN {at}")));
        }
        let folded = core
            .timeline
            .horizon()
            .lsn
            .max(core.fold_target)
            .max(core.unfinished_fold.unwrap_or_default());
        if at < folded {
            return Err(self.refused(format!(
                "the histories part at LSN {at}, and the base here is at LSN {folded} already: \
                 save what is needed with `tidelog image open {name} --at now`, then `tidelog \
                 group delete {name}` and replicate anew"
            )));
        }
        let may_cut = core.asking.is_some() || discard == Discard::Authored;
        if !may_cut && authored_behind(&core.view.epochs, self.context.node.id, at, head) {
            return Err(self.refused(format!(
                "{} behind LSN {at} were written by {node} and are not in its peer's history; on \
                 {node}, `tidelog resolve {name} --preview` shows them, `tidelog resolve {name} \
                 --discard-local` keeps them as a branch and follows the peer",
                ByteSize(head.bytes_since(at)),
                node = self.context.node.name
            )));
        }
        Ok(())
    }

    pub(super) fn tell_of_branch(&self, branch: &Branch) {
        if let Err(error) = self.branches() {
            tracing::warn!("{error}");
        }
        let origin = if branch.authored { "written here" } else { "received" };
        self.emit(
            Severity::Warning,
            "branch-kept",
            format!(
                "{} that were {origin} behind LSN {} until {} are not in the surviving history: \
                 they are kept as branch {}",
                ByteSize(branch.bytes),
                branch.from.lsn,
                branch.to.time,
                branch.name
            ),
            json!(branch),
        );
    }
}

/// Whether records between `at` and `head` were written by this node as primary.
pub(super) fn authored_behind(epochs: &[EpochRecord], me: NodeId, at: Lsn, head: Lsn) -> bool {
    epochs.iter().enumerate().any(|(index, epoch)| {
        let end = epochs.get(index + 1).map_or(head, |next| next.first_lsn);
        epoch.author == me && end > at && head > at
    })
}
