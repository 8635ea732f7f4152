//! What time it is: the wall, which people set, and the monotonic clock, which nobody can.

use std::sync::Mutex;
use std::time::Duration;

use crate::units::LogTime;

/// The door to time.
pub trait Clock: Send + Sync {
    /// Wall-clock time; may jump.
    fn wall(&self) -> LogTime;
    /// Time since some fixed moment of this process; never runs backwards.
    fn monotonic(&self) -> Duration;
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
}

/// A clock that a test or the simulation sets.
pub struct ManualClock {
    state: Mutex<(LogTime, Duration)>,
}

impl ManualClock {
    /// A clock that shows `wall` and zero monotonic time.
    #[must_use]
    pub fn new(wall: LogTime) -> ManualClock {
        ManualClock { state: Mutex::new((wall, Duration::ZERO)) }
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
}

impl Clock for ManualClock {
    fn wall(&self) -> LogTime {
        self.state.lock().expect("no holder panics").0
    }

    fn monotonic(&self) -> Duration {
        self.state.lock().expect("no holder panics").1
    }
}
