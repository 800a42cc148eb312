//! Replies of one submit stream, on their way out.
//!
//! Owns how many batches of the stream are unanswered: the reader waits while there are too many, so a stream that is not read is
//! bounded by its own requests.

use std::sync::{Mutex, MutexGuard, PoisonError};

use martlet_proto::cluster::queue::{Answer, BatchReply, SubmitReply, answer, batch_reply::Outcome};
use prost::Message as _;
use tokio::sync::Notify;

/// Answers that go out in one message, about: a batch more, which has at most 4,096, and it stays below
/// [`martlet_proto::limits::GRPC_MESSAGE_MAX_BYTES`], since none is larger than 100 bytes; a group counts as so many, and a batch reads
/// few.
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

/// As how many answers one counts.
fn weight(answer: &Answer) -> usize {
    match &answer.kind {
        Some(answer::Kind::Group(group)) => 1 + group.encoded_len() / 100,
        // Bounded by the batch that asked.
        Some(answer::Kind::TokenInfo(known)) => 1 + known.encoded_len() / 100,
        _ => 1,
    }
}

/// How many of these go out together; at least one.
fn fitting(waiting: &[BatchReply]) -> usize {
    let mut answers = 0;
    let goes_along = |reply: &&BatchReply| {
        let before = answers;
        if let Some(Outcome::Answers(found)) = &reply.outcome {
            answers += found.answers.iter().map(weight).sum::<usize>();
        }
        before < ANSWERS_AT_ONCE
    };
    waiting.iter().take(REPLIES_AT_ONCE).take_while(goes_along).count()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use martlet_proto::{
        cluster::queue::{Accepted, Answers, Group, GroupMember, Registered, RegistrationRef, Resolved},
        limits::{BATCH_OPERATIONS_MAX, GROUP_NAME_MAX_BYTES, GRPC_MESSAGE_MAX_BYTES, MULTICAST_MAX},
    };
    use prost::Message as _;

    use super::*;
    use crate::shard::propose::GROUPS_AT_ONCE;

    /// The largest that a shard gives: what a resolved registration was answered.
    fn largest() -> Answer {
        let registration =
            RegistrationRef { registration_id: Bytes::from(vec![7; 16]), token_key_id: u32::MAX, iid: "i".repeat(22) };
        let registered = Registered { registration: Some(registration.clone()), created: true };
        let accepted = Accepted { canonical: Some(registration) };
        let inner = [answer::Kind::Registered(registered), answer::Kind::Accepted(accepted)];
        let resolved = inner.map(|kind| Resolved { answer: Some(Box::new(Answer { kind: Some(kind) })) });
        let answers = resolved.map(|resolved| Answer { kind: Some(answer::Kind::Resolved(Box::new(resolved))) });
        answers.into_iter().max_by_key(prost::Message::encoded_len).unwrap()
    }

    #[tokio::test]
    async fn the_largest_groups_go_out_in_messages_that_can_be_taken() {
        let member = GroupMember {
            device_tag: u64::MAX,
            registration_id: Bytes::from(vec![7; 16]),
            token_key_id: u32::MAX,
            iid: "i".repeat(22),
        };
        let group = Group {
            key_bits: u64::MAX,
            token_key_id: u32::MAX,
            name: "n".repeat(GROUP_NAME_MAX_BYTES),
            created_ms: u64::MAX,
            members: vec![member; MULTICAST_MAX],
        };
        let answers = vec![Answer { kind: Some(answer::Kind::Group(group)) }; GROUPS_AT_ONCE];
        let replies = Replies::new(usize::MAX);
        for call in 0..20 {
            replies.expect();
            let outcome = Some(Outcome::Answers(Answers { answers: answers.clone() }));
            replies.answer(BatchReply { call, shard: 255, shard_time_ms: u64::MAX, outcome });
        }
        replies.end();
        let mut count = 0;
        while let Some(reply) = replies.next().await {
            assert!(reply.encoded_len() < GRPC_MESSAGE_MAX_BYTES, "{} bytes", reply.encoded_len());
            count += reply.replies.len();
        }
        assert_eq!(count, 20);
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
