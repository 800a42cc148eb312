//! What a run found: a table for people, or one JSON line with stable keys (loadtest/README.md lists them).

use comfy_table::{Table, presets::UTF8_BORDERS_ONLY};
use serde::Serialize;

use crate::{
    ledger::Verdict,
    scenario::{FillFigures, IdleFigures, RestartFigures, StormFigures, TopicFigures},
};

/// Violations that are shown; the rest is counted.
const VIOLATIONS_SHOWN: usize = 20;

/// The figures of a run. Field names are the keys of the JSON line: they stay.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Which scenario.
    pub scenario: &'static str,
    /// `kept` or `broken`.
    pub verdict: &'static str,
    /// Devices on line.
    pub devices: usize,
    /// Devices registered, those on line included.
    pub registered: usize,
    /// Length of the measured window, seconds.
    pub seconds: f64,
    /// Intended requests a second; 0: as fast as answers came.
    pub rate: f64,
    /// Tokens of one request.
    pub recipients: usize,
    /// Size of a message's body, bytes.
    pub payload_bytes: usize,
    /// Nodes of the local cluster; 0: a broker that was there.
    pub nodes: usize,
    /// Shards of the local cluster.
    pub shards: u32,
    /// Messages a second in the window: acked to app servers (`steady`), arrived at devices (`offline-drain`).
    pub throughput_per_s: f64,
    /// Messages a second that arrived at devices in the window.
    pub delivered_per_s: f64,
    /// Messages of the window for each CPU second of all server processes; 0 without a local cluster.
    pub messages_per_server_cpu_s: f64,
    /// CPU seconds of all server processes in the window.
    pub server_cpu_s: f64,
    /// The same, by process.
    pub server_cpu_s_each: Vec<(String, f64)>,
    /// Latency from the intended send to the arrival, milliseconds.
    pub p50_ms: f64,
    /// As above.
    pub p99_ms: f64,
    /// As above.
    pub p999_ms: f64,
    /// As above.
    pub max_ms: f64,
    /// Messages acked in the whole run.
    pub acked: usize,
    /// Messages that arrived.
    pub delivered: usize,
    /// Messages definitely refused.
    pub failed: usize,
    /// Messages of unknown outcome.
    pub unknown: usize,
    /// Messages acked, not arrived, and not explained.
    pub lost: usize,
    /// Arrivals beyond the first.
    pub duplicates: usize,
    /// Acked messages that the limit of waiting messages explains.
    pub dropped_by_limit: usize,
    /// 4 KiB appends with fdatasync a second on the cluster's disk, measured in the same run.
    pub fdatasync_per_s: f64,
    /// Resident memory of all server processes at the end of the window, bytes.
    pub server_rss_bytes: u64,
    /// Of `idle` only; its keys stand beside the others.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub idle: Option<IdleFigures>,
    /// Of `storm` only; its keys stand beside the others.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub storm: Option<StormFigures>,
    /// Of `restart` only; its keys stand beside the others.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub restart: Option<RestartFigures>,
    /// Of `offline-fill` only; its keys stand beside the others.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub fill: Option<FillFigures>,
    /// Of `topic` only; its keys stand beside the others.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub topic: Option<TopicFigures>,
    /// Rules of the ledger that were broken.
    pub violations: Vec<String>,
    /// Cores and processor.
    pub machine: String,
}

impl Report {
    /// Takes over what the ledger says.
    pub fn judged(&mut self, verdict: &Verdict) {
        self.verdict = if verdict.is_kept() { "kept" } else { "broken" };
        (self.acked, self.delivered) = (verdict.acked, verdict.delivered);
        (self.failed, self.unknown) = (verdict.failed, verdict.unknown);
        (self.lost, self.duplicates) = (verdict.lost, verdict.duplicates);
        self.dropped_by_limit = verdict.dropped_by_limit;
        self.violations = verdict.violations.iter().take(VIOLATIONS_SHOWN).map(ToString::to_string).collect();
        if verdict.violations.len() > VIOLATIONS_SHOWN {
            self.violations.push(format!("and {} more", verdict.violations.len() - VIOLATIONS_SHOWN));
        }
    }

    /// Takes over what a scenario found broken by itself.
    pub fn breaks(&mut self, found: Vec<String>) {
        if !found.is_empty() {
            self.verdict = "broken";
            self.violations.extend(found);
        }
    }

    /// One line, no line feed.
    #[must_use]
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("numbers and strings always encode")
    }

    /// For people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(UTF8_BORDERS_ONLY);
        let rows = [
            (
                "scenario",
                format!("{}: {} devices on line, {} registered", self.scenario, self.devices, self.registered),
            ),
            ("messages", format!("{} bytes, {} recipients a request", self.payload_bytes, self.recipients)),
            ("window", format!("{:.1} s", self.seconds)),
            ("throughput", format!("{:.0} messages/s, {:.0} arrived/s", self.throughput_per_s, self.delivered_per_s)),
            (
                "latency",
                format!(
                    "p50 {:.1} ms, p99 {:.1} ms, p99.9 {:.1} ms, max {:.1} ms",
                    self.p50_ms, self.p99_ms, self.p999_ms, self.max_ms
                ),
            ),
            (
                "server CPU",
                format!("{:.1} s, {:.0} messages per CPU second", self.server_cpu_s, self.messages_per_server_cpu_s),
            ),
            ("server memory", format!("{:.0} MiB", to_f64(self.server_rss_bytes) / f64::from(1 << 20))),
            ("disk", format!("{:.0} fdatasync/s (4 KiB appends)", self.fdatasync_per_s)),
            (
                "fates",
                format!(
                    "{} acked, {} arrived, {} refused, {} unknown, {} dropped by the limit",
                    self.acked, self.delivered, self.failed, self.unknown, self.dropped_by_limit
                ),
            ),
            ("lost", self.lost.to_string()),
            ("duplicates", self.duplicates.to_string()),
            ("machine", self.machine.clone()),
            ("verdict", self.verdict.to_owned()),
        ];
        let own = self.idle.iter().flat_map(IdleFigures::rows).chain(self.storm.iter().flat_map(StormFigures::rows));
        let own = own.chain(self.restart.iter().flat_map(RestartFigures::rows));
        let own = own.chain(self.fill.iter().flat_map(FillFigures::rows));
        let own = own.chain(self.topic.iter().flat_map(TopicFigures::rows));
        let (head, tail) = rows.split_at(1);
        for (name, value) in head.iter().cloned().chain(own).chain(tail.iter().cloned()) {
            table.add_row([name.to_owned(), value]);
        }
        let violations: String = self.violations.iter().map(|violation| format!("\n  {violation}")).collect();
        format!("{table}{violations}")
    }
}

/// Lossless for every count a run can have.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
pub(crate) fn to_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::faults::table::{FaultReport, Row};

    const README: &str = include_str!("../README.md");

    /// The keys that a table of the README explains: first column, between backticks.
    fn documented(section: &str, end: &str) -> BTreeSet<String> {
        let from = README.split_once(section).unwrap().1;
        let text = from.split_once(end).map_or(from, |(text, _)| text);
        let cells = text.lines().filter_map(|line| line.strip_prefix("| `")?.split_once(" |"));
        let keys = cells.flat_map(|(cell, _)| cell.split(['`', ',', ' ']).filter(|word| !word.is_empty()));
        // One of a list's entries.
        keys.map(|key| key.trim_start_matches("kinds[].").to_owned()).collect()
    }

    fn keys(json: &str) -> BTreeSet<String> {
        let json: serde_json::Value = serde_json::from_str(json).unwrap();
        json.as_object().unwrap().keys().cloned().collect()
    }

    #[test]
    fn the_readme_explains_every_key_of_the_json_line_and_no_other() {
        let report = Report {
            idle: Some(IdleFigures::default()),
            storm: Some(StormFigures::default()),
            restart: Some(RestartFigures::default()),
            fill: Some(FillFigures::default()),
            topic: Some(TopicFigures::default()),
            ..Report::default()
        };
        assert_eq!(keys(&report.json()), documented("## The JSON line", "## Where the time goes"));
        assert!(!report.json().contains('\n'), "one line");
    }

    #[test]
    fn the_readme_explains_every_key_of_the_json_line_of_faults_and_no_other() {
        let skipped = Row { skipped: Some("why".to_owned()), enable: Some("how".to_owned()), ..Row::default() };
        let of_a_kind = keys(&serde_json::to_string(&skipped).unwrap());
        let report = FaultReport {
            scenario: "faults",
            verdict: "kept",
            seed: 1,
            nodes: 3,
            shards: 4,
            devices: 8,
            seconds: 1.0,
            total: Row::default(),
            dropped_by_limit: 0,
            kinds: vec![skipped],
            violations: Vec::new(),
            machine: String::new(),
        };
        let all: BTreeSet<_> = keys(&report.json()).union(&of_a_kind).cloned().collect();
        assert_eq!(all, documented("### Its JSON line", "\0"));
    }
}
