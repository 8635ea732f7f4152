//! The words that can be confused, each with a type of its own: positions, identities, times, sizes
//! and names.
//!
//! Positions are half-open throughout: a record at `[lsn, end)` is *in* the image at `x` when
//! `end <= x`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes of the smallest unit that the extent map knows.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of the unit that carries a checksum.
pub const BLOCK_BYTES: u64 = 4096;
/// Bytes of the unit that carries a birth in the sidecar, and of a chunk of the extent map.
pub const CHUNK_BYTES: u64 = 1 << 20;

/// The sum of byte counts; of such as peers or disks say and no memory holds, the highest number.
#[must_use]
pub fn total(bytes: impl IntoIterator<Item = u64>) -> u64 {
    bytes.into_iter().fold(0, u64::saturating_add)
}

/// A log sequence number: the byte position of a record in its group's log. Never above 2^63.
///
/// ```
/// use tidelog::units::Lsn;
///
/// let segment_bytes = 64 << 20;
/// let lsn = Lsn::ZERO.advance(segment_bytes + 96);
/// assert_eq!((lsn.segment_number(segment_bytes), lsn.segment_offset(segment_bytes)), (1, 96));
/// ```
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Lsn(pub u64);

impl Lsn {
    /// The beginning of every log.
    pub const ZERO: Lsn = Lsn(0);
    /// The highest position that a log may reach.
    pub const MAX: Lsn = Lsn(1 << 63);

    /// The position `bytes` further on.
    ///
    /// # Panics
    ///
    /// Past [`Lsn::MAX`]: a log that long is a bug.
    #[must_use]
    pub fn advance(self, bytes: u64) -> Lsn {
        let position = self.0.checked_add(bytes).expect("an LSN does not overflow");
        assert!(position <= Lsn::MAX.0, "LSN {position} is above 2^63");
        Lsn(position)
    }

    /// Bytes from `earlier` to here; zero where `earlier` is not earlier.
    #[must_use]
    pub fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The number of the segment that holds this position.
    #[must_use]
    pub fn segment_number(self, segment_bytes: u64) -> u64 {
        self.0 / segment_bytes
    }

    /// The byte inside that segment.
    #[must_use]
    pub fn segment_offset(self, segment_bytes: u64) -> u64 {
        self.0 % segment_bytes
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Makes a type around 64 bits that is written as 16 hexadecimal digits, also in JSON, where a
/// number of that size would lose its last digits.
macro_rules! hex_u64 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:016x}", self.0)
            }
        }

        impl FromStr for $name {
            type Err = UnitError;
            fn from_str(text: &str) -> Result<Self, UnitError> {
                if text.len() != 16 {
                    return Err(UnitError::new(stringify!($name), text, "16 hexadecimal digits"));
                }
                u64::from_str_radix(text, 16)
                    .map($name)
                    .map_err(|_| UnitError::new(stringify!($name), text, "16 hexadecimal digits"))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

hex_u64! {
    /// The random identity of an epoch, one reign of one primary.
    EpochId
}
hex_u64! {
    /// The header checksum of the record before a position: equal (epoch, LSN, chain) means equal
    /// history.
    Chain
}
hex_u64! {
    /// A random number that a node rewrites at each start, so that a clone or a rolled-back disk is
    /// recognised.
    Incarnation
}

/// Makes an identity of 128 random bits, written as 32 hexadecimal digits.
macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl FromStr for $name {
            type Err = UnitError;
            fn from_str(text: &str) -> Result<Self, UnitError> {
                let mut id = [0; 16];
                hex::decode_to_slice(text, &mut id)
                    .map(|()| $name(id))
                    .map_err(|_| UnitError::new(stringify!($name), text, "32 hexadecimal digits"))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

hex_id! {
    /// A consistency group, the same on every node that holds it.
    GroupId
}
hex_id! {
    /// A node.
    NodeId
}

/// The number of a volume in its group's records; never reused. Zero is "no volume".
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct VolumeNumber(pub u32);

impl fmt::Display for VolumeNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A moment in log time: nanoseconds since 1970-01-01T00:00:00Z. Never runs backwards in a log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogTime(pub u64);

impl LogTime {
    /// The time from `earlier` to here; zero where `earlier` is not earlier.
    #[must_use]
    pub fn since(self, earlier: LogTime) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// This moment, `duration` earlier; 1970 at the earliest.
    #[must_use]
    pub fn before(self, duration: Duration) -> LogTime {
        LogTime(self.0.saturating_sub(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// This moment, `duration` later.
    #[must_use]
    pub fn after(self, duration: Duration) -> LogTime {
        LogTime(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// The same moment for the calendar.
    #[must_use]
    pub fn timestamp(self) -> jiff::Timestamp {
        jiff::Timestamp::from_nanosecond(i128::from(self.0)).unwrap_or(jiff::Timestamp::MAX)
    }

    /// The moment of a calendar time; 1970 for anything before it.
    #[must_use]
    pub fn from_timestamp(timestamp: jiff::Timestamp) -> LogTime {
        LogTime(u64::try_from(timestamp.as_nanosecond()).unwrap_or(0))
    }
}

impl fmt::Display for LogTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.timestamp().fmt(f)
    }
}

impl FromStr for LogTime {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        text.parse::<jiff::Timestamp>()
            .map(LogTime::from_timestamp)
            .map_err(|_| UnitError::new("time", text, "RFC 3339, such as 2026-11-24T02:00:00Z"))
    }
}

impl Serialize for LogTime {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LogTime {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A position that outlives an epoch, with its log time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Position {
    /// The epoch that the position lies in.
    pub epoch: EpochId,
    /// The byte position.
    pub lsn: Lsn,
    /// Log time of the last record before it.
    pub time: LogTime,
}

/// A number of bytes, as people write it: `512`, `64M`, `64MiB`; K, M, G, T are powers of 1024.
///
/// ```
/// use tidelog::units::ByteSize;
///
/// assert_eq!("64MiB".parse(), Ok(ByteSize(64 << 20)));
/// assert!("64MB".parse::<ByteSize>().is_err(), "64 * 1000^2 or 64 * 1024^2?");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let mut unit = 0;
        let mut whole = self.0;
        let mut tenths = 0;
        while whole >= 1024 {
            tenths = (whole % 1024) * 10 / 1024;
            whole /= 1024;
            unit += 1;
        }
        let text = if tenths == 0 {
            format!("{whole} {}", UNITS[unit])
        } else {
            format!("{whole}.{tenths} {}", UNITS[unit])
        };
        f.pad(&text)
    }
}

impl FromStr for ByteSize {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong =
            || UnitError::new("size", text, "a number with K, M, G, T or KiB, MiB, GiB, TiB");
        let trimmed = text.trim();
        let digits = trimmed.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = trimmed[..digits].parse().map_err(|_| wrong())?;
        let unit = trimmed[digits..].trim();
        let power = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 1,
            "m" | "mib" => 2,
            "g" | "gib" => 3,
            "t" | "tib" => 4,
            "kb" | "mb" | "gb" | "tb" => {
                let power = 1 + ["kb", "mb", "gb", "tb"]
                    .iter()
                    .position(|known| unit.eq_ignore_ascii_case(known))
                    .unwrap_or(0) as u32;
                let letter = unit[..1].to_ascii_uppercase();
                let decimal = number.saturating_mul(1000u64.pow(power));
                let binary = number.saturating_mul(1024u64.pow(power));
                return Err(UnitError(format!(
                    "size `{text}`: {unit} has two readings: write {number}{letter} for {binary} \
                     bytes, or {decimal} for powers of 1000"
                )));
            }
            _ => return Err(wrong()),
        };
        number.checked_mul(1024u64.pow(power)).map(ByteSize).ok_or_else(wrong)
    }
}

/// A size is read from a number of bytes or from text.
impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(u64),
            Text(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Number(bytes) => Ok(ByteSize(bytes)),
            Either::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// A duration as people write it: `90s`, `15m`, `24h`. In JSON and TOML it is that text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span(pub Duration);

impl Span {
    /// A span of whole seconds.
    #[must_use]
    pub const fn from_secs(seconds: u64) -> Span {
        Span(Duration::from_secs(seconds))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&humantime::format_duration(self.0).to_string())
    }
}

impl FromStr for Span {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        humantime::parse_duration(text).map(Span).map_err(|_| {
            UnitError::new("duration", text, "a number with a unit, such as 90s or 15m")
        })
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The name of a node, group, volume, job or bookmark: `[a-z0-9][a-z0-9._-]{0,62}`, not `now`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Name(String);

impl Name {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Name {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let first =
            text.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let rest = text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b));
        if first && rest && text.len() <= 63 && text != "now" {
            Ok(Name(text.to_owned()))
        } else {
            Err(UnitError::new("name", text, "[a-z0-9][a-z0-9._-]{0,62}, and not `now`"))
        }
    }
}

impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Text that is not what a unit expects.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UnitError(String);

impl UnitError {
    fn new(what: &str, got: &str, expected: &str) -> UnitError {
        UnitError(format!("{what} `{got}`: expected {expected}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024_and_ambiguous_ones_are_refused() {
        assert_eq!("64M".parse::<ByteSize>().unwrap().0, 64 << 20);
        assert_eq!("64MiB".parse::<ByteSize>().unwrap().0, 64 << 20);
        let refusal = "64MB".parse::<ByteSize>().unwrap_err().to_string();
        assert!(refusal.contains("67108864") && refusal.contains("64000000"), "{refusal}");
        assert_eq!(ByteSize(1536).to_string(), "1.5 KiB");
        assert!("99999999T".parse::<ByteSize>().is_err());
    }

    #[test]
    fn names_exclude_points_and_separators() {
        for good in ["g", "vm-1.data", "0_x"] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", "now", "-a", "A", "a/b", "a@b", "a b"] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn log_time_survives_its_text() {
        let time = LogTime(1_700_000_000_123_456_789);
        assert_eq!(time.to_string().parse::<LogTime>().unwrap(), time);
    }
}
