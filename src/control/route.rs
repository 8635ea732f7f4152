//! The table of routes: what each takes, what it does, and who answers it. The server, forwarding
//! between nodes and `openapi.json` are all made from it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::context::Context;
use super::problem::Problem;
use super::{backups, checks, groups, images, peers, volumes};

/// What a handler gives.
pub type Answer = Result<Value, Problem>;

/// The answer to come of a handler that waits for others.
pub type AnswerFuture = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// How a route is answered.
#[derive(Clone, Copy)]
pub enum Handler {
    /// On a thread that may wait for a disk.
    Blocking(fn(&Context, &Call) -> Answer),
    /// On the runtime.
    Async(fn(Arc<Context>, Call) -> AnswerFuture),
}

/// What stands in a path for the names in braces.
pub type PathValues = Vec<(&'static str, String)>;

/// What the caller sent.
#[derive(Clone, Debug, Default)]
pub struct Call {
    /// The names in the path, by their place in it.
    pub path: PathValues,
    /// The query, in order.
    pub query: Vec<(String, String)>,
    /// The body's fields.
    pub body: Map<String, Value>,
    /// Who asks, for events and owners.
    pub user: String,
}

impl Call {
    /// A name in the path.
    ///
    /// # Panics
    ///
    /// Where the route has no such name.
    #[must_use]
    pub fn path(&self, name: &str) -> &str {
        let found = self.path.iter().find(|(known, _)| *known == name);
        &found.expect("the route's pattern has this name").1
    }

    /// A value of the query.
    #[must_use]
    pub fn query(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// A field of the body, read as what the caller of this expects.
    ///
    /// # Errors
    ///
    /// Where it is something else.
    pub fn field<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<Option<T>, Problem> {
        match self.body.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => T::deserialize(value)
                .map(Some)
                .map_err(|error| Problem::invalid(format!("{name}: {error}"))),
        }
    }

    /// A field of the body that must be there.
    ///
    /// # Errors
    ///
    /// Where it is not, or is something else.
    pub fn required<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T, Problem> {
        self.field(name)?.ok_or_else(|| Problem::invalid(format!("{name}: is missing")))
    }
}

/// One parameter of a route.
pub struct Parameter {
    /// Its name.
    pub name: &'static str,
    /// Its JSON type.
    pub kind: &'static str,
    /// What it means.
    pub meaning: &'static str,
}

const fn parameter(name: &'static str, kind: &'static str, meaning: &'static str) -> Parameter {
    Parameter { name, kind, meaning }
}

/// One route.
pub struct Route {
    /// `GET`, `POST`, `PUT`, `PATCH` or `DELETE`.
    pub method: &'static str,
    /// The path, with names in braces.
    pub path: &'static str,
    /// Its operation id, which is also the command's words.
    pub id: &'static str,
    /// What it does.
    pub summary: &'static str,
    /// What the query may hold.
    pub query: &'static [Parameter],
    /// What the body may hold.
    pub body: &'static [Parameter],
    /// The body has keys beside `body` that the handler itself checks.
    pub open_body: bool,
    /// It appends to the group's log: a secondary forwards it to the primary.
    pub on_primary: bool,
    /// A key of the body that names a file of the machine where the command is given: with it the
    /// call goes to no other node.
    pub file_here: Option<&'static str>,
    /// Who answers.
    pub handler: Handler,
}

impl Route {
    /// Whether it changes state, so that it leaves an audit event.
    #[must_use]
    pub fn changes_state(&self) -> bool {
        self.method != "GET"
    }

    /// The names in `path`, where it is this route's.
    #[must_use]
    pub fn matches(&self, path: &str) -> Option<PathValues> {
        let mut names = Vec::new();
        let mut pattern = self.path.split('/');
        let mut given = path.split('/');
        loop {
            match (pattern.next(), given.next()) {
                (None, None) => return Some(names),
                (Some(want), Some(have)) => {
                    if let Some(name) = want.strip_prefix('{').and_then(|w| w.strip_suffix('}')) {
                        if have.is_empty() {
                            return None;
                        }
                        names.push((name, have.to_owned()));
                    } else if want != have {
                        return None;
                    }
                }
                _ => return None,
            }
        }
    }
}

/// A route without query and body, answered here.
const fn route(
    method: &'static str,
    path: &'static str,
    id: &'static str,
    summary: &'static str,
    handler: Handler,
) -> Route {
    Route {
        method,
        path,
        id,
        summary,
        query: &[],
        body: &[],
        open_body: false,
        on_primary: false,
        file_here: None,
        handler,
    }
}

impl Route {
    const fn query(mut self, query: &'static [Parameter]) -> Route {
        self.query = query;
        self
    }
    const fn body(mut self, body: &'static [Parameter]) -> Route {
        self.body = body;
        self
    }
    const fn on_primary(mut self) -> Route {
        self.on_primary = true;
        self
    }
    const fn file_here(mut self, key: &'static str) -> Route {
        self.file_here = Some(key);
        self
    }
}

use Handler::{Async, Blocking};

const GROUP_ONLY: &[Parameter] = &[parameter("group", "string", "only this group")];

/// Every route under `/v1`, besides `openapi.json` and `events`, which are not calls.
pub static ROUTES: &[Route] = &[
    route("GET", "/v1/status", "status", "Show this node and its groups", Blocking(groups::status))
        .query(GROUP_ONLY),
    route("GET", "/v1/groups", "group list", "List the groups", Blocking(groups::list)),
    route("POST", "/v1/groups", "group create", "Make a group here", Blocking(groups::create))
        .body(&[parameter("name", "string", "its name")]),
    route("GET", "/v1/groups/{group}", "group show", "Show a group", Blocking(groups::show)),
    route("PATCH", "/v1/groups/{group}", "group set", "Set keys of a group", Blocking(groups::set))
        .body(&[
            parameter("window", "string", "how far back one wants to go: a duration"),
            parameter("log_limit", "string", "bytes of log at most: a size"),
            parameter("on_full", "string", "fold (the window gets shorter) or block"),
            parameter("on_peer_behind", "string", "release (it is sent an image) or block"),
        ])
        .on_primary(),
    route(
        "DELETE",
        "/v1/groups/{group}",
        "group delete",
        "Remove this node's copy of a group, with its history",
        Blocking(groups::delete),
    ),
    route("GET", "/v1/volumes", "volume list", "List the volumes", Blocking(volumes::list))
        .query(GROUP_ONLY),
    route(
        "POST",
        "/v1/groups/{group}/volumes",
        "volume create",
        "Make a volume",
        Blocking(volumes::create),
    )
    .body(&[
        parameter("name", "string", "its name"),
        parameter("size_bytes", "integer", "bytes, a multiple of 4096; that of base if left out"),
        parameter("base", "string", "a file or block device here: what the volume begins with"),
        parameter("ticket", "string", "makes its progress readable under this name"),
    ])
    .on_primary()
    .file_here("base"),
    route(
        "GET",
        "/v1/groups/{group}/volumes/{volume}",
        "volume show",
        "Show a volume",
        Blocking(volumes::show),
    ),
    route(
        "PATCH",
        "/v1/groups/{group}/volumes/{volume}",
        "volume resize",
        "Change a volume's size",
        Blocking(volumes::resize),
    )
    .body(&[parameter("size_bytes", "integer", "bytes, a multiple of 4096")])
    .on_primary(),
    route(
        "DELETE",
        "/v1/groups/{group}/volumes/{volume}",
        "volume delete",
        "Remove a volume; images of moments before still show it",
        Blocking(volumes::delete),
    )
    .on_primary(),
    route(
        "POST",
        "/v1/peers/invite",
        "peer invite",
        "Open a one-time token for another node",
        Blocking(peers::invite),
    ),
    route(
        "POST",
        "/v1/peers/join",
        "peer join",
        "Pair with the node that gave a token",
        Async(peers::join),
    )
    .body(&[
        parameter("token", "string", "the one-time token"),
        parameter("address", "string", "HOST:PORT of the node that gave it"),
    ]),
    route("GET", "/v1/peers", "peer list", "List the peers", Blocking(peers::list)),
    route(
        "POST",
        "/v1/peers/rotate",
        "peer rotate",
        "Give this node a new key, and tell its peers",
        Async(peers::rotate),
    ),
    route("DELETE", "/v1/peers/{peer}", "peer remove", "Forget a peer", Blocking(peers::remove)),
    route(
        "POST",
        "/v1/groups/{group}/replicate",
        "replicate",
        "Make a copy on a peer and keep it up to date",
        Async(peers::replicate),
    )
    .body(&[
        parameter("peer", "string", "the peer's name"),
        parameter("mode", "string", "when a write is answered: async, receive or sync"),
        parameter("on_loss", "string", "what hosts do while such a peer is away: continue, block"),
        parameter("rpo", "string", "the age that the copy may have: a duration"),
    ])
    .on_primary(),
    route(
        "DELETE",
        "/v1/groups/{group}/replicate",
        "replicate stop",
        "Stop replicating; the copy on the peer is retired",
        Async(peers::stop),
    )
    .query(&[parameter("peer", "string", "the peer's name, where there are several")])
    .on_primary(),
    route("POST", "/v1/groups/{group}/pause", "pause", "Pause replication", Blocking(peers::pause))
        .body(&[parameter("peer", "string", "only with this peer")]),
    route(
        "POST",
        "/v1/groups/{group}/resume",
        "resume",
        "Go on replicating",
        Blocking(peers::resume),
    )
    .body(&[parameter("peer", "string", "only with this peer")]),
    route(
        "POST",
        "/v1/groups/{group}/promote",
        "promote",
        "Make this node the group's primary",
        Blocking(groups::promote),
    )
    .body(&[parameter("force", "boolean", "although the peer reigns or this node is behind")]),
    route(
        "POST",
        "/v1/groups/{group}/demote",
        "demote",
        "Make this node a secondary of the group",
        Blocking(groups::demote),
    ),
    route(
        "POST",
        "/v1/groups/{group}/switchover",
        "switchover",
        "Make the peer the group's primary, losing nothing",
        Async(peers::switchover),
    )
    .body(&[parameter("to", "string", "the peer, where there are several")])
    .on_primary(),
    route(
        "GET",
        "/v1/groups/{group}/resolve",
        "resolve preview",
        "Show where this node's history and its peer's part, and what each side has",
        Async(peers::preview),
    ),
    route(
        "POST",
        "/v1/groups/{group}/resolve",
        "resolve",
        "Have this node yield: what only it has is kept as a branch",
        Async(peers::resolve),
    )
    .body(&[parameter("discard_local", "boolean", "must be true: this node's side yields")]),
    route(
        "POST",
        "/v1/groups/{group}/scrub",
        "scrub",
        "Read and check everything that this node has of a group, in the background",
        Blocking(checks::scrub),
    )
    .body(&[parameter("rate", "string", "bytes a second at most: a size")]),
    route(
        "GET",
        "/v1/groups/{group}/scrub",
        "scrub show",
        "Show the scrub that runs, or the last one, and what is damaged",
        Blocking(checks::show_scrub),
    ),
    route(
        "DELETE",
        "/v1/groups/{group}/scrub",
        "scrub stop",
        "Stop the scrub that runs",
        Blocking(checks::stop_scrub),
    ),
    route(
        "POST",
        "/v1/groups/{group}/verify",
        "verify",
        "Compare with a peer at one position, by hashes, in the background",
        Blocking(checks::verify),
    )
    .body(&[parameter("peer", "string", "the peer's name, where there are several")]),
    route(
        "GET",
        "/v1/groups/{group}/verify",
        "verify show",
        "Show the comparison that runs, or the last one",
        Blocking(checks::show_verify),
    ),
    route(
        "GET",
        "/v1/groups/{group}/branches",
        "branch list",
        "List the tails that are not part of the history",
        Blocking(images::branches),
    ),
    route(
        "DELETE",
        "/v1/groups/{group}/branches/{branch}",
        "branch remove",
        "Give up a branch",
        Blocking(images::remove_branch),
    ),
    route(
        "POST",
        "/v1/groups/{group}/bookmarks",
        "bookmark",
        "Name the present moment",
        Blocking(images::bookmark),
    )
    .body(&[
        parameter("name", "string", "its name"),
        parameter("consistency", "string", "crash, filesystem or application"),
        parameter("pinned", "boolean", "keep it when the log no longer covers it"),
    ])
    .on_primary(),
    route(
        "GET",
        "/v1/groups/{group}/bookmarks",
        "bookmark list",
        "List the bookmarks",
        Blocking(images::bookmarks),
    ),
    route(
        "DELETE",
        "/v1/groups/{group}/bookmarks/{bookmark}",
        "bookmark remove",
        "Remove a bookmark",
        Blocking(images::remove_bookmark),
    )
    .on_primary(),
    route(
        "GET",
        "/v1/groups/{group}/timeline",
        "timeline",
        "Show window, epochs, bookmarks, rewinds, and what holds and branches cost",
        Blocking(images::timeline),
    ),
    route(
        "POST",
        "/v1/groups/{group}/rewind",
        "rewind",
        "Go back to an earlier moment; what was written since stays in the log",
        Blocking(images::rewind),
    )
    .body(&[
        parameter("to", "string", "a time, -15m, lsn:N or a bookmark"),
        parameter("force", "boolean", "disconnect the clients of the group's volumes"),
    ])
    .on_primary(),
    route("GET", "/v1/images", "image list", "List the opened images", Blocking(images::list))
        .query(GROUP_ONLY),
    route(
        "POST",
        "/v1/groups/{group}/images",
        "image open",
        "Open an image of a moment or a branch, and export it read-only",
        Blocking(images::open),
    )
    .body(&[
        parameter("at", "string", "now, a time, -15m, lsn:N or a bookmark; or else branch"),
        parameter("branch", "string", "a branch's name"),
        parameter("name", "string", "its name; one is made up otherwise"),
    ]),
    route(
        "DELETE",
        "/v1/groups/{group}/images/{image}",
        "image close",
        "Close an image and let its moment go",
        Blocking(images::close),
    ),
    route("GET", "/v1/jobs", "job list", "List the backup jobs", Blocking(backups::jobs))
        .query(GROUP_ONLY),
    route(
        "GET",
        "/v1/groups/{group}/jobs/{job}",
        "job show",
        "Show a backup job",
        Blocking(backups::show_job),
    ),
    route(
        "PUT",
        "/v1/groups/{group}/jobs/{job}",
        "job set",
        "Make or change a backup job; what is not named stays as it is",
        Blocking(backups::set_job),
    )
    .body(&[
        parameter("repository", "string", "the repository's name; needed for a new job"),
        parameter("schedule", "string", "a cron pattern of five fields, or none"),
        parameter("zone", "string", "the zone of the schedule"),
        parameter("force", "boolean", "take a repository that the primary does not have"),
        parameter("settings", "object", "placement, limits, conditions; null restores a default"),
    ])
    .on_primary(),
    route(
        "DELETE",
        "/v1/groups/{group}/jobs/{job}",
        "job remove",
        "Remove a backup job; its backups stay",
        Blocking(backups::remove_job),
    )
    .on_primary(),
    route(
        "POST",
        "/v1/groups/{group}/jobs/{job}/run",
        "backup run",
        "Start a run on every node that holds the group",
        Async(backups::run),
    ),
    route(
        "GET",
        "/v1/groups/{group}/jobs/{job}/explain",
        "backup explain",
        "Show the decision without running it",
        Async(backups::explain),
    )
    .query(&[parameter(
        "assume",
        "string",
        "KEY=VALUE that overrides a fact; may be repeated",
    )]),
    route(
        "GET",
        "/v1/groups/{group}/jobs/{job}/progress",
        "backup progress",
        "Show how far a run on this node is; null where none is",
        Blocking(backups::run_progress),
    ),
    route(
        "GET",
        "/v1/repositories",
        "repository list",
        "List this node's repositories",
        Async(backups::repositories),
    ),
    route(
        "POST",
        "/v1/repositories/{repository}/init",
        "repository init",
        "Make a repository; a run never makes one",
        Async(backups::init_repository),
    )
    .body(&[parameter(
        "force",
        "boolean",
        "also where backups were in it that are out of reach",
    )]),
    route(
        "POST",
        "/v1/repositories/{repository}/check",
        "repository check",
        "Check a repository",
        Async(backups::check_repository),
    )
    .body(&[parameter("read_data", "boolean", "read all data, too")]),
    route("GET", "/v1/backups", "backup list", "List backups and runs", Async(backups::list))
        .query(&[
            parameter("group", "string", "only of this group"),
            parameter("job", "string", "only of this job of the group"),
        ]),
    route(
        "GET",
        "/v1/backups/{backup}",
        "backup show",
        "Show a backup by its id, or the start of it",
        Async(backups::show),
    ),
    route(
        "POST",
        "/v1/backups/verify",
        "backup verify",
        "Read backups back whole and compare their checksums",
        Async(backups::verify),
    )
    .body(&[
        parameter("id", "string", "only this one"),
        parameter("ticket", "string", "makes its progress readable under this name"),
    ]),
    route(
        "POST",
        "/v1/backups/{backup}/restore",
        "backup restore",
        "Bring volumes of a backup back",
        Async(backups::restore),
    )
    .body(&[
        parameter("volume", "string", "only this volume of the backup"),
        parameter("path", "string", "a new file, or with several volumes a new directory"),
        parameter("to_group", "string", "the group of to_volume"),
        parameter("to_volume", "string", "a volume that no host uses"),
        parameter("ticket", "string", "makes its progress readable under this name"),
    ]),
    route(
        "GET",
        "/v1/progress/{ticket}",
        "progress",
        "Show how far a restore, a verification or the reading of a base is; null where none has \
         this ticket",
        Blocking(backups::progress),
    ),
];

/// The route for a request.
///
/// # Errors
///
/// `not-found` where no route has the path, `method-not-allowed` where one has it with another
/// method.
pub fn find(method: &str, path: &str) -> Result<(&'static Route, PathValues), Problem> {
    let mut other_methods = Vec::new();
    for route in ROUTES {
        if let Some(names) = route.matches(path) {
            if route.method == method {
                return Ok((route, names));
            }
            other_methods.push(route.method);
        }
    }
    if other_methods.is_empty() {
        Err(Problem::not_found(format!(
            "{path}: there is no such route; GET /v1/openapi.json shows those that are"
        )))
    } else {
        Err(Problem::new(
            405,
            "method-not-allowed",
            format!("{method} {path}: takes {}", other_methods.join(", ")),
        ))
    }
}

/// The description of all routes (OpenAPI 3.1).
#[must_use]
pub fn openapi() -> Value {
    let mut paths: Map<String, Value> = Map::new();
    for route in ROUTES {
        let mut operation = json!({
            "operationId": route.id.replace(' ', "-"),
            "summary": route.summary,
            "responses": {
                "200": { "description": "done", "content": { "application/json": {} } },
                "default": {
                    "description": "what went wrong",
                    "content": { "application/problem+json": {
                        "schema": { "$ref": "#/components/schemas/Problem" } } },
                },
            },
        });
        let in_path = route.path.split('/').filter_map(|part| {
            part.strip_prefix('{').and_then(|part| part.strip_suffix('}')).map(|name| {
                json!({ "name": name, "in": "path", "required": true,
                        "schema": { "type": "string" } })
            })
        });
        let in_query = route.query.iter().map(|parameter| {
            json!({ "name": parameter.name, "in": "query", "description": parameter.meaning,
                    "schema": { "type": parameter.kind } })
        });
        let parameters: Vec<Value> = in_path.chain(in_query).collect();
        if !parameters.is_empty() {
            operation["parameters"] = Value::Array(parameters);
        }
        if !route.body.is_empty() {
            let properties: Map<String, Value> = route
                .body
                .iter()
                .map(|parameter| {
                    let schema =
                        json!({ "type": parameter.kind, "description": parameter.meaning });
                    (parameter.name.to_owned(), schema)
                })
                .collect();
            operation["requestBody"] = json!({ "content": { "application/json": { "schema": {
                "type": "object", "properties": properties,
                "additionalProperties": route.open_body } } } });
        }
        let item = paths.entry(route.path.to_owned()).or_insert_with(|| json!({}));
        item[route.method.to_ascii_lowercase()] = operation;
    }
    paths.insert(
        "/v1/events".to_owned(),
        json!({ "get": {
            "operationId": "events",
            "summary": "Stream events as server-sent events; with follow=false, list those held",
            "parameters": [
                { "name": "since", "in": "query", "schema": { "type": "string" },
                  "description": "after this number, or from this time on" },
                { "name": "follow", "in": "query", "schema": { "type": "boolean" } } ],
            "responses": { "200": { "description": "one JSON event per message",
                "content": { "text/event-stream": {}, "application/json": {} } } },
        } }),
    );
    json!({
        "openapi": "3.1.0",
        "info": { "title": "Tidelog control socket", "version": env!("CARGO_PKG_VERSION") },
        "paths": paths,
        "components": { "schemas": { "Problem": {
            "type": "object",
            "required": ["status", "code", "detail"],
            "properties": {
                "status": { "type": "integer" },
                "code": { "type": "string", "description": "stable, for programs" },
                "detail": { "type": "string", "description": "the line that the command prints" },
            },
        } } },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_match_by_segment() {
        let (route, names) = find("GET", "/v1/groups/g/volumes/v").unwrap();
        assert_eq!(route.id, "volume show");
        assert_eq!(names, [("group", "g".to_owned()), ("volume", "v".to_owned())]);
        assert_eq!(find("GET", "/v1/groups/g/nothing").err().unwrap().status, 404);
        assert_eq!(find("PUT", "/v1/groups").err().unwrap().code, "method-not-allowed");
        assert_eq!(find("GET", "/v1/groups/").err().unwrap().status, 404);
    }

    #[test]
    fn no_two_routes_are_the_same() {
        for (index, route) in ROUTES.iter().enumerate() {
            for other in &ROUTES[..index] {
                assert!(
                    (route.method, route.path) != (other.method, other.path)
                        && route.id != other.id,
                    "{} {}",
                    route.method,
                    route.path
                );
            }
        }
    }

    #[test]
    fn every_route_is_described() {
        let document = openapi();
        for route in ROUTES {
            let operation = &document["paths"][route.path][route.method.to_ascii_lowercase()];
            assert_eq!(operation["operationId"], route.id.replace(' ', "-"));
            for parameter in route.body {
                assert!(!parameter.meaning.is_empty());
            }
        }
    }
}
