//! A copy in the simulated cluster: it becomes equal, stays so, and stops with a reason.

use super::*;

#[test]
fn a_copy_becomes_equal_and_stays_so() {
    let mut world = World::new(1);
    world.run(seconds(2));
    for _ in 0..1000 {
        world.write(0);
        world.run(Duration::from_millis(1));
    }
    world.run(seconds(3));
    world.assert_streaming();
    assert_eq!(world.nodes[0].log.head(), Lsn(1001 * 64));
    let acked = world.nodes[0].core.channel(GROUP).unwrap().acked();
    assert_eq!(acked.durable, Lsn(1001 * 64));
    assert_eq!(acked.requests, 1001);
    let (compared, mismatch) = world.nodes[1].core.channel(GROUP).unwrap().comparison();
    assert_eq!((compared, mismatch), (Some(Lsn(1001 * 64)), None));
}

#[test]
fn one_link_remains_of_two_that_cross() {
    for seed in 0..seeds(50) {
        let mut world = World::new(seed);
        world.run(seconds(20));
        let conn = world.nodes[0].core.conn().expect("connected");
        assert_eq!(world.nodes[1].core.conn(), Some(conn), "seed {seed}");
        world.assert_streaming();
    }
}

#[test]
fn everything_passes_through_bad_weather_in_order() {
    for seed in 0..seeds(40) {
        let mut world = World::new(seed);
        world.weather.cut_one_in = 20 + seed % 60;
        world.weather.delay_most = Duration::from_millis(1 + seed % 200);
        for step in 0..400 {
            world.write(0);
            let pause = Duration::from_millis(world.random(60));
            world.run(pause);
            match world.random(80) {
                0 => world.weather.partitioned = true,
                1..=8 => world.weather.partitioned = false,
                9 => world.stop(1),
                10 => world.stop(0),
                _ => {}
            }
            if step % 10 == 0 {
                for side in 0..2 {
                    if !world.nodes[side].up {
                        world.restart(side);
                    }
                }
            }
        }
        world.weather = Weather { delay_most: Duration::from_millis(5), ..Weather::default() };
        for side in 0..2 {
            if !world.nodes[side].up {
                world.restart(side);
            }
        }
        world.run(seconds(60));
        world.assert_streaming();
    }
}

#[test]
fn a_conversation_cut_after_any_byte_goes_on_after_it() {
    let mut whole = World::new(5);
    for _ in 0..5 {
        whole.write(0);
    }
    whole.run(seconds(2));
    whole.assert_streaming();
    for towards in 0..2 {
        for cut in 0..whole.conversation[towards] {
            let mut world = World::new(5);
            world.cut_next = Some((towards, cut));
            for _ in 0..5 {
                world.write(0);
            }
            world.run(seconds(10));
            world.assert_streaming();
        }
    }
}

#[test]
fn a_pause_holds_until_resumed_on_either_side() {
    for side in 0..2 {
        let mut world = World::new(2);
        world.run(seconds(2));
        world.feed(side, Input::Pause { group: GROUP, paused: true });
        world.run(seconds(1));
        let before = world.nodes[1].log.bytes.len();
        for _ in 0..10 {
            world.write(0);
        }
        world.run(seconds(5));
        assert_eq!(world.nodes[1].log.bytes.len(), before);
        for side in 0..2 {
            assert_eq!(world.state(side).0, ReplicationState::Paused);
            assert!(world.state(side).1.contains("tidelog resume g"), "{:?}", world.state(side));
        }
        world.feed(side, Input::Pause { group: GROUP, paused: false });
        world.run(seconds(5));
        world.assert_streaming();
    }
}

#[test]
fn a_secondary_that_is_ahead_or_of_another_history_is_left_alone() {
    for foreign in [false, true] {
        let mut world = World::new(9);
        if foreign {
            let now = world.now;
            world.nodes[1].log.append(now, Some((EpochId(99), node_id(1), 0)));
            world.nodes[1].log.append(now, None);
        } else {
            world.get_ahead();
        }
        world.look(1);
        let kept = world.nodes[1].log.bytes.clone();
        world.run(seconds(10));
        for side in 0..2 {
            let (state, reason) = world.state(side);
            assert_eq!(state, ReplicationState::Blocked, "{reason}");
            let word = if foreign { "histories part" } else { "holds 64 B that the primary lost" };
            assert!(reason.contains(word), "{reason}");
        }
        assert_eq!(world.nodes[1].log.bytes, kept);
    }
}

#[test]
fn equal_histories_with_other_bytes_are_found_by_the_chain() {
    let mut world = World::new(10);
    world.write(0);
    let mut other = world.nodes[0].log.clone();
    let reign = other.reigns[0];
    other.bytes.truncate(64);
    other.reigns[0] = reign;
    // A second record that says something else, with a whole chain of its own.
    other.append(Duration::from_secs(1), None);
    let last = other.bytes.len();
    other.bytes[last - 64] = 5;
    let checksum = xxh3_64(&other.bytes[last - 64..last - 8]);
    other.bytes[last - 8..].copy_from_slice(&checksum.to_le_bytes());
    world.nodes[1].log = other;
    world.look(1);
    world.run(seconds(10));
    for side in 0..2 {
        let (state, reason) = world.state(side);
        assert_eq!(state, ReplicationState::Blocked, "{reason}");
    }
    assert!(world.nodes[0].log.bytes != world.nodes[1].log.bytes);
}

#[test]
fn the_lag_of_a_peer_that_was_rolled_back_is_unknown_until_it_is_mended() {
    let mut world = World::new(14);
    for _ in 0..200 {
        world.write(0);
        world.run(Duration::from_millis(10));
    }
    world.run(seconds(3));
    world.assert_streaming();
    world.stop(1);
    world.tampered = true;
    let log = &mut world.nodes[1].log;
    log.bytes.truncate(10 * RECORD_BYTES);
    log.times.truncate(10);
    log.durable = log.bytes.len();
    world.restart(1);
    while !world.nodes[0].events.contains(&"peer-rolled-back") {
        world.run(Duration::from_micros(50));
    }
    // From here on the primary knows: `check` holds what it says against the truth.
    world.tampered = false;
    let channel = world.nodes[0].core.channel(GROUP).unwrap();
    assert_eq!(channel.lags(world.now), (None, None));
    assert_eq!(channel.acked().received, Lsn(10 * 64));
    world.run(seconds(5));
    world.assert_streaming();
    let channel = world.nodes[0].core.channel(GROUP).unwrap();
    assert_eq!(channel.lags(world.now), (Some(Duration::ZERO), Some(Duration::ZERO)));
    let told = |world: &World| {
        world.nodes[0].events.iter().filter(|code| **code == "peer-rolled-back").count()
    };
    assert_eq!(told(&world), 1, "once, not with every connection");

    // Nor is it taken for equal while replication is paused, and nothing is asked for.
    world.feed(0, Input::Pause { group: GROUP, paused: true });
    world.stop(1);
    world.tampered = true;
    let log = &mut world.nodes[1].log;
    log.bytes.truncate(20 * RECORD_BYTES);
    log.times.truncate(20);
    log.durable = log.bytes.len();
    world.restart(1);
    world.run(seconds(10));
    let channel = world.nodes[0].core.channel(GROUP).unwrap();
    assert_eq!(channel.acked().received, Lsn(20 * 64));
    assert_eq!(channel.lags(world.now), (None, None));
    assert_eq!(told(&world), 2);
}

#[test]
fn a_disk_error_is_tried_again_by_itself_and_stays_on_show_until_bytes_go_through() {
    for side in 0..2 {
        let mut world = World::new(15);
        world.run(seconds(3));
        world.nodes[side].broken_disk = true;
        world.write(0);
        world.run(seconds(1));
        let since = |world: &World, side: usize| {
            let (state, reason, since) = world.nodes[side].core.channel(GROUP).unwrap().state();
            assert_eq!(state, ReplicationState::Blocked, "{reason}");
            assert!(reason.contains("again"), "{reason}");
            since
        };
        let first = [since(&world, 0), since(&world, 1)];
        for _ in 0..300 {
            world.run(seconds(1));
            world.write(0);
            assert_eq!([since(&world, 0), since(&world, 1)], first);
        }
        let errors = world.nodes[side].disk_errors;
        assert!((5..=15).contains(&errors), "{errors} attempts in five minutes");
        for node in &world.nodes {
            let told = node.events.iter().filter(|code| **code == "replication-blocked").count();
            assert_eq!(told, 1, "{:?}", node.events);
        }
        world.nodes[side].broken_disk = false;
        world.run(seconds(61));
        world.assert_streaming();
        // The next trouble is news again, and tried again soon.
        world.nodes[side].broken_disk = true;
        world.write(0);
        world.run(seconds(1));
        world.nodes[side].broken_disk = false;
        world.run(seconds(3));
        world.assert_streaming();
    }
}

#[test]
fn the_beginning_of_a_request_counts_as_nothing_that_the_copy_has() {
    let mut world = World::new(24);
    world.run(seconds(5));
    world.assert_streaming();
    let before = world.nodes[1].log.head();
    world.nodes[1].unfinished = true;
    for _ in 0..10 {
        world.write(0);
    }
    world.run(seconds(1));
    let channel = world.nodes[0].core.channel(GROUP).unwrap();
    assert_eq!(channel.acked().received, before);
    // It was counted as received, and the copy may lose it at any moment.
    assert!(channel.lags(world.now).0 > Some(Duration::ZERO));
}

#[test]
fn silence_is_a_lost_peer_and_an_age_that_grows() {
    let mut world = World::new(12);
    world.run(seconds(5));
    world.weather.partitioned = true;
    world.run(seconds(30));
    for side in 0..2 {
        assert!(world.nodes[side].core.link_down().is_some());
        assert!(world.state(side).1.contains("nothing heard for"), "{:?}", world.state(side));
        assert!(world.nodes[side].events.contains(&"link-lost"));
    }
    let channel = world.nodes[1].core.channel(GROUP).unwrap();
    let lag = secondary_lag(channel, world.now).unwrap();
    assert!(lag >= seconds(29), "{lag:?}");
    assert_eq!(world.nodes[0].core.channel(GROUP).unwrap().lags(world.now).0, Some(Duration::ZERO));
}

#[test]
fn an_exceeded_target_is_raised_once() {
    let mut world = World::new(13);
    world.nodes[0].membership =
        Membership::Member { rpo_target: Some(crate::units::Span(seconds(5))), mode: Mode::Async };
    world.look(0);
    world.run(seconds(5));
    world.weather.partitioned = true;
    for _ in 0..40 {
        world.write(0);
        world.run(seconds(1));
    }
    let raised = world.nodes[0].events.iter().filter(|code| **code == "rpo-exceeded").count();
    assert_eq!(raised, 1);
}

#[test]
fn the_same_seed_is_the_same_run() {
    let run = |seed| {
        let mut world = World::new(seed);
        world.weather.cut_one_in = 30;
        for _ in 0..200 {
            world.write(0);
            world.run(Duration::from_millis(20));
        }
        (world.sequence, world.conversation, world.nodes[1].log.bytes.clone())
    };
    assert_eq!(run(77), run(77));
    assert_ne!(run(77).0, run(78).0);
}

/// Where the link came up before the copy was known here, the primary's word was dropped, and the
/// copy asked for nothing until the link broke.

#[test]
fn what_is_announced_before_the_group_is_known_here_is_not_forgotten() {
    let mut world = World::new(14);
    world.run(seconds(3));
    let mut core = new_core(world.now, 1);
    let mut outputs = Vec::new();
    let conn = ConnId(77);
    let input = Input::ConnUp { conn, dialled: true, incarnation: Incarnation(1) };
    core.handle(world.now, input, &mut outputs);
    let message = Message::Announce {
        group: GROUP.0,
        primary: true,
        recovering: false,
        paused: false,
        stopped: false,
        incarnation: 1,
        history: world.nodes[0].log.history().to_wire(),
    };
    core.handle(world.now, Input::Message { conn, message, wall: LogTime(0) }, &mut outputs);
    assert!(!outputs.iter().any(|output| matches!(output, Output::Prepare { .. })));
    let local = world.nodes[1].local();
    core.handle(world.now, Input::Group(Box::new(local)), &mut outputs);
    assert!(outputs.iter().any(|output| matches!(output, Output::Prepare { .. })), "it asks");
}
