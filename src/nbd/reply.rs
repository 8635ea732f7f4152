//! Replies as bytes: success, errors, what stands before a read's data, and block status.

use zerocopy::IntoBytes;
use zerocopy::big_endian::{U32, U64};

use super::wire::{
    self, ChunkHeader, DATA_CHUNK_PREFIX_BYTES, Errno, SimpleReply, StatusDescriptor, allocation,
    chunk, chunk_header, simple_reply,
};
use crate::group::{Allocation, Extent};

/// The reply of a request that succeeded and has nothing more to say.
pub(super) fn put_success(out: &mut Vec<u8>, cookie: u64) {
    out.extend_from_slice(simple_reply(cookie, None).as_bytes());
}

/// The reply of a read of nothing.
pub(super) fn put_empty_read(out: &mut Vec<u8>, structured: bool, cookie: u64) {
    if structured {
        out.extend_from_slice(chunk_header(cookie, chunk::NONE, true, 0).as_bytes());
    } else {
        put_success(out, cookie);
    }
}

/// Bytes in front of the data of a read's reply.
pub(super) const fn prefix_bytes(structured: bool) -> usize {
    if structured { DATA_CHUNK_PREFIX_BYTES } else { SimpleReply::BYTES }
}

/// The reply of a request that failed.
pub(super) fn put_error(
    out: &mut Vec<u8>,
    structured: bool,
    cookie: u64,
    error: Errno,
    text: &str,
) {
    if structured {
        wire::put_error_chunk(out, cookie, error, text);
    } else {
        out.extend_from_slice(simple_reply(cookie, Some(error)).as_bytes());
    }
}

/// What stands in front of a read's data. `last` where the reply ends with these data.
pub(super) fn put_prefix(
    prefix: &mut [u8],
    structured: bool,
    cookie: u64,
    offset: u64,
    length: usize,
    last: bool,
) {
    if structured {
        let (header, at) = prefix.split_at_mut(ChunkHeader::BYTES);
        let bytes = chunk_header(cookie, chunk::OFFSET_DATA, last, 8 + length);
        header.copy_from_slice(bytes.as_bytes());
        at.copy_from_slice(U64::new(offset).as_bytes());
    } else {
        prefix.copy_from_slice(simple_reply(cookie, None).as_bytes());
    }
}

/// What a range of `length` bytes holds: at least one run, at most `limit`, none longer than asked.
pub(super) fn put_status(
    out: &mut Vec<u8>,
    cookie: u64,
    length: u32,
    limit: usize,
    extents: &[Extent],
) {
    let mut runs: Vec<(u64, u32)> = Vec::with_capacity(extents.len().max(1));
    for extent in extents {
        let flags = match extent.allocation {
            Allocation::Data => 0,
            Allocation::Zero => allocation::ZERO,
            Allocation::Hole => allocation::ZERO | allocation::HOLE,
        };
        match runs.last_mut() {
            Some(last) if last.1 == flags => last.0 += extent.length,
            _ => runs.push((extent.length, flags)),
        }
    }
    if runs.is_empty() {
        // The protocol asks for one run at least, and allows to call anything data.
        runs.push((u64::from(length), 0));
    }
    runs.truncate(limit);
    let payload_bytes = 4 + runs.len() * StatusDescriptor::BYTES;
    let header = chunk_header(cookie, chunk::BLOCK_STATUS, true, payload_bytes);
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(U32::new(allocation::CONTEXT).as_bytes());
    for (run_bytes, flags) in runs {
        let run_bytes = u32::try_from(run_bytes.min(u64::from(length))).expect("32 bits");
        let descriptor = StatusDescriptor { length: U32::new(run_bytes), flags: U32::new(flags) };
        out.extend_from_slice(descriptor.as_bytes());
    }
}

/// Whether the connection ends in place of an error. A client of simple replies is a kernel: an
/// error that only means "not here" would fail a write of its file system, where a lost connection
/// lets whoever keeps the device go elsewhere and send the request again.
pub(super) fn hangs_up(error: Errno, structured_replies: bool) -> bool {
    error == Errno::Eshutdown && !structured_replies
}
