//! What a cut takes off the end of a log is kept as a branch: its segments in a directory of their
//! own, with a file that says what they are. Only an operator removes one.
//!
//! A cut never writes into a file that holds cut-off bytes, and never into a branch that is there
//! already. Until it is whole a branch has a name of its own, the same one at every attempt, so
//! that a cut that is tried again goes on with what it has; a start ends what a crash has left.

use std::collections::BTreeSet;
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::content::Content;
use super::engine::Group;
use super::timeline::Checkpoint;
use super::{GroupError, Point, files};
use crate::io::{Disk, DiskFile, OpenMode, is_full, read_around};
use crate::log::reader::{ScanEnd, Scanner, remains};
use crate::log::record::Kind;
use crate::log::segment::{Segments, segment_name};
use crate::units::{Chain, LogTime, Lsn, Position};

const ABOUT: &str = "branch.json";
/// What the name of a branch ends with while segments move there, which are nowhere else.
const UNFINISHED: &str = ".new";
/// The same while a log that stays as it is is copied there.
const COPYING: &str = ".copy";

/// A tail that is not part of the surviving history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branch {
    /// Its directory under `branches/`.
    pub name: String,
    /// Where it leaves the history: the end of a request.
    pub from: Position,
    /// The end of its last whole request; `from` where none was whole.
    pub to: Position,
    /// Bytes of log between the two.
    pub bytes: u64,
    /// This node wrote it as primary; else it had only been received.
    pub authored: bool,
    /// When it was cut off, by the wall clock.
    pub cut: LogTime,
    /// Why.
    pub reason: String,
}

/// The branches of a group as they were last listed, so that status does not wait for a disk.
#[derive(Default)]
pub(super) struct Listed {
    /// Held while they are listed, so that an older list never takes a newer one's place.
    listing: Mutex<()>,
    branches: Mutex<Vec<Branch>>,
}

/// A branch's own part of its image.
pub(super) struct BranchLog {
    /// The branch's name.
    pub name: String,
    /// Where its records begin: before that the group's own log counts.
    pub from: Lsn,
    /// The segments that were kept.
    pub segments: Segments,
}

/// A branch that is made when the first thing has to be kept.
pub(super) struct Keeping {
    group_dir: PathBuf,
    branch: Branch,
    dir: Option<PathBuf>,
    suffix: &'static str,
    /// What cannot be read below it becomes zeros where it is copied, as damage that is told.
    zeros_below: Lsn,
    /// The segments of which that was so.
    unread: BTreeSet<u64>,
}

impl Keeping {
    /// Nothing is made yet; the name of `branch` is given then.
    pub(super) fn new(group_dir: &Path, branch: Branch) -> Keeping {
        Keeping {
            group_dir: group_dir.to_owned(),
            branch,
            dir: None,
            suffix: UNFINISHED,
            zeros_below: Lsn::ZERO,
            unread: BTreeSet::new(),
        }
    }

    /// The same; what cannot be read below a position becomes zeros where it is copied. Else the
    /// disk's word ends it.
    pub(super) fn around(mut self, zeros_below: Lsn) -> Keeping {
        self.zeros_below = zeros_below;
        self
    }

    /// The segments of which something could not be read.
    pub(super) fn unread(&self) -> &BTreeSet<u64> {
        &self.unread
    }

    fn copy(&mut self, segments: &Segments, number: u64, to: &Path, bytes: u64) -> io::Result<()> {
        let segment = segments.get(number).ok_or(io::ErrorKind::NotFound)?;
        let start = number * segments.segment_bytes();
        let zeros_below = self.zeros_below.0.saturating_sub(start);
        if copy(segments, &*segment.file, to, bytes, zeros_below)? {
            self.unread.insert(number);
        }
        Ok(())
    }

    /// Whether something whole stands behind a position in a segment.
    fn is_whole_behind(&self, segments: &Segments, number: u64, at: Lsn) -> io::Result<bool> {
        let (found, unread) = remains(segments, number, at, |_| false)?;
        match unread {
            Some(cause) if self.zeros_below < Lsn::MAX => Err(cause),
            _ => Ok(found.last_end.is_some()),
        }
    }

    /// The branch, where something was kept.
    pub(super) fn kept(self) -> Option<Branch> {
        self.dir.map(|_| self.branch)
    }

    fn dir(&mut self, disk: &dyn Disk) -> io::Result<&Path> {
        if self.dir.is_none() {
            let all = self.group_dir.join("branches");
            let dir = all.join(format!("cut-{}{}", self.branch.from.lsn, self.suffix));
            if self.suffix == COPYING && disk.exists(&dir)? {
                files::discard(disk, &dir)?;
            }
            disk.create_dir(&dir)?;
            match read_about(disk, &dir) {
                // An attempt that did not end saw all of it.
                Ok(first) => self.branch = first,
                Err(_) => {
                    let about = serde_json::to_vec_pretty(&self.branch)?;
                    files::store(disk, &dir.join(ABOUT), &about)?;
                }
            }
            disk.sync_dir(&all)?;
            disk.sync_dir(&self.group_dir)?;
            self.dir = Some(dir);
        }
        Ok(self.dir.as_deref().expect("made above"))
    }

    fn sync(&self, disk: &dyn Disk) -> io::Result<()> {
        self.dir.as_ref().map_or(Ok(()), |dir| disk.sync_dir(dir))
    }

    /// All of it is there: it gets its name.
    fn finish(&mut self, disk: &dyn Disk) -> io::Result<()> {
        self.sync(disk)?;
        let Some(dir) = &self.dir else { return Ok(()) };
        self.branch.name = name_branch(disk, dir, self.branch.from.lsn)?;
        Ok(())
    }
}

/// Gives a branch that is whole its name, durably.
fn name_branch(disk: &dyn Disk, dir: &Path, at: Lsn) -> io::Result<String> {
    let all = dir.parent().expect("it is under `branches`");
    let name = free_name(disk, all, at)?;
    disk.rename(dir, &all.join(&name))?;
    disk.sync_dir(all)?;
    Ok(name)
}

/// What a branch says that it is.
fn read_about(disk: &dyn Disk, dir: &Path) -> io::Result<Branch> {
    let text = files::load(disk, &dir.join(ABOUT))?;
    Ok(serde_json::from_slice(&text)?)
}

/// At the start, once the log is cut: names the branches whose cut did not get to it.
pub(super) fn finish_branches(disk: &dyn Disk, group_dir: &Path) -> io::Result<Vec<Branch>> {
    let all = group_dir.join("branches");
    let names = files::names_in(disk, &all)?;
    let mut finished = Vec::new();
    for unfinished in names.into_iter().filter(|name| name.ends_with(UNFINISHED)) {
        let dir = all.join(&unfinished);
        if disk.list(&dir)?.iter().all(|name| name.starts_with("branch.")) {
            // Nothing moved there.
            files::discard(disk, &dir)?;
            continue;
        }
        let about = read_about(disk, &dir);
        let mut branch = about.unwrap_or_else(|cause| unreadable(unfinished, &cause));
        branch.name = name_branch(disk, &dir, branch.from.lsn)?;
        finished.push(branch);
    }
    Ok(finished)
}

/// Whether this is the name of a branch that is whole.
fn is_branch(name: &str) -> bool {
    !name.contains('.')
}

/// The name of the next branch that leaves the history at a position.
fn free_name(disk: &dyn Disk, all: &Path, at: Lsn) -> io::Result<String> {
    let names = std::iter::once(format!("cut-{at}"))
        .chain((2..).map(|number| format!("cut-{at}-{number}")));
    for name in names {
        if !disk.exists(&all.join(&name))? {
            return Ok(name);
        }
    }
    unreachable!("numbers do not end")
}

impl Group {
    /// The name that a branch from a position would have, were it cut off now.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn next_branch(&self, at: Lsn) -> Result<String, GroupError> {
        let all = self.dir.join("branches");
        free_name(&*self.context.env.disk, &all, at)
            .map_err(|cause| self.io(format!("list {}", all.display()), &cause))
    }

    /// Gives up a branch: what is in it is lost.
    ///
    /// # Errors
    ///
    /// Where there is none of that name; what the disk says.
    pub fn remove_branch(&self, name: &str) -> Result<Branch, GroupError> {
        let branches = self.branches()?;
        let branch = branches.into_iter().find(|branch| branch.name == name);
        let branch = branch.ok_or_else(|| self.no_branch(name))?;
        let group = self.name();
        let images = self.images();
        if let Some(open) = images.iter().find(|image| image.branch() == Some(name)) {
            return Err(self.refused(format!(
                "branch `{name}` is shown by an image; `tidelog image close {group}@{}` closes it",
                open.name()
            )));
        }
        let all = self.dir.join("branches");
        let disk = &self.context.env.disk;
        files::discard(&**disk, &all.join(&branch.name))
            .map_err(|cause| self.io(format!("remove branch {name}"), &cause))?;
        self.sweep_soon();
        self.branches()?;
        Ok(branch)
    }

    fn no_branch(&self, name: &str) -> GroupError {
        let group = self.name();
        self.refused(format!(
            "branch `{name}` does not exist; `tidelog branch list {group}` shows those that do"
        ))
    }

    /// A branch that says what it is.
    pub(super) fn branch(&self, name: &str) -> Result<Branch, GroupError> {
        let disk = &self.context.env.disk;
        // Its name comes from outside, and is no path.
        if !self.branches()?.iter().any(|branch| branch.name == name) {
            return Err(self.no_branch(name));
        }
        let path = self.dir.join("branches").join(name);
        read_about(&**disk, &path)
            .map(|about| Branch { name: name.to_owned(), ..about })
            .map_err(|cause| self.io(format!("read {}", path.join(ABOUT).display()), &cause))
    }

    /// Applies a branch's own whole requests to the content where it leaves the history, behind a
    /// record with checksum `chain`; where they end. The tail of a log that was torn may have less
    /// of them than was seen of it.
    ///
    /// # Errors
    ///
    /// What the disk says; a record that must be understood and is not.
    pub(super) fn follow_branch(
        &self,
        branch: &Branch,
        chain: Chain,
        content: &mut Content,
    ) -> Result<(BranchLog, Position), GroupError> {
        let io = |cause| self.io(format!("read branch {}", branch.name), &cause);
        let dir = self.dir.join("branches").join(&branch.name);
        let disk = self.context.env.disk.clone();
        let segments = Segments::open(disk, &dir, self.segment_bytes()).map_err(io)?;
        let mut end = branch.from;
        let mut freed = Vec::new();
        let mut request = Vec::new();
        let mut scanner = Scanner::new(&segments, branch.from.lsn, chain);
        while scanner.at() < branch.to.lsn {
            let header = match scanner.next(true) {
                Ok(header) => header,
                Err(ScanEnd::Io(cause)) => return Err(io(cause)),
                Err(ScanEnd::Chain) if scanner.at() == branch.from.lsn => {
                    return Err(self.cut_again(branch));
                }
                Err(_) => break,
            };
            let control = header.kind == Kind::Control as u8;
            let payload = if control { scanner.payload().to_vec() } else { Vec::new() };
            let last = header.is_last_of_request();
            request.push((header, payload));
            if last {
                for (header, payload) in request.drain(..) {
                    content.apply(&header, &payload, &mut freed);
                    end = Checkpoint::behind(&header).position();
                }
                freed.clear();
            }
        }
        let name = branch.name.clone();
        Ok((BranchLog { name, from: branch.from.lsn, segments }, end))
    }

    /// Whether the history here is at its beginning still the one that the branch has left. Its own
    /// first record may be torn, and tells nothing of that.
    ///
    /// # Errors
    ///
    /// Where it is not, or the log does not cover that any more; what the disk says.
    pub(super) fn check_continues(&self, branch: &Branch) -> Result<(), GroupError> {
        if branch.from.lsn == Lsn::ZERO {
            // Every history begins there.
            return Ok(());
        }
        let found = self.resolve(&Point::Lsn(branch.from.lsn))?;
        if (found.epoch, found.lsn) == (branch.from.epoch, branch.from.lsn) {
            return Ok(());
        }
        Err(self.cut_again(branch))
    }

    pub(super) fn cut_again(&self, branch: &Branch) -> GroupError {
        self.refused(format!(
            "branch {} does not continue the history here: the log was cut again before lsn:{}",
            branch.name, branch.from.lsn
        ))
    }

    /// No image of a branch goes past a record that had to be understood and was not.
    pub(super) fn check_branch(&self, name: &str, content: &Content) -> Result<(), GroupError> {
        match content.barrier {
            Some(barrier) => Err(self.refused(format!(
                "branch {name} has a record at {barrier} that must be understood, and it cannot be \
                 here: a later version wrote it, or it goes back behind the base; `tidelog branch \
                 list {group}` shows what else is kept",
                group = self.name()
            ))),
            None => Ok(()),
        }
    }

    pub(super) fn goes_behind(&self, name: &str) -> GroupError {
        self.refused(format!(
            "a rewind in branch {name} goes back behind the base; `tidelog branch list {group}` \
             shows what else is kept",
            group = self.name()
        ))
    }

    /// The branches as they were last listed, which is after every change: asks no disk.
    #[must_use]
    pub fn known_branches(&self) -> Vec<Branch> {
        self.listed.branches.lock().expect("no holder panics").clone()
    }

    /// The branches that are kept, by where they leave the history. One whose description cannot be
    /// read is among them with its name, so that nothing that was kept is out of sight.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn branches(&self) -> Result<Vec<Branch>, GroupError> {
        let disk = &self.context.env.disk;
        let all = self.dir.join("branches");
        let io = |cause| self.io(format!("list {}", all.display()), &cause);
        let _one_at_a_time = self.listed.listing.lock().expect("no holder panics");
        let mut branches = Vec::new();
        let names = files::names_in(&**disk, &all).map_err(io)?;
        for name in names.into_iter().filter(|name| is_branch(name)) {
            branches.push(match read_about(&**disk, &all.join(&name)) {
                Ok(about) => Branch { name, ..about },
                Err(cause) => unreadable(name, &cause),
            });
        }
        branches.sort_by(|one, other| {
            one.from.lsn.cmp(&other.from.lsn).then_with(|| one.cut.cmp(&other.cut))
        });
        self.listed.branches.lock().expect("no holder panics").clone_from(&branches);
        Ok(branches)
    }
}

/// What is known of a branch that does not say what it is: its name, which tells where it begins.
fn unreadable(name: String, cause: &io::Error) -> Branch {
    let at = name.strip_prefix("cut-").and_then(|rest| rest.split(['-', '.']).next()?.parse().ok());
    let from = Position { lsn: Lsn(at.unwrap_or(0)), ..Position::default() };
    let reason = format!("{ABOUT} cannot be read: {cause}");
    // Of the two origins the one that nobody gives up lightly.
    Branch { name, from, to: from, bytes: 0, authored: true, cut: LogTime(0), reason }
}

/// Removes what was given up of a group, its branches too, and not removed to the end, and what of
/// a log was only copied.
pub(super) fn remove_discarded(disk: &dyn Disk, group_dir: &Path) {
    let branches = group_dir.join("branches");
    for all in [group_dir, &branches] {
        let names = files::names_in(disk, all).unwrap_or_default();
        let goes = |name: &String| files::is_discarded(name) || name.ends_with(COPYING);
        for gone in names.into_iter().filter(goes).map(|name| all.join(name)) {
            if let Err(cause) = files::discard(disk, &gone) {
                tracing::warn!("{} could not be removed: {cause}", gone.display());
            }
        }
    }
}

/// Makes `at` the end of the log: what is kept above `trusted` is written to fresh files and
/// synced, what is behind leaves, and is kept apart where something in it is whole.
pub(super) fn settle(
    segments: &Segments,
    trusted: Lsn,
    at: Lsn,
    chain_end: Lsn,
    branch: &mut Keeping,
) -> io::Result<()> {
    let segment_bytes = segments.segment_bytes();
    let disk = segments.disk();
    let last = at.segment_number(segment_bytes);
    // From the last segment to the first, so that a crash in between leaves a log that ends early
    // rather than one with a gap whose far side looks whole.
    let behind = segments.numbers().into_iter().rev().filter(|number| *number > last);
    for number in behind.collect::<Vec<_>>() {
        if branch.is_whole_behind(segments, number, at)? {
            let to = branch.dir(&**disk)?.join(segment_name(number));
            segments.take_out(number, Some(&to))?;
        } else {
            segments.take_out(number, None)?;
        }
    }
    let first = trusted.segment_number(segment_bytes);
    for number in first..=last {
        if segments.get(number).is_none() {
            continue;
        }
        let start = Lsn(number * segment_bytes);
        let kept = at.bytes_since(start).min(segment_bytes);
        let cut_off = kept < segment_bytes
            && (chain_end > at || branch.is_whole_behind(segments, number, at)?);
        if cut_off {
            let to = branch.dir(&**disk)?.join(segment_name(number));
            branch.copy(segments, number, &to, segment_bytes)?;
        }
        let temporary = segments.dir().join(format!("{number:012}.new"));
        branch.copy(segments, number, &temporary, kept)?;
        branch.sync(&**disk)?;
        segments.replace(number, &temporary)?;
        segments.drop_index(number)?;
    }
    disk.sync_dir(segments.dir())?;
    branch.finish(&**disk)
}

/// Copies the segments that hold the log from `from` on, which stays as it is; the branch, where
/// there are any.
pub(super) fn keep_segments(
    segments: &Segments,
    from: Lsn,
    branch: &mut Keeping,
) -> io::Result<Option<Branch>> {
    let disk = segments.disk();
    branch.suffix = COPYING;
    let first = from.segment_number(segments.segment_bytes());
    for number in segments.numbers().into_iter().filter(|number| *number >= first) {
        let to = branch.dir(&**disk)?.join(segment_name(number));
        branch.copy(segments, number, &to, segments.segment_bytes())?;
    }
    branch.finish(&**disk)?;
    Ok(branch.dir.is_some().then(|| branch.branch.clone()))
}

/// Copies the first `bytes` of a segment to a new file of a segment's length, and syncs it. Where
/// the disk is full, spares make room. What cannot be read before `zeros_below` becomes zeros;
/// whether there was any.
fn copy(
    segments: &Segments,
    from: &dyn DiskFile,
    to: &Path,
    bytes: u64,
    zeros_below: u64,
) -> io::Result<bool> {
    match copy_once(segments, from, to, bytes, zeros_below) {
        Err(cause) if is_full(&cause) && segments.drop_spares()? => {
            copy_once(segments, from, to, bytes, zeros_below)
        }
        copied => copied,
    }
    // Half a copy only takes the room that it lacked.
    .inspect_err(|_| {
        let (disk, dir) = (segments.disk(), to.parent().unwrap_or(to));
        let _ = disk.remove(to).and_then(|()| disk.sync_dir(dir));
    })
}

fn copy_once(
    segments: &Segments,
    from: &dyn DiskFile,
    to: &Path,
    bytes: u64,
    zeros_below: u64,
) -> io::Result<bool> {
    let disk = segments.disk();
    if disk.exists(to)? {
        // Of an attempt before: its room counts only once it is gone for good.
        disk.remove(to)?;
        disk.sync_dir(to.parent().unwrap_or(to))?;
    }
    let file = disk.open(to, OpenMode::CreateNew)?;
    file.set_len(segments.segment_bytes())?;
    let (mut at, mut unread) = (0, false);
    let mut buffer = vec![0; bytes.min(1 << 20) as usize];
    while at < bytes {
        let count = (bytes - at).min(buffer.len() as u64) as usize;
        if let Some(failed) = read_around(from, &mut buffer[..count], at) {
            if failed.end > zeros_below {
                return Err(failed.cause);
            }
            unread = true;
        }
        file.write_at(&[IoSlice::new(&buffer[..count])], at)?;
        at += count as u64;
    }
    file.sync()?;
    Ok(unread)
}
