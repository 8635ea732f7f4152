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

/// Whose image is staged, of those that this thread has begun. Its parts alone are let in: those
/// that wait behind a beginning that was refused would go into the image that was staged before,
/// and those behind a part that was refused would leave a hole in their own.
#[derive(Debug, Default)]
pub struct Taking(Option<(NodeId, u64)>);

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
    let mut taking = Taking::default();
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
            job => perform(group, &mut taking, job, more),
        };
        if let Some((peer, input)) = done {
            report(peer, input);
        }
    }
}

/// Does one job; what is to be told of it, and which core. `taking` goes from each job of the group
/// to its next, in one life of the process. `more` gives the bytes that wait behind those of an
/// append, if they continue the same stream.
pub fn perform(
    group: &dyn Replica,
    taking: &mut Taking,
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
            match group.begin_image(&offer) {
                Ok(()) => taking.0 = Some((peer, stream)),
                Err(error) => {
                    // What is refused has changed nothing: another image may still be on its way.
                    if !matches!(error, GroupError::Refused { .. }) {
                        taking.0 = None;
                    }
                    return Some((peer, stage_failed(group, stream, &error)));
                }
            }
        }
        Job::Stage { peer, stream, .. } if taking.0 != Some((peer, stream)) => {
            let reason = format!("group {} stages no image of this stream", group.name());
            let group = group.id();
            return Some((peer, Input::StageFailed { group, stream, reason, refused: false }));
        }
        Job::Stage { peer, stream, bytes } => {
            let input = match stage(group, &bytes) {
                Ok((progress, switched)) => {
                    Input::Staged { group: group.id(), stream, progress, switched }
                }
                Err(error) => {
                    taking.0 = None;
                    stage_failed(group, stream, &error)
                }
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

    use bytes::BytesMut;

    use super::*;
    use crate::group::{Group, Op, Place, Read, Request, View};
    use crate::io::MemoryDisk;
    use crate::log::control::Mode;
    use crate::log::record::crc32;
    use crate::replication::drive::tests::{Node, member, node_on};
    use crate::replication::wire::part::encode_part;
    use crate::units::{BLOCK_BYTES, VolumeNumber};

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

    const A: NodeId = NodeId([2; 16]);
    const B: NodeId = NodeId([3; 16]);
    /// Bytes of a part of data.
    const PART: u64 = 128 << 10;

    fn data(volume: VolumeNumber, part: u64, byte: u8) -> ImagePart {
        let data = vec![byte; PART as usize];
        let crcs = data.chunks(BLOCK_BYTES as usize).map(crc32).collect();
        let at = Place { volume, offset: part * PART };
        ImagePart::Data { at, crcs, data: data.into() }
    }

    fn stage(peer: NodeId, stream: u64, part: &ImagePart) -> Job {
        let mut bytes = BytesMut::new();
        encode_part(part, &mut bytes);
        Job::Stage { peer, stream, bytes: bytes.freeze() }
    }

    fn content(group: &Group, volume: VolumeNumber) -> Vec<u8> {
        let mut buffer = vec![0; 4 * PART as usize];
        let mut reads = [Read { volume, offset: 0, buffer: &mut buffer, result: Ok(()) }];
        group.read(&mut reads);
        let [read] = reads;
        read.result.unwrap();
        buffer
    }

    /// A primary, and an empty copy whose thread does its jobs.
    struct Images {
        nodes: [Node; 2],
        primary: Arc<Group>,
        volume: VolumeNumber,
        copy: Arc<Group>,
        taking: Taking,
    }

    impl Images {
        fn new() -> Images {
            let (here, primary) = node_on(Arc::new(MemoryDisk::new()));
            let volume = primary.create_volume("v".parse().unwrap(), 4 * PART).unwrap().number;
            for part in 0..3 {
                let data = &[part as u8 + 1; PART as usize];
                let op = Op::Write { offset: part * PART, data };
                primary.append(&[Request { volume, op, fua: false }]).pop().unwrap().unwrap();
            }
            let (there, _) = node_on(Arc::new(MemoryDisk::new()));
            let (id, name) = (GroupId([9; 16]), "copy".parse().unwrap());
            let copy = there.registry.create_copy(id, name, 1 << 20).unwrap();
            Images { nodes: [here, there], primary, volume, copy, taking: Taking::default() }
        }

        fn perform(&mut self, job: Job) -> Option<Input> {
            let done = perform(&*self.copy, &mut self.taking, job, |_, _| None);
            done.map(|(_, input)| input)
        }

        fn offer(&self, stream: u64, staged: Option<&Staged>) -> ImageOffer {
            let to = "b".parse().unwrap();
            Replica::ship(&*self.primary, &to, None, Lsn::ZERO, staged, stream).unwrap()
        }

        /// The primary sends a part of its image.
        fn part(&mut self, stream: u64, number: u64) -> Option<Input> {
            let to = "b".parse().unwrap();
            let part = Replica::next_part(&*self.primary, &to, stream, number).unwrap()?;
            self.perform(stage(A, stream, &part))
        }

        /// It is asked anew: what is staged.
        fn prepare(&mut self, stream: u64) -> Option<Staged> {
            match self.perform(Job::Prepare { peer: A, stream }) {
                Some(Input::Prepared { staged, .. }) => staged,
                other => panic!("{other:?}"),
            }
        }

        /// The image goes on, to its end.
        fn finish(mut self, stream: u64, staged: Option<Staged>) {
            let offer = self.offer(stream, staged.as_ref());
            assert_eq!(offer.resumed, staged.is_some());
            assert!(self.perform(Job::BeginImage { peer: A, stream, offer }).is_none());
            let ends = (0..).find_map(|number| match self.part(stream, number)? {
                Input::Staged { switched, .. } => switched.then_some(number),
                other => panic!("{other:?}"),
            });
            assert!(ends.is_some_and(|number| number > 0));
            assert!(content(&self.copy, self.volume) == content(&self.primary, self.volume));
            self.nodes.iter().for_each(Node::stop);
        }
    }

    fn is_refused(told: Option<Input>) -> bool {
        matches!(told, Some(Input::StageFailed { .. }))
    }

    #[tokio::test]
    async fn parts_behind_an_image_that_was_refused_go_into_none_that_was_staged_before() {
        let mut images = Images::new();
        let volume = images.volume;
        let offer = images.offer(1, None);
        assert!(images.perform(Job::BeginImage { peer: A, stream: 1, offer }).is_none());
        for number in 0..2 {
            assert!(matches!(images.part(1, number), Some(Input::Staged { .. })), "{number}");
        }
        // Another node sends an image that does not fit, and its parts right behind.
        let offer = ImageOffer { since: Some(Lsn(4096)), ..offer };
        let told = images.perform(Job::BeginImage { peer: B, stream: 7, offer });
        assert!(matches!(told, Some(Input::StageFailed { refused: true, .. })), "{told:?}");
        for part in [data(volume, 1, 0xbb), ImagePart::End] {
            let told = images.perform(stage(B, 7, &part));
            assert!(matches!(told, Some(Input::StageFailed { refused: false, .. })), "{told:?}");
        }
        // The first image goes on, in its stream and in the next one.
        assert!(matches!(images.part(1, 2), Some(Input::Staged { .. })));
        let staged = images.prepare(2).unwrap();
        let reached: Vec<_> = staged.reached.iter().map(|reached| reached.to).collect();
        assert_eq!(reached, [Place { volume, offset: 2 * PART }]);
        assert_eq!(staged.done_bytes, 2 * PART);
        images.finish(2, Some(staged));
    }

    #[tokio::test]
    async fn behind_a_part_that_is_refused_no_other_of_its_stream_is_staged() {
        let mut images = Images::new();
        let volume = images.volume;
        let offer = images.offer(1, None);
        assert!(images.perform(Job::BeginImage { peer: A, stream: 1, offer }).is_none());
        assert!(matches!(images.part(1, 0), Some(Input::Staged { .. })));
        let ImagePart::Data { at, mut crcs, data: bytes } = data(volume, 0, 1) else { panic!() };
        crcs[3] ^= 1;
        let torn = ImagePart::Data { at, crcs, data: bytes };
        assert!(is_refused(images.perform(stage(A, 1, &torn))));
        assert!(is_refused(images.perform(stage(A, 1, &data(volume, 1, 2)))), "it leaves a hole");
        let staged = images.prepare(2);
        assert_eq!(staged.as_ref().map(|staged| staged.done_bytes), Some(0));
        images.finish(2, staged);
    }

    #[tokio::test]
    async fn a_part_of_the_stream_before_is_not_staged_in_the_next_ones_image() {
        let mut images = Images::new();
        let volume = images.volume;
        assert!(is_refused(images.perform(stage(A, 1, &data(volume, 0, 9)))), "none has begun");
        for stream in [1, 2] {
            let staged = images.prepare(stream);
            let offer = images.offer(stream, staged.as_ref());
            assert!(images.perform(Job::BeginImage { peer: A, stream, offer }).is_none());
            assert!(matches!(images.part(stream, 0), Some(Input::Staged { .. })));
        }
        assert!(is_refused(images.perform(stage(A, 1, &data(volume, 0, 9)))));
        let staged = images.prepare(3);
        images.finish(3, staged);
    }
}
