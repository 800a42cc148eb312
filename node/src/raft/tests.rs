//! Groups of three nodes in one process, over real connections on loopback and disks that forget.

mod beats;
mod commits;
mod parking;
mod snapshots;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

use super::{links::cuttable::Wiring, *};
use crate::{
    clock::SystemClock,
    disk::forgetful::ForgetfulDisk,
    log::{Log, LogConfig},
};

const GROUP: GroupId = GroupId(1);
/// A test that waits this long has failed; none asserts how long something takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Remembers what it applied; forgets it with the process.
#[derive(Debug, Default)]
struct Seen {
    applied: Vec<Bytes>,
    mark: Option<Bytes>,
    leading: Option<u64>,
    /// There is no memory for more; how often that was said.
    full: bool,
    waits: usize,
    /// Applies what the others cannot.
    knows_poison: bool,
}

struct Counter(Arc<Mutex<Seen>>);

impl Machine for Counter {
    fn must_wait(&self) -> bool {
        let mut seen = self.0.lock().unwrap();
        seen.waits += usize::from(seen.full);
        seen.full
    }

    fn mark(&self) -> Option<Bytes> {
        self.0.lock().unwrap().mark.clone()
    }

    fn apply(&mut self, at: Index, mark: Bytes, payload: &Bytes) -> Result<Reply, MachineError> {
        if payload == "refuse" {
            return Err(MachineError { at, what: "asked to".to_owned(), fault: Fault::Replica });
        }
        let mut seen = self.0.lock().unwrap();
        if payload == "poison" && !seen.knows_poison {
            let fault = Fault::Entry { operation: "command 0, Poison".to_owned() };
            return Err(MachineError { at, what: "panicked: in a test".to_owned(), fault });
        }
        seen.applied.push(Bytes::copy_from_slice(payload));
        seen.mark = Some(mark);
        Ok(Reply::Shard(vec![None; seen.applied.len()]))
    }

    fn advance(&mut self, _: Index, mark: Bytes) -> Result<(), MachineError> {
        self.0.lock().unwrap().mark = Some(mark);
        Ok(())
    }

    fn install(&mut self, staged: Box<dyn snapshot::Staged>) -> Result<(), String> {
        staged.switch()
    }

    fn leading(&mut self, term: Option<u64>) {
        self.0.lock().unwrap().leading = term;
    }
}

fn settings() -> RaftSettings {
    RaftSettings {
        heartbeat: Duration::from_millis(100),
        heartbeat_min: Duration::from_millis(80),
        election_min: Duration::from_millis(500),
        election_max: Duration::from_millis(1000),
        kept_entries: 0,
        ..RaftSettings::default()
    }
}

struct Node {
    id: u64,
    disk: ForgetfulDisk,
    log: Log,
    network: Network,
    group: Group,
    seen: Arc<Mutex<Seen>>,
    time: Arc<Known>,
    snapshots: Arc<snapshots::Words>,
    serving: JoinSet<()>,
}

impl Node {
    async fn start(
        id: u64,
        address: SocketAddr,
        disk: ForgetfulDisk,
        wiring: &Wiring,
        settings: RaftSettings,
        (decisions, meter): (Arc<dyn Decisions>, Arc<snapshots::Meter>),
    ) -> Node {
        let config = LogConfig { segment_bytes: 256 << 10, drain_bytes: 64 << 10, ..LogConfig::new("wal") };
        let (log, _) = Log::open(config, Arc::new(disk.clone())).unwrap();
        let network = Network::new(id, wiring.of(id), Arc::new(SystemClock), 1);
        let listener = loop {
            // The port may still be closing after a restart.
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        let mut serving = JoinSet::new();
        let server = Server::builder().add_service(network.server());
        serving.spawn(async move { server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap() });
        let seen = Arc::<Mutex<Seen>>::default();
        let preference = (1..=9).map(|id| id * 10).collect();
        let time = Arc::<Known>::default();
        let snapshots = Arc::new(snapshots::Words::new(&seen, meter));
        let config = GroupConfig {
            group: GROUP,
            replica: id * 10,
            preference,
            settings,
            decisions,
            time: time.clone(),
            snapshots: snapshots.clone(),
        };
        let machine = Box::new(Counter(seen.clone()));
        let group = Group::start(config, &log, machine, &network).await.unwrap();
        Node { id, disk, log, network, group, seen, time, snapshots, serving }
    }

    /// As kill -9 leaves it: nothing is flushed, nothing is said.
    async fn kill(mut self) -> ForgetfulDisk {
        self.serving.shutdown().await;
        self.network.shutdown();
        self.network.ended().await;
        // When it cannot acknowledge anything any more: what it did acknowledge is on the disk that it leaves.
        let disk = self.disk.restart();
        self.group.shutdown().await;
        disk
    }

    async fn propose(&self, what: &'static str) -> Result<Reply, ProposeError> {
        tokio::time::timeout(PATIENCE, self.group.propose(Bytes::from_static(what.as_bytes()))).await.unwrap()
    }

    async fn becomes(&self, wanted: impl FnMut(&Leadership) -> bool) -> Leadership {
        *tokio::time::timeout(PATIENCE, self.group.leadership().wait_for(wanted)).await.unwrap().unwrap()
    }

    async fn has_applied(&self, count: usize) -> Vec<Bytes> {
        let waiting = async {
            while self.seen.lock().unwrap().applied.len() < count {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.unwrap();
        self.seen.lock().unwrap().applied.clone()
    }
}

struct Cluster {
    settings: RaftSettings,
    addresses: BTreeMap<u64, SocketAddr>,
    wiring: Wiring,
    nodes: BTreeMap<u64, Node>,
    decisions: Arc<parking::ByHand>,
    meter: Arc<snapshots::Meter>,
}

impl Cluster {
    async fn of(count: u64) -> Cluster {
        Cluster::with(count, settings()).await
    }

    async fn with(count: u64, settings: RaftSettings) -> Cluster {
        let mut addresses = BTreeMap::new();
        for id in 1..=count {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            addresses.insert(id, listener.local_addr().unwrap());
        }
        let (wiring, decisions, meter) = (Wiring::new(Arc::new(DirectLinks)), Arc::default(), Arc::default());
        let mut cluster = Cluster { settings, addresses, wiring, nodes: BTreeMap::new(), decisions, meter };
        for id in 1..=count {
            cluster.start(id, ForgetfulDisk::new()).await;
        }
        assert!(cluster.nodes[&1].group.initialize(cluster.members()).await.unwrap());
        cluster
    }

    fn members(&self) -> BTreeMap<u64, Member> {
        self.addresses.iter().map(|(id, at)| (id * 10, Member { node: *id, address: at.to_string() })).collect()
    }

    async fn start(&mut self, id: u64, disk: ForgetfulDisk) {
        let shared: (Arc<dyn Decisions>, _) = (self.decisions.clone(), self.meter.clone());
        let node = Node::start(id, self.addresses[&id], disk, &self.wiring, self.settings.clone(), shared).await;
        self.nodes.insert(id, node);
    }

    /// The node that leads and has applied its first entry, as soon as one of these does.
    async fn leader(&self) -> &Node {
        let leads = self.nodes.values().map(|node| {
            Box::pin(async move {
                node.becomes(|l| l.first_applied).await;
                node
            })
        });
        futures::future::select_all(leads).await.0
    }

    /// The nodes but this one.
    fn others(&self, id: u64) -> Vec<&Node> {
        self.nodes.values().filter(|node| node.id != id).collect()
    }

    async fn stop(self) {
        for node in self.nodes.into_values() {
            node.kill().await;
        }
    }
}

fn words(all: &[&'static str]) -> Vec<Bytes> {
    all.iter().map(|word| Bytes::from_static(word.as_bytes())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_elect_a_leader_and_all_apply_what_it_proposes() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    assert_eq!(leader.propose("a").await, Ok(Reply::Shard(vec![None])));
    assert_eq!(leader.propose("b").await, Ok(Reply::Shard(vec![None; 2])));
    for node in cluster.nodes.values() {
        assert_eq!(node.has_applied(2).await, words(&["a", "b"]));
        let leading = node.seen.lock().unwrap().leading;
        assert_eq!(leading.is_some(), node.id == leader.id, "only the leader carries out effects");
    }
    assert!(leader.group.lease_valid());
    assert!(leader.group.read_barrier().await.unwrap() >= 3);
    let follower = cluster.nodes.values().find(|node| node.id != leader.id).unwrap();
    let term = leader.group.leadership().borrow().term;
    follower.becomes(|l| l.leader.is_some()).await;
    assert_eq!(
        follower.propose("c").await,
        Err(ProposeError::NotLeader { leader: Some(leader.group.replica()), term })
    );
    assert!(!follower.group.lease_valid());
    tokio::time::sleep(2 * settings().election_max).await;
    assert!(cluster.leader().await.group.lease_valid(), "heartbeats keep the lease of an idle group");
    assert_eq!(follower.group.initialize(cluster.members()).await, Ok(false));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promise_4_the_others_go_on_without_a_killed_leader_and_it_catches_up_from_its_log() {
    let mut cluster = Cluster::of(3).await;
    let first = cluster.leader().await;
    first.propose("a").await.unwrap();
    let id = first.id;
    let disk = cluster.nodes.remove(&id).unwrap().kill().await;
    cluster.leader().await.propose("b").await.unwrap();
    cluster.start(id, disk).await;
    assert_eq!(cluster.nodes[&id].has_applied(2).await, words(&["a", "b"]));
    cluster.leader().await.propose("c").await.unwrap();
    for node in cluster.nodes.values() {
        assert_eq!(node.has_applied(3).await, words(&["a", "b", "c"]));
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promise_4_after_the_power_failed_everywhere_what_was_acknowledged_is_there() {
    let mut cluster = Cluster::of(3).await;
    cluster.leader().await.propose("a").await.unwrap();
    let mut disks = Vec::new();
    for (id, node) in std::mem::take(&mut cluster.nodes) {
        disks.push((id, node.disk.power_cut()));
        node.kill().await;
    }
    for (id, disk) in disks {
        cluster.start(id, disk).await;
    }
    cluster.leader().await.propose("b").await.unwrap();
    for node in cluster.nodes.values() {
        assert_eq!(node.has_applied(2).await, words(&["a", "b"]));
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promise_4_a_leader_that_is_cut_off_loses_its_lease_and_what_it_proposed_alone_is_unknown() {
    let cluster = Cluster::of(3).await;
    let old = cluster.leader().await;
    old.propose("a").await.unwrap();
    let others: Vec<&Node> = cluster.nodes.values().filter(|node| node.id != old.id).collect();
    for other in &others {
        cluster.wiring.cut(old.id, other.id);
    }
    let term = old.group.leadership().borrow().term;
    let alone = old.group.propose(Bytes::from_static(b"alone"));
    let go_on = async {
        let leads = others.iter().map(|node| {
            Box::pin(async move {
                node.becomes(|l| l.first_applied && l.term > term).await;
                *node
            })
        });
        let new = futures::future::select_all(leads).await.0;
        assert!(!old.group.lease_valid(), "two leases at once");
        new.propose("b").await.unwrap();
        for other in &others {
            cluster.wiring.heal(old.id, other.id);
        }
    };
    let (alone, ()) = tokio::time::timeout(PATIENCE, futures::future::join(alone, go_on)).await.unwrap();
    assert_eq!(alone, Err(ProposeError::Unknown));
    for node in cluster.nodes.values() {
        assert_eq!(node.has_applied(2).await, words(&["a", "b"]));
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_is_handed_to_a_voter_that_is_caught_up() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    leader.propose("a").await.unwrap();
    assert_eq!(leader.group.hand_over(PATIENCE).await, HandedOver::Moved);
    let to = leader.group.leadership().borrow().leader.unwrap();
    assert!(!leader.group.lease_valid());
    let next = &cluster.nodes[&(to / 10)];
    next.becomes(|l| l.first_applied).await;
    next.propose("b").await.unwrap();
    assert!(next.group.transfer_leader(7777).await.is_err());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_that_cannot_be_applied_stops_the_replica_and_says_which() {
    let cluster = Cluster::of(1).await;
    let node = cluster.leader().await;
    node.propose("a").await.unwrap();
    assert!(matches!(node.propose("refuse").await, Err(ProposeError::Stopped(_))));
    let mut stopped = node.group.stopped();
    let why = tokio::time::timeout(PATIENCE, stopped.wait_for(Option::is_some)).await.unwrap().unwrap().clone();
    assert!(why.unwrap().contains("asked to"));
    assert!(node.group.status().stopped.is_some());
    assert!(!node.group.leadership().borrow().is_leader);
    assert!(matches!(node.propose("b").await, Err(ProposeError::Stopped(_))));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sole_voter_goes_on_after_a_restart_even_if_it_dropped_a_drain() {
    let mut cluster = Cluster::of(1).await;
    let node = cluster.leader().await;
    node.propose("a").await.unwrap();
    assert!(node.group.lease_valid());
    node.propose("b").await.unwrap();
    let disk = tear(cluster.nodes.remove(&1).unwrap().kill().await);
    cluster.start(1, disk).await;
    let node = cluster.leader().await;
    node.propose("c").await.unwrap();
    tokio::time::sleep(2 * settings().election_max).await;
    assert!(node.group.lease_valid(), "there is nobody else who could lead");
    assert!(!node.log.group(GROUP).is_behind());
    assert_eq!(node.has_applied(2).await, words(&["a", "c"]), "what a sole voter drops is gone");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promise_6_a_follower_without_memory_applies_no_more_until_there_is_room_and_holds_up_nobody() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    let follower = cluster.nodes.values().find(|node| node.id != leader.id).unwrap();
    follower.seen.lock().unwrap().full = true;
    leader.propose("a").await.unwrap();
    leader.propose("b").await.unwrap();
    let waits = async {
        while follower.seen.lock().unwrap().waits == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waits).await.unwrap();
    assert!(follower.seen.lock().unwrap().applied.is_empty());
    assert_eq!(follower.group.status().stopped, None);
    follower.seen.lock().unwrap().full = false;
    assert_eq!(follower.has_applied(2).await, words(&["a", "b"]));
    cluster.stop().await;
}

/// Flips a bit in the last record before the zeros of the newest segment in use: its last drain is bad.
fn tear(disk: ForgetfulDisk) -> ForgetfulDisk {
    let newest = disk.files().into_iter().rfind(|path| disk.bytes(path)[12] == 1).unwrap();
    disk.tamper(&newest, |bytes| {
        let last = bytes.iter().rposition(|b| *b != 0).unwrap();
        bytes[last] ^= 1;
    });
    disk
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_dropped_a_drain_is_caught_up_before_it_takes_part_and_stops_nobody() {
    let mut cluster = Cluster::of(3).await;
    let leader_id = cluster.leader().await.id;
    cluster.leader().await.propose("a").await.unwrap();
    let id = cluster.nodes.keys().copied().find(|id| *id != leader_id).unwrap();
    cluster.nodes[&id].has_applied(1).await;
    cluster.leader().await.propose("b").await.unwrap();
    cluster.nodes[&id].has_applied(2).await;
    let disk = tear(cluster.nodes.remove(&id).unwrap().kill().await);
    cluster.start(id, disk).await;
    assert!(cluster.nodes[&id].log.group(GROUP).is_behind());
    cluster.leader().await.propose("c").await.unwrap();
    assert_eq!(cluster.nodes[&id].has_applied(3).await, words(&["a", "b", "c"]));
    let caught_up = async {
        while cluster.nodes[&id].log.group(GROUP).is_behind() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, caught_up).await.unwrap();
    for node in cluster.nodes.values() {
        assert_eq!(node.group.status().stopped, None);
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_all_dropped_a_drain_go_on_once_all_have_answered() {
    let mut cluster = Cluster::of(3).await;
    cluster.leader().await.propose("a").await.unwrap();
    for node in cluster.nodes.values() {
        node.has_applied(1).await;
        // A drain of its own, so that what is torn is not the entry.
        node.log.group(GroupId(9)).save_vote(crate::log::Vote { term: 1, replica: 1, committed: false }).await.unwrap();
    }
    let mut disks = Vec::new();
    for (id, node) in std::mem::take(&mut cluster.nodes) {
        disks.push((id, tear(node.kill().await)));
    }
    let last = disks.pop().unwrap();
    for (id, disk) in disks {
        cluster.start(id, disk).await;
    }
    tokio::time::sleep(3 * settings().election_max).await;
    for node in cluster.nodes.values() {
        let is_leader = node.group.leadership().borrow().is_leader;
        assert!(node.log.group(GROUP).is_behind() && !is_leader, "one has not answered");
    }
    cluster.start(last.0, last.1).await;
    cluster.leader().await.propose("b").await.unwrap();
    for node in cluster.nodes.values() {
        assert_eq!(node.has_applied(2).await, words(&["a", "b"]));
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_is_purged_to_where_every_replica_is_and_no_further() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    for _ in 0..20 {
        leader.propose("a").await.unwrap();
    }
    let last = leader.group.read_barrier().await.unwrap();
    for node in cluster.nodes.values() {
        node.has_applied(20).await;
        let known = async {
            while node.group.replicated_everywhere() < last {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, known).await.unwrap();
        assert_eq!(node.group.purge_upto(last - 5, 0).await, Ok(last - 5));
        let purged = async {
            while node.log.group(GROUP).purged().map(|at| at.index) != Some(last - 5) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, purged).await.unwrap();
    }
    let silent = cluster.nodes.values().find(|node| node.id != leader.id).unwrap();
    for other in cluster.nodes.values().filter(|node| node.id != silent.id) {
        cluster.wiring.cut(silent.id, other.id);
    }
    let ahead = leader.propose("b").await;
    assert!(ahead.is_ok());
    let upto = leader.group.purge_upto(u64::MAX, 0).await.unwrap();
    assert!(upto <= last, "{upto} is not on every replica, which have {last}");
    cluster.stop().await;
}

/// Timers that elect nobody while a test has patience: whoever leads was elected by asking first.
fn patient() -> RaftSettings {
    RaftSettings { election_min: PATIENCE, election_max: 2 * PATIENCE, ..settings() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promise_4_a_killed_leader_is_replaced_without_waiting_for_timers() {
    let mut cluster = Cluster::with(3, patient()).await;
    let first = cluster.leader().await;
    first.propose("a").await.unwrap();
    let id = first.id;
    for node in cluster.others(id) {
        node.has_applied(1).await;
    }
    cluster.nodes.remove(&id).unwrap().kill().await;
    let next = cluster.leader().await;
    next.propose("b").await.unwrap();
    assert!(next.group.lease_valid());
    let in_turn = cluster.nodes.keys().next().copied().unwrap();
    assert_eq!(next.id, in_turn, "of two equal logs the first of the list is elected");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_cut_off_from_all_drops_its_lease_before_the_others_elect() {
    let cluster = Cluster::with(3, patient()).await;
    let old = cluster.leader().await;
    old.propose("a").await.unwrap();
    let others = cluster.others(old.id);
    for node in &others {
        node.has_applied(1).await;
    }
    assert!(old.group.lease_valid());
    for node in &others {
        cluster.wiring.cut(old.id, node.id);
    }
    let leads = others.iter().map(|node| {
        Box::pin(async move {
            node.becomes(|l| l.first_applied).await;
            *node
        })
    });
    let new = tokio::time::timeout(PATIENCE, futures::future::select_all(leads)).await.unwrap().0;
    let dropped = async {
        while old.group.lease_valid() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE / 2, dropped).await.expect("its timer alone would let it last a minute");
    new.propose("b").await.unwrap();
    for node in &others {
        cluster.wiring.heal(old.id, node.id);
    }
    assert_eq!(old.has_applied(2).await, words(&["a", "b"]));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_flaps_or_stays_cut_does_not_disturb_a_healthy_leader() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    leader.propose("a").await.unwrap();
    let term = leader.group.leadership().borrow().term;
    let others = cluster.others(leader.id);
    for _ in 0..5 {
        cluster.wiring.cut(leader.id, others[0].id);
        tokio::time::sleep(Duration::from_millis(100)).await;
        cluster.wiring.heal(leader.id, others[0].id);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    leader.propose("b").await.unwrap();
    cluster.wiring.cut(leader.id, others[0].id);
    tokio::time::sleep(3 * settings().election_max).await;
    leader.propose("c").await.unwrap();
    cluster.wiring.heal(leader.id, others[0].id);
    for node in cluster.nodes.values() {
        node.has_applied(3).await;
        assert_eq!(node.group.leadership().borrow().term, term, "nobody campaigned");
    }
    assert!(leader.group.leadership().borrow().is_leader);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_voter_neither_votes_nor_campaigns_for_one_election_maximum() {
    let slow =
        RaftSettings { election_min: Duration::from_secs(2), election_max: Duration::from_secs(5), ..settings() };
    let mut cluster = Cluster::with(3, slow.clone()).await;
    let (leader, term) = {
        let leader = cluster.leader().await;
        leader.propose("a").await.unwrap();
        (leader.id, leader.group.leadership().borrow().term)
    };
    let restarted = cluster.others(leader)[0].id;
    for node in cluster.nodes.values() {
        node.has_applied(1).await;
    }
    let disk = cluster.nodes.remove(&restarted).unwrap().kill().await;
    cluster.start(restarted, disk).await;
    let since = tokio::time::Instant::now();
    cluster.nodes.remove(&leader).unwrap().kill().await;
    // The other one has lost its leader at once, and cannot be elected without the vote of the one that restarted.
    let leads = cluster.nodes.values().map(|node| Box::pin(node.becomes(|l| l.is_leader && l.term > term)));
    futures::future::select_all(leads).await;
    assert!(since.elapsed() >= slow.election_max, "voted or campaigned {:?} after its start", since.elapsed());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_is_not_handed_to_replicas_that_leave_and_the_leader_goes_on() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    leader.propose("a").await.unwrap();
    let others = cluster.others(leader.id);
    for other in &others {
        other.group.leave();
    }
    assert!(leader.group.transfer_leader(others[0].group.replica()).await.is_err());
    assert_eq!(leader.group.hand_over(PATIENCE).await, HandedOver::NobodyWilling);
    leader.propose("b").await.unwrap();
    assert!(leader.group.lease_valid());
    assert_eq!(others[0].group.hand_over(PATIENCE).await, HandedOver::NotLeading);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sole_voter_has_nobody_to_hand_leadership_to_and_goes_on() {
    let cluster = Cluster::of(1).await;
    let leader = cluster.leader().await;
    leader.group.leave();
    assert_eq!(leader.group.hand_over(PATIENCE).await, HandedOver::Alone);
    leader.propose("a").await.unwrap();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_of_the_list_is_preferred_once_it_is_up_for_long_enough_and_caught_up() {
    let cluster = Cluster::with(3, RaftSettings { balance_after: Duration::from_millis(700), ..settings() }).await;
    let leader = cluster.leader().await;
    leader.propose("a").await.unwrap();
    let first = &cluster.nodes[&1];
    if leader.id == 1 {
        assert_eq!(leader.group.preferred(), None, "it leads already");
        assert_eq!(leader.group.hand_over(PATIENCE).await, HandedOver::Moved);
    }
    let second = cluster.leader().await;
    let second = if second.id == 1 { cluster.others(1)[0] } else { second };
    second.becomes(|l| l.first_applied).await;
    let named = async {
        while second.group.preferred() != Some(10) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, named).await.unwrap();
    assert_eq!(first.group.preferred(), None);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_with_entries_beside_a_log_without_a_vote_is_not_started_from() {
    let mut cluster = Cluster::of(1).await;
    let node = cluster.nodes.remove(&1).unwrap();
    node.becomes(|l| l.first_applied).await;
    node.propose("a").await.unwrap();
    let seen = node.seen.clone();
    let own = node.kill().await;
    let start = async |disk: ForgetfulDisk| {
        let config = LogConfig { segment_bytes: 256 << 10, drain_bytes: 64 << 10, ..LogConfig::new("wal") };
        let (log, _) = Log::open(config, Arc::new(disk)).unwrap();
        let decisions = cluster.decisions.clone();
        let config = GroupConfig {
            group: GROUP,
            replica: 10,
            preference: vec![10],
            settings: settings(),
            decisions,
            time: Arc::new(Timeless),
            snapshots: Arc::new(snapshot::NoSnapshots),
        };
        let network = Network::new(1, cluster.wiring.of(1), Arc::new(SystemClock), 1);
        let started = Group::start(config, &log, Box::new(Counter(seen.clone())), &network).await;
        network.shutdown();
        match started {
            Ok(group) => {
                group.shutdown().await;
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        }
    };
    let error = start(ForgetfulDisk::new()).await.expect_err("it might vote a second time in a term");
    assert!(error.contains("its store ends at index ") && error.contains("wal holds nothing of the group"), "{error}");
    assert_eq!(start(own).await, Ok(()), "beside its own log the same store is started from");
}

/// The time that one replica knows.
#[derive(Debug, Default)]
struct Known(AtomicU64);

impl GroupTime for Known {
    fn known_ms(&self) -> Option<u64> {
        Some(self.0.load(Ordering::SeqCst)).filter(|known| *known > 0)
    }

    fn told(&self, time_ms: u64) {
        self.0.fetch_max(time_ms, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_tells_the_groups_time_with_its_heartbeats_and_whoever_knows_it_answers_with_it() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    let [one, other] = cluster.others(leader.id)[..] else { panic!() };
    assert_eq!(leader.group.time_of_others_ms().await, None);
    // No leader has said so: only who is asked tells it.
    one.time.told(5_000);
    assert_eq!(leader.group.time_of_others_ms().await, Some(5_000));
    leader.time.told(7_000);
    let told = async {
        while [one, other].iter().any(|node| node.time.known_ms() != Some(7_000)) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, told).await.unwrap();
    // An idle group: heartbeats did it.
    assert_eq!(other.group.time_of_others_ms().await, Some(7_000));
    cluster.stop().await;
}
