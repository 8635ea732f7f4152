//! What the group is told of a peer that its hosts wait for, in the simulated cluster.

use super::*;

/// Two nodes of which the secondary is required, and has everything.
fn required(seed: u64) -> World {
    let mut world = World::new(seed);
    world.nodes[0].membership = Membership::Member { rpo_target: None, mode: Mode::Sync };
    world.look(0);
    world.run(seconds(3));
    let head = world.nodes[0].log.head();
    assert_eq!(world.nodes[0].peer_holds, Some((head, head)), "seed {seed}");
    world
}

#[test]
fn what_a_required_peer_holds_is_told_and_never_more() {
    for seed in 0..seeds(20) {
        let mut world = required(seed);
        world.weather.cut_one_in = 30;
        for _ in 0..200 {
            world.write(0);
            world.run(Duration::from_millis(1 + seed));
            if let Some((received, durable)) = world.nodes[0].peer_holds {
                let copy = &world.nodes[1].log;
                assert!(received.0 <= (copy.bytes.len() + copy.tail.len()) as u64);
                assert!(durable.0 <= copy.durable as u64);
            }
        }
        world.weather.cut_one_in = 0;
        world.run(seconds(10));
        let head = world.nodes[0].log.head();
        assert_eq!(world.nodes[0].peer_holds, Some((head, head)), "seed {seed}");
    }
}

#[test]
fn a_required_peer_is_lost_with_its_link_and_comes_back() {
    let mut world = required(1);
    world.weather.partitioned = true;
    world.run(seconds(10));
    assert_eq!(world.nodes[0].peer_holds, None);
    let why = world.nodes[0].peer_lost.clone().unwrap();
    assert!(why.contains("nothing heard for"), "{why}");
    world.write(0);
    world.weather.partitioned = false;
    world.run(seconds(10));
    let head = world.nodes[0].log.head();
    assert_eq!(world.nodes[0].peer_holds, Some((head, head)));
    // A pause ends it too.
    world.feed(0, Input::Pause { group: GROUP, paused: true });
    world.run(seconds(1));
    assert_eq!(world.nodes[0].peer_holds, None);
}

#[test]
fn a_living_link_with_a_hung_disk_behind_it_is_a_lost_peer() {
    let mut world = required(2);
    world.run(seconds(60));
    assert!(world.nodes[0].peer_holds.is_some(), "with nothing outstanding nothing stands still");
    world.nodes[1].hung_disk = true;
    world.write(0);
    world.run(seconds(4));
    assert!(world.nodes[0].peer_holds.is_some(), "it has time");
    world.run(seconds(2));
    assert_eq!(world.nodes[0].peer_holds, None);
    let why = world.nodes[0].peer_lost.clone().unwrap();
    assert!(why.contains("nothing became durable there for 5s"), "{why}");
    assert!(world.nodes[0].core.conn().is_some(), "the link lives");
}

#[test]
fn nothing_is_told_of_a_peer_that_nobody_waits_for() {
    let mut world = World::new(3);
    world.write(0);
    world.run(seconds(5));
    assert_eq!(world.nodes[0].peer_holds, None);
    world.weather.partitioned = true;
    world.run(seconds(10));
    assert_eq!(world.nodes[0].peer_lost, None);
}
