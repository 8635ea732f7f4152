//! The configuration of one node: what belongs to it alone, read from TOML.
//!
//! What the nodes of a group must agree on is not here but in the group's log. A key that is not
//! known is an error that names the nearest one that is.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use toml::de::{DeTable, DeValue};

use crate::units::{ByteSize, Name, Span};

/// Where the control socket is when nothing else is said.
pub const DEFAULT_SOCKET: &str = "/run/tidelog/tidelog.sock";

/// One node.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Config {
    /// The node's name, unique among its peers.
    pub node: Name,
    /// Where its groups, keys and events live.
    pub data_dir: PathBuf,
    /// The control socket.
    #[serde(default)]
    pub control: ControlConfig,
    /// Where hosts attach.
    #[serde(default)]
    pub nbd: Vec<NbdConfig>,
    /// Where peers dial; without it, the node has none.
    #[serde(default)]
    pub peer: Option<PeerConfig>,
    /// Metrics beyond the control socket.
    #[serde(default)]
    pub metrics: Option<MetricsConfig>,
    /// Where backups go.
    #[serde(default)]
    pub repository: Vec<RepositoryConfig>,
    /// What warnings and errors call.
    #[serde(default)]
    pub notify: Option<NotifyConfig>,
    /// Limits of this node.
    #[serde(default)]
    pub limits: LimitsConfig,
}

/// The control socket.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ControlConfig {
    /// The socket's path.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// Users who may use it, besides root and the node's own.
    #[serde(default)]
    pub allow: Vec<String>,
}

impl Default for ControlConfig {
    fn default() -> ControlConfig {
        ControlConfig { socket: default_socket(), allow: Vec::new() }
    }
}

fn default_socket() -> PathBuf {
    PathBuf::from(DEFAULT_SOCKET)
}

/// One place where hosts attach.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct NbdConfig {
    /// Where.
    pub listen: ListenAddress,
    /// Whether hosts must use TLS.
    #[serde(default)]
    pub tls: NbdTls,
    /// Networks that may connect over TCP; all of them where it is empty.
    #[serde(default)]
    pub allow: Vec<Network>,
}

/// Whether hosts must use TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NbdTls {
    /// It is not offered.
    #[default]
    Off,
}

/// Where peers dial.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct PeerConfig {
    /// Where this node listens for them.
    pub listen: SocketAddr,
    /// `HOST:PORT` that peers dial; required where `listen` is a wildcard.
    #[serde(default)]
    pub advertise: Option<String>,
    /// How often a quiet link is heard from.
    #[serde(default = "default_heartbeat")]
    pub heartbeat: Span,
    /// After how long without progress a peer is lost.
    #[serde(default = "default_lost_after")]
    pub lost_after: Span,
}

impl PeerConfig {
    /// What peers dial.
    #[must_use]
    pub fn advertised(&self) -> String {
        self.advertise.clone().unwrap_or_else(|| self.listen.to_string())
    }
}

impl Default for PeerConfig {
    fn default() -> PeerConfig {
        PeerConfig {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            heartbeat: default_heartbeat(),
            lost_after: default_lost_after(),
        }
    }
}

fn default_heartbeat() -> Span {
    Span::from_secs(1)
}

fn default_lost_after() -> Span {
    Span::from_secs(5)
}

/// Metrics beyond the control socket.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct MetricsConfig {
    /// Where; plain HTTP.
    pub listen: SocketAddr,
}

/// A place where backups go. One name means one repository on every node.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct RepositoryConfig {
    /// Its name.
    pub name: Name,
    /// A directory.
    pub url: PathBuf,
    /// The file whose first line is the repository's password.
    pub password_file: PathBuf,
}

/// What warnings and errors call.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct NotifyConfig {
    /// A program and its arguments; gets one event as JSON on standard input.
    pub command: Vec<String>,
}

/// Limits of this node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct LimitsConfig {
    /// NBD connections at most.
    #[serde(default)]
    pub connections: Option<usize>,
    /// Bytes of the file system that are left alone.
    #[serde(default)]
    pub disk_reserve: Option<ByteSize>,
    /// Bytes of a group's log at most, where that is less than the group's own limit.
    #[serde(default)]
    pub log_limit: Option<ByteSize>,
    /// The window at most, where that is less than the group's own.
    #[serde(default)]
    pub window: Option<Span>,
}

/// `unix:PATH` or `tcp:ADDRESS:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// A socket in the file system.
    Unix(PathBuf),
    /// A TCP port; 0 for any that is free.
    Tcp(SocketAddr),
}

impl FromStr for ListenAddress {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            if path.starts_with('/') {
                return Ok(ListenAddress::Unix(PathBuf::from(path)));
            }
        } else if let Some(address) = text.strip_prefix("tcp:")
            && let Ok(address) = address.parse()
        {
            return Ok(ListenAddress::Tcp(address));
        }
        Err(format!(
            "`{text}`: expected unix:/PATH or tcp:ADDRESS:PORT, such as tcp:127.0.0.1:10809"
        ))
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddress::Unix(path) => write!(f, "unix:{}", path.display()),
            ListenAddress::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

/// A range of addresses: `10.0.0.0/8`, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// An address of the network.
    pub address: IpAddr,
    /// How many leading bits of it count.
    pub prefix_bits: u8,
}

impl Network {
    /// Whether `address` lies in the network. An IPv4 address that came over an IPv6 socket counts
    /// as itself.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let (network, address, bits) = match (self.address, address.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                (u128::from(network.to_bits()), u128::from(address.to_bits()), 32)
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                (network.to_bits(), address.to_bits(), 128)
            }
            _ => return false,
        };
        let free = bits - u32::from(self.prefix_bits);
        free == 128 || (network ^ address) >> free == 0
    }
}

impl FromStr for Network {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}`: expected an address or a network, such as 10.0.0.0/8");
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let prefix_bits = match prefix {
            None => bits,
            Some(prefix) => prefix.parse().ok().filter(|p| *p <= bits).ok_or_else(wrong)?,
        };
        Ok(Network { address, prefix_bits })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
}

macro_rules! deserialize_from_text {
    ($($name:ty),*) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

deserialize_from_text!(ListenAddress, Network);

/// The keys of each table; the empty name is the top.
const KEYS: [(&str, &[&str]); 8] = [
    (
        "",
        &[
            "control",
            "data_dir",
            "limits",
            "metrics",
            "nbd",
            "node",
            "notify",
            "peer",
            "repository",
        ],
    ),
    ("control", &["allow", "socket"]),
    ("limits", &["connections", "disk_reserve", "log_limit", "window"]),
    ("metrics", &["listen"]),
    ("nbd", &["allow", "listen", "tls"]),
    ("notify", &["command"]),
    ("peer", &["advertise", "heartbeat", "listen", "lost_after"]),
    ("repository", &["name", "password_file", "url"]),
];

/// A configuration that cannot be used: the file, the line, what is wrong, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{what}", place(.file, *.line))]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1, where one is to blame.
    pub line: Option<usize>,
    /// What is wrong.
    pub what: String,
}

fn place(file: &Path, line: Option<usize>) -> String {
    match line {
        Some(line) => format!("{}:{line}: ", file.display()),
        None => format!("{}: ", file.display()),
    }
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    ///
    /// Where the file cannot be read, has a key that is not known, a value that is not what its key
    /// expects, or values that do not go together.
    pub fn load(file: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(file).map_err(|error| ConfigError {
            file: file.to_owned(),
            line: None,
            what: format!("could not be read: {}; name the file with --config FILE", cause(&error)),
        })?;
        Config::parse(file, &text)
    }

    /// Reads and checks a text; `file` is for the messages.
    ///
    /// # Errors
    ///
    /// As [`Config::load`].
    pub fn parse(file: &Path, text: &str) -> Result<Config, ConfigError> {
        let at = |span: Option<std::ops::Range<usize>>, what: String| ConfigError {
            file: file.to_owned(),
            line: span.map(|span| line_of(text, span.start)),
            what,
        };
        let from_toml = |error: toml::de::Error| {
            let what = error.message().lines().collect::<Vec<_>>().join(" ");
            at(error.span(), what)
        };
        let table = DeTable::parse(text).map_err(from_toml)?;
        unknown_key("", table.get_ref())
            .map_or(Ok(()), |(span, what)| Err(at(Some(span), what)))?;
        let config: Config = toml::from_str(text).map_err(from_toml)?;
        config.check().map_err(|what| at(None, what))?;
        Ok(config)
    }

    /// What no single key shows.
    fn check(&self) -> Result<(), String> {
        if !self.data_dir.is_absolute() {
            return Err(format!("data_dir: `{}` must begin with /", self.data_dir.display()));
        }
        for (index, nbd) in self.nbd.iter().enumerate() {
            if let ListenAddress::Tcp(address) = &nbd.listen
                && !address.ip().to_canonical().is_loopback()
                && nbd.allow.is_empty()
            {
                return Err(format!(
                    "nbd: {}: anybody who reaches this address could write the volumes; give \
                     allow = [\"NETWORK/BITS\", …], or listen on tcp:127.0.0.1:{}",
                    nbd.listen,
                    address.port()
                ));
            }
            if matches!(nbd.listen, ListenAddress::Unix(_)) && !nbd.allow.is_empty() {
                return Err(format!("nbd: {}: `allow` is for tcp: alone; remove it", nbd.listen));
            }
            let fixed = !matches!(nbd.listen, ListenAddress::Tcp(address) if address.port() == 0);
            if fixed && self.nbd[..index].iter().any(|other| other.listen == nbd.listen) {
                return Err(format!("nbd: {}: is given twice; remove one", nbd.listen));
            }
        }
        if let Some(peer) = &self.peer {
            match &peer.advertise {
                None if peer.listen.ip().is_unspecified() => {
                    return Err(format!(
                        "peer: listen {} names no address that peers could dial; give advertise = \
                         \"HOST:{}\"",
                        peer.listen,
                        peer.listen.port()
                    ));
                }
                Some(advertise) if !is_host_and_port(advertise) => {
                    return Err(format!("peer: advertise `{advertise}`: expected HOST:PORT"));
                }
                _ => {}
            }
            if peer.lost_after.0 < peer.heartbeat.0 * 2
                || peer.heartbeat.0 < Duration::from_millis(10)
            {
                return Err(format!(
                    "peer: lost_after {} must be at least twice heartbeat {}, which is at least \
                     10ms; the defaults are 5s and 1s",
                    peer.lost_after, peer.heartbeat
                ));
            }
        }
        for (index, repository) in self.repository.iter().enumerate() {
            if self.repository[..index].iter().any(|other| other.name == repository.name) {
                return Err(format!("repository: `{}` is given twice", repository.name));
            }
            if !repository.url.is_absolute() {
                return Err(format!(
                    "repository: {}: url `{}`: expected a directory that begins with /",
                    repository.name,
                    repository.url.display()
                ));
            }
        }
        if self.notify.as_ref().is_some_and(|notify| notify.command.is_empty()) {
            return Err("notify: command is empty; name a program".to_owned());
        }
        Ok(())
    }
}

fn is_host_and_port(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && !host.contains(char::is_whitespace) && port.parse::<u16>().is_ok()
    })
}

/// An I/O error without the `(os error 2)` that helps nobody.
#[must_use]
pub fn cause(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_lowercase().collect::<String>() + letters.as_str()
    })
}

fn line_of(text: &str, byte: usize) -> usize {
    text.as_bytes()[..byte.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
}

/// The first key that is not known, and what to say of it.
fn unknown_key(table: &str, keys: &DeTable<'_>) -> Option<(std::ops::Range<usize>, String)> {
    let known = KEYS.iter().find(|(name, _)| *name == table)?.1;
    let mut entries: Vec<_> = keys.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    for (key, value) in entries {
        let name: &str = key.get_ref();
        if !known.contains(&name) {
            let place = if table.is_empty() { String::new() } else { format!(" in [{table}]") };
            let hint = match nearest(name, known) {
                Some(nearest) => format!("the nearest is `{nearest}`"),
                None => format!("known are {}", known.join(", ")),
            };
            return Some((key.span(), format!("unknown key `{name}`{place}; {hint}")));
        }
        if !table.is_empty() {
            continue;
        }
        let found = match value.get_ref() {
            DeValue::Table(inner) => unknown_key(name, inner),
            DeValue::Array(items) => items.iter().find_map(|item| match item.get_ref() {
                DeValue::Table(inner) => unknown_key(name, inner),
                _ => None,
            }),
            _ => None,
        };
        if found.is_some() {
            return found;
        }
    }
    None
}

/// The word of `known` that takes the fewest changes to `word`, if those are few.
#[must_use]
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|candidate| (edits(word, candidate), *candidate))
        .min()
        .filter(|(edits, candidate)| *edits <= candidate.len().max(word.len()).div_ceil(2))
        .map(|(_, candidate)| candidate)
}

/// Insertions, removals and replacements that make one word the other (Levenshtein).
fn edits(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (index, letter) in from.chars().enumerate() {
        let mut corner = row[0];
        row[0] = index + 1;
        for (column, other) in to.iter().enumerate() {
            let replaced = corner + usize::from(letter != *other);
            corner = row[column + 1];
            row[column + 1] = replaced.min(row[column] + 1).min(corner + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        Config::parse(Path::new("c.toml"), text).unwrap_err().to_string()
    }

    const LEAST: &str = "node = \"a\"\ndata_dir = \"/d\"\n";

    #[test]
    fn the_least_configuration_has_defaults() {
        let config = Config::parse(Path::new("c.toml"), LEAST).unwrap();
        assert_eq!(config.control.socket, Path::new(DEFAULT_SOCKET));
        assert!(config.peer.is_none() && config.nbd.is_empty());
    }

    #[test]
    fn the_example_is_a_valid_configuration() {
        let text = include_str!("../contrib/tidelog.toml");
        let config = Config::parse(Path::new("tidelog.toml"), text).unwrap();
        assert_eq!(config.nbd.len(), 2);
        assert_eq!(config.peer.unwrap().advertised(), "a.example:10810");
    }

    #[test]
    fn an_unknown_key_names_its_line_and_the_nearest() {
        let said = refusal("node = \"a\"\ndata_dir = \"/d\"\n[peer]\nlisen = \"1.2.3.4:1\"\n");
        assert_eq!(said, "c.toml:4: unknown key `lisen` in [peer]; the nearest is `listen`");
        let said = refusal("nodes = \"a\"\n");
        assert_eq!(said, "c.toml:1: unknown key `nodes`; the nearest is `node`");
        let said = refusal("[[nbd]]\nlisten = \"unix:/a\"\n[[nbd]]\nalow = []\n");
        assert_eq!(said, "c.toml:4: unknown key `alow` in [nbd]; the nearest is `allow`");
        assert!(refusal("[limits]\nqqqqqqqqqqqqqqqqq = 1\n").contains("known are connections"));
    }

    #[test]
    fn a_wrong_value_names_its_line() {
        let said = refusal("node = \"A b\"\ndata_dir = \"/d\"\n");
        assert!(said.starts_with("c.toml:1: name `A b`"), "{said}");
        let said = refusal(&format!("{LEAST}[[nbd]]\nlisten = \"10809\"\n"));
        assert!(said.starts_with("c.toml:4: `10809`: expected unix:/PATH"), "{said}");
        let said = refusal("node = \"a\"\n");
        assert!(said.contains("data_dir"), "{said}");
    }

    #[test]
    fn hosts_beyond_loopback_need_an_allow_list_and_a_unix_socket_takes_none() {
        let unix = "[[nbd]]\nlisten = \"unix:/run/n.sock\"\nallow = [\"10.0.0.0/8\"]\n";
        let said = refusal(&format!("{LEAST}{unix}"));
        assert!(said.contains("unix:/run/n.sock") && said.contains("`allow`"), "{said}");
        let said = refusal(&format!("{LEAST}[[nbd]]\nlisten = \"tcp:0.0.0.0:10809\"\n"));
        assert!(said.contains("allow"), "{said}");
        for good in [
            "[[nbd]]\nlisten = \"tcp:0.0.0.0:10809\"\nallow = [\"10.0.0.0/8\"]\n",
            "[[nbd]]\nlisten = \"tcp:127.0.0.1:10809\"\n",
            "[[nbd]]\nlisten = \"tcp:[::1]:10809\"\n",
        ] {
            Config::parse(Path::new("c.toml"), &format!("{LEAST}{good}")).unwrap();
        }
    }

    #[test]
    fn a_wildcard_for_peers_needs_an_address_to_dial() {
        let said = refusal(&format!("{LEAST}[peer]\nlisten = \"0.0.0.0:10810\"\n"));
        assert!(said.contains("advertise"), "{said}");
    }

    #[test]
    fn networks_contain_their_addresses_only() {
        let network: Network = "10.0.0.0/8".parse().unwrap();
        assert!(network.contains("10.255.0.1".parse().unwrap()));
        assert!(network.contains("::ffff:10.1.1.1".parse().unwrap()));
        assert!(!network.contains("11.0.0.1".parse().unwrap()));
        assert!(!network.contains("::1".parse().unwrap()));
        assert!("0.0.0.0/0".parse::<Network>().unwrap().contains("9.9.9.9".parse().unwrap()));
        assert!("::/0".parse::<Network>().unwrap().contains("::1".parse().unwrap()));
        assert!("10.0.0.0/33".parse::<Network>().is_err());
    }

    #[test]
    fn nearest_counts_edits() {
        assert_eq!(edits("kitten", "sitting"), 3);
        assert_eq!(nearest("listn", &["listen", "advertise"]), Some("listen"));
        assert_eq!(nearest("xyz", &["advertise"]), None);
    }
}
