//! The data directory of a node: made when missing, held by one process at a time.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirError {
    /// Another process holds it.
    #[error("data directory {dir} is in use by another process (it holds {dir}/lock)", dir = .0.display())]
    InUse(PathBuf),
    /// The system refused.
    #[error("data directory {dir}: {source}", dir = dir.display())]
    Io {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A directory that this process holds. Dropping it lets go; so does the end of the process, however it ends.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: File,
}

impl DataDir {
    /// Makes the directory and its parts, and takes the lock.
    pub fn hold(path: &Path) -> Result<Self, DirError> {
        let failed = |source| DirError::Io { dir: path.into(), source };
        fs::create_dir_all(path).map_err(failed)?;
        let lock =
            OpenOptions::new().create(true).truncate(false).write(true).open(path.join("lock")).map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(DirError::InUse(path.into())),
            Err(error) => return Err(failed(error.into())),
        }
        let dir = Self { path: path.into(), _lock: lock };
        for part in [dir.log(), dir.store()] {
            fs::create_dir_all(part).map_err(failed)?;
        }
        File::open(path).and_then(|dir| dir.sync_all()).map_err(failed)?;
        Ok(dir)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the log's segments are.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Where the store is.
    pub fn store(&self) -> PathBuf {
        self.path.join("store")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_held_once_and_free_again_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node");
        let held = DataDir::hold(&path).unwrap();
        let second = DataDir::hold(&path).unwrap_err();
        assert!(second.to_string().contains("in use by another process"), "{second}");
        drop(held);
        DataDir::hold(&path).unwrap();
    }
}
