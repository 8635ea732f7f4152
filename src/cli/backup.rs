//! `tidelog job …`, `repository …`, `backup …`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use tidelog::control::api::{
    BackupDetails, BackupEntry, Backups, Done, Explanation, JobInfo, Jobs, ProgressInfo,
    Repositories, Restored, RunStarted, RunVerdict, VerifiedBackups,
};
use tidelog::control::{ClientError, encode};
use tidelog::units::{ByteSize, Name, Span};

use super::arguments::{Assignment, JobName, Member};
use super::{Session, output};

#[derive(Subcommand)]
pub enum JobCommand {
    Set(Box<JobSetArguments>),
    /// List the backup jobs
    List {
        /// Only of this group
        group: Option<Name>,
    },
    /// Show a backup job
    Show(JobName),
    /// Remove a backup job; its backups stay
    Remove(JobName),
}

/// Make or change a backup job; what is not given stays as it is
#[derive(Args)]
pub struct JobSetArguments {
    #[command(flatten)]
    job: JobName,
    /// Repository, by its name in each node's configuration; needed for a new job
    #[arg(long)]
    repository: Option<Name>,
    /// When it runs: a cron pattern of five fields, or none for by command only
    #[arg(long, value_name = "CRON")]
    schedule: Option<String>,
    /// Zone of the schedule, such as Europe/Vienna; UTC by default
    #[arg(long, value_name = "TZ")]
    zone: Option<String>,
    /// Node that should make the backup: prefer-secondary, secondary-only, primary-only,
    /// prefer-primary, any, or the same with passive and active
    #[arg(long)]
    placement: Option<String>,
    /// Age of the secondary's copy at most
    #[arg(long, value_name = "DURATION")]
    max_lag: Option<Span>,
    /// From the slot to the latest start
    #[arg(long, value_name = "DURATION")]
    deadline: Option<Span>,
    /// From the start to the forced end of a run
    #[arg(long, value_name = "DURATION")]
    run_limit: Option<Span>,
    /// How long a lost link counts as behind, and how long a delegation waits for its claim
    #[arg(long, value_name = "DURATION")]
    grace: Option<Span>,
    /// Condition under which the preference of the placement holds, such as
    /// primary.cpu_percent>=80; may be repeated
    #[arg(long = "if", value_name = "FACT>=VALUE")]
    conditions: Vec<String>,
    /// Percent of the primary's CPU above which it does not run
    #[arg(long, value_name = "PERCENT")]
    primary_cpu_max: Option<f64>,
    /// Percent of the secondary's CPU above which it is unfit
    #[arg(long, value_name = "PERCENT")]
    secondary_cpu_max: Option<f64>,
    /// Free memory below which the secondary is unfit
    #[arg(long, value_name = "SIZE")]
    memory_free_min: Option<ByteSize>,
    /// Percent of free storage below which the secondary is unfit
    #[arg(long, value_name = "PERCENT")]
    storage_free_min: Option<f64>,
    /// Past the deadline, an old image of the secondary is better than none
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    allow_stale: Option<bool>,
    /// Volumes to back up; all where none is named
    #[arg(long, value_name = "VOLUME,…", value_delimiter = ',')]
    volumes: Vec<Name>,
}

#[derive(Subcommand)]
pub enum RepositoryCommand {
    /// Make a repository; a run never makes one
    Init {
        /// Its name in this node's configuration
        name: Name,
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

fn job_path(group: &Name, job: &Name) -> String {
    format!("/v1/groups/{group}/jobs/{job}")
}

pub async fn job(session: &Session, command: JobCommand) -> Result<()> {
    match command {
        JobCommand::Set(arguments) => {
            let (group, job) = arguments.job.resolve()?;
            let mut body = json!({ "settings": settings(&arguments) });
            for (key, value) in [
                ("repository", arguments.repository.as_ref().map(Name::to_string)),
                ("schedule", arguments.schedule.clone()),
                ("zone", arguments.zone.clone()),
            ] {
                if let Some(value) = value {
                    body[key] = Value::String(value);
                }
            }
            session.ask("PUT", &job_path(&group, &job), Some(body), |job| show_job(&job)).await
        }
        JobCommand::List { group } => {
            let path = match group {
                Some(group) => format!("/v1/jobs?group={group}"),
                None => "/v1/jobs".to_owned(),
            };
            session.ask("GET", &path, None, show_jobs).await
        }
        JobCommand::Show(job) => {
            let (group, job) = job.resolve()?;
            session.ask("GET", &job_path(&group, &job), None, |job| show_job(&job)).await
        }
        JobCommand::Remove(job) => {
            let (group, job) = job.resolve()?;
            session.ask("DELETE", &job_path(&group, &job), None, |done: Done| done.done).await
        }
    }
}

/// The settings that were given.
fn settings(arguments: &JobSetArguments) -> Map<String, Value> {
    let text = |value: &Option<Span>| value.map(|span| json!(span));
    let given = [
        ("placement", arguments.placement.as_ref().map(|placement| json!(placement))),
        ("max_lag", text(&arguments.max_lag)),
        ("deadline", text(&arguments.deadline)),
        ("run_limit", text(&arguments.run_limit)),
        ("grace", text(&arguments.grace)),
        ("if", (!arguments.conditions.is_empty()).then(|| json!(arguments.conditions))),
        ("primary_cpu_max", arguments.primary_cpu_max.map(|percent| json!(percent))),
        ("secondary_cpu_max", arguments.secondary_cpu_max.map(|percent| json!(percent))),
        ("memory_free_min", arguments.memory_free_min.map(|size| json!(size))),
        ("storage_free_min", arguments.storage_free_min.map(|percent| json!(percent))),
        ("allow_stale", arguments.allow_stale.map(|allow| json!(allow))),
        ("volumes", (!arguments.volumes.is_empty()).then(|| json!(arguments.volumes))),
    ];
    given.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
}

fn show_jobs(jobs: Jobs) -> String {
    let rows = jobs.jobs.iter().map(|job| {
        vec![
            format!("{}/{}", job.group, job.name),
            job.repository.clone(),
            schedule(job),
            job.settings
                .get("placement")
                .and_then(Value::as_str)
                .unwrap_or("prefer-secondary")
                .to_owned(),
        ]
    });
    output::table(
        &["JOB", "REPOSITORY", "SCHEDULE", "PLACEMENT"],
        rows.collect(),
        "no jobs; make one with `tidelog job set GROUP JOB --repository NAME`",
    )
}

fn schedule(job: &JobInfo) -> String {
    let zone = job.zone.as_deref().unwrap_or("UTC");
    job.schedule
        .as_ref()
        .map_or_else(|| "by command".to_owned(), |pattern| format!("{pattern} {zone}"))
}

fn show_job(job: &JobInfo) -> String {
    let mut text = format!(
        "job         {}/{}\nrepository  {}\nschedule    {}\nset         {}\n",
        job.group,
        job.name,
        job.repository,
        schedule(job),
        output::time(job.since)
    );
    for (key, value) in &job.settings {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        text.push_str(&format!("{key:<11} {value}\n"));
    }
    text
}

pub async fn repository(session: &Session, command: RepositoryCommand) -> Result<()> {
    let done = |done: Done| done.done;
    match command {
        RepositoryCommand::Init { name } => {
            session.ask("POST", &format!("/v1/repositories/{name}/init"), None, done).await
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
            session.ask("GET", &path, None, show_backups).await
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
            let path = format!("/v1/backups/{}/restore", encode(&id));
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

/// A name for the progress of this one call.
fn ticket() -> String {
    let moment = output::now().0;
    format!("{}-{moment}", std::process::id())
}

/// Waits for `asking`, and on a terminal shows how far it is.
async fn with_progress(
    session: &Session,
    path: &str,
    asking: impl Future<Output = Result<()>>,
) -> Result<()> {
    if !output::is_terminal() || session.json {
        return asking.await;
    }
    let bar = output::ProgressLine::new();
    tokio::pin!(asking);
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    loop {
        tokio::select! {
            result = &mut asking => {
                bar.clear();
                return result;
            }
            _ = ticks.tick() => {
                let progress: Result<Option<ProgressInfo>, ClientError> =
                    session.client.get(path).await;
                if let Ok(Some(progress)) = progress {
                    bar.show(progress.done_bytes, progress.total_bytes);
                }
            }
        }
    }
}

async fn run(session: &Session, job: &Member) -> Result<()> {
    let path = job_path(&job.group, &job.name);
    if session.json {
        return session.ask("POST", &format!("{path}/run"), None, |_: Value| String::new()).await;
    }
    let started: RunStarted = session.client.call("POST", &format!("{path}/run"), None).await?;
    output::print(&show_started(&started))?;
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
    }
    Ok(())
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
    let rows = explanation.inputs.iter().map(|(key, value)| vec![key.clone(), fact(value)]);
    text.push_str(&output::table(&["FACT", "VALUE"], rows.collect(), "no facts"));
    text
}

/// A fact on one line: its value, with its age where it has one.
fn fact(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| format!("{key} {}", fact(value)))
            .collect::<Vec<_>>()
            .join(", "),
        Value::Null => "unknown".to_owned(),
        other => other.to_string(),
    }
}

fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

fn outcome(backup: &BackupEntry) -> String {
    let mut text = output::word(&backup.outcome);
    if let Some(node) = &backup.run_on
        && text == "delegated"
    {
        text.push_str(&format!(" to {node}"));
    }
    if backup.branch.is_some() {
        text.push_str(", of a branch");
    }
    text
}

fn show_backups(backups: Backups) -> String {
    let rows = backups.backups.iter().map(|backup| {
        vec![
            backup.id.as_deref().map_or("-", short).to_owned(),
            format!("{}/{}", backup.group, backup.job),
            output::time(backup.slot),
            format!("{} ({})", backup.node, output::word(&backup.role)),
            outcome(backup),
            ByteSize(backup.bytes).to_string(),
            ByteSize(backup.bytes_added).to_string(),
            output::seconds(backup.duration_seconds),
            output::age(backup.time),
        ]
    });
    output::table(
        &["ID", "JOB", "SLOT", "NODE", "OUTCOME", ">SIZE", ">ADDED", ">TOOK", ">AGE"],
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
        text.push_str(&format!("branch    {branch}\n"));
    }
    text
}
