//! This node's lines to its peers and the groups that use them.
//!
//! Per peer two connections: one for the appends of all groups, one for heartbeats, votes and transfers. Owns every task of
//! Raft's network; [`Network::shutdown`] ends them all.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use martlet_proto::cluster::raft::raft_server::RaftServer;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    group::Member,
    line::{Appends, FRAME_BYTES_MAX, Line, Liveness},
    links::Links,
    local::Local,
    service::RaftService,
};
use crate::log::GroupId;

/// This node's connections to its peers and its groups, shared by all of them. Cloning gives another handle.
#[derive(Debug, Clone)]
pub struct Network(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    node: u64,
    links: Arc<dyn Links>,
    peers: Mutex<BTreeMap<(u64, String), Arc<Peer>>>,
    groups: Mutex<BTreeMap<GroupId, Arc<Local>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
    keys: AtomicU64,
}

/// Lines to one node at one address.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) appends: Line<Appends>,
    pub(super) liveness: Line<Liveness>,
}

impl Network {
    /// Nothing is dialled before a group needs it.
    pub fn new(node: u64, links: Arc<dyn Links>) -> Network {
        Network(Arc::new(Inner {
            node,
            links,
            peers: Mutex::default(),
            groups: Mutex::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            keys: AtomicU64::new(1),
        }))
    }

    /// The id of this node.
    pub fn node(&self) -> u64 {
        self.0.node
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
        self.0.stop.cancel();
        self.0.tasks.close();
    }

    /// Until every task has ended, after [`Network::shutdown`].
    pub async fn ended(&self) {
        self.0.tasks.wait().await;
    }

    pub(super) fn peer(&self, member: &Member) -> Arc<Peer> {
        let key = (member.node, member.address.clone());
        let open = || {
            let Inner { links, tasks, stop, .. } = &*self.0;
            Arc::new(Peer {
                appends: Line::new(member.clone(), links.clone(), tasks.clone(), stop.clone()),
                liveness: Line::new(member.clone(), links.clone(), tasks.clone(), stop.clone()),
            })
        };
        lock(&self.0.peers).entry(key).or_insert_with(open).clone()
    }

    /// A number that no other call or session of this node has.
    pub(super) fn next_key(&self) -> u64 {
        self.0.keys.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn register(&self, local: Arc<Local>) {
        lock(&self.0.groups).insert(local.group, local);
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
        self.0.stop.clone()
    }

    /// Runs a task until it ends or the network is shut down.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.0.stop.clone();
        self.0.tasks.spawn(async move {
            tokio::select! { () = stop.cancelled() => {}, () = task => {} }
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
