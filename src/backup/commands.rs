//! What operators ask of backups that exist: list, show, verify, restore; and of repositories.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::branches::Reigns;
use super::catalog::{BackupEntry, Manifest, Outcome, Unreachable, VolumeChecksum};
use super::claim::{Holder, SlotStore};
use super::error::BackupError;
use super::facts::Reason;
use super::job::JobSettings;
use super::overdue::time_of_slot;
use super::reach::Reach;
use super::repository::{RepositoryConfig, RepositoryError};
use super::restore::{FileSink, RestoreSink};
use super::scheduler::{Inner, Scheduler, blocking};
use super::source::Progress;
use crate::group::{Group, Op, RestoreClaim, Role, Volume};
use crate::units::Name;

/// Where a restore goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RestoreTarget {
    /// A new file; with several volumes a new directory of `VOLUME.img`.
    Path(PathBuf),
    /// A volume of a group that this node is the primary of.
    Volume {
        /// The group.
        group: Name,
        /// The volume.
        volume: Name,
    },
}

/// Backups, runs, and what keeps the list from being whole.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Listing {
    /// By slot; only what is restorable has an `id`.
    pub backups: Vec<BackupEntry>,
    /// Repositories that could not be read, each with the cause and the next command.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// A backup that was read back whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verified {
    /// Its id.
    pub id: String,
    /// Bytes read back.
    pub bytes: u64,
    /// A checksum for each volume; equal to the ones that the run left, where it left some.
    pub checksums: Vec<VolumeChecksum>,
}

impl Scheduler {
    /// Backups in this node's repositories and runs of this node that made none, by slot. `of`
    /// names a group, or a job of it.
    ///
    /// # Errors
    ///
    /// Where the job does not exist, and never had a backup.
    pub async fn list(&self, of: Option<(String, Option<String>)>) -> Result<Listing, BackupError> {
        let inner = Arc::clone(self.inner());
        blocking(move || inner.listing(of)).await
    }

    /// A backup and its manifest, by the start of its id.
    ///
    /// # Errors
    ///
    /// Where no repository holds it.
    pub async fn show(&self, id: &str) -> Result<(BackupEntry, Manifest), BackupError> {
        let inner = Arc::clone(self.inner());
        let id = id.to_owned();
        blocking(move || {
            let (repository, entry, manifest) = inner.find(&id)?;
            Ok((inner.judged(&repository, entry, &manifest)?, manifest))
        })
        .await
    }

    /// Reads a backup back whole, and compares it with what its run left.
    ///
    /// # Errors
    ///
    /// Names what is damaged.
    pub async fn verify(&self, id: &str, progress: Progress) -> Result<Verified, BackupError> {
        let inner = Arc::clone(self.inner());
        let id = id.to_owned();
        blocking(move || {
            let (repository, entry, manifest) = inner.find(&id)?;
            let id = entry.id.unwrap_or(id);
            let (bytes, checksums) = repository.repository().verify(&id, &progress)?;
            let store = SlotStore::new(repository.objects(), manifest.job_id, manifest.slot);
            if let Ok(results) = store.results()
                && results.iter().any(|it| it.id == id && it.checksums != checksums)
            {
                let name = repository.repository().config().name.clone();
                let what =
                    format!("backup {id}: its volumes have other checksums than its run left");
                return Err(RepositoryError::Damaged { name, what }.into());
            }
            Ok(Verified { id, bytes, checksums })
        })
        .await
    }

    /// Brings volumes of a backup back: one, or all where none is named.
    ///
    /// # Errors
    ///
    /// Where the backup is damaged, or the target cannot take it.
    pub async fn restore(
        &self,
        id: &str,
        volume: Option<Name>,
        target: RestoreTarget,
        progress: Progress,
    ) -> Result<Vec<(Name, u64)>, BackupError> {
        let inner = Arc::clone(self.inner());
        let id = id.to_owned();
        blocking(move || inner.restore(&id, volume.as_ref(), &target, &progress)).await
    }

    /// Makes a repository; its id.
    ///
    /// # Errors
    ///
    /// Where it exists, or cannot be made; without `force` also where backups were in it that are
    /// out of reach now.
    pub async fn repository_init(&self, name: &str, force: bool) -> Result<String, BackupError> {
        let inner = Arc::clone(self.inner());
        let reach = inner.repository(name)?;
        blocking(move || {
            let repository = reach.repository();
            let RepositoryConfig { name, url, .. } = repository.config().clone();
            let backups = inner.history.seen(&name).len();
            let is_gone = || matches!(repository.open(), Err(RepositoryError::Missing { .. }));
            if !force && backups > 0 && is_gone() {
                return Err(BackupError::WasThere { name, url, backups });
            }
            Ok(repository.init()?)
        })
        .await
    }

    /// Checks a repository, all its data where asked.
    ///
    /// # Errors
    ///
    /// Names what is damaged.
    pub async fn repository_check(&self, name: &str, read_data: bool) -> Result<(), BackupError> {
        let repository = self.inner().repository(name)?;
        blocking(move || Ok(repository.opened()?.check(read_data)?)).await
    }

    /// The repositories of this node, each with its id or why it cannot be opened.
    ///
    /// # Errors
    ///
    /// Never, as far as the node runs.
    pub async fn repository_list(
        &self,
    ) -> Result<Vec<(RepositoryConfig, Result<String, RepositoryError>)>, BackupError> {
        let inner = Arc::clone(self.inner());
        blocking(move || {
            let all = inner.repositories();
            let config = |reach: &Reach| reach.repository().config().clone();
            Ok(all.map(|reach| (config(reach), reach.id())).collect())
        })
        .await
    }
}

impl Inner {
    fn listing(&self, of: Option<(String, Option<String>)>) -> Result<Listing, BackupError> {
        let mut unread = Vec::new();
        let mut backups = Vec::new();
        for reach in self.repositories() {
            match self.snapshots(reach) {
                Ok(entries) => backups.extend(entries),
                Err(error) => {
                    let name = &reach.repository().config().name;
                    let seen = self.history.seen(name).into_iter();
                    backups.extend(seen.map(|entry| out_of_reach(entry, name, &error)));
                    unread.push((name.clone(), error.to_string()));
                }
            }
        }
        backups.extend(self.history.runs());
        backups.extend(self.active_entries());
        backups.sort_by_key(|entry| (entry.slot, entry.time));
        let Some((group, job)) = of else {
            let problems = unread.into_iter().map(|(_, problem)| problem).collect();
            return Ok(Listing { backups, problems });
        };
        backups.retain(|entry| {
            entry.group.as_str() == group
                && job.as_ref().is_none_or(|job| entry.job.as_str() == job)
        });
        let group = self.registry.by_name(&group)?;
        let mut jobs = group.control().jobs.clone();
        jobs.retain(|known| {
            !known.removed && job.as_ref().is_none_or(|job| known.name.as_str() == job)
        });
        if let Some(job) = job
            && jobs.is_empty()
            && backups.is_empty()
        {
            return Err(BackupError::NoJob { group: group.name().clone(), job });
        }
        let concerned = |name: &str| {
            jobs.iter().any(|job| job.repository == name)
                || backups
                    .iter()
                    .filter_map(|b| b.unreachable.as_ref())
                    .any(|u| u.repository == name)
        };
        let mut problems: Vec<String> = unread
            .into_iter()
            .filter_map(|(name, problem)| concerned(&name).then_some(problem))
            .collect();
        for job in &jobs {
            let problem = self.repository(&job.repository).err().map(|error| error.to_string());
            problems.extend(problem.filter(|problem| !problems.contains(problem)));
        }
        Ok(Listing { backups, problems })
    }

    /// Every snapshot of a repository that Tidelog made, with what became of its slot; remembered
    /// for when the repository cannot be read.
    fn snapshots(&self, reach: &Reach) -> Result<Vec<BackupEntry>, RepositoryError> {
        let listed = reach.opened()?.list()?.into_iter();
        let judged = listed.map(|(entry, manifest)| self.judged(reach, entry, &manifest));
        let entries = judged.collect::<Result<Vec<BackupEntry>, RepositoryError>>()?;
        self.history.set_seen(&reach.repository().config().name, &entries);
        Ok(entries)
    }

    /// Looks what a repository holds after a run, so that it is known when it is needed.
    pub(super) fn note_backups(&self, repository: &str) {
        let noted = self.repository(repository).and_then(|reach| self.snapshots(&reach));
        if let Err(error) = noted {
            tracing::debug!("after a run: {error}");
        }
    }

    /// The entry with what the slot's result and the marks say of it.
    fn judged(
        &self,
        repository: &Reach,
        mut entry: BackupEntry,
        manifest: &Manifest,
    ) -> Result<BackupEntry, RepositoryError> {
        let objects = repository.objects();
        let id = entry.id.clone().unwrap_or_default();
        entry.branch = self.mark(objects.as_ref(), &id);
        let mut store = SlotStore::new(objects, manifest.job_id, manifest.slot);
        let unread = |error: std::io::Error| RepositoryError::Failed {
            name: repository.repository().config().name.clone(),
            what: format!("the result of slot {}", manifest.slot),
            cause: error.to_string(),
        };
        let group = self.registry.by_id(manifest.group_id);
        let reigns = || {
            group.as_ref().map_or_else(Reigns::default, |group| Reigns::of(group, manifest.slot))
        };
        let results = match store.results() {
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                entry.reasons.push(Reason::new("no-result", error.to_string()));
                entry.outcome = Outcome::Failed;
                return Ok(entry);
            }
            results => results.map_err(unread)?,
        };
        let known = reigns();
        let is_marked = entry.branch.is_some();
        let why_not = || known.why_not(manifest.epoch, manifest.lsn, manifest.stale);
        entry.branch = entry.branch.or_else(why_not);
        entry.outcome = match results.iter().find(|result| result.id == id) {
            Some(result) => {
                entry.bytes_read = result.bytes_read;
                Outcome::Done
            }
            None if known.counted(&results).is_some() => Outcome::Superseded,
            None if is_marked => Outcome::Failed,
            None => {
                let now = self.context.env.clock.monotonic();
                let ended =
                    matches!(store.look(now, reigns).map_err(unread)?.holder, Holder::Ended(..));
                if ended || self.is_past_run(manifest) {
                    let text = "the run ended before it could write the slot's result";
                    entry.reasons.push(Reason::new("no-result", text));
                    Outcome::Failed
                } else {
                    Outcome::Running
                }
            }
        };
        Ok(entry)
    }

    /// Whether no run may still be at work on a backup: the time of its slot is over.
    fn is_past_run(&self, manifest: &Manifest) -> bool {
        let group = self.registry.by_id(manifest.group_id).map(|group| group.control());
        let job = group.as_ref().and_then(|g| g.jobs.iter().find(|job| job.id == manifest.job_id));
        let settings = job.and_then(|job| JobSettings::parse(&job.settings).ok());
        let until = time_of_slot(&settings.unwrap_or_default(), self.config.allowance);
        self.context.env.clock.wall() > manifest.slot.after(until)
    }

    fn find(&self, id: &str) -> Result<(Arc<Reach>, BackupEntry, Manifest), BackupError> {
        let mut unread = None;
        for repository in self.repositories() {
            let listed = match repository.opened().and_then(|opened| opened.list()) {
                Ok(listed) => listed,
                Err(RepositoryError::Missing { .. }) => continue,
                // Another one may hold it.
                Err(error) => {
                    unread.get_or_insert(error);
                    continue;
                }
            };
            let mut found = listed.into_iter().filter(|(entry, _)| {
                id.len() >= 6 && entry.id.as_ref().is_some_and(|known| known.starts_with(id))
            });
            if let Some((entry, manifest)) = found.next() {
                if found.next().is_some() {
                    let cause = "is the start of several ids; give more of it".to_owned();
                    let what = format!("backup `{id}`");
                    let name = repository.repository().config().name.clone();
                    return Err(RepositoryError::Failed { name, what, cause }.into());
                }
                return Ok((Arc::clone(repository), entry, manifest));
            }
        }
        let nowhere = || BackupError::NoBackup { id: id.to_owned() };
        Err(unread.map_or_else(nowhere, BackupError::from))
    }

    fn restore(
        &self,
        id: &str,
        volume: Option<&Name>,
        target: &RestoreTarget,
        progress: &Progress,
    ) -> Result<Vec<(Name, u64)>, BackupError> {
        let (repository, entry, manifest) = self.find(id)?;
        let id = entry.id.unwrap_or_else(|| id.to_owned());
        let chosen: Vec<_> = manifest
            .volumes
            .iter()
            .filter(|known| volume.is_none_or(|wanted| known.name == *wanted))
            .collect();
        let failed =
            |volume: &str, cause: String| BackupError::Restore { volume: volume.to_owned(), cause };
        if chosen.is_empty() {
            let names: Vec<_> = manifest.volumes.iter().map(|known| known.name.as_str()).collect();
            let wanted = volume.map_or("no volume", Name::as_str);
            return Err(failed(wanted, format!("the backup holds {}", names.join(", "))));
        }
        let several = chosen.len() > 1;
        if several && let RestoreTarget::Path(path) = target {
            std::fs::create_dir(path)
                .map_err(|error| failed("all volumes", format!("{}: {error}", path.display())))?;
        }
        let mut restored = Vec::new();
        for known in chosen {
            let name = known.name.as_str();
            let mut sink: Box<dyn RestoreSink> = match target {
                RestoreTarget::Path(path) if several => {
                    Box::new(file_sink(&path.join(format!("{name}.img")), name)?)
                }
                RestoreTarget::Path(path) => Box::new(file_sink(path, name)?),
                RestoreTarget::Volume { .. } if several => {
                    let cause = "the backup holds several volumes; choose one with --volume";
                    return Err(failed(name, cause.to_owned()));
                }
                RestoreTarget::Volume { group, volume } => {
                    Box::new(self.volume_sink(group, volume)?)
                }
            };
            repository.repository().restore(&id, name, sink.as_mut(), progress)?;
            restored.push((known.name.clone(), known.size_bytes));
        }
        Ok(restored)
    }

    /// A volume as a sink, claimed: refused where hosts use it, who would see it change under them,
    /// and no host is served it until the sink is dropped.
    fn volume_sink(&self, group: &Name, volume: &Name) -> Result<VolumeSink, BackupError> {
        let group = self.registry.by_name(group.as_str())?;
        let failed = |cause: String| BackupError::Restore {
            volume: format!("{}/{volume}", group.name()),
            cause,
        };
        if group.role() != Role::Primary {
            let name = group.name();
            let epochs = &group.control().epochs;
            let reigned = epochs.last().filter(|epoch| epoch.author != group.node().id);
            let next = reigned.map_or_else(
                || format!("`tidelog promote {name}` makes it that"),
                |epoch| format!("give the command on node {}, which is", epoch.author_name),
            );
            return Err(failed(format!("this node is not the group's primary; {next}")));
        }
        let control = group.control();
        let found = control.volumes.iter().find(|known| known.name == *volume).cloned();
        let found = found.ok_or_else(|| failed("the volume does not exist".to_owned()))?;
        let claim = group.claim_for_restore(found.number)?;
        Ok(VolumeSink { group: Arc::clone(&group), volume: found, claim, begun: false })
    }
}

fn out_of_reach(mut entry: BackupEntry, repository: &str, error: &RepositoryError) -> BackupEntry {
    let repository = repository.to_owned();
    let id = entry.id.take().unwrap_or_default();
    entry.unreachable = Some(Unreachable { id, repository, reason: error.to_string() });
    entry
}

fn file_sink(path: &Path, volume: &str) -> Result<FileSink, BackupError> {
    FileSink::create(path).map_err(|error| BackupError::Restore {
        volume: volume.to_owned(),
        cause: format!("{}: {error}", path.display()),
    })
}

/// A live volume, written as a host would.
struct VolumeSink {
    group: Arc<Group>,
    volume: Volume,
    claim: RestoreClaim,
    begun: bool,
}

impl VolumeSink {
    /// Before the first byte it is noted that the volume is another from here on: so it is where
    /// the restore does not end, too.
    fn begin_once(&mut self) -> Result<(), String> {
        if !std::mem::replace(&mut self.begun, true) {
            self.group.begin_restore(&self.claim).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn append(&mut self, op: Op<'_>) -> Result<(), String> {
        self.begin_once()?;
        self.group.append_claimed(&self.claim, op).map_err(|error| error.to_string())
    }
}

impl RestoreSink for VolumeSink {
    fn begin(&mut self, size_bytes: u64) -> Result<(), String> {
        if size_bytes > self.volume.size_bytes {
            return Err(format!(
                "the volume has {} bytes, the backup {size_bytes}; `tidelog volume resize` first",
                self.volume.size_bytes
            ));
        }
        let rest = self.volume.size_bytes - size_bytes;
        if rest == 0 {
            return Ok(());
        }
        self.append(Op::Zero { offset: size_bytes, length: rest, no_hole: false })
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), String> {
        for (index, part) in data.chunks(256 << 10).enumerate() {
            self.append(Op::Write { offset: offset + ((index as u64) << 18), data: part })?;
        }
        Ok(())
    }

    fn zero(&mut self, offset: u64, length: u64) -> Result<(), String> {
        self.append(Op::Zero { offset, length, no_hole: false })
    }

    fn finish(&mut self) -> Result<(), String> {
        self.begin_once()?;
        self.group.end_restore(&self.claim).map_err(|error| error.to_string())
    }
}
