//! Notification keys, which name device groups: `APA91b` and 134 base64url characters, which are these 100 bytes and 4 zero bits.
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 1 | format version, 1 |
//! | 1 | 4 | id of the token key, big-endian |
//! | 5 | 8 | group tag, big-endian |
//! | 13 | 8 | random: a name that is created again gets another key |
//! | 21 | 15 | reserved, zero |
//! | 36 | 64 | HMAC-SHA512 under the token key over bytes 0 to 35 and `martlet group` |
//!
//! The group tag is the first 8 bytes, big-endian, of HMAC-SHA256(tag key, `martlet group` | length of the sender id as one byte |
//! sender id | name). Like a device tag it tells the shard and nothing else; its key never rotates.
//!
//! A registration token has a colon and a notification key has none, so no text is both; `martlet group` is no Instance ID, so
//! neither's MAC is ever the other's. One group has one spelling, and none contains `Error`, as with tokens. Frozen (test vectors in
//! `tests/vectors`); a change needs a new version byte.

use std::fmt;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use rand::RngCore;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::{
    message::{MessageId, SenderId},
    tag::TagKey,
    token::{
        FORBIDDEN, HoldsError, LEN, PREFIX, RegistrationId, SIGNED, TEXT_LEN, TokenError, TokenKey, fingerprint,
        is_base64url,
    },
};

const VERSION: u8 = 1;
const RESERVED: std::ops::Range<usize> = 21..SIGNED;
/// What stands for the Instance ID under the MAC. Of no length that an Instance ID has.
const PURPOSE: &str = "martlet group";

/// Where a group lives: a keyed hash of its sender and name. Two groups may share one, by chance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupTag(pub u64);

impl GroupTag {
    /// The tag of a sender's group of this name.
    pub fn of(key: &TagKey, sender: &SenderId, name: &str) -> Self {
        let sender = sender.as_str().as_bytes();
        let length = u8::try_from(sender.len()).expect("a sender id has at most 88 characters");
        let mac = key.mac(&[PURPOSE.as_bytes(), &[length], sender, name.as_bytes()]);
        Self(u64::from_be_bytes(mac[..8].try_into().expect("a MAC is longer than 8 bytes")))
    }
}

/// Tells the groups apart that had one name after another: 64 random bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupBits(pub u64);

/// The id of the message that one member gets of a message to its group: the same again for whoever tries again. The first 8 bytes,
/// big-endian, of SHA-256(`martlet group message` | the group's id | registration id), at the time of the group's.
pub fn message_id(of_group: MessageId, member: RegistrationId) -> MessageId {
    let hash =
        Sha256::new().chain_update(b"martlet group message").chain_update(of_group.to_bytes()).chain_update(member.0);
    let hash = hash.finalize();
    let random = u64::from_be_bytes(hash[..8].try_into().expect("a hash has 32 bytes"));
    MessageId { micros: of_group.micros, random }
}

/// A notification key whose MAC was made or verified here.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct NotificationKey {
    text: String,
    key_id: u32,
    tag: GroupTag,
    bits: GroupBits,
}

impl NotificationKey {
    /// The key of a group: the same arguments give the same text.
    pub fn mint(key: &TokenKey, tag: GroupTag, bits: GroupBits) -> Result<Self, HoldsError> {
        let mut bytes = [0; LEN];
        bytes[0] = VERSION;
        bytes[1..5].copy_from_slice(&key.id.to_be_bytes());
        bytes[5..13].copy_from_slice(&tag.0.to_be_bytes());
        bytes[13..21].copy_from_slice(&bits.0.to_be_bytes());
        let mac = key.mac(&bytes[..SIGNED], PURPOSE);
        bytes[SIGNED..].copy_from_slice(&mac);
        let text = format!("{PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(bytes));
        if text.contains(FORBIDDEN) {
            return Err(HoldsError);
        }
        Ok(Self { text, key_id: key.id, tag, bits })
    }

    /// A key for a new group.
    pub fn draw(key: &TokenKey, tag: GroupTag, rng: &mut impl RngCore) -> Self {
        loop {
            if let Ok(drawn) = Self::mint(key, tag, GroupBits(rng.next_u64())) {
                return drawn;
            }
        }
    }

    /// Whether a text could be one: begins as one and has no colon. Only [`NotificationKey::parse`] says that it has the form.
    pub fn resembles(text: &str) -> bool {
        text.starts_with(PREFIX) && !text.contains(':')
    }

    /// Reads a text up to its MAC, which the key it names must still confirm.
    pub fn parse(text: &str) -> Result<UnverifiedNotificationKey, TokenError> {
        let rest = text.strip_prefix(PREFIX).ok_or(TokenError::Shape)?;
        if rest.len() != TEXT_LEN || !rest.bytes().all(is_base64url) || text.contains(FORBIDDEN) {
            return Err(TokenError::Shape);
        }
        // The engine refuses trailing bits that are not zero.
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(rest).map_err(|_| TokenError::Spelling)?;
        let bytes: [u8; LEN] = bytes.try_into().map_err(|_| TokenError::Spelling)?;
        if bytes[0] != VERSION {
            return Err(TokenError::Version);
        }
        if bytes[RESERVED].iter().any(|byte| *byte != 0) {
            return Err(TokenError::Reserved);
        }
        let key = Self {
            text: text.to_owned(),
            key_id: u32::from_be_bytes(bytes[1..5].try_into().expect("4 bytes")),
            tag: GroupTag(u64::from_be_bytes(bytes[5..13].try_into().expect("8 bytes"))),
            bits: GroupBits(u64::from_be_bytes(bytes[13..21].try_into().expect("8 bytes"))),
        };
        Ok(UnverifiedNotificationKey { key, bytes })
    }

    /// Id of the token key it was minted with.
    pub fn key_id(&self) -> u32 {
        self.key_id
    }

    /// The group's tag, and so its shard.
    pub fn group_tag(&self) -> GroupTag {
        self.tag
    }

    /// Which group of that tag.
    pub fn bits(&self) -> GroupBits {
        self.bits
    }

    /// The text. A secret: never to be logged.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for NotificationKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for NotificationKey {
    /// See [`fingerprint`].
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NotificationKey({})", fingerprint(&self.text))
    }
}

/// A text of the right form. Only [`UnverifiedNotificationKey::verify`] makes it a notification key.
#[derive(Clone)]
pub struct UnverifiedNotificationKey {
    key: NotificationKey,
    bytes: [u8; LEN],
}

impl UnverifiedNotificationKey {
    /// Id of the token key to verify with.
    pub fn key_id(&self) -> u32 {
        self.key.key_id
    }

    /// Confirms the MAC, in constant time.
    pub fn verify(self, key: &TokenKey) -> Result<NotificationKey, TokenError> {
        if key.id != self.key.key_id {
            return Err(TokenError::Key);
        }
        let mac = key.mac(&self.bytes[..SIGNED], PURPOSE);
        if bool::from(mac.ct_eq(&self.bytes[SIGNED..])) { Ok(self.key) } else { Err(TokenError::Mac) }
    }
}

impl fmt::Debug for UnverifiedNotificationKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Unverified{:?}", self.key)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;
    use crate::{
        tag::DeviceTag,
        token::{Iid, RegistrationToken},
    };

    fn key() -> TokenKey {
        TokenKey::new(3, [5; 32])
    }

    fn accepted(text: &str) -> Result<NotificationKey, TokenError> {
        NotificationKey::parse(text)?.verify(&key())
    }

    #[test]
    fn h140_core_a_notification_key_is_the_tail_of_a_token_without_a_colon_and_never_holds_the_word_error() {
        let mut rng = StdRng::seed_from_u64(1);
        for tag in 0..2000 {
            let drawn = NotificationKey::draw(&key(), GroupTag(tag), &mut rng);
            let text = drawn.as_str();
            assert_eq!(text.len(), 140, "{text}");
            assert!(NotificationKey::resembles(text) && text.bytes().all(is_base64url) && !text.contains("Error"));
            assert_eq!(accepted(text), Ok(drawn.clone()));
            assert_eq!(RegistrationToken::parse(text).unwrap_err(), TokenError::Shape);
        }
    }

    #[test]
    fn neither_is_taken_for_the_other_when_an_instance_id_is_put_before_it_or_taken_away() {
        let iid = Iid::parse("abcdefghijk").unwrap();
        let token = RegistrationToken::mint(&key(), &iid, DeviceTag(1), RegistrationId([0; 16])).unwrap();
        assert_eq!(accepted(&token.as_str()[12..]), Err(TokenError::Mac), "a token without its Instance ID");
        let group = NotificationKey::mint(&key(), GroupTag(1), GroupBits(0)).unwrap();
        let posing = RegistrationToken::parse(&format!("abcdefghijk:{group}")).unwrap().verify(&key());
        assert_eq!(posing, Err(TokenError::Mac), "a notification key with one");
        assert_eq!(accepted(token.as_str()), Err(TokenError::Shape));
    }

    #[test]
    fn h152_core_the_same_name_of_two_senders_is_two_tags_and_so_is_any_other_cut_of_sender_and_name() {
        let tag =
            |sender: &str, name: &str| GroupTag::of(&TagKey::new([7; 32]), &SenderId::parse(sender).unwrap(), name);
        assert_eq!(tag("12", "3"), tag("12", "3"));
        assert_ne!(tag("12", "3"), tag("1", "23"));
        assert_ne!(tag("12", "a"), tag("13", "a"));
        assert_ne!(tag("12", "a"), tag("12", "b"));
    }

    #[test]
    fn h150_core_each_member_has_an_id_of_its_own_which_is_the_same_again() {
        let id = |random, member| message_id(MessageId { micros: 5, random }, RegistrationId([member; 16]));
        assert_eq!(id(1, 2), id(1, 2));
        assert_eq!(id(1, 2).micros, 5);
        assert!(id(1, 2) != id(1, 3) && id(1, 2) != id(2, 2));
    }

    #[test]
    fn debug_shows_a_hash_only() {
        let drawn = NotificationKey::mint(&key(), GroupTag(9), GroupBits(1)).unwrap();
        let shown = format!("{drawn:?} {:?}", NotificationKey::parse(drawn.as_str()).unwrap());
        assert!(!shown.contains("APA91b"), "{shown}");
    }

    proptest! {
        #[test]
        fn what_was_minted_is_read_back(tag: u64, bits: u64) {
            if let Ok(minted) = NotificationKey::mint(&key(), GroupTag(tag), GroupBits(bits)) {
                let read = accepted(minted.as_str()).unwrap();
                prop_assert_eq!(&read, &minted);
                prop_assert_eq!((read.group_tag(), read.bits(), read.key_id()), (GroupTag(tag), GroupBits(bits), 3));
            }
        }

        #[test]
        fn any_text_is_answered(text: String, tail in "APA91b[A-Za-z0-9_-]{134}") {
            prop_assert!(accepted(&text).is_err());
            prop_assert!(accepted(&tail).is_err());
        }
    }
}
