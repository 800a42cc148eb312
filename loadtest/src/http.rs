//! An HTTP/1.1 client for app servers and enrolling devices, over connections that are kept.
//!
//! Owns the connections: whoever has an exchange to make takes one and drives it in its own task, so that an answer wakes nobody
//! but who asked; a pool with a task a connection took a fifth of the generator. A kept connection that the broker has closed
//! meanwhile is noticed when it is used again, before anything is written to it, and another takes its place. At most as many are
//! kept as were once in use together. Plain HTTP only: the generator measures the broker, and the published clients of the
//! end-to-end tests cover TLS.

use std::{
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Poll,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Method, Request, Uri,
    client::conn::http1::{self, SendRequest},
    header::{HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Largest answer that is read, bytes: a multicast's is below 200 KiB.
const ANSWER_MAX_BYTES: usize = 4 << 20;

/// Patience for one exchange; a broker answers within its own deadline of 10 s.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// Patience for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A client bound to one broker; clones share its connections.
#[derive(Debug, Clone)]
pub struct HttpClient {
    base: String,
    /// `host:port`.
    address: Arc<str>,
    host: HeaderValue,
    /// Not in use now; the last used is used first.
    kept: Arc<Mutex<Vec<Connection>>>,
}

/// No connection could be made: nothing was sent.
#[derive(Debug, thiserror::Error)]
#[error("connect to {address}: {source}")]
struct NotConnected {
    address: Arc<str>,
    source: io::Error,
}

/// Whether a failed exchange certainly never reached the broker: no connection could be made for it.
#[must_use]
pub fn was_never_sent(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<NotConnected>())
}

/// One connection: the handle of its requests, and what moves its bytes, until it is over.
#[derive(Debug)]
struct Connection {
    requests: SendRequest<Full<Bytes>>,
    bytes: Option<http1::Connection<TokioIo<TcpStream>, Full<Bytes>>>,
}

impl Connection {
    async fn open(address: &Arc<str>) -> Result<Self> {
        let connecting = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(&**address));
        let connected = connecting.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let socket = connected.map_err(|source| NotConnected { address: Arc::clone(address), source })?;
        // Without it the only cost is time.
        let _ = socket.set_nodelay(true);
        let (requests, bytes) = http1::handshake(TokioIo::new(socket)).await?;
        Ok(Self { requests, bytes: Some(bytes) })
    }

    /// Does `work` while bytes move. Once they do not any more, whatever still waits for them is told so.
    async fn driven<T>(
        bytes: &mut Option<http1::Connection<TokioIo<TcpStream>, Full<Bytes>>>,
        work: impl Future<Output = T>,
    ) -> T {
        let mut work = pin!(work);
        poll_fn(|cx| {
            let Some(connection) = bytes else { return work.as_mut().poll(cx) };
            if let Poll::Ready(done) = work.as_mut().poll(cx) {
                return Poll::Ready(done);
            }
            if Pin::new(connection).poll(cx).is_ready() {
                *bytes = None;
            }
            work.as_mut().poll(cx)
        })
        .await
    }

    /// Whether another exchange may follow.
    async fn is_reusable(&mut self) -> bool {
        let Self { requests, bytes } = self;
        Self::driven(bytes, requests.ready()).await.is_ok() && bytes.is_some()
    }
}

/// What came back.
#[derive(Debug, Clone)]
pub struct HttpAnswer {
    /// Status code.
    pub status: u16,
    /// Body, complete.
    pub body: Bytes,
    /// `Retry-After`, as it was written.
    pub retry_after: Option<String>,
}

impl HttpAnswer {
    /// `Retry-After` in seconds, the only form that the broker writes.
    #[must_use]
    pub fn asks_to_wait(&self) -> Option<Duration> {
        self.retry_after.as_ref()?.parse().ok().map(Duration::from_secs)
    }
}

impl HttpClient {
    /// A client for `base`, `http://host:port`.
    ///
    /// # Errors
    /// When `base` is not such an address.
    pub fn new(base: &str) -> Result<Self> {
        let base = base.trim_end_matches('/').to_owned();
        let uri: Uri = base.parse().with_context(|| format!("{base:?} is not an address"))?;
        if uri.scheme_str() != Some("http") || uri.host().is_none() {
            bail!("{base:?}: the load generator speaks plain HTTP, http://host:port");
        }
        let authority = uri.authority().with_context(|| format!("{base:?} has no host"))?;
        let host = HeaderValue::from_str(authority.as_str())?;
        let address = match authority.port_u16() {
            Some(_) => authority.as_str().into(),
            None => format!("{authority}:80").into(),
        };
        Ok(Self { base, address, host, kept: Arc::default() })
    }

    /// Posts `body` with these headers and reads the answer.
    ///
    /// # Errors
    /// When no complete answer came: whether the broker acted is not known then.
    pub async fn post(&self, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Result<HttpAnswer> {
        self.exchange(Method::POST, path, headers, body.into()).await
    }

    /// Gets `path`.
    ///
    /// # Errors
    /// When no complete answer came.
    pub async fn get(&self, path: &str) -> Result<HttpAnswer> {
        self.exchange(Method::GET, path, &[], Bytes::new()).await
    }

    async fn exchange(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Bytes) -> Result<HttpAnswer> {
        let mut request = Request::builder().method(method.clone()).uri(path).header(HOST, &self.host);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body)).with_context(|| format!("build a request to {path}"))?;
        let exchange = self.carry_out(request);
        let answer = tokio::time::timeout(EXCHANGE_TIMEOUT, exchange).await;
        answer
            .unwrap_or_else(|_| bail!("no answer within {EXCHANGE_TIMEOUT:?}"))
            .with_context(|| format!("{method} {}{path}", self.base))
    }

    /// Sends a request on a kept connection, or on a new one.
    async fn carry_out(&self, mut request: Request<Full<Bytes>>) -> Result<HttpAnswer> {
        loop {
            let kept = self.kept().pop();
            let is_kept = kept.is_some();
            let mut connection = match kept {
                Some(kept) => kept,
                None => Connection::open(&self.address).await?,
            };
            let answering = connection.requests.try_send_request(request);
            match Connection::driven(&mut connection.bytes, answering).await {
                Ok(answer) => {
                    let status = answer.status().as_u16();
                    let retry_after = answer.headers().get(hyper::header::RETRY_AFTER);
                    let retry_after = retry_after.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
                    let body = Limited::new(answer.into_body(), ANSWER_MAX_BYTES).collect();
                    let body = Connection::driven(&mut connection.bytes, body).await;
                    let body = body.map_err(|error| anyhow::anyhow!("read the answer: {error}"))?.to_bytes();
                    if connection.is_reusable().await {
                        self.kept().push(connection);
                    }
                    return Ok(HttpAnswer { status, body, retry_after });
                }
                Err(mut failed) => match failed.take_message() {
                    // Closed since it was last used, and not a byte of this request was written to it.
                    Some(unsent) if is_kept => request = unsent,
                    Some(_) | None => return Err(failed.into_error().into()),
                },
            }
        }
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers one request on a connection.
    async fn answer(socket: &mut TcpStream) {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut request = [0; 4096];
        let len = socket.read(&mut request).await.unwrap();
        assert!(request[..len].starts_with(b"POST /path HTTP/1.1\r\n"));
        socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
    }

    #[tokio::test]
    async fn a_connection_is_used_again_and_replaced_once_the_broker_has_closed_it() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = HttpClient::new(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        let both_answered = tokio::sync::Notify::new();
        let broker = async {
            let (mut first, _) = listener.accept().await.unwrap();
            answer(&mut first).await;
            answer(&mut first).await;
            both_answered.notified().await;
            drop(first);
            answer(&mut listener.accept().await.unwrap().0).await;
        };
        let app_server = async {
            for _ in 0..2 {
                assert_eq!(client.post("/path", &[], "x").await.unwrap().body, "ok");
            }
            both_answered.notify_one();
            tokio::time::timeout(CONNECT_TIMEOUT, gone(&client)).await.unwrap();
            assert_eq!(client.post("/path", &[], "x").await.unwrap().status, 200);
        };
        tokio::join!(broker, app_server);
    }

    /// Waits until the end of the kept connection is here to be seen.
    async fn gone(client: &HttpClient) {
        let kept = client.kept().pop().unwrap();
        let Connection { requests, bytes } = kept;
        let parts = bytes.unwrap().into_parts();
        let socket = parts.io.into_inner();
        let mut byte = [0];
        assert_eq!(socket.peek(&mut byte).await.unwrap(), 0);
        drop(requests);
        let (requests, bytes) = http1::handshake(TokioIo::new(socket)).await.unwrap();
        client.kept().push(Connection { requests, bytes: Some(bytes) });
    }

    #[tokio::test]
    async fn a_refused_connection_was_never_sent_and_a_broken_one_may_have_been() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let client = HttpClient::new(&format!("http://{address}")).unwrap();
        let hang_up = async { drop(listener.accept().await.unwrap()) };
        let (answer, ()) = tokio::join!(client.post("/", &[], "x"), hang_up);
        assert!(!was_never_sent(&answer.unwrap_err()));
        drop(listener);
        assert!(was_never_sent(&client.post("/", &[], "x").await.unwrap_err()));
    }
}
