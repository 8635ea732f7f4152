//! `tidelog status`.

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};

use tidelog::control::api::{
    BackupCapable, Branch, DataState, GroupStatus, LagState, PeerStatus, Role, Status, Verdict,
};
use tidelog::units::{ByteSize, Name};

use super::{Session, output};

/// A copy that makes bytes durable later than this says so: it syncs every second.
const UNDURABLE_SHOWN_SECONDS: f64 = 3.0;
/// Damaged parts that are shown one by one.
const DAMAGE_SHOWN: usize = 5;

/// Show this node's groups: role, log, protection window, peers, and whether they can be backed up
///
/// The exit status is 0 wherever the node answers. For a health check use --check.
#[derive(Args)]
pub struct StatusArguments {
    /// Only this group
    group: Option<Name>,
    /// Show it again every second
    #[arg(long)]
    watch: bool,
    /// Print only what an operator has to do, a line each, gravest first; exit status 1 where there
    /// is anything
    ///
    /// Exit status 1 also where the node does not answer; 0 means that nothing needs an operator. A
    /// copy that catches up or takes an image does not count. With --json, `attention` of the
    /// status: each has `code`, `group` and `text`. docs/trouble.md lists the codes.
    #[arg(long, conflicts_with = "watch")]
    check: bool,
}

pub async fn status(session: &Session, arguments: &StatusArguments) -> Result<()> {
    let path = match &arguments.group {
        Some(group) => format!("/v1/status?group={group}"),
        None => "/v1/status".to_owned(),
    };
    if arguments.check {
        return check(session, &path).await;
    }
    if !arguments.watch {
        return session.ask("GET", &path, None, |status| show(&status)).await;
    }
    let mut ticks = tokio::time::interval(std::time::Duration::from_secs(1));
    loop {
        ticks.tick().await;
        if session.json {
            let value: Value = session.client.get(&path).await?;
            output::print(&value.to_string())?;
            continue;
        }
        let status: Status = session.client.get(&path).await?;
        if output::is_terminal() {
            // Home, and clear from there: no flicker as with clearing first.
            output::print_bytes(b"\x1b[H\x1b[J")?;
        }
        output::print(&show(&status))?;
    }
}

async fn check(session: &Session, path: &str) -> Result<()> {
    let Status { node, attention, .. } = session.client.get(path).await?;
    if session.json {
        output::print_json(&json!({ "node": node, "attention": attention }))?;
    } else {
        for found in &attention {
            output::print(&found.text)?;
        }
    }
    match attention.first() {
        None if session.json => Ok(()),
        None => output::print(&format!("node {node}: nothing needs an operator")),
        Some(first) => bail!(
            "node {node}: needs an operator: {}{}; `tidelog status` shows more",
            first.code,
            attention[1..].iter().map(|next| format!(", {}", next.code)).collect::<String>()
        ),
    }
}

fn show(status: &Status) -> String {
    let mut text = format!("node {}, version {}\n", status.node, status.version);
    if status.groups.is_empty() && status.unopened_groups.is_empty() {
        text.push_str("no groups; make one with `tidelog group create GROUP`\n");
    }
    for group in &status.unopened_groups {
        let since = output::age(group.since);
        let name = group.name.as_ref().map(|name| format!("{name}, ")).unwrap_or_default();
        text.push_str(&format!(
            "\ngroup {name}{}  not open: {} ({since})\n",
            group.id, group.reason
        ));
    }
    for group in &status.groups {
        text.push('\n');
        text.push_str(&show_group(group));
    }
    for alarm in status.backup_alarms.iter().chain(&status.backup_failures) {
        text.push_str(&format!(
            "\nbackup {}: {}/{} of {}: {}\n",
            alarm.state, alarm.group, alarm.job, alarm.slot, alarm.text
        ));
    }
    text
}

fn show_group(group: &GroupStatus) -> String {
    let mut lines = vec![format!(
        "group {}  {}  {}  epoch {}",
        group.name,
        output::word(&group.role),
        output::word(&group.data_state),
        group.epoch
    )];
    if let Some(reason) = &group.role_reason {
        lines.push(format!("  waits: {reason}"));
    }
    if let Some(reason) = &group.data_state_reason {
        let since = group.data_state_since.map_or_else(String::new, output::age);
        lines.push(format!("  because: {reason} ({since})"));
    }
    if let Some(span) = &group.unclean_start {
        let what = match group.role {
            Role::Primary => "unflushed writes",
            Role::Secondary => "what this copy had received",
        };
        lines.push(format!(
            "  unclean start: {what} may be missing behind LSN {}, between {} and {}",
            span.from_lsn,
            output::time(span.from),
            output::time(span.to)
        ));
    }
    let log = &group.log;
    lines.push(format!(
        "  log     {} used of {} ({} on disk); head {}, {} not durable yet, {} in the base",
        ByteSize(log.used_bytes),
        ByteSize(log.limit_bytes),
        ByteSize(log.allocated_bytes),
        log.head_lsn,
        ByteSize(log.head_lsn.bytes_since(log.durable_lsn)),
        ByteSize(log.horizon_lsn.0),
    ));
    if let Some(reason) = &log.limit_reason {
        lines.push(format!("          the limit is {}, {reason}", ByteSize(log.limit_bytes)));
    }
    if let Some(reason) = &log.full_reason {
        let since = log.full_since.map_or_else(String::new, output::age);
        lines.push(format!("          {reason} ({since})"));
    }
    if let (Some(free), Some(reserve)) = (log.disk_free_bytes, log.disk_reserve_bytes)
        && free < reserve
    {
        lines.push(format!(
            "          the disk is nearly full: {} are free, of which {} are to stay free",
            ByteSize(free),
            ByteSize(reserve)
        ));
    }
    if let Some(reason) = &log.fold_reason {
        let since = log.fold_since.map_or_else(String::new, output::age);
        lines.push(format!("          it is not folded: {reason} ({since})"));
    }
    let window = &group.protection_window;
    lines.push(format!(
        "  window  {} back, from {} to {}",
        output::seconds(window.seconds),
        output::time(window.from),
        output::time(window.to)
    ));
    let volumes = group.volumes.iter().map(|volume| {
        let size = ByteSize(volume.size_bytes);
        let clients = match volume.restoring {
            true => "its restore or base not ended".to_owned(),
            false => format!("{} clients", volume.clients),
        };
        format!("{} {size} ({clients})", volume.name)
    });
    lines.push(format!("  volumes {}", or_none(volumes.collect())));
    for volume in &group.volumes {
        let hosts = volume.hosts.iter();
        lines.extend(
            hosts.map(|host| {
                format!("  host    {}: {}", volume.name, super::volume::show_host(host))
            }),
        );
    }
    lines.extend(group.peers.iter().map(show_peer));
    lines.extend(group.branches.iter().map(|branch| show_branch(&group.name, branch)));
    lines.push(format!("  backup  {}", capable(&group.backup_capable)));
    if let Some(scrub) = &group.scrub {
        lines.push(format!("  scrub   {}", super::check::show_scrub(scrub)));
    }
    if let Some(verify) = &group.verify {
        lines.push(format!("  verify  {}", super::check::show_verify(verify)));
    }
    let earlier = group.differences.iter().filter(|found| Some(*found) != group.verify.as_ref());
    lines.extend(earlier.map(|found| {
        let until = "holds until a comparison with that peer finds all the same";
        format!("  differs {}\n          {until}", super::check::show_verify(found))
    }));
    let damage = group.damage.iter().take(DAMAGE_SHOWN);
    lines.extend(damage.map(|damage| format!("  damaged {}", super::check::show_damage(damage))));
    if group.damage.len() > DAMAGE_SHOWN {
        let more = group.damage.len() - DAMAGE_SHOWN;
        lines.push(format!("          and {more} more parts; `--json` has them all"));
    }
    lines.join("\n") + "\n"
}

fn or_none(items: Vec<String>) -> String {
    if items.is_empty() { "none".to_owned() } else { items.join(", ") }
}

/// A tail that is kept here alone, and what can be done with it.
fn show_branch(group: &Name, branch: &Branch) -> String {
    format!(
        "  branch  {name}  {} behind LSN {}, cut {} ({})\n          \
         `tidelog image open {group} --branch {name}` exports it, \
         `tidelog branch remove {group} {name}` gives it up",
        ByteSize(branch.bytes),
        branch.from.lsn,
        output::time(branch.cut),
        if branch.authored { "written here" } else { "received" },
        name = branch.name,
    )
}

/// How far the copy of the two is behind, as far as that is known.
fn behind(peer: &PeerStatus) -> String {
    let heard = peer.lag_state_since.map(|since| {
        format!("when it was last heard, {} ({})", output::time(since), output::age(since))
    });
    match (peer.lag_state, peer.lag.bytes, heard) {
        (LagState::Unknown, ..) | (_, None, _) => {
            let reason = peer.lag_state_reason.as_deref().unwrap_or("no reason was told");
            format!("how far behind is not known: {reason}")
        }
        (LagState::AtLeast, Some(0), Some(heard)) => {
            format!("this copy has all that {} had {heard}", peer.name)
        }
        (LagState::AtLeast, Some(bytes), Some(heard)) => {
            format!("at least {} behind: {} had so much more {heard}", ByteSize(bytes), peer.name)
        }
        (_, Some(bytes), _) => {
            let operations =
                peer.lag.operations.map(|operations| format!("{operations} operations, "));
            format!(
                "{} behind ({}{})",
                ByteSize(bytes),
                operations.unwrap_or_default(),
                output::seconds(peer.lag.seconds),
            )
        }
    }
}

fn show_peer(peer: &PeerStatus) -> String {
    let behind = match &peer.parting {
        // Neither follows the other, so neither is behind.
        Some(parting) => parting.to_string(),
        None if peer.replication_state == "split-brain" => {
            "where the histories part is not known yet".to_owned()
        }
        None => behind(peer),
    };
    let mut lines = vec![format!(
        "  peer    {}  {}  {}  {}; {behind}",
        peer.name,
        output::word(&peer.mode),
        peer.link_state,
        peer.replication_state,
    )];
    if let Some(reason) = &peer.link_state_reason {
        let since = peer.link_state_since.map_or_else(String::new, output::age);
        lines.push(format!("          {}: {reason} ({since})", peer.link_state));
    }
    if let Some(reason) = &peer.replication_state_reason {
        let since = peer.replication_state_since.map_or_else(String::new, output::age);
        lines.push(format!("          {}: {reason} ({since})", peer.replication_state));
    }
    if let Some(state) = peer.data_state.filter(|state| *state != DataState::Consistent) {
        let reason = peer.data_state_reason.as_deref().unwrap_or("no reason was told");
        lines.push(format!("          its data is {}: {reason}", output::word(&state)));
    }
    if let Some(reason) = &peer.log_full_reason {
        lines.push(format!("          there: {reason}"));
    }
    // Of the copy at the peer; what is not durable here, the line of the log says.
    let undurable = peer.behind_bytes.filter(|bytes| *bytes > 0 && peer.role == "secondary");
    if let Some(behind) = undurable
        && peer.replication_state == "streaming"
        && peer.rpo_actual_seconds >= UNDURABLE_SHOWN_SECONDS
    {
        lines.push(format!(
            "          {} are not durable there yet, the oldest of which were written here {} ago",
            ByteSize(behind),
            output::seconds(peer.rpo_actual_seconds)
        ));
    }
    if let Some(reason) = &peer.degraded_reason {
        let since = peer.degraded_since.map_or_else(String::new, output::age);
        let what = if peer.degraded { "degraded: hosts do not wait for it" } else { "hosts wait" };
        lines.push(format!("          {what}: {reason} ({since})"));
    }
    if peer.replication_state == "catching-up" && output::is_terminal() {
        let done = peer.durable_lsn.0;
        lines.push(format!(
            "          {}",
            output::bar(done, done + peer.behind_bytes.unwrap_or_default())
        ));
    }
    lines.join("\n")
}

fn capable(capable: &BackupCapable) -> String {
    let reasons: Vec<&str> = capable.reasons.iter().map(|reason| reason.text.as_str()).collect();
    let word = if capable.verdict == Verdict::Yes { "capable" } else { "not capable" };
    if reasons.is_empty() { word.to_owned() } else { format!("{word}: {}", reasons.join("; ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_of_what_is_not_durable_is_told_of_a_copy_and_is_that_of_the_bytes() {
        let shown = |role: &str, behind: u64, age: f64| {
            let peer = json!({
                "name": "b", "mode": "async", "role": role, "link_state": "connected",
                "replication_state": "streaming", "received_lsn": 10, "durable_lsn": 10,
                "lag": { "bytes": 0, "operations": 0, "seconds": 0.0 },
                "rpo_target_seconds": null, "rpo_actual_seconds": age, "resync": null,
                "behind_bytes": behind, "tls": true, "heard_seconds": 0.1,
                "clock_offset_seconds": 0.0,
            });
            show_peer(&serde_json::from_value(peer).unwrap())
        };
        let late = shown("secondary", 4096, 39.0);
        assert!(late.contains("4 KiB are not durable there yet, the oldest of which"), "{late}");
        assert!(late.contains("were written here 39"), "{late}");
        // Right after it began to follow, a copy knows no age but that of its own process.
        for quiet in
            [shown("primary", 4096, 39.0), shown("secondary", 0, 39.0), shown("secondary", 9, 1.0)]
        {
            assert!(!quiet.contains("durable"), "{quiet}");
        }
    }
}
