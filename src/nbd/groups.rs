//! A node's groups and images as exports: `GROUP/VOLUME` live on the primary, and
//! `GROUP/VOLUME@IMAGE` read-only on any node that holds the image.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use super::export::{Device, ExportInfo, Exports, Refusal};
use super::identity::Identity;
use crate::group::{
    Done, Extent, Group, GroupError, HangUp, Image, NotOpened, Read, Registry, Request, Role, View,
    Volume,
};
use crate::units::{Lsn, VolumeNumber};

/// How long a handshake waits for a peer that hosts wait for without limit, before it is refused
/// with the reason. Shorter than the patience of a keeper (20 s) and than half of the handshake's
/// own (30 s): a host that asks twice hears it too, and none leaves a connection behind for each
/// of its attempts.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// The exports of a node's groups.
pub struct GroupExports {
    registry: Arc<Registry>,
}

impl GroupExports {
    /// Serves what the registry holds, as it changes.
    #[must_use]
    pub fn new(registry: Arc<Registry>) -> GroupExports {
        GroupExports { registry }
    }

    /// The live volumes of the groups that this node is primary of.
    fn live(&self) -> Vec<LiveVolume> {
        let mut live = Vec::new();
        for group in self.registry.groups() {
            if group.role() == Role::Primary {
                for volume in group.volumes() {
                    live.push(LiveVolume { group: Arc::clone(&group), volume });
                }
            }
        }
        live
    }

    /// The only volume where there is just one.
    fn open_default(&self) -> Result<Arc<dyn Device>, Refusal> {
        let mut live = self.live();
        match live.len() {
            1 => {
                let only = live.remove(0);
                may_serve(&only.group, &only.info().name)?;
                only.open()
            }
            0 => match self.registry.unopened().first() {
                Some(NotOpened { id, reason, .. }) => Err(Refusal::Policy(format!(
                    "export: this node serves no volume, and group {id} is not open: {reason}; \
                     `tidelog status` shows it"
                ))),
                None => Err(Refusal::Unknown(
                    "export: this node serves no volume; `tidelog volume create GROUP/VOL` makes \
                     one"
                    .to_owned(),
                )),
            },
            count => Err(Refusal::Unknown(format!(
                "export: this node serves {count} volumes; name one as GROUP/VOL"
            ))),
        }
    }
}

impl Exports for GroupExports {
    fn list(&self) -> Vec<ExportInfo> {
        let mut exports: Vec<ExportInfo> = self.live().iter().map(Device::info).collect();
        for group in self.registry.groups() {
            for image in group.images() {
                for volume in image.volumes() {
                    let image = Arc::clone(&image);
                    exports.push(ImageVolume { image, volume }.info());
                }
            }
        }
        exports.sort_by(|one, other| one.name.cmp(&other.name));
        exports
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Device>, Refusal> {
        if name.is_empty() {
            return self.open_default();
        }
        let unknown = |what: String| {
            Refusal::Unknown(format!("export `{name}`: {what}; LIST shows those that exist"))
        };
        let (group_name, rest) = name
            .split_once('/')
            .ok_or_else(|| unknown("is not of the form GROUP/VOL or GROUP/VOL@IMAGE".to_owned()))?;
        let (volume_name, image_name) = match rest.split_once('@') {
            Some((volume, image)) => (volume, Some(image)),
            None => (rest, None),
        };
        let group = self.registry.by_name(group_name).map_err(|error| match error {
            GroupError::NotFound { .. } => unknown(format!("group `{group_name}` does not exist")),
            not_open => Refusal::Policy(format!("export `{name}`: {not_open}")),
        })?;
        let find = |volumes: Vec<Volume>| {
            volumes
                .into_iter()
                .find(|volume| volume.name.as_str() == volume_name)
                .ok_or_else(|| unknown(format!("volume `{volume_name}` does not exist")))
        };
        if let Some(image_name) = image_name {
            let image = image_name.parse().ok().and_then(|name| group.image(&name));
            let image = image.ok_or_else(|| {
                unknown(format!("image `{image_name}` is not open; `tidelog image open` opens one"))
            })?;
            if let Some(reason) = image.broken() {
                return Err(Refusal::Policy(format!(
                    "export `{name}`: the image is broken: {reason}"
                )));
            }
            let volume = find(image.volumes())?;
            if volume.restoring {
                return Err(Refusal::Policy(format!(
                    "export `{name}`: {UNFINISHED} at this moment; open an image of a later one, \
                     or of before lsn:{} where the volume was there then",
                    volume.restore_lsn.unwrap_or_default()
                )));
            }
            return Ok(Arc::new(ImageVolume { image, volume }));
        }
        may_serve(&group, name)?;
        let volume = find(group.volumes())?;
        LiveVolume { group, volume }.open()
    }
}

/// Why a volume is not served.
const UNFINISHED: &str = "a restore into it, or the reading of its base, has not come to its end, \
                          so it holds no one moment";

/// Whether live volumes of a group are served here, export `name` among them.
fn may_serve(group: &Group, name: &str) -> Result<(), Refusal> {
    if group.role() == Role::Primary {
        // It may have just come back, and ask its peers whether it is still primary.
        group
            .wait_to_serve_within(ANSWER_PATIENCE)
            .map_err(|error| Refusal::Policy(format!("export `{name}`: {error}")))?;
    }
    if group.role() == Role::Primary {
        return Ok(());
    }
    let group_name = group.name();
    let epochs = &group.control().epochs;
    let primary = match epochs.last() {
        Some(epoch) if epoch.author != group.node().id => {
            format!("connect to node `{}`, its primary", epoch.author_name)
        }
        _ => format!("`tidelog promote {group_name}` makes this node its primary"),
    };
    Err(Refusal::Policy(format!(
        "export `{name}`: group `{group_name}` is secondary here, on node `{}`; {primary}, or \
         `tidelog image open {group_name} --at now` exports the copy read-only",
        group.node().name
    )))
}

/// What a host compares before it trusts another connection.
fn identity(group: &Group, volume: &Volume, lsn: Option<Lsn>) -> Identity {
    let control = group.control();
    let reign = control.epochs.last();
    let back = || control.epochs.iter().rev();
    // As it is now, since a restore may have begun since it was looked up.
    let known = control.volumes.iter().find(|known| known.number == volume.number);
    Identity {
        group_id: group.id().to_string(),
        volume_number: volume.number.0,
        reign: reign.map_or(0, |reign| reign.counter),
        reign_id: reign.map_or(String::new(), |reign| reign.id.to_string()),
        reason: reign.map_or(String::new(), |reign| reign.reason.clone()),
        planned: back().take_while(|reign| reign.is_planned()).count(),
        before: back()
            .skip(1)
            .take(Identity::BEFORE_MAX)
            .map(|reign| (reign.counter, reign.id.to_string()))
            .collect(),
        rewound: control.rewinds.last().map(|rewind| rewind.at.lsn.0),
        restored: known.and_then(|volume| volume.restore_lsn).map(|lsn| lsn.0),
        lsn: lsn.map(|lsn| lsn.0),
    }
}

/// A volume as it is now.
struct LiveVolume {
    group: Arc<Group>,
    volume: Volume,
}

impl LiveVolume {
    /// Serves it, where nothing has it for itself.
    fn open(self) -> Result<Arc<dyn Device>, Refusal> {
        self.group.check_unclaimed(self.volume.number).map_err(|error| {
            Refusal::Policy(format!("export `{}/{}`: {error}", self.group.name(), self.volume.name))
        })?;
        if self.volume.restoring {
            let (group, volume) = (self.group.name(), &self.volume.name);
            let before = self.volume.restore_lsn.unwrap_or(Lsn::ZERO);
            return Err(Refusal::Policy(format!(
                "export `{group}/{volume}`: {UNFINISHED}; `tidelog backup restore ID --to \
                 {group}/{volume}` restores it whole, `tidelog volume delete {group}/{volume}` \
                 removes one that was to begin with a base, `tidelog rewind {group} --to \
                 lsn:{before}` takes the group, all of its volumes, back to before it"
            )));
        }
        Ok(Arc::new(self))
    }
}

impl Device for LiveVolume {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            name: format!("{}/{}", self.group.name(), self.volume.name),
            description: format!(
                "volume {} of group {}; {}",
                self.volume.name,
                self.group.name(),
                identity(&self.group, &self.volume, None)
            ),
            size_bytes: self.volume.size_bytes,
            read_only: false,
        }
    }

    fn volume(&self) -> VolumeNumber {
        self.volume.number
    }

    fn attach(&self, address: &str, hang_up: HangUp) -> Result<Box<dyn Any + Send>, GroupError> {
        Ok(Box::new(self.group.client_until(self.volume.number, address, hang_up)?))
    }

    fn check_serving(&self) -> Result<(), GroupError> {
        // A host that was left behind by a switch of roles must not read what is old by now.
        self.group.check_serving()
    }

    fn has_room_within(&self, at_most: Duration) -> bool {
        self.group.has_room_within(at_most)
    }

    fn append(
        &self,
        requests: &[Request<'_>],
        ended: &dyn Fn() -> bool,
    ) -> Vec<Result<Lsn, GroupError>> {
        self.group.append_until(requests, ended)
    }

    fn is_held(&self, lsn: Lsn) -> bool {
        self.group.is_held(lsn)
    }

    fn when_held(&self, lsn: Lsn, done: Done) {
        self.group.when_held(lsn, done);
    }

    fn when_durable(&self, lsn: Lsn, done: Done) {
        self.group.when_durable(lsn, done);
    }

    fn read(&self, reads: &mut [Read<'_>]) {
        self.group.read(reads);
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, GroupError> {
        self.group.extents(self.volume.number, offset, length, limit)
    }
}

/// A volume as it was at one moment.
struct ImageVolume {
    image: Arc<Image>,
    volume: Volume,
}

impl Device for ImageVolume {
    fn info(&self) -> ExportInfo {
        let group = self.image.group().name();
        let lsn = self.image.position().lsn;
        ExportInfo {
            name: format!("{group}/{}@{}", self.volume.name, self.image.name()),
            description: format!(
                "volume {} of group {group} at LSN {lsn}; {}",
                self.volume.name,
                identity(self.image.group(), &self.volume, Some(lsn))
            ),
            size_bytes: self.volume.size_bytes,
            read_only: true,
        }
    }

    fn volume(&self) -> VolumeNumber {
        self.volume.number
    }

    fn attach(&self, address: &str, _hang_up: HangUp) -> Result<Box<dyn Any + Send>, GroupError> {
        let client =
            self.image.group().image_client(self.volume.number, self.image.name(), address);
        Ok(Box::new((client, Arc::clone(&self.image))))
    }

    fn append(
        &self,
        requests: &[Request<'_>],
        _ended: &dyn Fn() -> bool,
    ) -> Vec<Result<Lsn, GroupError>> {
        let refused = || self.refused();
        requests.iter().map(|_| Err(refused())).collect()
    }

    fn when_durable(&self, _lsn: Lsn, done: Done) {
        done(Err(self.refused()));
    }

    fn read(&self, reads: &mut [Read<'_>]) {
        self.image.read(reads);
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, GroupError> {
        self.image.extents(self.volume.number, offset, length, limit)
    }
}

impl ImageVolume {
    fn refused(&self) -> GroupError {
        GroupError::Refused {
            group: self.image.group().name().clone(),
            what: format!("image `{}` is read-only", self.image.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Map;

    use super::*;
    use crate::events::Events;
    use crate::group::{GroupContext, LocalLimits, NodeIdentity};
    use crate::io::{Entropy, Env, Fault, ManualClock, MemoryDisk, SeededEntropy};
    use crate::log::control::{Control, EpochRecord, MemberRecord, Mode, OnLoss};
    use crate::units::{LogTime, NodeId};

    fn start(disk: &Arc<MemoryDisk>) -> Arc<Registry> {
        let entropy = Arc::new(SeededEntropy::new(1));
        let clock = Arc::new(ManualClock::new(LogTime(1_700_000_000_000_000_000)));
        let context = GroupContext {
            node: NodeIdentity { id: NodeId(entropy.next_id()), name: "a".parse().unwrap() },
            env: Env { disk: disk.clone(), clock, entropy },
            limits: LocalLimits::default(),
            failures: None,
            events: Events::in_memory(),
        };
        Registry::open(context, Path::new("/data/groups")).unwrap()
    }

    #[test]
    fn a_primary_that_was_left_behind_serves_its_volume_by_no_name() {
        let disk = Arc::new(MemoryDisk::new());
        let registry = start(&disk);
        let group = registry.create("g".parse().unwrap(), Some(64 << 10)).unwrap();
        group.create_volume("v".parse().unwrap(), 1 << 20).unwrap();
        let peer = MemberRecord {
            node: NodeId([9; 16]),
            name: "b".parse().unwrap(),
            mode: Mode::default(),
            on_loss: OnLoss::default(),
            rpo_target: None,
            removed: false,
            other: Map::new(),
        };
        group.append_control(Control::Member(peer)).unwrap();
        registry.close();
        let registry = start(&disk);
        let group = registry.by_name("g").unwrap();
        group.hold_back(2, "is about to follow `b`");
        let exports = GroupExports::new(Arc::clone(&registry));
        for name in ["", "g/v"] {
            match exports.open(name) {
                Err(Refusal::Policy(text)) => {
                    assert!(text.contains("export `g/v`"), "{text}");
                    assert!(text.contains("is about to follow `b`"), "{text}");
                }
                other => panic!("`{name}`: {:?}", other.err()),
            }
        }
        // One that came past the handshake all the same reads nothing.
        let [live] = &exports.live()[..] else { panic!("one volume") };
        let error = live.check_serving().unwrap_err();
        assert!(error.to_string().contains("is about to follow `b`"), "{error}");
        group.promote("promote").unwrap();
        live.check_serving().unwrap();
        assert_eq!(exports.open("").ok().unwrap().info().name, "g/v");
        registry.close();
    }

    #[test]
    fn a_host_hears_why_a_group_is_not_open() {
        let disk = Arc::new(MemoryDisk::new());
        let registry = start(&disk);
        let group = registry.create("g".parse().unwrap(), Some(64 << 10)).unwrap();
        group.create_volume("v".parse().unwrap(), 1 << 20).unwrap();
        drop(group);
        registry.close();
        disk.inject(Fault::Error { operation: disk.operations() + 1 });
        let registry = start(&disk);
        let exports = GroupExports::new(Arc::clone(&registry));
        for (name, words) in [("", "is not open: group g: "), ("g/v", "group g: is not open: ")] {
            match exports.open(name) {
                Err(Refusal::Policy(text)) => assert!(text.contains(words), "{text}"),
                other => panic!("`{name}`: {:?}", other.err()),
            }
        }
        match exports.open("h/v") {
            Err(Refusal::Unknown(text)) => assert!(text.contains("does not exist"), "{text}"),
            other => panic!("{:?}", other.err()),
        }
        registry.close();
    }

    #[test]
    fn an_export_tells_the_reigns_before_and_how_many_of_them_lost_nothing() {
        let registry = start(&Arc::new(MemoryDisk::new()));
        let group = registry.create("g".parse().unwrap(), Some(64 << 10)).unwrap();
        group.create_volume("v".parse().unwrap(), 1 << 20).unwrap();
        let exports = GroupExports::new(Arc::clone(&registry));
        let told = || Identity::parse(&exports.open("g/v").ok().unwrap().info().description);
        let first = told().unwrap();
        assert_eq!((first.planned, &first.before[..]), (0, &[][..]));
        let mut reigns = vec![(first.reign, first.reign_id)];
        for planned in 1..20 {
            group.demote().unwrap();
            group.promote(EpochRecord::SWITCHOVER_REFUSED).unwrap();
            let now = told().unwrap();
            assert_eq!(now.planned, planned);
            let known = reigns.len().min(Identity::BEFORE_MAX);
            assert_eq!(now.before, reigns[..known]);
            reigns.insert(0, (now.reign, now.reign_id));
        }
        group.demote().unwrap();
        group.promote("promote").unwrap();
        assert_eq!(told().unwrap().planned, 0);
        registry.close();
    }

    #[test]
    fn a_volume_that_a_restore_writes_into_is_served_to_nobody_and_is_another_one_afterwards() {
        let disk = Arc::new(MemoryDisk::new());
        let registry = start(&disk);
        let group = registry.create("g".parse().unwrap(), Some(64 << 10)).unwrap();
        let number = group.create_volume("v".parse().unwrap(), 1 << 20).unwrap().number;
        let exports = GroupExports::new(Arc::clone(&registry));
        let early = exports.open("g/v").ok().unwrap();
        let told = early.info();
        let claim = group.claim_for_restore(number).unwrap();
        group.begin_restore(&claim).unwrap();
        for name in ["", "g/v"] {
            match exports.open(name) {
                Err(Refusal::Policy(text)) => {
                    assert!(text.contains("export `g/v`"), "{text}");
                    assert!(text.contains("a restore writes into it"), "{text}");
                }
                other => panic!("`{name}`: {:?}", other.err()),
            }
        }
        // One that was past that when the restore began comes no further.
        let refused = early.attach("a host", Box::new(|| {})).expect_err("it is claimed");
        assert!(refused.to_string().contains("a restore writes into it"), "{refused}");
        drop(claim);
        // It failed, or its node died: what is there is of no one moment.
        match exports.open("g/v") {
            Err(Refusal::Policy(text)) => assert!(text.contains("not come to its end"), "{text}"),
            other => panic!("{:?}", other.err()),
        }
        let claim = group.claim_for_restore(number).unwrap();
        group.end_restore(&claim).unwrap();
        drop(claim);
        drop(early.attach("a host", Box::new(|| {})).unwrap());
        assert_ne!(early.info(), told, "and is told that it is another by now");
        let identity = |info: &ExportInfo| Identity::parse(&info.description).unwrap();
        assert_eq!(identity(&told).restored, None);
        let now = identity(&exports.open("g/v").ok().unwrap().info()).restored;
        assert!(now.is_some());
        registry.close();
        let registry = start(&disk);
        let again = GroupExports::new(Arc::clone(&registry)).open("g/v").ok().unwrap().info();
        assert_eq!(identity(&again).restored, now, "a restart does not make it the old one");
        registry.close();
    }
}
