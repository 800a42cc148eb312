//! The same promises for upstream messages, and the windows of CCS connections.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Books, Outcome, Terms, Verdict,
    books::{CcsStep, UpDelivery},
};

/// Unacked upstream stanzas on one CCS connection. Source: gcm-xmpp.md, flow control.
const WINDOW_MAX: usize = 100;

pub(super) fn judge(books: &Books, terms: &Terms, verdict: &mut Verdict) {
    for (name, up) in &books.ups {
        if matches!(up.outcome, Some(Outcome::Failed(_))) && !up.deliveries.is_empty() {
            verdict
                .report("refused and delivered", format!("upstream op {name} was refused to its device and arrived"));
        }
        for UpDelivery { tenant, device, sha } in &up.deliveries {
            if *tenant != up.tenant {
                verdict.report("wrong tenant", format!("upstream op {name} of {} reached {tenant}", up.tenant));
            }
            if device.as_ref().is_some_and(|device| *device != up.device) {
                verdict.report("wrong device", format!("upstream op {name} is said to come from {device:?}"));
            }
            if up.sha.is_some() && sha.is_some() && *sha != up.sha {
                verdict.report("altered", format!("upstream op {name}: its digest is not the sender's"));
            }
        }
        if let (Some(Outcome::Acked(acked)), Some(end)) = (up.outcome, books.end)
            && up.deliveries.is_empty()
            && up.ttl.is_none_or(|ttl| acked + ttl + terms.slack_secs > end)
        {
            verdict.lost += 1;
            verdict.report("lost", format!("upstream op {name}, acked at {acked:.3} s, never reached {}", up.tenant));
        }
    }
    let mut windows: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (conn, step) in &books.ccs {
        let window = windows.entry(conn).or_default();
        match step {
            CcsStep::Up(op) => {
                window.insert(op);
                if window.len() > WINDOW_MAX {
                    verdict.report("window", format!("{} unacked upstream stanzas on {conn}", window.len()));
                }
            }
            CcsStep::UpAcked(op) => drop(window.remove(op.as_str())),
        }
    }
}
