//! What operators and probes ask over HTTP: `/metrics`, `/startupz`, `/readyz`, `/livez`.
//!
//! Owns the listener on the admin address. A part of the process brings its instruments and says whether it is ready; this
//! module asks and prints. Liveness never depends on queues or quorum: a process that restarts for want of a quorum makes the
//! want worse.

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::{encoding::text, registry::Registry};
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Scrapers and probes at once; more wait in the kernel.
const CONNECTIONS_MAX: usize = 64;

/// Patience for a request's head, seconds.
const HEAD_TIMEOUT_SECS: u64 = 10;

/// Format of the answer to a scrape.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Whether a part of the process serves, or what it waits for.
pub(crate) type Check = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

/// What the endpoints tell.
pub(crate) struct Ops {
    /// Instruments of all parts.
    pub(crate) registry: Registry,
    /// Each must pass once for `/startupz` and always for `/readyz`.
    pub(crate) checks: Vec<(&'static str, Check)>,
    /// Fires when the process drains: not ready from then on.
    pub(crate) drain: CancellationToken,
}

/// Serves until `end` fires; connections are then cut, since a probe asks again.
///
/// # Errors
/// Never after the bind: a failed accept is tried again.
pub(crate) async fn serve(listener: TcpListener, ops: Arc<Ops>, end: CancellationToken) {
    let open = TaskTracker::new();
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let accept = async {
        loop {
            let slot = Arc::clone(&slots).acquire_owned().await.expect("the semaphore is never closed");
            let Ok((socket, _)) = listener.accept().await else {
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            };
            let ops = Arc::clone(&ops);
            let end = end.clone();
            open.spawn(async move {
                let _slot = slot;
                let service = service_fn(move |request| answer(Arc::clone(&ops), request));
                let connection = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(std::time::Duration::from_secs(HEAD_TIMEOUT_SECS))
                    .serve_connection(TokioIo::new(socket), service);
                // A probe that breaks off is nobody's trouble.
                tokio::select! { _ = connection => {}, () = end.cancelled() => {} }
            });
        }
    };
    tokio::select! { () = end.cancelled() => {}, () = accept => {} }
    open.close();
    open.wait().await;
}

/// Binds the admin address.
///
/// # Errors
/// Names the flag, so that a taken port is found at once.
pub(crate) async fn bind(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("bind --admin {address}"))
}

#[expect(clippy::unused_async, reason = "hyper wants a future")]
async fn answer(ops: Arc<Ops>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    Ok(respond(&ops, request.method(), request.uri().path()))
}

fn respond(ops: &Ops, method: &Method, path: &str) -> Response<Full<Bytes>> {
    if !["/metrics", "/startupz", "/readyz", "/livez"].contains(&path) {
        return plain(
            StatusCode::NOT_FOUND,
            "not found: there are /metrics, /startupz, /readyz and /livez\n".to_owned(),
        );
    }
    if method != Method::GET && method != Method::HEAD {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned());
        response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match path {
        "/metrics" => metrics(&ops.registry),
        "/livez" => plain(StatusCode::OK, "alive\n".to_owned()),
        "/startupz" => readiness(&ops.checks, false),
        _ => readiness(&ops.checks, ops.drain.is_cancelled()),
    }
}

fn metrics(registry: &Registry) -> Response<Full<Bytes>> {
    let mut body = String::new();
    if text::encode(&mut body, registry).is_err() {
        return plain(StatusCode::INTERNAL_SERVER_ERROR, "the instruments could not be encoded\n".to_owned());
    }
    let mut response = Response::new(Full::new(Bytes::from(body)));
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(OPENMETRICS));
    response
}

fn readiness(checks: &[(&'static str, Check)], draining: bool) -> Response<Full<Bytes>> {
    let mut body = String::new();
    let mut status = StatusCode::OK;
    if draining {
        status = StatusCode::SERVICE_UNAVAILABLE;
        body.push_str("draining\n");
    }
    for (name, check) in checks {
        match check() {
            Ok(()) => body.push_str(&format!("{name}: ready\n")),
            Err(why) => {
                status = StatusCode::SERVICE_UNAVAILABLE;
                body.push_str(&format!("{name}: {why}\n"));
            }
        }
    }
    plain(status, body)
}

fn plain(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ops(ready: bool) -> Ops {
        let check: Check = Box::new(move || if ready { Ok(()) } else { Err("waits for a leader".to_owned()) });
        Ops { registry: Registry::default(), checks: vec![("node", check)], drain: CancellationToken::new() }
    }

    #[test]
    fn a_process_that_waits_is_alive_and_not_ready() {
        let ops = ops(false);
        assert_eq!(respond(&ops, &Method::GET, "/livez").status(), StatusCode::OK);
        assert_eq!(respond(&ops, &Method::GET, "/startupz").status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(respond(&ops, &Method::GET, "/readyz").status(), StatusCode::SERVICE_UNAVAILABLE);
    }

    #[test]
    fn a_draining_process_is_started_and_not_ready() {
        let ops = ops(true);
        ops.drain.cancel();
        assert_eq!(respond(&ops, &Method::GET, "/startupz").status(), StatusCode::OK);
        assert_eq!(respond(&ops, &Method::GET, "/readyz").status(), StatusCode::SERVICE_UNAVAILABLE);
    }

    #[test]
    fn other_paths_and_methods_are_named_wrong() {
        let ops = ops(true);
        assert_eq!(respond(&ops, &Method::GET, "/").status(), StatusCode::NOT_FOUND);
        assert_eq!(respond(&ops, &Method::POST, "/metrics").status(), StatusCode::METHOD_NOT_ALLOWED);
    }
}
