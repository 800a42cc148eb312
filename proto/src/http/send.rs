//! A message of an app server, whichever way it was spelled, and the checks that hold for it as a whole.
//!
//! Leaves to the shard what depends on a registration. The invariant: [`SendRequest::refusal`] is asked before any target is
//! looked at (gcm-http.md section 3.4), and what it passes encodes to a payload within the limit.

use bytes::Bytes;
use prost::Message as _;

use crate::{
    cluster::queue::{Pair, Payload},
    limits::{COLLAPSE_KEY_MAX_BYTES, PAYLOAD_MAX_BYTES, TOPIC_PAYLOAD_MAX_BYTES, TTL_MAX_SECS},
    message::Priority,
    refusal::Refusal,
    topic::Condition,
};

/// A request that cannot be understood: status 400, with this text as the body.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadRequest(pub String);

impl BadRequest {
    pub(super) fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

/// Whom a message is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Targets {
    /// Nobody: answered `MissingRegistration`.
    None,
    /// `to`, or the plain-text form.
    One(String),
    /// `registration_ids`: 1 to 1,000.
    Many(Vec<String>),
    /// `to` or `notification_key`: the notification key of a device group, not looked at yet.
    Group(String),
    /// `to` a topic, or `condition`: whoever subscribes.
    Topics(Condition),
}

impl Targets {
    /// The tokens, in order; a group stands for one, whatever it is refused for as a whole; none where it is for topics.
    pub fn as_slice(&self) -> &[String] {
        match self {
            Self::None | Self::Topics(_) => &[],
            Self::One(token) | Self::Group(token) => std::slice::from_ref(token),
            Self::Many(tokens) => tokens,
        }
    }
}

/// How long a message may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ttl {
    /// Seconds, 0 to [`TTL_MAX_SECS`].
    Secs(u32),
    /// No whole number in range: answered `InvalidTtl`.
    Invalid,
}

impl Default for Ttl {
    fn default() -> Self {
        Self::Secs(TTL_MAX_SECS)
    }
}

impl Ttl {
    /// A number that was given.
    pub(super) fn of(number: Option<f64>) -> Self {
        match number {
            Some(secs) if secs.fract() == 0.0 && (0.0..=f64::from(TTL_MAX_SECS)).contains(&secs) =>
            {
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole and in range")]
                Self::Secs(secs as u32)
            }
            _ => Self::Invalid,
        }
    }
}

/// One message and its targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendRequest {
    /// Whom for.
    pub targets: Targets,
    /// Of the message; never empty.
    pub collapse_key: Option<String>,
    /// As given, or `normal` for data and `high` for notifications. Source: gcm-http.md section 3.2.
    pub priority: Priority,
    /// As given, or four weeks.
    pub ttl: Ttl,
    /// Check everything, store nothing.
    pub dry_run: bool,
    /// The token's application must be this.
    pub restricted_package_name: Option<String>,
    /// `data`: keys and values as strings, in the sender's order.
    pub data: Vec<(String, String)>,
    /// `notification`: likewise; empty is none.
    pub notification: Vec<(String, String)>,
}

impl SendRequest {
    /// Why no target can get it, if so.
    pub fn refusal(&self) -> Option<Refusal> {
        if self.ttl == Ttl::Invalid {
            return Some(Refusal::InvalidTtl);
        }
        if self.data.iter().any(|(key, _)| is_reserved(key)) {
            return Some(Refusal::InvalidDataKey);
        }
        let pairs = self.data.iter().chain(&self.notification);
        let bytes: usize = pairs.map(|(key, value)| key.len() + value.len()).sum();
        let bytes_max =
            if matches!(self.targets, Targets::Topics(_)) { TOPIC_PAYLOAD_MAX_BYTES } else { PAYLOAD_MAX_BYTES };
        let too_big =
            bytes > bytes_max || self.collapse_key.as_ref().is_some_and(|key| key.len() > COLLAPSE_KEY_MAX_BYTES);
        too_big.then_some(Refusal::MessageTooBig)
    }

    /// Seconds to live; four weeks where [`SendRequest::refusal`] was not heeded.
    pub fn ttl_secs(&self) -> u32 {
        match self.ttl {
            Ttl::Secs(secs) => secs,
            Ttl::Invalid => TTL_MAX_SECS,
        }
    }

    /// What a device finds, encoded as a `queue.Payload`. A notification's fields travel under `gcm.notification.`, with
    /// `gcm.n.e`, which old and new client libraries read (device.md section 9.2).
    pub fn payload(&self) -> Bytes {
        let pair = |key: String, value: &String| Pair { key, value: value.clone() };
        let data = self.data.iter().map(|(key, value)| pair(key.clone(), value));
        let notification = self.notification.iter().map(|(key, value)| pair(format!("gcm.notification.{key}"), value));
        let shown = (!self.notification.is_empty()).then(|| pair("gcm.n.e".to_owned(), &"1".to_owned()));
        let app_data = data.chain(notification).chain(shown).collect();
        Payload { app_data, raw_data: Bytes::new() }.encode_to_vec().into()
    }
}

/// Keys a sender may not set. Source: decisions.md, "reserved data keys". Nor may a key be empty: a stanza whose required key
/// is empty counts as malformed (device.md section 11).
fn is_reserved(key: &str) -> bool {
    const WORDS: [&str; 4] = ["from", "message_type", "message_id", "gcm"];
    let google = key.get(..6).is_some_and(|head| head.eq_ignore_ascii_case("google"));
    key.is_empty() || WORDS.contains(&key) || key.starts_with("gcm.") || google
}

/// `Some` unless empty.
pub(super) fn named(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(data: &[(&str, &str)]) -> SendRequest {
        SendRequest {
            targets: Targets::None,
            collapse_key: None,
            priority: Priority::Normal,
            ttl: Ttl::default(),
            dry_run: false,
            restricted_package_name: None,
            data: data.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            notification: Vec::new(),
        }
    }

    #[test]
    fn h058_h059_core_reserved_keys_are_refused_and_their_neighbours_are_not() {
        for key in ["from", "message_type", "message_id", "gcm", "gcm.n.e", "google", "google.x", "GoOgLeX", ""] {
            assert_eq!(with(&[(key, "")]).refusal(), Some(Refusal::InvalidDataKey), "{key}");
        }
        for key in ["From", "gcmx", "goog", "collapse_key", "subtype", "güögle"] {
            assert_eq!(with(&[(key, "")]).refusal(), None, "{key}");
        }
    }

    #[test]
    fn h061_h062_h063_core_keys_and_values_count_in_bytes_up_to_4096() {
        assert_eq!(with(&[("kü", &"v".repeat(4_093))]).refusal(), None);
        assert_eq!(with(&[("kü", &"v".repeat(4_094))]).refusal(), Some(Refusal::MessageTooBig));
        let mut message = with(&[("k", &"v".repeat(4_000))]);
        message.notification = vec![("title".to_owned(), "t".repeat(91))];
        assert_eq!(message.refusal(), Some(Refusal::MessageTooBig));
    }

    #[test]
    fn h064_core_2048_bytes_are_accepted_for_a_topic_and_2049_are_too_big() {
        let sized = |bytes: usize| SendRequest {
            targets: Targets::Topics(Condition::topic("x")),
            ..with(&[("k", &"v".repeat(bytes - 1))])
        };
        assert_eq!(sized(2_048).refusal(), None);
        assert_eq!(sized(2_049).refusal(), Some(Refusal::MessageTooBig));
    }

    #[test]
    fn a_bad_time_to_live_is_told_before_a_bad_key_and_that_before_the_size() {
        let mut message = with(&[("from", &"v".repeat(5_000))]);
        assert_eq!(message.refusal(), Some(Refusal::InvalidDataKey));
        message.ttl = Ttl::Invalid;
        assert_eq!(message.refusal(), Some(Refusal::InvalidTtl));
    }

    #[test]
    fn a_notification_travels_under_both_generations_prefixes() {
        let mut message = with(&[("k", "v")]);
        message.notification = vec![("title".to_owned(), "t".to_owned())];
        let payload = Payload::decode(message.payload()).unwrap();
        let keys: Vec<_> = payload.app_data.iter().map(|pair| pair.key.as_str()).collect();
        assert_eq!(keys, ["k", "gcm.notification.title", "gcm.n.e"]);
    }
}
