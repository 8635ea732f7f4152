//! `tidelog serve` and `check-config`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use tidelog::config::Config;
use tidelog::node::Node;

use super::output;

/// Run the appliance: SIGTERM drains, SIGHUP reloads the configuration
#[derive(Args)]
pub struct ServeArguments {
    /// The configuration
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// How to log to standard error; RUST_LOG chooses what
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

/// How long the end of the process waits for calls that are still under way.
const RUNTIME_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum LogFormat {
    /// Lines for people
    Text,
    /// One JSON object a line
    Json,
}

/// Check a configuration without using it
#[derive(Args)]
pub struct CheckConfigArguments {
    /// The configuration
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

pub fn check_config(arguments: &CheckConfigArguments, json: bool) -> Result<()> {
    let config = Config::load(&arguments.config)?;
    let text = format!("{}: node {}: is valid", arguments.config.display(), config.node);
    if json {
        output::print_json(&serde_json::json!({ "done": text }))
    } else {
        output::print(&text)
    }
}

pub fn serve(arguments: &ServeArguments) -> Result<()> {
    let config = Config::load(&arguments.config)?;
    start_logging(arguments.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("tidelog")
        .build()
        .context("the runtime could not be made")?;
    let result = runtime.block_on(run(arguments, config));
    // A call that hangs in a file system cannot be woken; the process ends without it.
    runtime.shutdown_timeout(RUNTIME_PATIENCE);
    result
}

pub(super) fn start_logging(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}

async fn run(arguments: &ServeArguments, config: Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let node = Node::start(config).await?;
    notify_manager(&[NotifyState::Ready]);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => match Config::load(&arguments.config) {
                Ok(config) => node.reload(config),
                Err(error) => tracing::error!("not reloaded: {error}"),
            },
        }
    }
    notify_manager(&[NotifyState::Stopping]);
    node.stop().await;
    Ok(())
}

/// Tells the service manager, where there is one.
pub(super) fn notify_manager(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(false, states) {
        tracing::warn!("the service manager could not be told: {error}");
    }
}
