//! The content at a position: the control state at the horizon, and the log behind it.

use super::content::Content;
use super::engine::checkpoint;
use super::indexing::visit;
use super::rewound::Rewinds;
use super::timeline::Checkpoint;
use crate::base::ControlState;
use crate::log::reader::ScanEnd;
use crate::log::segment::Segments;
use crate::units::Lsn;

/// The content at `end`, a request's end, and the checkpoint there. `rewinds` are those of the log
/// from the horizon on.
///
/// # Errors
///
/// Why the log could not be followed up to there.
pub(super) fn replay(
    segments: &Segments,
    horizon: &ControlState,
    rewinds: &Rewinds,
    end: Lsn,
) -> Result<(Content, Checkpoint), ScanEnd> {
    replay_through(segments, horizon, rewinds, &[], end)
        .map(|(_, content, behind)| (content, behind))
}

/// What [`replay_through`] gives: at each stop and at the end, where it is and what is there.
pub(super) type Stopped = (Vec<(Checkpoint, Content)>, Content, Checkpoint);

/// The same, with the contents at each of `stops`, ends of requests in order.
///
/// # Errors
///
/// Why the log could not be followed up to there.
pub(super) fn replay_through(
    segments: &Segments,
    horizon: &ControlState,
    rewinds: &Rewinds,
    stops: &[Lsn],
    end: Lsn,
) -> Result<Stopped, ScanEnd> {
    let replayed = replay_remembering(segments, horizon, rewinds.targets(), stops, end);
    let (stopped, mut content, behind) = replayed?;
    content.forget_remembered();
    Ok((stopped, content, behind))
}

/// The same; the content at the end still remembers what is at `positions`, for records behind it.
///
/// # Errors
///
/// Why the log could not be followed up to there.
pub(super) fn replay_remembering(
    segments: &Segments,
    horizon: &ControlState,
    positions: impl Iterator<Item = Lsn>,
    stops: &[Lsn],
    end: Lsn,
) -> Result<Stopped, ScanEnd> {
    let mut content = Content::at_horizon(horizon);
    content.remember_at(positions);
    let start = checkpoint(horizon);
    let mut behind = start;
    let mut stopped: Vec<(Checkpoint, Content)> = Vec::new();
    let stop = |behind, content: &Content| {
        let mut content = content.clone();
        content.forget_remembered();
        (behind, content)
    };
    let mut freed = Vec::new();
    visit(segments, (start.lsn, start.chain), end, end, |header, payload| {
        while stops.get(stopped.len()).is_some_and(|stop| header.lsn >= *stop) {
            stopped.push(stop(behind, &content));
        }
        content.apply(header, payload, &mut freed);
        freed.clear();
        behind = Checkpoint::behind(header);
    })?;
    while stopped.len() < stops.len() {
        stopped.push(stop(behind, &content));
    }
    Ok((stopped, content, behind))
}
