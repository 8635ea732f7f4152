//! What a node keeps about its peers, in two files under `data_dir/node`: `peer.key`, its private
//! key, and `peers`, JSON with the nodes it was paired with.
//!
//! Both are written to a new file, synced, and renamed over the old one; the key is readable by its
//! owner alone.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::units::{GroupId, LogTime, Name, NodeId};

use super::pairing::Fingerprint;
use super::tls;

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A node that this one was paired with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its identity.
    pub node: NodeId,
    /// Its name.
    pub name: Name,
    /// Where it can be dialled, `HOST:PORT`; none where only it dials.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Keys by which it may show itself: one, or two while it changes its key, the new one first.
    pub fingerprints: Vec<Fingerprint>,
    /// When it was paired, by this node's wall clock.
    pub paired: LogTime,
    /// Groups that it asked to hold a copy of here, until their log says so itself.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub copies: BTreeSet<GroupId>,
    /// Groups whose replication with it is paused by command.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub paused: BTreeSet<GroupId>,
}

#[derive(Default, Serialize, Deserialize)]
struct File {
    version: u32,
    peers: Vec<Peer>,
}

const FILE_VERSION: u32 = 1;

/// The two files.
pub struct PeerStore {
    dir: PathBuf,
    peers: Vec<Peer>,
}

/// A file that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{}: {what}: {cause}", path.display())]
pub struct StoreError {
    path: PathBuf,
    what: &'static str,
    cause: String,
}

impl PeerStore {
    /// Reads the peers under `dir`, and makes the directory where it is missing.
    ///
    /// # Errors
    ///
    /// Where a file cannot be read, or is not what this version writes.
    pub fn open(dir: &Path) -> Result<PeerStore, StoreError> {
        fs::create_dir_all(dir).map_err(|error| failure(dir, "could not be made", &error))?;
        let path = dir.join("peers");
        let peers = match fs::read(&path) {
            Ok(bytes) => {
                let file: File = serde_json::from_slice(&bytes)
                    .map_err(|error| failure(&path, "is not a list of peers", &error))?;
                if file.version != FILE_VERSION {
                    let cause = format!("version {}, expected {FILE_VERSION}", file.version);
                    return Err(failure(&path, "is of another version", &cause));
                }
                file.peers
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(failure(&path, "could not be read", &error)),
        };
        Ok(PeerStore { dir: dir.to_owned(), peers })
    }

    /// The private key (PKCS #8, DER); made at the first call.
    ///
    /// # Errors
    ///
    /// Where it can be neither read nor made.
    pub fn key(&self) -> Result<Vec<u8>, StoreError> {
        let path = self.dir.join("peer.key");
        match fs::read(&path) {
            Ok(key) => Ok(key),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key =
                    tls::new_key().map_err(|error| failure(&path, "could not be made", &error))?;
                self.set_key(&key)?;
                Ok(key)
            }
            Err(error) => Err(failure(&path, "could not be read", &error)),
        }
    }

    /// Replaces the private key.
    ///
    /// # Errors
    ///
    /// Where it cannot be written.
    pub fn set_key(&self, key: &[u8]) -> Result<(), StoreError> {
        replace(&self.dir, "peer.key", key)
    }

    /// All peers, by name.
    #[must_use]
    pub fn all(&self) -> &[Peer] {
        &self.peers
    }

    /// A peer by identity.
    #[must_use]
    pub fn by_node(&self, node: NodeId) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.node == node)
    }

    /// A peer by name.
    #[must_use]
    pub fn by_name(&self, name: &str) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.name.as_str() == name)
    }

    /// The peer that shows itself by this key.
    #[must_use]
    pub fn by_fingerprint(&self, fingerprint: &Fingerprint) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.fingerprints.contains(fingerprint))
    }

    /// Adds a peer, or replaces the one of its identity. Durable on return.
    ///
    /// # Errors
    ///
    /// Where it cannot be written; the list in memory is then as before.
    pub fn put(&mut self, peer: Peer) -> Result<(), StoreError> {
        let mut peers = self.peers.clone();
        peers.retain(|known| known.node != peer.node);
        peers.push(peer);
        peers.sort_by(|a, b| a.name.cmp(&b.name));
        self.store(peers)
    }

    /// Changes a peer, if it exists. Durable on return.
    ///
    /// # Errors
    ///
    /// Where it cannot be written.
    pub fn change(
        &mut self,
        node: NodeId,
        change: impl FnOnce(&mut Peer),
    ) -> Result<(), StoreError> {
        let mut peers = self.peers.clone();
        if let Some(peer) = peers.iter_mut().find(|peer| peer.node == node) {
            change(peer);
            if self.peers != peers {
                return self.store(peers);
            }
        }
        Ok(())
    }

    /// Forgets a peer. Durable on return.
    ///
    /// # Errors
    ///
    /// Where it cannot be written.
    pub fn remove(&mut self, node: NodeId) -> Result<(), StoreError> {
        let mut peers = self.peers.clone();
        peers.retain(|peer| peer.node != node);
        self.store(peers)
    }

    fn store(&mut self, peers: Vec<Peer>) -> Result<(), StoreError> {
        let file = File { version: FILE_VERSION, peers };
        let bytes = serde_json::to_vec_pretty(&file).expect("plain data becomes JSON");
        replace(&self.dir, "peers", &bytes)?;
        self.peers = file.peers;
        Ok(())
    }
}

/// Puts a file in place whole: new file, sync, rename, sync of the directory.
pub(super) fn replace(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
    let path = dir.join(name);
    let fresh = dir.join(format!("{name}.new"));
    let write = || -> io::Result<()> {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, &path)?;
        fs::File::open(dir)?.sync_all()
    };
    write().map_err(|error| failure(&path, "could not be written", &error))
}

fn failure(path: &Path, what: &'static str, cause: &dyn std::fmt::Display) -> StoreError {
    StoreError { path: path.to_owned(), what, cause: cause.to_string() }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn peer(number: u8, name: &str) -> Peer {
        Peer {
            node: NodeId([number; 16]),
            name: name.parse().unwrap(),
            address: Some("b.example:10810".to_owned()),
            fingerprints: vec![Fingerprint([number; 32])],
            paired: LogTime(5),
            copies: BTreeSet::from([GroupId([9; 16])]),
            paused: BTreeSet::new(),
        }
    }

    #[test]
    fn peers_are_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = PeerStore::open(dir.path()).unwrap();
        store.put(peer(2, "b")).unwrap();
        store.put(peer(1, "a")).unwrap();
        store.change(NodeId([2; 16]), |peer| peer.address = None).unwrap();
        let again = PeerStore::open(dir.path()).unwrap();
        assert_eq!(again.all(), store.all());
        assert_eq!(again.by_name("b").unwrap().address, None);
        assert_eq!(again.by_fingerprint(&Fingerprint([1; 32])).unwrap().name.as_str(), "a");
        store.remove(NodeId([1; 16])).unwrap();
        assert_eq!(PeerStore::open(dir.path()).unwrap().all().len(), 1);
    }

    #[test]
    fn the_key_is_made_once_and_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = PeerStore::open(dir.path()).unwrap();
        let key = store.key().unwrap();
        assert_eq!(store.key().unwrap(), key);
        let mode = fs::metadata(dir.path().join("peer.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_damaged_list_is_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("peers"), b"{").unwrap();
        let error = PeerStore::open(dir.path()).err().unwrap().to_string();
        assert!(error.contains("peers") && error.contains("is not a list of peers"), "{error}");
        assert_eq!(fs::read(dir.path().join("peers")).unwrap(), b"{");
    }
}
