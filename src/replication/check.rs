//! Reads the log of each group again, a little at a time, and keeps what it found for the verdict.
//!
//! Bytes are checked when they arrive and when they are read; this finds what rots in between,
//! before a backup or a promote has to. Damage found is a fact, also after a restart, until the
//! same segment was read whole, or folded, which checks what it takes, or is no longer there.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::events::Severity;
use crate::group::GroupError;
use crate::units::{GroupId, Lsn};

use super::health::LogCheck;
use super::peers::{StoreError, replace};
use super::replica::Replica;
use super::service::Shared;

/// Time between two steps.
const STEP_EVERY: Duration = Duration::from_secs(10);
/// Bytes of a group's log that a step reads.
const STEP_BYTES: u64 = 16 << 20;
/// What was found damaged, under the service's directory.
const FILE: &str = "damaged";

/// Checks until the service ends.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut shutdown = shared.shutdown_signal();
    loop {
        for group in shared.groups.groups() {
            let shared = Arc::clone(&shared);
            // Fails only while the runtime ends.
            let _ = tokio::task::spawn_blocking(move || step(&shared, &*group)).await;
        }
        tokio::select! {
            () = tokio::time::sleep(STEP_EVERY) => {}
            _ = shutdown.wait_for(|ending| *ending) => return,
        }
    }
}

/// What was read so far of a group's log.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Pass {
    /// Up to here this pass has come.
    #[serde(skip)]
    checked_to: Lsn,
    /// Cuts of the log's end when it came there.
    #[serde(skip)]
    cuts: u64,
    /// When the last step ended, monotonic.
    #[serde(skip)]
    stepped: Option<Duration>,
    /// By number of the segment: what was found in it.
    damaged: BTreeMap<u64, String>,
    /// The segment whose damage is looked at next, or one behind it.
    #[serde(skip)]
    again: u64,
}

/// A log, as far as a check needs it.
struct Log<'a> {
    /// Where it begins: the start of a segment.
    start: Lsn,
    /// Up to which it is checked.
    end: Lsn,
    head: Lsn,
    /// How often its end was cut, before and now: positions of before may lie within a record.
    cuts: u64,
    cuts_now: &'a dyn Fn() -> u64,
    segment_bytes: u64,
    check: &'a dyn Fn(Lsn, Lsn) -> Result<u64, GroupError>,
}

impl Log<'_> {
    fn segment_end(&self, segment: u64) -> Lsn {
        Lsn((segment + 1) * self.segment_bytes)
    }
}

/// What a step found out.
#[derive(Debug, PartialEq)]
enum Finding {
    Damaged(String),
    /// What was damaged is whole again, or no longer part of the log.
    Mended(String),
}

impl Pass {
    /// What the verdict is told. `started` is when this process began to check.
    pub(super) fn verdict(&self, now: Duration, started: Duration) -> LogCheck {
        let damaged = self.damaged.values().next().map(|first| match self.damaged.len() - 1 {
            0 => first.clone(),
            more => format!("{first}; and {more} more segments"),
        });
        let age = now.saturating_sub(self.stepped.unwrap_or(started));
        LogCheck { checked_to: self.checked_to, damaged, age }
    }

    fn step(&mut self, log: &Log<'_>) -> Vec<Finding> {
        if self.cuts != log.cuts {
            self.checked_to = Lsn::ZERO;
            self.cuts = log.cuts;
        }
        let mut findings = Vec::new();
        let mut next = self.clone();
        next.look_again(log, &mut findings);
        next.go_on(log, &mut findings);
        // Cut while it was read: what was found is of no log.
        if (log.cuts_now)() != log.cuts {
            return Vec::new();
        }
        *self = next;
        findings
    }

    /// Reads one segment again that was damaged.
    fn look_again(&mut self, log: &Log<'_>, findings: &mut Vec<Finding>) {
        self.damaged.retain(|segment, what| {
            let folded = log.segment_end(*segment) <= log.start;
            let cut_off = segment * log.segment_bytes >= log.head.0;
            if folded || cut_off {
                findings.push(Finding::Mended(what.clone()));
            }
            !(folded || cut_off)
        });
        let next = self.damaged.range(self.again..).next().or(self.damaged.first_key_value());
        let Some(segment) = next.map(|(segment, _)| *segment) else { return };
        self.again = segment + 1;
        let (from, to) = (Lsn(segment * log.segment_bytes), log.segment_end(segment).min(log.end));
        if from >= to {
            return;
        }
        match (log.check)(from, to) {
            Ok(_) => {
                let what = self.damaged.remove(&segment).unwrap_or_default();
                findings.push(Finding::Mended(what));
            }
            // Folded from under it: the next step sees so.
            Err(GroupError::NotCovered { .. }) => {}
            Err(error) => {
                self.damaged.insert(segment, error.to_string());
            }
        }
    }

    /// Reads the next part of the log; after its end it begins anew.
    fn go_on(&mut self, log: &Log<'_>, findings: &mut Vec<Finding>) {
        if self.checked_to < log.start || self.checked_to >= log.end {
            self.checked_to = log.start;
        }
        let until = Lsn(log.end.0.min(self.checked_to.0.saturating_add(STEP_BYTES)));
        while self.checked_to < until {
            let from = self.checked_to;
            let segment = from.segment_number(log.segment_bytes);
            let segment_end = log.segment_end(segment);
            match (log.check)(from, until.min(segment_end)) {
                Ok(bytes) => self.checked_to = from.advance(bytes),
                // Folded from under it: begin anew. What is damaged elsewhere stays so.
                Err(GroupError::NotCovered { .. }) => {
                    self.checked_to = Lsn::ZERO;
                    return;
                }
                Err(error) => {
                    if self.damaged.insert(segment, error.to_string()).is_none() {
                        findings.push(Finding::Damaged(error.to_string()));
                    }
                    // A segment begins with a record.
                    self.checked_to = segment_end;
                }
            }
        }
    }
}

fn step(shared: &Shared, group: &dyn Replica) {
    let positions = group.positions();
    let log = Log {
        start: group.log_start(),
        end: positions.durable.min(positions.request_end),
        head: positions.head,
        cuts: positions.cuts,
        cuts_now: &|| group.positions().cuts,
        segment_bytes: group.segment_bytes(),
        check: &|from, to| group.check_log(from, to),
    };
    let (id, name) = (group.id(), group.name());
    let checks = || shared.checks.lock().expect("no holder panics");
    let mut pass = checks().get(&id).cloned().unwrap_or_default();
    let findings = pass.step(&log);
    pass.stepped = Some(shared.now());
    checks().insert(id, pass);
    if findings.is_empty() {
        return;
    }
    if let Err(error) = store(&shared.config.state_dir, &checks()) {
        tracing::error!("{error}");
    }
    for finding in findings {
        let (severity, code, text) = match finding {
            Finding::Damaged(what) => (
                Severity::Error,
                "log-damaged",
                format!(
                    "group {name}: the log is damaged: {what}; `tidelog status {name}` shows what \
                     it means for backups"
                ),
            ),
            Finding::Mended(what) => (
                Severity::Info,
                "log-mended",
                format!("group {name}: was damaged, and is whole or out of the log now: {what}"),
            ),
        };
        shared.context.events.emit(severity, code, Some(name.as_str()), text, Value::Null);
    }
}

fn store(dir: &Path, passes: &HashMap<GroupId, Pass>) -> Result<(), StoreError> {
    let damaged: Vec<_> = passes.iter().filter(|(_, pass)| !pass.damaged.is_empty()).collect();
    replace(dir, FILE, &serde_json::to_vec(&damaged).expect("plain data becomes JSON"))
}

/// What was found damaged before this process began.
pub(super) fn load(dir: &Path) -> HashMap<GroupId, Pass> {
    let path = dir.join(FILE);
    let read = match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return HashMap::new(),
        Err(error) => Err(error.to_string()),
        Ok(bytes) => serde_json::from_slice::<Vec<(GroupId, Pass)>>(&bytes)
            .map_err(|error| error.to_string()),
    };
    match read {
        Ok(passes) => passes.into_iter().collect(),
        Err(error) => {
            tracing::error!("{}: {error}; the logs are checked anew", path.display());
            HashMap::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeSet;

    use super::*;

    const SEGMENT: u64 = 8 << 20;

    /// A log of ten segments, some damaged, of which a fold may take the first.
    #[derive(Default)]
    struct TestLog {
        damaged: RefCell<BTreeSet<u64>>,
        folded: Cell<u64>,
        /// The next check is overtaken by a fold of one segment more.
        fold_within: Cell<bool>,
        /// The next check is overtaken by a cut, and fails by it.
        cut_within: Cell<bool>,
        cuts: Cell<u64>,
    }

    impl TestLog {
        fn step(&self, pass: &mut Pass) -> Vec<Finding> {
            let cuts = self.cuts.get();
            let check = |from: Lsn, to: Lsn| {
                if self.cut_within.take() {
                    self.cuts.set(self.cuts.get() + 1);
                    let group = "g".parse().unwrap();
                    return Err(GroupError::Damaged { group, what: "half a record".to_owned() });
                }
                if self.fold_within.take() {
                    self.folded.set(self.folded.get() + 1);
                }
                let segment = from.segment_number(SEGMENT);
                assert!(to.0 <= (segment + 1) * SEGMENT, "one segment at a time");
                let group = "g".parse().unwrap();
                if segment < self.folded.get() {
                    let point = from.to_string();
                    return Err(GroupError::NotCovered { group, point, from, to });
                }
                if self.damaged.borrow().contains(&segment) {
                    let what = format!("segment {segment}");
                    return Err(GroupError::Damaged { group, what });
                }
                Ok(to.bytes_since(from))
            };
            pass.step(&Log {
                start: Lsn(self.folded.get() * SEGMENT),
                end: Lsn(10 * SEGMENT),
                head: Lsn(10 * SEGMENT),
                cuts,
                cuts_now: &|| self.cuts.get(),
                segment_bytes: SEGMENT,
                check: &check,
            })
        }

        fn damage(&self, segment: u64) {
            self.damaged.borrow_mut().insert(segment);
        }
    }

    fn damage(pass: &Pass) -> Option<String> {
        pass.verdict(Duration::ZERO, Duration::ZERO).damaged
    }

    #[test]
    fn damage_stays_a_fact_though_folds_overtake_every_pass() {
        let (log, mut pass) = (TestLog::default(), Pass::default());
        log.damage(9);
        let found = (0..10).find_map(|_| log.step(&mut pass).pop()).expect("found");
        assert!(matches!(&found, Finding::Damaged(what) if what.contains("segment 9")));
        for _ in 0..8 {
            log.fold_within.set(true);
            assert_eq!(log.step(&mut pass), [], "told once");
            assert!(damage(&pass).unwrap().contains("segment 9"));
        }
    }

    #[test]
    fn a_cut_ends_the_pass_and_is_no_damage() {
        let (log, mut pass) = (TestLog::default(), Pass::default());
        log.step(&mut pass);
        let before = pass.checked_to;
        assert!(before > Lsn::ZERO);
        log.cut_within.set(true);
        assert_eq!(log.step(&mut pass), [], "what a cut left half is no damage");
        assert_eq!((pass.checked_to, damage(&pass)), (before, None));
        // Of the log that is there now, no position of the old one is believed.
        log.damage(0);
        assert_eq!(log.step(&mut pass).len(), 1);
    }

    #[test]
    fn damage_ends_when_its_segment_is_read_whole_or_was_folded() {
        let (log, mut pass) = (TestLog::default(), Pass::default());
        log.damage(0);
        log.damage(1);
        log.damage(2);
        let found: usize = (0..2).map(|_| log.step(&mut pass).len()).sum();
        assert_eq!(found, 3);
        assert!(damage(&pass).unwrap().contains("and 2 more"));
        log.damaged.borrow_mut().remove(&2);
        log.folded.set(1);
        let mended: Vec<_> = (0..3).flat_map(|_| log.step(&mut pass)).collect();
        assert_eq!(mended.len(), 2, "{mended:?}");
        assert!(damage(&pass).unwrap().ends_with("segment 1"), "{:?}", damage(&pass));
        log.damaged.borrow_mut().clear();
        assert_eq!(log.step(&mut pass).len(), 1);
        assert_eq!(damage(&pass), None);
    }

    #[test]
    fn damage_is_known_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let (log, mut pass) = (TestLog::default(), Pass::default());
        log.damage(1);
        log.step(&mut pass);
        let passes = HashMap::from([(GroupId([7; 16]), pass)]);
        store(dir.path(), &passes).unwrap();
        let again = load(dir.path());
        assert_eq!(damage(&again[&GroupId([7; 16])]), damage(&passes[&GroupId([7; 16])]));
        std::fs::write(dir.path().join(FILE), b"{").unwrap();
        assert!(load(dir.path()).is_empty());
    }

    #[test]
    fn the_age_of_a_check_is_counted_from_the_start_until_there_is_one() {
        let mut pass = Pass::default();
        let age = |pass: &Pass| pass.verdict(Duration::from_secs(50), Duration::from_secs(20)).age;
        assert_eq!(age(&pass), Duration::from_secs(30));
        pass.stepped = Some(Duration::from_secs(45));
        assert_eq!(age(&pass), Duration::from_secs(5));
    }
}
