//! Bounds per address: who may check in, register or log in how often.
//!
//! Owns one [`Bucket`] per address and purpose, and what happens at the bound: the caller refuses with its protocol's word
//! for "too often", and the refusal is counted. Owns no clock: the time comes in. The number of addresses remembered is
//! bounded; at the bound full buckets are forgotten first, and if none is full new addresses share one bucket.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use martlet_proto::bucket::{Bucket, Rate};
use serde::{Deserialize, Serialize};

use crate::{
    clock::Clock,
    config::{ConfigError, wrong},
    mcs::Doorkeeper,
    metrics::{Limit, Metrics},
};

/// Section `[admit]`: how often one address may do what costs something before anything is authenticated.
///
/// Wrong server keys have no bound: a key is drawn with 256 random bits and looked up by its SHA-256, before the body is read, so that
/// guessing finds nothing and costs little, while a bound could only shut out app servers behind the guesser's address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdmitConfig {
    /// Check-ins a second of one address, in the long run; 0 is without limit. Fleets behind one address share it.
    pub checkins_per_sec: u32,
    /// Check-ins of one address at once.
    pub checkins_burst: u32,
    /// Registrations a second of one address, in the long run; 0 is without limit.
    pub registrations_per_sec: u32,
    /// Registrations of one address at once.
    pub registrations_burst: u32,
    /// MCS logins a second of one address, in the long run; 0 is without limit.
    pub logins_per_sec: u32,
    /// MCS logins of one address at once.
    pub logins_burst: u32,
    /// Addresses remembered at once.
    pub addresses_max: usize,
}

impl Default for AdmitConfig {
    fn default() -> Self {
        Self {
            checkins_per_sec: 2_000,
            checkins_burst: 20_000,
            registrations_per_sec: 2_000,
            registrations_burst: 20_000,
            logins_per_sec: 2_000,
            logins_burst: 20_000,
            addresses_max: 100_000,
        }
    }
}

impl AdmitConfig {
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        for (key, per_sec, burst) in [
            ("admit.checkins_burst", self.checkins_per_sec, self.checkins_burst),
            ("admit.registrations_burst", self.registrations_per_sec, self.registrations_burst),
            ("admit.logins_burst", self.logins_per_sec, self.logins_burst),
        ] {
            if per_sec != 0 && burst == 0 {
                return wrong(key, "must be 1 or more");
            }
        }
        if self.addresses_max == 0 {
            return wrong("admit.addresses_max", "must be 1 or more");
        }
        Ok(())
    }

    /// None: without limit.
    fn rate(&self, purpose: Purpose) -> Option<Rate> {
        match purpose {
            Purpose::Checkin => Rate::per_second(self.checkins_per_sec, self.checkins_burst),
            Purpose::Registration => Rate::per_second(self.registrations_per_sec, self.registrations_burst),
            Purpose::Login => Rate::per_second(self.logins_per_sec, self.logins_burst),
        }
    }
}

/// What one address may do so often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// A check-in.
    Checkin,
    /// A registration, its end, or an installation.
    Registration,
    /// An MCS login.
    Login,
}

/// The buckets of all addresses.
#[derive(Debug)]
pub struct Admit {
    config: AdmitConfig,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
    buckets: Mutex<Buckets>,
}

#[derive(Debug, Default)]
struct Buckets {
    known: BTreeMap<(Purpose, IpAddr), Bucket>,
    /// When full buckets were last looked for.
    swept: Option<Instant>,
}

/// Full buckets are looked for at most this often.
const SWEEP: Duration = Duration::from_secs(1);

impl Admit {
    /// Every bucket is full.
    pub fn new(config: AdmitConfig, clock: Arc<dyn Clock>, metrics: Arc<Metrics>) -> Self {
        Self { config, clock, metrics, buckets: Mutex::default() }
    }

    /// Takes one from the bucket of the address; false when it is empty, and then it is counted.
    pub fn admits(&self, purpose: Purpose, address: IpAddr) -> bool {
        let limit = match purpose {
            Purpose::Checkin => Limit::Checkins,
            Purpose::Registration => Limit::Registrations,
            Purpose::Login => Limit::Logins,
        };
        let Some(rate) = self.config.rate(purpose) else { return true };
        let now = self.clock.now();
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let mut key = (purpose, network(address));
        if !buckets.known.contains_key(&key) && buckets.known.len() >= self.config.addresses_max {
            buckets.sweep(&self.config, now);
            if buckets.known.len() >= self.config.addresses_max {
                self.metrics.limit(Limit::Addresses);
                key.1 = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
            }
        }
        let bucket = buckets.known.entry(key).or_insert_with(|| Bucket::full(rate, now));
        let admitted = bucket.take(rate, now, 1).is_ok();
        if !admitted {
            self.metrics.limit(limit);
        }
        admitted
    }
}

impl Doorkeeper for Admit {
    fn admit_login(&self, address: IpAddr) -> bool {
        self.admits(Purpose::Login, address)
    }
}

impl Buckets {
    fn sweep(&mut self, config: &AdmitConfig, now: Instant) {
        if self.swept.is_some_and(|swept| now.saturating_duration_since(swept) < SWEEP) {
            return;
        }
        self.swept = Some(now);
        self.known
            .retain(|(purpose, _), bucket| config.rate(*purpose).is_some_and(|rate| bucket.share(rate, now) < 1.0));
    }
}

/// Who owns one IPv6 address owns its /64.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from(u128::from(address) & !u128::from(u64::MAX))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct At(Mutex<Instant>);

    impl Clock for At {
        fn now(&self) -> Instant {
            *self.0.lock().unwrap()
        }

        fn wall_ms(&self) -> u64 {
            0
        }
    }

    fn admit(addresses_max: usize) -> (Admit, Arc<At>) {
        #[expect(clippy::disallowed_methods, reason = "a starting point for arithmetic")]
        let clock = Arc::new(At(Mutex::new(Instant::now())));
        let config = AdmitConfig {
            checkins_per_sec: 1,
            checkins_burst: 2,
            logins_per_sec: 0,
            addresses_max,
            ..AdmitConfig::default()
        };
        (Admit::new(config, Arc::clone(&clock) as Arc<dyn Clock>, Arc::default()), clock)
    }

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn an_address_has_its_burst_then_its_rate_and_others_have_theirs() {
        let (admit, clock) = admit(10);
        let once = |last| admit.admits(Purpose::Checkin, address(last));
        assert_eq!([once(1), once(1), once(1), once(2)], [true, true, false, true]);
        *clock.0.lock().unwrap() += Duration::from_secs(1);
        assert_eq!([once(1), once(1)], [true, false]);
        assert!((0..100).all(|_| admit.admits(Purpose::Login, address(1))));
    }

    #[test]
    fn at_the_bound_full_buckets_are_forgotten_and_then_new_addresses_share_one() {
        let (admit, clock) = admit(2);
        let once = |last| admit.admits(Purpose::Checkin, address(last));
        assert_eq!([once(1), once(2), once(3), once(4), once(5)], [true, true, true, true, false]);
        *clock.0.lock().unwrap() += Duration::from_secs(10);
        assert_eq!([once(6), once(6), once(6)], [true, true, false]);
    }

    #[test]
    fn addresses_of_one_ipv6_network_share_a_bucket() {
        let (admit, _clock) = admit(10);
        let once = |text: &str| admit.admits(Purpose::Checkin, text.parse().unwrap());
        assert_eq!([once("2001:db8::1"), once("2001:db8::2"), once("2001:db8::3")], [true, true, false]);
        assert!(once("2001:db8:0:1::1"));
    }
}
