use super::{StateError, draft::Draft, rows::Rows};
use martlet_proto::cluster::command::Expire;
pub(super) fn next_due_ms(_rows: &dyn Rows) -> Result<Option<u64>, StateError> {
    unimplemented!("skeleton")
}
pub(super) fn expire(_draft: &mut Draft<'_>, _expire: &Expire) -> Result<(), StateError> {
    unimplemented!("skeleton")
}
