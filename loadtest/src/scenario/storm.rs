//! `storm`: all devices log in again at once, as after the loss of a gateway or of their network.
//!
//! Twice: with nothing stored, for the price of a login, then with one message stored for each, for the price of a device that
//! comes back, gets it and acknowledges it. Both are CPU time of all server processes, from the first connection until nothing
//! is left to do; TLS sessions are not resumed.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Result, bail};
use serde::Serialize;

use super::{Edge, Run, Sending};
use crate::report::{Report, to_f64};

/// After the last login is answered its device is still to be attached.
const ATTACH: Duration = Duration::from_secs(1);

/// After all have left, before the next thing is measured.
const SETTLE: Duration = Duration::from_secs(5);

/// Longest wait until acknowledgements are confirmed; a device asks by a ping after two seconds.
const CONFIRM_PATIENCE: Duration = Duration::from_secs(60);

/// Figures of `storm`. Field names are keys of the JSON line: they stay.
#[derive(Debug, Clone, Default, Serialize)]
pub struct StormFigures {
    /// CPU milliseconds of all server processes for each login of a device with nothing stored, TLS handshake included.
    pub login_cpu_ms: f64,
    /// The same, by process.
    pub login_cpu_ms_each: Vec<(String, f64)>,
    /// From the first connection until the last device was on line, seconds.
    pub login_seconds: f64,
    /// Logins a second in that time.
    pub logins_per_s: f64,
    /// CPU milliseconds of all server processes for each device that logs in, gets its stored message and has its
    /// acknowledgement confirmed.
    pub drain_cpu_ms: f64,
    /// The same, by process.
    pub drain_cpu_ms_each: Vec<(String, f64)>,
    /// From the first connection until the last message arrived, seconds.
    pub drain_seconds: f64,
}

impl StormFigures {
    /// For the table.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let each = |each: &[(String, f64)]| {
            let each: Vec<String> = each.iter().map(|(name, ms)| format!("{name} {ms:.3}")).collect();
            each.join(", ")
        };
        vec![
            ("a login", format!("{:.3} ms of CPU ({})", self.login_cpu_ms, each(&self.login_cpu_ms_each))),
            ("logins", format!("{:.0}/s, {:.1} s", self.logins_per_s, self.login_seconds)),
            ("a drained device", format!("{:.3} ms of CPU ({})", self.drain_cpu_ms, each(&self.drain_cpu_ms_each))),
            ("drain", format!("{:.1} s", self.drain_seconds)),
        ]
    }
}

impl Run<'_> {
    /// The run comes back with its report, because the fleet goes and comes.
    pub(super) async fn storm(mut self) -> Result<(Self, Report)> {
        if self.broker.cluster.is_none() {
            bail!("storm measures processes of its own: use --local-cluster");
        }
        let sending = Arc::new(Sending::default());
        tokio::time::sleep(SETTLE).await;
        let login_from = self.edge(&sending);
        self.bring_on_line().await?;
        let login_seconds = self.clock.secs() - login_from.at;
        tokio::time::sleep(ATTACH).await;
        let login_to = self.edge(&sending);
        self.fleet.leave().await;
        self.fleet = self.fleet.come_back();

        self.store(&sending, 0..self.plan.devices, 1).await?;
        tokio::time::sleep(SETTLE).await;
        let from = self.edge(&sending);
        self.fleet.seen.measuring.store(true, Ordering::Relaxed);
        self.fleet.connect(0..self.plan.devices);
        let drain_seconds = self.drain(&sending).await - from.at;
        self.confirmed(CONFIRM_PATIENCE).await?;
        let to = self.edge(&sending);
        let resident = self.broker.cluster.as_ref().map_or(0, crate::cluster::Cluster::resident_bytes);
        self.fleet.leave().await;

        let devices = to_f64(self.plan.devices as u64);
        let mut report = self.report(&from, &to, resident);
        report.throughput_per_s = to_f64(to.arrived - from.arrived) / drain_seconds.max(f64::MIN_POSITIVE);
        self.per_cpu(&mut report, to_f64(to.arrived - from.arrived));
        report.storm = Some(StormFigures {
            login_cpu_ms: 1_000.0 * (login_to.cpu_secs - login_from.cpu_secs) / devices,
            login_cpu_ms_each: each(&login_from, &login_to, devices),
            login_seconds,
            logins_per_s: devices / login_seconds.max(f64::MIN_POSITIVE),
            drain_cpu_ms: 1_000.0 * (to.cpu_secs - from.cpu_secs) / devices,
            drain_cpu_ms_each: each(&from, &to, devices),
            drain_seconds,
        });
        Ok((self, report))
    }
}

/// CPU milliseconds of each process between two edges, for each device.
fn each(from: &Edge, to: &Edge, devices: f64) -> Vec<(String, f64)> {
    to.cpu_secs_since(from).into_iter().map(|(name, secs)| (name, 1_000.0 * secs / devices)).collect()
}
