//! `/checkin`: a device gets its identity, or has it confirmed.
//!
//! Stores nothing: the android id is random, the security token a MAC of it. A known pair gets exactly itself back, whichever
//! check-in key made it; Chromium takes a change as a fault.

use std::net::IpAddr;

use hyper::{
    HeaderMap, StatusCode,
    body::Incoming,
    header::{ACCEPT_ENCODING, CONTENT_ENCODING, HeaderName},
    http::request::Parts,
};
use martlet_proto::{
    http::checkin::{self as codec, Claimed},
    limits::CHECKIN_MAX_BYTES,
    tag::AndroidId,
};

use super::Foreign;
use crate::{
    admit::Purpose,
    http::{Answer, Http},
};

/// Answers one check-in.
pub(crate) async fn checkin(http: &Http, head: &Parts, body: Incoming, peer: IpAddr) -> Answer {
    let retry_after = http.config.retry_after_secs;
    if !http.admit.admits(Purpose::Checkin, peer) {
        return Answer::unavailable(retry_after);
    }
    let body = match http.device_room.read(body, CHECKIN_MAX_BYTES).await {
        Ok(body) => body,
        Err(answer) => return answer,
    };
    let gzipped = names_gzip(&head.headers, &CONTENT_ENCODING);
    let gzips = gzipped && names_gzip(&head.headers, &ACCEPT_ENCODING);
    let claimed = match codec::parse(&body.bytes, gzipped) {
        Ok(claimed) => claimed,
        Err(error) => return refused(StatusCode::BAD_REQUEST, &format!("{error}\n"), gzips),
    };
    let Ok(facts) = http.route.facts() else { return Answer::unavailable(retry_after) };
    let known = match claimed {
        Claimed::Known(id, token) => facts.authenticate(id, token).map(|_| (id, token)),
        Claimed::New | Claimed::Foreign => None,
    };
    let (id, token) = match (known, claimed, http.enroll.foreign) {
        (Some(pair), ..) => pair,
        (None, Claimed::New, _) | (None, _, Foreign::Adopt) => {
            let id = http.entropy.draw(AndroidId::draw);
            (id, facts.security_token(id))
        }
        (None, Claimed::Known(..) | Claimed::Foreign, Foreign::Refuse) => {
            return refused(StatusCode::UNAUTHORIZED, "the identity is not known here\n", gzips);
        }
    };
    let settings = http.enroll.settings.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let answer = codec::answer(id, token, http.clock.wall_ms(), settings);
    if gzips { Answer::ok_protobuf(codec::pack(&answer)).gzipped() } else { Answer::ok_protobuf(answer) }
}

/// microG unpacks every answer, errors too.
fn refused(status: StatusCode, text: &str, gzips: bool) -> Answer {
    if gzips {
        Answer::text(status, codec::pack(text.as_bytes())).gzipped()
    } else {
        Answer::text(status, text.to_owned())
    }
}

fn names_gzip(headers: &HeaderMap, name: &HeaderName) -> bool {
    let encodings = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    encodings
        .flat_map(|value| value.split(','))
        .any(|encoding| encoding.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("gzip"))
}
