//! The simulation: appliances, hosts, disks, network and time under one seed.
//!
//!     scripts/sim --seed N              replays one history, and shows its trace if it fails
//!     scripts/sim --seed N --seeds M    plays M histories from seed N on
//!     --jobs J                          on J threads; each history is one thread's
//!     --trace                           prints the whole trace of one history
//!
//! Without arguments it plays what `scripts/test` asks of it. A failure prints its seed and the end
//! of its trace, and replays exactly, which each run tries first with a history that is made to
//! fail; some seeds of each run are played twice, and must give the same bytes of trace.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program of its own")]

mod alarms;
mod backups;
mod bulk;
mod chance;
mod checks;
mod coverage;
mod damage;
mod event;
mod hosts;
mod members;
mod modes;
mod network;
mod node;
mod oracle;
mod reach;
mod repairs;
mod rewinds;
mod story;
mod switchover;
mod world;

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use chance::{LINES_SHOWN, Trace};
use coverage::Coverage;

/// Histories that a test run plays.
const TEST_SEEDS: u64 = 200;
/// Every so many histories are played twice.
const TWICE_EVERY: u64 = 50;
/// Failures after which a run ends.
const FAILURES_MAX: usize = 20;
/// A history takes a moment: one that has not ended by then waits for what never comes.
const HANGS_AFTER: Duration = Duration::from_secs(120);

/// Seeds that found something, each with what it was: they are played first in every run.
const KEPT: &[(u64, &str)] = &[
    (300_068_784, "a torn branch, whose own history was lost, behind a fold and a restart"),
    (700_905_235, "a member's record that is put while a switchover has halted writers"),
];

thread_local! {
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

struct Options {
    seed: u64,
    seeds: u64,
    jobs: u64,
    trace: bool,
    test: bool,
}

fn options() -> Result<Option<Options>, String> {
    let mut options = Options { seed: 1, seeds: 1, jobs: 1, trace: false, test: true };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = |what: &str| -> Result<u64, String> {
            let text = arguments.next().ok_or(format!("{what}: a number is missing"))?;
            text.parse().map_err(|_| format!("{what}: got `{text}`, expected a number"))
        };
        match argument.as_str() {
            "--seed" => (options.seed, options.test) = (number("--seed")?, false),
            "--seeds" => (options.seeds, options.test) = (number("--seeds")?, false),
            "--jobs" => options.jobs = number("--jobs")?.max(1),
            "--trace" => options.trace = true,
            // What test runners ask and say.
            "--list" => return Ok(None),
            "--format" => drop(arguments.next()),
            "--exact" | "--nocapture" | "--ignored" | "histories" | "-q" | "--quiet" => {}
            other => return Err(format!("{other}: unknown; see the head of tests/sim/main.rs")),
        }
    }
    if options.test {
        options.seeds = TEST_SEEDS;
    }
    Ok(Some(options))
}

/// A played history.
struct Played {
    coverage: Coverage,
    hash: u64,
    lines: u64,
    failure: Option<String>,
}

fn play(seed: u64, whole: bool) -> Played {
    play_until(seed, None, whole)
}

/// Plays a history that is made to fail at a step, where one is given.
fn play_until(seed: u64, fails_at: Option<u64>, whole: bool) -> Played {
    let trace = Rc::new(RefCell::new(Trace::new(whole)));
    let ended = name_if_it_hangs(seed);
    let played = catch_unwind(AssertUnwindSafe(|| story::play(seed, fails_at, &trace)));
    drop(ended);
    let trace = trace.borrow();
    let (coverage, failure) = match played {
        Ok(coverage) => (coverage, None),
        Err(_) => {
            let what = PANIC.with_borrow(Clone::clone);
            let lines: Vec<&str> = trace.lines().collect();
            (Coverage::default(), Some(format!("{}\nseed {seed}: {what}", lines.join("\n"))))
        }
    };
    if whole && failure.is_none() {
        for line in trace.lines() {
            println!("{line}");
        }
    }
    Played { coverage, hash: trace.hash(), lines: trace.ordinal(), failure }
}

/// Ends the run, and names the seed, unless what is returned is dropped in time.
fn name_if_it_hangs(seed: u64) -> Sender<()> {
    let (ended, waits) = channel();
    std::thread::spawn(move || {
        if waits.recv_timeout(HANGS_AFTER) == Err(RecvTimeoutError::Timeout) {
            println!("seed {seed}: has not ended after {} s", HANGS_AFTER.as_secs());
            std::process::exit(1);
        }
    });
    ended
}

/// A history that is made to fail: it must name its seed and what failed, show the end of its trace
/// and no more, and replay exactly.
fn check_failures() {
    const SEED: u64 = 777;
    const STEP: u64 = 15;
    let fail = |seed| {
        let played = play_until(seed, Some(STEP), false);
        let failure = played.failure.expect("a history fails where it is made to");
        (played.hash, played.lines, failure)
    };
    let first = fail(SEED);
    assert_eq!(first, fail(SEED), "a failure replays exactly");
    assert_ne!(first.0, fail(SEED + 1).0, "another seed is another history");
    let (_, lines, failure) = first;
    let named = failure.rsplit_once(&format!("\nseed {SEED}: "));
    let (trace, what) = named.expect("a failure names its seed");
    assert!(
        what.contains(&format!("{} {STEP}", story::MADE_TO_FAIL)),
        "it says what failed: {what}"
    );
    let shown: Vec<&str> = trace.lines().collect();
    assert!(lines > LINES_SHOWN as u64, "there is more than what is shown: {lines} lines");
    assert_eq!(shown.len(), LINES_SHOWN, "the trace that is shown is short");
    let first_shown = lines + 1 - LINES_SHOWN as u64;
    for (ordinal, line) in (first_shown..).zip(shown) {
        let found = line.split_whitespace().nth(1).and_then(|number| number.parse().ok());
        assert_eq!(found, Some(ordinal), "the end of the trace is shown: {line}");
    }
}

/// Whether the simulation would see and tell a failure; what it would not.
fn check_itself() -> Result<(), String> {
    let checks = || {
        oracle::check_teeth();
        coverage::check_zeros();
        check_failures();
    };
    catch_unwind(checks).map_err(|_| PANIC.with_borrow(Clone::clone))
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(Some(options)) => options,
        Ok(None) => {
            if !std::env::args().any(|argument| argument == "--ignored") {
                println!("histories: test");
            }
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("sim: {error}");
            return ExitCode::from(2);
        }
    };
    if std::env::args().any(|argument| argument == "--ignored") {
        return ExitCode::SUCCESS;
    }
    std::panic::set_hook(Box::new(|info| {
        PANIC.with_borrow_mut(|text| *text = info.to_string());
    }));
    if let Err(what) = check_itself() {
        println!("the simulation would not tell a failure as it must: {what}");
        return ExitCode::FAILURE;
    }
    if options.seeds == 1 {
        return replay(options.seed, options.trace);
    }
    many(&options)
}

fn replay(seed: u64, trace: bool) -> ExitCode {
    let first = play(seed, trace);
    let second = play(seed, false);
    if let Some(failure) = &first.failure {
        println!("{failure}");
    }
    println!("seed {seed}: {} lines of trace, hash {:016x}", first.lines, first.hash);
    if first.hash != second.hash {
        println!("seed {seed}: played again it gives another trace: {:016x}", second.hash);
        return ExitCode::FAILURE;
    }
    if first.failure.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn many(options: &Options) -> ExitCode {
    let started = seconds();
    let next = AtomicU64::new(0);
    let total = Mutex::new((Coverage::default(), Vec::<String>::new(), 0_u64));
    let kept: Vec<u64> = KEPT.iter().map(|(seed, _)| *seed).collect();
    let count = options.seeds + kept.len() as u64;
    std::thread::scope(|scope| {
        for _ in 0..options.jobs {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let failures = total.lock().expect("no panic").1.len();
                    if number >= count || failures >= FAILURES_MAX {
                        return;
                    }
                    let seed = match kept.get(number as usize) {
                        Some(seed) => *seed,
                        None => options.seed + number - kept.len() as u64,
                    };
                    let mut played = play(seed, false);
                    let twice = number.is_multiple_of(TWICE_EVERY);
                    if twice && play(seed, false).hash != played.hash {
                        let text = format!("seed {seed}: played twice it gives two traces");
                        played.failure.get_or_insert(text);
                    }
                    let mut total = total.lock().expect("no panic");
                    total.0.merge(&played.coverage);
                    total.2 += u64::from(twice);
                    if let Some(failure) = played.failure {
                        println!("{failure}\n");
                        total.1.push(format!("seed {seed}"));
                    }
                }
            });
        }
    });
    let (coverage, failures, twice) = total.into_inner().expect("no panic");
    for line in coverage.lines() {
        println!("{line}");
    }
    let spent = (seconds() - started).max(0.001);
    println!(
        "{count} histories from seed {}, {twice} of them twice with the same trace, in {spent:.1} s \
         on {} threads: {:.1} a second",
        options.seed,
        options.jobs,
        (count + twice) as f64 / spent
    );
    let zeros = if options.seeds >= 100 && failures.is_empty() { coverage.zeros() } else { vec![] };
    for zero in &zeros {
        println!("never happened: {zero}");
    }
    let failed = !failures.is_empty() || !zeros.is_empty();
    if !failures.is_empty() {
        println!("failed: {}", failures.join(", "));
    }
    println!(
        "test result: {}. {} passed; {} failed; 0 ignored",
        if failed { "FAILED" } else { "ok" },
        u8::from(!failed),
        u8::from(failed)
    );
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// The real clock, for the rate alone: nothing in a history knows it.
#[expect(clippy::disallowed_methods, reason = "how long the run took, told and never decided by")]
fn seconds() -> f64 {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    START.get_or_init(std::time::Instant::now).elapsed().as_secs_f64()
}
