//! Snapshots between replicas: the base file of one becomes the rows of another.
//!
//! Owns the way over the wire, both sides of it. Leaves to whoever gives a group its [`Snapshots`] what a base is and how one is
//! taken; to openraft when one is sent and whether one that came is newer than what is here; to [`super::machine`] the switch.
//!
//! Each transfer has a connection of its own, so that it delays neither appends nor heartbeats. It goes in chunks of at most
//! [`CHUNK_MAX`] bytes, each under a checksum and each acknowledged; at most [`UNTAKEN_MAX`] are under way, so that neither side
//! ever holds more, whatever the snapshot's size. At most [`UNDER_WAY_MAX`] are sent, and as many received, by a node at a time; both
//! sides wait for their turns. A transfer that breaks is begun anew.
//!
//! While one is sent, and a while after, the sender's log is kept from its index on: the receiver goes on from there.

use std::{fmt, future::Future, sync::Arc, time::Duration};

use bytes::Bytes;
use martlet_proto::cluster::raft::{
    self as wire, SnapshotCall, SnapshotChunk, SnapshotReply, SnapshotStart, raft_client::RaftClient, snapshot_call,
    snapshot_reply,
};
use openraft::{
    errors::{ReplicationClosed, StreamingError, Unreachable},
    raft::SnapshotResponse,
    storage::{Snapshot, SnapshotMeta},
    type_config::alias,
};
use tokio::{
    sync::{Semaphore, mpsc},
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};

use super::{
    encode::{from_mark, from_vote, to_vote},
    group::Member,
    line::{DEAD_AFTER, DIAL_TIMEOUT, Dialer, PING_AFTER},
    local::Local,
    network::Network,
    service::find,
    types::{Types, Vote, plain_vote},
};

/// Most bytes of a chunk.
pub const CHUNK_MAX: usize = crate::store::base::CHUNK_MAX;
/// Chunks that are sent and not taken yet.
pub const UNTAKEN_MAX: u64 = 4;
/// Snapshots that a node sends at a time, and as many that it receives. Source: design.md section 4.
pub const UNDER_WAY_MAX: usize = 2;
/// A transfer on which nothing was heard for this long is given up. Longer than any step that has no sign of life.
const STALLED: Duration = Duration::from_secs(60);
/// Longest a receiver lets a sender wait for its turn; below [`STALLED`].
const TURN_MAX: Duration = Duration::from_secs(30);
/// The log is kept for a receiver this long after a transfer ended: then it is caught up, or begins anew.
const KEPT_AFTER: Duration = Duration::from_secs(60);

/// What a snapshot is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// Index of the last entry that it holds.
    pub index: u64,
    /// The mark that the machine was given with that entry.
    pub mark: Bytes,
    /// Number of its rows.
    pub rows: u64,
    /// Their sum.
    pub sum: u64,
    /// Bytes of all chunks, about: whether there is room for them.
    pub bytes: u64,
}

/// Where the snapshots of a replica come from, and where they go to. Nothing here is called on a task that must not wait for a
/// disk, but for [`Snapshots::newest`] and [`Snapshots::open`], which read a head at most.
pub trait Snapshots: fmt::Debug + Send + Sync + 'static {
    /// The mark of the newest that can be sent.
    fn newest(&self) -> Option<Bytes>;
    /// Opens the newest; `None` when there is none.
    fn open(&self) -> Result<Option<Box<dyn Outgoing>>, String>;
    /// Begins to take one.
    fn receive(&self, told: Described) -> Result<Box<dyn Incoming>, String>;
    /// A transfer begins, for whoever counts.
    fn begun(&self, way: Way);
    /// It has ended after so long, and did what it was for, or not.
    fn ended(&self, way: Way, took: Duration, done: bool);
}

/// Whether a snapshot leaves or comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// To another replica.
    Sent,
    /// From another replica.
    Received,
}

/// A snapshot that is read to be sent.
pub trait Outgoing: fmt::Debug + Send {
    /// What it is of.
    fn described(&self) -> Described;
    /// The next chunk, not empty and at most [`CHUNK_MAX`] bytes; `None` at the end.
    fn chunk(&mut self) -> Result<Option<Bytes>, String>;
}

/// A snapshot that is received. Dropped, it is forgotten.
pub trait Incoming: Send {
    /// The next chunk.
    fn chunk(&mut self, bytes: &[u8]) -> Result<(), String>;
    /// All chunks are here; `staged` is told of progress now and then.
    fn finish(self: Box<Self>, staged: &mut dyn FnMut(u64)) -> Result<Box<dyn Staged>, String>;
}

/// A snapshot that is here whole, durable, and seen by nobody. Dropped, it is forgotten.
pub trait Staged: Send {
    /// Makes it what the replica holds. An error stops the replica.
    fn switch(self: Box<Self>) -> Result<(), String>;
}

/// There are none: the log is never purged.
#[derive(Debug, Clone, Copy)]
pub struct NoSnapshots;

impl Snapshots for NoSnapshots {
    fn newest(&self) -> Option<Bytes> {
        None
    }

    fn open(&self) -> Result<Option<Box<dyn Outgoing>>, String> {
        Ok(None)
    }

    fn receive(&self, _: Described) -> Result<Box<dyn Incoming>, String> {
        Err("this replica takes no snapshots".to_owned())
    }

    fn begun(&self, _: Way) {}

    fn ended(&self, _: Way, _: Duration, _: bool) {}
}

/// What openraft hands from one side of a snapshot to the other.
pub(super) enum Snap {
    /// To be sent.
    Outgoing(Box<dyn Outgoing>),
    /// To be installed.
    Staged(Box<dyn Staged>),
    /// How far one would reach, and why there is none.
    Nothing(String),
}

impl fmt::Debug for Snap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Snap::Outgoing(outgoing) => write!(f, "Outgoing({:?})", outgoing.described().index),
            Snap::Staged(_) => f.write_str("Staged"),
            Snap::Nothing(why) => write!(f, "Nothing({why})"),
        }
    }
}

/// Turns for transfers of a node.
#[derive(Debug)]
pub(super) struct Turns {
    sending: Semaphore,
    receiving: Semaphore,
}

impl Default for Turns {
    fn default() -> Self {
        Turns { sending: Semaphore::new(UNDER_WAY_MAX), receiving: Semaphore::new(UNDER_WAY_MAX) }
    }
}

/// Counts a transfer while it lasts.
struct UnderWay {
    snapshots: Arc<dyn Snapshots>,
    way: Way,
    begun: Instant,
    done: bool,
}

impl UnderWay {
    fn begin(snapshots: &Arc<dyn Snapshots>, way: Way) -> UnderWay {
        snapshots.begun(way);
        UnderWay { snapshots: snapshots.clone(), way, begun: Instant::now(), done: false }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.snapshots.ended(self.way, self.begun.elapsed(), self.done);
    }
}

type Sent = Result<SnapshotResponse<Types>, StreamingError<Types>>;

/// Sends a snapshot to a replica and waits until it is installed there.
pub(super) async fn send(
    network: &Network,
    local: &Arc<Local>,
    (target, member): (u64, &Member),
    vote: Vote,
    snap: Snap,
    cancel: impl Future<Output = ReplicationClosed> + Send,
) -> Sent {
    let outgoing = match snap {
        Snap::Outgoing(outgoing) => outgoing,
        Snap::Nothing(why) => return Err(unreachable(why)),
        Snap::Staged(_) => return Err(unreachable("a snapshot that was received is not sent")),
    };
    let sending = async {
        let (group, index) = (local.group, outgoing.described().index);
        // A node that is down takes no turn from one that is there.
        let client = connect(network, member).await?;
        let _turn = network.turns().sending.acquire().await.expect("the semaphore is never closed");
        let _kept = Kept { local, key: local.keep_from(network.next_key(), index) };
        let mut under_way = UnderWay::begin(&local.snapshots, Way::Sent);
        tracing::info!(%group, target, index, "a snapshot is sent");
        let sent = transfer(client, local, target, vote, outgoing).await;
        match &sent {
            Ok(vote) => {
                under_way.done = true;
                tracing::info!(%group, target, index, %vote, "a snapshot was sent and installed");
            }
            Err(why) => tracing::warn!(%group, target, index, why, "a snapshot was not sent; it is begun anew"),
        }
        sent.map(SnapshotResponse::new)
    };
    tokio::select! {
        closed = cancel => Err(StreamingError::Closed(closed)),
        sent = sending => sent.map_err(unreachable),
    }
}

async fn connect(network: &Network, member: &Member) -> Result<RaftClient<Channel>, String> {
    let endpoint = Endpoint::from_static("http://peer")
        .http2_keep_alive_interval(PING_AFTER)
        .keep_alive_timeout(DEAD_AFTER)
        .keep_alive_while_idle(true);
    let dialling = endpoint.connect_with_connector(Dialer::new(member.clone(), network.links()));
    let channel = timeout(DIAL_TIMEOUT, dialling).await.map_err(|_| "dialling timed out".to_owned())?;
    channel.map(RaftClient::new).map_err(|e| format!("dialling {}: {e}", member.address))
}

/// Keeps the log from being purged behind a snapshot's index; when it is dropped, for a while longer.
struct Kept<'a> {
    local: &'a Local,
    key: u64,
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        self.local.keep_until(self.key, Instant::now() + KEPT_AFTER);
    }
}

async fn transfer(
    mut client: RaftClient<Channel>,
    local: &Local,
    target: u64,
    vote: Vote,
    mut outgoing: Box<dyn Outgoing>,
) -> Result<Vote, String> {
    // Never filled: its room is for all that may be untaken, start and end.
    let (calls, stream) = mpsc::channel(UNTAKEN_MAX as usize + 2);
    let Described { index, mark, rows, sum, bytes } = outgoing.described();
    let start = SnapshotStart {
        group: local.group.0,
        from_replica: local.replica,
        to_replica: target,
        vote: Some(to_vote(&vote)),
        index,
        mark,
        rows,
        sum,
        bytes,
    };
    let queue = |kind| {
        let queued = calls.try_send(SnapshotCall { kind: Some(kind) });
        queued.map_err(|_| "the connection takes no more".to_owned())
    };
    queue(snapshot_call::Kind::Start(start))?;
    let mut replies = timeout(STALLED, client.snapshot(ReceiverStream::new(stream)))
        .await
        .map_err(|_| "no answer".to_owned())?
        .map_err(|e| e.to_string())?
        .into_inner();

    let (mut sent, mut taken, mut ended) = (0, 0, false);
    loop {
        while !ended && sent - taken < UNTAKEN_MAX {
            let (back, read) = blocking(move || {
                let read = outgoing.chunk();
                (outgoing, read)
            })
            .await?;
            outgoing = back;
            let kind = match read? {
                Some(rows) => {
                    assert!(!rows.is_empty() && rows.len() <= CHUNK_MAX, "a chunk of {} bytes", rows.len());
                    let crc32c = crc32c::crc32c(&rows);
                    sent += 1;
                    snapshot_call::Kind::Chunk(SnapshotChunk { number: sent - 1, rows, crc32c })
                }
                None => {
                    ended = true;
                    snapshot_call::Kind::End(sent)
                }
            };
            queue(kind)?;
        }
        let reply = timeout(STALLED, replies.message()).await.map_err(|_| "nothing was heard for long".to_owned())?;
        match reply.map_err(|e| e.to_string())?.and_then(|reply| reply.kind) {
            Some(snapshot_reply::Kind::Taken(count)) if count <= sent => taken = count.max(taken),
            Some(snapshot_reply::Kind::Staged(_)) => {}
            Some(snapshot_reply::Kind::Installed(vote)) => return Ok(from_vote(&vote)),
            Some(snapshot_reply::Kind::Failed(why)) => return Err(why),
            Some(snapshot_reply::Kind::Taken(_)) | None => return Err("an answer that was not asked for".to_owned()),
        }
    }
}

/// Takes a snapshot from a peer; the last reply.
pub(super) async fn receive(
    network: &Network,
    calls: Streaming<SnapshotCall>,
    replies: &mpsc::Sender<SnapshotReply>,
) -> SnapshotReply {
    let kind = match receive_all(network, calls, replies).await {
        Ok(vote) => snapshot_reply::Kind::Installed(vote),
        Err(why) => snapshot_reply::Kind::Failed(why),
    };
    SnapshotReply { kind: Some(kind) }
}

async fn receive_all(
    network: &Network,
    mut calls: Streaming<SnapshotCall>,
    replies: &mpsc::Sender<SnapshotReply>,
) -> Result<wire::Vote, String> {
    let Some(snapshot_call::Kind::Start(start)) = next(&mut calls).await? else {
        return Err("a snapshot without a start".to_owned());
    };
    let (local, raft) = find(network, start.group, start.to_replica)?;
    let vote = start.vote.ok_or("a snapshot without a vote")?;
    let own = local.own_vote();
    if plain_vote(&own).term > vote.term {
        return Ok(to_vote(&own));
    }
    if local.waits() {
        return Err("the replica waits before an entry that it cannot apply".to_owned());
    }
    let SnapshotStart { group, from_replica, index, mark, rows, sum, bytes, .. } = start;
    let (at, last_membership) = from_mark(mark.clone()).map_err(|e| e.to_string())?;
    let last_log_id = at.filter(|at| at.index() == index).ok_or("a snapshot with the mark of another index")?;
    let turn = timeout(TURN_MAX, network.turns().receiving.acquire());
    let _turn = turn.await.map_err(|_| "other snapshots are being received".to_owned())?;
    let mut under_way = UnderWay::begin(&local.snapshots, Way::Received);
    tracing::info!(group = %local.group, from_replica, index, rows, "a snapshot comes");

    let snapshots = local.snapshots.clone();
    let mut incoming = blocking(move || snapshots.receive(Described { index, mark, rows, sum, bytes })).await??;
    let mut taken = 0;
    let count = loop {
        let SnapshotChunk { number, rows, crc32c } = match next(&mut calls).await? {
            Some(snapshot_call::Kind::Chunk(chunk)) => chunk,
            Some(snapshot_call::Kind::End(count)) => break count,
            Some(snapshot_call::Kind::Start(_)) | None => return Err("a call that was not due".to_owned()),
        };
        if number != taken || rows.is_empty() || rows.len() > CHUNK_MAX || crc32c::crc32c(&rows) != crc32c {
            return Err(format!("chunk {number} is not what was due, or was damaged on its way"));
        }
        let (back, written) = blocking(move || {
            let written = incoming.chunk(&rows);
            (incoming, written)
        })
        .await?;
        incoming = back;
        written?;
        taken += 1;
        let taken = SnapshotReply { kind: Some(snapshot_reply::Kind::Taken(taken)) };
        replies.send(taken).await.map_err(|_| "the sender has gone".to_owned())?;
    };
    if count != taken {
        return Err(format!("{taken} chunks came of {count}"));
    }
    let progress = replies.clone();
    let staged = blocking(move || {
        incoming.finish(&mut |count| {
            // One is enough to be heard: those that find no room are not missed.
            let _ = progress.try_send(SnapshotReply { kind: Some(snapshot_reply::Kind::Staged(count)) });
        })
    })
    .await??;
    let meta: alias::SnapshotMetaOf<Types> = SnapshotMeta { last_log_id: Some(last_log_id), last_membership };
    let snapshot = Snapshot { meta, snapshot: Snap::Staged(staged) };
    let answer = raft.install_full_snapshot(from_vote(&vote), snapshot).await.map_err(|e| e.to_string())?;
    under_way.done = true;
    tracing::info!(group, from_replica, index, "a snapshot was taken");
    Ok(to_vote(&answer.vote))
}

async fn next(calls: &mut Streaming<SnapshotCall>) -> Result<Option<snapshot_call::Kind>, String> {
    let call = timeout(STALLED, calls.message()).await.map_err(|_| "nothing was heard for long".to_owned())?;
    Ok(call.map_err(|e| e.to_string())?.and_then(|call| call.kind))
}

/// Runs what waits for a disk beside the tasks of the network.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())
}

fn unreachable(why: impl ToString) -> StreamingError<Types> {
    StreamingError::Unreachable(Unreachable::from_string(why))
}
