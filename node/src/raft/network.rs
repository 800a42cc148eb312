//! This node's lines to its peers and the groups that use them.
//!
//! Per peer two connections: one for the appends of all groups, one for heartbeats, votes and transfers of leadership; and one
//! for each snapshot while it lasts. Owns every task of
//! Raft's network; [`Network::shutdown`] ends them all. Knows which nodes are connected (`presence`) and has each led group
//! told when a majority of its lines has closed: whatever was acknowledged before is no lease any more.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use martlet_proto::cluster::raft::{LivenessCall, liveness_call, liveness_reply, raft_server::RaftServer};
use openraft::async_runtime::watch::WatchReceiver;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    beats,
    group::Member,
    line::{Appends, FRAME_BYTES_MAX, Home, Line, Liveness, Sent},
    links::Links,
    local::Local,
    presence::Presence,
    service::RaftService,
    snapshot::Turns,
};
use crate::{clock::Clock, log::GroupId};

/// This node's connections to its peers and its groups, shared by all of them. Cloning gives another handle.
#[derive(Debug, Clone)]
pub struct Network(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    home: Home,
    peers: Mutex<BTreeMap<(u64, String), Arc<Peer>>>,
    groups: Mutex<BTreeMap<GroupId, Arc<Local>>>,
    keys: AtomicU64,
    turns: Turns,
    /// Set once, when the first group is registered: the tasks run that look after closed lines and send heartbeats.
    watched: OnceLock<()>,
}

/// Lines to one node at one address.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) appends: Line<Appends>,
    pub(super) liveness: Line<Liveness>,
}

impl Network {
    /// Nothing is dialled before a group needs it. Peers are told what the wall clock of `clock` says, and only that of it, and
    /// that this node can apply state versions up to `state_version`.
    pub fn new(node: u64, links: Arc<dyn Links>, clock: Arc<dyn Clock>, state_version: u32) -> Network {
        let home = Home {
            node,
            links,
            presence: Arc::new(Presence::new(clock, state_version)),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            closings: Arc::default(),
            appends_sent: Sent::default(),
            liveness_sent: Sent::default(),
        };
        Network(Arc::new(Inner {
            home,
            peers: Mutex::default(),
            groups: Mutex::default(),
            keys: AtomicU64::new(1),
            turns: Turns::default(),
            watched: OnceLock::new(),
        }))
    }

    /// The id of this node.
    pub fn node(&self) -> u64 {
        self.0.home.node
    }

    /// What peers call. Served as it is it takes frames of at most 4 MiB: use [`Network::server`].
    pub fn service(&self) -> RaftService {
        RaftService::new(self.clone())
    }

    /// The gRPC server that peers call, with room for the largest frame.
    pub fn server(&self) -> RaftServer<RaftService> {
        RaftServer::new(self.service())
            .max_decoding_message_size(FRAME_BYTES_MAX)
            .max_encoding_message_size(FRAME_BYTES_MAX)
    }

    /// Ends all connections and the tasks that serve them. Stop the groups first.
    pub fn shutdown(&self) {
        self.0.home.stop.cancel();
        self.0.home.tasks.close();
    }

    /// Until every task has ended, after [`Network::shutdown`].
    pub async fn ended(&self) {
        self.0.home.tasks.wait().await;
    }

    pub(super) fn peer(&self, member: &Member) -> Arc<Peer> {
        let key = (member.node, member.address.clone());
        let open = || {
            let home = &self.0.home;
            Arc::new(Peer {
                appends: Line::new(member.clone(), home.clone()),
                liveness: Line::new(member.clone(), home.clone()),
            })
        };
        lock(&self.0.peers).entry(key).or_insert_with(open).clone()
    }

    /// Counts what leaves on lines for appends.
    pub fn appends_sent(&self) -> Sent {
        self.0.home.appends_sent.clone()
    }

    /// Counts what leaves on liveness lines.
    pub fn liveness_sent(&self) -> Sent {
        self.0.home.liveness_sent.clone()
    }

    /// What this node dials with.
    pub(super) fn links(&self) -> Arc<dyn Links> {
        self.0.home.links.clone()
    }

    /// Turns for snapshots.
    pub(super) fn turns(&self) -> &Turns {
        &self.0.turns
    }

    /// A number that no other call or session of this node has.
    pub(super) fn next_key(&self) -> u64 {
        self.0.keys.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes a group that runs. `heartbeat` is the same for all groups of a node.
    pub(super) fn register(&self, local: Arc<Local>, heartbeat: Duration) {
        lock(&self.0.groups).insert(local.group, local);
        if self.0.watched.set(()).is_ok() {
            self.spawn(beats::beat(self.clone(), heartbeat));
            let network = self.clone();
            self.spawn(async move {
                loop {
                    network.0.home.closings.notified().await;
                    network.locals().iter().for_each(|local| network.drop_lease_if_cut_off(local));
                }
            });
        }
    }

    /// All groups of this node.
    pub(super) fn locals(&self) -> Vec<Arc<Local>> {
        lock(&self.0.groups).values().cloned().collect()
    }

    /// What this node knows of other nodes.
    pub(super) fn presence(&self) -> &Presence {
        &self.0.home.presence
    }

    /// A leader without lines to a majority does not wait for its lease to run out: its followers may have found out, and
    /// elect another already.
    fn drop_lease_if_cut_off(&self, local: &Local) {
        let Some(raft) = local.raft.get() else { return };
        let membership = raft.server_metrics().borrow_watched().membership_config.clone();
        let (mut voters, mut reached) = (0, 0);
        for id in membership.voter_ids() {
            voters += 1;
            let line = || membership.get_node(&id).map(|member| self.peer(member));
            reached += usize::from(id == local.replica || line().is_some_and(|peer| peer.liveness.is_open()));
        }
        if 2 * reached <= voters {
            local.cut_off();
        }
    }

    /// Unless another replica of the group has taken its place.
    pub(super) fn deregister(&self, local: &Arc<Local>) {
        let mut groups = lock(&self.0.groups);
        if groups.get(&local.group).is_some_and(|registered| Arc::ptr_eq(registered, local)) {
            groups.remove(&local.group);
        }
    }

    pub(super) fn local(&self, group: GroupId) -> Option<Arc<Local>> {
        lock(&self.0.groups).get(&group).cloned()
    }

    pub(super) fn stopping(&self) -> CancellationToken {
        self.0.home.stop.clone()
    }

    /// Runs a task until it ends or the network is shut down.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.0.home.stop.clone();
        self.0.home.tasks.spawn(async move {
            tokio::select! { () = stop.cancelled() => {}, () = task => {} }
        });
    }
}

/// What came of a call on a liveness line.
pub(super) enum Asked {
    Answered(liveness_reply::Outcome),
    /// The line broke while the answer was waited for.
    Broken(String),
    /// It cannot be dialled, or the peer cannot answer.
    Unreachable(String),
    /// No answer in time.
    Silent,
}

impl Peer {
    /// One call, to `to` = (group, from replica, to replica), and its answer. `key` is used for no other call.
    pub(super) async fn ask(
        &self,
        key: u64,
        (group, from_replica, to_replica): (u32, u64, u64),
        kind: liveness_call::Kind,
        timeout: Duration,
    ) -> Asked {
        let asking = async {
            let mut mailbox = match self.liveness.mailbox(key, 1).await {
                Ok(mailbox) => mailbox,
                Err(why) => return Asked::Unreachable(why),
            };
            let call = LivenessCall { call: key, group, from_replica, to_replica, kind: Some(kind) };
            if let Err(why) = mailbox.send(call).await {
                return Asked::Broken(why);
            }
            match mailbox.recv().await.map(|reply| reply.outcome) {
                Some(Some(liveness_reply::Outcome::Failed(why))) => Asked::Unreachable(why),
                Some(Some(outcome)) => Asked::Answered(outcome),
                Some(None) => Asked::Broken("empty reply".to_owned()),
                None => Asked::Broken("connection closed".to_owned()),
            }
        };
        tokio::time::timeout(timeout, asking).await.unwrap_or(Asked::Silent)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
