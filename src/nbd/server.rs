//! What all connections share: of a listener its limits and whether it is on its way down, of all
//! listeners of a node the counters and the memory for large payloads.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::keepers::Keepers;
use super::wire::PAYLOAD_BYTES_MAX;

/// Limits of a server. Those of connections and of payloads hold for all listeners that share their
/// [`NbdCounters`].
#[derive(Clone, Debug)]
pub struct NbdLimits {
    /// Connections at once; one more is closed before its greeting.
    pub connections: usize,
    /// Bytes of payloads above 512 KiB that all connections hold at once; at least 32 MiB.
    pub payload_bytes: u64,
    /// How long a handshake may take.
    pub handshake_timeout: Duration,
    /// How long a payload above 512 KiB may take, beside a second for each MiB of it.
    pub payload_timeout: Duration,
    /// How long requests in flight may take at shutdown.
    pub drain_timeout: Duration,
}

impl Default for NbdLimits {
    fn default() -> NbdLimits {
        NbdLimits {
            connections: 256,
            payload_bytes: 256 << 20,
            handshake_timeout: Duration::from_secs(30),
            payload_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(10),
        }
    }
}

/// The slowest pace of a large payload, in bytes a second, beside its timeout. With the timeout of
/// 30 s the largest of 32 MiB may take 62 s, which a link of 5 Mbit/s keeps.
const PAYLOAD_PACE: u64 = 1 << 20;

impl NbdLimits {
    /// How long a payload of so many bytes may take as a whole: it holds a part of a budget that
    /// others wait for, however steadily its bytes drip in.
    pub(super) fn payload_time(&self, payload_bytes: u64) -> Duration {
        let pace = Duration::from_millis(payload_bytes.saturating_mul(1000) / PAYLOAD_PACE);
        self.payload_timeout.saturating_add(pace)
    }
}

/// A number that only its readers need to agree on in the end.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Adds one to what is below `limit`; whether it was.
    pub(super) fn add_below(&self, limit: u64) -> bool {
        let more = |count: u64| (count < limit).then_some(count + 1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// Takes from it.
    pub fn subtract(&self, count: u64) {
        self.0.fetch_sub(count, Ordering::Relaxed);
    }

    /// Its value.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the listeners of a node have done so far, and what they share.
#[derive(Debug, Default)]
pub struct NbdCounters {
    /// Connections now.
    pub connections: Counter,
    /// Connections ever.
    pub connections_total: Counter,
    /// Connections that were closed at once: not allowed, or too many.
    pub refused_total: Counter,
    /// Requests.
    pub requests: Counter,
    /// Requests that were answered with an error by this server's checks or by the engine.
    pub errors: Counter,
    /// Bytes read by clients.
    pub read_bytes: Counter,
    /// Bytes written by clients.
    pub written_bytes: Counter,
    /// Hosts that named themselves.
    pub(super) keepers: Keepers,
    /// Memory of large payloads.
    payloads: Budget,
}

/// What all connections of a listener share.
pub(super) struct Shared {
    pub(super) limits: NbdLimits,
    pub(super) counters: Arc<NbdCounters>,
    stopping: AtomicBool,
}

impl Shared {
    pub(super) fn new(limits: NbdLimits, counters: Arc<NbdCounters>) -> Shared {
        Shared { limits, counters, stopping: AtomicBool::new(false) }
    }

    /// Takes memory for a large payload, waiting for it; `None` where it is not free, and nobody
    /// wants it any more, which `ended` says.
    pub(super) fn take_memory(&self, bytes: u64, ended: &dyn Fn() -> bool) -> Option<Share<'_>> {
        let limit = self.limits.payload_bytes.max(u64::from(PAYLOAD_BYTES_MAX));
        self.counters.payloads.take(bytes, limit, ended)
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }
}

/// How often who waits for a part of the budget, or to answer, looks whether anybody wants it;
/// short against the 15 s that a host's next connection waits for the end of this one.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Bytes in use, of so many that may be at once.
#[derive(Debug, Default)]
struct Budget {
    used: Mutex<u64>,
    freed: Condvar,
}

/// A part of a budget, given back when dropped.
pub(super) struct Share<'a> {
    budget: &'a Budget,
    bytes: u64,
}

impl Budget {
    fn take(&self, bytes: u64, limit: u64, ended: &dyn Fn() -> bool) -> Option<Share<'_>> {
        let mut used = self.used.lock().expect("no holder panics");
        while *used + bytes > limit {
            if ended() {
                return None;
            }
            used = self.freed.wait_timeout(used, LOOK_EVERY).expect("no holder panics").0;
        }
        *used += bytes;
        Some(Share { budget: self, bytes })
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        *self.budget.used.lock().expect("no holder panics") -= self.bytes;
        self.budget.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_may_take_the_timeout_and_a_second_for_each_mebibyte() {
        let limits = NbdLimits { payload_timeout: Duration::from_secs(7), ..NbdLimits::default() };
        assert_eq!(limits.payload_time(3 << 19), Duration::from_millis(8500));
        assert_eq!(limits.payload_time(u64::from(PAYLOAD_BYTES_MAX)), Duration::from_secs(39));
    }

    #[test]
    fn who_waits_for_a_part_of_the_budget_gets_it_once_it_is_free_or_leaves_without() {
        let budget = Budget::default();
        let all = budget.take(10, 10, &|| true);
        assert!(all.is_some(), "what is free is not waited for");
        let gone = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let leaves =
                scope.spawn(|| budget.take(5, 10, &|| gone.load(Ordering::Relaxed)).is_some());
            let stays = scope.spawn(|| budget.take(5, 10, &|| false).is_some());
            gone.store(true, Ordering::Relaxed);
            assert!(!leaves.join().unwrap());
            drop(all);
            assert!(stays.join().unwrap());
        });
        assert!(budget.take(10, 10, &|| true).is_some(), "all of it was given back");
    }
}
