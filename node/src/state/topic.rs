//! Who subscribes to which topic: each subscription is a row in its topic's order and one in its device's.
//!
//! Owns subscribing, unsubscribing, and what becomes of subscriptions when a registration goes: they go with it, in steps of at most
//! [`FORGET_ROWS_MAX`]; what is left then goes as registrations that run out do. Until then a fan-out passes them over. A
//! registration that was superseded keeps its subscriptions and gets nothing by them: an application that was installed anew
//! subscribes anew.
//!
//! Sources: gcm-http.md sections 8 and 10; device.md section 3.2; decisions.md, "topics and conditions".

use bytes::Bytes;
use martlet_proto::{
    cluster::{
        command::Limits,
        queue::{
            Answer, KnownToken, Refusal, Subscribe, Subscribed, TokenInfo, TopicSubscription, Unsubscribe, answer::Kind,
        },
    },
    tag::DeviceTag,
    token::RegistrationId,
    topic::{TopicId, is_name},
};

use super::{
    StateError,
    draft::{Draft, refused},
    registry,
    rows::Rows,
};
use crate::store::key::{
    self, lapse,
    subscription::{self, SubscribedRow, Subscriber},
};

/// Subscriptions that one command forgets at most.
pub(super) const FORGET_ROWS_MAX: usize = 300;

/// Subscriptions that one answer about a token looks at.
const INFO_ROWS_MAX: usize = 256;

/// Subscribes.
pub(super) fn subscribe(draft: &mut Draft<'_>, subscribe: &Subscribe, limits: &Limits) -> Result<Answer, StateError> {
    let Some(id) = RegistrationId::from_bytes(&subscribe.registration_id).filter(|_| is_name(&subscribe.topic)) else {
        return Ok(refused(Refusal::Malformed));
    };
    let device = DeviceTag(subscribe.device_tag);
    let (registration, senders) = match who(draft, device, id, &subscribe.sender)? {
        Ok(found) => found,
        Err(refusal) => return Ok(refused(refusal)),
    };
    let subscriber = (device, registration);
    let mut new = Vec::new();
    for sender in senders {
        let topic = TopicId::of(&sender, &subscribe.topic);
        if draft.rows.get(&subscription::key(topic, subscriber))?.is_none() {
            new.push((topic, sender));
        }
    }
    let count = count(&draft.rows, subscriber)? as usize + new.len();
    if !new.is_empty() && count > limits.topics_max as usize {
        return Ok(refused(Refusal::TooManyTopics));
    }
    let added_ms = draft.now_ms();
    for (topic, sender) in new {
        let row = SubscribedRow { sender, topic: subscribe.topic.clone(), added_ms };
        draft.rows.put(subscription::key(topic, subscriber), subscription::encode_added(added_ms));
        draft.rows.put(subscription::device_key(subscriber, topic), subscription::encode(&row));
    }
    set_count(draft, subscriber, count);
    Ok(subscribed())
}

/// Unsubscribes. Who did not subscribe does not afterwards either.
pub(super) fn unsubscribe(draft: &mut Draft<'_>, unsubscribe: &Unsubscribe) -> Result<Answer, StateError> {
    let Some(id) = RegistrationId::from_bytes(&unsubscribe.registration_id).filter(|_| is_name(&unsubscribe.topic))
    else {
        return Ok(refused(Refusal::Malformed));
    };
    let device = DeviceTag(unsubscribe.device_tag);
    let (registration, senders) = match who(draft, device, id, &unsubscribe.sender)? {
        Ok(found) => found,
        Err(refusal) => return Ok(refused(refusal)),
    };
    let subscriber = (device, registration);
    let mut left = count(&draft.rows, subscriber)? as usize;
    for sender in senders {
        let topic = TopicId::of(&sender, &unsubscribe.topic);
        if draft.rows.get(&subscription::key(topic, subscriber))?.is_some() {
            remove(draft, subscriber, topic);
            left = left.checked_sub(1).ok_or(StateError::Broken("a topic too few is counted"))?;
        }
    }
    set_count(draft, subscriber, left);
    Ok(subscribed())
}

/// The current registration that a token means, and the senders it is about: `sender`, or all of it.
fn who(
    draft: &mut Draft<'_>,
    device: DeviceTag,
    id: RegistrationId,
    sender: &str,
) -> Result<Result<(RegistrationId, Vec<String>), Refusal>, StateError> {
    let now_ms = draft.now_ms();
    let find = |id| draft.warm.registration(&draft.rows, device, id);
    let found = registry::current(find, now_ms, id)?;
    let Ok(addressee) = found else { return Ok(Err(Refusal::NotRegistered)) };
    let registration = addressee.registration;
    Ok(match sender {
        "" => Ok((registration.id, registration.row.senders.clone())),
        _ if registration.row.senders.iter().any(|allowed| allowed == sender) => {
            Ok((registration.id, vec![sender.to_owned()]))
        }
        _ => Err(Refusal::MismatchSenderId),
    })
}

/// What a token is; with `details` the topics of its sender, at most some `bytes_max` of them.
pub(super) fn info(rows: &dyn Rows, now_ms: u64, info: &TokenInfo, bytes_max: usize) -> Result<Answer, StateError> {
    let Some(id) = RegistrationId::from_bytes(&info.registration_id) else { return Ok(refused(Refusal::Malformed)) };
    let device = DeviceTag(info.device_tag);
    let find = |id| Ok(registry::get(rows, device, id)?.map(std::sync::Arc::new));
    let addressee = match registry::addressee(find, now_ms, id, &info.sender, "")? {
        Ok(addressee) => addressee,
        Err(refusal) => return Ok(refused(refusal)),
    };
    let registration = addressee.registration;
    let at = key::device::key(device);
    let seen = rows.get(&at)?.map(|value| key::device::decode(&at, value)).transpose()?;
    let (mut topics, mut next, mut left) = (Vec::new(), info.after.clone(), bytes_max);
    if info.details {
        let subscriber = (device, registration.id);
        let (from, to) = subscription::device_range(subscriber);
        let after = <[u8; 16]>::try_from(&info.after[..]).map(TopicId);
        let from = after.map_or(from, |after| [&subscription::device_key(subscriber, after)[..], &[0]].concat().into());
        let page = rows.scan(&from, &to, INFO_ROWS_MAX)?;
        let mut is_whole = page.len() < INFO_ROWS_MAX;
        for (key, value) in page {
            let row = subscription::decode(&key, value)?;
            if left < row.topic.len() {
                is_whole = false;
                break;
            }
            left -= row.topic.len();
            next = Bytes::copy_from_slice(&key[key.len() - 16..]);
            if row.sender == info.sender {
                topics.push(TopicSubscription { topic: row.topic, added_ms: row.added_ms });
            }
        }
        if is_whole {
            next = Bytes::new();
        } else if next.is_empty() {
            // Nothing fitted: from the first again.
            next = Bytes::from_static(&[0]);
        }
    }
    let known = KnownToken {
        application: registration.row.application.clone(),
        app_version: registration.row.app_version.clone(),
        cert: registration.row.cert.clone(),
        created_ms: registration.row.created_ms,
        last_seen_day: seen.map_or(0, |row| row.last_seen_day),
        topics,
        next,
    };
    Ok(Answer { kind: Some(Kind::TokenInfo(known)) })
}

/// Forgets at most `rows_max` subscriptions of a registration that is gone. What is left is due at once among what runs out.
pub(super) fn forget(draft: &mut Draft<'_>, subscriber: Subscriber, rows_max: usize) -> Result<usize, StateError> {
    let count = count(&draft.rows, subscriber)? as usize;
    if count == 0 {
        return Ok(0);
    }
    let (from, to) = subscription::device_range(subscriber);
    let page = draft.rows.scan(&from, &to, rows_max)?;
    let gone = page.len();
    for (key, _) in page {
        let (_, topic) =
            subscription::decode_device_key(&key).ok_or(StateError::Broken("a subscription key is misshapen"))?;
        remove(draft, subscriber, topic);
    }
    let left = count.checked_sub(gone).ok_or(StateError::Broken("a topic too few is counted"))?;
    set_count(draft, subscriber, left);
    if left > 0 {
        let now_ms = draft.now_ms();
        draft.rows.put(lapse::key(now_ms, subscriber.0, subscriber.1), Bytes::new());
    }
    Ok(gone)
}

/// Whether a registration has subscriptions.
pub(super) fn has_any(rows: &dyn Rows, subscriber: Subscriber) -> Result<bool, StateError> {
    Ok(count(rows, subscriber)? > 0)
}

fn remove(draft: &mut Draft<'_>, subscriber: Subscriber, topic: TopicId) {
    draft.rows.remove(subscription::key(topic, subscriber));
    draft.rows.remove(subscription::device_key(subscriber, topic));
}

fn count(rows: &dyn Rows, subscriber: Subscriber) -> Result<u32, StateError> {
    let key = subscription::count_key(subscriber);
    let value = rows.get(&key)?;
    Ok(value.map(|value| subscription::decode_count(&key, &value)).transpose()?.unwrap_or(0))
}

fn set_count(draft: &mut Draft<'_>, subscriber: Subscriber, count: usize) {
    let key = subscription::count_key(subscriber);
    match u32::try_from(count).unwrap_or(u32::MAX) {
        0 => draft.rows.remove(key),
        count => draft.rows.put(key, subscription::encode_count(count)),
    }
}

fn subscribed() -> Answer {
    Answer { kind: Some(Kind::Subscribed(Subscribed {})) }
}
