//! What devices acked leaves their mailboxes.
//!
//! By sequence, or by message id among the device's own few rows. What is not there (acked before, expired, never ours) is
//! passed over. Receipts are not made yet.

use std::collections::BTreeSet;

use martlet_proto::{
    cluster::command::{Acks, DeviceAck},
    message::{MessageId, Sequence},
    tag::DeviceTag,
};

use super::{StateError, draft::Draft, mailbox, story::End};

/// Takes acked rows out; counted delivered, also when their time to live has just ended: the device has them.
pub(super) fn acks(draft: &mut Draft<'_>, acks: &Acks) -> Result<(), StateError> {
    acks.acks.iter().try_for_each(|ack| device_ack(draft, ack))
}

fn device_ack(draft: &mut Draft<'_>, ack: &DeviceAck) -> Result<(), StateError> {
    let device = DeviceTag(ack.device_tag);
    let end = End::Delivered { gateway: ack.gateway };
    for sequence in ack.sequences.iter().filter_map(|bytes| Sequence::from_bytes(bytes)) {
        if let Some(brief) = draft.warm.brief(&draft.rows, device, sequence)? {
            mailbox::drop_row(draft, device, &brief, end)?;
        }
    }
    if ack.message_ids.is_empty() {
        return Ok(());
    }
    let named: BTreeSet<MessageId> = ack.message_ids.iter().filter_map(|id| MessageId::from_bytes(id)).collect();
    for brief in draft.warm.mailbox(&draft.rows, device)?.iter() {
        if named.contains(&brief.message_id) {
            mailbox::drop_row(draft, device, brief, end)?;
        }
    }
    Ok(())
}
