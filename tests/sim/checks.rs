//! What holds at every moment, and is looked at as the world goes on.

use std::time::Duration;

use tidelog::group::View;
use tidelog::replication::ReplicationState;
use tidelog::units::{EpochId, Lsn};

use super::node::{Moment, contents};
use super::oracle::Place;
use super::world::{BothServe, World};

impl World {
    /// What holds of a group's positions at every moment.
    pub fn check_positions(&mut self, node: usize, group: usize) {
        let copy = &self.nodes[node].copies[&group];
        let at = copy.group.positions();
        let name = &self.nodes[node].name;
        assert!(at.durable <= at.head, "{name}: durable beyond the head: {at:?}");
        assert!(at.committed <= at.head, "{name}: committed beyond the head: {at:?}");
        assert!(at.horizon <= at.durable, "{name}: folded what is not durable: {at:?}");
        if at.head > Lsn::ZERO {
            let chains = &mut self.groups[group].chains;
            let known = *chains.entry((at.epoch, at.head)).or_insert(at.chain);
            assert_eq!(known, at.chain, "{name}: other bytes up to {} than elsewhere", at.head);
        }
        self.check_stays(node, group);
    }

    /// Two members that serve a group and hear each other know it, whatever else goes on between
    /// them: twenty seconds later both say that it is a split brain.
    pub fn check_who_serves(&mut self, node: usize, group: usize) {
        for peer in self.groups[group].members.clone() {
            if peer <= node {
                continue;
            }
            let sides = [(node, peer), (peer, node)];
            let serves = |(side, other): (usize, usize)| {
                let this = &self.nodes[side];
                let asks = || self.asked_by(side, group).contains(&other);
                let hangs = this.hung_until > self.now();
                !hangs && this.serves(group) && self.hears(side, other) && asks()
            };
            let key = (node, peer, group);
            let reigns = sides.map(|(side, _)| {
                let this = &self.nodes[side];
                (this.life, this.copies.get(&group).map(|copy| copy.group.positions().epoch))
            });
            if !sides.into_iter().all(serves) {
                self.both_serve.remove(&key);
                continue;
            }
            let now = self.now();
            let known = self.both_serve.entry(key).or_insert(BothServe { reigns, since: now });
            if known.reigns != reigns {
                *known = BothServe { reigns, since: now };
            }
            if now - known.since < 20_000_000_000 {
                continue;
            }
            for (side, other) in sides {
                let core = &self.nodes[side].links[&other].core;
                let state = core.channel(self.groups[group].id).map(|channel| channel.state());
                let told = state.as_ref().is_some_and(|it| it.0 == ReplicationState::SplitBrain);
                let (name, other) = (&self.nodes[side].name, &self.nodes[other].name);
                assert!(told, "{name}: group {group}: {other} serves too: {state:?}");
            }
            self.coverage.add("two that serve know it", 1);
        }
    }

    /// What a fold left behind lies within no window that is to be kept. Log time may run at twice
    /// the speed of the world's, and be ahead of it by a second for each of some restarts.
    pub fn check_kept_window(&mut self, node: usize, group: usize) {
        let this = &self.groups[group];
        let Some(window) = this.kept_window else { return };
        let at = self.nodes[node].copies[&group].group.positions();
        let folded =
            |(epoch, lsn, _): &&(EpochId, Lsn, u64)| *epoch == at.epoch && *lsn <= at.horizon;
        if let Some((_, lsn, appended)) = this.appended.iter().rev().find(folded) {
            let age = Duration::from_nanos(self.now() - appended);
            let name = &self.nodes[node].name;
            assert!(
                age + Duration::from_secs(3) >= window / 2,
                "{name}: group {group}: the request that ends at {lsn} is folded {age:?} after it \
                 was appended, within the window that is to be kept: {window:?}"
            );
            self.coverage.add("folds where the window is kept", 1);
        }
    }

    /// Every image that is open shows what it showed first, or says that it is broken.
    pub fn check_images(&mut self, node: usize, group: usize) {
        let powered = self.nodes[node].disk.has_power();
        let name = self.nodes[node].name.clone();
        let Some(copy) = self.nodes[node].copies.get_mut(&group) else { return };
        if !powered || copy.half_cut {
            return;
        }
        let before = copy.images.len();
        copy.images.retain(|open| open.image.broken().is_none());
        let broken = before - copy.images.len();
        let half_folded = copy.fold_failed;
        for open in &copy.images {
            let bytes = match contents(&*open.image as &dyn View) {
                Err(error) if half_folded && error.contains("damaged: base of") => continue,
                bytes => bytes.expect("an image that is not broken"),
            };
            let held = self.groups[group].oracle.read(&bytes).expect("an image");
            let differ = (0..held.len()).find(|at| held[*at] != open.held[*at]);
            assert!(
                differ.is_none(),
                "{}: group {group}: image {} at {:?} changed: {:?}: {:?} instead of {:?}",
                name,
                open.image.name(),
                open.image.position().lsn,
                differ,
                differ.map(|at| held[at]),
                differ.map(|at| open.held[at])
            );
        }
        self.coverage.add("images broken", broken as u64);
    }

    /// Reads the image of a group on a node, and remembers what is in its cache.
    pub fn note_sure(&mut self, node: usize, group: usize) {
        let Some(copy) = self.nodes[node].copies.get(&group) else { return };
        let must = copy.sure.clone();
        let places = self.verify(node, group, &must);
        if !places.is_empty() {
            self.nodes[node].copies.get_mut(&group).expect("it was read").sure = places;
        }
    }

    /// The image of a group on a node is one prefix, and holds what it must: where it may be, or
    /// nothing where it cannot be read now.
    pub fn verify(&mut self, node: usize, group: usize, must: &[Place]) -> Vec<Place> {
        let name = &self.nodes[node].name;
        let Some(found) = self.nodes[node].group(group) else { return Vec::new() };
        // It dies at the end of this step.
        if !self.nodes[node].disk.has_power() || self.nodes[node].copies[&group].half_cut {
            return Vec::new();
        }
        let at = found.positions();
        let operations = self.nodes[node].disk.operations();
        let moment = Moment { operations, head: at.head, chain: at.chain };
        let read = match self.nodes[node].copies[&group].seen {
            Some((seen, held)) if seen == moment => Ok(held),
            _ => contents(&**found as &dyn View).map(|bytes| {
                let oracle = &self.groups[group].oracle;
                oracle.read(&bytes).unwrap_or_else(|why| panic!("{name}: {why}"))
            }),
        };
        let held = match read {
            Ok(held) => held,
            // A fold that failed half-way leaves blocks that only its end makes whole.
            Err(error)
                if self.nodes[node].copies[&group].fold_failed
                    && error.contains("damaged: base of") =>
            {
                self.coverage.add("blocks half folded", 1);
                return Vec::new();
            }
            Err(error) => panic!("{name}: group {group}: {error}"),
        };
        self.coverage.add("images read", 1);
        let copy = self.nodes[node].copies.get_mut(&group).expect("it was read");
        copy.seen = Some((moment, held));
        let oracle = &self.groups[group].oracle;
        let name = &self.nodes[node].name;
        let places = oracle.places(&held).unwrap_or_else(|why| panic!("{name}: {why}"));
        let holding = oracle.holding(places, must);
        assert!(
            !holding.is_empty(),
            "{name}: group {group}: the image is at one of {places:?}, and must hold {must:?}"
        );
        holding
    }
}
