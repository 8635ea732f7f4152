//! What two nodes tell each other of their images.

use super::*;
use crate::io::{Fault, MemoryDisk};
use crate::log::control::Mode;
use crate::replication::damage::load;
use crate::replication::drive::tests::{member, node_on};
use crate::replication::peers::Peer;
use crate::units::{LogTime, NodeId};

#[test]
fn equal_hashes_are_told_once_and_a_wrong_count_is_refused() {
    let all = [Some(1), Some(1), Some(1), None, Some(2)];
    let runs = runs_of(&all);
    assert_eq!(runs.len(), 3);
    assert_eq!(hashes_of(runs.clone(), 5).unwrap(), all);
    assert!(hashes_of(runs.clone(), 6).is_err());
    assert_eq!(hashes_of(vec![(u64::MAX, None)], 4).unwrap(), [None; 4], "no more than asked");
    assert!(hashes_of(vec![(4, Some("x".to_owned()))], 4).is_err());
}

#[tokio::test]
async fn a_peer_that_asks_again_and_again_has_one_image_open_here() {
    let (node, group) = node_on(Arc::new(MemoryDisk::new()));
    let peers = [NodeId([2; 16]), NodeId([3; 16])];
    for (peer, name) in peers.into_iter().zip(["b", "c"]) {
        group.append_control(member(peer, name, Mode::Async)).unwrap();
    }
    group.sync_now().unwrap();
    let position = group.resolve_point(&Point::Now).unwrap();
    let ask = AskOpen {
        group: group.id(),
        at: position.lsn,
        exactly: Some((position, group.chain_at(position.lsn))),
    };
    let open = |node_id: NodeId, name: &str| {
        let key = node.replication.shared.identity().fingerprint;
        let peer = PeerContext { node: node_id, name: name.parse().unwrap(), key };
        let answer = node.replication.shared.open_for_verify(&peer, &json!(ask)).unwrap();
        understood::<Opened>(&answer).unwrap().image.unwrap()
    };
    let other = open(peers[1], "c");
    let kept = group.open_image(&Point::Now, None, "host", None).unwrap();
    let mut last = None;
    for _ in 0..100 {
        last = Some(open(peers[0], "b"));
    }
    let mut left: Vec<Name> = group.images().iter().map(|image| image.name().clone()).collect();
    let mut expected = vec![other, kept.name().clone(), last.unwrap()];
    left.sort();
    expected.sort();
    assert_eq!(left, expected, "the last of each peer, and what is not theirs");
    node.stop();
}

/// What a comparison with a peer came to, at a position.
fn compared(peer: &str, state: VerifyState, position: Position) -> VerifyStatus {
    let mut status = VerifyStatus {
        state,
        state_since: LogTime(1),
        state_reason: None,
        peer: peer.parse().unwrap(),
        position,
        done_bytes: 8192,
        total_bytes: 8192,
        differing_bytes: 0,
        extents: Vec::new(),
        left_out: None,
    };
    if state == VerifyState::Differs {
        status.add(&"v".parse().unwrap(), 4096, 4096, None);
    }
    status
}

#[test]
fn the_first_block_that_differs_is_listed_behind_any_number_that_cannot_be_read() {
    let mut status = compared("b", VerifyState::Failed, Position::default());
    let (volume, peer): (Name, Name) = ("v".parse().unwrap(), "b".parse().unwrap());
    for block in 0..5000 {
        status.add(&volume, block * 8192, 4096, Some(&peer));
    }
    assert_eq!(status.difference(), None);
    status.add(&volume, 1 << 40, 4096, None);
    assert!(status.difference().unwrap().ends_with("the first of volume v at 1099511627776"));
    assert_eq!(status.extents.len(), 1000);
}

#[test]
fn a_comparison_that_left_something_out_ends_no_difference() {
    let known = compared("b", VerifyState::Differs, Position::default());
    let mut later = compared("b", VerifyState::Equal, Position::default());
    assert!(later.ends(&known, true, true));
    later.left_out = Some("on b: the data failed".to_owned());
    assert!(!later.ends(&known, true, true));
}

#[tokio::test]
async fn a_disk_that_fails_in_the_middle_of_a_comparison_is_left_out_of_it() {
    let disk = MemoryDisk::new();
    let (node, group) = node_on(Arc::new(disk.clone()));
    let shared = node.replication.shared.clone();
    let b: Name = "b".parse().unwrap();
    let running = compared("b", VerifyState::Running, Position::default());
    let left_out = || node.replication.verify_status(&group).unwrap().left_out;
    shared.change_ledger(group.id(), |ledger| ledger.verify = Some(running.clone()));
    shared.note_left_out(&group, &b, None);
    assert_eq!(left_out(), None);
    shared.note_left_out(&group, &b, Some("its disk".to_owned()));
    shared.note_left_out(&group, &b, None);
    assert_eq!(left_out().unwrap(), "on b: its disk", "also where it is well again");
    // The same on this node; and who compares with it is told so with the hashes.
    shared.change_ledger(group.id(), |ledger| ledger.verify = Some(running.clone()));
    let peer =
        PeerContext { node: NodeId([2; 16]), name: b.clone(), key: shared.identity().fingerprint };
    group.append_control(member(peer.node, "b", Mode::Async)).unwrap();
    group.sync_now().unwrap();
    let image = group.open_image(&Point::Now, None, "verify:b", None).unwrap();
    let ask = AskHashes {
        group: group.id(),
        image: image.name().clone(),
        volume: VolumeNumber(1),
        offset: 0,
        length: 4096,
        piece: 4096,
    };
    let told = || {
        let answer = shared.hash_for_verify(&peer, &json!(ask)).unwrap();
        understood::<Hashes>(&answer).unwrap().left_out
    };
    assert_eq!(told(), None);
    disk.inject(Fault::FailedSync { operation: disk.operations() });
    group.append_control(member(peer.node, "b", Mode::Sync)).unwrap_err();
    assert!(told().unwrap().contains("the data failed"));
    shared.note_left_out(&group, &b, None);
    assert!(left_out().unwrap().starts_with("on a: the data failed"));
    node.stop();
}

#[tokio::test]
async fn a_difference_holds_until_all_is_the_same_with_that_peer_whatever_fails_meanwhile() {
    use VerifyState::{Differs, Equal, Failed};
    let (node, group) = node_on(Arc::new(MemoryDisk::new()));
    let shared = node.replication.shared.clone();
    let key = shared.identity().fingerprint;
    for (byte, name) in [(2, "b"), (3, "c")] {
        let id = NodeId([byte; 16]);
        group.append_control(member(id, name, Mode::Async)).unwrap();
        let peer = Peer {
            node: id,
            name: name.parse().unwrap(),
            address: None,
            fingerprints: vec![key],
            paired: LogTime(1),
            copies: Default::default(),
            paused: Default::default(),
        };
        shared.store.lock().unwrap().put(peer).unwrap();
    }
    group.sync_now().unwrap();
    let early = group.resolve_point(&Point::Now).unwrap();
    group.append_control(member(NodeId([2; 16]), "b", Mode::Async)).unwrap();
    group.sync_now().unwrap();
    let now = group.resolve_point(&Point::Now).unwrap();
    assert!(early.lsn < now.lsn);
    // What a peer says at the end of a comparison that it made.
    let told = |peer: &str, state: VerifyState, position: Position| {
        let node = NodeId([if peer == "b" { 2 } else { 3 }; 16]);
        let context = PeerContext { node, name: peer.parse().unwrap(), key };
        let result = Some(compared(peer, state, position));
        let close = AskClose { group: group.id(), image: "none".parse().unwrap(), result };
        shared.end_verify(&context, &json!(close)).unwrap();
    };
    let differs = || {
        // What the verdicts on the copies go by, on this node and on each peer.
        let found = node.replication.differences(&group).into_iter();
        let found = found.map(|found| found.peer.to_string()).collect::<Vec<_>>();
        let check = shared.log_check(group.id(), shared.now()).differs;
        assert_eq!(check.is_some(), !found.is_empty());
        for peer in ["b", "c"] {
            let against = shared.ledger(group.id()).differs_from(Some(peer));
            assert_eq!(against.is_some(), found.iter().any(|found| found == peer));
        }
        found
    };
    let last = || node.replication.verify_status(&group).unwrap().state;
    told("b", Differs, now);
    assert_eq!((differs(), last()), (vec!["b".to_owned()], Differs));
    told("b", Failed, now);
    assert_eq!((differs(), last()), (vec!["b".to_owned()], Failed));
    // This node compares, and does not reach its peer.
    assert_eq!(node.replication.verify("g", Some("b")).unwrap().state, VerifyState::Running);
    assert_eq!(differs(), ["b"], "while it runs");
    let ended = async {
        while last() == VerifyState::Running {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(60), ended).await;
    ended.expect("the comparison ends");
    assert_eq!((differs(), last()), (vec!["b".to_owned()], Failed));
    told("c", Differs, now);
    assert_eq!(differs(), ["b", "c"]);
    told("c", Equal, now);
    assert_eq!((differs(), last()), (vec!["b".to_owned()], Equal), "c says nothing of b");
    told("b", Equal, early);
    assert_eq!(differs(), ["b"], "it began before the other");
    // After a restart too.
    let kept = load(&shared.config.state_dir);
    assert_eq!(kept[&group.id()].differences()[0].peer.as_str(), "b");
    // What another says is not taken for the end of what runs here.
    let running = compared("c", VerifyState::Running, now);
    shared.change_ledger(group.id(), |ledger| ledger.verify = Some(running.clone()));
    let is_same = |lsn| node.replication.is_same_at(&group, lsn);
    let head = group.positions().head;
    let later = Lsn(u64::MAX);
    assert!(!is_same(later), "while they differ");
    let mut removed = member(NodeId([2; 16]), "b", Mode::Async);
    if let crate::log::control::Control::Member(record) = &mut removed {
        record.removed = true;
    }
    group.append_control(removed).unwrap();
    assert!(!is_same(head) && is_same(later), "there is nobody to differ from");
    group.append_control(member(NodeId([2; 16]), "b", Mode::Async)).unwrap();
    assert!(!is_same(later), "the copy has come back");
    let head = group.positions().head;
    told("b", Equal, now);
    assert_eq!(differs(), Vec::<String>::new());
    assert_eq!(node.replication.verify_status(&group), Some(running));
    assert!(!is_same(head) && is_same(head.advance(1)), "backups of before hold what differed");
    // A moment that left the history is nothing that a later comparison can reach.
    let gone = Position { epoch: crate::units::EpochId(77), ..now };
    told("b", Differs, Position { lsn: Lsn(now.lsn.0 + (1 << 30)), ..gone });
    told("b", Equal, now);
    assert_eq!(differs(), Vec::<String>::new());
    // Nobody can compare with a peer that was removed.
    told("b", Differs, now);
    shared.store.lock().unwrap().remove(NodeId([2; 16])).unwrap();
    assert_eq!(differs(), ["b"]);
    told("c", Equal, now);
    assert_eq!(differs(), Vec::<String>::new());
    node.stop();
}
