//! What an operator has to do, judged by status alone: where nothing gets well by itself, or hosts
//! or data are without what was promised to them.
//!
//! A copy that catches up or takes an image is on its way, and no reason. Nor is what an operator
//! wanted: a copy that was retired, a branch that is kept.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::api::{DataState, GroupStatus, PeerStatus, Status};
use crate::group::Role;
use crate::units::{ByteSize, LogTime, Name};

/// The words for what may be wrong, gravest first.
pub const CODES: [&str; 24] = [
    "group-not-opened",
    "data-failed",
    "split-brain",
    "not-serving",
    "primary-failed",
    "no-primary",
    "hosts-wait",
    "degraded",
    "log-full",
    "restore-not-ended",
    "primary-full",
    "damaged",
    "copies-differ",
    "copy-failed",
    "copy-full",
    "copy-missing",
    "replication-blocked",
    "link-down",
    "paused",
    "rpo-exceeded",
    "not-folded",
    "disk-nearly-full",
    "backup-failed",
    "backup-missing",
];

/// Something that an operator has to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attention {
    /// One of [`CODES`].
    pub code: String,
    /// The group; of one that is not open, its id.
    pub group: String,
    /// One line: object, cause, and what helps.
    pub text: String,
}

/// How long a peer that is connected may say nothing of its copy.
const SILENT_MAX: Duration = Duration::from_secs(30);

/// What a node's status has an operator do at a time, gravest first.
#[must_use]
pub fn attention(status: &Status, now: LogTime) -> Vec<Attention> {
    let mut found = Vec::new();
    for group in &status.unopened_groups {
        let name = group.name.as_ref().map_or(group.id.as_str(), |name| name.as_str());
        let text = format!("group {name} in {}: is not open: {}", group.id, group.reason);
        found.push(of("group-not-opened", name, text));
    }
    for group in &status.groups {
        look_at_group(group, now, &mut found);
    }
    let failures = status.backup_failures.iter().map(|failure| ("backup-failed", "has", failure));
    let alarms = status.backup_alarms.iter().map(|alarm| ("backup-missing", "is", alarm));
    for (code, verb, alarm) in failures.chain(alarms) {
        let (group, job, slot) = (&alarm.group, &alarm.job, alarm.slot);
        let text = format!(
            "group {group}: backup of job {job} for {slot} {verb} {}: {}; `tidelog backup explain \
             {group}/{job}`",
            alarm.state, alarm.text
        );
        found.push(of(code, group.as_str(), text));
    }
    let rank = |one: &Attention| CODES.iter().position(|code| *code == one.code);
    found.sort_by_key(rank);
    found
}

fn of(code: &str, group: &str, text: String) -> Attention {
    assert!(CODES.contains(&code), "{code} is not listed");
    Attention { code: code.to_owned(), group: group.to_owned(), text }
}

fn look_at_group(group: &GroupStatus, now: LogTime, found: &mut Vec<Attention>) {
    let name = &group.name;
    let mut tell = |code: &str, text: String| {
        found.push(of(code, name.as_str(), format!("group {name}: {text}")));
    };
    if group.data_state == DataState::Failed {
        let why = group.data_state_reason.as_deref().unwrap_or("unknown");
        tell(
            "data-failed",
            format!(
                "the disk under this node's data failed: {why}; restart the node once it is well"
            ),
        );
    }
    if let Some(why) = &group.role_reason {
        tell("not-serving", format!("is primary here and serves no host: {why}"));
    }
    // While one runs, it counts as a client.
    let restoring = group.volumes.iter().filter(|volume| volume.restoring && volume.clients == 0);
    for volume in restoring.filter(|_| group.role == Role::Primary) {
        let volume = &volume.name;
        tell(
            "restore-not-ended",
            format!(
                "volume {volume}: a restore into it, or the reading of its base, has not come to \
                 its end, and no host is served it: `tidelog backup restore ID --to \
                 {name}/{volume}` restores it whole; one that was to begin with a base is deleted \
                 (`tidelog volume delete {name}/{volume}`) and created again"
            ),
        );
    }
    let log = &group.log;
    if let Some(why) = &log.full_reason {
        tell("log-full", why.clone());
    }
    if let Some(why) = &log.fold_reason {
        tell("not-folded", format!("the log is not folded, and fills up: {why}"));
    }
    if let (Some(free), Some(reserve)) = (log.disk_free_bytes, log.disk_reserve_bytes)
        && free < reserve
    {
        let (free, reserve) = (ByteSize(free), ByteSize(reserve));
        tell(
            "disk-nearly-full",
            format!("{free} are free on its disk, of which {reserve} are to stay free; free some"),
        );
    }
    if let Some(first) = group.damage.first() {
        let count = group.damage.len();
        let why = first.repair.as_deref().unwrap_or("a repair was not tried yet");
        tell(
            "damaged",
            format!(
                "{count} parts are damaged, the first: {}: {why}; `tidelog status {name}` \
                     names them",
                first.what
            ),
        );
    }
    let differs = ["copies-differ", "logs-differ"];
    let reasons = group.backup_capable.reasons.iter();
    let reasons = reasons.filter(|reason| differs.contains(&&*reason.code));
    let mut differences: Vec<_> = reasons.map(|reason| reason.text.clone()).collect();
    if differences.is_empty() {
        // The verdict says nothing of a copy that is not linked, or not as fit as another.
        let held = |peer: &Name| group.peers.iter().any(|known| known.name == peer.as_str());
        let found = group.differences.iter().filter(|found| held(&found.peer));
        let found = found.filter_map(|found| found.difference());
        differences.extend(found.map(|what| format!("the copies differ: {what}")));
    }
    for what in differences {
        tell("copies-differ", format!("{what}; `tidelog events` says what to do"));
    }
    if group.data_state == DataState::Retired {
        return;
    }
    let primary = |peer: &PeerStatus| peer.link_state != "connected" || peer.role == "primary";
    if group.role == Role::Secondary && !group.peers.iter().any(primary) {
        let what = if group.peers.is_empty() {
            format!(
                "its primary is not among the peers of this node: pair with it again (`tidelog peer \
                 invite` there), or `tidelog promote {name}` here"
            )
        } else {
            format!("no node is its primary; `tidelog promote {name}` on one of them")
        };
        tell("no-primary", what);
    }
    for peer in &group.peers {
        look_at_peer(group, peer, now, &mut tell);
    }
}

fn look_at_peer(
    group: &GroupStatus,
    peer: &PeerStatus,
    now: LogTime,
    tell: &mut impl FnMut(&str, String),
) {
    let name = &group.name;
    let mut tell = |code: &str, text: String| tell(code, format!("peer {}: {text}", peer.name));
    let why = |reason: &Option<String>| reason.clone().unwrap_or_else(|| "unknown".to_owned());
    if peer.link_state != "connected" {
        tell(
            "link-down",
            format!(
                "is not connected: {}; look at that node and at the network",
                why(&peer.link_state_reason)
            ),
        );
    }
    match &*peer.replication_state {
        "split-brain" => tell("split-brain", why(&peer.replication_state_reason)),
        "blocked" => tell("replication-blocked", why(&peer.replication_state_reason)),
        "idle" if group.role == Role::Primary && peer.link_state == "connected" => {
            let since = peer.replication_state_since.unwrap_or(now);
            if now.since(since) > SILENT_MAX {
                let why = why(&peer.replication_state_reason);
                tell("copy-missing", format!("has no copy of it that follows: {why}"));
            }
        }
        "paused" => {
            tell("paused", format!("replication is {}", why(&peer.replication_state_reason)))
        }
        _ => {}
    }
    if let Some(reason) = &peer.degraded_reason {
        let (code, what) = if peer.degraded {
            (
                "degraded",
                format!("hosts do not wait for it: {reason}; they do again once that is mended"),
            )
        } else {
            let command = format!("tidelog replicate {name} --to {} --on-loss continue", peer.name);
            ("hosts-wait", format!("hosts wait for it: {reason}; mend that, or `{command}`"))
        };
        tell(code, what);
    }
    let reigns = peer.role == "primary";
    match peer.data_state {
        Some(DataState::Failed) if reigns => tell(
            "primary-failed",
            format!(
                "is the primary, and the disk under its data failed, so hosts' writes get errors: \
                 {}; restart that node once it is well, or stop it and `tidelog promote {name}` on \
                 a copy",
                why(&peer.data_state_reason)
            ),
        ),
        Some(DataState::Failed) => tell(
            "copy-failed",
            format!(
                "the disk under its copy failed: {}; restart that node once it is well",
                why(&peer.data_state_reason)
            ),
        ),
        _ => {
            if let Some(reason) = &peer.log_full_reason {
                match reigns {
                    true => tell("primary-full", format!("is the primary: {reason}")),
                    false => tell("copy-full", format!("its copy's log has no room: {reason}")),
                }
            }
        }
    }
    let streams = matches!(&*peer.replication_state, "streaming" | "catching-up");
    if let Some(target) = peer.rpo_target_seconds.filter(|target| peer.rpo_actual_seconds > *target)
        && streams
    {
        let shown = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        tell(
            "rpo-exceeded",
            format!(
                "the copy is {:.1?} behind, its target is {:.1?}; look at the link and that node's \
                 disk",
                shown(peer.rpo_actual_seconds),
                shown(target)
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A primary whose copy streams.
    fn well() -> Value {
        json!({
            "node": "a", "version": "0", "backup_alarms": [], "backup_failures": [], "attention": [],
            "groups": [{
                "name": "g", "role": "primary", "epoch": "00000000000000aa",
                "data_state": "consistent", "volumes": [],
                "log": {
                    "head_lsn": 10, "durable_lsn": 10, "committed_lsn": 10, "horizon_lsn": 0,
                    "used_bytes": 10, "limit_bytes": 100, "disk_free_bytes": 9,
                    "disk_reserve_bytes": 9,
                },
                "protection_window": {
                    "from": "2026-01-01T00:00:00Z", "to": "2026-01-01T00:00:00Z", "seconds": 0.0,
                },
                "backup_capable": { "verdict": "yes", "reasons": [] },
                "peers": [{
                    "name": "b", "mode": "async", "role": "secondary", "link_state": "connected",
                    "replication_state": "streaming", "received_lsn": 10, "durable_lsn": 10,
                    "lag": { "bytes": 0, "operations": 0, "seconds": 0.0 },
                    "rpo_target_seconds": 5.0, "rpo_actual_seconds": 5.0, "resync": null,
                    "behind_bytes": 0, "tls": true, "heard_seconds": 0.1,
                    "clock_offset_seconds": 0.0,
                }],
            }],
        })
    }

    fn found(status: Value) -> Vec<Attention> {
        let now = "2026-01-02T00:00:00Z".parse().unwrap();
        attention(&serde_json::from_value(status).unwrap(), now)
    }

    /// What is said where these places of a status that is well have these values.
    fn with(changes: &[(&str, Value)]) -> Vec<Attention> {
        let mut status = well();
        for (place, value) in changes {
            let (parent, key) = place.rsplit_once('/').unwrap();
            status.pointer_mut(parent).unwrap()[key] = value.clone();
        }
        found(status)
    }

    #[test]
    fn what_is_well_or_on_its_way_or_wanted_needs_nobody() {
        assert_eq!(found(well()), []);
        let peer = "/groups/0/peers/0";
        let state = format!("{peer}/replication_state");
        let state = state.as_str();
        for fine in ["catching-up", "resync-source", "resync-target", "idle"] {
            assert_eq!(with(&[(state, json!(fine))]), [], "{fine}");
        }
        let since = ("/groups/0/peers/0/replication_state_since", json!("2026-01-01T23:59:31Z"));
        assert_eq!(with(&[(state, json!("idle")), since]), [], "for as long as a look may take");
        let copy =
            [("/groups/0/role", json!("secondary")), ("/groups/0/peers/0/role", json!("primary"))];
        assert_eq!(with(&copy), []);
        let retired = ("/groups/0/data_state", json!("retired"));
        let down = ("/groups/0/peers/0/link_state", json!("connecting"));
        assert_eq!(with(&[retired, down]), [], "replication was stopped by command");
        let time = "2026-01-01T00:00:00Z";
        let position = json!({ "epoch": "00000000000000aa", "lsn": 8, "time": time });
        let branch = json!([{
            "name": "cut-8", "from": position, "to": position, "bytes": 1, "authored": true,
            "cut": time, "reason": "yielded",
        }]);
        assert_eq!(with(&[("/groups/0/branches", branch)]), []);
    }

    #[test]
    fn each_trouble_has_its_code_and_a_line_that_says_why() {
        let group = |key: &str| format!("/groups/0/{key}");
        let log = |key: &str| format!("/groups/0/log/{key}");
        let peer = |key: &str| format!("/groups/0/peers/0/{key}");
        let why = json!("the very reason");
        let alarm = |state| {
            json!([{
                "group": "g", "job": "nightly", "slot": "2026-01-01T00:00:00Z", "state": state,
                "text": why,
            }])
        };
        let state = |state: &str| {
            vec![
                (peer("replication_state"), json!(state)),
                (peer("replication_state_reason"), why.clone()),
            ]
        };
        let reasons = |code: &str| {
            let reasons = json!([{ "code": code, "text": "the very reason" }]);
            vec![(group("backup_capable/reasons"), reasons)]
        };
        let damage = json!([{
            "part": "log", "segment": 3, "what": "segment 3", "found_by": "scrub",
            "since": "2026-01-01T00:00:00Z", "repair": "the very reason",
        }]);
        let cases = [
            (
                "group-not-opened",
                vec![(
                    "/unopened_groups".to_owned(),
                    json!([{ "id": "07", "reason": why, "since": "2026-01-01T00:00:00Z" }]),
                )],
            ),
            (
                "data-failed",
                vec![
                    (group("data_state"), json!("failed")),
                    (group("data_state_reason"), why.clone()),
                ],
            ),
            ("split-brain", state("split-brain")),
            ("not-serving", vec![(group("role_reason"), why.clone())]),
            ("no-primary", vec![(group("role"), json!("secondary"))]),
            ("no-primary", vec![(group("role"), json!("secondary")), (group("peers"), json!([]))]),
            ("hosts-wait", vec![(peer("degraded_reason"), why.clone())]),
            (
                "degraded",
                vec![(peer("degraded"), json!(true)), (peer("degraded_reason"), why.clone())],
            ),
            ("log-full", vec![(log("full_reason"), why.clone())]),
            (
                "restore-not-ended",
                vec![(
                    group("volumes"),
                    json!([{
                        "name": "v", "size_bytes": 4096, "block_size_bytes": 4096, "clients": 0,
                        "restoring": true,
                    }]),
                )],
            ),
            ("damaged", vec![(group("damage"), damage)]),
            ("copies-differ", reasons("copies-differ")),
            ("copies-differ", reasons("logs-differ")),
            (
                "copy-failed",
                vec![
                    (peer("data_state"), json!("failed")),
                    (peer("data_state_reason"), why.clone()),
                ],
            ),
            ("copy-full", vec![(peer("log_full_reason"), why.clone())]),
            (
                "primary-failed",
                vec![
                    (group("role"), json!("secondary")),
                    (peer("role"), json!("primary")),
                    (peer("data_state"), json!("failed")),
                    (peer("data_state_reason"), why.clone()),
                ],
            ),
            (
                "primary-full",
                vec![
                    (group("role"), json!("secondary")),
                    (peer("role"), json!("primary")),
                    (peer("log_full_reason"), why.clone()),
                ],
            ),
            ("replication-blocked", state("blocked")),
            (
                "link-down",
                vec![
                    (peer("link_state"), json!("connecting")),
                    (peer("link_state_reason"), why.clone()),
                ],
            ),
            ("paused", state("paused")),
            (
                "copy-missing",
                [
                    state("idle"),
                    vec![(peer("replication_state_since"), json!("2026-01-01T23:59:00Z"))],
                ]
                .concat(),
            ),
            ("rpo-exceeded", vec![(peer("rpo_actual_seconds"), json!(5.1))]),
            ("not-folded", vec![(log("fold_reason"), why.clone())]),
            ("disk-nearly-full", vec![(log("disk_free_bytes"), json!(8))]),
            ("backup-missing", vec![("/backup_alarms".to_owned(), alarm("overdue"))]),
            ("backup-failed", vec![("/backup_failures".to_owned(), alarm("failed"))]),
        ];
        let tried: std::collections::BTreeSet<&str> = cases.iter().map(|(code, _)| *code).collect();
        assert_eq!(tried, CODES.into_iter().collect());
        for (code, changes) in cases {
            let changes: Vec<(&str, Value)> =
                changes.iter().map(|(place, value)| (&place[..], value.clone())).collect();
            let [one] = &with(&changes)[..] else { panic!("{code}: {:?}", with(&changes)) };
            assert_eq!(one.code, code);
            assert!(one.text.starts_with("group ") && !one.text.contains('\n'), "{}", one.text);
            let said = one.text.contains("the very reason");
            let by_itself = ["no-primary", "rpo-exceeded", "disk-nearly-full", "restore-not-ended"];
            let by_itself = by_itself.contains(&code);
            assert!(said || by_itself, "{}", one.text);
        }
    }

    #[test]
    fn the_gravest_comes_first_and_all_are_told() {
        let found = with(&[
            ("/groups/0/log/fold_reason", json!("x")),
            ("/groups/0/peers/0/replication_state", json!("split-brain")),
            ("/groups/0/peers/0/link_state", json!("connecting")),
        ]);
        let codes: Vec<&str> = found.iter().map(|one| &one.code[..]).collect();
        assert_eq!(codes, ["split-brain", "link-down", "not-folded"]);
    }

    #[test]
    fn every_code_is_explained_in_the_page_for_trouble() {
        let page = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/trouble.md"));
        for code in CODES {
            assert!(page.contains(&format!("| `{code}` |")), "{code}");
        }
    }
}
