//! `tidelog attach` and `detach`: on a host, a volume as a device of the kernel's nbd client that
//! outlives its server. Talks to the kernel and to the servers' NBD ports, to no control socket.

mod detach;
mod judge;
mod keeper;
mod kernel;
mod netlink;
mod state;

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde_json::json;

use tidelog::io::{Entropy, KernelEntropy};
use tidelog::nbd::NbdAddress;
use tidelog::units::Span;

use super::arguments::Member;
use super::{output, serve};
use detach::{backend_of, device_name, is_ours};
use keeper::{Keeper, Plan};
use kernel::Kernel;
use state::State;

/// The port of NBD.
const PORT: u16 = 10809;

/// Attach a volume to this host as a device, and keep it alive when its server dies or changes
///
/// Runs until the device is detached, or until SIGTERM, which detaches it unless it is mounted.
/// While no server serves the volume the kernel holds all requests of the device.
#[derive(Args)]
pub struct AttachArguments {
    /// The volume; GROUP/VOL@IMAGE attaches an open image, read-only
    #[arg(value_name = "GROUP/VOL", required_unless_present = "status")]
    volume: Option<Export>,
    /// The device, such as /dev/nbd0
    #[arg(required_unless_present = "status")]
    device: Option<PathBuf>,
    /// A node that serves the volume; given several times, the one that is primary is used
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "status")]
    to: Vec<Server>,
    /// How long a request or the network may take before the link is given up
    #[arg(long, value_name = "DURATION", default_value = "15s")]
    timeout: Span,
    /// How long requests wait for a server before they fail
    #[arg(long, value_name = "DURATION", default_value = "1d")]
    dead_timeout: Span,
    /// Bytes of a block: 512, 1024, 2048 or 4096
    #[arg(long, value_name = "BYTES", default_value_t = 512, value_parser = block_bytes)]
    block_size: u64,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Hold all requests rather than go on with a server that may lack answered writes: after a
    /// promote by hand, or a loss of power
    #[arg(long)]
    strict: bool,
    /// Show what is attached, or one device, and end
    #[arg(long, value_name = "DEVICE", num_args = 0..=1,
          conflicts_with_all = ["volume", "device", "to"])]
    #[expect(clippy::option_option, reason = "absent, given, given with a device")]
    status: Option<Option<PathBuf>>,
}

/// Detach a device of `attach`; its keeper ends
#[derive(Args)]
pub struct DetachArguments {
    /// The device, such as /dev/nbd0
    device: PathBuf,
    /// Detach it though it is mounted: requests that wait fail
    #[arg(long)]
    force: bool,
}

/// GROUP/VOL or GROUP/VOL@IMAGE.
#[derive(Clone, Debug)]
struct Export(String);

impl FromStr for Export {
    type Err = String;
    fn from_str(text: &str) -> Result<Export, String> {
        let (volume, image) = text.split_once('@').unwrap_or((text, "i"));
        let _: Member = volume.parse()?;
        let _: tidelog::units::Name = image.parse().map_err(|error| format!("{error}"))?;
        Ok(Export(text.to_owned()))
    }
}

/// HOST, HOST:PORT, or unix:PATH.
#[derive(Clone, Debug)]
struct Server(NbdAddress);

impl FromStr for Server {
    type Err = String;
    fn from_str(text: &str) -> Result<Server, String> {
        let wrong = || format!("`{text}`: expected HOST:PORT");
        let bare = text.strip_prefix("tcp:").unwrap_or(text);
        let address = if text.starts_with("unix:") {
            text.parse()
        } else if bare.rsplit_once(':').is_none() || bare.ends_with(']') {
            format!("tcp:{bare}:{PORT}").parse()
        } else {
            format!("tcp:{bare}").parse()
        };
        address.map(Server).map_err(|_| wrong())
    }
}

fn block_bytes(text: &str) -> Result<u64, String> {
    match text {
        "512" | "1024" | "2048" | "4096" => Ok(text.parse().expect("it is a number")),
        _ => Err("expected 512, 1024, 2048 or 4096".to_owned()),
    }
}

/// `tidelog attach`.
pub fn attach(arguments: AttachArguments, json: bool) -> Result<()> {
    if let Some(device) = arguments.status {
        return status(device.as_deref(), json);
    }
    let (Some(Export(export)), Some(device)) = (arguments.volume, arguments.device) else {
        bail!("attach: name a volume and a device");
    };
    let index = kernel::index_of(&device).map_err(anyhow::Error::msg)?;
    let seconds = |span: &Span, what: &str| match span.0.as_secs() {
        0 => Err(anyhow!("{what}: must be a second at least")),
        _ => Ok(span.0),
    };
    let mut plan = Plan {
        index,
        export,
        servers: arguments.to.into_iter().map(|Server(address)| address).collect(),
        timeout: seconds(&arguments.timeout, "--timeout")?,
        dead_timeout: seconds(&arguments.dead_timeout, "--dead-timeout")?,
        block_bytes: arguments.block_size,
        read_only: arguments.read_only,
        strict: arguments.strict,
        keeper: KernelEntropy.next_id(),
    };
    let failed = || device_name(index);
    let mut kernel = Kernel::open().with_context(failed)?;
    let locked = state::lock(index).with_context(|| format!("{}: cannot be kept", failed()))?;
    let Some(_lock) = locked else {
        let by = State::read(index).map_or(String::new(), |state| format!(" ({})", state.pid));
        bail!("{}: another process{by} keeps it; `tidelog attach --status` shows it", failed());
    };
    serve::start_logging(serve::LogFormat::Text);
    let keeper = if kernel.is_connected(index).with_context(failed)? {
        let state = adoptable(&plan)?;
        plan.keeper = hex::decode(&state.keeper)
            .ok()
            .and_then(|id| id.try_into().ok())
            .ok_or_else(|| anyhow!("{}: its state is not readable; {DETACH}", failed()))?;
        Keeper::adopt(plan, kernel, state)?
    } else {
        Keeper::attach(plan, kernel)?
    };
    keeper.keep()
}

const DETACH: &str = "`tidelog detach --force` ends it";

/// What the gone keeper of a device left, where it kept the same volume.
fn adoptable(plan: &Plan) -> Result<State> {
    let index = plan.index;
    let shown = kernel::backend(index).unwrap_or_else(|| "another program's".to_owned());
    if shown != backend_of(&plan.export) {
        let free = (0..16).find(|other| !kernel::attached().contains(other));
        let hint = free.map_or(String::new(), |free| {
            format!("; {} is free", kernel::device_path(free).display())
        });
        bail!("{}: is in use: {shown}{hint}", device_name(index));
    }
    if state::is_detached(index) {
        bail!(
            "{}: was detached, and something still has it open; the kernel ends it after that",
            device_name(index)
        );
    }
    State::read(index)
        .ok_or_else(|| anyhow!("{}: its state is gone from /run; {DETACH}", device_name(index)))
}

/// `tidelog detach`.
pub fn detach(arguments: &DetachArguments, json: bool) -> Result<()> {
    let index = kernel::index_of(&arguments.device).map_err(anyhow::Error::msg)?;
    let mut kernel = Kernel::open().with_context(|| device_name(index))?;
    detach::detach(&mut kernel, index, arguments.force)?;
    if !state::is_kept(index) {
        State::remove(index);
    }
    let text = format!("{}: is detached", device_name(index));
    if json { output::print_json(&json!({ "done": text })) } else { output::print(&text) }
}

fn status(device: Option<&Path>, json: bool) -> Result<()> {
    let mut indices = kernel::attached();
    if let Some(device) = device {
        let index = kernel::index_of(device).map_err(anyhow::Error::msg)?;
        if !indices.contains(&index) {
            bail!("{}: is not attached", device_name(index));
        }
        indices = vec![index];
    }
    let mut states = Vec::new();
    for index in indices {
        let ours = is_ours(kernel::backend(index).as_deref(), state::is_kept(index));
        let Some(mut state) = State::read(index).filter(|_| ours) else { continue };
        if !state::is_kept(index) {
            state.state = "no-keeper".to_owned();
            state.reason = Some(format!(
                "process {} is gone: requests fail for good when the link does; `tidelog attach` \
                 takes the device up again",
                state.pid
            ));
        }
        states.push(state);
    }
    if let (Some(device), true) = (device, states.is_empty()) {
        bail!("device {}: is attached by another program", device.display());
    }
    if json {
        return output::print_json(&json!({ "devices": states }));
    }
    let rows = states.into_iter().map(|state| {
        let size = tidelog::units::ByteSize(state.size_bytes).to_string();
        let reason = state.reason.unwrap_or_default();
        vec![state.device, state.volume, size, state.state, state.since, state.server, reason]
    });
    let header = ["DEVICE", "VOLUME", ">SIZE", "STATE", "SINCE", "SERVER", ""];
    output::print(&output::table(&header, rows.collect(), "nothing is attached"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_and_exports_are_read_as_people_write_them() {
        for (text, address) in [
            ("a.example", "tcp:a.example:10809"),
            ("a.example:10810", "tcp:a.example:10810"),
            ("tcp:10.0.0.1:1", "tcp:10.0.0.1:1"),
            ("[fd00::1]", "tcp:[fd00::1]:10809"),
            ("[fd00::1]:7", "tcp:[fd00::1]:7"),
            ("unix:/run/x", "unix:/run/x"),
        ] {
            assert_eq!(text.parse::<Server>().unwrap().0.to_string(), address);
        }
        for bad in ["", "a:b", ":1", "fd00::1", "a:99999", "unix:"] {
            assert!(bad.parse::<Server>().is_err(), "{bad}");
        }
        for good in ["g/v", "g/v@past"] {
            assert_eq!(good.parse::<Export>().unwrap().0, good);
        }
        for bad in ["g", "g/", "g/v@", "g/v@a@b", "/v", "G/v", "g/v/w"] {
            assert!(bad.parse::<Export>().is_err(), "{bad}");
        }
    }
}
