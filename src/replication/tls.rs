//! TLS between peers: version 1.3 alone, both sides show a certificate, and what counts of it is
//! the public key.
//!
//! The certificate is made at each start around the node's persistent key and is only the envelope
//! that TLS asks for: names, issuers and validity dates in it mean nothing. Both verifiers accept
//! any certificate whose key signed the handshake; who that key belongs to is decided by its
//! fingerprint right after the handshake, before a byte from it is used for anything but the hello.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, Error, PeerMisbehaved, ServerConfig,
    SignatureScheme,
};

use super::pairing::Fingerprint;

/// A node's key, and the TLS settings made of it.
pub struct Identity {
    /// Fingerprint of the public key.
    pub fingerprint: Fingerprint,
    /// For connections that this node dials.
    pub client: Arc<ClientConfig>,
    /// For connections that it accepts.
    pub server: Arc<ServerConfig>,
}

/// A new private key: PKCS #8, DER.
///
/// # Errors
///
/// Where the crypto library cannot make one.
pub fn new_key() -> Result<Vec<u8>, String> {
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519)
        .map_err(|error| format!("peer key: cannot be made: {error}"))?;
    Ok(pair.serialize_der())
}

impl Identity {
    /// The identity of a private key (PKCS #8, DER).
    ///
    /// # Errors
    ///
    /// Where the bytes are no key.
    pub fn from_key(key: &[u8]) -> Result<Identity, String> {
        let broken = |error: &dyn std::fmt::Display| format!("peer key: {error}");
        let pair = rcgen::KeyPair::try_from(key).map_err(|error| broken(&error))?;
        let parameters = rcgen::CertificateParams::new(vec!["tidelog".to_owned()])
            .map_err(|error| broken(&error))?;
        let certificate = parameters.self_signed(&pair).map_err(|error| broken(&error))?;
        let certificate = certificate.der().clone();
        let fingerprint = fingerprint_of(&certificate).map_err(|error| broken(&error))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = Arc::new(AnyKey { algorithms: provider.signature_verification_algorithms });
        let private = || PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.to_vec()));
        let client = client_config(&provider, &verifier, certificate.clone(), private())
            .map_err(|error| broken(&error))?;
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| broken(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate], private())
            .map_err(|error| broken(&error))?;
        Ok(Identity { fingerprint, client: Arc::new(client), server: Arc::new(server) })
    }
}

fn client_config(
    provider: &Arc<CryptoProvider>,
    verifier: &Arc<AnyKey>,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig, Error> {
    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(verifier) as Arc<dyn ServerCertVerifier>)
        .with_client_auth_cert(vec![certificate], key)?;
    // Every session proves both keys anew.
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

/// The name that TLS asks for; nothing checks it.
#[must_use]
pub fn server_name() -> ServerName<'static> {
    ServerName::try_from("tidelog").expect("a constant name")
}

/// The fingerprint of the key in the certificate that the other side showed.
///
/// # Errors
///
/// Where there is none, or it cannot be read.
pub fn peer_fingerprint(
    certificates: Option<&[CertificateDer<'_>]>,
) -> Result<Fingerprint, String> {
    let certificate =
        certificates.and_then(<[_]>::first).ok_or("the peer showed no certificate")?;
    fingerprint_of(certificate).map_err(|error| error.to_string())
}

fn fingerprint_of(certificate: &CertificateDer<'_>) -> Result<Fingerprint, Error> {
    let parsed = ParsedCertificate::try_from(certificate)?;
    Ok(Fingerprint::of(&parsed.subject_public_key_info()))
}

/// Accepts any key that signed the handshake; see the module's words.
#[derive(Debug)]
struct AnyKey {
    algorithms: WebPkiSupportedAlgorithms,
}

impl AnyKey {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        ParsedCertificate::try_from(certificate).map(|_| ())
    }

    fn signed(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn never_tls12() -> Error {
        Error::PeerMisbehaved(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme)
    }
}

impl ServerCertVerifier for AnyKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(AnyKey::never_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for AnyKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(AnyKey::never_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_keeps_its_fingerprint_over_certificates() {
        let key = new_key().unwrap();
        let first = Identity::from_key(&key).unwrap();
        let second = Identity::from_key(&key).unwrap();
        assert_eq!(first.fingerprint, second.fingerprint);
        let other = Identity::from_key(&new_key().unwrap()).unwrap();
        assert_ne!(first.fingerprint, other.fingerprint);
        assert!(Identity::from_key(b"no key").is_err());
    }
}
