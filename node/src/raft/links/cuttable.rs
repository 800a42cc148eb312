//! Links that tests cut and heal, in one or both directions, while connections are open.
//!
//! A cut breaks the connections that were dialled over it and refuses new ones, as a firewall does that answers; what a peer
//! dials the other way is not touched.

use std::{
    collections::BTreeMap,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, ready},
};

use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::{Links, Wire};
use crate::raft::Member;

/// All links of a cluster in one process. Cloning gives another handle.
#[derive(Debug, Clone)]
pub struct Wiring {
    inner: Arc<dyn Links>,
    /// By (from, to): cancelled while cut.
    links: Arc<Mutex<BTreeMap<(u64, u64), CancellationToken>>>,
}

impl Wiring {
    /// Everything connected, by these links.
    pub fn new(inner: Arc<dyn Links>) -> Wiring {
        Wiring { inner, links: Arc::default() }
    }

    /// What this node dials with.
    pub fn of(&self, node: u64) -> Arc<dyn Links> {
        Arc::new(FromNode { node, wiring: self.clone() })
    }

    /// Nothing that `from` dials reaches `to` any more.
    pub fn cut_one_way(&self, from: u64, to: u64) {
        self.link(from, to).cancel();
    }

    /// Neither reaches the other any more.
    pub fn cut(&self, a: u64, b: u64) {
        self.cut_one_way(a, b);
        self.cut_one_way(b, a);
    }

    /// Both reach each other again.
    pub fn heal(&self, a: u64, b: u64) {
        for link in [(a, b), (b, a)] {
            self.locked().insert(link, CancellationToken::new());
        }
    }

    fn link(&self, from: u64, to: u64) -> CancellationToken {
        self.locked().entry((from, to)).or_default().clone()
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<(u64, u64), CancellationToken>> {
        self.links.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[derive(Debug)]
struct FromNode {
    node: u64,
    wiring: Wiring,
}

impl Links for FromNode {
    fn dial(&self, peer: Member) -> BoxFuture<'static, io::Result<Box<dyn Wire>>> {
        let cut = self.wiring.link(self.node, peer.node);
        let dialling = self.wiring.inner.dial(peer);
        Box::pin(async move {
            if cut.is_cancelled() {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            let wire = dialling.await?;
            Ok(Box::new(CutWire { wire, cut: Box::pin(cut.cancelled_owned()), gone: false }) as Box<dyn Wire>)
        })
    }
}

struct CutWire {
    wire: Box<dyn Wire>,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    gone: bool,
}

impl CutWire {
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        self.gone = self.gone || self.cut.as_mut().poll(cx).is_ready();
        if self.gone { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }
}

impl AsyncRead for CutWire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.wire).poll_read(cx, buf)
    }
}

impl AsyncWrite for CutWire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.wire).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.wire).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.wire).poll_shutdown(cx))?;
        Poll::Ready(Ok(()))
    }
}
