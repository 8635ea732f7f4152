//! The control socket's client: one HTTP request per connection, answers as JSON.

use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config::cause;
use crate::events::Event;

use super::problem::{PROBLEM_EVENT, Problem};

const STATUS: &str = "/v1/status";
/// How long that may take.
const STATUS_MAX: Duration = Duration::from_secs(30);

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers on the socket.
    #[error(
        "control socket {}: {cause}; start the node with `tidelog serve --config FILE`, or name \
         its socket with --socket PATH", socket.display()
    )]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// Why.
        cause: String,
    },
    /// The node says what is wrong.
    #[error("{0}")]
    Problem(Problem),
    /// The connection broke, or the answer is not what was expected.
    #[error("control socket {}: {cause}; `tidelog status` shows whether the node runs", socket.display())]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// How.
        cause: String,
    },
}

/// A client of one node's control socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client; it connects when it is used.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Client {
        Client { socket: socket.into() }
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks, with the answer as the type that the caller expects.
    ///
    /// # Errors
    ///
    /// Where the node cannot be reached, refuses, or answers something else.
    pub async fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> Result<T, ClientError> {
        let bytes = self.call_bytes(method, path, body).await?;
        serde_json::from_slice(&bytes).map_err(|error| self.broken(&error))
    }

    /// `GET`, with the answer as the type that the caller expects.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call("GET", path, None).await
    }

    /// `POST`, with the answer as the type that the caller expects.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Value,
    ) -> Result<T, ClientError> {
        self.call("POST", path, Some(body)).await
    }

    /// Asks, with the answer's bytes as they are.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub async fn call_bytes(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> Result<Bytes, ClientError> {
        let response = self.send(method, path, body).await?;
        let collected = response.into_body().collect().await;
        Ok(collected.map_err(|error| self.broken(&error))?.to_bytes())
    }

    /// Follows events: those held from `since` on (a number or a time), then those to come.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub async fn follow_events(&self, since: Option<&str>) -> Result<EventStream, ClientError> {
        let path = match since {
            Some(since) => format!("/v1/events?since={}", encode(since)),
            None => "/v1/events".to_owned(),
        };
        let response = self.send("GET", &path, None).await?;
        Ok(EventStream { client: self.clone(), body: response.into_body(), read: Vec::new() })
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> Result<hyper::Response<Incoming>, ClientError> {
        let stream = tokio::net::UnixStream::connect(&self.socket).await.map_err(|error| {
            ClientError::Unreachable { socket: self.socket.clone(), cause: cause(&error) }
        })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream))
                .await
                .map_err(|error| self.broken(&error))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "tidelog")
            .header("content-type", "application/json")
            .body(Full::from(body.map_or_else(String::new, |body| body.to_string())))
            .map_err(|error| self.broken(&error))?;
        let sent = sender.send_request(request);
        // What a health check asks is answered at once, or the node is not well.
        let patience = if path.starts_with(STATUS) { STATUS_MAX } else { Duration::MAX };
        let answer = tokio::time::timeout(patience, sent).await.map_err(|_| {
            let seconds = patience.as_secs();
            self.broken(&format!(
                "the process that listens there has given no answer for {seconds} s: look at its \
                 log and its disks"
            ))
        })?;
        let response = answer.map_err(|error| {
            self.broken(&format!(
                "closed before its answer ({error}): the node ends, or holds as many connections \
                 of this user as it may"
            ))
        })?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let bytes =
            response.into_body().collect().await.map_err(|error| self.broken(&error))?.to_bytes();
        Err(match serde_json::from_slice(&bytes) {
            Ok(problem) => ClientError::Problem(problem),
            Err(_) => self.broken(&format!("answered {status}")),
        })
    }

    fn broken(&self, error: &dyn ToString) -> ClientError {
        ClientError::Broken { socket: self.socket.clone(), cause: error.to_string() }
    }
}

/// Text as part of a query: what is not plain becomes `%XX`.
#[must_use]
pub fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:@/".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// Events as they come.
pub struct EventStream {
    client: Client,
    body: Incoming,
    read: Vec<u8>,
}

impl EventStream {
    /// The next event; `None` where the node ends the stream.
    ///
    /// # Errors
    ///
    /// Where the connection breaks, or something else than an event comes.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            while let Some(end) = self.read.windows(2).position(|pair| pair == b"\n\n") {
                let message: Vec<u8> = self.read.drain(..end + 2).collect();
                match event_of(&message) {
                    Ok(None) => {}
                    Ok(event) => return Ok(event),
                    Err(NoEvent::Problem(problem)) => return Err(ClientError::Problem(problem)),
                    Err(NoEvent::Broken(error)) => return Err(self.client.broken(&error)),
                }
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(self.client.broken(&error)),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.read.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

/// What a message of the stream is instead of an event.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoEvent {
    #[error("{0}")]
    Problem(Problem),
    #[error("{0}")]
    Broken(serde_json::Error),
}

/// The event in a message of the stream; none in one that only shows that the node lives.
pub(super) fn event_of(message: &[u8]) -> Result<Option<Event>, NoEvent> {
    let mut lines = message.split(|byte| *byte == b'\n');
    let mut field = |name: &[u8]| lines.find_map(|line| line.strip_prefix(name));
    let kind = field(b"event: ");
    let Some(data) = field(b"data: ") else { return Ok(None) };
    if kind == Some(PROBLEM_EVENT.as_bytes()) {
        return Err(serde_json::from_slice(data).map_or_else(NoEvent::Broken, NoEvent::Problem));
    }
    serde_json::from_slice(data).map(Some).map_err(NoEvent::Broken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_encoded() {
        assert_eq!(encode("role=a b&c+d"), "role%3Da%20b%26c%2Bd");
        assert_eq!(encode("2026-11-24T02:00:00Z"), "2026-11-24T02:00:00Z");
    }
}
