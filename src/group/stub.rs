//! Signatures that the other rooms are built against; replaced by the engine.
#![allow(missing_docs, unused_variables, clippy::unimplemented)]

use super::*;

pub struct Group {}

#[derive(Clone, Debug)]
pub struct NewGroup {
    pub id: GroupId,
    pub name: Name,
    pub segment_bytes: u64,
}

/// What recovery found.
#[derive(Clone, Debug, Default)]
pub struct Recovery {
    /// An unclean boot: answered but unflushed writes may be missing in this span.
    pub cut: Option<(Lsn, Lsn)>,
    pub scanned_bytes: u64,
}

impl Group {
    /// A new group here, as primary: group and epoch records are durable on return.
    pub fn create(
        context: GroupContext,
        dir: &Path,
        new: NewGroup,
    ) -> Result<Arc<Group>, GroupError> {
        unimplemented!()
    }
    /// An empty copy that a peer will fill from LSN 0; data state `none` until the first request end.
    pub fn create_copy(
        context: GroupContext,
        dir: &Path,
        new: NewGroup,
    ) -> Result<Arc<Group>, GroupError> {
        unimplemented!()
    }
    /// Opens and recovers.
    pub fn open(context: GroupContext, dir: &Path) -> Result<(Arc<Group>, Recovery), GroupError> {
        unimplemented!()
    }
    /// Starts the sync and fold threads (the simulation calls `sync_now` and `fold_now` itself).
    pub fn start_workers(self: &Arc<Self>) {
        unimplemented!()
    }
    /// Clean shutdown: syncs, marks the log clean, stops the threads. Later appends fail.
    pub fn close(&self) -> Result<(), GroupError> {
        unimplemented!()
    }

    pub fn id(&self) -> GroupId {
        unimplemented!()
    }
    pub fn name(&self) -> &Name {
        unimplemented!()
    }
    pub fn segment_bytes(&self) -> u64 {
        unimplemented!()
    }
    pub fn node(&self) -> &NodeIdentity {
        unimplemented!()
    }
    pub fn role(&self) -> Role {
        unimplemented!()
    }
    pub fn data_state(&self) -> (DataState, Option<String>, LogTime) {
        unimplemented!()
    }
    pub fn positions(&self) -> Positions {
        unimplemented!()
    }
    /// The control state at the head; cheap (shared).
    pub fn control(&self) -> Arc<ControlView> {
        unimplemented!()
    }
    pub fn incarnation(&self) -> crate::units::Incarnation {
        unimplemented!()
    }
    /// "full" states: `None`, or why writers are slowed (`log-full`).
    pub fn log_full(&self) -> Option<String> {
        unimplemented!()
    }
    /// `listener` is called (never under the group's mutex, must not block) after head, durable,
    /// committed, role, control or state changed, until it answers false.
    pub fn subscribe(&self, listener: Box<dyn Fn() -> bool + Send + Sync>) {
        unimplemented!()
    }

    /// Appends a batch in order as one vectored write; per request the end LSN. Requests are atomic.
    pub fn append(&self, requests: &[Request<'_>]) -> Vec<Result<Lsn, GroupError>> {
        unimplemented!()
    }
    /// Calls `done` when everything up to `lsn` is durable here (one sync for all that wait), from
    /// the sync thread or at once.
    pub fn when_durable(&self, lsn: Lsn, done: Done) {
        unimplemented!()
    }
    /// Appends one control record (as primary), waits until it is durable; its end.
    pub fn append_control(&self, control: Control) -> Result<Lsn, GroupError> {
        unimplemented!()
    }
    pub fn create_volume(&self, name: Name, size_bytes: u64) -> Result<Volume, GroupError> {
        unimplemented!()
    }
    pub fn resize_volume(&self, name: &Name, size_bytes: u64) -> Result<Volume, GroupError> {
        unimplemented!()
    }
    pub fn remove_volume(&self, name: &Name) -> Result<(), GroupError> {
        unimplemented!()
    }
    /// A bookmark at the present request end.
    pub fn create_bookmark(
        &self,
        name: Name,
        consistency: crate::log::control::Consistency,
    ) -> Result<BookmarkRecord, GroupError> {
        unimplemented!()
    }
    pub fn sync_now(&self) -> Result<Lsn, GroupError> {
        unimplemented!()
    }
    /// Folds up to the target that policy, holds and limits allow; the new horizon.
    pub fn fold_now(&self) -> Result<Lsn, GroupError> {
        unimplemented!()
    }

    /// Reads raw log bytes `[from, from + buffer.len())`, any alignment, below head; from the page
    /// cache, without the group's mutex held during the read. Errors when `from` < first LSN kept.
    pub fn read_log(&self, from: Lsn, buffer: &mut [u8]) -> Result<(), GroupError> {
        unimplemented!()
    }
    /// The lowest LSN that `read_log` can serve.
    pub fn log_start(&self) -> Lsn {
        unimplemented!()
    }
    /// The chain at a record boundary (checksum of the record that ends there), if the log has it.
    pub fn chain_at(&self, lsn: Lsn) -> Option<Chain> {
        unimplemented!()
    }
    /// Appends bytes that continue the log at `at` (= received end so far, may cut records anywhere:
    /// the unfinished tail is kept in memory). Checks chain, headers, payload CRCs. New head.
    pub fn append_received(&self, at: Lsn, bytes: &[u8]) -> Result<Lsn, ReceiveError> {
        unimplemented!()
    }
    /// Where the next received byte belongs (head plus the unfinished tail).
    pub fn received_end(&self) -> Lsn {
        unimplemented!()
    }
    /// Forgets the unfinished tail, for a new connection.
    pub fn reset_received(&self) {
        unimplemented!()
    }
    /// The primary told that it is durable there up to `lsn`.
    pub fn note_committed(&self, lsn: Lsn) {
        unimplemented!()
    }
    /// A new epoch, this node its author; durable on return. Idempotent where it reigns already.
    pub fn promote(&self, reason: &str) -> Result<EpochRecord, GroupError> {
        unimplemented!()
    }
    /// Stops taking writes; durable on return.
    pub fn demote(&self) -> Result<(), GroupError> {
        unimplemented!()
    }

    pub fn resolve_point(&self, point: &Point) -> Result<Position, GroupError> {
        unimplemented!()
    }
    /// Opens an image; it and its hold last until `close_image` or `expires_after`.
    pub fn open_image(
        &self,
        point: &Point,
        name: Option<Name>,
        owner: &str,
        expires_after: Option<Duration>,
    ) -> Result<Arc<Image>, GroupError> {
        unimplemented!()
    }
    pub fn image(&self, name: &Name) -> Option<Arc<Image>> {
        unimplemented!()
    }
    pub fn images(&self) -> Vec<Arc<Image>> {
        unimplemented!()
    }
    pub fn close_image(&self, name: &Name) -> Result<(), GroupError> {
        unimplemented!()
    }
    pub fn clients(&self) -> Vec<(VolumeNumber, usize)> {
        unimplemented!()
    }
    /// Counts a client of a volume until the guard is dropped.
    pub fn client(self: &Arc<Self>, volume: VolumeNumber) -> ClientGuard {
        unimplemented!()
    }
    /// Whether position `p` is in this group's present history (epoch history and log agree).
    pub fn is_in_history(&self, p: Position) -> bool {
        unimplemented!()
    }
    /// Checks the CRCs of `[from, to)` of the log; bytes read.
    pub fn check_log(&self, from: Lsn, to: Lsn) -> Result<u64, GroupError> {
        unimplemented!()
    }
}

pub struct ClientGuard {}

impl View for Group {
    fn volumes(&self) -> Vec<Volume> {
        unimplemented!()
    }
    fn read(&self, reads: &mut [Read<'_>]) {
        unimplemented!()
    }
    fn extents(
        &self,
        volume: VolumeNumber,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Result<Vec<Extent>, GroupError> {
        unimplemented!()
    }
}

/// A read-only view of a group at one LSN.
pub struct Image {}

impl Image {
    pub fn name(&self) -> &Name {
        unimplemented!()
    }
    pub fn group(&self) -> &Arc<Group> {
        unimplemented!()
    }
    pub fn position(&self) -> Position {
        unimplemented!()
    }
    pub fn owner(&self) -> &str {
        unimplemented!()
    }
    pub fn opened(&self) -> LogTime {
        unimplemented!()
    }
    /// Why it can no longer be read (its hold was broken), if so.
    pub fn broken(&self) -> Option<String> {
        unimplemented!()
    }
    /// Extents that differ between this image and an earlier LSN (map newer, base births newer).
    pub fn changed_since(
        &self,
        volume: VolumeNumber,
        since: Lsn,
    ) -> Result<Vec<(u64, u64)>, GroupError> {
        unimplemented!()
    }
}

impl View for Image {
    fn volumes(&self) -> Vec<Volume> {
        unimplemented!()
    }
    fn read(&self, reads: &mut [Read<'_>]) {
        unimplemented!()
    }
    fn extents(
        &self,
        volume: VolumeNumber,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Result<Vec<Extent>, GroupError> {
        unimplemented!()
    }
}

/// The groups of a node.
pub struct Registry {}

impl Registry {
    /// Opens and recovers every group under `dir` (`data_dir/groups`).
    pub fn open(context: GroupContext, dir: &Path) -> Result<Arc<Registry>, GroupError> {
        unimplemented!()
    }
    pub fn groups(&self) -> Vec<Arc<Group>> {
        unimplemented!()
    }
    pub fn by_name(&self, name: &str) -> Result<Arc<Group>, GroupError> {
        unimplemented!()
    }
    pub fn by_id(&self, id: GroupId) -> Option<Arc<Group>> {
        unimplemented!()
    }
    pub fn create(&self, name: Name, segment_bytes: Option<u64>) -> Result<Arc<Group>, GroupError> {
        unimplemented!()
    }
    /// The copy that a peer's `replicate` asks for; a taken name is refused.
    pub fn create_copy(
        &self,
        id: GroupId,
        name: Name,
        segment_bytes: u64,
    ) -> Result<Arc<Group>, GroupError> {
        unimplemented!()
    }
    pub fn delete(&self, name: &Name) -> Result<(), GroupError> {
        unimplemented!()
    }
    /// Called after a group was created, opened or deleted.
    pub fn subscribe(&self, listener: Box<dyn Fn() -> bool + Send + Sync>) {
        unimplemented!()
    }
    pub fn close(&self) {
        unimplemented!()
    }
}
