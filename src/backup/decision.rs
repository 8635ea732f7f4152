//! The decision: who makes the backup of a slot, as a pure function over facts that every node
//! evaluates for itself.
//!
//! First, by role, how able is each node: *fit*, *behind* (it may become fit by itself: wait),
//! *unfit*, *unreachable*. Then one walk over the roles that the placement permits, in its order of
//! preference. Only the last step asks which of the two this node is; so two nodes with equal facts
//! name the same one. `docs/placement.md` is the whole table, printed by this function.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::facts::{Facts, NodeFacts, Reason, role_word};
use super::job::{Comparison, JobSettings, Placement};
use crate::group::Role;
use crate::units::{ByteSize, LogTime, Name, Span};

/// What this node is to do about the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Make the backup here.
    Run,
    /// Decide again when something changed, at the latest at the deadline.
    Wait,
    /// Stand down for a named node, and watch that it does.
    Delegate,
    /// The slot has its backup, or is not this node's by placement.
    Skip,
    /// Nobody may and can; say so aloud.
    Fail,
}

impl Verdict {
    /// The word in JSON, tables and events.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Verdict::Run => "run",
            Verdict::Wait => "wait",
            Verdict::Delegate => "delegate",
            Verdict::Skip => "skip",
            Verdict::Fail => "fail",
        }
    }
}

/// The outcome of [`decide`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// What this node does.
    pub decision: Verdict,
    /// The node that should make the backup; `None` for `wait` and `fail`.
    pub run_on: Option<Name>,
    /// The image may be older than the job's limit, by leave of the job.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stale: bool,
    /// Why: what spoke for the node that runs, and what against those preferred to it.
    pub reasons: Vec<Reason>,
}

/// A decision together with what it was made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// The job.
    pub job: Name,
    /// The group.
    pub group: Name,
    /// The node that decided.
    pub node: Name,
    /// Its role.
    pub role: Role,
    /// The slot, if one is open.
    pub slot: Option<LogTime>,
    /// The outcome.
    #[serde(flatten)]
    pub decision: Decision,
    /// Every fact, with its age.
    pub inputs: Map<String, Value>,
}

/// Every code that a reason of the decision may carry, with its meaning. Reasons of replication's
/// health are passed on under their own codes behind `replication-unhealthy`.
pub const REASON_CODES: &[(&str, &str)] = &[
    ("secondary-fit", "the secondary is reachable, recent and has the means"),
    ("primary-fit", "the primary is reachable and has the means"),
    ("primary-takes-over", "the primary runs because a node preferred to it cannot"),
    ("secondary-takes-over", "the secondary runs because a node preferred to it cannot"),
    ("local-copy", "the group has no copy elsewhere: it is backed up where it is"),
    ("copy-retired", "replication of this copy was stopped: it is never backed up"),
    ("already-done", "the slot has its backup"),
    ("already-running", "another run of the job is going"),
    ("not-permitted", "the placement does not permit this role"),
    ("condition-unmet", "a condition does not hold: the preference is turned around"),
    ("stale-allowed", "past the deadline an old image is taken, by leave of the job"),
    ("link-lost", "the link is lost for less than the grace: the copy counts as behind"),
    ("secondary-unreachable", "the link is lost for longer than the grace"),
    ("primary-unreachable", "the link is lost for longer than the grace"),
    ("secondary-unavailable", "the secondary said that it cannot be used"),
    ("primary-unavailable", "the primary said that it cannot be used"),
    ("replication-unhealthy", "the copy is not properly replicated"),
    ("lag-above-limit", "the copy is older than the job permits"),
    ("lag-unknown", "nothing tells how old the copy is"),
    ("secondary-facts-unknown", "the secondary has not said how it is"),
    ("secondary-cpu-above-max", "the secondary's CPU is busier than the job permits"),
    ("secondary-memory-low", "the secondary has too little free memory"),
    ("secondary-storage-low", "the secondary has too little free storage"),
    ("primary-cpu-above-max", "the primary's CPU is busier than the job permits"),
    ("held-back", "the node was primary, and a peer was promoted while it was away"),
    ("repository-unreachable", "the job's repository cannot be opened from there"),
    ("repository-differs", "the two nodes mean different repositories by the same name"),
    ("claimed", "the named node holds the slot's claim in the repository and renews it"),
    ("gave-up", "the node had its chance for this slot"),
    ("role-changed", "the node's role changed while its backup ran; the image is in the history"),
    ("deadline-passed", "the latest start is over: nothing is waited for"),
    ("next-slot-due", "the job's next slot is due: nothing is waited for"),
];

/// How able a node is to make this backup; worse is greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Ability {
    Fit,
    Behind,
    Unfit,
    Unreachable,
}

/// Collects what speaks against a node.
struct Judgement {
    ability: Ability,
    against: Vec<Reason>,
}

impl Judgement {
    fn fit() -> Judgement {
        Judgement { ability: Ability::Fit, against: Vec::new() }
    }

    fn add(&mut self, ability: Ability, code: &str, text: String) {
        self.ability = self.ability.max(ability);
        self.against.push(Reason::new(code, text));
    }
}

/// Where the walk over the placement ended.
enum Choice {
    Run { role: Role, stale: bool },
    Wait,
    Fail,
}

/// Decides what the node with `facts.role` does about the slot.
#[must_use]
pub fn decide(facts: &Facts, settings: &JobSettings) -> Decision {
    let this = facts.node(facts.role);
    let outcome = |decision, run_on, reasons| Decision { decision, run_on, stale: false, reasons };
    if let Some(node) = &facts.done_by {
        let reason =
            Reason::new("already-done", format!("{node} has made the backup of this slot"));
        return outcome(Verdict::Skip, Some(node.clone()), vec![reason]);
    }
    if let Some(node) = &facts.running_on {
        let text = format!("another run of {} is going on {node}", facts.job);
        let reason = Reason::new("already-running", text);
        return outcome(Verdict::Skip, Some(node.clone()), vec![reason]);
    }
    if facts.retired {
        let text = format!("replication of the copy on {} was stopped", this.name);
        let reason = Reason::new("copy-retired", text);
        return outcome(Verdict::Skip, Some(facts.primary.name.clone()), vec![reason]);
    }
    if !facts.replicated {
        let against = judge_local(facts);
        if against.is_empty() {
            let text = format!("{} has the only copy, so it is backed up there", this.name);
            let reason = Reason::new("local-copy", text);
            return outcome(Verdict::Run, Some(this.name.clone()), vec![reason]);
        }
        return outcome(Verdict::Fail, None, against);
    }

    let mut reasons = Vec::new();
    let mut order = settings.placement.order(facts.active);
    if !settings.placement.is_only() {
        let unmet = unmet_conditions(facts, settings);
        if !unmet.is_empty() {
            order.reverse();
            reasons.extend(unmet);
        }
    }
    if facts.role == Role::Secondary && !order.contains(&Role::Secondary) {
        let text = format!("{} keeps the secondary out", settings.placement);
        let reason = Reason::new("not-permitted", text);
        return outcome(Verdict::Skip, Some(facts.primary.name.clone()), vec![reason]);
    }

    let primary = judge_primary(facts, settings);
    let secondary = judge_secondary(facts, settings);
    let judged = |role| match role {
        Role::Primary => &primary,
        Role::Secondary => &secondary,
    };
    let choice = choose(facts, settings, &order, |role| judged(role).ability);

    match choice {
        Choice::Run { role, stale } => {
            reasons.insert(0, why_it_runs(facts, settings, &order, role, stale));
            let before = order.iter().take_while(|earlier| **earlier != role);
            for passed_over in before {
                reasons.extend(judged(*passed_over).against.iter().cloned());
            }
            if stale {
                reasons.extend(secondary.against.iter().cloned());
            }
            if !order.contains(&Role::Primary) {
                reasons.push(not_permitted(settings, Role::Primary));
            }
            let run_on = facts.node(role).name.clone();
            let decision = if role == facts.role { Verdict::Run } else { Verdict::Delegate };
            Decision { decision, run_on: Some(run_on), stale, reasons }
        }
        Choice::Wait | Choice::Fail => {
            for role in [Role::Secondary, Role::Primary] {
                if order.contains(&role) {
                    reasons.extend(judged(role).against.iter().cloned());
                } else {
                    reasons.push(not_permitted(settings, role));
                }
            }
            if let Some(next) = facts.next_due {
                let text = format!("the next slot, {next}, is due");
                reasons.push(Reason::new("next-slot-due", text));
            } else if facts.deadline_passed {
                let text = format!("the deadline of {} is over", settings.deadline);
                reasons.push(Reason::new("deadline-passed", text));
            }
            let fails = matches!(choice, Choice::Fail);
            outcome(if fails { Verdict::Fail } else { Verdict::Wait }, None, reasons)
        }
    }
}

/// Decides, and says from what.
#[must_use]
pub fn explain(facts: &Facts, settings: &JobSettings) -> Explanation {
    Explanation {
        job: facts.job.clone(),
        group: facts.group.clone(),
        node: facts.node(facts.role).name.clone(),
        role: facts.role,
        slot: facts.slot,
        decision: decide(facts, settings),
        inputs: facts.inputs(settings),
    }
}

/// The walk: the first fit role in the order of preference; a preferred one that is behind is
/// waited for until the deadline, except with `any`, which takes whichever can at once.
fn choose(
    facts: &Facts,
    settings: &JobSettings,
    order: &[Role],
    ability: impl Fn(Role) -> Ability,
) -> Choice {
    for role in order {
        match ability(*role) {
            Ability::Fit => return Choice::Run { role: *role, stale: false },
            Ability::Behind if !facts.deadline_passed && settings.placement != Placement::Any => {
                return Choice::Wait;
            }
            _ => {}
        }
    }
    let behind = |role: &Role| ability(*role) == Ability::Behind;
    if !facts.deadline_passed && order.iter().any(behind) {
        return Choice::Wait;
    }
    let stale = facts.deadline_passed && settings.allow_stale;
    if stale && order.contains(&Role::Secondary) && behind(&Role::Secondary) {
        return Choice::Run { role: Role::Secondary, stale: true };
    }
    Choice::Fail
}

fn judge_local(facts: &Facts) -> Vec<Reason> {
    let node = facts.node(facts.role);
    let mut judgement = Judgement::fit();
    judge_any(facts, facts.role, &mut judgement);
    if let Some(why) = &node.unavailable {
        let code = format!("{}-unavailable", role_word(facts.role));
        judgement.add(Ability::Unfit, &code, format!("{} is not available: {why}", node.name));
    }
    judgement.against
}

/// What both roles have in common: the repository, what the node says of itself, and whether it had
/// its chance.
fn judge_any(facts: &Facts, role: Role, judgement: &mut Judgement) {
    let node = facts.node(role);
    for given_up in facts.given_up.iter().filter(|given_up| given_up.node == node.name) {
        let text = format!("{} had its chance for this slot: {}", node.name, given_up.why);
        judgement.add(Ability::Unfit, "gave-up", text);
    }
    for problem in &node.problems {
        judgement.ability = judgement.ability.max(Ability::Unfit);
        judgement.against.push(problem.clone());
    }
    if node.repository == Some(false) {
        let why = node.repository_reason.as_ref().map(|why| format!(": {why}"));
        let why = why.unwrap_or_default();
        let text = format!("the repository cannot be opened from {}{why}", node.name);
        judgement.add(Ability::Unfit, "repository-unreachable", text);
    }
}

fn judge_secondary(facts: &Facts, settings: &JobSettings) -> Judgement {
    let node = &facts.secondary;
    let mut judgement = Judgement::fit();
    judge_any(facts, Role::Secondary, &mut judgement);
    if let Some(why) = &node.unavailable {
        let text = format!("{} is not available: {why}", node.name);
        judgement.add(Ability::Unreachable, "secondary-unavailable", text);
    }
    judge_copy(facts, settings, &mut judgement);
    judge_means(node, settings, &mut judgement);
    judgement
}

/// Link, health and lag of the secondary's copy.
fn judge_copy(facts: &Facts, settings: &JobSettings, judgement: &mut Judgement) {
    let name = &facts.secondary.name;
    let replication = &facts.replication;
    if let Some(lost) = replication.link_lost {
        if lost.0 < settings.grace.0 || facts.role == Role::Secondary {
            let text = format!(
                "the link between {name} and {} is lost for {}",
                facts.primary.name,
                seconds(lost)
            );
            judgement.add(Ability::Behind, "link-lost", text);
        } else {
            let text = format!(
                "{name} is unreachable for {}, longer than the grace of {}",
                seconds(lost),
                settings.grace
            );
            judgement.add(Ability::Unreachable, "secondary-unreachable", text);
        }
    }
    if !replication.healthy {
        let text = format!("the copy on {name} is not properly replicated");
        judgement.add(Ability::Behind, "replication-unhealthy", text);
        judgement.against.extend(replication.reasons.iter().cloned());
    }
    match replication.lag {
        Some(lag) if lag.0 <= settings.max_lag.0 => {}
        Some(lag) => {
            let text = format!(
                "the copy on {name} is {} old, the limit is {}",
                seconds(lag),
                settings.max_lag
            );
            judgement.add(Ability::Behind, "lag-above-limit", text);
        }
        None => {
            let text = format!("nothing tells how old the copy on {name} is");
            judgement.add(Ability::Behind, "lag-unknown", text);
        }
    }
}

/// What speaks against the copy at the end of a run that a node made in this role. The image is as
/// good as when it was opened: whoever reads the backup's history should know nevertheless.
pub(super) fn worse_at_end(facts: &Facts, role: Role, settings: &JobSettings) -> Vec<Reason> {
    if facts.role != role {
        let node = &facts.node(facts.role).name;
        let text = format!("{node} became {} while the backup ran", role_word(facts.role));
        return vec![Reason::new("role-changed", text)];
    }
    let mut judgement = Judgement::fit();
    if role == Role::Secondary && facts.replicated {
        judge_copy(facts, settings, &mut judgement);
    }
    judgement.against
}

/// Memory, storage, CPU and repository of the secondary. A node that has not said how it is cannot
/// be counted on.
fn judge_means(node: &NodeFacts, settings: &JobSettings, judgement: &mut Judgement) {
    let name = &node.name;
    let (Some(memory), Some(free), Some(_)) =
        (node.memory_free_bytes, node.storage_free_bytes, node.repository)
    else {
        let text = format!("{name} has not said how it is");
        judgement.add(Ability::Unfit, "secondary-facts-unknown", text);
        return;
    };
    if memory < settings.memory_free_min.0 {
        let text = format!(
            "{name} has {} of free memory, below {}",
            ByteSize(memory),
            settings.memory_free_min
        );
        judgement.add(Ability::Unfit, "secondary-memory-low", text);
    }
    let percent = node.storage_free_percent().unwrap_or(0.0);
    if percent < settings.storage_free_min {
        let text = format!(
            "{name} has {} of free storage, {percent:.1} %, below {} %",
            ByteSize(free),
            settings.storage_free_min
        );
        judgement.add(Ability::Unfit, "secondary-storage-low", text);
    }
    judge_cpu(node, settings.secondary_cpu_max, "secondary-cpu-above-max", judgement);
}

/// The gate against a node that is busy already; a load that is not known passes.
fn judge_cpu(node: &NodeFacts, max: Option<f64>, code: &str, judgement: &mut Judgement) {
    if let (Some(cpu), Some(max)) = (node.cpu_percent, max)
        && cpu > max
    {
        let text = format!("the CPU of {} is {cpu:.0} % busy, above {max} %", node.name);
        judgement.add(Ability::Unfit, code, text);
    }
}

fn judge_primary(facts: &Facts, settings: &JobSettings) -> Judgement {
    let node = &facts.primary;
    let name = &node.name;
    let mut judgement = Judgement::fit();
    judge_any(facts, Role::Primary, &mut judgement);
    if let Some(why) = &node.unavailable {
        let text = format!("{name} is not available: {why}");
        judgement.add(Ability::Unreachable, "primary-unavailable", text);
    }
    if let (Role::Secondary, Some(lost)) = (facts.role, facts.replication.link_lost) {
        if lost.0 < settings.grace.0 {
            let text = format!("the link to {name} is lost for {}", seconds(lost));
            judgement.add(Ability::Behind, "link-lost", text);
        } else {
            let text = format!(
                "{name} is unreachable for {}, longer than the grace of {}",
                seconds(lost),
                settings.grace
            );
            judgement.add(Ability::Unreachable, "primary-unreachable", text);
        }
    }
    judge_cpu(node, settings.primary_cpu_max, "primary-cpu-above-max", &mut judgement);
    judgement
}

/// The conditions that do not hold; one whose fact is unknown does not.
fn unmet_conditions(facts: &Facts, settings: &JobSettings) -> Vec<Reason> {
    let mut unmet = Vec::new();
    for condition in &settings.conditions {
        let value = facts.number(&condition.fact);
        let holds = value.is_some_and(|value| match condition.comparison {
            Comparison::AtLeast => value >= condition.value,
            Comparison::AtMost => value <= condition.value,
        });
        if !holds {
            let value = value.map_or("unknown".to_owned(), |value| format!("{value:.1}"));
            let text = format!(
                "{condition} does not hold ({} is {value}): the preference is turned around",
                condition.fact
            );
            unmet.push(Reason::new("condition-unmet", text));
        }
    }
    unmet
}

fn why_it_runs(
    facts: &Facts,
    settings: &JobSettings,
    order: &[Role],
    role: Role,
    stale: bool,
) -> Reason {
    let name = &facts.node(role).name;
    if stale {
        let text = format!("past the deadline, {name} backs up the last consistent image it has");
        return Reason::new("stale-allowed", text);
    }
    let first = order.first() == Some(&role);
    match role {
        Role::Secondary => {
            let lag = facts.replication.lag.map_or("unknown".to_owned(), seconds);
            let text = format!(
                "{name} (secondary) is fit: its copy is {lag} old, the limit is {}",
                settings.max_lag
            );
            Reason::new(if first { "secondary-fit" } else { "secondary-takes-over" }, text)
        }
        Role::Primary if first => {
            Reason::new("primary-fit", format!("{name} (primary) is fit, and preferred"))
        }
        Role::Primary => {
            let text = format!("{name} (primary) runs, because the secondary cannot");
            Reason::new("primary-takes-over", text)
        }
    }
}

fn not_permitted(settings: &JobSettings, role: Role) -> Reason {
    let text = format!("{} keeps the {} out", settings.placement, role_word(role));
    Reason::new("not-permitted", text)
}

/// A duration as people read it: tenths of a second below a minute, whole seconds above.
fn seconds(span: Span) -> String {
    if span.0 < Duration::from_secs(60) {
        format!("{:.1} s", span.0.as_secs_f64())
    } else {
        Span::from_secs(span.0.as_secs()).to_string()
    }
}

#[cfg(test)]
#[path = "decision_tests.rs"]
mod tests;
