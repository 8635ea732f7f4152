//! Clients that misbehave, vanish or flood: nobody else suffers, and nothing panics.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tidelog::nbd::fuzz::{converse, fuzz_client, fuzz_handshake, fuzz_transmission, opening};
use tidelog::nbd::wire::{self, command, command_flag, option};
use tidelog::nbd::{
    Client, NbdAddress, NbdCounters, NbdLimits, NbdListen, RamDevice, RamExports, listen, negotiate,
};
use zerocopy::IntoBytes;

use super::rig::*;

#[test]
fn a_client_that_never_reads_its_flushes_holds_up_nobody() {
    let rig = Rig::new();
    rig.device.hold_flushes();
    let mut greedy = rig.session();
    let flush = wire::request(command::FLUSH, 0, 1, 0, 0);
    let many: Vec<u8> = flush.as_bytes().repeat(10_000);
    let mut writer = greedy.0.try_clone().unwrap();
    writer.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    // The server stops reading at its limit, so that not all of it fits.
    let mut sent = 0;
    for _ in 0..20 {
        match writer.write_all(&many) {
            Ok(()) => sent += 10_000,
            Err(_) => break,
        }
    }
    assert!(sent < 200_000, "the server took {sent} flushes of which none was answered");
    let mut other = rig.client("g/v");
    other.write(0, &[1; 4096]).unwrap();
    let mut back = [0; 4096];
    other.read(0, &mut back).unwrap();
    assert_eq!(back, [1; 4096]);
    // Completing them does not wait for the greedy client either.
    assert!(rig.device.complete_flushes(&Ok(())) > 0);
    assert_eq!(greedy.simple(), (0, 1));
}

#[test]
fn what_is_no_request_ends_only_its_own_connection() {
    let rig = Rig::new();
    let mut good = rig.client("g/v");
    let mut bad = rig.session();
    bad.request(command::WRITE, 0, 1, 0, 512);
    bad.put(&[9; 512]);
    bad.put(b"this is not an NBD request at all");
    let mut expected = wire::simple_reply(1, None).as_bytes().to_vec();
    expected.truncate(16);
    assert_eq!(bad.rest(), expected, "the write before it is answered");
    let mut back = [0; 512];
    good.read(0, &mut back).unwrap();
    assert_eq!(back, [9; 512]);
    let mut worse = Raw::connect(&rig.socket());
    worse.take(18);
    worse.put(&0xffff_ffffu32.to_be_bytes());
    assert_eq!(worse.rest(), b"", "unknown client flags end the connection");
    let mut worst = rig.raw();
    worst.put(&[0x55; 16]);
    assert_eq!(worst.rest(), b"", "another magic ends the connection");
    good.flush().unwrap();
}

#[test]
fn a_flood_of_options_is_cut_off() {
    let rig = Rig::new();
    let mut raw = rig.raw();
    let mut option = Vec::new();
    wire::put_option(&mut option, 99, b"");
    let mut writer = raw.0.try_clone().unwrap();
    let flood = std::thread::spawn(move || {
        for _ in 0..100_000 {
            if writer.write_all(&option).is_err() {
                return true;
            }
        }
        false
    });
    let mut bytes = Vec::new();
    let _ = raw.0.read_to_end(&mut bytes);
    assert!(flood.join().unwrap(), "100,000 options were taken");
    rig.client("g/v").flush().unwrap();
}

#[test]
fn a_slow_handshake_is_given_up() {
    let limits = NbdLimits { handshake_timeout: Duration::from_millis(50), ..NbdLimits::default() };
    let rig = Rig::with(limits);
    let mut raw = Raw::connect(&rig.socket());
    raw.take(18);
    raw.put(&[0, 0]);
    assert_eq!(raw.rest(), b"");
    let mut patient = rig.client("g/v");
    patient.flush().unwrap();
}

#[test]
fn a_client_that_never_reads_in_the_handshake_is_given_up() {
    let limits =
        NbdLimits { handshake_timeout: Duration::from_millis(200), ..NbdLimits::default() };
    let devices = (0..1000).map(|n| Arc::new(RamDevice::new(&format!("g/v{n}"), 512, true)));
    let exports = Arc::new(RamExports(devices.collect()));
    let dir = tempfile::tempdir().unwrap();
    let counters = Arc::new(NbdCounters::default());
    let unix = NbdAddress::Unix(dir.path().join("s"));
    for (turn, address) in (1..).zip([unix, NbdAddress::Tcp("127.0.0.1:0".to_owned())]) {
        let listen_on = NbdListen::new(address);
        let server =
            listen(listen_on, exports.clone(), limits.clone(), Arc::clone(&counters)).unwrap();
        let mut asked = 3u32.to_be_bytes().to_vec();
        for _ in 0..256 {
            wire::put_option(&mut asked, option::LIST, b"");
        }
        // 256 lists of 34 kB: more than a socket's buffers hold.
        let client: Box<dyn Send> = match server.local_addr() {
            NbdAddress::Unix(path) => {
                let mut client = UnixStream::connect(path).unwrap();
                client.write_all(&asked).unwrap();
                Box::new(client)
            }
            NbdAddress::Tcp(at) => {
                let mut client = TcpStream::connect(at.as_str()).unwrap();
                client.write_all(&asked).unwrap();
                Box::new(client)
            }
        };
        crate::support::wait_for("the client to come and to be given up", || {
            let came = counters.connections_total.value() == turn;
            (came && counters.connections.value() == 0).then_some(())
        });
        drop(client);
        server.shutdown();
    }
}

#[test]
fn connections_above_the_limit_are_closed_and_room_is_found_again() {
    let rig = Rig::with(NbdLimits { connections: 2, ..NbdLimits::default() });
    let one = rig.client("g/v");
    let _two = rig.client("g/v");
    assert_eq!(Raw::connect(&rig.socket()).rest(), b"");
    assert_eq!(rig.counters.refused_total.value(), 1);
    one.disconnect().unwrap();
    crate::support::wait_for("room", || (rig.counters.connections.value() == 1).then_some(()));
    rig.client("g/v").flush().unwrap();
}

#[test]
fn all_listeners_of_a_node_have_one_limit() {
    let limits = NbdLimits { connections: 2, ..NbdLimits::default() };
    let rig = Rig::with(limits.clone());
    let exports = Arc::new(RamExports(vec![Arc::clone(&rig.device)]));
    let other = NbdAddress::Unix(rig.dir.path().join("other"));
    let counters = Arc::clone(&rig.counters);
    let _server = listen(NbdListen::new(other.clone()), exports, limits, counters).unwrap();
    let _one = rig.client("g/v");
    let two = Client::connect(&other, "g/v").unwrap();
    for path in [rig.socket(), rig.dir.path().join("other")] {
        assert_eq!(Raw::connect(&path).rest(), b"");
    }
    two.disconnect().unwrap();
    crate::support::wait_for("room", || (rig.counters.connections.value() == 1).then_some(()));
    rig.client("g/v").flush().unwrap();
}

#[test]
fn every_cut_of_a_conversation_ends_it_and_harms_nobody() {
    let mut whole = opening();
    for (command, flags, offset, length) in [
        (command::WRITE, 0, 0, 700),
        (command::READ, 0, 0, 700),
        (command::WRITE, command_flag::FUA, 4096, 512),
        (command::WRITE_ZEROES, command_flag::NO_HOLE, 0, 512),
        (command::TRIM, 0, 512, 512),
        (command::CACHE, 0, 0, 4096),
        (command::BLOCK_STATUS, 0, 0, 65536),
        (command::FLUSH, 0, 0, 0),
        (command::DISC, 0, 0, 0),
    ] {
        let cookie = whole.len() as u64;
        whole.extend_from_slice(wire::request(command, flags, cookie, offset, length).as_bytes());
        if command == command::WRITE {
            whole.extend_from_slice(&vec![0xab; length as usize]);
        }
    }
    // One request at a time, the replies come in order; all at once, reads come last.
    let in_order = converse(&whole, 1);
    let together = converse(&whole, usize::MAX);
    assert_eq!(in_order.len(), together.len());
    for cut in 0..whole.len() {
        let sent = converse(&whole[..cut], 1);
        assert!(in_order.starts_with(&sent), "cut at {cut}");
        assert!(converse(&whole[..cut], usize::MAX).len() == sent.len(), "cut at {cut}");
    }

    // The same over a real socket, beside a client that must not notice.
    let rig = Rig::new();
    let mut good = rig.client("g/v");
    good.write(1 << 20, &[3; 4096]).unwrap();
    for cut in (0..whole.len()).step_by(3) {
        let mut raw = Raw::connect(&rig.socket());
        raw.put(&whole[..cut]);
        raw.0.shutdown(std::net::Shutdown::Write).unwrap();
        let sent = raw.rest();
        assert!(sent.len() >= 18, "cut at {cut}");
    }
    let mut back = [0; 4096];
    good.read(1 << 20, &mut back).unwrap();
    assert_eq!(back, [3; 4096]);
    rig.wait_for_clients(1);
}

#[test]
fn a_shutdown_answers_what_was_received_and_lets_nobody_in() {
    let mut rig = Rig::new();
    rig.device.hold_flushes();
    let mut raw = rig.session();
    raw.request(command::WRITE, 0, 1, 0, 512);
    raw.put(&[1; 512]);
    raw.request(command::FLUSH, 0, 2, 0, 0);
    assert_eq!(raw.simple(), (0, 1));
    let server = rig.server.take().unwrap();
    let ended = std::thread::spawn(move || server.shutdown());
    crate::support::wait_for("the listener to close", || {
        UnixStream::connect(rig.socket()).err().map(|_| ())
    });
    crate::support::wait_for("the shutdown to end", || {
        rig.device.complete_flushes(&Ok(()));
        ended.is_finished().then_some(())
    });
    ended.join().unwrap();
    let rest = raw.rest();
    let flushed = wire::simple_reply(2, None).as_bytes().to_vec();
    // Where the flush came after the shutdown, the connection ends without a reply: an error would
    // be a failed write to a kernel.
    assert!(rest == flushed || rest.is_empty(), "{rest:?}");
    assert!(!rig.socket().exists(), "the socket's name is gone");
}

#[test]
fn a_client_that_closed_its_half_still_gets_the_replies_that_come_late() {
    let rig = Rig::new();
    rig.device.hold_flushes();
    let mut raw = rig.session();
    raw.request(command::FLUSH, 0, 1, 0, 0);
    raw.0.shutdown(std::net::Shutdown::Write).unwrap();
    crate::support::wait_for("the flush to arrive", || {
        (rig.device.complete_flushes(&Ok(())) > 0).then_some(())
    });
    assert_eq!(raw.rest(), wire::simple_reply(1, None).as_bytes());
}

#[test]
fn a_payload_that_drips_in_is_given_up() {
    let payload_timeout = Duration::from_secs(2);
    let rig = Rig::with(NbdLimits { payload_timeout, ..NbdLimits::default() });
    // 600 KiB may take 2.6 s; what is sent at once is not cut.
    let mut honest = rig.client("g/v");
    honest.write(0, &[1; 600 << 10]).unwrap();
    let mut slow = rig.session();
    slow.request(command::WRITE, 0, 1, 0, 600 << 10);
    crate::support::wait_for("the server to give it up", || slow.0.write_all(&[2]).err());
    honest.write(0, &[1; 600 << 10]).unwrap();
    rig.wait_for_clients(1);
    assert_eq!(rig.device.content()[..600 << 10], [1; 600 << 10], "none of it was written");
}

/// The old connection stood where a large payload waits for memory, and could not be cut there.
#[test]
fn a_new_connection_ends_an_old_one_whose_payload_waits_for_memory() {
    const LARGEST: u32 = wire::PAYLOAD_BYTES_MAX;
    let limits = NbdLimits { payload_bytes: u64::from(LARGEST), ..NbdLimits::default() };
    let rig = Rig::of(u64::from(LARGEST), limits);
    let mut holder = rig.session();
    holder.request(command::WRITE, 0, 1, 0, LARGEST);
    // More than the server takes in before it has the memory.
    holder.put(&vec![1; 4 << 20]);
    let connect = || {
        let at = NbdAddress::Unix(rig.socket());
        let patience = Duration::from_secs(30);
        let client = negotiate(&at, "g/v", [1; 16], patience).unwrap().0;
        UnixStream::from(client.into_socket().unwrap())
    };
    let mut old = connect();
    let request = wire::request(command::WRITE, 0, 1, 0, LARGEST);
    old.write_all(&[request.as_bytes(), &[2; 4096]].concat()).unwrap();
    let _new = connect();
    assert_eq!(old.read(&mut [0]).unwrap(), 0, "no answer, and the end");
    holder.put(&vec![1; LARGEST as usize - (4 << 20)]);
    assert_eq!(holder.simple(), (0, 1));
}

#[test]
fn fuzz_bodies_survive_their_corpora() {
    let mut replayed = 0;
    for (target, body) in [
        ("nbd_handshake", fuzz_handshake as fn(&[u8])),
        ("nbd_transmission", fuzz_transmission),
        ("nbd_client", fuzz_client),
    ] {
        // Structured inputs with every byte broken once, besides what was checked in.
        let base: Vec<u8> = match target {
            "nbd_client" => converse(&opening(), usize::MAX),
            "nbd_handshake" => [&[200][..], &opening()].concat(),
            _ => {
                let write = wire::request(command::WRITE, 0, 1, 0, 16);
                let read = wire::request(command::READ, 0, 2, 0, 512);
                [&[200][..], write.as_bytes(), &[1; 16], read.as_bytes()].concat()
            }
        };
        body(&base);
        for at in 0..base.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut broken = base.clone();
                broken[at] = value;
                body(&broken);
                replayed += 1;
            }
        }
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        for entry in std::fs::read_dir(corpus).into_iter().flatten() {
            body(&std::fs::read(entry.unwrap().path()).unwrap());
            replayed += 1;
        }
    }
    assert!(replayed > 500, "{replayed} inputs");
}
