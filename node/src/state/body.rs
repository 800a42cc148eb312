//! Bodies: what the mailbox rows of one publish share, kept once.
//!
//! Owns the count of who holds a body; both go with the last hold. A row that names a body has neither payload nor `from` of its
//! own: whoever hands a row out puts them back ([`whole`]). The invariant: a stored row that names a body holds it.

use martlet_proto::cluster::queue;

use super::{StateError, draft::Draft, mailbox::MailboxRow, rows::Rows};
use crate::store::key::body::{self, BodyId, BodyRow};

/// Stores a body, held once.
pub(super) fn put(draft: &mut Draft<'_>, id: BodyId, row: &BodyRow) {
    draft.rows.put_fresh(body::key(id), body::encode(row));
    draft.rows.put_fresh(body::holds_key(id), body::encode_holds(1));
}

/// One more row holds it.
pub(super) fn hold(draft: &mut Draft<'_>, id: BodyId) -> Result<(), StateError> {
    let holds = holds(draft, id)?.checked_add(1).ok_or(StateError::Broken("a body is held too often"))?;
    draft.rows.put(body::holds_key(id), body::encode_holds(holds));
    Ok(())
}

/// One holds it no more.
pub(super) fn release(draft: &mut Draft<'_>, id: BodyId) -> Result<(), StateError> {
    match holds(draft, id)? {
        0 => return Err(StateError::Broken("a body is held by nobody")),
        1 => {
            draft.rows.remove(body::key(id));
            draft.rows.remove(body::holds_key(id));
        }
        holds => draft.rows.put(body::holds_key(id), body::encode_holds(holds - 1)),
    }
    Ok(())
}

fn holds(draft: &Draft<'_>, id: BodyId) -> Result<u32, StateError> {
    let key = body::holds_key(id);
    let value = draft.rows.get(&key)?.ok_or(StateError::Broken("a body that is held is not there"))?;
    Ok(body::decode_holds(&key, &value)?)
}

/// A body.
pub(super) fn get(rows: &dyn Rows, id: BodyId) -> Result<BodyRow, StateError> {
    let key = body::key(id);
    let value = rows.get(&key)?.ok_or(StateError::Broken("a body that is held is not there"))?;
    Ok(body::decode(&key, value)?)
}

/// The body that a stored row names.
pub(super) fn of(message: &queue::Message) -> Option<BodyId> {
    BodyId::from_bytes(&message.body_id)
}

/// The row as a device is to see it.
pub(super) fn whole(rows: &dyn Rows, mut row: MailboxRow) -> Result<MailboxRow, StateError> {
    if let Some(id) = of(&row.message) {
        let BodyRow { wire_from, payload } = get(rows, id)?;
        let message = queue::Message { wire_from, payload, body_id: bytes::Bytes::new(), ..row.message };
        row.message = message;
    }
    Ok(row)
}
