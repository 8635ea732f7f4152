//! Records and images that no primary would make: from a peer that lies, and on a disk that was
//! written by one. Checksums are right; nothing is lost, nothing is made up, and nobody panics.

use super::moments::{all, group_with_volume};
use super::pins::follow;
use super::*;
use crate::base::ControlState;
use crate::group::content::PLACE_MAX;
use crate::group::moment::KEPT;
use crate::io::OpenMode;
use crate::log::control::{COUNTER_MAX, ControlKind};
use crate::log::record::{Header, Kind, flags, payload_crcs};
use crate::log::segment::segment_name;
use crate::units::Chain;

/// A record that continues a log, as a peer sends it.
fn record(at: &Header, kind: Kind, flags: u16, body: &[u8]) -> (Header, Vec<u8>) {
    let write = kind == Kind::Write;
    let mut header = Header {
        kind: kind as u8,
        version: 1,
        flags,
        payload_bytes: body.len() as u32,
        volume: VolumeNumber(u32::from(write)),
        control_kind: if write { 0 } else { ControlKind::Rewind as u32 },
        offset: 0,
        length: if write { body.len() as u64 } else { 0 },
        lsn: at.end(),
        chain: at.checksum,
        requests: at.requests + u64::from(flags & flags::LAST_OF_REQUEST != 0),
        crcs: payload_crcs(0, body),
        ..at.clone()
    };
    let mut bytes = Vec::new();
    header.encode(&mut bytes);
    bytes.extend_from_slice(body);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    (header, bytes)
}

const CONTROL: u16 = flags::LAST_OF_REQUEST | flags::MUST_UNDERSTAND;

/// The last record of a group's log.
fn last(group: &Group) -> Header {
    let positions = group.positions();
    let mut bytes = vec![0; positions.head.0 as usize];
    group.read_log(Lsn::ZERO, &mut bytes).unwrap();
    let mut at = 0;
    loop {
        let header = Header::decode(&bytes[at..]).unwrap();
        if header.end() == positions.head {
            return header;
        }
        at = header.end().0 as usize;
    }
}

fn goes_to(to: u64, highest_volume: u32) -> Vec<u8> {
    format!(r#"{{"to":{to},"time":"2026-11-26T05:00:00Z","highest_volume":{highest_volume}}}"#)
        .into_bytes()
}

/// A primary that has folded a part; its positions: a request's end that is folded, one that is
/// not, and behind that the end of a record inside of a request, and of a pad.
fn primary(bench: &Bench) -> (Arc<Group>, VolumeNumber, [Lsn; 4]) {
    let (group, volume) = group_with_volume(bench);
    let folded = write(&group, volume, 0, &[1; 40_000]);
    super::moments::fold(bench, &group);
    set_policy(&group, 3600, 64 << 20);
    let kept = write(&group, volume, 4096, &[2; 20_000]);
    // Longer than a record may be in a segment of this size: a request of several.
    let end = write(&group, volume, 0, &[3; 50_000]);
    group.sync_now().unwrap();
    let mut bytes = vec![0; end.bytes_since(kept) as usize];
    group.read_log(kept, &mut bytes).unwrap();
    let (mut inside, mut at) = ([None; 2], kept);
    while at < end {
        let header = Header::decode(&bytes[at.bytes_since(kept) as usize..]).unwrap();
        at = header.end();
        if !header.is_last_of_request() {
            inside[usize::from(header.kind == Kind::Pad as u8)] = Some(at);
        }
    }
    (group, volume, [folded, kept, inside[0].unwrap(), inside[1].unwrap()])
}

#[test]
fn a_peers_rewind_that_cannot_be_is_refused_with_its_reason_and_the_copy_stays_what_it_was() {
    let (a, b) = (Bench::new("a", 1), Bench::new("b", 2));
    let (group, volume, [_, kept, inside, pad]) = primary(&a);
    let copy = b.create_copy();
    follow(&group, &copy);
    set_policy(&group, 0, 64 << 20);
    follow(&group, &copy);
    let (at, head) = (last(&group), group.positions().head);
    let one = |body: &[u8]| record(&at, Kind::Control, CONTROL, body).1;
    let mut deep = vec![b'['; 6000];
    deep.extend(vec![b']'; 6000]);
    let mut other_chain = at.clone();
    other_chain.checksum = Chain(at.checksum.0 ^ 1);
    let block = [9; 4096];
    let half = record(&at, Kind::Write, 0, &block);
    let behind_half = record(&half.0, Kind::Control, CONTROL, &goes_to(kept.0, 1));
    let whole = record(&at, Kind::Write, flags::LAST_OF_REQUEST, &block);
    let behind_whole = record(&whole.0, Kind::Control, CONTROL, &goes_to(inside.0, 1));
    let cases = [
        ("beyond the head", one(&goes_to(head.0 + 4096, 1)), "which is behind it"),
        ("at the end of all", one(&goes_to(Lsn::MAX.0, 1)), "which is behind it"),
        ("beyond any log", one(&goes_to(u64::MAX, 1)), ""),
        ("inside of a request", one(&goes_to(inside.0, 1)), "not the end of a request"),
        ("behind a pad", one(&goes_to(pad.0, 1)), "not the end of a request"),
        ("inside of a record", one(&goes_to(inside.0 + 8, 1)), "not the end of a request"),
        ("nowhere", one(&goes_to(kept.0 + 3, 1)), "not the end of a request"),
        ("more volumes than there can be", one(&goes_to(kept.0, u32::MAX)), "knows a volume"),
        ("no JSON", one(b"{\"to\":12,"), "control record"),
        ("no text", one(&[0xff; 300]), "control record"),
        ("nothing", one(b""), "control record"),
        ("another shape", one(b"{\"to\":[],\"time\":7}"), "kind 9"),
        ("a negative place", one(b"{\"to\":-1,\"time\":0,\"highest_volume\":1}"), "kind 9"),
        ("without end", one(&deep), "control record"),
        (
            "of another history",
            record(&other_chain, Kind::Control, CONTROL, &goes_to(kept.0, 1)).1,
            "does not continue this log",
        ),
        (
            "that ends no request",
            record(&at, Kind::Control, flags::MUST_UNDERSTAND, &goes_to(kept.0, 1)).1,
            "a part of a larger request",
        ),
        (
            "behind half of a request",
            [half.1, behind_half.1].concat(),
            "a part of a larger request",
        ),
    ];
    let before = (all(&*copy, volume), copy.positions().head, copy.positions().request_end);
    assert_eq!(before.1, head);
    for (what, bytes, reason) in &cases {
        // As it comes, and cut.
        for cut in [bytes.len(), 97, 8] {
            let mut refused = None;
            for part in bytes.chunks(cut) {
                match copy.append_received(copy.received_end(), part) {
                    Ok(_) => {}
                    Err(error) => {
                        refused = Some(error.to_string());
                        break;
                    }
                }
            }
            let refused = refused.unwrap_or_else(|| panic!("{what}: taken"));
            assert!(refused.contains(reason) && !refused.contains('\n'), "{what}: {refused}");
            let positions = copy.positions();
            let now = (all(&*copy, volume), positions.head, positions.request_end);
            assert!(now == before, "{what}: changed");
            assert_eq!(copy.needs_image(), None, "{what}");
            assert_eq!(copy.received_end(), head, "{what}: nothing of it waits");
        }
    }
    assert_eq!(b.event_codes().iter().filter(|code| *code == "rewound").count(), 0);
    // What is whole before it is kept.
    let both = [whole.1, behind_whole.1].concat();
    let refused = copy.append_received(head, &both).unwrap_err().to_string();
    assert!(refused.contains("not the end of a request"), "{refused}");
    assert_eq!(copy.positions().head, whole.0.end());
    let expected = [&block[..], &before.0[4096..]].concat();
    assert!(all(&*copy, volume) == expected);
    // Also on its disk.
    copy.sync_now().unwrap();
    drop(copy);
    let (copy, _) = b.after_crash(1).open();
    assert_eq!(copy.positions().head, whole.0.end());
    assert!(all(&*copy, volume) == expected);
}

#[test]
fn a_peers_rewind_to_before_the_base_asks_for_an_image_and_the_true_log_is_followed_on() {
    let (a, b) = (Bench::new("a", 3), Bench::new("b", 4));
    let (group, volume, [folded, ..]) = primary(&a);
    let copy = b.create_copy();
    follow(&group, &copy);
    set_policy(&group, 0, 64 << 20);
    follow(&group, &copy);
    super::moments::fold(&b, &copy);
    let (at, before) = (last(&group), all(&*copy, volume));
    for to in [0, folded.0, copy.positions().horizon.0 - 8] {
        let lie = record(&at, Kind::Control, CONTROL, &goes_to(to, 1)).1;
        let refused = copy.append_received(copy.received_end(), &lie).unwrap_err().to_string();
        assert!(refused.contains("an image takes its place"), "{to}: {refused}");
        assert!(copy.needs_image().is_some() && all(&*copy, volume) == before, "{to}");
    }
    write(&group, volume, 0, &[5; 4096]);
    follow(&group, &copy);
    assert!(all(&*copy, volume) == all(&*group, volume));
    copy.promote("test").unwrap();
    assert_eq!(copy.needs_image(), None, "an operator has decided");
}

/// The body of a record, by the places in a primary's log and its head.
type Body = fn([Lsn; 4], Lsn) -> Vec<u8>;

/// A disk says what no peer was believed: the group opens with all that was, and shows nothing that
/// such a record would have made of it.
#[test]
fn a_rewind_on_disk_that_cannot_be_opens_with_all_that_was_before_it() {
    let cases: [(&str, Body, bool); 8] = [
        ("beyond the head", |_, head| goes_to(head.0 + 4096, 1), false),
        ("beyond any log", |_, _| goes_to(u64::MAX, 1), false),
        ("no JSON", |_, _| b"{\"to\":12,".to_vec(), false),
        ("no text", |_, _| vec![0xff; 300], false),
        // What it goes back to would have to be known: no image goes past it.
        ("before the base", |[folded, ..], _| goes_to(folded.0 - 8, 1), true),
        ("inside of a request", |[_, _, inside, _], _| goes_to(inside.0, 1), true),
        ("behind a pad", |[.., pad], _| goes_to(pad.0, 1), true),
        ("nowhere", |[_, kept, ..], _| goes_to(kept.0 + 3, 1), true),
    ];
    for (what, body, barrier) in cases {
        for as_copy in [false, true] {
            let what = format!("{what}, as a copy: {as_copy}");
            let (a, b) = (Bench::new("a", 5), Bench::new("b", 6));
            let (group, volume, places) = primary(&a);
            let (bench, group) = if as_copy {
                let copy = b.create_copy();
                follow(&group, &copy);
                (b, copy)
            } else {
                (a, group)
            };
            let (at, head) = (last(&group), group.positions().head);
            let (was, [_, kept, ..]) = (all(&*group, volume), places);
            let at_kept = |group: &Group| {
                let open = group.open_image(&Point::Lsn(kept), None, "test", None).unwrap();
                let shown = all(&*open, volume);
                group.close_this_image(&open).unwrap();
                shown
            };
            let was_kept = at_kept(&group);
            group.close().unwrap();
            drop(group);
            let lie = record(&at, Kind::Control, CONTROL, &body(places, head));
            let file = dir().join("log").join(segment_name(head.segment_number(SEGMENT)));
            let file = bench.disk.open(&file, OpenMode::ReadWrite).unwrap();
            let slices = [std::io::IoSlice::new(&lie.1)];
            file.write_at(&slices, head.segment_offset(SEGMENT)).unwrap();
            file.sync().unwrap();
            let (group, recovery) = bench.open();
            assert_eq!((recovery.cut, recovery.damaged.len()), (None, 0), "{what}");
            assert!(group.positions().head >= head, "{what}: nothing is cut");
            assert!(all(&*group, volume) == was && at_kept(&group) == was_kept, "{what}");
            let now = group.open_image(&Point::Now, None, "test", None);
            assert_eq!(now.is_err(), barrier, "{what}: {:?}", now.err());
            let before = group.open_image(&Point::Lsn(head), None, "test", None).unwrap();
            assert!(all(&*before, volume) == was, "{what}");
            // No fold makes it of the base either.
            bench.pass(5000);
            group.note_committed(group.positions().head);
            group.sync_now().unwrap();
            let folded = group.fold_now();
            if barrier {
                assert!(group.positions().horizon <= head, "{what}: {folded:?}");
            }
            assert!(all(&*group, volume) == was && all(&*before, volume) == was, "{what}, folded");
        }
    }
}

/// An image of a group as a liar sends it: how far the copy takes it.
fn send_image(
    group: &Group,
    copy: &Group,
    offer: impl FnOnce(&mut ImageOffer),
    control: impl FnOnce(&mut ControlState),
) -> Result<Position, GroupError> {
    group.end_shipment(&name("b"));
    let shipment = group.ship(&name("b"), None, Lsn::ZERO, None).unwrap();
    let (mut offered, mut bytes) = (shipment.offer(), Vec::new());
    offer(&mut offered);
    copy.begin_image(&offered)?;
    while let Some(part) = shipment.next().unwrap() {
        let ImagePart::Control { total, bytes: some, .. } = &part else {
            copy.stage(part)?;
            continue;
        };
        bytes.extend_from_slice(some);
        if bytes.len() as u64 == *total {
            break;
        }
    }
    let mut state = ControlState::decode(&bytes).unwrap();
    state.position = offered.position;
    control(&mut state);
    let bytes = bytes::Bytes::from(state.encode());
    copy.stage(ImagePart::Control { offset: 0, total: bytes.len() as u64, bytes })?;
    while let Some(part) = shipment.next().unwrap() {
        copy.stage(part)?;
    }
    copy.switch_to_image()
}

#[test]
fn an_image_counts_no_more_than_a_number_holds_though_its_peer_says_that_much_has_come() {
    for (done_bytes, total_bytes) in [(u64::MAX, 0), (u64::MAX, u64::MAX), (u64::MAX - 8, 9)] {
        let (a, b) = (Bench::new("a", 13), Bench::new("b", 14));
        let (group, volume, _) = primary(&a);
        let mut copy = b.create_copy();
        // All but the end, and again after a start with what its disk says of it.
        for turn in 0..2 {
            let staged = copy.staged().unwrap();
            assert_eq!(staged.is_some(), turn > 0);
            group.end_shipment(&name("b"));
            let shipment = group.ship(&name("b"), None, Lsn::ZERO, staged.as_ref()).unwrap();
            copy.begin_image(&ImageOffer { done_bytes, total_bytes, ..shipment.offer() }).unwrap();
            while let Some(part) = shipment.next().unwrap().filter(|part| *part != ImagePart::End) {
                let progress = copy.stage(part).unwrap();
                assert!(progress.done_bytes <= progress.total_bytes, "{progress:?}");
            }
            let offset = if turn == 0 { 4096 } else { 8192 };
            write(&group, volume, offset, &[7; 4096]);
            group.sync_now().unwrap();
            copy.close().unwrap();
            drop(copy);
            copy = b.open().0;
        }
        send_image(&group, &copy, |_| (), |_| ()).unwrap();
        assert!(all(&*copy, volume) == all(&*group, volume));
    }
}

/// What an earlier version kept of such an image.
#[test]
fn what_a_disk_says_has_come_of_an_image_counts_no_further_than_there_is() {
    let (a, b) = (Bench::new("a", 15), Bench::new("b", 16));
    let (group, volume, _) = primary(&a);
    let copy = b.create_copy();
    let shipment = group.ship(&name("b"), None, Lsn::ZERO, None).unwrap();
    copy.begin_image(&shipment.offer()).unwrap();
    copy.close().unwrap();
    drop(copy);
    let path = dir().join("staging").join("state");
    let text = String::from_utf8(crate::group::files::load(&*b.disk, &path).unwrap()).unwrap();
    let lie = text.replace("\"done_bytes\":0", &format!("\"done_bytes\":{}", u64::MAX));
    assert_ne!(lie, text);
    crate::group::files::store(&*b.disk, &path, lie.as_bytes()).unwrap();
    let (copy, _) = b.open();
    let staged = copy.staged().unwrap().unwrap();
    assert!(staged.done_bytes <= shipment.offer().total_bytes, "{staged:?}");
    let again = group.ship(&name("b"), None, Lsn::ZERO, Some(&staged)).unwrap();
    copy.begin_image(&again.offer()).unwrap();
    while let Some(part) = again.next().unwrap() {
        copy.stage(part).unwrap();
    }
    copy.switch_to_image().unwrap();
    assert!(all(&*copy, volume) == all(&*group, volume));
}

/// Changes the body of each entry that says `from`.
fn say(state: &mut ControlState, from: &str, to: &str) {
    let mut changed = 0;
    for entry in &mut state.entries {
        let body = entry.body.get().replace(from, to);
        changed += usize::from(body != entry.body.get());
        entry.body = serde_json::value::RawValue::from_string(body).unwrap();
    }
    assert!(changed > 0, "{from}: nobody says so");
}

#[test]
fn an_image_that_no_primary_has_is_refused_and_a_true_one_is_taken_after_it() {
    type Offer = fn(&mut ImageOffer);
    type State = fn(&mut ControlState);
    let cases: [(&str, Offer, State, &str); 15] = [
        ("at the end of all", |offer| offer.position.lsn = Lsn::MAX, |_| (), "no log"),
        ("near it", |offer| offer.position.lsn = Lsn(Lsn::MAX.0 - (64 << 10)), |_| (), "no log"),
        ("where kept slots begin", |offer| offer.position.lsn = KEPT, |_| (), "no log"),
        ("near it", |offer| offer.position.lsn = Lsn(KEPT.0 - (64 << 10)), |_| (), "no log"),
        ("inside of eight bytes", |offer| offer.position.lsn.0 -= 4, |_| (), "no record"),
        ("parting beyond all", |offer| offer.common = Lsn(u64::MAX - 7), |_| (), "no log"),
        ("parting inside of eight bytes", |offer| offer.common = Lsn(3), |_| (), "no record"),
        (
            "a volume twice, with half a block",
            |_| (),
            |state| {
                let is_volume = |it: &&crate::base::ControlEntry| it.body.get().contains("size_");
                let mut again = state.entries.iter().find(is_volume).unwrap().clone();
                let body =
                    again.body.get().replace("\"size_bytes\":3145728", "\"size_bytes\":1000");
                assert!(body.contains(":1000"), "{body}");
                again.body = serde_json::value::RawValue::from_string(body).unwrap();
                state.entries.push(again);
            },
            "a volume has 1000 bytes",
        ),
        (
            "a volume without a number",
            |_| (),
            |state| say(state, "\"number\":1", "\"number\":0"),
            "a volume has the number 0",
        ),
        (
            "no JSON of its kind",
            |_| (),
            |state| say(state, "\"size_bytes\":3145728", "\"size_bytes\":[]"),
            "control record of kind 3",
        ),
        (
            "a reign too high",
            |_| (),
            |state| say(state, "\"counter\":1", &format!("\"counter\":{}", u64::MAX)),
            "a reign has the number",
        ),
        ("an entry behind it", |_| (), |state| state.entries[0].lsn = state.position.lsn, "behind"),
        (
            "an entry of nowhere",
            |_| (),
            |state| state.entries.last_mut().unwrap().lsn = Lsn(u64::MAX),
            "behind",
        ),
        ("requests without end", |_| (), |state| state.requests = u64::MAX, "requests"),
        (
            "more requests than records",
            |_| (),
            |state| state.requests = state.position.lsn.0 / 96 + 1,
            "requests",
        ),
    ];
    for (what, offer, control, reason) in cases {
        let (a, b) = (Bench::new("a", 7), Bench::new("b", 8));
        let (group, volume, _) = primary(&a);
        let copy = b.create_copy();
        let refused = send_image(&group, &copy, offer, control).map(|_| ()).unwrap_err();
        let refused = refused.to_string();
        assert!(refused.contains(reason) && !refused.contains('\n'), "{what}: {refused}");
        assert_eq!((copy.positions().head, copy.volumes()), (Lsn::ZERO, Vec::new()), "{what}");
        copy.write_indices();
        copy.close().unwrap();
        drop(copy);
        let (copy, _) = b.open();
        send_image(&group, &copy, |_| (), |_| ()).unwrap();
        assert!(all(&*copy, volume) == all(&*group, volume), "{what}");
        copy.promote("test").unwrap();
        write(&copy, volume, 0, &[6; 4096]);
    }
}

#[test]
fn behind_an_image_at_the_highest_place_the_log_is_read_and_folded() {
    let (a, b) = (Bench::new("a", 15), Bench::new("b", 16));
    let (group, volume, _) = primary(&a);
    let copy = b.create_copy();
    let at = send_image(&group, &copy, |offer| offer.position.lsn = PLACE_MAX, |_| ()).unwrap();
    assert_eq!(at.lsn, PLACE_MAX);
    let mut expected = all(&*group, volume);
    copy.promote("test").unwrap();
    write(&copy, volume, 4096, &[6; 20_000]);
    // Not a step for each segment that there might be before it.
    assert_eq!(copy.prepare_round(Lsn::ZERO), copy.positions().head);
    expected[4096..24_096].fill(6);
    assert!(all(&*copy, volume) == expected);
    copy.sync_now().unwrap();
    copy.close().unwrap();
    drop(copy);
    let (copy, _) = b.open();
    assert!(all(&*copy, volume) == expected);
    set_policy(&copy, 0, 64 << 20);
    super::moments::fold(&b, &copy);
    assert!(copy.positions().horizon > PLACE_MAX && all(&*copy, volume) == expected);
}

#[test]
fn a_record_counts_the_requests_before_it_or_is_refused() {
    let (a, b) = (Bench::new("a", 9), Bench::new("b", 10));
    let (group, volume, _) = primary(&a);
    set_policy(&group, 0, 64 << 20);
    let copy = b.create_copy();
    follow(&group, &copy);
    let (at, before) = (last(&group), copy.positions());
    let body = [9; 4096];
    for (flags, requests) in [
        (flags::LAST_OF_REQUEST, u64::MAX),
        (flags::LAST_OF_REQUEST, at.requests),
        (flags::LAST_OF_REQUEST, at.requests + 2),
        (flags::LAST_OF_REQUEST, 0),
        (0, at.requests + 1),
        (0, u64::MAX),
    ] {
        let (mut header, bytes) = record(&at, Kind::Write, flags, &body);
        header.requests = requests;
        let mut lie = Vec::new();
        header.encode(&mut lie);
        lie.extend_from_slice(&bytes[lie.len()..]);
        let refused = copy.append_received(copy.received_end(), &lie).unwrap_err().to_string();
        assert!(refused.contains(&format!("counts {requests} requests")), "{refused}");
        assert_eq!((copy.positions(), copy.received_end()), (before, before.head));
    }
    // The second record of one delivery is held against the first of it, wherever it is cut.
    let one = record(&at, Kind::Write, 0, &body);
    let two = record(&one.0, Kind::Write, flags::LAST_OF_REQUEST, &body);
    assert_eq!(two.0.requests, at.requests + 1);
    let both = [one.1, two.1].concat();
    for part in both.chunks(1000) {
        copy.append_received(copy.received_end(), part).unwrap();
    }
    assert_eq!(copy.positions().requests, at.requests + 1);
    copy.promote("test").unwrap();
    write(&copy, volume, 0, &[6; 4096]);
}

#[test]
fn a_reign_of_a_number_or_place_that_none_has_is_refused_and_the_last_number_ends_in_an_error() {
    let (a, b) = (Bench::new("a", 11), Bench::new("b", 12));
    let (group, ..) = primary(&a);
    super::returning::join(&group, 9);
    set_policy(&group, 0, 64 << 20);
    let copy = b.create_copy();
    follow(&group, &copy);
    let at = last(&group);
    let reign_at = |first_lsn: Lsn, counter: u64| {
        let epoch = EpochRecord { first_lsn, ..group.new_epoch("promote", counter) };
        let body = Control::Epoch(epoch).to_json();
        let (mut header, bytes) = record(&at, Kind::Control, CONTROL, &body);
        header.control_kind = ControlKind::Epoch as u32;
        let mut lie = Vec::new();
        header.encode(&mut lie);
        lie.extend_from_slice(&bytes[lie.len()..]);
        lie
    };
    let reign = |counter: u64| reign_at(at.end(), counter);
    for counter in [u64::MAX, COUNTER_MAX + 1] {
        let refused = copy.append_received(at.end(), &reign(counter)).unwrap_err().to_string();
        assert!(refused.contains("a reign has the number"), "{refused}");
        assert_eq!(copy.positions().head, at.end());
    }
    // One that begins behind its own record: no place is so far behind the log.
    for first_lsn in [Lsn(at.end().0 + 8), Lsn(u64::MAX)] {
        let lie = reign_at(first_lsn, 9);
        let refused = copy.append_received(at.end(), &lie).unwrap_err().to_string();
        assert!(refused.contains("behind its record"), "{refused}");
        assert_eq!(copy.positions().head, at.end());
    }
    copy.append_received(at.end(), &reign(COUNTER_MAX)).unwrap();
    let refused = copy.promote("test").unwrap_err().to_string();
    assert!(refused.contains("numbers of reigns"), "{refused}");
    assert_eq!(copy.role(), Role::Secondary);
    // A primary that is held back by such a reign of a peer.
    group.close().unwrap();
    drop(group);
    let (group, _) = a.open();
    group.hold_back(u64::MAX, "a liar reigns");
    let refused = group.serve().unwrap_err().to_string();
    assert!(refused.contains("numbers of reigns"), "{refused}");
}
