//! Handlers of backups: jobs, repositories, runs, the decision, list, show, verify, restore.

use std::path::PathBuf;
use std::sync::Arc;

use crate::backup::{BackupError, JobChange, Progress, RepositoryError, RestoreTarget};
use crate::log::control::JobRecord;
use crate::units::Name;

use super::api::{
    BackupDetails, JobInfo, Jobs, ProgressInfo, Repositories, RepositoryInfo, Restored,
    RestoredVolume, VerifiedBackups,
};
use super::context::Context;
use super::groups::{answer, done};
use super::problem::Problem;
use super::route::{Answer, AnswerFuture, Call};

impl From<BackupError> for Problem {
    fn from(error: BackupError) -> Problem {
        let text = error.to_string();
        let (status, code) = match error {
            BackupError::Group(error) => return error.into(),
            BackupError::Repository(error) => match error {
                RepositoryError::Unknown { .. } => (404, "no-such-repository"),
                RepositoryError::Url { .. } | RepositoryError::NotADirectory { .. } => {
                    (400, "invalid")
                }
                RepositoryError::Missing { .. } => (409, "repository-missing"),
                RepositoryError::Unreachable { .. } => (503, "repository-unreachable"),
                RepositoryError::Exists { .. } => (409, "exists"),
                RepositoryError::Password { .. } => (500, "repository-password"),
                RepositoryError::NoBackup { .. } => (404, "no-such-backup"),
                RepositoryError::Stopped { .. } => (503, "stopped"),
                RepositoryError::Damaged { .. } => (500, "damaged"),
                _ => (500, "repository"),
            },
            BackupError::Job(_) | BackupError::Assume(_) => (400, "invalid"),
            BackupError::NoJob { .. } => (404, "no-such-job"),
            BackupError::NoBackup { .. } => (404, "no-such-backup"),
            BackupError::WasThere { .. } => (409, "repository-missing"),
            BackupError::Restore { .. } => (409, "restore"),
            BackupError::Internal(_) => (500, "bug"),
        };
        Problem::new(status, code, text)
    }
}

fn job_info(group: &Name, job: JobRecord) -> JobInfo {
    JobInfo {
        group: group.clone(),
        name: job.name,
        repository: job.repository,
        schedule: job.schedule,
        zone: job.zone,
        since: job.since,
        settings: job.settings,
    }
}

pub(super) fn jobs(context: &Context, call: &Call) -> Answer {
    let mut jobs = Vec::new();
    for group in context.groups(call.query("group"))? {
        let of_group = context.scheduler.jobs(group.name().as_str())?;
        jobs.extend(of_group.into_iter().map(|job| job_info(group.name(), job)));
    }
    answer(Jobs { jobs })
}

pub(super) fn show_job(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let name = call.path("job");
    let jobs = context.scheduler.jobs(group.name().as_str())?;
    let job = jobs.into_iter().find(|job| job.name.as_str() == name);
    let missing = || BackupError::NoJob { group: group.name().clone(), job: name.to_owned() };
    answer(job_info(group.name(), job.ok_or_else(missing)?))
}

pub(super) fn set_job(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let name: Name = call.path("job").parse()?;
    let force: bool = call.field("force")?.unwrap_or(false);
    let mut body = call.body.clone();
    body.remove("force");
    let change: JobChange = serde_json::from_value(body.into())
        .map_err(|error| Problem::invalid(format!("job {}/{name}: {error}", group.name())))?;
    let known = match &change.repository {
        Some(wanted) => knows_repository(context, wanted),
        None => Ok(()),
    };
    if !force && let Err(why) = &known {
        let what = format!("job {}/{name}: {why}, or give --force", group.name());
        return Err(Problem::new(409, "no-such-repository", what));
    }
    let job = context.scheduler.set_job(group.name().as_str(), name, change)?;
    if let Err(why) = known {
        context.events.emit(
            crate::events::Severity::Warning,
            "job-repository",
            Some(group.name().as_str()),
            format!("job {}/{}: {why}", group.name(), job.name),
            serde_json::Value::Null,
        );
    }
    answer(job_info(group.name(), job))
}

/// Whether this node's configuration has a repository; else what it has, and what to do.
fn knows_repository(context: &Context, wanted: &str) -> Result<(), String> {
    let config = context.config.read().expect("no holder panics");
    let names: Vec<&str> = config.repository.iter().map(|known| known.name.as_str()).collect();
    if names.contains(&wanted) {
        return Ok(());
    }
    let known = match &names[..] {
        [] => "no repository".to_owned(),
        names => names.join(", "),
    };
    Err(format!(
        "repository {wanted} is not configured on node {}, which has {known}; add a \
         [[repository]] of that name to its configuration",
        context.node.name
    ))
}

pub(super) fn remove_job(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let job = call.path("job");
    context.scheduler.remove_job(group.name().as_str(), job)?;
    done(format!("job {}/{job}: removed; its backups stay", group.name()))
}

pub(super) fn run(context: Arc<Context>, call: Call) -> AnswerFuture {
    Box::pin(async move {
        let group = context.group(call.path("group"))?;
        answer(context.scheduler.run(group.name().as_str(), call.path("job")).await?)
    })
}

pub(super) fn explain(context: Arc<Context>, call: Call) -> AnswerFuture {
    Box::pin(async move {
        let group = context.group(call.path("group"))?;
        let mut assume = Vec::new();
        for (_, text) in call.query.iter().filter(|(key, _)| key == "assume") {
            let (key, value) = text
                .split_once('=')
                .ok_or_else(|| Problem::invalid(format!("assume `{text}`: expected KEY=VALUE")))?;
            assume.push((key.to_owned(), value.to_owned()));
        }
        let name = group.name().as_str();
        answer(context.scheduler.explain(name, call.path("job"), &assume).await?)
    })
}

pub(super) fn run_progress(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let progress = context.scheduler.progress(group.name().as_str(), call.path("job"));
    answer(progress.map(|(done_bytes, total_bytes)| ProgressInfo { done_bytes, total_bytes }))
}

pub(super) fn repositories(context: Arc<Context>, _call: Call) -> AnswerFuture {
    Box::pin(async move {
        let info = |(config, id): (crate::backup::RepositoryConfig, Result<String, _>)| {
            let (id, reason) = match id {
                Ok(id) => (Some(id), None),
                Err(error) => (None, Some(RepositoryError::to_string(&error))),
            };
            RepositoryInfo { name: config.name, url: config.url, id, reason }
        };
        let list = context.scheduler.repository_list().await?;
        answer(Repositories { repositories: list.into_iter().map(info).collect() })
    })
}

pub(super) fn init_repository(context: Arc<Context>, call: Call) -> AnswerFuture {
    Box::pin(async move {
        let name = call.path("repository");
        let force: bool = call.field("force")?.unwrap_or(false);
        let id = context.scheduler.repository_init(name, force).await?;
        done(format!("repository {name}: made, id {id}"))
    })
}

pub(super) fn check_repository(context: Arc<Context>, call: Call) -> AnswerFuture {
    Box::pin(async move {
        let name = call.path("repository");
        let read_data: bool = call.field("read_data")?.unwrap_or(false);
        context.scheduler.repository_check(name, read_data).await?;
        let what = if read_data { "structure and all data are" } else { "structure is" };
        done(format!("repository {name}: its {what} whole"))
    })
}

pub(super) fn list(context: Arc<Context>, call: Call) -> AnswerFuture {
    Box::pin(async move {
        let job = call.query("job").map(str::to_owned);
        let of = match call.query("group") {
            Some(group) => Some((context.group(group)?.name().to_string(), job)),
            None if job.is_some() => {
                return Err(Problem::invalid("job: needs the group, too"));
            }
            None => None,
        };
        answer(context.scheduler.list(of).await?)
    })
}

pub(super) fn show(context: Arc<Context>, call: Call) -> AnswerFuture {
    Box::pin(async move {
        let (backup, manifest) = context.scheduler.show(call.path("backup")).await?;
        answer(BackupDetails { backup, manifest })
    })
}

pub(super) fn verify(context: Arc<Context>, call: Call) -> AnswerFuture {
    Box::pin(async move {
        let ids: Vec<String> = match call.field("id")? {
            Some(id) => vec![id],
            None => {
                let all = context.scheduler.list(None).await?.backups;
                if let Some(gone) = all.iter().find_map(|backup| backup.unreachable.as_ref()) {
                    return Err(Problem::new(503, "repository-unreachable", &gone.reason));
                }
                all.into_iter().filter_map(|backup| backup.id).collect()
            }
        };
        let (progress, _ticket) = context.progress(call.field("ticket")?);
        let mut verified = Vec::new();
        for id in ids {
            verified.push(context.scheduler.verify(&id, progress.clone()).await?);
        }
        answer(VerifiedBackups { verified })
    })
}

pub(super) fn restore(context: Arc<Context>, call: Call) -> AnswerFuture {
    Box::pin(async move {
        let id = call.path("backup");
        let volume: Option<Name> = call.field("volume")?;
        let path: Option<PathBuf> = call.field("path")?;
        let group: Option<Name> = call.field("to_group")?;
        let to_volume: Option<Name> = call.field("to_volume")?;
        let target = match (path, group, to_volume) {
            (Some(path), None, None) if path.is_absolute() => RestoreTarget::Path(path),
            (Some(path), None, None) => {
                let path = path.display();
                return Err(Problem::invalid(format!("path `{path}`: must begin with /")));
            }
            (None, Some(group), Some(volume)) => {
                context.group(group.as_str())?;
                RestoreTarget::Volume { group, volume }
            }
            _ => {
                return Err(Problem::invalid(
                    "restore: expected either path, or to_group and to_volume",
                ));
            }
        };
        let (progress, _ticket) = context.progress(call.field("ticket")?);
        let restored = context.scheduler.restore(id, volume, target, progress).await?;
        let volumes =
            restored.into_iter().map(|(name, size_bytes)| RestoredVolume { name, size_bytes });
        answer(Restored { volumes: volumes.collect() })
    })
}

pub(super) fn progress(context: &Context, call: &Call) -> Answer {
    let tickets = context.tickets.lock().expect("no holder panics");
    let bytes = tickets.get(call.path("ticket")).map(Progress::bytes);
    answer(bytes.map(|(done_bytes, total_bytes)| ProgressInfo { done_bytes, total_bytes }))
}
