//! A repository in restic's format in a directory: made, opened, written and read through
//! `rustic_core`, whose errors become ours here.
//!
//! Everything here blocks; the scheduler calls it on threads of its own.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustic_backend::BackendOptions;
use rustic_core::repofile::{Chunker, MasterKey, Node, SnapshotFile, StringList};
use rustic_core::{
    BackupOptions, CheckOptions, ConfigOptions, Credentials, IndexedIdsStatus, KeyOptions,
    OpenStatus, ParentOptions, RepositoryBackends, RepositoryOptions, RusticError,
    SnapshotGroupCriterion,
};

use super::catalog::{BackupEntry, Description, Manifest, Stats, VolumeChecksum};
use super::door::{Bars, Door, Gate, sync_dir};
use super::objects::{FileObjects, Objects};
use super::source::{DIR_FILES, FILE_BYTES, ImageSource, Progress, Stamp, Stamps, Stop, files};
use crate::group::{View, Volume};
use crate::units::LogTime;

/// A repository as the node's configuration names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryConfig {
    /// One name means one repository on every node.
    pub name: String,
    /// A directory.
    pub url: String,
    /// A file whose first line is the password.
    pub password_file: PathBuf,
}

/// What went wrong with a repository: object, what, cause; next command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each message says it")]
pub enum RepositoryError {
    #[error("repository {name}: not configured here; add a [[repository]] of that name")]
    Unknown { name: String },
    #[error("repository {name}: {url}: only directories can be repositories so far")]
    Url { name: String, url: String },
    #[error(
        "repository {name}: does not exist at {url}; mount the file system that it is on, or \
         `tidelog repository init {name}` makes a new one"
    )]
    Missing { name: String, url: String },
    #[error("repository {name}: {url}: no answer since {since}; look at the file system there")]
    Unreachable { name: String, url: String, since: LogTime },
    #[error("repository {name}: {url}: is not a directory; change its url in the configuration")]
    NotADirectory { name: String, url: String },
    #[error("repository {name}: exists already at {url}")]
    Exists { name: String, url: String },
    #[error("repository {name}: password file {path}: {cause}")]
    Password { name: String, path: String, cause: String },
    #[error("repository {name}: backup `{id}` does not exist; `tidelog backup list` shows them")]
    NoBackup { name: String, id: String },
    #[error("repository {name}: the run was ended: {reason}")]
    Stopped { name: String, reason: String },
    #[error("repository {name}: damaged: {what}; `tidelog repository check {name}`")]
    Damaged { name: String, what: String },
    #[error("repository {name}: {what}: {cause}")]
    Failed { name: String, what: String, cause: String },
}

/// What one backup is made from.
pub struct BackupPlan {
    /// The image.
    pub view: Arc<dyn View>,
    /// What goes with it.
    pub manifest: Manifest,
    /// The backup to build on, if its image is in the history.
    pub parent: Option<Parent>,
    /// Ends the run from outside.
    pub stop: Stop,
    /// Told how far it is.
    pub progress: Progress,
}

/// A backup to build on.
pub struct Parent {
    /// Its snapshot.
    pub id: String,
    /// Its manifest.
    pub manifest: Manifest,
    /// Per volume what changed since, as (offset, length) in bytes; a volume that is not here is
    /// read in full.
    pub changed: Vec<(Volume, Vec<(u64, u64)>)>,
}

/// A backup that was made.
#[derive(Clone, Debug, PartialEq)]
pub struct Made {
    /// The snapshot.
    pub id: String,
    /// What it cost.
    pub stats: Stats,
    /// A checksum for each volume.
    pub checksums: Vec<VolumeChecksum>,
}

/// A repository. Opening is done for every use; the key is kept, so that only the first one pays
/// for the password.
pub struct Repository {
    config: RepositoryConfig,
    path: PathBuf,
    key: Mutex<Option<MasterKey>>,
    objects: Arc<dyn Objects>,
}

/// The tag that every snapshot of ours carries.
const TAG: &str = "tidelog";

type Opened = rustic_core::Repository<OpenStatus>;

impl Repository {
    /// The repository of a configuration; touches nothing. `writer` is a random number.
    ///
    /// # Errors
    ///
    /// Where the URL is not a directory's path.
    pub fn new(config: RepositoryConfig, writer: u64) -> Result<Repository, RepositoryError> {
        let path = PathBuf::from(&config.url);
        if !path.is_absolute() || config.url.contains("://") {
            let RepositoryConfig { name, url, .. } = config;
            return Err(RepositoryError::Url { name, url });
        }
        let objects = Arc::new(FileObjects::new(path.join("tidelog"), writer));
        Ok(Repository { config, path, key: Mutex::new(None), objects })
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &RepositoryConfig {
        &self.config
    }

    /// The small objects beside it.
    #[must_use]
    pub fn objects(&self) -> Arc<dyn Objects> {
        Arc::clone(&self.objects)
    }

    /// Makes the repository.
    ///
    /// # Errors
    ///
    /// Where one is there, and where directory or password fail.
    pub fn init(&self) -> Result<String, RepositoryError> {
        self.check_empty()?;
        let credentials = self.password()?;
        let repository = self.closed(&Gate::new(Stop::new()), None)?;
        let config = ConfigOptions::default().set_chunker(Chunker::FixedSize);
        let opened = repository
            .init(&credentials, &KeyOptions::default(), &config)
            .map_err(|error| self.failed("could not be made", &error))?;
        // restic expects the directory for its locks.
        std::fs::create_dir_all(self.path.join("locks"))
            .and_then(|()| sync_dir(&self.path))
            .map_err(|error| self.failed_text("locks", &error.to_string()))?;
        *self.key.lock().expect("no holder panics") = Some(opened.key());
        Ok(opened.config().id.to_hex().to_string())
    }

    /// Refuses a place that holds a repository, or anything else.
    fn check_empty(&self) -> Result<(), RepositoryError> {
        let failed = |cause: &str| Err(self.failed_text(&self.config.url, cause));
        match std::fs::read_dir(&self.path) {
            Ok(entries) => {
                if self.path.join("config").exists() {
                    let RepositoryConfig { name, url, .. } = self.config.clone();
                    return Err(RepositoryError::Exists { name, url });
                }
                let names = entries.filter_map(Result::ok).map(|entry| entry.file_name());
                if names.into_iter().any(|name| name != "lost+found") {
                    return failed("is not empty; give a directory that is empty or new");
                }
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => failed(&error.to_string()),
        }
    }

    /// The repository's own id, by which two nodes know that they mean the same.
    ///
    /// # Errors
    ///
    /// Where it cannot be opened.
    pub fn id(&self) -> Result<String, RepositoryError> {
        Ok(self.open()?.config().id.to_hex().to_string())
    }

    /// Makes a backup of an image.
    ///
    /// # Errors
    ///
    /// Where the repository fails, the image cannot be read, or the run was ended from outside. No
    /// snapshot is left then.
    pub fn backup(&self, plan: BackupPlan) -> Result<Made, RepositoryError> {
        let BackupPlan { view, manifest, parent, stop, progress } = plan;
        let gate = Gate::new(stop.clone());
        gate.close();
        let repository = self
            .open_through(&gate, Some(&progress))?
            .to_indexed_ids()
            .map_err(|error| self.failed("index", &error))?;
        let wanted: Vec<Volume> = view
            .volumes()
            .into_iter()
            .filter(|volume| manifest.volumes.iter().any(|known| known.number == volume.number))
            .collect();
        let new = Stamp::of(manifest.position());
        let mut sources = Vec::new();
        for volume in wanted {
            let stamps = match &parent {
                // A parent that cannot be read costs the time of a full read, not the backup.
                Some(parent) => self
                    .stamps(&repository, parent, &manifest, &volume, new)
                    .unwrap_or_else(|cause| {
                        tracing::warn!(%cause, "the parent cannot be read: everything is read anew");
                        Stamps::all(files(volume.size_bytes), new)
                    }),
                None => Stamps::all(files(volume.size_bytes), new),
            };
            sources.push((volume, stamps));
        }

        let body = serde_json::to_vec_pretty(&manifest).expect("plain data becomes JSON");
        let root = PathBuf::from("/").join(manifest.group.as_str());
        let roots = [root.clone()];
        let source = ImageSource::new(view, sources, root, body, stop.clone(), progress.clone());
        let expected = source.file_count();
        let made = repository.archive(
            &archive_options(parent.as_ref()),
            &source,
            blank_snapshot(&manifest),
            &roots,
        );
        let stopped =
            |reason: String| RepositoryError::Stopped { name: self.config.name.clone(), reason };
        if let Some(reason) = stop.reason() {
            return Err(stopped(reason));
        }
        let mut snapshot = made.map_err(|error| self.failed("backup", &error))?;
        let processed = snapshot.summary.as_ref().map_or(0, |s| s.total_files_processed);
        if processed != expected {
            let cause = format!("{processed} of {expected} files could be written");
            return Err(self.failed_text("backup", &cause));
        }
        // What was just written is not in the index that was read before.
        let written = self.open()?.to_indexed_ids().map_err(|e| self.failed("index", &e))?;
        let checksums = self.checksums(&written, &snapshot, &manifest)?;
        let stats = stats_of(&snapshot, progress.bytes_read());
        let described = Description { manifest, stats: Some(stats), checksums };
        snapshot.description =
            Some(serde_json::to_string(&described).expect("plain data becomes JSON"));
        gate.open();
        if let Err(error) = repository.save_snapshots(vec![snapshot]) {
            return Err(stop
                .reason()
                .map_or_else(|| self.failed("snapshot could not be saved", &error), stopped));
        }
        let id = gate.saved().expect("a snapshot went through the gate").to_hex().to_string();
        Ok(Made { id, stats, checksums: described.checksums })
    }

    /// All backups that Tidelog made, oldest first.
    ///
    /// # Errors
    ///
    /// Where the repository cannot be read.
    pub fn list(&self) -> Result<Vec<(BackupEntry, Manifest)>, RepositoryError> {
        let mut snapshots = self.snapshots(&self.open()?)?;
        snapshots.sort_by_key(|(snapshot, described)| {
            (described.manifest.time, snapshot.id.to_hex().to_string())
        });
        Ok(snapshots
            .into_iter()
            .map(|(snapshot, described)| {
                let Description { manifest, stats, .. } = described;
                let stats = stats.unwrap_or_else(|| stats_of(&snapshot, manifest.size_bytes()));
                let id = snapshot.id.to_hex().to_string();
                (BackupEntry::of_snapshot(id, manifest.clone(), stats), manifest)
            })
            .collect())
    }

    /// Removes a snapshot; its data stays until a prune.
    ///
    /// # Errors
    ///
    /// Where there is no such snapshot, or it cannot be removed.
    pub fn forget(&self, id: &str) -> Result<(), RepositoryError> {
        let opened = self.open()?;
        let (snapshot, _) = self.find(&opened, id)?;
        opened.delete_snapshots(&[snapshot.id]).map_err(|error| self.failed("forget", &error))
    }

    /// Checks the repository's structure, and all data where asked.
    ///
    /// # Errors
    ///
    /// Names what is damaged.
    pub fn check(&self, read_data: bool) -> Result<(), RepositoryError> {
        let options = CheckOptions::default().read_data(read_data);
        let results = self.open()?.check(options).map_err(|error| self.failed("check", &error))?;
        results.is_ok().map_err(|_| {
            let what: Vec<_> = results.0.iter().take(3).map(|(_, e)| e.to_string()).collect();
            RepositoryError::Damaged { name: self.config.name.clone(), what: what.join("; ") }
        })
    }

    /// The snapshot whose id begins with `id`, with what it says of itself.
    pub(super) fn find(
        &self,
        opened: &Opened,
        id: &str,
    ) -> Result<(SnapshotFile, Description), RepositoryError> {
        let none =
            || RepositoryError::NoBackup { name: self.config.name.clone(), id: id.to_owned() };
        if id.len() < 6 {
            return Err(none());
        }
        let mut found: Vec<_> = self
            .snapshots(opened)?
            .into_iter()
            .filter(|(snapshot, _)| snapshot.id.to_hex().starts_with(id))
            .collect();
        if found.len() > 1 {
            return Err(self.failed_text("backup", &format!("`{id}` is the start of several ids")));
        }
        found.pop().ok_or_else(none)
    }

    pub(super) fn open(&self) -> Result<Opened, RepositoryError> {
        self.open_through(&Gate::new(Stop::new()), None)
    }

    fn open_through(
        &self,
        gate: &Arc<Gate>,
        progress: Option<&Progress>,
    ) -> Result<Opened, RepositoryError> {
        if !self.path.join("config").exists() {
            let RepositoryConfig { name, url, .. } = self.config.clone();
            return Err(if self.path.exists() && !self.path.is_dir() {
                RepositoryError::NotADirectory { name, url }
            } else {
                RepositoryError::Missing { name, url }
            });
        }
        let known = self.key.lock().expect("no holder panics").clone();
        if let Some(key) = known
            && let Ok(opened) = self.closed(gate, progress)?.open(&Credentials::Masterkey(key))
        {
            return Ok(opened);
        }
        let opened = self.closed(gate, progress)?.open(&self.password()?).map_err(|error| {
            if error.is_incorrect_password() {
                RepositoryError::Password {
                    name: self.config.name.clone(),
                    path: self.config.password_file.display().to_string(),
                    cause: "is not this repository's password".to_owned(),
                }
            } else {
                self.failed("could not be opened", &error)
            }
        })?;
        *self.key.lock().expect("no holder panics") = Some(opened.key());
        Ok(opened)
    }

    pub(super) fn failed(&self, what: &str, cause: &RusticError) -> RepositoryError {
        self.failed_text(what, &flat(cause))
    }

    pub(super) fn failed_text(&self, what: &str, cause: &str) -> RepositoryError {
        let name = self.config.name.clone();
        RepositoryError::Failed { name, what: what.to_owned(), cause: cause.to_owned() }
    }

    /// The volume's file nodes in order, of the tree below `/GROUP/data/VOLUME`.
    pub(super) fn file_nodes<S: rustic_core::IndexedTree>(
        &self,
        repository: &rustic_core::Repository<S>,
        snapshot: &SnapshotFile,
        manifest: &Manifest,
        volume: &str,
        mut each: impl FnMut(u64, &Node) -> Result<(), RepositoryError>,
    ) -> Result<(), RepositoryError> {
        let damaged = |what: String| RepositoryError::Damaged {
            name: self.config.name.clone(),
            what: format!("volume {volume}: {what}"),
        };
        let size = manifest
            .volumes
            .iter()
            .find(|known| known.name.as_str() == volume)
            .ok_or_else(|| damaged("is not in the backup".to_owned()))?
            .size_bytes;
        let path = Path::new(manifest.group.as_str()).join("data").join(volume);
        for dir in 0..files(size).div_ceil(DIR_FILES) {
            let node = repository
                .node_from_path(snapshot.tree, &path.join(format!("{dir:05}")))
                .map_err(|error| damaged(flat(&error)))?;
            let subtree = node.subtree.ok_or_else(|| damaged(format!("{dir:05}: no tree")))?;
            let tree = repository.get_tree(&subtree).map_err(|error| damaged(flat(&error)))?;
            let first = dir * DIR_FILES;
            let expected = DIR_FILES.min(files(size) - first);
            if tree.nodes.len() as u64 != expected {
                let what = format!("{dir:05}: {} files, expected {expected}", tree.nodes.len());
                return Err(damaged(what));
            }
            for (index, node) in tree.nodes.iter().enumerate() {
                let file = first + index as u64;
                let length = FILE_BYTES.min(size - file * FILE_BYTES);
                if node.meta.size != length || node.name != format!("{index:04}") {
                    let what = format!("file {file}: {} of {} bytes", node.name, node.meta.size);
                    return Err(damaged(what));
                }
                each(file, node)?;
            }
        }
        Ok(())
    }

    fn closed(
        &self,
        gate: &Arc<Gate>,
        progress: Option<&Progress>,
    ) -> Result<rustic_core::Repository<()>, RepositoryError> {
        let backends = BackendOptions::default()
            .repository(self.config.url.clone())
            .to_backends()
            .map_err(|error| self.failed("could not be opened", &error))?;
        let door = Door::new(backends.repository(), &self.path, gate);
        let backends = RepositoryBackends::new(Arc::new(door), None);
        let options = RepositoryOptions::default().no_cache(true);
        let closed = match progress {
            None => rustic_core::Repository::new(&options, &backends),
            Some(progress) => {
                let bars = Bars(progress.clone());
                rustic_core::Repository::new_with_progress(&options, &backends, bars)
            }
        };
        closed.map_err(|error| self.failed("could not be opened", &error))
    }

    fn password(&self) -> Result<Credentials, RepositoryError> {
        let path = &self.config.password_file;
        let wrong = |cause: String| RepositoryError::Password {
            name: self.config.name.clone(),
            path: path.display().to_string(),
            cause,
        };
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        let line = text.lines().next().unwrap_or_default().to_owned();
        if line.is_empty() {
            return Err(wrong("its first line is empty".to_owned()));
        }
        Ok(Credentials::Password(line))
    }

    fn snapshots(
        &self,
        opened: &Opened,
    ) -> Result<Vec<(SnapshotFile, Description)>, RepositoryError> {
        let all = opened.get_all_snapshots().map_err(|error| self.failed("snapshots", &error))?;
        Ok(all
            .into_iter()
            .filter(|snapshot| snapshot.tags.contains(TAG))
            .filter_map(|snapshot| {
                let text = snapshot.description.as_deref().unwrap_or_default();
                match serde_json::from_str(text) {
                    Ok(described) => Some((snapshot, described)),
                    Err(error) => {
                        let id = snapshot.id;
                        tracing::warn!("snapshot {id}: its description is not ours: {error}");
                        None
                    }
                }
            })
            .collect())
    }

    /// The stamps of a volume's files: the parent's where nothing changed since.
    fn stamps(
        &self,
        repository: &rustic_core::Repository<IndexedIdsStatus>,
        parent: &Parent,
        manifest: &Manifest,
        volume: &Volume,
        new: Stamp,
    ) -> Result<Stamps, RepositoryError> {
        let all_new = Stamps::all(files(volume.size_bytes), new);
        let before = parent.manifest.volumes.iter().find(|known| known.number == volume.number);
        let changed = parent.changed.iter().find(|(known, _)| known.number == volume.number);
        let (Some(before), Some((_, changed))) = (before, changed) else { return Ok(all_new) };
        if before.name != volume.name || parent.manifest.group != manifest.group {
            return Ok(all_new);
        }
        let opened = self.open()?;
        let (snapshot, _) = self.find(&opened, &parent.id)?;
        let mut stamps = Stamps::default();
        let limit = files(volume.size_bytes);
        self.file_nodes(
            repository,
            &snapshot,
            &parent.manifest,
            volume.name.as_str(),
            |_, node| {
                if stamps.count() < limit {
                    let stamp = Stamp::from_times(node.meta.mtime, node.meta.ctime);
                    stamps.push(stamp.unwrap_or(new));
                }
                Ok(())
            },
        )?;
        while stamps.count() < limit {
            stamps.push(new);
        }
        for (offset, length) in changed {
            if *length > 0 {
                for file in offset / FILE_BYTES..=(offset + length - 1) / FILE_BYTES {
                    stamps.set(file, new);
                }
            }
        }
        // A file whose length changed with the volume's size is no longer the parent's.
        if before.size_bytes != volume.size_bytes {
            let shorter = before.size_bytes.min(volume.size_bytes);
            if shorter % FILE_BYTES != 0 {
                stamps.set(shorter / FILE_BYTES, new);
            }
        }
        Ok(stamps)
    }

    /// Also checks that the snapshot holds every file of every volume.
    fn checksums(
        &self,
        repository: &rustic_core::Repository<IndexedIdsStatus>,
        snapshot: &SnapshotFile,
        manifest: &Manifest,
    ) -> Result<Vec<VolumeChecksum>, RepositoryError> {
        let mut checksums = Vec::new();
        for volume in &manifest.volumes {
            let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
            self.file_nodes(repository, snapshot, manifest, volume.name.as_str(), |_, node| {
                for id in node.content.iter().flatten() {
                    digest.update(id.to_hex().as_bytes());
                }
                Ok(())
            })?;
            let sha256 = hex::encode(digest.finish());
            checksums.push(VolumeChecksum { name: volume.name.clone(), sha256 });
        }
        Ok(checksums)
    }
}

/// A snapshot of a run, before its files are known.
fn blank_snapshot(manifest: &Manifest) -> SnapshotFile {
    let (group, job) = (format!("group:{}", manifest.group), format!("job:{}", manifest.job));
    let mut tags = StringList::default();
    [TAG.to_owned(), group, job].into_iter().for_each(|tag| tags.add(tag));
    SnapshotFile {
        // The moment that the image shows is what `restic snapshots` lists.
        time: manifest.time.timestamp().to_zoned(jiff::tz::TimeZone::UTC),
        label: manifest.group.to_string(),
        hostname: manifest.node.to_string(),
        program_version: concat!("tidelog ", env!("CARGO_PKG_VERSION")).to_owned(),
        tags,
        ..SnapshotFile::default()
    }
}

fn archive_options(parent: Option<&Parent>) -> BackupOptions {
    let mut options = BackupOptions::default().no_scan(true);
    // No criterion: the parent is named, whichever node or job made it.
    options.parent_opts =
        ParentOptions::default().group_by(SnapshotGroupCriterion::new()).ignore_inode(false);
    match parent {
        Some(parent) => options.parent_opts.parents = vec![parent.id.clone()],
        None => options.parent_opts.force = true,
    }
    options
}

fn stats_of(snapshot: &SnapshotFile, bytes_read: u64) -> Stats {
    let summary = snapshot.summary.as_ref();
    Stats {
        bytes_read,
        bytes_added: summary.map_or(0, |summary| summary.data_added_packed),
        duration_seconds: summary.map_or(0.0, |summary| {
            Duration::try_from_secs_f64(summary.backup_duration).map_or(0.0, |d| d.as_secs_f64())
        }),
    }
}

/// An error of the library on one line.
pub(super) fn flat(error: &RusticError) -> String {
    let text = error.display_log();
    let text = text.strip_prefix("Error: ").unwrap_or(&text);
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
