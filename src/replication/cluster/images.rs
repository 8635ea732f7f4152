//! Logs that are folded, so that a peer that was away is brought up by an image: of these logs, the
//! bytes up to a position.

use super::returns::primary_that_lost_what_its_copy_has;
use super::*;
use crate::group::{ImageOffer, ImageProgress, Place, Reached, Staged};
use crate::units::{Position, VolumeNumber};

/// Bytes of a part.
const PART: usize = 3 * RECORD_BYTES;

/// An image that a primary keeps for its peer: the bytes up to `at`, from `next` on.
#[derive(Clone, Debug)]
pub(super) struct Shipment {
    at: usize,
    next: usize,
}

/// What came of one: `bytes` are those behind `common`, or behind nothing.
#[derive(Clone, Debug)]
pub(super) struct Staging {
    at: Position,
    since: Option<Lsn>,
    common: Lsn,
    old: (Lsn, Chain),
    bytes: Vec<u8>,
}

fn place(offset: usize) -> Place {
    Place { volume: VolumeNumber(1), offset: offset as u64 }
}

impl Node {
    fn position(&self, at: usize) -> Position {
        let last = self.log.reigns.iter().rfind(|reign| reign.first_lsn.0 < at as u64);
        let epoch = last.map(|reign| reign.id).unwrap_or_default();
        Position { epoch, lsn: Lsn(at as u64), time: LogTime(0) }
    }

    pub(super) fn staged(&mut self) -> Option<Staged> {
        let staging = self.staging.as_ref()?;
        if staging.old != (self.log.head(), self.log.chain()) {
            self.staging = None;
            return None;
        }
        let reached = Reached { to: place(staging.bytes.len()), at: staging.at };
        Some(Staged {
            image: staging.at,
            since: staging.since,
            reached: vec![reached],
            done_bytes: staging.bytes.len() as u64,
        })
    }

    fn takes_whole_image(&self) -> bool {
        self.staging.as_ref().is_some_and(|staging| staging.since.is_none())
    }

    /// As the engine does it: what is not part of the primary's history is kept.
    fn switch(&mut self) -> Result<(), String> {
        let staging = self.staging.take().unwrap();
        if self.primary || staging.old != (self.log.head(), self.log.chain()) {
            return Err("it has gone on".to_owned());
        }
        if staging.since.is_none() {
            self.needs = NeedsImage::No;
        }
        let common = staging.common.0 as usize;
        let branch = self.log.cut(common);
        if !branch.is_empty() {
            self.branches.push((common, branch));
        }
        self.log.receive(staging.common, &staging.bytes)?;
        assert_eq!(self.log.head(), staging.at.lsn, "all of it came");
        self.log.start = staging.at.lsn.0;
        self.log.durable = self.log.bytes.len();
        self.switches += 1;
        Ok(())
    }
}

impl World {
    pub(super) fn fold(&mut self, side: usize) {
        let log = &self.nodes[side].log;
        let records = (log.durable / RECORD_BYTES) as u64;
        let to = self.random(records + 1) * RECORD_BYTES as u64;
        if self.nodes[side].up && !self.nodes[side].recovering && to > log.start {
            self.nodes[side].log.start = to;
            self.look(side);
        }
    }

    pub(super) fn perform_image(&mut self, side: usize, output: Output) {
        match output {
            Output::Ship { group, stream, common, since, staged, .. } => {
                let node = &self.nodes[side];
                let ours = |position: Position| {
                    let at = position.lsn.0 as usize;
                    at <= node.log.bytes.len() && node.position(at) == position
                };
                let staged = staged.filter(|staged| staged.since == since && ours(staged.image));
                let again = staged.as_ref().filter(|staged| {
                    staged.image.lsn.0 >= node.log.start
                        && node
                            .shipment
                            .as_ref()
                            .is_some_and(|kept| kept.at == staged.image.lsn.0 as usize)
                });
                let at = again.map_or(node.log.bytes.len(), |staged| staged.image.lsn.0 as usize);
                let done = staged.as_ref().map_or(0, |staged| staged.done_bytes);
                let next = common.0 as usize + done as usize;
                let offer = ImageOffer {
                    position: node.position(at),
                    since,
                    resumed: staged.is_some(),
                    total_bytes: (at - common.0 as usize) as u64,
                    done_bytes: done,
                    common,
                };
                self.nodes[side].shipment = Some(Shipment { at, next });
                self.later(side, Input::Shipped { group, stream, offer: Ok(offer) });
            }
            Output::SendPart { conn, group, stream, number, .. } => {
                let Some(shipment) = &mut self.nodes[side].shipment else {
                    let reason = "closed".to_owned();
                    return self.later(side, Input::PartFailed { group, stream, reason });
                };
                let to = (shipment.next + PART).min(shipment.at);
                let from = std::mem::replace(&mut shipment.next, to);
                let last = from == to;
                let mut payload = vec![u8::from(last)];
                payload.extend_from_slice(&self.nodes[side].log.bytes[from..to]);
                let mut bytes =
                    FrameHeader::image(group, stream, number, payload.len()).encode().to_vec();
                bytes.extend_from_slice(&payload);
                self.transmit(conn, side, bytes);
                self.later(side, Input::PartSent { group, stream, last });
            }
            Output::EndShipment { .. } => self.nodes[side].shipment = None,
            Output::BeginImage { group, stream, offer } => {
                let node = &mut self.nodes[side];
                let head = node.log.head();
                let known = node.staged();
                let ends = node.log.reigns.iter().skip(1).map(|reign| reign.first_lsn);
                let me = node_id(side);
                let authored = node
                    .log
                    .reigns
                    .iter()
                    .zip(ends.chain([head]))
                    .any(|(reign, end)| reign.author == me && end > offer.common);
                if node.primary || (authored && head > offer.common) {
                    let reason = "it was written here".to_owned();
                    let input = Input::StageFailed { group, stream, reason, refused: true };
                    return self.later(side, input);
                }
                assert!(offer.since.is_none_or(|since| since == head), "{offer:?} at {head}");
                let bytes = match (offer.resumed, node.staging.take()) {
                    (true, Some(staging)) => {
                        assert_eq!(known.unwrap().done_bytes, offer.done_bytes);
                        staging.bytes
                    }
                    (resumed, _) => {
                        assert!(!resumed, "there is nothing to go on from");
                        Vec::new()
                    }
                };
                node.staging = Some(Staging {
                    at: offer.position,
                    since: offer.since,
                    common: offer.common,
                    old: (head, node.log.chain()),
                    bytes,
                });
            }
            Output::Stage { group, stream, bytes } => {
                let node = &mut self.nodes[side];
                let Some(staging) = &mut node.staging else {
                    let reason = "nothing is staged".to_owned();
                    let input = Input::StageFailed { group, stream, reason, refused: false };
                    return self.later(side, input);
                };
                staging.bytes.extend_from_slice(&bytes[1..]);
                let done_bytes = staging.bytes.len() as u64;
                let progress = ImageProgress { done_bytes, total_bytes: done_bytes };
                let switched = bytes[0] == 1;
                if switched && let Err(reason) = node.switch() {
                    let input = Input::StageFailed { group, stream, reason, refused: false };
                    return self.later(side, input);
                }
                self.later(side, Input::Staged { group, stream, progress, switched });
                if switched {
                    let local = self.nodes[side].local();
                    self.later(side, Input::Group(Box::new(local)));
                }
            }
            Output::DropStaging { .. } => self.nodes[side].staging = None,
            other => panic!("{other:?} is of no image"),
        }
    }
}

#[test]
fn a_copy_is_always_one_prefix_though_folds_pass_it_and_everything_breaks() {
    let (mut switches, mut resumed, mut away) = (0, 0, 0);
    let all = seeds(60);
    for seed in 0..all {
        let mut world = World::new(seed);
        world.run(seconds(5));
        for _ in 0..30 {
            for _ in 0..world.random(30) {
                world.write(0);
            }
            match world.random(8) {
                0 => {
                    world.stop(1);
                    away += 1;
                }
                1 => world.lose_power(1),
                2 => world.stop(0),
                3 => world.weather.partitioned = true,
                4 => world.weather.cut_one_in = 1 + world.random(20),
                _ => {}
            }
            for _ in 0..world.random(20) {
                world.write(0);
            }
            world.run(Duration::from_millis(world.random(3000)));
            world.fold(0);
            for side in 0..2 {
                if !world.nodes[side].up {
                    resumed += u64::from(world.nodes[side].staging.is_some());
                    world.restart(side);
                }
            }
            world.weather.partitioned &= world.random(3) > 0;
            world.run(Duration::from_millis(world.random(8000)));
            let (primary, copy) = (&world.nodes[0].log, &world.nodes[1].log);
            let there = &copy.bytes;
            let common = there.len().min(primary.bytes.len());
            assert!(there[..common] == primary.bytes[..common], "seed {seed}: no prefix");
            world.nodes[0].log.times = vec![world.now; primary.bytes.len() / RECORD_BYTES];
        }
        world.weather = Weather { delay_most: Duration::from_millis(5), ..Weather::default() };
        for _ in 0..40 {
            if world.state(0).0 != ReplicationState::Streaming {
                world.run(seconds(20));
            }
        }
        world.run(seconds(10));
        world.assert_streaming();
        assert!(world.nodes[0].shipment.is_none(), "seed {seed}: no image is kept");
        assert!(world.nodes[1].staging.is_none(), "seed {seed}: nothing stays staged");
        switches += world.nodes[1].switches;
    }
    let enough = u64::from(switches) > all && away > all && resumed > all / 12;
    assert!(enough, "{switches}, {resumed}, {away}");
}

/// A primary that has folded its log, and a copy that has nothing of it yet.
fn folded(records: usize) -> World {
    let mut world = World::new(3);
    world.weather.partitioned = true;
    for _ in 0..records {
        world.write(0);
    }
    world.run(seconds(3));
    while world.nodes[0].log.start == 0 {
        world.fold(0);
    }
    world.weather.partitioned = false;
    world
}

#[test]
fn a_conversation_of_an_image_cut_after_any_byte_goes_on_after_it() {
    let mut whole = folded(12);
    whole.run(seconds(10));
    whole.assert_streaming();
    for towards in 0..2 {
        for cut in 0..whole.conversation[towards] {
            let mut world = folded(12);
            world.cut_next = Some((towards, cut));
            world.run(seconds(15));
            world.assert_streaming();
            assert_eq!(world.nodes[1].switches, 1, "{towards}, {cut}");
        }
    }
}

#[test]
fn a_new_copy_of_a_folded_log_begins_with_an_image() {
    let mut world = folded(200);
    let mut seen = [false; 2];
    for _ in 0..20_000 {
        world.run(Duration::from_millis(1));
        let states = [world.state(0).0, world.state(1).0];
        seen[0] |= states[0] == ReplicationState::ResyncSource;
        seen[1] |= states[1] == ReplicationState::ResyncTarget;
        if let Some((lsn, progress)) = world.nodes[0].core.channel(GROUP).unwrap().resync() {
            assert!(progress.done_bytes <= progress.total_bytes && lsn.0 > 0);
        }
    }
    assert_eq!(seen, [true; 2], "both sides say so");
    assert_eq!(world.nodes[1].switches, 1);
    world.assert_streaming();
}

#[test]
fn a_copy_that_holds_no_moment_is_sent_all_of_an_image_whether_or_not_the_log_reaches_it() {
    for reached in [true, false] {
        let mut world = World::new(9);
        for _ in 0..50 {
            world.write(0);
        }
        world.run(seconds(3));
        world.assert_streaming();
        world.stop(1);
        world.nodes[1].needs = NeedsImage::Whole;
        for _ in 0..50 {
            world.write(0);
        }
        world.run(seconds(3));
        while !reached && world.nodes[0].log.start <= world.nodes[1].log.head().0 {
            world.fold(0);
        }
        world.restart(1);
        world.run(seconds(20));
        let node = &world.nodes[1];
        assert_eq!((node.needs, node.switches), (NeedsImage::No, 1), "reached: {reached}");
        assert!(node.branches.is_empty(), "what it had is part of the history");
        world.assert_streaming();
    }
}

/// Whole images would take from it what the branch lies above.
#[test]
fn a_received_tail_is_kept_and_no_whole_image_sent_where_the_primarys_log_has_gone_past_it() {
    let (mut world, received) = primary_that_lost_what_its_copy_has();
    for _ in 0..10 {
        world.write(0);
    }
    world.run(seconds(3));
    world.nodes[0].log.start = 8 * RECORD_BYTES as u64;
    world.look(0);
    world.restart(1);
    for _ in 0..30_000 {
        world.run(Duration::from_millis(1));
        assert!(!world.nodes[1].takes_whole_image());
    }
    world.assert_streaming();
    assert_eq!(world.nodes[1].switches, 1);
    assert_eq!(world.nodes[1].branches, [(128, received[128..].to_vec())]);
    assert!(world.nodes[1].events.contains(&"yielded"));
}

#[test]
fn a_peer_that_the_log_passes_after_each_image_is_told_and_comes_back_when_it_can_keep_up() {
    let mut world = World::new(5);
    let pass = |world: &mut World| {
        for _ in 0..4 {
            world.write(0);
        }
        world.nodes[0].log.start = world.nodes[0].log.bytes.len() as u64;
        world.look(0);
    };
    world.write(0);
    world.run(seconds(3));
    world.weather.partitioned = true;
    world.write(0);
    pass(&mut world);
    world.run(seconds(1));
    world.weather.partitioned = false;
    let mut switches = world.nodes[1].switches;
    let told = (0..200_000).any(|_| {
        world.run(Duration::from_millis(1));
        if world.nodes[1].switches > switches {
            switches = world.nodes[1].switches;
            pass(&mut world);
        }
        world.nodes[0].events.contains(&"cannot-keep-up")
    });
    assert!(told && switches > 2, "{switches} images");
    world.run(seconds(2));
    let (state, reason) = world.state(1);
    assert_eq!(state, ReplicationState::Blocked);
    assert!(reason.contains("cannot-keep-up"), "{reason}");
    let (primary, copy) = (&world.nodes[0].log.bytes, &world.nodes[1].log.bytes);
    assert!(!copy.is_empty() && copy[..] == primary[..copy.len()], "its last image stays");
    let kept = world.nodes[1].switches;
    world.run(seconds(5));
    assert_eq!(world.nodes[1].switches, kept, "it rests");
    world.run(seconds(60));
    world.assert_streaming();
}

/// The simulation's seed 3000135 of an earlier state: a copy that was taking an image when its
/// primary stepped down waited for ever for the rest of that one.
#[test]
fn an_image_that_ended_in_the_middle_holds_up_no_other() {
    let mut world = World::new(7);
    world.weather.partitioned = true;
    for _ in 0..200 {
        world.write(0);
    }
    world.run(seconds(3));
    while world.nodes[0].log.start == 0 {
        world.fold(0);
    }
    world.weather.partitioned = false;
    let comes = (0..200_000).any(|_| {
        world.run(Duration::from_micros(100));
        world.state(1).0 == ReplicationState::ResyncTarget
    });
    assert!(comes && world.nodes[1].switches == 0, "in the middle of an image");
    world.demote(0);
    world.run(seconds(2));
    assert!(world.nodes[1].core.channel(GROUP).unwrap().resync().is_none(), "none comes");
    world.promote(0);
    world.run(seconds(20));
    world.assert_streaming();
}
