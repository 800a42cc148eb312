//! This node's replica of the meta group, and the way of a command to its leader.
//!
//! A command that was proposed and not answered may be proposed again: every command of the meta state answers a repetition as it
//! did first (see [`super::state`]). Nothing here decides what a command does.

use std::{sync::Arc, time::Duration};

use martlet_proto::cluster::meta::{
    MetaAnswer, MetaCommand, MetaState, ProposeReply, ProposeRequest, ReadReply, ReadRequest, meta_command,
};
use prost::Message;
use tokio::time::{sleep, timeout};

use super::{identity::Identity, keep::Keeper};
use crate::{
    clock::Clock,
    raft::{Group, ProposeError, ReadError, Reply},
    rpc::peers::Peers,
    store::ShardStore,
};

/// Longest an operator's command looks for a leader that answers it.
const PROPOSE_MAX: Duration = Duration::from_secs(15);
/// Longest one node is waited for.
const ONE_TRY_MAX: Duration = Duration::from_secs(5);
/// Between two tries while no leader is known.
const PAUSE: Duration = Duration::from_millis(100);

/// Why a command was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MetaError {
    /// No leader answered in time. The command may still be applied; giving it again is harmless.
    #[error("no leader of the meta group answered within {} s; the change may still happen, and may be asked for again", PROPOSE_MAX.as_secs())]
    NoAnswer,
    /// No leader could make sure in time that it leads.
    #[error("no leader of the meta group answered a read within {} s: it has no quorum, or this node is cut off from it", within.as_secs())]
    NoRead {
        /// How long was waited.
        within: Duration,
    },
    /// The replica on this node has stopped.
    #[error("the meta group has stopped on this node: {0}")]
    Stopped(String),
}

/// A member of the meta group.
#[derive(Debug, Clone)]
pub struct MetaGroup {
    /// Who this node is.
    pub identity: Arc<Identity>,
    /// The replica.
    pub group: Group,
    /// Its rows.
    pub rows: Arc<ShardStore>,
    keeper: Keeper,
    peers: Peers,
    clock: Arc<dyn Clock>,
}

impl MetaGroup {
    /// Takes a replica that was started.
    pub fn new(
        identity: Arc<Identity>,
        group: Group,
        rows: Arc<ShardStore>,
        keeper: Keeper,
        peers: Peers,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self { identity, group, rows, keeper, peers, clock }
    }

    /// Proposes here, for another node: answered, or told who leads.
    pub async fn propose_here(&self, command: &MetaCommand) -> Result<ProposeReply, MetaError> {
        match self.group.propose(command.encode_to_vec().into()).await {
            Ok(Reply::Meta(answer)) => Ok(ProposeReply { answer: Some(answer), ..ProposeReply::default() }),
            Ok(Reply::Shard(_) | Reply::None) => Err(MetaError::Stopped("it answered as no meta group does".into())),
            Err(ProposeError::NotLeader { leader, .. }) => {
                let leader = leader.and_then(|replica| self.identity.node_of_meta(replica));
                let leader_node = leader.map_or(0, |node| node.node_id);
                Ok(ProposeReply { answer: None, leader_node, not_leader: true })
            }
            Err(ProposeError::Unknown) => Err(MetaError::NoAnswer),
            Err(ProposeError::Stopped(why)) => Err(MetaError::Stopped(why)),
        }
    }

    /// Has the leader apply the command, wherever it is; stamped with this node's wall time.
    pub async fn propose(&self, kind: meta_command::Kind) -> Result<MetaAnswer, MetaError> {
        let command = MetaCommand { now_ms: self.clock.wall_ms(), kind: Some(kind) };
        timeout(PROPOSE_MAX, self.propose_until_answered(&command)).await.unwrap_or(Err(MetaError::NoAnswer))
    }

    /// Reads here, for another node: after a read check, or told who leads.
    pub async fn read_here(&self) -> Result<ReadReply, MetaError> {
        match self.group.read_barrier().await {
            Ok(_) => Ok(ReadReply { state: Some(MetaState::clone(&self.keeper.newest())), leader_node: 0 }),
            Err(ReadError::NotLeader { leader, .. }) => {
                let leader = leader.and_then(|replica| self.identity.node_of_meta(replica));
                Ok(ReadReply { state: None, leader_node: leader.map_or(0, |node| node.node_id) })
            }
            Err(ReadError::Stopped(why)) => Err(MetaError::Stopped(why)),
        }
    }

    /// The state with every change that was answered before, read where the leader is.
    pub async fn read(&self, within: Duration) -> Result<MetaState, MetaError> {
        timeout(within, self.read_until_answered()).await.unwrap_or(Err(MetaError::NoRead { within }))
    }

    async fn read_until_answered(&self) -> Result<MetaState, MetaError> {
        let mut ask = self.identity.node_id;
        let mut others = self.identity.nodes.iter().map(|node| node.node_id).cycle();
        loop {
            let reply = if ask == self.identity.node_id { self.read_here().await } else { self.read_at(ask).await };
            match reply {
                Ok(ReadReply { state: Some(state), .. }) => return Ok(state),
                Ok(reply) if reply.leader_node != 0 && reply.leader_node != ask => ask = reply.leader_node,
                Ok(_) | Err(_) => {
                    sleep(PAUSE).await;
                    ask = others.next().expect("a cluster has nodes");
                }
            }
        }
    }

    async fn read_at(&self, node_id: u64) -> Result<ReadReply, MetaError> {
        let node = self.identity.nodes.iter().find(|node| node.node_id == node_id).ok_or(MetaError::NoAnswer)?;
        let mut meta = self.peers.meta(node);
        match timeout(ONE_TRY_MAX, meta.read(ReadRequest {})).await {
            Ok(Ok(reply)) => Ok(reply.into_inner()),
            Ok(Err(_)) | Err(_) => Err(MetaError::NoAnswer),
        }
    }

    async fn propose_until_answered(&self, command: &MetaCommand) -> Result<MetaAnswer, MetaError> {
        // Who to ask next; this node knows the leader unless it is cut off, or has stopped.
        let mut ask = self.identity.node_id;
        let mut others = self.identity.nodes.iter().map(|node| node.node_id).cycle();
        loop {
            let reply = if ask == self.identity.node_id {
                self.propose_here(command).await
            } else {
                self.propose_at(ask, command).await
            };
            match reply {
                Ok(ProposeReply { answer: Some(answer), .. }) => return Ok(answer),
                Ok(reply) if reply.leader_node != 0 && reply.leader_node != ask => ask = reply.leader_node,
                Ok(_) | Err(_) => {
                    sleep(PAUSE).await;
                    ask = others.next().expect("a cluster has nodes");
                }
            }
        }
    }

    async fn propose_at(&self, node_id: u64, command: &MetaCommand) -> Result<ProposeReply, MetaError> {
        let node = self.identity.nodes.iter().find(|node| node.node_id == node_id).ok_or(MetaError::NoAnswer)?;
        let mut meta = self.peers.meta(node);
        let request = ProposeRequest { command: Some(command.clone()) };
        match timeout(ONE_TRY_MAX, meta.propose(request)).await {
            Ok(Ok(reply)) => Ok(reply.into_inner()),
            Ok(Err(_)) | Err(_) => Err(MetaError::NoAnswer),
        }
    }
}
