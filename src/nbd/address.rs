//! Addresses of servers, for those who listen and those who connect: `unix:PATH`, `tcp:HOST:PORT`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::config::ListenAddress;

/// Where a server listens or a client connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdAddress {
    /// A Unix socket.
    Unix(PathBuf),
    /// `HOST:PORT`; port 0 takes a free one.
    Tcp(String),
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

impl From<&ListenAddress> for NbdAddress {
    fn from(listen: &ListenAddress) -> NbdAddress {
        match listen {
            ListenAddress::Unix(path) => NbdAddress::Unix(path.clone()),
            ListenAddress::Tcp(address) => NbdAddress::Tcp(address.to_string()),
        }
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
        let listen: ListenAddress = "tcp:[::1]:10809".parse().unwrap();
        assert_eq!(NbdAddress::from(&listen).to_string(), "tcp:[::1]:10809");
    }
}
