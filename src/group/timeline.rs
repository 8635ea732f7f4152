//! Where the ends of requests lie: sparse checkpoints in memory, and the log between them.

use crate::log::reader::{ScanEnd, Scanner};
use crate::log::record::Header;
use crate::log::segment::Segments;
use crate::units::{Chain, EpochId, LogTime, Lsn, Position};

/// The end of a request, with all that a reader of what follows needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Checkpoint {
    /// The position.
    pub lsn: Lsn,
    /// Log time of the record before it.
    pub time: LogTime,
    /// Checksum of the record before it.
    pub chain: Chain,
    /// Epoch of the record before it.
    pub epoch: EpochId,
    /// Requests up to it.
    pub requests: u64,
}

impl Checkpoint {
    /// The checkpoint behind a record.
    pub(super) fn behind(header: &Header) -> Checkpoint {
        Checkpoint {
            lsn: header.end(),
            time: header.time,
            chain: header.checksum,
            epoch: header.epoch,
            requests: header.requests,
        }
    }

    /// Where and when that is.
    pub(super) fn position(&self) -> Position {
        Position { epoch: self.epoch, lsn: self.lsn, time: self.time }
    }
}

/// Checkpoints from the horizon to the head, at a distance that bounds their number by the log's
/// limit.
#[derive(Clone, Debug)]
pub(super) struct Timeline {
    distance_bytes: u64,
    /// Ascending; the first is the horizon.
    points: Vec<Checkpoint>,
    /// The last end of a request.
    end: Checkpoint,
}

impl Timeline {
    /// A timeline that begins at the horizon.
    pub(super) fn new(horizon: Checkpoint, segment_bytes: u64) -> Timeline {
        let distance_bytes = (segment_bytes / 256).max(4096);
        Timeline { distance_bytes, points: vec![horizon], end: horizon }
    }

    /// Notes the end of a request. The first of all is also what time the log begins at.
    pub(super) fn push(&mut self, point: Checkpoint) {
        assert!(point.lsn >= self.end.lsn, "{} follows {}", point.lsn, self.end.lsn);
        if self.end.lsn == Lsn::ZERO {
            self.points[0].time = point.time;
        }
        let last = self.points.last().expect("the horizon is there");
        if point.lsn.bytes_since(last.lsn) >= self.distance_bytes {
            self.points.push(point);
        }
        self.end = point;
    }

    /// The last end of a request.
    pub(super) fn end(&self) -> Checkpoint {
        self.end
    }

    /// The horizon.
    pub(super) fn horizon(&self) -> Checkpoint {
        self.points[0]
    }

    /// The nearest checkpoint at or before a position; the horizon for anything before it.
    pub(super) fn before_lsn(&self, lsn: Lsn) -> Checkpoint {
        if lsn >= self.end.lsn {
            return self.end;
        }
        let count = self.points.partition_point(|point| point.lsn <= lsn);
        self.points[count.saturating_sub(1)]
    }

    /// The nearest checkpoint at or before a log time; the horizon for anything before it.
    pub(super) fn before_time(&self, time: LogTime) -> Checkpoint {
        if time >= self.end.time {
            return self.end;
        }
        let count = self.points.partition_point(|point| point.time <= time);
        self.points[count.saturating_sub(1)]
    }

    /// The log ends at an earlier end of a request, at or behind the horizon.
    pub(super) fn cut(&mut self, end: Checkpoint) {
        let kept = self.points.partition_point(|point| point.lsn <= end.lsn);
        self.points.truncate(kept.max(1));
        self.end = end;
    }

    /// The horizon moves to an end of a request.
    pub(super) fn fold(&mut self, horizon: Checkpoint) {
        let first = self.points.partition_point(|point| point.lsn <= horizon.lsn);
        self.points.splice(..first, [horizon]);
        if self.end.lsn < horizon.lsn {
            self.end = horizon;
        }
    }
}

/// Goes on from a checkpoint over whole requests, up to `end`, as long as `keep` says so of the
/// request's last record; the last one kept.
///
/// # Errors
///
/// Why the log could not be followed up to there.
pub(super) fn follow(
    segments: &Segments,
    from: Checkpoint,
    end: Lsn,
    keep: impl Fn(&Header) -> bool,
) -> Result<Checkpoint, ScanEnd> {
    let mut found = from;
    let mut scanner = Scanner::new(segments, from.lsn, from.chain);
    while scanner.at() < end {
        let header = scanner.next(false)?;
        if header.is_last_of_request() {
            if !keep(&header) {
                break;
            }
            found = Checkpoint::behind(&header);
        }
    }
    Ok(found)
}
