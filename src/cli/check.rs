//! `tidelog scrub` and `verify`: whether what is on disk is what was written, and what a peer has.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use serde_json::json;

use tidelog::control::api::{
    DamageInfo, Done, ScrubAnswer, ScrubState, ScrubStatus, VerifyState, VerifyStatus,
};
use tidelog::units::{ByteSize, Name};

use super::{Session, output};

/// Read everything that this node has of a group once, and check it, in the background
///
/// The log, the base with its sidecars, and what is kept for older moments are read at a pace that
/// leaves the disk to the hosts. `tidelog status GROUP` shows how far it is and what is damaged.
#[derive(Args)]
pub struct ScrubArguments {
    /// The group
    group: Name,
    /// Wait for the end; the exit status is 1 where something is damaged then, or was not examined
    #[arg(long, conflicts_with = "stop")]
    wait: bool,
    /// Bytes a second at most; by itself it reads 256M, and 32M while hosts write
    #[arg(long, value_name = "SIZE", conflicts_with = "stop")]
    rate: Option<ByteSize>,
    /// Stop the scrub that runs
    #[arg(long)]
    stop: bool,
}

pub async fn scrub(session: &Session, arguments: &ScrubArguments) -> Result<()> {
    let group = &arguments.group;
    let path = format!("/v1/groups/{group}/scrub");
    if arguments.stop {
        return session.ask("DELETE", &path, None, |done: Done| done.done).await;
    }
    let body = arguments.rate.map(|rate| json!({ "rate": rate.to_string() }));
    if !arguments.wait {
        let show = |_: ScrubAnswer| {
            format!("group {group}: a scrub runs; `tidelog status {group}` shows how far it is")
        };
        return session.ask("POST", &path, body, show).await;
    }
    let mut told: ScrubAnswer =
        serde_json::from_value(session.client.call("POST", &path, body).await?)?;
    let bar = output::ProgressLine::new();
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    while let Some(scrub) = told.scrub.as_ref().filter(|s| s.state == ScrubState::Running) {
        bar.show(scrub.done_bytes, scrub.total_bytes);
        ticks.tick().await;
        told = session.client.get(&path).await?;
    }
    bar.clear();
    if session.json {
        output::print_json(&serde_json::to_value(&told)?)?;
    } else if let Some(scrub) = &told.scrub {
        output::print(&format!("group {group}: scrub {}", show_scrub(scrub)))?;
    }
    match (&told.scrub, told.damage.first()) {
        (_, Some(first)) => bail!(
            "group {group}: {} parts are damaged: {}; `tidelog status {group}` names them",
            told.damage.len(),
            first.what
        ),
        (Some(scrub), None) if scrub.state == ScrubState::Done => match not_examined(scrub) {
            None => Ok(()),
            Some(why) => bail!("group {group}: scrub: not all was examined: {why}"),
        },
        _ => bail!("group {group}: the scrub was stopped; `tidelog scrub {group}` begins anew"),
    }
}

/// Why a scrub that came to its end says nothing of a part.
fn not_examined(scrub: &ScrubStatus) -> Option<String> {
    let untold = || {
        let untold = format!("{} parts could not be told beside a fold; scrub again", scrub.untold);
        (scrub.untold > 0).then_some(untold)
    };
    scrub.left_out.clone().or_else(untold)
}

/// A scrub in one line.
pub fn show_scrub(scrub: &ScrubStatus) -> String {
    let found = match (scrub.damaged, scrub.repaired) {
        (0, _) => "nothing damaged".to_owned(),
        (damaged, repaired) => format!("{damaged} parts damaged, {repaired} repaired"),
    };
    let read = ByteSize(scrub.read_bytes);
    let mut text = match scrub.state {
        ScrubState::Running => {
            let total = ByteSize(scrub.total_bytes);
            let age = output::age(scrub.started);
            format!("running: {} of {total}, begun {age}", ByteSize(scrub.done_bytes))
        }
        ScrubState::Done => format!("done {}: read {read}", output::age(scrub.state_since)),
        ScrubState::Stopped => format!("stopped {}: read {read}", output::age(scrub.state_since)),
    };
    if let Some(reason) = &scrub.state_reason {
        text = format!("{text} ({reason})");
    }
    text = format!("{text}; {found}");
    if scrub.skipped_bytes > 0 {
        let skipped = ByteSize(scrub.skipped_bytes);
        text = format!("{text}; {skipped} at the end of the log were not durable, and not read");
    }
    if scrub.untold > 0 {
        text = format!("{text}; {} parts could not be told beside a fold", scrub.untold);
    }
    if let Some(why) = &scrub.left_out {
        text = format!("{text}; {why}");
    }
    text
}

/// A damaged part in one line.
pub fn show_damage(damage: &DamageInfo) -> String {
    let mut text =
        format!("{} (found by {} {})", damage.what, damage.found_by, output::age(damage.since));
    if let Some(why) = &damage.repair {
        text = format!("{text}; not repaired: {why}");
    }
    text
}

/// Compare this node's copy of a group with a peer's at one position, by hashes
///
/// Both nodes open an image and hash it; only hashes go over the link. The exit status is 1 where
/// something differs, or cannot be read on one of them, or one of them does not have all that it is
/// to have: its data failed, or its log is cut off. It goes on when this command is ended:
/// `tidelog status GROUP` shows how far it is.
#[derive(Args)]
pub struct VerifyArguments {
    /// The group
    group: Name,
    /// The peer, where there are several
    #[arg(long)]
    peer: Option<Name>,
}

pub async fn verify(session: &Session, arguments: &VerifyArguments) -> Result<()> {
    let group = &arguments.group;
    let path = format!("/v1/groups/{group}/verify");
    let body = arguments.peer.as_ref().map(|peer| json!({ "peer": peer }));
    let mut told: Option<VerifyStatus> =
        serde_json::from_value(session.client.call("POST", &path, body).await?)?;
    let bar = output::ProgressLine::new();
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    while let Some(verify) = told.as_ref().filter(|v| v.state == VerifyState::Running) {
        bar.show(verify.done_bytes, verify.total_bytes);
        ticks.tick().await;
        told = session.client.get(&path).await?;
    }
    bar.clear();
    let Some(verify) = told else { bail!("group {group}: the node has forgotten the comparison") };
    if session.json {
        output::print_json(&serde_json::to_value(&verify)?)?;
    } else {
        output::print(&format!("group {group}: verify: {}", show_verify(&verify)))?;
    }
    match (verify.state, &verify.left_out) {
        (VerifyState::Equal, None) => Ok(()),
        (VerifyState::Equal, Some(why)) => {
            bail!("group {group}: verify: not all was compared: {why}")
        }
        _ => bail!(
            "group {group}: verify: {}; `tidelog events` says what to do",
            verify.state_reason.as_deref().unwrap_or("the copies are not the same")
        ),
    }
}

/// A comparison in a line, with a line for each extent that differs.
pub fn show_verify(verify: &VerifyStatus) -> String {
    let VerifyStatus { peer, position, .. } = verify;
    let (done, age) = (ByteSize(verify.done_bytes), output::age(verify.state_since));
    let mut text = match verify.state {
        VerifyState::Running => {
            format!("running with {peer}: {done} of {}", ByteSize(verify.total_bytes))
        }
        VerifyState::Equal => format!("{done} equal {peer}'s at lsn:{} ({age})", position.lsn),
        VerifyState::Differs => format!(
            "{} of {done} are not the same as {peer}'s at lsn:{} ({age})",
            ByteSize(verify.differing_bytes),
            position.lsn
        ),
        VerifyState::Failed => format!(
            "failed with {peer}: {} ({age})",
            verify.state_reason.as_deref().unwrap_or("unknown")
        ),
    };
    for extent in verify.extents.iter().take(EXTENTS_SHOWN) {
        text += &format!(
            "\n          {} at {}: {}",
            extent.volume,
            extent.offset,
            ByteSize(extent.length)
        );
        if let Some(node) = &extent.unreadable_on {
            text += &format!(", cannot be read on {node}");
        }
    }
    if let Some(why) = &verify.left_out {
        text += &format!("; {why}");
    }
    if verify.extents.len() > EXTENTS_SHOWN {
        text += &format!("\n          and more; `--json` has {} extents", verify.extents.len());
    }
    text
}

/// Extents that are shown one by one.
const EXTENTS_SHOWN: usize = 8;
