//! A device in memory, for tests, fuzzing and measuring the protocol without the engine.

use std::any::Any;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::export::{Device, ExportInfo, Exports, Refusal};
use crate::group::{Allocation, Done, Extent, GroupError, HangUp, Op, Read, Request};
use crate::units::{Lsn, VolumeNumber};

/// Bytes that a [`RamDevice`] tells apart in its extents.
const GRAIN_BYTES: u64 = 512;

/// A device in memory. Flushes end when [`RamDevice::complete_flushes`] is called, or at once where
/// that was asked for.
pub struct RamDevice {
    info: ExportInfo,
    content: Mutex<Content>,
    head: AtomicU64,
    clients: Arc<AtomicUsize>,
    waiting: Mutex<Option<Vec<Done>>>,
}

struct Content {
    bytes: Vec<u8>,
    holes: Vec<Allocation>,
}

impl RamDevice {
    /// A device of `size_bytes` zeros.
    #[must_use]
    pub fn new(name: &str, size_bytes: u64, read_only: bool) -> RamDevice {
        let info = ExportInfo {
            name: name.to_owned(),
            description: "memory".to_owned(),
            size_bytes,
            read_only,
        };
        let bytes = usize::try_from(size_bytes).expect("it fits in memory");
        let grains = usize::try_from(size_bytes.div_ceil(GRAIN_BYTES)).expect("it fits in memory");
        RamDevice {
            info,
            content: Mutex::new(Content {
                bytes: vec![0; bytes],
                holes: vec![Allocation::Hole; grains],
            }),
            head: AtomicU64::new(0),
            clients: Arc::default(),
            waiting: Mutex::new(None),
        }
    }

    /// Holds flushes back from now on, until [`RamDevice::complete_flushes`].
    pub fn hold_flushes(&self) {
        self.waiting.lock().expect("no holder panics").get_or_insert_default();
    }

    /// Ends the flushes held back with `result`; how many there were.
    pub fn complete_flushes(&self, result: &Result<(), GroupError>) -> usize {
        let held = self.waiting.lock().expect("no holder panics").as_mut().map(std::mem::take);
        let held = held.unwrap_or_default();
        let count = held.len();
        for done in held {
            done(result.clone());
        }
        count
    }

    /// Clients now.
    pub fn clients(&self) -> usize {
        self.clients.load(Ordering::SeqCst)
    }

    /// A copy of the content.
    pub fn content(&self) -> Vec<u8> {
        self.content.lock().expect("no holder panics").bytes.clone()
    }

    fn outside(&self, offset: u64, length: u64) -> Option<GroupError> {
        let end = offset.checked_add(length);
        end.is_none_or(|end| end > self.info.size_bytes).then(|| GroupError::OutOfRange {
            group: "ram".parse().expect("a name"),
            offset,
            length,
        })
    }
}

struct Client(Arc<AtomicUsize>);

impl Drop for Client {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[expect(clippy::cast_possible_truncation, reason = "offsets are inside of memory")]
fn span(offset: u64, length: u64) -> std::ops::Range<usize> {
    offset as usize..(offset + length) as usize
}

impl Device for RamDevice {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn volume(&self) -> VolumeNumber {
        VolumeNumber(1)
    }

    fn attach(&self, _address: &str, _hang_up: HangUp) -> Result<Box<dyn Any + Send>, GroupError> {
        self.clients.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Client(Arc::clone(&self.clients))))
    }

    fn append(
        &self,
        requests: &[Request<'_>],
        _ended: &dyn Fn() -> bool,
    ) -> Vec<Result<Lsn, GroupError>> {
        let mut content = self.content.lock().expect("no holder panics");
        let mut append = |request: &Request<'_>| {
            let (offset, length, allocation) = match request.op {
                Op::Write { offset, data } => (offset, data.len() as u64, Allocation::Data),
                Op::Zero { offset, length, no_hole: true } => (offset, length, Allocation::Zero),
                Op::Zero { offset, length, .. } | Op::Trim { offset, length } => {
                    (offset, length, Allocation::Hole)
                }
                Op::Flush => (0, 0, Allocation::Data),
            };
            if let Some(error) = self.outside(offset, length) {
                return Err(error);
            }
            if length > 0 {
                let target = &mut content.bytes[span(offset, length)];
                match request.op {
                    Op::Write { data, .. } => target.copy_from_slice(data),
                    _ => target.fill(0),
                }
                let first = offset / GRAIN_BYTES;
                let grains = (offset + length).div_ceil(GRAIN_BYTES) - first;
                // A grain that is zeroed in part may still hold bytes.
                let whole = offset % GRAIN_BYTES == 0 && length % GRAIN_BYTES == 0;
                let allocation = if whole { allocation } else { Allocation::Data };
                content.holes[span(first, grains)].fill(allocation);
            }
            Ok(Lsn(self.head.fetch_add(1, Ordering::SeqCst) + 1))
        };
        requests.iter().map(&mut append).collect()
    }

    fn when_durable(&self, _lsn: Lsn, done: Done) {
        let mut waiting = self.waiting.lock().expect("no holder panics");
        if let Some(waiting) = &mut *waiting {
            waiting.push(done);
        } else {
            drop(waiting);
            done(Ok(()));
        }
    }

    fn read(&self, reads: &mut [Read<'_>]) {
        let content = self.content.lock().expect("no holder panics");
        for read in reads {
            let length = read.buffer.len() as u64;
            read.result = match self.outside(read.offset, length) {
                Some(error) => Err(error),
                None => {
                    read.buffer.copy_from_slice(&content.bytes[span(read.offset, length)]);
                    Ok(())
                }
            };
        }
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, GroupError> {
        if let Some(error) = self.outside(offset, length) {
            return Err(error);
        }
        let content = self.content.lock().expect("no holder panics");
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = offset;
        while at < offset + length {
            let end = ((at / GRAIN_BYTES + 1) * GRAIN_BYTES).min(offset + length);
            let allocation = content.holes[span(at / GRAIN_BYTES, 1)][0];
            let full = extents.len() == limit;
            match extents.last_mut() {
                Some(last) if last.allocation == allocation => last.length += end - at,
                _ if full => break,
                _ => extents.push(Extent { offset: at, length: end - at, allocation }),
            }
            at = end;
        }
        Ok(extents)
    }
}

/// Devices in memory as exports; the first is the default.
pub struct RamExports(pub Vec<Arc<RamDevice>>);

impl Exports for RamExports {
    fn list(&self) -> Vec<ExportInfo> {
        self.0.iter().map(|device| device.info()).collect()
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Device>, Refusal> {
        self.0
            .iter()
            .find(|device| name.is_empty() || device.info.name == name)
            .map(|device| Arc::clone(device) as Arc<dyn Device>)
            .ok_or_else(|| Refusal::Unknown(format!("export `{name}`: does not exist")))
    }
}
