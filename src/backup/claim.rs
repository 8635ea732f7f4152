//! Who makes a slot's backup, settled in the repository where nodes cannot hear each other.
//!
//! Below `slots/JOB/SLOT/`: `claim-NNNN` is created exclusively and never deleted, so that numbers
//! only rise; `renewed-NNNN` holds a counter that its holder raises; `ended-NNNN` says that the
//! holder gave up; `result` is created exclusively after the snapshot and decides. A claim is taken
//! over by creating the next number, when its counter has stood still for its term on the
//! *observer's* monotonic clock: no node believes another's clock.
//!
//! Where that result is of another branch of the group's history, the slot goes on for this one in
//! `branch-EPOCH/` below it, by the same rules (`branches`).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::branches::Reigns;
use super::catalog::{Stats, VolumeChecksum};
use super::facts::Reason;
use super::objects::Objects;
use crate::group::Role;
use crate::units::{EpochId, LogTime, Lsn, Name, Span};

/// A claim's body.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Claim {
    /// The node that holds it.
    pub node: Name,
    /// A random number of the run, so that a node is not taken for its own earlier life.
    pub run: EpochId,
    /// How long its counter may stand still.
    pub term: Span,
}

/// A slot's result: it exists or not, and is never changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SlotResult {
    /// The node that made the backup.
    pub node: Name,
    /// Its role then.
    pub role: Role,
    /// The run.
    pub run: EpochId,
    /// The snapshot.
    pub id: String,
    /// The epoch of the image.
    pub epoch: EpochId,
    /// The position of the image.
    pub lsn: Lsn,
    /// Log time of the image.
    pub time: LogTime,
    /// When the run ended, by its node's clock.
    pub ended: LogTime,
    /// What it cost.
    pub bytes_read: u64,
    /// Bytes that the repository grew by.
    pub bytes_added: u64,
    /// From start to end.
    pub duration_seconds: f64,
    /// A checksum for each volume.
    pub checksums: Vec<VolumeChecksum>,
    /// The image may be older than the job's limit, by leave of the job.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stale: bool,
    /// What the copy's health was at the end, where it was no longer good.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons_at_end: Vec<Reason>,
}

impl SlotResult {
    /// What it cost.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            bytes_read: self.bytes_read,
            bytes_added: self.bytes_added,
            duration_seconds: self.duration_seconds,
        }
    }
}

/// How the holder of the highest claim is.
#[derive(Clone, Debug, PartialEq)]
pub enum Holder {
    /// There is no claim.
    Nobody,
    /// Its counter moves, or has not stood still for its term.
    Live(Claim),
    /// Its counter stood still for its term.
    Still(Claim),
    /// It gave up, and why.
    Ended(Claim, String),
}

/// What the repository says of a slot.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotView {
    /// The highest claim's number; 0 where there is none.
    pub number: u32,
    /// Who holds it.
    pub holder: Holder,
    /// The result, if there is one of this node's history.
    pub result: Option<SlotResult>,
}

#[derive(Serialize, Deserialize)]
struct Renewed {
    counter: u64,
}

#[derive(Serialize, Deserialize)]
struct Ended {
    reason: String,
}

/// A slot in the repository, as one observer sees it.
#[derive(Clone)]
pub struct SlotStore {
    objects: Arc<dyn Objects>,
    slot: String,
    /// Where the claims and the result of this node's branch are: the slot's directory, or one
    /// below it.
    dir: String,
    /// The last movement seen: claim number, counter, when.
    movement: Option<(u32, u64, Duration)>,
}

impl SlotStore {
    /// The slot of a job.
    #[must_use]
    pub fn new(objects: Arc<dyn Objects>, job: EpochId, slot: LogTime) -> SlotStore {
        let slot = slot_dir(job, slot);
        SlotStore { objects, dir: slot.clone(), slot, movement: None }
    }

    /// Looks, at `now` on the monotonic clock; `reigns` tells by what results are judged.
    ///
    /// # Errors
    ///
    /// Where the repository cannot be read. What its holder did meanwhile was not seen then: a
    /// claim counts as standing still only after another whole term.
    pub fn look(&mut self, now: Duration, reigns: impl Fn() -> Reigns) -> io::Result<SlotView> {
        let view = self.look_on(now, reigns);
        if view.is_err() {
            self.movement = None;
        }
        view
    }

    fn look_on(&mut self, now: Duration, reigns: impl Fn() -> Reigns) -> io::Result<SlotView> {
        let mut results = Vec::new();
        for dir in self.dirs()? {
            results.extend(self.read::<SlotResult>(&dir, "result")?.map(|result| (dir, result)));
        }
        let reigns = reigns();
        let first = results.iter().find(|(dir, _)| *dir == self.slot).map(|(_, result)| result);
        self.go_to(reigns.branch(first));
        let result = results.into_iter().map(|(_, result)| result).find(|it| reigns.counts(it));
        let names = self.objects.list(&self.dir)?;
        let number = names
            .iter()
            .filter_map(|name| name.strip_prefix("claim-")?.parse::<u32>().ok())
            .max()
            .unwrap_or(0);
        if number == 0 {
            return Ok(SlotView { number, holder: Holder::Nobody, result });
        }
        // A body that cannot be read is a holder nonetheless.
        let claim = self.read::<Claim>(&self.dir, &format!("claim-{number:04}"))?;
        let claim = claim.unwrap_or(Claim {
            node: "unknown".parse().expect("a constant name"),
            run: EpochId(0),
            term: Span::from_secs(60),
        });
        if let Some(Ended { reason }) = self.read(&self.dir, &format!("ended-{number:04}"))? {
            return Ok(SlotView { number, holder: Holder::Ended(claim, reason), result });
        }
        let counter = self
            .read::<Renewed>(&self.dir, &format!("renewed-{number:04}"))?
            .map_or(0, |renewed| renewed.counter);
        let since = match self.movement {
            Some((seen, count, since)) if seen == number && count == counter => since,
            _ => now,
        };
        self.movement = Some((number, counter, since));
        let still = now.saturating_sub(since) >= claim.term.0;
        let holder = if still { Holder::Still(claim) } else { Holder::Live(claim) };
        Ok(SlotView { number, holder, result })
    }

    /// Goes on in the directory of a branch, or in the slot's own.
    fn go_to(&mut self, branch: Option<EpochId>) {
        let dir = match branch {
            Some(epoch) => format!("{}/branch-{epoch}", self.slot),
            None => self.slot.clone(),
        };
        if self.dir != dir {
            (self.dir, self.movement) = (dir, None);
        }
    }

    /// The slot's directory, and those of its branches.
    fn dirs(&self) -> io::Result<Vec<String>> {
        let names = self.objects.list(&self.slot)?.into_iter();
        let branches = names.filter(|name| name.starts_with("branch-"));
        let branches = branches.map(|name| format!("{}/{name}", self.slot));
        Ok([self.slot.clone()].into_iter().chain(branches).collect())
    }

    /// Creates the claim of a number; `false` where another was first.
    ///
    /// # Errors
    ///
    /// Where the repository cannot be written, or holds a result that is not whole, which would be
    /// in the way of this one's.
    pub fn claim(&self, number: u32, claim: &Claim) -> io::Result<bool> {
        self.result_in(&self.dir)?;
        self.objects.create(&format!("{}/claim-{number:04}", self.dir), &body(claim))
    }

    /// Raises the counter of a claim.
    ///
    /// # Errors
    ///
    /// Where the repository cannot be written.
    pub fn renew(&self, number: u32, counter: u64) -> io::Result<()> {
        let name = format!("{}/renewed-{number:04}", self.dir);
        self.objects.replace(&name, &body(&Renewed { counter }))
    }

    /// Says that the holder of a claim gave up.
    ///
    /// # Errors
    ///
    /// Where the repository cannot be written.
    pub fn end(&self, number: u32, reason: &str) -> io::Result<()> {
        let ended = Ended { reason: reason.to_owned() };
        self.objects.replace(&format!("{}/ended-{number:04}", self.dir), &body(&ended))
    }

    /// Creates the result; the other's where another of this history was first.
    ///
    /// # Errors
    ///
    /// Where the repository cannot be written or read.
    pub fn finish(
        &mut self,
        result: &SlotResult,
        reigns: impl Fn() -> Reigns,
    ) -> io::Result<Option<SlotResult>> {
        loop {
            // The history may have changed since this one was claimed for a branch of it.
            let other = self.result(&reigns)?.filter(|other| other.run != result.run);
            if other.is_some() {
                return Ok(other);
            }
            if self.objects.create(&format!("{}/result", self.dir), &body(result))? {
                return Ok(None);
            }
            let unread = || io::Error::other("the slot's result cannot be read");
            let other = self.result_in(&self.dir)?.ok_or_else(unread)?;
            let branch = reigns().branch(Some(&other));
            if branch.is_none() || self.dir != self.slot {
                return Ok(Some(other));
            }
            // It appeared while this branch's backup was made.
            self.go_to(branch);
        }
    }

    /// The result of the slot in this node's history, whichever run made it.
    ///
    /// # Errors
    ///
    /// As of [`SlotStore::results`].
    pub fn result(&self, reigns: impl Fn() -> Reigns) -> io::Result<Option<SlotResult>> {
        let results = self.results()?;
        Ok(reigns().counted(&results).cloned())
    }

    /// The results of all branches, the one in the slot's own directory first.
    ///
    /// # Errors
    ///
    /// Where the repository cannot be read; `InvalidData` where an object is there and is not
    /// whole, as after a crash on a file system without links.
    pub fn results(&self) -> io::Result<Vec<SlotResult>> {
        let dirs = self.dirs()?;
        dirs.iter().filter_map(|dir| self.result_in(dir).transpose()).collect()
    }

    fn result_in(&self, dir: &str) -> io::Result<Option<SlotResult>> {
        let name = format!("{dir}/result");
        let Some(body) = self.objects.read(&name)? else { return Ok(None) };
        serde_json::from_slice(&body).map(Some).map_err(|error| {
            let what = format!(
                "tidelog/{name} in the repository is cut short or damaged ({error}); remove it, \
                 then `tidelog backup run`"
            );
            io::Error::new(io::ErrorKind::InvalidData, what)
        })
    }

    /// An object of the slot; `None` where it is not there or not what it should be.
    fn read<T: DeserializeOwned>(&self, dir: &str, name: &str) -> io::Result<Option<T>> {
        let body = self.objects.read(&format!("{dir}/{name}"))?;
        Ok(body.and_then(|body| serde_json::from_slice(&body).ok()))
    }
}

/// The directory of a slot.
fn slot_dir(job: EpochId, slot: LogTime) -> String {
    format!("slots/{job}/{}", slot.timestamp().strftime("%Y-%m-%dT%H-%M-%S.%9fZ"))
}

fn body<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain data becomes JSON")
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::objects::MemoryObjects;
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn claim(node: &str, run: u64) -> Claim {
        Claim { node: node.parse().expect("a name"), run: EpochId(run), term: Span::from_secs(60) }
    }

    pub fn result(node: &str, run: u64) -> SlotResult {
        SlotResult {
            node: node.parse().expect("a name"),
            role: Role::Secondary,
            run: EpochId(run),
            id: format!("{run}"),
            epoch: EpochId(1),
            lsn: Lsn(4096),
            time: LogTime(1),
            ended: LogTime(2),
            bytes_read: 0,
            bytes_added: 0,
            duration_seconds: 0.0,
            checksums: Vec::new(),
            stale: false,
            reasons_at_end: Vec::new(),
        }
    }

    fn stores() -> (SlotStore, SlotStore, Arc<MemoryObjects>) {
        let objects = Arc::new(MemoryObjects::new());
        let store = || SlotStore::new(objects.clone(), EpochId(7), LogTime(1_700_000_000 << 30));
        (store(), store(), objects.clone())
    }

    #[test]
    fn a_claim_that_is_renewed_is_live_and_one_that_stands_still_is_not() {
        let (a, mut b, _) = stores();
        assert_eq!(b.look(Duration::ZERO, Reigns::default).expect("read").holder, Holder::Nobody);
        assert!(a.claim(1, &claim("a", 1)).expect("written"));
        assert!(!b.claim(1, &claim("b", 2)).expect("written"), "the number is taken");
        let mut now = Duration::ZERO;
        for counter in 1..20 {
            a.renew(1, counter).expect("written");
            now += 59 * SECOND;
            assert!(matches!(b.look(now, Reigns::default).expect("read").holder, Holder::Live(_)));
        }
        assert!(matches!(
            b.look(now + 59 * SECOND, Reigns::default).expect("read").holder,
            Holder::Live(_)
        ));
        assert!(matches!(
            b.look(now + 60 * SECOND, Reigns::default).expect("read").holder,
            Holder::Still(_)
        ));
        assert!(b.claim(2, &claim("b", 2)).expect("written"), "taken over by the next number");
        let view = b.look(now + 61 * SECOND, Reigns::default).expect("read");
        assert_eq!((view.number, view.holder), (2, Holder::Live(claim("b", 2))));
    }

    #[test]
    fn an_observer_that_comes_late_waits_a_whole_term_of_its_own() {
        let (a, mut b, _) = stores();
        a.claim(1, &claim("a", 1)).expect("written");
        let late = 100_000 * SECOND;
        assert!(matches!(b.look(late, Reigns::default).expect("read").holder, Holder::Live(_)));
        assert!(matches!(
            b.look(late + 60 * SECOND, Reigns::default).expect("read").holder,
            Holder::Still(_)
        ));
    }

    #[test]
    fn an_outage_that_holder_and_observer_see_takes_no_claim_from_its_holder() {
        let (a, mut b, objects) = stores();
        a.claim(1, &claim("a", 1)).expect("written");
        a.renew(1, 5).expect("written");
        assert!(matches!(
            b.look(Duration::ZERO, Reigns::default).expect("read").holder,
            Holder::Live(_)
        ));
        objects.set_reachable(false);
        for second in [1, 30, 70] {
            a.renew(1, 6).expect_err("the outage");
            b.look(second * SECOND, Reigns::default).expect_err("the outage");
        }
        objects.set_reachable(true);
        let back = 71 * SECOND;
        for (after, still) in [(0, false), (59, false), (60, true)] {
            let holder = b.look(back + after * SECOND, Reigns::default).expect("read").holder;
            assert_eq!(matches!(holder, Holder::Still(_)), still, "{after} s: {holder:?}");
        }
    }

    #[test]
    fn the_first_result_decides() {
        let (mut a, mut b, _) = stores();
        assert_eq!(a.finish(&result("a", 1), Reigns::default).expect("written"), None);
        assert_eq!(b.finish(&result("b", 2), Reigns::default).expect("read"), Some(result("a", 1)));
        assert_eq!(
            a.finish(&result("a", 1), Reigns::default).expect("written"),
            None,
            "the same once more"
        );
        assert_eq!(b.result(Reigns::default).expect("read"), Some(result("a", 1)));
    }

    /// The reign of a node since the histories parted at 4096.
    fn branch(epoch: u64) -> Reigns {
        let reigns = vec![(EpochId(epoch), Lsn(4096))];
        Reigns { reigns, head: Lsn(1 << 20), whole: true, at_slot: None, is_past: true }
    }

    fn of_branch(node: &str, epoch: u64) -> SlotResult {
        SlotResult { epoch: EpochId(epoch), lsn: Lsn(8192), ..result(node, epoch) }
    }

    #[test]
    fn behind_a_result_of_another_branch_the_slot_goes_on_with_claims_and_a_result_of_its_own() {
        let (mut a, mut b, objects) = stores();
        assert!(a.claim(1, &claim("a", 1)).expect("written"));
        let waiting = b.look(Duration::ZERO, || branch(2)).expect("read");
        assert_eq!((waiting.number, waiting.result), (1, None), "it has not ended yet");
        assert_eq!(a.finish(&of_branch("a", 1), || branch(1)).expect("written"), None);
        let view = b.look(Duration::ZERO, || branch(2)).expect("read");
        assert_eq!((view.number, view.holder, view.result), (0, Holder::Nobody, None));
        assert!(b.claim(1, &claim("b", 2)).expect("written"), "a claim of its own");
        assert_eq!(b.finish(&of_branch("b", 2), || branch(2)).expect("written"), None);
        for (store, reign, node) in [(&mut a, 1, "a"), (&mut b, 2, "b")] {
            let view = store.look(SECOND, || branch(reign)).expect("read");
            assert_eq!(view.result, Some(of_branch(node, reign)));
        }
        assert_eq!(a.results().expect("read"), [of_branch("a", 1), of_branch("b", 2)]);
        let place = format!("{}/branch-{}/result", a.slot, EpochId(2));
        assert!(objects.read(&place).expect("read").is_some());
        let again = SlotResult { run: EpochId(9), ..of_branch("c", 2) };
        let mut c = b.clone();
        let first = c.finish(&again, || branch(2)).expect("read");
        assert_eq!(first, Some(of_branch("b", 2)), "one of each branch");
    }

    #[test]
    fn a_result_of_another_branch_that_comes_first_takes_no_backup_from_this_one() {
        let (mut a, mut b, _) = stores();
        b.look(Duration::ZERO, || branch(2)).expect("read");
        assert!(b.claim(1, &claim("b", 2)).expect("written"));
        assert_eq!(a.finish(&of_branch("a", 1), || branch(1)).expect("written"), None);
        assert_eq!(b.finish(&of_branch("b", 2), || branch(2)).expect("written"), None);
        assert_eq!(b.result(|| branch(2)).expect("read"), Some(of_branch("b", 2)));
    }

    #[test]
    fn a_holder_that_gave_up_is_told() {
        let (a, mut b, _) = stores();
        a.claim(1, &claim("a", 1)).expect("written");
        a.end(1, "no space").expect("written");
        let view = b.look(Duration::ZERO, Reigns::default).expect("read");
        assert_eq!(view.holder, Holder::Ended(claim("a", 1), "no space".to_owned()));
    }

    #[test]
    fn a_torn_claim_is_held_until_its_term_is_over() {
        let (_, mut b, objects) = stores();
        objects.create(&format!("{}/claim-0003", b.dir), b"{\"no").expect("written");
        let view = b.look(Duration::ZERO, Reigns::default).expect("read");
        assert_eq!(view.number, 3);
        assert!(matches!(view.holder, Holder::Live(_)));
        assert!(matches!(
            b.look(60 * SECOND, Reigns::default).expect("read").holder,
            Holder::Still(_)
        ));
    }

    #[test]
    fn a_torn_result_is_named_and_lets_nobody_begin() {
        let (mut a, mut b, objects) = stores();
        objects.create(&format!("{}/result", a.dir), b"{\"no").expect("written");
        let refused = [
            a.result(Reigns::default).err(),
            a.claim(1, &claim("a", 1)).err(),
            a.finish(&result("a", 1), Reigns::default).err(),
        ];
        for error in refused {
            let error = error.expect("it is not whole");
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            let named = format!("tidelog/{}/result in the repository is cut short", a.dir);
            assert!(error.to_string().contains(&named), "{error}");
        }
        let view = b.look(Duration::ZERO, Reigns::default).expect("read");
        assert_eq!((view.holder, view.result), (Holder::Nobody, None));
    }

    #[test]
    fn each_slot_has_a_directory_that_people_can_read() {
        let slot: LogTime = "2026-11-24T02:00:00Z".parse().expect("a time");
        assert_eq!(
            slot_dir(EpochId(255), slot),
            "slots/00000000000000ff/2026-11-24T02-00-00.000000000Z"
        );
    }
}
