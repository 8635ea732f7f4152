//! What an operator asks of a backup job: placement, limits and conditions, read from and written
//! to the settings of its record.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::facts::FACT_NAMES;
use crate::group::Role;
use crate::units::{ByteSize, Name, Span};

/// Which node should make a job's backups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// The secondary; the primary where the secondary cannot.
    #[default]
    PreferSecondary,
    /// The secondary, or nobody.
    SecondaryOnly,
    /// The primary, or nobody.
    PrimaryOnly,
    /// The primary; the secondary where the primary cannot.
    PreferPrimary,
    /// Whichever can at once, the secondary first.
    Any,
    /// The node where the application does not run; the other where that one cannot.
    PreferPassive,
    /// The node where the application does not run, or nobody.
    PassiveOnly,
    /// The node where the application runs, or nobody.
    ActiveOnly,
    /// The node where the application runs; the other where that one cannot.
    PreferActive,
}

impl Placement {
    /// Every placement, in the order of the published table.
    pub const ALL: [Placement; 9] = [
        Placement::PreferSecondary,
        Placement::SecondaryOnly,
        Placement::PrimaryOnly,
        Placement::PreferPrimary,
        Placement::Any,
        Placement::PreferPassive,
        Placement::PassiveOnly,
        Placement::ActiveOnly,
        Placement::PreferActive,
    ];

    /// The word in records, on the command line and in reasons.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Placement::PreferSecondary => "prefer-secondary",
            Placement::SecondaryOnly => "secondary-only",
            Placement::PrimaryOnly => "primary-only",
            Placement::PreferPrimary => "prefer-primary",
            Placement::Any => "any",
            Placement::PreferPassive => "prefer-passive",
            Placement::PassiveOnly => "passive-only",
            Placement::ActiveOnly => "active-only",
            Placement::PreferActive => "prefer-active",
        }
    }

    /// The roles that may make the backup, the preferred one first, given the role of the node
    /// where the application runs.
    #[must_use]
    pub fn order(self, active: Role) -> Vec<Role> {
        let passive = other(active);
        match self {
            Placement::PreferSecondary | Placement::Any => vec![Role::Secondary, Role::Primary],
            Placement::SecondaryOnly => vec![Role::Secondary],
            Placement::PrimaryOnly => vec![Role::Primary],
            Placement::PreferPrimary => vec![Role::Primary, Role::Secondary],
            Placement::PreferPassive => vec![passive, active],
            Placement::PassiveOnly => vec![passive],
            Placement::ActiveOnly => vec![active],
            Placement::PreferActive => vec![active, passive],
        }
    }

    /// Whether one node alone is permitted.
    #[must_use]
    pub fn is_only(self) -> bool {
        matches!(
            self,
            Placement::SecondaryOnly
                | Placement::PrimaryOnly
                | Placement::PassiveOnly
                | Placement::ActiveOnly
        )
    }
}

/// The other role.
pub(crate) fn other(role: Role) -> Role {
    match role {
        Role::Primary => Role::Secondary,
        Role::Secondary => Role::Primary,
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Placement {
    type Err = JobError;
    fn from_str(text: &str) -> Result<Self, JobError> {
        Placement::ALL.into_iter().find(|placement| placement.as_str() == text).ok_or_else(|| {
            let words: Vec<_> = Placement::ALL.iter().map(|known| known.as_str()).collect();
            JobError(format!("placement: got `{text}`, expected one of {}", words.join(", ")))
        })
    }
}

/// How a condition compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// `>=`
    AtLeast,
    /// `<=`
    AtMost,
}

/// `FACT>=VALUE` or `FACT<=VALUE`: the preference of a placement holds only where every condition
/// does; where one does not, the preference is turned around.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    /// The fact's name, as in `--assume`.
    pub fact: String,
    /// How it is compared.
    pub comparison: Comparison,
    /// With what: percent, seconds or bytes, as the fact's name says.
    pub value: f64,
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.comparison {
            Comparison::AtLeast => ">=",
            Comparison::AtMost => "<=",
        };
        write!(f, "{}{sign}{}", self.fact, self.value)
    }
}

impl FromStr for Condition {
    type Err = JobError;
    fn from_str(text: &str) -> Result<Self, JobError> {
        let wrong = || {
            JobError(format!(
                "condition: got `{text}`, expected FACT>=VALUE or FACT<=VALUE with a number, FACT \
                 one of {}",
                FACT_NAMES.join(", ")
            ))
        };
        let (fact, comparison, value) = if let Some((fact, value)) = text.split_once(">=") {
            (fact, Comparison::AtLeast, value)
        } else if let Some((fact, value)) = text.split_once("<=") {
            (fact, Comparison::AtMost, value)
        } else {
            return Err(wrong());
        };
        let fact = fact.trim();
        if !FACT_NAMES.contains(&fact) {
            return Err(wrong());
        }
        let value = value.trim();
        let value = if fact.ends_with("_bytes") {
            value.parse::<ByteSize>().map(|size| size.0 as f64).map_err(|_| wrong())?
        } else {
            value.trim_end_matches('%').parse::<f64>().map_err(|_| wrong())?
        };
        if !value.is_finite() {
            return Err(wrong());
        }
        Ok(Condition { fact: fact.to_owned(), comparison, value })
    }
}

impl Serialize for Condition {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Condition {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A job's settings are not what they must be: object, what, got, expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct JobError(pub String);

/// A job's settings, each with its default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JobSettings {
    /// Which node should make the backup.
    pub placement: Placement,
    /// Age of the secondary's copy at most.
    pub max_lag: Span,
    /// From the slot to the latest start.
    pub deadline: Span,
    /// From the start to the forced end of a run.
    pub run_limit: Span,
    /// How long a lost link counts as behind, and how long a delegation waits for its claim.
    pub grace: Span,
    /// When the preference of the placement holds.
    #[serde(rename = "if", skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Percent of the primary's CPU above which it does not run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub primary_cpu_max: Option<f64>,
    /// Percent of the secondary's CPU above which it is unfit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secondary_cpu_max: Option<f64>,
    /// Bytes of free memory below which the secondary is unfit.
    pub memory_free_min: ByteSize,
    /// Percent of free storage below which the secondary is unfit.
    pub storage_free_min: f64,
    /// Past the deadline, an old image of the secondary is better than none.
    pub allow_stale: bool,
    /// The volumes to back up; all where none is named.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Name>,
}

impl Default for JobSettings {
    fn default() -> JobSettings {
        JobSettings {
            placement: Placement::PreferSecondary,
            max_lag: Span::from_secs(60),
            deadline: Span::from_secs(3600),
            run_limit: Span::from_secs(12 * 3600),
            grace: Span::from_secs(60),
            conditions: Vec::new(),
            primary_cpu_max: None,
            secondary_cpu_max: None,
            memory_free_min: ByteSize(256 << 20),
            storage_free_min: 10.0,
            allow_stale: false,
            volumes: Vec::new(),
        }
    }
}

impl JobSettings {
    /// Reads and checks the settings of a job's record.
    ///
    /// # Errors
    ///
    /// For an unknown key, a value of the wrong kind, or values that contradict one another.
    pub fn parse(settings: &Map<String, Value>) -> Result<JobSettings, JobError> {
        let parsed: JobSettings = serde_json::from_value(Value::Object(settings.clone()))
            .map_err(|cause| JobError(format!("job settings: {cause}")))?;
        parsed.check()?;
        Ok(parsed)
    }

    /// The settings for a job's record; those at their default are left out.
    #[must_use]
    pub fn to_record(&self) -> Map<String, Value> {
        let map = |settings: &JobSettings| match serde_json::to_value(settings) {
            Ok(Value::Object(map)) => map,
            _ => unreachable!("settings are plain data"),
        };
        let default = map(&JobSettings::default());
        map(self).into_iter().filter(|(key, value)| default.get(key) != Some(value)).collect()
    }

    fn check(&self) -> Result<(), JobError> {
        if self.placement.is_only() && !self.conditions.is_empty() {
            return Err(JobError(format!(
                "job settings: `if` turns a preference around, and {} has none; take prefer-{} \
                 or leave the condition out",
                self.placement,
                self.placement.as_str().trim_end_matches("-only")
            )));
        }
        let percents = [
            ("primary_cpu_max", self.primary_cpu_max),
            ("secondary_cpu_max", self.secondary_cpu_max),
            ("storage_free_min", Some(self.storage_free_min)),
        ];
        for (key, value) in percents {
            if value.is_some_and(|percent| !(0.0..=100.0).contains(&percent)) {
                return Err(JobError(format!("job settings: {key}: expected 0 to 100 percent")));
            }
        }
        if self.run_limit.0.is_zero() {
            return Err(JobError("job settings: run_limit: must be above zero".to_owned()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(value: Value) -> Result<JobSettings, JobError> {
        JobSettings::parse(value.as_object().expect("an object"))
    }

    #[test]
    fn settings_survive_their_record_and_defaults_are_left_out() {
        let text = json!({"placement": "prefer-passive", "max_lag": "5m", "if":
            ["primary.cpu_percent>=80"], "memory_free_min": "1G", "allow_stale": true});
        let settings = parse(text).expect("valid");
        assert_eq!(settings.memory_free_min, ByteSize(1 << 30));
        let record = settings.to_record();
        assert_eq!(record.len(), 5, "{record:?}");
        assert_eq!(JobSettings::parse(&record).expect("valid"), settings);
        assert!(JobSettings::default().to_record().is_empty());
    }

    #[test]
    fn wrong_settings_name_the_key_and_what_was_expected() {
        let cases = [
            (json!({"placment": "any"}), "placment"),
            (json!({"placement": "somewhere"}), "somewhere"),
            (json!({"max_lag": "soon"}), "soon"),
            (json!({"if": ["primary.mood>=80"]}), "primary.cpu_percent"),
            (json!({"if": ["primary.cpu_percent>=high"]}), "high"),
            (
                json!({"placement": "secondary-only", "if": ["primary.cpu_percent>=8"]}),
                "prefer-secondary",
            ),
            (json!({"primary_cpu_max": 120.0}), "primary_cpu_max"),
            (json!({"run_limit": "0s"}), "run_limit"),
        ];
        for (settings, word) in cases {
            let error = parse(settings.clone()).expect_err(&settings.to_string()).to_string();
            assert!(error.contains(word), "{settings}: {error}");
        }
    }

    #[test]
    fn conditions_read_sizes_and_percents() {
        let memory: Condition = "secondary.memory_free_bytes<=1G".parse().expect("valid");
        assert_eq!(memory.value, (1u64 << 30) as f64);
        let cpu: Condition = "primary.cpu_percent >= 80%".parse().expect("valid");
        assert_eq!(cpu.to_string(), "primary.cpu_percent>=80");
    }
}
