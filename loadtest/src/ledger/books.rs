//! The books: a history sorted by op, token and device, so that each rule finds what it needs.
//!
//! Owns the reading of events and the faults of the history itself (an op twice, an outcome of nothing). Judges no promise.

use std::collections::BTreeMap;

use super::Verdict;
use crate::history::{DropReason, Event, What};

/// How a send ended, as its sender saw it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Outcome {
    /// Success, at this time.
    Acked(f64),
    /// A definite refusal.
    Failed(f64),
    /// It may have been stored.
    Unknown(f64),
}

/// One attempt to send one message to one token.
#[derive(Debug, Clone, Default)]
pub struct Op {
    /// Registration token it went to.
    pub token: String,
    /// Tenant that sent it.
    pub tenant: String,
    /// When the request left.
    pub invoked: f64,
    /// Time to live, seconds; none: four weeks.
    pub ttl: Option<f64>,
    /// Collapse key.
    pub collapse_key: Option<String>,
    /// Priority; none is `normal`.
    pub priority: Option<String>,
    /// Whether a receipt was asked for.
    pub receipt: bool,
    /// Digest of the payload.
    pub sha: Option<String>,
    /// How it ended; none: the recorder stopped first.
    pub outcome: Option<Outcome>,
    /// Message id that was told.
    pub message_id: Option<String>,
    /// Every arrival.
    pub deliveries: Vec<Delivery>,
    /// First confirmed ack.
    pub confirmed_ack: Option<f64>,
    /// What the server says became of it.
    pub dropped: Option<DropReason>,
    /// Receipts: time and tenant.
    pub receipts: Vec<(f64, String)>,
}

impl Op {
    /// When it was acked, if it was.
    #[must_use]
    pub fn acked_at(&self) -> Option<f64> {
        match self.outcome {
            Some(Outcome::Acked(t)) => Some(t),
            _ => None,
        }
    }

    /// Latest moment at which its time to live can have begun: infinite when nobody knows.
    pub(super) fn accepted_by(&self) -> f64 {
        self.acked_at().unwrap_or(f64::INFINITY)
    }
}

/// One arrival at a device.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// When.
    pub t: f64,
    /// Number of the event: orders arrivals of the same instant.
    pub order: usize,
    /// At which device.
    pub device: String,
    /// On which connection.
    pub session: Option<String>,
    /// What the device says of it.
    pub tenant: Option<String>,
    /// As above.
    pub app: Option<String>,
    /// As above.
    pub token: Option<String>,
    /// As above.
    pub sha: Option<String>,
}

/// A registration.
#[derive(Debug, Clone)]
pub struct Registration {
    /// Whose it is.
    pub device: String,
    /// For which tenant.
    pub tenant: String,
    /// Application, where told.
    pub app: Option<String>,
    /// When it was removed.
    pub unregistered: Option<f64>,
}

/// A stretch of time in which a device was on line.
#[derive(Debug, Clone)]
pub struct Connection {
    /// Login.
    pub from: f64,
    /// End; infinite while it lasts.
    pub to: f64,
    /// Its name, where told.
    pub session: Option<String>,
}

/// An upstream message.
#[derive(Debug, Clone, Default)]
pub struct UpOp {
    /// Device that sent it.
    pub device: String,
    /// Tenant it is for.
    pub tenant: String,
    /// When.
    pub invoked: f64,
    /// Time to live, seconds.
    pub ttl: Option<f64>,
    /// Digest.
    pub sha: Option<String>,
    /// How it ended at the device.
    pub outcome: Option<Outcome>,
    /// Every arrival at an app server.
    pub deliveries: Vec<UpDelivery>,
}

/// One arrival at an app server.
#[derive(Debug, Clone)]
pub struct UpDelivery {
    /// Tenant of the app server.
    pub tenant: String,
    /// Where it is said to come from.
    pub device: Option<String>,
    /// Digest.
    pub sha: Option<String>,
}

/// What a device was told of an overflow.
#[derive(Debug, Clone)]
pub struct Notice {
    /// When.
    pub t: f64,
    /// Of which registration, where told.
    pub token: Option<String>,
}

/// A history, sorted.
#[derive(Debug, Default)]
pub struct Books {
    /// Downstream ops by name.
    pub ops: BTreeMap<String, Op>,
    /// Registrations by token.
    pub registrations: BTreeMap<String, Registration>,
    /// Connections by device, in time.
    pub connections: BTreeMap<String, Vec<Connection>>,
    /// Notices by device.
    pub notices: BTreeMap<String, Vec<Notice>>,
    /// Upstream ops by name.
    pub ups: BTreeMap<String, UpOp>,
    /// What happened on CCS connections, in order: connection, what was handed over or acked.
    pub ccs: Vec<(String, CcsStep)>,
    /// When recording stopped on purpose; none: it was cut, and losses cannot be judged.
    pub end: Option<f64>,
}

/// One step in the windows of a CCS connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CcsStep {
    /// Upstream message handed over.
    Up(String),
    /// Upstream message acked.
    UpAcked(String),
}

impl Books {
    /// Sorts a history. Faults of the history itself go to the verdict.
    pub(super) fn read(events: &[Event], verdict: &mut Verdict) -> Self {
        let mut books = Self::default();
        let mut by_message_id = BTreeMap::new();
        for (order, event) in events.iter().enumerate() {
            books.enter(order, event, &mut by_message_id, verdict);
        }
        for op in books.ops.values() {
            match op.outcome {
                Some(Outcome::Acked(_)) => verdict.acked += 1,
                Some(Outcome::Failed(_)) => verdict.failed += 1,
                Some(Outcome::Unknown(_)) | None => verdict.unknown += 1,
            }
            verdict.delivered += usize::from(!op.deliveries.is_empty());
            verdict.duplicates += op.deliveries.len().saturating_sub(1);
        }
        if books.end.is_none() {
            verdict.report("history", "it has no `end`: whether something was lost cannot be judged".to_owned());
        }
        books
    }

    #[expect(clippy::too_many_lines, reason = "one arm an event; each is short")]
    fn enter(
        &mut self,
        order: usize,
        event: &Event,
        by_message_id: &mut BTreeMap<String, String>,
        verdict: &mut Verdict,
    ) {
        let t = event.t;
        let named = |op: &Option<String>, message_id: &Option<String>| -> Option<String> {
            op.clone().or_else(|| message_id.as_ref().and_then(|id| by_message_id.get(id).cloned()))
        };
        match &event.what {
            What::Register { token, device, tenant, app } => {
                let registration = Registration {
                    device: device.clone(),
                    tenant: tenant.clone(),
                    app: app.clone(),
                    unregistered: None,
                };
                if let Some(before) = self.registrations.get(token)
                    && (before.device != *device || before.tenant != *tenant)
                {
                    verdict.report("token", format!("{token} was given to {} and to {device}", before.device));
                }
                self.registrations.insert(token.clone(), registration);
            }
            What::Unregister { token } => {
                if let Some(registration) = self.registrations.get_mut(token) {
                    registration.unregistered = Some(t);
                }
            }
            What::Connected { device, session } => {
                let connection = Connection { from: t, to: f64::INFINITY, session: session.clone() };
                self.connections.entry(device.clone()).or_default().push(connection);
            }
            What::Disconnected { device, session } => {
                let open = self.connections.entry(device.clone()).or_default().iter_mut().rev();
                let mut ended = open.filter(|c| c.to.is_infinite() && (session.is_none() || c.session == *session));
                if let Some(connection) = ended.next() {
                    connection.to = t;
                }
            }
            What::SendInvoked { op, token, tenant, ttl, collapse_key, priority, receipt, sha } => {
                let new = Op {
                    token: token.clone(),
                    tenant: tenant.clone(),
                    invoked: t,
                    ttl: *ttl,
                    collapse_key: collapse_key.clone(),
                    priority: priority.clone(),
                    receipt: receipt.unwrap_or(false),
                    sha: sha.clone(),
                    ..Op::default()
                };
                if self.ops.insert(op.clone(), new).is_some() {
                    verdict.report("history", format!("op {op} was invoked twice"));
                }
            }
            What::SendAcked { op, message_id } => {
                if let Some(id) = message_id
                    && let Some(other) = by_message_id.insert(id.clone(), op.clone())
                {
                    verdict.report("message id", format!("{id} was told for {other} and for {op}"));
                }
                if let Some(known) = self.outcome(op, Outcome::Acked(t), verdict) {
                    known.message_id.clone_from(message_id);
                }
            }
            What::SendFailed { op, .. } => drop(self.outcome(op, Outcome::Failed(t), verdict)),
            What::SendUnknown { op, .. } => drop(self.outcome(op, Outcome::Unknown(t), verdict)),
            What::Delivered { device, op, message_id, tenant, app, token, session, sha } => {
                let delivery = Delivery {
                    t,
                    order,
                    device: device.clone(),
                    session: session.clone(),
                    tenant: tenant.clone(),
                    app: app.clone(),
                    token: token.clone(),
                    sha: sha.clone(),
                };
                match named(op, message_id).and_then(|name| self.ops.get_mut(&name)) {
                    Some(op) => op.deliveries.push(delivery),
                    None => {
                        verdict.report("never sent", format!("{device} got {op:?} {message_id:?}, which nobody sent"));
                    }
                }
            }
            What::DeviceAcked { op, message_id, confirmed, .. } => {
                if *confirmed == Some(true)
                    && let Some(op) = named(op, message_id).and_then(|name| self.ops.get_mut(&name))
                {
                    op.confirmed_ack.get_or_insert(t);
                }
            }
            What::DeletedMessages { device, token, .. } => {
                self.notices.entry(device.clone()).or_default().push(Notice { t, token: token.clone() });
            }
            What::Dropped { op, message_id, reason } => {
                match named(op, message_id).and_then(|name| self.ops.get_mut(&name)) {
                    Some(op) => op.dropped = Some(*reason),
                    None => verdict.report("drop reason", format!("{op:?} {message_id:?} was dropped and never sent")),
                }
            }
            What::ReceiptDelivered { op, message_id, tenant, .. } => {
                match named(op, message_id).and_then(|name| self.ops.get_mut(&name)) {
                    Some(op) => op.receipts.push((t, tenant.clone())),
                    None => {
                        verdict.report("receipt", format!("{tenant} got one for {op:?} {message_id:?}: never sent"))
                    }
                }
            }
            What::UpInvoked { op, device, tenant, ttl, sha } => {
                let new = UpOp {
                    device: device.clone(),
                    tenant: tenant.clone(),
                    invoked: t,
                    ttl: *ttl,
                    sha: sha.clone(),
                    ..UpOp::default()
                };
                if self.ups.insert(op.clone(), new).is_some() {
                    verdict.report("history", format!("upstream op {op} was invoked twice"));
                }
            }
            What::UpAcked { op } => self.up_outcome(op, Outcome::Acked(t), verdict),
            What::UpFailed { op } => self.up_outcome(op, Outcome::Failed(t), verdict),
            What::UpUnknown { op } => self.up_outcome(op, Outcome::Unknown(t), verdict),
            What::UpDelivered { op, tenant, conn, device, sha } => {
                self.ccs.push((conn.clone(), CcsStep::Up(op.clone())));
                match self.ups.get_mut(op) {
                    Some(up) => {
                        let delivery = UpDelivery { tenant: tenant.clone(), device: device.clone(), sha: sha.clone() };
                        up.deliveries.push(delivery);
                    }
                    None => verdict.report("never sent", format!("{tenant} got upstream {op}, which no device sent")),
                }
            }
            What::UpAckSent { op, conn, .. } => self.ccs.push((conn.clone(), CcsStep::UpAcked(op.clone()))),
            What::End {} => self.end = Some(t),
            What::CcsConnected { .. } | What::CcsDisconnected { .. } | What::Fault { .. } | What::Other => {}
        }
    }

    fn outcome(&mut self, name: &str, outcome: Outcome, verdict: &mut Verdict) -> Option<&mut Op> {
        let Some(op) = self.ops.get_mut(name) else {
            verdict.report("history", format!("op {name} ended and never began"));
            return None;
        };
        if op.outcome.replace(outcome).is_some() {
            verdict.report("history", format!("op {name} ended twice"));
        }
        Some(op)
    }

    fn up_outcome(&mut self, name: &str, outcome: Outcome, verdict: &mut Verdict) {
        match self.ups.get_mut(name) {
            Some(up) if up.outcome.is_none() => up.outcome = Some(outcome),
            Some(_) => verdict.report("history", format!("upstream op {name} ended twice")),
            None => verdict.report("history", format!("upstream op {name} ended and never began")),
        }
    }
}
