//! What a switch to an image must not leave behind, whatever the disk says to it.

use super::resync::{Pair, same, send};
use super::*;

/// The copy has followed a volume into its base that the primary after a forced promote never
/// had, and takes all of an image of that one.
fn forked() -> (Pair, Lsn) {
    let pair = Pair::new(1);
    let volume = pair.primary.create_volume(name("v"), 1 << 20).unwrap().number;
    write(&pair.primary, volume, 0, &[1; 4096]);
    pair.follow();
    pair.primary.sync_now().unwrap();
    let common = pair.primary.positions().head;
    let before = pair.here.after_crash(9);
    let gone = pair.primary.create_volume(name("w"), 1 << 20).unwrap().number;
    write(&pair.primary, gone, 0, &[2; 1 << 20]);
    pair.follow();
    pair.copy.fold_all().unwrap();
    assert!(pair.there.disk.exists(&dir().join(format!("base/{gone}.img"))));
    drop(pair.primary);
    let (primary, _) = before.open();
    primary.promote("test").unwrap();
    primary.begin_epoch(primary.new_epoch("test", 9)).unwrap();
    let pair = Pair { here: before, primary, ..pair };
    for offset in 0..64 {
        write(&pair.primary, volume, offset * 4096, &[4; 4096]);
    }
    pair.fold();
    assert!(pair.primary.log_start() > common);
    assert!(send(&pair.primary, &pair.copy, None, common, usize::MAX));
    (pair, common)
}

/// The primary makes a volume of the number that the other history had used, and the copy starts
/// again before that is folded.
fn check_number_used_again(mut pair: Pair, what: &str) {
    pair.primary.end_shipment(&name("b"));
    let again = pair.primary.create_volume(name("x"), 1 << 20).unwrap().number;
    write(&pair.primary, again, 8192, &[5; 512]);
    pair.follow();
    same(&pair.primary, &pair.copy, what);
    pair.copy.close().unwrap();
    pair.copy = pair.there.open().0;
    let mut expected = vec![0; 1 << 20];
    expected[8192..8704].fill(5);
    let found = read(&*pair.copy, again, 0, 1 << 20);
    assert!(found == expected, "{what}: bytes of another volume");
    pair.there.pass(5);
    pair.copy.fold_now().unwrap();
    assert!(read(&*pair.copy, again, 0, 1 << 20) == expected, "{what}: in the base");
    same(&pair.primary, &pair.copy, what);
}

#[test]
fn a_number_that_another_history_used_shows_nothing_of_its_volume() {
    let (pair, _) = forked();
    pair.copy.switch_to_image().unwrap();
    pair.there.pass(5);
    pair.copy.fold_now().unwrap();
    check_number_used_again(pair, "in the base while it runs");
    // The start finishes what a crash has left of the switch.
    let (mut pair, _) = forked();
    pair.copy.switch_to_image().unwrap();
    pair.restart_copy(3);
    check_number_used_again(pair, "in the base by the start");
}
