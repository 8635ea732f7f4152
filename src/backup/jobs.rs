//! Changing a job: what a command gives, laid over what the record holds, checked as a whole.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::job::{JobError, JobSettings};
use super::slot::Schedule;
use crate::log::control::JobRecord;
use crate::units::{EpochId, LogTime, Name};

/// What `job set` gives; what it does not name stays as it was.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JobChange {
    /// The repository's name in each node's configuration; needed for a new job.
    pub repository: Option<String>,
    /// A cron pattern of five fields, or `none` for by command only.
    pub schedule: Option<String>,
    /// The zone of the schedule.
    pub zone: Option<String>,
    /// Keys of [`JobSettings`]; `null` brings the default back.
    pub settings: Map<String, Value>,
}

/// The record of a job after a change. `id` is used where the job is new.
///
/// # Errors
///
/// Names what is missing or wrong.
pub fn changed_job(
    existing: Option<&JobRecord>,
    name: Name,
    change: JobChange,
    id: EpochId,
    now: LogTime,
) -> Result<JobRecord, JobError> {
    let mut record = match existing {
        Some(record) => record.clone(),
        None => JobRecord {
            id,
            repository: change.repository.clone().ok_or_else(|| {
                JobError(format!("job {name}: --repository is needed for a new job"))
            })?,
            name,
            schedule: None,
            zone: None,
            since: now,
            settings: Map::new(),
            removed: false,
            other: Map::new(),
        },
    };
    record.since = now;
    if let Some(repository) = change.repository {
        record.repository = repository;
    }
    match change.schedule.as_deref() {
        None => {}
        Some("none") => record.schedule = None,
        Some(pattern) => record.schedule = Some(pattern.to_owned()),
    }
    if let Some(zone) = change.zone {
        record.zone = Some(zone);
    }
    if let Some(pattern) = &record.schedule {
        Schedule::parse(pattern, record.zone.as_deref())?;
    } else if let Some(zone) = &record.zone {
        Schedule::parse("0 0 * * *", Some(zone))?;
    }
    for (key, value) in change.settings {
        if value.is_null() {
            record.settings.remove(&key);
        } else {
            record.settings.insert(key, value);
        }
    }
    record.settings = JobSettings::parse(&record.settings)?.to_record();
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn change(value: Value) -> JobChange {
        serde_json::from_value(value).expect("a change")
    }

    #[test]
    fn a_change_keeps_what_it_does_not_name() {
        let name: Name = "nightly".parse().expect("a name");
        let new = change(json!({"repository": "main", "schedule": "0 2 * * *", "zone": "UTC",
            "settings": {"grace": "5s", "max_lag": "90s"}}));
        let job = changed_job(None, name.clone(), new, EpochId(7), LogTime(1)).expect("valid");
        let again = change(json!({"settings": {"grace": "1s", "max_lag": null}}));
        let job =
            changed_job(Some(&job), name.clone(), again, EpochId(8), LogTime(2)).expect("valid");
        assert_eq!((job.id, job.since), (EpochId(7), LogTime(2)));
        assert_eq!(job.schedule.as_deref(), Some("0 2 * * *"));
        assert_eq!(Value::Object(job.settings.clone()), json!({"grace": "1s"}));
        let off = change(json!({"schedule": "none"}));
        let job = changed_job(Some(&job), name, off, EpochId(8), LogTime(3)).expect("valid");
        assert_eq!(job.schedule, None);
    }

    #[test]
    fn a_job_without_a_repository_or_with_a_wrong_schedule_is_refused() {
        let name: Name = "nightly".parse().expect("a name");
        for (given, word) in [
            (json!({}), "--repository"),
            (json!({"repository": "main", "schedule": "at night"}), "at night"),
            (json!({"repository": "main", "zone": "Mars/Olympus"}), "Mars/Olympus"),
            (json!({"repository": "main", "settings": {"lag": "1s"}}), "lag"),
        ] {
            let refused = changed_job(None, name.clone(), change(given), EpochId(1), LogTime(1));
            assert!(refused.expect_err(word).to_string().contains(word));
        }
    }
}
