//! Compares this node's copy of a group with a peer's, at one position, by hashes: both open an
//! image there, and only where hashes differ is a part hashed again in blocks. No data moves.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64;

use crate::events::Severity;
use crate::group::{Group, GroupError, Image, Point, Read, View};
use crate::units::{
    BLOCK_BYTES, ByteSize, CHUNK_BYTES, Chain, GroupId, Lsn, Name, Position, VolumeNumber, total,
};

use super::repair::understood;
use super::rpc::PeerContext;
use super::scrub::{left_out, rest_after};
use super::service::{Replication, ReplicationError, Shared};

pub(super) const OPEN: &str = "verify.open";
pub(super) const HASH: &str = "verify.hash";
pub(super) const CLOSE: &str = "verify.close";

/// Bytes of a volume that one call compares.
const SPAN_BYTES: u64 = 16 << 20;
/// An image that its comparison forgot is closed after this time.
const EXPIRES_AFTER: Duration = Duration::from_secs(24 * 3600);

#[derive(Serialize, Deserialize)]
struct AskOpen {
    group: GroupId,
    /// Up to where the asker can show an image, at most.
    at: Lsn,
    /// The image is to be exactly there, with this chain, where it is given.
    exactly: Option<(Position, Option<Chain>)>,
}

#[derive(Serialize, Deserialize)]
struct Opened {
    /// Up to where this node can show an image.
    at: Lsn,
    image: Option<Name>,
    /// Why that is not all that is to be there, where it is not.
    #[serde(default)]
    left_out: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct AskHashes {
    group: GroupId,
    image: Name,
    volume: VolumeNumber,
    offset: u64,
    length: u64,
    piece: u64,
}

#[derive(Serialize, Deserialize)]
struct Hashes {
    /// Runs of equal hashes: how many pieces, and the hash; none where it cannot be read.
    runs: Vec<(u64, Option<String>)>,
    /// After the last record there: where it moves, hosts write.
    head: Lsn,
    /// Why that is not all that is to be there, where it is not.
    #[serde(default)]
    left_out: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct AskClose {
    group: GroupId,
    image: Name,
    result: Option<VerifyStatus>,
}

/// The hash of each piece of a range; none for those that cannot be read.
fn hashes(
    view: &dyn View,
    volume: VolumeNumber,
    offset: u64,
    length: u64,
    piece: u64,
) -> Vec<Option<u64>> {
    let mut found = Vec::new();
    let mut bytes = vec![0; piece as usize];
    let mut at = offset;
    while at < offset + length {
        let buffer = &mut bytes[..piece.min(offset + length - at) as usize];
        let mut reads = [Read { volume, offset: at, buffer, result: Ok(()) }];
        view.read(&mut reads);
        let [read] = reads;
        found.push(read.result.is_ok().then(|| xxh3_64(read.buffer)));
        at += piece;
    }
    found
}

fn runs_of(hashes: &[Option<u64>]) -> Vec<(u64, Option<String>)> {
    let text = |hash: u64| format!("{hash:016x}");
    hashes.chunk_by(|a, b| a == b).map(|run| (run.len() as u64, run[0].map(text))).collect()
}

fn hashes_of(runs: Vec<(u64, Option<String>)>, pieces: usize) -> Result<Vec<Option<u64>>, String> {
    let mut all = Vec::new();
    for (count, hash) in runs {
        let hash = hash.map(|text| u64::from_str_radix(&text, 16)).transpose();
        let hash = hash.map_err(|error| format!("its answer is not understood: {error}"))?;
        let room = pieces.saturating_sub(all.len()) as u64;
        all.extend(std::iter::repeat_n(hash, count.min(room) as usize));
    }
    if all.len() != pieces {
        return Err(format!("its answer has {} of {pieces} hashes", all.len()));
    }
    Ok(all)
}

/// Up to where an image can be compared here.
fn reaches(group: &Group) -> Lsn {
    let positions = group.positions();
    positions.request_end.min(positions.committed)
}

/// Why an image is not all that is to be here.
fn not_all(group: &Group) -> Option<String> {
    let (state, reason, _) = group.data_state();
    left_out(state, reason)
}

/// A comparison on its thread.
struct Comparison<'a> {
    shared: &'a Shared,
    group: &'a Group,
    peer: &'a Name,
    image: Arc<Image>,
    theirs: Name,
    /// After the last record, here and there, when it was looked at last.
    head: Lsn,
    their_head: Option<Lsn>,
    hosts_write_there: bool,
}

impl Comparison<'_> {
    fn run(&mut self) -> Result<(), String> {
        let volumes = self.image.volumes();
        let total_bytes = total(volumes.iter().map(|volume| volume.size_bytes));
        let position = self.image.position();
        self.shared.change_verify(self.group, |status| {
            (status.total_bytes, status.position) = (total_bytes, position);
        });
        for volume in &volumes {
            let mut offset = 0;
            while offset < volume.size_bytes {
                let length = SPAN_BYTES.min(volume.size_bytes - offset);
                let began = self.shared.now();
                self.span(volume.number, &volume.name, offset, length)?;
                self.shared.change_verify(self.group, |status| {
                    status.done_bytes = status.done_bytes.saturating_add(length);
                });
                let took = self.shared.now().saturating_sub(began);
                self.rest(length, took)?;
                offset += length;
            }
        }
        Ok(())
    }

    /// Rests so long that both disks are left to their hosts.
    fn rest(&mut self, bytes: u64, took: Duration) -> Result<(), String> {
        let head = self.group.positions().head;
        let before = std::mem::replace(&mut self.head, head);
        let busy = before != head || self.hosts_write_there;
        let rest = rest_after(bytes, took, busy, None);
        let mut shutdown = self.shared.shutdown_signal();
        let ends = tokio::runtime::Handle::current().block_on(async {
            tokio::select! {
                () = tokio::time::sleep(rest) => false,
                _ = shutdown.wait_for(|ending| *ending) => true,
            }
        });
        if ends || self.shared.replica(self.group.id()).is_none() {
            return Err("the node stops, or the group is deleted".to_owned());
        }
        Ok(())
    }

    fn span(
        &mut self,
        volume: VolumeNumber,
        name: &Name,
        offset: u64,
        length: u64,
    ) -> Result<(), String> {
        let (mine, theirs) = self.both(volume, offset, length, CHUNK_BYTES)?;
        for (index, (mine, theirs)) in mine.iter().zip(&theirs).enumerate() {
            if mine == theirs && mine.is_some() {
                continue;
            }
            let begin = offset + index as u64 * CHUNK_BYTES;
            let length = CHUNK_BYTES.min(offset + length - begin);
            let (mine, theirs) = self.both(volume, begin, length, BLOCK_BYTES)?;
            let me = &self.shared.context.node.name;
            self.shared.change_verify(self.group, |status| {
                for (index, pair) in mine.iter().zip(&theirs).enumerate() {
                    let at = begin + index as u64 * BLOCK_BYTES;
                    let unreadable_on = match pair {
                        (Some(mine), Some(theirs)) if mine == theirs => continue,
                        (Some(_), Some(_)) => None,
                        (None, _) => Some(me),
                        (_, None) => Some(self.peer),
                    };
                    status.add(name, at, BLOCK_BYTES, unreadable_on);
                }
            });
        }
        Ok(())
    }

    /// The hashes of both nodes, made at the same time.
    #[expect(clippy::type_complexity, reason = "two lists of the same")]
    fn both(
        &mut self,
        volume: VolumeNumber,
        offset: u64,
        length: u64,
        piece: u64,
    ) -> Result<(Vec<Option<u64>>, Vec<Option<u64>>), String> {
        let runtime = tokio::runtime::Handle::current();
        let image = Arc::clone(&self.image);
        let own = runtime.spawn_blocking(move || hashes(&*image, volume, offset, length, piece));
        let (group, image) = (self.group.id(), self.theirs.clone());
        let ask = AskHashes { group, image, volume, offset, length, piece };
        let answer = self.shared.ask(self.peer.as_str(), HASH, json!(ask));
        let mine = runtime.block_on(own).map_err(|_| "the node stops".to_owned())?;
        let told: Hashes = understood(&answer?)?;
        let before = self.their_head.replace(told.head);
        self.hosts_write_there = before.is_some_and(|before| before != told.head);
        let theirs = hashes_of(told.runs, mine.len())?;
        self.shared.note_left_out(self.group, self.peer, told.left_out);
        Ok((mine, theirs))
    }
}

impl Shared {
    fn change_verify(&self, group: &Group, change: impl FnOnce(&mut VerifyStatus)) {
        self.change_ledger(group.id(), |ledger| ledger.verify.as_mut().map(change));
    }

    /// A comparison leaves out what one of the two nodes does not have now, even if it had when the
    /// comparison began.
    fn note_left_out(&self, group: &Group, peer: &Name, there: Option<String>) {
        let here = not_all(group).map(|why| (&self.context.node.name, why));
        let Some((node, why)) = here.or(there.map(|why| (peer, why))) else { return };
        self.change_verify(group, |status| {
            status.left_out.get_or_insert_with(|| format!("on {node}: {why}"));
        });
    }

    fn note_compared(&self, group: &Group, status: &VerifyStatus) {
        // Neither the group nor the peers are asked with the ledgers locked.
        let mut ended = self.ledger(group.id()).differences().to_vec();
        ended.retain(|known| {
            let in_history = group.is_in_history(known.position);
            status.ends(known, in_history, self.peer_named(known.peer.as_str()).is_ok())
        });
        let head = group.positions().head;
        self.change_ledger(group.id(), |ledger| ledger.note_compared(status, &ended, head));
    }

    /// Compares a group with a peer's copy; on a thread that may wait.
    fn compare(&self, group: &Group, peer: &Name) {
        let (image, theirs, result) = match self.open_both(group, peer) {
            Err(why) => (None, None, Err(why)),
            Ok((image, theirs)) => {
                let mut comparison = Comparison {
                    shared: self,
                    group,
                    peer,
                    image: Arc::clone(&image),
                    theirs: theirs.clone(),
                    head: group.positions().head,
                    their_head: None,
                    hosts_write_there: false,
                };
                let result = comparison.run();
                (Some(image), Some(theirs), result)
            }
        };
        let now = self.wall();
        self.change_verify(group, |status| {
            status.state_since = now;
            status.state = match &result {
                Err(_) => VerifyState::Failed,
                Ok(()) if status.differing_bytes > 0 => VerifyState::Differs,
                Ok(()) => VerifyState::Equal,
            };
            status.state_reason = result.err();
        });
        let status = self.ledger(group.id()).verify;
        if let Some(status) = &status {
            self.note_compared(group, status);
        }
        self.save_ledgers();
        if let Some(image) = image
            && let Err(error) = group.close_this_image(&image)
        {
            tracing::warn!("{error}");
        }
        if let Some(image) = theirs {
            let close = AskClose { group: group.id(), image, result: status.clone() };
            if let Err(why) = self.ask(peer.as_str(), CLOSE, json!(close)) {
                tracing::warn!("group {}: verify with {peer}: {why}", group.name());
            }
        }
        if let Some(status) = status {
            self.tell_of_comparison(group, &status);
        }
    }

    /// Images at one position, here and there.
    fn open_both(&self, group: &Group, peer: &Name) -> Result<(Arc<Image>, Name), String> {
        let said = |error: GroupError| error.to_string();
        let open = |at, exactly| -> Result<Opened, String> {
            let ask = AskOpen { group: group.id(), at, exactly };
            understood(&self.ask(peer.as_str(), OPEN, json!(ask))?)
        };
        let at = open(reaches(group), None)?.at.min(reaches(group));
        let image =
            group.open_image(&Point::Lsn(at), None, "verify", Some(EXPIRES_AFTER)).map_err(
                |error| format!("{error}; {peer} reaches to {at}, try when it is no longer behind"),
            )?;
        let position = image.position();
        let theirs = open(at, Some((position, group.chain_at(position.lsn)))).and_then(|opened| {
            let image = opened.image.ok_or_else(|| "it opened no image".to_owned())?;
            Ok((image, opened.left_out))
        });
        match theirs {
            Ok((theirs, left_out)) => {
                self.note_left_out(group, peer, left_out);
                Ok((image, theirs))
            }
            Err(why) => {
                group.close_this_image(&image).map_err(said)?;
                Err(why)
            }
        }
    }

    fn tell_of_comparison(&self, group: &Group, status: &VerifyStatus) {
        let name = group.name();
        let VerifyStatus { peer, position, .. } = status;
        let compared = ByteSize(status.done_bytes);
        let (severity, code, text) = match status.state {
            VerifyState::Running => return,
            VerifyState::Equal => {
                let same = format!("{compared} are the same here and on {peer}");
                let (severity, rest) = match &status.left_out {
                    None => (Severity::Info, String::new()),
                    Some(why) => (Severity::Warning, format!("; not all was compared: {why}")),
                };
                (severity, "verify-equal", format!("{same} at LSN {}{rest}", position.lsn))
            }
            VerifyState::Differs => (Severity::Error, "verify-differs", status.advice(name)),
            VerifyState::Failed => {
                let why = status.state_reason.as_deref().unwrap_or("unknown");
                (Severity::Warning, "verify-failed", format!("comparing with {peer}: {why}"))
            }
        };
        let text = format!("group {name}: verify: {text}");
        self.context.events.emit(severity, code, Some(name.as_str()), text, json!(status));
    }

    /// Answers a peer that compares: how far an image reaches here, and opens one.
    pub(super) fn open_for_verify(
        &self,
        peer: &PeerContext,
        body: &Value,
    ) -> Result<Value, String> {
        let ask: AskOpen = understood(body)?;
        let group = self.shared_with(peer, ask.group)?;
        let Some((position, chain)) = ask.exactly else {
            let at = reaches(&group).min(ask.at);
            return Ok(json!(Opened { at, image: None, left_out: None }));
        };
        if !group.is_in_history(position) {
            return Err(format!("LSN {} is not in its history", position.lsn));
        }
        let own = group.chain_at(position.lsn);
        if own.zip(chain).is_some_and(|(own, theirs)| own != theirs) {
            return Err(format!("the logs of the two nodes differ before LSN {}", position.lsn));
        }
        let owner = format!("verify:{}", peer.name);
        // It compares one image at a time: what an earlier call opened, it has let go of.
        for earlier in group.images().iter().filter(|image| image.owner() == owner) {
            group.close_this_image(earlier).map_err(|error| error.to_string())?;
        }
        let image = group
            .open_image(&Point::Lsn(position.lsn), None, &owner, Some(EXPIRES_AFTER))
            .map_err(|error| error.to_string())?;
        if image.position().lsn != position.lsn {
            let _ = group.close_this_image(&image);
            return Err(format!("no request ends at LSN {} there", position.lsn));
        }
        let image = Some(image.name().clone());
        Ok(json!(Opened { at: position.lsn, image, left_out: not_all(&group) }))
    }

    /// Answers a peer that compares: the hashes of a range.
    pub(super) fn hash_for_verify(
        &self,
        peer: &PeerContext,
        body: &Value,
    ) -> Result<Value, String> {
        let ask: AskHashes = understood(body)?;
        let group = self.shared_with(peer, ask.group)?;
        let image = group.image(&ask.image).filter(|image| image.owner().starts_with("verify:"));
        let image = image.ok_or_else(|| format!("the image {} is closed", ask.image))?;
        if ask.length > SPAN_BYTES || ![CHUNK_BYTES, BLOCK_BYTES].contains(&ask.piece) {
            return Err(format!("{} bytes in pieces of {} are not hashed", ask.length, ask.piece));
        }
        if ask.offset.checked_add(ask.length).is_none_or(|end| end > Lsn::MAX.0) {
            return Err(format!("nothing is at {}", ask.offset));
        }
        let found = hashes(&*image, ask.volume, ask.offset, ask.length, ask.piece);
        let (runs, head) = (runs_of(&found), group.positions().head);
        Ok(json!(Hashes { runs, head, left_out: not_all(&group) }))
    }

    /// A peer has compared: what came of it counts here too.
    pub(super) fn end_verify(&self, peer: &PeerContext, body: &Value) -> Result<Value, String> {
        let ask: AskClose = understood(body)?;
        let group = self.shared_with(peer, ask.group)?;
        if let Some(image) = group.image(&ask.image)
            && image.owner().starts_with("verify:")
        {
            group.close_this_image(&image).map_err(|error| error.to_string())?;
        }
        if let Some(mut status) = ask.result.filter(|status| status.state != VerifyState::Running) {
            status.peer = peer.name.clone();
            status.bound();
            self.note_compared(&group, &status);
            self.change_ledger(group.id(), |ledger| {
                let runs = ledger.verify.as_ref().is_some_and(|v| v.state == VerifyState::Running);
                if !runs {
                    ledger.verify = Some(status.clone());
                }
            });
            self.save_ledgers();
            self.tell_of_comparison(&group, &status);
        }
        Ok(Value::Null)
    }
}

impl Replication {
    /// Starts to compare this node's copy of a group with a peer's, or the only peer's.
    ///
    /// # Errors
    ///
    /// Where there is no such group or peer, none is linked, or a comparison runs.
    pub fn verify(
        &self,
        group_name: &str,
        peer: Option<&str>,
    ) -> Result<VerifyStatus, ReplicationError> {
        let shared = Arc::clone(&self.shared);
        let group = shared.engine(group_name)?;
        let refused = |what: String| Err(ReplicationError::Refused(what));
        let linked = shared.peers_with(group.id());
        let peer = match peer {
            Some(peer) => shared.peer_named(peer)?.name,
            None => match &linked[..] {
                [only] => shared.peer_named(only)?.name,
                [] => {
                    return refused(format!(
                        "group {group_name}: no peer that holds it is connected; `tidelog status \
                         {group_name}` shows its peers"
                    ));
                }
                _ => {
                    return refused(format!(
                        "group {group_name}: has several peers; name one with --peer PEER"
                    ));
                }
            },
        };
        let now = shared.wall();
        let status = VerifyStatus {
            state: VerifyState::Running,
            state_since: now,
            state_reason: None,
            peer: peer.clone(),
            position: Position::default(),
            done_bytes: 0,
            total_bytes: 0,
            differing_bytes: 0,
            extents: Vec::new(),
            left_out: None,
        };
        let runs = shared.change_ledger(group.id(), |ledger| {
            let runs = ledger.verify.as_ref().is_some_and(|v| v.state == VerifyState::Running);
            if !runs {
                ledger.verify = Some(status.clone());
            }
            runs
        });
        if runs {
            return refused(format!(
                "group {group_name}: is being compared; `tidelog status {group_name}` shows how far"
            ));
        }
        tokio::task::spawn_blocking(move || shared.compare(&group, &peer));
        Ok(status)
    }

    /// The comparison of a group that runs here, or the last one.
    #[must_use]
    pub fn verify_status(&self, group: &Group) -> Option<VerifyStatus> {
        self.shared.ledger(group.id()).verify
    }

    /// For each peer with which a comparison has found a difference the last that did, until one
    /// finds that all is the same.
    #[must_use]
    pub fn differences(&self, group: &Group) -> Vec<VerifyStatus> {
        self.shared.ledger(group.id()).differences().to_vec()
    }

    /// Whether a backup at `lsn` holds the same whichever node made it, as far as comparisons have
    /// told: false while copies differ, and of what was before that ended.
    #[must_use]
    pub fn is_same_at(&self, group: &Group, lsn: Lsn) -> bool {
        let control = group.control();
        let is_member = |peer: &Name| control.members.iter().any(|member| member.name == *peer);
        self.shared.ledger(group.id()).is_same_at(lsn, is_member)
    }
}

mod status;
#[cfg(test)]
mod tests;

pub use self::status::{DifferingExtent, VerifyState, VerifyStatus};
