//! `tidelog job …`.

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use tidelog::control::api::{Done, JobInfo, Jobs};
use tidelog::units::{ByteSize, Name, Span};

use super::arguments::JobName;
use super::backup::job_path;
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
    /// Take a repository that the primary's configuration does not have (yet)
    #[arg(long)]
    force: bool,
}

pub async fn job(session: &Session, command: JobCommand) -> Result<()> {
    match command {
        JobCommand::Set(arguments) => {
            let (group, job) = arguments.job.resolve()?;
            let mut body = json!({ "settings": settings(&arguments) });
            if arguments.force {
                body["force"] = json!(true);
            }
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
        "job         {}/{}\nrepository  {}\nschedule    {}\nslots since {}\n",
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
