//! Batched reads: one system call for all reads of a wake-up, through a small io_uring per thread.

use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use io_uring::{IoUring, opcode, types};

use super::disk::BatchRead;

/// Entries of a thread's ring; larger batches go in parts.
const ENTRIES: u32 = 64;

/// What is known about io_uring on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UringState {
    /// No ring was made yet.
    Untried,
    /// Batches go through it.
    InUse,
    /// The kernel, a container or a policy forbids it: reads go one after the other.
    Forbidden,
}

impl UringState {
    /// The word for status.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            UringState::Untried => "untried",
            UringState::InUse => "in-use",
            UringState::Forbidden => "forbidden",
        }
    }
}

static STATE: AtomicU8 = AtomicU8::new(0);

thread_local! {
    static RING: RefCell<Option<IoUring>> = const { RefCell::new(None) };
}

/// What is known about io_uring; makes a ring on this thread to find out where nobody has yet.
#[must_use]
pub fn read_uring_state() -> UringState {
    if STATE.load(Ordering::Relaxed) == 0 {
        RING.with_borrow_mut(|ring| {
            make(ring);
        });
    }
    match STATE.load(Ordering::Relaxed) {
        0 => UringState::Untried,
        1 => UringState::InUse,
        _ => UringState::Forbidden,
    }
}

/// Whether an error is this moment's trouble (a signal, no descriptors, no memory) rather than a
/// prohibition.
fn is_passing(error: &io::Error) -> bool {
    use nix::libc::{EAGAIN, EBUSY, EINTR, EMFILE, ENFILE, ENOMEM};
    matches!(error.raw_os_error(), Some(EAGAIN | EBUSY | EINTR | EMFILE | ENFILE | ENOMEM))
}

/// Makes the thread's ring where there is none; whether there is one now.
fn make(ring: &mut Option<IoUring>) -> bool {
    if ring.is_some() {
        return true;
    }
    match IoUring::new(ENTRIES) {
        Ok(made) => {
            STATE.store(1, Ordering::Relaxed);
            *ring = Some(made);
            true
        }
        Err(error) => {
            if !is_passing(&error) {
                STATE.store(2, Ordering::Relaxed);
            }
            false
        }
    }
}

/// Runs the reads through the thread's ring. False where there is none, or one of the files has no
/// descriptor: then nothing was done.
pub fn read_batch(reads: &mut [BatchRead<'_>]) -> bool {
    if STATE.load(Ordering::Relaxed) == 2 || reads.iter().any(|read| read.file.raw_fd().is_none()) {
        return false;
    }
    RING.with(|cell| {
        let Ok(mut slot) = cell.try_borrow_mut() else { return false };
        if !make(&mut slot) {
            return false;
        }
        for part in reads.chunks_mut(ENTRIES as usize) {
            let healthy = slot.as_mut().is_some_and(|ring| run(ring, part));
            if !healthy {
                // The kernel has none of the entries, so the buffers are ours again.
                *slot = None;
                for read in part {
                    read.result = read.file.read_at(read.buffer, read.offset);
                }
                make(&mut slot);
            }
        }
        true
    })
}

/// Runs at most [`ENTRIES`] reads; false where the ring itself failed before it took any.
fn run(ring: &mut IoUring, reads: &mut [BatchRead<'_>]) -> bool {
    let mut outstanding = 0;
    for (index, read) in reads.iter_mut().enumerate() {
        let Some(fd) = read.file.raw_fd() else { continue };
        let length = u32::try_from(read.buffer.len()).unwrap_or(u32::MAX);
        let entry = opcode::Read::new(types::Fd(fd), read.buffer.as_mut_ptr(), length)
            .offset(read.offset)
            .build()
            .user_data(index as u64);
        // SAFETY: buffer and file outlive the entry: this function returns only when every entry
        // has completed, or when the kernel has taken none of them.
        if unsafe { ring.submission().push(&entry) }.is_err() {
            return false;
        }
        outstanding += 1;
    }
    while outstanding > 0 {
        match ring.submit_and_wait(outstanding) {
            Ok(_) => {}
            Err(_) if ring.submission().len() == reads.len() => return false,
            Err(error) if is_passing(&error) => {}
            // Entries are in flight into buffers that the caller would free, and the kernel will
            // not say when they end: nothing that follows would be safe.
            Err(_) => std::process::abort(),
        }
        for completion in ring.completion() {
            outstanding -= 1;
            let index = completion.user_data() as usize;
            let read = &mut reads[index];
            read.result = finish(read, completion.result());
        }
    }
    true
}

/// Turns a completion into a result; what the ring read only in part is read to its end here.
fn finish(read: &mut BatchRead<'_>, result: i32) -> io::Result<()> {
    let bytes = match usize::try_from(result) {
        Ok(bytes) => bytes,
        Err(_) if matches!(-result, nix::libc::EAGAIN | nix::libc::EINTR) => 0,
        Err(_) => return Err(io::Error::from_raw_os_error(-result)),
    };
    if bytes >= read.buffer.len() {
        return Ok(());
    }
    read.file.read_at(&mut read.buffer[bytes..], read.offset + bytes as u64)
}
