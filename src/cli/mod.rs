//! The command line: one file per family of commands, each talking to the control socket alone.

mod arguments;
mod attach;
mod backup;
mod check;
mod demo;
mod events;
mod group;
mod job;
mod manual;
pub mod output;
mod peer;
mod progress;
mod serve;
mod split_brain;
mod status;
mod time;
mod volume;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};
use serde_json::Value;

use tidelog::config::DEFAULT_SOCKET;
use tidelog::control::Client;

/// Continuous data protection, replication and backup of block volumes
#[derive(Parser)]
#[command(name = "tidelog", version, propagate_version = true)]
pub struct Cli {
    /// Control socket of the node
    #[arg(long, global = true, env = "TIDELOG_SOCKET", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Print JSON instead of tables
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Status(status::StatusArguments),
    /// Make, show, change and delete consistency groups
    #[command(subcommand)]
    Group(group::GroupCommand),
    /// Make, show, resize and delete volumes
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Pair this node with others
    #[command(subcommand)]
    Peer(peer::PeerCommand),
    Replicate(peer::ReplicateArguments),
    Pause(peer::PauseArguments),
    Resume(peer::ResumeArguments),
    Promote(group::PromoteArguments),
    Demote(group::DemoteArguments),
    Switchover(group::SwitchoverArguments),
    Scrub(check::ScrubArguments),
    Verify(check::VerifyArguments),
    Resolve(group::ResolveArguments),
    #[command(subcommand)]
    Branch(group::BranchCommand),
    Bookmark(time::BookmarkArguments),
    Timeline(time::TimelineArguments),
    Rewind(time::RewindArguments),
    /// Open, list and close images of past moments
    #[command(subcommand)]
    Image(time::ImageCommand),
    /// Set, show and remove backup jobs
    #[command(subcommand)]
    Job(job::JobCommand),
    /// Make, check and list repositories
    #[command(subcommand)]
    Repository(backup::RepositoryCommand),
    /// Run jobs, explain decisions, list, verify and restore backups
    #[command(subcommand)]
    Backup(backup::BackupCommand),
    Events(events::EventsArguments),
    Attach(attach::AttachArguments),
    Detach(attach::DetachArguments),
    Demo(demo::Args),
    Serve(serve::ServeArguments),
    CheckConfig(serve::CheckConfigArguments),
    Completions(manual::CompletionsArguments),
    Man(manual::ManArguments),
}

/// How commands reach the node and print.
pub struct Session {
    client: Client,
    json: bool,
}

impl Session {
    /// Asks the node; prints the answer as JSON, or as `show` says.
    async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
        show: impl FnOnce(T) -> String,
    ) -> Result<()> {
        if self.json {
            let value: Value = self.client.call(method, path, body).await?;
            return output::print_json(&value);
        }
        let answer: T = self.client.call(method, path, body).await?;
        output::print(&show(answer))
    }
}

/// Parses what was typed, and does it.
pub fn run() -> Result<()> {
    let cli = Cli::parse();
    let session = Session { client: Client::new(cli.socket), json: cli.json };
    match cli.command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Attach(arguments) => attach::attach(arguments, session.json),
        Command::Detach(arguments) => attach::detach(&arguments, session.json),
        Command::Serve(arguments) => serve::serve(&arguments),
        Command::CheckConfig(arguments) => serve::check_config(&arguments, session.json),
        Command::Completions(arguments) => manual::completions(&arguments),
        Command::Man(arguments) => manual::man(&arguments),
        command => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(call(&session, command))
        }
    }
}

async fn call(session: &Session, command: Command) -> Result<()> {
    match command {
        Command::Status(arguments) => status::status(session, &arguments).await,
        Command::Group(command) => group::group(session, command).await,
        Command::Volume(command) => volume::volume(session, command).await,
        Command::Peer(command) => peer::peer(session, command).await,
        Command::Replicate(arguments) => peer::replicate(session, &arguments).await,
        Command::Pause(arguments) => peer::pause(session, &arguments).await,
        Command::Resume(arguments) => peer::resume(session, &arguments).await,
        Command::Promote(arguments) => group::promote(session, &arguments).await,
        Command::Demote(arguments) => group::demote(session, &arguments).await,
        Command::Switchover(arguments) => group::switchover(session, &arguments).await,
        Command::Verify(arguments) => check::verify(session, &arguments).await,
        Command::Scrub(arguments) => check::scrub(session, &arguments).await,
        Command::Resolve(arguments) => group::resolve(session, &arguments).await,
        Command::Branch(command) => group::branch(session, command).await,
        Command::Bookmark(arguments) => time::bookmark(session, arguments).await,
        Command::Timeline(arguments) => time::timeline(session, &arguments).await,
        Command::Rewind(arguments) => time::rewind(session, &arguments).await,
        Command::Image(command) => time::image(session, command).await,
        Command::Job(command) => job::job(session, command).await,
        Command::Repository(command) => backup::repository(session, command).await,
        Command::Backup(command) => backup::backup(session, command).await,
        Command::Events(arguments) => events::events(session, &arguments).await,
        Command::Demo(_)
        | Command::Attach(_)
        | Command::Detach(_)
        | Command::Serve(_)
        | Command::CheckConfig(_)
        | Command::Completions(_)
        | Command::Man(_) => {
            unreachable!("answered without a node")
        }
    }
}
