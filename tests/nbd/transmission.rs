//! Requests and their replies.

use std::sync::Arc;

use tidelog::group::{Allocation, GroupError};
use tidelog::nbd::wire::{self, Errno, chunk, command, command_flag};
use tidelog::nbd::{
    Client, ClientError, NbdAddress, NbdLimits, NbdListen, RamDevice, RamExports, listen,
};
use zerocopy::IntoBytes;

use super::rig::*;

#[test]
fn the_client_reads_back_what_it_wrote() {
    let rig = Rig::new();
    let mut client = rig.client("g/v");
    assert_eq!(client.size_bytes(), SIZE);
    let data: Vec<u8> = (0..700_000u32).map(|n| (n % 251) as u8).collect();
    client.write(511, &data).unwrap();
    client.flush().unwrap();
    let mut back = vec![0; data.len()];
    client.read(511, &mut back).unwrap();
    assert!(back == data);
    client.write_zeroes(0, 4096).unwrap();
    client.trim(8192, 4096).unwrap();
    client.write_fua(4096, &[7; 4096]).unwrap();
    let extents = client.extents(0, 16384).unwrap();
    let kinds: Vec<_> = extents.iter().map(|extent| (extent.length, extent.allocation)).collect();
    let expected = [
        (4096, Allocation::Hole),
        (4096, Allocation::Data),
        (4096, Allocation::Hole),
        (4096, Allocation::Data),
    ];
    assert_eq!(kinds, expected);
    client.disconnect().unwrap();
    rig.wait_for_clients(0);
    assert_eq!(rig.device.content()[4096..8192], [7; 4096]);
}

#[test]
fn a_large_write_and_a_large_read_pass_in_bounded_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let device = Arc::new(RamDevice::new("big", 40 << 20, false));
    let exports = Arc::new(RamExports(vec![Arc::clone(&device)]));
    let at = NbdListen::new(NbdAddress::Unix(dir.path().join("s")));
    let _server = listen(at.clone(), exports, NbdLimits::default(), Arc::default()).unwrap();
    let mut client = Client::connect(&at.address, "").unwrap();
    let data: Vec<u8> = (0..32 << 20).map(|n: u32| (n.wrapping_mul(31) >> 7) as u8).collect();
    client.write(1 << 20, &data).unwrap();
    assert!(device.content()[1 << 20..33 << 20] == data);
    let mut back = vec![0; data.len()];
    client.read(1 << 20, &mut back).unwrap();
    assert!(back == data);
}

#[test]
fn block_status_holds_to_one_descriptor_where_asked() {
    let rig = Rig::new();
    let mut client = rig.client("g/v");
    client.write(4096, &[1; 4096]).unwrap();
    let mut raw = rig.session();
    let descriptors = |payload: &[u8]| -> Vec<(u32, u32)> {
        assert_eq!(payload[..4], wire::allocation::CONTEXT.to_be_bytes());
        payload[4..]
            .chunks(8)
            .map(|run| {
                let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
                (number(&run[..4]), number(&run[4..]))
            })
            .collect()
    };
    raw.request(command::BLOCK_STATUS, command_flag::REQ_ONE, 1, 0, SIZE as u32);
    let (flags, kind, cookie, payload) = raw.chunk();
    assert_eq!((flags, kind, cookie), (1, chunk::BLOCK_STATUS, 1));
    assert_eq!(descriptors(&payload), [(4096, 3)]);
    raw.request(command::BLOCK_STATUS, 0, 2, 0, SIZE as u32);
    let all = descriptors(&raw.chunk().3);
    assert_eq!(all, [(4096, 3), (4096, 0), (SIZE as u32 - 8192, 3)]);
}

#[test]
fn refused_requests_leave_the_stream_in_step() {
    let rig = Rig::new();
    let mut raw = rig.session();
    // A payload above the limit is read past, whatever its size, and so is one beyond the end.
    raw.request(command::WRITE, 0, 1, 0, (32 << 20) + 4096);
    raw.put(&vec![0xee; (32 << 20) + 4096]);
    assert_eq!(raw.error(), (Errno::Einval.code(), 1));
    raw.request(command::WRITE, 0, 2, SIZE - 512, 1024);
    raw.put(&[0xee; 1024]);
    assert_eq!(raw.error(), (Errno::Enospc.code(), 2));
    raw.request(command::WRITE, command_flag::DF, 3, 0, 1024);
    raw.put(&[0xee; 1024]);
    assert_eq!(raw.error(), (Errno::Einval.code(), 3));
    raw.request(77, 0, 4, 0, 0);
    assert_eq!(raw.error(), (Errno::Einval.code(), 4));
    raw.request(command::READ, 0, 5, 0, 0);
    assert_eq!(raw.chunk(), (chunk::FLAG_DONE, chunk::NONE, 5, Vec::new()));
    raw.request(command::WRITE, 0, 6, SIZE, 0);
    assert_eq!(raw.simple(), (0, 6));
    raw.request(command::CACHE, 0, 7, 0, SIZE as u32);
    assert_eq!(raw.simple(), (0, 7));
    assert!(rig.device.content().iter().all(|byte| *byte == 0));

    let mut image = rig.client("g/v@image");
    assert!(image.is_read_only());
    let refusal = image.write(0, &[1; 512]).unwrap_err();
    assert!(matches!(refusal, ClientError::Request { errno: Errno::Eperm, .. }), "{refusal}");
    image.flush().unwrap();
    image.read(0, &mut [0; 512]).unwrap();
}

#[test]
fn a_read_behind_a_write_sees_it_in_the_same_wake_up() {
    let rig = Rig::new();
    let mut raw = rig.session();
    let mut bytes = Vec::new();
    for index in 0..20u64 {
        let offset = index * 512;
        bytes.extend_from_slice(wire::request(command::WRITE, 0, index, offset, 512).as_bytes());
        bytes.extend_from_slice(&[index as u8 + 1; 512]);
        bytes.extend_from_slice(
            wire::request(command::READ, 0, 100 + index, offset, 512).as_bytes(),
        );
    }
    raw.put(&bytes);
    let (mut writes, mut reads) = (0, 0);
    while writes + reads < 40 {
        match raw.u32() {
            wire::SIMPLE_REPLY_MAGIC => {
                let rest = raw.take(12);
                assert_eq!(rest[..4], [0; 4]);
                writes += 1;
            }
            wire::CHUNK_MAGIC => {
                let rest = raw.take(16 + 8 + 512);
                let cookie = u64::from_be_bytes(rest[4..12].try_into().unwrap());
                assert_eq!(rest[24..], [(cookie - 100) as u8 + 1; 512]);
                reads += 1;
            }
            other => panic!("magic {other:#x}"),
        }
    }
    assert_eq!((writes, reads), (20, 20));
}

#[test]
fn the_connection_goes_on_while_a_flush_waits() {
    let rig = Rig::new();
    rig.device.hold_flushes();
    let mut raw = rig.session();
    raw.request(command::WRITE, 0, 1, 0, 512);
    raw.put(&[5; 512]);
    assert_eq!(raw.simple(), (0, 1));
    raw.request(command::FLUSH, 0, 2, 0, 0);
    raw.request(command::WRITE, command_flag::FUA, 3, 512, 512);
    raw.put(&[6; 512]);
    raw.request(command::READ, 0, 4, 0, 512);
    // The read is answered although flush and FUA are not.
    let (_, kind, cookie, payload) = raw.chunk();
    assert_eq!((kind, cookie), (chunk::OFFSET_DATA, 4));
    assert_eq!(payload[8..], [5; 512]);
    crate::support::wait_for("the flushes to arrive", || {
        (rig.device.complete_flushes(&Ok(())) > 0).then_some(())
    });
    let mut late = [raw.simple(), (0, 0)];
    crate::support::wait_for("the rest of them", || {
        rig.device.complete_flushes(&Ok(()));
        raw.has_more().then_some(())
    });
    late[1] = raw.simple();
    late.sort_unstable();
    assert_eq!(late, [(0, 2), (0, 3)]);
}

#[test]
fn a_failed_sync_is_an_error_of_every_flush_that_waited() {
    let rig = Rig::new();
    rig.device.hold_flushes();
    let mut raw = rig.session();
    let both =
        [wire::request(command::FLUSH, 0, 1, 0, 0), wire::request(command::FLUSH, 0, 2, 0, 0)];
    raw.put(both.as_bytes());
    let failed = Err(GroupError::Io {
        group: "g".parse().unwrap(),
        what: "sync".to_owned(),
        cause: "the disk is gone".to_owned(),
    });
    for _ in 0..2 {
        crate::support::wait_for("a flush to arrive or its reply", || {
            rig.device.complete_flushes(&failed);
            raw.has_more().then_some(())
        });
        assert_eq!(raw.error().0, Errno::Eio.code());
    }
}
