//! One line to a peer: a gRPC stream that carries the calls of all groups, coalesced.
//!
//! A line dials when it is first needed, and again after it broke; whoever waits for a reply is told at once. What is queued
//! while a frame is on its way goes into the next. Two kinds of line exist, [`Appends`] and [`Liveness`], each with a
//! connection of its own, so that bulk never delays a heartbeat or a vote.

use std::{
    collections::BTreeMap,
    fmt, io,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use martlet_proto::cluster::raft::{
    AppendCall, AppendFrame, AppendFrameReply, AppendReply, LivenessCall, LivenessFrame, LivenessFrameReply,
    LivenessReply, raft_client::RaftClient,
};
use prometheus_client::metrics::counter::Counter;
use prost::Message;
use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{
    Request, Status, Streaming,
    codegen::Service,
    transport::{Channel, Endpoint, Uri},
};

use super::{
    group::Member,
    links::{Links, Wire},
    presence::{Presence, Said},
};

/// Largest frame that is taken; far above what is sent.
pub(super) const FRAME_BYTES_MAX: usize = 64 << 20;
/// A frame is closed when its calls reach this many bytes.
const FRAME_BYTES: usize = 1 << 20;
/// Times that tasks about to queue a call are let go first; more would be a flood.
const SETTLE_MAX: usize = 16;
/// Calls that may wait for a frame.
const QUEUE: usize = 64;
/// Metadata of a stream that names the node it comes from.
pub(super) const NODE_HEADER: &str = "martlet-node";
pub(super) const DIAL_TIMEOUT: Duration = Duration::from_secs(1);
/// After a failed dial all who ask within this time get its error: one dial for all groups.
const DIAL_PAUSE: Duration = Duration::from_millis(100);
/// design.md section 2: a ping after 1 s of silence, dead after 3 s.
pub(super) const PING_AFTER: Duration = Duration::from_secs(1);
pub(super) const DEAD_AFTER: Duration = Duration::from_secs(2);

/// What travels on a line.
pub(super) trait Lane: Send + Sync + 'static {
    type Call: Message + Default + Send;
    type Reply: Send;
    type Frame: Send;
    type FrameReply: Send;
    /// Whether a frame waits for those who are about to queue a call at this moment, as all groups are at a heartbeat.
    const GATHERS: bool;
    /// Counts what leaves.
    fn sent(home: &Home) -> &Sent;
    fn frame(calls: Vec<Self::Call>, own: Said) -> Self::Frame;
    fn replies(frame: Self::FrameReply) -> Vec<Self::Reply>;
    /// What the peer says of itself.
    fn said(frame: &Self::FrameReply) -> Said;
    /// Who waits for the reply.
    fn key(reply: &Self::Reply) -> u64;
    fn open(
        client: RaftClient<Channel>,
        frames: Request<ReceiverStream<Self::Frame>>,
    ) -> BoxFuture<'static, Result<Streaming<Self::FrameReply>, Status>>;
}

/// Appends of all groups; a key is a session with many replies.
#[derive(Debug)]
pub(super) enum Appends {}

impl Lane for Appends {
    type Call = AppendCall;
    type Reply = AppendReply;
    type Frame = AppendFrame;
    type FrameReply = AppendFrameReply;
    const GATHERS: bool = false;

    fn sent(home: &Home) -> &Sent {
        &home.appends_sent
    }

    fn frame(calls: Vec<AppendCall>, _: Said) -> AppendFrame {
        AppendFrame { calls }
    }

    fn said(frame: &AppendFrameReply) -> Said {
        Said { wall_ms: frame.wall_ms, state_version: frame.state_version }
    }

    fn replies(frame: AppendFrameReply) -> Vec<AppendReply> {
        frame.replies
    }

    fn key(reply: &AppendReply) -> u64 {
        reply.session
    }

    fn open(
        mut client: RaftClient<Channel>,
        frames: Request<ReceiverStream<AppendFrame>>,
    ) -> BoxFuture<'static, Result<Streaming<AppendFrameReply>, Status>> {
        Box::pin(async move { Ok(client.append(frames).await?.into_inner()) })
    }
}

/// Heartbeats, votes, transfers; a key is one call.
#[derive(Debug)]
pub(super) enum Liveness {}

impl Lane for Liveness {
    type Call = LivenessCall;
    type Reply = LivenessReply;
    type Frame = LivenessFrame;
    type FrameReply = LivenessFrameReply;
    const GATHERS: bool = true;

    fn sent(home: &Home) -> &Sent {
        &home.liveness_sent
    }

    fn frame(calls: Vec<LivenessCall>, own: Said) -> LivenessFrame {
        LivenessFrame { calls, wall_ms: own.wall_ms, state_version: own.state_version }
    }

    fn said(frame: &LivenessFrameReply) -> Said {
        Said { wall_ms: frame.wall_ms, state_version: frame.state_version }
    }

    fn replies(frame: LivenessFrameReply) -> Vec<LivenessReply> {
        frame.replies
    }

    fn key(reply: &LivenessReply) -> u64 {
        reply.call
    }

    fn open(
        mut client: RaftClient<Channel>,
        frames: Request<ReceiverStream<LivenessFrame>>,
    ) -> BoxFuture<'static, Result<Streaming<LivenessFrameReply>, Status>> {
        Box::pin(async move { Ok(client.liveness(frames).await?.into_inner()) })
    }
}

/// See the module.
pub(super) struct Line<L: Lane> {
    peer: Member,
    home: Home,
    state: tokio::sync::Mutex<State<L>>,
    /// Connections that are up: one, or for a moment two.
    open: Arc<AtomicUsize>,
}

/// What all lines of a node share.
#[derive(Debug, Clone)]
pub(super) struct Home {
    /// The node itself.
    pub(super) node: u64,
    pub(super) links: Arc<dyn Links>,
    pub(super) presence: Arc<Presence>,
    /// Owner of the tasks that serve lines.
    pub(super) tasks: TaskTracker,
    pub(super) stop: CancellationToken,
    /// Told when a line has closed.
    pub(super) closings: Arc<Notify>,
    /// What left on its lines for appends.
    pub(super) appends_sent: Sent,
    /// What left on its liveness lines.
    pub(super) liveness_sent: Sent,
}

/// What left on the lines of a node, of one kind.
#[derive(Debug, Clone, Default)]
pub struct Sent {
    /// Frames.
    pub frames: Counter,
    /// What was asked in them, of one replica each; the fewer to a frame, the more each costs.
    pub calls: Counter,
}

impl<L: Lane> fmt::Debug for Line<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line").field("peer", &self.peer).finish_non_exhaustive()
    }
}

enum State<L: Lane> {
    Idle,
    Open(Arc<Connection<L>>),
    Refused { at: Instant, why: String },
}

impl<L: Lane> Line<L> {
    pub(super) fn new(peer: Member, home: Home) -> Line<L> {
        Line { peer, home, state: tokio::sync::Mutex::new(State::Idle), open: Arc::default() }
    }

    /// Whether it is connected now.
    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst) > 0
    }

    /// Opens a mailbox for replies under this key, dialling if need be. `replies` is the most that may wait in it.
    pub(super) async fn mailbox(&self, key: u64, replies: usize) -> Result<Mailbox<L>, String> {
        let connection = self.connection().await?;
        let (tx, rx) = mpsc::channel(replies);
        lock(&connection.waiting).insert(key, tx);
        if connection.closed.is_cancelled() {
            // It closed before or while we registered: nobody else would tell us.
            lock(&connection.waiting).remove(&key);
            return Err("connection closed".to_owned());
        }
        Ok(Mailbox { key, rx, connection })
    }

    async fn connection(&self) -> Result<Arc<Connection<L>>, String> {
        let mut state = self.state.lock().await;
        match &*state {
            State::Open(connection) if !connection.closed.is_cancelled() => return Ok(connection.clone()),
            State::Refused { at, why } if at.elapsed() < DIAL_PAUSE => return Err(why.clone()),
            _ => {}
        }
        match tokio::time::timeout(DIAL_TIMEOUT, self.dial())
            .await
            .unwrap_or_else(|_| Err("dialling timed out".to_owned()))
        {
            Ok(connection) => {
                *state = State::Open(connection.clone());
                Ok(connection)
            }
            Err(why) => {
                *state = State::Refused { at: Instant::now(), why: why.clone() };
                Err(why)
            }
        }
    }

    async fn dial(&self) -> Result<Arc<Connection<L>>, String> {
        let channel = Endpoint::from_static("http://peer")
            .initial_stream_window_size(8 << 20)
            .initial_connection_window_size(32 << 20)
            .max_frame_size(256 << 10)
            .http2_keep_alive_interval(PING_AFTER)
            .keep_alive_timeout(DEAD_AFTER)
            .keep_alive_while_idle(true)
            .connect_with_connector(Dialer::new(self.peer.clone(), self.home.links.clone()))
            .await
            .map_err(|e| format!("dialling {}: {e}", self.peer.address))?;
        let client = RaftClient::new(channel)
            .max_decoding_message_size(FRAME_BYTES_MAX)
            .max_encoding_message_size(FRAME_BYTES_MAX);
        // Room for one frame: while it waits for the network the next one gathers calls.
        let (frames_tx, frames) = mpsc::channel(1);
        let mut request = Request::new(ReceiverStream::new(frames));
        request.metadata_mut().insert(NODE_HEADER, self.home.node.into());
        let mut replies = L::open(client, request).await.map_err(|e| e.to_string())?;
        let (queue, mut calls) = mpsc::channel(QUEUE);
        let home = self.home.clone();
        let Home { presence, tasks, stop, closings, .. } = home.clone();
        let closed = stop.child_token();
        let connection = Arc::new(Connection::<L> { queue, waiting: Mutex::default(), closed: closed.clone() });

        // Both tasks end when the connection breaks or the network is shut down; the tracker awaits them.
        let ending = closed.clone();
        tasks.spawn(async move {
            let sending = async {
                while let Some(frame) = gather::<L>(&mut calls, &home).await {
                    if frames_tx.send(frame).await.is_err() {
                        break;
                    }
                }
            };
            tokio::select! { () = ending.cancelled() => {}, () = sending => ending.cancel() }
        });
        let receiving = Arc::downgrade(&connection);
        let (open, node) = (self.open.clone(), self.peer.node);
        open.fetch_add(1, Ordering::SeqCst);
        tasks.spawn(async move {
            let dispatching = async {
                while let Ok(Some(frame)) = replies.message().await {
                    presence.heard(node, L::said(&frame));
                    let Some(connection) = receiving.upgrade() else { break };
                    connection.dispatch(L::replies(frame));
                }
            };
            tokio::select! { () = closed.cancelled() => {}, () = dispatching => closed.cancel() }
            open.fetch_sub(1, Ordering::SeqCst);
            closings.notify_one();
            if let Some(connection) = receiving.upgrade() {
                lock(&connection.waiting).clear();
            }
        });
        Ok(connection)
    }
}

/// Everything that is queued, up to the size of a frame; `None` when nobody can queue any more.
async fn gather<L: Lane>(queue: &mut mpsc::Receiver<L::Call>, home: &Home) -> Option<L::Frame> {
    let first = queue.recv().await?;
    if L::GATHERS {
        settle(queue).await;
    }
    let mut bytes = first.encoded_len();
    let mut calls = vec![first];
    while bytes < FRAME_BYTES
        && let Ok(call) = queue.try_recv()
    {
        bytes += call.encoded_len();
        calls.push(call);
    }
    let sent = L::sent(home);
    sent.frames.inc();
    sent.calls.inc_by(calls.len() as u64);
    Some(L::frame(calls, home.presence.says()))
}

/// Lets tasks that are ready to queue something do so first, as long as some do. Waits for no timer: a lone vote is not held up.
pub(super) async fn settle<T>(queue: &mpsc::Receiver<T>) {
    for _ in 0..SETTLE_MAX {
        let before = queue.len();
        tokio::task::yield_now().await;
        if queue.len() == before {
            break;
        }
    }
}

struct Connection<L: Lane> {
    queue: mpsc::Sender<L::Call>,
    waiting: Mutex<BTreeMap<u64, mpsc::Sender<L::Reply>>>,
    closed: CancellationToken,
}

impl<L: Lane> Connection<L> {
    fn dispatch(&self, replies: Vec<L::Reply>) {
        let waiting = lock(&self.waiting);
        for reply in replies {
            if let Some(mailbox) = waiting.get(&L::key(&reply)) {
                // Sized for all replies that may be due: what does not fit was not asked for.
                let _ = mailbox.try_send(reply);
            }
        }
    }
}

/// Where replies to one key arrive, until it is dropped.
pub(super) struct Mailbox<L: Lane> {
    key: u64,
    rx: mpsc::Receiver<L::Reply>,
    connection: Arc<Connection<L>>,
}

impl<L: Lane> Mailbox<L> {
    /// Queues a call; waits while the line is behind.
    pub(super) async fn send(&self, call: L::Call) -> Result<(), String> {
        tokio::select! {
            () = self.connection.closed.cancelled() => Err("connection closed".to_owned()),
            sent = self.connection.queue.send(call) => sent.map_err(|_| "connection closed".to_owned()),
        }
    }

    /// Queues a call if there is room now.
    pub(super) fn try_send(&self, call: L::Call) {
        // Only used to say goodbye: the peer finds out by itself otherwise.
        let _ = self.connection.queue.try_send(call);
    }

    /// The next reply; `None` when the connection has closed. Safe to cancel.
    pub(super) async fn recv(&mut self) -> Option<L::Reply> {
        self.rx.recv().await
    }
}

impl<L: Lane> Drop for Mailbox<L> {
    fn drop(&mut self) {
        lock(&self.connection.waiting).remove(&self.key);
    }
}

/// Gives tonic the wire that [`Links`] dials.
#[derive(Debug, Clone)]
pub struct Dialer {
    peer: Member,
    links: Arc<dyn Links>,
}

impl Dialer {
    /// Dials this peer.
    pub fn new(peer: Member, links: Arc<dyn Links>) -> Dialer {
        Dialer { peer, links }
    }
}

impl Service<Uri> for Dialer {
    type Response = TokioIo<Box<dyn Wire>>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let dialling = self.links.dial(self.peer.clone());
        Box::pin(async move { dialling.await.map(TokioIo::new) })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
