//! The gRPC service `Meta`: the watch of the meta state, and commands that other nodes pass on.
//!
//! The watch is served from what this node has on disk, with or without a quorum. A gateway names itself in its first
//! [`WatchRequest`] and confirms every state with another; while its stream is open it counts as there. Ending the request stream
//! in order says goodbye; a connection that breaks does not.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use martlet_proto::cluster::{
    admin::GatewayStatus,
    meta::{
        MetaState, ProposeReply, ProposeRequest, ReadReply, ReadRequest, WatchReply, WatchRequest, meta_server::Meta,
    },
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    meta::{
        membership::Membership,
        watch::{WatchError, Watchers},
    },
    parts::Parts,
};

/// Replies that wait for one slow watcher.
const REPLIES_MAX: usize = 2;

/// What the node knows of its watchers, shared with the service `Admin`.
#[derive(Debug, Clone)]
pub struct Watching {
    watchers: Arc<Mutex<Watchers>>,
    parts: Arc<Parts>,
}

impl Watching {
    /// Nobody watches yet.
    pub fn new(parts: Arc<Parts>) -> Self {
        let watchers = Watchers::new(&parts.config.watch, parts.clock.now());
        Self { watchers: Arc::new(Mutex::new(watchers)), parts }
    }

    /// The gateways that are remembered.
    pub fn status(&self) -> Vec<GatewayStatus> {
        self.lock().status(self.parts.clock.now())
    }

    /// How long unknown gateways may still serve by an older state, milliseconds.
    pub fn unheard_ms(&self) -> u64 {
        self.lock().unheard_ms(self.parts.clock.now())
    }

    fn heard(&self, request: &WatchRequest) -> Result<(), WatchError> {
        self.lock().heard(self.parts.clock.now(), request)
    }

    fn lock(&self) -> MutexGuard<'_, Watchers> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The service.
#[derive(Debug, Clone)]
pub struct MetaService {
    parts: Arc<Parts>,
    membership: Arc<Membership>,
    watching: Watching,
    /// Owner of the tasks that serve watches; awaited at the end.
    tasks: TaskTracker,
    end: CancellationToken,
}

impl MetaService {
    /// Serves until `end` fires.
    pub fn new(
        parts: Arc<Parts>,
        membership: Arc<Membership>,
        watching: Watching,
        tasks: TaskTracker,
        end: CancellationToken,
    ) -> Self {
        Self { parts, membership, watching, tasks, end }
    }
}

#[tonic::async_trait]
impl Meta for MetaService {
    type WatchStream = ReceiverStream<Result<WatchReply, Status>>;

    async fn watch(&self, request: Request<Streaming<WatchRequest>>) -> Result<Response<Self::WatchStream>, Status> {
        let (replies, stream) = mpsc::channel(REPLIES_MAX);
        let watch = Watch {
            requests: request.into_inner(),
            replies,
            kept: self.parts.keeper.kept(),
            watching: self.watching.clone(),
            gateway: None,
        };
        let end = self.end.clone();
        self.parts.metrics.watches.inc();
        let open = self.parts.metrics.watches.clone();
        self.tasks.spawn(async move {
            let mut watch = watch;
            let in_order = tokio::select! { () = end.cancelled() => false, in_order = watch.serve() => in_order };
            watch.close(in_order);
            open.dec();
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn propose(&self, request: Request<ProposeRequest>) -> Result<Response<ProposeReply>, Status> {
        let command = request.into_inner().command.ok_or_else(|| Status::invalid_argument("no command"))?;
        let meta =
            self.membership.meta().ok_or_else(|| Status::failed_precondition("this node belongs to no cluster"))?;
        let reply = meta.propose_here(&command).await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(reply))
    }

    async fn read(&self, _: Request<ReadRequest>) -> Result<Response<ReadReply>, Status> {
        let meta =
            self.membership.meta().ok_or_else(|| Status::failed_precondition("this node belongs to no cluster"))?;
        let reply = meta.read_here().await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(reply))
    }
}

/// One open watch.
struct Watch {
    requests: Streaming<WatchRequest>,
    replies: mpsc::Sender<Result<WatchReply, Status>>,
    kept: watch::Receiver<Arc<MetaState>>,
    watching: Watching,
    gateway: Option<bytes::Bytes>,
}

impl Watch {
    /// Ends with either direction of the stream, or when the node keeps no state any more; whether the watcher ended it in order.
    async fn serve(&mut self) -> bool {
        let keepalive: Duration = self.watching.parts.config.watch.keepalive;
        let mut told = self.tell_state().await;
        while told {
            told = tokio::select! {
                request = self.requests.message() => match request {
                    Ok(Some(request)) => self.hear(request).await,
                    Ok(None) => return true,
                    Err(_) => false,
                },
                changed = self.kept.changed() => changed.is_ok() && self.tell_state().await,
                () = tokio::time::sleep(keepalive) => self.tell(None).await,
            };
        }
        false
    }

    /// Whether the watch goes on.
    async fn hear(&mut self, request: WatchRequest) -> bool {
        if let Err(error) = self.watching.heard(&request) {
            let status = match error {
                WatchError::BadId => Status::invalid_argument(error.to_string()),
                WatchError::Full => Status::resource_exhausted(error.to_string()),
            };
            // The watcher is refused; if it is gone already, nobody is to be told.
            let _ = self.replies.send(Err(status)).await;
            return false;
        }
        if self.gateway.is_none() && !request.gateway.is_empty() {
            self.watching.lock().opened(&request.gateway);
            self.gateway = Some(request.gateway);
        }
        true
    }

    fn close(&self, in_order: bool) {
        if let Some(gateway) = &self.gateway {
            self.watching.lock().closed(self.watching.parts.clock.now(), gateway, in_order);
        }
    }

    async fn tell_state(&mut self) -> bool {
        let state = Arc::clone(&self.kept.borrow_and_update());
        // Before the cluster is created there is nothing to serve by.
        let state = (!state.cluster_id.is_empty()).then(|| self.as_reached_now(&state));
        self.tell(state).await
    }

    /// The node's own address as it is now: a single node may come back on another port, and its gateway must find it.
    fn as_reached_now(&self, state: &MetaState) -> MetaState {
        let parts = &self.watching.parts;
        let mut state = state.clone();
        for node in state.nodes.iter_mut().filter(|node| node.node_id == parts.config.node.id) {
            node.address.clone_from(&parts.address);
        }
        state
    }

    async fn tell(&self, state: Option<MetaState>) -> bool {
        let lease = self.watching.parts.config.watch.lease;
        let lease_ms = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
        // One that takes nothing for a whole lease has lost it; its stream is not worth keeping.
        let sent = tokio::time::timeout(lease, self.replies.send(Ok(WatchReply { state, lease_ms }))).await;
        matches!(sent, Ok(Ok(())))
    }
}
