//! What stands between the repository library and the disk during a run: a guard that lets no
//! snapshot pass once the run must end, and a counter of what was dealt with.

use std::sync::Arc;

use rustic_core::{
    FileType, ProgressBars, ProgressType, ReadBackend, RusticError, RusticProgress, RusticResult,
    WriteBackend,
};

use super::source::{Progress, Stop};

/// The backend with a guard at the door: no snapshot passes once the run must end.
#[derive(Clone)]
pub(super) struct Door {
    pub(super) inner: Arc<dyn WriteBackend>,
    pub(super) stop: Stop,
}

impl ReadBackend for Door {
    fn location(&self) -> String {
        self.inner.location()
    }

    fn list_with_size(&self, kind: FileType) -> RusticResult<Vec<(rustic_core::Id, u32)>> {
        self.inner.list_with_size(kind)
    }

    fn list(&self, kind: FileType) -> RusticResult<Vec<rustic_core::Id>> {
        self.inner.list(kind)
    }

    fn read_full(&self, kind: FileType, id: &rustic_core::Id) -> RusticResult<bytes::Bytes> {
        self.inner.read_full(kind, id)
    }

    fn read_partial(
        &self,
        kind: FileType,
        id: &rustic_core::Id,
        cacheable: bool,
        offset: u32,
        length: u32,
    ) -> RusticResult<bytes::Bytes> {
        self.inner.read_partial(kind, id, cacheable, offset, length)
    }

    fn warmup_path(&self, kind: FileType, id: &rustic_core::Id) -> String {
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
        id: &rustic_core::Id,
        cacheable: bool,
        content: rustic_core::BytesList,
    ) -> RusticResult<()> {
        if kind == FileType::Snapshot
            && let Some(reason) = self.stop.reason()
        {
            return Err(RusticError::new(rustic_core::ErrorKind::InputOutput, reason));
        }
        self.inner.write_bytes(kind, id, cacheable, content)
    }

    fn remove(&self, kind: FileType, id: &rustic_core::Id, cacheable: bool) -> RusticResult<()> {
        self.inner.remove(kind, id, cacheable)
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
