//! How two nodes come to know each other's keys: a one-time token, and the proof that both sides of
//! one TLS session hold it.
//!
//! The token names the inviter's key by its SHA-256 fingerprint, so the joiner knows that it talks
//! to the inviter, and carries a 128-bit secret. Each side proves that it knows the secret by an
//! HMAC over keying material exported from the TLS session (RFC 8446, 7.5): a proof is worth
//! nothing in any other session, so a relay in the middle cannot use it. A token is good for
//! [`INVITE_VALID`], for one pairing, and for [`TRIES`] wrong proofs.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use ring::{digest, hmac};

/// How long a token is good for.
pub const INVITE_VALID: Duration = Duration::from_secs(15 * 60);
/// Wrong proofs after which no token of this node is good any more.
pub const TRIES: u32 = 5;
/// Used tokens that are remembered, to tell who comes with one again.
const USED_MAX: usize = 8;
/// The label under which both sides export keying material.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-tidelog-pairing-1";
/// Bytes of exported keying material.
pub const EXPORTER_BYTES: usize = 32;

const PREFIX: &str = "tidelog1-";
const CHECK_BYTES: usize = 2;

/// SHA-256 of a public key as it stands in a certificate (SubjectPublicKeyInfo, DER).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// The fingerprint of a key.
    #[must_use]
    pub fn of(subject_public_key_info: &[u8]) -> Fingerprint {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest::digest(&digest::SHA256, subject_public_key_info).as_ref());
        Fingerprint(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = hex::FromHexError;
    fn from_str(text: &str) -> Result<Self, hex::FromHexError> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map(|()| Fingerprint(bytes))
    }
}

/// What the operator carries from one node to the other. Whoever has it can pair, once.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// The inviter's key.
    pub fingerprint: Fingerprint,
    /// Known to inviter and joiner alone.
    pub secret: [u8; 16],
}

/// Text that is no token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "token: {0}; copy it whole, or make a new one with `tidelog peer invite` on the other node"
)]
pub struct TokenError(&'static str);

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(48 + CHECK_BYTES);
        bytes.extend_from_slice(&self.fingerprint.0);
        bytes.extend_from_slice(&self.secret);
        let check = digest::digest(&digest::SHA256, &bytes);
        bytes.extend_from_slice(&check.as_ref()[..CHECK_BYTES]);
        write!(f, "{PREFIX}{}", hex::encode(bytes))
    }
}

/// Never shows the secret.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.fingerprint)
    }
}

impl FromStr for Token {
    type Err = TokenError;
    fn from_str(text: &str) -> Result<Self, TokenError> {
        let digits =
            text.trim().strip_prefix(PREFIX).ok_or(TokenError("does not begin as a token does"))?;
        let mut bytes = [0; 48 + CHECK_BYTES];
        hex::decode_to_slice(digits, &mut bytes)
            .map_err(|_| TokenError("has the wrong length, or letters that no token has"))?;
        let (body, check) = bytes.split_at(48);
        if &digest::digest(&digest::SHA256, body).as_ref()[..CHECK_BYTES] != check {
            return Err(TokenError("has a mistyped letter"));
        }
        let mut token = Token { fingerprint: Fingerprint([0; 32]), secret: [0; 16] };
        token.fingerprint.0.copy_from_slice(&body[..32]);
        token.secret.copy_from_slice(&body[32..]);
        Ok(token)
    }
}

/// Which side of a pairing proves itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one who was given the token.
    Joiner,
    /// The one who made it.
    Inviter,
}

/// The proof that one side of a TLS session holds the secret.
#[must_use]
pub fn proof(side: Side, secret: &[u8; 16], exported: &[u8; EXPORTER_BYTES]) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(hmac::sign(&key(secret), &message(side, exported)).as_ref());
    bytes
}

/// Whether a proof is the other side's.
#[must_use]
pub fn proof_holds(
    side: Side,
    secret: &[u8; 16],
    exported: &[u8; EXPORTER_BYTES],
    given: &[u8; 32],
) -> bool {
    hmac::verify(&key(secret), &message(side, exported), given).is_ok()
}

fn key(secret: &[u8; 16]) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, secret)
}

fn message(side: Side, exported: &[u8; EXPORTER_BYTES]) -> Vec<u8> {
    let role: &[u8] = match side {
        Side::Joiner => b"joiner",
        Side::Inviter => b"inviter",
    };
    [role, exported].concat()
}

struct Invite {
    secret: [u8; 16],
    expires: Duration,
}

/// Why a joiner is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PairError {
    /// The token has made its one pairing.
    #[error(
        "pairing: this token was already used: each pairs one node; make another with `tidelog \
         peer invite` on the other node"
    )]
    Used,
    /// Nothing was invited, or it expired.
    #[error(
        "pairing: no token is open here: they last 15 minutes and work once; make one with \
         `tidelog peer invite` on the other node"
    )]
    NoneOpen,
    /// The proof fits no token.
    #[error("pairing: wrong token; copy the latest one that `tidelog peer invite` printed")]
    Wrong,
    /// The proof fits no token, once too often.
    #[error(
        "pairing: wrong token, too many times: all open tokens are void; make one with \
         `tidelog peer invite` on the other node"
    )]
    TooManyTries,
}

/// The token that this node has open, and those that were used. Time is the monotonic clock.
#[derive(Default)]
pub struct Invites {
    open: Option<Invite>,
    used: Vec<[u8; 16]>,
    wrong_proofs: u32,
}

impl Invites {
    /// Opens a token with this secret, in place of the one before.
    pub fn open(&mut self, now: Duration, secret: [u8; 16]) {
        self.expire(now);
        if self.open.is_none() {
            self.wrong_proofs = 0;
        }
        self.open = Some(Invite { secret, expires: now + INVITE_VALID });
    }

    /// Takes the token that a joiner's proof fits; it is used up. Returns its secret.
    ///
    /// # Errors
    ///
    /// Where no open token fits.
    pub fn take(
        &mut self,
        now: Duration,
        exported: &[u8; EXPORTER_BYTES],
        given: &[u8; 32],
    ) -> Result<[u8; 16], PairError> {
        self.expire(now);
        let fits = |secret: &[u8; 16]| proof_holds(Side::Joiner, secret, exported, given);
        if let Some(invite) = self.open.take_if(|invite| fits(&invite.secret)) {
            if self.used.len() == USED_MAX {
                self.used.remove(0);
            }
            self.used.push(invite.secret);
            return Ok(invite.secret);
        }
        if self.used.iter().any(fits) {
            return Err(PairError::Used);
        }
        if self.open.is_none() {
            return Err(PairError::NoneOpen);
        }
        self.wrong_proofs += 1;
        if self.wrong_proofs >= TRIES {
            self.open = None;
            return Err(PairError::TooManyTries);
        }
        Err(PairError::Wrong)
    }

    fn expire(&mut self, now: Duration) {
        self.open.take_if(|invite| now >= invite.expires);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: [u8; 32] = [7; 32];

    #[test]
    fn a_token_survives_its_text_and_a_mistyped_letter_is_noticed() {
        let token = Token { fingerprint: Fingerprint([0xab; 32]), secret: [3; 16] };
        let text = token.to_string();
        assert_eq!(text.parse::<Token>().unwrap(), token);
        assert!(!format!("{token:?}").contains("0303"), "the secret is not shown");
        let mistyped = text.replacen("ab", "ac", 1);
        assert!(mistyped.parse::<Token>().unwrap_err().to_string().contains("mistyped"));
        for wrong in ["", "tidelog1-", "tidelog1-zz", &text[..text.len() - 1]] {
            assert!(wrong.parse::<Token>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_proof_holds_in_its_session_from_its_side_alone() {
        let given = proof(Side::Joiner, &[1; 16], &SESSION);
        assert!(proof_holds(Side::Joiner, &[1; 16], &SESSION, &given));
        assert!(!proof_holds(Side::Joiner, &[1; 16], &[8; 32], &given));
        assert!(!proof_holds(Side::Inviter, &[1; 16], &SESSION, &given));
        assert!(!proof_holds(Side::Joiner, &[2; 16], &SESSION, &given));
    }

    #[test]
    fn a_token_works_once_and_who_comes_again_is_told_so() {
        let mut invites = Invites::default();
        invites.open(Duration::ZERO, [1; 16]);
        let given = proof(Side::Joiner, &[1; 16], &SESSION);
        assert_eq!(invites.take(Duration::ZERO, &SESSION, &given), Ok([1; 16]));
        assert_eq!(invites.take(Duration::ZERO, &SESSION, &given), Err(PairError::Used));
        invites.open(Duration::ZERO, [2; 16]);
        assert_eq!(invites.take(Duration::ZERO, &SESSION, &given), Err(PairError::Used));
    }

    #[test]
    fn a_newer_token_takes_the_place_of_the_one_before() {
        let mut invites = Invites::default();
        invites.open(Duration::ZERO, [1; 16]);
        invites.open(Duration::ZERO, [2; 16]);
        let old = proof(Side::Joiner, &[1; 16], &SESSION);
        assert_eq!(invites.take(Duration::ZERO, &SESSION, &old), Err(PairError::Wrong));
        let new = proof(Side::Joiner, &[2; 16], &SESSION);
        assert_eq!(invites.take(Duration::ZERO, &SESSION, &new), Ok([2; 16]));
    }

    #[test]
    fn a_token_expires_after_fifteen_minutes() {
        let mut invites = Invites::default();
        invites.open(Duration::ZERO, [1; 16]);
        let given = proof(Side::Joiner, &[1; 16], &SESSION);
        let late = invites.take(INVITE_VALID, &SESSION, &given);
        assert_eq!(late, Err(PairError::NoneOpen));
        invites.open(INVITE_VALID, [1; 16]);
        let last_moment = INVITE_VALID * 2 - Duration::from_nanos(1);
        assert!(invites.take(last_moment, &SESSION, &given).is_ok());
    }

    #[test]
    fn few_wrong_proofs_void_every_token() {
        let mut invites = Invites::default();
        invites.open(Duration::ZERO, [1; 16]);
        let wrong = proof(Side::Joiner, &[9; 16], &SESSION);
        for _ in 1..TRIES {
            assert_eq!(invites.take(Duration::ZERO, &SESSION, &wrong), Err(PairError::Wrong));
        }
        assert_eq!(invites.take(Duration::ZERO, &SESSION, &wrong), Err(PairError::TooManyTries));
        let right = proof(Side::Joiner, &[1; 16], &SESSION);
        assert_eq!(invites.take(Duration::ZERO, &SESSION, &right), Err(PairError::NoneOpen));
    }
}
