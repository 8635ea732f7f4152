//! What rots of an image on its way, or cannot be read: before the switch it is sent anew, behind
//! it damage is told and nothing else is shown.

use std::path::Path;

use super::resync::{Pair, Sides, all, check_image, follow, same, send, staged};
use super::*;
use crate::io::{Fault, OpenMode};

fn b() -> Name {
    name("b")
}

/// The node of the copy as its disk is now, on its own from here on.
fn apart(pair: &Pair) -> Bench {
    let disk = Arc::new(pair.there.disk.snapshot());
    Bench { disk, ..pair.there.after_crash(0) }
}

/// Places in the files that say what is staged.
fn places(pair: &Pair) -> Vec<(PathBuf, u64)> {
    let mut places = Vec::new();
    for (file, step) in [("ranges", 1), ("state", 5)] {
        let path = dir().join("staging").join(file);
        let bytes = pair.there.disk.open(&path, OpenMode::Read).unwrap().len().unwrap();
        places.extend((0..bytes).step_by(step).map(|at| (path.clone(), at)));
    }
    places
}

#[test]
fn a_bit_that_turns_in_what_says_what_is_staged_shows_no_image_that_never_was() {
    for partial in [true, false] {
        let (pair, [old, new]) = staged(1, partial);
        let since = partial.then(|| pair.copy.positions().head);
        for (path, at) in places(&pair) {
            let what = format!("partial {partial}, {} at {at}", path.display());
            let after = apart(&pair);
            after.disk.damage(&path, at, 1, 1 << (at % 8));
            let (copy, _) = after.open();
            assert!(all(&copy) == old, "{what}: before the switch");
            assert_eq!(copy.staged().unwrap(), None, "{what}: it is sent anew");
            pair.primary.end_shipment(&b());
            assert!(send(&pair.primary, &copy, since, since.unwrap_or_default(), usize::MAX));
            copy.switch_to_image().unwrap();
            assert!(all(&copy) == new, "{what}: switched to");
            after.pass(5);
            copy.fold_now().unwrap();
            assert!(all(&copy) == new, "{what}: in the base");
        }
        // Behind the switch the base may be half of either.
        pair.primary.end_shipment(&b());
        assert!(send(&pair.primary, &pair.copy, since, since.unwrap_or_default(), usize::MAX));
        pair.copy.switch_to_image().unwrap();
        for (path, at) in places(&pair) {
            let what = format!("partial {partial}, switched, {} at {at}", path.display());
            let after = apart(&pair);
            after.disk.damage(&path, at, 1, 1 << (at % 8));
            let Err(error) = Group::open(after.context(), &dir()).map(|_| ()) else {
                panic!("{what}: opened")
            };
            let text = error.to_string();
            assert!(text.contains(path.to_str().unwrap()), "{what}: {text}");
            assert!(text.contains("tidelog replicate g --to"), "{what}: {text}");
        }
        let (copy, _) = apart(&pair).open();
        assert!(all(&copy) == new, "as it was");
    }
}

/// A copy that has switched to an image, and not merged it. Block 3 of volume 1 is staged.
fn switched() -> (Pair, Sides, PathBuf) {
    let (pair, sides) = staged(2, true);
    pair.copy.switch_to_image().unwrap();
    (pair, sides, dir().join("staging").join("1.img"))
}

/// The copy shows the new image but for these blocks of volume 1, which are errors.
fn check(copy: &Group, new: &[(Volume, Vec<u8>)], lost: &[u64], what: &str) {
    for (volume, bytes) in new {
        for (block, expected) in bytes.chunks(4096).enumerate() {
            let found = try_read(copy, volume.number, block as u64 * 4096, expected.len());
            if volume.number == VolumeNumber(1) && lost.contains(&(block as u64)) {
                assert!(matches!(found, Err(GroupError::Damaged { .. })), "{what}: block {block}");
            } else {
                let found = found.unwrap_or_else(|error| panic!("{what}: {block}: {error}"));
                assert!(found == expected, "{what}: block {block} of {}", volume.name);
            }
        }
    }
}

/// What is wrong is told, a peer makes it whole, and the copy goes on.
fn check_repaired(after: &Bench, pair: &Pair, copy: &Group, new: &Sides, what: &str) {
    let chunk = DamagedPart::Base { volume: VolumeNumber(1), chunk: 0 };
    assert!(copy.take_suspects().contains(&chunk), "{what}: a peer is asked");
    let said = after.said("log-damaged");
    assert!(said.iter().any(|text| text.contains("volume v at 12288")), "{what}: {said:?}");
    let mut blocks = std::collections::BTreeMap::new();
    for wanted in copy.wanted_blocks(VolumeNumber(1), 0) {
        blocks.extend(pair.primary.blocks_for(VolumeNumber(1), &wanted).unwrap());
    }
    assert!(copy.mend_base(VolumeNumber(1), 0, &blocks).unwrap(), "{what}");
    check(copy, &new[1], &[], what);
    follow(&pair.primary, copy);
    same(&pair.primary, copy, what);
}

#[test]
fn a_staged_block_that_has_rotted_is_damage_in_the_base_and_the_rest_is_merged() {
    let sums = |path: &Path| path.with_extension("sum");
    let (pair, new, image) = switched();
    for restarted in [false, true] {
        for (damage, whole) in [("block", false), ("block unread", false), ("sum", true)] {
            let what = format!("{damage}, restarted {restarted}");
            let (copy, after) = if restarted {
                (None, apart(&pair))
            } else {
                let (other, ..) = switched();
                (Some(other.copy), other.there)
            };
            match damage {
                "block" => after.disk.damage(&image, 3 * 4096 + 77, 1, 4),
                "sum" => after.disk.damage(&sums(&image), crate::base::sum_offset(3), 1, 4),
                _ => {
                    let (path, offset) = (image.clone(), 3 * 4096 + 512);
                    after.disk.inject(Fault::Unreadable { path, offset, length: 512 });
                }
            }
            let copy = copy.unwrap_or_else(|| after.open().0);
            after.pass(5);
            copy.fold_now().unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(!after.disk.exists(&dir().join("staging")).unwrap(), "{what}");
            check_image(&copy, &new[0], &what);
            if whole {
                check(&copy, &new[1], &[], &what);
                continue;
            }
            check(&copy, &new[1], &[3], &what);
            if !restarted {
                copy.close().unwrap();
                drop(copy);
                let (copy, _) = after.open();
                check(&copy, &new[1], &[3], &what);
                copy.suspect(DamagedPart::Base { volume: VolumeNumber(1), chunk: 0 });
                check_repaired(&after, &pair, &copy, &new, &what);
                continue;
            }
            check_repaired(&after, &pair, &copy, &new, &what);
        }
    }
}

#[test]
fn staged_sums_that_cannot_be_read_are_damage_in_the_base_until_a_peer_agrees_with_the_blocks() {
    let (pair, new, image) = switched();
    let (path, offset) = (image.with_extension("sum"), crate::base::sum_offset(0));
    pair.there.disk.inject(Fault::Unreadable { path, offset, length: 512 });
    pair.there.pass(5);
    pair.copy.fold_now().unwrap();
    // Behind these all is zeros, and has no sum.
    check(&pair.copy, &new[1], &(0..12).collect::<Vec<_>>(), "merged");
    let mut blocks = std::collections::BTreeMap::new();
    for wanted in pair.copy.wanted_blocks(VolumeNumber(1), 0) {
        blocks.extend(pair.primary.blocks_for(VolumeNumber(1), &wanted).unwrap());
    }
    assert!(pair.copy.mend_base(VolumeNumber(1), 0, &blocks).unwrap());
    check(&pair.copy, &new[1], &[], "repaired");
}

#[test]
fn what_a_crash_left_of_directories_that_were_removed_goes_at_the_start() {
    let bench = Bench::new("b", 3);
    drop(bench.create_copy());
    for gone in ["moments.deleted", "staging.deleted"].map(|name| dir().join(name)) {
        bench.disk.create_dir(&gone).unwrap();
        bench.disk.open(&gone.join("1.img"), OpenMode::Create).unwrap().sync().unwrap();
    }
    drop(bench.open());
    let left = bench.disk.list(&dir()).unwrap();
    assert!(!left.iter().any(|name| name.ends_with(".deleted")), "{left:?}");
}
