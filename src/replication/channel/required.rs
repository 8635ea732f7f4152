//! What the group is told of a peer that its answers to hosts wait for: what it holds, or that it
//! is lost.
//!
//! A peer is lost with its stream, and where its durable position has stood still for as long as a
//! silent link may, with bytes outstanding: a living connection with a hung disk behind it is not
//! life.

use super::*;
use crate::log::control::Mode;

/// What the group was told last, and what it is decided by.
#[derive(Debug, Default)]
pub(super) struct Told {
    holds: Option<Acked>,
    lost: Option<(String, Acked)>,
    /// The peer's durable position, and since when it has stood there with bytes outstanding.
    standing: Option<(Lsn, Duration)>,
}

impl Channel {
    fn is_required(&self) -> bool {
        let required =
            matches!(self.local.membership, Membership::Member { mode, .. } if mode != Mode::Async);
        required && self.local.primary && !self.local.recovering
    }

    /// Since when the peer's durable position has stood still with bytes outstanding.
    fn stands_since(&mut self, now: Duration) -> Option<Duration> {
        let durable = self.acked.durable;
        if self.sender.is_none() || durable >= self.local.history.head {
            self.required.standing = None;
            return None;
        }
        match self.required.standing {
            Some((at, since)) if at == durable => Some(since),
            _ => {
                self.required.standing = Some((durable, now));
                Some(now)
            }
        }
    }

    /// When the peer counts as standing still.
    pub(super) fn standing_wake(&self, lost_after: Duration) -> Option<Duration> {
        let (_, since) = self.required.standing?;
        let told = self.required.lost.is_some();
        (self.is_required() && !told).then_some(since + lost_after)
    }

    /// Tells the group what has changed.
    pub(super) fn tell_required(&mut self, context: &mut Context<'_>) {
        if !self.is_required() {
            self.required = Told::default();
            return;
        }
        let lost_after = context.settings.lost_after;
        let stands = self.stands_since(context.now);
        let lost = if self.sender.is_none() {
            Some(if self.reason.is_empty() { "no stream" } else { &self.reason }.to_owned())
        } else if stands.is_some_and(|since| context.now >= since + lost_after) {
            Some(format!(
                "connected, but nothing became durable there for {}",
                crate::units::Span(lost_after)
            ))
        } else {
            None
        };
        let group = self.local.id;
        match lost {
            Some(reason) => {
                // It may also have less by now than it had acknowledged.
                let told = Some((reason.clone(), self.acked));
                if self.required.lost != told {
                    let Acked { received, durable, .. } = self.acked;
                    context.outputs.push(Output::PeerLost { group, reason, received, durable });
                    self.required.lost = told;
                    self.required.holds = None;
                }
            }
            None => {
                if self.required.holds != Some(self.acked) {
                    let Acked { received, durable, .. } = self.acked;
                    context.outputs.push(Output::PeerHolds { group, received, durable });
                    self.required.holds = Some(self.acked);
                    self.required.lost = None;
                }
            }
        }
    }
}
