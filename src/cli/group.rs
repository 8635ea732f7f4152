//! `tidelog group …`, `promote`, `demote`, `switchover`, `resolve`, `branch`.

use anyhow::Result;
use clap::{ArgGroup, Args, Subcommand};
use serde_json::{Map, Value, json};

use tidelog::control::api::{Branches, Done, GroupInfo, Groups, Preview};
use tidelog::units::{Name, Span};

use super::arguments::Assignment;
use super::{Session, output};

#[derive(Subcommand)]
pub enum GroupCommand {
    /// Make a consistency group on this node
    Create {
        /// Its name
        group: Name,
    },
    /// List the groups of this node
    List,
    /// Show a group and what its nodes agree on
    Show {
        /// The group
        group: Name,
    },
    /// Set keys of a group, on all its nodes
    ///
    /// Keys: window (how far back, a duration), log_limit (bytes of log, a size), on_full (fold or
    /// block), on_peer_behind (release: a peer that lacks what is to be folded is sent an image
    /// later; block: nothing is folded that a peer lacks, and writers wait at the log's limit).
    Set {
        /// The group
        group: Name,
        /// What to set
        #[arg(required = true, value_name = "KEY=VALUE")]
        keys: Vec<Assignment>,
    },
    /// Delete this node's copy of a group, with its history
    Delete {
        /// The group
        group: Name,
    },
}

/// Make this node the primary of a group
#[derive(Args)]
pub struct PromoteArguments {
    /// The group
    group: Name,
    /// Also where the peer reigns, or this node knows that it is behind
    #[arg(long)]
    force: bool,
}

/// Make this node a secondary of a group
#[derive(Args)]
pub struct DemoteArguments {
    /// The group
    group: Name,
}

/// Make the peer the primary and follow it, losing nothing: writes wait until it has everything
#[derive(Args)]
pub struct SwitchoverArguments {
    /// The group
    group: Name,
    /// The peer that becomes primary, where there are several
    #[arg(long, value_name = "PEER")]
    to: Option<Name>,
}

/// End a split brain: the node that this is run on yields
#[derive(Args)]
#[command(group(
    ArgGroup::new("what").required(true).multiple(true).args(["preview", "discard_local"])
))]
pub struct ResolveArguments {
    /// The group
    group: Name,
    /// Only show what each side has that the other lacks
    #[arg(long)]
    preview: bool,
    /// What only this node has leaves its history, and is kept as a branch
    #[arg(long)]
    discard_local: bool,
}

/// List and give up tails that are not part of the history
#[derive(Subcommand)]
pub enum BranchCommand {
    /// List the branches of a group; `image open GROUP --branch NAME` shows one
    List {
        /// The group
        group: Name,
    },
    /// Give up a branch: what is in it is lost
    Remove {
        /// The group
        group: Name,
        /// The branch, as `branch list` shows it
        branch: String,
    },
}

pub async fn group(session: &Session, command: GroupCommand) -> Result<()> {
    match command {
        GroupCommand::Create { group } => {
            let body = json!({ "name": group });
            let show = |group: GroupInfo| format!("group {}: created", group.name);
            session.ask("POST", "/v1/groups", Some(body), show).await
        }
        GroupCommand::List => session.ask("GET", "/v1/groups", None, show_list).await,
        GroupCommand::Show { group } => {
            session.ask("GET", &format!("/v1/groups/{group}"), None, show_one).await
        }
        GroupCommand::Set { group, keys } => {
            let body: Map<String, Value> = keys
                .into_iter()
                .map(|assignment| (assignment.key, Value::String(assignment.value)))
                .collect();
            let path = format!("/v1/groups/{group}");
            session.ask("PATCH", &path, Some(Value::Object(body)), show_one).await
        }
        GroupCommand::Delete { group } => {
            let path = format!("/v1/groups/{group}");
            session.ask("DELETE", &path, None, |done: Done| done.done).await
        }
    }
}

pub async fn promote(session: &Session, arguments: &PromoteArguments) -> Result<()> {
    let path = format!("/v1/groups/{}/promote", arguments.group);
    let body = json!({ "force": arguments.force });
    session.ask("POST", &path, Some(body), |done: Done| done.done).await
}

pub async fn demote(session: &Session, arguments: &DemoteArguments) -> Result<()> {
    let path = format!("/v1/groups/{}/demote", arguments.group);
    session.ask("POST", &path, None, |done: Done| done.done).await
}

pub async fn switchover(session: &Session, arguments: &SwitchoverArguments) -> Result<()> {
    let path = format!("/v1/groups/{}/switchover", arguments.group);
    let body = arguments.to.as_ref().map(|to| json!({ "to": to }));
    session.ask("POST", &path, body, |done: Done| done.done).await
}

pub async fn resolve(session: &Session, arguments: &ResolveArguments) -> Result<()> {
    let group = &arguments.group;
    let path = format!("/v1/groups/{group}/resolve");
    if arguments.preview {
        let show = |preview: Preview| super::split_brain::show_preview(group, &preview);
        return session.ask("GET", &path, None, show).await;
    }
    let body = json!({ "discard_local": arguments.discard_local });
    session.ask("POST", &path, Some(body), |done: Done| done.done).await
}

pub async fn branch(session: &Session, command: BranchCommand) -> Result<()> {
    match command {
        BranchCommand::List { group } => {
            let path = format!("/v1/groups/{group}/branches");
            let show = |branches: Branches| super::time::show_branches(&branches.branches);
            session.ask("GET", &path, None, show).await
        }
        BranchCommand::Remove { group, branch } => {
            let path = format!("/v1/groups/{group}/branches/{branch}");
            session.ask("DELETE", &path, None, |done: Done| done.done).await
        }
    }
}

fn show_list(groups: Groups) -> String {
    let rows = groups.groups.iter().map(|group| {
        vec![
            group.name.to_string(),
            output::word(&group.role),
            output::word(&group.data_state),
            names(&group.volumes),
            group.members.iter().map(|m| m.name.to_string()).collect::<Vec<_>>().join(", "),
        ]
    });
    output::table(
        &["GROUP", "ROLE", "DATA", "VOLUMES", "MEMBERS"],
        rows.collect(),
        "no groups; make one with `tidelog group create GROUP`",
    )
}

fn names(names: &[Name]) -> String {
    names.iter().map(Name::to_string).collect::<Vec<_>>().join(", ")
}

fn show_one(group: GroupInfo) -> String {
    let mut text = format!(
        "group      {}\nid         {}\nrole       {}\ndata       {}\nvolumes    {}\n\
         window     {}\nlog_limit  {}\non_full    {}\non_peer_behind {}\nsegments   {}\n",
        group.name,
        group.id,
        output::word(&group.role),
        output::word(&group.data_state),
        if group.volumes.is_empty() { "none".to_owned() } else { names(&group.volumes) },
        group.policy.window,
        group.policy.log_limit,
        output::word(&group.policy.on_full),
        output::word(&group.policy.on_peer_behind),
        tidelog::units::ByteSize(group.segment_bytes),
    );
    for member in &group.members {
        let target =
            member.rpo_target_seconds.and_then(|s| std::time::Duration::try_from_secs_f64(s).ok());
        let target = target.map_or_else(String::new, |t| format!(", rpo {}", Span(t)));
        text.push_str(&format!(
            "member     {} ({}{target})\n",
            member.name,
            output::word(&member.mode)
        ));
    }
    for epoch in &group.epochs {
        text.push_str(&format!(
            "epoch      {} {} of {} from lsn:{} ({})\n",
            epoch.counter, epoch.epoch, epoch.author, epoch.lsn, epoch.reason
        ));
    }
    text
}
