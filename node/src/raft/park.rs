//! A replica that waits before an entry: one that it could not apply, or one that is held until it is decided.
//!
//! Owns what is said of such an entry ([`Stop`]), what may be decided of it ([`Decisions`]), and what the replica does meanwhile:
//! it keeps its log, votes and acknowledges appends, but applies nothing, does not count as a leader, and hands leadership to
//! others when it has it. Leaves the trying of entries to [`super::machine`] and the deciding to whoever gives the group its
//! [`Decisions`]. The invariants: nothing of the entry is kept; once it is decided that the entry is skipped, every replica
//! passes over it, whether it waits, restarts or replays the log as a new one; while it is held, no replica that knows of the
//! hold tries it.
//!
//! Left out: a snapshot that reaches beyond the entry does not end the wait; the node has to be restarted for that.

use std::{fmt, sync::Arc, time::Duration};

use futures::future::{BoxFuture, pending};
use sha2::{Digest as _, Sha256};
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{Group, Index};
use crate::log::GroupId;

/// Between two looks whether a waiting replica leads, or was left behind.
const TICK: Duration = Duration::from_millis(200);
/// Longest between two tries to hand leadership over, in ticks: ten minutes. Each try costs an entry of the log.
const HAND_OVER_TICKS_MAX: u32 = 3_000;
/// Entries that others commit behind the one that is waited for, before this replica ends instead: openraft queues as many
/// batches of them (1,024) before its core stands still. That many are committed only when another replica leads and applies.
const PASSED_MAX: u64 = 512;

/// SHA-256 of an entry's payload.
pub type Digest = [u8; 32];

/// Of an entry's payload.
pub(super) fn digest(payload: &[u8]) -> Digest {
    Sha256::digest(payload).into()
}

/// What was decided of one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Nothing: it is applied.
    None,
    /// It is about to be decided: it is not tried.
    Held,
    /// It is passed over, if it is the one that is meant.
    Skip {
        /// Term of the entry.
        term: u64,
        /// Its digest.
        digest: Digest,
    },
}

/// What was decided of the entries of one group. What it says must be on this node's disk.
pub trait Decisions: fmt::Debug + Send + Sync + 'static {
    /// Of the entry at `index`. Asked before every entry.
    fn of(&self, index: u64) -> Decision;
    /// Ends when [`Decisions::of`] may answer otherwise than it does at this call.
    fn changed(&self) -> BoxFuture<'static, ()>;
}

/// Nothing is ever decided.
#[derive(Debug, Clone, Copy)]
pub struct Undecided;

impl Decisions for Undecided {
    fn of(&self, _: u64) -> Decision {
        Decision::None
    }

    fn changed(&self) -> BoxFuture<'static, ()> {
        Box::pin(pending())
    }
}

/// Why a replica does not go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// It tried the entry in vain.
    Poison {
        /// Which command of the entry, by place and kind.
        operation: String,
        /// What went wrong.
        what: String,
    },
    /// It is being decided, and was not tried by this process.
    Held,
    /// A skip was decided of another entry at this index.
    OtherEntry,
}

/// The entry before which a replica waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    /// Whose log.
    pub group: GroupId,
    /// The entry.
    pub at: Index,
    /// Of its payload.
    pub digest: Digest,
    /// Why it is not applied.
    pub why: Why,
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stop { group, at, digest, why } = self;
        write!(f, "{group} waits before entry {} of term {} (digest ", at.index, at.term)?;
        digest[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        match why {
            Why::Poison { operation, what } => write!(f, "): {operation} cannot be applied: {what}"),
            Why::Held => f.write_str("): it is being decided whether the entry is skipped"),
            Why::OtherEntry => f.write_str("): a skip was decided of another entry at this index"),
        }
    }
}

/// What a group and its machine share of the wait.
#[derive(Debug)]
pub(super) struct Parking {
    pub(super) group: GroupId,
    pub(super) decisions: Arc<dyn Decisions>,
    stop: watch::Sender<Option<Stop>>,
    /// The group ends.
    pub(super) ending: CancellationToken,
}

impl Parking {
    pub(super) fn new(group: GroupId, decisions: Arc<dyn Decisions>) -> Arc<Parking> {
        Arc::new(Parking { group, decisions, stop: watch::channel(None).0, ending: CancellationToken::new() })
    }

    /// Before which entry the replica waits, and every change of it.
    pub(super) fn follow(&self) -> watch::Receiver<Option<Stop>> {
        self.stop.subscribe()
    }

    pub(super) fn now(&self) -> Option<Stop> {
        self.stop.borrow().clone()
    }

    /// The replica waits; said in the log when it is news.
    pub(super) fn stopped(&self, stop: &Stop) {
        let news = self.stop.send_if_modified(|now| {
            let news = now.as_ref() != Some(stop);
            *now = Some(stop.clone());
            news
        });
        if !news {
            return;
        }
        let (group, Index { index, term }) = (stop.group, stop.at);
        match &stop.why {
            Why::Poison { operation, what } => tracing::error!(
                %group, index, term, operation, what,
                "an entry cannot be applied; nothing of it was kept, and this replica waits before it until it is skipped \
                 (`martlet admin shard skip`) or a program that can apply it is started"
            ),
            Why::Held | Why::OtherEntry => tracing::warn!(%group, index, term, %stop, "this replica waits"),
        }
    }

    /// The replica goes on.
    pub(super) fn passed(&self) {
        self.stop.send_if_modified(|now| now.take().is_some());
    }

    /// Waits until the entry of `stop` may be looked at again: it is decided, or held no more. `committed` tells how far the
    /// group has come.
    ///
    /// # Errors
    /// In words, when the wait must end without it: the group ends, or goes on without this replica.
    pub(super) async fn decided(&self, stop: &Stop, committed: impl Fn() -> u64) -> Result<(), String> {
        let begun = committed();
        loop {
            let changed = self.decisions.changed();
            match (self.decisions.of(stop.at.index), &stop.why) {
                (Decision::Skip { .. }, Why::Poison { .. } | Why::Held) | (Decision::None, Why::Held) => return Ok(()),
                (Decision::None, Why::OtherEntry) => return Ok(()),
                (Decision::None | Decision::Held, Why::Poison { .. })
                | (Decision::Held, Why::Held | Why::OtherEntry)
                | (Decision::Skip { .. }, Why::OtherEntry) => {}
            }
            let mut changed = std::pin::pin!(changed);
            loop {
                tokio::select! {
                    () = changed.as_mut() => break,
                    () = self.ending.cancelled() => return Err(format!("{stop}; the group ends")),
                    () = sleep(TICK) => {}
                }
                if committed() > begun + PASSED_MAX {
                    return Err(format!(
                        "{stop}; the other replicas have gone on, so that this one alone is wrong: start the node again with \
                         the program that they run"
                    ));
                }
            }
        }
    }
}

/// Hands leadership over while this replica waits and has it: another may be able to apply what it cannot. Ends with the group.
pub(super) async fn hand_over(group: Group, parking: Arc<Parking>) {
    let mut stop = parking.follow();
    let (mut turn, mut pause) = (0_usize, 1);
    loop {
        let waits = async {
            if stop.borrow().is_none() {
                (turn, pause) = (0, 1);
                // Its sender is in `parking`.
                let _ = stop.wait_for(Option::is_some).await;
            }
        };
        tokio::select! { () = waits => {}, () = parking.ending.cancelled() => return }
        let mut ticks = 1;
        // Those that wait too say that they would not lead.
        let willing = if group.leads_unmasked() { group.successors().await.0 } else { Vec::new() };
        if let Some(to) = turn.checked_rem(willing.len()).and_then(|nth| willing.get(nth)) {
            match group.give_to(*to).await {
                Ok(()) => tracing::info!(group = %group.id(), to, "leadership is handed over by a replica that waits"),
                Err(error) => tracing::debug!(%error, "leadership was not handed over"),
            }
            (turn, ticks, pause) = (turn + 1, pause, (pause * 2).min(HAND_OVER_TICKS_MAX));
        }
        tokio::select! { () = sleep(TICK * ticks) => {}, () = parking.ending.cancelled() => return }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_names_group_entry_operation_and_what_went_wrong() {
        let why = Why::Poison { operation: "command 2, Enqueue".into(), what: "panicked: no such row".into() };
        let stop = Stop { group: GroupId(6), at: Index { term: 3, index: 17 }, digest: digest(b"entry"), why };
        let digest = Sha256::digest(b"entry").iter().take(8).map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(
            stop.to_string(),
            format!(
                "shard 5 waits before entry 17 of term 3 (digest {digest}): command 2, Enqueue cannot be applied: panicked: \
                 no such row"
            )
        );
    }
}
