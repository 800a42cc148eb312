//! A cluster of three node processes and a gateway: what clients see when nodes are lost, and kill rounds judged by the ledger.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use martlet_loadtest::{
    app_server::{AppServer, Sent, Target},
    clock::RunClock,
    cluster::{Cluster, Layout, Member},
    device::{self, Connection, trusting},
    fleet::{Device, Fleet, Surroundings},
    history::{Phase, Recorder, What},
    http::{HttpAnswer, HttpClient},
    ledger::{self, Terms},
};
use martlet_proto::{
    cluster::admin::{NodeStatus, StatusRequest, admin_client::AdminClient},
    device::mcs::DataMessageStanza,
    mcs::stanza::Stanza,
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::broker::MARTLET;

/// Patience for a cluster to go on after a loss.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn start(shards: u32) -> (Cluster, TempDir) {
    let dir = TempDir::new().unwrap();
    let layout = Layout {
        martlet: MARTLET.into(),
        dir: dir.path().join("cluster"),
        nodes: 3,
        shards,
        node_extra: String::new(),
        gateway_extra: String::new(),
    };
    (Cluster::start(layout).await.unwrap(), dir)
}

/// What the nodes that answer say of themselves.
async fn status(cluster: &Cluster) -> Vec<NodeStatus> {
    for address in cluster.grpc() {
        let Ok(mut client) = AdminClient::connect(format!("http://{address}")).await else { continue };
        if let Ok(reply) = client.status(StatusRequest { cluster_wide: true }).await {
            return reply.into_inner().nodes;
        }
    }
    panic!("no node answers");
}

/// Index of the node that leads group `group`, if one does.
pub(crate) async fn leader(cluster: &Cluster, group: u32) -> Option<usize> {
    let nodes = status(cluster).await;
    let leads = |node: &&NodeStatus| {
        node.groups.iter().any(|g| g.group == group && g.leader_replica == g.replica_id && g.stopped.is_empty())
    };
    nodes.iter().find(leads).map(|node| usize::try_from(node.node_id).unwrap() - 1)
}

/// An app server and a device of a cluster with one shard.
struct Ends {
    http: HttpClient,
    key: String,
    token: String,
    identity: device::Identity,
}

impl Ends {
    async fn new(cluster: &Cluster) -> Self {
        let http = HttpClient::new(&cluster.http()).unwrap();
        let identity = device::check_in(&http, None).await.unwrap();
        let token = device::register(&http, identity, "com.example.app", &cluster.project.sender_id).await.unwrap();
        Self { http, key: format!("key={}", cluster.project.server_key), token, identity }
    }

    async fn send_json(&self, n: u32) -> HttpAnswer {
        let headers = [("authorization", self.key.as_str()), ("content-type", "application/json")];
        let body = json!({ "to": self.token, "data": { "n": n.to_string() } });
        self.http.post("/gcm/send", &headers, body.to_string()).await.unwrap()
    }

    async fn send_form(&self, n: u32) -> HttpAnswer {
        let headers = [("authorization", self.key.as_str())];
        let body = format!("registration_id={}&data.n={n}", self.token);
        self.http.post("/gcm/send", &headers, body).await.unwrap()
    }

    /// Connects, however long the cluster takes, and collects what arrives until nothing has for a while.
    async fn receive(&self, cluster: &Cluster, least: usize) -> Vec<u32> {
        let tls = trusting(&cluster.ca_file()).unwrap();
        let clock = RunClock::begin();
        let mut arrived = Vec::new();
        while clock.elapsed() < PATIENCE {
            let opened = Connection::open(&cluster.mcs(), Arc::clone(&tls), self.identity, Vec::new()).await;
            let Ok(mut connection) = opened else {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            loop {
                let quiet = if arrived.len() < least { PATIENCE } else { Duration::from_secs(1) };
                match tokio::time::timeout(quiet, connection.next()).await {
                    Ok(Ok(Some(received))) => {
                        if let Stanza::Data(data) = received.stanza {
                            arrived.push(number(&data));
                        }
                    }
                    Ok(_) => break,
                    Err(_) => return arrived,
                }
            }
        }
        panic!("only {arrived:?} arrived");
    }
}

fn number(data: &DataMessageStanza) -> u32 {
    data.app_data.iter().find(|pair| pair.key == "n").unwrap().value.parse().unwrap()
}

fn is_success(answer: &HttpAnswer) -> bool {
    let json: serde_json::Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    answer.status == 200 && json["success"] == 1
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dl_20_h117_h160_h161_h090_accepted_messages_survive_a_node_and_without_a_quorum_sends_are_refused_for_good() {
    let (mut cluster, _dir) = start(1).await;
    let ends = Ends::new(&cluster).await;
    assert!(is_success(&ends.send_json(1).await));

    // DL-20, H117: the node that leads the shard is lost with kill -9; the others have only what it sent them.
    let lost = leader(&cluster, 1).await.unwrap();
    cluster.kill_node(lost).unwrap();
    let clock = RunClock::begin();
    while !is_success(&ends.send_json(2).await) {
        assert!(clock.elapsed() < PATIENCE, "two of three nodes did not go on");
    }
    let arrived = ends.receive(&cluster, 2).await;
    assert!(arrived.starts_with(&[1]) && arrived.ends_with(&[2]), "{arrived:?}");

    // H160, H090: without a quorum. The last leader's lease ends first.
    let second = (lost + 1) % 3;
    cluster.kill_node(second).unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    for n in 10..13 {
        let answer = ends.send_json(n).await;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        let refused = answer.status == 503 || text.contains(r#"{"error":"Unavailable"}"#);
        assert!(refused && !is_success(&answer), "{} {text}", answer.status);
        // Whole seconds to wait stand on a 503, and on no 200.
        assert_eq!(answer.status == 503, answer.retry_after.as_ref().is_some_and(|after| after.parse::<u32>().is_ok()));
        assert!(answer.status == 503 || answer.retry_after.is_none());
        let answer = ends.send_form(n + 10).await;
        assert_eq!(answer.status, 503, "{}", String::from_utf8_lossy(&answer.body));
        assert!(answer.retry_after.is_some_and(|after| after.parse::<u32>().is_ok()));
        assert!(!String::from_utf8_lossy(&answer.body).contains("Error="));
    }

    // H161: what was refused never arrives, when the quorum is back.
    cluster.start_node(lost).unwrap();
    cluster.start_node(second).unwrap();
    cluster.wait_ready().await.unwrap();
    let clock = RunClock::begin();
    while !is_success(&ends.send_json(30).await) {
        assert!(clock.elapsed() < PATIENCE, "three nodes did not go on");
    }
    let arrived = ends.receive(&cluster, 1).await;
    assert!(arrived.contains(&30), "{arrived:?}");
    assert!(arrived.iter().all(|n| [1, 2, 30].contains(n)), "{arrived:?}");
    cluster.stop().await.unwrap();
}

#[test]
fn h162_retry_after_is_a_number_of_seconds() {
    // A gateway that knows no node answers 503 to everything.
    let broker = crate::broker::Broker::start();
    let token = crate::device::check_in(&broker).register(&broker, "com.example.app", crate::broker::ONE.0);
    let dir = TempDir::new().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let config = dir.path().join("gateway.toml");
    let secret = broker.data().join("secret");
    let text = format!(
        "[gateway]\nseeds = [\"127.0.0.1:1\"]\nsecret_file = {secret:?}\nhttp = \"{address}\"\nmcs = []\n\n[admin]\nlisten = \"127.0.0.1:0\"\n"
    );
    std::fs::write(&config, text).unwrap();
    let mut child = std::process::Command::new(MARTLET).args(["gateway", "--config"]).arg(&config).spawn().unwrap();
    let clock = RunClock::begin();
    while std::net::TcpStream::connect(address).is_err() {
        assert!(clock.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
    let answer = crate::app_server::send_json(&address.to_string(), crate::broker::ONE.1, &json!({ "to": token }));
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(answer.status, 503, "{}", answer.text());
    let seconds = answer.header("retry-after").unwrap();
    assert!(seconds.parse::<u32>().is_ok_and(|seconds| seconds >= 1), "{seconds}");
}

/// Which processes a round kills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Leader,
    Follower,
    Gateway,
    AllNodes,
}

/// Rounds of the small form; `MARTLET_KILL_ROUNDS` asks for more, `MARTLET_KILL_SEED` for others.
const ROUNDS: u64 = 6;
const SEED: u64 = 20;
const SHARDS: u32 = 4;
const DEVICES: usize = 16;
const SENDERS: usize = 8;
/// How often a kill is put off until a node says that a proposal of it has no answer; then it comes all the same.
const LOOKS_MAX: usize = 200;

/// Whether one of these nodes has handed a proposal to Raft that has no answer, looked at until one has, the kill to follow at once.
async fn proposal_unanswered(cluster: &Cluster, nodes: &[usize]) -> bool {
    let clients: Vec<_> = cluster.admin_addresses().iter().map(|address| HttpClient::new(address).unwrap()).collect();
    for _ in 0..LOOKS_MAX {
        for &node in nodes {
            if gauge(&clients[node], "martlet_node_proposals_unanswered").await > 0 {
                return true;
            }
        }
    }
    false
}

/// What a process says of one of its instruments, which it must have.
async fn gauge(admin: &HttpClient, name: &str) -> u64 {
    let answer = admin.get("/metrics").await.unwrap();
    let text = String::from_utf8(answer.body.to_vec()).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
}

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What the senders of the kill rounds share.
struct Load {
    app_server: AppServer,
    clock: RunClock,
    recorder: Arc<Recorder>,
    devices: Vec<Arc<Device>>,
    stop: AtomicBool,
    sends: AtomicU64,
}

impl Load {
    async fn run(self: Arc<Self>) {
        while !self.stop.load(Ordering::Relaxed) {
            let n = self.sends.fetch_add(1, Ordering::Relaxed);
            let device = &self.devices[usize::try_from(n).unwrap() % self.devices.len()];
            if device.outstanding.load(Ordering::Relaxed) >= 80 {
                tokio::time::sleep(Duration::from_millis(2)).await;
                continue;
            }
            device.outstanding.fetch_add(1, Ordering::Relaxed);
            let target = Target { device: device.name.clone(), token: device.token.clone() };
            let now = self.clock.secs();
            let sent = self.app_server.send(&self.clock, &self.recorder, &n.to_string(), &[target], now).await;
            if !matches!(sent[..], [Sent::Acked(_)]) {
                let _ = device.outstanding.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

/// A cluster under load, what it does recorded for the ledger.
struct Rig {
    cluster: Cluster,
    dir: TempDir,
    clock: RunClock,
    recorder: Arc<Recorder>,
    fleet: Fleet,
    load: Arc<Load>,
    senders: tokio::task::JoinSet<()>,
}

impl Rig {
    /// A quarter of the devices stays away until the end: their messages cross every fault in the store.
    const ON_LINE: usize = DEVICES * 3 / 4;

    async fn start() -> Self {
        let (cluster, dir) = start(SHARDS).await;
        let clock = RunClock::begin();
        let recorder = Arc::new(Recorder::new(Some(&dir.path().join("history.jsonl"))).unwrap());
        let http = HttpClient::new(&cluster.http()).unwrap();
        let around = Surroundings {
            http: http.clone(),
            mcs: cluster.mcs(),
            tls: trusting(&cluster.ca_file()).unwrap(),
            sender_id: cluster.project.sender_id.clone(),
            clock: clock.clone(),
            recorder: Arc::clone(&recorder),
        };
        let fleet = Fleet::register(around, DEVICES, |_| {}).await.unwrap();
        fleet.connect(0..Self::ON_LINE);
        fleet.wait_on_line(Self::ON_LINE, PATIENCE, |_| {}).await.unwrap();
        let load = Arc::new(Load {
            app_server: AppServer { http, project: cluster.project.clone(), payload_bytes: 300, ttl_secs: None },
            clock: clock.clone(),
            recorder: Arc::clone(&recorder),
            devices: fleet.devices.clone(),
            stop: AtomicBool::new(false),
            sends: AtomicU64::new(0),
        });
        // Its measure says nothing while nothing is sent.
        assert!(!proposal_unanswered(&cluster, &[0, 1, 2]).await);
        let mut senders = tokio::task::JoinSet::new();
        for _ in 0..SENDERS {
            senders.spawn(Arc::clone(&load).run());
        }
        Self { cluster, dir, clock, recorder, fleet, load, senders }
    }

    fn fault(&self, name: &str, phase: Phase) {
        self.recorder.record(self.clock.secs(), What::Fault { name: name.into(), phase });
    }

    /// Ends the load, has everything delivered, and judges.
    async fn judge(self, name: &str, terms: &Terms) -> ledger::Verdict {
        let Self { cluster, dir, clock, recorder, fleet, load, mut senders } = self;
        tokio::time::sleep(Duration::from_secs(2)).await;
        load.stop.store(true, Ordering::Relaxed);
        while let Some(done) = senders.join_next().await {
            done.unwrap();
        }
        fleet.connect(Self::ON_LINE..DEVICES);
        let drained = RunClock::begin();
        while fleet.outstanding() > 0 && drained.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        fleet.leave().await;
        recorder.record(clock.secs(), What::End {});
        drop((fleet, load));
        cluster.stop().await.unwrap();

        let events = Arc::into_inner(recorder).unwrap().finish().unwrap();
        let verdict = ledger::judge(&events, terms);
        if !verdict.is_kept() {
            let kept = std::env::temp_dir().join(format!("martlet-{name}.jsonl"));
            std::fs::copy(dir.path().join("history.jsonl"), &kept).unwrap();
            let all: Vec<_> = verdict.violations.iter().take(20).map(ToString::to_string).collect();
            panic!("{} violations; the history is {}:\n{}", verdict.violations.len(), kept.display(), all.join("\n"));
        }
        println!(
            "{name}: {} acked, {} failed, {} unknown, {} duplicates",
            verdict.acked, verdict.failed, verdict.unknown, verdict.duplicates
        );
        verdict
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promise_1_promise_2_promise_3_promise_4_kill_rounds_lose_nothing_and_keep_the_order() {
    let (rounds, seed) = (from_environment("MARTLET_KILL_ROUNDS", ROUNDS), from_environment("MARTLET_KILL_SEED", SEED));
    println!("repeat with MARTLET_KILL_SEED={seed} MARTLET_KILL_ROUNDS={rounds}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut rig = Rig::start().await;
    let victims = [Victim::Leader, Victim::Follower, Victim::Gateway, Victim::AllNodes];
    let mut interrupted = 0;
    for round in 0..rounds {
        // Each kind comes once, then chance decides.
        let victim = victims.get(usize::try_from(round).unwrap()).copied();
        let victim = victim.unwrap_or_else(|| *victims.choose(&mut rng).unwrap());
        tokio::time::sleep(Duration::from_millis(rng.random_range(300..1_500))).await;
        let leads = leader(&rig.cluster, rng.random_range(1..=SHARDS)).await.unwrap_or(0);
        let nodes: Vec<usize> = match victim {
            Victim::Leader => vec![leads],
            Victim::Follower => vec![(leads + rng.random_range(1..3)) % 3],
            Victim::Gateway => vec![],
            Victim::AllNodes => vec![0, 1, 2],
        };
        let asked = if victim == Victim::Leader { &nodes[..] } else { &[0, 1, 2] };
        interrupted += u64::from(proposal_unanswered(&rig.cluster, asked).await);
        rig.fault(&format!("kill {victim:?}"), Phase::Start);
        for &node in &nodes {
            rig.cluster.kill_node(node).unwrap();
        }
        if victim == Victim::Gateway {
            rig.cluster.kill_gateway().unwrap();
        }
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..1_500))).await;
        for &node in &nodes {
            rig.cluster.start_node(node).unwrap();
        }
        if victim == Victim::Gateway {
            rig.cluster.start_gateway().unwrap();
        }
        rig.cluster.wait_ready().await.unwrap();
        rig.fault(&format!("kill {victim:?}"), Phase::End);
    }
    let terms = Terms { acked_min: 100, delivered_min: 100, unknown_min: 1, ..Terms::default() };
    rig.judge(&format!("kill-rounds-{seed}"), &terms).await;
    assert!(interrupted * 3 >= rounds, "only {interrupted} of {rounds} rounds had a proposal unanswered at the kill");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promise_2_promise_3_promise_4_a_leader_that_is_stopped_and_comes_back_hands_out_nothing_stale() {
    let mut rig = Rig::start().await;
    for group in 1..=2 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let old = leader(&rig.cluster, group).await.unwrap();
        rig.fault("stop the leader", Phase::Start);
        rig.cluster.process(Member::Node(old)).signal(Signal::STOP).unwrap();
        // The others elect another, by their timers: a stopped process keeps its connections.
        let clock = RunClock::begin();
        loop {
            let led = tokio::time::timeout(Duration::from_secs(5), leader_by(&rig.cluster, (old + 1) % 3, group)).await;
            if led.is_ok_and(|led| led.is_some_and(|led| led != old)) {
                break;
            }
            assert!(clock.elapsed() < PATIENCE, "two of three nodes did not go on");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        // It wakes up as a leader, with what it held for its devices, and its clock has gone on.
        rig.cluster.process(Member::Node(old)).signal(Signal::CONT).unwrap();
        rig.cluster.wait_ready().await.unwrap();
        rig.fault("stop the leader", Phase::End);
    }
    let terms = Terms { acked_min: 100, delivered_min: 100, ..Terms::default() };
    rig.judge("stopped-leader", &terms).await;
}

/// Index of the node that leads a group, as one node says that has answered in time.
async fn leader_by(cluster: &Cluster, at: usize, group: u32) -> Option<usize> {
    let mut client = AdminClient::connect(format!("http://{}", cluster.grpc()[at])).await.ok()?;
    let reply = client.status(StatusRequest { cluster_wide: true }).await.ok()?.into_inner();
    let leads = |node: &NodeStatus| {
        node.groups.iter().any(|g| g.group == group && g.leader_replica == g.replica_id && g.stopped.is_empty())
    };
    let leader = reply.nodes.iter().find(|node| leads(node))?;
    Some(usize::try_from(leader.node_id).unwrap() - 1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_of_each_node_in_turn_under_load_moves_every_leader_first_and_fails_no_send() {
    let mut rig = Rig::start().await;
    for node in 0..3 {
        // Whoever restarted is willing to lead again, and caught up.
        tokio::time::sleep(Duration::from_secs(3)).await;
        rig.fault("end a node", Phase::Start);
        rig.cluster.process_mut(Member::Node(node)).end().await.unwrap();
        // At once: what it led was led by others before it ended.
        let other = (node + 1) % 3;
        for group in 0..=SHARDS {
            let leader = leader_by(&rig.cluster, other, group).await;
            assert!(leader.is_some_and(|leader| leader != node), "group {group} has no leader after a handover");
        }
        let said = rig.cluster.process(Member::Node(node)).said_since(0).unwrap();
        assert!(!said.contains("was not handed over"), "{said}");
        rig.cluster.start_node(node).unwrap();
        rig.cluster.wait_ready().await.unwrap();
        rig.fault("end a node", Phase::End);
    }
    // The gap is a bound for a broken run on a busy machine, not the promise: it is an election or two.
    let terms = Terms { acked_min: 100, delivered_min: 100, gap_max_secs: Some(10.0), ..Terms::default() };
    let verdict = rig.judge("sigterm", &terms).await;
    assert_eq!((verdict.failed, verdict.unknown), (0, 0), "sends that a rolling restart failed");
}
