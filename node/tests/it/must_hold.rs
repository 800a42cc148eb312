//! What must hold of a node, shown on a whole one: its log's syncs, full disks, damaged and fallen-back files.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use martlet_node::{
    Surroundings,
    disk::{RealDisk, Space, forgetful::ForgetfulDisk},
    log::{GroupId, Log, LogConfig},
    metrics::{Mark, MarkLabel},
};
use martlet_proto::cluster::queue::{
    Answer, Batch, Check, Enqueue, Operation, Register, SubmitReply, SubmitRequest, answer, batch_reply::Outcome,
    operation, queue_client::QueueClient, refused::Reason,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::nodes::{Nodes, until};

const SENDER: &str = "100000000001";

/// Operations at node 1, many at a time.
struct Gateway {
    batches: mpsc::Sender<SubmitRequest>,
    replies: Streaming<SubmitReply>,
    time_ms: u64,
    drawn: u64,
}

impl Gateway {
    async fn open(nodes: &Nodes) -> Self {
        let (batches, requests) = mpsc::channel(8);
        let mut queue = QueueClient::new(nodes.channel(1));
        let replies = queue.submit(ReceiverStream::new(requests)).await.unwrap().into_inner();
        Self { batches, replies, time_ms: 0, drawn: 0 }
    }

    fn operation(&mut self, kind: operation::Kind) -> Operation {
        self.drawn += 1;
        let mut id = (self.time_ms * 1_000).to_be_bytes().to_vec();
        id.extend(self.drawn.to_be_bytes());
        Operation { id: id.into(), first_try_ms: self.time_ms, kind: Some(kind) }
    }

    /// One frame; batch n has call n.
    async fn send(&self, batches: Vec<(u32, Vec<Operation>)>) {
        let batch = |(call, (shard, operations))| Batch { call, shard, epoch: 1, operations };
        let batches = (0..).zip(batches).map(batch).collect();
        self.batches.send(SubmitRequest { batches }).await.unwrap();
    }

    /// Outcomes of the next `count` batches, by call.
    async fn outcomes(&mut self, count: usize) -> Vec<Outcome> {
        let mut found = Vec::new();
        while found.len() < count {
            for reply in self.replies.message().await.unwrap().unwrap().replies {
                self.time_ms = self.time_ms.max(reply.shard_time_ms);
                found.push((reply.call, reply.outcome.unwrap()));
            }
        }
        found.sort_by_key(|(call, _)| *call);
        found.into_iter().map(|(_, outcome)| outcome).collect()
    }

    async fn one(&mut self, shard: u32, kinds: Vec<operation::Kind>) -> Outcome {
        let operations = kinds.into_iter().map(|kind| self.operation(kind)).collect();
        self.send(vec![(shard, operations)]).await;
        self.outcomes(1).await.remove(0)
    }

    /// Registers the device of each shard; tried until each has a leader.
    async fn register(&mut self, shards: u32) {
        for shard in 0..shards {
            for device in [device(shard), device(shard) + 1] {
                let registered = async {
                    while !accepted(&self.one(shard, vec![register(device)]).await) {
                        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    }
                };
                tokio::time::timeout(std::time::Duration::from_secs(60), registered).await.expect("a leader");
            }
        }
    }
}

fn accepted(outcome: &Outcome) -> bool {
    let good = |answer: &Answer| matches!(answer.kind, Some(answer::Kind::Accepted(_) | answer::Kind::Registered(_)));
    matches!(outcome, Outcome::Answers(answers) if answers.answers.iter().all(good))
}

fn refused(outcome: &Outcome) -> Option<Reason> {
    if let Outcome::Refused(refused) = outcome { Some(refused.reason()) } else { None }
}

/// A node takes any device in any shard: which one it belongs to is for gateways to know.
fn device(shard: u32) -> u64 {
    1_000 * (1 + u64::from(shard))
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

fn enqueue(device: u64, payload: Vec<u8>) -> operation::Kind {
    operation::Kind::Enqueue(Enqueue {
        device_tag: device,
        registration_id: registration(device),
        sender: SENDER.into(),
        wire_from: SENDER.into(),
        ttl_secs: 86_400,
        payload: payload.into(),
        ..Enqueue::default()
    })
}

fn check(device: u64) -> operation::Kind {
    operation::Kind::Check(Check {
        device_tag: device,
        registration_id: registration(device),
        sender: SENDER.into(),
        restricted_package_name: String::new(),
    })
}

/// A cluster of one whose log lies on `disk`.
async fn alone_on(disk: &ForgetfulDisk, shards: u32) -> Nodes {
    let mut nodes = Nodes::new(1);
    start_on(&mut nodes, disk).await;
    nodes.create(1, shards).await.unwrap();
    nodes.ready(1).await;
    nodes
}

async fn start_on(nodes: &mut Nodes, disk: &ForgetfulDisk) {
    let mut config = nodes.config(1);
    config.log.segment_bytes = 1 << 20;
    let surroundings = Surroundings { disk: Arc::new(disk.clone()), ..Surroundings::default() };
    nodes.start_in(1, config, surroundings).await.unwrap();
}

/// The disk holds back its syncs until the node has all sends, so that nothing depends on how fast the machine is: what was
/// proposed before waits in the writer's queue, and the rest is packed.
#[tokio::test(flavor = "multi_thread")]
async fn must_hold_16_groups_under_1_000_concurrent_sends_take_fewer_than_100_fdatasync_calls() {
    let disk = ForgetfulDisk::new();
    let mut nodes = alone_on(&disk, 16).await;
    let mut gateway = Gateway::open(&nodes).await;
    gateway.register(16).await;
    let syncs = || nodes.started(1).metrics.log_fdatasyncs.get();

    disk.hold();
    let before = syncs();
    let sends = (0..1_000_u32).map(|n| (n % 16, vec![gateway.operation(enqueue(device(n % 16), b"now".to_vec()))]));
    let sends = sends.collect();
    gateway.send(sends).await;
    // Answered without the log, and behind the sends on the same stream: the node has them all.
    let behind = vec![gateway.operation(check(device(0)))];
    gateway
        .batches
        .send(SubmitRequest { batches: vec![Batch { call: 1_000, shard: 0, epoch: 1, operations: behind }] })
        .await
        .unwrap();
    let first = gateway.replies.message().await.unwrap().unwrap().replies;
    assert_eq!(
        first.iter().map(|reply| reply.call).collect::<Vec<_>>(),
        [1_000],
        "no send is answered before its sync"
    );
    assert_eq!(syncs(), before);
    disk.release();
    let outcomes = gateway.outcomes(1_000).await;
    assert!(outcomes.iter().all(accepted));
    let took = syncs() - before;
    assert!(took < 100, "{took} syncs");
    drop(gateway);
    nodes.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn must_hold_on_a_full_disk_sends_are_refused_nothing_acknowledged_is_lost_and_room_is_found_again() {
    let disk = ForgetfulDisk::new();
    let mut nodes = alone_on(&disk, 1).await;
    let mut gateway = Gateway::open(&nodes).await;
    gateway.register(1).await;
    let (filler, kept) = (device(0), device(0) + 1);
    disk.fill(true);
    let mut acknowledged = 0_u8;
    let reason = loop {
        // The filler's own mailbox overflows; the log is what fills.
        let mut kinds: Vec<_> = (0..60).map(|_| enqueue(filler, vec![b'x'; 4_000])).collect();
        kinds.push(enqueue(kept, vec![acknowledged]));
        let outcome = gateway.one(0, kinds).await;
        if let Some(reason) = refused(&outcome) {
            break reason;
        }
        assert!(matches!(outcome, Outcome::Answers(_)), "{outcome:?}");
        acknowledged += 1;
        assert!(acknowledged < 90, "the log does not fill");
    };
    assert_eq!(reason, Reason::Overloaded);
    assert!(acknowledged > 0);

    // Nothing is written meanwhile, as nothing is taken; the log looks for room by itself.
    disk.fill(false);
    let goes_on = async {
        while !accepted(&gateway.one(0, vec![enqueue(kept, vec![acknowledged])]).await) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), goes_on).await.expect("the node takes sends again");
    drop(gateway);
    nodes.stop_all().await;

    start_on(&mut nodes, &disk).await;
    nodes.ready(1).await;
    let waiting = crate::serving::payloads(&nodes, kept, usize::from(acknowledged) + 1).await;
    assert_eq!(waiting, (0..=acknowledged).map(|n| vec![n]).collect::<Vec<_>>());
    nodes.stop_all().await;
}

/// Sends until the answer is as wanted: what is short is looked at once a second.
async fn until_sent(gateway: &mut Gateway, wanted: impl Fn(&Outcome) -> bool) {
    let wait = async {
        loop {
            let outcome = gateway.one(0, vec![enqueue(device(0), b"x".to_vec())]).await;
            if wanted(&outcome) {
                return;
            }
            assert!(accepted(&outcome) || refused(&outcome) == Some(Reason::Overloaded), "{outcome:?}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), wait).await.expect("an answer as wanted");
}

#[tokio::test(flavor = "multi_thread")]
async fn promise_6_below_the_disks_reserve_sends_and_registrations_are_refused_and_the_rest_goes_on() {
    let disk = ForgetfulDisk::new();
    let mut nodes = alone_on(&disk, 1).await;
    let mut gateway = Gateway::open(&nodes).await;
    gateway.register(1).await;
    until_sent(&mut gateway, accepted).await;
    let mark = MarkLabel { mark: Mark::Disk };
    assert_eq!(nodes.started(1).metrics.overloads.get_or_create(&mark).get(), 0);

    // Below the least reserve of 256 MiB.
    disk.set_space(Space { free: 200 << 20, total: 100 << 30 });
    until_sent(&mut gateway, |outcome| refused(outcome) == Some(Reason::Overloaded)).await;
    assert_eq!(refused(&gateway.one(0, vec![register(device(0) + 7)]).await), Some(Reason::Overloaded));
    assert!(accepted(&gateway.one(0, vec![check(device(0))]).await));
    assert!(nodes.started(1).metrics.overloads.get_or_create(&mark).get() >= 2);
    assert!(nodes.started(1).readiness().ready, "a full disk is no reason to restart a node");

    disk.set_space(Space { free: 50 << 30, total: 100 << 30 });
    until_sent(&mut gateway, accepted).await;
    drop(gateway);
    nodes.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn promise_6_at_the_memory_mark_sends_are_refused_until_a_checkpoint_has_made_room() {
    let mut nodes = Nodes::new(1);
    let mut config = nodes.config(1);
    config.store.budget_bytes = 64 << 10;
    nodes.start_as(1, config).await.unwrap();
    nodes.create(1, 1).await.unwrap();
    nodes.ready(1).await;
    let mut gateway = Gateway::open(&nodes).await;
    gateway.register(1).await;
    let mark = MarkLabel { mark: Mark::Memory };
    let full = async {
        loop {
            // More than all of it, unless a checkpoint comes between.
            let kinds = (0..40).map(|_| enqueue(device(0) + 1, vec![b'x'; 4_000])).collect();
            if refused(&gateway.one(0, kinds).await) == Some(Reason::Overloaded) {
                return;
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), full).await.expect("the memory is used up");
    assert!(nodes.started(1).metrics.overloads.get_or_create(&mark).get() > 0);
    until_sent(&mut gateway, accepted).await;
    drop(gateway);
    nodes.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_too_large_for_one_entry_is_refused_and_the_shard_goes_on() {
    let mut nodes = Nodes::created(1, 1).await;
    let mut gateway = Gateway::open(&nodes).await;
    gateway.register(1).await;
    let large = |count| (0..count).map(|_| enqueue(device(0), vec![b'x'; 4_096])).collect();
    let outcome = gateway.one(0, large(1_000)).await;
    assert_eq!(refused(&outcome), Some(Reason::Overloaded), "{outcome:?}");
    // What gateways send at most.
    let outcome = gateway.one(0, large(256)).await;
    assert!(matches!(outcome, Outcome::Answers(_)), "{outcome:?}");
    assert!(nodes.started(1).stopped().is_empty());
    drop(gateway);
    nodes.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_fell_back_behind_the_logs_purge_point_is_refused_with_both_numbers() {
    let mut nodes = Nodes::created(1, 1).await;
    let mut gateway = Gateway::open(&nodes).await;
    gateway.register(1).await;
    drop(gateway);
    nodes.stop(1).await;
    let (store, older) = (nodes.data(1).join("store"), nodes.path().join("older"));
    copy(&store, &older);
    nodes.start(1).await;
    nodes.ready(1).await;
    let mut gateway = Gateway::open(&nodes).await;
    gateway.register(1).await;
    drop(gateway);
    nodes.stop(1).await;
    let purged = purge_to_the_end(&nodes).await;
    nodes.start(1).await;
    nodes.ready(1).await;
    nodes.stop(1).await;

    fs::remove_dir_all(&store).unwrap();
    copy(&older, &store);
    nodes.start(1).await;
    let refusal =
        || nodes.started(1).readiness().checks.into_iter().find_map(|(_, found)| found.err()).unwrap_or_default();
    until("the replica is refused", async || refusal().contains("fallen back")).await;
    let why = refusal();
    assert!(why.contains(&format!("begins after index {purged}")), "{why}");
    assert!(
        why.contains("its store ends at index ") && why.contains(&nodes.data(1).join("log").display().to_string()),
        "{why}"
    );
    nodes.stop(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn promise_5_a_damaged_file_of_the_log_or_of_the_identity_is_refused_by_name() {
    let mut nodes = stopped_with_messages().await;
    let data = nodes.data(1);
    let mut damaged = vec![data.join("identity"), data.join("meta-state")];
    damaged.extend(segments(&data));
    for path in damaged {
        let whole = fs::read(&path).unwrap();
        let used = whole.iter().rposition(|byte| *byte != 0).unwrap() + 1;
        for tenth in [0, 3, 5, 8] {
            let at = used * tenth / 10;
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            fs::write(&path, bytes).unwrap();
            let name = path.file_name().unwrap().to_str().unwrap();
            let error = match nodes.start_as(1, nodes.config(1)).await {
                Ok(()) => panic!("{name} with a flipped bit at {at} is started from"),
                Err(error) => error.to_string(),
            };
            assert!(error.contains(name), "{name} at {at}: {error}");
            if path.starts_with(data.join("log")) {
                let said = error.split(&format!("{name}:")).nth(1).and_then(|rest| rest.split(':').next());
                let offset: usize = said.unwrap_or_default().parse().unwrap_or_else(|_| panic!("no offset: {error}"));
                assert!(offset <= at && at - offset < DRAIN_BYTES, "{name} at {at}: {error}");
            }
            fs::write(&path, &whole).unwrap();
        }
    }
    nodes.start(1).await;
    nodes.ready(1).await;
    assert_eq!(crate::serving::payloads(&nodes, device(0), 20).await.len(), 20);
    nodes.stop(1).await;
}

/// sled may fall back to what it had before; then the log makes up for it, or the node refuses. What it serves is right.
#[tokio::test(flavor = "multi_thread")]
async fn promise_5_a_damaged_file_of_sled_is_refused_or_made_up_for_and_never_served_wrong() {
    let mut nodes = stopped_with_messages().await;
    // The log holds everything: it makes up for what sled drops in silence.
    refusals(&mut nodes).await;
    purge_to_the_end(&nodes).await;
    assert!(refusals(&mut nodes).await > 0, "no flip met anything that is checked");
}

/// Flips a bit at sixteen places of sled's file, each on its own, then at many at once: how many of these the node refuses. The
/// others it serves right.
async fn refusals(nodes: &mut Nodes) -> usize {
    let data = nodes.data(1);
    let saved = nodes.path().join("saved");
    let _ = fs::remove_dir_all(&saved);
    copy(&data, &saved);
    let db = data.join("store/sled/db");
    let used = {
        let whole = fs::read(&db).unwrap();
        whole.iter().rposition(|byte| *byte != 0).unwrap() + 1
    };
    let (mut refused, mut served) = (0, 0);
    for part in 0..=16 {
        let at = used * part / 16 + 40;
        let mut bytes = fs::read(&db).unwrap();
        let places = if part < 16 { at.min(used - 1)..at.min(used - 1) + 1 } else { 0..used };
        places.step_by(64).for_each(|place| bytes[place] ^= 0x10);
        fs::write(&db, bytes).unwrap();
        match nodes.start_as(1, nodes.config(1)).await {
            Err(error) => {
                assert!(error.to_string().contains("store"), "at {at}: {error}");
                refused += 1;
            }
            Ok(()) => {
                let unready = || {
                    let readiness = nodes.started(1).readiness();
                    readiness
                        .checks
                        .into_iter()
                        .find_map(|(_, found)| found.err())
                        .filter(|why| why.contains("; shard "))
                };
                until("the node serves or says why not", async || {
                    nodes.has_ended(1) || nodes.started(1).readiness().ready || unready().is_some()
                })
                .await;
                if nodes.has_ended(1) {
                    let error = nodes.end(1).await.unwrap_err().to_string();
                    assert!(error.contains("store"), "at {at}: {error}");
                    refused += 1;
                } else if let Some(why) = unready() {
                    assert!(why.contains("store"), "at {at}: {why}");
                    nodes.stop(1).await;
                    refused += 1;
                } else {
                    assert_eq!(crate::serving::payloads(nodes, device(0), 20).await.len(), 20, "at {at}");
                    nodes.stop(1).await;
                    served += 1;
                }
            }
        }
        fs::remove_dir_all(&data).unwrap();
        copy(&saved, &data);
    }
    assert_eq!(refused + served, 17);
    refused
}

/// Lets the log of the stopped node's shard forget everything: the last checkpoint of the stop holds it. Up to which index.
async fn purge_to_the_end(nodes: &Nodes) -> u64 {
    let config = LogConfig { segment_bytes: 4 << 20, ..LogConfig::new(nodes.data(1).join("log")) };
    let (log, _) = Log::open(config, Arc::new(RealDisk)).unwrap();
    let group = log.group(GroupId(1));
    let last = group.last().unwrap();
    group.purge(last).await.unwrap();
    log.close().await.unwrap();
    last.index
}

/// A stopped node with twenty messages that wait, most of them in sled.
async fn stopped_with_messages() -> Nodes {
    let mut nodes = Nodes::created(1, 1).await;
    let mut gateway = Gateway::open(&nodes).await;
    gateway.register(1).await;
    for n in 0..20 {
        assert!(accepted(&gateway.one(0, vec![enqueue(device(0), vec![n; 500])]).await));
    }
    drop(gateway);
    nodes.stop(1).await;
    nodes
}

/// More than a drain of these logs takes: a place that is named is at most this far before the bit.
const DRAIN_BYTES: usize = 4 << 10;

/// Segments of the log that hold something.
fn segments(data: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(data.join("log")).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| fs::read(path).unwrap().iter().filter(|byte| **byte != 0).count() > 1_000).collect()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() { copy(&path, &to) } else { assert!(fs::copy(&path, &to).is_ok()) }
    }
}
