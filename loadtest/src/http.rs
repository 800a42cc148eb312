//! An HTTP/1.1 client for app servers and enrolling devices, over connections that are kept.
//!
//! Plain HTTP only: the generator measures the broker, and the published clients of the end-to-end tests cover TLS.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, Uri};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};

/// Largest answer that is read, bytes: a multicast's is below 200 KiB.
const ANSWER_MAX_BYTES: usize = 4 << 20;

/// Patience for one exchange; a broker answers within its own deadline of 10 s.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// A client bound to one broker; clones share its connections.
#[derive(Debug, Clone)]
pub struct HttpClient {
    base: String,
    client: Client<HttpConnector, Full<Bytes>>,
}

/// Whether a failed exchange certainly never reached the broker: no connection could be made for it.
#[must_use]
pub fn was_never_sent(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| cause.downcast_ref::<hyper_util::client::legacy::Error>().is_some_and(|error| error.is_connect()))
}

/// What came back.
#[derive(Debug, Clone)]
pub struct HttpAnswer {
    /// Status code.
    pub status: u16,
    /// Body, complete.
    pub body: Bytes,
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
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(Duration::from_secs(5)));
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Ok(Self { base, client })
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
        let mut request = Request::builder().method(method.clone()).uri(format!("{}{path}", self.base));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body)).with_context(|| format!("build a request to {path}"))?;
        let exchange = async {
            let answer = self.client.request(request).await?;
            let status = answer.status().as_u16();
            let body = Limited::new(answer.into_body(), ANSWER_MAX_BYTES).collect().await;
            let body = body.map_err(|error| anyhow::anyhow!("read the answer: {error}"))?.to_bytes();
            Ok::<_, anyhow::Error>(HttpAnswer { status, body })
        };
        let answer = tokio::time::timeout(EXCHANGE_TIMEOUT, exchange).await;
        answer
            .unwrap_or_else(|_| bail!("no answer within {EXCHANGE_TIMEOUT:?}"))
            .with_context(|| format!("{method} {}{path}", self.base))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
