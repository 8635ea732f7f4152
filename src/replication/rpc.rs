//! Calls over the peer link: a method by name, JSON in, JSON or a line of text out.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::oneshot;

use crate::units::{Name, NodeId};

use super::bounds::BODY_BYTES_MAX;
use super::core::ConnId;
use super::link::Conn;
use super::pairing::Fingerprint;
use super::service::{Answered, Replication, ReplicationError, Shared};
use super::wire::Message;

/// Bytes of a body that go with one message.
const PART_BYTES: usize = 128 * 1024;

/// A future on the heap, as handlers return it.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Who calls.
#[derive(Clone, Debug)]
pub struct PeerContext {
    /// The peer.
    pub node: NodeId,
    /// Its name here.
    pub name: Name,
    /// The key that it shows.
    pub(super) key: Fingerprint,
}

/// What answers a method.
pub type Handler =
    Arc<dyn Fn(PeerContext, Value) -> BoxFuture<Result<Value, String>> + Send + Sync>;

impl Replication {
    /// Answers `method` from now on with `handler`. One handler a method: the last one holds.
    pub fn on_call(&self, method: &str, handler: Handler) {
        let mut handlers = self.shared.handlers.write().expect("no holder panics");
        handlers.insert(method.to_owned(), handler);
    }

    /// The same for what waits for a disk or a lock: `handler` runs on a thread that may.
    pub(super) fn on_blocking_call(
        &self,
        method: &str,
        handler: fn(&Shared, &PeerContext, &Value) -> Result<Value, String>,
    ) {
        let shared = Arc::downgrade(&self.shared);
        self.on_call(
            method,
            Arc::new(move |peer, body| {
                let shared = shared.upgrade();
                Box::pin(async move {
                    let shared = shared.ok_or("this node shuts down")?;
                    let work = move || handler(&shared, &peer, &body);
                    tokio::task::spawn_blocking(work)
                        .await
                        .map_err(|_| "this node shuts down".to_owned())?
                })
            }),
        );
    }

    /// Calls a method on a peer and waits for its answer.
    ///
    /// # Errors
    ///
    /// Where the peer is unknown or not connected, it does not begin the call, the link is lost
    /// meanwhile, the time is up, or the handler there failed: its words are in the error.
    pub async fn call(
        &self,
        peer_name: &str,
        method: &str,
        body: Value,
        timeout: Duration,
    ) -> Result<Value, ReplicationError> {
        self.shared.call(peer_name, method, body, timeout).await
    }
}

impl Shared {
    pub(super) async fn call(
        &self,
        peer_name: &str,
        method: &str,
        body: Value,
        timeout: Duration,
    ) -> Result<Value, ReplicationError> {
        let shared = self;
        let peer = shared.peer_named(peer_name)?;
        let failed = |what: String| ReplicationError::Peer { name: peer_name.to_owned(), what };
        let (conn_id, reason) = shared.link_of(peer.node);
        let Some((conn_id, conn)) =
            conn_id.and_then(|conn_id| shared.conn(conn_id).map(|conn| (conn_id, conn)))
        else {
            return Err(ReplicationError::NotConnected { name: peer_name.to_owned(), reason });
        };
        let body = serde_json::to_vec(&body).expect("a JSON value becomes JSON");
        if body.len() > BODY_BYTES_MAX {
            return Err(failed(format!("{method}: a body of {} bytes is too long", body.len())));
        }
        let id = shared.next_number();
        let (answer, answered) = oneshot::channel();
        shared.pending.lock().expect("no holder panics").insert((conn_id, id), answer);
        let forget = Forget { shared, key: (conn_id, id) };
        send_parts(&conn, id, false, &body, |body| Message::Call {
            id,
            method: method.to_owned(),
            body,
        });
        let result = tokio::time::timeout(timeout, answered).await;
        drop(forget);
        let body = match result {
            Err(_) => {
                return Err(ReplicationError::NoAnswer {
                    name: peer_name.to_owned(),
                    method: method.to_owned(),
                    seconds: timeout.as_secs_f64(),
                });
            }
            Ok(Err(_)) => return Err(failed(format!("{method}: the link was lost meanwhile"))),
            Ok(Ok(Answered::Failed(text))) => return Err(failed(text)),
            Ok(Ok(Answered::Declined(what))) => {
                return Err(ReplicationError::Declined { name: peer_name.to_owned(), what });
            }
            Ok(Ok(Answered::Well(body))) => body,
        };
        serde_json::from_slice(&body)
            .map_err(|error| failed(format!("{method}: the answer is not JSON: {error}")))
    }
}

/// Takes an entry out of the pending calls, also where the caller gave up.
struct Forget<'a> {
    shared: &'a Shared,
    key: (ConnId, u64),
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.shared.pending.lock().expect("no holder panics").remove(&self.key);
    }
}

fn send_parts(
    conn: &Conn,
    id: u64,
    answer: bool,
    body: &[u8],
    last_message: impl FnOnce(Vec<u8>) -> Message,
) {
    let mut rest = body;
    while rest.len() > PART_BYTES {
        let (part, behind) = rest.split_at(PART_BYTES);
        conn.send(&Message::Part { id, answer, body: part.to_vec() });
        rest = behind;
    }
    conn.send(&last_message(rest.to_vec()));
}

impl Shared {
    /// The connection to a peer, or why there is none.
    pub(super) fn link_of(&self, node: NodeId) -> (Option<ConnId>, String) {
        let cores = self.cores.lock().expect("no holder panics");
        match cores.get(&node) {
            None => (None, "it is not a peer".to_owned()),
            Some(core) => {
                let reason = core.link_down().map_or(String::new(), |(_, why)| why.to_owned());
                (core.conn(), reason)
            }
        }
    }

    /// Runs the handler of a call that came, and sends its answer.
    pub(super) fn serve_call(
        self: &Arc<Self>,
        conn: &Arc<Conn>,
        id: u64,
        method: String,
        body: Vec<u8>,
    ) {
        let Some(place) = conn.calls.admit(body.len()) else {
            let reason = format!("{method}: too many calls at once; try again");
            return conn.send(&Message::Declined { id, reason });
        };
        let handler = self.handlers.read().expect("no holder panics").get(&method).map(Arc::clone);
        let peer = self.peer(conn.peer);
        let conn = Arc::clone(conn);
        tokio::spawn(async move {
            let _place = place;
            let prepared = || {
                let handler = handler
                    .ok_or_else(|| format!("{method}: this node does not answer that call"))?;
                let peer = peer.ok_or("not a peer any more")?;
                let value: Value = serde_json::from_slice(&body)
                    .map_err(|error| format!("{method}: the body is not JSON: {error}"))?;
                let who = PeerContext { node: peer.node, name: peer.name, key: conn.key };
                Ok::<_, String>((handler, who, value))
            };
            let (handler, who, value) = match prepared() {
                Ok(prepared) => prepared,
                Err(reason) => return conn.send(&Message::Declined { id, reason }),
            };
            // Nobody waits for what a connection that has ended asked for.
            let result = tokio::select! {
                result = handler(who, value) => result,
                () = conn.closed() => return,
            };
            let (mut ok, mut body) = match result {
                Ok(value) => (true, serde_json::to_vec(&value).expect("a JSON value becomes JSON")),
                Err(text) => (false, text.into_bytes()),
            };
            if body.len() > BODY_BYTES_MAX {
                ok = false;
                body = format!("{method}: the answer is too long").into_bytes();
            }
            send_parts(&conn, id, true, &body, |body| Message::Answer { id, ok, body });
        });
    }

    /// Gives an answer to whoever waits for it.
    pub(super) fn answered(&self, conn: ConnId, id: u64, answer: Answered) {
        let waiting = self.pending.lock().expect("no holder panics").remove(&(conn, id));
        if let Some(waiting) = waiting {
            // Fails where the caller gave up.
            let _ = waiting.send(answer);
        }
    }
}
