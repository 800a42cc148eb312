//! Serves one HTTP/2 connection: the same answers as over HTTP/1.1, under bounds of its own.
//!
//! Owns what HTTP/2 adds to a connection: requests side by side, requests that are taken back, an end that is announced. What a
//! request means is the business of [`Http`]; frames, windows and header compression are the library's, which also ends a connection
//! that resets streams before they are looked at, or never stops to continue a head. On drain, and after `http.header_timeout` without
//! a request, GOAWAY says which requests are still answered. The tasks of requests belong to the listener's tracker.

use std::{
    future::Future,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode, body::Incoming, header::CONNECTION, server::conn::http2, service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Answer, Http};
use crate::metrics::Limit;

/// The name of the protocol in ALPN.
pub(crate) const ALPN: &[u8] = b"h2";

/// Bytes of bodies that a client may send before they are read, of one request and of all of a connection. Bodies are read at once;
/// this is what a slow reader would hold, not what a body may have.
const STREAM_WINDOW: u32 = 128 << 10;
const CONNECTION_WINDOW: u32 = 512 << 10;
/// Bytes of answers that wait for a client that does not read. Of a thousand results an answer is some 70 KiB.
const SEND_BYTES_MAX: usize = 128 << 10;
/// Streams reset before they were looked at, and streams that we reset for what the client did: beyond, the connection ends.
const PENDING_RESETS_MAX: usize = 20;
const OUR_RESETS_MAX: usize = 200;
/// Requests that a client may take back for each that it lets be answered, and at first: each has cost its parsing, and perhaps a call
/// to a node, so that a connection that does nothing else ends. A client whose patience ends takes back what is open, 100 by default.
const TAKEN_BACK_MAX: u32 = 300;
/// A ping goes to a connection with nothing to read for this long, and must be answered.
const PING_AFTER: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(15);
/// From our GOAWAY to the end of a connection without open requests.
const LINGER: Duration = Duration::from_secs(2);

/// Serves until the client or the connection ends, or `drain` fired and all open requests are answered.
pub(super) async fn serve(
    http: &Arc<Http>,
    stream: impl AsyncRead + AsyncWrite + Unpin,
    peer: SocketAddr,
    tasks: TaskTracker,
    drain: CancellationToken,
) {
    let standing = Arc::new(Shared::new(http.clock.now()));
    let service = service_fn(|request| {
        let (http, standing) = (Arc::clone(http), Arc::clone(&standing));
        async move {
            let open = Open::new(&http, &standing);
            let (answered, is_whole) = answer(&http, request, peer).await;
            if is_whole {
                open.answered();
            }
            Ok::<_, std::convert::Infallible>(answered)
        }
    });
    let config = &http.config;
    let mut builder = http2::Builder::new(Tasks(tasks));
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(config.http2_streams_max)
        .max_header_list_size(u32::try_from(config.header_bytes_max).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(PENDING_RESETS_MAX)
        .max_local_error_reset_streams(OUR_RESETS_MAX)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BYTES_MAX)
        .keep_alive_interval(PING_AFTER)
        .keep_alive_timeout(PING_TIMEOUT);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let mut look_at = http.clock.now() + config.header_timeout;
    let ended = loop {
        tokio::select! {
            ended = connection.as_mut() => break Some(ended),
            () = drain.cancelled() => {
                connection.as_mut().graceful_shutdown();
                // Requests that are open are answered; the gateway's own drain has an end.
                tokio::select! {
                    ended = connection.as_mut() => break Some(ended),
                    () = standing.nothing_is_open() => {}
                }
                break tokio::time::timeout(LINGER, connection.as_mut()).await.ok();
            }
            () = standing.abused.cancelled() => {
                http.metrics.limit(Limit::Resets);
                break None;
            }
            () = tokio::time::sleep_until(look_at.into()) => {
                let now = http.clock.now();
                look_at = standing.lock().idle_until(now, config.header_timeout);
                if look_at <= now {
                    http.metrics.limit(Limit::Slow);
                    connection.as_mut().graceful_shutdown();
                    break tokio::time::timeout(LINGER, connection.as_mut()).await.ok();
                }
            }
        }
    };
    if let Some(Err(error)) = ended {
        tracing::debug!(%peer, %error, "an HTTP/2 connection ended");
    }
}

/// The answer, and whether it is one to a whole request: a client that resets its request ends the body first.
async fn answer(http: &Http, request: Request<Incoming>, peer: SocketAddr) -> (Response<Full<Bytes>>, bool) {
    // Of their bytes the library takes care, and answers the same.
    if request.headers().len() > http.config.headers_max {
        http.metrics.limit(Limit::Head);
        let words = format!("more than {} header lines\n", http.config.headers_max);
        return (Answer::text(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, words).into_response(), true);
    }
    let mut response = http.answer(request, peer.ip()).await;
    // Part of the request is unread: that is the stream's matter here, not the connection's.
    let is_cut_short = response.headers_mut().remove(CONNECTION).is_some();
    let is_whole = !is_cut_short || response.status() != StatusCode::BAD_REQUEST;
    (response, is_whole)
}

/// What a connection has open, and how often its client took requests back.
#[derive(Debug, PartialEq, Eq)]
struct Standing {
    open: usize,
    idle_since: Instant,
    may_take_back: u32,
}

impl Standing {
    fn new(now: Instant) -> Self {
        Self { open: 0, idle_since: now, may_take_back: TAKEN_BACK_MAX }
    }

    fn answered(&mut self, now: Instant) {
        self.ended(now);
        self.may_take_back = (self.may_take_back + 1).min(TAKEN_BACK_MAX);
    }

    /// The client reset the request before it was answered; `false`: it does so too often.
    fn taken_back(&mut self, now: Instant) -> bool {
        self.ended(now);
        let left = self.may_take_back.checked_sub(1);
        self.may_take_back = left.unwrap_or(0);
        left.is_some()
    }

    /// When it will have been idle for so long, if nothing comes; not later than `now` when it has been.
    fn idle_until(&self, now: Instant, for_: Duration) -> Instant {
        if self.open > 0 { now + for_ } else { self.idle_since + for_ }
    }

    fn ended(&mut self, now: Instant) {
        self.open -= 1;
        self.idle_since = now;
    }
}

#[derive(Debug)]
struct Shared {
    standing: Mutex<Standing>,
    /// A request ended.
    ended: tokio::sync::Notify,
    /// The connection is to end.
    abused: CancellationToken,
}

impl Shared {
    fn new(now: Instant) -> Self {
        Self {
            standing: Mutex::new(Standing::new(now)),
            ended: tokio::sync::Notify::new(),
            abused: CancellationToken::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn nothing_is_open(&self) {
        while self.lock().open > 0 {
            self.ended.notified().await;
        }
    }
}

/// A request that is open; dropped without an answer it was taken back.
struct Open<'a> {
    http: &'a Http,
    shared: &'a Shared,
    is_answered: bool,
}

impl<'a> Open<'a> {
    fn new(http: &'a Http, shared: &'a Shared) -> Self {
        shared.lock().open += 1;
        Self { http, shared, is_answered: false }
    }

    fn answered(mut self) {
        self.is_answered = true;
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let now = self.http.clock.now();
        if self.is_answered {
            self.shared.lock().answered(now);
        } else if !self.shared.lock().taken_back(now) {
            self.shared.abused.cancel();
        }
        self.shared.ended.notify_one();
    }
}

/// Gives the tasks of requests an owner.
#[derive(Debug, Clone)]
struct Tasks(TaskTracker);

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "starting points for arithmetic")]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_connection_is_idle_from_its_last_answer_and_never_while_a_request_is_open() {
        let t0 = Instant::now();
        let mut standing = Standing::new(t0);
        assert_eq!(standing.idle_until(t0, MINUTE), t0 + MINUTE);
        standing.open = 2;
        standing.answered(t0 + MINUTE);
        assert_eq!(standing.idle_until(t0 + 5 * MINUTE, MINUTE), t0 + 6 * MINUTE, "one is open");
        standing.taken_back(t0 + 7 * MINUTE);
        assert_eq!(standing.idle_until(t0 + 9 * MINUTE, MINUTE), t0 + 8 * MINUTE, "it has been idle for two");
    }

    #[test]
    fn whoever_takes_back_more_than_is_answered_ends_and_others_do_not() {
        let t0 = Instant::now();
        let mut fair = Standing::new(t0);
        for _ in 0..10 * TAKEN_BACK_MAX {
            fair.open = 2;
            assert!(fair.taken_back(t0));
            fair.answered(t0);
        }
        let mut rapid = Standing::new(t0);
        rapid.open = usize::MAX;
        assert_eq!((0..).take_while(|_| rapid.taken_back(t0)).count(), TAKEN_BACK_MAX as usize);
    }
}
