//! What a write, a look-up and a clone of the extent map cost, in nanoseconds an operation:
//! `cargo bench --bench extent_map`. The map is under the group's mutex, so that these are parts of
//! the critical section.

#![allow(clippy::print_stdout, reason = "a bench prints what it measured")]

use std::hint::black_box;

use tidelog::extent_map::ExtentMap;
use tidelog::io::{Clock, SystemClock};
use tidelog::units::Lsn;

const BLOCK: u64 = 4096;

/// Runs `operation` for each number below `count`, and prints what one takes.
fn measure(what: &str, count: u64, mut operation: impl FnMut(u64)) {
    let clock = SystemClock::new();
    let begun = clock.monotonic();
    for index in 0..count {
        operation(index);
    }
    let taken = clock.monotonic() - begun;
    println!("{what:<52} {:>10.0} ns", taken.as_nanos() as f64 / count as f64);
}

/// A block of `blocks`, in an order that visits all of them without a pattern.
fn scattered(index: u64, blocks: u64) -> u64 {
    index.wrapping_mul(0x9e37_79b9_7f4a_7c15) % blocks
}

fn main() {
    let dense = (1 << 30) / BLOCK;
    let mut map = ExtentMap::new();
    measure("first write of 4 KiB, random, 1 GiB", dense, |index| {
        let block = index * 40_503 % dense;
        map.write(block * BLOCK, Lsn(index * 4200), BLOCK, &[index as u32]);
    });
    println!("{:<52} {:>10.1} bytes", "  memory a block", map.memory_bytes() as f64 / dense as f64);
    measure("overwrite of 4 KiB, random, 1 GiB", 1 << 20, |index| {
        let block = scattered(index, dense);
        map.write(block * BLOCK, Lsn((1 << 40) + index * 4200), BLOCK, &[index as u32]);
    });
    measure("overwrite of 128 KiB, random, 1 GiB", 1 << 16, |index| {
        let offset = scattered(index, dense / 32) * 32 * BLOCK;
        map.write(offset, Lsn((2 << 40) + index * 132_000), 32 * BLOCK, &[index as u32; 32]);
    });
    let mut pieces = Vec::new();
    measure("look-up of 4 KiB, random, 1 GiB", 1 << 20, |index| {
        pieces.clear();
        map.lookup(scattered(index, dense) * BLOCK, BLOCK, &mut pieces);
        black_box(&pieces);
    });
    measure("look-up of 128 KiB in 32 pieces", 1 << 17, |index| {
        pieces.clear();
        map.lookup(scattered(index, dense / 32) * 32 * BLOCK, 32 * BLOCK, &mut pieces);
        black_box(&pieces);
    });
    measure("clone, and a write into the original", 1 << 12, |index| {
        let image = map.clone();
        map.write(scattered(index, dense) * BLOCK, Lsn((3 << 40) + index * 4200), BLOCK, &[1]);
        black_box(image);
    });
    measure("changed_since, 1 GiB dense", 16, |_| {
        black_box(map.changed_since(Lsn(3 << 40)));
    });
    measure("forget_below, half of 1 GiB dense", 1, |_| drop(map.forget_below(Lsn(2 << 40))));

    let mut sparse = ExtentMap::new();
    let blocks = (1 << 40) / BLOCK;
    measure("first write of 4 KiB, random, 1 TiB", 1 << 19, |index| {
        let block = scattered(index, blocks);
        sparse.write(block * BLOCK, Lsn(index * 4200), BLOCK, &[index as u32]);
    });
    let extents = sparse.extents() as f64;
    println!("{:<52} {:>10.1} bytes", "  memory a block", sparse.memory_bytes() as f64 / extents);
    let mut freed = None;
    measure("trim of 1 TiB with 2^19 blocks in it, under the lock", 1, |_| {
        freed = Some(sparse.zero(0, 1 << 40, Lsn(4 << 40), true));
    });
    measure("  and the drop of what it freed, outside", 1, |_| drop(freed.take()));

    let mut sectors = ExtentMap::new();
    measure("write of 512 bytes, random, 64 MiB", 1 << 19, |index| {
        let sector = scattered(index, (64 << 20) / 512);
        sectors.write(sector * 512, Lsn(index * 608), 512, &[index as u32]);
    });
    let extents = sectors.extents() as f64;
    println!("{:<52} {:>10.1} bytes", "  memory a block", sectors.memory_bytes() as f64 / extents);
}
