//! A pin is a record: each node keeps its own moment.

use super::moments::{all, at_pin, fold, group_with_volume};
use super::*;
use crate::log::control::{BookmarkRecord, Consistency};

pub(super) fn follow(group: &Group, copy: &Group) {
    let (from, head) = (copy.received_end(), group.positions().head);
    let mut bytes = vec![0; head.bytes_since(from) as usize];
    group.read_log(from, &mut bytes).unwrap();
    copy.append_received(from, &bytes).unwrap();
    copy.sync_now().unwrap();
    group.sync_now().unwrap();
    copy.note_committed(head);
}

#[test]
fn a_pin_is_kept_on_both_nodes_and_its_removal_frees_both() {
    let (a, b) = (Bench::new("a", 1), Bench::new("b", 2));
    let (group, volume) = group_with_volume(&a);
    let copy = b.create_copy();
    write(&group, volume, 0, &[1; 65536]);
    let pinned = group.pin_bookmark(name("pin"), Consistency::Filesystem).unwrap();
    let kept = all(&*at_pin(&group, "pin").unwrap(), volume);
    for round in 2..5 {
        write(&group, volume, 4096, &[round; 8192]);
        follow(&group, &copy);
        fold(&a, &group);
        fold(&b, &copy);
        for (node, what) in [(&group, "primary"), (&copy, "secondary")] {
            assert!(node.positions().horizon > pinned.lsn);
            let open = at_pin(node, "pin").unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(all(&*open, volume) == kept, "{what}, round {round}");
            node.close_this_image(&open).unwrap();
        }
    }
    let removed = BookmarkRecord { removed: true, ..pinned.clone() };
    group.append_control(Control::Bookmark(removed)).unwrap();
    follow(&group, &copy);
    for (node, bench) in [(&group, &a), (&copy, &b)] {
        for open in node.images() {
            node.close_this_image(&open).unwrap();
        }
        fold(bench, node);
        assert!(!node.is_kept(pinned.lsn));
        assert!(bench.disk.list(&dir().join("moments")).unwrap().is_empty());
    }
}

/// A node whose base was further than the pin before it knew of it.
#[test]
fn a_pin_that_a_node_could_not_keep_is_told_there_and_kept_elsewhere() {
    let bench = Bench::new("a", 3);
    let (group, volume) = group_with_volume(&bench);
    write(&group, volume, 0, &[1; 4096]);
    let late = group.create_bookmark(name("late"), Consistency::Crash).unwrap();
    write(&group, volume, 0, &[2; 4096]);
    fold(&bench, &group);
    let pinned = BookmarkRecord { pinned: true, ..late };
    group.append_control(Control::Bookmark(pinned.clone())).unwrap();
    fold(&bench, &group);
    assert!(bench.event_codes().contains(&"pin-lost".to_owned()));
    let reason = group.cost_at(pinned.lsn).unwrap_err();
    assert!(reason.contains("nothing was kept"), "{reason}");
    let refused = at_pin(&group, "late").map(|_| ()).unwrap_err().to_string();
    assert!(refused.contains("not kept on this node"), "{refused}");
}
