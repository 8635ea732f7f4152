//! What this node says of itself: how busy its CPUs are and how much memory is left, read from the
//! kernel. It tells facts; who asks and why is not its matter.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Duration;

/// How busy the node is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Percent of all CPUs' time that was busy over the window; none before two samples.
    pub cpu_percent: Option<f64>,
    /// Bytes that programs can still get.
    pub memory_free_bytes: Option<u64>,
}

/// Ticks of all CPUs since boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ticks {
    busy: u64,
    total: u64,
}

/// Samples older than this no longer count.
const WINDOW: Duration = Duration::from_secs(10);

/// Measures the load over the last ten seconds, as far as it is asked that often.
#[derive(Default)]
pub struct LoadMeter {
    samples: Mutex<VecDeque<(Duration, Ticks)>>,
}

impl LoadMeter {
    /// A meter without samples.
    #[must_use]
    pub fn new() -> LoadMeter {
        LoadMeter::default()
    }

    /// Takes a sample at `now` on the monotonic clock, and tells the load since the oldest sample
    /// of the window.
    #[must_use]
    pub fn measure(&self, now: Duration) -> Load {
        let memory_free_bytes =
            std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| available_bytes(&text));
        let ticks = std::fs::read_to_string("/proc/stat").ok().and_then(|text| parse_ticks(&text));
        let cpu_percent = ticks.and_then(|ticks| self.busy_percent(now, ticks));
        Load { cpu_percent, memory_free_bytes }
    }

    fn busy_percent(&self, now: Duration, ticks: Ticks) -> Option<f64> {
        let mut samples = self.samples.lock().expect("no holder panics");
        while samples.len() > 1 && now.saturating_sub(samples[0].0) > WINDOW {
            samples.pop_front();
        }
        let oldest = samples.front().map(|(_, ticks)| *ticks);
        samples.push_back((now, ticks));
        let oldest = oldest?;
        let total = ticks.total.checked_sub(oldest.total).filter(|total| *total > 0)?;
        let busy = ticks.busy.saturating_sub(oldest.busy);
        Some((busy as f64 * 100.0 / total as f64).min(100.0))
    }
}

/// The first line of `/proc/stat`: user, nice, system, idle, iowait, irq, softirq, steal, …
fn parse_ticks(text: &str) -> Option<Ticks> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
    // Guest time is part of user time.
    let counted = fields.get(..8)?;
    let total = counted.iter().sum();
    let idle = counted[3] + counted[4];
    Some(Ticks { busy: total - idle, total })
}

/// `MemAvailable` of `/proc/meminfo`.
fn available_bytes(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_load_and_memory() {
        let meter = LoadMeter::new();
        let first = meter.measure(Duration::ZERO);
        assert_eq!(first.cpu_percent, None, "one sample is no interval");
        assert!(first.memory_free_bytes.expect("Linux tells") > 0);
    }

    #[test]
    fn busy_is_what_was_neither_idle_nor_waiting_within_the_window() {
        let meter = LoadMeter::new();
        let seconds = Duration::from_secs;
        let at = |busy, total| Ticks { busy, total };
        assert_eq!(meter.busy_percent(seconds(0), at(0, 100)), None);
        assert_eq!(meter.busy_percent(seconds(5), at(50, 200)), Some(50.0));
        assert_eq!(meter.busy_percent(seconds(11), at(50, 300)), Some(0.0), "since second 5");
        assert_eq!(meter.busy_percent(seconds(11), at(50, 300)), Some(0.0), "no time went by");
    }

    #[test]
    fn kernel_text_is_read_by_its_fields() {
        let text = "cpu  100 5 20 300 50 1 2 3 99 0\ncpu0 1 2 3 4\n";
        assert_eq!(parse_ticks(text), Some(Ticks { busy: 131, total: 481 }));
        assert_eq!(parse_ticks("cpu  1 2"), None);
        assert_eq!(parse_ticks(""), None);
        assert_eq!(available_bytes("MemFree: 1 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        assert_eq!(available_bytes("MemAvailable: many"), None);
    }
}
