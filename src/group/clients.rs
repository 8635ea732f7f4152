//! Connections to volumes and images: who they are of, counted, and cut off where they have to go.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::engine::Group;
use crate::units::{LogTime, Name, VolumeNumber};

/// What this node itself is called where it has a volume open.
const THIS_NODE: &str = "this node";

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
}

impl Live {
    /// Those of volumes as they are now, who would notice if these were others.
    fn of_volumes(&self) -> impl Iterator<Item = &Client> {
        self.known.values().filter(|client| client.host.image.is_none())
    }
}

/// Counts a client while it lives.
pub struct ClientGuard {
    group: Arc<Group>,
    number: u64,
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
    #[must_use]
    pub fn client(self: &Arc<Self>, volume: VolumeNumber) -> ClientGuard {
        self.add_client(volume, self.host(THIS_NODE, None), None)
    }

    /// Counts a client of a volume until the guard is dropped, which follows soon where `hang_up`
    /// is called.
    #[must_use]
    pub fn client_until(
        self: &Arc<Self>,
        volume: VolumeNumber,
        address: &str,
        hang_up: HangUp,
    ) -> ClientGuard {
        self.add_client(volume, self.host(address, None), Some(hang_up))
    }

    /// Shows a client of an image's volume until the guard is dropped. It is in nobody's way.
    #[must_use]
    pub fn image_client(
        self: &Arc<Self>,
        volume: VolumeNumber,
        image: &Name,
        address: &str,
    ) -> ClientGuard {
        self.add_client(volume, self.host(address, Some(image.clone())), None)
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
    ) -> ClientGuard {
        let mut live = self.clients.live.lock().expect("no holder panics");
        let number = live.next;
        live.next += 1;
        live.known.insert(number, Client { volume, host, hang_up });
        ClientGuard { group: self.clone(), number }
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
