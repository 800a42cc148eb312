//! `connection.json`: how clients on this machine reach a `standalone` broker.
//!
//! Written when every listener is ready and removed at a clean end, so that its presence means "ready". A listener that does
//! not exist is absent from it.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::private_file;

/// File name in the data directory.
pub(crate) const FILE: &str = "connection.json";

/// Addresses, CA and projects of a running broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Connection {
    /// Plain HTTP of app servers and device registration.
    pub(crate) http: String,
    /// The same over TLS.
    pub(crate) https: String,
    /// XMPP (CCS) over TLS, `host:port`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) xmpp: Option<String>,
    /// MCS over TLS, `host:port`.
    pub(crate) mcs: String,
    /// gRPC of the node, `host:port`.
    pub(crate) grpc: String,
    /// Metrics, health, readiness.
    pub(crate) admin: String,
    /// PEM file of the CA to trust.
    pub(crate) ca_file: String,
    /// Projects and their keys, as far as this data directory knows them in clear.
    pub(crate) projects: Vec<ProjectKey>,
}

/// A project and one of its server keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProjectKey {
    /// Decimal digits.
    pub(crate) sender_id: String,
    /// In clear.
    pub(crate) server_key: String,
}

impl Connection {
    /// Reads `path`.
    ///
    /// # Errors
    /// When it is missing, which means that no broker is ready there, or does not parse.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| {
            format!("read {}: is `martlet standalone` running, and ready, with this data directory?", path.display())
        })?;
        serde_json::from_str(&text).with_context(|| format!("parse {}", path.display()))
    }

    /// Writes `path`, which holds keys in clear, for its owner only.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).expect("strings always encode") + "\n";
        private_file::write(path, &text).with_context(|| format!("write {}", path.display()))
    }
}
