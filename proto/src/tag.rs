//! Who a device is: android id, security token, device tag.
//!
//! Check-in stores nothing: the android id is random, the security token a MAC of it under a check-in key. The device tag is a
//! keyed permutation of the android id, so that no two devices share one and a registration token, which holds it, tells nobody
//! the android id. Frozen (test vectors in `tests/vectors`):
//!
//! - tag: 8 Feistel rounds over the android id's halves `left | right` (32 bits each, big-endian). Round `r` (from 0) makes
//!   `left, right = right, left ^ F(r, right)`, where `F` is the first 4 bytes, big-endian, of
//!   HMAC-SHA256(tag key, `martlet tag` | r as one byte | right as 4 bytes BE). The tag is the last `left | right`.
//! - security token: the first 8 bytes, big-endian, of HMAC-SHA256(check-in secret, `martlet check-in` | android id as 8 bytes BE
//!   | n as one byte) with the highest bit cleared, for the first n from 0 that does not give 0.

use std::{fmt, str::FromStr};

use hmac::{Hmac, KeyInit, Mac};
use rand::RngCore;
use sha2::Sha256;
use subtle::ConstantTimeEq;

const ROUNDS: u8 = 8;

/// Name of a device, 1 to 2^63-1: several clients read it as a signed number. Source: device.md section 2.4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AndroidId(u64);

/// A number is not 1 to 2^63-1, or not a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a number from 1 to 2^63-1")]
pub struct NotAnId;

impl AndroidId {
    /// An id of 1 to 2^63-1; `None` otherwise.
    pub fn new(id: u64) -> Option<Self> {
        in_range(id).then_some(Self(id))
    }

    /// The number.
    pub fn get(self) -> u64 {
        self.0
    }

    /// A new device's id.
    pub fn draw(rng: &mut impl RngCore) -> Self {
        loop {
            if let Some(id) = Self::new(rng.next_u64() >> 1) {
                return id;
            }
        }
    }
}

impl fmt::Display for AndroidId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for AndroidId {
    type Err = NotAnId;

    fn from_str(text: &str) -> Result<Self, NotAnId> {
        decimal(text).and_then(Self::new).ok_or(NotAnId)
    }
}

/// Secret of a device, 1 to 2^63-1. Never shown.
#[derive(Clone, Copy)]
pub struct SecurityToken(u64);

impl SecurityToken {
    /// A token of 1 to 2^63-1; `None` otherwise.
    pub fn new(token: u64) -> Option<Self> {
        in_range(token).then_some(Self(token))
    }

    /// The number, to be told to its device alone.
    pub fn get(self) -> u64 {
        self.0
    }

    /// Whether both are the same, in constant time.
    pub fn ct_eq(self, other: Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl fmt::Debug for SecurityToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecurityToken(..)")
    }
}

impl FromStr for SecurityToken {
    type Err = NotAnId;

    fn from_str(text: &str) -> Result<Self, NotAnId> {
        decimal(text).and_then(Self::new).ok_or(NotAnId)
    }
}

/// A decimal of 64 bits, signed or unsigned, as its bits: microG prints ids above 2^63 as negative numbers.
pub fn decimal(text: &str) -> Option<u64> {
    match text.strip_prefix('-') {
        Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
            text.parse::<i64>().ok().map(i64::cast_unsigned)
        }
        None if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().ok(),
        _ => None,
    }
}

fn in_range(number: u64) -> bool {
    (1..=i64::MAX.cast_unsigned()).contains(&number)
}

/// What a cluster knows a device by: the keyed permutation of its android id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceTag(pub u64);

/// Key of the permutation; never rotates, as tags are in tokens and rows.
#[derive(Clone)]
pub struct TagKey([u8; 32]);

impl TagKey {
    /// A key of 32 secret bytes.
    pub fn new(secret: [u8; 32]) -> Self {
        Self(secret)
    }

    /// The tag of a device.
    pub fn tag(&self, id: AndroidId) -> DeviceTag {
        let (mut left, mut right) = halves(id.0);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ self.round(round, right));
        }
        DeviceTag(joined(left, right))
    }

    /// The device of a tag; `None` for a number that is no device's tag.
    pub fn android_id(&self, tag: DeviceTag) -> Option<AndroidId> {
        let (mut left, mut right) = halves(tag.0);
        for round in (0..ROUNDS).rev() {
            (left, right) = (right ^ self.round(round, left), left);
        }
        AndroidId::new(joined(left, right))
    }

    fn round(&self, round: u8, half: u32) -> u32 {
        let out = self.mac(&[b"martlet tag", &[round], &half.to_be_bytes()]);
        u32::from_be_bytes([out[0], out[1], out[2], out[3]])
    }

    /// HMAC-SHA256 over these parts; the first is different for each purpose.
    pub(crate) fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes a key of any length");
        for part in parts {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }
}

impl fmt::Debug for TagKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TagKey(..)")
    }
}

fn halves(number: u64) -> (u32, u32) {
    ((number >> 32) as u32, (number & 0xffff_ffff) as u32)
}

fn joined(left: u32, right: u32) -> u64 {
    (u64::from(left) << 32) | u64::from(right)
}

/// Key that issues and verifies identities. Several live at a time; the newest is tried first.
#[derive(Clone)]
pub struct CheckinKey {
    /// Number of the key, unique in the cluster.
    pub id: u32,
    secret: [u8; 32],
}

impl CheckinKey {
    /// A key of 32 secret bytes.
    pub fn new(id: u32, secret: [u8; 32]) -> Self {
        Self { id, secret }
    }

    /// The security token this key gives to a device.
    pub fn security_token(&self, id: AndroidId) -> SecurityToken {
        for attempt in 0..=u8::MAX {
            let out = self.mac(&[b"martlet check-in", &id.0.to_be_bytes(), &[attempt]]);
            let number = u64::from_be_bytes(out[..8].try_into().expect("a MAC is longer than 8 bytes"));
            if let Some(token) = SecurityToken::new(number & i64::MAX.cast_unsigned()) {
                return token;
            }
        }
        unreachable!("256 MACs of 63 zero bits each")
    }

    /// HMAC-SHA256 of the parts one after the other. Callers separate their uses by the first part.
    pub(crate) fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.secret).expect("HMAC takes a key of any length");
        for part in parts {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }
}

impl fmt::Debug for CheckinKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckinKey").field("id", &self.id).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_signed_decimal_is_the_same_number_as_its_unsigned_form() {
        assert_eq!(decimal("-1"), Some(u64::MAX));
        assert_eq!(decimal("18446744073709551615"), Some(u64::MAX));
        for text in ["", "-", "+1", " 1", "1 ", "0x1", "18446744073709551616", "-9223372036854775809", "--1"] {
            assert_eq!(decimal(text), None, "{text:?}");
        }
    }

    #[test]
    fn an_id_is_1_to_the_greatest_signed_number() {
        assert_eq!(AndroidId::new(0), None);
        assert_eq!(AndroidId::new(1 << 63), None);
        assert_eq!("9223372036854775807".parse().map(AndroidId::get), Ok(i64::MAX as u64));
        assert_eq!("-5".parse::<AndroidId>(), Err(NotAnId));
    }

    #[test]
    fn secrets_are_not_shown() {
        let key = CheckinKey::new(7, [0xab; 32]);
        assert_eq!(format!("{key:?}"), "CheckinKey { id: 7, .. }");
        assert_eq!(format!("{:?}", key.security_token(AndroidId(1))), "SecurityToken(..)");
        assert_eq!(format!("{:?}", TagKey::new([1; 32])), "TagKey(..)");
    }

    proptest! {
        #[test]
        fn the_tag_is_a_bijection(id in 1u64..=i64::MAX as u64, secret: [u8; 32]) {
            let (key, id) = (TagKey::new(secret), AndroidId(id));
            prop_assert_eq!(key.android_id(key.tag(id)), Some(id));
        }

        #[test]
        fn every_number_is_the_tag_of_one_number(tag: u64, secret: [u8; 32]) {
            let key = TagKey::new(secret);
            if let Some(id) = key.android_id(DeviceTag(tag)) {
                prop_assert_eq!(key.tag(id), DeviceTag(tag));
            }
        }

        #[test]
        fn another_key_gives_another_token(id in 1u64..=i64::MAX as u64, a: [u8; 32], b: [u8; 32]) {
            let token = |secret| CheckinKey::new(1, secret).security_token(AndroidId(id));
            prop_assert_eq!(token(a).ct_eq(token(b)), a == b);
        }
    }
}
