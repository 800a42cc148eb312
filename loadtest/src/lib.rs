//! The load generator: devices, app servers, scenarios, and the ledger that judges a run.
