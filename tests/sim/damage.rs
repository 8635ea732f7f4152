//! Bits that turn at rest, at the end of a history: what is damaged is told, and never shown as
//! data; nothing that was whole before is missing without a word.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tidelog::events::{Events, Severity};
use tidelog::group::{Group, GroupContext, GroupError, Recovery};
use tidelog::io::{Disk, Env, MemoryDisk, OpenMode, SeededEntropy};
use tidelog::units::Lsn;

use super::node::{contents, group_dir};
use super::story::SEGMENT_BYTES;
use super::world::World;

/// Bits that are turned on each copy, one after the other.
const TURNS: usize = 2;

/// Where a bit was turned.
pub struct Turned {
    pub path: PathBuf,
    pub offset: u64,
    pub mask: u8,
    /// The position in the log, where it is in a segment that holds something there.
    pub lsn: Option<Lsn>,
}

impl fmt::Display for Turned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a bit was turned in {} at {}", self.path.display(), self.offset)
    }
}

impl World {
    /// Turns bits on copies of the disk of every node of a group, and looks what a start makes of
    /// each.
    pub fn check_damage(&mut self, group: usize) {
        for node in self.groups[group].members.clone() {
            let found = self.nodes[node].group(group).expect("it runs").clone();
            if found.sync_now().is_err() {
                continue;
            }
            found.mark_round(true);
            for _ in 0..TURNS {
                let disk = self.nodes[node].disk.snapshot();
                if let Some(turned) = self.turn_a_bit(&disk, group) {
                    self.say(format_args!("{}: {turned}", self.nodes[node].name));
                    self.check_start_on(node, group, &disk, &turned);
                }
            }
        }
    }

    /// Turns a bit somewhere in the log or the base of a group.
    pub fn turn_a_bit(&mut self, disk: &MemoryDisk, group: usize) -> Option<Turned> {
        let dir = group_dir(group).join(self.chance.of(&["log", "log", "base"]));
        let names = disk.list(&dir).unwrap_or_default();
        let names: Vec<&String> = names
            .iter()
            .filter(|name| !name.ends_with(".spare") && !name.ends_with(".new"))
            .collect();
        if names.is_empty() {
            return None;
        }
        let name = self.chance.of(&names);
        let path = dir.join(name);
        let bytes = disk.open(&path, OpenMode::Read).and_then(|file| file.len()).ok()?;
        let offset = self.chance.below(bytes);
        let mask = 1 << self.chance.below(8);
        // What fills a segment's end up holds nothing, and no checksum.
        let mut behind = vec![0; (bytes - offset).min(64) as usize];
        let file = disk.open(&path, OpenMode::Read).ok()?;
        let holds = file.read_at(&mut behind, offset).is_err() || behind.iter().any(|b| *b != 0);
        disk.damage(&path, offset, 1, mask);
        let number = name.strip_suffix(".seg").filter(|_| holds);
        let number = number.and_then(|number| number.parse::<u64>().ok());
        let lsn = number.map(|number| Lsn(number * SEGMENT_BYTES + offset));
        Some(Turned { path, offset, mask, lsn })
    }

    /// Opens a group on a copy of the disk of a node.
    fn open_copy(
        &self,
        node: usize,
        group: usize,
        disk: &MemoryDisk,
        events: Events,
    ) -> Result<(Arc<Group>, Recovery), GroupError> {
        let this = &self.nodes[node];
        let env = Env {
            disk: Arc::new(disk.clone()),
            clock: this.context().env.clock,
            entropy: Arc::new(SeededEntropy::new(group as u64)),
        };
        Group::open(GroupContext { env, events, ..this.context() }, &group_dir(group))
    }

    fn check_start_on(&mut self, node: usize, group: usize, disk: &MemoryDisk, turned: &Turned) {
        let live = self.nodes[node].group(group).expect("it runs").clone();
        let before = live.positions();
        let bytes = contents(&*live).expect("all is well");
        let was = self.groups[group].oracle.read(&bytes).expect("an image");
        let name = self.nodes[node].name.clone();
        let told: Arc<Mutex<Vec<String>>> = Arc::default();
        let events = Events::in_memory();
        let hear = Arc::clone(&told);
        events.follow(move |event| {
            if event.severity != Severity::Info {
                hear.lock().expect("no panic").push(format!("{}: {}", event.code, event.text));
            }
            true
        });
        let opened = match self.open_copy(node, group, disk, events) {
            Err(error) => {
                self.say(format_args!("{name} does not start: {error}"));
                return self.coverage.add("damage that stops a start", 1);
            }
            Ok((opened, recovery)) => {
                let damaged = recovery.damaged.iter().map(|lsn| format!("damaged at {lsn}"));
                told.lock().expect("no panic").extend(damaged);
                opened
            }
        };
        let (at, from) = (opened.positions(), opened.log_start());
        // A start gives folded segments back that something held: those that it gives back anyway
        // may be damaged.
        let start = if from > live.log_start() {
            let whole = self.nodes[node].disk.snapshot();
            let whole = self.open_copy(node, group, &whole, Events::in_memory());
            whole.map_or(Lsn::ZERO, |(whole, _)| whole.log_start())
        } else {
            from
        };
        let in_log = turned.lsn.is_some_and(|lsn| (start..before.head).contains(&lsn));
        if let Err(error) = opened.check_log(from, at.head) {
            told.lock().expect("no panic").push(error.to_string());
        }
        let read = contents(&*opened);
        if let Err(error) = &read {
            told.lock().expect("no panic").push(error.clone());
        }
        let told = std::mem::take(&mut *told.lock().expect("no panic"));
        self.say(format_args!("{name} tells {told:?}"));
        let same_log = (at.head, at.chain) == (before.head, before.chain);
        assert!(
            same_log && !in_log || !told.is_empty(),
            "{name}: group {group}: {turned}: the log was up to {} and is up to {}, and nothing \
             is told",
            before.head,
            at.head
        );
        if let Ok(bytes) = read {
            let oracle = &self.groups[group].oracle;
            let held = oracle.read(&bytes).unwrap_or_else(|why| panic!("{name}: {turned}: {why}"));
            let prefix = oracle.places(&held);
            prefix.unwrap_or_else(|why| panic!("{name}: {turned}: {why}"));
            assert!(
                held == was || !told.is_empty(),
                "{name}: group {group}: {turned}: shows something else than before, untold"
            );
        }
        let what = if told.is_empty() { "damage without effect" } else { "damage told" };
        self.coverage.add(what, 1);
        opened.forget_images();
    }
}
