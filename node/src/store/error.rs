//! Why the store could not do what was asked.

use std::{io, path::PathBuf};

/// Why the store could not do what was asked, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk refused before sled was touched; nothing was lost, and a later try may succeed (a full disk, for one).
    #[error("cannot {doing} {}: {source}", path.display())]
    Disk {
        /// What was attempted.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What came instead.
        source: io::Error,
    },
    /// Rows of one replica are not what was written; that replica must not be served from here.
    #[error("replica {replica} is damaged in {}: {what}", path.display())]
    Damaged {
        /// Whose rows.
        replica: u64,
        /// In which file or directory.
        path: PathBuf,
        /// What does not agree.
        what: String,
    },
    /// A base file is not what was written.
    #[error("base file {} is damaged at byte {offset}: {what}", path.display())]
    Base {
        /// Which file.
        path: PathBuf,
        /// The first byte of what does not read back.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// The rows of a replica are bad or gone, and base and log do not hold enough to make them again.
    #[error("replica {replica} cannot be rebuilt ({why}): {what}")]
    Lost {
        /// Whose.
        replica: u64,
        /// What is wrong with the rows.
        why: String,
        /// What is wrong with base or log.
        what: String,
    },
    /// A part of the store is busy with another thing; a later try may succeed.
    #[error("replica {replica}: {what}")]
    Busy {
        /// Whose.
        replica: u64,
        /// With what.
        what: &'static str,
    },
    /// Sled, or what is below it, failed. A read that ends so says nothing about whether the row exists.
    #[error("cannot {doing} {}: {what}", path.display())]
    Engine {
        /// What was attempted.
        doing: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// What came instead.
        what: String,
        /// Sled says that its own file is not what it wrote.
        damaged: bool,
    },
    /// A checkpoint failed after it had begun to change sled. Reads go on; only opening the store anew helps.
    #[error("the store must be opened anew: {0}")]
    Broken(String),
    /// The replica was dropped; its id is never used again.
    #[error("replica {replica} was dropped")]
    Dropped {
        /// Which.
        replica: u64,
    },
    /// A commit that does not come after the last one.
    #[error("replica {replica} is at index {have}, a commit came for index {at}")]
    Backwards {
        /// Whose.
        replica: u64,
        /// The index committed before.
        have: u64,
        /// The index that came.
        at: u64,
    },
    /// A commit that breaks a rule of the store; nothing of it was taken.
    #[error("replica {replica} index {at}: {what}")]
    Refused {
        /// Whose.
        replica: u64,
        /// The index of the commit.
        at: u64,
        /// Which rule.
        what: &'static str,
    },
}
