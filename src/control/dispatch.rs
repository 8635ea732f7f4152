//! From a request to its answer: the route, the primary where it must be asked, the audit event.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::events::Severity;

use super::context::Context;
use super::problem::Problem;
use super::route::{Call, Handler, Route, find};

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
    refuse_unknown("query parameter", query.iter().map(|(key, _)| key), |key| {
        route.query.iter().any(|parameter| parameter.name == key)
    })?;
    if !route.open_body {
        refuse_unknown("field", body.keys(), |key| {
            route.body.iter().any(|parameter| parameter.name == key)
        })?;
    }
    let call = Call { path: names, query, body, user: caller.name() };
    let group = call.path.iter().find(|(name, _)| *name == "group").map(|(_, group)| group.clone());
    let shown = if route.changes_state() { Some(describe(route, &call)) } else { None };
    let answer = match route.handler {
        Handler::Blocking(handler) => {
            let context = context.clone();
            tokio::task::spawn_blocking(move || handler(&context, &call))
                .await
                .unwrap_or_else(|error| Err(Problem::new(500, "bug", error.to_string())))
        }
        Handler::Async(handler) => handler(context.clone(), call).await,
    };
    if let Some(shown) = shown {
        audit(context, caller, route, group.as_deref(), &shown, answer.as_ref().err());
    }
    answer
}

fn refuse_unknown<'a>(
    what: &str,
    mut given: impl Iterator<Item = &'a String>,
    known: impl Fn(&str) -> bool,
) -> Result<(), Problem> {
    match given.find(|key| !known(key)) {
        Some(key) => Err(Problem::invalid(format!(
            "unknown {what} `{key}`; GET /v1/openapi.json shows those that are known"
        ))),
        None => Ok(()),
    }
}

/// The command's words and the names in it.
fn describe(route: &Route, call: &Call) -> String {
    let names: Vec<&str> = call.path.iter().map(|(_, name)| name.as_str()).collect();
    let named = call.body.get("name").and_then(Value::as_str);
    let named = named.map_or_else(String::new, |name| format!(" {name}"));
    format!("{} {}{named}", route.id, names.join("/")).trim_end().to_owned()
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
