//! Why a message is refused for one target, in our words.
//!
//! Each edge has its own table from these to its wire: `http::reply` for HTTP; CCS and gRPC keep theirs. An outcome that was
//! not learned is no refusal (design.md section 5): edges speak of it as [`Refusal::InternalServerError`], never as a definite no.

use crate::cluster::queue;

/// Why one target of a send was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// The message names no target, or an empty one.
    #[error("no registration token given")]
    MissingRegistration,
    /// The target is not a token of this cluster.
    #[error("not a registration token of this cluster")]
    InvalidRegistration,
    /// The registration was once valid, and is gone.
    #[error("the registration is gone")]
    NotRegistered,
    /// The token was not registered for the sender of the key.
    #[error("the token belongs to another sender")]
    MismatchSenderId,
    /// The token's application is not the one the message is restricted to.
    #[error("the token belongs to another application")]
    InvalidPackageName,
    /// The payload is above its limit.
    #[error("the payload is too big")]
    MessageTooBig,
    /// The payload holds a reserved key.
    #[error("the payload holds a reserved key")]
    InvalidDataKey,
    /// The time to live is no whole number of seconds in range.
    #[error("the time to live is out of range")]
    InvalidTtl,
    /// Nothing was or will be accepted: try again later.
    #[error("try again later")]
    Unavailable,
    /// It failed inside, or the outcome is not known.
    #[error("internal error")]
    InternalServerError,
    /// Too many messages to one device.
    #[error("too many messages to this device")]
    DeviceMessageRateExceeded,
    /// Too many messages to topics.
    #[error("too many messages to topics")]
    TopicsMessageRateExceeded,
}

impl Refusal {
    /// Every variant, for tests that walk a table.
    pub const ALL: [Refusal; 12] = [
        Refusal::MissingRegistration,
        Refusal::InvalidRegistration,
        Refusal::NotRegistered,
        Refusal::MismatchSenderId,
        Refusal::InvalidPackageName,
        Refusal::MessageTooBig,
        Refusal::InvalidDataKey,
        Refusal::InvalidTtl,
        Refusal::Unavailable,
        Refusal::InternalServerError,
        Refusal::DeviceMessageRateExceeded,
        Refusal::TopicsMessageRateExceeded,
    ];
}

impl From<queue::Refusal> for Refusal {
    /// What a shard's refusal of an enqueue means to its sender.
    fn from(refusal: queue::Refusal) -> Self {
        match refusal {
            queue::Refusal::NotRegistered => Self::NotRegistered,
            queue::Refusal::MismatchSenderId => Self::MismatchSenderId,
            queue::Refusal::InvalidPackageName => Self::InvalidPackageName,
            // Barred or too old: it was not done and never will be, so trying again under a new id is right.
            queue::Refusal::ExpiredOperation => Self::Unavailable,
            // Stored bytes are used up: they come free as devices fetch.
            queue::Refusal::QuotaExceeded => Self::Unavailable,
            // Of the group that a message is for.
            queue::Refusal::GroupNotFound => Self::NotRegistered,
            queue::Refusal::DeviceRateExceeded => Self::DeviceMessageRateExceeded,
            queue::Refusal::TopicsRateExceeded => Self::TopicsMessageRateExceeded,
            // Not an answer to a send, or a defect of ours.
            queue::Refusal::GroupExists
            | queue::Refusal::GroupFull
            | queue::Refusal::GroupNameMismatch
            | queue::Refusal::NoValidMembers
            | queue::Refusal::TooManyRegistrations
            | queue::Refusal::TooManyTopics
            | queue::Refusal::Malformed
            | queue::Refusal::Unspecified => Self::InternalServerError,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_of_a_shard_has_a_meaning_and_only_passing_ones_say_try_later() {
        for known in (0..100).filter_map(|number| queue::Refusal::try_from(number).ok()) {
            let (number, refusal) = (known as i32, Refusal::from(known));
            let passing = [queue::Refusal::ExpiredOperation as i32, queue::Refusal::QuotaExceeded as i32];
            assert_eq!(refusal == Refusal::Unavailable, passing.contains(&number), "{number}");
        }
    }
}
