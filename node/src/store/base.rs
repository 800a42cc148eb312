//! The base file of a replica: its rows in key order at one log index, so that sled need not be trusted.
//!
//! Owns the form of the file, its writing and its reading; leaves to [`super::basing`] when one is written, to
//! [`super::install`] and [`super::rebuild`] what is made of it. A base is written under a temporary name, synced, renamed and
//! its directory synced, so that what stands under its own name was once whole; every byte of it is under a checksum all the
//! same, and whoever reads it is told file and offset of the first that is wrong.
//!
//! Form, integers big-endian: `b"martlet base" | version u32 = 1 | length of the head u32 | head | CRC32C u32 of all before`,
//! where the head is `group u32 | replica u64 | seal` (see `head`: index, number and sum of the rows, mark). Then chunks:
//! `length u32 | CRC32C u32 | bytes`, at most [`CHUNK_MAX`] of them, and at last one of length 0, behind which nothing follows.
//! The checksum of a chunk covers the head's checksum, the chunk's number (u64), its length and its bytes: chunks of other files
//! or places are noticed. The bytes of all chunks, put together, are rows: `length of key u16 | length of value u32 | key | value`.

use std::{
    io,
    path::{Path, PathBuf},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{
    StoreError,
    head::Seal,
    redo::failed,
    row::{VALUE_MAX, row_hash},
    shard::{KEY_MAX, MARK_MAX},
};
use crate::{
    bug::Bug,
    disk::{Disk, DiskFile},
};

/// Most bytes of one chunk: what is held in memory of a base that is written, read or sent, beside its longest row.
pub const CHUNK_MAX: usize = 256 << 10;

const MAGIC: &[u8; 12] = b"martlet base";
const VERSION: u32 = 1;
/// Magic, version, length of the head.
const PREFIX: usize = 20;
/// Group, replica, and a seal without its mark.
const HEAD_MIN: usize = 4 + 8 + 28;
/// Length and checksum of a chunk.
const FRAME: usize = 8;
const ROW_PREFIX: usize = 6;

/// What a base is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseHead {
    /// Number of the Raft group.
    pub group: u32,
    /// Whose rows: the replica that wrote the file.
    pub replica: u64,
    /// At which index, and what they amount to.
    pub seal: Seal,
}

impl BaseHead {
    /// The file's first bytes, and their checksum.
    fn encode(&self) -> (BytesMut, u32) {
        let mut head = BytesMut::with_capacity(HEAD_MIN);
        head.put_u32(self.group);
        head.put_u64(self.replica);
        self.seal.encode(&mut head);
        let mut bytes = BytesMut::with_capacity(PREFIX + head.len() + 4);
        bytes.put_slice(MAGIC);
        bytes.put_u32(VERSION);
        bytes.put_u32(u32::try_from(head.len()).expect("commits refuse marks over MARK_MAX"));
        bytes.put_slice(&head);
        let crc = crc32c::crc32c(&bytes);
        bytes.put_u32(crc);
        (bytes, crc)
    }

    fn decode(mut head: Bytes) -> Option<Self> {
        if head.len() < HEAD_MIN {
            return None;
        }
        let (group, replica) = (head.get_u32(), head.get_u64());
        let seal = Seal::decode(&mut head)?;
        head.is_empty().then_some(Self { group, replica, seal })
    }
}

fn checksum(head: u32, number: u64, bytes: &[u8]) -> u32 {
    let mut place = [0; 16];
    (&mut place[..]).put_u32(head);
    (&mut place[4..]).put_u64(number);
    (&mut place[12..]).put_u32(u32::try_from(bytes.len()).expect("a chunk is short"));
    crc32c::crc32c_append(crc32c::crc32c(&place), bytes)
}

/// Writes a base from start to end, under a name that does not count yet.
#[derive(Debug)]
pub(super) struct BaseWriter {
    path: PathBuf,
    file: Box<dyn DiskFile>,
    head: BaseHead,
    head_crc: u32,
    offset: u64,
    number: u64,
    gathered: BytesMut,
    rows: u64,
    sum: u64,
}

impl BaseWriter {
    /// Begins a file; one that was left under the name is removed first.
    pub(super) fn create(disk: &dyn Disk, path: &Path, head: BaseHead) -> Result<Self, StoreError> {
        remove(disk, path)?;
        let file = disk.create(path, 0).map_err(|e| failed("create", path, e))?;
        let (bytes, head_crc) = head.encode();
        file.write_at(0, &bytes).map_err(|e| failed("write", path, e))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            head,
            head_crc,
            offset: bytes.len() as u64,
            number: 0,
            gathered: BytesMut::with_capacity(CHUNK_MAX),
            rows: 0,
            sum: 0,
        })
    }

    /// Adds a row; they must come in key order.
    pub(super) fn row(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.gathered.put_u16(u16::try_from(key.len()).expect("commits refuse keys over KEY_MAX"));
        self.gathered.put_u32(u32::try_from(value.len()).expect("commits refuse values over VALUE_MAX"));
        self.gathered.put_slice(key);
        self.gathered.put_slice(value);
        self.rows += 1;
        self.sum = self.sum.wrapping_add(row_hash(key, value));
        while self.gathered.len() >= CHUNK_MAX {
            let chunk = self.gathered.split_to(CHUNK_MAX);
            self.chunk(&chunk)?;
        }
        Ok(())
    }

    /// Adds a chunk as it stood in another base: not empty, at most [`CHUNK_MAX`] bytes.
    pub(super) fn chunk(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        assert!(!bytes.is_empty() && bytes.len() <= CHUNK_MAX, "a chunk of {} bytes", bytes.len());
        self.frame(bytes)
    }

    /// Ends the file and syncs it. The rows must be those that its head tells of.
    pub(super) fn finish(mut self) -> Result<(), StoreError> {
        let Seal { rows, sum, .. } = self.head.seal;
        if (self.rows, self.sum) != (rows, sum) {
            return Err(StoreError::Damaged {
                replica: self.head.replica,
                path: self.path,
                what: format!(
                    "its head tells of {rows} rows with sum {sum:016x}, there are {} with sum {:016x}",
                    self.rows, self.sum
                ),
            });
        }
        self.end()
    }

    /// Ends the file and syncs it, whatever it holds.
    pub(super) fn end(&mut self) -> Result<(), StoreError> {
        let rest = self.gathered.split();
        if !rest.is_empty() {
            self.frame(&rest)?;
        }
        self.frame(&[])?;
        self.file.sync_data().map_err(|e| failed("sync", &self.path, e))
    }

    fn frame(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let mut frame = BytesMut::with_capacity(FRAME + bytes.len());
        frame.put_u32(u32::try_from(bytes.len()).expect("a chunk is short"));
        frame.put_u32(checksum(self.head_crc, self.number, bytes));
        frame.put_slice(bytes);
        self.file.write_at(self.offset, &frame).map_err(|e| failed("write", &self.path, e))?;
        self.offset += frame.len() as u64;
        self.number += 1;
        Ok(())
    }
}

/// A base that is open for reading. What is renamed over it meanwhile changes nothing.
#[derive(Debug)]
pub struct BaseFile {
    path: PathBuf,
    file: Box<dyn DiskFile>,
    len: u64,
    head: BaseHead,
    head_crc: u32,
    body: u64,
}

/// Where in a base a reader is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    offset: u64,
    number: u64,
    ended: bool,
}

impl BaseFile {
    /// Opens a base and reads its head; `None` when there is no such file.
    pub fn open(disk: &dyn Disk, path: &Path) -> Result<Option<Self>, StoreError> {
        let file = match disk.open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed("open", path, e)),
        };
        let len = file.len().map_err(|e| failed("read", path, e))?;
        let bad = |what: &str| StoreError::Base { path: path.to_owned(), offset: 0, what: what.into() };
        if len < (PREFIX + HEAD_MIN + 4) as u64 {
            return Err(bad("it is too short for a head"));
        }
        let mut prefix = vec![0; PREFIX];
        file.read_at(0, &mut prefix).map_err(|e| failed("read", path, e))?;
        let (magic, mut numbers) = prefix.split_at(MAGIC.len());
        let (version, head_len) = (numbers.get_u32(), numbers.get_u32() as usize);
        if magic != MAGIC {
            return Err(bad("it is another kind of file"));
        }
        if version != VERSION {
            return Err(bad(&format!("its version {version} is not known to this executable")));
        }
        if head_len > HEAD_MIN + MARK_MAX || (PREFIX + head_len + 4) as u64 > len {
            return Err(bad("the length of its head is wrong"));
        }
        let mut rest = vec![0; head_len + 4];
        file.read_at(PREFIX as u64, &mut rest).map_err(|e| failed("read", path, e))?;
        let (content, crc) = rest.split_at(head_len);
        let head_crc = crc32c::crc32c_append(crc32c::crc32c(&prefix), content);
        if crc != head_crc.to_be_bytes() {
            return Err(bad("the checksum of its head does not match"));
        }
        let head = BaseHead::decode(Bytes::copy_from_slice(content)).ok_or_else(|| bad("its head is misshapen"))?;
        Ok(Some(Self { path: path.to_owned(), file, len, head, head_crc, body: (PREFIX + head_len + 4) as u64 }))
    }

    /// What it is of.
    pub fn head(&self) -> &BaseHead {
        &self.head
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// Before the first chunk.
    pub fn begin(&self) -> Place {
        Place { offset: self.body, number: 0, ended: false }
    }

    /// The chunk at `place`, checked, and `place` behind it; `None` after the last. A base that does not end as it should is an
    /// error, not an end.
    pub fn chunk(&self, place: &mut Place) -> Result<Option<Bytes>, StoreError> {
        if place.ended {
            return Ok(None);
        }
        let at = place.offset;
        let bad = |what: &str| self.damaged(at, what);
        if self.len - at < FRAME as u64 {
            return Err(bad("it ends in the middle"));
        }
        let mut frame = [0; FRAME];
        self.file.read_at(at, &mut frame).map_err(|e| failed("read", &self.path, e))?;
        let mut numbers = &frame[..];
        let (len, crc) = (numbers.get_u32() as usize, numbers.get_u32());
        if len > CHUNK_MAX {
            return Err(bad("the length of a chunk is wrong"));
        }
        if self.len - at - (FRAME as u64) < len as u64 {
            return Err(bad("it ends in the middle of a chunk"));
        }
        let mut bytes = vec![0; len];
        self.file.read_at(at + FRAME as u64, &mut bytes).map_err(|e| failed("read", &self.path, e))?;
        if checksum(self.head_crc, place.number, &bytes) != crc && !Bug::ChecksumNotChecked.is_in() {
            return Err(bad("the checksum of a chunk does not match"));
        }
        let offset = at + (FRAME + len) as u64;
        *place = Place { offset, number: place.number + 1, ended: len == 0 };
        if len > 0 {
            return Ok(Some(bytes.into()));
        }
        if offset != self.len {
            return Err(self.damaged(offset, "something follows its end"));
        }
        Ok(None)
    }

    /// Its rows, in order; at the end they are as many as the head says, with its sum, or the last item is an error.
    pub(super) fn rows(&self) -> Rows<'_> {
        Rows { base: self, place: self.begin(), gathered: BytesMut::new(), last: None, rows: 0, sum: 0, done: false }
    }

    fn damaged(&self, offset: u64, what: &str) -> StoreError {
        StoreError::Base { path: self.path.clone(), offset, what: what.into() }
    }
}

/// Reads the rows of a base, with one chunk and one row in memory.
pub(super) struct Rows<'a> {
    base: &'a BaseFile,
    place: Place,
    gathered: BytesMut,
    last: Option<Bytes>,
    rows: u64,
    sum: u64,
    done: bool,
}

impl Rows<'_> {
    fn read(&mut self) -> Result<Option<(Bytes, Bytes)>, StoreError> {
        if !self.gather(ROW_PREFIX)? {
            if !self.gathered.is_empty() {
                return Err(self.base.damaged(self.place.offset, "it ends in the middle of a row"));
            }
            let Seal { rows, sum, .. } = self.base.head.seal;
            if (self.rows, self.sum) != (rows, sum) {
                let what = format!(
                    "its head tells of {rows} rows with sum {sum:016x}, there are {} with sum {:016x}",
                    self.rows, self.sum
                );
                return Err(self.base.damaged(self.place.offset, &what));
            }
            return Ok(None);
        }
        let at = self.place.offset;
        let mut lens = &self.gathered[..];
        let (key, value) = (usize::from(lens.get_u16()), lens.get_u32() as usize);
        if key > KEY_MAX || value > VALUE_MAX {
            return Err(self.base.damaged(at, "the length of a row is wrong"));
        }
        if !self.gather(ROW_PREFIX + key + value)? {
            return Err(self.base.damaged(self.place.offset, "it ends in the middle of a row"));
        }
        self.gathered.advance(ROW_PREFIX);
        let key = self.gathered.split_to(key).freeze();
        let value = self.gathered.split_to(value).freeze();
        if self.last.as_ref().is_some_and(|last| *last >= key) {
            return Err(self.base.damaged(at, "its rows are not in order"));
        }
        self.last = Some(Bytes::copy_from_slice(&key));
        self.rows += 1;
        self.sum = self.sum.wrapping_add(row_hash(&key, &value));
        Ok(Some((key, value)))
    }

    /// Whether so many bytes are there.
    fn gather(&mut self, wanted: usize) -> Result<bool, StoreError> {
        while self.gathered.len() < wanted {
            let Some(chunk) = self.base.chunk(&mut self.place)? else { return Ok(false) };
            self.gathered.extend_from_slice(&chunk);
        }
        Ok(true)
    }
}

impl Iterator for Rows<'_> {
    type Item = Result<(Bytes, Bytes), StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let row = self.read().transpose();
        self.done = !matches!(row, Some(Ok(_)));
        row
    }
}

/// Removes a file if there is one; its absence need not be durable.
pub(super) fn remove(disk: &dyn Disk, path: &Path) -> Result<(), StoreError> {
    match disk.remove(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, e)),
        _ => Ok(()),
    }
}

/// Gives a synced file its name, durably.
pub(super) fn publish(disk: &dyn Disk, from: &Path, to: &Path) -> Result<(), StoreError> {
    disk.rename(from, to).map_err(|e| failed("rename", from, e))?;
    let dir = to.parent().expect("a base lies in the store's directory");
    disk.sync_dir(dir).map_err(|e| failed("sync", dir, e))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::head::Mark, *};
    use crate::disk::forgetful::ForgetfulDisk;

    const PATH: &str = "store/base";

    type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

    fn sealed(rows: &Pairs) -> Seal {
        let sum = rows.iter().fold(0u64, |sum, (key, value)| sum.wrapping_add(row_hash(key, value)));
        Seal { mark: Mark { index: 7, bytes: "mark".into() }, rows: rows.len() as u64, sum }
    }

    fn written(rows: &Pairs) -> ForgetfulDisk {
        let disk = ForgetfulDisk::new();
        let head = BaseHead { group: 3, replica: 9, seal: sealed(rows) };
        let mut writer = BaseWriter::create(&disk, Path::new("store/new"), head).unwrap();
        rows.iter().for_each(|(key, value)| writer.row(key, value).unwrap());
        writer.finish().unwrap();
        publish(&disk, Path::new("store/new"), Path::new(PATH)).unwrap();
        disk
    }

    fn read(disk: &ForgetfulDisk) -> Result<Pairs, StoreError> {
        let base = BaseFile::open(disk, Path::new(PATH))?.expect("it is there");
        base.rows().map(|row| row.map(|(key, value)| (key.to_vec(), value.to_vec()))).collect()
    }

    fn rows() -> Pairs {
        let mut rows: Pairs = (0..40_u8).map(|n| (vec![n], vec![n; 100])).collect();
        // Longer than a chunk, and one that is cut by its end.
        rows.push((vec![50], vec![5; 2 * CHUNK_MAX]));
        rows.push((vec![51], vec![6; 10]));
        rows
    }

    #[test]
    fn rows_of_any_length_come_back_in_order_after_a_power_cut() {
        for rows in [rows(), Pairs::new()] {
            assert_eq!(read(&written(&rows).power_cut()).unwrap(), rows);
        }
    }

    #[test]
    fn no_chunk_is_longer_than_its_bound() {
        let disk = written(&rows());
        let base = BaseFile::open(&disk, Path::new(PATH)).unwrap().unwrap();
        let (mut place, mut lens) = (base.begin(), Vec::new());
        while let Some(chunk) = base.chunk(&mut place).unwrap() {
            lens.push(chunk.len());
        }
        assert!(lens.len() >= 3 && lens.iter().all(|len| *len <= CHUNK_MAX), "{lens:?}");
    }

    #[test]
    fn promise_5_a_flipped_bit_or_a_cut_anywhere_is_told_with_file_and_offset() {
        let disk = written(&rows());
        let len = disk.bytes(Path::new(PATH)).len();
        let places = (0..200).chain((200..len).step_by(1_009)).chain(len - 20..len);
        for at in places {
            for cut in [false, true] {
                let copy = disk.restart();
                copy.tamper(Path::new(PATH), |bytes| if cut { bytes.truncate(at) } else { bytes[at] ^= 1 << (at % 8) });
                match read(&copy) {
                    Err(StoreError::Base { path, offset, .. }) => {
                        assert_eq!(path, Path::new(PATH));
                        assert!(
                            offset <= at as u64 && at as u64 - offset <= (CHUNK_MAX + FRAME) as u64,
                            "{offset} {at}"
                        );
                    }
                    other => panic!("at {at}, cut {cut}: {:?}", other.map(|rows| rows.len())),
                }
            }
        }
    }

    #[test]
    fn a_chunk_in_another_place_or_bytes_behind_the_end_are_noticed() {
        let disk = written(&rows());
        let base = BaseFile::open(&disk, Path::new(PATH)).unwrap().unwrap();
        let (body, frame) = (base.body as usize, CHUNK_MAX + FRAME);
        let copy = disk.restart();
        copy.tamper(Path::new(PATH), |bytes| {
            let first = bytes[body..body + frame].to_vec();
            let second = bytes.splice(body + frame..body + 2 * frame, first).collect::<Vec<_>>();
            bytes.splice(body..body + frame, second);
        });
        assert!(matches!(read(&copy), Err(StoreError::Base { .. })));
        let copy = disk.restart();
        copy.tamper(Path::new(PATH), |bytes| bytes.push(0));
        assert!(matches!(read(&copy), Err(StoreError::Base { .. })));
    }

    #[test]
    fn rows_that_are_not_what_the_head_tells_of_are_no_base() {
        let disk = ForgetfulDisk::new();
        let head = BaseHead { group: 3, replica: 9, seal: sealed(&rows()) };
        let mut writer = BaseWriter::create(&disk, Path::new("store/new"), head).unwrap();
        writer.row(b"a", b"b").unwrap();
        assert!(matches!(writer.finish(), Err(StoreError::Damaged { replica: 9, .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes: Vec<u8>) {
            let disk = ForgetfulDisk::new();
            let file = disk.create(Path::new(PATH), 0).unwrap();
            file.write_at(0, &bytes).unwrap();
            let _ = read(&disk);
        }
    }
}
