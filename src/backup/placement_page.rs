//! The published table of the decision, printed by the decision itself.

use std::fmt::Write;

use super::decision::{Decision, REASON_CODES, Verdict, decide};
use super::facts::{ASSUMABLE, FACT_NAMES, Facts};
use super::job::{JobSettings, Placement};
use crate::group::Role;
use crate::units::Span;

/// A change to the facts, with the words for it.
type State = (&'static str, fn(&mut Facts));

/// The states of the secondary that the table distinguishes.
const STATES: [State; 4] = [
    ("fit", |_| {}),
    ("behind", |facts| facts.replication.lag = Some(Span::from_secs(300))),
    ("unfit", |facts| facts.secondary.storage_free_bytes = Some(0)),
    ("unreachable", |facts| {
        facts.replication.link_lost = Some(Span::from_secs(600));
        facts.replication.lag = Some(Span::from_secs(600));
        facts.replication.healthy = false;
    }),
];

/// The page `docs/placement.md`.
#[must_use]
pub fn placement_page() -> String {
    let mut page = String::from(HEAD);
    for placement in Placement::ALL {
        let by_application =
            placement.as_str().contains("active") || placement.as_str().contains("passive");
        if by_application {
            for active in [Role::Primary, Role::Secondary] {
                let word = super::facts::role_word(active);
                table(
                    &mut page,
                    &format!("`{placement}`, the application on the {word}"),
                    &JobSettings { placement, ..JobSettings::default() },
                    |facts| facts.active = active,
                );
            }
        } else {
            let settings = JobSettings { placement, ..JobSettings::default() };
            table(&mut page, &format!("`{placement}`"), &settings, |_| {});
        }
    }
    page.push_str(VARIANTS);
    table(
        &mut page,
        "`prefer-secondary` with `--primary-cpu-max 80`, the primary at 90 %",
        &JobSettings { primary_cpu_max: Some(80.0), ..JobSettings::default() },
        |facts| facts.primary.cpu_percent = Some(90.0),
    );
    let conditional = JobSettings {
        conditions: "primary.cpu_percent>=80".parse().into_iter().collect(),
        ..JobSettings::default()
    };
    table(
        &mut page,
        "`prefer-secondary` with `--if primary.cpu_percent>=80`, the primary at 90 %",
        &conditional,
        |facts| facts.primary.cpu_percent = Some(90.0),
    );
    table(
        &mut page,
        "`prefer-secondary` with `--if primary.cpu_percent>=80`, the primary at 5 %",
        &conditional,
        |_| {},
    );
    table(
        &mut page,
        "`secondary-only` with `--allow-stale`",
        &JobSettings {
            placement: Placement::SecondaryOnly,
            allow_stale: true,
            ..JobSettings::default()
        },
        |_| {},
    );
    table(
        &mut page,
        "`prefer-secondary`, the repository out of the primary's reach",
        &JobSettings::default(),
        |facts| facts.primary.repository = Some(false),
    );
    table(
        &mut page,
        "`prefer-secondary`, a link lost for less than the grace",
        &JobSettings::default(),
        |facts| facts.replication.link_lost = Some(Span::from_secs(30)),
    );
    table(
        &mut page,
        "A group without a copy elsewhere, any placement",
        &JobSettings::default(),
        |facts| {
            facts.replicated = false;
        },
    );
    table(&mut page, "A retired copy, any placement", &JobSettings::default(), |facts| {
        facts.retired = facts.role == Role::Secondary;
        facts.replicated = facts.role == Role::Secondary;
    });
    page.push_str("## Reasons\n\n| code | meaning |\n| --- | --- |\n");
    for (code, meaning) in REASON_CODES {
        let _ = writeln!(page, "| `{code}` | {meaning} |");
    }
    let list = |names: &[&str]| {
        names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
    };
    let _ = write!(
        page,
        "\n## Facts\n\n`--if` compares (`>=`, `<=`) one of {}.\n\n\
         `--assume` overrides one of {}.\n",
        list(&FACT_NAMES),
        list(&ASSUMABLE)
    );
    page
}

fn table(page: &mut String, title: &str, settings: &JobSettings, change: impl Fn(&mut Facts)) {
    let _ = write!(
        page,
        "### {title}\n\n| secondary | deadline | on the primary `a` | on the secondary `b` |\n\
         | --- | --- | --- | --- |\n"
    );
    for (state, set) in STATES {
        for (deadline, deadline_passed) in [("before", false), ("after", true)] {
            let cells = [Role::Primary, Role::Secondary].map(|role| {
                let mut facts = Facts { deadline_passed, ..Facts::of_fit_pair(role) };
                set(&mut facts);
                change(&mut facts);
                cell(&decide(&facts, settings))
            });
            let _ = writeln!(page, "| {state} | {deadline} | {} | {} |", cells[0], cells[1]);
        }
    }
    page.push('\n');
}

/// `**run**`, `delegate → b`, `wait`, …, with the codes of the reasons.
fn cell(decision: &Decision) -> String {
    let mut codes: Vec<&str> = Vec::new();
    for reason in &decision.reasons {
        if !codes.contains(&reason.code.as_str()) {
            codes.push(&reason.code);
        }
    }
    let verdict = match (decision.decision, &decision.run_on) {
        (Verdict::Run, _) => "**run**".to_owned(),
        (verdict, Some(node)) => format!("{} → `{node}`", verdict.as_str()),
        (verdict, None) => verdict.as_str().to_owned(),
    };
    format!("{verdict} ({})", codes.join(", "))
}

const HEAD: &str = "\
# Who makes the backup

This page is printed by the decision itself (`placement_page` in `src/backup/placement_page.rs`),
and a test compares the two. After a change to the decision, `UPDATE_DOCS=1 cargo test --release
docs_placement` writes it anew.

Every node that holds a group decides for itself. The columns are what each of the two says, from
the facts that both see; where the link is lost, from what each can know alone. The rows are how the
secondary is:

- **fit**: linked, properly and recently replicated (`--max-lag`), with free memory and storage, and
  the repository in its reach;
- **behind**: linked, but older than the limit, or not properly replicated; a link that is lost for
  less than the grace counts as behind;
- **unfit**: lacking memory, storage, CPU or the repository;
- **unreachable**: the link is lost for longer than the grace.

The deadline is the latest start. `run` makes the backup here, `delegate` stands down for the named
node and watches that it does, `wait` decides again at the latest at the deadline, `skip` has
nothing to do, `fail` says aloud that nobody may and can. In a slot of the schedule `skip` for
`not-permitted` or `already-running` is looked at again until the deadline, since a failover or the
end of the other run changes it. A delegation is provisional: a node that refuses, fails, or shows
no claim within the grace is counted unfit for the slot (`gave-up`), and the other decides again.

";

const VARIANTS: &str = "\
## Variants

";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docs_placement_is_what_the_decision_says() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/placement.md");
        let page = placement_page();
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, &page).expect("the page can be written");
        }
        let published = std::fs::read_to_string(path).expect("docs/placement.md");
        assert!(page == published, "docs/placement.md is old; UPDATE_DOCS=1 writes it anew");
    }
}
