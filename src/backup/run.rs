//! One node's way through one slot, as a pure state machine: what it sees goes in, what it is to do
//! next comes out.
//!
//! A delegation is provisional until proved. A node that gave the slot away decides again, with the
//! other counted unfit for this slot, when it is told of refusal or failure, when no claim appears
//! within the grace, when a claim is no longer renewed, and at the deadline.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::catalog::Outcome;
use super::claim::{Holder, SlotView};
use super::decision::{Decision, Verdict, decide};
use super::facts::{Facts, GivenUp, Reason};
use super::job::JobSettings;
use crate::units::{LogTime, Name};

/// How far a peer says that it is with the slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "phase")]
pub enum PeerPhase {
    /// It does not know of the slot yet.
    Unknown,
    /// It decides or waits.
    Deciding,
    /// It makes the backup.
    Running,
    /// It made the backup.
    Done,
    /// It made none, and why.
    Ended {
        /// Failed, skipped, delegated …
        outcome: Outcome,
        /// A line.
        why: String,
    },
}

/// What a node sees at one moment.
pub struct Observation {
    /// The monotonic clock.
    pub now: Duration,
    /// The facts; what this machine knows of the slot is put in by [`SlotRun::step`].
    pub facts: Facts,
    /// What the repository says; an error where it cannot be asked.
    pub view: Result<SlotView, String>,
    /// What the other node says, where it can be asked.
    pub peer: Option<PeerPhase>,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// Make the backup; tell the outcome by [`SlotRun::failed_here`], or end.
    Run(Decision),
    /// Observe again soon.
    Wait(Decision),
    /// The slot is over for this node.
    End(Outcome, Decision),
}

/// One node's way through one slot.
pub struct SlotRun {
    this: Name,
    settings: JobSettings,
    deadline_at: Duration,
    given_up: Vec<GivenUp>,
    /// To whom the slot was given, when, and whether before the deadline.
    delegated: Option<(Name, Duration, bool)>,
    /// When another's live claim was first seen.
    claimed_since: Option<(u32, Duration)>,
    /// The node that is making the backup, as it was seen last.
    at_work: Option<Name>,
    /// The job's next slot, once it is due.
    next_due: Option<LogTime>,
    /// What keeps this node out may end before the deadline does.
    patient: bool,
}

impl SlotRun {
    /// A slot whose deadline is at `deadline_at` on the monotonic clock.
    #[must_use]
    pub fn new(this: Name, settings: JobSettings, deadline_at: Duration) -> SlotRun {
        SlotRun {
            this,
            settings,
            deadline_at,
            given_up: Vec::new(),
            delegated: None,
            claimed_since: None,
            at_work: None,
            next_due: None,
            patient: false,
        }
    }

    /// A slot of the schedule: where this node has nothing to do, because its role is not permitted
    /// or another run is going, it looks again until the deadline, since both may change.
    #[must_use]
    pub fn patient(self) -> SlotRun {
        SlotRun { patient: true, ..self }
    }

    /// The job's next slot is due: this one is decided as at its deadline, so that slots that come
    /// faster than the deadline neither pile up nor put each other off for ever.
    pub fn next_is_due(&mut self, next: LogTime) {
        self.next_due = Some(next);
    }

    /// The other node that is making the backup, as it was seen by the last step.
    #[must_use]
    pub fn at_work(&self) -> Option<&Name> {
        self.at_work.as_ref()
    }

    /// This node had its chance.
    pub fn failed_here(&mut self, why: impl Into<String>) {
        self.give_up(self.this.clone(), why.into());
    }

    /// Decides by what is seen.
    #[must_use]
    pub fn step(&mut self, observation: Observation) -> Next {
        let Observation { now, mut facts, view, peer } = observation;
        let late = now >= self.deadline_at || self.next_due.is_some();
        facts.deadline_passed = late;
        facts.next_due = self.next_due;
        let other = match facts.role {
            crate::group::Role::Primary => facts.secondary.name.clone(),
            crate::group::Role::Secondary => facts.primary.name.clone(),
        };

        let done_by = match (&view, &peer) {
            (Ok(SlotView { result: Some(result), .. }), _) => Some(result.node.clone()),
            (_, Some(PeerPhase::Done)) => Some(other.clone()),
            _ => None,
        };
        if let Some(node) = done_by {
            return self.end_done(facts, node);
        }
        if let Some(PeerPhase::Ended { outcome, why }) = &peer
            && *outcome != Outcome::Delegated
        {
            self.give_up(other.clone(), format!("its run ended: {why}"));
        }

        let claimed = match &view {
            Ok(view) => self.claimed_by_other(view, now),
            Err(_) => (peer == Some(PeerPhase::Running)).then(|| other.clone()),
        };
        // A claim of this node's earlier life is waited for, but nobody works under it.
        self.at_work = claimed.clone().filter(|node| *node != self.this);
        if claimed.is_none() {
            self.pass_over_silent(now, late);
        }
        facts.given_up.clone_from(&self.given_up);
        let decision = decide(&facts, &self.settings);
        if decision.decision == Verdict::Skip && self.patient && !late && !facts.retired {
            return Next::Wait(decision);
        }
        if let Some(node) = claimed {
            // Somebody is at it, whoever should be: its result, or its silence, decides.
            return match decision.decision {
                Verdict::Skip => Next::End(Outcome::Skipped, decision),
                _ => Next::Wait(standing_down(decision, node)),
            };
        }
        match decision.decision {
            Verdict::Run => Next::Run(decision),
            Verdict::Wait => {
                self.delegated = None;
                Next::Wait(decision)
            }
            Verdict::Delegate => {
                let node = decision.run_on.clone().unwrap_or(other);
                if self.delegated.as_ref().is_none_or(|(known, _, _)| *known != node) {
                    self.delegated = Some((node, now, !late));
                }
                Next::Wait(decision)
            }
            Verdict::Skip => Next::End(Outcome::Skipped, decision),
            Verdict::Fail => Next::End(Outcome::Failed, decision),
        }
    }

    fn end_done(&self, mut facts: Facts, node: Name) -> Next {
        facts.done_by = Some(node.clone());
        let decision = decide(&facts, &self.settings);
        let gave_it = self.delegated.as_ref().is_some_and(|(to, _, _)| *to == node);
        let outcome = if gave_it { Outcome::Delegated } else { Outcome::Skipped };
        Next::End(outcome, decision)
    }

    /// The node other than this one that holds a claim which counts.
    fn claimed_by_other(&mut self, view: &SlotView, now: Duration) -> Option<Name> {
        match &view.holder {
            Holder::Nobody => None,
            Holder::Ended(claim, why) => {
                // Its own end is of an earlier life, such as a restart: nothing bars another try.
                if claim.node != self.this {
                    self.give_up(claim.node.clone(), format!("it gave up: {why}"));
                }
                None
            }
            Holder::Still(claim) => {
                if claim.node != self.this {
                    let why = format!("its claim was not renewed for {}", claim.term);
                    self.give_up(claim.node.clone(), why);
                }
                None
            }
            // A claim of this node that this run does not hold is from an earlier life: it counts
            // like any other's until it has stood still.
            Holder::Live(claim) => {
                let since = match self.claimed_since {
                    Some((number, since)) if number == view.number => since,
                    _ => now,
                };
                self.claimed_since = Some((view.number, since));
                if now.saturating_sub(since) > self.settings.run_limit.0 + self.settings.grace.0 {
                    let why = format!("its run is over the limit of {}", self.settings.run_limit);
                    self.give_up(claim.node.clone(), why);
                    return None;
                }
                Some(claim.node.clone())
            }
        }
    }

    /// A node that was given the slot and shows no claim had its chance.
    fn pass_over_silent(&mut self, now: Duration, late: bool) {
        let Some((node, since, before_deadline)) = self.delegated.clone() else { return };
        let why = if now.saturating_sub(since) >= self.settings.grace.0 {
            format!("no claim appeared within the grace of {}", self.settings.grace)
        } else if late && before_deadline {
            let end = self.next_due.map_or("the deadline", |_| "the next slot was due");
            format!("no claim appeared before {end}")
        } else {
            return;
        };
        self.give_up(node, why);
    }

    fn give_up(&mut self, node: Name, why: String) {
        if self.delegated.as_ref().is_some_and(|(known, _, _)| *known == node) {
            self.delegated = None;
        }
        if self.given_up.iter().all(|known| known.node != node) {
            self.given_up.push(GivenUp { node, why });
        }
    }
}

/// The decision while another's claim is live.
fn standing_down(mut decision: Decision, node: Name) -> Decision {
    let named = decision.decision == Verdict::Delegate && decision.run_on.as_ref() == Some(&node);
    if !named {
        let text = format!("{node} holds the slot's claim and renews it");
        decision.reasons.insert(0, Reason::new("claimed", text));
        decision.decision = Verdict::Delegate;
        decision.run_on = Some(node);
    }
    decision
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
