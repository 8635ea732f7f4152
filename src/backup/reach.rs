//! A repository within bounded time. Its file system may hang (a server that went away), and what
//! waits in such a call cannot be woken; so one thread per repository makes the calls, and those
//! who ask wait only so long.

use std::io;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::objects::Objects;
use super::repository::{Repository, RepositoryError};
use crate::io::Clock;
use crate::units::{LogTime, Span};

/// How long one who asks how a repository is waits for a fresh answer; shorter than a peer waits.
const PROBE_PATIENCE: Duration = Duration::from_secs(4);
/// What a call that seems to hang has left to end in: the clock may have jumped over it, where the
/// machine stood still.
const AFTER_A_JUMP: Duration = Duration::from_millis(250);
/// How old an answer may be that stands in for a fresh one.
const ANSWER_AGE_MAX: Duration = Duration::from_secs(30);
/// How long a small object may take; far above what a busy disk needs for a sync.
const OBJECT_PATIENCE: Duration = Duration::from_secs(10);

type Work = Box<dyn FnOnce() + Send>;

/// What a call is on its way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Queued,
    Begun,
    /// Its caller went away before it began: it must not happen any more.
    Abandoned,
}

/// The thread that makes the calls, one after the other.
struct Asker {
    queue: Mutex<Sender<Work>>,
    /// Since when it is in its present call, by the wall and the monotonic clock.
    busy: Arc<Mutex<Option<(LogTime, Duration)>>>,
    /// A call has ended.
    idle: Arc<Condvar>,
    clock: Arc<dyn Clock>,
}

/// No answer since then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hung(LogTime);

impl Asker {
    fn start(name: &str, clock: Arc<dyn Clock>) -> io::Result<Asker> {
        let (queue, calls) = channel::<Work>();
        let work = move || calls.into_iter().for_each(|call| call());
        let thread = std::thread::Builder::new().name(format!("repository-{name}"));
        thread.spawn(work)?;
        Ok(Asker { queue: Mutex::new(queue), busy: Arc::default(), idle: Arc::default(), clock })
    }

    /// Has `work` done on the thread; gives up when `patience` is over, and soon where the present
    /// call has taken that long already.
    fn ask<T: Send + 'static>(
        &self,
        patience: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Hung> {
        let asked = self.clock.wall();
        let busy = || *self.busy.lock().expect("no holder panics");
        let hangs = |busy: &mut Option<(LogTime, Duration)>| {
            let long = |at| self.clock.monotonic().saturating_sub(at) >= patience;
            busy.is_some_and(|(_, at)| long(at))
        };
        let busy_now = self.busy.lock().expect("no holder panics");
        let waited = self.idle.wait_timeout_while(busy_now, AFTER_A_JUMP, hangs);
        let (busy_now, waited) = waited.expect("no holder panics");
        if waited.timed_out() {
            return Err(Hung(busy_now.map_or(asked, |(since, _)| since)));
        }
        drop(busy_now);
        let stage = Arc::new(Mutex::new(Stage::Queued));
        let (answer, answers) = sync_channel(1);
        let call = {
            let (stage, clock) = (stage.clone(), self.clock.clone());
            let (busy, idle) = (self.busy.clone(), self.idle.clone());
            move || {
                {
                    let mut stage = stage.lock().expect("no holder panics");
                    if *stage == Stage::Abandoned {
                        return;
                    }
                    *stage = Stage::Begun;
                    let since = (clock.wall(), clock.monotonic());
                    *busy.lock().expect("no holder panics") = Some(since);
                }
                // A caller that waits no longer does not want to know.
                let _ = answer.send(work());
                *busy.lock().expect("no holder panics") = None;
                idle.notify_all();
            }
        };
        let sent = self.queue.lock().expect("no holder panics").send(Box::new(call));
        if sent.is_err() {
            return Err(Hung(asked));
        }
        if let Ok(answer) = answers.recv_timeout(patience) {
            return Ok(answer);
        }
        let mut stage = stage.lock().expect("no holder panics");
        if *stage == Stage::Queued {
            *stage = Stage::Abandoned;
        }
        drop(stage);
        // It may have answered just now.
        answers.try_recv().map_err(|_| Hung(busy().map_or(asked, |(since, _)| since)))
    }
}

/// Small objects, each call bounded. One that was given up may still happen, as with any server
/// that is slow to answer: claims and results are made for that.
struct PatientObjects {
    inner: Arc<dyn Objects>,
    asker: Arc<Asker>,
}

impl PatientObjects {
    fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Objects) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let inner = Arc::clone(&self.inner);
        self.asker.ask(OBJECT_PATIENCE, move || work(inner.as_ref())).unwrap_or_else(
            |Hung(since)| {
                let what = format!("the repository does not answer since {since}");
                Err(io::Error::new(io::ErrorKind::TimedOut, what))
            },
        )
    }
}

impl Objects for PatientObjects {
    fn create(&self, name: &str, body: &[u8]) -> io::Result<bool> {
        let (name, body) = (name.to_owned(), body.to_vec());
        self.ask(move |objects| objects.create(&name, &body))
    }

    fn replace(&self, name: &str, body: &[u8]) -> io::Result<()> {
        let (name, body) = (name.to_owned(), body.to_vec());
        self.ask(move |objects| objects.replace(&name, &body))
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let name = name.to_owned();
        self.ask(move |objects| objects.read(&name))
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let dir = dir.to_owned();
        self.ask(move |objects| objects.list(&dir))
    }
}

/// How a repository is, and how old that knowledge is.
pub(super) struct Known {
    /// Its own id, or why it cannot be opened.
    pub id: Result<String, RepositoryError>,
    /// Since it was asked.
    pub age: Span,
}

type Answer = (Result<String, RepositoryError>, Duration);

/// A repository, asked with patience.
pub(super) struct Reach {
    repository: Arc<Repository>,
    clock: Arc<dyn Clock>,
    asker: Arc<Asker>,
    objects: Arc<PatientObjects>,
    answer: Arc<Mutex<Option<Answer>>>,
}

impl Reach {
    /// # Errors
    ///
    /// Where no thread can be had.
    pub(super) fn new(repository: Repository, clock: Arc<dyn Clock>) -> io::Result<Reach> {
        let asker = Arc::new(Asker::start(&repository.config().name, clock.clone())?);
        let inner = repository.objects();
        let objects = Arc::new(PatientObjects { inner, asker: asker.clone() });
        let repository = Arc::new(repository);
        Ok(Reach { repository, clock, asker, objects, answer: Arc::default() })
    }

    /// The repository, for work that takes its time on a thread of its own.
    pub(super) fn repository(&self) -> &Arc<Repository> {
        &self.repository
    }

    /// The small objects beside it.
    pub(super) fn objects(&self) -> Arc<dyn Objects> {
        self.objects.clone()
    }

    /// How it is: asked now, or what it said lately where it is slow; unreachable where it has said
    /// nothing for long.
    pub(super) fn probe(&self) -> Known {
        let (repository, clock) = (Arc::clone(&self.repository), Arc::clone(&self.clock));
        let answer = Arc::clone(&self.answer);
        let probed = self.asker.ask(PROBE_PATIENCE, move || {
            let id = repository.id();
            *answer.lock().expect("no holder panics") = Some((id.clone(), clock.monotonic()));
            id
        });
        let Hung(since) = match probed {
            Ok(id) => return Known { id, age: Span::default() },
            Err(hung) => hung,
        };
        let now = self.clock.monotonic();
        if let Some((id, at)) = self.answer.lock().expect("no holder panics").clone() {
            let age = now.saturating_sub(at);
            if age <= ANSWER_AGE_MAX {
                return Known { id, age: Span(age) };
            }
        }
        let config = self.repository.config();
        let (name, url) = (config.name.clone(), config.url.clone());
        Known { id: Err(RepositoryError::Unreachable { name, url, since }), age: Span::default() }
    }

    /// Its own id.
    ///
    /// # Errors
    ///
    /// Where it cannot be opened, or does not answer.
    pub(super) fn id(&self) -> Result<String, RepositoryError> {
        self.probe().id
    }

    /// The repository, if it answers.
    ///
    /// # Errors
    ///
    /// As [`Reach::id`].
    pub(super) fn opened(&self) -> Result<&Arc<Repository>, RepositoryError> {
        self.id().map(|_| &self.repository)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::ManualClock;

    const MOMENT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn who_asks_one_that_hangs_is_not_held_and_what_he_gave_up_never_happens() {
        let clock = Arc::new(ManualClock::new(LogTime(1_700_000_000_000_000_000)));
        let asker = Asker::start("main", clock.clone()).expect("a thread");
        assert_eq!(asker.ask(LONG, || 7), Ok(7));
        let began = clock.wall();
        let (release, released) = channel::<()>();
        let (entered, entries) = channel();
        let hung = std::thread::scope(|scope| {
            let asking = scope.spawn(|| {
                asker.ask(MOMENT, move || {
                    entered.send(()).expect("the test waits");
                    released.recv().expect("released");
                })
            });
            entries.recv().expect("the call began");
            clock.advance(LONG * 60);
            asking.join().expect("it returned")
        });
        assert_eq!(hung, Err(Hung(began)));
        let (done, happened) = channel();
        // Were it to wait its whole patience, the test would take an hour.
        let refused = asker.ask(LONG * 60, move || done.send(()));
        assert_eq!(refused.err(), Some(Hung(began)));
        release.send(()).expect("it hangs there");
        while asker.ask(LONG, || ()).is_err() {}
        assert!(happened.try_recv().is_err(), "what was given up did not happen later");
    }

    /// A node that stood still took the call that it found itself in for one that hangs, and its
    /// run failed: the repository was out of reach from both nodes at once.
    #[test]
    fn a_call_over_which_the_clock_has_jumped_is_no_repository_that_hangs() {
        let clock = Arc::new(ManualClock::new(LogTime(1_700_000_000_000_000_000)));
        let asker = Asker::start("main", clock.clone()).expect("a thread");
        let (entered, entries) = channel();
        let (_held, never) = channel::<()>();
        let asker = &asker;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let call = move || {
                    entered.send(()).expect("the test waits");
                    let _ = never.recv_timeout(MOMENT);
                };
                asker.ask(LONG, call).expect("it ends");
            });
            entries.recv().expect("the call began");
            clock.advance(LONG * 60);
            assert_eq!(asker.ask(LONG, || 7), Ok(7));
        });
    }
}
