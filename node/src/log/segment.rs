//! One segment: a file of fixed length with a header, then records, then zeros.
//!
//! A file appears under its final name only when all of it is allocated and its header is synced, so a short file or a bad
//! header is damage, never a crash while making one. A *spare* waits to be used; a segment in use names the one before it, so
//! that a missing file is seen; the first one of a process records where it cut the log it found.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::LogError;
use crate::disk::{Disk, DiskFile};

/// Records begin here. A page, so that no write of records touches the header's.
pub(super) const HEADER_BYTES: usize = 4096;
const MAGIC: &[u8; 8] = b"MRTLTLOG";
const VERSION: u32 = 1;
/// Of the header that is not zeros.
const USED: usize = 96;
const EXTENSION: &str = "seg";

/// Where a start cut the log it found: bytes of `segment` from `offset` on are rewritten elsewhere and are not judged again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) segment: u64,
    pub(super) offset: u64,
    /// First drain behind the cut.
    pub(super) drain: u64,
}

/// What a segment says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// Position among segments; rises, may leave gaps.
    pub(super) sequence: u64,
    /// Length of the file.
    pub(super) allocated: u64,
    /// Drawn for each segment; part of its records' checksums.
    pub(super) salt: u64,
    /// In use: the fields below count.
    pub(super) active: bool,
    /// The segment before; 0 for the very first.
    pub(super) previous: u64,
    /// Number of its first drain.
    pub(super) first_drain: u64,
    /// The node dropped a drain and is still to be caught up; groups without a `CaughtUp` record from here on.
    pub(super) catch_up: bool,
    pub(super) cut: Option<Cut>,
}

impl Header {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[u8::from(self.active), u8::from(self.catch_up), u8::from(self.cut.is_some()), 0]);
        let cut = self.cut.unwrap_or(Cut { segment: 0, offset: 0, drain: 0 });
        for number in [
            self.sequence,
            self.allocated,
            self.previous,
            self.first_drain,
            cut.segment,
            cut.offset,
            cut.drain,
            self.salt,
        ] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.resize(USED - 4, 0);
        let sum = crc32c::crc32c(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out.resize(HEADER_BYTES, 0);
        out
    }

    fn decode(bytes: &[u8]) -> Result<Header, &'static str> {
        let (used, rest) = bytes.split_at_checked(USED).ok_or("header cut off")?;
        let (body, sum) = used.split_at(USED - 4);
        if sum != crc32c::crc32c(body).to_le_bytes() {
            return Err("header checksum does not match");
        }
        if rest.iter().any(|b| *b != 0) {
            return Err("header is followed by something");
        }
        if &body[..8] != MAGIC {
            return Err("not a log segment");
        }
        if body[8..12] != VERSION.to_le_bytes() {
            return Err("log format of another version");
        }
        let number = |n: usize| u64::from_le_bytes(body[16 + 8 * n..24 + 8 * n].try_into().expect("eight bytes"));
        Ok(Header {
            sequence: number(0),
            allocated: number(1),
            salt: number(7),
            active: body[12] == 1,
            catch_up: body[13] == 1,
            previous: number(2),
            first_drain: number(3),
            cut: (body[14] == 1).then(|| Cut { segment: number(4), offset: number(5), drain: number(6) }),
        })
    }
}

/// Why a segment could not be made.
#[derive(Debug)]
pub(super) enum CreateError {
    /// No room, no descriptor: nothing was promised about the file, and it can be tried again.
    Again(io::Error),
    /// A sync failed: what the disk says afterwards cannot be believed.
    Sync(io::Error),
}

impl From<CreateError> for io::Error {
    fn from(e: CreateError) -> io::Error {
        match e {
            CreateError::Again(e) | CreateError::Sync(e) => e,
        }
    }
}

/// An open segment.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    pub(super) header: Header,
    pub(super) path: PathBuf,
    pub(super) file: Arc<dyn DiskFile>,
}

impl Segment {
    /// Makes a spare, complete before it has its name. The name is durable on return.
    pub(super) fn create_spare(
        disk: &dyn Disk,
        dir: &Path,
        sequence: u64,
        allocated: u64,
    ) -> Result<Segment, CreateError> {
        let header = Header {
            sequence,
            allocated,
            salt: rand::random(),
            active: false,
            previous: 0,
            first_drain: 0,
            catch_up: false,
            cut: None,
        };
        Segment::create(disk, dir, header, &[])
    }

    /// Makes a segment with these records, complete and synced before it has its name. The name is durable on return.
    pub(super) fn create(disk: &dyn Disk, dir: &Path, header: Header, records: &[u8]) -> Result<Segment, CreateError> {
        let path = path_of(dir, header.sequence);
        let unfinished = path.with_extension("tmp");
        let made = (|| {
            let file = disk.create(&unfinished, header.allocated).map_err(CreateError::Again)?;
            file.write_at(0, &header.encode()).map_err(CreateError::Again)?;
            if !records.is_empty() {
                file.write_at(HEADER_BYTES as u64, records).map_err(CreateError::Again)?;
            }
            // A file system that allocates late says here that it is full; nothing was promised about this file.
            file.sync_data().map_err(|e| match e.kind() {
                io::ErrorKind::StorageFull => CreateError::Again(e),
                _ => CreateError::Sync(e),
            })?;
            disk.rename(&unfinished, &path).map_err(CreateError::Again)?;
            disk.sync_dir(dir).map_err(CreateError::Sync)?;
            Ok(file)
        })();
        match made {
            Ok(file) => Ok(Segment { header, path, file: Arc::from(file) }),
            Err(e) => {
                // A full disk: give back what was taken, so that the next try finds no leftover of this name.
                let _ = disk.remove(&unfinished);
                Err(e)
            }
        }
    }

    /// The header that puts a spare into use, once it is written and synced.
    pub(super) fn activated(&mut self, previous: u64, first_drain: u64, catch_up: bool) -> Vec<u8> {
        self.header = Header { active: true, previous, first_drain, catch_up, ..self.header };
        self.header.encode()
    }

    /// Opens a file that [`names`] found.
    pub(super) fn open(disk: &dyn Disk, path: &Path) -> Result<Segment, LogError> {
        let io = |source| LogError::Io { path: path.display().to_string(), source };
        let damaged = |what: &str| LogError::Damaged { file: name(path), offset: 0, what: what.to_owned() };
        let file = disk.open(path).map_err(io)?;
        let len = file.len().map_err(io)?;
        let mut bytes = vec![0; HEADER_BYTES];
        if len < HEADER_BYTES as u64 {
            return Err(damaged("shorter than its header"));
        }
        file.read_at(0, &mut bytes).map_err(io)?;
        let header = Header::decode(&bytes).map_err(damaged)?;
        if path_of(Path::new(""), header.sequence).as_os_str() != path.file_name().unwrap_or_default() {
            return Err(damaged("header of another segment"));
        }
        if len != header.allocated {
            return Err(LogError::Damaged {
                file: name(path),
                offset: len,
                what: format!("{len} bytes long, but {} were allocated", header.allocated),
            });
        }
        Ok(Segment { header, path: path.to_owned(), file: Arc::from(file) })
    }

    /// All of it behind the header.
    pub(super) fn read_records(&self) -> io::Result<Vec<u8>> {
        let len = self.header.allocated.saturating_sub(HEADER_BYTES as u64);
        let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        self.file.read_at(HEADER_BYTES as u64, &mut bytes)?;
        Ok(bytes)
    }

    /// For people.
    pub(super) fn name(&self) -> String {
        name(&self.path)
    }
}

/// Segments of a directory, oldest first. Unfinished ones are removed.
pub(super) fn names(disk: &dyn Disk, dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in disk.list(dir)? {
        match path.extension().and_then(|e| e.to_str()) {
            Some(EXTENSION) => found.push(path),
            Some("tmp") => disk.remove(&path)?,
            _ => {}
        }
    }
    found.sort();
    Ok(found)
}

fn path_of(dir: &Path, sequence: u64) -> PathBuf {
    dir.join(format!("{sequence:016x}.{EXTENSION}"))
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            sequence: 5,
            allocated: 65536,
            salt: 12,
            active: true,
            previous: 4,
            first_drain: 77,
            catch_up: true,
            cut: Some(Cut { segment: 4, offset: 8192, drain: 76 }),
        }
    }

    #[test]
    fn a_header_round_trips() {
        assert_eq!(Header::decode(&header().encode()), Ok(header()));
        let without = Header { cut: None, catch_up: false, active: false, ..header() };
        assert_eq!(Header::decode(&without.encode()), Ok(without));
    }

    #[test]
    fn promise_5_a_flipped_bit_anywhere_in_a_header_is_seen() {
        let bytes = header().encode();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&damaged).is_err(), "bit {bit}");
        }
    }
}
