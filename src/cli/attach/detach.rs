//! The end of a device: by `tidelog detach`, and by its keeper that is told to stop.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::poll::poll;

use tidelog::io::{Clock, SystemClock};

use super::kernel::{self, Kernel, KernelError};
use super::state;

/// How long the kernel may take to end a device.
const PATIENCE: Duration = Duration::from_secs(10);
/// What the kernel's names of our devices begin with.
const OURS: &str = "tidelog ";

pub fn device_name(index: u32) -> String {
    format!("device {}", kernel::device_path(index).display())
}

/// What `/sys/block/nbdN/backend` shows.
pub fn backend_of(export: &str) -> String {
    format!("{OURS}{export}")
}

/// Whether a device was attached by this program, by what `/sys` calls it. Before Linux 5.14 that
/// shows nothing: there it is ours where it is `kept`.
pub fn is_ours(backend: Option<&str>, kept: bool) -> bool {
    backend.map_or(kept, |backend| backend.starts_with(OURS))
}

/// Ends a device, and waits until it is gone.
pub fn detach(kernel: &mut Kernel, index: u32, force: bool) -> Result<()> {
    let failed = || device_name(index);
    if !kernel.is_connected(index).with_context(failed)? {
        return Err(KernelError::NotAttached).with_context(failed);
    }
    let backend = kernel::backend(index);
    if !is_ours(backend.as_deref(), state::is_kept(index)) {
        return Err(anyhow!(foreign(index, backend.as_deref())));
    }
    if !force && kernel::is_held(index).with_context(failed)? {
        bail!(
            "{}: is mounted or held otherwise; unmount it first, or --force fails its requests",
            failed()
        );
    }
    state::mark_detached(index).with_context(|| format!("{}: cannot be detached", failed()))?;
    if let Err(error) = kernel.disconnect(index) {
        state::unmark_detached(index);
        return Err(error).with_context(failed);
    }
    let clock = SystemClock::new();
    let deadline = clock.monotonic() + PATIENCE;
    while !force && kernel.is_connected(index).with_context(failed)? {
        if clock.monotonic() >= deadline {
            bail!("{}: something still has it open; the kernel ends it after that", failed());
        }
        poll(&mut [], 50u16).context("cannot wait")?;
    }
    Ok(())
}

/// Why a device is not detached that another program attached.
fn foreign(index: u32, backend: Option<&str>) -> String {
    let by = backend.map_or(String::new(), |backend| format!(" ({backend})"));
    let device = kernel::device_path(index);
    let device = device.display();
    format!(
        "device {device}: was attached by another program{by}; that one detaches it, or \
         `nbd-client -d {device}`"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_program_attached_is_known_and_left_to_it() {
        for kept in [false, true] {
            assert!(is_ours(Some(&backend_of("g/v")), kept));
            assert!(!is_ours(Some("g/v"), kept));
            assert!(!is_ours(Some("tidelogged"), kept));
            assert_eq!(is_ours(None, kept), kept);
        }
        let said = foreign(3, Some("qemu"));
        assert!(said.starts_with("device /dev/nbd3: was attached by another program (qemu)"));
        assert!(said.ends_with("`nbd-client -d /dev/nbd3`"), "{said}");
    }
}
