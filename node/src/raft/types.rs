//! The types openraft is used with. Standard Raft: one leader a term, so a log position is (term, index).

use std::fmt;

use bytes::Bytes;
use openraft::{entry::RaftEntry, type_config::alias};

use super::{group::Member, machine::Reply};
use crate::log;

openraft::declare_raft_types!(
    /// What a group is made of.
    pub(super) Types:
        D = Command,
        R = Reply,
        NodeId = u64,
        Node = Member,
        Term = u64,
        LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>,
        AsyncRuntime = super::ticks::SharedTicks,
);

pub(super) type Raft = openraft::Raft<Types, super::machine::Applier>;
pub(super) type LogId = alias::LogIdOf<Types>;
pub(super) type Vote = alias::VoteOf<Types>;
pub(super) type Entry = alias::EntryOf<Types>;
pub(super) type Membership = openraft::Membership<u64, Member>;
pub(super) type StoredMembership = alias::StoredMembershipOf<Types>;

/// A proposed payload; opaque here.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Command(pub(super) Bytes);

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

pub(super) fn log_id(at: log::Index) -> LogId {
    LogId::new(at.term.into(), at.index)
}

pub(super) fn position(at: &LogId) -> log::Index {
    log::Index { term: at.committed_leader_id().term, index: at.index() }
}

pub(super) fn entry_position(entry: &Entry) -> log::Index {
    position(&entry.log_id())
}

pub(super) fn vote(vote: log::Vote) -> Vote {
    match vote.committed {
        true => Vote::new_committed(vote.term, vote.replica),
        false => Vote::new(vote.term, vote.replica),
    }
}

pub(super) fn plain_vote(vote: &Vote) -> log::Vote {
    let leader = vote.leader_id();
    log::Vote { term: leader.term, replica: leader.voted_for, committed: vote.is_committed() }
}
