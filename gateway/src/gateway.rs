//! A gateway as a whole: binds, serves, drains.
//!
//! Owns the order of start and end. At the start: configuration, secret, certificates, listeners bound, watch. At the end:
//! stop accepting, let requests end, close devices at a paced rate, send their last acks, then end the calls to nodes. What has
//! not ended after `gateway.drain_max` is cut: clients hold everything a gateway could lose.

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use martlet_proto::seal::{ClusterSecret, SecretFileError};
use prometheus_client::registry::Registry;
use rand::RngCore;
use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    admit::Admit,
    attach::{AttachMetrics, Attachments},
    clock::{Clock, SystemClock},
    config::{Config, ConfigError},
    entropy::Entropy,
    http::{self, Http, Room},
    mcs::{Mcs, McsMetrics},
    metrics::Metrics,
    project_rate::ProjectRate,
    route::Route,
    tls::{ServerTls, TlsError},
};

/// How often [`Started::until_ready`] looks.
const READY_POLL: Duration = Duration::from_millis(20);

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The configuration cannot be run.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The secret file cannot be used.
    #[error("gateway.secret_file: {0}")]
    Secret(#[from] SecretFileError),
    /// The certificate cannot be served.
    #[error("gateway.cert_file, gateway.key_file: {0}")]
    Tls(#[from] TlsError),
    /// An address cannot be bound: taken, most likely.
    #[error("{key}: {address}: {source}")]
    Bind {
        /// Full name of the key.
        key: &'static str,
        /// What should be bound.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
}

/// A gateway that serves; clones are handles to the same one.
#[derive(Debug, Clone)]
pub struct Started {
    /// Bound address of HTTP without TLS.
    pub http: Option<SocketAddr>,
    /// Bound address of HTTP over TLS.
    pub https: Option<SocketAddr>,
    /// Bound addresses of MCS.
    pub mcs: Vec<SocketAddr>,
    /// Instruments of HTTP, enrolment and routing; [`Started::register`] registers all.
    pub metrics: Arc<Metrics>,
    mcs_metrics: Arc<McsMetrics>,
    attach_metrics: Arc<AttachMetrics>,
    route: Route,
    drain: CancellationToken,
}

/// What `/readyz` says about the gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readiness {
    /// Whether clients should be sent here.
    pub ready: bool,
    /// Each check with what it found.
    pub checks: Vec<(&'static str, Result<(), String>)>,
}

impl Started {
    /// Whether the gateway can serve: it follows the meta state, every shard has a node that can be asked, and it does not
    /// drain. Never about queues or quorum.
    pub fn readiness(&self) -> Readiness {
        let mut checks = self.route.checks();
        let draining = self.drain.is_cancelled();
        checks.push(("drain", if draining { Err("the gateway drains".into()) } else { Ok(()) }));
        Readiness { ready: checks.iter().all(|(_, found)| found.is_ok()), checks }
    }

    /// Returns once the gateway is ready, at the earliest after [`Gateway::run`] was called; never, if it does not become so.
    pub async fn until_ready(&self) {
        while !self.readiness().ready {
            tokio::time::sleep(READY_POLL).await;
        }
    }

    /// Adds every instrument of the gateway to `registry`.
    pub fn register(&self, registry: &mut Registry) {
        self.metrics.register(registry);
        self.mcs_metrics.register(registry);
        self.attach_metrics.register(registry);
    }
}

/// A gateway whose listeners are bound.
pub struct Gateway {
    started: Started,
    config: Config,
    gateway: [u8; 16],
    clock: Arc<dyn Clock>,
    http: Arc<Http>,
    tls: Option<ServerTls>,
    listeners: Listeners,
}

#[derive(Debug)]
struct Listeners {
    http: Option<TcpListener>,
    https: Option<TcpListener>,
    mcs: Vec<TcpListener>,
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway").field("started", &self.started).finish_non_exhaustive()
    }
}

impl Gateway {
    /// Reads secret and certificates and binds the listeners; serves nothing before [`Gateway::run`].
    ///
    /// # Errors
    /// What is wrong with the configuration, a file or an address, with the key's name.
    pub async fn start(config: Config) -> Result<Self, GatewayError> {
        let secret = ClusterSecret::read(&config.gateway.secret_file)?;
        Self::start_with(config, secret, Arc::new(SystemClock), Arc::new(Entropy::system())).await
    }

    /// As [`Gateway::start`], with the cluster secret, the time and the random values of the caller; `gateway.secret_file`
    /// is not read.
    ///
    /// # Errors
    /// As [`Gateway::start`].
    pub async fn start_with(
        mut config: Config,
        secret: ClusterSecret,
        clock: Arc<dyn Clock>,
        entropy: Arc<Entropy>,
    ) -> Result<Self, GatewayError> {
        config.check()?;
        let mut gateway = [0; 16];
        entropy.draw(|rng| rng.fill_bytes(&mut gateway));
        if config.gateway.name.is_empty() {
            config.gateway.name = format!("gateway-{:02x}{:02x}{:02x}", gateway[0], gateway[1], gateway[2]);
        }
        let tls = if config.gateway.cert_file.as_os_str().is_empty() {
            None
        } else {
            Some(ServerTls::read(&config.gateway.cert_file, &config.gateway.key_file)?)
        };
        let listeners = Listeners::bind(&config).await?;
        let metrics = Arc::new(Metrics::default());
        let route = Route::new(
            config.route.clone(),
            config.gateway.seeds.clone(),
            config.gateway.name.clone(),
            gateway,
            secret,
            Arc::clone(&clock),
            Arc::clone(&entropy),
            Arc::clone(&metrics),
        );
        let http = Arc::new(Http {
            config: config.http.clone(),
            enroll: config.enroll.clone(),
            route: route.clone(),
            admit: Arc::new(Admit::new(config.admit.clone(), Arc::clone(&clock), Arc::clone(&metrics))),
            project_rate: ProjectRate::new(config.http.project_rate(), Arc::clone(&clock), Arc::clone(&metrics)),
            room: Room::new(&config.http, config.http.body_bytes_of_senders(), Arc::clone(&metrics)),
            device_room: Room::new(&config.http, config.http.body_bytes_of_devices(), Arc::clone(&metrics)),
            clock: Arc::clone(&clock),
            entropy,
            metrics: Arc::clone(&metrics),
        });
        let bound = |listener: &TcpListener| listener.local_addr().ok();
        let started = Started {
            http: listeners.http.as_ref().and_then(bound),
            https: listeners.https.as_ref().and_then(bound),
            mcs: listeners.mcs.iter().filter_map(bound).collect(),
            metrics,
            mcs_metrics: Arc::default(),
            attach_metrics: Arc::default(),
            route,
            drain: CancellationToken::new(),
        };
        Ok(Self { started, config, gateway, clock, http, tls, listeners })
    }

    /// The handle that outlives the move into [`Gateway::run`].
    pub fn started(&self) -> Started {
        self.started.clone()
    }

    /// Serves until `drain` fires, then ends in order.
    ///
    /// # Errors
    /// None today: what fails while serving is retried.
    pub async fn run(self, drain: CancellationToken) -> Result<(), GatewayError> {
        let Self { started, config, gateway, clock, http, tls, listeners } = self;
        let draining = started.drain.clone();
        let route = started.route.clone();
        let (route_stop, attach_stop) = (CancellationToken::new(), CancellationToken::new());
        let mut routing = JoinSet::new();
        routing.spawn({
            let (route, stop) = (route.clone(), route_stop.clone());
            async move { route.run(stop).await }
        });
        let attachments = Attachments::start(
            &config.attach,
            gateway,
            Arc::new(route.clone()),
            Arc::clone(&clock),
            Arc::clone(&started.attach_metrics),
            &attach_stop,
        );

        let mut serving = JoinSet::new();
        let slots = Arc::new(Semaphore::new(config.http.connections_max.min(Semaphore::MAX_PERMITS)));
        if let Some(listener) = listeners.http {
            serving.spawn(http::serve(Arc::clone(&http), listener, None, Arc::clone(&slots), draining.clone()));
        }
        if let (Some(listener), Some(tls)) = (listeners.https, &tls) {
            let tls = Some(Arc::clone(&tls.http));
            serving.spawn(http::serve(Arc::clone(&http), listener, tls, Arc::clone(&slots), draining.clone()));
        }
        if let Some(tls) = &tls {
            let mcs = Arc::new(Mcs::new(
                config.mcs.clone(),
                Arc::new(route),
                Arc::clone(&http.admit) as _,
                attachments.clone(),
                clock,
                Arc::clone(&started.mcs_metrics),
            ));
            for listener in listeners.mcs {
                serving.spawn(Arc::clone(&mcs).serve(listener, Arc::clone(&tls.mcs), draining.clone()));
            }
        }

        drain.cancelled().await;
        tracing::info!("the gateway drains");
        draining.cancel();
        let end = async {
            while serving.join_next().await.is_some() {}
            // After the connections, or their last acks are not sent.
            attach_stop.cancel();
            attachments.stopped().await;
            route_stop.cancel();
            while routing.join_next().await.is_some() {}
        };
        if tokio::time::timeout(config.gateway.drain_max, end).await.is_err() {
            tracing::warn!(after = ?config.gateway.drain_max, "the drain took too long, what is left is cut");
        }
        attach_stop.cancel();
        route_stop.cancel();
        Ok(())
    }
}

impl Listeners {
    async fn bind(config: &Config) -> Result<Self, GatewayError> {
        let gateway = &config.gateway;
        let mut listeners = Self { http: None, https: None, mcs: Vec::new() };
        if let Some(address) = gateway.http {
            listeners.http = Some(bind("gateway.http", address).await?);
        }
        if let Some(address) = gateway.https {
            listeners.https = Some(bind("gateway.https", address).await?);
        }
        for address in &gateway.mcs {
            listeners.mcs.push(bind("gateway.mcs", *address).await?);
        }
        Ok(listeners)
    }
}

async fn bind(key: &'static str, address: SocketAddr) -> Result<TcpListener, GatewayError> {
    TcpListener::bind(address).await.map_err(|source| GatewayError::Bind { key, address, source })
}

/// Starts a gateway and serves until `drain` fires.
///
/// # Errors
/// As [`Gateway::start`] and [`Gateway::run`].
pub async fn run(config: Config, drain: CancellationToken) -> Result<(), GatewayError> {
    Gateway::start(config).await?.run(drain).await
}
