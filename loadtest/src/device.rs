//! A device: it checks in, registers, and holds an MCS connection, as the published clients do.
//!
//! Owns one connection's stream ids and the acknowledgements it owes. Leaves to its user what a message means and when to
//! acknowledge. The invariant: every frame counts in the stream ids of its side, whatever its tag.

use std::{
    collections::VecDeque,
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use martlet_proto::{
    device::{
        checkin::{AndroidCheckinProto, AndroidCheckinRequest, AndroidCheckinResponse},
        mcs::{HeartbeatAck, HeartbeatPing, LoginRequest, Setting, login_request::AuthService},
    },
    mcs::{
        frame::{self, Decoder, Tag},
        stanza::{self, Stanza},
    },
};
use prost::Message as _;
use rustls::{
    ClientConfig, RootCertStore, SupportedCipherSuite,
    client::Resumption,
    crypto::{
        CryptoProvider,
        ring::{self, cipher_suite},
    },
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead as _, AsyncWriteExt as _, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::http::{HttpAnswer, HttpClient};

/// Version of the protocol we speak.
const MCS_VERSION: u8 = 41;

/// Bytes read at once, on the stack: a device that waits holds no buffer.
const READ_BYTES: usize = 4 << 10;

/// Who a device is: what check-in gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Android id.
    pub android_id: u64,
    /// Its secret.
    pub security_token: u64,
}

/// The broker asks to come again later (503): nothing was done. Look for it in the error of [`check_in`], [`register`], [`unregister`].
#[derive(Debug, Clone, thiserror::Error)]
#[error("{what} was answered 503: {said}")]
pub struct Busy {
    what: &'static str,
    said: String,
    /// How long it asks to wait, if it says so.
    pub retry_after: Option<Duration>,
}

impl Busy {
    #[cfg(test)]
    pub(crate) fn later(retry_after: Option<Duration>) -> Self {
        Self { what: "a test", said: String::new(), retry_after }
    }

    fn answered(what: &'static str, answer: &HttpAnswer) -> Result<(), Self> {
        let said = || String::from_utf8_lossy(&answer.body).trim().to_owned();
        match answer.status {
            503 => Err(Self { what, said: said(), retry_after: answer.asks_to_wait() }),
            _ => Ok(()),
        }
    }
}

/// Checks in: a new identity, or the known one confirmed.
///
/// # Errors
/// When the broker refuses ([`Busy`]: for now) or does not answer.
pub async fn check_in(http: &HttpClient, known: Option<Identity>) -> Result<Identity> {
    let request = AndroidCheckinRequest {
        id: known.map(|identity| identity.android_id.cast_signed()),
        security_token: known.map(|identity| identity.security_token),
        version: Some(3),
        checkin: AndroidCheckinProto { r#type: Some(3), ..AndroidCheckinProto::default() },
        ..AndroidCheckinRequest::default()
    };
    let headers = [("content-type", "application/x-protobuf")];
    let answer = http.post("/checkin", &headers, request.encode_to_vec()).await?;
    Busy::answered("check-in", &answer)?;
    if answer.status != 200 {
        bail!("check-in was answered {}: {}", answer.status, String::from_utf8_lossy(&answer.body));
    }
    let response = AndroidCheckinResponse::decode(answer.body).context("decode the check-in answer")?;
    match (response.android_id, response.security_token) {
        (Some(android_id), Some(security_token)) if response.stats_ok => Ok(Identity { android_id, security_token }),
        _ => bail!("check-in was answered without an identity"),
    }
}

/// Registers `app` for `sender` in the legacy form; the registration token.
///
/// # Errors
/// When the broker refuses (the error holds its word; [`Busy`]: for now) or does not answer.
pub async fn register(http: &HttpClient, identity: Identity, app: &str, sender: &str) -> Result<String> {
    register_form(http, identity, &format!("app={app}&sender={sender}&device={}", identity.android_id)).await
}

/// Removes every registration of `app` on this device.
///
/// # Errors
/// As [`register`].
pub async fn unregister(http: &HttpClient, identity: Identity, app: &str) -> Result<()> {
    let form = format!("app={app}&delete=true&device={}", identity.android_id);
    register_form(http, identity, &form).await.map(drop)
}

async fn register_form(http: &HttpClient, identity: Identity, form: &str) -> Result<String> {
    let login = format!("AidLogin {}:{}", identity.android_id, identity.security_token);
    let headers = [("authorization", login.as_str()), ("content-type", "application/x-www-form-urlencoded")];
    let answer = http.post("/c2dm/register3", &headers, form.to_owned()).await?;
    Busy::answered("registration", &answer)?;
    let text = String::from_utf8_lossy(&answer.body);
    match text.split_once('=') {
        Some(("token" | "deleted", value)) => Ok(value.to_owned()),
        _ => bail!("registration was answered {}: {text}", answer.status),
    }
}

/// The cipher suites that Chromium offers, in its order; Android's are the same three for TLS 1.3, AES-128 first.
///
/// A server takes the first of the client's that it knows. rustls's own order begins with AES-256, whose handshake hashes with
/// SHA-384: that took 6 % of the gateway's CPU in a storm of logins which no real device would cause.
static CIPHER_SUITES: [SupportedCipherSuite; 9] = [
    cipher_suite::TLS13_AES_128_GCM_SHA256,
    cipher_suite::TLS13_AES_256_GCM_SHA384,
    cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    cipher_suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    cipher_suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
];

/// TLS settings that trust the certificates of a PEM file and nothing else, and offer the cipher suites of a real device in its
/// order. Sessions are never resumed: one process stands for many devices, and none of them would have the session of another.
///
/// # Errors
/// When the file cannot be read or holds no certificate.
pub fn trusting(ca_file: &std::path::Path) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    for cert in CertificateDer::pem_file_iter(ca_file).with_context(|| format!("read {}", ca_file.display()))? {
        roots.add(cert.with_context(|| format!("parse {}", ca_file.display()))?)?;
    }
    if roots.is_empty() {
        bail!("{} holds no certificate", ca_file.display());
    }
    let provider = CryptoProvider { cipher_suites: CIPHER_SUITES.to_vec(), ..ring::default_provider() };
    let config = ClientConfig::builder_with_provider(Arc::new(provider)).with_safe_default_protocol_versions()?;
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// One MCS connection after login.
#[derive(Debug)]
pub struct Connection {
    stream: TlsStream<TcpStream>,
    decoder: Decoder,
    /// Received and not yet decoded.
    input: Bytes,
    /// Frames of each side so far.
    received: i32,
    sent: i32,
    /// Last frame that holds a message or an IQ.
    owed: i32,
    /// What our frames have reported of `received`.
    reported: i32,
    /// Acknowledgements under way: number of our frame, what it acknowledged.
    unconfirmed: VecDeque<(i32, i32)>,
    confirmed: i32,
}

/// A frame from the server, with its stream id.
#[derive(Debug)]
pub struct Received {
    /// Number of the frame on the server's side.
    pub stream_id: i32,
    /// What it holds.
    pub stanza: Stanza,
}

impl Connection {
    /// Connects to `address` (`host:port`) and logs in; `received_ids` are persistent ids received before and perhaps not
    /// acknowledged.
    ///
    /// # Errors
    /// When the connection fails or the login is refused.
    pub async fn open(
        address: &str,
        tls: Arc<ClientConfig>,
        identity: Identity,
        received_ids: Vec<String>,
    ) -> Result<Self> {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(host).with_context(|| format!("{address} has no host name"))?;
        let socket = TcpStream::connect(address).await.with_context(|| format!("connect to {address}"))?;
        socket.set_nodelay(true)?;
        let stream =
            TlsConnector::from(tls).connect(name, socket).await.with_context(|| format!("TLS with {address}"))?;
        let mut connection = Self {
            stream,
            decoder: Decoder::of_server(),
            input: Bytes::new(),
            received: 0,
            sent: 0,
            owed: 0,
            reported: 0,
            unconfirmed: VecDeque::new(),
            confirmed: 0,
        };
        let login = frame::encode_first(MCS_VERSION, Tag::LoginRequest, &login(identity, received_ids));
        connection.write(&login).await?;
        match connection.next().await? {
            Some(Received { stanza: Stanza::LoginResponse(response), .. }) => match response.error {
                None => Ok(connection),
                Some(error) => bail!("login was refused: {} {:?}", error.code, error.message),
            },
            Some(other) => bail!("login was answered by {:?}", other.stanza),
            None => bail!("{address} closed the connection at login"),
        }
    }

    /// The next frame; `None` when the server has closed. Pings are answered on the way and not returned.
    ///
    /// Safe to cancel: what was read stays. (A cancelled answer to a ping is sent again with the next.)
    ///
    /// # Errors
    /// When the connection breaks or the server sends what is no MCS.
    pub async fn next(&mut self) -> Result<Option<Received>> {
        loop {
            let mut rest = &self.input[..];
            let decoded = self.decoder.decode(&mut rest).context("decode a frame of the server")?;
            let used = self.input.len() - rest.len();
            drop(self.input.split_to(used));
            let Some(frame) = decoded else {
                self.input = poll_fn(|cx| read(&mut self.stream, cx)).await?;
                if self.input.is_empty() {
                    return Ok(None);
                }
                continue;
            };
            self.received += 1;
            let stanza = Stanza::decode(&frame).context("decode a stanza of the server")?;
            if let Some(through) = stanza.acknowledged_through() {
                self.confirm(i32::try_from(through).unwrap_or(i32::MAX));
            }
            if let Stanza::HeartbeatPing(ping) = &stanza {
                let ack = HeartbeatAck { status: ping.status, ..HeartbeatAck::default() };
                self.send_ack_frame(|last| Stanza::HeartbeatAck(HeartbeatAck { last_stream_id_received: last, ..ack }))
                    .await?;
                continue;
            }
            if matches!(stanza, Stanza::Data(_) | Stanza::Iq(_)) {
                self.owed = self.received;
            }
            return Ok(Some(Received { stream_id: self.received, stanza }));
        }
    }

    /// Acknowledges everything received so far (StreamAck).
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn stream_ack(&mut self) -> Result<()> {
        self.send_ack_frame(|last| Stanza::Iq(Box::new(stanza::stream_ack(last.unwrap_or_default())))).await
    }

    /// Asks for a sign of life, which confirms our acknowledgements.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn ping(&mut self) -> Result<()> {
        let ping =
            |last| Stanza::HeartbeatPing(HeartbeatPing { last_stream_id_received: last, ..HeartbeatPing::default() });
        self.send_ack_frame(ping).await
    }

    /// Stream id up to which the server has shown that it saw our acknowledgements.
    #[must_use]
    pub fn confirmed_through(&self) -> i32 {
        self.confirmed
    }

    /// Stream id of the last frame that was received, heartbeats excepted: what an acknowledgement is owed for.
    #[must_use]
    pub fn received_through(&self) -> i32 {
        self.owed
    }

    /// Whether there are frames of the server that no frame of ours has acknowledged.
    #[must_use]
    pub fn owes_ack(&self) -> bool {
        self.reported < self.received
    }

    /// Ends the connection in order.
    ///
    /// # Errors
    /// When the connection breaks first, which comes to the same.
    pub async fn close(mut self) -> Result<()> {
        self.write(&frame::encode(Tag::Close, &martlet_proto::device::mcs::Close {})).await?;
        Ok(self.stream.shutdown().await?)
    }

    async fn send_ack_frame(&mut self, frame: impl FnOnce(Option<i32>) -> Stanza) -> Result<()> {
        let bytes = frame(Some(self.received)).encode().expect("heartbeats and IQs have bytes");
        // Counted before the write: what is half written has begun.
        self.reported = self.received;
        self.unconfirmed.push_back((self.sent + 1, self.received));
        self.write(&bytes).await
    }

    fn confirm(&mut self, through: i32) {
        while let Some(&(frame, acknowledged)) = self.unconfirmed.front()
            && frame <= through
        {
            self.confirmed = acknowledged;
            self.unconfirmed.pop_front();
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.sent += 1;
        self.stream.write_all(bytes).await?;
        Ok(self.stream.flush().await?)
    }
}

/// What came; nothing at the end of the stream.
fn read(stream: &mut TlsStream<TcpStream>, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
    let mut bytes = [0; READ_BYTES];
    let mut buffer = ReadBuf::new(&mut bytes);
    ready!(Pin::new(stream).poll_read(cx, &mut buffer))?;
    Poll::Ready(Ok(Bytes::copy_from_slice(buffer.filled())))
}

fn login(identity: Identity, received_ids: Vec<String>) -> LoginRequest {
    LoginRequest {
        id: "martlet-device".to_owned(),
        domain: "mcs.android.com".to_owned(),
        user: identity.android_id.to_string(),
        resource: identity.android_id.to_string(),
        auth_token: identity.security_token.to_string(),
        device_id: Some(format!("android-{:x}", identity.android_id)),
        setting: vec![Setting { name: "new_vc".to_owned(), value: "1".to_owned() }],
        received_persistent_id: received_ids,
        adaptive_heartbeat: Some(false),
        use_rmq2: Some(true),
        auth_service: Some(AuthService::AndroidId as i32),
        network_type: Some(1),
        ..LoginRequest::default()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rustls::CipherSuite;

    use super::*;

    #[test]
    fn a_device_offers_every_cipher_suite_that_rustls_has_and_aes_128_first() {
        let names = |suites: &[SupportedCipherSuite]| -> Vec<CipherSuite> {
            suites.iter().map(SupportedCipherSuite::suite).collect()
        };
        let (ours, all) = (names(&CIPHER_SUITES), names(ring::ALL_CIPHER_SUITES));
        assert_eq!(ours[0], CipherSuite::TLS13_AES_128_GCM_SHA256);
        let sorted = |suites: Vec<CipherSuite>| suites.into_iter().map(u16::from).collect::<BTreeSet<_>>();
        assert_eq!(sorted(ours), sorted(all));
    }
}
