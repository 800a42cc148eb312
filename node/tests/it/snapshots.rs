//! Nodes that were away until the others' logs were purged, and nodes whose sled is damaged: brought up by base files.
//!
//! Each node runs on a runtime of its own, over a forgetful disk (sled apart, which is a real file), so that it can be ended where
//! it stands.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use martlet_node::{
    Node, Started, Surroundings,
    clock::SystemClock,
    disk::forgetful::ForgetfulDisk,
    metrics::{GroupLabel, TransferLabel, TransferWay},
    raft::{DirectLinks, links::cuttable::Wiring},
};
use martlet_proto::cluster::queue::{
    Batch, Enqueue, Operation, Register, SubmitRequest, answer, batch_reply::Outcome, operation,
    queue_client::QueueClient,
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::mpsc,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::nodes::{Nodes, until};

const SENDER: &str = "100000000001";
const SHARD: GroupLabel = GroupLabel { group: 1 };
/// Their mailboxes together are a base of many chunks.
const DEVICES: u64 = 8;
const PAYLOAD: usize = 4_000;
/// Longest anything is waited for; a bound for a broken run, not a promise.
const PATIENCE: Duration = Duration::from_secs(120);
const RECEIVED: TransferLabel = TransferLabel { way: TransferWay::Received };
const SENT: TransferLabel = TransferLabel { way: TransferWay::Sent };

struct World {
    nodes: Nodes,
    wiring: Wiring,
    disks: Vec<ForgetfulDisk>,
    running: Vec<Option<Running>>,
}

struct Running {
    runtime: Runtime,
    started: Started,
    drain: CancellationToken,
    ended: tokio::task::JoinHandle<Result<(), martlet_node::NodeError>>,
}

impl World {
    fn new(count: usize) -> Self {
        let mut world = World {
            nodes: Nodes::new(count),
            wiring: Wiring::new(Arc::new(DirectLinks)),
            disks: (0..count).map(|_| ForgetfulDisk::new()).collect(),
            running: (0..count).map(|_| None).collect(),
        };
        (1..=count).for_each(|id| world.start(id));
        world
    }

    fn start(&mut self, id: usize) {
        let mut config = self.nodes.config(id);
        config.log.segment_bytes = 1 << 20;
        config.log.checkpoint_bytes = 2 << 20;
        config.log.kept_bytes_max = 64 << 20;
        config.raft.kept_entries = 0;
        config.store.checkpoint_age = Duration::from_millis(500);
        config.store.base_log_bytes_min = 256 << 10;
        let around = Surroundings {
            disk: Arc::new(self.disks[id - 1].clone()),
            clock: Arc::new(SystemClock),
            links: self.wiring.of(id as u64),
            ..Surroundings::default()
        };
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let node = runtime.block_on(async {
            let mut refused = None;
            for _ in 0..400 {
                match Node::start_in(config.clone(), around.clone()).await {
                    Ok(node) => return node,
                    // What the one before held is let go of a moment later.
                    Err(error) => refused = Some(error),
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            panic!("node {id} does not start again: {}", refused.unwrap());
        });
        let (started, drain) = (node.started(), CancellationToken::new());
        let ended = runtime.spawn(node.run(drain.clone()));
        self.running[id - 1] = Some(Running { runtime, started, drain, ended });
    }

    fn stop(&mut self, id: usize) {
        let Running { runtime, started, drain, ended } = self.running[id - 1].take().unwrap();
        drop(started);
        drain.cancel();
        runtime.block_on(ended).unwrap().unwrap();
    }

    /// Ends a node where it stands, as kill -9 does.
    fn kill(&mut self, id: usize) {
        let Running { runtime, .. } = self.running[id - 1].take().unwrap();
        runtime.shutdown_background();
        let old = std::mem::replace(&mut self.disks[id - 1], ForgetfulDisk::new());
        self.disks[id - 1] = old.restart();
        old.release();
    }

    fn stop_all(&mut self) {
        (1..=self.running.len()).for_each(|id| self.stop(id));
    }

    fn started(&self, id: usize) -> &Started {
        &self.running[id - 1].as_ref().unwrap().started
    }

    fn purged(&self, id: usize) -> i64 {
        self.started(id).metrics.purged.get_or_create(&SHARD).get()
    }

    fn applied(&self, id: usize) -> i64 {
        self.started(id).metrics.applied.get_or_create(&SHARD).get()
    }

    fn received(&self, id: usize) -> u64 {
        self.started(id).metrics.snapshots.get_or_create(&RECEIVED).get()
    }

    fn sled(&self, id: usize) -> PathBuf {
        self.nodes.data(id).join("store/sled/db")
    }

    async fn ready(&self, id: usize) {
        until(&format!("node {id} is ready"), async || self.started(id).readiness().ready).await;
    }

    async fn leader(&self) -> usize {
        let leads = |id: &usize| {
            self.running[id - 1].is_some()
                && self
                    .started(*id)
                    .status()
                    .iter()
                    .any(|group| group.group == 1 && group.leader_replica == group.replica_id)
        };
        until("shard 0 has a leader", async || (1..=self.running.len()).any(|id| leads(&id))).await;
        (1..=self.running.len()).find(leads).unwrap()
    }

    /// What every node says of its replicas, for a failure.
    fn story(&self) -> String {
        let told = |id: usize| {
            let started = self.running[id - 1].as_ref().map(|running| &running.started);
            let metrics = started.map(|started| &started.metrics);
            let count = |way| {
                metrics.map(|m| (m.snapshots.get_or_create(way).get(), m.snapshot_failures.get_or_create(way).get()))
            };
            let under_way = metrics.map(|m| m.snapshots_under_way.get_or_create(&RECEIVED).get());
            format!(
                "node {id}: purged {:?}, received {:?}, sent {:?}, under way {under_way:?}, {:?}\n{:#?}",
                metrics.map(|m| m.purged.get_or_create(&SHARD).get()),
                count(&RECEIVED),
                count(&SENT),
                started.map(|started| started.readiness().checks),
                started.map(Started::status),
            )
        };
        (1..=self.running.len()).map(told).collect::<Vec<_>>().join("\n")
    }

    /// Waits until all replicas of both groups are at one index with one state.
    async fn alike(&self) {
        let alike = || {
            [0, 1].into_iter().all(|group| {
                let found: Vec<_> = (1..=self.running.len())
                    .filter_map(|id| self.started(id).status().into_iter().find(|status| status.group == group))
                    .map(|status| (status.applied_index, status.state_hash, status.stopped))
                    .collect();
                found.len() == self.running.len() && found.iter().all(|one| *one == found[0] && one.2.is_empty())
            })
        };
        let waiting = async {
            while !alike() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        assert!(timeout(PATIENCE, waiting).await.is_ok(), "the replicas are not alike:\n{}", self.story());
    }
}

/// Sends operations to whoever leads.
struct Load {
    at: usize,
    time_ms: u64,
    drawn: u64,
}

impl Load {
    fn new() -> Self {
        Load { at: 1, time_ms: 0, drawn: 0 }
    }

    /// One try at one node; the next is at another if this one does not answer.
    async fn try_once(&mut self, world: &World, kinds: &[operation::Kind]) -> Option<Vec<answer::Kind>> {
        let of = world.running.len();
        let outcome = timeout(Duration::from_secs(5), self.once(world, kinds)).await.ok().flatten();
        match outcome {
            Some(Outcome::Answers(answers)) => answers.answers.into_iter().map(|answer| answer.kind).collect(),
            _ => {
                self.at = 1 + self.at % of;
                tokio::time::sleep(Duration::from_millis(10)).await;
                None
            }
        }
    }

    async fn once(&mut self, world: &World, kinds: &[operation::Kind]) -> Option<Outcome> {
        let (batches, requests) = mpsc::channel(2);
        let mut queue = QueueClient::new(world.nodes.channel(self.at));
        let mut outcome = None;
        let mut replies = queue.submit(ReceiverStream::new(requests)).await.ok()?.into_inner();
        // The first teaches the time, if it was not known.
        for call in 0..2 {
            let operations = kinds.iter().map(|kind| {
                self.drawn += 1;
                let id = [(self.time_ms * 1_000).to_be_bytes(), self.drawn.to_be_bytes()].concat();
                Operation { id: id.into(), first_try_ms: self.time_ms, kind: Some(kind.clone()) }
            });
            let batch = Batch { call, shard: 0, epoch: 1, operations: operations.collect() };
            batches.send(SubmitRequest { batches: vec![batch] }).await.ok()?;
            let reply = replies.message().await.ok()??.replies.into_iter().next()?;
            self.time_ms = self.time_ms.max(reply.shard_time_ms);
            outcome = reply.outcome;
            if matches!(outcome, Some(Outcome::Answers(_))) {
                break;
            }
        }
        outcome
    }

    async fn done(&mut self, world: &World, kinds: &[operation::Kind]) -> Vec<answer::Kind> {
        let answered = async {
            loop {
                if let Some(answers) = self.try_once(world, kinds).await {
                    return answers;
                }
            }
        };
        timeout(Duration::from_secs(60), answered).await.expect("shard 0 answers")
    }

    async fn register(&mut self, world: &World) {
        for device in 1..=DEVICES {
            let answers = self.done(world, &[register(device)]).await;
            assert!(matches!(answers[0], answer::Kind::Registered(_)), "{answers:?}");
        }
    }

    /// A round of messages, one for each device.
    async fn round(&mut self, world: &World) {
        let fill = self.drawn as u8;
        let kinds: Vec<_> = (1..=DEVICES).map(|device| enqueue(device, fill)).collect();
        self.try_once(world, &kinds).await;
    }

    async fn until(&mut self, world: &World, what: &str, holds: impl Fn() -> bool) {
        let loading = async {
            while !holds() {
                self.round(world).await;
            }
        };
        assert!(timeout(PATIENCE, loading).await.is_ok(), "waited in vain until {what}:\n{}", world.story());
    }
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

fn enqueue(device: u64, fill: u8) -> operation::Kind {
    operation::Kind::Enqueue(Enqueue {
        device_tag: device,
        registration_id: registration(device),
        sender: SENDER.into(),
        wire_from: SENDER.into(),
        ttl_secs: 86_400,
        payload: vec![fill; PAYLOAD].into(),
        ..Enqueue::default()
    })
}

fn outside() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Three nodes, of which the third was away, stopped, until the others' logs had forgotten what it lacks.
fn one_left_behind(outside: &Runtime) -> (World, Load) {
    let mut world = World::new(3);
    let mut load = Load::new();
    outside.block_on(async {
        world.nodes.create(1, 1).await.unwrap();
        for id in 1..=3 {
            world.ready(id).await;
        }
        load.register(&world).await;
        load.round(&world).await;
    });
    world.stop(3);
    let last = world.applied(1).max(world.applied(2)) + 20;
    outside.block_on(async {
        world.nodes.create_project(1, SENDER).await.unwrap();
        load.until(&world, "the logs are purged", || world.purged(1) > last && world.purged(2) > last).await;
    });
    (world, load)
}

#[test]
fn promise_4_a_node_that_was_away_until_the_log_was_purged_is_brought_up_under_load_and_is_like_the_others() {
    let outside = outside();
    let (mut world, mut load) = one_left_behind(&outside);
    world.start(3);
    outside.block_on(async {
        load.until(&world, "a snapshot is taken", || world.received(3) > 0).await;
        // It goes on from there by the log, under load.
        let reached = world.applied(1).max(world.applied(2));
        load.until(&world, "it has caught up", || world.applied(3) > reached).await;
        world.alike().await;
        let sent: u64 = (1..=2).map(|id| world.started(id).metrics.snapshots.get_or_create(&SENT).get()).sum();
        assert!(sent > 0);
        world.nodes.knows_projects(3, 1).await;
    });
    // It is durable: what it holds comes back, and it needs no other.
    world.stop(3);
    world.start(3);
    outside.block_on(async {
        world.ready(3).await;
        load.round(&world).await;
        world.alike().await;
        assert_eq!(world.received(3), 0, "it had all it needs");
    });
    world.stop_all();
}

#[test]
fn promise_4_a_snapshot_whose_sender_goes_is_begun_anew_by_the_next_leader() {
    let outside = outside();
    let (mut world, mut load) = one_left_behind(&outside);
    // Everything is taken, and nothing of it can be synced.
    world.start(3);
    world.disks[2].hold();
    outside.block_on(until("a snapshot is under way", async || {
        world.started(3).metrics.snapshots_under_way.get_or_create(&RECEIVED).get() > 0
    }));
    let first = outside.block_on(world.leader());
    world.stop(first);
    world.disks[2].release();
    outside.block_on(async {
        load.until(&world, "a snapshot is taken", || world.received(3) > 0).await;
    });
    world.start(first);
    outside.block_on(async {
        world.ready(first).await;
        load.round(&world).await;
        world.alike().await;
    });
    world.stop_all();
}

#[test]
fn promise_4_a_node_that_is_killed_in_the_middle_of_a_snapshot_takes_it_again() {
    let outside = outside();
    let (mut world, mut load) = one_left_behind(&outside);
    world.start(3);
    world.disks[2].hold();
    outside.block_on(until("a snapshot is under way", async || {
        world.started(3).metrics.snapshots_under_way.get_or_create(&RECEIVED).get() > 0
    }));
    world.kill(3);
    world.start(3);
    outside.block_on(async {
        load.until(&world, "it has caught up", || world.applied(3) > world.purged(1).max(world.purged(2))).await;
        world.alike().await;
    });
    world.stop_all();
}

#[test]
fn promise_5_a_node_whose_sled_is_damaged_makes_its_rows_again_from_base_and_log() {
    let outside = outside();
    let mut world = World::new(3);
    let mut load = Load::new();
    outside.block_on(async {
        world.nodes.create(1, 1).await.unwrap();
        for id in 1..=3 {
            world.ready(id).await;
        }
        load.register(&world).await;
        load.until(&world, "the log is purged", || world.purged(2) > 20).await;
        // Checkpoints go on behind the base, for little that is written, and with each the log is purged to what may go.
        let metrics = &world.started(2).metrics;
        let checkpoints = metrics.checkpoints.get();
        while metrics.checkpoints.get() < checkpoints + 4 {
            load.done(&world, &[register(1)]).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        world.alike().await;
    });
    world.stop(2);
    let mut bytes = std::fs::read(world.sled(2)).unwrap();
    let len = bytes.len();
    bytes[len / 16..].fill(0xa5);
    std::fs::write(world.sled(2), bytes).unwrap();
    world.start(2);
    outside.block_on(async {
        until("the node is ready or says why not", async || {
            let readiness = world.started(2).readiness();
            let refused =
                readiness.checks.iter().any(|(_, found)| found.as_ref().is_err_and(|why| why.contains("; shard")));
            readiness.ready || refused
        })
        .await;
        let readiness = world.started(2).readiness();
        assert!(readiness.ready, "{:?}", readiness.checks);
        load.round(&world).await;
        world.alike().await;
        assert_eq!(world.received(2), 0, "base and log are enough");
    });
    world.stop_all();
}
