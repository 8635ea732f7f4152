//! The real disk: plain files through the page cache.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::libc;
use nix::unistd::{Whence, lseek};

use super::disk::{BatchRead, Disk, DiskFile, OpenMode, Space};
use super::ring;

/// Slices that one `pwritev` takes on Linux.
const SLICES_MAX: usize = libc::UIO_MAXIOV as usize;
/// Bytes of a page of the cache.
const PAGE_BYTES: u64 = 4096;

/// The file systems of this machine.
#[derive(Clone, Copy, Debug)]
pub struct FileDisk {
    ring: bool,
}

impl FileDisk {
    /// A disk whose batches go through io_uring where that is allowed.
    #[must_use]
    pub fn new() -> FileDisk {
        FileDisk { ring: true }
    }

    /// A disk that reads one after the other, as where io_uring is forbidden.
    #[must_use]
    pub fn without_ring() -> FileDisk {
        FileDisk { ring: false }
    }
}

impl Default for FileDisk {
    fn default() -> FileDisk {
        FileDisk::new()
    }
}

impl Disk for FileDisk {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.read(true);
        match mode {
            OpenMode::Read => &mut options,
            OpenMode::ReadWrite => options.write(true),
            OpenMode::CreateNew => options.write(true).create_new(true),
            OpenMode::Create => options.write(true).create(true).truncate(false),
        };
        let file = options.open(path).map_err(|error| at(path, &error))?;
        Ok(Arc::new(PlainFile { file, apart: OnceLock::new() }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        // The contents of volumes are nobody else's to read, whatever the directory above allows.
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(|error| at(path, &error))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to).map_err(|error| at(from, &error))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path).map_err(|error| at(path, &error))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path).map_err(|error| at(path, &error))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(path).map_err(|error| at(path, &error))? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        path.try_exists().map_err(|error| at(path, &error))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path).and_then(|dir| dir.sync_all()).map_err(|error| at(path, &error))
    }

    fn allocated(&self, path: &Path) -> u64 {
        // In units of 512 bytes, whatever the file system's block is.
        fs::symlink_metadata(path).map_or(0, |facts| facts.blocks().saturating_mul(512))
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        let facts = nix::sys::statvfs::statvfs(path).map_err(|error| at(path, &error.into()))?;
        let unit = facts.fragment_size();
        Ok(Space {
            total_bytes: facts.blocks().saturating_mul(unit),
            free_bytes: facts.blocks_available().saturating_mul(unit),
        })
    }

    fn read_batch(&self, reads: &mut [BatchRead<'_>]) {
        let ringed = self.ring && reads.len() > 1 && ring::read_batch(reads);
        if !ringed {
            for read in reads {
                read.result = read.file.read_at(read.buffer, read.offset);
            }
        }
    }
}

/// The same error with the path in front of it; its kind is kept.
fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// One open file.
struct PlainFile {
    file: File,
    /// The same file, opened once more, so that reading ahead can be off there alone.
    apart: OnceLock<Option<File>>,
}

/// A range for system calls that take signed numbers; saturates, which reaches the end of any file.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

impl DiskFile for PlainFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn read_once(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let file = self.apart();
        let first = offset / PAGE_BYTES;
        let pages = (offset + buffer.len() as u64).div_ceil(PAGE_BYTES) - first;
        let cached = cached_pages(file, first * PAGE_BYTES, pages as usize);
        file.read_exact_at(buffer, offset)?;
        let mut page = first;
        for run in cached.chunk_by(|a, b| a == b) {
            if !run[0] {
                self.drop_cache(page * PAGE_BYTES, run.len() as u64 * PAGE_BYTES);
            }
            page += run.len() as u64;
        }
        Ok(())
    }

    fn is_hole(&self, offset: u64, bytes: u64) -> bool {
        match lseek(&self.file, signed(offset), Whence::SeekData) {
            Ok(data) => signed(offset.saturating_add(bytes)) <= data,
            // There is none up to the file's end. Other errors tell nothing.
            Err(error) => error == nix::Error::ENXIO,
        }
    }

    fn write_at(&self, slices: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let mut offset = offset;
        for group in slices.chunks(SLICES_MAX) {
            offset = self.write_group(group, offset)?;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn start_writeback(&self, offset: u64, bytes: u64) {
        // SAFETY: the descriptor is open as long as `self`; the call takes numbers only.
        // Its failure is the next sync's to report.
        unsafe {
            libc::sync_file_range(
                self.file.as_raw_fd(),
                signed(offset),
                signed(bytes),
                libc::SYNC_FILE_RANGE_WRITE,
            );
        }
    }

    fn punch_hole(&self, offset: u64, bytes: u64) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&self.file, flags, signed(offset), signed(bytes)) {
            Ok(()) => Ok(()),
            Err(nix::Error::EOPNOTSUPP) => self.write_zeros(offset, bytes),
            Err(error) => Err(error.into()),
        }
    }

    fn drop_cache(&self, offset: u64, bytes: u64) {
        // Advice: nothing depends on it.
        let _ = posix_fadvise(
            &self.file,
            signed(offset),
            signed(bytes),
            PosixFadviseAdvice::POSIX_FADV_DONTNEED,
        );
    }

    fn raw_fd(&self) -> Option<RawFd> {
        Some(self.file.as_raw_fd())
    }
}

/// Which pages from `offset` on, a multiple of the page, the cache holds; where that cannot be
/// told, all of them. A read that may not wait would tell too, but it starts to read.
fn cached_pages(file: &File, offset: u64, pages: usize) -> Vec<bool> {
    let bytes = pages * PAGE_BYTES as usize;
    // SAFETY: the mapping is not looked into, only asked about: a file that gets shorter or cannot
    // be read does no harm.
    let map = unsafe { memmap2::MmapOptions::new().offset(offset).len(bytes).map(file) };
    let mut told = vec![1_u8; pages];
    if let Ok(map) = map {
        // SAFETY: `map` covers `bytes` from a page's start, and `told` has a byte for each page.
        unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), bytes, told.as_mut_ptr()) };
    }
    told.into_iter().map(|page| page & 1 == 1).collect()
}

impl PlainFile {
    /// The file for readers that leave no trace.
    fn apart(&self) -> &File {
        let apart = self.apart.get_or_init(|| {
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let file = File::open(path).ok()?;
            // Advice: where it is not taken, more is read than is asked for.
            let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
            Some(file)
        });
        apart.as_ref().unwrap_or(&self.file)
    }

    /// Writes as many slices as one system call takes; the offset behind them.
    fn write_group(&self, group: &[IoSlice<'_>], offset: u64) -> io::Result<u64> {
        let total: usize = group.iter().map(|slice| slice.len()).sum();
        let mut written = match nix::sys::uio::pwritev(&self.file, group, signed(offset)) {
            Ok(bytes) => bytes,
            Err(nix::Error::EINTR) => 0,
            Err(error) => return Err(error.into()),
        };
        if written < total {
            // Short: a signal, or the disk is nearly full. The rest goes slice by slice, which
            // gives the reason if there is one.
            let mut position = 0;
            for slice in group {
                let end = position + slice.len();
                if end > written {
                    let skip = written - position;
                    self.file.write_all_at(&slice[skip..], offset + written as u64)?;
                    written = end;
                }
                position = end;
            }
        }
        Ok(offset + total as u64)
    }

    /// Zeros where a hole cannot be made; never past the end of the file.
    fn write_zeros(&self, offset: u64, bytes: u64) -> io::Result<()> {
        const STEP: u64 = 64 << 10;
        let zeros = [0; STEP as usize];
        let end = offset.saturating_add(bytes).min(self.len()?);
        let mut position = offset;
        while position < end {
            let step = STEP.min(end - position);
            self.file.write_all_at(&zeros[..step as usize], position)?;
            position += step;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(dir: &Path, name: &str) -> Arc<dyn DiskFile> {
        FileDisk::new().open(&dir.join(name), OpenMode::CreateNew).unwrap()
    }

    #[test]
    fn more_slices_than_one_call_takes_are_written_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let file = file_of(dir.path(), "many");
        let bytes: Vec<u8> = (0..3000u32).flat_map(u32::to_le_bytes).collect();
        let slices: Vec<IoSlice<'_>> = bytes.chunks(4).map(IoSlice::new).collect();
        assert!(slices.len() > SLICES_MAX);
        file.write_at(&slices, 5).unwrap();
        let mut back = vec![0; bytes.len()];
        file.read_at(&mut back, 5).unwrap();
        assert_eq!(back, bytes);
        assert_eq!(file.len().unwrap(), 5 + bytes.len() as u64);
    }

    #[test]
    fn a_punched_range_reads_as_zeros_and_keeps_the_length() {
        let dir = tempfile::tempdir().unwrap();
        let file = file_of(dir.path(), "hole");
        file.write_at(&[IoSlice::new(&[7; 12288])], 0).unwrap();
        file.punch_hole(4096, 4096).unwrap();
        let mut back = vec![1; 12288];
        file.read_at(&mut back, 0).unwrap();
        assert!(back[..4096].iter().all(|byte| *byte == 7));
        assert!(back[4096..8192].iter().all(|byte| *byte == 0));
        assert!(back[8192..].iter().all(|byte| *byte == 7));
    }

    #[test]
    fn only_what_was_never_written_or_was_punched_is_a_hole() {
        let dir = tempfile::tempdir().unwrap();
        let file = file_of(dir.path(), "sparse");
        const MIB: u64 = 1 << 20;
        file.set_len(5 * MIB).unwrap();
        assert!(file.is_hole(0, 5 * MIB));
        for at in [MIB, 3 * MIB] {
            file.write_at(&[IoSlice::new(&vec![0; MIB as usize])], at).unwrap();
        }
        for synced in [false, true] {
            for at in [MIB, 2 * MIB - 4096, 3 * MIB] {
                assert!(!file.is_hole(at, 4096), "zeros at {at}, synced: {synced}");
            }
            assert!(file.is_hole(0, MIB) && file.is_hole(2 * MIB, MIB));
            assert!(file.is_hole(4 * MIB, MIB), "up to the end");
            assert!(!file.is_hole(0, MIB + 1) && !file.is_hole(2 * MIB, 2 * MIB));
            file.sync().unwrap();
        }
        file.punch_hole(3 * MIB, MIB).unwrap();
        assert!(file.is_hole(2 * MIB, 3 * MIB));
    }

    #[test]
    fn reading_once_leaves_the_cache_as_it_was() {
        const HALF: usize = 1 << 20;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cached");
        let file = FileDisk::new().open(&path, OpenMode::CreateNew).unwrap();
        let bytes: Vec<u8> = (0..2 * HALF as u32 / 4).flat_map(u32::to_le_bytes).collect();
        file.write_at(&[IoSlice::new(&bytes)], 0).unwrap();
        file.sync().unwrap();
        file.drop_cache(0, 2 * HALF as u64);
        let plain = File::open(&path).unwrap();
        let cached = |at: usize| cached_pages(&plain, at as u64, 1)[0];
        // A file system in memory is its own cache.
        let keeps_all = cached(HALF);
        let mut back = vec![0; 2 * HALF];
        file.read_at(&mut back[..HALF / 2], 0).unwrap();
        file.read_once(&mut back, 0).unwrap();
        assert!(back == bytes);
        assert!(cached(0) && cached(HALF / 2 - 4096), "what was read before stays");
        for page in (HALF..2 * HALF).step_by(64 << 10) {
            assert_eq!(cached(page), keeps_all, "the page at {page}");
        }
        let past = file.read_once(&mut back, 4096).unwrap_err();
        assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn an_error_names_its_path_and_keeps_its_kind() {
        let error = match FileDisk::new().open(Path::new("/nonexistent/file"), OpenMode::Read) {
            Ok(_) => panic!("it does not exist"),
            Err(error) => error,
        };
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains("/nonexistent/file"), "{error}");
    }

    #[test]
    fn a_batch_fills_every_buffer_with_and_without_the_ring() {
        let dir = tempfile::tempdir().unwrap();
        let file = file_of(dir.path(), "batch");
        let bytes: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
        file.write_at(&[IoSlice::new(&bytes)], 0).unwrap();
        for disk in [FileDisk::new(), FileDisk::without_ring()] {
            let mut buffers = vec![vec![0; 1000]; 300];
            let mut reads: Vec<BatchRead<'_>> = buffers
                .iter_mut()
                .enumerate()
                .map(|(index, buffer)| BatchRead {
                    file: &*file,
                    offset: index as u64 * 2600,
                    buffer,
                    result: Ok(()),
                })
                .collect();
            reads[7].offset = bytes.len() as u64 - 999;
            reads[9].offset = bytes.len() as u64 + 4096;
            disk.read_batch(&mut reads);
            for (index, read) in reads.iter().enumerate() {
                if index == 7 || index == 9 {
                    let error = read.result.as_ref().expect_err("past the end");
                    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
                } else {
                    assert!(read.result.is_ok());
                    let from = index * 2600;
                    assert_eq!(read.buffer[..], bytes[from..from + 1000], "read {index}");
                }
            }
        }
    }
}
