//! `tidelog repository …`, `backup …`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Subcommand;
use serde_json::{Value, json};

use tidelog::control::api::{
    BackupDetails, BackupEntry, Backups, Done, Explanation, Outcome, ProgressInfo, Reason,
    Repositories, Restored, RunStarted, RunVerdict, VerifiedBackups,
};
use tidelog::control::encode;
use tidelog::units::{ByteSize, Name};

use super::arguments::{Assignment, Member};
use super::progress::{ticket, with_progress};
use super::{Session, output};

#[derive(Subcommand)]
pub enum RepositoryCommand {
    /// Make a repository; a run never makes one
    Init {
        /// Its name in this node's configuration
        name: Name,
        /// Make a new one, also where this node knows of backups in one that is out of reach
        #[arg(long)]
        force: bool,
    },
    /// Check a repository's structure
    Check {
        /// Its name in this node's configuration
        name: Name,
        /// Read all data, too
        #[arg(long)]
        read_data: bool,
    },
    /// List this node's repositories
    List,
}

#[derive(Subcommand)]
pub enum BackupCommand {
    /// Start a run of a job on every node that holds the group
    ///
    /// Each node decides by itself; this returns when this node has. On a terminal it shows how far
    /// a run on this node is.
    Run {
        /// GROUP/JOB
        job: Member,
    },
    /// Show what this node would decide now, and why, without running it
    Explain {
        /// GROUP/JOB
        job: Member,
        /// Fact to override, such as role=primary or secondary.available=false; may be repeated
        #[arg(long, value_name = "KEY=VALUE", num_args = 1..)]
        assume: Vec<Assignment>,
    },
    /// List backups, and runs of this node that made none
    List {
        /// Only of this GROUP, or GROUP/JOB
        #[arg(value_name = "GROUP[/JOB]")]
        of: Option<String>,
    },
    /// Show a backup
    Show {
        /// Its id, or the start of it
        id: String,
    },
    /// Read backups back whole and compare their checksums
    Verify {
        /// Only this one
        id: Option<String>,
    },
    /// Bring volumes of a backup back
    ///
    /// Into a volume it ends as a host's flush does: in mode `sync` once the peer has it too.
    Restore {
        /// Its id, or the start of it
        id: String,
        /// Only this volume of the backup
        #[arg(long)]
        volume: Option<Name>,
        /// A new file (with several volumes a new directory), or a volume GROUP/VOLUME that no host
        /// uses; write ./A/B for a path that looks like a volume
        #[arg(long, value_name = "PATH|GROUP/VOLUME")]
        to: String,
    },
}

pub(super) fn job_path(group: &Name, job: &Name) -> String {
    format!("/v1/groups/{group}/jobs/{job}")
}

pub async fn repository(session: &Session, command: RepositoryCommand) -> Result<()> {
    let done = |done: Done| done.done;
    match command {
        RepositoryCommand::Init { name, force } => {
            let path = format!("/v1/repositories/{name}/init");
            session.ask("POST", &path, Some(json!({ "force": force })), done).await
        }
        RepositoryCommand::Check { name, read_data } => {
            let path = format!("/v1/repositories/{name}/check");
            session.ask("POST", &path, Some(json!({ "read_data": read_data })), done).await
        }
        RepositoryCommand::List => {
            session.ask("GET", "/v1/repositories", None, show_repositories).await
        }
    }
}

fn show_repositories(repositories: Repositories) -> String {
    let rows = repositories.repositories.iter().map(|repository| {
        let id = repository.id.as_deref().map(short).map(str::to_owned);
        let reason = repository.reason.clone().unwrap_or_default();
        vec![repository.name.clone(), repository.url.clone(), id.unwrap_or(reason)]
    });
    output::table(
        &["REPOSITORY", "URL", "ID"],
        rows.collect(),
        "no repositories; add a [[repository]] to the configuration",
    )
}

pub async fn backup(session: &Session, command: BackupCommand) -> Result<()> {
    match command {
        BackupCommand::Run { job } => run(session, &job).await,
        BackupCommand::Explain { job, assume } => {
            let mut path = format!("{}/explain", job_path(&job.group, &job.name));
            for (index, assignment) in assume.iter().enumerate() {
                let separator = if index == 0 { '?' } else { '&' };
                let text = format!("{}={}", assignment.key, assignment.value);
                path.push_str(&format!("{separator}assume={}", encode(&text)));
            }
            session.ask("GET", &path, None, |explanation| show_explanation(&explanation)).await
        }
        BackupCommand::List { of } => {
            let path = match of.as_deref().map(|of| of.split_once('/').ok_or(of)) {
                None => "/v1/backups".to_owned(),
                Some(Err(group)) => format!("/v1/backups?group={}", encode(group)),
                Some(Ok((group, job))) => {
                    format!("/v1/backups?group={}&job={}", encode(group), encode(job))
                }
            };
            list(session, &path).await
        }
        BackupCommand::Show { id } => {
            let path = format!("/v1/backups/{}", encode(&id));
            session.ask("GET", &path, None, |details| show_backup(&details)).await
        }
        BackupCommand::Verify { id } => {
            let ticket = ticket();
            let body = json!({ "id": id, "ticket": ticket });
            let show = |verified: VerifiedBackups| {
                let lines: Vec<String> = verified
                    .verified
                    .iter()
                    .map(|one| format!("backup {}: {} read, whole", one.id, ByteSize(one.bytes)))
                    .collect();
                if lines.is_empty() { "no backups".to_owned() } else { lines.join("\n") }
            };
            let asking = session.ask("POST", "/v1/backups/verify", Some(body), show);
            with_progress(session, &format!("/v1/progress/{ticket}"), asking).await
        }
        BackupCommand::Restore { id, volume, to } => {
            let ticket = ticket();
            let mut body = json!({ "volume": volume, "ticket": ticket });
            match to.parse::<Member>() {
                Ok(target) => {
                    body["to_group"] = json!(target.group);
                    body["to_volume"] = json!(target.name);
                }
                Err(_) => body["path"] = json!(std::path::absolute(PathBuf::from(&to))?),
            }
            let path = format!("/v1/backups/{}", encode(&id));
            let known = session.client.call::<BackupDetails>("GET", &path, None).await;
            if let Some(why) = known.ok().and_then(|details| details.backup.branch) {
                output::print_error(&format!("backup {}: does not count: {why}", short(&id)));
            }
            let path = format!("{path}/restore");
            let show = |restored: Restored| {
                let volumes = restored
                    .volumes
                    .iter()
                    .map(|volume| format!("{} ({})", volume.name, ByteSize(volume.size_bytes)));
                format!("restored {} to {to}", volumes.collect::<Vec<_>>().join(", "))
            };
            let asking = session.ask("POST", &path, Some(body), show);
            with_progress(session, &format!("/v1/progress/{ticket}"), asking).await
        }
    }
}

async fn list(session: &Session, path: &str) -> Result<()> {
    let answer: Value = session.client.get(path).await?;
    let listed: Backups = serde_json::from_value(answer.clone())?;
    let problems = listed.problems.clone();
    let is_empty = listed.backups.is_empty();
    if session.json {
        output::print_json(&answer)?;
    } else if !is_empty || problems.is_empty() {
        output::print(&show_backups(listed))?;
    }
    if is_empty && !problems.is_empty() {
        bail!("{}", problems.join("; "));
    }
    problems.iter().for_each(|problem| output::print_error(problem));
    Ok(())
}

async fn run(session: &Session, job: &Member) -> Result<()> {
    let path = job_path(&job.group, &job.name);
    let answer: Value = session.client.call("POST", &format!("{path}/run"), None).await?;
    let started: RunStarted = serde_json::from_value(answer.clone())?;
    let fails = started.decision.decision == RunVerdict::Fail;
    if session.json {
        output::print_json(&answer)?;
    } else if !fails {
        output::print(&show_started(&started))?;
    }
    // The error has every reason; nothing says them twice.
    if fails {
        bail!("{}", failed(&started, "fail", &started.decision.reasons));
    }
    if session.json {
        return Ok(());
    }
    if started.decision.decision == RunVerdict::Run && output::is_terminal() {
        let bar = output::ProgressLine::new();
        let mut ticks = tokio::time::interval(Duration::from_millis(200));
        let mut seen = false;
        // The run begins a moment after the decision: until it was seen once, no progress is no
        // end.
        for tick in 0_u64.. {
            ticks.tick().await;
            let progress: Option<ProgressInfo> =
                session.client.get(&format!("{path}/progress")).await?;
            match progress {
                Some(progress) => {
                    seen = true;
                    bar.show(progress.done_bytes, progress.total_bytes);
                }
                None if seen || tick > 50 => break,
                None => {}
            }
        }
        bar.clear();
        return ended_well(session, &started).await;
    }
    Ok(())
}

/// Fails where a run that was waited for made no backup.
async fn ended_well(session: &Session, started: &RunStarted) -> Result<()> {
    let path = format!("/v1/backups?group={}&job={}", started.group, started.job);
    let listed: Backups = session.client.get(&path).await?;
    let mut runs = listed.backups.iter();
    let run = runs.find(|run| run.slot == started.slot && run.node == started.node);
    match run {
        Some(run) if matches!(run.outcome, Outcome::Failed | Outcome::Missed) => {
            bail!("{}", failed(started, &output::word(&run.outcome), &run.reasons))
        }
        _ => Ok(()),
    }
}

/// Why there is no backup, on one line.
fn failed(started: &RunStarted, what: &str, reasons: &[Reason]) -> String {
    let RunStarted { group, job, node, .. } = started;
    let reasons: Vec<_> = reasons.iter().map(|reason| reason.text.as_str()).collect();
    format!(
        "job {group}/{job}: {what} on {node}: {}; `tidelog backup explain {group}/{job}` shows \
         the facts",
        reasons.join("; ")
    )
}

fn show_started(started: &RunStarted) -> String {
    let mut text = format!(
        "job {}/{}, slot {}: {} decides: {}",
        started.group,
        started.job,
        started.slot,
        started.node,
        started.decision.decision.as_str()
    );
    if let Some(node) = &started.decision.run_on {
        text.push_str(&format!(", {node} makes the backup"));
    }
    for reason in &started.decision.reasons {
        text.push_str(&format!("\n  {}: {}", reason.code, reason.text));
    }
    for peer in &started.told {
        text.push_str(&format!("\n  {peer} was told"));
    }
    for peer in &started.not_told {
        text.push_str(&format!("\n  not told: {peer}"));
    }
    text
}

fn show_explanation(explanation: &Explanation) -> String {
    let mut text = format!(
        "job {}/{} on {} ({}): {}",
        explanation.group,
        explanation.job,
        explanation.node,
        output::word(&explanation.role),
        explanation.decision.decision.as_str()
    );
    if let Some(node) = &explanation.decision.run_on {
        text.push_str(&format!(", {node} makes the backup"));
    }
    if let Some(slot) = explanation.slot {
        text.push_str(&format!("\nslot {slot}"));
    }
    for reason in &explanation.decision.reasons {
        text.push_str(&format!("\n  {}: {}", reason.code, reason.text));
    }
    text.push_str("\n\n");
    let rows = explanation.inputs.iter().map(|(name, input)| {
        let age = input["age_seconds"].as_f64().map_or_else(String::new, output::short_age);
        let assumed = if input["assumed"] == true { " (assumed)" } else { "" };
        vec![name.clone(), format!("{}{assumed}", fact(name, &input["value"])), age]
    });
    text.push_str(&output::table(&["FACT", "VALUE", ">AGE"], rows.collect(), "no facts"));
    text
}

/// A fact's value on one line, in the unit that its name ends with.
fn fact(name: &str, value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        Value::Array(values) if values.is_empty() => "none".to_owned(),
        Value::Array(values) => {
            let one = |value: &Value| match (value["text"].as_str(), value["why"].as_str()) {
                (Some(text), _) => text.to_owned(),
                (_, Some(why)) => format!("{}: {why}", fact("", &value["node"])),
                _ => value.to_string(),
            };
            values.iter().map(one).collect::<Vec<_>>().join("; ")
        }
        value if name.ends_with("_bytes") => {
            value.as_u64().map_or_else(|| value.to_string(), |bytes| ByteSize(bytes).to_string())
        }
        value if name.ends_with("_seconds") => {
            value.as_f64().map_or_else(|| value.to_string(), output::short_age)
        }
        value if name.ends_with("_percent") => {
            value.as_f64().map_or_else(|| value.to_string(), |percent| format!("{percent:.0} %"))
        }
        other => other.to_string(),
    }
}

fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

fn id(backup: &BackupEntry) -> Option<&str> {
    let out_of_reach = backup.unreachable.as_ref().map(|unreachable| unreachable.id.as_str());
    backup.id.as_deref().or(out_of_reach)
}

fn outcome(backup: &BackupEntry) -> String {
    let mut text = output::word(&backup.outcome);
    if let Some(node) = &backup.run_on
        && text == "delegated"
    {
        text.push_str(&format!(" to {node}"));
    }
    if backup.branch.is_some() {
        text.push_str(", does not count");
    }
    if backup.unreachable.is_some() {
        text.push_str(", repository unreachable");
    }
    text
}

/// What a row has to say beyond its outcome: why there is no backup, or none to rely on.
fn reason(backup: &BackupEntry) -> String {
    if let Some(unreachable) = &backup.unreachable {
        return unreachable.reason.clone();
    }
    if let Some(branch) = &backup.branch {
        return branch.clone();
    }
    if backup.outcome == Outcome::Done {
        return String::new();
    }
    let reasons: Vec<_> = backup.reasons.iter().map(|reason| reason.text.as_str()).collect();
    reasons.join("; ")
}

fn show_backups(backups: Backups) -> String {
    let rows = backups.backups.iter().map(|backup| {
        vec![
            id(backup).map_or("-", short).to_owned(),
            format!("{}/{}", backup.group, backup.job),
            output::time(backup.slot),
            format!("{} ({})", backup.node, output::word(&backup.role)),
            outcome(backup),
            ByteSize(backup.bytes).to_string(),
            ByteSize(backup.bytes_added).to_string(),
            output::seconds(backup.duration_seconds),
            output::age(backup.time),
            reason(backup),
        ]
    });
    output::table(
        &["ID", "JOB", "SLOT", "NODE", "OUTCOME", ">SIZE", ">ADDED", ">TOOK", ">AGE", "REASON"],
        rows.collect(),
        "no backups; `tidelog backup run GROUP/JOB` makes one",
    )
}

fn show_backup(details: &BackupDetails) -> String {
    let backup = &details.backup;
    let mut text = format!(
        "backup    {}\njob       {}/{}\nslot      {}\nnode      {} ({})\noutcome   {}\n",
        backup.id.as_deref().unwrap_or("-"),
        backup.group,
        backup.job,
        backup.slot,
        backup.node,
        output::word(&backup.role),
        outcome(backup),
    );
    if let (Some(epoch), Some(lsn)) = (backup.epoch, backup.lsn) {
        let age = output::age(backup.time);
        text.push_str(&format!("image     epoch {epoch}, lsn:{lsn}, {} ({age})\n", backup.time));
    }
    text.push_str(&format!(
        "size      {}, {} read, {} added, in {}\n",
        ByteSize(backup.bytes),
        ByteSize(backup.bytes_read),
        ByteSize(backup.bytes_added),
        output::seconds(backup.duration_seconds)
    ));
    for volume in &backup.volumes {
        text.push_str(&format!("volume    {} ({})\n", volume.name, ByteSize(volume.size_bytes)));
    }
    for reason in &backup.reasons {
        text.push_str(&format!("because   {}: {}\n", reason.code, reason.text));
    }
    if let Some(branch) = &backup.branch {
        text.push_str(&format!("counts    no: {branch}\n"));
    }
    text
}
