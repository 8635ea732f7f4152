//! What `tidelog resolve GROUP --preview` shows: both sides of a split brain, and what yielding
//! does.

use tidelog::control::api::{Preview, Side, SideHost};
use tidelog::units::{ByteSize, Lsn, Name};

use super::output;

pub fn show_preview(group: &Name, preview: &Preview) -> String {
    let Preview { parting, branch, refused, local, remote } = preview;
    let (here, there) = (&local.node, &remote.node);
    let mut lines = vec![format!("group {group}: histories part at LSN {}", parting.at)];
    lines.push(format!("  only here, on {here}: {}", bytes(Some(parting.local_bytes))));
    lines.extend(show_side(local, parting.at));
    lines.push(format!("  only on {there}: {}", bytes(parting.peer_bytes)));
    lines.extend(show_side(remote, parting.at));
    lines.push(format!(
        "`tidelog resolve {group} --discard-local` here, on {here}: the side of {there} survives, and \
         {here} follows it as a secondary."
    ));
    lines.push(match branch {
        Some(branch) => format!(
            "  What only {here} has is kept there as branch {branch}: `tidelog image open {group} \
             --branch {branch} --name NAME` exports it read-only as {group}/VOLUME@NAME, `tidelog \
             branch remove {group} {branch}` gives it up."
        ),
        None => format!("  No branch is made: {here} has nothing that {there} lacks."),
    });
    if let Some(refused) = refused {
        lines.push(format!("  Now it would be refused: {refused}"));
    }
    lines.push(format!(
        "For the side of {here} to survive instead, run `tidelog resolve {group} --discard-local` \
         on {there} alone: what only {there} has is then kept there as a branch. Give up no branch \
         before you have copied from it what is needed. Hosts go on at the node whose side survives."
    ));
    lines.join("\n")
}

fn bytes(bytes: Option<u64>) -> String {
    match bytes {
        Some(0) => "nothing".to_owned(),
        Some(bytes) => format!("{} of log", ByteSize(bytes)),
        None => "unknown".to_owned(),
    }
}

/// What a side has, line by line.
fn show_side(side: &Side, at: Lsn) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(why) = &side.unknown {
        lines.push(format!("what it is: unknown: {why}"));
    }
    if let Some(account) = &side.account {
        if account.from > at {
            lines.push(format!(
                "what was written before LSN {} is in its base already, and not told apart",
                account.from
            ));
        }
        if let Some((first, last)) = account.first.zip(account.last) {
            lines.push(format!("from {} to {}", output::time(first), output::time(last)));
        }
        for volume in &account.volumes {
            let cleared = match volume.cleared_bytes {
                0 => String::new(),
                bytes => format!(", {} zeroed or trimmed", ByteSize(bytes)),
            };
            let written = ByteSize(volume.written_bytes);
            lines.push(format!("volume {}: {written} written{cleared}", volume.name));
        }
        if account.volumes.is_empty() {
            lines.push("no volume was written".to_owned());
        }
        if !account.bookmarks.is_empty() {
            let names: Vec<&str> = account.bookmarks.iter().map(Name::as_str).collect();
            lines.push(format!("bookmarks: {}", names.join(", ")));
        }
    }
    for SideHost { volume, host } in &side.hosts {
        lines.push(format!("connected to {volume}: {}", super::volume::show_host(host)));
    }
    if side.hosts.is_empty() && side.account.is_some() {
        lines.push("no host is connected".to_owned());
    }
    lines.into_iter().map(|line| format!("    {line}")).collect()
}
