//! What to do next with the operations of one shard, until each has an outcome: a value.
//!
//! Owns the rule of unknown outcomes (design.md section 5). An operation that may have been proposed is *doubtful* until an
//! answer names it; the same operation is sent again, which is harmless because its id is known to the shard, and before it is
//! called unavailable its id is resolved: answered as it was, or barred for ever. What cannot be learned in time is `Unknown`,
//! never a definite refusal. Owns no connection and no clock: [`super::client`] carries out the tries.
//!
//! A message with time to live 0 skips the log, so its id is not known: once doubtful it stays unknown and is not repeated.

use std::time::{Duration, Instant};

use martlet_proto::cluster::queue::{
    Answer, Operation, Refusal, Resolve, answer, batch_reply, operation, refused::Reason,
};

/// What became of one operation.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The shard answered, and what it accepted is on a majority of disks.
    Answered(answer::Kind),
    /// Definite: it was not done and will not be done.
    Unavailable,
    /// It may have been done, now or later.
    Unknown,
}

/// How one try at one node ended.
#[derive(Debug)]
pub(crate) enum Tried {
    /// The node answered.
    Reply(batch_reply::Outcome),
    /// Nothing was written to a node.
    NotSent,
    /// Nothing was written, because too much waits already.
    Full,
    /// Written, and no answer came.
    Lost,
}

/// The next move.
#[derive(Debug, PartialEq)]
pub(crate) enum Next {
    /// Send these together to whoever leads.
    Send(Vec<Operation>),
    /// Every operation has its outcome.
    Done(Vec<Outcome>),
}

/// Whether to wait before the next move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pause {
    /// Go on at once.
    None,
    /// Wait a little longer than the last time.
    Backoff,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nature {
    /// Goes through the log under its id.
    Logged,
    /// Skips the log; never repeated once it may have reached a leader.
    NowOrNever,
    /// Changes nothing.
    ReadOnly,
}

#[derive(Debug)]
struct Tracked {
    operation: Operation,
    nature: Nature,
    doubtful: bool,
    /// A definite refusal came after a doubtful try: only resolving ends it.
    resolve: bool,
    outcome: Option<Outcome>,
}

/// Operations of one shard on their way.
#[derive(Debug)]
pub(crate) struct Pursuit {
    operations: Vec<Tracked>,
    /// What was sent last: index, and whether as a Resolve.
    sent: Vec<(usize, bool)>,
    deadline: Instant,
    resolve_from: Instant,
    /// Definite redirects in a row: the first is followed at once.
    hops: u32,
}

impl Pursuit {
    /// `reserve` before `deadline`, doubtful operations are resolved instead of repeated.
    pub(crate) fn new(operations: Vec<Operation>, deadline: Instant, reserve: Duration) -> Self {
        let operations = operations
            .into_iter()
            .map(|operation| Tracked {
                nature: nature(&operation),
                operation,
                doubtful: false,
                resolve: false,
                outcome: None,
            })
            .collect();
        Self {
            operations,
            sent: Vec::new(),
            deadline,
            resolve_from: deadline.checked_sub(reserve).unwrap_or(deadline),
            hops: 0,
        }
    }

    /// Decides the next move. `shard_time_ms` stamps what was never sent; 0 when it is not known.
    ///
    /// `resolve_id` draws the id of a Resolve, which is an operation of its own.
    pub(crate) fn next(
        &mut self,
        now: Instant,
        shard_time_ms: u64,
        mut resolve_id: impl FnMut() -> bytes::Bytes,
    ) -> Next {
        if now >= self.resolve_from {
            self.end_of_tries(now >= self.deadline);
        }
        self.sent.clear();
        let mut batch = Vec::with_capacity(self.operations.len());
        for (index, tracked) in self.operations.iter_mut().enumerate() {
            if tracked.outcome.is_some() {
                continue;
            }
            if tracked.operation.first_try_ms == 0 {
                tracked.operation.first_try_ms = shard_time_ms;
            }
            self.sent.push((index, tracked.resolve));
            batch.push(if tracked.resolve {
                Operation {
                    id: resolve_id(),
                    first_try_ms: tracked.operation.first_try_ms,
                    kind: Some(operation::Kind::Resolve(Resolve { id: tracked.operation.id.clone() })),
                }
            } else {
                tracked.operation.clone()
            });
        }
        if batch.is_empty() {
            let outcome = |tracked: &mut Tracked| tracked.outcome.take().expect("nothing is left to send");
            return Next::Done(self.operations.iter_mut().map(outcome).collect());
        }
        Next::Send(batch)
    }

    /// Takes the end of a try. `shard_time_ms` as in the reply; 0 without one.
    pub(crate) fn tried(&mut self, tried: Tried, shard_time_ms: u64) -> Pause {
        let hops = std::mem::take(&mut self.hops);
        match tried {
            Tried::Reply(batch_reply::Outcome::Answers(answers)) if answers.answers.len() == self.sent.len() => {
                for ((index, resolved), answer) in std::mem::take(&mut self.sent).into_iter().zip(answers.answers) {
                    self.operations[index].answered(answer, resolved);
                }
                // What is left was refused although an earlier try is in doubt: it is resolved next.
                Pause::None
            }
            Tried::Reply(batch_reply::Outcome::Redirect(_)) => {
                self.hops = hops + 1;
                if hops < 2 { Pause::None } else { Pause::Backoff }
            }
            Tried::Reply(batch_reply::Outcome::Refused(refused)) => match refused.reason() {
                Reason::TimeNeeded => {
                    for tracked in self.undecided().filter(|tracked| tracked.operation.first_try_ms == 0) {
                        tracked.operation.first_try_ms = shard_time_ms;
                    }
                    self.hops = hops + 1;
                    if hops < 2 { Pause::None } else { Pause::Backoff }
                }
                Reason::Overloaded => self.refused_for_good(),
                Reason::NoLease | Reason::Draining | Reason::NoReplica | Reason::Unspecified => Pause::Backoff,
            },
            Tried::Full => self.refused_for_good(),
            Tried::NotSent => Pause::Backoff,
            // An answer of another length than the question is a defect of the node; what it did is not known.
            Tried::Reply(batch_reply::Outcome::Unknown(_) | batch_reply::Outcome::Answers(_)) | Tried::Lost => {
                for (index, _) in std::mem::take(&mut self.sent) {
                    self.operations[index].in_doubt();
                }
                Pause::Backoff
            }
        }
    }

    /// How long a try or a pause may take: to where doubtful operations are resolved, then to the deadline.
    pub(crate) fn left(&self, now: Instant) -> Duration {
        let until = if now < self.resolve_from { self.resolve_from } else { self.deadline };
        until.saturating_duration_since(now)
    }

    fn undecided(&mut self) -> impl Iterator<Item = &mut Tracked> {
        self.operations.iter_mut().filter(|tracked| tracked.outcome.is_none())
    }

    fn refused_for_good(&mut self) -> Pause {
        for tracked in self.undecided() {
            if tracked.doubtful {
                tracked.resolve = true;
            } else {
                tracked.outcome = Some(Outcome::Unavailable);
            }
        }
        Pause::Backoff
    }

    fn end_of_tries(&mut self, end: bool) {
        for tracked in self.undecided() {
            if !tracked.doubtful {
                tracked.outcome = Some(Outcome::Unavailable);
            } else if end {
                tracked.outcome = Some(Outcome::Unknown);
            } else {
                tracked.resolve = true;
            }
        }
    }
}

impl Tracked {
    fn answered(&mut self, answer: Answer, resolved: bool) {
        const EXPIRED: answer::Kind = answer::Kind::Refusal(Refusal::ExpiredOperation as i32);
        // A leader says these without a look into the log.
        const DEVICE_RATE: answer::Kind = answer::Kind::Refusal(Refusal::DeviceRateExceeded as i32);
        const TOPICS_RATE: answer::Kind = answer::Kind::Refusal(Refusal::TopicsRateExceeded as i32);
        self.outcome = match (answer.kind, resolved) {
            (Some(answer::Kind::Resolved(resolved)), _) => match resolved.answer.and_then(|first| first.kind) {
                // Barred, or refused as nothing that will ever be done.
                Some(EXPIRED) | None => Some(Outcome::Unavailable),
                Some(kind) => Some(Outcome::Answered(kind)),
            },
            // Too late to ask: it can no longer be done, but it may have been.
            (Some(EXPIRED), true) => Some(Outcome::Unknown),
            (Some(EXPIRED | DEVICE_RATE | TOPICS_RATE), false) if self.doubtful => {
                self.resolve = true;
                None
            }
            (Some(EXPIRED), false) => Some(Outcome::Unavailable),
            (Some(kind), _) => Some(Outcome::Answered(kind)),
            // A newer node's kind of answer: something was done, and it is not known what.
            (None, _) => Some(Outcome::Unknown),
        };
    }

    fn in_doubt(&mut self) {
        match self.nature {
            Nature::Logged => self.doubtful = true,
            Nature::NowOrNever => self.outcome = Some(Outcome::Unknown),
            Nature::ReadOnly => {}
        }
    }
}

fn nature(operation: &Operation) -> Nature {
    match &operation.kind {
        Some(operation::Kind::Enqueue(enqueue)) if enqueue.ttl_secs == 0 => Nature::NowOrNever,
        // A shard knows a fan-out by its publish; a gateway sends none.
        Some(
            operation::Kind::Check(_)
            | operation::Kind::GroupGet(_)
            | operation::Kind::TokenInfo(_)
            | operation::Kind::FanOut(_),
        ) => Nature::ReadOnly,
        Some(
            operation::Kind::Enqueue(_)
            | operation::Kind::Register(_)
            | operation::Kind::Unregister(_)
            | operation::Kind::Subscribe(_)
            | operation::Kind::Unsubscribe(_)
            | operation::Kind::Publish(_)
            | operation::Kind::Recall(_)
            | operation::Kind::Resolve(_)
            | operation::Kind::GroupChange(_),
        )
        | None => Nature::Logged,
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "starting points for arithmetic")]
mod tests {
    use bytes::Bytes;
    use martlet_proto::cluster::queue::{Accepted, Answers, Check, Enqueue, Redirect, Refused, Resolved, Unknown};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn enqueue(id: u8, ttl_secs: u32) -> Operation {
        Operation {
            id: Bytes::from(vec![id; 16]),
            first_try_ms: 0,
            kind: Some(operation::Kind::Enqueue(Enqueue { ttl_secs, ..Enqueue::default() })),
        }
    }

    /// Ten seconds, three of them for resolving.
    fn pursuit(operations: Vec<Operation>, t0: Instant) -> Pursuit {
        Pursuit::new(operations, t0 + 10 * SECOND, 3 * SECOND)
    }

    fn send(pursuit: &mut Pursuit, now: Instant) -> Vec<Operation> {
        match pursuit.next(now, 5_000, || Bytes::from_static(b"resolve id 16 b.")) {
            Next::Send(batch) => batch,
            Next::Done(outcomes) => panic!("done with {outcomes:?}"),
        }
    }

    fn done(pursuit: &mut Pursuit, now: Instant) -> Vec<Outcome> {
        match pursuit.next(now, 5_000, Bytes::new) {
            Next::Done(outcomes) => outcomes,
            Next::Send(batch) => panic!("sends {batch:?}"),
        }
    }

    fn answers(kinds: impl IntoIterator<Item = answer::Kind>) -> Tried {
        let answers = kinds.into_iter().map(|kind| Answer { kind: Some(kind) }).collect();
        Tried::Reply(batch_reply::Outcome::Answers(Answers { answers }))
    }

    fn refused(reason: Reason) -> Tried {
        Tried::Reply(batch_reply::Outcome::Refused(Refused { reason: reason.into(), detail: String::new() }))
    }

    fn accepted() -> answer::Kind {
        answer::Kind::Accepted(Accepted::default())
    }

    fn expired() -> answer::Kind {
        answer::Kind::Refusal(Refusal::ExpiredOperation.into())
    }

    fn resolved(answer: Option<answer::Kind>) -> answer::Kind {
        answer::Kind::Resolved(Box::new(Resolved { answer: answer.map(|kind| Box::new(Answer { kind: Some(kind) })) }))
    }

    fn resolves(operation: &Operation) -> Option<&[u8]> {
        match &operation.kind {
            Some(operation::Kind::Resolve(resolve)) => Some(&resolve.id),
            _ => None,
        }
    }

    #[test]
    fn an_answer_ends_it() {
        let t0 = Instant::now();
        let mut p = pursuit(vec![enqueue(1, 60), enqueue(2, 60)], t0);
        assert_eq!(send(&mut p, t0).len(), 2);
        let refusal = answer::Kind::Refusal(Refusal::NotRegistered.into());
        p.tried(answers([accepted(), refusal.clone()]), 5_000);
        assert_eq!(done(&mut p, t0), [Outcome::Answered(accepted()), Outcome::Answered(refusal)]);
    }

    #[test]
    fn time_needed_sends_again_at_once_with_the_shards_time() {
        let t0 = Instant::now();
        let mut p = pursuit(vec![enqueue(1, 60)], t0);
        let Next::Send(first) = p.next(t0, 0, Bytes::new) else { panic!() };
        assert_eq!(first[0].first_try_ms, 0);
        assert_eq!(p.tried(refused(Reason::TimeNeeded), 7_000), Pause::None);
        assert_eq!(send(&mut p, t0)[0].first_try_ms, 7_000);
    }

    #[test]
    fn the_first_try_keeps_its_time_through_every_repeat() {
        let t0 = Instant::now();
        let mut p = pursuit(vec![enqueue(1, 60)], t0);
        let first = send(&mut p, t0);
        p.tried(Tried::Lost, 0);
        let Next::Send(second) = p.next(t0 + SECOND, 6_000, Bytes::new) else { panic!() };
        assert_eq!(first, second);
    }

    #[test]
    fn a_redirect_is_followed_at_once_but_not_for_ever() {
        let t0 = Instant::now();
        let mut p = pursuit(vec![enqueue(1, 60)], t0);
        let redirect = || Tried::Reply(batch_reply::Outcome::Redirect(Redirect::default()));
        let mut pauses = [Pause::None; 3];
        for pause in &mut pauses {
            send(&mut p, t0);
            *pause = p.tried(redirect(), 0);
        }
        assert_eq!(pauses, [Pause::None, Pause::None, Pause::Backoff]);
    }

    #[test]
    fn what_no_leader_proposed_is_unavailable_at_the_end_of_tries() {
        let t0 = Instant::now();
        let mut p = pursuit(vec![enqueue(1, 60)], t0);
        for tried in [Tried::NotSent, refused(Reason::NoLease), refused(Reason::Draining), refused(Reason::NoReplica)] {
            send(&mut p, t0);
            assert_eq!(p.tried(tried, 0), Pause::Backoff);
        }
        assert_eq!(done(&mut p, t0 + 7 * SECOND), [Outcome::Unavailable]);
    }

    #[test]
    fn an_overloaded_node_refuses_at_once() {
        let t0 = Instant::now();
        for tried in [refused(Reason::Overloaded), Tried::Full] {
            let mut p = pursuit(vec![enqueue(1, 60)], t0);
            send(&mut p, t0);
            p.tried(tried, 0);
            assert_eq!(done(&mut p, t0), [Outcome::Unavailable]);
        }
    }

    #[test]
    fn a_lost_operation_is_repeated_then_resolved_and_unknown_only_at_the_deadline() {
        let t0 = Instant::now();
        let mut p = pursuit(vec![enqueue(1, 60)], t0);
        let first = send(&mut p, t0);
        p.tried(Tried::Lost, 0);
        assert_eq!(send(&mut p, t0 + SECOND), first);
        p.tried(Tried::Reply(batch_reply::Outcome::Unknown(Unknown {})), 0);
        let resolve = send(&mut p, t0 + 7 * SECOND);
        assert_eq!(resolves(&resolve[0]), Some(&first[0].id[..]));
        assert_eq!(resolve[0].first_try_ms, first[0].first_try_ms);
        assert_ne!(resolve[0].id, first[0].id);
        p.tried(Tried::NotSent, 0);
        assert_eq!(done(&mut p, t0 + 10 * SECOND), [Outcome::Unknown]);
    }

    #[test]
    fn a_resolved_answer_counts_as_the_answer_and_a_barred_id_is_unavailable() {
        let t0 = Instant::now();
        let cases = [
            (resolved(Some(accepted())), Outcome::Answered(accepted())),
            (resolved(None), Outcome::Unavailable),
            (resolved(Some(expired())), Outcome::Unavailable),
            (accepted(), Outcome::Answered(accepted())),
            (expired(), Outcome::Unknown),
        ];
        for (answer, outcome) in cases {
            let mut p = pursuit(vec![enqueue(1, 60)], t0);
            send(&mut p, t0);
            p.tried(Tried::Lost, 0);
            assert!(resolves(&send(&mut p, t0 + 8 * SECOND)[0]).is_some());
            p.tried(answers([answer]), 5_000);
            assert_eq!(done(&mut p, t0 + 8 * SECOND), [outcome]);
        }
    }

    #[test]
    fn after_a_lost_try_a_definite_refusal_is_not_believed_before_the_id_is_resolved() {
        let t0 = Instant::now();
        let rates = [Refusal::DeviceRateExceeded, Refusal::TopicsRateExceeded];
        let [device_rate, topics_rate] = rates.map(|rate| answer::Kind::Refusal(rate.into()));
        let refusals = [expired(), device_rate.clone(), topics_rate].map(|kind| answers([kind]));
        for refusal in refusals.into_iter().chain([refused(Reason::Overloaded), Tried::Full]) {
            let mut p = pursuit(vec![enqueue(1, 60)], t0);
            send(&mut p, t0);
            p.tried(Tried::Lost, 0);
            send(&mut p, t0);
            p.tried(refusal, 0);
            assert!(resolves(&send(&mut p, t0)[0]).is_some());
        }
        for (answer, outcome) in
            [(expired(), Outcome::Unavailable), (device_rate.clone(), Outcome::Answered(device_rate))]
        {
            let mut p = pursuit(vec![enqueue(1, 60)], t0);
            send(&mut p, t0);
            p.tried(answers([answer]), 0);
            assert_eq!(done(&mut p, t0), [outcome]);
        }
    }

    #[test]
    fn now_or_never_is_not_repeated_once_in_doubt() {
        let t0 = Instant::now();
        let mut p = pursuit(vec![enqueue(1, 0), enqueue(2, 60)], t0);
        send(&mut p, t0);
        p.tried(refused(Reason::NoLease), 0);
        assert_eq!(send(&mut p, t0).len(), 2);
        p.tried(Tried::Lost, 0);
        assert_eq!(send(&mut p, t0).len(), 1);
        p.tried(answers([accepted()]), 0);
        assert_eq!(done(&mut p, t0), [Outcome::Unknown, Outcome::Answered(accepted())]);
    }

    #[test]
    fn a_lost_check_is_unavailable_because_it_changes_nothing() {
        let t0 = Instant::now();
        let check = Operation { kind: Some(operation::Kind::Check(Check::default())), ..enqueue(1, 0) };
        let mut p = pursuit(vec![check], t0);
        send(&mut p, t0);
        p.tried(Tried::Lost, 0);
        assert_eq!(done(&mut p, t0 + 7 * SECOND), [Outcome::Unavailable]);
    }

    #[test]
    fn answers_of_another_number_leave_everything_in_doubt() {
        let t0 = Instant::now();
        let mut p = pursuit(vec![enqueue(1, 60)], t0);
        send(&mut p, t0);
        p.tried(answers([accepted(), accepted()]), 0);
        assert!(resolves(&send(&mut p, t0 + 8 * SECOND)[0]).is_some());
    }
}
