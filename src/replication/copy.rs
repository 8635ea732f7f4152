//! What a secondary tells its primary of its copy: the state of the data, what a check of its log
//! found, how old that check is. A primary tells its copies the same, so that they know whether it
//! takes writes.
//!
//! Who wants to know asks once a heartbeat. An answer is true of a moment after the question, so
//! its age has a bound by the asker's clock; where it is too old, the peer's state is unknown.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::events::Severity;
use crate::group::{DataState, Role};
use crate::units::{GroupId, Lsn, NodeId};

use super::check::Pass;
use super::core::Membership;
use super::health::LogCheck;
use super::rpc::PeerContext;
use super::service::Shared;

pub(super) const METHOD: &str = "replication.copies";

/// What a node says of its copy of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct CopyReport {
    group: GroupId,
    /// What it was when it said so.
    pub(super) role: Role,
    pub(super) data_state: DataState,
    #[serde(default)]
    pub(super) data_reason: Option<String>,
    /// Why its log is full, where it is.
    #[serde(default)]
    pub(super) log_full: Option<String>,
    /// The same as far as it knew at that moment, which is what a promote there would say.
    #[serde(default)]
    pub(super) full_now: Option<String>,
    /// It is short of room, though it may have some at this moment: full a moment ago, and filled
    /// as fast as it is folded.
    #[serde(default)]
    short_of_room: bool,
    checked_to: Lsn,
    #[serde(default)]
    damaged: Option<String>,
    #[serde(default)]
    base_damaged: Option<String>,
    #[serde(default)]
    differs: Option<String>,
    check_age_seconds: f64,
    /// Where a comparison of the two logs failed.
    #[serde(default)]
    pub(super) mismatch: Option<Lsn>,
}

/// Reports, with when they were asked for; none where the peer was away since, and only that its
/// disk had failed or was full is kept, for when it is well again.
pub(super) type Reports = HashMap<(NodeId, GroupId), (CopyReport, Option<Duration>)>;

impl CopyReport {
    /// Why the disk under a copy failed, if it did. Of its own disk a primary tells people itself.
    pub(super) fn failure(&self) -> Option<String> {
        let failed = self.role == Role::Secondary && self.data_state == DataState::Failed;
        failed.then(|| self.data_reason.clone().unwrap_or_else(|| "no reason was told".to_owned()))
    }

    /// The same, where it is not what it told before.
    fn fails_anew(&self, before: Option<&CopyReport>) -> Option<String> {
        self.failure().filter(|_| before.is_none_or(|before| before.failure().is_none()))
    }

    /// Whether it told of a failure before, and does not now.
    fn is_well_again(&self, before: Option<&CopyReport>) -> bool {
        let is_well = self.role == Role::Secondary && self.data_state == DataState::Consistent;
        is_well && before.is_some_and(|before| before.failure().is_some())
    }

    /// A shortage of room lasts until it has ended: not from one try to the next.
    fn goes_on_from(&mut self, before: Option<&CopyReport>) {
        if self.short_of_room && self.log_full.is_none() {
            let before = before.filter(|before| before.role == self.role);
            self.log_full = before.and_then(|before| before.log_full.clone());
        }
    }

    /// The shortage of room that it tells of, by what it is called, and why.
    fn shortage(&self) -> Option<(Role, &str)> {
        Some((self.role, self.log_full.as_deref()?))
    }

    /// The shortage that begins with this, and whose ends, by role.
    fn shortages(&self, before: Option<&CopyReport>) -> (Option<String>, Option<Role>) {
        let then = before.and_then(CopyReport::shortage).map(|(role, _)| role);
        let now = self.shortage().map(|(role, _)| role);
        let begins = self.shortage().filter(|_| then != now).map(|(_, why)| why.to_owned());
        (begins, then.filter(|_| then != now))
    }

    /// The check of the log there, as old as it is by now.
    fn log_check(&self, since: Duration) -> LogCheck {
        let age = Duration::try_from_secs_f64(self.check_age_seconds).unwrap_or(Duration::MAX);
        LogCheck {
            checked_to: self.checked_to,
            damaged: self.damaged.clone(),
            base_damaged: self.base_damaged.clone(),
            differs: self.differs.clone(),
            age: age.saturating_add(since),
        }
    }
}

/// Asks the peers about their copies until the service ends.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut shutdown = shared.shutdown_signal();
    loop {
        for (peer, name, groups) in shared.copies_elsewhere() {
            if shared.asking.lock().expect("no holder panics").insert(peer) {
                let shared = Arc::clone(&shared);
                tokio::spawn(async move {
                    shared.ask_about_copies(peer, &name, &groups).await;
                    shared.asking.lock().expect("no holder panics").remove(&peer);
                });
            }
        }
        tokio::select! {
            () = tokio::time::sleep(shared.config.heartbeat) => {}
            _ = shutdown.wait_for(|ending| *ending) => return,
        }
    }
}

impl Shared {
    /// Peers that are linked, with the groups of this node that they hold a copy of, or that they
    /// are the primary of.
    fn copies_elsewhere(&self) -> Vec<(NodeId, String, Vec<GroupId>)> {
        let cores = self.cores.lock().expect("no holder panics");
        let linked = cores.iter().filter(|(_, core)| core.conn().is_some());
        linked
            .map(|(node, core)| {
                let copied = |group: &GroupId| {
                    core.channel(*group).is_some_and(|channel| {
                        let local = channel.local();
                        let reigns = channel.remote().is_some_and(|remote| remote.primary);
                        let member = matches!(local.membership, Membership::Member { .. });
                        member && (local.primary || reigns)
                    })
                };
                (*node, core.name().to_string(), core.groups().filter(copied).collect())
            })
            .filter(|(_, _, groups): &(_, _, Vec<GroupId>)| !groups.is_empty())
            .collect()
    }

    async fn ask_about_copies(&self, node: NodeId, name: &str, groups: &[GroupId]) {
        let asked = self.now();
        let body = json!({ "groups": groups });
        let answer = match self.call(name, METHOD, body, self.config.lost_after).await {
            Ok(answer) => answer,
            Err(error) => return tracing::debug!("{error}"),
        };
        match serde_json::from_value::<Vec<CopyReport>>(answer) {
            Ok(reports) => {
                for mut report in
                    reports.into_iter().filter(|report| groups.contains(&report.group))
                {
                    let (key, role) = ((node, report.group), report.role);
                    let (fails, is_well, (full, has_room)) = {
                        let mut copies = self.copies.lock().expect("no holder panics");
                        let before = copies.get(&key).map(|(before, _)| before);
                        report.goes_on_from(before);
                        let failure = (report.fails_anew(before), report.is_well_again(before));
                        let told = (failure.0, failure.1, report.shortages(before));
                        copies.insert(key, (report, Some(asked)));
                        told
                    };
                    if let Some(role) = has_room {
                        self.tell_of_room(name, key.1, role, None);
                    }
                    if let Some(why) = full {
                        self.tell_of_room(name, key.1, role, Some(&why));
                    }
                    if let Some(why) = fails {
                        self.tell_copy_failed(name, key.1, &why);
                    }
                    if is_well {
                        self.tell_copy_recovered(name, key.1);
                    }
                }
            }
            Err(error) => tracing::warn!("peer {name}: its word on its copies: {error}"),
        }
    }

    fn tell_copy_failed(&self, peer: &str, group: GroupId, why: &str) {
        let Some(group) = self.groups.by_id(group) else { return };
        let name = group.name().as_str();
        let text = format!(
            "group {name}: the disk under the copy on {peer} failed, and it follows no further: \
             {why}; restart {peer} once its disk is well"
        );
        let events = &self.context.events;
        events.emit(Severity::Error, "copy-failed", Some(name), text, json!({ "peer": peer }));
    }

    /// A peer's log has no room, for that reason, or has some again.
    fn tell_of_room(&self, peer: &str, group: GroupId, role: Role, why: Option<&str>) {
        let Some(group) = self.groups.by_id(group) else { return };
        let name = group.name().as_str();
        let (full, has_room, whose) = match role {
            Role::Primary => ("primary-full", "primary-has-room", "its primary"),
            Role::Secondary => ("copy-full", "copy-has-room", "the copy"),
        };
        let (severity, code, what) = match why {
            Some(why) => (Severity::Warning, full, format!("has no room: {why}")),
            None => (Severity::Info, has_room, "has room again".to_owned()),
        };
        let text = format!("group {name}: the log of {whose} on {peer} {what}");
        let events = &self.context.events;
        events.emit(severity, code, Some(name), text, json!({ "peer": peer }));
    }

    fn tell_copy_recovered(&self, peer: &str, group: GroupId) {
        let group = self.groups.by_id(group).filter(|group| group.role() == Role::Primary);
        let Some(group) = group else { return };
        let name = group.name().as_str();
        let text = format!("group {name}: the disk under the copy on {peer} is well again");
        let events = &self.context.events;
        events.emit(Severity::Info, "copy-recovered", Some(name), text, json!({ "peer": peer }));
    }

    /// What a peer told of its copy, if that is still worth something, and its log's check. What it
    /// told as primary is none of a copy.
    pub(super) fn copy_report(
        &self,
        node: NodeId,
        group: GroupId,
        now: Duration,
    ) -> Option<(CopyReport, LogCheck)> {
        let report = self.peer_report(node, group, now);
        report.filter(|(report, _)| report.role == Role::Secondary)
    }

    /// The same, whatever the peer is.
    pub(super) fn peer_report(
        &self,
        node: NodeId,
        group: GroupId,
        now: Duration,
    ) -> Option<(CopyReport, LogCheck)> {
        let good_for = self.config.lost_after.max(self.config.heartbeat * 3);
        let copies = self.copies.lock().expect("no holder panics");
        let (report, asked) = copies.get(&(node, group))?;
        let since = now.saturating_sub((*asked)?);
        (since <= good_for).then(|| (report.clone(), report.log_check(since)))
    }

    /// A node that is away may come back as another: what it said is void.
    pub(super) fn forget_copy_reports(&self, node: NodeId) {
        let mut copies = self.copies.lock().expect("no holder panics");
        copies.retain(|(peer, _), (report, asked)| {
            let is_void = *peer == node;
            if is_void {
                *asked = None;
            }
            !is_void || report.failure().is_some() || report.log_full.is_some()
        });
    }

    /// Answers a primary, or a copy. Groups that are none of its business are left out.
    pub(super) fn report_copies(&self, peer: &PeerContext, body: &Value) -> Result<Value, String> {
        #[derive(Deserialize)]
        struct Body {
            groups: Vec<GroupId>,
        }
        let body: Body = serde_json::from_value(body.clone())
            .map_err(|error| format!("a request that is not understood: {error}"))?;
        let now = self.now();
        let groups = self.groups.groups().into_iter();
        let reports: Vec<CopyReport> = groups
            .filter(|group| body.groups.contains(&group.id()))
            .filter(|group| self.membership(&**group, peer.node) != Membership::Stranger)
            .map(|group| {
                let id = group.id();
                let (data_state, data_reason, _) = group.data_state();
                let check = self.log_check(id, now);
                let cores = self.cores.lock().expect("no holder panics");
                let channel = cores.get(&peer.node).and_then(|core| core.channel(id));
                CopyReport {
                    group: id,
                    role: group.role(),
                    data_state,
                    data_reason,
                    log_full: group.why_full(),
                    full_now: group.full_now(),
                    short_of_room: group.is_short_of_room(),
                    checked_to: check.checked_to,
                    damaged: check.damaged,
                    base_damaged: check.base_damaged,
                    differs: check.differs,
                    check_age_seconds: check.age.as_secs_f64(),
                    mismatch: channel.and_then(|channel| channel.comparison().1),
                }
            })
            .collect();
        serde_json::to_value(reports).map_err(|error| error.to_string())
    }

    /// What is known of this node's own log of a group.
    pub(super) fn log_check(&self, group: GroupId, now: Duration) -> LogCheck {
        let ledger = self.ledger(group);
        let checks = self.checks.lock().expect("no holder panics");
        let pass = checks.get(&group).cloned().unwrap_or_else(|| Pass::begin(now));
        LogCheck {
            checked_to: pass.checked_to(),
            damaged: ledger.of_log(),
            base_damaged: ledger.of_base(),
            differs: ledger.differs_from(None),
            age: pass.age(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_there_ages_here() {
        let report = CopyReport {
            group: GroupId([7; 16]),
            role: Role::Secondary,
            data_state: DataState::Consistent,
            data_reason: None,
            log_full: None,
            full_now: None,
            short_of_room: false,
            checked_to: Lsn(8),
            damaged: None,
            base_damaged: None,
            differs: None,
            check_age_seconds: 4.0,
            mismatch: None,
        };
        assert_eq!(report.log_check(Duration::from_secs(3)).age, Duration::from_secs(7));
        // Whatever a peer writes there.
        let odd = CopyReport { check_age_seconds: -1.0, ..report };
        assert_eq!(odd.log_check(Duration::ZERO).age, Duration::MAX);
    }

    #[test]
    fn a_disk_that_failed_under_a_primary_is_news_once_it_is_under_a_copy() {
        let told = json!({
            "group": GroupId([7; 16]), "role": "primary", "data_state": "failed",
            "data_reason": "EIO", "checked_to": 8, "check_age_seconds": 1.0,
        });
        let primary: CopyReport = serde_json::from_value(told).unwrap();
        let demoted = CopyReport { role: Role::Secondary, ..primary.clone() };
        assert_eq!(primary.fails_anew(None), None, "it tells people itself");
        assert_eq!(demoted.fails_anew(Some(&primary)), Some("EIO".to_owned()));
        assert_eq!(demoted.fails_anew(Some(&demoted)), None);
        let well = CopyReport { data_state: DataState::Consistent, ..demoted.clone() };
        assert!(well.is_well_again(Some(&demoted)) && !well.is_well_again(None));
        for no in [&primary, &demoted] {
            assert!(!no.is_well_again(Some(&demoted)));
        }
    }

    #[test]
    fn a_full_log_there_is_told_when_it_begins_and_when_it_ends_and_not_with_each_try() {
        let told = |role: &str, full: Option<&str>, short: bool| -> CopyReport {
            let told = json!({
                "group": GroupId([7; 16]), "role": role, "data_state": "consistent",
                "log_full": full, "short_of_room": short, "checked_to": 8, "check_age_seconds": 1.0,
            });
            serde_json::from_value(told).unwrap()
        };
        let copy = |full, short| told("secondary", full, short);
        let mut before: Option<CopyReport> = None;
        let mut events = Vec::new();
        for mut report in [
            copy(None, false),
            copy(Some("ENOSPC"), false),
            copy(Some("ENOSPC"), true),
            copy(None, true),
            copy(Some("ENOSPC again"), true),
            copy(None, true),
            copy(None, false),
            copy(None, false),
            copy(Some("ENOSPC"), true),
            told("primary", Some("folding"), true),
            told("primary", None, false),
        ] {
            report.goes_on_from(before.as_ref());
            let (begins, ends) = report.shortages(before.as_ref());
            events.extend(ends.map(|role| (role, None)));
            events.extend(begins.map(|why| (report.role, Some(why))));
            before = Some(report);
        }
        let full = |why: &str| Some(why.to_owned());
        let (a, b) = (Role::Primary, Role::Secondary);
        let begins_anew = [(b, full("ENOSPC")), (b, None), (a, full("folding")), (a, None)];
        assert_eq!(events[..2], [(b, full("ENOSPC")), (b, None)]);
        assert_eq!(events[2..], begins_anew);
    }

    #[test]
    fn a_state_of_a_later_version_is_no_good_state() {
        let told = json!({
            "group": GroupId([7; 16]), "role": "secondary", "data_state": "half-there",
            "checked_to": 8, "check_age_seconds": 1.0, "more": true,
        });
        assert!(serde_json::from_value::<CopyReport>(told.clone()).is_err());
        let mut good = told;
        good["data_state"] = json!("consistent");
        assert!(serde_json::from_value::<CopyReport>(good).is_ok(), "unknown keys are skipped");
    }
}
