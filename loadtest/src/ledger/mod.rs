//! The ledger: it reads a history and says whether the promises of design.md section 7 were kept.
//!
//! Owns the rules of the history format, one file per group of rules; each is a pure function of the [`Books`]. Trusts nobody:
//! what the server says of dropped messages is checked like the rest. A run that did less than it meant to is no run:
//! [`Terms`] make that a violation.

mod books;
mod collapse;
mod delivery;
mod loss;
mod order;
mod receipt;
mod upstream;

use std::fmt;

pub use books::{Books, Op, Outcome};

use crate::history::Event;

/// What a run must have reached to count, and how exact its clocks are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Terms {
    /// Sends acked at least.
    pub acked_min: usize,
    /// Ops delivered at least.
    pub delivered_min: usize,
    /// Sends of unknown outcome at least: a fault run without one proved nothing.
    pub unknown_min: usize,
    /// Seconds by which recorded times may differ from what happened.
    pub slack_secs: f64,
    /// Seconds on line after which a waiting message must have arrived.
    pub settle_secs: f64,
    /// Longest pause between two acked sends, seconds; none: not judged.
    pub gap_max_secs: Option<f64>,
}

impl Default for Terms {
    fn default() -> Self {
        Self { acked_min: 1, delivered_min: 1, unknown_min: 0, slack_secs: 2.0, settle_secs: 10.0, gap_max_secs: None }
    }
}

/// A promise that was not kept, with what shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which rule, in a few stable words.
    pub rule: &'static str,
    /// The op or device it happened to, and how.
    pub detail: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.detail)
    }
}

/// The judgement of one history.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Everything that was wrong; empty: the promises were kept.
    pub violations: Vec<Violation>,
    /// Sends acked.
    pub acked: usize,
    /// Sends definitely refused.
    pub failed: usize,
    /// Sends of unknown outcome.
    pub unknown: usize,
    /// Ops that reached their device.
    pub delivered: usize,
    /// Acked ops that did not arrive and that nothing explains.
    pub lost: usize,
    /// Their names.
    pub lost_ops: Vec<String>,
    /// Acked ops that did not arrive because the limit of stored messages was passed.
    pub dropped_by_limit: usize,
    /// Deliveries beyond the first of each op: allowed, and counted.
    pub duplicates: usize,
}

impl Verdict {
    /// Whether every promise was kept and the run did what it meant to.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.violations.is_empty()
    }

    fn report(&mut self, rule: &'static str, detail: String) {
        self.violations.push(Violation { rule, detail });
    }
}

/// Judges a history.
#[must_use]
pub fn judge(events: &[Event], terms: &Terms) -> Verdict {
    let mut verdict = Verdict::default();
    let books = Books::read(events, &mut verdict);
    delivery::judge(&books, terms, &mut verdict);
    loss::judge(&books, terms, &mut verdict);
    order::judge(&books, &mut verdict);
    collapse::judge(&books, terms, &mut verdict);
    receipt::judge(&books, &mut verdict);
    upstream::judge(&books, terms, &mut verdict);
    minimums(&books, terms, &mut verdict);
    verdict
}

fn minimums(books: &Books, terms: &Terms, verdict: &mut Verdict) {
    for (what, got, least) in [
        ("acked", verdict.acked, terms.acked_min),
        ("delivered", verdict.delivered, terms.delivered_min),
        ("unknown", verdict.unknown, terms.unknown_min),
    ] {
        if got < least {
            verdict.report("no run", format!("{got} sends {what}, at least {least} were meant"));
        }
    }
    if let Some(gap_max) = terms.gap_max_secs {
        let mut acked: Vec<f64> = books.ops.values().filter_map(Op::acked_at).collect();
        acked.sort_by(f64::total_cmp);
        for pair in acked.windows(2) {
            if pair[1] - pair[0] > gap_max {
                let (from, to) = (pair[0], pair[1]);
                verdict.report("availability", format!("nothing was acked from {from:.3} to {to:.3} s"));
            }
        }
    }
}

#[cfg(test)]
mod tests;
