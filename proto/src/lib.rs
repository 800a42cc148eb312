//! What two sides of Martlet must agree on, and nothing that does I/O: tokens and their shard, messages, limits and rates, the codecs
//! of HTTP and MCS, and the gRPC contracts between gateways and nodes.

pub mod bucket;
pub mod cluster;
pub mod device;
pub mod group;
pub mod http;
pub mod limits;
pub mod mcs;
pub mod message;
pub mod refusal;
pub mod seal;
pub mod shard;
pub mod tag;
pub mod token;
pub mod topic;
