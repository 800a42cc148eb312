//! The one thread that writes: drains the queue, one write and one sync for all groups, then all callbacks.
//!
//! It keeps its own idea of every group, as of what it has written: what a new segment opens with and which old segments may
//! go never depends on what is still queued.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, atomic::Ordering},
    thread::JoinHandle,
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::{
    Done, Entry, GroupId, Index, Shared, Vote,
    clean::{Plan, plan},
    kept::{Kept, Place},
    lock,
    record::{self, Kind, Record},
    recover::{Found, opening, seal},
    segment::{HEADER_BYTES, Segment},
    written::Written,
};
use crate::bug::Bug;

/// Between two tries to write on a full disk.
const FULL_RETRY: Duration = Duration::from_millis(100);

/// What a group's owner wants written.
pub(super) enum Op {
    Append {
        kept: Arc<Mutex<Kept>>,
        entries: Vec<Entry>,
    },
    /// Entries from this index on are gone.
    Truncate(u64),
    Purge(Index),
    Vote(Vote),
    CaughtUp,
    /// Entries that stood in segment `from` when they were read.
    Copy {
        from: u64,
        entries: Vec<(GroupId, Entry)>,
    },
    /// End mark; nothing follows.
    Close,
}

/// One item of the queue.
pub(super) struct Queued {
    pub(super) group: GroupId,
    pub(super) op: Op,
    pub(super) done: Option<Done>,
    /// Room in the queue, given back when the item is done.
    pub(super) room: Option<OwnedSemaphorePermit>,
}

impl Op {
    /// Bytes it takes in a segment.
    fn size(&self) -> usize {
        match self {
            Op::Append { entries, .. } => entries.iter().map(|entry| record::size(entry.payload.len())).sum(),
            Op::Copy { entries, .. } => entries.iter().map(|(_, entry)| record::size(entry.payload.len())).sum(),
            Op::Vote(_) => record::size(1),
            Op::Truncate(_) | Op::Purge(_) | Op::CaughtUp => record::size(0),
            Op::Close => 0,
        }
    }
}

/// What a writer goes on from.
pub(super) struct Writing {
    groups: BTreeMap<GroupId, Written>,
    current: Segment,
    offset: u64,
    next_drain: u64,
}

impl Writing {
    pub(super) fn of(found: &Found) -> Writing {
        Writing {
            groups: found.groups.iter().map(|(group, kept)| (*group, Written::of(kept))).collect(),
            current: found.current.clone(),
            offset: found.offset,
            next_drain: found.next_drain,
        }
    }
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    queue: mpsc::Receiver<Queued>,
    /// Taken from the queue, but too much for the drain that was being gathered.
    carried: Option<Queued>,
    groups: BTreeMap<GroupId, Written>,
    current: Segment,
    offset: u64,
    next_drain: u64,
    buffer: Vec<u8>,
    /// What is live in old segments changed since it was last planned what to clean.
    unplanned: bool,
    janitor: Option<JoinHandle<()>>,
}

impl Writer {
    pub(super) fn new(
        shared: Arc<Shared>,
        queue: mpsc::Receiver<Queued>,
        janitor: JoinHandle<()>,
        from: Writing,
    ) -> Writer {
        let Writing { groups, current, offset, next_drain } = from;
        Writer {
            shared,
            queue,
            carried: None,
            groups,
            current,
            offset,
            next_drain,
            buffer: Vec::new(),
            unplanned: true,
            janitor: Some(janitor),
        }
    }

    /// Until the log is closed or all handles are gone.
    pub(super) fn run(mut self) {
        while let Some(mut batch) = self.gather() {
            if Bug::AckBeforeFsync.is_in() {
                let done = batch.iter_mut().filter_map(|queued| queued.done.take());
                done.for_each(|done| done(Ok(())));
            }
            let closing = batch.iter().any(|queued| matches!(queued.op, Op::Close));
            match self.drain(&batch) {
                Ok(placed) => {
                    self.publish(placed);
                    if closing {
                        // Whoever closes may open the directory again at once: nothing touches it after the answer.
                        self.end_janitor();
                        return finish(batch, || Ok(()));
                    }
                    finish(batch, || Ok(()));
                    self.plan();
                }
                Err(Stop::Failed(e)) => return self.fail(&e, batch),
                Err(Stop::Abandoned(e)) => {
                    self.end_janitor();
                    return finish(batch, || Err(io::Error::new(e.kind(), e.to_string())));
                }
            }
        }
        self.end_janitor();
    }

    fn end_janitor(&mut self) {
        self.shared.yard.end();
        if let Some(janitor) = self.janitor.take()
            && janitor.join().is_err()
        {
            tracing::error!("the log's janitor panicked");
        }
    }

    /// The next drain: waits for its first item, takes what is there up to the bound. Nothing follows a `Close`.
    fn gather(&mut self) -> Option<Vec<Queued>> {
        let first = match self.carried.take() {
            Some(carried) => carried,
            None => self.queue.blocking_recv()?,
        };
        let mut bytes = first.op.size();
        let mut batch = vec![first];
        while !matches!(batch.last(), Some(Queued { op: Op::Close, .. }))
            && let Ok(next) = self.queue.try_recv()
        {
            bytes += next.op.size();
            if bytes > self.shared.config.drain_bytes {
                self.carried = Some(next);
                break;
            }
            batch.push(next);
        }
        Some(batch)
    }

    fn drain(&mut self, batch: &[Queued]) -> Result<Vec<Placed>, Stop> {
        if let Some(reason) = lock(&self.shared.failed).clone() {
            return Err(Stop::Failed(io::Error::other(reason)));
        }
        let committed = self.take_committed();
        // Two seals: the end mark is a drain of its own.
        let needed =
            batch.iter().map(|queued| queued.op.size()).sum::<usize>() + (committed.len() + 2) * record::size(0);
        if self.offset + needed as u64 > self.current.header.allocated {
            self.rotate(needed)?;
        }
        let mut placed = Vec::new();
        for (group, at) in committed {
            self.write(Kind::Committed, group, at, &[]);
            self.groups.entry(group).or_default().facts.committed = Some(at);
        }
        for queued in batch {
            self.encode(queued, &mut placed);
        }
        if !self.buffer.is_empty() {
            seal(self.next_drain).encode(self.current.header.salt, &mut self.buffer);
            self.next_drain += 1;
        }
        if batch.iter().any(|queued| matches!(queued.op, Op::Close)) {
            self.write(Kind::End, GroupId(0), Index::default(), &[]);
            self.next_drain += 1;
        }
        self.write_at(&self.current, self.offset, &self.buffer)?;
        self.current.file.sync_data()?;
        self.offset += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(placed)
    }

    /// Writes bytes at their place. They were allocated, yet some file systems find no room for what is allocated: then the same
    /// bytes are written again later. Nothing was synced and nothing promised.
    fn write_at(&self, segment: &Segment, offset: u64, bytes: &[u8]) -> Result<(), Stop> {
        loop {
            match segment.file.write_at(offset, bytes) {
                Err(e) if e.kind() == io::ErrorKind::StorageFull => {
                    self.given_up().map_or(Ok(()), Err)?;
                    tracing::warn!(segment = segment.name(), error = %e, "the log waits for room on the disk");
                    std::thread::sleep(FULL_RETRY);
                }
                Err(e) => return Err(Stop::Failed(e)),
                Ok(()) => return Ok(()),
            }
        }
    }

    /// Why there is no use in waiting for room any more.
    fn given_up(&self) -> Option<Stop> {
        if let Some(reason) = lock(&self.shared.failed).clone() {
            return Some(Stop::Failed(io::Error::other(reason)));
        }
        let gone =
            || io::Error::new(io::ErrorKind::StorageFull, "the disk is full, and whoever wrote the log has gone");
        self.queue.is_closed().then(|| Stop::Abandoned(gone()))
    }

    fn encode(&mut self, queued: &Queued, placed: &mut Vec<Placed>) {
        let group = queued.group;
        match &queued.op {
            Op::Append { kept, entries } => {
                for entry in entries {
                    let offset = self.offset + self.buffer.len() as u64;
                    let size = self.write(Kind::Append, group, entry.at, &entry.payload);
                    let segment = self.current.header.sequence;
                    let place = Place { segment, offset, size: size as u32 };
                    placed.push(Placed { kept: kept.clone(), at: entry.at, place });
                    self.groups.entry(group).or_default().append(entry.at.index, segment);
                }
            }
            Op::Copy { from, entries } => {
                self.unplanned = true;
                for (group, entry) in entries {
                    self.copy(*from, *group, entry, placed);
                }
            }
            Op::Truncate(index) => {
                self.unplanned = true;
                self.write(Kind::Truncate, group, Index { term: 0, index: *index }, &[]);
                self.groups.entry(group).or_default().truncate(*index);
            }
            Op::Purge(at) => {
                self.unplanned = true;
                self.write(Kind::Purge, group, *at, &[]);
                self.groups.entry(group).or_default().purge(*at);
            }
            Op::Vote(vote) => {
                let at = Index { term: vote.term, index: vote.replica };
                self.write(Kind::Vote, group, at, &[u8::from(vote.committed)]);
                self.groups.entry(group).or_default().facts.vote = Some(*vote);
            }
            Op::CaughtUp => {
                self.write(Kind::CaughtUp, group, Index::default(), &[]);
                self.groups.entry(group).or_default().facts.caught_up = true;
            }
            Op::Close => {}
        }
    }

    /// Writes an entry again that is live and stands in `from` at this moment; one that was truncated, purged or rewritten since
    /// it was read is left out.
    fn copy(&mut self, from: u64, group: GroupId, entry: &Entry, placed: &mut Vec<Placed>) {
        if !self.groups.get(&group).is_some_and(|written| written.stands_in(entry.at.index, from)) {
            return;
        }
        let Some(kept) = lock(&self.shared.groups).get(&group).cloned() else { return };
        let offset = self.offset + self.buffer.len() as u64;
        let size = self.write(Kind::CopiedAppend, group, entry.at, &entry.payload);
        let segment = self.current.header.sequence;
        placed.push(Placed { kept, at: entry.at, place: Place { segment, offset, size: size as u32 } });
        self.groups.entry(group).or_default().moved(entry.at.index, segment);
    }

    fn write(&mut self, kind: Kind, group: GroupId, at: Index, payload: &[u8]) -> usize {
        let record = Record { kind, drain: self.next_drain, group, at, payload };
        record.encode(self.current.header.salt, &mut self.buffer);
        record.size()
    }

    /// Committed indexes that moved: they go along with whatever is written, nothing is written for them alone.
    fn take_committed(&self) -> Vec<(GroupId, Index)> {
        let groups = lock(&self.shared.groups);
        let moved = groups.iter().filter_map(|(group, kept)| {
            let mut kept = lock(kept);
            std::mem::take(&mut kept.committed_moved).then_some(kept.committed).flatten().map(|at| (*group, at))
        });
        moved.collect()
    }

    /// Goes on in a new segment, which opens with the facts of every group and has room for `needed` bytes more. The opening
    /// records belong to the drain that is about to be written.
    fn rotate(&mut self, needed: usize) -> Result<(), Stop> {
        let behind = self.shared.behind.load(Ordering::SeqCst) && !self.shared.all_caught_up();
        let mut records = Vec::new();
        let mut room = HEADER_BYTES + needed;
        for (group, written) in &self.groups {
            records.push((*group, written.facts));
            opening(*group, written.facts, 0, behind, |record| room += record.size());
        }
        let mut next = self.shared.yard.take(room as u64, || self.given_up())?;
        let header = next.activated(self.current.header.sequence, self.next_drain, behind);
        self.write_at(&next, 0, &header)?;
        next.file.sync_data()?;
        self.shared.behind.store(behind, Ordering::SeqCst);
        lock(&self.shared.segments).insert(next.header.sequence, next.clone());
        self.current = next;
        self.unplanned = true;
        self.offset = HEADER_BYTES as u64;
        for (group, facts) in records {
            let (salt, buffer) = (self.current.header.salt, &mut self.buffer);
            opening(group, facts, self.next_drain, behind, |record| record.encode(salt, buffer));
        }
        Ok(())
    }

    fn publish(&self, placed: Vec<Placed>) {
        for Placed { kept, at, place } in placed {
            let mut kept = lock(&kept);
            kept.placed(at, place);
            kept.shrink(self.shared.config.cache_bytes);
        }
    }

    /// Decides what is to be cleaned, when something changed, and tells the janitor and whoever checkpoints.
    pub(super) fn plan(&mut self) {
        if !std::mem::take(&mut self.unplanned) {
            return;
        }
        let segments: Vec<_> = {
            let segments = lock(&self.shared.segments);
            segments.values().map(|segment| (segment.header.sequence, segment.header.allocated)).collect()
        };
        let groups = self.groups.iter().map(|(group, written)| (*group, written));
        let Plan { needed, pins, copying, over_bound } =
            plan(&segments, self.current.header.sequence, groups, self.shared.marks());
        if self.shared.over_bound.swap(over_bound, Ordering::SeqCst) != over_bound {
            let (segments, bound) = (segments.len(), self.shared.config.kept_bytes_max);
            match over_bound {
                true => {
                    tracing::warn!(segments, bound, ?pins, "the log is longer than its bound: enqueues are refused")
                }
                false => tracing::info!(segments, bound, "the log is within its bound again"),
            }
        }
        *lock(&self.shared.pins) = pins;
        self.shared.yard.told(needed, copying);
    }

    /// Nothing can be promised any more: says so, then answers whoever still asks with the error.
    fn fail(mut self, e: &io::Error, batch: Vec<Queued>) {
        let failed = lock(&self.shared.failed).clone();
        let reason = failed.unwrap_or_else(|| format!("{}: {e}", self.current.name()));
        self.shared.fail(&reason);
        self.end_janitor();
        finish(batch, || Err(io::Error::other(reason.clone())));
        while let Some(queued) = self.carried.take().or_else(|| self.queue.blocking_recv()) {
            finish(vec![queued], || Err(io::Error::other(reason.clone())));
        }
    }
}

/// Why nothing more is written.
enum Stop {
    /// The disk failed: what it holds cannot be believed.
    Failed(io::Error),
    /// The disk is full and nobody waits any more: what was queued was never acknowledged.
    Abandoned(io::Error),
}

impl From<io::Error> for Stop {
    fn from(e: io::Error) -> Stop {
        Stop::Failed(e)
    }
}

/// An entry that is on disk now.
struct Placed {
    kept: Arc<Mutex<Kept>>,
    at: Index,
    place: Place,
}

fn finish(batch: Vec<Queued>, result: impl Fn() -> io::Result<()>) {
    for queued in batch {
        drop(queued.room);
        if let Some(done) = queued.done {
            done(result());
        }
    }
}

/// Splits entries so that no part exceeds `bytes`, unless a single entry does.
pub(super) fn split(entries: Vec<Entry>, bytes: usize) -> Vec<Vec<Entry>> {
    let mut parts: Vec<Vec<Entry>> = Vec::new();
    let mut filled = usize::MAX;
    for entry in entries {
        let size = record::size(entry.payload.len());
        if filled.saturating_add(size) > bytes {
            parts.push(Vec::new());
            filled = 0;
        }
        filled += size;
        parts.last_mut().expect("the first entry opens a part").push(entry);
    }
    parts
}

/// Bytes that queueing this payload takes from the queue's room.
pub(super) fn cost(payload: &Bytes) -> usize {
    record::size(payload.len())
}
