//! A node's groups and images as exports: `GROUP/VOLUME` live on the primary, and
//! `GROUP/VOLUME@IMAGE` read-only on any node that holds the image.

use std::any::Any;
use std::sync::Arc;

use super::export::{Device, ExportInfo, Exports, Refusal};
use crate::group::{
    Done, Extent, Group, GroupError, Image, Read, Registry, Request, Role, View, Volume,
};
use crate::units::{Lsn, VolumeNumber};

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
            1 => Ok(Arc::new(live.remove(0))),
            0 => Err(Refusal::Unknown(
                "export: this node serves no volume; `tidelog volume create GROUP/VOL` makes one"
                    .to_owned(),
            )),
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
        let group = self
            .registry
            .by_name(group_name)
            .map_err(|_| unknown(format!("group `{group_name}` does not exist")))?;
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
            return Ok(Arc::new(ImageVolume { image, volume }));
        }
        if group.role() == Role::Primary {
            // It may have just come back, and ask its peers whether it is still primary.
            group
                .wait_to_serve()
                .map_err(|error| Refusal::Policy(format!("export `{name}`: {error}")))?;
        }
        if group.role() != Role::Primary {
            let epochs = &group.control().epochs;
            let primary = match epochs.last() {
                Some(epoch) if epoch.author != group.node().id => {
                    format!("connect to node `{}`, its primary", epoch.author_name)
                }
                _ => format!("`tidelog promote {group_name}` makes this node its primary"),
            };
            return Err(Refusal::Policy(format!(
                "export `{name}`: group `{group_name}` is secondary here, on node `{}`; {primary}, \
                 or `tidelog image open {group_name} --at now` exports the copy read-only",
                group.node().name
            )));
        }
        let volume = find(group.volumes())?;
        Ok(Arc::new(LiveVolume { group, volume }))
    }
}

/// A volume as it is now.
struct LiveVolume {
    group: Arc<Group>,
    volume: Volume,
}

impl Device for LiveVolume {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            name: format!("{}/{}", self.group.name(), self.volume.name),
            description: format!("volume {} of group {}", self.volume.name, self.group.name()),
            size_bytes: self.volume.size_bytes,
            read_only: false,
        }
    }

    fn volume(&self) -> VolumeNumber {
        self.volume.number
    }

    fn attach(&self) -> Box<dyn Any + Send> {
        Box::new(self.group.client(self.volume.number))
    }

    fn check_serving(&self) -> Result<(), GroupError> {
        // A host that was left behind by a switch of roles must not read what is old by now.
        match self.group.role() {
            Role::Primary => Ok(()),
            Role::Secondary => Err(GroupError::NotPrimary { group: self.group.name().clone() }),
        }
    }

    fn append(&self, requests: &[Request<'_>]) -> Vec<Result<Lsn, GroupError>> {
        self.group.append(requests)
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
            description: format!("volume {} of group {group} at LSN {lsn}", self.volume.name),
            size_bytes: self.volume.size_bytes,
            read_only: true,
        }
    }

    fn volume(&self) -> VolumeNumber {
        self.volume.number
    }

    fn attach(&self) -> Box<dyn Any + Send> {
        Box::new(Arc::clone(&self.image))
    }

    fn append(&self, requests: &[Request<'_>]) -> Vec<Result<Lsn, GroupError>> {
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
