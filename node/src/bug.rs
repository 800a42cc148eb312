//! Bugs that tests put back on purpose, to prove that the suite finds them.
//!
//! Only the feature `bugs` compiles them in, and only this crate's own tests turn that on; without it every question is
//! answered "no" at compile time. A process has at most one: the test that expects a failure runs the tests that should
//! fail in a child, with [`VARIABLE`] set. No bug may have an effect while the variable is not set.

/// The environment variable that names the bug of this process.
pub const VARIABLE: &str = "MARTLET_BUG";

/// A bug that once was, or easily could be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// A drain's callbacks run before its fdatasync.
    AckBeforeFsync,
    /// A vote is answered before it is on disk.
    VoteNotSynced,
    /// A checkpoint writes to sled without a redo file.
    CheckpointWithoutRedo,
    /// The log is purged to an index that no base file has.
    PurgeBeforeBase,
    /// Deliveries are written without a look at the quorum lease.
    DeliveryWithoutLease,
    /// The checksum of a row or record is not compared.
    ChecksumNotChecked,
    /// A record copied forward is replayed as if it were new: it truncates.
    CopyForwardTruncates,
}

impl Bug {
    /// The value of [`VARIABLE`] that puts it in.
    pub const fn name(self) -> &'static str {
        match self {
            Bug::AckBeforeFsync => "ack-before-fsync",
            Bug::VoteNotSynced => "vote-not-synced",
            Bug::CheckpointWithoutRedo => "checkpoint-without-redo",
            Bug::PurgeBeforeBase => "purge-before-base",
            Bug::DeliveryWithoutLease => "delivery-without-lease",
            Bug::ChecksumNotChecked => "checksum-not-checked",
            Bug::CopyForwardTruncates => "copy-forward-truncates",
        }
    }

    /// Whether this process has it.
    #[cfg(feature = "bugs")]
    pub fn is_in(self) -> bool {
        static NAMED: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
        NAMED.get_or_init(|| std::env::var(VARIABLE).ok()).as_deref() == Some(self.name())
    }

    /// Whether this process has it: never.
    #[cfg(not(feature = "bugs"))]
    pub const fn is_in(self) -> bool {
        false
    }
}
