//! The file or block device that a new volume begins with, as it is found on this machine.

use std::fs::{self, File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::io::{Disk, DiskFile, OpenMode};

use super::problem::Problem;

/// Images that hold a disk's bytes otherwise than one behind the other, by what they begin with.
const FORMATS: [(&[u8], &str); 4] =
    [(b"QFI\xfb", "qcow2"), (b"KDMV", "VMDK"), (b"vhdxfile", "VHDX"), (b"<<< Oracle", "VDI")];

/// What a volume is to begin with.
pub struct Contents {
    path: PathBuf,
    /// Where it is read from.
    pub file: Arc<dyn DiskFile>,
    /// Its bytes.
    pub size_bytes: u64,
    before: Metadata,
}

impl Contents {
    /// Opens a file or block device to be read.
    ///
    /// # Errors
    ///
    /// Where it is something else, empty, or no raw image; what the disk says.
    pub fn open(disk: &dyn Disk, path: &Path) -> Result<Contents, Problem> {
        let shown = path.display();
        let failed = |error: io::Error| Problem::invalid(format!("base {shown}: {error}"));
        if !path.is_absolute() {
            return Err(Problem::invalid(format!("base `{shown}`: must begin with /")));
        }
        // Looked at first: to open a pipe waits for its other end.
        let before = fs::metadata(path).map_err(failed)?;
        let kind = before.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Problem::invalid(format!(
                "base {shown}: is neither a file nor a block device"
            )));
        }
        let mut opened = File::open(path).map_err(failed)?;
        // A device has no length of its own.
        let size_bytes = opened.seek(SeekFrom::End(0)).map_err(failed)?;
        if size_bytes == 0 {
            return Err(Problem::invalid(format!(
                "base {shown}: is empty; without --base a volume begins with zeros"
            )));
        }
        let mut first = [0; 16];
        let length = usize::try_from(size_bytes).map_or(first.len(), |size| size.min(first.len()));
        opened.read_exact_at(&mut first[..length], 0).map_err(failed)?;
        if let Some((_, format)) = FORMATS.iter().find(|(magic, _)| first.starts_with(magic)) {
            return Err(Problem::invalid(format!(
                "base {shown}: is a {format} image, and not the disk's bytes as a host sees them; \
                 `qemu-img convert -O raw {shown} FILE` makes a file of those"
            )));
        }
        let file = disk.open(path, OpenMode::Read).map_err(failed)?;
        Ok(Contents { path: path.to_owned(), file, size_bytes, before })
    }

    /// Whether the file is still what it was when it was opened. A device tells nothing.
    ///
    /// # Errors
    ///
    /// That it changed.
    pub fn check(&self) -> Result<(), String> {
        let path = self.path.display();
        let now = fs::metadata(&self.path).map_err(|error| format!("base {path}: {error}"))?;
        let key = |facts: &Metadata| {
            (facts.dev(), facts.ino(), facts.len(), facts.mtime(), facts.mtime_nsec())
        };
        if now.file_type().is_file() && key(&now) != key(&self.before) {
            return Err(format!(
                "base {path}: was changed while it was read, so that what was read is no one \
                 moment of it; stop who writes to it, and create the volume again"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::FileDisk;

    #[test]
    fn what_holds_no_raw_disk_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let open = |path: &Path| Contents::open(&FileDisk::new(), path);
        let refused = |path: &Path| open(path).err().expect("refused").detail;
        let path = dir.path().join("disk");
        assert!(refused(&path).contains("No such file"));
        assert!(refused(dir.path()).contains("neither a file nor a block device"));
        assert!(refused(Path::new("disk")).contains("must begin with /"));
        fs::write(&path, b"").unwrap();
        assert!(refused(&path).contains("is empty"));
        fs::write(&path, b"QFI\xfb and so on").unwrap();
        assert!(refused(&path).contains("qemu-img convert"));
        nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(refused(&dir.path().join("pipe")).contains("neither"));
        fs::write(&path, [7; 5000]).unwrap();
        let opened = open(&path).unwrap();
        assert_eq!((opened.size_bytes, opened.check()), (5000, Ok(())));
        fs::write(&path, [8; 5001]).unwrap();
        assert!(opened.check().unwrap_err().contains("was changed while it was read"));
    }
}
