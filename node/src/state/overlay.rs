//! The rows as they are in the middle of an entry: those below, under the entry's own writes.
//!
//! Owns the writes until the entry is through; dropped whole when it fails. Reads see own writes, so a command sees what the
//! commands before it in the same entry did.

use std::{collections::BTreeMap, ops::Bound};

use bytes::Bytes;

use super::rows::{Rows, RowsError, Write};

/// Rows below and own writes above them.
pub(super) struct Overlay<'a> {
    below: &'a dyn Rows,
    own: BTreeMap<Bytes, Own>,
}

enum Own {
    Put { value: Bytes, fresh: bool },
    Removed,
}

impl<'a> Overlay<'a> {
    pub(super) fn over(below: &'a dyn Rows) -> Self {
        Self { below, own: BTreeMap::new() }
    }

    /// Sets a row that may have been there before, now or earlier.
    pub(super) fn put(&mut self, key: Bytes, value: Bytes) {
        let fresh = matches!(self.own.get(&key), Some(Own::Put { fresh: true, .. }));
        self.own.insert(key, Own::Put { value, fresh });
    }

    /// Sets a row under a key that is used once, for ever: one that holds a sequence.
    pub(super) fn put_fresh(&mut self, key: Bytes, value: Bytes) {
        self.own.insert(key, Own::Put { value, fresh: true });
    }

    /// Removes a row. One that this entry made leaves no write at all.
    pub(super) fn remove(&mut self, key: Bytes) {
        if matches!(self.own.get(&key), Some(Own::Put { fresh: true, .. })) {
            self.own.remove(&key);
        } else {
            self.own.insert(key, Own::Removed);
        }
    }

    /// The writes, by key.
    pub(super) fn into_writes(self) -> Vec<Write> {
        let write = |(key, own)| match own {
            Own::Put { value, fresh } => Write::Put { key, value, fresh },
            Own::Removed => Write::Remove { key },
        };
        self.own.into_iter().map(write).collect()
    }

    /// Own writes with `from <= key < to`.
    fn own_between<'s>(
        &'s self,
        from: &'s [u8],
        to: &'s [u8],
    ) -> impl DoubleEndedIterator<Item = (&'s Bytes, &'s Own)> {
        let bounds = (Bound::Included(from), Bound::Excluded(if from < to { to } else { from }));
        self.own.range::<[u8], _>(bounds)
    }

    /// The rows with `from <= key < to`, given all of them that are `below`.
    fn merge(&self, from: &[u8], to: &[u8], below: Vec<(Bytes, Bytes)>) -> BTreeMap<Bytes, Bytes> {
        let mut merged: BTreeMap<Bytes, Bytes> = below.into_iter().collect();
        for (key, own) in self.own_between(from, to) {
            match own {
                Own::Put { value, .. } => merged.insert(key.clone(), value.clone()),
                Own::Removed => merged.remove(key),
            };
        }
        merged
    }
}

impl Rows for Overlay<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, RowsError> {
        match self.own.get(key) {
            Some(Own::Put { value, .. }) => Ok(Some(value.clone())),
            Some(Own::Removed) => Ok(None),
            None => self.below.get(key),
        }
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, RowsError> {
        let mut rows = Vec::new();
        let mut from = Bytes::copy_from_slice(from);
        while rows.len() < limit && from[..] < *to {
            let want = limit - rows.len();
            let page = self.below.scan(&from, to, want)?;
            // A full page tells of nothing above its last key.
            let next = match page.last() {
                Some((last, _)) if page.len() >= want => successor(last),
                _ => Bytes::copy_from_slice(to),
            };
            rows.extend(self.merge(&from, &next, page).into_iter().take(want));
            from = next;
        }
        Ok(rows)
    }

    fn scan_back(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, RowsError> {
        let mut rows = Vec::new();
        let mut to = Bytes::copy_from_slice(to);
        while rows.len() < limit && *from < to[..] {
            let want = limit - rows.len();
            let page = self.below.scan_back(from, &to, want)?;
            let next = match page.last() {
                Some((last, _)) if page.len() >= want => last.clone(),
                _ => Bytes::copy_from_slice(from),
            };
            rows.extend(self.merge(&next, &to, page).into_iter().rev().take(want));
            to = next;
        }
        Ok(rows)
    }
}

/// The smallest key above `key`.
fn successor(key: &[u8]) -> Bytes {
    [key, &[0]].concat().into()
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::state::memory::MemoryRows;

    fn key(n: u8) -> Bytes {
        Bytes::copy_from_slice(&[n])
    }

    #[test]
    fn a_row_made_and_removed_in_one_entry_leaves_no_write() {
        let below = MemoryRows::default();
        let mut rows = Overlay::over(&below);
        rows.put_fresh(key(1), key(9));
        rows.put(key(1), key(8));
        rows.remove(key(1));
        assert_eq!(rows.into_writes(), []);
    }

    proptest! {
        #[test]
        fn reads_see_what_carrying_out_the_writes_would_show(
            below in vec((0..24u8, 0..9u8), 0..24),
            own in vec((0..24u8, proptest::option::of(0..9u8)), 0..24),
            from in 0..26u8, to in 0..26u8, limit in 0..12usize,
        ) {
            let mut base = MemoryRows::default();
            for (k, v) in below {
                base.put_raw(key(k), key(v));
            }
            let mut rows = Overlay::over(&base);
            for (k, v) in own {
                match v {
                    Some(v) => rows.put(key(k), key(v)),
                    None => rows.remove(key(k)),
                }
            }
            let got = (
                rows.scan(&[from], &[to], limit).unwrap(),
                rows.scan_back(&[from], &[to], limit).unwrap(),
                rows.get(&[from]).unwrap(),
            );
            let mut after = base.clone();
            after.write(&rows.into_writes());
            let want = (
                after.scan(&[from], &[to], limit).unwrap(),
                after.scan_back(&[from], &[to], limit).unwrap(),
                after.get(&[from]).unwrap(),
            );
            prop_assert_eq!(got, want);
        }
    }
}
