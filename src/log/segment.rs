//! The files of a log: which segments there are, how the next one gets its name, and how a folded
//! one is used again.
//!
//! A segment is named and its directory synced before its first append. A folded segment becomes a
//! spare once no reader holds it, and takes the name of a later segment as it is: its old records
//! carry other positions, so a scan ends where the new ones do. Bytes whose positions will be used
//! again never come back as a spare: what was cut off is taken out, and a log that begins anew
//! drops what is idle.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};

use crate::io::{Disk, DiskFile, OpenMode};
use crate::log::record::{HEADER_BYTES, PAYLOAD_BYTES_MAX};
use crate::units::{BLOCK_BYTES, Lsn};

/// Bytes of a segment at least: a record, the pad behind it, and room for more.
pub const SEGMENT_BYTES_MIN: u64 = 64 << 10;
/// Bytes of a segment at most.
pub const SEGMENT_BYTES_MAX: u64 = 1 << 30;
/// Bytes of a segment where nobody asked for another size.
pub const SEGMENT_BYTES_DEFAULT: u64 = 64 << 20;
/// Folded segments that wait for reuse at most; more are given back to the file system.
const SPARES_MAX: usize = 4;

/// Whether a group may have segments of this size: a power of two within the limits.
#[must_use]
pub fn is_segment_size(bytes: u64) -> bool {
    bytes.is_power_of_two() && (SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&bytes)
}

/// Bytes of payload that one record may carry in segments of this size, a multiple of 4096.
#[must_use]
pub fn payload_bytes_max(segment_bytes: u64) -> usize {
    let quarter = (segment_bytes / 4 / BLOCK_BYTES * BLOCK_BYTES) as usize;
    quarter.min(PAYLOAD_BYTES_MAX)
}

/// Whether a record of `record_bytes` may stand where `room_bytes` are left in the segment: what
/// remains behind it is nothing, or enough for a pad.
#[must_use]
pub fn fits(record_bytes: u64, room_bytes: u64) -> bool {
    record_bytes == room_bytes || record_bytes + HEADER_BYTES as u64 <= room_bytes
}

/// An open segment file. Who reads holds an `Arc`, which recycling waits for.
pub struct Segment {
    /// Its number: the LSN of its first byte divided by the segment size.
    pub number: u64,
    /// The file.
    pub file: Arc<dyn DiskFile>,
}

/// The segments of one log.
pub struct Segments {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    segment_bytes: u64,
    live: RwLock<BTreeMap<u64, Arc<Segment>>>,
    idle: Mutex<Idle>,
}

/// Files that hold no part of the log any more.
#[derive(Default)]
struct Idle {
    /// Folded, perhaps still held by readers, still under their old names.
    folded: Vec<Arc<Segment>>,
    /// Free for reuse: file names.
    spares: Vec<String>,
    next_spare: u64,
}

/// The name of a segment's file.
#[must_use]
pub fn segment_name(number: u64) -> String {
    format!("{number:012}.seg")
}

/// The name of the index beside it.
#[must_use]
pub fn index_name(number: u64) -> String {
    format!("{number:012}.idx")
}

/// The number in a segment's file name.
fn number_of(name: &str) -> Option<u64> {
    name.strip_suffix(".seg")?.parse().ok()
}

impl Segments {
    /// Opens the directory of a log, making it where it is missing. Temporary files of a cut that
    /// did not finish are removed, and indices without their segment.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path, segment_bytes: u64) -> io::Result<Segments> {
        disk.create_dir(dir)?;
        let mut live = BTreeMap::new();
        let mut idle = Idle::default();
        let mut indices = Vec::new();
        for name in disk.list(dir)? {
            if let Some(number) = number_of(&name) {
                let file = disk.open(&dir.join(&name), OpenMode::ReadWrite)?;
                if file.len()? < segment_bytes {
                    // Its name got to the disk, its length did not: nothing was appended to it yet.
                    file.set_len(segment_bytes)?;
                }
                live.insert(number, Arc::new(Segment { number, file }));
            } else if let Some(number) =
                name.strip_suffix(".spare").and_then(|number| number.parse::<u64>().ok())
            {
                idle.next_spare = idle.next_spare.max(number + 1);
                idle.spares.push(name);
            } else if let Some(number) =
                name.strip_suffix(".idx").and_then(|number| number.parse::<u64>().ok())
            {
                indices.push(number);
            } else if name.ends_with(".new") {
                disk.remove(&dir.join(&name))?;
            }
        }
        for number in indices.iter().filter(|number| !live.contains_key(number)) {
            disk.remove(&dir.join(index_name(*number)))?;
        }
        Ok(Segments {
            disk,
            dir: dir.to_owned(),
            segment_bytes,
            live: RwLock::new(live),
            idle: Mutex::new(idle),
        })
    }

    /// The disk that the segments are on.
    #[must_use]
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// Where the segments are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Bytes of a segment.
    #[must_use]
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// A segment, where the log still has it.
    #[must_use]
    pub fn get(&self, number: u64) -> Option<Arc<Segment>> {
        self.live.read().expect("no holder panics").get(&number).cloned()
    }

    /// Numbers of all segments, ascending.
    #[must_use]
    pub fn numbers(&self) -> Vec<u64> {
        self.live.read().expect("no holder panics").keys().copied().collect()
    }

    /// Bytes of disk that the files of the log take, spares, indices and folded segments that a
    /// reader holds included. What a segment has not been written to yet is a hole.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        let names = self.disk.list(&self.dir).unwrap_or_default();
        names.iter().map(|name| self.disk.allocated(&self.dir.join(name))).sum()
    }

    /// Gets segment `number` ready for appends: a spare or a new file takes the name, and the
    /// directory is synced. No error where it is there already.
    ///
    /// # Errors
    ///
    /// What the disk says; the name may then be taken or not.
    pub fn ensure(&self, number: u64) -> io::Result<Arc<Segment>> {
        if let Some(segment) = self.get(number) {
            return Ok(segment);
        }
        self.collect()?;
        let path = self.dir.join(segment_name(number));
        // The lock is held to the end, so that two callers do not name the same segment.
        let mut idle = self.idle.lock().expect("no holder panics");
        if let Some(segment) = self.get(number) {
            return Ok(segment);
        }
        // One of an earlier segment of this number, which left while its index was being written.
        self.drop_index(number)?;
        match idle.spares.pop() {
            Some(spare) => self.disk.rename(&self.dir.join(&spare), &path)?,
            None => {
                let file = self.disk.open(&path, OpenMode::Create)?;
                file.set_len(self.segment_bytes)?;
                file.sync()?;
            }
        }
        self.disk.sync_dir(&self.dir)?;
        let file = self.disk.open(&path, OpenMode::ReadWrite)?;
        let segment = Arc::new(Segment { number, file });
        self.live.write().expect("no holder panics").insert(number, segment.clone());
        Ok(segment)
    }

    /// Takes the segments below `number` out of the log; they are used again when their last
    /// reader is gone.
    pub fn retire_below(&self, number: u64) {
        let mut idle = self.idle.lock().expect("no holder panics");
        let mut live = self.live.write().expect("no holder panics");
        let kept = live.split_off(&number);
        idle.folded.extend(std::mem::replace(&mut *live, kept).into_values());
    }

    /// Turns folded segments that nobody reads any more into spares, or gives them back.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn collect(&self) -> io::Result<()> {
        let mut idle = self.idle.lock().expect("no holder panics");
        let mut at = 0;
        // What an error leaves is listed still.
        while let Some(segment) = idle.folded.get(at) {
            if Arc::strong_count(segment) > 1 {
                at += 1;
                continue;
            }
            let number = segment.number;
            let path = self.dir.join(segment_name(number));
            self.drop_index(number)?;
            if idle.spares.len() < SPARES_MAX {
                let spare = format!("{:012}.spare", idle.next_spare);
                idle.next_spare += 1;
                self.disk.rename(&path, &self.dir.join(&spare))?;
                idle.spares.push(spare);
            } else {
                self.disk.remove(&path)?;
            }
            idle.folded.remove(at);
        }
        Ok(())
    }

    /// Gives the space of spares back to the file system; whether there were any.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn drop_spares(&self) -> io::Result<bool> {
        self.collect()?;
        let mut idle = self.idle.lock().expect("no holder panics");
        let were_any = !idle.spares.is_empty();
        while let Some(spare) = idle.spares.last() {
            self.disk.remove(&self.dir.join(spare))?;
            idle.spares.pop();
        }
        drop(idle);
        // Some file systems free the space only when the name is gone from the disk.
        self.disk.sync_dir(&self.dir)?;
        Ok(were_any)
    }

    /// Removes every file that holds no part of the log, also those that a reader still holds: the
    /// log begins anew, and their positions will be used again. The directory is synced by the
    /// caller.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn drop_idle(&self) -> io::Result<()> {
        let mut idle = self.idle.lock().expect("no holder panics");
        let Idle { folded, spares, .. } = &mut *idle;
        while let Some(segment) = folded.last() {
            self.disk.remove(&self.dir.join(segment_name(segment.number)))?;
            self.drop_index(segment.number)?;
            folded.pop();
        }
        while let Some(spare) = spares.last() {
            self.disk.remove(&self.dir.join(spare))?;
            spares.pop();
        }
        Ok(())
    }

    /// Puts `file`, which has been synced under the name `temporary`, in the place of a segment.
    /// The directory is synced by the caller.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn replace(&self, number: u64, temporary: &Path) -> io::Result<()> {
        let path = self.dir.join(segment_name(number));
        self.disk.rename(temporary, &path)?;
        let file = self.disk.open(&path, OpenMode::ReadWrite)?;
        let mut live = self.live.write().expect("no holder panics");
        live.insert(number, Arc::new(Segment { number, file }));
        Ok(())
    }

    /// Moves a segment out of the log to `to`, or removes it where that is `None`; its index goes.
    /// Directories are synced by the caller.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn take_out(&self, number: u64, to: Option<&Path>) -> io::Result<()> {
        self.live.write().expect("no holder panics").remove(&number);
        let path = self.dir.join(segment_name(number));
        match to {
            Some(to) => self.disk.rename(&path, to)?,
            None => self.disk.remove(&path)?,
        }
        self.drop_index(number)
    }

    /// Removes the index of a segment, where there is one.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn drop_index(&self, number: u64) -> io::Result<()> {
        let index = self.dir.join(index_name(number));
        if self.disk.exists(&index)? { self.disk.remove(&index) } else { Ok(()) }
    }

    /// Reads `[from, from + buffer.len())`, across segments.
    ///
    /// # Errors
    ///
    /// `NotFound` where a segment is not in the log, else what the disk says.
    pub fn read(&self, from: Lsn, buffer: &mut [u8]) -> io::Result<()> {
        let mut at = from;
        let mut rest = buffer;
        while !rest.is_empty() {
            let number = at.segment_number(self.segment_bytes);
            let offset = at.segment_offset(self.segment_bytes);
            let count = (self.segment_bytes - offset).min(rest.len() as u64) as usize;
            let (part, behind) = rest.split_at_mut(count);
            let segment = self.get(number).ok_or(io::ErrorKind::NotFound)?;
            segment.file.read_at(part, offset)?;
            at = at.advance(count as u64);
            rest = behind;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{Fault, MemoryDisk};

    #[test]
    fn what_an_error_leaves_of_folded_segments_is_listed_still() {
        let dir = Path::new("/log");
        for operation in 0.. {
            let disk = MemoryDisk::new();
            disk.create_dir(dir).unwrap();
            let segments = Segments::open(Arc::new(disk.clone()), dir, 1 << 16).unwrap();
            for number in 0..6 {
                segments.ensure(number).unwrap();
            }
            segments.retire_below(6);
            disk.inject(Fault::Error { operation: disk.operations() + operation });
            let ended = segments.drop_spares().is_ok();
            disk.clear_faults();
            segments.drop_idle().unwrap();
            assert_eq!(disk.list(dir).unwrap(), Vec::<String>::new(), "operation {operation}");
            if ended {
                assert!(operation > 6);
                return;
            }
        }
    }
}
