//! A shard in one process: the real state over rows in memory, behind a group that a test holds, loses and lets go.

mod rates;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use martlet_proto::{
    cluster::{
        command::{Command, Entry, command},
        queue::{
            Ack, Attach, AttachBatch, Attached, Batch, BatchReply, Check, ControlReply, DeliverReply, Delivery,
            Enqueue, GroupChange, GroupGet, GroupMember, Hello, Led, Operation, Register, Session, Written, answer,
            batch_reply::Outcome, control_reply, deliver_reply, group_get::By, operation, refused::Reason,
        },
    },
    shard::Shard,
    tag::DeviceTag,
};
use prost::Message as _;
use tokio::sync::watch;

use super::{
    Consensus, Courier, Directory, Kept, Replica, ShardMachine, ShardSettings, Shards, ShardsConfig, replies::Replies,
};
use crate::{
    clock::{Clock, SystemClock, turned::TurnedClock},
    delivery::link::{Half, Link},
    metrics::{self, MarkLabel, Metrics},
    raft::{GroupTime as _, Index, Leadership, Machine, ProposeError, ReadError, Reply},
    state::{Rows, RowsError, Write, memory::MemoryRows},
    store::Mark,
};

const TERM: u64 = 5;
const SHARD: u32 = 0;
const DEVICE: u64 = 77;
const REGISTRATION: [u8; 16] = [9; 16];
const SENDER: &str = "123456789012";

#[derive(Debug, Default)]
struct TestRows(Mutex<(MemoryRows, Option<Mark>)>);

impl Rows for TestRows {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, RowsError> {
        self.0.lock().unwrap().0.get(key)
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, RowsError> {
        self.0.lock().unwrap().0.scan(from, to, limit)
    }

    fn scan_back(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<(Bytes, Bytes)>, RowsError> {
        self.0.lock().unwrap().0.scan_back(from, to, limit)
    }
}

impl Kept for TestRows {
    fn commit(&self, mark: Mark, writes: Vec<Write>) -> Result<(), String> {
        let mut kept = self.0.lock().unwrap();
        kept.0.write(&writes);
        kept.1 = Some(mark);
        Ok(())
    }

    fn mark(&self) -> Option<Mark> {
        self.0.lock().unwrap().1.clone()
    }
}

/// A group of one that applies what is proposed when the gate is open.
#[derive(Debug)]
struct TestGroup {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    leadership: watch::Sender<Leadership>,
    gate: watch::Sender<bool>,
    lease: AtomicBool,
    /// State version that all replicas announce.
    announced: Mutex<Option<u32>>,
    loses: AtomicBool,
    others_ms: Mutex<Option<u64>>,
    index: AtomicU64,
    machine: Mutex<ShardMachine>,
    entries: Mutex<Vec<Entry>>,
}

impl Consensus for TestGroup {
    fn propose(&self, entry: Bytes) -> BoxFuture<'static, Result<Reply, ProposeError>> {
        let inner = Arc::clone(&self.inner);
        Box::pin(async move {
            let mut gate = inner.gate.subscribe();
            let _ = gate.wait_for(|open| *open).await;
            if inner.loses.load(Ordering::SeqCst) {
                return Err(ProposeError::Unknown);
            }
            let index = inner.index.fetch_add(1, Ordering::SeqCst) + 1;
            inner.entries.lock().unwrap().push(Entry::decode(entry.clone()).unwrap());
            Ok(inner.machine.lock().unwrap().apply(Index { term: TERM, index }, Bytes::new(), &entry).unwrap())
        })
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.inner.leadership.subscribe()
    }

    fn read_barrier(&self) -> BoxFuture<'static, Result<(), ReadError>> {
        let leads = self.inner.leadership.borrow().is_leader;
        Box::pin(async move { if leads { Ok(()) } else { Err(ReadError::NotLeader { leader: None, term: TERM }) } })
    }

    fn lease_valid(&self) -> bool {
        self.inner.lease.load(Ordering::SeqCst)
    }

    fn time_of_others_ms(&self) -> BoxFuture<'static, Option<u64>> {
        Box::pin(std::future::ready(*self.inner.others_ms.lock().unwrap()))
    }

    fn peer_clocks_ms(&self) -> Vec<u64> {
        Vec::new()
    }

    fn state_version_announced(&self) -> Option<u32> {
        *self.inner.announced.lock().unwrap()
    }
}

#[derive(Debug)]
struct Map;

impl Directory for Map {
    fn node_of(&self, _: Shard, replica: u64) -> Option<u64> {
        Some(replica + 100)
    }

    fn epoch(&self, _: Shard) -> u64 {
        11
    }

    fn shards(&self) -> u16 {
        1
    }

    fn nodes_of(&self, _: Shard) -> Vec<u64> {
        vec![NODE]
    }
}

/// This node; there is no other.
const NODE: u64 = 1;

#[derive(Debug)]
struct Alone;

impl Courier for Alone {
    fn submit(&self, _: u64, _: Vec<Batch>) -> BoxFuture<'static, Result<Vec<BatchReply>, String>> {
        Box::pin(std::future::ready(Err("there is no other node".to_owned())))
    }
}

/// A node with some shards, and a gateway that speaks to it.
struct Node {
    shards: Arc<Shards>,
    groups: Vec<Arc<Inner>>,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
    replies: Arc<Replies>,
    ids: AtomicU64,
    short: Arc<Mutex<Option<metrics::Mark>>>,
}

impl Node {
    /// `count` shards, all led, their gates open.
    async fn leading(count: u16) -> Node {
        let node = Node::new(count, ShardSettings::default(), Arc::new(SystemClock));
        for shard in 0..count {
            node.lead(shard, TERM).await;
        }
        node
    }

    fn new(count: u16, settings: ShardSettings, clock: Arc<dyn Clock>) -> Node {
        let metrics = Arc::<Metrics>::default();
        let short = Arc::<Mutex<Option<metrics::Mark>>>::default();
        let shards = Shards::new(ShardsConfig {
            settings,
            clock: Arc::clone(&clock),
            directory: Arc::new(Map),
            metrics: Arc::clone(&metrics),
            overload: {
                let short = Arc::clone(&short);
                Arc::new(move || *short.lock().unwrap())
            },
            state_version: 3,
            node: NODE,
            courier: Arc::new(Alone),
        });
        let open = |shard| {
            let replica: Arc<Replica> = shards.load(Shard(shard), Arc::new(TestRows::default())).unwrap();
            let inner = Arc::new(Inner {
                leadership: watch::Sender::new(Leadership::default()),
                gate: watch::Sender::new(true),
                lease: AtomicBool::new(true),
                announced: Mutex::default(),
                loses: AtomicBool::new(false),
                others_ms: Mutex::new(Some(clock.wall_ms())),
                index: AtomicU64::new(0),
                machine: Mutex::new(replica.machine()),
                entries: Mutex::default(),
            });
            shards.open(replica, Arc::new(TestGroup { inner: Arc::clone(&inner) }));
            inner
        };
        let groups = (0..count).map(open).collect();
        let (replies, ids) = (Arc::new(Replies::new(100_000)), AtomicU64::new(1));
        Node { shards, groups, metrics, clock, replies, ids, short }
    }

    /// Returns when the shard has taken up its term: a gateway has been told so.
    async fn lead(&self, shard: u16, term: u64) {
        let told = self.shards.join(&Hello { gateway: vec![0; 16].into(), link: u32::from(shard) }, Half::Deliver);
        self.groups[usize::from(shard)].leadership.send_replace(Leadership {
            term,
            leader: Some(1),
            is_leader: true,
            first_applied: true,
        });
        loop {
            match self.shards.next_delivery(&told).await.unwrap().kind.unwrap() {
                deliver_reply::Kind::Led(led) if led == (Led { shard: u32::from(shard), term }) => break,
                _ => {}
            }
        }
        self.shards.link_gone(&told);
    }

    fn follow(&self, term: u64) {
        self.groups[0].leadership.send_replace(Leadership { term, leader: Some(2), ..Leadership::default() });
    }

    fn operation(&self, kind: operation::Kind) -> Operation {
        let number = self.ids.fetch_add(1, Ordering::SeqCst);
        let now_ms = self.clock.wall_ms();
        let id = (u128::from(now_ms * 1_000) << 64 | u128::from(number)).to_be_bytes();
        Operation { id: id.to_vec().into(), first_try_ms: now_ms, kind: Some(kind) }
    }

    fn send(&self, shard: u32, operations: Vec<Operation>) {
        self.replies.expect();
        let call = self.ids.fetch_add(1, Ordering::SeqCst);
        self.shards.submit(Batch { call, shard, epoch: 0, operations }, &self.replies);
    }

    async fn replies(&self, count: usize) -> Vec<BatchReply> {
        let mut replies = vec![];
        while replies.len() < count {
            replies.extend(self.replies.next().await.unwrap().replies);
        }
        replies
    }

    async fn outcome(&self, shard: u32, operations: Vec<Operation>) -> Outcome {
        self.send(shard, operations);
        self.replies(1).await.remove(0).outcome.unwrap()
    }

    async fn register(&self, shard: u32) {
        let register = Register {
            device_tag: DEVICE,
            registration_id: REGISTRATION.to_vec().into(),
            token_key_id: 1,
            application: "org.example.app".into(),
            subtype: String::new(),
            scope: "GCM".into(),
            senders: vec![SENDER.into()],
            iid: "abcdefghijk".into(),
            iid_invented: false,
            cert: String::new(),
            app_version: "1".into(),
            ttl_secs: 0,
        };
        let outcome = self.outcome(shard, vec![self.operation(operation::Kind::Register(register))]).await;
        assert!(matches!(accepted(&outcome)[0], answer::Kind::Registered(_)), "{outcome:?}");
    }

    async fn enqueue(&self, text: &'static str) {
        let outcome = self.outcome(SHARD, vec![self.operation(enqueue(text, 60))]).await;
        assert!(matches!(accepted(&outcome)[0], answer::Kind::Accepted(_)), "{outcome:?}");
    }

    /// A gateway's pair of streams, with credit.
    fn link(&self, number: u32) -> Arc<Link> {
        let hello = Hello { gateway: vec![1; 16].into(), link: number };
        self.shards.join(&hello, Half::Control);
        let link = self.shards.join(&hello, Half::Deliver);
        link.credit(1 << 20);
        link
    }

    async fn attach(&self, link: &Link, attach: u64, session: Option<Session>) -> control_reply::Kind {
        let attach =
            Attach { attach, device_tag: DEVICE, session, credit_bytes: 1 << 16, written_through: Bytes::new() };
        self.shards.attach(link, AttachBatch { shard: SHARD, attaches: vec![attach] }).await;
        reply(link).await
    }

    async fn delivered(&self, link: &Link) -> Delivery {
        loop {
            let DeliverReply { kind } = self.shards.next_delivery(link).await.unwrap();
            if let Some(deliver_reply::Kind::Delivery(delivery)) = kind {
                return delivery;
            }
        }
    }

    fn entries(&self, shard: usize) -> Vec<Entry> {
        self.groups[shard].entries.lock().unwrap().clone()
    }

    fn waiting(&self) -> usize {
        let machine = self.groups[0].machine.lock().unwrap();
        machine.0.waiting(DeviceTag(DEVICE), None, 1_000).unwrap().0.len()
    }
}

fn enqueue(text: &'static str, ttl_secs: u32) -> operation::Kind {
    operation::Kind::Enqueue(Enqueue {
        device_tag: DEVICE,
        registration_id: REGISTRATION.to_vec().into(),
        sender: SENDER.into(),
        wire_from: SENDER.into(),
        ttl_secs,
        payload: Bytes::from_static(text.as_bytes()),
        ..Enqueue::default()
    })
}

fn accepted(outcome: &Outcome) -> Vec<answer::Kind> {
    match outcome {
        Outcome::Answers(answers) => answers.answers.iter().map(|answer| answer.kind.clone().unwrap()).collect(),
        other => panic!("{other:?}"),
    }
}

fn refused(outcome: Outcome) -> Reason {
    match outcome {
        Outcome::Refused(refused) => refused.reason(),
        other => panic!("{other:?}"),
    }
}

async fn reply(link: &Link) -> control_reply::Kind {
    let ControlReply { kind } = link.next_reply().await.unwrap();
    kind.unwrap()
}

fn session(reply: control_reply::Kind) -> Session {
    match reply {
        control_reply::Kind::Attached(Attached { session, term, .. }) => {
            assert_eq!(term, TERM);
            session.unwrap()
        }
        other => panic!("{other:?}"),
    }
}

fn text(delivery: &Delivery) -> &str {
    str::from_utf8(&delivery.message.as_ref().unwrap().payload).unwrap()
}

#[tokio::test]
async fn a_message_is_enqueued_delivered_written_and_acked_away() {
    let node = Node::leading(1).await;
    node.register(SHARD).await;
    node.enqueue("one").await;
    let link = node.link(1);
    session(node.attach(&link, 1, None).await);
    let first = node.delivered(&link).await;
    assert_eq!((text(&first), first.attach, first.term), ("one", 1, TERM));
    node.enqueue("two").await;
    let second = node.delivered(&link).await;
    assert_eq!(text(&second), "two");
    assert!(first.sequence < second.sequence);

    let written =
        Written { shard: SHARD, attach: 1, through: second.sequence.clone(), credit_bytes: second.cost_bytes };
    node.shards.written(&link, &written);
    let sequences = vec![first.sequence, second.sequence.clone()];
    node.shards.ack(&link, Ack { ack: 4, shard: SHARD, device_tag: DEVICE, sequences, message_ids: vec![] });
    node.enqueue("three").await;
    let control_reply::Kind::Acked(acked) = reply(&link).await else { panic!("not acked") };
    assert_eq!(acked.acks, [4]);
    assert_eq!(node.waiting(), 1);

    let last = node.entries(0).pop().unwrap();
    assert!(matches!(last.commands[0].kind, Some(command::Kind::Acks(_))), "an entry begins with acks");
    let Some(command::Kind::Stamped(stamped)) = &last.commands[1].kind else { panic!("no enqueue") };
    assert_eq!(stamped.written_through, second.sequence);
    assert_eq!(stamped.limits, Some(ShardSettings::default().limits()));
}

#[tokio::test]
async fn promise_6_while_something_is_short_what_adds_is_refused_and_acks_go_on_core() {
    let node = Node::leading(1).await;
    node.register(SHARD).await;
    node.enqueue("one").await;
    let link = node.link(1);
    session(node.attach(&link, 1, None).await);
    let one = node.delivered(&link).await;
    for mark in [metrics::Mark::Memory, metrics::Mark::Disk, metrics::Mark::Log] {
        *node.short.lock().unwrap() = Some(mark);
        let refusal = node.outcome(SHARD, vec![node.operation(enqueue("two", 60))]).await;
        assert_eq!(refused(refusal), Reason::Overloaded);
        assert_eq!(node.metrics.overloads.get_or_create(&MarkLabel { mark }).get(), 1);
        // Not logged, and nothing kept.
        let now = node.outcome(SHARD, vec![node.operation(enqueue("now", 0))]).await;
        assert!(matches!(accepted(&now)[0], answer::Kind::Accepted(_)), "{now:?}");
        node.delivered(&link).await;
    }
    assert_eq!(node.waiting(), 1);
    let ack = Ack { ack: 1, shard: SHARD, device_tag: DEVICE, sequences: vec![one.sequence], message_ids: vec![] };
    node.shards.ack(&link, ack);
    assert!(matches!(reply(&link).await, control_reply::Kind::Acked(_)));
    assert_eq!(node.waiting(), 0);
    *node.short.lock().unwrap() = None;
    node.enqueue("two").await;
}

#[tokio::test]
async fn an_ack_alone_is_applied_before_it_is_answered() {
    let node = Node::leading(1).await;
    node.register(SHARD).await;
    node.enqueue("one").await;
    let link = node.link(1);
    session(node.attach(&link, 1, None).await);
    let sequences = vec![node.delivered(&link).await.sequence];
    node.shards.ack(&link, Ack { ack: 4, shard: SHARD, device_tag: DEVICE, sequences, message_ids: vec![] });
    assert!(matches!(reply(&link).await, control_reply::Kind::Acked(_)));
    assert_eq!(node.waiting(), 0);
}

#[tokio::test]
async fn a_second_connection_takes_the_device_over() {
    let node = Node::leading(1).await;
    node.register(SHARD).await;
    let (old, new) = (node.link(1), node.link(2));
    let first = session(node.attach(&old, 1, None).await);
    let second = session(node.attach(&new, 1, None).await);
    assert!((first.term, first.counter) < (second.term, second.counter));
    assert!(matches!(reply(&old).await, control_reply::Kind::Superseded(s) if s.attach == 1));
    let again = node.attach(&old, 2, Some(first)).await;
    assert!(matches!(again, control_reply::Kind::AttachRefused(_)), "{again:?}");
    node.enqueue("one").await;
    assert_eq!(text(&node.delivered(&new).await), "one");
}

#[tokio::test]
async fn a_thousand_enqueues_on_sixteen_shards_make_far_fewer_entries() {
    let node = Node::leading(16).await;
    for shard in 0..16 {
        node.register(shard).await;
    }
    for group in &node.groups {
        group.gate.send_replace(false);
    }
    for nth in 0..1_000 {
        node.send(nth % 16, vec![node.operation(enqueue("hello", 60))]);
        if nth == 100 {
            tokio::task::yield_now().await;
        }
    }
    for group in &node.groups {
        group.gate.send_replace(true);
    }
    for reply in node.replies(1_000).await {
        accepted(&reply.outcome.unwrap());
    }
    let entries: usize = (0..16).map(|shard| node.entries(shard).len() - 1).sum();
    assert!(entries <= 3 * 16, "{entries} entries");
}

#[tokio::test]
async fn a_multicast_to_a_thousand_tokens_of_one_shard_is_one_entry() {
    let node = Node::leading(1).await;
    node.register(SHARD).await;
    let operations = (0..1_000).map(|_| node.operation(enqueue("hello", 60))).collect();
    let outcome = node.outcome(SHARD, operations).await;
    assert_eq!(accepted(&outcome).len(), 1_000);
    assert_eq!(node.entries(0).len(), 2);
}

#[tokio::test]
async fn what_is_refused_was_never_proposed() {
    let node = Node::leading(1).await;
    node.register(SHARD).await;
    let mut no_time = node.operation(enqueue("x", 60));
    no_time.first_try_ms = 0;
    node.send(SHARD, vec![no_time]);
    let reply = node.replies(1).await.remove(0);
    assert!(reply.shard_time_ms > 0);
    assert_eq!(refused(reply.outcome.unwrap()), Reason::TimeNeeded);

    node.groups[0].lease.store(false, Ordering::SeqCst);
    assert_eq!(refused(node.outcome(SHARD, vec![node.operation(enqueue("x", 60))]).await), Reason::NoLease);
    node.groups[0].lease.store(true, Ordering::SeqCst);
    assert_eq!(refused(node.outcome(9, vec![node.operation(enqueue("x", 60))]).await), Reason::NoReplica);
    node.follow(6);
    let outcome = node.outcome(SHARD, vec![node.operation(enqueue("x", 60))]).await;
    let Outcome::Redirect(redirect) = outcome else { panic!("{outcome:?}") };
    assert_eq!((redirect.leader_node, redirect.term, redirect.epoch), (102, 6, 11));
    node.shards.drain();
    assert_eq!(refused(node.outcome(SHARD, vec![node.operation(enqueue("x", 60))]).await), Reason::Draining);
    assert_eq!(node.entries(0).len(), 1);
}

#[tokio::test]
async fn what_was_proposed_by_a_leader_that_lost_its_place_is_unknown_and_what_waited_is_redirected() {
    let node = Node::leading(1).await;
    node.register(SHARD).await;
    let group = &node.groups[0];
    group.gate.send_replace(false);
    node.send(SHARD, vec![node.operation(enqueue("one", 60))]);
    tokio::task::yield_now().await;
    node.send(SHARD, vec![node.operation(enqueue("two", 60))]);
    node.follow(6);
    assert!(matches!(node.replies(1).await[0].outcome, Some(Outcome::Redirect(_))));
    group.loses.store(true, Ordering::SeqCst);
    group.gate.send_replace(true);
    assert!(matches!(node.replies(1).await[0].outcome, Some(Outcome::Unknown(_))));
}

#[tokio::test]
async fn a_proposal_is_counted_while_it_has_no_answer_and_no_longer() {
    let node = Node::leading(1).await;
    node.register(SHARD).await;
    let unanswered = || node.metrics.proposals_unanswered.get();
    assert_eq!(unanswered(), 0);
    for loses in [false, true] {
        let group = &node.groups[0];
        group.gate.send_replace(false);
        group.loses.store(loses, Ordering::SeqCst);
        node.send(SHARD, vec![node.operation(enqueue("one", 60))]);
        while unanswered() == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(unanswered(), 1);
        group.gate.send_replace(true);
        node.replies(1).await;
        while unanswered() > 0 {
            tokio::task::yield_now().await;
        }
    }
}

/// Time from a noon on, and days more at once.
#[derive(Debug)]
struct TestClock {
    began: Instant,
    ahead: Mutex<Duration>,
}

impl TestClock {
    fn new() -> Self {
        Self { began: SystemClock.now(), ahead: Mutex::default() }
    }

    fn advance(&self, by: Duration) {
        *self.ahead.lock().unwrap() += by;
    }

    fn since(&self) -> Duration {
        (SystemClock.now() - self.began) + *self.ahead.lock().unwrap()
    }
}

impl Clock for TestClock {
    fn now(&self) -> Instant {
        self.began + self.since()
    }

    fn wall_ms(&self) -> u64 {
        20_000 * DAY_MS + DAY_MS / 2 + u64::try_from(self.since().as_millis()).unwrap()
    }
}

const DAY_MS: u64 = 24 * 60 * 60 * 1000;

/// Last-seen days that were proposed, in order.
fn seen(entries: &[Entry]) -> Vec<(u64, u32)> {
    let seen = |command: &Command| match command.kind {
        Some(command::Kind::Seen(seen)) => Some((seen.device_tag, seen.day)),
        _ => None,
    };
    entries.iter().flat_map(|entry| &entry.commands).filter_map(seen).collect()
}

#[tokio::test]
async fn a_device_is_seen_when_it_attaches_and_daily_while_it_stays_and_never_twice_a_day() {
    let clock = Arc::new(TestClock::new());
    let brief = Duration::from_millis(2);
    let settings = ShardSettings { expire_every: brief, ack_wait: brief, ..ShardSettings::default() };
    let node = Node::new(1, settings, clock.clone());
    let count = async |count| {
        while seen(&node.entries(0)).len() < count {
            tokio::time::sleep(brief).await;
        }
    };
    node.lead(0, TERM).await;
    node.register(SHARD).await;
    let first = u32::try_from(clock.wall_ms() / DAY_MS).unwrap();
    let link = node.link(1);
    // One that the shard does not know is given no row.
    let unknown = Attach { attach: 9, device_tag: DEVICE + 1, credit_bytes: 1 << 16, ..Attach::default() };
    node.shards.attach(&link, AttachBatch { shard: SHARD, attaches: vec![unknown] }).await;
    session(reply(&link).await);
    let mine = session(node.attach(&link, 1, None).await);
    tokio::time::sleep(10 * brief).await;

    // It stays attached.
    clock.advance(Duration::from_millis(DAY_MS));
    count(1).await;
    // It comes again on the same day.
    session(node.attach(&link, 2, Some(mine)).await);
    tokio::time::sleep(10 * brief).await;
    // It is away for days.
    node.shards.detach(&link, SHARD, 2);
    clock.advance(Duration::from_millis(3 * DAY_MS));
    tokio::time::sleep(10 * brief).await;
    clock.advance(Duration::from_millis(DAY_MS));
    session(node.attach(&link, 3, None).await);
    count(2).await;
    assert_eq!(seen(&node.entries(0)), [(DEVICE, first + 1), (DEVICE, first + 5)]);
}

#[tokio::test]
async fn a_new_term_forgets_the_devices_and_tells_the_gateways() {
    let node = Node::leading(1).await;
    node.register(SHARD).await;
    let link = node.link(1);
    session(node.attach(&link, 1, None).await);
    node.lead(0, TERM + 1).await;
    let told = std::iter::from_fn(|| link.next_led()).last();
    assert_eq!(told, Some(Led { shard: SHARD, term: TERM + 1 }));
    node.enqueue("one").await;
    let attached = node.attach(&link, 2, None).await;
    assert!(matches!(attached, control_reply::Kind::Attached(a) if a.term == TERM + 1));
    let delivery = node.delivered(&link).await;
    assert_eq!((delivery.attach, delivery.term), (2, TERM + 1));
}

#[tokio::test]
async fn without_a_lease_nothing_is_handed_out_until_it_is_back() {
    let node = Node::leading(1).await;
    node.register(SHARD).await;
    let link = node.link(1);
    session(node.attach(&link, 1, None).await);
    node.enqueue("one").await;
    node.groups[0].lease.store(false, Ordering::SeqCst);
    let delivered = node.delivered(&link);
    tokio::pin!(delivered);
    for _ in 0..10 {
        assert!(futures::poll!(&mut delivered).is_pending());
        tokio::task::yield_now().await;
    }
    node.groups[0].lease.store(true, Ordering::SeqCst);
    assert_eq!(text(&delivered.await), "one");
}

#[tokio::test]
async fn a_message_with_ttl_0_is_never_logged_and_comes_behind_what_was_before_it() {
    let node = Node::leading(1).await;
    node.register(SHARD).await;
    let before = node.entries(0).len();
    let dropped = node.outcome(SHARD, vec![node.operation(enqueue("nobody", 0))]).await;
    assert!(matches!(accepted(&dropped)[0], answer::Kind::Accepted(_)));
    node.enqueue("first").await;
    let link = node.link(1);
    session(node.attach(&link, 1, None).await);
    let now = node.outcome(SHARD, vec![node.operation(enqueue("now", 0))]).await;
    assert!(matches!(accepted(&now)[0], answer::Kind::Accepted(_)));
    assert_eq!(text(&node.delivered(&link).await), "first");
    let delivery = node.delivered(&link).await;
    assert_eq!(text(&delivery), "now");
    assert!(delivery.sequence.is_empty());
    assert_eq!(delivery.message.unwrap().application, "org.example.app");
    assert_eq!(node.entries(0).len(), before + 1);
}

#[tokio::test]
async fn a_check_is_answered_in_its_place_and_never_logged() {
    let node = Node::leading(1).await;
    node.register(SHARD).await;
    let check = |sender: &str| {
        operation::Kind::Check(Check {
            device_tag: DEVICE,
            registration_id: REGISTRATION.to_vec().into(),
            sender: sender.into(),
            restricted_package_name: String::new(),
        })
    };
    let operations = vec![node.operation(check("1")), node.operation(enqueue("x", 60)), node.operation(check(SENDER))];
    let answers = accepted(&node.outcome(SHARD, operations).await);
    assert!(matches!(answers[0], answer::Kind::Refusal(_)));
    assert!(matches!(answers[1], answer::Kind::Accepted(_)));
    assert!(matches!(answers[2], answer::Kind::Accepted(_)));
    assert_eq!(node.entries(0).last().unwrap().commands.len(), 1);
}

#[tokio::test]
async fn a_group_is_changed_in_the_log_and_read_by_the_leader_alone() {
    let node = Node::leading(1).await;
    let get = GroupGet { group_tag: 5, sender: SENDER.into(), by: Some(By::Name("n".into())) };
    let read = || operation::Kind::GroupGet(get.clone());
    let member =
        GroupMember { device_tag: DEVICE, registration_id: REGISTRATION.to_vec().into(), ..GroupMember::default() };
    let change = operation::Kind::GroupChange(GroupChange {
        group_tag: 5,
        sender: SENDER.into(),
        name: "n".into(),
        key_bits: 6,
        create: true,
        join: vec![member.clone()],
        ..GroupChange::default()
    });
    let made = node.outcome(SHARD, vec![node.operation(change)]).await;
    assert!(matches!(accepted(&made)[0], answer::Kind::Group(_)), "{made:?}");
    let entries = node.entries(0).len();
    let mut read_it = node.operation(read());
    // No time is needed for what is not logged.
    read_it.first_try_ms = 0;
    let outcome = node.outcome(SHARD, vec![read_it]).await;
    let answer::Kind::Group(group) = &accepted(&outcome)[0] else { panic!("{outcome:?}") };
    assert_eq!((group.key_bits, &group.members), (6, &vec![member]));
    assert_eq!(node.entries(0).len(), entries);
    let many = (0..17).map(|_| node.operation(read())).collect();
    let outcome = node.outcome(SHARD, many).await;
    assert!(matches!(&outcome, Outcome::Refused(refused) if refused.reason() == Reason::Overloaded), "{outcome:?}");
    let shard = Shard(u16::try_from(SHARD).unwrap());
    assert!(node.shards.group(shard, &get).is_ok());
    node.groups[0].lease.store(false, Ordering::SeqCst);
    assert!(node.shards.group(shard, &get).unwrap_err().contains("not led here"));
}

#[tokio::test]
async fn a_shutdown_ends_every_task_and_answers_what_waits() {
    let node = Node::leading(1).await;
    node.register(SHARD).await;
    let link = node.link(1);
    node.send(SHARD, vec![node.operation(enqueue("one", 60))]);
    node.shards.shutdown().await;
    assert!(link.closed().is_cancelled());
    assert_eq!(node.replies(1).await.len(), 1);
}

impl Node {
    /// Raises in the log of shard 0, with the place in their entry.
    fn raises(&self) -> Vec<(usize, u32)> {
        let raises = |entry: &Entry| -> Vec<(usize, u32)> {
            let found = entry.commands.iter().enumerate().filter_map(|(place, command)| match &command.kind {
                Some(command::Kind::Raise(raise)) => Some((place, raise.version)),
                _ => None,
            });
            found.collect()
        };
        self.entries(0).iter().flat_map(raises).collect()
    }

    fn all_announce(&self, version: u32) {
        *self.groups[0].announced.lock().unwrap() = Some(version);
    }

    /// Time for the leader to look a few times. What must not happen may only be missed by it, never made up.
    async fn looks(&self) {
        tokio::time::sleep(LOOK * 20).await;
    }

    async fn until_raised(&self, raises: &[(usize, u32)]) {
        let raised = async {
            while self.raises() != raises {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), raised).await.unwrap();
    }

    /// One shard whose leader, once it is one, looks often what there is to do.
    fn looking() -> Node {
        let settings = ShardSettings { expire_every: LOOK, ..ShardSettings::default() };
        Node::new(1, settings, Arc::new(SystemClock))
    }
}

const LOOK: Duration = Duration::from_millis(2);

#[tokio::test]
async fn a_raise_is_proposed_once_by_a_leader_and_only_to_what_all_replicas_announce() {
    let node = Node::looking();
    node.all_announce(2);
    node.looks().await;
    assert_eq!(node.raises(), [], "a follower proposes nothing");
    *node.groups[0].announced.lock().unwrap() = None;
    node.lead(0, TERM).await;
    node.looks().await;
    assert_eq!(node.raises(), [], "one replica has not been heard");
    node.all_announce(1);
    node.looks().await;
    assert_eq!((node.raises(), node.shards.state_version(SHARD)), (vec![], Some(1)));
    node.all_announce(2);
    node.until_raised(&[(0, 2)]).await;
    node.looks().await;
    assert_eq!((node.raises(), node.shards.state_version(SHARD)), (vec![(0, 2)], Some(2)));
    node.all_announce(3);
    node.until_raised(&[(0, 2), (0, 3)]).await;
    assert_eq!(node.shards.state_version(SHARD), Some(3));
}

#[tokio::test]
async fn a_raise_under_way_is_waited_for_and_one_whose_outcome_is_unknown_is_proposed_again() {
    let node = Node::looking();
    node.lead(0, TERM).await;
    let group = Arc::clone(&node.groups[0]);
    group.gate.send_replace(false);
    group.loses.store(true, Ordering::SeqCst);
    node.all_announce(2);
    node.looks().await;
    assert_eq!(node.metrics.proposals.get(), 1, "one is under way");
    group.gate.send_replace(true);
    node.looks().await;
    assert_eq!(node.raises(), []);
    group.loses.store(false, Ordering::SeqCst);
    node.until_raised(&[(0, 2)]).await;
}

#[tokio::test]
async fn a_raise_waits_for_the_lease() {
    let node = Node::looking();
    node.lead(0, TERM).await;
    node.groups[0].lease.store(false, Ordering::SeqCst);
    node.all_announce(2);
    node.looks().await;
    assert_eq!((node.raises(), node.metrics.proposals.get()), (vec![], 0));
    node.groups[0].lease.store(true, Ordering::SeqCst);
    node.until_raised(&[(0, 2)]).await;
}

#[tokio::test]
async fn a_restarted_leader_begins_with_the_time_that_another_replica_knows_whatever_the_clocks_say() {
    const HOUR_MS: u64 = 3_600_000;
    let clock = TurnedClock::at_ms(1_700_000_000_000 + HOUR_MS);
    let node = Node::new(1, ShardSettings::default(), Arc::new(clock));
    *node.groups[0].others_ms.lock().unwrap() = Some(1_700_000_000_000);
    node.lead(0, TERM).await;
    node.send(SHARD, vec![Operation { first_try_ms: 0, ..node.operation(enqueue("one", 60)) }]);
    assert_eq!(node.replies(1).await[0].shard_time_ms, 1_700_000_000_000);
    assert_eq!(node.entries(0), [], "it is known already");
}

#[tokio::test]
async fn a_restarted_leader_that_nobody_can_tell_the_time_logs_what_it_begins_with() {
    let clock = TurnedClock::at_ms(1_700_000_000_000);
    let node = Node::new(1, ShardSettings::default(), Arc::new(clock));
    *node.groups[0].others_ms.lock().unwrap() = None;
    node.lead(0, TERM).await;
    while node.entries(0).is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(node.entries(0)[0].shard_time_ms, 1_700_000_000_000);
    assert_eq!(node.groups[0].machine.lock().unwrap().0.known_ms(), Some(1_700_000_000_000));
}

#[tokio::test]
async fn a_shutdown_without_a_quorum_answers_what_is_proposed_as_unknown_and_ends() {
    let node = Node::leading(1).await;
    node.register(SHARD).await;
    node.groups[0].gate.send_replace(false);
    node.send(SHARD, vec![node.operation(enqueue("one", 60))]);
    while node.metrics.proposals_unanswered.get() == 0 {
        tokio::task::yield_now().await;
    }
    tokio::time::timeout(Duration::from_secs(60), node.shards.shutdown()).await.unwrap();
    let outcome = node.replies(1).await.remove(0).outcome.unwrap();
    assert!(matches!(outcome, Outcome::Unknown(_)), "{outcome:?}");
}
