//! Read checks that many attaches share.
//!
//! A read check asks a majority, so a login storm must not ask it once for each batch. Whoever comes while one is under way
//! waits for the next, which then answers all who came before it began. The invariant: a caller is answered by a check that
//! began after the caller came.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Mutex;

use crate::raft::ReadError;

/// The read checks of one shard.
#[derive(Debug)]
pub(crate) struct ReadChecks {
    /// Checks that have begun.
    begun: AtomicU64,
    /// Number of the last one that ended, and what it found.
    last: Mutex<(u64, Result<(), ReadError>)>,
}

impl Default for ReadChecks {
    fn default() -> Self {
        ReadChecks { begun: AtomicU64::new(0), last: Mutex::new((0, Ok(()))) }
    }
}

impl ReadChecks {
    /// What a check found that began after this was called; `check` is run unless another caller's was such a one. Safe to
    /// cancel: the next who waits then runs its own.
    pub(crate) async fn after_now(&self, check: impl AsyncFnOnce() -> Result<(), ReadError>) -> Result<(), ReadError> {
        let before = self.begun.load(Ordering::SeqCst);
        let mut last = self.last.lock().await;
        if last.0 > before {
            return last.1.clone();
        }
        let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        *last = (number, check().await);
        last.1.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use futures::future::join_all;
    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test]
    async fn a_hundred_callers_share_a_check_that_begins_after_they_came() {
        let (checks, gate, ran) = (ReadChecks::default(), Semaphore::new(0), AtomicUsize::new(0));
        let check = async || {
            ran.fetch_add(1, Ordering::SeqCst);
            gate.acquire().await.unwrap().forget();
            Err(ReadError::Stopped(ran.load(Ordering::SeqCst).to_string()))
        };
        let first = checks.after_now(check);
        tokio::pin!(first);
        assert!(futures::poll!(&mut first).is_pending());
        let others = join_all((0..100).map(|_| checks.after_now(check)));
        tokio::pin!(others);
        assert!(futures::poll!(&mut others).is_pending());
        gate.add_permits(2);
        let (first, others) = tokio::join!(first, others);
        assert_eq!(first, Err(ReadError::Stopped("1".into())));
        assert!(others.iter().all(|found| *found == Err(ReadError::Stopped("2".into()))), "{others:?}");
        assert_eq!(ran.load(Ordering::SeqCst), 2);
    }
}
