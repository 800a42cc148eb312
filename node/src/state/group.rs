//! Device groups: which registrations one notification key stands for.
//!
//! Owns the group rows. A group lives in the shard of its tag, its members in theirs, so nothing here knows whether a member is
//! alive: gateways find that out, and say who leaves. A name belongs to one group of its sender at a time; a group that nobody is
//! left in goes, and its name is free. A change happens whole or not at all.
//!
//! Source: gcm-http.md section 9.

use std::collections::BTreeSet;

use bytes::Bytes;
use martlet_proto::{
    cluster::{
        command::Limits,
        queue::{Answer, Group, GroupChange, GroupGet, GroupMember, Refusal, answer::Kind, group_get::By},
    },
    group::{GroupBits, GroupTag},
    limits::{GROUP_NAME_MAX_BYTES, MULTICAST_MAX},
};

use super::{
    StateError,
    draft::{Draft, refused},
    rows::Rows,
};
use crate::store::key::{self, group::GroupRow};

/// Groups of one tag that are looked at, and so made. Two have one tag by chance alone, of 2^64.
const SAME_TAG_MAX: usize = 16;

/// Registrations that one change may name on either side: those of a request, and those that were members.
const NAMED_MAX: usize = 2 * MULTICAST_MAX;

/// A group and the random part of its notification key.
type Found = (GroupBits, GroupRow);

/// Makes a group, or changes who is in one.
pub(super) fn change(draft: &mut Draft<'_>, change: &GroupChange, limits: &Limits) -> Result<Answer, StateError> {
    if !well_formed(change) {
        return Ok(refused(Refusal::Malformed));
    }
    let tag = GroupTag(change.group_tag);
    let bits = GroupBits(change.key_bits);
    let all = of_tag(&draft.rows, tag)?;
    let before = if change.create {
        if all.iter().any(|(_, row)| row.sender == change.sender && row.name == change.name) {
            return Ok(refused(Refusal::GroupExists));
        }
        if all.len() >= SAME_TAG_MAX || all.iter().any(|(taken, _)| *taken == bits) {
            return Ok(refused(Refusal::Malformed));
        }
        GroupRow {
            sender: change.sender.clone(),
            name: change.name.clone(),
            token_key_id: change.token_key_id,
            created_ms: draft.now_ms(),
            members: Vec::new(),
        }
    } else {
        match by_bits(all, bits, &change.sender) {
            Err(refusal) => return Ok(refused(refusal)),
            Ok((_, row)) if !change.name.is_empty() && change.name != row.name => {
                return Ok(refused(Refusal::GroupNameMismatch));
            }
            Ok((_, row)) => row,
        }
    };
    let members = changed(&before.members, &change.leave, &change.join);
    if members.len() > before.members.len().max(limits.group_members_max as usize) {
        return Ok(refused(Refusal::GroupFull));
    }
    if change.create && members.is_empty() {
        return Ok(refused(Refusal::NoValidMembers));
    }
    let key = key::group::key(tag, bits);
    let after = GroupRow { members, ..before.clone() };
    if after.members.is_empty() {
        draft.rows.remove(key);
    } else if after != before {
        draft.rows.put(key, key::group::encode(&after));
    }
    Ok(group(bits, GroupRow { members: Vec::new(), ..after }))
}

/// Reads a group, by name or by the random part of its notification key.
pub(super) fn get(rows: &dyn Rows, get: &GroupGet) -> Result<Answer, StateError> {
    let all = of_tag(rows, GroupTag(get.group_tag))?;
    let found = match &get.by {
        Some(By::Name(name)) => {
            let named = all.into_iter().find(|(_, row)| row.sender == get.sender && row.name == *name);
            named.ok_or(Refusal::GroupNotFound)
        }
        Some(By::KeyBits(bits)) => by_bits(all, GroupBits(*bits), &get.sender),
        None => Err(Refusal::Malformed),
    };
    Ok(found.map_or_else(refused, |(bits, row)| group(bits, row)))
}

fn well_formed(change: &GroupChange) -> bool {
    let named = change.name.len() <= GROUP_NAME_MAX_BYTES && (!change.create || !change.name.is_empty());
    let ids = change.join.iter().map(|member| &member.registration_id).chain(&change.leave);
    named
        && !change.sender.is_empty()
        && change.join.len().max(change.leave.len()) <= NAMED_MAX
        && ids.into_iter().all(|id| id.len() == 16)
}

/// Who is in it when some have left and some have joined; members keep their places.
fn changed(members: &[GroupMember], leave: &[Bytes], join: &[GroupMember]) -> Vec<GroupMember> {
    let leave: BTreeSet<&Bytes> = leave.iter().collect();
    let mut stay: Vec<GroupMember> =
        members.iter().filter(|member| !leave.contains(&member.registration_id)).cloned().collect();
    let mut present: BTreeSet<Bytes> = stay.iter().map(|member| member.registration_id.clone()).collect();
    stay.extend(join.iter().filter(|member| present.insert(member.registration_id.clone())).cloned());
    stay
}

fn by_bits(all: Vec<Found>, bits: GroupBits, sender: &str) -> Result<Found, Refusal> {
    let found = all.into_iter().find(|(own, _)| *own == bits).ok_or(Refusal::GroupNotFound)?;
    if found.1.sender == sender { Ok(found) } else { Err(Refusal::MismatchSenderId) }
}

fn of_tag(rows: &dyn Rows, tag: GroupTag) -> Result<Vec<Found>, StateError> {
    let (from, to) = key::group::range(tag);
    let found = rows.scan(&from, &to, SAME_TAG_MAX)?.into_iter().map(|(key, value)| {
        let (_, bits) = key::group::decode_key(&key).ok_or(StateError::Broken("a group key is misshapen"))?;
        Ok((bits, key::group::decode(&key, value)?))
    });
    found.collect()
}

fn group(bits: GroupBits, row: GroupRow) -> Answer {
    let GroupRow { sender: _, name, token_key_id, created_ms, members } = row;
    Answer { kind: Some(Kind::Group(Group { key_bits: bits.0, token_key_id, name, created_ms, members })) }
}
