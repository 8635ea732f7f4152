//! The keeper of one device: connects it, watches its link, and gives it a new socket when the old
//! one is dead.
//!
//! A link dies in three ways, and each is noticed by itself: the server closes or resets it (its
//! socket ends), the network is cut (TCP's own timeout ends the socket), the server does not answer
//! (the kernel gives a request up, and tells so). In each case the kernel holds all requests, also
//! those that were under way, until it is given another socket. Every few seconds the keeper asks
//! the server what it offers: the volume may have grown, or be served elsewhere by now.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use sd_notify::NotifyState;

use tidelog::io::{Clock, SystemClock};
use tidelog::nbd::wire::export_flag;
use tidelog::nbd::{
    ClientError, KeeperId, NbdAddress, Negotiated, describe, end_when_silent, negotiate,
};

use super::detach::{backend_of, detach, device_name};
use super::judge::{Growth, Known, Verdict, growth, has_begun_anew, judge, may_leave};
use super::kernel::{self, Kernel, KernelError};
use super::netlink::Device;
use super::state::{self, State};

/// How long a server may take for each step of a handshake.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two questions to the server.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// Between two rounds over all servers while none serves.
const PAUSE: Duration = Duration::from_millis(250);
/// How long the kernel may take to tell that a link is dead.
const DEATH_PATIENCE: Duration = Duration::from_secs(5);

/// What a device is to be.
pub struct Plan {
    /// The N of `/dev/nbdN`.
    pub index: u32,
    /// GROUP/VOL, or GROUP/VOL@IMAGE.
    pub export: String,
    /// Where it may be served, first choice first.
    pub servers: Vec<NbdAddress>,
    /// After which a request or a link without an answer is given up.
    pub timeout: Duration,
    /// How long requests wait for another link.
    pub dead_timeout: Duration,
    /// Bytes of a logical block.
    pub block_bytes: u64,
    /// Writes are refused by the kernel.
    pub read_only: bool,
    /// A later reign that may lack answered writes is not taken.
    pub strict: bool,
    /// What this host calls itself to servers.
    pub keeper: KeeperId,
}

/// How keeping ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// Someone detached the device.
    Detached,
    /// SIGTERM or SIGINT.
    Stopped,
}

/// A connected server.
struct Link {
    server: usize,
    socket: OwnedFd,
    offer: Negotiated,
    warning: Option<String>,
}

/// What a server says of the volume while the device is connected.
enum Said {
    /// It offers this, which is judged so.
    Offers(Known, Verdict),
    /// It answered that it does not serve it; why.
    Refuses(String),
    /// It gave no answer; why.
    Nothing(String),
}

/// A device under care.
pub struct Keeper {
    plan: Plan,
    kernel: Kernel,
    clock: SystemClock,
    signals: SignalFd,
    known: Known,
    socket: Option<OwnedFd>,
    /// Bytes that the link serves: the device may show fewer, for a while.
    served_bytes: u64,
    /// When the kernel was given the link.
    linked_at: Duration,
    /// `/sys` shows what the device is called.
    named: bool,
    /// The kernel told that the link is dead, and has not been given another since.
    died: bool,
    state: State,
}

impl Keeper {
    /// Attaches a device that is free.
    pub fn attach(plan: Plan, mut kernel: Kernel) -> Result<Keeper> {
        let signals = block_signals()?;
        let link = find(&plan, 0, None)
            .map_err(|reasons| anyhow!("volume {}: is not served: {reasons}", plan.export))?;
        let mut known = Known::of(&link.offer);
        if plan.read_only {
            known.flags |= export_flag::READ_ONLY;
        }
        let device = Device {
            size_bytes: Some(known.size_bytes),
            block_bytes: Some(plan.block_bytes),
            timeout_seconds: Some(plan.timeout.as_secs()),
            server_flags: Some(u64::from(known.flags)),
            dead_timeout_seconds: Some(plan.dead_timeout.as_secs()),
            ..device_of(&plan, Some(&link.socket))
        };
        State::remove(plan.index);
        kernel.connect(&device).with_context(|| device_name(plan.index))?;
        let state = State {
            device: kernel::device_path(plan.index).display().to_string(),
            volume: plan.export.clone(),
            state: String::new(),
            reason: None,
            failed: None,
            since: String::new(),
            server: plan.servers[link.server].to_string(),
            size_bytes: known.size_bytes,
            flags: known.flags,
            description: link.offer.description,
            keeper: hex::encode(plan.keeper),
            pid: std::process::id(),
        };
        let clock = SystemClock::new();
        let mut keeper = Keeper {
            served_bytes: known.size_bytes,
            linked_at: clock.monotonic(),
            named: kernel::backend(plan.index).is_some(),
            socket: Some(link.socket),
            died: false,
            plan,
            kernel,
            clock,
            signals,
            known,
            state,
        };
        keeper.show("attached", None);
        Ok(keeper)
    }

    /// Takes over a device whose keeper is gone. Its plan names the keeper as `state` does.
    pub fn adopt(plan: Plan, kernel: Kernel, state: State) -> Result<Keeper> {
        let offer = Negotiated {
            size_bytes: kernel::size_bytes(plan.index).unwrap_or(state.size_bytes),
            flags: state.flags,
            block_bytes_min: None,
            description: state.description.clone(),
        };
        Ok(Keeper {
            signals: block_signals()?,
            known: Known::of(&offer),
            socket: None,
            served_bytes: 0,
            linked_at: Duration::ZERO,
            named: true,
            died: false,
            clock: SystemClock::new(),
            state: State { pid: std::process::id(), ..state },
            plan,
            kernel,
        })
    }

    /// Keeps the device until it is detached or this process is told to stop.
    pub fn keep(mut self) -> Result<()> {
        // What holds a file system's writes must not wait for that file system's memory.
        let all =
            nix::sys::mman::MlockAllFlags::MCL_CURRENT | nix::sys::mman::MlockAllFlags::MCL_FUTURE;
        if let Err(error) = nix::sys::mman::mlockall(all) {
            tracing::debug!(%error, "the keeper's memory could not be locked");
        }
        let end = self.run();
        super::super::serve::notify_manager(&[NotifyState::Stopping]);
        match end? {
            End::Detached => tracing::info!(device = %self.state.device, "detached"),
            End::Stopped if self.is_gone()? => {}
            End::Stopped => self.stop()?,
        }
        State::remove(self.plan.index);
        Ok(())
    }

    fn run(&mut self) -> Result<End> {
        if self.socket.is_none() {
            let why = "its keeper was gone, and another took over".to_owned();
            if let Some(end) = self.reconnect(why)? {
                return Ok(end);
            }
        }
        super::super::serve::notify_manager(&[NotifyState::Ready]);
        let mut probe_at = self.clock.monotonic() + PROBE_INTERVAL;
        loop {
            let left = probe_at.saturating_sub(self.clock.monotonic());
            let end = if let Some(end) = self.wait(left)? {
                Some(end)
            } else if let Some(why) = self.lost() {
                self.reconnect(why)?
            } else if self.clock.monotonic() >= probe_at {
                probe_at = self.clock.monotonic() + PROBE_INTERVAL;
                self.probe()?
            } else {
                None
            };
            if let Some(end) = end {
                return Ok(end);
            }
        }
    }

    /// Waits for a signal, news of the kernel, or the end of the link.
    fn wait(&mut self, patience: Duration) -> Result<Option<End>> {
        let hangup = PollFlags::from_bits_retain(nix::libc::POLLRDHUP);
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.kernel.news_fd(), PollFlags::POLLIN),
        ];
        if let Some(socket) = &self.socket {
            fds.push(PollFd::new(socket.as_fd(), hangup));
        }
        let timeout =
            PollTimeout::try_from(patience + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("the keeper cannot wait"),
        }
        Ok(self.signals.read_signal()?.map(|_| End::Stopped))
    }

    /// Why the link is lost, if it is.
    fn lost(&mut self) -> Option<String> {
        self.died |= self.kernel.link_died(self.plan.index);
        let (server, socket) = (&self.state.server, self.socket.as_ref()?);
        let hangup = PollFlags::from_bits_retain(nix::libc::POLLRDHUP);
        let mut fds = [PollFd::new(socket.as_fd(), hangup)];
        let ended = poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0);
        // The kernel tells of a link that the server closed, too.
        if !self.died && !ended {
            None
        } else if kernel::was_given_up(socket.as_fd()) {
            Some(format!("{server} did not answer a request in time"))
        } else {
            Some(format!("{server} closed the connection, or it was lost on the way"))
        }
    }

    /// Whether the device is detached, or will be, or is another program's by now.
    fn is_gone(&mut self) -> Result<bool> {
        let index = self.plan.index;
        if state::is_detached(index) || !self.kernel.is_connected(index)? {
            return Ok(true);
        }
        let backend = kernel::backend(index);
        Ok(self.named && backend.as_deref() != Some(&backend_of(&self.plan.export)))
    }

    /// Tries all servers until one serves the volume, and gives the kernel its socket.
    fn reconnect(&mut self, why: String) -> Result<Option<End>> {
        if self.is_gone()? {
            return Ok(Some(End::Detached));
        }
        self.show("reconnecting", Some(why));
        if let Some(old) = self.socket.take() {
            kernel::abort(old.as_fd());
        }
        let fails_at = self.clock.monotonic() + self.plan.dead_timeout;
        let mut told = String::new();
        loop {
            if self.is_gone()? {
                return Ok(Some(End::Detached));
            }
            let first = self.server_index();
            let found = find(&self.plan, first, Some(&self.known));
            if self.state.failed.is_none() && self.clock.monotonic() >= fails_at {
                self.state.failed = Some(self.clock.wall().to_string());
                told.clear();
            }
            match found {
                Ok(link) => return self.hand_over(link),
                Err(reasons) if reasons != told => {
                    self.show("reconnecting", Some(reasons.clone()));
                    told = reasons;
                }
                Err(_) => {}
            }
            if let Some(end) = self.wait(PAUSE)? {
                return Ok(Some(end));
            }
            self.died |= self.kernel.link_died(self.plan.index);
        }
    }

    fn hand_over(&mut self, link: Link) -> Result<Option<End>> {
        // The kernel takes a socket only where the one before is dead, and does not say so.
        let deadline = self.clock.monotonic() + DEATH_PATIENCE;
        while !self.died && self.clock.monotonic() < deadline {
            if let Some(end) = self.wait(deadline.saturating_sub(self.clock.monotonic()))? {
                return Ok(Some(end));
            }
            self.died |= self.kernel.link_died(self.plan.index);
        }
        if self.is_gone()? {
            return Ok(Some(End::Detached));
        }
        match self.kernel.reconfigure(&relinked(&self.plan, &link.socket)) {
            Ok(()) => {}
            Err(KernelError::NotAttached) => return Ok(Some(End::Detached)),
            Err(error) => return Err(error).with_context(|| device_name(self.plan.index)),
        }
        self.died = false;
        self.socket = Some(link.socket);
        (self.served_bytes, self.linked_at) = (link.offer.size_bytes, self.clock.monotonic());
        self.known.identity = Known::of(&link.offer).identity;
        self.state.description.clone_from(&link.offer.description);
        self.state.server = self.plan.servers[link.server].to_string();
        if let Some(warning) = &link.warning {
            tracing::warn!(
                device = %self.state.device, server = %self.state.server,
                "{warning}; check the file system when it is next unmounted"
            );
        }
        self.show("attached", None);
        Ok(None)
    }

    /// Asks the server what it offers by now, and where it does not serve the volume, the others.
    fn probe(&mut self) -> Result<Option<End>> {
        if self.is_gone()? {
            return Ok(Some(End::Detached));
        }
        let current = self.server_index();
        let (refused, trouble) = match self.ask(current) {
            Said::Offers(offer, _) if has_begun_anew(&self.known, &offer) => {
                let why = format!("{} is under another reign by now", self.state.server);
                return self.reconnect(why);
            }
            Said::Offers(offer, Verdict::Same) => return self.grow(offer.size_bytes),
            Said::Offers(_, Verdict::LaterReign(why) | Verdict::Other(why)) => {
                (false, format!("{}: {why}", self.state.server))
            }
            Said::Refuses(why) => (true, why),
            Said::Nothing(why) => (false, why),
        };
        let others = (0..self.plan.servers.len()).filter(|other| *other != current);
        for other in others.collect::<Vec<_>>() {
            if let Said::Offers(_, verdict) = self.ask(other)
                && may_leave(refused, &verdict)
            {
                let there = self.plan.servers[other].to_string();
                let why = format!("{trouble}; {there} serves the volume");
                self.state.server = there;
                return self.reconnect(why);
            }
        }
        // Requests may still be answered: the kernel and TCP tell when they are not.
        self.show("attached", Some(trouble));
        Ok(None)
    }

    /// Has the device follow a volume of `offered` bytes by now.
    fn grow(&mut self, offered: u64) -> Result<Option<End>> {
        let settled = self.clock.monotonic() >= self.linked_at + self.plan.timeout;
        let (shown, export) = (self.known.size_bytes, &self.plan.export);
        match growth(shown, self.served_bytes, offered, settled) {
            Growth::None => self.show("attached", None),
            Growth::Connect => {
                let why = format!(
                    "{export} has {offered} bytes by now, {shown} before: a new connection serves \
                     them all"
                );
                return self.reconnect(why);
            }
            Growth::Wait => {
                let why = format!(
                    "{export} has {offered} bytes by now: the device will, once what was asked \
                     before is answered"
                );
                self.show("attached", Some(why));
            }
            Growth::Show => match self.kernel.reconfigure(&grown(&self.plan, self.served_bytes)) {
                Ok(()) => {
                    self.known.size_bytes = self.served_bytes;
                    self.state.size_bytes = self.served_bytes;
                    self.show("attached", None);
                }
                Err(KernelError::NotAttached) => return Ok(Some(End::Detached)),
                Err(error) => {
                    let why = format!("its new size of {offered} bytes cannot be shown: {error}");
                    self.show("attached", Some(why));
                }
            },
        }
        Ok(None)
    }

    /// What a server says of the volume.
    fn ask(&self, server: usize) -> Said {
        let address = &self.plan.servers[server];
        match describe(address, &self.plan.export, PATIENCE) {
            Ok(offer) => {
                Said::Offers(Known::of(&offer), judged(&self.plan, Some(&self.known), &offer))
            }
            Err(error @ ClientError::Refused { .. }) => Said::Refuses(reason(address, &error)),
            Err(error) => Said::Nothing(reason(address, &error)),
        }
    }

    fn server_index(&self) -> usize {
        let is_it = |server: &NbdAddress| server.to_string() == self.state.server;
        self.plan.servers.iter().position(is_it).unwrap_or(0)
    }

    /// Shows a state to whoever asks, and logs it where it is new.
    fn show(&mut self, state: &str, reason: Option<String>) {
        let reason = state::with_failure(reason, self.state.failed.as_deref());
        if self.state.state != state || self.state.reason != reason {
            if self.state.state != state {
                self.state.since = self.clock.wall().to_string();
            }
            self.state.state = state.to_owned();
            self.state.reason = reason;
            let State { device, volume, server, .. } = &self.state;
            let reason = self.state.reason.as_deref().unwrap_or_default();
            if reason.is_empty() {
                tracing::info!(%device, %volume, %server, "{state}");
            } else {
                tracing::warn!(%device, %volume, %server, reason, "{state}");
            }
            let line = format!("{state}: {volume} from {server} {reason}");
            super::super::serve::notify_manager(&[NotifyState::Status(line.trim_end())]);
        }
        if let Err(error) = self.state.publish(self.plan.index) {
            tracing::warn!(%error, "the state could not be shown to others");
        }
    }

    /// Detaches where nobody holds the device.
    fn stop(&mut self) -> Result<()> {
        let index = self.plan.index;
        detach(&mut self.kernel, index, false).map_err(|error| match state::is_detached(index) {
            true => error,
            false => anyhow!(
                "{error}; the device stays, without a keeper: `tidelog attach` takes it up again"
            ),
        })
    }
}

/// What names a device to the kernel, with a socket for it.
fn device_of(plan: &Plan, socket: Option<&OwnedFd>) -> Device {
    use std::os::fd::AsRawFd;
    Device {
        index: plan.index,
        socket: socket.map(|socket| socket.as_raw_fd().cast_unsigned()),
        backend: Some(backend_of(&plan.export)),
        ..Device::default()
    }
}

/// Another link for a device. Never its size with it: the kernel would change that first, and wait
/// for requests which wait for this link.
fn relinked(plan: &Plan, socket: &OwnedFd) -> Device {
    Device {
        timeout_seconds: Some(plan.timeout.as_secs()),
        dead_timeout_seconds: Some(plan.dead_timeout.as_secs()),
        ..device_of(plan, Some(socket))
    }
}

/// Another size for a device that has a link which serves it.
fn grown(plan: &Plan, size_bytes: u64) -> Device {
    Device { size_bytes: Some(size_bytes), ..device_of(plan, None) }
}

/// The first server, from `first` on, that serves the volume; else what each of them said.
fn find(plan: &Plan, first: usize, known: Option<&Known>) -> Result<Link, String> {
    let mut reasons = Vec::new();
    for offset in 0..plan.servers.len() {
        let server = (first + offset) % plan.servers.len();
        let address = &plan.servers[server];
        let (client, offer) = match negotiate(address, &plan.export, plan.keeper, PATIENCE) {
            Ok(found) => found,
            Err(error) => {
                reasons.push(reason(address, &error));
                continue;
            }
        };
        let warning = match judged(plan, known, &offer) {
            Verdict::Same => None,
            Verdict::LaterReign(what) => Some(what),
            Verdict::Other(why) => {
                reasons.push(format!("{address}: {why}"));
                continue;
            }
        };
        match client.into_socket().and_then(|socket| watch(plan, socket)) {
            Ok(socket) => return Ok(Link { server, socket, offer, warning }),
            Err(error) => reasons.push(format!("{address}: {error}")),
        }
    }
    Err(reasons.join("; "))
}

fn reason(address: &NbdAddress, error: &ClientError) -> String {
    match error {
        ClientError::Io { cause, .. } => format!("{address}: {cause}"),
        other => format!("{address}: {other}"),
    }
}

/// Whether an offer may be shown; `known` is what the device shows, where it does.
fn judged(plan: &Plan, known: Option<&Known>, offer: &Negotiated) -> Verdict {
    let mut offered = Known::of(offer);
    if offer.size_bytes < plan.block_bytes {
        let why = format!("the volume has {} bytes, less than a block", offer.size_bytes);
        return Verdict::Other(why);
    }
    let Some(known) = known else { return Verdict::Same };
    if plan.read_only {
        offered.flags |= export_flag::READ_ONLY;
    }
    match judge(known, &offered) {
        Verdict::LaterReign(what) if plan.strict => {
            Verdict::Other(format!("{what}; --strict holds here"))
        }
        verdict => verdict,
    }
}

/// Lets TCP end a link whose other side is silent.
fn watch(plan: &Plan, socket: OwnedFd) -> std::io::Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname};
    use std::os::fd::AsRawFd;
    let address: SockaddrStorage = getsockname(socket.as_raw_fd())?;
    if address.family() != Some(AddressFamily::Unix) {
        end_when_silent(&socket, plan.timeout)?;
    }
    Ok(socket)
}

/// Lets SIGTERM and SIGINT be read instead of ending the process.
fn block_signals() -> Result<SignalFd> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGTERM);
    mask.add(Signal::SIGINT);
    mask.thread_block().context("signals could not be blocked")?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .context("signals cannot be read")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A volume that grew under load stood still until the dead timeout, on Linux 6.9 and later.
    #[test]
    fn the_kernel_is_never_told_of_a_link_and_a_size_at_once() {
        let plan = Plan {
            index: 3,
            export: "g/v".to_owned(),
            servers: Vec::new(),
            timeout: Duration::from_secs(15),
            dead_timeout: Duration::from_secs(3600),
            block_bytes: 512,
            read_only: false,
            strict: false,
            keeper: [1; 16],
        };
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let link = relinked(&plan, &socket.into());
        assert!(link.socket.is_some() && link.size_bytes.is_none());
        let size = grown(&plan, 8192);
        let backend = Some("tidelog g/v".to_owned());
        let alone = Device { index: 3, size_bytes: Some(8192), backend, ..Device::default() };
        assert_eq!(size, alone, "what a later command does not name stays as it is");
    }
}
