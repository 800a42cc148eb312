use super::{StateError, draft::Draft};
use martlet_proto::cluster::{
    command::{Limits, Seen},
    queue::{Answer, Register, Unregister},
};
pub(super) fn register(_draft: &mut Draft<'_>, _register: &Register, _limits: &Limits) -> Result<Answer, StateError> {
    unimplemented!("skeleton")
}
pub(super) fn unregister(_draft: &mut Draft<'_>, _unregister: &Unregister) -> Result<Answer, StateError> {
    unimplemented!("skeleton")
}
pub(super) fn seen(_draft: &mut Draft<'_>, _seen: &Seen) -> Result<(), StateError> {
    unimplemented!("skeleton")
}
