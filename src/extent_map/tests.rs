//! The map against a naive model, and what it may cost.

use proptest::prelude::*;

use super::*;

/// The model's window lies around a border of regions, so that every kind of edge is in it.
const WINDOW_START: u64 = REGION_BYTES - 2 * CHUNK_BYTES - 16 * BLOCK_BYTES;
const WINDOW_SECTORS: usize = 4 * SECTORS_PER_CHUNK;

#[derive(Clone, Debug)]
enum Step {
    /// In sectors of the window.
    Write {
        first: usize,
        count: usize,
    },
    Zero {
        first: usize,
        count: usize,
        hole: bool,
    },
    /// In chunks; reaches far beyond the window.
    ZeroChunks {
        first: u64,
        count: u64,
    },
    /// A share of the steps so far, in 256ths: the target is the position of that step's change.
    Forget {
        share: u64,
        steps: usize,
    },
    Truncate {
        blocks: u64,
    },
    Clone,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = 0..WINDOW_SECTORS;
    let near = 0..64usize;
    let length = prop_oneof![1..9usize, 1..9usize, Just(8), 1..300usize, 1..WINDOW_SECTORS];
    let small = (near, 1..20usize);
    let ranges = prop_oneof![
        (place, length).boxed(),
        small.boxed(),
        ((0..WINDOW_SECTORS / 8).prop_map(|block| block * 8), (1..40usize).prop_map(|n| n * 8))
            .boxed(),
    ];
    let step = prop_oneof![
        8 => ranges.clone().prop_map(|(first, count)| Step::Write { first, count }),
        3 => (ranges, any::<bool>())
            .prop_map(|((first, count), hole)| Step::Zero { first, count, hole }),
        1 => (0..3000u64, 1..2000u64).prop_map(|(first, count)| Step::ZeroChunks { first, count }),
        1 => (0..256u64, 1..5usize).prop_map(|(share, steps)| Step::Forget { share, steps }),
        1 => (0..(WINDOW_SECTORS / 8) as u64).prop_map(|blocks| Step::Truncate { blocks }),
        1 => Just(Step::Clone),
    ];
    prop::collection::vec(step, 1..40)
}

/// One source per sector of the window.
#[derive(Clone)]
struct Model {
    sectors: Vec<Source>,
}

fn position_of(source: &Source) -> Option<Lsn> {
    match source {
        Source::Base => None,
        Source::Zero { since, .. } => Some(*since),
        Source::Log { piece, .. } => Some(*piece),
    }
}

impl Model {
    fn new() -> Model {
        Model { sectors: vec![Source::Base; WINDOW_SECTORS] }
    }

    fn write(&mut self, first: usize, count: usize, payload: u64, crcs: &[u32]) {
        let offset = WINDOW_START / 512 + first as u64;
        for index in 0..count {
            let sector = offset + index as u64;
            let block = sector / 8;
            let piece_first = (block * 8).max(offset);
            let piece_end = ((block + 1) * 8).min(offset + count as u64);
            self.sectors[first + index] = Source::Log {
                piece: Lsn(payload + (piece_first - offset) * 512),
                piece_bytes: (piece_end - piece_first) as u32 * 512,
                skip: (sector - piece_first) as u32 * 512,
                crc: crcs[(block - offset / 8) as usize],
            };
        }
    }

    fn fill(&mut self, from: u64, to: u64, source: Source) {
        for (index, sector) in self.sectors.iter_mut().enumerate() {
            let offset = WINDOW_START + index as u64 * 512;
            if (from..to).contains(&offset) {
                *sector = source;
            }
        }
    }

    fn forget_below(&mut self, target: Lsn) {
        for sector in &mut self.sectors {
            if position_of(sector).is_some_and(|position| position < target) {
                *sector = Source::Base;
            }
        }
    }
}

/// The pieces as one source per sector; checks that they are in order and without gaps.
fn spread(pieces: &[Piece], offset: u64) -> Vec<Source> {
    let mut sectors = Vec::new();
    let mut position = offset;
    for piece in pieces {
        assert_eq!(piece.offset, position, "a gap or an overlap");
        assert!(piece.length > 0 && piece.length.is_multiple_of(512));
        for within in (0..piece.length).step_by(512) {
            sectors.push(match piece.source {
                Source::Log { piece, piece_bytes, skip, crc } => {
                    let skip = skip + within as u32;
                    assert!(skip < piece_bytes);
                    Source::Log { piece, piece_bytes, skip, crc }
                }
                other => other,
            });
        }
        position += piece.length;
    }
    sectors
}

fn compare(map: &ExtentMap, model: &Model, positions: &[u64]) {
    let mut pieces = Vec::new();
    map.lookup(WINDOW_START, WINDOW_SECTORS as u64 * 512, &mut pieces);
    assert_eq!(spread(&pieces, WINDOW_START), model.sectors);
    for pair in pieces.windows(2) {
        assert!(join(&pair[0], &pair[1]).is_none(), "neighbours that are one: {pair:?}");
    }
    // A narrow look begins and ends inside of pieces.
    for (first, count) in [(1, 1), (3, 30), (500, 4000), (WINDOW_SECTORS - 9, 9)] {
        pieces.clear();
        let offset = WINDOW_START + first as u64 * 512;
        map.lookup(offset, count as u64 * 512, &mut pieces);
        assert_eq!(spread(&pieces, offset), model.sectors[first..first + count]);
    }
    let window = |from: u64, length: u64| {
        let behind = WINDOW_START + WINDOW_SECTORS as u64 * 512;
        let (from, to) = (from.max(WINDOW_START), (from + length).min(behind));
        (from..to.max(from)).step_by(512).map(|offset| ((offset - WINDOW_START) / 512) as usize)
    };
    let mut known = vec![false; WINDOW_SECTORS];
    let mut last_end = 0;
    for piece in map.pieces() {
        assert!(piece.offset >= last_end && piece.source != Source::Base);
        last_end = piece.offset + piece.length;
        window(piece.offset, piece.length).for_each(|index| known[index] = true);
    }
    let expected: Vec<bool> = model.sectors.iter().map(|s| *s != Source::Base).collect();
    assert_eq!(known, expected, "pieces()");
    for since in [0, positions.len() / 3, positions.len() / 2, positions.len() - 1] {
        let since = positions[since];
        let mut changed = vec![false; WINDOW_SECTORS];
        for (offset, length) in map.changed_since(Lsn(since)) {
            window(offset, length).for_each(|index| changed[index] = true);
        }
        let expected: Vec<bool> = model
            .sectors
            .iter()
            .map(|source| position_of(source).is_some_and(|position| position.0 >= since))
            .collect();
        assert_eq!(changed, expected, "changed_since({since})");
    }
}

fn run(steps: &[Step]) {
    let (mut map, mut model) = (ExtentMap::new(), Model::new());
    let mut clones: Vec<(ExtentMap, Model)> = Vec::new();
    let mut head = 4096;
    let mut crc = 0u32;
    let mut positions = vec![0];
    for step in steps {
        match *step {
            Step::Write { first, count } => {
                let count = count.min(WINDOW_SECTORS - first);
                let blocks = (first + count).div_ceil(8) - first / 8;
                let crcs: Vec<u32> = (0..blocks as u32).map(|index| crc + index).collect();
                crc += blocks as u32;
                let offset = WINDOW_START + first as u64 * 512;
                map.write(offset, Lsn(head + 100), count as u64 * 512, &crcs);
                model.write(first, count, head + 100, &crcs);
                positions.push(head + 100);
                head += 100 + count as u64 * 512;
            }
            Step::Zero { first, count, hole } => {
                let count = count.min(WINDOW_SECTORS - first);
                let offset = WINDOW_START + first as u64 * 512;
                let end = offset + count as u64 * 512;
                drop(map.zero(offset, end - offset, Lsn(head), hole));
                model.fill(offset, end, Source::Zero { since: Lsn(head), hole });
                positions.push(head);
                head += 96;
            }
            Step::ZeroChunks { first, count } => {
                let (from, to) = (first * CHUNK_BYTES, (first + count) * CHUNK_BYTES);
                drop(map.zero(from, to - from, Lsn(head), true));
                model.fill(from, to, Source::Zero { since: Lsn(head), hole: true });
                positions.push(head);
                head += 96;
            }
            Step::Forget { share, steps } => {
                let target = Lsn(positions[positions.len() * share as usize / 256]);
                let mut from = Some(0);
                while let Some(offset) = from {
                    from = map.forget_some(target, offset, steps).1;
                }
                model.forget_below(target);
            }
            Step::Truncate { blocks } => {
                let size = WINDOW_START + blocks * 4096;
                drop(map.truncate(size));
                model.fill(size, u64::MAX, Source::Base);
            }
            Step::Clone => clones.push((map.clone(), model.clone())),
        }
    }
    compare(&map, &model, &positions);
    for (map, model) in &clones {
        compare(map, model, &positions);
    }
    drop(map.forget_below(Lsn(head)));
    assert!(map.is_empty(), "{} extents are left", map.extents());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..Default::default()
    })]

    #[test]
    fn the_map_and_its_clones_equal_the_model(steps in steps()) {
        run(&steps);
    }
}

#[test]
fn a_dense_block_takes_at_most_16_bytes() {
    let mut map = ExtentMap::new();
    let blocks = 256 * 1024;
    // Not in order, as a host writes.
    for index in 0..blocks {
        let block = index * 40_503 % blocks;
        map.write(block * 4096, Lsn(index * 4200), 4096, &[index as u32]);
    }
    assert_eq!(map.extents(), blocks);
    let per_block = map.memory_bytes() as f64 / blocks as f64;
    assert!(per_block <= 16.0, "{per_block} bytes a block");
}

#[test]
fn a_block_in_sectors_takes_at_most_128_bytes() {
    let mut map = ExtentMap::new();
    let blocks = 16 * 256;
    for sector in 0..8 {
        for block in 0..blocks {
            let position = (sector * blocks + block) * 608;
            map.write(block * 4096 + sector * 512, Lsn(position), 512, &[block as u32]);
        }
    }
    assert_eq!(map.extents(), blocks);
    let per_block = map.memory_bytes() as f64 / blocks as f64;
    assert!(per_block <= 128.0, "{per_block} bytes a block");
    // Written whole again they are blocks as others.
    for block in 0..blocks {
        map.write(block * 4096, Lsn((1 << 30) + block * 4200), 4096, &[1]);
    }
    let per_block = map.memory_bytes() as f64 / blocks as f64;
    assert!(per_block <= 16.0, "{per_block} bytes a block afterwards");
}

#[test]
fn a_trim_of_16_tib_is_one_mark_and_frees_all() {
    let mut map = ExtentMap::new();
    for index in 0..1000 {
        map.write(index * (3 << 30), Lsn(index * 4200), 4096, &[7]);
    }
    let size = 16 << 40;
    let freed = map.zero(0, size, Lsn(1 << 40), true);
    assert_eq!(map.extents(), 1);
    let few = map.memory_bytes();
    assert!(few < 64 << 10, "{few} bytes");
    drop(freed);
    let source = Source::Zero { since: Lsn(1 << 40), hole: true };
    let pieces: Vec<Piece> = map.pieces().collect();
    assert_eq!(pieces, [Piece { offset: 0, length: size, source }]);
    // At any alignment it is a handful, and a write into it costs what it writes.
    drop(map.zero(512, size - 1024, Lsn((1 << 40) + 96), false));
    assert!(map.extents() < 2 * 256 + 8, "{} extents", map.extents());
    let before = map.memory_bytes();
    map.write(5 << 40, Lsn(1 << 41), 4096, &[9]);
    let more = map.memory_bytes() - before;
    assert!(more < 1024, "{more} bytes for one block");
}

#[test]
fn a_limited_lookup_says_where_it_ended() {
    let mut map = ExtentMap::new();
    for index in 0..10 {
        map.write(index * 8192, Lsn(4096 + index * 4200), 4096, &[1]);
    }
    let mut pieces = Vec::new();
    let end = map.lookup_some(0, 1 << 20, 5, &mut pieces);
    assert_eq!((pieces.len(), end), (5, 5 * 4096));
    let mut rest = Vec::new();
    assert_eq!(map.lookup_some(end, (1 << 20) - end, 100, &mut rest), 1 << 20);
    pieces.extend(rest);
    let mut all = Vec::new();
    map.lookup(0, 1 << 20, &mut all);
    assert_eq!(pieces, all);
}

#[test]
#[should_panic(expected = "one CRC per block")]
fn a_missing_crc_is_a_bug() {
    ExtentMap::new().write(512, Lsn(0), 4096, &[1]);
}
