//! Who is let in: tokens, keys and their change, and what comes from strangers.

use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use tidelog::io::{Entropy, SeededEntropy};
use tidelog::replication::{INVITE_VALID, ReplicationError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::rig::{Node, Pair, write};
use crate::support::wait_for;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_token_works_once_in_its_time_and_few_wrong_ones_void_it() {
    let dir = tempfile::tempdir().unwrap();
    let a = Node::start(&dir.path().join("a"), "a", None);
    let b = Node::start(&dir.path().join("b"), "b", None);
    let refused = |result: Result<_, ReplicationError>| match result {
        Ok(_) => panic!("was let in"),
        Err(error) => error.to_string(),
    };
    // Malformed, and of another node.
    let text = refused(b.replication.join("tidelog1-00", &a.address().to_string()).await);
    assert!(text.contains("token") && text.contains("tidelog peer invite"), "{text}");
    let of_b = b.replication.invite().unwrap();
    let text = refused(b.replication.join(&of_b.token, &a.address().to_string()).await);
    assert!(text.contains("another node than the one that made the token"), "{text}");

    // Expired.
    let invite = a.replication.invite().unwrap();
    a.clock.ahead_seconds.store(INVITE_VALID.as_secs() + 1, Ordering::Relaxed);
    let text = refused(b.replication.join(&invite.token, &invite.address).await);
    assert!(text.contains("no token is open") && text.contains("15 minutes"), "{text}");

    // Wrong secrets for the right key: a token whose secret was changed.
    let invite = a.replication.invite().unwrap();
    let other = a.replication.invite().unwrap();
    let forged = forge_secret(&invite.token);
    for attempt in 1..=tidelog::replication::TRIES {
        let text = refused(b.replication.join(&forged, &invite.address).await);
        assert!(text.contains("wrong token"), "attempt {attempt}: {text}");
    }
    for token in [&invite.token, &other.token] {
        let text = refused(b.replication.join(token, &invite.address).await);
        assert!(text.contains("no token is open"), "{text}");
    }
    assert!(a.has_event("pairing-refused"));

    // And a good one, once.
    let invite = a.replication.invite().unwrap();
    b.replication.join(&invite.token, &invite.address).await.unwrap();
    let text = refused(b.replication.join(&invite.token, &invite.address).await);
    assert!(text.contains("already used"), "{text}");
    assert_eq!(a.replication.peers()[0].name.as_str(), "b");
}

/// Another secret in a well-formed token.
fn forge_secret(token: &str) -> String {
    let mut bytes = hex::decode(token.strip_prefix("tidelog1-").unwrap()).unwrap();
    bytes[40] ^= 1;
    let check = ring::digest::digest(&ring::digest::SHA256, &bytes[..48]);
    bytes[48..50].copy_from_slice(&check.as_ref()[..2]);
    format!("tidelog1-{}", hex::encode(bytes))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_unknown_key_gets_no_further_than_the_hello() {
    let pair = Pair::replicating().await;
    // A copy of b's list of peers, but not of its key: it knows a, and a does not know it.
    let stranger_dir = pair.b.dir.parent().unwrap().join("stranger");
    std::fs::create_dir_all(stranger_dir.join("node")).unwrap();
    std::fs::copy(pair.b.dir.join("node/peers"), stranger_dir.join("node/peers")).unwrap();
    let stranger = Node::start(&stranger_dir, "b", None);
    let reason = wait_for("the refusal", || {
        let peers = stranger.replication.peers();
        let reason = peers[0].link_state_reason.clone()?;
        reason.contains("refused").then_some(reason)
    });
    assert!(reason.contains("does not know this node's key"), "{reason}");
    // b's identity with another key is no better.
    std::fs::copy(pair.b.dir.join("node/identity"), stranger_dir.join("node/identity")).unwrap();
    drop(stranger.stop());
    let stranger = Node::start(&stranger_dir, "b", None);
    wait_for("the refusal", || {
        let peers = stranger.replication.peers();
        peers[0].link_state_reason.clone()?.contains("does not know").then_some(())
    });
    pair.wait_equal();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn garbage_on_the_listener_harms_nobody() {
    let pair = Pair::replicating().await;
    for garbage in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 5000]] {
        let mut socket = TcpStream::connect(pair.a.address()).await.unwrap();
        socket.write_all(garbage).await.unwrap();
        let mut answer = Vec::new();
        drop(socket.shutdown().await);
        drop(socket.read_to_end(&mut answer).await);
    }
    write(&pair.a.group(), &SeededEntropy::new(6), 10);
    pair.wait_equal();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_new_key_is_known_to_the_peer_before_it_is_used() {
    let pair = Pair::replicating().await;
    let before = pair.b.replication.peers()[0].fingerprint.clone();
    let fingerprint = pair.a.replication.rotate().await.unwrap();
    assert_ne!(fingerprint, before);
    assert_eq!(pair.b.replication.peers()[0].fingerprint, fingerprint);
    pair.to_a.cut();
    pair.to_b.cut();
    write(&pair.a.group(), &SeededEntropy::new(10), 5);
    pair.wait_equal();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn changes_of_the_key_that_fail_lock_nobody_out() {
    let pair = Pair::replicating().await;
    let dir = pair.a.dir.parent().unwrap().join("c");
    let c = Node::start(&dir, "c", None);
    let invite = pair.a.replication.invite().unwrap();
    c.replication.join(&invite.token, &invite.address).await.unwrap();
    let linked = |peer: &str| {
        let peers = pair.a.replication.peers();
        let found = peers.iter().find(|known| known.name.as_str() == peer)?;
        (found.link_state == "connected").then_some(())
    };
    wait_for("c to be connected", || linked("c"));
    let dir = c.stop();
    wait_for("c to be away", || linked("c").is_none().then_some(()));
    // b takes the new key each time, and c is not there.
    for _ in 0..3 {
        let error = pair.a.replication.rotate().await.unwrap_err().to_string();
        assert!(error.contains("peer c"), "{error}");
    }
    pair.to_a.cut();
    pair.to_b.cut();
    write(&pair.a.group(), &SeededEntropy::new(16), 5);
    pair.wait_equal();

    let c = Node::start(&dir, "c", None);
    for _ in 0..2 {
        // Of two connections that cross one ends, and calls on it fail: that must do no harm.
        let mut attempts = 0;
        let fingerprint = loop {
            wait_for("both to be connected", || linked("b").and(linked("c")));
            match pair.a.replication.rotate().await {
                Ok(fingerprint) => break fingerprint,
                Err(error) => assert!(attempts < 50, "{error}"),
            }
            attempts += 1;
        };
        for node in [&pair.b, &c] {
            wait_for("the new key alone to be known", || {
                let peers = std::fs::read_to_string(node.dir.join("node/peers")).unwrap();
                let peers: Value = serde_json::from_str(&peers).unwrap();
                (peers["peers"][0]["fingerprints"] == json!([fingerprint])).then_some(())
            });
        }
    }
    pair.wait_equal();
}

/// The wire's fuzz body over what is checked in and over small changes of it.
#[test]
fn the_wire_takes_any_bytes() {
    let entropy = SeededEntropy::new(12);
    for _ in 0..20_000 {
        let mut bytes = vec![0; (entropy.next_u64() % 300) as usize];
        entropy.fill(&mut bytes);
        if let Some(kind) = bytes.first_mut() {
            *kind = 1 + *kind % 2;
        }
        tidelog::replication::wire::fuzz(&bytes);
    }
}
