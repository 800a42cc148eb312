//! The cluster secret on a node: read from its file, proved to peers, used to seal the keys of a new cluster.
//!
//! Leaves the form of sealed keys to [`martlet_proto::seal`]. Invariant: the secret is written nowhere; what leaves this module is
//! a MAC under a key drawn from it, or a sealed key.

use std::path::Path;

use bytes::Bytes;
use martlet_proto::{
    cluster::meta::{KeyPurpose, SealedKey},
    seal::{ClusterSecret, SECRET_BYTES, SealError, SecretFileError},
};
use rand::CryptoRng;
use ring::hmac;

/// The cluster secret.
#[derive(Debug, Clone)]
pub struct Secret {
    sealing: ClusterSecret,
    proving: hmac::Key,
}

impl Secret {
    /// Reads the file.
    ///
    /// # Errors
    /// Names the file.
    pub fn read(path: &Path) -> Result<Self, SecretFileError> {
        ClusterSecret::read(path).map(Self::new)
    }

    /// Takes a secret that was read.
    pub fn new(sealing: ClusterSecret) -> Self {
        let whole = hmac::Key::new(hmac::HMAC_SHA256, sealing.to_file_text().as_bytes());
        let drawn = hmac::sign(&whole, b"martlet: proof of the cluster secret, 1");
        Self { sealing, proving: hmac::Key::new(hmac::HMAC_SHA256, drawn.as_ref()) }
    }

    /// Shows that whoever asks `node_id` to join the cluster holds the secret.
    pub fn proof(&self, cluster_id: &[u8], node_id: u64) -> Bytes {
        Bytes::copy_from_slice(hmac::sign(&self.proving, &proved(cluster_id, node_id)).as_ref())
    }

    /// Whether `proof` was made with the same secret; in constant time.
    pub fn proves(&self, cluster_id: &[u8], node_id: u64, proof: &[u8]) -> bool {
        hmac::verify(&self.proving, &proved(cluster_id, node_id), proof).is_ok()
    }

    /// The keys a cluster begins with: token key 1, which mints, check-in key 1, the tag key; sealed.
    pub fn draw_keys(&self, cluster_id: &[u8], now_ms: u64, rng: &mut impl CryptoRng) -> Vec<SealedKey> {
        [KeyPurpose::Token, KeyPurpose::Checkin, KeyPurpose::Tag]
            .map(|purpose| {
                let mut key = [0; SECRET_BYTES];
                rng.fill_bytes(&mut key);
                SealedKey {
                    purpose: purpose.into(),
                    key_id: 1,
                    sealed: self.sealing.seal(cluster_id, purpose, 1, &key, rng),
                    mints: true,
                    created_ms: now_ms,
                }
            })
            .into()
    }

    /// Opens a sealed key.
    pub fn unseal(&self, cluster_id: &[u8], key: &SealedKey) -> Result<[u8; SECRET_BYTES], SealError> {
        self.sealing.unseal(cluster_id, key)
    }
}

fn proved(cluster_id: &[u8], node_id: u64) -> Vec<u8> {
    [cluster_id, &node_id.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    fn secret(byte: u8) -> Secret {
        Secret::new(ClusterSecret::new([byte; 32]))
    }

    #[test]
    fn a_proof_holds_for_one_cluster_one_node_and_one_secret() {
        let proof = secret(1).proof(b"cluster", 2);
        assert!(secret(1).proves(b"cluster", 2, &proof));
        assert!(!secret(1).proves(b"cluster", 3, &proof));
        assert!(!secret(1).proves(b"another", 2, &proof));
        assert!(!secret(2).proves(b"cluster", 2, &proof));
        assert!(!secret(1).proves(b"cluster", 2, b""));
    }

    #[test]
    fn the_first_keys_open_with_the_secret_only_and_are_all_different() {
        let keys = secret(1).draw_keys(b"cluster", 5, &mut StdRng::seed_from_u64(1));
        let open: Vec<_> = keys.iter().map(|key| secret(1).unseal(b"cluster", key).unwrap()).collect();
        assert_eq!(
            keys.iter().map(SealedKey::purpose).collect::<Vec<_>>(),
            [KeyPurpose::Token, KeyPurpose::Checkin, KeyPurpose::Tag]
        );
        assert!(open[0] != open[1] && open[1] != open[2] && open[0] != open[2]);
        for (key, open) in keys.iter().zip(&open) {
            assert!(secret(2).unseal(b"cluster", key).is_err());
            assert!(!key.sealed.windows(8).any(|window| window == &open[..8]));
        }
    }

    #[test]
    fn a_file_without_a_secret_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        assert!(Secret::read(&path).unwrap_err().to_string().contains("secret"));
        std::fs::write(&path, "short").unwrap();
        assert!(matches!(Secret::read(&path), Err(SecretFileError::Form { .. })));
        std::fs::write(&path, "ab".repeat(32)).unwrap();
        let read = Secret::read(&path).unwrap();
        assert!(read.proves(b"c", 1, &secret(0xab).proof(b"c", 1)));
        assert!(!format!("{read:?}").contains("abab"));
    }
}
