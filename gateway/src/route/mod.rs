//! From a token to the node that leads its shard.
//!
//! Owns what the gateway knows of the cluster and its connections to nodes. Projects, keys, nodes and shards are followed by one
//! watch and served from memory; leaders are learned on the way.
//!
//! | file | what |
//! | --- | --- |
//! | `config` | deadlines, pauses, bounds |
//! | `facts` | value: projects and opened keys at one revision |
//! | `map` | value: which node leads which shard |
//! | `time` | value: the time of each shard |
//! | `pursuit` | value: what to do next with operations until each has an outcome |
//! | `client` | driver: tries a pursuit at nodes |
//! | `link` | driver: the Submit stream to one node |
//! | `watch` | driver: follows the meta state |
//!
//! Invariant: what may have been proposed is never reported as refused (see [`pursuit`]).

mod client;
mod config;
mod facts;
mod link;
mod map;
mod pursuit;
mod time;
mod watch;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use martlet_proto::{
    cluster::meta::MetaState,
    seal::ClusterSecret,
    shard::Shard,
    tag::{AndroidId, SecurityToken},
    token::TokenKey,
};
use tokio::sync::{Notify, watch as changes};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::Channel;

pub use self::{
    config::RouteConfig,
    facts::{Facts, RejectedState},
    map::Map,
    pursuit::Outcome,
};
use self::{link::Link, time::ShardTimes};
use crate::{
    attach::{Routes, ShardMap},
    clock::Clock,
    entropy::Entropy,
    mcs::{Credentials, Identity},
    metrics::Metrics,
};

/// How long a request waits for the key of a token it cannot verify.
const KEY_WAIT: Duration = Duration::from_secs(1);

/// No projects and keys are known, or none that may still be served: answer "try again later".
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the state of the cluster is not known")]
pub struct NotServing;

/// What a gateway knows of its cluster. Clones are handles to the same.
#[derive(Clone)]
pub struct Route(Arc<Inner>);

struct Inner {
    config: RouteConfig,
    seeds: Vec<String>,
    name: String,
    gateway: [u8; 16],
    secret: ClusterSecret,
    clock: Arc<dyn Clock>,
    entropy: Arc<Entropy>,
    metrics: Arc<Metrics>,
    facts: changes::Sender<Option<Arc<Facts>>>,
    shard_map: changes::Sender<Option<ShardMap>>,
    leased_until: Mutex<Option<Instant>>,
    leaders: Mutex<Map>,
    times: Mutex<ShardTimes>,
    links: Mutex<BTreeMap<u64, Arc<Link>>>,
    ask_again: Notify,
    asked: Mutex<Option<Instant>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Route {
    /// Knows nothing yet and dials nobody before [`Route::run`]. `gateway`: the 16 bytes this gateway drew at its start.
    #[expect(clippy::too_many_arguments, reason = "each is a thing of its own, and there is one caller")]
    pub(crate) fn new(
        config: RouteConfig,
        seeds: Vec<String>,
        name: String,
        gateway: [u8; 16],
        secret: ClusterSecret,
        clock: Arc<dyn Clock>,
        entropy: Arc<Entropy>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self(Arc::new(Inner {
            config,
            seeds,
            name,
            gateway,
            secret,
            clock,
            entropy,
            metrics,
            facts: changes::Sender::new(None),
            shard_map: changes::Sender::new(None),
            leased_until: Mutex::new(None),
            leaders: Mutex::default(),
            times: Mutex::default(),
            links: Mutex::default(),
            ask_again: Notify::new(),
            asked: Mutex::new(None),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }))
    }

    /// Follows the cluster until `stop` fires; returns when every connection to a node has ended.
    pub(crate) async fn run(&self, stop: CancellationToken) {
        tokio::select! { () = stop.cancelled() => {}, () = watch::follow(self) => {} }
        self.0.stop.cancel();
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }

    /// Projects and keys, as long as they may be served: while the watch has its lease, and a configured while longer.
    ///
    /// # Errors
    /// [`NotServing`] before the first state and after that while.
    pub fn facts(&self) -> Result<Arc<Facts>, NotServing> {
        let now = self.0.clock.now();
        let leased = *lock(&self.0.leased_until);
        self.0.metrics.meta_lease.set(leased.is_some_and(|until| now <= until).into());
        match leased {
            Some(until) if now <= until + self.0.config.serve_without_lease => {
                self.0.facts.borrow().clone().ok_or(NotServing)
            }
            Some(_) | None => Err(NotServing),
        }
    }

    /// The key `id` of tokens. One that is not known is asked for, at most every `route.refresh_interval`.
    pub async fn token_key(&self, facts: &Facts, id: u32) -> Option<TokenKey> {
        if let Some(key) = facts.token_key(id) {
            return Some(key.clone());
        }
        let mut newer = self.0.facts.subscribe();
        let now = self.0.clock.now();
        let wait = {
            let mut asked = lock(&self.0.asked);
            match asked.map(|asked| now.saturating_duration_since(asked)) {
                Some(since) if since < KEY_WAIT => KEY_WAIT - since,
                Some(since) if since < self.0.config.refresh_interval => return None,
                Some(_) | None => {
                    *asked = Some(now);
                    self.0.ask_again.notify_one();
                    KEY_WAIT
                }
            }
        };
        let known = |facts: &Option<Arc<Facts>>| facts.as_ref().is_some_and(|facts| facts.token_key(id).is_some());
        match tokio::time::timeout(wait, newer.wait_for(known)).await {
            Ok(Ok(facts)) => facts.as_ref().and_then(|facts| facts.token_key(id)).cloned(),
            Ok(Err(_)) | Err(_) => None,
        }
    }

    /// Whether the gateway can serve: each check with what it found.
    pub fn checks(&self) -> Vec<(&'static str, Result<(), String>)> {
        let meta = self.facts().map(drop).map_err(|error| error.to_string());
        let map = self.leaders();
        let links = lock(&self.0.links);
        let reachable = |node: &u64| links.get(node).is_some_and(|link| link.connected());
        let cut_off: Vec<String> = map
            .shards()
            .filter(|(shard, replicas)| {
                !map.leader(*shard).is_some_and(|node| reachable(&node)) && !replicas.iter().any(reachable)
            })
            .map(|(shard, _)| shard.to_string())
            .collect();
        let shards = match (map.shards().next(), cut_off.as_slice()) {
            (None, _) => Err("no shard is known".to_owned()),
            (Some(_), []) => Ok(()),
            (Some(_), cut_off) => Err(format!("no node can be reached for shards {}", cut_off.join(", "))),
        };
        vec![("meta", meta), ("shards", shards)]
    }

    /// The leader of a shard, as far as known.
    pub fn leader(&self, shard: Shard) -> Option<u64> {
        self.leaders().leader(shard)
    }

    fn addresses(&self) -> Vec<String> {
        let mut addresses = self.0.seeds.clone();
        for (_, address) in self.leaders().nodes() {
            if !addresses.iter().any(|known| known == address) {
                addresses.push(address.to_owned());
            }
        }
        addresses
    }

    fn adopt(&self, state: &MetaState, facts: Arc<Facts>) {
        self.0.metrics.meta_revision.set(facts.revision);
        let shard_map = {
            let mut leaders = self.leaders();
            leaders.adopt(state);
            ShardMap {
                count: facts.shards,
                nodes: leaders.nodes().map(|(node, _)| node).collect(),
                replicas: leaders.shards().map(|(shard, replicas)| (shard, replicas.to_vec())).collect(),
            }
        };
        self.redial(state);
        self.0.facts.send_replace(Some(facts));
        self.0.shard_map.send_if_modified(|known| {
            let changed = known.as_ref() != Some(&shard_map);
            *known = Some(shard_map);
            changed
        });
    }

    /// One link for each node of the state; links of nodes that left or moved end.
    fn redial(&self, state: &MetaState) {
        let mut links = lock(&self.0.links);
        links.retain(|node, link| {
            let stays = state.nodes.iter().any(|new| new.node_id == *node && new.address == link.address);
            if !stays {
                link.stop.cancel();
            }
            stays
        });
        for node in &state.nodes {
            if links.contains_key(&node.node_id) {
                continue;
            }
            let made = link::link(
                node.node_id,
                &node.address,
                &self.0.config,
                Arc::clone(&self.0.entropy),
                Arc::clone(&self.0.metrics),
                self.0.stop.child_token(),
            );
            match made {
                Ok((link, driver)) => {
                    links.insert(node.node_id, Arc::new(link));
                    self.0.tasks.spawn(driver.run());
                }
                Err(error) => tracing::error!(node = node.node_id, %error, "a node cannot be dialled"),
            }
        }
    }

    fn leased(&self, lease: Duration) {
        if self.0.facts.borrow().is_some() {
            *lock(&self.0.leased_until) = Some(self.0.clock.now() + lease);
        }
    }

    fn link(&self, node: u64) -> Option<Arc<Link>> {
        lock(&self.0.links).get(&node).cloned()
    }

    fn leaders(&self) -> MutexGuard<'_, Map> {
        lock(&self.0.leaders)
    }

    fn times(&self) -> MutexGuard<'_, ShardTimes> {
        lock(&self.0.times)
    }
}

/// A panic elsewhere leaves hints at worst stale: a wrong hint costs a round trip.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Route").field("name", &self.0.name).finish_non_exhaustive()
    }
}

impl Routes for Route {
    fn map(&self) -> changes::Receiver<Option<ShardMap>> {
        self.0.shard_map.subscribe()
    }

    fn channel(&self, node_id: u64) -> Option<Channel> {
        Some(self.link(node_id)?.channel.clone())
    }

    fn leads(&self, shard: Shard, node_id: u64, term: u64) {
        self.leaders().leads(shard, node_id, term);
    }
}

impl Credentials for Route {
    fn authenticate(&self, android_id: AndroidId, token: SecurityToken) -> Identity {
        match self.facts() {
            Ok(facts) => facts.authenticate(android_id, token).map_or(Identity::Wrong, Identity::Device),
            Err(NotServing) => Identity::Unknown,
        }
    }
}
