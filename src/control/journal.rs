//! The file that keeps events beyond the life of the process: one JSON object a line, bounded.
//!
//! A line is written when its event happens and not synced: events survive the process, and the
//! last of them may be lost with the machine's power. A torn last line is dropped on opening.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::events::{Event, Journal, RING_EVENTS};
use crate::io::{Disk, DiskFile, OpenMode};

/// Lines of the file at most; it is then rewritten with the newest [`RING_EVENTS`].
const LINES_MAX: usize = 2 * RING_EVENTS;

struct Inner {
    file: Arc<dyn DiskFile>,
    end_bytes: u64,
    lines: usize,
    /// Lines that the disk had no room for: they go before the next.
    unwritten: VecDeque<Vec<u8>>,
}

/// A journal in a file.
pub struct FileJournal {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    inner: Mutex<Inner>,
}

impl FileJournal {
    /// Opens a journal, making it where it is missing; with it the events it holds, oldest first.
    /// What is there already needs no room, so that a node starts on a full disk.
    ///
    /// # Errors
    ///
    /// Where the file cannot be read or made.
    pub fn open(disk: Arc<dyn Disk>, path: &Path) -> std::io::Result<(FileJournal, Vec<Event>)> {
        if !disk.exists(path)? {
            let inner = rewrite(disk.as_ref(), path, &[])?;
            let journal = FileJournal { disk, path: path.to_owned(), inner: Mutex::new(inner) };
            return Ok((journal, Vec::new()));
        }
        let file = disk.open(path, OpenMode::ReadWrite)?;
        let mut bytes = vec![0; usize::try_from(file.len()?).unwrap_or(0)];
        file.read_at(&mut bytes, 0)?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        file.set_len(whole as u64)?;
        let lines = bytes[..whole].split(|byte| *byte == b'\n');
        let mut events: Vec<Event> =
            lines.filter_map(|line| serde_json::from_slice(line).ok()).collect();
        let lines = events.len();
        let inner = Inner { file, end_bytes: whole as u64, lines, unwritten: VecDeque::new() };
        let skip = events.len().saturating_sub(RING_EVENTS);
        let journal = FileJournal { disk, path: path.to_owned(), inner: Mutex::new(inner) };
        Ok((journal, events.split_off(skip)))
    }
}

fn line_of(event: &Event) -> Vec<u8> {
    let mut line = serde_json::to_vec(event).expect("an event becomes JSON");
    line.push(b'\n');
    line
}

/// A new file with `events`, under the journal's name.
fn rewrite(disk: &dyn Disk, path: &Path, events: &[Event]) -> std::io::Result<Inner> {
    let new_path = path.with_extension("new");
    if disk.exists(&new_path)? {
        disk.remove(&new_path)?;
    }
    let file = disk.open(&new_path, OpenMode::CreateNew)?;
    let bytes: Vec<u8> = events.iter().flat_map(line_of).collect();
    file.write_at(&[IoSlice::new(&bytes)], 0)?;
    file.sync()?;
    disk.rename(&new_path, path)?;
    if let Some(directory) = path.parent() {
        disk.sync_dir(directory)?;
    }
    let (end_bytes, lines) = (bytes.len() as u64, events.len());
    Ok(Inner { file, end_bytes, lines, unwritten: VecDeque::new() })
}

impl Journal for FileJournal {
    fn append(&self, event: &Event) {
        let mut inner = self.inner.lock().expect("no holder panics");
        if inner.lines >= LINES_MAX
            && let Err(error) = self.shorten(&mut inner)
        {
            tracing::warn!("{}: could not be shortened: {error}", self.path.display());
        }
        inner.unwritten.push_back(line_of(event));
        while let Some(line) = inner.unwritten.front() {
            if let Err(error) = inner.file.write_at(&[IoSlice::new(line)], inner.end_bytes) {
                tracing::warn!("{}: could not keep an event yet: {error}", self.path.display());
                break;
            }
            inner.end_bytes += line.len() as u64;
            inner.lines += 1;
            inner.unwritten.pop_front();
        }
        if inner.unwritten.len() > RING_EVENTS {
            inner.unwritten.pop_front();
        }
    }
}

impl FileJournal {
    fn shorten(&self, inner: &mut Inner) -> std::io::Result<()> {
        let mut bytes = vec![0; usize::try_from(inner.end_bytes).unwrap_or(0)];
        inner.file.read_at(&mut bytes, 0)?;
        let lines = bytes.split(|byte| *byte == b'\n');
        let events: Vec<Event> =
            lines.filter_map(|line| serde_json::from_slice(line).ok()).collect();
        let newest = &events[events.len().saturating_sub(RING_EVENTS)..];
        let unwritten = std::mem::take(&mut inner.unwritten);
        match rewrite(self.disk.as_ref(), &self.path, newest) {
            Ok(new) => *inner = Inner { unwritten, ..new },
            Err(cause) => {
                inner.unwritten = unwritten;
                return Err(cause);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Severity;
    use crate::io::FileDisk;
    use crate::units::LogTime;

    fn event(sequence: u64) -> Event {
        Event {
            sequence,
            time: LogTime(sequence),
            severity: Severity::Info,
            code: "x".to_owned(),
            group: None,
            text: "y".to_owned(),
            details: serde_json::Value::Null,
        }
    }

    #[test]
    fn events_are_there_after_opening_again_and_the_file_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        let disk: Arc<dyn Disk> = Arc::new(FileDisk::new());
        let (journal, kept) = FileJournal::open(disk.clone(), &path).unwrap();
        assert!(kept.is_empty());
        for sequence in 1..=LINES_MAX as u64 + 10 {
            journal.append(&event(sequence));
        }
        let lines = std::fs::read_to_string(&path).unwrap().lines().count();
        assert_eq!(lines, RING_EVENTS + 10);
        let (_, kept) = FileJournal::open(disk, &path).unwrap();
        assert_eq!(kept.len(), RING_EVENTS);
        assert_eq!(kept.last().unwrap().sequence, LINES_MAX as u64 + 10);
    }

    #[test]
    fn events_of_a_full_disk_are_kept_once_it_has_room() {
        let memory = Arc::new(crate::io::MemoryDisk::new());
        let disk: Arc<dyn Disk> = memory.clone();
        disk.create_dir(Path::new("/d")).unwrap();
        let path = Path::new("/d/events");
        let (journal, _) = FileJournal::open(disk.clone(), path).unwrap();
        journal.append(&event(1));
        memory.set_total_bytes(0);
        journal.append(&event(2));
        journal.append(&event(3));
        memory.set_total_bytes(u64::MAX);
        journal.append(&event(4));
        let (_, kept) = FileJournal::open(disk, path).unwrap();
        assert_eq!(kept, [1, 2, 3, 4].map(event));
    }

    #[test]
    fn a_torn_last_line_is_dropped_and_the_next_event_is_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        let disk: Arc<dyn Disk> = Arc::new(FileDisk::new());
        let (journal, _) = FileJournal::open(disk.clone(), &path).unwrap();
        journal.append(&event(1));
        journal.append(&event(2));
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
        let (journal, kept) = FileJournal::open(disk.clone(), &path).unwrap();
        assert_eq!(kept, [event(1)]);
        journal.append(&event(2));
        let (_, kept) = FileJournal::open(disk, &path).unwrap();
        assert_eq!(kept, [event(1), event(2)]);
    }
}
