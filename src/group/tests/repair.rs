//! What is taken from a peer, what is not, and what a peer is given.

use std::collections::BTreeMap;

use super::returning::join;
use super::scrub::{base_file, damaged, layered, turn};
use super::*;
use crate::log::reader::Scanner;
use crate::log::segment::segment_name;

/// A primary with something in log and base, and its copy.
pub(super) struct Pair {
    pub a: Bench,
    pub b: Bench,
    pub primary: Arc<Group>,
    pub copy: Arc<Group>,
    pub volume: Volume,
}

impl Pair {
    /// Both have the same bytes: the copy's disk is a copy of the primary's.
    pub fn new(seed: u64) -> Pair {
        let a = Bench::new("a", seed);
        let (primary, volume) = layered(&a);
        Pair::of(a, primary, volume)
    }

    fn of(a: Bench, primary: Arc<Group>, volume: Volume) -> Pair {
        let b = Bench { disk: Arc::new(a.disk.crash(1)), ..a.after_crash(0) };
        let (copy, _) = b.open();
        Pair { a, b, primary, copy, volume }
    }

    fn bytes(group: &Group) -> Vec<u8> {
        let (from, to) = (group.log_start(), group.positions().durable);
        let mut bytes = vec![0; to.bytes_since(from) as usize];
        group.read_log(from, &mut bytes).unwrap();
        bytes
    }

    fn turn_log(bench: &Bench, at: Lsn) {
        let file = dir().join("log").join(segment_name(at.segment_number(SEGMENT)));
        turn(bench, &file, at.segment_offset(SEGMENT));
    }

    /// Repairs the copy's log from the primary; whether all of it is whole then.
    fn repair_log(&self) -> bool {
        for (part, _) in damaged(&self.copy) {
            let DamagedPart::Log { segment } = part else { continue };
            while let Some(gap) = self.copy.gap(segment).unwrap() {
                let records = self.primary.records_for(gap, 1 << 20).unwrap();
                if self.copy.mend_log(gap, &records).unwrap() == Mended::Short {
                    return false;
                }
            }
        }
        damaged(&self.copy).is_empty()
    }

    /// The same for the base.
    pub fn repair_base(&self) -> bool {
        let number = self.volume.number;
        for (part, _) in damaged(&self.copy) {
            let DamagedPart::Base { chunk, .. } = part else { continue };
            let mut blocks = BTreeMap::new();
            for wanted in self.copy.wanted_blocks(number, chunk) {
                blocks.extend(self.primary.blocks_for(number, &wanted).unwrap());
            }
            self.copy.mend_base(number, chunk, &blocks).unwrap();
        }
        damaged(&self.copy).is_empty()
    }
}

#[test]
fn records_are_taken_from_a_peer_wherever_the_log_is_damaged() {
    let pair = Pair::new(1);
    let whole = Pair::bytes(&pair.copy);
    // The copy has begun a reign of its own behind that.
    assert!(whole.starts_with(&Pair::bytes(&pair.primary)));
    let (from, to) = (pair.copy.log_start(), pair.primary.positions().durable);
    let mut repaired = 0;
    // The header of the very first record, which is folded, is all that tells what it continues.
    let first = 200;
    for place in (first..to.bytes_since(from)).step_by(331) {
        Pair::turn_log(&pair.b, from.advance(place));
        let other = (place * 7) % to.bytes_since(from);
        Pair::turn_log(&pair.b, from.advance(other.max(first)));
        repaired += usize::from(!damaged(&pair.copy).is_empty());
        assert!(pair.repair_log(), "place {place}: {:?}", damaged(&pair.copy));
    }
    assert!(repaired > 200, "{repaired} were damaged");
    let again = Pair::bytes(&pair.copy);
    let chain = pair.copy.chain_at(from).unwrap();
    let mut scanner = Scanner::new(&pair.copy.segments, from, chain);
    while scanner.at() < to {
        // What follows the header of a pad, or fills up to eight bytes, means nothing.
        let header = scanner.next(true).unwrap();
        let begin = header.lsn.bytes_since(from) as usize;
        let end = begin + header.header_bytes() as usize + header.payload_bytes as usize;
        assert!(whole[begin..end] == again[begin..end], "the record at {}", header.lsn);
    }
    let expected = read(&*pair.primary, pair.volume.number, 0, 3 << 20);
    assert!(read(&*pair.copy, pair.volume.number, 0, 3 << 20) == expected);
}

#[test]
fn records_that_do_not_join_what_is_whole_here_are_not_taken() {
    let pair = Pair::new(2);
    let head = pair.copy.positions().head;
    let at = Lsn(head.0 - 9000);
    Pair::turn_log(&pair.b, at);
    let segment = at.segment_number(SEGMENT);
    let gap = pair.copy.gap(segment).unwrap().expect("it is damaged");
    let records = pair.primary.records_for(gap, 1 << 20).unwrap();
    let before = pair.b.disk.operations();
    let refused = |gap: Gap, bytes: &[u8]| {
        assert_eq!(pair.copy.mend_log(gap, bytes).unwrap(), Mended::Short);
    };
    refused(gap, &[]);
    refused(gap, &records[..100]);
    refused(Gap { chain: Chain(gap.chain.0 ^ 1), ..gap }, &records);
    for place in [0, 50, 90, 200, 3000] {
        let mut wrong = records.clone();
        wrong[place] ^= 1;
        refused(gap, &wrong);
    }
    // A record of its own right, with a whole checksum, that is not the one which stood here.
    let mut header = crate::log::record::Header::decode(&records).unwrap();
    header.time = LogTime(header.time.0 + 1);
    let (end, payload) = (header.record_bytes() as usize, header.header_bytes() as usize);
    let mut forged = Vec::new();
    header.encode(&mut forged);
    forged.extend_from_slice(&records[payload..end]);
    refused(gap, &forged);
    assert_eq!(pair.b.disk.operations(), before, "nothing was written");
    assert!(pair.repair_log());
}

#[test]
fn a_block_that_a_fold_took_damaged_from_the_log_is_taken_from_a_peer() {
    let Pair { a, primary, copy, volume, .. } = Pair::new(12);
    let (number, head) = (volume.number, primary.positions().head);
    // Not in the page of the end, which the writer writes anew.
    Pair::turn_log(&a, Lsn(head.0 - 6000));
    a.pass(4000);
    primary.sync_now().unwrap();
    assert_eq!(primary.fold_now().unwrap(), head);
    let is_error = |block: &u64| try_read(&*primary, number, block * 4096, 4096).is_err();
    let errors: Vec<u64> = (0..(3 << 20) / 4096).filter(is_error).collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
    let mut blocks = BTreeMap::new();
    for wanted in primary.wanted_blocks(number, 0) {
        blocks.extend(copy.blocks_for(number, &wanted).unwrap());
    }
    assert!(primary.mend_base(number, 0, &blocks).unwrap());
    let expected = read(&*copy, number, 0, 3 << 20);
    assert!(read(&*primary, number, 0, 3 << 20) == expected);
}

#[test]
fn a_part_of_a_block_that_rotted_before_a_fold_is_taken_from_a_peer_and_then_folded() {
    let a = Bench::new("a", 14);
    let (primary, volume) = layered(&a);
    let number = volume.number;
    join(&primary, 7);
    let end = write(&primary, number, 3 * 4096 + 512, &[7; 1024]);
    write(&primary, number, 100 * 4096, &[8; 8192]);
    primary.sync_now().unwrap();
    let Pair { a, primary, copy, .. } = Pair::of(a, primary, volume);
    let expected = read(&*copy, number, 0, 3 << 20);
    Pair::turn_log(&a, Lsn(end.0 - 100));
    assert!(try_read(&*primary, number, 3 * 4096, 4096).is_err());
    let _ = primary.take_suspects();
    a.pass(4000);
    primary.sync_now().unwrap();
    let waits = primary.fold_now();
    let segment = end.segment_number(SEGMENT);
    assert_eq!(primary.take_suspects(), [DamagedPart::Log { segment }], "{waits:?}");
    assert!(matches!(waits, Err(GroupError::Waits { .. })));
    let gap = primary.gap(segment).unwrap().expect("it is damaged");
    let records = copy.records_for(gap, 1 << 20).unwrap();
    assert!(matches!(primary.mend_log(gap, &records).unwrap(), Mended::To(_)));
    assert_eq!(primary.fold_now().unwrap(), primary.positions().head);
    assert!(read(&*primary, number, 0, 3 << 20) == expected);
}

#[test]
fn what_the_disk_could_not_read_of_a_log_is_taken_from_a_peer() {
    let pair = Pair::new(13);
    let whole = Pair::bytes(&pair.copy);
    let at = Lsn(pair.primary.positions().head.0 - 6000);
    let Pair { a, b, primary, copy, volume } = pair;
    drop(copy);
    let path = dir().join("log").join(segment_name(at.segment_number(SEGMENT)));
    let offset = at.segment_offset(SEGMENT);
    b.disk.inject(crate::io::Fault::Unreadable { path, offset, length: 512 });
    let (copy, _) = b.open();
    let pair = Pair { a, b, primary, copy, volume };
    assert!(!damaged(&pair.copy).is_empty());
    // What is written there is readable.
    pair.b.disk.clear_faults();
    assert!(pair.repair_log(), "{:?}", damaged(&pair.copy));
    assert!(Pair::bytes(&pair.copy).starts_with(&whole));
}

#[test]
fn who_has_damage_gives_none_of_it_away() {
    let pair = Pair::new(3);
    let at = Lsn(pair.copy.positions().head.0 - 9000);
    let number = pair.volume.number;
    for bench in [&pair.a, &pair.b] {
        Pair::turn_log(bench, at);
        turn(bench, &base_file(&pair.volume, "img"), 4096 + 5);
        turn(bench, &base_file(&pair.volume, "img"), 8192 + 5);
    }
    turn(&pair.a, &base_file(&pair.volume, "img"), 8192 + 5);
    let before = Pair::bytes(&pair.copy);
    assert!(!pair.repair_log());
    assert!(Pair::bytes(&pair.copy) == before, "nothing was overwritten");
    assert!(!pair.repair_base(), "one block is damaged on both");
    let [wanted] = &pair.copy.wanted_blocks(number, 0)[..] else { panic!("a block") };
    assert_eq!(wanted.blocks, [1], "the other was repaired");
    assert!(pair.primary.blocks_for(number, wanted).unwrap().is_empty());
    assert!(!damaged(&pair.primary).is_empty(), "and the primary is as it was");
}

#[test]
fn blocks_are_taken_only_where_the_sums_here_prove_them() {
    let pair = Pair::new(4);
    let number = pair.volume.number;
    turn(&pair.b, &base_file(&pair.volume, "img"), 4096 + 5);
    let before = pair.b.disk.operations();
    let lie = BTreeMap::from([(1, vec![7; 4096])]);
    assert!(!pair.copy.mend_base(number, 0, &lie).unwrap());
    // A chunk that is whole is not changed, whatever a peer says.
    assert!(!pair.copy.mend_base(number, 1, &lie).unwrap());
    assert_eq!(pair.b.disk.operations(), before);
    assert!(try_read(&*pair.copy, number, 4096, 4096).is_err());
    assert!(pair.repair_base());
    assert_eq!(read(&*pair.copy, number, 4096, 4096), [1; 4096]);
    turn(&pair.b, &base_file(&pair.volume, "sum"), 8192 + 8);
    turn(&pair.b, &base_file(&pair.volume, "img"), 12288);
    assert!(pair.repair_base());
}

#[test]
fn a_block_that_has_changed_since_is_not_taken_as_it_is_now() {
    // With its own checksum behind it all data has the same one.
    let sealed = |byte: u8| {
        let data = vec![byte; 4092];
        [&data[..], &crc32fast::hash(&data).to_le_bytes()].concat()
    };
    let a = Bench::new("a", 7);
    let group = a.create();
    let volume = group.create_volume(name("v"), 3 << 20).unwrap();
    let number = volume.number;
    set_policy(&group, 0, 64 << 20);
    write(&group, number, 0, &[1; 128 << 10]);
    write(&group, number, 4096, &sealed(1));
    a.pass(5);
    group.sync_now().unwrap();
    assert_eq!(group.fold_now().unwrap(), group.positions().head);
    write(&group, number, 4096, &sealed(2));
    group.sync_now().unwrap();
    let pair = Pair::of(a, group, volume);
    // The primary's base goes on.
    pair.a.pass(5);
    assert_eq!(pair.primary.fold_now().unwrap(), pair.primary.positions().head);
    let horizon = pair.copy.positions().horizon;
    let before = pair.copy.open_image(&Point::Lsn(horizon), None, "test", None).unwrap();
    turn(&pair.b, &base_file(&pair.volume, "img"), 4096 + 5);
    turn(&pair.b, &base_file(&pair.volume, "img"), 8192 + 5);
    assert!(!pair.repair_base());
    let wanted = pair.copy.wanted_blocks(number, 0);
    let left = Wanted { from: horizon, to: horizon, blocks: vec![1] };
    assert_eq!(wanted, [left], "the other was repaired");
    assert_eq!(read(&*before, number, 8192, 4096), [1; 4096]);
    assert!(try_read(&*before, number, 4096, 4096).is_err());
}

#[test]
fn a_primary_that_stopped_for_damage_serves_again_after_the_repair_and_its_next_start() {
    let pair = Pair::new(5);
    let (a, number) = (&pair.a, pair.volume.number);
    let expected = read(&*pair.primary, number, 0, 3 << 20);
    pair.primary.close().unwrap();
    let head = pair.primary.positions().head;
    // The header of a record in the middle.
    let at = {
        let gap = pair.copy.gap(head.segment_number(SEGMENT)).unwrap();
        assert_eq!(gap, None);
        let segment = Lsn(head.segment_number(SEGMENT) * SEGMENT);
        segment.advance(40)
    };
    Pair::turn_log(a, at);
    let (group, _) = a.open();
    assert_eq!(group.data_state().0, DataState::Failed);
    assert!(group.log_is_broken());
    let segment = at.segment_number(SEGMENT);
    assert_eq!(group.take_suspects(), [DamagedPart::Log { segment }]);
    let part = DamagedPart::Log { segment };
    assert!(matches!(group.check_part(&part), Found::Damaged(_)));
    let gap = group.gap(segment).unwrap().expect("there is one");
    let records = pair.copy.records_for(gap, 1 << 20).unwrap();
    assert!(matches!(group.mend_log(gap, &records).unwrap(), Mended::To(_)));
    assert!(matches!(group.check_part(&part), Found::Whole(_)));
    drop(group);
    let (group, _) = a.open();
    assert_eq!(group.data_state().0, DataState::Consistent);
    assert!(group.positions().head >= head);
    assert!(read(&*group, number, 0, 3 << 20) == expected);
}

/// Another node with what is on a disk.
fn other_with(bench: &Bench, node: u8) -> Bench {
    let node = NodeIdentity { id: NodeId([node; 16]), name: name(&format!("n{node}")) };
    Bench { disk: Arc::new(bench.disk.crash(1)), node, ..bench.after_crash(0) }
}

#[test]
fn a_reign_that_began_before_what_a_stopped_primary_had_overwrites_none_of_it() {
    let bench = Bench::new("a", 8);
    let (primary, volume) = layered(&bench);
    let number = volume.number;
    let more = |group: &Group, byte: u8| {
        let ends = (0..20).map(|block| {
            write(group, number, (1 << 20) + block * 4096, &[byte + block as u8; 4096])
        });
        let ends: Vec<Lsn> = ends.collect();
        group.sync_now().unwrap();
        ends[18]
    };
    let at = primary.positions().head;
    // A copy that ends here, and this node as a copied disk would be.
    let (early, twin) = (other_with(&bench, 2), bench.after_crash(1));
    let last = more(&primary, 10);
    let expected = read(&*primary, number, 0, 3 << 20);
    primary.close().unwrap();
    let mark = primary.positions().head;
    // One that has everything.
    let late = other_with(&bench, 3);
    drop(primary);
    for peer in [&early, &late] {
        let (copy, _) = peer.open();
        copy.promote("promote").unwrap();
        more(&copy, 50);
        copy.close().unwrap();
    }
    let (clone, _) = twin.open();
    more(&clone, 100);
    clone.close().unwrap();
    // The header of the first record that the one lacks, and of the very last.
    Pair::turn_log(&bench, at.advance(40));
    Pair::turn_log(&bench, last.advance(40));
    let (group, _) = bench.open();
    assert!(group.log_is_broken());
    let segment = at.segment_number(SEGMENT);
    let part = DamagedPart::Log { segment };
    let gap = group.gap(segment).unwrap().expect("there is one");
    assert_eq!(gap.at, at);
    let before = bench.disk.operations();
    let records_of = |peer: &Bench, gap: Gap| {
        let (copy, _) = peer.open();
        assert!(copy.positions().head >= mark);
        copy.records_for(gap, 1 << 20).unwrap()
    };
    let why = group.mend_log(gap, &records_of(&early, gap)).unwrap_err().to_string();
    assert!(why.contains(&format!("n2 reigns since LSN {at}, and")), "{why}");
    assert!(why.contains(&format!("up to LSN {mark}")), "{why}");
    let why = group.mend_log(gap, &records_of(&twin, gap)).unwrap_err().to_string();
    assert!(why.contains("differ from the whole one that stands here"), "{why}");
    assert_eq!(bench.disk.operations(), before, "nothing was written");
    assert!(matches!(group.check_part(&part), Found::Damaged(_)));
    // A reign that began behind all of it is in nobody's way.
    let joined = group.mend_log(gap, &records_of(&late, gap)).unwrap();
    assert!(matches!(joined, Mended::To(end) if end < last), "{joined:?}");
    let gap = group.gap(segment).unwrap().expect("the other");
    assert_eq!(group.mend_log(gap, &records_of(&late, gap)).unwrap(), Mended::To(mark));
    assert!(matches!(group.check_part(&part), Found::Whole(_)));
    drop(group);
    let (group, _) = bench.open();
    assert_eq!(group.data_state().0, DataState::Consistent);
    assert!(read(&*group, number, 0, 3 << 20) == expected);
}

#[test]
fn a_crash_in_a_repair_leaves_what_was_or_what_is_right() {
    let pair = Pair::new(6);
    let number = pair.volume.number;
    let expected = read(&*pair.primary, number, 0, 3 << 20);
    Pair::turn_log(&pair.b, Lsn(pair.copy.positions().head.0 - 9000));
    turn(&pair.b, &base_file(&pair.volume, "img"), 4096 + 5);
    turn(&pair.b, &base_file(&pair.volume, "sum"), 8192 + 8);
    pair.b.disk.record();
    pair.repair_log();
    assert!(pair.repair_base());
    let stopped = pair.b.disk.take_recorded();
    assert!(stopped.len() > 4, "{} boundaries", stopped.len());
    for (boundary, disk) in stopped.into_iter().enumerate() {
        for seed in 0..4 {
            let disk = Arc::new(disk.crash(seed + 10 * boundary as u64));
            let after = Bench { disk, ..pair.b.after_crash(0) };
            let (copy, _) = after.open();
            for offset in (0..3 << 20).step_by(4096) {
                if let Ok(got) = try_read(&*copy, number, offset, 4096) {
                    let offset = offset as usize;
                    assert!(got == expected[offset..offset + 4096], "{boundary}: at {offset}");
                }
            }
        }
    }
}

#[test]
fn a_repair_in_the_page_at_the_head_is_not_undone_by_the_next_append() {
    let pair = Pair::new(7);
    let number = pair.volume.number;
    let lsn = write(&pair.primary, number, 1 << 20, &[5; 1024]);
    pair.primary.sync_now().unwrap();
    pair.primary.mark_round(true);
    // The payload's end, in the page where the log ends; it is read back with the damage.
    let at = Lsn(lsn.0 - 8);
    assert_eq!(at.0 / 4096, pair.primary.positions().head.0 / 4096, "in the last page");
    let b = pair.a.after_crash(1);
    Pair::turn_log(&b, at);
    let (copy, _) = b.open();
    let pair = Pair { b, copy, ..pair };
    assert!(!damaged(&pair.copy).is_empty());
    assert!(pair.repair_log());
    write(&pair.copy, number, 1 << 20, &[6; 512]);
    pair.copy.sync_now().unwrap();
    assert_eq!(damaged(&pair.copy), []);
}
