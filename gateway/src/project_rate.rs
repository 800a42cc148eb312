//! How much one project sends through this gateway: too much is told to come back later, before anything of it is accepted.
//!
//! Owns one [`Bucket`] per project, and how long one that is empty takes. Leaves to each edge its word for that: over HTTP 503 with
//! `Retry-After`, because clients take a 4xx as final (gcm-http.md section 7). Only whose key is known comes here, so there are no more
//! buckets than projects. Every gateway counts for itself.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use martlet_proto::{
    bucket::{Bucket, Rate},
    message::SenderId,
};

use crate::{
    clock::Clock,
    metrics::{Limit, Metrics},
};

/// The buckets of all projects.
#[derive(Debug)]
pub(crate) struct ProjectRate {
    /// None: without limit.
    rate: Option<Rate>,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
    buckets: Mutex<BTreeMap<SenderId, Bucket>>,
}

impl ProjectRate {
    /// Every bucket is full.
    pub(crate) fn new(rate: Option<Rate>, clock: Arc<dyn Clock>, metrics: Arc<Metrics>) -> Self {
        Self { rate, clock, metrics, buckets: Mutex::default() }
    }

    /// Takes as many as a request has targets, all or none. While one is left all pass, and what there is not is owed: a multicast may
    /// be larger than the burst.
    ///
    /// # Errors
    /// How long it is until something is left; counted.
    pub(crate) fn take(&self, sender: &SenderId, targets: usize) -> Result<(), Duration> {
        let Some(rate) = self.rate else { return Ok(()) };
        let now = self.clock.now();
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if !buckets.contains_key(sender) {
            buckets.insert(sender.clone(), Bucket::full(rate, now));
        }
        let bucket = buckets.get_mut(sender).expect("it is there or was put there");
        let taken = bucket.take(rate, now, u32::try_from(targets).unwrap_or(u32::MAX));
        taken.inspect_err(|_| self.metrics.limit(Limit::Project))
    }
}
