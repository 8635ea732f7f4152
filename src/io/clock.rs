//! What time it is: the wall, which people set, the monotonic clock, which nobody can, and the
//! boot's own clock, which goes on from one process to the next.

use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use crate::units::LogTime;

/// The door to time.
pub trait Clock: Send + Sync {
    /// Wall-clock time; may jump.
    fn wall(&self) -> LogTime;
    /// Time since some fixed moment of this process; never runs backwards.
    fn monotonic(&self) -> Duration;
    /// A number of this boot of the machine: while it is the same, the page cache has lost nothing
    /// but what a disk that failed did not take.
    /// `None` where that cannot be told.
    fn boot(&self) -> Option<u64>;
    /// Time since the machine was started, with what it slept; nobody can set it. `None` where that
    /// cannot be told.
    fn since_boot(&self) -> Option<Duration> {
        None
    }
}

/// Time since the start as `/proc/uptime` tells it: seconds with two decimals.
fn read_uptime(text: &str) -> Option<Duration> {
    let seconds: f64 = text.split_whitespace().next()?.parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// The system's clocks.
pub struct SystemClock {
    started: std::time::Instant,
}

impl SystemClock {
    /// A clock whose monotonic zero is now.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "this is the door")]
    pub fn new() -> SystemClock {
        SystemClock { started: std::time::Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> SystemClock {
        SystemClock::new()
    }
}

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the door")]
    fn wall(&self) -> LogTime {
        let since = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or(Duration::ZERO);
        LogTime(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }

    fn monotonic(&self) -> Duration {
        self.started.elapsed()
    }

    fn boot(&self) -> Option<u64> {
        static BOOT: OnceLock<Option<u64>> = OnceLock::new();
        *BOOT.get_or_init(|| {
            let id = std::fs::read("/proc/sys/kernel/random/boot_id").ok()?;
            Some(xxhash_rust::xxh3::xxh3_64(&id).max(1))
        })
    }

    fn since_boot(&self) -> Option<Duration> {
        read_uptime(&std::fs::read_to_string("/proc/uptime").ok()?)
    }
}

/// A clock that a test or the simulation sets.
pub struct ManualClock {
    state: Mutex<(LogTime, Duration)>,
    /// The boot, and the monotonic clock when it began.
    boot: Mutex<Option<(u64, Duration)>>,
}

impl ManualClock {
    /// A clock that shows `wall` and zero monotonic time.
    #[must_use]
    pub fn new(wall: LogTime) -> ManualClock {
        ManualClock { state: Mutex::new((wall, Duration::ZERO)), boot: Mutex::new(None) }
    }

    /// Lets time pass on both clocks.
    pub fn advance(&self, by: Duration) {
        let mut state = self.state.lock().expect("no holder panics");
        *state = (state.0.after(by), state.1 + by);
    }

    /// Sets the wall clock alone, as an operator or NTP would.
    pub fn set_wall(&self, wall: LogTime) {
        self.state.lock().expect("no holder panics").0 = wall;
    }

    /// Tells which boot of the machine this is; unknown until it is told.
    pub fn set_boot(&self, boot: u64) {
        *self.boot.lock().expect("no holder panics") = Some((boot, self.monotonic()));
    }
}

impl Clock for ManualClock {
    fn wall(&self) -> LogTime {
        self.state.lock().expect("no holder panics").0
    }

    fn monotonic(&self) -> Duration {
        self.state.lock().expect("no holder panics").1
    }
    fn boot(&self) -> Option<u64> {
        self.boot.lock().expect("no holder panics").map(|(boot, _)| boot)
    }

    fn since_boot(&self) -> Option<Duration> {
        let (_, begun) = (*self.boot.lock().expect("no holder panics"))?;
        Some(self.monotonic().saturating_sub(begun))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_since_the_boot_is_what_the_kernel_tells() {
        assert_eq!(read_uptime("12.34 56.78\n"), Some(Duration::from_millis(12_340)));
        for wrong in ["", "-1.0", "nan", "1e400"] {
            assert_eq!(read_uptime(wrong), None, "{wrong:?}");
        }
        let clock = SystemClock::new();
        if let (Some(first), Some(second)) = (clock.since_boot(), clock.since_boot()) {
            assert!(first <= second);
        }
    }
}
