//! Bringing a backup back: into a file, or into a volume through the same door that hosts use; and
//! proving that it could be.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustic_core::BlobId;
use rustic_core::repofile::BlobType;

use super::catalog::{Manifest, VolumeChecksum};
use super::repository::{Repository, RepositoryError};
use super::source::{FILE_BYTES, Progress};
use crate::units::BLOCK_BYTES;

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

/// A new sparse file.
pub struct FileSink {
    file: std::fs::File,
}

impl FileSink {
    /// Creates the file; an existing one is refused.
    ///
    /// # Errors
    ///
    /// Where it cannot be created.
    pub fn create(path: &Path) -> io::Result<FileSink> {
        let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path)?;
        Ok(FileSink { file })
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
        self.file.sync_all().map_err(|error| error.to_string())
    }
}

impl Repository {
    /// Writes one volume of a backup into `sink`; every chunk's SHA-256 is checked on the way.
    ///
    /// # Errors
    ///
    /// Where the backup is damaged or the sink fails.
    pub fn restore(
        &self,
        id: &str,
        volume: &str,
        sink: &mut dyn RestoreSink,
        progress: &Progress,
    ) -> Result<(), RepositoryError> {
        let (size_bytes, result) = {
            let (_, manifest) = self.find(&self.open(None)?, id)?;
            let known = manifest.volumes.iter().find(|known| known.name.as_str() == volume);
            let Some(known) = known else {
                let names: Vec<_> = manifest.volumes.iter().map(|v| v.name.as_str()).collect();
                let cause = format!("holds {}", names.join(", "));
                return Err(self.failed_text(&format!("backup {id}: no volume {volume}"), &cause));
            };
            (known.size_bytes, sink.begin(known.size_bytes))
        };
        let failed = |cause: String| self.failed_text(&format!("restore of {volume}"), &cause);
        result.map_err(failed)?;
        progress.set_total(size_bytes);
        self.read_volume(id, volume, |offset, data| {
            let block = usize::try_from(BLOCK_BYTES).expect("4096");
            let mut at = 0;
            while at < data.len() {
                // Runs of zeros and of bytes, block by block.
                let is_zero = |from: usize| {
                    data[from..data.len().min(from + block)].iter().all(|byte| *byte == 0)
                };
                let zero = is_zero(at);
                let mut end = at;
                while end < data.len() && is_zero(end) == zero {
                    end = data.len().min(end + block);
                }
                let from = offset + at as u64;
                if zero {
                    sink.zero(from, (end - at) as u64)?;
                } else {
                    sink.write(from, &data[at..end])?;
                }
                at = end;
            }
            progress.add_done(data.len() as u64);
            Ok(())
        })?;
        sink.finish().map_err(|cause| self.failed_text(&format!("restore of {volume}"), &cause))
    }

    /// Reads a whole backup back and checks every chunk; bytes read, and each volume's checksum.
    ///
    /// # Errors
    ///
    /// Names what is damaged.
    pub fn verify(
        &self,
        id: &str,
        progress: &Progress,
    ) -> Result<(u64, Vec<VolumeChecksum>), RepositoryError> {
        let (_, manifest) = self.find(&self.open(None)?, id)?;
        progress.set_total(manifest.size_bytes());
        let mut bytes = 0;
        let mut checksums = Vec::new();
        for volume in &manifest.volumes {
            let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
            self.read_volume_chunks(id, volume.name.as_str(), &manifest, |_, data, hash| {
                digest.update(hex::encode(hash).as_bytes());
                bytes += data.len() as u64;
                progress.add_done(data.len() as u64);
                Ok(())
            })?;
            let sha256 = hex::encode(digest.finish());
            checksums.push(VolumeChecksum { name: volume.name.clone(), sha256 });
        }
        Ok((bytes, checksums))
    }

    fn read_volume(
        &self,
        id: &str,
        volume: &str,
        mut each: impl FnMut(u64, &[u8]) -> Result<(), String>,
    ) -> Result<(), RepositoryError> {
        let (_, manifest) = self.find(&self.open(None)?, id)?;
        self.read_volume_chunks(id, volume, &manifest, |offset, data, _| each(offset, data))
    }

    /// The chunks of a volume in order, each with its SHA-256, checked against its name.
    fn read_volume_chunks(
        &self,
        id: &str,
        volume: &str,
        manifest: &Manifest,
        mut each: impl FnMut(u64, &[u8], &[u8]) -> Result<(), String>,
    ) -> Result<(), RepositoryError> {
        let opened = self.open(None)?;
        let (snapshot, _) = self.find(&opened, id)?;
        let repository = opened.to_indexed().map_err(|error| self.failed("index", &error))?;
        self.file_nodes(&repository, &snapshot, manifest, volume, |file, node| {
            let damaged = |what: String| RepositoryError::Damaged {
                name: self.config().name.clone(),
                what: format!("volume {volume}: file {file}: {what}"),
            };
            let mut at = 0;
            for chunk in node.content.iter().flatten() {
                let blob = BlobId::from(**chunk);
                let data = repository
                    .get_blob_cached(&blob, BlobType::Data)
                    .map_err(|error| damaged(error.display_log()))?;
                let hash = ring::digest::digest(&ring::digest::SHA256, &data);
                if hex::encode(&hash) != *chunk.to_hex() {
                    return Err(damaged(format!("chunk {chunk} has another checksum")));
                }
                each(file * FILE_BYTES + at, &data, hash.as_ref())
                    .map_err(|cause| self.failed_text(&format!("volume {volume}"), &cause))?;
                at += data.len() as u64;
            }
            if at != node.meta.size {
                return Err(damaged(format!("{at} bytes, expected {}", node.meta.size)));
            }
            Ok(())
        })
    }
}
