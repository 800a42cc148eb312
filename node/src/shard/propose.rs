//! From a batch to its answers: admitted, packed, stamped, proposed, answered.
//!
//! Owns what is definite. A batch that is refused or redirected was not proposed; once it is, its outcome is its answers or
//! `Unknown`. The invariant: every batch taken is answered exactly once, and every acknowledgement too.

use std::{collections::BTreeMap, sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use martlet_proto::{
    cluster::{
        command::{Acks, Command, DeviceAck, Entry, Expire, FanStep, PublishesDone, Raise, Seen, Stamped, command},
        queue::{
            AckRefused, Acked, Answer, Answers, Batch, BatchReply, FanOut, FannedOut, GroupGet, Message, Operation,
            Redirect, Refused, Unknown, answer, batch_reply::Outcome, control_reply, operation, refused::Reason,
        },
    },
    limits::{BATCH_BYTES_MAX, BATCH_OPERATIONS_MAX},
    tag::DeviceTag,
};
use prometheus_client::metrics::gauge::Gauge;
use prost::Message as _;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{
    lead::Lead,
    pack::{Full, Pack},
    replies::Replies,
};
use crate::{
    delivery::link::{Link, LinkId},
    metrics::{AnswerKind, AnswerLabel, Mark, MarkLabel, RefusalLabel, RefusalReason},
    raft::{ProposeError, Reply},
};

/// Groups that one batch may read: its answers must fit one message. A gateway reads one for each request.
pub(super) const GROUPS_AT_ONCE: usize = 16;
/// Longest that the outcomes of what is proposed are waited for at the end: without a quorum they never come.
const OUTCOMES_MAX: Duration = Duration::from_secs(5);

/// Bytes of topics in the answers to one batch about tokens: a message of gRPC holds what is asked of all of them.
const TOPICS_BYTES_MAX: usize = 512 << 10;

/// A batch that waits for its answers.
#[derive(Debug)]
pub(crate) struct Pending {
    call: u64,
    /// One for each operation of the batch; those that are not logged have theirs.
    answers: Vec<Option<Answer>>,
    /// Which operations of the batch are logged, in order.
    places: Vec<usize>,
    operations: Vec<Operation>,
    replies: Arc<Replies>,
}

/// An acknowledgement that waits to be applied.
#[derive(Debug)]
pub(crate) struct PendingAck {
    link: Arc<Link>,
    ack: u64,
    device: DeviceAck,
}

/// A proposal under way.
type Flight = BoxFuture<'static, Landed>;

/// What became of a proposal.
struct Landed {
    bytes: usize,
    raised: bool,
    /// Whether it held a step of a fan-out.
    stepped: bool,
    /// Whether what it did may have left a fan-out or a publish to go on with.
    leaves: Leaves,
    acks: Vec<(Arc<Link>, u64)>,
    batches: Vec<(Pending, usize)>,
    outcome: Result<Reply, ProposeError>,
    /// Held until the answers are given.
    _unanswered: Option<Unanswered>,
}

/// What an entry leaves to do, once it is applied.
#[derive(Debug, Clone, Copy, Default)]
struct Leaves {
    fan_out: bool,
    publish: bool,
}

/// Counts a proposal with operations of gateways while it has no answer, whatever becomes of it.
struct Unanswered(Gauge);

impl Unanswered {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What can be answered without the log.
struct Sorted {
    pending: Pending,
    bytes: usize,
    now_or_never: Vec<(DeviceTag, Message)>,
}

impl Lead {
    /// Takes a batch of a gateway. It is answered on `replies`, once.
    pub(crate) fn submit(&self, batch: Batch, replies: Arc<Replies>) {
        let call = batch.call;
        if let Err(outcome) = self.admit(batch, &replies) {
            self.answer(&replies, call, outcome);
        }
    }

    /// Takes an acknowledgement. Answered on the link.
    pub(crate) fn ack(&self, link: Arc<Link>, ack: u64, device: DeviceAck) {
        if !self.leadership().is_leader {
            let redirect = Some(self.redirect());
            link.reply(control_reply::Kind::AckRefused(AckRefused { ack, redirect }));
            return;
        }
        self.metrics.acks.inc();
        let bytes = device.encoded_len();
        let taken = self.packer().ack(PendingAck { link, ack, device }, bytes, self.clock.now());
        match taken {
            Ok(()) => self.wake.notify_one(),
            Err(Full(refused)) => self.refuse_acks([(refused.link, refused.ack)]),
        }
    }

    fn admit(&self, batch: Batch, replies: &Arc<Replies>) -> Result<(), Outcome> {
        let refused =
            |reason: Reason, detail: &str| Outcome::Refused(Refused { reason: reason.into(), detail: detail.into() });
        if self.draining.is_cancelled() {
            return Err(refused(Reason::Draining, "the node drains"));
        }
        self.may_propose()?;
        if batch.operations.len() > BATCH_OPERATIONS_MAX || batch.encoded_len() > BATCH_BYTES_MAX {
            return Err(refused(Reason::Overloaded, "the batch is too large for one entry; send it in parts"));
        }
        if batch.operations.iter().filter(|operation| is_group_get(operation)).count() > GROUPS_AT_ONCE {
            return Err(refused(Reason::Overloaded, "the batch reads too many groups; send it in parts"));
        }
        if batch.operations.iter().any(|operation| has_first_try(operation) && operation.first_try_ms == 0) {
            return Err(refused(Reason::TimeNeeded, ""));
        }
        if let Some(mark) = (self.overload)()
            && batch.operations.iter().any(|operation| adds(operation, mark))
        {
            self.metrics.overloads.get_or_create(&MarkLabel { mark }).inc();
            let short = match mark {
                Mark::Memory => "the store's memory is used up",
                Mark::Disk => "the disk is down to its reserve",
                Mark::Log | Mark::Uncommitted => "the log is longer than its bound",
            };
            return Err(refused(Reason::Overloaded, short));
        }
        let Some(now_ms) = self.replica.time_ms() else {
            return Err(refused(Reason::NoLease, "leads since this moment"));
        };
        let sorted = self
            .sort(batch, now_ms, replies)
            .map_err(|error| refused(Reason::NoReplica, &format!("rows cannot be read: {error}")))?;
        let Sorted { pending, bytes, now_or_never } = sorted;
        if pending.operations.is_empty() {
            self.answer(replies, pending.call, answers(pending.answers));
        } else {
            let commands = pending.operations.len();
            let pushed = self.packer().push(pending, bytes, commands);
            pushed.map_err(|_| {
                self.metrics.overloads.get_or_create(&MarkLabel { mark: Mark::Uncommitted }).inc();
                refused(Reason::Overloaded, "too much is proposed and not applied")
            })?;
            self.wake.notify_one();
        }
        let dies = self.clock.now() + self.settings.now_or_never;
        for (device, message) in now_or_never {
            self.replica.desk().now_or_never(device, message, dies);
        }
        Ok(())
    }

    /// A device group as this replica knows it, if it leads at this moment; why not otherwise.
    pub(crate) fn group(&self, get: &GroupGet) -> Result<Answer, String> {
        let shard = self.replica.shard;
        self.may_propose().map_err(|_| format!("shard {shard} is not led here at this moment"))?;
        self.replica.group(get).map_err(|error| format!("rows of shard {shard} cannot be read: {error}"))
    }

    /// Whether this replica may propose at this moment.
    fn may_propose(&self) -> Result<(), Outcome> {
        let leadership = self.leadership();
        if !leadership.is_leader {
            return Err(Outcome::Redirect(self.redirect()));
        }
        let no_lease =
            |detail: &str| Outcome::Refused(Refused { reason: Reason::NoLease.into(), detail: detail.into() });
        if !leadership.first_applied {
            return Err(no_lease("has not applied its first entry"));
        }
        if !self.group.lease_valid() {
            return Err(no_lease("no quorum answered lately"));
        }
        Ok(())
    }

    /// Answers what is not logged and puts the rest together.
    fn sort(&self, batch: Batch, now_ms: u64, replies: &Arc<Replies>) -> Result<Sorted, crate::state::StateError> {
        let mut pending = Pending {
            call: batch.call,
            answers: Vec::with_capacity(batch.operations.len()),
            places: vec![],
            operations: vec![],
            replies: Arc::clone(replies),
        };
        let (mut bytes, mut now_or_never, mut topics_room) = (0, vec![], TOPICS_BYTES_MAX);
        for (place, operation) in batch.operations.into_iter().enumerate() {
            let answer = match &operation.kind {
                Some(operation::Kind::Check(check)) => Some(self.replica.check(check)?),
                Some(operation::Kind::GroupGet(get)) => Some(self.replica.group(get)?),
                Some(operation::Kind::TokenInfo(info)) => {
                    let answer = self.replica.token_info(info, topics_room)?;
                    topics_room = topics_room.saturating_sub(answer.encoded_len());
                    Some(answer)
                }
                // Whoever subscribed before it was published is known here: this leader has all that was acknowledged.
                Some(operation::Kind::FanOut(FanOut { publish: Some(publish), .. }))
                    if !self.replica.has_audience(publish)? =>
                {
                    Some(Answer { kind: Some(answer::Kind::FannedOut(FannedOut {})) })
                }
                Some(operation::Kind::Enqueue(enqueue)) if enqueue.ttl_secs == 0 => {
                    let (answer, message) = self.replica.compose(&operation.id, enqueue, now_ms)?;
                    now_or_never.extend(message.map(|message| (DeviceTag(enqueue.device_tag), message)));
                    Some(answer)
                }
                _ => self.too_often(&operation)?,
            };
            if answer.is_none() {
                bytes += operation.encoded_len();
                pending.places.push(place);
                pending.operations.push(operation);
            }
            pending.answers.push(answer);
        }
        Ok(Sorted { pending, bytes, now_or_never })
    }

    /// Proposes what waits until `end` fires. Owned by [`super::shards::Shards`].
    pub(crate) async fn propose_all(self: Arc<Self>, end: CancellationToken) {
        let mut flights: FuturesUnordered<Flight> = FuturesUnordered::new();
        loop {
            let deadline = loop {
                let now = self.clock.now();
                let (pack, deadline) = {
                    let mut packer = self.packer();
                    (packer.next(now), packer.deadline())
                };
                let Some(pack) = pack else { break deadline.map(|due| due.saturating_duration_since(now)) };
                let (bytes, raises, steps) = (pack.bytes, pack.raise.is_some(), pack.fan_step);
                match self.propose(pack) {
                    // Polled before the next one begins: that is what gives entries their order.
                    Some(mut flight) => match futures::poll!(flight.as_mut()) {
                        Poll::Ready(landed) => self.landed(landed),
                        Poll::Pending => flights.push(flight),
                    },
                    None => self.ended(bytes, raises, steps),
                }
            };
            tokio::select! {
                Some(landed) = flights.next(), if !flights.is_empty() => self.landed(landed),
                () = self.wake.notified() => {}
                () = sleep(deadline.unwrap_or_default()), if deadline.is_some() => {}
                () = end.cancelled() => break,
            }
        }
        self.give_up();
        // Proposed already: their outcome is told if it comes in time.
        let rest = async {
            while let Some(landed) = flights.next().await {
                self.landed(landed);
            }
        };
        let told_in_time = timeout(OUTCOMES_MAX, rest).await.is_ok();
        if !told_in_time {
            let (shard, proposals) = (self.replica.shard.0, flights.len());
            tracing::warn!(shard, proposals, "what became of proposals is not waited for any longer: no quorum");
            self.outcomes_given_up.cancel();
            while let Some(landed) = flights.next().await {
                self.landed(landed);
            }
        }
    }

    /// What was not proposed is refused: this replica leads no more.
    pub(crate) fn give_up(&self) {
        let (batches, acks) = self.packer().give_up();
        for pending in batches {
            self.answer(&pending.replies, pending.call, Outcome::Redirect(self.redirect()));
        }
        self.refuse_acks(acks.into_iter().map(|ack| (ack.link, ack.ack)));
    }

    /// Stamps and proposes; `None` when it may not, and everything in it is answered.
    fn propose(&self, pack: Pack<Pending, PendingAck>) -> Option<Flight> {
        let Pack { raise, acks, seen, done, fan_step, expire, batches, bytes } = pack;
        // A lease that ended while they waited still lets the answer be definite.
        let allowed =
            self.may_propose().and_then(|()| self.replica.time_ms().ok_or_else(|| Outcome::Redirect(self.redirect())));
        let now_ms = match allowed {
            Ok(now_ms) => now_ms,
            Err(outcome) => {
                for pending in batches {
                    self.answer(&pending.replies, pending.call, outcome.clone());
                }
                self.refuse_acks(acks.into_iter().map(|ack| (ack.link, ack.ack)));
                return None;
            }
        };
        let raise = raise.map(|version| Command { kind: Some(command::Kind::Raise(Raise { version })) });
        let raised = raise.is_some();
        let mut commands: Vec<Command> = raise.into_iter().collect();
        let (mut tickets, mut device_acks) = (vec![], vec![]);
        for PendingAck { link, ack, device } in acks {
            tickets.push((link, ack));
            device_acks.push(device);
        }
        if !device_acks.is_empty() {
            commands.push(Command { kind: Some(command::Kind::Acks(Acks { acks: device_acks })) });
        }
        for (device, day) in seen {
            commands.push(Command { kind: Some(command::Kind::Seen(Seen { device_tag: device.0, day })) });
        }
        if expire {
            let expire = Expire { upto_ms: now_ms, rows_max: self.settings.expire_rows_max };
            commands.push(Command { kind: Some(command::Kind::Expire(expire)) });
        }
        if !done.is_empty() {
            let places = done.iter().map(|place| Bytes::copy_from_slice(&place.to_bytes())).collect();
            commands.push(Command { kind: Some(command::Kind::PublishesDone(PublishesDone { places })) });
        }
        if fan_step {
            commands.push(Command { kind: Some(command::Kind::FanStep(FanStep { limits: Some(self.limits) })) });
        }
        let mut landing = vec![];
        let mut leaves = Leaves { fan_out: fan_step, publish: false };
        for mut pending in batches {
            let operations = std::mem::take(&mut pending.operations);
            for operation in &operations {
                leaves.fan_out |= matches!(operation.kind, Some(operation::Kind::FanOut(_)));
                leaves.publish |= matches!(operation.kind, Some(operation::Kind::Publish(_)));
            }
            landing.push((pending, commands.len()));
            self.stamp(operations, &mut commands);
        }
        let entry = Entry { shard_time_ms: now_ms, commands, term: 0 };
        self.metrics.proposals.inc();
        let unanswered = (!landing.is_empty()).then(|| Unanswered::new(&self.metrics.proposals_unanswered));
        let (proposal, given_up) = (self.group.propose(entry.encode_to_vec().into()), self.outcomes_given_up.clone());
        let proposal = async move {
            tokio::select! {
                biased;
                outcome = proposal => outcome,
                () = given_up.cancelled() => Err(ProposeError::Unknown),
            }
        };
        let landed = move |outcome| Landed {
            bytes,
            raised,
            stepped: fan_step,
            leaves,
            acks: tickets,
            batches: landing,
            outcome,
            _unanswered: unanswered,
        };
        Some(proposal.map(landed).boxed())
    }

    fn stamp(&self, operations: Vec<Operation>, commands: &mut Vec<Command>) {
        let device = |operation: &Operation| match &operation.kind {
            Some(operation::Kind::Enqueue(enqueue)) => DeviceTag(enqueue.device_tag),
            _ => DeviceTag(0),
        };
        let written = self.replica.desk().written_through(operations.iter().map(device));
        for (operation, written) in operations.into_iter().zip(written) {
            let written = written.filter(|_| is_enqueue(&operation));
            let stamped = Stamped {
                operation: Some(operation),
                written_through: written.map(|w| w.to_bytes().to_vec().into()).unwrap_or_default(),
                limits: Some(self.limits),
            };
            commands.push(Command { kind: Some(command::Kind::Stamped(stamped)) });
        }
    }

    fn ended(&self, bytes: usize, raised: bool, stepped: bool) {
        let mut packer = self.packer();
        packer.ended(bytes);
        if raised {
            packer.raise_ended();
        }
        if stepped {
            packer.fan_step_ended();
        }
    }

    fn landed(&self, landed: Landed) {
        let Landed { bytes, raised, stepped, leaves, acks, batches, outcome, _unanswered } = landed;
        self.ended(bytes, raised, stepped);
        if outcome.is_ok() && leaves.fan_out {
            self.look_for_fan_out();
        }
        if outcome.is_ok() && leaves.publish {
            self.published.notify_one();
        }
        let applied = match outcome {
            Ok(Reply::Shard(answers)) => Ok(answers),
            Ok(Reply::Meta(_) | Reply::None) => Err(Outcome::Unknown(Unknown {})),
            // Never appended. A leader that lost its place with the entry in its log says `Unknown`.
            Err(ProposeError::NotLeader { .. }) => Err(Outcome::Redirect(self.redirect())),
            Err(ProposeError::Unknown | ProposeError::Stopped(_)) => Err(Outcome::Unknown(Unknown {})),
        };
        match applied {
            Ok(mut found) => {
                self.acked(acks);
                for (mut pending, first) in batches {
                    for (nth, place) in pending.places.iter().enumerate() {
                        pending.answers[*place] = found.get_mut(first + nth).and_then(Option::take);
                    }
                    self.answer(&pending.replies, pending.call, answers(pending.answers));
                }
            }
            Err(outcome) => {
                self.refuse_acks(acks);
                for (pending, _) in batches {
                    self.answer(&pending.replies, pending.call, outcome.clone());
                }
            }
        }
    }

    fn acked(&self, acks: Vec<(Arc<Link>, u64)>) {
        let mut by_link: BTreeMap<LinkId, (Arc<Link>, Vec<u64>)> = BTreeMap::new();
        for (link, ack) in acks {
            by_link.entry(link.id()).or_insert_with(|| (link, vec![])).1.push(ack);
        }
        for (link, acks) in by_link.into_values() {
            link.reply(control_reply::Kind::Acked(Acked { acks }));
        }
    }

    fn refuse_acks(&self, acks: impl IntoIterator<Item = (Arc<Link>, u64)>) {
        for (link, ack) in acks {
            let redirect = Some(self.redirect());
            link.reply(control_reply::Kind::AckRefused(AckRefused { ack, redirect }));
        }
    }

    fn answer(&self, replies: &Replies, call: u64, outcome: Outcome) {
        self.count(&outcome);
        let shard_time_ms = self.replica.time_ms().unwrap_or(0);
        let shard = u32::from(self.replica.shard.0);
        replies.answer(BatchReply { call, shard, shard_time_ms, outcome: Some(outcome) });
    }

    /// Where the leader is, as this replica knows it.
    pub(crate) fn redirect(&self) -> Redirect {
        let (shard, leadership) = (self.replica.shard, self.leadership());
        let leader_node = leadership.leader.and_then(|replica| self.directory.node_of(shard, replica)).unwrap_or(0);
        Redirect { leader_node, term: leadership.term, epoch: self.directory.epoch(shard) }
    }

    fn count(&self, outcome: &Outcome) {
        let refusal = |reason| self.metrics.refusals.get_or_create(&RefusalLabel { reason }).inc();
        match outcome {
            Outcome::Answers(answers) => {
                for answer in &answers.answers {
                    let kind = match answer.kind {
                        Some(answer::Kind::Accepted(_)) => AnswerKind::Accepted,
                        Some(answer::Kind::Registered(_)) => AnswerKind::Registered,
                        Some(answer::Kind::Unregistered(_)) => AnswerKind::Unregistered,
                        Some(answer::Kind::Resolved(_)) => AnswerKind::Resolved,
                        Some(answer::Kind::Group(_)) => AnswerKind::Group,
                        Some(answer::Kind::Subscribed(_)) => AnswerKind::Subscribed,
                        Some(answer::Kind::Published(_)) => AnswerKind::Published,
                        Some(answer::Kind::FannedOut(_)) => AnswerKind::FannedOut,
                        Some(answer::Kind::TokenInfo(_)) => AnswerKind::TokenInfo,
                        Some(answer::Kind::Recalled(_)) => AnswerKind::Recalled,
                        Some(answer::Kind::Refusal(_)) | None => AnswerKind::Refused,
                    };
                    self.metrics.answers.get_or_create(&AnswerLabel { kind }).inc();
                }
            }
            Outcome::Redirect(_) => {
                refusal(RefusalReason::Redirect);
            }
            Outcome::Refused(refused) => {
                refusal(match refused.reason() {
                    Reason::NoLease => RefusalReason::NoLease,
                    Reason::Overloaded => RefusalReason::Overloaded,
                    Reason::Draining => RefusalReason::Draining,
                    Reason::TimeNeeded => RefusalReason::TimeNeeded,
                    Reason::NoReplica | Reason::Unspecified => RefusalReason::NoReplica,
                });
            }
            Outcome::Unknown(_) => {}
        }
    }
}

/// All answers in their order; one that is missing makes the whole outcome unknown.
fn answers(found: Vec<Option<Answer>>) -> Outcome {
    match found.into_iter().collect() {
        Some(answers) => Outcome::Answers(Answers { answers }),
        None => Outcome::Unknown(Unknown {}),
    }
}

/// Whether the log knows it by its id, for a while: it says when it was tried first.
fn has_first_try(operation: &Operation) -> bool {
    match &operation.kind {
        Some(
            operation::Kind::Check(_)
            | operation::Kind::GroupGet(_)
            | operation::Kind::TokenInfo(_)
            | operation::Kind::FanOut(_),
        ) => false,
        Some(operation::Kind::Enqueue(enqueue)) => enqueue.ttl_secs > 0,
        Some(
            operation::Kind::Register(_)
            | operation::Kind::Unregister(_)
            | operation::Kind::Subscribe(_)
            | operation::Kind::Unsubscribe(_)
            | operation::Kind::Publish(_)
            | operation::Kind::Recall(_)
            | operation::Kind::Resolve(_)
            | operation::Kind::GroupChange(_),
        )
        | None => true,
    }
}

/// Whether it makes the node hold more of what is short. A registration or a device that joins a group is small and seldom: only the
/// disk's reserve refuses it.
fn adds(operation: &Operation, mark: Mark) -> bool {
    match &operation.kind {
        Some(operation::Kind::Enqueue(enqueue)) => enqueue.ttl_secs > 0,
        Some(operation::Kind::Publish(_) | operation::Kind::FanOut(_)) => true,
        Some(operation::Kind::Register(_) | operation::Kind::Subscribe(_)) => mark == Mark::Disk,
        Some(operation::Kind::GroupChange(change)) => mark == Mark::Disk && !change.join.is_empty(),
        Some(
            operation::Kind::Check(_)
            | operation::Kind::TokenInfo(_)
            | operation::Kind::Unregister(_)
            | operation::Kind::Unsubscribe(_)
            | operation::Kind::Recall(_)
            | operation::Kind::Resolve(_)
            | operation::Kind::GroupGet(_),
        )
        | None => false,
    }
}

fn is_group_get(operation: &Operation) -> bool {
    matches!(operation.kind, Some(operation::Kind::GroupGet(_)))
}

fn is_enqueue(operation: &Operation) -> bool {
    matches!(operation.kind, Some(operation::Kind::Enqueue(_)))
}
