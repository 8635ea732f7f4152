//! What happened, for people and programs: an event is a fact with a severity, kept in a bounded
//! ring and sent to whoever follows.
//!
//! The ring is held in memory; the file under it is written through a [`Journal`], which the node
//! supplies, so that this room needs nothing from below.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::units::LogTime;

/// How much an event asks of an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Nothing to do.
    Info,
    /// Look at it today.
    Warning,
    /// Something is at risk now.
    Error,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// The event's number on this node; grows by one.
    pub sequence: u64,
    /// Wall-clock time on this node.
    pub time: LogTime,
    /// How much it asks of an operator.
    pub severity: Severity,
    /// A stable word for programs, such as `link-lost` or `backup-overdue`.
    pub code: String,
    /// The group it concerns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// What happened, what is at risk, and what to do: one line.
    pub text: String,
    /// Facts for programs: LSNs, names, sizes.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub details: serde_json::Value,
}

/// Keeps events beyond the life of the process.
pub trait Journal: Send + Sync {
    /// Appends one event. A failure to keep it must not stop what it reports on.
    fn append(&self, event: &Event);
}

type Follower = Box<dyn Fn(&Event) -> bool + Send>;

struct Inner {
    next_sequence: u64,
    ring: VecDeque<Event>,
    followers: Vec<Follower>,
}

/// The sender and the ring; clones share them.
#[derive(Clone)]
pub struct Events {
    inner: Arc<Mutex<Inner>>,
    journal: Option<Arc<dyn Journal>>,
    now: Arc<dyn Fn() -> LogTime + Send + Sync>,
}

/// Events that the ring holds at most.
pub const RING_EVENTS: usize = 4096;

impl Events {
    /// A ring that starts with `kept` (oldest first), dates events by `now`, and writes through
    /// `journal`.
    pub fn new(
        now: Arc<dyn Fn() -> LogTime + Send + Sync>,
        kept: Vec<Event>,
        journal: Option<Arc<dyn Journal>>,
    ) -> Events {
        let next_sequence = kept.last().map_or(1, |event| event.sequence + 1);
        let skip = kept.len().saturating_sub(RING_EVENTS);
        let ring = kept.into_iter().skip(skip).collect();
        let inner = Arc::new(Mutex::new(Inner { next_sequence, ring, followers: Vec::new() }));
        Events { inner, journal, now }
    }

    /// A ring without a file whose events all carry the same time, for tests and tools.
    #[must_use]
    pub fn in_memory() -> Events {
        Events::new(Arc::new(|| LogTime(0)), Vec::new(), None)
    }

    /// Reports that something happened.
    pub fn emit(
        &self,
        severity: Severity,
        code: &str,
        group: Option<&str>,
        text: impl Into<String>,
        details: serde_json::Value,
    ) {
        let mut inner = self.inner.lock().expect("no holder panics");
        let event = Event {
            sequence: inner.next_sequence,
            time: (self.now)(),
            severity,
            code: code.to_owned(),
            group: group.map(str::to_owned),
            text: text.into(),
            details,
        };
        inner.next_sequence += 1;
        if inner.ring.len() == RING_EVENTS {
            inner.ring.pop_front();
        }
        match severity {
            Severity::Info => tracing::info!(code, group, "{}", event.text),
            Severity::Warning => tracing::warn!(code, group, "{}", event.text),
            Severity::Error => tracing::error!(code, group, "{}", event.text),
        }
        if let Some(journal) = &self.journal {
            journal.append(&event);
        }
        inner.followers.retain(|follower| follower(&event));
        inner.ring.push_back(event);
    }

    /// The events held with a number above `sequence`, oldest first.
    #[must_use]
    pub fn since(&self, sequence: u64) -> Vec<Event> {
        let inner = self.inner.lock().expect("no holder panics");
        inner.ring.iter().filter(|event| event.sequence > sequence).cloned().collect()
    }

    /// Calls `follower` for every event from now on, until it answers `false`. It must not block
    /// and must not emit.
    pub fn follow(&self, follower: impl Fn(&Event) -> bool + Send + 'static) {
        self.inner.lock().expect("no holder panics").followers.push(Box::new(follower));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_is_bounded_and_numbers_go_on() {
        let events = Events::in_memory();
        for _ in 0..RING_EVENTS + 5 {
            events.emit(Severity::Info, "x", None, "y", serde_json::Value::Null);
        }
        let held = events.since(0);
        assert_eq!(held.len(), RING_EVENTS);
        assert_eq!(held.last().unwrap().sequence, RING_EVENTS as u64 + 5);
        let more = Events::new(Arc::new(|| LogTime(0)), held, None);
        more.emit(Severity::Info, "x", None, "y", serde_json::Value::Null);
        assert_eq!(more.since(RING_EVENTS as u64 + 5).len(), 1);
    }
}
