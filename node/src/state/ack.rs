//! What devices acked leaves their mailboxes.
//!
//! By sequence, or by message id among the device's own few rows. What is not there (acked before, expired, never ours) is
//! passed over. Receipts are not made yet.

use std::collections::BTreeSet;

use bytes::Bytes;
use martlet_proto::{
    cluster::command::{Acks, DeviceAck},
    message::Sequence,
    tag::DeviceTag,
};

use super::{StateError, count::Fate, draft::Draft, mailbox};

/// Takes acked rows out; counted delivered, also when their time to live has just ended: the device has them.
pub(super) fn acks(draft: &mut Draft<'_>, acks: &Acks) -> Result<(), StateError> {
    acks.acks.iter().try_for_each(|ack| device_ack(draft, ack))
}

fn device_ack(draft: &mut Draft<'_>, ack: &DeviceAck) -> Result<(), StateError> {
    let device = DeviceTag(ack.device_tag);
    for sequence in ack.sequences.iter().filter_map(|bytes| Sequence::from_bytes(bytes)) {
        if let Some(held) = mailbox::get(&draft.rows, device, sequence)? {
            mailbox::drop_row(draft, device, &held, Fate::Delivered)?;
        }
    }
    if ack.message_ids.is_empty() {
        return Ok(());
    }
    let named: BTreeSet<&Bytes> = ack.message_ids.iter().collect();
    for held in mailbox::all(&draft.rows, device)? {
        if named.contains(&held.row.message.message_id) {
            mailbox::drop_row(draft, device, &held, Fate::Delivered)?;
        }
    }
    Ok(())
}
