//! A scrub: everything that a node has of a group on disk is read once and checked, in the
//! background, at a pace that leaves the disk to the hosts.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::watch;

use crate::events::Severity;
use crate::group::{DamagedPart, DataState, Found, Group, GroupError};
use crate::units::{ByteSize, CHUNK_BYTES, LogTime, Lsn, VolumeNumber, total};

use super::service::{Replication, ReplicationError, Shared, locked};

/// Bytes a second while no host writes.
const RATE_IDLE: u64 = 256 << 20;
/// Bytes a second while hosts write.
const RATE_BUSY: u64 = 32 << 20;
/// Bytes of the log that are read between two rests.
const STEP_BYTES: u64 = 1 << 20;
/// Rests that are shorter are taken together.
const REST_MIN: Duration = Duration::from_millis(2);

/// What a scrub is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScrubState {
    /// It reads.
    Running,
    /// It has read everything.
    Done,
    /// It was stopped before its end.
    Stopped,
}

/// The scrub of a group that runs on this node, or the last one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// What it is doing.
    pub state: ScrubState,
    /// Since when.
    pub state_since: LogTime,
    /// Why it stopped, where it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<String>,
    /// When it began.
    pub started: LogTime,
    /// Bytes that it has passed; what was never written counts too.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes that it has read of the disk.
    pub read_bytes: u64,
    /// Parts that it found damaged.
    pub damaged: u64,
    /// Those of them that it could repair.
    pub repaired: u64,
    /// Bytes at the end of the log that were not durable here when it began, so that it left them
    /// out: on a disk that failed all that was written since the last sync.
    #[serde(default)]
    pub skipped_bytes: u64,
    /// Parts that it could not tell, since a fold or a merge had stopped half-way.
    pub untold: u64,
    /// Why what was read is not all that is to be here, where it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_out: Option<String>,
}

/// Why what can be read of a group here is not all that is to be here.
pub(super) fn left_out(state: DataState, reason: Option<String>) -> Option<String> {
    let why = |what: &str| format!("{what}: {}", reason.as_deref().unwrap_or("unknown"));
    match state {
        DataState::Consistent | DataState::Retired => None,
        DataState::Failed => Some(why("the data failed, and what is not durable is not examined")),
        DataState::None | DataState::ReceivingImage => Some(why("no image is there")),
    }
}

impl ScrubStatus {
    fn begin(now: LogTime, total_bytes: u64, skipped_bytes: u64) -> ScrubStatus {
        ScrubStatus {
            state: ScrubState::Running,
            state_since: now,
            state_reason: None,
            started: now,
            done_bytes: 0,
            total_bytes,
            read_bytes: 0,
            damaged: 0,
            repaired: 0,
            skipped_bytes,
            untold: 0,
            left_out: None,
        }
    }

    /// The process that ran it has ended.
    pub(super) fn ended_with_the_process(&mut self) {
        if self.state == ScrubState::Running {
            self.state = ScrubState::Stopped;
            self.state_reason = Some("the node was started again meanwhile".to_owned());
        }
    }
}

/// How long to rest after `bytes` that took `took`, where hosts write or do not.
pub(super) fn rest_after(
    bytes: u64,
    took: Duration,
    hosts_write: bool,
    limit: Option<u64>,
) -> Duration {
    let rate = if hosts_write { RATE_BUSY } else { RATE_IDLE };
    let rate = limit.map_or(rate, |limit| limit.min(rate)).max(1);
    let wanted = u128::from(bytes) * 1_000_000_000 / u128::from(rate);
    let wanted = Duration::from_nanos(u64::try_from(wanted).unwrap_or(u64::MAX));
    wanted.saturating_sub(took)
}

/// What is to be read.
struct Plan {
    log: (Lsn, Lsn),
    /// Bytes of the log behind that.
    skipped: u64,
    bases: Vec<(VolumeNumber, u64)>,
    kept: Vec<(Lsn, u64)>,
}

impl Plan {
    /// What is there now. What is appended later is checked as it is.
    fn of(group: &Group) -> Plan {
        let positions = group.positions();
        let end = positions.durable.min(positions.request_end);
        Plan {
            log: (group.log_start().min(end), end),
            skipped: positions.head.bytes_since(end),
            bases: group.base_chunks(),
            kept: group.kept_moments(),
        }
    }

    fn total_bytes(&self) -> u64 {
        let bases = self.bases.iter().map(|(_, chunks)| chunks * CHUNK_BYTES);
        let kept = self.kept.iter().map(|(_, bytes)| *bytes);
        total(bases.chain(kept).chain([self.log.1.bytes_since(self.log.0)]))
    }
}

/// One scrub on its thread.
struct Scrub<'a> {
    shared: &'a Shared,
    group: &'a Group,
    limit: Option<u64>,
    stop: watch::Receiver<bool>,
    shutdown: watch::Receiver<bool>,
    runtime: tokio::runtime::Handle,
    /// Bytes since the last rest, when that ended, and where the log's head was then.
    unrested: u64,
    rested: Duration,
    head: Lsn,
}

/// It was told to stop.
struct Stopped;

impl Scrub<'_> {
    fn run(&mut self, plan: &Plan) -> Result<(), Stopped> {
        self.log(plan.log.0, plan.log.1)?;
        for (volume, chunks) in &plan.bases {
            for chunk in 0..*chunks {
                self.part(&DamagedPart::Base { volume: *volume, chunk }, CHUNK_BYTES)?;
            }
        }
        for (moment, bytes) in &plan.kept {
            self.part(&DamagedPart::Kept { moment: *moment }, *bytes)?;
        }
        // What was damaged before, and was passed as whole, or is no longer there.
        let ledger = self.shared.ledger(self.group.id());
        let started = ledger.scrub.as_ref().map_or(LogTime(0), |scrub| scrub.started);
        for known in ledger.parts().iter().filter(|known| known.since < started) {
            self.shared.look(self.group, &known.part, "scrub");
        }
        Ok(())
    }

    /// The log, a little at a time.
    fn log(&mut self, from: Lsn, to: Lsn) -> Result<(), Stopped> {
        let segment_bytes = self.group.segment_bytes();
        let mut at = from;
        while at < to {
            let number = at.segment_number(segment_bytes);
            let segment_end = Lsn((number + 1) * segment_bytes);
            let until = Lsn(at.0 + STEP_BYTES).min(segment_end).min(to);
            match self.group.check_log(at, until) {
                Ok(bytes) => {
                    at = at.advance(bytes);
                    self.passed(bytes, bytes)?;
                }
                Err(error) => {
                    // Folded from under it, or damaged: that is told by a look at the segment.
                    let folded = matches!(error, GroupError::NotCovered { .. });
                    let part = DamagedPart::Log { segment: number };
                    let bytes = segment_end.min(to).bytes_since(at);
                    if folded {
                        self.passed(bytes, 0)?;
                    } else {
                        self.part(&part, bytes)?;
                    }
                    // A segment begins with a record.
                    at = segment_end;
                }
            }
        }
        Ok(())
    }

    /// A part as a whole, which counts for `bytes`.
    fn part(&mut self, part: &DamagedPart, bytes: u64) -> Result<(), Stopped> {
        let (found, whole) = self.shared.look(self.group, part, "scrub");
        let read = match found {
            Found::Whole(read) => read,
            Found::Damaged(_) => bytes,
            Found::Gone | Found::Unknown => 0,
        };
        self.shared.change_scrub(self.group, |scrub| {
            let damaged = matches!(found, Found::Damaged(_));
            scrub.damaged += u64::from(damaged);
            scrub.repaired += u64::from(damaged && whole);
            scrub.untold += u64::from(found == Found::Unknown);
        });
        self.passed(bytes, read)
    }

    /// Counts what was passed, and rests where it is time to.
    fn passed(&mut self, bytes: u64, read: u64) -> Result<(), Stopped> {
        self.shared.change_scrub(self.group, |scrub| {
            scrub.done_bytes += bytes;
            scrub.read_bytes += read;
        });
        self.unrested += read;
        let now = self.shared.now();
        let head = self.group.positions().head;
        let took = now.saturating_sub(self.rested);
        let rest = rest_after(self.unrested, took, head != self.head, self.limit);
        if rest >= REST_MIN {
            let (stop, shutdown) = (&mut self.stop, &mut self.shutdown);
            self.runtime.block_on(async {
                tokio::select! {
                    () = tokio::time::sleep(rest) => {}
                    _ = stop.wait_for(|stop| *stop) => {}
                    _ = shutdown.wait_for(|ending| *ending) => {}
                }
            });
            (self.unrested, self.rested, self.head) = (0, self.shared.now(), head);
        } else if self.unrested >= STEP_BYTES {
            (self.unrested, self.rested, self.head) = (0, now, head);
        }
        let gone = self.shared.replica(self.group.id()).is_none();
        if gone || *self.stop.borrow() || *self.shutdown.borrow() {
            return Err(Stopped);
        }
        Ok(())
    }
}

impl Shared {
    fn change_scrub(&self, group: &Group, change: impl FnOnce(&mut ScrubStatus)) {
        self.change_ledger(group.id(), |ledger| ledger.scrub.as_mut().map(change));
    }

    fn scrub(&self, group: &Group, plan: &Plan, limit: Option<u64>, stop: watch::Receiver<bool>) {
        let mut scrub = Scrub {
            shared: self,
            group,
            limit,
            stop,
            shutdown: self.shutdown_signal(),
            runtime: tokio::runtime::Handle::current(),
            unrested: 0,
            rested: self.now(),
            head: group.positions().head,
        };
        let stopped = scrub.run(plan).is_err();
        let now = self.wall();
        let (state, reason, _) = group.data_state();
        self.change_scrub(group, |scrub| {
            scrub.state_since = now;
            scrub.left_out = left_out(state, reason);
            if stopped {
                scrub.state = ScrubState::Stopped;
                scrub.state_reason = Some("by command, or as the node stopped".to_owned());
            } else {
                scrub.state = ScrubState::Done;
                scrub.done_bytes = scrub.total_bytes;
            }
        });
        self.save_ledgers();
        if let Some(scrub) = self.ledger(group.id()).scrub {
            self.tell_of_scrub(group, &scrub);
        }
    }

    fn tell_of_scrub(&self, group: &Group, scrub: &ScrubStatus) {
        let name = group.name();
        let (read, total) = (ByteSize(scrub.read_bytes), ByteSize(scrub.total_bytes));
        let left = scrub.damaged.saturating_sub(scrub.repaired);
        let (severity, code, text) = match scrub.state {
            ScrubState::Running => {
                (Severity::Info, "scrub-started", format!("reads up to {total} and checks them"))
            }
            ScrubState::Stopped => {
                (Severity::Warning, "scrub-stopped", format!("stopped after {read}"))
            }
            ScrubState::Done if left > 0 => (
                Severity::Error,
                "scrub-done",
                format!(
                    "read {read}: {} parts are damaged, {} were repaired; `tidelog status {name}` \
                     names the rest",
                    scrub.damaged, scrub.repaired
                ),
            ),
            ScrubState::Done => {
                let severity = match scrub.left_out {
                    None => Severity::Info,
                    Some(_) => Severity::Warning,
                };
                let text =
                    format!("read {read}: {} parts were damaged, all are whole", scrub.damaged);
                (severity, "scrub-done", text)
            }
        };
        let skipped = match (scrub.state, scrub.skipped_bytes) {
            (ScrubState::Running, _) | (_, 0) => String::new(),
            (_, bytes) => format!("; {} were not durable here, and not read", ByteSize(bytes)),
        };
        let untold = match (scrub.state, scrub.untold) {
            (ScrubState::Running, _) | (_, 0) => String::new(),
            (_, parts) => format!("; {parts} parts could not be told beside a fold"),
        };
        let left_out = scrub.left_out.as_ref().map_or(String::new(), |why| format!("; {why}"));
        let text = format!("group {name}: scrub: {text}{skipped}{untold}{left_out}");
        self.context.events.emit(severity, code, Some(name.as_str()), text, json!(scrub));
    }
}

impl Replication {
    /// Starts a scrub of this node's copy of a group, at `limit` bytes a second at most.
    ///
    /// # Errors
    ///
    /// Where there is no such group, or a scrub of it runs.
    pub fn scrub(
        &self,
        group_name: &str,
        limit: Option<u64>,
    ) -> Result<ScrubStatus, ReplicationError> {
        let shared = Arc::clone(&self.shared);
        let group = shared.engine(group_name)?;
        let (stop, stopped) = watch::channel(false);
        {
            let mut scrubs = locked(&shared.scrubs);
            if scrubs.contains_key(&group.id()) {
                return Err(ReplicationError::Refused(format!(
                    "group {group_name}: a scrub runs; `tidelog status {group_name}` shows how far \
                     it is, `tidelog scrub {group_name} --stop` ends it"
                )));
            }
            scrubs.insert(group.id(), stop);
        }
        let plan = Plan::of(&group);
        let status = ScrubStatus::begin(shared.wall(), plan.total_bytes(), plan.skipped);
        shared.change_ledger(group.id(), |ledger| {
            ledger.begin_scrub();
            ledger.scrub = Some(status.clone());
        });
        shared.save_ledgers();
        shared.tell_of_scrub(&group, &status);
        tokio::task::spawn_blocking(move || {
            shared.scrub(&group, &plan, limit, stopped);
            locked(&shared.scrubs).remove(&group.id());
        });
        Ok(status)
    }

    /// Stops the scrub of a group that runs here.
    ///
    /// # Errors
    ///
    /// Where there is no such group, or no scrub of it runs.
    pub fn stop_scrub(&self, group_name: &str) -> Result<(), ReplicationError> {
        let group = self.shared.engine(group_name)?;
        let scrubs = locked(&self.shared.scrubs);
        let Some(stop) = scrubs.get(&group.id()) else {
            return Err(ReplicationError::Refused(format!(
                "group {group_name}: no scrub runs; `tidelog scrub {group_name}` starts one"
            )));
        };
        stop.send_replace(true);
        Ok(())
    }

    /// The scrub of a group that runs here, or the last one; and whether it is still at work.
    #[must_use]
    pub fn scrub_status(&self, group: &Group) -> Option<ScrubStatus> {
        self.shared.ledger(group.id()).scrub
    }

    /// What is damaged of a group here.
    #[must_use]
    pub fn damage(&self, group: &Group) -> Vec<super::DamageInfo> {
        self.shared.ledger(group.id()).parts().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_falls_where_hosts_write_and_a_limit_is_below_both() {
        let rest = |busy, limit| rest_after(32 << 20, Duration::ZERO, busy, limit);
        assert_eq!(rest(true, None), Duration::from_secs(1));
        assert_eq!(rest(false, None), Duration::from_millis(125));
        assert_eq!(rest(false, Some(1 << 20)), Duration::from_secs(32));
        assert_eq!(rest(true, Some(u64::MAX)), Duration::from_secs(1), "a limit is no command");
        // The time that the disk took counts.
        let slow = rest_after(32 << 20, Duration::from_millis(700), true, None);
        assert_eq!(slow, Duration::from_millis(300));
        assert_eq!(rest_after(1 << 20, Duration::from_secs(9), true, None), Duration::ZERO);
        assert!(rest_after(u64::MAX, Duration::ZERO, true, Some(0)) > Duration::from_secs(1 << 30));
    }

    #[test]
    fn only_a_whole_copy_is_examined_whole() {
        for whole in [DataState::Consistent, DataState::Retired] {
            assert_eq!(left_out(whole, Some("why".to_owned())), None);
        }
        for part in [DataState::Failed, DataState::None, DataState::ReceivingImage] {
            assert!(left_out(part, Some("why".to_owned())).unwrap().ends_with(": why"));
        }
    }

    #[test]
    fn a_scrub_does_not_outlive_its_process() {
        let mut status = ScrubStatus::begin(LogTime(5), 100, 0);
        status.ended_with_the_process();
        assert_eq!(status.state, ScrubState::Stopped);
        let mut done =
            ScrubStatus { state: ScrubState::Done, ..ScrubStatus::begin(LogTime(5), 1, 0) };
        done.ended_with_the_process();
        assert_eq!(done.state, ScrubState::Done);
    }
}
