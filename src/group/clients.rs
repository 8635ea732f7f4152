//! Connections to live volumes: counted, and cut off where they have to go.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::engine::Group;
use crate::units::VolumeNumber;

/// Ends a client's connection; must not block.
pub type HangUp = Box<dyn Fn() + Send + Sync>;

/// How long clients that are cut off may take to go.
const PATIENCE: Duration = Duration::from_secs(15);

/// The clients of a group.
#[derive(Default)]
pub(super) struct Clients {
    live: Mutex<Live>,
    left: Condvar,
}

#[derive(Default)]
struct Live {
    next: u64,
    /// The volume of each, and what ends it.
    known: BTreeMap<u64, (VolumeNumber, Option<HangUp>)>,
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
        for (volume, _) in live.known.values() {
            *counts.entry(*volume).or_default() += 1;
        }
        counts.into_iter().collect()
    }

    /// Counts a client of a volume until the guard is dropped. It goes by itself.
    #[must_use]
    pub fn client(self: &Arc<Self>, volume: VolumeNumber) -> ClientGuard {
        self.add_client(volume, None)
    }

    /// Counts a client of a volume until the guard is dropped, which follows soon where `hang_up`
    /// is called.
    #[must_use]
    pub fn client_until(self: &Arc<Self>, volume: VolumeNumber, hang_up: HangUp) -> ClientGuard {
        self.add_client(volume, Some(hang_up))
    }

    fn add_client(self: &Arc<Self>, volume: VolumeNumber, hang_up: Option<HangUp>) -> ClientGuard {
        let mut live = self.clients.live.lock().expect("no holder panics");
        let number = live.next;
        live.next += 1;
        live.known.insert(number, (volume, hang_up));
        ClientGuard { group: self.clone(), number }
    }

    /// Cuts off all clients that can be, and waits until they are gone, or for a while.
    pub(super) fn disconnect_clients(&self) {
        let live = self.clients.live.lock().expect("no holder panics");
        for hang_up in live.known.values().filter_map(|(_, hang_up)| hang_up.as_ref()) {
            hang_up();
        }
        let cut_off = |live: &mut Live| live.known.values().any(|(_, hang_up)| hang_up.is_some());
        let waited = self.clients.left.wait_timeout_while(live, PATIENCE, cut_off);
        drop(waited.expect("no holder panics"));
    }
}

impl Drop for ClientGuard {
    fn drop(&mut self) {
        let was_last = {
            let mut live = self.group.clients.live.lock().expect("no holder panics");
            live.known.remove(&self.number);
            live.known.is_empty()
        };
        self.group.clients.left.notify_all();
        if was_last {
            // Somebody may wait for that: a group with clients yields to nobody.
            self.group.notify();
        }
    }
}
