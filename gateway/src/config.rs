//! Configuration of a gateway.
//!
//! Owns the section `[gateway]` and the checks that span sections; every other section belongs to the module that reads it.
//! All checks run before a port is bound, and name the key that is wrong.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    admit::AdmitConfig, attach::AttachConfig, enroll::EnrollConfig, http::HttpConfig, mcs::McsConfig,
    route::RouteConfig,
};

/// Everything a gateway is told.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Who this gateway is and how it reaches the cluster.
    pub gateway: GatewayConfig,
    /// App servers and device registration.
    pub http: HttpConfig,
    /// Check-in and registration.
    pub enroll: EnrollConfig,
    /// Bounds per address.
    pub admit: AdmitConfig,
    /// Calls to nodes.
    pub route: RouteConfig,
    /// Device connections.
    pub mcs: McsConfig,
    /// How queues are brought to device connections.
    pub attach: AttachConfig,
}

/// Section `[gateway]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GatewayConfig {
    /// Name for people, as nodes list it; empty: `gateway` and a random number.
    pub name: String,
    /// `host:port` of the gRPC listeners of some nodes. One that answers is enough: it names the others.
    pub seeds: Vec<String>,
    /// File with the cluster secret: 64 hexadecimal digits, the same on every node and gateway.
    pub secret_file: PathBuf,
    /// PEM file with the certificate chain that every TLS listener shows, its own certificate first; empty: no TLS listener.
    pub cert_file: PathBuf,
    /// PEM file with the certificate's private key.
    pub key_file: PathBuf,
    /// Device HTTP and app-server HTTP over TLS; none: not served.
    pub https: Option<SocketAddr>,
    /// The same without TLS. Server keys and device passwords cross it in clear: keep it on loopback.
    pub http: Option<SocketAddr>,
    /// Device connections over TLS; several addresses serve the same.
    pub mcs: Vec<SocketAddr>,
    /// How long a drain may take before connections are cut. Short drains leave clients to retry; long ones hold up rollouts.
    #[serde(with = "humantime_serde")]
    pub drain_max: Duration,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            seeds: vec!["127.0.0.1:7400".into()],
            secret_file: PathBuf::from("./martlet-data/secret"),
            cert_file: PathBuf::new(),
            key_file: PathBuf::new(),
            https: None,
            http: Some(SocketAddr::from(([127, 0, 0, 1], 8080))),
            mcs: Vec::new(),
            drain_max: Duration::from_secs(20),
        }
    }
}

/// A configuration that cannot be run.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct ConfigError {
    /// Full name of the key.
    pub key: &'static str,
    /// What is wrong with its value.
    pub problem: String,
}

impl Config {
    /// Checks everything that can be checked without touching the system.
    ///
    /// # Errors
    /// The first key that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        let gateway = &self.gateway;
        if gateway.seeds.is_empty() {
            return wrong("gateway.seeds", "must name at least one node");
        }
        if gateway.seeds.iter().any(|seed| !is_host_and_port(seed)) {
            return wrong("gateway.seeds", "must be host:port each");
        }
        let tls = gateway.https.is_some() || !gateway.mcs.is_empty();
        if tls && gateway.cert_file.as_os_str().is_empty() {
            return wrong("gateway.cert_file", "gateway.https and gateway.mcs need a certificate");
        }
        if gateway.cert_file.as_os_str().is_empty() != gateway.key_file.as_os_str().is_empty() {
            return wrong("gateway.key_file", "certificate and key come together");
        }
        self.http.check()?;
        self.enroll.check()?;
        self.admit.check()?;
        self.route.check()?;
        self.mcs.check()?;
        self.attach.check()
    }
}

/// The verdict on one key.
pub(crate) fn wrong<T>(key: &'static str, problem: &str) -> Result<T, ConfigError> {
    Err(ConfigError { key, problem: problem.into() })
}

fn is_host_and_port(text: &str) -> bool {
    text.rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_can_be_run() {
        Config::default().check().unwrap();
    }

    #[test]
    fn an_unknown_key_is_an_error_and_durations_are_written_for_people() {
        assert!(serde_json::from_str::<Config>(r#"{"gateway":{"seed":"x"}}"#).is_err());
        let config: Config = serde_json::from_str(r#"{"gateway":{"drain_max":"5s"}}"#).unwrap();
        assert_eq!(config.gateway.drain_max, Duration::from_secs(5));
    }

    #[test]
    fn the_key_that_is_wrong_is_named() {
        let with = |change: fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            config.check().unwrap_err().key
        };
        assert_eq!(with(|c| c.gateway.seeds.clear()), "gateway.seeds");
        assert_eq!(with(|c| c.gateway.seeds = vec!["a".into()]), "gateway.seeds");
        assert_eq!(with(|c| c.gateway.https = c.gateway.http), "gateway.cert_file");
        assert_eq!(with(|c| c.gateway.cert_file = "x".into()), "gateway.key_file");
        assert_eq!(with(|c| c.route.deadline = Duration::ZERO), "route.deadline");
    }
}
