//! Configuration of a node.
//!
//! Owns the section `[node]` and the checks that span sections; every other section belongs to the module that reads it. All
//! checks run before a file is locked or a port bound, and name the key that is wrong.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{meta::watch::WatchConfig, raft::RaftSettings, shard::ShardSettings, store::StoreConfig};

/// An entry of 64 KiB must fit many times.
const SEGMENT_BYTES_MIN: u64 = 1 << 20;

/// Everything a node is told.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Who this node is and where it listens.
    pub node: NodeConfig,
    /// The write-ahead log.
    pub log: LogSection,
    /// The rows of the shards.
    pub store: StoreConfig,
    /// Timers of Raft.
    pub raft: RaftSettings,
    /// Packing, admission and limits of shards.
    pub shard: ShardSettings,
    /// The watch of the meta state.
    pub watch: WatchConfig,
}

/// Section `[node]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NodeConfig {
    /// Number of this node, unique in the cluster and never given to another, 1 and up. A data directory belongs to one number.
    pub id: u64,
    /// Where gateways, peers and `martlet admin` reach the node: address of its gRPC listener.
    pub listen: SocketAddr,
    /// `host:port` that peers and gateways are told; empty: the address that was bound, which serves only one machine.
    pub advertise: String,
    /// Directory of everything the node keeps. One process at a time.
    pub data: PathBuf,
    /// File with the cluster secret: 64 hexadecimal digits, the same on every node and gateway. Keep it off the data disk:
    /// who has both can read every key of the cluster.
    pub secret_file: PathBuf,
    /// Permits gRPC without TLS on an address other than loopback. Whoever reaches that port owns the cluster: only for
    /// networks that are closed by other means.
    pub insecure_grpc: bool,
    /// Percent of the data disk that is kept for what frees memory and disk (acks, expiry, votes, checkpoints, purge): below it
    /// sends and registrations are refused. Too little lets a full disk stop the node's shards; too much wastes disk.
    pub disk_reserve_percent: u64,
    /// The least reserve, bytes.
    pub disk_reserve_bytes_min: u64,
    /// How long a drain may take before the node stops anyway. Short drains leave clients to retry; long ones hold up
    /// rollouts.
    #[serde(with = "humantime_serde")]
    pub drain_max: Duration,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            id: 1,
            listen: SocketAddr::from(([127, 0, 0, 1], 7400)),
            advertise: String::new(),
            data: PathBuf::from("./martlet-data/node"),
            secret_file: PathBuf::from("./martlet-data/secret"),
            insecure_grpc: false,
            disk_reserve_percent: 5,
            disk_reserve_bytes_min: 256 << 20,
            drain_max: Duration::from_secs(20),
        }
    }
}

/// Section `[log]`: the write-ahead log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogSection {
    /// Bytes allocated per segment. Smaller segments free disk sooner and cost more copies of small records.
    pub segment_bytes: u64,
    /// Bytes of log that begin a checkpoint and a base file of whoever holds it up, so that the log can shrink, and beyond which
    /// it is kept for no replica that lags: that one gets a snapshot. Less: more rows reach sled that an ack would have spared it;
    /// more: a longer replay at a start.
    pub checkpoint_bytes: u64,
    /// Most bytes of log that are kept. Halfway there from `checkpoint_bytes` the last entries of idle shards are copied out of
    /// old segments; beyond the bound, leaders refuse enqueues. Less refuses sooner when a checkpoint or a base file is held up; more
    /// takes disk and makes a restart longer.
    pub kept_bytes_max: u64,
}

impl Default for LogSection {
    fn default() -> Self {
        Self { segment_bytes: 64 << 20, checkpoint_bytes: 512 << 20, kept_bytes_max: 4 << 30 }
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
    pub fn check(&self) -> Result<(), ConfigError> {
        let wrong = |key, problem: &str| Err(ConfigError { key, problem: problem.into() });
        if self.node.id == 0 {
            return wrong("node.id", "must be 1 or more");
        }
        if !self.node.listen.ip().is_loopback() && !self.node.insecure_grpc {
            return wrong(
                "node.listen",
                "gRPC has no TLS yet, so it binds to loopback only; --insecure-grpc (node.insecure_grpc) permits more where the network is \
                 closed by other means",
            );
        }
        if !self.node.advertise.is_empty() && !self.node.advertise.rsplit_once(':').is_some_and(is_host_and_port) {
            return wrong("node.advertise", "must be host:port");
        }
        if self.log.segment_bytes < SEGMENT_BYTES_MIN {
            return wrong("log.segment_bytes", "must be at least 1048576");
        }
        if self.log.kept_bytes_max < self.log.checkpoint_bytes.saturating_add(self.log.segment_bytes * 2) {
            return wrong("log.kept_bytes_max", "must be at least log.checkpoint_bytes and two segments");
        }
        if self.store.base_log_factor == 0 {
            return wrong("store.base_log_factor", "must be 1 or more");
        }
        if self.node.disk_reserve_percent > 90 {
            return wrong("node.disk_reserve_percent", "must be 90 or less");
        }
        if self.watch.keepalive.is_zero() || self.watch.lease < self.watch.keepalive * 2 {
            return wrong("watch.lease", "must be at least twice watch.keepalive, which must be longer than 0s");
        }
        if let Err((key, problem)) = self.shard.check() {
            return wrong(key, &problem);
        }
        if self.raft.election_max <= self.raft.election_min || self.raft.election_min < self.raft.heartbeat * 2 {
            return wrong("raft.election_min", "must be at least twice raft.heartbeat and less than raft.election_max");
        }
        Ok(())
    }
}

fn is_host_and_port((host, port): (&str, &str)) -> bool {
    !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_can_be_run() {
        Config::default().check().unwrap();
    }

    #[test]
    fn a_public_listener_without_tls_is_refused_by_its_key_unless_permitted() {
        let mut config = Config::default();
        config.node.listen = SocketAddr::from(([0, 0, 0, 0], 7400));
        assert_eq!(config.check().unwrap_err().key, "node.listen");
        config.node.insecure_grpc = true;
        config.check().unwrap();
    }

    #[test]
    fn bounds_under_which_a_shard_would_stop_are_refused_by_their_key() {
        for (key, wrong) in [
            ("shard.entry_bytes_max", ShardSettings { entry_bytes_max: 4 << 20, ..ShardSettings::default() }),
            ("shard.entry_commands_max", ShardSettings { entry_commands_max: 10_000, ..ShardSettings::default() }),
            ("shard.pipeline_max", ShardSettings { pipeline_max: 0, ..ShardSettings::default() }),
        ] {
            let config = Config { shard: wrong, ..Config::default() };
            assert_eq!(config.check().unwrap_err().key, key);
        }
    }

    #[test]
    fn an_unknown_key_is_an_error() {
        assert!(serde_json::from_str::<Config>(r#"{"node":{"idd":3}}"#).is_err());
        let config: Config = serde_json::from_str(r#"{"node":{"id":3,"drain_max":"5s"}}"#).unwrap();
        assert_eq!((config.node.id, config.node.drain_max), (3, Duration::from_secs(5)));
    }

    #[test]
    fn an_advertised_address_needs_a_port() {
        for (text, good) in [("a.example:7400", true), ("a.example", false), (":7400", false), ("a:0", false)] {
            let mut config = Config::default();
            config.node.advertise = text.into();
            assert_eq!(config.check().is_ok(), good, "{text}");
        }
    }
}
