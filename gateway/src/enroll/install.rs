//! `/v1/projects/{project}/installations`: a Firebase installation.
//!
//! Stores nothing: the tokens are MACs over project, installation and expiry. `{project}` is a project's number or text id; the
//! sender id goes into the MAC, so both spellings make the same installation.

use std::net::IpAddr;

use hyper::{StatusCode, body::Incoming};
use martlet_proto::{http::firebase as codec, limits::INSTALLATION_MAX_BYTES};

use crate::{
    admit::Purpose,
    http::{Answer, Http},
};

/// Answers one installation.
pub(crate) async fn install(http: &Http, project: &str, body: Incoming, peer: IpAddr) -> Answer {
    let retry_after = http.config.retry_after_secs;
    if !http.admit.admits(Purpose::Registration, peer) {
        return error(StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE", "too many requests").retry_after(retry_after);
    }
    let body = match http.device_room.read(body, INSTALLATION_MAX_BYTES).await {
        Ok(body) => body,
        Err(answer) => return answer,
    };
    let Ok(facts) = http.route.facts() else {
        return error(StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE", "try again later").retry_after(retry_after);
    };
    let Some(sender) = facts.project(project) else {
        return error(StatusCode::NOT_FOUND, "NOT_FOUND", "no such project");
    };
    let installation = match http.entropy.draw(|rng| codec::parse(&body.bytes, rng)) {
        Ok(installation) => installation,
        Err(bad) => return error(StatusCode::BAD_REQUEST, "INVALID_ARGUMENT", &bad.0),
    };
    let life_secs = http.enroll.installation_secs;
    let expires_ms = http.clock.wall_ms().saturating_add(life_secs.saturating_mul(1000));
    let key = facts.installation_key();
    Answer::ok_json(codec::answer(key, sender.as_str(), &installation.fid, expires_ms, life_secs))
}

/// The form of errors that Firebase clients read.
fn error(status: StatusCode, name: &str, message: &str) -> Answer {
    let body = serde_json::json!({"error": {"code": status.as_u16(), "message": message, "status": name}});
    Answer::json(status, body.to_string())
}
