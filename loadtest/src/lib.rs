//! The load generator: devices, app servers, scenarios, and the ledger that judges a run.

pub mod history;
pub mod ledger;
