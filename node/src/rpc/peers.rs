//! Channels to the gRPC of other nodes, for what operators ask; Raft has connections of its own.
//!
//! One channel for each address, dialled when first used, and again after it broke.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use martlet_proto::cluster::{admin::admin_client::AdminClient, meta::meta_client::MetaClient};
use tonic::transport::{Channel, Endpoint};

/// Largest reply of a node, bytes: the meta state whole, with every project a cluster may have.
pub const REPLY_MAX: usize = 64 << 20;

const CONNECT_MAX: Duration = Duration::from_secs(2);
const PING_AFTER: Duration = Duration::from_secs(1);
const DEAD_AFTER: Duration = Duration::from_secs(3);

/// An address that no channel can be made for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{address} is not host:port: {what}")]
pub struct AddressError {
    /// The address.
    pub address: String,
    /// What is wrong.
    pub what: String,
}

/// Channels by address.
#[derive(Debug, Clone, Default)]
pub struct Peers(Arc<Mutex<BTreeMap<String, Channel>>>);

impl Peers {
    /// The service `Admin` at `address` (`host:port`).
    pub fn admin(&self, address: &str) -> Result<AdminClient<Channel>, AddressError> {
        self.channel(address).map(|channel| AdminClient::new(channel).max_decoding_message_size(REPLY_MAX))
    }

    /// The service `Meta` at `address`.
    pub fn meta(&self, address: &str) -> Result<MetaClient<Channel>, AddressError> {
        self.channel(address).map(|channel| MetaClient::new(channel).max_decoding_message_size(REPLY_MAX))
    }

    fn channel(&self, address: &str) -> Result<Channel, AddressError> {
        let mut channels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| AddressError { address: address.into(), what: error.to_string() })?
            .connect_timeout(CONNECT_MAX)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_AFTER)
            .keep_alive_timeout(DEAD_AFTER);
        let channel = endpoint.connect_lazy();
        channels.insert(address.into(), channel.clone());
        Ok(channel)
    }
}
