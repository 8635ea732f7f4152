//! Addresses as the configuration writes them: `unix:PATH`, `tcp:HOST:PORT`, and blocks of IP
//! addresses such as `10.0.0.0/8`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// Where a server listens or a client connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdAddress {
    /// A Unix socket.
    Unix(PathBuf),
    /// `HOST:PORT`; port 0 takes a free one.
    Tcp(String),
}

impl NbdAddress {
    /// Whether only this machine can reach it. A name that is not `localhost` counts as reachable.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            NbdAddress::Unix(_) => true,
            NbdAddress::Tcp(host) => match host.parse::<SocketAddr>() {
                Ok(address) => address.ip().to_canonical().is_loopback(),
                Err(_) => host.rsplit_once(':').is_some_and(|(name, _)| name == "localhost"),
            },
        }
    }
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NbdAddress::Unix(path) => write!(f, "unix:{}", path.display()),
            NbdAddress::Tcp(host) => write!(f, "tcp:{host}"),
        }
    }
}

/// Text that is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} `{text}`: expected {expected}")]
pub struct AddressError {
    what: &'static str,
    text: String,
    expected: &'static str,
}

impl FromStr for NbdAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<NbdAddress, AddressError> {
        let wrong = || AddressError {
            what: "address",
            text: text.to_owned(),
            expected: "unix:PATH or tcp:HOST:PORT",
        };
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(NbdAddress::Unix(PathBuf::from(path)));
        }
        let host = text.strip_prefix("tcp:").ok_or_else(wrong)?;
        let (name, port) = host.rsplit_once(':').ok_or_else(wrong)?;
        let bracketed = name.starts_with('[') && name.ends_with(']');
        if name.is_empty() || port.parse::<u16>().is_err() || (name.contains(':') && !bracketed) {
            return Err(wrong());
        }
        Ok(NbdAddress::Tcp(host.to_owned()))
    }
}

/// A block of IP addresses; a lone address is a block of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressBlock {
    address: IpAddr,
    prefix_bits: u8,
}

impl AddressBlock {
    /// Whether an address lies in this block. An IPv4 address in its IPv6 form counts as IPv4.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(block), IpAddr::V4(address)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix_bits)).unwrap_or(0);
                u32::from(block) & mask == u32::from(address) & mask
            }
            (IpAddr::V6(block), IpAddr::V6(address)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix_bits)).unwrap_or(0);
                u128::from(block) & mask == u128::from(address) & mask
            }
            _ => false,
        }
    }
}

impl fmt::Display for AddressBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
}

impl FromStr for AddressBlock {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<AddressBlock, AddressError> {
        let wrong =
            |expected| AddressError { what: "address block", text: text.to_owned(), expected };
        const SHAPE: &str = "an IP address, or ADDRESS/BITS such as 10.0.0.0/8";
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong(SHAPE))?;
        let bits_max = if address.is_ipv4() { 32 } else { 128 };
        let prefix_bits = match bits {
            Some(bits) => bits.parse().map_err(|_| wrong(SHAPE))?,
            None => bits_max,
        };
        if prefix_bits > bits_max {
            return Err(wrong("at most 32 bits for IPv4 and 128 for IPv6"));
        }
        let block = AddressBlock { address, prefix_bits };
        // 10.1.2.3/8 is a slip more often than a wish.
        let lowest = match address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix_bits)).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from(u32::from(address) & mask))
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix_bits)).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from(u128::from(address) & mask))
            }
        };
        if lowest != address {
            return Err(wrong("an address with zeros behind the prefix"));
        }
        Ok(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_and_others_are_refused() {
        for good in ["unix:/run/x.sock", "tcp:0.0.0.0:10809", "tcp:[::1]:0", "tcp:host.example:1"] {
            assert_eq!(good.parse::<NbdAddress>().unwrap().to_string(), good);
        }
        for bad in ["", "unix:", "tcp:", "tcp:host", "tcp::1", "tcp:::1:5", "tcp:h:99999", "/x"] {
            assert!(bad.parse::<NbdAddress>().is_err(), "{bad}");
        }
        assert!("tcp:127.0.0.1:1".parse::<NbdAddress>().unwrap().is_local());
        assert!("tcp:localhost:1".parse::<NbdAddress>().unwrap().is_local());
        assert!(!"tcp:0.0.0.0:1".parse::<NbdAddress>().unwrap().is_local());
    }

    #[test]
    fn blocks_hold_their_addresses_and_no_others() {
        let holds = |block: &str, address: &str| {
            block.parse::<AddressBlock>().unwrap().contains(address.parse().unwrap())
        };
        assert!(holds("10.0.0.0/8", "10.255.1.2"));
        assert!(!holds("10.0.0.0/8", "11.0.0.0"));
        assert!(holds("10.0.0.0/8", "::ffff:10.1.1.1"));
        assert!(holds("0.0.0.0/0", "1.2.3.4"));
        assert!(!holds("0.0.0.0/0", "::1"));
        assert!(holds("192.0.2.7", "192.0.2.7"));
        assert!(!holds("192.0.2.7", "192.0.2.6"));
        assert!(holds("2001:db8::/32", "2001:db8:1::5"));
        assert!(holds("::/0", "2001:db8:1::5"));
        for bad in ["", "10.0.0.0/33", "10.0.0.1/8", "::/129", "10.0.0.0/", "10.0.0.0/-1", "x"] {
            assert!(bad.parse::<AddressBlock>().is_err(), "{bad}");
        }
    }
}
