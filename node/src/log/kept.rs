//! What the log holds of one group, in memory: where each entry stands, the newest entries themselves, and the small facts.
//!
//! The owner of a group changes it first (an entry can be read at once), the writer fills in places when they are on disk.

use std::collections::VecDeque;

use bytes::Bytes;

use super::{Entry, Index, Vote};

/// Where a record stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) segment: u64,
    pub(super) offset: u64,
    /// Bytes of the record.
    pub(super) size: u32,
}

/// One entry: on disk, in memory, or both; never neither.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub(super) at: Index,
    pub(super) place: Option<Place>,
    pub(super) payload: Option<Bytes>,
}

/// One group.
#[derive(Debug, Clone, Default)]
pub(super) struct Kept {
    pub(super) vote: Option<Vote>,
    pub(super) committed: Option<Index>,
    /// `committed` moved since it was last written.
    pub(super) committed_moved: bool,
    pub(super) purged: Option<Index>,
    /// A leader has caught it up since the node dropped a drain; without meaning when it dropped none.
    pub(super) caught_up: bool,
    /// Consecutive indexes.
    slots: VecDeque<Slot>,
    cached: usize,
    /// Slots before this one have no payload in memory.
    first_cached: u64,
}

impl Kept {
    /// Index of the last entry, or the purge point.
    pub(super) fn last(&self) -> Option<Index> {
        self.slots.back().map(|slot| slot.at).or(self.purged)
    }

    /// The index that the next entry must have; any for an empty log.
    pub(super) fn expected(&self) -> Option<u64> {
        self.last().map(|last| last.index + 1)
    }

    /// Adds an entry, or says why it does not follow.
    pub(super) fn push(&mut self, at: Index, payload: Bytes, place: Option<Place>) -> Result<(), String> {
        if let Some(expected) = self.expected()
            && at.index != expected
        {
            return Err(format!("entry {at} does not follow: index {expected} was due"));
        }
        self.push_unchecked(at, payload, place);
        Ok(())
    }

    /// Adds the first entry there is, at any index: what was before it is purged, or its purge stands later in the log.
    pub(super) fn push_first(&mut self, at: Index, payload: Bytes, place: Place) {
        debug_assert!(self.slots.is_empty());
        self.push_unchecked(at, payload, Some(place));
    }

    fn push_unchecked(&mut self, at: Index, payload: Bytes, place: Option<Place>) {
        if self.slots.is_empty() {
            self.first_cached = at.index;
        }
        self.cached += payload.len();
        self.slots.push_back(Slot { at, place, payload: Some(payload) });
    }

    /// Adds an entry before the first: it was copied forward out of a segment that is gone.
    pub(super) fn push_front(&mut self, at: Index, payload: Bytes, place: Place) {
        debug_assert!(self.slots.front().is_none_or(|first| first.at.index == at.index + 1));
        if self.slots.is_empty() {
            return self.push_unchecked(at, payload, Some(place));
        }
        // In memory are the newest: what comes before them is read from disk.
        self.slots.push_front(Slot { at, place: Some(place), payload: None });
    }

    /// The first entry there is.
    pub(super) fn first(&self) -> Option<Index> {
        self.slots.front().map(|slot| slot.at)
    }

    /// The entry stands here as well; whether there is such an entry.
    pub(super) fn moved(&mut self, at: Index, place: Place) -> Result<bool, String> {
        let Some(slot) = self.position(at.index).and_then(|p| self.slots.get_mut(p)) else {
            return match self.last().filter(|_| !self.slots.is_empty()) {
                Some(last) if at.index > last.index => Err(format!("a copied entry {at} comes after the last, {last}")),
                _ => Ok(false),
            };
        };
        if slot.at != at {
            return Err(format!("a copied entry {at} is not the one there, {}", slot.at));
        }
        slot.place = Some(place);
        Ok(true)
    }

    /// Whether there is no entry.
    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Forgets entries from `index` on.
    pub(super) fn truncate(&mut self, index: u64) {
        while let Some(last) = self.slots.back()
            && last.at.index >= index
        {
            self.cached -= last.payload.as_ref().map_or(0, Bytes::len);
            self.slots.pop_back();
        }
        self.first_cached = self.first_cached.min(index);
    }

    /// Forgets entries up to `at`.
    pub(super) fn purge(&mut self, at: Index) {
        if self.purged.is_some_and(|purged| purged.index >= at.index) {
            return;
        }
        self.purged = Some(at);
        while let Some(first) = self.slots.front()
            && first.at.index <= at.index
        {
            self.cached -= first.payload.as_ref().map_or(0, Bytes::len);
            self.slots.pop_front();
        }
    }

    /// The entry is on disk here, unless it was truncated meanwhile.
    pub(super) fn placed(&mut self, at: Index, place: Place) {
        if let Some(slot) = self.position(at.index).and_then(|p| self.slots.get_mut(p))
            && slot.at == at
        {
            slot.place = Some(place);
        }
    }

    /// Drops payloads of the oldest entries that are on disk until at most `bytes` are in memory.
    pub(super) fn shrink(&mut self, bytes: usize) {
        while self.cached > bytes {
            let Some(slot) = self.position(self.first_cached).and_then(|p| self.slots.get_mut(p)) else {
                // Purged or truncated past it: go on from what is there.
                match self.slots.front() {
                    Some(first) if first.at.index > self.first_cached => self.first_cached = first.at.index,
                    _ => return,
                }
                continue;
            };
            if slot.place.is_none() {
                return;
            }
            self.cached -= slot.payload.take().map_or(0, |payload| payload.len());
            self.first_cached += 1;
        }
    }

    /// Entries of `from..to` that are there, in order.
    pub(super) fn slots(&self, from: u64, to: u64) -> impl Iterator<Item = &Slot> {
        let first = self.slots.front().map_or(0, |slot| slot.at.index);
        let skip = usize::try_from(from.saturating_sub(first)).unwrap_or(usize::MAX);
        self.slots.iter().skip(skip).take_while(move |slot| slot.at.index < to)
    }

    fn position(&self, index: u64) -> Option<usize> {
        let first = self.slots.front()?.at.index;
        usize::try_from(index.checked_sub(first)?).ok()
    }
}

impl Slot {
    /// Bytes that it takes in the log, or of its payload while it is not written.
    pub(super) fn bytes(&self) -> u64 {
        let payload = || self.payload.as_ref().map_or(0, Bytes::len) as u64;
        self.place.map_or_else(payload, |place| u64::from(place.size))
    }

    /// The entry, when it is in memory.
    pub(super) fn cached(&self) -> Option<Entry> {
        self.payload.clone().map(|payload| Entry { at: self.at, payload })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(index: u64) -> Index {
        Index { term: 1, index }
    }

    fn place(offset: u64) -> Place {
        Place { segment: 1, offset, size: 40 }
    }

    fn kept(range: std::ops::Range<u64>) -> Kept {
        let mut kept = Kept::default();
        for index in range {
            kept.push(at(index), Bytes::from_static(b"four"), None).unwrap();
        }
        kept
    }

    fn in_memory(kept: &Kept) -> Vec<u64> {
        kept.slots(0, u64::MAX).filter(|s| s.payload.is_some()).map(|s| s.at.index).collect()
    }

    #[test]
    fn only_what_is_on_disk_leaves_memory_oldest_first() {
        let mut kept = kept(5..10);
        kept.placed(at(5), place(0));
        kept.placed(at(6), place(1));
        kept.shrink(0);
        assert_eq!(in_memory(&kept), [7, 8, 9]);
        kept.placed(at(7), place(2));
        kept.shrink(8);
        assert_eq!(in_memory(&kept), [8, 9]);
    }

    #[test]
    fn a_purge_past_what_left_memory_does_not_confuse_the_cache() {
        let mut kept = kept(0..6);
        for index in 0..6 {
            kept.placed(at(index), place(index));
        }
        kept.shrink(16);
        kept.purge(at(3));
        kept.shrink(4);
        assert_eq!(in_memory(&kept), [5]);
        kept.truncate(4);
        assert_eq!(kept.last(), Some(at(3)));
        kept.push(at(4), Bytes::from_static(b"four"), None).unwrap();
        assert_eq!(in_memory(&kept), [4]);
    }

    #[test]
    fn an_entry_that_leaves_a_gap_is_refused() {
        let mut kept = kept(0..2);
        assert!(kept.push(at(3), Bytes::new(), None).is_err());
        assert!(kept.push(at(1), Bytes::new(), None).is_err());
        assert!(kept.push(at(2), Bytes::new(), None).is_ok());
    }
}
