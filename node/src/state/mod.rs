//! The replicated state of a shard, as a pure value: `apply(entry) -> (answers, effects, writes)`.
