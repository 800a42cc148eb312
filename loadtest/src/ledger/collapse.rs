//! A collapsed message does not arrive after its successor was delivered, nor on a connection opened after the successor was
//! acked.

use super::{Books, Op, Terms, Verdict};

pub(super) fn judge(books: &Books, terms: &Terms, verdict: &mut Verdict) {
    for (name, op) in books.ops.iter().filter(|(_, op)| op.collapse_key.is_some() && !op.deliveries.is_empty()) {
        for (other, successor) in successors(books, op) {
            let first = successor.deliveries.first().map(|delivery| delivery.order);
            for delivery in &op.deliveries {
                if first.is_some_and(|first| delivery.order > first) {
                    verdict.report("collapsed", format!("op {name} arrived after its successor {other} was delivered"));
                }
                let opened = books.connections.get(&delivery.device).and_then(|all| {
                    all.iter()
                        .rev()
                        .find(|c| c.from <= delivery.t && (delivery.session.is_none() || c.session == delivery.session))
                });
                if let (Some(connection), Some(acked)) = (opened, successor.acked_at())
                    && connection.from > acked + terms.slack_secs
                {
                    verdict.report(
                        "collapsed",
                        format!("op {name} arrived on a connection opened after {other} was acked"),
                    );
                }
            }
        }
    }
}

/// Acked messages of the same token, tenant and collapse key that were sent after `op` had been acked.
pub(super) fn successors<'a>(books: &'a Books, op: &'a Op) -> impl Iterator<Item = (&'a String, &'a Op)> {
    books.ops.iter().filter(move |(_, other)| {
        other.token == op.token
            && other.tenant == op.tenant
            && other.collapse_key == op.collapse_key
            && other.acked_at().is_some()
            && op.acked_at().is_some_and(|acked| acked < other.invoked)
    })
}
