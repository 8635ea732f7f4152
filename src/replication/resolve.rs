//! The end of a split brain: what each side would keep, and yielding by command.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::group::Discard;
use crate::units::{ByteSize, Lsn, Name};

use super::core::Input;
use super::service::{Replication, ReplicationError};

/// Where this node's history and its peer's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parting {
    /// The peer.
    pub peer: Name,
    /// The last position that both share.
    pub at: Lsn,
    /// Bytes of log behind it that only this node has; they are what yielding keeps as a branch.
    pub local_bytes: u64,
    /// Bytes of log behind it that only the peer has; unknown while it is not connected.
    pub peer_bytes: Option<u64>,
}

impl Replication {
    /// Where a group's histories part, as the peer has told.
    ///
    /// # Errors
    ///
    /// Where the group is unknown, or nothing has parted.
    pub fn parting(&self, group_name: &str) -> Result<Parting, ReplicationError> {
        self.find_parting(group_name).map(|(parting, _)| parting)
    }

    fn find_parting(
        &self,
        group_name: &str,
    ) -> Result<(Parting, super::channel::Parted), ReplicationError> {
        let shared = &self.shared;
        let group = shared.groups.by_name(group_name)?;
        let cores = shared.cores.lock().expect("no holder panics");
        for core in cores.values() {
            let Some(channel) = core.channel(group.id()) else { continue };
            let Some(parted) = channel.parted() else { continue };
            if let Some(other) = &channel.local().follows {
                let peer = core.name();
                return Err(ReplicationError::Refused(format!(
                    "group {group_name}: this node follows {other}, whose history parts from that \
                     of {peer} as its own does: resolve it between those two, by `tidelog resolve \
                     {group_name} --preview` on {peer}"
                )));
            }
            let parting = Parting {
                peer: core.name().clone(),
                at: parted.at,
                local_bytes: channel.local().history.head.bytes_since(parted.at),
                peer_bytes: channel.remote().map(|it| it.history.head.bytes_since(parted.at)),
            };
            return Ok((parting, parted));
        }
        Err(ReplicationError::Refused(format!(
            "group {group_name}: no peer has told of a history that parts from this one; `tidelog \
             status {group_name}` shows the state of replication"
        )))
    }

    /// Has this node yield: what only it has is kept as a branch, and it follows the peer.
    ///
    /// # Errors
    ///
    /// Where nothing has parted, clients are connected, or the base is further.
    pub async fn resolve(&self, group_name: &str) -> Result<Parting, ReplicationError> {
        let (parting, parted) = self.find_parting(group_name)?;
        let shared = Arc::clone(&self.shared);
        let group = shared.groups.by_name(group_name)?;
        let peer = shared.peer_named(parting.peer.as_str())?.node;
        let work = move || {
            group.yield_to(parted.at, parted.chain, Discard::Authored)?;
            shared.input(peer, Input::Yielded { group: group.id() });
            Ok(())
        };
        super::commands::run_blocking(work).await?;
        Ok(parting)
    }
}

impl std::fmt::Display for Parting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Parting { peer, at, local_bytes, peer_bytes } = self;
        write!(
            f,
            "histories part at LSN {at}; only here: {}; only on {peer}: ",
            ByteSize(*local_bytes)
        )?;
        match peer_bytes {
            Some(bytes) => write!(f, "{}", ByteSize(*bytes)),
            None => write!(f, "unknown while it is not connected"),
        }
    }
}
