//! The control socket: one table of routes, answered over HTTP on a Unix socket, described by
//! `openapi.json`, and called by the command line through [`Client`].
//!
//! A request becomes a [`Call`]; `dispatch` finds its [`Route`], sends it on to the group's primary
//! where the route appends and this node is not it, and leaves an audit event where it changed
//! state. Handlers (one file per family) turn calls into calls of the rooms below and their answers
//! into the types of [`api`]; `attention` judges a status. `metrics` reads the rooms' counters when
//! it is asked; `journal` keeps events in a file.

pub mod api;

mod attention;
mod backups;
mod base_file;
mod checks;
mod client;
mod connections;
mod context;
mod dispatch;
mod groups;
mod images;
mod journal;
mod metrics;
mod notify;
mod peers;
mod problem;
mod route;
mod server;
mod volumes;

pub use attention::{CODES as ATTENTION_CODES, attention};
pub use client::{Client, ClientError, EventStream, encode};
pub use context::Context;
pub use dispatch::{Caller, answer_peers, dispatch};
pub use journal::FileJournal;
pub use metrics::metrics_text;
pub use notify::start_notifying;
pub use problem::Problem;
pub use route::{Call, ROUTES, Route, openapi};
pub use server::{ControlServer, MetricsServer, ServerError};
