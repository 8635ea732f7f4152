//! Slots without a backup: every node raises them, and nothing else. What is expected is known from
//! the slots, from which backups were made, and from who can see the repository; nothing of what
//! the nodes' own runs ended as.

use std::time::Duration;

use tidelog::backup::{Filled, Found, Reigns, SlotResult, newest_over, present_reign};
use tidelog::units::{LogTime, Span};

use super::backups::SLOT_EVERY;
use super::world::World;

/// What the clocks of nodes may differ by.
const ALLOWANCE: Span = Span::from_secs(5);
/// An alarm is looked into again after so long.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// After so long a node must know what it could find out.
const KNOWN_AFTER: Duration = Duration::from_secs(13);

/// What a node must raise about a group depends on nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Basis {
    life: u64,
    slot: LogTime,
    made: bool,
    /// A later backup makes up for it.
    made_up_for: bool,
    seen_here: bool,
    /// By another node of the group that this one can ask.
    seen_there: bool,
}

impl World {
    /// Whether a node can ask another.
    pub fn hears(&self, node: usize, peer: usize) -> bool {
        let linked = self.nodes[node].links[&peer].core.link_down().is_none();
        linked && self.nodes[peer].up && !self.weather(node, peer).partitioned
    }

    /// Whether the repository holds the result of a slot, as a node sees it.
    fn sees_result(&self, node: usize, group: usize, slot: LogTime) -> Result<Filled, String> {
        let results = self.results(node, group, slot)?;
        Ok(self.judge(node, group, slot, &results))
    }

    /// Whether results of a slot make it made, for a node.
    fn judge(&self, node: usize, group: usize, slot: LogTime, results: &[SlotResult]) -> Filled {
        let found = self.nodes[node].group(group).expect("it runs");
        Reigns::of(found, slot).made(results)
    }

    /// Looks for the newest slot whose time is over, as the scheduler does.
    pub fn look_for_overdue(&mut self, node: usize, group: usize) {
        let Some(backups) = &self.backups else { return };
        let (wall, now) = (self.nodes[node].wall(), self.nodes[node].monotonic());
        let (schedule, settings) = (&backups.schedule, &backups.settings);
        let newest = newest_over(schedule, settings, ALLOWANCE, backups.since, wall);
        let Some(slot) = newest else { return };
        let Some(found) = self.nodes[node].group(group).cloned() else { return };
        let reign = present_reign(&found);
        let keeper = &mut self.nodes[node].keeper;
        let watch = keeper.watches.entry(group).or_default();
        if let Some(slot) = watch.unsettled() {
            watch.settle(slot, &Reigns::of(&found, slot));
        }
        if !watch.is_due(slot, reign, now, LOOK_AGAIN) {
            return;
        }
        let found = Found::from(self.sees_result(node, group, slot), || {
            self.asked_by(node, group).into_iter().find_map(|peer| {
                let answers = self.hears(node, peer);
                let seen = answers.then(|| self.results(peer, group, slot).ok()).flatten();
                seen.map(|results| self.judge(node, group, slot, &results))
            })
        });
        let keeper = &mut self.nodes[node].keeper;
        if !keeper.watches.entry(group).or_default().found(slot, &found) {
            return;
        }
        let raised = match found {
            Found::Made | Found::MadePerhaps => {
                let ended = keeper.alarms.remove(&group).is_some();
                return self.coverage.add("alarms ended", u64::from(ended));
            }
            Found::NotMade => "overdue",
            Found::Unknown(_) => "unknown",
        };
        let before = keeper.alarms.insert(group, (slot, raised));
        if before != Some((slot, raised)) {
            self.coverage.add(&format!("slots {raised}"), 1);
            self.say(format_args!("{} raises {slot}: {raised}", self.nodes[node].name));
        }
    }

    /// A node raises exactly what it must, once it had the time to find out.
    pub fn check_alarms(&mut self, node: usize, group: usize) {
        let Some(backups) = &self.backups else { return };
        let settings = &backups.settings;
        let until = settings.deadline.0 + settings.run_limit.0 + ALLOWANCE.0;
        let every = SLOT_EVERY.as_nanos() as u64;
        let slot = LogTime(self.nodes[node].wall().before(until).0 / every * every);
        if slot <= backups.since {
            return;
        }
        let done = |slot: &LogTime| backups.done.get(&(group, *slot));
        let made = |slot: &LogTime| {
            done(slot).is_some_and(|done| self.counts(node, group, *slot, done) > 0)
        };
        let seen = |peer: &usize| self.hears(node, *peer) && backups.is_in_sight(*peer);
        let basis = Basis {
            life: self.nodes[node].life,
            slot,
            made: made(&slot),
            made_up_for: backups
                .done
                .range((group, slot)..)
                .any(|((of, later), _)| *of == group && *later > slot),
            seen_here: backups.is_in_sight(node),
            seen_there: self.asked_by(node, group).iter().any(seen),
        };
        let now = self.nodes[node].monotonic();
        let keeper = &mut self.nodes[node].keeper;
        match keeper.basis.get(&group) {
            Some((known, since)) if *known == basis => {
                if now < *since + KNOWN_AFTER {
                    return;
                }
            }
            _ => {
                keeper.basis.insert(group, (basis, now));
                return;
            }
        }
        let raised = keeper.alarms.get(&group).copied();
        let raised = raised.filter(|(of, _)| *of == slot).map(|(_, state)| state);
        let seen = basis.seen_here || basis.seen_there;
        let well = match raised {
            // Nobody need know of a later backup but who made it.
            _ if basis.made_up_for && !basis.made => true,
            None => basis.made,
            Some("unknown") => !seen,
            Some(_) => !basis.made && seen,
        };
        let name = &self.nodes[node].name;
        assert!(well, "{name}: group {group}: raises {raised:?} where {basis:?}");
        self.coverage.add("alarms checked", 1);
    }
}
