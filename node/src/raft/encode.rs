//! Raft's values as bytes: in the log, in the store's mark, between nodes. One direction of each pair never fails; the other
//! takes any bytes and answers.
//!
//! An entry's payload in the log is one byte (its kind) and the rest: nothing, the command, or a `Membership`.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use bytes::{BufMut, Bytes, BytesMut};
use martlet_proto::cluster::raft as wire;
use openraft::EntryPayload;
use prost::Message;

use super::{
    group::Member,
    types::{Command, Entry, LogId, Membership, StoredMembership, Vote, log_id, plain_vote, position},
};
use crate::log;

const BLANK: u8 = 0;
const COMMAND: u8 = 1;
const MEMBERSHIP: u8 = 2;

/// As the log keeps it.
pub(super) fn to_log(entry: &Entry) -> log::Entry {
    let payload = match &entry.payload {
        EntryPayload::Blank => Bytes::from_static(&[BLANK]),
        EntryPayload::Normal(Command(bytes)) => prefixed(COMMAND, bytes),
        EntryPayload::Membership(membership) => prefixed(MEMBERSHIP, &to_membership(membership).encode_to_vec()),
    };
    log::Entry { at: super::types::entry_position(entry), payload }
}

pub(super) fn from_log(entry: log::Entry) -> io::Result<Entry> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("entry {}: {what}", entry.at));
    let payload = match entry.payload.first() {
        Some(&BLANK) => EntryPayload::Blank,
        Some(&COMMAND) => EntryPayload::Normal(Command(entry.payload.slice(1..))),
        Some(&MEMBERSHIP) => {
            let decoded = wire::Membership::decode(entry.payload.slice(1..)).map_err(|e| bad(&e.to_string()))?;
            EntryPayload::Membership(from_membership(decoded).map_err(|e| bad(&e))?)
        }
        _ => return Err(bad("of unknown kind")),
    };
    Ok(Entry { log_id: log_id(entry.at), payload })
}

fn prefixed(kind: u8, rest: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(1 + rest.len());
    bytes.put_u8(kind);
    bytes.put_slice(rest);
    bytes.freeze()
}

/// What the store keeps beside the rows of an applied entry.
pub(super) fn to_mark(applied: &LogId, membership: &StoredMembership) -> Bytes {
    let mark = wire::Mark {
        applied: Some(to_log_id(applied)),
        membership_at: membership.log_id().as_ref().map(to_log_id),
        membership: Some(to_membership(membership.membership())),
    };
    mark.encode_to_vec().into()
}

pub(super) fn from_mark(bytes: Bytes) -> io::Result<(Option<LogId>, StoredMembership)> {
    let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, format!("mark of the store: {what}"));
    let mark = wire::Mark::decode(bytes).map_err(|e| bad(e.to_string()))?;
    let membership = match mark.membership {
        Some(membership) if !membership.configs.is_empty() => from_membership(membership).map_err(bad)?,
        _ => Membership::default(),
    };
    let at = mark.membership_at.map(|at| from_log_id(&at));
    Ok((mark.applied.map(|at| from_log_id(&at)), StoredMembership::new(at, membership)))
}

pub(super) fn to_log_id(at: &LogId) -> wire::LogId {
    let at = position(at);
    wire::LogId { term: at.term, index: at.index }
}

pub(super) fn from_log_id(at: &wire::LogId) -> LogId {
    log_id(log::Index { term: at.term, index: at.index })
}

pub(super) fn to_vote(vote: &Vote) -> wire::Vote {
    let vote = plain_vote(vote);
    wire::Vote { term: vote.term, replica: vote.replica, committed: vote.committed }
}

pub(super) fn from_vote(vote: &wire::Vote) -> Vote {
    super::types::vote(log::Vote { term: vote.term, replica: vote.replica, committed: vote.committed })
}

pub(super) fn to_entry(entry: &Entry) -> wire::Entry {
    let kind = match &entry.payload {
        EntryPayload::Blank => None,
        EntryPayload::Normal(Command(bytes)) => Some(wire::entry::Kind::Command(bytes.clone())),
        EntryPayload::Membership(membership) => Some(wire::entry::Kind::Membership(to_membership(membership))),
    };
    wire::Entry { at: Some(to_log_id(&entry.log_id)), kind }
}

pub(super) fn from_entry(entry: wire::Entry) -> Result<Entry, String> {
    let at = entry.at.ok_or("entry without a position")?;
    let payload = match entry.kind {
        None => EntryPayload::Blank,
        Some(wire::entry::Kind::Command(bytes)) => EntryPayload::Normal(Command(bytes)),
        Some(wire::entry::Kind::Membership(membership)) => EntryPayload::Membership(from_membership(membership)?),
    };
    Ok(Entry { log_id: from_log_id(&at), payload })
}

fn to_membership(membership: &Membership) -> wire::Membership {
    let configs = membership.get_joint_config().iter();
    let members = membership.nodes();
    wire::Membership {
        configs: configs.map(|voters| wire::Voters { replicas: voters.iter().copied().collect() }).collect(),
        members: members
            .map(|(replica, member)| wire::Member {
                replica: *replica,
                node: member.node,
                address: member.address.clone(),
            })
            .collect(),
    }
}

fn from_membership(membership: wire::Membership) -> Result<Membership, String> {
    let configs: Vec<BTreeSet<u64>> =
        membership.configs.into_iter().map(|voters| voters.replicas.into_iter().collect()).collect();
    let members: BTreeMap<u64, Member> = membership
        .members
        .into_iter()
        .map(|member| (member.replica, Member { node: member.node, address: member.address }))
        .collect();
    Membership::new(configs, members).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn membership() -> Membership {
        let member = |node| Member { node, address: format!("n{node}:7400") };
        let members: BTreeMap<u64, Member> = (1..=4).map(|n| (n, member(n))).collect();
        Membership::new(vec![BTreeSet::from([1, 2, 3]), BTreeSet::from([2, 3])], members).unwrap()
    }

    fn entries() -> Vec<Entry> {
        let at = |index| log_id(log::Index { term: 3, index });
        vec![
            Entry { log_id: at(0), payload: EntryPayload::Blank },
            Entry { log_id: at(1), payload: EntryPayload::Normal(Command(Bytes::from_static(b"x"))) },
            Entry { log_id: at(2), payload: EntryPayload::Membership(membership()) },
        ]
    }

    #[test]
    fn entries_round_trip_through_log_and_wire() {
        for entry in entries() {
            assert_eq!(from_log(to_log(&entry)).unwrap(), entry);
            assert_eq!(from_entry(to_entry(&entry)).unwrap(), entry);
        }
    }

    #[test]
    fn marks_round_trip() {
        let applied = log_id(log::Index { term: 2, index: 9 });
        for membership in [StoredMembership::default(), StoredMembership::new(Some(applied), membership())] {
            assert_eq!(from_mark(to_mark(&applied, &membership)).unwrap(), (Some(applied), membership));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes: Vec<u8>) {
            let bytes = Bytes::from(bytes);
            let _ = from_mark(bytes.clone());
            let _ = from_log(log::Entry { at: log::Index::default(), payload: bytes });
        }
    }
}
