//! Groups on a disk in memory, driven without threads.

mod account;
mod adopt;
mod basic;
mod branches;
mod clients;
mod clock;
mod cut;
mod dated;
mod failures;
mod fold;
mod fold_damage;
mod fold_waits;
mod hostile;
mod images;
mod lost;
mod model;
mod moments;
mod pins;
mod races;
mod registry;
mod reign;
mod repair;
mod resumed;
mod resync;
mod returning;
mod rewind;
mod room;
mod scrub;
mod staged;
mod switch;
mod unread_sums;
mod unreadable;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::events::Events;
use crate::io::{Clock, Disk, Entropy, Env, ManualClock, MemoryDisk, SeededEntropy};
use crate::log::control::{Control, PolicyRecord};
use crate::units::{ByteSize, GroupId, Span};

/// One node with a disk that can crash, and one group on it.
pub(super) struct Bench {
    pub disk: Arc<MemoryDisk>,
    pub clock: Arc<ManualClock>,
    pub entropy: Arc<dyn Entropy>,
    pub events: Events,
    pub node: NodeIdentity,
}

pub(super) const GROUP: GroupId = GroupId([7; 16]);
pub(super) const SEGMENT: u64 = 64 << 10;

pub(super) fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub(super) fn dir() -> PathBuf {
    PathBuf::from("/data/groups/g")
}

impl Bench {
    pub(super) fn new(node: &str, seed: u64) -> Bench {
        let disk = Arc::new(MemoryDisk::new());
        disk.create_dir(&dir()).unwrap();
        for made in ["/data", "/data/groups"] {
            disk.sync_dir(std::path::Path::new(made)).unwrap();
        }
        disk.sync_dir(std::path::Path::new("/")).unwrap();
        let entropy = Arc::new(SeededEntropy::new(seed));
        Bench {
            disk,
            clock: Arc::new(ManualClock::new(LogTime(1_700_000_000_000_000_000))),
            node: NodeIdentity { id: NodeId(entropy.next_id()), name: name(node) },
            entropy,
            events: Events::in_memory(),
        }
    }

    pub(super) fn context(&self) -> GroupContext {
        let clock: Arc<dyn Clock> = self.clock.clone();
        let env = Env { disk: self.disk.clone(), clock, entropy: self.entropy.clone() };
        GroupContext {
            env,
            node: self.node.clone(),
            limits: LocalLimits::default(),
            failures: None,
            events: self.events.clone(),
        }
    }

    pub(super) fn create(&self) -> Arc<Group> {
        let new = NewGroup { id: GROUP, name: name("g"), segment_bytes: SEGMENT };
        Group::create(self.context(), &dir(), new).unwrap()
    }

    pub(super) fn create_copy(&self) -> Arc<Group> {
        let new = NewGroup { id: GROUP, name: name("g"), segment_bytes: SEGMENT };
        Group::create_copy(self.context(), &dir(), new).unwrap()
    }

    pub(super) fn open(&self) -> (Arc<Group>, Recovery) {
        Group::open(self.context(), &dir()).unwrap()
    }

    /// The same node after the power came back.
    pub(super) fn after_crash(&self, seed: u64) -> Bench {
        Bench {
            disk: Arc::new(self.disk.crash(seed)),
            clock: self.clock.clone(),
            entropy: self.entropy.clone(),
            events: Events::in_memory(),
            node: self.node.clone(),
        }
    }

    pub(super) fn pass(&self, seconds: u64) {
        self.clock.advance(Duration::from_secs(seconds));
    }

    /// What the events of a code say.
    pub(super) fn said(&self, code: &str) -> Vec<String> {
        let events = self.events.since(0).into_iter();
        events.filter(|event| event.code == code).map(|event| event.text).collect()
    }

    pub(super) fn event_codes(&self) -> Vec<String> {
        self.events.since(0).into_iter().map(|event| event.code).collect()
    }
}

pub(super) fn write(group: &Group, volume: VolumeNumber, offset: u64, data: &[u8]) -> Lsn {
    one(group, volume, Op::Write { offset, data }).unwrap()
}

pub(super) fn one(group: &Group, volume: VolumeNumber, op: Op<'_>) -> Result<Lsn, GroupError> {
    group.append(&[Request { volume, op, fua: false }]).pop().unwrap()
}

pub(super) fn read(view: &dyn View, volume: VolumeNumber, offset: u64, bytes: usize) -> Vec<u8> {
    try_read(view, volume, offset, bytes).unwrap()
}

pub(super) fn try_read(
    view: &dyn View,
    volume: VolumeNumber,
    offset: u64,
    bytes: usize,
) -> Result<Vec<u8>, GroupError> {
    let mut buffer = vec![0xee; bytes];
    let mut reads = [Read { volume, offset, buffer: &mut buffer, result: Ok(()) }];
    view.read(&mut reads);
    let [read] = reads;
    read.result?;
    Ok(buffer)
}

pub(super) fn set_policy(group: &Group, window_seconds: u64, log_limit: u64) {
    let policy = PolicyRecord {
        window: Span::from_secs(window_seconds),
        log_limit: ByteSize(log_limit),
        ..PolicyRecord::default()
    };
    group.append_control(Control::Policy(policy)).unwrap();
}
