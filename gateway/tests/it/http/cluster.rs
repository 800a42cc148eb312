//! Nodes in memory: the real gRPC services over loopback, with one shared idea of what is registered and who leads.
//!
//! Operations are deduped by id as real shards do it, so that a test can see what a repeat does.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use martlet_gateway::{
    Config, Gateway, Started,
    clock::{Clock, SystemClock},
    entropy::Entropy,
};
use martlet_proto::{
    cluster::{
        meta::{
            KeyPurpose, MetaState, Node, Project, ProposeReply, ProposeRequest, ReadReply, ReadRequest, Replica,
            SealedKey, ServerKey, ShardReplicas, WatchReply, WatchRequest, meta_server,
        },
        queue::{
            Accepted, Answer, Answers, BatchReply, ControlReply, ControlRequest, DeliverReply, DeliverRequest,
            Operation, Redirect, Refusal, Refused, Registered, RegistrationRef, Resolved, SubmitReply, SubmitRequest,
            Unregistered, answer, batch_reply, operation, queue_server, refused::Reason, unregister::What,
        },
    },
    seal::ClusterSecret,
    shard::{Shard, ShardCount, shard_of},
    tag::{AndroidId, CheckinKey, DeviceTag, TagKey},
    token::{Iid, RegistrationId, RegistrationToken, TokenKey},
};
use rand::{SeedableRng, rngs::StdRng};
use sha2::{Digest, Sha256};
use tokio::{net::TcpListener, sync::watch};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};

use super::fake_groups::FakeGroups;

pub(crate) const KEY: &str = "key-of-900100";
pub(crate) const SENDER: &str = "900100";
const CLUSTER: &[u8] = b"0123456789abcdef";
const SHARDS: u32 = 8;
/// Lease of a watch, ms.
pub(crate) const LEASE_MS: u64 = 10_000;

/// What a node does with the next batch of Submit, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Does it, and breaks the stream before it answers.
    BreakAfter,
    /// Breaks the stream before it does anything.
    BreakBefore,
    /// Does it and answers Unknown.
    Unknown,
}

#[derive(Debug, Default)]
pub(crate) struct World {
    /// Leader of each shard.
    pub(crate) leaders: BTreeMap<u32, u64>,
    /// Registration id -> sender, application, what supersedes it.
    pub(crate) registered: BTreeMap<Bytes, (String, String, Option<RegistrationRef>)>,
    pub(crate) groups: FakeGroups,
    pub(crate) known: BTreeMap<Bytes, Answer>,
    pub(crate) barred: BTreeSet<Bytes>,
    /// Every operation that a leader was asked for, in order.
    pub(crate) asked: Vec<(u64, Operation)>,
    /// Requests of Submit: node and batches.
    pub(crate) submits: Vec<(u64, usize)>,
    pub(crate) faults: Vec<Fault>,
    pub(crate) refuse: Option<Reason>,
    /// Shards that take nothing.
    pub(crate) away: BTreeSet<u32>,
    pub(crate) time_needed: u32,
    pub(crate) confirmed: Vec<WatchRequest>,
    /// Cancelled: no node serves the watch any more; everything else goes on.
    pub(crate) watch_lost: CancellationToken,
}

pub(crate) struct Cluster {
    pub(crate) world: Arc<Mutex<World>>,
    pub(crate) meta: watch::Sender<MetaState>,
    pub(crate) gateway: Started,
    drain: CancellationToken,
    tasks: TaskTracker,
    stop: CancellationToken,
}

#[derive(Clone)]
struct FakeNode {
    id: u64,
    world: Arc<Mutex<World>>,
    meta: watch::Receiver<MetaState>,
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl queue_server::Queue for FakeNode {
    type SubmitStream = Replies<SubmitReply>;
    type ControlStream = Replies<ControlReply>;
    type DeliverStream = Replies<DeliverReply>;

    async fn submit(
        &self,
        requests: Request<Streaming<SubmitRequest>>,
    ) -> Result<Response<Self::SubmitStream>, Status> {
        let node = self.clone();
        let replies = requests.into_inner().map(move |request| node.submitted(request?));
        Ok(Response::new(Box::pin(replies)))
    }

    async fn control(&self, _: Request<Streaming<ControlRequest>>) -> Result<Response<Self::ControlStream>, Status> {
        Ok(Response::new(Box::pin(futures::stream::pending())))
    }

    async fn deliver(&self, _: Request<Streaming<DeliverRequest>>) -> Result<Response<Self::DeliverStream>, Status> {
        Ok(Response::new(Box::pin(futures::stream::pending())))
    }
}

impl FakeNode {
    fn submitted(&self, request: SubmitRequest) -> Result<SubmitReply, Status> {
        let mut world = self.world.lock().unwrap();
        let mut replies = Vec::new();
        if !request.batches.is_empty() {
            world.submits.push((self.id, request.batches.len()));
        }
        for batch in request.batches {
            let leader = world.leaders.get(&batch.shard).copied().unwrap_or(0);
            let fault = if leader == self.id && !world.faults.is_empty() { Some(world.faults.remove(0)) } else { None };
            if fault == Some(Fault::BreakBefore) {
                return Err(Status::unavailable("broken on purpose"));
            }
            let outcome = if world.away.contains(&batch.shard) {
                let reason = Reason::Overloaded.into();
                batch_reply::Outcome::Refused(Refused { reason, detail: String::new() })
            } else if leader != self.id {
                batch_reply::Outcome::Redirect(Redirect { leader_node: leader, term: 3, epoch: 1 })
            } else if let Some(reason) = world.refuse {
                batch_reply::Outcome::Refused(Refused { reason: reason.into(), detail: String::new() })
            } else if batch.operations.iter().any(|operation| operation.first_try_ms == 0) {
                world.time_needed += 1;
                let reason = Reason::TimeNeeded.into();
                batch_reply::Outcome::Refused(Refused { reason, detail: String::new() })
            } else {
                let answers = batch.operations.into_iter().map(|operation| world.answer(self.id, operation)).collect();
                batch_reply::Outcome::Answers(Answers { answers })
            };
            let outcome = match fault {
                Some(Fault::BreakAfter) => return Err(Status::unavailable("broken on purpose")),
                Some(Fault::Unknown) => batch_reply::Outcome::Unknown(martlet_proto::cluster::queue::Unknown {}),
                Some(Fault::BreakBefore) | None => outcome,
            };
            let shard_time_ms = if leader == self.id { 1_700_000_000_000 } else { 0 };
            replies.push(BatchReply { call: batch.call, shard: batch.shard, shard_time_ms, outcome: Some(outcome) });
        }
        Ok(SubmitReply { replies })
    }
}

impl World {
    fn answer(&mut self, node: u64, operation: Operation) -> Answer {
        self.asked.push((node, operation.clone()));
        let refusal = |refusal: Refusal| Answer { kind: Some(answer::Kind::Refusal(refusal.into())) };
        if let Some(operation::Kind::Resolve(resolve)) = &operation.kind {
            let first = self.known.get(&resolve.id).cloned();
            if first.is_none() {
                self.barred.insert(resolve.id.clone());
            }
            let resolved = Resolved { answer: first.map(Box::new) };
            return Answer { kind: Some(answer::Kind::Resolved(Box::new(resolved))) };
        }
        if self.barred.contains(&operation.id) {
            return refusal(Refusal::ExpiredOperation);
        }
        if let Some(known) = self.known.get(&operation.id) {
            return known.clone();
        }
        let judge = |id: &Bytes, sender: &str, package: &str| match self.registered.get(id) {
            None => refusal(Refusal::NotRegistered),
            Some((owner, ..)) if owner != sender => refusal(Refusal::MismatchSenderId),
            Some((_, app, _)) if !package.is_empty() && app != package => refusal(Refusal::InvalidPackageName),
            Some((.., canonical)) => {
                Answer { kind: Some(answer::Kind::Accepted(Accepted { canonical: canonical.clone() })) }
            }
        };
        let answer = match operation.kind.unwrap() {
            operation::Kind::Enqueue(e) => judge(&e.registration_id, &e.sender, &e.restricted_package_name),
            operation::Kind::Check(c) => return judge(&c.registration_id, &c.sender, &c.restricted_package_name),
            operation::Kind::Register(r) => {
                let row = (r.senders.join(","), r.application, None);
                self.registered.insert(r.registration_id.clone(), row);
                let registration =
                    RegistrationRef { registration_id: r.registration_id, token_key_id: r.token_key_id, iid: r.iid };
                Answer {
                    kind: Some(answer::Kind::Registered(Registered {
                        registration: Some(registration),
                        created: true,
                    })),
                }
            }
            operation::Kind::Unregister(u) => {
                let before = self.registered.len();
                if matches!(u.what, Some(What::WholeApplication(true))) {
                    self.registered.retain(|_, (_, app, _)| *app != u.application);
                }
                let count = u32::try_from(before - self.registered.len()).unwrap();
                Answer { kind: Some(answer::Kind::Unregistered(Unregistered { count })) }
            }
            operation::Kind::GroupChange(change) => self.groups.change(change),
            operation::Kind::GroupGet(get) => return self.groups.get(&get),
            operation::Kind::Resolve(_)
            | operation::Kind::Recall(_)
            | operation::Kind::Subscribe(_)
            | operation::Kind::Unsubscribe(_)
            | operation::Kind::Publish(_)
            | operation::Kind::FanOut(_)
            | operation::Kind::TokenInfo(_) => unreachable!("not asked of this cluster"),
        };
        self.known.insert(operation.id, answer.clone());
        answer
    }
}

#[tonic::async_trait]
impl meta_server::Meta for FakeNode {
    type WatchStream = Replies<WatchReply>;

    async fn watch(&self, requests: Request<Streaming<WatchRequest>>) -> Result<Response<Self::WatchStream>, Status> {
        let world = Arc::clone(&self.world);
        let lost = world.lock().unwrap().watch_lost.clone();
        if lost.is_cancelled() {
            return Err(Status::unavailable("no watch on purpose"));
        }
        let confirmations = requests.into_inner().filter_map(move |request| {
            if let Ok(request) = request {
                world.lock().unwrap().confirmed.push(request);
            }
            std::future::ready(None)
        });
        let states = tokio_stream::wrappers::WatchStream::new(self.meta.clone())
            .map(|state| Ok(WatchReply { state: Some(state), lease_ms: LEASE_MS }));
        let replies = futures::stream::select(states, confirmations);
        Ok(Response::new(Box::pin(replies.take_until(lost.cancelled_owned()))))
    }

    async fn propose(&self, _: Request<ProposeRequest>) -> Result<Response<ProposeReply>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn read(&self, _: Request<ReadRequest>) -> Result<Response<ReadReply>, Status> {
        Err(Status::unimplemented("not needed here"))
    }
}

pub(crate) fn secret() -> ClusterSecret {
    ClusterSecret::new([5; 32])
}

pub(crate) fn token_key(id: u32) -> TokenKey {
    TokenKey::new(id, [id as u8; 32])
}

pub(crate) fn sealed(purpose: KeyPurpose, key_id: u32) -> SealedKey {
    let mut rng = StdRng::seed_from_u64(u64::from(key_id) + 100 * purpose as u64);
    SealedKey {
        purpose: purpose.into(),
        key_id,
        sealed: secret().seal(CLUSTER, purpose, key_id, &[key_id as u8; 32], &mut rng),
        mints: true,
        created_ms: key_id.into(),
    }
}

/// The pair that check-in key 1 makes.
pub(crate) fn device(id: u64) -> (u64, u64) {
    let android_id = AndroidId::new(id).unwrap();
    (id, CheckinKey::new(1, [1; 32]).security_token(android_id).get())
}

pub(crate) fn tag_of(id: u64) -> DeviceTag {
    TagKey::new([1; 32]).tag(AndroidId::new(id).unwrap())
}

/// A token made with `key`, not registered.
pub(crate) fn unregistered(device: u64, key: u32) -> RegistrationToken {
    let mut rng = StdRng::seed_from_u64(device);
    RegistrationToken::draw(&token_key(key), &Iid::invent(&mut rng), tag_of(device), &mut rng)
}

/// Waits until `holds`, a minute at most.
pub(crate) async fn until(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..3_000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("never: {what}");
}

impl Cluster {
    /// `nodes` nodes that share the shards' leaderships, and a gateway that is ready.
    pub(crate) async fn start(nodes: u64) -> Self {
        Self::start_with(nodes, |_| {}).await
    }

    pub(crate) async fn start_with(nodes: u64, change: impl FnOnce(&mut Config)) -> Self {
        Self::start_by(Arc::new(SystemClock), nodes, change).await
    }

    /// The gateway goes by `clock`.
    pub(crate) async fn start_by(clock: Arc<dyn Clock>, nodes: u64, change: impl FnOnce(&mut Config)) -> Self {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let world = Arc::new(Mutex::new(World::default()));
        let mut listeners = Vec::new();
        for id in 1..=nodes {
            listeners.push((id, TcpListener::bind("127.0.0.1:0").await.unwrap()));
        }
        let address = |listener: &TcpListener| listener.local_addr().unwrap().to_string();
        let state = MetaState {
            cluster_id: Bytes::from_static(CLUSTER),
            revision: 1,
            shard_count: SHARDS,
            nodes: listeners
                .iter()
                .map(|(id, listener)| Node { node_id: *id, address: address(listener), zone: String::new() })
                .collect(),
            shards: (0..SHARDS)
                .map(|shard| ShardReplicas {
                    shard,
                    epoch: 1,
                    replicas: (1..=nodes).map(|node_id| Replica { node_id, replica_id: node_id }).collect(),
                })
                .collect(),
            projects: vec![Project {
                sender_id: SENDER.into(),
                text_id: "shop".into(),
                server_keys: vec![ServerKey {
                    key_id: 1,
                    sha256: Bytes::copy_from_slice(&Sha256::digest(KEY)),
                    ..ServerKey::default()
                }],
                name: String::new(),
            }],
            keys: vec![sealed(KeyPurpose::Token, 1), sealed(KeyPurpose::Checkin, 1), sealed(KeyPurpose::Tag, 1)],
            ..MetaState::default()
        };
        world.lock().unwrap().leaders = (0..SHARDS).map(|shard| (shard, 1 + u64::from(shard) % nodes)).collect();
        let seeds = listeners.iter().map(|(_, listener)| address(listener)).collect();
        let meta = watch::Sender::new(state);
        for (id, listener) in listeners {
            let node = FakeNode { id, world: Arc::clone(&world), meta: meta.subscribe() };
            let server = tonic::transport::Server::builder()
                .add_service(queue_server::QueueServer::new(node.clone()))
                .add_service(meta_server::MetaServer::new(node))
                .serve_with_incoming(TcpListenerStream::new(listener));
            let stop = stop.clone();
            tasks.spawn(async move {
                tokio::select! { () = stop.cancelled() => {}, _ = server => {} }
            });
        }
        let mut config = Config::default();
        config.gateway.seeds = seeds;
        config.gateway.http = Some("127.0.0.1:0".parse().unwrap());
        config.route.deadline = Duration::from_secs(8);
        config.route.resolve_reserve = Duration::from_secs(6);
        change(&mut config);
        let gateway = Gateway::start_with(config, secret(), clock, Arc::new(Entropy::seeded(1)));
        let gateway = gateway.await.unwrap();
        let (started, drain) = (gateway.started(), CancellationToken::new());
        tasks.spawn({
            let drain = drain.clone();
            async move { gateway.run(drain).await.unwrap() }
        });
        started.until_ready().await;
        Self { world, meta, gateway: started, drain, tasks, stop }
    }

    /// A live registration of a device, for [`SENDER`] and the application `com.shop`.
    pub(crate) fn registered(&self, device: u64) -> RegistrationToken {
        let token = unregistered(device, 1);
        self.register(&token, None);
        token
    }

    pub(crate) fn register(&self, token: &RegistrationToken, superseded_by: Option<&RegistrationToken>) {
        let canonical = superseded_by.map(|token| RegistrationRef {
            registration_id: Bytes::copy_from_slice(&token.registration_id().0),
            token_key_id: token.key_id(),
            iid: token.iid().as_str().into(),
        });
        let row = (SENDER.to_owned(), "com.shop".to_owned(), canonical);
        let RegistrationId(id) = token.registration_id();
        self.world.lock().unwrap().registered.insert(Bytes::copy_from_slice(&id), row);
    }

    pub(crate) fn shard(&self, token: &RegistrationToken) -> Shard {
        shard_of(token.device_tag(), ShardCount::new(SHARDS).unwrap())
    }

    pub(crate) fn shard_of_tag(&self, tag: u64) -> Shard {
        shard_of(DeviceTag(tag), ShardCount::new(SHARDS).unwrap())
    }

    pub(crate) async fn client(&self) -> super::client::Client {
        super::client::Client::connect(self.gateway.http.unwrap()).await
    }

    /// Drains the gateway and waits until everything has ended.
    pub(crate) async fn stop(self) {
        self.drain.cancel();
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}
