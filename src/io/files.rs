//! Plain files.
#![allow(missing_docs, unused_variables, clippy::unimplemented)]
use super::disk::*;
use std::{io, path::Path, sync::Arc};
pub struct FileDisk {}
impl FileDisk {
    pub fn new() -> FileDisk {
        FileDisk {}
    }
}
pub fn read_uring_state() -> bool {
    unimplemented!()
}
impl Disk for FileDisk {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        unimplemented!()
    }
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        unimplemented!()
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        unimplemented!()
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        unimplemented!()
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        unimplemented!()
    }
    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        unimplemented!()
    }
    fn exists(&self, path: &Path) -> bool {
        unimplemented!()
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        unimplemented!()
    }
    fn space(&self, path: &Path) -> io::Result<Space> {
        unimplemented!()
    }
}
