//! Bugs that tests put back on purpose, to prove that the suite finds them.
//!
//! Only the feature `bugs` compiles them in, and only this crate's own tests turn that on; without it every question is
//! answered "no" at compile time. A process has at most one: the test that expects a failure runs the tests that should
//! fail in a child, with [`VARIABLE`] set. No bug may have an effect while the variable is not set.

/// The environment variable that names the bug of this process.
pub const VARIABLE: &str = "MARTLET_BUG";

/// The value of [`VARIABLE`] with which messages that hold [`POISON`] cannot be applied.
pub const POISONED: &str = "poisoned-entry";

/// What makes a message poison, once poison is on.
pub const POISON: &[u8] = b"martlet-test-poison";

/// Whether poison is on in this process besides [`VARIABLE`].
#[cfg(feature = "bugs")]
static POISON_ON: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// From now on messages of this process that hold [`POISON`] cannot be applied, on any of its nodes.
#[cfg(feature = "bugs")]
pub fn poison() {
    POISON_ON.store(true, std::sync::atomic::Ordering::SeqCst);
}

/// Whether `apply` is to panic at a message with this payload.
#[cfg(feature = "bugs")]
pub(crate) fn poisons(payload: &[u8]) -> bool {
    let on = POISON_ON.load(std::sync::atomic::Ordering::SeqCst) || named() == Some(POISONED);
    on && payload.windows(POISON.len()).any(|part| part == POISON)
}

/// Whether `apply` is to panic: never.
#[cfg(not(feature = "bugs"))]
pub(crate) const fn poisons(_: &[u8]) -> bool {
    false
}

/// The value of [`VARIABLE`].
#[cfg(feature = "bugs")]
fn named() -> Option<&'static str> {
    static NAMED: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    NAMED.get_or_init(|| std::env::var(VARIABLE).ok()).as_deref()
}

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
        named() == Some(self.name())
    }

    /// Whether this process has it: never.
    #[cfg(not(feature = "bugs"))]
    pub const fn is_in(self) -> bool {
        false
    }
}
