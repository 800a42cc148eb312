//! How a node reaches its peers: the seam at which tests cut links and TLS is put in.

pub mod cuttable;

use std::{fmt, io};

use futures::future::BoxFuture;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

use super::group::Member;

/// Bytes in both directions.
pub trait Wire: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Wire for T {}

/// Dials peers.
pub trait Links: Send + Sync + fmt::Debug {
    /// A connection to the node of `peer`, encrypted if it is to be.
    fn dial(&self, peer: Member) -> BoxFuture<'static, io::Result<Box<dyn Wire>>>;
}

/// Plain TCP.
#[derive(Debug, Default, Clone, Copy)]
pub struct DirectLinks;

impl Links for DirectLinks {
    fn dial(&self, peer: Member) -> BoxFuture<'static, io::Result<Box<dyn Wire>>> {
        Box::pin(async move {
            let stream = TcpStream::connect(peer.address.as_str()).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn Wire>)
        })
    }
}
