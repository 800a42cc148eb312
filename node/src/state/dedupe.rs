//! Which operations were answered, and how: the same operation again is answered as it was first.
//!
//! Owns the index of operation ids, resident in memory and rebuilt from its rows (one per second of shard time, only
//! appended to). An operation is known from its answer until its first try is older than the dedupe window; before that time
//! its id is looked up, after it the *floor* refuses it, so it is never done twice, also when the window is changed. An id
//! that `Resolve` barred is known like any other. One that was refused because its first try lies ahead stands at the second of
//! its first try instead: there it is known as long as it could be in time. What lies ahead by more than the window is refused
//! and not remembered: nobody tries for so long.
//!
//! A `Resolve` must carry the first-try time of the operation it asks about: only then does "too old" mean that nothing is
//! known of it any more, rather than that it was never done.

use std::collections::{BTreeMap, HashMap};

use bytes::BytesMut;
use martlet_proto::cluster::queue::{Accepted, Answer, Refusal, Resolved, answer::Kind};

use super::{
    StateError,
    draft::{Draft, refused},
    rows::{Rows, Write},
};
pub(super) use crate::store::key::dedupe::OperationId;
use crate::store::key::{Family, dedupe as key};

/// A first try may lie this far ahead of shard time: a gateway's clock runs on from the last it heard.
const AHEAD_MAX_MS: u64 = 1000;

/// Seconds forgotten by one entry at most, so that an entry after a long silence stays short.
const FORGET_SECONDS_MAX: usize = 16;

/// Seconds read at a time when the index is rebuilt.
const PAGE_ROWS: usize = 16;

/// What is known of an operation.
#[derive(Debug, Clone, PartialEq)]
enum Known {
    /// The commonest answer, in no memory of its own.
    Accepted,
    Answered(Box<Answer>),
    Barred,
}

impl Known {
    fn from_answer(answer: Option<&Answer>) -> Self {
        match answer {
            None => Self::Barred,
            Some(Answer { kind: Some(Kind::Accepted(Accepted { canonical: None })) }) => Self::Accepted,
            Some(answer) => Self::Answered(Box::new(answer.clone())),
        }
    }

    /// What the operation was answered; nothing when its id is barred.
    fn answer(&self) -> Option<Answer> {
        match self {
            Self::Accepted => Some(Answer { kind: Some(Kind::Accepted(Accepted { canonical: None })) }),
            Self::Answered(answer) => Some((**answer).clone()),
            Self::Barred => None,
        }
    }
}

/// All operations known before an entry.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Dedupe {
    known: HashMap<OperationId, Known>,
    seconds: BTreeMap<u64, Vec<OperationId>>,
}

/// Operations answered by the entry at hand.
#[derive(Debug, Default)]
pub(super) struct Fresh {
    known: HashMap<OperationId, Known>,
    seconds: BTreeMap<u64, FreshSecond>,
}

/// What comes to the row of one second.
#[derive(Debug, Default)]
struct FreshSecond {
    order: Vec<OperationId>,
    tail: BytesMut,
}

impl Dedupe {
    /// Rebuilds the index.
    pub(super) fn load(rows: &dyn Rows) -> Result<Self, StateError> {
        let mut dedupe = Self::default();
        let (from, to) = Family::Dedupe.range();
        let mut from = from.to_vec();
        loop {
            let page = rows.scan(&from, &to, PAGE_ROWS)?;
            let Some((last, _)) = page.last() else { return Ok(dedupe) };
            from = [last, &[0][..]].concat();
            for (key, value) in page {
                let second = key::decode_key(&key).ok_or(StateError::Broken("a dedupe key is misshapen"))?;
                for (id, answer) in key::decode(&key, value)? {
                    dedupe.learn(second, id, Known::from_answer(answer.as_ref()));
                }
            }
        }
    }

    /// How many operations are known.
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// Takes over what an entry answered and forgets what lies below the floor; adds the writes for both.
    pub(super) fn take_over(&mut self, fresh: Fresh, now_ms: u64, floor_ms: u64, writes: &mut Vec<Write>) {
        let Fresh { mut known, seconds } = fresh;
        for (second, FreshSecond { order, tail }) in seconds {
            for id in order {
                let known = known.remove(&id).expect("an id is ordered when it is known");
                self.learn(second, id, known);
            }
            writes.push(Write::Append { key: key::key(second), tail: tail.freeze() });
        }
        let second = now_ms / 1000;
        for _ in 0..FORGET_SECONDS_MAX {
            let Some(oldest) = self.seconds.first_entry() else { break };
            if *oldest.key() == second || last_try_ms(*oldest.key()) > floor_ms {
                break;
            }
            let (gone, ids) = oldest.remove_entry();
            for id in ids {
                self.known.remove(&id);
            }
            writes.push(Write::Remove { key: key::key(gone) });
        }
    }

    fn learn(&mut self, second: u64, id: OperationId, known: Known) {
        self.known.insert(id, known);
        self.seconds.entry(second).or_default().push(id);
    }

    fn get<'a>(&'a self, fresh: &'a Fresh, id: &OperationId) -> Option<&'a Known> {
        self.known.get(id).or_else(|| fresh.known.get(id))
    }
}

impl Fresh {
    /// `at_ms` is when it was answered, or first tried if that is later.
    fn learn(&mut self, at_ms: u64, id: OperationId, answer: Option<&Answer>) {
        let FreshSecond { order, tail } = self.seconds.entry(at_ms / 1000).or_default();
        key::append(tail, id, answer);
        order.push(id);
        self.known.insert(id, Known::from_answer(answer));
    }
}

/// The answer of an operation that is not to be done (again); nothing when it is to be done.
pub(super) fn admit(
    dedupe: &Dedupe,
    draft: &mut Draft<'_>,
    id: OperationId,
    first_try_ms: u64,
    window_ms: u64,
) -> Option<Answer> {
    if let Some(known) = dedupe.get(&draft.answered, &id) {
        return Some(known.answer().unwrap_or_else(|| refused(Refusal::ExpiredOperation)));
    }
    match timely(draft, first_try_ms, window_ms) {
        Timely::Yes => None,
        Timely::Late => Some(refused(Refusal::ExpiredOperation)),
        Timely::Early => {
            // It would be in time later: barred, so that the refusal stays true while any gateway still tries.
            if first_try_ms <= draft.now_ms().saturating_add(window_ms) {
                draft.answered.learn(first_try_ms, id, None);
            }
            Some(refused(Refusal::ExpiredOperation))
        }
    }
}

/// Keeps an answer.
pub(super) fn keep(draft: &mut Draft<'_>, id: OperationId, answer: &Answer) {
    draft.answered.learn(draft.now_ms(), id, Some(answer));
}

/// Answers what an operation was answered, or bars its id.
pub(super) fn resolve(
    dedupe: &Dedupe,
    draft: &mut Draft<'_>,
    id: OperationId,
    first_try_ms: u64,
    window_ms: u64,
) -> Answer {
    let answer = match dedupe.get(&draft.answered, &id) {
        Some(known) => known.answer(),
        None => {
            if !matches!(timely(draft, first_try_ms, window_ms), Timely::Yes) {
                return refused(Refusal::ExpiredOperation);
            }
            draft.answered.learn(draft.now_ms(), id, None);
            None
        }
    };
    Answer { kind: Some(Kind::Resolved(Box::new(Resolved { answer: answer.map(Box::new) }))) }
}

/// When what was answered in this second was first tried, at the latest.
fn last_try_ms(second: u64) -> u64 {
    second.saturating_add(1).saturating_mul(1000).saturating_add(AHEAD_MAX_MS)
}

enum Timely {
    Yes,
    Late,
    Early,
}

/// Judges a first try, and lets the floor rise to what the window says.
fn timely(draft: &mut Draft<'_>, first_try_ms: u64, window_ms: u64) -> Timely {
    let now_ms = draft.now_ms();
    let floor_ms = draft.shard.dedupe_floor_ms.max(now_ms.saturating_sub(window_ms));
    draft.shard.dedupe_floor_ms = floor_ms;
    if first_try_ms < floor_ms {
        Timely::Late
    } else if first_try_ms > now_ms.saturating_add(AHEAD_MAX_MS) {
        Timely::Early
    } else {
        Timely::Yes
    }
}
