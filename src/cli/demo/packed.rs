//! The ext4 image that is packed into the binary, with its holes put back.
//!
//! Layout (little-endian), made by scripts/make-demo-image: `TLIMAGE1`, size of the volume (8
//! bytes), then per run of sectors that are not zero: offset (8), length (8), bytes.

use anyhow::{Context, ensure};

const PACKED: &[u8] = include_bytes!("ext4.image");

/// Where the magic number of an ext4 superblock is.
const MAGIC_OFFSET: usize = 1024 + 56;

/// The image, whole.
///
/// # Errors
///
/// Where the packed bytes are not an image.
pub fn unpack() -> anyhow::Result<Vec<u8>> {
    unpack_from(PACKED).context("the packed ext4 image; run scripts/make-demo-image")
}

/// Whether bytes begin with an ext4 file system that was unmounted in order.
pub fn is_clean_ext4(image: &[u8]) -> bool {
    image.get(MAGIC_OFFSET..MAGIC_OFFSET + 4) == Some(&[0x53, 0xef, 0x01, 0x00])
}

fn unpack_from(packed: &[u8]) -> anyhow::Result<Vec<u8>> {
    let rest = packed.strip_prefix(b"TLIMAGE1").context("has another magic")?;
    let (size, mut rest) = number(rest)?;
    let mut image = vec![0; size];
    while !rest.is_empty() {
        let (offset, after) = number(rest)?;
        let (length, after) = number(after)?;
        let end = offset.checked_add(length).filter(|end| *end <= size);
        let target = image.get_mut(offset..end.context("a run ends past the image")?);
        ensure!(after.len() >= length, "a run is cut off");
        target.context("a run lies past the image")?.copy_from_slice(&after[..length]);
        rest = &after[length..];
    }
    Ok(image)
}

fn number(bytes: &[u8]) -> anyhow::Result<(usize, &[u8])> {
    let (value, rest) = bytes.split_first_chunk::<8>().context("a number is cut off")?;
    Ok((usize::try_from(u64::from_le_bytes(*value))?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packed_image_is_a_clean_ext4_and_small() {
        let image = unpack().unwrap();
        assert!(is_clean_ext4(&image));
        assert_eq!(image.len() % 4096, 0);
        assert!(PACKED.len() < 100 << 10, "{}", PACKED.len());
        let text = b"This file system came out of the tidelog binary";
        assert!(image.windows(text.len()).any(|window| window == text));
    }

    #[test]
    fn a_damaged_pack_is_an_error() {
        for cut in [0, 7, 12, 20, 31, PACKED.len() - 1] {
            assert!(unpack_from(&PACKED[..cut]).is_err(), "{cut}");
        }
        let mut moved = PACKED.to_vec();
        moved[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(unpack_from(&moved).is_err());
    }
}
