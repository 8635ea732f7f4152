//! The threads of a group: one syncs, one folds, one prepares segments and starts write-back.
//!
//! None of them is needed for correctness: a group without threads is driven by `sync_now` and
//! `fold_now`, and makes its segments when it needs them. The simulation has none, and drives the
//! rounds of these threads one by one.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use super::engine::{Core, Group};
use crate::events::Severity;
use crate::units::Lsn;

/// The daemon syncs at least this often, so that `durable` follows without the host's flushes.
const SYNC_EVERY: Duration = Duration::from_secs(1);
/// The window moves with the clock alone: it is looked at this often.
const FOLD_EVERY: Duration = Duration::from_secs(5);
/// A fold that moved nothing is not tried again before this has passed.
const FOLD_REST: Duration = Duration::from_millis(100);
/// One that waits for the disk or for a repair has done all else, and will do it again: it rests
/// longer, and lets pass more and more of the times at which nobody asked for it.
const WAIT_REST: Duration = Duration::from_secs(1);
/// At most so many of them, each [`FOLD_EVERY`] behind the last, pass one after the other.
const PAUSE_MOST: u32 = 5;
/// Write-back is started whenever so many bytes were appended.
const WRITEBACK_BYTES: u64 = 4 << 20;

/// The threads, and what wakes them.
#[derive(Default)]
pub(super) struct Workers {
    running: AtomicBool,
    stopping: AtomicBool,
    threads: Mutex<Vec<JoinHandle<()>>>,
    fold: Bell,
    prepare: Bell,
    /// Head at the last time that write-back was asked for.
    asked_at: AtomicU64,
}

/// A wish that one thread waits for.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.lock() = true;
        self.changed.notify_one();
    }

    /// Waits for a ring, or for `at_most`; whether it rang.
    fn wait(&self, at_most: Duration) -> bool {
        let (mut rung, _) = self
            .changed
            .wait_timeout_while(self.lock(), at_most, |rung| !*rung)
            .expect("no holder panics");
        std::mem::take(&mut rung)
    }

    /// Lets `duration` pass whatever rings, unless it is to end.
    fn rest(&self, duration: Duration, stopping: impl Fn() -> bool) {
        let rung = self.lock();
        drop(self.changed.wait_timeout_while(rung, duration, |_| !stopping()));
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.rung.lock().expect("no holder panics")
    }
}

impl Workers {
    pub(super) fn running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    pub(super) fn wake_folder(&self) {
        self.fold.ring();
    }

    /// Has the threads end; the caller wakes the one that syncs.
    pub(super) fn ask_to_stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.running.store(false, Ordering::Release);
        self.fold.ring();
        self.prepare.ring();
    }

    /// Waits until they have.
    pub(super) fn join(&self) {
        let threads = std::mem::take(&mut *self.threads.lock().expect("no holder panics"));
        for thread in threads {
            // The last owner of a group may be one of its own threads.
            if thread.thread().id() != std::thread::current().id() {
                thread.join().expect("a panic ends the process");
            }
        }
    }
}

/// What a thread of a group does until it is told to stop.
type Job = fn(&Group);

impl Group {
    /// Starts the threads that sync, fold and prepare.
    pub fn start_workers(self: &Arc<Self>) {
        if self.workers.running.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut threads = self.workers.threads.lock().expect("no holder panics");
        let jobs: [(&str, Job); 3] =
            [("sync", Group::run_sync), ("fold", Group::run_fold), ("prepare", Group::run_prepare)];
        for (name, job) in jobs {
            let group = self.clone();
            let thread = std::thread::Builder::new()
                .name(format!("{name} {}", self.name()))
                .spawn(move || job(&group))
                .expect("the system gives a thread");
            threads.push(thread);
        }
    }

    fn stopping(&self) -> bool {
        self.workers.stopping.load(Ordering::Acquire)
    }

    fn run_sync(&self) {
        let mut marked = self.context.env.clock.monotonic();
        let mut noted = false;
        loop {
            {
                let waiters = self.waiters.lock().expect("no holder panics");
                let _waited = self
                    .waiters_changed
                    .wait_timeout_while(waiters, SYNC_EVERY, |waiters| {
                        waiters.is_idle() && !self.stopping()
                    })
                    .expect("no holder panics");
            }
            if self.stopping() {
                return;
            }
            // A failure is latched and told by who finds it.
            if self.sync_now().is_err() {
                self.fail_waiters();
                continue;
            }
            let now = self.context.env.clock.monotonic();
            if now.saturating_sub(marked) >= SYNC_EVERY {
                marked = now;
                noted = self.mark_round(noted);
            }
        }
    }

    /// What the thread that syncs does besides, once a second: whether the clock is noted now.
    #[doc(hidden)]
    pub fn mark_round(&self, noted: bool) -> bool {
        self.mark_durable();
        noted || self.note_clock()
    }

    /// Writes the durable mark: what is below it is trusted after a crash, and missing is damage.
    pub(super) fn mark_durable(&self) {
        // A cut holds the lock too: the mark never ends behind the log.
        let _no_cut = self.sync_lock.lock().expect("no holder panics");
        let durable = {
            let core = self.lock();
            // After a cut that failed the memory has an end that the disk may lack.
            if core.failed.is_some() {
                return;
            }
            core.durable
        };
        // Where the disk is full, the next round tries again.
        if let Err(error) = self.update_meta(|meta| meta.durable = meta.durable.max(durable)) {
            tracing::warn!("{error}");
        }
    }

    fn run_fold(&self) {
        let (mut told, mut idle, mut pause) = (None, 0, 0);
        loop {
            let rang = self.workers.fold.wait(FOLD_EVERY);
            if self.stopping() {
                return;
            }
            if !rang && idle < pause && !self.is_pressed(&self.lock()) {
                idle += 1;
                self.close_expired();
                continue;
            }
            let before = self.lock().timeline.horizon().lsn;
            self.fold_round(&mut told);
            let (moved, waits) = {
                let core = self.lock();
                (core.timeline.horizon().lsn != before, core.room.fold_waits())
            };
            pause = match (waits, rang) {
                (true, true) => pause,
                (true, false) => (2 * pause + 1).min(PAUSE_MOST),
                (false, _) => 0,
            };
            idle = 0;
            if !moved {
                // Writers of a full log ring without end, and nothing has come of it.
                let rest = if waits { WAIT_REST } else { FOLD_REST };
                self.workers.fold.rest(rest, || self.stopping());
            }
        }
    }

    /// One round of the thread that folds. `told` is the failure that was told last.
    #[doc(hidden)]
    pub fn fold_round(&self, told: &mut Option<String>) {
        self.close_expired();
        let pressed = {
            let core = self.lock();
            // That was told, and its writers have been too.
            if core.failed.is_some() {
                return;
            }
            self.is_pressed(&core)
        };
        // Only what is durable is folded: where space is short that is not waited for.
        let synced = if pressed { self.sync_now().map(|_| ()) } else { Ok(()) };
        let result = synced.and_then(|()| self.fold(false));
        self.note_fold(result.as_ref().err());
        self.space.notify_all();
        match result {
            Ok(_) => *told = None,
            Err(error) => {
                // Told once: it is tried again with every round.
                let text = error.to_string();
                if told.as_ref() != Some(&text) {
                    self.emit(
                        Severity::Error,
                        "fold-failed",
                        format!("the log could not be folded: {text}"),
                        serde_json::Value::Null,
                    );
                    *told = Some(text);
                }
            }
        }
    }

    fn run_prepare(&self) {
        let mut written_back = self.lock().writer.head();
        loop {
            self.workers.prepare.wait(SYNC_EVERY);
            if self.stopping() {
                return;
            }
            written_back = self.prepare_round(written_back);
        }
    }

    /// One round of the thread that prepares: up to where write-back was asked for.
    #[doc(hidden)]
    pub fn prepare_round(&self, written_back: Lsn) -> Lsn {
        let head = self.lock().writer.head();
        // The one behind that of the last byte is ready before that is half full, and none behind
        // it. Where the disk is full, the append that needs it says so.
        let last_byte = Lsn(head.0.saturating_sub(1));
        let next = last_byte.segment_number(self.segment_bytes()) + 1;
        if self.segments.get(next).is_none() {
            let _ = self.segments.ensure(next);
        }
        self.start_writeback(written_back, head);
        self.look_at_disk();
        self.look_at_room();
        self.write_indices();
        head
    }

    /// Has the kernel begin to write what was appended, so that the next sync finds little to do.
    fn start_writeback(&self, from: Lsn, head: Lsn) {
        let segment_bytes = self.segment_bytes();
        // Those that there are: an image may have put the head far behind all of them.
        let first = from.segment_number(segment_bytes);
        for number in self.segments.numbers().into_iter().filter(|number| *number >= first) {
            let begin = Lsn(number * segment_bytes);
            let (from, end) = (from.max(begin), head.min(begin.advance(segment_bytes)));
            if from < end
                && let Some(segment) = self.segments.get(number)
            {
                segment.file.start_writeback(from.bytes_since(begin), end.bytes_since(from));
            }
        }
    }

    /// Called under the mutex after every append: rings for what is due.
    pub(super) fn appended(&self, core: &mut Core, before: Lsn) {
        if !self.workers.running() {
            return;
        }
        let head = core.writer.head();
        let entered = head.segment_number(self.segment_bytes())
            != before.segment_number(self.segment_bytes());
        let asked_at = self.workers.asked_at.load(Ordering::Relaxed);
        if entered
            || head.bytes_since(Lsn(asked_at)) >= WRITEBACK_BYTES.min(self.segment_bytes() / 4)
        {
            self.workers.asked_at.store(head.0, Ordering::Relaxed);
            self.workers.prepare.ring();
        }
        if self.is_pressed(core) {
            self.workers.fold.ring();
        }
    }
}
