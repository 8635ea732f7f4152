//! Pairing over the network: invite, join, list, remove, and the change of this node's key.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::events::Severity;
use crate::units::{LogTime, Name, NodeId};

use super::link::{self, HANDSHAKE_TIMEOUT, Secured};
use super::pairing::{Fingerprint, INVITE_VALID, Side, Token, proof, proof_holds};
use super::peers::Peer;
use super::service::{Replication, ReplicationError, Shared};
use super::tls::{self, Identity};
use super::wire::{Message, Purpose};

/// What an operator carries to the other node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invite {
    /// The one-time token.
    pub token: String,
    /// Where this node can be dialled.
    pub address: String,
    /// When the token is void, by this node's wall clock.
    pub expires: LogTime,
}

/// A peer, for lists.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerInfo {
    /// Its name.
    pub name: Name,
    /// Its identity.
    pub node: NodeId,
    /// Where it is dialled.
    pub address: Option<String>,
    /// Fingerprint of its key.
    pub fingerprint: String,
    /// When it was paired.
    pub paired: LogTime,
    /// `standalone`, `connecting` or `connected`.
    pub link_state: String,
    /// Why it is not connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_state_reason: Option<String>,
    /// Seconds since anything was heard of it.
    pub heard_seconds: Option<f64>,
    /// Its wall clock minus this node's.
    pub clock_offset_seconds: Option<f64>,
}

const ROTATE: &str = "replication.rotate";
const ROTATE_TIMEOUT: Duration = Duration::from_secs(10);

impl Replication {
    /// Opens a one-time token, good for 15 minutes.
    ///
    /// # Errors
    ///
    /// Where this node cannot be dialled, or it is not known where.
    pub fn invite(&self) -> Result<Invite, ReplicationError> {
        let shared = &self.shared;
        let address = shared.advertised.clone().ok_or_else(|| {
            ReplicationError::Refused(
                "peer invite: it is not known where others can dial this node; set `advertise` \
                 (and `listen`) under [peer] in the configuration"
                    .to_owned(),
            )
        })?;
        let secret = shared.context.env.entropy.next_id();
        shared.invites.lock().expect("no holder panics").open(shared.now(), secret);
        let token = Token { fingerprint: shared.identity().fingerprint, secret };
        let expires = shared.wall().after(INVITE_VALID);
        Ok(Invite { token: token.to_string(), address, expires })
    }

    /// Joins the node that made a token; both know each other afterwards.
    ///
    /// # Errors
    ///
    /// Where the token is malformed, the address does not answer, another node answers there, or
    /// that node declines.
    pub async fn join(&self, token: &str, address: &str) -> Result<Peer, ReplicationError> {
        let token: Token =
            token.parse().map_err(|error| ReplicationError::Refused(format!("{error}")))?;
        self.try_join(&token, address)
            .await
            .map_err(|what| ReplicationError::Refused(format!("peer join {address}: {what}")))
    }

    async fn try_join(&self, token: &Token, address: &str) -> Result<Peer, String> {
        let shared = &self.shared;
        let mut secured = link::connect(shared, address).await?;
        if secured.fingerprint != token.fingerprint {
            return Err("another node than the one that made the token answers there; check the \
                        address, or make a new token"
                .to_owned());
        }
        let hello = link::greet(shared, &mut secured.stream, Purpose::Pair, None).await?;
        if hello.node == shared.me() {
            return Err("that is this node itself".to_owned());
        }
        let pair = Message::Pair {
            name: shared.context.node.name.to_string(),
            address: shared.advertised.clone().unwrap_or_default(),
            proof: proof(Side::Joiner, &token.secret, &secured.exported),
        };
        link::write_message(&mut secured.stream, &pair).await?;
        let answer = timeout(HANDSHAKE_TIMEOUT, link::read_message(&mut secured.stream))
            .await
            .map_err(|_| "no answer in time".to_owned())??;
        match answer {
            Message::PairRefused { reason } => Err(reason),
            Message::Paired { name, address: theirs, proof } => {
                if !proof_holds(Side::Inviter, &token.secret, &secured.exported, &proof) {
                    return Err("the node there does not know the token's secret".to_owned());
                }
                let address = if theirs.is_empty() { address.to_owned() } else { theirs };
                shared.keep_peer(hello.node, &name, &address, secured.fingerprint)
            }
            _ => Err("an answer that does not belong here".to_owned()),
        }
    }

    /// All peers, by name.
    #[must_use]
    pub fn peers(&self) -> Vec<PeerInfo> {
        let shared = &self.shared;
        let peers = shared.store.lock().expect("no holder panics").all().to_vec();
        let now = shared.now();
        let cores = shared.cores.lock().expect("no holder panics");
        peers
            .into_iter()
            .map(|peer| {
                let core = cores.get(&peer.node);
                let down = core.and_then(|core| core.link_down());
                let state = match (&down, &peer.address) {
                    (None, _) => "connected",
                    (Some(_), Some(_)) => "connecting",
                    (Some(_), None) => "standalone",
                };
                PeerInfo {
                    link_state: state.to_owned(),
                    link_state_reason: down.map(|(_, reason)| reason.to_owned()),
                    heard_seconds: core
                        .and_then(|core| core.heard())
                        .map(|heard| now.saturating_sub(heard).as_secs_f64()),
                    clock_offset_seconds: core
                        .and_then(|core| core.clock_offset())
                        .map(|offset| offset.seconds),
                    fingerprint: peer
                        .fingerprints
                        .first()
                        .map(ToString::to_string)
                        .unwrap_or_default(),
                    name: peer.name,
                    node: peer.node,
                    address: peer.address,
                    paired: peer.paired,
                }
            })
            .collect()
    }

    /// How long ago anything was heard of a peer; none where nothing was since this node started.
    #[must_use]
    pub fn last_heard(&self, peer_name: &str) -> Option<Duration> {
        let peer = self.shared.peer_named(peer_name).ok()?;
        let now = self.shared.now();
        let cores = self.shared.cores.lock().expect("no holder panics");
        cores.get(&peer.node)?.heard().map(|heard| now.saturating_sub(heard))
    }

    /// Forgets a peer. Refused while a group is replicated with it.
    ///
    /// # Errors
    ///
    /// Where it is unknown, or still a member of a group.
    pub fn remove_peer(&self, peer_name: &str) -> Result<(), ReplicationError> {
        let shared = &self.shared;
        let peer = shared.peer_named(peer_name)?;
        for group in shared.groups.groups() {
            let control = group.control();
            let held = control.members.iter().any(|m| m.node == peer.node && !m.removed);
            if held && group.role() == crate::group::Role::Primary {
                let name = group.name();
                return Err(ReplicationError::Peer {
                    name: peer_name.to_owned(),
                    what: format!(
                        "holds a copy of group {name}; `tidelog replicate {name} --to {peer_name} \
                         --stop` first"
                    ),
                });
            }
        }
        shared.store.lock().expect("no holder panics").remove(peer.node)?;
        shared.remove_core(peer.node);
        Ok(())
    }

    /// Gives this node a new key. Every peer must be connected, and learns of it first.
    ///
    /// # Errors
    ///
    /// Where a peer is not connected or did not take the new key: the old one stays.
    pub async fn rotate(&self) -> Result<String, ReplicationError> {
        let shared = &self.shared;
        let _one_at_a_time = shared.rotating.lock().await;
        let key = tls::new_key().map_err(ReplicationError::Refused)?;
        let identity = Identity::from_key(&key).map_err(ReplicationError::Refused)?;
        let fingerprint = identity.fingerprint.to_string();
        let peers = shared.store.lock().expect("no holder panics").all().to_vec();
        for peer in &peers {
            let body = json!({ "fingerprint": fingerprint });
            self.call(peer.name.as_str(), ROTATE, body, ROTATE_TIMEOUT).await?;
        }
        shared.store.lock().expect("no holder panics").set_key(&key)?;
        shared.set_identity(identity);
        Ok(fingerprint)
    }

    pub(super) fn install_pair_handlers(&self) {
        let shared = std::sync::Arc::downgrade(&self.shared);
        self.on_call(
            ROTATE,
            std::sync::Arc::new(move |peer, body: Value| {
                let shared = shared.upgrade();
                Box::pin(async move {
                    let shared = shared.ok_or("this node shuts down")?;
                    let fingerprint: Fingerprint = body["fingerprint"]
                        .as_str()
                        .and_then(|text| text.parse().ok())
                        .ok_or("no fingerprint")?;
                    let mut store = shared.store.lock().expect("no holder panics");
                    // The one in use stays good until the new one is seen, however often this fails
                    // elsewhere and is tried again with another.
                    let in_use = peer.key;
                    store
                        .change(peer.node, |peer| {
                            peer.fingerprints = vec![fingerprint, in_use];
                            peer.fingerprints.dedup();
                        })
                        .map_err(|error| error.to_string())?;
                    Ok(Value::Null)
                })
            }),
        );
    }
}

impl Shared {
    /// The inviter's side of a pairing.
    pub(super) async fn serve_pairing(
        self: &std::sync::Arc<Self>,
        mut secured: Secured,
        joiner: NodeId,
    ) -> Result<(), String> {
        let Message::Pair { name, address, proof: given } =
            link::read_message(&mut secured.stream).await?
        else {
            return Err("pairing: a message that does not belong here".to_owned());
        };
        let taken = {
            let mut invites = self.invites.lock().expect("no holder panics");
            invites.take(self.now(), &secured.exported, &given)
        };
        let kept = taken.map_err(|error| error.to_string()).and_then(|secret| {
            self.keep_peer(joiner, &name, &address, secured.fingerprint).map(|_| secret)
        });
        match kept {
            Ok(secret) => {
                let paired = Message::Paired {
                    name: self.context.node.name.to_string(),
                    address: self.advertised.clone().unwrap_or_default(),
                    proof: proof(Side::Inviter, &secret, &secured.exported),
                };
                link::write_message(&mut secured.stream, &paired).await
            }
            Err(reason) => {
                let text = format!("a node was not paired: {reason}");
                self.context.events.emit(
                    Severity::Warning,
                    "pairing-refused",
                    None,
                    text,
                    Value::Null,
                );
                let refused = Message::PairRefused { reason: reason.clone() };
                link::write_message(&mut secured.stream, &refused).await?;
                Err(reason)
            }
        }
    }

    /// Writes a paired node down and starts to talk to it.
    fn keep_peer(
        &self,
        node: NodeId,
        name: &str,
        address: &str,
        fingerprint: Fingerprint,
    ) -> Result<Peer, String> {
        let name: Name = name.parse().map_err(|error| format!("{error}"))?;
        let peer = {
            let mut store = self.store.lock().expect("no holder panics");
            let taken = name == self.context.node.name
                || store.by_name(name.as_str()).is_some_and(|known| known.node != node);
            if taken {
                return Err(format!(
                    "the name `{name}` is taken by another node; give one of the two another \
                     `node` in its configuration, or where this one was made anew in place of the \
                     other, `tidelog peer remove {name}` first"
                ));
            }
            let known = store.by_node(node).cloned();
            // A token must not let a stranger take over a peer's name and its copies.
            if let Some(known) = &known
                && !known.fingerprints.contains(&fingerprint)
            {
                return Err(format!(
                    "peer {}: is paired with another key; `tidelog peer remove {}` first, if it \
                     was made anew",
                    known.name, known.name
                ));
            }
            let peer = Peer {
                node,
                name: name.clone(),
                address: (!address.is_empty()).then(|| address.to_owned()),
                fingerprints: vec![fingerprint],
                paired: self.wall(),
                copies: known.as_ref().map(|peer| peer.copies.clone()).unwrap_or_default(),
                paused: known.map_or_else(BTreeSet::new, |peer| peer.paused),
            };
            store.put(peer.clone()).map_err(|error| error.to_string())?;
            peer
        };
        let text = format!("peer {name}: paired");
        self.context.events.emit(Severity::Info, "paired", None, text, Value::Null);
        self.add_core(&peer);
        Ok(peer)
    }
}
