//! What an entry means for whoever delivers. Carried out by the leader, ignored by followers, never part of the state.

use std::sync::Arc;

use martlet_proto::{message::Sequence, tag::DeviceTag, token::RegistrationId};

use super::mailbox::MailboxRow;

/// One thing that changed in the queues, in the order in which it happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// A message or a notice is in the mailbox now.
    Enqueued {
        /// Whose mailbox.
        device_tag: DeviceTag,
        /// Its place; above every other of the mailbox.
        sequence: Sequence,
        /// The row. Its bytes are slices of the entry that brought it: whoever keeps them copies them.
        row: Arc<MailboxRow>,
    },
    /// A row has left the mailbox: acked, expired, dropped.
    Removed {
        /// Whose mailbox.
        device_tag: DeviceTag,
        /// The place it had.
        sequence: Sequence,
    },
    /// A registration is gone; its rows were removed before.
    RegistrationGone {
        /// Of which device.
        device_tag: DeviceTag,
        /// Which.
        registration_id: RegistrationId,
    },
}
