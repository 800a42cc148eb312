//! Server keys of projects: drawn or given, kept as a hash.
//!
//! A plain SHA-256 keeps them because they are random and long; a short key that an operator chose is kept no better than it was
//! chosen.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use martlet_proto::cluster::meta::ServerKey;
use rand::CryptoRng;
use sha2::{Digest, Sha256};

use super::state::HINT_MAX;

/// Longest key that is taken, in bytes; it travels in an `Authorization` header.
pub const KEY_MAX: usize = 512;

/// Draws a key: the prefix app servers know from Google's, then 32 random bytes in base64url.
pub fn draw(rng: &mut impl CryptoRng) -> String {
    let mut random = [0; 32];
    rng.fill_bytes(&mut random);
    format!("AIza{}", URL_SAFE_NO_PAD.encode(random))
}

/// What the cluster keeps of a key: its hash, and so many first characters that people can tell keys apart.
pub fn keep(key: &str) -> Result<ServerKey, String> {
    if key.is_empty() || key.len() > KEY_MAX || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(format!("a server key is 1 to {KEY_MAX} visible ASCII characters"));
    }
    // A quarter at most, so that the hint of a short key does not give it away.
    let hint = key[..(key.len() / 4).min(HINT_MAX)].to_owned();
    Ok(ServerKey { sha256: Bytes::copy_from_slice(&Sha256::digest(key)), hint, ..ServerKey::default() })
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn drawn_keys_differ_and_can_be_kept() {
        let mut rng = StdRng::seed_from_u64(3);
        let (one, two) = (draw(&mut rng), draw(&mut rng));
        assert_ne!(one, two);
        assert_eq!(one.len(), 47);
        assert_ne!(keep(&one).unwrap().sha256, keep(&two).unwrap().sha256);
    }

    #[test]
    fn the_hash_is_plain_sha_256_of_the_key_as_the_app_server_sends_it() {
        let kept = keep("abc").unwrap();
        let hex: String = kept.sha256.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(kept.hint, "");
    }

    #[test]
    fn what_cannot_stand_in_a_header_is_no_key() {
        for key in ["", "a b", "é", "a\n", &"x".repeat(513)] {
            assert!(keep(key).is_err(), "{key:?}");
        }
    }
}
