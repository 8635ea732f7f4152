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

/// The record of a job after a change; `existing` itself where nothing changes. `id` is used where
/// the job is new. Its slots count from `now` on only where it takes other slots than before, or
/// has them made in another repository: else a slot that is open or overdue would be forgotten.
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
    let settings = JobSettings::parse(&record.settings)?;
    record.settings = settings.to_record();
    if let Some(existing) = existing {
        if JobSettings::parse(&existing.settings).is_ok_and(|before| before == settings) {
            // As it was written, where it says the same.
            record.settings.clone_from(&existing.settings);
        }
        if !has_same_slots(existing, &record) {
            record.since = now;
        }
    }
    Ok(record)
}

/// Whether two records name the same slots, and look for their results at the same place.
fn has_same_slots(one: &JobRecord, two: &JobRecord) -> bool {
    fn slots(job: &JobRecord) -> (&str, Option<&str>, &str) {
        (&job.repository, job.schedule.as_deref(), job.zone.as_deref().unwrap_or("UTC"))
    }
    slots(one) == slots(two)
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
        assert_eq!((job.id, job.since), (EpochId(7), LogTime(1)));
        assert_eq!(job.schedule.as_deref(), Some("0 2 * * *"));
        assert_eq!(Value::Object(job.settings.clone()), json!({"grace": "1s"}));
        let off = change(json!({"schedule": "none"}));
        let job = changed_job(Some(&job), name, off, EpochId(8), LogTime(3)).expect("valid");
        assert_eq!((job.schedule, job.since), (None, LogTime(3)));
    }

    #[test]
    fn slots_count_anew_only_where_they_are_others_or_made_elsewhere() {
        let name: Name = "nightly".parse().expect("a name");
        let new = change(json!({"repository": "main", "schedule": "0 2 * * *",
            "settings": {"grace": "5s"}}));
        let job = changed_job(None, name.clone(), new, EpochId(7), LogTime(1)).expect("valid");
        let after = |given: Value| {
            changed_job(Some(&job), name.clone(), change(given), EpochId(8), LogTime(2))
                .expect("valid")
        };
        for same in [
            json!({}),
            json!({"repository": "main", "schedule": "0 2 * * *"}),
            json!({"settings": {"grace": "5000ms", "deadline": "1h", "max_lag": null}}),
        ] {
            assert_eq!(after(same.clone()), job, "{same}");
        }
        for (given, since) in [
            (json!({"settings": {"grace": "6s"}}), 1),
            (json!({"settings": {"deadline": "2h", "placement": "primary-only"}}), 1),
            (json!({"zone": "UTC"}), 1),
            (json!({"zone": "Europe/Berlin"}), 2),
            (json!({"schedule": "0 3 * * *"}), 2),
            (json!({"schedule": "none"}), 2),
            (json!({"repository": "other"}), 2),
        ] {
            let changed = after(given.clone());
            assert!(changed != job, "{given}");
            assert_eq!(changed.since, LogTime(since), "{given}");
        }
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
