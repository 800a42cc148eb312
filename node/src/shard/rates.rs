//! How often messages are taken for one device, or for one topic: what is above it is refused before it costs an entry of the log.
//!
//! Owns the buckets of one shard, as values, and what a leader says when they are empty. Owns no clock. The buckets are the leader's
//! alone, in memory: a new leader begins with full ones. Only what is not full is remembered, of devices and of topics
//! `shard.rates_remembered_max` each; where that is not enough the fullest quarter is forgotten, so that whoever is flooded stays
//! known and nobody is refused for want of memory.
//!
//! A message counts that passed, whatever the log says of it, and a try that is repeated counts again. That one of which an earlier try
//! may have been logged is refused here does no harm: its gateway believes the refusal only after `Resolve`
//! (`gateway/src/route/pursuit.rs`).

use std::{
    collections::BTreeMap,
    sync::{MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use martlet_proto::{
    bucket::{Bucket, Rate},
    cluster::queue::{Answer, Check, Enqueue, Operation, Refusal, answer, operation},
    tag::DeviceTag,
    topic::TopicId,
};

use super::{lead::Lead, settings::ShardSettings};
use crate::{
    metrics::{RateLabel, RateLimit},
    state::StateError,
};

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(60 * 60);

/// The buckets of a shard.
#[derive(Debug)]
pub(super) struct Rates {
    devices: Limiter<DeviceTag, 2>,
    topics: Limiter<TopicId, 1>,
}

impl Rates {
    pub(super) fn new(settings: &ShardSettings) -> Self {
        let of_device = [
            Rate::in_each(MINUTE, settings.device_messages_per_minute_max),
            Rate::in_each(HOUR, settings.device_messages_per_hour_max),
        ];
        let of_topic = [Rate::in_each(MINUTE, settings.topic_messages_per_minute_max)];
        Self {
            devices: Limiter::new(of_device, settings.rates_remembered_max),
            topics: Limiter::new(of_topic, settings.rates_remembered_max),
        }
    }

    /// Every bucket is full again.
    pub(super) fn forget(&mut self) {
        self.devices.known.clear();
        self.topics.known.clear();
    }
}

/// A bucket for each of some rates, for each of some keys.
#[derive(Debug)]
struct Limiter<K, const RATES: usize> {
    /// None: without limit.
    rates: [Option<Rate>; RATES],
    known: BTreeMap<K, [Option<Bucket>; RATES]>,
    known_max: usize,
    /// Those that were forgotten although not full.
    forgotten: u64,
}

impl<K: Copy + Ord, const RATES: usize> Limiter<K, RATES> {
    fn new(rates: [Option<Rate>; RATES], known_max: usize) -> Self {
        Self { rates, known: BTreeMap::new(), known_max, forgotten: 0 }
    }

    fn is_on(&self) -> bool {
        self.rates.iter().any(Option::is_some)
    }

    /// Takes one of every bucket of every key, if each has one: all or none.
    fn takes(&mut self, keys: &[K], now: Instant) -> bool {
        let has = |buckets: &[Option<Bucket>; RATES]| {
            self.rates.iter().flatten().zip(buckets.iter().flatten()).all(|(rate, it)| it.wait(*rate, now).is_zero())
        };
        if !keys.iter().filter_map(|key| self.known.get(key)).all(has) {
            return false;
        }
        for key in keys {
            if !self.known.contains_key(key) && self.known.len() >= self.known_max {
                self.make_room(now);
            }
            let full = || self.rates.map(|rate| rate.map(|rate| Bucket::full(rate, now)));
            let buckets = self.known.entry(*key).or_insert_with(full);
            for (rate, bucket) in self.rates.iter().flatten().zip(buckets.iter_mut().flatten()) {
                // A topic that is named twice may find the second one gone.
                let _ = bucket.take(*rate, now, 1);
            }
        }
        true
    }

    /// Forgets what is full; if that is less than a quarter, the fullest besides.
    fn make_room(&mut self, now: Instant) {
        let rates = self.rates;
        let share = |buckets: &[Option<Bucket>; RATES]| {
            let shares = rates.iter().flatten().zip(buckets.iter().flatten()).map(|(rate, it)| it.share(*rate, now));
            shares.fold(1.0, f64::min)
        };
        self.known.retain(|_, buckets| share(buckets) < 1.0);
        let kept_max = self.known_max - self.known_max.div_ceil(4);
        let surplus = self.known.len().saturating_sub(kept_max);
        if surplus == 0 {
            return;
        }
        let mut shares: Vec<(f64, K)> = self.known.iter().map(|(key, buckets)| (share(buckets), *key)).collect();
        shares.select_nth_unstable_by(surplus - 1, |(one, _), (other, _)| other.total_cmp(one));
        for (_, key) in &shares[..surplus] {
            self.known.remove(key);
        }
        self.forgotten += surplus as u64;
    }
}

impl Lead {
    /// What a message is answered that comes too often; none where it may be proposed, and then it counts.
    pub(super) fn too_often(&self, operation: &Operation) -> Result<Option<Answer>, StateError> {
        match &operation.kind {
            Some(operation::Kind::Enqueue(enqueue)) => {
                if self.takes(|rates| &mut rates.devices, || vec![DeviceTag(enqueue.device_tag)]) {
                    return Ok(None);
                }
                // Source of the order: gcm-http.md section 3.4. What would be refused anyhow is told as that.
                let answer = self.replica.check(&check_of(enqueue))?;
                if matches!(answer.kind, Some(answer::Kind::Refusal(_))) {
                    return Ok(Some(answer));
                }
                Ok(Some(self.refused(RateLimit::Device, Refusal::DeviceRateExceeded)))
            }
            Some(operation::Kind::Publish(publish)) => {
                let topics = || publish.topics.iter().map(|name| TopicId::of(&publish.sender, name)).collect();
                let taken = self.takes(|rates| &mut rates.topics, topics);
                Ok((!taken).then(|| self.refused(RateLimit::Topic, Refusal::TopicsRateExceeded)))
            }
            _ => Ok(None),
        }
    }

    fn takes<K: Copy + Ord, const RATES: usize>(
        &self,
        of: impl FnOnce(&mut Rates) -> &mut Limiter<K, RATES>,
        keys: impl FnOnce() -> Vec<K>,
    ) -> bool {
        let now = self.clock.now();
        let mut rates = self.rates();
        let limiter = of(&mut rates);
        if !limiter.is_on() {
            return true;
        }
        let taken = limiter.takes(&keys(), now);
        self.metrics.rates_forgotten.inc_by(std::mem::take(&mut limiter.forgotten));
        taken
    }

    fn refused(&self, limit: RateLimit, refusal: Refusal) -> Answer {
        self.metrics.rate_refusals.get_or_create(&RateLabel { limit }).inc();
        Answer { kind: Some(answer::Kind::Refusal(refusal.into())) }
    }

    pub(super) fn rates(&self) -> MutexGuard<'_, Rates> {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check_of(enqueue: &Enqueue) -> Check {
    Check {
        device_tag: enqueue.device_tag,
        registration_id: enqueue.registration_id.clone(),
        sender: enqueue.sender.clone(),
        restricted_package_name: enqueue.restricted_package_name.clone(),
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a starting point for arithmetic")]
mod tests {
    use super::*;

    /// Two a minute and three an hour.
    fn limiter(known_max: usize) -> Limiter<u32, 2> {
        Limiter::new([Rate::in_each(MINUTE, 2), Rate::in_each(HOUR, 3)], known_max)
    }

    fn takes(limiter: &mut Limiter<u32, 2>, keys: &[u32], now: Instant) -> Vec<bool> {
        keys.iter().map(|key| limiter.takes(&[*key], now)).collect()
    }

    #[test]
    fn both_rates_bind_and_every_key_has_its_own() {
        let (t0, mut limiter) = (Instant::now(), limiter(10));
        assert_eq!(takes(&mut limiter, &[1, 1, 1, 2], t0), [true, true, false, true]);
        // The minute is over, the hour is not: one is left of it.
        assert_eq!(takes(&mut limiter, &[1, 1], t0 + MINUTE), [true, false]);
        assert_eq!(takes(&mut limiter, &[1], t0 + 10 * MINUTE), [false]);
        assert_eq!(takes(&mut limiter, &[1], t0 + 21 * MINUTE), [true]);
    }

    #[test]
    fn a_rate_that_is_off_does_not_bind() {
        let t0 = Instant::now();
        let mut limiter: Limiter<u32, 2> = Limiter::new([None, Rate::in_each(HOUR, 3)], 10);
        assert!(limiter.is_on());
        assert_eq!(takes(&mut limiter, &[1, 1, 1, 1], t0), [true, true, true, false]);
        assert!(!Limiter::<u32, 1>::new([None], 10).is_on());
    }

    #[test]
    fn of_several_keys_each_is_taken_or_none() {
        let (t0, mut limiter) = (Instant::now(), limiter(10));
        assert!(limiter.takes(&[1], t0) && limiter.takes(&[1, 2], t0));
        assert!(!limiter.takes(&[2, 1], t0));
        assert_eq!(takes(&mut limiter, &[2, 2], t0), [true, false], "the refused one took nothing");
    }

    #[test]
    fn what_is_full_is_forgotten_first_and_is_no_loss() {
        let (t0, mut limiter) = (Instant::now(), limiter(4));
        takes(&mut limiter, &[1, 2, 3, 4], t0);
        assert_eq!(takes(&mut limiter, &[5], t0 + HOUR), [true]);
        assert_eq!((limiter.known.keys().copied().collect::<Vec<_>>(), limiter.forgotten), (vec![5], 0));
    }

    #[test]
    fn when_nothing_is_full_the_fullest_quarter_is_forgotten_and_the_flooded_stay_known() {
        let (t0, mut limiter) = (Instant::now(), limiter(8));
        takes(&mut limiter, &[1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8], t0);
        assert_eq!(takes(&mut limiter, &[9], t0), [true]);
        assert_eq!((limiter.known.len(), limiter.forgotten), (7, 2));
        assert_eq!(takes(&mut limiter, &[1, 2, 3, 4], t0), [false; 4]);
        for key in 100..1_000 {
            assert!(limiter.takes(&[key], t0));
            assert!(limiter.known.len() <= 8);
        }
        assert_eq!(takes(&mut limiter, &[1, 2, 3, 4], t0), [false; 4]);
    }

    #[test]
    fn a_memory_of_one_holds_the_last() {
        let (t0, mut limiter) = (Instant::now(), limiter(1));
        assert_eq!(takes(&mut limiter, &[1, 1, 2, 1], t0), [true; 4]);
        assert_eq!(takes(&mut limiter, &[1, 1], t0), [true, false]);
        assert_eq!(limiter.known.len(), 1);
    }
}
