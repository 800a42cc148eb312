//! What one group asks of one replica of itself, on openraft's behalf.

use std::{future::Future, sync::Arc, time::Duration};

use futures::{Stream, StreamExt, stream};
use martlet_proto::cluster::raft as wire;
use openraft::{
    RPCTypes, RaftNetworkFactory,
    base::{BoxFuture, BoxStream},
    errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable},
    network::{Backoff, NetBackoff, NetSnapshot, NetStreamAppend, NetTransferLeader, NetVote, RPCOption},
    raft::{
        AppendEntriesRequest, SnapshotResponse, StreamAppendError, StreamAppendResult, TransferLeaderRequest,
        TransferLeaderResponse, VoteRequest, VoteResponse,
    },
    type_config::alias,
};
use tokio::time::Instant;
use wire::{append_reply, liveness_call, liveness_reply};

use super::{
    company::Company,
    encode::{from_log_id, from_vote, to_entry, to_log_id, to_vote},
    group::Member,
    line::{Appends, Mailbox},
    local::Local,
    network::{Asked, Network, Peer},
    snapshot::{self, Snap},
    types::{LogId, Types, Vote},
};

/// Appends of one session that may be unanswered.
pub(super) const PIPELINE: usize = 64;
/// A session that has heard nothing for this long, with appends unanswered, is begun anew.
const STALLED: Duration = Duration::from_secs(2);

type Rpc<T> = Result<T, RPCError<Types>>;

/// Makes clients for openraft.
pub(super) struct Clients {
    pub(super) network: Network,
    pub(super) local: Arc<Local>,
}

impl Clients {
    /// How another replica stands, or `None` when it does not answer. Changes nothing there.
    pub(super) async fn standing(&self, target: u64, node: &Member, timeout: Duration) -> Option<Standing> {
        let client = self.client(target, node, Purpose::Heartbeat);
        // No replica grants this, and every answer says where it stands.
        let nothing = VoteRequest::new(Vote::new(0, self.local.replica), None);
        let answer = client.ask_for_vote(nothing, liveness_call::Kind::PreVote, timeout).await.ok()?;
        let (term, last) = (answer.vote?.term, answer.last.as_ref().map(from_log_id));
        Some(Standing {
            term,
            last,
            is_willing: !answer.unwilling,
            time_ms: (answer.time_ms > 0).then_some(answer.time_ms),
        })
    }
}

/// How a replica stands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Standing {
    /// Newest term it has voted in.
    pub(super) term: u64,
    /// Its last entry.
    pub(super) last: Option<LogId>,
    /// Whether it would take leadership.
    pub(super) is_willing: bool,
    /// The group's own time when it answered, milliseconds since 1970, if it knows.
    pub(super) time_ms: Option<u64>,
}

impl RaftNetworkFactory<Types> for Clients {
    type Network = Client;

    async fn new_client(&mut self, target: u64, node: &Member) -> Client {
        self.client(target, node, Purpose::Replication)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &Member) -> Client {
        self.client(target, node, Purpose::Heartbeat)
    }
}

impl Clients {
    fn client(&self, target: u64, node: &Member, purpose: Purpose) -> Client {
        let peer = self.network.peer(node);
        let (network, local) = (self.network.clone(), self.local.clone());
        Client { network, local, target, member: node.clone(), peer, purpose }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Replication,
    Heartbeat,
}

/// From one group to one of its other replicas.
pub(super) struct Client {
    network: Network,
    local: Arc<Local>,
    target: u64,
    member: Member,
    peer: Arc<Peer>,
    purpose: Purpose,
}

impl Client {
    fn append_call(&self, session: u64, request: &AppendEntriesRequest<Types>) -> wire::AppendCall {
        wire::AppendCall {
            session,
            group: self.local.group.0,
            from_replica: self.local.replica,
            to_replica: self.target,
            vote: Some(to_vote(&request.vote)),
            previous: request.prev_log_id.as_ref().map(to_log_id),
            entries: request.entries.iter().map(to_entry).collect(),
            committed: request.leader_commit.as_ref().map(to_log_id),
            ended: false,
            everywhere: self.local.everywhere(),
            revert_allowed: self.local.revert_allowed(self.target, request.vote.leader_id().term),
            time_ms: self.local.time.known_ms().unwrap_or(0),
        }
    }

    /// One call of the liveness line and its answer.
    async fn ask(
        &self,
        kind: liveness_call::Kind,
        action: RPCTypes,
        timeout: Duration,
    ) -> Rpc<liveness_reply::Outcome> {
        let to = (self.local.group.0, self.local.replica, self.target);
        match self.peer.ask(self.network.next_key(), to, kind, timeout).await {
            Asked::Answered(outcome) => Ok(outcome),
            Asked::Broken(why) => Err(broken(why)),
            Asked::Unreachable(why) => Err(unreachable(why)),
            Asked::Silent => Err(self.timed_out(action, timeout)),
        }
    }

    async fn ask_for_vote(
        &self,
        request: VoteRequest<Types>,
        kind: fn(wire::VoteCall) -> liveness_call::Kind,
        timeout: Duration,
    ) -> Rpc<wire::VoteAnswer> {
        // openraft marks both as transfers; only the leader's own word overrides its lease without a look.
        let lost_leader = self.local.claimed(request.vote.leader_id().term).unwrap_or(0);
        let call = wire::VoteCall {
            vote: Some(to_vote(&request.vote)),
            last: request.last_log_id.as_ref().map(to_log_id),
            leadership_transfer: request.leadership_transfer && lost_leader == 0,
            lost_leader,
        };
        match self.ask(kind(call), RPCTypes::Vote, timeout).await? {
            liveness_reply::Outcome::Vote(answer) => Ok(answer),
            _ => Err(broken("not an answer to a vote")),
        }
    }

    async fn heartbeat(
        &self,
        request: AppendEntriesRequest<Types>,
        timeout: Duration,
    ) -> Rpc<StreamAppendResult<Types>> {
        let call = self.append_call(0, &request);
        match self.ask(liveness_call::Kind::Heartbeat(call), RPCTypes::AppendEntries, timeout).await? {
            liveness_reply::Outcome::Heartbeat(reply) => self.append_result(reply, &request.vote).await,
            _ => Err(broken("not an answer to a heartbeat")),
        }
    }

    async fn append_result(&self, reply: wire::AppendReply, leader: &Vote) -> Rpc<StreamAppendResult<Types>> {
        Ok(match reply.outcome {
            Some(append_reply::Outcome::Stored(stored)) => Ok(stored.upto.as_ref().map(from_log_id)),
            Some(append_reply::Outcome::Conflict(at)) => Err(StreamAppendError::Conflict(from_log_id(&at))),
            Some(append_reply::Outcome::HigherVote(vote)) => Err(StreamAppendError::HigherVote(from_vote(&vote))),
            Some(append_reply::Outcome::Failed(why)) => return Err(unreachable(why)),
            Some(append_reply::Outcome::Reverted(_)) => {
                let (group, replica) = (self.local.group, self.target);
                let allowed = self.local.allow_revert(replica, leader.leader_id().term).await;
                tracing::warn!(%group, replica, allowed, "a replica dropped the end of its log; it is sent again");
                return Err(broken("the replica dropped a drain"));
            }
            None => return Err(broken("empty reply")),
        })
    }

    fn timed_out(&self, action: RPCTypes, timeout: Duration) -> RPCError<Types> {
        RPCError::Timeout(Timeout { action, id: self.local.replica, target: self.target, timeout })
    }
}

/// Replication of one group to one replica, while it lasts.
struct Session<'a, S> {
    client: &'a Client,
    input: Option<S>,
    mailbox: Mailbox<Appends>,
    key: u64,
    /// Unanswered appends.
    due: usize,
    leader: Option<Vote>,
    company: Company,
    ended: bool,
}

impl<S: Stream<Item = AppendEntriesRequest<Types>> + Unpin> Session<'_, S> {
    /// The next answer; `None` when all input is answered.
    async fn next(&mut self) -> Option<Rpc<StreamAppendResult<Types>>> {
        while !self.ended {
            if self.input.is_none() && self.due == 0 {
                return None;
            }
            tokio::select! {
                reply = self.mailbox.recv(), if self.due > 0 => {
                    self.due -= 1;
                    let result = match (reply, &self.leader) {
                        (Some(reply), Some(leader)) => self.client.append_result(reply, leader).await,
                        _ => Err(broken("connection closed")),
                    };
                    self.ended = !matches!(result, Ok(Ok(_)));
                    return Some(result);
                }
                request = next(&mut self.input), if self.due < PIPELINE => {
                    let unsent = match request {
                        None => {
                            self.input = None;
                            self.company.release()
                        }
                        Some(request) => self.company.take(request, Instant::now()),
                    };
                    if let Some(request) = unsent && let Err(why) = self.send(request).await {
                        return Some(Err(why));
                    }
                },
                () = at(self.company.until()), if self.due < PIPELINE => {
                    if let Some(request) = self.company.release() && let Err(why) = self.send(request).await {
                        return Some(Err(why));
                    }
                },
                () = tokio::time::sleep(STALLED), if self.due > 0 => {
                    self.ended = true;
                    return Some(Err(self.client.timed_out(RPCTypes::AppendEntries, STALLED)));
                }
            }
        }
        None
    }

    async fn send(&mut self, request: AppendEntriesRequest<Types>) -> Rpc<()> {
        let call = self.client.append_call(self.key, &request);
        self.leader = Some(request.vote);
        self.due += 1;
        self.mailbox.send(call).await.map_err(|why| {
            self.ended = true;
            broken(why)
        })
    }
}

/// At that moment; never, if there is none.
async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

impl<S> Drop for Session<'_, S> {
    fn drop(&mut self) {
        self.mailbox.try_send(wire::AppendCall { session: self.key, ended: true, ..wire::AppendCall::default() });
    }
}

/// The next of a stream that may have ended. Safe to cancel: the stream keeps its place.
async fn next<S: Stream + Unpin>(input: &mut Option<S>) -> Option<S::Item> {
    match input {
        Some(input) => input.next().await,
        None => std::future::pending().await,
    }
}

impl NetStreamAppend<Types> for Client {
    fn stream_append<'s, S>(
        &'s mut self,
        mut input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Rpc<BoxStream<'s, Rpc<StreamAppendResult<Types>>>>>
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + Send + Unpin + 'static,
    {
        Box::pin(async move {
            let client: &'s Client = self;
            if client.purpose == Purpose::Heartbeat {
                let beats = async_one(async move {
                    let request = input.next().await?;
                    Some(client.heartbeat(request, option.soft_ttl()).await)
                });
                return Ok(Box::pin(beats) as BoxStream<'s, _>);
            }
            let key = client.network.next_key();
            let mailbox = client.peer.appends.mailbox(key, PIPELINE + 1).await.map_err(unreachable)?;
            let company = Company::new(client.local.group);
            let session =
                Session { client, input: Some(input), mailbox, key, due: 0, leader: None, company, ended: false };
            let replies = stream::unfold(session, |mut session| async move {
                let reply = session.next().await?;
                Some((reply, session))
            });
            Ok(Box::pin(replies) as BoxStream<'s, _>)
        })
    }
}

/// A stream of what one future yields, if anything.
fn async_one<T>(future: impl Future<Output = Option<T>>) -> impl Stream<Item = T> {
    stream::once(future).filter_map(std::future::ready)
}

impl NetVote<Types> for Client {
    async fn vote(&mut self, rpc: VoteRequest<Types>, option: RPCOption) -> Rpc<VoteResponse<Types>> {
        vote_response(self.ask_for_vote(rpc, liveness_call::Kind::Vote, option.soft_ttl()).await?)
    }

    async fn pre_vote(&mut self, rpc: VoteRequest<Types>, option: RPCOption) -> Rpc<VoteResponse<Types>> {
        vote_response(self.ask_for_vote(rpc, liveness_call::Kind::PreVote, option.soft_ttl()).await?)
    }
}

fn vote_response(answer: wire::VoteAnswer) -> Rpc<VoteResponse<Types>> {
    let vote = answer.vote.ok_or_else(|| broken("an answer to a vote without a vote"))?;
    Ok(VoteResponse::new(from_vote(&vote), answer.last.as_ref().map(from_log_id), answer.granted))
}

impl NetTransferLeader<Types> for Client {
    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Rpc<TransferLeaderResponse<Types>> {
        let call = wire::TransferCall {
            from_leader: Some(to_vote(req.from_leader())),
            to_replica: *req.to_node_id(),
            last: req.last_log_id().map(to_log_id),
        };
        match self.ask(liveness_call::Kind::Transfer(call), RPCTypes::TransferLeader, option.soft_ttl()).await? {
            liveness_reply::Outcome::Transfer(answer) if answer.refused.is_empty() => Ok(Ok(())),
            liveness_reply::Outcome::Transfer(answer) => Err(broken(answer.refused)),
            _ => Err(broken("not an answer to a transfer")),
        }
    }
}

impl NetSnapshot<Types> for Client {
    type SnapshotData = Snap;

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: alias::SnapshotOf<Types, Snap>,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let to = (self.target, &self.member);
        snapshot::send(&self.network, &self.local, to, vote, snapshot.snapshot, cancel).await
    }
}

impl NetBackoff<Types> for Client {
    fn backoff(&self) -> Option<Backoff> {
        None
    }
}

/// Nothing was sent, or nothing can be: wait before trying again.
fn unreachable(why: impl ToString) -> RPCError<Types> {
    RPCError::Unreachable(Unreachable::from_string(why))
}

fn broken(why: impl ToString) -> RPCError<Types> {
    RPCError::Network(NetworkError::from_string(why))
}
