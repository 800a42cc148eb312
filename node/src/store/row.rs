//! How a replica's rows stand in the engine.
//!
//! Key: `replica u64 BE | generation u32 BE | space u8 | row key [| part u16 BE]`. Space 1 holds rows, space 2 the parts of those
//! that are too long for one physical value. Generation 0 is the replica's [`head`](super::head); a snapshot is installed under
//! the next generation and becomes visible when the head names it.
//!
//! Value: `form u8 | CRC32C u32 BE over form, physical key and content | content`. The content is the value itself (form 1), its
//! length u32 BE and xxh3 u64 BE when it stands in parts (form 2), one part (form 3), or a head (form 4). So a value under the
//! wrong key, a flipped bit and parts of two different values are all noticed; an absent row is noticed by the head's sum.

use bytes::{BufMut, Bytes, BytesMut};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::{
    StoreError,
    engine::{Engine, Op},
};
use crate::bug::Bug;

/// Longest content of a physical value, in bytes. sled splits a leaf at 17 rows and may merge two to 19; with this length such
/// a leaf stays below a quarter of a segment (128 KiB), above which sled would write a file that it never syncs.
pub(super) const PART_MAX: usize = 6 * 1024;
/// Longest value of a row: parts have a number of 16 bits.
pub(super) const VALUE_MAX: usize = PART_MAX * u16::MAX as usize;

const ROWS: u8 = 1;
const PARTS: u8 = 2;
/// Rows that are read at once where all are.
const PAGE: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Whole = 1,
    InParts = 2,
    Part = 3,
    Head = 4,
}

/// What one row adds to the sum of its replica.
pub(super) fn row_hash(key: &[u8], value: &[u8]) -> u64 {
    xxh3_64_with_seed(value, xxh3_64(key))
}

/// First physical key of a generation of a replica; of its head, for generation 0.
pub(super) fn generation_start(replica: u64, generation: u32) -> Vec<u8> {
    let mut key = Vec::with_capacity(12);
    key.put_u64(replica);
    key.put_u32(generation);
    key
}

/// First physical key after all of a replica's.
pub(super) fn replica_end(replica: u64) -> Vec<u8> {
    replica.checked_add(1).map_or_else(|| vec![0xff; 16], |next| generation_start(next, 0))
}

/// Under which generation a physical key stands.
pub(super) fn generation_of(physical: &[u8]) -> Option<u32> {
    physical.get(8..)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

/// Whose a physical key is.
pub(super) fn replica_of(physical: &[u8]) -> Option<u64> {
    physical.first_chunk().map(|bytes| u64::from_be_bytes(*bytes))
}

/// Wraps a content for `key`.
pub(super) fn wrap(form: Form, key: &[u8], content: &[u8]) -> Bytes {
    let mut value = BytesMut::with_capacity(5 + content.len());
    value.put_u8(form as u8);
    value.put_u32(checksum(form as u8, key, content));
    value.put_slice(content);
    value.freeze()
}

/// The content of a physical value, if it is what was written for `key`.
pub(super) fn unwrap(key: &[u8], value: &Bytes) -> Result<(Form, Bytes), &'static str> {
    let (Some(&form), Some(crc)) = (value.first(), value.get(1..5)) else { return Err("a value is too short") };
    let content = value.slice(5..);
    if crc != checksum(form, key, &content).to_be_bytes() && !Bug::ChecksumNotChecked.is_in() {
        return Err("a checksum does not match");
    }
    let form = match form {
        1 => Form::Whole,
        2 => Form::InParts,
        3 => Form::Part,
        4 => Form::Head,
        _ => return Err("a form is unknown"),
    };
    Ok((form, content))
}

fn checksum(form: u8, key: &[u8], content: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&[form]), key), content)
}

/// The rows of one generation of a replica in an engine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Region<'a> {
    pub(super) engine: &'a dyn Engine,
    pub(super) replica: u64,
    pub(super) generation: u32,
}

impl Region<'_> {
    /// The value of a row.
    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        let physical = self.row_key(key);
        self.engine.get(&physical)?.map(|value| self.assemble(key, &physical, &value)).transpose()
    }

    /// At most `limit` rows from `from` on, before `to`: keys, and what [`Region::open`] makes values of.
    pub(super) fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Closed)>, StoreError> {
        Ok(closed(self.engine.scan(&self.row_key(from), &self.row_key(to), limit)?))
    }

    /// At most `limit` rows before `to`, not before `from`, descending; as [`Region::scan`].
    pub(super) fn scan_back(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Closed)>, StoreError> {
        Ok(closed(self.engine.scan_back(&self.row_key(from), &self.row_key(to), limit)?))
    }

    /// The value of a scanned row. Only for one that no level of the memtable covers: a checkpoint may be changing the others.
    pub(super) fn open(&self, key: &[u8], Closed(value): &Closed) -> Result<Bytes, StoreError> {
        self.assemble(key, &self.row_key(key), value)
    }

    /// Number and sum of all rows: reads every one of them.
    pub(super) fn tally(&self) -> Result<(u64, u64), StoreError> {
        let (mut count, mut sum) = (0, 0u64);
        self.each(|key, value| {
            count += 1;
            sum = sum.wrapping_add(row_hash(key, value));
            Ok(())
        })?;
        Ok((count, sum))
    }

    /// Shows every row in key order, some at a time: nobody may change them meanwhile.
    pub(super) fn each(&self, mut row: impl FnMut(&[u8], &[u8]) -> Result<(), StoreError>) -> Result<(), StoreError> {
        let mut from = self.row_key(&[]);
        let to = self.key(PARTS, &[]);
        loop {
            let rows = closed(self.engine.scan(&from, &to, PAGE)?);
            let Some((last, _)) = rows.last() else { return Ok(()) };
            from = self.row_key(last);
            from.push(0);
            for (key, value) in &rows {
                row(key, &self.open(key, value)?)?;
            }
        }
    }

    /// The physical changes that set a row, when `replaced` parts of an older value are there.
    pub(super) fn put(&self, key: &[u8], value: &[u8], replaced: usize, mut op: impl FnMut(Op)) {
        let physical = self.row_key(key);
        let parts = if value.len() <= PART_MAX {
            op(Op::Put(Bytes::from(physical.clone()), wrap(Form::Whole, &physical, value)));
            0
        } else {
            for (part, content) in value.chunks(PART_MAX).enumerate() {
                let key = self.part_key(key, part);
                let value = wrap(Form::Part, &key, content);
                op(Op::Put(Bytes::from(key), value));
            }
            let mut content = Vec::with_capacity(12);
            content.put_u32(u32::try_from(value.len()).expect("commits refuse values over VALUE_MAX"));
            content.put_u64(xxh3_64(value));
            op(Op::Put(Bytes::from(physical.clone()), wrap(Form::InParts, &physical, &content)));
            value.len().div_ceil(PART_MAX)
        };
        for part in parts..replaced {
            op(Op::Remove(Bytes::from(self.part_key(key, part))));
        }
    }

    /// The physical changes that remove a row with `replaced` parts.
    pub(super) fn remove(&self, key: &[u8], replaced: usize, mut op: impl FnMut(Op)) {
        op(Op::Remove(Bytes::from(self.row_key(key))));
        for part in 0..replaced {
            op(Op::Remove(Bytes::from(self.part_key(key, part))));
        }
    }

    /// In how many parts the row stands; 0 when it is whole or absent.
    pub(super) fn part_count(&self, key: &[u8]) -> Result<usize, StoreError> {
        let physical = self.row_key(key);
        let Some(value) = self.engine.get(&physical)? else { return Ok(0) };
        match unwrap(&physical, &value).map_err(|what| self.damaged(what, &physical))? {
            (Form::Whole, _) => Ok(0),
            (Form::InParts, content) => Ok(in_parts(&content).ok_or_else(|| self.damaged(ODD, &physical))?.0),
            (Form::Part | Form::Head, _) => Err(self.damaged(ODD, &physical)),
        }
    }

    fn assemble(&self, key: &[u8], physical: &[u8], value: &Bytes) -> Result<Bytes, StoreError> {
        let damaged = |what| self.damaged(what, physical);
        let (parts, len, hash) = match unwrap(physical, value).map_err(damaged)? {
            (Form::Whole, content) => return Ok(content),
            (Form::InParts, content) => in_parts(&content).ok_or_else(|| damaged(ODD))?,
            (Form::Part | Form::Head, _) => return Err(damaged(ODD)),
        };
        let mut whole = BytesMut::with_capacity(len);
        for part in 0..parts {
            let key = self.part_key(key, part);
            let value = self.engine.get(&key)?.ok_or_else(|| self.damaged("a part is absent", &key))?;
            match unwrap(&key, &value).map_err(|what| self.damaged(what, &key))? {
                (Form::Part, content) => whole.put_slice(&content),
                (Form::Whole | Form::InParts | Form::Head, _) => return Err(self.damaged(ODD, &key)),
            }
        }
        if whole.len() != len || xxh3_64(&whole) != hash {
            return Err(damaged("the parts of a value do not belong together"));
        }
        Ok(whole.freeze())
    }

    fn damaged(&self, what: &str, physical: &[u8]) -> StoreError {
        // Keys hold tags and ids, no secret; a whole key could still name a device, so only its family and a hash are told.
        let family = physical.get(13).map_or_else(String::new, |f| format!(" of family {:?}", char::from(*f)));
        StoreError::Damaged {
            replica: self.replica,
            path: self.engine.path().to_owned(),
            what: format!("{what}, at a row{family} with key hash {:016x}", xxh3_64(physical)),
        }
    }

    fn key(&self, space: u8, rest: &[u8]) -> Vec<u8> {
        let mut key = generation_start(self.replica, self.generation);
        key.put_u8(space);
        key.put_slice(rest);
        key
    }

    fn row_key(&self, key: &[u8]) -> Vec<u8> {
        self.key(ROWS, key)
    }

    fn part_key(&self, key: &[u8], part: usize) -> Vec<u8> {
        let mut key = self.key(PARTS, key);
        key.put_u16(u16::try_from(part).expect("commits refuse values over VALUE_MAX"));
        key
    }
}

/// The physical value of a scanned row, not checked and not put together yet.
#[derive(Debug)]
pub(super) struct Closed(Bytes);

fn closed(physical: Vec<(Bytes, Bytes)>) -> Vec<(Bytes, Closed)> {
    physical.into_iter().map(|(key, value)| (key.slice(13..), Closed(value))).collect()
}

const ODD: &str = "a value has a form that does not belong there";

/// Number of parts, length and hash.
fn in_parts(content: &[u8]) -> Option<(usize, usize, u64)> {
    let len = u32::from_be_bytes(content.get(..4)?.try_into().ok()?) as usize;
    let hash = u64::from_be_bytes(content.get(4..)?.try_into().ok()?);
    (len > PART_MAX && len <= VALUE_MAX).then_some((len.div_ceil(PART_MAX), len, hash))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::memory::MemoryEngine, *};

    fn write(engine: &MemoryEngine, region: &Region<'_>, key: &[u8], value: &[u8]) {
        let replaced = region.part_count(key).unwrap();
        let mut ops = Vec::new();
        region.put(key, value, replaced, |op| ops.push(op));
        for ops in ops.chunks(128) {
            engine.batch(ops).unwrap();
        }
    }

    #[test]
    fn values_of_any_length_come_back_and_leave_no_parts() {
        let engine = MemoryEngine::default();
        let region = Region { engine: &engine, replica: 7, generation: 1 };
        for len in [0, 1, PART_MAX, PART_MAX + 1, 3 * PART_MAX, 10 * PART_MAX + 5, PART_MAX + 1, 3] {
            let value: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            write(&engine, &region, b"k", &value);
            assert_eq!(region.get(b"k").unwrap().unwrap(), value);
            assert_eq!(region.scan(b"", b"z", 9).unwrap().len(), 1);
            assert!(engine.rows().iter().all(|(_, v)| v.len() <= 8 * 1024));
        }
        assert_eq!(engine.rows().len(), 1);
    }

    #[test]
    fn promise_5_a_flipped_bit_in_any_physical_row_is_detected() {
        let engine = MemoryEngine::default();
        let region = Region { engine: &engine, replica: 7, generation: 1 };
        write(&engine, &region, b"small", b"value");
        write(&engine, &region, b"large", &[5; 2 * PART_MAX]);
        for (key, value) in engine.rows() {
            for bit in (0..value.len() * 8).filter(|bit| *bit < 200 || bit % 997 == 0) {
                let mut bad = value.to_vec();
                bad[bit / 8] ^= 1 << (bit % 8);
                engine.tamper(&key, Some(bad.into()));
                assert!(matches!(region.tally(), Err(StoreError::Damaged { replica: 7, .. })));
            }
            engine.tamper(&key, Some(value));
        }
        assert_eq!(region.tally().unwrap().0, 2);
    }

    #[test]
    fn promise_5_a_value_under_the_key_of_another_row_is_detected() {
        let engine = MemoryEngine::default();
        let region = Region { engine: &engine, replica: 7, generation: 1 };
        write(&engine, &region, b"a", b"1");
        write(&engine, &region, b"b", b"2");
        let rows = engine.rows();
        engine.tamper(&rows[0].0, Some(rows[1].1.clone()));
        assert!(region.get(b"a").is_err());
    }

    proptest! {
        #[test]
        fn physical_keys_sort_as_row_keys_do_and_parts_lie_apart(a: Vec<u8>, b: Vec<u8>, part in 0usize..65535) {
            let engine = MemoryEngine::default();
            let region = Region { engine: &engine, replica: 7, generation: 3 };
            prop_assert_eq!(region.row_key(&a).cmp(&region.row_key(&b)), a.cmp(&b));
            prop_assert!(region.part_key(&a, part) > region.row_key(&b));
            prop_assert!(region.part_key(&a, part) < replica_end(7));
        }
    }
}
