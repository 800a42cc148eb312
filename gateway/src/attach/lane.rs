//! One lane as a value: who is attached where, which terms are known, what credit is owed, which acks are unconfirmed.
//!
//! Owns no stream, clock or socket: requests of connections, replies of nodes and the time come in, [`Action`]s go out.
//! `run` carries them out against gRPC; tests drive it with values.
//!
//! Invariants, each with its test: a delivery is placed only if no higher term of its shard is known; every byte of cost
//! taken from a stream is given back exactly once while that stream lives; an attachment is asked for at one node at a time;
//! an ack is kept until a node says it is applied or the connection has ended.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;
use martlet_proto::{
    cluster::queue::{
        self, ControlReply, ControlRequest, DeliverReply, DeliverRequest, attach_refused, control_reply,
        control_request, deliver_reply, deliver_request,
    },
    limits::ACK_IDS_MAX,
    message::{MessageId, Sequence},
    shard::Shard,
    tag::DeviceTag,
};
use rand::{Rng, rngs::StdRng};

use super::{AttachConfig, ShardMap};

/// Deliveries under way to one attachment; a node within its credit never gets near it, since a message costs it far more
/// than `device_credit_bytes` / this.
const QUEUE_MAX: usize = 4_096;

/// Low bits of the number by which nodes know an attachment: which ask it is. What is still under way for an earlier ask, on
/// another stream, thus names an attachment that is no more, and can neither be taken for the new one nor end it.
const ROUND_BITS: u32 = 20;

/// What the driver must do, in this order.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Send on the Control stream to this node.
    Control {
        /// Node id.
        node: u64,
        /// The request.
        request: ControlRequest,
    },
    /// Send on the Deliver stream to this node.
    Deliver {
        /// Node id.
        node: u64,
        /// The request.
        request: DeliverRequest,
    },
    /// Queue this delivery for the connection.
    Place {
        /// Attachment.
        attach: u64,
        /// The delivery.
        delivery: Box<Placed>,
    },
    /// Drop what is queued for the connection and not written: it comes again.
    Clear {
        /// Attachment.
        attach: u64,
    },
    /// Tell the connection.
    Tell {
        /// Attachment.
        attach: u64,
        /// What happened.
        note: Note,
    },
    /// A shard has this term, and this leader if one is known. Deliveries of lower terms are void from here.
    Learned {
        /// Shard.
        shard: Shard,
        /// Node id of the leader.
        node: u64,
        /// Term.
        term: u64,
    },
}

/// What a lane tells a connection, besides deliveries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Note {
    /// The acks it handed over are applied: a majority has them on disk.
    Acked,
    /// A newer connection of the device took over: say Close and end.
    Superseded,
    /// A node sent more than its credit: end, the device comes back.
    Overrun,
}

/// A delivery on its way to one connection.
#[derive(Debug, Clone, PartialEq)]
pub struct Placed {
    /// Shard it comes from.
    pub shard: Shard,
    /// Term of the leader that handed it out.
    pub term: u64,
    /// Place in the mailbox; `None` for a message with TTL 0.
    pub sequence: Option<Sequence>,
    /// Not written after this.
    pub expires: Instant,
    /// What it costs of both credits, bytes.
    pub cost_bytes: u64,
    /// Which ask of the attachment it answers; its credit counts only there.
    pub round: u32,
    /// The message.
    pub message: queue::Message,
}

/// What a device acknowledged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Acks {
    /// Written on this connection.
    pub sequences: Vec<Sequence>,
    /// Named by the device, not known here.
    pub message_ids: Vec<MessageId>,
}

impl Acks {
    /// Nothing is acknowledged.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty() && self.message_ids.is_empty()
    }

    /// Takes the first of them, as many as one request may name.
    fn take_part(&mut self) -> Acks {
        let sequences_len = self.sequences.len().min(ACK_IDS_MAX);
        let rest = Acks {
            sequences: self.sequences.split_off(sequences_len),
            message_ids: self.message_ids.split_off(self.message_ids.len().min(ACK_IDS_MAX - sequences_len)),
        };
        std::mem::replace(self, rest)
    }

    fn request(&self, ack: u64, shard: Shard, tag: DeviceTag) -> ControlRequest {
        let sequences = self.sequences.iter().map(|sequence| Bytes::copy_from_slice(&sequence.to_bytes())).collect();
        let message_ids = self.message_ids.iter().map(|id| Bytes::copy_from_slice(&id.to_bytes())).collect();
        control(control_request::Kind::Ack(queue::Ack {
            ack,
            shard: u32::from(shard.0),
            device_tag: tag.0,
            sequences,
            message_ids,
        }))
    }
}

/// Where an attachment stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stand {
    /// Not wanted (yet, or no longer).
    Idle,
    /// Wanted; no node to ask. Woken by a link or a leader.
    Parked,
    /// Wanted; asked at this time.
    Due(Instant),
    /// Asked, no answer yet; deliveries may already come.
    Asked(u64),
    /// Attached at this node, in this term.
    Attached(u64, u64),
}

/// The number by which nodes know this ask of an attachment.
fn numbered(attach: u64, round: u32) -> u64 {
    (attach << ROUND_BITS) | (u64::from(round) & ((1 << ROUND_BITS) - 1))
}

impl Stand {
    /// The node that knows of the attachment.
    fn node(self) -> Option<u64> {
        match self {
            Self::Asked(node) | Self::Attached(node, _) => Some(node),
            Self::Idle | Self::Parked | Self::Due(_) => None,
        }
    }
}

/// A set of acks is sent in parts, one after the other: a node refuses each time what is larger than all that may wait there.
#[derive(Debug)]
struct PendingAck {
    /// Names the part, so that what is said of an earlier one counts for nothing.
    id: u64,
    part: Acks,
    rest: Acks,
    sent_to: Option<u64>,
    failures: u32,
}

#[derive(Debug)]
struct Entry {
    tag: DeviceTag,
    shard: Shard,
    stand: Stand,
    failures: u32,
    session: Option<queue::Session>,
    written: Option<Sequence>,
    /// Counts asks, so that credit of an earlier ask is not given back to a later one.
    round: u32,
    under_way_bytes: u64,
    under_way_len: usize,
    ack: Option<PendingAck>,
}

#[derive(Debug, Default)]
struct ShardView {
    /// Highest term heard of.
    term: u64,
    /// Who leads in that term, as far as known.
    leader: Option<u64>,
    /// Which replica is tried next while no leader is known.
    turn: usize,
    members: BTreeSet<u64>,
}

#[derive(Debug, Default)]
struct NodeView {
    up: bool,
    /// Stream credit taken back from deliveries and not yet given to the node.
    debt_bytes: u64,
}

#[derive(Debug, Default)]
struct WrittenSum {
    through: Option<Sequence>,
    credit_bytes: u64,
}

/// The value.
#[derive(Debug)]
pub struct Lane {
    config: AttachConfig,
    rng: StdRng,
    map: ShardMap,
    shards: BTreeMap<Shard, ShardView>,
    nodes: BTreeMap<u64, NodeView>,
    entries: HashMap<u64, Entry>,
    by_tag: HashMap<DeviceTag, u64>,
    due: BTreeSet<(Instant, u64)>,
    ack_due: BTreeSet<(Instant, u64)>,
    acks: HashMap<u64, u64>,
    last_ack: u64,
    written: BTreeMap<u64, WrittenSum>,
    actions: VecDeque<Action>,
}

impl Lane {
    /// A lane without attachments and links.
    pub fn new(config: AttachConfig, map: ShardMap, rng: StdRng) -> Self {
        Self {
            config,
            rng,
            map,
            shards: BTreeMap::new(),
            nodes: BTreeMap::new(),
            entries: HashMap::new(),
            by_tag: HashMap::new(),
            due: BTreeSet::new(),
            ack_due: BTreeSet::new(),
            acks: HashMap::new(),
            last_ack: 0,
            written: BTreeMap::new(),
            actions: VecDeque::new(),
        }
    }

    /// What to do next, oldest first.
    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Whether no connection has an attachment.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    // ------------------------------------------------------------------------------------ what connections ask for

    /// A connection of this device exists; acks may be handed over, nothing is delivered yet. `attach` is never used twice.
    pub fn open(&mut self, attach: u64, tag: DeviceTag, shard: Shard) {
        self.shards.entry(shard).or_default().members.insert(attach);
        let entry = Entry {
            tag,
            shard,
            stand: Stand::Idle,
            failures: 0,
            session: None,
            written: None,
            round: 0,
            under_way_bytes: 0,
            under_way_len: 0,
            ack: None,
        };
        self.entries.insert(attach, entry);
    }

    /// The connection wants its queue. An older connection of the same device here is superseded at once.
    pub fn attach(&mut self, attach: u64, now: Instant) {
        let Some(entry) = self.entries.get(&attach) else { return };
        if entry.stand != Stand::Idle {
            return;
        }
        if let Some(older) = self.by_tag.insert(entry.tag, attach) {
            self.supersede(older);
        }
        self.schedule(attach, now + self.config.batch_wait);
    }

    /// The device acknowledged these. At most one ack of an attachment is unconfirmed at a time: the next is handed over
    /// after [`Note::Acked`].
    pub fn ack(&mut self, attach: u64, mut acks: Acks) {
        let Some(entry) = self.entries.get_mut(&attach) else { return };
        self.last_ack += 1;
        let part = acks.take_part();
        let pending = PendingAck { id: self.last_ack, part, rest: acks, sent_to: None, failures: 0 };
        if let Some(replaced) = entry.ack.replace(pending) {
            self.acks.remove(&replaced.id);
        }
        self.acks.insert(self.last_ack, attach);
        self.send_ack(attach);
    }

    /// The connection wrote (or dropped, being a duplicate or past its time) what it was handed: its cost is free again.
    /// `through` is the highest sequence written so far.
    pub fn written(&mut self, attach: u64, round: u32, through: Option<Sequence>, cost_bytes: u64) {
        let Some(entry) = self.entries.get_mut(&attach) else { return };
        entry.written = entry.written.max(through);
        let Some(node) = entry.stand.node().filter(|_| entry.round == round) else { return };
        let back = cost_bytes.min(entry.under_way_bytes);
        entry.under_way_bytes -= back;
        entry.under_way_len = entry.under_way_len.saturating_sub(1);
        let sum = self.written.entry(attach).or_default();
        sum.through = entry.written;
        sum.credit_bytes += back;
        self.owe(node, back);
    }

    /// The connection ends. `last` are acks that no node has been told; they are sent once and not kept.
    pub fn end(&mut self, attach: u64, last: Acks) {
        self.flush();
        let Some(entry) = self.entries.get(&attach) else { return };
        let (shard, tag) = (entry.shard, entry.tag);
        if let Some(node) = self.target(shard) {
            // Parts of the set before that waited for their turn, and those.
            let rest = self.entries.get_mut(&attach).and_then(|entry| entry.ack.as_mut());
            let rest = rest.map(|pending| std::mem::take(&mut pending.rest)).unwrap_or_default();
            for mut acks in [rest, last] {
                while !acks.is_empty() {
                    self.last_ack += 1;
                    let request = acks.take_part().request(self.last_ack, shard, tag);
                    self.actions.push_back(Action::Control { node, request });
                }
            }
        }
        self.detach(attach);
        if self.by_tag.get(&tag) == Some(&attach) {
            self.by_tag.remove(&tag);
        }
        if let Some(view) = self.shards.get_mut(&shard) {
            view.members.remove(&attach);
        }
        if let Some(pending) = self.entries.remove(&attach).and_then(|entry| entry.ack) {
            self.acks.remove(&pending.id);
        }
    }

    // ------------------------------------------------------------------------------------------ what the cluster says

    /// A newer shard map. Its count never changes.
    pub fn map(&mut self, map: ShardMap, now: Instant) {
        self.map = map;
        self.wake_all(now);
    }

    /// Both streams to a node are open.
    pub fn link_up(&mut self, node: u64, now: Instant) {
        self.nodes.insert(node, NodeView { up: true, debt_bytes: 0 });
        self.wake_all(now);
    }

    /// The streams to a node are lost: what was attached there attaches elsewhere.
    pub fn link_down(&mut self, node: u64, now: Instant) {
        self.nodes.insert(node, NodeView::default());
        let mut lost = Vec::new();
        for view in self.shards.values_mut() {
            if view.leader == Some(node) {
                view.leader = None;
                view.turn += 1;
            }
            let mut members = Vec::new();
            for attach in &view.members {
                let Some(entry) = self.entries.get_mut(attach) else { continue };
                if let Some(pending) = entry.ack.as_mut().filter(|pending| pending.sent_to == Some(node)) {
                    pending.sent_to = None;
                }
                if entry.stand.node() == Some(node) {
                    members.push(*attach);
                }
            }
            lost.push(members);
        }
        for members in &lost {
            for attach in members {
                self.clear(*attach);
            }
            self.schedule_spread(members, now);
        }
        self.wake_all(now);
    }

    /// A reply on the Control stream of a node.
    pub fn control(&mut self, node: u64, reply: ControlReply, now: Instant) {
        match reply.kind {
            Some(control_reply::Kind::Attached(attached)) => self.attached(node, attached, now),
            Some(control_reply::Kind::AttachRefused(refused)) => self.attach_refused(node, refused, now),
            Some(control_reply::Kind::Superseded(superseded)) => self.superseded(node, superseded.attach),
            Some(control_reply::Kind::Acked(acked)) => {
                for ack in acked.acks {
                    self.acked(ack);
                }
            }
            Some(control_reply::Kind::AckRefused(refused)) => self.ack_refused(node, refused, now),
            None => {}
        }
    }

    /// A reply on the Deliver stream of a node.
    pub fn deliver(&mut self, node: u64, reply: DeliverReply, now: Instant) {
        match reply.kind {
            Some(deliver_reply::Kind::Led(led)) => {
                if let Some(shard) = shard(led.shard) {
                    self.led(shard, node, led.term, now);
                }
            }
            Some(deliver_reply::Kind::Delivery(delivery)) => self.delivery(node, delivery, now),
            None => {}
        }
    }

    // ---------------------------------------------------------------------------------------------------------- time

    /// When [`Lane::tick`] has something to do, if nothing else comes first.
    pub fn deadline(&self) -> Option<Instant> {
        let attach = self.due.first().map(|(at, _)| *at);
        let ack = self.ack_due.first().map(|(at, _)| *at);
        attach.into_iter().chain(ack).min()
    }

    /// Asks for what is due, in batches: whoever is due within `batch_wait` goes along.
    pub fn tick(&mut self, now: Instant) {
        let horizon = now + self.config.batch_wait;
        if self.due.first().is_some_and(|(at, _)| *at <= now) {
            let later = self.due.split_off(&(horizon, 0));
            let due = std::mem::replace(&mut self.due, later);
            let mut batches: BTreeMap<(u64, Shard), Vec<queue::Attach>> = BTreeMap::new();
            for (_, attach) in due {
                if let Some((node, shard, ask)) = self.ask(attach) {
                    batches.entry((node, shard)).or_default().push(ask);
                }
            }
            for ((node, shard), asks) in batches {
                for chunk in asks.chunks(self.config.batch_max.max(1)) {
                    let batch = queue::AttachBatch { shard: u32::from(shard.0), attaches: chunk.to_vec() };
                    let request = control(control_request::Kind::Attach(batch));
                    self.actions.push_back(Action::Control { node, request });
                }
            }
        }
        while let Some((at, attach)) = self.ack_due.first().copied() {
            if at > now {
                break;
            }
            self.ack_due.remove(&(at, attach));
            self.send_ack(attach);
        }
    }

    /// Sends what was written since the last flush, one request per attachment. The driver calls it when it has taken all
    /// that waited.
    pub fn flush(&mut self) {
        for (attach, sum) in std::mem::take(&mut self.written) {
            let Some(entry) = self.entries.get(&attach) else { continue };
            let Some(node) = entry.stand.node() else { continue };
            let written = queue::Written {
                shard: u32::from(entry.shard.0),
                attach: numbered(attach, entry.round),
                through: sequence_bytes(sum.through),
                credit_bytes: sum.credit_bytes,
            };
            self.push_deliver(node, deliver_request::Kind::Written(written));
        }
    }

    // ------------------------------------------------------------------------------------------------------- details

    fn led(&mut self, shard: Shard, node: u64, term: u64, now: Instant) {
        let view = self.shards.entry(shard).or_default();
        if term < view.term || (term == view.term && view.leader == Some(node)) {
            return;
        }
        view.term = term;
        view.leader = Some(node);
        self.actions.push_back(Action::Learned { shard, node, term });
        let members: Vec<u64> = view.members.iter().copied().collect();
        let mut moving = Vec::new();
        for attach in members {
            let Some(entry) = self.entries.get_mut(&attach) else { continue };
            let moves = match entry.stand {
                Stand::Idle | Stand::Due(_) => false,
                Stand::Parked => true,
                // Its answer is under way.
                Stand::Asked(at) => at != node,
                Stand::Attached(at, in_term) => (at, in_term) != (node, term),
            };
            if moves {
                entry.failures = 0;
                if entry.stand.node().is_some_and(|at| at != node) {
                    self.detach(attach);
                } else {
                    self.clear(attach);
                }
                moving.push(attach);
            }
        }
        self.schedule_spread(&moving, now);
        self.send_acks(shard);
    }

    fn attached(&mut self, node: u64, attached: queue::Attached, now: Instant) {
        let Some(attach) = self.known(node, attached.attach) else { return };
        let Some(entry) = self.entries.get_mut(&attach) else { return };
        if entry.stand != Stand::Asked(node) {
            return;
        }
        entry.session = attached.session.or(entry.session);
        entry.failures = 0;
        entry.stand = Stand::Attached(node, attached.term);
        let shard = entry.shard;
        let view = self.shards.entry(shard).or_default();
        if attached.term < view.term {
            // From before a term we know: whoever leads now has to be asked.
            self.clear(attach);
            self.schedule(attach, now + self.config.batch_wait);
        } else {
            self.led(shard, node, attached.term, now);
        }
    }

    fn attach_refused(&mut self, node: u64, refused: queue::AttachRefused, now: Instant) {
        let Some(attach) = self.known(node, refused.attach) else { return };
        let Some(shard) = self.entries.get(&attach).map(|entry| entry.shard) else { return };
        match refused.why {
            Some(attach_refused::Why::Superseded(_)) => return self.superseded(node, refused.attach),
            Some(attach_refused::Why::Redirect(redirect)) => self.redirected(shard, node, redirect),
            Some(attach_refused::Why::Refused(why)) if why.reason() == queue::refused::Reason::NoReplica => {
                self.redirected(shard, node, queue::Redirect::default());
            }
            Some(attach_refused::Why::Refused(_)) | None => {}
        }
        self.clear(attach);
        let failures = self.entries.get_mut(&attach).map_or(0, |entry| {
            entry.failures += 1;
            entry.failures
        });
        let wait = if failures == 1 && self.target(shard).is_some_and(|target| target != node) {
            self.config.batch_wait
        } else {
            self.backoff(failures)
        };
        self.schedule(attach, now + wait);
    }

    /// A node says that it does not lead the shard, and perhaps who does.
    fn redirected(&mut self, shard: Shard, node: u64, redirect: queue::Redirect) {
        let reachable = self.is_up(redirect.leader_node);
        let view = self.shards.entry(shard).or_default();
        if redirect.leader_node != 0 && redirect.leader_node != node && redirect.term >= view.term {
            // The term counts only once its leader says `Led`: an elected leader may not have applied its first entry.
            view.leader = Some(redirect.leader_node);
            if !reachable {
                // Whoever said so may be behind: the next replica is asked meanwhile.
                view.turn += 1;
            }
        } else if view.leader.is_none() || view.leader == Some(node) {
            view.leader = None;
            view.turn += 1;
        }
    }

    fn superseded(&mut self, node: u64, number: u64) {
        if let Some(attach) = self.known(node, number) {
            self.clear(attach);
            if let Some(entry) = self.entries.get_mut(&attach) {
                entry.stand = Stand::Idle;
            }
            self.actions.push_back(Action::Tell { attach, note: Note::Superseded });
        }
    }

    /// A newer connection of the same device is here.
    fn supersede(&mut self, older: u64) {
        self.detach(older);
        self.actions.push_back(Action::Tell { attach: older, note: Note::Superseded });
    }

    fn acked(&mut self, ack: u64) {
        let Some(attach) = self.acks.remove(&ack) else { return };
        let Some(entry) = self.entries.get_mut(&attach) else { return };
        match entry.ack.take() {
            Some(PendingAck { rest, .. }) if !rest.is_empty() => self.ack(attach, rest),
            Some(_) | None => self.actions.push_back(Action::Tell { attach, note: Note::Acked }),
        }
    }

    fn ack_refused(&mut self, node: u64, refused: queue::AckRefused, now: Instant) {
        let Some(attach) = self.acks.get(&refused.ack).copied() else { return };
        let Some(shard) = self.entries.get(&attach).map(|entry| entry.shard) else { return };
        self.redirected(shard, node, refused.redirect.unwrap_or_default());
        let failures = self.entries.get_mut(&attach).and_then(|entry| entry.ack.as_mut()).map_or(0, |pending| {
            pending.sent_to = None;
            pending.failures += 1;
            pending.failures
        });
        if failures == 1 && self.target(shard).is_some_and(|target| target != node) {
            self.send_ack(attach);
        } else {
            let at = now + self.backoff(failures);
            self.ack_due.insert((at, attach));
        }
    }

    fn delivery(&mut self, node: u64, delivery: queue::Delivery, now: Instant) {
        let cost_bytes = delivery.cost_bytes;
        let Some(shard) = shard(delivery.shard) else { return self.owe(node, cost_bytes) };
        let view = self.shards.entry(shard).or_default();
        if delivery.term < view.term {
            return self.owe(node, cost_bytes);
        }
        if delivery.term > view.term {
            self.led(shard, node, delivery.term, now);
        }
        let known = self.known(node, delivery.attach).filter(|attach| self.entries[attach].shard == shard);
        let Some((attach, entry)) = known.and_then(|attach| Some((attach, self.entries.get_mut(&attach)?))) else {
            self.owe(node, cost_bytes);
            let returned =
                queue::Returned { shard: delivery.shard, attach: delivery.attach, sequence: delivery.sequence };
            return self.push_deliver(node, deliver_request::Kind::Returned(returned));
        };
        let sequence = Sequence::from_bytes(&delivery.sequence);
        let (Some(mut message), true) = (delivery.message, sequence.is_some() || delivery.sequence.is_empty()) else {
            return self.owe(node, cost_bytes);
        };
        // Copies, because the originals keep the whole buffer alive that they were read into, beyond the bound of the credit.
        message.message_id = Bytes::copy_from_slice(&message.message_id);
        message.payload = Bytes::copy_from_slice(&message.payload);
        // Nothing here asks for it.
        message.registration_id = Bytes::new();
        entry.under_way_bytes += cost_bytes;
        entry.under_way_len += 1;
        let placed = Placed {
            shard,
            term: delivery.term,
            sequence,
            expires: now + Duration::from_millis(delivery.remaining_ms),
            cost_bytes,
            round: entry.round,
            message,
        };
        if entry.under_way_bytes > 2 * self.config.device_credit_bytes || entry.under_way_len > QUEUE_MAX {
            self.detach(attach);
            self.actions.push_back(Action::Tell { attach, note: Note::Overrun });
        } else {
            self.actions.push_back(Action::Place { attach, delivery: Box::new(placed) });
        }
    }

    /// The attachment that this node knows by a number, if its ask is the one in force.
    fn known(&self, node: u64, number: u64) -> Option<u64> {
        let attach = number >> ROUND_BITS;
        let entry = self.entries.get(&attach)?;
        (entry.stand.node() == Some(node) && numbered(attach, entry.round) == number).then_some(attach)
    }

    /// Forgets what is under way to the attachment, here and in its queue, and gives the stream its credit back.
    fn clear(&mut self, attach: u64) {
        self.written.remove(&attach);
        let Some(entry) = self.entries.get_mut(&attach) else { return };
        let (node, under_way) = (entry.stand.node(), std::mem::take(&mut entry.under_way_bytes));
        let queued = std::mem::take(&mut entry.under_way_len) > 0;
        entry.round += 1;
        entry.stand = match entry.stand {
            Stand::Due(at) => {
                self.due.remove(&(at, attach));
                Stand::Parked
            }
            Stand::Idle => Stand::Idle,
            Stand::Parked | Stand::Asked(_) | Stand::Attached(..) => Stand::Parked,
        };
        if queued {
            self.actions.push_back(Action::Clear { attach });
        }
        if let Some(node) = node {
            self.owe(node, under_way);
        }
    }

    /// Tells the node, if one knows of the attachment, that it ends there; it is wanted nowhere then.
    fn detach(&mut self, attach: u64) {
        let Some(entry) = self.entries.get(&attach) else { return };
        let (node, shard, number) = (entry.stand.node(), entry.shard, numbered(attach, entry.round));
        self.clear(attach);
        if let Some(entry) = self.entries.get_mut(&attach) {
            entry.stand = Stand::Idle;
        }
        if let Some(node) = node.filter(|node| self.is_up(*node)) {
            let request =
                control(control_request::Kind::Detach(queue::Detach { shard: u32::from(shard.0), attach: number }));
            self.actions.push_back(Action::Control { node, request });
        }
    }

    /// Turns a due attachment into an ask, or parks it.
    fn ask(&mut self, attach: u64) -> Option<(u64, Shard, queue::Attach)> {
        let shard = self.entries.get(&attach)?.shard;
        let target = self.target(shard);
        let entry = self.entries.get_mut(&attach)?;
        let Some(node) = target else {
            entry.stand = Stand::Parked;
            return None;
        };
        entry.stand = Stand::Asked(node);
        entry.round += 1;
        let ask = queue::Attach {
            attach: numbered(attach, entry.round),
            device_tag: entry.tag.0,
            session: entry.session,
            credit_bytes: self.config.device_credit_bytes,
            written_through: sequence_bytes(entry.written),
        };
        Some((node, shard, ask))
    }

    fn schedule(&mut self, attach: u64, at: Instant) {
        let Some(entry) = self.entries.get_mut(&attach) else { return };
        if let Stand::Due(before) = entry.stand {
            self.due.remove(&(before, attach));
        }
        entry.stand = Stand::Due(at);
        self.due.insert((at, attach));
    }

    /// Schedules many, spread over a time that grows with their number: a new leader is not to be run over.
    fn schedule_spread(&mut self, members: &[u64], now: Instant) {
        let thousands = members.len() as f64 / 1_000.0;
        let spread = self.config.reattach_spread.mul_f64(thousands);
        for attach in members {
            let jitter = spread.mul_f64(self.rng.random::<f64>());
            self.schedule(*attach, now + jitter);
        }
    }

    /// Something changed that may give parked attachments and unsent acks a node to go to.
    fn wake_all(&mut self, now: Instant) {
        let shards: Vec<Shard> = self.shards.keys().copied().collect();
        for shard in shards {
            if self.target(shard).is_none() {
                continue;
            }
            let Some(view) = self.shards.get(&shard) else { continue };
            let parked = |attach: &&u64| self.entries.get(attach).is_some_and(|entry| entry.stand == Stand::Parked);
            let parked: Vec<u64> = view.members.iter().filter(parked).copied().collect();
            self.schedule_spread(&parked, now);
            self.send_acks(shard);
        }
    }

    fn send_acks(&mut self, shard: Shard) {
        let Some(view) = self.shards.get(&shard) else { return };
        let unsent = |attach: &&u64| self.entries.get(attach).is_some_and(|entry| entry.ack.is_some());
        let unsent: Vec<u64> = view.members.iter().filter(unsent).copied().collect();
        for attach in unsent {
            self.send_ack(attach);
        }
    }

    /// Sends the attachment's ack to the leader, unless it is there already.
    fn send_ack(&mut self, attach: u64) {
        let Some(shard) = self.entries.get(&attach).map(|entry| entry.shard) else { return };
        let Some(node) = self.target(shard) else { return };
        let Some(entry) = self.entries.get_mut(&attach) else { return };
        let Some(pending) = entry.ack.as_mut().filter(|pending| pending.sent_to != Some(node)) else { return };
        pending.sent_to = Some(node);
        let request = pending.part.request(pending.id, shard, entry.tag);
        self.actions.push_back(Action::Control { node, request });
    }

    /// The node to ask for a shard: its leader, else the next replica with a link.
    fn target(&self, shard: Shard) -> Option<u64> {
        let view = self.shards.get(&shard);
        if let Some(leader) = view.and_then(|view| view.leader).filter(|leader| self.is_up(*leader)) {
            return Some(leader);
        }
        let replicas = self.map.replicas.get(&shard)?;
        let turn = view.map_or(0, |view| view.turn) % replicas.len().max(1);
        let (before, from) = replicas.split_at(turn.min(replicas.len()));
        from.iter().chain(before).copied().find(|node| self.is_up(*node))
    }

    fn is_up(&self, node: u64) -> bool {
        self.nodes.get(&node).is_some_and(|view| view.up)
    }

    /// Gives stream credit back to a node, in portions: an eighth of the whole at a time is never a stall.
    fn owe(&mut self, node: u64, bytes: u64) {
        let portion = self.config.stream_credit_bytes / 8;
        let Some(view) = self.nodes.get_mut(&node).filter(|view| view.up) else { return };
        view.debt_bytes += bytes;
        if view.debt_bytes > 0 && view.debt_bytes >= portion {
            let bytes = std::mem::take(&mut view.debt_bytes);
            self.push_deliver(node, deliver_request::Kind::StreamCredit(queue::StreamCredit { bytes }));
        }
    }

    fn push_deliver(&mut self, node: u64, kind: deliver_request::Kind) {
        if self.is_up(node) {
            self.actions.push_back(Action::Deliver { node, request: DeliverRequest { kind: Some(kind) } });
        }
    }

    fn backoff(&mut self, failures: u32) -> Duration {
        let whole = self.config.retry_min.saturating_mul(1 << failures.saturating_sub(1).min(16));
        let whole = whole.min(self.config.retry_max);
        whole.mul_f64(0.5 + 0.5 * self.rng.random::<f64>())
    }
}

fn control(kind: control_request::Kind) -> ControlRequest {
    ControlRequest { kind: Some(kind) }
}

fn shard(number: u32) -> Option<Shard> {
    u16::try_from(number).ok().map(Shard)
}

fn sequence_bytes(sequence: Option<Sequence>) -> Bytes {
    sequence.map_or_else(Bytes::new, |sequence| Bytes::copy_from_slice(&sequence.to_bytes()))
}

#[cfg(test)]
mod tests;
