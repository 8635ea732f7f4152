//! What a check of the parts on disk finds, and what it does not take for damage.

use std::io::IoSlice;
use std::path::Path;

use super::returning::join;
use super::*;
use crate::io::{Fault, OpenMode};
use crate::log::segment::segment_name;
use crate::units::CHUNK_BYTES;

/// Turns a bit of a file.
pub(super) fn turn(bench: &Bench, path: &Path, at: u64) {
    let file = bench.disk.open(path, OpenMode::ReadWrite).unwrap();
    let mut byte = [0];
    file.read_at(&mut byte, at).unwrap();
    file.write_at(&[IoSlice::new(&[byte[0] ^ 0x10])], at).unwrap();
}

pub(super) fn base_file(volume: &Volume, ending: &str) -> PathBuf {
    dir().join("base").join(format!("{}.{ending}", volume.number))
}

/// A group whose volume has 128 KiB in the base and as much in the log, 64 KiB of them in both; an
/// image is open at the moment where the base is.
pub(super) fn layered(bench: &Bench) -> (Arc<Group>, Volume) {
    let group = bench.create();
    let volume = group.create_volume(name("v"), 3 << 20).unwrap();
    set_policy(&group, 0, 64 << 20);
    write(&group, volume.number, 0, &[1; 128 << 10]);
    bench.pass(5);
    group.sync_now().unwrap();
    assert_eq!(group.fold_now().unwrap(), group.positions().head);
    set_policy(&group, 3600, 64 << 20);
    write(&group, volume.number, 64 << 10, &[2; 128 << 10]);
    group.sync_now().unwrap();
    (group, volume)
}

/// Everything that is damaged, with what is said of it.
pub(super) fn damaged(group: &Group) -> Vec<(DamagedPart, String)> {
    let last = group.positions().head.segment_number(SEGMENT);
    let log = (0..=last).map(|segment| DamagedPart::Log { segment });
    let base = group.base_chunks().into_iter().flat_map(|(volume, chunks)| {
        (0..chunks).map(move |chunk| DamagedPart::Base { volume, chunk })
    });
    let kept = group.kept_moments().into_iter().map(|(moment, _)| DamagedPart::Kept { moment });
    let parts = log.chain(base).chain(kept);
    parts
        .filter_map(|part| match group.check_part(&part) {
            Found::Damaged(what) => Some((part, what)),
            _ => None,
        })
        .collect()
}

#[test]
fn what_rotted_in_log_base_sidecar_and_kept_blocks_is_found_and_named() {
    let bench = Bench::new("a", 1);
    let (group, volume) = layered(&bench);
    let moment = group.positions().head;
    group.open_image(&Point::Now, None, "test", None).unwrap();
    write(&group, volume.number, 64 << 10, &[3; 64 << 10]);
    set_policy(&group, 0, 64 << 20);
    bench.pass(5);
    group.sync_now().unwrap();
    group.fold_now().unwrap();
    set_policy(&group, 3600, 64 << 20);
    let start = write(&group, volume.number, 8192, &[4; 4096]);
    group.sync_now().unwrap();
    assert_eq!(damaged(&group), []);

    let in_payload = Lsn(start.0 - 100);
    let segment = in_payload.segment_number(SEGMENT);
    let file = dir().join("log").join(segment_name(segment));
    turn(&bench, &file, in_payload.segment_offset(SEGMENT));
    turn(&bench, &base_file(&volume, "img"), 100 << 10);
    turn(&bench, &dir().join(format!("moments/{moment}/blocks")), 5000);
    let found = damaged(&group);
    let parts: Vec<DamagedPart> = found.iter().map(|(part, _)| *part).collect();
    let base = DamagedPart::Base { volume: volume.number, chunk: 0 };
    assert_eq!(parts, [DamagedPart::Log { segment }, base, DamagedPart::Kept { moment }]);
    let record =
        format!("segment {segment}: record: payload checksum differs: 4096 bytes of volume");
    assert!(found[0].1.contains(&record), "{}", found[0].1);
    assert!(found[1].1.contains("the first at 102400"), "{}", found[1].1);
    turn(&bench, &base_file(&volume, "img"), 100 << 10);
    assert_eq!(damaged(&group).len(), 2);
    // The first sum of the first chunk.
    turn(&bench, &base_file(&volume, "sum"), 8192);
    assert!(damaged(&group)[1].1.contains("the sidecar's own checksum"));
}

#[test]
fn a_fold_that_stopped_half_way_is_no_damage() {
    for operation in 0.. {
        let bench = Bench::new("a", 2);
        let (group, volume) = layered(&bench);
        write(&group, volume.number, 512, &[9; 2048]);
        set_policy(&group, 0, 64 << 20);
        bench.pass(5);
        group.sync_now().unwrap();
        bench.disk.inject(Fault::Error { operation: bench.disk.operations() + operation });
        let ended = group.fold_now().is_ok();
        bench.disk.clear_faults();
        assert_eq!(damaged(&group), [], "operation {operation}");
        if ended {
            assert!(operation > 10, "{operation} operations");
            return;
        }
        if group.data_state().0 != DataState::Failed {
            group.fold_now().unwrap();
            assert_eq!(damaged(&group), [], "operation {operation}, finished");
        }
    }
}

#[test]
fn what_a_reader_meets_is_handed_to_who_checks() {
    let bench = Bench::new("a", 3);
    let (group, volume) = layered(&bench);
    turn(&bench, &base_file(&volume, "img"), 4096);
    turn(&bench, &base_file(&volume, "img"), 8192);
    assert!(try_read(&*group, volume.number, 0, 64 << 10).is_err());
    let base = DamagedPart::Base { volume: volume.number, chunk: 0 };
    assert_eq!(group.take_suspects(), [base]);
    assert_eq!(group.take_suspects(), []);
    let head = group.positions().head;
    let file = dir().join("log").join(segment_name(head.segment_number(SEGMENT)));
    turn(&bench, &file, head.segment_offset(SEGMENT) - 300);
    assert!(try_read(&*group, volume.number, 128 << 10, 64 << 10).is_err());
    let segment = head.segment_number(SEGMENT);
    assert_eq!(group.take_suspects(), [DamagedPart::Log { segment }]);
}

#[test]
fn a_damaged_block_of_which_a_fold_changes_a_part_is_never_made_to_look_whole() {
    let bench = Bench::new("a", 4);
    let (group, volume) = layered(&bench);
    // Else it would not be waited for.
    join(&group, 7);
    turn(&bench, &base_file(&volume, "img"), 4096 + 3000);
    write(&group, volume.number, 4096, &[9; 512]);
    set_policy(&group, 0, 64 << 20);
    bench.pass(5);
    group.sync_now().unwrap();
    for _ in 0..3 {
        let folded = group.fold_now();
        assert!(matches!(folded, Err(GroupError::Waits { .. })), "{folded:?}");
    }
    let (group, _) = {
        group.close().unwrap();
        drop(group);
        bench.open()
    };
    group.note_answer(NodeId([7; 16])).unwrap();
    assert!(group.fold_now().is_err());
    assert!(try_read(&*group, volume.number, 4096, 4096).is_err(), "the rest of it is damaged");
    assert_eq!(damaged(&group).len(), 1);
    turn(&bench, &base_file(&volume, "img"), 4096 + 3000);
    group.fold_now().unwrap();
    let mut expected = [1; 4096];
    expected[..512].fill(9);
    assert_eq!(read(&*group, volume.number, 4096, 4096), expected);
    assert!(group.base_chunks().iter().all(|(_, chunks)| *chunks == (3 << 20) / CHUNK_BYTES));
}
