//! How many connections a server of this room holds, of whom, and for how long: a caller uses up
//! his own places alone, never the node's descriptors.

use std::collections::HashMap;
use std::convert::Infallible;
use std::hash::Hash;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use axum::serve::Listener;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// How long the request of an open connection may take to come.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Places for connections: so many for all callers, so many for each.
pub(super) struct Places<K> {
    of_all: usize,
    of_each: usize,
    taken: Mutex<HashMap<K, usize>>,
}

/// One place, free again when dropped.
pub(super) struct Place<K: Eq + Hash> {
    all: Arc<Places<K>>,
    caller: K,
}

impl<K: Copy + Eq + Hash> Places<K> {
    pub(super) fn new(of_all: usize, of_each: usize) -> Arc<Places<K>> {
        Arc::new(Places { of_all, of_each, taken: Mutex::default() })
    }

    /// A place for `caller`; none where all of them, or his own, are taken.
    pub(super) fn take(self: &Arc<Self>, caller: K) -> Option<Place<K>> {
        let mut taken = self.taken.lock().expect("no holder panics");
        let own = taken.get(&caller).copied().unwrap_or(0);
        if own >= self.of_each || taken.values().sum::<usize>() >= self.of_all {
            return None;
        }
        taken.insert(caller, own + 1);
        Some(Place { all: Arc::clone(self), caller })
    }
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = self.all.taken.lock().expect("no holder panics");
        if let Some(own) = taken.get_mut(&self.caller) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.caller);
            }
        }
    }
}

/// A connection that is served.
pub(super) struct Admitted<K: Eq + Hash, A> {
    /// What it takes.
    pub(super) place: Place<K>,
    /// How long the head of its request may take to come whole.
    pub(super) request_timeout: Duration,
    /// How long the connection may last.
    pub(super) lifetime: Duration,
    /// Answers its request.
    pub(super) answer: A,
}

/// Serves one request of each connection that `admit` has a place for, and closes the others at
/// once, until it is told to stop; then until the last answer was sent.
pub(super) async fn serve<L, K, A, F>(
    mut listener: L,
    stopped: watch::Receiver<bool>,
    admit: impl Fn(&L::Io, &L::Addr) -> Option<Admitted<K, A>>,
) where
    L: Listener,
    K: Eq + Hash + Send + 'static,
    A: Fn(Request) -> F + Send + 'static,
    F: Future<Output = Response> + Send + 'static,
{
    let mut open = JoinSet::new();
    loop {
        let (stream, from) = tokio::select! {
            accepted = listener.accept() => accepted,
            () = told_to_stop(stopped.clone()) => break,
            Some(_) = open.join_next() => continue,
        };
        let Some(Admitted { place, request_timeout, lifetime, answer }) = admit(&stream, &from)
        else {
            continue;
        };
        let stopped = stopped.clone();
        open.spawn(async move {
            let _place = place;
            let served = serve_one(stream, request_timeout, answer, stopped);
            match tokio::time::timeout(lifetime, served).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "control: a connection was lost"),
                Err(_) => tracing::debug!("control: a connection lasted too long"),
            }
        });
    }
    drop(listener);
    while open.join_next().await.is_some() {}
}

async fn serve_one<A, F>(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    request_timeout: Duration,
    answer: A,
    stopped: watch::Receiver<bool>,
) -> hyper::Result<()>
where
    A: Fn(Request) -> F,
    F: Future<Output = Response>,
{
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let answered = answer(request.map(Body::new));
        async move { Ok::<_, Infallible>(answered.await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .header_read_timeout(request_timeout)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        served = connection.as_mut() => served,
        () = told_to_stop(stopped) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    }
}

pub(super) async fn told_to_stop(mut stopped: watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::response::IntoResponse;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{UnixListener, UnixStream};
    use tokio::sync::Notify;

    #[test]
    fn one_caller_cannot_take_all_places() {
        let places = Places::new(10, 4);
        let loud: Vec<_> = std::iter::from_fn(|| places.take(1)).take(100).collect();
        assert_eq!(loud.len(), 4);
        let others: Vec<_> = (2..100).filter_map(|caller| places.take(caller)).collect();
        assert_eq!(others.len(), 6, "all have a bound too");
        drop(loud);
        assert!(places.take(200).is_some());
        drop(others);
        assert!(places.taken.lock().unwrap().is_empty(), "nothing is remembered");
    }

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";

    /// A server that answers `ok`, and a connection to it. It notifies `asked`, and waits for `go`.
    async fn server(
        dir: &tempfile::TempDir,
        (request_timeout, lifetime): (Duration, Duration),
        asked: &Arc<Notify>,
        go: &Arc<Notify>,
    ) -> (watch::Sender<bool>, tokio::task::JoinHandle<()>, UnixStream) {
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let (stop, stopped) = watch::channel(false);
        let places = Places::new(8, 8);
        let (asked, go) = (Arc::clone(asked), Arc::clone(go));
        let admit = move |_: &UnixStream, _: &_| {
            let (asked, go) = (Arc::clone(&asked), Arc::clone(&go));
            let answer = move |_| {
                let (asked, go) = (Arc::clone(&asked), Arc::clone(&go));
                async move {
                    asked.notify_one();
                    go.notified().await;
                    "ok".into_response()
                }
            };
            Some(Admitted { place: places.take(0)?, request_timeout, lifetime, answer })
        };
        let task = tokio::spawn(serve(listener, stopped, admit));
        (stop, task, UnixStream::connect(path).await.unwrap())
    }

    async fn ends(mut client: UnixStream) -> Vec<u8> {
        let mut rest = Vec::new();
        let read = client.read_to_end(&mut rest);
        tokio::time::timeout(Duration::from_secs(30), read).await.expect("it ends").unwrap();
        rest
    }

    #[tokio::test]
    async fn a_connection_without_a_whole_request_ends() {
        let soon = Duration::from_millis(100);
        // Nothing, half a head, and a request after which nothing comes.
        for sent in [&b""[..], &REQUEST[..20], REQUEST] {
            let dir = tempfile::tempdir().unwrap();
            let (asked, go) = (Arc::default(), Arc::new(Notify::new()));
            go.notify_one();
            let (_stop, _task, mut client) = server(&dir, (soon, Duration::MAX), &asked, &go).await;
            client.write_all(sent).await.unwrap();
            let answered = ends(client).await;
            assert_eq!(answered.ends_with(b"ok"), sent == REQUEST, "{answered:?}");
        }
    }

    #[tokio::test]
    async fn a_connection_lasts_no_longer_than_it_may() {
        let (long, short) = (Duration::from_secs(3600), Duration::from_millis(100));
        let (asked, never) = (Arc::default(), Arc::default());
        // One that says nothing, and one whose answer does not come.
        for sent in [&b""[..], REQUEST] {
            let dir = tempfile::tempdir().unwrap();
            let (_stop, _task, mut client) = server(&dir, (long, short), &asked, &never).await;
            client.write_all(sent).await.unwrap();
            assert_eq!(ends(client).await, b"");
        }
    }

    #[tokio::test]
    async fn a_server_that_stops_ends_with_its_last_answer() {
        let dir = tempfile::tempdir().unwrap();
        let long = Duration::from_secs(3600);
        let (asked, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (stop, task, mut client) = server(&dir, (long, long), &asked, &go).await;
        client.write_all(REQUEST).await.unwrap();
        asked.notified().await;
        stop.send(true).unwrap();
        // It has heard of that when nobody is let in any more.
        while UnixStream::connect(dir.path().join("s")).await.is_ok() {
            tokio::task::yield_now().await;
        }
        go.notify_one();
        assert!(ends(client).await.ends_with(b"ok"));
        tokio::time::timeout(Duration::from_secs(30), task).await.expect("it ends").unwrap();
    }
}
