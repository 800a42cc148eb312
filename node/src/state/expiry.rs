//! What runs out: messages by their time to live, registrations by their own or because they were superseded long ago.
//!
//! Owns the bounded step of the leader's `Expire`; when things run out was written down by whoever made them. Nothing goes
//! before shard time has come to it, whatever the command says. Before its row goes a message is already not delivered
//! ([`super::MailboxRow::remaining_ms`]) and a registration already not registered.

use martlet_proto::{cluster::command::Expire, message::Sequence, tag::DeviceTag, token::RegistrationId};

use super::{StateError, draft::Draft, mailbox, registry, rows::Rows, story::End};
use crate::store::key;

/// Rows that one command removes at most, whatever it asks for.
pub(super) const ROWS_MAX: usize = 1000;

/// When something runs out next.
pub(super) fn next_due_ms(rows: &dyn Rows) -> Result<Option<u64>, StateError> {
    let (from, to) = key::expiry::range(u64::MAX);
    let message = rows.scan(&from, &to, 1)?.pop();
    let message = message.map(|(key, _)| message_key(&key).map(|(due_ms, ..)| due_ms)).transpose()?;
    let (from, to) = key::lapse::range(u64::MAX);
    let registration = rows.scan(&from, &to, 1)?.pop();
    let registration = registration.map(|(key, _)| registration_key(&key).map(|(due_ms, ..)| due_ms)).transpose()?;
    Ok(message.into_iter().chain(registration).min())
}

/// Removes what has run out: messages first, earliest first.
pub(super) fn expire(draft: &mut Draft<'_>, expire: &Expire) -> Result<(), StateError> {
    let upto_ms = expire.upto_ms.min(draft.now_ms());
    let mut left = ROWS_MAX.min(expire.rows_max as usize);

    let (from, to) = key::expiry::range(upto_ms);
    for (key, _) in draft.rows.scan(&from, &to, left)? {
        let (_, device, sequence) = message_key(&key)?;
        let brief = draft.warm.brief(&draft.rows, device, sequence)?;
        let brief = brief.ok_or(StateError::Broken("a message that runs out is not there"))?;
        mailbox::drop_row(draft, device, &brief, End::Expired)?;
        left -= 1;
    }

    // One at a time: a registration takes others along.
    let (from, to) = key::lapse::range(upto_ms);
    while left > 0 {
        let Some((key, _)) = draft.rows.scan(&from, &to, 1)?.pop() else { break };
        left = left.saturating_sub(registry::lapse(draft, registration_key(&key)?, left)?);
    }
    Ok(())
}

fn message_key(key: &[u8]) -> Result<(u64, DeviceTag, Sequence), StateError> {
    key::expiry::decode_key(key).ok_or(StateError::Broken("an expiry key is misshapen"))
}

fn registration_key(key: &[u8]) -> Result<(u64, DeviceTag, RegistrationId), StateError> {
    key::lapse::decode_key(key).ok_or(StateError::Broken("a lapse key is misshapen"))
}
