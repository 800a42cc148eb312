//! Certificates of the public listeners.
//!
//! Owns reading them and the TLS settings: ring, TLS 1.2 and 1.3, one certificate whatever name the client asks for, because
//! many device clients send none. HTTP offers `h2` and `http/1.1` by ALPN; MCS has no ALPN.

use std::{path::Path, sync::Arc};

use rustls::{ServerConfig, server::NoServerSessionStorage};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

use crate::http::http2;

/// Why the certificate cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or holds no PEM of the kind.
    #[error("{path}: {source}")]
    File {
        /// Of the file.
        path: String,
        /// What is wrong with it.
        source: rustls_pki_types::pem::Error,
    },
    /// Certificate and key do not fit, or rustls refuses them.
    #[error("certificate and key: {0}")]
    Pair(#[from] rustls::Error),
}

/// Settings of the listeners that show one certificate.
#[derive(Debug, Clone)]
pub struct ServerTls {
    /// For HTTP.
    pub http: Arc<ServerConfig>,
    /// For MCS.
    pub mcs: Arc<ServerConfig>,
}

impl ServerTls {
    /// Reads a PEM chain, the listener's own certificate first, and its key.
    ///
    /// # Errors
    /// [`TlsError`] names the file.
    pub fn read(cert_file: &Path, key_file: &Path) -> Result<Self, TlsError> {
        let in_file = |path: &Path| {
            let path = path.display().to_string();
            move |source| TlsError::File { path, source }
        };
        let chain: Vec<CertificateDer<'static>> =
            CertificateDer::pem_file_iter(cert_file).and_then(Iterator::collect).map_err(in_file(cert_file))?;
        let key = PrivateKeyDer::from_pem_file(key_file).map_err(in_file(key_file))?;
        let mut http = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        let mut mcs = http.clone();
        // No tickets: a device reconnects after hours, perhaps elsewhere, and most of a handshake's cost is the key exchange,
        // which a resumed one has as well.
        mcs.send_tls13_tickets = 0;
        mcs.session_storage = Arc::new(NoServerSessionStorage {});
        http.alpn_protocols = vec![http2::ALPN.to_vec(), b"http/1.1".to_vec()];
        Ok(Self { http: Arc::new(http), mcs: Arc::new(mcs) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_and_its_key_are_read_and_a_bad_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(&cert, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        let tls = ServerTls::read(&cert, &key).unwrap();
        assert_eq!(tls.http.alpn_protocols, [&b"h2"[..], b"http/1.1"]);
        assert!(tls.mcs.alpn_protocols.is_empty());
        assert!(ServerTls::read(&cert, &cert).unwrap_err().to_string().contains("cert.pem"));
        let absent = folder.path().join("absent.pem");
        assert!(ServerTls::read(&absent, &key).unwrap_err().to_string().contains("absent.pem"));
    }
}
