//! The prefix oracle: a stream of stamped blocks over two volumes in one order, and the check that
//! an image is exactly one prefix of it.
//!
//! Write number n goes to a place that follows from n alone, and carries n, its place and a
//! checksum. One writer sends them in order and waits for each answer, so an image is right if and
//! only if there is a k such that every place holds the last write to it up to k, and nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use tidelog::nbd::{Client, NbdAddress};

/// Bytes of a stamped block.
pub const STAMP_BYTES: u64 = 4096;
const MAGIC: &[u8; 8] = b"TIDESTMP";
const CRC_OFFSET: usize = STAMP_BYTES as usize - 4;
/// Writes between two rests of the writer, so that the demo's machine is not all it.
const BURST: u64 = 64;
const REST: Duration = Duration::from_millis(10);

/// Where stamps go: per volume its name, the first byte and the number of blocks.
#[derive(Clone, Debug)]
pub struct Field {
    /// Volumes, in the order in which writes go round.
    pub areas: Vec<Area>,
}

/// A part of a volume that stamps fill.
#[derive(Clone, Debug)]
pub struct Area {
    /// NBD export of the volume.
    pub export: String,
    /// First byte.
    pub offset: u64,
    /// Blocks of [`STAMP_BYTES`].
    pub blocks: u64,
}

impl Field {
    /// Area and block of a write.
    fn place(&self, number: u64) -> (usize, u64) {
        let count = self.areas.len() as u64;
        let area = usize::try_from(number % count).expect("few areas");
        (area, mix(number) % self.areas[area].blocks)
    }

    /// Checks what each area holds; the number of the last write in it.
    ///
    /// # Errors
    ///
    /// Where it is not a prefix of the stream.
    pub fn prefix(&self, contents: &[Vec<u8>]) -> anyhow::Result<u64> {
        let block_bytes = STAMP_BYTES as usize;
        let mut found = Vec::new();
        for (area, bytes) in contents.iter().enumerate() {
            for (index, block) in bytes.chunks(block_bytes).enumerate() {
                let number = read(block, area, index as u64)
                    .with_context(|| format!("{} block {index}", self.areas[area].export))?;
                found.push(((area, index as u64), number));
            }
        }
        let last = found.iter().map(|(_, number)| *number).max().unwrap_or(0);
        let mut expected = std::collections::HashMap::new();
        for number in 1..=last {
            expected.insert(self.place(number), number);
        }
        for (place, number) in found {
            let wanted = expected.get(&place).copied().unwrap_or(0);
            ensure!(
                number == wanted,
                "{} block {}: holds write {number}, but an image up to write {last} holds {wanted}",
                self.areas[place.0].export,
                place.1
            );
        }
        Ok(last)
    }

    /// Reads every area by the exports that `rename` makes of their names.
    ///
    /// # Errors
    ///
    /// Where an export cannot be read.
    pub fn read(
        &self,
        server: &NbdAddress,
        rename: impl Fn(&str) -> String,
    ) -> anyhow::Result<Vec<Vec<u8>>> {
        self.areas
            .iter()
            .map(|area| {
                let mut client = Client::connect(server, &rename(&area.export))?;
                let mut bytes = vec![0; usize::try_from(area.blocks * STAMP_BYTES)?];
                client.read(area.offset, &mut bytes)?;
                client.disconnect()?;
                Ok(bytes)
            })
            .collect()
    }
}

/// A bijection of 64-bit numbers that looks random (splitmix64).
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The block of a write.
fn stamp(number: u64, area: usize, block: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(STAMP_BYTES as usize);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(&(area as u64).to_le_bytes());
    bytes.extend_from_slice(&block.to_le_bytes());
    let mut filler = number;
    while bytes.len() < CRC_OFFSET {
        filler = mix(filler);
        let left = CRC_OFFSET - bytes.len();
        bytes.extend_from_slice(&filler.to_le_bytes()[..left.min(8)]);
    }
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

/// The number of the write that a block holds; 0 where it was never written.
fn read(bytes: &[u8], area: usize, block: u64) -> anyhow::Result<u64> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(0);
    }
    ensure!(bytes.len() == STAMP_BYTES as usize, "has {} bytes", bytes.len());
    ensure!(bytes.starts_with(MAGIC), "holds no stamp");
    let number = u64::from_le_bytes(bytes[8..16].try_into()?);
    ensure!(
        bytes == stamp(number, area, block),
        "the stamp of write {number} is torn or misplaced"
    );
    Ok(number)
}

/// A thread that writes stamps until it is told to stop.
pub struct Writer {
    answered: Arc<AtomicU64>,
    stop: mpsc::Sender<()>,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Writer {
    /// Goes on after write `from`.
    ///
    /// # Errors
    ///
    /// Where an export cannot be opened.
    pub fn start(server: &NbdAddress, field: &Field, from: u64) -> anyhow::Result<Writer> {
        let mut clients = Vec::new();
        for area in &field.areas {
            clients.push(Client::connect(server, &area.export)?);
        }
        let answered = Arc::new(AtomicU64::new(from));
        let (stop, stopped) = mpsc::channel();
        let (field, counter) = (field.clone(), Arc::clone(&answered));
        let thread = std::thread::spawn(move || {
            for number in from + 1.. {
                let (area, block) = field.place(number);
                let offset = field.areas[area].offset + block * STAMP_BYTES;
                clients[area].write(offset, &stamp(number, area, block))?;
                counter.store(number, Ordering::SeqCst);
                if number % BURST == 0 {
                    match stopped.recv_timeout(REST) {
                        Err(RecvTimeoutError::Timeout) => {}
                        Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
                    }
                }
            }
            for mut client in clients {
                client.flush()?;
                client.disconnect()?;
            }
            Ok(())
        });
        Ok(Writer { answered, stop, thread })
    }

    /// The last write that was answered.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::SeqCst)
    }

    /// Stops after a burst and flushes; the last write.
    ///
    /// # Errors
    ///
    /// Where a write or the flush failed.
    pub fn stop(self) -> anyhow::Result<u64> {
        let _ = self.stop.send(());
        match self.thread.join() {
            Ok(result) => result.context("the stream of stamped blocks")?,
            Err(_) => bail!("the stream of stamped blocks: its thread panicked"),
        }
        Ok(self.answered.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field() -> Field {
        let area = |export: &str| Area { export: export.to_owned(), offset: 0, blocks: 32 };
        Field { areas: vec![area("one"), area("two")] }
    }

    fn after(field: &Field, writes: impl Iterator<Item = u64>) -> Vec<Vec<u8>> {
        let mut contents = vec![vec![0; 32 * STAMP_BYTES as usize]; 2];
        for number in writes {
            let (area, block) = field.place(number);
            let at = (block * STAMP_BYTES) as usize;
            contents[area][at..at + STAMP_BYTES as usize]
                .copy_from_slice(&stamp(number, area, block));
        }
        contents
    }

    #[test]
    fn every_prefix_is_accepted() {
        let field = field();
        for last in [0, 1, 7, 100, 1000] {
            assert_eq!(field.prefix(&after(&field, 1..=last)).unwrap(), last);
        }
    }

    #[test]
    fn a_lost_write_a_torn_block_and_a_swapped_one_are_refused() {
        let field = field();
        let lost = after(&field, (1..=100).filter(|number| *number != 90));
        assert!(field.prefix(&lost).is_err());
        let mut torn = after(&field, 1..=100);
        let (area, block) = field.place(100);
        let at = (block * STAMP_BYTES) as usize;
        torn[area][at + 2048..at + 4096].fill(7);
        assert!(field.prefix(&torn).is_err());
        let mut swapped = after(&field, 1..=100);
        swapped.swap(0, 1);
        assert!(field.prefix(&swapped).is_err());
    }
}
