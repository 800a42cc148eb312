//! One shard on this node: proposing, and what a leader does.
