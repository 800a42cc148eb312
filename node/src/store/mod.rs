//! The store: memtables over sled, made durable by an atomic checkpoint.
