//! [`Tls`]: the certificate and the key by which clients know a server, and what their connections are encrypted with.
//!
//! TLS 1.3 and 1.2 as rustls does them, HTTP/1.1 in them. Clients are not asked for certificates: keys tell who may ask.

use crate::{Error, Result};
use std::path::Path;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, pem};
use tokio_rustls::rustls::{self, InconsistentKeys};
use tokio_rustls::server::TlsStream;

const CERT_FLAG: &str = "--tls-cert";
const KEY_FLAG: &str = "--tls-key";

/// What connections are encrypted with.
#[derive(Clone)]
pub struct Tls(TlsAcceptor);

impl std::fmt::Debug for Tls {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

impl Tls {
    /// Of two PEM files: the server's certificate with those that lead to its authority, and its key.
    ///
    /// # Errors
    /// [`Error::Tls`] for a file that cannot be read, is not what it should be, or does not belong to the other.
    pub fn from_files(certificate: &Path, key: &Path) -> Result<Self> {
        let of = |flag, path: &Path, reason: String| Error::Tls { flag, path: path.into(), reason };
        let chain = CertificateDer::pem_file_iter(certificate)
            .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>)
            .map_err(|error| of(CERT_FLAG, certificate, pem_reason(error, "certificate")))?;
        if chain.is_empty() {
            return Err(of(CERT_FLAG, certificate, pem_reason(pem::Error::NoItemsFound, "certificate")));
        }
        let key_der = PrivateKeyDer::from_pem_file(key)
            .map_err(|error| of(KEY_FLAG, key, pem_reason(error, "private key without a password")))?;
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key_der));
        let mut config = config.map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                of(KEY_FLAG, key, format!("this is not the key of the certificate in {}", certificate.display()))
            }
            rustls::Error::InvalidCertificate(_) => of(CERT_FLAG, certificate, error.to_string()),
            other => of(KEY_FLAG, key, other.to_string()),
        })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    /// Greets a client.
    pub(super) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(&self, io: S) -> std::io::Result<TlsStream<S>> {
        self.0.accept(io).await
    }
}

fn pem_reason(error: pem::Error, wanted: &str) -> String {
    match error {
        pem::Error::NoItemsFound => format!("expected a {wanted} in PEM form (`-----BEGIN ...`), found none"),
        pem::Error::Io(error) => error.to_string(),
        other => format!("expected PEM: {other}"),
    }
}
