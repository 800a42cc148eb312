//! What became of every message, by the kind of fault under which it was sent: the table at the end, and its JSON.
//!
//! A pure function of the history and of the ledger's verdict. Time is cut at the beginnings of the rounds; a message belongs to
//! the round in which its outcome came, a silence to the round in which it ended.

use std::collections::{BTreeMap, BTreeSet};

use comfy_table::{Table, presets::UTF8_BORDERS_ONLY};
use serde::Serialize;

use super::{able::Skip, plan::Kind};
use crate::{
    history::{Event, Phase, What},
    ledger::{self, Terms, Verdict},
};

/// Begins the name of a fault that comes on top of another: it opens no row of its own.
pub(super) const ON_TOP: &str = "and ";

/// Violations that are shown; the rest is counted.
const VIOLATIONS_SHOWN: usize = 30;

/// Row of what was sent outside of all rounds.
const QUIET: &str = "(no fault)";

/// One row. Field names are keys of the JSON line: they stay.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Row {
    /// Kind of fault.
    pub kind: String,
    /// Rounds.
    pub rounds: usize,
    /// Messages acked to app servers.
    pub acked: usize,
    /// Messages that arrived.
    pub delivered: usize,
    /// Messages definitely refused.
    pub refused: usize,
    /// Messages acked, not arrived, and not explained.
    pub lost: usize,
    /// Arrivals beyond the first.
    pub duplicated: usize,
    /// Messages of unknown outcome.
    pub unknown: usize,
    /// Longest time between two acked sends, seconds.
    pub longest_silence_s: f64,
    /// Longest time from the end of a fault until every device was served again, seconds.
    pub longest_recovery_s: f64,
    /// Why it was left out, or struck nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// The command that would enable it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enable: Option<String>,
}

/// The figures of a run. Field names are the keys of the JSON line: they stay.
#[derive(Debug, Clone, Serialize)]
pub struct FaultReport {
    /// `faults`.
    pub scenario: &'static str,
    /// `kept` or `broken`.
    pub verdict: &'static str,
    /// Seed of the rounds.
    pub seed: u64,
    /// Nodes.
    pub nodes: usize,
    /// Shards.
    pub shards: u32,
    /// Devices.
    pub devices: usize,
    /// Length of the run, seconds.
    pub seconds: f64,
    /// Sums of the rows.
    #[serde(flatten)]
    pub total: Row,
    /// Messages that the limit of waiting messages explains.
    pub dropped_by_limit: usize,
    /// One for each kind, skipped ones included.
    pub kinds: Vec<Row>,
    /// Rules of the ledger that were broken, and findings about processes.
    pub violations: Vec<String>,
    /// Cores and processor.
    pub machine: String,
}

/// Judges a history: its rows (the total last) and the ledger's verdict.
#[must_use]
pub fn judge(events: &[Event], terms: &Terms) -> (Vec<Row>, Verdict) {
    let verdict = ledger::judge(events, terms);
    let rows = rows(events, &verdict.lost_ops.iter().map(String::as_str).collect());
    (rows, verdict)
}

#[derive(Default)]
struct Op {
    round: usize,
    acked: bool,
    refused: bool,
    arrivals: usize,
}

fn rows(events: &[Event], lost: &BTreeSet<&str>) -> Vec<Row> {
    // Round 0 is what was before the first and, under the same name, after the last.
    let mut rounds: Vec<(f64, &str)> = vec![(f64::NEG_INFINITY, QUIET)];
    let mut ops: BTreeMap<&str, Op> = BTreeMap::new();
    let mut by_message_id: BTreeMap<&str, &str> = BTreeMap::new();
    let mut silences: BTreeMap<&str, f64> = BTreeMap::new();
    let mut last_acked = None;
    for Event { t, what } in events {
        let now = rounds.len() - 1;
        match what {
            What::Fault { name, phase: Phase::Start } if !name.starts_with(ON_TOP) => {
                rounds.push((*t, name.split(' ').next().unwrap_or(name)));
            }
            What::SendInvoked { op, .. } => drop(ops.insert(op, Op { round: now, ..Op::default() })),
            What::SendAcked { op, message_id } => {
                if let Some(id) = message_id {
                    by_message_id.insert(id, op);
                }
                if let Some(op) = ops.get_mut(op.as_str()) {
                    (op.round, op.acked) = (now, true);
                }
                if let Some(before) = last_acked.replace(*t) {
                    let longest = silences.entry(rounds[now].1).or_default();
                    *longest = longest.max(t - before);
                }
            }
            What::SendFailed { op, .. } => {
                if let Some(op) = ops.get_mut(op.as_str()) {
                    (op.round, op.refused) = (now, true);
                }
            }
            What::SendUnknown { op, .. } => {
                if let Some(op) = ops.get_mut(op.as_str()) {
                    op.round = now;
                }
            }
            What::Delivered { op, message_id, .. } => {
                let named = op.as_deref().or_else(|| by_message_id.get(message_id.as_deref()?).copied());
                if let Some(op) = named.and_then(|name| ops.get_mut(name)) {
                    op.arrivals += 1;
                }
            }
            _ => {}
        }
    }
    let mut rows: BTreeMap<&str, Row> = BTreeMap::new();
    for (_, kind) in &rounds {
        let row = rows.entry(kind).or_default();
        row.kind = (*kind).to_owned();
        row.rounds += usize::from(*kind != QUIET);
        row.longest_silence_s = silences.get(kind).copied().unwrap_or_default();
    }
    for (name, op) in &ops {
        let Some(row) = rows.get_mut(rounds[op.round].1) else { continue };
        row.acked += usize::from(op.acked);
        row.refused += usize::from(op.refused);
        row.unknown += usize::from(!op.acked && !op.refused);
        row.delivered += usize::from(op.arrivals > 0);
        row.duplicated += op.arrivals.saturating_sub(1);
        row.lost += usize::from(lost.contains(name));
    }
    let place = |row: &Row| Kind::ALL.iter().position(|kind| kind.name() == row.kind).unwrap_or(usize::MAX);
    let mut rows: Vec<Row> = rows.into_values().collect();
    rows.sort_by_key(place);
    rows
}

/// The sum of rows.
#[must_use]
pub fn total(rows: &[Row]) -> Row {
    rows.iter().fold(Row { kind: "all".to_owned(), ..Row::default() }, |sum, row| Row {
        kind: sum.kind,
        rounds: sum.rounds + row.rounds,
        acked: sum.acked + row.acked,
        delivered: sum.delivered + row.delivered,
        refused: sum.refused + row.refused,
        lost: sum.lost + row.lost,
        duplicated: sum.duplicated + row.duplicated,
        unknown: sum.unknown + row.unknown,
        longest_silence_s: sum.longest_silence_s.max(row.longest_silence_s),
        longest_recovery_s: sum.longest_recovery_s.max(row.longest_recovery_s),
        skipped: None,
        enable: None,
    })
}

impl FaultReport {
    /// Adds a row for each kind that was left out.
    pub(super) fn skip(&mut self, skipped: &[Skip]) {
        self.kinds.extend(skipped.iter().map(|skip| Row {
            kind: skip.kind.name().to_owned(),
            skipped: Some(skip.reason.clone()),
            enable: Some(skip.enable.to_owned()),
            ..Row::default()
        }));
    }

    /// Takes over findings and what the ledger says; broken when there is anything.
    pub fn judged(&mut self, verdict: &Verdict, findings: &[String]) {
        self.dropped_by_limit = verdict.dropped_by_limit;
        let all = verdict.violations.len() + findings.len();
        self.verdict = if all == 0 { "kept" } else { "broken" };
        let violations = verdict.violations.iter().map(ToString::to_string);
        self.violations = findings.iter().cloned().chain(violations).take(VIOLATIONS_SHOWN).collect();
        if all > VIOLATIONS_SHOWN {
            self.violations.push(format!("and {} more", all - VIOLATIONS_SHOWN));
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
        table.set_header([
            "fault",
            "rounds",
            "acked",
            "delivered",
            "lost",
            "duplicated",
            "unknown",
            "refused",
            "longest silence s",
            "recovered s",
        ]);
        for row in self.kinds.iter().chain([&self.total]) {
            match (&row.skipped, row.rounds) {
                (Some(_), 0) => table.add_row([row.kind.clone(), "SKIPPED".to_owned()]),
                _ => table.add_row([
                    row.kind.clone(),
                    row.rounds.to_string(),
                    row.acked.to_string(),
                    row.delivered.to_string(),
                    row.lost.to_string(),
                    row.duplicated.to_string(),
                    row.unknown.to_string(),
                    row.refused.to_string(),
                    format!("{:.1}", row.longest_silence_s),
                    format!("{:.1}", row.longest_recovery_s),
                ]),
            };
        }
        let mut text = table.to_string();
        for row in &self.kinds {
            if let Some(reason) = &row.skipped {
                text.push_str(&format!("\nSKIPPED {}: {reason}", row.kind));
            }
            if let Some(enable) = &row.enable {
                text.push_str(&format!("; enable it with: {enable}"));
            }
        }
        text.push_str(&format!(
            "\nseed {}, {:.0} s, {} nodes, {} shards, {} devices, {} messages dropped by the limit; {}",
            self.seed, self.seconds, self.nodes, self.shards, self.devices, self.dropped_by_limit, self.machine
        ));
        text.push_str(&format!("\nverdict: {}", self.verdict));
        self.violations.iter().for_each(|violation| text.push_str(&format!("\n  {violation}")));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two rounds; a message acked before the first, one acked and one unknown in it, one refused in the second.
    const RIGHT: &str = r#"
        {"t":0,"type":"register","token":"ta","device":"a","tenant":"p"}
        {"t":0.5,"type":"connected","device":"a","session":"a1"}
        {"t":1.0,"type":"send-invoked","op":"1","token":"ta","tenant":"p"}
        {"t":1.1,"type":"send-acked","op":"1","message_id":"m1"}
        {"t":1.2,"type":"delivered","device":"a","op":"1","session":"a1"}
        {"t":2.0,"type":"fault","name":"kill-leader node-2","phase":"start"}
        {"t":2.1,"type":"send-invoked","op":"2","token":"ta","tenant":"p"}
        {"t":2.2,"type":"fault","name":"and kill-gateway gateway","phase":"start"}
        {"t":2.3,"type":"send-unknown","op":"2","error":"broken"}
        {"t":2.4,"type":"fault","name":"and kill-gateway gateway","phase":"end"}
        {"t":4.0,"type":"send-invoked","op":"3","token":"ta","tenant":"p"}
        {"t":4.1,"type":"send-acked","op":"3","message_id":"m3"}
        {"t":4.2,"type":"fault","name":"kill-leader node-2","phase":"end"}
        {"t":4.3,"type":"delivered","device":"a","message_id":"m3","session":"a1"}
        {"t":4.4,"type":"delivered","device":"a","op":"3","session":"a1"}
        {"t":5.0,"type":"fault","name":"flip-log node-1","phase":"start"}
        {"t":5.1,"type":"send-invoked","op":"4","token":"ta","tenant":"p"}
        {"t":5.2,"type":"send-failed","op":"4","error":"Unavailable"}
        {"t":6.0,"type":"fault","name":"flip-log node-1","phase":"end"}
        {"t":90,"type":"end"}"#;

    fn history(text: &str) -> Vec<Event> {
        text.lines().filter(|line| !line.trim().is_empty()).map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn without(events: &[Event], op: &str) -> Vec<Event> {
        let gone = |event: &&Event| {
            !matches!(&event.what, What::Delivered { op: o, message_id: m, .. }
                if o.as_deref() == Some(op) || m.as_deref() == Some("m3") && op == "3")
        };
        events.iter().filter(gone).cloned().collect()
    }

    fn report(events: &[Event], terms: &Terms, findings: &[String]) -> FaultReport {
        let (kinds, verdict) = judge(events, terms);
        let mut report = FaultReport {
            scenario: "faults",
            verdict: "broken",
            seed: 1,
            nodes: 3,
            shards: 4,
            devices: 1,
            seconds: 90.0,
            total: total(&kinds),
            dropped_by_limit: 0,
            kinds,
            violations: Vec::new(),
            machine: "test".to_owned(),
        };
        report.judged(&verdict, findings);
        report
    }

    #[test]
    fn messages_belong_to_the_round_of_their_outcome_and_a_silence_to_the_round_in_which_it_ended() {
        let report = report(&history(RIGHT), &Terms::default(), &[]);
        assert_eq!(report.verdict, "kept", "{:?}", report.violations);
        let figures =
            |row: &Row| (row.rounds, row.acked, row.delivered, row.lost, row.duplicated, row.unknown, row.refused);
        let by_name = |name: &str| report.kinds.iter().find(|row| row.kind == name).unwrap();
        assert_eq!(figures(by_name("(no fault)")), (0, 1, 1, 0, 0, 0, 0));
        assert_eq!(figures(by_name("kill-leader")), (1, 1, 1, 0, 1, 1, 0));
        assert_eq!(figures(by_name("flip-log")), (1, 0, 0, 0, 0, 0, 1));
        assert!((by_name("kill-leader").longest_silence_s - 3.0).abs() < 1e-9);
        assert_eq!(figures(&report.total), (2, 2, 2, 0, 1, 1, 1));
    }

    #[test]
    fn a_history_with_one_message_less_is_broken_and_the_row_of_its_fault_says_lost() {
        let report = report(&without(&history(RIGHT), "3"), &Terms::default(), &[]);
        assert_eq!((report.verdict, report.total.lost), ("broken", 1));
        assert_eq!(report.kinds.iter().find(|row| row.lost == 1).unwrap().kind, "kill-leader");
    }

    #[test]
    fn a_refused_message_that_arrives_under_a_fault_breaks_the_run() {
        let mut events = history(RIGHT);
        let late = r#"{"t":5.5,"type":"delivered","device":"a","op":"4","session":"a1"}"#;
        events.insert(18, serde_json::from_str(late).unwrap());
        let report = report(&events, &Terms::default(), &[]);
        assert_eq!(report.verdict, "broken");
        assert!(report.violations[0].starts_with("refused and delivered"), "{:?}", report.violations);
    }

    #[test]
    fn a_finding_alone_and_a_run_without_unknown_outcomes_are_broken() {
        let finding = ["round 1: node-2 serves in silence".to_owned()];
        assert_eq!(report(&history(RIGHT), &Terms::default(), &finding).verdict, "broken");
        let events: Vec<Event> = history(RIGHT)
            .into_iter()
            .filter(|e| !matches!(&e.what, What::SendInvoked { op, .. } | What::SendUnknown { op, .. } if op == "2"))
            .collect();
        let terms = Terms { unknown_min: 1, ..Terms::default() };
        let report = report(&events, &terms, &[]);
        assert!(report.violations[0].starts_with("no run"), "{:?}", report.violations);
    }

    #[test]
    fn a_skipped_kind_is_in_table_and_json_with_its_reason_and_command() {
        let mut report = report(&history(RIGHT), &Terms::default(), &[]);
        let reason = "mount: only root can do that".to_owned();
        report.skip(&[Skip { kind: Kind::PowerLoss, reason, enable: "sudo it" }]);
        let table = report.table();
        assert!(table.contains("SKIPPED power-loss: mount: only root can do that; enable it with: sudo it"), "{table}");
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        let last = json["kinds"].as_array().unwrap().last().unwrap();
        assert_eq!((&last["kind"], &last["enable"]), (&"power-loss".into(), &"sudo it".into()));
        for key in ["scenario", "verdict", "seed", "rounds", "acked", "delivered", "lost", "duplicated", "unknown"] {
            assert!(!json[key].is_null(), "{key}");
        }
        assert!(json["longest_silence_s"].is_number());
    }
}
