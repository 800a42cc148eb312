//! What a replica has applied and not yet moved to the engine: two ordered levels.
//!
//! Writes go to the active level. A checkpoint freezes it, moves it to the engine and drops it; meanwhile a new active level
//! takes the writes, and reads look in the active level, the frozen one, the engine, in that order. Because the frozen level
//! covers every row that the checkpoint changes, whoever holds the lock reads one point in time, whatever sled does below.
//!
//! A removed row leaves a tombstone only when a lower level may hold it: a row that was put *fresh* and goes before the next
//! checkpoint leaves nothing, and that is what keeps a message that is delivered at once out of sled.
//!
//! Knows no lock, no engine and no clock: what it must know of the engine is handed to [`Memtable::commit`].

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    ops::Bound,
    sync::Arc,
};

use bytes::Bytes;

use super::{
    head::{Mark, Seal},
    row::row_hash,
};
use crate::state::Write;

/// What a row costs in memory beside its bytes: the node of the map, the slot, the reference counts; measured roughly.
const SLOT_BYTES: u64 = 160;

/// Rows of the engine that a commit replaces, as they are before it; `None` is a row that is absent.
pub(super) type Below = BTreeMap<Bytes, Option<Bytes>>;

/// The range of keys from `from` on, before `to`.
pub(super) fn between<'a>(from: &'a [u8], to: &'a [u8]) -> (Bound<&'a [u8]>, Bound<&'a [u8]>) {
    (Bound::Included(from), Bound::Excluded(to))
}

#[derive(Debug, Clone)]
enum Value {
    Removed,
    Whole(Bytes),
    /// Appended to; copied when it is read.
    Growing(Vec<u8>),
}

impl Value {
    fn bytes(&self) -> Option<&[u8]> {
        match self {
            Value::Removed => None,
            Value::Whole(bytes) => Some(bytes),
            Value::Growing(bytes) => Some(bytes),
        }
    }

    fn get(&self) -> Option<Bytes> {
        match self {
            Value::Removed => None,
            Value::Whole(bytes) => Some(bytes.clone()),
            Value::Growing(bytes) => Some(Bytes::copy_from_slice(bytes)),
        }
    }
}

#[derive(Debug, Clone)]
struct Slot {
    value: Value,
    /// Hash of the row; 0 for a removed one, and while the key is among the unsettled.
    hash: u64,
    /// Whether a lower level may hold the row, so that a removal needs a tombstone.
    below: bool,
}

/// One level: rows and tombstones in key order.
#[derive(Debug, Default)]
pub(super) struct Level {
    slots: BTreeMap<Bytes, Slot>,
    bytes: u64,
}

impl Level {
    /// `Some(None)` is a row that was removed here.
    pub(super) fn get(&self, key: &[u8]) -> Option<Option<Bytes>> {
        self.slots.get(key).map(|slot| slot.value.get())
    }

    /// Rows and tombstones in order; `from` must be before `to`.
    pub(super) fn range(&self, from: &[u8], to: &[u8]) -> impl DoubleEndedIterator<Item = (Bytes, Option<Bytes>)> {
        self.slots.range::<[u8], _>(between(from, to)).map(|(key, slot)| (key.clone(), slot.value.get()))
    }

    /// All changes: key, value or `None` for a tombstone, and whether a lower level may hold the row.
    pub(super) fn changes(&self) -> impl Iterator<Item = (&[u8], Option<&[u8]>, bool)> {
        self.slots.iter().map(|(key, slot)| (&key[..], slot.value.bytes(), slot.below))
    }

    fn set(&mut self, key: Bytes, slot: Slot) {
        let added = cost(&key, &slot.value);
        match self.slots.entry(key) {
            Entry::Occupied(mut old) => {
                self.bytes -= cost(old.key(), &old.get().value);
                old.insert(slot);
            }
            Entry::Vacant(vacant) => drop(vacant.insert(slot)),
        }
        self.bytes += added;
    }

    fn forget(&mut self, key: &[u8]) {
        if let Some((key, slot)) = self.slots.remove_entry(key) {
            self.bytes -= cost(&key, &slot.value);
        }
    }
}

fn cost(key: &[u8], value: &Value) -> u64 {
    (key.len() + value.bytes().map_or(0, <[u8]>::len)) as u64 + SLOT_BYTES
}

/// A level that a checkpoint moves to the engine, and what the rows amount to with it.
#[derive(Debug)]
pub(super) struct Frozen {
    pub(super) level: Level,
    pub(super) seal: Seal,
}

/// Both levels of a replica, and what its rows amount to.
#[derive(Debug)]
pub(super) struct Memtable {
    active: Level,
    frozen: Option<Arc<Frozen>>,
    mark: Option<Mark>,
    rows: u64,
    /// Sum of the hashes of all rows but the unsettled.
    sum: u64,
    /// Rows of the active level that grew since they were last hashed: hashing them at every append would cost their length.
    unsettled: BTreeSet<Bytes>,
}

impl Memtable {
    /// An empty one over an engine that holds what `seal` says.
    pub(super) fn new(seal: Option<&Seal>) -> Self {
        Self {
            active: Level::default(),
            frozen: None,
            mark: seal.map(|seal| seal.mark.clone()),
            rows: seal.map_or(0, |seal| seal.rows),
            sum: seal.map_or(0, |seal| seal.sum),
            unsettled: BTreeSet::new(),
        }
    }

    pub(super) fn mark(&self) -> Option<&Mark> {
        self.mark.as_ref()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.active.bytes + self.frozen.as_ref().map_or(0, |frozen| frozen.level.bytes)
    }

    /// Whether a level answers for `key`, so that the engine need not be asked.
    pub(super) fn covers(&self, key: &[u8]) -> bool {
        self.levels().any(|level| level.slots.contains_key(key))
    }

    /// The levels that reads look in before the engine, first to last.
    pub(super) fn levels(&self) -> impl Iterator<Item = &Level> {
        std::iter::once(&self.active).chain(self.frozen.as_ref().map(|frozen| &frozen.level))
    }

    /// Takes the writes of one entry. `below` holds the engine's rows for every key that is not covered and not put fresh.
    pub(super) fn commit(&mut self, mark: Mark, writes: Vec<Write>, below: &Below) {
        for write in writes {
            match write {
                Write::Put { key, value, fresh: _ } => self.put(key, Value::Whole(value), below),
                Write::Remove { key } => self.remove(key, below),
                Write::Append { key, tail } => self.append(key, &tail, below),
            }
        }
        self.mark = Some(mark);
    }

    /// Sets a row, with one look at the active level: it is what most of a commit is.
    fn put(&mut self, key: Bytes, value: Value, below: &Below) {
        let hash = row_hash(&key, value.bytes().expect("a put has a value"));
        self.sum = self.sum.wrapping_add(hash);
        self.rows += 1;
        self.active.bytes += cost(&key, &value);
        match self.active.slots.entry(key) {
            Entry::Occupied(mut slot) => {
                let (key, old) = (slot.key().clone(), Old::of(slot.get()));
                self.active.bytes -= cost(&key, &slot.get().value);
                slot.insert(Slot { value, hash, below: old.below });
                self.discount(&key, &old);
            }
            Entry::Vacant(vacant) => {
                let old = under_active(self.frozen.as_deref(), vacant.key(), below);
                vacant.insert(Slot { value, hash, below: old.below });
                // None of the unsettled: those are in the active level.
                self.rows -= u64::from(old.present);
                self.sum = self.sum.wrapping_sub(old.hash);
            }
        }
    }

    /// Takes out a row of the active level that leaves no tombstone, which is what most removals are: one look instead of three.
    fn remove_without_trace(&mut self, key: Bytes) -> Result<(), Bytes> {
        let slot = match self.active.slots.entry(key) {
            Entry::Occupied(slot) if !slot.get().below => slot,
            Entry::Occupied(slot) => return Err(slot.key().clone()),
            Entry::Vacant(vacant) => return Err(vacant.into_key()),
        };
        let (key, slot) = slot.remove_entry();
        self.active.bytes -= cost(&key, &slot.value);
        let old = Old::of(&slot);
        self.discount(&key, &old);
        Ok(())
    }

    fn remove(&mut self, key: Bytes, below: &Below) {
        let Err(key) = self.remove_without_trace(key) else { return };
        let old = self.old(&key, below);
        self.discount(&key, &old);
        if old.below {
            self.active.set(key, Slot { value: Value::Removed, hash: 0, below: true });
        } else {
            self.active.forget(&key);
        }
    }

    fn append(&mut self, key: Bytes, tail: &[u8], below: &Below) {
        let old = self.old(&key, below);
        self.discount(&key, &old);
        self.rows += 1;
        self.unsettled.insert(key.clone());
        if let Some(Slot { value: Value::Growing(value), hash, .. }) = self.active.slots.get_mut(&key) {
            value.extend_from_slice(tail);
            *hash = 0;
            self.active.bytes += tail.len() as u64;
            return;
        }
        let start = self.levels().find_map(|level| level.get(&key)).or_else(|| below.get(&key).cloned()).flatten();
        let mut value = start.map_or_else(Vec::new, Vec::from);
        value.extend_from_slice(tail);
        self.active.set(key, Slot { value: Value::Growing(value), hash: 0, below: old.below });
    }

    fn old(&self, key: &[u8], below: &Below) -> Old {
        match self.active.slots.get(key) {
            Some(slot) => Old::of(slot),
            None => under_active(self.frozen.as_deref(), key, below),
        }
    }

    fn discount(&mut self, key: &[u8], old: &Old) {
        if old.present {
            self.rows -= 1;
            // An unsettled row has hash 0 here and is not part of the sum.
            if old.hash == 0 {
                self.unsettled.remove(key);
            }
            self.sum = self.sum.wrapping_sub(old.hash);
        }
    }

    /// Sum of the hashes of all rows.
    pub(super) fn sum(&mut self) -> u64 {
        for key in std::mem::take(&mut self.unsettled) {
            let slot = self.active.slots.get_mut(&key).expect("unsettled rows are in the active level");
            slot.hash = row_hash(&key, slot.value.bytes().expect("unsettled rows are present"));
            self.sum = self.sum.wrapping_add(slot.hash);
        }
        self.sum
    }

    /// Turns the active level into the frozen one; `None` if no entry was ever applied.
    pub(super) fn freeze(&mut self) -> Option<Arc<Frozen>> {
        assert!(self.frozen.is_none(), "one checkpoint at a time");
        let mark = self.mark.clone()?;
        let seal = Seal { mark, rows: self.rows, sum: self.sum() };
        let frozen = Arc::new(Frozen { level: std::mem::take(&mut self.active), seal });
        self.frozen = Some(frozen.clone());
        Some(frozen)
    }

    /// Forgets the frozen level: the engine holds its rows durably.
    pub(super) fn drop_frozen(&mut self) {
        self.frozen = None;
    }

    /// Puts the frozen level back below the active one: the engine was not touched.
    pub(super) fn thaw(&mut self) {
        let Some(frozen) = self.frozen.take() else { return };
        let above = std::mem::take(&mut self.active);
        self.active = match Arc::try_unwrap(frozen) {
            Ok(frozen) => frozen.level,
            Err(shared) => Level { slots: shared.level.slots.clone(), bytes: shared.level.bytes },
        };
        for (key, mut slot) in above.slots {
            if let Some(under) = self.active.slots.get(&key) {
                slot.below = under.below;
                if !slot.below && matches!(slot.value, Value::Removed) {
                    self.active.forget(&key);
                    continue;
                }
            }
            self.active.set(key, slot);
        }
    }
}

/// A row before a write.
struct Old {
    present: bool,
    /// 0 for one that is not present.
    hash: u64,
    below: bool,
}

impl Old {
    fn of(slot: &Slot) -> Old {
        Old { present: slot.value.bytes().is_some(), hash: slot.hash, below: slot.below }
    }
}

/// A row before a write that the active level does not hold.
fn under_active(frozen: Option<&Frozen>, key: &[u8], below: &Below) -> Old {
    // The frozen level may reach the engine before the active one does: whatever it holds needs a tombstone above it.
    if let Some(slot) = frozen.and_then(|frozen| frozen.level.slots.get(key)) {
        return Old { below: true, ..Old::of(slot) };
    }
    match below.get(key) {
        Some(Some(value)) => Old { present: true, hash: row_hash(key, value), below: true },
        Some(None) | None => Old { present: false, hash: 0, below: false },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &'static str, value: &'static str, fresh: bool) -> Write {
        Write::Put { key: key.into(), value: value.into(), fresh }
    }

    fn remove(key: &'static str) -> Write {
        Write::Remove { key: key.into() }
    }

    fn commit(table: &mut Memtable, writes: Vec<Write>) {
        let index = table.mark().map_or(1, |mark| mark.index + 1);
        table.commit(Mark { index, bytes: Bytes::new() }, writes, &Below::new());
    }

    #[test]
    fn a_fresh_row_that_goes_before_the_checkpoint_leaves_nothing() {
        let mut table = Memtable::new(None);
        commit(&mut table, vec![put("a", "1", true)]);
        assert!(table.bytes() > 0);
        commit(&mut table, vec![remove("a")]);
        assert_eq!((table.bytes(), table.rows, table.sum()), (0, 0, 0));
    }

    #[test]
    fn a_row_that_is_being_moved_leaves_a_tombstone_even_if_it_was_fresh() {
        let mut table = Memtable::new(None);
        commit(&mut table, vec![put("a", "1", true)]);
        table.freeze().unwrap();
        commit(&mut table, vec![remove("a")]);
        table.drop_frozen();
        assert_eq!(table.active.get(b"a"), Some(None));
    }

    #[test]
    fn a_fresh_put_over_a_tombstone_keeps_the_tombstones_knowledge() {
        let mut table = Memtable::new(None);
        let below = Below::from([("a".into(), Some("0".into()))]);
        table.rows = 1;
        table.sum = row_hash(b"a", b"0");
        table.commit(Mark { index: 1, bytes: Bytes::new() }, vec![remove("a")], &below);
        commit(&mut table, vec![put("a", "1", true), remove("a")]);
        assert_eq!(table.active.get(b"a"), Some(None));
        assert_eq!((table.rows, table.sum()), (0, 0));
    }

    #[test]
    fn a_thawed_level_is_as_if_it_had_never_been_frozen() {
        let mut table = Memtable::new(None);
        commit(&mut table, vec![put("a", "1", true), put("b", "1", true), put("c", "1", true)]);
        table.freeze().unwrap();
        commit(&mut table, vec![remove("a"), put("b", "22", false), put("d", "1", true)]);
        table.thaw();
        let mut plain = Memtable::new(None);
        commit(&mut plain, vec![put("b", "22", true), put("c", "1", true), put("d", "1", true)]);
        assert_eq!((table.bytes(), table.rows, table.sum()), (plain.bytes(), plain.rows, plain.sum()));
        assert_eq!(table.active.get(b"a"), None);
        commit(&mut table, vec![remove("b"), remove("c"), remove("d")]);
        assert_eq!((table.bytes(), table.rows, table.sum()), (0, 0, 0));
    }

    #[test]
    fn an_appended_value_is_hashed_only_when_asked_and_counts_what_it_grew() {
        let mut table = Memtable::new(None);
        let append = |tail: &'static str| Write::Append { key: "a".into(), tail: tail.into() };
        commit(&mut table, vec![append("x"), append("y")]);
        let before = table.bytes();
        commit(&mut table, vec![append("zz")]);
        assert_eq!(table.bytes(), before + 2);
        assert_eq!(table.sum(), row_hash(b"a", b"xyzz"));
        commit(&mut table, vec![append("!")]);
        table.freeze().unwrap();
        commit(&mut table, vec![append("?")]);
        assert_eq!(table.sum(), row_hash(b"a", b"xyzz!?"));
        assert_eq!(table.rows, 1);
    }
}
