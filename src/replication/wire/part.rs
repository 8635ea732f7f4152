//! What an image frame carries: one part of an image. All integers are little-endian.
//!
//! | offset | size | field | meaning |
//! | ---: | ---: | --- | --- |
//! | 0 | 4 | `kind` | 1 control state, 2 data, 3 zeros, 4 the end |
//! | 4 | 4 | `volume` | of data and zeros: the volume's number; else zero |
//! | 8 | 8 | `offset` | of data and zeros: the first byte in the volume; of control state: in it |
//! | 16 | 8 | `length` | bytes of data or zeros; of control state: of all of it; of the end: zero |
//! | 24 | … | | control state: its bytes; data: a CRC-32 for each 4096 bytes, then the bytes |
//!
//! Parts come in the order: control state, data and zeros by volume and offset, the end. What no
//! part speaks of is as it was in the image that the receiver has.

use bytes::{BufMut, Bytes, BytesMut};

use crate::group::{ImagePart, Place};
use crate::units::{BLOCK_BYTES, VolumeNumber};

use super::{PAYLOAD_BYTES_MAX, WireError, wrong};

const HEAD_BYTES: usize = 24;
const CONTROL: u32 = 1;
const DATA: u32 = 2;
const ZEROS: u32 = 3;
const END: u32 = 4;

/// The bytes of a part, behind what is in `out` already.
///
/// # Panics
///
/// Where they would not fit a frame: no part is made that long.
pub fn encode_part(part: &ImagePart, out: &mut BytesMut) {
    let before = out.len();
    let mut head = |kind: u32, volume: u32, offset: u64, length: u64| {
        out.put_u32_le(kind);
        out.put_u32_le(volume);
        out.put_u64_le(offset);
        out.put_u64_le(length);
    };
    match part {
        ImagePart::Control { offset, total, bytes } => {
            head(CONTROL, 0, *offset, *total);
            out.put_slice(bytes);
        }
        ImagePart::Data { at, crcs, data } => {
            head(DATA, at.volume.0, at.offset, data.len() as u64);
            for crc in crcs {
                out.put_u32_le(*crc);
            }
            out.put_slice(data);
        }
        ImagePart::Zeros { at, length } => head(ZEROS, at.volume.0, at.offset, *length),
        ImagePart::End => head(END, 0, 0, 0),
    }
    assert!(out.len() - before <= PAYLOAD_BYTES_MAX, "a part of {} bytes", out.len() - before);
}

/// Reads a part that fills `bytes`. Places and checksums are checked by who stages it.
///
/// # Errors
///
/// Where the bytes are no part.
pub fn decode_part(bytes: &Bytes) -> Result<ImagePart, WireError> {
    let (head, _) =
        bytes.split_first_chunk::<HEAD_BYTES>().ok_or_else(|| wrong("image part: too short"))?;
    let half = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
    let rest = bytes.slice(HEAD_BYTES..);
    let (kind, length) = (half(0), word(16));
    let at = Place { volume: VolumeNumber(half(4)), offset: word(8) };
    let no_volume = at.volume == VolumeNumber(0);
    match kind {
        CONTROL if no_volume && !rest.is_empty() => {
            Ok(ImagePart::Control { offset: at.offset, total: length, bytes: rest })
        }
        DATA if length > 0 && length <= PAYLOAD_BYTES_MAX as u64 => {
            let sums = length.div_ceil(BLOCK_BYTES) as usize * 4;
            if !length.is_multiple_of(BLOCK_BYTES) || rest.len() != sums + length as usize {
                return Err(wrong(format!("image part: {} bytes for {length}", rest.len())));
            }
            let crcs = rest[..sums]
                .chunks_exact(4)
                .map(|crc| u32::from_le_bytes(crc.try_into().expect("four bytes")))
                .collect();
            Ok(ImagePart::Data { at, crcs, data: rest.slice(sums..) })
        }
        ZEROS if rest.is_empty() => Ok(ImagePart::Zeros { at, length }),
        END if rest.is_empty() && no_volume && at.offset == 0 && length == 0 => Ok(ImagePart::End),
        _ => Err(wrong(format!("image part: kind {kind} with {} bytes", rest.len()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(part: &ImagePart) -> Bytes {
        let mut bytes = BytesMut::new();
        encode_part(part, &mut bytes);
        bytes.freeze()
    }

    #[test]
    fn the_bytes_of_parts_are_these() {
        let at = Place { volume: VolumeNumber(2), offset: 0x3000 };
        let cases = [
            (
                ImagePart::Control { offset: 1, total: 3, bytes: Bytes::from_static(b"xy") },
                // kind, volume, offset, length, bytes
                "0100000000000000010000000000000003000000000000007879".to_owned(),
            ),
            (
                ImagePart::Data { at, crcs: vec![0x0403_0201], data: vec![7; 4096].into() },
                // kind, volume, offset, length, CRC-32, bytes
                format!(
                    "020000000200000000300000000000000010000000000000{}{}",
                    "01020304",
                    "07".repeat(4096)
                ),
            ),
            (
                ImagePart::Zeros { at, length: 0x4000 },
                "030000000200000000300000000000000040000000000000".to_owned(),
            ),
            (ImagePart::End, "040000000000000000000000000000000000000000000000".to_owned()),
        ];
        for (part, golden) in cases {
            let bytes = encoded(&part);
            assert_eq!(hex::encode(&bytes), golden);
            assert_eq!(decode_part(&bytes).unwrap(), part);
            for cut in 0..bytes.len().min(64) {
                let cut = decode_part(&bytes.slice(..cut));
                assert!(cut.is_err() || matches!(cut, Ok(ImagePart::Control { .. })));
            }
        }
    }

    #[test]
    fn parts_that_no_sender_makes_are_refused() {
        for bytes in [
            "050000000000000000000000000000000000000000000000",
            "040000000100000000000000000000000000000000000000",
            "0400000000000000000000000000000000000000000000000a",
            "020000000200000000300000000000000010000000000000",
            "0200000002000000003000000000000001000000000000000102030405",
            "02000000020000000030000000000000ffffffffffffffff",
        ] {
            let bytes = Bytes::from(hex::decode(bytes).unwrap());
            assert!(decode_part(&bytes).is_err(), "{bytes:?}");
        }
    }
}
