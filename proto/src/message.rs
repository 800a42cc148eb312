//! What names a message and its sender: message id, sequence, sender id; and its priority.

use std::{fmt, io::Write as _, str::FromStr};

use base64::{
    Engine,
    alphabet::URL_SAFE,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use rand::RngCore;

use crate::{cluster::queue, limits::PERSISTENT_ID_MAX};

/// Names a message everywhere: told to the app server, persistent id on the device, operation id in the log.
///
/// Text `0:<µs>%<16 lower-case hex digits>`, at most 39 characters. Ids that a gateway mints later are not always greater:
/// order is the mailbox's business ([`Sequence`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId {
    /// Microseconds since 1970 when it was minted.
    pub micros: u64,
    /// Random.
    pub random: u64,
}

/// Names an operation; that of an enqueue is its message's id.
pub type OperationId = MessageId;

/// A text is no message id of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a message id")]
pub struct NotAMessageId;

impl MessageId {
    /// A new id. `wall_micros`: microseconds since 1970 by the wall clock.
    pub fn mint(wall_micros: u64, rng: &mut impl RngCore) -> Self {
        Self { micros: wall_micros, random: rng.next_u64() }
    }

    /// 16 bytes, big-endian: microseconds, random.
    pub fn to_bytes(self) -> [u8; 16] {
        ((u128::from(self.micros) << 64) | u128::from(self.random)).to_be_bytes()
    }

    /// Takes what [`MessageId::to_bytes`] gave; `None` for any other length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let number = u128::from_be_bytes(bytes.try_into().ok()?);
        Some(Self { micros: (number >> 64) as u64, random: (number & u128::from(u64::MAX)) as u64 })
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Spelled whole and handed over once: `to_string` would grow its text four times, for every message.
        let mut text = [0; PERSISTENT_ID_MAX];
        let mut rest = &mut text[..];
        write!(rest, "0:{}%{:016x}", self.micros, self.random).expect("2 + 20 + 1 + 16 characters fit");
        let left = rest.len();
        let spelled = &text[..PERSISTENT_ID_MAX - left];
        f.write_str(std::str::from_utf8(spelled).expect("digits and ASCII signs"))
    }
}

impl FromStr for MessageId {
    type Err = NotAMessageId;

    /// Reads the one spelling that [`MessageId`]'s `Display` writes.
    fn from_str(text: &str) -> Result<Self, NotAMessageId> {
        let parse = || {
            let (micros, random) = text.strip_prefix("0:")?.split_once('%')?;
            let id = Self { micros: micros.parse().ok()?, random: u64::from_str_radix(random, 16).ok()? };
            (id.to_string() == text).then_some(id)
        };
        parse().ok_or(NotAMessageId)
    }
}

/// Place of a message in its mailbox: restores of the cluster, log index, position in the entry. Ordered as delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sequence {
    /// Rises with each restore from a backup.
    pub incarnation: u32,
    /// Index of the log entry.
    pub index: u64,
    /// Position of the command in the entry.
    pub position: u32,
}

impl Sequence {
    /// 16 bytes, big-endian, sorting as the sequences do.
    pub fn to_bytes(self) -> [u8; 16] {
        let number = (u128::from(self.incarnation) << 96) | (u128::from(self.index) << 32) | u128::from(self.position);
        number.to_be_bytes()
    }

    /// Takes what [`Sequence::to_bytes`] gave; `None` for any other length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let number = u128::from_be_bytes(bytes.try_into().ok()?);
        Some(Self {
            incarnation: (number >> 96) as u32,
            index: ((number >> 32) & u128::from(u64::MAX)) as u64,
            position: (number & u128::from(u32::MAX)) as u32,
        })
    }
}

/// Who may send to a registration: a project's number, or an application server's public key (web push).
///
/// Kept as it was spelled: devices look their keys up by it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SenderId(String);

/// A text is no sender id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("neither a project number nor a P-256 public key")]
pub struct NotASenderId;

/// Keys come padded or not, and with whatever bits their encoder left behind the last byte.
const KEY_BASE64: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

impl SenderId {
    /// Takes 1 to 20 digits, or an uncompressed P-256 point in base64url (87 characters, 88 with padding).
    pub fn parse(text: &str) -> Result<Self, NotASenderId> {
        let number = (1..=20).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
        (number || is_public_key(text)).then(|| Self(text.to_owned())).ok_or(NotASenderId)
    }

    /// The text, as it was registered.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is an application server's public key.
    pub fn is_public_key(&self) -> bool {
        self.0.len() > 20
    }
}

impl fmt::Display for SenderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_public_key(text: &str) -> bool {
    matches!(text.len(), 87 | 88)
        && KEY_BASE64.decode(text).is_ok_and(|point| point.len() == 65 && point.first() == Some(&4))
}

/// How urgent a message is. Passed on; never overtakes in a mailbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Priority {
    /// May wait for the device to wake.
    Normal,
    /// Should wake the device.
    High,
}

impl From<Priority> for queue::Priority {
    fn from(priority: Priority) -> Self {
        match priority {
            Priority::Normal => Self::Normal,
            Priority::High => Self::High,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::PERSISTENT_ID_MAX;

    #[test]
    fn dl_18_core_the_longest_message_id_fits_a_persistent_id() {
        let id = MessageId { micros: u64::MAX, random: u64::MAX };
        assert!(id.to_string().len() <= PERSISTENT_ID_MAX);
        assert!(!id.to_string().contains('='), "H023: plain-text clients split at it");
    }

    #[test]
    fn a_message_id_has_one_spelling() {
        let id: MessageId = "0:1700000000000001%00000000000000a1".parse().unwrap();
        assert_eq!(id, MessageId { micros: 1_700_000_000_000_001, random: 0xa1 });
        for text in [
            "",
            "0:",
            "0:1",
            "0:1%",
            "0:1%a1",
            "1:1%00000000000000a1",
            "0:01%00000000000000a1",
            "0:+1%00000000000000a1",
            "0:1%00000000000000A1",
            "0:1%+0000000000000a1",
            "0:1%000000000000000a1",
            " 0:1%00000000000000a1",
            "0:18446744073709551616%00000000000000a1",
        ] {
            assert_eq!(text.parse::<MessageId>(), Err(NotAMessageId), "{text:?}");
        }
    }

    #[test]
    fn a_sender_is_a_number_or_a_public_key() {
        let key = "BDOU99-h67HcA6JeFXHbSNMu7e2yNNu3RzoMj8TM4W88jITfq7ZmPvIM1Iv-4_l2LxQcYwhqby2xGpWwzjfAnG4";
        assert!(SenderId::parse(key).unwrap().is_public_key());
        assert_eq!(SenderId::parse(&format!("{key}=")).unwrap().as_str(), format!("{key}="));
        assert!(!SenderId::parse("123456789012").unwrap().is_public_key());
        for text in ["", "12a", "-1", "123456789012345678901", "*", "A,B", &key[1..], &key.replacen("BD", "AD", 1)] {
            assert_eq!(SenderId::parse(text), Err(NotASenderId), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn a_message_id_is_read_back(micros: u64, random: u64) {
            let id = MessageId { micros, random };
            prop_assert_eq!(id.to_string().parse(), Ok(id));
            prop_assert_eq!(MessageId::from_bytes(&id.to_bytes()), Some(id));
        }

        #[test]
        fn sequences_round_trip_and_sort_as_their_bytes(a: (u32, u64, u32), b: (u32, u64, u32)) {
            let sequence = |(incarnation, index, position)| Sequence { incarnation, index, position };
            let (a, b) = (sequence(a), sequence(b));
            prop_assert_eq!(Sequence::from_bytes(&a.to_bytes()), Some(a));
            prop_assert_eq!(a.to_bytes().cmp(&b.to_bytes()), a.cmp(&b));
        }

        #[test]
        fn any_text_and_bytes_are_answered(text: String, bytes: Vec<u8>) {
            let _ = (text.parse::<MessageId>(), SenderId::parse(&text));
            prop_assert_eq!(MessageId::from_bytes(&bytes).is_some(), bytes.len() == 16);
            prop_assert_eq!(Sequence::from_bytes(&bytes).is_some(), bytes.len() == 16);
        }
    }
}
