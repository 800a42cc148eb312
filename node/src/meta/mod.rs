//! The meta group: projects, keys, nodes, the shard map.
//!
//! [`state`] decides, as a pure value; [`placement`] says which node holds what; [`machine`] is the state under Raft; [`keep`]
//! holds the newest state on disk and tells everyone on this node of it; [`skips`] are its decisions about entries of shards; [`watch`] knows which gateways follow; [`identity`] and
//! [`secret`] make a node a member of one cluster; [`group`] is this node's replica of the group and the way to its leader.

pub mod directory;
pub mod group;
pub mod identity;
pub mod keep;
pub mod machine;
pub mod membership;
pub mod placement;
pub mod secret;
pub mod server_key;
pub mod skips;
pub mod state;
pub mod watch;

pub mod checked_file;
