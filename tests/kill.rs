//! `kill -9` of either appliance under load, twenty times: no answered write is lost, every image
//! on the secondary is a prefix, and both nodes go on by themselves.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tidelog::nbd::{Client, NbdAddress};

use crate::support::oracle::{BLOCK_BYTES, History, read_stamps, stamp};
use crate::support::{Appliance, Setup, pause, wait_for};

const KILLS: usize = 20;
const VOLUMES: [&str; 2] = ["one", "two"];
const VOLUME_BLOCKS: u64 = 2048;
const WRITERS: u64 = 4;
/// Blocks of each volume that belong to one writer.
const STRIPE_BLOCKS: u64 = VOLUME_BLOCKS / WRITERS;
/// Requests between two kills, at least.
const REQUESTS_PER_ROUND: usize = 400;
/// A writer rests after each request: the log of the whole test stays in hundreds of megabytes.
const REST: Duration = Duration::from_millis(2);

struct Load {
    history: Arc<Mutex<History>>,
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(socket: PathBuf) -> Load {
        let history = Arc::new(Mutex::new(History::default()));
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

    fn answered(&self) -> usize {
        self.history.lock().unwrap().answered()
    }

    fn wait_for_more(&self, requests: usize) {
        let target = self.answered() + requests;
        wait_for("the hosts' writes to be answered", || (self.answered() >= target).then_some(()));
    }

    fn stop(self) -> History {
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
                    pause(Duration::from_millis(20));
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
            Err(_) => clients.clear(),
        }
        pause(REST);
    }
}

/// What both volumes hold, read through NBD; `suffix` names an image.
fn contents(node: &Appliance, suffix: &str) -> HashMap<(usize, u64), u64> {
    let mut held = HashMap::new();
    for (volume, name) in VOLUMES.iter().enumerate() {
        let address = NbdAddress::Unix(node.nbd_socket());
        let mut client = Client::connect(&address, &format!("g/{name}{suffix}")).unwrap();
        let mut bytes = vec![0; usize::try_from(client.size_bytes()).unwrap()];
        client.read(0, &mut bytes).unwrap();
        held.extend(read_stamps(volume, &bytes).unwrap());
        client.disconnect().unwrap();
    }
    held
}

fn hold(what: &str, faults: Vec<String>) {
    let shown: Vec<&String> = faults.iter().take(10).collect();
    assert!(faults.is_empty(), "{what}: {} faults, among them {shown:#?}", faults.len());
}

/// Every write that was answered before now is in the live volumes of the primary.
fn check_primary(a: &Appliance, load: &Load, round: usize) {
    let answered_by = load.history.lock().unwrap().now();
    let held = contents(a, "");
    let faults = load.history.lock().unwrap().faults_of_live(&held, answered_by);
    hold(&format!("round {round}, live on a"), faults);
}

/// An image on the secondary is a prefix.
fn check_secondary(b: &Appliance, load: &Load, round: usize) {
    let name = format!("round-{round}");
    b.run(&["image", "open", "g", "--at", "now", "--name", &name]);
    let held = contents(b, &format!("@{name}"));
    b.run(&["image", "close", &format!("g@{name}")]);
    let faults = load.history.lock().unwrap().faults(&held, None);
    hold(&format!("round {round}, image on b"), faults);
}

fn wait_until_streaming(a: &Appliance) {
    wait_for("b to stream again", || {
        (a.status("g")["peers"][0]["replication_state"] == "streaming").then_some(())
    });
}

/// Waits until b has durably what a's log holds now.
fn wait_until_b_has(a: &Appliance, b: &Appliance) {
    let head = a.status("g")["log"]["head_lsn"].as_u64().unwrap();
    wait_for("b to have durably what a had", || {
        (b.status("g")["log"]["durable_lsn"].as_u64()? >= head).then_some(())
    });
}

#[test]
fn answered_writes_survive_kill_9_of_either_node_twenty_times() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Appliance::start(&dir.path().join("a"), Setup::new("a"));
    let mut b = Appliance::start(&dir.path().join("b"), Setup::new("b"));
    a.pair_with(&b);
    a.run(&["group", "create", "g"]);
    // Short enough that the log is folded meanwhile, far longer than a node is away.
    a.run(&["group", "set", "g", "window=20s"]);
    for volume in VOLUMES {
        let size = (VOLUME_BLOCKS * BLOCK_BYTES as u64).to_string();
        a.run(&["volume", "create", &format!("g/{volume}"), "--size", &size]);
    }
    a.run(&["replicate", "g", "--to", "b"]);
    wait_until_streaming(&a);

    let load = Load::start(a.nbd_socket());
    for round in 0..KILLS {
        load.wait_for_more(REQUESTS_PER_ROUND);
        let kill_primary = round % 2 == 0;
        let victim = if kill_primary { &mut a } else { &mut b };
        victim.kill();
        victim.restart();
        load.wait_for_more(REQUESTS_PER_ROUND / 4);
        check_primary(&a, &load, round);
        wait_until_streaming(&a);
        wait_until_b_has(&a, &b);
        check_secondary(&b, &load, round);
    }
    let history = load.stop();
    assert!(history.answered() > KILLS * REQUESTS_PER_ROUND);
    wait_until_b_has(&a, &b);
    let live = contents(&a, "");
    hold("live on a at the end", history.faults(&live, Some(history.now())));
    b.run(&["image", "open", "g", "--at", "now", "--name", "end"]);
    assert_eq!(contents(&b, "@end"), live, "b holds what a holds");
    for node in [&a, &b] {
        assert_eq!(node.errors(), Vec::<String>::new(), "node {}", node.node);
    }
    assert_eq!(a.status("g")["role"], "primary");
    assert_eq!(b.status("g")["role"], "secondary");
}
