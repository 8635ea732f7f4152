//! `tidelog peer …`, `replicate`, `pause`, `resume`.

use std::io::Read;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;

use tidelog::control::api::{Done, Invite, Joined, Peers, Rotated, Status};
use tidelog::units::{Name, Span};

use super::{Session, output};

#[derive(Subcommand)]
pub enum PeerCommand {
    /// Print a one-time token and this node's address, for `tidelog peer join` on another node
    Invite,
    /// Pair with the node that gave a token
    Join {
        /// The token; - reads it from standard input
        #[arg(value_name = "TOKEN|-", allow_hyphen_values = true)]
        token: String,
        /// Address of the node that gave it
        #[arg(long, value_name = "HOST:PORT")]
        address: String,
    },
    /// List the peers
    List,
    /// Give this node a new key; all peers must be connected, and learn of it first
    Rotate,
    /// Forget a peer
    Remove {
        /// The peer
        peer: Name,
    },
}

/// Replicate a group to a peer, change how, or stop
#[derive(Args)]
pub struct ReplicateArguments {
    /// The group
    group: Name,
    /// The peer that gets a copy
    #[arg(long, value_name = "PEER", required_unless_present = "stop")]
    to: Option<Name>,
    /// When a write is answered
    #[arg(long, value_enum, conflicts_with = "stop")]
    mode: Option<ModeArgument>,
    /// What hosts do while the peer is away, where the mode has them wait for it
    #[arg(long, value_enum, conflicts_with = "stop")]
    on_loss: Option<OnLossArgument>,
    /// The age that the copy may have before it counts as behind
    #[arg(long, value_name = "DURATION", conflicts_with = "stop")]
    rpo: Option<Span>,
    /// Stop replicating; the copy on the peer is retired
    #[arg(long)]
    stop: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum ModeArgument {
    /// When it is in the local log
    Async,
    /// When the peer holds it in memory too
    Receive,
    /// As `receive`; and a flush when it is durable on the peer too
    Sync,
}

#[derive(Clone, Copy, ValueEnum)]
enum OnLossArgument {
    /// They go on, and status says that the group is degraded
    Continue,
    /// They wait
    Block,
}

/// Pause replication of a group
#[derive(Args)]
pub struct PauseArguments {
    /// The group
    group: Name,
    /// Only with this peer
    #[arg(long)]
    peer: Option<Name>,
}

/// Go on replicating a group
#[derive(Args)]
pub struct ResumeArguments {
    /// The group
    group: Name,
    /// Only with this peer
    #[arg(long)]
    peer: Option<Name>,
}

pub async fn peer(session: &Session, command: PeerCommand) -> Result<()> {
    match command {
        PeerCommand::Invite => {
            let show = |invite: Invite| {
                format!(
                    "{}\n\non the other node, within 15 minutes:\n  tidelog peer join {} --address {}",
                    invite.token, invite.token, invite.address
                )
            };
            session.ask("POST", "/v1/peers/invite", None, show).await
        }
        PeerCommand::Join { token, address } => {
            let token = if token == "-" { read_token()? } else { token };
            let body = json!({ "token": token, "address": address });
            let show = |joined: Joined| format!("peer {}: joined", joined.name);
            session.ask("POST", "/v1/peers/join", Some(body), show).await
        }
        PeerCommand::List => session.ask("GET", "/v1/peers", None, show_list).await,
        PeerCommand::Rotate => {
            let show = |rotated: Rotated| format!("new key, fingerprint {}", rotated.fingerprint);
            session.ask("POST", "/v1/peers/rotate", None, show).await
        }
        PeerCommand::Remove { peer } => {
            let path = format!("/v1/peers/{peer}");
            session.ask("DELETE", &path, None, |done: Done| done.done).await
        }
    }
}

fn read_token() -> Result<String> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .context("token: could not be read from standard input")?;
    Ok(text.trim().to_owned())
}

fn show_list(peers: Peers) -> String {
    let rows = peers.peers.iter().map(|peer| {
        let heard = peer.heard_seconds.map(|heard| format!("{} ago", output::seconds(heard)));
        vec![
            peer.name.to_string(),
            peer.link_state.clone(),
            heard.unwrap_or_else(|| "never".to_owned()),
            peer.address.clone().unwrap_or_else(|| "not dialled".to_owned()),
            output::time(peer.paired),
            peer.link_state_reason.clone().unwrap_or_default(),
        ]
    });
    output::table(
        &["PEER", "LINK", ">HEARD", "ADDRESS", "PAIRED", "REASON"],
        rows.collect(),
        "no peers; `tidelog peer invite` on one node and `tidelog peer join` on the other pair them",
    )
}

pub async fn replicate(session: &Session, arguments: &ReplicateArguments) -> Result<()> {
    let path = format!("/v1/groups/{}/replicate", arguments.group);
    let show = |done: Done| done.done;
    if arguments.stop {
        let path = match &arguments.to {
            Some(peer) => format!("{path}?peer={peer}"),
            None => path,
        };
        return session.ask("DELETE", &path, None, show).await;
    }
    let mode = arguments.mode.and_then(|mode| mode.to_possible_value());
    let on_loss = arguments.on_loss.and_then(|on_loss| on_loss.to_possible_value());
    let body = json!({
        "peer": arguments.to,
        "mode": mode.map(|mode| mode.get_name().to_owned()),
        "on_loss": on_loss.map(|on_loss| on_loss.get_name().to_owned()),
        "rpo": arguments.rpo,
    });
    session.ask("POST", &path, Some(body), show).await?;
    match &arguments.to {
        Some(peer) if output::is_terminal() && !session.json => {
            show_first_copy(session, &arguments.group, peer).await
        }
        _ => Ok(()),
    }
}

/// Shows how far the first copy is, until it streams or stops.
async fn show_first_copy(session: &Session, group: &Name, peer: &Name) -> Result<()> {
    let bar = output::ProgressLine::new();
    let mut ticks = tokio::time::interval(std::time::Duration::from_millis(200));
    loop {
        ticks.tick().await;
        let status: Status = session.client.get(&format!("/v1/status?group={group}")).await?;
        let Some(group) = status.groups.first() else { break };
        let Some(peer) = group.peers.iter().find(|known| known.name == peer.as_str()) else {
            break;
        };
        let head = group.log.head_lsn.0;
        bar.show(head.saturating_sub(peer.behind_bytes.unwrap_or(head)), head);
        if !matches!(peer.replication_state.as_str(), "idle" | "catching-up")
            || peer.link_state == "standalone"
        {
            break;
        }
    }
    bar.clear();
    Ok(())
}

pub async fn pause(session: &Session, arguments: &PauseArguments) -> Result<()> {
    set_paused(session, "pause", &arguments.group, arguments.peer.as_ref()).await
}

pub async fn resume(session: &Session, arguments: &ResumeArguments) -> Result<()> {
    set_paused(session, "resume", &arguments.group, arguments.peer.as_ref()).await
}

async fn set_paused(
    session: &Session,
    what: &str,
    group: &Name,
    peer: Option<&Name>,
) -> Result<()> {
    let path = format!("/v1/groups/{group}/{what}");
    session.ask("POST", &path, Some(json!({ "peer": peer })), |done: Done| done.done).await
}
