//! Nothing acked is lost, unless time to live, collapse key, the limit, unregistration or recall explains it; and what the
//! server itself says of a dropped message is true.

use super::{Books, Op, Terms, Verdict};
use crate::history::DropReason;

pub(super) fn judge(books: &Books, terms: &Terms, verdict: &mut Verdict) {
    for (name, op) in &books.ops {
        if let Some(reason) = op.dropped
            && !explains(books, op, reason, terms)
        {
            verdict.report("drop reason", format!("op {name} was dropped as {reason:?}, which is not so"));
        }
        let (Some(acked), Some(_)) = (op.acked_at(), books.end) else { continue };
        if !op.deliveries.is_empty() {
            continue;
        }
        use DropReason::{Collapse, Limit, Recall, Ttl, Unregister};
        match [Ttl, Collapse, Unregister, Limit].into_iter().find(|&reason| explains(books, op, reason, terms)) {
            Some(Limit) => verdict.dropped_by_limit += 1,
            Some(_) => {}
            None if op.dropped == Some(Recall) => {}
            None => {
                verdict.lost += 1;
                verdict.lost_ops.push(name.clone());
                verdict.report("lost", format!("op {name}, acked at {acked:.3} s, never arrived"));
            }
        }
    }
}

/// Whether `reason` can be why `op` did not arrive.
fn explains(books: &Books, op: &Op, reason: DropReason, terms: &Terms) -> bool {
    let device = books.registrations.get(&op.token).map(|registration| &registration.device);
    match reason {
        DropReason::Ttl => op.ttl.is_some_and(|ttl| {
            // Now or never; or it ran out before the device had been on line long enough.
            ttl == 0.0 || {
                let (from, to) = (op.invoked, op.accepted_by() + ttl);
                let on_line = device.and_then(|device| books.connections.get(device));
                to < books.end.unwrap_or(f64::INFINITY)
                    && !on_line
                        .is_some_and(|all| all.iter().any(|c| c.to.min(to) - c.from.max(from) >= terms.settle_secs))
            }
        }),
        DropReason::Collapse => op.collapse_key.is_some() && super::collapse::successors(books, op).next().is_some(),
        DropReason::Unregister => {
            books.registrations.get(&op.token).is_some_and(|registration| registration.unregistered.is_some())
        }
        // A notice tells of what was sent before it, to its token where it names one.
        DropReason::Limit => device.and_then(|device| books.notices.get(device)).is_some_and(|notices| {
            notices
                .iter()
                .any(|notice| notice.t > op.invoked && notice.token.as_ref().is_none_or(|token| *token == op.token))
        }),
        // Only the operator knows.
        DropReason::Recall => true,
    }
}
