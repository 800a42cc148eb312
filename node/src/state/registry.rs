//! Which registrations a device has, and which of them a token means.
//!
//! Owns the registration rows and when they run out. Registrations that differ in the Instance ID alone (of the legacy form:
//! also in the sender set) are one *line*; a line has one current registration, the one registered last, and the others
//! point straight at it: they still work for 30 days, and answer which is canonical. A registration that goes takes with it
//! those that point at it, and what waits for any of them.
//!
//! Sources: device.md sections 3.2 and 4; gcm-http.md 6.7 to 6.9.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use martlet_proto::{
    cluster::{
        command::Limits,
        queue::{
            Answer, OneToken, Refusal, Register, Registered, RegistrationRef, Unregister, Unregistered, answer::Kind,
            unregister::What,
        },
    },
    limits::SENDERS_MAX,
    tag::DeviceTag,
    token::RegistrationId,
};

use super::{
    StateError, device,
    draft::{Draft, refused},
    effect::Effect,
    mailbox,
    rows::Rows,
    story::End,
    topic,
};
use crate::store::key::{self, registration::RegistrationRow};

/// A superseded registration works this long. Source: decisions.md, "canonical id".
pub(super) const SUPERSEDED_LIFE_MS: u64 = 30 * 24 * 60 * 60 * 1000;

/// Registrations read at a time.
const PAGE_ROWS: usize = 256;

/// A registration and its id.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Registration {
    pub(super) id: RegistrationId,
    pub(super) row: RegistrationRow,
}

/// Whom a token means.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Addressee {
    /// The current registration.
    pub(super) registration: Arc<Registration>,
    /// Whether the token's own was superseded by it.
    pub(super) superseded: bool,
}

impl Addressee {
    /// What the answer says of it: the registration to use from now on, if that is another.
    pub(super) fn canonical(&self) -> Option<RegistrationRef> {
        self.superseded.then(|| reference(&self.registration))
    }
}

/// Whom registration `id` means and whether `sender` may send to it, an application restricted to `package` (empty: any).
/// `find` reads a registration of the device.
pub(super) fn addressee(
    find: impl FnMut(RegistrationId) -> Result<Option<Arc<Registration>>, StateError>,
    now_ms: u64,
    id: RegistrationId,
    sender: &str,
    package: &str,
) -> Result<Result<Addressee, Refusal>, StateError> {
    let addressee = match current(find, now_ms, id)? {
        Ok(addressee) => addressee,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let row = &addressee.registration.row;
    if !row.senders.iter().any(|allowed| allowed == sender) {
        return Ok(Err(Refusal::MismatchSenderId));
    }
    if !package.is_empty() && package != row.application {
        return Ok(Err(Refusal::InvalidPackageName));
    }
    Ok(Ok(addressee))
}

/// Whom registration `id` means, whoever asks.
pub(super) fn current(
    mut find: impl FnMut(RegistrationId) -> Result<Option<Arc<Registration>>, StateError>,
    now_ms: u64,
    id: RegistrationId,
) -> Result<Result<Addressee, Refusal>, StateError> {
    let mut live = |id| find(id).map(|found| found.filter(|found| is_live(&found.row, now_ms)));
    let Some(addressed) = live(id)? else { return Ok(Err(Refusal::NotRegistered)) };
    let superseded = !is_current(&addressed.row);
    let registration = if superseded {
        let successor = RegistrationId::from_bytes(&addressed.row.superseded_by);
        let successor = successor.ok_or(StateError::Broken("a registration is superseded by no registration"))?;
        match live(successor)? {
            Some(registration) if is_current(&registration.row) => registration,
            Some(_) => return Err(StateError::Broken("a superseded registration points at another")),
            None => return Ok(Err(Refusal::NotRegistered)),
        }
    } else {
        addressed
    };
    Ok(Ok(Addressee { registration, superseded }))
}

/// Registers, or finds the registration there is.
pub(super) fn register(draft: &mut Draft<'_>, register: &Register, limits: &Limits) -> Result<Answer, StateError> {
    let Some(id) = RegistrationId::from_bytes(&register.registration_id).filter(|_| well_formed(register)) else {
        return Ok(refused(Refusal::Malformed));
    };
    let device = DeviceTag(register.device_tag);
    let now_ms = draft.now_ms();
    let all = of_device(&draft.rows, device)?;
    let line: Vec<&Registration> =
        all.iter().filter(|one| is_live(&one.row, now_ms) && of_line(&one.row, register)).collect();
    let same = |one: &&&Registration| {
        one.row.senders == register.senders
            && (one.row.iid == register.iid || (one.row.iid_invented && register.iid_invented))
    };
    // Of several superseded ones that fit (a legacy client that changed its senders to and fro) the youngest.
    let found = line.iter().filter(same).max_by_key(|one| (is_current(&one.row), one.row.created_ms, one.id));
    let expires_ms = match register.ttl_secs {
        0 => 0,
        ttl_secs => now_ms.saturating_add(ttl_secs.saturating_mul(1000)),
    };

    let (current, before) = match found {
        Some(found) => {
            let row = RegistrationRow {
                expires_ms,
                app_version: register.app_version.clone(),
                superseded_by: Bytes::new(),
                superseded_ms: 0,
                ..found.row.clone()
            };
            (Registration { id: found.id, row }, Some(&found.row))
        }
        None => {
            if all.iter().any(|one| one.id == id) {
                return Ok(refused(Refusal::Malformed));
            }
            let others = all
                .iter()
                .filter(|one| is_live(&one.row, now_ms) && is_current(&one.row) && !of_line(&one.row, register));
            if others.count() >= limits.registrations_max as usize {
                return Ok(refused(Refusal::TooManyRegistrations));
            }
            (Registration { id, row: new_row(register, now_ms, expires_ms) }, None)
        }
    };
    save(draft, device, current.id, before, &current.row);
    for older in line.iter().filter(|one| one.id != current.id) {
        supersede(draft, device, older, current.id);
    }
    bound_superseded(draft, device, limits.registrations_max as usize)?;
    device::seen_now(draft, device)?;
    let registered = Registered { registration: Some(reference(&current)), created: before.is_none() };
    Ok(Answer { kind: Some(Kind::Registered(registered)) })
}

/// Ends registrations: all of an application, one token, or all of an Instance ID.
pub(super) fn unregister(draft: &mut Draft<'_>, unregister: &Unregister) -> Result<Answer, StateError> {
    let device = DeviceTag(unregister.device_tag);
    let named: Box<dyn Fn(&RegistrationRow) -> bool + '_> = match &unregister.what {
        Some(What::WholeApplication(true)) => Box::new(|_| true),
        Some(What::OneToken(one)) => Box::new(move |row| is_token(row, one)),
        Some(What::InstanceId(iid)) if !iid.is_empty() => Box::new(move |row| row.iid == *iid),
        Some(What::WholeApplication(false) | What::InstanceId(_)) | None => return Ok(refused(Refusal::Malformed)),
    };
    let all = of_device(&draft.rows, device)?;
    let named = all.iter().filter(|one| one.row.application == unregister.application && named(&one.row));
    let victims = with_superseded(&all, named.map(|one| one.id).collect());
    let now_ms = draft.now_ms();
    let count = victims.iter().filter(|one| is_live(&one.row, now_ms)).count();
    bury(draft, device, &victims, usize::MAX)?;
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    Ok(Answer { kind: Some(Kind::Unregistered(Unregistered { count })) })
}

/// Ends a registration whose time has come, dropping at most `rows_max` messages. Returns how many rows went; when it is
/// `rows_max` the registration may be there still, with more to drop.
pub(super) fn lapse(
    draft: &mut Draft<'_>,
    (due_ms, device, id): (u64, DeviceTag, RegistrationId),
    rows_max: usize,
) -> Result<usize, StateError> {
    let all = of_device(&draft.rows, device)?;
    if !all.iter().any(|one| one.id == id) {
        if !topic::has_any(&draft.rows, (device, id))? {
            return Err(StateError::Broken("a registration that runs out is not there"));
        }
        // It went before, and left subscriptions behind.
        draft.rows.remove(key::lapse::key(due_ms, device, id));
        return topic::forget(draft, (device, id), rows_max.min(topic::FORGET_ROWS_MAX));
    }
    let victims = with_superseded(&all, BTreeSet::from([id]));
    bury(draft, device, &victims, rows_max)
}

/// Removes registrations and what waits for them. When more than `rows_max` rows would go, only as many messages go.
fn bury(
    draft: &mut Draft<'_>,
    device: DeviceTag,
    victims: &[Registration],
    rows_max: usize,
) -> Result<usize, StateError> {
    if victims.is_empty() {
        return Ok(0);
    }
    let ids: BTreeSet<RegistrationId> = victims.iter().map(|one| one.id).collect();
    let mut gone = 0;
    for brief in draft.warm.mailbox(&draft.rows, device)?.iter() {
        if ids.contains(&brief.registration) {
            if gone == rows_max {
                return Ok(gone);
            }
            mailbox::drop_row(draft, device, brief, End::Unregistered)?;
            gone += 1;
        }
    }
    draft.warm.registrations_changed(device);
    let mut forget_max = topic::FORGET_ROWS_MAX;
    for victim in victims {
        draft.rows.remove(key::registration::key(device, victim.id));
        if let Some(due_ms) = due_ms(&victim.row) {
            draft.rows.remove(key::lapse::key(due_ms, device, victim.id));
        }
        let forgotten = topic::forget(draft, (device, victim.id), forget_max)?;
        forget_max -= forgotten;
        draft.effects.push(Effect::RegistrationGone { device_tag: device, registration_id: victim.id });
        gone += 1 + forgotten;
    }
    Ok(gone)
}

/// Those of `all` that are `named`, and those that point at one of them.
fn with_superseded(all: &[Registration], named: BTreeSet<RegistrationId>) -> Vec<Registration> {
    let goes = |one: &&Registration| {
        let successor = RegistrationId::from_bytes(&one.row.superseded_by);
        named.contains(&one.id) || successor.is_some_and(|id| named.contains(&id))
    };
    all.iter().filter(goes).cloned().collect()
}

/// Points a registration at the current one of its line; since when it does counts from the first time.
fn supersede(draft: &mut Draft<'_>, device: DeviceTag, older: &Registration, by: RegistrationId) {
    let superseded_ms = if is_current(&older.row) { draft.now_ms() } else { older.row.superseded_ms };
    let superseded_by = Bytes::copy_from_slice(&by.0);
    let row = RegistrationRow { superseded_by, superseded_ms, ..older.row.clone() };
    save(draft, device, older.id, Some(&older.row), &row);
}

/// A device that registers anew all day must not grow for 30 days: past the limit its oldest superseded ones go.
fn bound_superseded(draft: &mut Draft<'_>, device: DeviceTag, max: usize) -> Result<(), StateError> {
    let mut superseded = of_device(&draft.rows, device)?;
    superseded.retain(|one| !is_current(&one.row));
    superseded.sort_by_key(|one| (one.row.superseded_ms, one.id));
    superseded.truncate(superseded.len().saturating_sub(max));
    bury(draft, device, &superseded, usize::MAX)?;
    Ok(())
}

fn well_formed(register: &Register) -> bool {
    let senders = &register.senders;
    !register.application.is_empty()
        && matches!(register.iid.len(), 11 | 22)
        && (1..=SENDERS_MAX).contains(&senders.len())
        && !senders.iter().any(String::is_empty)
        && senders.is_sorted_by(|a, b| a < b)
        && (register.scope.is_empty() || senders.len() == 1)
}

fn of_line(row: &RegistrationRow, register: &Register) -> bool {
    row.application == register.application
        && row.cert == register.cert
        && row.subtype == register.subtype
        && row.scope == register.scope
        && (row.scope.is_empty() || row.senders == register.senders)
}

/// A client that never named an Instance ID cannot name it now: its token is the one with an invented one.
fn is_token(row: &RegistrationRow, one: &OneToken) -> bool {
    let iid = if one.iid.is_empty() { row.iid_invented } else { row.iid == one.iid };
    iid && row.scope == one.scope && row.subtype == one.subtype && row.senders.contains(&one.sender)
}

fn new_row(register: &Register, created_ms: u64, expires_ms: u64) -> RegistrationRow {
    RegistrationRow {
        application: register.application.clone(),
        subtype: register.subtype.clone(),
        scope: register.scope.clone(),
        senders: register.senders.clone(),
        iid: register.iid.clone(),
        iid_invented: register.iid_invented,
        cert: register.cert.clone(),
        app_version: register.app_version.clone(),
        token_key_id: register.token_key_id,
        created_ms,
        expires_ms,
        superseded_by: Bytes::new(),
        superseded_ms: 0,
    }
}

fn reference(registration: &Registration) -> RegistrationRef {
    RegistrationRef {
        registration_id: Bytes::copy_from_slice(&registration.id.0),
        token_key_id: registration.row.token_key_id,
        iid: registration.row.iid.clone(),
    }
}

fn is_current(row: &RegistrationRow) -> bool {
    row.superseded_by.is_empty()
}

fn is_live(row: &RegistrationRow, now_ms: u64) -> bool {
    due_ms(row).is_none_or(|due_ms| now_ms < due_ms)
}

/// When a registration runs out: its own life, or that of the superseded.
fn due_ms(row: &RegistrationRow) -> Option<u64> {
    let own = (row.expires_ms > 0).then_some(row.expires_ms);
    let superseded = (!is_current(row)).then(|| row.superseded_ms.saturating_add(SUPERSEDED_LIFE_MS));
    own.into_iter().chain(superseded).min()
}

/// A registration, also a superseded one or one whose time has come.
pub(super) fn get(rows: &dyn Rows, device: DeviceTag, id: RegistrationId) -> Result<Option<Registration>, StateError> {
    let key = key::registration::key(device, id);
    let Some(value) = rows.get(&key)? else { return Ok(None) };
    Ok(Some(Registration { id, row: key::registration::decode(&key, value)? }))
}

/// All registrations of a device, also superseded ones and those whose time has come, by id.
fn of_device(rows: &dyn Rows, device: DeviceTag) -> Result<Vec<Registration>, StateError> {
    let (mut from, to) = key::registration::range(device);
    let mut all = Vec::new();
    loop {
        let page = rows.scan(&from, &to, PAGE_ROWS)?;
        let end = page.len() < PAGE_ROWS;
        for (key, value) in page {
            let (_, id) =
                key::registration::decode_key(&key).ok_or(StateError::Broken("a registration key is misshapen"))?;
            all.push(Registration { id, row: key::registration::decode(&key, value)? });
            from = [&key[..], &[0]].concat().into();
        }
        if end {
            return Ok(all);
        }
    }
}

fn save(
    draft: &mut Draft<'_>,
    device: DeviceTag,
    id: RegistrationId,
    before: Option<&RegistrationRow>,
    row: &RegistrationRow,
) {
    if before == Some(row) {
        return;
    }
    let (due_before, due_now) = (before.and_then(due_ms), due_ms(row));
    if due_before != due_now {
        if let Some(due_ms) = due_before {
            draft.rows.remove(key::lapse::key(due_ms, device, id));
        }
        if let Some(due_ms) = due_now {
            draft.rows.put(key::lapse::key(due_ms, device, id), Bytes::new());
        }
    }
    draft.warm.registrations_changed(device);
    draft.rows.put(key::registration::key(device, id), key::registration::encode(row));
}
