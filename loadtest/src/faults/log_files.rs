//! The live bytes of a stopped node's log: those that a start reads, that were synced, and that lie before its last drain.
//!
//! A bad record of the last drain is a torn write, which is dropped and said; any other is damage, which must be refused. This
//! reader knows just enough of the format (`node/src/log/segment.rs`, `record.rs`) to aim. It checks no checksum: it looks at
//! logs before they are damaged.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

const MAGIC: &[u8; 8] = b"MRTLTLOG";
const VERSION: u32 = 1;
/// Bytes of a segment before its records.
const HEADER_BYTES: usize = 4096;
/// Bytes of a record that its length does not count: length and checksum.
const FRAME: usize = 8;
/// Least length: kind, drain, group, term, index.
const FIXED: usize = 29;
/// Records begin at multiples of this.
const ALIGN: usize = 8;

/// Bytes that a flipped bit must not go unnoticed in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Live {
    /// The segment.
    pub(super) file: PathBuf,
    /// Where they begin.
    pub(super) offset: u64,
    /// How many.
    pub(super) len: u64,
}

#[derive(Debug)]
struct Segment {
    file: PathBuf,
    bytes: Vec<u8>,
    active: bool,
    previous: u64,
    cut: Option<(u64, u64)>,
}

/// Live records of the log in `dir`, last drain excepted, oldest first; segments that are in use are whole files of them.
///
/// # Errors
/// When the files are not in the format that is known here.
pub(super) fn live(dir: &Path) -> Result<Vec<Live>> {
    let mut segments = BTreeMap::new();
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let file = entry?.path();
        if file.extension().is_some_and(|extension| extension == "seg") {
            let (sequence, segment) = read(file)?;
            segments.insert(sequence, segment);
        }
    }
    let cuts: BTreeMap<u64, u64> = segments.values().filter(|s| s.active).filter_map(|s| s.cut).collect();
    let mut next = segments.iter().rev().find(|(_, segment)| segment.active);
    let mut records = Vec::new();
    let mut chain = Vec::new();
    while let Some((sequence, segment)) = next {
        chain.push((sequence, segment));
        next = segments.get_key_value(&segment.previous);
    }
    for (sequence, segment) in chain.into_iter().rev() {
        let end = cuts.get(sequence).and_then(|cut| usize::try_from(*cut).ok());
        let bytes = &segment.bytes[..end.unwrap_or(segment.bytes.len()).min(segment.bytes.len())];
        let mut at = HEADER_BYTES;
        while let Some(len) = number(bytes, at, 4).and_then(|len| usize::try_from(len).ok())
            && len >= FIXED
            && at + FRAME + len <= bytes.len()
        {
            let drain = number(bytes, at + FRAME + 1, 8).unwrap_or(0);
            let live = Live { file: segment.file.clone(), offset: at as u64, len: (FRAME + len) as u64 };
            records.push((drain, live));
            at = (at + FRAME + len).next_multiple_of(ALIGN);
        }
    }
    let last = records.iter().map(|(drain, _)| *drain).max().unwrap_or(0);
    // The end mark of a clean stop is a drain of its own: the one before it is the last, too.
    Ok(records.into_iter().filter(|(drain, _)| drain + 1 < last).map(|(_, live)| live).collect())
}

fn read(file: PathBuf) -> Result<(u64, Segment)> {
    let bytes = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
    if bytes.len() < HEADER_BYTES || &bytes[..8] != MAGIC || number(&bytes, 8, 4) != Some(u64::from(VERSION)) {
        bail!("{} is not a log segment of format {VERSION}: teach loadtest/src/faults/log_files.rs", file.display());
    }
    let field = |n: usize| number(&bytes, 16 + 8 * n, 8).unwrap_or(0);
    let cut = (bytes[14] == 1).then(|| (field(4), field(5)));
    let (sequence, active, previous) = (field(0), bytes[12] == 1, field(2));
    Ok((sequence, Segment { file, bytes, active, previous, cut }))
}

/// A little-endian number of `len` bytes.
fn number(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + len)?;
    Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(dir: &Path, sequence: u64, previous: u64, cut: Option<(u64, u64)>, records: &[(u64, usize)]) -> PathBuf {
        let mut bytes = vec![0; 1 << 16];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8] = 1;
        bytes[12] = 1;
        bytes[14] = u8::from(cut.is_some());
        let (cut_in, cut_at) = cut.unwrap_or_default();
        for (n, field) in [sequence, 1 << 16, previous, 1, cut_in, cut_at].into_iter().enumerate() {
            bytes[16 + 8 * n..24 + 8 * n].copy_from_slice(&field.to_le_bytes());
        }
        let mut at = HEADER_BYTES;
        for (drain, payload) in records {
            let len = u32::try_from(FIXED + payload).unwrap();
            bytes[at..at + 4].copy_from_slice(&len.to_le_bytes());
            bytes[at + FRAME + 1..at + FRAME + 9].copy_from_slice(&drain.to_le_bytes());
            at = (at + FRAME + FIXED + payload).next_multiple_of(ALIGN);
        }
        let file = dir.join(format!("{sequence:016x}.seg"));
        fs::write(&file, bytes).unwrap();
        file
    }

    #[test]
    fn the_last_drain_what_lies_behind_a_cut_and_segments_out_of_use_are_not_live() {
        let dir = tempfile::tempdir().unwrap();
        segment(dir.path(), 1, 0, None, &[(1, 5)]);
        // Drain 3 was rewritten into the next segment, which says so; 4 is the last drain, 5 its end mark.
        let cut = (HEADER_BYTES + 40) as u64;
        let second = segment(dir.path(), 2, 9, None, &[(2, 3), (3, 3)]);
        let third = segment(dir.path(), 3, 2, Some((2, cut)), &[(3, 20), (4, 1), (5, 0)]);
        let live = live(dir.path()).unwrap();
        let at = HEADER_BYTES as u64;
        let expected = [
            Live { file: second, offset: at, len: (FRAME + FIXED + 3) as u64 },
            Live { file: third, offset: at, len: (FRAME + FIXED + 20) as u64 },
        ];
        assert_eq!(live, expected);
    }

    #[test]
    fn another_format_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = segment(dir.path(), 1, 0, None, &[]);
        let mut bytes = fs::read(&file).unwrap();
        bytes[8] = 2;
        fs::write(&file, bytes).unwrap();
        assert!(live(dir.path()).unwrap_err().to_string().contains("0000000000000001.seg"));
    }
}
