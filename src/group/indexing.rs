//! Writes the index of each segment that is full and durable, and follows a log by its indices
//! where they may be believed.

use std::io::IoSlice;

use super::engine::Group;
use crate::io::OpenMode;
use crate::log::index::{Index, IndexBuilder, Indexed};
use crate::log::reader::{ScanEnd, Scanner};
use crate::log::record::Header;
use crate::log::segment::{Segments, index_name};
use crate::units::{Chain, Lsn};

/// Follows the log from a record's start, and gives `visit` each record with the payload of control
/// records. Whole segments below `believed` are read from their index. Ends at `end`, or where the
/// chain does.
///
/// # Errors
///
/// Why the chain ended before `end`.
pub(super) fn visit(
    segments: &Segments,
    from: (Lsn, Chain),
    end: Lsn,
    believed: Lsn,
    mut visit: impl FnMut(&Header, &[u8]),
) -> Result<(), ScanEnd> {
    let segment_bytes = segments.segment_bytes();
    let (mut at, mut chain) = from;
    while at < end {
        let next = Lsn((at.segment_number(segment_bytes) + 1) * segment_bytes);
        if at.segment_offset(segment_bytes) == 0
            && next <= end.min(believed)
            && let Some((records, end_chain)) = indexed(segments, at, chain)
        {
            for record in &records {
                visit(&record.header, &record.payload);
            }
            (at, chain) = (next, end_chain);
            continue;
        }
        let mut scanner = Scanner::new(segments, at, chain);
        while scanner.at() < end.min(next) {
            let header = scanner.next(false)?;
            visit(&header, scanner.payload());
        }
        (at, chain) = (scanner.at(), scanner.chain());
    }
    Ok(())
}

/// The records of a whole segment and the chain behind them, by its index, where that is one chain
/// from `chain` on.
pub(super) fn indexed(
    segments: &Segments,
    first: Lsn,
    chain: Chain,
) -> Option<(Vec<Indexed>, Chain)> {
    let number = first.segment_number(segments.segment_bytes());
    let path = segments.dir().join(index_name(number));
    let file = segments.disk().open(&path, OpenMode::Read).ok()?;
    let bytes = file.len().ok()?;
    // No longer than headers for the smallest records could be.
    if bytes > 2 * segments.segment_bytes() {
        return None;
    }
    let mut buffer = vec![0; bytes as usize];
    file.read_at(&mut buffer, 0).ok()?;
    let index = Index::decode(&buffer, first, chain)?;
    if index.end != first.advance(segments.segment_bytes()) {
        return None;
    }
    Some((index.records(first, chain)?, index.end_chain))
}

impl Group {
    /// Writes the index of each segment that is full and durable and has none. It is a cache: what
    /// fails here is tried again, or missed.
    pub(super) fn write_indices(&self) {
        let (durable, horizon, cuts) = {
            let core = self.lock();
            (core.durable, core.timeline.horizon().lsn, core.cuts)
        };
        for number in self.segments.numbers() {
            let first = Lsn(number * self.segment_bytes());
            let path = self.segments.dir().join(index_name(number));
            if first.advance(self.segment_bytes()) > durable {
                return;
            }
            if first < horizon || !matches!(self.context.env.disk.exists(&path), Ok(false)) {
                continue;
            }
            if let Err(cause) = self.write_index(number, cuts) {
                tracing::warn!("group {}: index of segment {number}: {cause}", self.name());
                return;
            }
        }
    }

    fn write_index(&self, number: u64, cuts: u64) -> Result<(), ScanEnd> {
        let first = Lsn(number * self.segment_bytes());
        let end = first.advance(self.segment_bytes());
        let chain = self.chain_at(first).ok_or(ScanEnd::Chain)?;
        let mut builder = IndexBuilder::new(first, chain);
        let mut scanner = Scanner::new(&self.segments, first, chain);
        while scanner.at() < end {
            let header = scanner.next(false)?;
            builder.push(&header, scanner.payload());
        }
        let bytes = builder.finish();
        let disk = &self.context.env.disk;
        let path = self.segments.dir().join(index_name(number));
        let temporary = self.segments.dir().join(format!("{number:012}.idx.new"));
        let file = disk.open(&temporary, OpenMode::Create)?;
        file.set_len(bytes.len() as u64)?;
        file.write_at(&[IoSlice::new(&bytes)], 0)?;
        file.sync()?;
        // Under the mutex, so that no cut comes between: an index of what was cut off would be
        // believed once the log is durable there again.
        let core = self.lock();
        if core.cuts == cuts {
            disk.rename(&temporary, &path)?;
        }
        Ok(())
    }
}
