//! Hosts under load: four writers on two volumes of the group `g`, with a history of what was
//! answered, and what the volumes hold.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tidelog::nbd::{Client, NbdAddress};

use super::oracle::{BLOCK_BYTES, History, read_stamps, stamp};
use super::{Appliance, pause, wait_for};

/// The volumes that are written to.
pub const VOLUMES: [&str; 2] = ["one", "two"];
/// Blocks of each volume.
pub const VOLUME_BLOCKS: u64 = 2048;
const WRITERS: u64 = 4;
/// Blocks of each volume that belong to one writer.
const STRIPE_BLOCKS: u64 = VOLUME_BLOCKS / WRITERS;
/// A writer rests after each request: the log of the whole test stays in hundreds of megabytes.
const REST: Duration = Duration::from_millis(2);
/// And longer where it was refused.
const RETRY: Duration = Duration::from_millis(20);

/// The writers.
pub struct Load {
    /// What was sent and answered.
    pub history: Arc<Mutex<History>>,
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts the writers.
    pub fn start(socket: PathBuf) -> Load {
        Load::go_on(socket, History::default())
    }

    /// Starts the writers where others have written before.
    pub fn go_on(socket: PathBuf, history: History) -> Load {
        let history = Arc::new(Mutex::new(history));
        let stop = Arc::new(AtomicBool::new(false));
        let writers = (0..WRITERS)
            .map(|writer| {
                let (history, stop) = (Arc::clone(&history), Arc::clone(&stop));
                let address = NbdAddress::Unix(socket.clone());
                std::thread::spawn(move || write(writer, &address, &history, &stop))
            })
            .collect();
        Load { history, stop, writers }
    }

    /// Requests answered so far.
    pub fn answered(&self) -> usize {
        self.history.lock().unwrap().answered()
    }

    /// Waits until so many more were answered.
    pub fn wait_for_more(&self, requests: usize) {
        let target = self.answered() + requests;
        wait_for("the hosts' writes to be answered", || (self.answered() >= target).then_some(()));
    }

    /// Ends the writers.
    pub fn stop(self) -> History {
        self.stop.store(true, Ordering::SeqCst);
        for writer in self.writers {
            writer.join().unwrap();
        }
        self.history.lock().unwrap().clone()
    }
}

/// One host: writes runs of its own blocks in turn to both volumes; a lost connection is opened
/// again, and what was not answered stays unanswered.
fn write(writer: u64, address: &NbdAddress, history: &Mutex<History>, stop: &AtomicBool) {
    let mut random = writer + 1;
    let mut clients: Vec<Client> = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        if clients.is_empty() {
            let connected: Result<Vec<Client>, _> = VOLUMES
                .iter()
                .map(|volume| Client::connect(address, &format!("g/{volume}")))
                .collect();
            match connected {
                Ok(connected) => clients = connected,
                Err(_) => {
                    pause(RETRY);
                    continue;
                }
            }
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let volume = usize::try_from(random % 2).unwrap();
        let count = 1 + (random >> 8) % 8;
        let block = writer * STRIPE_BLOCKS + (random >> 16) % (STRIPE_BLOCKS - count);
        let id = history.lock().unwrap().send(volume, block, count);
        let bytes: Vec<u8> = (block..block + count).flat_map(|at| stamp(id, volume, at)).collect();
        let offset = block * BLOCK_BYTES as u64;
        let written = match id % 64 {
            0 => clients[volume].write_fua(offset, &bytes),
            1 => clients[volume].write(offset, &bytes).and_then(|()| clients[volume].flush()),
            _ => clients[volume].write(offset, &bytes),
        };
        match written {
            Ok(()) => history.lock().unwrap().answer(id),
            Err(_) => {
                clients.clear();
                pause(RETRY);
            }
        }
        pause(REST);
    }
}

/// Makes the volumes that are written to.
pub fn create_volumes(node: &Appliance) {
    for volume in VOLUMES {
        let size = (VOLUME_BLOCKS * BLOCK_BYTES as u64).to_string();
        node.run(&["volume", "create", &format!("g/{volume}"), "--size", &size]);
    }
}

/// A client of a volume of the group, or of an image of one (`VOLUME@IMAGE`).
pub fn client(node: &Appliance, volume: &str) -> Client {
    Client::connect(&NbdAddress::Unix(node.nbd_socket()), &format!("g/{volume}")).unwrap()
}

/// Waits until both nodes stream, and their logs end at the same position.
pub fn wait_until_level(a: &Appliance, b: &Appliance) {
    wait_for("b to stream", || {
        let (here, there) = (a.status("g"), b.status("g"));
        let streams = [&here, &there]
            .iter()
            .all(|status| status["peers"][0]["replication_state"] == "streaming");
        (streams && here["log"]["head_lsn"] == there["log"]["head_lsn"]).then_some(())
    });
}

/// What both volumes hold, read through NBD; `suffix` names an image.
pub fn contents(node: &Appliance, suffix: &str) -> HashMap<(usize, u64), u64> {
    let mut held = HashMap::new();
    for (volume, name) in VOLUMES.iter().enumerate() {
        let mut client = client(node, &format!("{name}{suffix}"));
        let mut bytes = vec![0; usize::try_from(client.size_bytes()).unwrap()];
        client.read(0, &mut bytes).unwrap();
        held.extend(read_stamps(volume, &bytes).unwrap());
        client.disconnect().unwrap();
    }
    held
}

/// Fails where there are faults.
pub fn hold(what: &str, faults: Vec<String>) {
    let shown: Vec<&String> = faults.iter().take(10).collect();
    assert!(faults.is_empty(), "{what}: {} faults, among them {shown:#?}", faults.len());
}
