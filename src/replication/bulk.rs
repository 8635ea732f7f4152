//! Pieces of log and parts of images, which wait in a connection for their turn and are read then.

use std::sync::Arc;

use bytes::BytesMut;

use crate::group::ImagePart;
use crate::units::{GroupId, Lsn, Name};

use super::core::Input;
use super::replica::Replica;
use super::wire::part::encode_part;
use super::wire::{FRAME_HEADER_BYTES, FrameHeader, PAYLOAD_BYTES_MAX};

/// A frame of bulk that waits for its turn.
pub struct Waiting {
    /// The group.
    pub group: GroupId,
    /// The stream that asked for it.
    pub stream: u64,
    /// What it carries.
    pub bulk: Bulk,
}

/// What a frame of bulk carries.
pub enum Bulk {
    /// A range of the log.
    Log {
        /// From this position.
        from: Lsn,
        /// Up to this one.
        to: Lsn,
    },
    /// The next part of the image that a peer is sent.
    Part {
        /// The peer.
        peer: Name,
        /// Its number in the stream.
        number: u64,
    },
}

/// A frame that is to be sent.
pub struct Ready {
    /// Header and payload.
    pub frame: Vec<u8>,
    /// What is told once it was sent.
    pub sent: Input,
}

impl Waiting {
    /// Reads what the frame carries.
    ///
    /// # Errors
    ///
    /// What is to be told where that fails.
    pub fn read(self, replica: Option<Arc<dyn Replica>>) -> Result<Ready, Input> {
        let Waiting { group, stream, bulk } = self;
        let gone = "the group is gone".to_owned();
        match bulk {
            Bulk::Log { from, to } => {
                let bytes = to.bytes_since(from) as usize;
                assert!(bytes <= PAYLOAD_BYTES_MAX, "the core cuts frames");
                let failed = |reason| Input::ReadFailed { group, stream, reason };
                let replica = replica.ok_or_else(|| failed(gone))?;
                let mut frame = vec![0; FRAME_HEADER_BYTES + bytes];
                frame[..FRAME_HEADER_BYTES]
                    .copy_from_slice(&FrameHeader::log(group, stream, from, bytes).encode());
                replica
                    .read_log(from, &mut frame[FRAME_HEADER_BYTES..])
                    .map_err(|error| failed(error.to_string()))?;
                Ok(Ready { frame, sent: Input::Sent { group, stream } })
            }
            Bulk::Part { peer, number } => {
                let failed = |reason| Input::PartFailed { group, stream, reason };
                let replica = replica.ok_or_else(|| failed(gone))?;
                let part = replica.next_part(&peer, stream, number);
                let part = part.map_err(|error| failed(error.to_string()))?;
                let part = part.ok_or_else(|| failed("it has no more parts".to_owned()))?;
                let last = part == ImagePart::End;
                let mut frame = BytesMut::zeroed(FRAME_HEADER_BYTES);
                encode_part(&part, &mut frame);
                let bytes = frame.len() - FRAME_HEADER_BYTES;
                frame[..FRAME_HEADER_BYTES]
                    .copy_from_slice(&FrameHeader::image(group, stream, number, bytes).encode());
                let sent = Input::PartSent { group, stream, last };
                Ok(Ready { frame: frame.into(), sent })
            }
        }
    }
}
