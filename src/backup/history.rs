//! What this node remembers of its runs: how each ended, up to which slot each job was dealt with,
//! and which backups it saw. A file that is lost costs memory of failures, never a backup: those
//! are in the repository.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::catalog::{BackupEntry, Outcome};
use crate::units::{EpochId, LogTime, Name};

/// Runs that are remembered at most.
const RUNS_MAX: usize = 512;
/// Backups per repository that are remembered at most.
const SEEN_MAX: usize = 1024;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Remembered {
    /// Per job the newest slot that was dealt with.
    #[serde(default)]
    handled: BTreeMap<String, LogTime>,
    /// How runs ended, oldest first.
    #[serde(default)]
    runs: Vec<BackupEntry>,
    /// Per repository the backups that it held when it was read last, oldest first.
    #[serde(default)]
    seen: BTreeMap<String, Vec<BackupEntry>>,
}

/// The memory, and its file.
pub struct History {
    path: PathBuf,
    remembered: Mutex<Remembered>,
}

impl History {
    /// Reads the file; a missing one is empty, and so is one that cannot be understood.
    #[must_use]
    pub fn open(path: &Path) -> History {
        let remembered = match std::fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!("{}: is damaged, and begun anew: {error}", path.display());
                Remembered::default()
            }),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!("{}: is begun anew: {error}", path.display());
                }
                Remembered::default()
            }
        };
        History { path: path.to_path_buf(), remembered: Mutex::new(remembered) }
    }

    /// The newest slot of a job that was dealt with.
    #[must_use]
    pub fn handled(&self, job: EpochId) -> Option<LogTime> {
        self.lock().handled.get(&job.to_string()).copied()
    }

    /// A job's slots up to `slot` were dealt with.
    pub fn set_handled(&self, job: EpochId, slot: LogTime) {
        let mut remembered = self.lock();
        let known = remembered.handled.entry(job.to_string()).or_insert(slot);
        *known = (*known).max(slot);
        self.write(&remembered);
    }

    /// A job's slots behind `slot` are to come: what is remembered of them was read off a clock
    /// that was ahead.
    pub fn take_back_handled(&self, job: EpochId, slot: LogTime) {
        let mut remembered = self.lock();
        remembered.handled.insert(job.to_string(), slot);
        self.write(&remembered);
    }

    /// Remembers how a run ended.
    pub fn add(&self, entry: BackupEntry) {
        let mut remembered = self.lock();
        remembered.runs.push(entry);
        let excess = remembered.runs.len().saturating_sub(RUNS_MAX);
        remembered.runs.drain(..excess);
        self.write(&remembered);
    }

    /// Remembers what a repository holds, oldest first.
    pub fn set_seen(&self, repository: &str, entries: &[BackupEntry]) {
        let entries = &entries[entries.len().saturating_sub(SEEN_MAX)..];
        let mut remembered = self.lock();
        if remembered.seen.get(repository).is_none_or(|known| known != entries) {
            remembered.seen.insert(repository.to_owned(), entries.to_vec());
            self.write(&remembered);
        }
    }

    /// What a repository held when it was read last.
    #[must_use]
    pub fn seen(&self, repository: &str) -> Vec<BackupEntry> {
        self.lock().seen.get(repository).cloned().unwrap_or_default()
    }

    /// How runs ended, oldest first.
    #[must_use]
    pub fn runs(&self) -> Vec<BackupEntry> {
        self.lock().runs.clone()
    }

    /// The run of a job with the newest slot that was made or not: what was missed, or skipped for
    /// another reason than that its backup is there, says nothing of that.
    #[must_use]
    pub fn newest(&self, group: &Name, job: &Name) -> Option<BackupEntry> {
        let tells = |run: &BackupEntry| match run.outcome {
            Outcome::Missed => false,
            Outcome::Skipped => run.reasons.iter().any(|reason| reason.code == "already-done"),
            _ => true,
        };
        let remembered = self.lock();
        let of_job = remembered.runs.iter().filter(|run| run.group == *group && run.job == *job);
        of_job.filter(|run| tells(run)).max_by_key(|run| run.slot).cloned()
    }

    /// Whether a repository held a backup of a job of a slot or a later one, when it was read last.
    #[must_use]
    pub fn has_seen(&self, repository: &str, group: &Name, job: &Name, slot: LogTime) -> bool {
        let is_it = |entry: &BackupEntry| {
            (&entry.group, &entry.job) == (group, job)
                && entry.slot >= slot
                && entry.outcome == Outcome::Done
                && entry.branch.is_none()
        };
        self.lock().seen.get(repository).is_some_and(|entries| entries.iter().any(is_it))
    }

    /// How this node's run of a slot ended.
    #[must_use]
    pub fn run(&self, group: &Name, job: &Name, slot: LogTime) -> Option<BackupEntry> {
        let remembered = self.lock();
        let mut newest_first = remembered.runs.iter().rev();
        newest_first.find(|run| run.slot == slot && run.group == *group && run.job == *job).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Remembered> {
        self.remembered.lock().expect("no holder panics")
    }

    fn write(&self, remembered: &Remembered) {
        let write = || -> io::Result<()> {
            let new_path = self.path.with_extension("new");
            let mut file = std::fs::File::create(&new_path)?;
            file.write_all(&serde_json::to_vec(remembered)?)?;
            file.sync_all()?;
            std::fs::rename(&new_path, &self.path)
        };
        if let Err(error) = write() {
            tracing::warn!("{}: could not be written: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::facts::Reason;
    use super::super::runner::missed_entry;
    use super::*;
    use crate::group::Role;

    #[test]
    fn a_run_that_was_skipped_or_missed_hides_none_that_failed() {
        let dir = tempfile::tempdir().expect("a directory");
        let history = History::open(&dir.path().join("runs"));
        let name = |text: &str| text.parse::<Name>().expect("a name");
        let add = |slot, outcome, code: &str| {
            let (slot, now) = (LogTime(slot), LogTime(9));
            let mut entry =
                missed_entry(&name("g"), &name("j"), slot, name("a"), Role::Primary, now);
            entry.outcome = outcome;
            entry.reasons = vec![Reason::new(code, String::new())];
            history.add(entry);
        };
        let newest = || history.newest(&name("g"), &name("j")).map(|run| run.outcome);
        assert_eq!(newest(), None);
        add(2, Outcome::Skipped, "already-running");
        add(1, Outcome::Failed, "repository-unreachable");
        add(3, Outcome::Missed, "missed");
        assert_eq!(newest(), Some(Outcome::Failed));
        add(4, Outcome::Skipped, "already-done");
        assert_eq!(newest(), Some(Outcome::Skipped));
        add(5, Outcome::Failed, "repository-unreachable");
        assert_eq!(newest(), Some(Outcome::Failed));
    }
}
