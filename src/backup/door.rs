//! The backend under the library: what it writes is durable by name, and no snapshot is saved
//! unless the gate is open.
//!
//! The library logs a file that cannot be read or written and saves its snapshot without it. So a
//! run closes the gate first: the library's own snapshot vanishes at this door, and the run saves
//! another once it knows that every file is there.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustic_core::{
    BytesList, ErrorKind, FileType, Id, ProgressBars, ProgressType, ReadBackend, RusticError,
    RusticProgress, RusticResult, WriteBackend,
};

use super::source::{Progress, Stop};

/// Whether snapshots may be saved, and which was last.
#[derive(Default)]
pub(super) struct Gate {
    closed: AtomicBool,
    stop: Stop,
    saved: Mutex<Option<Id>>,
}

impl Gate {
    /// An open gate, through which no snapshot goes once `stop` has a reason.
    pub(super) fn new(stop: Stop) -> Arc<Gate> {
        Arc::new(Gate { stop, ..Gate::default() })
    }

    /// Lets snapshots vanish from now on.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Lets snapshots be saved from now on.
    pub(super) fn open(&self) {
        self.closed.store(false, Ordering::SeqCst);
    }

    /// The snapshot that was saved last.
    pub(super) fn saved(&self) -> Option<Id> {
        *self.saved.lock().expect("no holder panics")
    }
}

/// A directory backend behind its gate.
pub(super) struct Door {
    inner: Arc<dyn WriteBackend>,
    path: PathBuf,
    gate: Arc<Gate>,
}

impl Door {
    /// `inner`, which keeps its files under `path`.
    pub(super) fn new(inner: Arc<dyn WriteBackend>, path: &Path, gate: &Arc<Gate>) -> Door {
        Door { inner, path: path.to_path_buf(), gate: Arc::clone(gate) }
    }

    /// Makes the name of a file just renamed durable: the backend syncs the file alone.
    fn sync_name(&self, kind: FileType, id: &Id) -> RusticResult<()> {
        let dir = match kind {
            FileType::Config => self.path.clone(),
            FileType::Pack => self.path.join(kind.dirname()).join(&id.to_hex().as_str()[..2]),
            _ => self.path.join(kind.dirname()),
        };
        sync_dir(&dir).map_err(|error| {
            let guidance = "could not sync the directory of a file just written";
            RusticError::with_source(ErrorKind::InputOutput, guidance, error)
        })
    }
}

/// Makes the names in a directory durable.
pub(super) fn sync_dir(dir: &Path) -> std::io::Result<()> {
    std::fs::File::open(dir)?.sync_all()
}

impl ReadBackend for Door {
    fn location(&self) -> String {
        self.inner.location()
    }

    fn list_with_size(&self, kind: FileType) -> RusticResult<Vec<(Id, u32)>> {
        self.inner.list_with_size(kind)
    }

    fn list(&self, kind: FileType) -> RusticResult<Vec<Id>> {
        self.inner.list(kind)
    }

    fn read_full(&self, kind: FileType, id: &Id) -> RusticResult<bytes::Bytes> {
        self.inner.read_full(kind, id)
    }

    fn read_partial(
        &self,
        kind: FileType,
        id: &Id,
        cacheable: bool,
        offset: u32,
        length: u32,
    ) -> RusticResult<bytes::Bytes> {
        self.inner.read_partial(kind, id, cacheable, offset, length)
    }

    fn warmup_path(&self, kind: FileType, id: &Id) -> String {
        self.inner.warmup_path(kind, id)
    }
}

impl WriteBackend for Door {
    fn create(&self) -> RusticResult<()> {
        self.inner.create()
    }

    fn write_bytes(
        &self,
        kind: FileType,
        id: &Id,
        cacheable: bool,
        content: BytesList,
    ) -> RusticResult<()> {
        if kind == FileType::Snapshot {
            if self.gate.closed.load(Ordering::SeqCst) {
                return Ok(());
            }
            if let Some(reason) = self.gate.stop.reason() {
                return Err(RusticError::new(ErrorKind::InputOutput, reason));
            }
        }
        self.inner.write_bytes(kind, id, cacheable, content)?;
        self.sync_name(kind, id)?;
        if kind == FileType::Snapshot {
            *self.gate.saved.lock().expect("no holder panics") = Some(*id);
        }
        Ok(())
    }

    fn remove(&self, kind: FileType, id: &Id, cacheable: bool) -> RusticResult<()> {
        self.inner.remove(kind, id, cacheable)?;
        self.sync_name(kind, id)
    }
}

/// Adds the bytes that the library has dealt with, read or known to be unchanged, to our progress.
#[derive(Clone)]
pub(super) struct Bars(pub(super) Progress);

impl std::fmt::Debug for Bars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bars({:?})", self.0.bytes())
    }
}

impl ProgressBars for Bars {
    fn progress(&self, kind: ProgressType, _prefix: &str) -> rustic_core::Progress {
        match kind {
            ProgressType::Bytes => rustic_core::Progress::new(self.clone()),
            _ => rustic_core::Progress::hidden(),
        }
    }
}

impl RusticProgress for Bars {
    fn is_hidden(&self) -> bool {
        false
    }

    fn set_length(&self, _bytes: u64) {}

    fn set_title(&self, _title: &str) {}

    fn inc(&self, bytes: u64) {
        self.0.add_done(bytes);
    }

    fn finish(&self) {}
}
