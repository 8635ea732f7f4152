//! What a comparison of two copies has come to, and what follows from it.

use serde::{Deserialize, Serialize};

use crate::units::{ByteSize, LogTime, Name, Position};

/// Extents that are listed at most; more are counted.
const EXTENTS_MAX: usize = 1000;

/// What a comparison has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerifyState {
    /// It goes on.
    Running,
    /// All is the same.
    Equal,
    /// Something is not.
    Differs,
    /// It could not be carried out.
    Failed,
}

/// A range that is not the same on both nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DifferingExtent {
    /// The volume's name.
    pub volume: Name,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Where it cannot be read: this node's name, or the peer's. Else both are sure of theirs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreadable_on: Option<Name>,
}

/// The comparison of a group that runs on this node, or the last one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyStatus {
    /// What it has come to.
    pub state: VerifyState,
    /// Since when.
    pub state_since: LogTime,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<String>,
    /// With whom.
    pub peer: Name,
    /// The image that was compared.
    pub position: Position,
    /// Bytes compared.
    pub done_bytes: u64,
    /// Bytes of all volumes.
    pub total_bytes: u64,
    /// Bytes that differ, or cannot be read on one of the nodes.
    pub differing_bytes: u64,
    /// Where; of very many, the first.
    pub extents: Vec<DifferingExtent>,
    /// Why what was compared is not all that is to be on both nodes, where it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_out: Option<String>,
}

impl VerifyStatus {
    /// The process has ended; whether that ended this one.
    pub(in crate::replication) fn ended_with_the_process(&mut self) -> bool {
        let ran = self.state == VerifyState::Running;
        if ran {
            self.state = VerifyState::Failed;
            self.state_reason = Some("the node was started again meanwhile".to_owned());
        }
        ran
    }

    /// Whether it shows that a difference which was found before is none any more: all is there and
    /// the same with that peer, at no earlier moment, or that moment has left the history. Where
    /// nobody can compare with that peer any more, that all is the same with another is enough.
    pub(super) fn ends(&self, known: &VerifyStatus, in_history: bool, is_peer: bool) -> bool {
        let same_peer = self.peer == known.peer;
        let later = self.position.lsn >= known.position.lsn || !in_history;
        let all_equal = self.state == VerifyState::Equal && self.left_out.is_none();
        all_equal && if same_peer { later } else { !is_peer }
    }

    /// Keeps no more of what a peer says than this node lists.
    pub(super) fn bound(&mut self) {
        self.extents.truncate(EXTENTS_MAX);
    }

    /// What speaks against the copy: where both nodes are sure of different bytes, also where the
    /// comparison was not carried to its end.
    #[must_use]
    pub fn difference(&self) -> Option<String> {
        let first = self.extents.iter().find(|extent| extent.unreadable_on.is_none())?;
        let VerifyStatus { peer, position, .. } = self;
        Some(format!(
            "{} differ from {peer}'s at LSN {}, the first of volume {} at {}",
            ByteSize(self.differing_bytes),
            position.lsn,
            first.volume,
            first.offset
        ))
    }

    pub(super) fn add(
        &mut self,
        volume: &Name,
        offset: u64,
        length: u64,
        unreadable_on: Option<&Name>,
    ) {
        self.differing_bytes = self.differing_bytes.saturating_add(length);
        if let Some(last) = self.extents.last_mut()
            && (&last.volume, last.offset + last.length) == (volume, offset)
            && last.unreadable_on.as_ref() == unreadable_on
        {
            last.length += length;
        } else {
            let is_full = self.extents.len() >= EXTENTS_MAX;
            if is_full && (unreadable_on.is_some() || self.difference().is_some()) {
                return;
            }
            // The first that differs is listed, however many could not be read before it.
            self.extents.truncate(EXTENTS_MAX - 1);
            let (volume, unreadable_on) = (volume.clone(), unreadable_on.cloned());
            self.extents.push(DifferingExtent { volume, offset, length, unreadable_on });
        }
    }

    /// What is to be done about a difference.
    pub(super) fn advice(&self, group: &Name) -> String {
        let VerifyStatus { peer, position, .. } = self;
        match self.difference() {
            Some(difference) => format!(
                "{difference}; both are whole by their own sums, and nothing tells which is right: \
                 look at both with `tidelog image open {group} --at lsn:{}`, then have the copy \
                 made anew: `tidelog replicate {group} --stop` on the primary, `tidelog group \
                 delete {group}` on the copy's node, replicate again, and verify again",
                position.lsn
            ),
            None => format!(
                "{} cannot be read on one of the nodes; they are repaired from the other where it \
                 has them: `tidelog status {group}` there and on {peer}, then verify again",
                ByteSize(self.differing_bytes)
            ),
        }
    }
}
