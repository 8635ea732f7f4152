//! The golden bytes of the peer wire, and what it refuses.

use super::*;

fn hex_of(bytes: &[u8]) -> String {
    hex::encode(bytes)
}

/// Joins fields, so that each can stand on a line with its name.
fn fields(parts: &[&str]) -> String {
    parts.concat()
}

fn hello() -> Hello {
    Hello {
        version_min: 1,
        version_max: 3,
        purpose: Purpose::Link,
        verdict: Verdict::UnknownKey,
        node: NodeId([0x11; 16]),
        incarnation: Incarnation(0x0102_0304_0506_0708),
        wanted: Some(NodeId([0x22; 16])),
        features: 0,
    }
}

#[test]
fn the_hello_is_frozen() {
    let golden = fields(&[
        "544c504545520d0a",                 // magic
        "0100",                             // version_min
        "0300",                             // version_max
        "01",                               // purpose: link
        "01",                               // verdict: unknown key
        "0000",                             // zero
        "11111111111111111111111111111111", // node
        "0807060504030201",                 // incarnation
        "22222222222222222222222222222222", // wanted
        "0000000000000000",                 // features
    ]);
    assert_eq!(hex_of(&hello().encode()), golden);
    assert_eq!(Hello::decode(&hello().encode()), Ok(hello()));
}

#[test]
fn a_hello_of_a_later_version_is_read_and_the_highest_common_version_chosen() {
    let ours = Hello { version_min: 1, version_max: 2, ..hello() };
    let later = Hello { version_min: 2, version_max: 9, ..hello() };
    let far = Hello { version_min: 3, version_max: 9, ..hello() };
    assert_eq!(ours.common_version(&later), Some(2));
    assert_eq!(later.common_version(&ours), Some(2));
    assert_eq!(ours.common_version(&far), None);
    let mut bytes = later.encode();
    bytes[14] = 0xff;
    bytes[56] = 0xff;
    assert_eq!(Hello::decode(&bytes).unwrap().features, 0xff);
}

#[test]
fn wrong_hellos_are_refused() {
    for (at, value) in [(0, b'X'), (12, 0), (12, 9), (13, 6)] {
        let mut bytes = hello().encode();
        bytes[at] = value;
        assert!(Hello::decode(&bytes).is_err(), "byte {at} = {value}");
    }
}

#[test]
fn the_log_frame_header_is_frozen() {
    let header = FrameHeader::log(GroupId([0x33; 16]), 7, Lsn(0x1000), 0x2_0000);
    let golden = fields(&[
        "02",                               // kind: log
        "00",                               // codec: none
        "0000",                             // zero
        "00000200",                         // payload_bytes
        "00000200",                         // raw_bytes
        "00000000",                         // zero
        "33333333333333333333333333333333", // group
        "0700000000000000",                 // stream
        "0010000000000000",                 // position
    ]);
    assert_eq!(hex_of(&header.encode()), golden);
    assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
}

#[test]
fn the_image_frame_header_is_frozen() {
    let header = FrameHeader::image(GroupId([0x33; 16]), 7, 9, 0x2_0000);
    let golden = fields(&[
        "03",                               // kind: image
        "00",                               // codec: none
        "0000",                             // zero
        "00000200",                         // payload_bytes
        "00000200",                         // raw_bytes
        "00000000",                         // zero
        "33333333333333333333333333333333", // group
        "0700000000000000",                 // stream
        "0900000000000000",                 // number in the stream
    ]);
    assert_eq!(hex_of(&header.encode()), golden);
    assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
}

#[test]
fn wrong_frame_headers_are_refused() {
    let good = FrameHeader::log(GroupId([0x33; 16]), 7, Lsn(0x1000), 100).encode();
    // Kind, codec, payload above the limit or none, raw bytes that differ, position above 2^63.
    for (at, value) in [(0, 0), (0, 4), (1, 1), (7, 1), (4, 0), (8, 1), (47, 0xff)] {
        let mut bytes = good;
        bytes[at] = value;
        assert!(FrameHeader::decode(&bytes).is_err(), "byte {at} = {value}");
    }
}

const G: [u8; 16] = [0x44; 16];

fn history() -> WireHistory {
    let epoch = WireEpoch { id: 5, counter: 1, first_lsn: 0x160, author: [0x55; 16] };
    WireHistory { epochs: vec![epoch], head: 0x200, chain: 6 }
}

fn position() -> WirePosition {
    WirePosition { epoch: 5, lsn: 0x300, time: 7 }
}

fn staged() -> WireStaged {
    let reached = vec![WireReached { volume: 3, offset: 0x4000, at: position() }];
    WireStaged { image: position(), since: Some(0x200), reached, done_bytes: 0x5000 }
}

/// Epoch, LSN, time.
const POSITION: &str = "050000000000000000030000000000000700000000000000";
const GROUP: &str = "44444444444444444444444444444444";
const HISTORY: &str = concat!(
    "0100000000000000",                 // one epoch
    "0500000000000000",                 // id
    "0100000000000000",                 // counter
    "6001000000000000",                 // first_lsn
    "55555555555555555555555555555555", // author
    "0002000000000000",                 // head
    "0600000000000000",                 // chain
);

/// Every message of version 1, byte for byte: number of the variant, then its fields.
#[test]
fn the_messages_of_version_1_are_frozen() {
    let text = |text: &str| text.to_owned();
    let proof_hex = "66".repeat(32);
    let cases: Vec<(Message, String)> = vec![
        (
            Message::Welcome { name: text("a"), address: text("h:1"), program: text("0.1.0") },
            fields(&[
                "00000000",         // Welcome
                "0100000000000000", // bytes of the name
                "61",               // a
                "0300000000000000", // bytes of the address
                "683a31",           // h:1
                "0500000000000000", // bytes of the program version
                "302e312e30",       // 0.1.0
            ]),
        ),
        (
            Message::Heartbeat { sent: 1, echo: 2, held: 3, wall: 4 },
            fields(&[
                "01000000",
                "0100000000000000", // sent
                "0200000000000000", // echo
                "0300000000000000", // held
                "0400000000000000", // wall
            ]),
        ),
        (
            Message::Announce {
                group: G,
                primary: true,
                recovering: false,
                paused: true,
                stopped: false,
                incarnation: 8,
                history: history(),
            },
            fields(&[
                "02000000",
                GROUP,
                "01",               // primary
                "00",               // recovering
                "01",               // paused
                "00",               // stopped
                "0800000000000000", // incarnation
                HISTORY,
            ]),
        ),
        (
            Message::Follow {
                group: G,
                stream: 9,
                history: history(),
                durable: 0x180,
                requests: 2,
                staged: Some(staged()),
                needs_image: NeedsImage::Since,
            },
            fields(&[
                "03000000",
                GROUP,
                "0900000000000000", // stream
                HISTORY,
                "8001000000000000", // durable
                "0200000000000000", // requests
                "01",               // something is staged
                POSITION,           // of the image
                "01",               // since:
                "0002000000000000",
                "0100000000000000", // one place
                "03000000",         // volume
                "0040000000000000", // offset
                POSITION,           // as of
                "0050000000000000", // bytes staged
                "01000000",         // needs an image: what changed since
            ]),
        ),
        (
            Message::Stream { group: G, stream: 9, from: 0x200 },
            fields(&[
                "04000000",
                GROUP,
                "0900000000000000", // stream
                "0002000000000000", // from
            ]),
        ),
        (
            Message::Stop { group: G, stream: 9, code: StopCode::Diverged, reason: text("r") },
            fields(&[
                "05000000",
                GROUP,
                "0900000000000000", // stream
                "05000000",         // code: diverged
                "0100000000000000", // bytes of the reason
                "72",
            ]),
        ),
        (
            Message::Ack {
                group: G,
                stream: 9,
                received: 0x210,
                head: 0x200,
                chain: 6,
                durable: 0x180,
                requests: 2,
            },
            fields(&[
                "06000000",
                GROUP,
                "0900000000000000", // stream
                "1002000000000000", // received
                "0002000000000000", // head
                "0600000000000000", // chain
                "8001000000000000", // durable
                "0200000000000000", // requests
            ]),
        ),
        (
            Message::Progress {
                group: G,
                stream: 9,
                head: 0x200,
                chain: 6,
                durable: 0x180,
                requests: 2,
                lag: u64::MAX,
                echo: 1,
                held: 3,
            },
            fields(&[
                "07000000",
                GROUP,
                "0900000000000000", // stream
                "0002000000000000", // head
                "0600000000000000", // chain
                "8001000000000000", // durable
                "0200000000000000", // requests
                "ffffffffffffffff", // lag: unknown
                "0100000000000000", // echo
                "0300000000000000", // held
            ]),
        ),
        (
            Message::MayFollow { group: G, head: 0x200, chain: Some(6) },
            fields(&["08000000", GROUP, "0002000000000000", "01", "0600000000000000"]),
        ),
        (
            Message::Part { id: 1, answer: true, body: vec![0x7b] },
            fields(&["09000000", "0100000000000000", "01", "0100000000000000", "7b"]),
        ),
        (
            Message::Call { id: 1, method: text("m"), body: vec![0x7d] },
            fields(&[
                "0a000000",
                "0100000000000000", // id
                "0100000000000000", // bytes of the method
                "6d",
                "0100000000000000", // bytes of the body
                "7d",
            ]),
        ),
        (
            Message::Answer { id: 1, ok: false, body: vec![] },
            fields(&["0b000000", "0100000000000000", "00", "0000000000000000"]),
        ),
        (
            Message::Pair { name: text("b"), address: text(""), proof: [0x66; 32] },
            fields(&["0c000000", "0100000000000000", "62", "0000000000000000", &proof_hex]),
        ),
        (
            Message::Paired { name: text("a"), address: text(""), proof: [0x66; 32] },
            fields(&["0d000000", "0100000000000000", "61", "0000000000000000", &proof_hex]),
        ),
        (
            Message::PairRefused { reason: text("r") },
            fields(&["0e000000", "0100000000000000", "72"]),
        ),
        (
            Message::Image {
                group: G,
                stream: 9,
                position: position(),
                since: None,
                resumed: true,
                total_bytes: 0x6000,
                done_bytes: 0x5000,
                common: 0x200,
            },
            fields(&[
                "0f000000",
                GROUP,
                "0900000000000000", // stream
                POSITION,
                "00",               // since: all of it
                "01",               // resumed
                "0060000000000000", // total bytes
                "0050000000000000", // bytes staged
                "0002000000000000", // common
            ]),
        ),
        (
            Message::ImageAck { group: G, stream: 9, frames: 4, done_bytes: 0x5000 },
            fields(&[
                "10000000",
                GROUP,
                "0900000000000000", // stream
                "0400000000000000", // frames
                "0050000000000000", // bytes staged
            ]),
        ),
        (
            Message::Declined { id: 1, reason: text("r") },
            fields(&["11000000", "0100000000000000", "0100000000000000", "72"]),
        ),
    ];
    for (message, golden) in &cases {
        let bytes = message.encode().unwrap();
        assert_eq!(&hex_of(&bytes), golden, "{message:?}");
        assert_eq!(&Message::decode(&bytes).unwrap(), message);
    }
    let kinds: std::collections::BTreeSet<u8> =
        cases.iter().map(|(message, _)| message.encode().unwrap()[0]).collect();
    assert_eq!(kinds.len(), 18, "every variant is pinned");
}

#[test]
fn a_message_cut_anywhere_or_with_more_behind_it_is_refused() {
    let message = Message::Follow {
        group: G,
        stream: 9,
        history: history(),
        durable: 1,
        requests: 2,
        staged: Some(staged()),
        needs_image: NeedsImage::No,
    };
    let bytes = message.encode().unwrap();
    for cut in 0..bytes.len() {
        assert!(Message::decode(&bytes[..cut]).is_err(), "cut at {cut}");
    }
    let mut longer = bytes;
    longer.push(0);
    assert!(Message::decode(&longer).unwrap_err().to_string().contains("behind its end"));
}

#[test]
fn a_length_that_lies_costs_no_memory() {
    // A vector of 2^62 epochs.
    let mut bytes = hex::decode(format!("03000000{GROUP}0900000000000000")).unwrap();
    bytes.extend_from_slice(&(1u64 << 62).to_le_bytes());
    assert!(Message::decode(&bytes).is_err());
}

#[test]
fn what_does_not_fit_a_frame_is_not_made() {
    let body = vec![0; PAYLOAD_BYTES_MAX];
    let error = Message::Part { id: 1, answer: false, body }.to_frame().unwrap_err();
    assert!(error.to_string().contains("does not fit"), "{error}");
}

#[test]
fn any_bytes_are_read_without_a_panic() {
    let message = Message::Stream { group: G, stream: 9, from: 0x200 }.to_frame().unwrap();
    let mut conversation = hello().encode().to_vec();
    conversation.extend_from_slice(&message);
    for at in 0..conversation.len() {
        for value in [0x00, 0x01, 0x7f, 0xff] {
            let mut bytes = conversation.clone();
            bytes[at] = value;
            fuzz(&bytes);
            fuzz(&bytes[..at]);
        }
    }
}
