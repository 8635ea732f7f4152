//! Bringing a backup back: into a file, or into a volume through the same door that hosts use; and
//! proving that it could be.

use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustic_core::repofile::{BlobType, Node, SnapshotFile};
use rustic_core::{BlobId, IndexedFullStatus};

use super::catalog::{Description, MANIFEST_VERSION, Manifest, VolumeChecksum};
use super::door::sync_dir;
use super::repository::{Repository, RepositoryError, flat};
use super::source::{FILE_BYTES, MANIFEST_FILE, Progress};
use crate::group::runs_of_zeros;

/// Where a volume's bytes go, in order, without gaps.
pub trait RestoreSink {
    /// Is told the volume's size before the first byte.
    ///
    /// # Errors
    ///
    /// Where the place cannot take that many.
    fn begin(&mut self, size_bytes: u64) -> Result<(), String>;
    /// Takes bytes at an offset.
    ///
    /// # Errors
    ///
    /// Where they cannot be written.
    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), String>;
    /// Takes a range that reads as zeros.
    ///
    /// # Errors
    ///
    /// Where it cannot be written.
    fn zero(&mut self, offset: u64, length: u64) -> Result<(), String>;
    /// Makes everything durable.
    ///
    /// # Errors
    ///
    /// Where that fails.
    fn finish(&mut self) -> Result<(), String>;
}

/// A new sparse file, which takes its name when it is whole.
pub struct FileSink {
    file: std::fs::File,
    path: PathBuf,
    partial: PathBuf,
    finished: bool,
}

impl FileSink {
    /// Creates the file; an existing one is refused. Until it is whole it is called `path` with
    /// `.partial` behind it, and it goes away where the restore does not finish.
    ///
    /// # Errors
    ///
    /// Where it cannot be created.
    pub fn create(path: &Path) -> io::Result<FileSink> {
        if std::fs::symlink_metadata(path).is_ok() {
            let what = "exists already; remove it or give another path";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".partial");
        let partial = path.with_file_name(name);
        // A volume is nobody else's to read.
        let mut options = std::fs::OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&partial);
        let file = file.map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", partial.display()))
        })?;
        Ok(FileSink { file, path: path.to_path_buf(), partial, finished: false })
    }

    fn take_name(&mut self) -> io::Result<()> {
        self.file.sync_all()?;
        // A link fails where somebody took the name meanwhile; a rename would replace that file.
        match std::fs::hard_link(&self.partial, &self.path) {
            Ok(()) => std::fs::remove_file(&self.partial)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(error),
            Err(_) => std::fs::rename(&self.partial, &self.path)?,
        }
        self.finished = true;
        let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty());
        sync_dir(dir.unwrap_or(Path::new(".")))
    }
}

impl RestoreSink for FileSink {
    fn begin(&mut self, size_bytes: u64) -> Result<(), String> {
        self.file.set_len(size_bytes).map_err(|error| error.to_string())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), String> {
        self.file.write_all_at(data, offset).map_err(|error| error.to_string())
    }

    fn zero(&mut self, _offset: u64, _length: u64) -> Result<(), String> {
        // A new file reads as zeros where nothing was written.
        Ok(())
    }

    fn finish(&mut self) -> Result<(), String> {
        self.take_name().map_err(|error| error.to_string())
    }
}

impl Drop for FileSink {
    fn drop(&mut self) {
        if !self.finished {
            drop(std::fs::remove_file(&self.partial));
        }
    }
}

impl Repository {
    /// Writes one volume of a backup into `sink`; every chunk's SHA-256 is checked on the way.
    ///
    /// # Errors
    ///
    /// Where the backup is damaged or the sink fails. The sink was not finished then.
    pub fn restore(
        &self,
        id: &str,
        volume: &str,
        sink: &mut dyn RestoreSink,
        progress: &Progress,
    ) -> Result<(), RepositoryError> {
        let (repository, snapshot, described) = self.open_backup(id)?;
        let volumes = &described.manifest.volumes;
        let Some(known) = volumes.iter().find(|known| known.name.as_str() == volume) else {
            let names: Vec<_> = volumes.iter().map(|known| known.name.as_str()).collect();
            let cause = format!("holds {}", names.join(", "));
            return Err(self.failed_text(&format!("backup {id}: no volume {volume}"), &cause));
        };
        let failed = |cause: String| self.failed_text(&format!("restore of {volume}"), &cause);
        sink.begin(known.size_bytes).map_err(failed)?;
        progress.set_total(known.size_bytes);
        self.file_nodes(&repository, &snapshot, &described.manifest, volume, |file, node| {
            let mut at = file * FILE_BYTES;
            each_chunk(&repository, node, |data, _| {
                write_sparse(sink, at, data).map_err(Trouble::Sink)?;
                at += data.len() as u64;
                progress.add_done(data.len() as u64);
                Ok(())
            })
            .map_err(|trouble| match trouble {
                Trouble::Damaged(what) => self.damaged(volume, file, &what),
                Trouble::Sink(cause) => failed(cause),
            })
        })?;
        sink.finish().map_err(failed)
    }

    /// Reads a whole backup back and compares each chunk with its SHA-256, and each volume with the
    /// checksum taken when it was made; bytes read, and the checksums.
    ///
    /// # Errors
    ///
    /// Names what is damaged, all of it in numbers and the first few files by name.
    pub fn verify(
        &self,
        id: &str,
        progress: &Progress,
    ) -> Result<(u64, Vec<VolumeChecksum>), RepositoryError> {
        let (repository, snapshot, described) = self.open_backup(id)?;
        let manifest = &described.manifest;
        progress.set_total(manifest.size_bytes());
        let mut bytes = 0;
        let mut checksums = Vec::new();
        let mut damage = Damage::default();
        for volume in &manifest.volumes {
            let name = volume.name.as_str();
            let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
            let walked = self.file_nodes(&repository, &snapshot, manifest, name, |file, node| {
                let read = each_chunk(&repository, node, |data, hash| {
                    digest.update(hex::encode(hash).as_bytes());
                    bytes += data.len() as u64;
                    Ok(())
                });
                match read {
                    Ok(()) => {}
                    Err(Trouble::Damaged(what) | Trouble::Sink(what)) => {
                        damage.add(format!("volume {name}: file {file}: {what}"));
                    }
                }
                progress.add_done(node.meta.size);
                Ok(())
            });
            match walked {
                Ok(()) => {}
                Err(RepositoryError::Damaged { what, .. }) => damage.add(what),
                Err(error) => return Err(error),
            }
            let sha256 = hex::encode(digest.finish());
            checksums.push(VolumeChecksum { name: volume.name.clone(), sha256 });
        }
        if let Err(what) = self.check_manifest(&repository, &snapshot, manifest) {
            damage.add(what);
        }
        if damage.count == 0 && !described.checksums.is_empty() && described.checksums != checksums
        {
            damage.add("a volume has another checksum than when it was backed up".to_owned());
        }
        if damage.count > 0 {
            let what = format!("backup {id}: {damage}");
            return Err(RepositoryError::Damaged { name: self.config().name.clone(), what });
        }
        Ok((bytes, checksums))
    }

    /// Whether the manifest among the files is the one of the snapshot's description.
    fn check_manifest(
        &self,
        repository: &Indexed,
        snapshot: &SnapshotFile,
        manifest: &Manifest,
    ) -> Result<(), String> {
        let path = Path::new(manifest.group.as_str()).join(MANIFEST_FILE);
        let mut json = Vec::new();
        repository
            .node_from_path(snapshot.tree, &path)
            .and_then(|node| repository.dump(&node, &mut json))
            .map_err(|error| format!("{}: {}", path.display(), flat(&error)))?;
        let told: Manifest = serde_json::from_slice(&json)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        if told == *manifest {
            return Ok(());
        }
        Err(format!("{}: differs from the snapshot's description", path.display()))
    }

    /// A backup and the index to read it by.
    fn open_backup(
        &self,
        id: &str,
    ) -> Result<(Indexed, SnapshotFile, Description), RepositoryError> {
        let opened = self.open()?;
        let (snapshot, described) = self.find(&opened, id)?;
        let version = described.manifest.version;
        if version > MANIFEST_VERSION {
            let cause = format!("its version is {version}; use a newer tidelog");
            return Err(self.failed_text(&format!("backup {id}"), &cause));
        }
        let repository = opened.to_indexed().map_err(|error| self.failed("index", &error))?;
        Ok((repository, snapshot, described))
    }

    fn damaged(&self, volume: &str, file: u64, what: &str) -> RepositoryError {
        let what = format!("volume {volume}: file {file}: {what}");
        RepositoryError::Damaged { name: self.config().name.clone(), what }
    }
}

type Indexed = rustic_core::Repository<IndexedFullStatus>;

/// Why a file could not be passed on.
enum Trouble {
    /// It is not what was backed up.
    Damaged(String),
    /// Where it goes does not take it.
    Sink(String),
}

/// What is damaged: how much, and the first of it.
#[derive(Default)]
struct Damage {
    count: u64,
    first: Vec<String>,
}

impl Damage {
    fn add(&mut self, what: String) {
        self.count += 1;
        if self.first.len() < 3 {
            self.first.push(what);
        }
    }
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.first.join("; "))?;
        match self.count - self.first.len() as u64 {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

/// The chunks of a file in order, each with its SHA-256, checked against its name.
fn each_chunk(
    repository: &Indexed,
    node: &Node,
    mut each: impl FnMut(&[u8], &[u8]) -> Result<(), Trouble>,
) -> Result<(), Trouble> {
    let mut bytes = 0;
    for chunk in node.content.iter().flatten() {
        let data = repository
            .get_blob_cached(&BlobId::from(**chunk), BlobType::Data)
            .map_err(|error| Trouble::Damaged(flat(&error)))?;
        let hash = ring::digest::digest(&ring::digest::SHA256, &data);
        if hex::encode(hash) != *chunk.to_hex() {
            return Err(Trouble::Damaged(format!("chunk {chunk} has another checksum")));
        }
        bytes += data.len() as u64;
        if bytes > node.meta.size {
            break;
        }
        each(&data, hash.as_ref())?;
    }
    if bytes != node.meta.size {
        return Err(Trouble::Damaged(format!("{bytes} bytes, expected {}", node.meta.size)));
    }
    Ok(())
}

/// Hands on runs of zeros and of bytes, block by block.
fn write_sparse(sink: &mut dyn RestoreSink, offset: u64, data: &[u8]) -> Result<(), String> {
    for (range, zero) in runs_of_zeros(data) {
        let from = offset + range.start as u64;
        if zero {
            sink.zero(from, range.len() as u64)?;
        } else {
            sink.write(from, &data[range])?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::units::BLOCK_BYTES;

    #[derive(Default)]
    struct Calls(Vec<(u64, u64, bool)>);

    impl RestoreSink for Calls {
        fn begin(&mut self, _size_bytes: u64) -> Result<(), String> {
            Ok(())
        }
        fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), String> {
            self.0.push((offset, data.len() as u64, true));
            Ok(())
        }
        fn zero(&mut self, offset: u64, length: u64) -> Result<(), String> {
            self.0.push((offset, length, false));
            Ok(())
        }
        fn finish(&mut self) -> Result<(), String> {
            Ok(())
        }
    }

    #[test]
    fn runs_of_zeros_are_told_from_bytes_by_the_block() {
        let block = usize::try_from(BLOCK_BYTES).unwrap();
        let mut data = vec![0; 5 * block + 10];
        for at in [block, 3 * block - 1, 5 * block + 9] {
            data[at] = 1;
        }
        let mut calls = Calls::default();
        write_sparse(&mut calls, 1 << 22, &data).unwrap();
        let at = |number: u64| (1 << 22) + number * BLOCK_BYTES;
        let expected = [
            (at(0), BLOCK_BYTES, false),
            (at(1), 2 * BLOCK_BYTES, true),
            (at(3), 2 * BLOCK_BYTES, false),
            (at(5), 10, true),
        ];
        assert_eq!(calls.0, expected);
    }

    #[test]
    fn a_restored_file_takes_its_name_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let mut sink = FileSink::create(&path).unwrap();
        sink.begin(1 << 20).unwrap();
        sink.write(4096, b"x").unwrap();
        assert!(!path.exists());
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir.path().join("image.partial")), 0o600, "nobody else reads a volume");
        sink.finish().unwrap();
        assert_eq!(mode(&path), 0o600);
        drop(sink);
        let content = std::fs::read(&path).unwrap();
        assert_eq!((content.len(), content[4096]), (1 << 20, b'x'));
        assert!(FileSink::create(&path).is_err(), "an existing file is refused");
        drop(FileSink::create(&dir.path().join("other")).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");
    }
}
