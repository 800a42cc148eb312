//! The state machine of a group, as this crate writes it, under openraft's.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Mutex,
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use martlet_proto::cluster::{meta::MetaAnswer, queue::Answer};
use openraft::{
    EntryPayload, OptionalSend, RaftSnapshotBuilder,
    storage::{EntryResponder, RaftStateMachine, Snapshot, SnapshotMeta},
    type_config::alias,
};
use tokio::sync::watch;

use super::{
    encode::{from_mark, to_mark},
    types::{LogId, StoredMembership, Types, entry_position},
};
use crate::log::{GroupLog, Index};

/// Between two looks of a follower whether there is memory for more.
const ROOM_WAIT: Duration = Duration::from_millis(50);

/// What a group's entries are applied to.
///
/// Called from one task at a time, in log order, for committed entries only. It may block for as long as a row read takes.
pub trait Machine: Send + 'static {
    /// The mark given with the last entry that survived in the store, at start; `None` for a new replica. Entries after it are
    /// applied again.
    fn mark(&self) -> Option<Bytes>;

    /// Applies one proposed entry. `mark` is to be kept together with what the entry writes.
    ///
    /// An error (or a panic) stops this replica, not the process; it must have written nothing.
    fn apply(&mut self, at: Index, mark: Bytes, payload: &[u8]) -> Result<Reply, MachineError>;

    /// An entry without a payload (a new term, a membership): only the mark moves.
    fn advance(&mut self, at: Index, mark: Bytes) -> Result<(), MachineError>;

    /// Whether a follower has to wait before it applies more: its memory is used up.
    fn must_wait(&self) -> bool {
        false
    }

    /// Called with the term before the first entry is applied that this replica proposed as its leader in this process, and
    /// with `None` before the first entry of another leader after that: effects are carried out by the leader only.
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

/// Applies entries to a [`Machine`], in the order of the log.
pub(super) struct Applier {
    /// Never contended: openraft wants it shareable, a machine need not be.
    machine: Mutex<Box<dyn Machine>>,
    applied: Option<LogId>,
    membership: StoredMembership,
    replica: u64,
    /// Whose vote says which terms this replica leads.
    log: GroupLog,
    /// Terms up to this one were led, if at all, by an earlier process.
    former_term: u64,
    leading: Option<u64>,
    /// Newest term led by this replica of which its own first entry is applied.
    led: watch::Sender<u64>,
}

impl Applier {
    pub(super) fn new(
        machine: Box<dyn Machine>,
        replica: u64,
        log: GroupLog,
        led: watch::Sender<u64>,
    ) -> io::Result<Applier> {
        let (applied, membership) = machine.mark().map_or_else(|| Ok(Default::default()), from_mark)?;
        let former_term = log.vote().map_or(0, |vote| vote.term);
        let machine = Mutex::new(machine);
        Ok(Applier { machine, applied, membership, replica, log, former_term, leading: None, led })
    }

    /// Why what the store holds and what the log holds cannot belong together, if so.
    ///
    /// The store may lie behind the log: the log is applied again from there, to the same rows. Behind the log's purge point it
    /// cannot be mended here: entries between are gone. That is how a store that fell back whole to an older checkpoint is found,
    /// and one that was lost: as long as nothing is purged past it, falling back loses nothing. A store with entries beside a log
    /// that has not even a vote of the group is one whose log was lost: it might vote a second time in a term.
    pub(super) fn contradiction(&self) -> Option<String> {
        let (applied, log) = (self.applied.map(|at| at.index()), &self.log);
        let store = applied.map_or_else(|| "its store is empty".into(), |at| format!("its store ends at index {at}"));
        if let Some(purged) = log.purged()
            && applied.is_none_or(|at| at < purged.index)
        {
            return Some(format!(
                "{store}, the log in {} begins after index {}: the store has fallen back or was replaced, and the entries between are gone",
                log.dir().display(),
                purged.index
            ));
        }
        (applied.is_some() && log.vote().is_none() && log.last().is_none()).then(|| {
            format!("{store}, the log in {} holds nothing of the group: it was lost or replaced", log.dir().display())
        })
    }

    fn one(&mut self, entry: super::types::Entry) -> io::Result<Reply> {
        let at = entry_position(&entry);
        self.note_leader(at.term);
        if let EntryPayload::Membership(membership) = &entry.payload {
            self.membership = StoredMembership::new(Some(entry.log_id), membership.clone());
        }
        let mark = to_mark(&entry.log_id, &self.membership);
        let machine = exclusive(&mut self.machine);
        // A panic stops this replica and names the entry; what the machine held is never used again.
        let result = catch_unwind(AssertUnwindSafe(|| match entry.payload {
            EntryPayload::Normal(command) => machine.apply(at, mark, &command.0),
            _ => machine.advance(at, mark).map(|()| Reply::None),
        }));
        let reply = result
            .unwrap_or_else(|panic| Err(MachineError { at, what: format!("panicked: {}", said(&*panic)) }))
            .map_err(io::Error::other)?;
        self.applied = Some(entry.log_id);
        if let Some(term) = self.leading {
            self.led.send_if_modified(|led| std::mem::replace(led, term) != term);
        }
        Ok(reply)
    }

    /// Before an entry of this term is applied.
    fn note_leader(&mut self, term: u64) {
        if self.leading == Some(term) {
            return;
        }
        let own = term > self.former_term
            && self.log.vote().is_some_and(|vote| vote.committed && vote.replica == self.replica && vote.term == term);
        let leading = own.then_some(term);
        if leading != self.leading {
            self.leading = leading;
            exclusive(&mut self.machine).leading(leading);
        }
    }
}

fn exclusive(machine: &mut Mutex<Box<dyn Machine>>) -> &mut dyn Machine {
    &mut **machine.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn said(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

impl RaftStateMachine<Types> for Applier {
    type SnapshotData = ();
    type SnapshotBuilder = Covered;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + OptionalSend,
    {
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            // A leader refuses enqueues instead, and goes on with the acks and expiry that free memory.
            while self.leading.is_none() && exclusive(&mut self.machine).must_wait() {
                tokio::time::sleep(ROOM_WAIT).await;
            }
            let reply = self.one(entry)?;
            if let Some(responder) = responder {
                responder.send(reply);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Covered {
        Covered { meta: SnapshotMeta { last_log_id: self.applied, last_membership: self.membership.clone() } }
    }

    async fn install_snapshot(&mut self, _: &alias::SnapshotMetaOf<Types>, (): ()) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "snapshots between nodes are not built yet"))
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<alias::SnapshotOf<Types, ()>>> {
        Ok(None)
    }
}

/// What openraft takes for a snapshot: how far one would reach. It never purges beyond the newest; the log is purged on
/// demand only (see `Group::purge_upto`), so that this need not be durable.
pub(super) struct Covered {
    meta: alias::SnapshotMetaOf<Types>,
}

impl RaftSnapshotBuilder<Types> for Covered {
    type SnapshotData = ();

    async fn build_snapshot(&mut self) -> io::Result<alias::SnapshotOf<Types, ()>> {
        Ok(Snapshot { meta: self.meta.clone(), snapshot: () })
    }
}
