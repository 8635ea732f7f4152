//! From a request to its answer: the route, the primary where it must be asked, the audit event.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::nearest;
use crate::events::Severity;
use crate::group::{Group, Role};
use crate::replication::{BoxFuture, PeerContext, PeerStatus};

use super::context::Context;
use super::problem::Problem;
use super::route::{Call, Handler, Parameter, Route, find};

/// Who sent a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The user's number on the node where the command was given.
    pub uid: u32,
    /// The node where it was given, where that is another.
    pub node: Option<String>,
}

impl Caller {
    fn name(&self) -> String {
        let user = nix::unistd::User::from_uid(self.uid.into()).ok().flatten();
        let user = user.map_or_else(|| format!("uid {}", self.uid), |user| user.name);
        match &self.node {
            None => user,
            Some(node) => format!("{user} on {node}"),
        }
    }
}

/// Answers one request.
///
/// # Errors
///
/// The problem that the caller is told.
pub async fn dispatch(
    context: &Arc<Context>,
    caller: &Caller,
    method: &str,
    path: &str,
    query: Vec<(String, String)>,
    body: Map<String, Value>,
) -> Result<Value, Problem> {
    let (route, names) = find(method, path)?;
    refuse_unknown("query parameter", query.iter().map(|(key, _)| key), route.query)?;
    if !route.open_body {
        refuse_unknown("key", body.keys(), route.body)?;
    }
    let call = Call { path: names, query, body, user: caller.name() };
    let primary = elsewhere(context, route, &call)?;
    if let (Some(_), Some(from)) = (&primary, &caller.node) {
        return Err(Problem::new(
            409,
            "not-primary",
            format!("node {}: is not the primary either; {from} asked it", context.node.name),
        ));
    }
    if !route.changes_state() {
        return answer_from(context, caller, route, path, call, primary).await;
    }
    // Done to its end, also where the client does not wait for it: a switchover that is given up
    // between its two halves would leave no primary.
    let (context, caller, path) = (context.clone(), caller.clone(), path.to_owned());
    let changing = tokio::spawn(async move {
        let group = call.path.iter().find(|(name, _)| *name == "group");
        let group = group.map(|(_, group)| group.clone());
        let shown = describe(route, &call);
        let answer = answer_from(&context, &caller, route, &path, call, primary).await;
        audit(&context, &caller, route, group.as_deref(), &shown, answer.as_ref().err());
        answer
    });
    changing.await.unwrap_or_else(|error| Err(Problem::new(500, "bug", error.to_string())))
}

/// Answers a call here, or has the primary answer it.
async fn answer_from(
    context: &Arc<Context>,
    caller: &Caller,
    route: &Route,
    path: &str,
    call: Call,
    primary: Option<String>,
) -> Result<Value, Problem> {
    match primary {
        Some(primary) => forward(context, caller, &primary, route, path, &call).await,
        None => answer_here(context, route, call).await,
    }
}

/// The name of the peer that a call must be sent to: it appends, and the primary is that peer.
fn elsewhere(context: &Context, route: &Route, call: &Call) -> Result<Option<String>, Problem> {
    if !route.on_primary {
        return Ok(None);
    }
    let group = context.group(call.path("group"))?;
    if group.role() == Role::Primary {
        return Ok(None);
    }
    let primary = primary_of(context, &group)?;
    if let Some(key) = route.file_here.filter(|key| call.body.contains_key(*key)) {
        return Err(Problem::refused(format!(
            "group {}: node {primary} is the primary, and reads no {key} of another machine; give \
             the command there",
            group.name()
        )));
    }
    Ok(Some(primary))
}

/// The peer that reigns: as it says itself now, else the author of the last epoch.
fn primary_of(context: &Context, group: &Group) -> Result<String, Problem> {
    let control = group.control();
    let author = control.epochs.last().filter(|epoch| epoch.author != context.node.id);
    let author = author.map(|epoch| epoch.author_name.as_str());
    reigning(&context.replication.status(group), author).ok_or_else(|| {
        let name = group.name();
        Problem::new(
            409,
            "no-primary",
            format!(
                "group {name}: has no primary that this node knows of; `tidelog promote {name}` \
                 makes this node the primary"
            ),
        )
    })
}

/// The same, of what status shows: a peer that is not connected says nothing of itself by now.
fn reigning(peers: &[PeerStatus], author: Option<&str>) -> Option<String> {
    let says = |peer: &&PeerStatus| peer.link_state == "connected" && peer.role == "primary";
    peers.iter().find(says).map(|peer| peer.name.clone()).or(author.map(str::to_owned))
}

/// How long the primary may take over a call that was sent to it.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(60);
/// The name of the call between nodes.
const FORWARD_METHOD: &str = "control";

/// A call as it goes to the primary.
#[derive(Debug, Serialize, Deserialize)]
struct Forwarded {
    method: String,
    path: String,
    query: Vec<(String, String)>,
    body: Map<String, Value>,
    uid: u32,
}

/// What comes back.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ForwardedAnswer {
    Done(Value),
    Problem(Problem),
}

async fn forward(
    context: &Context,
    caller: &Caller,
    primary: &str,
    route: &Route,
    path: &str,
    call: &Call,
) -> Result<Value, Problem> {
    let forwarded = Forwarded {
        method: route.method.to_owned(),
        path: path.to_owned(),
        query: call.query.clone(),
        body: call.body.clone(),
        uid: caller.uid,
    };
    let bug = |error: serde_json::Error| Problem::new(500, "bug", error.to_string());
    let body = serde_json::to_value(&forwarded).map_err(bug)?;
    let answer = context.replication.call(primary, FORWARD_METHOD, body, FORWARD_TIMEOUT).await?;
    match serde_json::from_value(answer).map_err(bug)? {
        ForwardedAnswer::Done(value) => Ok(value),
        ForwardedAnswer::Problem(problem) => Err(problem),
    }
}

/// Answers, from now on, what peers send on to this node.
pub fn answer_peers(context: &Arc<Context>) {
    let weak = Arc::downgrade(context);
    let handler = move |peer: PeerContext, body: Value| -> BoxFuture<Result<Value, String>> {
        let context = weak.upgrade();
        Box::pin(async move {
            let context = context.ok_or("this node shuts down")?;
            answer_forwarded(&context, peer, body).await
        })
    };
    context.replication.on_call(FORWARD_METHOD, Arc::new(handler));
}

/// Answers a call that a peer sent on: only what appends, and only to groups that it holds.
async fn answer_forwarded(
    context: &Arc<Context>,
    peer: PeerContext,
    body: Value,
) -> Result<Value, String> {
    let forwarded: Forwarded = serde_json::from_value(body).map_err(|error| error.to_string())?;
    let answer = match allowed(context, &peer, &forwarded) {
        Err(problem) => Err(problem),
        Ok(()) => {
            let caller = Caller { uid: forwarded.uid, node: Some(peer.name.to_string()) };
            let Forwarded { method, path, query, body, .. } = forwarded;
            dispatch(context, &caller, &method, &path, query, body).await
        }
    };
    let answer = match answer {
        Ok(value) => ForwardedAnswer::Done(value),
        Err(problem) => ForwardedAnswer::Problem(problem),
    };
    serde_json::to_value(answer).map_err(|error| error.to_string())
}

fn allowed(context: &Context, peer: &PeerContext, forwarded: &Forwarded) -> Result<(), Problem> {
    let (route, names) = find(&forwarded.method, &forwarded.path)?;
    let forbidden = || {
        Problem::new(403, "forbidden", format!("peer {}: may not ask for {}", peer.name, route.id))
    };
    let name = names.iter().find(|(key, _)| *key == "group").map(|(_, name)| name);
    let name = name.filter(|_| is_for_peers(route, &forwarded.body)).ok_or_else(forbidden)?;
    let group = context.group(name).map_err(|_| forbidden())?;
    let control = group.control();
    let is_member = control.members.iter().any(|m| m.node == peer.node && !m.removed);
    if is_member { Ok(()) } else { Err(forbidden()) }
}

/// Whether a peer may ask for it at all: what appends, but no file of this machine.
fn is_for_peers(route: &Route, body: &Map<String, Value>) -> bool {
    route.on_primary && route.file_here.is_none_or(|key| !body.contains_key(key))
}

async fn answer_here(context: &Arc<Context>, route: &Route, call: Call) -> Result<Value, Problem> {
    match route.handler {
        Handler::Blocking(handler) => {
            let context = context.clone();
            tokio::task::spawn_blocking(move || handler(&context, &call))
                .await
                .unwrap_or_else(|error| Err(Problem::new(500, "bug", error.to_string())))
        }
        Handler::Async(handler) => handler(context.clone(), call).await,
    }
}

fn refuse_unknown<'a>(
    what: &str,
    mut given: impl Iterator<Item = &'a String>,
    known: &[Parameter],
) -> Result<(), Problem> {
    let Some(key) = given.find(|key| known.iter().all(|known| known.name != key.as_str())) else {
        return Ok(());
    };
    let names: Vec<&str> = known.iter().map(|known| known.name).collect();
    let hint = match nearest(key, &names) {
        Some(nearest) => format!("the nearest is `{nearest}`"),
        None if names.is_empty() => "none is taken here".to_owned(),
        None => format!("known are {}", names.join(", ")),
    };
    Err(Problem::invalid(format!("unknown {what} `{key}`; {hint}")))
}

/// The command's words and the names in it.
fn describe(route: &Route, call: &Call) -> String {
    let names: Vec<&str> = call.path.iter().map(|(_, name)| name.as_str()).collect();
    let named = call.body.get("name").and_then(Value::as_str);
    let file = route.file_here.and_then(|key| call.body.get(key)).and_then(Value::as_str);
    let words = [route.id, &names.join("/"), named.unwrap_or_default(), file.unwrap_or_default()];
    words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

fn audit(
    context: &Context,
    caller: &Caller,
    route: &Route,
    group: Option<&str>,
    shown: &str,
    problem: Option<&Problem>,
) {
    let outcome = problem.map_or("done".to_owned(), |problem| format!("refused: {problem}"));
    context.events.emit(
        Severity::Info,
        "audit",
        group,
        format!("{shown}: by {}: {outcome}", caller.name()),
        json!({
            "uid": caller.uid,
            "node": caller.node,
            "operation": route.id,
            "code": problem.map(|problem| problem.code.clone()),
        }),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_shown_no_file_of_this_machine() {
        let (create, _) = find("POST", "/v1/groups/g/volumes").unwrap();
        let body = |text: &str| serde_json::from_str(text).unwrap();
        assert!(is_for_peers(create, &body(r#"{"name":"v","size_bytes":4096}"#)));
        assert!(!is_for_peers(create, &body(r#"{"name":"v","base":"/etc/shadow"}"#)));
        let (show, _) = find("GET", "/v1/groups/g/volumes/v").unwrap();
        assert!(!is_for_peers(show, &body("{}")));
    }

    /// A dead copy was asked, since its name came first and nobody had heard that it is none.
    #[test]
    fn a_call_goes_to_the_primary_that_is_heard_else_to_the_author_of_the_last_reign() {
        let peer = |name: &str, role: &str, link: &str| -> PeerStatus {
            let peer = json!({
                "name": name, "mode": "async", "role": role, "link_state": link,
                "replication_state": "idle", "received_lsn": 0, "durable_lsn": 0,
                "lag": { "bytes": null, "operations": null, "seconds": 0.0 },
                "rpo_target_seconds": null, "rpo_actual_seconds": 0.0, "resync": null,
                "behind_bytes": null, "tls": true, "heard_seconds": null,
                "clock_offset_seconds": null,
            });
            serde_json::from_value(peer).unwrap()
        };
        let gone = peer("b", "primary", "connecting");
        let copy = peer("c", "secondary", "connected");
        let reigns = peer("d", "primary", "connected");
        let three = [gone.clone(), copy.clone(), reigns];
        assert_eq!(reigning(&three, Some("b")), Some("d".to_owned()), "b was followed by d");
        assert_eq!(reigning(&[gone.clone(), copy.clone()], Some("c")), Some("c".to_owned()));
        assert_eq!(reigning(&[gone, copy], None), None);
    }
}
