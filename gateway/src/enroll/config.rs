//! Settings of check-in and registration.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, wrong};

/// Section `[enroll]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EnrollConfig {
    /// What a check-in with an identity of another service gets.
    pub foreign: Foreign,
    /// Settings told to every device that checks in: name and value. Chromium understands `checkin_interval`, `checkin_url`,
    /// `gcm_hostname`, `gcm_secure_port` and `gcm_registration_url`, and drops all of them when one is invalid.
    pub settings: BTreeMap<String, String>,
    /// Whether any well-formed web push key may register; false: only known projects.
    pub accept_web_keys: bool,
    /// Life of an installation's token, seconds.
    pub installation_secs: u64,
}

/// What to do with an identity that no key of ours made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Foreign {
    /// 401: clients start as new devices.
    #[default]
    Refuse,
    /// 200 with a new pair, for fleets that come from elsewhere.
    Adopt,
}

impl Default for EnrollConfig {
    fn default() -> Self {
        Self { foreign: Foreign::Refuse, settings: BTreeMap::new(), accept_web_keys: true, installation_secs: 604_800 }
    }
}

impl EnrollConfig {
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        if self.installation_secs == 0 {
            return wrong("enroll.installation_secs", "must be 1 or more");
        }
        Ok(())
    }
}
