//! Replies of one submit stream, on their way out.
//!
//! Owns how many batches of the stream are unanswered: the reader waits while there are too many, so a stream that is not read is
//! bounded by its own requests.

use std::sync::{Mutex, MutexGuard, PoisonError};

use martlet_proto::cluster::queue::{BatchReply, SubmitReply};
use tokio::sync::Notify;

/// One stream's replies.
#[derive(Debug)]
pub struct Replies {
    batches_max: usize,
    state: Mutex<State>,
    out: Notify,
    room: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<BatchReply>,
    unanswered: usize,
    ended: bool,
}

impl Replies {
    /// None yet; at most `batches_max` batches are unanswered or their replies unread.
    pub fn new(batches_max: usize) -> Self {
        Replies { batches_max, state: Mutex::default(), out: Notify::new(), room: Notify::new() }
    }

    /// A batch was read.
    pub fn expect(&self) {
        self.lock().unanswered += 1;
    }

    /// Its reply.
    pub fn answer(&self, reply: BatchReply) {
        self.lock().waiting.push(reply);
        self.out.notify_one();
    }

    /// The stream of requests ended.
    pub fn end(&self) {
        self.lock().ended = true;
        self.out.notify_one();
    }

    /// Waits until another batch may be read. Safe to cancel.
    pub async fn has_room(&self) {
        while self.lock().unanswered >= self.batches_max {
            self.room.notified().await;
        }
    }

    /// All replies there are; `None` when the requests ended and all are answered. Safe to cancel.
    pub async fn next(&self) -> Option<SubmitReply> {
        loop {
            {
                let mut state = self.lock();
                if !state.waiting.is_empty() {
                    let replies = std::mem::take(&mut state.waiting);
                    state.unanswered = state.unanswered.saturating_sub(replies.len());
                    drop(state);
                    self.room.notify_one();
                    return Some(SubmitReply { replies });
                }
                if state.ended && state.unanswered == 0 {
                    return None;
                }
            }
            self.out.notified().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
