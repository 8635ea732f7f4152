//! What the base keeps, and what it notices.

use std::io::IoSlice;
use std::path::Path;
use std::sync::Arc;

use crate::io::{Disk, Fault, MemoryDisk, OpenMode};
use crate::units::{CHUNK_BYTES, Lsn, VolumeNumber};

use super::*;

const DIR: &str = "/base";
const NUMBER: VolumeNumber = VolumeNumber(3);

fn disk() -> MemoryDisk {
    let disk = MemoryDisk::new();
    disk.create_dir(Path::new(DIR)).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    disk
}

fn created(disk: &MemoryDisk, size_bytes: u64) -> BaseVolume {
    BaseVolume::create(Arc::new(disk.clone()), Path::new(DIR), NUMBER, size_bytes).unwrap()
}

fn opened(disk: &MemoryDisk) -> BaseVolume {
    BaseVolume::open(Arc::new(disk.clone()), Path::new(DIR), NUMBER).unwrap()
}

/// Blocks that tell where they belong and which version they are.
fn blocks(first: u64, count: u64, version: u64) -> (Vec<u8>, Vec<u32>) {
    let mut data = Vec::new();
    for block in first..first + count {
        data.extend((0..512).flat_map(|_| (block << 16 | version).to_le_bytes()));
    }
    let crcs = data.chunks(4096).map(crc32fast::hash).collect();
    (data, crcs)
}

fn write(base: &BaseVolume, first: u64, count: u64, version: u64, born: u64) {
    let (data, crcs) = blocks(first, count, version);
    base.write_blocks(first * 4096, &data, &crcs, Lsn(born)).unwrap();
}

fn read(base: &BaseVolume, offset: u64, length: usize) -> Result<Vec<u8>, BaseError> {
    let mut buffer = vec![0xee; length];
    base.read(offset, &mut buffer).map(|()| buffer)
}

#[test]
fn a_hole_stays_a_hole_in_image_and_sidecar() {
    let disk = disk();
    let base = created(&disk, 1 << 40);
    write(&base, 70_000, 3, 1, 500);
    base.zero_blocks(0, 1 << 30, Lsn(600)).unwrap();
    base.zero_blocks((1 << 39) + 4096, 1 << 34, Lsn(700)).unwrap();
    base.sync().unwrap();
    let image = disk.allocated(Path::new("/base/3.img"));
    let sums = disk.allocated(Path::new("/base/3.sum"));
    // A page of slots for 256 MiB, and no sums.
    assert!(image == 0 && sums <= 75 * 4096, "{image} and {sums} bytes");
    assert_eq!(read(&base, 70_000 * 4096, 4096).unwrap(), vec![0; 4096]);
    let runs = base.allocation(0, 1 << 40, 10);
    assert_eq!(runs, [(0, 1 << 40, false)]);
    // What was zeros in the base may have been data above it, until the zeros came.
    let second = (1 << 39, (1 << 34) + (1 << 20));
    assert_eq!(base.born_since(Lsn(600)), [(0, 1 << 30), second]);
    assert_eq!(base.born_since(Lsn(700)), [second]);
}

#[test]
fn reads_of_any_alignment_see_what_was_folded() {
    let disk = disk();
    let base = created(&disk, 600 << 20);
    // Over the border of two regions of the sidecar.
    let border = 65_536;
    write(&base, border - 5, 10, 1, 500);
    base.sync().unwrap();
    let (data, _) = blocks(border - 5, 10, 1);
    let start = (border - 5) * 4096;
    for (skip, length) in [(0, 40_960), (0, 4096), (1, 1), (511, 5000), (4095, 2), (20_479, 20_481)]
    {
        let got = read(&base, start + skip, length).unwrap();
        assert_eq!(got, data[skip as usize..][..length], "{length} bytes at {skip}");
    }
    let around = read(&base, start - 100, 40_960 + 200).unwrap();
    assert!(around[..100].iter().chain(&around[41_060..]).all(|byte| *byte == 0));
    assert_eq!(around[100..41_060], data);
    let beyond = read(&base, (600 << 20) - 10, 30).unwrap();
    assert_eq!(beyond, vec![0; 30], "beyond the end are zeros");
}

#[test]
fn a_batch_reads_bases_and_other_files_at_once() {
    let disk = disk();
    let base = created(&disk, 8 << 20);
    write(&base, 1, 2, 1, 500);
    base.sync().unwrap();
    let other = disk.open(Path::new("/base/other"), OpenMode::CreateNew).unwrap();
    other.write_at(&[IoSlice::new(b"other")], 0).unwrap();
    let (mut first, mut second, mut third) = ([0; 4096], [0; 100], [0; 5]);
    let mut reads = [
        BaseRead { base: &base, offset: 4096, buffer: &mut first, result: Ok(()) },
        BaseRead { base: &base, offset: 8192, buffer: &mut second, result: Ok(()) },
    ];
    let mut others =
        [crate::io::BatchRead { file: &*other, offset: 0, buffer: &mut third, result: Ok(()) }];
    read_batch(&disk, &mut reads, &mut others);
    assert!(reads.iter().all(|read| read.result.is_ok()) && others[0].result.is_ok());
    let (data, _) = blocks(1, 2, 1);
    assert_eq!((&first[..], &second[..], &third), (&data[..4096], &data[4096..4196], b"other"));
}

#[test]
fn a_damaged_block_is_found_and_its_neighbours_are_not_blamed() {
    let disk = disk();
    let base = created(&disk, 8 << 20);
    write(&base, 10, 3, 1, 500);
    base.sync().unwrap();
    disk.damage(Path::new("/base/3.img"), 11 * 4096 + 77, 1, 0x20);
    assert!(read(&base, 10 * 4096, 4096).is_ok());
    assert!(read(&base, 12 * 4096, 4096).is_ok());
    let error = read(&base, 11 * 4096 + 1000, 10).unwrap_err();
    let BaseError::Damaged { offset, .. } = error else { panic!("{error}") };
    assert_eq!(offset, 11 * 4096);
    assert_eq!(base.check(0, 8 << 20).unwrap_err(), error);
    // A hole that is not one any more, too.
    disk.damage(Path::new("/base/3.img"), 100 * 4096, 1, 0x01);
    assert!(matches!(read(&base, 100 * 4096, 4096), Err(BaseError::Damaged { .. })));
    disk.inject(Fault::Unreadable { path: "/base/3.img".into(), offset: 50_000, length: 1 });
    assert!(matches!(read(&base, 12 * 4096, 4096), Err(BaseError::Unread { .. })));
}

/// The last four bytes of a block that give it a CRC.
fn with_crc(block: &mut [u8], crc: u32) {
    let end = block.len() - 4;
    let mut of = |tail: u32| {
        block[end..].copy_from_slice(&tail.to_le_bytes());
        crc32fast::hash(block)
    };
    // Each bit of the tail turns the same bits of the CRC, whatever the others are.
    let zero = of(0);
    let mut rows: Vec<(u32, u32)> = (0..32).map(|bit| (of(1 << bit) ^ zero, 1u32 << bit)).collect();
    let (mut wanted, mut tail) = (crc ^ zero, 0);
    for bit in 0..32 {
        let at = rows.iter().position(|(bits, _)| bits & 1 << bit != 0).expect("they are many");
        let (bits, turned) = rows.swap_remove(at);
        if wanted & 1 << bit != 0 {
            (wanted, tail) = (wanted ^ bits, tail ^ turned);
        }
        for row in rows.iter_mut().filter(|row| row.0 & 1 << bit != 0) {
            *row = (row.0 ^ bits, row.1 ^ turned);
        }
    }
    assert_eq!(of(tail), crc);
}

#[test]
fn a_block_whose_crc_would_be_a_lost_sum_is_read_as_it_was_written() {
    let disk = disk();
    let base = created(&disk, 1 << 20);
    let mut block = vec![7; 4096];
    for crc in [!0xc71c_0011, !0xc71c_0011 ^ 1, 0xc71c_0011, 0, u32::MAX] {
        with_crc(&mut block, crc);
        base.write_blocks(4096, &block, &[crc], Lsn(500)).unwrap();
        base.sync().unwrap();
        assert!(read(&base, 4096, 4096).unwrap() == block, "{crc:08x}");
        assert!(base.examine(0).unwrap().is_whole(), "{crc:08x}");
        // Given up, it never is again; nor with a sum that is lost.
        for lost in [false, true] {
            match lost {
                true => base.lose_sum(4096, Lsn(600)).unwrap(),
                false => assert!(base.give_up(4096, Lsn(600)).unwrap(), "it is read"),
            }
            base.sync().unwrap();
            assert!(read(&base, 4096, 4096).is_err(), "{crc:08x}, lost {lost}");
            assert!(!base.examine(0).unwrap().is_whole(), "{crc:08x}, lost {lost}");
        }
    }
}

#[test]
fn births_are_kept_per_chunk_and_only_rise() {
    let disk = disk();
    let base = created(&disk, 10 * CHUNK_BYTES + 4096);
    write(&base, 0, 1, 1, 500);
    write(&base, 3 * 256, 1, 1, 900);
    write(&base, 4 * 256, 1, 1, 800);
    write(&base, 10 * 256, 1, 1, 1000);
    base.sync().unwrap();
    write(&base, 3 * 256 + 7, 1, 2, 700);
    base.sync().unwrap();
    let base = opened(&disk);
    let mib = CHUNK_BYTES;
    let tail = (10 * mib, 4096);
    assert_eq!(base.born_since(Lsn(0)), [(0, mib), (3 * mib, 2 * mib), tail]);
    assert_eq!(base.born_since(Lsn(800)), [(3 * mib, 2 * mib), tail]);
    assert_eq!(base.born_since(Lsn(801)), [(3 * mib, mib), tail]);
    assert_eq!(base.born_since(Lsn(1001)), []);
}

#[test]
fn a_page_of_slots_that_is_lost_or_unreadable_makes_no_chunk_a_hole() {
    let disk = disk();
    let base = created(&disk, 10 * CHUNK_BYTES);
    write(&base, 2 * 256, 256, 1, 500);
    base.sync().unwrap();
    let (offset, path) = (2 * CHUNK_BYTES, Path::new("/base/3.sum"));
    let lost = disk.snapshot();
    let file = lost.open(path, OpenMode::ReadWrite).unwrap();
    file.write_at(&[IoSlice::new(&[0; 512])], sidecar::slot_offset(0)).unwrap();
    let base = opened(&lost);
    let holes = |from: u64, to: u64| (from * CHUNK_BYTES, (to - from) * CHUNK_BYTES, false);
    let runs = [holes(0, 2), (offset, CHUNK_BYTES, true), holes(3, 10)];
    assert_eq!(base.allocation(0, 10 * CHUNK_BYTES, 99), runs);
    assert_eq!(base.born_since(Lsn(5000)), [(offset, CHUNK_BYTES)]);
    assert_eq!(base.births(1, 4), [Some(Lsn::ZERO), None, Some(Lsn::ZERO)]);
    // A fold that has written another slot of the sector since hides nothing.
    write(&base, 4 * 256, 1, 1, 600);
    base.sync().unwrap();
    assert_eq!(opened(&lost).births(2, 5), [None, Some(Lsn::ZERO), Some(Lsn(600))]);
    // Where it cannot be read nothing is known of any.
    let length = sidecar::SLOTS_BYTES;
    disk.inject(Fault::Unreadable { path: path.into(), offset: sidecar::slot_offset(0), length });
    let base = opened(&disk);
    assert_eq!(base.allocation(0, 10 * CHUNK_BYTES, 99), [(0, 10 * CHUNK_BYTES, true)]);
    assert_eq!(base.born_since(Lsn(5000)), [(0, 10 * CHUNK_BYTES)]);
    assert_eq!(base.births(0, 2), [None, None]);
}

/// Each BLOCK_STATUS, and each "changed since", read them for every chunk that nobody had written.
#[test]
fn sums_of_chunks_that_were_never_written_are_not_read() {
    let disk = disk();
    // Two regions, with a block each in the second sector of slots.
    let chunks = 2 * sidecar::CHUNKS_PER_REGION;
    let base = created(&disk, chunks * CHUNK_BYTES);
    let written = [40, sidecar::CHUNKS_PER_REGION + 40];
    for chunk in written {
        write(&base, chunk * 256, 256, 1, 500);
    }
    base.sync().unwrap();
    let base = opened(&disk);
    // From the sums of the third sector on, and those of the first.
    let path = Path::new("/base/3.sum");
    for region in [0, sidecar::CHUNKS_PER_REGION] {
        for (from, to) in [(0, 32), (64, sidecar::CHUNKS_PER_REGION)] {
            let offset = sidecar::sum_offset((region + from) * 256);
            let length = (to - from) * 1024;
            disk.inject(Fault::Unreadable { path: path.into(), offset, length });
        }
    }
    let born = written.map(|chunk| (chunk * CHUNK_BYTES, CHUNK_BYTES));
    assert_eq!(base.born_since(Lsn(1)), born);
    let births = base.births(0, chunks);
    assert_eq!(births.iter().filter(|birth| **birth == Some(Lsn::ZERO)).count(), 510);
    let runs = base.allocation(0, chunks * CHUNK_BYTES, 99);
    assert_eq!(
        runs.into_iter().filter(|run| run.2).map(|run| (run.0, run.1)).collect::<Vec<_>>(),
        born
    );
    // Sums that cannot be read of some chunks say nothing of those beside them.
    let offset = sidecar::sum_offset(50 * 256);
    disk.inject(Fault::Unreadable { path: path.into(), offset, length: 1024 });
    let zero = Some(Lsn::ZERO);
    assert_eq!(opened(&disk).births(49, 52), [zero, None, zero]);
}

#[test]
fn a_torn_slot_is_found_counts_as_changed_and_as_data() {
    let disk = disk();
    let base = created(&disk, 10 * CHUNK_BYTES);
    write(&base, 2 * 256, 1, 1, 500);
    base.sync().unwrap();
    assert_eq!(base.check(0, 10 * CHUNK_BYTES), Ok(CHUNK_BYTES));
    // The slot of chunk 2, then the sums of chunk 2.
    for place in [sidecar::slot_offset(2) + 3, sidecar::sum_offset(2 * 256 + 99)] {
        let disk = disk.snapshot();
        disk.damage(Path::new("/base/3.sum"), place, 1, 0x40);
        let base = opened(&disk);
        let offset = 2 * CHUNK_BYTES;
        assert_eq!(
            base.check(0, 10 * CHUNK_BYTES),
            Err(BaseError::Sidecar { volume: NUMBER, offset })
        );
        let data = base.allocation(0, 10 * CHUNK_BYTES, 99);
        assert!(data.contains(&(offset, CHUNK_BYTES, true)), "{data:?}");
        assert!(read(&base, 2 * CHUNK_BYTES, 4096).is_ok(), "the block has its own sum");
        if place == sidecar::slot_offset(2) + 3 {
            assert_eq!(base.born_since(Lsn(5000)), [(offset, CHUNK_BYTES)]);
        }
    }
}

#[test]
fn blocks_with_the_sum_of_zeros_are_still_data() {
    let disk = disk();
    let base = created(&disk, 2 * CHUNK_BYTES);
    // CRC-32 is linear: four bytes at the end bring any block to a wanted sum.
    let mut block = vec![0u8; 4096];
    block[0] = 1;
    let wanted = sidecar::ZERO_BLOCK_CRC;
    let mut columns = Vec::new();
    let base_crc = crc32fast::hash(&block);
    for bit in 0..32 {
        let mut other = block.clone();
        other[4092 + bit / 8] ^= 1 << (bit % 8);
        columns.push((crc32fast::hash(&other) ^ base_crc, 1u32 << bit));
    }
    let mut rest = base_crc ^ wanted;
    let mut solution = 0;
    let mut pivots: Vec<(u32, u32)> = Vec::new();
    for (mut effect, mut bits) in columns {
        for (pivot, pivot_bits) in &pivots {
            if effect ^ pivot < effect {
                (effect, bits) = (effect ^ pivot, bits ^ pivot_bits);
            }
        }
        if effect != 0 {
            pivots.push((effect, bits));
            pivots.sort_by(|one, other| other.cmp(one));
        }
    }
    for (pivot, bits) in &pivots {
        if rest ^ pivot < rest {
            (rest, solution) = (rest ^ pivot, solution ^ bits);
        }
    }
    for bit in 0..32 {
        if solution >> bit & 1 == 1 {
            block[4092 + bit / 8] ^= 1 << (bit % 8);
        }
    }
    assert_eq!(crc32fast::hash(&block), wanted, "the block has the sum of zeros");
    base.write_blocks(8192, &block, &[wanted], Lsn(500)).unwrap();
    base.sync().unwrap();
    let runs = base.allocation(0, 2 * CHUNK_BYTES, 99);
    assert_eq!(runs, [(0, CHUNK_BYTES, true), (CHUNK_BYTES, CHUNK_BYTES, false)]);
    assert_eq!(read(&base, 8192, 4096).unwrap(), block);
}

#[test]
fn what_a_smaller_size_cut_off_reads_as_zeros_when_it_grows_again() {
    let disk = disk();
    let base = created(&disk, 600 * CHUNK_BYTES);
    for chunk in [0, 1, 255, 256, 300, 511, 512, 599] {
        write(&base, chunk * 256, 256, 1, 500);
    }
    for size in [512 * CHUNK_BYTES, 300 * CHUNK_BYTES + 40_960, CHUNK_BYTES + 4096] {
        base.resize(size).unwrap();
        base.resize(600 * CHUNK_BYTES).unwrap();
        base.sync().unwrap();
        let chunk = size / CHUNK_BYTES;
        let (data, _) = blocks(chunk * 256, size % CHUNK_BYTES / 4096, 1);
        let got = read(&base, chunk * CHUNK_BYTES, CHUNK_BYTES as usize).unwrap();
        assert_eq!(got[..data.len()], data);
        assert!(got[data.len()..].iter().all(|byte| *byte == 0));
        base.check(0, 600 * CHUNK_BYTES).unwrap();
        let last = base.allocation(0, 600 * CHUNK_BYTES, 9999).pop().unwrap();
        assert_eq!((last.1 + last.0, last.2), (600 * CHUNK_BYTES, false));
        assert!(last.0 <= size);
    }
}

#[test]
fn a_fold_that_crashed_is_right_when_it_is_done_again() {
    let original = disk();
    let base = created(&original, 300 * CHUNK_BYTES);
    write(&base, 0, 300, 1, 500);
    write(&base, 255 * 256, 300, 1, 500);
    base.sync().unwrap();
    let fold = |base: &BaseVolume| -> std::io::Result<()> {
        let (data, crcs) = blocks(5, 3, 2);
        base.write_blocks(5 * 4096, &data, &crcs, Lsn(900))?;
        let (data, crcs) = blocks(250, 20, 2);
        base.write_blocks(250 * 4096, &data, &crcs, Lsn(900))?;
        base.zero_blocks(290 * 4096, 65_400 * 4096, Lsn(900))?;
        let (data, crcs) = blocks(65_700, 9, 2);
        base.write_blocks(65_700 * 4096, &data, &crcs, Lsn(900))?;
        base.sync()
    };
    let expect = |base: &BaseVolume| {
        for (first, count, version) in
            [(0, 5, 1), (5, 3, 2), (8, 242, 1), (250, 20, 2), (270, 20, 1), (65_700, 9, 2)]
        {
            let got = read(base, first * 4096, count as usize * 4096);
            assert_eq!(got.unwrap(), blocks(first, count, version).0, "from block {first}");
        }
        let zeros = read(base, 290 * 4096, 10 << 20).unwrap();
        assert!(zeros.iter().all(|byte| *byte == 0));
        assert_eq!(base.born_since(Lsn(900)).len(), 1);
        base.check(0, 300 * CHUNK_BYTES).unwrap();
    };
    let mut torn = 0;
    for operation in 0.. {
        let disk = original.snapshot();
        let base = opened(&disk);
        disk.inject(Fault::PowerOff { operation: disk.operations() + operation });
        let finished = fold(&base).is_ok();
        for seed in 0..12 {
            let after = disk.crash(seed);
            let base = opened(&after);
            // What the fold does not touch reads right at any time.
            let untouched = read(&base, 10 * 4096, 200 * 4096).unwrap();
            assert_eq!(untouched, blocks(10, 200, 1).0);
            torn += u64::from(base.check(0, 300 * CHUNK_BYTES).is_err());
            fold(&base).unwrap();
            expect(&base);
            expect(&opened(&after.crash(seed)));
        }
        if finished {
            break;
        }
    }
    assert!(torn > 20, "only {torn} crashes left anything torn");
}
