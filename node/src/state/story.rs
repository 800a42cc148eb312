//! How messages end, told to whoever asks for their story.
//!
//! Owns what is said of a message at the moment it leaves its mailbox, or finds no place there. Keeps nothing: `shard/stories.rs` does,
//! in memory, on every replica. The invariant: whatever is counted with a fate is told with the same, in the same entry.

use martlet_proto::{
    message::{MessageId, Sequence},
    tag::DeviceTag,
    token::RegistrationId,
};

use super::{count::Fate, mailbox::MailboxRow, warm::Brief};

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The device acked it.
    Delivered {
        /// The gateway that brought the ack: the beginning of its id; 0 when it is not known.
        gateway: u32,
    },
    /// Its time to live ended.
    Expired,
    /// A newer message took its place: one of its collapse key, or of a key too many.
    Collapsed {
        /// Which.
        by: MessageId,
    },
    /// A limit of the mailbox dropped it.
    Overflow,
    /// Its registration went.
    Unregistered,
    /// An operator took it back.
    Recalled,
}

impl End {
    /// As what it is counted.
    pub(super) fn fate(self) -> Fate {
        match self {
            Self::Delivered { .. } => Fate::Delivered,
            Self::Expired => Fate::Expired,
            Self::Collapsed { .. } => Fate::Collapsed,
            Self::Overflow => Fate::Overflow,
            Self::Unregistered => Fate::Unregistered,
            Self::Recalled => Fate::Recalled,
        }
    }
}

/// A message that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Which.
    pub message_id: MessageId,
    /// Of which device.
    pub device: DeviceTag,
    /// For which registration.
    pub registration: RegistrationId,
    /// Its place: the log index that brought it.
    pub sequence: Sequence,
    /// Term of that entry.
    pub term: u64,
    /// Shard time when it was accepted, milliseconds since 1970.
    pub accepted_ms: u64,
    /// Shard time when it ended.
    pub ended_ms: u64,
    /// How.
    pub end: End,
}

impl Ended {
    /// A row of a mailbox that ends.
    pub(super) fn brief(brief: &Brief, device: DeviceTag, ended_ms: u64, end: End) -> Self {
        Self {
            message_id: brief.message_id,
            device,
            registration: brief.registration,
            sequence: brief.sequence,
            term: brief.term,
            accepted_ms: brief.accepted_ms,
            ended_ms,
            end,
        }
    }

    /// A message that would have been `row`, and ends as it comes.
    pub(super) fn at_once(row: &MailboxRow, device: DeviceTag, sequence: Sequence, end: End) -> Self {
        Self {
            message_id: row.message_id(),
            device,
            registration: row.registration_id(),
            sequence,
            term: row.term,
            accepted_ms: row.message.accepted_ms,
            ended_ms: row.message.accepted_ms,
            end,
        }
    }
}
