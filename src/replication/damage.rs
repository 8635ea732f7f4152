//! What is known to be damaged of each group on this node, since when and found by whom, until it
//! is whole again or gone; with the last scrub and the last comparison beside it. Kept over
//! restarts.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::events::Severity;
use crate::group::{DamagedPart, Found, Group};
use crate::units::{GroupId, LogTime, Lsn, Name};

use super::peers::{StoreError, replace};
use super::scrub::ScrubStatus;
use super::service::{Shared, locked};
use super::verify::VerifyStatus;

/// The file of all this, under the service's directory.
const FILE: &str = "damaged";
/// Parts of a group that are listed at most; more are counted.
const PARTS_MAX: usize = 1000;

/// A part of a group that is damaged on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamageInfo {
    /// Which.
    #[serde(flatten)]
    pub part: DamagedPart,
    /// What is wrong, and where.
    pub what: String,
    /// Who found it: `scrub`, `check` (the log is read again all the time) or `read`.
    pub found_by: String,
    /// When.
    pub since: LogTime,
    /// Why it could not be repaired when that was tried last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repair: Option<String>,
}

/// What is known of one group.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Ledger {
    damaged: Vec<DamageInfo>,
    /// Parts that were found damaged beyond those that are listed, since the last scrub began.
    #[serde(default)]
    unlisted: u64,
    #[serde(default)]
    pub(super) scrub: Option<ScrubStatus>,
    #[serde(default)]
    pub(super) verify: Option<VerifyStatus>,
    /// The last comparison with each peer that found a difference, until one finds none.
    #[serde(default)]
    differences: Vec<VerifyStatus>,
    /// Where the log was when a difference was found or had ended last, or its peer was stopped: a
    /// backup of before may hold what differed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    differed_until: Option<Lsn>,
}

pub(super) type Ledgers = HashMap<GroupId, Ledger>;

impl Ledger {
    /// Notes a part; whether that is news.
    fn add(&mut self, damage: DamageInfo) -> bool {
        if let Some(known) = self.damaged.iter_mut().find(|known| known.part == damage.part) {
            known.what = damage.what;
            return false;
        }
        if self.damaged.len() >= PARTS_MAX {
            self.unlisted += 1;
        } else {
            self.damaged.push(damage);
        }
        true
    }

    /// Takes a part out; what it was.
    fn remove(&mut self, part: &DamagedPart) -> Option<DamageInfo> {
        let index = self.damaged.iter().position(|known| known.part == *part)?;
        Some(self.damaged.remove(index))
    }

    /// Notes why a part could not be repaired.
    pub(super) fn not_repaired(&mut self, part: &DamagedPart, why: String) {
        if let Some(known) = self.damaged.iter_mut().find(|known| known.part == *part) {
            known.repair = Some(why);
        }
    }

    /// A line on the parts of which `wanted` tells true.
    fn line(&self, wanted: impl Fn(&DamagedPart) -> bool) -> Option<String> {
        let mut parts = self.damaged.iter().filter(|known| wanted(&known.part));
        let first = parts.next()?.what.clone();
        Some(match parts.count() as u64 + self.unlisted {
            0 => first,
            more => format!("{first}; and {more} more parts"),
        })
    }

    /// What is damaged of the log.
    pub(super) fn of_log(&self) -> Option<String> {
        self.line(|part| matches!(part, DamagedPart::Log { .. }))
    }

    /// What is damaged of the base.
    pub(super) fn of_base(&self) -> Option<String> {
        self.line(|part| matches!(part, DamagedPart::Base { .. }))
    }

    /// Takes over what a comparison found: a difference, or that those in `ended` are none, with
    /// the log at `head`.
    pub(super) fn note_compared(
        &mut self,
        status: &VerifyStatus,
        ended: &[VerifyStatus],
        head: Lsn,
    ) {
        let known = self.differences.len();
        self.differences.retain(|known| !ended.contains(known));
        let differs = status.difference().is_some();
        if differs || self.differences.len() < known {
            self.differed_until = self.differed_until.max(Some(head));
        }
        if differs {
            self.differences.retain(|known| known.peer != status.peer);
            self.differences.push(status.clone());
        }
    }

    /// The comparisons that speak against the copies, the last one of each peer.
    pub(super) fn differences(&self) -> &[VerifyStatus] {
        &self.differences
    }

    /// Whether images at `lsn` were the same on all nodes that hold the group, as far as is known.
    /// A difference with one that does not stands, should it come back.
    pub(super) fn is_same_at(&self, lsn: Lsn, is_member: impl Fn(&Name) -> bool) -> bool {
        !self.differences.iter().any(|known| is_member(&known.peer))
            && self.differed_until.is_none_or(|until| lsn > until)
    }

    /// A peer holds the group no longer, with the log at `head`.
    pub(super) fn note_stopped(&mut self, peer: &Name, head: Lsn) {
        if self.differences.iter().any(|known| known.peer == *peer) {
            self.differed_until = self.differed_until.max(Some(head));
        }
    }

    /// What speaks against the copies here and on one peer, or on any.
    pub(super) fn differs_from(&self, peer: Option<&str>) -> Option<String> {
        let is_it = |known: &&VerifyStatus| peer.is_none_or(|peer| known.peer.as_str() == peer);
        self.differences.iter().find(is_it)?.difference()
    }

    /// The damaged parts, as they were found.
    pub(super) fn parts(&self) -> &[DamageInfo] {
        &self.damaged
    }

    /// A scrub begins: it finds again what is beyond the list.
    pub(super) fn begin_scrub(&mut self) {
        self.unlisted = 0;
    }
}

impl Shared {
    /// Looks at a part, notes what it found, and repairs it where that can be done now; what it
    /// found, and whether the part is whole then.
    pub(super) fn look(&self, group: &Group, part: &DamagedPart, found_by: &str) -> (Found, bool) {
        let found = group.check_part(part);
        self.note(group, part, found.clone(), found_by);
        if !matches!(found, Found::Damaged(_)) || self.replica(group.id()).is_none() {
            return (found, true);
        }
        let repaired = self.repair(group, part);
        if repaired {
            self.note(group, part, Found::Whole(0), found_by);
        }
        (found, repaired)
    }

    /// Notes what was found of a part.
    pub(super) fn note(&self, group: &Group, part: &DamagedPart, found: Found, found_by: &str) {
        // A group that is being deleted loses its files under whoever reads them.
        if self.replica(group.id()).is_none() {
            return;
        }
        match found {
            Found::Damaged(what) => self.note_damage(group, part, what, found_by),
            Found::Whole(_) => self.note_whole(group, part, "is whole again"),
            Found::Gone => self.note_whole(group, part, "is no longer part of the group"),
            Found::Unknown => {}
        }
    }

    fn note_damage(&self, group: &Group, part: &DamagedPart, what: String, found_by: &str) {
        let damage = DamageInfo {
            part: *part,
            what: what.clone(),
            found_by: found_by.to_owned(),
            since: self.wall(),
            repair: None,
        };
        if !self.change_ledger(group.id(), |ledger| ledger.add(damage)) {
            return;
        }
        self.save_ledgers();
        let name = group.name();
        let text = format!(
            "group {name}: damaged: {what}; found by {found_by}; `tidelog status {name}` shows \
             whether it was repaired and what it means for backups"
        );
        let code = format!("{}-damaged", family(part));
        let details = json!({ "part": part, "what": what, "found_by": found_by });
        self.context.events.emit(Severity::Error, &code, Some(name.as_str()), text, details);
    }

    fn note_whole(&self, group: &Group, part: &DamagedPart, how: &str) {
        let Some(was) = self.change_ledger(group.id(), |ledger| ledger.remove(part)) else {
            return;
        };
        self.save_ledgers();
        let name = group.name();
        let text = format!("group {name}: was damaged, and {how}: {}", was.what);
        let code = format!("{}-mended", family(part));
        let details = json!({ "part": part });
        self.context.events.emit(Severity::Info, &code, Some(name.as_str()), text, details);
    }

    /// What is known of a group.
    pub(super) fn ledger(&self, group: GroupId) -> Ledger {
        locked(&self.ledgers).get(&group).cloned().unwrap_or_default()
    }

    pub(super) fn change_ledger<T>(
        &self,
        group: GroupId,
        change: impl FnOnce(&mut Ledger) -> T,
    ) -> T {
        change(locked(&self.ledgers).entry(group).or_default())
    }

    /// What is known of groups that are gone, or of copies that begin anew, is of nothing any more.
    /// Of a group that is only not open yet it stays.
    pub(super) fn forget_ledgers(self: &Arc<Self>, gone: &HashSet<GroupId>) {
        // The lock is held over a write: who looks at groups does not wait for that.
        if gone.is_empty() {
            return;
        }
        let mut ledgers = locked(&self.ledgers);
        let known = ledgers.len();
        ledgers.retain(|group, _| !gone.contains(group));
        if ledgers.len() == known {
            return;
        }
        let shared = Arc::clone(self);
        tokio::task::spawn_blocking(move || shared.save_ledgers());
    }

    /// Keeps what is known over a restart.
    pub(super) fn save_ledgers(&self) {
        // The lock is held over the write: a later state is never overwritten by an older one.
        let ledgers = locked(&self.ledgers);
        if let Err(error) = store(&self.config.state_dir, &ledgers) {
            tracing::error!("{error}");
        }
    }
}

/// What events call the part of a group that this is a part of.
fn family(part: &DamagedPart) -> &'static str {
    match part {
        DamagedPart::Log { .. } => "log",
        DamagedPart::Base { .. } => "base",
        DamagedPart::Kept { .. } => "moment",
    }
}

fn store(dir: &Path, ledgers: &Ledgers) -> Result<(), StoreError> {
    let known: Vec<_> =
        ledgers.iter().filter(|(_, ledger)| **ledger != Ledger::default()).collect();
    replace(dir, FILE, &serde_json::to_vec(&known).expect("plain data becomes JSON"))
}

/// What was known before this process began.
pub(super) fn load(dir: &Path) -> Ledgers {
    let path = dir.join(FILE);
    let read = match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return HashMap::new(),
        Err(error) => Err(error.to_string()),
        Ok(bytes) => serde_json::from_slice::<Vec<(GroupId, Ledger)>>(&bytes)
            .map_err(|error| error.to_string()),
    };
    let mut ledgers: Ledgers = match read {
        Ok(known) => known.into_iter().collect(),
        Err(error) => {
            tracing::error!("{}: {error}; all is checked anew", path.display());
            return HashMap::new();
        }
    };
    for ledger in ledgers.values_mut() {
        if let Some(scrub) = &mut ledger.scrub {
            scrub.ended_with_the_process();
        }
        if let Some(verify) = &mut ledger.verify
            && verify.ended_with_the_process()
        {
            let ended = verify.clone();
            ledger.note_compared(&ended, &[], ended.position.lsn);
        }
    }
    ledgers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::MemoryDisk;
    use crate::replication::drive::tests::node_on;

    fn damage(segment: u64) -> DamageInfo {
        DamageInfo {
            part: DamagedPart::Log { segment },
            what: format!("segment {segment}"),
            found_by: "check".to_owned(),
            since: LogTime(1),
            repair: None,
        }
    }

    #[test]
    fn a_part_is_news_once_and_the_list_has_an_end() {
        let mut ledger = Ledger::default();
        assert!(ledger.add(damage(0)));
        assert!(!ledger.add(damage(0)), "known");
        for segment in 1..PARTS_MAX as u64 + 7 {
            assert!(ledger.add(damage(segment)));
        }
        assert_eq!(ledger.parts().len(), PARTS_MAX);
        assert_eq!(ledger.of_log().unwrap(), "segment 0; and 1006 more parts");
        assert_eq!(ledger.of_base(), None);
        assert_eq!(ledger.remove(&DamagedPart::Log { segment: 0 }), Some(damage(0)));
        assert!(ledger.of_log().unwrap().starts_with("segment 1; and 1005 more"));
    }

    #[tokio::test]
    async fn what_is_known_of_a_group_that_is_not_open_is_kept_and_goes_with_a_deleted_one() {
        let (node, group) = node_on(Arc::new(MemoryDisk::new()));
        let shared = Arc::clone(&node.replication.shared);
        let (here, unopened) = (group.id(), GroupId([9; 16]));
        let look = || {
            shared.groups_changed();
            shared.look_at_groups(&mut Vec::new());
        };
        for id in [here, unopened] {
            assert!(shared.change_ledger(id, |ledger| ledger.add(damage(1))));
        }
        look();
        shared.save_ledgers();
        let known = load(&shared.config.state_dir);
        assert!(known.contains_key(&here) && known.contains_key(&unopened));
        node.registry.delete(group.name()).unwrap();
        look();
        shared.save_ledgers();
        let known = load(&shared.config.state_dir);
        assert!(!known.contains_key(&here) && known.contains_key(&unopened));
        node.stop();
    }

    #[test]
    fn damage_is_known_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::default();
        ledger.add(damage(1));
        ledger.add(DamageInfo {
            part: DamagedPart::Base { volume: crate::units::VolumeNumber(2), chunk: 3 },
            repair: Some("b has it damaged too".to_owned()),
            ..damage(1)
        });
        let ledgers = HashMap::from([(GroupId([7; 16]), ledger)]);
        store(dir.path(), &ledgers).unwrap();
        assert_eq!(load(dir.path()), ledgers);
        std::fs::write(dir.path().join(FILE), b"{").unwrap();
        assert!(load(dir.path()).is_empty());
    }
}
