//! Replication to a copy is stopped: it learns of that in time, is retired, and may be taken up
//! again.

use super::*;

impl World {
    /// The record of what the peer is now is appended, and then the group tells so.
    fn set_member(&mut self, membership: Membership) {
        let now = self.now;
        self.nodes[0].log.append(now, None);
        self.nodes[0].membership = membership;
        self.look(0);
    }
}

/// A copy that streams.
fn streaming(seed: u64) -> World {
    let mut world = World::new(seed);
    world.run(seconds(5));
    world.assert_streaming();
    world
}

/// One whose stream is paused, so that no record reaches it.
fn paused(seed: u64) -> World {
    let mut world = streaming(seed);
    world.feed(0, Input::Pause { group: GROUP, paused: true });
    world
}

#[test]
fn a_stranger_learns_nothing_and_a_stopped_copy_gets_the_last_record() {
    let mut world = World::new(11);
    world.nodes[0].membership = Membership::Stranger;
    world.look(0);
    world.run(seconds(5));
    assert!(world.nodes[1].log.bytes.is_empty());
    assert!(world.nodes[1].core.channel(GROUP).unwrap().remote().is_none());

    world.nodes[0].membership = Membership::Member { rpo_target: None, mode: Mode::Async };
    world.look(0);
    world.run(seconds(5));
    world.assert_streaming();

    world.set_member(Membership::Stranger);
    world.run(seconds(5));
    assert!(world.nodes[0].log.bytes == world.nodes[1].log.bytes);
    // There the record says it too.
    world.nodes[1].membership = Membership::Stopped;
    world.look(1);
    assert!(world.nodes[1].retired);
    world.run(seconds(1));
    assert!(!world.nodes[1].core.channel(GROUP).unwrap().follows(), "it may follow another");
    world.write(0);
    world.run(seconds(10));
    assert_eq!(world.nodes[1].log.bytes.len() + 64, world.nodes[0].log.bytes.len());
    assert_eq!(world.state(0).0, ReplicationState::Idle);
}

#[test]
fn a_copy_that_was_away_when_it_was_stopped_learns_of_it_and_can_be_taken_up_again() {
    let mut world = World::new(16);
    world.write(0);
    world.run(seconds(3));
    world.weather.partitioned = true;
    world.run(seconds(10));
    world.set_member(Membership::Stranger);
    world.weather.partitioned = false;
    world.run(seconds(10));
    let kept = world.nodes[1].log.bytes.len();
    assert!(world.nodes[1].retired);
    assert!(world.state(1).1.contains("stopped on a"), "{:?}", world.state(1));
    // Its own log still says that it is a member, also after a restart.
    world.stop(1);
    world.restart(1);
    world.run(seconds(10));
    assert!(world.nodes[1].retired);
    assert_eq!(world.nodes[1].log.bytes.len(), kept);

    world.set_member(Membership::Member { rpo_target: None, mode: Mode::Async });
    world.run(seconds(10));
    assert!(!world.nodes[1].retired);
    world.assert_streaming();

    // With a link, but no stream that could carry the record.
    world.feed(1, Input::Pause { group: GROUP, paused: true });
    world.run(seconds(1));
    world.set_member(Membership::Stranger);
    world.run(seconds(1));
    assert!(world.nodes[1].retired);
}

#[test]
fn a_copy_that_was_empty_when_its_peer_came_learns_that_it_was_stopped() {
    let mut world = World::new(18);
    assert_eq!(world.nodes[1].log.head(), Lsn(0), "as it announces itself");
    world.run(seconds(3));
    world.assert_streaming();
    // Without a stream that could carry the record.
    world.feed(0, Input::Pause { group: GROUP, paused: true });
    world.run(seconds(1));
    world.set_member(Membership::Stranger);
    world.run(seconds(1));
    assert!(world.nodes[1].retired);
}

#[test]
fn a_copy_that_was_asked_for_and_stopped_before_it_was_told_is_retired() {
    let mut world = streaming(19);
    // What made it a member and what ended that may come in one piece.
    world.nodes[1].membership = Membership::Pending;
    world.look(1);
    world.set_member(Membership::Stranger);
    world.run(seconds(1));
    assert!(world.nodes[1].retired);
}

#[test]
fn a_copy_that_was_asked_for_and_dies_with_the_record_of_its_stop_is_retired_when_it_is_back() {
    let mut world = streaming(27);
    // The log has said that it is a member, but not for so long that who asked is forgotten.
    world.nodes[1].membership = Membership::Pending;
    world.look(1);
    world.weather.delay_most = Duration::from_millis(20);
    world.set_member(Membership::Stranger);
    while world.nodes[1].log.bytes != world.nodes[0].log.bytes {
        world.run(Duration::from_millis(1));
    }
    assert!(!world.nodes[1].retired, "the stream has not ended");
    world.stop(1);
    world.restart(1);
    world.run(seconds(10));
    assert!(world.nodes[1].retired);
}

#[test]
fn a_copy_that_was_asked_for_and_stopped_follows_when_it_is_taken_up_again() {
    let mut world = paused(28);
    // Cut back by a loss of power to where its log knows nobody.
    world.nodes[1].membership = Membership::Pending;
    world.look(1);
    world.set_member(Membership::Stranger);
    world.run(seconds(1));
    assert!(world.nodes[1].retired);
    world.feed(0, Input::Pause { group: GROUP, paused: false });
    world.set_member(Membership::Member { rpo_target: None, mode: Mode::Async });
    world.run(seconds(5));
    assert!(!world.nodes[1].retired);
    world.assert_streaming();
}

#[test]
fn a_copy_that_found_no_room_for_its_mark_is_marked_when_it_is_looked_at_again() {
    let mut world = paused(29);
    world.nodes[1].membership = Membership::Pending;
    world.look(1);
    world.set_member(Membership::Stranger);
    world.run(seconds(1));
    assert!(world.nodes[1].retired);
    world.nodes[1].retired = false;
    world.look(1);
    assert!(world.nodes[1].retired);
}

#[test]
fn a_copy_that_another_node_has_taken_up_since_is_not_retired_by_the_word_of_before() {
    let member = Membership::Member { rpo_target: None, mode: Mode::Async };
    for (seed, by_log) in [(33, true), (34, false)] {
        let mut world = paused(seed);
        world.nodes[1].membership = Membership::Pending;
        world.look(1);
        world.set_member(Membership::Stranger);
        world.run(seconds(1));
        assert!(world.nodes[1].retired);
        // The log of a third node names this one, and perhaps the first as well.
        world.nodes[1].follows = Some("c".parse().unwrap());
        world.nodes[1].membership = if by_log { member } else { Membership::Pending };
        world.nodes[1].retired = false;
        world.look(1);
        world.nodes[1].follows = None;
        world.look(1);
        assert!(!world.nodes[1].retired, "by the log: {by_log}");
    }
}

#[test]
fn a_copy_that_has_asked_a_primary_which_steps_down_is_free_to_follow_another() {
    let member = Membership::Member { rpo_target: None, mode: Mode::Async };
    for (seed, membership) in [(31, member), (32, Membership::Stranger)] {
        let mut world = streaming(seed);
        // The log of the copy ends between its stop and what took it up again.
        world.weather.partitioned = true;
        world.run(seconds(20));
        world.nodes[1].membership = Membership::Stopped;
        world.look(1);
        world.write(0);
        world.weather = Weather { delay_most: Duration::from_millis(50), ..Weather::default() };
        let follows = |world: &World| world.nodes[1].core.channel(GROUP).unwrap().follows();
        while !follows(&world) {
            world.run(Duration::from_millis(1));
        }
        // It yields to a third one, perhaps with the record of that.
        (world.nodes[0].primary, world.nodes[0].membership) = (false, membership);
        world.look(0);
        world.run(seconds(2));
        assert!(!follows(&world), "{membership:?}");
        assert!(world.nodes[1].retired);
    }
}

#[test]
fn a_primary_that_steps_down_while_it_ends_a_stream_is_not_retired_itself() {
    let mut world = streaming(20);
    // The copy lacks the record yet: the stream to it goes on until it has it.
    world.set_member(Membership::Stranger);
    world.nodes[0].primary = false;
    world.look(0);
    world.run(seconds(1));
    assert!(!world.nodes[0].retired);
    // The copy is, and is free to follow another one.
    assert!(world.nodes[1].retired);
    assert!(!world.nodes[1].core.channel(GROUP).unwrap().follows());
}

#[test]
fn who_begins_to_reign_tells_a_copy_of_its_stop_that_nobody_could_tell() {
    let mut world = streaming(21);
    // Stopped by another node, on whose log this one follows: a secondary tells nobody.
    world.feed(0, Input::Pause { group: GROUP, paused: true });
    world.nodes[0].primary = false;
    world.set_member(Membership::Stranger);
    world.run(seconds(1));
    assert!(!world.nodes[1].retired);
    world.nodes[0].primary = true;
    world.look(0);
    world.run(seconds(1));
    assert!(world.nodes[1].retired);
}

#[test]
fn who_begins_to_reign_tells_a_copy_of_its_stop_that_said_what_it_holds_before() {
    let mut world = streaming(22);
    world.nodes[0].primary = false;
    world.weather.partitioned = true;
    world.run(seconds(20));
    world.set_member(Membership::Stranger);
    world.weather.partitioned = false;
    world.run(seconds(20));
    assert!(!world.nodes[1].retired);
    world.nodes[0].primary = true;
    world.look(0);
    world.run(seconds(1));
    assert!(world.nodes[1].retired);
}

#[test]
fn a_copy_that_follows_another_node_is_retired_by_no_word_before_it_does_not() {
    let mut world = World::new(27);
    world.run(seconds(5));
    world.feed(0, Input::Pause { group: GROUP, paused: true });
    let follow = |world: &mut World, follows| {
        world.nodes[1].follows = follows;
        world.look(1);
    };
    follow(&mut world, Some("c".parse().unwrap()));
    world.set_member(Membership::Stranger);
    world.run(seconds(1));
    assert!(!world.nodes[1].retired, "what c sends may take it up again");
    follow(&mut world, None);
    world.run(seconds(1));
    assert!(world.nodes[1].retired);
}

#[test]
fn a_primary_that_asks_whether_it_still_is_one_stops_no_copy_before_it_serves() {
    let mut world = paused(25);
    // Back from a crash, with the record of the stop; another node may reign by now.
    world.nodes[0].recovering = true;
    world.set_member(Membership::Stranger);
    world.run(seconds(1));
    assert!(!world.nodes[1].retired);
    world.serve(0);
    world.run(seconds(1));
    assert!(world.nodes[1].retired);
}

#[test]
fn a_stop_that_is_told_of_what_a_copy_held_before_it_followed_another_one_is_none() {
    let mut world = paused(23);
    world.nodes[0].primary = false;
    world.set_member(Membership::Stranger);
    world.run(seconds(1));
    // From a third node, which the first one does not hear.
    let now = world.now;
    for _ in 0..10 {
        world.nodes[1].log.append(now, None);
    }
    world.look(1);
    world.nodes[0].primary = true;
    world.look(0);
    world.run(seconds(1));
    assert!(!world.nodes[1].retired);
    // It is no node to ask for the log, and says so also where something else was on show.
    let channel = |world: &World| world.nodes[1].core.channel(GROUP).unwrap().state().1.to_owned();
    assert_eq!(channel(&world), "replication was stopped on a");
    for paused in [true, false] {
        world.feed(1, Input::Pause { group: GROUP, paused });
    }
    assert_eq!(channel(&world), "replication was stopped on a");
}

#[test]
fn a_copy_that_passes_its_own_stop_while_it_catches_up_is_not_retired_unless_it_ends_there() {
    let mut world = streaming(13);
    let passes = |world: &mut World, membership| {
        world.nodes[1].membership = membership;
        world.look(1);
    };
    passes(&mut world, Membership::Stopped);
    assert!(!world.nodes[1].retired);
    passes(&mut world, Membership::Member { rpo_target: None, mode: Mode::Async });
    world.run(seconds(5));
    assert!(!world.nodes[1].retired);
    world.assert_streaming();
    // The stream breaks before what is behind it has come.
    passes(&mut world, Membership::Stopped);
    world.weather.partitioned = true;
    world.run(seconds(20));
    assert!(!world.nodes[1].core.channel(GROUP).unwrap().follows());
    assert!(world.nodes[1].retired);
    // Nothing is behind it.
    world.weather.partitioned = false;
    world.run(seconds(20));
    assert!(world.nodes[1].retired);
}

#[test]
fn a_copy_whose_log_ends_between_its_stop_and_what_took_it_up_again_follows_on() {
    let mut world = streaming(26);
    world.weather.partitioned = true;
    world.run(seconds(20));
    world.nodes[1].membership = Membership::Stopped;
    world.look(1);
    assert!(world.nodes[1].retired);
    world.write(0);
    world.weather.partitioned = false;
    world.run(seconds(20));
    assert!(!world.nodes[1].retired);
    world.nodes[1].membership = Membership::Member { rpo_target: None, mode: Mode::Async };
    world.look(1);
    world.run(seconds(5));
    world.assert_streaming();
}
