//! Registration tokens: `IID:APA91b` and 134 base64url characters, which are these 100 bytes and 4 zero bits.
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 1 | format version, 1 |
//! | 1 | 4 | id of the token key, big-endian |
//! | 5 | 8 | device tag, big-endian |
//! | 13 | 16 | registration id, random |
//! | 29 | 7 | reserved, zero |
//! | 36 | 64 | HMAC-SHA512 under the token key over bytes 0 to 35 and the text of the IID |
//!
//! One registration has one spelling: other versions, reserved or trailing bits, other base64 and any other length are refused,
//! so equal tokens are equal texts. No token contains `Error`, which clients look for in whole bodies (device.md section 3.2).
//! Frozen; a change needs a new version byte. The device tag tells the shard, so any gateway routes without a look-up.

use std::fmt;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use rand::RngCore;
use sha2::{Digest, Sha256, Sha512};
use subtle::ConstantTimeEq;

use crate::tag::DeviceTag;

const VERSION: u8 = 1;
pub(crate) const SIGNED: usize = 36;
pub(crate) const LEN: usize = 100;
pub(crate) const TEXT_LEN: usize = 134;
pub(crate) const PREFIX: &str = "APA91b";
pub(crate) const FORBIDDEN: &str = "Error";

/// An Instance ID: what stands before the colon, 11 or 22 base64url characters, never containing `Error`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iid(String);

/// A text is no Instance ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an instance id of 11 or 22 base64url characters")]
pub struct NotAnIid;

impl Iid {
    /// Takes an Instance ID as a client named it.
    pub fn parse(text: &str) -> Result<Self, NotAnIid> {
        let fits = matches!(text.len(), 11 | 22) && text.bytes().all(is_base64url) && !text.contains(FORBIDDEN);
        fits.then(|| Self(text.to_owned())).ok_or(NotAnIid)
    }

    /// Draws one for a client that named none: 8 random bytes with the top nibble 7, 11 characters.
    pub fn invent(rng: &mut impl RngCore) -> Self {
        Self::draw::<8>(rng)
    }

    /// Draws a Firebase installation id: 17 random bytes with the top nibble 7, cut to 22 characters.
    pub fn invent_fid(rng: &mut impl RngCore) -> Self {
        Self::draw::<17>(rng)
    }

    fn draw<const N: usize>(rng: &mut impl RngCore) -> Self {
        loop {
            let mut bytes = [0; N];
            rng.fill_bytes(&mut bytes);
            bytes[0] = 0x70 | (bytes[0] & 0x0f);
            let mut text = BASE64_URL_SAFE_NO_PAD.encode(bytes);
            text.truncate(22);
            if let Ok(iid) = Self::parse(&text) {
                return iid;
            }
        }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Iid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names a registration of a device: 128 random bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegistrationId(pub [u8; 16]);

impl RegistrationId {
    /// A new registration's id.
    pub fn draw(rng: &mut impl RngCore) -> Self {
        let mut bytes = [0; 16];
        rng.fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// Takes 16 bytes; `None` for any other length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// Key that mints and verifies tokens. Old keys stay to verify.
#[derive(Clone)]
pub struct TokenKey {
    /// Number of the key, unique in the cluster; it stands in each token.
    pub id: u32,
    secret: [u8; 32],
}

impl TokenKey {
    /// A key of 32 secret bytes.
    pub fn new(id: u32, secret: [u8; 32]) -> Self {
        Self { id, secret }
    }

    /// The MAC of a registration token, or of whatever `iid` says beside one.
    pub(crate) fn mac(&self, signed: &[u8], iid: &str) -> [u8; 64] {
        let mut mac = Hmac::<Sha512>::new_from_slice(&self.secret).expect("HMAC takes a key of any length");
        mac.update(signed);
        mac.update(iid.as_bytes());
        mac.finalize().into_bytes().into()
    }
}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// The text would contain `Error`: draw another registration id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the token would contain `Error`")]
pub struct HoldsError;

/// Why a text is not a registration token of this cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not `IID:APA91b` with 134 base64url characters, or it contains `Error`.
    #[error("not the shape of a token")]
    Shape,
    /// Not the one base64 spelling of its bytes.
    #[error("not canonical base64url")]
    Spelling,
    /// A format version this build does not know.
    #[error("unknown format version")]
    Version,
    /// A reserved byte is not zero.
    #[error("reserved bits are set")]
    Reserved,
    /// The key does not have the id the token names.
    #[error("minted with another key")]
    Key,
    /// The MAC does not fit.
    #[error("not minted here")]
    Mac,
}

/// A registration token whose MAC was made or verified here.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RegistrationToken {
    text: String,
    iid: Iid,
    key_id: u32,
    tag: DeviceTag,
    id: RegistrationId,
}

impl RegistrationToken {
    /// The token of a registration: the same arguments give the same text.
    pub fn mint(key: &TokenKey, iid: &Iid, tag: DeviceTag, id: RegistrationId) -> Result<Self, HoldsError> {
        let mut bytes = [0; LEN];
        bytes[0] = VERSION;
        bytes[1..5].copy_from_slice(&key.id.to_be_bytes());
        bytes[5..13].copy_from_slice(&tag.0.to_be_bytes());
        bytes[13..29].copy_from_slice(&id.0);
        let mac = key.mac(&bytes[..SIGNED], &iid.0);
        bytes[SIGNED..].copy_from_slice(&mac);
        let text = format!("{}:{PREFIX}{}", iid.0, BASE64_URL_SAFE_NO_PAD.encode(bytes));
        if text.contains(FORBIDDEN) {
            return Err(HoldsError);
        }
        Ok(Self { text, iid: iid.clone(), key_id: key.id, tag, id })
    }

    /// A token with a new registration id.
    pub fn draw(key: &TokenKey, iid: &Iid, tag: DeviceTag, rng: &mut impl RngCore) -> Self {
        loop {
            if let Ok(token) = Self::mint(key, iid, tag, RegistrationId::draw(rng)) {
                return token;
            }
        }
    }

    /// Reads a text up to its MAC, which the key it names must still confirm.
    pub fn parse(text: &str) -> Result<UnverifiedToken, TokenError> {
        let (iid, rest) = text.split_once(':').ok_or(TokenError::Shape)?;
        let iid = Iid::parse(iid).map_err(|NotAnIid| TokenError::Shape)?;
        let rest = rest.strip_prefix(PREFIX).ok_or(TokenError::Shape)?;
        if rest.len() != TEXT_LEN || !rest.bytes().all(is_base64url) || text.contains(FORBIDDEN) {
            return Err(TokenError::Shape);
        }
        // The engine refuses trailing bits that are not zero.
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(rest).map_err(|_| TokenError::Spelling)?;
        let bytes: [u8; LEN] = bytes.try_into().map_err(|_| TokenError::Spelling)?;
        if bytes[0] != VERSION {
            return Err(TokenError::Version);
        }
        if bytes[29..SIGNED] != [0; 7] {
            return Err(TokenError::Reserved);
        }
        let token = Self {
            text: text.to_owned(),
            iid,
            key_id: u32::from_be_bytes(bytes[1..5].try_into().expect("4 bytes")),
            tag: DeviceTag(u64::from_be_bytes(bytes[5..13].try_into().expect("8 bytes"))),
            id: RegistrationId(bytes[13..29].try_into().expect("16 bytes")),
        };
        Ok(UnverifiedToken { token, bytes })
    }

    /// The Instance ID before the colon.
    pub fn iid(&self) -> &Iid {
        &self.iid
    }

    /// Id of the key it was minted with.
    pub fn key_id(&self) -> u32 {
        self.key_id
    }

    /// The device, and so the shard.
    pub fn device_tag(&self) -> DeviceTag {
        self.tag
    }

    /// The registration.
    pub fn registration_id(&self) -> RegistrationId {
        self.id
    }

    /// The text. A secret: never to be logged.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for RegistrationToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for RegistrationToken {
    /// See [`fingerprint`].
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RegistrationToken({})", fingerprint(&self.text))
    }
}

/// What logs and operators see of a token or notification key: `#` and the first 8 bytes of its text's SHA-256, enough to follow it,
/// not to use it.
pub fn fingerprint(text: &str) -> String {
    let hash = Sha256::digest(text.as_bytes());
    format!("#{:016x}", u64::from_be_bytes(hash[..8].try_into().expect("a hash has 32 bytes")))
}

/// A text of the right form. Only [`UnverifiedToken::verify`] makes it a token.
#[derive(Clone)]
pub struct UnverifiedToken {
    token: RegistrationToken,
    bytes: [u8; LEN],
}

impl UnverifiedToken {
    /// Id of the key to verify with.
    pub fn key_id(&self) -> u32 {
        self.token.key_id
    }

    /// Confirms the MAC, in constant time.
    pub fn verify(self, key: &TokenKey) -> Result<RegistrationToken, TokenError> {
        if key.id != self.token.key_id {
            return Err(TokenError::Key);
        }
        let mac = key.mac(&self.bytes[..SIGNED], &self.token.iid.0);
        if bool::from(mac.ct_eq(&self.bytes[SIGNED..])) { Ok(self.token) } else { Err(TokenError::Mac) }
    }
}

impl fmt::Debug for UnverifiedToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Unverified{:?}", self.token)
    }
}

pub(crate) fn is_base64url(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_'
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{RngCore, SeedableRng, rngs::StdRng};

    use super::*;

    const ALPHABET: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

    fn key() -> TokenKey {
        TokenKey::new(3, [5; 32])
    }

    fn token(seed: u64) -> RegistrationToken {
        let mut rng = StdRng::seed_from_u64(seed);
        let iid = Iid::invent(&mut rng);
        RegistrationToken::draw(&key(), &iid, DeviceTag(rng.next_u64()), &mut rng)
    }

    fn accepted(text: &str) -> Result<RegistrationToken, TokenError> {
        RegistrationToken::parse(text)?.verify(&key())
    }

    #[test]
    fn rg_07_core_a_token_has_the_shape_of_a_real_one_and_never_holds_the_word_error() {
        for seed in 0..2000 {
            let text = token(seed).to_string();
            assert_eq!(text.len(), 152, "{text}");
            assert_eq!(&text[11..18], ":APA91b");
            assert!(text.bytes().filter(|&byte| !is_base64url(byte)).eq([b':']), "{text}");
            assert!(!text.contains("Error"));
        }
    }

    #[test]
    fn rg_08_core_the_instance_id_stands_before_the_colon() {
        let iid = Iid::parse("dAbCdEfGhIjKlMnOpQrStU").unwrap();
        let token = RegistrationToken::mint(&key(), &iid, DeviceTag(1), RegistrationId([2; 16])).unwrap();
        assert_eq!(token.as_str().len(), 163);
        assert!(token.as_str().starts_with("dAbCdEfGhIjKlMnOpQrStU:APA91b"));
    }

    #[test]
    fn an_instance_id_is_11_or_22_base64url_characters_without_error() {
        for text in ["", "abc", "abcdefghij+", "abcdefghij=", "ErrorAbcdef", "xxxxxxxxxxErrorxxxxxxx", "äbcdefghij"] {
            assert_eq!(Iid::parse(text), Err(NotAnIid), "{text}");
        }
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..100 {
            // The top nibble 7 makes the first character one of these four.
            assert!("cdef".contains(&Iid::invent(&mut rng).as_str()[..1]));
            assert_eq!(Iid::invent_fid(&mut rng).as_str().len(), 22);
        }
    }

    #[test]
    fn a_token_whose_text_would_hold_error_is_refused_by_mint_and_by_parse() {
        // `Error` of the text, put where registration id bytes are: characters 18 to 37 of the base64 are theirs alone.
        let bytes = BASE64_URL_SAFE_NO_PAD.decode("AErrorAAAAAAAAAAAAAA").unwrap();
        let mut id = [0; 16];
        id[2..].copy_from_slice(&bytes[..14]);
        let iid = Iid::parse("abcdefghijk").unwrap();
        assert_eq!(RegistrationToken::mint(&key(), &iid, DeviceTag(1), RegistrationId(id)), Err(HoldsError));
        let mut text = token(1).to_string();
        text.replace_range(60..65, "Error");
        assert_eq!(RegistrationToken::parse(&text).unwrap_err(), TokenError::Shape);
    }

    #[test]
    fn other_versions_reserved_bits_and_other_spellings_are_refused() {
        let good = token(4);
        let with = |at: usize, byte: u8| {
            let mut bytes = BASE64_URL_SAFE_NO_PAD.decode(&good.as_str()[18..]).unwrap();
            bytes[at] = byte;
            format!("{}:APA91b{}", good.iid(), BASE64_URL_SAFE_NO_PAD.encode(bytes))
        };
        assert_eq!(RegistrationToken::parse(&with(0, 2)).unwrap_err(), TokenError::Version);
        for at in 29..36 {
            assert_eq!(RegistrationToken::parse(&with(at, 1)).unwrap_err(), TokenError::Reserved);
        }
        // The last character holds 2 bits of the MAC and 4 zero bits.
        let text = good.as_str();
        let last = ALPHABET.find(&text[text.len() - 1..]).unwrap();
        assert_eq!(last & 0xf, 0);
        for bits in 1..16 {
            let spelled = format!("{}{}", &text[..text.len() - 1], &ALPHABET[last + bits..=last + bits]);
            assert_eq!(RegistrationToken::parse(&spelled).unwrap_err(), TokenError::Spelling);
        }
        for text in [
            format!("{text}="),
            format!("{text}A"),
            format!(" {text}"),
            format!("{text}\n"),
            text[..text.len() - 1].to_owned(),
            text.replacen(':', "", 1),
            text.replacen(':', "::", 1),
            String::new(),
        ] {
            assert_eq!(RegistrationToken::parse(&text).unwrap_err(), TokenError::Shape, "{text}");
        }
    }

    #[test]
    fn debug_shows_a_hash_only() {
        let token = token(9);
        let shown = format!("{token:?} {:?}", RegistrationToken::parse(token.as_str()).unwrap());
        assert!(!shown.contains(&token.as_str()[..11]) && !shown.contains("APA91b"), "{shown}");
    }

    proptest! {
        #[test]
        fn what_was_minted_is_read_back(tag: u64, id: [u8; 16], iid in "[A-Za-z0-9_-]{11}|[A-Za-z0-9_-]{22}") {
            prop_assume!(!iid.contains("Error"));
            let iid = Iid::parse(&iid).unwrap();
            if let Ok(token) = RegistrationToken::mint(&key(), &iid, DeviceTag(tag), RegistrationId(id)) {
                let read = accepted(token.as_str()).unwrap();
                prop_assert_eq!(&read, &token);
                prop_assert_eq!((read.device_tag(), read.registration_id()), (DeviceTag(tag), RegistrationId(id)));
            }
        }

        #[test]
        fn any_changed_character_is_refused(seed: u64, at in 0usize..152, to in 0usize..64) {
            let mut text = token(seed).to_string();
            let to = &ALPHABET[to..=to];
            prop_assume!(&text[at..=at] != to);
            text.replace_range(at..=at, to);
            prop_assert!(accepted(&text).is_err());
        }

        #[test]
        fn another_key_refuses(seed: u64, secret: [u8; 32]) {
            let token = token(seed);
            let other = TokenKey::new(3, secret);
            prop_assert_eq!(RegistrationToken::parse(token.as_str()).unwrap().verify(&other), Err(TokenError::Mac));
            let other = TokenKey::new(4, [5; 32]);
            prop_assert_eq!(RegistrationToken::parse(token.as_str()).unwrap().verify(&other), Err(TokenError::Key));
        }

        #[test]
        fn any_text_is_answered(text: String) {
            prop_assert!(accepted(&text).is_err());
        }
    }
}
