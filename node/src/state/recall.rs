//! An operator takes messages back that were not acked yet.
//!
//! Owns which of a device's rows are meant: one message by its id, or what waits for a registration under a collapse key. A row that
//! was written already may have been shown; it is not written again. Counted `recalled`.

use martlet_proto::{
    cluster::queue::{Answer, Recall, Recalled, Refusal, answer::Kind, recall::What},
    message::MessageId,
    tag::DeviceTag,
    token::RegistrationId,
};

use super::{
    StateError,
    draft::{Draft, refused},
    mailbox, registry,
    story::End,
    warm::Brief,
};

/// Takes them out of the mailbox; how many there were.
pub(super) fn recall(draft: &mut Draft<'_>, recall: &Recall) -> Result<Answer, StateError> {
    let device = DeviceTag(recall.device_tag);
    let all = draft.warm.mailbox(&draft.rows, device)?;
    let meant: Vec<&Brief> = match &recall.what {
        Some(What::MessageId(id)) => {
            let Some(id) = MessageId::from_bytes(id) else { return Ok(refused(Refusal::Malformed)) };
            all.iter().filter(|brief| !brief.is_notice() && brief.message_id == id).collect()
        }
        Some(What::CollapseKey(of)) => {
            let id = RegistrationId::from_bytes(&of.registration_id).filter(|_| !of.collapse_key.is_empty());
            let Some(id) = id else { return Ok(refused(Refusal::Malformed)) };
            let now_ms = draft.now_ms();
            let find = |id| draft.warm.registration(&draft.rows, device, id);
            let id = match registry::current(find, now_ms, id)? {
                Ok(addressee) => addressee.registration.id,
                Err(refusal) => return Ok(refused(refusal)),
            };
            let is_meant =
                |brief: &&Brief| brief.registration == id && brief.collapse_key.as_deref() == Some(&*of.collapse_key);
            all.iter().filter(is_meant).collect()
        }
        None => return Ok(refused(Refusal::Malformed)),
    };
    let now_ms = draft.now_ms();
    let mut count = 0;
    for brief in meant.into_iter().filter(|brief| brief.is_alive(now_ms)) {
        mailbox::drop_row(draft, device, brief, End::Recalled)?;
        count += 1;
    }
    Ok(Answer { kind: Some(Kind::Recalled(Recalled { count })) })
}
