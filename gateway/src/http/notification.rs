//! `/gcm/notification` and `/fcm/notification`: device groups are made, changed and looked up.
//!
//! Owns the order of checks (the method, the key, the body, the header `project_id`, the form of the request; then the group) and the
//! table from what came of it to a status: all that an app server did wrong is a 400 with a JSON body, whose text clients compare.
//!
//! Source: gcm-http.md section 9.

use hyper::{Method, StatusCode, body::Incoming, header::AUTHORIZATION, http::request::Parts};
use martlet_proto::{
    group::NotificationKey,
    http::group::{self, GroupError, GroupRequest},
    limits::GROUP_BODY_MAX_BYTES,
    message::SenderId,
};

use super::{Answer, Http, send::server_key};
use crate::groups::{Groups, Trouble};

/// The sender id of the key. With an underscore: proxies that drop such names break it.
const PROJECT_ID: &str = "project_id";

/// Answers one request about a group.
pub(super) async fn notification(http: &Http, head: &Parts, body: Incoming) -> Answer {
    if head.method != Method::POST && head.method != Method::GET {
        return Answer::method_not_allowed("GET, POST");
    }
    let Some(key) = head.headers.get(AUTHORIZATION).and_then(server_key) else { return Answer::unauthorized() };
    let Ok(facts) = http.route.facts() else { return Answer::unavailable(http.config.retry_after_secs) };
    let Some(sender) = facts.sender_of(key) else { return Answer::unauthorized() };
    let body = match http.room.read(body, GROUP_BODY_MAX_BYTES).await {
        Ok(body) => body,
        Err(answer) => return answer,
    };
    if let Err(error) = of_sender(head, sender) {
        return bad_request(&error.to_string());
    }
    let groups = Groups { route: &http.route, facts: &facts, sender };
    let found = if head.method == Method::GET {
        match group::parse_query(head.uri.query().unwrap_or_default()) {
            Ok(name) => groups.look_up(&name).await,
            Err(bad) => return bad_request(&bad.0),
        }
    } else {
        match group::parse(&body.bytes) {
            Ok(GroupRequest::Create { name, registration_ids }) => groups.create(&name, &registration_ids).await,
            Ok(GroupRequest::Add(to)) => {
                groups.add(&to.notification_key, to.name.as_deref(), &to.registration_ids).await
            }
            Ok(GroupRequest::Remove(from)) => {
                groups.remove(&from.notification_key, from.name.as_deref(), &from.registration_ids).await
            }
            Err(bad) => return bad_request(&bad.0),
        }
    };
    answer(found, http.config.retry_after_secs)
}

fn of_sender(head: &Parts, sender: &SenderId) -> Result<(), GroupError> {
    let project = head.headers.get(PROJECT_ID).ok_or(GroupError::NoProjectId)?;
    let project = project.to_str().unwrap_or_default().trim();
    if project == sender.as_str() { Ok(()) } else { Err(GroupError::ForeignProjectId) }
}

fn answer(found: Result<NotificationKey, Trouble>, retry_after_secs: u32) -> Answer {
    match found {
        Ok(key) => Answer::ok_json(group::done(key.as_str())),
        Err(Trouble::Refused(error)) => bad_request(&error.to_string()),
        Err(Trouble::Unavailable) => Answer::unavailable(retry_after_secs),
        Err(Trouble::Unknown) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error\n"),
    }
}

fn bad_request(error: &str) -> Answer {
    Answer::json(StatusCode::BAD_REQUEST, group::refused(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_trouble_has_its_status_and_only_what_is_passing_says_when_to_come_back() {
        for error in GroupError::ALL {
            let answer = answer(Err(Trouble::Refused(error)), 5);
            assert_eq!(answer.status, 400);
            let json: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
            assert_eq!(json["error"], error.to_string());
        }
        for (trouble, status) in [(Trouble::Unavailable, 503), (Trouble::Unknown, 500)] {
            let response = answer(Err(trouble), 5).into_response();
            assert_eq!(response.status(), status);
            assert_eq!(response.headers().contains_key("retry-after"), status == 503);
        }
    }
}
