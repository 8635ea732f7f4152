//! Reads the log of each group again, a little at a time, and keeps what it found for the verdict.
//!
//! Bytes are checked when they arrive and when they are read; this finds what rots in between,
//! before a backup or a promote has to.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::events::Severity;
use crate::group::GroupError;
use crate::units::Lsn;

use super::health::LogCheck;
use super::replica::Replica;
use super::service::Shared;

/// Time between two steps.
const STEP_EVERY: Duration = Duration::from_secs(10);
/// Bytes of a group's log that a step reads.
const STEP_BYTES: u64 = 16 << 20;

/// Checks until the service ends.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut shutdown = shared.shutdown_signal();
    loop {
        tokio::select! {
            () = tokio::time::sleep(STEP_EVERY) => {}
            _ = shutdown.wait_for(|ending| *ending) => return,
        }
        for group in shared.groups.groups() {
            let shared = Arc::clone(&shared);
            // Fails only while the runtime ends.
            let _ = tokio::task::spawn_blocking(move || step(&shared, &*group)).await;
        }
    }
}

/// What was read so far of a group's log.
#[derive(Clone, Debug, Default)]
pub(super) struct Pass {
    /// What the verdict is told.
    pub(super) check: LogCheck,
    /// What this pass has found damaged. Damage counts until a whole pass finds none.
    found: Option<String>,
}

/// Checks the next part of a group's log; after its end it begins anew.
pub(super) fn step(shared: &Shared, group: &dyn Replica) {
    let positions = group.positions();
    let end = positions.durable.min(positions.request_end);
    let start = group.log_start();
    let id = group.id();
    let mut pass =
        shared.checks.lock().expect("no holder panics").get(&id).cloned().unwrap_or_default();
    if pass.check.checked_to < start || pass.check.checked_to >= end {
        pass.check.damaged = pass.found.take();
        pass.check.checked_to = start;
    }
    let from = pass.check.checked_to;
    if from >= end {
        return;
    }
    let to = Lsn(end.0.min(from.0.saturating_add(STEP_BYTES)));
    match group.check_log(from, to) {
        Ok(bytes) => pass.check.checked_to = from.advance(bytes),
        // Folded from under it: begin anew.
        Err(GroupError::NotCovered { .. }) => pass.check.checked_to = Lsn::ZERO,
        Err(error) => {
            if pass.check.damaged.is_none() {
                let name = group.name();
                let text = format!(
                    "group {name}: the log is damaged: {error}; `tidelog status {name}` shows what it means for backups"
                );
                let (code, name) = ("log-damaged", Some(name.as_str()));
                shared.context.events.emit(Severity::Error, code, name, text, Value::Null);
            }
            pass.found.get_or_insert(error.to_string());
            pass.check.damaged = pass.found.clone();
            // A segment begins with a record.
            let segment_bytes = group.segment_bytes();
            let next = (from.segment_number(segment_bytes) + 1) * segment_bytes;
            pass.check.checked_to = Lsn(next);
        }
    }
    shared.checks.lock().expect("no holder panics").insert(id, pass);
}
