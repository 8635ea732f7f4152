//! What each side of the simulated cluster says of how far a copy is behind, and what `promote`
//! says by it, where the other is gone.

use super::*;
use crate::replication::channel::{Gap, Moment};
use crate::replication::commands::refusal_to_promote;
use crate::replication::heads::{Look, keep};
use crate::replication::status::{Lag, LagState};

/// What status says of the copy on the secondary: its lag, what that is worth, and why.
fn lag(world: &World, side: usize) -> (Lag, LagState, String) {
    let status = world.nodes[side].core.status(world.now, GROUP).unwrap();
    (status.lag, status.lag_state, status.lag_state_reason.unwrap_or_default())
}

fn gap(world: &World, side: usize) -> Gap {
    world.nodes[side].core.channel(GROUP).unwrap().gap().unwrap()
}

fn refusal(world: &World, side: usize) -> Option<String> {
    let core = &world.nodes[side].core;
    refusal_to_promote(
        std::iter::once(core),
        GROUP,
        world.now,
        LogTime(world.now.as_nanos() as u64),
    )
}

fn pause(world: &mut World, side: usize, paused: bool) {
    world.feed(side, Input::Pause { group: GROUP, paused });
    world.run(seconds(1));
}

/// A primary's word on its own head was heard only where no stream ran: what was behind the bytes
/// on their way was forgotten with the primary, and `promote` left it out without a word.
#[test]
fn a_copy_that_catches_up_slowly_knows_what_its_lost_primary_had_more() {
    let mut world = World::new(21);
    world.run(seconds(3));
    world.assert_streaming();
    for _ in 0..1000 {
        world.write(0);
    }
    // A window of 64 records takes about a second to go through.
    world.weather.delay_most = Duration::from_millis(900);
    world.run(seconds(5));
    assert_eq!(world.state(1).0, ReplicationState::CatchingUp, "{:?}", world.state(1));
    world.weather.partitioned = true;
    world.run(seconds(30));
    let [theirs, mine] = [0, 1].map(|side| world.nodes[side].log.head());
    let lacks = theirs.bytes_since(mine);
    assert!(lacks > 2 * 4096, "{lacks}");
    let gap = gap(&world, 1);
    assert_eq!((gap.bytes, gap.requests), (lacks, Some(lacks / 64)));
    let (shown, worth, _) = lag(&world, 1);
    assert_eq!((shown.bytes, worth), (Some(lacks), LagState::AtLeast));
    let said = refusal(&world, 1).expect("a has more");
    assert!(said.contains("this node lacks at least") && said.contains("bring a back"), "{said}");
}

#[test]
fn a_primary_that_was_idle_for_a_night_was_heard_until_it_went() {
    let mut world = World::new(22);
    world.write(0);
    world.run(seconds(8 * 3600));
    world.assert_streaming();
    let gone = world.now;
    world.stop(0);
    world.run(seconds(60));
    let gap = gap(&world, 1);
    assert_eq!((gap.bytes, gap.requests), (0, Some(0)));
    let Some(Moment::Now(at)) = gap.at else { panic!("{gap:?}") };
    assert!(at <= gone && gone - at < seconds(2), "{at:?} of {gone:?}");
}

/// It said `12 GiB behind`, and that exactly.
#[test]
fn a_primary_that_was_restarted_does_not_know_what_a_copy_has_that_has_not_asked_since() {
    let mut world = World::new(23);
    for _ in 0..100 {
        world.write(0);
    }
    world.run(seconds(3));
    world.assert_streaming();
    let unknown = |world: &World, why: &str| {
        let (lag, worth, reason) = lag(world, 0);
        assert_eq!((lag.bytes, lag.operations, worth), (None, None, LagState::Unknown), "{reason}");
        assert!(reason.contains(why), "{reason}");
        let status = world.nodes[0].core.status(world.now, GROUP).unwrap();
        assert_eq!(status.behind_bytes, None);
    };
    let exact = |world: &World, bytes| {
        let (lag, worth, reason) = lag(world, 0);
        assert_eq!((lag.bytes, worth), (Some(bytes), LagState::Exact), "{reason}");
    };
    exact(&world, 0);
    world.stop(1);
    world.stop(0);
    world.restart(0);
    world.serve(0);
    world.run(seconds(3));
    unknown(&world, "b has not been heard since this node started");
    // It comes, and asks for nothing.
    world.restart(1);
    world.feed(1, Input::Pause { group: GROUP, paused: true });
    world.run(seconds(5));
    unknown(&world, "b has not asked this node for the log yet");
    pause(&mut world, 1, false);
    world.run(seconds(3));
    exact(&world, 0);
    // What it said in this life of the process is known while it is away, too.
    world.stop(1);
    world.write(0);
    world.run(seconds(10));
    exact(&world, 64);
}

#[test]
fn a_copy_that_has_nothing_lacks_exactly_all() {
    let mut world = World::new(24);
    world.write(0);
    world.feed(1, Input::Pause { group: GROUP, paused: true });
    world.run(seconds(3));
    let (lag, worth, _) = lag(&world, 0);
    assert_eq!((lag.bytes, worth), (Some(128), LagState::Exact));
}

fn set_membership(world: &mut World, side: usize, membership: Membership) {
    world.nodes[side].membership = membership;
    world.look(side);
    world.run(seconds(1));
}

/// It was `exact` with `0 B behind` for good, while the primary wrote on.
#[test]
fn a_copy_whose_replication_was_stopped_does_not_say_that_it_has_all() {
    let mut world = World::new(25);
    world.run(seconds(3));
    world.assert_streaming();
    // The record that ends it comes by the stream.
    let now = world.now;
    world.nodes[0].log.append(now, None);
    set_membership(&mut world, 0, Membership::Stranger);
    set_membership(&mut world, 1, Membership::Stopped);
    for _ in 0..10 {
        world.write(0);
    }
    world.run(seconds(10));
    assert!(world.nodes[0].log.head() > world.nodes[1].log.head());
    let (lag, worth, why) = lag(&world, 1);
    assert_eq!((lag.bytes, worth, &*why), (Some(0), LagState::AtLeast, "replication was stopped"));
    assert_eq!(refusal(&world, 1), None, "nothing is known to be lacking");
}

/// It recommended to bring a primary back that was there.
#[test]
fn a_copy_that_was_stopped_while_it_was_behind_says_so() {
    let mut world = World::new(26);
    world.run(seconds(3));
    pause(&mut world, 0, true);
    for _ in 0..10 {
        world.write(0);
    }
    world.run(seconds(3));
    set_membership(&mut world, 0, Membership::Stranger);
    assert!(world.nodes[1].retired);
    let (lag, worth, why) = lag(&world, 1);
    let lacks = (Some(640), LagState::AtLeast, "replication was stopped");
    assert_eq!((lag.bytes, worth, &*why), lacks);
    let said = refusal(&world, 1).expect("a has more");
    assert!(said.contains("replication was stopped; `tidelog replicate g --to`"), "{said}");
    assert!(!said.contains("bring a back"), "{said}");
}

/// Refused while the copy that has more was there, `promote` went on once that was gone.
#[test]
fn what_another_copy_had_more_is_known_once_it_is_gone() {
    let mut world = World::new(27);
    world.run(seconds(3));
    world.weather.partitioned = true;
    for _ in 0..10 {
        world.write(0);
    }
    world.run(seconds(10));
    world.demote(0);
    world.weather.partitioned = false;
    world.run(seconds(15));
    let said = refusal(&world, 1).expect("a has more");
    assert!(said.contains("a has 640 B that this node lacks"), "{said}");
    let kept = |world: &World, look| {
        let channel = world.nodes[1].core.channel(GROUP).unwrap();
        keep((GROUP, node_id(0)), channel, look, None, |_| LogTime(1)).is_some()
    };
    // What it says each second is written when it ends.
    assert!(!kept(&world, Look::Again) && kept(&world, Look::Last));
    world.stop(0);
    world.run(seconds(10));
    let said = refusal(&world, 1).expect("a had more");
    assert!(said.contains("lacks at least 640 B that a had when it was last heard"), "{said}");
    assert!(kept(&world, Look::Again));
}
