//! Nodes of one cluster, started and stopped by a test.

use std::{
    future::Future,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use martlet_loadtest::ports::free;
use martlet_node::{Config, Node, NodeError, Started, Surroundings};
use martlet_proto::{
    cluster::{
        admin::{
            CreateClusterReply, CreateClusterRequest, CreateProjectReply, CreateProjectRequest, StatusReply,
            StatusRequest, admin_client::AdminClient,
        },
        meta::{self, MetaState, meta_client::MetaClient},
    },
    seal::ClusterSecret,
};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::{Status, transport::Channel};

/// Longest anything is waited for; a bound for a broken run, not a promise.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Directories and addresses of nodes 1 to n, and those that run.
pub(crate) struct Nodes {
    dir: TempDir,
    addresses: Vec<SocketAddr>,
    running: Vec<Option<Running>>,
}

struct Running {
    started: Started,
    drain: CancellationToken,
    task: JoinHandle<Result<(), NodeError>>,
}

impl Nodes {
    /// Nodes that share a secret; none runs.
    pub(crate) fn new(count: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("secret"), secret().to_file_text()).unwrap();
        let addresses = free(count).unwrap().into_iter().map(|port| SocketAddr::from(([127, 0, 0, 1], port))).collect();
        Self { dir, addresses, running: (0..count).map(|_| None).collect() }
    }

    /// Nodes that run as one cluster.
    pub(crate) async fn created(count: usize, shards: u32) -> Self {
        let mut nodes = Self::new(count);
        for id in 1..=count {
            nodes.start(id).await;
        }
        nodes.create(1, shards).await.unwrap();
        for id in 1..=count {
            nodes.ready(id).await;
        }
        nodes
    }

    pub(crate) fn data(&self, id: usize) -> PathBuf {
        self.dir.path().join(format!("node-{id}"))
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn config(&self, id: usize) -> Config {
        let mut config = Config::default();
        config.node.id = id as u64;
        config.node.listen = self.addresses[id - 1];
        config.node.data = self.data(id);
        config.node.secret_file = self.dir.path().join("secret");
        config.node.drain_max = Duration::from_secs(5);
        // A developer's disk that is full of other things must not fail the tests.
        config.node.disk_reserve_percent = 0;
        config.log.segment_bytes = 4 << 20;
        config.raft.heartbeat = Duration::from_millis(100);
        config.raft.heartbeat_min = Duration::from_millis(80);
        config.raft.election_min = Duration::from_millis(500);
        config.raft.election_max = Duration::from_millis(1000);
        config
    }

    pub(crate) async fn start(&mut self, id: usize) {
        self.start_as(id, self.config(id)).await.unwrap();
    }

    pub(crate) async fn start_as(&mut self, id: usize, config: Config) -> Result<(), NodeError> {
        self.start_in(id, config, Surroundings::default()).await
    }

    pub(crate) async fn start_in(
        &mut self,
        id: usize,
        config: Config,
        surroundings: Surroundings,
    ) -> Result<(), NodeError> {
        let node = Node::start_in(config, surroundings).await?;
        let (started, drain) = (node.started(), CancellationToken::new());
        let task = tokio_util::task::TaskTracker::new().spawn(node.run(drain.clone()));
        self.running[id - 1] = Some(Running { started, drain, task });
        Ok(())
    }

    pub(crate) async fn stop(&mut self, id: usize) {
        let Running { started, drain, task } = self.running[id - 1].take().unwrap();
        // A handle keeps the node's parts; the directory is free when the run has ended.
        drop(started);
        drain.cancel();
        task.await.unwrap().unwrap();
    }

    /// Whether the node has ended by itself.
    pub(crate) fn has_ended(&self, id: usize) -> bool {
        self.running[id - 1].as_ref().unwrap().task.is_finished()
    }

    /// The end of a node, however it comes.
    pub(crate) async fn end(&mut self, id: usize) -> Result<(), NodeError> {
        let Running { started, drain, task } = self.running[id - 1].take().unwrap();
        drop(started);
        drain.cancel();
        task.await.unwrap()
    }

    pub(crate) async fn stop_all(&mut self) {
        for id in 1..=self.running.len() {
            if self.running[id - 1].is_some() {
                self.stop(id).await;
            }
        }
    }

    pub(crate) fn started(&self, id: usize) -> &Started {
        &self.running[id - 1].as_ref().unwrap().started
    }

    pub(crate) async fn ready(&self, id: usize) {
        until(&format!("node {id} is ready"), async || self.started(id).readiness().ready).await;
    }

    pub(crate) fn named(&self) -> Vec<meta::Node> {
        let named = |(id, address): (u64, &SocketAddr)| meta::Node {
            node_id: id,
            address: address.to_string(),
            zone: String::new(),
        };
        (1..).zip(&self.addresses).map(named).collect()
    }

    pub(crate) fn channel(&self, id: usize) -> Channel {
        let endpoint = Channel::from_shared(format!("http://{}", self.addresses[id - 1])).unwrap();
        endpoint.connect_lazy()
    }

    pub(crate) fn admin(&self, id: usize) -> AdminClient<Channel> {
        AdminClient::new(self.channel(id))
    }

    pub(crate) fn meta(&self, id: usize) -> MetaClient<Channel> {
        MetaClient::new(self.channel(id))
    }

    pub(crate) async fn create(&self, at: usize, shard_count: u32) -> Result<CreateClusterReply, Status> {
        let request = CreateClusterRequest { shard_count, nodes: self.named() };
        self.admin(at).create_cluster(request).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn create_project(&self, at: usize, sender_id: &str) -> Result<CreateProjectReply, Status> {
        let request = CreateProjectRequest { sender_id: sender_id.into(), ..CreateProjectRequest::default() };
        self.admin(at).create_project(request).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn status(&self, at: usize) -> StatusReply {
        self.admin(at).status(StatusRequest { cluster_wide: true }).await.unwrap().into_inner()
    }

    pub(crate) async fn state(&self, at: usize) -> MetaState {
        self.admin(at).status(StatusRequest { cluster_wide: false }).await.unwrap().into_inner().meta.unwrap()
    }

    pub(crate) async fn knows_projects(&self, at: usize, count: usize) {
        until(&format!("node {at} knows {count} projects"), async || self.state(at).await.projects.len() == count)
            .await;
    }
}

/// The secret of every cluster of these tests.
pub(crate) fn secret() -> ClusterSecret {
    ClusterSecret::new([0xc5; 32])
}

/// Waits until `holds`.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, holds: impl Fn() -> F) {
    let waited = tokio::time::timeout(WAIT_MAX, async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    assert!(waited.await.is_ok(), "waited in vain until {what}");
}
