//! What the decision may know: plain values with their ages, from wherever they came, and how
//! `--assume` overrides them.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::job::{JobSettings, Placement, other};
use crate::group::Role;
use crate::units::{ByteSize, LogTime, Name, Span};

/// The facts with a number, which conditions may name.
pub const FACT_NAMES: [&str; 7] = [
    "replication.lag_seconds",
    "secondary.cpu_percent",
    "secondary.memory_free_bytes",
    "secondary.storage_free_bytes",
    "secondary.storage_free_percent",
    "primary.cpu_percent",
    "primary.memory_free_bytes",
];

/// Why something is as it is: a stable code, and a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// Stable, kebab-case.
    pub code: String,
    /// A sentence with the values.
    pub text: String,
}

impl Reason {
    /// A reason.
    pub fn new(code: &str, text: impl Into<String>) -> Reason {
        Reason { code: code.to_owned(), text: text.into() }
    }
}

/// How the copy follows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplicationFacts {
    /// Everything that `backup_capable` checks, lag apart.
    pub healthy: bool,
    /// Why it is not.
    pub reasons: Vec<Reason>,
    /// Age of the copy; `None` where nothing tells.
    pub lag: Option<Span>,
    /// How long nothing has been heard; `None` while the link is up.
    pub link_lost: Option<Span>,
    /// Age of these facts.
    pub age: Span,
}

/// How a node is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// The node.
    pub name: Name,
    /// Age of these facts.
    pub age: Span,
    /// The node cannot be used at all, and why.
    pub unavailable: Option<String>,
    /// Percent of the CPUs that was busy lately.
    pub cpu_percent: Option<f64>,
    /// Bytes that programs can still get.
    pub memory_free_bytes: Option<u64>,
    /// Free bytes where its data lies.
    pub storage_free_bytes: Option<u64>,
    /// All bytes there.
    pub storage_total_bytes: Option<u64>,
    /// Whether the job's repository can be opened from there.
    pub repository: Option<bool>,
    /// The repository's own id there, so that one name never means two places.
    #[serde(default)]
    pub repository_id: Option<String>,
    /// Why it cannot be opened.
    #[serde(default)]
    pub repository_reason: Option<String>,
    /// Age of what is known of the repository, where that is older than the rest.
    #[serde(default)]
    pub repository_age: Span,
    /// What else keeps the node from making this backup, such as failed data.
    pub problems: Vec<Reason>,
}

impl NodeFacts {
    /// A node of which nothing is known but its name.
    #[must_use]
    pub fn unknown(name: Name) -> NodeFacts {
        NodeFacts {
            name,
            age: Span::default(),
            unavailable: None,
            cpu_percent: None,
            memory_free_bytes: None,
            storage_free_bytes: None,
            storage_total_bytes: None,
            repository: None,
            repository_id: None,
            repository_reason: None,
            repository_age: Span::default(),
            problems: Vec::new(),
        }
    }

    /// Percent of the storage that is free.
    #[must_use]
    pub fn storage_free_percent(&self) -> Option<f64> {
        let total = self.storage_total_bytes.filter(|total| *total > 0)?;
        Some(self.storage_free_bytes? as f64 * 100.0 / total as f64)
    }
}

/// A node that had its chance for this slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenUp {
    /// The node.
    pub node: Name,
    /// What it did, or did not.
    pub why: String,
}

/// All that a decision sees. Two nodes with equal facts (but for `role`, which says who asks) never
/// both run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// The group.
    pub group: Name,
    /// The job.
    pub job: Name,
    /// The slot; `None` where only an explanation is wanted.
    pub slot: Option<LogTime>,
    /// The role of the node that decides.
    pub role: Role,
    /// The group has a copy elsewhere, or this is one.
    pub replicated: bool,
    /// Replication of this copy was stopped.
    pub retired: bool,
    /// How the copy follows.
    pub replication: ReplicationFacts,
    /// The primary.
    pub primary: NodeFacts,
    /// The secondary; of an unreplicated group, this node again.
    pub secondary: NodeFacts,
    /// The role of the node where the application runs.
    pub active: Role,
    /// The latest start is over.
    pub deadline_passed: bool,
    /// The job's next slot, where it is due already: this one is waited for no longer.
    #[serde(default)]
    pub next_due: Option<LogTime>,
    /// The node whose backup of this slot exists.
    pub done_by: Option<Name>,
    /// The node where another run of this job is going.
    pub running_on: Option<Name>,
    /// Nodes counted unfit for this slot.
    pub given_up: Vec<GivenUp>,
    /// The facts that were overridden, by name.
    pub assumed: BTreeSet<String>,
}

/// An override that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("assume {key}: {what}")]
pub struct AssumeError {
    /// The fact's name as given.
    pub key: String,
    /// What is wrong.
    pub what: String,
}

/// Every name that `--assume` takes.
pub const ASSUMABLE: [&str; 15] = [
    "role",
    "replicated",
    "replication.healthy",
    "replication.lag_seconds",
    "secondary.available",
    "secondary.cpu_percent",
    "secondary.memory_free_bytes",
    "secondary.storage_free_bytes",
    "secondary.repository",
    "primary.available",
    "primary.cpu_percent",
    "primary.repository",
    "placement",
    "active",
    "deadline_passed",
];

impl Facts {
    /// The facts of two nodes that are both fit, linked and idle, as the one with this role sees
    /// them: where the published table and the tests begin.
    pub(super) fn of_fit_pair(role: Role) -> Facts {
        let name = |text: &str| text.parse::<Name>().expect("a constant name");
        let node = |text: &str| NodeFacts {
            cpu_percent: Some(5.0),
            memory_free_bytes: Some(1 << 30),
            storage_free_bytes: Some(50 << 30),
            storage_total_bytes: Some(100 << 30),
            repository: Some(true),
            ..NodeFacts::unknown(name(text))
        };
        Facts {
            group: name("g"),
            job: name("nightly"),
            slot: Some(LogTime(1)),
            role,
            replicated: true,
            retired: false,
            replication: ReplicationFacts {
                healthy: true,
                reasons: Vec::new(),
                lag: Some(Span::from_secs(1)),
                link_lost: None,
                age: Span::default(),
            },
            primary: node("a"),
            secondary: node("b"),
            active: Role::Primary,
            deadline_passed: false,
            next_due: None,
            done_by: None,
            running_on: None,
            given_up: Vec::new(),
            assumed: BTreeSet::new(),
        }
    }

    /// The facts of the node with this role.
    #[must_use]
    pub fn node(&self, role: Role) -> &NodeFacts {
        match role {
            Role::Primary => &self.primary,
            Role::Secondary => &self.secondary,
        }
    }

    /// The value of a fact that conditions may name.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<f64> {
        match name {
            "replication.lag_seconds" => self.replication.lag.map(|lag| lag.0.as_secs_f64()),
            "secondary.cpu_percent" => self.secondary.cpu_percent,
            "secondary.memory_free_bytes" => {
                self.secondary.memory_free_bytes.map(|bytes| bytes as f64)
            }
            "secondary.storage_free_bytes" => {
                self.secondary.storage_free_bytes.map(|bytes| bytes as f64)
            }
            "secondary.storage_free_percent" => self.secondary.storage_free_percent(),
            "primary.cpu_percent" => self.primary.cpu_percent,
            "primary.memory_free_bytes" => self.primary.memory_free_bytes.map(|bytes| bytes as f64),
            _ => None,
        }
    }

    /// Overrides a fact, or the placement in `settings`.
    ///
    /// # Errors
    ///
    /// Where the name or the value is none.
    pub fn assume(
        &mut self,
        settings: &mut JobSettings,
        key: &str,
        value: &str,
    ) -> Result<(), AssumeError> {
        let wrong = |what: String| AssumeError { key: key.to_owned(), what };
        let yes = || match value {
            "true" | "yes" => Ok(true),
            "false" | "no" => Ok(false),
            _ => Err(wrong(format!("got `{value}`, expected true or false"))),
        };
        let number = || match value.trim_end_matches('%').parse::<f64>() {
            Ok(number) if number.is_finite() && number >= 0.0 => Ok(number),
            _ => Err(wrong(format!("got `{value}`, expected a number"))),
        };
        let bytes = || {
            let size = value.parse::<ByteSize>();
            size.map(|size| size.0).map_err(|error| wrong(error.to_string()))
        };
        match key {
            "role" => {
                let role = match value {
                    "primary" => Role::Primary,
                    "secondary" => Role::Secondary,
                    _ => {
                        let expected = "expected primary or secondary";
                        return Err(wrong(format!("got `{value}`, {expected}")));
                    }
                };
                if role != self.role {
                    // This node takes its own facts with it into the other role.
                    std::mem::swap(&mut self.primary, &mut self.secondary);
                    self.active = other(self.active);
                    self.role = role;
                }
            }
            "replicated" => self.replicated = yes()?,
            "replication.healthy" => {
                self.replication.healthy = yes()?;
                self.replication.reasons.clear();
                if !self.replication.healthy {
                    self.replication.reasons.push(Reason::new("assumed", "assumed not healthy"));
                } else {
                    self.replication.link_lost = None;
                }
            }
            "replication.lag_seconds" => {
                let lag = std::time::Duration::try_from_secs_f64(number()?)
                    .map_err(|_| wrong(format!("got `{value}`, expected seconds")))?;
                self.replication.lag = Some(Span(lag));
            }
            "secondary.available" => {
                self.secondary.unavailable = (!yes()?).then(|| "assumed not available".to_owned());
                self.replication.link_lost = None;
            }
            "primary.available" => {
                self.primary.unavailable = (!yes()?).then(|| "assumed not available".to_owned());
                if yes()? && self.role == Role::Secondary {
                    self.replication.link_lost = None;
                }
            }
            "secondary.cpu_percent" => self.secondary.cpu_percent = Some(number()?),
            "primary.cpu_percent" => self.primary.cpu_percent = Some(number()?),
            "secondary.memory_free_bytes" => self.secondary.memory_free_bytes = Some(bytes()?),
            "secondary.storage_free_bytes" => {
                let free = bytes()?;
                self.secondary.storage_free_bytes = Some(free);
                let total = self.secondary.storage_total_bytes.unwrap_or(0);
                self.secondary.storage_total_bytes = Some(total.max(free));
            }
            "secondary.repository" => {
                self.secondary.repository = Some(yes()?);
                self.secondary.repository_reason = None;
            }
            "primary.repository" => {
                self.primary.repository = Some(yes()?);
                self.primary.repository_reason = None;
            }
            "placement" => {
                settings.placement =
                    value.parse::<Placement>().map_err(|error| wrong(error.to_string()))?;
            }
            "active" => self.active = if yes()? { self.role } else { other(self.role) },
            "deadline_passed" => self.deadline_passed = yes()?,
            _ => return Err(wrong(format!("expected one of {}", ASSUMABLE.join(", ")))),
        }
        self.assumed.insert(key.to_owned());
        Ok(())
    }

    /// Every fact with its age, for an explanation and a backup's manifest.
    #[must_use]
    pub fn inputs(&self, settings: &JobSettings) -> Map<String, Value> {
        let mut inputs = Map::new();
        let mut put = |name: &str, value: Value, age: Span| {
            let mut input = json!({ "value": value, "age_seconds": age.0.as_secs_f64() });
            if self.assumed.contains(name) {
                input["assumed"] = Value::Bool(true);
            }
            inputs.insert(name.to_owned(), input);
        };
        let now = Span::default();
        put("role", json!(self.role), now);
        put("replicated", json!(self.replicated), now);
        put("retired", json!(self.retired), now);
        put("placement", json!(settings.placement), now);
        put("active", json!(self.active == self.role), now);
        put("deadline_passed", json!(self.deadline_passed), now);
        put("slot.next_due", json!(self.next_due), now);
        put("slot.done_by", json!(self.done_by), now);
        put("slot.given_up", json!(self.given_up), now);
        put("job.running_on", json!(self.running_on), now);
        let replication = &self.replication;
        let seconds = |span: Option<Span>| json!(span.map(|span| span.0.as_secs_f64()));
        put("replication.healthy", json!(replication.healthy), replication.age);
        put("replication.reasons", json!(replication.reasons), replication.age);
        put("replication.lag_seconds", seconds(replication.lag), replication.age);
        put("replication.link_lost_seconds", seconds(replication.link_lost), now);
        for role in [Role::Primary, Role::Secondary] {
            let node = self.node(role);
            let mut put = |name: &str, value: Value| {
                let of_repository = name.starts_with("repository");
                let age =
                    if of_repository { node.age.0 + node.repository_age.0 } else { node.age.0 };
                let name = format!("{}.{name}", role_word(role));
                put(&name, value, Span(age));
            };
            put("name", json!(node.name));
            put("available", json!(node.unavailable.is_none()));
            put("unavailable_reason", json!(node.unavailable));
            put("cpu_percent", json!(node.cpu_percent));
            put("memory_free_bytes", json!(node.memory_free_bytes));
            put("storage_free_bytes", json!(node.storage_free_bytes));
            put("storage_total_bytes", json!(node.storage_total_bytes));
            put("repository", json!(node.repository));
            put("repository_id", json!(node.repository_id));
            put("repository_reason", json!(node.repository_reason));
            put("problems", json!(node.problems));
        }
        inputs
    }
}

/// The word for a role.
pub(crate) fn role_word(role: Role) -> &'static str {
    match role {
        Role::Primary => "primary",
        Role::Secondary => "secondary",
    }
}
