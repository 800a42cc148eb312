//! A message comes in: checked, given its place, kept within the limits.
//!
//! Owns the order of the checks (registered, sender, package, then room) and what a message becomes in the mailbox.

use std::sync::Arc;

use bytes::Bytes;
use martlet_proto::{
    cluster::{
        command::{Limits, Stamped},
        queue::{self, Accepted, Answer, Check, Enqueue, Refusal, answer::Kind},
    },
    limits::TTL_MAX_SECS,
    message::Sequence,
    tag::DeviceTag,
    token::RegistrationId,
};

use super::{
    StateError, collapse,
    count::{self, Fate},
    dedupe::OperationId,
    device,
    draft::{Draft, refused},
    mailbox::{self, MailboxRow},
    overflow::{self, Room},
    registry::{self, Addressee, Registration},
    rows::Rows,
    story::{End, Ended},
    warm::Brief,
};
use crate::store::key;

/// What would be answered.
pub(super) fn check(rows: &dyn Rows, now_ms: u64, check: &Check) -> Result<Answer, StateError> {
    let Some(id) = RegistrationId::from_bytes(&check.registration_id) else { return Ok(refused(Refusal::Malformed)) };
    let device = DeviceTag(check.device_tag);
    let find = |id| Ok(registry::get(rows, device, id)?.map(Arc::new));
    let found = registry::addressee(find, now_ms, id, &check.sender, &check.restricted_package_name)?;
    Ok(found.map_or_else(refused, |addressee| accepted(&addressee)))
}

/// Takes a message.
pub(super) fn enqueue(
    draft: &mut Draft<'_>,
    sequence: Sequence,
    id: OperationId,
    stamped: &Stamped,
    enqueue: &Enqueue,
    limits: &Limits,
) -> Result<Answer, StateError> {
    let told = Sequence::from_bytes(&stamped.written_through);
    // Nothing can have been written that is not in the mailbox yet.
    let told_well = stamped.written_through.is_empty() || told.is_some_and(|told| told < sequence);
    let registration_id = RegistrationId::from_bytes(&enqueue.registration_id);
    let Some(registration_id) = registration_id.filter(|_| told_well && enqueue.ttl_secs <= TTL_MAX_SECS) else {
        return Ok(refused(Refusal::Malformed));
    };
    let device = DeviceTag(enqueue.device_tag);
    let written = device::written_through(draft, device, told)?;
    let (sender, package) = (&enqueue.sender, &enqueue.restricted_package_name);
    let now_ms = draft.now_ms();
    let find = |id| draft.warm.registration(&draft.rows, device, id);
    let found = registry::addressee(find, now_ms, registration_id, sender, package)?;
    let addressee = match found {
        Ok(addressee) => addressee,
        Err(refusal) => return Ok(refused(refusal)),
    };
    if enqueue.ttl_secs == 0 {
        // Now or never; the leader does not log these. One that came here all the same finds nobody.
        count::add(draft, sender, &[Fate::Accepted, Fate::Expired])?;
        let row = row(enqueue, id, &addressee.registration, draft);
        draft.ended.push(Ended::at_once(&row, device, sequence, End::Expired));
        return Ok(accepted(&addressee));
    }

    let row = row(enqueue, id, &addressee.registration, draft);
    let value = key::mailbox::encode(&row);
    Ok(match place(draft, device, sequence, row, value, written, limits)? {
        Placed::Stored | Placed::Overflowed => accepted(&addressee),
        Placed::TooMuch => refused(Refusal::QuotaExceeded),
    })
}

/// Where a message went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placed {
    /// Into the mailbox.
    Stored,
    /// Into the count of a notice.
    Overflowed,
    /// Nowhere, and nothing was counted: the device's or the project's bytes are used up.
    TooMuch,
}

/// Puts a message into the mailbox, within the limits, and counts it. `value` is the row as it is stored.
pub(super) fn place(
    draft: &mut Draft<'_>,
    device: DeviceTag,
    sequence: Sequence,
    row: MailboxRow,
    value: Bytes,
    written: Option<Sequence>,
    limits: &Limits,
) -> Result<Placed, StateError> {
    let now_ms = draft.now_ms();
    let all = draft.warm.mailbox(&draft.rows, device)?;
    let alive: Vec<&Brief> = all.iter().filter(|brief| brief.is_alive(now_ms)).collect();
    let mailbox = overflow::trim_written(draft, device, &alive, written, limits)?;
    match overflow::room(draft, device, sequence, &row, mailbox, written, limits)? {
        Room::Dropped => {
            count::add(draft, &row.sender, &[Fate::Accepted, Fate::Overflow])?;
            draft.ended.push(Ended::at_once(&row, device, sequence, End::Overflow));
            Ok(Placed::Overflowed)
        }
        Room::Yes => {
            let collapsed = collapse::victims(&row, mailbox, written, limits);
            let gone = collapsed.iter().map(|brief| brief.bytes).sum::<u64>();
            let of_device = mailbox.iter().map(|brief| brief.bytes).sum::<u64>();
            let of_project = count::stored_bytes(draft, &row.sender)?;
            let is_over = |of: u64, max: u64| max > 0 && of.saturating_sub(gone) + value.len() as u64 > max;
            if is_over(of_device, limits.device_bytes_max) || is_over(of_project, limits.project_bytes_max) {
                return Ok(Placed::TooMuch);
            }
            for brief in collapsed {
                mailbox::drop_row(draft, device, brief, End::Collapsed { by: row.message_id() })?;
            }
            // Nobody else holds the copy while the new row comes to it.
            drop(alive);
            drop(all);
            count::add(draft, &row.sender, &[Fate::Accepted])?;
            mailbox::store(draft, device, sequence, row, value)?;
            Ok(Placed::Stored)
        }
    }
}

fn accepted(addressee: &Addressee) -> Answer {
    Answer { kind: Some(Kind::Accepted(Accepted { canonical: addressee.canonical() })) }
}

fn row(enqueue: &Enqueue, id: OperationId, to: &Registration, draft: &Draft<'_>) -> MailboxRow {
    let now_ms = draft.now_ms();
    let message = queue::Message {
        message_id: Bytes::copy_from_slice(&id),
        registration_id: Bytes::copy_from_slice(&to.id.0),
        wire_from: enqueue.wire_from.clone(),
        application: to.row.application.clone(),
        subtype: to.row.subtype.clone(),
        collapse_key: enqueue.collapse_key.clone(),
        ttl_secs: enqueue.ttl_secs,
        accepted_ms: now_ms,
        priority: enqueue.priority,
        payload: enqueue.payload.clone(),
        total_deleted: 0,
        receipt_wanted: enqueue.receipt_wanted,
        body_id: Bytes::new(),
    };
    MailboxRow {
        message,
        sender: enqueue.sender.clone(),
        expiry_ms: now_ms.saturating_add(u64::from(enqueue.ttl_secs) * 1000),
        client_message_id: enqueue.client_message_id.clone(),
        addressed_token: enqueue.addressed_token.clone(),
        term: draft.term,
    }
}
