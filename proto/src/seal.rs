//! Sealing of the keys that the meta group holds (design.md section 8).
//!
//! Owns the form of [`SealedKey::sealed`]: ChaCha20-Poly1305 under the cluster secret, `nonce (12) ‖ ciphertext ‖ tag (16)`;
//! associated data is the cluster id, the purpose's number and the key id (4 bytes each, big-endian), so that a sealed key cannot
//! be passed off as another one. Frozen (test vectors in `tests/vectors`): stored rows of the meta group hold sealed keys.
//! Leaves to its callers where the secret lies (never in the data directory, log, snapshot or backup).
//! Invariant: nothing here prints a secret or a key.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use rand::RngCore;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use crate::cluster::meta::{KeyPurpose, SealedKey};

/// Length of the cluster secret and of every key sealed with it, in bytes.
pub const SECRET_BYTES: usize = 32;

/// What seals the keys of one cluster; lives outside every data directory.
#[derive(Clone)]
pub struct ClusterSecret([u8; SECRET_BYTES]);

/// Why a sealed key could not be opened, or a secret not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// Another cluster secret, another key's place, or damaged bytes: the AEAD does not tell them apart.
    #[error("the key does not open with this cluster secret")]
    DoesNotOpen,
    /// What was sealed is not a key of [`SECRET_BYTES`].
    #[error("the sealed key has not 32 bytes")]
    Length,
    /// The secret file does not hold 64 hexadecimal digits.
    #[error("the cluster secret is not 64 hexadecimal digits")]
    NotASecret,
}

/// Why the file of a cluster secret cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretFileError {
    /// It cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It holds something else.
    #[error("{path}: {source}", path = path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: SealError,
    },
}

impl ClusterSecret {
    /// Reads the file of a secret, which nodes and gateways have in the same form: see [`ClusterSecret::parse`].
    ///
    /// # Errors
    /// [`SecretFileError`] names the file.
    pub fn read(path: &Path) -> Result<Self, SecretFileError> {
        let bytes = fs::read(path).map_err(|source| SecretFileError::Io { path: path.into(), source })?;
        let parsed = std::str::from_utf8(&bytes).map_err(|_| SealError::NotASecret).and_then(Self::parse);
        parsed.map_err(|source| SecretFileError::Form { path: path.into(), source })
    }

    /// Takes the secret's bytes.
    pub fn new(secret: [u8; SECRET_BYTES]) -> Self {
        Self(secret)
    }

    /// Draws a new one; `rng` must be cryptographic.
    pub fn draw(rng: &mut impl RngCore) -> Self {
        let mut secret = [0; SECRET_BYTES];
        rng.fill_bytes(&mut secret);
        Self(secret)
    }

    /// Reads the form of a secret file: 64 hexadecimal digits, white space around them.
    ///
    /// # Errors
    /// [`SealError::NotASecret`] for anything else.
    pub fn parse(text: &str) -> Result<Self, SealError> {
        let digits = text.trim().as_bytes();
        if digits.len() != 2 * SECRET_BYTES {
            return Err(SealError::NotASecret);
        }
        let mut secret = [0; SECRET_BYTES];
        for (byte, pair) in secret.iter_mut().zip(digits.chunks_exact(2)) {
            let [high, low] = [pair[0], pair[1]].map(|digit| char::from(digit).to_digit(16));
            let (Some(high), Some(low)) = (high, low) else { return Err(SealError::NotASecret) };
            *byte = u8::try_from(high * 16 + low).expect("two hexadecimal digits are a byte");
        }
        Ok(Self(secret))
    }

    /// The form of a secret file, the inverse of [`ClusterSecret::parse`]. For that file only.
    pub fn to_file_text(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Seals one key; `rng` draws the nonce and must be cryptographic.
    pub fn seal(
        &self,
        cluster_id: &[u8],
        purpose: KeyPurpose,
        key_id: u32,
        key: &[u8; SECRET_BYTES],
        rng: &mut impl RngCore,
    ) -> Bytes {
        let mut nonce = [0; NONCE_LEN];
        rng.fill_bytes(&mut nonce);
        let mut body = key.to_vec();
        self.aead()
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(associated(cluster_id, purpose as i32, key_id)),
                &mut body,
            )
            .expect("32 bytes are below the limit of the AEAD");
        [&nonce[..], &body].concat().into()
    }

    /// Opens a key of the cluster `cluster_id`.
    ///
    /// # Errors
    /// [`SealError`] when it was sealed by another secret or for another place, is damaged, or is no key.
    pub fn unseal(&self, cluster_id: &[u8], key: &SealedKey) -> Result<[u8; SECRET_BYTES], SealError> {
        let Some((nonce, body)) = key.sealed.split_first_chunk::<NONCE_LEN>() else {
            return Err(SealError::DoesNotOpen);
        };
        let mut body = body.to_vec();
        let opened = self
            .aead()
            .open_in_place(
                Nonce::assume_unique_for_key(*nonce),
                Aad::from(associated(cluster_id, key.purpose, key.key_id)),
                &mut body,
            )
            .map_err(|_| SealError::DoesNotOpen)?;
        <[u8; SECRET_BYTES]>::try_from(&*opened).map_err(|_| SealError::Length)
    }

    fn aead(&self) -> LessSafeKey {
        LessSafeKey::new(
            UnboundKey::new(&CHACHA20_POLY1305, &self.0).expect("the secret has the length of the cipher's key"),
        )
    }
}

impl fmt::Debug for ClusterSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterSecret(..)")
    }
}

fn associated(cluster_id: &[u8], purpose: i32, key_id: u32) -> Vec<u8> {
    [cluster_id, &purpose.to_be_bytes(), &key_id.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    fn sealed(secret: &ClusterSecret, rng: &mut StdRng) -> SealedKey {
        SealedKey {
            purpose: KeyPurpose::Token.into(),
            key_id: 3,
            sealed: secret.seal(b"cluster", KeyPurpose::Token, 3, &[7; 32], rng),
            mints: true,
            created_ms: 1,
        }
    }

    #[test]
    fn a_sealed_key_opens_with_its_secret_in_its_place_only() {
        let mut rng = StdRng::seed_from_u64(1);
        let secret = ClusterSecret::draw(&mut rng);
        let key = sealed(&secret, &mut rng);
        assert_eq!(secret.unseal(b"cluster", &key), Ok([7; 32]));
        assert_eq!(secret.unseal(b"another", &key), Err(SealError::DoesNotOpen));
        assert_eq!(ClusterSecret::draw(&mut rng).unseal(b"cluster", &key), Err(SealError::DoesNotOpen));
        let moved = SealedKey { key_id: 4, ..key.clone() };
        assert_eq!(secret.unseal(b"cluster", &moved), Err(SealError::DoesNotOpen));
        let renamed = SealedKey { purpose: KeyPurpose::Tag.into(), ..key };
        assert_eq!(secret.unseal(b"cluster", &renamed), Err(SealError::DoesNotOpen));
    }

    #[test]
    fn damaged_or_short_bytes_are_refused() {
        let mut rng = StdRng::seed_from_u64(2);
        let secret = ClusterSecret::draw(&mut rng);
        let key = sealed(&secret, &mut rng);
        for len in 0..key.sealed.len() {
            let cut = SealedKey { sealed: key.sealed.slice(..len), ..key.clone() };
            assert_eq!(secret.unseal(b"cluster", &cut), Err(SealError::DoesNotOpen));
        }
    }

    #[test]
    fn the_text_of_a_secret_file_is_read_back_and_never_shown() {
        let secret = ClusterSecret::new([0xa5; 32]);
        let text = secret.to_file_text();
        assert_eq!(ClusterSecret::parse(&format!("{text}\n")).unwrap().to_file_text(), text);
        assert_eq!(ClusterSecret::parse("xyz").unwrap_err(), SealError::NotASecret);
        assert_eq!(ClusterSecret::parse(&"é".repeat(32)).unwrap_err(), SealError::NotASecret);
        assert!(!format!("{secret:?}").contains("a5"));
    }

    #[test]
    fn a_secret_file_of_raw_bytes_is_refused_by_name() {
        let path = std::env::temp_dir().join(format!("martlet-secret-{}", std::process::id()));
        for content in [&[0x80; SECRET_BYTES][..], &[b'a'; SECRET_BYTES], b""] {
            fs::write(&path, content).unwrap();
            let error = ClusterSecret::read(&path).unwrap_err();
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
            assert!(matches!(error, SecretFileError::Form { source: SealError::NotASecret, .. }), "{error}");
        }
        fs::write(&path, format!("{}\n", "5A".repeat(SECRET_BYTES))).unwrap();
        assert_eq!(ClusterSecret::read(&path).unwrap().to_file_text(), "5a".repeat(SECRET_BYTES));
        fs::remove_file(&path).unwrap();
        assert!(matches!(ClusterSecret::read(&path), Err(SecretFileError::Io { .. })));
    }
}
