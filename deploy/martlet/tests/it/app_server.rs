//! An app server that says exactly what a test wants said: HTTP/1.1 by hand over a socket.

use std::{
    io::{BufRead as _, BufReader, Read, Write},
    net::TcpStream,
    sync::Arc,
    time::Duration,
};

use rustls::{ClientConfig, ClientConnection, StreamOwned, pki_types::ServerName};

use serde_json::Value;

use crate::broker::Broker;

/// Patience for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Plain or TLS.
trait Stream: Read + Write + Send {}

impl<T: Read + Write + Send> Stream for T {}

/// A connection that is kept between requests.
pub(crate) struct Http {
    stream: BufReader<Box<dyn Stream>>,
}

/// What came back.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Names in lower case, in order.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }
}

impl Http {
    pub(crate) fn connect(address: &str) -> Self {
        Self::over(Self::socket(address))
    }

    /// Over a connection that is open.
    pub(crate) fn over(socket: TcpStream) -> Self {
        Self { stream: BufReader::new(Box::new(socket)) }
    }

    /// The same over TLS, on the broker's HTTPS port.
    pub(crate) fn connect_tls(broker: &Broker) -> Self {
        Self::connect_tls_to(&broker.address("https"), martlet_loadtest::device::trusting(&broker.ca_file()).unwrap())
    }

    /// The same with these TLS settings.
    pub(crate) fn connect_tls_to(address: &str, tls: Arc<ClientConfig>) -> Self {
        let session = ClientConnection::new(tls, ServerName::try_from("127.0.0.1").unwrap()).unwrap();
        Self { stream: BufReader::new(Box::new(StreamOwned::new(session, Self::socket(address)))) }
    }

    /// An open connection that is patient with both directions.
    pub(crate) fn socket(address: &str) -> TcpStream {
        let socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        socket.set_nodelay(true).unwrap();
        socket
    }

    /// Writes bytes as they are.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.try_write(bytes).unwrap();
    }

    /// The same where the broker may have closed already.
    pub(crate) fn try_write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.get_mut().write_all(bytes)?;
        self.stream.get_mut().flush()
    }

    /// A whole request with `Content-Length`; `headers` as given.
    pub(crate) fn request(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: gcm-http.googleapis.com\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
        self.write(&[head.as_bytes(), body].concat());
        self.answer()
    }

    /// Reads one answer.
    pub(crate) fn answer(&mut self) -> Answer {
        self.try_answer().unwrap_or_else(|| panic!("the connection was closed instead of an answer"))
    }

    /// Reads one answer; none when the connection is closed instead.
    pub(crate) fn try_answer(&mut self) -> Option<Answer> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let status = line.split(' ').nth(1).unwrap().parse().unwrap();
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line).ok()?;
            let line = line.trim_end();
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let mut answer = Answer { status, headers, body: Vec::new() };
        if let Some(length) = answer.header("content-length") {
            answer.body = vec![0; length.parse().unwrap()];
            self.stream.read_exact(&mut answer.body).ok()?;
        } else if answer.header("transfer-encoding").is_some() {
            loop {
                let mut size = String::new();
                self.stream.read_line(&mut size).ok()?;
                let size = usize::from_str_radix(size.trim(), 16).unwrap();
                let mut chunk = vec![0; size + 2];
                self.stream.read_exact(&mut chunk).ok()?;
                answer.body.extend_from_slice(&chunk[..size]);
                if size == 0 {
                    break;
                }
            }
        }
        Some(answer)
    }
}

/// One JSON send with this key on a connection of its own.
pub(crate) fn send_json(address: &str, key: &str, body: &Value) -> Answer {
    let authorization = format!("key={key}");
    let headers = [("Authorization", authorization.as_str()), ("Content-Type", "application/json")];
    Http::connect(address).request("POST", "/gcm/send", &headers, body.to_string().as_bytes())
}

/// One plain-text send with this key.
pub(crate) fn send_form(address: &str, key: &str, body: &str) -> Answer {
    let authorization = format!("key={key}");
    let headers = [
        ("Authorization", authorization.as_str()),
        ("Content-Type", "application/x-www-form-urlencoded;charset=UTF-8"),
    ];
    Http::connect(address).request("POST", "/gcm/send", &headers, body.as_bytes())
}
