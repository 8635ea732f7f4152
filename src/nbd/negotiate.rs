//! An export for the kernel to go on with: the handshake alone, with simple replies, which are all
//! that the kernel understands; every wait is bounded.

use std::time::Duration;

use zerocopy::big_endian::U16;
use zerocopy::{FromBytes, IntoBytes};

use super::address::NbdAddress;
use super::client::{Client, ClientError};
use super::keepers::KeeperId;
use super::listener::connect_within;
use super::socket::Stream;
use super::wire::{InfoBlockSize, InfoExport, info, option, option_reply};

/// How long a server may take for the end of the old connection, and a primary that has just begun
/// for the answers of its peers.
const SUCCESSION_PATIENCE: Duration = Duration::from_secs(20);

/// What a server says of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// Bytes of the export.
    pub size_bytes: u64,
    /// The [`super::wire::export_flag`]s.
    pub flags: u16,
    /// The smallest request, where the server said so.
    pub block_bytes_min: Option<u32>,
    /// The line for people; empty where the server has none.
    pub description: String,
}

/// Chooses an export; each wait for the server ends after `patience`. The host names itself as
/// `keeper`, so that its earlier connection has ended when this returns; that may take the server
/// longer than `patience`.
///
/// # Errors
///
/// Where the server is not reached, breaks the protocol, or refuses, with its reason.
pub fn negotiate(
    address: &NbdAddress,
    name: &str,
    keeper: KeeperId,
    patience: Duration,
) -> Result<(Client<Stream>, Negotiated), ClientError> {
    let mut client = open(address, patience)?;
    client.send_option(option::KEEPER, &keeper)?;
    // A server of another make does not know it.
    client.option_reply(option::KEEPER)?;
    client
        .set_timeout(Some(patience.max(SUCCESSION_PATIENCE)))
        .map_err(|cause| client.io(cause))?;
    let negotiated = ask(&mut client, option::GO, name)?;
    client.set_timeout(None).map_err(|cause| client.io(cause))?;
    Ok((client, negotiated))
}

/// What a server says of an export, without choosing it.
///
/// # Errors
///
/// As [`negotiate`].
pub fn describe(
    address: &NbdAddress,
    name: &str,
    patience: Duration,
) -> Result<Negotiated, ClientError> {
    let mut client = open(address, patience)?;
    let negotiated = ask(&mut client, option::INFO, name)?;
    client.send_option(option::ABORT, &[])?;
    Ok(negotiated)
}

fn open(address: &NbdAddress, patience: Duration) -> Result<Client<Stream>, ClientError> {
    let failed = |cause| ClientError::Io { address: address.to_string(), cause };
    let stream = connect_within(address, patience).map_err(failed)?;
    let mut client = Client::bare(stream, &address.to_string());
    client.set_timeout(Some(patience)).map_err(|cause| client.io(cause))?;
    client.greet()?;
    Ok(client)
}

/// INFO or GO, with all that the server tells.
fn ask(client: &mut Client<Stream>, option: u32, name: &str) -> Result<Negotiated, ClientError> {
    let length = u32::try_from(name.len()).expect("names are short");
    let mut data = length.to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    let wanted = [info::DESCRIPTION, info::BLOCK_SIZE];
    data.extend_from_slice(U16::new(wanted.len() as u16).as_bytes());
    for kind in wanted {
        data.extend_from_slice(U16::new(kind).as_bytes());
    }
    client.send_option(option, &data)?;
    let mut export = None;
    let (mut block_bytes_min, mut description) = (None, String::new());
    loop {
        let (reply, data) = client.option_reply(option)?;
        match reply {
            option_reply::INFO => {
                match data.first_chunk::<2>().map(|kind| u16::from_be_bytes(*kind)) {
                    Some(info::EXPORT) => {
                        export = InfoExport::read_from_bytes(&data).ok();
                    }
                    Some(info::BLOCK_SIZE) => {
                        let sizes = InfoBlockSize::read_from_bytes(&data).ok();
                        block_bytes_min = sizes.map(|sizes| sizes.minimum.get());
                    }
                    Some(info::DESCRIPTION) => {
                        description = String::from_utf8_lossy(&data[2..]).into_owned();
                    }
                    _ => {}
                }
            }
            option_reply::ACK => break,
            _ => return Err(client.refused(name, &data)),
        }
    }
    let export = export.ok_or(ClientError::Protocol("the export was not described"))?;
    Ok(Negotiated {
        size_bytes: export.size_bytes.get(),
        flags: export.flags.get(),
        block_bytes_min,
        description,
    })
}
