//! A small file that is read whole and replaced whole.
//!
//! Form: magic (8 bytes), version u32, length of the body u64, body, CRC-32C of all of it u32; big-endian. A new content is
//! written beside the old one, synced, renamed over it, and the directory synced: after a crash either is there, whole. Anything
//! else under that name is refused with file and what is wrong, never taken for absent.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::disk::Disk;

const HEAD: usize = 20;
const VERSION: u32 = 1;
/// No such file is larger; a bound for what is read into memory.
const BODY_MAX: u64 = 64 << 20;

/// Why a file was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Its bytes are not what was written.
    #[error("{path} is damaged: {what}", path = path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The disk refused.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the disk said.
        source: io::Error,
    },
}

/// The body of the file, `None` when there is none.
pub(super) fn read(disk: &dyn Disk, path: &Path, magic: &[u8; 8]) -> Result<Option<Vec<u8>>, FileError> {
    let failed = |source| FileError::Io { path: path.into(), source };
    let damaged = |what: &str| FileError::Damaged { path: path.into(), what: what.into() };
    let file = match disk.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let len = file.len().map_err(failed)?;
    if len < (HEAD + 4) as u64 || len > BODY_MAX {
        return Err(damaged(&format!("it has {len} bytes")));
    }
    let mut bytes = vec![0; usize::try_from(len).map_err(|_| damaged("too large"))?];
    file.read_at(0, &mut bytes).map_err(failed)?;
    let (content, crc) = bytes.split_last_chunk::<4>().expect("longer than the head");
    if crc32c::crc32c(content) != u32::from_be_bytes(*crc) {
        return Err(damaged("its checksum does not match"));
    }
    let (head, body) = content.split_at(HEAD);
    if &head[..8] != magic {
        return Err(damaged("it is another kind of file"));
    }
    let version = u32::from_be_bytes(head[8..12].try_into().expect("four bytes"));
    if version != VERSION {
        return Err(damaged(&format!("its version {version} is not known to this executable")));
    }
    if head[12..] != (body.len() as u64).to_be_bytes() {
        return Err(damaged("its length does not match"));
    }
    Ok(Some(body.to_vec()))
}

/// Replaces the content; on return it is durable.
pub(super) fn write(disk: &dyn Disk, path: &Path, magic: &[u8; 8], body: &[u8]) -> Result<(), FileError> {
    let failed = |source| FileError::Io { path: path.into(), source };
    let dir = path.parent().expect("a file of the data directory");
    let new = path.with_extension("new");
    // Left behind by a crash before the rename; it never counted.
    match disk.remove(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let mut bytes = Vec::with_capacity(HEAD + body.len() + 4);
    bytes.extend_from_slice(magic);
    bytes.extend_from_slice(&VERSION.to_be_bytes());
    bytes.extend_from_slice(&(body.len() as u64).to_be_bytes());
    bytes.extend_from_slice(body);
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_be_bytes());
    let file = disk.create(&new, 0).map_err(failed)?;
    file.write_at(0, &bytes).map_err(failed)?;
    file.sync_data().map_err(failed)?;
    disk.rename(&new, path).map_err(failed)?;
    disk.sync_dir(dir).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::RealDisk;

    const MAGIC: &[u8; 8] = b"MARTLETt";

    #[test]
    fn the_last_content_is_read_back_and_a_missing_file_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        assert_eq!(read(&RealDisk, &path, MAGIC).unwrap(), None);
        for body in [&b"one"[..], b"", b"three"] {
            write(&RealDisk, &path, MAGIC, body).unwrap();
            assert_eq!(read(&RealDisk, &path, MAGIC).unwrap().unwrap(), body);
        }
    }

    #[test]
    fn a_torn_truncated_or_flipped_file_is_refused_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write(&RealDisk, &path, MAGIC, b"a body of some length").unwrap();
        let good = std::fs::read(&path).unwrap();
        let mut bad: Vec<Vec<u8>> = (0..good.len()).map(|len| good[..len].to_vec()).collect();
        bad.extend((0..good.len() * 8).map(|bit| {
            let mut flipped = good.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            flipped
        }));
        bad.push([&good[..], b"\0"].concat());
        for bytes in bad {
            std::fs::write(&path, &bytes).unwrap();
            let error = read(&RealDisk, &path, MAGIC).unwrap_err();
            assert!(error.to_string().contains("file"), "{error}");
        }
        std::fs::write(&path, good).unwrap();
        assert!(read(&RealDisk, &path, b"MARTLETx").is_err());
    }

    #[test]
    fn a_file_left_by_a_crash_before_the_rename_is_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write(&RealDisk, &path, MAGIC, b"old").unwrap();
        std::fs::write(path.with_extension("new"), b"half").unwrap();
        assert_eq!(read(&RealDisk, &path, MAGIC).unwrap().unwrap(), b"old");
        write(&RealDisk, &path, MAGIC, b"new").unwrap();
        assert_eq!(read(&RealDisk, &path, MAGIC).unwrap().unwrap(), b"new");
    }
}
