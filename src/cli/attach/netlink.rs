//! The kernel's generic netlink family `nbd`, as bytes: requests out, answers in, and nothing that
//! does I/O. Numbers are those of `linux/netlink.h`, `linux/genetlink.h` and `linux/nbd-netlink.h`.
//!
//! A message is a header (0 4 length; 4 2 kind; 6 2 flags; 8 4 sequence; 12 4 port), then for a
//! generic family (16 1 command; 17 1 version; 18 2 reserved), then attributes; an answer with an
//! error has a negative errno there instead (16 4). An attribute is (0 2 length; 2 2 type, its
//! highest bit set where it holds others; 4 the value), padded to 4 bytes. Integers are the
//! machine's own.

/// Bytes of a message's header.
const HEADER_BYTES: usize = 16;
/// Bytes of a generic family's header behind it.
const GENERIC_BYTES: usize = 4;
/// An error, or with errno 0 an acknowledgement.
const KIND_ERROR: u16 = 2;
/// A request that wants an acknowledgement.
const FLAGS_REQUEST_ACK: u16 = 1 | 4;
/// Set in the type of an attribute that holds attributes.
const NESTED: u16 = 1 << 15;

/// The family that tells the numbers of the others.
pub const CONTROL_FAMILY: u16 = 16;
const CONTROL_GET_FAMILY: u8 = 3;
mod control {
    pub const FAMILY_ID: u16 = 1;
    pub const FAMILY_NAME: u16 = 2;
    pub const MULTICAST_GROUPS: u16 = 7;
    pub const GROUP_NAME: u16 = 1;
    pub const GROUP_ID: u16 = 2;
}

/// Commands of the family `nbd`.
pub mod command {
    /// Make a device of sockets.
    pub const CONNECT: u8 = 1;
    /// End a device.
    pub const DISCONNECT: u8 = 2;
    /// Give a device another socket, size or timeout.
    pub const RECONFIGURE: u8 = 3;
    /// From the kernel: a device's last socket is dead.
    pub const LINK_DEAD: u8 = 4;
    /// Whether a device is connected.
    pub const STATUS: u8 = 5;
}

/// Attributes of the family `nbd`.
mod attribute {
    pub const INDEX: u16 = 1;
    pub const SIZE_BYTES: u16 = 2;
    pub const BLOCK_SIZE_BYTES: u16 = 3;
    pub const TIMEOUT: u16 = 4;
    pub const SERVER_FLAGS: u16 = 5;
    pub const SOCKETS: u16 = 7;
    pub const DEAD_CONN_TIMEOUT: u16 = 8;
    pub const DEVICE_LIST: u16 = 9;
    pub const BACKEND_IDENTIFIER: u16 = 10;
    /// Within [`SOCKETS`], and within [`DEVICE_LIST`].
    pub const ITEM: u16 = 1;
    pub const SOCKET_FD: u16 = 1;
    pub const DEVICE_CONNECTED: u16 = 2;
}

/// The name of the family, and of its group of those who are told of dead links.
const FAMILY: &str = "nbd";
const MULTICAST_GROUP: &str = "nbd_mc_group";

/// What the kernel is told of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// The N of `/dev/nbdN`.
    pub index: u32,
    /// Bytes of the device.
    pub size_bytes: Option<u64>,
    /// Bytes of a logical block.
    pub block_bytes: Option<u64>,
    /// Seconds after which a request without an answer makes its socket a dead one.
    pub timeout_seconds: Option<u64>,
    /// The export's flags.
    pub server_flags: Option<u64>,
    /// Seconds that requests wait for another socket.
    pub dead_timeout_seconds: Option<u64>,
    /// The connected socket.
    pub socket: Option<u32>,
    /// What the device is; a later command must say the same.
    pub backend: Option<String>,
}

/// Attributes under construction.
#[derive(Default)]
struct Attributes(Vec<u8>);

impl Attributes {
    fn put(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(4 + value.len()).expect("attributes are short");
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn put_text(&mut self, kind: u16, text: &str) {
        let mut value = text.as_bytes().to_vec();
        value.push(0);
        self.put(kind, &value);
    }

    fn put_u64(&mut self, kind: u16, value: Option<u64>) {
        if let Some(value) = value {
            self.put(kind, &value.to_ne_bytes());
        }
    }
}

fn message(family: u16, command: u8, sequence: u32, attributes: &Attributes) -> Vec<u8> {
    let length = HEADER_BYTES + GENERIC_BYTES + attributes.0.len();
    let mut bytes = Vec::with_capacity(length);
    bytes.extend_from_slice(&u32::try_from(length).expect("it is short").to_ne_bytes());
    bytes.extend_from_slice(&family.to_ne_bytes());
    bytes.extend_from_slice(&FLAGS_REQUEST_ACK.to_ne_bytes());
    bytes.extend_from_slice(&sequence.to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&[command, 1, 0, 0]);
    bytes.extend_from_slice(&attributes.0);
    bytes
}

/// Asks for the numbers of the family `nbd`.
pub fn get_family(sequence: u32) -> Vec<u8> {
    let mut attributes = Attributes::default();
    attributes.put_text(control::FAMILY_NAME, FAMILY);
    message(CONTROL_FAMILY, CONTROL_GET_FAMILY, sequence, &attributes)
}

/// One of [`command`] for a device, of the family `nbd` by its number.
pub fn request(family: u16, command: u8, sequence: u32, device: &Device) -> Vec<u8> {
    let mut attributes = Attributes::default();
    attributes.put(attribute::INDEX, &device.index.to_ne_bytes());
    attributes.put_u64(attribute::SIZE_BYTES, device.size_bytes);
    attributes.put_u64(attribute::BLOCK_SIZE_BYTES, device.block_bytes);
    attributes.put_u64(attribute::TIMEOUT, device.timeout_seconds);
    attributes.put_u64(attribute::SERVER_FLAGS, device.server_flags);
    attributes.put_u64(attribute::DEAD_CONN_TIMEOUT, device.dead_timeout_seconds);
    if let Some(socket) = device.socket {
        let (mut item, mut list) = (Attributes::default(), Attributes::default());
        item.put(attribute::SOCKET_FD, &socket.to_ne_bytes());
        list.put(attribute::ITEM | NESTED, &item.0);
        attributes.put(attribute::SOCKETS | NESTED, &list.0);
    }
    if let Some(backend) = &device.backend {
        attributes.put_text(attribute::BACKEND_IDENTIFIER, backend);
    }
    message(family, command, sequence, &attributes)
}

/// A message from the kernel.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer<'a> {
    /// The request with this sequence was carried out (0), or failed with this errno.
    Done {
        /// Of the request.
        sequence: u32,
        /// 0 or a positive errno.
        errno: i32,
    },
    /// A message of a family.
    Message {
        /// The family's number.
        family: u16,
        /// Of the request; 0 where there was none.
        sequence: u32,
        /// The family's command.
        command: u8,
        /// Its attributes.
        attributes: &'a [u8],
    },
}

/// The messages of a datagram; ends at the first that is no message.
pub fn answers(mut bytes: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let message = bytes.get(..length)?;
        let (kind, sequence) = (u16_at(message, 4)?, u32_at(message, 8)?);
        let answer = if kind == KIND_ERROR {
            let errno = u32_at(message, HEADER_BYTES)?.cast_signed();
            Answer::Done { sequence, errno: errno.checked_neg()? }
        } else {
            let command = *message.get(HEADER_BYTES)?;
            let attributes = message.get(HEADER_BYTES + GENERIC_BYTES..)?;
            Answer::Message { family: kind, sequence, command, attributes }
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(answer)
    })
}

/// The attributes (type, value) of a message or of an attribute.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & !NESTED;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, value))
    })
}

fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The numbers of the family `nbd` and of its multicast group, out of the control family's answer.
pub fn family(bytes: &[u8]) -> Option<(u16, u32)> {
    let id = u16_at(find(bytes, control::FAMILY_ID)?, 0)?;
    let group = attributes(find(bytes, control::MULTICAST_GROUPS)?)
        .find(|(_, group)| {
            find(group, control::GROUP_NAME).is_some_and(|name| {
                name.strip_suffix(b"\0").unwrap_or(name) == MULTICAST_GROUP.as_bytes()
            })
        })
        .and_then(|(_, group)| u32_at(find(group, control::GROUP_ID)?, 0))?;
    Some((id, group))
}

/// Whether the device that STATUS was asked for is connected.
pub fn connected(bytes: &[u8]) -> Option<bool> {
    let device = find(find(bytes, attribute::DEVICE_LIST)?, attribute::ITEM)?;
    Some(find(device, attribute::DEVICE_CONNECTED)?.first()? != &0)
}

/// The device that a message names.
pub fn index(bytes: &[u8]) -> Option<u32> {
    u32_at(find(bytes, attribute::INDEX)?, 0)
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;

    #[test]
    fn connect_has_these_bytes() {
        let device = Device {
            index: 3,
            size_bytes: Some(1 << 30),
            block_bytes: Some(512),
            timeout_seconds: Some(15),
            server_flags: Some(0x36d),
            dead_timeout_seconds: Some(3600),
            socket: Some(9),
            backend: Some("g/v".to_owned()),
        };
        #[rustfmt::skip]
        let golden = [
            // length, family, request | ack, sequence, port
            112, 0, 0, 0,  0x1c, 0,  5, 0,  7, 0, 0, 0,  0, 0, 0, 0,
            // CONNECT, version, reserved
            1, 1, 0, 0,
            // index
            8, 0, 1, 0,  3, 0, 0, 0,
            // size
            12, 0, 2, 0,  0, 0, 0, 0x40, 0, 0, 0, 0,
            // block size
            12, 0, 3, 0,  0, 2, 0, 0, 0, 0, 0, 0,
            // timeout
            12, 0, 4, 0,  15, 0, 0, 0, 0, 0, 0, 0,
            // server flags
            12, 0, 5, 0,  0x6d, 3, 0, 0, 0, 0, 0, 0,
            // dead connection timeout
            12, 0, 8, 0,  0x10, 0x0e, 0, 0, 0, 0, 0, 0,
            // sockets, item, descriptor
            16, 0, 7, 0x80,  12, 0, 1, 0x80,  8, 0, 1, 0,  9, 0, 0, 0,
            // backend identifier
            8, 0, 10, 0,  b'g', b'/', b'v', 0,
        ];
        assert_eq!(request(0x1c, command::CONNECT, 7, &device), golden);
        let other = Device { index: 3, ..Device::default() };
        #[rustfmt::skip]
        let golden = [
            28, 0, 0, 0,  0x1c, 0,  5, 0,  8, 0, 0, 0,  0, 0, 0, 0,  5, 1, 0, 0,
            8, 0, 1, 0,  3, 0, 0, 0,
        ];
        assert_eq!(request(0x1c, command::STATUS, 8, &other), golden);
    }

    #[test]
    fn the_family_is_asked_for_and_read() {
        #[rustfmt::skip]
        let golden = [
            28, 0, 0, 0,  16, 0,  5, 0,  1, 0, 0, 0,  0, 0, 0, 0,  3, 1, 0, 0,
            8, 0, 2, 0,  b'n', b'b', b'd', 0,
        ];
        assert_eq!(get_family(1), golden);
        let (mut group, mut groups, mut all) =
            (Attributes::default(), Attributes::default(), Attributes::default());
        group.put(control::GROUP_ID, &5u32.to_ne_bytes());
        group.put_text(control::GROUP_NAME, "nbd_mc_group");
        groups.put(1, &[8, 0, 2, 0, 0, 0, 0, 0]);
        groups.put(2 | NESTED, &group.0);
        all.put_text(control::FAMILY_NAME, "nbd");
        all.put(control::FAMILY_ID, &0x1cu16.to_ne_bytes());
        all.put(control::MULTICAST_GROUPS | NESTED, &groups.0);
        assert_eq!(family(&all.0), Some((0x1c, 5)));
    }

    #[test]
    fn answers_are_read_and_what_is_cut_off_is_none() {
        #[rustfmt::skip]
        let bytes = [
            // LINK_DEAD of device 3
            28, 0, 0, 0,  0x1c, 0,  0, 0,  0, 0, 0, 0,  0, 0, 0, 0,  4, 1, 0, 0,
            8, 0, 1, 0,  3, 0, 0, 0,
            // STATUS of device 3
            44, 0, 0, 0,  0x1c, 0,  0, 0,  8, 0, 0, 0,  0, 0, 0, 0,  5, 1, 0, 0,
            24, 0, 9, 0x80,  20, 0, 1, 0x80,  8, 0, 1, 0,  3, 0, 0, 0,  5, 0, 2, 0,  1, 0, 0, 0,
            // EBUSY
            36, 0, 0, 0,  2, 0,  0, 0,  9, 0, 0, 0,  0, 0, 0, 0,  0xf0, 0xff, 0xff, 0xff,
            28, 0, 0, 0,  0x1c, 0,  5, 0,  9, 0, 0, 0,  0, 0, 0, 0,
        ];
        let all: Vec<Answer<'_>> = answers(&bytes).collect();
        let [dead, status, busy] = &all[..] else { panic!("{all:?}") };
        let Answer::Message { command: command::LINK_DEAD, attributes, .. } = dead else {
            panic!("{dead:?}")
        };
        assert_eq!(index(attributes), Some(3));
        let Answer::Message { command: command::STATUS, attributes, .. } = status else {
            panic!("{status:?}")
        };
        assert_eq!(connected(attributes), Some(true));
        assert_eq!(*busy, Answer::Done { sequence: 9, errno: 16 });
        for length in 0..bytes.len() {
            for answer in answers(&bytes[..length]) {
                if let Answer::Message { attributes, .. } = answer {
                    let _ = (index(attributes), connected(attributes), family(attributes));
                }
            }
        }
    }
}
