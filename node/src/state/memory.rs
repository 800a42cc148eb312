//! [`Rows`] in an ordered map: for tests of whatever holds a [`super::State`]. No node serves from it.

use std::{collections::BTreeMap, ops::Bound};

use bytes::{Bytes, BytesMut};

use super::{Rows, RowsError, Write};

/// Rows in memory, and nothing else.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryRows(BTreeMap<Bytes, Bytes>);

impl MemoryRows {
    /// Carries out the writes of one entry.
    pub fn write(&mut self, writes: &[Write]) {
        for write in writes {
            match write {
                Write::Put { key, value, .. } => {
                    self.0.insert(key.clone(), value.clone());
                }
                Write::Remove { key } => {
                    self.0.remove(key);
                }
                Write::Append { key, tail } => {
                    let mut value = BytesMut::from(self.0.get(key).map_or(&[][..], |value| value));
                    value.extend_from_slice(tail);
                    self.0.insert(key.clone(), value.freeze());
                }
            }
        }
    }

    /// Every row, in key order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&Bytes, &Bytes)> {
        self.0.iter()
    }

    /// Puts one row as it is, however wrong: for tests of bad rows.
    pub fn put_raw(&mut self, key: Bytes, value: Bytes) {
        self.0.insert(key, value);
    }

    fn range(&self, from: &[u8], to: &[u8]) -> impl DoubleEndedIterator<Item = (Bytes, Bytes)> + '_ {
        let upper = if from < to { Bound::Excluded(to) } else { Bound::Excluded(from) };
        self.0.range::<[u8], _>((Bound::Included(from), upper)).map(|(key, value)| (key.clone(), value.clone()))
    }
}

impl Rows for MemoryRows {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, RowsError> {
        Ok(self.0.get(key).cloned())
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, RowsError> {
        Ok(self.range(from, to).take(limit).collect())
    }

    fn scan_back(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, RowsError> {
        Ok(self.range(from, to).rev().take(limit).collect())
    }
}
