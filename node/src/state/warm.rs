//! What is known of busy devices, so that a message does not cost reading and decoding their rows again.
//!
//! A copy of rows in another form, never more: what is not here is read, and forgetting all of it changes no answer and no
//! write. Owns the copies of whole devices (the device row, every row of the mailbox without its payload, registrations that
//! were asked for) and their bound. The draft of an entry works on its own copies; they are taken over with its writes or dropped
//! with them. The invariant: whoever changes a row of these families says so here in the same breath ([`super::mailbox`],
//! [`super::device`] and [`super::registry`] do, nobody else writes them).

use std::{collections::BTreeMap, sync::Arc};

use martlet_proto::{
    message::{MessageId, Sequence},
    tag::DeviceTag,
    token::RegistrationId,
};

use super::{StateError, mailbox::MailboxRow, overlay::Overlay, registry::Registration, rows::Rows};
use crate::store::key::{self, body::BodyId, device::DeviceRow};

/// Rows of all families that one shard keeps warm; beyond, all but those of the last entry are forgotten. A row is some 150 bytes
/// here, so that 64 shards hold at most 80 MB.
const ROWS_MAX: usize = 8_192;

/// Rows read at a time where all of a mailbox is read.
const PAGE_ROWS: usize = 256;

/// A row of a mailbox without what only its device is to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Brief {
    pub(super) sequence: Sequence,
    pub(super) message_id: MessageId,
    pub(super) registration: RegistrationId,
    /// See [`MailboxRow::term`].
    pub(super) term: u64,
    /// Shard time when it came.
    pub(super) accepted_ms: u64,
    /// See [`MailboxRow::expiry_ms`].
    pub(super) expiry_ms: u64,
    /// Of the value as it is stored.
    pub(super) bytes: u64,
    /// The body it holds.
    pub(super) body: Option<BodyId>,
    /// By which a newer one takes its place.
    pub(super) collapse_key: Option<Arc<str>>,
    /// Not 0: it is a notice.
    pub(super) total_deleted: u64,
    pub(super) kin: Arc<Kin>,
}

/// The rows that the limits count together.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Kin {
    pub(super) sender: String,
    pub(super) application: String,
    pub(super) subtype: String,
}

impl Brief {
    /// What is kept of `row`, whose value has `bytes`. Its kin is shared with `beside`, where that is the same.
    pub(super) fn of(sequence: Sequence, row: &MailboxRow, bytes: usize, beside: Option<&Brief>) -> Self {
        let (sender, message) = (&row.sender, &row.message);
        let shared = beside.map(|brief| &brief.kin).filter(|kin| kin.is_of(row)).cloned();
        Self {
            sequence,
            message_id: row.message_id(),
            registration: row.registration_id(),
            term: row.term,
            accepted_ms: message.accepted_ms,
            expiry_ms: row.expiry_ms,
            bytes: bytes as u64,
            body: super::body::of(message),
            collapse_key: (!message.collapse_key.is_empty()).then(|| message.collapse_key.as_str().into()),
            total_deleted: message.total_deleted,
            kin: shared.unwrap_or_else(|| {
                Arc::new(Kin {
                    sender: sender.clone(),
                    application: message.application.clone(),
                    subtype: message.subtype.clone(),
                })
            }),
        }
    }

    /// Whether it is a notice `deleted_messages`.
    pub(super) fn is_notice(&self) -> bool {
        self.total_deleted > 0
    }

    /// Whether it may still be delivered at shard time `now_ms`.
    pub(super) fn is_alive(&self, now_ms: u64) -> bool {
        self.expiry_ms > now_ms
    }
}

impl Kin {
    /// Whether `row` counts among these.
    pub(super) fn is_of(&self, row: &MailboxRow) -> bool {
        self.sender == row.sender && self.application == row.message.application && self.subtype == row.message.subtype
    }
}

/// A device as its rows say, whole but for registrations that nobody asked for.
#[derive(Debug, Clone, Default)]
struct Device {
    row: Option<DeviceRow>,
    /// In the order of the sequences.
    mailbox: Arc<Vec<Brief>>,
    /// Shared, as the mailbox is: every entry takes a copy of the device and mostly changes neither.
    registrations: Arc<BTreeMap<RegistrationId, Option<Arc<Registration>>>>,
}

impl Device {
    fn read(rows: &dyn Rows, device: DeviceTag) -> Result<Self, StateError> {
        let at = key::device::key(device);
        let row = rows.get(&at)?.map(|value| key::device::decode(&at, value)).transpose()?;
        let mut mailbox: Vec<Brief> = Vec::new();
        loop {
            let (from, to) = key::mailbox::range(device, mailbox.last().map(|brief| brief.sequence));
            let page = rows.scan(&from, &to, PAGE_ROWS)?;
            let is_last = page.len() < PAGE_ROWS;
            for (key, value) in page {
                let misshapen = StateError::Broken("a mailbox key is misshapen");
                let (_, sequence) = key::mailbox::decode_key(&key).ok_or(misshapen)?;
                let bytes = value.len();
                let row = key::mailbox::decode(&key, value)?;
                mailbox.push(Brief::of(sequence, &row, bytes, mailbox.last()));
            }
            if is_last {
                return Ok(Self { row, mailbox: Arc::new(mailbox), registrations: Arc::default() });
            }
        }
    }

    fn len(&self) -> usize {
        1 + self.mailbox.len() + self.registrations.len()
    }
}

/// The copies that outlive an entry.
#[derive(Debug, Clone, Default)]
pub(super) struct Warm {
    devices: BTreeMap<DeviceTag, Device>,
    rows: usize,
}

/// Two states are the same whatever they have copies of.
impl PartialEq for Warm {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Warm {
    /// The entry is through: what it knows now is what is.
    pub(super) fn take_over(&mut self, touched: Touched) {
        for (tag, device) in touched.devices {
            self.rows += device.len();
            if let Some(before) = self.devices.insert(tag, device.clone()) {
                self.rows -= before.len();
            }
            if self.rows > ROWS_MAX {
                self.rows = device.len();
                self.devices = BTreeMap::from([(tag, device)]);
            }
        }
    }
}

/// What one entry asked for or changed.
#[derive(Debug, Default)]
pub(super) struct Touched {
    devices: BTreeMap<DeviceTag, Device>,
}

/// The copies in the middle of an entry.
pub(super) struct Warming<'a> {
    before: &'a Warm,
    touched: Touched,
}

impl<'a> Warming<'a> {
    pub(super) fn over(before: &'a Warm) -> Self {
        Self { before, touched: Touched::default() }
    }

    /// What [`Warm::take_over`] takes.
    pub(super) fn into_touched(self) -> Touched {
        self.touched
    }

    /// The mailbox of a device, in its order.
    pub(super) fn mailbox(&mut self, rows: &Overlay<'_>, device: DeviceTag) -> Result<Arc<Vec<Brief>>, StateError> {
        Ok(Arc::clone(&self.device(rows, device)?.mailbox))
    }

    /// One row of a mailbox.
    pub(super) fn brief(
        &mut self,
        rows: &Overlay<'_>,
        device: DeviceTag,
        sequence: Sequence,
    ) -> Result<Option<Brief>, StateError> {
        let mailbox = &self.device(rows, device)?.mailbox;
        let at = mailbox.binary_search_by_key(&sequence, |brief| brief.sequence);
        Ok(at.ok().map(|at| mailbox[at].clone()))
    }

    /// The device row.
    pub(super) fn row(&mut self, rows: &Overlay<'_>, device: DeviceTag) -> Result<Option<&DeviceRow>, StateError> {
        Ok(self.device(rows, device)?.row.as_ref())
    }

    /// A registration, also one whose time has come.
    pub(super) fn registration(
        &mut self,
        rows: &Overlay<'_>,
        device: DeviceTag,
        id: RegistrationId,
    ) -> Result<Option<Arc<Registration>>, StateError> {
        let known = &mut self.device(rows, device)?.registrations;
        if let Some(found) = known.get(&id) {
            return Ok(found.clone());
        }
        let found = super::registry::get(rows, device, id)?.map(Arc::new);
        Arc::make_mut(known).insert(id, found.clone());
        Ok(found)
    }

    /// A row came to the end of the mailbox.
    pub(super) fn enqueued(&mut self, device: DeviceTag, sequence: Sequence, row: &MailboxRow, bytes: usize) {
        if let Some(known) = self.known(device) {
            let mailbox = Arc::make_mut(&mut known.mailbox);
            let brief = Brief::of(sequence, row, bytes, mailbox.last());
            mailbox.push(brief);
        }
    }

    /// A row left the mailbox.
    pub(super) fn removed(&mut self, device: DeviceTag, sequence: Sequence) {
        if let Some(known) = self.known(device)
            && let Ok(at) = known.mailbox.binary_search_by_key(&sequence, |brief| brief.sequence)
        {
            Arc::make_mut(&mut known.mailbox).remove(at);
        }
    }

    /// The device row is another.
    pub(super) fn device_saved(&mut self, device: DeviceTag, row: &DeviceRow) {
        if let Some(known) = self.known(device) {
            known.row = Some(row.clone());
        }
    }

    /// A registration of the device is another, or gone.
    pub(super) fn registrations_changed(&mut self, device: DeviceTag) {
        if let Some(known) = self.known(device) {
            known.registrations = Arc::default();
        }
    }

    /// A device that was read for one row, and is not busy: its copy would only drive out those of others.
    pub(super) fn let_go(&mut self, device: DeviceTag) {
        if !self.before.devices.contains_key(&device) {
            self.touched.devices.remove(&device);
        }
    }

    /// This entry's copy of a device of which there is one.
    fn known(&mut self, device: DeviceTag) -> Option<&mut Device> {
        if !self.touched.devices.contains_key(&device) {
            let before = self.before.devices.get(&device)?.clone();
            self.touched.devices.insert(device, before);
        }
        self.touched.devices.get_mut(&device)
    }

    fn device(&mut self, rows: &Overlay<'_>, device: DeviceTag) -> Result<&mut Device, StateError> {
        if self.known(device).is_none() {
            let read = Device::read(rows, device)?;
            self.touched.devices.insert(device, read);
        }
        Ok(self.known(device).expect("known or read just now"))
    }
}
