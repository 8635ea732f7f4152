//! The room that a log has: its limit, what the disk leaves it, and what is told where there is
//! none.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::engine::{Core, Report};
use super::{Group, GroupError, Role};
use crate::events::Severity;
use crate::log::control::OnFull;
use crate::units::{ByteSize, LogTime};

/// Why writers are slowed or refused, and since when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// Why.
    pub reason: String,
    /// Since when, by the clock of this node.
    pub since: LogTime,
}

/// What the disk under a group has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskRoom {
    /// Bytes that are free.
    pub free_bytes: u64,
    /// Bytes of them that are to stay free.
    pub reserve_bytes: u64,
    /// Bytes that the log may take before the reserve is touched.
    pub log_limit_bytes: u64,
}

/// A refusal counts at least so long: what fits a gap that is left says nothing of the next write.
const REFUSED_FOR: Duration = Duration::from_secs(5);

/// On a copy so long: its primary tries again each minute at the latest, and until a try succeeded
/// nothing says that there is room.
const REFUSED_FOR_COPY: Duration = Duration::from_secs(90);

/// What a log takes of the disk is looked at so often at most: every file of it is.
const MEASURE_EVERY: Duration = Duration::from_secs(1);

/// What is known of the room for a log.
#[derive(Default)]
pub(super) struct Room {
    /// How the last fold failed, where it did.
    pub fold_failure: Option<FoldFailure>,
    /// What the disk has; none is not known.
    disk: Option<DiskRoom>,
    /// When it was looked last what the log takes of the disk (monotonic).
    measured_at: Option<Duration>,
    /// What the disk said to an append that it had no room for, and when (monotonic).
    refused: Option<(String, Duration)>,
    /// Since when the log is full. It ends when the log is under pressure no more, so that one that
    /// is filled as fast as it is folded is one shortage.
    full_since: Option<LogTime>,
}

/// Why a fold failed, and since when folds fail.
pub(super) struct FoldFailure {
    pub reason: String,
    pub since: LogTime,
    /// It waits, for no longer than writers have room. For any other reason those of a full log are
    /// told, not held.
    pub waits: bool,
}

impl Room {
    /// Why writers of a full log are refused, if they are.
    pub fn refusal(&self) -> Option<&str> {
        let failure = self.fold_failure.as_ref().filter(|failure| !failure.waits);
        failure.map(|failure| failure.reason.as_str())
    }

    /// Whether the last fold waits for the disk, or for a repair.
    pub fn fold_waits(&self) -> bool {
        self.fold_failure.as_ref().is_some_and(|failure| failure.waits)
    }
}

/// What limits a log.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// What the group was given.
    group: u64,
    /// What the node's configuration gives any group.
    node: Option<u64>,
    disk: Option<DiskRoom>,
    /// It is never less.
    least: u64,
}

impl Limits {
    fn effective(&self) -> u64 {
        let disk = self.disk.map_or(u64::MAX, |disk| disk.log_limit_bytes);
        self.group.min(self.node.unwrap_or(u64::MAX)).min(disk).max(self.least)
    }

    /// Why it is not what the group was given.
    fn reason(&self, dir: &Path) -> Option<String> {
        let lowest = Limits { least: 0, ..*self }.effective();
        let group = ByteSize(self.group);
        if self.effective() == self.group {
            return None;
        }
        let least = "four segments, the least that a limit may be";
        let reason = match (self.disk, self.node) {
            _ if lowest == self.group => return Some(least.to_owned()),
            (Some(disk), _) if lowest == disk.log_limit_bytes => format!(
                "not the {group} that the group was given, since the file system of {} has {} free, \
                 of which {} are to stay free (`disk_reserve`)",
                dir.display(),
                ByteSize(disk.free_bytes),
                ByteSize(disk.reserve_bytes)
            ),
            _ => format!(
                "not the {group} that the group was given, since the configuration of this node has \
                 a lower `log_limit`"
            ),
        };
        let at_least = if lowest < self.least { format!("; {least}") } else { String::new() };
        Some(reason + &at_least)
    }
}

impl Group {
    /// Why writers are slowed or refused for want of room, if they are.
    #[must_use]
    pub fn log_full(&self) -> Option<Shortage> {
        let core = self.lock();
        let reason = self.why_full(&core)?;
        let since = core.room.full_since.unwrap_or_else(|| self.context.env.clock.wall());
        Some(Shortage { reason, since })
    }

    /// The same as far as is known at this moment: not where the disk has room again, and a copy
    /// has only not tried since.
    #[must_use]
    pub fn full_now(&self) -> Option<String> {
        let core = self.lock();
        let now = self.context.env.clock.monotonic();
        let has_room = core.room.disk.is_some_and(|disk| disk.free_bytes > disk.reserve_bytes);
        let refused = core.room.refused.as_ref();
        let old = refused.is_some_and(|(_, at)| now.saturating_sub(*at) >= REFUSED_FOR);
        if old && has_room { self.why_at_limit(&core) } else { self.why_full(&core) }
    }

    /// Why the log is not folded, where that fails, and since when.
    #[must_use]
    pub fn fold_failure(&self) -> Option<Shortage> {
        let core = self.lock();
        let failure = core.room.fold_failure.as_ref()?;
        Some(Shortage { reason: failure.reason.clone(), since: failure.since })
    }

    fn why_full(&self, core: &Core) -> Option<String> {
        if let Some((refused, _)) = &core.room.refused {
            let free = core.room.disk.map_or_else(String::new, |disk| {
                format!(" ({} are free there)", ByteSize(disk.free_bytes))
            });
            let segment = ByteSize(self.segment_bytes());
            let (what, goes_on) = match core.role {
                Role::Primary => (
                    "writes are refused (ENOSPC)",
                    format!(
                        "new writes succeed again; until then hosts can go on at a peer that has \
                         room: `tidelog switchover {}`",
                        self.name()
                    ),
                ),
                Role::Secondary => ("this copy stands still", "it goes on by itself".to_owned()),
            };
            return Some(format!(
                "log-full: {what}, since the file system of {} has no room for the log: \
                 {refused}{free}; free some, {segment} or more, and {goes_on}",
                self.dir.display()
            ));
        }
        self.why_at_limit(core)
    }

    /// The same of a log that has reached its limit.
    fn why_at_limit(&self, core: &Core) -> Option<String> {
        let limit = self.log_limit(core);
        if self.log_bytes(core) < limit {
            return None;
        }
        if let Some(kept) = self.kept_for(core).filter(|kept| kept.blocks) {
            return Some(format!(
                "log-full: the log has reached its limit of {limit} bytes: writes wait, since it is \
                 kept for {}, which has what is before LSN {}: bring that back, or `tidelog group \
                 set {} on_peer_behind=release`",
                kept.peer,
                kept.from,
                self.name()
            ));
        }
        let policy = match (core.room.refusal(), core.view.policy.on_full) {
            (Some(reason), _) => format!("writes are refused, since folding fails: {reason}"),
            (None, OnFull::Fold) => "writers get the speed of folding, and the window is short of \
                                     what it is to be"
                .to_owned(),
            (None, OnFull::Block) => format!(
                "writes wait until its oldest part leaves the window: `tidelog group set {} \
                 on_full=fold`, a shorter window or a higher log_limit ends that",
                self.name()
            ),
        };
        Some(format!("log-full: the log has reached its limit of {limit} bytes: {policy}"))
    }

    /// Bytes between horizon and head: what the limit counts.
    pub(super) fn log_bytes(&self, core: &Core) -> u64 {
        core.writer.head().bytes_since(core.timeline.horizon().lsn)
    }

    /// The lowest of the group's limit, the node's, and what the file system has beyond its
    /// reserve; at least four segments.
    pub(super) fn log_limit(&self, core: &Core) -> u64 {
        self.limits(core).effective()
    }

    fn limits(&self, core: &Core) -> Limits {
        Limits {
            group: core.view.policy.log_limit.0,
            node: self.context.limits.log_limit_bytes,
            disk: core.room.disk,
            least: 4 * self.segment_bytes(),
        }
    }

    /// Why the log's limit is not the one that the group was given, where it is not.
    #[must_use]
    pub fn log_limit_reason(&self) -> Option<String> {
        let core = self.lock();
        self.limits(&core).reason(&self.dir)
    }

    /// Whether the log is so near its limit that folding cannot wait for the window.
    pub(super) fn is_pressed(&self, core: &Core) -> bool {
        self.log_bytes(core) >= self.log_limit(core) / 10 * 8
    }

    /// Notes how the last fold ended.
    pub(super) fn note_fold(&self, failure: Option<&GroupError>) {
        let now = self.context.env.clock.wall();
        let mut core = self.lock();
        let since = core.room.fold_failure.take().map_or(now, |failure| failure.since);
        core.room.fold_failure = failure.map(|error| FoldFailure {
            reason: error.to_string(),
            since,
            waits: matches!(error, GroupError::Waits { .. }),
        });
    }

    /// An append of a copy found room: the one that found none is history.
    pub(super) fn note_taken(core: &mut Core) {
        core.room.refused = None;
    }

    /// Whether the log is full, or was and is under pressure still: one shortage, as events count.
    #[must_use]
    pub fn is_short_of_room(&self) -> bool {
        self.lock().room.full_since.is_some()
    }

    /// What the disk has, as last looked at.
    #[must_use]
    pub fn disk_room(&self) -> Option<DiskRoom> {
        self.lock().room.disk
    }

    /// Notes that the disk had no room for an append: that is the writer's to bear.
    pub(super) fn note_refused(&self, core: &mut Core, cause: &io::Error) {
        core.room.refused = Some((cause.to_string(), self.context.env.clock.monotonic()));
    }

    /// Keeps the file system's reserve free: the log's limit shrinks with what is left beyond it.
    pub(super) fn look_at_disk(&self) {
        self.measure_log();
        let Ok(space) = self.context.env.disk.space(&self.dir) else { return };
        let default = 2 * self.segment_bytes() + space.total_bytes / 100;
        let reserve = self.context.limits.disk_reserve_bytes.unwrap_or(default);
        self.keep_reserve(space.free_bytes, reserve);
        let beyond = space.free_bytes.saturating_sub(reserve);
        let mut core = self.lock();
        core.room.disk = Some(DiskRoom {
            free_bytes: space.free_bytes,
            reserve_bytes: reserve,
            log_limit_bytes: self.log_bytes(&core).saturating_add(beyond),
        });
        let now = self.context.env.clock.monotonic();
        let lasts = match core.role {
            Role::Primary => REFUSED_FOR,
            Role::Secondary => REFUSED_FOR_COPY,
        };
        let old = |(_, at): &(String, Duration)| now.saturating_sub(*at) >= lasts;
        if beyond > 0 && core.room.refused.as_ref().is_some_and(old) {
            core.room.refused = None;
        }
    }

    fn measure_log(&self) {
        let now = self.context.env.clock.monotonic();
        {
            let mut core = self.lock();
            let before = core.room.measured_at;
            if before.is_some_and(|before| now.saturating_sub(before) < MEASURE_EVERY) {
                return;
            }
            core.room.measured_at = Some(now);
        }
        let log_used_bytes = self.segments.allocated_bytes();
        self.lock().log_used_bytes = log_used_bytes;
    }

    /// Tells when the log gets full, and when it has room again.
    pub(super) fn look_at_room(&self) {
        let now = self.context.env.clock.wall();
        let mut core = self.lock();
        let reason = self.why_full(&core);
        match (reason, core.room.full_since) {
            (Some(text), None) => {
                core.room.full_since = Some(now);
                let details = json!(null);
                let code = "log-full";
                let refused = core.room.refused.is_some() || core.room.refusal().is_some();
                let severity = if refused { Severity::Error } else { Severity::Warning };
                core.unreported.push(Report { severity, code, text, details });
            }
            (None, Some(since)) if !self.is_pressed(&core) => {
                core.room.full_since = None;
                let seconds = now.since(since).as_secs();
                let text = format!("the log has room again, after {seconds} s");
                let details = json!({ "seconds": seconds });
                let code = "log-has-room";
                core.unreported.push(Report { severity: Severity::Info, code, text, details });
            }
            _ => return,
        }
        drop(core);
        self.report();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_not_the_groups_own_says_whose_it_is() {
        let disk = |log_limit_bytes| DiskRoom {
            free_bytes: 300 << 20,
            reserve_bytes: 200 << 20,
            log_limit_bytes,
        };
        let well = Limits {
            group: 10 << 30,
            node: Some(10 << 30),
            disk: Some(disk(20 << 30)),
            least: 256 << 20,
        };
        let reason = |limits: Limits| limits.reason(Path::new("/data/g")).unwrap_or_default();
        assert_eq!((well.effective(), &*reason(well)), (10 << 30, ""));
        let disk = Limits { disk: Some(disk(5 << 30)), ..well };
        assert_eq!(disk.effective(), 5 << 30);
        for part in ["10 GiB", "of /data/g has 300 MiB free", "200 MiB are to stay", "disk_reserve"]
        {
            assert!(reason(disk).contains(part), "{part}: {}", reason(disk));
        }
        let node = Limits { node: Some(1 << 30), ..disk };
        assert!(reason(node).contains("configuration of this node"), "{}", reason(node));
        let least = Limits { group: 1 << 20, ..well };
        assert!(reason(least).starts_with("four segments"), "{}", reason(least));
        assert_eq!(reason(Limits { node: None, disk: None, ..well }), "");
    }

    #[test]
    fn a_disk_that_is_full_is_the_reason_also_where_a_log_has_the_least_it_may() {
        let disk = DiskRoom { free_bytes: 0, reserve_bytes: 200 << 20, log_limit_bytes: 96 << 20 };
        let (group, node) = (10 << 30, Some(128 << 20));
        let full = Limits { group, node, disk: Some(disk), least: 256 << 20 };
        let told = |limits: Limits| limits.reason(Path::new("/data/g")).unwrap_or_default();
        assert_eq!(full.effective(), 256 << 20);
        let least = "; four segments, the least that a limit may be";
        assert!(told(full).contains("of /data/g has 0 B free"), "{}", told(full));
        assert!(told(full).ends_with(least), "{}", told(full));
        let by_node = Limits { node: Some(64 << 20), ..full };
        assert!(told(by_node).contains("configuration of this node"), "{}", told(by_node));
        assert!(told(by_node).ends_with(least), "{}", told(by_node));
    }
}
