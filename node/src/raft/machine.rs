//! The state machine of a group, as this crate writes it, under openraft's.

use bytes::Bytes;
use martlet_proto::cluster::{meta::MetaAnswer, queue::Answer};

use crate::log::Index;

/// What a group's entries are applied to.
///
/// Called from one task at a time, in log order, for committed entries only. It may block for as long as a row read takes.
pub trait Machine: Send + 'static {
    /// The mark given with the last entry that survived in the store, at start; `None` for a new replica. Entries after it are
    /// applied again.
    fn mark(&self) -> Option<Bytes>;

    /// Applies one proposed entry. `mark` is to be kept together with what the entry writes.
    ///
    /// An error stops this replica, not the process; it must have written nothing.
    fn apply(&mut self, at: Index, mark: Bytes, payload: &[u8]) -> Result<Reply, MachineError>;

    /// An entry without a payload (a new term, a membership): only the mark moves.
    fn advance(&mut self, at: Index, mark: Bytes) -> Result<(), MachineError>;

    /// Called before the first entry is applied that this replica proposed as leader of `term`, and with `None` before the
    /// first entry of another leader after that: effects are carried out by the leader only.
    fn leading(&mut self, term: Option<u64>) {
        let _ = term;
    }
}

/// Why an entry cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("entry {at} cannot be applied: {what}")]
pub struct MachineError {
    /// The entry.
    pub at: Index,
    /// What went wrong.
    pub what: String,
}

/// What a machine answers to a proposal.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// One answer per command of the entry, where it has one.
    Shard(Vec<Option<Answer>>),
    /// Of the meta group.
    Meta(MetaAnswer),
    /// The entry has no answer.
    None,
}
