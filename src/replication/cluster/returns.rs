//! Failover and return in the simulated cluster: who takes back, who yields, who must be told.

use super::*;

/// Both have the first write, and neither reaches the other any more.
fn cut_off(seed: u64) -> World {
    let mut world = World::new(seed);
    world.write(0);
    world.run(seconds(3));
    world.weather.partitioned = true;
    world.run(seconds(10));
    world
}

#[test]
fn after_a_failover_the_old_primary_follows_if_it_lacks_nothing() {
    let mut world = World::new(3);
    world.write(0);
    world.run(seconds(3));
    world.stop(0);
    world.run(seconds(10));
    world.promote(1);
    for _ in 0..20 {
        world.write(1);
    }
    world.restart(0);
    world.run(seconds(10));
    assert!(!world.nodes[0].primary, "it follows");
    assert!(world.nodes[0].events.contains(&"yielded"));
    assert!(world.nodes[0].branches.is_empty());
    world.assert_streaming();
}

#[test]
fn a_primary_that_returns_with_more_keeps_it_as_a_branch_and_follows() {
    let mut world = cut_off(4);
    world.write(0);
    let log = world.nodes[0].log.bytes.clone();
    world.stop(0);
    world.promote(1);
    world.write(1);
    world.weather.partitioned = false;
    world.restart(0);
    world.run(seconds(10));
    world.assert_streaming();
    assert!(!world.nodes[0].primary && world.nodes[1].primary);
    assert_eq!(world.nodes[0].branches, [(128, log[128..].to_vec())]);
    for side in 0..2 {
        assert!(!world.nodes[side].events.contains(&"split-brain"), "an ordinary failover");
        assert!(!world.nodes[side].events.contains(&"replication-blocked"));
    }
}

#[test]
fn two_that_served_while_cut_off_are_a_split_brain_until_an_operator_resolves_it() {
    let mut world = cut_off(4);
    world.write(0);
    world.promote(1);
    world.write(1);
    let logs = [world.nodes[0].log.bytes.clone(), world.nodes[1].log.bytes.clone()];
    world.weather.partitioned = false;
    world.run(seconds(10));
    for (side, log) in logs.iter().enumerate() {
        assert_eq!(world.state(side).0, ReplicationState::SplitBrain);
        assert!(world.nodes[side].events.contains(&"split-brain"));
        assert!(world.nodes[side].primary);
        assert_eq!(world.nodes[side].log.bytes, *log);
    }
    // Demoted, it still holds what the other lacks: stopped, with a reason, and whole.
    world.demote(0);
    world.run(seconds(10));
    for (side, log) in logs.iter().enumerate() {
        let (state, reason) = world.state(side);
        assert_eq!(state, ReplicationState::Blocked);
        assert!(reason.contains("tidelog resolve g --preview"), "{reason}");
        assert_eq!(world.nodes[side].log.bytes, *log);
    }
    world.resolve(0);
    world.run(seconds(10));
    world.assert_streaming();
    assert_eq!(world.nodes[0].branches, [(128, logs[0][128..].to_vec())]);
}

/// The primary pauses, or its copy does: what it writes then reaches no peer. A new process knows.
fn pause(world: &mut World, side: usize, paused: bool) {
    world.feed(side, Input::Pause { group: GROUP, paused });
}

#[test]
fn a_pause_keeps_no_primary_that_comes_back_from_yielding_to_a_newer_one() {
    for side in 0..2 {
        let mut world = World::new(4);
        world.write(0);
        world.run(seconds(3));
        pause(&mut world, side, true);
        world.run(seconds(1));
        world.write(0);
        let log = world.nodes[0].log.bytes.clone();
        world.stop(0);
        world.run(seconds(1));
        world.promote(1);
        world.write(1);
        world.restart(0);
        pause(&mut world, 0, side == 0);
        world.run(seconds(10));
        assert!(!world.nodes[0].primary && world.nodes[1].primary, "paused on {side}");
        assert_eq!(world.nodes[0].branches, [(128, log[128..].to_vec())]);
        // And nothing more.
        assert_eq!(world.nodes[0].log.bytes.len(), 128);
        for node in 0..2 {
            assert_eq!(world.state(node).0, ReplicationState::Paused, "{:?}", world.state(node));
        }
        pause(&mut world, side, false);
        world.run(seconds(5));
        world.assert_streaming();
    }
}

#[test]
fn a_pause_hides_no_split_brain() {
    for side in 0..2 {
        let mut world = cut_off(4);
        world.write(0);
        world.promote(1);
        world.write(1);
        pause(&mut world, side, true);
        world.weather.partitioned = false;
        world.run(seconds(10));
        for node in 0..2 {
            assert_eq!(world.state(node).0, ReplicationState::SplitBrain, "paused on {side}");
            assert!(world.nodes[node].split_brain && world.nodes[node].primary);
        }
        // Nor does it keep one on show that is over: who goes on asks again when it comes back.
        world.demote(0);
        world.run(seconds(10));
        assert!(world.nodes[1].split_brain, "what it wrote is no branch yet");
        world.resolve(0);
        world.run(seconds(10));
        assert!(!world.nodes[1].split_brain, "paused on {side}");
        world.stop(1);
        world.restart(1);
        assert!(world.nodes[1].recovering, "paused on {side}");
        world.hosts_insist(1);
        pause(&mut world, side, false);
        world.run(seconds(10));
        world.assert_streaming();
    }
}

#[test]
fn what_needs_a_hand_stays_on_show_when_a_pause_begins_without_a_link_and_a_pause_does_not() {
    let mut world = cut_off(4);
    world.write(0);
    world.promote(1);
    world.write(1);
    world.weather.partitioned = false;
    world.run(seconds(10));
    world.weather.partitioned = true;
    world.run(seconds(10));
    pause(&mut world, 0, true);
    assert_eq!(world.state(0).0, ReplicationState::SplitBrain);
    let mut world = cut_off(4);
    pause(&mut world, 0, true);
    assert_eq!(world.state(0).0, ReplicationState::Paused);
    pause(&mut world, 0, false);
    assert_eq!(world.state(0).0, ReplicationState::Idle);
}

#[test]
fn a_primary_that_lost_power_takes_back_what_its_peer_has() {
    let mut world = World::new(14);
    world.run(seconds(3));
    world.nodes[0].log.durable = world.nodes[0].log.bytes.len();
    for _ in 0..100 {
        world.write(0);
    }
    world.run(Duration::from_millis(300));
    let there = world.nodes[1].log.bytes.clone();
    world.stop(0);
    world.nodes[0].log.cut(RECORD_BYTES * 2);
    world.nodes[0].reign_due = true;
    assert!(there.len() > RECORD_BYTES * 50, "{} bytes had arrived", there.len());
    world.restart(0);
    world.run(seconds(10));
    world.assert_streaming();
    assert!(world.nodes[0].primary && world.nodes[0].log.bytes.starts_with(&there));
    assert!(world.nodes[0].events.contains(&"takes-back"));
    assert_eq!(world.nodes[0].log.reigns.len(), 2, "a new reign, since something was lost");
    world.write(0);
    world.run(seconds(3));
    world.assert_streaming();
}

/// A primary that lost power and serves again, while its copy is away that has more; what that has.
pub(super) fn primary_that_lost_what_its_copy_has() -> (World, Vec<u8>) {
    let mut world = World::new(15);
    world.run(seconds(3));
    for _ in 0..10 {
        world.write(0);
    }
    world.run(Duration::from_millis(300));
    let received = world.nodes[1].log.bytes.clone();
    assert_eq!(received.len(), RECORD_BYTES * 11);
    // The primary loses power, and its hosts do not wait for the peer, which is away.
    world.stop(1);
    world.stop(0);
    world.nodes[0].log.cut(RECORD_BYTES * 2);
    world.nodes[0].reign_due = true;
    world.restart(0);
    world.run(seconds(6));
    world.hosts_insist(0);
    (world, received)
}

#[test]
fn a_tail_that_was_only_received_is_kept_as_a_branch_by_itself() {
    let (mut world, received) = primary_that_lost_what_its_copy_has();
    world.write(0);
    world.restart(1);
    world.run(seconds(10));
    world.assert_streaming();
    assert_eq!(world.nodes[1].branches, [(128, received[128..].to_vec())]);
}

/// Kills, power failures, partitions and promotes in any order: nothing that was authored is lost
/// without a branch that holds it or a power failure that took it, no two bytes are mixed, and once
/// all is well one node is primary and both are equal, or a split brain says so.
#[test]
fn whatever_dies_and_returns_ends_in_order_or_says_why() {
    let mut seen = BTreeMap::<&str, u32>::new();
    for seed in 0..seeds(300) {
        let mut world = World::new(1000 + seed);
        world.run(seconds(2));
        for _ in 0..60 {
            let side = world.random(2) as usize;
            match world.random(14) {
                0 if world.nodes[side].up => world.stop(side),
                1 if world.nodes[side].up => world.lose_power(side),
                2 | 3 if !world.nodes[side].up => world.restart(side),
                4 => world.weather.partitioned = !world.weather.partitioned,
                5 if world.random(4) == 0 && !world.nodes[1 - side].up => world.promote(side),
                6 => world.hosts_insist(side),
                7 if world.random(4) == 0 => world.demote(side),
                8 if world.nodes[side].held_back.is_some() && world.random(4) == 0 => {
                    world.promote(side);
                }
                _ => world.write(side),
            }
            let pause = Duration::from_millis(world.random(1500));
            world.run(pause);
        }
        world.weather.partitioned = false;
        for side in 0..2 {
            if !world.nodes[side].up {
                world.restart(side);
            }
        }
        world.run(seconds(30));
        // Where nobody reigns, and where one waits for the other to go on, an operator says who.
        let nobody = world.nodes.iter().all(|node| !node.primary || node.held_back.is_some());
        if nobody {
            *seen.entry("nobody").or_default() += 1;
            let newest = |side: usize| {
                let log = &world.nodes[side].log;
                (log.reigns.last().map(|reign| reign.counter), log.head())
            };
            world.promote(usize::from(newest(1) > newest(0)));
            world.run(seconds(30));
        }
        for side in 0..2 {
            for event in world.nodes[side].events.clone() {
                *seen.entry(event).or_default() += 1;
            }
        }
        *seen.entry("branches").or_default() +=
            world.nodes.iter().map(|node| node.branches.len() as u32).sum::<u32>();
        if world.nodes.iter().all(|node| node.primary) {
            assert_eq!(world.state(0).0, ReplicationState::SplitBrain, "seed {seed}");
            assert_eq!(world.state(1).0, ReplicationState::SplitBrain, "seed {seed}");
            // An operator ends it on either side, also while that has just started.
            let side = world.random(2) as usize;
            if world.random(2) == 0 {
                world.stop(1 - side);
                world.restart(1 - side);
                world.run(seconds(2));
            }
            if world.nodes[side].primary && world.nodes[1 - side].primary {
                world.resolve(side);
            }
            world.run(seconds(10));
            let primaries = world.nodes.iter().filter(|node| node.primary).count();
            assert_eq!(primaries, 1, "seed {seed}");
            world.assert_streaming();
        } else if world.nodes.iter().any(|node| node.primary) {
            let states = [world.state(0), world.state(1)];
            if states[0].0 == ReplicationState::Blocked {
                *seen.entry("blocked").or_default() += 1;
                assert!(states.iter().any(|(_, reason)| reason.contains("tidelog resolve")));
            } else {
                *seen.entry("streaming").or_default() += 1;
                world.assert_streaming();
            }
        }
    }
    for what in ["yielded", "takes-back", "branches", "split-brain", "streaming", "nobody"] {
        assert!(seen.get(what).is_some_and(|count| *count > 0), "{what} never happened: {seen:?}");
    }
}

#[test]
fn a_running_primary_never_follows_even_a_newer_reign() {
    let mut world = cut_off(6);
    world.promote(1);
    world.weather.partitioned = false;
    world.run(seconds(10));
    assert!(world.nodes[0].primary && world.nodes[1].primary);
    for side in 0..2 {
        assert_eq!(world.state(side).0, ReplicationState::SplitBrain);
    }
    // It lacks nothing, so a demote is all that is needed.
    world.demote(0);
    world.run(seconds(10));
    world.assert_streaming();
}

#[test]
fn what_was_said_of_a_split_brain_too_early_is_said_again() {
    let mut world = cut_off(16);
    world.promote(1);
    world.weather.partitioned = false;
    world.run(seconds(10));
    let told = |world: &World, side: usize| {
        let node = &world.nodes[side];
        let events = node.events.iter().zip(&node.said);
        let told = events.filter(|(code, _)| **code == "split-brain");
        told.map(|(_, text)| text.clone()).collect::<Vec<_>>()
    };
    // A reign is a record: the new primary has more by that alone.
    let [early] = &told(&world, 0)[..] else { panic!("{:?}", told(&world, 0)) };
    assert!(early.contains("b has all that this node has, and 64 B more"), "{early}");
    // It goes on as it was said: nobody is told again.
    world.write(1);
    world.run(seconds(10));
    assert_eq!(told(&world, 0).len(), 1);
    // The old one has hosts too.
    for _ in 0..3 {
        world.write(0);
        world.run(seconds(10));
    }
    for side in 0..2 {
        let [_, now] = &told(&world, side)[..] else { panic!("{:?}", told(&world, side)) };
        assert!(now.contains("since LSN 128 this node wrote"), "{now}");
        assert!(now.contains("tidelog resolve g --preview"), "{now}");
    }
}

#[test]
fn a_planned_change_of_roles_loses_nothing() {
    let mut world = World::new(7);
    world.write(0);
    world.run(seconds(3));
    world.demote(0);
    world.run(seconds(2));
    assert!(world.state(0).1.contains("no primary"), "{:?}", world.state(0));
    world.promote(1);
    world.write(1);
    world.run(seconds(3));
    world.assert_streaming();
}

#[test]
fn a_primary_that_returns_to_one_that_was_promoted_and_demoted_serves_nobody_by_itself() {
    for (seed, unsent, paused) in [(11, 0, false), (12, 3, false), (13, 3, true)] {
        let mut world = World::new(seed);
        world.write(0);
        world.run(seconds(3));
        world.weather.partitioned = true;
        for _ in 0..unsent {
            world.write(0);
        }
        world.run(seconds(5));
        world.stop(0);
        world.promote(1);
        world.write(1);
        world.demote(1);
        world.weather.partitioned = false;
        world.restart(0);
        pause(&mut world, 0, paused);
        world.run(seconds(10));
        world.hosts_insist(0);
        assert!(world.nodes[0].recovering, "what was answered on b is missing here");
        assert!(world.state(0).1.contains("tidelog promote g"), "{:?}", world.state(0));
        pause(&mut world, 0, false);
        world.promote(1);
        world.run(seconds(10));
        world.assert_streaming();
        assert_eq!(world.nodes[0].branches.len(), usize::from(unsent > 0));
    }
}

#[test]
fn one_that_is_promoted_although_held_back_reigns_above_the_other() {
    let mut world = World::new(13);
    world.write(0);
    world.run(seconds(3));
    world.stop(0);
    world.run(seconds(5));
    world.promote(1);
    world.write(1);
    world.stop(1);
    world.restart(0);
    // The new primary is gone for good, but not before it was heard.
    world.nodes[0].held_back = Some(2);
    world.promote(0);
    assert_eq!(world.nodes[0].log.reigns.last().unwrap().counter, 3);
    world.write(0);
    world.restart(1);
    world.run(seconds(10));
    world.assert_streaming();
    assert_eq!(world.nodes[1].branches.len(), 1);
}

#[test]
fn a_restart_does_not_end_a_split_brain() {
    let mut world = cut_off(14);
    world.promote(1);
    world.write(0);
    world.write(1);
    world.weather.partitioned = false;
    world.run(seconds(10));
    for side in [0, 1] {
        world.stop(side);
        world.restart(side);
        world.run(seconds(10));
        assert!(world.nodes.iter().all(|node| node.primary && node.branches.is_empty()));
        assert_eq!(world.state(side).0, ReplicationState::SplitBrain);
    }
    world.resolve(0);
    world.run(seconds(10));
    world.assert_streaming();
    assert!(world.nodes.iter().all(|node| !node.split_brain));
}

/// What its later primary has answered by it stays, whoever is reached again first.
#[test]
fn a_copy_yields_by_itself_to_no_earlier_reign() {
    for (folded, given_up) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut world = cut_off(18);
        // Another node was promoted, and this copy followed it.
        let now = world.now;
        let third = NodeId([9; 16]);
        world.nodes[1].log.append(now, Some((EpochId(77), third, 0)));
        world.nodes[1].log.append(now, None);
        world.look(1);
        for _ in 0..10 {
            world.write(0);
        }
        if folded {
            world.nodes[0].log.start = 8 * RECORD_BYTES as u64;
            world.look(0);
        }
        let there = world.nodes[1].log.bytes.clone();
        world.weather.partitioned = false;
        world.run(seconds(30));
        assert!(world.nodes[1].log.bytes == there && world.nodes[1].branches.is_empty());
        let (state, reason) = world.state(1);
        assert_eq!(state, ReplicationState::Blocked);
        let says = "this copy holds a later reign than that of a, which is primary";
        assert!(reason.contains(says) && reason.contains("--discard-local` here"), "{reason}");
        let (state, reason) = world.state(0);
        assert_eq!(state, ReplicationState::Blocked);
        assert!(reason.contains("on that node `tidelog resolve g --preview`"), "{reason}");
        if given_up {
            // An operator had its primary yield.
            world.nodes[1].given_up.insert(EpochId(77));
            world.look(1);
        } else {
            world.resolve(1);
        }
        world.run(seconds(10));
        world.assert_streaming();
        assert_eq!(world.nodes[1].branches.len(), 1);
    }
}

#[test]
fn a_promote_beside_an_idle_primary_can_be_taken_back() {
    let mut world = cut_off(15);
    world.promote(1);
    world.weather.partitioned = false;
    world.run(seconds(10));
    world.resolve(1);
    world.run(seconds(10));
    world.assert_streaming();
    assert!(world.nodes[0].primary);
}

#[test]
fn a_primary_that_returns_from_before_the_log_keeps_its_tail_and_takes_an_image() {
    for tail in [0, 2] {
        let mut world = World::new(16);
        world.write(0);
        world.run(seconds(3));
        world.weather.partitioned = true;
        for _ in 0..tail {
            world.write(0);
        }
        world.run(seconds(1));
        world.stop(0);
        world.promote(1);
        for _ in 0..10 {
            world.write(1);
        }
        world.nodes[1].log.start = 8 * RECORD_BYTES as u64;
        world.look(1);
        world.weather.partitioned = false;
        world.restart(0);
        world.run(seconds(30));
        assert!(!world.nodes[0].primary);
        let kept: usize = world.nodes[0].branches.iter().map(|(_, bytes)| bytes.len()).sum();
        assert_eq!(kept, tail * RECORD_BYTES);
        world.assert_streaming();
        assert!(world.nodes[0].events.contains(&"yielded"));
    }
}

#[test]
fn a_copy_that_was_cut_for_another_peer_takes_its_primarys_log_anew() {
    for seed in 0..seeds(20) {
        let mut world = World::new(seed);
        for _ in 0..20 {
            world.write(0);
        }
        world.run(seconds(3));
        world.assert_streaming();
        // Nothing is written afterwards that would show that the stream does not fit.
        let at = Lsn(10 * 64);
        let chain = world.nodes[1].log.chain_at(10 * 64);
        world.nodes[1].yield_to(at, chain, true).unwrap();
        world.look(1);
        // Until it asks anew, its primary knows nothing of that.
        world.nodes[1].lost_power = true;
        world.run(seconds(1));
        world.nodes[1].lost_power = false;
        world.run(seconds(5));
        world.assert_streaming();
        assert_eq!(world.nodes[1].log.head(), world.nodes[0].log.head(), "seed {seed}");
    }
}

#[test]
fn who_was_refused_asks_again_once_no_other_peer_is_followed_but_not_without_end() {
    let mut world = World::new(9);
    world.get_ahead();
    world.look(1);
    world.run(seconds(10));
    let blocked = |world: &World| world.state(1).0 == ReplicationState::Blocked;
    assert!(blocked(&world), "{:?}", world.state(1));
    let told = |world: &World| {
        world.nodes[1].events.iter().filter(|code| **code == "replication-blocked").count()
    };
    let asked = |world: &World| world.nodes[1].asks;
    let (told_before, asked_before) = (told(&world), asked(&world));
    // As if another peer were asked, and refused, as fast as messages go.
    for _ in 0..10_000 {
        for follows in [Some("c".parse().unwrap()), None] {
            let local = LocalGroup { follows, ..world.nodes[1].local() };
            world.feed(1, Input::Group(Box::new(local)));
        }
        world.run(Duration::from_millis(10));
    }
    let asks = asked(&world) - asked_before;
    assert!((4..=8).contains(&asks), "{asks} asks in 100 s");
    assert_eq!(told(&world), told_before, "it is no news");
    assert!(blocked(&world), "{:?}", world.state(1));
    // What was in the way is gone: nobody has to tell it so.
    world.write(0);
    world.nodes[1].log = world.nodes[0].log.clone();
    world.run(seconds(70));
    world.assert_streaming();
}
