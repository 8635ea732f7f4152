//! What two nodes tell each other of their images.

use super::*;
use crate::io::MemoryDisk;
use crate::log::control::Mode;
use crate::replication::drive::tests::{member, node_on};
use crate::units::NodeId;

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
