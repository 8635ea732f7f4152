//! A small file that proves itself: a line with the checksum of what follows, and that.
//!
//! ```text
//! MAGIC 1 <xxh3-64 of the rest, 16 hexadecimal digits> <its bytes>
//! …
//! ```

use xxhash_rust::xxh3::xxh3_64;

const VERSION: &str = "1";

fn line(magic: &str, content: &[u8]) -> String {
    format!("{magic} {VERSION} {:016x} {}", xxh3_64(content), content.len())
}

/// The bytes of such a file.
#[must_use]
pub fn seal(magic: &str, content: &[u8]) -> Vec<u8> {
    let mut file = line(magic, content).into_bytes();
    file.push(b'\n');
    file.extend_from_slice(content);
    file
}

/// What is in such a file.
///
/// # Errors
///
/// Why it is not what was written.
pub fn unseal<'a>(magic: &str, file: &'a [u8]) -> Result<&'a [u8], String> {
    let end = file.iter().position(|byte| *byte == b'\n').ok_or("no first line")?;
    let first = std::str::from_utf8(&file[..end]).map_err(|_| "the first line is not text")?;
    let content = &file[end + 1..];
    let found = line(magic, content);
    match first.split(' ').collect::<Vec<_>>()[..] {
        [name, VERSION, _, _] if name == magic && first == found => Ok(content),
        [name, VERSION, ..] if name == magic => {
            Err(format!("checksum: got `{first}`, expected `{found}`"))
        }
        [name, version, ..] if name == magic => {
            Err(format!("version: got {version}, expected {VERSION}"))
        }
        _ => Err(format!("the first line is not `{magic} …`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_file_is_these_bytes_and_every_changed_byte_and_cut_is_noticed() {
        let file = seal("tidelog-test", b"{\"one\":1}");
        let golden = "tidelog-test 1 4f1ec368611e184f 9\n{\"one\":1}";
        assert_eq!(String::from_utf8(file.clone()).unwrap(), golden);
        assert_eq!(unseal("tidelog-test", &file), Ok(&b"{\"one\":1}"[..]));
        assert!(unseal("tidelog-other", &file).unwrap_err().contains("tidelog-other"));
        for index in 0..file.len() {
            for bit in 0..8 {
                let mut wrong = file.clone();
                wrong[index] ^= 1 << bit;
                assert!(unseal("tidelog-test", &wrong).is_err(), "byte {index}, bit {bit}");
            }
            assert!(unseal("tidelog-test", &file[..index]).is_err(), "cut at {index}");
        }
        assert_eq!(unseal("x", &seal("x", b"")), Ok(&b""[..]), "nothing");
    }
}
