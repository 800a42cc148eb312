//! Mailbox order: per token and priority, messages whose sends do not overlap in time arrive first in that order.
//! Collapsible messages and those with TTL 0 are excepted.

use std::collections::BTreeMap;

use super::{Books, Op, Verdict};

pub(super) fn judge(books: &Books, verdict: &mut Verdict) {
    let mut queues: BTreeMap<(&str, &str), Vec<(&str, &Op)>> = BTreeMap::new();
    for (name, op) in &books.ops {
        if op.collapse_key.is_none() && op.ttl != Some(0.0) && !op.deliveries.is_empty() {
            let priority = op.priority.as_deref().unwrap_or("normal");
            queues.entry((&op.token, priority)).or_default().push((name, op));
        }
    }
    for queue in queues.values_mut() {
        queue.sort_by_key(|(_, op)| op.deliveries.first().map(|delivery| delivery.order));
        // Backwards: the op that was acked first among those that arrived later.
        let mut earliest: Option<(f64, &str)> = None;
        for (name, op) in queue.iter().rev() {
            if let Some((acked, other)) = earliest
                && acked < op.invoked
            {
                verdict.report(
                    "order",
                    format!("op {name} arrived before op {other}, which was acked before it was sent"),
                );
            }
            if let Some(acked) = op.acked_at()
                && earliest.is_none_or(|(first, _)| acked < first)
            {
                earliest = Some((acked, name));
            }
        }
    }
}
