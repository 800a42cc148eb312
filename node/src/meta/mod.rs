//! The meta group: projects, keys, nodes, the shard map.
