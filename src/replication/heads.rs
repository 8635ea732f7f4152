//! How far the peers of each copy on this node had come when they were last heard, kept over
//! restarts: a file under the service's directory, which may be well where a copy's disk is not.
//!
//! It is written when a copy begins or ceases to follow and when this node stops, and every few
//! seconds while a primary that is not followed goes on. While a stream runs well, and while a peer
//! that is a copy too is heard, nothing is written: what is kept may be less than what was heard,
//! never more, and is told as "at least".
//! Each entry names the reigns of the log that it speaks of, and says nothing of another one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::units::{Chain, GroupId, LogTime, Lsn, NodeId};

use super::channel::{Channel, Heard, Moment, ReplicationState};
use super::core::Membership;
use super::epoch::{History, Reign};
use super::peers::{StoreError, replace};
use super::service::{Shared, locked};

/// The file, under the service's directory.
const FILE: &str = "primaries";
/// How often it is looked for what is new.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// A group, and the peer that was heard of it.
type Key = (GroupId, NodeId);

/// How far a peer had come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    group: GroupId,
    peer: NodeId,
    reigns: Vec<Reign>,
    head: Lsn,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    requests: Option<u64>,
    at: LogTime,
}

/// When it is looked for what is to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// From time to time: that a primary was heard again, as far as before, is not written.
    Again,
    /// A copy began or ceased to follow.
    Changed,
    /// This node stops: what streams counts too.
    Last,
}

/// What is kept.
#[derive(Default)]
pub(super) struct Heads {
    kept: BTreeMap<Key, Kept>,
    /// Why it could not be written last.
    failure: Option<String>,
}

/// What was kept, for channels that there are none of yet.
pub(super) type Recalled = BTreeMap<Key, Heard>;

impl Kept {
    fn of(key: Key, heard: &Heard, at: LogTime) -> Kept {
        Kept {
            group: key.0,
            peer: key.1,
            reigns: heard.history.reigns.to_vec(),
            head: heard.history.head,
            requests: heard.requests,
            at,
        }
    }

    /// None where it is of no possible log.
    fn heard(&self) -> Option<Heard> {
        let reigns = Arc::new(self.reigns.clone());
        let history = History { reigns, head: self.head, chain: Chain::default() };
        // What is impossible on the wire is so in a file.
        let history = History::from_wire(&history.to_wire())?;
        Some(Heard { history, requests: self.requests, at: Moment::Before(self.at) })
    }

    fn is_of_the_same_log(&self, other: &Kept) -> bool {
        (&self.reigns, self.head) == (&other.reigns, other.head)
    }
}

/// What is to be kept of a channel where `before` is; `at` dates what was heard.
pub(super) fn keep(
    key: Key,
    channel: &Channel,
    look: Look,
    before: Option<&Kept>,
    at: impl FnOnce(Moment) -> LogTime,
) -> Option<Kept> {
    let local = channel.local();
    let heard = channel.heard()?;
    // Of a log that is not the continuation of this one nothing is known to be lacking.
    channel.gap()?;
    if local.primary || local.membership == Membership::Stranger {
        return None;
    }
    let streams = channel.state().0 == ReplicationState::Streaming;
    let beside = channel.remote().is_some_and(|remote| !remote.primary);
    if look != Look::Last && (streams || beside) {
        return before.cloned();
    }
    let news = Kept::of(key, heard, at(heard.at));
    let same = before.filter(|before| look == Look::Again && before.is_of_the_same_log(&news));
    Some(same.cloned().unwrap_or(news))
}

impl Shared {
    /// Writes what is new; an error is told once, and it is tried again.
    pub(super) fn keep_heads(&self, look: Look) {
        // Held over the write: a later state is never overwritten by an older one.
        let mut heads = locked(&self.heads);
        let (now, wall) = (self.now(), self.wall());
        let mut kept = BTreeMap::new();
        {
            let cores = locked(&self.cores);
            for (node, core) in cores.iter() {
                for group in core.groups() {
                    let (key, Some(channel)) = ((group, *node), core.channel(group)) else {
                        continue;
                    };
                    let before = heads.kept.get(&key);
                    let found = keep(key, channel, look, before, |moment| moment.wall(now, wall));
                    kept.extend(found.map(|found| (key, found)));
                }
            }
            // Their groups are not open yet.
            let waiting = locked(&self.recalled);
            let waiting = waiting.keys().filter(|(_, peer)| cores.contains_key(peer));
            kept.extend(waiting.filter_map(|key| Some((*key, heads.kept.get(key)?.clone()))));
        }
        if kept == heads.kept {
            return;
        }
        match store(&self.config.state_dir, &kept) {
            Ok(()) => (heads.kept, heads.failure) = (kept, None),
            Err(error) => {
                let failure = Some(error.to_string());
                if heads.failure != failure {
                    tracing::error!("{error}; a restart forgets how far primaries were");
                    heads.failure = failure;
                }
            }
        }
    }
}

/// Keeps what is heard until the service ends.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut shutdown = shared.shutdown_signal();
    loop {
        let look = tokio::select! {
            () = shared.heads_due.notified() => Look::Changed,
            () = tokio::time::sleep(LOOK_EVERY) => Look::Again,
            _ = shutdown.wait_for(|ending| *ending) => break,
        };
        let shared = Arc::clone(&shared);
        let _ = tokio::task::spawn_blocking(move || shared.keep_heads(look)).await;
    }
}

fn store(dir: &Path, kept: &BTreeMap<Key, Kept>) -> Result<(), StoreError> {
    let kept: Vec<&Kept> = kept.values().collect();
    replace(dir, FILE, &serde_json::to_vec(&kept).expect("plain data becomes JSON"))
}

/// What was kept before this process began.
pub(super) fn load(dir: &Path) -> (Heads, Recalled) {
    let path = dir.join(FILE);
    let read = match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error.to_string()),
        Ok(bytes) => serde_json::from_slice::<Vec<Kept>>(&bytes).map_err(|error| error.to_string()),
    };
    let kept = read.unwrap_or_else(|error| {
        tracing::error!("{}: {error}; how far primaries were is not known", path.display());
        Vec::new()
    });
    let kept = kept.into_iter().map(|kept| ((kept.group, kept.peer), kept));
    let (kept, recalled): (BTreeMap<_, _>, Recalled) =
        kept.filter_map(|(key, kept)| Some(((key, kept.clone()), (key, kept.heard()?)))).unzip();
    (Heads { kept, failure: None }, recalled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::EpochId;

    fn kept(group: u8, head: u64) -> (Key, Kept) {
        let (group, peer) = (GroupId([group; 16]), NodeId([2; 16]));
        let reign = Reign { id: EpochId(5), counter: 1, first_lsn: Lsn(96), author: peer };
        let (head, requests, at) = (Lsn(head), Some(4), LogTime(1_700_000_000_123_456_789));
        ((group, peer), Kept { group, peer, reigns: vec![reign], head, requests, at })
    }

    #[test]
    fn how_far_a_primary_was_is_known_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load(dir.path()).1.is_empty());
        let ((key, first), (other, second)) = (kept(1, 4096), kept(2, 8192));
        let all = BTreeMap::from([(key, first.clone()), (other, second)]);
        store(dir.path(), &all).unwrap();
        let (heads, recalled) = load(dir.path());
        assert_eq!(heads.kept, all);
        let heard = &recalled[&key];
        assert_eq!((heard.history.head, heard.requests), (Lsn(4096), Some(4)));
        assert_eq!(*heard.history.reigns, first.reigns);
        assert_eq!(heard.at, Moment::Before(first.at));
    }

    #[test]
    fn what_no_log_can_be_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        // A reign that begins behind the head, and a head beyond all logs.
        let all = BTreeMap::from([kept(1, 96), kept(2, u64::MAX), kept(3, 97)]);
        store(dir.path(), &all).unwrap();
        let (heads, recalled) = load(dir.path());
        let known = (GroupId([3; 16]), NodeId([2; 16]));
        assert_eq!(recalled.keys().collect::<Vec<_>>(), [&known]);
        assert_eq!(heads.kept.keys().collect::<Vec<_>>(), [&known]);
        std::fs::write(dir.path().join(FILE), b"{").unwrap();
        assert!(load(dir.path()).1.is_empty());
    }
}
