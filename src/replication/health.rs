//! Whether a node's copy of a group may be backed up now: a pure judgement over checked facts, with
//! every reason against it.
//!
//! A secondary judges its own copy, by what it sees itself. A primary judges its peer's copy by
//! what the peer acknowledged to it and tells of it; a primary without peers judges its own data.
//! Nothing is assumed: a fact that is not known counts against.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::group::DataState;
use crate::units::Lsn;

use super::channel::ReplicationState;

/// The limit on lag where neither a job nor `rpo_target` gives one.
pub const LAG_LIMIT_DEFAULT: Duration = Duration::from_secs(60);

/// The age of a log's check above which it counts as stuck.
const CHECK_AGE_MAX: Duration = Duration::from_secs(300);

/// Whether the copy may be backed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It may.
    Yes,
    /// It may not, for the reasons given.
    No,
}

/// One reason, for programs and for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// A stable word, such as `link-down` or `lag`.
    pub code: String,
    /// One line.
    pub text: String,
}

/// The verdict with its reasons; with `yes` there are none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupCapable {
    /// The verdict.
    pub verdict: Verdict,
    /// What speaks against it.
    pub reasons: Vec<Reason>,
}

impl BackupCapable {
    /// Whether the copy may be backed up.
    #[must_use]
    pub fn is_yes(&self) -> bool {
        self.verdict == Verdict::Yes
    }
}

/// What checks of CRCs found on this node: those of the log go on all the time, the base is read by
/// hosts, folds and scrubs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogCheck {
    /// Bytes up to here were read again and were whole.
    pub checked_to: Lsn,
    /// What was damaged of it, and was not found whole since.
    pub damaged: Option<String>,
    /// The same of the base.
    pub base_damaged: Option<String>,
    /// Where the last comparison found other bytes than the peer's, both being whole.
    pub differs: Option<String>,
    /// How long ago the check last came on.
    pub age: Duration,
}

/// What is known of a replicated copy.
#[derive(Clone, Debug)]
pub struct CopyFacts {
    /// The copy is on this node; else it is the peer's, seen from here.
    pub own: bool,
    /// The peer's name.
    pub peer: String,
    /// For how long the link has been down; none while it is up.
    pub link_down: Option<Duration>,
    /// What replication is doing.
    pub replication: ReplicationState,
    /// Why, where it is not streaming.
    pub replication_reason: String,
    /// The age of the copy, at worst; none where it is unknown.
    pub lag: Option<Duration>,
    /// The age that is allowed.
    pub lag_limit: Duration,
    /// State of the copy's data; none where its node has not told it lately.
    pub data_state: Option<DataState>,
    /// Why, where it is not consistent.
    pub data_reason: Option<String>,
    /// Where the copy ends.
    pub received: Lsn,
    /// Up to which it survives power loss.
    pub durable: Lsn,
    /// The primary's head as last known.
    pub primary_head: Lsn,
    /// Up to where both logs were compared by their chain and were equal.
    pub compared: Option<Lsn>,
    /// Where such a comparison failed.
    pub mismatch: Option<Lsn>,
    /// The CRC check of the log on the copy's node.
    pub log_check: LogCheck,
}

fn reason(code: &str, text: String) -> Reason {
    Reason { code: code.to_owned(), text }
}

fn verdict(reasons: Vec<Reason>) -> BackupCapable {
    let verdict = if reasons.is_empty() { Verdict::Yes } else { Verdict::No };
    BackupCapable { verdict, reasons }
}

fn data_reasons(state: DataState, why: Option<&str>, place: &str, reasons: &mut Vec<Reason>) {
    let why = why.map(|why| format!(": {why}")).unwrap_or_default();
    match state {
        DataState::Consistent => {}
        DataState::None | DataState::ReceivingImage => {
            reasons.push(reason("no-image", format!("there is no image yet{why}")));
        }
        DataState::Failed => {
            reasons.push(reason(
                "data-failed",
                format!("the disk under the data on {place} failed{why}"),
            ));
        }
        DataState::Retired => {
            reasons.push(reason("retired", format!("replication to this copy was stopped{why}")));
        }
    }
}

fn check_reasons(check: &LogCheck, place: &str, reasons: &mut Vec<Reason>) {
    if let Some(what) = &check.damaged {
        reasons.push(reason("log-damaged", format!("the log on {place} is damaged: {what}")));
    }
    if let Some(what) = &check.base_damaged {
        reasons.push(reason("base-damaged", format!("the base on {place} is damaged: {what}")));
    }
    if check.age > CHECK_AGE_MAX {
        let text = format!(
            "the log on {place} has not been checked for {:.0} s: reading it takes too long",
            check.age.as_secs_f64()
        );
        reasons.push(reason("check-stalled", text));
    }
}

/// Judges data that is not replicated.
#[must_use]
pub fn judge_local(state: DataState, why: Option<&str>, check: &LogCheck) -> BackupCapable {
    let mut reasons = Vec::new();
    data_reasons(state, why, "this node", &mut reasons);
    check_reasons(check, "this node", &mut reasons);
    verdict(reasons)
}

/// Judges a replicated copy.
#[must_use]
pub fn judge_copy(facts: &CopyFacts) -> BackupCapable {
    let mut reasons = Vec::new();
    let place = if facts.own { "this node" } else { &facts.peer };
    if let Some(down) = facts.link_down {
        let text = format!("the link to {} is down for {:.1} s", facts.peer, down.as_secs_f64());
        reasons.push(reason("link-down", text));
    }
    match facts.replication {
        ReplicationState::Streaming => {}
        // Catching up is told by lag: a copy that is a moment behind is fit.
        ReplicationState::CatchingUp => {}
        state => {
            let text = format!("replication is {}: {}", state.text(), facts.replication_reason);
            reasons.push(reason(&format!("replication-{}", state.text()), text));
        }
    }
    match facts.lag {
        Some(lag) if lag > facts.lag_limit => {
            let text = format!(
                "the copy is {:.1} s behind, the limit is {:.1} s",
                lag.as_secs_f64(),
                facts.lag_limit.as_secs_f64()
            );
            reasons.push(reason("lag", text));
        }
        Some(_) => {}
        None => {
            let text = format!("{} has not told yet how far it is", facts.peer);
            reasons.push(reason("lag-unknown", text));
        }
    }
    match facts.data_state {
        Some(state) => data_reasons(state, facts.data_reason.as_deref(), place, &mut reasons),
        None => {
            let text = format!("{} has not told lately what its copy is worth", facts.peer);
            reasons.push(reason("copy-unknown", text));
        }
    }
    check_reasons(&facts.log_check, place, &mut reasons);
    if let Some(what) = &facts.log_check.differs {
        reasons.push(reason("copies-differ", format!("the copies differ: {what}")));
    }
    if let Some(lsn) = facts.mismatch {
        let text = format!("the logs of the two nodes differ before LSN {lsn}");
        reasons.push(reason("logs-differ", text));
    } else if facts.compared.is_none() {
        let text =
            format!("the log was not compared with {}'s since this node started", facts.peer);
        reasons.push(reason("not-compared", text));
    }
    if facts.durable > facts.received {
        let text = format!(
            "positions contradict: durable {} is above received {}",
            facts.durable, facts.received
        );
        reasons.push(reason("positions", text));
    }
    if facts.received > facts.primary_head {
        let text = format!(
            "positions contradict: the copy ends at {}, the primary at {}",
            facts.received, facts.primary_head
        );
        reasons.push(reason("positions", text));
    }
    let told = reasons.iter().any(|reason| reason.code == "no-image");
    if facts.received == Lsn::ZERO && !told {
        let text = if facts.own {
            "this copy has nothing of the log yet".to_owned()
        } else {
            // It may hold anything: it is asked when it is connected.
            format!("{} has not told yet what it holds, since this node started", facts.peer)
        };
        reasons.push(reason("no-image", text));
    }
    verdict(reasons)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit() -> CopyFacts {
        CopyFacts {
            own: true,
            peer: "a".to_owned(),
            link_down: None,
            replication: ReplicationState::Streaming,
            replication_reason: String::new(),
            lag: Some(Duration::from_millis(300)),
            lag_limit: LAG_LIMIT_DEFAULT,
            data_state: Some(DataState::Consistent),
            data_reason: None,
            received: Lsn(4096),
            durable: Lsn(4000),
            primary_head: Lsn(4096),
            compared: Some(Lsn(4096)),
            mismatch: None,
            log_check: LogCheck { checked_to: Lsn(4096), ..LogCheck::default() },
        }
    }

    #[test]
    fn a_fit_copy_has_no_reasons() {
        let judged = judge_copy(&fit());
        assert_eq!(judged, BackupCapable { verdict: Verdict::Yes, reasons: Vec::new() });
    }

    /// Each fact alone turns the verdict, and is the reason that is named.
    #[test]
    fn every_bad_fact_alone_is_enough() {
        let cases: Vec<(&str, CopyFacts)> = vec![
            ("link-down", CopyFacts { link_down: Some(Duration::from_secs(1)), ..fit() }),
            ("replication-idle", CopyFacts { replication: ReplicationState::Idle, ..fit() }),
            ("replication-paused", CopyFacts { replication: ReplicationState::Paused, ..fit() }),
            ("replication-blocked", CopyFacts { replication: ReplicationState::Blocked, ..fit() }),
            (
                "replication-split-brain",
                CopyFacts { replication: ReplicationState::SplitBrain, ..fit() },
            ),
            ("lag", CopyFacts { lag: Some(LAG_LIMIT_DEFAULT + Duration::from_nanos(1)), ..fit() }),
            ("lag-unknown", CopyFacts { lag: None, ..fit() }),
            ("copy-unknown", CopyFacts { data_state: None, ..fit() }),
            ("no-image", CopyFacts { data_state: Some(DataState::None), ..fit() }),
            ("data-failed", CopyFacts { data_state: Some(DataState::Failed), ..fit() }),
            ("retired", CopyFacts { data_state: Some(DataState::Retired), ..fit() }),
            (
                "log-damaged",
                CopyFacts {
                    log_check: LogCheck {
                        damaged: Some("segment 0, LSN 96".to_owned()),
                        ..LogCheck::default()
                    },
                    ..fit()
                },
            ),
            (
                "base-damaged",
                CopyFacts {
                    log_check: LogCheck {
                        base_damaged: Some("chunk at 0".to_owned()),
                        ..LogCheck::default()
                    },
                    ..fit()
                },
            ),
            (
                "copies-differ",
                CopyFacts {
                    log_check: LogCheck {
                        differs: Some("4 KiB".to_owned()),
                        ..LogCheck::default()
                    },
                    ..fit()
                },
            ),
            (
                "check-stalled",
                CopyFacts {
                    log_check: LogCheck {
                        age: CHECK_AGE_MAX + Duration::from_nanos(1),
                        ..LogCheck::default()
                    },
                    ..fit()
                },
            ),
            ("logs-differ", CopyFacts { mismatch: Some(Lsn(4096)), ..fit() }),
            ("not-compared", CopyFacts { compared: None, ..fit() }),
            ("positions", CopyFacts { durable: Lsn(4097), ..fit() }),
            ("positions", CopyFacts { primary_head: Lsn(4095), ..fit() }),
            ("no-image", CopyFacts { received: Lsn(0), durable: Lsn(0), ..fit() }),
        ];
        for (code, facts) in cases {
            let judged = judge_copy(&facts);
            assert_eq!(judged.verdict, Verdict::No, "{code}");
            let codes: Vec<_> = judged.reasons.iter().map(|reason| &reason.code[..]).collect();
            assert_eq!(codes, [code]);
        }
    }

    #[test]
    fn what_a_peer_has_not_told_is_not_called_nothing() {
        let text = |facts: &CopyFacts| {
            let judged = judge_copy(facts);
            let [one] = &judged.reasons[..] else { panic!("{judged:?}") };
            one.text.clone()
        };
        let none = CopyFacts { received: Lsn(0), durable: Lsn(0), ..fit() };
        assert!(text(&none).contains("nothing of the log yet"));
        let theirs = text(&CopyFacts { own: false, ..none.clone() });
        assert!(theirs.contains("a has not told yet what it holds"), "{theirs}");
        // An image that is on its way has come far already, perhaps.
        let coming = CopyFacts {
            data_state: Some(DataState::ReceivingImage),
            data_reason: Some("3 MiB of 9 MiB".to_owned()),
            ..none
        };
        assert_eq!(text(&coming), "there is no image yet: 3 MiB of 9 MiB");
    }

    #[test]
    fn a_copy_that_catches_up_is_judged_by_its_lag() {
        let behind = CopyFacts { replication: ReplicationState::CatchingUp, ..fit() };
        assert!(judge_copy(&behind).is_yes());
    }

    #[test]
    fn local_data_is_judged_by_its_own_state() {
        let whole = LogCheck::default();
        assert!(judge_local(DataState::Consistent, None, &whole).is_yes());
        assert!(!judge_local(DataState::Failed, Some("EIO"), &whole).is_yes());
        let damaged = LogCheck { damaged: Some("LSN 96".to_owned()), ..whole };
        assert!(!judge_local(DataState::Consistent, None, &damaged).is_yes());
    }
}
