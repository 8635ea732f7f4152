//! Two nodes go through a slot by hand, over claims in memory.

use std::sync::Arc;

use super::super::branches::Reigns;
use super::super::claim::{Claim, SlotResult, SlotStore};
use super::super::job::Placement;
use super::super::objects::MemoryObjects;
use super::*;
use crate::group::Role;
use crate::units::{EpochId, LogTime, Lsn, Span};

const SECOND: Duration = Duration::from_secs(1);

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

/// Two nodes, one repository, one clock.
struct Pair {
    objects: Arc<MemoryObjects>,
    runs: [(SlotRun, SlotStore); 2],
    now: Duration,
    linked: bool,
}

impl Pair {
    fn new(placement: Placement) -> Pair {
        let objects = Arc::new(MemoryObjects::new());
        let settings = JobSettings { placement, ..JobSettings::default() };
        let run = |node: &str| {
            let store = SlotStore::new(objects.clone(), EpochId(7), LogTime(1));
            (SlotRun::new(name(node), settings.clone(), 3600 * SECOND), store)
        };
        Pair { runs: [run("a"), run("b")], objects, now: Duration::ZERO, linked: true }
    }

    /// As the schedule opens them.
    fn scheduled(self) -> Pair {
        let runs = self.runs.map(|(run, store)| (run.patient(), store));
        Pair { runs, ..self }
    }

    fn step(&mut self, index: usize, peer: Option<PeerPhase>) -> Next {
        let role = [Role::Primary, Role::Secondary][index];
        let mut facts = Facts::of_fit_pair(role);
        if !self.linked {
            facts.replication.link_lost = Some(Span::from_secs(600));
            facts.replication.healthy = false;
            facts.replication.lag = Some(Span::from_secs(600));
        }
        let (run, store) = &mut self.runs[index];
        let view = store.look(self.now, Reigns::default).map_err(|error| error.to_string());
        run.step(Observation { now: self.now, facts, view, peer })
    }

    fn a(&mut self) -> Next {
        self.step(0, None)
    }

    fn b(&mut self) -> Next {
        self.step(1, None)
    }

    fn claim(&self, index: usize, number: u32) -> bool {
        let node = ["a", "b"][index];
        let claim =
            Claim { node: name(node), run: EpochId(index as u64), term: Span::from_secs(60) };
        self.runs[index].1.claim(number, &claim).expect("written")
    }

    fn finish(&mut self, index: usize) -> Option<SlotResult> {
        let result = SlotResult {
            node: name(["a", "b"][index]),
            role: Role::Secondary,
            run: EpochId(index as u64),
            id: "1".to_owned(),
            epoch: EpochId(1),
            lsn: Lsn(4096),
            time: LogTime(1),
            ended: LogTime(2),
            bytes_read: 0,
            bytes_added: 0,
            duration_seconds: 0.0,
            checksums: Vec::new(),
            stale: false,
            reasons_at_end: Vec::new(),
        };
        self.runs[index].1.finish(&result, Reigns::default).expect("written")
    }
}

fn codes(next: &Next) -> Vec<&str> {
    let (Next::Run(decision) | Next::Wait(decision) | Next::End(_, decision)) = next;
    decision.reasons.iter().map(|reason| reason.code.as_str()).collect()
}

fn outcome(next: &Next) -> Outcome {
    match next {
        Next::End(outcome, _) => *outcome,
        _ => panic!("not at its end: {next:?}"),
    }
}

#[test]
fn the_secondary_runs_and_the_primary_ends_as_delegated_by_the_result() {
    let mut pair = Pair::new(Placement::PreferSecondary);
    assert!(matches!(pair.a(), Next::Wait(decision) if decision.decision == Verdict::Delegate));
    assert!(matches!(pair.b(), Next::Run(_)));
    assert!(pair.claim(1, 1));
    pair.now = 1000 * SECOND;
    pair.runs[1].1.renew(1, 1).expect("written");
    assert!(matches!(pair.a(), Next::Wait(_)), "a live claim is waited for, however long");
    assert_eq!(pair.finish(1), None);
    assert_eq!(outcome(&pair.a()), Outcome::Delegated);
}

#[test]
fn no_claim_within_the_grace_takes_the_slot_back() {
    let mut pair = Pair::new(Placement::PreferSecondary);
    assert!(matches!(pair.a(), Next::Wait(_)));
    pair.now = 59 * SECOND;
    assert!(matches!(pair.a(), Next::Wait(_)));
    pair.now = 60 * SECOND;
    let next = pair.a();
    assert!(matches!(next, Next::Run(_)), "{next:?}");
    assert_eq!(codes(&next), ["primary-takes-over", "gave-up"]);
}

#[test]
fn a_claim_that_is_no_longer_renewed_takes_the_slot_back() {
    let mut pair = Pair::new(Placement::PreferSecondary);
    assert!(matches!(pair.a(), Next::Wait(_)));
    assert!(pair.claim(1, 1));
    pair.now = 10 * SECOND;
    assert!(matches!(pair.a(), Next::Wait(_)));
    pair.now = 69 * SECOND;
    assert!(matches!(pair.a(), Next::Wait(_)), "the grace is over, the term is not");
    pair.now = 70 * SECOND;
    assert!(matches!(pair.a(), Next::Run(_)));
    assert!(pair.claim(0, 2), "the next number");
    // The late node finishes all the same: one result counts.
    assert_eq!(pair.finish(0), None);
    assert!(pair.finish(1).is_some_and(|first| first.node == name("a")));
}

#[test]
fn a_refusal_or_a_failure_takes_the_slot_back_at_once() {
    let mut pair = Pair::new(Placement::PreferSecondary);
    assert!(matches!(pair.a(), Next::Wait(_)));
    let why = "the repository is full".to_owned();
    let ended = PeerPhase::Ended { outcome: Outcome::Failed, why };
    assert!(matches!(pair.step(0, Some(ended)), Next::Run(_)));

    let mut pair = Pair::new(Placement::PreferSecondary);
    assert!(matches!(pair.a(), Next::Wait(_)));
    assert!(pair.claim(1, 1));
    pair.runs[1].1.end(1, "the image was lost").expect("written");
    assert!(matches!(pair.a(), Next::Run(_)), "told through the repository");
}

#[test]
fn a_primary_that_fails_gives_the_slot_to_a_secondary_that_can() {
    let mut pair = Pair::new(Placement::PreferPrimary);
    assert!(matches!(pair.a(), Next::Run(_)));
    assert!(matches!(pair.b(), Next::Wait(_)));
    pair.runs[0].0.failed_here("no space");
    let next = pair.a();
    assert!(
        matches!(&next, Next::Wait(decision) if decision.run_on == Some(name("b"))),
        "{next:?}"
    );
    let ended = PeerPhase::Ended { outcome: Outcome::Failed, why: "no space".to_owned() };
    let next = pair.step(1, Some(ended));
    assert!(matches!(next, Next::Run(_)), "{next:?}");
    assert_eq!(codes(&next)[0], "secondary-takes-over");
}

#[test]
fn where_both_had_their_chance_the_slot_fails_with_every_reason() {
    let mut pair = Pair::new(Placement::PreferSecondary);
    pair.runs[0].0.failed_here("no space");
    let ended = PeerPhase::Ended { outcome: Outcome::Failed, why: "no image".to_owned() };
    let next = pair.step(0, Some(ended));
    assert_eq!(outcome(&next), Outcome::Failed);
    assert_eq!(codes(&next).iter().filter(|code| **code == "gave-up").count(), 2);
}

#[test]
fn a_cut_link_makes_the_primary_run_and_the_secondary_see_it_in_the_repository() {
    let mut pair = Pair::new(Placement::PreferSecondary);
    pair.linked = false;
    assert!(matches!(pair.a(), Next::Run(_)));
    assert!(matches!(pair.b(), Next::Wait(_)));
    assert!(pair.claim(0, 1));
    pair.now = 3601 * SECOND;
    let next = pair.b();
    assert_eq!(codes(&next)[0], "claimed", "past the deadline, but somebody is at it: {next:?}");
    pair.finish(0);
    assert_eq!(outcome(&pair.b()), Outcome::Skipped);
}

#[test]
fn a_cut_link_fails_a_secondary_only_job_aloud() {
    let mut pair = Pair::new(Placement::SecondaryOnly);
    pair.linked = false;
    let next = pair.a();
    assert_eq!(outcome(&next), Outcome::Failed);
    assert!(codes(&next).contains(&"secondary-unreachable"));
    assert!(matches!(pair.b(), Next::Wait(_)));
    pair.now = 3600 * SECOND;
    assert_eq!(outcome(&pair.b()), Outcome::Failed);
}

#[test]
fn a_run_over_its_limit_does_not_block_for_ever() {
    let mut pair = Pair::new(Placement::PreferSecondary);
    assert!(matches!(pair.a(), Next::Wait(_)));
    assert!(pair.claim(1, 1));
    for hour in 0..14 {
        pair.now = hour * 3600 * SECOND;
        pair.runs[1].1.renew(1, u64::from(hour) + 1).expect("written");
        let next = pair.a();
        let over = hour > 12;
        assert_eq!(matches!(next, Next::Run(_)), over, "hour {hour}: {next:?}");
    }
}

#[test]
fn a_slot_that_waits_is_decided_when_the_next_one_is_due() {
    let behind = |pair: &mut Pair, index: usize| {
        let mut facts = Facts::of_fit_pair([Role::Primary, Role::Secondary][index]);
        facts.replication.lag = Some(Span::from_secs(600));
        let (run, store) = &mut pair.runs[index];
        let view = store.look(pair.now, Reigns::default).map_err(|error| error.to_string());
        run.step(Observation { now: pair.now, facts, view, peer: None })
    };
    let mut pair = Pair::new(Placement::PreferSecondary);
    assert!(matches!(behind(&mut pair, 0), Next::Wait(_)));
    assert!(matches!(behind(&mut pair, 1), Next::Wait(_)));
    pair.runs.iter_mut().for_each(|(run, _)| run.next_is_due(LogTime(2)));
    assert!(matches!(behind(&mut pair, 0), Next::Run(_)));
    assert!(matches!(behind(&mut pair, 1), Next::Wait(_)), "it delegates");

    let mut pair = Pair::new(Placement::SecondaryOnly);
    assert!(matches!(behind(&mut pair, 1), Next::Wait(_)));
    pair.runs[1].0.next_is_due(LogTime(2));
    let next = behind(&mut pair, 1);
    assert_eq!(outcome(&next), Outcome::Failed);
    assert!(codes(&next).contains(&"next-slot-due"), "{next:?}");
    assert!(!codes(&next).contains(&"deadline-passed"), "{next:?}");
}

#[test]
fn another_node_is_at_work_only_while_its_claim_is_live() {
    let mut pair = Pair::new(Placement::PreferSecondary);
    assert!(matches!(pair.a(), Next::Wait(_)));
    assert_eq!(pair.runs[0].0.at_work(), None, "a delegation without a claim");
    assert!(pair.claim(1, 1));
    assert!(matches!(pair.a(), Next::Wait(_)));
    assert_eq!(pair.runs[0].0.at_work(), Some(&name("b")));
    assert!(matches!(pair.b(), Next::Wait(_)));
    assert_eq!(pair.runs[1].0.at_work(), None, "its own earlier life is not at work");
    pair.now = 60 * SECOND;
    assert!(matches!(pair.a(), Next::Run(_)));
    assert_eq!(pair.runs[0].0.at_work(), None);
}

#[test]
fn an_end_that_this_node_told_in_an_earlier_life_bars_no_second_try() {
    let mut pair = Pair::new(Placement::PreferSecondary);
    assert!(pair.claim(1, 1));
    pair.runs[1].1.end(1, "the node is shutting down").expect("written");
    let next = pair.b();
    assert!(matches!(next, Next::Run(_)), "{next:?}");
    assert!(!codes(&next).contains(&"gave-up"), "{next:?}");
    // The other node counts the same end against it.
    assert!(matches!(pair.a(), Next::Run(_)));
}

#[test]
fn a_repository_out_of_reach_leaves_the_peer_to_say_how_it_goes() {
    let mut pair = Pair::new(Placement::PreferSecondary);
    pair.objects.set_reachable(false);
    assert!(matches!(pair.a(), Next::Wait(_)));
    pair.now = 600 * SECOND;
    assert!(matches!(pair.step(0, Some(PeerPhase::Running)), Next::Wait(_)));
    assert_eq!(outcome(&pair.step(0, Some(PeerPhase::Done))), Outcome::Delegated);
}

#[test]
fn a_claim_of_an_earlier_life_counts_until_it_stood_still() {
    let mut pair = Pair::new(Placement::PreferSecondary);
    assert!(pair.claim(1, 1));
    assert!(matches!(pair.b(), Next::Wait(_)));
    pair.now = 60 * SECOND;
    assert!(matches!(pair.b(), Next::Run(_)), "this node was restarted, and tries again");
}

#[test]
fn a_slot_of_the_schedule_is_made_by_the_copy_that_becomes_primary_before_its_deadline() {
    let mut pair = Pair::new(Placement::PrimaryOnly);
    assert_eq!(outcome(&pair.b()), Outcome::Skipped, "by command at once");
    let mut pair = Pair::new(Placement::PrimaryOnly).scheduled();
    let next = pair.b();
    assert_eq!((codes(&next), matches!(next, Next::Wait(_))), (vec!["not-permitted"], true));
    // The primary is gone, and the copy is promoted.
    let facts = Facts::of_fit_pair(Role::Primary);
    let (run, store) = &mut pair.runs[1];
    let view = store.look(pair.now, Reigns::default).map_err(|error| error.to_string());
    let next = run.step(Observation { now: 60 * SECOND, facts, view, peer: None });
    assert!(matches!(next, Next::Run(_)), "{next:?}");

    let mut pair = Pair::new(Placement::PrimaryOnly).scheduled();
    assert!(matches!(pair.b(), Next::Wait(_)));
    pair.now = 3600 * SECOND;
    let next = pair.b();
    assert_eq!((codes(&next), outcome(&next)), (vec!["not-permitted"], Outcome::Skipped));
}

#[test]
fn a_slot_of_the_schedule_waits_for_another_run_to_end_and_is_then_made() {
    let step = |pair: &mut Pair, running_on: Option<Name>| {
        let facts = Facts { running_on, ..Facts::of_fit_pair(Role::Secondary) };
        let (run, store) = &mut pair.runs[1];
        let view = store.look(pair.now, Reigns::default).map_err(|error| error.to_string());
        run.step(Observation { now: pair.now, facts, view, peer: None })
    };
    let mut pair = Pair::new(Placement::PreferSecondary).scheduled();
    let next = step(&mut pair, Some(name("b")));
    assert_eq!((codes(&next), matches!(next, Next::Wait(_))), (vec!["already-running"], true));
    assert!(matches!(step(&mut pair, None), Next::Run(_)));
    pair.runs[1].0.next_is_due(LogTime(2));
    assert_eq!(outcome(&step(&mut pair, Some(name("b")))), Outcome::Skipped);
}
