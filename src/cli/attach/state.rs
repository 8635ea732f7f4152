//! What a keeper tells of its device: a file per device in `/run`, and a lock that it holds while
//! it runs. Others ask who holds the lock and never take it, or they would be in the way of a
//! keeper that starts.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use serde::{Deserialize, Serialize};

/// Where the files are. It lasts as long as the kernel's devices do: until the next boot.
const DIRECTORY: &str = "/run/tidelog-attach";

/// A device and its keeper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// `/dev/nbdN`.
    pub device: String,
    /// GROUP/VOL, or GROUP/VOL@IMAGE.
    pub volume: String,
    /// `attached`, `reconnecting`; where a keeper is gone, `--status` says so instead.
    pub state: String,
    /// Why it is not `attached`, or what is not as it should be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When requests began to fail since none of the servers was there for so long; RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Since when, RFC 3339.
    pub since: String,
    /// The server that it is, or was last, connected to.
    pub server: String,
    /// Bytes of the device.
    pub size_bytes: u64,
    /// The flags that the kernel was given.
    pub flags: u16,
    /// What the server said of the volume.
    pub description: String,
    /// What the host calls itself to servers, in hexadecimal digits.
    pub keeper: String,
    /// The keeper's process.
    pub pid: u32,
}

fn path(index: u32, ending: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("nbd{index}.{ending}"))
}

/// A keeper's right to a device; ends with the process.
pub struct Lock(#[expect(dead_code, reason = "holds the lock")] File);

/// Takes the lock of a device; `None` where another keeper has it.
pub fn lock(index: u32) -> io::Result<Option<Lock>> {
    std::fs::create_dir_all(DIRECTORY)?;
    lock_file(&path(index, "lock"))
}

/// Whether a keeper runs.
pub fn is_kept(index: u32) -> bool {
    is_locked(&path(index, "lock"))
}

/// A lock of a whole file, for whoever has it open.
fn whole() -> libc::flock {
    let (l_type, l_whence) = (libc::F_WRLCK as i16, libc::SEEK_SET as i16);
    libc::flock { l_type, l_whence, l_start: 0, l_len: 0, l_pid: 0 }
}

fn lock_file(path: &Path) -> io::Result<Option<Lock>> {
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole())) {
        Ok(_) => Ok(Some(Lock(file))),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn is_locked(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let mut found = whole();
    let asked = fcntl(&file, FcntlArg::F_OFD_GETLK(&mut found));
    asked.is_err() || found.l_type != libc::F_UNLCK as i16
}

/// Notes that a device is being detached, so that its keeper takes the end of the link for that and
/// gives the kernel no other. While something has the device open it still counts as connected, and
/// kernels before 6.14 take a socket then: it lives again, or they use freed memory.
pub fn mark_detached(index: u32) -> io::Result<()> {
    std::fs::create_dir_all(DIRECTORY)?;
    File::create(path(index, "detached")).map(|_| ())
}

/// It goes on.
pub fn unmark_detached(index: u32) {
    let _ = std::fs::remove_file(path(index, "detached"));
}

/// Whether it was noted.
pub fn is_detached(index: u32) -> bool {
    path(index, "detached").exists()
}

/// A reason to show, with what has become of requests before: a server that is back does not undo
/// that they failed, and the kernel holds none any more after that.
pub fn with_failure(reason: Option<String>, failed: Option<&str>) -> Option<String> {
    let Some(since) = failed else { return reason };
    let failure = format!(
        "no server was there for --dead-timeout: requests fail since {since}; unmount, check what \
         is on it, `tidelog detach`, attach anew"
    );
    Some(reason.map_or(failure.clone(), |reason| format!("{reason}; {failure}")))
}

impl State {
    /// Shows it to others.
    pub fn publish(&self, index: u32) -> io::Result<()> {
        let (new, final_path) = (path(index, "new"), path(index, "json"));
        std::fs::write(&new, serde_json::to_string_pretty(self)?)?;
        std::fs::rename(new, final_path)
    }

    /// What a keeper, which may be gone, has shown.
    pub fn read(index: u32) -> Option<State> {
        serde_json::from_str(&std::fs::read_to_string(path(index, "json")).ok()?).ok()
    }

    /// Takes away what was shown and noted of a device.
    pub fn remove(index: u32) {
        let _ = std::fs::remove_file(path(index, "json"));
        unmark_detached(index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn that_requests_failed_is_told_as_long_as_the_device_lives() {
        assert_eq!(with_failure(None, None), None);
        let reason = || Some("a: refused".to_owned());
        assert_eq!(with_failure(reason(), None), reason());
        let told = with_failure(None, Some("2026-01-01T00:00:00Z")).unwrap();
        assert!(told.contains("fail since 2026-01-01T00:00:00Z; unmount"), "{told}");
        let told = with_failure(reason(), Some("2026-01-01T00:00:00Z")).unwrap();
        assert!(told.starts_with("a: refused; no server"), "{told}");
    }

    #[test]
    fn a_lock_has_one_holder_and_is_seen_while_it_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        assert!(!is_locked(&path), "there is none");
        let held = lock_file(&path).unwrap().expect("it is free");
        assert!(is_locked(&path));
        assert!(lock_file(&path).unwrap().is_none(), "another keeper stays away");
        drop(held);
        assert!(!is_locked(&path));
    }

    /// A keeper that was started again while a monitor ran `attach --status` ended at once, because
    /// asking took a shared lock for a moment.
    #[test]
    fn asking_who_keeps_a_device_is_never_in_a_keepers_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        drop(lock_file(&path).unwrap().expect("it is free"));
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        is_locked(&path);
                    }
                });
            }
            let refused = (0..20_000).filter(|_| !matches!(lock_file(&path), Ok(Some(_)))).count();
            done.store(true, Ordering::Relaxed);
            assert_eq!(refused, 0);
        });
    }
}
