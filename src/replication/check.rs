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

/// Checks the next part of a group's log; after its end it begins anew.
pub(super) fn step(shared: &Shared, group: &dyn Replica) {
    let positions = group.positions();
    let end = positions.durable.min(positions.request_end);
    let start = group.log_start();
    let mut check = shared
        .checks
        .lock()
        .expect("no holder panics")
        .get(&group.id())
        .cloned()
        .unwrap_or_default();
    let from =
        if check.checked_to < start || check.checked_to >= end { start } else { check.checked_to };
    if from >= end {
        return;
    }
    let to = Lsn(end.0.min(from.0.saturating_add(STEP_BYTES)));
    match group.check_log(from, to) {
        Ok(_) => {
            check.checked_to = to;
            if from == start {
                check.damaged = None;
            }
        }
        // The log was folded from under it, or the position lies inside a record: begin anew.
        Err(GroupError::NotCovered { .. }) => check.checked_to = Lsn::ZERO,
        Err(error) => {
            check.checked_to = to;
            if check.damaged.is_none() {
                let text = format!(
                    "group {}: the log is damaged: {error}; `tidelog scrub {}` shows all of it",
                    group.name(),
                    group.name()
                );
                let code = "log-damaged";
                let name = Some(group.name().as_str());
                shared.context.events.emit(Severity::Error, code, name, text, Value::Null);
            }
            check.damaged = Some(error.to_string());
        }
    }
    shared.checks.lock().expect("no holder panics").insert(group.id(), check);
}
