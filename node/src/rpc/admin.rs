//! The gRPC service `Admin`: what operators ask. Any node answers; what changes the cluster goes to the leader of the meta group.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use martlet_proto::cluster::{
    admin::{
        AddKeyReply, AddKeyRequest, CountsReply, CountsRequest, CreateClusterReply, CreateClusterRequest,
        CreateProjectReply, CreateProjectRequest, GatewayStatus, GroupReply, GroupRequest, ListProjectsReply,
        ListProjectsRequest, MessageReply, MessageRequest, NodeStatus, PrepareReply, PrepareRequest, RecallReply,
        RecallRequest, RevokeKeyReply, RevokeKeyRequest, SkipEntryReply, SkipEntryRequest, StatusReply, StatusRequest,
        TokenReply, TokenRequest, TopicReply, TopicRequest, admin_server::Admin,
    },
    meta::{AddKey, CreateProject, MetaState, Node, Project, RevokeKey, Skip, SkipState, meta_answer, meta_command},
};
use rand::Rng;
use tokio::time::{sleep, timeout};
use tonic::{Request, Response, Status};

use super::meta::Watching;
use crate::{
    meta::{
        group::{MetaError, MetaGroup},
        membership::{JoinError, Membership},
        server_key,
        watch::merge,
    },
    parts::Parts,
};

/// Longest another node is waited for when it is asked how it is.
const STATUS_MAX: Duration = Duration::from_secs(2);
/// Longest a read looks for a leader that makes sure of its place.
const READ_MAX: Duration = Duration::from_secs(5);
/// Beyond a lease, what gateways are given to confirm a revocation.
const CONFIRM_MARGIN: Duration = Duration::from_secs(2);
/// Between two looks whether they have.
const CONFIRM_PAUSE: Duration = Duration::from_millis(200);

/// Longest a new project or key waits until it can be used everywhere.
const SETTLE_MAX: Duration = Duration::from_secs(2);
const SETTLE_PAUSE: Duration = Duration::from_millis(20);

/// The service.
#[derive(Debug, Clone)]
pub struct AdminService {
    pub(super) parts: Arc<Parts>,
    membership: Arc<Membership>,
    watching: Watching,
    /// The node was a member before this start: gateways may have followed it that it has not heard since.
    restarted: bool,
}

impl AdminService {
    /// Serves for this node.
    pub fn new(parts: Arc<Parts>, membership: Arc<Membership>, watching: Watching, restarted: bool) -> Self {
        Self { parts, membership, watching, restarted }
    }

    fn meta(&self) -> Result<MetaGroup, Status> {
        self.membership.meta().ok_or_else(|| Status::failed_precondition("this node belongs to no cluster"))
    }

    pub(super) fn kept(&self) -> Arc<MetaState> {
        Arc::clone(&self.parts.keeper.kept().borrow())
    }

    pub(super) async fn propose(&self, kind: meta_command::Kind) -> Result<meta_answer::Kind, Status> {
        let answer = self.meta()?.propose(kind).await.map_err(|error| Status::unavailable(error.to_string()))?;
        match answer.kind {
            Some(meta_answer::Kind::Refused(why)) => Err(Status::failed_precondition(why)),
            Some(kind) => Ok(kind),
            None => Err(Status::internal("the meta group answered in a way this version does not know")),
        }
    }

    async fn propose_for_project(&self, kind: meta_command::Kind) -> Result<Project, Status> {
        match self.propose(kind).await? {
            meta_answer::Kind::Project(project) => Ok(project),
            meta_answer::Kind::Revision(_) | meta_answer::Kind::Skip(_) | meta_answer::Kind::Refused(_) => {
                Err(Status::internal("the meta group answered without a project"))
            }
        }
    }

    /// Waits, within [`SETTLE_MAX`], until this node's state `fits` and every live gateway serves by it: so that what an operator was
    /// just given can be used at once. No promise: a gateway that is late learns it later.
    async fn settle(&self, fits: impl Fn(&MetaState) -> bool) {
        let settled = async {
            let mut kept = self.parts.keeper.kept();
            let Ok(revision) = kept.wait_for(|state| fits(state)).await.map(|state| state.revision) else { return };
            let lease_ms = millis(self.parts.config.watch.lease);
            loop {
                let (_, gateways) = self.everywhere(&self.kept().nodes).await;
                let live = |gateway: &GatewayStatus| gateway.silent_ms <= lease_ms;
                if !gateways.iter().any(|gateway| live(gateway) && gateway.confirmed_revision < revision) {
                    return;
                }
                sleep(SETTLE_PAUSE).await;
            }
        };
        // Late is not wrong: see above.
        let _ = timeout(SETTLE_MAX, settled).await;
    }

    fn own_status(&self) -> NodeStatus {
        let mut groups = self.parts.replicas.status();
        let kept = self.kept();
        for status in &mut groups {
            let version = status.group.checked_sub(1).and_then(|shard| self.parts.shards.state_version(shard));
            status.state_version = version.unwrap_or(0);
            let Some((poison, shard)) = status.poison.as_ref().zip(status.group.checked_sub(1)) else { continue };
            let held = |skip: &&Skip| (skip.shard, skip.index, skip.state()) == (shard, poison.index, SkipState::Held);
            status.hold = kept.skips.iter().find(held).map_or(0, |skip| skip.hold);
        }
        NodeStatus {
            node_id: self.parts.config.node.id,
            address: self.parts.address.clone(),
            unreachable: String::new(),
            groups,
            log_bytes: self.parts.log.bytes(),
            log_segments: self.parts.log.segments(),
            version: env!("CARGO_PKG_VERSION").into(),
            state_version_known: self.parts.shards.state_version_known(),
        }
    }

    /// This node and, as far as they answer, the others; and the gateways of all of them.
    pub(super) async fn everywhere(&self, nodes: &[Node]) -> (Vec<NodeStatus>, Vec<GatewayStatus>) {
        let own = self.parts.config.node.id;
        let others = join_all(nodes.iter().filter(|node| node.node_id != own).map(|node| self.status_of(node))).await;
        let mut statuses = vec![self.own_status()];
        let mut gateways = self.watching.status();
        for (status, seen) in others {
            statuses.push(status);
            gateways.extend(seen);
        }
        statuses.sort_by_key(|status| status.node_id);
        (statuses, merge(gateways))
    }

    async fn status_of(&self, node: &Node) -> (NodeStatus, Vec<GatewayStatus>) {
        let unreachable = |why: String| {
            let status = NodeStatus {
                node_id: node.node_id,
                address: node.address.clone(),
                unreachable: why,
                ..NodeStatus::default()
            };
            (status, Vec::new())
        };
        let mut admin = self.parts.peers.admin(node);
        let request = StatusRequest { cluster_wide: false };
        match timeout(STATUS_MAX, admin.status(request)).await {
            Err(_) => unreachable(format!("no answer within {} s", STATUS_MAX.as_secs())),
            Ok(Err(status)) => unreachable(status.message().into()),
            Ok(Ok(reply)) => {
                let StatusReply { nodes, gateways, .. } = reply.into_inner();
                match nodes.into_iter().find(|found| found.node_id == node.node_id) {
                    Some(status) => (status, gateways),
                    None => unreachable("another node answers at this address".into()),
                }
            }
        }
    }

    /// Waits until every gateway that holds a lease has confirmed `revision`; returns those that have not.
    async fn confirmed(&self, revision: u64) -> RevokeKeyReply {
        let watch = &self.parts.config.watch;
        let (lease_ms, longest_ms) = (millis(watch.lease), millis(watch.lease + watch.grace));
        let until = self.parts.clock.now() + watch.lease + CONFIRM_MARGIN;
        loop {
            let (nodes, gateways) = self.everywhere(&self.kept().nodes).await;
            let unconfirmed: Vec<_> =
                gateways.into_iter().filter(|gateway| gateway.confirmed_revision < revision).collect();
            let deaf: Vec<_> = nodes.iter().filter(|node| !node.unreachable.is_empty()).collect();
            let waiting = unconfirmed.iter().any(|gateway| gateway.silent_ms <= lease_ms);
            if (waiting || !deaf.is_empty()) && self.parts.clock.now() < until {
                sleep(CONFIRM_PAUSE).await;
                continue;
            }
            // Gateways that no node that answers has heard of: of nodes that do not answer, and of this one before it started.
            let unheard_ms = if self.restarted { self.watching.unheard_ms() } else { 0 };
            let deaf_ms = if deaf.is_empty() { 0 } else { longest_ms };
            let known_ms =
                unconfirmed.iter().map(|gateway| longest_ms.saturating_sub(gateway.silent_ms)).max().unwrap_or(0);
            let nameless = deaf.iter().map(|node| GatewayStatus {
                name: format!("gateways that follow node {} only, which does not answer", node.node_id),
                ..GatewayStatus::default()
            });
            return RevokeKeyReply {
                revision,
                accepts_for_at_most_ms: unheard_ms.max(deaf_ms).max(known_ms),
                unconfirmed: unconfirmed.into_iter().chain(nameless).collect(),
            };
        }
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn create_cluster(
        &self,
        request: Request<CreateClusterRequest>,
    ) -> Result<Response<CreateClusterReply>, Status> {
        let cluster_id = self.membership.create(request.into_inner()).await.map_err(join_status)?;
        Ok(Response::new(CreateClusterReply { cluster_id }))
    }

    async fn prepare(&self, request: Request<PrepareRequest>) -> Result<Response<PrepareReply>, Status> {
        self.membership.prepare(request.into_inner()).await.map_err(join_status)?;
        Ok(Response::new(PrepareReply {}))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        let kept = MetaState::clone(&self.kept());
        if !request.into_inner().cluster_wide {
            let (nodes, gateways) = (vec![self.own_status()], self.watching.status());
            return Ok(Response::new(StatusReply {
                meta: Some(kept),
                nodes,
                gateways,
                meta_unconfirmed: String::new(),
            }));
        }
        // Status is asked for when things are bad: without a quorum it shows what this node has, and says so.
        let read = async {
            match self.membership.meta() {
                Some(meta) => meta.read(STATUS_MAX).await.map(Some),
                None => Ok(None),
            }
        };
        let (read, (nodes, gateways)) = tokio::join!(read, self.everywhere(&kept.nodes));
        let (meta, meta_unconfirmed) = match read {
            Ok(read) => (read.unwrap_or(kept), String::new()),
            Err(error) => (kept, error.to_string()),
        };
        Ok(Response::new(StatusReply { meta: Some(meta), nodes, gateways, meta_unconfirmed }))
    }

    async fn create_project(
        &self,
        request: Request<CreateProjectRequest>,
    ) -> Result<Response<CreateProjectReply>, Status> {
        let CreateProjectRequest { sender_id, text_id, name, server_key } = request.into_inner();
        let server_key = given_or_drawn(server_key);
        let first_key = server_key::keep(&server_key).map_err(Status::invalid_argument)?;
        let candidate_sender_id = rand::rng().random_range(100_000_000_000_u64..=999_999_999_999).to_string();
        let create = CreateProject { sender_id, text_id, name, first_key: Some(first_key), candidate_sender_id };
        let project = self.propose_for_project(meta_command::Kind::CreateProject(create)).await?;
        self.settle(|state| state.projects.iter().any(|known| known.sender_id == project.sender_id)).await;
        Ok(Response::new(CreateProjectReply { project: Some(project), server_key }))
    }

    async fn list_projects(&self, _: Request<ListProjectsRequest>) -> Result<Response<ListProjectsReply>, Status> {
        let state = self.meta()?.read(READ_MAX).await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(ListProjectsReply { projects: state.projects }))
    }

    async fn add_key(&self, request: Request<AddKeyRequest>) -> Result<Response<AddKeyReply>, Status> {
        let AddKeyRequest { sender_id, server_key } = request.into_inner();
        let server_key = given_or_drawn(server_key);
        let key = server_key::keep(&server_key).map_err(Status::invalid_argument)?;
        let sha256 = key.sha256.clone();
        let add = AddKey { sender_id, key: Some(key) };
        let project = self.propose_for_project(meta_command::Kind::AddKey(add)).await?;
        let key = project.server_keys.into_iter().rfind(|key| key.sha256 == sha256);
        let known = |project: &Project| project.server_keys.iter().any(|key| key.sha256 == sha256);
        self.settle(|state| state.projects.iter().any(known)).await;
        Ok(Response::new(AddKeyReply { key, server_key }))
    }

    async fn revoke_key(&self, request: Request<RevokeKeyRequest>) -> Result<Response<RevokeKeyReply>, Status> {
        let RevokeKeyRequest { sender_id, key_id } = request.into_inner();
        match self.propose(meta_command::Kind::RevokeKey(RevokeKey { sender_id, key_id })).await? {
            meta_answer::Kind::Revision(revision) => Ok(Response::new(self.confirmed(revision).await)),
            meta_answer::Kind::Project(_) | meta_answer::Kind::Skip(_) | meta_answer::Kind::Refused(_) => {
                Err(Status::internal("the meta group answered without a revision"))
            }
        }
    }

    async fn skip_entry(&self, request: Request<SkipEntryRequest>) -> Result<Response<SkipEntryReply>, Status> {
        Ok(Response::new(self.skip(request.into_inner()).await?))
    }

    async fn group(&self, request: Request<GroupRequest>) -> Result<Response<GroupReply>, Status> {
        Ok(Response::new(self.read_group(request.into_inner()).await?))
    }

    async fn message(&self, request: Request<MessageRequest>) -> Result<Response<MessageReply>, Status> {
        Ok(Response::new(self.read_message(request.into_inner()).await?))
    }

    async fn token(&self, request: Request<TokenRequest>) -> Result<Response<TokenReply>, Status> {
        Ok(Response::new(self.read_token(request.into_inner()).await?))
    }

    async fn recall(&self, request: Request<RecallRequest>) -> Result<Response<RecallReply>, Status> {
        Ok(Response::new(self.take_back(request.into_inner()).await?))
    }

    async fn topic(&self, request: Request<TopicRequest>) -> Result<Response<TopicReply>, Status> {
        Ok(Response::new(self.read_topic(request.into_inner()).await?))
    }

    async fn counts(&self, request: Request<CountsRequest>) -> Result<Response<CountsReply>, Status> {
        Ok(Response::new(self.read_counts(request.into_inner()).await?))
    }
}

fn given_or_drawn(server_key: String) -> String {
    if server_key.is_empty() { server_key::draw(&mut rand::rng()) } else { server_key }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The table of this edge.
fn join_status(error: JoinError) -> Status {
    let text = error.to_string();
    match error {
        JoinError::Invalid(_) => Status::invalid_argument(text),
        JoinError::Taken { .. } => Status::already_exists(text),
        JoinError::OtherSecret { .. } => Status::permission_denied(text),
        JoinError::Peer { .. }
        | JoinError::Meta(MetaError::NoAnswer | MetaError::NoRead { .. } | MetaError::Stopped(_)) => {
            Status::unavailable(text)
        }
        JoinError::Here { .. } => Status::internal(text),
    }
}
