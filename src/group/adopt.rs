//! A new volume that begins with the contents of a file: read once, and written into the log as a
//! host would have, so that it has the history, the checksums and the copies of any other volume.

use std::sync::Arc;

use super::engine::Group;
use super::{GroupError, Op, Request, Volume};
use crate::io::DiskFile;
use crate::units::{BLOCK_BYTES, Name};

/// Bytes that are read and written at a time, a multiple of a block.
const PART_BYTES: u64 = 256 << 10;

/// What a volume begins with.
pub struct Contents<'a> {
    /// Where it is read from.
    pub file: &'a dyn DiskFile,
    /// Bytes of it that are read, from the first on.
    pub bytes: u64,
    /// Is told the bytes of each part that was gone through.
    pub done: &'a dyn Fn(u64),
    /// Whether what was read is one moment's, asked behind the last byte; else why it is not.
    pub check: &'a dyn Fn() -> Result<(), String>,
}

impl Group {
    /// Makes a volume of `size_bytes` that begins with `contents`; zeros are behind them. Durable
    /// on return, on the peers that a flush waits for too; no host is served the volume before.
    ///
    /// # Errors
    ///
    /// As of [`Group::create_volume`], what the disks say, or what `contents.check` does; the
    /// volume is removed again. Where that fails too, as it does where this node is the primary no
    /// more, it is left as one that a restore has not ended.
    ///
    /// # Panics
    ///
    /// Where the contents are larger than the volume.
    pub fn adopt_volume(
        self: &Arc<Self>,
        name: &Name,
        size_bytes: u64,
        contents: &Contents<'_>,
    ) -> Result<Volume, GroupError> {
        assert!(contents.bytes <= size_bytes, "{} bytes into {size_bytes}", contents.bytes);
        let volume = self.make_volume(name.clone(), size_bytes, true)?;
        let claim = self.claim_for_restore(volume.number)?;
        let copied = self
            .copy_contents(&volume, contents)
            .and_then(|()| (contents.check)().map_err(|why| self.refused(why)))
            .and_then(|()| self.end_restore(&claim));
        match copied {
            Ok(()) => Ok(Volume { restoring: false, ..volume }),
            Err(error) => match self.remove_volume(name) {
                Ok(()) => Err(error),
                Err(left) => Err(self.refused(format!(
                    "volume {name}: {error}; what was made of it could not be removed ({left}), \
                     and no host is served it: `tidelog volume delete {}/{name}`",
                    self.name()
                ))),
            },
        }
    }

    fn copy_contents(&self, volume: &Volume, contents: &Contents<'_>) -> Result<(), GroupError> {
        let mut buffer = vec![0; PART_BYTES as usize];
        let mut offset = 0;
        while offset < contents.bytes {
            let bytes = PART_BYTES.min(contents.bytes - offset);
            if !contents.file.is_hole(offset, bytes) {
                // Up to a whole block, with zeros where the file ends inside of it.
                let part = &mut buffer[..bytes.next_multiple_of(BLOCK_BYTES) as usize];
                part[bytes as usize..].fill(0);
                let read = contents.file.read_once(&mut part[..bytes as usize], offset);
                read.map_err(|cause| {
                    let what = format!("volume {}: read of its contents", volume.name);
                    GroupError::io(self.name(), format!("{what} at {offset}"), &cause)
                })?;
                self.write_runs(volume, offset, part)?;
            }
            (contents.done)(bytes);
            offset += bytes;
        }
        Ok(())
    }

    /// Writes the runs of blocks that are not zeros.
    fn write_runs(&self, volume: &Volume, offset: u64, data: &[u8]) -> Result<(), GroupError> {
        let block = BLOCK_BYTES as usize;
        let is_zero = |block: &&[u8]| block.iter().all(|byte| *byte == 0);
        let blocks: Vec<&[u8]> = data.chunks(block).collect();
        let mut at = 0;
        for run in blocks.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let end = at + run.len() * block;
            if !is_zero(&run[0]) {
                let op = Op::Write { offset: offset + at as u64, data: &data[at..end] };
                let request = Request { volume: volume.number, op, fua: false };
                self.append(&[request]).into_iter().try_for_each(|result| result.map(drop))?;
            }
            at = end;
        }
        Ok(())
    }
}
