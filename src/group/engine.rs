//! The group itself: what it owns, what is behind its mutex, and what it tells about itself.
//!
//! Locks are taken in this order, and any of them alone: `turn`, `fold_lock`, `staging`,
//! `images_file`, `sync_lock`, `core`, `waiters`, `meta`. Disk syncs happen outside of `core`; the
//! append's own write happens inside, so that the order of the log is the order of the map.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock, Weak};
use std::time::Duration;

use serde_json::{Map, json};

use super::branch::Listed;
use super::clients::Clients;
use super::clock::{self, LogClock};
use super::content::Content;
use super::fold_damage::Awaited;
use super::image::Image;
use super::merging::Merging;
use super::meta::{META, Meta, MetaFile, UNFINISHED_META};
use super::moment::Moment;
use super::needs::{KeptFor, Needs};
use super::receive::Pending;
use super::required::{Floors, Required};
use super::returning::Asking;
use super::room::Room;
use super::scrub::DamagedPart;
use super::shipment::Shipment;
use super::staging::{ImageProgress, Staging};
use super::sync::Waiting;
use super::timeline::{Checkpoint, Timeline};
use super::worker::Workers;
use super::{
    ControlView, DataState, GroupContext, GroupError, NodeIdentity, Positions, Role, Volume,
};
use crate::base::{BaseVolume, ControlState};
use crate::events::Severity;
use crate::extent_map::Freed;
use crate::io::is_full;
use crate::log::control::{Control, ControlKind, EpochRecord, GroupRecord};
use crate::log::record::{Header, Kind, genesis};
use crate::log::segment::{Segments, is_segment_size};
use crate::log::writer::Writer;
use crate::units::{
    ByteSize, Chain, EpochId, GroupId, Incarnation, LogTime, Lsn, Name, Position, VolumeNumber,
};

/// What a group is made from.
#[derive(Clone, Debug)]
pub struct NewGroup {
    /// Its identity, the same on every node.
    pub id: GroupId,
    /// Its name.
    pub name: Name,
    /// Bytes of a segment, a power of two from 64 KiB to 1 GiB.
    pub segment_bytes: u64,
}

/// Called after something changed; `false` ends the subscription.
pub(super) type Listener = Arc<dyn Fn() -> bool + Send + Sync>;

/// A consistency group on this node.
pub struct Group {
    pub(super) me: Weak<Group>,
    pub(super) context: GroupContext,
    pub(super) dir: PathBuf,
    pub(super) identity: NewGroup,
    pub(super) incarnation: Incarnation,
    /// Times that the log was cut back since the start.
    pub(super) cuts: AtomicU64,
    pub(super) segments: Arc<Segments>,
    pub(super) core: Mutex<Core>,
    pub(super) meta: Mutex<MetaFile>,
    /// Volumes that have something in the base.
    pub(super) bases: RwLock<BTreeMap<VolumeNumber, Arc<BaseVolume>>>,
    /// Taken for writing around each write of the folder to the base. A reader whose checksum did
    /// not hold reads again under it: it may have met the folder in the middle of a block.
    pub(super) base_gate: RwLock<()>,
    /// What is staged of the image that is shown, until it is in the base.
    pub(super) merging: RwLock<Option<Arc<Merging>>>,
    /// An image that comes.
    pub(super) staging: Mutex<Option<Staging>>,
    /// When it was opened here, monotonic.
    pub(super) started: Duration,
    /// Images on their way to peers.
    pub(super) shipments: Mutex<BTreeMap<Name, Arc<Shipment>>>,
    /// Mirror of `meta.log_begin`: below it the log has nothing.
    pub(super) log_begin: AtomicU64,
    /// Held while the role changes.
    pub(super) turn: Mutex<()>,
    pub(super) fold_lock: Mutex<()>,
    /// Held over the list of images and the file that it becomes.
    pub(super) images_file: Mutex<()>,
    pub(super) sync_lock: Mutex<()>,
    /// Mirror of `core.durable`, for waiters.
    pub(super) durable: AtomicU64,
    pub(super) waiters: Mutex<Waiting>,
    /// Up to where the peers have the log that answers wait for.
    pub(super) floors: Arc<Floors>,
    pub(super) waiters_changed: Condvar,
    /// Signalled with `core` when the log got shorter, or the group failed or closed.
    pub(super) space: Condvar,
    pub(super) workers: Workers,
    pub(super) listeners: RwLock<Vec<Listener>>,
    pub(super) clients: Clients,
    pub(super) listed: Listed,
    /// What looked damaged to readers, for whoever checks.
    pub(super) suspects: Mutex<BTreeSet<DamagedPart>>,
}

/// What the mutex guards.
pub(super) struct Core {
    pub writer: Writer,
    /// Everything up to the head.
    pub content: Content,
    /// What other rooms see of it.
    pub view: Arc<ControlView>,
    /// Where requests end.
    pub timeline: Timeline,
    pub clock: LogClock,
    /// Epoch of the last record.
    pub epoch: EpochId,
    pub durable: Lsn,
    /// What the primary told; on the primary not used.
    pub committed: Lsn,
    /// Bytes were written since the last flush mark.
    pub unflushed: bool,
    /// The control state at the horizon.
    pub horizon: Arc<ControlState>,
    /// No image goes below this but at a moment that is kept: a fold up to here may have begun.
    pub fold_target: Lsn,
    pub role: Role,
    /// This node is primary, and has served nobody since its start.
    pub asking: Option<Asking>,
    /// Writers wait although this node is primary: why.
    pub halted: Option<String>,
    /// How often the end of the log was cut: what was read before counts no more.
    pub cuts: u64,
    pub failed: Option<(String, LogTime)>,
    /// The log is damaged in the middle, and was durable up to here: it ends before.
    pub durable_before: Option<Lsn>,
    pub retired: Option<LogTime>,
    pub closed: bool,
    pub images: BTreeMap<Name, Arc<Image>>,
    /// The images that were open before the start are among them, or lost for good.
    pub images_known: bool,
    /// What somebody needs of what folds have passed or are passing.
    pub moments: BTreeMap<Lsn, Arc<Moment>>,
    pub pending: Pending,
    /// The peers that answers wait for.
    pub required: Required,
    /// Where the peers stand.
    pub needs: Needs,
    /// It was told for which peer writers wait.
    pub told_kept_for: Option<KeptFor>,
    /// How far an image is that comes.
    pub receiving: Option<ImageProgress>,
    /// Why the primary's log cannot be followed further, if so.
    pub needs_image: Option<String>,
    /// Bytes of log and index on disk, as known after the last change.
    pub log_used_bytes: u64,
    /// What room there is for the log, and what was told of it.
    pub room: Room,
    /// A fold up to here was interrupted by a crash or an error, and is finished before any other.
    pub unfinished_fold: Option<Lsn>,
    /// It may have left blocks of the base torn: it ended by a crash, or by an error other than a
    /// wait.
    pub may_be_torn: bool,
    /// What folds wait for.
    pub awaited: Awaited,
    /// What is to be told once the mutex is free.
    pub unreported: Vec<Report>,
}

/// An event that came up under the mutex.
pub(super) struct Report {
    pub severity: Severity,
    pub code: &'static str,
    pub text: String,
    pub details: serde_json::Value,
}

impl Core {
    /// Applies a record that has just been appended.
    pub(super) fn apply(&mut self, header: &Header, payload: &[u8], freed: &mut Vec<Freed>) {
        if self.content.apply(header, payload, freed) {
            self.refresh_view();
        }
        if header.is_last_of_request() {
            self.timeline.push(Checkpoint::behind(header));
        }
        match header.known_kind() {
            Some(Kind::Write | Kind::Zero | Kind::Trim) => self.unflushed = true,
            Some(Kind::FlushMark) => self.unflushed = false,
            _ => {}
        }
        self.epoch = header.epoch;
    }

    /// [`Group::is_in_history`].
    pub(super) fn is_in_history(&self, position: Position) -> bool {
        let epochs = &self.view.epochs;
        let Some(index) = epochs.iter().position(|epoch| epoch.id == position.epoch) else {
            return position.lsn == Lsn::ZERO;
        };
        let end = epochs.get(index + 1).map_or(self.writer.head(), |next| next.first_lsn);
        let begin = if index == 0 { Lsn::ZERO } else { epochs[index].first_lsn };
        position.lsn > begin && position.lsn <= end
    }

    /// The log ends at an earlier end of a request now.
    pub(super) fn cut_to(&mut self, end: Checkpoint, writer: Writer, content: Content) {
        let unmeasured = self.content.table.unmeasured_from(end.lsn);
        self.writer = writer;
        self.content = content;
        self.timeline.cut(end);
        self.clock.cut(end.time, unmeasured);
        self.epoch = end.epoch;
        self.unflushed = true;
        self.awaited = Awaited::default();
        self.cuts += 1;
        self.needs_image = None;
        self.refresh_view();
    }

    pub(super) fn refresh_view(&mut self) {
        let volumes = self.content.volumes.values().map(|known| known.volume.clone()).collect();
        self.view = Arc::new(self.content.table.view(volumes));
        self.required.set_members(&self.view.members, self.clock.last());
    }

    /// What is committed: durable on the primary, as far as this node has it.
    pub(super) fn committed(&self) -> Lsn {
        match self.role {
            Role::Primary => self.durable,
            Role::Secondary => self.committed.min(self.writer.head()),
        }
    }
}

impl Group {
    /// A new group here, as primary: group and epoch records are durable on return.
    ///
    /// # Errors
    ///
    /// What the disk says; a segment size that is not allowed.
    pub fn create(
        context: GroupContext,
        dir: &Path,
        new: NewGroup,
    ) -> Result<Arc<Group>, GroupError> {
        let group = Group::make(context, dir, new)?;
        group.lock().role = Role::Primary;
        let record = Control::Group(GroupRecord {
            id: group.identity.id,
            name: group.identity.name.clone(),
            segment_bytes: group.identity.segment_bytes,
            format_level: 1,
            other: Map::new(),
        });
        let epoch = group.new_epoch("created", 1);
        group.append_first(&record, epoch.id)?;
        group.begin_epoch(epoch)?;
        group.make_names_durable()?;
        Ok(group)
    }

    /// An empty copy that a peer will fill from LSN 0; its data state is `none` until then.
    ///
    /// # Errors
    ///
    /// What the disk says; a segment size that is not allowed.
    pub fn create_copy(
        context: GroupContext,
        dir: &Path,
        new: NewGroup,
    ) -> Result<Arc<Group>, GroupError> {
        let group = Group::make(context, dir, new)?;
        group.make_names_durable()?;
        Ok(group)
    }

    fn make(context: GroupContext, dir: &Path, new: NewGroup) -> Result<Arc<Group>, GroupError> {
        let name = new.name.clone();
        if !is_segment_size(new.segment_bytes) {
            let what = format!(
                "segment size: got {} bytes, expected a power of two from 64 KiB to 1 GiB",
                new.segment_bytes
            );
            return Err(GroupError::Refused { group: name, what });
        }
        let io = |cause| GroupError::io(&name, format!("create {}", dir.display()), &cause);
        let disk = context.env.disk.clone();
        disk.create_dir(dir).map_err(io)?;
        let meta = Meta {
            group: new.id,
            name: new.name.clone(),
            segment_bytes: new.segment_bytes,
            fold_target: Lsn::ZERO,
            horizon: Lsn::ZERO,
            durable: Lsn::ZERO,
            incarnation: Incarnation(context.env.entropy.next_u64()),
            clean: false,
            reigns: false,
            reign: EpochId(0),
            retired: false,
            failed: false,
            reign_due: false,
            split_from: None,
            yielding: false,
            merging: false,
            old_log: false,
            boot: context.env.clock.boot(),
            log_begin: Lsn::ZERO,
            births_from: Lsn::ZERO,
        };
        // Durable before anything else: a start knows by it what was not made to the end.
        let meta = MetaFile::create(&*disk, &dir.join(UNFINISHED_META), meta).map_err(io)?;
        disk.sync_dir(dir).map_err(io)?;
        disk.create_dir(&dir.join("base")).map_err(io)?;
        let segments = Arc::new(
            Segments::open(disk.clone(), &dir.join("log"), new.segment_bytes).map_err(io)?,
        );
        segments.ensure(0).map_err(io)?;
        let horizon = beginning(new.id);
        let writer = Writer::open(segments.clone(), Lsn::ZERO, genesis(new.id), 0).map_err(io)?;
        let content = Content::at_horizon(&horizon);
        let timeline = Timeline::new(checkpoint(&horizon), new.segment_bytes);
        let group =
            Group::assemble(context, dir, meta, segments, writer, content, timeline, horizon);
        group.lock().images_known = true;
        Ok(group)
    }

    #[expect(clippy::too_many_arguments, reason = "all parts, once")]
    pub(super) fn assemble(
        context: GroupContext,
        dir: &Path,
        meta: MetaFile,
        segments: Arc<Segments>,
        writer: Writer,
        content: Content,
        timeline: Timeline,
        horizon: ControlState,
    ) -> Arc<Group> {
        let head = writer.head();
        let identity = NewGroup {
            id: meta.meta.group,
            name: meta.meta.name.clone(),
            segment_bytes: meta.meta.segment_bytes,
        };
        let end = timeline.end();
        let log_begin = AtomicU64::new(meta.meta.log_begin.0);
        let clock = &*context.env.clock;
        let reigns = content.table.view(Vec::new()).epochs;
        let up_to = clock::measured(&*context.env.disk, dir, clock, context.node.id, &reigns);
        let clock = LogClock::after_restart(end.time, up_to, clock.monotonic());
        let mut core = Core {
            writer,
            content,
            view: Arc::default(),
            clock,
            epoch: end.epoch,
            timeline,
            durable: head,
            committed: Lsn::ZERO,
            unflushed: true,
            horizon: Arc::new(horizon),
            fold_target: meta.meta.fold_target,
            role: Role::Secondary,
            asking: None,
            halted: None,
            cuts: 0,
            failed: None,
            durable_before: None,
            retired: meta.meta.retired.then(|| context.env.clock.wall()),
            closed: false,
            images: BTreeMap::new(),
            images_known: false,
            moments: BTreeMap::new(),
            pending: Pending::default(),
            required: Required::new(context.node.id),
            needs: Needs::default(),
            told_kept_for: None,
            receiving: None,
            needs_image: None,
            log_used_bytes: segments.allocated_bytes(),
            unreported: Vec::new(),
            unfinished_fold: None,
            may_be_torn: false,
            awaited: Awaited::default(),
            room: Room::default(),
        };
        core.refresh_view();
        let floors = core.required.floors();
        Arc::new_cyclic(|me| Group {
            me: me.clone(),
            dir: dir.to_owned(),
            identity,
            incarnation: meta.meta.incarnation,
            cuts: AtomicU64::new(0),
            segments,
            core: Mutex::new(core),
            meta: Mutex::new(meta),
            bases: RwLock::default(),
            base_gate: RwLock::default(),
            merging: RwLock::default(),
            staging: Mutex::default(),
            started: context.env.clock.monotonic(),
            shipments: Mutex::default(),
            log_begin,
            turn: Mutex::default(),
            fold_lock: Mutex::default(),
            images_file: Mutex::default(),
            sync_lock: Mutex::default(),
            durable: AtomicU64::new(head.0),
            waiters: Mutex::default(),
            floors,
            waiters_changed: Condvar::new(),
            space: Condvar::new(),
            workers: Workers::default(),
            listeners: RwLock::default(),
            clients: Clients::default(),
            listed: Listed::default(),
            suspects: Mutex::default(),
            context,
        })
    }

    /// All that the group consists of is durable, and only then it is a group.
    fn make_names_durable(&self) -> Result<(), GroupError> {
        let disk = &self.context.env.disk;
        let sync = |dir: &Path| {
            disk.sync_dir(dir).map_err(|cause| self.io(format!("sync {}", dir.display()), &cause))
        };
        for dir in ["log", "base"] {
            sync(&self.dir.join(dir))?;
        }
        sync(&self.dir)?;
        disk.rename(&self.dir.join(UNFINISHED_META), &self.dir.join(META))
            .map_err(|cause| self.io("name meta", &cause))?;
        sync(&self.dir)?;
        sync(self.dir.parent().unwrap_or(&self.dir))
    }

    /// The group's identity.
    #[must_use]
    pub fn id(&self) -> GroupId {
        self.identity.id
    }

    /// The group's name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.identity.name
    }

    /// Bytes of a segment.
    #[must_use]
    pub fn segment_bytes(&self) -> u64 {
        self.identity.segment_bytes
    }

    /// Who this node is.
    #[must_use]
    pub fn node(&self) -> &NodeIdentity {
        &self.context.node
    }

    /// A number that is new at each start.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// How often the log was cut back since the start.
    #[must_use]
    pub fn cuts(&self) -> u64 {
        self.cuts.load(Ordering::Acquire)
    }

    /// Whose turn it is to write.
    #[must_use]
    pub fn role(&self) -> Role {
        self.lock().role
    }

    /// What the data is worth, why where it is not good, and since when (1970 where it is).
    #[must_use]
    pub fn data_state(&self) -> (DataState, Option<String>, LogTime) {
        let core = self.lock();
        if let Some((reason, since)) = &core.failed {
            (DataState::Failed, Some(reason.clone()), *since)
        } else if let Some(progress) = core.receiving
            && (core.writer.head() == Lsn::ZERO || core.content.base_ahead.is_some())
        {
            let (done, total) = (ByteSize(progress.done_bytes), ByteSize(progress.total_bytes));
            let reason = format!("the first image is coming: {done} of {total}");
            (DataState::ReceivingImage, Some(reason), LogTime(0))
        } else if let Some(target) = core.content.base_ahead {
            (DataState::None, Some(self.base_is_ahead(target).to_string()), LogTime(0))
        } else if core.writer.head() == Lsn::ZERO {
            (DataState::None, Some("no image has arrived yet".to_owned()), LogTime(0))
        } else if let Some(since) = core.retired {
            (DataState::Retired, Some("replication was stopped here".to_owned()), since)
        } else {
            (DataState::Consistent, None, LogTime(0))
        }
    }

    /// Marks the copy as one that no longer follows its primary, or takes that back; durable on
    /// return, and told once. A primary is no copy: it stays what it is.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn set_retired(&self, retired: bool) -> Result<(), GroupError> {
        {
            let core = self.lock();
            if core.retired.is_some() == retired || core.role == Role::Primary {
                return Ok(());
            }
        }
        // A promote may come between.
        let mut written = false;
        self.update_meta(|meta| {
            written = retired && !meta.reigns;
            meta.retired = written;
        })?;
        let mut core = self.lock();
        let retired = written && core.role != Role::Primary;
        let (before, head) = (core.retired, core.writer.head());
        core.retired = retired.then(|| before.unwrap_or_else(|| self.context.env.clock.wall()));
        drop(core);
        // Else whoever asks for it would hear, and ask again.
        if retired == before.is_some() {
            return Ok(());
        }
        if retired {
            let text = format!(
                "replication to this node was stopped: the copy stays readable, as of LSN {head}, \
                 and is not backed up any more"
            );
            self.emit(Severity::Warning, "copy-retired", text, serde_json::Value::Null);
        }
        self.notify();
        Ok(())
    }

    /// How far an image is that comes from the primary.
    #[must_use]
    pub fn receiving(&self) -> Option<ImageProgress> {
        self.lock().receiving
    }

    /// All positions, of one moment.
    #[must_use]
    pub fn positions(&self) -> Positions {
        let core = self.lock();
        let horizon = core.timeline.horizon();
        Positions {
            head: core.writer.head(),
            request_end: core.timeline.end().lsn,
            durable: core.durable,
            committed: core.committed(),
            horizon: horizon.lsn,
            chain: core.writer.chain(),
            epoch: core.epoch,
            time: core.clock.last(),
            horizon_time: horizon.time,
            requests: core.writer.requests(),
            cuts: core.cuts,
            log_used_bytes: core.log_used_bytes,
            log_limit_bytes: self.log_limit(&core),
        }
    }

    /// The control records at the head; cheap, shared.
    #[must_use]
    pub fn control(&self) -> Arc<ControlView> {
        self.lock().view.clone()
    }

    /// The lower of the group's window and the node's.
    pub(super) fn window(&self, core: &Core) -> Duration {
        let own = self.context.limits.window.unwrap_or(Duration::MAX);
        core.view.policy.window.0.min(own)
    }

    /// Has `listener` called after head, durable, committed, role, control or state changed, and
    /// after the last client went, until it answers `false`. It is never called under the group's
    /// mutex, and must not block.
    pub fn subscribe(&self, listener: Box<dyn Fn() -> bool + Send + Sync>) {
        self.listeners.write().expect("no holder panics").push(Arc::from(listener));
    }

    /// Calls the listeners.
    pub(super) fn notify(&self) {
        let listeners = self.listeners.read().expect("no holder panics");
        let ended: Vec<Listener> =
            listeners.iter().filter(|listener| !listener()).cloned().collect();
        drop(listeners);
        if !ended.is_empty() {
            self.listeners
                .write()
                .expect("no holder panics")
                .retain(|known| !ended.iter().any(|ended| Arc::ptr_eq(known, ended)));
        }
    }

    /// The chain at a record's start or at the head, where the log still has it.
    #[must_use]
    pub fn chain_at(&self, lsn: Lsn) -> Option<Chain> {
        {
            let core = self.lock();
            let horizon = core.timeline.horizon();
            match lsn {
                _ if lsn == core.writer.head() => return Some(core.writer.chain()),
                _ if lsn == horizon.lsn => return Some(horizon.chain),
                _ if lsn > core.writer.head() => return None,
                _ => {}
            }
        }
        let room = self.segment_bytes() - lsn.segment_offset(self.segment_bytes());
        let wanted = (crate::log::record::HEADER_AND_CRCS_BYTES_MAX as u64).min(room);
        let mut bytes = vec![0; wanted as usize];
        self.segments.read(lsn, &mut bytes).ok()?;
        let header = Header::decode(&bytes).ok()?;
        (header.lsn == lsn).then_some(header.chain)
    }

    /// Whether a position lies in this group's present history: its epoch is one of ours, and had
    /// not ended before it.
    #[must_use]
    pub fn is_in_history(&self, position: Position) -> bool {
        self.lock().is_in_history(position)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().expect("a panic under the lock ends the process")
    }

    /// Changes `meta`, durably. On a full disk it is what it was. After any other error the next
    /// start may find it changed or not, and the group fails, so that nothing is done meanwhile
    /// that does not fit both. For who does not hold the mutex.
    pub(super) fn update_meta(&self, change: impl FnOnce(&mut Meta)) -> Result<(), GroupError> {
        let updated = self.write_meta(change);
        let failed = updated.map_err(|cause| self.meta_failed(&mut self.lock(), &cause));
        failed.inspect_err(|_| self.report())
    }

    /// The same for who holds the mutex, and calls [`Group::report`] after it.
    pub(super) fn update_meta_locked(
        &self,
        core: &mut Core,
        change: impl FnOnce(&mut Meta),
    ) -> Result<(), GroupError> {
        self.write_meta(change).map_err(|cause| self.meta_failed(core, &cause))
    }

    fn meta_failed(&self, core: &mut Core, cause: &std::io::Error) -> GroupError {
        if is_full(cause) {
            self.io("write meta", cause)
        } else {
            self.fail_locked(core, "write meta", cause)
        }
    }

    /// The same for who fails the group whatever the error is.
    pub(super) fn write_meta(&self, change: impl FnOnce(&mut Meta)) -> std::io::Result<()> {
        self.meta.lock().expect("no holder panics").update(change)
    }

    /// Latches a failure of the disk: no write is taken any more until the node starts again.
    pub(super) fn fail(&self, what: &str, cause: &std::io::Error) -> GroupError {
        let error = self.fail_locked(&mut self.lock(), what, cause);
        self.report();
        error
    }

    /// The same for who holds the mutex, and calls [`Group::report`] after it.
    pub(super) fn fail_locked(
        &self,
        core: &mut Core,
        what: &str,
        cause: &std::io::Error,
    ) -> GroupError {
        let reason = format!("{}: {cause}", placed(what, &self.dir, cause));
        if core.failed.is_none() {
            let effect = match core.role {
                Role::Primary => "hosts' writes get errors, reads go on",
                Role::Secondary => "this copy takes no more of the log; what it has can be read",
            };
            core.failed = Some((reason.clone(), self.context.env.clock.wall()));
            core.unreported.push(Report {
                severity: Severity::Error,
                code: "data-failed",
                text: format!("{reason}: {effect}; restart this node once that disk is well"),
                details: json!({ "path": self.dir }),
            });
        }
        GroupError::Failed { group: self.name().clone(), reason }
    }

    /// Tells what happened under the mutex, outside of it.
    pub(super) fn report(&self) {
        let (reports, failed) = {
            let mut core = self.lock();
            (std::mem::take(&mut core.unreported), core.failed.is_some())
        };
        if reports.is_empty() {
            return;
        }
        if failed {
            self.space.notify_all();
            self.fail_waiters();
            let why = reports.iter().map(|report| report.text.as_str()).collect::<Vec<_>>();
            self.context.latch_failure(self.id(), &why.join("\n"));
            // Best effort: the disk has just failed.
            if let Err(error) = self.write_meta(|meta| meta.failed = true) {
                tracing::warn!("the failure could not be latched on disk: {error}");
            }
        }
        for report in reports {
            self.emit(report.severity, report.code, report.text, report.details);
        }
        self.notify();
    }

    pub(super) fn failed_error(&self, core: &Core) -> Result<(), GroupError> {
        match &core.failed {
            Some((reason, _)) => {
                Err(GroupError::Failed { group: self.name().clone(), reason: reason.clone() })
            }
            None => Ok(()),
        }
    }

    pub(super) fn emit(
        &self,
        severity: Severity,
        code: &str,
        text: String,
        details: serde_json::Value,
    ) {
        let text = format!("group {}: {text}", self.name());
        self.context.events.emit(severity, code, Some(self.name().as_str()), text, details);
    }

    pub(super) fn io(&self, what: impl Into<String>, cause: &std::io::Error) -> GroupError {
        GroupError::io(self.name(), placed(&what.into(), &self.dir, cause), cause)
    }

    pub(super) fn refused(&self, what: impl Into<String>) -> GroupError {
        GroupError::Refused { group: self.name().clone(), what: what.into() }
    }

    /// A record of a reign of this node, without its position.
    pub(super) fn new_epoch(&self, reason: &str, counter: u64) -> EpochRecord {
        EpochRecord {
            counter,
            id: EpochId(self.context.env.entropy.next_u64()),
            author: self.context.node.id,
            author_name: self.context.node.name.clone(),
            first_lsn: Lsn::ZERO,
            reason: reason.to_owned(),
            other: Map::new(),
        }
    }

    pub(super) fn set_durable(&self, core: &mut Core, durable: Lsn) {
        core.durable = durable;
        self.durable.store(durable.0, Ordering::Release);
    }
}

/// What was done with the disk, and where, unless the cause says it: who reads it looks for a disk.
pub(super) fn placed(what: &str, dir: &Path, cause: &std::io::Error) -> String {
    let dir = dir.display().to_string();
    if cause.to_string().contains(&dir) { what.to_owned() } else { format!("{what} in {dir}") }
}

impl GroupError {
    pub(super) fn io(group: &Name, what: impl Into<String>, cause: &std::io::Error) -> GroupError {
        if is_full(cause) {
            let reason = format!("{}: {cause}", what.into());
            return GroupError::NoSpace { group: group.clone(), reason };
        }
        GroupError::Io { group: group.clone(), what: what.into(), cause: cause.to_string() }
    }
}

/// The control state before the first record.
pub(super) fn beginning(group: GroupId) -> ControlState {
    ControlState {
        position: Position::default(),
        chain: genesis(group),
        requests: 0,
        entries: Vec::new(),
        bases: BTreeMap::new(),
    }
}

/// The checkpoint of a horizon.
pub(super) fn checkpoint(state: &ControlState) -> Checkpoint {
    Checkpoint {
        lsn: state.position.lsn,
        time: state.position.time,
        chain: state.chain,
        epoch: state.position.epoch,
        requests: state.requests,
    }
}

/// The kinds of control records that a caller may append: not those that the engine writes itself.
pub(super) fn is_callers(kind: ControlKind) -> bool {
    use ControlKind::*;
    !matches!(kind, Group | Epoch | Clock | Rewind)
}

/// Looks up a volume by name.
pub(super) fn volume_named(core: &Core, name: &Name) -> Option<Volume> {
    core.view.volumes.iter().find(|volume| volume.name == *name).cloned()
}
