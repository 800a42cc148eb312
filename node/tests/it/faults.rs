//! Faults from a seed on three whole nodes in this process, at the seams of links, disks and clocks, judged by the ledger.
//!
//! Links are cut one way or both, nodes crash with and without power loss, wall clocks jump by an hour, while messages are sent
//! and devices attach, read and acknowledge straight at the nodes' own gRPC. `MARTLET_FAULT_SEED` is the first seed and
//! `MARTLET_FAULT_SEEDS` how many follow it. A seed fixes what is done and in which order; how that falls between the threads of
//! the nodes it does not, so a failure prints its seed and keeps its history.
//!
//! A second play is of clocks alone: they jump, one or all, and nodes restart one after the other while they are wrong, each once
//! the last is back; what is sent lives half an hour, and some of it waits for a device that comes only at the end.
//!
//! A third is of absences: nodes come back to base files and snapshots, and more goes wrong while they catch up.
//!
//! No gateway stands between: nobody but the leader's lease keeps a device from hearing a stale leader.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use martlet_loadtest::{
    clock::RunClock,
    history::{Recorder, What},
    ledger::{self, Terms},
};
use martlet_node::{
    Node, Surroundings,
    clock::turned::TurnedClock,
    disk::forgetful::ForgetfulDisk,
    metrics::{Metrics, TransferLabel, TransferWay},
    raft::{DirectLinks, links::cuttable::Wiring},
};
use martlet_proto::cluster::queue::{
    Ack, Attach, AttachBatch, Batch, ControlReply, ControlRequest, DeliverReply, DeliverRequest, Delivery, Enqueue,
    Hello, Operation, Register, StreamCredit, SubmitReply, SubmitRequest, Written, answer, batch_reply::Outcome,
    control_reply, control_request, deliver_reply, deliver_request, operation, queue_client::QueueClient,
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    runtime::{Builder, Runtime},
    sync::mpsc,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Streaming, transport::Channel};

use crate::nodes::Nodes;

const SENDER: &str = "100000000001";
const NODES: usize = 3;
const SHARDS: u32 = 2;
const DEVICES: u64 = 6;
const SENDERS: u64 = 3;
/// Faults of one seed.
const FAULTS: usize = 7;
const HOUR_MS: i64 = 3_600_000;
/// Jumps of one seed of the second play.
const JUMPS: usize = 4;
/// Absences of one seed of the third play.
const ABSENCES: usize = 3;
/// Bytes of a message in the third play.
const LARGE: usize = 4_000;
/// Messages acked while a node is away: several times what makes a base file be written.
const WORK: u64 = 150;
/// Acked between a restart and the next fault there.
const RESTED: u64 = 30;
/// Messages that wait for the device that is away.
const LEFT_BEHIND_MAX: u64 = 20;
/// Sends that are acked at least, or the run proves nothing.
const ACKED_MIN: u64 = 40;
/// Longest that all is waited for once every fault has ended.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest one step of a client is waited for; then it goes to the next node.
const STEP_MAX: Duration = Duration::from_secs(1);

/// One thing that goes wrong, or right again.
#[derive(Debug, Clone, Copy)]
enum Fault {
    CutOneWay(usize, usize),
    Cut(usize, usize),
    Isolate(usize),
    HealAll,
    /// As kill -9; it is started again at the next step.
    Kill(usize),
    /// What was not synced is gone, or some of its sectors are.
    PowerLoss(usize, Option<u64>),
    /// All at once.
    PowerLossEverywhere,
    Jump(usize, i64),
    JumpEverywhere(i64),
    /// Until all run and what is sent is acked again.
    Rest,
    /// Until the others have done work that is no longer in their logs. Whoever is down stays down.
    Work,
}

fn plan(seed: u64) -> Vec<(Fault, Duration)> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut steps = Vec::new();
    for _ in 0..FAULTS {
        let node = rng.random_range(1..=NODES);
        let other = 1 + (node + rng.random_range(0..NODES - 1)) % NODES;
        let by_ms = if rng.random_bool(0.5) { HOUR_MS } else { -HOUR_MS };
        let fault = match rng.random_range(0..12) {
            0 => Fault::CutOneWay(node, other),
            1 => Fault::Cut(node, other),
            2 | 3 => Fault::Isolate(node),
            4 | 5 => Fault::HealAll,
            6 | 7 => Fault::Kill(node),
            8 => Fault::PowerLoss(node, rng.random_bool(0.5).then(|| rng.random())),
            9 => Fault::PowerLossEverywhere,
            10 => Fault::Jump(node, by_ms),
            _ => Fault::JumpEverywhere(by_ms),
        };
        steps.push((fault, Duration::from_millis(rng.random_range(100..1_200))));
    }
    steps
}

/// As [`plan`], of clocks that jump and nodes that restart while they are wrong.
fn jumps(seed: u64) -> Vec<(Fault, Duration)> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut steps = Vec::new();
    for _ in 0..JUMPS {
        let node = rng.random_range(1..=NODES);
        let by_ms = if rng.random_bool(0.5) { HOUR_MS } else { -HOUR_MS };
        let jump = if rng.random_bool(0.7) { Fault::JumpEverywhere(by_ms) } else { Fault::Jump(node, by_ms) };
        let node = rng.random_range(1..=NODES);
        let restart = if rng.random_bool(0.7) { Fault::Kill(node) } else { Fault::PowerLoss(node, None) };
        let mut pause = || Duration::from_millis(rng.random_range(100..1_200));
        steps.extend([(jump, pause()), (restart, pause()), (Fault::Rest, pause())]);
    }
    steps
}

/// As [`plan`], of nodes that are away until the others' logs no longer hold what they lack, and of faults while they catch up.
fn absences(seed: u64) -> Vec<(Fault, Duration)> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut steps = Vec::new();
    for _ in 0..ABSENCES {
        let node = rng.random_range(1..=NODES);
        let other = 1 + (node + rng.random_range(0..NODES - 1)) % NODES;
        let absence = match rng.random_range(0..3) {
            0 => Fault::Isolate(node),
            1 => Fault::Kill(node),
            _ => Fault::PowerLoss(node, rng.random_bool(0.5).then(|| rng.random())),
        };
        let meanwhile = match rng.random_range(0..5) {
            0 => Fault::Kill(node),
            1 => Fault::PowerLoss(node, None),
            2 => Fault::Kill(other),
            3 => Fault::PowerLossEverywhere,
            _ => Fault::Rest,
        };
        let mut pause = || Duration::from_millis(rng.random_range(10..300));
        let steps_of_one = [absence, Fault::Work, Fault::HealAll, meanwhile, Fault::Rest];
        steps.extend(steps_of_one.map(|fault| (fault, pause())));
    }
    steps
}

/// What is done, and what is sent meanwhile.
struct Play {
    /// Tells the history's file from those of other plays.
    called: &'static str,
    steps: Vec<(Fault, Duration)>,
    ttl_secs: u32,
    /// Comes only at the end.
    away: Option<u64>,
    logs: Logs,
}

/// How long the nodes keep their logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Logs {
    /// As long as a node lacks something: all of them catch up by the log.
    Long,
    /// Hardly: messages are large, and nodes that were away come back to base files and snapshots.
    Short,
}

/// Three nodes, each on a runtime of its own, so that a crash ends all of its tasks at once.
struct World {
    logs: Logs,
    nodes: Nodes,
    wiring: Wiring,
    clocks: Vec<TurnedClock>,
    disks: Vec<ForgetfulDisk>,
    running: Vec<Option<Runtime>>,
    /// Of every node that was ever started.
    metrics: Vec<Arc<Metrics>>,
}

impl World {
    fn new(logs: Logs) -> Self {
        let mut world = World {
            logs,
            nodes: Nodes::new(NODES),
            wiring: Wiring::new(Arc::new(DirectLinks)),
            clocks: (0..NODES).map(|_| TurnedClock::running()).collect(),
            disks: (0..NODES).map(|_| ForgetfulDisk::new()).collect(),
            running: (0..NODES).map(|_| None).collect(),
            metrics: Vec::new(),
        };
        (1..=NODES).for_each(|id| world.start(id));
        world
    }

    fn start(&mut self, id: usize) {
        if self.running[id - 1].is_some() {
            return;
        }
        let mut config = self.nodes.config(id);
        config.log.segment_bytes = 1 << 20;
        if self.logs == Logs::Short {
            config.log.checkpoint_bytes = 1 << 20;
            config.raft.kept_entries = 0;
            config.store.checkpoint_age = Duration::from_millis(200);
            config.store.base_log_bytes_min = 128 << 10;
        }
        let around = Surroundings {
            disk: Arc::new(self.disks[id - 1].clone()),
            clock: Arc::new(self.clocks[id - 1].clone()),
            links: self.wiring.of(id as u64),
            ..Surroundings::default()
        };
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let node = runtime.block_on(async {
            let mut refused = None;
            for _ in 0..200 {
                match Node::start_in(config.clone(), around.clone()).await {
                    Ok(node) => return node,
                    // What the crashed one held is let go of a moment later.
                    Err(error) => refused = Some(error),
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            panic!("node {id} does not start again: {}", refused.unwrap());
        });
        self.metrics.push(node.started().metrics);
        runtime.spawn(node.run(CancellationToken::new()));
        self.running[id - 1] = Some(runtime);
    }

    /// Ends a node where it stands. Its disk is taken afterwards: nothing leaves it in between.
    fn crash(&mut self, id: usize, left: impl FnOnce(&ForgetfulDisk) -> ForgetfulDisk) {
        if let Some(runtime) = self.running[id - 1].take() {
            runtime.shutdown_timeout(Duration::from_secs(10));
            self.disks[id - 1] = left(&self.disks[id - 1]);
        }
    }

    /// Snapshots of shards that nodes took in.
    fn snapshots(&self) -> u64 {
        let way = TransferLabel { way: TransferWay::Received };
        self.metrics.iter().map(|metrics| metrics.snapshots.get_or_create(&way).get()).sum()
    }

    fn heal_all(&self) {
        for a in 1..=NODES as u64 {
            for b in 1..a {
                self.wiring.heal(a, b);
            }
        }
    }

    fn suffer(&mut self, fault: Fault) {
        match fault {
            Fault::CutOneWay(a, b) => self.wiring.cut_one_way(a as u64, b as u64),
            Fault::Cut(a, b) => self.wiring.cut(a as u64, b as u64),
            Fault::Isolate(a) => {
                (1..=NODES).filter(|b| *b != a).for_each(|b| self.wiring.cut(a as u64, b as u64));
            }
            Fault::HealAll => self.heal_all(),
            Fault::Kill(id) => self.crash(id, ForgetfulDisk::restart),
            Fault::PowerLoss(id, None) => self.crash(id, ForgetfulDisk::power_cut),
            Fault::PowerLoss(id, Some(torn)) => self.crash(id, |disk| disk.torn_power_cut(torn)),
            Fault::PowerLossEverywhere => (1..=NODES).for_each(|id| self.crash(id, ForgetfulDisk::power_cut)),
            Fault::Jump(id, by_ms) => self.clocks[id - 1].jump_ms(by_ms),
            Fault::Rest | Fault::Work => {}
            Fault::JumpEverywhere(by_ms) => self.clocks.iter().for_each(|clock| clock.jump_ms(by_ms)),
        }
    }
}

/// What clients share.
#[derive(Clone)]
struct Clients {
    channels: Vec<Channel>,
    clock: RunClock,
    recorder: Arc<Recorder>,
    stop: Arc<AtomicBool>,
    numbers: Arc<AtomicU64>,
    logs: Logs,
    /// Acked and not yet delivered, by count.
    acked: Arc<AtomicU64>,
    delivered: Arc<std::sync::Mutex<BTreeMap<String, bool>>>,
    ttl_secs: u32,
    away: Option<u64>,
    /// Sent to the device that is away.
    left_behind: Arc<AtomicU64>,
}

impl Clients {
    fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::SeqCst)
    }

    fn record(&self, what: What) {
        self.recorder.record(self.clock.secs(), what);
    }

    fn has_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Ops that were acked and have not arrived.
    fn outstanding(&self) -> usize {
        self.delivered.lock().unwrap().values().filter(|arrived| !**arrived).count()
    }

    /// Until so many sends were acked, or patience is at its end.
    fn wait_acked(&self, count: u64) {
        let begun = RunClock::begin();
        while self.acked.load(Ordering::SeqCst) < count && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn payload(&self, op: &str) -> Bytes {
        let mut payload = op.as_bytes().to_vec();
        if self.logs == Logs::Short {
            payload.resize(LARGE, b' ');
        }
        payload.into()
    }

    fn queue(&self, node: usize) -> QueueClient<Channel> {
        QueueClient::new(self.channels[node].clone())
    }

    /// Has one operation answered, wherever the leader is; `None` when that took too long: its outcome is not known.
    async fn answered(&self, node: &mut usize, shard: u32, kind: operation::Kind) -> Option<answer::Kind> {
        let (number, mut first_try_ms, mut id) = (self.number(), 0, Bytes::new());
        let begun = RunClock::begin();
        while begun.elapsed() < PATIENCE {
            let operation = Operation { id: id.clone(), first_try_ms, kind: Some(kind.clone()) };
            let tried = timeout(
                STEP_MAX,
                self.once(*node, Batch { call: number, shard, epoch: 1, operations: vec![operation] }),
            );
            if let Ok(Some((time_ms, outcome))) = tried.await {
                match outcome {
                    Outcome::Answers(answers) => return answers.answers.into_iter().next()?.kind,
                    Outcome::Refused(_) if first_try_ms == 0 && time_ms > 0 => {
                        first_try_ms = time_ms;
                        let micros = (time_ms * 1_000).to_be_bytes();
                        id = [micros, number.to_be_bytes()].concat().into();
                        continue;
                    }
                    Outcome::Refused(_) | Outcome::Redirect(_) | Outcome::Unknown(_) => {}
                }
            }
            *node = (*node + 1) % NODES;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        None
    }

    async fn once(&self, node: usize, batch: Batch) -> Option<(u64, Outcome)> {
        let (batches, requests) = mpsc::channel(1);
        batches.send(SubmitRequest { batches: vec![batch] }).await.ok()?;
        let mut replies: Streaming<SubmitReply> =
            self.queue(node).submit(ReceiverStream::new(requests)).await.ok()?.into_inner();
        let reply = replies.message().await.ok()??.replies.into_iter().next()?;
        Some((reply.shard_time_ms, reply.outcome?))
    }

    async fn send_all(self, sender: u64) {
        let mut node = 0;
        let mut n = 0;
        while !self.has_stopped() {
            let device = 1 + n % DEVICES;
            let op = format!("{sender}-{n}");
            n += 1;
            if self.away == Some(device) && self.left_behind.fetch_add(1, Ordering::SeqCst) >= LEFT_BEHIND_MAX {
                tokio::time::sleep(Duration::from_millis(1)).await;
                continue;
            }
            self.record(What::SendInvoked {
                op: op.clone(),
                token: name(device),
                tenant: SENDER.into(),
                ttl: Some(f64::from(self.ttl_secs)),
                collapse_key: None,
                priority: None,
                receipt: None,
                sha: None,
            });
            let enqueue = Enqueue {
                device_tag: device,
                registration_id: registration(device),
                sender: SENDER.into(),
                wire_from: SENDER.into(),
                ttl_secs: self.ttl_secs,
                payload: self.payload(&op),
                ..Enqueue::default()
            };
            match self.answered(&mut node, shard(device), operation::Kind::Enqueue(enqueue)).await {
                Some(answer::Kind::Accepted(_)) => {
                    self.delivered.lock().unwrap().entry(op.clone()).or_insert(false);
                    self.record(What::SendAcked { op, message_id: None });
                    self.acked.fetch_add(1, Ordering::SeqCst);
                }
                Some(other) => panic!("op {op} was answered {other:?}"),
                None => self.record(What::SendUnknown { op, error: None }),
            }
            // Room for devices to keep up: a hundred unread messages are the limit.
            while self.outstanding() > 50 && !self.has_stopped() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }

    async fn read_all(self, device: u64, end: CancellationToken) {
        let mut node = 0;
        while !end.is_cancelled() {
            let session = format!("{device}-{}", self.number());
            if let Ok(Some(attached)) = timeout(STEP_MAX, Attached::at(&self, node, device)).await {
                self.record(What::Connected { device: name(device), session: Some(session.clone()) });
                attached.read(&self, device, &session, &end).await;
                self.record(What::Disconnected { device: name(device), session: Some(session) });
            }
            node = (node + 1) % NODES;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn name(device: u64) -> String {
    format!("device-{device}")
}

fn shard(device: u64) -> u32 {
    u32::try_from(device).unwrap() % SHARDS
}

fn registration(device: u64) -> Bytes {
    [device.to_be_bytes(), [5; 8]].concat().into()
}

fn register(device: u64) -> operation::Kind {
    operation::Kind::Register(Register {
        device_tag: device,
        registration_id: registration(device),
        token_key_id: 1,
        application: "com.example.app".into(),
        senders: vec![SENDER.into()],
        scope: "GCM".into(),
        iid: "fXk2_abcdeF".into(),
        ..Register::default()
    })
}

/// A device's streams at the node that led its shard when it attached.
struct Attached {
    control: mpsc::Sender<ControlRequest>,
    replies: Streaming<ControlReply>,
    credit: mpsc::Sender<DeliverRequest>,
    deliveries: Streaming<DeliverReply>,
    attach: u64,
}

impl Attached {
    async fn at(clients: &Clients, node: usize, device: u64) -> Option<Self> {
        let attach = clients.number();
        let hello = Hello { gateway: [[9; 8], attach.to_be_bytes()].concat().into(), link: 0 };
        let (control, requests) = mpsc::channel(64);
        control.send(ControlRequest { kind: Some(control_request::Kind::Hello(hello.clone())) }).await.ok()?;
        let mut replies = clients.queue(node).control(ReceiverStream::new(requests)).await.ok()?.into_inner();
        let (credit, requests) = mpsc::channel(64);
        credit.send(DeliverRequest { kind: Some(deliver_request::Kind::Hello(hello)) }).await.ok()?;
        let room = deliver_request::Kind::StreamCredit(StreamCredit { bytes: 1 << 30 });
        credit.send(DeliverRequest { kind: Some(room) }).await.ok()?;
        let deliveries = clients.queue(node).deliver(ReceiverStream::new(requests)).await.ok()?.into_inner();
        let asked = Attach { attach, device_tag: device, credit_bytes: 1 << 20, ..Attach::default() };
        let batch = control_request::Kind::Attach(AttachBatch { shard: shard(device), attaches: vec![asked] });
        control.send(ControlRequest { kind: Some(batch) }).await.ok()?;
        match replies.message().await.ok()??.kind? {
            control_reply::Kind::Attached(_) => Some(Self { control, replies, credit, deliveries, attach }),
            _ => None,
        }
    }

    /// Until the streams end, or nothing has come for a while: the leader may have lost its place.
    async fn read(mut self, clients: &Clients, device: u64, session: &str, end: &CancellationToken) {
        let mut unconfirmed: BTreeMap<u64, String> = BTreeMap::new();
        loop {
            tokio::select! {
                reply = self.deliveries.message() => match reply {
                    Ok(Some(DeliverReply { kind: Some(deliver_reply::Kind::Delivery(delivery)) })) => {
                        let Some((ack, op)) = self.take(clients, device, session, delivery).await else { return };
                        unconfirmed.insert(ack, op);
                    }
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => return,
                },
                reply = self.replies.message() => match reply {
                    Ok(Some(ControlReply { kind: Some(control_reply::Kind::Acked(acked)) })) => {
                        for op in acked.acks.iter().filter_map(|ack| unconfirmed.remove(ack)) {
                            let (device, confirmed) = (name(device), Some(true));
                            clients.record(What::DeviceAcked { device, op: Some(op), message_id: None, confirmed });
                        }
                    }
                    Ok(Some(_)) | Ok(None) | Err(_) => return,
                },
                () = tokio::time::sleep(Duration::from_millis(1_500)) => return,
                () = end.cancelled() => return,
            }
        }
    }

    async fn take(&self, clients: &Clients, device: u64, session: &str, delivery: Delivery) -> Option<(u64, String)> {
        let payload = delivery.message?.payload;
        let op = std::str::from_utf8(&payload).unwrap().trim_end().to_owned();
        clients.record(What::Delivered {
            device: name(device),
            op: Some(op.clone()),
            message_id: None,
            tenant: None,
            app: None,
            token: None,
            session: Some(session.to_owned()),
            sha: None,
        });
        clients.delivered.lock().unwrap().insert(op.clone(), true);
        let ack = clients.number();
        let (shard, sequence) = (shard(device), delivery.sequence);
        let written =
            Written { shard, attach: self.attach, through: sequence.clone(), credit_bytes: delivery.cost_bytes };
        self.credit.send(DeliverRequest { kind: Some(deliver_request::Kind::Written(written)) }).await.ok()?;
        let acked = Ack { ack, shard, device_tag: device, sequences: vec![sequence], message_ids: vec![] };
        self.control.send(ControlRequest { kind: Some(control_request::Kind::Ack(acked)) }).await.ok()?;
        Some((ack, op))
    }
}

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn promise_1_promise_2_promise_3_promise_4_faults_from_a_seed_lose_nothing_and_keep_the_order_core() {
    let (first, seeds) = (from_environment("MARTLET_FAULT_SEED", 1), from_environment("MARTLET_FAULT_SEEDS", 3));
    for seed in first..first + seeds {
        run(seed, Play { called: "mixed", steps: plan(seed), ttl_secs: 86_400, away: None, logs: Logs::Long });
    }
}

#[test]
fn promise_2_promise_3_promise_4_nodes_that_restart_while_clocks_are_wrong_end_no_time_to_live_core() {
    let (first, seeds) = (from_environment("MARTLET_FAULT_SEED", 1), from_environment("MARTLET_FAULT_SEEDS", 2));
    for seed in first..first + seeds {
        run(seed, Play { called: "jumps", steps: jumps(seed), ttl_secs: 1_800, away: Some(DEVICES), logs: Logs::Long });
    }
}

#[test]
fn promise_1_promise_2_promise_4_faults_from_a_seed_lose_nothing_while_nodes_come_back_to_snapshots_core() {
    let (first, seeds) = (from_environment("MARTLET_FAULT_SEED", 1), from_environment("MARTLET_FAULT_SEEDS", 2));
    let snapshots: u64 = (first..first + seeds)
        .map(|seed| {
            run(
                seed,
                Play { called: "short-logs", steps: absences(seed), ttl_secs: 86_400, away: None, logs: Logs::Short },
            )
        })
        .sum();
    assert!(snapshots > 0 || seeds == 1, "no node came back to a snapshot: the play shows nothing of them");
}

/// Plays, judges, and says how many snapshots nodes took in.
#[expect(clippy::print_stdout, reason = "the line that repeats the run")]
fn run(seed: u64, play: Play) -> u64 {
    let Play { called, steps, ttl_secs, away, logs } = play;
    println!("repeat with MARTLET_FAULT_SEED={seed} MARTLET_FAULT_SEEDS=1: {steps:?}");
    let outside = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let history = std::env::temp_dir().join(format!("martlet-faults-{}-{called}-{seed}.jsonl", std::process::id()));
    let mut world = World::new(logs);
    let clients = outside.block_on(async {
        world.nodes.create(1, SHARDS).await.unwrap();
        Clients {
            channels: (1..=NODES).map(|id| world.nodes.channel(id)).collect(),
            clock: RunClock::begin(),
            recorder: Arc::new(Recorder::new(Some(&history)).unwrap()),
            stop: Arc::default(),
            logs,
            numbers: Arc::new(AtomicU64::new(1)),
            acked: Arc::default(),
            delivered: Arc::default(),
            ttl_secs,
            away,
            left_behind: Arc::default(),
        }
    });
    let end = CancellationToken::new();
    let mut tasks = Vec::new();
    for device in 1..=DEVICES {
        let registered = outside.block_on(clients.answered(&mut 0, shard(device), register(device)));
        assert!(matches!(registered, Some(answer::Kind::Registered(_))), "{registered:?}");
        let (token, tenant) = (name(device), SENDER.into());
        clients.record(What::Register { token, device: name(device), tenant, app: None });
        if away != Some(device) {
            tasks.push(outside.spawn(clients.clone().read_all(device, end.clone())));
        }
    }
    let senders: Vec<_> = (0..SENDERS).map(|sender| outside.spawn(clients.clone().send_all(sender))).collect();

    for (fault, pause) in steps {
        world.suffer(fault);
        std::thread::sleep(pause);
        let away = logs == Logs::Short && matches!(fault, Fault::Kill(_) | Fault::PowerLoss(..) | Fault::Work);
        if !away {
            (1..=NODES).for_each(|id| world.start(id));
        }
        let more = match fault {
            Fault::Rest => RESTED,
            Fault::Work => WORK,
            _ => 0,
        };
        clients.wait_acked(clients.acked.load(Ordering::SeqCst) + more);
    }
    (1..=NODES).for_each(|id| world.start(id));
    world.heal_all();
    // A plan may leave no quorum for most of it: what is sent afterwards shows that the nodes go on.
    clients.wait_acked(ACKED_MIN);
    tasks.extend(away.map(|device| outside.spawn(clients.clone().read_all(device, end.clone()))));
    clients.stop.store(true, Ordering::SeqCst);
    outside.block_on(async {
        for sender in senders {
            sender.await.unwrap();
        }
        let drained = RunClock::begin();
        while clients.outstanding() > 0 && drained.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        end.cancel();
        for task in tasks {
            task.await.unwrap();
        }
    });
    clients.record(What::End {});
    for id in 1..=NODES {
        world.crash(id, ForgetfulDisk::restart);
    }
    let Clients { recorder, acked, .. } = clients;
    let events = Arc::into_inner(recorder).unwrap().finish().unwrap();
    let terms = Terms { acked_min: 40, delivered_min: 40, settle_secs: f64::MAX, ..Terms::default() };
    let verdict = ledger::judge(&events, &terms);
    let all: Vec<_> = verdict.violations.iter().take(20).map(ToString::to_string).collect();
    assert!(all.is_empty(), "seed {seed}, history {}:\n{}", history.display(), all.join("\n"));
    std::fs::remove_file(&history).unwrap();
    println!(
        "seed {seed}: {} acked, {} unknown, {} duplicates, {} snapshots",
        acked.load(Ordering::SeqCst),
        verdict.unknown,
        verdict.duplicates,
        world.snapshots(),
    );
    world.snapshots()
}
