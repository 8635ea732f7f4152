//! A new volume that begins with the contents of a file: read once, and written into the log as a
//! host would have, so that it has the history, the checksums and the copies of any other volume.

use std::ops::Range;
use std::sync::Arc;

use super::clients::RestoreClaim;
use super::content::volume_record;
use super::engine::{Core, Group};
use super::{GroupError, Op, Volume};
use crate::io::DiskFile;
use crate::units::{BLOCK_BYTES, Name, VolumeNumber};

/// Bytes that are read and written at a time, a multiple of a block.
const PART_BYTES: u64 = 256 << 10;

/// What a volume begins with.
pub struct Contents<'a> {
    /// What it is called, in an error.
    pub name: &'a str,
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
        let mut claim = None;
        let volume = self.make_volume(name.clone(), size_bytes, |number| {
            claim = Some(self.claim_to_adopt(number));
            true
        })?;
        let claim = claim.expect("it was made");
        let copied = self
            .copy_contents(&claim, contents)
            .and_then(|()| (contents.check)().map_err(|why| self.refused(why)))
            .and_then(|()| self.end_restore(&claim));
        let Err(error) = copied else { return Ok(Volume { restoring: false, ..volume }) };
        // Where all of it is there, and only not known to be durable, it stays.
        match self.remove_unfinished(volume.number) {
            Ok(()) => Err(error),
            Err(left) => Err(self.refused(format!(
                "volume {name}: {error}; what was made of it could not be removed ({left}), and no \
                 host is served it: `tidelog volume delete {}/{name}`",
                self.name()
            ))),
        }
    }

    /// Removes a volume, where it is there and its contents are not all.
    ///
    /// # Errors
    ///
    /// As of [`Group::remove_volume`]; none where it is not there.
    pub fn remove_unfinished(&self, number: VolumeNumber) -> Result<(), GroupError> {
        let is_left = |volume: &&Volume| volume.number == number && volume.restoring;
        let left = |core: &Core| core.view.volumes.iter().find(is_left).cloned();
        if left(&self.lock()).is_none() {
            return Ok(());
        }
        let removed = self.append_control_with(|core| {
            let volume = left(core).ok_or_else(|| self.no_volume(number))?;
            Ok(volume_record(volume, true))
        });
        match removed {
            Ok(_) | Err(GroupError::NoVolume { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn copy_contents(
        &self,
        claim: &RestoreClaim,
        contents: &Contents<'_>,
    ) -> Result<(), GroupError> {
        let mut buffer = vec![0; PART_BYTES as usize];
        let mut offset = 0;
        while offset < contents.bytes {
            // Zeros and holes append nothing that would ask.
            self.check_goes_on(claim)?;
            let bytes = PART_BYTES.min(contents.bytes - offset);
            if !contents.file.is_hole(offset, bytes) {
                // Up to a whole block, with zeros where the file ends inside of it.
                let part = &mut buffer[..bytes.next_multiple_of(BLOCK_BYTES) as usize];
                let (read, behind) = part.split_at_mut(bytes as usize);
                behind.fill(0);
                contents.file.read_once(read, offset).map_err(|cause| {
                    let what = format!("read of {} at {offset}", contents.name);
                    GroupError::io(self.name(), what, &cause)
                })?;
                self.write_data(claim, offset, part)?;
            }
            (contents.done)(bytes);
            offset += bytes;
        }
        Ok(())
    }

    /// Writes what is not zeros.
    fn write_data(&self, claim: &RestoreClaim, offset: u64, part: &[u8]) -> Result<(), GroupError> {
        for (range, _) in runs_of_zeros(part).filter(|(_, is_zero)| !is_zero) {
            let offset = offset + range.start as u64;
            self.append_claimed(claim, Op::Write { offset, data: &part[range] })?;
        }
        Ok(())
    }
}

/// The runs of blocks that are all zeros, or none of which is; the last may end inside of a block.
pub fn runs_of_zeros(data: &[u8]) -> impl Iterator<Item = (Range<usize>, bool)> {
    let block = BLOCK_BYTES as usize;
    let is_zero =
        move |at: usize| data[at..data.len().min(at + block)].iter().all(|byte| *byte == 0);
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at;
        let zero = (start < data.len()).then(|| is_zero(start))?;
        while at < data.len() && is_zero(at) == zero {
            at = data.len().min(at + block);
        }
        Some((start..at, zero))
    })
}
