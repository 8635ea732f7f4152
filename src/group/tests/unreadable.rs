//! What the disk cannot read any more: damage where it was durable, else the disk's own word.

use super::*;
use crate::io::{Fault, OpenMode};
use crate::log::segment::segment_name;

const SECTOR: u64 = 512;

fn segment() -> PathBuf {
    dir().join("log").join(segment_name(0))
}

fn unreadable(bench: &Bench, path: PathBuf, offset: u64, length: u64) {
    bench.disk.inject(Fault::Unreadable { path, offset, length });
}

/// What the volume holds once all was written, by blocks.
const BLOCKS: [u8; 4] = [1, 2, 3, 0];

/// A primary, or a copy of one, with a log in which all, or only the volume, is durable; its disk,
/// up to where it was durable, and where it ends.
fn stopped(is_copy: bool, all_durable: bool, in_order: bool) -> (Bench, Volume, Lsn, Lsn) {
    let (a, b) = (Bench::new("a", 1), Bench::new("b", 2));
    let primary = a.create();
    let volume = primary.create_volume(name("v"), 1 << 20).unwrap();
    let (bench, group) = if is_copy { (b, None) } else { (a, Some(primary.clone())) };
    let group = group.unwrap_or_else(|| bench.create_copy());
    let pull = || {
        let (from, to) = (group.received_end(), primary.positions().head);
        if is_copy {
            let mut bytes = vec![0; to.bytes_since(from) as usize];
            primary.read_log(from, &mut bytes).unwrap();
            group.append_received(from, &bytes).unwrap();
        }
    };
    pull();
    group.sync_now().unwrap();
    let mut durable = group.positions().head;
    for (block, byte) in BLOCKS.into_iter().enumerate().filter(|(_, byte)| *byte > 0) {
        write(&primary, volume.number, block as u64 * 4096, &[byte; 4096]);
    }
    pull();
    let head = group.positions().head;
    if all_durable {
        group.sync_now().unwrap();
        group.update_meta(|meta| meta.durable = head).unwrap();
        durable = head;
    } else {
        group.update_meta(|meta| meta.durable = durable).unwrap();
    }
    if in_order {
        group.close().unwrap();
    }
    drop((group, primary));
    (bench, volume, durable, head)
}

/// Reads the blocks; how many of them are errors. No other is anything but what was written.
fn errors(group: &Group, volume: &Volume, what: &str) -> usize {
    let read = |(block, byte): (usize, u8)| match try_read(
        group,
        volume.number,
        block as u64 * 4096,
        4096,
    ) {
        Ok(bytes) => {
            assert_eq!(bytes, [byte; 4096], "{what}: block {block}");
            0
        }
        Err(_) => 1,
    };
    BLOCKS.into_iter().enumerate().map(read).sum()
}

#[test]
fn an_unreadable_sector_of_what_was_durable_is_damage_and_the_group_opens() {
    for (is_copy, in_order) in [(false, false), (false, true), (true, false), (true, true)] {
        let (bench, volume, _, head) = stopped(is_copy, true, in_order);
        let (mut failed, mut lacking, mut cut) = (0, 0, 0);
        // That of the end may have had more, unless nothing was to come.
        let sectors = if in_order { head.0.div_ceil(SECTOR) } else { head.0 / SECTOR };
        for sector in 0..sectors {
            let what = format!("copy {is_copy}, in order {in_order}, sector {sector}");
            let disk = Arc::new(bench.disk.snapshot());
            let after = Bench { disk, ..bench.after_crash(0) };
            unreadable(&after, segment(), sector * SECTOR, SECTOR);
            let opened = Group::open(after.context(), &dir());
            let (group, _) = opened.unwrap_or_else(|error| panic!("{what}: {error}"));
            if group.control().volumes.is_empty() {
                // Where a header ends the chain, a primary stops, and a copy begins anew there.
                assert!(group.positions().head < head, "{what}");
            }
            let ended = group.positions().head < head;
            let told = after.event_codes().contains(&"log-damaged".to_owned());
            match (ended, is_copy) {
                (true, false) => {
                    assert!(told && group.log_is_broken(), "{what}");
                    failed += 1;
                }
                (true, true) => {
                    assert!(told && group.data_state().0 != DataState::Failed, "{what}");
                    cut += 1;
                }
                (false, _) => {
                    let errors = errors(&group, &volume, &what);
                    assert!(errors > 0, "{what}: it is read in spite of it");
                    assert!(!group.take_suspects().is_empty(), "{what}: nobody looks");
                    lacking += 1;
                }
            }
        }
        assert!(lacking > 20, "copy {is_copy}: {lacking}");
        assert!(if is_copy { cut } else { failed } > 3, "copy {is_copy}: {cut}, {failed}");
    }
}

#[test]
fn an_unreadable_sector_of_what_may_not_be_durable_is_the_disks_own_word_and_nothing_is_cut() {
    for is_copy in [false, true] {
        let (bench, volume, durable, head) = stopped(is_copy, false, false);
        let last = (head.0 + 8192) / SECTOR;
        for sector in durable.0.div_ceil(SECTOR)..last {
            let what = format!("copy {is_copy}, sector {sector}");
            let disk = Arc::new(bench.disk.snapshot());
            let after = Bench { disk, ..bench.after_crash(0) };
            unreadable(&after, segment(), sector * SECTOR, SECTOR);
            let refused = Group::open(after.context(), &dir()).map(|_| ());
            assert!(matches!(refused, Err(GroupError::Io { .. })), "{what}: {refused:?}");
            after.disk.clear_faults();
            let (group, _) = after.open();
            assert!(group.positions().head >= head, "{what}");
            assert_eq!(errors(&group, &volume, &what), 0, "{what}");
        }
    }
}

#[test]
fn a_sidecar_header_that_has_rotted_is_written_anew_at_the_start() {
    let bench = Bench::new("a", 3);
    let group = bench.create();
    let volume = group.create_volume(name("v"), 1 << 20).unwrap();
    set_policy(&group, 0, 64 << 20);
    write(&group, volume.number, 0, &[7; 8192]);
    bench.pass(5);
    group.sync_now().unwrap();
    group.fold_now().unwrap();
    group.close().unwrap();
    drop(group);
    let path = dir().join("base").join(format!("{}.sum", volume.number));
    let header = |bench: &Bench| {
        let mut bytes = [0; 16];
        bench.disk.open(&path, OpenMode::Read).unwrap().read_at(&mut bytes, 0).unwrap();
        bytes
    };
    let whole = header(&bench);
    for byte in 0..16 {
        let after = Bench { disk: Arc::new(bench.disk.snapshot()), ..bench.after_crash(0) };
        after.disk.damage(&path, byte, 1, 1 << (byte % 8));
        assert_ne!(header(&after), whole);
        let opened = Group::open(after.context(), &dir());
        let (group, _) = opened.unwrap_or_else(|error| panic!("byte {byte}: {error}"));
        assert_eq!(read(&*group, volume.number, 0, 8192), [7; 8192], "byte {byte}");
        let after = Bench { disk: Arc::new(after.disk.crash(byte)), ..after.after_crash(0) };
        assert_eq!(header(&after), whole, "byte {byte}");
    }
    unreadable(&bench, path, 0, 512);
    let (group, _) = bench.open();
    assert_eq!(read(&*group, volume.number, 0, 8192), [7; 8192]);
}
