//! Hosts that name themselves, so that a new connection of one ends its old one first.
//!
//! A host whose connection died sends what was not answered again on a new one. Its old connection
//! may still hold the same requests here, received and not carried out: they must not be carried
//! out after the new ones, or an old write would cover a newer one. (iSCSI calls this the
//! reinstatement of a session.) A host names itself by the option [`super::wire::option::KEEPER`];
//! before its choice of an export is answered, its earlier connection to that export is cut and has
//! come to its end. What was received on it and is answered late, since a peer is away, say, is not
//! waited for: it is in the log already.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::sender::Sender;

/// How long an old connection may take to come to its end before the new one is closed.
const PATIENCE: Duration = Duration::from_secs(15);

/// What a host calls itself: random, made when it attached the device.
pub type KeeperId = [u8; 16];

/// The volume that a connection serves, whoever listens for it.
type Place = (String, KeeperId);

/// The connections of hosts that named themselves.
#[derive(Default)]
pub(super) struct Keepers {
    live: Mutex<HashMap<Place, Arc<Sender>>>,
    left: Condvar,
}

impl std::fmt::Debug for Keepers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keepers")
    }
}

/// A connection's place, free again when dropped.
pub(super) struct Kept<'a> {
    keepers: &'a Keepers,
    place: Place,
}

impl Keepers {
    /// Takes a host's place at an export, after its earlier connection has come to its end; `None`
    /// where that takes too long.
    pub(super) fn succeed(
        &self,
        export: &str,
        keeper: KeeperId,
        sender: &Arc<Sender>,
    ) -> Option<Kept<'_>> {
        self.succeed_within(PATIENCE, export, keeper, sender)
    }

    fn succeed_within(
        &self,
        patience: Duration,
        export: &str,
        keeper: KeeperId,
        sender: &Arc<Sender>,
    ) -> Option<Kept<'_>> {
        let place = (export.to_owned(), keeper);
        let mut live = self.live.lock().expect("no holder panics");
        if let Some(old) = live.get(&place) {
            tracing::info!(%export, "nbd: the host connects anew; its old connection is closed");
            old.cut();
            let there = |live: &mut HashMap<_, _>| live.contains_key(&place);
            let waited = self.left.wait_timeout_while(live, patience, there);
            live = waited.expect("no holder panics").0;
            if live.contains_key(&place) {
                tracing::warn!(%export, "nbd: the host's old connection does not come to its end");
                return None;
            }
        }
        live.insert(place.clone(), Arc::clone(sender));
        Some(Kept { keepers: self, place })
    }
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        self.keepers.live.lock().expect("no holder panics").remove(&self.place);
        self.keepers.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::super::socket::{Socket, Stream};
    use super::*;
    use std::os::unix::net::UnixStream;

    fn connection() -> (Arc<Sender>, UnixStream) {
        let (one, other) = UnixStream::pair().unwrap();
        (Arc::new(Sender::new(Arc::new(Stream::Unix(one)))), other)
    }

    #[test]
    fn a_new_connection_waits_for_the_end_of_the_old_one_of_the_same_host_alone() {
        let keepers = Keepers::default();
        let (old, old_end) = connection();
        let (new, _new_end) = connection();
        let held = keepers.succeed("g/v", [1; 16], &old).unwrap();
        let _others = [
            keepers.succeed("g/v", [2; 16], &new).unwrap(),
            keepers.succeed("g/w", [1; 16], &new).unwrap(),
        ];
        let at_once = Duration::ZERO;
        assert!(keepers.succeed_within(at_once, "g/v", [1; 16], &new).is_none());
        let old_end = Stream::Unix(old_end);
        assert_eq!(old_end.receive(&mut [0]).unwrap(), 0, "the old one is cut");
        old.promise(1);
        old.settle();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| keepers.succeed("g/v", [1; 16], &new).is_some());
            drop(held);
            assert!(waiting.join().unwrap());
        });
    }
}
