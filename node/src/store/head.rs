//! The head of a replica: up to where its rows in the engine reach, and what they must amount to.
//!
//! One physical row under generation 0. It is written last in a checkpoint and by itself decides which generation is the
//! replica's, so that a snapshot is switched to in one record.
//! Layout: `version u8 = 1 | state u8 (1 live, 2 dropped) | generation u32 | sealed u8 | seal`, where a seal is
//! `index u64 | rows u64 | sum u64 | length of mark u32 | mark`, all big-endian.

use bytes::{Buf, BufMut, Bytes};

use super::{
    StoreError,
    engine::{Engine, Op},
    row::{self, Form},
};

/// Up to where a replica has applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// Log index of the last entry applied.
    pub index: u64,
    /// What the Raft layer keeps with it (applied log id, membership), at most 4 KiB; opaque here.
    pub bytes: Bytes,
}

/// What the rows of a replica amount to at one index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seal {
    /// The index, and what belongs to it.
    pub mark: Mark,
    /// Number of rows.
    pub rows: u64,
    /// Sum of the row hashes, wrapping; equal on all replicas at one index.
    pub sum: u64,
}

impl Seal {
    pub(super) fn encode(&self, out: &mut impl BufMut) {
        out.put_u64(self.mark.index);
        out.put_u64(self.rows);
        out.put_u64(self.sum);
        out.put_u32(u32::try_from(self.mark.bytes.len()).expect("commits refuse marks over MARK_MAX"));
        out.put_slice(&self.mark.bytes);
    }

    pub(super) fn decode(from: &mut Bytes) -> Option<Self> {
        if from.len() < 28 {
            return None;
        }
        let (index, rows, sum, len) = (from.get_u64(), from.get_u64(), from.get_u64(), from.get_u32() as usize);
        (from.len() >= len).then(|| Self { mark: Mark { index, bytes: from.split_to(len) }, rows, sum })
    }
}

/// What the engine knows of one replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    /// Whether its rows wait to be removed.
    pub(super) dropped: bool,
    /// Under which generation its rows stand, from 1.
    pub(super) generation: u32,
    /// What they amount to.
    pub(super) seal: Option<Seal>,
}

impl Head {
    /// The head of `replica`, if it has one.
    pub(super) fn read(engine: &dyn Engine, replica: u64) -> Result<Option<Self>, StoreError> {
        let key = row::generation_start(replica, 0);
        let damaged = |what: &str| StoreError::Damaged {
            replica,
            path: engine.path().to_owned(),
            what: format!("{what}, in the head of the replica"),
        };
        let Some(value) = engine.get(&key)? else { return Ok(None) };
        match row::unwrap(&key, &value).map_err(damaged)? {
            (Form::Head, content) => Self::decode(content).map(Some).ok_or_else(|| damaged("fields are unknown")),
            (Form::Whole | Form::InParts | Form::Part, _) => Err(damaged("the form is wrong")),
        }
    }

    /// The physical change that writes it.
    pub(super) fn put(&self, replica: u64) -> Op {
        let key = row::generation_start(replica, 0);
        let mut content = Vec::with_capacity(64);
        content.put_u8(1);
        content.put_u8(if self.dropped { 2 } else { 1 });
        content.put_u32(self.generation);
        content.put_u8(u8::from(self.seal.is_some()));
        if let Some(seal) = &self.seal {
            seal.encode(&mut content);
        }
        let value = row::wrap(Form::Head, &key, &content);
        Op::Put(Bytes::from(key), value)
    }

    /// The physical change that removes the head of `replica`.
    pub(super) fn remove(replica: u64) -> Op {
        Op::Remove(Bytes::from(row::generation_start(replica, 0)))
    }

    fn decode(mut content: Bytes) -> Option<Self> {
        if content.len() < 7 || content.get_u8() != 1 {
            return None;
        }
        let dropped = match content.get_u8() {
            1 => false,
            2 => true,
            _ => return None,
        };
        let generation = content.get_u32();
        let seal = match content.get_u8() {
            0 => None,
            1 => Some(Seal::decode(&mut content)?),
            _ => return None,
        };
        (generation > 0 && content.is_empty()).then_some(Self { dropped, generation, seal })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::memory::MemoryEngine, *};

    proptest! {
        #[test]
        fn a_head_round_trips(
            replica: u64, dropped: bool, generation in 1u32.., sealed: bool,
            index: u64, rows: u64, sum: u64, mark in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let engine = MemoryEngine::default();
            let seal = sealed.then(|| Seal { mark: Mark { index, bytes: mark.into() }, rows, sum });
            let head = Head { dropped, generation, seal };
            engine.batch(&[head.put(replica)]).unwrap();
            prop_assert_eq!(Head::read(&engine, replica).unwrap(), Some(head));
        }

        #[test]
        fn any_bytes_are_answered(bytes: Vec<u8>) {
            let _ = Head::decode(bytes.into());
        }
    }
}
