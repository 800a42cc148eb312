//! Replies of one submit stream, on their way out.
//!
//! Owns how many batches of the stream are unanswered: the reader waits while there are too many, so a stream that is not read is
//! bounded by its own requests.

use std::sync::{Mutex, MutexGuard, PoisonError};

use martlet_proto::cluster::queue::{BatchReply, SubmitReply, batch_reply::Outcome};
use tokio::sync::Notify;

/// Answers that go out in one message, about: a batch more, which has at most 4,096, and it stays below
/// [`martlet_proto::limits::GRPC_MESSAGE_MAX_BYTES`], since none is larger than 100 bytes.
const ANSWERS_AT_ONCE: usize = 8_192;
/// Replies that go out in one message; one without answers may say in words why.
const REPLIES_AT_ONCE: usize = 1_024;

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

    /// All replies there are, as far as they fit one message; `None` when the requests ended and all are answered. Safe to cancel.
    pub async fn next(&self) -> Option<SubmitReply> {
        loop {
            {
                let mut state = self.lock();
                if !state.waiting.is_empty() {
                    let fitting = fitting(&state.waiting);
                    let rest = state.waiting.split_off(fitting);
                    let replies = std::mem::replace(&mut state.waiting, rest);
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

/// How many of these go out together; at least one.
fn fitting(waiting: &[BatchReply]) -> usize {
    let mut answers = 0;
    let goes_along = |reply: &&BatchReply| {
        let before = answers;
        if let Some(Outcome::Answers(found)) = &reply.outcome {
            answers += found.answers.len();
        }
        before < ANSWERS_AT_ONCE
    };
    waiting.iter().take(REPLIES_AT_ONCE).take_while(goes_along).count()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use martlet_proto::{
        cluster::queue::{Accepted, Answer, Answers, Registered, RegistrationRef, Resolved, answer},
        limits::{BATCH_OPERATIONS_MAX, GRPC_MESSAGE_MAX_BYTES},
    };
    use prost::Message;

    use super::*;

    /// The largest that a shard gives: what a resolved registration was answered.
    fn largest() -> Answer {
        let registration =
            RegistrationRef { registration_id: Bytes::from(vec![7; 16]), token_key_id: u32::MAX, iid: "i".repeat(22) };
        let registered = Registered { registration: Some(registration.clone()), created: true };
        let accepted = Accepted { canonical: Some(registration) };
        let inner = [answer::Kind::Registered(registered), answer::Kind::Accepted(accepted)];
        let resolved = inner.map(|kind| Resolved { answer: Some(Box::new(Answer { kind: Some(kind) })) });
        let answers = resolved.map(|resolved| Answer { kind: Some(answer::Kind::Resolved(Box::new(resolved))) });
        answers.into_iter().max_by_key(Message::encoded_len).unwrap()
    }

    #[tokio::test]
    async fn replies_of_any_number_go_out_in_order_in_messages_that_can_be_taken() {
        let replies = Replies::new(usize::MAX);
        let of = |call: u64| match call % 3 {
            // From nothing to as many as a batch may have.
            0 => 0,
            1 => 300,
            _ => BATCH_OPERATIONS_MAX,
        };
        for call in 0..1_500 {
            replies.expect();
            let answers = vec![largest(); of(call)];
            let outcome = Some(Outcome::Answers(Answers { answers }));
            replies.answer(BatchReply { call, shard: 255, shard_time_ms: u64::MAX, outcome });
        }
        replies.end();
        let mut next = 0;
        while let Some(reply) = replies.next().await {
            assert!(reply.encoded_len() < GRPC_MESSAGE_MAX_BYTES, "{} bytes", reply.encoded_len());
            assert!(!reply.replies.is_empty());
            for reply in reply.replies {
                assert_eq!(reply.call, next);
                next += 1;
            }
        }
        assert_eq!(next, 1_500);
    }
}
