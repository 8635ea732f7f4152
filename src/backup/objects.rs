//! Small objects beside the repository's own files, in a `tidelog/` directory that restic ignores:
//! what nodes that cannot hear each other agree by.
//!
//! An object appears whole or not at all, under its name or not at all, and of two that create the
//! same name one is told that it came second.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::door::sync_dir;

/// How old what a writer left half-made is when it is taken away: the writer is gone by then.
const LEFT_BEHIND: Duration = Duration::from_secs(24 * 3600);

/// The door to the small objects of a repository. Names are relative, with `/` between their parts.
pub trait Objects: Send + Sync {
    /// Creates an object; `false` where the name is taken. Durable on return.
    fn create(&self, name: &str, body: &[u8]) -> io::Result<bool>;
    /// Creates or replaces an object.
    fn replace(&self, name: &str, body: &[u8]) -> io::Result<()>;
    /// The body of an object, if there is one.
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>>;
    /// The names of the objects and directories in a directory, sorted; none where there is no such
    /// directory.
    fn list(&self, dir: &str) -> io::Result<Vec<String>>;
}

/// Objects as files below a directory of a repository. Exclusive by `link(2)`, which is atomic on
/// local file systems and on NFS; where there are no links, by an exclusive open, whose file may be
/// short after a crash. Where the repository is not there (a disk that is not mounted) everything
/// is an error: "there is no claim" would be a lie, and a claim made there a second one.
pub struct FileObjects {
    root: PathBuf,
    writer: u64,
    count: AtomicU64,
}

impl FileObjects {
    /// Objects below `root`; `writer` is a random number that sets this process's temporary names
    /// apart from other nodes'.
    #[must_use]
    pub fn new(root: PathBuf, writer: u64) -> FileObjects {
        FileObjects { root, writer, count: AtomicU64::new(0) }
    }

    /// Writes the body under a temporary name, synced, and makes the directory that it is for. All
    /// temporary names are in the root, where those that a crash left behind are found.
    fn write_temporary(&self, path: &Path, body: &[u8]) -> io::Result<(PathBuf, PathBuf)> {
        let dir = path.parent().unwrap_or(&self.root).to_path_buf();
        self.make_dir(&dir)?;
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let temporary = self.root.join(format!(".new-{:016x}-{number}", self.writer));
        let mut file = fs::File::create(&temporary)?;
        file.write_all(body)?;
        file.sync_all()?;
        Ok((dir, temporary))
    }

    /// Removes the temporary files that are much older than `temporary`, by the file system's own
    /// clock. A writer that stood still for so long fails when it goes on, and has made nothing.
    fn remove_left_behind(&self, temporary: &Path) -> io::Result<()> {
        let written = |path: &Path| fs::metadata(path).and_then(|found| found.modified());
        let now: SystemTime = written(temporary)?;
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            if !entry.file_name().to_string_lossy().starts_with(".new-") {
                continue;
            }
            // Another node may remove it at the same time.
            let Ok(then) = written(&entry.path()) else { continue };
            if now.duration_since(then).is_ok_and(|age| age > LEFT_BEHIND) {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    /// Makes a directory below the root, durably.
    fn make_dir(&self, dir: &Path) -> io::Result<()> {
        if dir.is_dir() {
            return Ok(());
        }
        self.check_repository()?;
        fs::create_dir_all(dir)?;
        let upwards = dir.ancestors().take_while(|above| above.starts_with(&self.root));
        upwards.chain(self.root.parent()).try_for_each(sync_dir)
    }

    /// Fails where the repository beside the objects is not there.
    fn check_repository(&self) -> io::Result<()> {
        let repository = self.root.parent().unwrap_or(&self.root);
        match fs::metadata(repository.join("config")) {
            Ok(_) => Ok(()),
            Err(error) => {
                let what = format!("no repository at {}: {error}", repository.display());
                Err(io::Error::new(error.kind(), what))
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        let part_is_good = |part: &str| !part.is_empty() && !part.starts_with('.');
        assert!(name.split('/').all(part_is_good), "`{name}` is no name of an object");
        self.root.join(name)
    }

    /// Creates an object where the file system has no links.
    fn create_in_place(path: &Path, body: &[u8]) -> io::Result<bool> {
        match fs::OpenOptions::new().write(true).create_new(true).open(path) {
            Ok(mut file) => {
                if let Err(error) = file.write_all(body).and_then(|()| file.sync_all()) {
                    // This one's, and torn: it would be in the way of every later one.
                    let _ = fs::remove_file(path);
                    return Err(error);
                }
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn lacks_links(error: &io::Error) -> bool {
    use nix::errno::Errno;
    let code = error.raw_os_error().map(Errno::from_raw);
    matches!(code, Some(Errno::EPERM | Errno::EOPNOTSUPP | Errno::ENOSYS))
}

impl Objects for FileObjects {
    fn create(&self, name: &str, body: &[u8]) -> io::Result<bool> {
        let path = self.path(name);
        let (dir, temporary) = self.write_temporary(&path, body)?;
        if let Err(error) = self.remove_left_behind(&temporary) {
            tracing::debug!(%error, "backup: what a crash left behind could not be looked for");
        }
        let linked = match fs::hard_link(&temporary, &path) {
            Ok(()) => Ok(true),
            // A lost answer of a network file system can be our own success.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                fs::read(&path).map(|found| found == body)
            }
            Err(error) if lacks_links(&error) => FileObjects::create_in_place(&path, body),
            Err(error) => Err(error),
        };
        let removed = fs::remove_file(&temporary);
        let created = linked?;
        removed?;
        sync_dir(&dir)?;
        Ok(created)
    }

    fn replace(&self, name: &str, body: &[u8]) -> io::Result<()> {
        let path = self.path(name);
        let (dir, temporary) = self.write_temporary(&path, body)?;
        fs::rename(&temporary, &path)?;
        sync_dir(&dir)
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match fs::read(self.path(name)) {
            Ok(body) => Ok(Some(body)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.check_repository().map(|()| None)
            }
            Err(error) => Err(error),
        }
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.path(dir)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return self.check_repository().map(|()| Vec::new());
            }
            Err(error) => return Err(error),
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if !name.starts_with(".new-") {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }
}

/// Objects in memory, for tests and the simulation; can be put out of reach.
#[derive(Default)]
pub struct MemoryObjects {
    state: Mutex<(BTreeMap<String, Vec<u8>>, bool)>,
}

impl MemoryObjects {
    /// No objects.
    #[must_use]
    pub fn new() -> MemoryObjects {
        MemoryObjects::default()
    }

    /// Puts the objects out of reach, or back.
    pub fn set_reachable(&self, reachable: bool) {
        self.state.lock().expect("no holder panics").1 = !reachable;
    }

    fn with<T>(&self, work: impl FnOnce(&mut BTreeMap<String, Vec<u8>>) -> T) -> io::Result<T> {
        let mut state = self.state.lock().expect("no holder panics");
        if state.1 {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "out of reach"));
        }
        Ok(work(&mut state.0))
    }
}

impl Objects for MemoryObjects {
    fn create(&self, name: &str, body: &[u8]) -> io::Result<bool> {
        self.with(|objects| {
            if objects.contains_key(name) {
                return objects[name] == body;
            }
            objects.insert(name.to_owned(), body.to_vec());
            true
        })
    }

    fn replace(&self, name: &str, body: &[u8]) -> io::Result<()> {
        self.with(|objects| drop(objects.insert(name.to_owned(), body.to_vec())))
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        self.with(|objects| objects.get(name).cloned())
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.with(|objects| {
            let prefix = format!("{dir}/");
            let mut names: Vec<String> = objects
                .keys()
                .filter_map(|name| name.strip_prefix(&prefix))
                .filter_map(|rest| rest.split('/').next())
                .map(str::to_owned)
                .collect();
            names.dedup();
            names
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that looks like a repository.
    fn repository() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("config"), b"x").expect("written");
        dir
    }

    #[test]
    fn a_repository_that_went_away_is_an_error_and_not_an_absence() {
        let dir = repository();
        let objects = FileObjects::new(dir.path().join("tidelog"), 1);
        assert_eq!(objects.read("slots/x").expect("read"), None);
        fs::remove_file(dir.path().join("config")).expect("removed");
        let gone = [
            objects.read("slots/x").err(),
            objects.list("slots").err(),
            objects.create("slots/x", b"").err(),
            objects.replace("slots/x", b"").err(),
        ];
        for error in gone {
            let error = error.expect("an error").to_string();
            assert!(error.contains(&dir.path().display().to_string()), "{error}");
        }
        assert_eq!(fs::read_dir(dir.path()).expect("there").count(), 0, "nothing was made");
    }

    #[test]
    fn what_a_crash_left_half_made_is_gone_a_day_later() {
        let dir = repository();
        let root = dir.path().join("tidelog");
        let objects = FileObjects::new(root.clone(), 1);
        assert!(objects.create("slots/x/claim-1", b"a").expect("created"));
        let day = Duration::from_secs(24 * 3600);
        for (name, age) in [(".new-a", 2 * day), (".new-b", day / 2), ("c", 2 * day)] {
            let file = fs::File::create(root.join(name)).expect("made");
            let now = file.metadata().and_then(|found| found.modified()).expect("a time");
            file.set_modified(now - age).expect("set");
        }
        objects.replace("slots/x/claim-1", b"b").expect("replaced");
        assert!(root.join(".new-a").exists(), "only a claim looks for it");
        assert!(objects.create("slots/y/claim-1", b"a").expect("created"));
        let mut left: Vec<_> = fs::read_dir(&root)
            .expect("there")
            .map(|entry| entry.expect("read").file_name().into_string().expect("a name"))
            .collect();
        left.sort();
        assert_eq!(left, [".new-b", "c", "slots"]);
        assert_eq!(objects.read("slots/x/claim-1").expect("read"), Some(b"b".to_vec()));
        for slot in ["x", "y"] {
            let files = fs::read_dir(root.join("slots").join(slot)).expect("there").count();
            assert_eq!(files, 1, "nothing temporary is left in a slot");
        }
    }

    #[test]
    fn without_links_one_comes_second_too() {
        let dir = repository();
        let path = dir.path().join("x");
        assert!(FileObjects::create_in_place(&path, b"a").expect("created"));
        assert!(!FileObjects::create_in_place(&path, b"b").expect("refused"));
        assert_eq!(fs::read(path).expect("read"), b"a");
    }

    #[test]
    #[should_panic(expected = "is no name of an object")]
    fn names_do_not_lead_out() {
        drop(FileObjects::new(repository().path().join("tidelog"), 1).read("../config"));
    }

    #[test]
    fn of_two_that_create_a_name_one_comes_second() {
        let dir = repository();
        let (a, b) = (
            FileObjects::new(dir.path().join("tidelog"), 1),
            FileObjects::new(dir.path().join("tidelog"), 2),
        );
        let memory = MemoryObjects::new();
        let pairs: [(&dyn Objects, &dyn Objects); 2] = [(&a, &b), (&memory, &memory)];
        for (first, second) in pairs {
            assert_eq!(first.list("slots/x").expect("no directory"), Vec::<String>::new());
            assert!(first.create("slots/x/claim-1", b"a").expect("created"));
            assert!(!second.create("slots/x/claim-1", b"b").expect("refused"));
            assert_eq!(second.read("slots/x/claim-1").expect("read"), Some(b"a".to_vec()));
            second.replace("slots/x/claim-1", b"c").expect("replaced");
            assert_eq!(first.read("slots/x/claim-1").expect("read"), Some(b"c".to_vec()));
            assert_eq!(first.list("slots/x").expect("listed"), ["claim-1"]);
            assert_eq!(first.list("slots").expect("listed"), ["x"]);
            assert_eq!(first.read("slots/x/claim-2").expect("read"), None);
        }
    }

    #[test]
    fn many_threads_that_create_a_name_have_one_winner() {
        let dir = repository();
        let root = dir.path().join("tidelog");
        let wins: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8u64)
                .map(|number| {
                    let objects = FileObjects::new(root.clone(), number);
                    scope.spawn(move || {
                        objects.create("slots/x/claim-1", &number.to_le_bytes()).expect("answered")
                    })
                })
                .collect();
            threads.into_iter().map(|thread| usize::from(thread.join().expect("ended"))).sum()
        });
        assert_eq!(wins, 1);
    }
}
