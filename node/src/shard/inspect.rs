//! What an operator sees of a shard: one message, one token, one topic, a project's counters.
//!
//! Owns the reads; leaves the way to the right node to `rpc/story.rs`. They read page by page, so that no entry waits long to be applied,
//! and so may take their time: for a thread that may block. Whoever has no lease may be behind: the answers say who led.

use bytes::Bytes;
use martlet_proto::{
    message::{MessageId, Sequence},
    tag::DeviceTag,
    token::RegistrationId,
    topic::TopicId,
};

use super::machine::Replica;
use crate::{
    state::{CountRow, Ended, MailboxRow, StateError, counters},
    store::key::{self, Family, registration::RegistrationRow},
};

/// Rows read at a time.
const PAGE_ROWS: usize = 256;

/// Most stories that are told of one token.
pub const STORIES_OF_TOKEN_MAX: usize = 50;

/// A message in a mailbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waits {
    /// Which.
    pub message_id: MessageId,
    /// Of which device.
    pub device: DeviceTag,
    /// For which registration.
    pub registration: RegistrationId,
    /// Its place.
    pub sequence: Sequence,
    /// Term of the entry that brought it.
    pub term: u64,
    /// Shard time when it was accepted, milliseconds since 1970.
    pub accepted_ms: u64,
    /// Shard time when its time to live ends.
    pub expiry_ms: u64,
    /// Its bytes in the mailbox.
    pub bytes: u64,
    /// The gateway through which its device is attached, and whether it was written there.
    pub attached: Option<(u32, bool)>,
}

/// What a replica knows of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// It is over.
    Ended(Ended),
    /// It is in its mailbox.
    Waits(Waits),
}

/// What a replica knows of a token.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TokenView {
    /// The registration; nothing when there is none.
    pub registration: Option<RegistrationRow>,
    /// The one that took its place.
    pub successor: Option<RegistrationRow>,
    /// Day when its device was last here, days since 1970; 0 when not known.
    pub last_seen_day: u32,
    /// The gateway through which the device is attached.
    pub attached: Option<u32>,
    /// Messages that wait for it.
    pub waiting: u64,
    /// Their bytes.
    pub waiting_bytes: u64,
    /// The first of them.
    pub oldest: Option<Waits>,
    /// The last of them, newest first, at most [`STORIES_OF_TOKEN_MAX`].
    pub newest: Vec<Waits>,
    /// Messages that are over, newest first, at most [`STORIES_OF_TOKEN_MAX`].
    pub ended: Vec<Ended>,
}

/// What a replica knows of a topic.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TopicView {
    /// Registrations that subscribe in this shard.
    pub subscribers: u64,
    /// Messages to it that are at home here and not over everywhere.
    pub open: u64,
}

impl Replica {
    /// Whether it leads, as far as it knows.
    pub fn leads(&self) -> bool {
        self.desk().term().is_some()
    }

    /// What is known of a message. What waits is looked for where this replica leads: in one device's mailbox, or in all.
    ///
    /// # Errors
    /// When the rows cannot be read or are not what they should be.
    pub fn story(&self, id: MessageId, device: Option<DeviceTag>) -> Result<Option<Known>, StateError> {
        let now_ms = self.applied_ms();
        if let Some(ended) = self.stories().of_message(id, now_ms) {
            return Ok(Some(Known::Ended(ended)));
        }
        if !self.leads() {
            return Ok(None);
        }
        let mut found = None;
        self.each_row(device, |device, sequence, row, bytes| {
            if row.message_id() == id && !row.is_notice() {
                found = Some(self.waits(device, sequence, row, bytes));
            }
            found.is_none()
        })?;
        // Acked while the mailboxes were read.
        let ended = || self.stories().of_message(id, self.applied_ms()).map(Known::Ended);
        Ok(found.map(Known::Waits).or_else(ended))
    }

    /// What is known of a token. What waits is counted where this replica leads.
    ///
    /// # Errors
    /// As [`Replica::story`].
    pub fn token(&self, device: DeviceTag, id: RegistrationId) -> Result<TokenView, StateError> {
        let registration = self.registration(device, id)?;
        let successor = registration.as_ref().and_then(|row| RegistrationId::from_bytes(&row.superseded_by));
        let successor = successor.map(|id| self.registration(device, id)).transpose()?.flatten();
        let at = key::device::key(device);
        let seen = self.row(&at)?.map(|value| key::device::decode(&at, value)).transpose()?;
        let mut view = TokenView {
            registration,
            successor,
            last_seen_day: seen.map_or(0, |row| row.last_seen_day),
            ended: self.stories().of_registration(device, id, STORIES_OF_TOKEN_MAX, self.applied_ms()),
            ..TokenView::default()
        };
        if !self.leads() {
            return Ok(view);
        }
        view.attached = self.desk().attachment(device).map(|(gateway, _)| gateway);
        let now_ms = self.applied_ms();
        self.each_row(Some(device), |device, sequence, row, bytes| {
            if row.registration_id() == id && !row.is_notice() && row.remaining_ms(now_ms) > 0 {
                let waits = self.waits(device, sequence, row, bytes);
                view.waiting += 1;
                view.waiting_bytes += bytes;
                view.oldest.get_or_insert_with(|| waits.clone());
                view.newest.insert(0, waits);
                view.newest.truncate(STORIES_OF_TOKEN_MAX);
            }
            true
        })?;
        Ok(view)
    }

    /// Who subscribes to a topic here.
    ///
    /// # Errors
    /// As [`Replica::story`].
    pub fn topic(&self, sender: &str, name: &str) -> Result<TopicView, StateError> {
        let mut view = TopicView::default();
        let (mut from, to) = key::subscription::range(TopicId::of(sender, name), None);
        loop {
            let page = self.page(&from, &to)?;
            view.subscribers += page.len() as u64;
            let Some((last, _)) = page.last().filter(|_| page.len() == PAGE_ROWS) else { break };
            from = behind(last);
        }
        let names = |row: &key::publish::HomeRow| {
            row.publish.sender == sender && row.publish.topics.iter().any(|topic| topic == name)
        };
        view.open = self.publishes(usize::MAX)?.iter().filter(|(_, row)| names(row)).count() as u64;
        Ok(view)
    }

    /// A project's counters here.
    ///
    /// # Errors
    /// As [`Replica::story`].
    pub fn counts(&self, sender: &str) -> Result<CountRow, StateError> {
        self.with_rows(|rows| counters(rows, sender))
    }

    /// A registration, whether or not its time has come.
    ///
    /// # Errors
    /// As [`Replica::story`].
    pub fn registration(&self, device: DeviceTag, id: RegistrationId) -> Result<Option<RegistrationRow>, StateError> {
        let at = key::registration::key(device, id);
        Ok(self.row(&at)?.map(|value| key::registration::decode(&at, value)).transpose()?)
    }

    /// Walks the mailbox of one device, or all of them, until `each` says that it is enough.
    fn each_row(
        &self,
        device: Option<DeviceTag>,
        mut each: impl FnMut(DeviceTag, Sequence, &MailboxRow, u64) -> bool,
    ) -> Result<(), StateError> {
        let (mut from, to) = match device {
            Some(device) => key::mailbox::range(device, None),
            None => {
                let (from, to) = Family::Mailbox.range();
                (Bytes::copy_from_slice(&from), Bytes::copy_from_slice(&to))
            }
        };
        loop {
            let page = self.page(&from, &to)?;
            let last = page.last().filter(|_| page.len() == PAGE_ROWS).map(|(key, _)| behind(key));
            for (key, value) in page {
                // Of all devices, their other rows stand between.
                let Some((device, sequence)) = key::mailbox::decode_key(&key) else { continue };
                let bytes = value.len() as u64;
                if !each(device, sequence, &key::mailbox::decode(&key, value)?, bytes) {
                    return Ok(());
                }
            }
            let Some(next) = last else { return Ok(()) };
            from = next;
        }
    }

    fn waits(&self, device: DeviceTag, sequence: Sequence, row: &MailboxRow, bytes: u64) -> Waits {
        let attached = self.desk().attachment(device);
        Waits {
            message_id: row.message_id(),
            device,
            registration: row.registration_id(),
            sequence,
            term: row.term,
            accepted_ms: row.message.accepted_ms,
            expiry_ms: row.expiry_ms,
            bytes,
            attached: attached.map(|(gateway, written)| (gateway, written >= Some(sequence))),
        }
    }

    fn row(&self, key: &[u8]) -> Result<Option<Bytes>, StateError> {
        self.with_rows(|rows| Ok(rows.get(key)?))
    }

    fn page(&self, from: &[u8], to: &[u8]) -> Result<Vec<(Bytes, Bytes)>, StateError> {
        self.with_rows(|rows| Ok(rows.scan(from, to, PAGE_ROWS)?))
    }
}

/// The least key above `key`.
fn behind(key: &[u8]) -> Bytes {
    [key, &[0]].concat().into()
}
