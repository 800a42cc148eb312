//! A device for tests: identity, registration, and an MCS connection over TLS that a test drives frame by frame.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::Arc,
    time::{Duration, Instant},
};

use martlet_proto::{
    device::{
        checkin::{AndroidCheckinProto, AndroidCheckinRequest, AndroidCheckinResponse},
        mcs::{DataMessageStanza, HeartbeatPing, LoginRequest, LoginResponse},
    },
    mcs::{
        frame::{self, Decoder, Frame, Tag},
        stanza::{self, Stanza},
    },
};
use prost::Message as _;
use rustls::{ClientConfig, ClientConnection, StreamOwned, pki_types::ServerName};

use crate::{
    app_server::{Answer, Http},
    broker::Broker,
};

/// Patience for what must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// How long a test listens for what must not come.
pub(crate) const QUIET: Duration = Duration::from_millis(600);

/// A checked-in device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) android_id: u64,
    pub(crate) security_token: u64,
}

/// Checks a new device in.
pub(crate) fn check_in(broker: &Broker) -> Identity {
    let request = AndroidCheckinRequest {
        version: Some(3),
        checkin: AndroidCheckinProto::default(),
        ..AndroidCheckinRequest::default()
    };
    let answer = check_in_with(broker, &request.encode_to_vec(), &[("Content-Type", "application/x-protobuf")]);
    assert_eq!(answer.status, 200);
    let response = AndroidCheckinResponse::decode(&answer.body[..]).unwrap();
    Identity { android_id: response.android_id.unwrap(), security_token: response.security_token.unwrap() }
}

/// A check-in of these bytes.
pub(crate) fn check_in_with(broker: &Broker, body: &[u8], headers: &[(&str, &str)]) -> Answer {
    Http::connect(&broker.address("http")).request("POST", "/checkin", headers, body)
}

impl Identity {
    /// The header of device requests.
    pub(crate) fn authorization(&self) -> String {
        format!("AidLogin {}:{}", self.android_id, self.security_token)
    }

    /// A request to register3 with this form; `device` is added.
    pub(crate) fn register_form(&self, broker: &Broker, form: &str) -> Answer {
        let form = format!("{form}&device={}", self.android_id);
        let authorization = self.authorization();
        let headers =
            [("Authorization", authorization.as_str()), ("Content-Type", "application/x-www-form-urlencoded")];
        Http::connect(&broker.address("http")).request("POST", "/c2dm/register3", &headers, form.as_bytes())
    }

    /// Registers an application for senders (comma list) in the legacy form; the token.
    pub(crate) fn register(&self, broker: &Broker, app: &str, senders: &str) -> String {
        let answer = self.register_form(broker, &format!("app={app}&sender={senders}"));
        let text = answer.text();
        text.strip_prefix("token=").unwrap_or_else(|| panic!("{} {text}", answer.status)).to_owned()
    }

    /// What a login says.
    pub(crate) fn login_request(&self) -> LoginRequest {
        LoginRequest {
            id: "chrome-94.0.4606.51".to_owned(),
            domain: "mcs.android.com".to_owned(),
            user: self.android_id.to_string(),
            resource: self.android_id.to_string(),
            auth_token: self.security_token.to_string(),
            device_id: Some(format!("android-{:x}", self.android_id)),
            auth_service: Some(2),
            adaptive_heartbeat: Some(false),
            ..LoginRequest::default()
        }
    }

    /// Logs in and returns the connection after the login response.
    pub(crate) fn connect(&self, broker: &Broker) -> Mcs {
        self.connect_with(broker, self.login_request())
    }

    /// Logs in naming persistent ids that were received before.
    pub(crate) fn connect_having(&self, broker: &Broker, received: &[&str]) -> Mcs {
        let received_persistent_id = received.iter().map(ToString::to_string).collect();
        self.connect_with(broker, LoginRequest { received_persistent_id, ..self.login_request() })
    }

    /// Logs in with this request.
    pub(crate) fn connect_with(&self, broker: &Broker, login: LoginRequest) -> Mcs {
        let mut mcs = Mcs::open(broker);
        mcs.write(&frame::encode_first(41, Tag::LoginRequest, &login));
        let response = mcs.login_response();
        assert!(response.error.is_none(), "{response:?}");
        mcs
    }
}

/// An MCS connection, frame by frame. Stream ids of both sides are counted.
pub(crate) struct Mcs {
    stream: StreamOwned<ClientConnection, TcpStream>,
    decoder: Decoder,
    input: Vec<u8>,
    /// Frames received.
    pub(crate) received: i32,
    /// Frames sent through [`Mcs::send`] and the login.
    pub(crate) sent: i32,
}

impl Mcs {
    /// TLS only; nothing is sent.
    pub(crate) fn open(broker: &Broker) -> Self {
        Self::open_with(broker, martlet_loadtest::device::trusting(&broker.ca_file()).unwrap())
    }

    /// The same with these TLS settings.
    pub(crate) fn open_with(broker: &Broker, tls: Arc<ClientConfig>) -> Self {
        let socket = TcpStream::connect(broker.address("mcs")).unwrap();
        socket.set_nodelay(true).unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let stream = StreamOwned::new(ClientConnection::new(tls, name).unwrap(), socket);
        Self { stream, decoder: Decoder::of_server(), input: Vec::new(), received: 0, sent: 0 }
    }

    /// Writes bytes as they are, flushed.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
        self.stream.flush().unwrap();
    }

    /// The same where the broker may have closed already.
    pub(crate) fn try_write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)?;
        self.stream.flush()
    }

    /// Sends a stanza and counts it.
    pub(crate) fn send(&mut self, stanza: &Stanza) {
        self.sent += 1;
        let bytes = stanza.encode().unwrap();
        self.write(&bytes);
    }

    /// Reads what is there into `input`; false when the broker has closed, none when `patience` is over.
    pub(crate) fn fill(&mut self, patience: Duration) -> Option<bool> {
        self.stream.sock.set_read_timeout(Some(patience.max(Duration::from_millis(1)))).unwrap();
        let mut buffer = [0; 16 << 10];
        match self.stream.read(&mut buffer) {
            Ok(0) => Some(false),
            Ok(count) => {
                self.input.extend_from_slice(&buffer[..count]);
                Some(true)
            }
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => None,
            Err(_) => Some(false),
        }
    }

    /// The next frame; `Ok(None)` when the broker has closed, `Err` when `patience` is over.
    pub(crate) fn frame(&mut self, patience: Duration) -> Result<Option<Frame>, ()> {
        let until = Instant::now() + patience;
        loop {
            let mut rest = &self.input[..];
            let frame = self.decoder.decode(&mut rest).unwrap();
            let used = self.input.len() - rest.len();
            self.input.drain(..used);
            if let Some(frame) = frame {
                self.received += 1;
                return Ok(Some(frame));
            }
            match self.fill(until.saturating_duration_since(Instant::now())) {
                Some(true) => {}
                Some(false) => return Ok(None),
                None if Instant::now() >= until => return Err(()),
                None => {}
            }
        }
    }

    /// The next stanza, which must come.
    pub(crate) fn stanza(&mut self) -> Stanza {
        let frame = self.frame(PATIENCE).expect("a frame in time").expect("a frame, not the end");
        Stanza::decode(&frame).unwrap()
    }

    /// The login response, which must come first.
    pub(crate) fn login_response(&mut self) -> LoginResponse {
        self.sent = 1;
        match self.stanza() {
            Stanza::LoginResponse(response) => *response,
            other => panic!("{other:?}"),
        }
    }

    /// The next message; heartbeats and IQs on the way are passed over.
    pub(crate) fn message(&mut self) -> DataMessageStanza {
        loop {
            match self.stanza() {
                Stanza::Data(data) => return *data,
                Stanza::HeartbeatPing(_) | Stanza::HeartbeatAck(_) | Stanza::Iq(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Asserts that no message comes for a while.
    pub(crate) fn no_message(&mut self) {
        let until = Instant::now() + QUIET;
        while let Ok(Some(frame)) = self.frame(until.saturating_duration_since(Instant::now())) {
            assert_ne!(frame.tag, Tag::Data as u8, "{:?}", Stanza::decode(&frame));
        }
    }

    /// Asserts that the broker closes, whatever it says before; the stanzas it said.
    pub(crate) fn closed(&mut self, patience: Duration) -> Vec<Stanza> {
        let until = Instant::now() + patience;
        let mut said = Vec::new();
        loop {
            match self.frame(until.saturating_duration_since(Instant::now())) {
                Ok(Some(frame)) => said.push(Stanza::decode(&frame).unwrap()),
                Ok(None) => return said,
                Err(()) => panic!("still open after {patience:?}; said {said:?}"),
            }
        }
    }

    /// Acknowledges everything received by a StreamAck and waits until the broker shows that it saw it.
    pub(crate) fn ack_all(&mut self) {
        let through = self.received;
        self.send(&Stanza::Iq(Box::new(stanza::stream_ack(through))));
        self.confirmed(self.sent);
    }

    /// Waits until the broker reports that it received our frame `number`, and what was in it was carried out.
    pub(crate) fn confirmed(&mut self, number: i32) {
        let until = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < until, "frame {number} was never confirmed");
            let ping = HeartbeatPing::default();
            self.send(&Stanza::HeartbeatPing(ping));
            loop {
                let frame = self.frame(PATIENCE).unwrap().unwrap();
                if let Stanza::HeartbeatAck(ack) = Stanza::decode(&frame).unwrap() {
                    if ack.last_stream_id_received.unwrap_or(0) >= number {
                        return;
                    }
                    break;
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Value of a key in a message.
pub(crate) fn value<'a>(message: &'a DataMessageStanza, key: &str) -> Option<&'a str> {
    message.app_data.iter().find(|pair| pair.key == key).map(|pair| pair.value.as_str())
}
