//! The rows of one replica: its memtable, and below it its region of the engine.
//!
//! One writer (the replica's apply), any number of readers. Reads hold the memtable's lock until they have what they need from
//! the engine too, and so see one point in time; they are bounded by their limit. Whoever reads much for a device that attaches
//! does so off the apply thread, and in small steps.

use std::{
    collections::{BTreeSet, VecDeque},
    iter::Peekable,
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{
    StoreError,
    budget::Budget,
    engine::Engine,
    head::{Mark, Seal},
    memtable::{Below, Frozen, Memtable},
    row::{Closed, Region, VALUE_MAX},
};
use crate::{
    clock::Clock,
    state::{Rows, RowsError, Write},
};

/// Longest key of a row, in bytes. Inner pages of sled hold up to 256 keys and must stay below its limit for inline records.
pub const KEY_MAX: usize = 400;
/// Longest bytes of a [`Mark`].
pub const MARK_MAX: usize = 4096;

/// The rows of one replica.
#[derive(Debug)]
pub struct ShardStore {
    replica: u64,
    /// Changes only under the lock of `inner`, when a snapshot is switched to.
    generation: AtomicU32,
    /// The first generation that nothing has stood under.
    unused_generation: AtomicU32,
    engine: Arc<dyn Engine>,
    clock: Arc<dyn Clock>,
    budget: Arc<Budget>,
    /// Held for a whole commit: what it read, of levels and engine, must still hold when it writes. So it is also held by whoever
    /// takes a level away.
    commits: Mutex<()>,
    dropped: AtomicBool,
    /// Checkpoints leave the shard out.
    held: AtomicBool,
    /// Whoever holds the shard is to let go of it soon.
    wanted: AtomicBool,
    /// A snapshot is being received.
    receiving: AtomicBool,
    base: Mutex<Option<Base>>,
    inner: RwLock<Inner>,
}

/// The base file of a replica, as far as it is known without reading its rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// Its index, and what the Raft layer keeps with it.
    pub mark: Mark,
    /// Bytes of the file.
    pub bytes: u64,
    /// When this process wrote or found it.
    pub since: Instant,
    /// It does not read back: it is no base, and is to be written again.
    pub damaged: bool,
}

/// Keeps a shard out of checkpoints until it is dropped.
#[derive(Debug)]
pub(super) struct Hold(Arc<ShardStore>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.held.store(false, Ordering::Release);
    }
}

#[derive(Debug)]
struct Inner {
    table: Memtable,
    /// When the first commit came that no checkpoint holds yet.
    since: Option<Instant>,
    checkpointed: Option<u64>,
}

impl ShardStore {
    pub(super) fn new(
        (replica, generation, unused_generation): (u64, u32, u32),
        seal: Option<&Seal>,
        engine: Arc<dyn Engine>,
        clock: Arc<dyn Clock>,
        budget: Arc<Budget>,
    ) -> Self {
        let inner = Inner { table: Memtable::new(seal), since: None, checkpointed: seal.map(|s| s.mark.index) };
        Self {
            replica,
            generation: AtomicU32::new(generation),
            unused_generation: AtomicU32::new(unused_generation),
            engine,
            clock,
            budget,
            commits: Mutex::new(()),
            dropped: AtomicBool::new(false),
            held: AtomicBool::new(false),
            wanted: AtomicBool::new(false),
            receiving: AtomicBool::new(false),
            base: Mutex::default(),
            inner: RwLock::new(inner),
        }
    }

    /// Whose rows they are.
    pub fn replica(&self) -> u64 {
        self.replica
    }

    /// Takes the writes of one applied entry, in memory: durable is what [`ShardStore::checkpointed`] says, the rest comes back
    /// from the log. On an error nothing was taken, and the replica must stop.
    ///
    /// Costs a read of the engine for each row that is removed, appended to or put not fresh while only the engine has it.
    pub fn commit(&self, mark: Mark, writes: Vec<Write>) -> Result<(), StoreError> {
        let _one = self.commits.lock().expect("no panic under this lock");
        self.not_dropped()?;
        self.check(&mark, &writes)?;
        let below = self.below(&mark, &writes).inspect_err(|error| self.note(error))?;
        let now = self.clock.now();
        let mut inner = self.inner.write().expect("no panic under this lock");
        let before = inner.table.bytes();
        inner.table.commit(mark, writes, &below);
        inner.since.get_or_insert(now);
        self.budget.moved(before, inner.table.bytes());
        Ok(())
    }

    /// Up to where reads see; `None` before the first commit.
    pub fn mark(&self) -> Option<Mark> {
        self.read().table.mark().cloned()
    }

    /// The index that is durable in sled; `None` before the first checkpoint (index 0 is a real entry).
    pub fn checkpointed(&self) -> Option<u64> {
        self.read().checkpointed
    }

    /// Sum of the row hashes of what reads see; equal on all replicas at one index.
    pub fn hash(&self) -> u64 {
        self.write().table.sum()
    }

    /// Bytes held in memory for rows that are not yet in sled.
    pub fn bytes(&self) -> u64 {
        self.read().table.bytes()
    }

    /// Whether memory for rows is used up, of all shards together: a follower applies no more until a checkpoint has made room.
    /// Each yes is counted ([`Store::waits`](super::Store::waits)).
    pub fn must_wait(&self) -> bool {
        self.budget.must_wait()
    }

    /// Whether a checkpoint is due at `now`, given its greatest age and size.
    pub(super) fn due(&self, now: Instant, age: Duration, bytes: u64) -> bool {
        let inner = self.read();
        inner.since.is_some_and(|since| now.duration_since(since) >= age || inner.table.bytes() >= bytes)
    }

    /// The newest base file, if there is one.
    pub fn base(&self) -> Option<Base> {
        self.base.lock().expect("no panic under this lock").clone()
    }

    /// Index up to which the base file holds everything; `None` without a base that reads back.
    pub fn based(&self) -> Option<u64> {
        self.base().filter(|base| !base.damaged).map(|base| base.mark.index)
    }

    pub(super) fn set_base(&self, base: Option<Base>) {
        *self.base.lock().expect("no panic under this lock") = base;
    }

    /// The base file does not read back.
    pub(super) fn base_is_damaged(&self) {
        if let Some(base) = &mut *self.base.lock().expect("no panic under this lock") {
            base.damaged = true;
        }
    }

    /// Whether checkpoints leave the shard out.
    pub(super) fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// Keeps the shard out of checkpoints, unless another does. Only under the lock of the cycle, with none unfinished.
    pub(super) fn hold(self: &Arc<Self>) -> Option<Hold> {
        let taken = !self.held.swap(true, Ordering::AcqRel);
        taken.then(|| Hold(Arc::clone(self)))
    }

    /// Whoever holds the shard for a base file is to give it up, or may go on.
    pub(super) fn want(&self, wanted: bool) {
        self.wanted.store(wanted, Ordering::Release);
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    /// Begins or ends to receive a snapshot; whether nobody else did.
    pub(super) fn receive(&self, begins: bool) -> bool {
        self.receiving.swap(begins, Ordering::AcqRel) != begins
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// A generation that no row has stood under, and that is given once.
    pub(super) fn fresh_generation(&self) -> u32 {
        self.unused_generation.fetch_add(1, Ordering::AcqRel)
    }

    /// Shows the rows of another generation from now on, and nothing of what was applied before. `switch` makes it so on disk; if it
    /// fails nothing has changed here. Nobody commits or reads meanwhile.
    pub(super) fn switch<E>(
        &self,
        generation: u32,
        seal: &Seal,
        switch: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let _one = self.commits.lock().expect("no panic under this lock");
        let mut inner = self.write();
        switch()?;
        self.budget.moved(inner.table.bytes(), 0);
        self.generation.store(generation, Ordering::Release);
        *inner = Inner { table: Memtable::new(Some(seal)), since: None, checkpointed: Some(seal.mark.index) };
        Ok(())
    }

    pub(super) fn region(&self) -> Region<'_> {
        self.region_of(self.generation())
    }

    pub(super) fn region_of(&self, generation: u32) -> Region<'_> {
        Region { engine: &*self.engine, replica: self.replica, generation }
    }

    /// Freezes what a checkpoint moves; `None` if the engine holds everything already. Also the index it builds on.
    pub(super) fn freeze(&self) -> Option<(Arc<Frozen>, Option<u64>)> {
        let mut inner = self.write();
        let at = inner.table.mark().map(|mark| mark.index);
        if at == inner.checkpointed || self.dropped.load(Ordering::Acquire) || self.is_held() {
            return None;
        }
        let frozen = inner.table.freeze()?;
        inner.since = None;
        Some((frozen, inner.checkpointed))
    }

    /// The engine was not touched: the frozen level goes back, and is due again at once.
    pub(super) fn thaw(&self) {
        let now = self.clock.now();
        let mut inner = self.write();
        let before = inner.table.bytes();
        inner.table.thaw();
        inner.since.get_or_insert(now);
        self.budget.moved(before, inner.table.bytes());
    }

    /// The engine holds the frozen level durably.
    pub(super) fn moved(&self, seal: &Seal) {
        // A commit that found a row covered by the frozen level would find it nowhere when it writes: counted twice, or not
        // removed from the engine.
        let _one = self.commits.lock().expect("no panic under this lock");
        let mut inner = self.write();
        let before = inner.table.bytes();
        inner.table.drop_frozen();
        inner.checkpointed = Some(seal.mark.index);
        self.budget.moved(before, inner.table.bytes());
    }

    /// Forgets everything; later commits and reads fail.
    pub(super) fn abandon(&self) {
        let _one = self.commits.lock().expect("no panic under this lock");
        self.dropped.store(true, Ordering::Release);
        let mut inner = self.write();
        self.budget.moved(inner.table.bytes(), 0);
        inner.table = Memtable::new(None);
        inner.since = None;
    }

    fn check(&self, mark: &Mark, writes: &[Write]) -> Result<(), StoreError> {
        let (replica, at) = (self.replica, mark.index);
        if let Some(have) = self.read().table.mark().map(|mark| mark.index)
            && at <= have
        {
            return Err(StoreError::Backwards { replica, have, at });
        }
        if mark.bytes.len() > MARK_MAX {
            return Err(StoreError::Refused { replica, at, what: "the mark is too long" });
        }
        for write in writes {
            let (key, value) = match write {
                Write::Put { key, value, .. } => (key, value.len()),
                Write::Append { key, tail } => (key, tail.len()),
                Write::Remove { key } => (key, 0),
            };
            if key.len() > KEY_MAX {
                return Err(StoreError::Refused { replica, at, what: "a key is too long" });
            }
            if value > VALUE_MAX / 2 {
                return Err(StoreError::Refused { replica, at, what: "a value is too long" });
            }
        }
        Ok(())
    }

    /// Reads what the writes replace and no level of the memtable covers.
    fn below(&self, mark: &Mark, writes: &[Write]) -> Result<Below, StoreError> {
        let inner = self.read();
        let mut below = Below::new();
        let mut touched = BTreeSet::new();
        for write in writes {
            let (key, fresh) = match write {
                Write::Put { key, fresh, .. } => (key, *fresh),
                Write::Remove { key } | Write::Append { key, .. } => (key, false),
            };
            // A false `fresh` would make the row count wrong, and the shard would be refused at the next open: tests find it here.
            if cfg!(debug_assertions) && touched.insert(key) && fresh && self.look(&inner.table, key)?.is_some() {
                let what = "a fresh put found a row";
                return Err(StoreError::Refused { replica: self.replica, at: mark.index, what });
            }
            if !fresh && !below.contains_key(key) && !inner.table.covers(key) {
                below.insert(key.clone(), self.region().get(key)?);
            }
        }
        Ok(below)
    }

    fn look(&self, table: &Memtable, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        match table.levels().find_map(|level| level.get(key)) {
            Some(value) => Ok(value),
            None => self.region().get(key),
        }
    }

    fn merged(&self, from: &[u8], to: &[u8], limit: usize, order: Order) -> Result<Vec<(Bytes, Bytes)>, StoreError> {
        self.not_dropped()?;
        if from >= to {
            return Ok(Vec::new());
        }
        let inner = self.read();
        let engine = EngineRows::new(self.region(), from, to, limit, order);
        let mut sources: Vec<Peekable<Source<'_>>> = Vec::with_capacity(3);
        for level in inner.table.levels() {
            let rows = level.range(from, to).map(|(key, value)| Ok((key, value.map_or(Seen::Removed, Seen::Row))));
            let rows: Source<'_> = match order {
                Order::Ascending => Box::new(rows),
                Order::Descending => Box::new(rows.rev()),
            };
            sources.push(rows.peekable());
        }
        let engine: Source<'_> = Box::new(engine);
        sources.push(engine.peekable());
        merge(sources, self.region(), limit, order)
    }

    /// What sled failed once it fails until it is opened again: whoever checkpoints does that.
    pub(super) fn note(&self, error: &StoreError) {
        if matches!(error, StoreError::Engine { .. }) {
            self.budget.read_failed();
        }
    }

    fn unreadable(&self, error: StoreError) -> RowsError {
        self.note(&error);
        RowsError(Box::new(error))
    }

    fn not_dropped(&self) -> Result<(), StoreError> {
        if self.dropped.load(Ordering::Acquire) { Err(StoreError::Dropped { replica: self.replica }) } else { Ok(()) }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Inner> {
        self.inner.read().expect("no panic under this lock")
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Inner> {
        self.inner.write().expect("no panic under this lock")
    }
}

impl Rows for ShardStore {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, RowsError> {
        self.not_dropped().and_then(|()| self.look(&self.read().table, key)).map_err(|error| self.unreadable(error))
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, RowsError> {
        self.merged(from, to, limit, Order::Ascending).map_err(|error| self.unreadable(error))
    }

    fn scan_back(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, RowsError> {
        self.merged(from, to, limit, Order::Descending).map_err(|error| self.unreadable(error))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Ascending,
    Descending,
}

/// What a source shows under a key.
enum Seen {
    Removed,
    Row(Bytes),
    /// Of the engine; looked into only if no level covers it: a checkpoint may be rewriting what is covered.
    Below(Closed),
}

type Sighting = Result<(Bytes, Seen), StoreError>;
type Source<'a> = Box<dyn Iterator<Item = Sighting> + 'a>;

/// The first `limit` rows of several ordered sources; of one key, the earlier source has the word.
fn merge(
    mut sources: Vec<Peekable<Source<'_>>>,
    region: Region<'_>,
    limit: usize,
    order: Order,
) -> Result<Vec<(Bytes, Bytes)>, StoreError> {
    let mut rows = Vec::new();
    while rows.len() < limit {
        let mut next: Option<Bytes> = None;
        for source in &mut sources {
            match source.peek() {
                None => (),
                Some(Err(_)) => return source.next().expect("just seen").map(|_| Vec::new()),
                Some(Ok((key, _))) => {
                    let before = next.as_ref().is_none_or(|next| match order {
                        Order::Ascending => key < next,
                        Order::Descending => key > next,
                    });
                    if before {
                        next = Some(key.clone());
                    }
                }
            }
        }
        let Some(next) = next else { break };
        let mut seen = None;
        for source in &mut sources {
            if let Some(sighting) = source.next_if(|sighting| matches!(sighting, Ok((key, _)) if *key == next)) {
                seen = seen.or(Some(sighting?.1));
            }
        }
        match seen.expect("the key came from a source") {
            Seen::Removed => (),
            Seen::Row(value) => rows.push((next, value)),
            Seen::Below(value) => {
                let value = region.open(&next, &value)?;
                rows.push((next, value));
            }
        }
    }
    Ok(rows)
}

/// The engine's rows, fetched in pieces as the merge asks for them.
struct EngineRows<'a> {
    region: Region<'a>,
    from: Vec<u8>,
    to: Vec<u8>,
    piece: usize,
    order: Order,
    fetched: VecDeque<(Bytes, Closed)>,
    ended: bool,
}

impl<'a> EngineRows<'a> {
    fn new(region: Region<'a>, from: &[u8], to: &[u8], limit: usize, order: Order) -> Self {
        let (from, to) = (from.to_vec(), to.to_vec());
        Self { region, from, to, piece: limit.clamp(1, 256), order, fetched: VecDeque::new(), ended: false }
    }

    fn fetch(&mut self) -> Result<(), StoreError> {
        let rows = match self.order {
            Order::Ascending => self.region.scan(&self.from, &self.to, self.piece)?,
            Order::Descending => self.region.scan_back(&self.from, &self.to, self.piece)?,
        };
        self.ended = rows.len() < self.piece;
        if let Some((last, _)) = rows.last() {
            match self.order {
                Order::Ascending => self.from = [&last[..], &[0]].concat(),
                Order::Descending => self.to = last.to_vec(),
            }
        }
        self.fetched = rows.into();
        Ok(())
    }
}

impl Iterator for EngineRows<'_> {
    type Item = Sighting;

    fn next(&mut self) -> Option<Sighting> {
        if self.fetched.is_empty()
            && !self.ended
            && let Err(error) = self.fetch()
        {
            self.ended = true;
            return Some(Err(error));
        }
        self.fetched.pop_front().map(|(key, value)| Ok((key, Seen::Below(value))))
    }
}
