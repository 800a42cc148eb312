//! The instruments of a gateway: name, unit and meaning together.
//!
//! Labels come from closed sets; never a token, a sender, a message id. MCS has its own file.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

/// What an HTTP request asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(missing_docs, reason = "the endpoints by name")]
pub enum Endpoint {
    Send,
    Group,
    Checkin,
    Register,
    Installation,
    Iid,
    Other,
}

/// Label of HTTP requests.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabel {
    /// What was asked for.
    pub endpoint: Endpoint,
    /// Status of the answer.
    pub status: u16,
}

/// What became of one target of a send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(missing_docs, reason = "the words of the protocol")]
pub enum Fate {
    Accepted,
    Refused,
    Unavailable,
    Unknown,
    DryRun,
}

/// Label of send targets.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FateLabel {
    /// What became of it.
    pub fate: Fate,
}

/// A bound that can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Limit {
    /// `http.connections_max`: a connection waits for a slot.
    Connections,
    /// `http.headers_max` or `http.header_bytes_max`: 431.
    Head,
    /// A body above 4 MiB: 413.
    Body,
    /// `http.body_bytes_total`: 503.
    BodyBytesTotal,
    /// `http.header_timeout` or `http.body_timeout`.
    Slow,
    /// An HTTP/2 client took back far more requests than it let be answered: its connection ends.
    Resets,
    /// `admit.checkins_…`: 503.
    Checkins,
    /// `admit.registrations_…`: 503.
    Registrations,
    /// `admit.logins_…`: the socket is closed.
    Logins,
    /// `route.queue_max` or `route.inflight_max`: unavailable.
    Calls,
    /// `http.project_messages_…`: 503.
    Project,
    /// `admit.addresses_max`: new addresses share one bucket.
    Addresses,
}

/// Label of limits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct LimitLabel {
    /// Which bound.
    pub limit: Limit,
}

/// Why an operation was tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Retry {
    /// Another node leads.
    Redirect,
    /// The node could not take it now, and said so.
    Refused,
    /// First operation on the shard: its time was not known.
    Time,
    /// The stream broke or the try took too long: the outcome of the try is unknown.
    Lost,
    /// No node with a replica was reachable.
    Unreachable,
    /// An unknown outcome was asked for.
    Resolve,
}

/// Label of retries.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RetryLabel {
    /// Why.
    pub reason: Retry,
}

/// All instruments of one gateway, but for MCS and attachments.
#[derive(Debug)]
pub struct Metrics {
    /// HTTP connections that are open.
    pub http_connections: Gauge,
    /// Those of them that speak HTTP/2.
    pub http2_connections: Gauge,
    /// HTTP requests answered.
    pub requests: Family<RequestLabel, Counter>,
    /// From the head of a request to its answer, seconds.
    pub request_seconds: Histogram,
    /// Targets of sends by what became of them.
    pub targets: Family<FateLabel, Counter>,
    /// Limits that were reached.
    pub limits: Family<LimitLabel, Counter>,
    /// Operations tried again.
    pub retries: Family<RetryLabel, Counter>,
    /// Operations whose outcome was not learned in time.
    pub unknown_outcomes: Counter,
    /// Submit requests written to nodes, each with the batches that were waiting.
    pub submits: Counter,
    /// Batches in them.
    pub batches: Counter,
    /// Submit streams to nodes that are open.
    pub nodes_connected: Gauge,
    /// Revision of the meta state that is in force.
    pub meta_revision: Gauge<u64, AtomicU64>,
    /// 1 while the lease of the watch holds.
    pub meta_lease: Gauge,
    /// Meta states that were not taken: keys that do not open, another cluster.
    pub meta_rejected: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            http_connections: Gauge::default(),
            http2_connections: Gauge::default(),
            requests: Family::default(),
            request_seconds: Histogram::new(exponential_buckets(0.0005, 2.0, 16)),
            targets: Family::default(),
            limits: Family::default(),
            retries: Family::default(),
            unknown_outcomes: Counter::default(),
            submits: Counter::default(),
            batches: Counter::default(),
            nodes_connected: Gauge::default(),
            meta_revision: Gauge::default(),
            meta_lease: Gauge::default(),
            meta_rejected: Counter::default(),
        }
    }
}

impl Metrics {
    /// Adds every instrument to `registry`, all under `martlet_gateway_`.
    pub fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("martlet_gateway");
        r.register("http_connections", "HTTP connections that are open", self.http_connections.clone());
        r.register("http2_connections", "HTTP connections that speak HTTP/2", self.http2_connections.clone());
        r.register("http_requests", "HTTP requests answered", self.requests.clone());
        r.register_with_unit(
            "http_request",
            "From the head of a request to its answer",
            Unit::Seconds,
            self.request_seconds.clone(),
        );
        r.register("send_targets", "Targets of sends by what became of them", self.targets.clone());
        r.register("limits_reached", "Limits that were reached", self.limits.clone());
        r.register("retries", "Operations tried again", self.retries.clone());
        r.register(
            "unknown_outcomes",
            "Operations whose outcome was not learned in time",
            self.unknown_outcomes.clone(),
        );
        r.register("submits", "Submit requests written to nodes", self.submits.clone());
        r.register("batches", "Batches in the submit requests", self.batches.clone());
        r.register("nodes_connected", "Submit streams to nodes that are open", self.nodes_connected.clone());
        r.register("meta_revision", "Revision of the meta state that is in force", self.meta_revision.clone());
        r.register("meta_lease", "1 while the lease of the watch holds", self.meta_lease.clone());
        r.register("meta_rejected", "Meta states that were not taken", self.meta_rejected.clone());
    }

    pub(crate) fn limit(&self, limit: Limit) {
        self.limits.get_or_create(&LimitLabel { limit }).inc();
    }

    pub(crate) fn retry(&self, reason: Retry) {
        self.retries.get_or_create(&RetryLabel { reason }).inc();
    }

    pub(crate) fn fate(&self, fate: Fate) {
        self.targets.get_or_create(&FateLabel { fate }).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instrument_is_registered_under_the_gateways_prefix() {
        let mut registry = Registry::default();
        let metrics = Metrics::default();
        metrics.register(&mut registry);
        metrics.limit(Limit::Body);
        metrics.retry(Retry::Lost);
        metrics.fate(Fate::Accepted);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(text.contains("martlet_gateway_limits_reached_total{limit=\"Body\"} 1"), "{text}");
        assert!(text.lines().filter(|line| line.starts_with("# HELP")).all(|line| line.contains("martlet_gateway_")));
    }
}
