//! The limits of a mailbox: how much may wait, how much may be written and not acked.
//!
//! Owns the rule of 100. Waiting are the rows not yet written to the device; those without a collapse key, of one
//! application, subtype and sender, may be 100. The 101st drops them all, itself included, and leaves one notice
//! `deleted_messages` with their number, from that sender. Later ones are dropped and counted too, until the notice is
//! written; each time the notice is made anew at the end of the mailbox, under an id of its own, for a device drops what it
//! has seen by id. Rows with a collapse key are neither counted nor dropped: they have a limit of
//! their own, in `collapse`.
//!
//! Written rows are outside that rule (a client that acks only at its next login is not "full" of what it was sent), and
//! have a cap of their own: past it the oldest go, for the device has most likely seen them.
//!
//! Sources: gcm-http.md 6.4; decisions.md "limit of 4 and 100"; design.md section 4, "Limits are for the absent".

use bytes::Bytes;
use martlet_proto::{
    cluster::{
        command::Limits,
        queue::{self, Priority},
    },
    limits::TTL_MAX_SECS,
    message::{MessageId, Sequence},
    tag::DeviceTag,
};
use xxhash_rust::xxh3::xxh3_64;

use super::{
    StateError,
    draft::Draft,
    mailbox::{self, MailboxRow},
    story::End,
    warm::Brief,
};
use crate::store::key;

/// Whether there is room for a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// Store it.
    Yes,
    /// It counts in the notice that is in the mailbox now.
    Dropped,
}

/// Keeps the written rows within their cap: the oldest go. What is left of `mailbox`, which is in the order of the sequences.
pub(super) fn trim_written<'m>(
    draft: &mut Draft<'_>,
    device: DeviceTag,
    mailbox: &'m [&'m Brief],
    written: Option<Sequence>,
    limits: &Limits,
) -> Result<&'m [&'m Brief], StateError> {
    let count = mailbox.partition_point(|brief| Some(brief.sequence) <= written);
    let mut bytes: u64 = mailbox[..count].iter().map(|brief| brief.bytes).sum();
    let mut excess = 0;
    while excess < count && (count - excess > limits.unacked_max as usize || bytes > limits.unacked_bytes_max) {
        bytes -= mailbox[excess].bytes;
        excess += 1;
    }
    for brief in &mailbox[..excess] {
        mailbox::drop_row(draft, device, brief, End::Overflow)?;
    }
    Ok(&mailbox[excess..])
}

/// Makes room for `row` above `written`, or drops it with all those of its kind that wait.
pub(super) fn room(
    draft: &mut Draft<'_>,
    device: DeviceTag,
    sequence: Sequence,
    row: &MailboxRow,
    mailbox: &[&Brief],
    written: Option<Sequence>,
    limits: &Limits,
) -> Result<Room, StateError> {
    if !row.message.collapse_key.is_empty() {
        return Ok(Room::Yes);
    }
    let kind: Vec<&Brief> = mailbox
        .iter()
        .copied()
        .filter(|brief| Some(brief.sequence) > written && brief.collapse_key.is_none() && brief.kin.is_of(row))
        .collect();
    let dropped_before = kind.iter().map(|brief| brief.total_deleted).max().unwrap_or(0);
    if dropped_before == 0 && kind.len() < limits.waiting_max as usize {
        return Ok(Room::Yes);
    }
    let messages = kind.iter().filter(|brief| !brief.is_notice()).count() as u64;
    for brief in kind {
        mailbox::drop_row(draft, device, brief, End::Overflow)?;
    }
    let notice = notice(row, sequence, draft.now_ms(), dropped_before + messages + 1);
    let value = key::mailbox::encode(&notice);
    mailbox::store(draft, device, sequence, notice, value)?;
    Ok(Room::Dropped)
}

/// `deleted_messages` in place of `row` and those before it. Its id is made from its place, which no other row ever has.
fn notice(row: &MailboxRow, sequence: Sequence, now_ms: u64, total_deleted: u64) -> MailboxRow {
    let seed = [&sequence.to_bytes()[..], &row.message.message_id].concat();
    let id = MessageId { micros: now_ms.saturating_mul(1000), random: xxh3_64(&seed) };
    let message = queue::Message {
        message_id: Bytes::copy_from_slice(&id.to_bytes()),
        registration_id: row.message.registration_id.clone(),
        wire_from: row.sender.clone(),
        application: row.message.application.clone(),
        subtype: row.message.subtype.clone(),
        ttl_secs: TTL_MAX_SECS,
        accepted_ms: now_ms,
        priority: Priority::Normal as i32,
        total_deleted,
        ..Default::default()
    };
    let expiry_ms = now_ms.saturating_add(u64::from(TTL_MAX_SECS) * 1000);
    MailboxRow { message, sender: row.sender.clone(), expiry_ms, ..Default::default() }
}
