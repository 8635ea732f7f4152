//! One volume's image at the horizon: a sparse file, and its sidecar.

use std::collections::BTreeSet;
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::io::{BatchRead, Disk, DiskFile, OpenMode};
use crate::units::{BLOCK_BYTES, CHUNK_BYTES, Lsn, SECTOR_BYTES, VolumeNumber};

use super::sidecar::{self, BLOCKS_PER_CHUNK, SLOT_BYTES, SUMS_BYTES, Slot};

/// Bytes of a block, as a length.
const BLOCK: usize = BLOCK_BYTES as usize;

/// What failed in the base.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BaseError {
    /// A block is not what was folded.
    #[error(
        "base of volume {volume}: block at {offset}: checksum: got {got:08x}, expected {expected:08x}"
    )]
    Damaged {
        /// The volume.
        volume: VolumeNumber,
        /// The block's first byte in the volume.
        offset: u64,
        /// What the block's bytes have.
        got: u32,
        /// What the sidecar says.
        expected: u32,
    },
    /// The sidecar of a chunk is torn or damaged.
    #[error("base of volume {volume}: sidecar of the chunk at {offset}: its checksum is wrong")]
    Sidecar {
        /// The volume.
        volume: VolumeNumber,
        /// The chunk's first byte in the volume.
        offset: u64,
    },
    /// Blocks, or the sums of them, cannot be read.
    #[error("base of volume {volume}: read of {length} bytes at {offset}: {cause}")]
    Unread {
        /// The volume.
        volume: VolumeNumber,
        /// The first byte in the volume.
        offset: u64,
        /// Bytes.
        length: u64,
        /// What the disk said.
        cause: String,
    },
    /// A file could not be read or written.
    #[error("base of volume {volume}: {what}: {cause}")]
    Io {
        /// The volume.
        volume: VolumeNumber,
        /// What was tried.
        what: &'static str,
        /// What the disk said.
        cause: String,
    },
}

/// One read of a batch.
pub struct BaseRead<'a> {
    /// The volume to read.
    pub base: &'a BaseVolume,
    /// First byte, any alignment.
    pub offset: u64,
    /// Filled completely, or `result` is an error. What lies beyond the base's end reads as zeros.
    pub buffer: &'a mut [u8],
    /// How it went. `Ok` before the batch runs.
    pub result: Result<(), BaseError>,
}

/// One volume's image at the horizon.
pub struct BaseVolume {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    number: VolumeNumber,
    pub(super) image: Arc<dyn DiskFile>,
    pub(super) sums: Arc<dyn DiskFile>,
    size_bytes: AtomicU64,
    folder: Mutex<Option<OpenChunk>>,
}

/// The chunk that the folder is at: its sums and slot, written when it goes on.
pub(super) struct OpenChunk {
    chunk: u64,
    pub(super) slot: Slot,
    pub(super) sums: Box<[u8; SUMS_BYTES]>,
    /// What it needs of the sidecar is no hole.
    reserved: bool,
}

pub(super) fn image_path(dir: &Path, number: VolumeNumber) -> PathBuf {
    dir.join(format!("{number}.img"))
}

pub(super) fn sums_path(dir: &Path, number: VolumeNumber) -> PathBuf {
    dir.join(format!("{number}.sum"))
}

fn check_size(size_bytes: u64) {
    assert!(size_bytes.is_multiple_of(BLOCK_BYTES), "a volume of {size_bytes} bytes");
}

impl BaseVolume {
    /// Makes the base of a new volume, all holes. It is durable on return; what an earlier attempt
    /// left under its name is replaced. The sidecar takes its name last: after a crash the base is
    /// there as a whole, or [`BaseVolume::open`] does not find it.
    pub fn create(
        disk: Arc<dyn Disk>,
        dir: &Path,
        number: VolumeNumber,
        size_bytes: u64,
    ) -> io::Result<BaseVolume> {
        check_size(size_bytes);
        let path = sums_path(dir, number);
        let new_path = path.with_extension("sum.new");
        let image = disk.open(&image_path(dir, number), OpenMode::Create)?;
        let sums = disk.open(&new_path, OpenMode::Create)?;
        for (file, bytes) in [(&image, size_bytes), (&sums, sidecar::file_bytes(size_bytes))] {
            file.set_len(0)?;
            file.set_len(bytes)?;
        }
        sums.write_at(&[IoSlice::new(&sidecar::encode_header(number))], 0)?;
        image.sync()?;
        sums.sync()?;
        disk.sync_dir(dir)?;
        disk.rename(&new_path, &path)?;
        disk.sync_dir(dir)?;
        Ok(BaseVolume::of(disk, dir, number, image, sums, size_bytes))
    }

    /// Opens the base of a volume; `NotFound` where it was never made, or not to the end. A header
    /// of the sidecar that has rotted is written anew.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path, number: VolumeNumber) -> io::Result<BaseVolume> {
        let path = sums_path(dir, number);
        let sums = disk.open(&path, OpenMode::ReadWrite)?;
        let image = disk.open(&image_path(dir, number), OpenMode::ReadWrite)?;
        let mut header = [0; 16];
        let whole = sums.read_at(&mut header, 0).is_ok()
            && sidecar::is_header_whole(&header, number).map_err(|cause| {
                io::Error::new(io::ErrorKind::InvalidData, format!("{}: {cause}", path.display()))
            })?;
        if !whole {
            // Nothing hangs on it. All of its page, since no part of an unreadable one can be
            // written.
            let mut page = [0; sidecar::HEADER_BYTES as usize];
            page[..16].copy_from_slice(&sidecar::encode_header(number));
            sums.write_at(&[IoSlice::new(&page)], 0)?;
            sums.sync()?;
        }
        let size_bytes = image.len()?;
        if sums.len()? < sidecar::file_bytes(size_bytes) {
            // A resize that did not get to its sync; it will be done again.
            sums.set_len(sidecar::file_bytes(size_bytes))?;
        }
        Ok(BaseVolume::of(disk, dir, number, image, sums, size_bytes))
    }

    /// Moves the files of a volume from one directory to another, in the place of what is there,
    /// and opens them; durable on return. After a crash in the middle it is called again.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn take_over(
        disk: &Arc<dyn Disk>,
        from: &Path,
        to: &Path,
        number: VolumeNumber,
    ) -> io::Result<BaseVolume> {
        for path in [image_path, sums_path] {
            if disk.exists(&path(from, number))? {
                disk.rename(&path(from, number), &path(to, number))?;
            }
        }
        disk.sync_dir(to)?;
        disk.sync_dir(from)?;
        BaseVolume::open(disk.clone(), to, number)
    }

    /// The numbers of which files are in a directory.
    ///
    /// # Errors
    ///
    /// What the disk says.
    pub fn numbers(disk: &dyn Disk, dir: &Path) -> io::Result<BTreeSet<VolumeNumber>> {
        let names = disk.list(dir)?;
        let number = |name: &String| {
            let stem = name.strip_suffix(".img").or_else(|| name.strip_suffix(".sum"))?;
            Some(VolumeNumber(stem.parse().ok()?))
        };
        Ok(names.iter().filter_map(number).collect())
    }

    fn of(
        disk: Arc<dyn Disk>,
        dir: &Path,
        number: VolumeNumber,
        image: Arc<dyn DiskFile>,
        sums: Arc<dyn DiskFile>,
        size_bytes: u64,
    ) -> BaseVolume {
        BaseVolume {
            disk,
            dir: dir.to_owned(),
            number,
            image,
            sums,
            size_bytes: AtomicU64::new(size_bytes),
            folder: Mutex::new(None),
        }
    }

    /// The volume's number.
    #[must_use]
    pub fn number(&self) -> VolumeNumber {
        self.number
    }

    /// The base's size in bytes; it follows the volume's when a fold passes the resize.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// Gives the base another size, a multiple of 4096. What is cut off reads as zeros should it
    /// grow again. For the folder; durable with the next [`BaseVolume::sync`], and to be called
    /// again after a crash or an error before that, also where the size is the same.
    pub fn resize(&self, size_bytes: u64) -> io::Result<()> {
        check_size(size_bytes);
        let mut folder = self.folder();
        self.close_chunk(&mut folder)?;
        self.image.set_len(size_bytes)?;
        let sums_bytes = sidecar::file_bytes(size_bytes);
        self.sums.set_len(sums_bytes)?;
        // The last region's sums and slots beyond the end go.
        let (block, chunk) = (size_bytes / BLOCK_BYTES, size_bytes.div_ceil(CHUNK_BYTES));
        if !size_bytes.is_multiple_of(CHUNK_BYTES) {
            let mut open = self.read_chunk(size_bytes / CHUNK_BYTES)?;
            if open.slot.is_written() && open.slot.birth == Lsn::ZERO {
                // The slot is bad, and nothing is folded here that would say when it was born.
                open.slot.birth = Lsn(Lsn::MAX.0 - 1);
            }
            open.sums[(block as usize % BLOCKS_PER_CHUNK) * 4..].fill(0);
            self.write_chunk(&mut open)?;
        }
        if !chunk.is_multiple_of(sidecar::CHUNKS_PER_REGION) {
            let slots = sidecar::slot_offset(chunk);
            let slots_end = slots / sidecar::REGION_BYTES * sidecar::REGION_BYTES;
            let slots_end = slots_end + sidecar::HEADER_BYTES + sidecar::SLOTS_BYTES;
            self.sums.punch_hole(slots, slots_end - slots)?;
            let first = sidecar::sum_offset(chunk * BLOCKS_PER_CHUNK as u64);
            self.sums.punch_hole(first, sums_bytes - first)?;
        }
        // Last: after an error the size still differs from the volume's, and it is done again.
        self.size_bytes.store(size_bytes, Ordering::Release);
        Ok(())
    }

    /// Fills `buffer` from `offset`, any alignment; every block that it touches is checked.
    ///
    /// # Errors
    ///
    /// [`BaseError::Damaged`] where a block is not what was folded; [`BaseError::Unread`].
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BaseError> {
        let mut reads = [BaseRead { base: self, offset, buffer, result: Ok(()) }];
        read_batch(&*self.disk, &mut reads, &mut []);
        let [read] = reads;
        read.result
    }

    /// Fills `buffer` from `offset` without checking anything: for the folder, which finishes what
    /// a crash interrupted and replaces what may be torn. Within the base's size.
    pub fn read_unchecked(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.image.read_at(buffer, offset)
    }

    /// Writes whole blocks with their CRC-32s; `born` is the LSN of the last record folded into
    /// them. For the folder, in the order of blocks; durable, and right for readers, with the next
    /// [`BaseVolume::sync`]: until then the blocks are read from the log.
    pub fn write_blocks(
        &self,
        offset: u64,
        data: &[u8],
        crcs: &[u32],
        born: Lsn,
    ) -> io::Result<()> {
        self.check_range(offset, data.len() as u64);
        assert_eq!(crcs.len(), data.len() / BLOCK, "one CRC per block");
        let mut folder = self.folder();
        let (mut at, mut data, mut crcs) = (offset, data, crcs);
        while !data.is_empty() {
            let chunk = at / CHUNK_BYTES;
            let length = data.len().min(((chunk + 1) * CHUNK_BYTES - at) as usize);
            let (part, behind) = data.split_at(length);
            let (sums, sums_behind) = crcs.split_at(length / BLOCK);
            // The sums have their place before the data: a full disk then leaves the blocks as they
            // were, and right for who reads what the log lacks of them.
            let open = self.chunk_at(&mut folder, chunk, born)?;
            self.image.write_at(&[IoSlice::new(part)], at)?;
            for (index, (crc, bytes)) in sums.iter().zip(part.chunks_exact(BLOCK)).enumerate() {
                let block = at / BLOCK_BYTES + index as u64;
                let sum = sidecar::stored_sum(*crc);
                open.sums[sum_range(block)].copy_from_slice(&sum.to_le_bytes());
                if sum == 0 && bytes.iter().any(|byte| *byte != 0) {
                    open.slot.collision = true;
                }
            }
            (at, data, crcs) = (at + length as u64, behind, sums_behind);
        }
        Ok(())
    }

    /// Makes a range of whole blocks read as zeros and gives its space back; `born` as in
    /// [`BaseVolume::write_blocks`]. For the folder. A chunk that never held anything is born by it
    /// too: what is zeros now may have been something else above the base.
    pub fn zero_blocks(&self, offset: u64, length: u64, born: Lsn) -> io::Result<()> {
        self.check_range(offset, length);
        let mut folder = self.folder();
        self.image.punch_hole(offset, length)?;
        let end = offset + length;
        let mut position = offset;
        while position < end {
            let chunk = position / CHUNK_BYTES;
            let chunk_end = (chunk + 1) * CHUNK_BYTES;
            if position.is_multiple_of(CHUNK_BYTES) && chunk_end <= end {
                // Whole chunks of one region: their sums become a hole.
                let region_end = (chunk / sidecar::CHUNKS_PER_REGION + 1)
                    * sidecar::CHUNKS_PER_REGION
                    * CHUNK_BYTES;
                let to = (end / CHUNK_BYTES * CHUNK_BYTES).min(region_end);
                self.zero_chunks(&mut folder, chunk, to / CHUNK_BYTES, born)?;
                position = to;
                continue;
            }
            let to = end.min(chunk_end);
            let open = self.chunk_at(&mut folder, chunk, born)?;
            for block in position / BLOCK_BYTES..to / BLOCK_BYTES {
                open.sums[sum_range(block)].fill(0);
            }
            position = to;
        }
        Ok(())
    }

    /// Notes that a record at `born` changed the chunks of a range, which hold the same
    /// nevertheless. For the folder.
    pub fn raise_births(&self, offset: u64, length: u64, born: Lsn) -> io::Result<()> {
        let mut folder = self.folder();
        for chunk in offset / CHUNK_BYTES..(offset + length).div_ceil(CHUNK_BYTES) {
            self.chunk_at(&mut folder, chunk, born)?;
        }
        Ok(())
    }

    /// Brings the sums of the chunk in work to the sidecar, so that what was written is right for
    /// readers before the next [`BaseVolume::sync`]. Makes nothing durable.
    pub fn settle(&self) -> io::Result<()> {
        let mut folder = self.folder();
        self.close_chunk(&mut folder)
    }

    /// Makes image and sidecar durable. Where it fails nothing of the fold can be relied on, and it
    /// must not be tried again as if nothing had happened.
    pub fn sync(&self) -> io::Result<()> {
        let mut folder = self.folder();
        self.close_chunk(&mut folder)?;
        drop(folder);
        self.image.sync()?;
        self.sums.sync()
    }

    /// What `[offset, offset + length)` holds as runs of (offset, length, whether it is data), in
    /// order and without gaps, at most `limit` of them; both bounds are multiples of 4096. What is
    /// not data is zeros and takes no space; where the sidecar cannot tell, it is called data.
    pub fn allocation(&self, offset: u64, length: u64, limit: usize) -> Vec<(u64, u64, bool)> {
        let end = offset + length;
        let size_bytes = self.size_bytes();
        let mut runs: Vec<(u64, u64, bool)> = Vec::new();
        let mut push = |from: u64, to: u64, data: bool| {
            if let Some(last) = runs.last_mut()
                && last.2 == data
            {
                last.1 += to - from;
                return true;
            }
            let room = runs.len() < limit;
            if room {
                runs.push((from, to - from, data));
            }
            room
        };
        let mut slots = SlotReader::new(self);
        let mut position = offset;
        'chunks: while position < end {
            if position >= size_bytes {
                push(position, end, false);
                break;
            }
            let chunk = position / CHUNK_BYTES;
            let to =
                end.min((chunk + 1) * CHUNK_BYTES).min(size_bytes.next_multiple_of(BLOCK_BYTES));
            match slots.slot(chunk) {
                Some(slot) if slot.is_zeros() => {
                    if !push(position, to, false) {
                        break;
                    }
                }
                Some(slot) if !slot.collision => {
                    let mut sums = [0; SUMS_BYTES];
                    let first = chunk * BLOCKS_PER_CHUNK as u64;
                    let found = self.sums.read_at(&mut sums, sidecar::sum_offset(first));
                    let trusted = found.is_ok() && slot.covers(&sums);
                    for block in position / BLOCK_BYTES..to.div_ceil(BLOCK_BYTES) {
                        let data = !trusted || sums[sum_range(block)] != [0; 4];
                        let from = position.max(block * BLOCK_BYTES);
                        if !push(from, to.min((block + 1) * BLOCK_BYTES), data) {
                            break 'chunks;
                        }
                    }
                }
                _ => {
                    if !push(position, to, true) {
                        break;
                    }
                }
            }
            position = to;
        }
        runs
    }

    /// When the chunks `[from, to)` were born, in order: zero where nothing was ever folded in,
    /// `None` where the slot is damaged, lost, or cannot be read.
    pub fn births(&self, from: u64, to: u64) -> Vec<Option<Lsn>> {
        let chunks = self.size_bytes().div_ceil(CHUNK_BYTES);
        let mut slots = SlotReader::new(self);
        let births = (from..to).map(|chunk| {
            if chunk >= chunks {
                return Some(Lsn::ZERO);
            }
            slots.slot(chunk).map(|slot| slot.birth)
        });
        births.collect()
    }

    /// The runs of chunks, as (offset, length) in bytes, into which a record at or after `since`
    /// was folded. A chunk whose slot is damaged, lost, or cannot be read counts as changed.
    pub fn born_since(&self, since: Lsn) -> Vec<(u64, u64)> {
        let size_bytes = self.size_bytes();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut slots = SlotReader::new(self);
        for chunk in 0..size_bytes.div_ceil(CHUNK_BYTES) {
            let changed =
                slots.slot(chunk).is_none_or(|slot| slot.is_written() && slot.birth >= since);
            if changed {
                let from = chunk * CHUNK_BYTES;
                let length = CHUNK_BYTES.min(size_bytes - from);
                match runs.last_mut() {
                    Some(last) if last.0 + last.1 == from => last.1 += length,
                    _ => runs.push((from, length)),
                }
            }
        }
        runs
    }

    /// Takes the volume's files away; durable on return.
    pub fn remove(&self) -> io::Result<()> {
        BaseVolume::remove_files(&*self.disk, &self.dir, self.number)
    }

    /// Takes the files of a volume away where any are there; durable on return.
    pub fn remove_files(disk: &dyn Disk, dir: &Path, number: VolumeNumber) -> io::Result<()> {
        let paths = [image_path(dir, number), sums_path(dir, number)];
        let mut removed = false;
        for path in &paths {
            if disk.exists(path)? {
                disk.remove(path)?;
                removed = true;
            }
        }
        if removed { disk.sync_dir(dir) } else { Ok(()) }
    }

    pub(super) fn folder(&self) -> MutexGuard<'_, Option<OpenChunk>> {
        self.folder.lock().expect("no folder panics")
    }

    fn check_range(&self, offset: u64, length: u64) {
        assert!(offset.is_multiple_of(BLOCK_BYTES), "offset {offset} is not a multiple of 4096");
        assert!(length.is_multiple_of(BLOCK_BYTES), "length {length} is not a multiple of 4096");
        let size_bytes = self.size_bytes();
        assert!(
            offset + length <= size_bytes.next_multiple_of(BLOCK_BYTES),
            "[{offset}, {}) in a base of {size_bytes} bytes",
            offset + length
        );
    }

    pub(super) fn io(&self, what: &'static str, error: &io::Error) -> BaseError {
        BaseError::Io { volume: self.number, what, cause: error.to_string() }
    }

    /// The chunk for changing, born at `born` at the earliest.
    pub(super) fn chunk_at<'a>(
        &self,
        folder: &'a mut Option<OpenChunk>,
        chunk: u64,
        born: Lsn,
    ) -> io::Result<&'a mut OpenChunk> {
        assert!(born < Lsn::MAX, "position {born} needs the top bit");
        let open = self.chunk_at_unborn(folder, chunk)?;
        self.reserve(open)?;
        open.slot.birth = open.slot.birth.max(born);
        Ok(open)
    }

    fn chunk_at_unborn<'a>(
        &self,
        folder: &'a mut Option<OpenChunk>,
        chunk: u64,
    ) -> io::Result<&'a mut OpenChunk> {
        if folder.as_ref().is_none_or(|open| open.chunk != chunk) {
            self.close_chunk(folder)?;
            *folder = Some(self.read_chunk(chunk)?);
        }
        Ok(folder.as_mut().expect("it was put there"))
    }

    fn read_chunk(&self, chunk: u64) -> io::Result<OpenChunk> {
        let mut sums = Box::new([0; SUMS_BYTES]);
        let first = chunk * BLOCKS_PER_CHUNK as u64;
        self.sums.read_at(&mut *sums, sidecar::sum_offset(first))?;
        let mut slot = [0; SLOT_BYTES];
        self.sums.read_at(&mut slot, sidecar::slot_offset(chunk))?;
        // A slot that was torn is made again: the fold that tore it is the one that runs now, and
        // sums that it does not set are the same before and after. A sum that is damaged besides
        // shows as a damaged block.
        let slot =
            Slot::decode(&slot, chunk).unwrap_or(Slot { collision: true, ..Slot::default() });
        Ok(OpenChunk { chunk, slot, sums, reserved: false })
    }

    /// Takes the space that a chunk's sums and slot need, where they may be holes.
    fn reserve(&self, open: &mut OpenChunk) -> io::Result<()> {
        if !open.reserved && open.sums.iter().all(|byte| *byte == 0) {
            let first = open.chunk * BLOCKS_PER_CHUNK as u64;
            self.sums.write_at(&[IoSlice::new(&*open.sums)], sidecar::sum_offset(first))?;
            if !open.slot.is_written() {
                let slot = [0; SLOT_BYTES];
                self.sums.write_at(&[IoSlice::new(&slot)], sidecar::slot_offset(open.chunk))?;
            }
        }
        open.reserved = true;
        Ok(())
    }

    fn close_chunk(&self, folder: &mut Option<OpenChunk>) -> io::Result<()> {
        if let Some(mut open) = folder.take() {
            self.write_chunk(&mut open)?;
        }
        Ok(())
    }

    fn write_chunk(&self, open: &mut OpenChunk) -> io::Result<()> {
        let first = open.chunk * BLOCKS_PER_CHUNK as u64;
        if !open.slot.is_written() {
            return self.sums.punch_hole(sidecar::sum_offset(first), SUMS_BYTES as u64);
        }
        open.slot.sums_checksum = crc32fast::hash(&*open.sums);
        self.sums.write_at(&[IoSlice::new(&*open.sums)], sidecar::sum_offset(first))?;
        // No slot vouches for sums that are lost: a block here and a peer's could prove none then.
        let lost = open.sums.chunks_exact(4).any(|sum| sum == sidecar::LOST_SUM);
        let slot = if lost { sidecar::LOST_SLOT } else { open.slot.encode(open.chunk) };
        self.sums.write_at(&[IoSlice::new(&slot)], sidecar::slot_offset(open.chunk))
    }

    /// Zeros the sums of whole chunks of one region, and notes the birth of those that held
    /// something.
    fn zero_chunks(
        &self,
        folder: &mut Option<OpenChunk>,
        from: u64,
        to: u64,
        born: Lsn,
    ) -> io::Result<()> {
        assert!(born < Lsn::MAX, "position {born} needs the top bit");
        self.close_chunk(folder)?;
        let first = sidecar::sum_offset(from * BLOCKS_PER_CHUNK as u64);
        self.sums.punch_hole(first, (to - from) * SUMS_BYTES as u64)?;
        let mut slots = vec![0; (to - from) as usize * SLOT_BYTES];
        self.sums.read_at(&mut slots, sidecar::slot_offset(from))?;
        for (index, bytes) in slots.chunks_exact_mut(SLOT_BYTES).enumerate() {
            let chunk = from + index as u64;
            let bytes: &mut [u8; SLOT_BYTES] = bytes.try_into().expect("a slot's bytes");
            let birth = match Slot::decode(bytes, chunk) {
                Ok(slot) => slot.birth.max(born),
                Err(_) => born,
            };
            let sums_checksum = crc32fast::hash(&[0; SUMS_BYTES]);
            *bytes = Slot { birth, collision: false, sums_checksum }.encode(chunk);
        }
        self.sums.write_at(&[IoSlice::new(&slots)], sidecar::slot_offset(from))
    }
}

/// Where a block's sum lies among those of its chunk.
pub(super) fn sum_range(block: u64) -> std::ops::Range<usize> {
    let index = block as usize % BLOCKS_PER_CHUNK;
    index * 4..index * 4 + 4
}

/// Slots of a sector, of which a disk loses none alone; their chunks' sums are contiguous.
const SLOTS_PER_SECTOR: u64 = SECTOR_BYTES / SLOT_BYTES as u64;
const _: () = assert!(SLOTS_PER_SECTOR == u32::BITS as u64, "a bit for each");

/// Reads slots in order, a region's page at a time.
struct SlotReader<'a> {
    base: &'a BaseVolume,
    region: Option<u64>,
    page: Vec<u8>,
    /// The page could be read.
    readable: bool,
    /// The sector of slots that was asked about last, and for each of its chunks, from the lowest
    /// bit, whether its sums are zeros.
    no_sums: Option<(u64, u32)>,
}

impl<'a> SlotReader<'a> {
    fn new(base: &'a BaseVolume) -> SlotReader<'a> {
        let page = vec![0; sidecar::SLOTS_BYTES as usize];
        SlotReader { base, region: None, page, readable: false, no_sums: None }
    }

    /// A chunk's slot; `None` where it is damaged, lost, or cannot be read.
    fn slot(&mut self, chunk: u64) -> Option<Slot> {
        let region = chunk / sidecar::CHUNKS_PER_REGION;
        if self.region != Some(region) {
            let first = region * sidecar::CHUNKS_PER_REGION;
            let at = sidecar::slot_offset(first);
            self.readable = self.base.sums.read_at(&mut self.page, at).is_ok();
            self.region = Some(region);
        }
        if !self.readable {
            return None;
        }
        let index = (chunk % sidecar::CHUNKS_PER_REGION) as usize;
        let bytes = self.page[index * SLOT_BYTES..][..SLOT_BYTES].try_into().expect("its length");
        let slot = Slot::decode(bytes, chunk).ok()?;
        // Zeros may be what a disk gives for a sector that it lost: the sums tell.
        (slot.is_written() || self.has_no_sums(chunk)).then_some(slot)
    }

    fn has_no_sums(&mut self, chunk: u64) -> bool {
        let (sector, bit) = (chunk / SLOTS_PER_SECTOR, chunk % SLOTS_PER_SECTOR);
        let zeros = match self.no_sums {
            Some((asked, zeros)) if asked == sector => zeros,
            _ => self.zero_sums(sector),
        };
        self.no_sums = Some((sector, zeros));
        zeros & 1 << bit != 0
    }

    /// For each chunk of a sector of slots, whether its sums are zeros. That others of its slots
    /// are there tells nothing: a fold may have written them since the sector was lost.
    fn zero_sums(&self, sector: u64) -> u32 {
        let file = &self.base.sums;
        let at = sidecar::sum_offset(sector * SLOTS_PER_SECTOR * BLOCKS_PER_CHUNK as u64);
        let bytes = SLOTS_PER_SECTOR * SUMS_BYTES as u64;
        if file.is_hole(at, bytes) {
            return u32::MAX;
        }
        let mut sums = vec![0; bytes as usize];
        let whole = file.read_once(&mut sums, at).is_ok();
        let chunks = (at..).step_by(SUMS_BYTES).zip(sums.chunks_exact_mut(SUMS_BYTES));
        let zero = chunks.map(|(at, sums)| {
            let read = whole || file.read_once(sums, at).is_ok();
            read && Slot::default().covers(sums)
        });
        zero.enumerate().fold(0, |zeros, (bit, zero)| zeros | u32::from(zero) << bit)
    }
}

/// How one read of a batch is done: whole blocks into the caller's buffer, or beside it where the
/// alignment does not fit.
struct Plan {
    first_block: u64,
    blocks: usize,
    /// Bytes of the caller's buffer that lie in the base.
    wanted: usize,
    /// Empty where the caller's buffer holds whole blocks.
    beside: Vec<u8>,
    sums: Vec<u8>,
    /// Indexes of its reads in the batch.
    reads: std::ops::Range<usize>,
}

/// Runs all reads of bases, and `others` beside them, as one batch; each has its result afterwards.
pub fn read_batch(disk: &dyn Disk, reads: &mut [BaseRead<'_>], others: &mut [BatchRead<'_>]) {
    let mut plans: Vec<Plan> = reads.iter().map(plan).collect();
    let mut batch: Vec<BatchRead<'_>> = Vec::with_capacity(3 * reads.len() + others.len());
    for other in others.iter_mut() {
        let (file, offset) = (other.file, other.offset);
        batch.push(BatchRead { file, offset, buffer: &mut *other.buffer, result: Ok(()) });
    }
    for (read, plan) in reads.iter_mut().zip(&mut plans) {
        let start = batch.len();
        if plan.blocks > 0 {
            let buffer = if plan.beside.is_empty() {
                &mut read.buffer[..plan.wanted]
            } else {
                &mut plan.beside[..]
            };
            let offset = plan.first_block * BLOCK_BYTES;
            batch.push(BatchRead { file: &*read.base.image, offset, buffer, result: Ok(()) });
            let mut rest = &mut plan.sums[..];
            let mut block = plan.first_block;
            while !rest.is_empty() {
                // Up to the end of a region the sums are contiguous.
                let per_region = sidecar::CHUNKS_PER_REGION * BLOCKS_PER_CHUNK as u64;
                let here = (per_region - block % per_region).min(rest.len() as u64 / 4);
                let (buffer, behind) = rest.split_at_mut(here as usize * 4);
                let offset = sidecar::sum_offset(block);
                batch.push(BatchRead { file: &*read.base.sums, offset, buffer, result: Ok(()) });
                rest = behind;
                block += here;
            }
        }
        plan.reads = start..batch.len();
    }
    disk.read_batch(&mut batch);
    let mut results: Vec<io::Result<()>> = batch.into_iter().map(|read| read.result).collect();
    for (other, result) in others.iter_mut().zip(&mut results) {
        other.result = std::mem::replace(result, Ok(()));
    }
    for (read, plan) in reads.iter_mut().zip(plans) {
        let failed = results[plan.reads.clone()].iter().find_map(|result| result.as_ref().err());
        read.result = match failed {
            Some(error) => Err(BaseError::Unread {
                volume: read.base.number,
                offset: plan.first_block * BLOCK_BYTES,
                length: plan.blocks as u64 * BLOCK_BYTES,
                cause: error.to_string(),
            }),
            None => finish(read, &plan),
        };
    }
}

fn plan(read: &BaseRead<'_>) -> Plan {
    let size_bytes = read.base.size_bytes();
    let end = (read.offset + read.buffer.len() as u64).min(size_bytes).max(read.offset);
    let wanted = (end - read.offset) as usize;
    let first_block = read.offset / BLOCK_BYTES;
    let blocks = if wanted == 0 { 0 } else { (end.div_ceil(BLOCK_BYTES) - first_block) as usize };
    let whole = read.offset.is_multiple_of(BLOCK_BYTES) && wanted.is_multiple_of(BLOCK);
    let beside = if whole { Vec::new() } else { vec![0; blocks * BLOCK] };
    Plan { first_block, blocks, wanted, beside, sums: vec![0; blocks * 4], reads: 0..0 }
}

/// Checks what was read and puts it where the caller wants it.
fn finish(read: &mut BaseRead<'_>, plan: &Plan) -> Result<(), BaseError> {
    let whole = plan.beside.is_empty();
    let bytes = if whole { &read.buffer[..plan.wanted] } else { &plan.beside[..] };
    for (index, (block, sum)) in
        bytes.chunks_exact(BLOCK).zip(plan.sums.chunks_exact(4)).enumerate()
    {
        let got = crc32fast::hash(block);
        let sum = u32::from_le_bytes(sum.try_into().expect("four bytes"));
        if sidecar::stored_sum(got) != sum {
            let offset = (plan.first_block + index as u64) * BLOCK_BYTES;
            let expected = sidecar::crc_of(sum);
            return Err(BaseError::Damaged { volume: read.base.number, offset, got, expected });
        }
    }
    if !whole {
        let skip = (read.offset % BLOCK_BYTES) as usize;
        read.buffer[..plan.wanted].copy_from_slice(&plan.beside[skip..skip + plan.wanted]);
    }
    read.buffer[plan.wanted..].fill(0);
    Ok(())
}
