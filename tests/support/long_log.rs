//! A group whose log is long, or at its limit.

use tidelog::nbd::{ClientError, Errno};

use super::Appliance;
use super::load::{client, create_volumes};

/// Bytes of the volume that makes a log long.
pub const LARGE_BYTES: u64 = 192 << 20;
/// Bytes that no log of these tests can hold without being folded.
pub const OUTRUN_BYTES: u64 = 288 << 20;

/// A group with the least log that there is, the volumes of a load, and a large one.
pub fn make_group(a: &Appliance) {
    a.run(&["group", "create", "g"]);
    a.run(&["group", "set", "g", "log_limit=256M"]);
    create_volumes(a);
    a.run(&["volume", "create", "g/large", "--size", &LARGE_BYTES.to_string()]);
}

/// Writes a mebibyte after the other, until one is refused or all are written.
pub fn write_until_refused(node: &Appliance, bytes: u64) -> Result<(), Errno> {
    let mut client = client(node, "large");
    for part in 0..bytes >> 20 {
        let data: Vec<u8> =
            (0..1u64 << 17).flat_map(|word| (word * (part + 1)).to_le_bytes()).collect();
        match client.write((part << 20) % LARGE_BYTES, &data) {
            Ok(()) => {}
            Err(ClientError::Request { errno, .. }) => return Err(errno),
            Err(error) => panic!("{error}"),
        }
    }
    client.flush().map_err(|error| match error {
        ClientError::Request { errno, .. } => errno,
        error => panic!("{error}"),
    })
}

/// All of the large volume, or of an image of it (`large@IMAGE`).
pub fn read_large(node: &Appliance, volume: &str) -> Vec<u8> {
    let mut client = client(node, volume);
    let mut bytes = vec![0; usize::try_from(LARGE_BYTES).unwrap()];
    for (part, bytes) in bytes.chunks_mut(1 << 20).enumerate() {
        client.read((part as u64) << 20, bytes).unwrap();
    }
    bytes
}
