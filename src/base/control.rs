//! The group's control state at the horizon, the file `control`.
//!
//! A line of text (`sealed.rs`) and a line of JSON:
//!
//! ```text
//! tidelog-control 1 <xxh3-64 of the second line, 16 hexadecimal digits> <its bytes>
//! {"position":{…},"chain":"…","requests":0,"entries":[{"kind":1,…,"body":{…}}]}
//! ```
//!
//! A body is the payload of a control record as its author wrote it, never encoded again; kinds
//! that this version does not know are carried along.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::sealed::{seal, unseal};
use crate::io::{Disk, OpenMode};
use crate::units::{Chain, EpochId, LogTime, Lsn, Position, VolumeNumber};

const NAME: &str = "control";
const NEW_NAME: &str = "control.new";
const MAGIC: &str = "tidelog-control";
/// No group has that much control state; a file that claims it is damaged.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// What the control records up to the horizon come to.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ControlState {
    /// The horizon.
    pub position: Position,
    /// Checksum of the last record before it.
    pub chain: Chain,
    /// Requests that end at or before it.
    pub requests: u64,
    /// The records that still say something, in the order of their positions.
    pub entries: Vec<ControlEntry>,
    /// The volumes that have files in the base beside this, and the sizes in bytes of these: what
    /// else is not there was never folded.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub bases: BTreeMap<VolumeNumber, u64>,
}

/// One control record that was folded.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ControlEntry {
    /// The record's control kind; any number.
    pub kind: u32,
    /// The version of the kind.
    pub version: u8,
    /// The record's flags.
    pub flags: u16,
    /// Its position.
    pub lsn: Lsn,
    /// Its epoch.
    pub epoch: EpochId,
    /// Its log time.
    pub time: LogTime,
    /// Its payload, byte for byte.
    pub body: Box<RawValue>,
}

impl PartialEq for ControlEntry {
    fn eq(&self, other: &ControlEntry) -> bool {
        (self.kind, self.version, self.flags, self.lsn, self.epoch, self.time, self.body.get())
            == (
                other.kind,
                other.version,
                other.flags,
                other.lsn,
                other.epoch,
                other.time,
                other.body.get(),
            )
    }
}

/// The control state could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ControlStateError {
    /// The file could not be read.
    #[error("control state: {0}")]
    Io(#[from] io::Error),
    /// The file is not what was written.
    #[error("control state: {0}")]
    Damaged(String),
}

impl ControlState {
    /// Reads the control state in `dir`.
    ///
    /// # Errors
    ///
    /// [`ControlStateError::Io`] also where there is none (kind `NotFound`);
    /// [`ControlStateError::Damaged`] where its bytes are not what was written.
    pub fn load(disk: &dyn Disk, dir: &Path) -> Result<ControlState, ControlStateError> {
        let file = disk.open(&dir.join(NAME), OpenMode::Read)?;
        let bytes = file.len()?;
        if bytes > FILE_BYTES_MAX {
            return Err(ControlStateError::Damaged(format!("a file of {bytes} bytes")));
        }
        let mut content = vec![0; bytes as usize];
        file.read_at(&mut content, 0)?;
        decode(&content).map_err(ControlStateError::Damaged)
    }

    /// Replaces the control state in `dir`; durable on return. After a crash it is the old or the
    /// new one.
    pub fn store(&self, disk: &dyn Disk, dir: &Path) -> io::Result<()> {
        let new = dir.join(NEW_NAME);
        let file = disk.open(&new, OpenMode::Create)?;
        file.set_len(0)?;
        file.write_at(&[IoSlice::new(&self.encode())], 0)?;
        file.sync()?;
        disk.rename(&new, &dir.join(NAME))?;
        disk.sync_dir(dir)
    }

    /// Reads the bytes of such a file.
    ///
    /// # Errors
    ///
    /// [`ControlStateError::Damaged`] where they are not what was written.
    pub fn decode(bytes: &[u8]) -> Result<ControlState, ControlStateError> {
        decode(bytes).map_err(ControlStateError::Damaged)
    }

    /// The bytes of the file.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec(self).expect("plain data becomes JSON");
        json.push(b'\n');
        seal(MAGIC, &json)
    }
}

fn decode(content: &[u8]) -> Result<ControlState, String> {
    serde_json::from_slice(unseal(MAGIC, content)?).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::io::{Fault, MemoryDisk};

    fn state() -> ControlState {
        ControlState {
            position: Position {
                epoch: EpochId(0xabc),
                lsn: Lsn(4096),
                time: LogTime(1_500_000_000),
            },
            chain: Chain(0x0123_4567_89ab_cdef),
            requests: 7,
            entries: vec![ControlEntry {
                kind: 77,
                version: 1,
                flags: 2,
                lsn: Lsn(512),
                epoch: EpochId(0xabc),
                time: LogTime(1_000_000_000),
                body: RawValue::from_string(r#"{"later": [1,  2.50], "b":"ü"}"#.to_owned())
                    .unwrap(),
            }],
            bases: BTreeMap::from([(VolumeNumber(3), 8192)]),
        }
    }

    fn disk() -> Arc<MemoryDisk> {
        let disk = MemoryDisk::new();
        disk.create_dir(Path::new("/base")).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        Arc::new(disk)
    }

    #[test]
    fn the_control_state_is_these_bytes() {
        let golden = concat!(
            "tidelog-control 1 235f306ae5ec285c 296\n",
            r#"{"position":{"epoch":"0000000000000abc","lsn":4096,"time":"1970-01-01T00:00:01.5Z"},"#,
            r#""chain":"0123456789abcdef","requests":7,"entries":[{"kind":77,"version":1,"flags":2,"#,
            r#""lsn":512,"epoch":"0000000000000abc","time":"1970-01-01T00:00:01Z","#,
            r#""body":{"later": [1,  2.50], "b":"ü"}}],"bases":{"3":8192}}"#,
            "\n",
        );
        assert_eq!(String::from_utf8(state().encode()).unwrap(), golden);
        // As it was before files of the base were listed.
        let older = concat!(
            "tidelog-control 1 966b69060525ce24 277\n",
            r#"{"position":{"epoch":"0000000000000abc","lsn":4096,"time":"1970-01-01T00:00:01.5Z"},"#,
            r#""chain":"0123456789abcdef","requests":7,"entries":[{"kind":77,"version":1,"flags":2,"#,
            r#""lsn":512,"epoch":"0000000000000abc","time":"1970-01-01T00:00:01Z","#,
            r#""body":{"later": [1,  2.50], "b":"ü"}}]}"#,
            "\n",
        );
        let state = ControlState { bases: BTreeMap::new(), ..state() };
        assert_eq!(decode(older.as_bytes()).unwrap().encode(), older.as_bytes());
        assert_eq!(state.encode(), older.as_bytes());
    }

    #[test]
    fn a_body_of_an_unknown_kind_keeps_its_bytes() {
        let disk = disk();
        state().store(&*disk, Path::new("/base")).unwrap();
        let loaded = ControlState::load(&*disk, Path::new("/base")).unwrap();
        assert_eq!(loaded.entries, state().entries);
        assert_eq!(loaded.position, state().position);
        assert_eq!(loaded.encode(), state().encode());
    }

    #[test]
    fn every_changed_byte_and_every_cut_is_noticed() {
        let content = state().encode();
        for index in 0..content.len() {
            let mut wrong = content.clone();
            wrong[index] ^= 0x04;
            assert!(decode(&wrong).is_err(), "byte {index}");
            assert!(decode(&content[..index]).is_err(), "cut at {index}");
        }
    }

    #[test]
    fn a_crash_while_storing_leaves_the_old_or_the_new_state() {
        let dir = Path::new("/base");
        let before = state();
        let after = ControlState { requests: 8, ..state() };
        for operation in 0.. {
            let disk = disk();
            before.store(&*disk, dir).unwrap();
            let begun = disk.operations();
            disk.inject(Fault::PowerOff { operation: begun + operation });
            let stored = after.store(&*disk, dir).is_ok();
            for seed in 0..40 {
                let found = ControlState::load(&disk.crash(seed), dir).unwrap();
                assert!(found.requests == 8 || (found.requests == 7 && !stored));
            }
            if stored {
                assert_eq!(operation, 6, "every boundary was tried");
                break;
            }
        }
    }
}
