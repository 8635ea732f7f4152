//! The prefix oracle for many writers at once: each block carries its request, its place and a
//! checksum; the writers note when each request was sent and when it was answered.
//!
//! An image is right if, for every request in it, it also holds every request that was answered
//! before that one was sent, and if it holds each request whole. Every writer has blocks of its
//! own, so the requests to one block have an order without asking the server.

use std::collections::HashMap;

/// Bytes of a stamped block.
pub const BLOCK_BYTES: usize = 4096;
const MAGIC: &[u8; 8] = b"KILLTEST";
const SUM_OFFSET: usize = BLOCK_BYTES - 4;

/// One write request: a run of blocks of one volume.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// Volume, by its index in the test.
    pub volume: usize,
    /// First block.
    pub block: u64,
    /// Blocks.
    pub count: u64,
    /// Tick of the common counter before it was sent.
    pub sent: u64,
    /// Tick after it was answered, if it was.
    pub answered: Option<u64>,
}

/// Everything that was sent. A request's id is its index plus one, in the order of `sent`.
#[derive(Clone, Debug, Default)]
pub struct History {
    requests: Vec<Sent>,
    /// Per block the ids of the requests to it, oldest first.
    by_block: HashMap<(usize, u64), Vec<u64>>,
    tick: u64,
    answered: usize,
}

impl History {
    /// Notes that a request is about to be sent; its id.
    pub fn send(&mut self, volume: usize, block: u64, count: u64) -> u64 {
        self.tick += 1;
        self.requests.push(Sent { volume, block, count, sent: self.tick, answered: None });
        let id = self.requests.len() as u64;
        for at in block..block + count {
            self.by_block.entry((volume, at)).or_default().push(id);
        }
        id
    }

    /// Notes that a request was answered.
    pub fn answer(&mut self, id: u64) {
        self.tick += 1;
        let request = usize::try_from(id - 1).unwrap();
        self.requests[request].answered = Some(self.tick);
        self.answered += 1;
    }

    /// Requests answered so far.
    pub fn answered(&self) -> usize {
        self.answered
    }

    /// What volumes that hold this lack is owed to nobody any more: it was lost, and may be.
    pub fn forgive(&mut self, held: &HashMap<(usize, u64), u64>) {
        for (place, ids) in &mut self.by_block {
            ids.retain(|id| *id <= held[place]);
        }
    }

    fn request(&self, id: u64) -> Option<&Sent> {
        self.requests.get(usize::try_from(id.checked_sub(1)?).ok()?)
    }

    /// The last request to a block that was answered before `tick`.
    fn owed(&self, place: (usize, u64), tick: u64) -> u64 {
        let answered_in_time = |id: &&u64| {
            self.request(**id).unwrap().answered.is_some_and(|answered| answered < tick)
        };
        let ids = self.by_block.get(&place).map_or(&[][..], Vec::as_slice);
        ids.iter().rev().find(answered_in_time).copied().unwrap_or(0)
    }

    /// What is wrong with an image, given what each of its blocks holds (0: never written). With
    /// `all_answered_by`, it must also hold every request answered up to that tick.
    pub fn faults(
        &self,
        held: &HashMap<(usize, u64), u64>,
        all_answered_by: Option<u64>,
    ) -> Vec<String> {
        let mut faults = Vec::new();
        let mut newest = all_answered_by.map_or(0, |tick| tick + 1);
        let mut whole = Vec::new();
        for (place, id) in held {
            if *id == 0 {
                continue;
            }
            match self.request(*id) {
                Some(request) if self.by_block.get(place).is_some_and(|ids| ids.contains(id)) => {
                    newest = newest.max(request.sent);
                    whole.push((*id, *request));
                }
                _ => {
                    faults.push(format!("{place:?}: holds request {id}, which was not sent there"))
                }
            }
        }
        for (place, ids) in &self.by_block {
            let Some(found) = held.get(place) else { continue };
            let owed = self.owed(*place, newest);
            if *found < owed {
                faults.push(format!(
                    "{place:?}: holds request {found}, but {owed} was answered before the newest \
                     request of the image was sent (of {} to this block)",
                    ids.len()
                ));
            }
        }
        for (id, request) in whole {
            for block in request.block..request.block + request.count {
                let place = (request.volume, block);
                if held.get(&place).is_some_and(|found| *found < id) {
                    faults.push(format!(
                        "{place:?}: holds {} of request {id} only in part",
                        held[&place]
                    ));
                }
            }
        }
        faults
    }

    /// What is wrong with live volumes that were read, block after block, from `answered_by` on
    /// while the writers went on: a block may hold what was sent meanwhile, but never less than
    /// what was answered before. (They are no image of one moment, so no more than this can be
    /// asked.)
    pub fn faults_of_live(
        &self,
        held: &HashMap<(usize, u64), u64>,
        answered_by: u64,
    ) -> Vec<String> {
        let mut faults = Vec::new();
        for (place, ids) in &self.by_block {
            let (found, owed) = (held[place], self.owed(*place, answered_by + 1));
            if found != 0 && !ids.contains(&found) {
                faults.push(format!("{place:?}: holds request {found}, which was not sent there"));
            }
            if found < owed {
                faults.push(format!("{place:?}: holds request {found}, but {owed} was answered"));
            }
        }
        faults
    }

    /// The last tick.
    pub fn now(&self) -> u64 {
        self.tick
    }
}

/// The block that a request leaves at a place.
pub fn stamp(id: u64, volume: usize, block: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BLOCK_BYTES);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&id.to_le_bytes());
    bytes.extend_from_slice(&(volume as u64).to_le_bytes());
    bytes.extend_from_slice(&block.to_le_bytes());
    let mut filler = id ^ (block << 32) ^ 0x9e37_79b9_7f4a_7c15;
    while bytes.len() < SUM_OFFSET {
        filler ^= filler << 13;
        filler ^= filler >> 7;
        filler ^= filler << 17;
        let left = (SUM_OFFSET - bytes.len()).min(8);
        bytes.extend_from_slice(&filler.to_le_bytes()[..left]);
    }
    bytes.extend_from_slice(&sum(&bytes).to_le_bytes());
    bytes
}

/// The checksum of a stamp. No CRC: with its own CRC behind it all data has the same one, so that
/// those of log and base would tell no stamps apart.
fn sum(bytes: &[u8]) -> u32 {
    let times = 0x9e37_79b9_7f4a_7c15_u64;
    let words = bytes.chunks(8).map(|part| {
        let mut word = [0; 8];
        word[..part.len()].copy_from_slice(part);
        u64::from_le_bytes(word)
    });
    words.fold(0, |sum, word| (sum ^ word).wrapping_mul(times).rotate_left(29)) as u32
}

/// What every block of a volume holds; a block that holds neither zeros nor a whole stamp of its
/// own place is a fault.
pub fn read_stamps(volume: usize, bytes: &[u8]) -> Result<HashMap<(usize, u64), u64>, String> {
    let mut held = HashMap::new();
    for (block, found) in bytes.chunks(BLOCK_BYTES).enumerate() {
        let block = block as u64;
        let id = if found.iter().all(|byte| *byte == 0) {
            0
        } else {
            let id = u64::from_le_bytes(found[8..16].try_into().unwrap());
            if found != stamp(id, volume, block) {
                return Err(format!("({volume}, {block}): torn, misplaced or foreign: {id}"));
            }
            id
        };
        held.insert((volume, block), id);
    }
    Ok(held)
}

mod teeth {
    //! Images that are wrong, each in one way.

    use super::*;

    /// Requests 1 to 4 on blocks 0, 1, 0–1, 2; 4 was never answered.
    fn history() -> History {
        let mut history = History::default();
        for (block, count) in [(0, 1), (1, 1), (0, 2)] {
            let id = history.send(0, block, count);
            history.answer(id);
        }
        history.send(0, 2, 1);
        history
    }

    fn image(blocks: [u64; 3]) -> HashMap<(usize, u64), u64> {
        blocks.into_iter().enumerate().map(|(block, id)| ((0, block as u64), id)).collect()
    }

    #[test]
    fn every_prefix_is_right() {
        let history = history();
        for blocks in [[0, 0, 0], [1, 0, 0], [1, 2, 0], [3, 3, 0], [3, 3, 4]] {
            assert_eq!(history.faults(&image(blocks), None), Vec::<String>::new(), "{blocks:?}");
        }
        assert_eq!(history.faults(&image([3, 3, 0]), Some(history.now())), Vec::<String>::new());
    }

    #[test]
    fn what_is_no_prefix_is_a_fault() {
        let history = history();
        for (blocks, why) in [
            ([0, 2, 0], "request 1 was answered before 2 was sent"),
            ([3, 2, 0], "request 3 is there by half"),
            ([1, 2, 4], "request 3 was answered before 4 was sent"),
            ([9, 0, 0], "nobody sent 9"),
            ([4, 0, 0], "4 was sent to another block"),
        ] {
            assert_ne!(history.faults(&image(blocks), None), Vec::<String>::new(), "{why}");
        }
        let lost = history.faults(&image([1, 2, 0]), Some(history.now()));
        assert_ne!(lost, Vec::<String>::new(), "request 3 was answered and is lost");
    }

    #[test]
    fn a_torn_and_a_misplaced_block_are_faults() {
        let mut torn = stamp(7, 0, 0);
        torn[2048..].copy_from_slice(&stamp(8, 0, 0)[2048..]);
        assert!(read_stamps(0, &torn).is_err());
        assert!(read_stamps(0, &stamp(7, 0, 1)).is_err());
        assert!(read_stamps(1, &stamp(7, 0, 0)).is_err());
        assert_eq!(read_stamps(0, &stamp(7, 0, 0)).unwrap()[&(0, 0)], 7);
    }
}
