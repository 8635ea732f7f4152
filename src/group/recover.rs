//! Opening a group again: control state, log from the horizon on, and what the end of it means.
//!
//! Up to the durable mark the chain of headers is followed, and payloads are checked when they are
//! read. Above it every payload is checked too, and what is kept is written to fresh files and
//! synced before it is trusted: after a failed sync the page cache shows what the disk does not
//! have.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use super::branch::{Branch, Keeping, finish_branches, remove_discarded, settle};
use super::content::Content;
use super::engine::{Group, checkpoint, placed};
use super::holds::{load_moments, remove_bases, volumes_of};
use super::indexing::indexed;
use super::lost::{LostBase, bring_back_bases, load_horizon, tell_lost};
use super::merging::{RECEIVED, finish_at_start};
use super::meta::{META, MetaFile};
use super::recovery_decision::{RecoveryDecision, RecoveryFacts, decide};
use super::returning::{ASK_FOR, Asking, YIELDED, authored_behind};
use super::scrub::DamagedPart;
use super::switch::remove_merged;
use super::timeline::{Checkpoint, Timeline};
use super::{GroupContext, GroupError, Role};
use crate::base::{BaseVolume, ControlState, ControlStateError};
use crate::events::Severity;
use crate::extent_map::Freed;
use crate::io::Disk;
use crate::log::index::Indexed;
use crate::log::reader::{Remains, ScanEnd, Scanner, remains};
use crate::log::record::{Header, Kind};
use crate::log::segment::Segments;
use crate::log::writer::Writer;
use crate::units::{EpochId, Incarnation, LogTime, Lsn, Name, NodeId, Position, VolumeNumber};

/// What recovery found.
#[derive(Clone, Debug, Default)]
pub struct Recovery {
    /// An unclean boot: answered but unflushed writes may be missing in this span.
    pub cut: Option<(Lsn, Lsn)>,
    /// Log time of that span, to the start of the node.
    pub cut_time: Option<(LogTime, LogTime)>,
    /// Bytes of log that were followed.
    pub scanned_bytes: u64,
    /// Records with a payload that is damaged, although it was durable.
    pub damaged: Vec<Lsn>,
    /// It was found of a copy that had not begun a reign: which has again what it lost once it
    /// follows beyond.
    pub as_copy: bool,
}

/// The log as a scan found it.
struct Found {
    content: Content,
    timeline: Timeline,
    /// Behind the last whole record.
    chain_end: Lsn,
    /// The highest `durable` that a record tells.
    durable: Lsn,
    damaged: Vec<Lsn>,
    remains: Remains,
    /// What the disk said where it ended, or of what is behind: only where all that is missing was
    /// durable, and so is damage, does it go on without that.
    unread: Option<io::Error>,
}

impl Group {
    /// Opens and recovers.
    ///
    /// # Errors
    ///
    /// Where neither slot of `meta` is whole, or what the disk says.
    pub fn open(context: GroupContext, dir: &Path) -> Result<(Arc<Group>, Recovery), GroupError> {
        let disk = context.env.disk.clone();
        let unnamed: Name = "unknown".parse().expect("a name");
        let io = |what: &str, cause: &io::Error| {
            GroupError::io(&unnamed, placed(what, dir, cause), cause)
        };
        let meta = MetaFile::open(&*disk, &dir.join(META))
            .map_err(|cause| io("read meta", &cause))?
            .ok_or_else(|| GroupError::Damaged {
                group: unnamed.clone(),
                what: format!("{}: neither slot is whole", dir.join(META).display()),
            })?;
        let before = meta.meta.clone();
        let name = before.name.clone();
        let io =
            |what: &str, cause: &io::Error| GroupError::io(&name, placed(what, dir, cause), cause);
        let mut meta = meta;
        meta.settle().map_err(|cause| io("write meta", &cause))?;
        // Before anything else, since it may be what makes room.
        remove_discarded(&*disk, dir);
        let (mut lost_bases, mut rotted) = (Vec::new(), None);
        let tell = |base: &LostBase| tell_lost(&context, &name, base);
        if before.old_log || before.merging {
            let (lost, found) = finish_at_start(&disk, dir, &before, &tell)?;
            (lost_bases, rotted) = (lost, Some(found));
            meta.update(|meta| (meta.old_log, meta.merging) = (false, false))
                .map_err(|cause| io("write meta", &cause))?;
            remove_merged(&*disk, dir);
        }
        let segments = Segments::open(disk.clone(), &dir.join("log"), before.segment_bytes)
            .map_err(|cause| io("open log", &cause))?;
        let segments = Arc::new(segments);
        let base_dir = dir.join("base");
        let horizon = load_horizon(&*disk, &base_dir, &before).map_err(|cause| match cause {
            ControlStateError::Io(cause) => io("read base", &cause),
            ControlStateError::Damaged(what) => GroupError::Damaged { group: name.clone(), what },
        })?;
        let ended = before.fold_target <= horizon.position.lsn;
        let base_at = before.fold_target.max(horizon.position.lsn);
        let moments =
            load_moments(&*disk, dir, base_at).map_err(|cause| io("read moments", &cause))?;
        let in_moments = volumes_of(&moments);
        let lost = bring_back_bases(&*disk, &base_dir, &horizon, &in_moments, ended, &tell);
        lost_bases.extend(lost.map_err(|cause| io("make what is lost of the base", &cause))?);
        // Folded segments of which a crash took the new names of some, so that gaps are between
        // them.
        segments.retire_below(horizon.position.lsn.segment_number(before.segment_bytes));
        // Records tell what was durable at their author. That is here only where they are our own.
        let own = |content: &Content| {
            last_reign(content).is_some_and(|(author, id)| {
                author == context.node.id && (before.reigns || id == before.reign)
            })
        };
        let scan_to = |end| {
            let scan = |remember: &BTreeSet<Lsn>| {
                scan(&segments, &horizon, before.durable, end, remember, context.node.id, own)
            };
            let mut found = scan(&BTreeSet::new());
            // A record goes back: what it goes back to is remembered on the way next time.
            if let Ok(first) = &found
                && !first.content.missing().is_empty()
            {
                found = scan(&first.content.missing().clone());
            }
            found.map_err(|cause| io("read log", &cause))
        };
        let mut found = scan_to(if before.yielding { before.durable } else { Lsn::MAX })?;
        // Where what was durable is missing, the record of its reign may be among it.
        let primary = own(&found.content) || before.reigns && found.chain_end < before.durable;
        let proven = |durable: Lsn| if primary { durable } else { Lsn::ZERO };
        let decision = decide(&RecoveryFacts {
            chain_end: found.chain_end,
            request_end: found.timeline.end().lsn,
            mark: before.durable.max(proven(found.durable)),
            remains: Remains { durable: proven(found.remains.durable), ..found.remains },
            clean: before.clean,
        });
        let mut unread = found.unread.take();
        // Behind the end of a log that was closed in order nothing was.
        if matches!(decision, RecoveryDecision::Cut { .. })
            && let Some(cause) = unread.take()
        {
            // Nothing says that it was durable, and nobody can say what stands there.
            return Err(io("read log", &cause));
        }
        let (at, damage) = match decision {
            RecoveryDecision::Keep => (found.chain_end, None),
            RecoveryDecision::Cut { at, .. } => (at, None),
            RecoveryDecision::Damage { at, damaged_at, durable } => {
                (at, Some((damaged_at, durable)))
            }
        };
        // A primary with damage stays as it is until somebody has looked: it serves no writes. A
        // secondary takes the rest from its primary again.
        let stopped = damage.is_some() && primary;
        let unclean = decision != RecoveryDecision::Keep;
        let end = found.timeline.end();
        let boot = context.env.clock.boot();
        // What was answered is still there where the machine has gone on running.
        let failed = before.failed || context.has_failed(before.group);
        let same_boot = boot.is_some() && boot == before.boot && !failed;
        let lost = match decision {
            RecoveryDecision::Keep => false,
            RecoveryDecision::Cut { whole_records_behind, .. } => {
                !before.yielding && (whole_records_behind || !same_boot)
            }
            RecoveryDecision::Damage { .. } => true,
        };
        let mut kept = Vec::new();
        // Segments of which something cannot be read.
        let mut lacking = BTreeSet::new();
        if unclean && !stopped {
            let last_seen = found.remains.last_end.unwrap_or(found.chain_end);
            let (authored, reason) = if before.yielding {
                let whole = scan_to(Lsn::MAX)?;
                if let Some(cause) = whole.unread {
                    return Err(io("read log", &cause));
                }
                let epochs = whole.content.table.view(Vec::new()).epochs;
                (authored_behind(&epochs, context.node.id, at, whole.chain_end), YIELDED)
            } else {
                (primary, "an unclean stop tore the log before it")
            };
            let branch = Branch {
                name: String::new(),
                from: end.position(),
                to: Position { lsn: last_seen, ..end.position() },
                bytes: last_seen.bytes_since(at),
                authored,
                cut: context.env.clock.wall(),
                reason: reason.to_owned(),
            };
            let trusted = before.durable.min(at);
            let is_damaged = damage.is_some() || !found.damaged.is_empty();
            let zeros_below = if is_damaged { Lsn::MAX } else { trusted };
            let mut keeping = Keeping::new(dir, branch).around(zeros_below);
            settle(&segments, trusted, at, found.chain_end, &mut keeping)
                .map_err(|cause| io("settle the end of the log", &cause))?;
            lacking.clone_from(keeping.unread());
            kept.extend(keeping.kept());
        }
        let left = finish_branches(&*disk, dir);
        kept.extend(left.map_err(|cause| io("name what was cut off", &cause))?);
        segments
            .ensure(at.segment_number(before.segment_bytes))
            .map_err(|cause| io("open segment", &cause))?;
        let writer = Writer::open(segments.clone(), at, end.chain, end.requests).or_else(|_| {
            lacking.insert(at.segment_number(before.segment_bytes));
            Writer::open_around(segments.clone(), at, end.chain, end.requests)
        });
        let writer = writer.map_err(|cause| io("read the end of the log", &cause))?;
        let incarnation = Incarnation(context.env.entropy.next_u64());
        meta.update(|meta| {
            meta.incarnation = incarnation;
            meta.clean = false;
            meta.boot = boot;
            if !stopped {
                meta.durable = at;
                meta.yielding = false;
                meta.failed = false;
                meta.reigns = primary;
                if !primary {
                    meta.reign = EpochId(0);
                }
                // Its reign's record was durable; that it was promoted was not noted here.
                meta.retired &= !primary;
                meta.reign_due |= primary && lost;
            }
        })
        .map_err(|cause| io("write meta", &cause))?;
        if !stopped {
            context.forget_failure(before.group);
        }
        let bases = open_bases(&disk, &base_dir, &horizon, &found.content, &in_moments)
            .map_err(|cause| io("open base", &cause))?;
        let mut content = std::mem::take(&mut found.content);
        content.forget_remembered();
        content.base_ahead = Some(before.fold_target).filter(|target| *target > end.lsn);
        let scanned_bytes = found.chain_end.bytes_since(horizon.position.lsn);
        let timeline = found.timeline.clone();
        let group =
            Group::assemble(context, dir, meta, segments, writer, content, timeline, horizon);
        *group.bases.write().expect("no holder panics") = bases;
        {
            let mut core = group.lock();
            core.committed = found.durable;
            core.moments = moments;
            core.role = if primary { Role::Primary } else { Role::Secondary };
        }
        let mut recovery = Recovery {
            scanned_bytes,
            damaged: found.damaged.clone(),
            as_copy: !primary && before.reign == EpochId(0),
            ..Recovery::default()
        };
        for segment in lacking {
            group.suspect(DamagedPart::Log { segment });
            let text = format!(
                "a part of segment {segment} of the log was durable, and the disk cannot read it"
            );
            group.emit(Severity::Error, "log-damaged", text, json!({ "segment": segment }));
        }
        group.suspect_lost(&lost_bases);
        if let Some(rotted) = rotted {
            group.tell_rotted(&rotted, RECEIVED);
        }
        group.report_recovery(&found, decision, failed, lost, &mut recovery);
        for branch in &kept {
            group.tell_of_branch(branch);
        }
        if stopped {
            let (damaged_at, durable) = damage.expect("that is why");
            let cause = io::Error::other(format!(
                "damaged at {damaged_at}, segment {}, although it was durable up to {durable}{}",
                damaged_at.segment_number(group.segment_bytes()),
                unread.map(|cause| format!(": {cause}")).unwrap_or_default()
            ));
            group.fail("log", &cause);
            group.lock().durable_before = Some(durable);
            group.suspect(DamagedPart::Log {
                segment: damaged_at.segment_number(group.segment_bytes()),
            });
            return Ok((group, recovery));
        }
        group.take_up_fold(before.fold_target);
        if primary {
            let until = group.context.env.clock.monotonic() + ASK_FOR;
            let me = group.context.node.id;
            let control = group.control();
            let nodes = control.members.iter().map(|member| member.node);
            let unanswered: BTreeSet<_> = nodes.filter(|node| *node != me).collect();
            // One that is no member any more can neither be asked nor resolved with.
            let split = before.split_from.is_some_and(|peer| unanswered.contains(&peer));
            let alone = unanswered.is_empty();
            group.lock().asking = Some(Asking { until, unanswered, held_back: None });
            if (alone || split)
                && let Err(error) = group.serve()
            {
                group.emit(Severity::Error, "recovery-failed", error.to_string(), json!(null));
            }
        }
        group.take_up_staging();
        group.reopen_images();
        group.settle_holds();
        Ok((group, recovery))
    }

    fn report_recovery(
        &self,
        found: &Found,
        decision: RecoveryDecision,
        failed: bool,
        lost: bool,
        recovery: &mut Recovery,
    ) {
        for lsn in &found.damaged {
            self.suspect(DamagedPart::Log { segment: lsn.segment_number(self.segment_bytes()) });
            self.emit(
                Severity::Error,
                "log-damaged",
                format!("the record at {lsn} was durable, and its payload is damaged"),
                json!({ "lsn": lsn, "segment": lsn.segment_number(self.segment_bytes()) }),
            );
        }
        if failed {
            let text = "had failed; everything that could be read is on disk again".to_owned();
            self.emit(Severity::Warning, "data-recovered", text, json!(null));
        }
        let end = found.timeline.end();
        let (code, severity) = match decision {
            RecoveryDecision::Keep => return,
            RecoveryDecision::Cut { .. } => ("unclean-start", Severity::Warning),
            RecoveryDecision::Damage { .. } => ("log-damaged", Severity::Error),
        };
        if !lost {
            let what = if recovery.as_copy { "this copy had acknowledged" } else { "was answered" };
            let text = format!("was not closed in order; nothing that {what} is missing");
            self.emit(Severity::Info, code, text, json!({ "durable_lsn": found.durable }));
            return;
        }
        let last_seen = found.remains.last_end.unwrap_or(found.chain_end).max(found.chain_end);
        let now = self.context.env.clock.wall();
        recovery.cut = Some((end.lsn, last_seen));
        recovery.cut_time = Some((end.time, now));
        let (at, from) = (end.lsn, end.time);
        let text = if self.role() == Role::Secondary && !recovery.as_copy {
            format!(
                "was not closed in order while it was promoted: what was answered and not flushed \
                 behind LSN {at} and between {from} and {now} is lost, and so is the reign: this \
                 node is a copy again. `tidelog promote {}` here, if no other node reigns",
                self.name()
            )
        } else if recovery.as_copy {
            format!(
                "was not closed in order: what this copy had received behind LSN {at} and between \
                 {from} and {now} may be missing; it takes that from its primary again, so promote \
                 it only once it streams, or where the primary is lost"
            )
        } else {
            format!(
                "was not closed in order: writes that were answered but not flushed may be missing \
                 behind LSN {at} and between {from} and {now}"
            )
        };
        self.emit(
            severity,
            code,
            text,
            json!({
                "from_lsn": end.lsn,
                "to_lsn": last_seen,
                "from": end.time,
                "to": now,
                "durable_lsn": found.durable,
            }),
        );
    }
}

/// The author of the last reign.
fn last_reign(content: &Content) -> Option<(NodeId, EpochId)> {
    content.table.view(Vec::new()).epochs.last().map(|epoch| (epoch.author, epoch.id))
}

/// Follows the log from the horizon on, to `end` at most. Requests are applied when they are whole.
fn scan(
    segments: &Segments,
    horizon: &ControlState,
    mark: Lsn,
    end: Lsn,
    remember: &BTreeSet<Lsn>,
    me: NodeId,
    own: impl Fn(&Content) -> bool,
) -> io::Result<Found> {
    let start = checkpoint(horizon);
    let mut content = Content::at_horizon(horizon);
    content.remember_at(remember.iter().copied());
    let mut found = Found {
        content,
        timeline: Timeline::new(start, segments.segment_bytes()),
        chain_end: start.lsn,
        durable: Lsn::ZERO,
        damaged: Vec::new(),
        remains: Remains::default(),
        unread: None,
    };
    let segment_bytes = segments.segment_bytes();
    let mut request: Vec<(Header, Vec<u8>)> = Vec::new();
    let mut scanner = Scanner::new(segments, start.lsn, start.chain);
    loop {
        let at = scanner.at();
        if at >= end {
            (found.remains, found.unread) = found.behind(segments, at, me)?;
            break;
        }
        if at.segment_offset(segment_bytes) == 0
            && at.advance(segment_bytes) <= mark
            && let Some((records, chain)) = indexed(segments, at, scanner.chain())
        {
            for Indexed { header, payload } in records {
                found.take(header, payload, &mut request);
            }
            scanner.go_to(at.advance(segment_bytes), chain);
            continue;
        }
        let header = match scanner.next(at >= mark) {
            Ok(header) => header,
            Err(end) => {
                // A header may be whole where its payload is not, or cannot be read.
                let (header, cause) = match end {
                    ScanEnd::Payload(header) => (Some(*header), None),
                    ScanEnd::Io(cause) => (scanner.unread().cloned(), Some(cause)),
                    _ => (None, None),
                };
                let behind = header.as_ref().map_or(at.advance(8), Header::end);
                let (behind, unread) = found.behind(segments, behind, me)?;
                let proven = if own(&found.content) { behind.durable } else { Lsn::ZERO };
                match header {
                    // It was durable: the chain goes on, and who reads these blocks is told.
                    Some(header)
                        if header.kind != Kind::Control as u8
                            && mark.max(proven) >= header.end() =>
                    {
                        found.damaged.push(header.lsn);
                        scanner.step_over(&header);
                        header
                    }
                    // Torn, or a control record that nothing can be shown without.
                    _ => {
                        (found.remains, found.unread) = (behind, cause.or(unread));
                        break;
                    }
                }
            }
        };
        let control = header.kind == Kind::Control as u8;
        let payload = if control { scanner.payload().to_vec() } else { Vec::new() };
        found.take(header, payload, &mut request);
    }
    Ok(found)
}

impl Found {
    /// What stands at its own position from here on, in any segment. What was received and did not
    /// fit on a full disk can still stand there, behind a reign that began here since: what that
    /// calls durable is so where it was written.
    /// Beside it what the disk said of what could not be read there.
    fn behind(
        &self,
        segments: &Segments,
        from: Lsn,
        me: NodeId,
    ) -> io::Result<(Remains, Option<io::Error>)> {
        let reigns = self.content.table.view(Vec::new()).epochs;
        let theirs = reigns.iter().filter(|reign| reign.author != me).map(|reign| reign.id);
        let theirs: BTreeSet<EpochId> = theirs.collect();
        let first = from.segment_number(segments.segment_bytes());
        let (mut all, mut unread) = (Remains::default(), None);
        for number in segments.numbers().into_iter().filter(|number| *number >= first) {
            let (found, failed) = remains(segments, number, from, |reign| theirs.contains(&reign))?;
            unread = unread.or(failed);
            all.last_end = all.last_end.max(found.last_end);
            all.durable = all.durable.max(found.durable);
        }
        Ok((all, unread))
    }

    /// Takes the next record; what it does is done when its request is whole.
    fn take(&mut self, header: Header, payload: Vec<u8>, request: &mut Vec<(Header, Vec<u8>)>) {
        self.chain_end = header.end();
        self.durable = self.durable.max(header.durable);
        let last = header.is_last_of_request();
        request.push((header, payload));
        if last {
            let mut freed: Vec<Freed> = Vec::new();
            for (header, payload) in request.drain(..) {
                self.content.apply(&header, &payload, &mut freed);
                if header.is_last_of_request() {
                    self.timeline.push(Checkpoint::behind(&header));
                }
            }
        }
    }
}

/// Opens what is in the base, and removes what a fold could no longer remove: the files of volumes
/// that were gone at the horizon. What moments need stays, and is opened too.
fn open_bases(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    horizon: &ControlState,
    content: &Content,
    in_moments: &[VolumeNumber],
) -> io::Result<std::collections::BTreeMap<VolumeNumber, Arc<BaseVolume>>> {
    let mut bases = std::collections::BTreeMap::new();
    let at_horizon = Content::at_horizon(horizon);
    remove_bases(&**disk, dir, &at_horizon, in_moments);
    let numbers = at_horizon.volumes.keys().chain(content.volumes.keys()).chain(in_moments);
    for number in numbers.copied().collect::<std::collections::BTreeSet<_>>() {
        match BaseVolume::open(disk.clone(), dir, number) {
            Ok(base) => {
                bases.insert(number, Arc::new(base));
            }
            // Nothing was folded into it yet.
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
            Err(cause) => return Err(cause),
        }
    }
    Ok(bases)
}
