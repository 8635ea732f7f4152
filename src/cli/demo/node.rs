//! One appliance of the demo: a process of this same binary, its configuration and command line.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use tidelog::io::{Clock, SystemClock};
use tidelog::nbd::NbdAddress;

/// How long any one thing may take; the whole demo takes less than a minute.
const PATIENCE: Duration = Duration::from_secs(45);
/// The longest path that a Unix socket can have.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// A node and its process, which is killed when this is dropped unless it was let go.
pub struct Node {
    /// Its name.
    pub name: &'static str,
    dir: PathBuf,
    repository: PathBuf,
    child: Option<Child>,
}

impl Node {
    /// A node in a directory of its own; `repository` is where its backups go.
    ///
    /// # Errors
    ///
    /// Where the directory cannot be made, or its sockets would have too long a path.
    pub fn create(name: &'static str, root: &Path, repository: &Path) -> anyhow::Result<Node> {
        let dir = root.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("{}: make it", dir.display()))?;
        let node = Node { name, dir, repository: repository.to_owned(), child: None };
        let length = node.control_socket().as_os_str().len();
        ensure!(
            length <= SOCKET_PATH_BYTES_MAX,
            "{}: its path is too long for a socket ({length} bytes); use a shorter directory",
            node.control_socket().display()
        );
        Ok(node)
    }

    /// Writes the configuration: where it listens for peers, what they dial.
    ///
    /// # Errors
    ///
    /// Where a file cannot be written.
    pub fn configure(&self, listen: SocketAddr, advertise: SocketAddr) -> anyhow::Result<()> {
        let dir = self.dir.display();
        fs::write(self.dir.join("password"), "demo\n")?;
        let text = format!(
            "node = \"{}\"\n\
             data_dir = \"{dir}/data\"\n\n\
             [control]\nsocket = \"{}\"\n\n\
             [[nbd]]\nlisten = \"unix:{}\"\n\n\
             [peer]\nlisten = \"{listen}\"\nadvertise = \"{advertise}\"\n\n\
             [[repository]]\nname = \"main\"\nurl = \"{}\"\npassword_file = \"{dir}/password\"\n",
            self.name,
            self.control_socket().display(),
            self.nbd_socket().display(),
            self.repository.display(),
        );
        fs::write(self.config(), text).context("write the configuration")
    }

    /// Starts the process and waits until its control socket answers.
    ///
    /// # Errors
    ///
    /// Where it ends, or does not answer in time; with the end of its log.
    pub fn start(&mut self) -> anyhow::Result<()> {
        let log = File::options().create(true).append(true).open(self.log())?;
        let child = Command::new(std::env::current_exe()?)
            .args(["serve", "--config"])
            .arg(self.config())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            // Out of the terminal's reach: an interrupt of the demo is for the demo.
            .process_group(0)
            .spawn()?;
        self.child = Some(child);
        let name = self.name;
        wait_for(&format!("node {name} to serve"), || {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            if let Some(status) = ended {
                bail!("node {name}: ended with {status}\n{}", self.log_tail());
            }
            Ok(self.json("status").is_ok().then_some(()))
        })
        .with_context(|| self.log_tail())
    }

    /// SIGKILL, and waits for the process to be gone.
    ///
    /// # Errors
    ///
    /// Where it does not run.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        let mut child = self.child.take().context("it does not run")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// SIGTERM, and waits for a clean end.
    ///
    /// # Errors
    ///
    /// Where it does not end in order.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        let mut child = self.child.take().context("it does not run")?;
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let status = child.wait()?;
        ensure!(status.success(), "node {}: ended with {status}\n{}", self.name, self.log_tail());
        Ok(())
    }

    /// Leaves the process running after the demo.
    pub fn let_go(&mut self) {
        self.child = None;
    }

    /// Runs `tidelog WORDS` against this node; what it printed.
    ///
    /// # Errors
    ///
    /// Where the command fails, with the line it printed.
    pub fn command(&self, words: &str) -> anyhow::Result<String> {
        let output = Command::new(std::env::current_exe()?)
            .arg("--socket")
            .arg(self.control_socket())
            .args(words.split_whitespace())
            .stdin(Stdio::null())
            .output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("{}$ tidelog {words}: {}", self.name, said.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs `tidelog --json WORDS`; what it printed, parsed.
    ///
    /// # Errors
    ///
    /// Where the command fails, or prints something else.
    pub fn json(&self, words: &str) -> anyhow::Result<Value> {
        let printed = self.command(&format!("--json {words}"))?;
        serde_json::from_str(&printed).with_context(|| format!("tidelog --json {words}: {printed}"))
    }

    /// This node's status of one group.
    ///
    /// # Errors
    ///
    /// Where the node does not answer or does not hold the group.
    pub fn status(&self, group: &str) -> anyhow::Result<Value> {
        let status = self.json(&format!("status {group}"))?;
        Ok(status["groups"][0].clone())
    }

    /// Where its hosts connect.
    pub fn nbd(&self) -> NbdAddress {
        NbdAddress::Unix(self.nbd_socket())
    }

    /// The socket of its command line.
    pub fn control_socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    /// The socket of its hosts.
    pub fn nbd_socket(&self) -> PathBuf {
        self.dir.join("nbd.sock")
    }

    /// The file with its password of the repository.
    pub fn password_file(&self) -> PathBuf {
        self.dir.join("password")
    }

    /// What its process logged last.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(12);
        format!("the end of {}:\n{}", self.log().display(), lines[from..].join("\n"))
    }

    fn config(&self) -> PathBuf {
        self.dir.join("tidelog.toml")
    }

    fn log(&self) -> PathBuf {
        self.dir.join("serve.log")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// A loopback address that is free now.
///
/// # Errors
///
/// Where there is none.
pub fn free_address() -> std::io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

/// Asks `condition` until it gives a value.
///
/// # Errors
///
/// Where the condition fails, or gives nothing in time.
pub fn wait_for<T>(
    what: &str,
    mut condition: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let clock = SystemClock::new();
    let start = clock.monotonic();
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        let waited = clock.monotonic().saturating_sub(start);
        ensure!(waited < PATIENCE, "gave up after {} s waiting for {what}", waited.as_secs());
        rest(Duration::from_millis(20));
    }
}

#[expect(clippy::disallowed_methods, reason = "polling the demo's own processes")]
fn rest(duration: Duration) {
    std::thread::sleep(duration);
}
