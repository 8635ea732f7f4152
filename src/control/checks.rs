//! Handlers of what checks a group's bytes: scrub, verify.

use crate::units::{ByteSize, Name};

use super::api::ScrubAnswer;
use super::context::Context;
use super::groups::{answer, done};
use super::problem::Problem;
use super::route::{Answer, Call};

pub(super) fn scrub(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let rate: Option<String> = call.field("rate")?;
    let rate = rate.map(|text| text.parse::<ByteSize>()).transpose();
    let rate = rate.map_err(|error| Problem::invalid(format!("rate: {error}")))?;
    if rate == Some(ByteSize(0)) {
        let name = group.name();
        return Err(Problem::invalid(format!(
            "rate: nothing is read at 0 bytes a second; `tidelog scrub {name} --stop` stops a scrub"
        )));
    }
    context.replication.scrub(group.name().as_str(), rate.map(|rate| rate.0))?;
    show_scrub(context, call)
}

pub(super) fn show_scrub(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    answer(ScrubAnswer {
        scrub: context.replication.scrub_status(&group),
        damage: context.replication.damage(&group),
    })
}

pub(super) fn stop_scrub(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    context.replication.stop_scrub(group.name().as_str())?;
    done(format!("group {}: the scrub stops", group.name()))
}

pub(super) fn verify(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    let peer: Option<Name> = call.field("peer")?;
    let peer = peer.as_ref().map(Name::as_str);
    answer(context.replication.verify(group.name().as_str(), peer)?)
}

pub(super) fn show_verify(context: &Context, call: &Call) -> Answer {
    let group = context.group(call.path("group"))?;
    answer(context.replication.verify_status(&group))
}
