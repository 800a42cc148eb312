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

pub(crate) const JSON: &str = "application/json; charset=UTF-8";
pub(crate) const TEXT: &str = "text/plain; charset=UTF-8";
const HTML: &str = "text/html; charset=UTF-8";
pub(crate) const PROTOBUF: &str = "application/x-protobuffer";

/// The page of a refused key. Clients look for the word in it. Source: gcm-http.md section 7.1.
const UNAUTHORIZED: &str = "<HTML>\n<HEAD>\n<TITLE>Unauthorized</TITLE>\n</HEAD>\n<BODY BGCOLOR=\"#FFFFFF\" \
                            TEXT=\"#000000\">\n<H1>Unauthorized</H1>\n<H2>Error 401</H2>\n</BODY>\n</HTML>\n";

/// Status, type, body, further headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    content_type: &'static str,
    pub(crate) body: Bytes,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Answer {
    pub(crate) fn new(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        Self { status, content_type, body: body.into(), headers: Vec::new() }
    }

    pub(crate) fn text(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self::new(status, TEXT, body)
    }

    pub(crate) fn ok_json(body: impl Into<Bytes>) -> Self {
        Self::new(StatusCode::OK, JSON, body)
    }

    /// The server key is missing, malformed, unknown or revoked.
    pub(crate) fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, HTML, UNAUTHORIZED)
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
