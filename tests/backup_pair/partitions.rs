//! Nodes that do not hear each other, and both decide that a slot is theirs.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tidelog::backup::{JobChange, Outcome};
use tidelog::io::{Env, ManualClock};

use super::rig::*;
use crate::support::wait_for;

/// A pipe in the place of a file: who reads that stands still.
struct Pipe(PathBuf);

impl Pipe {
    fn over(path: &Path, pipe: PathBuf) -> Pipe {
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let new = pipe.with_extension("new");
        fs::hard_link(&pipe, &new).unwrap();
        fs::rename(new, path).unwrap();
        Pipe(pipe)
    }

    /// Returns when somebody reads it, and finds nothing in it once what it returns is dropped.
    fn reader(&self) -> File {
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(nix::libc::O_NONBLOCK);
        wait_for("a reader", || options.open(&self.0).ok())
    }
}

/// The copy may be backed up although it is old, where its slot is late, and the primary takes over
/// from who cannot be asked. The secondary has read that nobody holds the slot, and makes its claim
/// when the primary has made its own.
#[test]
fn both_nodes_that_decide_to_run_in_a_partition_claim_the_slot_and_one_makes_it() {
    let clocks = ["a", "b"].map(|_| Arc::new(ManualClock::new(time("2026-11-24T02:00:00Z"))));
    let envs = clocks.clone().map(|clock| Env { clock, ..Env::real() });
    let settings = json!({"allow_stale": true, "max_lag": "10s", "deadline": "5m", "grace": "1s"});
    let pair = Pair::in_envs(settings, envs);
    let change = JobChange { schedule: Some("1 2 * * *".to_owned()), ..JobChange::default() };
    let job = pair.a.scheduler.set_job("g", name("nightly"), change).unwrap();
    pair.link.ship();
    pair.link.set_lost(Duration::from_secs(600));
    let slot = time("2026-11-24T02:01:00Z");
    clocks[1].advance(Duration::from_secs(60));
    pair.await_open(&pair.b, slot);

    // A claim of before, which was given up: who looks at the slot reads it.
    let (dir, repository) = (pair.dir.path(), pair.dir.path().join("repository"));
    let claims =
        repository.join(format!("tidelog/slots/{}/2026-11-24T02-01-00.000000000Z", job.id));
    fs::create_dir_all(&claims).unwrap();
    fs::write(claims.join("ended-0001"), "{\"reason\":\"it was stopped\"}").unwrap();
    let claim = claims.join("claim-0001");
    let reader = Pipe::over(&claim, dir.join("early")).reader();
    clocks[1].advance(Duration::from_secs(5 * 60));
    let late = Pipe::over(&claim, dir.join("late"));
    drop(reader);
    let reader = late.reader();
    let text = "{\"node\":\"c\",\"run\":\"0000000000000001\",\"term\":\"1m\"}";
    fs::write(dir.join("claim"), text).unwrap();
    fs::rename(dir.join("claim"), &claim).unwrap();

    clocks[0].advance(Duration::from_secs(60));
    pair.a.await_event("backup-started");
    drop(reader);
    pair.a.await_event("backup-done");
    let end = wait_for("the slot to end on b", || {
        let event = pair.b.events.try_recv().ok()?;
        assert_ne!(event.code, "backup-started", "it lost the claim: {event:?}");
        event.code.starts_with("backup-").then_some(event)
    });
    assert_eq!(end.code, "backup-skipped", "{end:?}");
    assert!(end.text.contains("a has made the backup of this slot"), "{}", end.text);
    assert!(claims.join("claim-0002").exists() && !claims.join("claim-0003").exists());
    assert_eq!(fs::read_dir(repository.join("snapshots")).unwrap().count(), 1);
    for node in [&pair.a, &pair.b] {
        let made = pair.list(node).into_iter().filter(|entry| entry.id.is_some());
        let made: Vec<_> = made.map(|entry| (entry.slot, entry.node, entry.outcome)).collect();
        assert_eq!(made, [(slot, name("a"), Outcome::Done)]);
    }
}
