//! Small files that are replaced as a whole and prove themselves, and directories that go as a
//! whole.

use std::io::{self, IoSlice};
use std::path::Path;

use crate::base::{seal, unseal};
use crate::io::{Disk, OpenMode};

/// What the first line of such a file begins with.
const MAGIC: &str = "tidelog-file";

/// Bytes of such a file at most.
const BYTES_MAX: u64 = 16 << 20;

/// What the name of a directory ends with while it is being removed.
const DISCARDED: &str = ".deleted";

/// Replaces a file by a new one with these bytes; after a crash it is the old or the new one.
pub(super) fn store(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let file = disk.open(&temporary, OpenMode::Create)?;
    let sealed = seal(MAGIC, bytes);
    file.set_len(sealed.len() as u64)?;
    file.write_at(&[IoSlice::new(&sealed)], 0)?;
    file.sync()?;
    disk.rename(&temporary, path)?;
    disk.sync_dir(path.parent().unwrap_or(path))
}

/// Reads such a file; `InvalidData` where it is not what was written.
pub(super) fn load(disk: &dyn Disk, path: &Path) -> io::Result<Vec<u8>> {
    let file = disk.open(path, OpenMode::Read)?;
    let bytes = file.len()?;
    let damaged = |what: String| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{}: {what}", path.display()))
    };
    if bytes > BYTES_MAX {
        return Err(damaged(format!("has {bytes} bytes")));
    }
    let mut buffer = vec![0; bytes as usize];
    file.read_at(&mut buffer, 0)?;
    unseal(MAGIC, &buffer).map(<[u8]>::to_vec).map_err(damaged)
}

/// Whether a directory of this name is one that was not removed to the end.
pub(super) fn is_discarded(name: &str) -> bool {
    name.ends_with(DISCARDED)
}

/// The names in a directory that may not be there.
pub(super) fn names_in(disk: &dyn Disk, dir: &Path) -> io::Result<Vec<String>> {
    if disk.exists(dir)? { disk.list(dir) } else { Ok(Vec::new()) }
}

/// Removes a directory. It gets another name first, so that after a crash it is there as a whole or
/// never again; a start removes what is left.
pub(super) fn discard(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    let dir = path.parent().unwrap_or(path);
    let named = path.extension().is_some();
    let gone = if named { path.to_owned() } else { path.with_extension(&DISCARDED[1..]) };
    if !named {
        if disk.exists(&gone)? {
            disk.remove_dir(&gone)?;
        }
        disk.rename(path, &gone)?;
        disk.sync_dir(dir)?;
    }
    disk.remove_dir(&gone)?;
    disk.sync_dir(dir)
}
