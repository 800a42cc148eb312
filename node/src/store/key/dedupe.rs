//! Key family `Dedupe` (0x07): operation ids and what they were answered, one row per second of shard time. Key:
//! `tag | second u64`, 9 bytes. Value, only ever appended to: records of `operation id 16 | length u16 | answer`, where the
//! answer is a `queue.Answer`, or nothing (length 0) when the id was barred. The second is that of the answer; of an id that was
//! barred because its first try lay ahead, that of the first try.
//!
//! Not a row per operation: ids are known for a minute or two and then go, and a row each would be most of the store's work.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use martlet_proto::cluster::queue::Answer;
use prost::Message;

use super::{BadRow, Family, body, take};

/// An operation id, 16 bytes.
pub type OperationId = [u8; 16];

/// The key of one second.
#[must_use]
pub fn key(second: u64) -> Bytes {
    let mut key = Vec::with_capacity(9);
    key.push(Family::Dedupe.tag());
    key.extend_from_slice(&second.to_be_bytes());
    key.into()
}

/// Reads a key.
#[must_use]
pub fn decode_key(key: &[u8]) -> Option<u64> {
    let mut rest = body(Family::Dedupe, key)?;
    let second = u64::from_be_bytes(take(&mut rest)?);
    rest.is_empty().then_some(second)
}

/// Adds one record; no answer: barred.
pub fn append(tail: &mut BytesMut, id: OperationId, answer: Option<&Answer>) {
    let answer = answer.map(Message::encode_to_vec).unwrap_or_default();
    let len = u16::try_from(answer.len()).expect("an answer names one registration at most: well below 64 KiB");
    tail.put_slice(&id);
    tail.put_u16(len);
    tail.put_slice(&answer);
}

/// Reads the value found under `key`: the records in the order in which they were added.
///
/// # Errors
/// When it is not a row of whole records.
pub fn decode(key: &[u8], mut value: Bytes) -> Result<Vec<(OperationId, Option<Answer>)>, BadRow> {
    let bad = |what| BadRow::new(Family::Dedupe, what, key);
    let mut records = Vec::new();
    while !value.is_empty() {
        if value.len() < 18 {
            return Err(bad("a record is cut short"));
        }
        let mut id = [0; 16];
        value.copy_to_slice(&mut id);
        let len = usize::from(value.get_u16());
        if value.len() < len {
            return Err(bad("a record is cut short"));
        }
        let answer = value.split_to(len);
        let answer = match len {
            0 => None,
            _ => Some(Answer::decode(answer).map_err(|_| bad("an answer is not protocol buffers"))?),
        };
        records.push((id, answer));
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use martlet_proto::cluster::queue::{Accepted, Unregistered, answer::Kind};
    use proptest::prelude::*;

    use super::*;

    fn answer(count: u32) -> Answer {
        Answer {
            kind: Some(if count == 0 {
                Kind::Accepted(Accepted::default())
            } else {
                Kind::Unregistered(Unregistered { count })
            }),
        }
    }

    proptest! {
        #[test]
        fn round_trips_and_sorts_by_second(a: u64, b: u64, records: Vec<([u8; 16], Option<u32>)>, junk: Vec<u8>) {
            prop_assert_eq!(decode_key(&key(a)), Some(a));
            prop_assert_eq!(key(a).cmp(&key(b)), a.cmp(&b));
            let records: Vec<_> = records.into_iter().map(|(id, count)| (id, count.map(answer))).collect();
            let mut value = BytesMut::new();
            for (id, answer) in &records {
                append(&mut value, *id, answer.as_ref());
            }
            prop_assert_eq!(decode(&key(a), value.freeze()), Ok(records));
            let _ = decode(&key(a), junk.into());
        }
    }
}
