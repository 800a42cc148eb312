//! The state machine of a group, as this crate writes it, under openraft's.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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
    park::{self, Decision, Parking, Stop, Why},
    snapshot::{Snap, Snapshots, Staged},
    types::{Entry, LogId, StoredMembership, Types, entry_position},
};
use crate::{
    bug::Bug,
    log::{GroupLog, Index},
    panicked,
};

/// Between two looks of a follower whether there is memory for more.
const ROOM_WAIT: Duration = Duration::from_millis(50);

/// What a group's entries are applied to.
///
/// Called from one task at a time, in log order, for committed entries only. It may block for as long as a row read takes.
pub trait Machine: Send + 'static {
    /// The mark given with the last entry that survived in the store, at start; `None` for a new replica. Entries after it are
    /// applied again.
    fn mark(&self) -> Option<Bytes>;

    /// Applies one proposed entry. `mark` is to be kept together with what the entry writes. What is kept of `payload` must be
    /// copied: a slice of it keeps the whole entry in memory.
    ///
    /// An error (or a panic) stops this replica, not the process; it must have written nothing. With [`Fault::Entry`] the machine
    /// is as before the call: the replica waits before the entry, and may be told to pass over it.
    fn apply(&mut self, at: Index, mark: Bytes, payload: &Bytes) -> Result<Reply, MachineError>;

    /// An entry without a payload (a new term, a membership): only the mark moves.
    fn advance(&mut self, at: Index, mark: Bytes) -> Result<(), MachineError>;

    /// Whether a follower has to wait before it applies more: its memory is used up.
    fn must_wait(&self) -> bool {
        false
    }

    /// Makes a snapshot what the machine holds, instead of all it held, and shows it from then on. An error stops this replica.
    fn install(&mut self, staged: Box<dyn Staged>) -> Result<(), String> {
        let _ = staged;
        Err("this machine takes no snapshots".to_owned())
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
    /// Whose fault it is.
    pub fault: Fault,
}

/// Whose fault it is that an entry cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Of what the entry asks for: other replicas of the same program meet it too. Nothing was changed.
    Entry {
        /// Which command of the entry, by place and kind.
        operation: String,
    },
    /// Of this replica or its disk.
    Replica,
}

/// The machine of a replica; never contended: openraft wants it shareable, a machine need not be.
pub(super) type Shared = Arc<Mutex<Box<dyn Machine>>>;

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
    machine: Shared,
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
    parking: Arc<Parking>,
    /// Entries up to here are applied before the group runs: that must not wait.
    replays_upto: u64,
    snapshots: Arc<dyn Snapshots>,
}

impl Applier {
    pub(super) fn new(
        machine: &Shared,
        replica: u64,
        log: GroupLog,
        led: watch::Sender<u64>,
        parking: Arc<Parking>,
        replays_upto: u64,
        snapshots: Arc<dyn Snapshots>,
    ) -> io::Result<Applier> {
        let mark = exclusive(machine).mark();
        let (applied, membership) = mark.map_or_else(|| Ok(Default::default()), from_mark)?;
        let former_term = log.vote().map_or(0, |vote| vote.term);
        let machine = Arc::clone(machine);
        let leading = None;
        Ok(Applier {
            machine,
            applied,
            membership,
            replica,
            log,
            former_term,
            leading,
            led,
            parking,
            replays_upto,
            snapshots,
        })
    }

    /// What openraft takes for a snapshot, by what is applied.
    fn applied_meta(&self) -> alias::SnapshotMetaOf<Types> {
        SnapshotMeta { last_log_id: self.applied, last_membership: self.membership.clone() }
    }

    /// Last entry applied.
    pub(super) fn applied(&self) -> Option<LogId> {
        self.applied
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

    /// Applies an entry, or passes over it, if need be after a wait.
    async fn one_or_wait(&mut self, entry: &Entry) -> io::Result<Reply> {
        loop {
            let stop = match self.one(entry)? {
                Ok(reply) => {
                    self.parking.passed();
                    return Ok(reply);
                }
                Err(stop) => stop,
            };
            self.parking.stopped(&stop);
            if stop.at.index <= self.replays_upto {
                return Err(io::Error::other(stop.to_string()));
            }
            let log = &self.log;
            let committed = || log.committed().map_or(0, |at| at.index);
            self.parking.decided(&stop, committed).await.map_err(io::Error::other)?;
        }
    }

    fn one(&mut self, entry: &Entry) -> io::Result<Result<Reply, Stop>> {
        let at = entry_position(entry);
        let skips = match &entry.payload {
            EntryPayload::Normal(command) => match self.parking.decisions.of(at.index) {
                Decision::None => false,
                Decision::Held => return Ok(Err(self.held(at, &command.0))),
                Decision::Skip { term, digest } if term == at.term && digest == park::digest(&command.0) => true,
                Decision::Skip { .. } => return Ok(Err(self.stop(at, &command.0, Why::OtherEntry))),
            },
            EntryPayload::Blank | EntryPayload::Membership(_) => false,
        };
        self.note_leader(at.term);
        if let EntryPayload::Membership(membership) = &entry.payload {
            self.membership = StoredMembership::new(Some(entry.log_id), membership.clone());
        }
        let mark = to_mark(&entry.log_id, &self.membership);
        let mut machine = exclusive(&self.machine);
        // A panic that the machine did not catch stops this replica and names the entry; what the machine held is never used again.
        let result = catch_unwind(AssertUnwindSafe(|| match &entry.payload {
            EntryPayload::Normal(command) if !skips => machine.apply(at, mark, &command.0),
            _ => machine.advance(at, mark).map(|()| Reply::None),
        }));
        drop(machine);
        let result = result.unwrap_or_else(|panic| {
            let what = format!("panicked: {}", panicked::said(&*panic));
            Err(MachineError { at, what, fault: Fault::Replica })
        });
        let reply = match (result, &entry.payload) {
            (Ok(reply), _) => reply,
            (Err(MachineError { what, fault: Fault::Entry { operation }, .. }), EntryPayload::Normal(command)) => {
                return Ok(Err(self.stop(at, &command.0, Why::Poison { operation, what })));
            }
            (Err(error), _) => return Err(io::Error::other(error)),
        };
        if skips {
            tracing::warn!(group = %self.parking.group, index = at.index, term = at.term, "an entry is skipped, as was decided");
        }
        self.applied = Some(entry.log_id);
        if let Some(term) = self.leading {
            self.led.send_if_modified(|led| std::mem::replace(led, term) != term);
        }
        Ok(Ok(reply))
    }

    /// The entry is not tried, unless this process has tried it already: before its group ran.
    fn held(&self, at: Index, payload: &[u8]) -> Stop {
        let held = self.stop(at, payload, Why::Held);
        let tried = |stop: &Stop| matches!(stop.why, Why::Poison { .. }) && (stop.at, stop.digest) == (at, held.digest);
        self.parking.now().filter(tried).unwrap_or(held)
    }

    fn stop(&self, at: Index, payload: &[u8], why: Why) -> Stop {
        Stop { group: self.parking.group, at, digest: park::digest(payload), why }
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
            exclusive(&self.machine).leading(leading);
        }
    }
}

fn exclusive(machine: &Shared) -> MutexGuard<'_, Box<dyn Machine>> {
    machine.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RaftStateMachine<Types> for Applier {
    type SnapshotData = Snap;
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
            while self.leading.is_none() && exclusive(&self.machine).must_wait() {
                tokio::time::sleep(ROOM_WAIT).await;
            }
            let reply = self.one_or_wait(&entry).await?;
            if let Some(responder) = responder {
                responder.send(reply);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Covered {
        let newest = self.snapshots.newest().filter(|_| !Bug::PurgeBeforeBase.is_in());
        let meta = newest.and_then(|mark| meta_of(mark).ok());
        // Without a base nothing is purged; a log that was purged all the same has one soon.
        Covered { meta: meta.unwrap_or_else(|| self.applied_meta()) }
    }

    async fn install_snapshot(&mut self, meta: &alias::SnapshotMetaOf<Types>, snap: Snap) -> io::Result<()> {
        let staged = match snap {
            Snap::Staged(staged) => staged,
            Snap::Outgoing(_) => return Err(io::Error::other("the store lies behind its own base")),
            Snap::Nothing(why) => return Err(io::Error::other(why)),
        };
        // What of the log contradicts the snapshot was truncated: that must not come back beside its rows.
        self.log.settle().await?;
        let machine = Arc::clone(&self.machine);
        let installed = tokio::task::spawn_blocking(move || {
            catch_unwind(AssertUnwindSafe(|| exclusive(&machine).install(staged)))
                .unwrap_or_else(|panic| Err(format!("panicked: {}", panicked::said(&*panic))))
        });
        installed.await.map_err(io::Error::other)?.map_err(io::Error::other)?;
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        Ok(())
    }

    /// Never an error, and never nothing once the log was purged: openraft would stop the group for want of a snapshot that it asks
    /// for. One that cannot be opened now is said when it is to be sent, and asked for again.
    async fn get_current_snapshot(&mut self) -> io::Result<Option<alias::SnapshotOf<Types, Snap>>> {
        let why = match self.snapshots.open() {
            Ok(Some(outgoing)) => match meta_of(outgoing.described().mark) {
                Ok(meta) => return Ok(Some(Snapshot { meta, snapshot: Snap::Outgoing(outgoing) })),
                Err(error) => error.to_string(),
            },
            Ok(None) if self.log.purged().is_none() => return Ok(None),
            Ok(None) => "there is no base file yet".to_owned(),
            Err(why) => why,
        };
        Ok(Some(Snapshot { meta: self.applied_meta(), snapshot: Snap::Nothing(why) }))
    }
}

fn meta_of(mark: Bytes) -> io::Result<alias::SnapshotMetaOf<Types>> {
    let (last_log_id, last_membership) = from_mark(mark)?;
    Ok(SnapshotMeta { last_log_id, last_membership })
}

/// How far a snapshot reaches: what openraft asks for before it purges, and all it needs to know. What is sent is the base file.
pub(super) struct Covered {
    meta: alias::SnapshotMetaOf<Types>,
}

impl RaftSnapshotBuilder<Types> for Covered {
    type SnapshotData = Snap;

    async fn build_snapshot(&mut self) -> io::Result<alias::SnapshotOf<Types, Snap>> {
        Ok(Snapshot { meta: self.meta.clone(), snapshot: Snap::Nothing("it is read when it is sent".to_owned()) })
    }
}
