//! Connections to volumes and images: who they are of, counted, cut off where they have to go, and
//! kept out while a volume is claimed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::content::volume_record;
use super::engine::Group;
use super::{GroupError, Op, Request};
use crate::units::{LogTime, Lsn, Name, VolumeNumber};

/// What this node itself is called where it has a volume open.
const THIS_NODE: &str = "this node";
/// What it is called while it restores a backup.
const RESTORE: &str = "a restore on this node";
/// And while it reads what a new volume begins with.
const ADOPTION: &str = "its base, read by this node";

/// Ends a client's connection; must not block.
pub type HangUp = Box<dyn Fn() + Send + Sync>;

/// How long clients that are cut off may take to go.
const PATIENCE: Duration = Duration::from_secs(15);

/// A connection to a volume, or to an image of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Where it comes from: an address with its port, or the process behind a Unix socket.
    pub address: String,
    /// Since when it has the volume open, by this node's clock.
    pub since: LogTime,
    /// It cannot write.
    pub read_only: bool,
    /// The image that it has open; none where it is the volume itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Name>,
}

/// The clients of a group.
#[derive(Default)]
pub(super) struct Clients {
    live: Mutex<Live>,
    left: Condvar,
}

#[derive(Default)]
struct Live {
    next: u64,
    known: BTreeMap<u64, Client>,
}

struct Client {
    volume: VolumeNumber,
    host: Host,
    /// Ends its connection.
    hang_up: Option<HangUp>,
    /// No other comes while it is there.
    alone: bool,
}

impl Live {
    /// Those of volumes as they are now, who would notice if these were others.
    fn of_volumes(&self) -> impl Iterator<Item = &Client> {
        self.known.values().filter(|client| client.host.image.is_none())
    }

    fn of_volume(&self, number: VolumeNumber) -> impl Iterator<Item = &Client> {
        self.of_volumes().filter(move |client| client.volume == number)
    }

    fn claimed_by(&self, number: VolumeNumber) -> Option<String> {
        let mut of_volume = self.of_volume(number);
        of_volume.find(|client| client.alone).map(|client| client.host.address.clone())
    }
}

/// A volume whose content is being replaced: while this lives, no host is served it. It counts as a
/// client, so that nothing else changes the volume under it.
pub struct RestoreClaim {
    client: ClientGuard,
    /// It was cut off, by another reign or a command: whoever has it writes no more.
    ended: Arc<AtomicBool>,
}

impl RestoreClaim {
    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

/// Counts a client while it lives.
pub struct ClientGuard {
    group: Arc<Group>,
    number: u64,
    volume: VolumeNumber,
}

impl Group {
    /// Clients of each volume that has any.
    #[must_use]
    pub fn clients(&self) -> Vec<(VolumeNumber, usize)> {
        let live = self.clients.live.lock().expect("no holder panics");
        let mut counts: BTreeMap<VolumeNumber, usize> = BTreeMap::new();
        for client in live.of_volumes() {
            *counts.entry(client.volume).or_default() += 1;
        }
        counts.into_iter().collect()
    }

    /// All connections with the number of their volume, those to images too, oldest first.
    #[must_use]
    pub fn hosts(&self) -> Vec<(VolumeNumber, Host)> {
        let live = self.clients.live.lock().expect("no holder panics");
        live.known.values().map(|client| (client.volume, client.host.clone())).collect()
    }

    /// Counts this node itself as a client of a volume until the guard is dropped. It goes by
    /// itself.
    ///
    /// # Errors
    ///
    /// Where the volume is claimed.
    pub fn client(self: &Arc<Self>, volume: VolumeNumber) -> Result<ClientGuard, GroupError> {
        self.add_client(volume, self.host(THIS_NODE, None), None)
    }

    /// Counts a client of a volume until the guard is dropped, which follows soon where `hang_up`
    /// is called.
    ///
    /// # Errors
    ///
    /// Where the volume is claimed.
    pub fn client_until(
        self: &Arc<Self>,
        volume: VolumeNumber,
        address: &str,
        hang_up: HangUp,
    ) -> Result<ClientGuard, GroupError> {
        self.add_client(volume, self.host(address, None), Some(hang_up))
    }

    /// Claims a volume that no client has open, to replace what it holds.
    ///
    /// # Errors
    ///
    /// Where clients have it open, or a restore does.
    pub fn claim_for_restore(
        self: &Arc<Self>,
        volume: VolumeNumber,
    ) -> Result<RestoreClaim, GroupError> {
        self.check_unclaimed(volume)?;
        let host = self.host(RESTORE, None);
        let clients = {
            let mut live = self.clients.live.lock().expect("no holder panics");
            let clients = live.of_volume(volume).count();
            if clients == 0 {
                return Ok(self.insert_claim(&mut live, volume, host));
            }
            clients
        };
        let (name, group) = (self.name_of(volume), self.name());
        Err(self.refused(format!(
            "volume {name}: {clients} clients are connected, and would see it change under them; \
             disconnect them first (`tidelog status {group}`)"
        )))
    }

    /// Claims a volume that is being made, for what it begins with. May be called with the group's
    /// own lock.
    pub(super) fn claim_to_adopt(self: &Arc<Self>, volume: VolumeNumber) -> RestoreClaim {
        let host = self.host(ADOPTION, None);
        let mut live = self.clients.live.lock().expect("no holder panics");
        self.insert_claim(&mut live, volume, host)
    }

    fn insert_claim(
        self: &Arc<Self>,
        live: &mut Live,
        volume: VolumeNumber,
        host: Host,
    ) -> RestoreClaim {
        let ended = Arc::new(AtomicBool::new(false));
        let end = ended.clone();
        let hang_up: HangUp = Box::new(move || end.store(true, Ordering::Release));
        let client = Client { volume, host, hang_up: Some(hang_up), alone: true };
        RestoreClaim { client: self.insert(live, client), ended }
    }

    /// Ends the reading of what a volume is to begin with, so that it may be removed; whether that
    /// is all that has it open.
    pub fn end_adoption(&self, volume: VolumeNumber) -> bool {
        let live = self.clients.live.lock().expect("no holder panics");
        let mut adoptions = live.of_volume(volume).filter(|it| it.host.address == ADOPTION);
        adoptions.next().and_then(|client| client.hang_up.as_ref()).map(|end| end()).is_some()
    }

    /// Appends for who claimed the volume.
    ///
    /// # Errors
    ///
    /// As of [`Group::append`], and where the claim was cut off.
    pub fn append_claimed(&self, claim: &RestoreClaim, op: Op<'_>) -> Result<(), GroupError> {
        self.check_goes_on(claim)?;
        let request = Request { volume: claim.client.volume, op, fua: false };
        let results = self.append_until(&[request], &|| claim.has_ended());
        results.into_iter().try_for_each(|result| match result {
            Ok(_) => Ok(()),
            Err(error) => self.check_goes_on(claim).and(Err(error)),
        })
    }

    pub(super) fn check_goes_on(&self, claim: &RestoreClaim) -> Result<(), GroupError> {
        if !claim.has_ended() {
            return Ok(());
        }
        let name = self.name_of(claim.client.volume);
        Err(self.refused(format!(
            "volume {name}: what was written into it was cut off, by a command or by another \
             reign; begin again"
        )))
    }

    /// Says in the log, durably, that what follows replaces what the claimed volume holds: hosts
    /// that come later tell it from what they have seen before, and are served it once that has
    /// ended ([`Group::end_restore`]).
    ///
    /// # Errors
    ///
    /// Where the volume is gone, or this node is not the primary; what the disk says.
    pub fn begin_restore(&self, claim: &RestoreClaim) -> Result<(), GroupError> {
        self.note_restore(claim, true).map(drop)
    }

    /// Says in the log that all of a restore is there, and waits as a host's flush does: until that
    /// is durable here, and on the peers that a flush waits for.
    ///
    /// # Errors
    ///
    /// As of [`Group::begin_restore`].
    pub fn end_restore(&self, claim: &RestoreClaim) -> Result<(), GroupError> {
        let end = self.note_restore(claim, false)?;
        self.wait_durable(end, &|| self.check_goes_on(claim))
    }

    fn note_restore(&self, claim: &RestoreClaim, restoring: bool) -> Result<Lsn, GroupError> {
        self.append_control_with(|core| {
            if claim.has_ended() {
                return Err(self.refused("what was written into a volume was cut off; begin again"));
            }
            let number = claim.client.volume;
            let mut volumes = core.view.volumes.iter();
            let volume = volumes.find(|known| known.number == number).cloned();
            let mut volume = volume.ok_or_else(|| self.no_volume(number))?;
            volume.restoring = restoring;
            if restoring {
                volume.restore_lsn = Some(core.writer.head());
            }
            Ok(volume_record(volume, false))
        })
    }

    /// Whether hosts may have a volume open.
    ///
    /// # Errors
    ///
    /// Where it is claimed.
    pub fn check_unclaimed(&self, volume: VolumeNumber) -> Result<(), GroupError> {
        // Not together with the group's own lock, under which clients are counted.
        let by = self.clients.live.lock().expect("no holder panics").claimed_by(volume);
        by.map_or(Ok(()), |by| Err(self.claimed(volume, &by)))
    }

    fn claimed(&self, volume: VolumeNumber, by: &str) -> GroupError {
        let (name, group) = (self.name_of(volume), self.name());
        let what = if by == ADOPTION { "its base is written" } else { "a restore writes" };
        self.refused(format!(
            "volume {name}: {what} into it, and no host is served it meanwhile; `tidelog status \
             {group}` shows it until it has ended"
        ))
    }

    fn name_of(&self, number: VolumeNumber) -> String {
        let view = self.control();
        let known = view.volumes.iter().find(|known| known.number == number);
        known.map_or_else(|| format!("number {number}"), |known| known.name.to_string())
    }

    /// Shows a client of an image's volume until the guard is dropped. It is in nobody's way.
    #[must_use]
    pub fn image_client(
        self: &Arc<Self>,
        volume: VolumeNumber,
        image: &Name,
        address: &str,
    ) -> ClientGuard {
        let host = self.host(address, Some(image.clone()));
        let mut live = self.clients.live.lock().expect("no holder panics");
        self.insert(&mut live, Client { volume, host, hang_up: None, alone: false })
    }

    fn host(&self, address: &str, image: Option<Name>) -> Host {
        let since = self.context.env.clock.wall();
        Host { address: address.to_owned(), since, read_only: image.is_some(), image }
    }

    fn add_client(
        self: &Arc<Self>,
        volume: VolumeNumber,
        host: Host,
        hang_up: Option<HangUp>,
    ) -> Result<ClientGuard, GroupError> {
        let by = {
            let mut live = self.clients.live.lock().expect("no holder panics");
            let Some(by) = live.claimed_by(volume) else {
                let client = Client { volume, host, hang_up, alone: false };
                return Ok(self.insert(&mut live, client));
            };
            by
        };
        Err(self.claimed(volume, &by))
    }

    fn insert(self: &Arc<Self>, live: &mut Live, client: Client) -> ClientGuard {
        let (number, volume) = (live.next, client.volume);
        live.next += 1;
        live.known.insert(number, client);
        ClientGuard { group: self.clone(), number, volume }
    }

    /// Cuts off all clients that can be, and waits until they are gone, or for a while.
    pub(super) fn disconnect_clients(&self) {
        let live = self.clients.live.lock().expect("no holder panics");
        for hang_up in live.of_volumes().filter_map(|client| client.hang_up.as_ref()) {
            hang_up();
        }
        let cut_off = |live: &mut Live| live.of_volumes().any(|client| client.hang_up.is_some());
        let waited = self.clients.left.wait_timeout_while(live, PATIENCE, cut_off);
        drop(waited.expect("no holder panics"));
    }
}

impl Drop for ClientGuard {
    fn drop(&mut self) {
        let was_last = {
            let mut live = self.group.clients.live.lock().expect("no holder panics");
            let gone = live.known.remove(&self.number);
            gone.is_some_and(|client| client.host.image.is_none())
                && live.of_volumes().next().is_none()
        };
        self.group.clients.left.notify_all();
        if was_last {
            // Somebody may wait for that: a group with clients yields to nobody.
            self.group.notify();
        }
    }
}
