//! What an HTTP request is answered, before it is bytes.
//!
//! Owns the rules that hold for every answer: a 200 is never empty (clients crash on that), `Retry-After` is a whole number of
//! seconds and stands on 5xx only (PyFCM repeats whatever carries it, and python-gcm sleeps until a date), everything has its
//! length.

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Response, StatusCode,
    header::{ALLOW, CONNECTION, CONTENT_ENCODING, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER},
};
use martlet_proto::http::reply::{HTML_TYPE, JSON_TYPE, TEXT_TYPE, UNAUTHORIZED_PAGE};

/// Media type of check-in answers.
const PROTOBUF: &str = "application/x-protobuffer";

/// Status, type, body, further headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    content_type: &'static str,
    pub(crate) body: Bytes,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Answer {
    fn new(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        Self { status, content_type, body: body.into(), headers: Vec::new() }
    }

    pub(crate) fn text(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self::new(status, TEXT_TYPE, body)
    }

    pub(crate) fn json(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self::new(status, JSON_TYPE, body)
    }

    pub(crate) fn ok_protobuf(body: impl Into<Bytes>) -> Self {
        Self::new(StatusCode::OK, PROTOBUF, body)
    }

    pub(crate) fn ok_json(body: impl Into<Bytes>) -> Self {
        Self::json(StatusCode::OK, body)
    }

    /// The server key is missing, malformed, unknown or revoked.
    pub(crate) fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, HTML_TYPE, UNAUTHORIZED_PAGE)
    }

    /// Nothing was accepted, and nothing will be.
    pub(crate) fn unavailable(retry_after_secs: u32) -> Self {
        Self::text(StatusCode::SERVICE_UNAVAILABLE, "Service Unavailable\n").retry_after(retry_after_secs)
    }

    pub(crate) fn not_found() -> Self {
        Self::text(StatusCode::NOT_FOUND, "Not Found\n")
    }

    pub(crate) fn method_not_allowed(allow: &'static str) -> Self {
        Self::text(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed\n").with(ALLOW, HeaderValue::from_static(allow))
    }

    /// Tells when to come back.
    pub(crate) fn retry_after(self, seconds: u32) -> Self {
        debug_assert!(self.status.is_server_error(), "clients repeat whatever carries Retry-After");
        self.with(RETRY_AFTER, HeaderValue::from(seconds.max(1)))
    }

    pub(crate) fn gzipped(self) -> Self {
        self.with(CONTENT_ENCODING, HeaderValue::from_static("gzip"))
    }

    /// The connection cannot go on: part of the request is unread.
    pub(crate) fn closing(self) -> Self {
        self.with(CONNECTION, HeaderValue::from_static("close"))
    }

    fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    pub(crate) fn into_response(self) -> Response<Full<Bytes>> {
        debug_assert!(self.status != StatusCode::OK || !self.body.is_empty(), "a 200 is never empty");
        let mut response = Response::new(Full::new(self.body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        headers.extend(self.headers);
        response
    }
}
