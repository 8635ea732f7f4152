//! Bits that turn at rest while a node lives: a scrub tells of them, and repair takes what is
//! missing from a peer that has it, proved by the sums here. Whoever gives is not changed, and who
//! is damaged itself gives none of it away.

use std::collections::BTreeMap;

use tidelog::group::{DamagedPart, Found, Group};
use tidelog::log::record::{Header, Kind};
use tidelog::replication::simulation::{mend_base, mend_log};

use super::damage::Turned;
use super::node::contents;
use super::oracle::VOLUMES;
use super::world::World;

/// All that a node has of a group: the log but for what stands in its pads, which mean nothing and
/// have no checksum, and what the volumes show.
#[derive(PartialEq, Eq)]
struct Whole {
    log: Vec<u8>,
    volumes: [Vec<u8>; VOLUMES],
}

fn whole(group: &Group) -> Option<Whole> {
    let (from, to) = (group.log_start(), group.positions().head);
    let mut log = vec![0; to.bytes_since(from.min(to)) as usize];
    group.read_log(from.min(to), &mut log).ok()?;
    clear_pads(&mut log);
    Some(Whole { log, volumes: contents(group).ok()? })
}

fn clear_pads(log: &mut [u8]) {
    let mut rest = log;
    while let Ok(header) = Header::decode(rest) {
        let (record, behind) = rest.split_at_mut(header.record_bytes() as usize);
        if header.known_kind() == Some(Kind::Pad) {
            record[header.header_bytes() as usize..].fill(0);
        }
        rest = behind;
    }
}

/// The parts that a scrub reads, in its order.
fn parts(group: &Group) -> Vec<DamagedPart> {
    let (segment, head) = (group.segment_bytes(), group.positions().head);
    let first = group.log_start().segment_number(segment);
    let log = (first..=head.segment_number(segment)).map(|segment| DamagedPart::Log { segment });
    let base = group.base_chunks().into_iter().flat_map(|(volume, chunks)| {
        (0..chunks).map(move |chunk| DamagedPart::Base { volume, chunk })
    });
    let kept = group.kept_moments().into_iter().map(|(moment, _)| DamagedPart::Kept { moment });
    log.chain(base).chain(kept).collect()
}

fn damaged(group: &Group) -> Vec<(DamagedPart, String)> {
    let found = parts(group).into_iter().map(|part| (part, group.check_part(&part)));
    found
        .filter_map(|(part, found)| match found {
            Found::Damaged(what) => Some((part, what)),
            _ => None,
        })
        .collect()
}

/// Why a peer cannot make a part right, where nothing is wrong with the repair itself.
fn has_it(group: &Group, peer: &Group, part: &DamagedPart) -> bool {
    match part {
        DamagedPart::Log { segment } => {
            let gap = group.gap(*segment).ok().flatten();
            gap.is_some_and(|gap| {
                peer.log_start() <= gap.at
                    && peer.chain_at(gap.at) == Some(gap.chain)
                    && peer.positions().head >= group.positions().head
                    && peer.positions().epoch == group.positions().epoch
            })
        }
        // It must be able to show what was there where the base is.
        DamagedPart::Base { .. } => {
            let at = group.positions().horizon;
            let same = peer.chain_at(at).is_some() && peer.chain_at(at) == group.chain_at(at);
            same && peer.positions().horizon <= at
        }
        DamagedPart::Kept { .. } => false,
    }
}

fn mend(group: &Group, part: &DamagedPart, peer: Option<&Group>) -> Result<(), String> {
    match (*part, peer) {
        (DamagedPart::Log { segment }, Some(peer)) => mend_log(group, segment, |gap, bytes| {
            peer.records_for(gap, bytes).map_err(|error| error.to_string())
        }),
        (DamagedPart::Base { volume, chunk }, _) => mend_base(group, volume, chunk, |wanted| {
            let Some(peer) = peer else { return Ok(BTreeMap::new()) };
            peer.blocks_for(volume, &wanted).map_err(|error| error.to_string())
        }),
        _ => Err("nobody has it".to_owned()),
    }
}

impl World {
    /// A bit turns on the disk of a running node, and it is scrubbed.
    pub fn damage_alive(&mut self, node: usize, group: usize) {
        let this = &self.nodes[node];
        let Some(found) = this.group(group).cloned() else { return };
        let copy = &this.copies[&group];
        // The disk has other troubles, or a fold is to be finished first.
        let busy = this.death.is_some() || this.hung_until > self.now();
        if this.disk_troubled || busy || copy.fold_failed || copy.half_cut {
            return;
        }
        if found.sync_now().is_err() || !self.nodes[node].disk.has_power() {
            return;
        }
        let Some(before) = whole(&found) else { return };
        assert_eq!(damaged(&found), [], "{}: nothing is damaged yet", self.nodes[node].name);
        let disk = self.nodes[node].disk.clone();
        let Some(turned) = self.turn_a_bit(&disk, group) else { return };
        // On the way of who would give it, too.
        let members = self.groups[group].members.iter().copied();
        let givers: Vec<usize> = members
            .filter(|peer| *peer != node && self.nodes[*peer].up && self.hears(node, *peer))
            .filter(|peer| self.nodes[*peer].copies.contains_key(&group))
            .filter(|peer| {
                let peer = &self.nodes[*peer];
                !peer.disk_troubled && peer.death.is_none() && peer.hung_until <= self.now()
            })
            .collect();
        let both = self.chance.one_in(4).then(|| givers.first().copied()).flatten();
        if let Some(peer) = both {
            self.turn_too(peer, &turned);
        }
        let name = self.nodes[node].name.clone();
        self.say(format_args!("{name}, alive: {turned}; {givers:?} may have it, not {both:?}"));
        self.scrub(node, group, &turned, &before, &givers, both);
        if let Some(peer) = both {
            self.turn_too(peer, &turned);
        }
    }

    /// Turns the same bit of the same file on another node; again, and it is as it was.
    fn turn_too(&mut self, node: usize, turned: &Turned) {
        let disk = &self.nodes[node].disk;
        if tidelog::io::Disk::exists(disk, &turned.path).expect("a whole disk") {
            disk.damage(&turned.path, turned.offset, 1, turned.mask);
        }
    }

    fn scrub(
        &mut self,
        node: usize,
        group: usize,
        turned: &Turned,
        before: &Whole,
        givers: &[usize],
        both: Option<usize>,
    ) {
        let name = self.nodes[node].name.clone();
        let found = self.nodes[node].group(group).expect("it runs").clone();
        let at = found.positions();
        let in_log = turned.lsn.is_some_and(|lsn| (found.log_start()..at.head).contains(&lsn));
        // What is damaged is an error to who reads it, and never other data.
        if let Ok(shown) = contents(&*found) {
            assert!(shown == before.volumes, "{name}: group {group}: {turned}: shows other data");
        }
        let told = damaged(&found);
        self.say(format_args!("{name} scrubs: {told:?}"));
        // What an image is being merged into cannot be told before that ends.
        let unknown = |part: &DamagedPart| matches!(found.check_part(part), Found::Unknown);
        if told.is_empty() && parts(&found).iter().any(unknown) {
            self.nodes[node].disk.damage(&turned.path, turned.offset, 1, turned.mask);
            return;
        }
        assert!(
            !told.is_empty() || !in_log && whole(&found).as_ref() == Some(before),
            "{name}: group {group}: {turned}: a scrub finds nothing"
        );
        if told.is_empty() {
            // What a scrub has no part in, such as the control state, a next start could miss.
            self.nodes[node].disk.damage(&turned.path, turned.offset, 1, turned.mask);
            return self.coverage.add("live damage without effect", 1);
        }
        self.coverage.add("live damage told", told.len() as u64);
        for (part, what) in told {
            let mut well = false;
            if matches!(part, DamagedPart::Base { .. }) {
                let _ = mend(&found, &part, None);
                well = matches!(found.check_part(&part), Found::Whole(_));
                self.coverage.add("live damage mended alone", u64::from(well));
            }
            let mut reasons = Vec::new();
            for peer in givers.iter().copied() {
                if well {
                    break;
                }
                let giver = self.nodes[peer].group(group).expect("it runs").clone();
                let must = has_it(&found, &giver, &part) && both.is_none();
                let theirs = whole(&giver);
                let mended = mend(&found, &part, Some(&giver));
                well = matches!(found.check_part(&part), Found::Whole(_));
                if mended.is_err() || !well {
                    reasons.push(format!("{}: {mended:?}", self.nodes[peer].name));
                }
                let other = &self.nodes[peer].name;
                assert!(
                    well || !must,
                    "{name}: group {group}: {what}: {other} has it, and it is not repaired: \
                     {mended:?}"
                );
                assert!(
                    theirs == whole(&giver),
                    "{name}: group {group}: {what}: {other} gave it, and is changed"
                );
                self.coverage.add("live damage repaired from a peer", u64::from(well));
            }
            if !well {
                self.coverage.add("live damage not repaired", 1);
                self.say(format_args!("{name}: {part} is not repaired: {reasons:?}"));
                // As an operator who has the bytes elsewhere.
                let disk = &self.nodes[node].disk;
                disk.damage(&turned.path, turned.offset, 1, turned.mask);
            }
        }
        let left = damaged(&found);
        assert!(left.is_empty(), "{name}: group {group}: {turned}: damaged after all: {left:?}");
        let after = whole(&found);
        assert!(
            after.as_ref() == Some(before),
            "{name}: group {group}: {turned}: repair has made something else of it"
        );
        assert_eq!(found.positions().chain, at.chain, "{name}: group {group}: {turned}");
    }
}
