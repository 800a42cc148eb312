//! Stands in for `base2histogram` under openraft: the histograms of statistics that nobody reads, counting nothing.
//!
//! openraft keeps 16 histograms for each group, also without its feature `runtime-stats`, which alone shows them. The first one
//! makes the real crate's tables for every width from 1 to 16, of which openraft uses one: 26 MB in every process, more than all
//! the rest of an empty node of 64 shards, and each entry pays for being counted. Owns the names and signatures that
//! openraft compiles against; `node/src/metrics.rs` counts what operators read. The invariant: whoever shows these statistics
//! does not compile, instead of showing zeros. Goes when the real crate makes only the tables that are asked for.

use std::{fmt, marker::PhantomData};

/// Values that are let go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram<T = ()>(PhantomData<T>);

impl<T> Default for Histogram<T> {
    fn default() -> Self {
        Histogram::new()
    }
}

impl<T> Histogram<T> {
    /// Holds nothing.
    pub fn new() -> Self {
        Histogram(PhantomData)
    }

    /// Lets one value go.
    pub fn record(&mut self, _value: u64) {}

    /// Lets the same value go, any number of times.
    pub fn record_n(&mut self, _value: u64, _count: u64) {}

    /// Of no samples.
    pub fn percentile_stats(&self) -> PercentileStats {
        PercentileStats::default()
    }
}

/// What was recorded, by percentile: no samples. The names are the real crate's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the real crate documents them")]
pub struct PercentileStats {
    pub samples: u64,
    pub p0_1: u64,
    pub p1: u64,
    pub p5: u64,
    pub p10: u64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p99_9: u64,
}

impl fmt::Display for PercentileStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[not counted]")
    }
}

/// A drawing of histograms without `detailed`, which draws it: openraft's `runtime-stats` does not compile with this.
#[derive(Debug, Clone, Default)]
pub struct AsciiChart;

impl AsciiChart {
    /// Of nothing.
    pub fn new() -> AsciiChart {
        AsciiChart
    }

    /// Leaves one out.
    #[must_use]
    pub fn add(self, _name: &str, _histogram: Histogram) -> AsciiChart {
        self
    }
}
