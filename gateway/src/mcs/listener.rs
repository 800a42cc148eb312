//! Accepts device connections.
//!
//! Past `connections_max` one device of each address waits for a slot, the others in the kernel's backlog. The slot comes after
//! the accept: an address that nobody calls must not hold one, or the last slot would belong to one address for good. Every
//! connection is a task of the tracker in [`Mcs::serve`], which ends when the last of them has.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Credentials, Doorkeeper, McsConfig, McsMetrics, conn, stream::TlsStream};
use crate::{attach::Attachments, clock::Clock};

/// After a failed accept: descriptors become free as connections end.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Everything a device connection needs; one for all MCS addresses.
#[derive(Debug)]
pub struct Mcs {
    /// Limits and intervals.
    pub config: McsConfig,
    /// Who may connect.
    pub credentials: Arc<dyn Credentials>,
    /// How often.
    pub doorkeeper: Arc<dyn Doorkeeper>,
    /// Where messages come from.
    pub attachments: Attachments,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Instruments.
    pub metrics: Arc<McsMetrics>,
    slots: Arc<Semaphore>,
}

impl Mcs {
    /// Serves nothing yet.
    pub fn new(
        config: McsConfig,
        credentials: Arc<dyn Credentials>,
        doorkeeper: Arc<dyn Doorkeeper>,
        attachments: Attachments,
        clock: Arc<dyn Clock>,
        metrics: Arc<McsMetrics>,
    ) -> Self {
        let slots = Arc::new(Semaphore::new(config.connections_max.min(Semaphore::MAX_PERMITS)));
        Self { config, credentials, doorkeeper, attachments, clock, metrics, slots }
    }

    /// Serves devices on one address until `drain` fires; then stops accepting, says Close to every device, spread over
    /// `drain_spread`, and returns when the last connection has ended.
    ///
    /// `tls`: a certificate that is shown without SNI, as many clients send none; no ALPN; TLS 1.2 and 1.3.
    pub async fn serve(
        self: Arc<Self>,
        listener: TcpListener,
        tls: Arc<rustls::ServerConfig>,
        drain: CancellationToken,
    ) {
        let open = TaskTracker::new();
        let accept = async {
            loop {
                match listener.accept().await {
                    Ok((socket, peer)) => {
                        if self.slots.available_permits() == 0 {
                            self.metrics.slots_awaited.inc();
                        }
                        let slot =
                            Arc::clone(&self.slots).acquire_owned().await.expect("the semaphore is never closed");
                        let connection =
                            Arc::clone(&self).connection(socket, peer, Arc::clone(&tls), slot, drain.child_token());
                        open.spawn(connection);
                    }
                    Err(error) => {
                        self.metrics.accepts_failed.inc();
                        tracing::warn!(%error, "accept of a device connection failed");
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
        self: Arc<Self>,
        socket: TcpStream,
        peer: SocketAddr,
        tls: Arc<rustls::ServerConfig>,
        slot: OwnedSemaphorePermit,
        drain: CancellationToken,
    ) {
        if !self.doorkeeper.admit_login(peer.ip()) {
            self.metrics.turned_away.inc();
            return;
        }
        self.metrics.connections.inc();
        self.tune(&socket);
        // Boxed, as the session's: what only the handshake or the login needs is not to be paid for the life of a connection.
        let handshake = Box::pin(TlsStream::accept(tls, socket));
        let shaken = tokio::select! {
            shaken = tokio::time::timeout(self.config.handshake_timeout, handshake) => Some(shaken),
            () = drain.cancelled() => None,
        };
        match shaken {
            Some(Ok(Ok(stream))) => conn::serve(&self, stream, &drain).await,
            Some(Ok(Err(_)) | Err(_)) => {
                self.metrics.handshakes_failed.inc();
            }
            None => {}
        }
        self.metrics.connections.dec();
        drop(slot);
    }

    /// One frame is one packet, and a peer that vanished is found even if it never answers pings.
    fn tune(&self, socket: &TcpStream) {
        let keepalive =
            TcpKeepalive::new().with_time(self.config.tcp_keepalive).with_interval(self.config.tcp_keepalive / 4);
        let tuned = socket.set_nodelay(true).and_then(|()| SockRef::from(socket).set_tcp_keepalive(&keepalive));
        if let Err(error) = tuned {
            tracing::debug!(%error, "a device's socket cannot be tuned");
        }
    }
}
