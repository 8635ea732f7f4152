//! Disks that are full or fail, under the real binary: a file system of a few hundred megabytes
//! that a test fills, and a library that makes calls on chosen files fail.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::FallocateFlags;

/// The library's source.
const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/faults.c");

/// What fails.
#[derive(Clone, Copy)]
pub enum Call {
    /// Writes, and changes of a file's length.
    Write,
    /// Syncs of data.
    Sync,
    /// Files that do not exist yet.
    Create,
}

impl Call {
    fn word(self) -> &'static str {
        match self {
            Call::Write => "write",
            Call::Sync => "sync",
            Call::Create => "create",
        }
    }
}

/// Calls of one process on chosen files fail while they are told to.
pub struct Faults {
    library: PathBuf,
    rules: PathBuf,
}

impl Faults {
    /// Builds the library in `dir`. Needs a C compiler.
    pub fn new(dir: &Path) -> Faults {
        let (library, rules) = (dir.join("faults.so"), dir.join("faults"));
        run("cc", &["-shared", "-fPIC", "-O1", "-o", text(&library), SOURCE, "-ldl"]);
        let faults = Faults { library, rules };
        faults.none();
        faults
    }

    /// What the process has to be started with.
    pub fn environment(&self) -> Vec<(&'static str, PathBuf)> {
        vec![("LD_PRELOAD", self.library.clone()), ("TIDELOG_FAULTS", self.rules.clone())]
    }

    /// From now on these calls fail, on all files whose path contains the text.
    pub fn set(&self, faults: &[(Call, Errno, &str)]) {
        let line = |(call, errno, part): &(Call, Errno, &str)| {
            format!("{} {} {part}\n", call.word(), *errno as i32)
        };
        self.rule(&faults.iter().map(line).collect::<String>());
    }

    /// From now on these calls take so much longer, on all files whose path contains the text.
    pub fn slow(&self, call: Call, by: Duration, part: &str) {
        self.rule(&format!("{} -{} {part}\n", call.word(), by.as_millis()));
    }

    fn rule(&self, lines: &str) {
        let new = self.rules.with_extension("new");
        fs::write(&new, lines).unwrap();
        fs::rename(&new, &self.rules).unwrap();
    }

    /// The disk is well again.
    pub fn none(&self) {
        self.set(&[]);
    }
}

/// A file system of its own, in a file; unmounted when dropped. Needs root.
pub struct SmallDisk {
    /// Where it is mounted.
    pub root: PathBuf,
}

impl SmallDisk {
    /// An ext4 of so many mebibytes under `dir`.
    pub fn new(dir: &Path, mebibytes: u64) -> SmallDisk {
        assert!(nix::unistd::geteuid().is_root(), "this test mounts a file system: it needs root");
        let (image, root) = (dir.join("small.ext4"), dir.join("small"));
        File::create(&image).unwrap().set_len(mebibytes << 20).unwrap();
        // Nothing is kept for root, which the appliance is here.
        run("mkfs.ext4", &["-q", "-F", "-m", "0", text(&image)]);
        fs::create_dir(&root).unwrap();
        run("mount", &["-o", "loop", text(&image), text(&root)]);
        SmallDisk { root }
    }

    /// Takes the space that is left, but for so many mebibytes.
    pub fn leave(&self, mebibytes: u64) {
        let space = nix::sys::statvfs::statvfs(&self.root).unwrap();
        let free = space.blocks_available() * space.fragment_size();
        let taken = i64::try_from(free - (mebibytes << 20)).unwrap();
        let file = File::create(self.filler()).unwrap();
        nix::fcntl::fallocate(&file, FallocateFlags::empty(), 0, taken).unwrap();
    }

    /// Takes all the space that is left.
    pub fn fill(&self) {
        let mut file = File::options().create(true).append(true).open(self.filler()).unwrap();
        let bytes = vec![1; 1 << 20];
        for size in [1 << 20, 4096] {
            while file.write_all(&bytes[..size]).is_ok() {}
        }
        let _ = file.sync_all();
    }

    /// Gives it back.
    pub fn free(&self) {
        fs::remove_file(self.filler()).unwrap();
    }

    fn filler(&self) -> PathBuf {
        self.root.join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: whoever failed may still have files open.
        let _ = Command::new("umount").arg("-l").arg(&self.root).status();
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|cause| panic!("{program}: {cause}; install it"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
}
