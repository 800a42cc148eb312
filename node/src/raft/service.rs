//! What peers may ask of the groups of this node.
//!
//! A session of appends is handed to its group's pipeline in order; its errors end it, and whatever of it still arrives is
//! ignored. A quiet group refuses votes and transfers; a group that dropped a drain takes nothing before the leader knows.

use std::{collections::BTreeMap, sync::Arc};

use futures::{Stream, StreamExt, stream::BoxStream};
use martlet_proto::cluster::raft::{
    self as wire, AppendCall, AppendFrame, AppendFrameReply, AppendReply, LivenessCall, LivenessFrame,
    LivenessFrameReply, LivenessReply, SnapshotCall, SnapshotReply, append_reply, liveness_call, liveness_reply,
};
use openraft::raft::{AppendEntriesRequest, StreamAppendError, StreamAppendResult, TransferLeaderRequest, VoteRequest};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{
    client::PIPELINE,
    encode::{from_entry, from_log_id, from_vote, to_log_id, to_vote},
    group::Member,
    line::{NODE_HEADER, settle},
    local::{Floor, Local},
    lost,
    network::Network,
    presence::Said,
    snapshot,
    types::{Raft, Types},
};
use crate::log::GroupId;

/// Replies that may wait to be sent on one stream.
const REPLIES: usize = 1024;
/// Calls of one liveness stream that are worked on at once; more wait in the connection.
const LIVENESS_CALLS: usize = 1024;
/// Replies of one snapshot that may wait to be sent.
const SNAPSHOT_REPLIES: usize = 8;
/// Replies in one frame.
const FRAME_REPLIES: usize = 512;

/// Hands calls of peers to the groups of this node.
#[derive(Debug, Clone)]
pub struct RaftService {
    network: Network,
}

impl RaftService {
    pub(super) fn new(network: Network) -> RaftService {
        RaftService { network }
    }
}

#[tonic::async_trait]
impl wire::raft_server::Raft for RaftService {
    type AppendStream = ReceiverStream<Result<AppendFrameReply, Status>>;
    type LivenessStream = ReceiverStream<Result<LivenessFrameReply, Status>>;
    type SnapshotStream = BoxStream<'static, Result<SnapshotReply, Status>>;

    async fn append(&self, request: Request<Streaming<AppendFrame>>) -> Result<Response<Self::AppendStream>, Status> {
        let own = self.network.clone();
        let (replies, frames) = self.replies(false, move |replies| {
            let Said { wall_ms, state_version } = own.presence().says();
            AppendFrameReply { replies, wall_ms, state_version }
        });
        let connection = Appending { network: self.network.clone(), replies, sessions: BTreeMap::new() };
        self.network.spawn(connection.run(request.into_inner()));
        Ok(Response::new(frames))
    }

    async fn liveness(
        &self,
        request: Request<Streaming<LivenessFrame>>,
    ) -> Result<Response<Self::LivenessStream>, Status> {
        let network = self.network.clone();
        let own = network.clone();
        let (replies, frames) = self.replies(true, move |replies| {
            let Said { wall_ms, state_version } = own.presence().says();
            LivenessFrameReply { replies, wall_ms, state_version }
        });
        let from = request.metadata().get(NODE_HEADER).and_then(|node| node.to_str().ok()?.parse::<u64>().ok());
        let mut calls = request.into_inner();
        let slots = Arc::new(Semaphore::new(LIVENESS_CALLS));
        let guest = from.map(|node| Guest::of(&network, node));
        self.network.spawn(async move {
            let _guest = guest;
            while let Ok(Some(frame)) = calls.message().await {
                if let Some(node) = from {
                    let said = Said { wall_ms: frame.wall_ms, state_version: frame.state_version };
                    network.presence().heard(node, said);
                }
                for call in frame.calls {
                    let slot = slots.clone().acquire_owned().await.expect("the semaphore is never closed");
                    let (network, replies) = (network.clone(), replies.clone());
                    network.clone().spawn(async move {
                        let reply = answer(&network, call).await;
                        // The caller has gone: so has its interest.
                        let _ = replies.send(reply).await;
                        drop(slot);
                    });
                }
            }
        });
        Ok(Response::new(frames))
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<SnapshotCall>>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        let (replies, stream) = mpsc::channel(SNAPSHOT_REPLIES);
        let network = self.network.clone();
        self.network.spawn(async move {
            let last = snapshot::receive(&network, request.into_inner(), &replies).await;
            // The sender has gone: it begins anew if it still has to.
            let _ = replies.send(last).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream).map(Ok))))
    }
}

impl RaftService {
    /// A queue of replies, and the frames it becomes; with `gathers`, each waits for those who are about to reply.
    fn replies<R: Send + 'static, F: Send + 'static>(
        &self,
        gathers: bool,
        frame: impl Fn(Vec<R>) -> F + Send + 'static,
    ) -> (mpsc::Sender<R>, ReceiverStream<Result<F, Status>>) {
        let (tx, mut rx) = mpsc::channel(REPLIES);
        let (frames_tx, frames) = mpsc::channel(1);
        self.network.spawn(async move {
            let mut gathered = Vec::new();
            while rx.recv_many(&mut gathered, FRAME_REPLIES).await > 0 {
                if gathers && gathered.len() < FRAME_REPLIES {
                    settle(&rx).await;
                    while gathered.len() < FRAME_REPLIES
                        && let Ok(reply) = rx.try_recv()
                    {
                        gathered.push(reply);
                    }
                }
                if frames_tx.send(Ok(frame(std::mem::take(&mut gathered)))).await.is_err() {
                    break;
                }
            }
        });
        (tx, ReceiverStream::new(frames))
    }
}

/// A node whose liveness stream is open here. When the last of them ends, the groups that it leads ask around.
struct Guest {
    network: Network,
    node: u64,
}

impl Guest {
    fn of(network: &Network, node: u64) -> Guest {
        network.presence().opened(node);
        Guest { network: network.clone(), node }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.network.presence().closed(self.node) && !self.network.stopping().is_cancelled() {
            self.network.spawn(lost::ask_around(self.network.clone(), self.node));
        }
    }
}

/// One connection of appends.
struct Appending {
    network: Network,
    replies: mpsc::Sender<AppendReply>,
    /// A session that has ended by an error stays, closed, until the caller says so too.
    sessions: BTreeMap<u64, mpsc::Sender<AppendEntriesRequest<Types>>>,
}

impl Appending {
    async fn run(mut self, mut frames: Streaming<AppendFrame>) {
        while let Ok(Some(frame)) = frames.message().await {
            for call in frame.calls {
                let session = call.session;
                if call.ended {
                    self.sessions.remove(&session);
                } else if let Err(outcome) = self.take(call)
                    && self.replies.send(reply(session, outcome)).await.is_err()
                {
                    return;
                }
            }
        }
    }

    fn take(&mut self, call: AppendCall) -> Result<(), append_reply::Outcome> {
        let session = call.session;
        let (local, raft) = find(&self.network, call.group, call.to_replica).map_err(append_reply::Outcome::Failed)?;
        let request = admit(&local, call)?;
        let input = self.sessions.entry(session).or_insert_with(|| {
            let (tx, rx) = mpsc::channel(PIPELINE + 1);
            let results = raft.stream_append(ReceiverStream::new(rx));
            self.network.spawn(answer_session(session, results, self.replies.clone(), self.network.stopping()));
            tx
        });
        match input.try_send(request) {
            // Closed: its error is on the way, and this is what came after.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.sessions.remove(&session);
                Err(append_reply::Outcome::Failed("more appends than a session may have".to_owned()))
            }
        }
    }
}

/// Until the session ends: its input is dropped, or an error was answered.
async fn answer_session(
    session: u64,
    results: impl Stream<Item = Result<StreamAppendResult<Types>, openraft::errors::Fatal<Types>>>,
    replies: mpsc::Sender<AppendReply>,
    stopping: CancellationToken,
) {
    let answering = async {
        let mut results = std::pin::pin!(results);
        while let Some(result) = results.next().await {
            let outcome = result.map_or_else(|fatal| append_reply::Outcome::Failed(fatal.to_string()), outcome);
            if replies.send(reply(session, outcome)).await.is_err() {
                return;
            }
        }
    };
    tokio::select! { () = stopping.cancelled() => {}, () = answering => {} }
}

fn reply(session: u64, outcome: append_reply::Outcome) -> AppendReply {
    AppendReply { session, outcome: Some(outcome) }
}

fn outcome(result: StreamAppendResult<Types>) -> append_reply::Outcome {
    match result {
        Ok(upto) => append_reply::Outcome::Stored(wire::Stored { upto: upto.as_ref().map(to_log_id) }),
        Err(StreamAppendError::Conflict(at)) => append_reply::Outcome::Conflict(to_log_id(&at)),
        Err(StreamAppendError::HigherVote(vote)) => append_reply::Outcome::HigherVote(to_vote(&vote)),
    }
}

/// The group, if the replica that is meant runs here.
pub(super) fn find(network: &Network, group: u32, replica: u64) -> Result<(Arc<Local>, Raft), String> {
    let local = network.local(GroupId(group)).filter(|local| local.replica == replica);
    let running = local.and_then(|local| local.raft.get().cloned().map(|raft| (local, raft)));
    running.ok_or_else(|| format!("replica {replica} of {} is not here", GroupId(group)))
}

/// The request of a call that the group may see.
fn admit(local: &Local, call: AppendCall) -> Result<AppendEntriesRequest<Types>, append_reply::Outcome> {
    let failed = |what: &str| append_reply::Outcome::Failed(what.to_owned());
    if local.log.is_behind() && !call.revert_allowed {
        return Err(append_reply::Outcome::Reverted(true));
    }
    local.hear_everywhere(call.everywhere);
    let vote = call.vote.ok_or_else(|| failed("append without a vote"))?;
    let entries = call.entries.into_iter().map(from_entry).collect::<Result<_, _>>().map_err(|e| failed(&e))?;
    let leader_commit = call.committed.as_ref().map(from_log_id);
    local.hear_committed(vote.term, leader_commit);
    // One that was outvoted may have begun with a wall clock where a newer leader knew better.
    if call.time_ms > 0 && vote.term >= local.own_vote().leader_id().term {
        local.time.told(call.time_ms);
    }
    Ok(AppendEntriesRequest {
        vote: from_vote(&vote),
        prev_log_id: call.previous.as_ref().map(from_log_id),
        entries,
        leader_commit,
    })
}

async fn answer(network: &Network, call: LivenessCall) -> LivenessReply {
    let outcome = match (call.kind, find(network, call.group, call.to_replica)) {
        (Some(liveness_call::Kind::Lost(wire::LostCall { node, address })), _) => {
            liveness_reply::Outcome::Lost(lost::is_lost(network, &Member { node, address }).await)
        }
        (kind, Ok((local, raft))) => liveness(network, &local, &raft, kind).await,
        (_, Err(why)) => liveness_reply::Outcome::Failed(why),
    };
    LivenessReply { call: call.call, outcome: Some(outcome) }
}

async fn liveness(
    network: &Network,
    local: &Local,
    raft: &Raft,
    kind: Option<liveness_call::Kind>,
) -> liveness_reply::Outcome {
    use liveness_reply::Outcome;
    match kind {
        Some(liveness_call::Kind::Vote(call)) => vote(network, local, raft, call, false).await,
        Some(liveness_call::Kind::PreVote(call)) => vote(network, local, raft, call, true).await,
        Some(liveness_call::Kind::Heartbeat(call)) => Outcome::Heartbeat(reply(0, heartbeat(local, raft, call).await)),
        Some(liveness_call::Kind::Transfer(call)) => match transfer(local, raft, call).await {
            Ok(()) => Outcome::Transfer(wire::TransferAnswer { refused: String::new() }),
            Err(refused) => Outcome::Transfer(wire::TransferAnswer { refused }),
        },
        Some(liveness_call::Kind::Lost(_)) | None => Outcome::Failed("unknown call".to_owned()),
    }
}

async fn vote(
    network: &Network,
    local: &Local,
    raft: &Raft,
    call: wire::VoteCall,
    pre: bool,
) -> liveness_reply::Outcome {
    use liveness_reply::Outcome;
    let Some(candidate) = call.vote else { return Outcome::Failed("vote without a vote".to_owned()) };
    let (unwilling, time_ms) = (local.is_unwilling(), local.time.known_ms().unwrap_or(0));
    let below = |floor: Floor| candidate.term <= floor.term || call.last.as_ref().map(from_log_id) < floor.last;
    if local.is_quiet() || local.floor().is_some_and(below) {
        // It may have promised a leader its lease, or have lost what it once voted for.
        let vote = Some(to_vote(&local.own_vote()));
        let last = local.last().as_ref().map(to_log_id);
        return Outcome::Vote(wire::VoteAnswer { vote, granted: false, last, unwilling, time_ms });
    }
    let mut request = VoteRequest::new(from_vote(&candidate), call.last.as_ref().map(from_log_id));
    request.leadership_transfer = call.leadership_transfer
        || (call.lost_leader != 0 && lost::has_lost_leader(network, raft, call.lost_leader).await);
    let answer = if pre { raft.pre_vote(request).await } else { raft.vote(request).await };
    match answer {
        Ok(answer) => Outcome::Vote(wire::VoteAnswer {
            vote: Some(to_vote(&answer.vote)),
            granted: answer.vote_granted,
            last: answer.last_log_id.as_ref().map(to_log_id),
            unwilling,
            time_ms,
        }),
        Err(e) => Outcome::Failed(e.to_string()),
    }
}

async fn heartbeat(local: &Local, raft: &Raft, call: AppendCall) -> append_reply::Outcome {
    let request = match admit(local, call) {
        Ok(request) => request,
        Err(outcome) => return outcome,
    };
    let results = raft.stream_append(futures::stream::iter([request]));
    match std::pin::pin!(results).next().await {
        Some(Ok(result)) => outcome(result),
        Some(Err(fatal)) => append_reply::Outcome::Failed(fatal.to_string()),
        None => append_reply::Outcome::Failed("the group has stopped".to_owned()),
    }
}

async fn transfer(local: &Local, raft: &Raft, call: wire::TransferCall) -> Result<(), String> {
    let from = call.from_leader.ok_or("transfer without a leader")?;
    if local.is_unwilling() && call.to_replica == local.replica {
        return Err("the replica restarted just now, is behind, or is about to stop".to_owned());
    }
    let request = TransferLeaderRequest::new(from_vote(&from), call.to_replica, call.last.as_ref().map(from_log_id));
    match raft.handle_transfer_leader(request).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(refused)) => Err(refused.to_string()),
        Err(fatal) => Err(fatal.to_string()),
    }
}
