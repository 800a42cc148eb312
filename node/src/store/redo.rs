//! The redo file: the whole delta of a checkpoint cycle, on disk before sled is touched.
//!
//! A cycle is many batches, and a crash between two of them leaves rows in sled that no log index stands for. The redo file
//! makes it whole again: its operations are physical, so that doing them once more changes nothing.
//!
//! Layout, integers big-endian: `b"martlet redo" | version u32 = 1`, then records, each beginning with its kind (u8):
//! - 1, a section: `replica u64 | generation u32 | base u64 (index + 1 of the seal before; 0: none) | seal` (see `head`);
//! - 2, a put: `key length u32 | value length u32 | key | value`; 3, a removal: `key length u32 | key`;
//! - 4, the end: `number of records u64 | xxh3 u64 of every byte before it`. Nothing follows.
//!
//! The last operation of a section writes the replica's head. A file without a matching end is torn: it was never synced,
//! sled was not touched, and it is dropped. Were it instead damaged after its sync, sled would hold part of it, and the head's
//! row count and sum would not agree with the rows: the shard is refused then, not the file (see `shard`).

use std::path::Path;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use xxhash_rust::xxh3::Xxh3;

use super::{
    StoreError,
    engine::{BATCH_MAX, Engine, Op},
    head::{Head, Seal},
};
use crate::disk::{Disk, DiskFile};

const MAGIC: &[u8; 12] = b"martlet redo";
const VERSION: u32 = 1;
const SECTION: u8 = 1;
const PUT: u8 = 2;
const REMOVE: u8 = 3;
const END: u8 = 4;
/// Written and read in pieces of this many bytes.
const PIECE: usize = 1 << 20;

/// What one replica's part of the file moves it from and to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Section {
    pub(super) replica: u64,
    pub(super) generation: u32,
    /// Index of the seal that the operations build on.
    pub(super) base: Option<u64>,
    /// What the rows amount to after them.
    pub(super) seal: Seal,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Record {
    Section(Section),
    Op(Op),
    End,
}

/// Writes a redo file from start to end.
pub(super) struct RedoWriter<'a> {
    path: &'a Path,
    file: Box<dyn DiskFile>,
    offset: u64,
    buffer: BytesMut,
    hash: Xxh3,
    records: u64,
}

impl<'a> RedoWriter<'a> {
    pub(super) fn create(disk: &dyn Disk, path: &'a Path) -> Result<Self, StoreError> {
        let file = disk.create(path, 0).map_err(|e| failed("create", path, e))?;
        let mut buffer = BytesMut::with_capacity(PIECE);
        buffer.put_slice(MAGIC);
        buffer.put_u32(VERSION);
        Ok(Self { path, file, offset: 0, buffer, hash: Xxh3::new(), records: 0 })
    }

    pub(super) fn section(&mut self, section: &Section) -> Result<(), StoreError> {
        self.buffer.put_u8(SECTION);
        self.buffer.put_u64(section.replica);
        self.buffer.put_u32(section.generation);
        self.buffer.put_u64(section.base.map_or(0, |index| index + 1));
        section.seal.encode(&mut self.buffer);
        self.recorded()
    }

    pub(super) fn op(&mut self, op: &Op) -> Result<(), StoreError> {
        match op {
            Op::Put(key, value) => {
                self.buffer.put_u8(PUT);
                self.buffer.put_u32(u32::try_from(key.len()).expect("keys are bounded by commits"));
                self.buffer.put_u32(u32::try_from(value.len()).expect("physical values are short"));
                self.buffer.put_slice(key);
                self.buffer.put_slice(value);
            }
            Op::Remove(key) => {
                self.buffer.put_u8(REMOVE);
                self.buffer.put_u32(u32::try_from(key.len()).expect("keys are bounded by commits"));
                self.buffer.put_slice(key);
            }
        }
        self.recorded()
    }

    /// Ends the file and makes it and its name durable.
    pub(super) fn finish(mut self, disk: &dyn Disk) -> Result<Redo, StoreError> {
        self.buffer.put_u8(END);
        self.buffer.put_u64(self.records);
        self.hash.update(&self.buffer);
        self.buffer.put_u64(self.hash.digest());
        let tail = self.buffer.split();
        self.file.write_at(self.offset, &tail).map_err(|e| failed("write", self.path, e))?;
        self.file.sync_data().map_err(|e| failed("sync", self.path, e))?;
        let dir = self.path.parent().expect("the redo file lies in the store's directory");
        disk.sync_dir(dir).map_err(|e| failed("sync", dir, e))?;
        Ok(Redo { file: self.file, len: self.offset + tail.len() as u64 })
    }

    fn recorded(&mut self) -> Result<(), StoreError> {
        self.records += 1;
        if self.buffer.len() < PIECE {
            return Ok(());
        }
        let piece = self.buffer.split();
        self.hash.update(&piece);
        self.file.write_at(self.offset, &piece).map_err(|e| failed("write", self.path, e))?;
        self.offset += piece.len() as u64;
        Ok(())
    }
}

/// A complete redo file.
#[derive(Debug)]
pub(super) struct Redo {
    file: Box<dyn DiskFile>,
    len: u64,
}

/// What there is under the name of the redo file.
pub(super) enum Found {
    Nothing,
    /// The last checkpoint ended before it touched sled.
    Torn,
    Complete(Redo),
}

impl Redo {
    pub(super) fn find(disk: &dyn Disk, path: &Path) -> Result<Found, StoreError> {
        let file = match disk.open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(e) => return Err(failed("open", path, e)),
        };
        let len = file.len().map_err(|e| failed("read", path, e))?;
        let redo = Self { file, len };
        let mut reader = redo.reader(path);
        loop {
            match reader.next()? {
                Some(Record::Section(_) | Record::Op(_)) => (),
                Some(Record::End) => return Ok(Found::Complete(redo)),
                None => return Ok(Found::Torn),
            }
        }
    }

    /// Does every operation of the sections that `wanted` accepts. Not durable yet. Returns how many it did.
    pub(super) fn apply(
        &self,
        path: &Path,
        engine: &dyn Engine,
        mut wanted: impl FnMut(&Section) -> Result<bool, StoreError>,
    ) -> Result<u64, StoreError> {
        let mut reader = self.reader(path);
        let mut batch = Vec::with_capacity(BATCH_MAX);
        let (mut take, mut done) = (false, 0);
        loop {
            match reader.next()? {
                Some(Record::Section(section)) => take = wanted(&section)?,
                Some(Record::Op(op)) if take => batch.push(op),
                Some(Record::Op(_)) => (),
                Some(Record::End) => break,
                None => return Err(StoreError::Broken(format!("{} changed while it was read", path.display()))),
            }
            if batch.len() == BATCH_MAX {
                engine.batch(&batch)?;
                done += batch.len() as u64;
                batch.clear();
            }
        }
        if !batch.is_empty() {
            engine.batch(&batch)?;
            done += batch.len() as u64;
        }
        Ok(done)
    }

    fn reader<'a>(&'a self, path: &'a Path) -> Reader<'a> {
        Reader { redo: self, path, offset: 0, buffer: BytesMut::new(), hash: Xxh3::new(), records: 0, begun: false }
    }
}

/// Whether a section still stands before the engine's state: at its base, or already (partly) done.
pub(super) fn is_current(section: &Section, head: Option<&Head>) -> bool {
    let Some(head) = head else { return section.base.is_none() && section.generation == 1 };
    let at = head.seal.as_ref().map(|seal| seal.mark.index);
    !head.dropped
        && head.generation == section.generation
        && (at == section.base || at == Some(section.seal.mark.index))
}

struct Reader<'a> {
    redo: &'a Redo,
    path: &'a Path,
    offset: u64,
    buffer: BytesMut,
    hash: Xxh3,
    records: u64,
    begun: bool,
}

impl Reader<'_> {
    /// The next record; `None` if the file does not hold what it should from here on.
    fn next(&mut self) -> Result<Option<Record>, StoreError> {
        if !self.begun {
            let Some(mut head) = self.take(16)? else { return Ok(None) };
            if head.split_to(12) != MAGIC[..] || head.get_u32() != VERSION {
                return Ok(None);
            }
            self.begun = true;
        }
        let Some(kind) = self.take(1)? else { return Ok(None) };
        let record = match kind[0] {
            SECTION => self.section()?,
            PUT => {
                let Some(mut lens) = self.take(8)? else { return Ok(None) };
                let (key, value) = (lens.get_u32(), lens.get_u32());
                let Some(mut both) = self.take(u64::from(key) + u64::from(value))? else { return Ok(None) };
                let key = both.split_to(key as usize);
                Some(Record::Op(Op::Put(key, both)))
            }
            REMOVE => {
                let Some(mut len) = self.take(4)? else { return Ok(None) };
                self.take(u64::from(len.get_u32()))?.map(|key| Record::Op(Op::Remove(key)))
            }
            END => {
                let Some(mut records) = self.take(8)? else { return Ok(None) };
                let hash = self.hash.digest();
                let Some(mut written) = self.take(8)? else { return Ok(None) };
                let whole = records.get_u64() == self.records && written.get_u64() == hash && self.left() == 0;
                whole.then_some(Record::End)
            }
            _ => None,
        };
        self.records += 1;
        Ok(record)
    }

    fn section(&mut self) -> Result<Option<Record>, StoreError> {
        let Some(mut fixed) = self.take(20)? else { return Ok(None) };
        let (replica, generation, base) = (fixed.get_u64(), fixed.get_u32(), fixed.get_u64().checked_sub(1));
        let Some(seal) = self.take(28)? else { return Ok(None) };
        let len = (&seal[24..]).get_u32();
        let Some(mark) = self.take(u64::from(len))? else { return Ok(None) };
        let seal = Seal::decode(&mut Bytes::from([seal, mark].concat()));
        Ok(seal.map(|seal| Record::Section(Section { replica, generation, base, seal })))
    }

    fn left(&self) -> u64 {
        self.redo.len - self.offset + self.buffer.len() as u64
    }

    /// The next `len` bytes; `None` if there are fewer. A wrong length cannot ask for more memory than the file has bytes.
    fn take(&mut self, len: u64) -> Result<Option<Bytes>, StoreError> {
        if len > self.left() {
            return Ok(None);
        }
        let len = usize::try_from(len).expect("the file fits the address space");
        if self.buffer.len() < len {
            let have = self.buffer.len();
            let more = (self.redo.len - self.offset).min(PIECE.max(len - have) as u64);
            self.buffer.resize(have + usize::try_from(more).expect("at most a piece or a record"), 0);
            let read = self.redo.file.read_at(self.offset, &mut self.buffer[have..]);
            read.map_err(|e| failed("read", self.path, e))?;
            self.offset += more;
        }
        let bytes = self.buffer.split_to(len).freeze();
        self.hash.update(&bytes);
        Ok(Some(bytes))
    }
}

pub(super) fn failed(doing: &'static str, path: &Path, source: std::io::Error) -> StoreError {
    StoreError::Disk { doing, path: path.to_owned(), source }
}
