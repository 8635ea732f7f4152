//! What a keeper tells of its device: a file per device in `/run`, and a lock that it holds while
//! it runs.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
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
pub struct Lock(#[expect(dead_code, reason = "holds the lock")] Flock<File>);

/// Takes the lock of a device; `None` where another keeper has it.
pub fn lock(index: u32) -> io::Result<Option<Lock>> {
    std::fs::create_dir_all(DIRECTORY)?;
    let path = path(index, "lock");
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(held) => Ok(Some(Lock(held))),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno.into()),
    }
}

/// Whether a keeper runs.
pub fn is_kept(index: u32) -> bool {
    let Ok(file) = File::open(path(index, "lock")) else { return false };
    Flock::lock(file, FlockArg::LockSharedNonblock).is_err()
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

    /// Takes away what was shown of a device.
    pub fn remove(index: u32) {
        let _ = std::fs::remove_file(path(index, "json"));
    }
}
