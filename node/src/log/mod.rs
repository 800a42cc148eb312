//! The write-ahead log of a node, shared by all its Raft groups.
