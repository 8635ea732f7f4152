//! Handlers of volumes: list, create, show, resize, delete.

use std::path::PathBuf;

use crate::group::{self, Group, Host, Volume};
use crate::units::{BLOCK_BYTES, Name};

use super::api::{VOLUME_BLOCK_BYTES, VolumeInfo, Volumes};
use super::base_file::BaseFile;
use super::context::Context;
use super::groups::{answer, done};
use super::problem::Problem;
use super::route::{Answer, Call};

pub(super) fn list(context: &Context, call: &Call) -> Answer {
    let mut volumes = Vec::new();
    for group in context.groups(call.query("group"))? {
        let control = group.control();
        volumes.extend(control.volumes.iter().map(|volume| volume_info(&group, volume)));
    }
    answer(Volumes { volumes })
}

fn volume_info(group: &Group, volume: &Volume) -> VolumeInfo {
    VolumeInfo {
        group: group.name().clone(),
        name: volume.name.clone(),
        size_bytes: volume.size_bytes,
        block_size_bytes: VOLUME_BLOCK_BYTES,
        clients: clients(group, volume),
        hosts: hosts(group, volume),
        restoring: volume.restoring,
        export: format!("{}/{}", group.name(), volume.name),
        role: group.role(),
    }
}

/// Connections that have a volume open as it is now.
pub(super) fn clients(group: &Group, volume: &Volume) -> usize {
    let of_volume = group.clients().into_iter().filter(|(number, _)| *number == volume.number);
    of_volume.map(|(_, count)| count).sum()
}

/// Who they are of, and who has an image of it open.
pub(super) fn hosts(group: &Group, volume: &Volume) -> Vec<Host> {
    let of_volume = group.hosts().into_iter().filter(|(number, _)| *number == volume.number);
    of_volume.map(|(_, host)| host).collect()
}

fn find(group: &Group, name: &str) -> Result<Volume, Problem> {
    let control = group.control();
    let found = control.volumes.iter().find(|volume| volume.name.as_str() == name);
    found.cloned().ok_or_else(|| {
        let group = group.name();
        Problem::new(
            404,
            "no-such-volume",
            format!("volume {group}/{name}: does not exist; `tidelog volume list {group}` shows those that do"),
        )
    })
}

pub(super) fn show(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let volume = find(&group, call.path("volume"))?;
    answer(volume_info(&group, &volume))
}

/// What the engine takes.
const SIZE_BYTES_MAX: u64 = 1 << 60;

fn checked_size(volume: &str, size_bytes: u64) -> Result<u64, Problem> {
    if size_bytes > SIZE_BYTES_MAX {
        return Err(Problem::invalid(format!("volume {volume}: size {size_bytes} is above 1 EiB")));
    }
    if size_bytes == 0 || !size_bytes.is_multiple_of(BLOCK_BYTES) {
        let below = size_bytes / BLOCK_BYTES * BLOCK_BYTES;
        let above = below + BLOCK_BYTES;
        let near = if below == 0 { above.to_string() } else { format!("{below} or {above}") };
        return Err(Problem::invalid(format!(
            "volume {volume}: size {size_bytes} is not a multiple of {BLOCK_BYTES}; the nearest \
             is {near}"
        )));
    }
    Ok(size_bytes)
}

pub(super) fn create(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let name: Name = call.required("name")?;
    let Some(path) = call.field::<PathBuf>("base")? else {
        let size = checked_size(name.as_str(), call.required("size_bytes")?)?;
        return answer(volume_info(&group, &group.create_volume(name, size)?));
    };
    let data_dir = context.config.read().expect("no holder panics").data_dir.clone();
    let base = BaseFile::open(&*context.env.disk, &path, &data_dir)?;
    let whole = base.size_bytes.next_multiple_of(BLOCK_BYTES);
    let size = checked_size(name.as_str(), call.field("size_bytes")?.unwrap_or(whole))?;
    if size < base.size_bytes {
        return Err(Problem::invalid(format!(
            "volume {name}: size {size} is less than the {} bytes of {}; the least is {whole}",
            base.size_bytes, base.name
        )));
    }
    let (progress, _ticket) = context.progress(call.field("ticket")?);
    progress.set_total(base.size_bytes);
    let contents = group::Contents {
        name: &base.name,
        file: &*base.file,
        bytes: base.size_bytes,
        done: &|bytes| progress.add_done(bytes),
        check: &|| base.check(),
    };
    answer(volume_info(&group, &group.adopt_volume(&name, size, &contents)?))
}

pub(super) fn resize(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let volume = find(&group, call.path("volume"))?;
    let size = checked_size(volume.name.as_str(), call.required("size_bytes")?)?;
    let connected = clients(&group, &volume);
    if size < volume.size_bytes && connected > 0 {
        return Err(Problem::refused(format!(
            "volume {}/{}: {connected} clients are connected and would lose the end of the volume; \
             disconnect them first",
            group.name(),
            volume.name
        )));
    }
    let volume = group.resize_volume(&volume.name, size)?;
    answer(volume_info(&group, &volume))
}

pub(super) fn delete(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let volume = find(&group, call.path("volume"))?;
    // Who reads its base stops, and removes it.
    if group.end_adoption(volume.number) {
        group.remove_unfinished(volume.number)?;
        return done(format!("volume {}/{}: deleted", group.name(), volume.name));
    }
    let connected = clients(&group, &volume);
    if connected > 0 {
        return Err(Problem::refused(format!(
            "volume {}/{}: {connected} clients are connected; disconnect them first",
            group.name(),
            volume.name
        )));
    }
    group.remove_volume(&volume.name)?;
    done(format!("volume {}/{}: deleted", group.name(), volume.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_blocks() {
        assert_eq!(checked_size("v", 8192).unwrap(), 8192);
        let said = checked_size("v", 5000).unwrap_err().detail;
        assert!(said.contains("4096 or 8192"), "{said}");
        assert!(checked_size("v", 0).unwrap_err().detail.contains("nearest is 4096"));
        assert!(checked_size("v", u64::MAX - 4095).is_err());
    }
}
