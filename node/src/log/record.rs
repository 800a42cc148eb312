//! One record of the log: its bytes, and what tells a whole one from a torn one.
//!
//! `len u32 | crc32c u32 | kind u8 | drain u64 | group u32 | term u64 | index u64 | payload | zeros up to 8 bytes`, numbers
//! little-endian. `len` counts from `kind` to the end of the payload; the checksum covers those bytes and the
//! segment's random salt: a record read from the wrong file is bad, and no payload can contain what passes for a record. Kind numbers are never reused.
//!
//! A drain is whole when its last record says so: a [`Kind::Seal`], or a [`Kind::End`], which is a drain of its own.

use super::{GroupId, Index, Vote};
use crate::bug::Bug;

/// Every record begins at a multiple of this, so that a search for whole records behind a bad one takes these steps.
pub(super) const ALIGN: usize = 8;
/// `len` and checksum.
const FRAME: usize = 8;
/// From `kind` to the payload.
const FIXED: usize = 29;

/// What a record says. `at` is the field pair (term, index).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// An entry at `at`.
    Append = 1,
    /// Entries from `index` on are gone.
    Truncate = 2,
    /// Entries up to `at` are not needed any more.
    Purge = 3,
    /// Vote: `at` is (term, replica), payload one byte: whether it is committed.
    Vote = 4,
    /// Known committed up to `at`; written along, never synced for.
    Committed = 5,
    /// An entry copied forward out of a segment that is to go: the log has it already, here or in front of what it has of the
    /// group. It never changes what follows it.
    CopiedAppend = 6,
    /// Opening record of a segment: the purge point as it stands.
    CopiedPurge = 7,
    /// Opening record: the vote as it stands; never lowers one.
    CopiedVote = 8,
    /// Opening record: the committed index as it stands; never lowers it.
    CopiedCommitted = 9,
    /// A leader has caught the group up since the node dropped a drain.
    CaughtUp = 10,
    /// The drain is whole.
    Seal = 11,
    /// The log was closed cleanly.
    End = 12,
}

impl Kind {
    fn of(byte: u8) -> Option<Kind> {
        Some(match byte {
            1 => Kind::Append,
            2 => Kind::Truncate,
            3 => Kind::Purge,
            4 => Kind::Vote,
            5 => Kind::Committed,
            6 => Kind::CopiedAppend,
            7 => Kind::CopiedPurge,
            8 => Kind::CopiedVote,
            9 => Kind::CopiedCommitted,
            10 => Kind::CaughtUp,
            11 => Kind::Seal,
            12 => Kind::End,
            _ => return None,
        })
    }

    /// Whether the drain ends with it.
    pub(super) fn seals(self) -> bool {
        matches!(self, Kind::Seal | Kind::End)
    }
}

/// A record that reads whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record<'a> {
    pub(super) kind: Kind,
    pub(super) drain: u64,
    pub(super) group: GroupId,
    pub(super) at: Index,
    pub(super) payload: &'a [u8],
}

impl Record<'_> {
    /// Bytes it takes in the file.
    pub(super) fn size(&self) -> usize {
        size(self.payload.len())
    }

    /// Of a vote record.
    pub(super) fn vote(&self) -> Vote {
        Vote { term: self.at.term, replica: self.at.index, committed: self.payload.first().is_some_and(|b| *b == 1) }
    }

    /// Appends it to `out`, for the segment with this salt.
    pub(super) fn encode(&self, salt: u64, out: &mut Vec<u8>) {
        let start = out.len();
        let len = u32::try_from(FIXED + self.payload.len()).expect("payloads are far below 4 GiB");
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.push(self.kind as u8);
        out.extend_from_slice(&self.drain.to_le_bytes());
        out.extend_from_slice(&self.group.0.to_le_bytes());
        out.extend_from_slice(&self.at.term.to_le_bytes());
        out.extend_from_slice(&self.at.index.to_le_bytes());
        out.extend_from_slice(self.payload);
        let sum = checksum(salt, &out[start + FRAME..]);
        out[start + 4..start + FRAME].copy_from_slice(&sum.to_le_bytes());
        out.resize(start + self.size(), 0);
    }
}

/// Bytes a record with a payload of this length takes.
pub(super) fn size(payload: usize) -> usize {
    (FRAME + FIXED + payload).next_multiple_of(ALIGN)
}

/// What stands at the beginning of `bytes`, which reach to the end of the segment.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Parsed<'a> {
    /// A whole record.
    Whole(Record<'a>),
    /// Nothing but zeros from here on.
    Blank,
    /// Something, but no whole record.
    Bad(&'static str),
}

pub(super) fn parse(bytes: &[u8], salt: u64) -> Parsed<'_> {
    match whole(bytes, salt) {
        Ok(record) => Parsed::Whole(record),
        Err(_) if bytes.iter().all(|b| *b == 0) => Parsed::Blank,
        Err(why) => Parsed::Bad(why),
    }
}

/// The record at the beginning of `bytes`, or what is wrong with it.
pub(super) fn whole(bytes: &[u8], salt: u64) -> Result<Record<'_>, &'static str> {
    let len = u32_at(bytes, 0).ok_or("record cut off")? as usize;
    if len < FIXED {
        return Err("record length too small");
    }
    let body = bytes.get(FRAME..FRAME + len).ok_or("record longer than its segment")?;
    let padding = bytes.get(FRAME + len..size(len - FIXED)).ok_or("record longer than its segment")?;
    let kind = Kind::of(body[0]).ok_or("record of unknown kind")?;
    if u32_at(bytes, 4) != Some(checksum(salt, body)) && !Bug::ChecksumNotChecked.is_in() {
        return Err("record checksum does not match");
    }
    if padding.iter().any(|b| *b != 0) {
        return Err("record padding is not zero");
    }
    let number = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().expect("eight bytes"));
    Ok(Record {
        kind,
        drain: number(1),
        group: GroupId(u32_at(body, 9).expect("the fixed part is there")),
        at: Index { term: number(13), index: number(21) },
        payload: &body[FIXED..],
    })
}

/// Whether a whole record of a drain after `drain` stands anywhere in `bytes`.
pub(super) fn later_drain(bytes: &[u8], salt: u64, drain: u64) -> bool {
    (0..bytes.len()).step_by(ALIGN).any(|at| {
        let rest = &bytes[at..];
        // The cheap look comes first: most of what is searched is zeros or payload.
        let number = rest.get(FRAME + 1..FRAME + 9).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes")));
        number.is_some_and(|number| number > drain) && whole(rest, salt).is_ok()
    })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn checksum(salt: u64, body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&salt.to_le_bytes()), body)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(payload: &[u8]) -> Record<'_> {
        Record { kind: Kind::Append, drain: 7, group: GroupId(3), at: Index { term: 2, index: 9 }, payload }
    }

    proptest! {
        #[test]
        fn a_record_round_trips(payload: Vec<u8>, drain: u64, group: u32, term: u64, index: u64, salt: u64) {
            let one = Record { kind: Kind::Append, drain, group: GroupId(group), at: Index { term, index }, payload: &payload };
            let mut bytes = Vec::new();
            one.encode(salt, &mut bytes);
            prop_assert_eq!(bytes.len(), one.size());
            prop_assert_eq!(bytes.len() % ALIGN, 0);
            prop_assert_eq!(parse(&bytes, salt), Parsed::Whole(one));
        }

        #[test]
        fn any_bytes_are_answered(bytes: Vec<u8>, salt: u64) {
            let _ = parse(&bytes, salt);
        }
    }

    #[test]
    fn promise_5_a_flipped_bit_anywhere_in_a_record_is_seen() {
        let mut bytes = Vec::new();
        record(b"hello").encode(1, &mut bytes);
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(parse(&damaged, 1), Parsed::Bad(_)), "bit {bit}");
        }
    }

    #[test]
    fn a_record_of_another_segment_is_bad() {
        let mut bytes = Vec::new();
        record(b"hello").encode(1, &mut bytes);
        assert_eq!(parse(&bytes, 2), Parsed::Bad("record checksum does not match"));
    }

    #[test]
    fn zeros_are_blank() {
        assert_eq!(parse(&[0; 64], 1), Parsed::Blank);
        assert_eq!(parse(&[], 1), Parsed::Blank);
    }
}
