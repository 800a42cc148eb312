//! Bounds per address: who may check in, register or log in how often.
//!
//! Owns one token bucket per address and purpose, and what happens at the bound: the caller refuses with its protocol's word
//! for "too often", and the refusal is counted. Owns no clock: the time comes in. The number of addresses remembered is
//! bounded; at the bound full buckets are forgotten first, and if none is full new addresses share one bucket.

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, wrong};

/// Section `[admit]`: how often one address may do what costs something before anything is authenticated.
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
}
