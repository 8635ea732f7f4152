//! What tests of whole appliances share: the real binary as a process, its command line, waiting.

mod appliance;
pub mod faulty;
pub mod load;
pub mod long_log;
pub mod oracle;

use std::time::Duration;

use tidelog::io::{Clock, SystemClock};

pub use appliance::{Appliance, Setup, free_address};

/// How long a condition may take before a test gives up on it. Far above what a loaded machine
/// needs: a test fails by it only where the condition never comes.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Asks `condition` until it gives a value. The one place where tests wait on the world.
///
/// # Panics
///
/// When [`PATIENCE`] has passed; the message names `what`.
pub fn wait_for<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    wait_up_to(PATIENCE, what, condition)
}

/// The same for what comes late by itself.
pub fn wait_up_to<T>(
    patience: Duration,
    what: &str,
    mut condition: impl FnMut() -> Option<T>,
) -> T {
    let clock = SystemClock::new();
    let start = clock.monotonic();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        let waited = clock.monotonic() - start;
        assert!(waited < patience, "gave up after {} s waiting for {what}", waited.as_secs());
        pause(Duration::from_millis(10));
    }
}

/// Lets a poll rest.
#[expect(clippy::disallowed_methods, reason = "polling other processes is what this helper is for")]
pub fn pause(duration: Duration) {
    std::thread::sleep(duration);
}
