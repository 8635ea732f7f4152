//! `tidelog volume …`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Subcommand;
use serde_json::json;

use tidelog::control::api::{Done, Host, VolumeInfo, Volumes};
use tidelog::units::{ByteSize, Name};

use super::arguments::Member;
use super::progress::{ticket, with_progress};
use super::{Session, output};

#[derive(Subcommand)]
pub enum VolumeCommand {
    /// Make a volume
    Create {
        /// GROUP/VOLUME
        volume: Member,
        /// Its size, such as 10G; a multiple of 4096 bytes. With --base that of PATH if left out
        #[arg(long, required_unless_present = "base")]
        size: Option<ByteSize>,
        /// Begin with a copy of this file or block device (of the primary's machine; raw, not
        /// qcow2), to which nobody writes meanwhile. It goes through the log, as all writes do.
        /// Until all of it is there no host is served the volume, and no backup of the group is
        /// made, but by jobs that name other volumes; `volume delete` ends it
        #[arg(long, value_name = "PATH")]
        base: Option<PathBuf>,
    },
    /// List the volumes
    List {
        /// Only of this group
        group: Option<Name>,
    },
    /// Show a volume
    Show {
        /// GROUP/VOLUME
        volume: Member,
    },
    /// Change a volume's size
    Resize {
        /// GROUP/VOLUME
        volume: Member,
        /// Its new size; a multiple of 4096 bytes
        #[arg(long)]
        size: ByteSize,
    },
    /// Delete a volume; images of moments before still show it
    Delete {
        /// GROUP/VOLUME
        volume: Member,
    },
}

fn path(volume: &Member) -> String {
    format!("/v1/groups/{}/volumes/{}", volume.group, volume.name)
}

pub async fn volume(session: &Session, command: VolumeCommand) -> Result<()> {
    match command {
        VolumeCommand::Create { volume, size, base } => {
            let path = format!("/v1/groups/{}/volumes", volume.group);
            let mut body = json!({ "name": volume.name });
            if let Some(size) = size {
                body["size_bytes"] = json!(size.0);
            }
            let show = |volume| changed(&volume, "created");
            let Some(base) = base else {
                return session.ask("POST", &path, Some(body), show).await;
            };
            let ticket = ticket();
            let base = std::path::absolute(base)?;
            body["base"] =
                json!(base.to_str().context("--base: is not UTF-8; give it another name")?);
            body["ticket"] = json!(ticket);
            let asking = session.ask("POST", &path, Some(body), show);
            with_progress(session, &format!("/v1/progress/{ticket}"), asking).await
        }
        VolumeCommand::List { group } => {
            let path = group.map_or_else(
                || "/v1/volumes".to_owned(),
                |group| format!("/v1/volumes?group={group}"),
            );
            session.ask("GET", &path, None, show_list).await
        }
        VolumeCommand::Show { volume } => {
            session.ask("GET", &path(&volume), None, |volume| show_one(&volume)).await
        }
        VolumeCommand::Resize { volume, size } => {
            let body = json!({ "size_bytes": size.0 });
            let show = |volume| changed(&volume, "resized");
            session.ask("PATCH", &path(&volume), Some(body), show).await
        }
        VolumeCommand::Delete { volume } => {
            session.ask("DELETE", &path(&volume), None, |done: Done| done.done).await
        }
    }
}

fn changed(volume: &VolumeInfo, what: &str) -> String {
    format!("volume {}: {what}, {}", volume.export, ByteSize(volume.size_bytes))
}

fn show_list(volumes: Volumes) -> String {
    let rows = volumes.volumes.iter().map(|volume| {
        vec![
            volume.export.clone(),
            ByteSize(volume.size_bytes).to_string(),
            volume.clients.to_string(),
            output::word(&volume.role),
            volume.hosts.iter().map(short_host).collect::<Vec<_>>().join(", "),
        ]
    });
    output::table(
        &["VOLUME", ">SIZE", ">CLIENTS", "ROLE", "HOSTS"],
        rows.collect(),
        "no volumes; make one with `tidelog volume create GROUP/VOLUME --size SIZE`",
    )
}

fn short_host(host: &Host) -> String {
    let image = host.image.as_ref().map_or_else(String::new, |image| format!(" (@{image})"));
    format!("{}{image}", host.address)
}

/// A connection, for people: where from, to which image if to one, for how long, and whether it
/// can only read.
pub fn show_host(host: &Host) -> String {
    let read_only = if host.read_only { ", read-only" } else { "" };
    format!("{} since {}{read_only}", short_host(host), output::time(host.since))
}

fn show_one(volume: &VolumeInfo) -> String {
    let hosts = volume.hosts.iter().map(|host| format!("host     {}\n", show_host(host)));
    let hosts: String = hosts.collect();
    let restoring = if volume.restoring {
        "restore  of it, or the reading of its base, has not ended\n"
    } else {
        ""
    };
    format!(
        "volume   {}\nsize     {} ({} bytes)\nblocks   {} bytes\nclients  {}\nrole     {}\n\
         {restoring}{hosts}",
        volume.export,
        ByteSize(volume.size_bytes),
        volume.size_bytes,
        volume.block_size_bytes,
        volume.clients,
        output::word(&volume.role)
    )
}
