//! The HTTP servers: the control socket, with the caller's credentials checked, and the metrics
//! listener.

use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::{Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;
use hyper::body::Frame;
use serde_json::{Map, Value};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};

use crate::config::cause;
use crate::events::Event;
use crate::units::LogTime;

use super::context::Context;
use super::dispatch::{Caller, dispatch};
use super::metrics::metrics_text;
use super::problem::Problem;
use super::route::openapi;

/// Bytes of a request's body at most.
const BODY_BYTES_MAX: usize = 1 << 20;
/// A quiet event stream says that it lives this often.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Events that wait for a slow follower before it is cut off.
const FOLLOWER_EVENTS_MAX: usize = 1024;

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
        let state = ServerState { context, stopped: stopped.clone() };
        let app = Router::new().fallback(answer).with_state(state);
        let service = app.into_make_service_with_connect_info::<PeerUid>();
        let task = tokio::spawn(async move {
            let serving =
                axum::serve(listener, service).with_graceful_shutdown(told_to_stop(stopped));
            if let Err(error) = serving.await {
                tracing::error!("control socket: {error}");
            }
        });
        Ok(ControlServer { path, stop, task })
    }

    /// Answers what has been asked, and ends.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        let _ = tokio::time::timeout(Duration::from_secs(5), self.task).await;
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn told_to_stop(mut stopped: watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stopped| *stopped).await;
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
    let mode = if shared { 0o666 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .map_err(|error| failed("could not set its mode", &error))?;
    Ok(listener)
}

/// The user at the other end, as the kernel says; `None` where it does not.
#[derive(Clone, Copy, Debug)]
struct PeerUid(Option<u32>);

impl Connected<IncomingStream<'_, UnixListener>> for PeerUid {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> PeerUid {
        PeerUid(stream.io().peer_cred().ok().map(|credentials| credentials.uid()))
    }
}

#[derive(Clone)]
struct ServerState {
    context: Arc<Context>,
    stopped: watch::Receiver<bool>,
}

/// Root, this node's own user, and those that the configuration allows.
fn is_allowed(uid: u32, allow: &[String]) -> bool {
    uid == 0
        || uid == nix::unistd::geteuid().as_raw()
        || allow.iter().any(|name| {
            name.parse() == Ok(uid)
                || nix::unistd::User::from_name(name)
                    .ok()
                    .flatten()
                    .is_some_and(|user| user.uid.as_raw() == uid)
        })
}

async fn answer(
    State(state): State<ServerState>,
    ConnectInfo(PeerUid(uid)): ConnectInfo<PeerUid>,
    request: Request,
) -> Response {
    match answer_checked(state, uid, request).await {
        Ok(response) => response,
        Err(problem) => problem_response(&problem),
    }
}

async fn answer_checked(
    state: ServerState,
    uid: Option<u32>,
    request: Request,
) -> Result<Response, Problem> {
    let allow = state.context.config.read().expect("no holder panics").control.allow.clone();
    let Some(uid) = uid.filter(|uid| is_allowed(*uid, &allow)) else {
        let who = uid.map_or("a user unknown to the kernel".to_owned(), |uid| format!("uid {uid}"));
        return Err(Problem::new(
            403,
            "forbidden",
            format!("control socket: {who} may not use it; add the user to allow under [control]"),
        ));
    };
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
    let bytes = to_bytes(body, BODY_BYTES_MAX).await.map_err(|error| {
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
}

impl EventBody {
    fn message(&mut self, event: &Event) -> Frame<Bytes> {
        self.last = event.sequence;
        let data = serde_json::to_string(event).unwrap_or_default();
        let text = format!("id: {}\nevent: {}\ndata: {data}\n\n", event.sequence, event.code);
        Frame::data(Bytes::from(text))
    }
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
    task: tokio::task::JoinHandle<()>,
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
        let handler = |State(context): State<Arc<Context>>, request: Request| async move {
            let result = match (request.method().as_str(), request.uri().path()) {
                ("GET", "/metrics") => metrics(&context).await,
                _ => Err(Problem::not_found("only GET /metrics is answered here")),
            };
            result.unwrap_or_else(|problem| problem_response(&problem))
        };
        let app = Router::new().fallback(handler).with_state(context);
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, app).await {
                tracing::error!("metrics: {error}");
            }
        });
        Ok(MetricsServer { address, task })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> std::net::SocketAddr {
        self.address
    }

    /// Ends.
    pub fn stop(self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
