use super::{StateError, dedupe::OperationId, draft::Draft, rows::Rows};
use martlet_proto::{
    cluster::{
        command::{Limits, Stamped},
        queue::{Answer, Check, Enqueue},
    },
    message::Sequence,
};
pub(super) fn check(_rows: &dyn Rows, _now_ms: u64, _check: &Check) -> Result<Answer, StateError> {
    unimplemented!("skeleton")
}
pub(super) fn enqueue(
    _draft: &mut Draft<'_>,
    _sequence: Sequence,
    _id: OperationId,
    _stamped: &Stamped,
    _enqueue: &Enqueue,
    _limits: &Limits,
) -> Result<Answer, StateError> {
    unimplemented!("skeleton")
}
