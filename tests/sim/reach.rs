//! The repository of small objects as one node sees it, which may lose sight of it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tidelog::backup::{MemoryObjects, Objects};

/// One node's way to the repository.
pub struct Reach {
    objects: Arc<MemoryObjects>,
    within: AtomicBool,
}

impl Reach {
    /// The repository, in sight.
    pub fn new(objects: Arc<MemoryObjects>) -> Reach {
        Reach { objects, within: AtomicBool::new(true) }
    }

    /// Whether the node sees it.
    pub fn is_in_sight(&self) -> bool {
        self.within.load(Ordering::Relaxed)
    }

    /// It comes into sight, or leaves it.
    pub fn set_in_sight(&self, within: bool) {
        self.within.store(within, Ordering::Relaxed);
    }

    fn check(&self) -> io::Result<()> {
        match self.is_in_sight() {
            true => Ok(()),
            false => Err(io::Error::new(io::ErrorKind::NotConnected, "out of reach")),
        }
    }
}

impl Objects for Reach {
    fn create(&self, name: &str, body: &[u8]) -> io::Result<bool> {
        self.check().and_then(|()| self.objects.create(name, body))
    }
    fn replace(&self, name: &str, body: &[u8]) -> io::Result<()> {
        self.check().and_then(|()| self.objects.replace(name, body))
    }
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        self.check().and_then(|()| self.objects.read(name))
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.check().and_then(|()| self.objects.list(dir))
    }
}
