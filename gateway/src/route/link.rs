//! One node: its channel, and the Submit stream on it.
//!
//! Owns the queue of batches for that node, their packing into requests, and the calls whose answer is awaited. One task a
//! node, owned by the tracker of [`super::Route`]; it dials, serves the stream until it breaks, and dials again with backoff
//! and jitter until `stop` fires. Says of every call whether it may have reached the node: what was never written is `NotSent`,
//! what was written and not answered is `Lost`. Decides nothing about operations.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    time::Duration,
};

use martlet_proto::{
    cluster::queue::{Batch, BatchReply, Operation, SubmitRequest, queue_client::QueueClient},
    shard::Shard,
};
use prost::Message;
use rand::Rng;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};

use super::{RouteConfig, pursuit::Tried};
use crate::{
    entropy::Entropy,
    metrics::{Limit, Metrics},
};

/// HTTP/2 windows, of a stream and of a connection, bytes, as nodes have them: what a node answers and delivers does not wait for
/// the round trip. What is delivered is bounded by its credit all the same.
const STREAM_WINDOW: u32 = 8 << 20;
/// See [`STREAM_WINDOW`].
const CONNECTION_WINDOW: u32 = 32 << 20;
/// Largest HTTP/2 frame that is taken, bytes: packed messages come in one, not in pieces of 16 KiB.
const FRAME_MAX: u32 = 256 << 10;

/// Requests that wait in the stream: few, so that what comes meanwhile is packed together.
const REQUESTS_MAX: usize = 2;
/// How often calls that nobody waits for any more are forgotten.
const SWEEP: Duration = Duration::from_secs(1);

const WAITING: u8 = 0;
const WRITTEN: u8 = 1;
const ABANDONED: u8 = 2;

/// A batch on its way into the stream.
#[derive(Debug)]
struct Call {
    batch: Batch,
    stage: Arc<AtomicU8>,
    reply: oneshot::Sender<BatchReply>,
}

struct Awaited {
    reply: oneshot::Sender<BatchReply>,
    _slot: OwnedSemaphorePermit,
}

/// The handle of one node.
#[derive(Debug)]
pub(crate) struct Link {
    /// `host:port` the node is dialled at.
    pub(crate) address: String,
    /// For streams that are not ours: attachments.
    pub(crate) channel: Channel,
    /// Ends the node's task.
    pub(crate) stop: CancellationToken,
    calls: mpsc::Sender<Call>,
    connected: Arc<AtomicBool>,
    next_call: AtomicU64,
}

/// What serves a [`Link`]; its [`Driver::run`] is the node's task.
pub(crate) struct Driver {
    config: RouteConfig,
    node: u64,
    channel: Channel,
    calls: mpsc::Receiver<Call>,
    connected: Arc<AtomicBool>,
    stop: CancellationToken,
    entropy: Arc<Entropy>,
    metrics: Arc<Metrics>,
}

/// An address that no channel can be made for.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not host:port")]
pub(crate) struct NotAnAddress(String);

/// A channel that connects when it is used, and notices within seconds that the other side is gone.
pub(crate) fn channel(address: &str, config: &RouteConfig) -> Result<Channel, NotAnAddress> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|_| NotAnAddress(address.to_owned()))?;
    Ok(endpoint
        .connect_timeout(config.connect_timeout)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_MAX)
        .http2_keep_alive_interval(config.ping_interval)
        .keep_alive_timeout(config.ping_timeout)
        .keep_alive_while_idle(true)
        .connect_lazy())
}

/// Makes the handle of a node and what serves it.
pub(crate) fn link(
    node: u64,
    address: &str,
    config: &RouteConfig,
    entropy: Arc<Entropy>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) -> Result<(Link, Driver), NotAnAddress> {
    let (send, receive) = mpsc::channel(config.queue_max);
    let connected = Arc::new(AtomicBool::new(false));
    let link = Link {
        address: address.to_owned(),
        // A connection of its own: a flood of deliveries must not delay an answer behind it.
        channel: channel(address, config)?,
        stop: stop.clone(),
        calls: send,
        connected: Arc::clone(&connected),
        next_call: AtomicU64::new(1),
    };
    let driver = Driver {
        config: config.clone(),
        node,
        channel: channel(address, config)?,
        calls: receive,
        connected,
        stop,
        entropy,
        metrics,
    };
    Ok((link, driver))
}

impl Link {
    /// Whether a Submit stream to the node is open.
    pub(crate) fn connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    /// Asks the node; the shard time is 0 where no reply came. Cancelled, it is as if the answer was lost.
    pub(crate) async fn call(
        &self,
        shard: Shard,
        epoch: u64,
        operations: Vec<Operation>,
        within: Duration,
    ) -> (Tried, u64) {
        if !self.connected() {
            return (Tried::NotSent, 0);
        }
        let (reply, answer) = oneshot::channel();
        let stage = Arc::new(AtomicU8::new(WAITING));
        let batch =
            Batch { call: self.next_call.fetch_add(1, Ordering::Relaxed), shard: shard.0.into(), epoch, operations };
        match self.calls.try_send(Call { batch, stage: Arc::clone(&stage), reply }) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => return (Tried::Full, 0),
            Err(mpsc::error::TrySendError::Closed(_)) => return (Tried::NotSent, 0),
        }
        if let Ok(Ok(BatchReply { shard_time_ms, outcome: Some(outcome), .. })) =
            tokio::time::timeout(within, answer).await
        {
            return (Tried::Reply(outcome), shard_time_ms);
        }
        // Whoever sets the stage first decides whether it was written.
        match stage.compare_exchange(WAITING, ABANDONED, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => (Tried::NotSent, 0),
            Err(_) => (Tried::Lost, 0),
        }
    }
}

impl Driver {
    /// Serves the node until `stop` fires.
    pub(crate) async fn run(mut self) {
        let stop = self.stop.clone();
        let mut wait = self.config.retry_min;
        let serve = async {
            loop {
                let opened = self.serve().await;
                if self.connected.swap(false, Ordering::AcqRel) {
                    self.metrics.nodes_connected.dec();
                    wait = self.config.retry_min;
                }
                if let Err(error) = opened {
                    tracing::debug!(node = self.node, %error, "the stream of operations to a node ended");
                }
                // What waits was never written; its callers ask another node.
                while self.calls.try_recv().is_ok() {}
                let jitter = self.entropy.draw(|rng| rng.random_range(0.5..1.0));
                tokio::time::sleep(wait.mul_f64(jitter)).await;
                wait = (wait * 2).min(self.config.dial_max);
            }
        };
        tokio::select! { () = stop.cancelled() => {}, () = serve => {} }
        if self.connected.swap(false, Ordering::AcqRel) {
            self.metrics.nodes_connected.dec();
        }
    }

    /// Opens the stream and serves it until it breaks.
    async fn serve(&mut self) -> Result<(), Status> {
        let (requests, stream) = mpsc::channel(REQUESTS_MAX);
        // An empty request first: some servers open their side only once something came.
        requests.try_send(SubmitRequest::default()).expect("the channel is new");
        let mut client = QueueClient::new(self.channel.clone());
        let opened = client.submit(ReceiverStream::new(stream));
        let replies = tokio::time::timeout(self.config.connect_timeout, opened)
            .await
            .map_err(|_| Status::deadline_exceeded("the node did not open the stream in time"))??
            .into_inner();
        self.connected.store(true, Ordering::Release);
        self.metrics.nodes_connected.inc();

        let awaited = Mutex::new(BTreeMap::new());
        tokio::select! {
            () = write(&self.config, &self.metrics, &mut self.calls, &requests, &awaited) => Ok(()),
            ended = read(replies, &awaited) => ended,
            () = sweep(&awaited) => Ok(()),
        }
    }
}

/// Packs what waits into requests until the stream takes no more.
async fn write(
    config: &RouteConfig,
    metrics: &Metrics,
    calls: &mut mpsc::Receiver<Call>,
    requests: &mpsc::Sender<SubmitRequest>,
    awaited: &Mutex<BTreeMap<u64, Awaited>>,
) {
    let slots = Arc::new(Semaphore::new(config.inflight_max));
    loop {
        // Room in the stream first: what comes while it is full is packed together.
        let Ok(room) = requests.reserve().await else { return };
        if slots.available_permits() == 0 {
            metrics.limit(Limit::Calls);
        }
        let mut slot = Arc::clone(&slots).acquire_owned().await.expect("the semaphore is never closed");
        let Some(mut call) = calls.recv().await else { return };
        let mut batches = Vec::new();
        let mut bytes = 0;
        loop {
            if call.stage.compare_exchange(WAITING, WRITTEN, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                bytes += call.batch.encoded_len();
                lock(awaited).insert(call.batch.call, Awaited { reply: call.reply, _slot: slot });
                batches.push(call.batch);
            }
            if bytes >= config.pack_bytes {
                break;
            }
            // Never a wait here: answers that would free a slot may belong to what is packed and not yet written.
            let Ok(another) = Arc::clone(&slots).try_acquire_owned() else { break };
            let Ok(next) = calls.try_recv() else { break };
            (call, slot) = (next, another);
        }
        if !batches.is_empty() {
            metrics.submits.inc();
            metrics.batches.inc_by(batches.len() as u64);
            room.send(SubmitRequest { batches });
        }
    }
}

async fn read(
    mut replies: Streaming<martlet_proto::cluster::queue::SubmitReply>,
    awaited: &Mutex<BTreeMap<u64, Awaited>>,
) -> Result<(), Status> {
    while let Some(reply) = replies.message().await? {
        for reply in reply.replies {
            if let Some(call) = lock(awaited).remove(&reply.call) {
                // Nobody waits any more: the caller has taken it as lost.
                let _ = call.reply.send(reply);
            }
        }
    }
    Ok(())
}

async fn sweep(awaited: &Mutex<BTreeMap<u64, Awaited>>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        lock(awaited).retain(|_, call| !call.reply.is_closed());
    }
}

fn lock(awaited: &Mutex<BTreeMap<u64, Awaited>>) -> std::sync::MutexGuard<'_, BTreeMap<u64, Awaited>> {
    awaited.lock().unwrap_or_else(PoisonError::into_inner)
}
