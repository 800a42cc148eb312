//! The demo device of `standalone`: an identity and a token in the data directory, so that the printed lines work as pasted.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use martlet_loadtest::{
    device::{self, Identity},
    http::HttpClient,
};
use serde::{Deserialize, Serialize};

use crate::private_file;

/// File name in the data directory.
pub(crate) const FILE: &str = "device.json";

/// Application id of the demo device.
const APP: &str = "net.martlet.demo";

/// A device and its registration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct DemoDevice {
    /// From check-in.
    #[serde(flatten)]
    pub(crate) identity: Identity,
    /// Application id.
    pub(crate) app: String,
    /// Sender it is registered for.
    pub(crate) sender_id: String,
    /// Registration token.
    pub(crate) token: String,
}

impl DemoDevice {
    /// Reads the device of `path`.
    ///
    /// # Errors
    /// When it is missing or no device.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| {
            format!("read {}: `martlet standalone` writes it when it is ready for the first time", path.display())
        })?;
        serde_json::from_str(&text).with_context(|| format!("parse {}", path.display()))
    }

    /// The device of `path`, made and registered if it is missing. Registering again gives the token it has.
    ///
    /// # Errors
    /// When the broker at `http` refuses.
    pub(crate) async fn open(path: &Path, http: &str, sender_id: &str) -> Result<Self> {
        let http = HttpClient::new(http)?;
        let known = if path.exists() { Some(Self::read(path)?.identity) } else { None };
        let identity = device::check_in(&http, known).await.context("check the demo device in")?;
        let token = device::register(&http, identity, APP, sender_id).await.context("register the demo device")?;
        let device = Self { identity, app: APP.to_owned(), sender_id: sender_id.to_owned(), token };
        let text = serde_json::to_string_pretty(&device).expect("strings and numbers always encode") + "\n";
        private_file::write(path, &text).with_context(|| format!("write {}", path.display()))?;
        Ok(device)
    }
}
