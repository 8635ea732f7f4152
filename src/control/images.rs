//! Handlers of time: bookmarks, the timeline, images, branches.

use std::time::Duration;

use crate::group::{Branch, Cost, Group, GroupError, Image, Point, RewindView, View};
use crate::log::control::{BookmarkRecord, Consistency, Control};
use crate::units::{ByteSize, EpochId, LogTime, Lsn, Name, Position};

use super::api::{
    BookmarkInfo, Bookmarks, Branches, HoldInfo, ImageInfo, Images, RewindDone, RewindInfo,
    Timeline, TimelineWindow,
};
use super::context::Context;
use super::groups::{answer, done, epochs};
use super::problem::Problem;
use super::route::{Answer, Call};

/// Reads a point in time: `now`, a time, a duration back (`-15m`), `lsn:N`, or a bookmark's name.
///
/// # Errors
///
/// Where it is none of these.
pub(super) fn parse_point(text: &str, now: LogTime) -> Result<Point, Problem> {
    if text == "now" {
        return Ok(Point::Now);
    }
    if let Some(number) = text.strip_prefix("lsn:") {
        let lsn = number.parse::<u64>().ok().filter(|lsn| *lsn <= Lsn::MAX.0);
        return lsn.map(|lsn| Point::Lsn(Lsn(lsn))).ok_or_else(|| {
            Problem::invalid(format!("point `{text}`: expected a number after lsn:"))
        });
    }
    if let Some(back) = text.strip_prefix('-') {
        let back: Duration = humantime::parse_duration(back).map_err(|_| {
            Problem::invalid(format!("point `{text}`: expected a duration after -, such as -15m"))
        })?;
        return Ok(Point::Time(now.before(back)));
    }
    // A name cannot hold the colons and the capital T of a time.
    if let Ok(time) = text.parse::<LogTime>() {
        return Ok(Point::Time(time));
    }
    text.parse::<Name>().map(Point::Bookmark).map_err(|_| {
        Problem::invalid(format!(
            "point `{text}`: expected now, a time (RFC 3339, or -15m), lsn:N, or a bookmark's name"
        ))
    })
}

/// The epoch that the image at `lsn` ends in.
fn epoch_at(group: &Group, lsn: Lsn) -> EpochId {
    let control = group.control();
    let before = control.epochs.iter().rev().find(|epoch| epoch.first_lsn < lsn);
    before.or(control.epochs.first()).map(|epoch| epoch.id).unwrap_or_default()
}

fn bookmark_position(group: &Group, bookmark: &BookmarkRecord) -> Position {
    let lsn = bookmark.lsn;
    Position { epoch: epoch_at(group, lsn), lsn, time: bookmark.time }
}

fn bookmark_info(group: &Group, bookmark: &BookmarkRecord) -> BookmarkInfo {
    let lsn = bookmark.lsn;
    BookmarkInfo {
        name: bookmark.name.clone(),
        position: bookmark_position(group, bookmark),
        consistency: bookmark.consistency,
        covered: lsn >= group.positions().horizon || group.is_kept(lsn),
        pinned: bookmark.pinned,
        pin_lost: bookmark.pinned.then(|| group.cost_at(lsn).err()).flatten(),
    }
}

pub(super) fn bookmark(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let consistency: Consistency = call.field("consistency")?.unwrap_or_default();
    let (name, pinned) = (call.required("name")?, call.field("pinned")?.unwrap_or(false));
    let record = if pinned {
        group.pin_bookmark(name, consistency)?
    } else {
        group.create_bookmark(name, consistency)?
    };
    answer(bookmark_info(&group, &record))
}

fn all_bookmarks(group: &Group) -> Vec<BookmarkInfo> {
    group.control().bookmarks.iter().map(|record| bookmark_info(group, record)).collect()
}

pub(super) fn bookmarks(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    answer(Bookmarks { bookmarks: all_bookmarks(&group) })
}

pub(super) fn remove_bookmark(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let name = call.path("bookmark");
    let control = group.control();
    let found = control.bookmarks.iter().find(|bookmark| bookmark.name.as_str() == name);
    let Some(found) = found else {
        return Err(Problem::not_found(format!(
            "bookmark {name} of group {group}: does not exist; `tidelog bookmark list {group}` \
             shows those that do",
            group = group.name()
        )));
    };
    group.append_control(Control::Bookmark(BookmarkRecord { removed: true, ..found.clone() }))?;
    done(format!("bookmark {name} of group {}: removed", group.name()))
}

pub(super) fn timeline(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let positions = group.positions();
    let from = Position {
        epoch: epoch_at(&group, positions.horizon),
        lsn: positions.horizon,
        time: positions.horizon_time,
    };
    let to = Position {
        epoch: epoch_at(&group, positions.request_end),
        lsn: positions.request_end,
        time: positions.time,
    };
    let branches = group.branches()?;
    answer(Timeline {
        group: group.name().clone(),
        window: TimelineWindow { from, to },
        epochs: epochs(&group),
        bookmarks: all_bookmarks(&group),
        rewinds: rewinds(&group, positions.horizon),
        holds: holds(&group, &branches),
        branches,
    })
}

/// The rewinds that the log still has.
fn rewinds(group: &Group, horizon: Lsn) -> Vec<RewindInfo> {
    let control = group.control();
    let known = control.rewinds.iter().filter(|rewind| rewind.at.lsn >= horizon);
    let info = |rewind: &RewindView| {
        let (lsn, time) = (rewind.to, rewind.to_time);
        RewindInfo { at: rewind.at, to: Position { epoch: epoch_at(group, lsn), lsn, time } }
    };
    known.map(info).collect()
}

pub(super) fn rewind(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let (to, force): (String, _) = (call.required("to")?, call.field("force")?.unwrap_or(false));
    let point = past_point(context, &group, &to, Wanted::Rewind)?;
    let rewound = group
        .rewind(&point, force)
        .map_err(|error| refused_point(&group, &to, Wanted::Rewind, error))?;
    let (lsn, from, to) = (rewound.at, rewound.from, rewound.to);
    answer(RewindDone { group: group.name().clone(), lsn, from, to })
}

/// Everything that needs an old moment, with what it costs.
fn holds(group: &Group, branches: &[Branch]) -> Vec<HoldInfo> {
    let hold = |owner: &str, position: Position, cost: Result<Cost, String>| HoldInfo {
        owner: owner.to_owned(),
        image: None,
        bookmark: None,
        branch: None,
        position,
        disk_bytes: cost.as_ref().map_or(0, |cost| cost.disk_bytes),
        memory_bytes: cost.as_ref().map_or(0, |cost| cost.memory_bytes),
        lost: cost.err(),
    };
    let mut holds = Vec::new();
    for image in group.images() {
        let cost = image.broken().map_or_else(|| Ok(image.cost()), Err);
        let found = hold(image.owner(), image.position(), cost);
        holds.push(HoldInfo { image: Some(image.name().clone()), ..found });
    }
    for bookmark in group.control().bookmarks.iter().filter(|bookmark| bookmark.pinned) {
        let position = bookmark_position(group, bookmark);
        let found = hold("pin", position, group.cost_at(bookmark.lsn));
        holds.push(HoldInfo { bookmark: Some(bookmark.name.clone()), ..found });
    }
    for branch in branches {
        let found = hold("branch", branch.from, group.cost_at(branch.from.lsn));
        let disk_bytes = found.disk_bytes + branch.bytes;
        holds.push(HoldInfo { branch: Some(branch.name.clone()), disk_bytes, ..found });
    }
    holds
}

pub(super) fn branches(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    answer(Branches { branches: group.branches()? })
}

pub(super) fn remove_branch(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let branch = group.remove_branch(call.path("branch"))?;
    let size = ByteSize(branch.bytes);
    done(format!("group {}: branch {} of {size} is gone", group.name(), branch.name))
}

fn image_info(image: &Image) -> ImageInfo {
    let group = image.group().name();
    let export = |volume: crate::group::Volume| format!("{group}/{}@{}", volume.name, image.name());
    ImageInfo {
        group: group.clone(),
        name: image.name().clone(),
        position: image.position(),
        owner: image.owner().to_owned(),
        opened: image.opened(),
        branch: image.branch().map(str::to_owned),
        broken: image.broken(),
        exports: image.volumes().into_iter().map(export).collect(),
    }
}

pub(super) fn list(context: &Context, call: &Call) -> Answer {
    let mut images = Vec::new();
    for group in context.groups(call.query("group"))? {
        images.extend(group.images().iter().map(|image| image_info(image)));
    }
    answer(Images { images })
}

pub(super) fn open(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    if let Some(branch) = call.field::<String>("branch")? {
        if call.field::<String>("at")?.is_some() {
            return Err(Problem::invalid("image: got both at and branch, expected one of them"));
        }
        let image = group.open_branch_image(&branch, call.field("name")?, &call.user)?;
        return answer(image_info(&image));
    }
    let at: String = call.required("at")?;
    let point = past_point(context, &group, &at, Wanted::Image)?;
    let image = group
        .open_image(&point, call.field("name")?, &call.user, None)
        .map_err(|error| refused_point(&group, &at, Wanted::Image, error))?;
    answer(image_info(&image))
}

/// What a point is given for.
#[derive(Clone, Copy)]
enum Wanted {
    Image,
    Rewind,
}

impl Wanted {
    /// What to try instead, at a point that is covered.
    fn instead(self, group: &Name, point: &str) -> String {
        match self {
            Wanted::Image => format!("`tidelog image open {group} --at {point}` opens"),
            Wanted::Rewind => format!("`tidelog rewind {group} --to {point}` goes back to"),
        }
    }
}

/// Reads a point that is not yet to come.
fn past_point(
    context: &Context,
    group: &Group,
    at: &str,
    wanted: Wanted,
) -> Result<Point, Problem> {
    let now = context.env.clock.wall();
    let point = parse_point(at, now)?;
    let end = group.positions();
    if let Point::Time(time) = point
        && time > now.max(end.time)
    {
        let name = group.name();
        let last = format!("lsn:{}, {}", end.request_end, end.time);
        return Err(yet_to_come(name, at, &last, wanted));
    }
    Ok(point)
}

fn yet_to_come(group: &Name, at: &str, last: &str, wanted: Wanted) -> Problem {
    let mut detail = format!("group {group}: point {at}: is yet to come: the log ends at {last}");
    if let Wanted::Image = wanted {
        detail.push_str(&format!("; {} that", wanted.instead(group, "now")));
    }
    Problem::new(409, "not-covered", detail)
}

/// Tells of a point outside of the log where the log begins and ends.
fn refused_point(group: &Group, at: &str, wanted: Wanted, error: GroupError) -> Problem {
    let GroupError::NotCovered { .. } = error else { return error.into() };
    let (name, positions) = (group.name(), group.positions());
    let first = match positions.horizon {
        Lsn::ZERO => group.resolve_point(&Point::Time(positions.horizon_time)),
        lsn => group.resolve_point(&Point::Lsn(lsn)),
    };
    let Ok(first) = first else { return error.into() };
    if at.strip_prefix("lsn:").and_then(|lsn| lsn.parse().ok()) > Some(positions.request_end.0) {
        return yet_to_come(name, at, &format!("lsn:{}", positions.request_end), wanted);
    }
    let detail = format!(
        "group {name}: {at} is not covered: the log reaches from lsn:{}, {} to lsn:{}, {}; \
         {} the earliest",
        first.lsn,
        first.time,
        positions.request_end,
        positions.time,
        wanted.instead(name, &format!("lsn:{}", first.lsn))
    );
    Problem::new(409, "not-covered", detail)
}

pub(super) fn close(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let name: Name = call.path("image").parse()?;
    group.close_image(&name)?;
    done(format!("image {}@{name}: closed", group.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_told_apart() {
        let now: LogTime = "2026-11-24T12:00:00Z".parse().unwrap();
        let point = |text| parse_point(text, now).unwrap();
        assert_eq!(point("now"), Point::Now);
        assert_eq!(point("lsn:123"), Point::Lsn(Lsn(123)));
        let earlier = "2026-11-24T11:45:00Z";
        assert_eq!(point("-15m"), Point::Time(earlier.parse().unwrap()));
        assert_eq!(point(earlier), point("-15m"));
        assert_eq!(point("before-upgrade"), Point::Bookmark("before-upgrade".parse().unwrap()));
        for wrong in ["lsn:x", "-15", "Not A Name", "lsn:18446744073709551615"] {
            assert!(parse_point(wrong, now).is_err(), "{wrong}");
        }
    }
}
