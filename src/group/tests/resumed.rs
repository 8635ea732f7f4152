//! An image that comes in several goes: what of the ones before counts, and what no longer does.

use super::resync::{Pair, all, check_image, follow, same, send};
use super::*;
use crate::io::Fault;

const VOLUME: u64 = 3 << 20;

/// The copy lies below the log: it is sent an image, as far as `parts` goes.
fn go_on(pair: &Pair, parts: usize) -> bool {
    let head = pair.copy.positions().head;
    send(&pair.primary, &pair.copy, Some(head), head, parts)
}

/// All of the volumes of a copy in its base, and all of them written again on the primary.
fn written_again(seed: u64, volumes: &[(&str, u64)]) -> (Pair, Vec<VolumeNumber>) {
    let pair = Pair::new(seed);
    let mut numbers = Vec::new();
    for (text, bytes) in volumes {
        let number = pair.primary.create_volume(name(text), *bytes).unwrap().number;
        write(&pair.primary, number, 0, &vec![1; *bytes as usize]);
        numbers.push(number);
    }
    pair.follow();
    pair.there.pass(5);
    pair.copy.fold_now().unwrap();
    pair.copy.open_image(&Point::Now, Some(name("old")), "test", None).unwrap();
    for (number, (_, bytes)) in numbers.iter().zip(volumes) {
        write(&pair.primary, *number, 0, &vec![2; *bytes as usize]);
    }
    pair.fold();
    (pair, numbers)
}

/// The copy follows, and is the primary again, also once all is in its base.
fn check(pair: &Pair, what: &str) {
    pair.primary.end_shipment(&name("b"));
    assert!(follow(&pair.primary, &pair.copy), "{what}");
    same(&pair.primary, &pair.copy, what);
    pair.there.pass(5);
    pair.copy.fold_now().unwrap_or_else(|error| panic!("{what}: {error}"));
    same(&pair.primary, &pair.copy, what);
}

#[test]
fn what_could_not_be_made_durable_is_sent_again_wherever_the_disk_failed() {
    let faults: [fn(u64) -> Fault; 2] =
        [|operation| Fault::Error { operation }, |operation| Fault::FailedSync { operation }];
    let mut failures = [0, 0];
    for (kind, fault) in faults.into_iter().enumerate() {
        for operation in 0.. {
            let (mut pair, _) = written_again(1, &[("v", 1 << 20), ("w", 1 << 20)]);
            assert!(!go_on(&pair, 14), "both volumes are staged in part");
            let disk = &pair.there.disk;
            disk.inject(fault(disk.operations() + operation));
            let staged = pair.copy.staged();
            disk.clear_faults();
            let Err(error) = staged else { break };
            failures[kind] += 1;
            let what = format!("fault {kind}, operation {operation}: {error}");
            // That stream ended before an image began: the next one asks again.
            assert!(go_on(&pair, usize::MAX), "{what}");
            pair.copy.switch_to_image().unwrap();
            // The start finishes the switch with what is on the disk.
            pair.restart_copy(operation);
            check(&pair, &what);
        }
    }
    assert!(failures.iter().all(|count| *count >= 3), "{failures:?}");
}

#[test]
fn what_is_staged_of_an_image_that_a_rewind_has_left_behind_counts_no_more() {
    for crash in [None, Some(1), Some(2), Some(3), Some(4)] {
        let (mut pair, volumes) = written_again(2, &[("v", VOLUME)]);
        assert!(!go_on(&pair, 20));
        // The primary has closed that image; there is another one, of two blocks more.
        let reached = pair.copy.staged().unwrap().unwrap().reached;
        assert!(reached[0].to.offset > 2 << 20, "{reached:?}");
        pair.primary.end_shipment(&name("b"));
        let back = pair.primary.positions().head;
        for offset in [8192, (1 << 20) + 8192] {
            write(&pair.primary, volumes[0], offset, &[3; 4096]);
        }
        assert!(!go_on(&pair, 4), "the two blocks are staged, and some behind");
        match crash {
            Some(seed) => pair.restart_copy(seed),
            // Killed: what was written stays.
            None => pair.copy = pair.there.open().0,
        }
        let staged = pair.copy.staged().unwrap().unwrap();
        assert!(staged.image.lsn > back && staged.reached == reached, "{staged:?}");
        pair.primary.rewind(&Point::Lsn(back), false).unwrap();
        assert!(go_on(&pair, usize::MAX));
        pair.copy.switch_to_image().unwrap();
        check(&pair, &format!("{crash:?}"));
    }
}

#[test]
fn an_old_image_shows_a_volume_that_went_while_an_image_was_coming() {
    let volumes = [("w", 1 << 20), ("v", 1 << 20)];
    for restarted in [false, true] {
        let (mut pair, numbers) = written_again(3, &volumes);
        let old = all(&pair.copy);
        one(&pair.primary, numbers[0], Op::Trim { offset: 256 << 10, length: 256 << 10 }).unwrap();
        pair.fold();
        assert!(!go_on(&pair, 8), "bytes and zeros are staged");
        pair.primary.end_shipment(&name("b"));
        pair.primary.remove_volume(&name("w")).unwrap();
        assert!(go_on(&pair, usize::MAX));
        pair.copy.switch_to_image().unwrap();
        check_image(&pair.copy, &old, "before the image is in the base");
        if restarted {
            pair.restart_copy(1);
            check_image(&pair.copy, &old, "after a start");
        }
        check(&pair, "it follows");
        check_image(&pair.copy, &old, "in the base");
    }
}

#[test]
fn bytes_that_are_staged_and_not_there_are_an_error_and_no_zeros() {
    let (pair, volumes) = written_again(4, &[("v", 1 << 20)]);
    assert!(go_on(&pair, usize::MAX));
    pair.copy.switch_to_image().unwrap();
    let mut merging = pair.copy.merging.write().unwrap();
    Arc::get_mut(merging.as_mut().unwrap()).unwrap().volumes.clear();
    drop(merging);
    let error = try_read(&*pair.copy, volumes[0], 0, 512).unwrap_err().to_string();
    assert!(error.contains("what is staged of volume 1 is gone"), "{error}");
    pair.copy.fold_now().unwrap_err();
    drop(pair.copy);
    let (copy, _) = pair.there.open();
    assert_eq!(read(&*copy, volumes[0], 0, 512), [2; 512]);
}
