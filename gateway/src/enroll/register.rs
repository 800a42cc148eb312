//! `/c2dm/register3` and `/c2dm/register`: a client app gets its token, or gives it up.
//!
//! Owns the order of checks (device.md section 3.4): the identity, the device of the form, the form itself, the senders; then
//! the device's shard decides. The registration id is drawn here and used if the registration is new, so a repeated request
//! gets the token it has. An unknown outcome is an internal error; the client asks again, and that is harmless.

use std::net::IpAddr;

use bytes::Bytes;
use hyper::{
    StatusCode,
    body::Incoming,
    header::{AUTHORIZATION, USER_AGENT},
    http::request::Parts,
};
use martlet_proto::{
    cluster::queue::{
        self, OneToken, Operation, Refusal, Register, Subscribe, Unregister, Unsubscribe, answer, operation,
        unregister::What,
    },
    http::{
        aid_login,
        register::{self as codec, RegisterError, RegisterForm, RegisterOp, Registration, Subscription},
    },
    limits::FORM_MAX_BYTES,
    message::SenderId,
    tag::{AndroidId, DeviceTag},
    token::{Iid, RegistrationToken},
};

use crate::{
    admit::Purpose,
    downstream::{self, token_of},
    http::{Answer, Http},
    route::{Facts, Outcome},
};

/// Answers one registration, or the end of one.
pub(crate) async fn register(http: &Http, head: &Parts, body: Incoming, peer: IpAddr) -> Answer {
    let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let handset = codec::is_handset(text(USER_AGENT));
    if !http.admit.admits(Purpose::Registration, peer) {
        return refused(RegisterError::QuotaExceeded, handset, http.config.retry_after_secs);
    }
    let body = match http.device_room.read(body, FORM_MAX_BYTES).await {
        Ok(body) => body,
        Err(answer) => return answer,
    };
    match judged(http, text(AUTHORIZATION), &RegisterForm::parse(&body.bytes)).await {
        // No line feed: clients take everything behind the `=`.
        Ok(line) => Answer::text(StatusCode::OK, line),
        Err(error) => refused(error, handset, http.config.retry_after_secs),
    }
}

fn refused(error: RegisterError, handset: bool, retry_after_secs: u32) -> Answer {
    let status = StatusCode::from_u16(error.status(handset)).expect("the table holds statuses");
    let answer = Answer::text(status, error.body());
    if status == StatusCode::SERVICE_UNAVAILABLE { answer.retry_after(retry_after_secs) } else { answer }
}

async fn judged(http: &Http, authorization: &str, form: &RegisterForm) -> Result<String, RegisterError> {
    let (id, token) = aid_login::parse(authorization).ok_or(RegisterError::AuthenticationFailed)?;
    let facts = http.route.facts().map_err(|_| RegisterError::ServiceNotAvailable)?;
    let tag = facts.authenticate(id, token).ok_or(RegisterError::AuthenticationFailed)?;
    if form.device().parse::<AndroidId>() != Ok(id) {
        return Err(RegisterError::PhoneRegistrationError);
    }
    match form.operation()? {
        RegisterOp::Register(registration) => registered(http, &facts, tag, registration).await,
        RegisterOp::DeleteApplication { application } => {
            let line = codec::deleted(&application);
            unregistered(http, &facts, tag, application, What::WholeApplication(true)).await.map(|()| line)
        }
        RegisterOp::DeleteToken { application, iid, sender, scope, subtype } => {
            let line = codec::token(sender.as_str());
            let iid = iid.map_or_else(String::new, |iid| iid.as_str().to_owned());
            let what = What::OneToken(OneToken { iid, sender: sender.as_str().to_owned(), scope, subtype });
            unregistered(http, &facts, tag, application, what).await.map(|()| line)
        }
        RegisterOp::Subscribe(subscription) => subscribed(http, &facts, tag, subscription, true).await,
        RegisterOp::Unsubscribe(subscription) => subscribed(http, &facts, tag, subscription, false).await,
        RegisterOp::DeleteInstance { application, iid } => {
            let line = codec::token(&application);
            let what = What::InstanceId(iid.as_str().to_owned());
            unregistered(http, &facts, tag, application, what).await.map(|()| line)
        }
    }
}

async fn registered(http: &Http, facts: &Facts, tag: DeviceTag, wish: Registration) -> Result<String, RegisterError> {
    let acceptable = |sender: &SenderId| facts.knows(sender) || (sender.is_public_key() && http.enroll.accept_web_keys);
    if !wish.senders.iter().all(acceptable) {
        return Err(RegisterError::InvalidSender);
    }
    let key = facts.minting_key().ok_or(RegisterError::ServiceNotAvailable)?;
    let iid_invented = wish.iid.is_none();
    let drawn = http.entropy.draw(|rng| {
        let iid = wish.iid.unwrap_or_else(|| Iid::invent(rng));
        RegistrationToken::draw(key, &iid, tag, rng)
    });
    let kind = operation::Kind::Register(Register {
        device_tag: tag.0,
        registration_id: Bytes::copy_from_slice(&drawn.registration_id().0),
        token_key_id: key.id,
        application: wish.application,
        subtype: wish.subtype,
        scope: wish.scope,
        senders: wish.senders.iter().map(|sender| sender.as_str().to_owned()).collect(),
        iid: drawn.iid().as_str().to_owned(),
        iid_invented,
        cert: wish.cert,
        app_version: wish.app_version,
        ttl_secs: wish.ttl_secs,
    });
    match submitted(http, facts, tag, kind).await? {
        answer::Kind::Registered(queue::Registered { registration: Some(registration), .. }) => {
            // Without its key the token cannot be spelled yet; the same request later gets it.
            let token = token_of(&http.route, facts, tag, &registration).await;
            token.map(|token| codec::token(token.as_str())).ok_or(RegisterError::ServiceNotAvailable)
        }
        _ => Err(RegisterError::InternalServerError),
    }
}

async fn unregistered(
    http: &Http,
    facts: &Facts,
    tag: DeviceTag,
    application: String,
    what: What,
) -> Result<(), RegisterError> {
    let kind = operation::Kind::Unregister(Unregister { device_tag: tag.0, application, what: Some(what) });
    match submitted(http, facts, tag, kind).await? {
        answer::Kind::Unregistered(_) => Ok(()),
        _ => Err(RegisterError::InternalServerError),
    }
}

/// A token of the device that asks joins a topic of each of its senders, or leaves it. Answered by the token itself.
async fn subscribed(
    http: &Http,
    facts: &Facts,
    tag: DeviceTag,
    wish: Subscription,
    joins: bool,
) -> Result<String, RegisterError> {
    let token = match downstream::verified(&http.route, facts, &wish.token).await {
        Ok(token) if token.device_tag() == tag => token,
        Err(martlet_proto::refusal::Refusal::Unavailable) => return Err(RegisterError::ServiceNotAvailable),
        Ok(_) | Err(_) => return Err(RegisterError::InvalidSender),
    };
    let (device_tag, registration_id) = (tag.0, Bytes::copy_from_slice(&token.registration_id().0));
    let (sender, topic) = (String::new(), wish.topic);
    let kind = if joins {
        operation::Kind::Subscribe(Subscribe { device_tag, registration_id, sender, topic })
    } else {
        operation::Kind::Unsubscribe(Unsubscribe { device_tag, registration_id, sender, topic })
    };
    match submitted(http, facts, tag, kind).await? {
        answer::Kind::Subscribed(_) => Ok(codec::token(&wish.token)),
        _ => Err(RegisterError::InternalServerError),
    }
}

/// The shard's answer, unless it is a refusal.
async fn submitted(
    http: &Http,
    facts: &Facts,
    tag: DeviceTag,
    kind: operation::Kind,
) -> Result<answer::Kind, RegisterError> {
    let id = Bytes::copy_from_slice(&http.route.operation_id().to_bytes());
    let operation = Operation { id, first_try_ms: 0, kind: Some(kind) };
    let outcome = http.route.submit(vec![(facts.shard(tag), operation)]).await.pop();
    match outcome.expect("one operation has one outcome") {
        Outcome::Answered(answer::Kind::Refusal(refusal)) => {
            Err(meaning(Refusal::try_from(refusal).unwrap_or_default()))
        }
        Outcome::Answered(kind) => Ok(kind),
        Outcome::Unavailable => Err(RegisterError::ServiceNotAvailable),
        Outcome::Unknown => Err(RegisterError::InternalServerError),
    }
}

/// What a shard's refusal means to a device that registers.
fn meaning(refusal: Refusal) -> RegisterError {
    match refusal {
        Refusal::TooManyRegistrations => RegisterError::TooManyRegistrations,
        Refusal::TooManyTopics => RegisterError::TooManySubscribers,
        Refusal::QuotaExceeded => RegisterError::QuotaExceeded,
        Refusal::ExpiredOperation => RegisterError::ServiceNotAvailable,
        // Only of a token that subscribes: it is gone.
        Refusal::NotRegistered => RegisterError::InvalidSender,
        Refusal::MismatchSenderId
        | Refusal::InvalidPackageName
        | Refusal::GroupExists
        | Refusal::GroupNotFound
        | Refusal::GroupFull
        | Refusal::GroupNameMismatch
        | Refusal::NoValidMembers
        | Refusal::DeviceRateExceeded
        | Refusal::TopicsRateExceeded
        | Refusal::Malformed
        | Refusal::Unspecified => RegisterError::InternalServerError,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rg_20_core_every_refusal_of_a_shard_has_its_word_and_503_says_when_to_come_back() {
        for refusal in (0..100).filter_map(|number| Refusal::try_from(number).ok()) {
            let error = meaning(refusal);
            assert_ne!(error, RegisterError::AuthenticationFailed);
        }
        for error in RegisterError::ALL {
            let answer = refused(error, false, 5).into_response();
            assert_eq!(answer.headers().contains_key("retry-after"), answer.status() == 503, "{error}");
        }
        assert_eq!(meaning(Refusal::TooManyRegistrations), RegisterError::TooManyRegistrations);
    }
}
