//! What one peer, or one address of strangers, may take of this node.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of a call's or an answer's body.
pub(super) const BODY_BYTES_MAX: usize = 16 << 20;
/// Bodies that may be unfinished at the same time on a connection.
const BODIES_MAX: usize = 64;
/// Calls of a connection that are served at the same time.
pub(super) const CALLS_MAX: usize = 32;
/// Bytes of a peer's frames that may wait to be handled. Its connections are not read meanwhile.
pub(super) const ROOM_BYTES: usize = 4 << 20;
/// What the smallest frame counts for: the memory of its message, or of the job that it causes.
const FRAME_BYTES_MIN: usize = 256;
/// Handshakes of strangers that are served at the same time.
const HANDSHAKES_MAX: usize = 64;
/// Those of one address.
const HANDSHAKES_OF_ADDRESS_MAX: usize = 8;

/// A part of a peer's room: free again when this is dropped.
pub(super) type Room = Arc<OwnedSemaphorePermit>;

/// Waits until a peer's room has space for a frame.
pub(super) async fn room_for(peer: &Arc<Semaphore>, payload_bytes: usize) -> Option<Room> {
    let bytes = payload_bytes.clamp(FRAME_BYTES_MIN, ROOM_BYTES) as u32;
    Arc::clone(peer).acquire_many_owned(bytes).await.ok().map(Arc::new)
}

/// What a connection's calls may take while they are served.
pub(super) struct Calls {
    count: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
}

impl Default for Calls {
    fn default() -> Calls {
        Calls {
            count: Arc::new(Semaphore::new(CALLS_MAX)),
            bytes: Arc::new(Semaphore::new(BODY_BYTES_MAX)),
        }
    }
}

impl Calls {
    /// A place for one call; none where too many are served. Waiting would hold up what the calls
    /// that are served may be waiting for.
    pub(super) fn admit(&self, body_bytes: usize) -> Option<[OwnedSemaphorePermit; 2]> {
        let bytes = u32::try_from(body_bytes).ok()?;
        let count = Arc::clone(&self.count).try_acquire_owned().ok()?;
        let bytes = Arc::clone(&self.bytes).try_acquire_many_owned(bytes).ok()?;
        Some([count, bytes])
    }
}

/// Bodies of calls and answers that have not ended, by (id, is an answer).
#[derive(Default)]
pub(super) struct Bodies {
    parts: HashMap<(u64, bool), Vec<u8>>,
    bytes: usize,
}

impl Bodies {
    /// Adds a part that is not the last.
    pub(super) fn add(&mut self, id: u64, answer: bool, part: &[u8]) -> Result<(), String> {
        self.bytes += part.len();
        if self.bytes > BODY_BYTES_MAX {
            return Err(format!("bodies of more than {BODY_BYTES_MAX} bytes"));
        }
        self.parts.entry((id, answer)).or_default().extend_from_slice(part);
        if part.is_empty() || self.parts.len() > BODIES_MAX {
            return Err(format!("an empty part of a body, or more than {BODIES_MAX} bodies"));
        }
        Ok(())
    }

    /// The whole body, with its last part.
    pub(super) fn finish(&mut self, id: u64, answer: bool, last: Vec<u8>) -> Vec<u8> {
        match self.parts.remove(&(id, answer)) {
            Some(mut body) => {
                self.bytes -= body.len();
                body.extend_from_slice(&last);
                body
            }
            None => last,
        }
    }
}

/// Handshakes that go on, by address.
#[derive(Default)]
pub(super) struct Handshakes {
    going: Mutex<HashMap<IpAddr, usize>>,
}

/// One handshake that goes on.
pub(super) struct Handshake {
    all: Arc<Handshakes>,
    address: IpAddr,
}

impl Handshakes {
    /// Begins one, unless all of them or those of this address are too many.
    pub(super) fn begin(self: &Arc<Self>, address: IpAddr) -> Option<Handshake> {
        let address = share_of(address);
        let mut going = self.going.lock().expect("no holder panics");
        if going.values().sum::<usize>() >= HANDSHAKES_MAX {
            return None;
        }
        let own = going.entry(address).or_default();
        if *own >= HANDSHAKES_OF_ADDRESS_MAX {
            return None;
        }
        *own += 1;
        Some(Handshake { all: Arc::clone(self), address })
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let mut going = self.all.going.lock().expect("no holder panics");
        if let Some(own) = going.get_mut(&self.address) {
            *own -= 1;
            if *own == 0 {
                going.remove(&self.address);
            }
        }
    }
}

/// What counts as one address: of IPv6 the network of 64 bits, which one host has whole.
fn share_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4(v4),
        IpAddr::V6(v6) => {
            let mut segments = v6.segments();
            segments[4..].fill(0);
            IpAddr::from(segments)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_cannot_take_all_handshakes() {
        let handshakes = Arc::new(Handshakes::default());
        let loud: IpAddr = "2001:db8::1".parse().unwrap();
        let same_network: IpAddr = "2001:db8::ffff:2".parse().unwrap();
        let own: Vec<_> = std::iter::from_fn(|| handshakes.begin(loud)).take(1000).collect();
        assert_eq!(own.len(), HANDSHAKES_OF_ADDRESS_MAX);
        assert!(handshakes.begin(same_network).is_none());
        assert!(handshakes.begin("192.0.2.1".parse().unwrap()).is_some());
        drop(own);
        assert!(handshakes.begin(loud).is_some());
        assert!(handshakes.going.lock().unwrap().is_empty(), "nothing is remembered");
    }

    #[test]
    fn all_addresses_together_have_a_bound_too() {
        let handshakes = Arc::new(Handshakes::default());
        let began: Vec<_> =
            (0..1000u32).filter_map(|n| handshakes.begin(IpAddr::V4(n.into()))).collect();
        assert_eq!(began.len(), HANDSHAKES_MAX);
    }

    #[test]
    fn unfinished_bodies_are_bounded_in_number_and_bytes() {
        let mut bodies = Bodies::default();
        assert!((0..1000).any(|id| bodies.add(id, false, b"x").is_err()), "many small ones");
        let mut bodies = Bodies::default();
        assert!((0..1000).any(|id| bodies.add(id, false, b"").is_err()), "many empty ones");
        let mut bodies = Bodies::default();
        let part = vec![0; 1 << 20];
        assert!((0..1000).any(|_| bodies.add(1, false, &part).is_err()), "a long one");
        let mut bodies = Bodies::default();
        for id in 0..1000 {
            bodies.add(id, true, b"ab").unwrap();
            assert_eq!(bodies.finish(id, true, b"c".to_vec()), b"abc");
        }
    }

    #[test]
    fn calls_are_bounded_in_number_and_bytes() {
        let calls = Calls::default();
        let admitted: Vec<_> = (0..1000).filter_map(|_| calls.admit(100)).collect();
        assert_eq!(admitted.len(), CALLS_MAX);
        drop(admitted);
        let large = calls.admit(BODY_BYTES_MAX).expect("one that is as long as it may be");
        assert!(calls.admit(1).is_none());
        drop(large);
        assert!(calls.admit(1).is_some());
    }

    #[tokio::test]
    async fn a_peer_waits_where_its_frames_are_not_handled() {
        let peer = Arc::new(Semaphore::new(ROOM_BYTES));
        let mut waiting = Vec::new();
        for _ in 0..ROOM_BYTES / FRAME_BYTES_MIN {
            waiting.push(room_for(&peer, 1).await.unwrap());
        }
        let mut next = std::pin::pin!(tokio::task::unconstrained(room_for(&peer, 1)));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(next.as_mut().poll(&mut context).is_pending());
        waiting.pop();
        assert!(next.as_mut().poll(&mut context).is_ready());
    }
}
