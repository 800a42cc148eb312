//! The one thread that writes: drains the queue, one write and one sync for all groups, then all callbacks.
//!
//! It keeps its own idea of every group, as of what it has written: what a new segment opens with and which old segments may
//! go never depends on what is still queued.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::{
    Done, Entry, GroupId, Index, Shared, Vote,
    kept::{Kept, Place},
    lock,
    record::{self, Kind, Record},
    recover::{Facts, Found, opening, seal},
    segment::{CreateError, HEADER_BYTES, Segment},
};

/// Between two tries to allocate a segment on a full disk.
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
            Op::Vote(_) => record::size(1),
            Op::Truncate(_) | Op::Purge(_) | Op::CaughtUp => record::size(0),
            Op::Close => 0,
        }
    }
}

/// A group as of what is written.
#[derive(Default)]
struct Written {
    facts: Facts,
    /// Where entries stand: (segment, index of the first of them in it), oldest first.
    runs: VecDeque<(u64, u64)>,
    last: Option<u64>,
}

impl Written {
    fn of(kept: &Kept) -> Written {
        let mut written = Written { facts: Facts::of(kept), ..Written::default() };
        for slot in kept.slots(0, u64::MAX) {
            if let Some(place) = slot.place {
                written.append(slot.at.index, place.segment);
            }
        }
        written
    }

    fn append(&mut self, index: u64, segment: u64) {
        if self.runs.back().is_none_or(|(last, _)| *last != segment) {
            self.runs.push_back((segment, index));
        }
        self.last = Some(index);
    }

    fn truncate(&mut self, index: u64) {
        while self.runs.back().is_some_and(|(_, first)| *first >= index) {
            self.runs.pop_back();
        }
        self.last = if self.runs.is_empty() { None } else { index.checked_sub(1) };
    }

    fn purge(&mut self, at: Index) {
        self.facts.purged = self.facts.purged.max(Some(at));
        if self.last.is_none_or(|last| last <= at.index) {
            self.runs.clear();
            self.last = None;
        }
        while self.runs.get(1).is_some_and(|(_, first)| *first <= at.index + 1) {
            self.runs.pop_front();
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
    next_sequence: u64,
    spare: Option<Segment>,
    buffer: Vec<u8>,
    full: bool,
    /// The sync of a new segment failed while nothing was to be written.
    failed_idle: Option<io::Error>,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, queue: mpsc::Receiver<Queued>, found: &Found) -> Writer {
        Writer {
            groups: found.groups.iter().map(|(group, kept)| (*group, Written::of(kept))).collect(),
            current: found.current.clone(),
            offset: found.offset,
            next_drain: found.next_drain,
            next_sequence: found.next_sequence,
            shared,
            queue,
            carried: None,
            spare: None,
            buffer: Vec::new(),
            full: false,
            failed_idle: None,
        }
    }

    /// Until the log is closed or all handles are gone.
    pub(super) fn run(mut self) {
        if let Err(e) = self.allocate_ahead() {
            return self.fail(&e, Vec::new());
        }
        while let Some(batch) = self.gather() {
            let closing = batch.iter().any(|queued| matches!(queued.op, Op::Close));
            match self.drain(&batch) {
                Ok(placed) => {
                    self.publish(placed);
                    // Whoever closes may open the directory again at once: nothing touches it after the answer.
                    if closing {
                        return finish(batch, || Ok(()));
                    }
                    finish(batch, || Ok(()));
                    if let Err(e) = self.remove_purged().and_then(|()| self.allocate_ahead()) {
                        return self.fail(&e, Vec::new());
                    }
                }
                Err(e) => return self.fail(&e, batch),
            }
        }
        if let Some(e) = self.failed_idle.take() {
            self.fail(&e, Vec::new());
        }
    }

    /// The next item. While the disk is full it goes on trying to allocate: leaders refuse what would come, so that without this
    /// nothing would ever be written again, and the log stay full with room on the disk.
    fn first(&mut self) -> Option<Queued> {
        while self.full {
            match self.queue.try_recv() {
                Ok(queued) => return Some(queued),
                Err(mpsc::error::TryRecvError::Disconnected) => return None,
                Err(mpsc::error::TryRecvError::Empty) => std::thread::sleep(FULL_RETRY),
            }
            if let Err(e) = self.allocate_ahead() {
                self.failed_idle = Some(e);
                return None;
            }
        }
        self.queue.blocking_recv()
    }

    /// The next drain: waits for its first item, takes what is there up to the bound. Nothing follows a `Close`.
    fn gather(&mut self) -> Option<Vec<Queued>> {
        let first = match self.carried.take() {
            Some(carried) => carried,
            None => self.first()?,
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

    fn drain(&mut self, batch: &[Queued]) -> io::Result<Vec<Placed>> {
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
        self.current.file.write_at(self.offset, &self.buffer)?;
        self.current.file.sync_data()?;
        self.offset += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(placed)
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
            Op::Truncate(index) => {
                self.write(Kind::Truncate, group, Index { term: 0, index: *index }, &[]);
                self.groups.entry(group).or_default().truncate(*index);
            }
            Op::Purge(at) => {
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
    fn rotate(&mut self, needed: usize) -> io::Result<()> {
        let behind = self.shared.behind.load(Ordering::SeqCst) && !self.shared.all_caught_up();
        let mut records: Vec<(GroupId, Facts)> = Vec::new();
        let mut room = HEADER_BYTES + needed;
        for (group, written) in &self.groups {
            records.push((*group, written.facts));
            opening(*group, written.facts, 0, behind, |record| room += record.size());
        }
        let mut next = self.next_segment(room as u64)?;
        next.activate(self.current.header.sequence, self.next_drain, behind)?;
        self.shared.behind.store(behind, Ordering::SeqCst);
        lock(&self.shared.segments).insert(next.header.sequence, next.clone());
        self.current = next;
        self.offset = HEADER_BYTES as u64;
        for (group, facts) in records {
            let (salt, buffer) = (self.current.header.salt, &mut self.buffer);
            opening(group, facts, self.next_drain, behind, |record| record.encode(salt, buffer));
        }
        Ok(())
    }

    /// The spare, or a new one. On a full disk it waits: nothing is acknowledged meanwhile, and nothing is lost.
    fn next_segment(&mut self, room: u64) -> io::Result<Segment> {
        if let Some(spare) = self.spare.take_if(|spare| spare.header.allocated >= room) {
            return Ok(spare);
        }
        loop {
            match self.allocate(room) {
                Ok(segment) => return Ok(segment),
                Err(CreateError::Sync(e)) => return Err(e),
                Err(CreateError::Again(e)) if self.queue.is_closed() => return Err(e),
                Err(CreateError::Again(_)) => std::thread::sleep(FULL_RETRY),
            }
        }
    }

    fn allocate(&mut self, room: u64) -> Result<Segment, CreateError> {
        let config = &self.shared.config;
        let allocated = config.segment_bytes.max(room);
        let made = Segment::create_spare(&*self.shared.disk, &config.dir, self.next_sequence, allocated);
        let full = made.is_err();
        if full != self.full {
            self.full = full;
            self.shared.full.store(full, Ordering::SeqCst);
            match &made {
                Err(e) => tracing::warn!(error = ?e, "the next log segment cannot be allocated"),
                Ok(_) => tracing::info!("the log has room again"),
            }
        }
        let made = made?;
        self.next_sequence += 1;
        Ok(made)
    }

    /// A full disk is not fatal: it is tried again after the next drain, and without fail when the segment is needed.
    fn allocate_ahead(&mut self) -> io::Result<()> {
        if self.spare.is_none() {
            match self.allocate(0) {
                Ok(spare) => self.spare = Some(spare),
                Err(CreateError::Again(_)) => {}
                Err(CreateError::Sync(e)) => return Err(e),
            }
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

    /// Removes segments that no group needs, oldest first, each durably before the next.
    fn remove_purged(&mut self) -> io::Result<()> {
        let needed = self.groups.values().filter_map(|written| written.runs.front()).map(|(segment, _)| *segment).min();
        let needed = needed.unwrap_or(u64::MAX).min(self.current.header.sequence);
        loop {
            let oldest = lock(&self.shared.segments).first_key_value().map(|(_, segment)| segment.clone());
            let Some(oldest) = oldest.filter(|segment| segment.header.sequence < needed) else { return Ok(()) };
            if let Err(e) = self.shared.disk.remove(&oldest.path) {
                tracing::warn!(error = %e, segment = oldest.name(), "a log segment that is not needed cannot be removed");
                return Ok(());
            }
            self.shared.disk.sync_dir(&self.shared.config.dir)?;
            lock(&self.shared.segments).remove(&oldest.header.sequence);
        }
    }

    /// Nothing can be promised any more: says so, then answers whoever still asks with the error.
    fn fail(mut self, e: &io::Error, batch: Vec<Queued>) {
        let reason = format!("{}: {e}", self.current.name());
        *lock(&self.shared.failed) = Some(reason.clone());
        (self.shared.config.fatal)(&reason);
        finish(batch, || Err(io::Error::other(reason.clone())));
        while let Some(queued) = self.carried.take().or_else(|| self.queue.blocking_recv()) {
            finish(vec![queued], || Err(io::Error::other(reason.clone())));
        }
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
