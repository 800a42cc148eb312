//! How a node becomes a member of a cluster, and is one again after a restart.
//!
//! Creation is explicit and happens once. The asked node takes an identity first, then has each other node take its own, then
//! begins the meta group, then proposes the creation. Each step may be repeated: the cluster id is on the asked node's disk from
//! the first step on, so asking any prepared node again, with the same nodes, goes on where it ended. Invariant: a node that
//! has an identity never takes another.

use std::sync::Arc;

use bytes::Bytes;
use martlet_proto::cluster::{
    admin::{CreateClusterRequest, PrepareRequest, StatusRequest, admin_client::AdminClient},
    meta::{CreateCluster, MetaState, Node, Replica, meta_answer, meta_command},
};
use rand::RngCore;
use tokio::{
    sync::{Mutex, watch},
    time::timeout,
};

use super::{
    group::{MetaError, MetaGroup},
    identity::{Identity, cluster_name},
    machine::MetaMachine,
    state::{self, SHARDS_MAX},
};
use crate::{
    log::GroupId,
    opening,
    parts::Parts,
    raft::{Group, GroupConfig, Member, Timeless, Undecided},
    replicas,
};

/// Longest one peer is waited for.
const PEER_MAX: std::time::Duration = std::time::Duration::from_secs(10);

/// Why a node does not become a member.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// The request names what cannot be.
    #[error("{0}")]
    Invalid(String),
    /// It already is a member.
    #[error("node {node_id} already belongs to cluster {cluster}")]
    Taken {
        /// This node.
        node_id: u64,
        /// Its cluster.
        cluster: String,
    },
    /// Whoever asks holds another secret.
    #[error("node {node_id} holds another cluster secret than the node that asks")]
    OtherSecret {
        /// This node.
        node_id: u64,
    },
    /// A peer refused or did not answer. What was begun goes on when it is asked for again.
    #[error("node {node_id} at {address}: {why}")]
    Peer {
        /// Which.
        node_id: u64,
        /// Where.
        address: String,
        /// What it said.
        why: String,
    },
    /// The meta group did not answer.
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// This node could not keep or open what it must.
    #[error("node {node_id}: {why}")]
    Here {
        /// This node.
        node_id: u64,
        /// What went wrong.
        why: String,
    },
}

/// A node's place in its cluster.
#[derive(Debug)]
pub struct Membership {
    parts: Arc<Parts>,
    member: watch::Sender<Option<MetaGroup>>,
    /// One creation or preparation at a time.
    joining: Mutex<()>,
}

impl Membership {
    /// A member of nothing yet.
    pub fn new(parts: Arc<Parts>) -> Self {
        Self { parts, member: watch::channel(None).0, joining: Mutex::new(()) }
    }

    /// This node's replica of the meta group, once it has one.
    pub fn meta(&self) -> Option<MetaGroup> {
        self.member.borrow().clone()
    }

    /// Opens this node's replica of the meta group.
    pub async fn open(&self, identity: Identity) -> Result<MetaGroup, JoinError> {
        let parts = &self.parts;
        let here = |why: String| JoinError::Here { node_id: parts.config.node.id, why };
        let replica =
            identity.meta_replica().ok_or_else(|| here("the identity names no replica of the meta group".into()))?;
        let kept = Arc::clone(&parts.keeper.kept().borrow());
        if !kept.cluster_id.is_empty() && kept.cluster_id != identity.cluster_id {
            let (kept, own) = (cluster_name(&kept.cluster_id), identity.cluster());
            return Err(here(format!("its meta state is of cluster {kept}, its identity of cluster {own}")));
        }
        let rows = opening::open_rows(parts, GroupId::META, replica).await.map_err(|error| here(error.to_string()))?;
        let machine =
            MetaMachine::load(Arc::clone(&rows), parts.keeper.clone()).map_err(|error| here(error.to_string()))?;
        let config = GroupConfig {
            group: GroupId::META,
            replica,
            // Whoever is elected stays: the meta group's load is no reason to move it.
            preference: vec![],
            settings: parts.config.raft.clone(),
            // It decides for others, and nobody for it.
            decisions: Arc::new(Undecided),
            time: Arc::new(Timeless),
            snapshots: opening::snapshots(parts, GroupId::META, &rows),
        };
        let group = Group::start(config, &parts.log, Box::new(machine), &parts.network)
            .await
            .map_err(|error| here(error.to_string()))?;
        parts.replicas.insert(replicas::Replica { id: replica, group: group.clone(), rows: Arc::clone(&rows) });
        let meta = MetaGroup::new(
            Arc::new(identity),
            group,
            rows,
            parts.keeper.clone(),
            parts.peers.clone(),
            Arc::clone(&parts.clock),
        );
        self.member.send_replace(Some(meta.clone()));
        Ok(meta)
    }

    /// Takes the identity that another node gives this one.
    pub async fn prepare(&self, request: PrepareRequest) -> Result<(), JoinError> {
        let _one = self.joining.lock().await;
        let node_id = self.parts.config.node.id;
        if !self.parts.secret.proves(&request.cluster_id, node_id, &request.secret_proof) {
            return Err(JoinError::OtherSecret { node_id });
        }
        let asked = request.node.as_ref().map_or(0, |node| node.node_id);
        if asked != node_id {
            return Err(JoinError::Invalid(format!("this is node {node_id}, not node {asked}")));
        }
        if request.cluster_id.len() != 16 {
            return Err(JoinError::Invalid("a cluster id has 16 bytes".into()));
        }
        state::check_nodes(&request.nodes).map_err(JoinError::Invalid)?;
        if let Some(meta) = self.meta() {
            // The same creation again, after it failed elsewhere.
            let same = meta.identity.cluster_id == request.cluster_id;
            return if same { Ok(()) } else { Err(self.taken(&meta.identity.cluster_id)) };
        }
        self.join(request.cluster_id, request.nodes, request.meta_replicas).await.map(drop)
    }

    /// Creates the cluster; returns its id when this node has the new meta state on disk.
    pub async fn create(&self, request: CreateClusterRequest) -> Result<Bytes, JoinError> {
        let _one = self.joining.lock().await;
        let node_id = self.parts.config.node.id;
        if request.shard_count == 0 || request.shard_count > SHARDS_MAX {
            return Err(JoinError::Invalid(format!(
                "shard count {} is not between 1 and {SHARDS_MAX}",
                request.shard_count
            )));
        }
        state::check_nodes(&request.nodes).map_err(JoinError::Invalid)?;
        let mut nodes = request.nodes;
        nodes.sort_by_key(|node| node.node_id);
        if !nodes.iter().any(|node| node.node_id == node_id) {
            return Err(JoinError::Invalid(format!("node {node_id}, which was asked, is not among the nodes")));
        }

        let meta = match self.meta() {
            None => {
                // Before anything is written anywhere: a node that cannot join would leave the others bound to nothing.
                for peer in nodes.iter().filter(|node| node.node_id != node_id) {
                    self.is_free(peer).await?;
                }
                let mut cluster_id = [0; 16];
                rand::rng().fill_bytes(&mut cluster_id);
                let replicas =
                    (1..).zip(&nodes).map(|(replica_id, node)| Replica { node_id: node.node_id, replica_id });
                let replicas = replicas.collect();
                self.join(Bytes::copy_from_slice(&cluster_id), nodes, replicas).await?
            }
            Some(meta) => {
                let kept = Arc::clone(&self.parts.keeper.kept().borrow());
                if !kept.cluster_id.is_empty() || meta.identity.nodes != nodes {
                    return Err(self.taken(&meta.identity.cluster_id));
                }
                meta
            }
        };
        for peer in meta.identity.nodes.iter().filter(|node| node.node_id != node_id) {
            self.have_prepared(peer, &meta.identity).await?;
        }
        meta.group.initialize(members(&meta.identity)).await.map_err(|error| self.here(error.to_string()))?;

        let cluster_id = meta.identity.cluster_id.clone();
        let now_ms = self.parts.clock.wall_ms();
        let create = CreateCluster {
            cluster_id: cluster_id.clone(),
            shard_count: request.shard_count,
            nodes: meta.identity.nodes.clone(),
            keys: self.parts.secret.draw_keys(&cluster_id, now_ms, &mut rand::rng()),
            meta_replicas: meta.identity.meta_replicas.clone(),
        };
        let answer = meta.propose(meta_command::Kind::CreateCluster(create)).await?;
        if let Some(meta_answer::Kind::Refused(why)) = answer.kind {
            return Err(JoinError::Invalid(why));
        }
        let created = |state: &Arc<MetaState>| state.cluster_id == cluster_id;
        let mut kept = self.parts.keeper.kept();
        match timeout(PEER_MAX, kept.wait_for(created)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return Err(self.here("the created state did not arrive here in time".into())),
        }
        tracing::info!(cluster = cluster_name(&cluster_id), "cluster created");
        Ok(cluster_id)
    }

    async fn join(&self, cluster_id: Bytes, nodes: Vec<Node>, replicas: Vec<Replica>) -> Result<MetaGroup, JoinError> {
        let parts = &self.parts;
        let identity = Identity::new(cluster_id, parts.config.node.id, nodes, replicas, &parts.secret);
        if identity.meta_replica().is_none() {
            return Err(JoinError::Invalid("this node has no replica of the meta group".into()));
        }
        identity.write(&*parts.disk, &parts.dir).map_err(|error| self.here(error.to_string()))?;
        tracing::info!(cluster = identity.cluster(), "this node belongs to a cluster from now on");
        self.open(identity).await
    }

    async fn is_free(&self, peer: &Node) -> Result<(), JoinError> {
        let reply = self.ask(peer, async |mut admin| admin.status(StatusRequest { cluster_wide: false }).await).await?;
        let meta = reply.meta.unwrap_or_default();
        let found = reply.nodes.first().map_or(0, |node| node.node_id);
        if !meta.cluster_id.is_empty() {
            return Err(peer_error(peer, format!("already belongs to cluster {}", cluster_name(&meta.cluster_id))));
        }
        if found != peer.node_id {
            return Err(peer_error(peer, format!("there is node {found} at this address")));
        }
        Ok(())
    }

    async fn have_prepared(&self, peer: &Node, identity: &Identity) -> Result<(), JoinError> {
        let request = PrepareRequest {
            cluster_id: identity.cluster_id.clone(),
            node: Some(peer.clone()),
            nodes: identity.nodes.clone(),
            meta_replicas: identity.meta_replicas.clone(),
            secret_proof: self.parts.secret.proof(&identity.cluster_id, peer.node_id),
        };
        self.ask(peer, async |mut admin| admin.prepare(request).await).await.map(drop)
    }

    async fn ask<T>(
        &self,
        peer: &Node,
        call: impl AsyncFnOnce(AdminClient<tonic::transport::Channel>) -> Result<tonic::Response<T>, tonic::Status>,
    ) -> Result<T, JoinError> {
        let admin = self.parts.peers.admin(peer);
        match timeout(PEER_MAX, call(admin)).await {
            Ok(Ok(reply)) => Ok(reply.into_inner()),
            Ok(Err(status)) => Err(peer_error(peer, status.message().into())),
            Err(_) => Err(peer_error(peer, format!("no answer within {} s", PEER_MAX.as_secs()))),
        }
    }

    fn taken(&self, cluster_id: &[u8]) -> JoinError {
        JoinError::Taken { node_id: self.parts.config.node.id, cluster: cluster_name(cluster_id) }
    }

    fn here(&self, why: String) -> JoinError {
        JoinError::Here { node_id: self.parts.config.node.id, why }
    }
}

fn peer_error(peer: &Node, why: String) -> JoinError {
    JoinError::Peer { node_id: peer.node_id, address: peer.address.clone(), why }
}

/// The voters of the meta group.
fn members(identity: &Identity) -> std::collections::BTreeMap<u64, Member> {
    let member = |replica: &Replica| {
        let node = identity.node_of_meta(replica.replica_id)?;
        Some((replica.replica_id, Member { node: node.node_id, address: node.address.clone() }))
    };
    identity.meta_replicas.iter().filter_map(member).collect()
}
