//! The real binary as a process: configuration, start, command line, `kill -9`, restart.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

use super::wait_for;

/// Addresses that this process has given out.
static GIVEN: AtomicU32 = AtomicU32::new(0);

/// What an appliance is started with.
pub struct Setup {
    /// Its name among its peers.
    pub node: &'static str,
    /// What peers dial instead of its own address: a proxy of the test.
    pub advertise: Option<String>,
    /// Lines added to its configuration.
    pub more: String,
    /// Where its data is, if not in its directory.
    pub data_dir: Option<PathBuf>,
    /// Added to the environment of its process.
    pub environment: Vec<(&'static str, PathBuf)>,
}

impl Setup {
    /// A node that advertises its own address.
    pub fn new(node: &'static str) -> Setup {
        Setup {
            node,
            advertise: None,
            more: String::new(),
            data_dir: None,
            environment: Vec::new(),
        }
    }
}

/// One running (or killed) appliance; killed when dropped.
pub struct Appliance {
    /// Its name among its peers.
    pub node: &'static str,
    /// Its directory: configuration, data, sockets, log of the process.
    pub dir: PathBuf,
    /// HOST:PORT on which it listens for peers.
    pub peer_address: String,
    environment: Vec<(&'static str, PathBuf)>,
    child: Option<Child>,
}

impl Appliance {
    /// Writes a configuration into `dir` (made where it lacks) and starts the appliance; returns
    /// when its control socket and its NBD socket answer.
    pub fn start(dir: &Path, setup: Setup) -> Appliance {
        fs::create_dir_all(dir).unwrap();
        let peer_address = free_address();
        let advertise = setup.advertise.unwrap_or_else(|| peer_address.clone());
        let shown = dir.display();
        let Setup { node, more, environment, .. } = setup;
        let data = setup.data_dir.unwrap_or_else(|| dir.join("data"));
        fs::write(dir.join("password"), "a password of the tests\n").unwrap();
        let configuration = format!(
            "node = \"{node}\"\n\
             data_dir = \"{}\"\n\
             {more}\n\
             [control]\nsocket = \"{shown}/run/control.sock\"\n\
             [[nbd]]\nlisten = \"unix:{shown}/run/nbd.sock\"\n\
             [peer]\nlisten = \"{peer_address}\"\nadvertise = \"{advertise}\"\n",
            data.display()
        );
        fs::write(dir.join("tidelog.toml"), configuration).unwrap();
        let dir = dir.to_owned();
        let mut appliance = Appliance { node, dir, peer_address, environment, child: None };
        appliance.restart();
        appliance
    }

    /// Starts the process again in the same directory.
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "{} still runs", self.node);
        let log = File::options().create(true).append(true).open(self.dir.join("serve.log"));
        let child = Command::new(env!("CARGO_BIN_EXE_tidelog"))
            .args(["serve", "--config"])
            .arg(self.dir.join("tidelog.toml"))
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.unwrap())
            .spawn()
            .unwrap();
        self.child = Some(child);
        let (control, nbd) = (self.control_socket(), self.nbd_socket());
        wait_for(&format!("node {} to serve", self.node), || {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "node {}: {ended:?}\n{}", self.node, self.log_tail());
            UnixStream::connect(&nbd).ok()?;
            UnixStream::connect(&control).ok()
        });
    }

    /// `kill -9`, and waits for the process to be gone.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let child = self.child.as_ref().expect("it runs");
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// SIGTERM, and waits for a clean end.
    pub fn stop(&mut self) {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        let mut child = self.child.take().expect("it runs");
        let status = child.wait().unwrap();
        assert!(status.success(), "node {}: {status}\n{}", self.node, self.log_tail());
    }

    /// The process id of the appliance.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// The control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.dir.join("run/control.sock")
    }

    /// The NBD socket.
    pub fn nbd_socket(&self) -> PathBuf {
        self.dir.join("run/nbd.sock")
    }

    /// Runs one `tidelog` command against this node.
    pub fn command(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_tidelog"))
            .arg("--socket")
            .arg(self.control_socket())
            .args(arguments)
            .env_clear()
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Runs one command that must succeed; what it printed.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments);
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "node {}: tidelog {}: {}\n{printed}{}\n{}",
            self.node,
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr),
            self.log_tail()
        );
        printed
    }

    /// Runs one command with `--json` that must succeed; what it printed, parsed.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let mut with_json = vec!["--json"];
        with_json.extend(arguments);
        let printed = self.run(&with_json);
        serde_json::from_str(&printed)
            .unwrap_or_else(|cause| panic!("{}: {cause}: {printed}", arguments.join(" ")))
    }

    /// Pairs this node with another, as a person would.
    pub fn pair_with(&self, other: &Appliance) {
        let invite = self.json(&["peer", "invite"]);
        let (token, address) = (&invite["token"], &invite["address"]);
        let (token, address) = (token.as_str().unwrap(), address.as_str().unwrap());
        other.run(&["peer", "join", token, "--address", address]);
        for (node, peer) in [(self, other), (other, self)] {
            wait_for(&format!("{} to know {}", node.node, peer.node), || {
                let peers = node.json(&["peer", "list"]).to_string();
                peers.contains(&format!("\"{}\"", peer.node)).then_some(())
            });
        }
    }

    /// The status of one group on this node.
    pub fn status(&self, group: &str) -> Value {
        let status = self.json(&["status", group]);
        let groups = status["groups"].as_array().cloned().unwrap_or_default();
        groups
            .into_iter()
            .find(|found| found["name"] == group)
            .unwrap_or_else(|| panic!("node {}: no group {group} in {status}", self.node))
    }

    /// The texts of its events with a code, oldest first.
    pub fn events(&self, code: &str) -> Vec<String> {
        let events = self.json(&["events"]);
        let events = events["events"].as_array().cloned().unwrap_or_default();
        let of_code = events.iter().filter(|event| event["code"] == code);
        of_code.map(|event| event["text"].as_str().unwrap().to_owned()).collect()
    }

    /// Whether it has told such an event.
    pub fn has_event(&self, code: &str) -> bool {
        !self.events(code).is_empty()
    }

    /// The lines that the process logged as errors, over all its starts.
    pub fn errors(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.join("serve.log")).unwrap();
        text.lines().filter(|line| line.contains(" ERROR ")).map(str::to_owned).collect()
    }

    /// The end of what the process logged.
    pub fn log_tail(&self) -> String {
        let mut text = String::new();
        if let Ok(mut file) = File::open(self.dir.join("serve.log")) {
            let _ = file.read_to_string(&mut text);
        }
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(30);
        format!("-- {}/serve.log\n{}", self.dir.display(), lines[from..].join("\n"))
    }
}

impl Drop for Appliance {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            // The harness shows this beside the failed assertion.
            println!("{}", self.log_tail());
        }
    }
}

/// A loopback address with a port that nothing else in this test run uses: each process has its own
/// address, so that its ports are its own and stay the same over a restart.
pub fn free_address() -> String {
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let port = 20_000 + GIVEN.fetch_add(1, Ordering::Relaxed);
    format!("127.{}.{middle}.{low}:{port}", 64 + (high & 0x3f))
}
