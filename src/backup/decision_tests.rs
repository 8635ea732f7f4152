//! The table of the decision, stated independently of its code, and its two promises as a property.

use super::super::facts::{GivenUp, NodeFacts};
use super::super::job::Condition;
use super::*;
use proptest::prelude::*;

/// How the secondary is, in the words of the published table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Fit,
    Behind,
    Unfit,
    Unreachable,
}

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

fn facts(role: Role, state: State, deadline_passed: bool) -> Facts {
    let mut facts = Facts { deadline_passed, ..Facts::of_fit_pair(role) };
    match state {
        State::Fit => {}
        State::Behind => facts.replication.lag = Some(Span::from_secs(300)),
        State::Unfit => facts.secondary.storage_free_bytes = Some(1 << 30),
        State::Unreachable => {
            facts.replication.link_lost = Some(Span::from_secs(600));
            facts.replication.lag = Some(Span::from_secs(600));
            facts.replication.healthy = false;
        }
    }
    facts
}

fn settings(placement: Placement) -> JobSettings {
    JobSettings { placement, ..JobSettings::default() }
}

/// `state deadline | verdict on the primary, verdict on the secondary`, line by line; one column of
/// lines per placement, named in front of them.
const TABLE: &str = "
    prefer-secondary
    fit before         delegate run
    fit after          delegate run
    behind before      wait     wait
    behind after       run      delegate
    unfit before       run      delegate
    unfit after        run      delegate
    unreachable before run      wait
    unreachable after  run      fail
    secondary-only
    fit before         delegate run
    fit after          delegate run
    behind before      wait     wait
    behind after       fail     fail
    unfit before       fail     fail
    unfit after        fail     fail
    unreachable before fail     wait
    unreachable after  fail     fail
    primary-only
    fit before         run      skip
    fit after          run      skip
    behind before      run      skip
    behind after       run      skip
    unfit before       run      skip
    unfit after        run      skip
    unreachable before run      skip
    unreachable after  run      skip
    prefer-primary
    fit before         run      delegate
    fit after          run      delegate
    behind before      run      delegate
    behind after       run      delegate
    unfit before       run      delegate
    unfit after        run      delegate
    unreachable before run      wait
    unreachable after  run      fail
    any
    fit before         delegate run
    fit after          delegate run
    behind before      run      delegate
    behind after       run      delegate
    unfit before       run      delegate
    unfit after        run      delegate
    unreachable before run      wait
    unreachable after  run      fail
";

/// What a placement by application means where it runs on the primary, and on the secondary.
const BY_APPLICATION: [(Placement, Placement, Placement); 4] = [
    (Placement::PreferPassive, Placement::PreferSecondary, Placement::PreferPrimary),
    (Placement::PassiveOnly, Placement::SecondaryOnly, Placement::PrimaryOnly),
    (Placement::ActiveOnly, Placement::PrimaryOnly, Placement::SecondaryOnly),
    (Placement::PreferActive, Placement::PreferPrimary, Placement::PreferSecondary),
];

#[test]
fn every_cell_of_the_table_is_as_stated() {
    let mut placement = Placement::Any;
    let mut cells = 0;
    for line in TABLE.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let words: Vec<_> = line.split_whitespace().collect();
        let [state, deadline, on_primary, on_secondary] = words[..] else {
            placement = line.parse().expect("a placement");
            continue;
        };
        let state = match state {
            "fit" => State::Fit,
            "behind" => State::Behind,
            "unfit" => State::Unfit,
            "unreachable" => State::Unreachable,
            other => panic!("{other}"),
        };
        for (role, expected) in [(Role::Primary, on_primary), (Role::Secondary, on_secondary)] {
            let mut facts = facts(role, state, deadline == "after");
            let mut same = vec![(placement, Role::Primary), (placement, Role::Secondary)];
            for (by_application, on_primary, on_secondary) in BY_APPLICATION {
                if on_primary == placement {
                    same.push((by_application, Role::Primary));
                }
                if on_secondary == placement {
                    same.push((by_application, Role::Secondary));
                }
            }
            for (placement, active) in same {
                facts.active = active;
                let decision = decide(&facts, &settings(placement));
                let cell =
                    format!("{placement}, active {active:?}: {line}: {role:?}: {decision:?}");
                assert_eq!(decision.decision.as_str(), expected, "{cell}");
                let runs_on = match decision.decision {
                    Verdict::Wait | Verdict::Fail => None,
                    Verdict::Run => Some(facts.node(role).name.clone()),
                    Verdict::Delegate => {
                        Some(facts.node(super::super::job::other(role)).name.clone())
                    }
                    Verdict::Skip => Some(name("a")),
                };
                assert_eq!(decision.run_on, runs_on, "{cell}");
                assert!(!decision.reasons.is_empty(), "{cell}");
                cells += 1;
            }
        }
    }
    // Five placements of eight lines and two roles, whichever node is active; and four by
    // application, whose two meanings each fill as many.
    assert_eq!(cells, 5 * 16 * 2 + 4 * 16 * 2);
}

fn codes(decision: &Decision) -> Vec<&str> {
    decision.reasons.iter().map(|reason| reason.code.as_str()).collect()
}

#[test]
fn a_fallback_says_why_the_preferred_node_cannot() {
    let decision = decide(
        &facts(Role::Primary, State::Unreachable, false),
        &settings(Placement::PreferSecondary),
    );
    assert_eq!(codes(&decision)[..2], ["primary-takes-over", "secondary-unreachable"]);
    let decision =
        decide(&facts(Role::Primary, State::Unfit, false), &settings(Placement::SecondaryOnly));
    assert_eq!(codes(&decision), ["secondary-storage-low", "not-permitted"]);
}

#[test]
fn a_link_lost_for_less_than_the_grace_is_waited_for_on_both_nodes() {
    for role in [Role::Primary, Role::Secondary] {
        let mut facts = facts(role, State::Unreachable, false);
        facts.replication.link_lost = Some(Span::from_secs(59));
        let decision = decide(&facts, &settings(Placement::PreferSecondary));
        assert_eq!(decision.decision, Verdict::Wait, "{decision:?}");
        assert!(codes(&decision).contains(&"link-lost"));
    }
}

#[test]
fn an_overloaded_primary_is_not_fallen_back_to() {
    let gated = JobSettings { primary_cpu_max: Some(80.0), ..JobSettings::default() };
    let mut facts = facts(Role::Primary, State::Unfit, true);
    facts.primary.cpu_percent = Some(81.0);
    let decision = decide(&facts, &gated);
    assert_eq!(decision.decision, Verdict::Fail);
    assert!(codes(&decision).contains(&"primary-cpu-above-max"), "{decision:?}");
    facts.primary.cpu_percent = Some(80.0);
    assert_eq!(decide(&facts, &gated).decision, Verdict::Run);
}

#[test]
fn a_condition_that_does_not_hold_turns_the_preference_around() {
    let condition: Condition = "primary.cpu_percent>=80".parse().expect("valid");
    let job = JobSettings { conditions: vec![condition], ..JobSettings::default() };
    let mut facts = facts(Role::Primary, State::Fit, false);
    let idle = decide(&facts, &job);
    assert_eq!((idle.decision, codes(&idle)[0]), (Verdict::Run, "primary-fit"));
    assert!(codes(&idle).contains(&"condition-unmet"));
    facts.primary.cpu_percent = Some(80.0);
    assert_eq!(decide(&facts, &job).decision, Verdict::Delegate);
    facts.primary.cpu_percent = None;
    assert_eq!(decide(&facts, &job).decision, Verdict::Run, "unknown does not hold");
}

#[test]
fn an_old_image_is_taken_only_past_the_deadline_and_only_by_leave() {
    let mut job = settings(Placement::SecondaryOnly);
    job.allow_stale = true;
    for (deadline_passed, expected) in [(false, Verdict::Wait), (true, Verdict::Run)] {
        let facts = facts(Role::Secondary, State::Unreachable, deadline_passed);
        let decision = decide(&facts, &job);
        assert_eq!(decision.decision, expected);
        assert_eq!(decision.stale, deadline_passed);
    }
    job.placement = Placement::PreferSecondary;
    let decision = decide(&facts(Role::Primary, State::Behind, true), &job);
    assert_eq!((decision.decision, decision.stale), (Verdict::Run, false), "the primary can");
}

#[test]
fn a_group_without_a_copy_is_backed_up_where_it_is_whatever_the_placement() {
    for placement in Placement::ALL {
        let mut facts = facts(Role::Primary, State::Unreachable, true);
        facts.replicated = false;
        let decision = decide(&facts, &settings(placement));
        assert_eq!((decision.decision, codes(&decision)[0]), (Verdict::Run, "local-copy"));
        facts.primary.repository = Some(false);
        assert_eq!(decide(&facts, &settings(placement)).decision, Verdict::Fail);
    }
}

#[test]
fn a_retired_copy_is_never_backed_up() {
    for placement in Placement::ALL {
        for replicated in [true, false] {
            let mut facts = facts(Role::Secondary, State::Fit, true);
            facts.retired = true;
            facts.replicated = replicated;
            let decision = decide(&facts, &settings(placement));
            assert_eq!((decision.decision, codes(&decision)[0]), (Verdict::Skip, "copy-retired"));
        }
    }
}

#[test]
fn a_slot_with_a_backup_and_a_second_run_are_skipped() {
    let mut facts = facts(Role::Primary, State::Unreachable, true);
    facts.running_on = Some(name("b"));
    let decision = decide(&facts, &settings(Placement::PrimaryOnly));
    assert_eq!((decision.decision, codes(&decision)[0]), (Verdict::Skip, "already-running"));
    facts.done_by = Some(name("b"));
    let decision = decide(&facts, &settings(Placement::PrimaryOnly));
    assert_eq!((decision.decision, codes(&decision)[0]), (Verdict::Skip, "already-done"));
    assert_eq!(decision.run_on, Some(name("b")));
}

#[test]
fn a_node_that_had_its_chance_is_passed_over() {
    let mut facts = facts(Role::Primary, State::Fit, false);
    facts.given_up.push(GivenUp { node: name("b"), why: "no claim within 60s".to_owned() });
    let decision = decide(&facts, &settings(Placement::PreferSecondary));
    assert_eq!(codes(&decision), ["primary-takes-over", "gave-up"]);
    facts.given_up.push(GivenUp { node: name("a"), why: "the run failed".to_owned() });
    assert_eq!(decide(&facts, &settings(Placement::PreferSecondary)).decision, Verdict::Fail);
}

#[test]
fn every_assumption_changes_the_explanation_and_is_marked() {
    for (key, value) in [
        ("role", "secondary"),
        ("replicated", "false"),
        ("replication.healthy", "false"),
        ("replication.lag_seconds", "300"),
        ("secondary.available", "false"),
        ("secondary.cpu_percent", "99"),
        ("secondary.memory_free_bytes", "1M"),
        ("secondary.storage_free_bytes", "0"),
        ("secondary.repository", "false"),
        ("primary.available", "false"),
        ("primary.cpu_percent", "99"),
        ("primary.repository", "false"),
        ("placement", "primary-only"),
        ("active", "false"),
        ("deadline_passed", "true"),
    ] {
        let mut facts = facts(Role::Primary, State::Fit, false);
        let mut job = JobSettings::default();
        let before = explain(&facts, &job);
        facts.assume(&mut job, key, value).expect(key);
        let after = explain(&facts, &job);
        assert_ne!(before.inputs, after.inputs, "{key}");
        assert!(after.inputs[key]["assumed"].as_bool().unwrap_or(false), "{key}");
    }
    let mut facts = facts(Role::Primary, State::Fit, false);
    let mut job = JobSettings::default();
    assert!(facts.assume(&mut job, "mood", "good").is_err());
    assert!(facts.assume(&mut job, "replicated", "perhaps").is_err());
    assert!(facts.assume(&mut job, "replication.lag_seconds", "-1").is_err());
    assert!(facts.assume(&mut job, "replication.lag_seconds", "1e300").is_err());
}

#[test]
fn an_explanation_has_the_promised_shape() {
    let explained = explain(&facts(Role::Secondary, State::Fit, false), &JobSettings::default());
    let json = serde_json::to_value(explained).expect("plain data");
    assert_eq!(json["decision"], "run");
    assert_eq!(json["run_on"], "b");
    assert_eq!(json["role"], "secondary");
    assert_eq!(json["reasons"][0]["code"], "secondary-fit");
    assert!(json["inputs"]["replication.lag_seconds"]["age_seconds"].is_number());
}

fn node_facts(text: &'static str) -> impl Strategy<Value = NodeFacts> {
    (
        proptest::option::of(0.0..100.0f64),
        proptest::option::of(prop_oneof![Just(1u64 << 20), Just(1u64 << 32)]),
        proptest::option::of(prop_oneof![Just(1u64 << 30), Just(50u64 << 30)]),
        proptest::option::of(any::<bool>()),
        proptest::option::weighted(0.1, Just("draining".to_owned())),
        proptest::option::weighted(0.1, Just(Reason::new("data-failed", "EIO"))),
    )
        .prop_map(move |(cpu, memory, storage, repository, unavailable, problem)| NodeFacts {
            cpu_percent: cpu,
            memory_free_bytes: memory,
            storage_free_bytes: storage,
            storage_total_bytes: Some(100 << 30),
            repository,
            unavailable,
            problems: problem.into_iter().collect(),
            ..NodeFacts::unknown(name(text))
        })
}

fn any_facts() -> impl Strategy<Value = Facts> {
    let replication = (
        proptest::bool::weighted(0.8),
        proptest::option::weighted(0.9, 0u64..120),
        proptest::option::weighted(0.3, 0u64..120),
    );
    let slot = (
        any::<bool>(),
        any::<bool>(),
        proptest::bool::weighted(0.95),
        proptest::bool::weighted(0.1),
        proptest::bool::weighted(0.1),
    );
    (node_facts("a"), node_facts("b"), replication, slot).prop_map(
        |(primary, secondary, (healthy, lag, lost), (active, late, replicated, gone_a, gone_b))| {
            let mut facts = facts(Role::Primary, State::Fit, late);
            facts.primary = primary;
            facts.secondary = secondary;
            facts.replication.healthy = healthy;
            facts.replication.lag = lag.map(Span::from_secs);
            facts.replication.link_lost = lost.map(Span::from_secs);
            facts.active = if active { Role::Primary } else { Role::Secondary };
            facts.replicated = replicated;
            for (gone, node) in [(gone_a, "a"), (gone_b, "b")] {
                if gone {
                    facts.given_up.push(GivenUp { node: name(node), why: "refused".to_owned() });
                }
            }
            facts
        },
    )
}

fn any_settings() -> impl Strategy<Value = JobSettings> {
    (
        proptest::sample::select(&Placement::ALL[..]),
        any::<bool>(),
        proptest::option::of(20.0..100.0f64),
        proptest::option::of(20.0..100.0f64),
        proptest::option::of(0.0..100.0f64),
    )
        .prop_map(|(placement, allow_stale, primary_max, secondary_max, condition)| {
            let conditions = condition
                .map(|value| Condition {
                    fact: "primary.cpu_percent".to_owned(),
                    comparison: Comparison::AtLeast,
                    value,
                })
                .into_iter()
                .collect();
            JobSettings {
                placement,
                allow_stale,
                primary_cpu_max: primary_max,
                secondary_cpu_max: secondary_max,
                conditions,
                ..JobSettings::default()
            }
        })
}

/// Whether a node can make the backup, said again from the raw facts and apart from the code under
/// test.
fn able(facts: &Facts, settings: &JobSettings, role: Role) -> bool {
    let node = facts.node(role);
    let common = node.unavailable.is_none()
        && node.problems.is_empty()
        && node.repository != Some(false)
        && facts.given_up.iter().all(|given_up| given_up.node != node.name);
    let below = |value: Option<f64>, max: Option<f64>| match (value, max) {
        (Some(value), Some(max)) => value <= max,
        _ => true,
    };
    common
        && match role {
            Role::Primary => below(node.cpu_percent, settings.primary_cpu_max),
            Role::Secondary => {
                facts.replication.healthy
                    && facts.replication.link_lost.is_none()
                    && facts.replication.lag.is_some_and(|lag| lag.0.as_secs() <= 60)
                    && node.repository.is_some()
                    && node.memory_free_bytes == Some(1 << 32)
                    && node.storage_free_bytes == Some(50 << 30)
                    && below(node.cpu_percent, settings.secondary_cpu_max)
            }
        }
}

fn permitted(settings: &JobSettings, active: Role, role: Role) -> bool {
    let application = if active == role { "active" } else { "passive" };
    let role = role_word(role);
    match settings.placement.as_str().strip_suffix("-only") {
        Some(only) => only == role || only == application,
        None => true,
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 20_000,
        failure_persistence: None,
        ..Default::default()
    })]

    #[test]
    fn never_zero_nodes_where_one_may_and_can_and_never_two(
        base in any_facts(),
        settings in any_settings(),
    ) {
        let views = [Role::Primary, Role::Secondary].map(|role| Facts { role, ..base.clone() });
        let decisions = views.each_ref().map(|facts| decide(facts, &settings));
        let runs: Vec<_> = decisions.iter().filter(|d| d.decision == Verdict::Run).collect();
        let waits = decisions.iter().filter(|d| d.decision == Verdict::Wait).count();

        // Without a copy elsewhere there is no second node.
        if !base.replicated {
            let role = Role::Primary;
            let node = base.node(role);
            let can = node.repository != Some(false) && node.problems.is_empty()
                && node.unavailable.is_none()
                && base.given_up.iter().all(|given_up| given_up.node != node.name);
            let expected = if can { Verdict::Run } else { Verdict::Fail };
            prop_assert_eq!(decisions[0].decision, expected);
            return Ok(());
        }

        // Never two. Over a lost link the nodes do not see the same, and only an old image taken
        // by leave of the job can be a second one; the claims arbitrate that.
        let stale = decisions.iter().any(|d| d.stale);
        prop_assert!(runs.len() <= 1 || (base.replication.link_lost.is_some() && stale));

        // Never zero.
        let candidates: Vec<_> = [Role::Primary, Role::Secondary]
            .into_iter()
            .filter(|role| permitted(&settings, base.active, *role))
            .filter(|role| able(&base, &settings, *role))
            .collect();
        if !candidates.is_empty() && base.deadline_passed {
            prop_assert!(!runs.is_empty(), "{candidates:?} can, {decisions:?}");
        } else if !candidates.is_empty() {
            prop_assert!(!runs.is_empty() || waits > 0, "{candidates:?} can, {decisions:?}");
        }
        prop_assert!(!base.deadline_passed || waits == 0, "nothing waits past the deadline");

        // What is named is true: who is delegated to runs, as far as both see the same.
        if base.replication.link_lost.is_none() {
            for decision in &decisions {
                if decision.decision == Verdict::Delegate {
                    prop_assert_eq!(runs.len(), 1);
                    prop_assert_eq!(&decision.run_on, &runs[0].run_on);
                }
            }
            prop_assert_ne!(waits, 1, "a wait on one node alone: {:?}", decisions);
        }

        // Only a permitted node runs, and every reason has a published code.
        for (facts, decision) in views.iter().zip(&decisions) {
            if decision.decision == Verdict::Run {
                prop_assert!(permitted(&settings, base.active, facts.role));
            }
            prop_assert!(!decision.reasons.is_empty());
            for reason in &decision.reasons {
                let known = REASON_CODES.iter().any(|(code, _)| *code == reason.code);
                prop_assert!(known || reason.code == "data-failed", "{}", reason.code);
            }
        }
    }
}
