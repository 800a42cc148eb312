//! Drives a device's [`Tls`] over its socket: bytes to read and write, for `conn`.
//!
//! Reads into a buffer that lives for one poll, on the stack. Nothing is read from the socket while plaintext waits to be taken,
//! nothing is encrypted while records wait to be sent, so that a peer can make it keep no more than one read and one write.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::tls::{RECORD_MAX, Tls};

/// Bytes taken from a socket at once.
const READ_BYTES: usize = 4 * 1024;

/// A device's stream after the handshake.
#[derive(Debug)]
pub(super) struct TlsStream<IO> {
    io: IO,
    tls: Tls,
    closing: bool,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> TlsStream<IO> {
    /// Shakes hands. A peer that does it wrong is told why, if its socket takes that at once.
    ///
    /// # Errors
    /// When the socket fails or ends, or the peer speaks no TLS that we do.
    pub(super) async fn accept(config: Arc<ServerConfig>, io: IO) -> io::Result<Box<Self>> {
        let tls = Tls::new(config).map_err(io::Error::other)?;
        let mut stream = Box::new(Self { io, tls, closing: false });
        while stream.tls.is_handshaking() {
            if !poll_fn(|cx| stream.poll_receive(cx)).await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        poll_fn(|cx| stream.poll_send(cx)).await?;
        Ok(stream)
    }

    /// One read of the socket, once what waits for it is sent; false at its end.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        // A peer that shakes hands waits for our part, and answers to its own are not to pile up.
        ready!(self.poll_send(cx))?;
        let mut bytes = [0; READ_BYTES];
        let mut buffer = ReadBuf::new(&mut bytes);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut buffer))?;
        let len = buffer.filled().len();
        if len == 0 {
            return Poll::Ready(Ok(false));
        }
        let received = self.tls.receive(&mut bytes[..len]);
        // In the same poll: what TLS has to say (its part of a handshake, an alert) waits for nothing.
        match (self.poll_send(cx), received) {
            (_, Err(error)) => Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, error))),
            (Poll::Ready(Err(error)), Ok(())) => Poll::Ready(Err(error)),
            (_, Ok(())) => Poll::Ready(Ok(true)),
        }
    }

    /// Until nothing waits to be sent; then no buffer is left.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.tls.outgoing.has_remaining() {
            let len = ready!(Pin::new(&mut self.io).poll_write(cx, &self.tls.outgoing))?;
            if len == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.tls.outgoing.advance(len);
        }
        self.tls.outgoing = BytesMut::new();
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.tls.plain.is_empty() {
            if self.tls.peer_closed {
                return Poll::Ready(Ok(()));
            }
            if !ready!(self.poll_receive(cx))? {
                // Cut off, which is not the same as closed.
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        let len = buffer.remaining().min(self.tls.plain.len());
        buffer.put_slice(&self.tls.plain[..len]);
        self.tls.plain.advance(len);
        if self.tls.plain.is_empty() {
            self.tls.plain = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_send(cx))?;
        let data = &data[..data.len().min(RECORD_MAX)];
        self.tls.encrypt(data).map_err(io::Error::other)?;
        match self.poll_send(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            // Accepted: `poll_flush` sends what is left.
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(data.len())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.closing {
            self.closing = true;
            self.tls.close().map_err(io::Error::other)?;
        }
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
