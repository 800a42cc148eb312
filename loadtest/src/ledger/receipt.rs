//! Receipts come for those that asked, after delivery, to the tenant that sent.

use super::{Books, Verdict};

pub(super) fn judge(books: &Books, verdict: &mut Verdict) {
    for (name, op) in &books.ops {
        for (t, tenant) in &op.receipts {
            if !op.receipt {
                verdict.report("receipt", format!("op {name} asked for none and got one"));
            }
            if *tenant != op.tenant {
                verdict.report("receipt", format!("op {name} of {} was receipted to {tenant}", op.tenant));
            }
            if op.deliveries.first().is_none_or(|delivery| delivery.t > *t) {
                verdict.report("receipt", format!("op {name} was receipted before it arrived"));
            }
        }
        let arrived = op.confirmed_ack.is_some() && op.acked_at().is_some();
        if op.receipt && arrived && op.receipts.is_empty() && books.end.is_some() {
            verdict.report("receipt", format!("op {name} was delivered, acked and never receipted"));
        }
    }
}
