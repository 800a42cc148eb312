//! A device as a test plays it: raw frames over real TLS, no protocol of its own.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use martlet_proto::{
    device::mcs::{DataMessageStanza, HeartbeatPing, LoginRequest, LoginResponse},
    mcs::{
        frame::{Decoder, Tag, encode_first},
        stanza::Stanza,
    },
    tag::{AndroidId, SecurityToken},
};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// No test waits longer for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// One connection.
pub(crate) struct Device {
    stream: TlsStream<TcpStream>,
    decoder: Decoder,
    buffered: Vec<u8>,
}

impl Device {
    pub(crate) async fn connect(address: SocketAddr, tls: Arc<rustls::ClientConfig>) -> Self {
        let socket = TcpStream::connect(address).await.unwrap();
        // An address sends no SNI.
        let name = ServerName::from(address.ip());
        let stream = TlsConnector::from(tls).connect(name, socket).await.unwrap();
        Self { stream, decoder: Decoder::of_server(), buffered: Vec::new() }
    }

    pub(crate) fn tls_version(&self) -> Option<rustls::ProtocolVersion> {
        self.stream.get_ref().1.protocol_version()
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    pub(crate) async fn send(&mut self, stanza: &Stanza) {
        self.write(&stanza.encode().unwrap()).await;
    }

    pub(crate) async fn ping(&mut self, through: Option<i32>) {
        let ping = HeartbeatPing { last_stream_id_received: through, ..HeartbeatPing::default() };
        self.send(&Stanza::HeartbeatPing(ping)).await;
    }

    /// The next frame; `None` at the end of the connection, however it ended.
    pub(crate) async fn next(&mut self) -> Option<Stanza> {
        loop {
            let mut input = &self.buffered[..];
            let frame = self.decoder.decode(&mut input).unwrap();
            let taken = self.buffered.len() - input.len();
            self.buffered.drain(..taken);
            if let Some(frame) = frame {
                return Some(Stanza::decode(&frame).unwrap());
            }
            let mut bytes = [0; 4096];
            let read = tokio::time::timeout(PATIENCE, self.stream.read(&mut bytes));
            match read.await.expect("something comes in time") {
                Ok(0) | Err(_) => return None,
                Ok(len) => self.buffered.extend_from_slice(&bytes[..len]),
            }
        }
    }

    pub(crate) async fn data(&mut self) -> DataMessageStanza {
        match self.next().await {
            Some(Stanza::Data(data)) => *data,
            other => panic!("a message was expected, not {other:?}"),
        }
    }

    /// Pings, and reads the number of the ack.
    pub(crate) async fn pong(&mut self) -> Option<i32> {
        self.ping(None).await;
        match self.next().await {
            Some(Stanza::HeartbeatAck(ack)) => ack.last_stream_id_received,
            other => panic!("an ack was expected, not {other:?}"),
        }
    }

    pub(crate) async fn login(&mut self, request: &LoginRequest) -> LoginResponse {
        self.write(&first_bytes(41, request)).await;
        match self.next().await {
            Some(Stanza::LoginResponse(response)) => *response,
            other => panic!("a login response was expected, not {other:?}"),
        }
    }

    pub(crate) fn version(&self) -> Option<u8> {
        self.decoder.version()
    }
}

pub(crate) fn first_bytes(version: u8, request: &LoginRequest) -> Bytes {
    encode_first(version, Tag::LoginRequest, request)
}

pub(crate) fn login(android_id: AndroidId, token: SecurityToken) -> LoginRequest {
    LoginRequest {
        id: "chrome-94.0.4606.51".into(),
        domain: "mcs.android.com".into(),
        user: android_id.to_string(),
        resource: android_id.to_string(),
        auth_token: token.get().to_string(),
        ..LoginRequest::default()
    }
}
