//! The thread of one replicated group: all that touches its log for the core, in order, off the
//! runtime's threads.

use std::sync::{Arc, mpsc};

use bytes::Bytes;

use crate::group::{Discard, GroupError, ImageOffer, ImagePart, ImageProgress, Staged};
use crate::units::{Chain, GroupId, Lsn, Name, NodeId};

use super::bounds::Room;
use super::core::{Appended, Input, Output};
use super::replica::{Replica, history_of};
use super::service::ReplicationError;
use super::wire::part::decode_part;

/// Appended bytes after which a result is told though more bytes wait.
const REPORT_BYTES: u64 = 1 << 20;

/// What a group's thread does.
#[derive(Debug)]
#[expect(missing_docs, reason = "each is the core's output of the same name")]
pub enum Job {
    Prepare {
        peer: NodeId,
        stream: u64,
    },
    LookupChain {
        peer: NodeId,
        lsn: Lsn,
        ticket: u64,
    },
    Append {
        peer: NodeId,
        stream: u64,
        position: Lsn,
        bytes: Bytes,
    },
    Committed {
        lsn: Lsn,
    },
    Serve {
        peer: NodeId,
    },
    HoldBack {
        counter: u64,
        reason: String,
    },
    SplitBrain {
        peer: NodeId,
        there_is: bool,
    },
    Yield {
        peer: NodeId,
        at: Lsn,
        chain: Option<Chain>,
    },
    Retire {
        retired: bool,
    },
    Ship {
        peer: NodeId,
        stream: u64,
        name: Name,
        since: Option<Lsn>,
        common: Lsn,
        staged: Option<Staged>,
    },
    EndShipment {
        name: Name,
    },
    PeerNeeds {
        peer: NodeId,
        from: Lsn,
        follows: bool,
    },
    BeginImage {
        peer: NodeId,
        stream: u64,
        offer: ImageOffer,
    },
    Stage {
        peer: NodeId,
        stream: u64,
        bytes: Bytes,
    },
    DropStaging,
}

impl Job {
    /// What an output has the group's thread do; the output itself where it touches no log, or
    /// may not wait.
    ///
    /// # Errors
    ///
    /// Those outputs, for the shell.
    pub fn of(peer: NodeId, output: Output) -> Result<(GroupId, Job), Output> {
        Ok(match output {
            Output::Prepare { group, stream } => (group, Job::Prepare { peer, stream }),
            Output::LookupChain { group, lsn, ticket } => {
                (group, Job::LookupChain { peer, lsn, ticket })
            }
            Output::Append { group, stream, position, bytes } => {
                (group, Job::Append { peer, stream, position, bytes })
            }
            Output::Committed { group, lsn } => (group, Job::Committed { lsn }),
            Output::Retire { group, retired } => (group, Job::Retire { retired }),
            Output::Serve { group } => (group, Job::Serve { peer }),
            Output::HoldBack { group, counter, reason } => {
                (group, Job::HoldBack { counter, reason })
            }
            Output::SplitBrain { group, there_is } => (group, Job::SplitBrain { peer, there_is }),
            Output::Yield { group, at, chain } => (group, Job::Yield { peer, at, chain }),
            Output::Ship { group, stream, peer: name, since, common, staged } => {
                (group, Job::Ship { peer, stream, name, since, common, staged })
            }
            Output::PeerNeeds { group, from, follows } => {
                (group, Job::PeerNeeds { peer, from, follows })
            }
            Output::EndShipment { group, peer: name } => (group, Job::EndShipment { name }),
            Output::BeginImage { group, stream, offer } => {
                (group, Job::BeginImage { peer, stream, offer })
            }
            Output::Stage { group, stream, bytes } => (group, Job::Stage { peer, stream, bytes }),
            Output::DropStaging { group } => (group, Job::DropStaging),
            Output::Dial
            | Output::Close { .. }
            | Output::Send { .. }
            | Output::SendLog { .. }
            | Output::SendPart { .. }
            | Output::FollowChanged { .. }
            // Hosts wait for these: not behind an image for another peer.
            | Output::PeerHolds { .. }
            | Output::PeerLost { .. }
            | Output::Event { .. } => return Err(output),
        })
    }
}

/// Whether the log was cut, and the group follows.
type Yielded = Result<(), ReplicationError>;

/// A running thread; it ends when this is dropped and all its jobs are done.
pub(super) struct Worker {
    jobs: mpsc::Sender<(Job, Option<Room>)>,
}

impl Worker {
    /// Starts the thread. `yield_to` has the group follow a peer; `report` takes each result, and
    /// never blocks.
    pub(super) fn start(
        group: Arc<dyn Replica>,
        yield_to: impl Fn(NodeId, Lsn, Option<Chain>) -> Yielded + Send + 'static,
        report: impl Fn(NodeId, Input) + Send + 'static,
    ) -> std::io::Result<Worker> {
        let (jobs, waiting) = mpsc::channel();
        std::thread::Builder::new()
            .name(format!("replica {}", group.name()))
            .spawn(move || run(&*group, &waiting, &yield_to, &report))?;
        Ok(Worker { jobs })
    }

    /// Adds a job behind those that wait; until it is done it keeps the room of what caused it.
    /// False where the thread is gone.
    pub(super) fn add(&self, job: Job, room: Option<Room>) -> bool {
        self.jobs.send((job, room)).is_ok()
    }
}

fn run(
    group: &dyn Replica,
    waiting: &mpsc::Receiver<(Job, Option<Room>)>,
    yield_to: &(impl Fn(NodeId, Lsn, Option<Chain>) -> Yielded + Send),
    report: &(impl Fn(NodeId, Input) + Send),
) {
    let mut next = None;
    while let Some((job, _room)) = next.take().or_else(|| waiting.recv().ok()) {
        let more = |peer, stream| match waiting.try_recv().ok()? {
            (Job::Append { peer: p, stream: s, position, bytes }, _)
                if (p, s) == (peer, stream) =>
            {
                Some((position, bytes))
            }
            other => {
                next = Some(other);
                None
            }
        };
        let done = match job {
            Job::Yield { peer, at, chain } => {
                Some((peer, yielded(group.id(), yield_to(peer, at, chain))))
            }
            job => perform(group, job, more),
        };
        if let Some((peer, input)) = done {
            report(peer, input);
        }
    }
}

/// Does one job; what is to be told of it, and which core. `more` gives the bytes that wait behind
/// those of an append, if they continue the same stream.
pub fn perform(
    group: &dyn Replica,
    job: Job,
    mut more: impl FnMut(NodeId, u64) -> Option<(Lsn, Bytes)>,
) -> Option<(NodeId, Input)> {
    match job {
        Job::Prepare { peer, stream } => {
            group.reset_received();
            let staged = group.staged().unwrap_or_else(|error| {
                tracing::warn!("group {}: what is staged: {error}", group.name());
                None
            });
            let positions = group.positions();
            let input = Input::Prepared {
                group: group.id(),
                stream,
                history: history_of(group, &positions),
                durable: positions.durable.min(positions.head),
                requests: positions.requests,
                staged,
                needs_image: group.needs_image(),
            };
            return Some((peer, input));
        }
        Job::LookupChain { peer, lsn, ticket } => {
            let chain = group.chain_at(lsn);
            return Some((peer, Input::ChainFound { group: group.id(), ticket, chain }));
        }
        Job::Append { peer, stream, position, bytes } => {
            let mut appended = bytes.len() as u64;
            let mut result = append(group, position, &bytes);
            // What waits behind it goes along before anybody is told.
            while result.is_ok() && appended < REPORT_BYTES {
                let Some((position, bytes)) = more(peer, stream) else { break };
                appended += bytes.len() as u64;
                result = append(group, position, &bytes);
            }
            return Some((peer, appended_input(group, stream, result)));
        }
        Job::Yield { peer, at, chain } => {
            let result = group.yield_to(at, chain, Discard::Received);
            return Some((peer, yielded(group.id(), result)));
        }
        Job::Ship { peer, stream, name, since, common, staged } => {
            let offer = group.ship(&name, since, common, staged.as_ref(), stream);
            let offer = offer.map_err(|error| error.to_string());
            return Some((peer, Input::Shipped { group: group.id(), stream, offer }));
        }
        Job::BeginImage { peer, stream, offer } => {
            if let Err(error) = group.begin_image(&offer) {
                return Some((peer, stage_failed(group, stream, &error)));
            }
        }
        Job::Stage { peer, stream, bytes } => {
            let input = match stage(group, &bytes) {
                Ok((progress, switched)) => {
                    Input::Staged { group: group.id(), stream, progress, switched }
                }
                Err(error) => stage_failed(group, stream, &error),
            };
            return Some((peer, input));
        }
        Job::PeerNeeds { peer, from, follows } => group.note_peer_needs(peer, from, follows),
        Job::EndShipment { name } => group.end_shipment(&name),
        Job::DropStaging => {
            if let Err(error) = group.drop_staging() {
                tracing::warn!("group {}: what is staged: {error}", group.name());
            }
        }
        Job::Committed { lsn } => group.note_committed(lsn),
        Job::Retire { retired } => {
            if let Err(error) = group.set_retired(retired) {
                tracing::error!("group {}: mark as retired: {error}", group.name());
            }
        }
        Job::Serve { peer } => {
            if let Err(error) = group.note_answer(peer) {
                tracing::error!("group {}: serve: {error}", group.name());
            }
        }
        Job::HoldBack { counter, reason } => group.hold_back(counter, &reason),
        Job::SplitBrain { peer, there_is } => {
            if let Err(error) = group.note_split_brain(peer, there_is) {
                tracing::error!("group {}: note a split brain: {error}", group.name());
            }
        }
    }
    None
}

fn yielded(group: GroupId, result: Result<(), impl std::fmt::Display>) -> Input {
    match result {
        Ok(()) => Input::Yielded { group },
        Err(error) => Input::YieldRefused { group, reason: error.to_string() },
    }
}

/// Stages a part, and switches to the image where it was the end.
fn stage(group: &dyn Replica, bytes: &Bytes) -> Result<(ImageProgress, bool), GroupError> {
    let part = decode_part(bytes).map_err(|error| GroupError::Damaged {
        group: group.name().clone(),
        what: error.to_string(),
    })?;
    let ends = part == ImagePart::End;
    let progress = group.stage(part)?;
    if ends {
        group.switch_to_image()?;
    }
    Ok((progress, ends))
}

fn stage_failed(group: &dyn Replica, stream: u64, error: &GroupError) -> Input {
    let refused = matches!(error, GroupError::Refused { .. });
    Input::StageFailed { group: group.id(), stream, reason: error.to_string(), refused }
}

fn append(group: &dyn Replica, position: Lsn, bytes: &[u8]) -> Result<(), String> {
    let expected = group.received_end();
    if position != expected {
        return Err(format!("bytes for LSN {position} came where {expected} is next"));
    }
    group.append_received(position, bytes).map(|_| ()).map_err(|error| error.to_string())
}

fn appended_input(group: &dyn Replica, stream: u64, result: Result<(), String>) -> Input {
    let group_id = group.id();
    match result {
        Ok(()) => {
            let positions = group.positions();
            Input::Appended(Appended {
                group: group_id,
                stream,
                received: group.received_end(),
                head: positions.head,
                chain: positions.chain,
                durable: positions.durable.min(positions.head),
                requests: positions.requests,
            })
        }
        Err(reason) => Input::AppendFailed { group: group_id, stream, reason },
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;
    use std::time::Duration;

    use super::*;
    use crate::io::MemoryDisk;
    use crate::log::control::Mode;
    use crate::replication::drive::tests::{member, node_on};

    #[tokio::test]
    async fn a_yield_that_could_not_be_noted_is_refused_with_the_reason() {
        let (node, group) = node_on(std::sync::Arc::new(MemoryDisk::new()));
        let (peer, at) = (NodeId([2; 16]), group.positions().head);
        group.append_control(member(peer, "b", Mode::Async)).unwrap();
        let (sender, told) = sync_channel(1);
        let no_room = |_, _, _| Err(ReplicationError::Refused("no room for peers".to_owned()));
        let report = move |peer, input| sender.send((peer, input)).unwrap();
        let worker = Worker::start(group.clone(), no_room, report).unwrap();
        assert!(worker.add(Job::Yield { peer, at, chain: None }, None));
        let (told_of, input) = told.recv_timeout(Duration::from_secs(60)).unwrap();
        let Input::YieldRefused { group: id, reason } = input else { panic!("{input:?}") };
        assert_eq!((told_of, id, &*reason), (peer, group.id(), "no room for peers"));
        assert!(group.positions().head > at, "its log is whole");
        node.stop();
    }
}
