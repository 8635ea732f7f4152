//! `tidelog bookmark`, `timeline`, `rewind`, `image …`: moments.

use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;

use tidelog::control::api::{
    BookmarkInfo, Bookmarks, Branch, Done, ImageInfo, Images, RewindDone, Timeline,
};
use tidelog::units::{ByteSize, Name};

use super::arguments::ImageName;
use super::{Session, output};

/// Name the present moment of a group
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct BookmarkArguments {
    /// The group
    #[arg(required = true)]
    group: Option<Name>,
    /// The bookmark's name
    #[arg(required = true)]
    name: Option<Name>,
    /// What the moment is good for
    #[arg(long, value_enum, default_value_t = ConsistencyArgument::Crash)]
    consistency: ConsistencyArgument,
    /// Keep it when the log no longer covers it, at the cost of the blocks that change
    #[arg(long)]
    pin: bool,
    #[command(subcommand)]
    command: Option<BookmarkCommand>,
}

#[derive(Clone, Copy, ValueEnum)]
enum ConsistencyArgument {
    /// As after a power cut
    Crash,
    /// The file system is frozen or unmounted now
    Filesystem,
    /// The application says so
    Application,
}

#[derive(Subcommand)]
enum BookmarkCommand {
    /// List the bookmarks of a group
    List {
        /// The group
        group: Name,
    },
    /// Remove a bookmark
    Remove {
        /// The group
        group: Name,
        /// The bookmark's name
        name: Name,
    },
}

/// Show how far back a group goes: window, epochs, bookmarks, rewinds, and what holds and branches
/// cost
#[derive(Args)]
pub struct TimelineArguments {
    /// The group
    group: Name,
}

/// Take a group back to an earlier moment: its volumes, their sizes and their data
///
/// Jobs, policy, peers and bookmarks stay as they are. What was written since stays in the log, as
/// long as the window holds it: an image shows it, and the rewind's answer names the position that
/// undoes it. Peers go back too. Look at the moment first: `tidelog image open GROUP --at POINT`.
#[derive(Args)]
pub struct RewindArguments {
    /// The group
    group: Name,
    /// The moment: a time, -15m, lsn:N or a bookmark's name
    #[arg(long, value_name = "POINT", allow_hyphen_values = true)]
    to: String,
    /// Disconnect the clients of its volumes, which would find other data under what they have read
    #[arg(short, long)]
    force: bool,
}

#[derive(Subcommand)]
pub enum ImageCommand {
    /// Open an image of a moment or a branch; it is exported read-only as GROUP/VOLUME@NAME until
    /// it is closed
    Open {
        /// The group
        group: Name,
        /// The moment: now, a time, -15m, lsn:N or a bookmark's name
        #[arg(
            long,
            value_name = "POINT",
            allow_hyphen_values = true,
            required_unless_present = "branch",
            conflicts_with = "branch"
        )]
        at: Option<String>,
        /// A branch, as `branch list` shows it: the group as it was when that was cut off
        #[arg(long)]
        branch: Option<String>,
        /// The image's name; one is made up otherwise
        #[arg(long)]
        name: Option<Name>,
    },
    /// List the opened images
    List {
        /// Only of this group
        group: Option<Name>,
    },
    /// Close an image, and free what it costs
    Close {
        /// GROUP@NAME
        image: ImageName,
    },
}

pub async fn bookmark(session: &Session, arguments: BookmarkArguments) -> Result<()> {
    match (arguments.command, arguments.group, arguments.name) {
        (Some(BookmarkCommand::List { group }), ..) => {
            let path = format!("/v1/groups/{group}/bookmarks");
            let show = |bookmarks: Bookmarks| show_bookmarks(&bookmarks.bookmarks);
            session.ask("GET", &path, None, show).await
        }
        (Some(BookmarkCommand::Remove { group, name }), ..) => {
            let path = format!("/v1/groups/{group}/bookmarks/{name}");
            session.ask("DELETE", &path, None, |done: Done| done.done).await
        }
        (None, Some(group), Some(name)) => {
            let path = format!("/v1/groups/{group}/bookmarks");
            let value = arguments.consistency.to_possible_value();
            let consistency = value.map(|value| value.get_name().to_owned());
            let body = json!({ "name": name, "consistency": consistency, "pinned": arguments.pin });
            let show = |bookmark: BookmarkInfo| {
                let position = output::position(&bookmark.position);
                format!("bookmark {} of group {group}: {position}", bookmark.name)
            };
            session.ask("POST", &path, Some(body), show).await
        }
        _ => unreachable!("clap requires both"),
    }
}

fn show_bookmarks(bookmarks: &[BookmarkInfo]) -> String {
    let rows = bookmarks.iter().map(|bookmark| {
        vec![
            bookmark.name.to_string(),
            format!("lsn:{}", bookmark.position.lsn),
            output::time(bookmark.position.time),
            output::age(bookmark.position.time),
            output::word(&bookmark.consistency),
            match (&bookmark.pin_lost, bookmark.pinned, bookmark.covered) {
                (Some(reason), ..) => format!("pin lost: {reason}"),
                (None, true, _) => "pinned".to_owned(),
                (None, false, true) => "yes".to_owned(),
                (None, false, false) => "no".to_owned(),
            },
        ]
    });
    output::table(
        &["BOOKMARK", ">POSITION", "TIME", ">AGE", "CONSISTENCY", "COVERED"],
        rows.collect(),
        "no bookmarks; make one with `tidelog bookmark GROUP NAME`",
    )
}

pub async fn timeline(session: &Session, arguments: &TimelineArguments) -> Result<()> {
    let path = format!("/v1/groups/{}/timeline", arguments.group);
    session.ask("GET", &path, None, |timeline| show_timeline(&timeline)).await
}

pub async fn rewind(session: &Session, arguments: &RewindArguments) -> Result<()> {
    let path = format!("/v1/groups/{}/rewind", arguments.group);
    let body = json!({ "to": arguments.to, "force": arguments.force });
    let show = |done: RewindDone| {
        format!(
            "group {group}: went back to {}; it is at lsn:{} now\nwhat was left behind: \
             `tidelog image open {group} --at lsn:{from}` shows it, \
             `tidelog rewind {group} --to lsn:{from}` brings it back",
            output::position(&done.to),
            done.lsn,
            group = done.group,
            from = done.from.lsn,
        )
    };
    session.ask("POST", &path, Some(body), show).await
}

fn show_timeline(timeline: &Timeline) -> String {
    let window = &timeline.window;
    let mut text = format!(
        "group {}: from {}\n{:width$}to {}\n",
        timeline.group,
        output::position(&window.from),
        "",
        output::position(&window.to),
        width = "group : ".len() + timeline.group.as_str().len(),
    );
    let epochs = timeline.epochs.iter().map(|epoch| {
        vec![
            epoch.counter.to_string(),
            epoch.epoch.to_string(),
            format!("lsn:{}", epoch.lsn),
            epoch.author.to_string(),
            epoch.reason.clone(),
        ]
    });
    let header = ["#", "EPOCH", ">FROM", "PRIMARY", "REASON"];
    text.push_str(&format!("\n{}\n", output::table(&header, epochs.collect(), "no epochs")));
    text.push_str(&format!("\n{}\n", show_bookmarks(&timeline.bookmarks)));
    if !timeline.rewinds.is_empty() {
        let rewinds = timeline.rewinds.iter().map(|rewind| {
            vec![
                format!("lsn:{}", rewind.at.lsn),
                output::time(rewind.at.time),
                format!("lsn:{}", rewind.to.lsn),
                output::time(rewind.to.time),
            ]
        });
        let header = [">REWIND FROM", "TIME", ">TO", "TIME"];
        text.push_str(&format!("\n{}\n", output::table(&header, rewinds.collect(), "")));
    }
    let holds = timeline.holds.iter().map(|hold| {
        let what = match (&hold.image, &hold.bookmark, &hold.branch) {
            (Some(image), ..) => format!("image {}@{image}", timeline.group),
            (_, Some(bookmark), _) => format!("bookmark {bookmark}"),
            (.., branch) => format!("branch {}", branch.as_deref().unwrap_or_default()),
        };
        vec![
            what,
            hold.owner.clone(),
            format!("lsn:{}", hold.position.lsn),
            output::time(hold.position.time),
            ByteSize(hold.disk_bytes).to_string(),
            ByteSize(hold.memory_bytes).to_string(),
            hold.lost.clone().unwrap_or_else(|| "readable".to_owned()),
        ]
    });
    let header = ["HOLD", "BY", ">POSITION", "TIME", ">DISK", ">MEMORY", "STATE"];
    text.push_str(&format!("\n{}\n", output::table(&header, holds.collect(), "no holds")));
    text.push_str(&format!("\n{}\n", show_branches(&timeline.branches)));
    text
}

pub fn show_branches(branches: &[Branch]) -> String {
    let rows = branches.iter().map(|branch| {
        vec![
            branch.name.clone(),
            format!("lsn:{}", branch.from.lsn),
            ByteSize(branch.bytes).to_string(),
            if branch.authored { "written here" } else { "received" }.to_owned(),
            output::time(branch.to.time),
            branch.reason.clone(),
        ]
    });
    let header = ["BRANCH", ">FROM", ">SIZE", "ORIGIN", "TO", "REASON"];
    output::table(&header, rows.collect(), "no branches")
}

pub async fn image(session: &Session, command: ImageCommand) -> Result<()> {
    match command {
        ImageCommand::Open { group, at, branch, name } => {
            let path = format!("/v1/groups/{group}/images");
            let body = json!({ "at": at, "branch": branch, "name": name });
            let show = |image: ImageInfo| {
                format!(
                    "image {}@{}: {}\nexports {}",
                    image.group,
                    image.name,
                    output::position(&image.position),
                    image.exports.join(", ")
                )
            };
            session.ask("POST", &path, Some(body), show).await
        }
        ImageCommand::List { group } => {
            let path = group.map_or_else(
                || "/v1/images".to_owned(),
                |group| format!("/v1/images?group={group}"),
            );
            session.ask("GET", &path, None, show_images).await
        }
        ImageCommand::Close { image } => {
            let path = format!("/v1/groups/{}/images/{}", image.group, image.name);
            session.ask("DELETE", &path, None, |done: Done| done.done).await
        }
    }
}

fn show_images(images: Images) -> String {
    let rows = images.images.iter().map(|image| {
        vec![
            format!("{}@{}", image.group, image.name),
            format!("lsn:{}", image.position.lsn),
            output::time(image.position.time),
            output::age(image.opened),
            image.owner.clone(),
            image.broken.clone().unwrap_or_else(|| "readable".to_owned()),
        ]
    });
    output::table(
        &["IMAGE", ">POSITION", "TIME", ">OPENED", "BY", "STATE"],
        rows.collect(),
        "no images; open one with `tidelog image open GROUP --at POINT`",
    )
}
