//! What is agreed before the first request, and who is let in.

use std::sync::Arc;

use tidelog::nbd::wire::{Errno, command, export_flag, info, option, option_reply};
use tidelog::nbd::{
    Client, NbdAddress, NbdCounters, NbdLimits, NbdListen, RamDevice, RamExports, listen,
};

use super::rig::*;

#[test]
fn an_export_name_is_answered_with_and_without_padding() {
    let rig = Rig::new();
    for (flags, padding) in [(1u32, 124), (3, 0)] {
        let mut raw = Raw::connect(&rig.socket());
        raw.take(18);
        raw.put(&flags.to_be_bytes());
        raw.option(option::EXPORT_NAME, b"g/v");
        assert_eq!(raw.take(8), SIZE.to_be_bytes());
        let flags = raw.take(2);
        assert_eq!(u16::from_be_bytes([flags[0], flags[1]]) & export_flag::SEND_DF, 0);
        assert_eq!(raw.take(padding), vec![0; padding]);
        // Simple replies, since chunks were not agreed on.
        raw.request(command::READ, 0, 5, 0, 16);
        assert_eq!(raw.simple(), (0, 5));
        assert_eq!(raw.take(16), [0; 16]);
        raw.request(command::READ, 0, 6, SIZE, 16);
        assert_eq!(raw.simple(), (Errno::Einval.code(), 6));
    }
    let mut raw = rig.raw();
    raw.option(option::EXPORT_NAME, b"nothing");
    assert_eq!(raw.rest(), b"");
}

#[test]
fn unknown_and_malformed_options_leave_the_stream_in_step() {
    let rig = Rig::new();
    let mut raw = rig.raw();
    let refused = |raw: &mut Raw, option: u32, data: &[u8], expected: u32| {
        raw.option(option, data);
        let (reply, text) = raw.reply(option);
        assert_eq!(reply, expected, "option {option}");
        assert!(std::str::from_utf8(&text).is_ok_and(|text| !text.is_empty()));
    };
    refused(&mut raw, 4711, b"anything", option_reply::ERR_UNSUP);
    refused(&mut raw, 11, b"", option_reply::ERR_UNSUP);
    refused(&mut raw, option::STARTTLS, b"", option_reply::ERR_UNSUP);
    refused(&mut raw, 12, &vec![0; 70_000], option_reply::ERR_TOO_BIG);
    refused(&mut raw, option::LIST, b"x", option_reply::ERR_INVALID);
    refused(&mut raw, option::STRUCTURED_REPLY, b"x", option_reply::ERR_INVALID);
    refused(&mut raw, option::GO, b"", option_reply::ERR_INVALID);
    refused(&mut raw, option::GO, &[0xff; 12], option_reply::ERR_INVALID);
    refused(&mut raw, option::GO, &info_data("no/such", &[]), option_reply::ERR_UNKNOWN);
    refused(&mut raw, option::INFO, &info_data(&"x".repeat(5000), &[]), option_reply::ERR_TOO_BIG);
    let mut longer = info_data("g/v", &[info::NAME]);
    longer.push(0);
    refused(&mut raw, option::GO, &longer, option_reply::ERR_INVALID);
    let context = context_data("g/v", &["base:allocation"]);
    refused(&mut raw, option::SET_META_CONTEXT, &context, option_reply::ERR_INVALID);
    raw.option(option::GO, &info_data("g/v", &[]));
    assert_eq!(raw.reply(option::GO).0, option_reply::INFO);
    assert_eq!(raw.reply(option::GO).0, option_reply::ACK);
    raw.request(command::FLUSH, 0, 9, 0, 0);
    assert_eq!(raw.simple(), (0, 9));
}

#[test]
fn info_tells_what_was_asked_for() {
    let rig = Rig::new();
    let mut raw = rig.raw();
    let wanted = [info::BLOCK_SIZE, 99, info::NAME, info::DESCRIPTION];
    raw.option(option::INFO, &info_data("", &wanted));
    let (_, export) = raw.reply(option::INFO);
    assert_eq!(export[..10], [&[0, 0][..], &SIZE.to_be_bytes()].concat());
    assert_eq!(raw.reply(option::INFO).1, [&[0, 1][..], b"g/v"].concat());
    assert_eq!(raw.reply(option::INFO).1, [&[0, 2][..], b"memory"].concat());
    let sizes =
        [&[0, 3][..], &1u32.to_be_bytes(), &4096u32.to_be_bytes(), &(32u32 << 20).to_be_bytes()];
    assert_eq!(raw.reply(option::INFO).1, sizes.concat());
    assert_eq!(raw.reply(option::INFO).0, option_reply::ACK);
    raw.option(option::LIST, b"");
    for name in ["g/v", "g/v@image"] {
        let (reply, data) = raw.reply(option::LIST);
        assert_eq!(reply, option_reply::SERVER);
        assert_eq!(data[4..4 + name.len()], *name.as_bytes());
    }
    assert_eq!(raw.reply(option::LIST).0, option_reply::ACK);
    raw.option(option::ABORT, b"bye");
    assert_eq!(raw.reply(option::ABORT).0, option_reply::ACK);
    assert_eq!(raw.rest(), b"");
}

#[test]
fn metadata_contexts_are_listed_and_selected_for_one_export() {
    let rig = Rig::new();
    let mut raw = rig.raw();
    raw.option(option::STRUCTURED_REPLY, b"");
    raw.reply(option::STRUCTURED_REPLY);
    let contexts = |raw: &mut Raw, option: u32, queries: &[&str]| {
        raw.option(option, &context_data("g/v", queries));
        let mut found = Vec::new();
        loop {
            match raw.reply(option) {
                (option_reply::META_CONTEXT, data) => found.push(data[4..].to_vec()),
                (reply, _) => {
                    assert_eq!(reply, option_reply::ACK);
                    return found.len();
                }
            }
        }
    };
    assert_eq!(contexts(&mut raw, option::LIST_META_CONTEXT, &[]), 1);
    assert_eq!(contexts(&mut raw, option::LIST_META_CONTEXT, &["base:"]), 1);
    assert_eq!(contexts(&mut raw, option::LIST_META_CONTEXT, &["qemu:"]), 0);
    assert_eq!(contexts(&mut raw, option::SET_META_CONTEXT, &["base:allocation"]), 1);
    assert_eq!(contexts(&mut raw, option::SET_META_CONTEXT, &[]), 0);
    assert_eq!(contexts(&mut raw, option::SET_META_CONTEXT, &["base:"]), 0);
    assert_eq!(contexts(&mut raw, option::SET_META_CONTEXT, &["x", "base:allocation"]), 1);
    let many: Vec<&str> = vec!["x:y"; 200];
    raw.option(option::LIST_META_CONTEXT, &context_data("g/v", &many));
    assert_eq!(raw.reply(option::LIST_META_CONTEXT).0, option_reply::ERR_TOO_BIG);
    // A failed attempt forgets the selection, and another export does not inherit it.
    raw.option(option::SET_META_CONTEXT, b"x");
    assert_eq!(raw.reply(option::SET_META_CONTEXT).0, option_reply::ERR_INVALID);
    raw.option(option::GO, &info_data("g/v", &[]));
    raw.reply(option::GO);
    raw.reply(option::GO);
    raw.request(command::BLOCK_STATUS, 0, 1, 0, 4096);
    assert_eq!(raw.error(), (Errno::Einval.code(), 1));
}

#[test]
fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let open = || {
        let exports = Arc::new(RamExports(vec![Arc::new(RamDevice::new("v", 4096, false))]));
        let mut at = NbdListen::new(NbdAddress::Unix(path.clone()));
        at.mode = 0o600;
        listen(at, exports, NbdLimits::default(), Arc::default())
    };
    let server = open().unwrap();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let refusal = open().err().expect("a living server keeps its socket").to_string();
    assert!(refusal.contains("a server listens there"), "{refusal}");
    server.shutdown();
    std::fs::write(&path, "a file").unwrap();
    let refusal = open().err().expect("a file is not replaced").to_string();
    assert!(refusal.contains("no socket"), "{refusal}");
}

#[test]
fn tcp_clients_outside_of_the_allow_list_are_turned_away() {
    let exports = || Arc::new(RamExports(vec![Arc::new(RamDevice::new("v", 4096, false))]));
    let mut at = NbdListen::new("tcp:127.0.0.1:0".parse().unwrap());
    at.allow = vec!["192.0.2.0/24".parse().unwrap()];
    let counters = Arc::new(NbdCounters::default());
    let limits = NbdLimits::default();
    let closed = listen(at.clone(), exports(), limits.clone(), Arc::clone(&counters)).unwrap();
    assert!(Client::connect(closed.local_addr(), "v").is_err());
    assert_eq!(counters.refused_total.value(), 1);
    at.allow.push("127.0.0.0/8".parse().unwrap());
    let open = listen(at, exports(), limits, counters).unwrap();
    let mut client = Client::connect(open.local_addr(), "v").unwrap();
    client.write(0, &[1; 512]).unwrap();
    assert_eq!(Client::list(open.local_addr()).unwrap(), ["v"]);
}
