//! What was done behind a position, by the records of the log: for whoever must choose between two
//! histories.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::content::{kind_of, read_control};
use super::engine::Group;
use super::{GroupError, View};
use crate::log::control::Control;
use crate::log::reader::{ScanEnd, Scanner};
use crate::log::record::Kind;
use crate::units::{LogTime, Lsn, Name, VolumeNumber};

/// What one node has behind a position.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Where it begins: the position asked for, or the horizon, where that is further: what is
    /// between the two is in the base, and cannot be told apart there.
    pub from: Lsn,
    /// The head when it was made.
    pub to: Lsn,
    /// Bytes of log between the two.
    pub bytes: u64,
    /// Log time of the first record; none where there is none.
    pub first: Option<LogTime>,
    /// Log time of the last record.
    pub last: Option<LogTime>,
    /// The volumes that were written, by name.
    pub volumes: Vec<VolumeAccount>,
    /// The bookmarks that were made, oldest first.
    pub bookmarks: Vec<Name>,
}

/// What was written of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeAccount {
    /// Its name; of one that was removed since, its number.
    pub name: String,
    /// Bytes that were written, each as often as it was.
    pub written_bytes: u64,
    /// Bytes that were zeroed or trimmed.
    pub cleared_bytes: u64,
}

impl Group {
    /// What was done here behind a position. Reads the log from there on: seconds where that is
    /// long.
    ///
    /// # Errors
    ///
    /// Where the log cannot be read.
    pub fn account(&self, behind: Lsn) -> Result<Account, GroupError> {
        let (start, head) = {
            let core = self.lock();
            (core.timeline.before_lsn(behind), core.writer.head())
        };
        let from = start.lsn.max(behind);
        let mut account = Account {
            from,
            to: head,
            bytes: head.bytes_since(from),
            first: None,
            last: None,
            volumes: Vec::new(),
            bookmarks: Vec::new(),
        };
        let mut written: BTreeMap<VolumeNumber, (u64, u64)> = BTreeMap::new();
        let mut names = BTreeMap::new();
        let mut scanner = Scanner::new(&self.segments, start.lsn, start.chain).once();
        while scanner.at() < head {
            let at = scanner.at();
            let header = scanner.next(false).map_err(|end| self.unreadable(at, &end))?;
            if header.lsn < from {
                continue;
            }
            account.first = account.first.or(Some(header.time));
            account.last = Some(header.time);
            // A record may clear all of a volume of 1 EiB, each time anew.
            let add = |bytes: &mut u64| *bytes = bytes.saturating_add(header.length);
            match kind_of(&header) {
                Some(Kind::Write) => add(&mut written.entry(header.volume).or_default().0),
                Some(Kind::Zero | Kind::Trim) => {
                    add(&mut written.entry(header.volume).or_default().1);
                }
                Some(Kind::Control) => {
                    let payload = scanner.payload();
                    match read_control(header.control_kind, header.version, payload) {
                        Ok(Some(Control::Volume(record))) => {
                            names.insert(record.number, record.name);
                        }
                        Ok(Some(Control::Bookmark(record))) if record.removed => {
                            account.bookmarks.retain(|name| *name != record.name);
                        }
                        Ok(Some(Control::Bookmark(record))) => {
                            account.bookmarks.retain(|name| *name != record.name);
                            account.bookmarks.push(record.name);
                        }
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        names.extend(self.volumes().into_iter().map(|volume| (volume.number, volume.name)));
        let of_volume = |(number, (written_bytes, cleared_bytes)): (VolumeNumber, (u64, u64))| {
            let name = names.get(&number);
            let name = name.map_or_else(|| format!("volume {number}"), Name::to_string);
            VolumeAccount { name, written_bytes, cleared_bytes }
        };
        account.volumes = written.into_iter().map(of_volume).collect();
        account.volumes.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(account)
    }

    fn unreadable(&self, at: Lsn, end: &ScanEnd) -> GroupError {
        match end {
            // It was folded, or cut, meanwhile.
            ScanEnd::NoSegment(_) => self.not_in_log(at, self.positions().head),
            ScanEnd::Io(cause) => self.io(format!("read the log at LSN {at}"), cause),
            other => self.damaged(format!("log at LSN {at}: {other}")),
        }
    }
}
