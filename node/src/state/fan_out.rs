//! Messages for topics in a shard that has subscribers: from one publish to a row in each subscriber's mailbox, in bounded steps.
//!
//! Owns the walk: all topics of the condition together, in the order of devices and registrations, the condition asked once for each
//! subscriber, so that each gets the message once. Its cursor is a row: any leader goes on from there. The steps of one entry look at no
//! more than [`SUBSCRIBERS_MAX`] subscribers and write no more than some [`BYTES_MAX`].
//! What is through is remembered, so that the home's leader
//! may hand it over again, until the home says that it is over everywhere.
//!
//! A leader does not know before which devices a step will reach, so it cannot say up to where their mailboxes are written: the
//! limits take what the state was told last. A device that is attached, and more than a hundred messages behind with its acks, may
//! find a topic's message counted against the limit of waiting ones.

use std::collections::BTreeMap;

use bytes::Bytes;
use martlet_proto::{
    cluster::{
        command::Limits,
        queue::{self, Answer, FanOut, FannedOut, Publish, Refusal, answer::Kind},
    },
    message::{MessageId, Sequence},
    topic::{TopicId, holds},
};
use prost::Message as _;
use xxhash_rust::xxh3::xxh3_64;

use super::{
    StateError, body,
    count::{self, Fate},
    device,
    draft::{Draft, refused},
    enqueue,
    mailbox::MailboxRow,
    publish, registry,
    rows::Rows,
    story::{End, Ended},
};
use crate::store::key::{
    body::{BodyId, BodyRow},
    mailbox,
    publish::{self as rows_of, FanOutRow, Origin},
    subscription::{self, Subscriber},
};

/// Subscribers that the steps of one entry look at. Source: design.md section 4, "one entry per shard and one per further thousand".
const SUBSCRIBERS_MAX: usize = 1_000;

/// Bytes of rows after which no step of an entry goes on. A row is below 1.5 KiB, so it passes this by no more.
const BYTES_MAX: usize = 250 << 10;

/// Fan-outs of a home that are over everywhere, forgotten at once at most.
const FORGET_MAX: usize = 64;

/// What fan-outs did in an entry so far.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct FanOutRoom {
    /// Subscribers that were looked at.
    looked_at: usize,
    /// Bytes that were written.
    bytes: usize,
}

/// Whether anybody here subscribes to one of the topics.
pub(super) fn has_audience(rows: &dyn Rows, publish: &Publish) -> Result<bool, StateError> {
    for name in &publish.topics {
        let (from, to) = subscription::range(TopicId::of(&publish.sender, name), None);
        if !rows.scan(&from, &to, 1)?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Takes a publish from its home, and does the first step. One that is here already stays as it is.
pub(super) fn begin(
    draft: &mut Draft<'_>,
    at: Sequence,
    fan_out: &FanOut,
    limits: &Limits,
) -> Result<Answer, StateError> {
    let parts = (
        BodyId::from_bytes(&fan_out.publish_id),
        u16::try_from(fan_out.home).ok(),
        Sequence::from_bytes(&fan_out.place),
        fan_out.publish.as_ref().filter(|publish| publish::well_formed(publish)),
    );
    let (Some(id), Some(home), Some(place), Some(publish)) = parts else { return Ok(refused(Refusal::Malformed)) };
    let over_before = over_before(draft, home, Sequence::from_bytes(&fan_out.open_from))?;
    let origin = (home, place);
    // One from before that comes late was here once: it came by another way too.
    if place >= over_before && draft.rows.get(&rows_of::fan_out_key(origin))?.is_none() {
        let shared = BodyRow { wire_from: publish.wire_from.clone(), payload: publish.payload.clone() };
        body::put(draft, id, &shared);
        let publish = Publish { wire_from: String::new(), payload: Bytes::new(), ..publish.clone() };
        let row = FanOutRow {
            publish_id: fan_out.publish_id.clone(),
            expiry_ms: draft.now_ms().saturating_add(fan_out.remaining_ms),
            publish: Some(publish),
            cursor: Bytes::new(),
        };
        draft.rows.put(rows_of::under_way_key(origin), Bytes::new());
        go_on(draft, at, origin, row, limits)?;
    }
    Ok(Answer { kind: Some(Kind::FannedOut(FannedOut {})) })
}

/// The next step of the first that is not through; nothing if there is none.
pub(super) fn step(draft: &mut Draft<'_>, at: Sequence, limits: &Limits) -> Result<(), StateError> {
    let Some(origin) = first_under_way(&draft.rows)? else { return Ok(()) };
    let key = rows_of::fan_out_key(origin);
    let value = draft.rows.get(&key)?.ok_or(StateError::Broken("a fan-out that is under way is not there"))?;
    let row = rows_of::decode_fan_out(&key, value)?;
    go_on(draft, at, origin, row, limits)
}

/// Whether a fan-out is not through.
pub(super) fn is_under_way(rows: &dyn Rows) -> Result<bool, StateError> {
    Ok(first_under_way(rows)?.is_some())
}

fn first_under_way(rows: &dyn Rows) -> Result<Option<Origin>, StateError> {
    let (from, to) = rows_of::under_way_range();
    let Some((key, _)) = rows.scan(&from, &to, 1)?.pop() else { return Ok(None) };
    rows_of::decode_under_way_key(&key).map(Some).ok_or(StateError::Broken("the key of a fan-out is misshapen"))
}

/// The place before which a home's publishes are over everywhere, now that it says `told`. What is through of them is forgotten.
fn over_before(draft: &mut Draft<'_>, home: u16, told: Option<Sequence>) -> Result<Sequence, StateError> {
    let key = rows_of::over_key(home);
    let known = draft.rows.get(&key)?.map(|value| rows_of::decode_over(&key, &value)).transpose()?;
    let nothing = Sequence { incarnation: 0, index: 0, position: 0 };
    let known = known.unwrap_or(nothing);
    let told = told.unwrap_or(nothing);
    if told > known {
        draft.rows.put(key, Bytes::copy_from_slice(&told.to_bytes()));
    }
    let over = known.max(told);
    forget(draft, home, over)?;
    Ok(over)
}

fn forget(draft: &mut Draft<'_>, home: u16, place: Sequence) -> Result<(), StateError> {
    let (from, to) = rows_of::fan_out_range(home, place);
    for (key, value) in draft.rows.scan(&from, &to, FORGET_MAX)? {
        // One that is not through goes on: the home only says that it is here.
        if rows_of::decode_fan_out(&key, value)?.publish.is_none() {
            draft.rows.remove(key);
        }
    }
    Ok(())
}

/// One step.
fn go_on(
    draft: &mut Draft<'_>,
    at: Sequence,
    origin: Origin,
    row: FanOutRow,
    limits: &Limits,
) -> Result<(), StateError> {
    let publish = row.publish.as_ref().ok_or(StateError::Broken("a fan-out that is through is under way"))?;
    let id = BodyId::from_bytes(&row.publish_id).ok_or(StateError::Broken("a publish has no id"))?;
    let now_ms = draft.now_ms();
    let subscribers_max = SUBSCRIBERS_MAX.min(limits.fan_out_max as usize).saturating_sub(draft.fan_out.looked_at);
    let of_each = subscribers_max / publish.topics.len().max(1);
    let bytes_max = BYTES_MAX.saturating_sub(draft.fan_out.bytes);
    if of_each == 0 || bytes_max == 0 {
        // The next entry's business.
        draft.rows.put(rows_of::fan_out_key(origin), row.encode_to_vec().into());
        return Ok(());
    }
    let walk = if row.expiry_ms > now_ms { look(draft, publish, row.cursor(), of_each)? } else { Walk::default() };
    draft.fan_out.looked_at += walk.looked_at;
    let shared = if walk.chosen.is_empty() { BodyRow::default() } else { body::get(&draft.rows, id)? };
    let (mut bytes, mut cursor) = (0, walk.last);
    for subscriber in &walk.chosen {
        if bytes >= bytes_max {
            break;
        }
        cursor = Some(*subscriber);
        if let Some(stored) = give(draft, at, *subscriber, publish, &row, &shared, limits)? {
            // At once: the next may be of the same device, and drop it.
            body::hold(draft, id)?;
            bytes += stored;
        }
    }
    let is_cut = bytes >= bytes_max && cursor != walk.chosen.last().copied();
    draft.fan_out.bytes += bytes;
    let cursor = if is_cut { cursor } else { walk.last };
    let key = rows_of::fan_out_key(origin);
    let row = match cursor {
        Some(cursor) if is_cut || walk.goes_on => FanOutRow { cursor: rows_of::encode_cursor(cursor), ..row },
        _ => {
            body::release(draft, id)?;
            draft.rows.remove(rows_of::under_way_key(origin));
            FanOutRow { publish: None, cursor: Bytes::new(), ..row }
        }
    };
    draft.rows.put(key, row.encode_to_vec().into());
    Ok(())
}

/// What a step finds.
#[derive(Debug, Default)]
struct Walk {
    /// Those for whom the condition holds, in order.
    chosen: Vec<Subscriber>,
    /// The last who was looked at.
    last: Option<Subscriber>,
    /// Rows that were read.
    looked_at: usize,
    /// Whether there are more behind.
    goes_on: bool,
}

/// Looks at the next subscribers behind `after`, at most `of_each` of each topic.
fn look(draft: &Draft<'_>, publish: &Publish, after: Option<Subscriber>, of_each: usize) -> Result<Walk, StateError> {
    let mut looked_at = 0;
    let mut members: BTreeMap<Subscriber, u8> = BTreeMap::new();
    // Up to here every topic was read.
    let mut known_to: Option<Subscriber> = None;
    for (place, name) in publish.topics.iter().enumerate() {
        let (from, to) = subscription::range(TopicId::of(&publish.sender, name), after);
        let page = draft.rows.scan(&from, &to, of_each)?;
        let is_full = page.len() == of_each;
        looked_at += page.len();
        let mut last = None;
        for (key, _) in page {
            let (_, subscriber) =
                subscription::decode_key(&key).ok_or(StateError::Broken("a subscription key is misshapen"))?;
            *members.entry(subscriber).or_default() |= 1 << place;
            last = Some(subscriber);
        }
        if is_full {
            known_to = known_to.map_or(last, |before| last.map(|last| before.min(last)));
        }
    }
    let goes_on = known_to.is_some();
    if let Some(known_to) = known_to {
        members.retain(|subscriber, _| *subscriber <= known_to);
    }
    let last = members.last_key_value().map(|(subscriber, _)| *subscriber);
    let is_chosen = |of: u8| holds(&publish.condition, |place| of & 1 << place != 0);
    let chosen = members.into_iter().filter(|(_, of)| is_chosen(*of)).map(|(subscriber, _)| subscriber).collect();
    Ok(Walk { chosen, last, looked_at, goes_on })
}

/// Puts the message into one mailbox; the bytes of the row, if it is there now.
fn give(
    draft: &mut Draft<'_>,
    at: Sequence,
    (device, id): Subscriber,
    publish: &Publish,
    fan_out: &FanOutRow,
    shared: &BodyRow,
    limits: &Limits,
) -> Result<Option<usize>, StateError> {
    let now_ms = draft.now_ms();
    let find = |id| draft.warm.registration(&draft.rows, device, id);
    let found = registry::addressee(find, now_ms, id, &publish.sender, &publish.restricted_package_name)?;
    let registration = found.ok().filter(|addressee| !addressee.superseded).map(|addressee| addressee.registration);
    let Some(registration) = registration else {
        draft.warm.let_go(device);
        return Ok(None);
    };
    let written = device::written_through(draft, device, None)?;
    let message = queue::Message {
        message_id: Bytes::copy_from_slice(&message_id(&fan_out.publish_id, (device, id))),
        registration_id: Bytes::copy_from_slice(&id.0),
        wire_from: shared.wire_from.clone(),
        application: registration.row.application.clone(),
        subtype: registration.row.subtype.clone(),
        collapse_key: publish.collapse_key.clone(),
        ttl_secs: publish.ttl_secs,
        accepted_ms: now_ms,
        priority: publish.priority,
        payload: shared.payload.clone(),
        body_id: fan_out.publish_id.clone(),
        ..Default::default()
    };
    let row = MailboxRow {
        message,
        sender: publish.sender.clone(),
        expiry_ms: fan_out.expiry_ms,
        term: draft.term,
        ..Default::default()
    };
    let slim = queue::Message { wire_from: String::new(), payload: Bytes::new(), ..row.message.clone() };
    let value = mailbox::encode(&MailboxRow { message: slim, ..row.clone() });
    let bytes = value.len();
    let sequence = draft.place(at);
    let over = Ended::at_once(&row, device, sequence, End::Overflow);
    let placed = enqueue::place(draft, device, sequence, row, value, written, limits)?;
    if placed == enqueue::Placed::TooMuch {
        // Nobody is there to be told: a limit dropped it.
        count::add(draft, &publish.sender, &[Fate::Accepted, Fate::Overflow])?;
        draft.ended.push(over);
    }
    draft.warm.let_go(device);
    Ok((placed == enqueue::Placed::Stored).then_some(bytes))
}

/// Each subscriber knows the message by an id of its own: a device with two registrations tells by it what it has seen.
fn message_id(publish_id: &[u8], (device, id): Subscriber) -> [u8; 16] {
    let micros = MessageId::from_bytes(publish_id).map_or(0, |id| id.micros);
    let seed = [publish_id, &device.0.to_be_bytes()[..], &id.0].concat();
    MessageId { micros, random: xxh3_64(&seed) }.to_bytes()
}
