//! Messages for topics at home: kept until every shard has them.
//!
//! Owns the rows of publishes in the topic's home shard. Who hands them to the other shards is the leader's business
//! (`shard/hand_over.rs`); it says afterwards which are over. The invariant: a publish that was answered is here until it is known to
//! be in every shard, or its time is over.

use bytes::Bytes;
use martlet_proto::{
    cluster::{
        command::{Limits, PublishesDone},
        queue::{Answer, Publish, Published, Refusal, answer::Kind},
    },
    limits::{CONDITION_TOPICS_MAX, TTL_MAX_SECS},
    message::Sequence,
    topic::{is_name, is_program},
};
use prost::Message as _;

use super::{
    StateError,
    dedupe::OperationId,
    draft::{Draft, refused},
    rows::Rows,
};
use crate::store::key::publish::{self, HomeRow};

/// A message with time to live 0 is handed on and delivered within this, milliseconds, or never: as long as one to a single device
/// waits for credit (`shard.now_or_never`).
pub(super) const NOW_OR_NEVER_MS: u64 = 1_000;

/// Keeps a publish.
pub(super) fn publish(
    draft: &mut Draft<'_>,
    place: Sequence,
    id: OperationId,
    publish: &Publish,
    limits: &Limits,
) -> Result<Answer, StateError> {
    if !well_formed(publish) {
        return Ok(refused(Refusal::Malformed));
    }
    if draft.shard.publishes_open >= limits.publishes_max {
        return Ok(refused(Refusal::TopicsRateExceeded));
    }
    draft.shard.publishes_open += 1;
    let life_ms = (u64::from(publish.ttl_secs) * 1000).max(NOW_OR_NEVER_MS);
    let row = HomeRow {
        publish_id: Bytes::copy_from_slice(&id),
        expiry_ms: draft.now_ms().saturating_add(life_ms),
        publish: publish.clone(),
    };
    draft.rows.put_fresh(publish::home_key(place), row.encode_to_vec().into());
    Ok(Answer { kind: Some(Kind::Published(Published {})) })
}

/// Drops publishes that are over everywhere. Those that are gone stay gone.
pub(super) fn done(draft: &mut Draft<'_>, done: &PublishesDone) -> Result<(), StateError> {
    for place in done.places.iter().filter_map(|place| Sequence::from_bytes(place)) {
        let key = publish::home_key(place);
        if draft.rows.get(&key)?.is_some() {
            draft.rows.remove(key);
            let open = draft.shard.publishes_open.checked_sub(1);
            draft.shard.publishes_open = open.ok_or(StateError::Broken("a publish too few is counted"))?;
        }
    }
    Ok(())
}

/// Publishes that are kept, from `from` on, in their order, at most `limit`.
///
/// # Errors
/// When the rows cannot be read or are not what they should be.
pub fn kept(rows: &dyn Rows, from: Option<Sequence>, limit: usize) -> Result<Vec<(Sequence, HomeRow)>, StateError> {
    let (from, to) = publish::home_range(from);
    rows.scan(&from, &to, limit)?
        .into_iter()
        .map(|(key, value)| {
            let place = publish::decode_home_key(&key).ok_or(StateError::Broken("a publish's key is misshapen"))?;
            Ok((place, publish::decode_home(&key, value)?))
        })
        .collect()
}

/// Whether a publish may be kept and fanned out.
pub(super) fn well_formed(publish: &Publish) -> bool {
    !publish.sender.is_empty()
        && (1..=CONDITION_TOPICS_MAX).contains(&publish.topics.len())
        && publish.topics.iter().all(|name| is_name(name))
        && is_program(&publish.condition, publish.topics.len())
        && publish.ttl_secs <= TTL_MAX_SECS
}
