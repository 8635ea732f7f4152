//! The groups of a node.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use serde_json::json;

use super::engine::{Group, Listener, NewGroup};
use super::files::{discard, is_discarded};
use super::meta::{META, MetaFile, UNFINISHED_META};
use super::recover::Recovery;
use super::{GroupContext, GroupError, Role};
use crate::events::Severity;
use crate::io::Disk;
use crate::log::segment::SEGMENT_BYTES_DEFAULT;
use crate::units::{GroupId, LogTime, Name};

/// The groups of a node.
pub struct Registry {
    context: GroupContext,
    dir: PathBuf,
    groups: RwLock<BTreeMap<Name, Arc<Group>>>,
    /// One group is made or deleted at a time.
    changing: Mutex<()>,
    listeners: RwLock<Vec<Listener>>,
    recoveries: RwLock<BTreeMap<Name, Recovery>>,
    /// Groups that could not be opened, by the name of their directory.
    unopened: Mutex<BTreeMap<String, Unopened>>,
}

/// A group on the disk that could not be opened.
struct Unopened {
    /// Where its `meta` tells it.
    name: Option<Name>,
    error: GroupError,
    /// What is in the way may go by itself.
    is_tried_again: bool,
    since: LogTime,
}

/// A group on the disk that could not be opened, as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotOpened {
    /// The name of its directory: the group's id.
    pub id: String,
    /// The group's name, where its `meta` could be read.
    pub name: Option<Name>,
    /// Why it is not open.
    pub reason: String,
    /// Since when.
    pub since: LogTime,
}

impl Registry {
    /// Opens and recovers every group under `dir` (`data_dir/groups`), and starts their threads.
    /// What was not made or not deleted to the end is removed. A group that cannot be opened is
    /// left alone, and told by an event; see [`Registry::open_rest`].
    ///
    /// # Errors
    ///
    /// Where the directory cannot be read.
    pub fn open(context: GroupContext, dir: &Path) -> Result<Arc<Registry>, GroupError> {
        let disk = context.env.disk.clone();
        let io = |cause| {
            let name = "unknown".parse().expect("a name");
            GroupError::io(&name, format!("open {}", dir.display()), &cause)
        };
        disk.create_dir(dir).map_err(io)?;
        let registry = Arc::new(Registry {
            context,
            dir: dir.to_owned(),
            groups: RwLock::default(),
            changing: Mutex::default(),
            listeners: RwLock::default(),
            recoveries: RwLock::default(),
            unopened: Mutex::default(),
        });
        for id in disk.list(dir).map_err(io)? {
            let path = dir.join(&id);
            if is_discarded(&id) || is_unfinished(&*disk, &path, &id) {
                if let Err(cause) = discard(&*disk, &path) {
                    tracing::warn!(
                        "{}: what is left could not be removed: {cause}",
                        path.display()
                    );
                }
                continue;
            }
            if id.parse::<GroupId>().is_err() {
                continue;
            }
            registry.open_one(&id);
        }
        Ok(registry)
    }

    /// Opens and starts one group, or notes why not; whether it is open now. One of a name that
    /// another has that is open is left alone: each has hosts of its own.
    fn open_one(&self, id: &str) -> bool {
        let path = self.dir.join(id);
        let name = self.name_on_disk(id);
        let taken = name.clone().filter(|name| self.is_open(name));
        let opened = match &taken {
            Some(name) => Err(self.name_is_taken(name, &path)),
            None => Group::open(self.context.clone(), &path),
        };
        let error = match opened {
            Ok((group, recovery)) => {
                group.start_workers();
                let name = group.name().clone();
                self.recoveries.write().expect("no holder panics").insert(name.clone(), recovery);
                let before = self.groups.write().expect("no holder panics").insert(name, group);
                assert!(before.is_none(), "an open group is never replaced");
                return true;
            }
            Err(error) => error,
        };
        let is_tried_again = taken.is_some() || matches!(error, GroupError::NoSpace { .. });
        let mut unopened = self.unopened.lock().expect("no holder panics");
        if let Some(known) = unopened.get_mut(id) {
            (known.error, known.is_tried_again) = (error, is_tried_again);
            known.name = name.or(known.name.take());
            return false;
        }
        let text = format!("{} was left as it is: {error}", path.display());
        let since = self.context.env.clock.wall();
        unopened.insert(id.to_owned(), Unopened { name, error, is_tried_again, since });
        drop(unopened);
        let details = json!({ "id": id });
        self.context.events.emit(Severity::Error, "group-not-opened", Some(id), text, details);
        false
    }

    fn is_open(&self, name: &Name) -> bool {
        self.groups.read().expect("no holder panics").contains_key(name)
    }

    /// The name that the `meta` of a group tells, where it can be read.
    fn name_on_disk(&self, id: &str) -> Option<Name> {
        let path = self.dir.join(id).join(META);
        let found = MetaFile::open(&*self.context.env.disk, &path).ok().flatten()?;
        Some(found.meta.name)
    }

    fn name_is_taken(&self, name: &Name, path: &Path) -> GroupError {
        GroupError::Refused {
            group: name.clone(),
            what: format!(
                "another group of this name is open, so that this one is not; once `tidelog group \
                 delete {name}` has removed the other, it is opened by itself; to give this one \
                 up, stop the node and remove {}",
                path.display()
            ),
        }
    }

    /// Refuses a name that a group on the disk has that is not open: both would have it later.
    fn check_unopened(&self, name: &Name) -> Result<(), GroupError> {
        let unopened = self.unopened_with_names();
        let Some((id, known)) =
            unopened.iter().find(|(_, known)| known.name.as_ref() == Some(name))
        else {
            return Ok(());
        };
        let what = format!(
            "a group of this name is on the disk already and could not be opened: {}; take another \
             name, or, to give that group up, stop the node and remove {}",
            known.error,
            self.dir.join(id).display()
        );
        Err(GroupError::Refused { group: name.clone(), what })
    }

    /// The groups that are not open, each asked again for a name that could not be read.
    fn unopened_with_names(&self) -> MutexGuard<'_, BTreeMap<String, Unopened>> {
        let mut unopened = self.unopened.lock().expect("no holder panics");
        for (id, known) in unopened.iter_mut() {
            known.name = known.name.take().or_else(|| self.name_on_disk(id));
        }
        unopened
    }

    /// Why a group that is on the disk is not among those that are open; `None` where none of this
    /// name, and none whose name is not known, is there.
    fn why_not_open(&self, name: &Name) -> Option<GroupError> {
        let unopened = self.unopened_with_names();
        let of_name = unopened.iter().find(|(_, known)| known.name.as_ref() == Some(name));
        let (id, known) =
            of_name.or_else(|| unopened.iter().find(|(_, known)| known.name.is_none()))?;
        let cause = known.error.to_string();
        let cause = cause.strip_prefix(&format!("group {name}: ")).unwrap_or(&cause);
        let next = match known.is_tried_again {
            true => "it is opened by itself once that is mended",
            false => "restart the node once that is mended",
        };
        let what = match known.name {
            Some(_) => format!("is not open: {cause}; {next}"),
            None => format!(
                "does not exist here, unless it is group {id}, whose name cannot be read and which \
                 is not open: {cause}; {next}"
            ),
        };
        Some(GroupError::Refused { group: name.clone(), what })
    }

    /// Tries again to open the groups that found no room on the disk, or their name taken.
    pub fn open_rest(&self) {
        let _one_at_a_time = self.changing.lock().expect("no holder panics");
        let is_due =
            |(id, unopened): (&String, &Unopened)| unopened.is_tried_again.then(|| id.clone());
        let due: Vec<String> = {
            let unopened = self.unopened.lock().expect("no holder panics");
            unopened.iter().filter_map(is_due).collect()
        };
        for id in due.into_iter().filter(|id| self.open_one(id)) {
            self.unopened.lock().expect("no holder panics").remove(&id);
            let text = format!(
                "{} is open now: nothing is in its way any more",
                self.dir.join(&id).display()
            );
            let details = json!({ "id": id });
            self.context.events.emit(Severity::Info, "group-opened", Some(&id), text, details);
            self.notify();
        }
    }

    /// The groups that could not be opened, and why.
    #[must_use]
    pub fn unopened(&self) -> Vec<NotOpened> {
        let unopened = self.unopened_with_names();
        let told = unopened.iter().map(|(id, unopened)| NotOpened {
            id: id.clone(),
            name: unopened.name.clone(),
            reason: unopened.error.to_string(),
            since: unopened.since,
        });
        told.collect()
    }

    /// What recovery found of a group at this start of the node, as far as that is still so.
    #[must_use]
    pub fn recovery(&self, group: &Name) -> Option<Recovery> {
        let found = self.recoveries.read().expect("no holder panics").get(group).cloned()?;
        let mended = found.as_copy
            && found.cut.zip(self.by_name(group.as_str()).ok()).is_some_and(|((_, to), group)| {
                group.role() == Role::Secondary && group.positions().durable >= to
            });
        if mended {
            self.recoveries.write().expect("no holder panics").remove(group);
        }
        (!mended).then_some(found)
    }

    /// All groups, by name.
    #[must_use]
    pub fn groups(&self) -> Vec<Arc<Group>> {
        self.groups.read().expect("no holder panics").values().cloned().collect()
    }

    /// A group.
    ///
    /// # Errors
    ///
    /// Where there is none of that name, or it is not open: with the cause.
    pub fn by_name(&self, name: &str) -> Result<Arc<Group>, GroupError> {
        let parsed: Option<Name> = name.parse().ok();
        let open = |name| self.groups.read().expect("no holder panics").get(name).cloned();
        parsed.as_ref().and_then(open).ok_or_else(|| {
            let why = parsed.as_ref().and_then(|name| self.why_not_open(name));
            why.unwrap_or_else(|| GroupError::NotFound {
                group: parsed.unwrap_or_else(|| "unknown".parse().expect("a name")),
                what: "group",
                name: name.to_owned(),
            })
        })
    }

    /// A group, by its identity.
    #[must_use]
    pub fn by_id(&self, id: GroupId) -> Option<Arc<Group>> {
        self.groups
            .read()
            .expect("no holder panics")
            .values()
            .find(|group| group.id() == id)
            .cloned()
    }

    /// Makes a group with this node as its primary.
    ///
    /// # Errors
    ///
    /// Where the name is taken, or what the disk says.
    pub fn create(&self, name: Name, segment_bytes: Option<u64>) -> Result<Arc<Group>, GroupError> {
        let id = GroupId(self.context.env.entropy.next_id());
        let segment_bytes = segment_bytes.unwrap_or(SEGMENT_BYTES_DEFAULT);
        self.add(NewGroup { id, name, segment_bytes }, Group::create)
    }

    /// Makes the copy that a peer's `replicate` asks for; a taken name is refused.
    ///
    /// # Errors
    ///
    /// Where the name or the identity is taken, or what the disk says.
    pub fn create_copy(
        &self,
        id: GroupId,
        name: Name,
        segment_bytes: u64,
    ) -> Result<Arc<Group>, GroupError> {
        self.add(NewGroup { id, name, segment_bytes }, Group::create_copy)
    }

    fn add(
        &self,
        new: NewGroup,
        make: impl FnOnce(GroupContext, &Path, NewGroup) -> Result<Arc<Group>, GroupError>,
    ) -> Result<Arc<Group>, GroupError> {
        let _one_at_a_time = self.changing.lock().expect("no holder panics");
        if self.is_open(&new.name) || self.by_id(new.id).is_some() {
            let name = new.name.to_string();
            return Err(GroupError::Exists { group: new.name, what: "group", name });
        }
        self.check_unopened(&new.name)?;
        let path = self.dir.join(new.id.to_string());
        let disk = &self.context.env.disk;
        let looked = |cause| GroupError::io(&new.name, "look for what is left", &cause);
        if disk.exists(&path).map_err(looked)? {
            // Left by a making that did not end, or of a group that could not be opened.
            if disk.exists(&path.join(META)).map_err(looked)? {
                let what = format!("{} exists already, and could not be opened", path.display());
                return Err(GroupError::Refused { group: new.name, what });
            }
            discard(&**disk, &path)
                .map_err(|cause| GroupError::io(&new.name, "remove what is left", &cause))?;
        }
        let group = make(self.context.clone(), &path, new).inspect_err(|_| {
            // Else the next start removes it.
            if !matches!(disk.exists(&path), Ok(false))
                && let Err(cause) = discard(&**disk, &path)
            {
                tracing::warn!("{}: what is left could not be removed: {cause}", path.display());
            }
        })?;
        group.start_workers();
        let mut groups = self.groups.write().expect("no holder panics");
        groups.insert(group.name().clone(), group.clone());
        drop(groups);
        self.notify();
        Ok(group)
    }

    /// Closes a group and removes all that it has on this node.
    ///
    /// # Errors
    ///
    /// Where there is none of that name, or what the disk says.
    pub fn delete(&self, name: &Name) -> Result<(), GroupError> {
        let _one_at_a_time = self.changing.lock().expect("no holder panics");
        let group = self.by_name(name.as_str())?;
        // It goes whatever its disk says now.
        if let Err(error) = group.close() {
            tracing::warn!("group {name}: closing before it is deleted: {error}");
        }
        self.groups.write().expect("no holder panics").remove(name);
        let disk = &self.context.env.disk;
        let path = self.dir.join(group.id().to_string());
        let removed = discard(&**disk, &path);
        // Another copy of it may come here again.
        self.context.forget_failure(group.id());
        self.notify();
        removed.map_err(|cause| GroupError::io(name, format!("remove {}", path.display()), &cause))
    }

    /// Has `listener` called after a group was made or deleted, until it answers `false`.
    pub fn subscribe(&self, listener: Box<dyn Fn() -> bool + Send + Sync>) {
        self.listeners.write().expect("no holder panics").push(Arc::from(listener));
    }

    fn notify(&self) {
        let listeners = self.listeners.read().expect("no holder panics").clone();
        let ended: Vec<Listener> = listeners.into_iter().filter(|listener| !listener()).collect();
        if !ended.is_empty() {
            self.listeners
                .write()
                .expect("no holder panics")
                .retain(|known| !ended.iter().any(|ended| Arc::ptr_eq(known, ended)));
        }
    }

    /// Closes all groups in order.
    pub fn close(&self) {
        for group in self.groups() {
            if let Err(error) = group.close() {
                tracing::error!("group {}: closing: {error}", group.name());
            }
        }
    }
}

/// Whether this is a group that was not made to the end: its first file has not got its name yet,
/// or is not there and neither is anything else.
fn is_unfinished(disk: &dyn Disk, path: &Path, id: &str) -> bool {
    id.parse::<GroupId>().is_ok()
        && matches!(disk.exists(&path.join(META)), Ok(false))
        && (matches!(disk.exists(&path.join(UNFINISHED_META)), Ok(true))
            || disk.list(path).is_ok_and(|names| names.is_empty()))
}
