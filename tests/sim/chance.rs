//! Chance from one seed, a clock that the simulation sets, and the trace that proves both.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use tidelog::io::Clock;
use tidelog::units::LogTime;
use xxhash_rust::xxh3::Xxh3;

/// splitmix64.
#[derive(Clone)]
pub struct Chance(u64);

impl Chance {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Chance {
        Chance(seed)
    }

    /// Any number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number in `0..bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// True once in `count` times.
    pub fn one_in(&mut self, count: u64) -> bool {
        count > 0 && self.below(count) == 0
    }

    /// One of several.
    pub fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// A span up to `most`.
    pub fn up_to(&mut self, most: Duration) -> Duration {
        Duration::from_nanos(self.below(most.as_nanos() as u64 + 1))
    }
}

/// When the simulation begins, by the wall clock: nanoseconds since 1970.
pub const BEGIN: u64 = 1_700_000_270_000_000_000;

/// The clock of one node. Clones of the Arc `now` are the one simulated time of the world.
pub struct SimClock {
    now: Arc<AtomicU64>,
    /// By what the node's monotonic clock differs from the world's.
    offset: u64,
    /// By what its wall clock is off.
    wall: AtomicI64,
    boot: AtomicU64,
    booted: AtomicU64,
}

impl SimClock {
    /// A clock whose monotonic zero lies `offset` before the world's.
    pub fn new(now: Arc<AtomicU64>, offset: Duration, boot: u64) -> SimClock {
        let booted = AtomicU64::new(now.load(Ordering::Relaxed));
        let offset = offset.as_nanos() as u64;
        SimClock { now, offset, wall: AtomicI64::new(0), boot: AtomicU64::new(boot), booted }
    }

    /// Sets the wall clock ahead or back.
    pub fn jump(&self, nanoseconds: i64) {
        self.wall.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// The world's time.
    pub fn world(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    /// The machine has been started anew.
    pub fn reboot(&self) {
        self.boot.fetch_add(1, Ordering::Relaxed);
        self.booted.store(self.now.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

impl Clock for SimClock {
    fn wall(&self) -> LogTime {
        let now = BEGIN + self.now.load(Ordering::Relaxed);
        LogTime(now.saturating_add_signed(self.wall.load(Ordering::Relaxed)))
    }

    fn monotonic(&self) -> Duration {
        Duration::from_nanos(self.now.load(Ordering::Relaxed) + self.offset)
    }

    fn boot(&self) -> Option<u64> {
        Some(self.boot.load(Ordering::Relaxed))
    }

    fn since_boot(&self) -> Option<Duration> {
        let booted = self.booted.load(Ordering::Relaxed);
        Some(Duration::from_nanos(self.now.load(Ordering::Relaxed) - booted))
    }
}

/// Lines that a failure shows.
pub const LINES_SHOWN: usize = 40;

/// What happened, line by line: a hash of all of it, and its end.
pub struct Trace {
    hash: Xxh3,
    lines: VecDeque<String>,
    keep: usize,
    ordinal: u64,
    line: String,
}

impl Trace {
    /// An empty trace; `whole` keeps every line.
    pub fn new(whole: bool) -> Trace {
        let keep = if whole { usize::MAX } else { LINES_SHOWN };
        Trace {
            hash: Xxh3::new(),
            lines: VecDeque::new(),
            keep,
            ordinal: 0,
            line: String::with_capacity(256),
        }
    }

    /// Adds a line.
    pub fn add(&mut self, now: u64, text: std::fmt::Arguments<'_>) {
        let mut line = std::mem::take(&mut self.line);
        line.clear();
        self.ordinal += 1;
        let (seconds, micros) = (now / 1_000_000_000, now / 1000 % 1_000_000);
        let _ = write!(line, "{seconds:>4}.{micros:06} {:>6} {text}", self.ordinal);
        self.hash.update(line.as_bytes());
        self.hash.update(b"\n");
        self.lines.push_back(line);
        if self.lines.len() > self.keep {
            self.line = self.lines.pop_front().unwrap_or_default();
        }
    }

    /// Lines so far.
    pub fn ordinal(&self) -> u64 {
        self.ordinal
    }

    /// A hash of every byte of it.
    pub fn hash(&self) -> u64 {
        self.hash.digest()
    }

    /// The lines that are kept.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(String::as_str)
    }
}
