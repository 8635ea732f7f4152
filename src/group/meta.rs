//! The group's small metadata: one file of two slots, written in turn, so that one of them is whole
//! whatever a crash does.
//!
//! All integers are little-endian. A slot is 4096 bytes; slot 1 begins at byte 4096. Of two whole
//! slots the one with the higher sequence counts.
//!
//! | offset | size | field | meaning |
//! | ---: | ---: | --- | --- |
//! | 0 | 8 | `magic` | `TIDEMETA` |
//! | 8 | 4 | `version` | 3 |
//! | 12 | 4 | `flags` | bits from 1 up, in the order of the constants below |
//! | 16 | 8 | `sequence` | grows by one with every write |
//! | 24 | 16 | `group` | the group's id |
//! | 40 | 8 | `segment_bytes` | bytes of a segment |
//! | 48 | 8 | `fold_target` | up to which a fold may have written to the base |
//! | 56 | 8 | `horizon` | up to which the base is complete |
//! | 64 | 8 | `durable` | a position that the log had on disk when this was written |
//! | 72 | 8 | `incarnation` | random, new at each start |
//! | 80 | 1 | `name_bytes` | length of the name |
//! | 81 | 63 | `name` | the group's name, zeros behind it |
//! | 144 | 8 | `boot` | the machine's boot in which the log was opened last; 0 unknown |
//! | 152 | 8 | `log_begin` | below it the log has nothing: the last image received |
//! | 160 | 8 | `births_from` | of what was born below it the base knows nothing |
//! | 168 | 16 | `split_from` | the node with which this one has a split brain; zeros for none |
//! | 184 | 8 | `reign` | the reign that this node began last, or was about to; zeros for none |
//! | 192 | 8 | `checksum` | xxh3-64 of the 192 bytes before |

use std::io::{self, IoSlice};
use std::mem::offset_of;
use std::path::Path;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::io::{Disk, DiskFile, OpenMode};
use crate::units::{EpochId, GroupId, Incarnation, Lsn, Name, NodeId};

/// The file's name.
pub(super) const META: &str = "meta";
/// Its name until the group was made to the end.
pub(super) const UNFINISHED_META: &str = "meta.new";

const MAGIC: [u8; 8] = *b"TIDEMETA";
const VERSION: u32 = 3;
const SLOT_BYTES: u64 = 4096;
const CHECKSUM_OFFSET: usize = 192;

const CLEAN: u32 = 1;
const RETIRED: u32 = 2;
const FAILED: u32 = 4;
const REIGN_DUE: u32 = 8;
const YIELDING: u32 = 16;
const MERGING: u32 = 32;
const OLD_LOG: u32 = 64;
const REIGNS: u32 = 128;

/// What the file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Meta {
    /// The group.
    pub group: GroupId,
    /// Its name.
    pub name: Name,
    /// Bytes of a segment.
    pub segment_bytes: u64,
    /// Up to which a fold may have written to the base.
    pub fold_target: Lsn,
    /// Up to which the base is complete.
    pub horizon: Lsn,
    /// A position that the log had on disk.
    pub durable: Lsn,
    /// New at each start.
    pub incarnation: Incarnation,
    /// The log was closed in order at `durable`.
    pub clean: bool,
    /// The last reign is this node's, its record was durable, and it has not given it up. The log
    /// alone cannot tell: it may be damaged before that record, or a copy that has come to a reign
    /// which this node once had.
    pub reigns: bool,
    /// The reign that this node began last, or was about to, before its record: where a crash came
    /// before `reigns` was written, the log tells by it whether it did. 0 where it has given it up.
    pub reign: EpochId,
    /// Replication was stopped here.
    pub retired: bool,
    /// A sync failed.
    pub failed: bool,
    /// Something of this node's reign was lost: it begins a new one before it appends anything.
    pub reign_due: bool,
    /// This node and this peer have both served as primary, and no operator has said who yields.
    pub split_from: Option<NodeId>,
    /// What is behind `durable` is leaving the log, for a peer's reign that goes on without it.
    pub yielding: bool,
    /// What is staged belongs to the image at the horizon, and is not all in the base yet.
    pub merging: bool,
    /// The segments are those of the log before an image was received.
    pub old_log: bool,
    /// The machine's boot in which the log was opened last, where that could be told.
    pub boot: Option<u64>,
    /// Below it the log has nothing, though its first segment begins there.
    pub log_begin: Lsn,
    /// The base does not know what changed before that.
    pub births_from: Lsn,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSlot {
    magic: [u8; 8],
    version: U32,
    flags: U32,
    sequence: U64,
    group: [u8; 16],
    segment_bytes: U64,
    fold_target: U64,
    horizon: U64,
    durable: U64,
    incarnation: U64,
    name_bytes: u8,
    name: [u8; 63],
    boot: U64,
    log_begin: U64,
    births_from: U64,
    split_from: [u8; 16],
    reign: U64,
    checksum: U64,
}

const _: () = {
    assert!(size_of::<RawSlot>() == 200);
    assert!(offset_of!(RawSlot, sequence) == 16);
    assert!(offset_of!(RawSlot, group) == 24);
    assert!(offset_of!(RawSlot, fold_target) == 48);
    assert!(offset_of!(RawSlot, incarnation) == 72);
    assert!(offset_of!(RawSlot, name_bytes) == 80);
    assert!(offset_of!(RawSlot, checksum) == CHECKSUM_OFFSET);
};

impl Meta {
    /// The bytes of a slot, without the zeros behind them.
    pub(super) fn encode(&self, sequence: u64) -> Vec<u8> {
        let mut name = [0; 63];
        name[..self.name.as_str().len()].copy_from_slice(self.name.as_str().as_bytes());
        let flags = [
            (self.clean, CLEAN),
            (self.retired, RETIRED),
            (self.failed, FAILED),
            (self.reign_due, REIGN_DUE),
            (self.yielding, YIELDING),
            (self.merging, MERGING),
            (self.old_log, OLD_LOG),
            (self.reigns, REIGNS),
        ];
        let mut raw = RawSlot {
            magic: MAGIC,
            version: VERSION.into(),
            flags: flags.iter().filter(|flag| flag.0).map(|flag| flag.1).sum::<u32>().into(),
            sequence: sequence.into(),
            group: self.group.0,
            segment_bytes: self.segment_bytes.into(),
            fold_target: self.fold_target.0.into(),
            horizon: self.horizon.0.into(),
            durable: self.durable.0.into(),
            incarnation: self.incarnation.0.into(),
            name_bytes: self.name.as_str().len() as u8,
            name,
            boot: self.boot.unwrap_or(0).into(),
            log_begin: self.log_begin.0.into(),
            births_from: self.births_from.0.into(),
            split_from: self.split_from.map_or([0; 16], |node| node.0),
            reign: self.reign.0.into(),
            checksum: 0.into(),
        };
        raw.checksum = xxh3_64(&raw.as_bytes()[..CHECKSUM_OFFSET]).into();
        raw.as_bytes().to_vec()
    }

    /// Sequence and contents of a slot, where it is whole and of this version.
    pub(super) fn decode(bytes: &[u8]) -> Option<(u64, Meta)> {
        let (raw, _) = RawSlot::ref_from_prefix(bytes).ok()?;
        let checksum = xxh3_64(&raw.as_bytes()[..CHECKSUM_OFFSET]);
        if raw.magic != MAGIC || raw.version.get() != VERSION || raw.checksum.get() != checksum {
            return None;
        }
        let name = raw.name.get(..usize::from(raw.name_bytes))?;
        let flags = raw.flags.get();
        let meta = Meta {
            group: GroupId(raw.group),
            name: std::str::from_utf8(name).ok()?.parse().ok()?,
            segment_bytes: raw.segment_bytes.get(),
            fold_target: Lsn(raw.fold_target.get()),
            horizon: Lsn(raw.horizon.get()),
            durable: Lsn(raw.durable.get()),
            incarnation: Incarnation(raw.incarnation.get()),
            clean: flags & CLEAN != 0,
            retired: flags & RETIRED != 0,
            failed: flags & FAILED != 0,
            reign_due: flags & REIGN_DUE != 0,
            split_from: (raw.split_from != [0; 16]).then_some(NodeId(raw.split_from)),
            yielding: flags & YIELDING != 0,
            merging: flags & MERGING != 0,
            old_log: flags & OLD_LOG != 0,
            reigns: flags & REIGNS != 0,
            reign: EpochId(raw.reign.get()),
            boot: Some(raw.boot.get()).filter(|boot| *boot != 0),
            log_begin: Lsn(raw.log_begin.get()),
            births_from: Lsn(raw.births_from.get()),
        };
        Some((raw.sequence.get(), meta))
    }
}

/// An error after which nobody knows what the file says.
fn either(cause: &io::Error) -> io::Error {
    io::Error::other(cause.to_string())
}

/// The open file, with what it says.
pub(super) struct MetaFile {
    file: Arc<dyn DiskFile>,
    sequence: u64,
    /// What the file says.
    pub meta: Meta,
}

impl MetaFile {
    /// Makes the file; the directory is synced by the caller.
    pub(super) fn create(disk: &dyn Disk, path: &Path, meta: Meta) -> io::Result<MetaFile> {
        let file = disk.open(path, OpenMode::Create)?;
        // No later write needs room for a slot.
        file.write_at(&[IoSlice::new(&[0; 2 * SLOT_BYTES as usize])], 0)?;
        let mut meta_file = MetaFile { file, sequence: 0, meta };
        meta_file.store()?;
        Ok(meta_file)
    }

    /// Opens the file; `Ok(None)` where no slot is whole.
    pub(super) fn open(disk: &dyn Disk, path: &Path) -> io::Result<Option<MetaFile>> {
        let file = disk.open(path, OpenMode::ReadWrite)?;
        let mut best: Option<(u64, Meta)> = None;
        for slot in 0..2 {
            let mut bytes = vec![0; SLOT_BYTES as usize];
            if file.read_at(&mut bytes, slot * SLOT_BYTES).is_ok()
                && let Some(found) = Meta::decode(&bytes)
                && best.as_ref().is_none_or(|best| best.0 < found.0)
            {
                best = Some(found);
            }
        }
        Ok(best.map(|(sequence, meta)| MetaFile { file, sequence, meta }))
    }

    /// Makes durable what the file says, before anything is done by it: a process that was killed
    /// may have left it in the cache alone, or a sync that failed. It is written where it stands,
    /// since the other slot may be the only one that is durable.
    pub(super) fn settle(&self) -> io::Result<()> {
        self.write(self.sequence)
    }

    /// Changes the contents and makes them durable. A change that changes nothing writes nothing.
    ///
    /// # Errors
    ///
    /// After `StorageFull` the file says what it said before; after any other error it may say
    /// either.
    pub(super) fn update(&mut self, change: impl FnOnce(&mut Meta)) -> io::Result<()> {
        let before = self.meta.clone();
        change(&mut self.meta);
        if self.meta == before {
            return Ok(());
        }
        self.store().inspect_err(|_| self.meta = before)
    }

    /// After a failed write the same slot is written again: it may be torn, the other is whole.
    fn store(&mut self) -> io::Result<()> {
        self.write(self.sequence + 1)?;
        self.sequence += 1;
        Ok(())
    }

    /// Writes the contents under a number, which tells the slot.
    fn write(&self, sequence: u64) -> io::Result<()> {
        let slot = (sequence + 1) % 2;
        let mut bytes = self.meta.encode(sequence);
        bytes.resize(SLOT_BYTES as usize, 0);
        if let Err(cause) = self.file.write_at(&[IoSlice::new(&bytes)], slot * SLOT_BYTES) {
            let mut found = [0; size_of::<RawSlot>()];
            let read = self.file.read_at(&mut found, slot * SLOT_BYTES);
            let is_as_before = read.is_ok() && !bytes.starts_with(&found);
            return Err(if is_as_before { cause } else { either(&cause) });
        }
        self.file.sync().map_err(|cause| either(&cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::MemoryDisk;

    fn a_meta() -> Meta {
        Meta {
            group: GroupId([0xab; 16]),
            name: "g".parse().unwrap(),
            segment_bytes: 65536,
            fold_target: Lsn(4096),
            horizon: Lsn(2048),
            durable: Lsn(8192),
            incarnation: Incarnation(0x3132_3334_3536_3738),
            clean: true,
            reigns: true,
            reign: EpochId(0x0102_0304_0506_0708),
            retired: false,
            failed: true,
            reign_due: true,
            split_from: Some(NodeId([0xcd; 16])),
            yielding: true,
            merging: true,
            old_log: false,
            boot: Some(0x0807_0605_0403_0201),
            log_begin: Lsn(1024),
            births_from: Lsn(1536),
        }
    }

    /// What one process wrote and did not sync, the next one settles, and the power fails in that.
    #[test]
    fn what_is_settled_is_there_before_and_after_whatever_the_power_takes() {
        let (dir, path) = (Path::new("/g"), Path::new("/g/meta"));
        let disk = MemoryDisk::new();
        disk.create_dir(dir).unwrap();
        let mut file = MetaFile::create(&disk, path, a_meta()).unwrap();
        disk.sync_dir(dir).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        file.update(|meta| meta.horizon = Lsn(4096)).unwrap();
        disk.record();
        file.update(|meta| meta.horizon = Lsn(8192)).unwrap();
        let mut seen = [0, 0];
        for killed in disk.take_recorded() {
            killed.record();
            let found = MetaFile::open(&killed, path).unwrap().expect("a slot is whole");
            found.settle().unwrap();
            let stopped = killed.take_recorded();
            for seed in 0..50 {
                for stopped in &stopped {
                    let after = MetaFile::open(&stopped.crash(seed), path).unwrap();
                    let horizon = after.expect("a slot is whole").meta.horizon;
                    assert!([4096, 8192].contains(&horizon.0), "{horizon}");
                    seen[usize::from(horizon == found.meta.horizon)] += 1;
                }
                let after = MetaFile::open(&killed.crash(seed), path).unwrap();
                assert_eq!(after.expect("a slot is whole").meta, found.meta);
            }
        }
        assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
    }

    #[test]
    fn the_bytes_of_a_slot_are_these() {
        let golden = hex::decode(concat!(
            // magic
            "544944454d455441",
            // version
            "03000000",
            // flags: clean, failed, reign due, split brain, yielding, merging, reigns
            "bd000000",
            // sequence
            "0900000000000000",
            // group
            "abababababababababababababababab",
            // segment_bytes
            "0000010000000000",
            // fold_target
            "0010000000000000",
            // horizon
            "0008000000000000",
            // durable
            "0020000000000000",
            // incarnation
            "3837363534333231",
            // name_bytes
            "01",
            // name
            "67000000000000000000000000000000000000000000000000000000000000000000000000000000",
            "0000000000000000000000000000000000000000000000",
            // boot
            "0102030405060708",
            // log_begin
            "0004000000000000",
            // births_from
            "0006000000000000",
            // split_from
            "cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd",
            // reign
            "0807060504030201",
            // checksum
            "c778315830749fa1",
        ))
        .unwrap();
        let meta = a_meta();
        assert_eq!(hex::encode(meta.encode(9)), hex::encode(&golden));
        assert_eq!(Meta::decode(&golden), Some((9, meta)));
        for bit in 0..golden.len() * 8 {
            let mut changed = golden.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Meta::decode(&changed), None, "bit {bit}");
        }
    }
}
