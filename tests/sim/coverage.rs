//! What runs covered, and what each batch of histories must have met at least once.

use std::collections::BTreeMap;

/// Counters by name; events of the nodes under their codes.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    counts: BTreeMap<String, u64>,
}

/// What some hundred histories always meet: a zero among these is a failure.
pub const MUST: &[&str] = &[
    "alarms checked",
    "alarms ended",
    "answers durable on a peer",
    "answers held by a peer",
    "answers while degraded",
    "answers",
    "backup runs failed",
    "backups delegated to one of two",
    "backups delegated",
    "backups done of groups of three",
    "backups of two branches",
    "backups done",
    "backups failed",
    "backups taken over",
    "branches shown",
    "branches",
    "claims lost",
    "claims taken over",
    "clock jumps",
    "copies made anew",
    "crashes in recovery",
    "cuts",
    "damage that stops a start",
    "damage told",
    "deaths inside an operation",
    "demotes",
    "disk errors set",
    "disks hung",
    "event: branch-kept",
    "event: data-failed",
    "event: degraded",
    "event: hosts-wait",
    "event: image-received",
    "event: log-kept-for-peer",
    "event: peer-required",
    "event: resync-begins",
    "event: split-brain",
    "event: takes-back",
    "event: unclean-start",
    "event: yielded",
    "failed syncs",
    "folds beside open images",
    "folds under images",
    "folds where the window is kept",
    "folds",
    "forced promotes",
    "groups in mode async, block",
    "groups in mode async, continue",
    "groups in mode receive, block",
    "groups in mode receive, continue",
    "groups in mode sync, block",
    "groups in mode sync, continue",
    "hosts blocked by a peer",
    "images opened",
    "images read",
    "kills",
    "live damage not repaired",
    "live damage repaired from a peer",
    "live damage told",
    "losses told",
    "operator promotes",
    "partitions",
    "pauses ended",
    "pauses",
    "power losses",
    "promotes refused",
    "promotes",
    "replications stopped",
    "replications taken up again",
    "repository out of reach",
    "resolves",
    "retired copies checked",
    "retired copies taken up again",
    "returns",
    "rewinds",
    "rewinds beside open images",
    "slow links",
    "slots missed",
    "slots overdue",
    "slots proved of groups of three",
    "slots proved",
    "slots unknown",
    "switchovers refused",
    "switchovers",
    "three nodes",
    "torn tails",
    "two that serve know it",
    "unclean starts",
    "writers wait for the folder",
    "writes failed",
    "writes kept in branches",
    "writes wait for a peer",
    "yields",
];

/// One thing that was never met is told, and nothing else is.
pub fn check_zeros() {
    assert_eq!(Coverage::default().zeros(), MUST, "nothing was met");
    for lacks in MUST {
        let mut coverage = Coverage::default();
        MUST.iter().for_each(|what| coverage.add(what, u64::from(what != lacks)));
        assert_eq!(coverage.zeros(), [*lacks]);
    }
}

impl Coverage {
    /// Counts something.
    pub fn add(&mut self, what: &str, count: u64) {
        if count == 0 {
            return;
        }
        match self.counts.get_mut(what) {
            Some(known) => *known += count,
            None => drop(self.counts.insert(what.to_owned(), count)),
        }
    }

    /// Counts an event of a node; two of them are an old primary's that returns.
    pub fn event(&mut self, code: &str) {
        self.add("returns", ["yielded", "takes-back"].contains(&code).into());
        self.add(&format!("event: {code}"), 1);
    }

    /// Adds what another run covered.
    pub fn merge(&mut self, other: &Coverage) {
        for (what, count) in &other.counts {
            self.add(what, *count);
        }
    }

    /// Of what must be met, what was not.
    pub fn zeros(&self) -> Vec<&'static str> {
        MUST.iter().copied().filter(|what| !self.counts.contains_key(*what)).collect()
    }

    /// All of it, one a line.
    pub fn lines(&self) -> impl Iterator<Item = String> + '_ {
        self.counts.iter().map(|(what, count)| format!("{count:>12}  {what}"))
    }
}
