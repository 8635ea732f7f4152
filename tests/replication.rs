//! Two nodes in one process, over real sockets and real files: pairing, streaming, broken links,
//! failover, calls, copies that are stopped.

mod pairing;
mod rig;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};
use tidelog::group::{DataState, Group, Point, Read, Role, View};
use tidelog::io::SeededEntropy;
use tidelog::replication::{ReplicateOptions, ReplicationError, Verdict};
use tidelog::units::Lsn;

use self::rig::{Node, Pair, SECOND, log_bytes, name, write};
use crate::support::wait_for;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_copy_has_the_same_bytes_at_the_same_addresses() {
    let pair = Pair::start().await;
    let group = pair.a.registry.create(name("g"), Some(1 << 20)).unwrap();
    group.create_volume(name("v"), 64 << 20).unwrap();
    let entropy = SeededEntropy::new(1);
    // What was there before, and what comes while it streams; several segments of it.
    write(&group, &entropy, 100);
    pair.replicate().await;
    write(&group, &entropy, 300);
    group.sync_now().unwrap();
    pair.wait_equal();
    assert!(group.positions().head > Lsn(3 << 20), "several segments");

    let copy = pair.b.group();
    assert_eq!(copy.role(), Role::Secondary);
    assert_eq!(copy.data_state().0, DataState::Consistent);
    assert_eq!(copy.control().volumes, group.control().volumes);
    assert_eq!(copy.control().members.len(), 2);
    let status = wait_for("the primary to know it durable", || {
        let status = pair.a.status().unwrap();
        (status.durable_lsn == group.positions().head).then_some(status)
    });
    assert_eq!((status.name.as_str(), status.role.as_str()), ("b", "secondary"));
    assert_eq!((status.lag.bytes, status.lag.operations), (Some(0), Some(0)));
    assert_eq!(status.rpo_target_seconds, Some(5.0));
    assert_eq!(status.link_state, "connected");
    assert!(status.link_state_reason.is_none() && status.replication_state_reason.is_none());
    wait_for("the copy to know what is committed", || {
        (copy.positions().committed == group.positions().durable).then_some(())
    });
    let status = pair.b.status().unwrap();
    assert_eq!((status.name.as_str(), status.role.as_str()), ("a", "primary"));
    assert_eq!(status.received_lsn, group.positions().head);
    for node in pair.nodes() {
        let judged = wait_for("a verdict", || {
            let judged = node.replication.backup_capable(&node.group(), None);
            judged.is_yes().then_some(judged)
        });
        assert!(judged.reasons.is_empty());
        // No copy is fresh enough for a limit of nothing.
        let never = node.replication.backup_capable(&node.group(), Some(Duration::ZERO));
        assert_eq!(never.is_yes(), node.name() == "a", "{never:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_link_that_breaks_at_any_moment_is_made_anew_and_nothing_is_missing() {
    let pair = Pair::replicating().await;
    let group = pair.a.group();
    let entropy = SeededEntropy::new(2);
    for round in 0..12 {
        write(&group, &entropy, 20);
        if round % 2 == 0 {
            pair.to_a.cut();
            pair.to_b.cut();
        }
        write(&group, &entropy, 20);
    }
    pair.wait_equal();
    assert!(pair.a.has_event("link-lost") && pair.b.has_event("link-lost"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_conversation_cut_after_any_number_of_bytes_ends_in_equal_logs() {
    let pair = Pair::replicating().await;
    let group = pair.a.group();
    let entropy = SeededEntropy::new(3);
    for limit in (1..12_000).step_by(61) {
        for proxy in [&pair.to_a, &pair.to_b] {
            proxy.cut_after.store(limit, Ordering::Relaxed);
            proxy.cut();
        }
        wait_for(&format!("a connection to be cut after {limit} bytes"), || {
            let cut = [&pair.to_a, &pair.to_b]
                .iter()
                .any(|proxy| proxy.was_cut_after.load(Ordering::Relaxed) == limit);
            if !cut && pair.a.replication.peers()[0].link_state != "connected" {
                // The wait before the next dial is over; the write wakes who dials.
                pair.a.clock.ahead_seconds.fetch_add(6, Ordering::Relaxed);
            }
            if !cut {
                write(&group, &entropy, 1);
            }
            cut.then_some(())
        });
    }
    pair.to_a.cut_after.store(usize::MAX, Ordering::Relaxed);
    pair.to_b.cut_after.store(usize::MAX, Ordering::Relaxed);
    pair.to_a.cut();
    pair.to_b.cut();
    pair.wait_equal();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn without_a_link_the_age_of_the_copy_grows_and_the_verdict_turns() {
    let pair = Pair::replicating().await;
    pair.close_link();
    for node in pair.nodes() {
        wait_for("the link to be lost", || {
            (node.status()?.link_state == "connecting").then_some(())
        });
    }
    let copy = pair.b.group();
    let before = pair.b.status().unwrap();
    assert!(before.link_state_reason.is_some() && before.link_state_since.is_some());
    assert_eq!(before.replication_state, "idle");
    let judged = pair.b.replication.backup_capable(&copy, None);
    assert_eq!(judged.verdict, Verdict::No);
    assert!(judged.reasons.iter().any(|reason| reason.code == "link-down"), "{judged:?}");
    write(&pair.a.group(), &SeededEntropy::new(4), 5);
    wait_for("the age to grow", || {
        let now = pair.b.status()?;
        (now.lag.seconds > before.lag.seconds + 0.2).then_some(())
    });
    wait_for("the primary to see it lag", || {
        let now = pair.a.status()?;
        (now.lag.operations == Some(5) && now.lag.seconds > 0.0 && now.lag.bytes > Some(0))
            .then_some(())
    });
    pair.open_link();
    pair.wait_equal();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_pause_holds_over_a_restart_until_resumed() {
    let mut pair = Pair::replicating().await;
    pair.a.replication.pause("g", Some("b")).unwrap();
    for node in pair.nodes() {
        wait_for("the pause", || (node.replication_state() == "paused").then_some(()));
    }
    let paused_at = pair.b.group().positions().head;
    let dir = pair.a.stop();
    pair.a = Node::start(&dir, "a", Some(pair.to_a.address));
    pair.to_a.lead_to(&pair.a);
    pair.wait_connected();
    let group = pair.a.group();
    write(&group, &SeededEntropy::new(5), 10);
    for node in pair.nodes() {
        let status = wait_for("the pause", || {
            node.status().filter(|status| status.replication_state == "paused")
        });
        assert!(status.replication_state_reason.unwrap().contains("tidelog resume g"));
    }
    assert_eq!(pair.b.group().positions().head, paused_at);
    pair.a.replication.resume("g", None).unwrap();
    pair.wait_equal();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_name_that_is_taken_on_the_peer_is_refused_and_nothing_is_made() {
    let pair = Pair::start().await;
    let mine = pair.a.registry.create(name("g"), None).unwrap();
    let theirs = pair.b.registry.create(name("g"), None).unwrap();
    let error = pair
        .a
        .replication
        .replicate("g", "b", ReplicateOptions::default())
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("peer b") && error.contains("`g` is there already"), "{error}");
    assert!(mine.control().members.is_empty());
    assert_eq!(pair.b.group().id(), theirs.id());
    assert_eq!(pair.b.group().role(), Role::Primary);

    let unknown = pair.a.replication.replicate("g", "c", ReplicateOptions::default()).await;
    let error = unknown.unwrap_err().to_string();
    assert!(error.contains("peer c") && error.contains("tidelog peer list"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn calls_are_answered_or_say_why_not() {
    let pair = Pair::start().await;
    pair.b.replication.on_call(
        "echo",
        Arc::new(|peer, body| Box::pin(async move { Ok(json!([peer.name, body])) })),
    );
    pair.b.replication.on_call(
        "fail",
        Arc::new(|_, _| Box::pin(async { Err("group g: it does not work".to_owned()) })),
    );
    pair.b.replication.on_call(
        "never",
        Arc::new(|_, _| Box::pin(std::future::pending::<Result<Value, String>>())),
    );
    let call = |method, body, timeout| pair.a.replication.call("b", method, body, timeout);
    assert_eq!(call("echo", json!({"x": 1}), 60 * SECOND).await.unwrap(), json!(["a", {"x": 1}]));
    // Larger than many frames, both ways.
    let large = Value::String("x".repeat(3 << 20));
    let answer = call("echo", large.clone(), 60 * SECOND).await.unwrap();
    assert!(answer[1] == large);
    let error = call("fail", Value::Null, 60 * SECOND).await.unwrap_err().to_string();
    assert_eq!(error, "peer b: group g: it does not work");
    let error = call("none", Value::Null, 60 * SECOND).await.unwrap_err();
    assert!(matches!(error, ReplicationError::Declined { .. }), "it was not begun: {error:?}");
    let error = error.to_string();
    assert!(error.contains("none: this node does not answer that call"), "{error}");
    let error = call("never", Value::Null, SECOND / 20).await.unwrap_err().to_string();
    assert!(error.contains("did not answer never"), "{error}");
    let waiting = call("never", Value::Null, 60 * SECOND);
    let cut = async {
        tokio::task::yield_now().await;
        pair.close_link();
    };
    let (error, ()) = tokio::join!(waiting, cut);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("link was lost") || error.contains("not connected"), "{error}");
    wait_for("the link to be lost", || {
        (pair.a.replication.peers()[0].link_state != "connected").then_some(())
    });
    let error = call("echo", Value::Null, SECOND).await.unwrap_err().to_string();
    assert!(error.contains("peer b: is not connected"), "{error}");
    assert!(pair.a.replication.last_heard("b").is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_peer_that_calls_too_much_at_once_is_told_so_and_the_link_goes_on() {
    let pair = Pair::replicating().await;
    pair.b.replication.on_call(
        "never",
        Arc::new(|_, _| Box::pin(std::future::pending::<Result<Value, String>>())),
    );
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..40 {
        let replication = Arc::clone(&pair.a.replication);
        calls.spawn(async move { replication.call("b", "never", Value::Null, 30 * SECOND).await });
    }
    for _ in 0..8 {
        let error = calls.join_next().await.unwrap().unwrap().unwrap_err().to_string();
        assert!(error.contains("too many calls at once"), "{error}");
    }
    // A call that was not begun has changed nothing, so the primary goes on.
    let refused = pair.a.replication.switchover("g", None).await.unwrap_err().to_string();
    assert!(refused.contains("too many calls at once; try again"), "{refused}");
    assert!(refused.contains("this node goes on as primary"), "{refused}");
    assert_eq!(pair.a.group().role(), Role::Primary);
    write(&pair.a.group(), &SeededEntropy::new(17), 5);
    pair.wait_equal();
    // What a connection asked for ends with it, and makes room.
    pair.to_a.cut();
    pair.to_b.cut();
    while let Some(ended) = calls.join_next().await {
        assert!(ended.unwrap().is_err());
    }
    pair.wait_equal();
    pair.b.replication.on_call("echo", Arc::new(|_, body| Box::pin(async move { Ok(body) })));
    let answer = pair.a.replication.call("b", "echo", json!(1), 30 * SECOND).await.unwrap();
    assert_eq!(answer, json!(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn after_a_failover_the_old_primary_follows_by_itself() {
    let mut pair = Pair::replicating().await;
    let entropy = SeededEntropy::new(7);
    write(&pair.a.group(), &entropy, 20);
    pair.wait_equal();
    let copy = pair.b.group();
    let refusal = pair.b.replication.promote_refusal(copy.id()).unwrap();
    assert!(refusal.contains("a is connected and is its primary"), "{refusal}");
    let dir = pair.a.stop();
    wait_for("the refusal to go", || {
        pair.b.replication.promote_refusal(copy.id()).is_none().then_some(())
    });
    copy.promote("promote").unwrap();
    write(&copy, &entropy, 20);

    pair.a = Node::start(&dir, "a", Some(pair.to_a.address));
    pair.to_a.lead_to(&pair.a);
    pair.wait_equal();
    assert_eq!(pair.a.group().role(), Role::Secondary);
    assert!(pair.a.has_event("yielded"));
    assert_eq!(pair.a.group().branches().unwrap(), []);
    write(&copy, &entropy, 20);
    pair.wait_equal();
    assert_eq!(pair.a.group().control().epochs.len(), 2);

    // And back again, in order.
    copy.demote().unwrap();
    wait_for("nobody to be primary", || {
        let status = pair.a.status()?;
        status.replication_state_reason?.contains("no primary").then_some(())
    });
    pair.a.group().promote("promote").unwrap();
    write(&pair.a.group(), &entropy, 20);
    pair.wait_equal();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_primaries_that_both_wrote_while_cut_off_stop_and_keep_what_they_have() {
    let pair = Pair::replicating().await;
    let entropy = SeededEntropy::new(8);
    pair.close_link();
    write(&pair.a.group(), &entropy, 3);
    pair.b.group().promote("promote").unwrap();
    write(&pair.b.group(), &entropy, 4);
    let heads = [pair.a.group().positions(), pair.b.group().positions()];
    pair.open_link();
    for (node, before) in pair.nodes().into_iter().zip(heads) {
        let status = wait_for("the split brain", || {
            node.status().filter(|status| status.replication_state == "split-brain")
        });
        let reason = status.replication_state_reason.unwrap();
        assert!(reason.contains("both nodes are primary"), "{reason}");
        assert!(reason.contains("tidelog resolve g --preview"), "{reason}");
        assert!(node.has_event("split-brain"));
        let now = node.group().positions();
        assert_eq!((now.head, now.chain), (before.head, before.chain));
        assert!(!node.replication.backup_capable(&node.group(), None).is_yes());
    }
    // A restart decides nothing: both have served, so an operator says who yields.
    let mut pair = pair;
    let dir = pair.a.stop();
    pair.a = Node::start(&dir, "a", Some(pair.to_a.address));
    pair.to_a.lead_to(&pair.a);
    wait_for("the split brain", || {
        pair.a.status().filter(|status| status.replication_state == "split-brain")
    });
    assert_eq!(pair.a.group().positions().head, heads[0].head);
    wait_for("the place where they part", || pair.a.replication.parting("g").ok());
    pair.a.replication.resolve("g").await.unwrap();
    pair.wait_equal();
    let branches = pair.a.group().branches().unwrap();
    assert_eq!((branches.len(), branches[0].to.lsn), (1, heads[0].head));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_stopped_copy_is_retired_and_gets_no_more() {
    let pair = Pair::replicating().await;
    pair.a.replication.stop("g", "b").await.unwrap();
    let copy = pair.b.group();
    wait_for("the copy to be retired", || pair.b.has_event("copy-retired").then_some(()));
    assert_eq!(copy.data_state().0, DataState::Retired);
    let end = copy.positions().head;
    write(&pair.a.group(), &SeededEntropy::new(9), 5);
    let judged = pair.b.replication.backup_capable(&copy, None);
    assert!(!judged.is_yes());
    // The data is the primary's alone again, and is judged as such.
    assert!(pair.a.replication.backup_capable(&pair.a.group(), None).is_yes());
    assert_eq!(copy.positions().head, end);
    // Taken up again, it goes on from where it stopped.
    pair.replicate().await;
    assert_eq!(copy.data_state().0, DataState::Consistent);
    pair.a.replication.stop("g", "b").await.unwrap();
    pair.a.replication.remove_peer("b").unwrap();
    assert!(pair.a.replication.peers().is_empty());
}

/// What the group's volume holds, in an image of now.
fn shown(group: &Group) -> Vec<u8> {
    let image = group.open_image(&Point::Now, Some(name("look")), "test", None).unwrap();
    let (volume, size) = (image.volumes()[0].number, image.volumes()[0].size_bytes);
    let mut bytes = vec![0; size as usize];
    let mut reads = [Read { volume, offset: 0, buffer: &mut bytes, result: Ok(()) }];
    image.read(&mut reads);
    let [read] = reads;
    read.result.unwrap();
    group.close_image(&name("look")).unwrap();
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_peer_that_holds_a_copy_is_not_removed_and_its_retired_copy_stays_readable_when_it_is() {
    let mut pair = Pair::replicating().await;
    let entropy = SeededEntropy::new(23);
    write(&pair.a.group(), &entropy, 20);
    let refused = pair.a.replication.remove_peer("b").unwrap_err().to_string();
    assert!(refused.contains("peer b: holds a copy of group g"), "{refused}");
    assert!(refused.contains("`tidelog replicate g --to b --stop` first"), "{refused}");
    write(&pair.a.group(), &entropy, 20);
    pair.wait_equal();
    pair.a.replication.stop("g", "b").await.unwrap();
    wait_for("the copy to be retired", || pair.b.has_event("copy-retired").then_some(()));
    let held = shown(&pair.a.group());
    pair.a.replication.remove_peer("b").unwrap();
    assert!(pair.a.replication.peers().is_empty());
    write(&pair.a.group(), &entropy, 20);
    let dir = pair.b.stop();
    pair.b = Node::start(&dir, "b", Some(pair.to_b.address));
    pair.to_b.lead_to(&pair.b);
    wait_for("b to be turned away", || {
        let reason = pair.b.replication.peers()[0].link_state_reason.clone()?;
        reason.contains("does not know this node's key").then_some(())
    });
    let copy = pair.b.group();
    assert_eq!(copy.data_state().0, DataState::Retired);
    assert!(shown(&copy) == held && shown(&pair.a.group()) != held);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_stopped_copy_that_was_promoted_is_followed_by_who_yields_to_it() {
    let pair = Pair::replicating().await;
    let (old, new) = (pair.a.group(), pair.b.group());
    pair.a.replication.stop("g", "b").await.unwrap();
    wait_for("the copy to be retired", || pair.b.has_event("copy-retired").then_some(()));
    let retired_at = new.positions().head;
    new.promote("promote").unwrap();
    let in_records = |group: &Group, name: &str| {
        group.control().members.iter().any(|member| member.name.as_str() == name)
    };
    assert!(in_records(&new, "b"), "who reigns is no copy whose replication was stopped");
    write(&new, &SeededEntropy::new(21), 3);
    write(&old, &SeededEntropy::new(22), 3);
    // What makes the two members again lies behind where their histories part.
    let put = ReplicateOptions::default();
    pair.a.replication.replicate("g", "b", put).await.unwrap();
    let parting = wait_for("a split brain", || pair.a.replication.parting("g").ok());
    assert_eq!(parting.at, retired_at);
    pair.a.replication.resolve("g").await.unwrap();
    assert!(!in_records(&old, "b"), "that was cut off");
    pair.wait_equal();
    assert!(in_records(&old, "b"));
    new.demote().unwrap();
    assert_eq!(new.data_state().0, DataState::Consistent);
}

/// Changes a byte in the middle of the log's first segment; again, it is as before.
fn turn_a_byte(dir: &Path, group: &str) {
    use std::os::unix::fs::FileExt;
    let log = dir.join("groups").join(group).join("log");
    let segments = std::fs::read_dir(log).unwrap().map(|entry| entry.unwrap().path());
    let first = segments.filter(|path| path.extension().is_some_and(|it| it == "seg")).min();
    let file = std::fs::File::options().read(true).write(true).open(first.unwrap()).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 512 << 10).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 512 << 10).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_primary_does_not_call_a_copy_fit_that_knows_its_log_is_damaged() {
    let mut pair = Pair::replicating().await;
    write(&pair.a.group(), &SeededEntropy::new(13), 100);
    pair.wait_equal();
    let group = pair.b.group().id().to_string();
    let judged = |node: &Node| node.replication.backup_capable(&node.group(), None);
    wait_for("a fit copy", || judged(&pair.a).is_yes().then_some(()));

    // On both, so that neither can repair the other.
    let again = |mut pair: Pair| {
        turn_a_byte(&pair.a.dir, &group);
        let dir = pair.b.stop();
        turn_a_byte(&dir, &group);
        pair.b = Node::start(&dir, "b", Some(pair.to_b.address));
        pair.to_b.lead_to(&pair.b);
        pair.wait_connected();
        pair
    };
    pair = again(pair);
    for node in pair.nodes() {
        wait_for("the damage to count", || {
            let reasons = judged(node).reasons;
            reasons.iter().any(|reason| reason.code == "log-damaged").then_some(())
        });
    }
    assert!(pair.b.has_event("log-damaged"));
    // Whole again, and read again.
    pair = again(pair);
    for node in pair.nodes() {
        wait_for("a fit copy", || judged(node).is_yes().then_some(()));
    }
    // It knew of the damage after its restart.
    wait_for("it to be told", || pair.b.has_event("log-mended").then_some(()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_copy_that_was_away_when_it_was_stopped_is_retired_when_it_is_back() {
    let mut pair = Pair::replicating().await;
    write(&pair.a.group(), &SeededEntropy::new(14), 5);
    pair.wait_equal();
    let end = pair.b.group().positions().head;
    pair.close_link();
    pair.a.replication.stop("g", "b").await.unwrap();
    write(&pair.a.group(), &SeededEntropy::new(15), 5);
    pair.open_link();
    let retired = |node: &Node| (node.group().data_state().0 == DataState::Retired).then_some(());
    wait_for("the copy to be retired", || pair.b.has_event("copy-retired").then_some(()));
    retired(&pair.b).unwrap();
    let judged = pair.b.replication.backup_capable(&pair.b.group(), None);
    assert!(judged.reasons.iter().any(|reason| reason.code == "retired"), "{judged:?}");

    let dir = pair.b.stop();
    pair.b = Node::start(&dir, "b", Some(pair.to_b.address));
    pair.to_b.lead_to(&pair.b);
    pair.wait_connected();
    assert!(retired(&pair.b).is_some());
    let copy = pair.b.group();
    assert_eq!(copy.positions().head, end, "it is readable, as it was");
    assert!(!log_bytes(&copy, Lsn(0), end).is_empty());

    pair.replicate().await;
    assert_eq!(copy.data_state().0, DataState::Consistent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_copy_that_was_stopped_goes_on_from_what_it_has() {
    let mut pair = Pair::replicating().await;
    let entropy = SeededEntropy::new(11);
    for _ in 0..3 {
        write(&pair.a.group(), &entropy, 50);
        let dir = pair.b.stop();
        write(&pair.a.group(), &entropy, 50);
        pair.b = Node::start(&dir, "b", Some(pair.to_b.address));
        pair.to_b.lead_to(&pair.b);
    }
    pair.wait_equal();
}
