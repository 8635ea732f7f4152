//! What replication needs of a group and of the node's groups, as traits, so that the protocol can
//! be tested against groups that are not the engine's.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::group::{
    ControlView, DataState, Discard, Group, GroupError, ImageOffer, ImagePart, ImageProgress,
    Positions, ReceiveError, Registry, RequiredPeer, Role, Staged, TookOver,
};
use crate::log::control::{Control, EpochRecord};
use crate::units::{Chain, GroupId, Incarnation, LogTime, Lsn, Name, NodeId, Position};

use super::core::{LocalGroup, Membership};
use super::epoch::History;
use super::wire::NeedsImage;

/// A group, as far as its log travels. The methods are those of [`Group`].
#[expect(missing_docs, reason = "each is the method of the same name in the engine")]
pub trait Replica: Send + Sync {
    fn id(&self) -> GroupId;
    fn name(&self) -> &Name;
    fn segment_bytes(&self) -> u64;
    fn role(&self) -> Role;
    fn data_state(&self) -> (DataState, Option<String>, LogTime);
    /// Why its log is full, where it is.
    fn why_full(&self) -> Option<String>;
    /// Why an append would find no room now, where it would not.
    fn full_now(&self) -> Option<String>;
    /// Whether it is full, or was and is under pressure still.
    fn is_short_of_room(&self) -> bool;
    fn positions(&self) -> Positions;
    fn control(&self) -> Arc<ControlView>;
    fn incarnation(&self) -> Incarnation;
    fn read_log(&self, from: Lsn, buffer: &mut [u8]) -> Result<(), GroupError>;
    fn log_start(&self) -> Lsn;
    fn chain_at(&self, lsn: Lsn) -> Option<Chain>;
    fn append_received(&self, at: Lsn, bytes: &[u8]) -> Result<Lsn, ReceiveError>;
    fn received_end(&self) -> Lsn;
    fn reset_received(&self);
    fn note_committed(&self, lsn: Lsn);
    fn note_peer_holds(&self, peer: NodeId, received: Lsn, durable: Lsn);
    fn note_peer_lost(&self, peer: NodeId, reason: &str, received: Lsn, durable: Lsn);
    fn required_peers(&self) -> Vec<(NodeId, RequiredPeer)>;
    fn is_asking(&self) -> bool;
    fn cuts(&self) -> u64;
    fn note_answer(&self, peer: NodeId) -> Result<(), GroupError>;
    fn hold_back(&self, counter: u64, reason: &str);
    fn note_split_brain(&self, peer: NodeId, there_is: bool) -> Result<(), GroupError>;
    fn yield_to(&self, at: Lsn, chain: Option<Chain>, discard: Discard) -> Result<(), GroupError>;
    fn halt_writers(&self, why: &str) -> Result<(), GroupError>;
    fn resume_writers(&self);
    fn sync_now(&self) -> Result<Lsn, GroupError>;
    fn demote(&self) -> Result<(), GroupError>;
    fn promote(&self, reason: &str) -> Result<EpochRecord, GroupError>;
    fn take_over(&self, head: Lsn, chain: Chain) -> Result<TookOver, GroupError>;
    fn set_retired(&self, retired: bool) -> Result<(), GroupError>;
    fn append_control(&self, control: Control) -> Result<Lsn, GroupError>;
    fn subscribe(&self, listener: Box<dyn Fn() -> bool + Send + Sync>);
    fn ship(
        &self,
        peer: &Name,
        since: Option<Lsn>,
        common: Lsn,
        staged: Option<&Staged>,
        stream: u64,
    ) -> Result<ImageOffer, GroupError>;
    fn note_peer_needs(&self, peer: NodeId, from: Lsn, follows: bool);
    fn next_part(
        &self,
        peer: &Name,
        stream: u64,
        number: u64,
    ) -> Result<Option<ImagePart>, GroupError>;
    fn end_shipment(&self, peer: &Name);
    fn staged(&self) -> Result<Option<Staged>, GroupError>;
    fn begin_image(&self, offer: &ImageOffer) -> Result<(), GroupError>;
    fn stage(&self, part: ImagePart) -> Result<ImageProgress, GroupError>;
    fn switch_to_image(&self) -> Result<Position, GroupError>;
    fn drop_staging(&self) -> Result<(), GroupError>;
    fn needs_image(&self) -> NeedsImage;
}

/// The groups of a node. The methods are those of [`Registry`].
#[expect(missing_docs, reason = "each is the method of the same name in the engine")]
pub trait Replicas: Send + Sync {
    fn groups(&self) -> Vec<Arc<dyn Replica>>;
    fn by_id(&self, id: GroupId) -> Option<Arc<dyn Replica>>;
    /// The same as the engine has it: what is read of it is more than its log.
    fn engine(&self, id: GroupId) -> Option<Arc<Group>>;
    fn by_name(&self, name: &str) -> Result<Arc<dyn Replica>, GroupError>;
    fn create_copy(
        &self,
        id: GroupId,
        name: Name,
        segment_bytes: u64,
    ) -> Result<Arc<dyn Replica>, GroupError>;
    fn subscribe(&self, listener: Box<dyn Fn() -> bool + Send + Sync>);
}

impl Replica for Group {
    fn full_now(&self) -> Option<String> {
        Group::full_now(self)
    }

    fn is_short_of_room(&self) -> bool {
        Group::is_short_of_room(self)
    }

    fn why_full(&self) -> Option<String> {
        self.log_full().map(|full| full.reason)
    }

    fn ship(
        &self,
        peer: &Name,
        since: Option<Lsn>,
        common: Lsn,
        staged: Option<&Staged>,
        stream: u64,
    ) -> Result<ImageOffer, GroupError> {
        let shipment = Group::ship(self, peer, since, common, staged)?;
        shipment.begin_stream(stream);
        Ok(shipment.offer())
    }
    fn note_peer_needs(&self, peer: NodeId, from: Lsn, follows: bool) {
        Group::note_peer_needs(self, peer, from, follows);
    }
    fn next_part(
        &self,
        peer: &Name,
        stream: u64,
        number: u64,
    ) -> Result<Option<ImagePart>, GroupError> {
        Group::next_part(self, peer, stream, number)
    }
    fn end_shipment(&self, peer: &Name) {
        Group::end_shipment(self, peer);
    }
    fn staged(&self) -> Result<Option<Staged>, GroupError> {
        Group::staged(self)
    }
    fn begin_image(&self, offer: &ImageOffer) -> Result<(), GroupError> {
        Group::begin_image(self, offer)
    }
    fn stage(&self, part: ImagePart) -> Result<ImageProgress, GroupError> {
        Group::stage(self, part)
    }
    fn switch_to_image(&self) -> Result<Position, GroupError> {
        Group::switch_to_image(self)
    }
    fn drop_staging(&self) -> Result<(), GroupError> {
        Group::drop_staging(self)
    }
    fn needs_image(&self) -> NeedsImage {
        match Group::needs_image(self) {
            None => NeedsImage::No,
            Some(_) if self.needs_whole_image() => NeedsImage::Whole,
            Some(_) => NeedsImage::Since,
        }
    }
    fn cuts(&self) -> u64 {
        Group::cuts(self)
    }
    fn id(&self) -> GroupId {
        Group::id(self)
    }
    fn name(&self) -> &Name {
        Group::name(self)
    }
    fn segment_bytes(&self) -> u64 {
        Group::segment_bytes(self)
    }
    fn role(&self) -> Role {
        Group::role(self)
    }
    fn data_state(&self) -> (DataState, Option<String>, LogTime) {
        Group::data_state(self)
    }
    fn positions(&self) -> Positions {
        Group::positions(self)
    }
    fn control(&self) -> Arc<ControlView> {
        Group::control(self)
    }
    fn incarnation(&self) -> Incarnation {
        Group::incarnation(self)
    }
    fn read_log(&self, from: Lsn, buffer: &mut [u8]) -> Result<(), GroupError> {
        Group::read_log(self, from, buffer)
    }
    fn log_start(&self) -> Lsn {
        Group::log_start(self)
    }
    fn chain_at(&self, lsn: Lsn) -> Option<Chain> {
        Group::chain_at(self, lsn)
    }
    fn append_received(&self, at: Lsn, bytes: &[u8]) -> Result<Lsn, ReceiveError> {
        Group::append_received(self, at, bytes)
    }
    fn received_end(&self) -> Lsn {
        Group::received_end(self)
    }
    fn reset_received(&self) {
        Group::reset_received(self);
    }
    fn note_committed(&self, lsn: Lsn) {
        Group::note_committed(self, lsn);
    }
    fn note_peer_holds(&self, peer: NodeId, received: Lsn, durable: Lsn) {
        Group::note_peer_holds(self, peer, received, durable);
    }
    fn note_peer_lost(&self, peer: NodeId, reason: &str, received: Lsn, durable: Lsn) {
        Group::note_peer_lost(self, peer, reason, received, durable);
    }
    fn required_peers(&self) -> Vec<(NodeId, RequiredPeer)> {
        Group::required_peers(self)
    }
    fn is_asking(&self) -> bool {
        Group::is_asking(self)
    }
    fn note_answer(&self, peer: NodeId) -> Result<(), GroupError> {
        Group::note_answer(self, peer)
    }
    fn hold_back(&self, counter: u64, reason: &str) {
        Group::hold_back(self, counter, reason);
    }
    fn note_split_brain(&self, peer: NodeId, there_is: bool) -> Result<(), GroupError> {
        Group::note_split_brain(self, peer, there_is)
    }
    fn yield_to(&self, at: Lsn, chain: Option<Chain>, discard: Discard) -> Result<(), GroupError> {
        Group::yield_to(self, at, chain, discard)
    }
    fn halt_writers(&self, why: &str) -> Result<(), GroupError> {
        Group::halt_writers(self, why)
    }
    fn resume_writers(&self) {
        Group::resume_writers(self);
    }
    fn sync_now(&self) -> Result<Lsn, GroupError> {
        Group::sync_now(self)
    }
    fn demote(&self) -> Result<(), GroupError> {
        Group::demote(self)
    }
    fn promote(&self, reason: &str) -> Result<EpochRecord, GroupError> {
        Group::promote(self, reason)
    }
    fn take_over(&self, head: Lsn, chain: Chain) -> Result<TookOver, GroupError> {
        Group::take_over(self, head, chain)
    }
    fn set_retired(&self, retired: bool) -> Result<(), GroupError> {
        Group::set_retired(self, retired)
    }
    fn append_control(&self, control: Control) -> Result<Lsn, GroupError> {
        Group::append_control(self, control)
    }
    fn subscribe(&self, listener: Box<dyn Fn() -> bool + Send + Sync>) {
        Group::subscribe(self, listener);
    }
}

impl Replicas for Registry {
    fn groups(&self) -> Vec<Arc<dyn Replica>> {
        Registry::groups(self).into_iter().map(|group| group as Arc<dyn Replica>).collect()
    }
    fn by_id(&self, id: GroupId) -> Option<Arc<dyn Replica>> {
        Registry::by_id(self, id).map(|group| group as Arc<dyn Replica>)
    }
    fn engine(&self, id: GroupId) -> Option<Arc<Group>> {
        Registry::by_id(self, id)
    }
    fn by_name(&self, name: &str) -> Result<Arc<dyn Replica>, GroupError> {
        Registry::by_name(self, name).map(|group| group as Arc<dyn Replica>)
    }
    fn create_copy(
        &self,
        id: GroupId,
        name: Name,
        segment_bytes: u64,
    ) -> Result<Arc<dyn Replica>, GroupError> {
        Registry::create_copy(self, id, name, segment_bytes).map(|group| group as Arc<dyn Replica>)
    }
    fn subscribe(&self, listener: Box<dyn Fn() -> bool + Send + Sync>) {
        Registry::subscribe(self, listener);
    }
}

/// Where a group's log stands.
pub(super) fn history_of(group: &dyn Replica, positions: &Positions) -> History {
    // Positions first, control after: a reign that begins behind the head is not part of it yet.
    let control = group.control();
    let known = control.epochs.partition_point(|epoch| epoch.first_lsn < positions.head);
    History::new(&control.epochs[..known], positions.head, positions.chain)
}

/// What the group's records say of a peer. `asked_for` tells that the peer had the copy made, or
/// taken up again. Members that were removed are not in the records' view; one of them that was
/// promoted is a member again by the next record of its reign, which a copy may not have yet.
pub(super) fn membership_of(
    control: &ControlView,
    me: NodeId,
    peer: NodeId,
    primary: bool,
    asked_for: bool,
) -> Membership {
    let find = |node| control.members.iter().find(|member| member.node == node);
    let (own, theirs) = (find(me), find(peer));
    let reigns = control.epochs.last().is_some_and(|epoch| epoch.author == peer);
    match theirs {
        Some(member) if primary || own.is_some() => {
            // These are properties of the copy: on the secondary it stands in its own record.
            let copy = if primary { member } else { own.unwrap_or(member) };
            Membership::Member { rpo_target: copy.rpo_target, mode: copy.mode }
        }
        _ if asked_for && !primary => Membership::Pending,
        Some(_) => Membership::Stopped,
        None if reigns && own.is_some() && !primary => Membership::Pending,
        None => Membership::Stranger,
    }
}

/// All that the core needs to know of a group in view of a peer.
pub fn local_group(group: &dyn Replica, me: NodeId, peer: NodeId, asked_for: bool) -> LocalGroup {
    // First: what follows may be of behind a cut, and is then not taken for what was before it.
    let cuts = group.cuts();
    let positions = group.positions();
    let control = group.control();
    let primary = group.role() == Role::Primary;
    let data_state = group.data_state().0;
    LocalGroup {
        id: group.id(),
        name: group.name().clone(),
        primary,
        recovering: primary && group.is_asking(),
        incarnation: group.incarnation(),
        history: history_of(group, &positions),
        durable: positions.durable,
        requests: positions.requests,
        log_start: group.log_start(),
        cuts,
        failed: data_state == DataState::Failed,
        retired: data_state == DataState::Retired,
        membership: membership_of(&control, me, peer, primary, asked_for),
        follows: None,
        authored: control.epochs.last().is_some_and(|epoch| epoch.author == me),
        given_up: BTreeSet::new(),
    }
}
