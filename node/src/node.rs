//! A node as a whole: opens what it has, serves it, and ends in order.
//!
//! Owns the order of start and end. At the start: lock, secret, identity, log, store, listener, meta group, the other replicas as the
//! meta state gives them. At the end: hand leadership over, stop accepting, end the streams, stop the groups, last checkpoint, end
//! mark of the log, lock. Decides nothing about messages.

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use martlet_proto::{
    cluster::{
        admin::{GroupStatus, admin_server::AdminServer},
        meta::meta_server::MetaServer,
        queue::queue_server::QueueServer,
    },
    seal::SecretFileError,
};
use tokio::{
    net::TcpListener,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::{
    Server,
    server::{Router, TcpIncoming},
};

use crate::{
    admission::{Admission, Reserve},
    balance, bases, checkpoints,
    clock::{Clock, SystemClock},
    config::{Config, ConfigError},
    data_dir::{DataDir, DirError},
    disk::{Disk, RealDisk},
    log::{Log, LogConfig, LogError},
    meta::{
        directory::Followed,
        identity::{Identity, IdentityError},
        keep::Keeper,
        membership::{JoinError, Membership},
        secret::Secret,
    },
    metered::Metered,
    metrics::{GroupLabel, HandoverKind, HandoverLabel, Metrics},
    opening,
    parts::Parts,
    raft::{DirectLinks, HandedOver, Links, Network},
    replicas::Replicas,
    rpc::{
        admin::AdminService,
        carry::Carrier,
        meta::{MetaService, Watching},
        peers::{Peers, REPLY_MAX},
        queue::QueueService,
    },
    shard::{Shards, ShardsConfig},
    state::VERSION_KNOWN,
    store::{Store, StoreConfig, StoreError, Which},
};

/// A peer or gateway is asked for a sign of life after this silence, and dropped after the next (design.md section 2).
const PING_AFTER: Duration = Duration::from_secs(1);
const DEAD_AFTER: Duration = Duration::from_secs(3);
/// HTTP/2 windows, of a stream and of a connection, bytes: bulk of many groups at once does not wait for the round trip.
const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 32 << 20;
/// Largest HTTP/2 frame that is taken, bytes: packed entries come in one, not in pieces of 16 KiB.
const FRAME_MAX: u32 = 256 << 10;
/// Largest request that a service takes, bytes. A request holds many batches.
const REQUEST_MAX: usize = 16 << 20;
/// How long connections may stay open once no stream is served.
const LINGER: Duration = Duration::from_secs(1);
/// Longest a part that was told to stop is waited for.
const STOP_MAX: Duration = Duration::from_secs(5);
/// Longest that the last checkpoint is waited for.
const CHECKPOINT_MAX: Duration = Duration::from_secs(10);
/// After this long a step of the way down is said to take long, and again after as much.
const STEP_LONG: Duration = Duration::from_secs(2);
/// Between two samples of the gauges.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);

/// Why a node did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The configuration cannot be run.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The data directory cannot be used.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// The cluster secret cannot be used.
    #[error("node.secret_file: {0}")]
    Secret(#[from] SecretFileError),
    /// The data directory belongs elsewhere.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The kept meta state is damaged.
    #[error(transparent)]
    Kept(#[from] crate::meta::checked_file::FileError),
    /// The log is damaged, or the disk refused it.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The store is damaged, or the disk refused it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The listener cannot be bound.
    #[error("node.listen = {address}: {source}")]
    Listen {
        /// What was configured.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The replica of the meta group cannot be opened.
    #[error(transparent)]
    Meta(#[from] JoinError),
    /// The gRPC server ended by itself.
    #[error("the gRPC server failed: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// A node that serves; clones are handles to the same node.
#[derive(Debug, Clone)]
pub struct Started {
    /// The bound address of gRPC.
    pub grpc: SocketAddr,
    /// Instruments of the node; register them with [`Metrics::register`].
    pub metrics: Arc<Metrics>,
    parts: Arc<Parts>,
    draining: CancellationToken,
}

/// What `/readyz` says about the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readiness {
    /// Whether gateways should be sent here.
    pub ready: bool,
    /// Each check with what it found.
    pub checks: Vec<(&'static str, Result<(), String>)>,
}

impl Started {
    /// Whether the node can serve: it belongs to a cluster, runs the replicas it was given, and does not drain. Never about queues
    /// or quorum.
    pub fn readiness(&self) -> Readiness {
        let state = self.parts.keeper.kept().borrow().clone();
        let cluster = if state.cluster_id.is_empty() { Err("belongs to no cluster yet".into()) } else { Ok(()) };
        let missing: Vec<_> = opening::assigned(&state, self.parts.config.node.id)
            .filter(|(shard, _)| !self.parts.replicas.holds(crate::log::GroupId(shard.shard + 1)))
            .map(|(shard, _)| shard.shard)
            .collect();
        let refusal = missing.iter().find_map(|shard| {
            let why = self.parts.replicas.refusal(crate::log::GroupId(shard + 1))?;
            Some(format!("; shard {shard}: {why}"))
        });
        let replicas = if missing.is_empty() {
            Ok(())
        } else {
            Err(format!("shards {missing:?} are not open yet{}", refusal.unwrap_or_default()))
        };
        let serving = if self.draining.is_cancelled() { Err("drains".into()) } else { Ok(()) };
        let checks = vec![("cluster", cluster), ("replicas", replicas), ("serving", serving)];
        Readiness { ready: checks.iter().all(|(_, found)| found.is_ok()), checks }
    }

    /// How each replica of this node stands.
    pub fn status(&self) -> Vec<GroupStatus> {
        self.parts.replicas.status()
    }

    /// Replicas that have stopped and must be looked at, with the reason.
    pub fn stopped(&self) -> Vec<(String, String)> {
        let stopped = |replica: &crate::replicas::Replica| {
            replica.group.status().stopped.map(|why| (replica.group.id().to_string(), why))
        };
        self.parts.replicas.all().iter().filter_map(stopped).collect()
    }
}

/// What tests replace: files, time, links between nodes, the version of the program.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// Files.
    pub disk: Arc<dyn Disk>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Links to other nodes.
    pub links: Arc<dyn Links>,
    /// Highest state version of shards that the node applies and announces: of a program older or newer than this one.
    pub state_version: u32,
}

impl Default for Surroundings {
    fn default() -> Self {
        Self {
            disk: Arc::new(RealDisk),
            clock: Arc::new(SystemClock),
            links: Arc::new(DirectLinks),
            state_version: VERSION_KNOWN,
        }
    }
}

/// A node whose data is open and whose listener is bound; it serves nothing before [`Node::run`].
#[derive(Debug)]
pub struct Node {
    parts: Arc<Parts>,
    identity: Option<Identity>,
    listener: TcpListener,
    draining: CancellationToken,
    /// Let go last.
    dir: DataDir,
}

impl Node {
    /// Opens the data directory and binds the listener.
    pub async fn start(config: Config) -> Result<Self, NodeError> {
        Self::start_in(config, Surroundings::default()).await
    }

    /// As [`Node::start`], with other files, clocks and links.
    pub async fn start_in(config: Config, surroundings: Surroundings) -> Result<Self, NodeError> {
        config.check()?;
        let Surroundings { disk, clock, links, state_version } = surroundings;
        let secret = Secret::read(&config.node.secret_file)?;
        let dir = DataDir::hold(&config.node.data)?;
        let identity = Identity::read(&*disk, dir.path(), config.node.id, &secret)?;
        let keeper = Keeper::open(Arc::clone(&disk), dir.path())?;
        let refused = |source| NodeError::Listen { address: config.node.listen, source };
        let listener = TcpListener::bind(config.node.listen).await.map_err(refused)?;
        let bound = listener.local_addr().map_err(refused)?;
        let address = if config.node.advertise.is_empty() { bound.to_string() } else { config.node.advertise.clone() };

        let network = Network::new(config.node.id, Arc::clone(&links), Arc::clone(&clock), state_version);
        let metrics = Arc::new(Metrics {
            appends: network.appends_sent(),
            liveness: network.liveness_sent(),
            ..Metrics::default()
        });
        let log_config = LogConfig {
            segment_bytes: config.log.segment_bytes,
            clean_bytes: config.log.checkpoint_bytes,
            kept_bytes_max: config.log.kept_bytes_max,
            ..LogConfig::new(dir.log())
        };
        let (log, recovered) =
            Log::open(log_config, Arc::new(Metered::log(Arc::clone(&disk), &metrics, Arc::clone(&clock))))?;
        if let Some(dropped) = &recovered.dropped {
            tracing::warn!(dropped, "the log ended in a torn write, which was dropped: it had not been acknowledged");
        }
        let store_config = StoreConfig { dir: dir.store(), ..config.store.clone() };
        let store = Arc::new(Store::open(store_config, Arc::clone(&disk), Arc::clone(&clock))?);
        let peers = Peers::new(links);
        let reserve =
            Reserve { percent: config.node.disk_reserve_percent, bytes_min: config.node.disk_reserve_bytes_min };
        let admission =
            Arc::new(Admission::new(Arc::clone(&store), log.clone(), Arc::clone(&disk), dir.path().into(), reserve));
        let overload = {
            let admission = Arc::clone(&admission);
            Arc::new(move || admission.overload())
        };
        let shards = Shards::new(ShardsConfig {
            settings: config.shard.clone(),
            clock: Arc::clone(&clock),
            directory: Arc::new(Followed::new(keeper.kept())),
            metrics: Arc::clone(&metrics),
            overload,
            state_version,
            node: config.node.id,
            courier: Arc::new(Carrier::new(peers.clone(), keeper.kept())),
        });
        shards.hand_over();
        let parts = Parts {
            address,
            dir: dir.path().into(),
            clock,
            disk,
            secret,
            log,
            store,
            shards,
            network,
            peers,
            keeper,
            replicas: Replicas::default(),
            admission,
            metrics,
            config,
        };
        let draining = CancellationToken::new();
        Ok(Self { parts: Arc::new(parts), identity, listener, draining, dir })
    }

    /// The handle that outlives the move into [`Node::run`].
    pub fn started(&self) -> Started {
        Started {
            grpc: self.listener.local_addr().unwrap_or(self.parts.config.node.listen),
            metrics: Arc::clone(&self.parts.metrics),
            parts: Arc::clone(&self.parts),
            draining: self.draining.clone(),
        }
    }

    /// Serves until `drain` fires, then ends in order; returns early when the node cannot go on.
    pub async fn run(self, drain: CancellationToken) -> Result<(), NodeError> {
        let Self { parts, identity, listener, draining, dir } = self;
        // Three ends, in this order: of streams and listener, of the groups, of what keeps their state.
        let (streams_end, groups_end) = (CancellationToken::new(), CancellationToken::new());
        let (streams, tasks) = (TaskTracker::new(), TaskTracker::new());
        tasks.spawn(parts.keeper.clone().run(groups_end.clone()));

        let membership = Arc::new(Membership::new(Arc::clone(&parts)));
        let restarted = identity.is_some();
        if let Some(identity) = identity {
            tracing::info!(cluster = identity.cluster(), node = identity.node_id, "this node is back in its cluster");
            membership.open(identity).await?;
        }
        tasks.spawn(opening::run(Arc::clone(&parts), streams_end.clone()));
        let mut checkpointing = tasks.spawn(checkpoints::run(Arc::clone(&parts), groups_end.clone()));
        tasks.spawn(bases::run(Arc::clone(&parts), groups_end.clone()));
        tasks.spawn(sample(Arc::clone(&parts), groups_end.clone()));
        tasks.spawn(balance::run(Arc::clone(&parts), draining.clone()));

        let router = router(&parts, &membership, restarted, &streams, &streams_end);
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let mut server =
            tasks.spawn(router.serve_with_incoming_shutdown(incoming, streams_end.clone().cancelled_owned()));

        let served = tokio::select! {
            () = drain.cancelled() => Ok(()),
            broken = &mut checkpointing => broken.unwrap_or(Ok(())).map_err(NodeError::Store),
            ended = &mut server => {
                server = tasks.spawn(async { Ok(()) });
                ended.unwrap_or(Ok(())).map_err(NodeError::Serve)
            }
        };
        draining.cancel();
        let leave = async {
            step("handing leadership over", Duration::MAX, step_down(&parts)).await;
            parts.shards.drain();
            // While the groups still run: what is proposed is answered.
            step("ending the streams of gateways", Duration::MAX, parts.shards.shutdown()).await;
            streams_end.cancel();
            streams.close();
            step("ending the watches", STOP_MAX, streams.wait()).await;
        };
        if !step("leaving the cluster's service", parts.config.node.drain_max, leave).await {
            tracing::warn!("the drain took longer than node.drain_max; what is left is cut off");
            streams_end.cancel();
        }
        stop_groups(&parts).await;
        // Peers and gateways that keep their connections open are not waited for to the last.
        if timeout(LINGER, &mut server).await.is_err() {
            server.abort();
        }
        groups_end.cancel();
        end(&parts, &tasks, dir).await;
        served
    }
}

/// One step of the way down, waited for at most `bound`; whether it ended by then. One that takes long is named in the log, so
/// that a node that does not end says what it waits for.
async fn step(what: &'static str, bound: Duration, ending: impl Future<Output = ()>) -> bool {
    let mut ending = std::pin::pin!(ending);
    let (told, mut waited) = (tokio::time::sleep(STEP_LONG.min(bound)), Duration::ZERO);
    let mut told = std::pin::pin!(told);
    loop {
        tokio::select! {
            biased;
            () = ending.as_mut() => return true,
            () = told.as_mut() => waited += STEP_LONG.min(bound - waited),
        }
        if waited >= bound {
            tracing::warn!(what, ?bound, "is not waited for any longer: the node ends without it");
            return false;
        }
        tracing::info!(what, ?waited, "takes long");
        told.as_mut().reset(Instant::now() + STEP_LONG.min(bound - waited));
    }
}

/// Starts a node and serves until `drain` fires.
pub async fn run(config: Config, drain: CancellationToken) -> Result<(), NodeError> {
    Node::start(config).await?.run(drain).await
}

fn router(
    parts: &Arc<Parts>,
    membership: &Arc<Membership>,
    restarted: bool,
    streams: &TaskTracker,
    end: &CancellationToken,
) -> Router {
    let watching = Watching::new(Arc::clone(parts));
    let meta =
        MetaService::new(Arc::clone(parts), Arc::clone(membership), watching.clone(), streams.clone(), end.clone());
    let admin = AdminService::new(Arc::clone(parts), Arc::clone(membership), watching, restarted);
    let queue = QueueService::new(Arc::clone(&parts.shards));
    Server::builder()
        .http2_keepalive_interval(Some(PING_AFTER))
        .http2_keepalive_timeout(Some(DEAD_AFTER))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_MAX)
        .add_service(
            QueueServer::new(queue).max_decoding_message_size(REQUEST_MAX).max_encoding_message_size(REPLY_MAX),
        )
        .add_service(MetaServer::new(meta).max_decoding_message_size(REQUEST_MAX).max_encoding_message_size(REPLY_MAX))
        .add_service(
            AdminServer::new(admin).max_decoding_message_size(REQUEST_MAX).max_encoding_message_size(REPLY_MAX),
        )
        .add_service(parts.network.server())
}

/// Hands every led group to a peer that is caught up and stays, while this node still serves: writes go on until each group's
/// moment. What does not move in time is left to the others' elections.
async fn step_down(parts: &Parts) {
    let replicas = parts.replicas.all();
    // All first: a group must not be handed to this node by another while it hands over its own.
    replicas.iter().for_each(|replica| replica.group.leave());
    // A transfer that fails leaves its group without a leader for an election, which is then waited for.
    let within = parts.config.raft.election_max * 4;
    let handed = futures::future::join_all(replicas.iter().map(|replica| async move {
        let how = match replica.group.hand_over(within).await {
            HandedOver::NotLeading | HandedOver::Alone => return,
            HandedOver::Moved => HandoverKind::Moved,
            HandedOver::NobodyWilling => HandoverKind::NobodyWilling,
            HandedOver::Late => HandoverKind::Late,
        };
        if how != HandoverKind::Moved {
            tracing::warn!(group = %replica.group.id(), ?how, "leadership was not handed over; the others elect");
        }
        parts.metrics.handovers.get_or_create(&HandoverLabel { how }).inc();
    }));
    handed.await;
}

/// Stops every group, then the links between nodes.
async fn stop_groups(parts: &Parts) {
    let groups = parts.replicas.all();
    let stopping = groups.iter().map(|replica| async {
        if timeout(STOP_MAX, replica.group.shutdown()).await.is_err() {
            tracing::warn!(group = %replica.group.id(), "a group did not stop in time");
        }
    });
    futures::future::join_all(stopping).await;
    parts.network.shutdown();
    step("ending the links to peers", STOP_MAX, parts.network.ended()).await;
}

/// The rest of the way down, once nothing is proposed or applied any more. The directory is let go of when nothing writes to it.
async fn end(parts: &Arc<Parts>, tasks: &TaskTracker, dir: DataDir) {
    tasks.close();
    step("ending the tasks of the node", STOP_MAX, tasks.wait()).await;
    // Shortens the next start; what it does not move, the log holds. One that the disk holds up is not waited for: the next start
    // ends it or drops it, as after a crash.
    let (last, moving) = (TaskTracker::new(), Arc::clone(parts));
    last.spawn(async move {
        // What failed is logged.
        let _ = checkpoints::cycle(&moving, Which::All).await;
        drop(dir);
    });
    last.close();
    step("the last checkpoint", CHECKPOINT_MAX, last.wait()).await;
    // On a disk without any room its mark is not waited for without end.
    match timeout(STOP_MAX, parts.log.close()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "the log was not closed; the next start reads it as after a crash"),
        Err(_) => tracing::error!("the log did not close in time; the next start reads it as after a crash"),
    }
}

/// Samples the gauges until `end` fires. Owned by the node, which awaits it.
async fn sample(parts: Arc<Parts>, end: CancellationToken) {
    let metrics = &parts.metrics;
    let clamp = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    loop {
        let (mut led, mut stopped, mut bytes) = (0, 0, 0_u64);
        let replicas = parts.replicas.all();
        for replica in &replicas {
            let status = replica.group.status();
            let label = GroupLabel { group: replica.group.id().0 };
            metrics.term.get_or_create(&label).set(clamp(status.term));
            metrics.applied.get_or_create(&label).set(clamp(status.applied_index));
            metrics.checkpointed.get_or_create(&label).set(clamp(replica.checkpointed()));
            metrics.purged.get_or_create(&label).set(clamp(replica.group.purged()));
            if let Some(base) = replica.rows.base() {
                let age = parts.clock.now().saturating_duration_since(base.since);
                metrics.base_age.get_or_create(&label).set(clamp(age.as_secs()));
                metrics.base_bytes.get_or_create(&label).set(clamp(base.bytes));
                metrics.based.get_or_create(&label).set(clamp(replica.rows.based().unwrap_or(0)));
            }
            let waits = status.waits.as_ref().map_or(0, |stop| stop.at.index);
            metrics.poisoned.get_or_create(&label).set(clamp(waits));
            let shard = label.group.checked_sub(1);
            if let Some(version) = shard.and_then(|shard| parts.shards.state_version(shard)) {
                metrics.state_version.get_or_create(&label).set(i64::from(version));
            }
            led += i64::from(replica.group.leadership().borrow().is_leader);
            stopped += i64::from(status.stopped.is_some());
            bytes += replica.rows.bytes();
        }
        metrics.groups.set(i64::try_from(replicas.len()).unwrap_or(i64::MAX));
        metrics.groups_led.set(led);
        metrics.groups_stopped.set(stopped);
        metrics.memtable_bytes.set(clamp(bytes));
        metrics.log_bytes.set(clamp(parts.log.bytes()));
        metrics.log_segments.set(clamp(parts.log.segments()));
        metrics.log_spares.set(i64::try_from(parts.log.spares()).unwrap_or(i64::MAX));
        metrics.apply_waits.set(parts.store.waits());
        if let Some(free) = parts.admission.look() {
            metrics.disk_free.set(clamp(free));
        }
        metrics.meta_revision.set(parts.keeper.kept().borrow().revision);
        tokio::select! { () = end.cancelled() => return, () = tokio::time::sleep(SAMPLE_EVERY) => {} }
    }
}
