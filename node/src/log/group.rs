//! One group's part of the log, as its owner uses it.
//!
//! Each group has one owner that writes, in order; any number may read. A change is visible at once and durable when its
//! callback is called; changes of a group are durable in their order, votes included.

use std::{
    io,
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, atomic::Ordering},
};

use tokio::sync::{Semaphore, mpsc, oneshot};

use super::{
    Done, Entry, GroupId, Index, Shared, Vote,
    kept::{Kept, Place},
    lock,
    record::{self, Kind},
    writer::{Op, Queued, cost, split},
};
use crate::{bug::Bug, disk::DiskFile};

/// One group's part of the log. Cloning gives another handle.
#[derive(Clone, Debug)]
pub struct GroupLog {
    pub(super) id: GroupId,
    pub(super) kept: Arc<Mutex<Kept>>,
    pub(super) shared: Arc<Shared>,
    pub(super) queue: mpsc::Sender<Queued>,
    pub(super) room: Arc<Semaphore>,
}

impl GroupLog {
    /// Whose it is.
    pub fn id(&self) -> GroupId {
        self.id
    }

    /// Directory of the log's segments.
    pub fn dir(&self) -> &Path {
        &self.shared.config.dir
    }

    /// Adds entries that follow the last. They can be read on return; `done` is called when they are on disk. Waits while the
    /// queue is full; cancelled before it returns, nothing may be assumed.
    pub async fn append(&self, entries: Vec<Entry>, done: Done) -> io::Result<()> {
        let limit = self.shared.config.drain_bytes;
        if let Some(large) = entries.iter().find(|entry| cost(&entry.payload) > limit) {
            let what = format!("{}: entry {} takes more than the {limit} bytes of a drain", self.id, large.at);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let parts = split(entries, limit);
        let last = parts.len().saturating_sub(1);
        let mut done = Some(done);
        if parts.is_empty() {
            return self.send(Op::Append { kept: self.kept.clone(), entries: Vec::new() }, done, 0, |_| Ok(())).await;
        }
        for (n, part) in parts.into_iter().enumerate() {
            let done = if n == last { done.take() } else { None };
            let bytes = part.iter().map(|entry| cost(&entry.payload)).sum();
            let for_memory = part.clone();
            let op = Op::Append { kept: self.kept.clone(), entries: part };
            self.send(op, done, bytes, |kept| {
                for Entry { at, payload } in for_memory {
                    kept.push(at, payload, None).map_err(io::Error::other)?;
                }
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// Forgets entries from `index` on. Durable before anything that follows is.
    pub async fn truncate(&self, index: u64) -> io::Result<()> {
        let change = |kept: &mut Kept| {
            kept.truncate(index);
            Ok(())
        };
        self.send(Op::Truncate(index), None, 0, change).await
    }

    /// Forgets entries up to `at`, also when the log does not reach that far.
    pub async fn purge(&self, at: Index) -> io::Result<()> {
        let change = |kept: &mut Kept| {
            kept.purge(at);
            Ok(())
        };
        self.send(Op::Purge(at), None, 0, change).await
    }

    /// Keeps a vote; on disk on return.
    pub async fn save_vote(&self, vote: Vote) -> io::Result<()> {
        let change = |kept: &mut Kept| {
            kept.vote = Some(vote);
            Ok(())
        };
        if Bug::VoteNotSynced.is_in() {
            return self.send(Op::Vote(vote), None, 0, change).await;
        }
        self.send_and_wait(Op::Vote(vote), change).await
    }

    /// Notes that entries up to `at` are committed. Written along with what is written next; a crash may forget it.
    pub fn save_committed(&self, at: Option<Index>) {
        let mut kept = lock(&self.kept);
        kept.committed_moved |= kept.committed != at;
        kept.committed = at;
    }

    /// The node dropped a drain, and no leader has caught this group up since: it must neither vote nor campaign.
    pub fn is_behind(&self) -> bool {
        self.shared.behind.load(Ordering::SeqCst) && !lock(&self.kept).caught_up
    }

    /// A leader has caught this group up; on disk on return.
    pub async fn caught_up(&self) -> io::Result<()> {
        let change = |kept: &mut Kept| {
            kept.caught_up = true;
            Ok(())
        };
        self.send_and_wait(Op::CaughtUp, change).await
    }

    /// The last entry, or the purge point.
    pub fn last(&self) -> Option<Index> {
        lock(&self.kept).last()
    }

    /// Entries up to here are not kept.
    pub fn purged(&self) -> Option<Index> {
        lock(&self.kept).purged
    }

    /// The newest vote.
    pub fn vote(&self) -> Option<Vote> {
        lock(&self.kept).vote
    }

    /// The entry at `index`, if it is kept.
    pub fn at(&self, index: u64) -> Option<Index> {
        lock(&self.kept).slots(index, index.saturating_add(1)).next().map(|slot| slot.at).filter(|at| at.index == index)
    }

    /// Whether the entries behind `index` take at least so many bytes, as far as they are kept.
    pub fn has_grown(&self, index: u64, bytes: u64) -> bool {
        let mut found = 0;
        lock(&self.kept).slots(index.saturating_add(1), u64::MAX).any(|slot| {
            found += slot.bytes();
            found >= bytes
        })
    }

    /// Returns when everything that was changed before is on disk.
    pub async fn settle(&self) -> io::Result<()> {
        self.send_and_wait(Op::Append { kept: self.kept.clone(), entries: Vec::new() }, |_| Ok(())).await
    }

    /// Known committed up to here.
    pub fn committed(&self) -> Option<Index> {
        lock(&self.kept).committed
    }

    /// Entries of a range of indexes, as far as the log has them, in order. `None` when some are only on disk: use
    /// [`GroupLog::read`] where blocking is allowed.
    pub fn read_cached(&self, range: Range<u64>) -> Option<Vec<Entry>> {
        lock(&self.kept).slots(range.start, range.end).map(super::kept::Slot::cached).collect()
    }

    /// Entries of a range of indexes, as far as the log has them, in order. May read from disk; what does not read back as it
    /// was written is an error with file and offset.
    pub fn read(&self, range: Range<u64>) -> io::Result<Vec<Entry>> {
        // Files are taken under the group's lock: a purge in between unlinks them, but they can still be read.
        let found: Vec<Source> = {
            let kept = lock(&self.kept);
            let segments = lock(&self.shared.segments);
            let source = |slot: &super::kept::Slot| match (slot.cached(), slot.place) {
                (Some(entry), _) => Source::Memory(entry),
                (None, Some(place)) => match segments.get(&place.segment) {
                    Some(s) => Source::Disk(slot.at, place, s.header.salt, s.name(), s.file.clone()),
                    None => Source::Lost(slot.at),
                },
                (None, None) => Source::Lost(slot.at),
            };
            kept.slots(range.start, range.end).map(source).collect()
        };
        found.into_iter().map(|source| self.load(source)).collect()
    }

    fn load(&self, source: Source) -> io::Result<Entry> {
        let (at, place, salt, name, file) = match source {
            Source::Memory(entry) => return Ok(entry),
            Source::Lost(at) => return Err(io::Error::other(format!("{}: entry {at} is in no segment", self.id))),
            Source::Disk(at, place, salt, name, file) => (at, place, salt, name, file),
        };
        let damaged = |what: &str| {
            let what = format!("log damaged at {name}:{}: {what}", place.offset);
            io::Error::new(io::ErrorKind::InvalidData, what)
        };
        let mut bytes = vec![0; place.size as usize];
        file.read_at(place.offset, &mut bytes)?;
        let record = record::whole(&bytes, salt).map_err(damaged)?;
        let entry = matches!(record.kind, Kind::Append | Kind::CopiedAppend);
        if !entry || record.group != self.id || record.at != at {
            return Err(damaged("not the entry that was written there"));
        }
        Ok(Entry { at, payload: bytes::Bytes::copy_from_slice(record.payload) })
    }

    async fn send_and_wait(&self, op: Op, change: impl FnOnce(&mut Kept) -> io::Result<()>) -> io::Result<()> {
        let (tx, rx) = oneshot::channel();
        let done: Done = Box::new(move |result| {
            // Whoever waited may have gone; the change stands.
            let _ = tx.send(result);
        });
        self.send(op, Some(done), 0, change).await?;
        rx.await.map_err(|_| closed())?
    }

    /// Waits for room, then changes memory and queues the write without a pause between.
    async fn send(
        &self,
        op: Op,
        done: Option<Done>,
        bytes: usize,
        change: impl FnOnce(&mut Kept) -> io::Result<()>,
    ) -> io::Result<()> {
        let room = match u32::try_from(bytes) {
            Ok(0) => None,
            Ok(bytes) => Some(self.room.clone().acquire_many_owned(bytes).await.map_err(|_| closed())?),
            Err(_) => return Err(io::Error::new(io::ErrorKind::InvalidInput, "more than the queue holds")),
        };
        let slot = self.queue.reserve().await.map_err(|_| closed())?;
        if let Some(reason) = lock(&self.shared.failed).clone() {
            return Err(io::Error::other(reason));
        }
        change(&mut lock(&self.kept))?;
        slot.send(Queued { group: self.id, op, done, room });
        Ok(())
    }
}

/// Where an entry is read from.
enum Source {
    Memory(Entry),
    Disk(Index, Place, u64, String, Arc<dyn DiskFile>),
    Lost(Index),
}

pub(super) fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the log is closed")
}
