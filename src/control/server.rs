//! The HTTP servers: the control socket, with the caller's credentials checked, and the metrics
//! listener.

use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Query, Request};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;
use serde_json::{Map, Value};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};

use crate::config::cause;
use crate::events::Event;
use crate::units::LogTime;

use super::connections::{Admitted, Places, REQUEST_TIMEOUT, serve, told_to_stop};
use super::context::Context;
use super::dispatch::{Caller, dispatch};
use super::metrics::metrics_text;
use super::problem::{PROBLEM_EVENT, Problem};
use super::route::openapi;

/// Bytes of a request's body at most.
const BODY_BYTES_MAX: usize = 1 << 20;
/// A quiet event stream says that it lives this often.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Events that wait for a slow follower before it is cut off.
const FOLLOWER_EVENTS_MAX: usize = 1024;
/// Connections of root and this node's own user. A follower of events holds one.
const OWN_CONNECTIONS_MAX: usize = 64;
/// Connections of all users that the configuration allows, and of each.
const ALLOWED_CONNECTIONS_MAX: usize = 64;
const ALLOWED_USER_CONNECTIONS_MAX: usize = 16;
/// Connections of all other users, who are told that they may not, and of each.
const STRANGERS_MAX: usize = 8;
const STRANGER_CONNECTIONS_MAX: usize = 2;
/// How long a stranger may take to be told.
const STRANGER_LIFETIME: Duration = Duration::from_secs(5);
/// Connections to the metrics listener, and those of one address.
const SCRAPERS_MAX: usize = 64;
const SCRAPER_CONNECTIONS_MAX: usize = 8;
/// How long a scrape may take, the reading of its answer included.
const SCRAPER_LIFETIME: Duration = Duration::from_secs(60);

/// A listener that could not be opened: what, why, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ServerError(String);

impl ServerError {
    fn new(what: impl Into<String>) -> ServerError {
        ServerError(what.into())
    }
}

/// The control socket. It stops when it is told to, and removes its name.
pub struct ControlServer {
    path: PathBuf,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl ControlServer {
    /// Opens the socket and answers on it.
    ///
    /// # Errors
    ///
    /// Where another node answers on the path, or the file system refuses it.
    pub async fn start(context: Arc<Context>) -> Result<ControlServer, ServerError> {
        let (path, shared) = {
            let config = context.config.read().expect("no holder panics");
            (config.control.socket.clone(), !config.control.allow.is_empty())
        };
        let listener = bind(&path, shared).await?;
        let (stop, stopped) = watch::channel(false);
        let places = ControlPlaces::new();
        let admit = move |stream: &UnixStream, _: &_| {
            let uid = stream.peer_cred().ok()?.uid();
            let allow = context.config.read().expect("no holder panics").control.allow.clone();
            let (places, lifetime) = places.of(uid, &allow);
            let Some(place) = places.take(uid) else {
                tracing::debug!(uid, "control socket: too many connections of a user");
                return None;
            };
            let state = ServerState { context: context.clone(), stopped: stopped.clone() };
            let answer = move |request| answer(state.clone(), uid, request);
            Some(Admitted { place, request_timeout: REQUEST_TIMEOUT, lifetime, answer })
        };
        let task = tokio::spawn(serve(listener, stop.subscribe(), admit));
        Ok(ControlServer { path, stop, task })
    }

    /// Lets other users than this node's own reach the socket, or keeps them from it.
    ///
    /// # Errors
    ///
    /// Where its mode cannot be set, or its directory keeps them out nevertheless.
    pub fn share(&self, shared: bool) -> Result<(), ServerError> {
        share(&self.path, shared)
    }

    /// Answers what has been asked, and ends.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        let _ = tokio::time::timeout(Duration::from_secs(5), self.task).await;
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Takes the path. A socket that nobody answers on is a dead node's, and is replaced.
async fn bind(path: &Path, shared: bool) -> Result<UnixListener, ServerError> {
    let failed = |what: &str, error: &std::io::Error| {
        ServerError::new(format!(
            "control socket {}: {what}: {}; give another with socket = under [control]",
            path.display(),
            cause(error)
        ))
    };
    if let Some(directory) = path.parent()
        && !directory.exists()
    {
        let mode = if shared { 0o711 } else { 0o700 };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(directory)
            .map_err(|error| failed("its directory could not be made", &error))?;
    }
    if path.exists() {
        if tokio::net::UnixStream::connect(path).await.is_ok() {
            return Err(ServerError::new(format!(
                "control socket {}: another node answers on it; stop that one, or give another \
                 with socket = under [control]",
                path.display()
            )));
        }
        std::fs::remove_file(path)
            .map_err(|error| failed("could not replace a dead node's", &error))?;
    }
    let listener = UnixListener::bind(path).map_err(|error| failed("could not listen", &error))?;
    set_mode(path, shared).map_err(|error| failed("could not set its mode", &error))?;
    Ok(listener)
}

fn set_mode(path: &Path, shared: bool) -> std::io::Result<()> {
    let mode = if shared { 0o666 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

/// Sets the mode of a socket that is there. Its directory may be anybody's, and stays as it is.
fn share(path: &Path, shared: bool) -> Result<(), ServerError> {
    let failed =
        |what: String| ServerError::new(format!("control socket {}: {what}", path.display()));
    set_mode(path, shared)
        .map_err(|error| failed(format!("could not set its mode: {}", cause(&error))))?;
    let Some(directory) = path.parent().filter(|_| shared) else { return Ok(()) };
    match std::fs::metadata(directory) {
        Ok(found) if found.permissions().mode() & 0o011 == 0 => {
            let directory = directory.display();
            Err(failed(format!("its directory lets in its owner alone; `chmod 711 {directory}`")))
        }
        _ => Ok(()),
    }
}

/// The places of the control socket, by what a user may do.
struct ControlPlaces {
    own: Arc<Places<u32>>,
    allowed: Arc<Places<u32>>,
    strangers: Arc<Places<u32>>,
}

impl ControlPlaces {
    fn new() -> ControlPlaces {
        ControlPlaces {
            own: Places::new(OWN_CONNECTIONS_MAX, OWN_CONNECTIONS_MAX),
            allowed: Places::new(ALLOWED_CONNECTIONS_MAX, ALLOWED_USER_CONNECTIONS_MAX),
            strangers: Places::new(STRANGERS_MAX, STRANGER_CONNECTIONS_MAX),
        }
    }

    /// The places that a user has a share of, and how long he may keep one.
    fn of(&self, uid: u32, allow: &[String]) -> (&Arc<Places<u32>>, Duration) {
        if is_own(uid) {
            (&self.own, Duration::MAX)
        } else if is_allowed(uid, allow) {
            (&self.allowed, Duration::MAX)
        } else {
            (&self.strangers, STRANGER_LIFETIME)
        }
    }
}

#[derive(Clone)]
struct ServerState {
    context: Arc<Context>,
    stopped: watch::Receiver<bool>,
}

/// Root, and this node's own user.
fn is_own(uid: u32) -> bool {
    uid == 0 || uid == nix::unistd::geteuid().as_raw()
}

/// Root, this node's own user, and those that the configuration allows.
fn is_allowed(uid: u32, allow: &[String]) -> bool {
    is_own(uid)
        || allow.iter().any(|name| {
            name.parse() == Ok(uid)
                || nix::unistd::User::from_name(name)
                    .ok()
                    .flatten()
                    .is_some_and(|user| user.uid.as_raw() == uid)
        })
}

async fn answer(state: ServerState, uid: u32, request: Request) -> Response {
    match answer_checked(state, uid, request).await {
        Ok(response) => response,
        Err(problem) => problem_response(&problem),
    }
}

async fn answer_checked(
    state: ServerState,
    uid: u32,
    request: Request,
) -> Result<Response, Problem> {
    let allow = state.context.config.read().expect("no holder panics").control.allow.clone();
    if !is_allowed(uid, &allow) {
        let who = format!("uid {uid}");
        return Err(Problem::new(
            403,
            "forbidden",
            format!("control socket: {who} may not use it; add the user to allow under [control]"),
        ));
    }
    let (parts, body) = request.into_parts();
    let Query(query): Query<Vec<(String, String)>> = Query::try_from_uri(&parts.uri)
        .map_err(|error| Problem::invalid(format!("query: {error}")))?;
    let path = parts.uri.path();
    match (parts.method.as_str(), path) {
        ("GET", "/v1/openapi.json") => return Ok(json_response(&openapi())),
        ("GET", "/v1/events") => return events(&state, &query),
        ("GET", "/metrics") => return metrics(&state.context).await,
        _ => {}
    }
    let body = read_body(body).await?;
    let caller = Caller { uid, node: None };
    let answer =
        dispatch(&state.context, &caller, parts.method.as_str(), path, query, body).await?;
    Ok(json_response(&answer))
}

async fn read_body(body: Body) -> Result<Map<String, Value>, Problem> {
    let body = tokio::time::timeout(REQUEST_TIMEOUT, to_bytes(body, BODY_BYTES_MAX)).await;
    let late = |_| Problem::new(408, "timeout", "body: it did not come in time; send it again");
    let bytes = body.map_err(late)?.map_err(|error| {
        Problem::new(413, "too-large", format!("body: {error}; {BODY_BYTES_MAX} bytes at most"))
    })?;
    if bytes.is_empty() {
        return Ok(Map::new());
    }
    serde_json::from_slice(&bytes)
        .map_err(|error| Problem::invalid(format!("body: expected a JSON object: {error}")))
}

fn json_response(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

fn problem_response(problem: &Problem) -> Response {
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let body = serde_json::to_string(problem).unwrap_or_default();
    (status, [(header::CONTENT_TYPE, "application/problem+json")], body).into_response()
}

async fn metrics(context: &Arc<Context>) -> Result<Response, Problem> {
    let context = context.clone();
    let text = tokio::task::spawn_blocking(move || metrics_text(&context))
        .await
        .map_err(|error| Problem::new(500, "bug", error.to_string()))?
        .map_err(|error| Problem::new(500, "bug", error.to_string()))?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

async fn answer_scraper(context: Arc<Context>, request: Request) -> Response {
    let result = match (request.method().as_str(), request.uri().path()) {
        ("GET", "/metrics") => metrics(&context).await,
        _ => Err(Problem::not_found("only GET /metrics is answered here")),
    };
    result.unwrap_or_else(|problem| problem_response(&problem))
}

/// The events held from `since` on, and, unless `follow` is false, those to come.
fn events(state: &ServerState, query: &[(String, String)]) -> Result<Response, Problem> {
    let value = |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, v)| v.as_str());
    if let Some((key, _)) = query.iter().find(|(key, _)| key != "since" && key != "follow") {
        return Err(Problem::invalid(format!("unknown query parameter `{key}`")));
    }
    let wanted = since(value("since").unwrap_or("0"), state.context.env.clock.wall())?;
    let events = &state.context.events;
    if value("follow") == Some("false") {
        let held: Vec<Event> = events.since(0).into_iter().filter(wanted).collect();
        return Ok(json_response(&serde_json::json!({ "events": held })));
    }
    let (sender, receiver) = mpsc::channel(FOLLOWER_EVENTS_MAX);
    // Following first and listing then may show an event twice, never lose one; the body drops
    // what it has sent before.
    events.follow(move |event| sender.try_send(event.clone()).is_ok());
    let body = EventBody {
        held: events.since(0).into_iter().filter(wanted).collect(),
        last: 0,
        receiver,
        stopped: Box::pin(told_to_stop(state.stopped.clone())),
        keep_alive: tokio::time::interval(KEEP_ALIVE),
        overrun: false,
    };
    Ok(([(header::CONTENT_TYPE, "text/event-stream")], Body::new(body)).into_response())
}

/// Which events `since` asks for: those after a number, or from a time on.
fn since(text: &str, now: LogTime) -> Result<impl Fn(&Event) -> bool + use<>, Problem> {
    let (after, from) = if let Ok(number) = text.parse::<u64>() {
        (number, LogTime(0))
    } else if let Some(back) =
        text.strip_prefix('-').and_then(|b| humantime::parse_duration(b).ok())
    {
        (0, now.before(back))
    } else if let Ok(time) = text.parse::<LogTime>() {
        (0, time)
    } else {
        return Err(Problem::invalid(format!(
            "since `{text}`: expected an event's number, or a time (RFC 3339, or -15m)"
        )));
    };
    Ok(move |event: &Event| event.sequence > after && event.time >= from)
}

/// A stream of server-sent events.
struct EventBody {
    held: std::collections::VecDeque<Event>,
    last: u64,
    receiver: mpsc::Receiver<Event>,
    stopped: Pin<Box<dyn Future<Output = ()> + Send>>,
    keep_alive: tokio::time::Interval,
    /// It was said that the follower was too slow.
    overrun: bool,
}

impl EventBody {
    fn message(&mut self, event: &Event) -> Frame<Bytes> {
        self.last = event.sequence;
        let data = serde_json::to_string(event).unwrap_or_default();
        let text = format!("id: {}\nevent: {}\ndata: {data}\n\n", event.sequence, event.code);
        Frame::data(Bytes::from(text))
    }
}

/// What ends the stream of a follower that was too slow: a problem in place of an event.
fn overrun(last: u64) -> Frame<Bytes> {
    let what = format!(
        "events: this follower was too slow, and what came after event {last} was not sent; \
         `tidelog events --follow --since {last}` goes on from there"
    );
    let data = serde_json::to_string(&Problem::refused(what)).unwrap_or_default();
    Frame::data(Bytes::from(format!("event: {PROBLEM_EVENT}\ndata: {data}\n\n")))
}

impl hyper::body::Body for EventBody {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if let Some(event) = self.held.pop_front() {
            return Poll::Ready(Some(Ok(self.message(&event))));
        }
        loop {
            match self.receiver.poll_recv(task) {
                Poll::Ready(Some(event)) if event.sequence <= self.last => {}
                Poll::Ready(Some(event)) => return Poll::Ready(Some(Ok(self.message(&event)))),
                // It did not take what came, and was left behind.
                Poll::Ready(None) if !self.overrun => {
                    self.overrun = true;
                    return Poll::Ready(Some(Ok(overrun(self.last))));
                }
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => break,
            }
        }
        if self.stopped.as_mut().poll(task).is_ready() {
            return Poll::Ready(None);
        }
        if self.keep_alive.poll_tick(task).is_ready() {
            return Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b": alive\n\n")))));
        }
        Poll::Pending
    }
}

/// The metrics listener: plain HTTP, `GET /metrics` alone.
pub struct MetricsServer {
    address: std::net::SocketAddr,
    stop: watch::Sender<bool>,
}

impl MetricsServer {
    /// Listens and answers.
    ///
    /// # Errors
    ///
    /// Where the address cannot be listened on.
    pub async fn start(
        context: Arc<Context>,
        listen: std::net::SocketAddr,
    ) -> Result<MetricsServer, ServerError> {
        let failed = |error: std::io::Error| {
            ServerError::new(format!(
                "metrics: could not listen on {listen}: {}; give another with listen = under \
                 [metrics]",
                cause(&error)
            ))
        };
        let listener = tokio::net::TcpListener::bind(listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let places = Places::new(SCRAPERS_MAX, SCRAPER_CONNECTIONS_MAX);
        let admit = move |_: &TcpStream, from: &std::net::SocketAddr| {
            let Some(place) = places.take(from.ip().to_canonical()) else {
                tracing::debug!(%from, "metrics: too many connections");
                return None;
            };
            let context = context.clone();
            let answer = move |request| answer_scraper(context.clone(), request);
            let (request_timeout, lifetime) = (REQUEST_TIMEOUT, SCRAPER_LIFETIME);
            Some(Admitted { place, request_timeout, lifetime, answer })
        };
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(serve(listener, stopped, admit));
        Ok(MetricsServer { address, stop })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> std::net::SocketAddr {
        self.address
    }

    /// Lets nobody in any more.
    pub fn stop(self) {
        let _ = self.stop.send(true);
    }
}

#[cfg(test)]
mod tests {
    use hyper::body::Body as _;

    use super::*;
    use crate::control::client::event_of;
    use crate::events::Events;

    /// The stream ended as if the node had ended, and what was left out was never told.
    #[tokio::test]
    async fn a_follower_that_was_too_slow_is_told_so_in_the_end() {
        let (sender, receiver) = mpsc::channel(1);
        let events = Events::in_memory();
        events.follow(move |event| sender.try_send(event.clone()).is_ok());
        for text in ["one", "two"] {
            events.emit(crate::events::Severity::Info, "test", None, text.to_owned(), Value::Null);
        }
        let mut body = EventBody {
            held: std::collections::VecDeque::new(),
            last: 0,
            receiver,
            stopped: Box::pin(std::future::pending()),
            keep_alive: tokio::time::interval(KEEP_ALIVE),
            overrun: false,
        };
        let mut task = TaskContext::from_waker(std::task::Waker::noop());
        let mut next = || match Pin::new(&mut body).poll_frame(&mut task) {
            Poll::Ready(Some(Ok(frame))) => Some(frame.into_data().unwrap()),
            Poll::Ready(None) => None,
            other => panic!("{other:?}"),
        };
        let first = event_of(&next().unwrap()).unwrap().unwrap();
        assert_eq!(first.text, "one");
        let problem = event_of(&next().unwrap()).unwrap_err().to_string();
        assert!(problem.contains("too slow") && problem.contains("--since 1"), "{problem}");
        assert!(next().is_none());
    }

    #[test]
    fn a_socket_is_shared_and_taken_back_while_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let open = std::fs::Permissions::from_mode(0o711);
        std::fs::set_permissions(dir.path(), open).unwrap();
        share(&path, true).unwrap();
        assert_eq!(mode(&path), 0o666);
        share(&path, false).unwrap();
        assert_eq!(mode(&path), 0o600);
        let closed = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(dir.path(), closed).unwrap();
        let refused = share(&path, true).unwrap_err().to_string();
        assert!(refused.contains("chmod 711"), "{refused}");
        assert_eq!((mode(&path), mode(dir.path())), (0o666, 0o700));
    }

    #[test]
    fn only_named_users_are_allowed() {
        let own = nix::unistd::geteuid().as_raw();
        assert!(is_allowed(0, &[]) && is_allowed(own, &[]));
        let other = own.wrapping_add(12_345);
        assert!(!is_allowed(other, &["nobody-of-this-name".to_owned()]));
        assert!(is_allowed(other, &[other.to_string()]));
    }

    #[test]
    fn since_is_a_number_or_a_time() {
        let now: LogTime = "2026-11-24T12:00:00Z".parse().unwrap();
        let event = |sequence, time: &str| Event {
            sequence,
            time: time.parse().unwrap(),
            severity: crate::events::Severity::Info,
            code: String::new(),
            group: None,
            text: String::new(),
            details: Value::Null,
        };
        let old = event(3, "2026-11-24T10:00:00Z");
        let new = event(4, "2026-11-24T11:59:00Z");
        for wanted in ["3", "-15m", "2026-11-24T11:00:00Z"] {
            let wanted = since(wanted, now).unwrap();
            assert!(!wanted(&old) && wanted(&new));
        }
        assert!(since("yesterday", now).is_err());
    }
}
