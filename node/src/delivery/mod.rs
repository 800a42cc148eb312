//! Delivery: from a shard's effects to the gateways that hold its devices. The leader's memory only; nothing here is replicated.
//!
//! [`window`] is one device's share, [`attached`] a shard's, [`link`] a gateway's; [`desk`] joins them.

pub mod attached;
pub mod desk;
pub mod link;
pub mod window;
