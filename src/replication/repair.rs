//! Repair of what is damaged here with what a peer has: this side asks, and the engine takes only
//! what its own sums and chain prove; the other side gives only what is whole there.
//!
//! Blocks and records go as calls of `rpc`, a chunk's or a few records' worth at a time, so that
//! they are never in the way of heartbeats or of the log.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::events::Severity;
use crate::group::{DamagedPart, Found, Gap, Group, GroupError, Mended, Wanted};
use crate::units::{Chain, GroupId, Lsn, VolumeNumber};

use super::core::Membership;
use super::rpc::PeerContext;
use super::service::{Shared, locked};

pub(super) const RECORDS: &str = "repair.records";
pub(super) const BLOCKS: &str = "repair.blocks";

/// How long a peer may take to find what it is asked for.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of the log that are asked for: first a record or two, then as many as one answer has.
const ASK_BYTES: [u64; 2] = [256 << 10, 4 << 20];
/// Gaps of one segment that are closed one after the other.
const GAPS_MAX: usize = 64;

#[derive(Serialize, Deserialize)]
struct AskRecords {
    group: GroupId,
    at: Lsn,
    chain: Chain,
    bytes: u64,
}

#[derive(Serialize, Deserialize)]
struct AskBlocks {
    group: GroupId,
    volume: VolumeNumber,
    wanted: Wanted,
}

impl Shared {
    /// Makes a damaged part right from a peer, where one has what it takes; whether it is whole
    /// now. On a thread that may wait.
    pub(super) fn repair(&self, group: &Group, part: &DamagedPart) -> bool {
        let mut tried: Vec<Option<String>> =
            self.peers_with(group.id()).into_iter().map(Some).collect();
        if matches!(part, DamagedPart::Base { .. }) {
            // Sums that blocks and slot prove need no peer.
            tried.insert(0, None);
        }
        let (mut reasons, mut without) = (Vec::new(), Vec::new());
        for peer in &tried {
            let result = match (*part, peer) {
                (DamagedPart::Log { segment }, Some(peer)) => {
                    let has_none = Cell::new(false);
                    let result = self.repair_log(group, segment, peer, &has_none);
                    without.extend(has_none.get().then(|| peer.clone()));
                    result
                }
                (DamagedPart::Base { volume, chunk }, _) => {
                    self.repair_base(group, volume, chunk, peer.as_deref())
                }
                _ => Err("what is kept for older moments is not the same there".to_owned()),
            };
            if matches!(group.check_part(part), Found::Whole(_)) {
                self.tell_of_repair(group, part, peer.as_deref());
                return true;
            }
            let why = result.err().unwrap_or_else(|| "has not what is missing".to_owned());
            reasons.extend(peer.as_ref().map(|peer| format!("{peer}: {why}")));
        }
        let me = self.context.node.id;
        let control = group.control();
        let mut others = control.members.iter().filter(|member| member.node != me);
        if let DamagedPart::Log { segment } = *part
            && others.all(|member| without.iter().any(|peer| peer == member.name.as_str()))
        {
            group.note_nobody_has(segment);
        }
        if reasons.is_empty() {
            reasons.push("no peer that holds the group is connected".to_owned());
        }
        self.change_ledger(group.id(), |ledger| ledger.not_repaired(part, reasons.join("; ")));
        false
    }

    fn tell_of_repair(&self, group: &Group, part: &DamagedPart, peer: Option<&str>) {
        let name = group.name();
        let from = peer.map_or_else(
            || "by what its blocks and sums prove".to_owned(),
            |peer| format!("from peer {peer}"),
        );
        let mut text = format!("group {name}: {part} was repaired {from}");
        if group.log_is_broken() {
            text += "; the log is whole again: restart the node, and it serves";
        }
        let details = json!({ "part": part, "peer": peer });
        self.context.events.emit(Severity::Info, "repaired", Some(name.as_str()), text, details);
    }

    /// The peers that are linked and hold a group, by name.
    pub(super) fn peers_with(&self, group: GroupId) -> Vec<String> {
        let cores = locked(&self.cores);
        let with = cores.values().filter(|core| {
            core.conn().is_some() && core.channel(group).is_some_and(|c| c.remote().is_some())
        });
        with.map(|core| core.name().to_string()).collect()
    }

    /// Calls a peer, on a thread that may wait.
    pub(super) fn ask(&self, peer: &str, method: &str, body: Value) -> Result<Value, String> {
        let asked = self.call(peer, method, body, TIMEOUT);
        let answer = tokio::runtime::Handle::current().block_on(asked);
        answer.map_err(|error| error.to_string())
    }

    /// `has_none` tells whether it ended there that the peer said so.
    fn repair_log(
        &self,
        group: &Group,
        segment: u64,
        peer: &str,
        has_none: &Cell<bool>,
    ) -> Result<(), String> {
        mend_log(group, segment, |gap, bytes| {
            has_none.set(false);
            let ask = AskRecords { group: group.id(), at: gap.at, chain: gap.chain, bytes };
            let records = bytes_of(&self.ask(peer, RECORDS, json!(ask))?)?;
            has_none.set(records.is_empty());
            Ok(records)
        })
    }

    fn repair_base(
        &self,
        group: &Group,
        volume: VolumeNumber,
        chunk: u64,
        peer: Option<&str>,
    ) -> Result<(), String> {
        mend_base(group, volume, chunk, |wanted| {
            let Some(peer) = peer else { return Ok(BTreeMap::new()) };
            let ask = AskBlocks { group: group.id(), volume, wanted };
            let answer = self.ask(peer, BLOCKS, json!(ask))?;
            let told: Vec<(u64, Value)> = serde_json::from_value(answer)
                .map_err(|error| format!("its answer is not understood: {error}"))?;
            told.iter().map(|(block, bytes)| Ok((*block, bytes_of(bytes)?))).collect()
        })
    }

    /// A group that a peer asks about, where that is its business.
    pub(super) fn shared_with(
        &self,
        peer: &PeerContext,
        group: GroupId,
    ) -> Result<Arc<Group>, String> {
        let stranger = || "the group is not shared with that node".to_owned();
        let found = self.groups.engine(group).ok_or_else(stranger)?;
        match self.membership(&*found, peer.node) {
            Membership::Stranger => Err(stranger()),
            _ => Ok(found),
        }
    }

    /// Answers a peer whose log is damaged.
    pub(super) fn give_records(&self, peer: &PeerContext, body: &Value) -> Result<Value, String> {
        let ask: AskRecords = understood(body)?;
        let group = self.shared_with(peer, ask.group)?;
        let gap = Gap { at: ask.at, chain: ask.chain };
        match group.records_for(gap, ask.bytes) {
            Ok(records) => Ok(json!(hex::encode(records))),
            // Folded here, or never had: the peer need not wait for it.
            Err(GroupError::NotCovered { .. }) => Ok(json!("")),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Answers a peer whose base is damaged.
    pub(super) fn give_blocks(&self, peer: &PeerContext, body: &Value) -> Result<Value, String> {
        let ask: AskBlocks = understood(body)?;
        let group = self.shared_with(peer, ask.group)?;
        let blocks = group.blocks_for(ask.volume, &ask.wanted);
        let blocks = blocks.map_err(|error| error.to_string())?;
        let blocks: Vec<_> =
            blocks.into_iter().map(|(block, bytes)| (block, hex::encode(bytes))).collect();
        Ok(json!(blocks))
    }
}

/// Closes the gaps of a segment with what `ask` brings of a peer: whole records that continue a
/// gap, so many bytes of them at most.
///
/// # Errors
///
/// Why the segment is not whole.
pub fn mend_log(
    group: &Group,
    segment: u64,
    mut ask: impl FnMut(Gap, u64) -> Result<Vec<u8>, String>,
) -> Result<(), String> {
    for _ in 0..GAPS_MAX {
        let gap = group.gap(segment).map_err(|error| error.to_string())?;
        let Some(gap) = gap else { return Ok(()) };
        let (mut mended, mut given) = (Mended::Short, false);
        for bytes in ASK_BYTES {
            let records = ask(gap, bytes)?;
            // Nothing, where the first one is longer than that.
            given = !records.is_empty();
            mended = group.mend_log(gap, &records).map_err(|error| error.to_string())?;
            if mended != Mended::Short {
                break;
            }
        }
        let at = gap.at;
        if !given {
            return Err(format!("has no whole record at {at} that continues this log"));
        }
        if mended == Mended::Short {
            return Err(format!("its records at {at} do not lead to what is whole here"));
        }
    }
    Err(format!("there are more than {GAPS_MAX} gaps in the segment; the rest is next"))
}

/// Makes a chunk of the base right with what `ask` brings of a peer: blocks, by number, as they are
/// at a position.
///
/// # Errors
///
/// Why the chunk is not whole; without one it may still lack what the peer has not.
pub fn mend_base(
    group: &Group,
    volume: VolumeNumber,
    chunk: u64,
    mut ask: impl FnMut(Wanted) -> Result<BTreeMap<u64, Vec<u8>>, String>,
) -> Result<(), String> {
    let mut blocks = BTreeMap::new();
    for wanted in group.wanted_blocks(volume, chunk) {
        blocks.extend(ask(wanted)?);
    }
    group.mend_base(volume, chunk, &blocks).map_err(|error| error.to_string())?;
    Ok(())
}

/// A request of a peer.
pub(super) fn understood<T: serde::de::DeserializeOwned>(body: &Value) -> Result<T, String> {
    T::deserialize(body).map_err(|error| format!("a request that is not understood: {error}"))
}

fn bytes_of(value: &Value) -> Result<Vec<u8>, String> {
    let text = value.as_str().ok_or("its answer holds no bytes")?;
    hex::decode(text).map_err(|error| format!("its answer holds no bytes: {error}"))
}
