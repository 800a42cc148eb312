//! Accepts HTTP connections and serves them until they end or the gateway drains.
//!
//! Past `http.connections_max` one client of each address waits for a slot, the others in the kernel's backlog. The slot comes
//! after the accept: an address that nobody calls must not hold one, or the last slot would belong to one address for good.
//! Every connection is a task of the tracker in [`serve`], which returns when the last of them has ended. On drain a connection
//! finishes the request it is in, says `Connection: close`, and takes no other; a handshake under way is given up. Over TLS the client
//! chooses HTTP/1.1 or HTTP/2 (`http2`) by ALPN; one that names no protocol speaks HTTP/1.1.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Semaphore,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Http, http2};
use crate::metrics::Limit;

/// After a failed accept: descriptors become free as connections end.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves one address until `drain` fires and its connections have ended. `slots` are shared by all HTTP addresses.
pub(crate) async fn serve(
    http: Arc<Http>,
    listener: TcpListener,
    tls: Option<Arc<rustls::ServerConfig>>,
    slots: Arc<Semaphore>,
    drain: CancellationToken,
) {
    let acceptor = tls.map(TlsAcceptor::from);
    let open = TaskTracker::new();
    let accept = async {
        loop {
            match listener.accept().await {
                Ok((socket, peer)) => {
                    if slots.available_permits() == 0 {
                        http.metrics.limit(Limit::Connections);
                    }
                    let slot = Arc::clone(&slots).acquire_owned().await.expect("the semaphore is never closed");
                    let _ = socket.set_nodelay(true);
                    let (http, acceptor, drain) = (Arc::clone(&http), acceptor.clone(), drain.child_token());
                    let tasks = open.clone();
                    open.spawn(async move {
                        http.metrics.http_connections.inc();
                        match acceptor {
                            None => connection(&http, socket, peer, drain).await,
                            Some(acceptor) => {
                                let handshake =
                                    tokio::time::timeout(http.config.handshake_timeout, acceptor.accept(socket));
                                let shaken = tokio::select! {
                                    shaken = handshake => Some(shaken),
                                    () = drain.cancelled() => None,
                                };
                                match shaken {
                                    Some(Ok(Ok(stream))) if stream.get_ref().1.alpn_protocol() == Some(http2::ALPN) => {
                                        http.metrics.http2_connections.inc();
                                        Box::pin(http2::serve(&http, stream, peer, tasks, drain)).await;
                                        http.metrics.http2_connections.dec();
                                    }
                                    Some(Ok(Ok(stream))) => connection(&http, stream, peer, drain).await,
                                    // Scanners and clients that do not trust us: not our trouble.
                                    Some(Ok(Err(error))) => tracing::debug!(%peer, %error, "a TLS handshake failed"),
                                    Some(Err(_)) => http.metrics.limit(Limit::Slow),
                                    None => {}
                                }
                            }
                        }
                        http.metrics.http_connections.dec();
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept of an HTTP connection failed");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    };
    // Around both waits, so that a full house cannot hold up a shutdown.
    tokio::select! { () = drain.cancelled() => {}, () = accept => {} }
    drop(listener);
    open.close();
    open.wait().await;
}

async fn connection(
    http: &Arc<Http>,
    stream: impl AsyncRead + AsyncWrite + Unpin,
    peer: SocketAddr,
    drain: CancellationToken,
) {
    let service = service_fn(|request| {
        let http = Arc::clone(http);
        async move { Ok::<_, std::convert::Infallible>(http.answer(request, peer.ip()).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(http.config.header_timeout)
        .max_headers(http.config.headers_max)
        .max_buf_size(http.config.header_bytes_max)
        // Answers are short: to copy one behind its head costs less than a write of two parts.
        .writev(false)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = drain.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        if error.is_timeout() {
            http.metrics.limit(Limit::Slow);
        }
        if error.is_parse_too_large() {
            http.metrics.limit(Limit::Head);
        }
        tracing::debug!(%peer, %error, "an HTTP connection ended");
    }
}
