//! What may arrive, where, and until when.
//!
//! Nothing that was refused; nothing at another device, tenant or application; nothing altered; nothing after its time to live,
//! after its registration ended, or after an ack that the server has confirmed.

use super::{Books, Op, Outcome, Terms, Verdict, books::Delivery};

/// Share of a time to live by which shard time may lag: design.md section 7, promise 3.
const TTL_DRIFT: f64 = 0.001;

pub(super) fn judge(books: &Books, terms: &Terms, verdict: &mut Verdict) {
    for (name, op) in &books.ops {
        if matches!(op.outcome, Some(Outcome::Failed(_))) && !op.deliveries.is_empty() {
            verdict.report("refused and delivered", format!("op {name} was refused to its sender and arrived"));
        }
        for delivery in &op.deliveries {
            if let Some((rule, why)) = wrong_place(books, op, delivery).or_else(|| too_late(books, op, delivery, terms))
            {
                verdict.report(rule, format!("op {name} at {} at {:.3} s: {why}", delivery.device, delivery.t));
            }
        }
    }
}

fn wrong_place(books: &Books, op: &Op, delivery: &Delivery) -> Option<(&'static str, String)> {
    let Some(registration) = books.registrations.get(&op.token) else {
        return Some(("never sent", "it was sent to a token that nobody registered".to_owned()));
    };
    if registration.device != delivery.device {
        return Some(("wrong device", format!("it was for {}", registration.device)));
    }
    let differs = |said: &Option<String>, meant: &str| said.as_ref().is_some_and(|said| said != meant);
    if differs(&delivery.tenant, &op.tenant) {
        return Some(("wrong tenant", format!("{} sent it", op.tenant)));
    }
    if registration.app.as_ref().is_some_and(|app| differs(&delivery.app, app)) {
        return Some(("wrong application", format!("it was for {:?}", registration.app)));
    }
    if differs(&delivery.token, &op.token) {
        return Some(("wrong token", "it was sent to another token of that device".to_owned()));
    }
    if op.sha.as_ref().is_some_and(|sha| differs(&delivery.sha, sha)) {
        return Some(("altered", "its digest is not the sender's".to_owned()));
    }
    None
}

fn too_late(books: &Books, op: &Op, delivery: &Delivery, terms: &Terms) -> Option<(&'static str, String)> {
    if let Some(ttl) = op.ttl {
        // A message of unknown outcome was accepted, if at all, we do not know when.
        let last = op.accepted_by() + ttl * (1.0 + TTL_DRIFT) + 1.0 + terms.slack_secs;
        if delivery.t > last {
            return Some(("after its time to live", format!("it ended at {last:.3} s")));
        }
    }
    let unregistered = books.registrations.get(&op.token).and_then(|registration| registration.unregistered);
    if let Some(end) = unregistered
        && delivery.t > end + terms.slack_secs
    {
        return Some(("after unregistration", format!("the registration ended at {end:.3} s")));
    }
    if let Some(ack) = op.confirmed_ack
        && delivery.t > ack
    {
        return Some(("after a confirmed ack", format!("the server confirmed the ack at {ack:.3} s")));
    }
    None
}
