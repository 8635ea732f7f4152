//! The file or block device that a new volume begins with, as it is found on this machine.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::OFlag;

use crate::io::{Disk, DiskFile, OpenMode};

use super::problem::Problem;

/// Images that hold a disk's bytes otherwise than one behind the other, by what they begin with.
const FORMATS: [(&[u8], &str); 4] =
    [(b"QFI\xfb", "qcow2"), (b"KDMV", "VMDK"), (b"vhdxfile", "VHDX"), (b"<<< Oracle", "VDI")];

/// What a volume is to begin with, open; a device is nobody else's meanwhile.
pub struct BaseFile {
    /// Its path, for errors.
    pub name: String,
    /// Where it is read from.
    pub file: Arc<dyn DiskFile>,
    /// Its bytes.
    pub size_bytes: u64,
    opened: File,
    before: Metadata,
}

impl BaseFile {
    /// Opens a file or block device to be read.
    ///
    /// # Errors
    ///
    /// Where it is something else, empty, in use, no raw image, or a file of this node's own; what
    /// the disk says.
    pub fn open(disk: &dyn Disk, path: &Path, data_dir: &Path) -> Result<BaseFile, Problem> {
        let name = path.display().to_string();
        let refused = |why: String| Problem::invalid(format!("base {name}: {why}"));
        let failed = |error: io::Error| refused(explained(&error));
        if !path.is_absolute() {
            return Err(refused("must begin with /".to_owned()));
        }
        let is_own = |dir: PathBuf| fs::canonicalize(path).is_ok_and(|path| path.starts_with(dir));
        if fs::canonicalize(data_dir).is_ok_and(is_own) {
            return Err(refused("is a file of this node itself, in its data_dir".to_owned()));
        }
        let is_device = |facts: &Metadata| facts.file_type().is_block_device();
        let check_kind = |facts: &Metadata| match facts.is_file() || is_device(facts) {
            true => Ok(()),
            false => Err(refused("is neither a file nor a block device".to_owned())),
        };
        // Before it is opened, which means something to pipes and some devices, and of what was.
        let facts = fs::metadata(path).map_err(failed)?;
        check_kind(&facts)?;
        // A device that is mounted is somebody else's.
        let mut flags = OFlag::O_NONBLOCK;
        flags.set(OFlag::O_EXCL, is_device(&facts));
        let opened = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path);
        let mut opened = opened.map_err(failed)?;
        let before = opened.metadata().map_err(failed)?;
        check_kind(&before)?;
        // A device has no length of its own.
        let size_bytes = opened.seek(SeekFrom::End(0)).map_err(failed)?;
        if size_bytes == 0 {
            return Err(refused("is empty; without --base a volume begins with zeros".to_owned()));
        }
        let mut first = [0; 16];
        let length = usize::try_from(size_bytes).map_or(first.len(), |size| size.min(first.len()));
        opened.read_exact_at(&mut first[..length], 0).map_err(failed)?;
        if let Some((_, format)) = FORMATS.iter().find(|(magic, _)| first.starts_with(magic)) {
            return Err(refused(format!(
                "is a {format} image, and not the disk's bytes as a host sees them; `qemu-img \
                 convert -O raw {name} FILE` makes a file of those"
            )));
        }
        // The very file that was looked at, whatever has its path by now.
        let same = format!("/proc/self/fd/{}", opened.as_raw_fd());
        let file = disk.open(Path::new(&same), OpenMode::Read).map_err(failed)?;
        Ok(BaseFile { name, file, size_bytes, opened, before })
    }

    /// Whether the file is still what it was when it was opened.
    ///
    /// # Errors
    ///
    /// That it changed, as far as its times tell; a device's tell nothing.
    pub fn check(&self) -> Result<(), String> {
        let name = &self.name;
        let now = self.opened.metadata().map_err(|error| format!("base {name}: {error}"))?;
        let key = |facts: &Metadata| {
            (facts.len(), facts.mtime(), facts.mtime_nsec(), facts.ctime(), facts.ctime_nsec())
        };
        if now.is_file() && key(&now) != key(&self.before) {
            return Err(format!(
                "base {name}: was changed while it was read, so that what was read is no one \
                 moment of it; stop who writes to it (or renames it, or changes its mode), and \
                 create the volume again"
            ));
        }
        Ok(())
    }
}

/// Why a file could not be opened, and what to do.
fn explained(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => format!(
            "{error}, for the node, which reads it; its service may not see devices, /home and \
             /tmp (contrib/tidelog.service says how it does)"
        ),
        io::ErrorKind::ResourceBusy => {
            format!("{error}: it is mounted or else in use; unmount it, or give a snapshot of it")
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::FileDisk;

    #[test]
    fn what_holds_no_raw_disk_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("data");
        fs::create_dir(&data_dir).unwrap();
        let open = |path: &Path| BaseFile::open(&FileDisk::new(), path, &data_dir);
        let refused = |path: &Path| open(path).err().expect("refused").detail;
        let path = dir.path().join("disk");
        assert!(refused(&path).contains("No such file"));
        assert!(refused(&path).contains("contrib/tidelog.service"));
        fs::write(data_dir.join("1.img"), b"x").unwrap();
        std::os::unix::fs::symlink(data_dir.join("1.img"), dir.path().join("link")).unwrap();
        assert!(refused(&dir.path().join("link")).contains("a file of this node itself"));
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
        // Bytes of the same number in their place, and however coarse the clock of the file system.
        fs::write(&path, [8; 5000]).unwrap();
        let long_ago = std::time::SystemTime::UNIX_EPOCH;
        File::options().write(true).open(&path).unwrap().set_modified(long_ago).unwrap();
        assert!(opened.check().unwrap_err().contains("was changed while it was read"));
    }
}
