//! When the process should end, and what it raises before it begins.
//!
//! SIGTERM and SIGINT begin a drain; a second one ends the process at once. Owns no protocol: each listener knows how to drain,
//! this module only says when.

use anyhow::{Context as _, Result};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit status after a second signal, as a shell reports SIGTERM.
const KILLED_STATUS: i32 = 143;

/// A token that is cancelled at the first SIGTERM or SIGINT. The task behind it lives as long as the process.
///
/// # Errors
/// When the signal handlers cannot be installed.
pub(crate) fn on_signal() -> Result<CancellationToken> {
    let drain = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let fired = drain.clone();
    #[expect(clippy::disallowed_methods, reason = "it owns nothing and ends with the process")]
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        tracing::info!("draining; a second signal ends at once");
        fired.cancel();
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        tracing::warn!("ended by a second signal before the drain was complete");
        std::process::exit(KILLED_STATUS);
    });
    Ok(drain)
}

/// Raises the soft limit of open descriptors to the hard one: a connection is a descriptor. Returns the limit in force.
pub(crate) fn raise_descriptor_limit() -> u64 {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let before = limit.current;
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(%error, limit = before, "could not raise the limit of open descriptors");
            limit.current = before;
        }
    }
    // None is "without limit".
    limit.current.unwrap_or(u64::MAX)
}
