//! Channels to the gRPC of other nodes, for what operators ask and for what is published to topics; Raft has connections of its own.
//!
//! One channel for each node and address, dialled when first used, and again after it broke; over the same links as Raft's
//! connections, so that whatever cuts or encrypts those does it to these.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use martlet_proto::{
    cluster::{
        admin::admin_client::AdminClient,
        meta::{Node, meta_client::MetaClient},
        queue::queue_client::QueueClient,
    },
    limits::META_STATE_MAX_BYTES,
};
use tonic::transport::{Channel, Endpoint};

use crate::raft::{Dialer, Links, Member};

/// Largest reply of a node, bytes: the meta state whole, and how each node is beside it.
pub const REPLY_MAX: usize = META_STATE_MAX_BYTES;

const CONNECT_MAX: Duration = Duration::from_secs(2);
const PING_AFTER: Duration = Duration::from_secs(1);
const DEAD_AFTER: Duration = Duration::from_secs(3);

/// Channels by node and address.
#[derive(Debug, Clone)]
pub struct Peers {
    links: Arc<dyn Links>,
    channels: Arc<Mutex<BTreeMap<(u64, String), Channel>>>,
}

impl Peers {
    /// Dials over these links.
    pub fn new(links: Arc<dyn Links>) -> Self {
        Peers { links, channels: Arc::default() }
    }

    /// The service `Admin` of a node.
    pub fn admin(&self, node: &Node) -> AdminClient<Channel> {
        AdminClient::new(self.channel(node)).max_decoding_message_size(REPLY_MAX)
    }

    /// The service `Meta` of a node.
    pub fn meta(&self, node: &Node) -> MetaClient<Channel> {
        MetaClient::new(self.channel(node)).max_decoding_message_size(REPLY_MAX)
    }

    /// The service `Queue` of a node.
    pub fn queue(&self, node: &Node) -> QueueClient<Channel> {
        QueueClient::new(self.channel(node))
    }

    fn channel(&self, node: &Node) -> Channel {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let open = || {
            let peer = Member { node: node.node_id, address: node.address.clone() };
            // The URI only names the authority of requests: the dialer knows where to go.
            Endpoint::from_static("http://peer")
                .connect_timeout(CONNECT_MAX)
                .http2_keep_alive_interval(PING_AFTER)
                .keep_alive_timeout(DEAD_AFTER)
                .connect_with_connector_lazy(Dialer::new(peer, Arc::clone(&self.links)))
        };
        channels.entry((node.node_id, node.address.clone())).or_insert_with(open).clone()
    }
}
