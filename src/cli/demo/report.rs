//! What the demo prints: numbered steps with their time, the commands it ran, what each proved.

use std::fmt::Display;
use std::io::Write;
use std::time::Duration;

use anyhow::ensure;
use tidelog::io::{Clock, SystemClock};

/// Counts steps and comparisons, and prints them as they happen.
pub struct Report {
    clock: SystemClock,
    step: Option<(u32, Duration)>,
    steps: u32,
    comparisons: u32,
}

impl Report {
    /// A report that starts now.
    pub fn new() -> Report {
        Report { clock: SystemClock::new(), step: None, steps: 0, comparisons: 0 }
    }

    /// Ends the step before and begins one.
    pub fn step(&mut self, title: &str) {
        self.end_step();
        self.steps += 1;
        self.step = Some((self.steps, self.clock.monotonic()));
        line(&format!("\n{:>2}. {title}", self.steps));
    }

    /// A command that was run, as one would type it.
    pub fn command(&self, node: &str, words: &str) {
        line(&format!("    {node}$ tidelog {words}"));
    }

    /// Something worth knowing.
    pub fn say(&self, text: impl Display) {
        line(&format!("    {text}"));
    }

    /// A comparison; the demo ends where it does not hold.
    pub fn prove(&mut self, holds: bool, what: impl Display) -> anyhow::Result<()> {
        ensure!(holds, "comparison failed: {what}");
        self.comparisons += 1;
        line(&format!("    ok: {what}"));
        Ok(())
    }

    /// The last lines.
    pub fn end(&mut self) {
        self.end_step();
        line(&format!(
            "\n{} steps, {} comparisons, all held, in {:.1} s",
            self.steps,
            self.comparisons,
            self.clock.monotonic().as_secs_f64()
        ));
    }

    fn end_step(&mut self) {
        if let Some((number, since)) = self.step.take() {
            let took = self.clock.monotonic().saturating_sub(since);
            line(&format!("    step {number} took {:.2} s", took.as_secs_f64()));
        }
    }
}

/// Prints a line; a reader that has gone is no failure of the demo.
pub fn line(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}
