//! The thread beside the writer, for what would make a drain wait: it keeps spare segments allocated, removes old ones, and
//! reads the few entries that are to be copied forward.
//!
//! It decides nothing: [`clean`](super::clean) does, by what the writer has written. It writes no record: entries to be copied
//! go through the writer's queue, which takes only those that still stand where they were read. It never waits for the writer,
//! because the writer may be waiting for a spare. It ends when the writer tells it to, which then awaits it.
//!
//! A full disk is not an error: what was taken is given back and tried again until there is room. The spares that are left
//! serve meanwhile; whoever admits work sees it by [`super::Log::is_full`].

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::{Arc, Condvar, Mutex, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::{
    Entry, GroupId, Shared,
    clean::{Copying, Ranges},
    lock,
    record::{self, Kind, Parsed},
    segment::{CreateError, HEADER_BYTES, Segment},
    writer::{Op, Queued, cost},
};

/// Segments allocated ahead (design.md section 7, promise 6): a full disk takes no vote from a node before both are used up.
pub const SPARES: usize = 2;
/// Between two tries to allocate a segment on a full disk, and to hand over a copy when the queue is full.
const RETRY: Duration = Duration::from_millis(100);
/// Of a segment's bytes, the part that may be copied so that the segment can go.
const COPY_PART: u64 = 4;

/// What writer and janitor tell each other.
pub(super) struct Yard {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Oldest first: they are used in the order of their numbers.
    spares: VecDeque<Segment>,
    /// Spares that turned out too small.
    discarded: Vec<Segment>,
    /// Bytes a spare must have.
    room: u64,
    next_sequence: u64,
    /// Segments before this one are not needed.
    needed: u64,
    copying: Option<Copying>,
    /// What is to be copied, read already, in pieces that fit a drain.
    pieces: VecDeque<Vec<(GroupId, Entry)>>,
    /// Of which segment they are.
    copied_from: u64,
    piece_under_way: bool,
    /// Was looked at and left where it is: too much, or damaged.
    left: Option<Copying>,
    ended: bool,
}

impl Yard {
    pub(super) fn new(next_sequence: u64, room: u64) -> Yard {
        let state = State {
            spares: VecDeque::new(),
            discarded: Vec::new(),
            room,
            next_sequence,
            needed: 0,
            copying: None,
            pieces: VecDeque::new(),
            copied_from: 0,
            piece_under_way: false,
            left: None,
            ended: false,
        };
        Yard { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Spares that are ready.
    pub(super) fn spares(&self) -> usize {
        lock(&self.state).spares.len()
    }

    /// A spare of at least `room` bytes. Waits for one: nothing is acknowledged meanwhile, and nothing is lost. `stop` is asked
    /// now and then whether to give up.
    pub(super) fn take<E>(&self, room: u64, stop: impl Fn() -> Option<E>) -> Result<Segment, E> {
        let mut state = lock(&self.state);
        if room > state.room {
            state.room = room;
            let small = state.spares.drain(..).collect::<Vec<_>>();
            state.discarded.extend(small);
        }
        self.changed.notify_all();
        loop {
            if let Some(spare) = state.spares.pop_front() {
                self.changed.notify_all();
                return Ok(spare);
            }
            if let Some(why) = stop() {
                return Err(why);
            }
            state =
                self.changed.wait_timeout(state, RETRY).map(|(state, _)| state).unwrap_or_else(|p| p.into_inner().0);
        }
    }

    /// Segments before `needed` may go, each durably before the next; entries that are named may be copied.
    pub(super) fn told(&self, needed: u64, copying: Option<Copying>) {
        let mut state = lock(&self.state);
        state.needed = needed;
        let busy = state.piece_under_way || !state.pieces.is_empty();
        state.copying = copying.filter(|copying| !busy && state.left.as_ref() != Some(copying));
        self.changed.notify_all();
    }

    /// The janitor is to end.
    pub(super) fn end(&self) {
        lock(&self.state).ended = true;
        self.changed.notify_all();
    }

    /// Something changed that is not in here: the log has failed.
    pub(super) fn wake(&self) {
        self.changed.notify_all();
    }

    fn piece_done(&self) {
        lock(&self.state).piece_under_way = false;
        self.changed.notify_all();
    }
}

enum Work {
    Remove(Segment),
    Discard(Segment),
    Allocate { sequence: u64, room: u64 },
    Read(Copying),
    HandOver,
    End,
}

pub(super) struct Janitor {
    shared: Arc<Shared>,
    /// Weak: the queue ends when all handles of the log are gone.
    queue: mpsc::WeakSender<Queued>,
    /// An old segment could not be removed; not tried again before something changes.
    stuck: bool,
}

impl Janitor {
    pub(super) fn new(shared: Arc<Shared>, queue: mpsc::WeakSender<Queued>) -> Janitor {
        Janitor { shared, queue, stuck: false }
    }

    /// Until the writer ends it, or the log has failed.
    pub(super) fn run(mut self) {
        loop {
            match self.next() {
                Work::End => return,
                Work::Remove(segment) => self.remove(&segment),
                Work::Discard(segment) => drop(self.shared.disk.remove(&segment.path)),
                Work::Allocate { sequence, room } => self.allocate(sequence, room),
                Work::Read(copying) => self.read(copying),
                Work::HandOver => self.hand_over(),
            }
        }
    }

    /// Waits for something to do.
    fn next(&mut self) -> Work {
        let shared = self.shared.clone();
        let mut state = lock(&shared.yard.state);
        // What failed a moment ago is not tried at once again.
        let mut rested = false;
        loop {
            if state.ended || shared.has_failed() {
                return Work::End;
            }
            if let Some(small) = state.discarded.pop() {
                return Work::Discard(small);
            }
            let oldest = lock(&shared.segments).first_key_value().map(|(_, segment)| segment.clone());
            if let Some(oldest) = oldest.filter(|segment| segment.header.sequence < state.needed && !self.stuck) {
                return Work::Remove(oldest);
            }
            let full = shared.full.load(Ordering::SeqCst);
            if state.spares.len() < SPARES && (!full || rested) {
                return Work::Allocate { sequence: state.next_sequence, room: state.room };
            }
            if !state.piece_under_way && !state.pieces.is_empty() && (rested || self.queue_has_room()) {
                return Work::HandOver;
            }
            if state.pieces.is_empty()
                && !state.piece_under_way
                && let Some(copying) = state.copying.take()
            {
                return Work::Read(copying);
            }
            // With nothing to try again it sleeps until it is told something.
            let changed = &shared.yard.changed;
            state = if full || !state.pieces.is_empty() {
                changed.wait_timeout(state, RETRY).map(|(state, _)| state).unwrap_or_else(|p| p.into_inner().0)
            } else {
                changed.wait(state).unwrap_or_else(|p| p.into_inner())
            };
            rested = true;
            self.stuck = false;
        }
    }

    fn queue_has_room(&self) -> bool {
        self.queue.upgrade().is_some_and(|queue| queue.capacity() > 0)
    }

    fn remove(&mut self, oldest: &Segment) {
        if let Err(e) = self.shared.disk.remove(&oldest.path) {
            tracing::warn!(error = %e, segment = oldest.name(), "a log segment that is not needed cannot be removed");
            self.stuck = true;
            return;
        }
        if let Err(e) = self.shared.disk.sync_dir(&self.shared.config.dir) {
            return self.shared.fail(&format!(
                "{} after the removal of {}: {e}",
                self.shared.config.dir.display(),
                oldest.name()
            ));
        }
        lock(&self.shared.segments).remove(&oldest.header.sequence);
    }

    fn allocate(&mut self, sequence: u64, room: u64) {
        let config = &self.shared.config;
        let made = Segment::create_spare(&*self.shared.disk, &config.dir, sequence, room);
        let full = made.is_err();
        if self.shared.full.swap(full, Ordering::SeqCst) != full {
            match &made {
                Err(e) => tracing::warn!(
                    error = ?e,
                    "the next log segment cannot be allocated: sends are refused, what is stored stays; free some disk"
                ),
                Ok(_) => tracing::info!("the log has room again"),
            }
        }
        match made {
            Ok(spare) => {
                let mut state = lock(&self.shared.yard.state);
                state.next_sequence += 1;
                // The writer may have asked for larger ones meanwhile.
                if spare.header.allocated < state.room {
                    state.discarded.push(spare);
                } else {
                    state.spares.push_back(spare);
                }
                self.shared.yard.changed.notify_all();
            }
            Err(CreateError::Again(_)) => {}
            Err(CreateError::Sync(e)) => self.shared.fail(&format!("a new segment of {}: {e}", config.dir.display())),
        }
    }

    fn read(&mut self, copying: Copying) {
        let (segment, cut) = {
            let segments = lock(&self.shared.segments);
            let Some(segment) = segments.get(&copying.segment).cloned() else { return };
            let cuts = segments.values().filter_map(|s| s.header.cut);
            (segment, cuts.filter(|cut| cut.segment == copying.segment).map(|cut| cut.offset).next())
        };
        let found = live(&segment, cut, &copying.entries);
        let mut state = lock(&self.shared.yard.state);
        let bytes =
            |found: &[(GroupId, Entry)]| found.iter().map(|(_, entry)| cost(&entry.payload) as u64).sum::<u64>();
        match found {
            Ok(found) if bytes(&found) <= segment.header.allocated / COPY_PART => {
                state.copied_from = copying.segment;
                state.pieces = pieces(found, self.shared.config.drain_bytes).into();
                tracing::info!(segment = segment.name(), "the last entries of an old log segment are copied forward");
            }
            // Too much: a checkpoint has to free it.
            Ok(_) => state.left = Some(copying),
            Err(e) => {
                tracing::error!(error = %e, "an old log segment cannot be copied from; it stays");
                state.left = Some(copying);
            }
        }
    }

    fn hand_over(&mut self) {
        let Some(queue) = self.queue.upgrade() else { return };
        let mut state = lock(&self.shared.yard.state);
        let Some(piece) = state.pieces.pop_front() else { return };
        let shared = self.shared.clone();
        // Failed or done: what was not copied still stands where it was.
        let done: super::Done = Box::new(move |_| shared.yard.piece_done());
        let op = Op::Copy { from: state.copied_from, entries: piece };
        match queue.try_send(Queued { group: GroupId::META, op, done: Some(done), room: None }) {
            Ok(()) => state.piece_under_way = true,
            Err(mpsc::error::TrySendError::Full(Queued { op: Op::Copy { entries, .. }, .. })) => {
                state.pieces.push_front(entries);
            }
            Err(_) => state.pieces.clear(),
        }
    }
}

/// Entries of these ranges that stand in a segment, in order: of one that was rewritten there, the last. A record that does not
/// read back is an error with file and offset.
fn live(segment: &Segment, cut: Option<u64>, ranges: &Ranges) -> io::Result<Vec<(GroupId, Entry)>> {
    let bytes = segment.read_records()?;
    let end = cut.map_or(bytes.len(), |offset| (offset as usize).saturating_sub(HEADER_BYTES).min(bytes.len()));
    let mut found = BTreeMap::new();
    let mut at = 0;
    while at < end {
        let record = match record::parse(&bytes[at..end], segment.header.salt) {
            Parsed::Whole(record) => record,
            Parsed::Blank => break,
            Parsed::Bad(why) => {
                let what = format!("log damaged at {}:{}: {why}", segment.name(), HEADER_BYTES + at);
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
        };
        at += record.size();
        let wanted = matches!(record.kind, Kind::Append | Kind::CopiedAppend)
            && ranges
                .get(&record.group)
                .is_some_and(|ranges| ranges.iter().any(|(first, last)| (*first..=*last).contains(&record.at.index)));
        if wanted {
            let entry = Entry { at: record.at, payload: Bytes::copy_from_slice(record.payload) };
            found.insert((record.group, record.at.index), entry);
        }
    }
    Ok(found.into_iter().map(|((group, _), entry)| (group, entry)).collect())
}

fn pieces(entries: Vec<(GroupId, Entry)>, bytes: usize) -> Vec<Vec<(GroupId, Entry)>> {
    let mut pieces: Vec<Vec<(GroupId, Entry)>> = Vec::new();
    let mut filled = usize::MAX;
    for (group, entry) in entries {
        let size = cost(&entry.payload);
        if filled.saturating_add(size) > bytes || pieces.is_empty() {
            pieces.push(Vec::new());
            filled = 0;
        }
        filled += size;
        pieces.last_mut().expect("the first entry opens a piece").push((group, entry));
    }
    pieces
}
